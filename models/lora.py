"""LoRA weights as plain tensors: named, hashed, read, written, and grown to a larger rank.

Tensors carry the names that PEFT gives them in `adapter_model.safetensors`, without the adapter's own name.
"""

import copy
import hashlib
import json
import logging
import math
import warnings
from collections.abc import Collection, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..errors import UserError
from ..files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from . import seams
from .base import Base
from .lora_spec import LoraSpec, linear_names, scaling_of
from .plain_lora import adapted_modules, read_adapter, read_tensors
from .quantised import QuantisedLinear
from .rounding import rounded
from .sound import read_header
from .starts import start_within
from .token_rows import PLACE as ROWS_PLACE
from .token_rows import ROWS, embed_rows, module_of, row_ids, use_token_rows
from .whole import check_whole

with seams.importing(seams.LORA_LAYER):
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

__all__ = ["LoraSpec", "linear_names", "read_adapter", "read_tensors"]

logger = logging.getLogger(__name__)

PeftT = TypeVar("PeftT", bound=PeftModel)
_FRESH = "default"

WEIGHTS, CONFIG = ADAPTER_WEIGHTS, ADAPTER_CONFIG
VALUE_HEAD = "value_head.safetensors"
SCORE = "base_model.model.score.weight"
MAGNITUDE = "lora_magnitude_vector"
"""What a DoRA layer trains beside A and B, by PEFT's name."""


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


def adapted_weight(layer: Any) -> Any:
    """The base's parameter that a LoRA layer changes: a layer's weight, or one of a module's own (`ParamWrapper`)."""
    return layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight


def merged_weight(layer: Any, role: str) -> Tensor:
    """The base's weight with that adapter's change in it: summed in fp32, rounded once and without a bias to the
    weight's dtype (see `rounding`)."""
    weight: Tensor = adapted_weight(layer).data
    changed: Tensor = layer.get_delta_weight(role).float().add_(weight)
    if role in layer.lora_magnitude_vector:
        # DoRA: each output's row of weights gets the length that is trained (arXiv 2402.09353, equation 5)
        inputs = 0 if layer.fan_in_fan_out else 1
        length = torch.linalg.vector_norm(changed, dim=inputs, keepdim=True)
        changed *= layer.lora_magnitude_vector[role].weight.detach().float().unsqueeze(inputs) / length
    return rounded(changed, weight.dtype)


def lora_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """Every layer that carries adapters, by its name in `model`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def lora_state(layers: Mapping[str, BaseTunerLayer], adapter: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters under the names in which PEFT saves them."""
    state: dict[str, nn.Parameter] = {}
    for path, layer in layers.items():
        if getattr(layer, "tied_adapter", None) is not None:
            continue  # a head whose rows are the embedding's
        for kind in layer.adapter_layer_names:
            held: Any = getattr(layer, kind, {})
            if adapter not in held:
                continue
            part = held[adapter]
            if isinstance(part, nn.Parameter):
                state[f"{path}.{kind}"] = part
            elif kind == MAGNITUDE:
                state[f"{path}.{kind}"] = part.weight
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


def write_adapter(folder: Path, base: Base, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write the two files that plain PEFT loads, straight into `folder`.

    Raises:
        UserError: a tensor is not finite, not all here, or cannot be read back.
    """
    config = copy.copy(config)
    config.inference_mode = True
    config.base_model_name_or_path = base.model_id
    # Only a hub id has a revision that PEFT could ask for; anything else is a path on this machine.
    hub = base.model_id in (base.spec, base.of.spec if base.of is not None else base.spec)
    config.revision = base.revision if hub else None
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


def put_on(
    kind: type[PeftT],
    model: PreTrainedModel,
    lora: LoraSpec,
    task_type: str,
    modules_to_save: list[str] | None = None,
    *,
    continued: bool,
    seed: int,
) -> PeftT:
    """The model with a fresh adapter "default", still to be put where it starts (see `start`).

    Args:
        kind: of PEFT model.
        continued: it will start from another adapter.
        seed: of LoRA's random A.

    Raises:
        UserError: PEFT cannot adapt it so.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        config = lora.config(model, task_type, modules_to_save, continued=continued)
        asked = set(config.target_modules or ())
        check_rows(model, config)
        with refused_by_peft():
            peft = kind(model, config, adapter_name=_FRESH)
    use_token_rows(peft)
    say_adapted(peft, asked)
    check_stacked(config, lora)
    return peft


def start(
    layers: Mapping[str, BaseTunerLayer], config: LoraConfig, lora: LoraSpec, parent: Path | None, seed: int
) -> None:
    """Put the fresh adapter "default" where it starts: at its parent, or at the base.

    Args:
        layers: every layer that carries adapters, by its name.
        config: the adapter's, as PEFT has it.
        parent: folder of the adapter to start from; None: the base.
        seed: of a randomised SVD.

    Raises:
        UserError: the parent cannot be taken over exactly, or the base has no such start.
    """
    if parent is not None:
        embed_parent(lora_state(layers, _FRESH), config, lora, parent)
    elif lora.altering:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            start_within(layers, _FRESH, str(lora.init_lora_weights))


def check_stacked(config: LoraConfig, lora: LoraSpec) -> None:
    """For some mixtures PEFT adapts the stacked experts of all layers in the place of the layers that are named.

    Raises:
        UserError: what is said of single layers would not hold for them.
    """
    instead = sorted({*(config.target_parameters or ())} - {*lora.target_parameters})
    said: dict[str, Any] = {
        "a selection of layers": lora.narrowed,
        "rank_pattern": lora.rank_pattern,
        "alpha_pattern": lora.alpha_pattern,
    }
    if instead and (asked := [name for name, value in said.items() if value]):
        problem = f"{asked[0]} is asked for, and PEFT adapts {', '.join(instead)} in the place of the layers named"
        raise UserError("lora", problem, "name target_modules that are no experts, and target_parameters beside them")


def check_rows(model: nn.Module, config: LoraConfig) -> None:
    """DoRA takes the length of the base's rows at every forward, beside the layer's own; rows of the embedding that
    train stand in the place of the base's.

    Raises:
        UserError: no process has them whole, or they are packed.
    """
    if config.use_dora and any(isinstance(each, QuantisedLinear) for each in model.modules()):
        said = "reads the base's weights at every forward, and they are packed"
        raise UserError("lora.use_dora", said, "leave model.quantization out, or use_dora: false")
    divided = is_deepspeed_zero3_enabled() or any(hasattr(each, "full_tensor") for each in model.parameters())
    if config.use_dora and divided:
        said = "reads the base's weights, which are divided among processes"
        raise UserError("lora.use_dora", said, "use --launch ddp, or use_dora: false")
    if config.trainable_token_indices and divided:
        said = "rows of the embedding train, which is divided among processes"
        raise UserError(ROWS_PLACE, said, "use --launch ddp")


def embed_parent(state: Mapping[str, nn.Parameter], ours: LoraConfig, lora: LoraSpec, parent: Path) -> None:
    """Make a fresh adapter compute exactly what its parent computes, at an equal or larger rank.

    The parent's rows of A and columns of B come first; B's new columns are zero, A's new rows stay as drawn, so the
    new directions change nothing yet and can learn. DoRA's magnitudes are the parent's, and so are the rows of tokens
    that it trained. Modules that the parent did not adapt keep their zero B.

    Args:
        ours: the fresh adapter's config, as PEFT has it; `lora` is what was asked for.

    Raises:
        UserError: smaller rank, other scaling, DoRA or not, or modules of the parent left out: none can be exact.
    """
    theirs, tensors = read_adapter(parent)
    rows = {name: tensor for name, tensor in tensors.items() if name.endswith(ROWS)}
    tensors = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    check_kin(ours, lora, theirs, adapted_modules(tensors), parent)
    _embed_rows(state, ours, rows, theirs, parent)
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
                if ours.rank_pattern or theirs.rank_pattern:
                    said = f"{name} has another rank than in {parent}"
                    raise UserError("lora.rank_pattern", said, "keep the parent's, or a larger rank")
                raise UserError(str(parent), f"does not fit this base (at {name})", "use the base it was trained on")
            if tensor.shape != target.shape and theirs.target_parameters:
                raise UserError("lora.r", f"{lora.r}, and {parent} adapts stacked experts", f"use r: {theirs.r}")
            corner = tuple(slice(size) for size in tensor.shape)
            if "lora_B" in name or "lora_embedding_B" in name:
                target.zero_()
            target[corner] = tensor.to(target)


def _embed_rows(
    state: Mapping[str, nn.Parameter],
    ours: LoraConfig,
    rows: Mapping[str, Tensor],
    theirs: LoraConfig,
    parent: Path,
) -> None:
    """The rows of tokens that a parent trained; the child may train more. Those of a head are nothing to a classifier.

    Raises:
        UserError: the child would have the base's rows in their place.
    """
    for name, tensor in rows.items():
        path = module_of(name)
        had, has = row_ids(theirs, path), row_ids(ours, path)
        if name not in state and ours.task_type == "SEQ_CLS" and any(each in state for each in rows):
            continue
        if missing := sorted({*had} - {*has}):
            said = f"leaves out {', '.join(map(str, missing[:5]))} of {path}, whose rows {parent} trains"
            raise UserError(ROWS_PLACE, said, "name the parent's tokens too")
        if len(had) != len(tensor):
            raise UserError(str(parent), f"has {len(tensor)} rows of {path} for {len(had)} tokens", "save it again")
        embed_rows(state[name], has, tensor, had)


def check_kin(ours: LoraConfig, lora: LoraSpec, theirs: LoraConfig, modules: Iterable[str], parent: Path) -> None:
    """Rank, scaling and kind of a child against its parent's, in the modules that the parent adapts.

    Raises:
        UserError: the child could not start as an exact copy.
    """
    times = ours.r // lora.r
    if ours.use_dora != theirs.use_dora:
        kind = "is a DoRA" if theirs.use_dora else "is none"
        remedy = f"use use_dora: {str(theirs.use_dora).lower()}"
        raise UserError("lora.use_dora", f"{str(ours.use_dora).lower()}, and {parent} {kind}", remedy)
    if ours.r < theirs.r:
        doubled = "" if times == 1 else f" ({ours.r} with init_lora_weights: {lora.init_lora_weights})"
        said = f"{lora.r}{doubled} is below {theirs.r} of {parent}"
        raise UserError("lora.r", said, f"use r: {math.ceil(theirs.r / times)} or more")
    patterns = [(each.rank_pattern, each.alpha_pattern) for each in (ours, theirs)]
    if theirs.target_parameters and patterns[0] != patterns[1]:
        said = f"not those of {parent}, which adapts stacked experts"
        raise UserError("lora.rank_pattern, lora.alpha_pattern", said, "keep r, alpha and the patterns of the parent")
    for module in modules:
        scaling, own = scaling_of(theirs, module), scaling_of(ours, module)
        if math.isclose(scaling, own, rel_tol=1e-9):
            continue
        if any(map(any, patterns)):
            said = f"{module} is scaled by {own:g}, in {parent} by {scaling:g}"
            raise UserError("lora.alpha_pattern", said, "keep alpha / r of each layer as the parent has it")
        fitting = scaling * (math.sqrt(lora.r) if lora.use_rslora else lora.r)
        said = f"{lora.alpha} scales by {lora.scaling():g}, {parent} by {scaling:g}"
        raise UserError("lora.alpha", said, f"use alpha: {fitting:g} with r: {lora.r}")
