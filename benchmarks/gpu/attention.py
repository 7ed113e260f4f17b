"""The attention that training uses: does FlexAttention run on this card, forward and backward; what does it gain."""

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...models import flex_tree
from ...models.prefix_tree import Attended, Kind, Rows, Tree
from ...models.tree_pieces import attention_in_pieces
from ..measure import Measured
from .works import ATTENTION

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def measure(options: dict[str, Any]) -> Iterator[tuple[str, Measured]]:
    """For each kind of attention: whether it runs, or why not, and milliseconds of a forward and backward of one layer
    over a batch's tree, by FlexAttention and in pieces."""
    said: list[str] = []
    logging.getLogger(flex_tree.__name__).addFilter(lambda record: said.append(record.getMessage()) or True)
    device = torch.device("cuda", torch.cuda.current_device())
    tree = _tree(device, *((2, 160) if options["tiny"] else (8, 1024)))
    for name, (heads, key_heads, width, window) in list(ATTENTION.items())[: 3 if options["full"] else 2]:
        kind = Kind(torch.bfloat16, heads, key_heads, width, width)
        said.clear()
        began = time.perf_counter()
        flex_tree.probe(Attended(window, kind, None), device)
        runs = flex_tree.flex_applies(device, kind)
        found: Measured = {"runs": runs, "why_not": said[-1] if said else None, "tokens": len(tree.ids_N)}
        found["probe_seconds"] = time.perf_counter() - began
        ways: dict[str, Attend] = {"pieces": lambda q, k, v, w=window: attention_in_pieces(q, k, v, tree, w)}
        if runs:
            ways["flex"] = lambda q, k, v, w=window: flex_tree.flex_tree_attention(q, k, v, tree, w, None)
        for way, attend in ways.items():
            found[f"{way}_ms"] = _milliseconds(attend, kind, len(tree.ids_N), 1 if options["tiny"] else 5)
        yield name, found


def _tree(device: torch.device, rows: int, length: int) -> Tree:
    """Rows of which every two begin alike, as a pair's two sides do."""
    ids_BL = torch.randint(0, 1000, (rows, length), generator=torch.Generator().manual_seed(0))
    ids_BL[1::2, : length // 4] = ids_BL[::2, : length // 4]
    return Rows.of(ids_BL, torch.ones_like(ids_BL)).tree(device, whole=True)


def _milliseconds(attend: Attend, kind: Kind, n: int, times: int) -> float:
    """The median of a forward and backward, after one that is not counted."""
    sizes = ((kind.heads, kind.width), (kind.key_heads, kind.width), (kind.key_heads, kind.value_width))
    q, k, v = (
        torch.randn(1, n, heads, width, device="cuda", dtype=kind.dtype).transpose(1, 2).requires_grad_()
        for heads, width in sizes
    )
    grad = torch.randn_like(q)
    found = []
    for _ in range(times + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        torch.autograd.grad(attend(q, k, v), (q, k, v), grad)
        torch.cuda.synchronize()
        found.append((time.perf_counter() - began) * 1e3)
    return sorted(found[1:])[times // 2]
