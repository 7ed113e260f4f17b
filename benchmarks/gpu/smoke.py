"""The smoke chain on the card against the numbers that it has on a CPU.

    python -m preftune.benchmarks.gpu.smoke        on a CPU: stores them anew, after a change that may change them

Stages that only train must agree to rounding. Those that draw (on-policy, evaluation) must too, until a drawn token
falls on the other side of a rounded number: from there on they say something else, so they are reported and not judged.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..measure import RESULTS, Measured, machine

STORED = RESULTS / "smoke_cpu.json"
TRAINED, ON_POLICY = ("sft", "reward", "dpo", "ipo", "kto"), ("ppo", "grpo", "rloo")
DRAWN = (*ON_POLICY, "eval")
# a GPU logs every fifth step, a CPU each one
SAME_LOGS = tuple(f"stages.{name}.train.logging_steps=1" for name in (*TRAINED, *ON_POLICY))
SAME = ("model.dtype=float32", *SAME_LOGS)
TIMES = ("seconds", "per_second", "peak_memory_bytes")
TOLERANCE = 2e-3
"""What sums in another order may change after three steps in fp32, as a share or in the figure's own unit."""
RUN = "import sys; from preftune.cli.main import main; main()"


def numbers(found: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a JSON value, with its place."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield from numbers(value, f"{place}.{key}")
    elif isinstance(found, list):
        for i, value in enumerate(found):
            yield from numbers(value, f"{place}[{i}]")
    elif isinstance(found, int | float) and not isinstance(found, bool):
        yield place, float(found)


def measured(run: Path) -> dict[str, float]:
    """What a run says of its stages and policies, without times and sizes; of those stages that have ended."""
    files = {name: run / name / "metrics.json" for name in (*TRAINED, *ON_POLICY)}
    files["eval"] = run / "eval" / "results.json"
    return {
        name + place: number
        for name, file in files.items()
        if file.is_file()
        for place, number in numbers(json.loads(file.read_text(encoding="utf-8")))
        if not any(each in place for each in TIMES)
    }


def differences(one: Mapping[str, float], other: Mapping[str, float], tolerance: float) -> dict[str, list[float]]:
    """Where two runs are further apart than that, absolutely and as a share, of the places that both have."""
    return {
        place: [number, other[place]]
        for place, number in one.items()
        if place in other and not math.isclose(number, other[place], rel_tol=tolerance, abs_tol=tolerance)
    }


def stored() -> dict[str, float]:
    """The CPU's numbers."""
    return json.loads(STORED.read_text(encoding="utf-8"))["numbers"]


def measure(options: dict[str, Any]) -> Iterator[tuple[str, Measured]]:
    """How many numbers were compared, and which differ."""
    with tempfile.TemporaryDirectory() as folder:
        found = measured(chain(Path(folder), *(("--until", "reward") if options["tiny"] else ())))
    expected = stored()
    there = {place for place in expected if options["tiny"] is False or place.partition(".")[0] in ("sft", "reward")}
    apart = differences({place: expected[place] for place in there}, found, TOLERANCE)
    drawn = {place: pair for place, pair in apart.items() if place.startswith(DRAWN)}
    yield (
        "against the CPU",
        {
            "compared": len(there & found.keys()),
            "missing": sorted(there - found.keys()),
            "tolerance": TOLERANCE,
            "differ": {place: pair for place, pair in apart.items() if place not in drawn},
            "drawn_differ": len(drawn),
            "drawn": sum(place.startswith(DRAWN) for place in there),
        },
    )


def chain(folder: Path, *words: str) -> Path:
    """Run it there, on the device that there is; the run's folder."""
    command = [sys.executable, "-W", "ignore", "-c", RUN, "run", "smoke", *SAME, *words, "--output-dir", "smoke"]
    done = subprocess.run(command, cwd=folder, stdout=sys.stderr, check=False)
    if done.returncode:
        raise RuntimeError(f"the smoke chain ended with exit code {done.returncode}")
    return folder / "smoke"


def main() -> None:
    """Store the CPU's numbers."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        found = {place: float(f"{number:.7g}") for place, number in measured(chain(Path(folder))).items()}
    STORED.write_text(json.dumps({"machine": machine(), "numbers": found}, indent=1) + "\n", encoding="utf-8")
    print(f"{len(found)} numbers in {STORED}")


if __name__ == "__main__":
    main()
