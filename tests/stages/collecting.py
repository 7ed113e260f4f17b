"""Steps 1 to 5 of an iteration alone: a rollout, without the minibatch epochs that follow; and the method in use."""

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from preftune.stages.ppo.files import LoopState
from preftune.stages.ppo.method import PPO
from preftune.stages.ppo.rollout import Rollout
from preftune.stages.ppo.trainer import OnPolicyTrainer


@dataclass(frozen=True)
class Collected:
    """A rollout, what is logged about it, and the generations that would be written."""

    rollout: Rollout
    metrics: dict[str, float]
    samples: list[dict[str, Any]]


def ppo_of(trainer: OnPolicyTrainer) -> PPO:
    """The trainer's method, which is PPO."""
    assert isinstance(trainer.method, PPO)
    return trainer.method


def collect(trainer: OnPolicyTrainer, iteration: int = 0, kl_coef: float | None = None) -> Collected:
    """What the trainer collects in that iteration. Nothing is compared with the reference: tests move the policy."""
    samples: list[dict[str, Any]] = []
    coef: float = getattr(trainer.args, "kl_coef") if kl_coef is None else kl_coef  # noqa: B009
    trainer.loop = LoopState(iteration=iteration, kl_coef=coef)
    own_reference, trainer.own_reference = trainer.own_reference, False
    with (
        patch.object(trainer, "_minibatch_epochs"),
        # there is no first step that would measure
        patch.object(trainer.args, "first_step_measures", lambda: False),
        patch.object(trainer.samples, "write", lambda _, rows: samples.extend(rows)),
    ):
        trainer._iteration()
    trainer.own_reference = own_reference
    rollout, trainer.rollout = trainer.rollout, None
    assert rollout is not None
    return Collected(rollout, trainer.loop.metrics, samples)
