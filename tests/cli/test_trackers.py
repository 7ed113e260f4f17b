"""A chain that is told to trackers: every stage's curves and the evaluation, after the run has ended."""

import json
import sqlite3
from pathlib import Path

import pytest

from preftune.cli.chain import Chain, Options
from preftune.cli.output import Output
from preftune.recipes.load import load_recipe

SECRET = "a-key-that-nobody-may-read-0123456789abcdef"
RECIPE = """\
name: told
model: {base: "random:llama", dtype: float32}
lora: {r: 2, alpha: 4}
data:
  demos: {path: quickstart/demos.jsonl, limit: 8, max_length: 256, overflow: truncate}
  pairs: {path: quickstart/pairs.jsonl, limit: 8, max_length: 256, overflow: truncate}
  prompts: {path: quickstart/prompts.jsonl, limit: 4, max_prompt_length: 128, overflow: truncate}
stages:
  sft: {data: demos, train: {max_steps: 3, per_device_train_batch_size: 2}}
  reward: {data: pairs, train: {max_steps: 2, per_device_train_batch_size: 2}}
  dpo: {data: pairs, train: {max_steps: 2, per_device_train_batch_size: 2}}
  ppo: {reward: reward, data: prompts, rollout_batch_size: 4, total_episodes: 8, num_ppo_epochs: 1,
        num_mini_batches: 1, max_new_tokens: 4}
eval:
  prompts: {path: quickstart/eval_prompts.jsonl, limit: 3, max_prompt_length: 128, overflow: truncate}
  policies: [sft, dpo]
  reference: sft
  max_new_tokens: 4
  judges: [{kind: reward, stage: reward}]
"""
STAGES = ("sft", "reward", "dpo", "ppo")


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would draw of a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), purge_orphaned_data=False).Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def told_run(folder: Path, trackers: list[str]) -> Path:
    (folder / "told.yaml").write_text(f"trackers: {json.dumps(trackers)}\n{RECIPE}")
    run = folder / "first"
    Chain(load_recipe(folder / "told.yaml"), Options(output_dir=run), Output()).run()
    return run


@pytest.mark.slow
def test_event_files_and_trackio_hold_every_curve_after_the_end(preftune_cache, tmp_path, monkeypatch, capfd):
    for module in ("tensorboard", "trackio.utils"):
        pytest.importorskip(module)
    for module in ("trackio.utils", "trackio.sqlite_storage"):
        monkeypatch.setattr(f"{module}.TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    run = told_run(tmp_path, ["tensorboard", "trackio"])
    # 1. every number of every stage's log is in its event files once, and nothing else is
    for stage in STAGES:
        rows = [json.loads(line) for line in (run / stage / "log.jsonl").read_text().splitlines()]
        found = curves(run / stage / "runs")
        name = "objective/kl" if stage == "ppo" else "loss"
        logged = [(row["step"], row[name]) for row in rows if name in row]
        assert found[f"train/{name}"] == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged]
        assert len(logged) >= 2
    # 2. the evaluation's results
    row = next(each for each in json.loads((run / "eval" / "results.json").read_text()) if each["policy"] == "dpo")
    told = curves(run / "eval" / "runs")
    assert told[f"dpo/{row['judge']}/win_rate"] == [(0, pytest.approx(row["win_rate"]))]
    assert told["dpo/kl"] == [(0, pytest.approx(row["kl"], rel=1e-6, abs=1e-12))]
    # 3. Trackio: one project, one group, a run a stage
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as opened:
        metrics = opened.execute("select run_name, metrics from metrics").fetchall()
        configs = opened.execute("select run_name, config from configs").fetchall()
    assert database.stem == "told"
    assert {name.rpartition("-")[0] for name, _ in metrics} == {*STAGES, "eval"}
    assert {json.loads(config)["_Group"] for _, config in configs} == {"first"}
    # 4. a second start does nothing and tells nothing; what trackers are named is no part of a key
    capfd.readouterr()
    load = load_recipe(tmp_path / "told.yaml", ["trackers=null"])
    assert [each.state for each in Chain(load, Options(output_dir=run), Output()).run()] == ["skipped"] * 5
    # 5. nobody's key stands in what the run leaves behind
    texts = [file.read_bytes() for file in run.rglob("*") if file.is_file() and file.suffix != ".safetensors"]
    assert not any(SECRET.encode() in text for text in texts)


@pytest.mark.slow
def test_wandb_offline_groups_the_stages_of_a_chain(preftune_cache, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    told_run(tmp_path, ["wandb"])
    runs = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == len(STAGES) + 1
    held = [file.read_bytes() for file in runs]
    assert all(b"first" in each and b"told" in each for each in held)
    assert sum(b"objective/kl" in each for each in held) == 1 and sum(b"win_rate" in each for each in held) == 1
