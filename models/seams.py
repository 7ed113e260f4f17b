"""The seams between preftune and the libraries below it: every private or version-bound name that it uses or replaces.

A public name that moves is announced, and breaks loudly. These are not announced, and some would break in silence: an
overridden method that nobody calls any more, a field that is set and never read. Each stands here once, is checked
where it is first used, and a name that has moved ends the work in one line (`SeamMoved`).

Importing this module imports no other library.
"""

import functools
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from types import CodeType
from typing import Any, Literal

Library = Literal["torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes"]

TESTED: dict[Library, str] = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "trl": "1.16.0",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "bitsandbytes": "0.50.2",
}
"""The versions of constraints.txt, with which the tests ran."""


class SeamMoved(RuntimeError):
    """A private name of another library is no longer where, or what, this version of preftune takes it to be."""


@dataclass(frozen=True)
class Seam:
    """What we hold on to in another library.

    Attributes:
        key: short, for messages and lists.
        library: whose names they are.
        names: the dotted names.
        purpose: what we do with them.
        otherwise: what would go wrong, were they to move unnoticed.
        missing: given the subject of `require` (an object, a class or None), which names are not what they should be.
    """

    key: str
    library: Library
    names: tuple[str, ...]
    purpose: str
    otherwise: str
    missing: Callable[[Any], Iterable[str]]

    def moved(self, what: Iterable[str]) -> SeamMoved:
        """The error that says so: what is missing, both versions, the remedy."""
        try:
            installed = importlib.metadata.version(self.library)
        except importlib.metadata.PackageNotFoundError:
            installed = "(not installed)"
        tested = f"{self.library}=={TESTED[self.library]}"
        return SeamMoved(
            f"{self.library} {installed} has moved {', '.join(what)} (seam {self.key}, tested with {tested}): "
            f"{self.purpose}; unnoticed, {self.otherwise}; install {tested}, or report this line to preftune"
        )


_held: set[tuple[str, type]] = set()


def require(seam: Seam, subject: object = None) -> None:
    """Check a seam the first time; later calls for subjects of the same type cost a look into a set.

    Args:
        subject: what carries the names: an object or a class; None where they are a module's.

    Raises:
        SeamMoved: a name is missing, or is not what it should be.
    """
    entry = (seam.key, subject if isinstance(subject, type) else type(subject))
    if entry not in _held:
        check(seam, subject)
        _held.add(entry)


def check(seam: Seam, subject: object = None) -> None:
    """The same at every call: for what one subject may have and another of its type may not."""
    if gone := list(seam.missing(subject)):
        raise seam.moved(gone)


@contextmanager
def importing(seam: Seam) -> Generator[None, None, None]:
    """Around an import of the seam's names: one that fails is a `SeamMoved`."""
    try:
        yield
    except ImportError as error:
        raise seam.moved([str(error)]) from error


def forget_checks() -> None:
    """Check every seam anew at its next use."""
    _held.clear()


# --- How names are checked -------------------------------------------------------------------------------------------


def _found(*names: str) -> Callable[[Any], list[str]]:
    """These names (`module:attribute.attribute`) can be resolved."""

    def missing(_subject: object) -> list[str]:
        return [name for name in names if not _resolves(name)]

    return missing


def _resolves(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def _attributes(*names: str) -> Callable[[Any], list[str]]:
    """The subject has these attributes."""

    def missing(subject: object) -> list[str]:
        return [f"{_type_name(subject)}.{name}" for name in names if not hasattr(subject, name)]

    return missing


def _type_name(subject: object) -> str:
    return subject.__name__ if isinstance(subject, type) else type(subject).__name__


def _overridden(*names: str) -> Callable[[Any], list[str]]:
    """The subject's class inherits these methods from a library, and that library's own code calls them."""

    def missing(subject: object) -> Iterator[str]:
        for name in names:
            upstream = _upstream(subject)
            if not any(name in vars(base) for base in upstream):
                yield f"{_type_name(subject)}.{name}"
            elif not any(name in _names_in(base, but=name) for base in upstream):
                yield f"the call of {_type_name(subject)}.{name}"

    return lambda subject: list(missing(subject))


def _upstream(subject: object) -> list[type]:
    """The subject's classes that are not ours."""
    cls = subject if isinstance(subject, type) else type(subject)
    return [base for base in cls.__mro__ if base.__module__.partition(".")[0] in ("trl", "transformers")]


def _names_in(cls: type, *, but: str = "") -> set[str]:
    """Every name that the methods of a class speak of, that of one of them left out."""
    codes = [
        inspect.unwrap(member).__code__
        for name, member in vars(cls).items()
        if name != but and inspect.isfunction(inspect.unwrap(member) if callable(member) else member)
    ]
    return set().union(*map(_words, codes))


def _words(code: CodeType) -> set[str]:
    """The names of attributes and parameters in a function, and in the functions within it."""
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return {*code.co_names, *code.co_varnames}.union(*map(_words, inner))


# --- torch -----------------------------------------------------------------------------------------------------------

SOFTMAX_BACKWARD = Seam(
    "softmax-backward",
    "torch",
    ("torch.ops.aten._softmax_backward_data",),
    "the gradient of the blocks' attention is made with it",
    "the packed forward would not train on a CPU",
    _found("torch:ops.aten._softmax_backward_data"),
)

ONEDNN_LINEAR = Seam(
    "onednn-linear",
    "torch",
    tuple(f"torch.ops.mkldnn.{name}" for name in ("_reorder_linear_weight", "_linear_pointwise")),
    "decoding on a CPU multiplies with weights that are laid out once",
    "sampling in bf16 would stop",
    _found("torch:ops.mkldnn._reorder_linear_weight", "torch:ops.mkldnn._linear_pointwise"),
)

ONEDNN_BF16 = Seam(
    "onednn-bf16",
    "torch",
    ("torch.ops.mkldnn._is_mkldnn_bf16_supported",),
    "it says whether this CPU has such products in bf16",
    "sampling in bf16 would stop",
    _found("torch:ops.mkldnn._is_mkldnn_bf16_supported"),
)

FLEX_ATTENTION = Seam(
    "flex-attention",
    "torch",
    tuple(f"torch.nn.attention.flex_attention.{n}" for n in ("BlockMask", "flex_attention")),
    "a GPU attends to a prefix tree in one piece with it",
    "the packed forward would not run on a GPU",
    _found("torch.nn.attention.flex_attention:BlockMask", "torch.nn.attention.flex_attention:flex_attention"),
)

MODULE_HOOKS = Seam(
    "module-hooks",
    "torch",
    ("torch.nn.Module._forward_hooks", "torch.nn.Module._forward_pre_hooks"),
    "a decoder with hooks keeps its own decode step",
    "hooks would be passed over",
    _attributes("_forward_hooks", "_forward_pre_hooks"),
)


def _dropout_left(model: Any) -> Iterator[str]:
    """Modules that would still drop something in training, after `dropout.no_dropout`."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float) and value > 0:
                yield f"{path or _type_name(model)}.{name}"
        if "dropout" in type(module).__name__.lower() and isinstance(p := getattr(module, "p", 0.0), float) and p > 0:
            yield f"{path}.p"


DROPOUT = Seam(
    "dropout",
    "transformers",
    ("torch.nn.modules.dropout._DropoutNd", "the rates that attention modules keep: attention_dropout, resid_pdrop..."),
    "PPO switches all dropout off by these names",
    "PPO's ratios would be noise",
    _dropout_left,
)

# --- transformers ----------------------------------------------------------------------------------------------------

ATTENTION_FUNCTIONS = Seam(
    "attention-functions",
    "transformers",
    (
        "transformers.integrations.sdpa_attention.sdpa_attention_forward",
        "transformers.masking_utils.sdpa_mask",
        "transformers.PreTrainedConfig._attn_implementation",
    ),
    "the packed forward puts an attention function of its own before transformers' SDPA",
    "rows would be attended to without the tree",
    _found(
        "transformers.integrations.sdpa_attention:sdpa_attention_forward",
        "transformers.masking_utils:sdpa_mask",
        "transformers:PreTrainedConfig._attn_implementation",
    ),
)


def _not_handed_over(tree: Any) -> list[str]:
    return [] if tree.attended else ["the hand-over of keyword arguments from a decoder to its attention"]


TREE_HANDOVER = Seam(
    "tree-handover",
    "transformers",
    ("**kwargs of every decoder, its layers and their attention modules",),
    "the packed forward hands its prefix tree to the attention function through them",
    "packed rows would see one another",
    _not_handed_over,
)


def _decoder_fields(_subject: object) -> Iterator[str]:
    import transformers

    for name, field in (
        ("Gemma3TextConfig", "layer_types"),
        ("MistralConfig", "sliding_window"),
        ("Gemma2Config", "attn_logit_softcapping"),
        ("Gemma3nTextConfig", "num_kv_shared_layers"),
    ):
        if not hasattr(getattr(transformers, name)(), field):
            yield f"{name}.{field}"
    for field in ("_supports_attention_backend", "_is_stateful"):
        if not hasattr(transformers.PreTrainedModel, field):
            yield f"PreTrainedModel.{field}"


DECODER_FIELDS = Seam(
    "decoder-fields",
    "transformers",
    (
        *(f"config.{name}" for name in ("layer_types", "sliding_window", "attn_logit_softcapping")),
        *("config.num_kv_shared_layers", "PreTrainedModel._supports_attention_backend", "PreTrainedModel._is_stateful"),
    ),
    "they say which decoders can be packed, and which keep a state while they decode",
    "sliding windows, soft caps and states would be left out",
    lambda subject: list(_decoder_fields(subject)),
)


def _logit_fields(_subject: object) -> Iterator[str]:
    import transformers

    for name, field in (
        ("CohereConfig", "logit_scale"),
        ("GraniteConfig", "logits_scaling"),
        ("Gemma2Config", "final_logit_softcapping"),
        ("MixtralConfig", "output_router_logits"),
        ("FalconH1Config", "lm_head_multiplier"),
    ):
        if not hasattr(getattr(transformers, name)(), field):
            yield f"{name}.{field}"


LOGIT_FIELDS = Seam(
    "logit-fields",
    "transformers",
    tuple(
        f"config.{name}"
        for name in (
            *("logit_scale", "logits_scaling", "final_logit_softcapping"),
            *("output_router_logits", "lm_head_multiplier"),
        )
    ),
    "log-probabilities are made from hidden states with what the config says about the logits",
    "those of Cohere's, Granite's or Gemma's models would be wrong",
    lambda subject: list(_logit_fields(subject)),
)

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


def _parts_differ(backbone: Any) -> Iterator[str]:
    """What a decoder of the Llama family has more or less than the decode step knows."""
    layer = backbone.layers[0]
    norms = {"q_norm", "k_norm"} if type(backbone).__name__.removeprefix("FSDP") == "Qwen3Model" else set[str]()
    for where, module, expected in (
        ("", backbone, {"embed_tokens", "layers", "norm", "rotary_emb"}),
        (".layers", layer, _LAYER),
        (".layers.self_attn", getattr(layer, "self_attn", None), _ATTENTION | norms),
        (".layers.mlp", getattr(layer, "mlp", None), {"gate_proj", "up_proj", "down_proj", "act_fn"}),
    ):
        found = {name for name, _ in module.named_children()} if module is not None else set[str]()
        yield from (f"{type(backbone).__name__}{where}.{name}" for name in sorted(found ^ expected))
    attention = getattr(layer, "self_attn", None)
    for name in ("scaling", "head_dim", "num_key_value_groups"):
        if not hasattr(attention, name):
            yield f"{type(backbone).__name__}.layers.self_attn.{name}"
    if not hasattr(getattr(backbone, "norm", None), "variance_epsilon"):
        yield f"{type(backbone).__name__}.norm.variance_epsilon"


DECODER_PARTS = Seam(
    "decoder-parts",
    "transformers",
    ("the modules of LlamaModel, MistralModel, Qwen2Model and Qwen3Model, all of them and no other",),
    "a decode step runs them by hand",
    "a part that is new or renamed would be left out of every completion",
    lambda subject: list(_parts_differ(subject)),
)


def _cache_layer(ours: Any) -> list[str]:
    """What a cache layer must have that ours has not (a class that is abstract still)."""
    return [f"CacheLayerMixin.{name}" for name in sorted(getattr(ours, "__abstractmethods__", ()))]


CACHE_LAYER = Seam(
    "cache-layer",
    "transformers",
    ("transformers.cache_utils.CacheLayerMixin",),
    "the rows being decoded keep their keys and values in layers of our own",
    "sampling would stop",
    _cache_layer,
)

CONV1D = Seam(
    "conv1d",
    "transformers",
    ("transformers.pytorch_utils.Conv1D",),
    "LoRA's `all-linear` counts GPT-2's layers among the linear ones",
    "GPT-2 would get no adapter",
    _found("transformers.pytorch_utils:Conv1D"),
)


FAKE_TENSORS = Seam(
    "fake-tensors",
    "torch",
    (
        "torch._subclasses.fake_tensor.FakeTensorMode",
        "torch.utils._python_dispatch.TorchDispatchMode",
        "torch.nn.Module._parameters",
        "torch.nn.Module._buffers",
    ),
    "`plan` runs a training step on tensors without content, and counts what it would hold",
    "a plan would count nothing",
    lambda _subject: (
        _found("torch._subclasses.fake_tensor:FakeTensorMode", "torch.utils._python_dispatch:TorchDispatchMode")(None)
        + _module_tables()
    ),
)


def _module_tables() -> list[str]:
    import torch

    held = vars(torch.nn.Linear(1, 1, device="meta"))
    return [f"torch.nn.Module.{name}" for name in ("_parameters", "_buffers") if not isinstance(held.get(name), dict)]


def _base_name(model: Any) -> list[str]:
    return [] if hasattr(model.config, "_name_or_path") and hasattr(model, "name_or_path") else ["_name_or_path"]


BASE_NAME = Seam(
    "base-name",
    "transformers",
    ("PreTrainedConfig._name_or_path", "PreTrainedModel.name_or_path"),
    "a model says by them which base it is; PEFT writes that beside an adapter",
    "a saved adapter would name a folder of this machine",
    _base_name,
)

TOKENIZER_CORE = Seam(
    "tokenizer-core",
    "transformers",
    ("PreTrainedTokenizerFast.backend_tokenizer", "PreTrainedTokenizerBase.added_tokens_decoder"),
    "a tokenizer's hash and its special tokens are read from them",
    "every lineage would name another tokenizer",
    _found(
        "transformers:PreTrainedTokenizerFast.backend_tokenizer",
        "transformers:PreTrainedTokenizerFast.added_tokens_decoder",
    ),
)


def _quantizer_mark(_subject: object) -> list[str]:
    """What `save_pretrained` looks at."""
    from transformers import PreTrainedModel

    code = inspect.unwrap(PreTrainedModel.save_pretrained).__code__
    return [] if "hf_quantizer" in {*_words(code), *code.co_consts} else ["PreTrainedModel.hf_quantizer"]


QUANTIZER_MARKS = Seam(
    "quantizer-marks",
    "transformers",
    ("PreTrainedModel.hf_quantizer", "PreTrainedModel.is_quantized"),
    "they are taken off a GGUF model whose weights are plain again, and off one whose layers are ours",
    "save_pretrained would refuse the converted model",
    _quantizer_mark,
)


def _packed_weights(layer: Any) -> list[str]:
    """A layer's packed weights with what unpacks them, and the operations that do."""
    from importlib.util import find_spec

    gone: list[str] = []
    if find_spec("bitsandbytes") is None:
        return ["bitsandbytes"]
    if hasattr(layer.weight, "quant_state"):
        state: Any = layer.weight.quant_state
        fields = ("dtype", "blocksize", "quant_type", "absmax", "state2", "offset")
        gone += [f"quant_state.{name}" for name in fields if not hasattr(state, name)]
        if getattr(state, "state2", None) is not None:
            gone += [f"state2.{name}" for name in ("blocksize", "code", "absmax") if not hasattr(state.state2, name)]
        gone += _found("torch:ops.bitsandbytes.dequantize_4bit", "torch:ops.bitsandbytes.dequantize_blockwise")(None)
    elif not hasattr(layer.weight, "SCB") or not hasattr(layer.state, "SCB"):
        gone.append("Int8Params.SCB")
    return gone


PACKED_WEIGHTS = Seam(
    "packed-weights",
    "bitsandbytes",
    ("Params4bit.quant_state", "Int8Params.SCB", "torch.ops.bitsandbytes.dequantize_4bit"),
    "a quantised base's weights are unpacked by them",
    "they would be unpacked to other weights",
    _packed_weights,
)

TRAINER_CHECKPOINT = Seam(
    "trainer-checkpoint",
    "transformers",
    tuple(f"Trainer.{name}" for name in ("_save", "_save_checkpoint", "_load_from_checkpoint")),
    "PPO saves and loads its adapters by overriding them",
    "a checkpoint would hold the base and lack the value",
    _overridden("_save", "_save_checkpoint", "_load_from_checkpoint"),
)

_RESUMING = ("_get_output_dir", "_load_callback_state", "_load_optimizer_and_scheduler", "_load_rng_state")


def _spoken(*names: str) -> Callable[[object], list[str]]:
    """The library's own code of the subject's class speaks of these attributes, which it sets as it goes."""

    def missing(subject: object) -> list[str]:
        spoken = set[str]().union(*map(_names_in, _upstream(subject)))
        return [f"Trainer.{name}" for name in names if name not in spoken]

    return missing


def _resuming(subject: object) -> list[str]:
    return [*_attributes(*_RESUMING)(subject), *_spoken("_created_lr_scheduler")(subject)]


TRAINER_RESUME = Seam(
    "trainer-resume",
    "transformers",
    tuple(f"Trainer.{name}" for name in ("_created_lr_scheduler", *_RESUMING)),
    "PPO continues from a checkpoint with them",
    "a resumed run would not be the run that was interrupted",
    _resuming,
)

EPOCHS = Seam(
    "epochs",
    "transformers",
    ("Trainer._run_epoch", "Trainer._maybe_log_save_evaluate", "Trainer._finalize_training", "Trainer._tr_loss", "..."),
    "a stage that was interrupted continues within them, with the sums that it had",
    "a resumed run would not be the run that was interrupted",
    lambda subject: [
        *_overridden("_run_epoch", "_maybe_log_save_evaluate", "_finalize_training")(subject),
        *_spoken("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step")(subject),
    ],
)

BATCHES = Seam(
    "batches",
    "transformers",
    ("Trainer._get_dataloader", "Trainer._get_train_sampler", "Trainer.get_batch_samples"),
    "every batch says of how many rows it is, and what is left of an epoch is divided among the processes",
    "rows of the epoch's beginning would count twice, and means of unlike batches alike",
    _overridden("_get_dataloader", "_get_train_sampler", "get_batch_samples"),
)


def _batch_shards(loader: object) -> list[str]:
    shards = getattr(loader, "batch_sampler", None)
    return _attributes("batch_sampler", "batch_size", "even_batches", "num_processes")(shards)


BATCH_SHARDS = Seam(
    "batch-shards",
    "accelerate",
    ("BatchSamplerShard.batch_sampler", "BatchSamplerShard.batch_size", "BatchSamplerShard.even_batches", "..."),
    "each process takes its turn of batches that are divided already",
    "the last batch of an epoch would be made full with rows of its beginning",
    _batch_shards,
)

KL_LOGPS = Seam(
    "kl-logps",
    "trl",
    ("KTOTrainer._compute_kl_logps", "KTOTrainer.calculate_KL", "KTOTrainer.precompute_ref_logps"),
    "z0 is made of a whole step's rows before its first loss, and given to TRL's loss through them",
    "z0 would depend on how a step is split",
    lambda subject: [
        *_overridden("_compute_kl_logps")(subject),
        *_spoken("calculate_KL", "precompute_ref_logps")(subject),
    ],
)


def _zero3(_: object) -> list[str]:
    from transformers.integrations import deepspeed

    names = ("_hf_deepspeed_config_weak_ref", "set_hf_deepspeed_config", "unset_hf_deepspeed_config")
    return [f"deepspeed.{name}" for name in names if not hasattr(deepspeed, name)]


ZERO3 = Seam(
    "zero3",
    "transformers",
    ("integrations.deepspeed._hf_deepspeed_config_weak_ref", "...set_hf_deepspeed_config", "..."),
    "under ZeRO-3 a base is loaded whole and divided by the engine, after it was tried",
    "nothing of it would be there to try",
    _zero3,
)

_DIVIDED = ("is_distributed_loading_by_transformers", "_sync_replicated_trainable_parameters")
SHARDED_BASE = Seam(
    "sharded-base",
    "transformers",
    tuple(f"Trainer.{name}" for name in _DIVIDED),
    "a trainer whose base is divided among processes averages its adapters' gradients by them",
    "each process would train an adapter of its own",
    lambda subject: [*_attributes(*_DIVIDED)(subject), *_spoken(*_DIVIDED)(subject)],
)

CALLBACK_STATE = Seam(
    "callback-state",
    "transformers",
    ("TrainerState.stateful_callbacks", "EarlyStoppingCallback.state", "TrainerControl.state"),
    "early stopping goes on with the patience that was left",
    "a resumed stage would train longer than one that was not interrupted",
    _found(
        "transformers.trainer_callback:EarlyStoppingCallback.state",
        "transformers.trainer_callback:TrainerControl.state",
        "transformers.trainer_callback:TrainerState.__dataclass_fields__",
    ),
)

# --- trl -------------------------------------------------------------------------------------------------------------

PREPARE_DATASET = Seam(
    "prepare-dataset",
    "trl",
    ("_prepare_dataset of SFTTrainer, RewardTrainer, DPOTrainer and KTOTrainer",),
    "rows that are encoded already pass TRL's preparation untouched by overriding it",
    "TRL would tokenise and cut them once more",
    _overridden("_prepare_dataset"),
)

GRAD_NORM = Seam(
    "grad-norm",
    "transformers",
    ("_get_grad_norm of Trainer",),
    "gradients that are not finite end a stage by overriding it",
    "NaN weights would be trained on and saved",
    _overridden("_get_grad_norm"),
)

COMPUTE_LOSS = Seam(
    "compute-loss",
    "trl",
    ("_compute_loss of DPOTrainer and KTOTrainer",),
    "the first step is checked, by overriding it, for a reference that is what the policy started from",
    "a wrong reference would train unnoticed",
    _overridden("_compute_loss"),
)


def _reference_logps(subject: object) -> Iterator[str]:
    yield from _overridden("_precompute_ref_logps")(subject)
    owner = next((base for base in _upstream(subject) if "_precompute_ref_logps" in vars(base)), None)
    if owner is not None:
        reader = inspect.unwrap(vars(owner)["_precompute_ref_logps"]).__code__
        if "_precompute_model_hash" not in _words(reader):
            yield f"{owner.__name__}._precompute_model_hash"


REFERENCE_LOGPS = Seam(
    "reference-logps",
    "trl",
    ("_precompute_ref_logps and _precompute_model_hash of DPOTrainer and KTOTrainer",),
    "the cache of the reference's log-probabilities is named after all that they depend on",
    "a cache of another adapter, scaling or precision could be taken over",
    lambda subject: list(_reference_logps(subject)),
)


def _collator_fields(subject: Any) -> Iterator[str]:
    """`max_length` of every collator, `truncation_mode` of DPO's."""
    collator = subject.data_collator
    paired = "Unpaired" not in type(collator).__name__
    wanted = ("max_length", "truncation_mode") if paired else ("max_length",)
    yield from (f"{type(collator).__name__}.{name}" for name in wanted if not hasattr(collator, name))


COLLATOR = Seam(
    "collator",
    "trl",
    ("DataCollatorForPreference.max_length and .truncation_mode", "KTO's collator's max_length"),
    "where a collator cuts rows is part of what cached log-probabilities depend on",
    "a cache of rows that were cut elsewhere could be taken over",
    lambda subject: list(_collator_fields(subject)),
)


def _trl_config(args: Any) -> list[str]:
    """DPO's settings that decide which log-probabilities are right."""
    wanted = ("ld_alpha", "use_weighting") if "DPO" in type(args).__name__ else ()
    return [f"{type(args).__name__}.{name}" for name in wanted if not hasattr(args, name)]


TRL_SETTINGS = Seam(
    "trl-settings",
    "trl",
    ("DPOConfig.ld_alpha", "DPOConfig.use_weighting"),
    "they say which outputs the LM head must have, and what cached log-probabilities depend on",
    "a cache of another loss could be taken over",
    _trl_config,
)


def _metrics(trainer: Any) -> list[str]:
    found = getattr(trainer, "_metrics", None)
    return [] if isinstance(found, dict) and "train" in found else [f"{_type_name(trainer)}._metrics['train']"]


METRICS = Seam(
    "metrics",
    "trl",
    ("_metrics['train'] with rewards/chosen, rewards/rejected, logps/chosen, logps/rejected",),
    "the check of the first step reads the batch's log-ratios there",
    "a wrong reference would train unnoticed",
    _metrics,
)

TRAINED_TOKENS = Seam(
    "trained-tokens",
    "trl",
    ("_total_train_tokens of every trainer",),
    "tokens_per_second is counted with it",
    "the metric would be missing",
    _attributes("_total_train_tokens"),
)


def _fused_head(_subject: object) -> Iterator[str]:
    with importing(FUSED_HEAD):
        from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head
    known = {field.name for field in fields(FusedCausalLMOutput)}
    filled = ("loss", "log_probs", "entropy", "mean_logits", "is_top1", "label_mask")
    yield from (f"FusedCausalLMOutput.{name}" for name in filled if name not in known)
    if "fused_lm_head" not in _words(add_fused_lm_head.__code__):
        yield "the argument fused_lm_head"


FUSED_HEAD = Seam(
    "fused-head",
    "trl",
    ("trl.trainer.utils.FusedCausalLMOutput", "model(..., labels=labels, fused_lm_head=True)"),
    "our LM head takes the place of the one that TRL puts on a model",
    "training would run several times slower",
    lambda subject: list(_fused_head(subject)),
)

OPTIMIZERS = Seam(
    "optimizers",
    "transformers",
    tuple(
        f"transformers.trainer_optimizer.{name}"
        for name in ("_OPTIMIZER_HANDLERS", "OptimizerContext", "_parse_optim_args")
    ),
    "an optimiser's settings are tried before anything trains, without all that a trainer imports",
    "a wrong one would be found when its stage begins",
    _found("transformers.trainer_optimizer:_OPTIMIZER_HANDLERS", "transformers.trainer_optimizer:OptimizerContext"),
)

# --- peft ------------------------------------------------------------------------------------------------------------


def _adapter_switch(layer: Any) -> Iterator[str]:
    """Try it: what is written into the two fields is what the layer's forward reads."""
    held: dict[str, Any] = vars(layer)
    before = {name: held[name] for name in ("_active_adapter", "_disable_adapters") if name in held}
    try:
        held["_active_adapter"], held["_disable_adapters"] = ["probe"], True
        if getattr(layer, "active_adapters", None) != ["probe"]:
            yield f"{_type_name(layer)}._active_adapter"
        if getattr(layer, "disable_adapters", None) is not True:
            yield f"{_type_name(layer)}._disable_adapters"
    finally:
        for name in ("_active_adapter", "_disable_adapters"):
            held.pop(name, None)
        held.update(before)


ADAPTER_SWITCH = Seam(
    "adapter-switch",
    "peft",
    ("BaseTunerLayer._active_adapter", "BaseTunerLayer._disable_adapters"),
    "`AdapterSet.using` chooses by them which adapter a forward runs with",
    "policy and reference would be the same model",
    lambda layer: list(_adapter_switch(layer)),
)


def _lora_layer(layer: Any) -> Iterator[str]:
    names = ("lora_A", "lora_B", "lora_dropout", "lora_variant", "scaling", "merged", "adapter_layer_names")
    yield from _attributes(*names)(layer)
    for name in ("lora_A", "lora_B"):
        if name not in getattr(layer, "adapter_layer_names", ()):
            yield f"{_type_name(layer)}.adapter_layer_names without {name}"


LORA_LAYER = Seam(
    "lora-layer",
    "peft",
    (
        "peft.tuners.lora.layer.Linear",
        "peft.tuners.tuners_utils.BaseTunerLayer",
        "LoraLayer.lora_A, lora_B, lora_dropout, lora_variant, scaling, merged, adapter_layer_names",
    ),
    "adapters are saved, hashed, merged and run through them",
    "an adapter would be saved or run without a part of it",
    lambda layer: list(_lora_layer(layer)),
)

_TOKEN_ROWS = (
    "peft.tuners.trainable_tokens.layer:TrainableTokensLayer.get_merged_weights",
    "peft.tuners.trainable_tokens.layer:TrainableTokensLayer.forward",
    "peft.utils.other:TrainableTokensWrapper",
)


def _token_rows(layer: Any) -> Iterator[str]:
    yield from _found(*_TOKEN_ROWS)(layer)
    if layer is not None:
        yield from _attributes("trainable_tokens_delta", "token_indices", "tied_adapter", "base_layer", "merged")(layer)
        if "trainable_tokens_delta" not in layer.adapter_layer_names:
            yield f"{_type_name(layer)}.adapter_layer_names without trainable_tokens_delta"


TOKEN_ROWS = Seam(
    "token-rows",
    "peft",
    (*_TOKEN_ROWS, "TrainableTokensLayer.trainable_tokens_delta, token_indices, tied_adapter, base_layer, merged"),
    "rows of the embedding and of the head that train are run, saved and copied through them",
    "an adapter would speak with the base's rows in the place of its own",
    lambda layer: list(_token_rows(layer)),
)

# --- accelerate ------------------------------------------------------------------------------------------------------


def _hook_mark(_subject: object) -> list[str]:
    """Try it: accelerate marks a module that it hooks."""
    import torch
    from accelerate.hooks import ModelHook, add_hook_to_module

    return [] if hasattr(add_hook_to_module(torch.nn.Identity(), ModelHook()), "_hf_hook") else ["_hf_hook"]


HOOK_MARK = Seam(
    "hook-mark",
    "accelerate",
    ("_hf_hook, set by accelerate.hooks.add_hook_to_module",),
    "a decoder that accelerate has spread over devices keeps its own decode step",
    "weights that are not at hand would be multiplied with",
    _hook_mark,
)

_LAUNCHER = (
    "accelerate.commands.launch:launch_command",
    "accelerate.commands.launch:launch_command_parser",
    "accelerate.commands.config.config_args:load_config_from_file",
    "torch.distributed.elastic.multiprocessing:SignalException",
    "torch.distributed.elastic.multiprocessing.errors:ChildFailedError",
)

LAUNCHER = Seam(
    "launcher",
    "accelerate",
    _LAUNCHER,
    "`--launch` runs accelerate's own launcher on the config, and reads the config before",
    "a launched stage would end in a traceback",
    _found(*_LAUNCHER),
)


@functools.cache
def declared() -> tuple[Seam, ...]:
    """Every seam there is."""
    return tuple(value for value in globals().values() if isinstance(value, Seam))
