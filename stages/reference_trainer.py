"""What DPO and KTO share: a frozen reference that is what the policy started from, and its log-probs, cached safely."""

import json
from typing import Any

from datasets.fingerprint import Hasher
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models import seams
from ..models.adapters import DEFAULT, REF, AdapterSet
from ..models.lineage import tokenizer_info
from ..models.token_rows import copy_rows
from ..models.whole_model import WholeModel
from .job import StageJob
from .trainers import StageTrainer, check_identity


class ReferenceTrainer(StageTrainer):
    """Mixed in before TRL's DPOTrainer or KTOTrainer.

    The reference is the frozen copy `ref` that TRL makes of the adapter `default` it is given: the parent's copy, or,
    started from the base, a fresh adapter that changes nothing. TRL passes over rows of single tokens, which have other
    names: they are copied here. Where all weights train it is a frozen copy of the model (`reference_of`). The first
    batch is checked against that.
    """

    beta: float
    ref_model: Any
    mean_logits = True
    overridden = (*StageTrainer.overridden, seams.COMPUTE_LOSS, seams.REFERENCE_LOGPS)
    _identity_checked = False
    _reference_whole = False
    _reference_key: str | None = None

    def _compute_loss(self, model: object, inputs: object, return_outputs: bool) -> Any:
        trl: Any = super()
        result = trl._compute_loss(model, inputs, return_outputs)
        assert self.model is not None
        if not self._identity_checked and self.model.training:
            self._identity_checked = True
            if self.state.global_step == 0:
                check_identity(self, self.beta)
        return result

    def _use_compact_head(self) -> None:
        # before the reference is asked for the first time, inside TRL's __init__ or after it
        if not self._reference_whole:
            self._reference_whole = True
            assert self.model is not None
            copy_rows(self.model, DEFAULT, REF)
            if self.ref_model is not None:
                self._put_head(self.ref_model)
                self._in_training_precision(self.ref_model)
        super()._use_compact_head()

    def _in_training_precision(self, model: Any) -> None:
        """Have its forward run under autocast, as the policy's does: TRL calls it outside, and what accelerate put
        around it for that stands no longer outermost."""
        inner = model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.accelerator.autocast():
                return inner(*args, **kwargs)

        model.forward = forward

    def _precompute_ref_logps(self, *args: object, **kwargs: object) -> Any:
        # the first call runs inside TRL's __init__, before ours puts the head in place
        self._use_compact_head()
        if self._reference_key is None:
            self._reference_key = reference_key(self)
            # TRL's cache file is named after this and the dataset's fingerprint
            self._precompute_model_hash = self._reference_key
        trl: Any = super()
        return trl._precompute_ref_logps(*args, **kwargs)


def reference_of(
    job: StageJob, policy: AdapterSet | WholeModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel | None:
    """The model that the policy is measured against where it is no adapter of the policy's own base."""
    return policy.reference(tokenizer, packed=job.packed) if isinstance(policy, WholeModel) else None


def reference_key(trainer: Any) -> str:
    """Everything but the rows that the reference's log-probs depend on (D2), as a hash.

    TRL's own key has the weights alone: with it a cache would be taken over by a run whose adapter is scaled otherwise
    (LoRA's alpha is no weight), that computes in another precision or cuts its rows elsewhere.
    """
    args, model = trainer.args, trainer.model
    adapters = getattr(model, "peft_config", {})
    seams.require(seams.COLLATOR, trainer)
    seams.require(seams.TRL_SETTINGS, args)
    cut = {name: getattr(trainer.data_collator, name, None) for name in ("max_length", "truncation_mode")}
    return Hasher.hash(
        json.dumps(
            {
                "weights": trainer._precompute_model_hash,
                "adapters": {name: _json(config.to_dict()) for name, config in adapters.items()},
                "dtype": [str(model.dtype), bool(args.bf16), bool(args.fp16)],
                "tokenizer": tokenizer_info(trainer.processing_class),
                "truncation": cut,
                # LD-DPO weighs the tokens beyond the shorter response's length before they are summed
                "ld_alpha": getattr(args, "ld_alpha", None),
            },
            sort_keys=True,
            default=str,
        )
    )


def _json(config: dict[str, object]) -> dict[str, object]:
    return {key: sorted(map(str, value)) if isinstance(value, set) else value for key, value in config.items()}
