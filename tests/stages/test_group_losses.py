"""Advantages within groups and the losses of GRPO and RLOO, against numbers worked out by hand."""

import math

import pytest
import torch

from preftune.models.masked import masked_moments
from preftune.stages.advantages import (
    decoupled_scores,
    group_advantages,
    group_moments,
    leave_one_out,
    sample_std,
    standardised,
)
from preftune.stages.losses import (
    group_kl,
    group_terms,
    importance_weights,
    row_factors,
    sequence_policy_loss,
)

LN, NAN = math.log, math.nan


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values])


def close(found: torch.Tensor, *expected: float) -> None:
    torch.testing.assert_close(
        found.flatten(), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=2e-6, equal_nan=True
    )


@pytest.mark.checklist("G1")
def test_g01_advantages_of_a_group_of_four_by_hand() -> None:
    # mean 3: deviations -2, -1, 0, 3, squares 14; the root of 14 / (4 - 1) is 2.1602469
    scores = torch.tensor([1.0, 2.0, 3.0, 6.0])
    std = group_moments(scores, 4).std_B
    close(std, *[2.1602469] * 4)
    close(group_advantages(scores, 4, std), *(x / 2.1603469 for x in (-2, -1, 0, 3)))
    # two groups, each by itself; the other's level is nothing to it
    both = torch.cat([scores, scores + 100])
    close(group_advantages(both, 4, group_moments(both, 4).std_B)[4:], *(x / 2.1603469 for x in (-2, -1, 0, 3)))
    # not divided, and divided by the batch's: mean 53, 7 degrees of freedom, 2 * (14 + 4 * 50^2) / 7
    close(group_advantages(scores, 4, None), -2, -1, 0, 3)
    batch = sample_std(masked_moments(both, torch.ones(8).bool()))
    assert float(batch) == pytest.approx(math.sqrt((2 * 14 + 8 * 2500) / 7), rel=1e-9)


@pytest.mark.checklist("G1")
def test_g01_a_reply_without_a_score_takes_no_part() -> None:
    scores = torch.tensor([1.0, NAN, 3.0, 5.0])
    # of 1, 3, 5: mean 3, std 2
    close(group_advantages(scores, 4, group_moments(scores, 4).std_B), -2 / 2.0001, 0, 0, 2 / 2.0001)
    # the only one that has a score, and none at all
    lonely = torch.tensor([NAN, 7.0, NAN, NAN])
    for each in (lonely, torch.full((4,), NAN)):
        close(group_advantages(each, 4, group_moments(each, 4).std_B), 0, 0, 0, 0)


@pytest.mark.checklist("G2")
def test_g02_equal_scores_give_no_advantage() -> None:
    scores = torch.tensor([0.1] * 4 + [1.0, 0.0, 0.0, 0.0])
    moments = group_moments(scores, 4)
    assert group_advantages(scores, 4, moments.std_B)[:4].tolist() == [0.0] * 4
    assert torch.isclose(moments.std_B, torch.zeros(8)).tolist() == [True] * 4 + [False] * 4


@pytest.mark.checklist("G3")
def test_g03_the_baseline_is_the_mean_of_the_others_by_hand() -> None:
    # others' means: 3, 8/3, 7/3, 2 -> 1 - 3, 2 - 8/3, 3 - 7/3, 4 - 2
    close(leave_one_out(torch.tensor([1.0, 2.0, 3.0, 4.0]), 4), -2, -2 / 3, 2 / 3, 2)
    close(leave_one_out(torch.tensor([1.0, 2.0, 10.0, 30.0]), 2), -1, 1, -20, 20)
    close(leave_one_out(torch.tensor([1.0, NAN, 4.0, NAN, 5.0, NAN]), 3), -3, NAN, 3, NAN, NAN, NAN)


@pytest.mark.checklist("G16")
def test_g16_sources_are_normalised_apart_by_hand() -> None:
    """Two sources of unlike scale: within groups each has its say, by its weight."""
    parts = torch.tensor([[0.0, 2.0, NAN, 1.0], [300.0, 100.0, NAN, NAN]])
    # groups of two: first source -1/sqrt(2), 1/sqrt(2) (std sqrt(2)); second 1/sqrt(2), -1/sqrt(2) (std 141.42)
    first, second = 1 / (math.sqrt(2) + 1e-4), 100 / (math.sqrt(20000) + 1e-4)
    found = decoupled_scores(parts, torch.tensor([1.0, 0.5]), 2)
    # of the second group one reply has no score at all, and the other one, alone, cannot be compared
    close(found, -first + 0.5 * second, first - 0.5 * second, NAN, 0)
    moments = masked_moments(found, ~found.isnan())
    std = math.sqrt(2 * float(found[0]) ** 2 / 2)
    close(standardised(found, moments), float(found[0]) / (std + 1e-4), float(found[1]) / (std + 1e-4), 0, 0)


MASK = torch.tensor([[True, True, True], [True, False, False]])


@pytest.mark.checklist("G4")
@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        # of 2 rows: each one's mean over its own 3 and 1 tokens
        ("grpo", (1 / 6, 1 / 2)),
        # 4 tokens in the step
        ("bnpo", (1 / 4, 1 / 4)),
        # 2 rows of at most 10 tokens
        ("dr_grpo", (1 / 20, 1 / 20)),
        # 30 tokens in the rollout, a pass over which is 3 steps
        ("dapo", (1 / 10, 1 / 10)),
        ("cispo", (1 / 10, 1 / 10)),
    ],
)
def test_g04_normalisers_by_hand(loss_type: str, expected: tuple[float, float]) -> None:
    close(row_factors(MASK, loss_type, rows=2, tokens=4, rollout_tokens=30, steps=3, longest=10), *expected)
    # the rows of two halves know the whole's numbers, so their terms add up to the whole's
    halves = [
        row_factors(MASK[i : i + 1], loss_type, rows=2, tokens=4, rollout_tokens=30, steps=3, longest=10)
        for i in (0, 1)
    ]
    close(torch.cat(halves), *expected)


@pytest.mark.checklist("G4")
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_g04_where_nothing_counts_nothing_is_infinite(loss_type: str) -> None:
    none = torch.zeros(1, 2).bool()
    factor = row_factors(none, loss_type, rows=1, tokens=0, rollout_tokens=0, steps=1, longest=2)
    assert bool(factor.isfinite().all())


@pytest.mark.checklist("G5")
def test_g05_a_rising_weight_is_clipped_higher() -> None:
    weights, up, down = row(0.7, 0.9, 1.25, 1.4), row(1.0, 1.0, 1.0, 1.0), row(-1.0, -1.0, -1.0, -1.0)
    logps = torch.zeros(1, 4)
    plain = group_terms(logps, weights, up, epsilon=0.2, epsilon_high=0.2)
    close(plain.terms_BR, -0.7, -0.9, -1.2, -1.2)
    higher = group_terms(logps, weights, up, epsilon=0.2, epsilon_high=0.28)
    close(higher.terms_BR, -0.7, -0.9, -1.25, -1.28)
    assert higher.high_BX.tolist() == [[False, False, False, True]] and not higher.low_BX.any()
    # where the advantage is below 0 the lower bound decides, and the upper one is nothing to it
    falling = group_terms(logps, weights, down, epsilon=0.2, epsilon_high=0.28)
    close(falling.terms_BR, 0.8, 0.9, 1.25, 1.4)
    assert falling.low_BX.tolist() == [[True, False, False, False]] and not falling.high_BX.any()


@pytest.mark.checklist("G6")
def test_g06_a_bad_token_that_became_likely_is_bounded_by_delta() -> None:
    weights, down = row(0.7, 3.0, 50.0), row(-1.0, -1.0, -1.0)
    free = group_terms(torch.zeros(1, 3), weights, down, epsilon=0.2, epsilon_high=0.2)
    close(free.terms_BR, 0.8, 3.0, 50.0)
    bounded = group_terms(torch.zeros(1, 3), weights, down, epsilon=0.2, epsilon_high=0.2, delta=4.0)
    close(bounded.terms_BR, 0.8, 3.0, 4.0)


def test_cispo_clips_the_weight_and_every_token_learns() -> None:
    logps = row(LN(0.5), LN(0.5)).requires_grad_()
    found = group_terms(logps, row(2.0, 9.0), row(1.5, 1.5), epsilon=0.2, epsilon_high=5.0, cispo=True)
    close(found.terms_BR.detach(), 3 * LN(2), 7.5 * LN(2))
    found.terms_BR.sum().backward()
    assert logps.grad is not None
    close(logps.grad, -3.0, -7.5)
    assert found.high_BX.tolist() == [[False, True]]


@pytest.mark.checklist("G7")
def test_g07_k3_and_its_importance_weight_by_hand() -> None:
    # pi = 2 pi_ref: 1/2 - 1 + ln 2; pi = pi_ref / 4: 4 - 1 - ln 4
    logps, mask = row(LN(0.5), LN(0.1), 0.0), row(1, 1, 0).bool()
    ref = row(LN(0.25), LN(0.4), 99.0)
    close(group_kl(logps, ref, mask), LN(2) - 0.5, 3 - LN(4), 0)
    weighted = group_kl(logps, ref, mask, row(3.0, 0.5, 1.0))
    close(weighted, 3 * (LN(2) - 0.5), 0.5 * (3 - LN(4)), 0)


@pytest.mark.checklist("G7")
def test_g07_with_its_weight_k3s_gradient_is_that_of_the_kl() -> None:
    """Over a vocabulary of four, summed exactly: E_old[w k3] is KL(pi || ref), and so is its gradient."""
    logits = torch.tensor([0.3, -0.2, 0.9, 0.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    ref = torch.tensor([0.25, 0.25, 0.4, 0.1], dtype=torch.float64).log()
    every = torch.ones(1, 4).bool()
    for corrected in (True, False):
        logps = logits.log_softmax(0)
        kl = (logps.exp() * (logps - ref)).sum()
        exact = torch.autograd.grad(kl, logits, retain_graph=True)[0]
        weights = (logps - old.log()).exp()[None] if corrected else None
        estimate = (old * group_kl(logps[None], ref[None], every, weights)[0]).sum()
        found = torch.autograd.grad(estimate, logits)[0]
        same = torch.allclose(found, exact, rtol=0, atol=1e-12) and float(estimate.detach()) == pytest.approx(
            float(kl.detach()), abs=1e-12
        )
        assert same is corrected


@pytest.mark.checklist("G8")
def test_g08_a_rows_ratio_is_the_geometric_mean_of_its_tokens() -> None:
    log_ratio = torch.tensor([[LN(2), LN(4), LN(1)], [LN(3), 0.0, 0.0]])
    close(importance_weights(log_ratio, MASK, "token"), 2, 4, 1, 3, 1, 1)
    # (2 * 4 * 1)^(1/3); the second row's one token is 3, whatever stands after it
    close(importance_weights(log_ratio, MASK, "sequence"), 2, 3)
    assert importance_weights(log_ratio, MASK, "sequence").shape == (2, 1)
    found = group_terms(
        torch.zeros(2, 3),
        row(2.0, 3.0).T,
        torch.tensor([[1.0, 1.0, 1.0], [-1.0, 0.0, 0.0]]),
        epsilon=0.2,
        epsilon_high=0.5,
    )
    close(found.terms_BR, -1.5, -1.5, -1.5, 3, 0, 0)
    assert found.high_BX.tolist() == [[True], [False]]


def test_rloos_ratio_is_the_product_of_its_tokens() -> None:
    # 2 * 2 / 8 = 0.5 and 1.5: with A = -1 clipped at 0.8, with A = 2 at 1.2; over 4 rows, two of which are elsewhere
    log_ratio = torch.tensor([[LN(2), LN(2), -LN(8)], [LN(1.5), 0.0, 0.0]])
    found = sequence_policy_loss(log_ratio, torch.tensor([-1.0, 2.0]), epsilon=0.2, epsilon_high=0.2, rows=4)
    assert float(found.loss) == pytest.approx((0.8 - 2.4) / 4, abs=1e-6)
    assert (found.low_B.tolist(), found.high_B.tolist()) == ([True, False], [False, True])
