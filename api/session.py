"""Work of ours in a process that is somebody else's, a notebook's say: it is left as it was found."""

import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from .. import own_code, patience, progress, stopping
from ..cli.process import ignore_library_warnings, quiet_libraries
from ..errors import UserError
from ..stages.kinds import forget_methods


class _AtWork:
    """Which thread works, and how many calls deep: a reward function may score with another model."""

    lock = threading.RLock()
    depth = 0


@contextmanager
def session(quiet: bool = False) -> Generator[None]:
    """Within it the work is done; afterwards signal handlers, random numbers, environment, warnings and what a recipe's
    own code brought are as before, so that one call never shapes the next.

    Args:
        quiet: nothing is said meanwhile, and no progress shown.

    Raises:
        UserError: another thread of this process is at work.
        KeyboardInterrupt: Ctrl-C, or a notebook's stop button; it says what is kept.
        SystemExit: SIGTERM was heard; the exit code is 143.
    """
    if not _AtWork.lock.acquire(blocking=False):
        said = "another thread of this process is at work, and both would share its random numbers"
        raise UserError("preftune", said, "wait for it, or use another process")
    _AtWork.depth += 1
    try:
        if _AtWork.depth > 1:
            yield
            return
        with _left_as_found(), progress.silent(quiet), stopping.signals(guest=True):
            quiet_libraries()
            ignore_library_warnings()
            yield
    except stopping.Stopped as stopped:
        if _AtWork.depth > 1:
            raise
        said = "; ".join(filter(None, [str(stopped), stopped.kept, "the same call continues"]))
        if stopped.number == signal.SIGINT:
            raise KeyboardInterrupt(said) from None
        progress.say(said)
        raise SystemExit(stopped.exit_code) from None
    finally:
        _AtWork.depth -= 1
        _AtWork.lock.release()


@contextmanager
def _left_as_found() -> Generator[None]:
    with ExitStack() as left:
        left.callback(patience.hand_back)
        left.callback(forget_methods)
        left.callback(_restore_environment, dict(os.environ))
        for restore in _random_states():
            left.callback(restore)
        left.callback(setattr, warnings, "formatwarning", warnings.formatwarning)
        if (handler := logging.lastResort) is not None:
            left.callback(handler.setFormatter, handler.formatter)
        left.enter_context(own_code.forgotten())
        left.enter_context(warnings.catch_warnings())
        yield


def _restore_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def _random_states() -> list[Callable[[], Any]]:
    """What puts the global random numbers back, of the libraries that the caller has imported; and torch's kernels."""
    found: list[Callable[[], Any]] = [partial(random.setstate, random.getstate())]
    if (numpy := sys.modules.get("numpy")) is not None:
        found.append(partial(numpy.random.set_state, numpy.random.get_state()))
    if (torch := sys.modules.get("torch")) is not None:
        found.append(partial(torch.set_rng_state, torch.get_rng_state()))
        found.append(partial(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled()))
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            found.append(partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    return found
