"""The LoRA that is asked for: which layers, how large, how strong, where it starts, and what PEFT is told of it."""

import dataclasses
import functools
import inspect
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UserError, nearest
from . import seams
from .altering import ALTERING, check_start
from .base import Base
from .causal import decoder_of
from .plain_lora import adapted_modules, check_targets, read_adapter, target_names
from .token_rows import Asked, check_asked, rows_for

with seams.importing(seams.CONV1D):
    from transformers.pytorch_utils import Conv1D
with seams.importing(seams.LORA_LAYER):
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

logger = logging.getLogger(__name__)

Names = str | tuple[str, ...] | list[str]


@dataclass(frozen=True)
class LoraSpec:
    """The LoRA to train. Fields have PEFT's names, but for `alpha` and `dropout` (`lora_alpha`, `lora_dropout`).

    Attributes:
        r: rank.
        alpha: numerator of the scaling: alpha / r, or alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732).
        dropout: on the input of A, in training.
        target_modules: "all-linear" (every linear layer of the decoder, no output head), module names, or a regular
            expression for whole paths.
        use_dora: train a magnitude for each output beside the direction (arXiv 2402.09353).
        rank_pattern, alpha_pattern: ranks and alphas of modules whose names match, where they are others.
        exclude_modules: names, or a regular expression, of target modules that get no adapter.
        layers_to_transform: numbers of the decoder's layers that get adapters; None: all. layers_pattern: the name of
            the list that they stand in, where PEFT does not know it.
        target_parameters: stacked weights [experts, ...] that get adapters too, by their names.
        trainable_token_indices: ids of tokens whose rows of the embedding train too (and of the output head, where that
            is the same weight); or such ids by the names of embedding and head.
        added_tokens: ids of tokens that the base was given for this run (`Base.added`): their rows train in both.
        init_lora_weights: where an adapter starts that starts from the base: True, gaussian, orthogonal, pissa,
            pissa_niter_N, olora (see `starts`). One that starts from another adapter starts as that one.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: Names = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    exclude_modules: Names | None = None
    layers_to_transform: int | tuple[int, ...] | list[int] | None = None
    layers_pattern: Names | None = None
    target_parameters: tuple[str, ...] | list[str] = ()
    trainable_token_indices: Asked = None
    added_tokens: tuple[int, ...] | list[int] = ()
    init_lora_weights: bool | str = True

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError("lora.r", f"{self.r}, expected 1 or more", "choose a rank such as 16")
        if not self.alpha > 0:
            raise UserError("lora.alpha", f"{self.alpha}, expected more than 0", "choose twice the rank")
        if not 0 <= self.dropout < 1:
            raise UserError("lora.dropout", f"{self.dropout}, expected 0 to below 1", "choose 0")
        if isinstance(self.layers_to_transform, int):
            object.__setattr__(self, "layers_to_transform", (self.layers_to_transform,))
        check_asked(self.trainable_token_indices)
        self._check_words()
        check_start(self.init_lora_weights, (self.r, *self.rank_pattern.values()))

    def _check_words(self) -> None:
        """Patterns and choices of layers, as far as they can be right without a model."""
        named = isinstance(self.target_modules, str) and _NAME.fullmatch(self.target_modules) is not None
        if named and self.target_modules != "all-linear":
            object.__setattr__(self, "target_modules", (self.target_modules,))
        if isinstance(self.target_modules, str) and not named and self.layers_to_transform is not None:
            said = "stands beside a regular expression in target_modules, which says the layers itself"
            raise UserError("lora.layers_to_transform", said, "leave it out, or list names")
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserError("lora.layers_pattern", "has no effect without layers_to_transform", "leave it out")
        for name, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            wanted = "a whole number of 1 or more" if name == "rank_pattern" else "more than 0"
            for key, value in pattern.items():
                if not value > 0 or (name == "rank_pattern" and value != int(value)):
                    raise UserError(f"lora.{name}", f"{key}: {value}, expected {wanted}", "correct it")

    @classmethod
    def said_by(cls, config: LoraConfig, targets: str | list[str]) -> "LoraSpec":
        """What a config (`check_plain`) says, its modules as `target_names` gives them."""
        return cls(
            r=config.r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            target_modules=targets,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            rank_pattern=dict(config.rank_pattern or {}),
            alpha_pattern=dict(config.alpha_pattern or {}),
            target_parameters=sorted(config.target_parameters or ()),
            trainable_token_indices=config.trainable_token_indices,
            init_lora_weights=config.init_lora_weights,
        )

    @classmethod
    def of(cls, folder: Path) -> "LoraSpec":
        """The settings of a saved adapter; its modules by the names that its config lists, or else by their paths.

        Raises:
            UserError: as `read_adapter`.
        """
        config, tensors = read_adapter(folder)
        config.init_lora_weights = True  # what it holds is what it has become
        listed = [] if isinstance(config.target_modules, str) else sorted(config.target_modules or ())
        narrowed = config.exclude_modules or config.layers_to_transform is not None
        stacked = {name.rpartition(".")[0] for name in config.target_parameters or ()}
        paths = [path for path in adapted_modules(tensors) if not _within(path.replace(".base_layer", ""), stacked)]
        return cls.said_by(config, listed if listed and not narrowed else paths)

    @property
    def altering(self) -> bool:
        """Whether it starts with a part of the base's weights, which PEFT takes out of the base, and which is taken out
        here by the adapter's second half: it has twice the rank."""
        return ALTERING.fullmatch(str(self.init_lora_weights)) is not None

    @property
    def rank(self) -> int:
        """Of the adapter as it is trained and written."""
        return self.r * (2 if self.altering else 1)

    @property
    def narrowed(self) -> bool:
        """Whether it says which of the layers of a name are meant."""
        pattern = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        return pattern or bool(self.exclude_modules) or self.layers_to_transform is not None

    def on(self, base: Base) -> "LoraSpec":
        """The same on that base, with the rows of the tokens that it was given."""
        return dataclasses.replace(self, added_tokens=base.added) if base.added else self

    def scaling(self) -> float:
        """What B @ A is multiplied with, where no pattern says otherwise."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def config(
        self,
        model: PreTrainedModel,
        task_type: str,
        modules_to_save: list[str] | None = None,
        *,
        continued: bool = False,
    ) -> LoraConfig:
        """The PEFT config for `model` (without adapters), its target modules by name.

        Args:
            continued: it starts from another adapter, and nothing that is drawn stays.

        Raises:
            UserError: a name that is not a linear layer of the decoder, or one that matches nothing.
        """
        times = 2 if self.altering else 1
        larger = math.sqrt(times) if self.use_rslora else times
        config = LoraConfig(
            r=self.r * times,
            lora_alpha=self.alpha * larger,  # pyright: ignore[reportArgumentType]: PEFT says int and takes any number
            lora_dropout=self.dropout,
            target_modules=self._targets(model),
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            rank_pattern={name: int(each) * times for name, each in self.rank_pattern.items()},
            alpha_pattern={name: each * larger for name, each in self.alpha_pattern.items()},
            target_parameters=list(self.target_parameters) or None,
            trainable_token_indices=rows_for(model, self.trainable_token_indices, self.added_tokens),
            init_lora_weights=True if continued or self.altering else self.init_lora_weights,  # pyright: ignore[reportArgumentType]
            task_type=task_type,
            modules_to_save=modules_to_save,
        )
        self._check_fits(model, config)
        return config

    def _targets(self, model: PreTrainedModel) -> list[str]:
        """The names, or the paths, of the layers that get adapters."""
        linear = self.target_modules == "all-linear"
        wanted = linear_names(model) if linear else self.target_modules
        if not linear and not isinstance(wanted, str):
            check_targets(model, wanted)
        if not self.narrowed:
            return list(wanted)
        layers = self.layers_to_transform
        asked = LoraConfig(
            target_modules=wanted if isinstance(wanted, str) else list(wanted),
            exclude_modules=self.exclude_modules if isinstance(self.exclude_modules, str | None)
            else list(self.exclude_modules),
            layers_to_transform=None if layers is None else list(layers),  # pyright: ignore[reportArgumentType]
            layers_pattern=self.layers_pattern if isinstance(self.layers_pattern, str | None)
            else list(self.layers_pattern),
        )  # fmt: skip
        _check_narrowing(model, asked)
        found = target_names(model, asked, "lora.target_modules")
        assert not isinstance(found, str)
        check_targets(model, found)
        return found

    def _check_fits(self, model: PreTrainedModel, config: LoraConfig) -> None:
        """Every pattern matches a layer, every stacked weight is there, and DoRA has rows to take the length of."""
        paths = targeted(model, config)
        stacked = _stacked(model)
        for name in self.target_parameters:
            if not any(_within(each, [name]) for each in stacked):
                known = sorted(set(map(_last, stacked)))
                said = f"{name!r} matches no stacked weight of {type(model).__name__}"
                raise UserError(
                    "lora.target_parameters", said, f"name {' or '.join(known)}" if known else "leave it out"
                )
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, key):
                if not any(get_pattern_key([pattern], path) == pattern for path in (*paths, *stacked)):
                    raise UserError(
                        f"lora.{key}", f"{pattern!r} matches no layer that is adapted", "correct or drop it"
                    )
        odd = [path for path, module in paths.items() if not isinstance(module, (nn.Linear, Conv1D))]
        if odd and self.use_dora:
            said = f"{odd[0]} is no linear layer, whose outputs have a magnitude each"
            raise UserError(
                "lora.use_dora", said, f"name the linear layers alone, or exclude_modules: [{_last(odd[0])}]"
            )


_NAME = re.compile(r"[\w.-]+")


def targeted(model: PreTrainedModel, config: LoraConfig) -> dict[str, nn.Module]:
    """The modules of `model` (without adapters) that the config adapts, by their paths."""
    return {path: each for path, each in model.named_modules() if path and check_target_module_exists(config, path)}


def scaling_of(config: LoraConfig, module: str) -> float:
    """What B @ A is multiplied with in the module of that path."""
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    r = ranks.get(get_pattern_key(list(ranks), module), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)
    return alpha / (math.sqrt(r) if config.use_rslora else r)


def _check_narrowing(model: PreTrainedModel, config: LoraConfig) -> None:
    """Each layer that is numbered is there, and what is excluded would be among the targets.

    Raises:
        UserError: one is not: it would say nothing.
    """
    within = dataclasses.replace(config, exclude_modules=None)
    for index in config.layers_to_transform or ():  # pyright: ignore[reportGeneralTypeIssues]: a list here
        if not targeted(model, dataclasses.replace(within, layers_to_transform=[index])):
            said = f"no layer {index} with such modules in {type(model).__name__}"
            raise UserError("lora.layers_to_transform", said, "count from 0, and name the list by layers_pattern")
    excluded = config.exclude_modules
    everything = targeted(model, dataclasses.replace(within, layers_to_transform=None, layers_pattern=None))
    for name in [excluded] if isinstance(excluded, str) else sorted(excluded or ()):
        alone = dataclasses.replace(within, exclude_modules=name if isinstance(excluded, str) else [name])
        left = targeted(model, dataclasses.replace(alone, layers_to_transform=None, layers_pattern=None))
        if len(left) == len(everything):
            known = sorted({_last(path) for path in everything})
            said = f"{name!r} is none of the modules that would be adapted"
            raise UserError("lora.exclude_modules", said, nearest(name, known, most=12))


def _stacked(model: PreTrainedModel) -> list[str]:
    """The paths of the decoder's weights that hold one matrix for each expert."""
    decoder = decoder_of(model)
    (path,) = [path for path, each in model.named_modules() if each is decoder] or [""]
    # of convolutions, which have three dimensions as well, one is small
    return [
        f"{path}.{name}".removeprefix(".")
        for name, each in decoder.named_parameters()
        if each.dim() == 3 and min(each.shape[1:]) > 8
    ]


def _within(path: str, ends: Iterable[str]) -> bool:
    return any(path == end or path.endswith(f".{end}") for end in ends)


def _last(path: str) -> str:
    return path.rpartition(".")[2]


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
