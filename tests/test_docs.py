"""What the documents say of the files is true."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "tests/README.md", "benchmarks/NOTES.md")
ENDINGS = ("py", "md", "toml", "yaml", "json", "svg", "txt")


def named_files(text: str) -> list[str]:
    """Paths within backticks or links, relative to the root; those of a run folder or of the reader are left out."""
    found = re.findall(rf"(?<=[`(])(?:[\w.-]+/)*[\w.-]+\.(?:{'|'.join(ENDINGS)})(?=[`)])", text)
    folders = re.findall(r"(?<=`)(?:[\w.-]+/)+(?=`)", text)
    return found + folders


def exists(name: str, beside: Path) -> bool:
    """From the root, or from the document's own folder."""
    return (ROOT / name).exists() or (beside / name).exists()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_names_exists(document: str):
    file = ROOT / document
    text = file.read_text(encoding="utf-8")
    new = set(re.findall(r"`([\w./-]+)` \(new", text))
    missing = [name for name in named_files(text) if name not in new and not exists(name, file.parent)]
    assert not missing, f"{document} names {', '.join(missing)}"


def test_new_files_of_examples_are_new():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    new = re.findall(r"`([\w./-]+)` \(new", text)
    assert new
    assert not [name for name in new if (ROOT / name).exists()]
