"""A server that draws replies, as the settings name it."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ...errors import UserError
from ..scorers.servers import address, key_of, number
from .process import free_port
from .settings import SERVER_GROUP, EngineName, PlaceSettings, ServerSettings

_DEFAULTS = {each.name: each.default for each in fields(ServerSettings)}


@dataclass(frozen=True)
class Place:
    """Where the server is, and how it is asked (see `posting.Server`).

    Attributes:
        where: its place in the recipe, for errors.
        url: what comes before the endpoints' paths. path: of the endpoint that is asked.
        wait: seconds for which it is waited for where it went away.
        command: how it is started; empty: it runs already.
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
    command: str = ""

    @property
    def address(self) -> str:
        return f"{self.url}{self.path}"

    def at(self, path: str, **changes: Any) -> "Place":
        """Another endpoint of it."""
        return replace(self, path=path, **changes)


def place_of(settings: PlaceSettings | Mapping[str, Any], where: str, *, key_needed: bool = True) -> Place | None:
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
        idle = (key for key, name in SERVER_GROUP.items() if found[key] != _DEFAULTS[name])
        other = next(idle, "ahead" if said("rollout_ahead", 0) else None)
        if other is not None:
            raise UserError(f"{where}.{other}", "has no effect without engine", "write engine: vllm, or leave it out")
        return None
    entry = {key: value for key, value in found.items() if value is not None}
    command = _command(entry, where)
    if command and "url" not in entry:
        entry["url"] = f"http://127.0.0.1:{free_port()}"
    url = address(entry, where, "write url: http://127.0.0.1:8000, say, or command: vllm serve")
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
        command=command,
    )


def _command(entry: Mapping[str, Any], where: str) -> str:
    """How the server is started; empty where it runs already.

    Raises:
        UserError: it is no command, or the url is none that a server can be started at.
    """
    command = entry.get("command")
    if command is None:
        return ""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"{where}.command", f"cannot be read ({error})", "close the quotes") from None
    if not words:
        raise UserError(f"{where}.command", "is empty", "write vllm serve, say, or leave it out")
    if (url := entry.get("url")) is not None and not str(url).startswith("http://"):
        said = f"is {url!r}, and a server that is started here answers at http://"
        raise UserError(f"{where}.url", said, "leave it out: a free port is taken")
    return command
