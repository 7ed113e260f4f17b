"""The shadow device itself: what it counts, and what it refuses as a GPU does."""

import pytest

pytestmark = pytest.mark.slow


def computes() -> dict:
    import torch

    torch.manual_seed(0)
    host, state = torch.nn.Linear(5, 3), torch.randn(4, 5)
    there, moved = torch.nn.Linear(5, 3).cuda(), state.cuda().requires_grad_()
    there.load_state_dict(host.state_dict())
    with torch.autocast("cuda", dtype=torch.bfloat16):
        half = str(there(moved).dtype)
    there(moved).square().sum().backward()
    host(state).square().sum().backward()
    assert there.weight.grad is not None and host.weight.grad is not None
    return {
        "device": str(there.weight.grad.device),
        "equal": torch.equal(there.weight.grad.cpu(), host.weight.grad),
        "autocast": half,
        "view": moved.detach().split(2)[1].storage_offset(),
    }


def test_it_computes_what_the_cpu_does(device) -> None:
    assert device.call(computes) == {"device": "cuda:0", "equal": True, "autocast": "torch.bfloat16", "view": 10}


def refuses() -> list[str]:
    import torch

    x = torch.ones(3, device="cuda")
    said = []
    for wrong in (
        lambda: x + torch.ones(3),
        lambda: x + torch.ones(3, device="cuda:1"),
        lambda: torch.rand(2, device="cuda", generator=torch.Generator()),
        lambda: torch.ones(1, device="cuda:2"),
    ):
        try:
            wrong()
            said.append("nothing")
        except RuntimeError as error:
            said.append(str(error))
    return said


def test_it_refuses_what_a_gpu_refuses(device) -> None:
    mixed, apart, generator, beyond = device.call(refuses, {"SHADOW_N": "2"})
    assert "cuda:0 and cpu" in mixed
    assert "cuda:0 and cuda:1" in apart
    assert "'cuda' device type for generator" in generator
    assert "invalid device ordinal" in beyond


def counts() -> dict:
    import shadow
    import torch

    x, mask = torch.arange(6.0, device="cuda"), torch.tensor([True, False] * 3, device="cuda")
    found = {}
    for name, work in {
        "three kernels": lambda: (x * 2 + 1) - x,
        "a view": lambda: x[2:].view(2, 2).t(),
        "item": x[0].item,
        "nonzero": mask.nonzero,
        "read by a mask": lambda: x[mask],
        "written by a mask": lambda: x.__setitem__(mask, x[:3]),
        "a number by a mask": lambda: x.__setitem__(mask, 1.0),
        "upload": lambda: torch.ones(3).to("cuda"),
        "upload, not waiting": lambda: torch.ones(3).pin_memory().to("cuda", non_blocking=True),
        "download": x.cpu,
        "download to where no lock is": lambda: torch.empty(6).copy_(x, non_blocking=True),
        "download, not waiting": lambda: torch.empty(6).pin_memory().copy_(x, non_blocking=True),
    }.items():
        shadow.reset()
        work()
        found[name] = [shadow.launches(), shadow.syncs(), shadow.uploads(), shadow.downloads()]
    return found


def test_launches_waits_and_copies_are_counted(device) -> None:
    assert device.call(counts) == {
        "three kernels": [3, 0, 0, 0],
        "a view": [0, 0, 0, 0],
        "item": [1, 1, 0, 0],
        "nonzero": [1, 1, 0, 0],
        "read by a mask": [2, 1, 0, 0],
        "written by a mask": [1, 1, 0, 0],
        "a number by a mask": [1, 0, 0, 0],
        "upload": [1, 1, 1, 0],
        "upload, not waiting": [1, 0, 1, 0],
        "download": [1, 1, 0, 1],
        "download to where no lock is": [1, 1, 0, 1],
        "download, not waiting": [1, 0, 0, 1],
    }


def holds() -> dict:
    import shadow
    import torch

    before, allocated = shadow.live_bytes(), shadow.allocations()
    kept = torch.zeros(1000, device="cuda")
    (kept + 1).sum()
    return {
        "kept": shadow.live_bytes() - before,
        "peak": shadow.peak_bytes() - before,
        "allocations": shadow.allocations() - allocated,
        "torch": torch.cuda.max_memory_allocated() - before,
        "total": torch.cuda.mem_get_info()[1] >> 30,
    }


def test_memory_is_counted(device) -> None:
    found = device.call(holds, {"SHADOW_GB": "24"})
    assert found == {"kept": 4000, "peak": 8004, "allocations": 3, "torch": 8004, "total": 24}


def reuses() -> list[int]:
    import shadow
    import torch

    found = []
    kept = torch.empty(3 << 20, dtype=torch.uint8, device="cuda")  # 20 MiB are asked of the card for it
    found.append(shadow.reserved_bytes() >> 20)
    for _ in range(3):
        torch.empty(5 << 20, dtype=torch.uint8, device="cuda")  # out of the same piece, again and again
    found += [shadow.reserved_bytes() >> 20, shadow.card_allocations()]
    grown = [torch.empty(size << 20, dtype=torch.uint8, device="cuda") for size in (11, 12, 13)]
    found += [shadow.reserved_bytes() >> 20, shadow.card_allocations()]
    del grown, kept
    torch.cuda.empty_cache()
    return [*found, shadow.reserved_bytes(), torch.cuda.max_memory_reserved() >> 20]


def test_the_cards_memory_is_that_of_the_caching_allocator(device) -> None:
    # 11 MiB fit into what is left of the first piece; 12 and 13 get pieces of their own, of whole 2 MiB
    assert device.call(reuses) == [20, 20, 1, 46, 3, 0, 46]


def attends() -> list[list[float]]:
    """Of FlexAttention over few and over twice as many tokens: the peak, launches, and how far it is from SDPA."""
    import shadow
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(_batch, _head, query, key):
        return query >= key

    found, compiled = [], torch.compile(flex_attention, dynamic=True)
    for n in (256, 512):
        mask = create_block_mask(causal, None, None, n, n, device="cuda")
        q, k, v = (torch.randn(1, h, n, 16, device="cuda", requires_grad=True) for h in (4, 2, 2))
        shadow.reset()
        shadow.reset_peak()
        before = shadow.live_bytes()
        out = compiled(q, k, v, block_mask=mask, enable_gqa=True)
        out.square().sum().backward()
        peak = shadow.peak_bytes() - before
        launches = sum(count for name, count in shadow.launches_by_name().items() if name.startswith("flex"))
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        found.append([peak, launches, float((out - expected).detach().abs().max())])
    return found


def test_flex_attention_is_a_kernel_whose_scores_are_in_no_memory(device) -> None:
    few, many = device.call(attends)
    assert many[0] < 2.1 * few[0]
    assert few[1] == many[1] == 2
    assert max(few[2], many[2]) < 1e-5


def waits() -> str:
    import shadow
    import torch

    x = torch.ones(2, device="cuda")
    with shadow.no_syncs():
        y = x * 2
        try:
            float(y[0])
        except RuntimeError as error:
            return str(error)
    return "nothing"


def test_a_wait_can_be_made_to_raise(device) -> None:
    assert "synchronizing" in device.call(waits)


def replays() -> dict:
    import shadow
    import torch

    source, out = torch.zeros(3, device="cuda"), torch.zeros(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_((source * 2 + 1).roll(1))
    source.copy_(torch.arange(3.0))
    shadow.reset()
    graph.replay()
    found = {"out": out.tolist(), "launches": shadow.launches() - 1}
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            out.sum().item()
    except RuntimeError as error:
        found["said"] = str(error)
    return found


def test_a_captured_graph_computes_on_the_same_memory_and_may_not_wait(device) -> None:
    found = device.call(replays)
    assert "not permitted when stream is capturing" in found.pop("said")
    assert found == {"out": [5.0, 1.0, 3.0], "launches": 1}


def draws() -> list[bool]:
    import torch

    def same(first, second) -> bool:
        return torch.equal(first.cpu(), second.cpu())

    torch.manual_seed(3)
    first, host = torch.rand(3, device="cuda"), torch.rand(3)
    torch.manual_seed(3)
    torch.rand(5)
    again = torch.rand(3, device="cuda")
    state = torch.cuda.get_rng_state()
    dropped = torch.nn.functional.dropout(torch.ones(64, device="cuda"))
    torch.cuda.set_rng_state(state)
    return [
        same(first, again),
        same(dropped, torch.nn.functional.dropout(torch.ones(64, device="cuda"))),
        same(host, torch.rand(3)),
    ]


def test_the_device_has_random_numbers_of_its_own(device) -> None:
    assert device.call(draws) == [True, True, False]
