"""KL over the whole vocabulary against sums over everything that a model with five tokens can say."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from preftune.eval.kl import kl_from_logits, sequence_kls, summarise
from preftune.models.generate import sample

EOS, PAD, STEPS = 2, 0, 3
PROMPTS = [[1, 3, 4], [1, 4]]


def everything_said() -> list[list[int]]:
    """All responses of at most STEPS tokens that end at EOS or at the limit."""
    said = []
    for length in range(1, STEPS + 1):
        for tokens in itertools.product(range(5), repeat=length):
            ended = tokens[-1] == EOS
            if EOS not in tokens[:-1] and (ended or length == STEPS):
                said.append(list(tokens))
    return said


def log_probability(adapters, role, prompt, response, temperature) -> float:
    with torch.no_grad(), adapters.using(role):
        logits = adapters.model(input_ids=torch.tensor([prompt + response])).logits[0]
    logps = (logits.double() / temperature).log_softmax(-1)
    return sum(float(logps[len(prompt) + place - 1, token]) for place, token in enumerate(response))


@pytest.mark.checklist("E4")
@pytest.mark.parametrize("reference", ["other", None])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_e04_expectation_is_the_exact_kl(five_tokens, reference, temperature):
    # A KL of about 1 nat, so that 1e-6 is well above the rounding of fp32.
    for name in ("default", "other"):
        for parameter in five_tokens.parameters(name):
            parameter.data.mul_(0.5)
    for prompt in PROMPTS:
        said = everything_said()
        ours = [log_probability(five_tokens, "default", prompt, y, temperature) for y in said]
        theirs = [log_probability(five_tokens, reference, prompt, y, temperature) for y in said]
        assert sum(map(math.exp, ours)) == pytest.approx(1.0)
        exact = sum(math.exp(a) * (a - b) for a, b in zip(ours, theirs, strict=True))
        kls = sequence_kls(
            five_tokens, "default", reference, [prompt] * len(said), said, temperature=temperature, pad_token_id=PAD
        )
        assert exact > 0.05
        mean = sum(math.exp(a) * kl for a, kl in zip(ours, kls, strict=True))
        assert mean == pytest.approx(exact, abs=1e-6)


@pytest.mark.checklist("E4")
def test_e04_a_policy_against_itself_has_a_kl_of_exactly_zero(five_tokens):
    five_tokens.copy("again")
    said = everything_said()
    kls = sequence_kls(five_tokens, "default", "again", [PROMPTS[0]] * len(said), said, temperature=1, pad_token_id=PAD)
    assert kls == [0.0] * len(said)


@pytest.mark.checklist("E4")
def test_e04_neither_padding_nor_batches_nor_chunks_change_a_number(five_tokens):
    said = everything_said()
    prompts = [PROMPTS[place % 2] for place in range(len(said))]
    changes: list[dict[str, Any]] = [{}, {"max_tokens": 1}, {"max_tokens": 40}, {"chunk": 1}, {"chunk": 7}]
    runs = [
        sequence_kls(five_tokens, "default", "other", prompts, said, temperature=1, pad_token_id=PAD, **settings)
        for settings in changes
    ]
    for run in runs[1:]:
        assert run == pytest.approx(runs[0], abs=1e-6)


def exact_kl(adapters, prompt) -> tuple[float, float]:
    """KL(default || other) by the sum over all responses, and the variance of log default(y) - log other(y)."""
    said = everything_said()
    ours = [log_probability(adapters, "default", prompt, y, 1.0) for y in said]
    theirs = [log_probability(adapters, "other", prompt, y, 1.0) for y in said]
    exact = sum(math.exp(a) * (a - b) for a, b in zip(ours, theirs, strict=True))
    return exact, sum(math.exp(a) * (a - b - exact) ** 2 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.checklist("E4")
def test_e04_samples_estimate_it_with_an_error_as_large_as_stated(five_tokens):
    prompt, runs, n = PROMPTS[0], 300, 100
    drawn = sample(
        five_tokens,
        "default",
        [prompt] * (runs * n),
        max_new_tokens=STEPS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        seed=0,
        batch_size=runs * n,
    ).tokens
    kls = sequence_kls(
        five_tokens, "default", "other", [prompt] * len(drawn), drawn, temperature=1, pad_token_id=PAD, max_tokens=10**6
    )
    exact, naive_variance = exact_kl(five_tokens, prompt)
    parts = [slice(start, start + n) for start in range(0, runs * n, n)]
    measured = [summarise(kls[part], [len(y) for y in drawn[part]], 1.0) for part in parts]
    errors = np.array([each.per_sequence - exact for each in measured])
    stated = np.array([each.per_sequence_se for each in measured])
    assert (abs(errors) <= 3 * stated).mean() >= 0.97
    # An error stated too large would pass as well; it is the errors' own spread, and below that of the plain estimate.
    assert np.sqrt((stated**2).mean()) == pytest.approx(errors.std(), rel=0.1)
    assert stated.max() < math.sqrt(naive_variance / n)
    assert measured[0].per_token == pytest.approx(sum(kls[:n]) / sum(map(len, drawn[:n])))
    assert (measured[0].n, measured[0].temperature) == (n, 1.0)


def test_two_coins_by_hand():
    fair, biased = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    assert kl_from_logits(fair, biased, 1.0).item() == pytest.approx(0.5 * math.log(4 / 3))
    # At temperature 1/2 the odds 3 : 1 become 9 : 1.
    assert kl_from_logits(fair, biased, 0.5).item() == pytest.approx(0.5 * math.log(25 / 9))


def test_greedy_has_no_kl(five_tokens):
    with pytest.raises(ValueError, match="temperature is 0"):
        sequence_kls(five_tokens, "default", None, [[1]], [[2]], temperature=0, pad_token_id=PAD)
