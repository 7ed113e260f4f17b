"""Decoding on a GPU: what the host waits for, what is allocated, what a graph replays."""

import pytest

pytestmark = pytest.mark.slow


def draw(device: str, dtype: str = "float32", **changes):
    """Completions of a tiny model, its adapter changed so that it counts."""
    from typing import Any

    import torch

    from preftune import AdapterSet, LoraSpec, load_model, resolve_base
    from preftune.models.generate import sample

    base = resolve_base("random:llama")
    model = load_model(base, device=device, dtype=getattr(torch, dtype))
    adapters = AdapterSet.create(model, base, LoraSpec(r=4, alpha=8))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapters.model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.empty(parameter.shape).normal_(std=0.2, generator=generator))
    prompts = [[5 + i % 7] * (1 + i % 5) for i in range(20)]
    settings: dict[str, Any] = {
        **{"max_new_tokens": 24, "seed": 3, "eos_token_id": list(range(3, 30)), "pad_token_id": 0, "batch_size": 8},
        **changes,
    }
    return sample(adapters, "default", prompts, **settings).__dict__


def on_both() -> dict:
    import torch

    torch.cuda.manual_seed_all(7)
    before = torch.cuda.get_rng_state()
    return {
        "cpu": draw("cpu"),
        "cuda": draw("cuda"),
        "heard": draw("cuda", on_tokens=lambda *_: None),
        "untouched": torch.equal(before, torch.cuda.get_rng_state()),
    }


def counted() -> dict:
    """Of every step: rows, waits before it looked, launches, bytes that are held at its end."""
    import shadow

    from preftune.models.device_decoder import DeviceDecoder

    steps, step, look = [], DeviceDecoder._step, DeviceDecoder._look

    def stepped(self):
        shadow.reset()
        self.waits = None
        ended = step(self)
        waits = shadow.syncs() if self.waits is None else self.waits
        steps.append([len(self.request_B), waits, shadow.launches(), shadow.live_bytes()])
        return ended

    def looked(self):
        self.waits = shadow.syncs()
        return look(self)

    DeviceDecoder._step, DeviceDecoder._look = stepped, looked
    draw("cuda", dtype="bfloat16", eos_token_id=-1, max_new_tokens=41)
    return {"steps": steps}


def refused() -> dict:
    """A step that asks the host within its capture."""
    import logging

    from preftune.models import sampling

    said = []
    logging.getLogger("preftune.models.step_graphs").addFilter(lambda record: said.append(record.getMessage()) or True)
    expected = draw("cuda")
    plain = sampling.invert_cdf
    sampling.invert_cdf = lambda mass, uniform: plain(mass, uniform) + 0 * int(mass.sum() < 0)
    return {"expected": expected, "found": draw("cuda"), "said": said}


def memory() -> dict:
    """Rows in flight where memory holds few of them."""
    import torch

    from preftune.models.device_decoder import DeviceDecoder

    rows, whole = [], DeviceDecoder._open

    def opened(self, joint):
        rows.append(len(self.request_B))
        whole(self, joint)

    DeviceDecoder._open = opened
    out = {"free": draw("cuda", batch_size=None)}
    torch.cuda.mem_get_info = lambda device=None: (400_000, 1 << 30)
    out["tight"] = draw("cuda", batch_size=None)
    return {**out, "rows": rows}


def merged_twice() -> dict:
    """Where merged weights lie, in two rollouts of an adapter that changes between them."""
    from typing import Any

    import torch

    from preftune import AdapterSet, LoraSpec, load_model, resolve_base
    from preftune.models.generate import merged

    base = resolve_base("random:llama")
    adapters = AdapterSet.create(load_model(base, device="cuda", dtype=torch.float32), base, LoraSpec(r=4, alpha=8))
    layer: Any = adapters.model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    places, sums = [], []
    for value in (0.1, 0.2):
        layer.lora_B["default"].weight.data.fill_(value)
        with merged(adapters, "default"):
            places.append(layer.base_layer.weight.data_ptr())
            sums.append(float(layer.base_layer.weight.sum()))
        places.append(layer.base_layer.weight.data_ptr())
    return {"places": places, "sums": sums}


def test_completions_are_the_cpus_and_no_generator_is_touched(device):
    found = device.call(on_both)
    assert found["cuda"]["tokens"] == found["cpu"]["tokens"] == found["heard"]["tokens"]
    assert len({len(row) for row in found["cpu"]["tokens"]}) > 5
    assert found["untouched"]


def test_steps_wait_for_nothing_allocate_nothing_and_become_one_launch(device):
    """8 of the 20 prompts take 40 steps, of which the second is captured, and 8 more as many."""
    steps = [step[1:] for step in device.call(counted)["steps"] if step[0] == 8]
    first, second = steps[:40], steps[40:80]
    assert [waits for waits, _, _ in first] == [0, 1, *[0] * 38]
    assert [waits for waits, _, _ in second] == [0] * 40
    assert len({live for _, _, live in first[2:]}) == 1 and len({live for _, _, live in second}) == 1
    # a look is one more
    assert sorted({launches for _, launches, _ in second}) == [1, 2]


def test_a_step_that_cannot_be_captured_is_run_as_it_is(device):
    found = device.call(refused)
    assert found["found"]["tokens"] == found["expected"]["tokens"]
    for ours, theirs in zip(found["found"]["logprobs"], found["expected"]["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert len(found["said"]) == 1 and "cannot be a CUDA graph" in found["said"][0]


def test_rows_are_as_many_as_memory_holds(device):
    found = device.call(memory)
    assert found["tight"]["tokens"] == found["free"]["tokens"]
    assert found["rows"][1] == 20 and 1 <= found["rows"][-1] < 20


def test_merged_weights_lie_where_they_lay(device):
    found = device.call(merged_twice)
    assert found["places"][0] == found["places"][2] != found["places"][1] == found["places"][3]
    assert found["sums"][0] != found["sums"][1]
