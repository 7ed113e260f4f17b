"""What users of TRL's trainers write, and what says it here: one line for each name. Imports no torch."""

from collections.abc import Iterable
from dataclasses import fields

from ...errors import UserError, nearest
from ..serving.settings import CORRECTIONS
from .settings import OnPolicySettings, PPOSettings, RewardedSettings

_ONE_BASE = "leave it out: it is a frozen adapter on the policy's own base"
_SAMPLING = "say it in PPOConfig: max_new_tokens, temperature, top_k, top_p"
_RATES = "write RewardSource(kind, target, weight) in rewards=[...], one for each source"
_KL = "write kl_coef (with kl_target and kl_horizon where it is to adapt)"

TRAINER: dict[str, str] = {
    "config": "write args=PPOConfig(...)",
    "ppo_config": "write args=PPOConfig(...)",
    "tokenizer": "write processing_class",
    "policy": "write model",
    "policy_model": "write model",
    "dataset": "write train_dataset",
    "ref_model": _ONE_BASE + ", a copy of what the policy starts from",
    "ref_policy": _ONE_BASE + ", a copy of what the policy starts from",
    "model_adapter_name": "leave it out: the policy's adapter is `default`",
    "ref_adapter_name": "leave it out: the reference is the adapter `ref`, a copy of what the policy starts from",
    "reward_model": "write reward_adapter=FOLDER (a reward stage on the same base), or reward_funcs='MODEL'",
    "reward_func": "write reward_funcs",
    "reward_function": "write reward_funcs",
    "reward_processing_classes": "leave it out: a reward model reads with its own tokenizer",
    "reward_weights": _RATES,
    "value_model": "leave it out: the value is an adapter here (PPOConfig(value='separate' or 'shared'))",
    "critic": "leave it out: the value is an adapter here (PPOConfig(value='separate' or 'shared'))",
    "data_collator": "leave it out: prompts are kept as token ids, and padded nowhere but in the rollout",
    "generation_kwargs": _SAMPLING,
    "generation_config": _SAMPLING,
    "response_length": "write PPOConfig(max_new_tokens=...)",
    "stop_token": "leave it out: a response ends at the tokenizer's EOS",
    "num_shared_layers": "leave it out: policy and reference share the whole base",
    "compute_metrics": "use a callback's on_log: every metric is logged",
    "compute_loss_func": "subclass OnPolicyTrainer and hand in a Method (stages/ppo/method.py)",
    "preprocess_logits_for_metrics": "leave it out: no logits are kept",
    "model_init": "pass the model",
    "optimizer_cls_and_kwargs": "write PPOConfig(optim=..., optim_args=...), or pass optimizers",
}
"""Arguments of PPOTrainer and its neighbours."""

_NO_VALUE = "leave it out: a reply is compared with the others to its prompt, and there is no value"
_NO_TOOLS = "leave it out: replies are plain text, without tools or environments"

_GROUP_TRAINER: dict[str, str] = {
    **dict.fromkeys(("value_model", "critic"), _NO_VALUE),
    **dict.fromkeys(("tools", "rollout_func", "environment_factory"), _NO_TOOLS),
    "reward_weights": "write PPOConfig(reward_weights=[...]), one for each reward",
    "quantization_config": "load the model with it, and pass the model",
}


_LOADED = "load the model with it, and pass the model"
_TEACHERS = "pass it as DistillationTrainer's teacher_model"

_DISTILLATION_TRAINER: dict[str, str] = {
    **dict.fromkeys(("value_model", "critic"), "leave it out: there is no value"),
    **dict.fromkeys(("ref_model", "ref_policy", "ref_adapter_name"), "leave it out: nothing is measured against one"),
    **dict.fromkeys(
        ("reward_model", "reward_func", "reward_function", "reward_processing_classes", "reward_weights"),
        "leave it out: the teacher says what is learned",
    ),
    **dict.fromkeys(("tools", "rollout_func", "environment_factory"), _NO_TOOLS),
    **dict.fromkeys(("teacher", "teacher_policy", "teacher_model_name_or_path"), "write teacher_model"),
    "quantization_config": _LOADED,
}


def trainer_names(config: str) -> dict[str, str]:
    """What is answered to arguments of a trainer that it does not have.

    Args:
        config: the name of its config's class.
    """
    more = {"PPOConfig": {}, "DistillationConfig": _DISTILLATION_TRAINER}.get(config, _GROUP_TRAINER)
    found = {**TRAINER, **more}
    return {word: remedy.replace("PPOConfig", config) for word, remedy in found.items()}


SAME: dict[str, str] = {
    "response_length": "max_new_tokens",
    "max_completion_length": "max_new_tokens",
    "num_completions_to_print": "num_log_samples",
    "ppo_epochs": "num_ppo_epochs",
    "num_iterations": "num_ppo_epochs",
    "beta": "kl_coef",
    "target": "kl_target",
    "horizon": "kl_horizon",
    "kl_penalty": "kl_estimator",
    "epsilon": "cliprange",
    "ratio_threshold": "max_ratio",
    "use_score_norm": "normalize_rewards",
    "score_clip": "reward_clip",
    "scale_rewards": "reward_scale",
    "generate_max_len": "max_new_tokens",
    "ppo_target": "kl_target",
    "eps_clip": "cliprange",
    "clip_ratio": "cliprange",
    "value_clip": "cliprange_value",
    "lambd": "lam",
    "entropy_coeff": "entropy_coef",
    "micro_rollout_batch_size": "rollout_micro_batch_size",
    "critic_learning_rate": "value_learning_rate",
    "reward_clip_range": "reward_clip",
    # of the preference stages
    "pref_beta": "beta",
    "rl_beta": "beta",
    "dpo_beta": "beta",
    "pref_loss": "loss_type",
    "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight",
}
"""What others call a parameter of a stage -> its name here, where the meaning is the same."""

_OURS = {each.name for each in fields(PPOSettings)}
_SCORES = {each.name for each in fields(RewardedSettings)} - {each.name for each in fields(OnPolicySettings)}
_SHARED = {each.name for each in fields(RewardedSettings)}

CONFIG: dict[str, str] = {
    **{word: f"write {name}" for word, name in SAME.items() if name in _OURS},
    "max_length": "write max_new_tokens for the response; cut prompts in the data (max_prompt_length)",
    "max_prompt_length": "cut the prompts in train_dataset (in a recipe: max_prompt_length of the data entry)",
    "stop_token": "leave it out: a response ends at the tokenizer's EOS",
    "stop_token_id": "leave it out: a response ends at the tokenizer's EOS",
    "generation_kwargs": "write max_new_tokens, temperature, top_k, top_p",
    "min_p": "write top_p or top_k, or better neither: a cut biases the ratio",
    "repetition_penalty": "leave it out: the policy would not be what is sampled",
    "reward_weights": _RATES + " of PPOTrainer",
    "reward_model_path": "pass reward_adapter=FOLDER or reward_funcs='MODEL' to PPOTrainer",
    "sft_model_path": "pass the SFT stage's folder as PPOTrainer's model",
    "reward_adapter": "pass it to PPOTrainer",
    "num_sample_generations": "write log_samples_every (iterations) and num_log_samples",
    "log_completions": "write log_samples_every (iterations) and num_log_samples",
    "local_rollout_forward_batch_size": "write per_device_train_batch_size; forwards take some times as many rows",
    "batch_size": "write rollout_batch_size (episodes an iteration, over all processes)",
    "local_batch_size": "write rollout_batch_size (episodes an iteration, over all processes)",
    "mini_batch_size": "write num_mini_batches (optimiser steps a pass)",
    "local_mini_batch_size": "write num_mini_batches (optimiser steps a pass)",
    "num_total_batches": "write total_episodes: that many iterations times rollout_batch_size",
    "num_updates": "write total_episodes: that many iterations times rollout_batch_size",
    "steps": "write total_episodes",
    "backward_batch_size": "write per_device_train_batch_size",
    "train_batch_size": "write num_mini_batches (optimiser steps a pass); one forward is per_device_train_batch_size",
    "init_kl_coef": _KL,
    "adap_kl_ctrl": _KL,
    "target_kl": "write kl_target (the controller's), or target_approx_kl (stops an iteration's epochs)",
    "early_stopping": "write target_approx_kl",
    "use_score_scaling": "write reward_scale='std' or 'running'",
    "exp_name": "write run_name",
    "log_with": "write report_to",
    "model_adapter_name": TRAINER["model_adapter_name"],
    "ref_adapter_name": TRAINER["ref_adapter_name"],
    "sync_ref_model": "leave it out: the reference is what the policy starts from, frozen",
    "num_generations": "leave it out: PPO draws one response a prompt; kind: grpo and kind: rloo draw several",
    "kl_loss_coef": "write kl_coef and kl_in='loss'",
    "use_vllm": "write rollout: {engine: vllm, url: ...} in a recipe, rollout_engine and rollout_url in Python",
    "disable_dropout": "leave it out: nothing is dropped in PPO",
    "dataset_num_proc": "leave it out: prompts are encoded once, in one process",
    "missing_eos_reward": "write missing_eos_penalty (subtracted) or missing_eos_score (in the score's place)",
}
"""Fields of PPOConfig's predecessors and neighbours."""

_NO_LOSS = "leave it out: loss_type is grpo, bnpo, dr_grpo, dapo or cispo here"
_ONE_BETA = "leave it out: the KL's coefficient is beta, and stays"
_SERVER = CONFIG["use_vllm"]

GROUP: dict[str, str] = {
    **{word: f"write {name}" for word, name in SAME.items() if name in _SHARED and word != "scale_rewards"},
    **{
        word: CONFIG[word]
        for word in (
            *("max_length", "max_prompt_length", "stop_token", "stop_token_id", "generation_kwargs", "min_p"),
            *("repetition_penalty", "num_sample_generations", "log_completions", "batch_size", "mini_batch_size"),
            *("num_total_batches", "num_updates", "steps", "backward_batch_size", "train_batch_size", "early_stopping"),
            *("exp_name", "log_with", "model_adapter_name", "ref_adapter_name", "sync_ref_model", "use_vllm"),
            *("disable_dropout", "dataset_num_proc", "missing_eos_reward", "local_rollout_forward_batch_size"),
        )
    },
    **dict.fromkeys(("kl_coef", "init_kl_coef", "kl_loss_coef"), "write beta"),
    **dict.fromkeys(("kl_in", "kl_estimator", "kl_penalty", "kl_target", "kl_horizon", "adap_kl_ctrl"), _ONE_BETA),
    "target_kl": "write target_approx_kl (stops an iteration's epochs)",
    **dict.fromkeys(("num_ppo_epochs", "ppo_epochs", "mu"), "write num_iterations"),
    **dict.fromkeys(("cliprange", "eps_clip", "clip_ratio", "epsilon_low"), "write epsilon"),
    **dict.fromkeys(("clip_ratio_high", "eps_clip_high"), "write epsilon_high"),
    **dict.fromkeys(("value", "vf_coef", "cliprange_value", "value_clip", "value_learning_rate"), _NO_VALUE),
    **dict.fromkeys(("gamma", "lam", "lambd", "critic_learning_rate"), _NO_VALUE),
    **dict.fromkeys(("whiten_advantages", "whiten_rewards"), "write scale_rewards (GRPO), normalize_advantages (RLOO)"),
    "scale_rewards": "write normalize_advantages",
    **dict.fromkeys(
        ("entropy_coef", "use_adaptive_entropy", "entropy_target", "entropy_coeff"),
        "leave it out: there is no entropy bonus in GRPO or RLOO here; kind: ppo has one",
    ),
    **dict.fromkeys(("n_samples_per_prompt", "rloo_k", "group_size", "num_return_sequences"), "write num_generations"),
    "num_generations_eval": "leave it out: a prompt that is held out is answered once",
    "generation_batch_size": "write rollout_batch_size (replies an iteration, over all processes)",
    "steps_per_generation": "write num_mini_batches (optimiser steps a pass)",
    "shuffle_dataset": "leave it out: prompts are shuffled in each pass over them",
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), _NO_LOSS),
    **dict.fromkeys(("vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg"), _NO_LOSS),
    **{f"vllm_{name}": f"write {name}" for name in CORRECTIONS},
    **dict.fromkeys(("vllm_mode", "vllm_server_base_url", "vllm_server_host", "vllm_server_port"), _SERVER),
    "use_transformers_continuous_batching": "leave it out: rollouts run on the policy's own base, or on a server",
    **dict.fromkeys(("ref_model_mixup_alpha", "ref_model_sync_steps"), CONFIG["sync_ref_model"]),
    "max_tool_calling_iterations": _NO_TOOLS,
    "log_unique_prompts": CONFIG["log_completions"],
    "log_completions_hub_repo": CONFIG["log_completions"],
}
"""Fields of TRL's GRPOConfig and RLOOConfig, and of PPOConfig, that are none of ours."""


_SAMPLES = {each.name for each in fields(OnPolicySettings)}
_NO_REFERENCE = "leave it out: there is no reference, and beta says which divergence from the teacher is brought down"
_NO_SCORES = "leave it out: the teacher says what is learned, and nothing is scored"
_ONE_PASS = "leave it out: a rollout is passed over once, and a prompt has one reply in it"

DISTILLATION: dict[str, str] = {
    **{word: f"write {name}" for word, name in SAME.items() if name in _SAMPLES},
    **{
        word: CONFIG[word]
        for word in (
            *("max_length", "max_prompt_length", "stop_token", "stop_token_id", "generation_kwargs", "min_p"),
            *("repetition_penalty", "num_sample_generations", "log_completions", "batch_size", "mini_batch_size"),
            *("num_total_batches", "num_updates", "steps", "backward_batch_size", "train_batch_size"),
            *("exp_name", "log_with", "model_adapter_name", "use_vllm", "local_rollout_forward_batch_size"),
            *("dataset_num_proc",),
        )
    },
    "lambda": "write lmbda",
    **dict.fromkeys(("alpha", "jsd_beta", "divergence", "distill_beta"), "write beta"),
    **dict.fromkeys(("teacher_model_name_or_path", "teacher_model", "teacher"), _TEACHERS),
    "teacher_model_revision": _LOADED,
    **dict.fromkeys(("teacher_model_init_kwargs", "model_init_kwargs"), _LOADED),
    **dict.fromkeys(
        ("kl_coef", "init_kl_coef", "kl_loss_coef", "kl_target", "kl_in", "ref_adapter_name"), _NO_REFERENCE
    ),
    "sync_ref_model": _NO_REFERENCE,
    **dict.fromkeys((*sorted(_SCORES), "reward_weights", "scale_rewards", "missing_eos_reward"), _NO_SCORES),
    **dict.fromkeys(("num_iterations", "num_ppo_epochs", "ppo_epochs", "num_generations", "mu"), _ONE_PASS),
    "generation_batch_size": GROUP["generation_batch_size"],
    "steps_per_generation": GROUP["steps_per_generation"],
    "shuffle_dataset": GROUP["shuffle_dataset"],
    "disable_dropout": "leave it out: nothing is dropped",
    "seq_kd": "leave it out: have the teacher's replies sampled first, and set lmbda to 0",
    "max_tool_calling_iterations": _NO_TOOLS,
    "log_unique_prompts": CONFIG["log_completions"],
}
"""Fields of TRL's DistillationConfig and GKDConfig, and of the configs here, that are none of DistillationConfig's."""


def refuse_names(where: str, given: Iterable[str], table: dict[str, str], known: Iterable[str]) -> None:
    """Refuse the first argument that is nobody's here, with what to write.

    Args:
        where: whose arguments they are.
        given: names that are not known here.
        table: `TRAINER` or `CONFIG`.
        known: the names that are, for what stands in neither.

    Raises:
        UserError: there is one.
    """
    for name in given:
        remedy = table.get(name) or nearest(name, sorted(known), most=12)
        raise UserError(where, f"{name!r} is no argument of it", remedy)
