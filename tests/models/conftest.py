"""A tiny random base and its adapters, built once for the whole session."""

import pytest
import torch

from preftune.models.adapters import AdapterSet
from preftune.models.base import Base
from preftune.models.loading import load_model, resolve_base
from preftune.models.lora import LoraSpec, lora_state
from preftune.models.tokens import load_tokenizer


@pytest.fixture(scope="session")
def base() -> Base:
    return resolve_base("random:llama")


@pytest.fixture(scope="session")
def tokenizer(base):
    return load_tokenizer(base)


@pytest.fixture
def make(base):
    """`make(**LoraSpec fields)`: an AdapterSet whose "default" really changes the base."""

    def build(parent=None, dtype=torch.float32, **lora) -> AdapterSet:
        adapters = AdapterSet.create(
            load_model(base, dtype=dtype), base, LoraSpec(**{"r": 4, "alpha": 8, **lora}), parent
        )
        if parent is None:
            shake(adapters, "default")
        return adapters

    return build


def shake(adapters: AdapterSet, name: str, seed: int = 0) -> None:
    """Give the adapter a B that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in lora_state(adapters._layers, name).items():
            if "lora_B" in key:
                parameter.normal_(std=0.1, generator=generator)


IDS = torch.tensor([[8, 30, 60, 61, 200, 17, 2], [9, 9, 100, 101, 7, 8, 263]])


def logits(adapters: AdapterSet, name: str | None) -> torch.Tensor:
    with torch.no_grad(), adapters.using(name):
        return adapters.model(input_ids=IDS).logits
