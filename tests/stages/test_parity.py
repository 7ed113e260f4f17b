"""Our stages against TRL's own plain trainers on one batch: same loss, same adapter gradients, in fp32.

Ours run packed, with our LM head and on encoded rows; TRL's run padded rows through the model as transformers made it.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from preftune.data.encode import encode_pairs
from preftune.models.base import Base
from preftune.models.loading import load_model, resolve_base
from preftune.models.reward_model import create_reward_model
from preftune.models.tokens import load_tokenizer
from preftune.stages.dpo import build_dpo
from preftune.stages.kto import build_kto
from preftune.stages.options import stage_config
from preftune.stages.reward import RewardStageTrainer, with_prompts
from preftune.stages.run import load_data

from .conftest import sft_on
from .tiny_ppo import TOKENIZER, tiny_model

TOLERANCE = 1e-6
"""In the loss; in each gradient, relative to the norm of all of them. Rounding grows with depth, so the base has one
layer: measured 1e-7."""

# what TRL asks for to be built at all; the batch comes from our trainer
LABELS = [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "completion": "c", "label": False}]
PAIRS = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "d", "rejected": "e"}]


class Start(NamedTuple):
    """A base of one layer, and an SFT adapter on it."""

    base: Base
    parent: Path


@pytest.fixture(scope="module")
def start(preftune_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    folder = tmp_path_factory.mktemp("one-layer")
    tiny_model().save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    base = resolve_base(str(folder / "base"))
    return Start(base, sft_on(base, folder))


def adapter(model: Any) -> dict[str, torch.nn.Parameter]:
    """What trains, by PEFT's name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def as_ours(theirs: Any, ours: Any) -> None:
    """Move our adapter off its start, so that no term is zero, and give theirs the same weights."""
    generator = torch.Generator().manual_seed(1)
    target = adapter(theirs)
    assert target.keys() == adapter(ours).keys()
    with torch.no_grad():
        for name, parameter in adapter(ours).items():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            target[name].copy_(parameter)


def loss_and_gradients(trainer: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model = trainer.model.train()
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in adapter(model).items() if parameter.grad is not None}
    assert gradients.keys() == adapter(model).keys()
    return loss.item(), gradients


def assert_same(ours: Any, theirs: Any) -> None:
    """One batch of ours through both."""
    as_ours(theirs.model, ours.model)
    batch = next(iter(ours.get_train_dataloader()))
    assert not batch["attention_mask"].bool().all()
    loss, gradients = loss_and_gradients(ours, batch)
    expected_loss, expected = loss_and_gradients(theirs, batch)
    assert loss == pytest.approx(expected_loss, rel=TOLERANCE, abs=TOLERANCE)
    norm = torch.cat([gradient.flatten() for gradient in expected.values()]).norm().item()
    assert norm > 1e-2
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=TOLERANCE * norm, msg=name)


def plain(start: Start) -> PeftModel:
    return PeftModel.from_pretrained(load_model(start.base, packed=False), start.parent, is_trainable=True)


def options(tmp_path: Path, **given: Any) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path / "trl"), "use_cpu": True, "bf16": False, "report_to": "none",
        "activation_checkpointing": False, "per_device_train_batch_size": 4, **given,
    }  # fmt: skip


@pytest.mark.parametrize(
    "method",
    [
        {"loss_type": "sigmoid"},
        {"loss_type": "ipo"},
        {"loss_type": "hinge"},
        {"loss_type": "robust", "label_smoothing": 0.2},
    ],
    ids=lambda method: method["loss_type"],
)
def test_dpo(make_job, start: Start, tmp_path: Path, method: dict[str, Any]) -> None:
    ours = build_dpo(make_job("dpo", base=start.base, parent=start.parent, method={"beta": 0.2, **method})).trainer
    ours._identity_checked = True  # it is moved off its reference on purpose
    theirs = DPOTrainer(
        plain(start),
        args=DPOConfig(**options(tmp_path, beta=0.2, **method)),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=load_tokenizer(start.base),
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto(make_job, start: Start, tmp_path: Path, loss_type: str) -> None:
    method = {"beta": 0.2, "loss_type": loss_type, "desirable_weight": 1.3, "undesirable_weight": 0.8}
    ours = build_kto(make_job("kto", base=start.base, parent=start.parent, method=method)).trainer
    ours._identity_checked = True
    theirs = KTOTrainer(
        plain(start),
        args=KTOConfig(**options(tmp_path, **method)),
        train_dataset=Dataset.from_list(LABELS),
        processing_class=load_tokenizer(start.base),
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize(("margin", "centring"), [(None, 0.0), (0.7, 0.0), (None, 0.5), (0.7, 0.01)])
def test_bradley_terry(
    make_job, start: Start, tmp_path: Path, pair_rows, margin: float | None, centring: float
) -> None:
    rows = [{**row, "margin": margin * i} if margin else row for i, row in enumerate(pair_rows)]
    job = make_job("reward", base=start.base, rows=rows, method={"center_rewards_coefficient": centring})
    tokenizer = load_tokenizer(start.base)
    ours = RewardStageTrainer(
        model=create_reward_model(start.base, tokenizer, job.lora),
        args=stage_config(RewardConfig, job, held_out=False),
        train_dataset=with_prompts(load_data(job, encode_pairs, tokenizer).train),
        processing_class=load_tokenizer(start.base),
    )
    classifier: Any = AutoModelForSequenceClassification.from_pretrained(start.base.path, num_labels=1)
    classifier.config.pad_token_id = tokenizer.pad_token_id
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
    theirs = RewardTrainer(
        get_peft_model(classifier, lora),
        args=RewardConfig(**options(tmp_path, center_rewards_coefficient=centring or None)),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=load_tokenizer(start.base),
    )
    assert_same(ours, theirs)
