"""Decoding on a card: the graph that it captures says what its steps say, waits for nothing and asks for no memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from preftune import AdapterSet, LoraSpec, load_model, resolve_base
from preftune.models.device_decoder import DeviceDecoder
from preftune.models.generate import sample
from preftune.models.step_graphs import StepGraphs

ROWS = 20


def drawn(device: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Completions of a tiny model whose adapter counts."""
    base = resolve_base("random:llama")
    adapters = AdapterSet.create(load_model(base, device=device, dtype=dtype), base, LoraSpec(r=4, alpha=8))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapters.model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.empty(parameter.shape).normal_(std=0.2, generator=generator))
    prompts = [[5 + i % 7] * (1 + i % 5) for i in range(ROWS)]
    settings: dict[str, Any] = {"max_new_tokens": 40, "eos_token_id": -1, "pad_token_id": 0, "seed": 3, "batch_size": 8}
    return sample(adapters, "default", prompts, **{**settings, **changes})


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[StepGraphs]:
    """Every set of graphs that is made, as it is at the end."""
    made, plain = [], StepGraphs.__init__

    def init(self: StepGraphs, device: torch.device) -> None:
        plain(self, device)
        made.append(self)

    monkeypatch.setattr(StepGraphs, "__init__", init)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step_says_what_the_step_says(graphs: list[StepGraphs], dtype: torch.dtype) -> None:
    captured = drawn("cuda", dtype)
    assert graphs[-1].works and graphs[-1].made
    # somebody who listens is told every token, so no graph is used
    stepped = drawn("cuda", dtype, on_tokens=lambda *_: None)
    assert not graphs[-1].made
    assert captured.tokens == stepped.tokens
    for one, other in zip(captured.logprobs, stepped.logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_completions_are_the_cpus_but_where_rounding_decides() -> None:
    ends: dict[str, Any] = {"eos_token_id": list(range(3, 30))}
    here, there = drawn("cpu", **ends), drawn("cuda", **ends)
    same = [row for row in range(ROWS) if here.tokens[row] == there.tokens[row]]
    assert len(same) >= ROWS - 1
    for row in same:
        assert there.logprobs[row] == pytest.approx(here.logprobs[row], abs=2e-3)


def test_no_generator_of_the_users_is_touched() -> None:
    torch.cuda.manual_seed_all(7)
    before = torch.cuda.get_rng_state()
    drawn("cuda")
    assert torch.equal(before, torch.cuda.get_rng_state())


@contextmanager
def strict() -> Iterator[None]:
    """Within it a wait of the host's raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_replayed_steps_wait_for_nothing_and_ask_for_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at what has ended waits, every eighth step; what lies between two of them does not."""
    step, look = DeviceDecoder._step, DeviceDecoder._look
    began: list[int] = []
    asked_for: list[int] = []

    def asked() -> int:
        return torch.cuda.memory_stats()["allocation.all.allocated"]

    def ended() -> None:
        """A replayed step, or its part before a look, is over."""
        torch.cuda.set_sync_debug_mode(0)
        if began:
            asked_for.append(asked() - began.pop())

    def looked(self: DeviceDecoder) -> bool:
        ended()
        return look(self)

    def stepped(self: DeviceDecoder) -> bool:
        if not self.graphs.made:
            return step(self)
        began.append(asked())
        with strict():
            found = step(self)
        ended()
        return found

    monkeypatch.setattr(DeviceDecoder, "_step", stepped)
    monkeypatch.setattr(DeviceDecoder, "_look", looked)
    drawn("cuda", torch.bfloat16)
    assert len(asked_for) > 60 and set(asked_for) == {0}
