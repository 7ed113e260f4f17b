"""What `token_kernels.cpp` does, on tensors: built for this processor and one model's shape, once, into the cache.

A decode step's matrix products are one call each; on a CPU what stands between them takes half as long again when it
is made of PyTorch's operations, because each of them meets cold memory and cold code. Without a compiler, or where the
library that runs PyTorch's threads is not the compiler's (`libgomp`), there are no kernels, and the step is made of
PyTorch's operations as before.

Legend of shape suffixes: B rows, C columns of the cache, E hidden size, H query heads, K key-value heads, D head
dimension.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from .cache import build_once

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno",
          "-fno-trapping-math", "-fno-thread-jumps")  # fmt: skip
_POINTER, _INTEGER, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "add_norm": (_POINTER,) * 4 + (_INTEGER, _FLOAT),
    "attention": (_POINTER,) * 5 + (_FLOAT,) + (_POINTER,) * 4 + (_INTEGER,) * 4 + (_FLOAT,),
    "gated": (_POINTER, _POINTER, _INTEGER),
    "draw": (_POINTER, _POINTER, _FLOAT, _POINTER, _POINTER, _INTEGER, _INTEGER),
}


class TokenKernels:
    """The kernels for heads of size D in groups of H / K, and a hidden size E. All tensors are bf16 on the CPU and
    contiguous."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        self._add_norm, self._attention, self._gated = library.add_norm, library.attention, library.gated
        self._draw = library.draw

    def add_norm(self, x_BE: Tensor, change_BE: Tensor | None, weight_E: Tensor, eps: float, out_BE: Tensor) -> None:
        """x += change, and out = its root-mean-square norm."""
        self._add_norm(_at(x_BE), _at(change_BE), _at(weight_E), _at(out_BE), len(x_BE), eps)

    def attention(
        self,
        qkv_BS: Tensor,
        turning: tuple[Tensor, Tensor],
        norms: tuple[Tensor | None, Tensor | None],
        eps: float,
        past: tuple[Tensor, Tensor],
        first_B: Tensor,
        stop: int,
        scale: float,
    ) -> Tensor:
        """Queries and keys turned, keys and values put into column `stop`, and what each row's queries find [B, H * D].

        Args:
            qkv_BS: query, key and value heads, one after the other.
            turning: cosine and sine [B, D], the sine's first half negated.
            norms: weights [D] of the queries' and the keys' norm.
            past: keys and values [B, K, C, D].
            first_B: the first column of each row, int64.
        """
        keys_BKCD, values_BKCD = past
        b, k, c, d = keys_BKCD.shape
        out = qkv_BS.new_empty(b, qkv_BS.size(1) - 2 * k * d)
        pointers = (_at(each) for each in (qkv_BS, *turning, *norms))
        self._attention(*pointers, eps, _at(keys_BKCD), _at(values_BKCD), _at(first_B), _at(out), b, k, c, stop, scale)
        return out

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up, in the place of `gate`."""
        self._gated(_at(gate), _at(up), gate.numel())
        return gate

    def draw(self, logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """As `sampling.choose` without cuts, in two passes over the logits as they are."""
        rows, vocabulary = logits_BV.shape
        token_B = torch.empty(rows, dtype=torch.int64)
        logp_B = torch.empty(rows, dtype=torch.float32)
        found = (_at(token_B), _at(logp_B, torch.float32))
        self._draw(_at(logits_BV), _at(uniform_B, torch.float32), temperature, *found, rows, vocabulary)
        return token_B, logp_B


def _at(tensor: Tensor | None, *dtypes: torch.dtype) -> int | None:
    """Where it lies. A kernel takes what is there for what it expects, so the rest is refused.

    Raises:
        TypeError: of another kind or layout.
    """
    if tensor is None:
        return None
    of_a_kind = tensor.dtype in (dtypes or (torch.bfloat16, torch.int64)) and tensor.device.type == "cpu"
    if not of_a_kind or not tensor.is_contiguous():
        raise TypeError(f"{tensor.dtype} of strides {tensor.stride()} on {tensor.device}, expected bf16 in one piece")
    return tensor.data_ptr()


@functools.cache
def token_kernels(head: int, groups: int, width: int, *, normed: bool) -> TokenKernels | None:
    """The kernels for this shape; None where they cannot be built."""
    compiler = _compiler()
    if compiler is None or head % 8 or not _shares_threads():
        return None
    shape = {"HEAD": head, "GROUPS": groups, "WIDTH": width, "NORMED": int(normed)}
    command = [*compiler, *_FLAGS, *(f"-D{name}={value}" for name, value in shape.items()), str(SOURCE)]
    described = "\n".join([SOURCE.read_text(encoding="utf-8"), *command, torch.__version__, _processor()])
    name = f"kernels-{hashlib.sha256(described.encode()).hexdigest()[:32]}"
    try:
        folder = build_once(name, lambda folder: _build(command, folder / "kernels.so"))
        return TokenKernels(ctypes.CDLL(str(folder / "kernels.so")))
    except (OSError, UserError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        logger.info("decoding goes without kernels of its own: %s", " ".join(said.split())[:200])
        return None


def _build(command: Sequence[str], out: Path) -> None:
    subprocess.run([*command, "-o", str(out)], check=True, capture_output=True, text=True, timeout=120)


def _compiler() -> list[str] | None:
    """The C++ compiler that $CXX names, or that is at hand; not where no one was tried."""
    if sys.platform != "linux":
        return None
    named = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    found = shutil.which(named[0])
    return None if found is None else [found, *named[1:]]


def _shares_threads() -> bool:
    """Whether PyTorch's threads are those of the library that the kernels will use: two pools would wait for one
    another's processors."""
    return "libgomp" in Path("/proc/self/maps").read_text(encoding="utf-8")


def _processor() -> str:
    """What the code is built for: a cache may be shared by machines of different kinds."""
    told = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    named = {line for line in told if line.partition(":")[0].strip() in ("model name", "flags", "Features")}
    return "\n".join([platform.machine(), *sorted(named)])
