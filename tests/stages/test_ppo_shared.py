"""A minibatch of all processes, and each one's part of it."""

from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from preftune.stages.ppo.shared import own_share


@pytest.mark.checklist("P17")
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_p17_processes_share_a_minibatch_evenly_and_wholly(processes: int) -> None:
    lengths = numpy.array([90, 3, 80, 5, 70, 7, 60, 9, 50, 1, 40, 2])
    rollout: Any = SimpleNamespace(episodes=SimpleNamespace(host=SimpleNamespace(total_B=lengths)))
    rows = torch.tensor([0, 1, 2, 3, 4, 7, 8, 9])
    parts = [own_share(rows, rollout, process, processes) for process in range(processes)]
    assert sorted(torch.cat(parts).tolist()) == rows.tolist()
    assert {len(part) for part in parts} == {len(rows) // processes}
    tokens = [int(lengths[part.numpy()].sum()) for part in parts]
    assert max(tokens) - min(tokens) < lengths.max()  # dealt out by length, so that they differ by less than a row
