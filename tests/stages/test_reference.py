"""The reference's log-probs computed ahead: the same loss as live ones, and a cache that never serves another run."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_from_disk
from trl.trainer.dpo_config import DPOConfig

from preftune.data.encode import encode_pairs
from preftune.models.adapters import AdapterSet
from preftune.models.loading import load_model
from preftune.models.lora import LoraSpec
from preftune.models.tokens import load_tokenizer
from preftune.stages.dpo import DPOStageTrainer, build_dpo
from preftune.stages.kto import build_kto
from preftune.stages.options import stage_config
from preftune.stages.run import load_data


@pytest.mark.parametrize("build", [build_dpo, build_kto])
def test_precomputed_reference_gives_the_same_loss(make_job, sft_folder: Path, build: Callable[..., Any]) -> None:
    losses = []
    for name, ahead in (("live", False), ("ahead", True)):
        kind = build.__name__.removeprefix("build_")
        train = {"precompute_ref_log_probs": ahead, "max_steps": 3}
        stage = build(make_job(kind, f"{kind}-{name}", parent=sft_folder, train=train))
        stage.trainer.train()
        losses.append([entry["loss"] for entry in stage.trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class Runs:
    """DPO trainers over one dataset on disk, where TRL keeps its cache: how often did each compute the reference?"""

    def __init__(self, job: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.job, self.folder, self.forwards = job, folder, 0
        true = DPOStageTrainer.compute_ref_log_probs

        def listen(trainer: Any, *args: Any) -> Any:
            self.forwards += 1
            return true(trainer, *args)

        monkeypatch.setattr(DPOStageTrainer, "compute_ref_log_probs", listen)
        load_data(job, encode_pairs, load_tokenizer(job.base)).train.save_to_disk(folder)

    def run(
        self, *, alpha: int = 8, push: float = 0.1, rows: int = 12, template: str | None = None, **given: Any
    ) -> Any:
        """(forwards that it took, chosen log-probs)."""
        tokenizer = load_tokenizer(self.job.base, template)
        adapters = AdapterSet.create(load_model(self.job.base), self.job.base, LoraSpec(r=4, alpha=alpha))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in adapters.parameters("default"):
                parameter.add_(push * torch.randn(parameter.shape, generator=generator))
        dataset = load_from_disk(str(self.folder))
        assert isinstance(dataset, Dataset)
        job = dataclasses.replace(
            self.job,
            train={"per_device_train_batch_size": 4, "precompute_ref_log_probs": True, **given.pop("train", {})},
            method=given.pop("method", {}),
        )
        args = stage_config(DPOConfig, job, held_out=False, max_length=given.pop("max_length", None), **given)
        self.forwards = 0
        trainer = DPOStageTrainer(
            model=adapters.model,
            args=args,
            train_dataset=dataset.select(range(rows)),
            processing_class=tokenizer,
        )
        assert trainer.train_dataset is not None
        return self.forwards, torch.tensor(trainer.train_dataset["ref_chosen_logps"][:])


CHANGES = {
    "data": {"rows": 8},
    "tokenizer": {"template": "default"},
    "adapter": {"push": 0.2},
    "scaling": {"alpha": 16},
    "dtype": {"train": {"bf16": True}},
    "truncation": {"max_length": 24},
    "loss": {"method": {"ld_alpha": 0.5}},
}


@pytest.mark.checklist("D2")
def test_d02_cached_reference_log_probs_are_of_this_very_run(
    make_job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key: data, tokenizer, adapter with its scaling, dtype, truncation."""
    runs = Runs(make_job("dpo"), tmp_path / "data", monkeypatch)
    forwards, first = runs.run()
    assert forwards == 3
    forwards, again = runs.run()
    assert forwards == 0 and torch.equal(first, again)
    for name, change in CHANGES.items():
        forwards, other = runs.run(**change)
        assert forwards > 0, name
        if name != "tokenizer":  # these rows are encoded already
            assert not torch.equal(first, other), name
    assert runs.run()[0] == 0
