"""PPO's losses against numbers worked out by hand, and against exact gradients where expectations can be summed."""

import itertools
import math

import pytest
import torch

from preftune.stages.kl_control import AdaptiveKL, FixedKL, kl_controller
from preftune.stages.losses import kl_estimate, kl_loss, ppo_policy_loss, token_rewards, value_loss

LN = math.log


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values])


def test_clipped_surrogate_by_hand() -> None:
    # ratios 1.5 and 0.5, advantages +1 and +1, then +1.5 with advantage -1
    old, advantages = row(0.0, 0.0, 0.0), row(1.0, 1.0, -1.0)
    new = row(LN(1.5), LN(0.5), LN(1.5))
    out = ppo_policy_loss(new, old, advantages, torch.ones(1, 3).bool(), cliprange=0.2, denominator=3.0)
    # clipped to 1.2; left at 0.5 (the smaller); left at 1.5 (the worse): -(1.2 + 0.5 - 1.5) / 3
    assert float(out.loss) == pytest.approx(-0.2 / 3, abs=1e-6)
    assert float(out.clipped) == 1.0
    assert float(out.ratio) == pytest.approx(3.5, abs=1e-6)
    # (r - 1) - ln r, summed
    assert float(out.approx_kl) == pytest.approx(3.5 - 3 - LN(1.5 * 0.5 * 1.5), abs=1e-6)


def test_what_is_masked_reaches_no_loss() -> None:
    mask = torch.tensor([[True, False]])
    out = ppo_policy_loss(row(0.0, 80.0), row(0.0, -80.0), row(2.0, 1e9), mask, cliprange=0.2, denominator=1.0)
    assert float(out.loss) == -2.0 and float(out.ratio) == 1.0
    assert (
        float(value_loss(row(1.0, 9.0), row(0.0, 0.0), row(0.0, 0.0), mask, cliprange=None, denominator=1).loss) == 0.5
    )


@pytest.mark.checklist("P15")
def test_p15_value_loss_by_hand() -> None:
    ones = torch.ones(1, 2).bool()
    # V = 1, old 0, clip 0.2 -> 0.2. R = 1: max(0, 0.64); R = 0: max(1, 0.04). Half the sum over 2 tokens.
    out = value_loss(row(1.0, 1.0), row(0.0, 0.0), row(1.0, 0.0), ones, cliprange=0.2, denominator=2.0)
    assert float(out.loss) == pytest.approx(0.5 * (0.64 + 1.0) / 2, abs=1e-6)
    assert float(out.clipped) == 1.0
    free = value_loss(row(1.0, 1.0), row(0.0, 0.0), row(1.0, 0.0), ones, cliprange=None, denominator=2.0)
    assert float(free.loss) == pytest.approx(0.25, abs=1e-6) and float(free.clipped) == 0.0


@pytest.mark.checklist("P8")
def test_p08_score_lands_on_the_last_token() -> None:
    mask = torch.tensor([[True, True, False, False], [True, True, True, True], [True, False, False, False]])
    rewards, _ = token_rewards(torch.zeros(3, 4), torch.tensor([5.0, 7.0, -2.0]), mask, 0.1)
    assert rewards.tolist() == [[0, 5, 0, 0], [0, 0, 0, 7], [-2, 0, 0, 0]]


@pytest.mark.checklist("P10")
def test_p10_kl_penalty_is_not_clamped_and_sums_to_the_kl() -> None:
    delta = torch.tensor([[0.5, -2.0, 99.0], [3.0, -0.25, 0.25]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rewards, non_score = token_rewards(delta, torch.tensor([1.0, 1.0]), mask, 0.5)
    assert rewards.tolist() == [[-0.25, 2.0, 0.0], [-1.5, 0.125, 0.875]]
    # per response: -coef * (0.5 - 2.0) and -coef * 3.0
    assert non_score.sum(1).tolist() == [0.75, -1.5]


@pytest.mark.checklist("P11")
def test_p11_estimators_by_hand() -> None:
    delta = row(LN(2.0), -LN(2.0))
    torch.testing.assert_close(kl_estimate(delta, "k1"), delta)
    torch.testing.assert_close(kl_estimate(delta, "k2"), row(0.240227, 0.240227))
    torch.testing.assert_close(kl_estimate(delta, "k3"), row(0.5 - 1 + LN(2.0), 2.0 - 1 - LN(2.0)))
    with pytest.raises(ValueError, match="expected k1, k2 or k3"):
        kl_estimate(delta, "k4")


VOCABULARY, RESPONSES = 5, list(itertools.product(range(5), repeat=2))


class TwoTokenPolicy:
    """Two-token responses over five tokens: every expectation is a sum over 25 responses."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.first = torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_()
        self.second = torch.randn(5, 5, generator=generator, dtype=torch.float64).requires_grad_()

    def logps(self) -> torch.Tensor:
        """[25, 2], the log-probs of both tokens of every response."""
        first, second = self.first.log_softmax(-1), self.second.log_softmax(-1)
        return torch.stack([torch.stack([first[a], second[a, b]]) for a, b in RESPONSES])

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        grads = torch.autograd.grad(loss, [self.first, self.second], allow_unused=True)
        zeros = (torch.zeros_like(self.first), torch.zeros_like(self.second))
        return torch.cat([(z if g is None else g).flatten() for g, z in zip(grads, zeros, strict=True)])


def expected_loss(policy: TwoTokenPolicy, reference: torch.Tensor, estimator: str) -> torch.Tensor:
    """The mean over all responses, weighted by their (fixed) probability, of the loss of a batch of one."""
    logps = policy.logps()
    weights = logps.sum(1).exp().detach()
    mask = torch.ones(1, 2).bool()
    losses = [
        kl_loss(logps[i : i + 1], reference[i : i + 1], mask, estimator=estimator, denominator=1.0) for i in range(25)
    ]
    return (weights * torch.stack(losses)).sum()


@pytest.mark.checklist("P11")
def test_p11_sequence_k2_in_the_loss_has_the_exact_gradient() -> None:
    policy, reference = TwoTokenPolicy(0), TwoTokenPolicy(1).logps().detach()
    logps = policy.logps()
    exact = policy.gradient((logps.sum(1).exp() * (logps - reference).sum(1)).sum())
    torch.testing.assert_close(policy.gradient(expected_loss(policy, reference, "k2_sequence")), exact)


@pytest.mark.checklist("P11")
def test_p11_k1_in_the_reward_has_the_exact_gradient() -> None:
    """Policy gradient with reward-to-go of -delta, before any update (ratio 1)."""
    policy, reference = TwoTokenPolicy(0), TwoTokenPolicy(1).logps().detach()
    logps = policy.logps()
    exact = policy.gradient((logps.sum(1).exp() * (logps - reference).sum(1)).sum())
    mask, logps = torch.ones(25, 2).bool(), policy.logps()
    rewards, _ = token_rewards((logps - reference).detach(), torch.zeros(25), mask, 1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    weights = logps.sum(1).exp().detach()
    surrogates = [
        weights[i]
        * ppo_policy_loss(
            logps[i : i + 1], logps[i : i + 1].detach(), to_go[i : i + 1], mask[:1], cliprange=0.2, denominator=1.0
        ).loss
        for i in range(25)
    ]
    torch.testing.assert_close(policy.gradient(torch.stack(surrogates).sum()), exact)


@pytest.mark.checklist("P11")
def test_p11_token_k2_leaves_out_what_a_token_does_to_later_ones() -> None:
    policy, reference = TwoTokenPolicy(0), TwoTokenPolicy(1).logps().detach()
    logps = policy.logps()
    exact = policy.gradient((logps.sum(1).exp() * (logps - reference).sum(1)).sum())
    logps = policy.logps()
    ours = policy.gradient(expected_loss(policy, reference, "k2"))
    # on the second token's table nothing is left out; on the first, exactly E[grad log pi(a) * KL of the second step]
    torch.testing.assert_close(ours[5:], exact[5:])
    second_kl = (logps[:, 1].exp() * (logps - reference)[:, 1]).view(5, 5).sum(1).detach()
    missing = policy.gradient((policy.first.softmax(-1) * second_kl).sum())
    torch.testing.assert_close(ours + missing, exact)
    assert missing[:5].abs().max() > 0.01


@pytest.mark.checklist("P11")
def test_p11_k1_in_the_loss_pushes_nowhere_and_is_refused_and_k3_is_the_other_direction() -> None:
    policy, reference = TwoTokenPolicy(0), TwoTokenPolicy(1).logps().detach()
    with pytest.raises(ValueError, match="zero gradient"):
        kl_loss(row(0.0), row(0.0), torch.ones(1, 1).bool(), estimator="k1", denominator=1.0)
    logps = policy.logps()
    push = policy.gradient((logps.sum(1).exp().detach() * logps.sum(1)).sum())
    torch.testing.assert_close(push, torch.zeros_like(push), rtol=0, atol=1e-12)
    # k3's gradient on the first token is that of KL(ref || pi): minus E_ref[grad log pi]
    ref_first = torch.stack([reference[5 * a, 0] for a in range(5)]).exp()
    other = policy.gradient(-(ref_first * policy.first.log_softmax(-1)).sum())
    torch.testing.assert_close(policy.gradient(expected_loss(policy, reference, "k3"))[:5], other[:5])


@pytest.mark.checklist("P12")
def test_p12_adaptive_controller_sign_and_saturation() -> None:
    control = AdaptiveKL(0.1, target=6.0, horizon=10_000)
    control.update(6.0, 64)
    assert control.value == 0.1
    control.update(600.0, 500)  # saturates at +20% of 500 / 10000
    assert control.value == pytest.approx(0.1 * 1.01, rel=1e-12)
    control = AdaptiveKL(0.1, target=6.0, horizon=10_000)
    control.update(0.0, 500)
    assert control.value == pytest.approx(0.1 * 0.99, rel=1e-12)
    control = AdaptiveKL(0.1, target=6.0, horizon=1_000)
    control.update(6.6, 100)  # 10% above, a tenth of the horizon
    assert control.value == pytest.approx(0.1 * 1.01, rel=1e-12)
    assert isinstance(kl_controller(0.1, None, 1), FixedKL)
    with pytest.raises(ValueError, match="expected both > 0"):
        AdaptiveKL(0.1, target=0.0, horizon=1)
