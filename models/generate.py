"""The one sampler: PPO's rollouts, evaluation and chat all draw their completions here.

Prompts are prefilled, each distinct one once, and decoded together with a key-value cache; a row that has ended gives
its place to a waiting prompt (`decoder.py`). Every row draws from a random stream of its own (`sampling.py`), so that
what it says does not depend on its neighbours.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from . import seams
from .adapters import AdapterSet
from .batching import TokenIds
from .decoder import Decoder, StatefulDecoder
from .logprobs import LmHead
from .lora import merged_weight
from .prepack import Product, merges_all, prepack, prepacked, prepacks
from .sampling import Sampling


@dataclass(frozen=True)
class Generation:
    """Completions in the order of their prompts.

    Attributes:
        tokens: ids of each completion, EOS included.
        logprobs: log-probability of each of those tokens under the whole temperature-scaled distribution, before any
            top-k or top-p cut: the quantity that training recomputes.
        finished: whether EOS ended the completion (False: it was cut at `max_new_tokens`).
    """

    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)


@contextmanager
def merged(adapters: AdapterSet, role: str | None) -> Generator[None, None, None]:
    """Within it the base carries the adapter's change in its own weights, and no adapter runs.

    Decoding then costs what the base costs. The base's tensors are set aside, never written to, so they come back bit
    for bit. A quantised base cannot be merged exactly: there the adapter runs beside it as in training.
    """
    layers = [m for m in adapters.model.modules() if role is not None and isinstance(m, LoraLayer) and role in m.lora_A]
    weights: list[Any] = [layer.get_base_layer().weight for layer in layers]
    if role is None or not all(type(w) is nn.Parameter and w.is_floating_point() for w in weights):
        with adapters.using(role):
            yield
        return
    originals = [w.data for w in weights]
    try:
        for layer, w in zip(layers, weights, strict=True):
            w.data = merged_weight(layer, role)
        with adapters.using(None):
            yield
    finally:
        for w, data in zip(weights, originals, strict=True):
            w.data = data


@contextmanager
def _ready(
    adapters: AdapterSet, role: str | None, merge: bool
) -> Generator[tuple[LmHead, dict[nn.Module, Product]], None, None]:
    """The model in evaluation mode, speaking through that adapter, its weights laid out for many small products: its
    head, and what `prepacked` yields."""
    model = adapters.model.get_base_model()
    head = LmHead.of(adapters.lm_head, model.config)
    if prepacks(head.weight):
        head = replace(head, product=prepack(head.weight, head.bias))
    was_training = model.training
    model.eval()
    try:
        if merge and role is not None and merges_all(model, role):
            # merged and laid out in one go: the merged weights are never all there in their plain layout
            with adapters.using(None), prepacked(adapters.backbone, role) as joint:
                yield head, joint
        else:
            with merged(adapters, role) if merge else adapters.using(role), prepacked(adapters.backbone) as joint:
                yield head, joint
    finally:
        model.train(was_training)


def keeps_a_state(backbone: PreTrainedModel) -> bool:
    """Whether some layers hold something else than keys and values of their own for every token."""
    seams.require(seams.DECODER_FIELDS)
    config = backbone.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    shared = getattr(config, "num_kv_shared_layers", 0)
    return bool(getattr(backbone, "_is_stateful", False) or shared or kinds - {"full_attention", "sliding_attention"})


def check_request(prompts: Sequence[TokenIds], **numbers: int) -> None:
    """Refuse an empty prompt, and numbers below 1.

    Raises:
        ValueError: one of them, with its name.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt is empty, expected at least one token; give it a BOS or a chat template")
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected 1 or more")


@torch.inference_mode()
def sample(
    adapters: AdapterSet,
    role: str | None,
    prompts: Sequence[TokenIds],
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int],
    pad_token_id: int,
    seed: int | Sequence[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    batch_size: int = 32,
    merge: bool = True,
    on_batch: Callable[[int], None] | None = None,
    on_tokens: Callable[[list[int], list[int]], None] | None = None,
) -> Generation:
    """Draw one completion for each prompt; a prompt that is to have n completions stands n times in the list.

    Args:
        adapters: the base with its adapters.
        role: the adapter that speaks; None is the base.
        prompts: token ids, ending where the reply begins; not one may be empty.
        max_new_tokens: at most so many tokens a completion, EOS included.
        eos_token_id: a completion ends with this token, or with the first of these.
        seed: with a prompt's place in the list it fixes that row's random stream, whatever the batch size; or one for
            each prompt, which does so alone.
        batch_size: rows decoded at once.
        merge: fold the adapter into the base's weights while decoding (see `merged`).
        on_batch: called with the number of completions done so far, whenever some ended.
        on_tokens: called at every step with the prompts' places in the list and the token that each of them drew; what
            it raises ends the sampling and leaves the model as it was.

    Raises:
        ValueError: an empty prompt, or a setting out of its range.
    """
    check_request(prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    sampling = Sampling(temperature, top_k, top_p)
    if not prompts:
        return Generation()
    if not isinstance(seed, int) and len(seed) != len(prompts):
        raise ValueError(f"{len(seed)} seeds for {len(prompts)} prompts, expected one each, or one for all")
    with _ready(adapters, role, merge) as (head, joint):
        decoder = (StatefulDecoder if keeps_a_state(adapters.backbone) else Decoder)(
            adapters.backbone,
            head,
            prompts,
            sampling,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            seed=seed,
            batch_size=batch_size,
            done=on_batch,
            heard=on_tokens,
            joint=joint,
        )
        decoder.run()
    return _drawn(decoder, len(prompts))


def _drawn(decoder: Decoder, n: int) -> Generation:
    """What the decoder has kept of its n requests."""
    counts = decoder.count_N.tolist()[:n]
    tokens = [row[:count] for row, count in zip(decoder.tokens_NS.tolist(), counts, strict=False)]
    logprobs = [row[:count] for row, count in zip(decoder.logps_NS.tolist(), counts, strict=False)]
    return Generation(tokens, logprobs, decoder.stopped_N.tolist()[:n])
