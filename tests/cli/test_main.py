"""The command itself: a user's mistake is one line and exit code 2."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from preftune.cli import main as cli

PAIR = {"prompt": "Hello?", "chosen": "Hi there.", "rejected": "Go away."}
RECIPE = """\
name: t
model: {base: "random:llama", dtype: float32}
lora: {r: 4, alpha: 8}
data:
  pairs: {path: pairs.jsonl}
stages:
  dpo: {data: pairs, train: {max_steps: 1, per_device_train_batch_size: 2}}
"""


def preftune(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command run in this process."""
    code = cli.run_command([str(each) for each in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "pairs.jsonl").write_text((json.dumps(PAIR) + "\n") * 4)
    file = tmp_path / "t.yaml"
    file.write_text(RECIPE)
    return file


def assert_refused(result: tuple[int, str, str], *parts: str) -> None:
    code, _, err = result
    assert code == 2, err
    assert len(err.strip().splitlines()) == 1, err
    for part in parts:
        assert part in err


def test_help_is_there_at_once():
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "preftune.cli.main", "--help"], check=True,
                          capture_output=True, text=True)  # fmt: skip
    assert time.monotonic() - began < 10
    assert "validate" in done.stdout
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "transformers", "trl", "peft", "datasets", "numpy", "scipy"}


def test_h_is_help_everywhere(capsys):
    for words in [], ["run"], ["status"], ["eval"], ["eval", "kl"], ["ppo"]:
        code, out, err = preftune(capsys, *words, "-h")
        assert code == 0 and "Usage:" in out and not err
        assert preftune(capsys, *words, "--help") == (0, out, "")


def complete(*words: str) -> list[str]:
    """What a shell's Tab offers behind these words; in a process, as it reads its words from the environment."""
    asked = {"_PREFTUNE_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    script = "import sys; sys.argv[0] = 'preftune'; from preftune.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", script], check=True, capture_output=True,
                          text=True, env={**os.environ, **asked})  # fmt: skip
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "transformers", "trl", "peft", "datasets", "numpy", "scipy"}
    return done.stdout.split()


def test_a_shell_completes_commands_and_options():
    assert complete("preftune", "st") == ["status"]
    assert complete("preftune", "eval", "per") == ["perplexity"]
    assert complete("preftune", "status", "--w") == ["--watch"]


def test_an_unknown_key_is_one_line(capsys, recipe: Path):
    recipe.write_text(RECIPE.replace("max_steps", "max_step"))
    assert_refused(
        preftune(capsys, "run", recipe, "--output-dir", recipe.parent / "r"), "stages.dpo.train.max_step", "max_steps"
    )
    recipe.write_text(RECIPE.replace("lora: {r", "lora: {rr"))
    assert_refused(preftune(capsys, "validate", recipe), "t.yaml:3", "lora.rr")


def test_a_missing_file_is_one_line(capsys, recipe: Path):
    (recipe.parent / "pairs.jsonl").unlink()
    assert_refused(preftune(capsys, "validate", recipe), "pairs.jsonl", "no such file")
    assert_refused(preftune(capsys, "run", recipe, "--output-dir", recipe.parent / "r"), "no such file")


def test_a_row_without_chosen_is_one_line(capsys, recipe: Path):
    with (recipe.parent / "pairs.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "Hello?", "rejected": "Go away."}) + "\n")
    assert_refused(preftune(capsys, "validate", recipe), "pairs.jsonl:5", "chosen")


def test_bad_options_are_exit_code_2(capsys, recipe: Path):
    assert_refused(preftune(capsys, "run", recipe, "--nonsense"), "--nonsense")
    assert_refused(preftune(capsys, "run"), "RECIPE")
    assert_refused(preftune(capsys, "run", recipe, "--only", "dpp"), "--only dpp", "dpo")
    assert_refused(preftune(capsys, "sft", recipe), "no stage of kind sft")
    assert_refused(preftune(capsys, "dpo", recipe, "--from-adapter", recipe.parent), "holds no adapter")
    assert_refused(preftune(capsys, "report", recipe.parent / "none"), "no such folder")
    assert_refused(preftune(capsys, "eval", "kl", recipe.parent), "no recipe.yaml")
    assert_refused(preftune(capsys, "merge", recipe.parent, recipe.parent / "out"), "holds no adapter")
    whole = recipe.parent / "whole"
    whole.mkdir()
    for name in ("lineage.json", "config.json"):
        (whole / name).write_text("{}")
    assert_refused(preftune(capsys, "merge", whole, recipe.parent / "out"), "holds a whole model", "model.base")
    assert_refused(preftune(capsys, "dpo", recipe, "--from-adapter", whole), "--from-adapter", "holds a whole model")


def test_anything_else_is_exit_code_1(capsys, monkeypatch):
    monkeypatch.setattr("preftune.cli.commands.list_recipes", lambda json: 1 / 0)
    code, _, err = preftune(capsys, "recipes")
    assert code == 1 and "Traceback" in err and "ZeroDivisionError" in err


def test_recipes_lists_them(capsys):
    code, out, _ = preftune(capsys, "recipes", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and {"quickstart", "smoke"} <= {row["name"] for row in rows}
    assert all(row["about"] for row in rows)


def test_validate_and_plan_say_what_they_find(capsys, recipe: Path):
    code, out, _ = preftune(capsys, "validate", recipe)
    assert code == 0 and "4 rows used of 4 read" in out and "nothing wrong found" in out
    code, out, _ = preftune(capsys, "plan", recipe, "--json")
    (row,) = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and (row["stage"], row["rows"], row["steps"]) == ("dpo", 4, 1)


def test_stages_alone_other_bases_and_merge(capsys, recipe: Path):
    run = recipe.parent / "r"
    code, out, _ = preftune(capsys, "dpo", recipe, "--output-dir", run, "--json")
    assert code == 0 and json.loads(out)["stage"] == "dpo"
    assert (run / "dpo" / "lineage.json").is_file()

    # an adapter of another base
    other = ["model.base=random:llama?seed=1", "--from-adapter", run / "dpo", "--output-dir", recipe.parent / "s"]
    assert_refused(preftune(capsys, "dpo", recipe, *other), "base.sha256 differs")
    assert json.loads((recipe.parent / "s" / "run.json").read_text())["stages"]["dpo"]["state"] == "failed"

    # the merged model says what base and adapter say
    code, out, _ = preftune(capsys, "merge", run / "dpo", recipe.parent / "merged")
    assert code == 0
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.tensor([AutoTokenizer.from_pretrained(recipe.parent / "merged").encode("Hello?")])
    merged = AutoModelForCausalLM.from_pretrained(recipe.parent / "merged", dtype=torch.float32)
    adapter = AutoPeftModelForCausalLM.from_pretrained(run / "dpo", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapter(ids).logits, rtol=1e-4, atol=1e-5)
    capsys.readouterr()  # the bars of transformers' own loading
    assert_refused(preftune(capsys, "merge", run / "dpo", recipe.parent / "merged"), "not empty")


@pytest.mark.slow
def test_smoke_runs_and_then_has_nothing_to_do(capsys, tmp_path: Path):
    code, out, _ = preftune(capsys, "run", "smoke", "--output-dir", tmp_path)
    assert code == 0
    stages = json.loads((tmp_path / "run.json").read_text())["stages"]
    assert {entry["state"] for entry in stages.values()} == {"done"}
    assert (tmp_path / "report.html").is_file()
    rows = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert {row["policy"] for row in rows} == {"base", "sft", "dpo", "ipo", "kto", "ppo", "grpo", "rloo"}
    code, out, _ = preftune(capsys, "run", "smoke", "--output-dir", tmp_path)
    assert code == 0 and out.count("unchanged") == len(stages)
    code, out, _ = preftune(capsys, "eval", "kl", tmp_path, "--policies", "dpo", "--json")
    assert code == 0 and [json.loads(line)["policy"] for line in out.splitlines()] == ["dpo", "sft"]
