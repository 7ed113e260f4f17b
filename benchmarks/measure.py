"""What the benchmarks share: a process of its own for each measurement, the clock, the machine, the result file."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..models.memory import peak_memory_bytes, reset_peak_memory

RESULTS = Path(__file__).parent / "results"
Measured = dict[str, Any]
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate")


class StepClock(TrainerCallback):
    """Seconds of the training loop from the end of the first steps (which warm up) to the end of the last.

    `seconds` covers all that happens in between: data loading, forward, backward, optimiser, logging.
    """

    def __init__(self, warm: int = 1) -> None:
        self.warm = warm
        self.ends: list[float] = []
        self.peak = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        reset_peak_memory()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.peak = peak_memory_bytes()

    @property
    def seconds(self) -> float:
        return self.ends[-1] - self.ends[self.warm - 1]


def measured_apart(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run `python -m module arguments` and read its last line of output as JSON: no memory, cache or thread pool of one
    measurement reaches the next."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        said = f"{module} {' '.join(arguments)} ended with exit code {run.returncode}"
        raise RuntimeError(f"{said}:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.strip().splitlines()[-1])


def product_rate(dtype: torch.dtype = torch.bfloat16, size: int = 2048, seconds: float = 2.0) -> float:
    """FLOP/s of a square matrix product on this device: what the hardware gives when nothing is in the way."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = size * 4 if device.type == "cuda" else size
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def timed(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    timed(3)
    times = max(3, int(seconds / max(timed(3) / 3, 1e-6)))
    return times * 2 * size**3 / timed(times)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    named = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            named = line.partition(":")[2].strip()
            break
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{named}, {torch.get_num_threads()} threads"
    )
    return {
        "device": device,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
        "date": datetime.now(UTC).date().isoformat(),
    }


def summary(runs: Sequence[Mapping[str, Any]], rate: str) -> dict[str, Any]:
    """A side's runs: the median of their `rate` (units a second), the largest peak memory (GB), and each of them."""
    return {
        rate: statistics.median(one[rate] for one in runs),
        "peak_memory_gb": max(one["peak_memory_bytes"] for one in runs) / 1e9,
        "runs": list(runs),
    }


def write_result(name: str, result: Mapping[str, Any]) -> Path:
    """benchmarks/results/<name>.json"""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return file


@contextmanager
def figure(file: Path, columns: int, width: float, height: float) -> Iterator[list[Any]]:
    """Axes side by side, written to an SVG whose text is text and whose bytes depend on the numbers alone."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "preftune"}):
        drawn, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
        for axis in axes[0]:
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        yield list(axes[0])
        drawn.savefig(file, metadata={"Date": None})
        plt.close(drawn)


def alternate(sides: Sequence[str], rounds: int, measure: Callable[[str], Measured]) -> dict[str, list[Measured]]:
    """Measure every side once a round, the order turned round each time, so that a drifting machine favours nobody."""
    found: dict[str, list[Measured]] = {side: [] for side in sides}
    for turn in range(rounds):
        for side in sides if turn % 2 == 0 else reversed(sides):
            found[side].append(measure(side))
            print(f"  round {turn + 1}, {side}: {found[side][-1]}", file=sys.stderr, flush=True)
    return found
