"""LoRA weights as plain tensors: named, hashed, read, written, and grown to a larger rank.

Tensors carry the names that PEFT gives them in `adapter_model.safetensors`, without the adapter's own name.
"""

import copy
import functools
import hashlib
import inspect
import json
import logging
import math
import re
import warnings
from collections.abc import Collection, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..intact import check_intact
from . import seams
from .base import Base
from .causal import decoder_of
from .plain_lora import adapted_modules, check_plain, check_targets, check_tensors, read_config
from .rounding import rounded
from .sound import read_header
from .whole import check_whole

with seams.importing(seams.LORA_LAYER):
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer
with seams.importing(seams.CONV1D):
    from transformers.pytorch_utils import Conv1D

logger = logging.getLogger(__name__)

WEIGHTS, CONFIG = ADAPTER_WEIGHTS, ADAPTER_CONFIG
VALUE_HEAD = "value_head.safetensors"
SCORE = "base_model.model.score.weight"


@dataclass(frozen=True)
class LoraSpec:
    """The LoRA to train.

    Attributes:
        r: rank.
        alpha: numerator of the scaling: alpha / r, or alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732).
        dropout: on the input of A, in training.
        target_modules: "all-linear" (every linear layer of the decoder, no output head) or module names.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] | list[str] = "all-linear"
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError("lora.r", f"{self.r}, expected 1 or more", "choose a rank such as 16")
        if not self.alpha > 0:
            raise UserError("lora.alpha", f"{self.alpha}, expected more than 0", "choose twice the rank")
        if not 0 <= self.dropout < 1:
            raise UserError("lora.dropout", f"{self.dropout}, expected 0 to below 1", "choose 0")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            object.__setattr__(self, "target_modules", (self.target_modules,))

    @classmethod
    def said_by(cls, config: LoraConfig, targets: str | list[str]) -> "LoraSpec":
        """What a plain config (`check_plain`) says, its modules as `target_names` gives them."""
        return cls(config.r, config.lora_alpha, config.lora_dropout, targets, config.use_rslora)

    @classmethod
    def of(cls, folder: Path) -> "LoraSpec":
        """The settings of a saved adapter; its modules by the names that its config lists, or else by their paths.

        Raises:
            UserError: as `read_adapter`.
        """
        config, tensors = read_adapter(folder)
        listed = [] if isinstance(config.target_modules, str) else sorted(config.target_modules or ())
        narrowed = config.exclude_modules or config.layers_to_transform is not None
        return cls.said_by(config, listed if listed and not narrowed else adapted_modules(tensors))

    def scaling(self) -> float:
        """What B @ A is multiplied with."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def config(self, model: PreTrainedModel, task_type: str, modules_to_save: list[str] | None = None) -> LoraConfig:
        """The PEFT config for `model` (without adapters), its target modules by name.

        Raises:
            UserError: a name that is not a linear layer of the decoder.
        """
        targets = linear_names(model) if self.target_modules == "all-linear" else list(self.target_modules)
        if self.target_modules != "all-linear":
            check_targets(model, targets)
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType]: PEFT says int and takes any number
            lora_dropout=self.dropout,
            target_modules=targets,
            use_rslora=self.use_rslora,
            task_type=task_type,
            modules_to_save=modules_to_save,
        )


def linear_names(model: PreTrainedModel) -> list[str]:
    """The last name components of every linear layer of the decoder, sorted: `q_proj`, `up_proj`, ...

    Names and not paths, so that the same adapter_config.json serves causal models, classifiers and vLLM. Left out, and
    logged, are layers that an adapter cannot serve: those without a name of their own (in a list), those whose weights
    their module also takes by itself (`_taken_past_adapters`), those that give more than their product.
    """
    heads = {name for name, _ in model.named_children()}
    found: dict[str, bool] = {}
    for path, parent in decoder_of(model).named_modules():
        past = _taken_past_adapters(parent)
        for name, module in parent.named_children():
            if isinstance(module, (nn.Linear, Conv1D)) and name not in heads:
                shown = f"{path.rpartition('.')[2]}.{name}" if name.isdigit() else name
                served = not name.isdigit() and name not in past and _gives_a_product(module)
                found[shown] = found.get(shown, True) and served
    left = [name for name, adaptable in found.items() if not adaptable]
    if left:
        logger.info("all-linear leaves out %s: PEFT cannot adapt them in a %s", ", ".join(left), type(model).__name__)
    return sorted(name for name, adaptable in found.items() if adaptable)


@contextmanager
def refused_by_peft() -> Generator[None]:
    """Within it, what PEFT refuses to adapt becomes a UserError: wrap the making of an adapter, nothing else."""
    try:
        with warnings.catch_warnings():
            # it writes such a pattern itself, for the stacked experts that it adapts in the place of their layers
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
            yield
    except (ValueError, TypeError) as error:
        remedy = "choose other target_modules or settings"
        raise UserError("lora", " ".join(str(error).split()), remedy) from error


def say_adapted(model: nn.Module, asked: Collection[str]) -> None:
    """Log what of a mixture of experts an adapter trains: its experts' weights are stacked and no linear layers.

    Args:
        model: PEFT's.
        asked: the target modules that PEFT was given; for some mixtures it adapts the experts in the place of those
            that carry their old names.
    """
    layers = lora_layers(model)
    held = {
        (id(each.get_base_layer()), each.parameter_name) for each in layers.values() if isinstance(each, ParamWrapper)
    }
    trained, frozen = set[str](), set[str]()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            # of convolutions, which have three dimensions as well, one is small
            if parameter.dim() == 3 and min(parameter.shape[1:]) > 8:
                place = path.replace(".base_layer", "").rpartition(".")[2]
                (trained if (id(module), name) in held else frozen).add(f"{place}.{name}")
    adapted = {path.replace(".base_layer", "").rpartition(".")[2] for path in layers}
    instead = sorted(set(asked) - adapted) if trained else []
    if trained:
        rest = f", and in their place leaves out the layers {', '.join(instead)}" if instead else ""
        logger.info("the adapter trains the stacked weights %s%s", ", ".join(sorted(trained)), rest)
    if frozen:
        logger.info(
            "the adapter leaves frozen the stacked weights %s (experts or the like, no linear layers)",
            ", ".join(sorted(frozen)),
        )


def _taken_past_adapters(module: nn.Module) -> frozenset[str]:
    """Layers of a module whose weight or bias its forward takes by itself, instead of calling the layer.

    A state-space mixer (it has a convolution) hands its projections' weights to a kernel where there is one and calls
    the layers where there is none; a weight that is written to would change the base; a layer that is never called
    (LongCat's router) has no place where an adapter would run. Elsewhere a weight is read in branches that no supported
    setting takes (BLOOM's).
    """
    mixer = any(isinstance(child, nn.Conv1d) for child in module.children())
    read, written = (_named_before(type(module), what) for what in (r"\.(?:weight|bias)\b", r"\.weight\.data\b"))
    return read if mixer else written | (read - _named_before(type(module), r"\("))


@torch.no_grad()
def _gives_a_product(layer: nn.Linear | Conv1D) -> bool:
    """Whether a linear layer with a forward of its own gives one tensor of its size (Llama 4's router gives scores)."""
    if type(layer).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    try:
        found = layer(layer.weight.new_zeros(1, layer.weight.shape[1]))
    except (RuntimeError, AssertionError, TypeError, ValueError, IndexError):
        return True  # quantised, or not where it will run: PEFT knows these
    return isinstance(found, Tensor) and found.shape[-1] == layer.weight.shape[0]


@functools.cache
def _named_before(module: type[nn.Module], what: str) -> frozenset[str]:
    """The names that stand as `self.NAME` before a pattern in the module's source."""
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        return frozenset()
    return frozenset(re.findall(rf"\bself\.(\w+){what}", source))


def adapted_weight(layer: Any) -> Any:
    """The base's parameter that a LoRA layer changes: a layer's weight, or one of a module's own (`ParamWrapper`)."""
    return layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight


def merged_weight(layer: Any, role: str) -> Tensor:
    """The base's weight with that adapter's change in it: summed in fp32, rounded once and without a bias to the
    weight's dtype (see `rounding`)."""
    weight: Tensor = adapted_weight(layer).data
    return rounded(layer.get_delta_weight(role).float().add_(weight), weight.dtype)


def lora_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """Every layer that carries adapters, by its name in `model`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def lora_state(layers: Mapping[str, BaseTunerLayer], adapter: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters under the names in which PEFT saves them."""
    state: dict[str, nn.Parameter] = {}
    for path, layer in layers.items():
        for kind in layer.adapter_layer_names:
            held: Any = getattr(layer, kind, {})
            if adapter not in held:
                continue
            part = held[adapter]
            if isinstance(part, nn.Parameter):
                state[f"{path}.{kind}"] = part
            else:
                state |= {f"{path}.{kind}.{name}": parameter for name, parameter in part.named_parameters()}
    return state


def tensors_sha256(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """Hash of names, types, shapes and bytes, whatever the order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(dict(tensors).items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A saved adapter's config and tensors (on the CPU).

    Raises:
        UserError: no PEFT adapter there, not in safetensors, not plain LoRA (see `check_plain`), damaged, or weights
            that are no finite numbers.
    """
    where = str(folder)
    check_intact(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(where, f"no {name} there", "give a folder that a stage or PEFT's save_pretrained wrote")
    config = check_plain(read_config(folder), where)
    tensors = read_tensors(folder / WEIGHTS)
    check_tensors(tensors, where)
    return config, tensors


def read_tensors(file: Path) -> dict[str, Tensor]:
    """A safetensors file's tensors, on the CPU. Raises UserError where it cannot be read."""
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(str(file), f"cannot be read ({said})", "run its stage again, or take it from a copy") from error


def write_adapter(folder: Path, base: Base, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write the two files that plain PEFT loads, straight into `folder`.

    Raises:
        UserError: a tensor is not finite, not all here, or cannot be read back.
    """
    config = copy.copy(config)
    config.inference_mode = True
    config.base_model_name_or_path = base.model_id
    # Only a hub id has a revision that PEFT could ask for; anything else is a path on this machine.
    config.revision = base.revision if base.model_id == base.spec else None
    if isinstance(config.target_modules, str) or config.exclude_modules or config.layers_to_transform is not None:
        # what was asked for by a pattern is written as what it matched, which every reader understands alike
        config.target_modules = adapted_modules(tensors)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.target_modules = sorted(config.target_modules or ())
    check_whole(str(folder), tensors)
    check_finite_weights(folder, tensors)
    # its start is over: a reader must not draw or decompose anything before it fills in the weights
    config.init_lora_weights = True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / WEIGHTS, metadata={"format": "pt"})
    _check_written(folder / WEIGHTS, plain)


def _check_written(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError where the file's header does not name these tensors."""
    header = read_header(file, str(file))[1]
    held = {name: tuple(entry["shape"]) for name, entry in header.items()}
    if held != (expected := {name: tuple(tensor.shape) for name, tensor in tensors.items()}):
        problem = f"{len(held)} tensors were written where the adapter has {len(expected)}, or of other shapes"
        raise UserError(str(file), problem, "look at the disk, and train the stage again")


def check_finite_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse to save weights that are NaN or infinite.

    Raises:
        UserError: how many of them are.
    """
    wrong = sum(int((~tensor.isfinite()).sum()) for tensor in tensors.values())
    if wrong:
        total = sum(tensor.numel() for tensor in tensors.values())
        problem = f"{wrong} of the adapter's {total} weights are not finite, so it is not saved"
        raise UserError(str(folder), problem, "lower the learning rate, and look at the last rows of log.jsonl")


def fill(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy a saved adapter's tensors over parameters of the same names and shapes.

    Raises:
        UserError: names or shapes differ: it belongs to another base.
    """
    different = sorted(state.keys() ^ tensors.keys())
    different += [name for name in state.keys() & tensors.keys() if state[name].shape != tensors[name].shape]
    if different:
        raise UserError(where, f"does not fit this base (at {different[0]})", "use the base that it was trained on")
    with torch.no_grad():
        for name, parameter in state.items():
            parameter.copy_(tensors[name])


def embed_parent(state: Mapping[str, nn.Parameter], lora: LoraSpec, parent: Path) -> None:
    """Make a fresh adapter compute exactly what its parent computes, at an equal or larger rank.

    The parent's rows of A and columns of B come first; B's new columns are zero, A's new rows stay as drawn, so the
    new directions change nothing yet and can learn. Modules that the parent did not adapt keep their zero B.

    Raises:
        UserError: smaller rank, other scaling, or modules of the parent left out: none of them can be exact.
    """
    config, tensors = read_adapter(parent)
    if lora.r < config.r:
        raise UserError("lora.r", f"{lora.r} is below {config.r} of {parent}", f"use r: {config.r} or more")
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    if not math.isclose(scaling, lora.scaling(), rel_tol=1e-9):
        fitting = scaling * (math.sqrt(lora.r) if lora.use_rslora else lora.r)
        raise UserError(
            "lora.alpha",
            f"{lora.alpha} scales by {lora.scaling():g}, {parent} by {scaling:g}",
            f"use alpha: {fitting:g} with r: {lora.r}",
        )
    tensors = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    left_out = sorted(tensors.keys() - state.keys())
    if left_out:
        module = left_out[0].removeprefix("base_model.model.").partition(".lora_")[0]
        raise UserError(
            "lora.target_modules",
            f"{module}, which {parent} adapts, is not among them (or not in this base)",
            "keep the parent's target modules and base",
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            target = state[name]
            if any(old > new for old, new in zip(tensor.shape, target.shape, strict=True)):
                raise UserError(str(parent), f"does not fit this base (at {name})", "use the base it was trained on")
            if tensor.shape != target.shape and config.target_parameters:
                raise UserError("lora.r", f"{lora.r}, and {parent} adapts stacked experts", f"use r: {config.r}")
            corner = tuple(slice(size) for size in tensor.shape)
            if "lora_B" in name or "lora_embedding_B" in name:
                target.zero_()
            target[corner] = tensor.to(target)
