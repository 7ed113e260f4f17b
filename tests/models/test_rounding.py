"""Rounding to 16 bits: exact where it can be, and right on average where it cannot."""

import pytest
import torch

from preftune.models.rounding import rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_the_dtype_can_hold_stays_what_it_is(dtype: torch.dtype):
    weight = torch.randn(64, 96).to(dtype)
    assert torch.equal(rounded(weight.float(), dtype), weight)
    assert torch.equal(rounded(torch.zeros(3, 4, 5), dtype), torch.zeros(3, 4, 5, dtype=dtype))
    exact = torch.randn(4, 4)
    assert torch.equal(rounded(exact, torch.float32), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_a_change_below_the_grid_survives_on_average_and_in_every_row(dtype: torch.dtype, share: float):
    step = torch.finfo(dtype).eps
    for sign in (1, -1):
        weight = torch.full((256, 512), sign * (1 + share * step))
        found = rounded(weight.clone(), dtype).float()
        assert set(found.abs().unique().tolist()) == {1.0, 1 + step}
        error = (found - weight) / step
        # rounded to the nearest, each of these would be off by `share` or 1 - `share`, all in the same direction
        assert abs(error.mean()) < 2e-3 and error.mean(0).abs().max() < 0.02 and error.mean(1).abs().max() < 0.02


def test_it_is_a_function_of_the_weights_and_never_further_than_a_step():
    weight = torch.randn(8, 3, 40)
    first, second = (rounded(weight.clone(), torch.bfloat16) for _ in range(2))
    assert torch.equal(first, second)
    step = torch.finfo(torch.bfloat16).eps * weight.abs()
    assert bool(((first.float() - weight).abs() <= step).all())


def test_the_sums_of_a_product_keep_a_small_low_rank_change():
    torch.manual_seed(1)
    base = torch.randn(128, 256).bfloat16().float()
    delta = 5e-4 * torch.randn(128, 2) @ torch.randn(2, 256)
    inputs = torch.randn(64, 256)
    wanted = inputs @ delta.T

    def kept(merged: torch.Tensor) -> float:
        found = inputs @ (merged.float() - base).T
        return float((found * wanted).sum() / wanted.square().sum())

    assert kept(rounded(base + delta, torch.bfloat16)) == pytest.approx(1, abs=0.1)
    assert kept((base + delta).bfloat16()) < 0.7
