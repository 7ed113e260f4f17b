"""Which of lm-eval's tasks are asked: found, loaded with their data, and refused where they cannot be answered here."""

import logging
import random
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError, nearest
from ..spec import Benchmarks

PLACE = "eval.benchmarks"
INSTALL = "pip install 'preftune[lm-eval]'"
SEED, FEWSHOT_SEED = 0, 1234
"""lm-eval's own: of Python's and NumPy's generators in a task's code, and of the choice of its examples."""
_ANSWERED = {"loglikelihood", "loglikelihood_rolling", "multiple_choice", "generate_until"}
GENERATION = {
    *("until", "do_sample", "temperature", "top_p", "top_k"),
    *("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"),
}
"""What a task may say of its generation; anything else would be left out in silence."""


@dataclass(frozen=True)
class Loaded:
    """Tasks with their data.

    Attributes:
        tasks: name -> lm-eval's Task. whole: what lm-eval's `evaluate` takes, groups included.
        version: of lm-eval.
    """

    tasks: Mapping[str, Any]
    whole: Any
    version: str


def load_tasks(asked: Benchmarks) -> Loaded:
    """Finds and loads the tasks; those of `include_path` first. Their Python runs, and data may be fetched.

    Raises:
        UserError: lm-eval is not installed, a task is unknown, its data cannot be had, or it asks for what no policy
            here can do (images, code that would be run, settings of the generation that we do not have).
    """
    version = _installed()
    with quiet():
        manager = _manager(asked)
        try:
            whole = manager.load(list(asked.tasks))
        except Exception as error:
            raise _not_loaded(asked, error) from error
    tasks = whole["tasks"]
    for name, task in tasks.items():
        _check(name, task)
        if asked.num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=asked.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return Loaded(tasks, whole, version)


@contextmanager
def quiet() -> Generator[None]:
    """lm-eval says errors only, and draws no bars: whoever asks has a meter. The random generators are its own."""
    import datasets
    import lm_eval.api.task as home

    log = logging.getLogger("lm_eval")
    before, bar = log.level, getattr(home, "tqdm", None)
    hides = not sys.stderr.isatty() and datasets.are_progress_bars_disabled() is False
    if hides:
        datasets.disable_progress_bars()
    states = random.getstate(), np.random.get_state()
    log.setLevel(logging.ERROR)
    if bar is not None:
        home.tqdm = lambda rows, **_: rows
    random.seed(SEED)
    np.random.seed(FEWSHOT_SEED)
    try:
        yield
    finally:
        log.setLevel(before)
        if bar is not None:
            home.tqdm = bar
        if hides:
            datasets.enable_progress_bars()
        random.setstate(states[0])
        np.random.set_state(states[1])


def _installed() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lm_eval")
    except PackageNotFoundError:
        raise UserError(PLACE, "needs lm-eval, which is not installed", INSTALL) from None


def _manager(asked: Benchmarks) -> Any:
    """Of the tasks beside the recipe alone, where they are all that is asked for: reading the others takes seconds."""
    from lm_eval.tasks import TaskManager

    own: Any = None
    if asked.include_path is not None:
        if not asked.include_path.is_dir():
            said = f"{asked.include_path} is no folder"
            raise UserError(f"{PLACE}.include_path", said, "give the folder of the tasks' YAML files")
        own = TaskManager(include_path=str(asked.include_path), include_defaults=False)
    if own is None and all(_is_file(name) for name in asked.tasks):
        return TaskManager(include_defaults=False)
    if own is not None and all(_is_file(name) or own.match_tasks([name]) for name in asked.tasks):
        return own
    manager = TaskManager(include_path=None if asked.include_path is None else str(asked.include_path))
    for name in asked.tasks:
        if not _is_file(name) and not manager.match_tasks([name]):
            raise UserError(f"{PLACE}.tasks", f"lm-eval has no task {name!r}", nearest(name, manager.all_tasks))
    return manager


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def _not_loaded(asked: Benchmarks, error: Exception) -> UserError:
    """In one line; what could not be fetched is told apart from what is wrong with a task's file."""
    said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    chain: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in chain:
        chain.append(one)
        one = one.__cause__ or one.__context__
    names = {each.__name__ for found in chain for each in type(found).__mro__}
    network = {"ConnectionError", "ConnectError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "HfHubHTTPError"}
    remedy = (
        "run it once where there is a network, or give tasks with data of your own (include_path)"
        if names & network
        else "correct the task's file; `lm-eval validate --tasks NAME --include_path DIR` says more"
    )
    return UserError(f"{PLACE}.tasks", f"{', '.join(asked.tasks)} cannot be loaded: {said}", remedy)


def _check(name: str, task: Any) -> None:
    where = f"{PLACE}.tasks"
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(where, f"{name} runs code that a model has written", "ask it with lm-eval itself, in a sandbox")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(where, f"{name} shows images, and a policy here reads text alone", "leave it out")
    kind = task.get_config("output_type") or getattr(task, "OUTPUT_TYPE", None)
    if kind not in _ANSWERED:
        raise UserError(
            where, f"{name} asks for {kind!r}, expected one of {', '.join(sorted(_ANSWERED))}", "leave it out"
        )
    said = task.get_config("generation_kwargs") if kind == "generate_until" else None
    if unknown := sorted(set(said or {}) - GENERATION):
        raise UserError(
            where, f"{name} sets {', '.join(unknown)} of its generation, which has no effect here", "leave it out"
        )
