"""What the documents say of the files is true."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from preftune.cli.main import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "tests/README.md", "benchmarks/NOTES.md",
             "docs/scale.md", "examples/README.md")  # fmt: skip
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


def written_commands(text: str) -> list[list[str]]:
    """What follows `preftune` in backticks, and at the beginning of lines in blocks of shell."""
    inline = re.findall(r"(?<=`)preftune ([^`]+)(?=`)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [
        line.removeprefix("preftune ") for block in blocks for line in block.splitlines() if line[:9] == "preftune "
    ]
    return [shlex.split(each, comments=True) for each in (*inline, *lines)]


@pytest.mark.parametrize("document", ["README.md", "docs/scale.md", "examples/README.md"])
def test_every_command_that_a_document_shows_can_be_typed(document: str):
    found = written_commands((ROOT / document).read_text(encoding="utf-8"))
    assert found
    for words in found:
        # what stands behind `--` is for accelerate
        command, rest = get_command(app), words[: words.index("--")] if "--" in words else list(words)
        while (below := getattr(command, "commands", None)) and rest and not rest[0].startswith("-"):
            assert rest[0] in below, f"preftune {' '.join(words)}"
            command = below[rest.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        asked = {word.partition("=")[0] for word in rest if word.startswith("--")}
        assert asked <= known, f"preftune {' '.join(words)}: {', '.join(asked - known)}"
