"""Stages in two processes by name: whole copies of the base and one that is divided give the same bits."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from preftune.cli import main as cli
from preftune.cli.arguments import apart
from preftune.cli.engines import launch_config, told
from preftune.cli.launch import check_launch, is_sharded, processes_of
from preftune.errors import UserError

TRL = ("sft", "reward", "dpo", "ipo", "kto")
LAUNCHED = ("--num-processes", "2", "--launch")
# steps of 4 rows, an epoch's last of fewer, of which the second process has none of SFT's
ROWS = ["data.demos.limit=5", *(f"data.{name}.limit=7" for name in ("pairs", "judged")), "data.judged.held_out=0.4"]
SHORT = [
    *ROWS,
    *(f"stages.{name}.train.max_steps=2" for name in TRL),
    *("stages.ppo.total_episodes=8", "stages.ppo.num_ppo_epochs=1", "stages.ppo.max_new_tokens=8", "eval=null"),
    # which test_group_processes.py runs in several
    *("stages.grpo=null", "stages.rloo=null"),
]


def batches_of(rows: int) -> list[str]:
    return [f"stages.{name}.train.per_device_{side}_batch_size={rows}" for name in TRL for side in ("train", "eval")]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, preftune_cache: Path) -> Callable[..., Path]:
    """The folder of a run of the smoke recipe up to PPO, in two processes by an engine or in one; made once."""
    made: dict[str, Path] = {}

    def run(engine: str | None = None) -> Path:
        name = engine or "one"
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "run"
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("OMP_NUM_THREADS", "1")
                launch = [*batches_of(2), *LAUNCHED, engine] if engine else batches_of(4)
                words = ["run", "smoke", *SHORT, "--output-dir", str(made[name])]
                assert cli.run_command([*words, *launch]) == 0
        return made[name]

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    stages = sorted(each.parent.name for each in folder.glob("*/adapter_model.safetensors"))
    assert stages == sorted([*TRL, "ppo"])
    read = {stage: load_file(folder / stage / "adapter_model.safetensors") for stage in stages}
    return {f"{stage} {name}": tensor for stage, tensors in read.items() for name, tensor in tensors.items()}


def numbers(folder: Path, file: str, stages: Sequence[str] = (*TRL, "ppo")) -> dict[str, float]:
    """Every number of each stage's metrics.json or log.jsonl, but those of clock, memory and micro-batches."""
    found: dict[str, float] = {}
    for stage in stages:
        text = (folder / stage / file).read_text(encoding="utf-8")
        for line, entry in enumerate([text] if file.endswith(".json") else text.splitlines()):
            for name, value in json.loads(entry).items():
                if isinstance(value, int | float) and not any(
                    word in name for word in ("time", "second", "bytes", "flos", "epoch")
                ):
                    found[f"{stage} {line} {name}"] = value
    return found


@pytest.mark.slow
def test_two_processes_compute_what_one_does(ran: Callable[..., Path]) -> None:
    one, two = ran(), ran("ddp")
    for file in ("metrics.json", "log.jsonl"):
        assert numbers(two, file) == pytest.approx(numbers(one, file), rel=1e-4, abs=1e-4)
    expected = weights(one)
    for name, tensor in weights(two).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_divided_base_gives_the_bits_of_whole_ones(ran: Callable[..., Path], capfd) -> None:
    whole = weights(ran("ddp"))
    capfd.readouterr()
    divided = weights(ran("fsdp2"))
    said = capfd.readouterr().err
    assert said.count("the frozen base is divided among 2 processes: this one holds 1.64 of its 3.29 MB") == 6
    assert all(torch.equal(divided[name], tensor) for name, tensor in whole.items())


LONGER = [*ROWS, *batches_of(2), "stages.sft.train.max_steps=16", "eval=null", "--until", "sft"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, preftune_cache: Path) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert cli.run_command(["run", "smoke", *LONGER, *LAUNCHED, "ddp", "--output-dir", str(out)]) == 0
    return load_file(out / "sft" / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_killed_worker_ends_the_run_and_the_same_command_continues(
    engine: str, uninterrupted: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """The same bits in as many processes; in one the same to rounding."""
    words = ["run", "smoke", *LONGER, *LAUNCHED, engine, "--output-dir", str(tmp_path / "run")]
    with subprocess.Popen(
        [sys.executable, "-m", "preftune.cli.main", *words], stderr=subprocess.PIPE, text=True, env=os.environ
    ) as run:
        log = tmp_path / "run" / ".sft.partial" / "log.jsonl"
        wait_for(lambda: log.is_file() and len(log.read_text().splitlines()) >= 4)
        started = psutil.Process(run.pid).children(recursive=True)
        worker = next(each for each in started if "process" in each.cmdline() and each.environ()["RANK"] == "1")
        worker.kill()
        killed = time.monotonic()
        _, said = run.communicate(timeout=60)
    assert run.returncode == 1 and time.monotonic() - killed < 30
    assert said.splitlines()[-1] == "sft: process 1 was ended by SIGKILL; the same command goes on"
    assert "Traceback" not in said
    wait_for(lambda: not any(each.is_running() for each in started), seconds=5)
    step = [int(each.name.rpartition("-")[2]) for each in log.parent.glob("checkpoints/checkpoint-*")]
    assert step and max(step) < 16
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    assert cli.run_command(words) == 0
    continued = load_file(tmp_path / "run" / "sft" / "adapter_model.safetensors")
    assert all(torch.equal(continued[name], tensor) for name, tensor in uninterrupted.items())
    if engine == "ddp":
        assert cli.run_command([*words[: words.index(LAUNCHED[0])], "--output-dir", str(tmp_path / "alone")]) == 0
        alone = load_file(tmp_path / "alone" / "sft" / "adapter_model.safetensors")
        for name, tensor in uninterrupted.items():
            torch.testing.assert_close(alone[name], tensor, rtol=0, atol=1e-4)
        assert numbers(tmp_path / "alone", "log.jsonl", ["sft"]) == pytest.approx(
            numbers(tmp_path / "run", "log.jsonl", ["sft"]), rel=1e-4, abs=1e-4
        )


def wait_for(is_so: Callable[[], bool], seconds: float = 120) -> None:
    """Until it is so; fails where that takes too long."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_name_becomes_a_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path))
    for name, sharded in (("ddp", False), ("fsdp2", True)):
        config = launch_config(name, 2)
        assert config is not None
        check_launch(config, ["ppo"])
        assert (processes_of(config), is_sharded(config)) == (2, sharded)
        assert yaml.safe_load(config.read_text())["use_cpu"] is not torch.cuda.is_available()
    for name, refused in (("ddp", False), ("fsdp2", True)):
        config = launch_config(name, 2)
        assert config is not None
        with pytest.raises(UserError, match="sft cannot run") if refused else nullcontext():
            check_launch(config, full=["sft"])
    assert launch_config(None, None) is None and launch_config("some.yaml", None) == Path("some.yaml")


@pytest.mark.parametrize(
    ("launch", "processes", "said"),
    [
        ("ddp", None, "without a GPU: how many processes is not said; add --num-processes 2"),
        ("some.yaml", 2, "--num-processes: goes with --launch ddp, fsdp2, zero2 or zero3"),
        (None, 2, "--num-processes: goes with --launch ddp, fsdp2, zero2 or zero3"),
        ("zero3", 2, "zero3 needs DeepSpeed, which is not installed; pip install deepspeed"),
        ("zero2", 2, "zero2 needs DeepSpeed, which is not installed; pip install deepspeed"),
    ],
)
def test_a_launch_that_cannot_be_is_one_line(launch, processes, said: str, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("preftune.cli.engines.find_spec", lambda _: None)
    with pytest.raises(UserError, match=said):
        launch_config(launch, processes)


@pytest.mark.parametrize("zero", [2, 3])
def test_what_an_engine_cannot_do_is_refused_before_anything_trains(zero: int, tmp_path: Path):
    config: dict[str, Any] = {"distributed_type": "DEEPSPEED", "num_processes": 2, "num_machines": 1, "use_cpu": True}
    file = tmp_path / "ds.yaml"
    file.write_text(yaml.safe_dump({**config, "deepspeed_config": {"zero_stage": zero}}))
    check_launch(file)
    said = "ppo cannot run under DeepSpeed, which would own the optimiser; use --launch ddp or fsdp2"
    with pytest.raises(UserError, match=said):
        check_launch(file, ["ppo"])


def test_options_of_accelerate_stand_behind_two_dashes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path))
    assert apart(["a.b=1", "--gpu_ids", "all"]) == (["a.b=1"], ["--gpu_ids", "all"])
    assert apart(None) == ([], []) and told(None, []) is None
    plain = launch_config("ddp", 2)
    assert plain is not None and told(plain, []) == plain
    config = told(plain, ["--max-restarts", "2", "--gpu_ids", "0,1", "--num_processes=4"])
    assert config is not None and config != plain
    found = yaml.safe_load(config.read_text())
    assert (found["max_restarts"], found["gpu_ids"], found["num_processes"]) == (2, "0,1", 4)
    check_launch(config)
    sharded = launch_config("fsdp2", 2)
    assert sharded is not None
    divided = told(sharded, ["--fsdp_offload_params", "true"])
    assert divided is not None
    with pytest.raises(UserError, match="fsdp_offload_params: a share of the base stays on its device"):
        check_launch(divided)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bogus", "3"], "-- --bogus 3: unrecognized arguments: --bogus; accelerate launch --help"),
        (["--num_processes", "x"], "invalid int value: 'x'"),
        (["--rdzv_conf", "a=b"], "-- --rdzv_conf: has no effect on a stage's launch"),
        (["--zero_stage", "1"], "-- --zero_stage: has no effect without DEEPSPEED; use --launch zero2"),
        (["--cpu", "more"], "'more' belongs to no option"),
    ],
)
def test_an_option_that_accelerate_has_not_is_one_line(arguments: list, said: str, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=said):
        told(launch_config("ddp", 2), arguments)
    with pytest.raises(UserError, match=f"-- {arguments[0]}: is for accelerate, and nothing is launched"):
        told(None, arguments)
