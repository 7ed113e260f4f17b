"""A training step rehearsed without memory: what it would hold at its peak, part by part.

The model of the config, the LoRA of the recipe and the losses of the stages run here on torch's fake tensors, which
have a shape, a dtype and a device, and no content. Every storage that an operator makes is counted until nobody holds
it any more (`Ledger`), so that checkpointing, target modules and quantisation cost what they cost in the run. A model
of alike layers is rehearsed with a few of them, because every part grows by the same bytes with each.

What has no content cannot be looked at: attention runs as kernels of the same shapes (`_attention`), a quantised layer
as one that unpacks its weight, and the tree of a batch comes from its real rows (`Batch`).

Legend of shape suffixes: B rows, L padded positions, N distinct tokens, S tokens with a loss, H hidden size,
V vocabulary, O outputs and I inputs of a linear layer.
"""

import copy
import itertools
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModelForCausalLM
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedConfig

from . import seams
from .batching import TokenIds, right_pad
from .block_attention import LONGEST_BLOCK, block_attention
from .causal import decoder_of
from .described import has_experts
from .fused_lora import use_fused_lora
from .logprobs import CHUNK_ELEMENTS, LmHead
from .lora import LoraSpec
from .prefix_tree import ROUND_TO, build_tree
from .quantised import QuantisedLinear
from .quiet import quiet_transformers
from .token_rows import use_token_rows

with seams.importing(seams.FAKE_TENSORS):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
with seams.importing(seams.ATTENTION_FUNCTIONS):
    from transformers.masking_utils import sdpa_mask
with seams.importing(seams.CONV1D):
    from transformers.pytorch_utils import Conv1D

ATTENTION = "preftune_rehearsal"
ACTIVATIONS, LOGITS, GRADIENTS, MASKS = "activations", "logits", "gradients", "masks"

Parts = Counter[str]
"""Bytes by part."""

TRL_TOKENS, TRL_WORDS = 4096, 32768
"""The tile [tokens, vocabulary] of the head that TRL's trainers run on a GPU (trl/kernels/chunked_logprob.py)."""


class Ledger(TorchDispatchMode):
    """Counts the bytes of every storage that is made within it, until it is gone.

    Attributes:
        live: bytes by part, now. peak: the same at the moment at which all together were the most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Parts = Counter()
        self.peak: Parts = Counter()
        self._held: dict[int, tuple[str, int]] = {}
        self._part, self._total, self._most = ACTIVATIONS, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, Tensor):
                self._count(each.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._held:
            return
        size = storage.nbytes()
        self._held[key] = self._part, size
        self.live[self._part] += size
        self._total += size
        weakref.finalize(storage, self._gone, key)
        if self._total > self._most:
            self._most, self.peak = self._total, Counter(self.live)

    def _gone(self, key: int) -> None:
        part, size = self._held.pop(key)
        self.live[part] -= size
        self._total -= size

    def leave_out(self, tensor: Tensor) -> None:
        """What was there before is counted elsewhere; a view of it is none of its own."""
        self._held[id(tensor.untyped_storage())] = ACTIVATIONS, 0

    @contextmanager
    def part(self, name: str) -> Generator[None]:
        """Within it what is made belongs to that part."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def belongs(self, tensor: Tensor, name: str) -> None:
        """A tensor that was made as another part's is of this one from now on."""
        part, size = self._held[id(tensor.untyped_storage())]
        self._held[id(tensor.untyped_storage())] = name, size
        self.live[part] -= size
        self.live[name] += size

    def forget(self) -> None:
        """A new peak is looked for, from here on."""
        self._most, self.peak = self._total, Counter(self.live)


@dataclass(frozen=True)
class Batch:
    """The rows of one forward.

    Attributes:
        rows, width: the padded batch.
        tokens: what runs through the decoder: the tree's, or all positions where nothing is packed.
        scored: positions that go through the LM head.
        blocks: tokens of each attention block.
    """

    rows: int
    width: int
    tokens: int
    scored: int
    blocks: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[TokenIds], scored: int, *, packed: bool, device: str) -> "Batch":
        """The batch that these rows make on "cpu" or "cuda".

        Args:
            rows: token ids; equal beginnings are run once where the forward is packed.
        """
        count, width = len(rows), max(map(len, rows))
        if not packed:
            return cls(count, width, count * width, scored, (width,) * count)
        ids_BL, mask_BL = right_pad(rows, 0, torch.device("cpu"))
        tree = build_tree(ids_BL, mask_BL, None if device == "cpu" else ids_BL.numel())
        tokens = len(tree.ids_N)
        blocks = tuple(stop - start for start, stop in tree.blocks)
        if device != "cpu":
            return cls(count, width, tokens, scored, (tokens,))
        spare = -tokens % ROUND_TO
        return cls(count, width, tokens + spare, scored, (*blocks, spare) if spare else blocks)

    @classmethod
    def even(cls, rows: int, width: int, scored: int) -> "Batch":
        """Rows of one length that share nothing."""
        return cls(rows, width, rows * width, scored, (width,) * rows)


@dataclass(frozen=True)
class Build:
    """What is rehearsed.

    Attributes:
        dtype: of the base; 16 bits run under autocast, as in training.
        quantization: "4bit", "8bit" or None.
        device: "cpu" or "cuda": whose attention and head run.
        checkpointing: whether layers are computed a second time in the backward.
        full: whether all weights train, in fp32, and no adapter.
    """

    config: PreTrainedConfig
    lora: LoraSpec
    dtype: torch.dtype
    quantization: str | None = None
    device: str = "cpu"
    checkpointing: bool = False
    full: bool = False


class Stage:
    """A model without memory, on which steps are run. Made by `rehearsed`; all below happens within its fake mode."""

    def __init__(self, build: Build, layers: int, ledger: Ledger) -> None:
        self.build, self.ledger = build, ledger
        held = torch.float32 if build.full else build.dtype
        model = skeleton(_shortened(build.config, layers), held, build.quantization)
        trains: nn.Module = model.requires_grad_(True) if build.full else _adapted(model, build.lora)
        if build.checkpointing:
            # recomputed layers draw nothing here, so there is no random state to put back
            again = {"use_reentrant": False, "preserve_rng_state": False}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=again)
        _made_fake(trains)
        for each in (*trains.parameters(), *trains.buffers()):
            ledger.leave_out(each)
        trains.train()
        self.causal = model
        self.decoder = decoder_of(model)
        self.trained = [each for each in trains.parameters() if each.requires_grad]
        for each in self.trained:
            each.register_post_accumulate_grad_hook(self._gradient)

    def _gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.ledger.belongs(parameter.grad, GRADIENTS)

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states [B, L, H] as the packed forward gives them."""
        index_BL = torch.zeros(batch.rows, batch.width, dtype=torch.long)
        mask_BL = torch.zeros(batch.rows, batch.width, dtype=torch.bool)
        output = self.decoder(
            input_ids=torch.zeros(1, batch.tokens, dtype=torch.long),
            attention_mask=torch.ones(1, 1, 1, 1),
            position_ids=torch.zeros(1, batch.tokens, dtype=torch.long),
            use_cache=False,
            rehearsed=_Rehearsed(batch, self),
        )
        hidden_NH = output.last_hidden_state[0]
        return hidden_NH[index_BL].masked_fill(~mask_BL[..., None], 0)

    def logps(self, hidden_BLH: Tensor, batch: Batch, *, trl: bool) -> Tensor:
        """Log-probs [S] of the tokens with a loss.

        Args:
            trl: the head of TRL's trainers runs, where the device has one.
        """
        at_S = torch.zeros(batch.scored, dtype=torch.long)
        hidden_SH = hidden_BLH.flatten(0, 1)[at_S]
        targets_S = torch.zeros(batch.scored, dtype=torch.long)
        head = LmHead.of(self.causal.get_output_embeddings(), self.causal.config)
        with self.ledger.part(LOGITS):
            if trl and self.build.device != "cpu":
                return _TrlHead.apply(hidden_SH, head.weight)
            elements = CHUNK_ELEMENTS.get(self.build.device, 16 << 20)
            return head.token_logprobs(hidden_SH, targets_S, 1.0, max(32, elements // head.weight.shape[0]))[0]

    def score(self, hidden_BLH: Tensor) -> Tensor:
        """A scalar head's numbers [B, L], in fp32."""
        with torch.autocast("cpu", enabled=False):
            weight_1H = torch.zeros(1, hidden_BLH.shape[-1], requires_grad=True)
            return F.linear(hidden_BLH.float(), weight_1H)

    def autocast(self) -> AbstractContextManager[Any]:
        """As training runs it."""
        low = self.build.dtype != torch.float32
        return torch.autocast("cpu", dtype=self.build.dtype) if low else nullcontext()

    def forget_gradients(self) -> None:
        for each in self.trained:
            each.grad = None


def _adapted(model: Any, lora: LoraSpec) -> nn.Module:
    with torch.device("meta"), quiet_transformers():
        peft = PeftModelForCausalLM(model, lora.config(model, "CAUSAL_LM", continued=True))
    use_token_rows(peft)
    use_fused_lora(peft)
    return peft


Program = Callable[[Stage], None]
"""One step; what it makes is counted."""


def policy_step(batch: Batch, *, reference: bool = False, passes: int = 1, trl: bool = True) -> Program:
    """Forward, loss and backward of a policy.

    Args:
        reference: a frozen adapter's forward runs while the policy's activations are held, as in DPO and KTO.
        passes: micro-batches whose gradients add up; more than two hold no more than two.
        trl: see `Stage.logps`.
    """

    def run(stage: Stage) -> None:
        for _ in range(min(passes, 2)):
            with stage.autocast():
                hidden = stage.hidden(batch)
                logps = stage.logps(hidden, batch, trl=trl)
                if reference:
                    with torch.no_grad():
                        other = stage.hidden(batch)
                        stage.logps(other, batch, trl=trl)
                        del other
            del hidden
            logps.sum().backward()

    return run


def score_step(batch: Batch, *, passes: int = 1) -> Program:
    """Forward, loss and backward of what has a scalar head: a reward model, a value with an adapter of its own."""

    def run(stage: Stage) -> None:
        for _ in range(min(passes, 2)):
            with stage.autocast():
                scores = stage.score(stage.hidden(batch))
            scores.sum().backward()

    return run


def forward_only(batch: Batch, *, trl: bool = False) -> Program:
    """A forward without gradients: log-probs where tokens are scored, else one number a token."""

    def run(stage: Stage) -> None:
        with torch.no_grad(), stage.autocast():
            hidden = stage.hidden(batch)
            if batch.scored:
                stage.logps(hidden, batch, trl=trl)
            else:
                stage.score(hidden)

    return run


def prefill_only(batch: Batch) -> Program:
    """The forward that reads prompts, without a head; the keys and values that it leaves are counted elsewhere."""

    def run(stage: Stage) -> None:
        with torch.no_grad(), stage.autocast():
            stage.hidden(batch)

    return run


def rehearsed(build: Build, programs: Sequence[Program]) -> list[Parts]:
    """What each program holds at its peak beside the weights: activations, logits, gradients, masks.

    Raises:
        Exception: whatever a model raises that cannot be run without content (a router that looks at its numbers).
    """
    layers = build.config.get_text_config().num_hidden_layers
    few = _FEW if layers > _FEW[1] and _alike(build.config) else (layers, layers)
    first = _peaks(build, few[0], programs)
    if few[0] == few[1]:
        return first
    second = _peaks(build, few[1], programs)
    return [_grown(a, b, few, layers) for a, b in zip(first, second, strict=True)]


_FEW = (3, 5)
"""Layers with which alike ones are rehearsed."""


def _grown(a: Parts, b: Parts, few: tuple[int, int], layers: int) -> Parts:
    share = (layers - few[0]) / (few[1] - few[0])
    return Counter({part: round(a[part] + (b[part] - a[part]) * share) for part in a | b})


def _peaks(build: Build, layers: int, programs: Sequence[Program]) -> list[Parts]:
    seams.require(seams.FAKE_TENSORS)
    found: list[Parts] = []
    with _unwarned(), FakeTensorMode():
        ledger = Ledger()
        stage = Stage(build, layers, ledger)
        for program in programs:
            with ledger:
                ledger.forget()
                program(stage)
            found.append(+ledger.peak)
            stage.forget_gradients()
    return found


@contextmanager
def _unwarned() -> Generator[None]:
    with warnings.catch_warnings(), quiet_transformers():
        warnings.simplefilter("ignore")
        yield


def _alike(config: PreTrainedConfig) -> bool:
    """Whether all layers are of one kind."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    return len(kinds) <= 1 and not has_experts(config)


def _shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    short = copy.deepcopy(config)
    text = short.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return short


def skeleton(config: PreTrainedConfig, dtype: torch.dtype, quantization: str | None) -> Any:
    """The causal model of a config on no device, frozen, its linear layers quantised as they would be."""
    with torch.device("meta"), quiet_transformers():
        seams.require(seams.ATTENTION_FUNCTIONS)
        # a copy: the model writes its attention into its config
        own = copy.deepcopy(config)
        model = AutoModelForCausalLM.from_config(own, dtype=dtype, attn_implementation="sdpa")
        if quantization is not None:
            for parent, name, linear in quantised_layers(model):
                setattr(parent, name, _Quantised(linear, quantization))
    for part in {id(each.config): each.config for each in model.modules() if hasattr(each, "config")}.values():
        if hasattr(part, "_attn_implementation"):
            part._attn_implementation = ATTENTION  # pyright: ignore[reportPrivateUsage]  # seam attention-functions
    return model.requires_grad_(False)


def quantised_layers(model: Any) -> list[tuple[nn.Module, str, "nn.Linear | Conv1D"]]:
    """The layers that are quantised: all linear ones but the output head, each with its parent and name."""
    head = model.get_output_embeddings()
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, (nn.Linear, Conv1D)) and child is not head
    ]


BYTES_QUANTISED = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0}
"""Bytes of a quantised weight: nf4 in blocks of 64 with an 8-bit scale each, and an fp32 one for 256 of these
(arXiv 2305.14314, double quantisation); int8, whose fp32 scale of a row is some thousandths of that."""


class _Quantised(QuantisedLinear):
    """A quantised layer whose weights have no content."""

    def __init__(self, linear: "nn.Linear | Conv1D", bits: str) -> None:
        # GPT-2's layers hold their weight the other way round
        weight = linear.weight if isinstance(linear, nn.Linear) else linear.weight.detach().t()
        outputs, inputs = weight.shape
        super().__init__((outputs, inputs), weight, linear.bias, weight.dtype)
        self.bits = bits

    def unpacked(self) -> Tensor:
        # in 8 bits they are multiplied by their scales in fp32
        made = torch.float32 if self.bits == "8bit" else self.dtype
        return self.weight.new_empty((self.out_features, self.in_features), dtype=made).to(self.dtype)


def _made_fake(model: nn.Module) -> None:
    """Parameters and buffers of no device become fake ones on the CPU; a shared one stays shared."""
    made: dict[int, Any] = {}

    def fake(tensor: Tensor) -> Any:
        if id(tensor) not in made:
            plain = torch.empty(tensor.shape, dtype=tensor.dtype)
            trains = tensor.requires_grad
            made[id(tensor)] = nn.Parameter(plain, trains) if isinstance(tensor, nn.Parameter) else plain
        return made[id(tensor)]

    for module in model.modules():
        for held in (module._parameters, module._buffers):  # pyright: ignore[reportPrivateUsage]  # seam fake-tensors
            held.update({name: fake(each) for name, each in held.items() if each is not None})


@dataclass(frozen=True)
class _Rehearsed:
    """What a layer's attention is told through the model's forward.

    made: the masks of the blocks, as long as the forward; layers with one window and dtype share them.
    """

    batch: Batch
    stage: Stage
    made: dict[tuple[int | None, torch.dtype], list[Tensor]] = field(default_factory=dict)

    def masks(self, window: int | None, dtype: torch.dtype) -> list[Tensor]:
        """Of each block [T, T]."""
        if (window, dtype) not in self.made:
            with self.stage.ledger.part(MASKS):
                self.made[window, dtype] = [torch.empty(t, t, dtype=dtype) for t in self.batch.blocks]
        return self.made[window, dtype]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    rehearsed: _Rehearsed | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as it runs on the device, by the bytes that it makes and keeps; [1, N, heads, D]."""
    assert rehearsed is not None, f"{type(module).__name__} does not hand keyword arguments on to its attention"
    batch, stage = rehearsed.batch, rehearsed.stage
    if stage.build.device != "cpu":
        return _Kernel.apply(query, key, value).transpose(1, 2), None
    ends = [*itertools.accumulate(batch.blocks)]
    runs = [(end - t, end, t) for end, t in zip(ends, batch.blocks, strict=True)]
    masks = rehearsed.masks(sliding_window, query.dtype)
    if query.dtype != torch.float32 and max(batch.blocks) <= LONGEST_BLOCK:
        return block_attention(query[0], key[0], value[0], runs, masks, scaling or 1.0)[None], None
    parts = [
        _Kernel.apply(*(each[:, :, start:stop] for each in (query, key, value)), mask)
        for (start, stop, _), mask in zip(runs, masks, strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class _Kernel(torch.autograd.Function):
    """A fused attention kernel: keeps queries, keys, values, mask, its output and one number a query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]: autograd's own takes any arguments
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums, *(() if mask is None else (mask,)))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, sums, *_ = ctx.saved_tensors
        delta = torch.empty_like(sums)
        made = tuple(torch.empty_like(each) for each in (query, key, value))
        del delta
        return *made, None


class _TrlHead(torch.autograd.Function):
    """TRL's head: a tile of logits, and in the backward the gradient in fp32."""

    @staticmethod
    def forward(ctx: Any, hidden_SH: Tensor, weight_VH: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]: autograd's own takes any arguments
        _tile(hidden_SH, weight_VH)
        ctx.save_for_backward(hidden_SH, weight_VH)
        return hidden_SH.new_empty(len(hidden_SH), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_SH, weight_VH = ctx.saved_tensors
        gradient_SH = torch.empty_like(hidden_SH, dtype=torch.float32)
        _tile(hidden_SH, weight_VH)
        return gradient_SH.to(hidden_SH.dtype), None


def _tile(hidden_SH: Tensor, weight_VH: Tensor) -> None:
    hidden_SH.new_empty(min(len(hidden_SH), TRL_TOKENS), min(len(weight_VH), TRL_WORDS), dtype=weight_VH.dtype)
