"""`cuda:0` on a CPU build of PyTorch: imported before torch. See README.md.

The functions here are what a rehearsed program, or a test, asks afterwards: how many kernels were launched, how often
the host waited, what was allocated. What the libraries ask `torch.cuda` is answered as far as they ask.
"""

import ctypes
import itertools
import os
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

assert "torch" not in sys.modules, "the shadow device is imported before torch"
from building import built  # noqa: E402

ctypes.CDLL(os.environ.get("SHADOW_LIBRARY") or str(built()), mode=ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402

DEVICES = int(os.environ.get("SHADOW_N", "1"))
CAPABILITY = tuple(int(part) for part in os.environ.get("SHADOW_CC", "9.0").split("."))
MEMORY = int(float(os.environ.get("SHADOW_GB", "80")) * 2**30)
_device: Any = torch.ops.shadow
_debug = {"mode": 0}


# -------------------------------------------------------------------------------- what was done


def _parsed(lines: str) -> dict[str, int]:
    return {name: int(count) for name, count in (line.split("\t") for line in lines.splitlines())}


def launches_by_name() -> dict[str, int]:
    """Kernels and copies since `reset`, by operation; an operation that only makes a view is none."""
    return _parsed(_device.launches())


def launches() -> int:
    """How many kernels and copies were launched since `reset`; a replayed graph is one."""
    return sum(launches_by_name().values())


def syncs_by_name() -> dict[str, int]:
    """Where the host waited for the device since `reset`: `.item()`, `nonzero`, a mask as index, copies that wait."""
    return _parsed(_device.syncs())


def syncs() -> int:
    """How often the host waited for the device since `reset`."""
    return sum(syncs_by_name().values())


def uploads() -> int:
    """Copies from the host since `reset`, those too that need no wait."""
    return _device.copies()[0]


def downloads() -> int:
    """Copies to the host since `reset`, those too that need no wait. `.item()` is none of them."""
    return _device.copies()[1]


def trace() -> list[str]:
    """Every launch and every wait since `reset`, in order."""
    return _device.trace().splitlines()


def reset() -> None:
    """Forget launches, waits and copies. Memory is not touched: `reset_peak` is its own."""
    _device.reset()


def allocations(index: int = 0) -> int:
    """Pieces of memory that tensors have asked of the device since the start."""
    return _device.memory(index)[2]


def live_bytes(index: int = 0) -> int:
    """Bytes that tensors hold on the device now."""
    return _device.memory(index)[0]


def peak_bytes(index: int = 0) -> int:
    """The most bytes that tensors held on the device at once since `reset_peak`."""
    return _device.memory(index)[1]


def reserved_bytes(index: int = 0) -> int:
    """Bytes that PyTorch's caching allocator would hold of the card now, those that no tensor uses included."""
    return _device.memory(index)[3]


def peak_reserved_bytes(index: int = 0) -> int:
    """The most of them since `reset_peak`: what the card must have."""
    return _device.memory(index)[4]


def card_allocations(index: int = 0) -> int:
    """How often since the start what had been freed did not do, and the card was asked for more. Each of them waits."""
    return _device.memory(index)[5]


def reset_peak(index: int = 0) -> None:
    """The peak is what is held now."""
    _device.reset_peak(index)


@contextmanager
def no_syncs() -> Generator[None, None, None]:
    """Within it a wait raises where it happens, so that the traceback says which line waits."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


# -------------------------------------------------------------------------------- what torch.cuda is asked


def _answers(**functions: Callable[..., Any]) -> None:
    """Functions of `torch._C` that a build with CUDA has."""
    for name, function in functions.items():
        setattr(torch._C, name, function)


def _stream(*_: object) -> tuple[int, int, int]:
    return 0, torch.cuda.current_device(), 1


def _memory_stats(index: int) -> dict[str, Any]:
    live, peak, allocations, reserved, peak_reserved, asked = _device.memory(index)
    used, held = {"current": live, "peak": peak}, {"current": reserved, "peak": peak_reserved}
    stats = {name: {"all": used} for name in ("allocated_bytes", "active_bytes", "requested_bytes")}
    counts = {"allocation": {"all": {"allocated": allocations}}, "num_device_alloc": asked}
    return {**stats, **counts, "reserved_bytes": {"all": held}, "num_alloc_retries": 0, "num_ooms": 0}


# Two functions: the compiler knows them by identity.
def _exchange_device(index: int) -> int:
    return _device.exchange_device(index)


def _maybe_exchange_device(index: int) -> int:
    return _device.exchange_device(index)


def _set_sync_debug(mode: int) -> None:
    _debug["mode"] = mode
    _device.set_sync_debug(mode)


def _synchronize(*_: object) -> None:
    _device.wait("synchronize")


_answers(
    _cuda_init=lambda: None,
    _cuda_getDeviceCount=lambda: DEVICES,
    _cuda_getDevice=lambda: _device.exchange_device(-1),
    _cuda_setDevice=_exchange_device,
    _cuda_exchangeDevice=_exchange_device,
    _cuda_maybeExchangeDevice=_maybe_exchange_device,
    _cuda_getArchFlags=lambda: f"sm_{CAPABILITY[0]}{CAPABILITY[1]}",
    _cuda_synchronize=_synchronize,
    _cuda_ipc_collect=lambda: None,
    _cuda_emptyCache=_device.empty_cache,
    _host_emptyCache=lambda: None,
    _cuda_getCurrentStream=_stream,
    _cuda_getDefaultStream=_stream,
    _cuda_getCurrentRawStream=lambda index: 0,
    _cuda_setStream=lambda **_: None,
    _cuda_memoryStats=_memory_stats,
    _cuda_resetPeakMemoryStats=reset_peak,
    _cuda_resetAccumulatedMemoryStats=lambda index: None,
    _cuda_set_sync_debug_mode=_set_sync_debug,
    _cuda_get_sync_debug_mode=lambda: _debug["mode"],
    _cuda_canDeviceAccessPeer=lambda one, other: True,
)


class Stream:
    """There is one stream, and all that was asked of it is done."""

    def __init__(self, device: Any = None, priority: int = 0, **_: object) -> None:
        self.device = torch.device("cuda", torch.cuda._utils._get_device_index(device, optional=True))
        self.stream_id, self.device_index, self.device_type, self.cuda_stream = 0, self.device.index, 1, 0

    def synchronize(self) -> None:
        _device.wait("stream.synchronize")

    def query(self) -> bool:
        return True

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record()
        return event

    def wait_event(self, event: "Event") -> None: ...

    def wait_stream(self, stream: "Stream") -> None: ...


class Event:
    """A time of the host."""

    def __init__(self, *_: object, **__: object) -> None:
        self.time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.time = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _device.wait("event.synchronize")

    def elapsed_time(self, end: "Event") -> float:
        return (end.time - self.time) * 1000


class CUDAGraph:
    """What is launched during its capture is launched again, on the same memory, by `replay`."""

    _ids = itertools.count()

    def __init__(self, keep_graph: bool = False) -> None:
        self.id = next(self._ids)

    def capture_begin(self, *_: object, **__: object) -> None:
        _device.graph_begin(self.id)

    def capture_end(self) -> None:
        _device.graph_end()

    def replay(self) -> None:
        _device.graph_replay(self.id)

    def reset(self) -> None:
        _device.graph_reset(self.id)

    def pool(self) -> tuple[int, int]:
        return 0, self.id


def _stand_in() -> None:
    cuda: Any = torch.cuda
    # one function each: the compiler knows them by identity
    cuda._exchange_device, cuda._maybe_exchange_device = (
        torch._C._cuda_exchangeDevice,
        torch._C._cuda_maybeExchangeDevice,
    )
    cuda._cudart = SimpleNamespace(cudaMemGetInfo=lambda index: (MEMORY - live_bytes(index), MEMORY))
    cuda._get_device_properties = _properties
    cuda.default_generators = tuple(_device.generator(index) for index in range(DEVICES))
    for where in (cuda, cuda.streams):
        where.Stream, where.Event = Stream, Event
    cuda.CUDAGraph = cuda.graphs.CUDAGraph = CUDAGraph
    cuda.graphs._cuda_isCurrentStreamCapturing = cuda.is_current_stream_capturing = _device.is_capturing
    cuda.graph_pool_handle = cuda.graphs.graph_pool_handle = lambda: (0, 0)
    cuda.init()


def _properties(index: int) -> SimpleNamespace:
    """An H100's, but for the capability and memory that were asked for."""
    major, minor = CAPABILITY
    return SimpleNamespace(
        name="shadow of a GPU",
        major=major,
        minor=minor,
        total_memory=MEMORY,
        multi_processor_count=132,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65536,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472,
        L2_cache_size=50 << 20,
        gcnArchName="",
        is_integrated=False,
        uuid=f"shadow-{index}",
    )


def _storage_to(storage: Any, *, device: torch.device, non_blocking: bool = False) -> Any:
    """`UntypedStorage.to`, whose own way asks for CUDA's allocator."""
    device = torch.device(device)
    if storage.device == device:
        return storage
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))
    return whole.to(device, non_blocking=non_blocking).untyped_storage()


def _compile_without_kernels() -> None:
    """What is compiled is traced and differentiated as on a GPU, then run operation by operation: there is no GPU that
    could run a kernel. SHADOW_BACKEND names another backend."""
    compile_, backend = torch.compile, os.environ.get("SHADOW_BACKEND", "aot_eager")

    def compiled(*args: Any, **kwargs: Any) -> Any:
        asked = kwargs.get("backend", "inductor")
        asked = backend if asked == "inductor" else asked
        return compile_(*args, **{**kwargs, "backend": asked, "mode": None, "options": None})

    torch.compile = compiled


def _flex_attention_is_a_kernel() -> None:
    """Its scores are in no memory of a card's, so they are made in the host's: PyTorch's own way without a compiler."""
    from torch._higher_order_ops import flex_attention as forward
    from torch._higher_order_ops.flex_attention import flex_attention_backward as backward
    from torch._higher_order_ops.flex_attention import sdpa_dense, sdpa_dense_backward

    for operator, compute in ((forward, sdpa_dense), (backward, sdpa_dense_backward)):

        def kernel(*args: Any, name: str = operator.name(), compute: Callable[..., Any] = compute) -> Any:
            index = args[0].device.index
            results = compute(*tree_map_only(torch.Tensor, _device.on_host, args))
            _device.launched(name)
            return tree_map_only(torch.Tensor, lambda each: _device.from_host(each, index), results)

        operator.py_impl(torch._C.DispatchKey.CUDA)(kernel)


_stand_in()
_storages: Any = torch.UntypedStorage
_storages.to = _storage_to
_storages.cpu = lambda storage: _storage_to(storage, device=torch.device("cpu"))
_compile_without_kernels()
_flex_attention_is_a_kernel()
