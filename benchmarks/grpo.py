"""GRPO and RLOO: our trainers against TRL's own, alternating, each measurement in its own process.

    python -m preftune.benchmarks.grpo --method grpo --passes 1

Both sides: the same 16 prompts an iteration, 8 replies each of 64 tokens that nothing ends (or, with `--natural`, to
their own end), one optimiser step a pass over them, bf16 base, LoRA r=16 on all linear layers, a reward function that
takes no time, no gradient checkpointing. TRL's side once for each setting of `PEER` that is asked for: sequences in a
forward, and the cache of its `generate`. The first iteration warms up and is not counted.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..data.encode import encode_prompts
from ..data.load import load_rows
from ..data.spec import DataSpec, SourceSpec
from ..models.adapters import AdapterSet
from ..models.loading import load_model
from ..models.tokens import load_tokenizer, prepare_model
from .measure import StepClock, alternate, machine, measured_apart, product_rate, summary, write_result
from .ppo import NEVER
from .sides import LORA
from .workload import base

PROMPTS, GENERATIONS, NEW, LONGEST, TEMPERATURE, SEED = 16, 8, 64, 128, 0.7, 42
EPISODES = PROMPTS * GENERATIONS
OURS = "ours"
PEER: dict[str, dict[str, Any]] = {
    "trl 4": {"per_device_train_batch_size": 4},
    "trl 8": {"per_device_train_batch_size": 8},
    "trl 32": {"per_device_train_batch_size": 32},
    "trl 128": {"per_device_train_batch_size": 128},
    "trl 32 static": {"per_device_train_batch_size": 32, "cache_implementation": "static"},
}
"""TRL's side, by how many sequences stand in a forward; the rest of an optimiser step is accumulated."""


def main() -> None:
    args = _arguments()
    if args.worker:
        print(json.dumps(_measure(args.worker, args)))
        return
    shared = [
        f"--method={args.method}", f"--passes={args.passes}", f"--iterations={args.iterations}", f"--beta={args.beta}",
        f"--data={args.data}", *(["--natural"] if args.natural else []),
        *([f"--adapter={args.adapter}"] if args.adapter else []),
    ]  # fmt: skip
    found = alternate(
        args.sides,
        args.rounds,
        lambda side: measured_apart(f"{__package__}.grpo", [f"--worker={side}", *shared]),
    )
    sides = {side: summary(each, "completions_per_second") for side, each in found.items()}
    result: dict[str, Any] = {
        "machine": machine(),
        "bf16_product_gflops": round(product_rate() / 1e9),
        "method": args.method,
        "passes": args.passes,
        "beta": args.beta,
        "replies": "to their own end" if args.natural else f"{NEW} tokens each",
        "sides": sides,
    }
    peers = [side for side in sides if side != OURS]
    if peers and OURS in sides:
        best = max(peers, key=lambda side: sides[side]["completions_per_second"])
        leanest = min(sides[side]["peak_memory_gb"] for side in peers)
        ours = sides[OURS]
        result["best_peer"] = best
        result["speed / best peer"] = ours["completions_per_second"] / sides[best]["completions_per_second"]
        result["memory / best peer"] = ours["peak_memory_gb"] / sides[best]["peak_memory_gb"]
        result["memory / leanest peer"] = ours["peak_memory_gb"] / leanest
    print(json.dumps({k: v for k, v in result.items() if k not in ("machine", "sides")}))
    for side, mine in sides.items():
        speed, memory = mine["completions_per_second"], mine["peak_memory_gb"]
        print(f"{side}: {speed:.3f} completions/s, {memory:.2f} GB", flush=True)
    print(write_result(args.name or f"{args.method}_{args.passes}{'_natural' if args.natural else ''}", result))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("grpo", "rloo"), default="grpo")
    parser.add_argument("--passes", type=int, default=1, help="num_iterations: passes over each rollout")
    parser.add_argument("--beta", type=float, default=0.0, help="0 is TRL's default for GRPO: no reference is run")
    parser.add_argument("--natural", action="store_true", help="replies end by themselves, at 64 tokens at the latest")
    parser.add_argument("--adapter", type=Path, help="an SFT adapter to start from; default: a new one on the base")
    parser.add_argument("--data", default=str(Path(__file__).parents[1] / "data/quickstart/prompts.jsonl"))
    parser.add_argument("--sides", nargs="+", choices=(OURS, *PEER), default=[OURS, *PEER])
    parser.add_argument("--iterations", type=int, default=3, help="rollouts; the first one warms up")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--name", help="of the file in benchmarks/results")
    parser.add_argument("--worker", choices=(OURS, *PEER), help=argparse.SUPPRESS)
    return parser.parse_args()


class _Iterations(TrainerCallback):
    """When each iteration ended: an optimiser step a pass."""

    def __init__(self, passes: int) -> None:
        self.passes, self.clock = passes, StepClock()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock.on_train_begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.passes == 0:
            self.clock.on_step_end()


def vowels(completions: list[Any], **_: object) -> list[float]:
    """A reward that differs from reply to reply and takes no time."""
    texts = [each if isinstance(each, str) else each[-1]["content"] for each in completions]
    return [sum(map(text.count, "aeiou")) / 10 for text in texts]


def _measure(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a worker does."""
    with tempfile.TemporaryDirectory(prefix="preftune-benchmark-") as folder:
        make = _ours if side == OURS else _trl
        trainer = make(side, args, _prompts(args), Path(folder))
        clock = _Iterations(args.passes)
        trainer.add_callback(clock)
        trainer.train()
    log = trainer.state.log_history
    lengths = [line[key] for line in log for key in ("completions/mean_length",) if key in line]
    return {
        "completions_per_second": EPISODES * (args.iterations - 1) / clock.clock.seconds,
        "seconds": clock.clock.seconds,
        "peak_memory_bytes": clock.clock.peak,
        "mean_length": statistics.fmean(lengths) if lengths else None,
    }


def _prompts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """As many as the iterations take, each once."""
    spec = DataSpec((SourceSpec(args.data),), max_prompt_length=LONGEST, overflow="drop")
    rows, _ = encode_prompts(load_rows(spec, "prompt", (Path(),)).rows, load_tokenizer(base()), spec)
    count = PROMPTS * args.iterations
    if len(rows) < count:
        raise SystemExit(f"{args.data}: {len(rows)} prompts of at most {LONGEST} tokens, expected {count}")
    return [{"prompt": each} for each in list(rows["prompt"])[:count]]


def _tokenizer(args: argparse.Namespace) -> Any:
    tokenizer: Any = load_tokenizer(base())
    if not args.natural:
        tokenizer.eos_token = NEVER
    return tokenizer


def _common(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What both configs are told."""
    return {
        "output_dir": str(folder / "out"),
        "num_generations": GENERATIONS,
        "num_iterations": args.passes,
        "beta": args.beta,
        "temperature": TEMPERATURE,
        "learning_rate": 1e-5,
        "gradient_checkpointing": False,
        "bf16": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": SEED,
        **({} if torch.cuda.is_available() else {"use_cpu": True}),
    }


def _ours(side: str, args: argparse.Namespace, prompts: list[dict[str, Any]], folder: Path) -> Any:
    from .. import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    trainer, config = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[args.method]
    tokenizer = _tokenizer(args)
    model = load_model(base(), dtype=torch.bfloat16, device="cuda" if torch.cuda.is_available() else None)
    prepare_model(model, tokenizer)
    adapters = AdapterSet.create(model, base(), LORA, args.adapter)
    settings = config(
        rollout_batch_size=EPISODES,
        num_mini_batches=1,
        total_episodes=EPISODES * args.iterations,
        per_device_train_batch_size=2 * GENERATIONS,
        rollout_micro_batch_size=EPISODES,
        max_new_tokens=NEW,
        log_samples_every=0,
        **_common(args, folder),
    )
    return trainer(adapters, vowels, settings, prompts, None, tokenizer, quiet=True)


def _trl(side: str, args: argparse.Namespace, prompts: list[dict[str, Any]], folder: Path) -> Any:
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_config import RLOOConfig
    from trl.trainer.rloo_trainer import RLOOTrainer

    made: dict[str, tuple[Any, Any]] = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
    trainer, config = made[args.method]
    tokenizer = _tokenizer(args)
    model: Any = AutoModelForCausalLM.from_pretrained(base().path, dtype=torch.bfloat16)
    lora = None
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter, is_trainable=True)
    else:
        lora = LoraConfig(r=LORA.r, lora_alpha=int(LORA.alpha), target_modules="all-linear", task_type="CAUSAL_LM")
    own = PEER[side]
    settings = config(
        gradient_accumulation_steps=EPISODES // own["per_device_train_batch_size"],
        max_steps=args.iterations * args.passes,
        max_completion_length=NEW,
        shuffle_dataset=False,
        **({} if args.natural else {"generation_kwargs": {"min_new_tokens": NEW}}),
        **own,
        **_common(args, folder),
    )
    return trainer(
        model=model,
        reward_funcs=vowels,
        args=settings,
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        peft_config=lora,
    )


if __name__ == "__main__":
    main()
