"""The page's server: on this machine alone unless told otherwise, and then behind a token."""

import ipaddress
import os
import secrets
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from ...errors import UserError
from ...files import REPORT

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response
    from gradio import Blocks

_COOKIE = "preftune_token"
_CONTENT = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'none'"
)
"""What a browser may fetch for the page: nothing from elsewhere."""


def quiet_gradio() -> None:
    """Leave out of gradio what the page does not use. Call it before it is imported."""
    for name in ("GRADIO_SSR_MODE", "GRADIO_MCP_SERVER", "GRADIO_RUN_HISTORY"):
        os.environ[name] = "False"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what is served there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        UserError: the port is in use or not ours to take, or the host is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen(128)
    except OSError as error:
        made.close()
        if isinstance(error, socket.gaierror) or error.errno in (99, 49):
            said, remedy = f"{host!r} is no address of this machine", "leave it out, or give 0.0.0.0"
            raise UserError("--host", said, remedy) from error
        said = f"{port} cannot be had ({os.strerror(error.errno or 0)})"
        raise UserError("--port", said, "give another, or 0 for any that is free") from error
    return made


def address(host: str, port: int, token: str | None) -> str:
    """What to open in a browser."""
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/" + (f"?token={quote(token, safe='')}" if token else "")


def application(blocks: "Blocks", run: Path, host: str, token: str | None) -> "FastAPI":
    """The page in its frame."""
    import gradio as gr

    from . import shown

    theme = gr.Theme(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return gr.mount_gradio_app(
        guarded(run, host, token), blocks, "/", theme=theme, head=shown.head(), footer_links=[], run_history=False,
        ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False, show_error=False,
    )  # fmt: skip


def guarded(run: Path, host: str, token: str | None) -> "FastAPI":
    """What the page is put into: the run's report, and who may see anything at all."""
    from fastapi import FastAPI
    from fastapi.responses import FileResponse, PlainTextResponse, RedirectResponse

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get(f"/{REPORT}")
    def report() -> Any:
        file = run / REPORT
        return FileResponse(file) if file.is_file() else PlainTextResponse("no report yet", 404)

    @app.middleware("http")
    async def guard(request: "Request", go_on: "Callable[[Request], Awaitable[Response]]") -> "Response":
        if token is None and not _asks_for_us(request, host):
            return PlainTextResponse("this page is served to its own machine alone", 403)
        if token is not None:
            given = request.query_params.get("token")
            if given is not None and _same(given, token):
                # the token leaves the address bar, where it would be copied and logged
                answer = RedirectResponse(str(request.url.remove_query_params("token").path), 303)
                answer.set_cookie(_COOKIE, token, httponly=True, samesite="strict")
                return answer
            if not _same(request.cookies.get(_COOKIE) or "", token):
                return PlainTextResponse("open the whole address that preftune ui printed: its token is missing", 401)
        answer = await go_on(request)
        answer.headers["Content-Security-Policy"] = _CONTENT
        answer.headers["Referrer-Policy"] = "no-referrer"
        return answer

    return app


def serve(app: "FastAPI", listening: socket.socket) -> None:
    """Serve until somebody presses Ctrl-C."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2))
    with suppress(KeyboardInterrupt):
        server.run([listening])


def new_token() -> str:
    """A token that nobody guesses."""
    return secrets.token_urlsafe(24)


def _same(given: str, token: str) -> bool:
    return secrets.compare_digest(given.encode(), token.encode())


def _asks_for_us(request: "Request", host: str) -> bool:
    """Whether a request is our page's: it names this machine, by no name that merely leads here, and no page elsewhere
    sent it."""
    asked = request.headers.get("host") or ""
    named = asked.rsplit(":", 1)[0].strip("[]") or host
    origin = request.headers.get("origin")
    return (named == host or is_loopback(named)) and (origin is None or urlsplit(origin).netloc == asked)
