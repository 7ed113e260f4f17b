"""A training method outside the package: one file with a record and a run function, and nothing else touched."""

import json
from pathlib import Path

import pytest
import yaml

from preftune.cli import main as cli

METHOD = '''
"""Unlikelihood on rejected replies: a throw-away method, on TRL's SFT trainer."""

from typing import Annotated

from annotated_types import Ge

from preftune.stages.kinds import Panel, Parameter, StageKind


def run(job):
    import torch
    from trl import SFTConfig

    from preftune.data.encode import encode_demos
    from preftune.stages.options import stage_config
    from preftune.stages.run import PolicyStage, load_data, open_adapters, open_tokenizer, train_policy
    from preftune.stages.sft import SFTStageTrainer
    from preftune.stages.trainers import stage_callbacks

    class Trainer(SFTStageTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            self._metrics["train"]["twice"].append(2 * loss.item())
            return loss * strength

    strength = job.method.get("strength", KIND.parameter("strength").default)
    tokenizer = open_tokenizer(job)
    data = load_data(job, encode_demos, tokenizer)
    args = stage_config(SFTConfig, job, held_out=False, max_length=job.data.max_length)
    adapters = open_adapters(job, tokenizer)
    trainer = Trainer(
        model=adapters.model, args=args, train_dataset=data.train, processing_class=tokenizer,
        callbacks=stage_callbacks(job),
    )
    return train_policy(job, PolicyStage(trainer, adapters, tokenizer, data))


KIND = StageKind(
    name="scaled",
    title="The scaled stage",
    rows="demo",
    config="trl:SFTConfig",
    run=run,
    parameters=(Parameter("strength", Annotated[float, Ge(0)], 0.5, "Factor of the loss.", of_config=False),),
    passes=7,
    panels=(Panel("Twice the loss", "nats per token", ("twice",)),),
)
'''

RECIPE = {
    "name": "own",
    "model": {"base": "random:llama", "dtype": "float32"},
    "lora": {"r": 2, "alpha": 4},
    "data": {
        "demos": {"path": "quickstart/demos.jsonl", "limit": 6, "max_length": 512, "overflow": "truncate"},
        "prompts": {"path": "quickstart/eval_prompts.jsonl", "limit": 2},
    },
    "stages": {
        "mine": {
            "kind": "my_method.py:KIND", "data": "demos", "strength": 0.25,
            "train": {"max_steps": 2, "per_device_train_batch_size": 2},
        },
    },
    "eval": {"prompts": "prompts", "reference": "base", "max_new_tokens": 4, "kl": False},
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    folder = tmp_path / "methods"
    folder.mkdir()
    (folder / "my_method.py").write_text(METHOD)
    file = folder / "own.yaml"
    file.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return file


def call(*arguments: object) -> int:
    return cli.exit_code_of(lambda: cli.app([str(each) for each in arguments], standalone_mode=False))


def test_a_method_in_a_file_of_its_own_is_validated_planned_trained_and_reported(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    run = tmp_path / "run"
    assert call("validate", recipe) == 0
    assert "nothing wrong found" in capsys.readouterr().out
    assert call("plan", recipe, "--json") == 0
    planned = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (planned["stage"], planned["steps"], planned["rows"]) == ("mine", 2, 6)
    assert call("run", recipe, "--output-dir", run) == 0
    lineage = json.loads((run / "mine" / "lineage.json").read_text())
    assert (lineage["kind"], lineage["config"]["method"]) == ("scaled", {"strength": 0.25})
    # the run's own recipe finds the method, wherever it is read from
    capsys.readouterr()
    assert call("run", run / "recipe.yaml", "--output-dir", run) == 0
    assert "mine: unchanged" in capsys.readouterr().out
    assert call("eval", "run", run) == 0
    assert call("report", run) == 0
    assert "Twice the loss" in (run / "report.html").read_text()
    assert call("doctor", run, "--samples", "2") in (0, 1)


def test_a_change_of_the_methods_code_runs_the_stage_again(recipe: Path, tmp_path: Path) -> None:
    from preftune.cli.keys import Keys
    from preftune.models.loading import resolve_base
    from preftune.recipes.load import load_recipe

    def parts() -> dict[str, object]:
        loaded = load_recipe(recipe)
        return Keys(loaded, resolve_base("random:llama"), tmp_path).stage("mine", {})

    before = parts()
    (recipe.parent / "my_method.py").write_text(METHOD + "\n# a word more\n")
    after = parts()
    assert {name for name in before if before[name] != after[name]} == {"code of scaled"}


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("stages.mine.strength=-1", ["stages.mine.strength", "at least 0"]),
        ("stages.mine.strenth=1", ["'strenth' is no key of stages.mine", "did you mean 'strength'?"]),
        ("stages.mine.kind=my_methd.py:KIND", ["stages.mine.kind", "my_methd.py cannot be imported"]),
        ("stages.mine.train.strength=1", ["said twice"]),
    ],
)
def test_what_is_wrong_with_it_is_said_before_anything_trains(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, parts: list[str]
) -> None:
    assert call("run", recipe, override, "--output-dir", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    for part in parts:
        assert part in said
    assert not (tmp_path / "run").exists()
