"""A LoRA adapter merged into its base, as one ordinary model, and what the merge costs."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..data.encode import IGNORED
from ..errors import UserError
from ..files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LINEAGE
from ..intact import check_intact
from . import seams
from .auto import open_model, open_tokenizer
from .base import Base
from .lineage import load_adapter_base, read_lineage
from .loading import Quantization, Task, load_model
from .lora import lora_layers, refused_by_peft
from .older import config_for_both, save_tokenizer
from .plain_lora import read_config
from .quantised import unpack
from .quiet import quiet_transformers
from .rounding import rounded

with seams.importing(seams.LORA_LAYER):
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper
with seams.importing(seams.TOKEN_ROWS):
    from peft.utils.other import TrainableTokensWrapper

Rows = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Token ids with their labels, `IGNORED` where a token is not counted."""

_EXACT = 1e-3
"""What log-probabilities (or a reward) may differ by between adapter and merged weights, both in fp32."""
_PROBE: Rows = (([5, 9, 17, 4, 31, 8, 2, 40, 6, 12], [5, 9, 17, 4, 31, 8, 2, 40, 6, 12]),)
"""Where no rows are at hand: any tokens will do to see whether two models are one."""


@dataclass(frozen=True)
class Cost:
    """Mean negative log-probability of the counted tokens, in nats a token (of a reward model: its mean score).

    Attributes:
        tokens: how many are counted (of a reward model: rows).
        exact: in fp32, the adapter beside the base. beside: in the dtype that it was trained in; None: that is fp32.
        merged: as written.
        difference: mean absolute difference between `merged` and `exact`, a token.
    """

    tokens: int
    exact: float
    beside: float | None
    merged: float
    difference: float


@dataclass(frozen=True)
class Merged:
    """What was written: the base that the adapter belongs to, the dtype of the weights, what it cost (None: no rows to
    measure it on), whether it is a reward model, and from how many bits the base was unpacked."""

    base: Base
    dtype: str
    cost: Cost | None = None
    reward: bool = False
    unpacked: str | None = None


def merge_adapter(adapter: Path, out: Path, dtype: str | None = None, rows: Rows = ()) -> Merged:
    """Write base + adapter as safetensors, with the tokenizer beside them.

    Any adapter that PEFT can merge will do, plain LoRA or not. The sum is taken in fp32, held against the adapter
    beside its base, and rounded once, without a bias (see `rounding`). Where an adapted embedding is tied to the output
    head, they are written as two. A reward adapter becomes a sequence classifier with its score head. Where the stage's
    base was quantised, it is quantised again and unpacked: beside these weights the adapter was trained, and with the
    base's own it would say something else.

    Args:
        adapter: a finished stage's folder, or any of PEFT's; its base is found by its lineage, wherever it was trained.
        out: a folder; files of the same names in it are overwritten.
        dtype: float32, bfloat16 or float16; None: the one that the stage was trained in, or else float32.
        rows: on which the cost is measured.

    Raises:
        UserError: its base cannot be found, or is another model now; or the adapter cannot be merged exactly.
    """
    check_intact(adapter)
    _check_mergeable(adapter)
    base = load_adapter_base(adapter)
    config = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    lineage = read_lineage(adapter).config if (adapter / LINEAGE).is_file() else {}
    trained = lineage.get("dtype")
    target = dtype or trained or "float32"
    task: Task = "reward" if config.get("task_type") == "SEQ_CLS" else "causal"
    counted = rows or _PROBE
    beside = None
    if rows and trained not in (None, "float32"):
        low = getattr(torch, trained)
        with torch.autocast("cpu", dtype=low):
            beside = float(_outcome(_beside(_opened(base, task, low, lineage), adapter), rows).mean())
    has_tokenizer = (adapter / "tokenizer_config.json").is_file()
    tokenizer = open_tokenizer(adapter if has_tokenizer else base.path, str(adapter))
    peft = _beside(_opened(base, task, torch.float32, lineage), adapter)
    exact = _outcome(peft, counted)
    adapted, untied = _adapted(peft), _untie(peft)
    merged = _merge(peft, str(adapter))
    _check_same(exact, _outcome(merged, counted), str(adapter))
    for path, name in adapted:
        weight = getattr(merged.get_submodule(path), name, None)
        if isinstance(weight, nn.Parameter):
            weight.data = rounded(weight.data, getattr(torch, target))
    merged.to(getattr(torch, target))
    merged.config.pad_token_id = tokenizer.pad_token_id
    merged.config.eos_token_id = tokenizer.eos_token_id
    found = _outcome(merged, rows) if rows else None
    merged.config.name_or_path = ""
    with quiet_transformers():
        merged.save_pretrained(out, safe_serialization=True)
        if untied and target == "float32":
            again = open_model(AutoModelForCausalLM, out, str(out), dtype=torch.float32).eval()
            _check_same(exact, _outcome(again, counted), str(adapter))
    save_tokenizer(tokenizer, out)
    config_for_both(out)
    cost = None
    if found is not None:
        difference = float((found - exact).abs().mean())
        cost = Cost(len(exact), float(exact.mean()), beside, float(found.mean()), difference)
    return Merged(base, target, cost, reward=task == "reward", unpacked=lineage.get("quantization"))


def _opened(base: Base, task: Task, dtype: torch.dtype, trained: Mapping[str, Any]) -> PreTrainedModel:
    """The base on the CPU in that dtype; where it was quantised in training, with the weights that it had there.

    Args:
        trained: the stage's config, as its lineage has it.
    """
    packed: Quantization | None = trained.get("quantization")
    if packed is None:
        return load_model(base, dtype=dtype, task=task)
    model: Any = load_model(base, dtype=getattr(torch, trained["dtype"]), task=task, quantization=packed).cpu()
    unpack(model)
    return model if model.dtype == dtype else model.to(dtype)


def _check_mergeable(adapter: Path) -> None:
    """Before PEFT opens it: its weights are safetensors, and its config names neither code nor other files.

    Raises:
        UserError: weights that are a pickle; an adapter that is no change of weights, one that is made of others or
            that imports a module which it names.
    """
    where = str(adapter)
    config = read_config(adapter)
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning or kind == "XLORA":
        raise UserError(where, f"a {kind} adapter, which PEFT cannot merge", "use it unmerged")
    if getattr(config, "megatron_config", None):
        module = getattr(config, "megatron_core", None)
        said = f"a LoRA of Megatron's layers, for which PEFT imports the module {module!r} that it names"
        raise UserError(where, said, "merge it where it was trained")
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        pickled = (adapter / "adapter_model.bin").is_file()
        found = "its weights are adapter_model.bin, a pickle, which can run code when it is read; " if pickled else ""
        raise UserError(where, f"{found}no {ADAPTER_WEIGHTS} there", "save it again, with PEFT's save_pretrained")


def _beside(model: PreTrainedModel, adapter: Path) -> PeftModel:
    with refused_by_peft(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Ff]ound missing adapter keys")
        try:
            return PeftModel.from_pretrained(model, str(adapter)).eval()
        except UserWarning as error:
            said = "it lacks weights that its config speaks of, which would stay as they were drawn"
            raise UserError(str(adapter), said, "save the adapter again") from error
        except (SafetensorError, OSError, RuntimeError) as error:
            said = " ".join(str(error).split())[:200]
            raise UserError(str(adapter), f"its weights cannot be read ({said})", "save the adapter again") from error


def _adapted(peft: PeftModel) -> list[tuple[str, str]]:
    """Where the weights that the adapter changes lie once it is merged: module and name, of a mixture's experts several
    in one module, whose wrappers stand within one another."""
    return [
        (_plain_path(path), getattr(layer, "parameter_name", "weight")) for path, layer in lora_layers(peft).items()
    ]


def _plain_path(path: str) -> str:
    """A wrapped module's path without what PEFT puts around it."""
    return path.removeprefix("base_model.model.").replace(".base_layer", "").removesuffix(".token_adapter")


@torch.no_grad()
def _outcome(model: nn.Module, rows: Rows) -> Tensor:
    """-log p of every counted token of the rows (of a classifier: the score of every row), fp32."""
    parts = []
    for ids, labels in rows:
        logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits.float()
        if logits.dim() == 2:
            parts.append(logits[0, :1])
            continue
        target = torch.tensor(list(labels)[1:])
        keep = target != IGNORED
        logps = logits[0, :-1][keep].log_softmax(-1)
        parts.append(-logps.gather(-1, target[keep][:, None]).squeeze(-1))
    return torch.cat(parts)


def _check_same(exact: Tensor, merged: Tensor, where: str) -> None:
    gap = float((exact - merged).abs().max())
    if not gap <= _EXACT * max(1.0, float(exact.abs().max())):
        raise UserError(
            where,
            f"merged it would say something else than beside its base (by up to {gap:.2g} in fp32)",
            "use it unmerged",
        )


def _merge(peft: PeftModel, where: str) -> PreTrainedModel:
    tuner: Any = peft
    try:
        return tuner.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError, TypeError) as error:
        kind = getattr(peft.active_peft_config.peft_type, "value", peft.active_peft_config.peft_type)
        raise UserError(where, f"a {kind} adapter, which PEFT cannot merge", "use it unmerged") from error


def _untie(peft: PeftModel) -> bool:
    """Give the output head a weight of its own where the adapter changes it or the embedding that it is tied to: merged
    into the shared weight, a change of one would be a change of both. Whether that was needed."""
    model: Any = peft.get_base_model()
    both = [model.get_input_embeddings(), model.get_output_embeddings()]
    if isinstance(both[1], TrainableTokensWrapper) and both[1].token_adapter.tied_adapter is not None:
        return False  # one set of rows for both, which goes into their one weight
    wraps = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    if both[1] is None or not any(isinstance(each, wraps) for each in both):
        return False
    inner: list[Any] = [_innermost(each) for each in both]
    if inner[0].weight is inner[1].weight or inner[0].weight.data_ptr() == inner[1].weight.data_ptr():
        inner[1].weight = nn.Parameter(inner[1].weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    for name in ("_tied_weights_keys", "all_tied_weights_keys"):
        if hasattr(model, name):
            setattr(model, name, {})
    return True


def _innermost(module: Any) -> Any:
    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        else:
            return module
