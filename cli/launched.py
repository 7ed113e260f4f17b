"""The processes of a launched step: `launch` starts accelerate's launcher, which starts those that train or evaluate.

Both run this module, in two roles (`_launcher` and `_process`). A user's mistake is left behind as a file, so that the
chain, which started them, reports it once.
"""

import atexit
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import progress, stopping
from ..errors import UserError
from ..faults import system_words
from ..files import EVALUATION, RECIPE, write_whole
from ..models import seams
from ..models.whole import SHARD_BASE
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
PEER_GONE = 76
"""The exit code of a process that could not go on because another one had ended, and of a launcher of such alone."""
OF_LAUNCHER = {"max_restarts", "monitor_interval"}
"""What may stand in a config though accelerate takes it on its command line alone."""


def _launcher(config: str, said: str, run_dir: str, step: str, *arguments: str) -> int:
    """Run accelerate's launcher on the config."""
    seams.require(seams.LAUNCHER)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _silence_elastic()
    process = ["-m", MODULE, "process", said, run_dir, step, *arguments]
    try:
        options = _torchrun_options(config)
        config = _plain_config(config, Path(said), trains=_trains(Path(run_dir), step))
        options += _cpu_options(config)
        launch_command(launch_command_parser().parse_args(["--config_file", config, *options, *process]))
    except ChildFailedError as error:
        failed = {rank: each for rank, each in error.failures.items() if each.exitcode not in (PEER_GONE, -15)}
        if not failed:
            return PEER_GONE
        rank, failure = min(failed.items(), key=lambda each: each[1].timestamp)
        return _leave_words(Path(said), f"process {rank} {_ended(failure.exitcode)}")
    except subprocess.CalledProcessError as error:
        return _leave_words(Path(said), f"the process {_ended(error.returncode)}")
    except (SignalException, KeyboardInterrupt):
        return 1
    except (ConnectionError, DistError) as error:
        # accelerate's own look at the port, and what torch says of processes that did not find each other
        return _leave_words(Path(said), f"the processes did not come together: {' '.join(str(error).split())[:300]}")
    except ValueError as error:
        problem = " ".join(str(error).split())
        raise UserError("--launch", f"{config}: {problem}", "write it anew with `accelerate config`") from error
    return 0


def read_values(config: Path) -> dict[str, Any]:
    """What stands in a config's file; nothing where that is no mapping."""
    from ..bounded_yaml import load_bounded

    found = load_bounded(config.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def _trains(run_dir: Path, step: str) -> bool:
    """Whether something trains in it: not in the evaluation, and not in a stage that samples."""
    from ..recipes.load import load_recipe

    if step == EVALUATION or not (recipe := run_dir / RECIPE).is_file():
        return step != EVALUATION
    return load_recipe(recipe).stages[step].record.trains


def _plain_config(config: str, folder: Path, *, trains: bool) -> str:
    """The config to launch a step with, without `OF_LAUNCHER`. One that asks for FSDP becomes one of plain processes
    that divide the frozen base themselves (`models.sharded`): accelerate's FSDP divides the adapters too, and on a CPU
    nothing, without a word.

    Where nothing trains, no engine has anything to do. Each process then has the whole base, which drawing replies
    needs in any case.
    """
    import yaml

    found = read_values(Path(config))
    engine = str(found.get("distributed_type")).upper()
    if not trains and found.get("use_cpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # it would take a GPU where there is one
    plain = engine == "FSDP" or (engine == "DEEPSPEED" and not trains)
    if not plain and not found.keys() & OF_LAUNCHER:
        return config
    found = {key: value for key, value in found.items() if key not in OF_LAUNCHER}
    if plain:
        if trains:
            os.environ[SHARD_BASE] = "1"
        found = {key: value for key, value in found.items() if not key.startswith(("fsdp", "deepspeed"))}
        several = "MULTI_CPU" if found.get("use_cpu") else "MULTI_GPU"
        found["distributed_type"] = several if int(found.get("num_processes") or 1) > 1 else "NO"
    file = folder / "plain.yaml"
    file.write_text(yaml.safe_dump(found), encoding="utf-8")
    return str(file)


def _torchrun_options(config: str) -> list[str]:
    """What its launcher is told of a config besides. It restarts nothing: the chain does, which tells a user's mistake
    from a crash. DeepSpeed's own launcher of several machines would go to the others by ssh, and each is started here
    by itself."""
    found = read_values(Path(config))
    options = ["--monitor_interval", str(found["monitor_interval"])] if "monitor_interval" in found else []
    several = int(found.get("num_machines") or 1) > 1 and str(found.get("distributed_type")).upper() == "DEEPSPEED"
    return [*options, *(["--deepspeed_multinode_launcher", "standard"] if several else [])]


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
        if _peer_is_gone(error):
            write_whole(Path(said) / _LOST, " ".join(str(error).split())[:300])
            return PEER_GONE
        refused = system_words(error)
        return _say_once(Path(said), traceback.format_exc() if refused is None else refused[1])
    return 0


def _peer_is_gone(error: Exception) -> bool:
    """Whether a collective failed because another process is no more: who ended first says why."""
    import torch.distributed

    kinds = (torch.distributed.DistBackendError, torch.distributed.DistNetworkError)
    gone = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and any(each in str(error) for each in gone))


def _run(run_dir: Path, name: str, from_adapter: Path | None) -> None:
    from ..models.loading import resolve_base
    from ..recipes.load import load_recipe

    ignore_library_warnings()
    recipe = load_recipe(run_dir / RECIPE)
    make_functions_importable(recipe)
    base = resolve_base(recipe.base_spec, recipe.model.revision)
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

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):
            os._exit(1)  # it had ended before it was asked for
    os.environ[PARENT] = str(os.getpid())


_STOP, _STOPPED, _LOST, _ENDED = "stop", "stopped", "lost", "ended"
"""The file that asks the processes to stop; what they leave when they have, what one does that lost another, and what
the launcher does of the first that did not end well."""


def ask_to_stop(said: Path, number: int) -> None:
    """Have the processes stop after the step that they are at, for a signal of that number."""
    write_whole(said / _STOP, str(number))


def read_stopped(said: Path) -> Stopped | None:
    """What the processes left when they were stopped by a signal; None if they were not."""
    file = said / _STOPPED
    return Stopped(*json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def read_lost(said: Path) -> str:
    """What one of the processes met that lost another; empty where none did."""
    file = said / _LOST
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _ended(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    with suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"


def _leave_words(said: Path, words: str) -> int:
    write_whole(said / _ENDED, words)
    return 1


def read_words(said: Path) -> str:
    """How the first of the processes ended that did not end well; empty where that is not known."""
    file = said / _ENDED
    return file.read_text(encoding="utf-8") if file.is_file() else ""


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


def _end(code: int) -> None:
    """End this process once its work is done. Python's own end would wait for C++ threads of the process groups, which
    now and then abort it (`terminate called without an active exception`), when all that it made is written."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()  # trackers write their last
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _end_with_parent()
    _hear_no_signal(*sys.argv[1:])
    progress.stamp()
    _end(main(*sys.argv[1:]))
