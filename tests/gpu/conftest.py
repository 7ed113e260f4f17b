"""Tests that only a card can answer; they are skipped where there is none. `make gpu-check` runs them."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _needs_a_card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def compiles() -> None:
    """For tests of compiled kernels, which a card made of CPU memory runs operation by operation."""
    if torch.version.cuda is None:
        pytest.skip("this CUDA device runs no compiled kernel")
