"""A quantised base is an ordinary base with other weights: the numbers, what trains on it, and what reads it."""

import importlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPTNeoXConfig, PreTrainedConfig

from preftune.errors import UserError
from preftune.models.adapters import DEFAULT, AdapterSet
from preftune.models.base import Base
from preftune.models.generate import sample
from preftune.models.loading import load_model, quantization_config, resolve_base
from preftune.models.lora import LoraSpec
from preftune.models.merging import merge_adapter
from preftune.models.quantised import (
    EightBitLinear,
    FourBitLinear,
    QuantisedLinear,
    hold_packed,
    is_quantised,
    pack,
    unpack,
)

from .conftest import IDS, logits, shake

BITS = ("4bit", "8bit")
SHAPES = [(128, 64), (96, 100), (7, 66), (33, 65), (33, 48), (8, 1376), (4, 32), (1, 64), (300, 2)]
LORA = LoraSpec(r=4, alpha=8)

# QLoRA, arXiv 2305.14314, appendix E
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def quantised(
    base: Base, bits: Any, dtype: torch.dtype = torch.float32, *, whole: bool = False, dropout: float = 0.0
) -> AdapterSet:
    """A quantised base, or one with ordinary layers of the same weights, with an adapter that changes it."""
    model = load_model(base, dtype=dtype, quantization=bits)
    if whole:
        unpack(model)
    adapters = AdapterSet.create(model, base, LoraSpec(r=4, alpha=8, dropout=dropout))
    shake(adapters, DEFAULT)
    return adapters


def packed_layers(model: torch.nn.Module) -> list[QuantisedLinear]:
    return [each for each in model.modules() if isinstance(each, QuantisedLinear)]


class _One(torch.nn.Module):
    """A model that is one linear layer."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        outputs, inputs = shape
        self.layer = torch.nn.Linear(inputs, outputs, bias=False, dtype=dtype)

    def get_output_embeddings(self) -> None:
        return None


@pytest.mark.checklist("Q1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(128, 64), (96, 100), (7, 66), (33, 65), (33, 48), (8, 1376), (4, 32), (1, 64), (300, 2)]
)
def test_q01_four_bits_are_the_nearest_of_sixteen_numbers_times_the_blocks_largest(shape, dtype):
    """In blocks of 64 weights, wherever rows end: bitsandbytes' kernels go astray at some of these shapes."""
    model = _One(shape, dtype)
    weight = model.layer.weight.detach().float().clone()
    pack(model, "4bit")  # pyright: ignore[reportArgumentType]: all that it asks for is there
    layer: Any = model.layer
    assert isinstance(layer, FourBitLinear) and layer.weight.dtype == torch.uint8
    found = layer.unpacked()
    assert found.dtype == dtype and found.shape == shape
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    largest = flat.abs().amax(-1, keepdim=True)
    code = torch.tensor(NF4)
    nearest = code[(flat[..., None] / largest[..., None] - code).abs().argmin(-1)] * largest
    expected = nearest.flatten()[: weight.numel()].view(shape)
    # the block's largest is itself held in 8 bits, of a block of 256 blocks
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02 * float(largest.max()))
    assert float((found.float() - weight).abs().max()) < 0.17 * float(largest.max())


@pytest.mark.checklist("Q1")
def test_q01_eight_bits_are_127_steps_of_each_rows_largest():
    model = _One((32, 100), torch.float32)
    weight = model.layer.weight.detach().clone()
    pack(model, "8bit")  # pyright: ignore[reportArgumentType]: as above
    layer = model.layer
    assert isinstance(layer, EightBitLinear) and layer.weight.dtype == torch.int8
    step = weight.half().float().abs().amax(-1, keepdim=True) / 127
    torch.testing.assert_close(layer.unpacked(), (weight.half().float() / step).round() * step, rtol=1e-5, atol=1e-6)


@pytest.mark.checklist("Q1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_q01_it_is_an_ordinary_base_with_other_weights(base, bits, dtype):
    """Bit for bit: logits and the adapter's gradients, of rows and of one token, training or not."""
    packed, plain = (quantised(base, bits, dtype, whole=whole) for whole in (False, True))
    assert len(packed_layers(packed.model)) == 28 and not packed_layers(plain.model)
    low = dtype != torch.float32
    for training in (False, True):
        for ids in (IDS, IDS[:1, :1]):
            found = []
            for each in (packed, plain):
                each.model.train(training)
                each.model.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
                    out = each.model(input_ids=ids).logits
                out.float().logsumexp(-1).sum().backward()
                grads = [each.grad for each in each.parameters(DEFAULT)]
                assert all(grad is not None for grad in grads)
                found.append((out.detach(), grads))
            torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.checklist("Q1")
@pytest.mark.parametrize("bits", BITS)
def test_q01_an_adapter_that_fused_does_not_serve_runs_as_pefts(base, bits):
    """Two bases, one of them unpacked, with dropout in force: PEFT's own forward."""
    found = []
    for each in (quantised(base, bits, whole=whole, dropout=0.5) for whole in (False, True)):
        each.model.train()
        torch.manual_seed(0)
        out = each.model(input_ids=IDS).logits
        out.sum().backward()
        found.append((out.detach(), [each.grad for each in each.parameters(DEFAULT)]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.checklist("Q2")
@pytest.mark.parametrize("bits", BITS)
def test_q02_what_trains_is_fp32_and_the_base_stays_as_it_is(base, bits):
    adapters = quantised(base, bits, torch.bfloat16)
    adapters.add_head("value", bias=True)
    trained = [each for each in adapters.model.parameters() if each.requires_grad]
    assert len(trained) == 56 and {each.dtype for each in trained} == {torch.float32}
    assert {each.dtype for each in adapters.heads["value"].parameters()} == {torch.float32}
    before, learned = adapters.digest(None), adapters.digest(DEFAULT)
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    for training in (False, True):
        adapters.model.train(training)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            adapters.model(input_ids=IDS).logits.float().logsumexp(-1).sum().backward()
        optimizer.step()
    assert adapters.digest(None) == before and adapters.digest(DEFAULT) != learned
    # its scales count too
    layer = packed_layers(adapters.model)[0]
    with torch.no_grad():
        layer.get_parameter("absmax")[0] += 1
    assert adapters.digest(None) != before


@pytest.mark.checklist("Q3")
@pytest.mark.parametrize("bits", BITS)
def test_q03_an_adapter_loads_on_the_base_as_it_is_and_the_other_way_round(base, bits, make, tmp_path):
    quantised(base, bits).save(DEFAULT, tmp_path / "a")
    plain = make()
    plain.load("other", tmp_path / "a")
    assert plain.digest("other") == quantised(base, bits).digest(DEFAULT)
    peft: Any = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(peft(input_ids=IDS).logits, logits(plain, "other"))
    assert "quantization" not in (tmp_path / "a" / "adapter_config.json").read_text()
    plain.save(DEFAULT, tmp_path / "b")
    packed = quantised(base, bits)
    packed.load("other", tmp_path / "b")
    assert packed.digest("other") == plain.digest(DEFAULT)


@pytest.mark.checklist("Q4")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_q04_what_is_drawn_has_the_log_probs_of_the_whole_row(base, bits, dtype, caplog):
    """Rollouts beside the quantised base, by the fastest way of decoding; rows do not depend on their neighbours."""
    adapters = quantised(base, bits, dtype)
    asked: dict[str, Any] = dict(max_new_tokens=8, eos_token_id=-1, pad_token_id=0, seed=3)
    prompts = [[8, 30, 60, 61], [9, 9], [200, 17, 40, 11, 5]]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
        found = sample(adapters, DEFAULT, prompts, **asked)
        alone = [sample(adapters, DEFAULT, [prompt], first=i, **asked) for i, prompt in enumerate(prompts)]
        for i, (prompt, tokens) in enumerate(zip(prompts, found.tokens, strict=True)):
            row = torch.tensor([prompt + tokens])
            hidden = adapters.hidden(DEFAULT, row, torch.ones_like(row))[0, len(prompt) - 1 : -1]
            expected = adapters.head.logits(hidden).float().log_softmax(-1)
            close = 1e-5 if dtype == torch.float32 else 0.1
            at = torch.tensor(tokens)[:, None]
            torch.testing.assert_close(
                torch.tensor(found.logprobs[i]), expected.gather(-1, at)[:, 0].detach(), rtol=0, atol=close
            )
            assert dtype != torch.float32 or alone[i].tokens[0] == tokens
    assert "completions are drawn" not in caplog.text
    assert not any(hasattr(each, "_hf_hook") for each in adapters.model.modules())


def saved(config: PreTrainedConfig, folder: Path) -> Base:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return resolve_base(str(folder))


def test_a_head_of_another_name_stays_whole_and_transposed_layers_are_turned(tmp_path):
    sizes: dict[str, Any] = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    neox = load_model(saved(GPTNeoXConfig(**sizes, intermediate_size=48), tmp_path / "neox"), quantization="4bit")
    assert type(neox.get_output_embeddings()) is torch.nn.Linear and len(packed_layers(neox)) == 8
    gpt2 = saved(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64), tmp_path / "gpt2")
    plain, packed = load_model(gpt2), load_model(gpt2, quantization="8bit")
    assert len(packed_layers(packed)) == 8
    ids = IDS % 64
    with torch.no_grad():
        torch.testing.assert_close(packed(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=0, atol=0.02)
    adapters = AdapterSet.create(packed, gpt2, LORA)
    adapters.save(DEFAULT, tmp_path / "a")
    AdapterSet.create(plain, gpt2, LORA).load("other", tmp_path / "a")


@pytest.mark.parametrize("bits", BITS)
def test_a_model_that_a_user_has_quantised_computes_as_ours(base, bits):
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        base.path, quantization_config=quantization_config(bits, torch.float32), dtype=torch.float32
    )
    assert theirs.is_quantized and theirs.hf_quantizer is not None
    assert hold_packed(theirs) and not theirs.is_quantized and theirs.hf_quantizer is None
    assert not hold_packed(theirs) and is_quantised(theirs)
    assert not hasattr(theirs, "is_loaded_in_4bit") and not hasattr(theirs.config, "quantization_config")
    ours = load_model(base, quantization=bits)
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=IDS).logits, ours(input_ids=IDS).logits)
    assert not hold_packed(load_model(base))


def test_scales_that_bitsandbytes_has_rounded_in_a_forward_are_refused(base):
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        base.path, quantization_config=quantization_config("4bit", torch.float32), dtype=torch.float32
    ).eval()
    # as its layers mark themselves after a forward on a CPU with bf16 instructions
    theirs.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UserError, match="have computed without training"):
        hold_packed(theirs)


def test_scales_without_scales_of_their_own_and_the_other_code(base):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float32)
    theirs: Any = AutoModelForCausalLM.from_pretrained(base.path, quantization_config=config, dtype=torch.float32)
    library: Any = importlib.import_module("bitsandbytes.functional")
    weight = theirs.model.layers[0].mlp.up_proj.weight
    expected = library.dequantize_4bit(weight.data, weight.quant_state)
    assert hold_packed(theirs)
    assert torch.equal(theirs.model.layers[0].mlp.up_proj.unpacked(), expected)


@pytest.mark.checklist("Q5")
@pytest.mark.parametrize("bits", BITS)
def test_q05_a_merged_model_is_the_base_as_the_adapter_knew_it(base, bits, tmp_path):
    adapters = quantised(base, bits)
    adapters.save(DEFAULT, tmp_path / "a")
    config: dict[str, Any] = {"dtype": "float32", "quantization": bits}
    lineage = {"format": 1, "stage": "sft", "kind": "sft", "parents": [], "seed": 0, "versions": {}}
    place = {"spec": base.spec, "revision": None, "sha256": base.sha256}
    lineage |= {
        "base": place,
        "data": {"spec": {}, "fingerprint": ""},
        "tokenizer": {},
        "config": config,
        "created": "",
        "seconds": 0.0,
    }
    (tmp_path / "a" / "lineage.json").write_text(json.dumps(lineage))
    merged = merge_adapter(tmp_path / "a", tmp_path / "merged")
    assert merged.unpacked == bits and merged.dtype == "float32"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, logits(adapters, DEFAULT), rtol=0, atol=1e-4)


def test_a_base_that_is_quantised_already_is_held_so_and_not_quantised_again(base, tmp_path):
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        base.path, quantization_config=quantization_config("4bit", torch.float32), dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "packed")
    packed = resolve_base(str(tmp_path / "packed"))
    with pytest.raises(UserError, match=r"is quantised already \(bitsandbytes\); leave it out"):
        load_model(packed, quantization="8bit")
    found, expected = load_model(packed), load_model(base, quantization="4bit")
    assert len(packed_layers(found)) == 28 and packed.sha256 != base.sha256
    with torch.no_grad():
        assert torch.equal(found(input_ids=IDS).logits, expected(input_ids=IDS).logits)


def test_without_bitsandbytes_and_under_zero3_it_is_refused(base, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
        with pytest.raises(UserError, match=r"4bit needs bitsandbytes; pip install 'preftune\[quantization\]'"):
            load_model(base, quantization="4bit")
    monkeypatch.setattr("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(UserError, match="ZeRO-3 divides the base's weights"):
        load_model(base, quantization="4bit")
