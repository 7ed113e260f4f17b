"""Direct preference optimisation (arXiv 2305.18290), IPO and every other loss that TRL's DPOTrainer has."""

from typing import Any

from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from ..data.encode import encode_pairs
from .job import PolicyStage, StageJob, load_data, open_adapters, open_tokenizer, train_policy
from .trainers import StageTrainer, check_identity, stage_callbacks, stage_config, worded


class DPOStageTrainer(StageTrainer, DPOTrainer):
    """TRL's DPOTrainer on encoded rows: `prompt_ids`, `chosen_ids`, `rejected_ids` (the last two without the prompt).

    The reference is the frozen copy `ref` that TRL makes of the adapter `default` it is given: the parent's copy, or,
    started from the base, a fresh adapter that changes nothing. The first batch is checked against that.
    """

    mean_logits = True
    _identity_checked = False

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        result = super()._compute_loss(model, inputs, return_outputs)
        if not self._identity_checked and self.model.training:  # pyright: ignore[reportOptionalMemberAccess]
            self._identity_checked = True
            if self.state.global_step == 0:
                check_identity(self, self.beta)
        return result

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        self._use_compact_head()  # this runs inside TRL's __init__, before ours puts the head in place
        return super()._precompute_ref_logps(*args, **kwargs)


def run_dpo(job: StageJob) -> dict[str, Any]:
    """Run a DPO stage (see `run_stage`)."""
    return train_policy(job, build_dpo(job))


def build_dpo(job: StageJob) -> PolicyStage:
    """Everything up to the first step: data, base, adapters, trainer."""
    # 1. tokenizer, data, config
    tokenizer = open_tokenizer(job)
    data = load_data(job, "pair", encode_pairs, tokenizer)
    args = stage_config(DPOConfig, job, held_out=data.held is not None, max_length=job.data.max_length)
    # 2. the base, the adapter that trains, its frozen copy as the reference
    adapters = open_adapters(job, tokenizer)
    with worded(job):
        trainer = DPOStageTrainer(
            model=adapters.model,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.held,
            processing_class=tokenizer,
            callbacks=stage_callbacks(job),
        )
    return PolicyStage(trainer, adapters, tokenizer, data)
