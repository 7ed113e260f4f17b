"""One work in this process: its figures go to standard output, one a line; whatever else is printed does not."""

import importlib
import json
import os
import sys

from .works import Work


def main() -> None:
    """Arguments: the work as JSON, and the names of the figures that are asked for."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as out:
        # libraries, and what they start, write where they like
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        given = json.loads(sys.argv[1])
        work = Work(**{**given, "names": tuple(given["names"])})
        module = importlib.import_module(f".{work.module}", __package__)
        for name, figures in module.measure({**work.options, "names": sys.argv[2:]}):
            print(json.dumps([name, figures]), file=out, flush=True)


if __name__ == "__main__":
    main()
