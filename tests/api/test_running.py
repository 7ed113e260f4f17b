"""`preftune.run` and `train_stage`: the command's chain, and a process that is left as it was found."""

import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import preftune
from preftune.api import session as sessions
from preftune.cli import main as cli
from preftune.models.lineage import adapter_sha256
from preftune.stopping import NUMBERS

from .conftest import STEPS, recipe


def test_a_run_gives_its_stages_and_its_evaluation(small: preftune.RunResult) -> None:
    assert [each.name for each in small.stages] == ["sft", "reward", "dpo"]
    assert [each.kind for each in small.stages] == ["sft", "reward", "dpo"]
    assert small["dpo"].state == "ran" and small["dpo"].metrics["steps"] == 2 and small.problems == ()
    table = small.to_pandas().set_index("stage")
    assert table.loc["dpo", "train_loss"] == small["dpo"].metrics["train_loss"]
    assert list(small["sft"].to_pandas()["step"])[:2] == [1, 2] and "loss" in small["sft"].to_pandas()
    assert small.evaluation is not None and small.report.is_file()
    rows = small.evaluation.to_pandas().set_index("policy")
    assert rows.loc["sft", "kl"] == 0 and rows.loc["dpo", "judge"] == "reward"
    assert len(small.evaluation.samples_to_pandas()) == 8
    with pytest.raises(preftune.UserError, match="did you mean 'dpo'"):
        small["dpoo"]


def test_it_says_nothing_when_quiet_and_the_commands_lines_when_not(small: preftune.RunResult, capsys) -> None:
    again = preftune.run(small.path / "recipe.yaml", output_dir=small.path, quiet=True)
    assert [each.state for each in again.stages] == ["skipped"] * 3 and again.evaluation is not None
    assert again["dpo"].metrics == small["dpo"].metrics
    assert capsys.readouterr() == ("", "")
    preftune.run(small.path / "recipe.yaml", output_dir=small.path, until="sft")
    assert "sft: unchanged since" in capsys.readouterr().out


def test_one_run_does_not_shape_the_next(small: preftune.RunResult, tmp_path: Path) -> None:
    """The same recipe after another one, in the same process and from the command line, gives the same bits."""
    values = recipe(tmp_path)
    preftune.run(values, output_dir=tmp_path / "other", until="sft", quiet=True, seed=7, lora={"r": 4, "alpha": 8})
    again = preftune.run(values, output_dir=tmp_path / "again", until="dpo", quiet=True)
    made = preftune.Recipe.from_dict(values)
    (tmp_path / "small.yaml").write_text(made.to_yaml())
    assert cli.run_command(["run", str(tmp_path / "small.yaml"), "--output-dir", str(tmp_path / "cli"),
                            "--until", "dpo"]) == 0  # fmt: skip
    for stage in ("sft", "dpo"):
        hashes = {adapter_sha256(run / stage) for run in (small.path, again.path, tmp_path / "cli")}
        assert len(hashes) == 1, stage
    assert adapter_sha256(tmp_path / "other" / "sft") not in hashes


def test_overrides_are_dotted_or_nested_and_what_is_wrong_is_said(tmp_path: Path) -> None:
    values = recipe(tmp_path)
    made = preftune.Recipe.from_dict(values)
    changed = made.override({"stages.dpo.beta": 0.2}, lora={"r": 8, "alpha": 16}, seed=numpy.int64(3))
    assert changed.to_dict()["stages"]["dpo"]["beta"] == 0.2
    assert changed.to_dict()["lora"] == {**made.to_dict()["lora"], "r": 8, "alpha": 16}
    assert changed.to_dict()["seed"] == 3 and made.to_dict()["seed"] == 0 and changed != made
    assert "eval" not in made.override(eval=None).to_dict()
    assert made.override({"stages": {"dpo": {"beta": 0.2}}}) == made.override({"stages.dpo.beta": 0.2})
    for keys, said in (
        ({"stages.dop.beta": 0.2}, r"override \(stages.dop.beta=0.2\): no 'dop' in stages; did you mean 'dpo'"),
        ({"stages": {"dpo": {"betta": 0.2}}}, "stages.dpo.betta.*beta"),
        ({"lora": {"r": print}}, "holds a builtin_function_or_method"),
        ({"seeed": 1}, "did you mean 'seed'"),
    ):
        with pytest.raises(preftune.UserError, match=said):
            preftune.run(values, output_dir=tmp_path / "run", overrides=keys)
    more: dict[str, Any] = {"outputdir": tmp_path}
    with pytest.raises(preftune.UserError, match=r"outputdir=: is no argument.*did you mean 'output_dir'"):
        preftune.run(values, **more)
    assert not (tmp_path / "run").exists()


def test_a_recipe_is_checked_when_it_is_made(tmp_path: Path) -> None:
    shipped = preftune.Recipe.from_yaml("smoke", {"stages.dpo.beta": 0.2})
    assert shipped.name == "smoke" and shipped.stages["ipo"] == "dpo" and next(iter(shipped.stages)) == "sft"
    (tmp_path / "out.yaml").write_text(shipped.to_yaml())
    assert preftune.Recipe.from_yaml(tmp_path / "out.yaml") == shipped
    values = recipe(tmp_path)
    (tmp_path / "demos.jsonl").rename(tmp_path / "moved.jsonl")
    values["data"]["demos"] = {"path": "moved.jsonl"}
    made = preftune.Recipe.from_dict(values, folder=tmp_path)
    assert made.to_dict()["data"]["demos"]["path"] == str(tmp_path / "moved.jsonl")
    del values["stages"]["sft"]["data"]
    with pytest.raises(preftune.UserError, match=r"recipe: stages\.sft lacks 'data'"):
        preftune.Recipe.from_dict(values)


def test_a_stage_alone_needs_what_it_starts_from(small: preftune.RunResult, tmp_path: Path) -> None:
    values = recipe(tmp_path)
    with pytest.raises(preftune.UserError, match="needs sft, which is not finished"):
        preftune.train_stage(values, "dpo", output_dir=tmp_path / "run", quiet=True)
    found = preftune.train_stage(
        values, "dpo", output_dir=tmp_path / "run", from_adapter=small["sft"].path, quiet=True,
        overrides={"stages.dpo.beta": 0.5},
    )  # fmt: skip
    assert found.state == "ran" and found.path == tmp_path / "run" / "dpo"
    assert len(found.to_pandas()) and found.metrics["steps"] == 2
    with pytest.raises(preftune.UserError, match="no such stage; did you mean 'dpo'"):
        preftune.train_stage(values, "dppo", output_dir=tmp_path / "run")


def test_the_process_is_left_as_it_was(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "warning")
    kept = [signal.getsignal(number) for number in (*NUMBERS, signal.SIGVTALRM)]
    variables, finders, filters, format_ = dict(os.environ), list(sys.meta_path), list(warnings.filters), (
        warnings.formatwarning
    )  # fmt: skip
    states = random_numbers()
    (tmp_path / "mine.py").write_text("def score(completions, **_):\n    return [1.0] * len(completions)\n")
    stages = {"sft": {"data": "demos", "train": STEPS}, "ppo": ppo("mine:score")}
    monkeypatch.chdir(tmp_path)
    preftune.run(recipe(tmp_path, stages=stages, eval=None), output_dir=tmp_path / "run", quiet=True)
    assert [signal.getsignal(number) for number in (*NUMBERS, signal.SIGVTALRM)] == kept
    assert dict(os.environ) == variables and warnings.filters == filters and warnings.formatwarning is format_
    after = random_numbers()
    assert after == states and "mine" not in sys.modules and set(sys.meta_path) >= set(finders)


def random_numbers() -> Any:
    legacy: Any = numpy.random.get_state()
    return random.getstate(), legacy[1].tolist(), torch.get_rng_state().tolist()


def ppo(reward: str) -> dict[str, Any]:
    sizes = {"rollout_batch_size": 2, "total_episodes": 2, "num_ppo_epochs": 1, "num_mini_batches": 1}
    return {"data": "demos", "from": "base", "reward": {"function": reward}, "max_new_tokens": 2, **sizes}


def test_what_two_recipes_call_alike_is_two_things(tmp_path: Path) -> None:
    """Each run has the reward function beside its own recipe, not the one that the first run imported."""
    scores = []
    for place, value in (("a", 1.0), ("b", 5.0)):
        folder = tmp_path / place
        folder.mkdir()
        (folder / "mine.py").write_text(f"def score(completions, **_):\n    return [{value}] * len(completions)\n")
        made = preftune.Recipe.from_dict(recipe(folder, stages={"ppo": ppo("mine:score")}, eval=None), folder=folder)
        result = preftune.run(made, output_dir=folder / "run", quiet=True)
        scores.append(result["ppo"].metrics["objective/scores"])
    assert scores == [1.0, 5.0]


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_keeps_a_checkpoint_and_the_same_call_goes_on(
    tmp_path: Path, number: signal.Signals, raised: type[BaseException], capsys
) -> None:
    (tmp_path / "stops.py").write_text(
        "import signal\nfrom pathlib import Path\ntold = []\nonce = Path(__file__).with_name('told')\n"
        "def score(completions, **_):\n"
        "    told.append(1)\n"
        "    if len(told) == 2 and not once.exists():\n"
        f"        once.touch()\n        signal.raise_signal({int(number)})\n"
        "    return [1.0] * len(completions)\n"
    )
    made = recipe(tmp_path, stages={"ppo": {**ppo("stops:score"), "total_episodes": 8}}, eval=None)
    made = preftune.Recipe.from_dict(made, folder=tmp_path)
    with pytest.raises(raised) as stopped:
        preftune.run(made, output_dir=tmp_path / "run")
    said = f"ppo: stopped by {number.name} at step 2 of 4, with a checkpoint"
    assert said in (str(stopped.value) if raised is KeyboardInterrupt else capsys.readouterr().err)
    assert raised is KeyboardInterrupt or stopped.value.args == (143,)
    assert signal.getsignal(number) is not None and sessions._AtWork.depth == 0
    result = preftune.run(made, output_dir=tmp_path / "run")
    assert "ppo: continues after step 2" in capsys.readouterr().err and result["ppo"].metrics["steps"] == 4


def test_a_second_ctrl_c_is_pythons_own() -> None:
    with pytest.raises(KeyboardInterrupt) as raised, sessions.session(), preftune_deferred():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second one goes unheard")
    assert raised.value.args == ()  # no word of ours about a checkpoint
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def preftune_deferred() -> Any:
    from preftune import stopping

    return stopping.deferred()


def test_a_handler_of_the_callers_own_stays() -> None:
    heard: list[int] = []
    own: Callable[..., None] = lambda number, frame: heard.append(number)  # noqa: E731
    before = signal.signal(signal.SIGTERM, own)
    try:
        with sessions.session():
            signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_two_threads_do_not_work_at_once_and_one_may_call_within() -> None:
    said: list[str] = []

    def other() -> None:
        try:
            with sessions.session():
                said.append("went in")
        except preftune.UserError as error:
            said.append(error.problem)

    with sessions.session(), sessions.session():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert said == ["another thread of this process is at work, and both would share its random numbers"]
