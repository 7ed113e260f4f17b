"""What a rehearsal counts is what the real step holds, tensor by tensor."""

import random
from collections.abc import Sequence

import pytest
import torch
from transformers import AutoConfig, Qwen3Config

from preftune.models.adapters import DEFAULT, AdapterSet
from preftune.models.base import Base
from preftune.models.batching import right_pad
from preftune.models.loading import Quantization, load_model
from preftune.models.lora import LoraSpec
from preftune.models.rehearsal import (
    ACTIVATIONS,
    GRADIENTS,
    LOGITS,
    Batch,
    Build,
    Ledger,
    Parts,
    forward_only,
    policy_step,
    rehearsed,
    score_step,
)
from preftune.models.tiny import RandomSpec

LORA = LoraSpec(r=4)


def rows(count: int = 6, shared: int = 30) -> list[list[int]]:
    draw = random.Random(1)
    start = [draw.randrange(8, 260) for _ in range(shared)]
    return [start + [draw.randrange(8, 260) for _ in range(draw.randint(30, 90))] for _ in range(count)]


def counted(
    base: Base,
    dtype: torch.dtype,
    batch: Sequence[list[int]],
    scored: int,
    *,
    backward: bool = True,
    quantization: Quantization | None = None,
) -> int:
    """Bytes that the real step makes at its peak, beside the weights."""
    model = load_model(base, dtype=dtype, quantization=quantization)
    adapters = AdapterSet.create(model, base, LORA)
    ids_BL, mask_BL = right_pad(batch, 0, torch.device("cpu"))
    head, low = adapters.head, dtype != torch.float32
    ledger = Ledger()
    for each in (*adapters.model.parameters(), *adapters.model.buffers()):
        ledger.leave_out(each)

    def step() -> None:
        with torch.set_grad_enabled(backward), adapters.using(DEFAULT):
            with torch.autocast("cpu", dtype=dtype if low else None, enabled=low):
                hidden = adapters.backbone(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).last_hidden_state
                at = torch.arange(scored) % (hidden.shape[0] * hidden.shape[1])
                loss = head.token_logprobs(hidden.flatten(0, 1)[at], torch.zeros_like(at))[0].sum()
            if backward:
                del hidden
                loss.backward()

    step()  # the first one also tries the packed forward
    adapters.model.zero_grad()
    with ledger:
        step()
    return ledger.peak.total()


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rehearsed_step_holds_what_the_real_one_holds(base: Base, dtype: torch.dtype, backward: bool):
    batch, scored = rows(), 200
    real = counted(base, dtype, batch, scored, backward=backward)
    shape = Batch.of(batch, scored, packed=True, device="cpu")
    build = Build(AutoConfig.from_pretrained(base.path), LORA, dtype)
    (found,) = rehearsed(build, [policy_step(shape) if backward else forward_only(shape)])
    assert found.total() == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_rehearsed_step_on_a_quantised_base_holds_what_the_real_one_holds(base: Base, bits: Quantization, backward):
    """Few tokens, so that the weights that are unpacked weigh: a quarter of what the step holds without them."""
    batch, scored = rows(2, shared=10), 20
    real = counted(base, torch.bfloat16, batch, scored, backward=backward, quantization=bits)
    shape = Batch.of(batch, scored, packed=True, device="cpu")
    build = Build(AutoConfig.from_pretrained(base.path), LORA, torch.bfloat16, bits)
    (found,) = rehearsed(build, [policy_step(shape) if backward else forward_only(shape)])
    assert found.total() == pytest.approx(real, rel=0.05)


def peak(config: object, build: Build, *, backward: bool = True) -> Parts:
    return rehearsed(build, [policy_step(Batch.even(2, 64, 40))])[0]


def build_of(layers: int, **changed: object) -> Build:
    config = Qwen3Config(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    return Build(**{"config": config, "lora": LORA, "dtype": torch.bfloat16, "device": "cuda", **changed})  # type: ignore[arg-type]


def test_a_few_layers_stand_for_many(monkeypatch: pytest.MonkeyPatch):
    batch = Batch.even(3, 50, 60)
    programs = [policy_step(batch), policy_step(batch, reference=True, passes=3), score_step(batch)]
    for checkpointing in (False, True):
        build = build_of(11, checkpointing=checkpointing)
        few = rehearsed(build, programs)
        with monkeypatch.context() as patch:
            patch.setattr("preftune.models.rehearsal._FEW", (99, 99))
            assert rehearsed(build, programs) == few


def test_what_costs_less_memory_is_seen_to():
    batch = Batch.even(4, 128, 200)
    step = [policy_step(batch)]
    plain = rehearsed(build_of(6), step)[0]
    again = rehearsed(build_of(6, checkpointing=True), step)[0]
    few_modules = rehearsed(build_of(6, lora=LoraSpec(r=4, target_modules=["q_proj"])), step)[0]
    assert again[ACTIVATIONS] < plain[ACTIVATIONS] / 3
    assert few_modules[ACTIVATIONS] < plain[ACTIVATIONS]
    # gradients that wait for a second micro-batch: 4 bytes of every trained parameter, at the least
    twice = rehearsed(build_of(6), [policy_step(batch, passes=2)])[0]
    trained = 6 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert twice[GRADIENTS] == trained * 4 > plain[GRADIENTS]
    assert twice.total() > plain.total()


def test_the_head_is_by_chunks_and_not_by_tokens():
    def logits(scored: int) -> int:
        return rehearsed(build_of(2, device="cpu"), [forward_only(Batch.even(8, 2048, scored))])[0][LOGITS]

    chunk = (6 << 20) // 300
    assert logits(chunk) <= logits(4 * chunk) < 1.2 * logits(chunk)
    assert logits(chunk // 4) < 0.5 * logits(chunk)


def test_a_batch_is_what_its_rows_share():
    batch = rows(4, shared=40)
    shape = Batch.of(batch, 0, packed=True, device="cuda")
    assert shape.tokens == 40 + sum(len(row) - 40 for row in batch)
    padded = Batch.of(batch, 0, packed=False, device="cuda")
    assert padded.tokens == 4 * max(map(len, batch))
    on_cpu = Batch.of(batch, 0, packed=True, device="cpu")
    assert on_cpu.tokens % 32 == 0 and sum(on_cpu.blocks) == on_cpu.tokens


def test_the_config_is_left_as_it_was():
    config = RandomSpec.read("random:llama").config()
    before = config.to_dict(), getattr(config, "_attn_implementation", None)
    rehearsed(Build(config, LORA, torch.float32), [forward_only(Batch.even(1, 8, 4))])
    assert (config.to_dict(), getattr(config, "_attn_implementation", None)) == before
