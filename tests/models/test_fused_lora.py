"""The fused LoRA layer gives PEFT's numbers and gradients, and leaves to PEFT what it does not know."""

import copy

import pytest
import torch
from peft import LoraConfig, LoraModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from preftune.models import fused_lora
from preftune.models.fused_lora import use_fused_lora


class Two(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10, dtype=dtype)
        self.second = nn.Linear(10, 4, bias=False, dtype=dtype)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def both(dtype: torch.dtype = torch.float32, **options):
    """The same adapter with PEFT's forward and with ours."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["first", "second"], init_lora_weights=False, **options)
    plain = get_peft_model(Two(dtype).requires_grad_(False), config)
    fused = copy.deepcopy(plain)
    use_fused_lora(fused)
    return plain.eval(), fused.eval()


def outcome(model, x):
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    (y.float() * torch.arange(1.0, 5.0)).sum().backward()
    return y.detach(), x.grad, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def counted(monkeypatch) -> list[int]:
    """Grows with every call of the fused function."""
    calls: list[int] = []
    apply = fused_lora._FusedLora.apply
    monkeypatch.setattr(fused_lora._FusedLora, "apply", lambda *args: (calls.append(1), apply(*args))[1])
    return calls


def test_outputs_and_gradients_are_pefts(monkeypatch):
    calls = counted(monkeypatch)
    plain, fused = both()
    x = torch.randn(2, 5, 6)
    for ours, theirs in zip(outcome(fused, x)[:2], outcome(plain, x)[:2], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    ours, theirs = outcome(fused, x)[2], outcome(plain, x)[2]
    assert ours.keys() == theirs.keys()
    assert len(ours) == 4
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-5)
    assert len(calls) == 4


def test_under_autocast_it_is_as_close_to_fp32_as_peft():
    """On average over inputs: which of two roundings is luckier on one of them says nothing."""
    plain, fused = both()
    errors = []
    for seed in range(20):
        x = torch.randn(64, 6, generator=torch.Generator().manual_seed(seed))
        exact = outcome(plain, x)[2]
        with torch.autocast("cpu", torch.bfloat16):
            low = [outcome(model, x) for model in (fused, plain)]
        assert low[0][0].dtype == torch.bfloat16
        errors.append([[float((each[2][n] - g).norm() / g.norm()) for n, g in exact.items()] for each in low])
    ours, pefts = torch.tensor(errors).mean(0)
    assert (ours <= 1.2 * pefts).all()


def test_a_frozen_adapter_and_an_input_without_gradient():
    plain, fused = both()
    for model in (plain, fused):
        for name, parameter in model.named_parameters():
            if ".first." in name:
                parameter.requires_grad_(False)
    x = torch.randn(7, 6)
    grads = []
    for model in (plain, fused):
        model(x).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) == 2
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name], atol=1e-5, rtol=1e-5)


# `second` has no bias, so that PEFT warns that this LoRA cannot be merged: nobody merges it here
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}])
def test_more_than_a_plain_lora_is_pefts_business(monkeypatch, options):
    calls = counted(monkeypatch)
    plain, fused = both(**options)
    x = torch.randn(3, 6)
    torch.manual_seed(1)
    expected = plain.train()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(fused.train()(x), expected)
    assert not calls


def test_disabled_merged_several_or_mixed_adapters_are_pefts_business(monkeypatch):
    calls = counted(monkeypatch)
    plain, fused = both()
    x = torch.randn(3, 6)
    with plain.disable_adapter(), fused.disable_adapter():
        torch.testing.assert_close(fused(x), plain(x))
    for model in (plain, fused):
        model.add_adapter("other", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
        torch.manual_seed(2)
        inner = model.get_base_model()
        assert isinstance(inner, Two)
        first = inner.first
        assert isinstance(first, LoraLinear)
        for factor in (first.lora_B["other"], first.lora_A["other"]):
            assert isinstance(factor, nn.Linear)
            nn.init.normal_(factor.weight)
        assert isinstance(model.base_model, LoraModel)
        model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(fused(x), plain(x))
    fused.merge_adapter()
    plain.merge_adapter()
    torch.testing.assert_close(fused(x), plain(x))
    assert not calls


def test_a_16_bit_base_without_autocast_keeps_pefts_casts(monkeypatch):
    calls = counted(monkeypatch)
    plain, fused = both(torch.bfloat16)
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    torch.testing.assert_close(fused(x), plain(x))
    assert not calls


def test_every_layer_of_the_base_is_reached():
    _, fused = both()
    assert all("forward" in m.__dict__ for m in fused.modules() if type(m) is LoraLinear)
