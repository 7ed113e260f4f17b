"""`--launch`: a stage in several processes, and what happens when one of them meets a user's mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from preftune.cli import launched
from preftune.cli import main as cli
from preftune.errors import UserError

TWO_ON_CPU = {"distributed_type": "MULTI_CPU", "use_cpu": True, "num_machines": 1, "num_processes": 2,
              "main_process_port": 0}  # fmt: skip

# each process leaves its rank and the number of processes in a file; the second can be told to answer wrongly
REWARDS = """\
import os
from pathlib import Path

def noted(prompts, completions, **_):
    Path(os.environ["SEEN"], os.environ["RANK"]).write_text(os.environ["WORLD_SIZE"])
    return [float(len(text)) for text in completions]

def noted_but_the_second_fails(prompts, completions, **_):
    return noted(prompts, completions)[int(os.environ["RANK"]):]
"""


def write(file: Path, **values: object) -> Path:
    file.write_text(yaml.safe_dump(values))
    return file


def ppo(folder: Path, function: str, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """(exit code, standard error) of the smoke recipe's PPO on the bare base, one iteration of one step."""
    config = write(folder / "config.yaml", **TWO_ON_CPU)
    words = ["from=base", f"reward={{function: 'launched_rewards:{function}'}}", "total_episodes=4",
             "num_ppo_epochs=1", "num_mini_batches=1"]  # fmt: skip
    arguments = ["ppo", "smoke", *(f"stages.ppo.{word}" for word in words)]
    arguments += ["--output-dir", str(folder / "run"), "--launch", str(config)]
    code = cli.run_command(arguments)
    return code, capfd.readouterr().err


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a module of rewards that the stage's processes can import, and `seen` for what they leave."""
    (tmp_path / "launched_rewards.py").write_text(REWARDS)
    (tmp_path / "seen").mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delitem(sys.modules, "launched_rewards", raising=False)
    return tmp_path


@pytest.mark.slow
def test_a_stage_runs_in_as_many_processes_as_the_config_says(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, err = ppo(folder, "noted", capfd)
    assert code == 0, err
    assert {file.name: file.read_text() for file in (folder / "seen").iterdir()} == {"0": "2", "1": "2"}
    stage = folder / "run" / "ppo"
    assert {"adapter_model.safetensors", "lineage.json", "metrics.json"} <= {file.name for file in stage.iterdir()}
    assert not (stage / "checkpoints").exists()
    assert json.loads((stage / "metrics.json").read_text())["episodes"] == 4
    with (stage / "log.jsonl").open(encoding="utf-8") as lines:
        assert len([line for line in lines if "objective/kl" in line]) == 1  # of one process, not of each


@pytest.mark.slow
def test_a_mistake_that_one_process_meets_is_one_line_and_exit_code_2(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, err = ppo(folder, "noted_but_the_second_fails", capfd)
    assert code == 2, err
    assert err.strip() == (
        "reward launched_rewards:noted_but_the_second_fails: noted_but_the_second_fails returned 1 scores for "
        "2 completions; "
        "return one number (or None) for each completion"
    )
    assert sorted(os.listdir(folder / "seen")) == ["0", "1"]
    entry = json.loads((folder / "run" / "run.json").read_text())["stages"]["ppo"]
    assert entry["state"] == "failed" and "returned 1 scores" in entry["error"]


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        ({}, ["--multi_gpu"]),
        ({"num_processes": 1}, []),
        ({"mpirun_config": {"mpirun_hostfile": "hosts"}}, []),
        ({"distributed_type": "MULTI_GPU", "use_cpu": False}, []),
    ],
)
def test_only_several_cpu_processes_without_mpi_go_through_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict, options: list
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    config = write(tmp_path / "config.yaml", **TWO_ON_CPU | changed)
    assert launched._cpu_options(str(config)) == options
    assert os.environ["ACCELERATE_USE_CPU"] == ("true" if options else "false")


FSDP = {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}
DEEPSPEED = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}}


@pytest.mark.parametrize(
    ("step", "engine", "several", "shards"),
    [
        ("sft", FSDP, "MULTI_CPU", "1"),
        ("eval", FSDP, "MULTI_CPU", None),
        ("sft", DEEPSPEED, "DEEPSPEED", None),
        ("eval", DEEPSPEED, "MULTI_CPU", None),
        ("eval", {}, "MULTI_CPU", None),
    ],
)
def test_no_engine_has_anything_to_do_in_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, engine: dict, several: str, shards: str | None
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv(launched.SHARD_BASE, "0")
    monkeypatch.delenv(launched.SHARD_BASE)  # and it is gone again at the end
    file = launched._plain_config(
        str(write(tmp_path / "config.yaml", **TWO_ON_CPU | engine)), tmp_path, trains=step == "sft"
    )
    found = yaml.safe_load(Path(file).read_text())
    assert (found["distributed_type"], found["num_processes"]) == (several, 2)
    plain = several == "MULTI_CPU"
    assert not plain or not any(name.startswith(("fsdp", "deepspeed")) for name in found)
    assert os.environ.get(launched.SHARD_BASE) == shards
    # where the config asks for a CPU, the evaluation takes no GPU
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("" if step == "eval" else "0")


def test_what_accelerate_takes_on_its_command_line_alone_may_stand_in_a_config(tmp_path: Path) -> None:
    asked = TWO_ON_CPU | {"max_restarts": 2, "monitor_interval": 0.5}
    config = write(tmp_path / "config.yaml", **asked)
    plain = launched._plain_config(str(config), tmp_path, trains=True)
    assert yaml.safe_load(Path(plain).read_text()) == TWO_ON_CPU
    assert launched._torchrun_options(str(config)) == ["--monitor_interval", "0.5"]
    several = write(tmp_path / "several.yaml", **TWO_ON_CPU | {"num_machines": 2, "distributed_type": "DEEPSPEED"})
    assert launched._torchrun_options(str(several)) == ["--deepspeed_multinode_launcher", "standard"]


@pytest.mark.parametrize(
    ("error", "is_gone"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:27019"), True),
        (torch.distributed.DistNetworkError("the client socket has been closed"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_only_a_collective_that_lost_a_process_is_passed_over(tmp_path, monkeypatch, capsys, error, is_gone) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(launched, "_run", broken)
    assert launched.main("process", str(tmp_path), "run", "sft") == (launched.PEER_GONE if is_gone else 1)
    assert ("Traceback" in capsys.readouterr().err) is not is_gone
    assert (launched.read_lost(tmp_path) == str(error)) is is_gone


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hello", "no accelerate config"),
        ("num_processes: 2", "A `distributed_type` must be specified"),
        ("{distributed_type: MULTI_CPU, processes: 2}", "unknown keys"),
        ("{distributed_type: MULTI_GPU}", "num_processes"),
    ],
)
def test_a_config_that_cannot_be_used_is_an_error_in_words(tmp_path: Path, text: str, words: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(text)
    with pytest.raises(UserError, match=f"(?s)--launch: .*config.yaml: .*{words}"):
        launched._launcher(str(config), str(tmp_path), "run", "sft")


def test_a_users_mistake_silences_what_it_does_to_the_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the connection was closed by the other process")

    def mistaken(*_: object) -> None:
        raise UserError("there", "wrong", "put it right")

    # on its own it is told in full
    monkeypatch.setattr(launched, "_run", broken)
    assert launched.main("process", str(tmp_path), "run", "ppo") == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setattr(launched, "_run", mistaken)
    monkeypatch.setenv("RANK", "1")
    assert launched.main("process", str(tmp_path), "run", "ppo") == 2
    monkeypatch.setattr(launched, "_run", broken)
    assert launched.main("process", str(tmp_path), "run", "ppo") == 1
    assert capsys.readouterr() == ("", "")
    assert str(launched.read_error(tmp_path)) == "there: wrong; put it right"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_a_killed_chain_leaves_no_process_behind() -> None:
    child = "import time; from preftune.cli.launched import _end_with_parent as end; end(); print(1, flush=True)"
    child += "; time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "1\n"
        process.kill()
        # the end of the pipe comes when the child, which holds its other end, is gone
        assert process.communicate(timeout=30) == ("", None)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process is not told that its parent has ended")
def test_a_process_whose_parent_ended_before_it_could_ask_ends(tmp_path) -> None:
    command = [sys.executable, "-m", launched.MODULE, "process", str(tmp_path), "no run", "sft"]
    environment = {**os.environ, launched.PARENT: "0"}
    ended = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (1, "")
