"""The decode step with kernels of ours against the step of PyTorch's operations, and without a compiler."""

import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from preftune.models import token_kernels
from preftune.models.compiled_step import CompiledStep, kernels_for, step_for
from preftune.models.prepack import prepacks
from preftune.models.row_cache import RowCache
from preftune.models.sampling import Sampling, choose
from preftune.models.token_step import TokenStep

from .test_token_step import build

bf16 = torch.bfloat16
built = pytest.mark.skipif(
    shutil.which("c++") is None or not prepacks(torch.zeros(1, dtype=bf16)), reason="no C++ compiler, or no bf16"
)


@pytest.fixture(scope="module")
def kernels() -> token_kernels.TokenKernels:
    found = token_kernels.token_kernels(16, 3, 48, normed=False)
    assert found is not None
    return found


@built
def test_the_norm_and_the_gate_are_pytorchs_bit_for_bit(kernels):
    torch.manual_seed(0)
    x, change, weight = (torch.randn(5, 48).to(bf16), torch.randn(5, 48).to(bf16), torch.rand(48).to(bf16))
    expected = x + change
    out = torch.empty_like(x)
    kernels.add_norm(x, change, weight, 1e-5, out)
    assert torch.equal(x, expected)
    assert torch.equal(out, weight * F.rms_norm(expected.float(), (48,), None, 1e-5).to(bf16))
    gate, up = torch.linspace(-80, 100, 4001).to(bf16), torch.randn(4001).to(bf16)
    assert torch.equal(kernels.gated(gate.clone(), up), F.silu(gate) * up)


@built
@pytest.mark.parametrize("vocabulary", [100, 128, 1000])
def test_a_token_is_drawn_where_the_cumulative_mass_exceeds_the_draw(kernels, vocabulary):
    torch.manual_seed(0)
    logits = (3 * torch.randn(64, vocabulary)).to(bf16)
    logits[:, ::3] = -torch.inf  # never drawn, the first token by a draw of 0 neither
    logits[5] = -torch.inf
    logits[5, vocabulary - 1] = 2
    uniform = torch.rand(64)
    uniform[:3] = torch.tensor([0.0, 1 - 2**-24, 0.5])
    token, logp = kernels.draw(logits, uniform, 0.7)
    exact = (logits.double() / 0.7).log_softmax(-1)
    assert torch.equal(token, torch.searchsorted(exact.exp().cumsum(-1), uniform.double()[:, None], right=True)[:, 0])
    torch.testing.assert_close(logp.double(), exact.gather(1, token[:, None])[:, 0], rtol=0, atol=2e-6)
    again, _ = choose(logits.clone(), uniform, Sampling(0.7))
    assert (token == again).float().mean() > 0.98  # but for a draw on the edge of two tokens


@built
def test_a_row_that_is_no_number_has_no_log_prob_and_a_token_of_the_vocabulary(kernels):
    logits = torch.full((1, 300), torch.nan, dtype=bf16)
    token, logp = kernels.draw(logits, torch.tensor([0.5]), 1.0)
    assert 0 <= int(token) < 300 and logp.isnan().all()


@built
def test_attention_sees_a_rows_own_columns_and_writes_one(kernels):
    """Whatever lies in the others, NaN included; nothing but the newest column changes."""
    torch.manual_seed(0)
    b, k, c, d, stop, first = 3, 2, 11, 16, 8, torch.tensor([0, 5, 8])
    angle = torch.randn(b, d // 2)
    cos, sin = torch.cat([angle.cos()] * 2, -1).to(bf16), torch.cat([-angle.sin(), angle.sin()], -1).to(bf16)
    qkv = torch.randn(b, 10, d).to(bf16)
    column = torch.arange(c)
    hidden = (column < first[:, None]) | (column >= stop)
    past = [torch.randn(b, k, c, d).to(bf16).masked_fill_(hidden[:, None, :, None], torch.nan) for _ in "kv"]
    before = [each.clone() for each in past]
    out = kernels.attention(qkv.view(b, -1), (cos, sin), (None, None), 0.0, (past[0], past[1]), first, stop, 0.3)
    plain = qkv[:, :8]
    swapped = torch.cat([plain[..., d // 2 :], plain[..., : d // 2]], -1)
    turned = torch.addcmul(plain * cos[:, None], swapped, sin[:, None])
    for each, was, new in zip(past, before, (turned[:, 6:], qkv[:, 8:]), strict=True):
        assert torch.equal(each[:, :, stop], new)
        was[:, :, stop] = new
        assert torch.equal(each.nan_to_num(), was.nan_to_num())
    keys, values = (each.float().nan_to_num() for each in past)
    scores = (turned[:, :6].reshape(b, k, 3, d).float() @ keys.transpose(2, 3) * 0.3).masked_fill(
        ((column < first[:, None]) | (column > stop))[:, None, None], -torch.inf
    )
    expected = (scores.softmax(-1) @ values).reshape(b, -1)
    torch.testing.assert_close(out.float(), expected, rtol=2**-8, atol=1e-6)


@built
@pytest.mark.parametrize("name", ["llama", "llama with biases and scaled positions", "qwen2", "qwen3"])
def test_the_step_is_as_near_to_fp32_as_pytorchs_operations_are(name):
    low, exact = build(name, bf16).backbone, build(name, bf16).backbone.float()
    compiled = step_for(low, {})
    assert isinstance(compiled, CompiledStep)
    length = torch.tensor([7, 1, 12, 3])
    head = {"qwen3": 16}.get(name, 8)
    torch.manual_seed(0)
    past = [[torch.randn(4, 2, 16, head).to(bf16) for _ in "kv"] for _ in range(3)]
    hidden = []
    for step, dtype in ((compiled, bf16), (TokenStep(low, {}), bf16), (TokenStep(exact, {}), torch.float32)):
        cache = RowCache(4, 3)
        cache.stop, cache.columns = 11, 16
        for i, (keys, values) in enumerate(past):
            layer: Any = cache.layers[i]
            layer.keys, layer.values = keys.to(dtype, copy=True), values.to(dtype, copy=True)
        with torch.no_grad():
            hidden.append(step(torch.tensor([5, 6, 7, 8]), length, cache).float())
    ours, theirs = ((each - hidden[2]).abs().mean() for each in hidden[:2])
    assert 0 < ours < 1.1 * theirs


def test_without_a_compiler_or_with_a_broken_one_there_are_no_kernels(monkeypatch, tmp_path):
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path))
    for compiler in ("no-such-compiler", "false"):
        monkeypatch.setenv("CXX", compiler)
        token_kernels.token_kernels.cache_clear()
        assert token_kernels.token_kernels(8, 3, 48, normed=False) is None
    token_kernels.token_kernels.cache_clear()
    assert not [each for each in tmp_path.iterdir() if each.is_dir()]


def test_only_what_they_were_made_for_has_kernels():
    assert kernels_for(build("llama").backbone) is None  # fp32
    backbone = build("llama", bf16).backbone
    backbone.config.hidden_act = "gelu"
    assert kernels_for(backbone) is None


@built
def test_a_tensor_of_another_kind_is_refused(kernels):
    x = torch.zeros(2, 48, dtype=bf16)
    for bad in (torch.zeros(2, 48), torch.zeros(48, 2, dtype=bf16).T):
        with pytest.raises(TypeError, match="expected bf16"):
            kernels.add_norm(x, bad, x[0], 1e-5, torch.empty_like(x))
