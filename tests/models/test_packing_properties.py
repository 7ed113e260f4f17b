"""Random batches of every shape: the packed forward gives the padded forward's states, logits, losses and gradients."""

import copy
import functools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from preftune.models.logprobs import LmHead, token_logprobs
from preftune.models.lora import linear_names
from preftune.models.packing import use_packed_forward
from preftune.models.prefix_tree import build_tree

from .test_packing import CONFIGS

tokens = st.integers(min_value=3, max_value=7)  # few, so that unrelated rows share beginnings too


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with one to four completions each (pairs, or n samples of a prompt), padded on either side."""
    system = draw(st.lists(tokens, max_size=3))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        prompt = system + draw(st.lists(tokens, min_size=1, max_size=6))
        rows += [prompt + draw(st.lists(tokens, max_size=8)) for _ in range(draw(st.integers(1, 4)))]
    width = max(2, *map(len, rows)) + draw(st.integers(0, 2))
    left = draw(st.booleans())
    pad = [[0] * (width - len(row)) for row in rows]
    ids = [p + row if left else row + p for p, row in zip(pad, rows, strict=True)]
    real = [[1] * len(row) for row in rows]
    ones = [p + r if left else r + p for p, r in zip(pad, real, strict=True)]
    return torch.tensor(ids), torch.tensor(ones)


@functools.cache
def both(name: str):
    """A tiny causal model with a LoRA that changes something, as it is and packed."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="sdpa")
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=linear_names(plain), init_lora_weights=False)
    plain = get_peft_model(plain, lora).eval()
    packed = copy.deepcopy(plain)
    backbone = packed.get_base_model().base_model
    assert isinstance(backbone, PreTrainedModel)
    assert use_packed_forward(backbone)
    return plain, packed


def outcome(model, ids: torch.Tensor, mask: torch.Tensor):
    """Last hidden states, logits, next-token log-probs, and the adapter's gradients of their mean."""
    model.zero_grad()
    inner = model.get_base_model()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    hidden = inner.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)[0]
    head = LmHead.of(inner.get_output_embeddings(), inner.config)
    predicts = mask[:, :-1].bool() & mask[:, 1:].bool()
    logps, _ = token_logprobs(hidden[:, :-1][predicts], head.weight, ids[:, 1:][predicts], softcap=head.softcap)
    (logps.sum() + (hidden[mask.bool()] @ torch.linspace(-1, 1, hidden.shape[-1]).to(hidden.dtype)).sum()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return hidden[mask.bool()].detach(), head.logits(hidden[mask.bool()]).detach(), logps.detach(), gradients


def gradient_error(found, expected) -> float:
    """Relative to the largest entry of all: some gradients are nothing but rounding, as that of a query which has one
    key to look at."""
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    return max(float((found[name] - gradient).abs().max()) for name, gradient in expected.items()) / largest


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(batch=batches())
def test_states_logits_losses_and_adapter_gradients_equal_the_padded_forward(name, batch):
    plain, packed = (outcome(model, *batch) for model in both(name))
    for ours, theirs in zip(packed[:3], plain[:3], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert packed[3].keys() == plain[3].keys() != set()
    assert gradient_error(packed[3], plain[3]) < 1e-5


@settings(max_examples=100, deadline=None, derandomize=True)
@given(batch=batches(), block_tokens=st.integers(1, 40))
def test_every_row_can_be_read_back_from_the_tree(batch, block_tokens):
    ids, mask = batch
    tree = build_tree(ids, mask, block_tokens)
    kept = mask.bool()
    assert torch.equal(tree.ids_N[tree.index_BL][kept], ids[kept])
    assert torch.equal(tree.depth_N[tree.index_BL][kept], (mask.cumsum(-1) - 1)[kept])
    assert len(tree.ids_N) <= int(mask.sum())
    for row in range(len(ids)):
        path = tree.index_BL[row][kept[row]]
        # every token of a row sees all tokens before it, in one block
        for place, node in enumerate(path.tolist()):
            assert all(other <= node < int(tree.end_N[other]) for other in path[: place + 1].tolist())
        assert sum(start <= int(path[0]) and int(path[-1]) < stop for start, stop in tree.blocks) == 1


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@settings(max_examples=10, deadline=None, derandomize=True)
@given(batch=batches())
def test_under_autocast_it_is_as_close_to_fp32_as_the_padded_forward(name, batch):
    ids, mask = batch
    exact = outcome(both(name)[0], ids, mask)[0]
    with torch.autocast("cpu", torch.bfloat16):
        padded, packed = (outcome(model, ids, mask)[0].float() for model in both(name))
    error, padded_error = (packed - exact).abs().mean(), (padded - exact).abs().mean()
    assert error <= 1.5 * padded_error + 1e-3


@pytest.mark.parametrize("name", ["llama", "mistral"])
@settings(max_examples=10, deadline=None, derandomize=True)
@given(batch=batches())
def test_with_gradient_checkpointing_the_gradients_are_the_same(name, batch):
    plain, packed = both(name)
    expected = outcome(plain, *batch)[3]
    inner = packed.get_base_model()
    assert isinstance(inner, PreTrainedModel)
    inner.activation_checkpointing_enable({"use_reentrant": False})
    inner.train()
    try:
        found = outcome(packed, *batch)[3]
    finally:
        inner.activation_checkpointing_disable()
        inner.eval()
    assert gradient_error(found, expected) < 1e-5
