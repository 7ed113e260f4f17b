"""Rows -> datasets of token ids, for the trainers.

Rows longer than the data's limits are dropped, truncated, or an error, as `DataSpec.overflow` says, and always counted.
Prompts are cut from the left (a BOS stays), replies from the right, and a reply that was cut gets no EOS.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..errors import UserError
from ..progress import meter
from .pieces import fewest_tokens
from .problems import LIMIT, Problem, RowProblems
from .report import DataReport, Tally
from .rows import Message, Row, Unusable, canonical
from .spans import BOUNDARY_MOVED, Layout, Spans, find_spans, lay_out
from .spec import DataSpec, RowKind
from .template import Templater
from .turns import SAME_SIDES

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features
    from transformers import PreTrainedTokenizerBase

IGNORED = -100

TRUNCATED = "truncated"
PROMPT_TOO_LONG = "prompt longer than max_prompt_length"
TOO_LONG = "longer than max_length"
NO_ROOM = "no room for a reply within max_length"
ONE_CLASS = "every label is {}, so that nothing says what tells a wanted reply from an unwanted one"
_LIMITS = (PROMPT_TOO_LONG, TOO_LONG, NO_ROOM)
NONE_TRAINS = "the row says that none of its replies trains"
NOTHING_SAID = "the chat template renders nothing of the reply"
TOOLS_UNSEEN = "the chat template does not show the tools"

CHUNK = 1000
"""Rows rendered, tokenised and stored at a time."""
_HUGE = 1_000_000
"""Characters; texts beyond them are looked at before they are tokenised, which takes a hundred bytes for each."""

Shape = Literal["demo", "pair", "label", "prompt", "reply"]
"""What encoded rows hold: those of each kind, or of demonstrations the last reply apart from what stands before it."""

Encoded = tuple["Dataset", DataReport]
# What one row needs tokenised, and what makes the encoded row of the ids, or raises Unusable to drop it. Without texts
# nothing needs to be known: the row is used, whatever its ids are.
Plan = tuple[list[str], Callable[[list[list[int]]], dict[str, Any]]]
Planner = Callable[[Row], Plan]


def encode_demos(rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", spec: DataSpec) -> Encoded:
    """Dataset[input_ids, labels]: labels are the ids within the assistant's turns (EOS included), and -100 elsewhere.

    Every assistant turn of `completion` is trained on, but for those that the row says are not to be. If a turn's place
    cannot be found, only the last one is trained on, and the row is counted.

    Raises:
        UserError: no row is left. Rows with a problem that is an error, all of them counted: the template refuses one
            or leaves out what it says, or one is too long and `overflow` is "error".
    """
    return encode_rows("demo", rows, tokenizer, spec)


def encode_pairs(rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", spec: DataSpec) -> Encoded:
    """Dataset[prompt_ids, chosen_ids, rejected_ids(, margin)]: the replies without the prompt, ending in EOS.

    The column `margin` is there if every row has one. Raises as `encode_demos`.
    """
    return encode_rows("pair", rows, tokenizer, spec)


def encode_replies(rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", spec: DataSpec) -> Encoded:
    """Dataset[prompt_ids, completion_ids] of demonstrations: the last turn that is trained on (EOS included), and all
    that comes before it. Raises as `encode_demos`."""
    return encode_rows("reply", rows, tokenizer, spec)


def _last_reply(ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """What stands before the last labelled stretch, and that stretch."""
    end = next(place for place in range(len(labels), 0, -1) if labels[place - 1] != IGNORED)
    start = next((place for place in range(end, 0, -1) if labels[place - 1] == IGNORED), 0)
    return ids[:start], ids[start:end]


def encode_labels(rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", spec: DataSpec) -> Encoded:
    """Dataset[prompt_ids, completion_ids, label]: the last reply without its prompt. Raises as `encode_demos`."""
    return encode_rows("label", rows, tokenizer, spec)


def encode_prompts(rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", spec: DataSpec) -> Encoded:
    """Dataset[prompt_ids, prompt, columns]: prompt as messages, columns as one JSON text a row.

    `prompt_ids` end with the template's generation prompt. They must fit `max_prompt_length`, or else `max_length`.
    Raises as `encode_demos`.
    """
    return encode_rows("prompt", rows, tokenizer, spec)


def encode_rows(shape: Shape, rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", spec: DataSpec) -> Encoded:
    """Encode rows in that shape; columns and errors are those of its encoder."""
    from datasets import Dataset, concatenate_datasets

    encoder, counts = Encoder(shape, tokenizer, spec), Counts(shape, spec)
    parts = []
    # rows that are read meanwhile are counted by their reader
    with meter("encoding rows", len(rows)) if isinstance(rows, Sequence) else nullcontext(lambda done: None) as show:
        for chunk in _chunks(rows):
            parts.append(Dataset(encoder.table(_used(chunk, encoder, counts))))
            show(counts.report.read)
    counts.close()
    dataset = concatenate_datasets(parts)
    return (dataset if counts.margins or shape != "pair" else dataset.remove_columns("margin")), counts.report


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    left = iter(rows)
    while chunk := list(islice(left, CHUNK)):
        yield chunk


def _used(chunk: list[Row], encoder: "Encoder", counts: "Counts") -> list[dict[str, Any]]:
    """The encoded rows of a chunk; what becomes of the others is counted."""
    outcomes = encoder.encode(chunk)
    taken = zip(chunk, outcomes, strict=True)
    return [out.encoded for row, out in taken if counts.take(row.origin, out) and out.encoded is not None]


def measure_rows(
    kind: RowKind,
    rows: Iterable[Row],
    tokenizer: "PreTrainedTokenizerBase",
    spec: DataSpec,
    *,
    longest: int | None = None,
    see: Callable[[dict[str, Any]], None],
) -> DataReport:
    """What `encode_rows` would report of the rows, and raise, without keeping any of them.

    Args:
        longest: so many tokens a row may have in all; of a row that is shorter for certain, having fewer bytes than
            that, no ids are made. None: ids are made of every row.
        see: is shown the other rows' columns, in order.
    """
    encoder, counts = Encoder(kind, tokenizer, spec, longest), Counts(kind, spec, named=False)
    for chunk in _chunks(rows):
        for row in _used(chunk, encoder, counts):
            if "prompt_ids" in row or "input_ids" in row:
                see(row)
    counts.close()
    return counts.report


def features_of(shape: Shape) -> "Features":
    """The columns of encoded rows in that shape."""
    from datasets import Features, Json, List, Value

    tokens = List(Value("int32"))
    columns: dict[Shape, dict[str, Any]] = {
        "demo": {"input_ids": tokens, "labels": tokens},
        "pair": {**dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), tokens), "margin": Value("float32")},
        "label": {"prompt_ids": tokens, "completion_ids": tokens, "label": Value("bool")},
        "prompt": {"prompt_ids": tokens, "prompt": List(Json()), "columns": Value("string")},
        "reply": {"prompt_ids": tokens, "completion_ids": tokens},
    }
    return Features(columns[shape])


def _demo_planner(encoder: "Encoder") -> Planner:
    def plan(row: Row) -> Plan:
        layout = encoder.lay_out(row, row.prompt, _side(row, "completion"))
        if encoder.fits(layout):
            return [], lambda ids: {}
        encoder.check_size(row, layout.text)

        def finish(ids: list[list[int]]) -> dict[str, Any]:
            spans = encoder.spans(layout, ids)
            if not spans.trained:
                raise Unusable(NONE_TRAINS)
            labels = [IGNORED] * len(spans.ids)
            for start, end in spans.trained:
                encoder.check_said(spans.ids[start:end])
                labels[start:end] = spans.ids[start:end]
            prompt = encoder.fit_prompt(spans.ids[: spans.prompt], row)
            reply = encoder.fit_reply(prompt, spans.ids[spans.prompt :], row)
            trained = labels[spans.prompt :][: len(reply)]
            if all(label == IGNORED for label in trained):
                raise Unusable(NO_ROOM)
            return {"input_ids": prompt + reply, "labels": [IGNORED] * len(prompt) + trained}

        return layout.texts(), finish

    return plan


def _pair_planner(encoder: "Encoder") -> Planner:
    def plan(row: Row) -> Plan:
        good = encoder.lay_out(row, row.prompt, _side(row, "chosen"))
        layouts = [good, encoder.lay_out(row, row.prompt, _side(row, "rejected"), good.before)]
        if encoder.fits(*layouts) and layouts[0].text != layouts[1].text:
            return [], lambda ids: {}
        encoder.check_size(row, *(layout.text for layout in layouts))
        chosen = layouts[0].texts()

        def finish(ids: list[list[int]]) -> dict[str, Any]:
            parts = (ids[: len(chosen)], ids[len(chosen) :])
            sides = [encoder.spans(layout, part) for layout, part in zip(layouts, parts, strict=True)]
            for side in sides:
                encoder.check_said(side.ids[side.prompt :])
            # The sides share their prompt, so a boundary that moved in one moves in the other.
            boundary = min(side.prompt for side in sides)
            prompt = encoder.fit_prompt(sides[0].ids[:boundary], row)
            good, bad = (encoder.fit_reply(prompt, side.ids[boundary:], row) for side in sides)
            if good == bad:
                raise Unusable(SAME_SIDES)
            return {"prompt_ids": prompt, "chosen_ids": good, "rejected_ids": bad, "margin": row.margin}

        return chosen + layouts[1].texts(), finish

    return plan


def _label_planner(encoder: "Encoder") -> Planner:
    def plan(row: Row) -> Plan:
        completion = _side(row, "completion")
        if row.label is None:
            raise UserError(row.origin, "the row has no label", "load it with the kind 'label'")
        layout = encoder.lay_out(row, row.prompt + completion[:-1], completion[-1:])
        if encoder.fits(layout):
            return [], lambda ids: {"label": row.label}
        encoder.check_size(row, layout.text)

        def finish(ids: list[list[int]]) -> dict[str, Any]:
            spans = encoder.spans(layout, ids)
            encoder.check_said(spans.ids[spans.prompt :])
            prompt = encoder.fit_prompt(spans.ids[: spans.prompt], row)
            reply = encoder.fit_reply(prompt, spans.ids[spans.prompt :], row)
            return {"prompt_ids": prompt, "completion_ids": reply, "label": row.label}

        return layout.texts(), finish

    return plan


def _prompt_planner(encoder: "Encoder") -> Planner:
    def plan(row: Row) -> Plan:
        text = encoder.templater.fitted(row.prompt, row.tools, True, row.origin)[1]
        if encoder.fits_alone(text):
            return [], lambda ids: {}
        encoder.check_size(row, text)

        def finish(ids: list[list[int]]) -> dict[str, Any]:
            prompt = encoder.fit_prompt(ids[0], row, alone=True)
            return {"prompt_ids": prompt, "prompt": row.prompt, "columns": canonical(row.columns)}

        return [text], finish

    return plan


def _reply_planner(encoder: "Encoder") -> Planner:
    demonstration = _demo_planner(encoder)

    def plan(row: Row) -> Plan:
        texts, finish = demonstration(row)

        def parted(ids: list[list[int]]) -> dict[str, Any]:
            whole = finish(ids)
            if not whole:
                return whole
            prompt, reply = _last_reply(whole["input_ids"], whole["labels"])
            return {"prompt_ids": prompt, "completion_ids": reply}

        return texts, parted

    return plan


_PLANNERS: "dict[Shape, Callable[[Encoder], Planner]]" = {
    "reply": _reply_planner,
    "demo": _demo_planner,
    "pair": _pair_planner,
    "label": _label_planner,
    "prompt": _prompt_planner,
}


class _TooLong(UserError):
    """A row beyond a limit, where that is an error."""


class Outcome(NamedTuple):
    """What became of one row.

    encoded: its columns; None where it is not used.
    remarks: what is worth counting about it.
    """

    encoded: dict[str, Any] | None
    remarks: tuple[str, ...] = ()
    problem: Problem | None = None
    margin: bool = False
    label: bool | None = None


class Counts:
    """What became of the rows of one encoding, in their order: each is counted, and what is wrong kept for the end.

    Args:
        named: keep where each row that is used comes from.

    Attributes:
        margins: whether every row of a pair that has been looked at says by how much its chosen side is better.
    """

    def __init__(self, shape: Shape, spec: DataSpec, *, named: bool = True) -> None:
        self.report, self._named = DataReport(), named
        self._spec, self._shape = spec, shape
        self._problems = RowProblems(spec.on_problem, self.report, spec.describe())
        self.margins = True
        self._labels = set[bool]()

    def take(self, origin: str, outcome: Outcome) -> bool:
        """The next row; whether it is used."""
        self.report.read += 1
        self.margins = self.margins and outcome.margin
        if (problem := outcome.problem) is not None:
            if problem.kind == LIMIT:
                self.report.drop(problem.reason or "", origin)
            else:
                self._problems.met(*problem)
            return False
        self.report.used += 1
        if self._named:
            self.report.origins.append(origin)
        if outcome.label is not None:
            self._labels.add(outcome.label)
        for remark in outcome.remarks:
            self.report.note(remark, origin)
        return True

    def close(self) -> None:
        """No row follows. Raises as `encode_demos`."""
        self._problems.raise_found()
        if self.report.used == 0:
            why = "; ".join(self.report.lines()[1:]) or "no row was given"
            raise UserError(self._spec.describe(), f"no row is left ({why})", "raise max_length or check the data")
        if self._shape == "label" and len(self._labels) == 1:
            only = str(next(iter(self._labels))).lower()
            self.report.notes[ONE_CLASS.format(only)] = Tally(self.report.used)


class Encoder:
    """What all shapes share: chunked tokenising and the limits. What it says of a row is a function of its chunk alone,
    so that several processes may each take some.

    Args:
        longest: of rows that are certainly shorter than so many tokens no ids are needed; None: of all rows.
    """

    def __init__(
        self, shape: Shape, tokenizer: "PreTrainedTokenizerBase", spec: DataSpec, longest: int | None = None
    ) -> None:
        self.templater = Templater(tokenizer)
        self.spec, self.features = spec, features_of(shape)
        # Of the row at hand; they count only if it is used in the end.
        self.remarks: set[str] = set()
        pieces = self.templater.pieces
        self._longest = longest if pieces is not None and pieces.lossless else None
        self._plan, self._shape = _PLANNERS[shape](self), shape

    def table(self, rows: list[dict[str, Any]]) -> "pa.Table":
        """Encoded rows as Arrow holds them."""
        import pyarrow as pa
        from datasets import Dataset

        columns = {name: [row[name] for row in rows] for name in self.features}
        if self._shape == "prompt":  # messages, which `datasets` writes in its own way
            return Dataset.from_dict(columns, features=self.features).data.table
        return pa.table(columns, schema=self.features.arrow_schema)

    def lay_out(self, row: Row, prompt: list[Message], reply: list[Message], before: str | None = None) -> Layout:
        return lay_out(self.templater, prompt, reply, row.tools, row.origin, before)

    def fits(self, *layouts: Layout) -> bool:
        """Whether it is certain without their ids that nothing of these is cut, dropped or remarked on."""
        spec = self.spec
        return self._longest is not None and all(
            layout.plain
            and self._short(layout.text, self._longest, spec.max_length)
            and self._short(layout.before, spec.max_prompt_length)
            for layout in layouts
        )

    def fits_alone(self, prompt: str) -> bool:
        """The same for a prompt without a reply."""
        limit = self.spec.max_length if self.spec.max_prompt_length is None else self.spec.max_prompt_length
        return self._longest is not None and self._short(prompt, self._longest, limit)

    @staticmethod
    def _short(text: str, *limits: int | None) -> bool:
        """Whether the text has fewer tokens than each limit, for certain: none is less than a byte, and at most two are
        added, a BOS and the EOS of a reply that has none."""
        most = min((each for each in limits if each is not None), default=None)
        return most is None or (len(text) <= most - 2 and len(text.encode("utf-8", "surrogatepass")) <= most - 2)

    def check_size(self, row: Row, *texts: str) -> None:
        """A text of millions of characters is not cut into tokens where it is plain that it is too long.

        Raises:
            Unusable: it is dropped, as `overflow` says.
            UserError: it is an error, or would have to be cut.
        """
        limit = self.spec.max_length
        for text in texts:
            if len(text) <= _HUGE:
                continue
            fewest = fewest_tokens(self.templater.tokenizer, text)
            if limit is not None and fewest <= limit:
                continue
            if self.spec.overflow == "drop" and limit is not None:
                raise Unusable(TOO_LONG)
            said = f"{len(text)} characters, at least {fewest} tokens, {TOO_LONG} = {limit}"
            raise _TooLong(row.origin, said, "leave the row out, or set overflow to drop and a max_length")

    def spans(self, layout: Layout, ids: list[list[int]]) -> Spans:
        """Where the replies are, with what is worth noting noted."""
        spans = find_spans(self.templater, layout, ids)
        for remark in (*layout.remarks, *([BOUNDARY_MOVED] if spans.moved else [])):
            self.remark(remark)
        return spans

    def encode(self, rows: list[Row]) -> list[Outcome]:
        """What becomes of each row of a chunk."""
        self.templater.begin()
        plans = [self._planned(row) for row in rows]
        # each text once: the sides of a pair share their prompt, and many rows may
        texts = list(dict.fromkeys(text for texts, _ in plans for text in texts))
        ids = dict(zip(texts, self.templater.ids(texts), strict=True))
        return [
            self._finish(row, finish, [ids[text] for text in texts])
            for row, (texts, finish) in zip(rows, plans, strict=True)
        ]

    def _planned(self, row: Row) -> Plan:
        found: Exception
        try:
            return self._plan(row)
        except (Unusable, UserError) as error:
            found = error  # the name of an exception ends with its clause

        def refuse(ids: list[list[int]]) -> dict[str, Any]:
            raise found

        return [], refuse

    def _finish(self, row: Row, finish: Callable[[list[list[int]]], dict[str, Any]], ids: list[list[int]]) -> Outcome:
        self.remarks.clear()
        said = (row.margin is not None, row.label if self._shape == "label" else None)
        try:
            encoded = finish(ids)
        except Unusable as unusable:
            error = UserError(row.origin, unusable.reason, "correct the row, or leave it out")
            kind = LIMIT if unusable.reason in _LIMITS else "unusable"
            return Outcome(None, (), Problem(kind, error, unusable.reason), *said)
        except UserError as error:
            return Outcome(None, (), Problem("overflow" if isinstance(error, _TooLong) else "template", error), *said)
        if row.tools and self._tools_unseen(row):
            self.remark(TOOLS_UNSEEN)
        return Outcome(encoded, tuple(sorted(self.remarks)), None, *said)

    def remark(self, what: str) -> None:
        self.remarks.add(what)

    def check_said(self, reply: list[int]) -> None:
        """Drop a reply that is only EOS, as a template without tool calls renders a turn that only calls a tool."""
        if reply == [self.templater.eos]:
            raise Unusable(NOTHING_SAID)

    def _tools_unseen(self, row: Row) -> bool:
        shown, hidden = (self.templater.fitted(row.prompt, tools, True, row.origin)[1] for tools in (row.tools, None))
        return shown == hidden

    def fit_prompt(self, prompt: list[int], row: Row, alone: bool = False) -> list[int]:
        """The prompt, cut to `max_prompt_length`; one without a reply is cut to `max_length` if that is not set."""
        limit, reason = self.spec.max_prompt_length, PROMPT_TOO_LONG
        if limit is None and alone:
            limit, reason = self.spec.max_length, TOO_LONG
        if limit is None or len(prompt) <= limit:
            return prompt
        self._overflow(len(prompt), limit, reason, row)
        bos = self.templater.bos
        if limit > 1 and prompt[0] == bos and prompt.count(prompt[0]) == 1:
            # A BOS in its own right, not the mark with which every turn begins (ChatML).
            return [prompt[0], *prompt[len(prompt) - limit + 1 :]]
        return prompt[len(prompt) - limit :]

    def fit_reply(self, prompt: list[int], reply: list[int], row: Row) -> list[int]:
        """The reply, cut to what the prompt leaves of `max_length`."""
        limit = self.spec.max_length
        if limit is None or len(prompt) + len(reply) <= limit:
            return reply
        self._overflow(len(prompt) + len(reply), limit, TOO_LONG, row)
        if len(prompt) >= limit:
            raise Unusable(NO_ROOM)
        return reply[: limit - len(prompt)]

    def _overflow(self, length: int, limit: int, reason: str, row: Row) -> None:
        """Raise if the row is to be dropped or refused; return if it is to be truncated."""
        if self.spec.overflow == "error":
            raise _TooLong(
                row.origin,
                f"{length} tokens, {reason} = {limit}",
                "raise the limit, or set overflow to drop or truncate",
            )
        if self.spec.overflow == "drop":
            raise Unusable(reason)
        self.remark(TRUNCATED)


def _side(row: Row, name: str) -> list[Message]:
    side: list[Message] | None = getattr(row, name)
    if not side:
        raise UserError(row.origin, f"the row has no {name}", f"load the data with the kind that has {name}")
    return side
