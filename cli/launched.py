"""The processes of a launched step: `launch` starts accelerate's launcher, which starts those that train or evaluate.

Both run this module, in two roles (`_launcher` and `_process`). A user's mistake is left behind as a file, so that the
chain, which started them, reports it once.
"""

import json
import logging
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import stopping
from ..errors import UserError
from ..faults import system_words
from ..files import EVALUATION, RECIPE, write_whole
from ..models import seams
from ..models.sharded import SHARD_BASE
from ..printed import printable
from ..stopping import Stopped
from .folder import RunFolder
from .process import ignore_library_warnings, make_functions_importable

if TYPE_CHECKING:
    from ..models.base import Base
    from ..recipes.schema import Recipe

MODULE = f"{__package__}.launched"
"""What `python -m` takes."""
PARENT = "PREFTUNE_LAUNCHED_BY"
"""The environment's word for the process that started this one."""


def _launcher(config: str, said: str, run_dir: str, step: str, *arguments: str) -> int:
    """Run accelerate's launcher on the config."""
    seams.require(seams.LAUNCHER)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _silence_elastic()
    process = ["-m", MODULE, "process", said, run_dir, step, *arguments]
    try:
        config = _without_engine(config, Path(said), step)
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


def _without_engine(config: str, folder: Path, step: str) -> str:
    """The config to launch a step with. One that asks for FSDP becomes one of plain processes that divide the frozen
    base themselves (`models.sharded`): accelerate's FSDP divides adapters too, and on a CPU nothing, without a word.

    An evaluation trains nothing, so no engine has anything to do in it; each process has the whole base, which drawing
    replies needs in any case.
    """
    import yaml

    from ..bounded_yaml import load_bounded

    found = load_bounded(Path(config).read_text(encoding="utf-8"))
    engine = str(found.get("distributed_type")).upper() if isinstance(found, dict) else ""
    if step == EVALUATION and isinstance(found, dict) and found.get("use_cpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # it would take a GPU where there is one
    if engine not in (("FSDP", "DEEPSPEED") if step == EVALUATION else ("FSDP",)):
        return config
    if step != EVALUATION:
        os.environ[SHARD_BASE] = "1"
    found = {key: value for key, value in found.items() if not key.startswith(("fsdp", "deepspeed"))}
    several = "MULTI_CPU" if found.get("use_cpu") else "MULTI_GPU"
    found["distributed_type"] = several if int(found.get("num_processes") or 1) > 1 else "NO"
    plain = folder / "plain.yaml"
    plain.write_text(yaml.safe_dump(found), encoding="utf-8")
    return str(plain)


def _cpu_options(config: str) -> list[str]:
    """What accelerate must be told in addition to a config for several processes on the CPU.

    Its launcher starts those through mpirun, or just one process if the config names no host file. Its launcher
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
    """Drop torchrun's own report of a failed process: that process and `_launcher` say all there is to say."""
    elastic = logging.getLogger("torch.distributed.elastic")
    elastic.addHandler(logging.NullHandler())
    elastic.propagate = False


def _process(said: str, run_dir: str, name: str, from_adapter: str | None = None) -> int:
    """One of the step's processes."""
    try:
        _run(Path(run_dir), name, Path(from_adapter) if from_adapter else None)
    except UserError:
        raise
    except Stopped as stopped:
        write_whole(Path(said) / _STOPPED, json.dumps([stopped.number, str(stopped)]))
        _leave_group()
    except Exception as error:
        refused = system_words(error)
        return _say_once(Path(said), traceback.format_exc() if refused is None else refused[1])
    return 0


def _run(run_dir: Path, name: str, from_adapter: Path | None) -> None:
    from ..models.loading import resolve_base
    from ..recipes.load import load_recipe

    ignore_library_warnings()
    recipe = load_recipe(run_dir / RECIPE)
    make_functions_importable(recipe)
    base = resolve_base(recipe.model.base, recipe.model.revision)
    if name == EVALUATION:
        _evaluate(recipe, base, run_dir)
    else:
        _train(recipe, base, run_dir, name, from_adapter)
    _leave_group()


def _train(recipe: "Recipe", base: "Base", run_dir: Path, name: str, from_adapter: Path | None) -> None:
    from ..recipes.build import stage_job
    from ..stages.run import run_stage

    output = RunFolder(run_dir).partial(name)
    run_stage(stage_job(recipe, name, base, run_dir, output, from_adapter))


def _evaluate(recipe: "Recipe", base: "Base", run_dir: Path) -> None:
    from ..eval.run import run_eval
    from ..eval.shared import is_first, together
    from ..recipes.build import eval_spec

    with together():
        if not is_first():
            # what libraries and we warn of, the first process says
            logging.disable(logging.WARNING)
            warnings.simplefilter("ignore")
        run_eval(eval_spec(recipe, base, run_dir), run_dir)


def _leave_group() -> None:
    """Close the process group: a process that ends without doing so is now and then aborted by one of its threads."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _end_with_parent() -> None:
    """Have this process killed when its parent ends, so that a killed chain leaves nobody writing into its folder."""
    if sys.platform == "linux":
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):
            os._exit(1)  # it had ended before it was asked for
    os.environ[PARENT] = str(os.getpid())


_STOP, _STOPPED = "stop", "stopped"
"""The file that asks the processes to stop, and the one that they leave when they have."""


def ask_to_stop(said: Path, number: int) -> None:
    """Have the processes stop after the step that they are at, for a signal of that number."""
    write_whole(said / _STOP, str(number))


def read_stopped(said: Path) -> Stopped | None:
    """What the processes left when they were stopped by a signal; None if they were not."""
    file = said / _STOPPED
    return Stopped(*json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def _say_once(said: Path, words: str) -> int:
    """Print it on standard error, unless a process left a `UserError`: the others ended because that one did."""
    if read_error(said) is None:
        print(printable(words), file=sys.stderr)
    return 1


def _write_error(said: Path, error: UserError) -> None:
    file = said / f"{os.environ.get('RANK', 'launcher')}.json"
    write_whole(file, json.dumps([error.where, error.problem, error.remedy]))


def read_error(said: Path) -> UserError | None:
    """The first process's `UserError`; None if there is none."""
    files = sorted(said.glob("*.json"))
    return UserError(*json.loads(files[0].read_text(encoding="utf-8"))) if files else None


def main(role: str, *arguments: str) -> int:
    """Run as the launcher or as one of the step's processes; the folder for errors is among the arguments."""
    work: Callable[..., int]
    work, said = (_launcher, arguments[1]) if role == "launcher" else (_process, arguments[0])
    try:
        return work(*arguments)
    except UserError as error:
        _write_error(Path(said), error)
        return 2


def _hear_no_signal(role: str, *arguments: str) -> None:
    """Leave signals to the chain, whose word comes as a file."""
    if role == "launcher":
        stopping.ignore()
        # torchrun would take one for itself, and end the processes without their checkpoint
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    else:
        stopping.listen(Path(arguments[0]) / _STOP)


if __name__ == "__main__":
    _end_with_parent()
    _hear_no_signal(*sys.argv[1:])
    sys.exit(main(*sys.argv[1:]))
