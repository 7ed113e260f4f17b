"""Several machines at one run: what is refused, how they wait for each other, and one that dies and comes back."""

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from preftune.cli import join, launch, machines
from preftune.cli import main as cli
from preftune.cli.chain import write_recipe
from preftune.cli.folder import RunFolder, Stamp
from preftune.cli.keys import Keys, key_of
from preftune.cli.launch import alike, check_launch, machines_of
from preftune.cli.machines import Board, Lead, LostMachine, Machines, Other
from preftune.cli.process import StageFailed, make_functions_importable
from preftune.errors import UserError
from preftune.models.loading import resolve_base
from preftune.recipes.load import load_recipe

TWO: dict[str, Any] = {"distributed_type": "MULTI_CPU", "use_cpu": True, "num_machines": 2, "num_processes": 2,
                       "machine_rank": 0, "main_process_ip": "127.0.0.1", "main_process_port": 29500}  # fmt: skip


def config(folder: Path, **changed: Any) -> Path:
    file = folder / f"node{len(list(folder.glob('node*')))}.yaml"
    file.write_text(yaml.safe_dump(TWO | changed))
    return file


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in milliseconds."""
    for name, seconds in {"BEAT": 0.02, "LOOK": 0.005, "LOST": 1.0, "GRACE": 0.1, "WAIT": 1.5}.items():
        monkeypatch.setattr(machines, name, seconds)
        if hasattr(join, name):
            monkeypatch.setattr(join, name, seconds)


@pytest.mark.parametrize(
    ("changed", "joins", "said"),
    [
        ({"num_machines": 1}, True, "num_machines is 1: there is nothing to join"),
        ({}, True, "machine_rank is 0, which is the machine that runs the recipe"),
        ({"machine_rank": 1}, False, "machine_rank is 1, and machine 0 runs the recipe; here, preftune join RUN"),
        ({"machine_rank": 2}, True, "machine_rank is 2 of 2 machines"),
        ({"main_process_ip": None}, False, "several machines, no main_process_ip"),
        ({"main_process_port": 0}, False, "several machines, no main_process_port"),
        ({"main_process_port": None, "machine_rank": 1}, True, "several machines, no main_process_port"),
        ({"num_processes": 3}, False, "num_processes is 3, counted over 2 machines"),
        ({"deepspeed_config": {"deepspeed_multinode_launcher": "pdsh"}}, False, "deepspeed_multinode_launcher is pdsh"),
        ({"mpirun_config": {"mpirun_hostfile": "hosts"}}, False, "mpirun would start all machines' processes"),
    ],
)
def test_a_config_with_which_machines_cannot_work_is_one_line(tmp_path: Path, changed, joins: bool, said: str) -> None:
    with pytest.raises(UserError) as wrong:
        machines_of(config(tmp_path, **changed), joins=joins)
    assert said in str(wrong.value)


def test_a_config_of_each_machine(tmp_path: Path) -> None:
    lead, other = config(tmp_path), config(tmp_path, machine_rank=1, num_processes=2)
    assert machines_of(lead, joins=False) == Machines(2, 0, 2, "127.0.0.1", 29500)
    assert machines_of(other, joins=True) == Machines(2, 1, 2, "127.0.0.1", 29500)
    assert alike(lead) == alike(other) == alike(config(tmp_path, mixed_precision="no"))
    assert machines_of(config(tmp_path, num_machines=1, main_process_port=0), joins=False).count == 1


def test_processes_counted_for_one_machine_alone_leave_gpus_idle_and_that_is_said(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    machines_of(config(tmp_path, use_cpu=False, distributed_type="MULTI_GPU", num_processes=16), joins=False)
    assert capsys.readouterr().err == ""
    machines_of(config(tmp_path, use_cpu=False, distributed_type="MULTI_GPU", num_processes=8), joins=False)
    assert "8 GPUs are here for 4 processes: num_processes counts those of all machines" in capsys.readouterr().err


def test_what_a_command_line_says_takes_its_place_in_the_config(shell, tmp_path: Path) -> None:
    file, run = str(config(tmp_path)), tmp_path / "run"
    shell.refused(
        "join", run, "--launch", "ddp", "--num-processes", 2, said="num_machines is 1: there is nothing to join"
    )
    shell.refused("join", run, "--launch", tmp_path / "no.yaml", said=r"no file '.*no\.yaml'")
    shell.refused("join", run, "--launch", file, said="machine_rank is 0")
    words = ("--machine-rank", 5, "--num-processes", 4)
    shell.refused("join", run, "--launch", file, *words, said="machine_rank is 5 of 2 machines")
    behind = ("--", "--num_machines", 3, "--machine_rank", 1, "--main_process_ip", "here")
    shell.refused("join", run, "--launch", "fsdp2", "--num-processes", 3, *behind, said="no main_process_port that all")
    shell.refused("join", run, "seed=3", "--launch", file, said="seed=3: has no place here")
    shell.refused("run", "smoke", "--launch", config(tmp_path, machine_rank=1), said="machine 0 runs the recipe")
    assert not run.exists()


@pytest.mark.parametrize("value", [-1, "often", True, 1.5])
def test_restarts_are_a_number(tmp_path: Path, value: object) -> None:
    check_launch(config(tmp_path, max_restarts=2, monitor_interval=0.5))
    with pytest.raises(UserError, match="max_restarts is"):
        check_launch(config(tmp_path, max_restarts=value))


def test_what_differs_between_machines_is_named() -> None:
    first = {"config": {"mixed_precision": "bf16"}, "versions": {"torch": "2.13.0"}}
    join.compare(first, first)
    with pytest.raises(UserError, match=r"torch is 2\.12\.0 here and 2\.13\.0 on machine 0"):
        join.compare({**first, "versions": {"torch": "2.12.0"}}, first)
    with pytest.raises(UserError, match="mixed_precision is no here and bf16 on machine 0"):
        join.compare({**first, "config": {"mixed_precision": "no"}}, first)


def test_who_falls_silent_is_lost(tmp_path: Path, quick: None) -> None:
    seen = Other(tmp_path, 1)
    assert seen.look() == {}
    with Board(tmp_path, 1, state="follows"):
        time.sleep(0.1)
        assert seen.look()["state"] == "follows" and seen.alive
        time.sleep(1.1)
        seen.look()
        assert not seen.lost
    again = Other(tmp_path, 1)
    again.look()
    time.sleep(1.1)
    again.look()
    assert again.lost and not again.alive


class Joined:
    """Another machine, in a thread: what it does with each call is handed in."""

    def __init__(self, run_dir: Path, answers: list[dict[str, Any]]) -> None:
        self.run_dir, self.answers = run_dir, answers
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Joined":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.join(timeout=10)
        assert not self.thread.is_alive()

    def _run(self) -> None:
        first = Other(self.run_dir, 0)
        with Board(self.run_dir, 1, state="follows") as board:
            for attempt, ended in enumerate(self.answers, 1):
                while first.look().get("attempt") != attempt:
                    time.sleep(0.005)
                if ended.get("error") is None:
                    board.say(state="ready", follows=first.look()["id"], attempt=attempt, ended=None)
                    while first.look()["state"] == "calls":
                        time.sleep(0.005)
                if ended:
                    said = {"attempt": attempt, "error": None, "stopped": None, **ended}
                    board.say(state="ended", follows=first.look()["id"], ended=said)
            time.sleep(0.1)


@pytest.mark.parametrize("restarts", [0, 1, 2])
def test_a_step_is_started_again_as_often_as_the_config_says(
    tmp_path: Path, monkeypatch, capsys, restarts: int
) -> None:
    """A lost machine counts for nothing; the fourth attempt ends well."""
    tried = iter([LostMachine("gone"), StageFailed("crashed"), StageFailed("crashed"), None])

    def attempt(*_: object) -> None:
        if (error := next(tried)) is not None:
            raise error

    monkeypatch.setattr(launch, "_attempt", attempt)
    config(tmp_path, max_restarts=restarts)
    arguments = (tmp_path / "node0.yaml", tmp_path, "sft", None, None, "", "its last checkpoint", lambda: None)
    if restarts == 2:
        assert launch._attempts(*arguments) is None
    else:
        with pytest.raises(StageFailed, match="crashed; the same command goes on"):
            launch._attempts(*arguments)
    assert capsys.readouterr().err.count("it goes on from its last checkpoint") == 1 + restarts


def leading(run_dir: Path) -> Lead:
    return Lead(run_dir, Machines(2, 0, 2), {}, lambda _: None)


def test_a_share_that_fails_is_named_and_who_was_dragged_along_is_not(tmp_path: Path, quick: None) -> None:
    stopped = {"code": 0, "stopped": [15, "sft: stopped"]}
    answers = [{"code": 1, "words": "process 1 was ended by SIGKILL"}, {"code": 76}, {"code": 76}, stopped]
    with leading(tmp_path) as lead, Joined(tmp_path, answers):
        lead.start("sft", "k", None)
        lead.end(76)
        assert str(lead.why(76, "closed")) == "sft: on machine 1, process 1 was ended by SIGKILL"
        assert lead.trouble()
        lead.start("sft", "k", None)
        lead.end(1)
        assert str(lead.why(1, "")) == "sft: on machine 0, its launcher ended with exit code 1"
        lead.start("sft", "k", None)
        lead.end(76)
        assert str(lead.why(76, "closed")) == "sft: on machine 0, closed"
        lead.start("sft", "k", None)
        lead.end(76)
        assert str(lead.why(76, "")) == "sft: stopped" and lead.trouble()


def test_what_is_wrong_on_another_machine_is_said_by_the_first(tmp_path: Path, quick: None) -> None:
    wrong = {"code": 2, "error": ["data.demos", "no file 'a'", "put it there"]}
    with leading(tmp_path) as lead, Joined(tmp_path, [wrong]), pytest.raises(UserError, match="no file 'a'"):
        lead.start("sft", "k", None)
    with leading(tmp_path) as lead, Joined(tmp_path, [{}]):
        lead.start("sft", "k", None)
    assert isinstance(lead.why(76, ""), LostMachine) and lead.trouble()


def test_a_first_machine_that_is_not_where_the_config_says(tmp_path: Path, quick: None) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    two = Machines(2, 1, 2, "127.0.0.1", port)
    with pytest.raises(
        UserError, match=rf"machine 1 does not reach machine 0 at 127\.0\.0\.1:{port} \(Connection refused"
    ):
        two.reach()
    with two.reachable():
        two.reach()
        with pytest.raises(UserError, match=f"main_process_port {port} cannot be opened"), two.reachable():
            pass
    with two.reachable():  # what was open a moment ago can be opened again
        two.reach()


def test_who_does_not_come_is_not_awaited_for_ever(tmp_path: Path, quick: None) -> None:
    with pytest.raises(StageFailed, match=r"machine 1 did not come within"), leading(tmp_path) as lead:
        lead.start("sft", "k", None)
    assert json.loads((tmp_path / ".machines" / "0.json").read_text())["state"] == "failed"
    with pytest.raises(StageFailed, match="machine 0 did not come within"):
        join.join_run(tmp_path / "no run", config(tmp_path, machine_rank=1))


RECIPE = """\
name: t
model: {base: "random:llama", dtype: float32}
data: {demos: {path: demos.jsonl}}
stages:
  sft: {data: demos}
  ppo: {from: sft, data: demos, reward: {function: "beside_the_recipe:score"}}
"""


def called(folder: Path, name: str, known: dict[str, str]) -> tuple[join._Follower, dict[str, Any]]:
    """Another machine, and what the first one calls it to, in a run of `RECIPE`."""
    (folder / "t.yaml").write_text(RECIPE)
    (folder / "demos.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (folder / "beside_the_recipe.py").write_text("def score(prompts, completions, **_): return [0.0]\n")
    run = folder / "run"
    run.mkdir()
    recipe = load_recipe(folder / "t.yaml")
    make_functions_importable(recipe)
    write_recipe(run, recipe)
    parts = Keys(recipe, resolve_base("random:llama"), run).stage(name, known)
    stamp = Stamp(key_of(parts), parts, "2026")
    RunFolder(run).begin(name, stamp)
    call = {"step": name, "key": stamp.key, "from_adapter": None, "code": str(folder)}
    return join._Follower(run, config(folder), Machines(2, 1, 2)), call


def test_a_machine_that_would_do_other_work_is_refused(tmp_path: Path, quick: None) -> None:
    follower, call = called(tmp_path, "sft", {})
    follower._check_work(call)
    (tmp_path / "demos.jsonl").write_text('{"prompt": "a", "completion": "c"}\n')
    follower.followed = "another run"
    with pytest.raises(UserError, match="machine 1: has for sft not what machine 0 has: the rows of demos"):
        follower._check_work(call)


def test_a_machine_that_does_not_see_the_stage_before_is_refused(tmp_path: Path, quick: None) -> None:
    follower, call = called(tmp_path, "ppo", {"sft": "k"})
    with pytest.raises(UserError, match="machine 1: has for ppo not what machine 0 has: the stages before it"):
        follower._check_work(call)


def test_who_cannot_take_part_says_so_once(tmp_path: Path, quick: None, capsys) -> None:
    node, other = config(tmp_path, machine_rank=1), config(tmp_path, machine_rank=1, mixed_precision="bf16")
    command = ["join", str(tmp_path), "--launch"]
    with Lead(tmp_path, Machines(2, 0, 2), join.about(node), lambda _: None):
        assert cli.run_command([*command, str(other)]) == 2
        said = capsys.readouterr().err.splitlines()
        assert said[-1].startswith("--launch: mixed_precision is bf16 here and no on machine 0; give all machines")
        assert "takes part" not in "".join(said)
        with Board(tmp_path, 1, state="follows"):
            assert cli.run_command([*command, str(node)]) == 2
        assert "--machine-rank: machine 1 takes part already" in capsys.readouterr().err


def test_who_joins_a_run_ends_with_it(tmp_path: Path, quick: None, capsys) -> None:
    node = config(tmp_path, machine_rank=1)
    ends: list[int] = []

    def command() -> None:
        ends.append(cli.run_command(["join", str(tmp_path), "--launch", str(node)]))

    for error in (None, StageFailed("broken")):
        joined = threading.Thread(target=command)
        try:
            with Lead(tmp_path, Machines(2, 0, 2), join.about(node), lambda _: None):
                joined.start()
                time.sleep(0.2)
                if error is not None:
                    raise error
        except StageFailed:
            pass
        joined.join(timeout=10)
    assert ends == [0, 1]
    said = capsys.readouterr().err
    assert "takes part" in said and "the run is done" in said and "the run failed, machine 0 says why" in said
