"""The chain with stages that only write a file: what is skipped, run again, kept, continued."""

import datetime
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from preftune import progress
from preftune.cli.main import run_command
from preftune.cli.process import exit_code_of
from preftune.errors import UserError
from preftune.progress import duration
from preftune.stopping import Stopped
from preftune.version import __version__

from .workshop import ALL, Workshop


def test_a_second_run_does_nothing_and_says_so(shop: Workshop):
    assert shop.run() == ALL
    entries = json.loads((shop.path / "run.json").read_text())["stages"]
    assert list(entries) == ALL
    assert all({"state", "key", "seconds", "started"} <= set(entry) for entry in entries.values())
    shop.said()
    assert shop.run() == []
    assert shop.said().count("unchanged") == len(ALL)
    assert json.loads((shop.path / "run.json").read_text())["stages"] == entries


def test_the_report_is_written_after_every_stage_and_a_disk_that_refuses_it_stops_only_the_last(shop, monkeypatch):
    states: list[dict[str, str]] = []

    def report(_: object) -> None:
        states.append(shop.states())
        raise OSError("read-only")

    monkeypatch.setattr("preftune.cli.chain.Chain._report", report)
    with pytest.raises(OSError, match="read-only"):
        shop.run()
    assert [sum(state == "done" for state in each.values()) for each in states] == [1, 2, 3, 4, 5]


def test_a_changed_parameter_runs_that_stage_and_what_depends_on_it(shop: Workshop):
    shop.run()
    shop.said()
    assert shop.run("stages.dpo.beta=0.2") == ["dpo", "eval"]
    assert "dpo: runs again, changed: beta 0.1 -> 0.2" in shop.said()
    assert json.loads((shop.path / "dpo" / "result").read_text()) == {"beta": 0.2}
    assert shop.run("stages.dpo.beta=0.2", "stages.reward.train.max_steps=3") == ["reward", "ppo"]
    said = shop.said()
    assert "train.max_steps unset -> 3" in said and "ppo: runs again, changed: stage reward" in said


def test_an_evaluation_with_answers_left_open_is_done_again_and_a_silent_judge_fails_it(shop: Workshop):
    def row(n: int, unread: dict[str, int]) -> dict[str, object]:
        return {"policy": "dpo", "reference": "sft", "judge": "tiny", "n": n, "usage": {"unread": unread}}

    evaluate, rows = shop.evaluate, [row(0, {"empty": 4})]
    shop.evaluate = lambda spec, run_dir: (evaluate(spec, run_dir), rows)[1]  # pyright: ignore[reportAttributeAccessIssue]
    shop.run()
    assert "judge tiny gave no verdict at all: 4 answers without a verdict (4 empty), asked again" in shop.said()
    assert shop.states()["eval"] == "failed"
    rows[:] = [row(3, {"empty": 1})]
    assert shop.run() == ["eval"]
    assert shop.states()["eval"] == "done"
    rows[:] = [row(4, {})]
    assert shop.run() == ["eval"]
    assert shop.run() == []


def test_changed_rows_run_what_reads_them(shop: Workshop):
    shop.run()
    shop.said()
    row = '{"prompt": "a", "chosen": "b", "rejected": "d"}\n'
    (shop.recipe.parent / "pairs.jsonl").write_text(row)
    assert shop.run() == ["reward", "ppo", "dpo", "eval"]
    assert "changed: the rows of pairs" in shop.said()
    # the same rows under another name are the same rows
    (shop.recipe.parent / "moved.jsonl").write_text(row)
    assert shop.run(f"data.pairs.path={shop.recipe.parent / 'moved.jsonl'}") == []


def test_a_changed_seed_or_format_runs_everything(shop: Workshop, monkeypatch):
    shop.run()
    assert shop.run("seed=1") == ALL
    monkeypatch.setattr("preftune.cli.keys.FORMAT", 2)
    assert shop.run("seed=1") == ALL


def test_a_failure_keeps_the_old_folder_and_stops_the_chain(shop: Workshop):
    shop.run()

    def fail(name: str, output: Path) -> None:
        (output / "half").write_text("")
        if name == "reward":
            raise RuntimeError("out of memory")

    shop.during = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        shop.run("stages.reward.train.max_steps=3", "stages.dpo.beta=0.2")
    assert shop.ran == ["reward"]
    assert shop.states()["reward"] == "failed"
    assert (shop.path / "reward" / "result").is_file() and not (shop.path / "reward" / "half").exists()
    # the same command again continues where it stopped, in the folder that was left
    left = []
    shop.during = lambda name, output: left.append((name, (output / "half").exists()))
    shop.run("stages.reward.train.max_steps=3", "stages.dpo.beta=0.2")
    assert left == [("reward", True), ("ppo", False), ("dpo", False)]
    assert set(shop.states().values()) == {"done"}
    assert not [each for each in shop.path.iterdir() if each.name.endswith((".partial", ".old"))]


def test_what_an_interrupted_run_of_another_recipe_left_is_not_continued(shop: Workshop):
    def stop(name: str, output: Path) -> None:
        (output / "half").write_text("")
        raise KeyboardInterrupt

    shop.during = stop
    with pytest.raises(KeyboardInterrupt):
        shop.run()
    assert shop.states() == {"sft": "stopped"}
    left = []
    shop.during = lambda name, output: left.append((output / "half").exists())
    shop.run("seed=1", until="sft")
    assert left == [False]


def test_a_deleted_folder_is_made_again(shop: Workshop):
    shop.run()
    shop.said()
    (shop.path / "dpo").rename(shop.path.parent / "gone")
    assert shop.run() == ["dpo"]
    assert "dpo: runs, its folder is gone" in shop.said()


def test_a_crash_between_the_two_renames_loses_nothing(shop: Workshop):
    shop.run()
    (shop.path / "dpo").rename(shop.path / ".dpo.old")
    assert shop.run() == []
    assert (shop.path / "dpo" / "result").is_file() and not (shop.path / ".dpo.old").exists()


def test_only_until_and_force(shop: Workshop):
    assert shop.run(until="reward") == ["sft", "reward"]
    with pytest.raises(UserError, match="ppo"):
        shop.run(only="pppo")
    assert shop.run(only="dpo") == ["dpo"]
    assert shop.run(only="dpo") == []
    assert shop.run(only="dpo", force=True) == ["dpo"]
    assert shop.run() == ["ppo", "eval"]
    assert shop.run(force=True) == ALL


def test_only_needs_its_parent_and_says_when_it_is_another_one(shop: Workshop):
    with pytest.raises(UserError, match=r"needs sft, which is not finished"):
        shop.run(only="dpo")
    shop.run(until="sft")
    shop.said()
    shop.run("stages.sft.train.max_steps=3", only="dpo")
    assert "sft: taken as it lies there, made with another recipe: train.max_steps" in shop.said()


def test_a_judges_code_is_part_of_the_key(shop: Workshop, monkeypatch):
    module = shop.recipe.parent / "shop_judges.py"
    module.write_text("def short(prompts, completions, **_):\n    return [0.0] * len(prompts)\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    judge = "eval.judges=[{kind: function, function: 'shop_judges:short'}]"
    assert shop.run(judge) == ALL
    assert shop.run(judge) == []
    module.write_text(module.read_text().replace("0.0", "1.0"))
    assert shop.run(judge) == ["eval"]


def test_one_run_at_a_time_and_a_dead_one_does_not_hold_the_lock(shop: Workshop):
    shop.path.mkdir()
    code = (
        "import sys, time; from pathlib import Path; from preftune.cli.folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).lock():\n    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(shop.path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"another run \(process {other.pid}\)"):
            shop.run()
        other.kill()
        other.wait()
    assert shop.run() == ALL


def test_recipe_yaml_in_the_run_folder_runs_by_itself(shop: Workshop, monkeypatch):
    shop.run("stages.dpo.beta=0.2")
    shop.recipe = shop.path / "recipe.yaml"
    monkeypatch.chdir(shop.path)
    assert shop.run() == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.21, "3.2 s"), (250, "4 min 10 s"), (7500, "2 h 5 min"), (59.97, "60.0 s")]
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


def test_a_wrong_file_of_a_later_stage_is_known_before_the_first_one_trains(shop: Workshop):
    (shop.recipe.parent / "pairs.jsonl").write_text('{"prompt": "a", "rejected": "c"}\n')
    with pytest.raises(UserError, match=r"pairs\.jsonl:1: no chosen"):
        shop.run()
    assert shop.ran == []
    assert shop.run(only="sft") == ["sft"]


def test_a_run_keeps_the_day_that_its_template_writes(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preftune.cli.first_start._today", lambda: datetime.date(2026, 2, 28))
    shop.run()
    assert "template_date" not in (shop.path / "recipe.yaml").read_text()
    dated = "model.chat_template=\"{{ strftime_now('%d') }}\""
    shop.run(dated)
    assert "template_date: 2026-02-28" in (shop.path / "recipe.yaml").read_text()
    monkeypatch.setattr("preftune.cli.first_start._today", lambda: datetime.date(2026, 3, 1))
    assert shop.run(dated) == []


def test_a_run_keeps_the_precision_that_auto_was_at_its_first_start(shop: Workshop, monkeypatch: pytest.MonkeyPatch):
    found = iter(["bfloat16", "float32"])
    monkeypatch.setattr("preftune.models.devices.auto_dtype", lambda: next(found))
    assert shop.run("model.dtype=auto") == ALL
    assert "model.dtype: auto is bfloat16 on " in shop.said()
    assert "dtype: bfloat16" in (shop.path / "recipe.yaml").read_text()
    assert shop.run("model.dtype=auto") == []
    assert "model.dtype: auto is bfloat16, as at this run's first start" in shop.said()
    (shop.path / "recipe.yaml").unlink()
    assert shop.run("model.dtype=auto") == ALL
    assert "dtype: float32" in (shop.path / "recipe.yaml").read_text()


def test_evaluation_prompts_that_are_trained_on_are_said(shop: Workshop) -> None:
    shop.run()
    assert "eval.prompts: 1 of 1 prompts stand in the training data demos as well" in shop.said()


def test_a_signal_says_what_is_kept_and_from_where_the_stage_goes_on(shop: Workshop) -> None:
    def stop(name: str, output: Path) -> None:
        if name == "reward":
            checkpoint = output / "checkpoints" / "checkpoint-20"
            checkpoint.mkdir(parents=True)
            (checkpoint / "manifest.json").write_text("{}")
            (output / "checkpoints" / "checkpoint-30").mkdir()  # cut off while it was written
            raise Stopped(signal.SIGINT, "reward: stopped by SIGINT at step 20 of 60, with a checkpoint")

    shop.during = stop
    with pytest.raises(Stopped) as stopped:
        shop.run()
    assert stopped.value.kept == f"kept in {shop.path}: sft; reward goes on after step 20"
    shop.during = lambda name, output: None
    shop.run()

    def at_once(name: str, output: Path) -> None:
        raise Stopped(signal.SIGTERM)

    shop.during = at_once
    with pytest.raises(Stopped) as stopped:
        shop.run(force=True)
    assert stopped.value.kept.endswith("reward, ppo, dpo, eval; sft begins anew")


def test_the_command_says_it_after_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        stopped = Stopped(signal.SIGINT, "sft: stopped by SIGINT at step 2 of 3, with a checkpoint")
        stopped.kept = "kept in runs/x: sft goes on after step 2"
        raise stopped

    assert exit_code_of(work, "preftune run x") == 130
    assert capsys.readouterr().err.splitlines() == [
        "kept in runs/x: sft goes on after step 2",
        "sft: stopped by SIGINT at step 2 of 3, with a checkpoint; continue with: preftune run x",
    ]


def test_what_the_later_steps_took_the_last_time_is_known_and_nothing_before(shop: Workshop) -> None:
    seen: dict[str, float | None] = {}

    def look(name: str, output: Path) -> None:
        seen[name] = progress._Told.ahead

    shop.during = look
    shop.run()
    assert seen == dict.fromkeys(("sft", "reward", "ppo", "dpo"))
    state = shop.path / "run.json"
    held = json.loads(state.read_text())
    took = {"sft": 1.0, "reward": 2.0, "ppo": 4.0, "dpo": 8.0, "eval": 16.0}
    for name, seconds in took.items():
        held["stages"][name]["seconds"] = seconds
        stamp = shop.path / name / ".key.json"
        stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"seconds": seconds}))
    state.write_text(json.dumps(held))
    seen.clear()
    shop.run("stages.reward.train.learning_rate=1e-3")
    # ppo comes from reward; dpo does not, nor does the evaluation look at either: they are skipped
    assert seen == {"reward": 4.0, "ppo": None}
    seen.clear()
    shop.run("stages.reward.train.learning_rate=1e-3", "stages.sft.train.learning_rate=1e-3")
    assert seen["sft"] is not None and seen["sft"] > 24 and seen["dpo"] == 16.0


def test_a_run_says_at_once_that_it_begins(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Before anything heavy is loaded, and with --json nothing but results on standard output."""
    code = (
        "import sys\nfrom preftune import progress\nfrom preftune.cli.main import run_command\n"
        "def look(self, line):\n    print(line, 'torch' in sys.modules)\n    raise SystemExit\n"
        "from preftune.cli.output import Output\nOutput.say = look\nrun_command(['run', 'smoke'])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert found.stdout.splitlines()[0] == f"preftune {__version__}: reading smoke False"
    assert run_command(["run", "no-such-recipe", "--json"]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.splitlines()[0] == f"preftune {__version__}: reading no-such-recipe"
