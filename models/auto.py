"""The one door to transformers' Auto classes: code that comes with a model never runs, and weights are safetensors."""

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from ..errors import UserError
from ..files import ADAPTER_CONFIG
from .sound import AGAIN, first_line, load_whole

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.msgpack", "*.h5")
_KERNELS = ("attn_implementation", "experts_implementation")


def open_config(folder: Path, where: str = "model.base", **options: Any) -> PreTrainedConfig:
    """The config of the model in a folder.

    Args:
        where: the place that names the folder, for errors.

    Raises:
        UserError: it can be read with code of its own only, or asks for code from the hub.
    """
    _check_kernels(folder, where)
    with _no_code(folder, where):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)


def open_tokenizer(folder: Path, where: str = "model.base", **options: Any) -> Any:
    """The tokenizer in a folder, or (`gguf_file`) in a file of it; arguments and errors as of `open_config`.

    Raises:
        UserError: it cannot be read, or with code of its own only.
    """
    try:
        with _no_code(folder, where):
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    except UserError:
        raise
    except Exception as error:  # a foreign file: its reader fails in every way there is
        said = f"the tokenizer of {str(folder)!r} cannot be read ({first_line(error)})"
        raise UserError(where, said, AGAIN) from error


def open_model(
    auto: Any,
    folder: Path,
    where: str = "model.base",
    *,
    spec: str | None = None,
    fresh: tuple[str, ...] = (),
    **options: Any,
) -> Any:
    """The model in a folder, its weights from that folder and from safetensors (or the GGUF file that is named) alone.

    Args:
        auto: which of transformers' Auto classes opens it.
        where: the place that names the folder, for errors.
        spec: what the user calls it, for errors; None: the folder.
        fresh: weights that are meant to be new.
        options: further arguments of its `from_pretrained`.

    Raises:
        UserError: it needs code of its own, or fetches some; its weights are pickles, or lie elsewhere; it cannot be
            loaded, or weights of it are not there.
    """
    if "gguf_file" not in options:
        check_model(folder, where)
        options |= {"use_safetensors": True}

    def load(**more: Any) -> Any:
        with _no_code(folder, where):
            return auto.from_pretrained(folder, trust_remote_code=False, **more)

    return load_whole(load, where, spec or str(folder), fresh=fresh, **options)


def check_model(folder: Path, where: str) -> None:
    """What transformers would load instead of the folder's own safetensors, or run, without a word. Quick: no weights.

    Args:
        where: the place that names the folder, for errors.

    Raises:
        UserError: as `open_model`, but for code of its own.
    """
    shown = str(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        said = f"{shown!r} holds an {ADAPTER_CONFIG} beside its config.json: that adapter would be loaded as well"
        raise UserError(where, said, "give the model a folder of its own, or merge the adapter into it")
    config = _json(folder / "config.json")
    if (named := config.get("transformers_weights")) not in (None, "model.safetensors"):
        said = f"the config.json of {shown!r} takes its weights from {named!r} (transformers_weights)"
        raise UserError(where, said, "save the model again: its weights are read from model.safetensors alone")
    _check_kernels(folder, where)
    index = _json(folder / "model.safetensors.index.json").get("weight_map")
    for file in sorted(set(index.values())) if isinstance(index, dict) else ():
        if Path(str(file)).name != file or not str(file).endswith(".safetensors"):
            said = f"model.safetensors.index.json of {shown!r} names {file!r}, which is no safetensors file beside it"
            raise UserError(where, said, "save the model again")
    if (folder / "model.safetensors").is_file() or index:
        return
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    said = f"the weights of {shown!r} are {pickles[0]}, a pickle, which can run code when it is read" if pickles else ""
    raise UserError(
        where,
        said or f"{shown!r} has no model.safetensors",
        "use its safetensors (where you trust it, save_pretrained writes them)" if pickles else "fetch the model again",
    )


def _check_kernels(folder: Path, where: str) -> None:
    """No part of the config names code on the hub that transformers would fetch and run."""
    ahead: list[Any] = [_json(folder / "config.json")]
    while ahead:
        part = ahead.pop()
        for key, value in part.items():
            kernels = value.values() if isinstance(value, dict) else [value]
            named = [each for each in kernels if isinstance(each, str) and "/" in each]
            if key.removeprefix("_") in _KERNELS and named:
                said = f"asks for the code of a kernel from the hub ({key}: {named[0]!r})"
                raise UserError(where, f"the config.json of {str(folder)!r} {said}", f"take {key} out of it")
        ahead += [each for each in part.values() if isinstance(each, dict)]


def _json(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # who needs it says so
        return {}
    return read if isinstance(read, dict) else {}


@contextmanager
def _no_code(folder: Path, where: str) -> Generator[None]:
    """Within it transformers' refusal to run a model's code is said in words."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        said = f"{str(folder)!r} works with code of its own only (auto_map), which is never run"
        raise UserError(where, said, "use a model that transformers has itself") from error
