"""Distillation on the tiny base in processes of its own, for tests of several processes and of killed runs.

    python distill_worker.py alone OUT              what one process computes from given replies
    accelerate launch ... distill_worker.py together OUT    the same by several, and a run of theirs
    python distill_worker.py other OUT              after `together`: one process makes and continues its run
    python distill_worker.py train OUT [KILL]       a training run, continued where OUT holds a checkpoint;
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
from ppo_worker import LENGTHS, flat, push, train_on, trained, watchers, work
from safetensors.torch import save_file

from preftune.models.adapters import AdapterSet
from preftune.models.generate import Generation
from preftune.models.loading import load_model, resolve_base
from preftune.models.lora import LoraSpec
from preftune.models.tokens import load_tokenizer
from preftune.stages.distill import DistillationConfig, DistillationTrainer
from preftune.stages.ppo import rollout as rollout_file
from preftune.stages.ppo.shared import own_share

DEMOS = [{"prompt": f"{'so ' * number}{number}?", "completion": "yes " * (number + 1)} for number in range(4)]


def make(out: Path, **options: Any) -> Any:
    """A student on `random:llama` that another `random:llama` teaches: half on its own replies, 4 iterations of 2
    steps."""
    base = resolve_base("random:llama")
    model = AdapterSet.create(load_model(base), base, LoraSpec(r=4, alpha=8))
    push(model.parameters("default"), 0.02, seed=1)
    values = {
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "rollout_batch_size": 8,
        "num_mini_batches": 2, "total_episodes": 32, "max_new_tokens": 6, "learning_rate": 1e-3, "beta": 0.5,
        "lmbda": 0.5, "per_device_train_batch_size": 3, "seed": 1, "mismatch_tolerance": 100.0,
    } | options  # fmt: skip
    callbacks = values.pop("callbacks", [])
    return DistillationTrainer(
        model, "random:llama?seed=7", DistillationConfig(str(out), **values), DEMOS, None, load_tokenizer(base),
        callbacks=callbacks, quiet=True,
    )  # fmt: skip


def one_step(out: Path) -> dict[str, torch.Tensor]:
    """From given replies of unlike lengths: the gradient of all of them, what is summed and logged."""
    trainer = make(out, max_grad_norm=0.01, num_mini_batches=1, lmbda=1.0, max_new_tokens=9)
    draw = torch.Generator().manual_seed(5)
    answers = [torch.randint(20, 200, (length,), generator=draw).tolist() for length in LENGTHS]

    def sample(_adapters: Any, _role: str, prompts: Sequence[Sequence[int]], *, first: int, **_: Any) -> Generation:
        tokens = answers[first : first + len(prompts)]
        return Generation(tokens, [[0.0] * len(row) for row in tokens], [len(row) < 9 for row in tokens])

    with patch.object(rollout_file, "sample", sample):
        rollout = collect(trainer, 0, 0.0).rollout
    args = trainer.args
    rows = own_share(torch.arange(len(rollout.episodes)), rollout, args.process_index, args.world_size)
    report = trainer.updater.gradients(rollout, rows, 0.0)
    names = sorted(name for name in trainer.loop.metrics if "time/" not in name and "per_second" not in name)
    return {
        "lengths": rollout.episodes.length_B,
        "own": rollout.episodes.length_B[rows],
        "sums": report.sums,
        "tokens": torch.tensor(report.tokens),
        "norm": torch.tensor([report.norms["policy"]]),
        "gradient": flat([p.grad for p in trainer.trainables.values() if p.grad is not None]),
        "metrics": torch.tensor([trainer.loop.metrics[name] for name in names], dtype=torch.float64),
    }


# plain descent: Adam would make a step of a gradient that is nothing but rounding
REAL: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "optim": "sgd", "learning_rate": 0.1}


def run(out: Path, resume: Path | None = None) -> dict[str, Any]:
    """Train, and evaluate."""
    trainer = make(out, **REAL)
    found = trained(trainer, None if resume is None else str(resume))
    held = trainer.evaluate([{"prompt": row["prompt"]} for row in DEMOS[:3]])
    return {**found, "held": {name: x for name, x in held.items() if "runtime" not in name}}


def several(mode: str, out: Path) -> None:
    """What `alone` and `together` do."""
    process = int(os.environ.get("RANK", "0"))
    save_file({k: x.contiguous() for k, x in one_step(out / "step").items()}, out / f"step{process}.safetensors")
    if mode == "alone":
        return
    whole = run(out / "whole")
    found = {"whole": whole, "resumed": run(out / f"resumed{process}", out / "whole" / "checkpoint-3")}
    (out / f"found{process}.json").write_text(json.dumps(found), encoding="utf-8")


def other_number(out: Path) -> None:
    """In one process: the run that two made, from its start and from their checkpoint between two minibatches."""
    found = {"whole": run(out / "one"), "resumed": run(out / "one-resumed", out / "whole" / "checkpoint-3")}
    (out / "found-one.json").write_text(json.dumps(found), encoding="utf-8")


def train(out: Path, kill: str = "") -> None:
    """Four iterations of two steps, saved every three: between the minibatches of a rollout, sampled or not."""
    trainer = make(
        out, save_strategy="steps", save_steps=3, save_total_limit=1, lr_scheduler_type="cosine", log_samples_every=1,
        num_log_samples=8, callbacks=watchers(out, kill),
    )  # fmt: skip
    train_on(trainer, out)


if __name__ == "__main__":
    work(several, train=train, other=other_number)
