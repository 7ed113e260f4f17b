"""What a GPU does with preftune, measured on the day there is one.

    make gpu-check                         the short form: under nine minutes
    make gpu-check GPU="--full"            more shapes, kinds and sides, without a limit of time

Figures are kept in benchmarks/results/gpu_CARD.json as they come. Called again, it does what is missing there: what was
cut off, what failed, what there was no time for. The exit code is 1 where a test of the card or the chain's numbers
failed, 3 where something is missing.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch

from ...version import __version__
from ..measure import RESULTS, machine
from .runner import Findings, run
from .summary import tables, wrong
from .works import FULL, SHORT, works

SHORT_SECONDS = 510


def main() -> None:
    args = _arguments()
    if not torch.cuda.is_available():
        sys.exit("gpu-check: no CUDA device is visible to this PyTorch (torch.cuda.is_available() is false)")
    if args.tiny and args.output is None:
        sys.exit("gpu-check: --tiny is a rehearsal whose figures say nothing: give it an --output of its own")
    about: dict[str, Any] = {**machine(), "preftune": __version__, "cuda": torch.version.cuda}
    about["memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    about["capability"] = list(torch.cuda.get_device_capability())
    name = f"gpu_{re.sub(r'[^a-z0-9]+', '_', about['device'].lower()).strip('_')}.json"
    findings = Findings.read((args.output or RESULTS) / name, about, beside=None if args.tiny else RESULTS / name)
    wanted = works(args.bases or (FULL if args.full else SHORT), full=args.full, tiny=args.tiny)
    wanted = [work for work in wanted if not args.only or any(word in key for word in args.only for key in work.keys)]
    for key in [key for work in wanted if args.again for key in work.keys]:
        findings.found.pop(key, None)
    left = run(wanted, findings, args.seconds or (None if args.full else SHORT_SECONDS))
    print(tables(findings.found), flush=True)
    print(findings.file, flush=True)
    for work in left:
        why = findings.failed.get(work.title, "no time was left: call it again")
        print(f"missing: {work.title} ({', '.join(findings.missing(work))}): {why}", flush=True)
    problems = wrong(findings.found)
    for line in problems:
        print(f"WRONG: {line}", flush=True)
    sys.exit(1 if problems else 3 if left else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu-check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="more shapes, kinds and sides")
    parser.add_argument("--seconds", type=float, help=f"in all; {SHORT_SECONDS}, in the full form no limit")
    parser.add_argument("--bases", nargs="+", help=f"base specs instead of {', '.join(SHORT)}")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only what has one of these words in its name")
    parser.add_argument("--again", action="store_true", help="measure anew what is there already")
    parser.add_argument("--output", type=Path, help="folder of the file instead of benchmarks/results")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: sizes that say nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
