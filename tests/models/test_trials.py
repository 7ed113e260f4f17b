"""What a base is tried on when it is opened: what it does otherwise than most falls back, or is refused in words."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    LlamaForCausalLM,
    LongcatFlashConfig,
    MambaConfig,
    Phi3Config,
    PreTrainedModel,
    RecurrentGemmaConfig,
    Zamba2Config,
)

from preftune.errors import UserError
from preftune.models import generate
from preftune.models.adapters import AdapterSet
from preftune.models.base import Base
from preftune.models.causal import decoder_of, head_of
from preftune.models.cost import adapter_parameters
from preftune.models.decoder import Decoder, LibraryDecoder
from preftune.models.generate import decoder_for, merged, sample
from preftune.models.loading import resolve_base
from preftune.models.lora import LoraSpec, linear_names, lora_state
from preftune.models.merging import merge_adapter
from preftune.models.packing import use_packed_forward
from preftune.models.reward_model import create_reward_model
from preftune.models.tiny import byte_tokenizer
from preftune.models.tokens import load_tokenizer

SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
LATENT: dict[str, Any] = {
    **SMALL,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
PROMPTS = [[5, 6, 7, 8, 9, 10], [5, 6, 7], [11, 12, 13, 14]]


def small(config: Any = None, kind: Any = None) -> PreTrainedModel:
    torch.manual_seed(0)
    config = config or LlamaConfig(**SMALL)
    made = AutoModelForCausalLM.from_config(config) if kind is None else kind(config)
    return made.requires_grad_(False).eval()


def adapted(model: PreTrainedModel, **lora: Any) -> AdapterSet:
    adapters = AdapterSet.create(model, Base("x", Path("x"), None, ""), LoraSpec(r=2, alpha=4, **lora))
    with torch.no_grad():
        for parameter in adapters.parameters("default"):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return adapters


def drawn(adapters: AdapterSet, **settings: Any) -> Any:
    return sample(
        adapters, "default", PROMPTS, **{"max_new_tokens": 6, **settings}, eos_token_id=2, pad_token_id=0, seed=0
    )


def own_logprobs(adapters: AdapterSet, prompt: list[int], reply: list[int]) -> torch.Tensor:
    """Of one row by itself, by the model's own forward."""
    with torch.no_grad(), adapters.using("default"):
        logits = adapters.causal(input_ids=torch.tensor([prompt + reply]), use_cache=False).logits[0].log_softmax(-1)
    return logits[len(prompt) - 1 : -1].gather(1, torch.tensor(reply)[:, None]).squeeze(1)


class OddHead(LlamaForCausalLM):
    """Its logits are more than a product of its states."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output: Any = super().forward(*args, **kwargs)
        output.logits = 4 * torch.tanh(output.logits / 3) - output.logits.square() / 20
        return output


def test_a_head_that_does_more_is_run_by_transformers(caplog):
    model = small(kind=OddHead)
    head = head_of(model)
    assert head.own is not None and "transformers' own head" in caplog.text
    hidden = torch.randn(7, 32, requires_grad=True)
    targets = torch.arange(20, 27)
    logps, entropy = head.token_logprobs(hidden, targets, 0.7, chunk=3)
    (gradient,) = torch.autograd.grad(logps.sum(), hidden)
    raw = model.lm_head(hidden)
    expected = ((4 * torch.tanh(raw / 3) - raw.square() / 20) / 0.7).log_softmax(-1)
    torch.testing.assert_close(logps, expected.gather(1, targets[:, None]).squeeze(1))
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1))
    wanted = torch.autograd.grad(expected.gather(1, targets[:, None]).sum(), hidden)[0]
    torch.testing.assert_close(gradient, wanted)
    assert head_of(small()).own is None


def test_completions_of_such_a_head_carry_its_log_probs():
    adapters = adapted(small(kind=OddHead))
    out = drawn(adapters)
    for prompt, reply, logps in zip(PROMPTS, out.tokens, out.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(logps), own_logprobs(adapters, prompt, reply), atol=1e-5, rtol=0)


def test_a_model_whose_states_see_later_tokens_is_refused():
    model = small()
    for layer in decoder_of(model).layers:  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues]
        plain = layer.self_attn.forward
        layer.self_attn.forward = lambda *, hidden_states, f=plain, **k: (
            f(hidden_states=hidden_states, **k)[0] + hidden_states.mean(1, True),
            None,
        )
    with pytest.raises(UserError, match="with the tokens after it"):
        head_of(model)
    backbone = decoder_of(model)
    use_packed_forward(backbone)
    with pytest.raises(UserError, match="with the tokens after it"):
        backbone(input_ids=torch.tensor([[4, 5], [6, 0]]), attention_mask=torch.tensor([[1, 1], [1, 0]]))


def test_rows_that_padding_would_change_are_computed_apart(caplog):
    model = small()
    backbone: Any = decoder_of(model)
    plain = backbone.forward

    def disturbed(input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        """Whoever hands it a mask gets other numbers."""
        output = plain(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        output.last_hidden_state = output.last_hidden_state * (1.0 if attention_mask is None else 1.5)
        return output

    backbone.forward = disturbed
    use_packed_forward(backbone)
    ids, mask = (
        torch.tensor([[4, 5, 6, 7], [8, 9, 0, 0], [0, 0, 10, 11]]),
        torch.tensor([[1] * 4, [1, 1, 0, 0], [0, 0, 1, 1]]),
    )
    with torch.no_grad():
        found = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        own = [
            plain(input_ids=row[kept][None]).last_hidden_state[0] for row, kept in zip(ids, mask.bool(), strict=True)
        ]
    torch.testing.assert_close(found[mask.bool()], torch.cat(own))
    assert "computed apart" in caplog.text


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (LlamaConfig(**SMALL), Decoder),
        (DeepseekV3Config(**LATENT), Decoder),  # values narrower than keys
        (MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, state_size=4), LibraryDecoder),
    ],
    ids=lambda each: getattr(each, "model_type", ""),
)
@pytest.mark.parametrize("merge", [True, False])
def test_the_sampler_that_agrees_is_taken(config, kind, merge):
    adapters = adapted(small(config))
    assert decoder_for(adapters) is kind
    out = drawn(adapters, merge=merge, batch_size=2)
    assert out.tokens == drawn(adapters, merge=merge, batch_size=1).tokens
    for prompt, reply, logps in zip(PROMPTS, out.tokens, out.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(logps), own_logprobs(adapters, prompt, reply), atol=1e-4, rtol=0)


def test_what_a_model_keeps_in_its_modules_does_not_reach_the_next_prompt(monkeypatch):
    """RecurrentGemma takes a prompt of one token for the next token of the batch before."""
    sizes: dict[str, Any] = {"num_hidden_layers": 3, "lru_width": 32, "head_dim": 8, "attention_window_size": 4}
    config = RecurrentGemmaConfig(**SMALL | sizes)
    adapters = adapted(small(config))
    assert decoder_for(adapters) is LibraryDecoder
    prompt = [7]
    settings: dict[str, Any] = {"max_new_tokens": 5, "eos_token_id": -1, "pad_token_id": 0, "seed": 0}
    for _ in range(2):
        out = sample(adapters, "default", [prompt], **settings)
        wanted = own_logprobs(adapters, prompt, out.tokens[0])
        torch.testing.assert_close(torch.tensor(out.logprobs[0]), wanted, atol=1e-4, rtol=0)
    # the trial would say so if the state were not let go of, and if nothing else helped
    monkeypatch.setattr(LibraryDecoder, "_forget", lambda self, requests: None)
    monkeypatch.setattr(generate, "_DECODERS", (Decoder, LibraryDecoder))
    with pytest.raises(UserError, match="by transformers' generate, prompts of one length together it is off"):
        decoder_for(adapted(small(config)))


def test_a_cache_that_a_model_forgets_is_noticed(caplog):
    """Its layers keep nothing of what the step before has said."""
    model = small()
    backbone: Any = decoder_of(model)
    for layer in backbone.layers:
        plain = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, f=plain, past_key_values=None, **k: f(*a, past_key_values=None, **k)
    assert decoder_for(adapted(model)).words.startswith("with a whole forward")
    assert "completions are drawn with a whole forward for every token" in caplog.text


def test_factors_that_depend_on_length_do_not_mix_rows():
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "factor": 4.0,
        "original_max_position_embeddings": 6,
    }
    model = small(Phi3Config(**SMALL, original_max_position_embeddings=6, rope_parameters=longrope))
    backbone: Any = decoder_of(model)
    rows = [torch.arange(3, 12), torch.arange(3, 8), torch.arange(20, 28), torch.arange(3, 9)]
    with torch.no_grad():
        own = [backbone(input_ids=row[None]).last_hidden_state[0] for row in rows]
        ids, mask = (
            torch.nn.utils.rnn.pad_sequence(each, batch_first=True)
            for each in (rows, [torch.ones_like(row) for row in rows])
        )
        for packed in (False, True):
            model = small(model.config)
            use_packed_forward(decoder_of(model), packed)
            found = decoder_of(model)(input_ids=ids, attention_mask=mask).last_hidden_state
            torch.testing.assert_close(found[mask.bool()], torch.cat(own), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="goes past 6, where this base's rotary factors change"):
        drawn(adapted(model))
    assert len(drawn(adapted(small(model.config)), recompute=True, max_new_tokens=3).tokens) == 3


def test_rows_whose_factors_no_other_length_shares_are_refused():
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = small(LlamaConfig(**SMALL, max_position_embeddings=8, rope_parameters=dynamic))
    backbone = decoder_of(model)
    use_packed_forward(backbone)
    backbone(input_ids=torch.tensor([[4] * 8]), attention_mask=torch.ones(1, 8))
    with pytest.raises(UserError, match="keep rows within 8 tokens"):
        backbone(input_ids=torch.tensor([[4] * 9]), attention_mask=torch.ones(1, 9))


def test_all_linear_is_what_an_adapter_can_serve():
    """Not Mamba's projections that a kernel takes by their weights, nor layers that have a number for a name."""
    assert linear_names(small(MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, state_size=4))) == [
        "in_proj"
    ]
    config: Any = Zamba2Config  # whose fields the decorator of transformers hides from type checkers
    hybrid = config(
        **SMALL, layers_block_type=["mamba", "hybrid"], mamba_d_state=4, n_mamba_heads=4, mamba_headdim=16,
        mamba_ngroups=1, num_mem_blocks=1, attention_head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    names = linear_names(small(hybrid))
    assert {"in_proj", "q_proj", "gate_up_proj"} <= set(names) and not {"0", "1", "out_proj"} & set(names)
    adapted(small(hybrid))


def test_experts_that_are_adapted_sample_merge_and_chain(tmp_path, caplog):
    with caplog.at_level("INFO"):
        adapters = adapted(small(DeepseekV3Config(**LATENT)))
    assert "trains the stacked weights experts.down_proj, experts.gate_up_proj" in caplog.text
    assert "leaves out the layers down_proj, gate_proj, up_proj" in caplog.text
    config: Any = adapters.model.peft_config["default"]
    assert config.target_parameters  # PEFT's own choice for "all-linear" here
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad(), adapters.using("default"):
        beside = adapters.model(input_ids=ids).logits
    with torch.no_grad(), merged(adapters, "default"):
        within = adapters.model(input_ids=ids).logits
    torch.testing.assert_close(within, beside, atol=1e-4, rtol=0)
    adapters.save("default", tmp_path)
    child = adapted(small(DeepseekV3Config(**LATENT)))
    child.load("ref", tmp_path)
    with torch.no_grad(), child.using("ref"):
        torch.testing.assert_close(child.model(input_ids=ids).logits, beside)
    trained = sum(each.numel() for each in adapters.parameters("default"))
    assert adapter_parameters(DeepseekV3Config(**LATENT), LoraSpec(r=2, alpha=4)) == trained
    base = Base("x", Path("x"), None, "")
    again = AdapterSet.create(small(DeepseekV3Config(**LATENT)), base, LoraSpec.of(tmp_path), tmp_path)
    with torch.no_grad(), again.using("default"):
        torch.testing.assert_close(again.model(input_ids=ids).logits, beside)


@pytest.mark.parametrize(
    "asked",
    [
        {"rank_pattern": {"gate_proj": 4}},
        {"alpha_pattern": {"q_b_proj": 4}},
        {"layers_to_transform": [1]},
        {"target_modules": r".*_proj"},
    ],
)
def test_what_is_said_of_layers_whose_experts_are_adapted_in_their_place_is_refused(asked: dict[str, Any]):
    with pytest.raises(UserError, match="in the place of the layers named"):
        adapted(small(DeepseekV3Config(**LATENT)), **asked)


def test_experts_that_are_named_are_trained_and_chain(tmp_path):
    names = ["experts.gate_up_proj", "experts.down_proj"]
    asked: dict[str, Any] = {"target_modules": ["q_a_proj"], "target_parameters": names}
    adapters = adapted(small(DeepseekV3Config(**LATENT)), **asked)
    state = lora_state(adapters._layers, "default")
    assert {name.partition(".mlp.")[2].replace(".base_layer", "") for name in state if ".mlp." in name} == {
        "experts.lora_A.weight",
        "experts.lora_B.weight",
    }
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad(), adapters.using("default"):
        beside = adapters.model(input_ids=ids).logits
    with torch.no_grad(), merged(adapters, "default"):
        torch.testing.assert_close(adapters.model(input_ids=ids).logits, beside, atol=1e-4, rtol=0)
    adapters.save("default", tmp_path)
    plain = PeftModel.from_pretrained(small(DeepseekV3Config(**LATENT)), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, beside, atol=1e-5, rtol=0)
    base = Base("x", Path("x"), None, "")
    lora = LoraSpec(r=2, alpha=4, **asked)
    child = AdapterSet.create(small(DeepseekV3Config(**LATENT)), base, lora, tmp_path)
    assert child.digest("default") == adapters.digest("default")
    with pytest.raises(UserError, match="no linear layer"):
        adapted(small(DeepseekV3Config(**LATENT)), **asked, init_lora_weights="pissa")
    with pytest.raises(UserError, match=r"[Dd]o[Rr][Aa]"):
        adapted(small(DeepseekV3Config(**LATENT)), **asked, use_dora=True)


def test_a_weight_that_layers_share_is_not_merged():
    """Each of its layers has a change of its own: one matrix cannot hold them all."""
    model: Any = small()
    decoder: Any = decoder_of(model)
    decoder.layers[1].mlp.up_proj.weight = decoder.layers[0].mlp.up_proj.weight
    adapters = adapted(model)
    out = drawn(adapters)
    for prompt, reply, logps in zip(PROMPTS, out.tokens, out.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(logps), own_logprobs(adapters, prompt, reply), atol=1e-5, rtol=0)


def test_experts_that_are_adapted_merge_into_a_model(tmp_path):
    tokenizer = byte_tokenizer()
    model = small(DeepseekV3Config(**{**LATENT, "vocab_size": len(tokenizer)}))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = resolve_base(str(tmp_path / "base"))
    adapters = AdapterSet.create(model, base, LoraSpec(r=2, alpha=4))
    with torch.no_grad():
        for parameter in adapters.parameters("default"):
            parameter.add_(0.1)
    adapters.save("default", tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", "bfloat16")
    merged_model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad(), adapters.using("default"):
        torch.testing.assert_close(merged_model(ids).logits, adapters.model(ids).logits, atol=0.15, rtol=0)


def test_a_router_that_is_never_called_gets_no_adapter(tmp_path):
    """LongCat's reads its weight alone: an adapter would run merged and not beside. In a reward model PEFT would train
    it whole, because it is called classifier."""
    sizes: dict[str, Any] = {
        **{key: each for key, each in LATENT.items() if not key.startswith("n_") and "moe" not in key},
        **{"num_layers": 1, "num_hidden_layers": 2, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "head_dim": 4},
        **{"qk_head_dim": 12, "moe_topk": 2, "n_routed_experts": 4, "zero_expert_num": 2},
    }
    config = LongcatFlashConfig(**sizes)
    model = small(config)
    assert "classifier" not in linear_names(model) and "q_a_proj" in linear_names(model)
    tokenizer: Any = byte_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base = resolve_base(str(tmp_path))
    with pytest.raises(UserError, match=r"PEFT would train model\.layers\.0\.mlp\.router\.classifier whole"):
        create_reward_model(base, load_tokenizer(base), LoraSpec(r=2, alpha=4))
