"""Weights that are divided among processes: gathered by all, and never written in part."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2Model

from preftune.errors import UserError
from preftune.models import lora
from preftune.models.lora import WEIGHTS
from preftune.models.whole import check_whole, whole


def test_what_is_not_divided_is_handed_through():
    tensors = {"a": torch.ones(2), "b": nn.Parameter(torch.zeros(3, 1))}
    found = whole(tensors)
    assert all(found[name] is tensors[name] for name in tensors)


def test_shards_are_gathered(tmp_path: Path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        full = torch.arange(12.0).view(4, 3)
        divided = distribute_tensor(full, init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(UserError, match="x is divided among processes"):
            check_whole("here", {"x": divided})
        assert torch.equal(whole({"x": divided})["x"], full)
    finally:
        torch.distributed.destroy_process_group()


def test_an_adapter_of_which_a_part_is_elsewhere_is_not_written(make, tmp_path: Path):
    adapters = make()
    parameter = adapters.parameters("default")[3]
    parameter.data = torch.empty(0)  # what ZeRO-3 leaves of a parameter that nobody gathers
    with pytest.raises(UserError, match=r"lora_[AB]\.weight is divided among processes.* nothing is saved"):
        adapters.save("default", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_one_process_writes(make, tmp_path: Path):
    make().save("default", tmp_path / "out", write=False)
    assert not (tmp_path / "out").exists()


def test_what_was_written_is_read_back(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    adapters = make()
    adapters.save("default", tmp_path / "whole")
    assert len(load_file(tmp_path / "whole" / WEIGHTS)) == len(adapters.parameters("default"))
    save = lora.save_file

    def lossy(tensors, file, **more):
        save(dict(list(tensors.items())[1:]), file, **more)

    monkeypatch.setattr(lora, "save_file", lossy)
    with pytest.raises(UserError, match="tensors were written where the adapter has"):
        adapters.save("default", tmp_path / "lossy")


def test_a_base_that_cannot_be_divided_is_refused_in_words():
    from preftune.models.sharded import shard_base

    gpt2: Any = GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
    with pytest.raises(
        UserError, match="the layers of a GPT2Model cannot be divided among processes; use --launch ddp"
    ):
        shard_base(gpt2, gpt2)
    gpt2.layers, gpt2.packed = gpt2.h, nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match="a base that is quantised so cannot be divided"):
        shard_base(gpt2, gpt2)
