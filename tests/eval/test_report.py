"""The report: one page, nothing fetched, whatever stages there are."""

import json
import re

import pytest

from preftune.data.errors import UserError
from preftune.eval.report import read_curves, stage_folders, write_report
from preftune.eval.svg import curve, interval_bar, short

ROW = {
    "policy": "dpo", "reference": "sft", "judge": "rubric", "n": 30, "mean_score": 0.7, "win_rate": 0.65,
    "ci_low": 0.5, "ci_high": 0.8, "ties": 3, "unparsable": 0, "length": 20.5, "eos_rate": 0.9, "kl": 1.25,
    "kl_se": 0.1, "kl_per_token": 0.05, "temperature": 0.7, "seed": 0,
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    for name, keys in (("sft", {"loss": 2.0}), ("dpo", {"loss": 0.69, "rewards/margins": 0.0})):
        folder = tmp_path / name
        folder.mkdir()
        lines = [{"step": step, "epoch": 1, **{k: v + step for k, v in keys.items()}} for step in range(3)]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "metrics.json").write_text(json.dumps({"train_seconds": 75.2, "peak_memory_bytes": 2_500_000_000}))
    (tmp_path / "run.json").write_text(json.dumps({"stages": {"sft": {}, "dpo": {}}}))
    lineage = {"kind": "dpo", "base": {"spec": "random:llama", "sha256": "ab" * 32}, "versions": {"trl": "1.16"}}
    (tmp_path / "dpo" / "lineage.json").write_text(json.dumps(lineage))
    (tmp_path / "recipe.yaml").write_text("name: <try>\n")
    (tmp_path / "eval").mkdir()
    reference = ROW | {"policy": "sft", "win_rate": None, "ci_low": None, "ci_high": None, "kl_se": None}
    (tmp_path / "eval" / "results.json").write_text(json.dumps([reference, ROW]))
    sample = {
        "policy": "dpo", "prompt_index": 0, "prompt": [{"role": "user", "content": "<b>hi</b>"}],
        "completion": "</p><script>x</script>", "tokens": 3, "finished": False, "scores": {"rubric": 1.0},
    }  # fmt: skip
    (tmp_path / "eval" / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return tmp_path


def test_the_page_stands_alone(run):
    page = write_report(run).read_text()
    assert page.startswith("<!doctype html>")
    assert not re.search(r"https?://|<script|src=|@import", page)
    assert "prefers-color-scheme: dark" in page
    assert "65.0%" in page
    assert "1 min 15 s" in page
    assert "&lt;script&gt;" in page
    assert "name: &lt;try&gt;" in page
    assert page.index("<h3>sft") < page.index("<h3>dpo")
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def test_the_matrix_of_all_pairs_and_length_control(run):
    results = []
    for place, policy in enumerate(("sft", "dpo", "ppo")):
        cell = {"win_rate": 0.615 + place / 100, "ci_low": 0.5, "ci_high": 0.7, "n": 60}
        against = {other: cell for other in ("sft", "dpo", "ppo") if other != policy}
        rated = {"rating_log_odds": place - 1.0625, "rating_low": -2.0, "rating_high": 2.0}
        results.append(ROW | {"policy": policy, "length_controlled_win_rate": 0.585, "against": against} | rated)
    (run / "eval" / "results.json").write_text(json.dumps(results))
    page = write_report(run).read_text()
    assert page.count("58.5%") == 3
    assert [page.count(text) for text in ("61.5%", "62.5%", "63.5%")] == [2, 2, 2]
    assert [text in page for text in ("-1.062", "-0.0625", "0.9375")] == [True] * 3
    (run / "eval" / "results.json").write_text(json.dumps([each | {"against": None} for each in results]))
    assert "All pairs" not in write_report(run).read_text()


@pytest.mark.parametrize(
    "gone", ["eval/results.json", "eval/samples.jsonl", "recipe.yaml", "run.json", "sft/log.jsonl"]
)
def test_what_is_missing_is_left_out(run, gone):
    (run / gone).unlink()
    assert write_report(run).is_file()


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no stage and no evaluation"):
        write_report(tmp_path)


def test_curves_leave_bookkeeping_out_and_put_the_loss_first(tmp_path):
    lines = [{"step": s, "grad_norm": 1.0, "loss": 2.0 - s, "epoch": s, "eval_runtime": 1, "odd": None} for s in (1, 2)]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(read_curves(path)) == ["loss", "grad_norm"]
    assert read_curves(path)["loss"] == ([1.0, 2.0], [1.0, 0.0])


def test_only_stage_folders_are_stages(run):
    (run / "notes").mkdir()
    assert [folder.name for folder in stage_folders(run)] == ["sft", "dpo"]


def test_figures():
    assert 'aria-label="0.500, 0.250 to 0.750"' in interval_bar(0.5, 0.25, 0.75)
    long = curve(list(range(5000)), [0.0] * 5000, "<loss>")
    assert len(re.search(r'points="([^"]*)"', long)[1].split()) == 200
    assert "&lt;loss&gt;" in long
    assert [short(v) for v in (None, 3, 0.12345, 123456.7, 2.0, 1e-5)] == ["–", "3", "0.1235", "1.23e+05", "2", "1e-05"]
