"""The frozen base model: what it is, where it lies and what it holds. `loading.py` finds and loads it."""

import hashlib
import json
import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .sound import CONFIG, check_numbers, read_header, read_object

# `name` or `owner/name`; no path once resolved, no `pypi:` and no `random:` spec looks like that.
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# What changes in config.json without changing the model.
_CONFIG_NOISE = ("transformers_version", "_name_or_path")


@dataclass(frozen=True)
class Base:
    """A base model that lies on this machine.

    Attributes:
        spec: how the user named it; portable where it is a hub id, `pypi:` or `random:`, absolute where it is a path.
        path: folder with config.json, safetensors and the tokenizer.
        revision: commit (hub) or `sha256:...` of the file it was converted from; None for a folder.
        sha256: hash of the config and of every weight (not of how they are split into files); of one that was given
            tokens, of what it was made from (see `added_tokens`).
        added: ids of the tokens that it was given for this run.
        of: what it was given them from; None for any other.
    """

    spec: str
    path: Path
    revision: str | None
    sha256: str
    added: tuple[int, ...] = ()
    of: "Base | None" = None

    @property
    def model_id(self) -> str:
        """What `from_pretrained` takes on any machine that can reach it: the hub id, or else the folder's path.

        Of a hub model that was given tokens it is that model: an adapter of it brings their rows and the tokenizer, by
        which PEFT lets the embedding grow.
        """
        if self.of is not None and HUB_ID.fullmatch(self.of.spec):
            return self.of.spec
        return self.spec if HUB_ID.fullmatch(self.spec) else str(self.path)


def is_hub(spec: str) -> bool:
    """Whether the spec can only be a hub id: nothing of that name lies here."""
    return HUB_ID.fullmatch(spec) is not None and not spec.endswith(".gguf") and not Path(spec).exists()


def content_sha256(folder: Path, weights: list[Path], spec: str) -> str:
    """Hash of the config without its noise, then of every tensor by name: type, shape, bytes.

    Raises:
        UserError: a file is damaged, or holds weights that are no finite numbers.
    """
    config = read_object(folder / CONFIG, spec)
    quantized = "quantization_config" in config
    for key in _CONFIG_NOISE:
        config.pop(key, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    tensors: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for file in weights:
        start, header = read_header(file, spec)
        tensors |= {name: (file, start, entry) for name, entry in header.items()}
    maps = {}
    for name, (file, start, entry) in sorted(tensors.items()):
        if file not in maps:
            with file.open("rb") as handle:
                maps[file] = memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
        begin, end = entry["data_offsets"]
        digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        data = maps[file][start + begin : start + end]
        check_numbers(name, entry["dtype"], data, spec, quantized=quantized)
        digest.update(data)
    return digest.hexdigest()
