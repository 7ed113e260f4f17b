"""Chains with a stage that samples: what runs again, what is refused, what a kill leaves, and the shipped recipes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from preftune.cli.chain import Chain, Options
from preftune.cli.output import Output
from preftune.errors import UserError
from preftune.files import ROWS
from preftune.recipes.load import load_recipe

from .conftest import Shell
from .workshop import Workshop

RECIPE = """\
name: t
model: {base: "random:llama", dtype: float32}
data:
  demos: {path: demos.jsonl}
  prompts: {path: demos.jsonl}
stages:
  dpo: {from: sft, data: {stage: pairs}}
  pairs: {kind: sample, from: sft, data: prompts, n: 4, reward: {function: "scores:scored"}}
  sft: {data: demos}
"""
REWARDS = Path(__file__).parents[1] / "stages" / "sample_rewards.py"


class Sampling(Workshop):
    """A workshop whose sampling stage writes rows."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        super().__init__(folder, capsys)
        # what was imported stays so in this process, and its folder in Python's path
        self.module = f"scores_of_{folder.name}"
        self.recipe.write_text(RECIPE.replace("scores:", f"{self.module}:"))
        (folder / f"{self.module}.py").write_text("def scored(completions, **_): return [0.0] * len(completions)\n")
        self.rows = "{}\n"

    def stage(self, job) -> dict[str, float]:
        found = super().stage(job)
        if not job.record.trains:
            (job.output_dir / ROWS).write_text(self.rows)
        return found


@pytest.fixture
def sampling(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Sampling:
    monkeypatch.setattr("preftune.cli.chain._free_memory", lambda: None)
    return Sampling(tmp_path, capsys)


@pytest.mark.checklist("K11")
def test_k11_rows_are_sampled_between_the_stages_that_need_them(sampling: Sampling) -> None:
    assert sampling.run() == ["sft", "pairs", "dpo"]
    assert sampling.run() == []
    assert sampling.run("stages.pairs.batch_size=3") == []  # no part of what is drawn


@pytest.mark.checklist("K11")
@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("stages.sft.train.learning_rate=1e-3", ["sft", "pairs", "dpo"]),
        ("stages.pairs.n=6", ["pairs", "dpo"]),
        ("stages.pairs.seed=7", ["pairs", "dpo"]),
        ("stages.pairs.temperature=0.5", ["pairs", "dpo"]),
        ("stages.pairs.margin=0.5", ["pairs", "dpo"]),
        ("stages.dpo.data.held_out=0.5", ["dpo"]),
        ("stages.dpo.beta=0.3", ["dpo"]),
    ],
)
def test_k11_what_is_changed_above_runs_everything_below_again(
    sampling: Sampling, override: str, again: list[str]
) -> None:
    sampling.run()
    assert sampling.run(override) == again
    assert sampling.run(override) == []


@pytest.mark.checklist("K11")
def test_k11_the_code_of_the_reward_counts(sampling: Sampling, tmp_path: Path) -> None:
    sampling.run()
    with (tmp_path / f"{sampling.module}.py").open("a") as file:
        file.write("# another one\n")
    assert sampling.run() == ["pairs", "dpo"]
    assert f"pairs: runs again, changed: code of {sampling.module}:scored" in sampling.said()


@pytest.mark.checklist("K11")
def test_k11_the_prompts_count(sampling: Sampling, tmp_path: Path) -> None:
    sampling.run()
    (tmp_path / "other.jsonl").write_text('{"prompt": "c", "completion": "b"}\n')
    assert sampling.run(f"data.prompts.path={tmp_path / 'other.jsonl'}") == ["pairs", "dpo"]


def test_other_rows_of_the_same_settings_are_other_data(sampling: Sampling) -> None:
    sampling.run()
    sampling.rows = '{"other": 1}\n'
    assert sampling.run(only="pairs", force=True) == ["pairs"]
    assert sampling.run() == ["dpo"]


@pytest.mark.checklist("K11")
def test_k11_damaged_rows_are_sampled_again(sampling: Sampling) -> None:
    sampling.run()
    (sampling.path / "pairs" / ROWS).write_text("cut")
    assert sampling.run() == ["pairs"]  # what comes from it was made from the rows that were there
    assert "pairs: runs again, its folder is damaged: rows.jsonl has" in sampling.said()


def test_only_and_until_know_rows(sampling: Sampling) -> None:
    with pytest.raises(UserError, match="needs sft, which is not finished"):
        sampling.run(only="dpo")
    assert sampling.run(until="pairs") == ["sft", "pairs"]
    assert sampling.run(only="dpo") == ["dpo"]
    (sampling.path / "pairs" / ROWS).write_text("cut")
    with pytest.raises(UserError, match=r"needs pairs, whose folder in .* is damaged"):
        sampling.run(only="dpo", force=True)


# the rest runs for good


def write_run(folder: Path, rows: int = 12, **changed: object) -> Path:
    """A recipe of a tiny model, its data, and a reward function that notes and kills."""
    prompts = [{"prompt": f"Name colour {i}.", "completion": f"It is {i}.", "place": i} for i in range(rows)]
    (folder / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (folder / "own_scores.py").write_text(REWARDS.read_text())
    sample = {"n": 4, "max_new_tokens": 8, "unfinished": "keep", "batch_size": 12, **changed}
    stage = (
        f"{{kind: sample, from: sft, data: prompts, reward: {{function: own_scores:killing}}, {json.dumps(sample)[1:]}"
    )
    (folder / "t.yaml").write_text(
        f"""\
name: t
model: {{base: "random:llama", dtype: float32}}
lora: {{r: 2, alpha: 4}}
checkpoints: {{share: 0.25}}
data:
  demos: {{path: demos.jsonl}}
  prompts: {{path: demos.jsonl}}
stages:
  sft: {{from: base, data: demos, train: {{max_steps: 2, per_device_train_batch_size: 4}}}}
  pairs: {stage}
  dpo: {{from: sft, data: {{stage: pairs}}, train: {{max_steps: 2, per_device_train_batch_size: 4}}}}
"""
    )
    return folder / "t.yaml"


def preftune(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "preftune.cli.main", *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "SAMPLE_NOTES": str(folder / "notes"), **environment}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=600, check=False)


def notes(folder: Path) -> list[list[int]]:
    found = [json.loads(line) for line in (folder / "notes").read_text().splitlines()]
    (folder / "notes").unlink()
    return found


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_replies_that_it_has(tmp_path: Path) -> None:
    write_run(tmp_path)
    whole = preftune(tmp_path, "run", "t.yaml", "--output-dir", "whole")
    assert whole.returncode == 0, whole.stderr
    assert notes(tmp_path) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    killed = preftune(tmp_path, "run", "t.yaml", "--output-dir", "cut", SAMPLE_KILLS="7")
    assert killed.returncode == -signal.SIGKILL
    assert notes(tmp_path) == [[0, 1, 2], [3, 4, 5]]
    told = preftune(tmp_path, "status", "cut")
    assert "interrupted" in told.stdout and "6/12" in told.stdout, told.stdout
    again = preftune(tmp_path, "run", "t.yaml", "--output-dir", "cut")
    assert again.returncode == 0, again.stderr
    assert "pairs: goes on after 6 of 12 prompts" in again.stderr
    assert notes(tmp_path) == [[6, 7, 8], [9, 10, 11]]
    for name in (f"pairs/{ROWS}", "pairs/log.jsonl", "dpo/adapter_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name
    # and once it is whole nothing of it is left to do
    assert "pairs: unchanged" in preftune(tmp_path, "run", "t.yaml", "--output-dir", "cut").stdout


@pytest.mark.slow
def test_two_processes_sample_what_one_does(tmp_path: Path) -> None:
    write_run(tmp_path, rows=7)
    for folder, options in (("one", []), ("two", ["--launch", "fsdp2", "--num-processes", "2"])):
        done = preftune(tmp_path, "run", "t.yaml", "--output-dir", folder, "--until", "sft")
        assert done.returncode == 0, done.stderr
        done = preftune(tmp_path, "sample", "t.yaml", "--output-dir", folder, *options)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "one" / "pairs" / ROWS).read_bytes() == (tmp_path / "two" / "pairs" / ROWS).read_bytes()
    assert sorted(place for each in notes(tmp_path) for place in each) == sorted([*range(7)] * 2)


TINY = {
    "model": {"base": "random:llama", "dtype": "float32"},
    "lora": {"r": 4, "alpha": 8},
    "data.demos": {"limit": 16, "max_length": 512, "overflow": "truncate"},
    "data.pairs": {"limit": 24, "max_length": 512, "overflow": "truncate"},
    "data.prompts": {"limit": 6, "max_prompt_length": 256, "overflow": "truncate"},
    "eval": {
        "prompts": {"limit": 6, "max_prompt_length": 256, "overflow": "truncate"},
        "max_new_tokens": 8,
        "judges": [{"kind": "rubric", "checks": [{"kind": "max_words", "value": 2}]}],
    },
}
SHORT = {"max_steps": 2, "per_device_train_batch_size": 4}


def tiny(name: str, sampled: list[str], trained: list[str], tmp_path: Path) -> tuple[Path, list[str]]:
    """A shipped recipe with a tiny model, a reward function and few steps; its folder, and which steps ran."""
    (tmp_path / "shipped_scores.py").write_text(REWARDS.read_text())
    changed: dict = {**TINY, "stages": {each: {"train": SHORT} for each in ("sft", *trained)}}
    settings = {"n": 4, "max_new_tokens": 8, "unfinished": "keep", "reward": {"function": "shipped_scores:scored"}}
    changed["stages"] |= dict.fromkeys(sampled, settings)
    changed |= {"stages.reward": None}
    recipe = load_recipe(name, changed)
    chain = Chain(recipe, Options(output_dir=tmp_path / "run"), Output())
    return tmp_path / "run", [each.name for each in chain.run() if each.state == "ran"]


@pytest.mark.slow
def test_iterative_dpo_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: Shell) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    run, ran = tiny("iterative-dpo", ["pairs1", "pairs2"], ["dpo1", "dpo2"], tmp_path)
    assert ran == ["sft", "pairs1", "dpo1", "pairs2", "dpo2", "eval"]
    first, second = ((run / name / ROWS).read_bytes() for name in ("pairs1", "pairs2"))
    assert first != second
    lineage = json.loads((run / "pairs2" / "lineage.json").read_text())
    assert [parent["stage"] for parent in lineage["parents"]] == ["dpo1"]
    page = (run / "report.html").read_text()
    assert "What was sampled" in page and "The first rows of pairs1" in page
    assert "dpo2 comes from dpo1 and pairs2." in page
    assert tiny("iterative-dpo", ["pairs1", "pairs2"], ["dpo1", "dpo2"], tmp_path)[1] == []
    code, out, err = shell("doctor", run)
    assert code == 0, out + err
    assert "pairs1" in out
    shell.refused("chat", run, "--policy", "pairs1", said="no policy 'pairs1'; use one of base, sft, dpo1, dpo2")
    shell.refused("merge", run / "pairs1", tmp_path / "merged", said="holds no adapter")
    shell.refused("export", run / "pairs1", tmp_path / "out", "--to", "vllm", said="holds no adapter")


@pytest.mark.slow
def test_best_of_n_sft_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    run, ran = tiny("best-of-n-sft", ["best"], ["best_of_n"], tmp_path)
    assert ran == ["sft", "best", "best_of_n", "eval"]
    rows = [json.loads(line) for line in (run / "best" / ROWS).read_text().split("\n")[:-1]]
    assert 0 < len(rows) <= 6 and all("completion" in row and row["score"] is not None for row in rows)


def test_settings_that_do_not_go_together_are_found_by_validate(tmp_path: Path, shell: Shell) -> None:
    file = write_run(tmp_path)
    code, out, err = shell("validate", file)
    assert code == 0, err
    assert "data pairs as pairs: not checked, pairs samples them when the recipe runs" in out
    for override, said in (
        ("stages.pairs.n=1", "stages.pairs.n: is 1, and the best and the worst are two replies; use n: 2 or more"),
        ("stages.pairs.threshold=1", "stages.pairs.threshold: has no effect with keep: best_worst"),
        ("stages.pairs.ensemble_penalty=2", "stages.pairs.ensemble_penalty: has no effect with a sum"),
        ("stages.pairs.reward=[{function: own_scores:scored, weight: 0}]", "every weight is 0"),
        ("stages.pairs.reward={function: own_scores:nothing}", "scores"),
    ):
        shell.refused("validate", file, override, said=said)


def test_a_plan_counts_the_replies(tmp_path: Path, shell: Shell) -> None:
    file = write_run(tmp_path)
    code, out, err = shell("--json", "plan", file, "--seconds", "0")
    if code == 2:
        code, out, err = shell("plan", file, "--seconds", "0", "--json")
    assert code == 0, err
    found = {
        row["stage"]: row for line in out.splitlines() if line.startswith("{") and "stage" in (row := json.loads(line))
    }
    prompts = found["pairs"]["rows"]
    assert (prompts, found["pairs"]["steps"], found["pairs"]["trained parameters"]) == (12, 0, 0)
    assert found["pairs"]["longest"] - 8 < found["dpo"]["longest"] <= found["pairs"]["longest"]
    assert found["dpo"]["rows"] == 12
    assert found["pairs"]["PFLOP"] > 0
