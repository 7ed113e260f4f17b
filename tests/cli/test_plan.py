"""`preftune plan`: what it says of a recipe, on which device, and how much of it stays true when the recipe runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from preftune.cli.main import app
from preftune.cli.process import exit_code_of
from preftune.models.tiny import RandomSpec


def plan(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[dict[str, Any]], str]:
    words = ["plan", *(str(each) for each in arguments), "--json"]
    code = exit_code_of(lambda: app(words, standalone_mode=False))
    printed = capsys.readouterr()
    return code, [json.loads(line) for line in printed.out.splitlines()], printed.err


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    demo = {"prompt": "Is it late?", "completion": "Yes, it is."}
    pair = {"prompt": "Is it late?", "chosen": "Yes, it is.", "rejected": "No."}
    (tmp_path / "demos.jsonl").write_text("".join(json.dumps(demo | {"prompt": f"{i}?"}) + "\n" for i in range(8)))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair | {"prompt": f"{i}?"}) + "\n" for i in range(8)))
    values = {
        "name": "p",
        "model": {"base": "random:llama", "dtype": "float32"},
        "lora": {"r": 4},
        "data": {"demos": {"path": "demos.jsonl"}, "pairs": {"path": "pairs.jsonl"}},
        "stages": {
            "sft": {"data": "demos", "train": {"max_steps": 2, "per_device_train_batch_size": 2}},
            "dpo": {"from": "sft", "data": "pairs", "train": {"max_steps": 2, "per_device_train_batch_size": 2}},
        },
    }
    file = tmp_path / "p.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def large(tmp_path: Path) -> Path:
    """The config of a 70B model, and nothing else."""
    config = RandomSpec.read("random:llama-3.1-8b").config()
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    config.update(shape)
    config.save_pretrained(tmp_path / "large")
    return tmp_path / "large"


def test_a_plan_says_memory_by_phase_and_part_and_time(capsys, recipe: Path):
    code, rows, _ = plan(capsys, recipe, "--seconds", "0.5")
    assert code == 0 and [row["stage"] for row in rows] == ["sft", "dpo"]
    sft, dpo = rows
    assert (sft["steps"], sft["rows"], sft["from"]) == (2, 8, "base")
    for row in rows:
        assert set(row["memory"]) == {"cpu", "gpu"}
        parts = row["memory"]["cpu"]["training step"]
        assert {"weights", "adapters", "optimiser", "activations", "libraries"} <= parts.keys()
        assert row["memory GB"] == pytest.approx(sum(parts.values()) / 1e9)
        assert "libraries" not in row["memory"]["gpu"]["training step"]
        assert row["seconds"] > 0
        assert row["fits"] == {"24": True, "48": True, "80": True} and row["with"] == {}
    assert dpo["memory"]["cpu"]["training step"]["adapters"] == 2 * sft["memory"]["cpu"]["training step"]["adapters"]


def test_a_large_model_is_planned_from_its_config_alone(capsys, recipe: Path, tmp_path: Path):
    words = (recipe, f"model.base={large(tmp_path)}", "model.dtype=bfloat16", "--card", "RTX 4090")
    code, rows, said = plan(capsys, *words)
    assert code == 0
    assert "70554 M parameters, 141.11 GB in bfloat16" in said
    assert all(row["memory GB"] > 140 and not any(row["fits"].values()) for row in rows)
    # the one change that would help: on 24 GB there is none
    assert rows[0]["with"]["24"] is None and "model.quantization=4bit" in rows[0]["with"]["48"]
    assert all(row["seconds"] > 0 for row in rows)


def test_tokens_that_are_added_are_planned(capsys, recipe: Path):
    before = plan(capsys, recipe)[1]
    values = yaml.safe_load(recipe.read_text())
    values["model"]["add_tokens"] = ["<|think|>"]
    recipe.write_text(yaml.safe_dump(values, sort_keys=False))
    code, rows, err = plan(capsys, recipe)
    assert code == 0, err
    adapters = [row["memory"]["cpu"]["training step"]["adapters"] for each in (before, rows) for row in each]
    assert adapters[2] - adapters[0] == 4 * 128 and adapters[3] - adapters[1] == 2 * 4 * 128


def test_the_launch_configuration_counts(capsys, recipe: Path, tmp_path: Path):
    values = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "machine_rank": 0, "mixed_precision": "no"}
    ddp, fsdp = tmp_path / "ddp.yaml", tmp_path / "fsdp.yaml"
    ddp.write_text(yaml.safe_dump({**values, "distributed_type": "MULTI_GPU", "num_processes": 2}))
    fsdp.write_text(yaml.safe_dump({**values, "distributed_type": "FSDP", "num_processes": 4, "fsdp_config": {}}))
    words = (recipe, "stages.sft.train={num_train_epochs: 2, per_device_train_batch_size: 2}", "--seconds", "0")
    _, alone, _ = plan(capsys, *words)
    _, two, _ = plan(capsys, *words, "--launch", ddp)
    _, four, _ = plan(capsys, *words, "--launch", fsdp)
    assert [each[0]["steps"] for each in (alone, two, four)] == [8, 4, 2]
    assert two[0]["devices"] == 2
    weights = [each[0]["memory"]["gpu"]["training step"]["weights"] for each in (alone, two, four)]
    assert weights[0] == weights[1] > weights[2]
    code, _, said = plan(capsys, *words, "--launch", tmp_path / "none.yaml")
    assert code == 2 and "no file" in said


def test_what_cannot_be_reached_is_said_and_taken_as_long_as_it_may_be(capsys, recipe: Path, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: 1 / 0)
    words = (recipe, "data.demos={path: nobody/nothing, max_length: 300}", "--seconds", "0")
    code, rows, _ = plan(capsys, *words)
    assert code == 0
    assert (rows[0]["rows"], rows[0]["longest"], rows[0]["steps"]) == (None, 300, 2)
    exit_code_of(lambda: app(["plan", *map(str, words)], standalone_mode=False))
    assert "nobody/nothing cannot be reached: its rows are taken to be 300 tokens long" in capsys.readouterr().out
    code, _, said = plan(capsys, recipe, "data.demos.path=gone.jsonl", "--seconds", "0")
    assert code == 2 and "gone.jsonl" in said


def test_a_card_that_an_evaluation_or_the_optimiser_fills_is_helped_by_its_own_change(recipe: Path):
    from preftune.cli.plan import _changes
    from preftune.models.base import Base
    from preftune.recipes.build import stage_job
    from preftune.recipes.load import load_recipe

    def words(*overrides: str) -> list[str]:
        loaded = load_recipe(str(recipe), overrides)
        job = stage_job(loaded, "sft", Base("x", Path(), None, ""), Path("r"), Path("r/sft"))
        return [said for said, _ in _changes(job)]

    plain, held = words(), words("data.demos.held_out=0.25", "stages.sft.train.optim=sgd")
    paged, one = "stages.sft.train.optim=paged_adamw_32bit", "stages.sft.train.per_device_eval_batch_size=1"
    assert paged in plain and one not in plain
    assert one in held and paged not in held
    # what changes a result comes last
    assert plain[-1] == held[-1] == "model.quantization=4bit"


def test_a_named_card_has_its_own_column_and_says_what_was_assumed(capsys, recipe: Path):
    code, rows, said = plan(capsys, recipe, "--card", "l40s")
    assert code == 0 and set(rows[0]["fits"]) == {"24", "48", "80", "l40s"}
    assert "35% are taken to be reached in training" in said and "no card was measured" in said
    _, _, said = plan(capsys, recipe, "stages.sft.train.optim=paged_adamw_8bit", "--card", "l40s")
    assert "of optimiser are paged" in said


def test_people_get_tables(capsys, recipe: Path):
    words = ["plan", str(recipe), "stages.dpo.train.per_device_train_batch_size=1", "--seconds", "0"]
    assert exit_code_of(lambda: app(words, standalone_mode=False)) == 0
    said = capsys.readouterr().out
    assert "1 M parameters" in said and "on 24 GB" in said and "training step" in said


def test_an_unknown_card_is_refused(capsys, recipe: Path):
    code, _, said = plan(capsys, recipe, "--card", "rtx-409")
    assert code == 2 and "did you mean 'rtx-4090'" in said
