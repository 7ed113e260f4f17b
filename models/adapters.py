"""One frozen base, many adapters: policy, reference, reward and value share the base's weights in memory."""

import copy
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UserError
from . import seams
from .base import Base
from .causal import decoder_of, head_of
from .fused_lora import use_fused_lora
from .heads import ScalarHead, bias_of
from .lineage import check_base
from .logprobs import LmHead
from .lora import (
    SCORE,
    VALUE_HEAD,
    LoraSpec,
    check_finite_weights,
    check_rows,
    fill,
    lora_layers,
    lora_state,
    put_on,
    read_adapter,
    read_tensors,
    refused_by_peft,
    start,
    tensors_sha256,
    write_adapter,
)
from .packing import use_packed_forward
from .plain_lora import adapted_modules, check_layers, check_targets
from .starts import settled
from .token_rows import check_fit, use_token_rows
from .whole import check_whole, whole

__all__ = ["DEFAULT", "REF", "REWARD", "TEACHER", "VALUE", "VALUE_HEAD", "AdapterSet", "LoraSpec", "module_name"]

DEFAULT, REF, REWARD, VALUE, TEACHER = "default", "ref", "reward", "value", "teacher"


def module_name(name: str) -> str:
    """A name as part of an adapter's, of which PEFT makes a module, that may hold no dot; each name has its own."""
    return name.replace("_", "__").replace(".", "_0")


class AdapterSet:
    """LoRA adapters by role on one causal model, and the scalar heads beside them.

    Make one with `AdapterSet.create`. Which adapters learn is settled when they are added; nothing here changes the
    `requires_grad` of a parameter afterwards.

    Attributes:
        model: the PEFT model; outside `using` its active adapter is "default".
        base: the base it was loaded from.
        heads: scalar heads of adapters that have one ("reward": no bias; "value": with bias).
    """

    def __init__(self, model: PeftModelForCausalLM, base: Base) -> None:
        self.model = model
        self.base = base
        self.heads: dict[str, ScalarHead] = {}
        self._layers = lora_layers(model)
        check_layers(self.causal, self._layers, "the adapter")
        use_token_rows(model)
        for layer in self._layers.values():
            seams.require(seams.ADAPTER_SWITCH, layer)
        # a model that somebody else has loaded keeps its attention, and is tried over padded rows as any other
        use_packed_forward(self.backbone, packed=False)

    @classmethod
    def create(
        cls, model: PreTrainedModel, base: Base, lora: LoraSpec, parent: Path | None = None, *, seed: int = 0
    ) -> "AdapterSet":
        """Put the trainable adapter "default" on a base.

        Args:
            model: from `load_model`; it is changed in place.
            lora: rank, scaling and modules of the adapter.
            parent: folder of the adapter to start from, whose change is taken over exactly; None: start as the base.
            seed: of LoRA's random A.

        Raises:
            UserError: the parent belongs to another base, or cannot be taken over exactly (see `embed_parent`).
        """
        if parent is not None:
            check_base(parent, base)
        lora = lora.on(base)
        peft = put_on(PeftModelForCausalLM, model, lora, "CAUSAL_LM", continued=parent is not None, seed=seed)
        # PEFT's new dropout layers are in training mode, whatever mode the model is in.
        peft.train(model.training)
        use_fused_lora(peft)
        adapters = cls(peft, base)
        start(adapters._layers, adapters._config(DEFAULT), lora, parent, seed)
        return adapters

    @property
    def names(self) -> list[str]:
        """The adapters there are."""
        return list(self.model.peft_config)

    @property
    def causal(self) -> PreTrainedModel:
        """The causal model itself, its linear layers wrapped by PEFT."""
        return cast(PreTrainedModel, self.model.get_base_model())

    @property
    def backbone(self) -> PreTrainedModel:
        """The decoder, whose output has `last_hidden_state` [B, T, H]."""
        return decoder_of(self.causal)

    @property
    def head(self) -> LmHead:
        """What turns last hidden states into logits, tried against the model's own (see `head_of`); of the adapter
        that is active now, which may have rows of its own in it."""
        return head_of(self.causal)

    def head_under(self, name: str | None) -> LmHead:
        """The same of that adapter (None: the bare base)."""
        with self.using(name):
            return self.head

    @property
    def lm_head(self) -> nn.Module:
        """The output projection; `weight` [V, H]."""
        return cast(nn.Module, self.causal.get_output_embeddings())

    def hidden(self, name: str | None, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """Last hidden states [B, L, H] of padded rows under that adapter (None: the bare base).

        A 16-bit base runs under autocast, as it does in training: otherwise PEFT would cast every input of its fp32
        weights to fp32.
        """
        dtype = self.model.dtype
        low = dtype in (torch.bfloat16, torch.float16)
        with self.using(name), torch.autocast(input_ids_BL.device.type, dtype=dtype if low else None, enabled=low):
            output = self.backbone(input_ids=input_ids_BL, attention_mask=attention_mask_BL, use_cache=False)
        return output.last_hidden_state

    def remove(self, name: str) -> None:
        """Take an adapter and its head away."""
        self._drop(name)
        self.heads.pop(name, None)
        self._layers = lora_layers(self.model)

    def copy(self, name: str, source: str = DEFAULT, trainable: bool = False) -> None:
        """Add `name` as an exact copy of `source` and of its head."""
        self._add(name, self._config(source), trainable)
        fill(self._state(name), self._state(source), source)
        if source in self.heads:
            self._set_head(name, self.heads[source].score.state_dict(), trainable)

    def load(self, name: str, folder: Path, trainable: bool = False) -> None:
        """Add a saved adapter, of a causal model or of a classifier, and its head where it has one.

        Raises:
            UserError: no plain LoRA adapter there, or of another base.
        """
        check_base(folder, self.base)
        config, tensors = read_adapter(folder)
        self._check_modules(tensors, folder)
        check_fit(self.causal, config.trainable_token_indices, str(folder))
        head = {"weight": tensors.pop(SCORE)} if SCORE in tensors else {}
        config.task_type, config.modules_to_save = "CAUSAL_LM", None
        self._add(name, config, trainable)
        try:
            fill(self._state(name), tensors, str(folder))
        except Exception:
            self._drop(name)
            raise
        if (folder / VALUE_HEAD).is_file():
            head = read_tensors(folder / VALUE_HEAD)
        if head:
            self._set_head(name, head, trainable)

    def add_head(
        self, name: str, *, bias: bool, trainable: bool = True, zero: bool = False, seed: int = 0
    ) -> ScalarHead:
        """Give adapter `name` a fresh head, its weight random or zero."""
        width = self.causal.config.get_text_config().hidden_size
        head = ScalarHead(width, bias, torch.Generator().manual_seed(seed))
        if zero:
            nn.init.zeros_(head.score.weight)
        return self._set_head(name, head.score.state_dict(), trainable)

    @contextmanager
    def using(self, name: str | None) -> Generator[None, None, None]:
        """Within it forwards run with that adapter alone (None: the bare base). May be nested.

        With gradient checkpointing the backward runs the forward again, so it belongs inside as well.
        """
        if name is not None and name not in self.model.peft_config:
            raise KeyError(f"no adapter {name!r} among {self.names}")
        # PEFT's own set_adapter would switch gradients on and off; its disable_adapter too. These two fields are all
        # that a layer's forward looks at. Written past nn.Module's __setattr__: this runs at every forward.
        active, disabled = [name], name is None
        # the type of `__dict__` is a read-only view, which it is for classes alone
        fields = [cast(dict[str, object], layer.__dict__) for layer in self._layers.values()]
        before = [(each.get("_active_adapter", DEFAULT), each.get("_disable_adapters", False)) for each in fields]
        for each in fields:
            each["_active_adapter"], each["_disable_adapters"] = active, disabled
        try:
            yield
        finally:
            for each, (was_active, was_disabled) in zip(fields, before, strict=True):
                each["_active_adapter"], each["_disable_adapters"] = was_active, was_disabled

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters of an adapter and of its head."""
        head = self.heads.get(name)
        return [*self._state(name).values(), *(head.parameters() if head is not None else ())]

    def digest(self, name: str | None) -> str:
        """Hash of an adapter with its head, as `lineage.adapter_sha256` of it saved; None: of the base's weights."""
        if name is not None:
            return tensors_sha256(self._tensors(name) | self._value_tensors(name))
        adapters = {id(p) for each in self.names for p in self._state(each).values()}
        # what PEFT keeps of the base's rows beside those that train
        adapters |= {id(b) for n, b in self.model.named_buffers() if ".trainable_tokens_original." in n}
        everything = (*self.model.named_parameters(), *self.model.named_buffers())
        plain = ((n.replace(".token_adapter.", ".").replace(".base_layer.", "."), p) for n, p in everything)
        return tensors_sha256((n, p) for n, p in plain if id(p) not in adapters)

    def save(self, name: str, folder: Path, *, write: bool = True, done: bool = False) -> None:
        """Write an adapter straight into `folder`, to be loaded by plain PEFT or by `load`.

        One with a head without bias is written as a classifier's adapter with its `score`; a head with a bias goes
        into `value_head.safetensors` beside it.

        Args:
            write: False in every process of a run but one. All of them call this: what is divided is gathered.
            done: its training is over, and another may begin from it (see `starts.settled`).
        """
        config = copy.copy(self._config(name))
        tensors, value = whole(self._tensors(name)), whole(self._value_tensors(name))
        if not write:
            return
        if done:
            tensors = settled(tensors, self._state(name))
        if SCORE in tensors:
            config.task_type, config.modules_to_save = "SEQ_CLS", ["score"]
        write_adapter(folder, self.base, config, tensors)
        if value:
            plain = {key.removeprefix("value_head."): t.detach().cpu().contiguous() for key, t in value.items()}
            check_whole(str(folder), plain)
            check_finite_weights(folder, plain)
            save_file(plain, folder / VALUE_HEAD, metadata={"format": "pt"})

    def _check_modules(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Refuse an adapter of layers that cannot carry one here, before PEFT has wrapped them."""
        modules = adapted_modules(tensors)
        new = [path for path in modules if f"base_model.model.{path}" not in self._layers]
        known = {path.replace(".base_layer", "") for path, _ in self.causal.named_modules()}
        if foreign := [path for path in new if path not in known]:
            raise UserError(str(folder), f"does not fit this base (at {foreign[0]})", "use the base it was trained on")
        check_targets(self.causal, new, str(folder))

    def _config(self, name: str) -> LoraConfig:
        config = self.model.peft_config[name]
        assert isinstance(config, LoraConfig)
        return config

    def _state(self, name: str) -> dict[str, nn.Parameter]:
        return lora_state(self._layers, name)

    def _tensors(self, name: str) -> dict[str, Tensor]:
        """What `adapter_model.safetensors` holds."""
        head = self.heads.get(name)
        score = {SCORE: head.score.weight} if head is not None and bias_of(head.score) is None else {}
        return {**self._state(name), **score}

    def _value_tensors(self, name: str) -> dict[str, Tensor]:
        head = self.heads.get(name)
        if head is None or bias_of(head.score) is None:
            return {}
        return {f"value_head.{key}": tensor for key, tensor in head.score.state_dict().items()}

    def _add(self, name: str, config: LoraConfig, trainable: bool) -> None:
        """A new adapter of random content; nobody else's gradients, mode or random numbers are touched."""
        if name in self.model.peft_config:
            raise ValueError(f"adapter {name!r} is already there")
        config = copy.copy(config)
        config.inference_mode = not trainable
        if not trainable:
            # A frozen adapter must answer the same whether or not the model is in training mode.
            config.lora_dropout = 0.0
        check_rows(self.model, config)
        before = {id(p): p.requires_grad for p in self.model.parameters()}
        with torch.random.fork_rng(devices=[]), refused_by_peft():
            self.model.add_adapter(name, config)
        self._layers = lora_layers(self.model)
        use_token_rows(self.model)
        # As in `create`: the new dropout layers follow the model's mode.
        for layer in self._layers.values():
            if isinstance(layer, LoraLayer) and name in layer.lora_dropout:
                layer.lora_dropout[name].train(self.model.training)
        for parameter in self.model.parameters():
            parameter.requires_grad_(before.get(id(parameter), trainable))

    def _drop(self, name: str) -> None:
        before = {id(p): p.requires_grad for p in self.model.parameters()}
        self.model.delete_adapter(name)
        for parameter in self.model.parameters():
            parameter.requires_grad_(before[id(parameter)])

    def _set_head(self, name: str, state: dict[str, Tensor], trainable: bool) -> ScalarHead:
        head = ScalarHead(state["weight"].shape[-1], bias="bias" in state, generator=torch.Generator())
        head.score.load_state_dict(state)
        self.heads[name] = head.to(self.model.device).requires_grad_(trainable)
        return head
