"""Keys have no place in a recipe: it is written into the run folder, the report and lineage files, and passed on."""

import re
from collections.abc import Iterator
from typing import Any

from ..errors import UserError
from ..printed import HIDDEN, holds_key, redacted
from .problems import problem
from .text import Path_, Text

_WORDS = (
    *("token", "api_key", "apikey", "secret", "password", "passwd", "authorization", "credentials", "bearer"),
    *("access_key", "private_key", "client_secret", "auth", "cookie"),
)
# A variable's name, and words of the vocabulary.
_NO_SECRETS = (
    "api_key_env",
    "eos_token",
    "pad_token",
    "bos_token",
    "unk_token",
    "sep_token",
    "cls_token",
    "mask_token",
)
# One of the words as the key of a mapping.
_NAMED = re.compile(rf"(?i)(?:{'|'.join(_WORDS).replace('_', '[_-]')})['\"]?\s*:")
# An address that begins with what somebody logs in with.
_LOGIN = re.compile(r"(?i)(?:https?|ftp|s3|wss?)://[^\s/@]+@\S+")
_HUB = ("hub_token", "push_to_hub_token", "token", "use_auth_token", "hf_token")


def secret_problems(text: Text) -> Iterator[UserError]:
    """An error, which does not show it, for each value that is a key or a password by its name or by its form."""
    for path, value in _leaves(text.values, ()):
        key = next((part for part in reversed(path) if isinstance(part, str)), "")
        if _is_secret(key, value):
            remedy = "keep it in the environment, which is read there"
            if "judges" in path or "reward" in path:
                remedy = "leave it out, and put the key into the environment (api_key_env names the variable)"
            elif key in _HUB:
                remedy = "leave it out: the hub reads $HF_TOKEN"
            yield problem(text, path, "holds a key or a password, which a recipe would spread", remedy)


def shown_override(override: str) -> str:
    """An override of the command line as messages show it: without what may be a key."""
    name, equals, value = override.partition("=")
    if equals and (_is_secret(name.rpartition(".")[2].strip(), value) or _NAMED.search(value)):
        return f"{name}={HIDDEN}"
    return redacted(override)


def _is_secret(key: str, value: Any) -> bool:
    if not isinstance(value, str) or not value.strip() or value == "null":
        return False
    name = key.lower().replace("-", "_")
    by_name = name not in _NO_SECRETS and any(name == word or name.endswith(f"_{word}") for word in _WORDS)
    return by_name or holds_key(value) or _LOGIN.fullmatch(value.strip()) is not None


def _leaves(values: Any, path: Path_) -> Iterator[tuple[Path_, Any]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _leaves(value, (*path, str(key)))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from _leaves(value, (*path, index))
    else:
        yield path, values
