"""What trains is fp32 whatever the base is, and PPO in float16 is refused."""

from dataclasses import replace

import pytest
import torch
import transformers

from preftune.models import reward_model
from preftune.stages import run
from preftune.stages.dpo import build_dpo
from preftune.stages.method_problems import ppo_problems
from preftune.stages.ppo.config import PPOConfig
from preftune.stages.reward import build_reward
from preftune.stages.sft import build_sft


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_what_trains_on_a_quantised_base_stays_as_it_is(kind, make_job, sft_folder, monkeypatch):
    """TRL would round it to bfloat16, and a policy would no longer be its parent's copy."""

    def marked(plain):
        def load(*args, **kwargs):
            model = plain(*args, **kwargs)
            model.is_loaded_in_4bit, model.quantization_method = True, "bitsandbytes"
            return model

        return load

    monkeypatch.setattr(transformers.trainer, "validate_quantization_for_training", lambda model: None)
    for module in (run, reward_model):
        monkeypatch.setattr(module, "load_model", marked(module.load_model))
    job = replace(make_job(kind), parent=sft_folder)
    build = {"sft": build_sft, "dpo": build_dpo, "reward": build_reward}[kind]
    model = build(job).trainer.model
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert len(trained) > 10 and {each.dtype for each in trained.values()} == {torch.float32}
    assert any(not torch.equal(each, each.bfloat16().float()) for each in trained.values())
    if kind == "dpo":
        for name, each in trained.items():
            assert torch.equal(each, model.get_parameter(name.replace(".default.", ".ref.")))


def test_ppo_in_float16_is_refused(make_job):
    job = replace(make_job("sft"), dtype="float16")
    args = PPOConfig(output_dir=str(job.output_dir), use_cpu=True)
    assert "model.dtype: float16" in " ".join(map(str, ppo_problems(job, args)))
    assert "float16" not in " ".join(map(str, ppo_problems(replace(job, dtype="bfloat16"), args)))
    with pytest.raises(ValueError, match="fp16 is true"):
        PPOConfig(output_dir=str(job.output_dir), fp16=True, use_cpu=True)
