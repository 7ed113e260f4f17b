"""The one sampler: PPO's rollouts, evaluation and chat all draw their completions here.

Prompts are prefilled, each distinct one once, and decoded together with a key-value cache; a row that has ended gives
its place to a waiting prompt (`decoder.py`). Every row draws from a random stream of its own (`sampling.py`), so that
what it says does not depend on its neighbours.
"""

import functools
import logging
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError
from . import seams
from .adapters import AdapterSet
from .batching import TokenIds
from .cost import rows_at_once
from .decoder import Decoder, LibraryDecoder, RecomputingDecoder, StatefulDecoder
from .device_decoder import DeviceDecoder
from .logprobs import LmHead
from .lora import adapted_weight, merged_weight
from .prepack import Product, merges_all, prepack, prepacked, prepacks
from .rotary import forget_lengths, rotary_limit
from .sampling import Sampling
from .token_rows import rows_written
from .token_step import TokenStep
from .trial import allowed, model_name, precision, quietly, short_windows, trial_rows

logger = logging.getLogger(__name__)


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
    for bit; and so do rows of single tokens that are the adapter's own. A quantised base cannot be merged exactly, nor
    a weight that several layers share, each with its own change (Zamba's attention): there the adapter runs beside it
    as in training.
    """
    layers = [m for m in adapters.model.modules() if role is not None and isinstance(m, LoraLayer) and role in m.lora_A]
    weights = [adapted_weight(layer) for layer in layers]
    uses = Counter(id(p) for _, p in adapters.model.named_parameters(remove_duplicate=False))
    if role is None or not all(type(w) is nn.Parameter and w.is_floating_point() and uses[id(w)] == 1 for w in weights):
        with adapters.using(role):
            yield
        return
    originals = [w.data for w in weights]
    try:
        for layer, w in zip(layers, weights, strict=True):
            w.data = _summed(layer, role)
        with rows_written(adapters.model, role), adapters.using(None):
            yield
    finally:
        for w, data in zip(weights, originals, strict=True):
            w.data = data


_SUMS: WeakKeyDictionary[nn.Module, torch.Tensor] = WeakKeyDictionary()


def _summed(layer: LoraLayer, role: str) -> torch.Tensor:
    """The layer's weight with that adapter in it."""
    found = merged_weight(layer, role)
    module: Any = layer
    if found.device.type == "cpu":
        return found
    kept = _SUMS.get(module)
    if kept is None or kept.shape != found.shape or kept.dtype != found.dtype or kept.device != found.device:
        _SUMS[module] = found
        return found
    return kept.copy_(found)


@contextmanager
def ready(
    adapters: AdapterSet, role: str | None, merge: bool = True
) -> Generator[tuple[LmHead, dict[nn.Module, Product]], None, None]:
    """The model in evaluation mode, speaking through that adapter, its weights laid out for many small products: its
    head, and what `prepacked` yields."""
    model = adapters.model.get_base_model()
    was_training = model.training
    model.eval()
    try:
        # as long as the base holds the adapter's rows of tokens, its head is the adapter's
        with rows_written(adapters.model, role), _laid_out(adapters, role, merge) as (head, joint):
            yield head, joint
    finally:
        model.train(was_training)


@contextmanager
def _laid_out(
    adapters: AdapterSet, role: str | None, merge: bool
) -> Generator[tuple[LmHead, dict[nn.Module, Product]], None, None]:
    model, head = adapters.model.get_base_model(), adapters.head_under(None)
    if head.own is None and prepacks(head.weight):
        head = replace(head, product=prepack(head.weight, head.bias))
    if merge and role is not None and merges_all(model, role):
        # merged and laid out in one go: the merged weights are never all there in their plain layout
        with adapters.using(None), prepacked(adapters.backbone, role) as joint:
            yield head, joint
    else:
        with merged(adapters, role) if merge else adapters.using(role), prepacked(adapters.backbone) as joint:
            yield head, joint


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
    batch_size: int | None = 32,
    first: int = 0,
    merge: bool = True,
    recompute: bool = False,
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
        first: the place of the first of these prompts in a longer list that several processes share.
        batch_size: rows decoded at once, on a GPU no more than its memory holds; None: as many as it does, on a CPU
            `cost.rows_at_once`.
        merge: fold the adapter into the base's weights while decoding (see `merged`).
        recompute: where rotary factors depend on a row's length, let a completion grow past the one at which they
            change: each of its tokens costs a forward over the whole row, and its log-probs are not what the whole row
            gives in the end. Without it that is refused.
        on_batch: called with the number of completions done so far, whenever some ended.
        on_tokens: called at every step with the prompts' places in the list and the token that each of them drew; what
            it raises ends the sampling and leaves the model as it was.

    Raises:
        ValueError: an empty prompt, or a setting out of its range.
        UserError: no way of drawing completions agrees with the base's own forward (`decoder_for`), or see `recompute`.
    """
    weight = adapters.head.weight
    if batch_size is None and weight.device.type == "cpu":
        columns = max(map(len, prompts), default=0) + max_new_tokens
        batch_size = rows_at_once(adapters.causal.config, weight.element_size(), columns)
    check_request(prompts, max_new_tokens=max_new_tokens, **({} if batch_size is None else {"batch_size": batch_size}))
    _check_seeds(seed, len(prompts))
    sampling = Sampling(temperature, top_k, top_p)
    if not prompts:
        return Generation()
    asked: dict[str, Any] = {
        **{"max_new_tokens": max_new_tokens, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id},
        **{"seed": seed, "batch_size": batch_size, "first": first, "heard": on_tokens},
    }
    ways = _by_length(adapters, decoder_for(adapters), prompts, max_new_tokens, recompute)
    with ready(adapters, role, merge) as (head, joint):
        return _decoded(ways, on_batch, adapters.causal, head, prompts, sampling, joint=joint, **asked)


def _check_seeds(seed: int | Sequence[int], prompts: int) -> None:
    if not isinstance(seed, int) and len(seed) != prompts:
        raise ValueError(f"{len(seed)} seeds for {prompts} prompts, expected one each, or one for all")


def _decoded(
    ways: list[tuple[type[Decoder], list[int]]],
    on_batch: Callable[[int], None] | None,
    model: PreTrainedModel,
    head: LmHead,
    prompts: Sequence[TokenIds],
    sampling: Sampling,
    **asked: Any,
) -> Generation:
    """Completions of all prompts, by the decoders that serve them."""
    drawn, done = Generation([[]] * len(prompts), [[]] * len(prompts), [False] * len(prompts)), 0
    for kind, requests in ways:
        told = None if on_batch is None else functools.partial(_told, on_batch, done)
        decoder = kind(model, head, prompts, sampling, done=told, only=requests, **asked)
        decoder.run()
        _draw_into(drawn, decoder, requests)
        done += len(requests)
    return drawn


def _told(on_batch: Callable[[int], None], before: int, done: int) -> None:
    on_batch(before + done)


def _draw_into(drawn: Generation, decoder: Decoder, requests: Sequence[int]) -> None:
    """What the decoder has kept of its requests."""
    counts, stopped = decoder.count_N.tolist(), decoder.stopped_N.tolist()
    tokens, logprobs = decoder.tokens_NS.tolist(), decoder.logps_NS.tolist()
    for i in requests:
        drawn.tokens[i], drawn.logprobs[i] = tokens[i][: counts[i]], logprobs[i][: counts[i]]
        drawn.finished[i] = stopped[i]


def _by_length(
    adapters: AdapterSet, kind: type[Decoder], prompts: Sequence[TokenIds], max_new_tokens: int, recompute: bool
) -> list[tuple[type[Decoder], list[int]]]:
    """The requests with their decoder, apart on either side of the length at which rotary factors change.

    Raises:
        UserError: a completion may grow past that length, and is not to be read anew at every token.
    """
    limit = rotary_limit(adapters.backbone)
    if limit is None:
        return [(kind, list(range(len(prompts))))]
    forget_lengths(adapters.backbone)
    near = [i for i, prompt in enumerate(prompts) if len(prompt) + max_new_tokens <= limit.length]
    far = [i for i, prompt in enumerate(prompts) if limit.two and len(prompt) > limit.length]
    across = sorted({*range(len(prompts))} - {*near, *far})
    if across and not recompute:
        raise UserError(
            "max_new_tokens",
            f"{max_new_tokens} after a prompt of {len(prompts[across[0]])} tokens goes past {limit.length}, where this "
            "base's rotary factors change: a reply's first tokens would have other log-probs than they were drawn with",
            f"keep prompt and reply within {limit.length} tokens",
        )
    if across:
        logger.warning(
            "%d of %d replies may grow past %d tokens, where this base's rotary factors change: they are drawn %s",
            len(across), len(prompts), limit.length, RecomputingDecoder.words,
        )  # fmt: skip
    groups = ((kind, near), (kind, far), (RecomputingDecoder, across))
    return [(each, requests) for each, requests in groups if requests]


_DECODERS: tuple[type[Decoder], ...] = (Decoder, StatefulDecoder, LibraryDecoder, RecomputingDecoder)
"""From the fastest to the one that can only be right; on a GPU `DeviceDecoder` stands before them, where it can."""

_TRIED = "_preftune_decoders"
"""The attribute of a backbone under which the outcome of `decoder_for`'s trials is found."""


def decoder_for(adapters: AdapterSet) -> type[Decoder]:
    """The fastest way of decoding whose log-probs are those of the model's own forward over the whole row.

    Each way draws a few tokens after four prompts, two of which begin alike, two have one length and one is a single
    token; beyond a sliding window where there is one. Once for a base, on a device, in a precision; where it is not the
    first way, the log says so.

    Raises:
        UserError: none is.
    """
    backbone = adapters.backbone
    tried: dict[tuple[str, torch.dtype, type[Decoder]], type[Decoder]] | None = getattr(backbone, _TRIED, None)
    if tried is None:
        tried = {}
        setattr(backbone, _TRIED, tried)
    device = next(backbone.parameters()).device
    ways = _DECODERS[1 if keeps_a_state(backbone) else 0 :]
    if device.type == "cuda" and Decoder in ways and TokenStep.applies(backbone):
        ways = (DeviceDecoder, *ways)
    key = (device.type, precision(backbone, device), ways[0])
    if key not in tried:
        tried[key] = _try_decoders(adapters, ways, device, key[1])
    return tried[key]


def sampler_used(backbone: PreTrainedModel) -> str | None:
    """How completions have been drawn from the backbone, in words; None: none were."""
    tried = getattr(backbone, _TRIED, None) or {}
    return next((kind.words for kind in reversed(list(tried.values()))), None)


def _try_decoders(
    adapters: AdapterSet, ways: Sequence[type[Decoder]], device: torch.device, dtype: torch.dtype
) -> type[Decoder]:
    name, why = model_name(adapters.backbone), ""
    for kind in ways:
        try:
            found = _tried(adapters, kind, device, dtype)
        except (torch.OutOfMemoryError, UserError):
            raise
        except Exception as error:  # a model that cannot be decoded so may fail in every way there is
            said = f"fails ({str(error) or type(error).__name__})"
        else:
            # the last way is the model's own forward for every token: its error is what rounding comes to here
            most, sharp = allowed(dtype, device), dtype == torch.float32
            doubtful = sharp and most / 8 < found <= most
            if found <= (min(most, 30 * _tried(adapters, _DECODERS[-1], device, dtype)) if doubtful else most):
                if why:
                    logger.warning("%s: completions are drawn %s; %s", name, kind.words, why)
                return kind
            said = f"is off by {found:.2g} of a logit's spread"
        why += f"{'; ' if why else ''}{kind.words} it {said}"
    raise UserError("model.base", f"{name}: no completion can be drawn with its log-probs ({why})", "use another base")


def _tried(adapters: AdapterSet, kind: type[Decoder], device: torch.device, dtype: torch.dtype) -> float:
    """The error of a way's log-probs, as a share of the logits' spread: in fp32 the largest, else the mean, because in
    16 bits single tokens are off by much."""
    with quietly(adapters.causal, device), short_windows(adapters.backbone):
        gap_N = _trial(adapters, kind, device)
    return float(gap_N.max() if dtype == torch.float32 else gap_N.mean())


def _trial(adapters: AdapterSet, kind: type[Decoder], device: torch.device) -> torch.Tensor:
    """How far the log-probs of a few tokens are from the model's own forward's, as a share of its logits' spread.

    A state of the library's own gathers its errors as it goes, so there the tokens are more. Where prompts of one
    length go together, one row comes before the single token: it may be taken for the next token of what was before.
    """
    steps = 4 if kind in (Decoder, DeviceDecoder) else 16
    (row, _), limit = trial_rows(adapters.backbone, device), rotary_limit(adapters.backbone)
    ids = row.tolist()
    prompts = [ids[:9], [*ids[:3], *ids[6:]], ids[2:8], ids[5:6]]
    if limit is not None:
        steps = min(steps, limit.length // 2)
        prompts = [prompt[: limit.length - steps] for prompt in prompts]
    forget_lengths(adapters.backbone)
    with ready(adapters, None, False) as (head, joint):
        decoder = kind(
            adapters.causal,
            head,
            prompts,
            Sampling(),
            max_new_tokens=steps,
            eos_token_id=-1,
            pad_token_id=ids[0],
            seed=0,
            batch_size=len(prompts),
            done=None,
            joint=joint,
        )
        decoder.run()
    gaps: list[torch.Tensor] = []
    with adapters.using(None):
        for i, prompt in enumerate(prompts):
            drawn_S = decoder.tokens_NS[i]
            whole_1T = torch.cat([torch.tensor(prompt, device=device), drawn_S])[None]
            logits_SV = adapters.causal(input_ids=whole_1T, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            own_S = logits_SV.log_softmax(-1).gather(1, drawn_S[:, None]).squeeze(1)
            gaps.append((decoder.logps_NS[i] - own_S).abs() / logits_SV.std(-1))
    return torch.cat(gaps)
