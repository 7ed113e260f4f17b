"""Attention and the PPO update on the device: what is waited for, what is held, and what becomes of a failure."""

import pytest

pytestmark = pytest.mark.slow


def micro_batches(value: str) -> dict:
    """Waits and trees of each micro-batch of an update, of two epochs over one minibatch."""
    from typing import Any

    import shadow
    import torch
    from datasets import Dataset

    from preftune import AdapterSet, LoraSpec, PPOConfig, PPOTrainer, load_model, load_tokenizer, resolve_base
    from preftune.models import flex_tree, prefix_tree
    from preftune.models.tree_pieces import attention_in_pieces
    from preftune.stages.ppo.rollout import Rollout

    def kernel(inputs, tree, window, scale):
        # in its place: here it runs operation by operation, and uploads constants that a GPU's kernel has in itself
        flex_tree.block_mask(tree, window)
        query, key, value = inputs
        return attention_in_pieces(query, key, value, tree, window, scale=scale)

    patched: Any = flex_tree
    patched._flex = kernel
    laid_out: list[int] = []
    lay_out = prefix_tree.lay_out

    def counted(ids_BL: Any, *args: Any) -> Any:
        laid_out.append(len(ids_BL))
        return lay_out(ids_BL, *args)

    prefix_tree.lay_out = counted
    base = resolve_base("random:llama")
    adapters = AdapterSet.create(load_model(base, dtype=torch.bfloat16), base, LoraSpec(r=8, alpha=16))
    made = PPOTrainer(
        adapters,
        lambda completions, **_: [float(len(each)) for each in completions],
        PPOConfig(
            output_dir="out",
            bf16=True,
            rollout_batch_size=8,
            total_episodes=8,
            num_ppo_epochs=2,
            num_mini_batches=1,
            per_device_train_batch_size=4,
            max_new_tokens=12,
            report_to="none",
            save_strategy="no",
            value=value,  # type: ignore[arg-type]
            kl_in="loss",
            mismatch_tolerance=10.0,
        ),
        Dataset.from_dict({"prompt": ["Hello there", "How are you?", "Tell me a story"]}),
        processing_class=load_tokenizer(base),
    )
    waits: list[dict[str, int]] = []
    method: Any = made.method
    cut, backward = Rollout.rows, method.backward

    def rows(self, index):
        shadow.reset()
        return cut(self, index)

    def step(*args):
        found = backward(*args)
        waits.append(shadow.syncs_by_name())
        trees.append(len(laid_out))
        return found

    trees: list[int] = []
    Rollout.rows, method.backward = rows, step
    made.train()
    return {"waits": waits, "trees": trees, "device": made.args.device.type, "packed": len(laid_out)}


@pytest.mark.parametrize("value", ["separate", "shared"])
def test_a_micro_batch_waits_for_nothing_and_has_one_tree(device, value: str) -> None:
    found = device.call(micro_batches, value=value)
    assert found["device"] == "cuda" and len(found["waits"]) == 4
    assert found["waits"] == [{}] * 4
    # policy and value share it; and the trial's own and the rollout's two were there before
    before = found["trees"][0]
    assert all(later - earlier <= 1 for earlier, later in zip([before, *found["trees"]], found["trees"], strict=False))


def losses(fails: str, call: int, where: str, checkpointing: bool = False) -> dict:
    """Losses and gradients of twelve batches, one kernel of which fails."""
    import logging

    import torch

    from preftune import AdapterSet, LoraSpec, load_model, resolve_base
    from preftune.models import flex_tree
    from preftune.models.tree_pieces import attention_in_pieces

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("preftune").addHandler(handler)

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out):
            return out.clone()

        @staticmethod
        def backward(ctx, *_):
            raise RuntimeError("out of resource: shared memory")

    def in_pieces(inputs, tree, window, scale):
        query, key, value = inputs
        return attention_in_pieces(query, key, value, tree, window, scale=scale)

    flex = flex_tree._flex if fails == "nothing" else in_pieces
    calls, uses = {"forward": 0, "backward": 0}, []

    def spoilt(inputs, tree, window, scale):
        which = "backward" if torch.is_grad_enabled() else "forward"
        calls[which] += 1
        uses.append(which)
        if which == fails and calls[which] >= call:
            if which == "forward":
                raise RuntimeError("out of resource: shared memory")
            return Broken.apply(flex(inputs, tree, window, scale))
        return flex(inputs, tree, window, scale)

    flex_tree._flex = spoilt
    base = resolve_base("random:llama")
    adapters = AdapterSet.create(load_model(base, device=where), base, LoraSpec(r=4, alpha=8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapters.parameters("default"):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(where))
    if checkpointing:
        adapters.model.gradient_checkpointing_enable({"use_reentrant": False})
        adapters.model.train()
    found = []
    for _ in range(12):
        ids = torch.randint(20, 200, (4, 90), generator=generator)
        ids[1::2, :40] = ids[::2, :40]
        mask = (torch.arange(90) < torch.tensor([90, 77, 81, 60])[:, None]).long()
        out = adapters.backbone(input_ids=ids.to(where), attention_mask=mask.to(where), use_cache=False)
        # each state has a weight of its own: their squares' sum is what the last norm makes it, whatever came before
        weight = torch.randn(out.last_hidden_state.shape, generator=generator) * mask[..., None]
        loss = (out.last_hidden_state.float() * weight.to(where)).sum()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in adapters.parameters("default") if p.grad is not None]).norm()
        found.append([loss.item(), norm.item()])
        adapters.model.zero_grad()
    return {"numbers": found, "said": said, "kernels": len(uses)}


@pytest.mark.parametrize(
    ("fails", "call", "checkpointing"),
    [
        ("nothing", 0, False),
        ("forward", 1, False),
        ("backward", 1, False),
        ("forward", 22, False),
        ("backward", 20, False),
        ("backward", 20, True),
    ],
)
def test_a_kernel_that_fails_ends_in_blocks_with_equal_numbers(device, fails, call, checkpointing) -> None:
    """The first: of the trial's, or the probe's. The others: of the tenth batch's, a batch having two layers, the trial
    as well, and the probe one call of each."""
    there = device.call(losses, fails=fails, call=call, where="cuda", checkpointing=checkpointing)
    here = device.call(losses, fails="nothing", call=0, where="cpu")
    assert there["numbers"] == [pytest.approx(each, rel=1e-4, abs=1e-4) for each in here["numbers"]]
    assert here["kernels"] == 0 and there["kernels"] > 0
    assert bool(there["said"]) == (fails != "nothing")
    assert all("FlexAttention does not run here" in each and "shared memory" in each for each in there["said"])


def graphs(limit: int | None) -> dict:
    """Graphs that are compiled for trees of many sizes, with and without a window, a gradient and autocast."""
    import contextlib
    import random

    import torch

    from preftune.models import flex_tree
    from preftune.models.prefix_tree import Attended, Kind, Rows

    if limit is not None:
        torch._dynamo.config.recompile_limit = limit
    random.seed(0)
    for window, dtype in ((None, torch.bfloat16), (7, torch.float32)):
        flex_tree.probe(Attended(window, Kind(dtype, 4, 2, 16, 16), 0.3), torch.device("cuda"))
    for _ in range(12):
        for window, gradient, autocast in (
            (None, True, True),
            (7, True, False),
            (None, False, True),
            (7, False, False),
        ):
            ids = torch.randint(0, 50, (2, random.randint(5, 300)), device="cuda")
            tree = Rows.of(ids, torch.ones_like(ids)).tree(ids.device, whole=True)
            n = len(tree.ids_N)
            q, k, v = (torch.randn(1, n, h, 16).cuda().transpose(1, 2).requires_grad_(gradient) for h in (4, 2, 2))
            with (
                contextlib.nullcontext() if gradient else torch.no_grad(),
                torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast),
            ):
                out = flex_tree.flex_tree_attention(q, k, v, tree, window, 0.3)
            if gradient:
                out.sum().backward()
    stats = torch._dynamo.utils.counters["stats"]
    return {"graphs": stats["unique_graphs"], "failed": list(flex_tree._failed.values())}


def test_each_kind_of_mask_and_mode_is_compiled_once(device) -> None:
    # with and without a window, forward and backward, each in the precision that it met
    assert device.call(graphs, limit=None) == {"graphs": 4, "failed": []}


def test_one_graph_too_many_is_said(device) -> None:
    found = device.call(graphs, limit=0)
    assert found["graphs"] == 0
    assert found["failed"] and all("fullgraph" in each or "recompile" in each for each in found["failed"])


def peaks(works: bool) -> list[int]:
    """The most bytes held in a forward and backward over few and over twice as many tokens, without FlexAttention (here
    it makes the whole score matrix, as no GPU does), and for the block masks alone."""
    import shadow
    import torch

    from preftune.models.flex_tree import block_mask
    from preftune.models.prefix_tree import Rows
    from preftune.models.tree_pieces import attention_in_pieces

    found = []
    torch.manual_seed(0)
    for rows in (32, 64):
        ids = torch.randint(0, 50, (rows, 256)).cuda()
        tree = Rows.of(ids, torch.ones_like(ids)).tree(ids.device, whole=True)
        n = len(tree.ids_N)
        shadow.reset_peak()
        before = shadow.live_bytes()
        if works:
            block_mask(tree, None)
        else:
            q, k, v = (torch.zeros(1, h, n, 16, device="cuda", requires_grad=True) for h in (2, 1, 1))
            attention_in_pieces(q, k, v, tree, None).sum().backward()
        found.append(shadow.peak_bytes() - before)
    return found


@pytest.mark.parametrize("works", [True, False])
def test_the_peak_grows_with_the_tokens(device, works: bool) -> None:
    few, many = device.call(peaks, works=works)
    n = 32 * 256
    # a mask of N x N would be 64 MB at first for the squares, and 256 in fp32
    assert few < n * n / 8 if works else few < n * n
    assert many < 2.2 * few or many < (2 * n) ** 2 / 100
