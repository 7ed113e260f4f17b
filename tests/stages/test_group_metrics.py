"""What GRPO and RLOO log of the clip, of tokens and of time, under TRL's names, by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune.models.generate import Generation
from preftune.stages.groups import GroupMethod
from preftune.stages.ppo.method import Step
from preftune.stages.ppo.rollout import Rollout, make_episodes
from preftune.stages.ppo.update import StepReport, add_report, update_metrics

from .tiny_group import make, method_of, move, rollout_of
from .tiny_ppo import Steps

RATIOS = [[0.5, 1.0, 0.7, 1.0], [0.7, 0.7], [1.5], [1.5, 1.0, 1.0]]
ADVANTAGES = [-1.0, -1.0, 1.0, 1.0]


def noted(method: GroupMethod, ratios: list[list[float]], finished: list[bool]) -> tuple[list[float], list[float]]:
    """The shares of each reply that the clip decided, below and above, where pi / pi_old is this at its tokens."""
    lengths = [len(row) for row in ratios]
    tokens = [[7] * length for length in lengths]
    drawn = Generation(tokens, [[0.0] * length for length in lengths], finished)
    episodes = make_episodes([[5]] * 4, drawn, 0, torch.device("cpu"))
    logps_BR = torch.zeros(4, max(lengths))
    for row, those in enumerate(ratios):
        logps_BR[row, : len(those)] = torch.tensor(those).log()
    advantages_BR = torch.where(episodes.mask_BR, torch.tensor(ADVANTAGES)[:, None], 0.0)
    part = Rollout(episodes, torch.zeros_like(logps_BR), None, advantages_BR, torch.zeros(4))
    total = float(sum(lengths))
    found = method.loss(logps_BR, part, method.counted(episodes), Step(4, total, total, part, total, total))
    return found.low_B.tolist(), found.high_B.tolist()


@pytest.mark.checklist("G18")
def test_g18_the_share_of_each_replys_tokens_that_the_clip_decided(tmp_path: Path) -> None:
    method = method_of(make(tmp_path, beta=0.0, epsilon=0.2))
    low, high = noted(method, RATIOS, [True] * 4)
    assert low == [0.5, 1.0, 0.0, 0.0]
    assert high == pytest.approx([0.0, 0.0, 1.0, 1 / 3])
    # those that do not count are neither the least nor the most
    method = method_of(make(tmp_path, beta=0.0, epsilon=0.2, mask_truncated_completions=True))
    low, high = noted(method, RATIOS, [True, True, False, False])
    assert (low[:2], high[:2]) == ([0.5, 1.0], [0.0, 0.0])
    assert all(math.isnan(share) for share in (*low[2:], *high[2:]))


@pytest.mark.checklist("G18")
def test_g18_of_whole_replies_it_is_all_or_nothing(tmp_path: Path) -> None:
    # geometric means 0.77 and 0.7, 1.5 and 1.14
    sequence = {"beta": 0.0, "epsilon": 0.2, "importance_sampling_level": "sequence"}
    assert noted(method_of(make(tmp_path, **sequence)), RATIOS, [True] * 4) == ([1, 1, 0, 0], [0, 0, 1, 0])
    # products 0.35 and 0.49, 1.5 and 1.5
    rloo = method_of(make(tmp_path, "rloo", beta=0.0, epsilon=0.2))
    assert noted(rloo, RATIOS, [True] * 4) == ([1, 1, 0, 0], [0, 0, 1, 1])


@pytest.mark.checklist("G18")
@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_g18_least_and_most_are_means_over_the_steps_that_have_them(tmp_path: Path, kind: str) -> None:
    method = method_of(make(tmp_path, kind))
    totals: dict[str, float] = {"lr": 0.0}
    sums = torch.ones(len(method.statistics))
    for least, most in ((-0.5, 0.25), (-0.25, 1.0), (0.0, 0.25)):
        report = StepReport(method.statistics, sums, 10.0, {"policy": 1.0}, {"low_least": least, "high_most": most})
        add_report(totals, report, 0.0)
    # all of its replies were cut off; and one whose numbers are left out
    add_report(totals, StepReport(method.statistics, sums, 10.0, {"policy": 1.0}), 0.0)
    infinite = {"policy": float("inf")}
    add_report(totals, StepReport(method.statistics, sums, 9.0, infinite, {"low_least": -9, "high_most": 9}), 0.0)
    logged = update_metrics(totals, method)
    assert (logged["clip_ratio/low_min"], logged["clip_ratio/high_max"]) == (0.25, 0.5)


@pytest.mark.checklist("G18")
@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_g18_micro_batches_change_neither(tmp_path: Path, kind: str) -> None:
    """Of a policy that has left the rollout's far behind: the clip decides much, and not the same in all replies."""
    found = []
    for size in (8, 4, 1):
        made = make(tmp_path, kind, per_device_train_batch_size=size, epsilon=0.01, num_mini_batches=1)
        rollout = rollout_of(made)
        move(made)
        found.append(made.updater.gradients(rollout, torch.arange(8), 0.0).largest)
    assert found[0] == found[1] == found[2]
    assert found[0]["high_most"] > 0


@pytest.mark.checklist("G18")
@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_g18_tokens_are_those_read_and_written_so_far(tmp_path: Path, kind: str) -> None:
    count = Steps()
    made = make(tmp_path, kind, callbacks=[count], log_samples_every=1, num_log_samples=8)
    made.train()
    logs: list[dict[str, Any]] = [log for log in count.logs if "num_tokens" in log]
    # two prompts in each iteration, four of them in all, and four replies to each
    read = 4 * sum(len(ids) for ids in made.prompts.ids)
    assert len(logs) == 2 and 0 < logs[0]["num_tokens"] < logs[1]["num_tokens"]
    assert logs[1]["num_tokens"] == read + sum(8 * log["completions/mean_length"] for log in logs)
    for log in logs:
        parts = sum(log[f"time/{name}"] for name in ("rollout", "score", "forward", "update"))
        assert log["step_time"] == pytest.approx(parts / 4)
