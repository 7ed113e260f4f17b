"""A server that draws replies, as the settings name it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ...errors import UserError
from ..scorers.servers import address, key_of, number
from .settings import SERVER_GROUP, EngineName, ServerSettings

_DEFAULTS = {each.name: each.default for each in fields(ServerSettings)}


@dataclass(frozen=True)
class Place:
    """Where the server is, and how it is asked (see `posting.Server`).

    Attributes:
        where: its place in the recipe, for errors.
        url: what comes before the endpoints' paths. path: of the endpoint that is asked.
        wait: seconds for which it is waited for where it went away.
    """

    where: str
    engine: EngineName
    url: str
    path: str = ""
    key_env: str = ""
    key: str | None = field(default=None, repr=False)
    retries: int = 4
    concurrency: int = 64
    timeout: float = 600.0
    wait: float = 600.0

    @property
    def address(self) -> str:
        return f"{self.url}{self.path}"

    def at(self, path: str, **changes: Any) -> "Place":
        """Another endpoint of it."""
        return replace(self, path=path, **changes)


def place_of(settings: ServerSettings | Mapping[str, Any], where: str, *, key_needed: bool = True) -> Place | None:
    """The server that settings name, its key read from the environment; no request is sent. None where they name none.

    Args:
        settings: a config, or what a recipe says, by the settings' names.
        where: of the `rollout` group in the recipe.

    Raises:
        UserError: a missing or malformed setting, or a named variable that is not set.
    """
    said = settings.get if isinstance(settings, Mapping) else lambda name, default: getattr(settings, name, default)
    found = {key: said(name, _DEFAULTS[name]) for key, name in SERVER_GROUP.items()}
    engine = found["engine"]
    if engine is None:
        other = next((key for key, name in SERVER_GROUP.items() if found[key] != _DEFAULTS[name]), None)
        if other is not None:
            raise UserError(f"{where}.{other}", "has no effect without engine", "write engine: vllm, or leave it out")
        return None
    entry = {key: value for key, value in found.items() if value is not None}
    url = address(entry, where, "write url: http://127.0.0.1:8000, say")
    if url.endswith("/v1"):
        raise UserError(f"{where}.url", f"is {url!r}, whose end we add", "leave out /v1")
    key_env, key = key_of(entry, where, None, needed=key_needed)
    return Place(
        where=where,
        engine=engine,
        url=url,
        key_env=key_env,
        key=key,
        retries=int(number(entry, "retries", 4, where, low=0, whole=True)),
        concurrency=int(number(entry, "concurrency", 64, where, low=1, whole=True)),
        timeout=number(entry, "timeout", 600.0, where, low=0.001),
        wait=number(entry, "wait", 600.0, where, low=0),
    )
