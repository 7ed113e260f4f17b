"""SFT, reward model and DPO: our stages against TRL's own trainers, alternating, each measurement in its own process.

    python -m preftune.benchmarks.training --data hh_harmless.jsonl.gz

Sides: `ours`; `padded` (ours with `packed: false`); `trl` (TRL's defaults); `trl tuned` (the best that its options
allow, see `sides.TUNED`). The first step of every run warms up and is not counted. Peak memory is that of the process.
The useful share is the rate at which a side does the arithmetic that the work needs (counted on our packed forward), in
parts of the rate of a large bf16 matrix product measured in the same run.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from .measure import StepClock, alternate, machine, measured_apart, product_rate, write_result
from .workload import equal_pairs, real_pairs, write_rows

KINDS = ("sft", "reward", "dpo")
SIDES = ("ours", "padded", "trl", "trl tuned")


def main() -> None:
    args = _arguments()
    if args.worker:
        print(json.dumps(_measure(args.worker, args)))
        return
    rows = (args.steps + 1) * args.batch
    pairs = equal_pairs(rows, args.equal) if args.equal else real_pairs(args.data, rows, args.max_length)
    with tempfile.TemporaryDirectory(prefix="preftune-benchmark-") as folder:
        tables = []
        for kind in args.kinds:
            file = Path(folder) / f"{kind}.jsonl"
            write_rows(pairs, kind, file)
            for checkpointing in args.checkpointing:
                said = f"{kind}, gradient checkpointing {'on' if checkpointing else 'off'}"
                print(said, file=sys.stderr, flush=True)
                compared = _compare(kind, file, checkpointing, args)
                tables.append({"kind": kind, "checkpointing": bool(checkpointing), **compared})
                print(_table(said, tables[-1]), flush=True)
    result = {
        "machine": machine(),
        "work": f"{args.equal} tokens a row, nothing shared" if args.equal else Path(args.data).name,
        "pairs": args.steps * args.batch,
        "batch": args.batch,
        "rounds": args.rounds,
        "base": "SmolLM2-135M-Instruct bf16, LoRA r=16 all-linear",
        "tables": tables,
    }
    print(write_result(args.name, result))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(Path(__file__).parents[1] / "data/quickstart/pairs.jsonl"))
    parser.add_argument("--equal", type=int, default=0, help="instead of --data: so many tokens a row, nothing shared")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--checkpointing", nargs="+", type=int, choices=(0, 1), default=[0, 1])
    parser.add_argument("--steps", type=int, default=6, help="measured steps, after one that warms up")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=1024, help="longer pairs are left out on all sides")
    parser.add_argument("--name", default="training", help="of the file in benchmarks/results")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _compare(kind: str, rows: Path, checkpointing: int, args: argparse.Namespace) -> dict[str, Any]:
    common = ["--kinds", kind, "--rows", str(rows), "--checkpointing", str(checkpointing)]
    common += ["--steps", str(args.steps), "--batch", str(args.batch)]

    def measure(side: str) -> dict[str, Any]:
        return measured_apart(f"{__package__}.training", ["--worker", side, *common])

    found = alternate(args.sides, args.rounds, measure)
    rate = product_rate()
    needed = measured_apart(f"{__package__}.training", ["--worker", "ours", "--count", *common])["flops"]
    examples = args.steps * args.batch
    sides: dict[str, dict[str, Any]] = {}
    for side, each in found.items():
        seconds = statistics.median(one["seconds"] for one in each)
        peak = max(one["peak_memory_bytes"] for one in each)
        sides[side] = {
            "examples_per_second": examples / seconds,
            "tokens_per_second": each[0]["tokens"] / seconds,
            "peak_memory_gb": peak / 1e9,
            "useful_share": needed / seconds / rate,
            "seconds": [one["seconds"] for one in each],
            "losses": each[0]["losses"],
        }
    for side, mine in sides.items():
        for peer in ("trl", "trl tuned"):
            if peer in sides and side != peer:
                mine[f"speed / {peer}"] = mine["examples_per_second"] / sides[peer]["examples_per_second"]
                mine[f"memory / {peer}"] = mine["peak_memory_gb"] / sides[peer]["peak_memory_gb"]
    return {"product_gflops": rate / 1e9, "needed_gflop": needed / 1e9, "sides": sides}


def _measure(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a worker does: train `steps` + 1 steps."""
    from .sides import our_trainer, trl_trainer

    kind = args.kinds[0]
    train = train_fields(args.steps + 1, args.batch, checkpointing=bool(args.checkpointing[0]))
    with tempfile.TemporaryDirectory() as output:
        if side in ("ours", "padded"):
            trainer = our_trainer(kind, args.rows, train, Path(output), packed=side == "ours")
        else:
            trainer = trl_trainer(kind, args.rows, train, Path(output), tuned=side == "trl tuned")
        if args.count:
            return {"flops": _count_flops(trainer, args.steps)}
        return timed(trainer)


def train_fields(steps: int, batch: int, *, checkpointing: bool) -> dict[str, Any]:
    """What every side's config is given."""
    return {
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "gradient_checkpointing": checkpointing,
        "seed": 0,
        # all sides count the same rows: those after the first batches
        "train_sampling_strategy": "sequential",
        **({} if _cuda() else {"use_cpu": True}),
    }


def timed(trainer: Any, warm: int = 1) -> dict[str, Any]:
    """Train to the end; the first `warm` steps are not counted."""
    clock = StepClock(warm)
    trainer.add_callback(clock)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    steps = len(clock.ends)
    tokens = getattr(trainer, "_total_train_tokens", 0) * (steps - warm) / steps
    return {"seconds": clock.seconds, "peak_memory_bytes": clock.peak, "tokens": tokens, "losses": losses}


def _count_flops(trainer: Any, steps: int) -> float:
    """Arithmetic of forward, backward and loss over the measured steps, as executed."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import TrainerCallback

    counter = FlopCounterMode(display=False)

    class AfterTheFirst(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                counter.__enter__()

    trainer.add_callback(AfterTheFirst())
    trainer.train()
    counter.__exit__(None, None, None)
    return float(counter.get_total_flops())


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _table(title: str, compared: dict[str, Any]) -> str:
    head = ("", "examples/s", "tokens/s", "GB", "useful share", "x trl", "GB / trl", "x tuned", "GB / tuned")
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for side, one in compared["sides"].items():
        cells = [
            f"{one['examples_per_second']:.3f}",
            f"{one['tokens_per_second']:.0f}",
            f"{one['peak_memory_gb']:.1f}",
            f"{one['useful_share']:.0%}",
        ]
        for peer in ("trl", "trl tuned"):
            cells += [f"{one[key]:.2f}" if key in one else "" for key in (f"speed / {peer}", f"memory / {peer}")]
        lines.append("| " + " | ".join([side, *cells]) + " |")
    return f"\n{title}; matrix product {compared['product_gflops']:.0f} GFLOP/s\n\n" + "\n".join(lines)


if __name__ == "__main__":
    main()
