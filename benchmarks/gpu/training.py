"""Training on the card: our stages against TRL's trainers, one side a process, on the same rows in bf16 with LoRA.

TRL's best is what its options allow on this machine: padding-free where its trainer has that (SFT), rows of like length
together elsewhere, with flash attention where a package of it is installed. What it ran with stands beside its figures.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from ..measure import Measured
from ..sides import our_trainer, trl_trainer
from ..training import timed, train_fields
from ..workload import real_pairs, write_rows

PAIRS = Path(__file__).parents[2] / "data/quickstart/pairs.jsonl"
WARM = 2
"""Steps that are not counted: torch.compile looks at sizes twice before it takes them for variable."""


def measure(options: dict[str, Any]) -> Iterator[tuple[str, Measured]]:
    """Examples and tokens a second after the steps that warm up, the peak of memory, the losses."""
    kind, side, spec = options["kind"], options["side"], options["base"]
    steps, batch = (1, 2) if options["tiny"] else (24 if options["full"] else 8, 16)
    train = train_fields(WARM + steps, batch, checkpointing=False)
    with tempfile.TemporaryDirectory() as folder:
        rows, output = Path(folder) / "rows.jsonl", Path(folder) / "out"
        write_rows(real_pairs(str(PAIRS), (WARM + steps) * batch, 1024, spec), kind, rows)
        if side == "ours":
            trainer = our_trainer(kind, rows, train, output, packed=True, spec=spec)
        else:
            attention = "sdpa" if side.endswith("sdpa") else best_attention(kind) if "tuned" in side else None
            tuned = "tuned" in side
            trainer = trl_trainer(kind, rows, train, output, tuned=tuned, spec=spec, attention=attention, warm=WARM)
        found = timed(trainer, WARM)
    examples = steps * batch / found["seconds"]
    with_attention = trainer.model.config._attn_implementation
    yield side, {**found, "examples_per_second": examples, "attention": with_attention, "reserved_bytes": _reserved()}


def best_attention(kind: str) -> str:
    """The fastest attention for TRL's trainer that this machine has."""
    if is_flash_attn_3_available():
        return "flash_attention_3"
    if is_flash_attn_2_available():
        return "flash_attention_2"
    # without padding all rows are one, whose attention is blocks: FlexAttention leaves out what lies between
    return "flex_attention" if kind == "sft" else "sdpa"


def _reserved() -> int:
    return torch.cuda.max_memory_reserved()
