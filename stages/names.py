"""What people write for a key: words of TRL, PEFT, Transformers and their peers -> the key that says it here.

Every unknown key of a recipe is looked up here before the nearest known one is guessed. None is taken silently for
another: the answer names the right key and its place. Imports no torch.
"""

from collections.abc import Mapping

from .fields import FIELDS, TRAINING
from .kinds import KINDS, StageKind
from .ppo.trl_names import CONFIG, DISTILLATION, GROUP, SAME
from .serving.settings import CORRECTIONS

ALIASES: Mapping[str, Mapping[str, str]] = {
    "model": {
        **dict.fromkeys(("name", "path", "id", "model_name", "model_name_or_path", "base_model", "model_id"), "base"),
        **dict.fromkeys(("pretrain", "pretrained_model_name_or_path"), "base"),
        **dict.fromkeys(("torch_dtype", "precision"), "dtype"),
        **dict.fromkeys(("quant", "quantize", "bits", "quantization_bit", "quantization_config"), "quantization"),
        "load_in_4bit": "quantization: 4bit",
        "load_in_8bit": "quantization: 8bit",
        "model_revision": "revision",
        **dict.fromkeys(("template", "chat_template_path"), "chat_template"),
        **dict.fromkeys(("new_special_tokens", "added_tokens", "add_special_tokens", "new_tokens"), "add_tokens"),
    },
    "lora": {
        **dict.fromkeys(("rank", "lora_r", "lora_rank"), "r"),
        **dict.fromkeys(("lora_alpha",), "alpha"),
        **dict.fromkeys(("lora_dropout",), "dropout"),
        **dict.fromkeys(("targets", "modules", "lora_target", "lora_target_modules"), "target_modules"),
        "lora_target_linear": "target_modules: all-linear",
        "rslora": "use_rslora",
        **dict.fromkeys(("dora", "peft_use_dora"), "use_dora"),
        **dict.fromkeys(("init", "init_weights", "lora_init"), "init_lora_weights"),
        "pissa": "init_lora_weights: pissa",
    },
    "data": {
        **dict.fromkeys(("file", "files", "dataset", "url", "id", "train", "data_path", "dataset_name"), "path"),
        **dict.fromkeys(("dataset_path", "train_file"), "path"),
        **dict.fromkeys(("dataset_config", "dataset_config_name"), "name"),
        **dict.fromkeys(("dataset_train_split", "dataset_split"), "split"),
        "dataset_revision": "revision",
        **dict.fromkeys(("test_size", "eval_split", "val_size", "validation_split", "holdout"), "held_out"),
        "val_set_size": "held_out",
        **dict.fromkeys(("max_seq_length", "max_len", "cutoff_len", "seq_len", "sequence_len"), "max_length"),
        **dict.fromkeys(("prompt_max_len", "max_prompt_length"), "max_prompt_length"),
        **dict.fromkeys(("max_samples", "num_samples", "n", "max_rows"), "limit"),
        **dict.fromkeys(("column_mapping", "mapping", "fields"), "columns"),
        **dict.fromkeys(("on_error", "on_errors", "on_bad_rows", "on_bad_lines", "errors", "problems"), "on_problem"),
        **dict.fromkeys(("system_prompt", "default_system"), "system"),
    },
    "stages": {
        **dict.fromkeys(("parent", "start", "start_from", "base", "init", "ref", "ref_model", "reference"), "from"),
        **dict.fromkeys(("type", "method", "algorithm", "stage", "rl"), "kind"),
        **dict.fromkeys(("dataset", "train_data", "path", "dataset_name", "train_dataset"), "data"),
        **dict.fromkeys(("rewards", "reward_model", "reward_funcs", "rm"), "reward"),
        **dict.fromkeys(("training", "args", "trainer", "train_args", "hyperparameters"), "train"),
        **dict.fromkeys(("loss",), "loss_type"),
    },
    "reward": {
        **dict.fromkeys(("path", "model_name_or_path", "reward_model_path", "reward_model"), "model"),
        **dict.fromkeys(("func", "reward_func", "reward_function"), "function"),
        **dict.fromkeys(("coef", "reward_weight"), "weight"),
    },
    "teacher": {
        **dict.fromkeys(("path", "base", "name", "id", "hub", "model_name_or_path", "teacher_model"), "model"),
        **dict.fromkeys(("folder", "lora"), "adapter"),
        "model_revision": "revision",
    },
    "eval": {
        **dict.fromkeys(("judge", "metrics"), "judges"),
        **dict.fromkeys(("models",), "policies"),
        **dict.fromkeys(("baseline",), "reference"),
        **dict.fromkeys(("max_tokens", "max_length", "response_length", "max_completion_length"), "max_new_tokens"),
        **dict.fromkeys(("data", "dataset"), "prompts"),
    },
    "recipe": {
        **dict.fromkeys(("datasets", "dataset"), "data"),
        **dict.fromkeys(("stage", "pipeline", "chain"), "stages"),
        **dict.fromkeys(("evaluation", "evaluate"), "eval"),
        **dict.fromkeys(("peft", "adapter", "peft_config", "lora_config"), "lora"),
        **dict.fromkeys(("run_name", "title"), "name"),
        **dict.fromkeys(("random_seed",), "seed"),
    },
}
"""A part of the recipe -> what people write in it -> its key, or `key: value` where the word says both."""

# So plain that they mean something only in the part itself.
_ONLY_THERE = frozenset(
    (
        *("name", "path", "id", "file", "files", "dataset", "url", "train", "n", "fields", "errors", "problems"),
        *("mapping", "modules", "template", "targets", "bits"),
    )
)

WORDS: Mapping[str, str] = {
    **dict.fromkeys(("lr", "rate", "learningrate", "actor_learning_rate"), "learning_rate"),
    **dict.fromkeys(("batch_size", "batch", "train_batch_size", "micro_batch_size"), "per_device_train_batch_size"),
    "micro_train_batch_size": "per_device_train_batch_size",
    **dict.fromkeys(("epochs", "epoch", "num_epochs", "n_epochs"), "num_train_epochs"),
    **dict.fromkeys(("steps", "num_steps", "total_steps", "max_iters"), "max_steps"),
    **dict.fromkeys(("warmup", "warmup_ratio", "num_warmup_steps"), "warmup_steps"),
    **dict.fromkeys(("scheduler", "lr_scheduler", "schedule"), "lr_scheduler_type"),
    **dict.fromkeys(("optimizer", "optimiser"), "optim"),
    **dict.fromkeys(
        ("grad_accum", "grad_acc", "gradient_accumulation", "accumulation_steps"), "gradient_accumulation_steps"
    ),
    **dict.fromkeys(("grad_clip", "max_norm", "gradient_clipping", "clip_grad_norm"), "max_grad_norm"),
    **dict.fromkeys(("wandb", "tensorboard", "trackio", "logger", "tracker", "trackers"), "report_to"),
    **dict.fromkeys(("eval_batch_size",), "per_device_eval_batch_size"),
    **dict.fromkeys(("evaluation_strategy", "evaluate"), "eval_strategy"),
    **dict.fromkeys(("checkpointing", "grad_checkpointing"), "gradient_checkpointing"),
    "group_by_length": "train_sampling_strategy",
    "liger": "use_liger_kernel",
    "exp_name": "run_name",
    "log_with": "report_to",
}
"""What people write for a field -> its name."""

_LAUNCH = "use --launch CONFIG, which `accelerate config --config_file CONFIG` writes"
GONE: Mapping[str, str] = {
    "logging_dir": "leave it out: event files lie in RUN/<stage>/runs",
    "overwrite_output_dir": "use --force",
    "save_safetensors": "leave it out: nothing else is written",
    "no_cuda": "write use_cpu: true",
    **dict.fromkeys(("gpus", "num_gpus", "devices", "num_processes", "nodes", "deepspeed", "fsdp"), _LAUNCH),
    **dict.fromkeys(("output_dir", "output", "out", "save_dir"), "use --output-dir"),
}
"""Fields of earlier versions, and others that are none -> what to do instead."""

REFUSED: Mapping[str, str] = {
    "bias": "leave it out: it trains the base's own biases, and every role shares the base",
    "lora_bias": "leave it out: it is for adapters that are taken out of a whole model, and trains no further here",
    "modules_to_save": "leave it out: it trains whole modules, and every role shares the base's; a reward model's "
    "score trains anyway",
    "ensure_weight_tying": "leave it out: it is for adapters on the embedding or the head, and neither gets one",
    "layer_replication": "leave it out: it makes another base, with layers said twice",
    "fan_in_fan_out": "leave it out: it is seen from the layer",
    "alora_invocation_tokens": "leave it out: the adapter would be off for a part of each row",
    **dict.fromkeys(
        ("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        "leave it out: init_lora_weights takes true, gaussian, orthogonal, pissa, pissa_niter_N or olora",
    ),
    **dict.fromkeys(("megatron_config", "megatron_core"), "leave it out: Megatron's layers are not supported"),
    **dict.fromkeys(("use_qalora", "qalora_group_size"), "leave it out: GPTQ bases are not supported"),
    **dict.fromkeys(
        ("velora_config", "monteclora_config", "kasa_config", "use_bdlora", "arrow_config"),
        "leave it out: this variant of LoRA is not supported",
    ),
    "task_type": "leave it out: the stage's kind says it",
    "runtime_config": "leave it out: it says how PEFT loads, and no number",
    **dict.fromkeys(
        ("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "inference_mode"),
        "leave it out: it is written beside the adapter",
    ),
}
"""Fields of PEFT's `LoraConfig` that a recipe's `lora` does not take -> why."""

SAID: Mapping[str, str] = {
    **REFUSED,
    "full_finetune": "write full: true in the stage (sft, reward, dpo, kto), beside its kind",
    **dict.fromkeys(
        ("use_peft", "finetuning_type"),
        "leave it out: a stage trains a LoRA adapter (lora: {...}), or with full: true all weights",
    ),
    **dict.fromkeys(
        ("attn_implementation", "flash_attn", "flash_attention"), "leave it out: the attention is chosen by the device"
    ),
    "trust_remote_code": "leave it out: code that comes with a model is never run",
    **dict.fromkeys(
        ("use_vllm", "vllm_mode", "vllm_server_base_url", "vllm_server_host", "vllm_server_port"),
        "write rollout: {engine: vllm, url: http://HOST:PORT} in the stage",
    ),
    **{f"vllm_{name}": f"write rollout: {{{name}: ...}} in the stage" for name in CORRECTIONS},
    **dict.fromkeys(
        ("n_samples_per_prompt", "rloo_k"), "write num_generations in a stage of kind grpo or rloo; PPO draws one"
    ),
    **dict.fromkeys(
        ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_compute_dtype"),
        "leave it out: quantization: 4bit in model is nf4",
    ),
    "lora_task_type": "leave it out: the stage's kind says it",
    # of pairs it cuts the reply alone; here prompt and reply are counted together
    "max_completion_length": "write max_new_tokens in a stage of kind ppo; pairs are cut by max_length of the data "
    "entry, which counts prompt and reply",
}
"""Words that have no key here, or none that means just the same -> what to do."""


def meant(word: str, part: str, kind: StageKind | None = None, stage: str = "NAME") -> str | None:
    """What to do about a key that is none at its place, where it is known what people mean by it.

    Args:
        part: where it stands: a key of `ALIASES`, or `train`.
        kind: of the stage that it stands in; None: in none.
        stage: that stage's name.

    Returns:
        The remedy, with the right key and place; None: nothing is known of the word.
    """
    if (key := ALIASES.get(part, {}).get(word)) is not None:
        return f"write {key}" if ": " in key else f"did you mean {key!r}?"
    here = f"stages.{stage}"
    # the method's words first: PPO's `batch_size` is a rollout's
    if kind is not None and (said := _of_method(word, kind, here)) is not None:
        return said
    if part == "train" and word in ALIASES["stages"] and word not in _ONLY_THERE:
        return f"write {ALIASES['stages'][word]} in {here}"
    for known in (SAID, GONE):
        if word in known:
            return known[word]
    if word in WORDS:
        return f"write {WORDS[word]}" + ("" if part == "train" else f" in {here}.train")
    return _in_another_part(word, part) or _trained(word, kind, here) or _of_others(word)


def _in_another_part(word: str, part: str) -> str | None:
    if word in _ONLY_THERE:
        return None
    for other, entry in (("model", "model"), ("lora", "lora"), ("data", "data.NAME")):
        key = ALIASES[other].get(word)
        if other != part and key is not None:
            return f"write it in {entry}: {{{key}}}" if ": " in key else f"write it in {entry}: {{{key}: ...}}"
    return None


def _trained(word: str, kind: StageKind | None, here: str) -> str | None:
    """What becomes of a field of a config that stands outside `train`, or in the train of another kind."""
    own = FIELDS.get(kind.config.rpartition(":")[2], TRAINING) if kind is not None else TRAINING
    for fields in (own, *FIELDS.values()):
        if word in fields and fields[word].state != "works":
            return fields[word].says
        if fields is own and word in fields:
            return f"write it in {here}.train"
    return None


def parameter_place(kind: StageKind, name: str) -> str:
    """How a recipe says a parameter of a kind: `cliprange`, or `kl: {coef: ...}` for one of a group."""
    for group, keys in kind.groups.items():
        for key, grouped in keys.items():
            if grouped == name:
                return f"{group}: {{{key}: ...}}"
    return name


def meant_in_group(word: str, kind: StageKind, group: str) -> str | None:
    """The same within a group of the kind's parameters: `kl: {beta: 0.1}`."""
    keys = {name: key for key, name in kind.groups[group].items()}
    found = next((keys[SAME[each]] for each in (word, f"{group}_{word}") if SAME.get(each) in keys), None)
    found = found or keys.get(word)
    return found and f"did you mean {found!r}?"


def _of_method(word: str, kind: StageKind, here: str) -> str | None:
    """A word for a parameter of the stage's own kind."""
    parameters, (table, own) = {each.name for each in kind.parameters}, _OF_KINDS.get(kind.name, ({}, {}))
    # what the other on-policy kinds call PPO's may be something else here
    names = (word,) if word in table and table is not CONFIG else (word, SAME.get(word, ""))
    name = next((each for each in names if each in parameters), None)
    if name is not None:
        return f"write {parameter_place(kind, name)} in {here}"
    return own.get(word) or table.get(word)


def _of_others(word: str) -> str | None:
    """A word for a parameter that other kinds have."""
    for name in (word, SAME.get(word, "")):
        having = [kind for kind in KINDS.values() if any(each.name == name for each in kind.parameters)]
        if having:
            kinds = " or ".join(kind.name for kind in having)
            return f"write {parameter_place(having[0], name)} in a stage of kind {kinds}"
    said = _IN_PPO.get(word) or CONFIG.get(word)
    return said and f"in a stage of kind ppo: {said}"


# What a recipe says otherwise than `PPOConfig`.
_IN_PPO = {
    "max_length": "write max_new_tokens for the response; cut prompts by max_prompt_length of the data entry",
    "max_prompt_length": "write max_prompt_length in the data entry",
    "reward_model_path": "write reward: NAME of a reward stage, or reward: {model: PATH}",
    "reward_adapter": "write reward: NAME of a reward stage",
    "reward_weights": "write weight in each entry of reward: [{stage: NAME, weight: 1.0}, ...]",
    "sft_model_path": "write from: NAME of the SFT stage, or from: {adapter: PATH}",
    **dict.fromkeys(
        ("init_kl_coef", "adap_kl_ctrl"), "write kl: {coef: ...}, with target and horizon where it is to adapt"
    ),
    "kl_loss_coef": "write kl: {coef: ..., in: loss}",
    "exp_name": "write run_name in train",
    "log_with": "write report_to in train",
    "backward_batch_size": "write per_device_train_batch_size in train",
    "local_rollout_forward_batch_size": "write rollout_micro_batch_size (prompts decoded at once)",
    "target_kl": "write kl: {target: ...} (the controller's), or target_approx_kl (stops an iteration's epochs)",
}

# What a recipe says otherwise than `GRPOConfig` and `RLOOConfig`.
_IN_GROUPS = {
    word: _IN_PPO[word]
    for word in (
        *("max_length", "max_prompt_length", "reward_model_path", "reward_adapter", "reward_weights"),
        *("sft_model_path", "exp_name", "log_with", "backward_batch_size", "local_rollout_forward_batch_size"),
    )
}

# What a recipe says otherwise than `DistillationConfig`.
_IN_DISTILLATION = {
    **{word: said for word, said in _IN_GROUPS.items() if not word.startswith("reward")},
    **dict.fromkeys(
        ("teacher_model_name_or_path", "teacher_model"), "write teacher: a hub id, a folder or {stage: NAME}"
    ),
    "teacher_model_revision": "write teacher: {model: ID, revision: REVISION}",
    **dict.fromkeys(
        ("teacher_model_init_kwargs", "model_init_kwargs"),
        "leave it out: the teacher is loaded as model says of the base",
    ),
    "seq_kd": "leave it out: a stage of kind sample writes the teacher's replies; read them with lmbda: 0",
}

_OF_KINDS: Mapping[str, tuple[Mapping[str, str], Mapping[str, str]]] = {
    "ppo": (CONFIG, _IN_PPO),
    **dict.fromkeys(("grpo", "rloo"), (GROUP, _IN_GROUPS)),
    "distill": (DISTILLATION, _IN_DISTILLATION),
}
"""An on-policy kind -> what is answered to words of its config, and what a recipe says otherwise."""
