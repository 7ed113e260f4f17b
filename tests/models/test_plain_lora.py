"""Adapters from elsewhere: exactly what plain PEFT computes with them, or refused in words at every entrance."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from preftune.errors import UserError
from preftune.files import ADAPTER_CONFIG
from preftune.models.adapters import AdapterSet
from preftune.models.base import Base
from preftune.models.generate import sample
from preftune.models.loading import load_model
from preftune.models.lora import WEIGHTS, LoraSpec, read_adapter
from preftune.models.plain_lora import check_plain, target_names
from preftune.models.reward_model import create_reward_model, load_reward_model

from .conftest import IDS, logits

CAUSAL: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
REGEX = r"model\.layers\.[02]\.(self_attn\.[qv]_proj|mlp\.up_proj)"
EXACT: dict[str, dict[str, Any]] = {
    "names": {},
    "a regular expression": {"target_modules": REGEX},
    "single layers": {"layers_to_transform": [1, 2]},
    "a layer left out": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "PEFT's own choice": {"target_modules": None},
    "rank-stabilised": {"use_rslora": True},
    "another start": {"init_lora_weights": "gaussian"},
    "DoRA": {"use_dora": True},
    "rows of tokens": {"trainable_token_indices": [8, 30]},
    "ranks and scalings of their own": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 6}},
}
NOT_PLAIN: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "mica": {"init_lora_weights": "mica"},
    "modules_to_save": {"modules_to_save": ["norm"]},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [0]},
}
OTHERS = (
    IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    LoHaConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    VeraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
)


def bare(base: Base) -> Any:
    return AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)


def saved(base: Base, config: PeftConfig, folder: Path) -> Path:
    """An adapter that plain PEFT made and wrote, every weight of it moved."""
    model = get_peft_model(bare(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(str(folder))
    return folder


def plain_logits(base: Base, folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(bare(base), str(folder)).eval()(input_ids=IDS).logits


@pytest.mark.parametrize("kind", EXACT)
def test_plain_lora_of_any_form_is_exact_as_a_role_as_a_parent_saved_and_sampled(base: Base, tmp_path: Path, kind: str):
    folder = saved(base, LoraConfig(**{**CAUSAL, **EXACT[kind]}), tmp_path / "given")
    wanted = plain_logits(base, folder)
    spec = LoraSpec.of(folder)
    adapters = AdapterSet.create(load_model(base), base, spec, folder)
    adapters.load("ref", folder)
    for role in ("default", "ref"):
        torch.testing.assert_close(logits(adapters, role), wanted, rtol=0, atol=1e-5)
        adapters.save(role, tmp_path / role)
        torch.testing.assert_close(plain_logits(base, tmp_path / role), wanted, rtol=0, atol=1e-5)
        listed = json.loads((tmp_path / role / ADAPTER_CONFIG).read_text())["target_modules"]
        assert isinstance(listed, list) and all(len(name) > 1 for name in listed)
    if not spec.rank_pattern:
        wider = LoraSpec(
            spec.r * 4,
            spec.scaling() * spec.r * 4,
            target_modules="all-linear",
            use_dora=spec.use_dora,
            trainable_token_indices=spec.trainable_token_indices,
        )
        grown = AdapterSet.create(load_model(base), base, wider, folder)
        torch.testing.assert_close(logits(grown, "default"), wanted, rtol=0, atol=1e-5)
    prompt = IDS[0].tolist()
    model = PeftModel.from_pretrained(bare(base), str(folder)).eval()
    greedy = model.generate(
        input_ids=IDS[:1], attention_mask=torch.ones_like(IDS[:1]), max_new_tokens=8, do_sample=False, eos_token_id=1
    )[0, len(prompt) :].tolist()
    for merge in (True, False):
        drawn = sample(
            adapters, "ref", [prompt], max_new_tokens=8, eos_token_id=1, pad_token_id=0, seed=0, temperature=0,
            merge=merge,
        )  # fmt: skip
        assert drawn.tokens[0] == greedy


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_a_config_that_is_more_than_plain_lora_is_refused(kind: str):
    config = LoraConfig(**{**CAUSAL, **NOT_PLAIN[kind]})
    with pytest.raises(UserError, match=kind):
        check_plain(config, "here")
    if not kind.startswith(("pissa", "olora")):  # one that is asked for leaves the base alone
        with pytest.raises(UserError, match=kind):
            check_plain(config, "here", fresh=True)


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: config.peft_type.value)
def test_another_kind_of_adapter_is_refused(config: PeftConfig):
    with pytest.raises(UserError, match="expected plain LoRA"):
        check_plain(config, "here")


def test_every_field_of_peft_that_nobody_looked_at_is_refused_once_it_is_used():
    config: Any = LoraConfig(**CAUSAL)
    assert check_plain(config, "here") is config
    config.megatron_config = {"a": 1}
    with pytest.raises(UserError, match="megatron_config"):
        check_plain(config, "here")


@pytest.mark.parametrize("kind", ["bias", "pissa", "modules_to_save", "olora"])
def test_every_entrance_for_a_saved_adapter_refuses_it_and_leaves_all_as_it_was(
    base: Base, tokenizer: Any, make: Any, tmp_path: Path, kind: str
):
    folder = saved(base, LoraConfig(**{**CAUSAL, **NOT_PLAIN[kind]}), tmp_path / "given")
    adapters = make()
    before = (adapters.names, adapters.digest(None))
    entrances = (
        lambda: read_adapter(folder),
        lambda: LoraSpec.of(folder),
        lambda: adapters.load("ref", folder),
        lambda: AdapterSet.create(load_model(base), base, LoraSpec(r=4, alpha=8), folder),
        lambda: create_reward_model(base, tokenizer, LoraSpec(r=4, alpha=8), folder),
        lambda: load_reward_model(folder, base, tokenizer),
    )
    for enter in entrances:
        with pytest.raises(UserError, match="not plain LoRA"):
            enter()
    assert (adapters.names, adapters.digest(None)) == before


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_lora_on_the_embedding_or_the_head_is_refused(base: Base, make: Any, tmp_path: Path, module: str):
    config = LoraConfig(**{**CAUSAL, "target_modules": ["q_proj", module]})
    model: Any = get_peft_model(bare(base), config)
    with pytest.raises(UserError, match="rollouts and log-probs would leave out"):
        AdapterSet(model, base)
    folder = saved(base, config, tmp_path / "given")
    adapters = make()
    with pytest.raises(UserError, match=module):
        adapters.load("ref", folder)
    assert adapters.names == ["default"] and type(adapters.causal.get_input_embeddings()) is torch.nn.Embedding
    with pytest.raises(UserError, match=module):
        LoraSpec(target_modules=["q_proj", module]).config(load_model(base), "CAUSAL_LM")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["q_proj", "o_proj", "v_porj"], "'v_porj' matches no module.*did you mean 'v_proj'"),
        (["nothing"], "'nothing' matches no module"),
        (["self_attn"], "'self_attn' is a LlamaAttention, no linear layer"),
        (["input_layernorm"], "no linear layer"),
    ],
)
def test_target_modules_that_match_nothing_are_an_error_each(base: Base, names: list[str], words: str):
    with pytest.raises(UserError, match=words):
        AdapterSet.create(load_model(base), base, LoraSpec(target_modules=names))


def test_targets_of_a_config_become_names_that_say_the_same(base: Base):
    model = load_model(base)
    assert target_names(model, LoraConfig(target_modules=r".*\.[qk]_proj")) == ["k_proj", "q_proj"]
    assert target_names(model, LoraConfig(target_modules="all-linear")) == "all-linear"
    one = LoraConfig(target_modules=["q_proj"], layers_to_transform=1)
    assert target_names(model, one) == ["model.layers.1.self_attn.q_proj"]
    with pytest.raises(UserError, match="matches no module"):
        target_names(model, LoraConfig(target_modules=r"nothing.*"))
    with pytest.raises(UserError, match="none given beside target_parameters"):
        target_names(model, LoraConfig(target_parameters=["experts.down_proj"]))


def test_a_field_of_a_newer_peft_and_weights_that_are_no_numbers_are_refused(base: Base, make: Any, tmp_path: Path):
    make().save("default", tmp_path)
    file = tmp_path / ADAPTER_CONFIG
    whole = file.read_text()
    file.write_text(json.dumps(json.loads(whole) | {"use_something_new": True}))
    with pytest.raises(UserError, match="use_something_new=True is nothing that this PEFT knows"):
        read_adapter(tmp_path)
    file.write_text(whole)
    tensors = load_file(tmp_path / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match="NaN"):
        read_adapter(tmp_path)


def test_an_adapter_that_brings_whole_weights_is_refused(base: Base, tmp_path: Path):
    model: Any = get_peft_model(bare(base), LoraConfig(**CAUSAL))
    model.save_pretrained(str(tmp_path), save_embedding_layers=True)  # as PEFT does where the vocabulary has grown
    with pytest.raises(UserError, match="whole weights"):
        read_adapter(tmp_path)
