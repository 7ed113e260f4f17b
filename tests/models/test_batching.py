"""Rows of like length together, and the padding; the memory that a process has."""

import sys

import pytest
import torch
from transformers import LlamaConfig

from preftune.models import memory
from preftune.models.batching import left_pad, right_pad, row_batches, token_batches, tokens_in
from preftune.models.heads import ScalarHead, score_at

CPU = torch.device("cpu")


def test_batches_hold_rows_of_like_length_the_longest_first():
    lengths = [3, 9, 1, 4, 9]
    assert list(token_batches(lengths, 18)) == [[1, 4], [3, 0, 2]]
    assert list(token_batches(lengths, 5)) == [[1], [4], [3], [0], [2]]
    assert list(row_batches(lengths, 2)) == [[1, 4], [3, 0], [2]]
    assert list(row_batches(lengths, 2, longest_first=False)) == [[2, 0], [3, 1], [4]]
    assert list(row_batches([], 2)) == list(token_batches([])) == []


@pytest.mark.parametrize(
    ("gigabytes", "weights", "hidden", "inner", "expected"),
    [
        (24, 3.4, 2048, 6144, 16_384),  # 1.7B in 16 bits: all that makes it faster
        (24, 6, 4096, 14_336, 8192),  # 8B in 4 bits
        (24, 15.5, 4096, 14_336, 1024),  # 8B in 16 bits: never none
        (80, 15.5, 4096, 14_336, 16_384),
    ],
)
def test_forwards_on_a_gpu_hold_as_many_tokens_as_it_has_room_for(gigabytes, weights, hidden, inner, expected):
    config = LlamaConfig(hidden_size=hidden, intermediate_size=inner)
    assert tokens_in(gigabytes * 10**9, int(weights * 1e9), config, torch.bfloat16) == expected


def test_padding_stands_where_its_name_says():
    for pad, ids, mask in (
        (right_pad, [[5, 6], [7, 0]], [[1, 1], [1, 0]]),
        (left_pad, [[5, 6], [0, 7]], [[1, 1], [0, 1]]),
    ):
        found_ids, found_mask = pad([[5, 6], [7]], 0, CPU)
        assert (found_ids.tolist(), found_mask.tolist()) == (ids, mask)


def test_a_score_is_that_of_the_token_it_is_read_at():
    head = ScalarHead(4, bias=False)
    hidden = torch.randn(3, 5, 4, dtype=torch.bfloat16)
    position = torch.tensor([4, 0, 2])
    expected = [head(hidden)[row, column] for row, column in enumerate(position.tolist())]
    # a product of three rows and one of fifteen round differently on some machines
    torch.testing.assert_close(score_at(head, hidden, position), torch.stack(expected), rtol=0, atol=1e-6)


def test_the_peak_is_at_least_what_was_held():
    held = torch.ones(1 << 24)
    peak = memory.peak_memory_bytes()
    assert peak is not None and peak > held.numel() * 4
    memory.release_free_memory()


@pytest.mark.skipif(torch.cuda.is_available() or sys.platform != "linux", reason="only Linux forgets a process' peak")
def test_a_peak_is_of_what_came_after_it_was_forgotten():
    held = torch.ones(1 << 24)
    before = memory.peak_memory_bytes()
    size = held.numel() * 4
    del held
    memory.release_free_memory()
    memory.reset_peak_memory()
    after = memory.peak_memory_bytes()
    assert before is not None and after is not None and after < before - size / 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="the accelerator's peak is told there")
def test_without_the_resource_module_the_peak_is_psutils_or_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_PROCESS", tmp_path)
    monkeypatch.setattr(memory, "find_spec", lambda name: None)
    for counted in ({"peak_wset": 123}, {}):
        process = type("Process", (), {"memory_info": lambda self, counted=counted: type("Info", (), counted)()})
        monkeypatch.setitem(sys.modules, "psutil", type("psutil", (), {"Process": process}))
        assert memory.peak_memory_bytes() == counted.get("peak_wset")
