"""GRPO on the tiny base: what a rollout becomes, what trains, what is logged, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from preftune.stages.grpo import GRPOConfig

from .tiny_group import GROUP, gradient, make, move, rollout_of


def test_it_trains_and_logs(tmp_path: Path) -> None:
    made = make(tmp_path)
    start = made.adapters.digest("default")
    made.train()
    assert made.adapters.digest("default") != start
    logged = [each for each in made.state.log_history if "objective/kl" in each]
    print(logged[0])
    assert len(logged) == 2


def test_rloo(tmp_path: Path) -> None:
    made = make(tmp_path, "rloo")
    made.train()
    print([each for each in made.state.log_history if "objective/kl" in each][0])
