"""Stages on a mixture of experts: its load-balancing loss stands apart, its chain runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from preftune.models.base import Base
from preftune.models.loading import resolve_base
from preftune.stages.dpo import build_dpo
from preftune.stages.kto import build_kto
from preftune.stages.sft import build_sft


@pytest.fixture
def mixture(tmp_path: Path, tokenizer: Any) -> Base:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        output_router_logits=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mixture")
    tokenizer.save_pretrained(tmp_path / "mixture")
    return resolve_base(str(tmp_path / "mixture"))


def first_loss(stage: Any) -> tuple[float, dict[str, list[float]]]:
    stage.trainer.model.train()
    batch = stage.trainer._prepare_inputs(next(iter(stage.trainer.get_train_dataloader())))
    return stage.trainer.compute_loss(stage.trainer.model, batch).item(), stage.trainer._metrics["train"]


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_a_mixtures_loss_is_that_of_any_other_model_unless_asked(kind, mixture, make_job):
    """And the balancing loss, if asked for, is added with its coefficient and logged under a key of its own."""
    build: Any = {"sft": build_sft, "dpo": build_dpo, "kto": build_kto}[kind]
    job = replace(make_job(kind), base=mixture)
    plain, metrics = first_loss(build(job))
    assert "aux_loss" not in metrics
    asked = replace(job, train={**job.train, "router_aux_loss_coef": 0.5}, output_dir=job.output_dir / "asked")
    balanced, metrics = first_loss(build(asked))
    assert metrics["aux_loss"][-1] > 1
    assert balanced == pytest.approx(plain + 0.5 * metrics["aux_loss"][-1], rel=1e-5)


def test_whether_the_experts_train_is_said(mixture, make_job, caplog):
    with caplog.at_level("INFO"):
        build_sft(replace(make_job("sft"), base=mixture))
    assert "leaves frozen the stacked weights experts.down_proj, experts.gate_up_proj" in caplog.text
