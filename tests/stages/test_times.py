"""How long a stage will take: by steps that were timed, and by a card's figures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from preftune.data.spec import DataSpec, SourceSpec
from preftune.models.base import Base
from preftune.models.cards import DECODING_SHARE, TRAINING_SHARE, Card
from preftune.models.cost import sizes
from preftune.stages.costs import AssumedRows, Place, StageCost, stage_cost
from preftune.stages.job import StageJob
from preftune.stages.times import _AROUND_A_STEP, card_seconds, measured_seconds, rows_in_flight

SMALL = LlamaConfig(
    vocab_size=300, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip
METHOD = {
    "rollout_batch_size": 8, "num_mini_batches": 2, "num_ppo_epochs": 3, "total_episodes": 16, "max_new_tokens": 20,
    "rollout_micro_batch_size": 4,
}  # fmt: skip


class Clockwork:
    """Steps that take what they are said to: one second a training step, a tenth a forward; a decode step 10 ms and
    2 ms a row, after a first one of half a second."""

    def seconds(self, run: Callable[[Any], None], limit: float) -> float:
        return 1.0 if "train" in run.__qualname__ else 0.1

    def decoding(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float]:
        return 0.5, 0.01 + 0.002 * len(prompts)


def ppo(tmp_path: Path, replies: Sequence[int]) -> tuple[StageJob, StageCost]:
    base, data = Base("x", Path(), None, ""), DataSpec((SourceSpec("x"),))
    job = StageJob(name="ppo", kind="ppo", base=base, dtype="bfloat16", data=data, output_dir=tmp_path, method=METHOD)
    return job, stage_cost(job, SMALL, AssumedRows(32, 12, "prompt"), None, Place("cpu"), replies)


def test_a_reply_that_ends_gives_its_place_to_a_prompt_that_waits():
    assert [*rows_in_flight([3, 1, 2], 2)] == [2, 2, 2]
    assert [*rows_in_flight([4, 1, 2], 3)] == [3, 2, 1, 1]
    assert [*rows_in_flight([1, 1, 1], 1)] == [1, 1, 1]


def test_a_rollout_takes_the_steps_of_its_longest_reply_and_they_get_cheaper(tmp_path: Path):
    _, cost = ppo(tmp_path, [2, 6])
    rollouts = [work for work in cost.work if work.decodes is not None]
    others = [work for work in cost.work if work.decodes is None]
    found = measured_seconds(cost, Clockwork(), 1.0)  # pyright: ignore[reportArgumentType]: it times in its own way
    assert found is not None
    (rollout,) = rollouts
    assert rollout.decodes is not None and rollout.times == 2
    rows = [*rows_in_flight(rollout.decodes.lengths, 4)]
    one = 2 * 0.5 + sum(0.01 + 0.002 * n for n in rows[1:])
    rest = sum((work.times or 0) * (0.1 if work.step == "forward" else 1.0) for work in others)
    around = _AROUND_A_STEP * 12
    assert cost.steps == 12 and found.expected == pytest.approx(around + 2 * one + rest)
    # at most: 40 steps of four rows each, and by the tokens more for what reads the replies
    longest = 2 * 0.5 + 39 * 0.018
    read = sum((work.times or 0) * (0.1 if work.step == "forward" else 1.0) * work.longer for work in others)
    assert found.most == pytest.approx(around + 2 * longest + read)
    assert found.most > found.expected


def test_without_known_replies_the_time_is_the_longest(tmp_path: Path):
    found = measured_seconds(ppo(tmp_path, ())[1], Clockwork(), 1.0)  # pyright: ignore[reportArgumentType]: as above
    assert found is not None and found.expected == found.most


def test_a_cards_time_is_by_its_figures_and_the_shares(tmp_path: Path):
    job, cost = ppo(tmp_path, (20,))
    size = sizes(SMALL, job.lora, "bfloat16")
    slow, fast = (card_seconds(job, cost, size, Card("x", 24000, rate, 1000.0)) for rate in (100.0, 200.0))
    assert slow is not None and fast is not None and cost.flops is not None
    assert slow.expected - fast.expected == pytest.approx(cost.flops / (200e12 * TRAINING_SHARE))
    # 40 steps read every weight, and the keys and values of four rows of 12 and half of 20 tokens
    read = 40 * (size.parameters * 2 + 4 * (12 + 10) * size.kv_bytes)
    decoding = 2 * read / (1000e9 * DECODING_SHARE)
    assert fast.expected - cost.flops / (200e12 * TRAINING_SHARE) == pytest.approx(decoding)
