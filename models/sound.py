"""Whether a base's folder is whole: what is cut off, broken or missing is said before it becomes random numbers.

transformers fills what a checkpoint lacks with random weights and only logs it. Here that is an error, for the base and
for every other model that is loaded.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import UserError

WHERE = "model.base"
INDEX, WEIGHTS, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
AGAIN = "fetch the model again, or give another one"

_READ = (".json", ".safetensors", ".jinja", ".model", "vocab.txt", "merges.txt")
"""How the names of the files end that transformers reads."""
_OBJECTS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""What transformers passes over in silence where it cannot be read, or fails on without saying what it was."""
_LONGEST_HEADER = 100 << 20
"""Bytes: safetensors' own limit."""
_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
_EXPONENTS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000)} | {
    "F64": ("<u8", 0x7FF0 << 48)
}
"""All bits of the exponent set: infinite or NaN."""
_CHUNK = 1 << 22

Header = dict[str, dict[str, Any]]


def check_files(folder: Path, spec: str) -> None:
    """Every file that transformers would read is one, and can be read: a pipe would be waited for.

    Raises:
        UserError: which is none.
    """
    try:
        for path in sorted(folder.iterdir()):
            if path.name.endswith(_READ) and not path.is_file() and not path.is_dir():
                what = "a link that leads nowhere" if path.is_symlink() else "no file (a pipe or a device)"
                raise UserError(WHERE, f"{path.name} of {spec!r} is {what}", AGAIN)
    except OSError as error:
        raise UserError(WHERE, f"{spec!r} cannot be read ({error.strerror})", "look at its permissions") from error
    for name in _OBJECTS:
        if (folder / name).is_file():
            read_object(folder / name, spec)


def read_object(file: Path, spec: str) -> dict[str, Any]:
    """The JSON object in a file of the base. Raises UserError where it holds anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())[:120] or "empty"
        raise UserError(WHERE, f"{file.name} of {spec!r} cannot be read ({said})", AGAIN) from error
    if not isinstance(found, dict):
        raise UserError(WHERE, f"{file.name} of {spec!r} holds no object", AGAIN)
    return found


def weight_files(folder: Path, spec: str) -> list[Path]:
    """The safetensors files that transformers would load, by name.

    Raises:
        UserError: there are none, or an index that cannot be followed within the folder.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        remedy = "convert it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        raise UserError(WHERE, f"{spec!r} has no {WEIGHTS}", remedy)
    named = read_object(folder / INDEX, spec).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(each, str) for each in named.values()):
        raise UserError(WHERE, f"{INDEX} of {spec!r} has no weight_map from names to files", AGAIN)
    for name in sorted(set(named.values())):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise UserError(WHERE, f"{INDEX} of {spec!r} names {name!r}, outside of its folder", AGAIN)
        if not (folder / name).is_file():
            raise UserError(WHERE, f"{spec!r} lacks {name}", "fetch the model again")
    return [folder / name for name in sorted(set(named.values()))]


def read_header(file: Path, spec: str) -> tuple[int, Header]:
    """(where the tensors begin, name -> dtype, shape, data_offsets) of a safetensors file.

    Raises:
        UserError: it is cut off, or its header is none.
    """

    def broken(why: str) -> UserError:
        return UserError(WHERE, f"{file.name} of {spec!r} is damaged, {why}", AGAIN)

    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise broken(f"it has {size} bytes and its header would have {length}")
        try:
            header = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            end = max((_end(name, entry) for name, entry in header.items()), default=0)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            said = " ".join(str(error).split())[:120]
            raise broken(f"its header cannot be read ({said or type(error).__name__})") from error
    if 8 + length + end != size:
        raise broken(f"{'cut off: ' if size < 8 + length + end else ''}it has {size} bytes, {8 + length + end} are due")
    return 8 + length, header


def _end(name: str, entry: Mapping[str, Any]) -> int:
    """Where a tensor ends. Raises ValueError where what is said of it does not fit together."""
    (begin, end), shape, width = entry["data_offsets"], entry["shape"], _BYTES.get(entry["dtype"])
    fits = all(type(each) is int and each >= 0 for each in (begin, end, *shape))
    if not fits or (width is not None and end - begin != width * math.prod(shape)):
        raise ValueError(f"{name} of shape {shape} in {entry['dtype']} does not fill bytes {begin} to {end}")
    return end


def check_numbers(name: str, dtype: str, data: memoryview, spec: str, *, quantized: bool) -> None:
    """A tensor's numbers are finite, and a weight is no whole number.

    Args:
        quantized: weights may then be stored in any type.

    Raises:
        UserError: they are not.
    """
    import numpy as np

    if dtype not in _EXPONENTS:
        if not quantized and name.endswith(".weight") and dtype[0] in "IUB" and dtype != "BF16":
            raise UserError(WHERE, f"{name} of {spec!r} is stored as {dtype}, no type of weights", AGAIN)
        return
    if "mask" in name:  # of an old checkpoint: infinite where nothing is to be seen
        return
    kind, exponent = _EXPONENTS[dtype]
    bits = np.frombuffer(data, dtype=kind)
    for begin in range(0, len(bits), _CHUNK):
        if ((bits[begin : begin + _CHUNK] & exponent).max(initial=0)) == exponent:
            raise UserError(WHERE, f"{name} of {spec!r} holds NaN or infinite weights", AGAIN)


def check_loaded(report: Mapping[str, Any], model: Any, where: str, spec: str, *, fresh: tuple[str, ...] = ()) -> None:
    """What `from_pretrained(..., output_loading_info=True)` says was loaded is all of the model, and nothing is over.

    Args:
        where: what names the model.
        fresh: weights that are meant to be new.

    Raises:
        UserError: weights are missing, of another shape, or of layers that the model does not have.
    """
    missing = sorted(name for name in report["missing_keys"] if name not in fresh)
    other = sorted(str(each[0]) for each in report["mismatched_keys"])
    over = sorted(name for name in report["unexpected_keys"] if _belongs(name, model))
    found = (
        ("are not in it and would be random", missing),
        ("have another shape than config.json says", other),
        ("are in it and have no place in the model that config.json says", over),
    )
    for what, names in found:
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            remedy = "take a config.json and weights that belong together"
            raise UserError(where, f"weights of {spec!r} {what}: {names[0]}{more}", remedy)


def _belongs(name: str, model: Any) -> bool:
    """Whether a weight that found no place lies within a part that the model has: another part is none of ours."""
    parts, prefixes = name.split("."), {"", model.base_model_prefix}
    inside = next((".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1) if _has(model, parts[:n])), "")
    return inside not in prefixes


def _has(model: Any, parts: list[str]) -> bool:
    for part in parts:
        model = getattr(model, "_modules", {}).get(part)
        if model is None:
            return False
    return True


def load_whole(load: Callable[..., Any], where: str, spec: str, *, fresh: tuple[str, ...] = (), **options: Any) -> Any:
    """A model by its `from_pretrained`, refused unless every weight of it was in the checkpoint.

    Args:
        load: `from_pretrained` of a class, its path filled in.
        options: for it.

    Raises:
        UserError: it cannot be loaded, or not whole.
    """
    try:
        model, report = load(**options, output_loading_info=True, ignore_mismatched_sizes=True)
    except UserError:
        raise
    except Exception as error:
        # what the machine lacks is not the folder's fault
        if isinstance(error, MemoryError | ImportError) or "out of memory" in str(error):
            raise
        raise UserError(where, f"{spec!r} cannot be loaded ({first_line(error)})", AGAIN) from error
    check_loaded(report, model, where, spec, fresh=fresh)
    return model


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind."""
    lines = str(error).strip().splitlines()
    return " ".join((lines or [type(error).__name__])[0].split())[:200]
