"""Stages that were cut off anywhere, run again: nothing may differ from a stage that was not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preftune.stages.callbacks import ProgressBar
from preftune.stages.job import CheckpointPlan, StageJob
from preftune.stages.run import run_stage
from preftune.stages.trainers import StageTrainer

KINDS = ("sft", "reward", "dpo", "kto")
CLOCK = ("runtime", "per_second", "seconds", "peak_memory_bytes")
EVERY_STEP = CheckpointPlan(share=0.01, minutes=None)
# 9 rows to train on: five steps an epoch, logs that reach over an epoch's end
EPOCHS = {"max_steps": None, "num_train_epochs": 3, "per_device_train_batch_size": 2, "logging_steps": 3}


class Killed(BaseException):
    pass


def timeless(found: Any) -> Any:
    """Without what the clock says."""
    if isinstance(found, dict):
        return {key: timeless(value) for key, value in found.items() if not key.endswith(CLOCK)}
    return [timeless(each) for each in found] if isinstance(found, list) else found


def left(job: StageJob) -> dict[str, Any]:
    """All that a stage leaves behind, as far as it is the same every time."""
    lines = (job.output_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = timeless(json.loads((job.output_dir / "metrics.json").read_text(encoding="utf-8")))
    del metrics["data"]  # which names the test's own folder
    return {
        "adapter": (job.output_dir / "adapter_model.safetensors").read_bytes(),
        "log": timeless([json.loads(line) for line in lines]),
        "metrics": metrics,
        "files": sorted(path.name for path in job.output_dir.iterdir()),
    }


def cut_off(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, when: Callable[..., bool]) -> None:
    """The method raises `Killed` where that is true of its arguments; `Killed` is nothing that anybody catches."""
    true = getattr(owner, method)

    def killing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if when(self, *args):
            raise Killed
        return true(self, *args, **kwargs)

    monkeypatch.setattr(owner, method, killing)


def at_step(step: int) -> Callable[..., bool]:
    return lambda _self, _args, state, *_: state.global_step == step


PLACES: dict[str, tuple[type, str, Callable[..., bool]]] = {
    # five steps an epoch
    **{f"step {n}": (ProgressBar, "on_step_begin", at_step(n)) for n in (1, 5, 7, 14)},
    "first evaluation": (StageTrainer, "evaluate", lambda self, *_: self.state.global_step == 5),
    "last evaluation": (StageTrainer, "evaluate", lambda self, *_: self.state.global_step == 15),
    "the end": (ProgressBar, "on_train_end", lambda *_: True),
}


@pytest.fixture(scope="module")
def wholes() -> dict[str, dict[str, Any]]:
    """What stages leave behind that nothing interrupted, by kind."""
    return {}


def resumed_job(make_job: Any, kind: str, sft_folder: Path, name: str, **given: Any) -> StageJob:
    parent = None if kind == "sft" else sft_folder
    values = {"held_out": 0.25, "train": EPOCHS, "checkpoints": EVERY_STEP} | given
    return make_job(kind, name, parent=parent, **values)


@pytest.mark.parametrize(
    ("kind", "place"),
    [*(("sft", place) for place in PLACES), *((kind, place) for kind in KINDS[1:] for place in ("step 7", "the end"))],
)
def test_cut_off_and_run_again_equals_never_cut_off(
    make_job: Any, sft_folder: Path, monkeypatch: pytest.MonkeyPatch, wholes: Any, kind: str, place: str
) -> None:
    if kind not in wholes:
        job = resumed_job(make_job, kind, sft_folder, kind)
        run_stage(job)
        wholes[kind] = left(job)
    job = resumed_job(make_job, kind, sft_folder, kind)
    with monkeypatch.context() as patch:
        cut_off(patch, *PLACES[place])
        with pytest.raises(Killed):
            run_stage(job)
    run_stage(job)
    found = left(job)
    for part in ("log", "metrics"):
        assert found[part] == wholes[kind][part]
    assert found == wholes[kind]
    # KTO's rows are fewer
    assert found["metrics"]["steps"] == (9 if kind == "kto" else 15)


def test_a_resumed_stage_logs_as_often_as_it_is_told_now(
    make_job: Any, sft_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = resumed_job(make_job, "sft", sft_folder, "told")
    with monkeypatch.context() as patch:
        cut_off(patch, *PLACES["step 7"])
        with pytest.raises(Killed):
            run_stage(job)
    run_stage(resumed_job(make_job, "sft", sft_folder, "told", train=EPOCHS | {"logging_steps": 4}))
    rows = [json.loads(line) for line in (job.output_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 3, 6, 8, 12]
