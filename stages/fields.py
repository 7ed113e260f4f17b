"""What becomes of each field of a stage's config: it works, belongs elsewhere, or means nothing here.

`train:` of a recipe takes the fields of TRL's and Transformers' configs by their own names, and what is accepted there
has its effect. So every field of every config stands in one of the tables below, with what its values mean; a field
that a new version of a library brings fails the tests until it stands here too. `FIELDS.md` beside this file is written
from them (`python -m preftune.stages.fields`). Nothing here imports torch.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..values import is_finite
from .serving.settings import ROLLOUT_GROUP

State = Literal["works", "elsewhere", "meaningless"]


class Meaning(NamedTuple):
    """What values of a field mean: in words what is expected, and whether a value is that. `whole`: 8.0 is 8."""

    words: str
    fits: Callable[[Any], bool]
    number: bool = True
    whole: bool = False

    def read(self, value: object) -> object:
        """The value, a number written as text as the number that it is; as it came where it is none."""
        if self.number and isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                return value
        return int(value) if self.whole and isinstance(value, float) and value.is_integer() else value


def _whole(value: object) -> bool:
    return is_finite(value) and float(value).is_integer()


def _steps(value: object) -> bool:
    return is_finite(value) and (value >= 1 if _whole(value) else 0 < value < 1)


RATE = Meaning("a number of 0 or more", lambda value: is_finite(value) and value >= 0)
ABOVE_0 = Meaning("a number above 0", lambda value: is_finite(value) and value > 0)
BELOW_1 = Meaning("a number from 0 to below 1", lambda value: is_finite(value) and 0 <= value < 1)
SHARE = Meaning("a number from 0 to 1", lambda value: is_finite(value) and 0 <= value <= 1)
COUNT = Meaning("a whole number of 1 or more", lambda value: _whole(value) and value >= 1, whole=True)
COUNT_OR_0 = Meaning("a whole number of 0 or more", lambda value: _whole(value) and value >= 0, whole=True)
LIMIT = Meaning(
    "a whole number of 1 or more, or -1", lambda value: _whole(value) and (value >= 1 or value == -1), whole=True
)
STEPS = Meaning("a whole number of steps, or a fraction of all steps such as 0.1", _steps)
WARMUP = Meaning(
    "0, a whole number of steps, or a fraction of all steps such as 0.1", lambda value: value == 0 or _steps(value)
)
SEED = Meaning("a whole number from 0 to 4294967295", lambda value: _whole(value) and 0 <= value < 2**32, whole=True)
FLAG = Meaning("true or false", lambda value: isinstance(value, bool), number=False)
TEXT = Meaning("text", lambda value: isinstance(value, str), number=False)
TEXTS = Meaning(
    "text, or a list of texts",
    lambda value: isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value)),
    number=False,
)
SETTINGS = Meaning("a mapping", lambda value: isinstance(value, dict), number=False)
TEXT_OR_SETTINGS = Meaning("text or a mapping", lambda value: isinstance(value, str | dict), number=False)
MULTIPLE = Meaning("auto, or a whole number of 1 or more", lambda value: value == "auto" or COUNT.fits(value))
PACKING = Meaning("bfd or bfd_split", lambda value: value in ("bfd", "bfd_split"), number=False)
OPEN = Meaning("what the library takes", lambda value: True, number=False)
"""The library says by itself whether a value is one."""


class Field(NamedTuple):
    """What becomes of a field.

    Attributes:
        says: of a field that is refused, why and what to do; of one that works, what there is to know.
        meaning: of its values, where it works.
        optional: whether `null` is a value.
    """

    state: State
    says: str = ""
    meaning: Meaning = OPEN
    optional: bool = False


def _works(meaning: Meaning, says: str = "", *, optional: bool = False) -> Field:
    return Field("works", says, meaning, optional)


def _elsewhere(remedy: str) -> Field:
    return Field("elsewhere", remedy)


def _meaningless(why: str) -> Field:
    return Field("meaningless", why)


def _each(names: str, field: Field) -> dict[str, Field]:
    return dict.fromkeys(names.split(), field)


PARAMETER = Field("works", "stands beside train")
"""A parameter of the method, checked by its own type (`StageKind.parameters`)."""

_NO_HUB = _elsewhere("leave it out, and upload the finished stage: hf upload NAME RUN/<stage>")
_LAUNCH = _elsewhere("give it in an accelerate config: preftune run ... --launch CONFIG")
_SCRIPT = _meaningless("a switch of training scripts: leave it out")
_METRICS = _meaningless("belongs to compute_metrics, which no stage has: leave it out")
_FULL_WEIGHTS = _meaningless("GaLore and APOLLO project full weights, and here an adapter trains: leave it out")
_NO_SYNC = _meaningless("the reference is the frozen parent adapter: leave it out")
_ENCODED = _elsewhere("set it in the data entry")
_OWN_ROWS = "rows are encoded before the trainer sees them: leave it out"

TRAINING: Mapping[str, Field] = {
    # how long, and how fast
    **_each("num_train_epochs", _works(ABOVE_0)),
    **_each("max_steps", _works(LIMIT, "instead of num_train_epochs")),
    **_each("per_device_train_batch_size gradient_accumulation_steps per_device_eval_batch_size", _works(COUNT)),
    **_each("learning_rate weight_decay adam_epsilon max_grad_norm", _works(RATE)),
    **_each("adam_beta1 adam_beta2", _works(BELOW_1)),
    **_each("lr_scheduler_type optim", _works(TEXT)),
    "optim_args": _works(TEXT, optional=True),
    "lr_scheduler_kwargs": _works(TEXT_OR_SETTINGS, optional=True),
    "warmup_steps": _works(WARMUP),
    "optim_target_modules": _FULL_WEIGHTS,
    "label_smoothing_factor": _meaningless(
        "for losses over classes; preference losses have label_smoothing: leave it out"
    ),
    "auto_find_batch_size": _meaningless(
        "a batch that changes by itself changes the result: set per_device_train_batch_size"
    ),
    "neftune_noise_alpha": _works(ABOVE_0, "with model: {packed: false}", optional=True),
    # precision and memory
    "bf16": _works(FLAG, "autocast; the base's own dtype is model.dtype"),
    "fp16": _works(FLAG, "autocast, on a GPU"),
    "tf32": _works(FLAG, optional=True),
    **_each(
        "bf16_full_eval fp16_full_eval", _meaningless("it would round the adapter before it is saved: leave it out")
    ),
    **_each("activation_checkpointing gradient_checkpointing", _works(FLAG, optional=True)),
    **_each("activation_checkpointing_kwargs gradient_checkpointing_kwargs", _works(TEXT_OR_SETTINGS, optional=True)),
    **_each(
        "torch_compile torch_compile_backend torch_compile_mode",
        _meaningless("the forwards of this package are not compiled: leave it out"),
    ),
    "use_liger_kernel": _works(FLAG, "needs liger-kernel"),
    "liger_kernel_config": _works(SETTINGS, optional=True),
    "use_cache": _meaningless("training needs no cache: leave it out"),
    "torch_empty_cache_steps": _works(COUNT, optional=True),
    "average_tokens_across_devices": _works(FLAG),
    # logs
    **_each("logging_strategy log_level log_level_replica project", _works(TEXT)),
    "logging_steps": _works(STEPS),
    **_each("logging_first_step log_on_each_node", _works(FLAG)),
    "disable_tqdm": _works(FLAG, optional=True),
    "logging_nan_inf_filter": _meaningless("a loss that is not finite stops the stage: leave it out"),
    "include_num_input_tokens_seen": _meaningless("num_tokens is in log.jsonl: leave it out"),
    "report_to": _works(
        TEXTS,
        "instead of the recipe's trackers; needs the tracker's package; event files lie in RUN/<stage>/runs",
        optional=True,
    ),
    **_each("run_name trackio_space_id trackio_bucket_id", _works(TEXT, optional=True)),
    "trackio_static_space_id": _works(OPEN, optional=True),
    # evaluation during training
    "eval_strategy": _works(TEXT, "held-out rows of the data entry"),
    "eval_steps": _works(STEPS, optional=True),
    "eval_delay": _works(RATE),
    "eval_on_start": _works(FLAG),
    "eval_accumulation_steps": _METRICS,
    **_each("prediction_loss_only eval_do_concat_batches eval_use_gather_object", _METRICS),
    **_each("include_for_metrics batch_eval_metrics label_names", _METRICS),
    "load_best_model_at_end": _works(FLAG),
    "metric_for_best_model": _works(TEXT, optional=True),
    "greater_is_better": _works(FLAG, optional=True),
    # checkpoints
    "save_strategy": _works(TEXT, "asked-for checkpoints stay in RUN/<stage>/checkpoints"),
    "save_steps": _works(STEPS, "as save_strategy"),
    "save_total_limit": _works(COUNT, "as save_strategy", optional=True),
    "save_only_model": _meaningless("a checkpoint must be able to continue the run: leave it out"),
    "save_on_each_node": _meaningless("the run folder must be one that all nodes see: leave it out"),
    "enable_jit_checkpoint": _elsewhere("set save_strategy: steps, and save_steps"),
    "resume_from_checkpoint": _elsewhere("leave it out: the same command again continues from the last checkpoint"),
    "ignore_data_skip": _meaningless("a continued run sees the rows that it has not seen: leave it out"),
    "restore_callback_states_from_checkpoint": _works(FLAG),
    **_each("push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision", _NO_HUB),
    # seeds, devices, processes
    "seed": _elsewhere("set seed beside train"),
    "data_seed": _works(SEED, optional=True),
    "full_determinism": _works(FLAG),
    "use_cpu": _works(FLAG),
    "accelerator_config": _works(TEXT_OR_SETTINGS, optional=True),
    **_each("fsdp fsdp_config deepspeed", _LAUNCH),
    "parallelism_config": _meaningless("divide the frozen base instead: preftune run ... --launch fsdp2"),
    "local_rank": _meaningless("the launcher sets it: leave it out"),
    "ddp_backend": _LAUNCH,
    "ddp_timeout": _works(COUNT),
    **_each("ddp_find_unused_parameters ddp_broadcast_buffers ddp_static_graph", _works(FLAG, optional=True)),
    "ddp_bucket_cap_mb": _works(COUNT, optional=True),
    # rows
    **_each(
        "dataloader_drop_last dataloader_pin_memory dataloader_persistent_workers dataloader_in_order", _works(FLAG)
    ),
    "dataloader_num_workers": _works(COUNT_OR_0),
    "dataloader_prefetch_factor": _works(COUNT, optional=True),
    "dataloader_multiprocessing_context": _works(TEXT, optional=True),
    "train_sampling_strategy": _works(TEXT),
    "length_column_name": _meaningless("encoded rows have no such column: leave it out"),
    "remove_unused_columns": _meaningless("encoded rows hold what trains and nothing else: leave it out"),
    # the rest
    "output_dir": _elsewhere("use --output-dir"),
    "debug": _meaningless("a loss that is not finite stops the stage: leave it out"),
    "skip_memory_metrics": _meaningless("peak_memory_bytes is in metrics.json: leave it out"),
    **_each("do_train do_eval do_predict", _SCRIPT),
}
"""`transformers.TrainingArguments`."""

_NO_PAD = _meaningless("the tokenizer gets a pad token that is not its EOS: leave it out")
_TEMPLATE = _elsewhere("set model.chat_template")
_EXPERTS = _works(RATE, "mixtures of experts", optional=True)

TRL: Mapping[str, Field] = {
    "model_init_kwargs": _elsewhere("set it under model"),
    "trust_remote_code": _meaningless("code that comes with a model is never run: leave it out"),
    "max_length": _elsewhere("set max_length of the data entry"),
    "dataset_num_proc": _meaningless(_OWN_ROWS),
    "pad_to_multiple_of": _works(MULTIPLE, optional=True),
    "activation_offloading": _works(FLAG, "needs a GPU"),
}
"""What TRL's four configs share."""

_REFERENCE: Mapping[str, Field] = {
    "disable_dropout": _works(FLAG),
    "precompute_ref_log_probs": _works(FLAG),
    "precompute_ref_batch_size": _works(COUNT, optional=True),
    **_each("sync_ref_model ref_model_mixup_alpha ref_model_sync_steps", _NO_SYNC),
}
_OF_GROUPS = "num_generations num_iterations beta epsilon epsilon_high mask_truncated_completions"
_WEIGHTS = _elsewhere("write weight in each entry of reward")
_STAGE_OWN = _meaningless("the stage writes it into its own folder: leave it out")


def _on_policy(method: str, epochs: str | None, held_out: str = "score, KL and length") -> dict[str, Field]:
    """What the configs of on-policy methods share.

    Args:
        epochs: the parameter that counts passes over a rollout; None: there is one.
        held_out: what is measured on held-out prompts.
    """
    whole = "num_mini_batches" if epochs is None else f"{epochs} x num_mini_batches"
    loader = _meaningless(f"{method} reads no rows through a data loader: leave it out")
    best = _meaningless(f"{method} ends with its last policy; keep_every keeps others on the way: leave it out")
    return {
        **TRAINING,
        "gradient_accumulation_steps": _elsewhere(
            "set num_mini_batches: one optimiser step is one minibatch, in forwards of per_device_train_batch_size"
        ),
        "max_steps": _works(LIMIT, f"optimiser steps, whole iterations of {whole}"),
        "average_tokens_across_devices": _meaningless("a minibatch's loss is over all processes already: leave it out"),
        "neftune_noise_alpha": _meaningless("noise would part the policy from what it sampled: leave it out"),
        "eval_strategy": _works(TEXT, f"held-out prompts of the data entry: {held_out} at an iteration's end"),
        "per_device_eval_batch_size": _meaningless("forwards are as large as memory allows: leave it out"),
        **_each("load_best_model_at_end metric_for_best_model greater_is_better", best),
        **_each("dataloader_drop_last dataloader_pin_memory dataloader_persistent_workers", loader),
        **_each("dataloader_in_order dataloader_num_workers dataloader_prefetch_factor", loader),
        **_each("dataloader_multiprocessing_context train_sampling_strategy accelerator_config", loader),
        "data_seed": _meaningless("prompts are drawn by seed beside train: leave it out"),
        "torch_empty_cache_steps": _meaningless("memory is freed after each rollout: leave it out"),
        **_each(
            "ddp_find_unused_parameters ddp_broadcast_buffers ddp_static_graph ddp_bucket_cap_mb",
            _meaningless("processes add up their gradients without DistributedDataParallel: leave it out"),
        ),
        **_each("samples_file policies_dir rollout_place", _STAGE_OWN),
        **_each("rollout_batch_size num_mini_batches total_episodes max_new_tokens temperature", PARAMETER),
        **_each("top_k top_p rollout_micro_batch_size mismatch_tolerance target_approx_kl max_ratio", PARAMETER),
        **_each("log_samples_every num_log_samples keep_every", PARAMETER),
        **_each(" ".join(ROLLOUT_GROUP.values()), PARAMETER),
    }


def _rewarded(method: str, epochs: str) -> dict[str, Field]:
    """The same with what scores need."""
    return {
        **_on_policy(method, epochs),
        **_each("missing_eos_penalty missing_eos_score normalize_rewards reward_scale reward_clip", PARAMETER),
        **_each("reward_combination ensemble_penalty", PARAMETER),
    }


FIELDS: Mapping[str, Mapping[str, Field]] = {
    "TrainingArguments": TRAINING,
    "SFTConfig": {
        **TRAINING,
        **TRL,
        **_each("chat_template_path eos_token", _TEMPLATE),
        "pad_token": _NO_PAD,
        "truncation_mode": _elsewhere("set overflow of the data entry"),
        "router_aux_loss_coef": _EXPERTS,
        "loss_type": PARAMETER,
        "label_smoothing_factor": _works(BELOW_1, "with loss_type: nll"),
        "dataset_text_field": _elsewhere("set columns of the data entry"),
        "dataset_kwargs": _ENCODED,
        **_each("completion_only_loss assistant_only_loss", _meaningless("only assistant tokens train: leave it out")),
        "shuffle_dataset": _meaningless("rows are shuffled in each epoch (train_sampling_strategy): leave it out"),
        "packing": _works(FLAG, "a forward leaves out padding already; this puts several rows into one"),
        "packing_strategy": _works(PACKING, "with packing"),
        "eval_packing": _works(FLAG, optional=True),
        "padding_free": _meaningless("a forward leaves out padding already: leave it out"),
    },
    "RewardConfig": {
        **TRAINING,
        **TRL,
        **_each("chat_template_path eos_token", _TEMPLATE),
        "pad_token": _NO_PAD,
        "disable_dropout": _works(FLAG),
        "center_rewards_coefficient": PARAMETER,
    },
    "DPOConfig": {
        **TRAINING,
        **TRL,
        **_REFERENCE,
        "pad_token": _NO_PAD,
        "truncation_mode": _elsewhere("set overflow of the data entry"),
        "router_aux_loss_coef": _EXPERTS,
        "padding_free": _meaningless("a forward leaves out padding already: leave it out"),
        **_each("beta loss_type loss_weights label_smoothing ld_alpha f_divergence_type", PARAMETER),
        **_each("f_alpha_divergence_coef use_weighting discopop_tau", PARAMETER),
    },
    "KTOConfig": {
        **TRAINING,
        **TRL,
        **_REFERENCE,
        "router_aux_loss_coef": _EXPERTS,
        "data_seed": _meaningless("rows are shuffled once, by seed beside train: leave it out"),
        **_each("beta loss_type desirable_weight undesirable_weight", PARAMETER),
    },
    "PPOConfig": {
        **_rewarded("PPO", "num_ppo_epochs"),
        **_each("num_ppo_epochs kl_coef kl_in kl_estimator kl_target kl_horizon", PARAMETER),
        **_each("gamma lam cliprange cliprange_value vf_coef entropy_coef whiten_advantages", PARAMETER),
        **_each("whiten_rewards value value_learning_rate", PARAMETER),
    },
    "GRPOConfig": {
        **_rewarded("GRPO", "num_iterations"),
        **_each(_OF_GROUPS, PARAMETER),
        **_each("loss_type scale_rewards importance_sampling_level delta top_entropy_quantile", PARAMETER),
        **_each("multi_objective_aggregation use_bias_correction_kl off_policy_mask_threshold", PARAMETER),
        "reward_weights": _WEIGHTS,
    },
    "RLOOConfig": {
        **_rewarded("RLOO", "num_iterations"),
        **_each(f"{_OF_GROUPS} normalize_advantages", PARAMETER),
        "reward_weights": _WEIGHTS,
    },
    "DistillationConfig": {
        **_on_policy("distillation", None, "divergence, entropy and length"),
        **_each("beta lmbda", PARAMETER),
    },
}
"""The name of a config's class -> its fields."""


def fields_of(config_class: type) -> dict[str, Field]:
    """The table of a config: that of its nearest known ancestor; what a class of the user's own adds works."""
    table = next((FIELDS[each.__name__] for each in config_class.__mro__ if each.__name__ in FIELDS), {})
    own = {each.name for each in dataclasses.fields(config_class) if each.init} - TRAINING.keys()
    if config_class.__module__.partition(".")[0] not in ("trl", "preftune", "transformers"):
        table = {**dict.fromkeys(own, Field("works")), **table}
    return dict(table)


def table() -> str:
    """`FIELDS.md`: what becomes of every field, in one table for each config."""
    lines = [
        "# What becomes of each field of a stage's config",
        "",
        "`train:` of a recipe takes the fields of TRL's and Transformers' configs by their own names. What is accepted",
        "there has its effect; the rest is refused with what to do instead.",
        "Written by `python -m preftune.stages.fields`.",
    ]
    for name, fields in FIELDS.items():
        shared = TRAINING if name != "TrainingArguments" else {}
        title = f"## {name}" + (", where it differs from TrainingArguments" if shared else "")
        lines += ["", title, "", "| field | | values, or what to do instead |", "|---|---|---|"]
        for key, field in sorted(fields.items()):
            if shared.get(key) != field:
                values = field.meaning.words if field.state == "works" and field is not PARAMETER else ""
                lines.append(f"| `{key}` | {field.state} | {'; '.join(filter(None, (values, field.says)))} |")
    return "\n".join(lines) + "\n"


FILE = Path(__file__).with_name("FIELDS.md")

if __name__ == "__main__":
    FILE.write_text(table(), encoding="utf-8")
