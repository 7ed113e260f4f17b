"""What the report says beside its figures: silent judges, favoured places, seeds, bounds, what nobody examined."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from preftune.eval.report import doctor, frontier, head, winrates
from preftune.eval.report.page import render
from preftune.eval.report.read import Run, StageRecord, read_run
from preftune.eval.report.reward_models import length_words
from preftune.eval.results import silent_judges
from preftune.eval.statistics.over_seeds import over_seeds, seed_groups, t_interval
from preftune.stages.kinds import stage_kind

from .fake_run import build_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return read_run(build_run(tmp_path_factory.mktemp("runs") / "quickstart"))


def row(policy: str, **values: object) -> dict[str, object]:
    return {"policy": policy, "reference": "sft", "judge": "tiny", "n": 10, "ties": 0} | values


def test_a_judge_without_a_verdict_is_said_first(run):
    rows = (row("sft", win_rate=0.5), row("dpo", n=0, win_rate=None, usage={"unread": {"cut at max_tokens": 20}}))
    silent = replace(run, results=rows, samples=())
    assert silent_judges(rows) == ["tiny"]
    said = "Judge tiny gave no verdict at all: 20 answers without a verdict (20 cut at max_tokens)"
    assert any(said in sentence for sentence in head.verdict(silent))
    assert render(silent).count(said) == 2
    assert silent_judges((row("sft"), row("dpo", n=0), row("ppo", n=1))) == []


@pytest.mark.parametrize(
    ("share", "n", "said"),
    [(0.5, 200, "no favour"), (0.62, 400, "favours the first"), (0.3, 400, "favours the second")],
)
def test_a_favoured_place_is_named(share, n, said):
    assert said in winrates.first_place_words({"first_place": share, "first_place_n": n})
    assert winrates.first_place_words({"first_place": None, "first_place_n": 0}) == ""


def test_policies_that_are_clearly_worse_are_named(run):
    rows = (
        row("sft", win_rate=0.5),
        row("dpo", win_rate=0.8, ci_low=0.7, ci_high=0.9),
        row("ipo", win_rate=0.2, ci_low=0.1, ci_high=0.3),
        row("kto", win_rate=0.4, ci_low=0.3, ci_high=0.49),
        row("ppo", win_rate=0.45, ci_low=0.3, ci_high=0.6),
    )
    said = [str(sentence) for sentence in head.verdict(replace(run, results=rows, samples=()))]
    assert "By tiny, <b>ipo and kto</b> are clearly worse than sft." in said


def test_stages_that_differ_in_their_seed_alone_stand_together():
    stages = {
        "sft": {"kind": "sft", "from": "base", "seed": 0},
        "sft1": {"kind": "sft", "from": "base", "seed": 1},
        "dpo": {"kind": "dpo", "from": "sft", "beta": 0.1, "train": {"seed": 3, "max_steps": 4}},
        "dpo1": {"kind": "dpo", "from": "sft1", "beta": 0.1, "train": {"max_steps": 4}},
        "dpo2": {"kind": "dpo", "from": "sft", "beta": 0.2, "train": {"max_steps": 4}},
    }
    groups = seed_groups(stages)
    assert groups == [["sft", "sft1"], ["dpo", "dpo1"]]
    rows = [row("dpo", win_rate=0.6), row("dpo1", win_rate=0.8), row("dpo2", win_rate=0.1)]
    (found,) = over_seeds(rows, groups)
    assert (found["policies"], found["n"], found["win_rate"]) == (["dpo", "dpo1"], 2, pytest.approx(0.7))
    assert found["win_rate_sd"] == pytest.approx(math.sqrt(0.02))
    # Student's t with one degree of freedom reaches 12.7062 standard errors, 0.1 each: past the ends of a rate
    assert (found["win_rate_low"], found["win_rate_high"]) == (0.0, 1.0)
    assert t_interval([1.0, 2.0, 3.0])[2:] == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))


def test_no_score_is_drawn_beyond_what_the_judge_can_give(run):
    assert run.bounds("rubric") == (0.0, 1.0)
    assert run.bounds("reward") == run.bounds("unknown") == (-math.inf, math.inf)
    assert frontier._ends(0.98, 0.05, (0.0, 1.0)) == (pytest.approx(0.882), 1.0)
    line = [frontier.Point("a", 0.0, 0.0), frontier.Point("b", 4.0, 0.2)]
    fit = frontier.Fit(frontier.BEST_OF_N, 0.2, 0.0)
    assert max(v for _, v in frontier._curve(fit, line, (-0.7, 0.3))) <= 0.3
    assert max(v for _, v in frontier._curve(fit, line, (-math.inf, math.inf))) > 0.4


def test_what_the_doctor_did_not_see_is_said(tmp_path: Path):
    folder = build_run(tmp_path / "run")
    found = json.loads((folder / "doctor.json").read_text())
    stages = {each["stage"] for each in found["findings"]}
    for each in found["findings"]:
        each["adapter"] = "0" * 64
    (folder / "doctor.json").write_text(json.dumps(found))
    run = read_run(folder)
    # there are no weights in the folders: what lies there is not what was looked at
    assert set(doctor.stale(run)) == stages & {"sft", "reward", "dpo", "ppo"}
    kind = stage_kind("dpo")
    late = StageRecord("late", "dpo", "done", folder, (("sft", False),), record=kind)
    said = doctor.gaps(replace(run, stages=(*run.stages, late)))
    assert "late" in said and "not examined" in said and "trained again since" in said
    assert doctor.gaps(replace(run, doctor=None)) == ""


def test_length_that_separates_the_pairs_is_said_with_its_remedy():
    row = {"stage": "reward", "accuracy": 0.9, "longer_wins": 0.95, "shorter_wins": 0.05}
    assert "length alone separates these pairs (longer wins: 0.95)" in length_words(row)
    assert length_words(row | {"longer_wins": 0.7, "shorter_wins": 0.3}) == ""
    assert "shorter wins" in length_words(row | {"longer_wins": 0.02, "shorter_wins": 0.98})
