"""YAML with line numbers: plain values, and the line of every key.

Numbers and booleans are read as YAML 1.2 says: `2e-5` is a number, `no` and `off` are text (TRL has options by those
names), `010` is ten. A key given twice is an error.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from ..bounded_yaml import MOST_CHARACTERS, MOST_DEEP, MOST_VALUES, BoundedLoader
from ..errors import UserError

Path_ = tuple[str | int, ...]

_FLOAT = re.compile(
    r"[-+]?(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*)(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN)"
)
_INT = re.compile(r"[-+]?\d[\d_]*")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")


class _Loader(BoundedLoader):
    """With YAML 1.2's scalars."""


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0].rsplit(":", 1)[-1] not in ("bool", "int", "float", "timestamp")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_anchored = {
    kind: re.compile(rf"^(?:{pattern.pattern})$")
    for kind, pattern in (("bool", _BOOL), ("int", _INT), ("float", _FLOAT))
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _anchored["bool"], list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _anchored["int"], list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _anchored["float"], list("-+.0123456789"))
# What a recipe has no use for, and what would come out as something else than it looks like (bytes for text, say).
_Loader.yaml_constructors = {
    tag: construct
    for tag, construct in _Loader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
}
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value.replace("_", "")))


_TOO_DEEP, _FLATTER = "is nested too deeply, or in itself", "write what is meant without aliases"


@dataclass
class Text:
    """A parsed file: `values`, and the place ("file.yaml:12") of each key by its path from the top.

    Attributes:
        lines: of the keys. given: which override set them, in words.
        copied: keys whose value was copied from another key, where what is wrong with it is said already.
    """

    name: str
    values: Any = None
    lines: dict[Path_, int] = field(default_factory=dict)
    given: dict[Path_, str] = field(default_factory=dict)
    copied: set[Path_] = field(default_factory=set)

    def place(self, path: Path_) -> str:
        """File and line of that key, of the nearest one above it where it is not there; or the override that set it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.given:
                return self.given[path[:length]]
            if path[:length] in self.lines:
                return f"{self.name}:{self.lines[path[:length]]}"
        return self.name

    def places(self) -> dict[str, str]:
        """The place of every key, by its path with dots."""
        return {".".join(map(str, path)): self.place(path) for path in {**self.lines, **self.given} if path}


def parse(text: str, name: str) -> Text:
    """Parse one YAML document.

    Args:
        name: how messages call it.

    Raises:
        UserError: broken YAML, or a key given twice.
    """
    result = Text(name)
    if len(text) > MOST_CHARACTERS:
        raise UserError(name, f"has more than {MOST_CHARACTERS:,} characters", "write a shorter one")
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise UserError(name, f"broken YAML ({' '.join(str(error).split())})", "correct the file") from error
    try:
        node = loader.get_single_node()
        if node is not None:
            for path, each in _nodes(node, (), loader, name):
                result.lines[path] = each.start_mark.line + 1
                if len(result.lines) > MOST_VALUES:
                    said = f"has more than {MOST_VALUES:,} values, aliases (*name) counted as often as they stand"
                    raise UserError(f"{name}:{result.lines[path]}", said, "write what is meant without them")
            result.values = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = name if mark is None else f"{name}:{mark.line + 1}"
        raise UserError(where, f"broken YAML ({error.problem})", "correct the indentation or quotes") from error
    except RecursionError as error:
        raise UserError(name, _TOO_DEEP, _FLATTER) from error
    except yaml.YAMLError as error:
        raise UserError(name, f"broken YAML ({' '.join(str(error).split())})", "correct the file") from error
    except ValueError as error:
        raise UserError(name, f"a value cannot be read ({error})", "put it in quotes") from error
    finally:
        loader.dispose()
    return result


def parse_file(file: Path) -> Text:
    """Parse a YAML file; as `parse`, and an error where it cannot be read."""
    return parse(read_text(file), str(file))


def read_text(file: Path) -> str:
    """What a text file says, up to a bound. Raises UserError where it cannot be read."""
    try:
        with file.open(encoding="utf-8-sig") as opened:
            return opened.read(MOST_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(file), f"cannot be read ({error})", "give a UTF-8 text file") from error


def parse_value(text: str, name: str) -> Any:
    """The value of a command line's `key=value`, read as YAML."""
    return parse(text, name).values


def plain_value(value: Any, name: str, depth: int = 0) -> Any:
    """A value of Python's as a YAML file would give it: mappings, lists, text, numbers, true, false, null.

    Paths become text, tuples lists, numpy's and torch's numbers Python's.

    Raises:
        UserError: anything else.
    """
    if depth > MOST_DEEP:
        raise UserError(name, _TOO_DEEP, "write it flatter")
    if isinstance(value, Mapping):
        return {str(key): plain_value(each, name, depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(each, name, depth + 1) for each in value]
    if isinstance(value, Path | date):
        return str(value)
    if callable(getattr(value, "item", None)):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    remedy = "a recipe holds mappings, lists, text and numbers; a function is named as module:function"
    raise UserError(name, f"holds a {type(value).__name__}", remedy)


def _nodes(node: yaml.Node, path: Path_, loader: _Loader, name: str) -> Iterator[tuple[Path_, yaml.Node]]:
    yield path, node
    if len(path) > MOST_DEEP:
        raise UserError(f"{name}:{node.start_mark.line + 1}", _TOO_DEEP, _FLATTER)
    if isinstance(node, yaml.SequenceNode):
        for index, each in enumerate(node.value):
            yield from _nodes(each, (*path, index), loader, name)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, _ in node.value:
            text, line = str(key.value), key.start_mark.line + 1
            if text in seen:
                dotted = ".".join(map(str, (*path, text)))
                raise UserError(f"{name}:{line}", f"{dotted} stands on line {seen[text]} too", "keep one of them")
            seen[text] = line
        loader.flatten_mapping(node)
        for key, value in node.value:
            child = (*path, str(key.value))
            for below, each in _nodes(value, child, loader, name):
                # a key's line is the key's own, not that of the block that follows it
                yield below, key if below == child else each
