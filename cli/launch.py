"""A stage under `accelerate launch`: the chain stays one process; the stage gets as many as the config says."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..files import METRICS
from .launched import MODULE, read_error
from .process import StageFailed

if TYPE_CHECKING:
    from ..stages.job import StageJob


def launch_stage(config: Path, run_dir: Path, job: "StageJob", from_adapter: Path | None) -> Mapping[str, Any]:
    """Run a stage of RUN/recipe.yaml in processes of its own, which write into the job's output folder.

    Args:
        config: a file that `accelerate config` wrote. For several processes on the CPU: `distributed_type: MULTI_CPU`,
            `use_cpu: true`, `num_processes: N`, and nothing about MPI.

    Raises:
        UserError: there is no such config, it cannot be used, or the stage raised one.
        StageFailed: the stage failed in another way.
    """
    if not config.is_file():
        raise UserError("--launch", f"no file {str(config)!r}", "write one with `accelerate config --config_file FILE`")
    stage = [str(run_dir), job.name, *([str(from_adapter)] if from_adapter else [])]
    # functions beside the recipe must be found in there too
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
    with tempfile.TemporaryDirectory(prefix="preftune-launch-") as said:
        command = [sys.executable, "-m", MODULE, "launcher", str(config), said, *stage]
        code = subprocess.run(command, check=False, env=environment).returncode
        wrong = read_error(Path(said))
    if wrong is not None:
        raise wrong
    if code != 0:
        raise StageFailed(f"{job.name} ended with exit code {code} under accelerate launch")
    return json.loads((job.output_dir / METRICS).read_text(encoding="utf-8"))
