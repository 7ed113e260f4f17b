"""Reading and encoding preference pairs for DPO: rows a second, the memory of all processes, what a second stage takes.

    python -m preftune.benchmarks.encoding --rows 1000000
    python -m preftune.benchmarks.encoding --rows 200000 --against FOLDER --rounds 3   # an older version, in turns

The rows are made from a seed and streamed to a file: a question of about 100 bytes and two replies of about 300 each,
of sentences that people wrote about deliveries, with words and numbers in every reply that no other row has. FOLDER
holds a folder `preftune` with the other version. Every measurement is a process of its own with an empty cache; what
is measured is `stages.run.load_data` of a DPO stage: read, checked, split, encoded, ready for the trainer.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..data.sources import find
from ..progress import meter
from .measure import alternate, machine, product_rate, write_result
from .workload import base

_SYLLABLES = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]

_MEASURED = """
import json, sys, threading, time
from pathlib import Path
file, folder, out, rounds = sys.argv[1:5]
from preftune.data.encode import encode_pairs
from preftune.data.spec import DataSpec, SourceSpec
from preftune.models.loading import resolve_base
from preftune.stages.job import StageJob
from preftune.stages.run import load_data, open_tokenizer

def memory(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines if line[:2] == "Vm" or line[:3] == "Rss")
    return {name: int(found[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon")}

def family(pid):
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(each for child in children for each in family(int(child)))]

peak, over = {"VmRSS": 0, "RssAnon": 0, "processes": 0}, threading.Event()
def watch():
    import os
    while not over.wait(0.1):
        now = {"VmRSS": 0, "RssAnon": 0, "processes": 0}
        for pid in family(os.getpid()):
            try:
                found = memory(pid)
            except (OSError, KeyError):
                continue
            now = {name: now[name] + found.get(name, 1) for name in now}
        for name in peak:
            peak[name] = max(peak[name], now[name])

def job(name):
    spec = DataSpec((SourceSpec(file),), max_length=1024)
    return StageJob(name=name, kind="dpo", base=resolve_base(folder), data=spec, output_dir=Path(out) / name)

stage = job("dpo")
tokenizer = open_tokenizer(stage)
before = memory("self")
threading.Thread(target=watch, daemon=True).start()
seconds = []
for _ in range(int(rounds)):
    began = time.perf_counter()
    data = load_data(stage, encode_pairs, tokenizer)
    seconds.append(time.perf_counter() - began)
over.set()
print(json.dumps({"rows": len(data.train), "seconds": seconds[0], "rows_per_second": len(data.train) / seconds[0],
    "again_seconds": seconds[1:], "peak_bytes": peak["VmRSS"], "peak_anonymous_bytes": peak["RssAnon"],
    "processes": peak["processes"], "before_bytes": before["VmRSS"], "fingerprint": data.fingerprint,
    "first": data.train[0]["chosen_ids"][:8], "last": data.train[-1]["rejected_ids"][-8:]}))
"""


def make_rows(rows: int, file: Path, seed: int = 0) -> Path:
    """Pairs of about 100 and twice 300 bytes, a thousand at a time; the same for the same seed."""
    shipped = find("quickstart/pairs.jsonl", ())
    assert shipped is not None
    known = [json.loads(line) for line in shipped.read_text(encoding="utf-8").splitlines()]
    questions = sorted({row["prompt"] for row in known})
    said = sorted({part for row in known for side in ("chosen", "rejected") for part in _sentences(row[side])})
    draw = np.random.default_rng(seed)

    def reply() -> str:
        words = ["".join(_SYLLABLES[i] for i in draw.integers(0, len(_SYLLABLES), 4)) for _ in range(2)]
        parts = [said[i] for i in draw.integers(0, len(said), 4)]
        own = f"Ask for {words[0]} {words[1].title()}, case {draw.integers(10**6)}."
        return " ".join([*parts[:2], own, *parts[2:]])

    with file.open("w", encoding="utf-8") as out, meter("rows made", rows) as show:
        for number in range(rows):
            prompt = f"{questions[draw.integers(len(questions))]} (case {number})"
            out.write(json.dumps({"prompt": prompt, "chosen": reply(), "rejected": reply()}) + "\n")
            if number % 1000 == 0:
                show(number)
    return file


def _sentences(text: str) -> list[str]:
    return [each.strip() for each in re.split(r"(?<=[.!?]) ", text) if len(each) > 20]


def measured(file: Path, version: Path | None, rounds: int = 1, processes: int | None = None) -> dict[str, Any]:
    """One measurement by the version in a folder, or this one."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PREFTUNE_CACHE": cache, "TRANSFORMERS_VERBOSITY": "error"}
        environment.pop("TOKENIZERS_PARALLELISM", None)
        if version is not None:
            environment["PYTHONPATH"] = str(version.resolve())
        if processes is not None:
            environment["PREFTUNE_DATA_PROCESSES"] = str(processes)
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            _MEASURED,
            str(file.resolve()),
            str(base().path),
            cache,
            str(rounds),
        ]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=cache)
        if run.returncode:
            raise RuntimeError(run.stderr[-3000:])
        found = json.loads(run.stdout.strip().splitlines()[-1])
        rows = Path(cache) / "rows"
        found["bytes_on_disk"] = sum(each.stat().st_size for each in rows.rglob("*") if each.is_file())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--file", type=Path, help="keep the rows there, or take them from there")
    parser.add_argument("--against", type=Path, help="a folder with another version's `preftune`")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--processes", type=int, help="that encode; default: one for each core")
    parser.add_argument("--name", help="of the result file; default: none is written")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = args.file or Path(folder) / "pairs.jsonl"
        if not file.is_file():
            make_rows(args.rows, file)
        sides = {"ours": None, **({"before": args.against} if args.against else {})}
        began = time.time()
        rates = [product_rate()]

        def one(side: str) -> dict[str, Any]:
            return measured(file, sides[side], 2 if side == "ours" else 1, args.processes)

        found = alternate(list(sides), args.rounds, one)
        rates.append(product_rate())
        speeds = {side: statistics.median(run["rows_per_second"] for run in runs) for side, runs in found.items()}
        result = {
            "machine": machine(),
            "cores": len(os.sched_getaffinity(0)),
            "product_rate": rates,
            "rows": args.rows,
            "bytes": file.stat().st_size,
            "rows_per_second": speeds,
            **({"times": speeds["ours"] / speeds["before"]} if args.against else {}),
            "seconds": time.time() - began,
            "runs": found,
        }
    print(json.dumps(result, indent=2))
    if args.name:
        write_result(args.name, result)


if __name__ == "__main__":
    main()
