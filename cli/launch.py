"""A stage under `accelerate launch`: the chain stays one process; the stage gets as many as the config says."""

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
from ..files import METRICS
from ..models import seams
from .accelerate_config import check_asked, kind_of
from .launched import MODULE, PARENT, ask_to_stop, read_error, read_stopped
from .process import StageFailed

if TYPE_CHECKING:
    from ..stages.job import StageJob


def check_launch(config: Path, on_policy: Sequence[str] = ()) -> None:
    """Whether accelerate can read the config, and the stages that are to run can run under it.

    Args:
        on_policy: the names of those that sample.

    Raises:
        UserError: no such file, or none that `accelerate config` wrote; something in it that a stage cannot have.
    """
    remedy = "write one with `accelerate config --config_file FILE`"
    if not config.is_file():
        raise UserError("--launch", f"no file {str(config)!r}", remedy)
    seams.require(seams.LAUNCHER)
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        found = load_config_from_file(str(config))
    except Exception as error:  # whatever stands in it
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError("--launch", f"{config}: no accelerate config ({said[:200]})", remedy) from error
    check_asked(config, found)
    if kind_of(found) == "DEEPSPEED" and on_policy:
        said = f"{config}: {', '.join(on_policy)} cannot run under DeepSpeed, which would own the optimiser"
        raise UserError("--launch", said, "use --launch ddp or fsdp2, or run the other stages with --until")


def processes_of(config: Path) -> int:
    """How many processes a config that `check_launch` has read asks for."""
    from accelerate.commands.config.config_args import load_config_from_file

    return int(getattr(load_config_from_file(str(config)), "num_processes", None) or 1)


def is_sharded(config: Path) -> bool:
    """Whether a config that `check_launch` has read divides the base among its processes."""
    from accelerate.commands.config.config_args import load_config_from_file

    return kind_of(load_config_from_file(str(config))) == "FSDP"


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
    stage = [str(run_dir), job.name, *([str(from_adapter)] if from_adapter else [])]
    # what is importable here, and functions beside the recipe, must be found in there too
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
    environment |= own_code.environment() | {PARENT: str(os.getpid())}
    with tempfile.TemporaryDirectory(prefix="preftune-launch-") as said:
        command = [sys.executable, "-m", MODULE, "launcher", str(config), said, *stage]
        # they hear of a signal through a file: a terminal's Ctrl-C reaches them too, and should not be heard twice
        with stopping.deferred(lambda number: ask_to_stop(Path(said), number)):
            code = subprocess.Popen(command, env=environment).wait()
        wrong, stopped = read_error(Path(said)), read_stopped(Path(said))
    if stopped is not None:
        raise stopped
    if wrong is not None:
        raise wrong
    if code != 0:
        raise StageFailed(f"{job.name} ended with exit code {code} under accelerate launch")
    return json.loads((job.output_dir / METRICS).read_text(encoding="utf-8"))
