"""A stage under `accelerate launch`: the chain stays one process, the stage becomes as many as the config says.

The chain calls `launch_stage`, which starts accelerate's launcher (`_launcher`), which starts the stage's processes
(`_process`). What is wrong with the user's input comes back as a file, so that the chain says it, once.
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from ..stages.job import StageJob

_MODULE = f"{__package__}.launch"


class StageFailed(Exception):
    """A launched stage ended with another exit code than 0; its own message stands above."""


def launch_stage(config: Path, run_dir: Path, job: "StageJob", from_adapter: Path | None) -> Mapping[str, Any]:
    """Run the stage of RUN/recipe.yaml in its own processes; it writes into the job's output folder.

    Args:
        config: what `accelerate config` wrote. Several processes on the CPU: `distributed_type: MULTI_CPU`,
            `use_cpu: true`, `num_processes: N`, nothing about MPI.

    Raises:
        UserError: no such config, or one that cannot be used; what the stage raised.
        StageFailed: the stage failed.
    """
    if not config.is_file():
        raise UserError("--launch", f"no file {str(config)!r}", "write one with `accelerate config --config_file FILE`")
    stage = [str(run_dir), job.name, *([str(from_adapter)] if from_adapter else [])]
    # functions beside the recipe must be found in there too
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
    with tempfile.TemporaryDirectory(prefix="preftune-launch-") as said:
        command = [sys.executable, "-m", _MODULE, "launcher", str(config), said, *stage]
        code = subprocess.run(command, check=False, env=environment).returncode
        wrong = _read_error(Path(said))
    if wrong is not None:
        raise wrong
    if code != 0:
        raise StageFailed(f"{job.name} ended with exit code {code} under accelerate launch")
    return json.loads((job.output_dir / "metrics.json").read_text(encoding="utf-8"))


def _launcher(config: str, said: str, *stage: str) -> int:
    """accelerate's launcher on the config."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _silence_elastic()
    process = ["-m", _MODULE, "process", said, *stage]
    try:
        args = launch_command_parser().parse_args(["--config_file", config, *_cpu_options(config), *process])
        launch_command(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _say_once(Path(said), f"process {rank} ended with exit code {failure.exitcode}")
    except subprocess.CalledProcessError as error:
        return _say_once(Path(said), f"the process ended with exit code {error.returncode}")
    except (SignalException, KeyboardInterrupt):
        return 1
    except ValueError as error:
        problem = " ".join(str(error).split())
        raise UserError("--launch", f"{config}: {problem}", "write it anew with `accelerate config`") from error
    return 0


def _cpu_options(config: str) -> list[str]:
    """What accelerate must be told beside a config for several processes on the CPU.

    Its launcher starts those through mpirun, and one process only where the config names no host file. Its launcher
    for several GPUs is torchrun, which starts processes on CPUs as well; they find each other through gloo.
    """
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    try:
        found: Any = load_config_from_file(config)
    except (AttributeError, TypeError, KeyError) as error:  # not a mapping, or without what every config has
        raise ValueError(f"no accelerate config ({error})") from error
    several = found.distributed_type == DistributedType.MULTI_CPU and found.num_processes > 1
    if not several or found.mpirun_config:
        return []
    os.environ["ACCELERATE_USE_CPU"] = "true"
    return ["--multi_gpu"]


def _silence_elastic() -> None:
    """torchrun's own words on a process that failed: that process and `_launcher` say what there is to say."""
    import logging

    elastic = logging.getLogger("torch.distributed.elastic")
    elastic.addHandler(logging.NullHandler())
    elastic.propagate = False


def _process(said: str, run_dir: str, name: str, from_adapter: str | None = None) -> int:
    """One of the stage's processes."""
    try:
        _run(Path(run_dir), name, Path(from_adapter) if from_adapter else None)
    except UserError:
        raise
    except KeyboardInterrupt:
        return 1
    except Exception:
        return _say_once(Path(said), traceback.format_exc())
    return 0


def _run(run_dir: Path, name: str, from_adapter: Path | None) -> None:
    from ..models.loading import resolve_base
    from ..recipes.build import stage_job
    from ..recipes.load import load_recipe
    from ..stages.job import run_stage
    from .chain import import_from_here
    from .folder import RunFolder
    from .main import calm

    calm()
    recipe = load_recipe(run_dir / "recipe.yaml")
    import_from_here(recipe)
    base = resolve_base(recipe.model.base, recipe.model.revision)
    output = RunFolder(run_dir).partial(name)
    run_stage(stage_job(recipe, name, base, run_dir, output, from_adapter))
    _leave_group()


def _leave_group() -> None:
    """A process that ends with its group still open is now and then aborted by one of the group's threads."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _end_with_parent() -> None:
    """Asked for by the launcher and the processes: a killed chain leaves nobody who goes on writing into its folder."""
    if sys.platform == "linux":
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _say_once(said: Path, words: str) -> int:
    """On standard error, unless a process left a `UserError`: then the others ended because that one did."""
    if _read_error(said) is None:
        print(words, file=sys.stderr)
    return 1


def _write_error(said: Path, error: UserError) -> None:
    file = said / f"{os.environ.get('RANK', 'launcher')}.json"
    beside = file.with_suffix(".tmp")
    beside.write_text(json.dumps([error.where, error.problem, error.remedy]), encoding="utf-8")
    beside.replace(file)


def _read_error(said: Path) -> UserError | None:
    """The first process' error; None where there is none."""
    files = sorted(said.glob("*.json"))
    return UserError(*json.loads(files[0].read_text(encoding="utf-8"))) if files else None


def main(role: str, *arguments: str) -> int:
    """A launcher or a stage's process; `said`, the folder for errors, is among its arguments."""
    work: Callable[..., int]
    work, said = (_launcher, arguments[1]) if role == "launcher" else (_process, arguments[0])
    try:
        return work(*arguments)
    except UserError as error:
        _write_error(Path(said), error)
        return 2


if __name__ == "__main__":
    _end_with_parent()
    sys.exit(main(*sys.argv[1:]))
