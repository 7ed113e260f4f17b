"""A step under `accelerate launch`: the chain stays one process; a stage, and the evaluation, get as many as the config
says."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import own_code, stopping
from ..errors import UserError
from ..files import EVALUATION, METRICS, RESULTS
from ..models import seams
from ..progress import say
from ..stopping import Stopped
from .accelerate_config import check_asked, check_precision, kind_of
from .launched import (
    MODULE,
    OF_LAUNCHER,
    PARENT,
    PEER_GONE,
    ask_to_stop,
    read_error,
    read_lost,
    read_stopped,
    read_values,
    read_words,
)
from .machines import GRACE, LOOK, Lead, LostMachine, Machines
from .process import StageFailed

if TYPE_CHECKING:
    from ..eval.results import ResultRow
    from ..stages.job import StageJob

_OF_ONE = {"machine_rank", "gpu_ids", "main_process_ip", "same_network", "debug", "enable_cpu_affinity"}
"""What the machines of a run need not have alike in their configs."""


def check_launch(config: Path, on_policy: Sequence[str] = (), full: Sequence[str] = ()) -> None:
    """Whether accelerate can read the config, and the stages that are to run can run under it.

    Args:
        on_policy: the names of those that sample. full: of those that train all weights.

    Raises:
        UserError: no such file, or none that `accelerate config` wrote; something in it that a stage cannot have.
    """
    remedy = "write one with `accelerate config --config_file FILE`"
    if not config.is_file():
        raise UserError("--launch", f"no file {str(config)!r}", remedy)
    seams.require(seams.LAUNCHER)
    try:
        found = _read(config)
    except Exception as error:  # whatever stands in it
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError("--launch", f"{config}: no accelerate config ({said[:200]})", remedy) from error
    for name, kinds in (("max_restarts", int), ("monitor_interval", int | float)):
        value = read_values(config).get(name, 1)
        if not isinstance(value, kinds) or isinstance(value, bool) or value < 0:
            raise UserError("--launch", f"{config}: {name} is {value!r}, expected a number from 0", "correct it")
    check_asked(config, found)
    if kind_of(found) == "DEEPSPEED" and on_policy:
        said = f"{config}: {', '.join(on_policy)} cannot run under DeepSpeed, which would own the optimiser"
        raise UserError("--launch", said, "use --launch ddp or fsdp2, or run the other stages with --until")
    if full and kind_of(found) in ("DEEPSPEED", "FSDP"):
        said = f"{config}: {', '.join(full)} cannot run under an engine that divides what trains (full: true)"
        raise UserError("--launch", said, "use --launch ddp, or run the other stages with --until")


def _read(config: Path) -> Any:
    """The config as accelerate reads it, which knows nothing of `OF_LAUNCHER`; raises what it raises."""
    from accelerate.commands.config.config_args import load_config_from_file

    values = read_values(config)
    if not values.keys() & OF_LAUNCHER:
        return load_config_from_file(str(config))
    with tempfile.TemporaryDirectory(prefix="preftune-launch-") as folder:
        plain = Path(folder) / "config.json"
        plain.write_text(json.dumps({key: value for key, value in values.items() if key not in OF_LAUNCHER}))
        return load_config_from_file(str(plain))


def check_dtype(config: Path, dtype: str) -> None:
    """Whether a config that `check_launch` has read asks for no other precision than the recipe's. Raises UserError."""
    check_precision(config, _read(config), dtype)


def processes_of(config: Path) -> int:
    """How many processes a config that `check_launch` has read asks for."""
    return int(getattr(_read(config), "num_processes", None) or 1)


def is_sharded(config: Path) -> bool:
    """Whether a config that `check_launch` has read divides the base among its processes."""
    return kind_of(_read(config)) == "FSDP"


def alike(config: Path) -> dict[str, str]:
    """What the configs of all machines of a run must say alike, with accelerate's defaults: by key, as text."""
    values = vars(_read(config))
    values["mixed_precision"] = values["mixed_precision"] or "no"  # what accelerate takes an unset one for
    return {key: str(getattr(each, "value", each)) for key, each in sorted(values.items()) if key not in _OF_ONE}


def machines_of(config: Path, *, joins: bool) -> Machines:
    """The machines of a config that `check_launch` has read.

    Args:
        joins: whether this one is to join a run, and not to lead it.

    Raises:
        UserError: it cannot do so with this config.
    """
    found = _read(config)
    count, rank = (int(getattr(found, key, None) or least) for key, least in (("num_machines", 1), ("machine_rank", 0)))
    processes = processes_of(config)
    here = f"preftune join RUN --launch {config}"
    deepspeed = (getattr(found, "deepspeed_config", None) or {}).get("deepspeed_multinode_launcher")
    wrong: Sequence[tuple[bool, str, str]] = (
        (joins and count == 1, "num_machines is 1: there is nothing to join", "give that of a run on several machines"),
        (not 0 <= rank < count, f"machine_rank is {rank} of {count} machines", "number them from 0"),
        (joins and rank == 0, "machine_rank is 0, which is the machine that runs the recipe",
         "give every other machine its own, from 1 on (--machine-rank)"),
        (not joins and rank > 0, f"machine_rank is {rank}, and machine 0 runs the recipe", f"here, {here}"),
        (count > 1 and bool(getattr(found, "mpirun_config", None)), "mpirun would start all machines' processes",
         "leave mpirun_config out"),
        (count > 1 and deepspeed not in (None, "standard"), f"deepspeed_multinode_launcher is {deepspeed}, which starts"
         " the other machines itself", "leave it out"),
        (count > 1 and not found.main_process_ip, "several machines, no main_process_ip", "name machine 0's address"),
        (count > 1 and not found.main_process_port, "several machines, no main_process_port that all know",
         "name one that is free on machine 0, such as 29500"),
        (processes < count or processes % count > 0,
         f"num_processes is {processes}, counted over {count} machines", "every machine has as many: give a multiple"),
    )  # fmt: skip
    for is_wrong, problem, remedy in wrong:
        if is_wrong:
            raise UserError("--launch", f"{config}: {problem}", remedy)
    if count > 1 and not found.use_cpu and found.gpu_ids in (None, "all"):
        import torch

        if (gpus := torch.cuda.device_count()) > processes // count:
            say(f"{gpus} GPUs are here for {processes // count} processes: num_processes counts those of all machines")
    return Machines(count, rank, processes, found.main_process_ip or "", int(found.main_process_port or 0))


def launch_stage(
    config: Path, run_dir: Path, job: "StageJob", from_adapter: Path | None, lead: Lead | None = None, key: str = ""
) -> Mapping[str, Any]:
    """Run a stage of RUN/recipe.yaml in processes of its own, which write into the job's output folder. What a crash
    ends goes on from the last checkpoint, as often as the config's max_restarts says (accelerate's default: never), and
    where another machine was lost and comes back.

    Args:
        config: a file that `accelerate config` wrote. For several processes on the CPU: `distributed_type: MULTI_CPU`,
            `use_cpu: true`, `num_processes: N`, and nothing about MPI.
        lead: where the config has several machines. key: what the stage is made for, for them.

    Raises:
        UserError: the config cannot be used, or the stage raised one.
        Stopped: a signal stopped it.
        StageFailed: the stage failed in another way.
    """
    from ..stages.run import finished

    found = _attempts(config, run_dir, job.name, from_adapter, lead, key, "its last checkpoint", lambda: finished(job))
    return json.loads((job.output_dir / METRICS).read_text(encoding="utf-8")) if found is None else found


def launch_evaluation(config: Path, run_dir: Path, lead: Lead | None = None, key: str = "") -> "list[ResultRow]":
    """Evaluate RUN/recipe.yaml in processes of its own, which share its rows; the first writes RUN/eval. Arguments and
    errors as for a stage.

    Returns:
        The rows of results.json.
    """
    _attempts(config, run_dir, EVALUATION, None, lead, key, "the replies that are kept", lambda: None)
    return json.loads((run_dir / EVALUATION / RESULTS).read_text(encoding="utf-8"))


def _attempts(
    config: Path,
    run_dir: Path,
    step: str,
    from_adapter: Path | None,
    lead: Lead | None,
    key: str,
    kept: str,
    finished: "Callable[[], Mapping[str, Any] | None]",
) -> "Mapping[str, Any] | None":
    """A step, as often as it takes; what `finished` finds after an attempt that ended badly, else None.

    Args:
        kept: what the next attempt goes on from, in words.
    """
    left = int(read_values(config).get("max_restarts", 0))
    while True:
        if lead is not None:
            lead.start(step, key, from_adapter)
        try:
            _attempt(config, run_dir, step, from_adapter, lead)
            return None
        except LostMachine as lost:
            say(f"{lost}; it goes on from {kept} once that is back")
        except StageFailed as failed:
            if not left:
                raise StageFailed(f"{failed}; the same command goes on") from None
            left -= 1
            say(f"{failed}; it goes on from {kept}, and may do so {left} times more")
        if (found := finished()) is not None:
            return found


def _attempt(config: Path, run_dir: Path, step: str, from_adapter: Path | None, lead: Lead | None) -> None:
    """This machine's share of a step, once; raises what `launch_stage` does, and LostMachine."""
    share = run_share(config, run_dir, step, from_adapter, None if lead is None else lead.trouble)
    if lead is not None:
        lead.end(share.code)
    if share.stopped is not None:
        raise share.stopped
    if share.error is not None:
        raise share.error
    if share.code and lead is not None:
        raise lead.why(share.code, share.words)
    if share.code:
        raise StageFailed(f"{step}: {share.words or f'its launcher ended with exit code {share.code}'}")


@dataclass(frozen=True)
class Share:
    """How this machine's processes of a step ended: an exit code, 0 where all is well, and what they left behind."""

    code: int
    error: UserError | None = None
    stopped: Stopped | None = None
    words: str = ""


def run_share(
    config: Path, run_dir: Path, step: str, from_adapter: Path | None, trouble: Callable[[], bool] | None
) -> Share:
    """Run this machine's processes of a step to their end.

    Args:
        trouble: is asked now and then whether the other machines' have ended; then these have to, soon.
    """
    # what is importable here, and functions beside the recipe, must be found in there too
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
    environment |= own_code.environment() | {PARENT: str(os.getpid())}
    # torch's C++ warns with a page of addresses where a store ends before its clients, as the last one always does
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    work = [str(run_dir), step, *([str(from_adapter)] if from_adapter else [])]
    with tempfile.TemporaryDirectory(prefix="preftune-launch-") as folder:
        said = Path(folder)
        command = [sys.executable, "-m", MODULE, "launcher", str(config), folder, *work]
        # they hear of a signal through a file: a terminal's Ctrl-C reaches them too, and should not be heard twice
        with stopping.deferred(lambda number: ask_to_stop(said, number)):
            process = subprocess.Popen(command, env=environment)
            code = process.wait() if trouble is None else _wait(process, trouble)
        words = f"the processes lost each other: {read_lost(said)}" if code == PEER_GONE else read_words(said)
        return Share(code, read_error(said), read_stopped(said), words)


def _wait(process: "subprocess.Popen[bytes]", trouble: Callable[[], bool]) -> int:
    """The exit code of a launcher; it is ended, and its processes with it, where the others' have been for a while."""
    since: float | None = None
    while process.poll() is None:
        if not trouble():
            since = None
        elif since is None:
            since = time.monotonic()
        elif time.monotonic() - since > GRACE:
            process.kill()
            process.wait()
            return PEER_GONE
        time.sleep(LOOK)
    return process.returncode
