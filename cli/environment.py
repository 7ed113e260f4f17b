"""`preftune env`: what a bug report needs to know of this machine. Shows no key, and changes nothing."""

import os
import platform
import re
import shlex
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import telemetry
from ..files import read_regular
from ..models.cache import cache_place
from ..printed import HIDDEN, redacted
from ..version import __version__
from .output import Output

_NEEDED = (
    *("torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers", "safetensors"),
    *("huggingface-hub", "numpy"),
)
_OPTIONAL = ("bitsandbytes", "deepspeed", "kernels", "flash-attn", "triton", "tensorboard", "trackio", "wandb")

_PREFIXES = (
    *("PREFTUNE_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "ACCELERATE_", "FSDP_", "DEEPSPEED_", "DS_"),
    *("TRL_", "PEFT_", "TORCH", "PYTORCH_", "CUDA_", "CUBLAS_", "NVIDIA_", "NCCL_", "GLOO_", "TRITON_"),
    *("OMP_", "MKL_", "KMP_", "GOMP_", "DNNL_", "ONEDNN_", "MALLOC_", "WANDB_", "TRACKIO_", "TENSORBOARD_", "SLURM_"),
    *("GRADIO_", "MLFLOW_", "COMET_", "RAY_", "VLLM_"),
)
_NAMES = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OPENAI_API_KEY"),
    *("CXX", "XDG_CACHE_HOME", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "PYTHONSAFEPATH"),
    *("DISABLE_TELEMETRY", "DO_NOT_TRACK"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"),
}
"""Variables that we or the libraries read; of proxies the small letters too."""
_SECRET = {
    *("TOKEN", "TOKENS", "KEY", "KEYS", "APIKEY", "SECRET", "SECRETS", "PASSWORD", "PASSWD", "PASSPHRASE", "PAT"),
    *("AUTH", "AUTHORIZATION", "CREDENTIAL", "CREDENTIALS", "BEARER", "COOKIE", "COOKIES", "HEADERS", "JWT"),
}
"""A variable with one of these among the words of its name is shown as `***`."""
_SWITCHES = {"", "0", "1", "true", "false", "yes", "no", "on", "off"}
_FLAGS = re.compile(r"avx2|avx512_?(f|vnni|bf16|fp16)|amx_?\w+|avx_?vnni|asimd|sve2?|(sve_?)?(bf16|i8mm)")
"""Of a CPU's abilities those that the speed and the precision of a training depend on."""


def show_environment(output: Output) -> None:
    """Print it: a line each, or as JSON lines."""
    facts = [{"name": name, "value": value} for name, value in environment()]
    if output.json:
        output.rows(facts)
        return
    for each in facts:
        output.say(f"{each['name']}: {each['value']}")


def environment() -> Iterator[tuple[str, str]]:
    """(name, value) of everything, in the order that it is shown in."""
    yield "preftune", f"{__version__} in {Path(__file__).parents[1]}"
    yield "python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "system", platform.platform()
    for name in _NEEDED:
        yield name, _version(name) or "not installed"
    for name in _OPTIONAL:
        if found := _version(name):
            yield name, found
    yield from _machine()
    yield from _torch()
    yield from _cache()
    yield "telemetry", redacted(telemetry.told(os.environ))
    for name, value in sorted(os.environ.items()):
        if telemetry.is_ours(name):
            continue
        if name.upper() in _NAMES or name.startswith(_PREFIXES):
            yield f"${name}", shown_variable(name, value)


def shown_variable(name: str, value: str) -> str:
    """A variable's value as others may see it: `***` for what is a key by its name, and for what looks like one."""
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    if words & _SECRET and value.strip().lower() not in _SWITCHES:
        return HIDDEN
    return redacted(value) if value else "(empty)"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _machine() -> Iterator[tuple[str, str]]:
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "cpu cores", f"{allowed} for this process, of {os.cpu_count()}"
    memory = psutil.virtual_memory()
    yield "memory", f"{_size(memory.total)}, {_size(memory.available)} of it available{_limit()}"
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    yield "c++ compiler", shutil.which(compiler[0]) or f"none ({compiler[0]} is not found)"


def _limit() -> str:
    """What a container may take of the memory, in words."""
    said = _text(Path("/sys/fs/cgroup/memory.max")).strip()
    return f", at most {_size(int(said))} for this container" if said.isdecimal() else ""


def _torch() -> Iterator[tuple[str, str]]:
    """What PyTorch sees. It may be what is broken: then that."""
    try:
        import torch

        from ..models.devices import auto_dtype, device_name
    except Exception as error:
        yield "import torch", f"fails: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return
    yield "cuda of torch", torch.version.cuda or "none: built for the CPU"
    if hip := getattr(torch.version, "hip", None):
        yield "rocm of torch", hip
    said = getattr(torch.cpu, "get_capabilities", dict)()
    yield "cpu", f"{said.get('cpu_name') or platform.processor() or 'unknown'} ({platform.machine()})"
    yield "cpu flags", " ".join(sorted(flag for flag, has in said.items() if has is True and _FLAGS.fullmatch(flag)))
    yield "threads of torch", str(torch.get_num_threads())
    if driver := _text(Path("/proc/driver/nvidia/version")).partition("\n")[0]:
        yield "gpu driver", driver
    try:
        count = torch.cuda.device_count()
        yield "gpus", str(count)
        for index in range(count):
            card = torch.cuda.get_device_properties(index)
            about = f"compute capability {card.major}.{card.minor}"
            yield f"gpu {index}", f"{card.name}, {_size(card.total_memory)}, {about}"
        yield "dtype auto", f"{auto_dtype()} on {device_name()}"
    except (RuntimeError, AssertionError) as error:  # of a card or a driver that does not work
        yield "gpu", f"fails: {' '.join(str(error).split())[:300]}"


def _cache() -> Iterator[tuple[str, str]]:
    try:
        place = cache_place()
    except (RuntimeError, ValueError) as error:
        yield "cache", f"none: {error}"
        return
    there = next(each for each in (place, *place.parents) if each.exists())
    free = f"{_size(shutil.disk_usage(there).free)} free on its disk"
    yield "cache", f"{place}, {_size(_used(place)) if place.is_dir() else 'not made yet'}, {free}"


def _used(folder: Path) -> int:
    """Bytes of all files beneath a folder, links not followed; what vanishes meanwhile is left out."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total


def _text(file: Path) -> str:
    try:
        return read_regular(file)
    except (OSError, ValueError):
        return ""


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
