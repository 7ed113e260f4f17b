"""Tiny jobs for every kind of stage: a random Llama, a handful of rows."""

import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from preftune.data.spec import DataSpec, SourceSpec
from preftune.models.base import Base
from preftune.models.loading import resolve_base
from preftune.models.lora import LoraSpec
from preftune.models.tokens import load_tokenizer
from preftune.stages.job import StageJob
from preftune.stages.run import run_stage

from .served import Served
from .tiny_ppo import tiny_model

WORDS = ("red", "green", "blue", "black", "white", "brown")

PAIRS = [
    {
        "prompt": f"Name colour {number}.",
        "chosen": f"The colour is {word}.",
        "rejected": f"I will not say {word} to you, go away." if number % 2 else "No.",
    }
    for number, word in enumerate(WORDS * 2)
]
ROWS = {
    "demo": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS],
    "pair": PAIRS,
    "label": [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in PAIRS[:4]
        for side in ("chosen", "rejected")
    ],
    "prompt": [{"prompt": row["prompt"], "place": place} for place, row in enumerate(PAIRS)],
}
DATA_OF = {"sft": "demo", "reward": "pair", "dpo": "pair", "kto": "label", "sample": "prompt", "ppo": "prompt"}


@pytest.fixture(scope="session")
def base(preftune_cache: Path) -> Base:
    return resolve_base("random:llama")


@pytest.fixture(scope="session")
def tokenizer(base: Base) -> Any:
    return load_tokenizer(base)


@pytest.fixture
def pair_rows() -> list[dict[str, Any]]:
    return list(PAIRS)


@pytest.fixture
def rows_of() -> Callable[[str], list[dict[str, Any]]]:
    return lambda kind: list(ROWS[DATA_OF[kind]])


@pytest.fixture
def make_job(base: Base, tmp_path: Path) -> Callable[..., StageJob]:
    """make_job(kind, name=..., train={...}, rows=[...], held_out=0.0, **fields of StageJob) -> StageJob."""

    def make(
        kind: str,
        name: str | None = None,
        *,
        rows: list[dict[str, Any]] | None = None,
        held_out: float = 0.0,
        **given: Any,
    ) -> StageJob:
        name = name or kind
        file = tmp_path / f"{name}.jsonl"
        rows = ROWS[DATA_OF[kind]] if rows is None else rows
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        train = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-3, **given.pop("train", {})}
        return StageJob(
            name=name,
            kind=kind,
            base=given.pop("base", base),
            lora=given.pop("lora", LoraSpec(r=4, alpha=8)),
            data=DataSpec(sources=(SourceSpec(path=str(file)),), held_out=held_out),
            folders=(tmp_path,),
            train={key: value for key, value in train.items() if value is not None},
            output_dir=tmp_path / "run" / name,
            data_name=DATA_OF[kind],
            **given,
        )

    return make


@pytest.fixture(scope="session")
def sft_folder(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent: an SFT adapter that has really moved away from the base."""
    return sft_on(base, tmp_path_factory.mktemp("parent"))


def sft_on(base: Base, folder: Path) -> Path:
    """An SFT stage's folder on that base."""
    file = folder / "demos.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS["demo"]), encoding="utf-8")
    job = StageJob(
        name="sft",
        kind="sft",
        base=base,
        lora=LoraSpec(r=4, alpha=8),
        data=DataSpec(sources=(SourceSpec(path=str(file)),)),
        folders=(folder,),
        train={"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2},
        output_dir=folder / "sft",
        data_name="demos",
    )
    run_stage(job)
    return job.output_dir


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model of `tiny_ppo.py` as a folder, for a server."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture
def server(tiny_base: Path) -> Generator[Served]:
    """A stand-in server of vLLM's that has it."""
    with Served(tiny_base) as made:
        yield made
