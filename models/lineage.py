"""`lineage.json`: what an adapter was made from, so that the next stage can refuse what does not belong to it."""

import hashlib
import json
import logging
import platform
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..files import LINEAGE, write_whole
from ..version import __version__
from . import seams
from .base import Base
from .cache import remembered
from .loading import resolve_base
from .lora import VALUE_HEAD, WEIGHTS, read_adapter, read_tensors, tensors_sha256
from .plain_lora import read_config

logger = logging.getLogger(__name__)

IMPORTED = "imported, unverified"
"""The stage's name of a parent that has no lineage."""

_FORMAT = 1
_PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors")


@dataclass(frozen=True)
class Lineage:
    """Where a saved adapter comes from.

    Attributes:
        stage: its name in the run; `kind`: sft, reward, dpo, kto or ppo.
        base: spec, revision, sha256 (see `base_info`).
        tokenizer: sha256, chat_template_sha256, pad_token, eos_token (see `tokenizer_info`).
        parents: stage and sha256 (see `adapter_sha256`) of each adapter that went in, and the folder of one from
            outside the run (see `parent_entry`).
        config: the stage's resolved config.
        data: spec, fingerprint, rows.
        created: UTC, ISO 8601; `seconds`: how long the stage took.
        reward: mean and std of the reward on reference responses; reward adapters only.
    """

    stage: str
    kind: str
    base: dict[str, Any]
    tokenizer: dict[str, Any]
    parents: list[dict[str, Any]]
    config: dict[str, Any]
    data: dict[str, Any]
    seed: int
    versions: dict[str, str]
    created: str
    seconds: float
    reward: dict[str, float] | None = None
    format: int = field(default=_FORMAT)


def write_lineage(folder: Path, lineage: Lineage) -> None:
    """Write `lineage.json` into an adapter's folder."""
    keys = asdict(lineage)
    if keys["reward"] is None:
        del keys["reward"]
    ordered = {"format": keys.pop("format"), **keys}
    write_whole(folder / LINEAGE, json.dumps(ordered, indent=2, default=str) + "\n")


def read_lineage(folder: Path) -> Lineage:
    """Read it back.

    Raises:
        UserError: none there, or of a format that this version does not know.
    """
    file = folder / LINEAGE
    if not file.is_file():
        raise UserError(str(folder), f"no {LINEAGE} there", "give the folder of a finished stage")
    try:
        keys = json.loads(file.read_text(encoding="utf-8"))
        if keys["format"] != _FORMAT:
            raise UserError(str(file), f"format {keys['format']}, expected {_FORMAT}", "update preftune")
        lineage = Lineage(**keys)
        _check_types(lineage)
        return lineage
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(str(file), f"unreadable ({said})", "run its stage again, or take it from a copy") from error


def _check_types(lineage: Lineage) -> None:
    """Raises TypeError where an entry is not what it should be, KeyError where one lacks a key that others read."""
    for name, kind in (("base", dict), ("tokenizer", dict), ("config", dict), ("data", dict), ("parents", list)):
        if not isinstance(getattr(lineage, name), kind):
            raise TypeError(f"{name} is no {'list' if kind is list else 'object'}")
    for entry, keys in ((lineage.base, ("spec", "revision", "sha256")), (lineage.data, ("spec", "fingerprint"))):
        if missing := [key for key in keys if key not in entry]:
            raise KeyError(missing[0])
    for parent in lineage.parents:
        if not {"stage", "sha256"} <= set(parent):
            raise TypeError("a parent without its name or hash")


def base_info(base: Base) -> dict[str, Any]:
    """The `base` entry of a lineage; of a base that a stage made (`full: true`) also what it was made from."""
    entry: dict[str, Any] = {"spec": base.spec, "revision": base.revision, "sha256": base.sha256}
    if (base.path / LINEAGE).is_file() and (made := read_lineage(base.path)).config.get("full"):
        entry["made_from"] = {"stage": made.stage, "kind": made.kind, "data": made.data, "base": made.base}
    return entry


def tokenizer_info(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The `tokenizer` entry of a lineage: how text becomes ids, and the template, as hashes; PAD and EOS in words."""
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    return {
        "sha256": _sha256(json.dumps(_encoding(tokenizer), sort_keys=True)),
        "chat_template_sha256": _sha256(template),
        "pad_token": str(tokenizer.pad_token),
        "eos_token": str(tokenizer.eos_token),
    }


def library_versions(quantization: str | None = None) -> dict[str, str]:
    """preftune, Python and the libraries that can change a result; of a quantised base also who quantises it."""
    packages = _PACKAGES if quantization is None else (*_PACKAGES, "bitsandbytes")
    found = {name: metadata.version(name) for name in packages}
    return {"preftune": __version__, "python": platform.python_version(), **found}


def adapter_sha256(folder: Path) -> str:
    """Hash of a saved adapter's tensors, its value head included (see `AdapterSet.digest`)."""
    files = [file for file in (folder / WEIGHTS, folder / VALUE_HEAD) if file.is_file()]
    if not files or files[0].name != WEIGHTS:
        raise UserError(str(folder), f"no {WEIGHTS} there", "give the folder of a finished stage")

    def compute() -> str:
        tensors = read_tensors(files[0])
        for file in files[1:]:
            tensors |= {f"value_head.{name}": tensor for name, tensor in read_tensors(file).items()}
        return tensors_sha256(tensors)

    return remembered("adapter", files, compute)


def check_base(folder: Path, base: Base) -> None:
    """Refuse an adapter that was trained on another base. One without a lineage (not ours) passes.

    Raises:
        UserError: naming both bases.
    """
    if not (folder / LINEAGE).is_file():
        return
    theirs = read_lineage(folder).base
    if theirs["sha256"] != base.sha256:
        raise UserError(
            str(folder),
            f"base.sha256 differs: {theirs['sha256'][:12]} ({theirs['spec']}) there, "
            f"{base.sha256[:12]} ({base.spec}) here",
            f"use the base that it was trained on: {theirs['spec']}",
        )


def check_lineage(folder: Path, base: Base, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse an adapter of another base, tokenizer, chat template, PAD or EOS.

    Raises:
        UserError: no lineage, or one that differs; the field and both values are named.
    """
    lineage = read_lineage(folder)
    check_base(folder, base)
    for key, ours in tokenizer_info(tokenizer).items():
        theirs = lineage.tokenizer.get(key)
        if theirs != ours:
            raise UserError(
                str(folder),
                f"tokenizer.{key} differs: {_short(theirs)} there, {_short(ours)} here",
                "use the tokenizer and chat template that it was trained with, or train it again",
            )


def check_parent(folder: Path, base: Base, tokenizer: PreTrainedTokenizerBase) -> None:
    """`check_lineage`; of an adapter from elsewhere, which has no lineage, what can be checked: that it is plain LoRA,
    and that its config names this base, as far as that lies on this machine. Shapes follow when it is filled in.

    Raises:
        UserError: it does not belong to this base, tokenizer or template.
    """
    if (folder / LINEAGE).is_file():
        check_lineage(folder, base, tokenizer)
        return
    named = read_adapter(folder)[0].base_model_name_or_path
    if named and named not in (base.spec, base.model_id, str(base.path)):
        theirs = resolve_base(named) if Path(named).is_dir() else None
        if theirs is not None and theirs.sha256 != base.sha256:
            raise UserError(
                str(folder),
                f"its adapter_config.json names {named}, which is another model than {base.spec}",
                "use the base that it was trained on",
            )
        if theirs is None:
            logger.warning("%s names the base %s and is used on %s: unverified", folder, named, base.spec)
    logger.warning("%s has no %s: imported, its tokenizer and template are unverified", folder, LINEAGE)


def parent_entry(folder: Path, run: Path) -> dict[str, Any]:
    """What a child's lineage says of an adapter that went in: the stage and the hash of its weights; of one from
    outside the run also its folder.

    Args:
        run: the child's own folder, beside those of the other stages of its run.
    """
    known = (folder / LINEAGE).is_file()
    entry = {"stage": read_lineage(folder).stage if known else IMPORTED, "sha256": adapter_sha256(folder)}
    outside = folder.resolve().parent != run.resolve().parent
    return entry | ({"adapter": str(folder.resolve())} if outside else {})


def load_adapter_base(folder: Path) -> Base:
    """The base of a saved adapter: by its lineage's portable spec, else by what PEFT wrote in adapter_config.json.

    Raises:
        UserError: it cannot be resolved, or what is found there now is another model.
    """
    if (folder / LINEAGE).is_file():
        entry = read_lineage(folder).base
        # Converted bases carry the hash of their source as revision; only a hub's commit can be asked for.
        revision = entry["revision"]
        is_commit = revision is not None and not revision.startswith("sha256:")
        base = resolve_base(entry["spec"], revision if is_commit else None)
        check_base(folder, base)
        return base
    config = read_config(folder)
    if not config.base_model_name_or_path:
        raise UserError(str(folder), "its adapter_config.json names no base", "say which base it belongs to")
    return resolve_base(config.base_model_name_or_path, config.revision)


def _encoding(tokenizer: PreTrainedTokenizerBase) -> Any:
    seams.require(seams.TOKENIZER_CORE)
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        return tokenizer.get_vocab()
    parts = json.loads(core.to_str())
    # State of the last call (padding, truncation), and what only decoding looks at.
    for key in ("padding", "truncation", "decoder", "version"):
        parts.pop(key, None)
    return parts


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else repr(value)
