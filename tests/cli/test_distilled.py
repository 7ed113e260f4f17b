"""Distillation in a recipe: a teacher of the chain, one beside the base; checked, trained, reported, cached."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from preftune.models.loading import resolve_base
from preftune.models.tiny import byte_tokenizer

from .conftest import Shell

RECIPE = """\
name: taught
model: {base: "random:llama", dtype: float32}
lora: {r: 4, alpha: 8}
data:
  demos:   {path: demos.jsonl}
  prompts: {path: prompts.jsonl}
stages:
  sft:     {from: base, data: demos, train: {max_steps: 2, per_device_train_batch_size: 4}}
  expert:  {kind: sft, from: base, data: demos, train: {max_steps: 6, learning_rate: 1e-2}}
  distill: {from: sft, data: prompts, teacher: {stage: expert}, rollout_batch_size: 4, total_episodes: 8,
            max_new_tokens: 8, num_mini_batches: 2}
  beside:  {kind: distill, from: sft, data: demos, teacher: "random:llama?seed=7", lmbda: 0.5, beta: 0.5,
            rollout_batch_size: 4, total_episodes: 8, max_new_tokens: 8}
eval:
  prompts: {path: prompts.jsonl, limit: 4}
  policies: [sft, expert, distill, beside]
  reference: sft
  max_new_tokens: 6
  judges: [{kind: rubric, checks: [{kind: max_words, value: 2}]}]
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    demos = [{"prompt": f"Question {i}?", "completion": f"Good {i}."} for i in range(8)]
    (tmp_path / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in demos))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in demos))
    (tmp_path / "taught.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "taught.yaml"


def lineage_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "lineage.json").read_text())


@pytest.mark.checklist("T10")
def test_t10_a_chain_with_teachers(recipe: Path, shell: Shell) -> None:
    run = recipe.parent / "runs" / "taught"
    code, _, err = shell("run", recipe)
    assert code == 0, err
    expert, of_chain, beside = (lineage_of(run / name) for name in ("expert", "distill", "beside"))
    assert [each["stage"] for each in of_chain["parents"]] == ["sft", "expert"]
    assert of_chain["config"]["teacher"] == of_chain["parents"][1] and of_chain["kind"] == "distill"
    teacher = resolve_base("random:llama?seed=7")
    assert beside["config"]["teacher"] == {
        "model": "random:llama?seed=7", "revision": None, "sha256": teacher.sha256,
    }  # fmt: skip
    assert [each["stage"] for each in beside["parents"]] == ["sft"] and teacher.sha256 != expert["base"]["sha256"]
    log = [json.loads(line) for line in (run / "beside" / "log.jsonl").read_text().splitlines()]
    # of two iterations the first takes the data's replies
    assert ["rollout/sampler_kl" in each for each in log if "loss" in each] == [False, True]
    metrics = json.loads((run / "distill" / "metrics.json").read_text())
    assert metrics["episodes"] == 8 and metrics["loss"] > 0 and "objective/scores" not in metrics
    assert "Divergence from the teacher" in (run / "report.html").read_text()
    for command in (("doctor", run), ("status", run), ("plan", recipe), ("validate", recipe)):
        code, _, err = shell(*command)
        assert code in (0, 1) and "Traceback" not in err, command
    # nothing runs again, and a teacher that has changed makes its pupil run anew
    times = {name: (run / name / "adapter_model.safetensors").stat().st_mtime_ns for name in ("distill", "beside")}
    assert shell("run", recipe)[0] == 0
    assert times == {name: (run / name / "adapter_model.safetensors").stat().st_mtime_ns for name in times}
    assert shell("run", recipe, "--until", "distill", "stages.expert.train.max_steps=7")[0] == 0
    after = lineage_of(run / "distill")
    assert after["config"]["teacher"]["sha256"] != of_chain["config"]["teacher"]["sha256"]
    assert (run / "beside" / "adapter_model.safetensors").stat().st_mtime_ns == times["beside"]
    changed = ("stages.expert.train.max_steps=7", "stages.beside.teacher=random:llama?seed=8")
    assert shell("run", recipe, "--until", "beside", *changed)[0] == 0
    assert lineage_of(run / "beside")["config"]["teacher"]["model"] == "random:llama?seed=8"


def other_vocabulary(folder: Path) -> Path:
    """A model like the base, but for eight tokens more."""
    base = resolve_base("random:llama")
    model = AutoModelForCausalLM.from_pretrained(base.path)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.checklist("T6")
def test_t06_a_teacher_with_another_vocabulary_is_refused_before_anything_trains(
    recipe: Path, shell: Shell, tmp_path: Path
) -> None:
    folder = other_vocabulary(tmp_path / "wide")
    for command in ("run", "validate"):
        code, _, err = shell(command, recipe, f"stages.beside.teacher={folder}")
        line = err.strip().splitlines()[-1]
        assert code == 2 and "stages.beside.teacher: its vocabulary has" in line and "the student's has" in line, err
    assert not (tmp_path / "runs" / "taught" / "sft").exists()


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("stages.distill.teacher=null", "distill lacks 'teacher'"),
        ("stages.distill.teacher=sft", "'sft' is a stage of the recipe, expected a hub id or a folder"),
        ("stages.distill.teacher={stage: nobody}", "no stage 'nobody', expected one that speaks"),
        ("stages.distill.teacher={stage: distill}", "a circle: distill -> distill"),
        ("stages.distill.teacher={stage: sft, model: x}", "names stage and model, expected one of"),
        ("stages.distill.teacher={folder: x}", "'folder' is no key of stages.distill.teacher; did you mean 'adapter'?"),
        ("stages.distill.teacher={adapter: x}", "no adapter in"),
        ("stages.distill.teacher=./nowhere", "'./nowhere' is no folder"),
        ("stages.distill.lmbda=2", "expected"),
        ("stages.distill.reward=sft", "'reward' is no key of stages.distill"),
        ("stages.distill.teacher_model=x", "write teacher: a hub id, a folder or {stage: NAME}"),
    ],
)
def test_what_is_wrong_with_a_teacher_is_said(recipe: Path, shell: Shell, said: str, expected: str) -> None:
    code, _, err = shell("validate", recipe, said)
    assert code == 2 and expected in err, err
    assert "Traceback" not in err


@pytest.mark.parametrize("kind", ["distillation", "gkd", "minillm", "kd"])
def test_names_of_distillation_are_answered(recipe: Path, shell: Shell, kind: str) -> None:
    code, _, err = shell("validate", recipe, f"stages.distill.kind={kind}")
    assert code == 2 and "write kind: distill" in err


def test_a_folder_with_an_adapter_teaches_on_the_students_base(recipe: Path, shell: Shell, tmp_path: Path) -> None:
    assert shell("sft", recipe, "--stage", "sft")[0] == 0
    folder = tmp_path / "runs" / "taught" / "sft"
    changed = (f"stages.distill.teacher={folder}", "stages.distill.from=base")
    code, _, err = shell("distill", recipe, "--stage", "distill", *changed)
    assert code == 0, err
    found = lineage_of(tmp_path / "runs" / "taught" / "distill")
    assert found["config"]["teacher"]["sha256"] == found["parents"][0]["sha256"]
    assert found["parents"][0]["stage"] == "sft"


def test_a_plan_counts_a_teacher_beside_the_base_and_none_on_it(recipe: Path, shell: Shell) -> None:
    code, out, err = shell("plan", recipe, "--seconds", "0", "--json")
    assert code == 0, err
    rows = {row["stage"]: row for row in map(json.loads, filter(lambda line: line.startswith("{"), out.splitlines()))}
    for device, phases in rows["beside"]["memory"].items():
        weights = phases["update"]["weights"]
        # the same shape: as many bytes again, in every phase
        assert all(parts["teacher"] == weights for parts in phases.values()), device
        assert not any("teacher" in parts for parts in rows["distill"]["memory"][device].values())
        assert {"rollout", "update", "teacher"} <= phases.keys()
    assert rows["distill"]["PFLOP"] > 0 and rows["distill"]["steps"] == 4 and rows["beside"]["steps"] == 2
