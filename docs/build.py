"""Builds the documentation's site: `make docs`, or `python docs/build.py [OUT]` (default: site/).

The pages are the Markdown files of this folder, and those in `BESIDE`. What they link to elsewhere in the repository is
taken along, so that the site is whole by itself: it needs no network to be built or to be read.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from posixpath import relpath

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BESIDE = {
    "SECURITY.md": "SECURITY.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "examples/README.md": "examples.md",
    "stages/FIELDS.md": "FIELDS.md",
}
"""Pages that lie elsewhere in the repository -> their place among the site's."""
ENTRANCES = {"README.md": "index.md", "docs": "index.md", "examples": "examples.md"}
"""What else a link may mean -> the page that stands for it."""


def page_of(file: Path) -> str | None:
    """The place of a file of the repository among the site's pages; None for one that is no page."""
    name = file.relative_to(ROOT).as_posix().rstrip("/")
    if file.is_relative_to(HERE) and file.suffix == ".md":
        return file.relative_to(HERE).as_posix()
    return BESIDE.get(name) or ENTRANCES.get(name)


def rewritten(text: str, source: Path, page: str, pages: Path) -> str:
    """A page's text with links that lead to the same things in the site; files that are no pages are copied there."""

    def new(match: re.Match[str]) -> str:
        target, hash_, anchor = match["target"].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        file = (source.parent / target).resolve()
        to = page_of(file)
        if to is None and file.is_file():
            to = f"files/{file.relative_to(ROOT).as_posix()}"
            (pages / to).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, pages / to)
        # a folder of the code is no place in the site: its name stays, without a link
        return match["shown"] if to is None else f"{match[1]}({relpath(to, Path(page).parent)}{hash_}{anchor})"

    parts = re.split(r"(^ *```.*?^ *```[ ]*$)", text, flags=re.MULTILINE | re.DOTALL)
    link = r"(!?\[(?P<shown>[^]]*)\])\((?P<target>[^)\s]+)\)"
    return "".join(part if place % 2 else re.sub(link, new, part) for place, part in enumerate(parts))


def gather(work: Path) -> None:
    """All pages and the configuration, in a folder that the generator reads."""
    pages = work / "pages"
    sources = {file: page_of(file) for file in HERE.rglob("*.md")} | {ROOT / name: to for name, to in BESIDE.items()}
    for source, page in sources.items():
        assert page is not None
        (pages / page).parent.mkdir(parents=True, exist_ok=True)
        text = source.read_text(encoding="utf-8")
        (pages / page).write_text(rewritten(text, source, page, pages), encoding="utf-8")
    shutil.copyfile(HERE / "extra.css", pages / "extra.css")
    shutil.copyfile(HERE / "zensical.toml", work / "zensical.toml")


def build(out: Path, work: Path) -> int:
    """Build the site into `out`, anew. Returns the generator's exit code: a warning is an error.

    Args:
        out: a new folder, or one that an earlier build wrote.
        work: a folder for what lies between, likewise.
    """
    if out.exists() and any(out.iterdir()) and not (out / "search.json").exists():
        print(f"{out}: has something else in it; name another folder", file=sys.stderr)
        return 2
    shutil.rmtree(work, ignore_errors=True)
    gather(work)
    generator = Path(sys.executable).parent / "zensical"
    done = subprocess.run([generator, "build", "--clean", "--strict"], cwd=work, check=False)
    if done.returncode == 0:
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(work / "site", out)
    return done.returncode


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "site").resolve(), ROOT / "build" / "docs"))
