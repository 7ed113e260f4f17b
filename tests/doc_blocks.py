"""The code blocks of a document, and what carries them out: see test_doc_blocks.py."""

import ast
import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from preftune.cli import main as cli
from preftune.recipes.schema import Recipe

BASE = "random:llama"
RUN = ("sh", "python", "yaml")
"""The languages of blocks that are carried out; every other one is only shown."""
_FENCE = re.compile(
    r"(?:^[ ]*<!-- (?P<mark>not run|file): (?P<said>[^\n]+?) -->\n)?"
    r"^(?P<indent>[ ]*)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
_OPERATORS = set(";|&<>()")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: of its fence, from 1 on.
        unrun: why it cannot be carried out here; None: it is.
        file: it is written to that file first; None: to none.
    """

    language: str
    text: str
    line: int
    unrun: str | None = None
    file: str | None = None


def blocks(document: str) -> list[Block]:
    """All blocks, in their order. `<!-- not run: REASON -->` or `<!-- file: NAME -->` may stand on the line before."""
    found = []
    for match in _FENCE.finditer(document):
        line = document.count("\n", 0, match.start("indent")) + 1
        said = {match["mark"]: match["said"]}
        text = textwrap.dedent(match["text"])
        found.append(Block(match["language"], text, line, said.get("not run"), said.get("file")))
    return found


def logical_lines(text: str) -> list[str]:
    """Lines of a shell script, continued ones joined; without empty ones and comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def simple_commands(line: str) -> list[list[str]]:
    """The words of each command of a line: split where a pipe, a redirection or another operator stands."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= _OPERATORS:
            found.append([])
        else:
            found[-1].append(word)
    return [words for words in found if words]


def parse(words: list[str]) -> None:
    """Read a command line of preftune as the command would, and do nothing. Raises what it raises."""
    command: Any = get_command(cli.app)
    rest = list(words)
    while commands := getattr(command, "commands", None):
        assert rest and rest[0] in commands, f"no command preftune {' '.join(words)}"
        command = commands[rest.pop(0)]
    command.make_context(command.name, rest)


class Session:
    """A reader who follows one document from top to bottom, in a folder of their own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.names: dict[str, Any] = {}
        monkeypatch.chdir(folder)

    def problem(self, block: Block) -> str | None:
        """Carry out a block: what went wrong, in words."""
        if block.language not in RUN:
            return None if block.file is None else self._written(block)
        said = io.StringIO()
        try:
            with self._streams(said):
                getattr(self, f"_{block.language}")(block)
        except BaseException as error:  # a block may end in SystemExit as well
            if isinstance(error, KeyboardInterrupt):
                raise
            where = "" if isinstance(error, AssertionError) else traceback.format_exc(limit=-4)
            return f"{type(error).__name__}: {error}\n{said.getvalue()[-3000:]}{where}"
        return None

    @contextlib.contextmanager
    def _streams(self, said: io.StringIO) -> Iterator[None]:
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO(""))
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                yield

    def _written(self, block: Block) -> None:
        assert block.file is not None
        (self.folder / block.file).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / block.file).write_text(block.text, encoding="utf-8")

    def _sh(self, block: Block) -> None:
        checked = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True, check=False)
        assert checked.returncode == 0, checked.stderr
        lines = logical_lines(block.text)
        for words in (words for line in lines for words in simple_commands(line) if words[0] == "preftune"):
            parse(words[1:])
        if block.unrun:
            return
        if block.file:
            self._written(block)
        elif all(_is_ours(line) for line in lines):
            for line in lines:
                self._here(line)
        else:
            self._in_bash(block.text)

    def _here(self, line: str) -> None:
        """One command of preftune, in this process."""
        words, *to = simple_commands(line)
        with contextlib.ExitStack() as stack:
            if to:
                file = stack.enter_context((self.folder / to[0][0]).open("w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(file))
            code = cli.run_command(words[1:])
        assert code == 0, f"exit code {code}: {line}"

    def _in_bash(self, text: str) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"

    def _python(self, block: Block) -> None:
        """In this process; the blocks of a document share their names, as in a notebook."""
        if block.file:
            self._written(block)
        code = compile(ast.parse(block.text), f"line {block.line}", "exec")
        if not (block.unrun or block.file):
            self.names.setdefault("__name__", "__main__")
            exec(code, self.names)

    def _yaml(self, block: Block) -> None:
        """A recipe, or a part of one, which is put into my.yaml: it is valid, on a tiny base."""
        if block.unrun:
            list(yaml.safe_load_all(block.text))
            return
        said = yaml.safe_load(block.text)
        assert isinstance(said, dict) and said.keys() <= Recipe.model_fields.keys(), (
            f"{list(said)}: no part of a recipe"
        )
        whole = said if "stages" in said and "model" in said else merged(_my_recipe(self.folder), said)
        text = yaml.safe_dump(whole, sort_keys=False)
        if block.file:
            text = re.sub(r"(?m)(\bbase: *)[^\s,}]+", rf"\g<1>{BASE}", block.text, count=1)
        file = self.folder / (block.file or f"line-{block.line}.yaml")
        file.write_text(text, encoding="utf-8")
        base = [f"model.base={BASE}", "model.revision=null"]
        assert cli.run_command(["validate", str(file), *base]) == 0


def _is_ours(line: str) -> bool:
    """Whether it is one command of preftune, with its output in a file at most, and nothing that a shell expands."""
    found = simple_commands(line)
    bare = re.sub(r"(^|\s)#.*", "", line)
    plain = not re.search(r"[$`*~|;&]", bare) and bare.count(">") == len(found) - 1 <= 1
    return plain and found[0][0] == "preftune"


def _my_recipe(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "my.yaml").read_text(encoding="utf-8"))


def merged(whole: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """`whole` with the keys of `part`: mappings are merged, everything else and entries of `data` are replaced."""
    both = {
        key: {**whole[key], **value} if key == "data" else merged(whole[key], value)
        for key, value in part.items()
        if isinstance(value, dict) and isinstance(whole.get(key), dict)
    }
    return {**whole, **part, **both}
