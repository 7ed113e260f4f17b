"""The decoder for GPUs, here on the CPU: its completions are the other decoder's, and it seldom looks. What only a
device can show is in tests/device/test_decode.py."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from preftune.models import device_decoder
from preftune.models.decoder import Decoder
from preftune.models.device_decoder import DeviceDecoder
from preftune.models.generate import Generation, sample

from .test_token_step import CONFIGS, PROMPTS, build


class Plain:
    """In place of the graphs: every step as it is."""

    keys: ClassVar[list[Any]] = []

    def __init__(self, device: object) -> None:
        Plain.keys = []

    def run(self, key: Any, step: Callable[[], None]) -> None:
        Plain.keys.append(key)
        step()

    def forget(self) -> None:
        pass


@pytest.fixture
def draw(monkeypatch):
    monkeypatch.setattr(device_decoder, "StepGraphs", Plain)
    monkeypatch.setattr(DeviceDecoder, "_places", lambda self, asked: asked)

    def drawn(kind: type[Decoder], adapters, prompts, **changes) -> Generation:
        monkeypatch.setattr("preftune.models.generate.decoder_for", lambda adapters: kind)
        settings: dict[str, Any] = dict(max_new_tokens=20, seed=3, eos_token_id=-1, pad_token_id=0, batch_size=4)
        return sample(adapters, None, prompts, **(settings | changes))

    return drawn


def alike(one: Generation, other: Generation) -> bool:
    return one.tokens == other.tokens and all(
        p == pytest.approx(q, abs=1e-4) for p, q in zip(one.logprobs, other.logprobs, strict=True)
    )


@pytest.mark.checklist("P2")
@pytest.mark.parametrize("name", CONFIGS)
def test_p02_a_gpus_decoder_draws_what_the_other_one_draws(name, draw):
    adapters = build(name)
    expected = draw(Decoder, adapters, PROMPTS)
    for batch_size in (1, 4, None):
        assert alike(draw(DeviceDecoder, adapters, PROMPTS, batch_size=batch_size), expected)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_places_are_refilled_and_given_up(batch_size, draw):
    """Rows that end at many times, short ones after long ones: what an earlier row left in a place is not seen."""
    adapters, prompts, stops = build("llama"), [[5 + i % 7] * (1 + i % 5) for i in range(40)], list(range(3, 40))
    expected = draw(Decoder, adapters, prompts, eos_token_id=stops, batch_size=40)
    assert len({len(row) for row in expected.tokens}) > 5
    done: list[int] = []
    ours = draw(DeviceDecoder, adapters, prompts, eos_token_id=stops, batch_size=batch_size, on_batch=done.append)
    assert alike(ours, expected) and ours.finished == expected.finished
    assert done == sorted(done) and done[-1] == 40


@pytest.mark.parametrize(("new", "expected"), [(41, [0, 8, 16, 24, 32, 40]), (12, [0, 8, 11])])
def test_what_has_ended_is_read_every_eight_steps_and_when_it_must_have(new, expected, draw, monkeypatch):
    adapters, looks = build("llama"), []
    plain = DeviceDecoder._look
    monkeypatch.setattr(DeviceDecoder, "_look", lambda self: looks.append(len(Plain.keys)) or plain(self))
    draw(DeviceDecoder, adapters, PROMPTS[:4], max_new_tokens=new)
    assert looks == expected


def test_steps_have_few_shapes(draw, monkeypatch):
    """Halves of the rows and multiples of columns, within what a row can need: 8 + 20 tokens here, 32 columns."""
    monkeypatch.setattr(device_decoder, "COLUMNS", 16)
    adapters, prompts = build("llama"), [[5 + i] * (1 + i % 8) for i in range(16)]
    draw(DeviceDecoder, adapters, prompts, eos_token_id=list(range(3, 60)), batch_size=16)
    assert {columns for _, columns in Plain.keys} == {16, 32}
    assert {rows for rows, _ in Plain.keys} <= {16, 8, 4, 2, 1} and len(Plain.keys) > 10


def test_tokens_are_heard_as_they_are_drawn(draw):
    heard: dict[int, list[int]] = {}

    def hear(places, tokens):
        for place, token in zip(places, tokens, strict=True):
            heard.setdefault(place, []).append(token)

    drawn = draw(DeviceDecoder, build("llama"), PROMPTS, on_tokens=hear)
    assert [heard[place] for place in range(len(PROMPTS))] == drawn.tokens
    assert not Plain.keys
