"""Training with and without the packed forward follows one curve (fp32)."""

import dataclasses

import pytest

from preftune.stages.dpo import build_dpo
from preftune.stages.kto import build_kto
from preftune.stages.reward import build_reward
from preftune.stages.sft import build_sft

BUILD = {"sft": build_sft, "reward": build_reward, "dpo": build_dpo, "kto": build_kto}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BUILD)
def test_fifty_steps_agree(make_job, sft_folder, kind):
    curves = []
    for packed in (True, False):
        job = make_job(kind, f"{kind}-{packed}", parent=sft_folder, train={"max_steps": 50, "learning_rate": 1e-3})
        stage = BUILD[kind](dataclasses.replace(job, packed=packed))
        stage.trainer.train()
        curves.append([entry["loss"] for entry in stage.trainer.state.log_history if "loss" in entry])
    packed, padded = curves
    assert len(packed) == 50
    assert packed[-1] < packed[0]
    assert packed == pytest.approx(padded, abs=1e-4)
