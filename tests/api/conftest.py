"""A small run made by `preftune.run`, once for all tests here."""

from pathlib import Path
from typing import Any

import pytest

import preftune

DEMOS = [{"prompt": f"Say {word}.", "completion": f"{word}!"} for word in ("one", "two", "three", "four")]
PAIRS = [{"prompt": f"Say {word}.", "chosen": f"{word}!", "rejected": "no"} for word in ("one", "two", "three", "four")]
STEPS = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}


def recipe(folder: Path, **more: Any) -> dict[str, Any]:
    """SFT, a reward model and DPO on four rows of a byte tokenizer."""
    import json

    for name, rows in (("demos", DEMOS), ("pairs", PAIRS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "name": "small",
        "model": {"base": "random:llama", "dtype": "float32"},
        "lora": {"r": 2, "alpha": 4},
        "data": {"demos": {"path": folder / "demos.jsonl"}, "pairs": {"path": folder / "pairs.jsonl"}},
        "stages": {
            "sft": {"data": "demos", "train": STEPS},
            "reward": {"from": "sft", "data": "pairs", "train": STEPS},
            "dpo": {"from": "sft", "data": "pairs", "train": STEPS},
        },
        "eval": {
            "prompts": "demos", "policies": ["sft", "dpo"], "reference": "sft", "max_new_tokens": 4,
            "judges": [{"kind": "reward", "stage": "reward"}],
        },
    }  # fmt: skip
    return values | more


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> preftune.RunResult:
    folder = tmp_path_factory.mktemp("small")
    return preftune.run(recipe(folder), output_dir=folder / "run", quiet=True)
