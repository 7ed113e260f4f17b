"""How long a PPO run is: episodes, optimiser steps, or passes; never two of them."""

from typing import Any

import pytest

from preftune.errors import UserError
from preftune.stages.ppo.config import PPOConfig


def config(**given: Any) -> PPOConfig:
    return PPOConfig("out", use_cpu=True, rollout_batch_size=8, num_ppo_epochs=2, num_mini_batches=2, **given)


def test_max_steps_is_the_length_in_optimiser_steps():
    assert config(max_steps=12).num_rollouts(100) == 3
    assert config(total_episodes=16).num_rollouts(100) == 2
    assert config(num_train_epochs=1).num_rollouts(20) == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_steps": 6}, "max_steps is 6, expected a multiple of num_ppo_epochs x num_mini_batches = 2 x 2"),
        ({"max_steps": 8, "total_episodes": 16}, "expected one of them"),
        ({"top_p": 2.0}, "top_p is 2.0, expected more than 0, at most 1"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"top_k": -1}, "top_k is -1, expected at least 0"),
    ],
)
def test_what_no_run_can_be_is_refused(given: dict[str, Any], said: str):
    with pytest.raises((ValueError, UserError), match=said):
        config(**given)
