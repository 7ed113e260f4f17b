"""The compiled kernel of a card against attention in pieces, and the packed forward against the padded one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from preftune import load_model, resolve_base
from preftune.models import flex_tree
from preftune.models.prefix_tree import Attended, Kind, Rows
from preftune.models.tree_pieces import attention_in_pieces

ROOMY = {torch.float32: 2e-3, torch.bfloat16: 2e-2}


def rows(count: int, length: int) -> Rows:
    ids_BL = torch.randint(0, 50, (count, length), generator=torch.Generator().manual_seed(1))
    ids_BL[1::2, : length // 2] = ids_BL[::2, : length // 2]
    return Rows.of(ids_BL, torch.ones_like(ids_BL))


@pytest.mark.parametrize(
    ("shape", "dtype", "window"),
    [((16, 8, 128), torch.bfloat16, None), ((4, 1, 64), torch.bfloat16, 48), ((4, 4, 64), torch.float32, 48)],
)
@pytest.mark.usefixtures("compiles")
def test_the_kernel_has_the_numbers_of_pieces(shape: tuple[int, int, int], dtype: torch.dtype, window: Any) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    heads, key_heads, width = shape
    kind = Kind(dtype, heads, key_heads, width, width)
    flex_tree.probe(Attended(window, kind, None), device)
    assert flex_tree.flex_applies(device, kind)
    tree = rows(4, 300).tree(device, whole=True)
    n = len(tree.ids_N)
    q, k, v = (
        torch.randn(1, count, n, width, device=device, dtype=dtype, requires_grad=True)
        for count in (heads, key_heads, key_heads)
    )
    grad = torch.randn_like(q)
    found, expected = (
        [out, *torch.autograd.grad(out, (q, k, v), grad)]
        for out in (
            flex_tree.flex_tree_attention(q, k, v, tree, window, None),
            attention_in_pieces(q, k, v, tree, window),
        )
    )
    for one, other in zip(found, expected, strict=True):
        assert float((one.float() - other.float()).norm() / other.float().norm()) < ROOMY[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_forward_has_the_padded_ones_states(dtype: torch.dtype) -> None:
    base = resolve_base("random:llama")
    ids_BL = torch.as_tensor(rows(6, 90).ids_BL) + 20
    mask_BL = (torch.arange(90) < torch.tensor([90, 77, 81, 60, 12, 90])[:, None]).long()
    states = []
    for packed in (True, False):
        model: Any = load_model(base, dtype=dtype, device="cuda", packed=packed)
        with torch.no_grad():
            out = model.model(input_ids=ids_BL.cuda(), attention_mask=mask_BL.cuda(), use_cache=False)
        states.append(out.last_hidden_state[mask_BL.bool().cuda()].float())
    assert float((states[0] - states[1]).norm() / states[1].norm()) < ROOMY[dtype]


@pytest.mark.usefixtures("compiles")
def test_a_micro_batch_of_ppo_waits_for_nothing(tmp_path: Path) -> None:
    from datasets import Dataset

    from preftune import AdapterSet, LoraSpec, PPOConfig, PPOTrainer, load_tokenizer

    base = resolve_base("random:llama")
    adapters = AdapterSet.create(load_model(base, dtype=torch.bfloat16), base, LoraSpec(r=8, alpha=16))
    args = PPOConfig(
        output_dir=str(tmp_path),
        bf16=True,
        rollout_batch_size=16,
        total_episodes=16,
        num_ppo_epochs=2,
        num_mini_batches=1,
        per_device_train_batch_size=4,
        max_new_tokens=12,
        report_to="none",
        save_strategy="no",
        mismatch_tolerance=10.0,
    )
    prompts = Dataset.from_dict({"prompt": ["Hello there", "How are you?", "Tell me a story"]})
    trainer = PPOTrainer(
        adapters, lambda completions, **_: [0.5] * len(completions), args, prompts, None, load_tokenizer(base)
    )
    backward, done = trainer.method.backward, []

    def strictly(*given: Any) -> Any:
        # the first ones are compiled for
        torch.cuda.set_sync_debug_mode("error" if len(done) >= 4 else 0)
        try:
            found = backward(*given)
        finally:
            torch.cuda.set_sync_debug_mode(0)
        done.append(found)
        return found

    trainer.method.backward = strictly  # type: ignore[method-assign]
    trainer.train()
    assert len(done) == 8
