"""What a recipe says of a stage that trains all weights (`full: true`), and what is refused before anything trains."""

from pathlib import Path
from typing import Any

import pytest

from preftune.errors import UserError
from preftune.recipes.graph import policies, reward_models, unused_stages
from preftune.recipes.load import load_recipe

RECIPE = """\
name: t
model: {base: "random:llama", dtype: float32}
lora: {r: 4, alpha: 8}
data:
  demos: {path: demos.jsonl}
  pairs: {path: pairs.jsonl}
stages:
"""


def recipe(tmp_path: Path, stages: str, more: str = "", **values: Any) -> Any:
    text = RECIPE + "".join(f"  {line}\n" for line in stages.splitlines()) + more
    (tmp_path / "t.yaml").write_text(text)
    return load_recipe(tmp_path / "t.yaml", [f"{name.replace('__', '.')}={value}" for name, value in values.items()])


REFUSED = {
    "a child": ("sft: {full: true, data: demos}\ndpo: {data: pairs}", "", "model.base: RUN/sft"),
    "a full child": (
        "sft: {data: demos}\ndpo: {full: true, data: pairs, from: sft}",
        "",
        "a whole model starts from the base",
    ),
    "ppo": (
        "sft: {data: demos}\nreward: {data: pairs}\nppo: {full: true, data: pairs, reward: reward}",
        "",
        "all weights train in stages of kind sft, reward, dpo and kto",
    ),
    "a sampling stage": (
        "sft: {data: demos}\nreward: {data: pairs}\npick: {kind: sample, full: true, data: pairs, reward: reward}",
        "",
        "trains nothing",
    ),
    "its own lora": ("sft: {full: true, data: demos, lora: {r: 8}}", "", "has no effect"),
    "its reward": (
        "sft: {data: demos}\nreward: {full: true, data: pairs, from: base}\nppo: {data: pairs, reward: reward}",
        "",
        "which makes a model of its own",
    ),
    "evaluated": (
        "sft: {full: true, data: demos}",
        "eval: {prompts: {path: pairs.jsonl}, policies: [sft]}\n",
        "which makes a model of its own",
    ),
    "a judge": (
        "sft: {data: demos}\nreward: {full: true, data: pairs, from: base}",
        "eval: {prompts: {path: pairs.jsonl}, policies: [sft], judges: [{kind: reward, stage: reward}]}\n",
        "which makes a model of its own",
    ),
    "a teacher": (
        "sft: {full: true, data: demos}\ndistill: {data: pairs, from: base, teacher: {stage: sft}}",
        "",
        "which makes a model of its own",
    ),
}


@pytest.mark.checklist("F4")
@pytest.mark.parametrize("case", REFUSED)
def test_f04_what_cannot_be_done_beside_adapters_is_refused(tmp_path: Path, case: str) -> None:
    stages, more, said = REFUSED[case]
    with pytest.raises(UserError, match=said):
        recipe(tmp_path, stages, more)


@pytest.mark.checklist("F4")
def test_f04_packed_weights_do_not_train(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"packed by model\.quantization"):
        recipe(tmp_path, "sft: {full: true, data: demos}", model__quantization="4bit")


def test_it_is_a_policy_of_no_run(tmp_path: Path) -> None:
    found = recipe(tmp_path, "sft: {full: true, data: demos}\nreward: {full: true, data: pairs, from: base}")
    assert policies(found) == [] and reward_models(found) == [] and unused_stages(found) == []


@pytest.mark.parametrize(("kind", "rate"), [("sft", 2e-5), ("reward", 1e-5), ("dpo", 1e-6), ("kto", 1e-6)])
def test_its_learning_rate_is_that_of_all_weights(tmp_path: Path, kind: str, rate: float) -> None:
    data = "demos" if kind == "sft" else "pairs"
    for full in (True, False):
        found = recipe(tmp_path, f"s: {{kind: {kind}, full: {str(full).lower()}, data: {data}, from: base}}")
        assert (found.stages["s"].record.defaults["learning_rate"] == rate) == full
