"""Chat templates whose text is what is said between fixed words.

Most templates only put words before and after each turn. Rendering them is then filling in blanks, at a thirtieth of
the time that Jinja takes. Whether a template is one of those is proved, not guessed: its syntax tree is read, and
whatever does anything with a turn's content but write it (a condition, a split, a filter other than `trim`) makes it
none.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jinja2 import Environment, TemplateSyntaxError, nodes

# What an expression may hold: nothing of what is said, all messages, one message, the content of one as it is, a
# content without white space around it, one of these or a word of the template's own, or contents between words.
_PLAIN, _ALL, _MESSAGE, _CONTENT, _TRIMMED, _EITHER, _MIXED = range(7)
_WHOLE = (_CONTENT, _TRIMMED, _EITHER)
_SAID = (*_WHOLE, _MIXED)
# Tests whose answer is the same for every text (all are texts, none is empty).
_BLIND_TESTS = {"defined", "undefined", "none", "string", "mapping", "sequence", "iterable", "number", "boolean"}
# What a message has besides its keys: methods through which its content could be reached.
_METHODS = frozenset(dir(dict))


class _Depends(Exception):
    """The template's text depends on what is said in another way."""


# The syntax that transformers renders; a template with extensions of its own is none of those.
_SYNTAX = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])


def fills_in(template: str) -> bool:
    """Whether the template only writes the contents of messages, as they are or trimmed, between other words.

    This holds for messages with a role and a content that is not only white space, and without tools.
    """
    try:
        tree = _SYNTAX.parse(template)
        reader = _Reader()
        # a name may be set after it is read, in a loop: until nothing new is learnt
        while reader.learning:
            reader.learning = False
            reader.statements(tree.body)
    except (_Depends, TemplateSyntaxError, RecursionError):
        return False
    return True


class _Reader:
    """Follows what is said through a template."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {"messages": _ALL}
        self.spaces = set[str]()
        self.learning = True

    def learn(self, name: str, kind: int) -> None:
        known = self.names.get(name, kind)
        if known != kind:
            kind = self.one_of({known, kind})
        if self.names.get(name) != kind:
            self.names[name], self.learning = kind, True

    def statements(self, body: Iterable[nodes.Node]) -> None:
        for node in body:
            match node:
                case nodes.Output():
                    for each in node.nodes:
                        if not isinstance(each, nodes.TemplateData) and self.kind(each) in (_ALL, _MESSAGE):
                            raise _Depends
                case nodes.If():
                    self.kind(node.test)
                    for part in (node.body, node.elif_, node.else_):
                        self.statements(part)
                case nodes.For():
                    self.loop(node)
                case nodes.Assign():
                    self.assign(node.target, node.node)
                case nodes.Continue() | nodes.Break():
                    pass
                case _:
                    raise _Depends

    def loop(self, node: nodes.For) -> None:
        over = self.kind(node.iter)
        if over not in (_PLAIN, _ALL) or node.recursive:
            raise _Depends
        if over == _ALL:
            if not isinstance(node.target, nodes.Name):
                raise _Depends
            self.learn(node.target.name, _MESSAGE)
        if node.test is not None:
            self.kind(node.test)
        self.statements(node.body)
        self.statements(node.else_)

    def assign(self, target: nodes.Node, value: nodes.Node) -> None:
        if isinstance(target, nodes.Name):
            called = value.node if isinstance(value, nodes.Call) else None
            if isinstance(called, nodes.Name) and called.name == "namespace" and target.name not in self.spaces:
                self.spaces.add(target.name)
                self.learning = True
            self.learn(target.name, self.kind(value))
        elif isinstance(target, nodes.NSRef):
            self.learn(f"{target.name}.{target.attr}", self.kind(value))
        else:
            self.plain(value)

    def plain(self, *values: nodes.Node) -> int:
        """These may hold nothing of what is said."""
        if any(self.kind(each) != _PLAIN for each in values):
            raise _Depends
        return _PLAIN

    def kind(self, node: nodes.Node) -> int:
        """What an expression holds."""
        if isinstance(node, nodes.Const | nodes.TemplateData):
            return _PLAIN
        read = self._READERS.get(type(node))
        return self.plain(*self.parts(node)) if read is None else read(self, node)

    def name(self, node: nodes.Name) -> int:
        if node.name in self.spaces:
            raise _Depends  # under another name its attributes would not be known
        return self.names.get(node.name, _PLAIN)

    def test(self, node: nodes.Test) -> int:
        held = self.kind(node.node)
        if held != _PLAIN and not (node.name in _BLIND_TESTS and not node.args):
            raise _Depends
        return self.plain(*node.args)

    def negated(self, node: nodes.Not) -> int:
        self.kind(node.node)  # what is said is never empty: it is true, whatever it is
        return _PLAIN

    def conditional(self, node: nodes.CondExpr) -> int:
        self.kind(node.test)
        return self.either(node.expr1, *([node.expr2] if node.expr2 is not None else []))

    @staticmethod
    def parts(node: nodes.Node) -> list[nodes.Node]:
        """An expression's parts; anything that is no expression is not known here."""
        parts = list(node.iter_child_nodes())
        if not all(isinstance(each, nodes.Expr | nodes.Pair | nodes.Keyword | nodes.Operand) for each in parts):
            raise _Depends
        return parts

    def joined(self, parts: Sequence[nodes.Node]) -> int:
        kinds = {self.kind(each) for each in parts}
        if kinds & {_ALL, _MESSAGE}:
            raise _Depends
        return _PLAIN if kinds == {_PLAIN} else _MIXED

    def either(self, *values: nodes.Node) -> int:
        return self.one_of({self.kind(each) for each in values})

    @staticmethod
    def one_of(kinds: set[int]) -> int:
        """What a value holds that is one of several."""
        if len(kinds) == 1:
            return next(iter(kinds))
        if kinds & {_ALL, _MESSAGE}:
            raise _Depends
        return _MIXED if _MIXED in kinds else _EITHER

    def below(self, node: nodes.Node, name: str) -> int:
        """What an attribute or key of that name holds."""
        if isinstance(node, nodes.Name) and node.name in self.spaces:
            return self.names.get(f"{node.name}.{name}", _PLAIN)
        held = self.kind(node)
        if held not in (_PLAIN, _MESSAGE) or (held == _MESSAGE and name in _METHODS):
            raise _Depends
        if name in ("previtem", "nextitem"):
            # of a loop over messages, or over what is none: taken for a message either way
            return _MESSAGE
        return _CONTENT if held == _MESSAGE and name == "content" else _PLAIN

    def item(self, node: nodes.Getitem) -> int:
        held = self.kind(node.node)
        if held == _ALL:
            if isinstance(node.arg, nodes.Slice):
                self.plain(*self.parts(node.arg))
                return _ALL
            self.plain(node.arg)
            return _MESSAGE
        if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            return self.below(node.node, node.arg.value)
        return self.plain(node.node, node.arg)

    def filtered(self, node: nodes.Filter) -> int:
        if node.node is None:
            raise _Depends
        held = self.kind(node.node)
        if held in _WHOLE and node.name == "trim" and not (node.args or node.kwargs):
            return _EITHER if held == _EITHER else _TRIMMED
        if held in _SAID and node.name == "string":
            return held
        if held == _ALL and node.name in ("length", "count"):
            return _PLAIN
        return self.plain(*self.parts(node))

    def compared(self, node: nodes.Compare) -> int:
        held = self.kind(node.expr)
        others = [each.expr for each in node.ops]
        if len(others) == 1 and node.ops[0].op in ("in", "notin") and self.kind(others[0]) == _MESSAGE:
            return self.plain(node.expr)  # whether a message has a key
        nothing = all(isinstance(each, nodes.Const) and each.value is None for each in others)
        if held in _SAID and nothing and all(each.op in ("eq", "ne") for each in node.ops):
            return _PLAIN
        return self.plain(node.expr, *others)

    def called(self, node: nodes.Call) -> int:
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise _Depends
        what = node.node
        if isinstance(what, nodes.Getattr) and what.attr == "strip" and not (node.args or node.kwargs):
            held = self.kind(what.node)
            if held in _WHOLE:
                return _EITHER if held == _EITHER else _TRIMMED
        if isinstance(what, nodes.Getattr) and what.attr == "get" and self.kind(what.node) == _MESSAGE:
            name = node.args[0] if node.args else None
            if not isinstance(name, nodes.Const) or node.kwargs:
                raise _Depends
            self.plain(*node.args[1:])
            return _CONTENT if name.value == "content" else _PLAIN
        return self.plain(what, *node.args, *(each.value for each in node.kwargs))

    _READERS: ClassVar[dict[type, Callable[..., int]]] = {
        nodes.Name: name,
        nodes.Getattr: lambda self, node: self.below(node.node, node.attr),
        nodes.Getitem: item,
        nodes.Filter: filtered,
        nodes.Add: lambda self, node: self.joined([node.left, node.right]),
        nodes.Concat: lambda self, node: self.joined(node.nodes),
        nodes.Test: test,
        nodes.Compare: compared,
        nodes.Not: negated,
        nodes.And: lambda self, node: self.either(node.left, node.right),
        nodes.Or: lambda self, node: self.either(node.left, node.right),
        nodes.CondExpr: conditional,
        nodes.Call: called,
    }


@dataclass(frozen=True)
class Pattern:
    """What such a template writes for a conversation with these roles.

    Attributes:
        words: what stands before each content, and behind the last: one more than there are contents.
        order: which message's content stands in each place.
        trimmed: whether it stands there without white space around it.
    """

    words: tuple[str, ...]
    order: tuple[int, ...]
    trimmed: tuple[bool, ...]

    def fill(self, contents: Sequence[str]) -> str:
        """The text of the conversation with these contents."""
        parts = [self.words[0]]
        for place, trim, word in zip(self.order, self.trimmed, self.words[1:], strict=True):
            parts += (contents[place].strip() if trim else contents[place], word)
        return "".join(parts)


def read_pattern(render: Any, count: int) -> Pattern | None:
    """The pattern of `count` messages; None where a content is left out.

    Args:
        render: writes the messages with the contents that it is given.
    """
    marks = [f"x{place}PREFTUNEx" for place in range(count)]
    bare, padded = render(marks), render([f" \n{mark}\n " for mark in marks])
    words, order, trimmed = [], [], []
    while found := [(bare.index(mark), place) for place, mark in enumerate(marks) if mark in bare]:
        at, place = min(found)
        words.append(bare[:at])
        order.append(place)
        bare = bare[at + len(marks[place]) :]
        # white space was asked for around it, and is there or not
        trimmed.append(not padded.startswith(f"{words[-1]} \n{marks[place]}\n "))
        taken = words[-1] + (marks[place] if trimmed[-1] else f" \n{marks[place]}\n ")
        if not padded.startswith(taken):
            return None
        padded = padded[len(taken) :]
    if padded != bare or set(order) != set(range(count)):
        return None
    return Pattern((*words, bare), tuple(order), tuple(trimmed))
