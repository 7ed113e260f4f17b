"""A stage's trackers: what they are told, once, also of a stage that was cut off; and who cannot be told."""

import json
import sys
from types import ModuleType
from typing import ClassVar

import pytest

from preftune.errors import UserError
from preftune.stages import trackers
from preftune.stages.check import stage_problems
from preftune.stages.job import CheckpointPlan, Trackers
from preftune.stages.run import run_stage
from preftune.stages.trackers import TOLD, Tracking, tracker_problem


class Recorded:
    """A tracker that remembers."""

    runs: ClassVar[dict[str, list[tuple[int, dict[str, float]]]]] = {}
    closed: ClassVar[list[bool]] = []

    def __init__(self, folder, trackers, run, identity, config, settings) -> None:
        self.rows = self.runs.setdefault(f"{trackers.group}/{run}/{identity}", [])

    def write(self, step, values) -> None:
        self.rows.append((step, dict(values)))

    def close(self, failed: bool) -> None:
        self.closed.append(failed)


@pytest.fixture
def recorded(monkeypatch) -> type[Recorded]:
    monkeypatch.setattr(Recorded, "runs", {})
    monkeypatch.setattr(Recorded, "closed", [])
    monkeypatch.setattr(trackers, "_WRITERS", {"wandb": Recorded})
    return Recorded


TOLD_OF = {"trackers": Trackers(("wandb",), "project", "group")}


def test_a_stage_that_was_cut_off_tells_no_row_twice(make_job, recorded, monkeypatch):
    job = make_job(
        "sft", train={"max_steps": 5}, held_out=0.25, checkpoints=CheckpointPlan(share=0.4, minutes=None), **TOLD_OF
    )
    real = Tracking.on_log

    def dying(self, args, state, control, **given) -> None:
        real(self, args, state, control, **given)
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Tracking, "on_log", dying)
        with pytest.raises(KeyboardInterrupt):
            run_stage(job)
    assert recorded.closed == [True]
    run_stage(job)
    ((name, rows),) = recorded.runs.items()
    assert name.startswith("group/sft/") and recorded.closed == [True, False]
    logged = [json.loads(line) for line in (job.output_dir / "log.jsonl").read_text().splitlines()]
    assert [step for step, _ in rows] == [row["step"] for row in logged]
    losses = [(step, values["train/loss"]) for step, values in rows if "train/loss" in values]
    assert losses == [(row["step"], row["loss"]) for row in logged if "loss" in row] and len(losses) == 5
    assert any("eval/loss" in values for _, values in rows)
    assert (job.output_dir / "runs" / TOLD).is_file()


def test_report_to_of_a_stage_takes_the_place_of_the_recipes_trackers(make_job, recorded):
    run_stage(make_job("sft", train={"report_to": "none", "max_steps": 1}, **TOLD_OF))
    assert not recorded.runs
    run_stage(make_job("sft", name="other", train={"report_to": ["wandb"], "max_steps": 1}))
    assert [name.split("/")[1] for name in recorded.runs] == ["other"]


def test_who_cannot_be_told_is_said_before_anything_trains(make_job, monkeypatch, tmp_path):
    assert "did you mean 'wandb'" in str(tracker_problem("wandbb", "trackers.0"))
    monkeypatch.setattr(trackers, "_installed", lambda module: False)
    assert str(tracker_problem("trackio", "trackers.0")) == "trackers.0: trackio is not installed; pip install trackio"
    monkeypatch.setattr(trackers, "_installed", lambda module: True)
    wandb = ModuleType("wandb")
    settings = ModuleType("settings")
    vars(settings).update(mode="online", api_key=None, identity_token_file=None, base_url="https://wandb.example")
    vars(wandb).update(setup=lambda: type("Setup", (), {"settings": settings}))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (problem,) = stage_problems(make_job("sft", train={"report_to": "wandb"}))
    assert problem.where == "stages.sft.train.report_to"
    assert "nobody is logged in to wandb at wandb.example" in problem.problem and "WANDB_MODE" in problem.remedy
    (tmp_path / "netrc").write_text("machine wandb.example login user password key\n")
    (tmp_path / "netrc").chmod(0o600)
    assert tracker_problem("wandb", "trackers.0") is None
    (tmp_path / "netrc").unlink()
    vars(settings)["mode"] = "offline"
    assert tracker_problem("wandb", "trackers.0") is None


def test_a_tracker_that_refuses_is_one_line(make_job, monkeypatch):
    def refusing(*_) -> None:
        raise RuntimeError("no such\nproject")

    monkeypatch.setattr(trackers, "_WRITERS", {"wandb": refusing})
    with pytest.raises(UserError, match=r"trackers: wandb: cannot be reported to \(no such project\)"):
        run_stage(make_job("sft", **TOLD_OF))


def test_event_files_hold_the_curve(make_job):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    job = make_job("sft", trackers=Trackers(("tensorboard",)))
    run_stage(job)
    events = accumulator.EventAccumulator(str(job.output_dir / "runs"), purge_orphaned_data=False).Reload()
    assert [each.step for each in events.Scalars("train/loss")] == [1, 2]
