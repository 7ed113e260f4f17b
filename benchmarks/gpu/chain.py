"""The stages of a chain on one base, run as `preftune run` runs them: their memory against what `preftune plan` says,
and an iteration of every method that samples its own rows, phase by phase.

Of an on-policy stage the second iteration is timed (the first one compiles) and the third one profiled: what the card
did in each phase, so that what it waited for shows.
"""

import contextlib
import gc
import io
import json
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

from ...cli.output import Output
from ...cli.plan import plan_recipe
from ...models.loading import resolve_base
from ...models.memory import peak_memory_bytes, reset_peak_memory
from ...recipes.build import stage_job
from ...recipes.load import load_recipe
from ...stages.kinds import KINDS, StageKind
from ...stages.ppo import trainer as loop
from ...stages.run import run_stage
from ..measure import Measured

WARM, TIMED, PROFILED = range(3)
"""Iterations of an on-policy stage."""


def measure(options: dict[str, Any]) -> Iterator[tuple[str, Measured]]:
    """Each stage's memory and time, measured and planned, and the phases of what is on-policy."""
    base = resolve_base(options["base"])
    with tempfile.TemporaryDirectory() as folder:
        run, file = Path(folder) / "run", Path(folder) / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe(options), sort_keys=False), encoding="utf-8")
        loaded, plan = load_recipe(str(file), []), _plan(file, 0.0 if options["tiny"] else 10.0)
        for name in loaded.stages:
            phases = Phases() if KINDS[loaded.stages[name].kind].on_policy is not None else None
            job = stage_job(loaded, name, base, run, run / name)
            with phases.watched() if phases is not None else contextlib.nullcontext():
                metrics = run_stage(job)
            most = max(metrics["peak_memory_bytes"], phases.most if phases is not None else 0)
            yield f"memory of {name}", _against(plan[name], most, metrics)
            if phases is not None:
                yield f"{name} by phase", phases.figures()
            _forget()


def _forget() -> None:
    """Hand back what nothing uses any more."""
    gc.collect()
    torch.cuda.empty_cache()
    reset_peak_memory()


def recipe(options: dict[str, Any]) -> dict[str, Any]:
    """A short chain with every on-policy kind, as a recipe has it."""
    tiny = options["tiny"]
    rows, batch, length = (8, 2, 256) if tiny else (64, 8, 1024)
    cut = {"max_length": length, "overflow": "truncate", "limit": rows}
    short = {"max_prompt_length": length // 2, "overflow": "truncate"}
    train = {"max_steps": 2 if tiny else 6, "per_device_train_batch_size": batch}
    stages: dict[str, dict[str, Any]] = {
        "sft": {"from": "base", "data": "demos", "train": dict(train)},
        "reward": {"from": "sft", "data": "pairs", "train": dict(train)},
        "dpo": {"from": "sft", "data": "pairs", "train": dict(train)},
    }
    for name, kind in KINDS.items():
        if kind.on_policy is not None:
            stages[name] = _on_policy(kind, tiny)
    return {
        "name": "gpu-check",
        "model": {"base": options["base"], "dtype": "bfloat16"},
        "lora": {"r": 16, "alpha": 32},
        "checkpoints": {"share": None, "minutes": None},
        "data": {
            "demos": {"path": "quickstart/demos.jsonl", **cut},
            "pairs": {"path": "quickstart/pairs.jsonl", **cut},
            "prompts": {"path": "quickstart/prompts.jsonl", **short},
        },
        "stages": stages,
    }


def _on_policy(kind: StageKind, tiny: bool) -> dict[str, Any]:
    """Three iterations: of as many words as its method knows."""
    episodes, new, batch = (4, 6, 2) if tiny else (64, 128, 8)
    known = {each.name for each in kind.parameters}
    assert kind.on_policy is not None
    # random weights: nothing is to be learned from what sampler and trainer make of their replies
    asked = {"max_new_tokens": new, "mismatch_tolerance": 10.0}
    asked |= {"rollout_batch_size": episodes, "total_episodes": (PROFILED + 1) * episodes}
    asked[kind.on_policy.mini_batches] = 2
    if kind.on_policy.epochs is not None:
        asked[kind.on_policy.epochs] = 1
    if kind.on_policy.group is not None:
        asked[kind.on_policy.group] = 2 if tiny else 8
    stage: dict[str, Any] = {"from": "sft", "data": "prompts", "train": {"per_device_train_batch_size": batch}}
    if kind.needs_reward:
        stage["reward"] = "reward"
    if kind.needs_teacher:
        stage["teacher"] = {"stage": "dpo"}
    return stage | {key: value for key, value in asked.items() if key in known}


def _plan(file: Path, seconds: float) -> dict[str, dict[str, Any]]:
    """The rows of `preftune plan --json`, by stage."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        plan_recipe(str(file), [], Output(json=True), seconds=seconds)
    rows = [json.loads(line) for line in out.getvalue().splitlines()]
    _forget()
    return {row["stage"]: row for row in rows}


def _against(planned: dict[str, Any], peak: int, metrics: dict[str, Any]) -> Measured:
    free, whole = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    return {
        "measured_bytes": peak,
        "planned_bytes": round(planned["memory GB"] * 1e9),
        "planned / measured": planned["memory GB"] * 1e9 / peak,
        "planned_phases": planned["memory"],
        # what `models/cards.py` makes allowances for
        "most_reserved_bytes": torch.cuda.max_memory_reserved(),
        "taken_beside_bytes": whole - free - reserved,
        "train_seconds": metrics["train_seconds"],
        "planned_seconds": planned["seconds"],
        "tokens_per_second": metrics["tokens_per_second"],
    }


class Phases:
    """What happens in the phases of an on-policy stage's second and third iteration.

    Attributes:
        most: the largest peak of all.
    """

    def __init__(self) -> None:
        self.iteration, self.most = -1, 0
        self.seconds: dict[str, float] = defaultdict(float)
        self.peaks: Counter[str] = Counter()
        self.kernel_seconds: dict[str, float] = defaultdict(float)
        self.kernels: Counter[str] = Counter()
        self.longest: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    @contextmanager
    def watched(self) -> Generator[None]:
        """Within it the loop's phases are measured."""
        build = loop.OnPolicyTrainer._build_roles

        def built(trainer: Any, *args: Any) -> None:
            build(trainer, *args)
            trainer.method.forwards = self._phase("log-probs", trainer.method.forwards)

        with (
            mock.patch.object(loop, "generate", self._phase("rollout", loop.generate, first=True)),
            mock.patch.object(loop.Scoring, "scores", self._phase("scores", loop.Scoring.scores)),
            mock.patch.object(
                loop.OnPolicyTrainer, "_minibatch", self._phase("update", loop.OnPolicyTrainer._minibatch)
            ),
            mock.patch.object(loop.OnPolicyTrainer, "_build_roles", built),
        ):
            yield

    def _phase(self, name: str, function: Callable[..., Any], first: bool = False) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.iteration += first
            if self.iteration == TIMED:
                return self._timed(name, function, args, kwargs)
            if self.iteration == PROFILED and torch.version.cuda is not None:
                return self._profiled(name, function, args, kwargs)
            return function(*args, **kwargs)

        return run

    def _timed(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        torch.cuda.synchronize()
        self.most = max(self.most, peak_memory_bytes() or 0)
        reset_peak_memory()
        began = time.perf_counter()
        out = function(*args, **kwargs)
        torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - began
        self.peaks[name] = max(self.peaks[name], peak_memory_bytes() or 0)
        self.most = max(self.most, self.peaks[name])
        return out

    def _profiled(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Only what the card does is recorded: recording what the host does would slow it."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            out = function(*args, **kwargs)
            torch.cuda.synchronize()
        for event in profiler.events() or ():
            if event.device_type.name == "CUDA":
                spent = event.time_range.elapsed_us() / 1e6
                self.kernel_seconds[name] += spent
                self.kernels[name] += 1
                self.longest[name][event.name[:100]] += spent
        return out

    def figures(self) -> Measured:
        """Of each phase: seconds, their share, the peak; of the profiled iteration kernels and what they took."""
        whole = sum(self.seconds.values()) or 1.0
        return {
            name: {
                "seconds": spent,
                "share": spent / whole,
                "peak_bytes": self.peaks[name],
                "kernels": self.kernels[name] or None,
                "kernel_seconds": self.kernel_seconds[name] if self.kernels[name] else None,
                # of a phase without a profiler: what the card was busy
                "busy": self.kernel_seconds[name] / spent if self.kernels[name] else None,
                "longest": dict(sorted(self.longest[name].items(), key=lambda each: -each[1])[:6]),
            }
            for name, spent in self.seconds.items()
        }
