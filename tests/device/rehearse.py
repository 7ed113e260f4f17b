"""Runs a program on the shadow device, in this process:

    python tests/device/rehearse.py run smoke --output-dir OUT     any preftune command
    python tests/device/rehearse.py FILE.py ARGUMENTS              a script
    python tests/device/rehearse.py FILE.py::FUNCTION '{"n": 1}'   a function of a file, with arguments as JSON

SHADOW_N=2 shows two devices, SHADOW_CC=8.9 another compute capability, SHADOW_GB=24 another size of memory,
SHADOW_BACKEND=eager compiles less. With
SHADOW_REPORT=FILE what was launched, waited for and held is written there as JSON at the end, and what the function
returned.
"""

import atexit
import importlib.util
import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import shadow  # before torch, which the rest imports


def report() -> dict[str, Any]:
    """What was done since the start, or the program's last `shadow.reset`."""
    return {
        "launches": shadow.launches(),
        "syncs": shadow.syncs_by_name(),
        "uploads": shadow.uploads(),
        "downloads": shadow.downloads(),
        "allocations": [shadow.allocations(index) for index in range(shadow.DEVICES)],
        "peak_bytes": [shadow.peak_bytes(index) for index in range(shadow.DEVICES)],
    }


def call(file: str, function: str, arguments: dict[str, Any]) -> Any:
    """What a function of a file returns, which must be JSON."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)(**arguments)


def run(arguments: list[str]) -> Any:
    """The program that the arguments name, as if it had been started itself; what it returned, if it is a function."""
    first = arguments[0] if arguments else ""
    if "::" in first:
        file, function = first.split("::")
        return call(file, function, json.loads(arguments[1]) if len(arguments) > 1 else {})
    if first.endswith(".py"):
        sys.argv = arguments
        runpy.run_path(first, run_name="__main__")
    else:
        from preftune.cli.main import main as preftune

        sys.argv = ["preftune", *arguments]
        preftune()
    return None


def finish(code: int) -> None:
    """End this process now. The interpreter's own end would race with the devices' threads of autograd, which may not
    have let go of the last step's Python objects yet and need the interpreter for it."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> int:
    """Run, report; the exit code."""
    code, returned = 0, None
    try:
        returned = run(sys.argv[1:])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    if path := os.environ.get("SHADOW_REPORT"):
        Path(path).write_text(json.dumps({**report(), "returned": returned}))
    return code


if __name__ == "__main__":
    finish(main())
