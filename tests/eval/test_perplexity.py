"""Perplexity against transformers' own loss."""

import math

import pytest
import torch

from preftune.eval.perplexity import sequence_nlls, summarise

ROWS = [[1, 3, 4, 3, 2], [1, 4, 2], [1, 3, 3, 3, 4, 4, 2]]
LABELS = [[-100, -100, 4, 3, 2], [-100, 4, 2], [-100, -100, -100, 3, 4, -100, 2]]


@pytest.mark.parametrize("role", ["default", None])
def test_nll_is_the_models_own_loss(five_tokens, role):
    nlls = sequence_nlls(five_tokens, role, ROWS, LABELS, pad_token_id=0)
    for nll, ids, labels in zip(nlls, ROWS, LABELS, strict=True):
        with torch.no_grad(), five_tokens.using(role):
            loss = five_tokens.model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        assert nll == pytest.approx(loss.item() * sum(label != -100 for label in labels), rel=1e-5)


def test_batches_change_nothing(five_tokens):
    together = sequence_nlls(five_tokens, "default", ROWS, LABELS, pad_token_id=0)
    assert sequence_nlls(five_tokens, "default", ROWS, LABELS, pad_token_id=0, max_tokens=1) == pytest.approx(together)


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity():
    summary = summarise([3 * math.log(5), 7 * math.log(5)], [3, 7])
    assert summary.perplexity == pytest.approx(5.0)
    assert (summary.ci_low, summary.ci_high) == pytest.approx((5.0, 5.0))
    assert (summary.n, summary.tokens) == (2, 10)
