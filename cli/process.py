"""What every process of the command sets up, and the exit code that it ends with."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeGuard

import typer

from .. import own_code
from ..errors import UserError, UserErrors
from ..faults import system_words
from ..printed import PrintableLogs, printable
from ..stopping import Stopped

if TYPE_CHECKING:
    from ..recipes.schema import Recipe


_INTERRUPTED = 130
"""128 + SIGINT."""


class StageFailed(Exception):
    """A launched stage ended with an exit code other than 0; it has already printed why."""


class _ParserError(Protocol):
    """What click's errors have. typer brings its own copy of click, so their class cannot be imported by name."""

    exit_code: int

    def format_message(self) -> str: ...

    def show(self) -> None: ...


def exit_code_of(work: Callable[[], object], again: str = "the same command") -> int:
    """Run a command, say on standard error what went wrong, and return the exit code.

    Args:
        again: the command that continues, where a signal stops this one.

    Returns:
        What the command returns where that is a number, else 0; 2 for a user's mistake, which is one line without a
        traceback (several, found together: a line each); 128 and the number of a signal that stopped it; 1 for
        anything else.
    """
    try:
        code = work()
        if code == _INTERRUPTED:
            raise KeyboardInterrupt  # which typer turns into that
        return code if isinstance(code, int) else 0
    except UserError as error:
        several = error.errors if isinstance(error, UserErrors) else ()
        for line in str(error).split("\n") if several else [str(error)]:
            print(printable(" ".join(line.split())), file=sys.stderr)
        return 2
    except StageFailed as error:
        print(printable(str(error)), file=sys.stderr)
    except Stopped as stopped:
        for line in filter(None, [stopped.kept, f"{stopped}; continue with: {again}"]):
            print(printable(line), file=sys.stderr)
        return stopped.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted; the same command continues", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        return _wrong_command(error) if _is_parser_error(error) else _unexpected(error)
    return 1


def _unexpected(error: Exception) -> int:
    """One line for what the system refused, else the traceback: of a mistake of ours."""
    code, said = system_words(error) or (1, "".join(traceback.format_exception(error)).rstrip())
    print(printable(said), file=sys.stderr)
    return code


def _is_parser_error(error: object) -> TypeGuard[_ParserError]:
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _wrong_command(error: _ParserError) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "preftune"
        said = " ".join(error.format_message().split()).rstrip(".")
        print(printable(f"{command}: {said}; see `{command} --help`"), file=sys.stderr)
    return int(error.exit_code)


def leave_working_folder() -> None:
    """Take the working folder off `sys.path`, where `python -m` puts it first: a file in it is no library."""
    if not sys.flags.safe_path and sys.path[:1] in ([""], [str(Path.cwd())]):
        del sys.path[0]


def ignore_library_warnings() -> None:
    """Hide warnings about libraries' future versions, which a user can do nothing about; what is said is printable."""
    plain = warnings.formatwarning
    warnings.formatwarning = lambda *args, **kwargs: printable(plain(*args, **kwargs))
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(PrintableLogs())
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(transformers|peft|trl|torch)\.")


def quiet_libraries() -> None:
    """Let transformers print errors only, and the libraries draw progress bars on a terminal only.

    Call it before they are imported: they read these settings from the environment, as the processes that we start do.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def make_functions_importable(recipe: "Recipe") -> None:
    """Have its reward and judge functions found in the recipe's folder and the current one."""
    own_code.look_in(folder for folder in (recipe.folder, Path.cwd()) if folder is not None)
