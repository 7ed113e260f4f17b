"""The list of what is run, in order of worth: what stands first is what a short loan of a card is for."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...stages.kinds import KINDS

SHORT = ("random:qwen3-1.7b",)
FULL = (*SHORT, "random:llama-3.2-3b", "random:llama-3.1-8b")
"""Real shapes with random weights and a byte tokenizer: nothing is fetched, and time and memory are the real ones'."""

ROWS = (64, 256, 1)
"""Rows of a rollout, those first that tell most."""

ATTENTION = {"qwen3-1.7b": (16, 8, 128, None), "gemma-3-1b": (4, 1, 256, 512), "llama-3.1-8b": (32, 8, 128, None)}
"""(heads, key heads, head dimension, window) of the models whose attention is tried; Gemma's head dimension is the one
that cards with less shared memory than an H100 cannot take in a backward."""


@dataclass(frozen=True)
class Work:
    """What one process measures.

    Attributes:
        module: of this package; its `measure(options)` yields names and figures.
        about: what stands before those names, so that each is one of a kind.
        names: what it yields.
        seconds: it has at most so many.
        options: what `measure` is given.
    """

    module: str
    about: str
    names: tuple[str, ...]
    seconds: float
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[str, ...]:
        """Under which its figures are kept."""
        return tuple(f"{self.about}: {name}" for name in self.names)

    @property
    def title(self) -> str:
        """Its own words among all works."""
        return self.keys[0] if len(self.names) == 1 else self.about


def works(bases: Sequence[str], *, full: bool = False, tiny: bool = False) -> list[Work]:
    """What is to be run for these base specs.

    Args:
        full: more kinds of stages, more of TRL's sides, more steps. tiny: sizes for a rehearsal, which say nothing.
    """
    found = [
        Work("ceilings", "card", ("matrix product", "copy"), 30, {"tiny": tiny}),
        Work("attention", "attention", tuple(ATTENTION)[: 3 if full else 2], 75, {"tiny": tiny, "full": full}),
        Work("card_tests", "tests", ("decoding", "attention", "training"), 160, {}),
        Work("smoke", "smoke chain", ("against the CPU",), 100, {"tiny": tiny}),
    ]
    for base in bases:
        found += _of(base, full, tiny)
    # what stands in for a card is slow, and nobody pays for it by the minute
    return [replace(work, seconds=10 * work.seconds) for work in found] if tiny else found


def _of(base: str, full: bool, tiny: bool) -> list[Work]:
    name = base.partition(":")[2].partition("?")[0]
    common: dict[str, Any] = {"base": base, "tiny": tiny, "full": full}
    rows = tuple(f"{count} rows" for count in ROWS)
    wait = 3 if full else 1
    found = [Work("bases", name, ("made",), 60 * wait, common)]
    for side, seconds, wanted in (
        ("ours", 60, rows),
        ("generate continuous", 60, rows),
        ("generate dynamic", 60, rows),
        # compiled by transformers, which takes its time: for the rows that a rollout has
        ("generate static", 90, rows if full else rows[:1]),
    ):
        found.append(Work("rollouts", f"{name}, rollout, {side}", wanted, seconds * wait, {**common, "side": side}))
    on_policy = tuple(kind for kind, record in KINDS.items() if record.on_policy is not None)
    chain = [f"memory of {stage}" for stage in ("sft", "reward", "dpo")]
    chain += [said for kind in on_policy for said in (f"memory of {kind}", f"{kind} by phase")]
    found.append(Work("chain", f"{name}, chain", tuple(chain), (110 + 40 * len(on_policy)) * wait, common))
    for kind in ("sft", "dpo", "reward") if full else ("sft", "dpo"):
        for side in ("ours", "trl", "trl tuned", "trl tuned, sdpa") if full else ("ours", "trl tuned"):
            options = {**common, "kind": kind, "side": side}
            found.append(Work("training", f"{name}, {kind}", (side,), 60 * wait, options))
    return found
