"""What the documents say of the files is true."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from preftune.cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = sorted(f"docs/{each.relative_to(ROOT / 'docs')}" for each in (ROOT / "docs").rglob("*.md"))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "tests/README.md", "benchmarks/NOTES.md",
             "stages/FIELDS.md", "examples/README.md", *PAGES)  # fmt: skip
# of the reader, of others
ELSEWHERE = {"recipe.yaml", "run.json", "lineage.json", "metrics.json", "results.json", "eval/results.json",
             "mine.yaml", "my.yaml", "config.json", "dataset_info.json"}  # fmt: skip
ENDINGS = ("py", "md", "toml", "yaml", "json", "svg", "txt")


def named_files(text: str) -> list[str]:
    """Paths within backticks or links, relative to the root; those of `ELSEWHERE` and of a run are left out."""
    found = re.findall(rf"(?<=[`(])(?:[\w.-]+/)*[\w.-]+\.(?:{'|'.join(ENDINGS)})(?=[`)])", text)
    folders = re.findall(r"(?<=`)(?:[\w.-]+/)+(?=`)", text)
    return [name for name in found + folders if name not in ELSEWHERE and not name.startswith("RUN/")]


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


@pytest.mark.parametrize("document", ["README.md", *PAGES, "examples/README.md"])
def test_every_command_that_a_document_shows_can_be_typed(document: str):
    found = written_commands((ROOT / document).read_text(encoding="utf-8"))
    assert found or document not in ("README.md", "docs/scale.md")
    for words in found:
        # what stands behind `--` is for accelerate
        command, rest = get_command(app), words[: words.index("--")] if "--" in words else list(words)
        while (below := getattr(command, "commands", None)) and rest and not rest[0].startswith("-"):
            assert rest[0] in below, f"preftune {' '.join(words)}"
            command = below[rest.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        asked = {word.partition("=")[0] for word in rest if word.startswith("--")}
        assert asked <= known, f"preftune {' '.join(words)}: {', '.join(asked - known)}"


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(text: str) -> set[str]:
    """Where a link into a document may lead: its headings, named as GitHub and the site name them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.+?) *#*$", re.sub(r"^( *)```.*?^\1```", "", text, flags=re.S | re.M), re.M):
        shown = re.sub(r"\[([^]]*)]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return set(found) | {f"{slug}-{again + 1}" for slug, more in found.items() for again in range(more)}


def links(text: str) -> list[str]:
    """The targets of links and images within the repository."""
    found = re.findall(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)", without_code(text))
    found += re.findall(r"^\[[^]]+]: +(\S+)", without_code(text), re.M)
    return [each for each in found if not re.match(r"[a-z]+:", each)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_and_anchor_of_a_document_leads_somewhere(document: str):
    file = ROOT / document
    wrong = []
    for link in links(file.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            wrong.append(link)
    assert not wrong, f"{document}: {', '.join(wrong)}"


def test_links_and_anchors_are_read():
    text = "# A `b_c`: d, e\n## A\n## A\n[x](y.md#a) `[no](no.md)` ![i](z.svg) [w](https://w.org)\n"
    text += "```sh\n# no\n[n](n)\n```\n"
    assert links(text) == ["y.md#a", "z.svg"]
    assert anchors(text) == {"a-b_c-d-e", "a", "a-1"}


def test_the_package_index_shows_no_broken_image():
    """README is the page of the package index too, where an image of the repository cannot be reached."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not re.findall(r"!\[[^]]*]\((?!https://)", text)
