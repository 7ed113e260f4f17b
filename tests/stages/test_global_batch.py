"""A step's loss and metrics are over its rows, however they are split; several processes: cli/test_engines.py."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

from preftune.stages.dpo import build_dpo
from preftune.stages.global_batch import ROWS, CountingCollator, DividedBatches, MicroBatch, divided, mean_of
from preftune.stages.run import run_stage

WORDS = ["red", "green", "blue", "black", "white", "brown", "pink", "grey", "teal", "lime", "plum", "rose"]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (8, [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]),
        (7, [[[0, 1], [4, 5]], [[2, 3], [6]]]),
        (5, [[[0, 1], [4]], [[2, 3], []]]),
        (3, [[[0, 1]], [[2]]]),
    ],
)
def test_what_is_left_is_divided_and_nothing_is_repeated(rows: int, expected: list) -> None:
    batches = DividedBatches(BatchSampler(range(rows), 2, drop_last=False), 2)
    assert [list(islice(batches, process, None, 2)) for process in range(2)] == expected
    assert len(batches) == len(list(batches))


def test_an_incomplete_batch_is_dropped_where_that_is_asked_for() -> None:
    batches = DividedBatches(BatchSampler(range(7), 2, drop_last=True), 2)
    assert list(batches) == [[0, 1], [2, 3]] and len(batches) == 2
    assert divided(range(7), 3) == [[0, 1, 2], [3, 4], [5, 6]]


def test_nothing_trains_on_the_row_that_stands_in_for_none() -> None:
    rows = [{"labels": 7}, {"labels": 8}]
    collate = CountingCollator(lambda each: {"labels": torch.tensor([row["labels"] for row in each])}, rows)
    assert collate(rows)["labels"].tolist() == [7, 8] and collate(rows)[ROWS] == 2
    assert collate([])["labels"].tolist() == [-100] and collate([])[ROWS] == 0


def test_a_mean_counts_by_its_rows() -> None:
    # processes with 2 and 1 rows in the first micro-batch, 1 and 0 in the second: means of 4 rows
    means = {(0, 0): 3.0, (0, 1): 5.0, (1, 0): 7.0, (1, 1): 1e9}
    parts = [MicroBatch((2, 1), 4, 2), MicroBatch((1, 0), 4, 2)]
    scaled = [parts[part].share(process) * mean for (part, process), mean in means.items()]
    assert sum(scaled) / 4 == pytest.approx((3 + 3 + 5 + 7) / 4)
    assert MicroBatch((2, 2), 8, 2).share(1) == 1


def test_a_metric_counts_by_what_it_is_a_mean_over() -> None:
    counts = [{"rows": 2, "tokens": 30, "chosen": 2}, {"rows": 1, "tokens": 10, "chosen": 0}]
    assert mean_of("rewards/margins", [1.0, 4.0], counts, "rows") == 2.0
    assert mean_of("entropy", [1.0, 3.0], counts, "tokens") == 1.5
    assert mean_of("rewards/chosen", [5.0], counts, "chosen") == 5.0
    assert (mean_of("min_reward", [1.0, 3.0], counts, "rows"), mean_of("max_reward", [1.0, 3.0], counts, "rows")) == (
        1,
        3,
    )
    assert mean_of("num_tokens", [10.0, 40.0], counts, "rows") == 40.0


def rows_of_unlike_lengths(kind: str, count: int) -> list[dict[str, Any]]:
    said = [f"The colour is {word}. " * (1 + index % 3) for index, word in enumerate(WORDS[:count])]
    prompts = [f"Name colour {index}." for index in range(count)]
    if kind == "sft":
        return [{"prompt": prompt, "completion": text} for prompt, text in zip(prompts, said, strict=True)]
    if kind == "kto":
        labels = [
            {"prompt": prompts[index], "completion": said[index], "label": index % 3 > 0} for index in range(count)
        ]
        return labels
    sides = [{"chosen": said[index], "rejected": "No. " * (1 + index % 4)} for index in range(count)]
    return [{"prompt": prompt, **side} for prompt, side in zip(prompts, sides, strict=True)]


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo", "kto"])
def test_accumulated_micro_batches_are_one_batch(kind: str, make_job, sft_folder: Path) -> None:
    """Two epochs in steps of 4 rows, the last of fewer; held-out rows in batches of 3 and of 2."""
    found = []
    for size, held in ((4, 3), (2, 2)):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": -1}
        train = {**split, "per_device_eval_batch_size": held, "num_train_epochs": 2, "eval_strategy": "epoch"}
        parent = None if kind == "sft" else sft_folder
        job = make_job(
            kind, f"{kind}{size}", parent=parent, train=train, rows=rows_of_unlike_lengths(kind, 12), held_out=0.6
        )
        metrics = run_stage(job)
        assert metrics["data"]["train"]["used"] % 4 == 3 and metrics["data"]["held_out"]["used"] % 2 == 1
        with (job.output_dir / "log.jsonl").open(encoding="utf-8") as lines:
            logs = [untimed(json.loads(line)) for line in lines]
        found.append((logs, load_file(job.output_dir / "adapter_model.safetensors")))
    (logs, weights), (other_logs, other_weights) = found
    assert any("eval_loss" in log for log in logs) and len(logs) == len(other_logs)
    for log, other in zip(logs, other_logs, strict=True):
        assert other == pytest.approx(log, rel=1e-4, abs=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(other_weights[name], tensor, rtol=0, atol=1e-4)


def untimed(log: dict[str, Any]) -> dict[str, Any]:
    """A log entry without what the clock says, and what Transformers counts by batches."""
    return {name: x for name, x in log.items() if not any(word in name for word in ("time", "second", "flos", "epoch"))}


def test_a_loss_that_is_no_mean_over_rows_is_said(make_job, sft_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, losses, steps in (("plain", ["sigmoid"], 2), ("whole", ["aot"], 1), ("parts", ["sigmoid", "aot"], 2)):
        train = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": steps}
        method = {"beta": 0.1, "loss_type": losses}
        build_dpo(make_job("dpo", name, parent=sft_folder, train=train, method=method))
    said = "parts: aot is of the rows computed at once, 2 here, and a step has 2 such parts: with others it is another"
    assert [each.getMessage() for each in caplog.records if "at once" in each.getMessage()] == [said]
