"""A chat endpoint on this machine: a real HTTP server that answers as a test tells it to."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from preftune.stages.scorers.endpoint_client import Endpoint

Reply = tuple[int, dict[str, str], Any] | None


class ChatServer:
    """`respond(body, n)` answers the n-th request (from 1): (status, headers, payload), or None to hang up."""

    def __init__(self, respond: Callable[[dict[str, Any], int], Reply]) -> None:
        self.respond = respond
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

        class Server(ThreadingHTTPServer):
            request_queue_size = 64

        self.http = Server(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> "ChatServer":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        chat = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with chat.lock:
                    chat.bodies.append(body)
                    chat.paths.append(self.path)
                    chat.keys.append(self.headers.get("Authorization"))
                    n = len(chat.bodies)
                    chat.at_once += 1
                    chat.most_at_once = max(chat.most_at_once, chat.at_once)
                reply = chat.respond(body, n)
                with chat.lock:
                    chat.at_once -= 1
                if reply is None:
                    return
                status, headers, payload = reply
                content = (payload if isinstance(payload, str) else json.dumps(payload)).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


def completion(text: str | None, read: int = 10, written: int = 2) -> Reply:
    """A chat completion as OpenAI writes it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    return 200, {}, {"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}


def last_words(body: dict[str, Any]) -> str:
    """What the request's last message says."""
    return body["messages"][-1]["content"]


def echo(body: dict[str, Any], n: int) -> Reply:
    """Answers with what was said."""
    del n
    return completion(f"you said {last_words(body)}")


def saying(*texts: str) -> list[list[dict[str, str]]]:
    """One conversation per text."""
    return [[{"role": "user", "content": text}] for text in texts]


def endpoint(server: ChatServer, **changes: Any) -> Endpoint:
    settings: dict[str, Any] = {"where": "eval.judges[0]", "url": server.url, "model": "tiny", "key_env": "TEST_KEY"}
    return Endpoint(**(settings | changes))
