"""Activations on a GPU: kept where there is room for them, computed again elsewhere."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from preftune.stages import activations
from preftune.stages.activations import heaviest_rows, settle_checkpointing
from preftune.stages.job import StageJob

DEMOS = Dataset.from_dict({"input_ids": [[1] * n for n in (5, 900, 3, 800, 4)], "labels": [[1]] * 5})


def test_no_batch_holds_more_than_the_rows_that_are_counted_with():
    rows = heaviest_rows(DEMOS, "demo", 2)
    assert (len(rows), rows.longest) == (5, 850)
    pairs = {"prompt_ids": [[1] * 4, [1]], "chosen_ids": [[1], [1] * 9], "rejected_ids": [[1] * 7, [1]]}
    assert heaviest_rows(Dataset.from_dict(pairs), "pair", 1).longest == 11
    assert heaviest_rows(Dataset.from_dict(pairs).select([0]), "pair", 4).longest == 11


@pytest.fixture
def settled(make_job: Callable[..., StageJob], monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """Whether a step's activations are computed again on a GPU of so many bytes."""

    def run(gigabytes: float, **train: Any) -> bool:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        card = SimpleNamespace(total_memory=int(gigabytes * 1e9))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
        # the config that the plan makes is this machine's
        plan = activations.stage_cost

        def planned(*arguments: Any) -> Any:
            with monkeypatch.context() as here:
                here.setattr(torch.cuda, "is_available", lambda: False)
                return plan(*arguments)

        monkeypatch.setattr(activations, "stage_cost", planned)
        args: Any = SimpleNamespace(activation_checkpointing=True, per_device_train_batch_size=2, world_size=1)
        settle_checkpointing(make_job("sft", train=train), args, DEMOS)
        monkeypatch.setattr(activations, "stage_cost", plan)
        return args.activation_checkpointing

    return run


def test_they_are_kept_where_they_fit(settled: Callable[..., bool]):
    assert not settled(24)
    assert settled(0.6)


def test_what_the_recipe_says_stays(settled: Callable[..., bool]):
    assert settled(24, gradient_checkpointing=True) and settled(24, activation_checkpointing=True)
    assert settled(0.6, gradient_checkpointing=False)  # untouched: the config has it from the recipe


def test_where_nothing_can_be_planned_they_are_computed_again(settled: Callable[..., bool], monkeypatch):
    monkeypatch.setattr(activations, "cost_if_kept", lambda *_: None)
    assert settled(24)


def test_a_cpu_keeps_its_own_default(make_job: Callable[..., StageJob]):
    args: Any = SimpleNamespace(activation_checkpointing=False)
    settle_checkpointing(make_job("sft"), args, DEMOS)
    assert args.activation_checkpointing is False
