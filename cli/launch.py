"""A step under `accelerate launch`: the chain stays one process; a stage, and the evaluation, get as many as the config
says."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import own_code, stopping
from ..errors import UserError
from ..files import EVALUATION, METRICS, RESULTS
from ..models import seams
from .engines import INSTEAD_OF_ZERO3, ZERO3
from .launched import MODULE, PARENT, ask_to_stop, read_error, read_stopped
from .process import StageFailed

if TYPE_CHECKING:
    from ..eval.results import ResultRow
    from ..stages.job import StageJob


def check_launch(config: Path, on_policy: Sequence[str] = ()) -> None:
    """Whether accelerate can read the config, and the stages that are to run can run under it.

    Args:
        on_policy: the names of those that sample.

    Raises:
        UserError: no such file, or none that `accelerate config` wrote; an engine that a stage cannot have.
    """
    remedy = "write one with `accelerate config --config_file FILE`"
    if not config.is_file():
        raise UserError("--launch", f"no file {str(config)!r}", remedy)
    seams.require(seams.LAUNCHER)
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        load_config_from_file(str(config))
    except Exception as error:  # whatever stands in it
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError("--launch", f"{config}: no accelerate config ({said[:200]})", remedy) from error
    kind, zero = _engine(config)
    if zero == 3:
        raise UserError("--launch", f"{config}: {ZERO3}", INSTEAD_OF_ZERO3)
    if kind == "DEEPSPEED" and on_policy:
        said = f"{config}: {', '.join(on_policy)} cannot run under DeepSpeed, which would own the optimiser"
        raise UserError("--launch", said, "use --launch ddp or fsdp2, or run the other stages with --until")


def _engine(config: Path) -> tuple[str, int]:
    """(accelerate's kind of processes, DeepSpeed's stage or 0) of a config."""
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(config))
    kind = str(getattr(found.distributed_type, "value", found.distributed_type))
    zero = (getattr(found, "deepspeed_config", None) or {}).get("zero_stage", 2) if kind == "DEEPSPEED" else 0
    return kind, int(zero)


def processes_of(config: Path) -> int:
    """How many processes a config that `check_launch` has read asks for."""
    from accelerate.commands.config.config_args import load_config_from_file

    return int(getattr(load_config_from_file(str(config)), "num_processes", None) or 1)


def is_sharded(config: Path) -> bool:
    """Whether a config that `check_launch` has read divides the base among its processes."""
    return _engine(config)[0] == "FSDP"


def launch_stage(config: Path, run_dir: Path, job: "StageJob", from_adapter: Path | None) -> Mapping[str, Any]:
    """Run a stage of RUN/recipe.yaml in processes of its own, which write into the job's output folder.

    Args:
        config: a file that `accelerate config` wrote. For several processes on the CPU: `distributed_type: MULTI_CPU`,
            `use_cpu: true`, `num_processes: N`, and nothing about MPI.

    Raises:
        UserError: the config cannot be used, or the stage raised one.
        Stopped: a signal stopped it.
        StageFailed: the stage failed in another way.
    """
    _launch(config, run_dir, job.name, *([str(from_adapter)] if from_adapter else []))
    return json.loads((job.output_dir / METRICS).read_text(encoding="utf-8"))


def launch_evaluation(config: Path, run_dir: Path) -> "list[ResultRow]":
    """Evaluate RUN/recipe.yaml in processes of its own, which share the rows and write RUN/eval; errors as for a stage.

    Returns:
        The rows of results.json.
    """
    _launch(config, run_dir, EVALUATION)
    return json.loads((run_dir / EVALUATION / RESULTS).read_text(encoding="utf-8"))


def _launch(config: Path, run_dir: Path, step: str, *arguments: str) -> None:
    """Run a stage, or the evaluation, of RUN/recipe.yaml in the config's processes."""
    # what is importable here, and functions beside the recipe, must be found in there too
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
    environment |= own_code.environment() | {PARENT: str(os.getpid())}
    with tempfile.TemporaryDirectory(prefix="preftune-launch-") as said:
        command = [sys.executable, "-m", MODULE, "launcher", str(config), said, str(run_dir), step, *arguments]
        # they hear of a signal through a file: a terminal's Ctrl-C reaches them too, and should not be heard twice
        with stopping.deferred(lambda number: ask_to_stop(Path(said), number)):
            code = subprocess.Popen(command, env=environment).wait()
        wrong, stopped = read_error(Path(said)), read_stopped(Path(said))
    if stopped is not None:
        raise stopped
    if wrong is not None:
        raise wrong
    if code != 0:
        raise StageFailed(f"{step} ended with exit code {code} under accelerate launch")
