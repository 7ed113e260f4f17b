"""Scores, perplexity, KL and win-rates do not depend on batch size, order of rows or padding side."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from preftune.eval import workbench
from preftune.eval.commands import eval_perplexity
from preftune.eval.judges.verdicts import Verdicts, verdict_columns
from preftune.eval.kl import sequence_kls
from preftune.eval.perplexity import sequence_nlls
from preftune.eval.reward_scores import reward_scores
from preftune.eval.run import evaluate
from preftune.eval.samples import EncodedPrompt, Sample
from preftune.models.adapters import AdapterSet
from preftune.models.heads import ScalarHead
from preftune.models.loading import load_model, resolve_base
from preftune.models.lora import LoraSpec

from .conftest import shake
from .test_run import make_spec, source


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two policies, prompts and demonstrations of different lengths."""
    root = tmp_path_factory.mktemp("run")
    base = resolve_base("random:llama")
    adapters = AdapterSet.create(load_model(base), base, LoraSpec(r=2, alpha=4), parent=None)
    for seed, name in enumerate(("sft", "dpo")):
        shake(adapters, "default", seed)
        adapters.save("default", root / name)
    prompts = [{"prompt": "question " * (place + 1)} for place in range(4)]
    demos = [{**row, "completion": "an answer" * (4 - place)} for place, row in enumerate(prompts)]
    for name, rows in (("prompts", prompts), ("demos", demos)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


PROMPTS = [[1, 3, 4], [1, 4], [1, 3, 3, 3, 4], [1]]
REPLIES = [[3, 2], [4, 4, 4, 3, 2], [3, 4, 2], [4, 3, 3, 3, 3, 4, 2]]
ROWS = [[*prompt, *reply] for prompt, reply in zip(PROMPTS, REPLIES, strict=True)]
LABELS = [[-100] * len(prompt) + reply for prompt, reply in zip(PROMPTS, REPLIES, strict=True)]
BATCHES = [1, 12, 4096]
ORDERS = [[0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]]


def scores(adapters: Any, order: list[int], max_tokens: int) -> list[float]:
    adapters.heads["default"] = ScalarHead(16, False, torch.Generator().manual_seed(0))
    return reward_scores(adapters, "default", [ROWS[i] for i in order], 0, max_tokens=max_tokens)


def perplexities(adapters: Any, order: list[int], max_tokens: int) -> list[float]:
    rows, labels = [ROWS[i] for i in order], [LABELS[i] for i in order]
    return sequence_nlls(adapters, "default", rows, labels, pad_token_id=0, max_tokens=max_tokens)


def kls(adapters: Any, order: list[int], max_tokens: int) -> list[float]:
    prompts, replies = [PROMPTS[i] for i in order], [REPLIES[i] for i in order]
    return sequence_kls(
        adapters, "default", "other", prompts, replies, temperature=0.7, pad_token_id=0, max_tokens=max_tokens
    )


@pytest.mark.parametrize("measure", [scores, perplexities, kls])
def test_batches_and_order_change_no_number_of_a_row(five_tokens, measure):
    alone = [measure(five_tokens, [i], 4096)[0] for i in range(4)]
    assert len(set(alone)) == 4
    for order in ORDERS:
        for max_tokens in BATCHES:
            found = measure(five_tokens, order, max_tokens)
            assert found == pytest.approx([alone[i] for i in order], rel=1e-5, abs=1e-6)


def test_the_order_of_prompts_changes_no_win_rate_interval_or_rating():
    class Words:
        name = "words"

        def score(self, samples: Any) -> list[float]:
            return [float(len(sample.tokens) % 7) for sample in samples]

    rng = np.random.default_rng(0)
    lengths = {policy: rng.integers(1, 40, 60).tolist() for policy in ("a", "b", "c")}

    def columns(order: list[int]) -> dict[str, Any]:
        samples = {
            policy: [Sample(policy, i, EncodedPrompt([], [i]), "x", [0] * counts[i], True) for i in order]
            for policy, counts in lengths.items()
        }
        verdicts = Verdicts.of(Words(), samples)
        shown = {policy: [len(each.tokens) for each in replies] for policy, replies in samples.items()}
        return {policy: dict(each) for policy, each in verdict_columns(verdicts, shown, "a", 0).items()}

    plain, shuffled = columns(list(range(60))), columns(rng.permutation(60).tolist())
    for policy, row in plain.items():
        other = shuffled[policy]
        for key in ("n", "mean_score", "win_rate", "ci_low", "ci_high", "ties"):
            assert other[key] == pytest.approx(row[key], abs=1e-12), key
        for key in ("rating_log_odds", "rating_low", "rating_high"):
            assert other[key] == pytest.approx(row[key], abs=1e-5), key


@pytest.mark.parametrize(("side", "batch_size"), [("left", 4), ("right", 1)])
def test_an_evaluation_is_the_same_whatever_side_the_tokenizer_pads(run_dir, monkeypatch, side, batch_size):
    def rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        spec = make_spec(run_dir, batch_size=batch_size)
        return evaluate(spec).rows, eval_perplexity(spec, source("demos"))

    expected = evaluate(make_spec(run_dir)).rows, eval_perplexity(make_spec(run_dir), source("demos"))
    load = workbench.load_tokenizer

    def padding(*given: Any) -> Any:
        tokenizer = load(*given)
        tokenizer.padding_side = side
        return tokenizer

    monkeypatch.setattr(workbench, "load_tokenizer", padding)
    for ours, theirs in zip(rows(), expected, strict=True):
        for row, other in zip(ours, theirs, strict=True):
            numbers = {key: value for key, value in other.items() if isinstance(value, int | float)}
            assert {key: row[key] for key in numbers} == pytest.approx(numbers, rel=1e-5, abs=1e-6)
