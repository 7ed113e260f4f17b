"""The frozen base model: what it is, where it lies and what it holds. `loading.py` finds and loads it."""

import hashlib
import json
import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import ADAPTER_CONFIG

_WHERE = "model.base"
# `name` or `owner/name`; no path once resolved, no `pypi:` and no `random:` spec looks like that.
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
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


def is_hub(spec: str) -> bool:
    """Whether the spec can only be a hub id: nothing of that name lies here."""
    return _HUB_ID.fullmatch(spec) is not None and not spec.endswith(".gguf") and not Path(spec).exists()


def weight_files(folder: Path, spec: str) -> list[Path]:
    """The safetensors files that transformers would load, by name."""
    if not (folder / "config.json").is_file():
        if (folder / ADAPTER_CONFIG).is_file():
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


def content_sha256(folder: Path, weights: list[Path]) -> str:
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
