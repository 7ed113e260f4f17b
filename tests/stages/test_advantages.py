"""GAE and whitening against numbers worked out by hand."""

import pytest
import torch

from preftune.models.masked import masked_moments, mean_and_variance
from preftune.stages.advantages import gae, whiten


@pytest.mark.checklist("P13")
def test_p13_gae_by_hand() -> None:
    rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]])
    out = gae(rewards, values, torch.ones(1, 2).bool(), gamma=1.0, lam=0.5)
    # last: 1 - 0.25 = 0.75; first: (0 + 0.25 - 0.5) + 0.5 * 0.75 = 0.125
    assert out.advantages_BR.tolist() == [[0.125, 0.75]]
    assert out.returns_BR.tolist() == [[0.625, 1.0]]


@pytest.mark.checklist("P13")
def test_p13_with_lambda_one_the_return_is_the_discounted_sum() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[9.0, -3.0, 5.0]])
    out = gae(rewards, values, torch.ones(1, 3).bool(), gamma=0.5, lam=1.0)
    torch.testing.assert_close(out.returns_BR, torch.tensor([[3.0, 4.0, 4.0]]))


@pytest.mark.checklist("P13")
def test_p13_nothing_outside_the_mask_reaches_an_advantage() -> None:
    rewards, values = torch.randn(3, 6), torch.randn(3, 6)
    lengths = [2, 6, 1]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    noisy = gae(torch.where(mask, rewards, 1e9), torch.where(mask, values, -1e9), mask)
    for i, n in enumerate(lengths):
        alone = gae(rewards[i : i + 1, :n], values[i : i + 1, :n], torch.ones(1, n).bool())
        assert torch.equal(noisy.advantages_BR[i, :n], alone.advantages_BR[0])
        assert torch.equal(noisy.returns_BR[i, :n], alone.returns_BR[0])
    assert not noisy.advantages_BR[~mask].any() and not noisy.returns_BR[~mask].any()


@pytest.mark.checklist("P16")
def test_p16_whitening_over_valid_tokens() -> None:
    x, mask = torch.tensor([[1.0, 3.0, 1e6], [5.0, 7.0, -1e6]]), torch.tensor([[1, 1, 0], [1, 1, 0]]).bool()
    mean, variance = mean_and_variance(masked_moments(x, mask))
    assert (float(mean), float(variance)) == (4.0, 5.0)
    white = whiten(x, mask, mean, variance)
    torch.testing.assert_close(white[0], torch.tensor([-3.0, -1.0, 0.0]) / 5**0.5)
    torch.testing.assert_close(white[mask].mean(), torch.tensor(0.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(white[mask].std(correction=0), torch.tensor(1.0))
    kept = whiten(x, mask, mean, variance, keep_mean=True)
    torch.testing.assert_close(kept[mask].mean(), torch.tensor(4.0))
    torch.testing.assert_close(kept[mask].std(correction=0), torch.tensor(1.0))


@pytest.mark.checklist("P16")
def test_p16_moments_of_parts_add_up_to_those_of_the_whole() -> None:
    """What processes exchange: whitening by the sum of two halves' moments is whitening of the whole batch."""
    x, mask = torch.randn(4, 5), torch.rand(4, 5) > 0.3
    halves = masked_moments(x[:2], mask[:2]) + masked_moments(x[2:], mask[2:])
    together = whiten(x, mask, *mean_and_variance(masked_moments(x, mask)))
    torch.testing.assert_close(whiten(x[:2], mask[:2], *mean_and_variance(halves)), together[:2])
