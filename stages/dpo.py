"""Direct preference optimisation (arXiv 2305.18290), IPO and every other loss that TRL's DPOTrainer has."""

from typing import Any

from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from ..data.encode import encode_pairs
from ..errors import UserError
from .job import StageJob
from .options import refusals_in_words, stage_config
from .reference_trainer import ReferenceTrainer
from .run import PolicyStage, load_data, open_adapters, open_tokenizer, train_policy
from .trainers import NO_AUX, settle_dropout, stage_callbacks

_WITH_DIVERGENCE = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
"""The losses that TRL has with every f-divergence."""
_SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
"""The losses of TRL's DPOTrainer that look at `label_smoothing`."""


class DPOStageTrainer(ReferenceTrainer, DPOTrainer):
    """TRL's DPOTrainer on encoded rows: `prompt_ids`, and `chosen_ids` and `rejected_ids` without the prompt."""


def dpo_problems(job: StageJob, args: DPOConfig) -> list[UserError]:
    """What TRL's DPOTrainer refuses of settings that its config takes."""
    here, losses, found = f"stages.{job.name}", set(args.loss_type), []
    if args.f_divergence_type != "reverse_kl" and (others := losses - _WITH_DIVERGENCE):
        said = f"is {args.f_divergence_type!r}, which {min(others)} has no form of"
        found.append(UserError(f"{here}.f_divergence_type", said, f"use reverse_kl, or {', '.join(_WITH_DIVERGENCE)}"))
    if args.use_weighting and losses & {"aot", "aot_unpaired"}:
        found.append(UserError(f"{here}.use_weighting", "aot sorts the pairs that it would weigh", "leave it out"))
    if "exo_pair" in losses and args.label_smoothing == 0:
        said = "is 0, and exo_pair needs label smoothing. Label smoothing must be greater than 0.0"
        found.append(UserError(f"{here}.label_smoothing", said, "set label_smoothing: 1e-3"))
    if args.label_smoothing and not losses & set(_SMOOTHED):
        said = f"{args.label_smoothing} has no effect with loss_type {', '.join(sorted(losses))}"
        remedy = (
            f"use a loss_type that smooths labels ({', '.join(_SMOOTHED)}; robust is the usual one), or leave it out"
        )
        found.append(UserError(f"{here}.label_smoothing", said, remedy))
    idle = {
        "discopop_tau": ("discopop" in losses, "loss_type discopop"),
        "f_alpha_divergence_coef": (args.f_divergence_type == "alpha_divergence", "f_divergence_type alpha_divergence"),
    }
    found += [
        UserError(f"{here}.{key}", f"has no effect without {needs}", "leave it out, or set that")
        for key, (used, needs) in idle.items()
        if not used and job.says(key) is not None
    ]
    return found


def run_dpo(job: StageJob) -> dict[str, Any]:
    """Run a DPO stage (see `run_stage`)."""
    return train_policy(job, build_dpo(job))


def build_dpo(job: StageJob) -> PolicyStage[DPOStageTrainer]:
    """Everything up to the first step: data, base, adapters, trainer."""
    # 1. tokenizer, data, config
    tokenizer = open_tokenizer(job)
    data = load_data(job, encode_pairs, tokenizer)
    args = stage_config(DPOConfig, job, held_out=data.held is not None, max_length=job.data.max_length, **NO_AUX)
    # 2. the base, the adapter that trains, its frozen copy as the reference
    adapters = open_adapters(job, tokenizer)
    settle_dropout(job, args, adapters.model, reference=True)
    with refusals_in_words(job):
        trainer = DPOStageTrainer(
            model=adapters.model,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.held,
            processing_class=tokenizer,
            callbacks=stage_callbacks(job),
        )
    return PolicyStage(trainer, adapters, tokenizer, data)
