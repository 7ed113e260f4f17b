"""PPO on the tiny base in processes of its own, for tests of several processes and of killed runs.

    python ppo_worker.py alone OUT                what one process computes from a given rollout
    accelerate launch ... ppo_worker.py together OUT    the same by several, and what only several can show
    python ppo_worker.py other OUT                after `together`: one process makes and continues its run
    accelerate launch ... ppo_worker.py back OUT  after `other`: several continue the run of one
    python ppo_worker.py train OUT [KILL]         a training run, continued where OUT holds a checkpoint;
                                                  KILL: "step N" or "saving N", where the process kills itself

Numbers are written into OUT, one file a process; the tests read and judge them.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from collecting import collect, ppo_of
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import TrainerCallback

from preftune.models.adapters import AdapterSet
from preftune.models.generate import Generation
from preftune.models.loading import load_model, resolve_base
from preftune.models.lora import LoraSpec
from preftune.models.tokens import load_tokenizer
from preftune.stages.callbacks import LogFile
from preftune.stages.checkpoints import newest
from preftune.stages.ppo import rollout as rollout_file
from preftune.stages.ppo import trainer as trainer_file
from preftune.stages.ppo.config import PPOConfig
from preftune.stages.ppo.rollout import Rollout
from preftune.stages.ppo.shared import own_share
from preftune.stages.ppo.trainer import PPOTrainer
from preftune.stages.ppo.update import Updater

# responses of unlike lengths, so that a mean of means would show
LENGTHS = (1, 9, 2, 9, 3, 1, 5, 9)
PROMPTS = [{"prompt": f"{'so ' * number}{number}?"} for number in range(len(LENGTHS))]
SAME_PROMPT = [{"prompt": "Say it."}] * 4


def letters(completions: list[str], **_: Any) -> list[float]:
    """A score that differs from text to text."""
    return [sum(ord(char) % 7 for char in text) / 10 - len(text) / 5 for text in completions]


def make(out: Path, prompts: Sequence[dict[str, Any]] = PROMPTS, model: Any = None, **options: Any) -> PPOTrainer:
    """A trainer on `random:llama` with an adapter that already does something; the same on every process."""
    base = resolve_base("random:llama")
    if model is None:
        model = AdapterSet.create(load_model(base), base, LoraSpec(r=4, alpha=8))
        push(model.parameters("default"), 0.02, seed=1)
    values = {
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "rollout_batch_size": 8,
        "num_ppo_epochs": 2, "num_mini_batches": 2, "total_episodes": 16, "max_new_tokens": 6, "learning_rate": 1e-3,
        # many of these rollouts are given, not drawn: no sampler has to agree with them
        "per_device_train_batch_size": 3, "seed": 1, "mismatch_tolerance": 100.0,
    } | options  # fmt: skip
    callbacks, held_out = values.pop("callbacks", []), values.pop("held_out", None)
    return PPOTrainer(
        model, letters, PPOConfig(str(out), **values), prompts, held_out, load_tokenizer(base),
        callbacks=callbacks, quiet=True,
    )  # fmt: skip


@torch.no_grad()
def push(parameters: Sequence[torch.Tensor], strength: float, seed: int) -> None:
    """Move parameters, everywhere the same way."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_(strength * torch.randn(parameter.shape, generator=generator))


@contextmanager
def given_responses(trainer: PPOTrainer) -> Iterator[None]:
    """Within it prompt i is answered by a fixed text of LENGTHS[i] tokens, whichever process asks."""
    draw = torch.Generator().manual_seed(5)
    answers = {
        tuple(ids): torch.randint(20, 200, (length,), generator=draw).tolist()
        for ids, length in zip(trainer.prompts.ids, LENGTHS, strict=True)
    }

    def sample(_adapters: Any, _role: str, prompts: Sequence[Sequence[int]], **_: Any) -> Generation:
        tokens = [answers[tuple(ids)] for ids in prompts]
        return Generation(tokens, [[0.0] * len(row) for row in tokens], [False] * len(tokens))

    true, rollout_file.sample = rollout_file.sample, sample
    try:
        yield
    finally:
        rollout_file.sample = true


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def own_rows(trainer: PPOTrainer, rollout: Rollout) -> torch.Tensor:
    """This process' share of all rows."""
    args = trainer.args
    return own_share(torch.arange(len(rollout.episodes)), rollout, args.process_index, args.world_size)


def one_step(out: Path) -> dict[str, torch.Tensor]:
    """From the given responses: advantages, the gradient of all of them, the parameters after a step."""
    trainer = make(
        out, optim="sgd", learning_rate=0.1, max_grad_norm=0.01, num_mini_batches=1, whiten_rewards=True,
        max_new_tokens=9,
    )  # fmt: skip
    push(ppo_of(trainer).value, 0.05, seed=2)
    with given_responses(trainer):
        rollout = collect(trainer, 0, 0.05).rollout
    assert rollout.returns_BR is not None
    mask = rollout.episodes.mask_BR
    # away from the old policy, so that ratios differ and some are clipped
    push(ppo_of(trainer).policy, 0.02, seed=3)
    rows = own_rows(trainer, rollout)
    report = trainer.updater.gradients(rollout, rows, 0.05)
    gradient = flat([p.grad for p in trainer.trainables.values() if p.grad is not None])
    before = flat(list(trainer.trainables.values()))
    trainer.create_optimizer().step()
    return {
        "advantages": rollout.advantages_BR[mask],
        "returns": rollout.returns_BR[mask],
        "lengths": rollout.episodes.length_B,
        "row": mask.nonzero()[:, 0],
        "own": rollout.episodes.length_B[rows],
        "sums": report.sums,
        "tokens": torch.tensor(report.tokens),
        "norms": torch.tensor([report.norms["policy"], report.norms["value"]]),
        "gradient": gradient,
        "before": before,
        "after": flat(list(trainer.trainables.values())),
    }


def brakes(out: Path) -> dict[str, Any]:
    """After one step of a huge learning rate: what this process' own numbers say, and what is decided."""
    trainer = make(out, learning_rate=0.02, num_mini_batches=1, max_ratio=None, max_new_tokens=9)
    with given_responses(trainer):
        rollout = collect(trainer, 0, 0.05).rollout
    rows = own_rows(trainer, rollout)
    trainer.updater.gradients(rollout, rows, 0.05)
    trainer.create_optimizer().step()
    alone = Updater(trainer.args, trainer.method, lambda x, _: x)
    own, everyone = alone.gradients(rollout, rows, 0.05), trainer.updater.gradients(rollout, rows, 0.05)
    found: dict[str, Any] = {}
    for name, setting, factor in (("approx_kl", "target_approx_kl", 1.5), ("ratio", "max_ratio", 1.0)):
        mine = torch.tensor([own.mean(name)])
        gathered = trainer.accelerator.gather(mine)
        assert isinstance(gathered, torch.Tensor)
        lowest, highest = gathered.min().item(), gathered.max().item()
        middle = everyone.mean(name)
        decided = []
        # a limit that one process alone is above, as the whole batch is; then one that the whole batch is below
        for limit in ((lowest + middle) / 2, (middle + highest) / 2):
            setattr(trainer.args, setting, limit / factor)
            at_once, alone_at_once = (each.gradients(rollout, rows, 0.05) for each in (trainer.updater, alone))
            setattr(trainer.args, setting, None)
            decided.append(
                {"together": [at_once.stop, at_once.skip], "alone": [alone_at_once.stop, alone_at_once.skip]}
            )
        found[name] = {"own": mine.item(), "all": middle, "decided": decided}
    return found


def trained(trainer: PPOTrainer, resume: str | None = None) -> dict[str, Any]:
    """Train; texts by iteration, logs and digests."""
    texts: dict[int, list[list[int]]] = {}
    scores: dict[int, list[float]] = {}
    true = trainer._log_rollout

    def listen(rollout: Any, *args: Any, **kwargs: Any) -> None:
        texts[trainer.loop.iteration] = rollout.episodes.responses()
        scores[trainer.loop.iteration] = rollout.scores_B.tolist()
        true(rollout, *args, **kwargs)

    trainer._log_rollout = listen
    names = trainer.adapters.names
    start = {name: trainer.adapters.digest(name) for name in (*names, None)}
    trainer.train(resume)
    return {
        "start": start,
        "texts": texts,
        "scores": scores,
        "logs": [each for each in trainer.state.log_history if "objective/kl" in each],
        "digests": {name: trainer.adapters.digest(name) for name in (*names, None)},
        "kl_coef": trainer.loop.kl_coef,
        "first": trainer.is_world_process_zero(),
        "weights": flat(list(trainer.trainables.values())).tolist(),
    }


REAL: dict[str, Any] = {
    "save_strategy": "steps", "save_steps": 3, "kl_target": 0.01, "kl_horizon": 50, "log_samples_every": 1,
    "keep_every": 1,
}  # fmt: skip


def real_runs(out: Path, process: int, options: dict[str, Any] = REAL) -> dict[str, Any]:
    """A run that saves between two minibatches, the same resumed from there, and its first rollout again."""
    whole = make(out / "whole", SAME_PROMPT, callbacks=[LogFile(out / "whole" / "log.jsonl")], **options)
    found: dict[str, Any] = {"whole": trained(whole), "held": whole.evaluate(PROMPTS[:5])}
    # a folder for each process shows which of them writes what
    resumed = make(out / f"resumed{process}", SAME_PROMPT, **options)
    found["resumed"] = trained(resumed, str(out / "whole" / "checkpoint-3"))
    torch.manual_seed(100 + process)
    again = collect(make(out / "again", SAME_PROMPT, **options), 0, 0.05).rollout
    found["again"] = again.episodes.responses()
    return found


def unlike_models(out: Path, process: int) -> dict[str, str]:
    """Digests of a trainer whose LoRA weights were drawn from another seed on each process."""
    base = resolve_base("random:llama")
    torch.manual_seed(process)
    drawn = get_peft_model(load_model(base), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    before = AdapterSet(drawn, base).digest("default")  # pyright: ignore[reportArgumentType]: PEFT declares less than it makes
    adapters = make(out, model=drawn).adapters
    return {"before": before, **{name: adapters.digest(name) for name in adapters.names}}


def several(mode: str, out: Path) -> None:
    """What `alone` and `together` do."""
    process = int(os.environ.get("RANK", "0"))
    save_file({k: t.contiguous() for k, t in one_step(out / "step").items()}, out / f"step{process}.safetensors")
    if mode != "alone":
        found = {"brakes": brakes(out / "brakes"), "unlike": unlike_models(out / "unlike", process)}
        found |= real_runs(out, process)
        (out / f"found{process}.json").write_text(json.dumps(found), encoding="utf-8")


def other_number(out: Path) -> None:
    """In one process: the run that two made, from its start and from their checkpoint between two minibatches."""
    one = make(out / "one", SAME_PROMPT, **REAL)
    found: dict[str, Any] = {"whole": trained(one), "held": one.evaluate(PROMPTS[:5])}
    resumed = make(out / "one-resumed", SAME_PROMPT, **REAL)
    found["resumed"] = trained(resumed, str(out / "whole" / "checkpoint-3"))
    (out / "found-one.json").write_text(json.dumps(found), encoding="utf-8")


def one_number(out: Path) -> None:
    """In two processes: the run of one, from its checkpoint between two minibatches."""
    process = int(os.environ.get("RANK", "0"))
    resumed = make(out / f"two-resumed{process}", SAME_PROMPT, **REAL)
    found = trained(resumed, str(out / "one" / "checkpoint-3"))
    (out / f"found-two{process}.json").write_text(json.dumps(found), encoding="utf-8")


class Killer(TrainerCallback):
    """SIGKILL when `step` optimiser steps are done and the next begins."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_while_saving(step: int) -> None:
    """SIGKILL when everything of checkpoint `step` is written but its last file."""
    true = trainer_file.save_state

    def save_state(folder: Path, *args: Any) -> None:
        if folder.name == f"checkpoint-{step}":
            os.kill(os.getpid(), signal.SIGKILL)
        true(folder, *args)

    trainer_file.save_state = save_state


def watchers(out: Path, kill: str) -> list[Any]:
    """What writes the log, and kills this process as `kill` says: "step 7", say, or "save 2"."""
    if kill and not kill.startswith("step"):
        kill_while_saving(int(kill.split()[1]))
    return [LogFile(out / "log.jsonl"), *([Killer(int(kill.split()[1]))] if kill.startswith("step") else [])]


def train_on(trainer: Any, out: Path) -> None:
    """Train from the newest checkpoint on, and write all that training has made into end.pt."""
    found = newest(out, "worker", 1)
    trainer.train(None if found is None else str(found))
    state = {
        "from": None if found is None else found.name,
        "trainables": {name: p.detach() for name, p in trainer.trainables.items()},
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "kl_coef": trainer.loop.kl_coef,
        "running": trainer.scoring.running.state(),
        "logs": trainer.state.log_history,
    }
    torch.save(state, out / "end.pt")


def train(out: Path, kill: str = "") -> None:
    """Three iterations of four steps, saved every five: always between two minibatches."""
    callbacks = watchers(out, kill)
    trainer = make(
        out, total_episodes=24, save_strategy="steps", save_steps=5, save_total_limit=1, kl_target=0.05,
        kl_horizon=100, reward_scale="running", lr_scheduler_type="cosine", log_samples_every=1, num_log_samples=8,
        value_learning_rate=5e-3, callbacks=callbacks,
    )  # fmt: skip
    train_on(trainer, out)


def work(several: Callable[[str, Path], None], **modes: Callable[..., None]) -> None:
    """Do what the command line asks for: MODE FOLDER [WORDS]. A mode that has no function of its own is `several`'s."""
    torch.set_num_threads(1)
    mode, folder, *rest = sys.argv[1:]
    if mode in modes:
        modes[mode](Path(folder), *rest)
    else:
        several(mode, Path(folder))
    if torch.distributed.is_initialized():
        # a process that ends with its group still open is now and then aborted by one of the group's threads
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    work(several, train=train, other=other_number, back=one_number)
