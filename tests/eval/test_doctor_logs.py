"""`preftune doctor`: what is read from logs, metrics and saved weights."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune.data.spec import DataSpec, SourceSpec
from preftune.eval.doctor.finding import Finding
from preftune.eval.doctor.log_checks import (
    check_entropy_trend,
    check_first_step,
    check_kl_trend,
    check_ppo_start,
    check_rows,
    check_sampler,
    first_step_tolerance,
)
from preftune.eval.doctor.measure_files import log_findings
from preftune.eval.doctor.records import Record, lora_change, lost_rows, series
from preftune.models.base import Base
from preftune.models.lora import LoraSpec
from preftune.stages.job import StageJob


def level(finding: Finding) -> str:
    return finding.level


def test_lora_change_by_hand():
    parent = {"x.lora_A.weight": torch.ones(1, 2), "x.lora_B.weight": torch.tensor([[3.0], [4.0]])}
    child = {"x.lora_A.weight": torch.ones(2, 2), "x.lora_B.weight": torch.tensor([[3.0, 0.0], [4.0, 5.0]])}
    # a new column of norm 5 on a parent of norm 5; the parent itself is all there
    assert lora_change(child, parent) == (pytest.approx(1.0), pytest.approx(1.0))
    afresh = {"x.lora_B.weight": torch.tensor([[4.0, 1.0], [-3.0, 0.0]])}
    assert lora_change(afresh, parent)[1] == pytest.approx(0.0)
    assert lora_change(parent, None) == (pytest.approx(5.0), None)


@pytest.mark.parametrize(("gap", "expected"), [(0.0, "OK"), (9e-4, "OK"), (2e-3, "broken"), (math.nan, "broken")])
def test_first_step(gap, expected):
    assert level(check_first_step("d", gap, first_step_tolerance(-100.0, low_precision=False), start="sft")) == expected


def record(kind: str, log: list[dict[str, Any]], **settings: Any) -> Record:
    """A stage that has nothing but a log."""
    base = Base("random:llama", Path("."), None, "")
    data = DataSpec((SourceSpec("x.jsonl"),))
    job = StageJob(name=kind, kind=kind, base=base, data=data, output_dir=Path(kind), parent=Path("sft"), **settings)
    return Record(job, None, {}, log)


@pytest.mark.parametrize(
    ("kind", "row", "gap"),
    [
        ("kto", {"step": 1, "loss": 0.5, "rewards/chosen": 0.05, "logps/chosen": -90.0}, 0.1),
        ("dpo", {"step": 1, "loss": 0.7, "rewards/chosen": 0.0, "rewards/rejected": -0.2, "logps/chosen": None}, 0.4),
        ("dpo", {"step": 1, "loss": 0.69, "rewards/chosen": 0.0, "rewards/rejected": 0.0}, 0.0),
    ],
)
def test_first_steps_are_read_from_logs(kind: str, row: dict[str, Any], gap: float):
    left_out: list[str] = []
    (found,) = log_findings(record(kind, [row, {"step": 2, "rewards/chosen": 9.0}], method={"beta": 0.5}), left_out)
    assert (found.measured, found.level) == (pytest.approx(gap), "broken" if gap else "OK")
    assert not left_out


def test_a_log_that_begins_late_is_left_out():
    for made in (
        record("dpo", [{"step": 5, "loss": 0.6, "rewards/chosen": 0.3}]),
        record("dpo", [{"step": 1, "loss": 0.6, "rewards/chosen": 0.3}], lora=LoraSpec(dropout=0.1)),
        record("ppo", [{"objective/kl": 3.0, "rollout/length": 9, "episode": 640}], method={"rollout_batch_size": 64}),
    ):
        left_out: list[str] = []
        assert list(log_findings(made, left_out)) == []
        assert "first step" in left_out[0]


def test_rounding_in_16_bits_is_allowed_for():
    assert first_step_tolerance(-400.0, low_precision=True) == pytest.approx(20 / 128)
    assert level(check_ppo_start("p", 0.1, 40, start="sft", low_precision=True)) == "OK"
    assert level(check_ppo_start("p", 0.1, 40, start="sft", low_precision=False)) == "broken"
    assert level(check_ppo_start("p", -4.0, 40, start="sft", low_precision=True)) == "broken"


def test_the_samplers_distance_is_judged_by_mean_and_kl():
    assert level(check_sampler("p", [1e-5, 2e-5], [0, 1e-9], 2e-3)) == "OK"
    assert level(check_sampler("p", [1e-5, 1.5e-3], [0, 1e-9], 2e-3)) == "look"
    assert level(check_sampler("p", [1e-5, 1e-5], [0, 3e-3], 2e-3)) == "broken"


@pytest.mark.parametrize(
    ("kls", "expected"),
    [
        ([0, 1, 2, 3, 4, 5], "OK"),
        ([0, 2, 5, 8, 11, 14], "look"),
        ([0, 5, 10, 20, 30, 40], "broken"),
        ([0, -2, -4, -5, -5, -6], "broken"),
        ([0, 0.1, -0.1, -0.5, 0.2, 0.1], "OK"),
    ],
)
def test_kl_trend(kls, expected):
    assert level(check_kl_trend("p", kls, [20] * 6)) == expected


@pytest.mark.parametrize(
    ("entropies", "expected"),
    [
        ([1.4, 1.4, 1.3, 1.2, 1.2, 1.1], "OK"),
        ([1.4, 1.4, 0.9, 0.5, 0.3, 0.3], "look"),
        ([1.4, 1.4, 0.5, 0.1, 0.03, 0.02], "broken"),
        ([1.4, 1.4, 0.5, 0.1, 0.1, 0.1], "look"),
    ],
)
def test_entropy_trend(entropies, expected):
    assert level(check_entropy_trend("p", entropies)) == expected


@pytest.mark.parametrize(("lost", "expected"), [(0, "OK"), (5, "OK"), (6, "look"), (51, "broken")])
def test_rows(lost, expected):
    assert level(check_rows("s", 100, lost)) == expected


def test_lost_rows_are_counted_over_all_parts():
    data = {
        "read": {"read": 100, "dropped": {"bad": 3}, "notes": {"prompt seen before": 9}},
        "train": {"dropped": {"too long": 2}, "notes": {"truncated": 4}},
        "held_out": {"dropped": {}, "notes": {"truncated": 1}},
    }
    assert lost_rows({"data": data}) == (100, 10)
    assert lost_rows({}) is None


def test_a_series_leaves_out_what_is_not_finite():
    log = [{"a": 1, "b": 2}, {"a": 3, "b": None}, {"a": 5}, {"a": 7, "b": 8.5}]
    assert series(log, "a", "b") == [[1, 7], [2, 8.5]]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([2.0, 1.6, 1.1, 0.8, 0.5], "OK"), ([1.0, 1.1, 0.9, 1.0], "OK"), ([0.5, 0.8, 1.2, 1.5, 2.0], "look")],
)
def test_a_student_that_leaves_its_teacher(losses: list[float], expected: str) -> None:
    log = [{"step": i, "loss": x, "rollout/length": 5.0, "rollout/entropy_per_token": 1.0, "episode": 64 * (i + 1)}
           for i, x in enumerate(losses)]  # fmt: skip
    left_out: list[str] = []
    found = {each.check: level(each) for each in log_findings(record("distill", log), left_out)}
    assert found["divergence"] == expected and not any("KL" in each for each in left_out)


@pytest.mark.checklist("V18")
@pytest.mark.parametrize(
    ("asked", "said", "measured"),
    [({}, "OK", 0.02), ({"mismatch_tolerance": 0.1}, "broken", 0.5), ({"rollout_ahead": 0}, "broken", 0.5)],
)
def test_v18_the_doctor_bounds_the_replies_of_the_policy_that_trains(asked, said, measured):
    """Those that were drawn ahead differ by the updates since; a server computes in 16 bits."""
    rows = [
        {"rollout/logprob_mismatch_mean": gap, "rollout/sampler_kl": gap / 9, "rollout/staleness": age,
         "rollout/length": 5.0, "episode": 64.0 * (place + 1)}
        for place, (gap, age) in enumerate([(0.02, 0.0), (0.5, 4.0), (0.4, 4.0)])
    ]  # fmt: skip
    made = record("ppo", rows, method={"rollout_engine": "vllm", "rollout_ahead": 1} | asked)
    (found,) = [each for each in log_findings(made, []) if each.check == "ppo sampler"]
    assert (level(found), found.measured) == (said, measured)
