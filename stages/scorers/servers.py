"""What a recipe says of a server that scores: its address, the key's variable, patience, and where answers are kept."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...errors import UserError
from ...files import EVAL_CACHE
from ...values import is_finite

KEY_ENV = "OPENAI_API_KEY"


def address(entry: Mapping[str, Any], where: str, remedy: str) -> str:
    """The entry's `url`, without a slash at its end.

    Raises:
        UserError: it is none, or holds what somebody logs in with.
    """
    url = entry.get("url")
    if not isinstance(url, str):
        raise UserError(f"{where}.url", f"is {url!r}, expected an address", remedy)
    try:
        parts = urlsplit(url)
        secret = bool(parts.username or parts.password or parts.query or parts.fragment)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        secret = good = False
    if secret:
        # Not shown: what stands there may be a secret.
        remedy = "leave out what stands before @ or after ?; a key goes into the environment (api_key_env)"
        raise UserError(f"{where}.url", "holds a user name, a password or a query", remedy)
    if not good:
        raise UserError(f"{where}.url", f"is {url!r}, expected http:// or https:// and a host", remedy)
    return url.rstrip("/")


def key_of(
    entry: Mapping[str, Any], where: str, default: str | None = KEY_ENV, *, needed: bool = True
) -> tuple[str, str | None]:
    """(variable, its key); None where no variable is named and the default one is not set: servers at home take no key.

    Args:
        default: the variable that is looked at where the entry names none; None: none is.
        needed: whether a variable that is named must be set.
    """
    variable = entry.get("api_key_env", default)
    if variable is None:
        return "", None
    # Lower-case letters are allowed in a variable's name, but then it could be a key that was written here by mistake.
    if not isinstance(variable, str) or not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        remedy = f"write the variable's name, as {KEY_ENV}, and never the key itself"
        raise UserError(f"{where}.api_key_env", "is no name of an environment variable in capitals", remedy)
    key = os.environ.get(variable, "").strip()
    if not key and entry.get("api_key_env") is not None and needed:
        raise UserError(f"{where}.api_key_env", f"${variable} is not set", f"put the key into ${variable}")
    # Anything else could not stand in a header, or would come back in another spelling.
    if key and not re.fullmatch(r"[!#-\[\]-~]+", key):
        remedy = "put the key there, printable ASCII without spaces, quotes and backslashes"
        raise UserError(f"{where}.api_key_env", f"what ${variable} holds is no key", remedy)
    return variable, key or None


def cache_folder(entry: Mapping[str, Any], where: str, run_dir: Path | None) -> Path | None:
    """Where answers are kept: the entry's `cache`, else within the run; None: nowhere, as with `cache: false`."""
    named = entry.get("cache")
    if named is None:
        return run_dir / EVAL_CACHE if run_dir is not None else None
    if named is False:
        return None
    if not isinstance(named, str) or not named:
        raise UserError(f"{where}.cache", f"is {named!r}, expected a folder", "write cache: FOLDER, or leave it out")
    folder = Path(named).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{where}.cache", f"{named!r} is no folder", "write cache: FOLDER, or leave it out")
    return folder


def number(entry: Mapping[str, Any], key: str, default: float, where: str, *, low: float, whole: bool = False) -> float:
    """One of the entry's numbers. Raises UserError where it is none, or below `low`."""
    value = entry.get(key, default)
    if not is_finite(value) or (whole and not isinstance(value, int)) or value < low:
        wanted = f"a {'whole ' if whole else ''}number of at least {low:g}"
        raise UserError(f"{where}.{key}", f"is {value!r}, expected {wanted}", "correct it, or leave it out")
    return value
