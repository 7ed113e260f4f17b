"""One changed stage redraws one policy: what an evaluation keeps, and when it is not used."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from preftune.data.spec import DataSpec, SourceSpec
from preftune.eval import workbench
from preftune.eval.commands import eval_kl
from preftune.eval.run import run_eval
from preftune.eval.spec import EvalSpec
from preftune.files import EVAL_CACHE
from preftune.models.adapters import AdapterSet
from preftune.models.loading import load_model, resolve_base
from preftune.models.lora import LoraSpec

from .conftest import shake

RUBRIC = {"kind": "rubric", "checks": [{"kind": "max_words", "value": 2}]}


@pytest.fixture
def spec(tmp_path: Path) -> EvalSpec:
    """Two policies and their base on three prompts, which have nothing in common."""
    base = resolve_base("random:llama")
    adapters = AdapterSet.create(load_model(base), base, LoraSpec(r=2, alpha=4), parent=None)
    for seed, name in enumerate(("sft", "dpo", "other")):
        shake(adapters, "default", seed=seed)
        adapters.save("default", tmp_path / name)
    rows = [{"prompt": f"question {place}"} for place in range(3)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return EvalSpec(
        base=base,
        policies={"base": None, "sft": tmp_path / "sft", "dpo": tmp_path / "dpo"},
        reference="sft",
        prompts=DataSpec((SourceSpec("prompts.jsonl"),)),
        folders=(tmp_path,),
        judges=(RUBRIC,),
        max_new_tokens=6,
        output_dir=tmp_path,
    )


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was drawn, and what KL was measured."""
    done: list[str] = []
    draw, measure = workbench.generate_samples, workbench.sequence_kls

    def drawing(adapters: Any, role: Any, policy: str, *rest: Any, **more: Any) -> Any:
        done.append(policy)
        return draw(adapters, role, policy, *rest, **more)

    def measuring(adapters: Any, policy: Any, *rest: Any, **more: Any) -> Any:
        done.append(f"KL of {policy}")
        return measure(adapters, policy, *rest, **more)

    monkeypatch.setattr(workbench, "generate_samples", drawing)
    monkeypatch.setattr(workbench, "sequence_kls", measuring)
    return done


def run(spec: EvalSpec, worked: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    worked.clear()
    rows = run_eval(spec)
    return rows, list(worked)


def test_a_changed_adapter_redraws_its_policy_alone(spec, worked, tmp_path):
    first, done = run(spec, worked)
    assert done == ["base", "sft", "dpo", "KL of None", "KL of policy_dpo"]
    again, done = run(spec, worked)
    assert (again, done) == (first, [])
    shutil.rmtree(tmp_path / "dpo")
    shutil.copytree(tmp_path / "other", tmp_path / "dpo")
    changed, done = run(spec, worked)
    assert done == ["dpo", "KL of policy_dpo"]
    assert changed[:2] == first[:2] and changed[2] != first[2]
    # as drawn without anything kept
    shutil.rmtree(tmp_path / EVAL_CACHE)
    fresh, done = run(spec, worked)
    assert len(done) == 5
    assert fresh == changed
    # another reference: the replies stay, what they are held against is measured
    other, done = run(replace(spec, reference="base"), worked)
    assert done == ["KL of policy_sft", "KL of policy_dpo"]
    assert other[1]["kl"] > 0


@pytest.mark.parametrize("changes", [{"seed": 1}, {"temperature": 1.3}, {"max_new_tokens": 5}, {"packed": False}])
def test_other_settings_redraw_everything(spec, worked, changes):
    run(spec, worked)
    _, done = run(replace(spec, **changes), worked)
    assert [each for each in done if not each.startswith("KL")] == ["base", "sft", "dpo"]


def test_other_prompts_and_unreadable_files_redraw(spec, worked, tmp_path):
    run(spec, worked)
    files = sorted((tmp_path / EVAL_CACHE).iterdir())
    assert len(files) == 3
    for file, text in zip(
        files, ("", "{}", json.dumps({"tokens": [], "finished": [], "completions": []})), strict=True
    ):
        file.write_text(text)
    _, done = run(spec, worked)
    assert done[:3] == ["base", "sft", "dpo"]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "question 9"}) + "\n")
    _, done = run(spec, worked)
    assert done[:3] == ["base", "sft", "dpo"]
    # what no policy needs any more goes
    assert len(list((tmp_path / EVAL_CACHE).iterdir())) == 3


def test_samples_hold_the_ids_and_a_single_measurement_writes_nothing(spec, worked, tmp_path):
    eval_kl(spec)
    assert not (tmp_path / EVAL_CACHE).exists()
    run(spec, worked)
    lines = [json.loads(line) for line in (tmp_path / "eval" / "samples.jsonl").read_text().splitlines()]
    assert all(len(line["token_ids"]) == line["tokens"] > 0 for line in lines)
    worked.clear()
    eval_kl(spec)
    assert worked == []
