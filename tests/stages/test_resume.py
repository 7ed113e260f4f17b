"""Stages that were cut off anywhere, run again: nothing may differ from a stage that was not."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from preftune.errors import UserError
from preftune.models.lora import LoraSpec
from preftune.stages import checkpoints, run
from preftune.stages.callbacks import ProgressBar
from preftune.stages.job import CheckpointPlan, StageJob
from preftune.stages.run import finished, run_stage
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


@pytest.mark.checklist("Q6")
@pytest.mark.parametrize(("kind", "bits"), [("sft", "4bit"), ("dpo", "8bit")])
def test_q06_a_quantised_base_is_quantised_alike_when_a_stage_goes_on(
    make_job: Any, sft_folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, bits: str
) -> None:
    whole, cut = (resumed_job(make_job, kind, sft_folder, name, quantization=bits) for name in ("whole", "cut"))
    run_stage(whole)
    with monkeypatch.context() as patch:
        cut_off(patch, *PLACES["step 7"])
        with pytest.raises(Killed):
            run_stage(cut)
    run_stage(cut)
    assert left(cut) == left(whole)


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"trainable_token_indices": [9, 61]}],
    ids=["DoRA", "PiSSA", "rows of tokens"],
)
def test_another_kind_of_lora_goes_on_exactly(
    make_job: Any, sft_folder: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    given: dict[str, Any] = {"lora": LoraSpec(r=4, alpha=8, **settings), "train": EPOCHS | {"num_train_epochs": 2}}
    whole = resumed_job(make_job, "sft", sft_folder, "whole", **given)
    run_stage(whole)
    job = resumed_job(make_job, "sft", sft_folder, "cut", **given)
    with monkeypatch.context() as patch:
        cut_off(patch, *PLACES["step 7"])
        with pytest.raises(Killed):
            run_stage(job)
    run_stage(job)
    assert left(job) == left(whole)


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
    assert [row["step"] for row in rows if "loss" in row] == [1, 3, 6, 8, 12, 15]


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_is_made_after_the_last(
    make_job: Any, sft_folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Cut off after its last step, in the middle of an epoch, again and again."""
    train = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    job = resumed_job(make_job, kind, sft_folder, kind, train=train)
    with monkeypatch.context() as patch:
        cut_off(patch, ProgressBar, "on_train_end", lambda *_: True)
        for _ in range(3):
            with pytest.raises(Killed):
                run_stage(job)
    assert run_stage(job)["steps"] == 2
    lines = [json.loads(line) for line in (job.output_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert len([line for line in lines if "train_loss" in line]) == 1


def halved(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(checkpoint: Path) -> None:
    for file in checkpoint.iterdir():
        file.unlink()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "nothing in it": emptied,
    "no manifest": lambda checkpoint: (checkpoint / "manifest.json").unlink(),
    "half a manifest": lambda checkpoint: halved(checkpoint / "manifest.json"),
    "no state": lambda checkpoint: (checkpoint / "trainer_state.json").unlink(),
    "half an adapter": lambda checkpoint: halved(checkpoint / "adapter_model.safetensors"),
    "half an optimizer": lambda checkpoint: halved(checkpoint / "optimizer.pt"),
    "no random numbers": lambda checkpoint: (checkpoint / "rng_state.pth").unlink(),
    "another progress": lambda checkpoint: (checkpoint / "progress_0.json").write_text("{}"),
    "still being written": lambda checkpoint: checkpoint.rename(checkpoint.parent / ".saving"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(
    make_job: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: str
) -> None:
    train = {"max_steps": 4}
    whole = make_job("sft", "whole", train=train, checkpoints=EVERY_STEP)
    run_stage(whole)
    job = make_job("sft", train=train, checkpoints=EVERY_STEP)
    with monkeypatch.context() as patch:
        cut_off(patch, ProgressBar, "on_step_begin", at_step(3))
        with pytest.raises(Killed):
            run_stage(job)
    folder = job.output_dir / "checkpoints"
    assert [each.name for each in folder.glob("checkpoint-*")] == ["checkpoint-3"]  # the last one alone is kept
    DAMAGES[damage](folder / "checkpoint-3")
    capfd.readouterr()
    run_stage(job)
    said = capfd.readouterr().err
    assert "continues" not in said and ("is passed over" in said) == (
        damage not in ("no manifest", "still being written")
    )
    adapters = [(each.output_dir / "adapter_model.safetensors").read_bytes() for each in (whole, job)]
    assert adapters[0] == adapters[1] and not folder.exists()


@pytest.mark.checklist("P23")
@pytest.mark.parametrize("appears", [True, False])
def test_p23_every_process_goes_on_from_the_same_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, appears: bool
) -> None:
    """A disk that machines share may show one of them late what another wrote."""
    looked: list[int] = []

    def agreed(args: object, *values: int) -> tuple[int, ...]:
        """What another process says, who sees step 4 from the start."""
        del args
        looked.append(values[0])
        if appears and len(looked) == 2:
            (tmp_path / "checkpoint-4").mkdir()
            checkpoints.seal(tmp_path / "checkpoint-4", processes=2, asked=False)
        return tuple(max(pair) for pair in zip(values, (4, -4, 0), strict=True))

    monkeypatch.setattr(checkpoints, "agreed", agreed)
    monkeypatch.setattr(checkpoints.time, "sleep", lambda _: None)
    monkeypatch.setattr(checkpoints, "_SHARED", 0.05)
    (tmp_path / "checkpoint-2").mkdir()
    checkpoints.seal(tmp_path / "checkpoint-2", processes=2, asked=False)
    args: Any = SimpleNamespace(world_size=2, gradient_accumulation_steps=1)
    if appears:
        assert checkpoints.newest_for_all(tmp_path, "sft", args, of_any_number=False) == tmp_path / "checkpoint-4"
        assert looked == [2, 2, 4]
    else:
        with pytest.raises(UserError, match="one process finds step 4 as the newest, another 2"):
            checkpoints.newest_for_all(tmp_path, "sft", args, of_any_number=False)


def test_another_number_of_processes_keeps_the_rows_of_a_step(tmp_path: Path) -> None:
    assert checkpoints.accumulation(tmp_path, 3, 2) == 3
    for step, accumulation in ((2, 1), (4, 2)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for process, loss in enumerate((1.0, 4.0)):
            said = asdict(checkpoints.Progress(loss=loss, total_loss=2 * loss, tokens=7))
            checkpoints.progress_file(folder, process).write_text(json.dumps(said))
        checkpoints.seal(folder, processes=2, asked=False, accumulation=accumulation)
    # of the newest, whose steps were of two micro-batches in each of two processes
    assert [checkpoints.accumulation(tmp_path, 1, processes) for processes in (1, 2, 4)] == [4, 2, 1]
    assert checkpoints.accumulation(tmp_path, 1, 3) == 1  # none would do, and `newest` says so
    newest = tmp_path / "checkpoint-4"
    assert checkpoints.newest(tmp_path, "sft", 1, 4) == checkpoints.newest(tmp_path, "sft", 4, 1) == newest
    with pytest.raises(UserError, match="checkpoint-4 is of 2 processes and this run has 3; launch 2, or start"):
        checkpoints.newest(tmp_path, "sft", 3, 1)
    # what is logged is a mean over processes
    assert [checkpoints.read_progress(newest, process, 2).loss for process in (0, 1)] == [1.0, 4.0]
    alone = checkpoints.read_progress(newest, 0, 1)
    assert (alone.loss, alone.total_loss, alone.tokens) == (2.5, 5.0, 7)


def test_a_sealed_checkpoint_that_was_not_moved_yet_is_found(tmp_path: Path) -> None:
    beside = tmp_path / ".saving" / "checkpoint-4"
    beside.mkdir(parents=True)
    (beside / "weights").write_text("four")
    checkpoints.seal(beside, processes=1, asked=False)
    (tmp_path / ".saving" / "checkpoint-5").mkdir()  # not sealed
    checkpoints.salvage(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint-4"]
    assert checkpoints.newest(tmp_path, "sft", 1) == tmp_path / "checkpoint-4"


def test_what_the_recipe_asks_for_stays_and_the_rest_goes(make_job: Any) -> None:
    train = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    job = make_job("sft", train=train, checkpoints=EVERY_STEP)
    run_stage(job)
    kept = {each.name for each in (job.output_dir / "checkpoints").iterdir()}
    assert kept == {"checkpoint-4", "checkpoint-6"}


def test_none_are_written_where_the_recipe_wants_none(make_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job("sft", train={"max_steps": 4, "save_strategy": "no"}, checkpoints=EVERY_STEP)
    monkeypatch.setattr(checkpoints.Resumable, "_save_checkpoint", lambda *_: pytest.fail("a checkpoint"))
    run_stage(job)


def test_early_stopping_goes_on_with_the_patience_that_was_left(make_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No evaluation is better than the first: with a patience of 3 the fourth ends it, wherever it was cut off."""
    train = {"max_steps": None, "num_train_epochs": 9, "learning_rate": 0.0}
    job = make_job("sft", held_out=0.3, train=train, method={"early_stopping_patience": 3}, checkpoints=EVERY_STEP)
    with monkeypatch.context() as patch:
        cut_off(patch, StageTrainer, "evaluate", lambda self, *_: self.state.epoch == 3)
        with pytest.raises(Killed):
            run_stage(job)
    assert run_stage(job)["epochs"] == 4


def test_a_checkpoint_that_cannot_be_written_ends_the_stage_in_words(
    make_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job("sft", train={"max_steps": 4}, checkpoints=CheckpointPlan(share=0.5, minutes=None))
    true = checkpoints.seal

    def full(checkpoint: Path, **given: Any) -> None:
        raise OSError(28, "No space left on device", str(checkpoint))

    monkeypatch.setattr(checkpoints, "seal", full)
    with pytest.raises(UserError, match=r"the disk is full; free some space; .* continues from the stage's start"):
        run_stage(job)
    assert not (job.output_dir / "checkpoints" / ".saving").exists()
    monkeypatch.setattr(checkpoints, "seal", true)
    assert run_stage(job)["steps"] == 4


def test_time_alone_asks_for_one_as_well(make_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    true = checkpoints.Resumable._save_checkpoint

    def noted(self: Any, *args: Any) -> None:
        saved.append(self.state.global_step)
        true(self, *args)

    monkeypatch.setattr(checkpoints.Resumable, "_save_checkpoint", noted)
    now = [0.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])

    def begin(self: Any, *_: Any, **__: Any) -> None:
        now[0] += 25.0  # seconds a step

    monkeypatch.setattr(ProgressBar, "on_step_begin", begin)
    run_stage(make_job("sft", train={"max_steps": 9}, checkpoints=CheckpointPlan(share=None, minutes=1)))
    assert saved == [3, 6, 9]


def test_what_was_cut_off_after_its_end_is_not_made_again(make_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job("sft", train={"max_steps": 4}, checkpoints=EVERY_STEP)
    assert finished(job) is None
    with monkeypatch.context() as patch:
        patch.setattr(run, "clear_checkpoints", lambda _job: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run_stage(job)
    assert (job.output_dir / "checkpoints").is_dir()
    metrics = finished(job)
    assert metrics is not None and metrics["steps"] == 4
    assert not (job.output_dir / "checkpoints").exists()
    # its weights are not all on the disk: it is made again
    halved(job.output_dir / "adapter_model.safetensors")
    assert finished(job) is None and not (job.output_dir / "lineage.json").exists()
