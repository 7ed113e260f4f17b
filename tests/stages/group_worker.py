"""GRPO and RLOO on the tiny base in processes of their own, for tests of several processes and of killed runs.

    python group_worker.py alone OUT                what one process computes from a given rollout
    accelerate launch ... group_worker.py together OUT    the same by several, and a run of theirs
    python group_worker.py other OUT                after `together`: one process makes and continues its run
    python group_worker.py train OUT KIND [KILL]    a training run, continued where OUT holds a checkpoint;
                                                    KILL: "step N" or "saving N", where the process kills itself

Numbers are written into OUT, one file a process; the tests read and judge them.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from collecting import collect
from ppo_worker import LENGTHS, flat, letters, push, train_on, trained, watchers, work
from safetensors.torch import save_file

from preftune.models.adapters import AdapterSet
from preftune.models.generate import Generation
from preftune.models.loading import load_model, resolve_base
from preftune.models.lora import LoraSpec
from preftune.models.tokens import load_tokenizer
from preftune.stages.grpo import GRPOConfig, GRPOTrainer
from preftune.stages.ppo import rollout as rollout_file
from preftune.stages.ppo.shared import own_share
from preftune.stages.rloo import RLOOConfig, RLOOTrainer

GROUP = 2
PROMPTS = [{"prompt": f"{'so ' * number}{number}?"} for number in range(4)]
MADE: dict[str, tuple[Any, Any]] = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dapo": ("grpo", {"scale_rewards": "batch", "beta": 0.1}),
    "grpo": ("grpo", {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.01}),
    "bnpo": ("grpo", {"loss_type": "bnpo", "multi_objective_aggregation": "normalize_then_sum"}),
    "entropy": ("grpo", {"loss_type": "dr_grpo", "top_entropy_quantile": 0.4}),
    "rloo": ("rloo", {"normalize_advantages": True}),
}


def make(out: Path, kind: str, **options: Any) -> Any:
    """A trainer on `random:llama` with an adapter that already does something: 2 iterations of 4 steps."""
    config, trainer = MADE[kind]
    base = resolve_base("random:llama")
    model = AdapterSet.create(load_model(base), base, LoraSpec(r=4, alpha=8))
    push(model.parameters("default"), 0.02, seed=1)
    values = {
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "rollout_batch_size": 8,
        "num_generations": GROUP, "num_iterations": 2, "num_mini_batches": 2, "total_episodes": 16,
        "max_new_tokens": 9, "learning_rate": 1e-3, "per_device_train_batch_size": 4, "seed": 1,
        "mismatch_tolerance": 100.0,
    } | options  # fmt: skip
    callbacks = values.pop("callbacks", [])
    return trainer(
        model, letters, config(str(out), **values), PROMPTS, None, load_tokenizer(base), callbacks=callbacks, quiet=True
    )


def one_step(out: Path, kind: str, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """From given replies of unlike lengths: advantages, the gradient of all of them, what is summed and logged."""
    trainer = make(out, kind, max_grad_norm=0.01, num_mini_batches=1, **options)
    draw = torch.Generator().manual_seed(5)
    answers = [torch.randint(20, 200, (length,), generator=draw).tolist() for length in LENGTHS]

    def sample(_adapters: Any, _role: str, prompts: Sequence[Sequence[int]], *, first: int, **_: Any) -> Generation:
        tokens = answers[first : first + len(prompts)]
        return Generation(tokens, [[0.0] * len(row) for row in tokens], [len(row) < 9 for row in tokens])

    with patch.object(rollout_file, "sample", sample):
        rollout = collect(trainer, 0, 0.0).rollout
    push(trainer.method.policy, 0.02, seed=3)
    args = trainer.args
    rows = own_share(torch.arange(len(rollout.episodes)), rollout, args.process_index, args.world_size, GROUP)
    report = trainer.updater.gradients(rollout, rows, 0.0)
    names = sorted(name for name in trainer.loop.metrics if "time/" not in name and "per_second" not in name)
    return {
        "advantages": rollout.advantages_BR[:, 0],
        "lengths": rollout.episodes.length_B,
        "own": rollout.episodes.length_B[rows],
        "sums": report.sums,
        "largest": torch.tensor([report.largest["low_least"], report.largest["high_most"]]),
        "tokens": torch.tensor(report.tokens),
        "norm": torch.tensor([report.norms["policy"]]),
        "gradient": flat([p.grad for p in trainer.trainables.values() if p.grad is not None]),
        "metrics": torch.tensor([trainer.loop.metrics[name] for name in names], dtype=torch.float64),
    }


# plain descent: Adam would make a step of a gradient that is nothing but rounding
REAL: dict[str, Any] = {
    "save_strategy": "steps", "save_steps": 3, "max_new_tokens": 6, "optim": "sgd", "learning_rate": 0.1,
}  # fmt: skip


def several(mode: str, out: Path) -> None:
    """What `alone` and `together` do."""
    process = int(os.environ.get("RANK", "0"))
    steps = {case: one_step(out / case, kind, options) for case, (kind, options) in CASES.items()}
    tensors = {f"{case}.{name}": x.contiguous() for case, found in steps.items() for name, x in found.items()}
    save_file(tensors, out / f"step{process}.safetensors")
    if mode == "alone":
        return
    found: dict[str, Any] = {}
    for kind in MADE:
        found[kind] = trained(make(out / kind, kind, **REAL))
        resumed = make(out / f"{kind}-resumed{process}", kind, **REAL)
        found[f"{kind} resumed"] = trained(resumed, str(out / kind / "checkpoint-3"))
    (out / f"found{process}.json").write_text(json.dumps(found), encoding="utf-8")


def other_number(out: Path) -> None:
    """In one process: the runs that two made, from their start and from their checkpoint between two minibatches."""
    found: dict[str, Any] = {}
    for kind in MADE:
        found[kind] = trained(make(out / f"{kind}-one", kind, **REAL))
        resumed = make(out / f"{kind}-one-resumed", kind, **REAL)
        found[f"{kind} resumed"] = trained(resumed, str(out / kind / "checkpoint-3"))
    (out / "found-one.json").write_text(json.dumps(found), encoding="utf-8")


def train(out: Path, kind: str, kill: str = "") -> None:
    """Three iterations of four steps, saved every five: always between two minibatches of a pass over the groups."""
    callbacks = watchers(out, kill)
    own = {"top_entropy_quantile": 0.5} if kind == "grpo" else {"normalize_advantages": True}
    trainer = make(
        out, kind, total_episodes=24, save_strategy="steps", save_steps=5, save_total_limit=1, reward_scale="running",
        lr_scheduler_type="cosine", log_samples_every=1, num_log_samples=8, max_new_tokens=6, callbacks=callbacks,
        **own,
    )  # fmt: skip
    train_on(trainer, out)


if __name__ == "__main__":
    work(several, train=train, other=other_number)
