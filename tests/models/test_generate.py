"""The sampler against transformers' own `generate`, and against distributions worked out by hand."""

from typing import Any

import pytest
import torch

from preftune.models.adapters import AdapterSet
from preftune.models.batching import left_pad
from preftune.models.beam import beam_search
from preftune.models.generate import keeps_a_state, merged, sample
from preftune.models.loading import load_model, resolve_base
from preftune.models.lora import LoraSpec
from preftune.models.sampling import Sampling, choose, filter_probs
from preftune.models.tokens import load_tokenizer

PROMPTS = [[5, 6, 7, 8, 9], [40], [90, 12, 33], [7, 7, 7, 7, 7, 7, 7, 7]]


@pytest.fixture(scope="module")
def adapters() -> AdapterSet:
    base = resolve_base("random:llama")
    made = AdapterSet.create(load_model(base), base, LoraSpec(r=4, alpha=8), parent=None)
    torch.manual_seed(1)
    for name, p in made.model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.2)
    return made


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve_base("random:llama"))


def reference_greedy(adapters, tokenizer, new_tokens):
    ids, mask = left_pad(PROMPTS, tokenizer.pad_token_id, torch.device("cpu"))
    out = adapters.model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    rows = []
    for row in out[:, ids.size(1) :].tolist():
        ended = tokenizer.eos_token_id in row
        rows.append(row[: row.index(tokenizer.eos_token_id) + 1] if ended else row)
    return rows


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_greedy_is_generate_token_by_token(adapters, tokenizer, merge, batch_size):
    ours = sample(
        adapters,
        "default",
        PROMPTS,
        max_new_tokens=12,
        temperature=0,
        seed=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        batch_size=batch_size,
        merge=merge,
    )
    assert ours.tokens == reference_greedy(adapters, tokenizer, 12)


def draw(adapters, tokenizer, **changes):
    settings: dict[str, Any] = dict(
        max_new_tokens=10, seed=3, temperature=0.9, batch_size=4, eos_token_id=tokenizer.eos_token_id
    )
    settings |= changes
    return sample(adapters, "default", PROMPTS, pad_token_id=tokenizer.pad_token_id, **settings)


def test_a_row_does_not_depend_on_its_neighbours(adapters, tokenizer):
    together, alone = draw(adapters, tokenizer), draw(adapters, tokenizer, batch_size=1)
    assert together.tokens == alone.tokens
    assert draw(adapters, tokenizer, seed=4).tokens != together.tokens


def test_logprobs_are_those_of_a_full_forward(adapters, tokenizer):
    out = draw(adapters, tokenizer, temperature=0.7, merge=False)
    for prompt, tokens, logprobs in zip(PROMPTS, out.tokens, out.logprobs, strict=True):
        with torch.no_grad(), adapters.using("default"):
            logits = adapters.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        full = torch.log_softmax(logits / 0.7, -1)[torch.arange(len(tokens)), torch.tensor(tokens)]
        torch.testing.assert_close(torch.tensor(logprobs), full, atol=2e-5, rtol=0)


def test_rows_stop_at_eos_and_leave_the_batch(adapters, tokenizer):
    free = draw(adapters, tokenizer, max_new_tokens=8)
    stop = free.tokens[0][2]
    out = draw(adapters, tokenizer, max_new_tokens=8, eos_token_id=stop)
    for ended, row, full in zip(out.finished, out.tokens, free.tokens, strict=True):
        expected = full[: full.index(stop) + 1] if stop in full else full
        assert row == expected
        assert ended == (stop in full)


def test_merged_gives_the_base_back_bit_for_bit(adapters):
    before = adapters.digest(None)
    with merged(adapters, "default"):
        assert adapters.digest(None) != before
    assert adapters.digest(None) == before


def test_choose_inverts_the_cumulative_distribution():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().repeat(5, 1)
    token, logp = choose(logits, torch.tensor([0.0, 0.09, 0.31, 0.59, 0.999999]), Sampling())
    assert token.tolist() == [0, 0, 2, 2, 3]
    torch.testing.assert_close(logp.exp(), torch.tensor([0.1, 0.1, 0.3, 0.3, 0.4]))


def test_frequencies_follow_the_temperature():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    n = 20_000
    token, _ = choose(probs.log().repeat(n, 1), torch.rand(n), Sampling(temperature=0.5))
    sharpened = probs**2 / (probs**2).sum()
    assert (torch.bincount(token, minlength=4) / n - sharpened).abs().max() < 0.015


def test_a_draw_at_the_very_end_never_takes_a_token_without_mass():
    logits = torch.tensor([[0.0, 0.0, float("-inf"), float("-inf")]])
    token, _ = choose(logits, torch.tensor([1.0]), Sampling())
    assert token.tolist() == [1]


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(top_k=2), [0, 1]),
        (Sampling(top_p=0.45), [0]),
        (Sampling(top_p=0.55), [0, 1]),
        (Sampling(), [0, 1, 2, 3]),
    ],
)
def test_filters_keep_what_their_names_say(sampling, kept):
    left = filter_probs(torch.tensor([[0.5, 0.3, 0.15, 0.05]]), sampling)
    assert left[0].nonzero().squeeze(-1).tolist() == kept


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_p": 0}, {"top_k": -2}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)


def test_an_empty_prompt_is_refused(adapters, tokenizer):
    with pytest.raises(ValueError, match="empty"):
        sample(adapters, None, [[1], []], max_new_tokens=2, eos_token_id=2, pad_token_id=0, seed=0)


@pytest.mark.parametrize("batch_size", [2, 3, 16])
def test_a_place_that_a_row_leaves_is_taken_by_a_waiting_prompt(adapters, tokenizer, batch_size):
    prompts = [[5 + i % 7] * (1 + i % 5) for i in range(20)]
    settings: dict[str, Any] = dict(max_new_tokens=9, seed=1, temperature=1.3, pad_token_id=tokenizer.pad_token_id)
    # several stop tokens: rows end at many different times
    stops = list(range(3, 60))
    together = sample(adapters, None, prompts, batch_size=batch_size, eos_token_id=stops, **settings)
    assert len({len(row) for row in together.tokens}) > 2
    assert any(together.finished) and not all(together.finished)
    alone = sample(adapters, None, prompts, batch_size=1, eos_token_id=stops, **settings)
    assert together.tokens == alone.tokens
    for ours, theirs in zip(together.logprobs, alone.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_equal_prompts_are_prefilled_once_and_answered_differently(adapters, tokenizer, monkeypatch):
    monkeypatch.setattr("preftune.models.packing.rounded", lambda tree: tree)
    sizes = []
    plain = adapters.backbone.forward

    def counting(*args, **kwargs):
        sizes.append(kwargs["input_ids"].numel())
        return plain(*args, **kwargs)

    adapters.backbone.forward = counting
    try:
        prompts = [[5, 6, 7], [8, 9, 10]] * 4
        out = draw_from(adapters, tokenizer, prompts, batch_size=8)
    finally:
        adapters.backbone.forward = plain
    assert sizes[0] == 6 and max(sizes) == 6
    assert len({tuple(row) for row in out.tokens[::2]}) == 4


def draw_from(adapters, tokenizer, prompts, **changes):
    settings: dict[str, Any] = dict(
        max_new_tokens=6, seed=3, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return sample(adapters, None, prompts, **(settings | changes))


def test_the_buffers_move_back_when_they_are_full(adapters, tokenizer):
    """A long queue of short prompts through few places uses many more columns than the buffers have."""
    prompts = [[5 + i % 11] for i in range(30)]
    few = draw_from(adapters, tokenizer, prompts, batch_size=2)
    assert few.tokens == draw_from(adapters, tokenizer, prompts, batch_size=30).tokens


def test_done_counts_up_to_all(adapters, tokenizer):
    seen = []
    draw_from(adapters, tokenizer, [[5, 6]] * 5, batch_size=2, on_batch=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 5


def test_a_sliding_window_reaches_as_far_as_in_generate(tokenizer):
    from transformers import AutoModelForCausalLM, MistralConfig

    from preftune.models.base import Base

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=4, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    ids, mask = left_pad(PROMPTS, 0, torch.device("cpu"))
    expected = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=299)
    made = AdapterSet.create(model, Base("x", resolve_base("random:llama").path, "local", ""), LoraSpec(r=2, alpha=4))
    for batch_size in (2, 4):
        out = sample(
            made, None, PROMPTS, max_new_tokens=8, temperature=0, seed=0, eos_token_id=299, pad_token_id=0,
            batch_size=batch_size,
        )  # fmt: skip
        assert out.tokens == expected[:, ids.size(1) :].tolist()


def test_a_model_that_keeps_a_state_is_decoded_by_the_batch(adapters, tokenizer, monkeypatch):
    """The same completions, by another way of keeping the past."""
    expected = draw(adapters, tokenizer, batch_size=2)
    seen = []
    monkeypatch.setattr("preftune.models.generate.keeps_a_state", lambda backbone: True)
    assert draw(adapters, tokenizer, batch_size=2, on_batch=seen.append).tokens == expected.tokens
    assert seen == [2, 4]


def test_which_models_keep_a_state(adapters):
    from transformers import AutoModel, BambaConfig

    assert not keeps_a_state(adapters.backbone)
    config = BambaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attn_layer_indices=[1], mamba_n_heads=2, mamba_d_head=16, mamba_d_state=8,
        mamba_n_groups=1,
    )  # fmt: skip
    assert keeps_a_state(AutoModel.from_config(config))


def test_every_prompt_may_have_a_seed_of_its_own(adapters, tokenizer):
    """The same seed says the same to the same prompt wherever it stands; one list of seeds is one reply each."""
    prompts = [[5, 6, 7]] * 4
    out = draw_from(adapters, tokenizer, prompts, seed=[8, 9, 8, 10], max_new_tokens=12)
    assert out.tokens[0] == out.tokens[2]
    assert len({tuple(row) for row in out.tokens}) == 3
    assert draw_from(adapters, tokenizer, prompts[:1], seed=[9], max_new_tokens=12).tokens[0] == out.tokens[1]
    with pytest.raises(ValueError, match="2 seeds for 4 prompts"):
        draw_from(adapters, tokenizer, prompts, seed=[1, 2])


def test_beam_search_finds_at_least_what_greedy_finds(adapters, tokenizer):
    settings: dict[str, Any] = dict(
        max_new_tokens=6, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    wide = beam_search(adapters, "default", PROMPTS, num_beams=4, length_penalty=0.0, batch_size=3, **settings)
    narrow = beam_search(adapters, "default", PROMPTS, num_beams=1, **settings)
    greedy = sample(adapters, "default", PROMPTS, temperature=0, seed=0, **settings)
    assert narrow.tokens == greedy.tokens
    for ours, theirs in zip(narrow.logprobs, greedy.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert all(sum(w) >= sum(g) - 1e-4 for w, g in zip(wide.logprobs, greedy.logprobs, strict=True))
    assert any(sum(w) > sum(g) + 1e-3 for w, g in zip(wide.logprobs, greedy.logprobs, strict=True))


def test_a_beam_ends_at_the_first_of_several_tokens(adapters, tokenizer):
    """Called as `sample` is; what it says and when it ends are those of the free search, cut there."""
    settings: dict[str, Any] = dict(num_beams=1, max_new_tokens=12, pad_token_id=tokenizer.pad_token_id)
    free = beam_search(adapters, "default", PROMPTS, eos_token_id=-1, **settings)
    ends, done = [free.tokens[0][3], free.tokens[1][5]], []
    out = beam_search(adapters, "default", PROMPTS, eos_token_id=ends, batch_size=3, on_batch=done.append, **settings)
    for row, logps, finished, whole in zip(out.tokens, out.logprobs, out.finished, free.tokens, strict=True):
        first = next((i for i, token in enumerate(whole) if token in ends), None)
        assert row == (whole if first is None else whole[: first + 1])
        assert len(logps) == len(row)
        assert finished == (first is not None)
    assert done == [3, 4]
    drawn = sample(adapters, "default", PROMPTS, temperature=0, seed=0, eos_token_id=ends, max_new_tokens=12,
                   pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    assert out.tokens == drawn.tokens and out.finished == drawn.finished


def test_a_beam_search_that_cannot_be_is_refused(adapters):
    settings: dict[str, Any] = dict(num_beams=2, max_new_tokens=4, eos_token_id=2, pad_token_id=0)
    assert beam_search(adapters, None, [], **settings).tokens == []
    with pytest.raises(ValueError, match="empty"):
        beam_search(adapters, None, [[5], []], **settings)
    for name in ("num_beams", "max_new_tokens", "batch_size"):
        changed: dict[str, Any] = settings | {name: 0}
        with pytest.raises(ValueError, match=name):
            beam_search(adapters, None, [[5]], **changed)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_tokens_are_heard_as_they_are_drawn(adapters, tokenizer, batch_size):
    heard: dict[int, list[int]] = {}

    def hear(places, tokens):
        assert len(set(places)) == len(places) == len(tokens)
        for place, token in zip(places, tokens, strict=True):
            heard.setdefault(place, []).append(token)

    drawn = draw(adapters, tokenizer, batch_size=batch_size, on_tokens=hear)
    assert [heard[place] for place in range(len(PROMPTS))] == drawn.tokens


def test_what_a_listener_raises_ends_the_sampling_and_changes_nothing(adapters, tokenizer):
    whole = draw(adapters, tokenizer)
    before = {name: tensor.clone() for name, tensor in adapters.model.state_dict().items()}
    steps = []

    def interrupt(places, tokens):
        steps.append(tokens)
        if len(steps) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        draw(adapters, tokenizer, on_tokens=interrupt)
    assert len(steps) == 3
    after = adapters.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert draw(adapters, tokenizer).tokens == whole.tokens
