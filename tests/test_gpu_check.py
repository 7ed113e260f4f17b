"""What `make gpu-check` does with its parts, without a card: it keeps what it has, goes on where it was cut off, and
says what is wrong. The parts themselves are rehearsed in `device/test_gpu_check.py`."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from preftune.benchmarks.gpu import runner, smoke, wheels
from preftune.benchmarks.gpu.card_tests import outcome
from preftune.benchmarks.gpu.runner import Findings
from preftune.benchmarks.gpu.summary import tables, wrong
from preftune.benchmarks.gpu.works import FULL, SHORT, Work, works
from preftune.recipes.load import load_recipe

CARD = {"device": "a card", "versions": {"torch": "1"}, "preftune": "2"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """What processes were begun for; a work's options hold their program."""
    found: list[tuple[str, list[str]]] = []

    def command(work: Work, names: list[str]) -> list[str]:
        found.append((work.about, list(names)))
        return [sys.executable, "-S", "-c", work.options["program"], *names]

    monkeypatch.setattr(runner, "command", command)
    monkeypatch.setattr(runner, "LEAST", 0.5)
    return found


def said(*pairs: tuple[str, dict[str, Any]], then: str = "") -> str:
    """A program that writes these figures, and does something else after them."""
    lines = "".join(f"print({json.dumps(json.dumps(pair))}, flush=True)\n" for pair in pairs)
    return f"import sys, time\n{lines}{then}"


def work(about: str, program: str, *names: str, seconds: float = 20) -> Work:
    return Work("none", about, names, seconds, {"program": program})


def test_what_is_cut_off_leaves_what_it_had_and_is_gone_on_with(tmp_path: Path, asked: list) -> None:
    findings = Findings(tmp_path / "gpu.json", CARD)
    slow = work("a", said(("x", {"n": 1}), then="time.sleep(60)"), "x", "y", seconds=1)
    after = work("b", said(("z", {"n": 3})), "z")
    assert runner.run([slow, after], findings, None) == [slow]
    kept = json.loads(findings.file.read_text())
    assert kept["found"] == {"a: x": {"n": 1}, "b: z": {"n": 3}}
    assert kept["failed"]["a"].startswith("cut off after 1 s without y")
    again = Findings.read(findings.file, CARD)
    quick = work("a", said(("y", {"n": 2})), "x", "y")
    assert runner.run([quick, after], again, None) == []
    assert asked == [("a", ["x", "y"]), ("b", ["z"]), ("a", ["y"])]
    assert json.loads(findings.file.read_text())["failed"] == {}


def test_what_fails_is_said_and_the_next_is_done(tmp_path: Path, asked: list) -> None:
    findings = Findings(tmp_path / "gpu.json", CARD)
    bad = work("a", said(then="sys.exit('it would not')"), "x")
    assert runner.run([bad, work("b", said(("z", {})), "z")], findings, None) == [bad]
    assert findings.failed == {"a: x": "ended with exit code 1 without x; it said: it would not"}
    assert findings.found == {"b: z": {}}


def test_no_work_is_begun_for_which_no_time_is_left(tmp_path: Path, asked: list) -> None:
    findings = Findings(tmp_path / "gpu.json", CARD)
    found = [work("a", said(("x", {}), then="time.sleep(1)"), "x"), work("b", said(("z", {})), "z")]
    assert runner.run(found, findings, 1.2) == found[1:]
    assert [about for about, _ in asked] == ["a"]
    assert findings.failed == {}


def test_figures_of_another_card_or_version_are_not_gone_on_with(tmp_path: Path) -> None:
    findings = Findings(tmp_path / "gpu.json", CARD)
    findings.keep("a: x", {"n": 1})
    assert Findings.read(findings.file, CARD).found == {"a: x": {"n": 1}}
    for name in CARD:
        assert Findings.read(findings.file, {**CARD, name: "other"}).found == {}
    beside = Findings.read(tmp_path / "out" / "gpu.json", CARD, beside=findings.file)
    assert beside.found == {"a: x": {"n": 1}} and beside.file == tmp_path / "out" / "gpu.json"


def test_works_have_keys_of_their_own_and_the_full_form_has_all_of_the_short_ones() -> None:
    short, full = works(SHORT), works(FULL, full=True)
    for each in (short, full):
        keys = [key for work in each for key in work.keys]
        assert len(keys) == len({*keys})
    assert {key for work in short for key in work.keys} <= {key for work in full for key in work.keys}
    assert [work.module for work in short][:4] == ["ceilings", "attention", "card_tests", "smoke"]


def test_what_has_a_right_answer_is_held_against_it() -> None:
    found = {
        "tests: decoding": {"passed": ["a"], "failed": {"b": "no"}, "skipped": {}},
        "smoke chain: against the CPU": {"differ": {"sft.loss": [1.0, 2.0]}, "missing": ["dpo.loss"]},
        "attention: gemma": {"runs": False, "why_not": "out of shared memory"},
        "attention: llama": {"runs": True},
    }
    assert wrong(found) == [
        "b: no",
        "sft.loss: 1.0 on a CPU, 2.0 here",
        "dpo.loss: not there",
        "attention: gemma: out of shared memory",
    ]
    assert wrong({"tests: decoding": {"passed": ["a"], "failed": {}, "skipped": {}}}) == []


def test_tables_name_the_best_peer() -> None:
    def rate(tokens: float) -> dict[str, float]:
        return {"tokens_per_second": tokens}

    found = {
        "card: copy": {"gigabytes_per_second": 2.0},
        "q: made": {"bytes": 10**8},
        "q, rollout, ours: 64 rows": rate(300),
        "q, rollout, generate dynamic: 64 rows": rate(100),
        "q, rollout, generate static: 64 rows": rate(150),
        "q, rollout, ours: 1 rows": rate(30),
        "q, dpo: ours": {"examples_per_second": 8.0, "peak_memory_bytes": 5e9, "attention": "sdpa"},
        "q, dpo: trl tuned": {"examples_per_second": 2.0, "peak_memory_bytes": 9e9, "attention": "flash"},
        "q, chain: memory of sft": {"planned_bytes": 11, "measured_bytes": 10, "planned / measured": 1.1},
        "q, chain: ppo by phase": {"rollout": {"seconds": 1.0, "share": 1.0, "busy": 0.5}},
    }
    text = tables(found)
    assert "rollout of 64 rows, tokens/s: ours 300, generate dynamic 100, generate static 150; 2.00 x" in text
    assert "2.00 x generate static; weights read at a copy's rate 1280\n" in text
    assert "rollout of 1 rows, tokens/s: ours 30; weights read at a copy's rate 20\n" in text
    assert "trl tuned 2.0 with 9.0 GB (flash); 4.00 x trl tuned" in text
    assert "rollout 1.00 s (100%, busy 50%)" in text and "planned 0.00 (1.10)" in text


def test_a_report_of_pytest_is_read() -> None:
    case = '<testcase name="{}" time="1.5">{}</testcase>'
    cases = case.format("a", ""), case.format("b", '<failure message="no">x</failure>')
    skipped = case.format("c", '<skipped message="no card"/>')
    found = outcome(f"<testsuites><testsuite>{''.join(cases)}{skipped}</testsuite></testsuites>")
    assert found["passed"] == ["a"] and found["failed"] == {"b": "no"} and found["skipped"] == {"c": "no card"}


def test_the_chains_stored_numbers_are_of_its_stages() -> None:
    stored, stages = smoke.stored(), load_recipe("smoke", list(smoke.SAME)).stages
    assert {*stages, "eval"} == {place.partition(".")[0].partition("[")[0] for place in stored}
    assert {*smoke.TRAINED, *smoke.ON_POLICY} == {*stages}
    worst = {place: number + 3 * smoke.TOLERANCE * (1 + abs(number)) for place, number in stored.items()}
    assert smoke.differences(stored, stored, smoke.TOLERANCE) == {}
    assert len(smoke.differences(stored, worst, smoke.TOLERANCE)) == len(stored)


def test_wheels_are_what_is_needed_without_what_is_there() -> None:
    found = wheels.needed(wheels.project(), wheels.THERE)
    assert {"trl", "peft", "transformers", "datasets", "accelerate", "tokenizers", "pydantic-core", "dill"} <= {*found}
    assert not {"torch", "sympy", "numpy", "scipy", "pandas", "pyarrow", "pytest"} & {*found}
    pinned = (wheels.ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert {*found} <= {wheels.canonical(each) for each in pinned}


def test_bounds_that_are_not_met_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "version", {"torch": "2.11.0+cu130", "peft": "0.22.0", "numpy": "2.0"}.__getitem__)
    assert wheels.problems(["torch>=2.8", "numpy>=2.0.0"]) == []
    assert wheels.problems(["peft>=0.21,<0.22", "torch>=2.13"]) == [
        "peft is 0.22.0, expected peft>=0.21,<0.22",
        "torch is 2.11.0+cu130, expected torch>=2.13",
    ]


def test_what_this_environment_has_is_within_its_bounds() -> None:
    assert wheels.problems(wheels.project()) == []
