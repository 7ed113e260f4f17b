"""Attention as products against the fused kernel, block by block."""

import pytest
import torch
import torch.nn.functional as F

from preftune.models.block_attention import block_attention

BLOCKS = ((0, 5), (5, 12))
RUNS = ((0, 5, 5), (5, 12, 7))


def expected(q, k, v, masks, scale):
    parts = [
        F.scaled_dot_product_attention(
            q[None, :, start:stop],
            k[None, :, start:stop],
            v[None, :, start:stop],
            attn_mask=mask[None, None],
            scale=scale,
            enable_gqa=True,
        )[0]
        for (start, stop), mask in zip(BLOCKS, masks, strict=True)
    ]
    return torch.cat(parts, dim=1).transpose(0, 1)


@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2), (3, 1)])
def test_values_and_gradients_are_the_fused_kernels(heads, shared):
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, 12, 8, dtype=torch.float64, requires_grad=True) for n in (heads, shared, shared))
    # a tree's mask: causal, and a token of the second block that does not see its neighbour
    seen = [torch.ones(t, t, dtype=torch.bool).tril() for t in (5, 7)]
    seen[1][4, 3] = False
    masks = [torch.zeros(s.shape, dtype=torch.float64).masked_fill(~s, float("-inf")) for s in seen]
    weights = torch.randn(12, heads, 8, dtype=torch.float64)
    found = []
    for attend in (lambda: block_attention(q, k, v, RUNS, masks, 0.3), lambda: expected(q, k, v, masks, 0.3)):
        out = attend()
        found.append((out.detach(), *torch.autograd.grad((out * weights).sum(), (q, k, v))))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def test_bf16_is_close_to_fp32():
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, 12, 64) for n in (6, 2, 2))
    masks = [torch.zeros(t, t).masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf")) for t in (5, 7)]
    exact = block_attention(q, k, v, RUNS, masks, 0.125)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    masks = [m.bfloat16() for m in masks]
    low = block_attention(q, k, v, RUNS, masks, 0.125)
    fused = expected(q, k, v, masks, 0.125)
    error, kernels = (float((each.float() - exact).norm() / exact.norm()) for each in (low, fused))
    assert error < 1e-2
    assert error < 2 * kernels


@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2)])
def test_blocks_that_look_the_same_are_one_product(heads, shared):
    """Values and gradients of a run are those of its blocks one by one."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, 13, 8, dtype=torch.float64, requires_grad=True) for n in (heads, shared, shared))
    same, last = (torch.zeros(t, t, dtype=torch.float64) for t in (4, 1))
    same.masked_fill_(torch.ones(4, 4, dtype=torch.bool).triu(1), float("-inf"))
    weights = torch.randn(13, heads, 8, dtype=torch.float64)
    apart = [(0, 4, 4), (4, 8, 4), (8, 12, 4), (12, 13, 1)]
    found = []
    for runs, masks in (([(0, 12, 4), (12, 13, 1)], [same, last]), (apart, [same, same, same, last])):
        out = block_attention(q, k, v, runs, masks, 0.3)
        found.append((out.detach(), *torch.autograd.grad((out * weights).sum(), (q, k, v))))
    for together, alone in zip(*found, strict=True):
        torch.testing.assert_close(together, alone, atol=1e-12, rtol=1e-12)
