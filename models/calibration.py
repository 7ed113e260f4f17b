"""How fast this machine is, measured in a few seconds on the steps that will run.

A step of a stage is timed on the first layers of the base, one and four of them, with random weights and the stage's
own rows: the packed forward, the real LoRA, the real head. What a layer adds and what is there without any are told
apart so, and the whole model's time follows. Memory allows no more of a large model, and time neither.
"""

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from .adapters import DEFAULT, AdapterSet
from .base import Base
from .batching import TokenIds, right_pad
from .generate import sample
from .lora import LoraSpec
from .packing import use_packed_forward
from .quantised import pack
from .quiet import quiet_transformers

FEW = (1, 4)
"""Layers of the models that are timed."""

_REPEATS = 5
"""At most so often."""


@dataclass(frozen=True)
class Machine:
    """What is timed on.

    Attributes:
        dtype: of the base.
        packed: whether the forward leaves out padding and what rows share.
        quantization: of the base; None: none.
        full: whether all weights train, in fp32.
        most_bytes: of the largest model that may be made.
    """

    config: PreTrainedConfig
    lora: LoraSpec
    dtype: torch.dtype
    device: torch.device
    packed: bool = True
    quantization: str | None = None
    full: bool = False
    most_bytes: int = 4 << 30


class Timed:
    """Models of a few layers, ready to be timed.

    Raises:
        MemoryError: they would be larger than `most_bytes`.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._models = [_random_model(machine, layers) for layers in FEW]

    def seconds(self, run: Callable[["Few"], None], limit: float) -> float:
        """Seconds of `run` on the whole model, measured for about `limit` seconds."""
        return self._whole(*(_least(run, few, limit / len(self._models)) for few in self._models))

    def decoding(self, prompts: Sequence[TokenIds], new_tokens: int) -> tuple[float, float]:
        """Seconds until these prompts, together, have their first token each, and of one more token for each."""
        (first, step), (more_first, more_step) = (_decoded(few, prompts, new_tokens) for few in self._models)
        return self._whole(first, more_first), self._whole(step, more_step)

    def _whole(self, one: float, four: float) -> float:
        """Of the whole model, from what both of few layers took."""
        fewest, more = (few.layers for few in self._models)
        layers = self.machine.config.get_text_config().num_hidden_layers
        return one + max(0.0, four - one) / (more - fewest or 1) * (layers - fewest)


class Few:
    """A model of a few layers with a trained adapter; where all of it trains, one of rank 1 is beside."""

    def __init__(self, machine: Machine, adapters: AdapterSet) -> None:
        self.machine, self.adapters, self.head = machine, adapters, adapters.head
        self.layers: int = adapters.causal.config.get_text_config().num_hidden_layers
        trained = [each for each in adapters.model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0)

    @contextmanager
    def speaking(self) -> Generator[None]:
        low = self.machine.dtype != torch.float32
        cast = torch.autocast(self.machine.device.type, dtype=self.machine.dtype if low else None, enabled=low)
        with self.adapters.using(DEFAULT), cast:
            yield

    def hidden(self, rows: Sequence[TokenIds]) -> Tensor:
        """Last hidden states [B, L, H]."""
        ids_BL, mask_BL = right_pad(rows, 0, self.machine.device)
        return self.adapters.backbone(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).last_hidden_state

    def logps(self, hidden_BLH: Tensor, scored: int) -> Tensor:
        """Log-probs of so many tokens."""
        flat_NH = hidden_BLH.flatten(0, 1)
        at_S = torch.arange(scored, device=flat_NH.device) % len(flat_NH)
        return self.head.token_logprobs(flat_NH[at_S], torch.zeros_like(at_S))[0]


def train(
    rows: Sequence[TokenIds], scored: int, *, reference: bool = False, step: float = 1.0
) -> Callable[[Few], None]:
    """Forward and backward of a micro-batch.

    Args:
        scored: tokens with a loss; 0: a scalar head's number a row.
        reference: a second forward without gradients.
        step: optimiser steps for one such micro-batch.
    """

    def run(few: Few) -> None:
        with few.speaking():
            hidden = few.hidden(rows)
            loss = few.logps(hidden, scored).sum() if scored else hidden.float().mean()
            if reference:
                with torch.no_grad():
                    few.logps(few.hidden(rows), scored)
            loss.backward()
        if step >= 1:
            few.optimizer.step()
            few.optimizer.zero_grad()

    return run


def look(rows: Sequence[TokenIds], scored: int) -> Callable[[Few], None]:
    """A forward without gradients."""

    def run(few: Few) -> None:
        with torch.no_grad(), few.speaking():
            hidden = few.hidden(rows)
            if scored:
                few.logps(hidden, scored)

    return run


def _decoded(few: Few, prompts: Sequence[TokenIds], new_tokens: int) -> tuple[float, float]:
    """Seconds until the first token of all, and of the usual step after it. A GPU is waited for at each step."""

    def draw(count: int) -> list[float]:
        at = [time.perf_counter()]
        sample(
            few.adapters,
            DEFAULT,
            prompts,
            max_new_tokens=count,
            eos_token_id=-1,
            pad_token_id=0,
            seed=0,
            batch_size=len(prompts),
            on_tokens=lambda *_: at.append(time.perf_counter()),
        )
        return [end - start for start, end in itertools.pairwise(at)]

    draw(2)  # the first time also tries which way of decoding is right
    first, *steps = draw(new_tokens)
    return first, statistics.median(steps)


def _least(run: Callable[[Few], None], few: Few, limit: float) -> float:
    """The least of what fits into the limit, after a first time that is not counted; at least one. What else the
    machine does makes a step longer, and never shorter."""
    began = time.perf_counter()
    run(few)
    found: list[float] = []
    while not found or (len(found) < _REPEATS and time.perf_counter() - began + found[-1] < limit):
        start = time.perf_counter()
        run(few)
        _wait(few.machine.device)
        found.append(time.perf_counter() - start)
    return min(found)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _random_model(machine: Machine, layers: int) -> Few:
    config = copy.deepcopy(machine.config)
    text = config.get_text_config()
    text.num_hidden_layers = min(layers, text.num_hidden_layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    dtype = torch.float32 if machine.full else machine.dtype
    with torch.device("meta"), quiet_transformers():
        bare = AutoModelForCausalLM.from_config(config, dtype=dtype)
    size = sum(each.numel() * each.element_size() for each in bare.parameters())
    if size > machine.most_bytes:
        raise MemoryError(f"{layers} of its layers alone take {size / 1e9:.1f} GB")
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.requires_grad_(False).eval().to(machine.device)
    if machine.quantization is not None:
        pack(model, machine.quantization)
    base = Base("calibration", Path(), None, "")
    use_packed_forward(model.base_model, machine.packed)
    adapters = AdapterSet.create(model, base, LoraSpec(r=1, alpha=1) if machine.full else machine.lora)
    if machine.full:
        adapters.model.requires_grad_(True)
    return Few(machine, adapters)
