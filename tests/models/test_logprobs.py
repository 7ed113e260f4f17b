"""token_logprobs: hand-computed numbers, exact gradients, and nothing that chunking or padding changes."""

import math

import pytest
import torch

from preftune.models.logprobs import LmHead, response_logprobs, token_logprobs
from preftune.models.masked import masked_mean, masked_sum

LN = math.log


def two_token_head() -> torch.Tensor:
    """Logits are (h0, h1): the identity as a head."""
    return torch.eye(2)


def test_logprob_and_entropy_of_a_hand_computed_distribution() -> None:
    hidden = torch.tensor([[LN(3.0), 0.0]])  # softmax = (3/4, 1/4)
    logps, entropy, top1 = token_logprobs(hidden, two_token_head(), torch.tensor([1]), return_top1=True)
    torch.testing.assert_close(logps, torch.tensor([LN(0.25)]))
    torch.testing.assert_close(entropy, torch.tensor([0.75 * LN(4 / 3) + 0.25 * LN(4)]))
    assert top1.tolist() == [False]


def test_temperature_divides_the_logits() -> None:
    hidden = torch.tensor([[LN(9.0), 0.0]])  # at T = 2: softmax = (3/4, 1/4)
    logps, _ = token_logprobs(hidden, two_token_head(), torch.tensor([0]), 2.0)
    torch.testing.assert_close(logps, torch.tensor([LN(0.75)]))


def test_gradient_of_a_hand_computed_distribution() -> None:
    hidden = torch.tensor([[LN(9.0), 0.0]], requires_grad=True)
    logps, _ = token_logprobs(hidden, two_token_head(), torch.tensor([0]), 2.0)
    (3 * logps.sum()).backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[3 * 0.25 / 2, -3 * 0.25 / 2]]))


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "logit_scale": 0.7}])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunked_gradients_equal_plain_autograd(options: dict, chunk: int) -> None:
    hidden = torch.randn(7, 5, dtype=torch.float32, requires_grad=True)
    weight, bias, targets, factor = torch.randn(11, 5), torch.randn(11), torch.randint(0, 11, (7,)), torch.randn(7)
    logps, _ = token_logprobs(hidden, weight, targets, 0.7, chunk, bias_V=bias, **options)
    (ours,) = torch.autograd.grad((logps * factor).sum(), hidden)
    logits = (hidden @ weight.T + bias) * options.get("logit_scale", 1.0)
    if cap := options.get("softcap"):
        logits = cap * torch.tanh(logits / cap)
    reference = torch.distributions.Categorical(logits=logits / 0.7).log_prob(targets)
    (theirs,) = torch.autograd.grad((reference * factor).sum(), hidden)
    torch.testing.assert_close(logps, reference, rtol=0, atol=3e-6)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-6)


def test_a_head_that_trains_gets_its_gradient() -> None:
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    logps, entropy = token_logprobs(hidden, weight, torch.tensor([0, 1, 2, 5]), chunk=3)
    logps.sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    # rows of onehot - softmax sum to zero over the vocabulary, so the head's gradient does as well
    torch.testing.assert_close(weight.grad.sum(0), torch.zeros(3), rtol=0, atol=1e-5)
    assert not entropy.requires_grad


def test_entropy_carries_a_gradient_only_when_asked() -> None:
    hidden = torch.tensor([[0.5, 0.0]], requires_grad=True)
    _, detached = token_logprobs(hidden, two_token_head(), torch.tensor([0]))
    _, entropy = token_logprobs(hidden, two_token_head(), torch.tensor([0]), differentiable_entropy=True)
    assert not detached.requires_grad
    entropy.sum().backward()
    assert hidden.grad is not None
    # dH/dx = -x p (1 - p) for the logit x of two tokens
    p = 1 / (1 + math.exp(-0.5))
    torch.testing.assert_close(hidden.grad[:, 0], torch.tensor([-0.5 * p * (1 - p)]))


def test_bf16_gives_fp32_log_probs_and_a_bf16_gradient() -> None:
    hidden = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(16, 8, dtype=torch.bfloat16)
    logps, entropy = token_logprobs(hidden, weight, torch.tensor([0, 3, 15]))
    assert logps.dtype == entropy.dtype == torch.float32
    logps.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    assert not token_logprobs(hidden.detach(), weight, torch.tensor([0, 3, 15]))[0].requires_grad


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_without_log_probs_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="expected > 0"):
        token_logprobs(torch.ones(1, 2), two_token_head(), torch.tensor([0]), temperature)


def test_shift_row_offsets_and_padding_of_responses() -> None:
    """Position t predicts token t + 1; rows begin at different places; what stands after them does not matter."""
    # the hidden state at position t puts all its weight on token t % 3
    hidden = torch.nn.functional.one_hot(torch.arange(6) % 3, 3).float().expand(2, 6, 3) * 1000
    ids = torch.tensor([[9, 0, 1, 2, 9, 9], [9, 9, 9, 2, 0, 1]])
    head = LmHead(torch.eye(3))
    out = response_logprobs(hidden, ids.clamp(max=2), torch.tensor([1, 3]), torch.tensor([3, 2]), head)
    torch.testing.assert_close(out.logps_BR, torch.zeros(2, 3), rtol=0, atol=1e-6)
    shifted = response_logprobs(hidden, ids.roll(1, 1).clamp(max=2), torch.tensor([1, 3]), torch.tensor([3, 2]), head)
    assert (shifted.logps_BR[0] < -900).all()
    assert float(shifted.logps_BR[1, 2]) == 0.0  # outside the shorter response


def test_a_response_needs_something_before_it() -> None:
    with pytest.raises(ValueError, match="expected >= 1"):
        response_logprobs(torch.ones(1, 2, 2), torch.zeros(1, 2).long(), torch.tensor([0]), torch.tensor([1]),
                          LmHead(torch.eye(2)))  # fmt: skip


def test_masked_reductions_ignore_what_they_mask() -> None:
    x, mask = torch.tensor([[1.0, 3.0, math.nan], [5.0, math.inf, 7.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert float(masked_sum(x, mask)) == 9.0
    assert masked_mean(x, mask, 1).tolist() == [2.0, 5.0]
    assert float(masked_mean(x, mask * 0)) == 0.0
