"""A stand-in for vLLM's server: real HTTP, a real model behind it, sampled by transformers and PEFT alone.

Its answers have the shape of vLLM's own (`recorded_vllm.json` beside this file, held against it by a test), and it can
be told to do what servers do: go away, forget, answer for another adapter, serve another base.
"""

import json
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from preftune.stages.scorers import posting
from preftune.stages.serving import server as serving


def ask_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits longer than a moment; proxies of the machine are not asked."""
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(posting, "pause", lambda seconds, stop: None)
    monkeypatch.setattr(serving, "_PAUSE", 0.05)


@dataclass
class Faults:
    """What it does wrong.

    dies_after: completions, after which it goes away; back: seconds after which it is there again, with no adapters,
    and with the base `another` where one is named.
    stale: the name that its answers carry. short: log-probs that are missing. slow: seconds for each completion.
    deaf: adapters are loaded, and not used. ends: a token at which it ends replies by itself.
    """

    dies_after: int | None = None
    back: float | None = None
    another: Path | None = None
    stale: str | None = None
    short: int = 0
    slow: float = 0.0
    deaf: bool = False
    ends: int | None = None
    long: bool = False


@dataclass
class Served:
    """The server. Attributes: heard: every request as (path, body)."""

    base: Path
    faults: Faults = field(default_factory=Faults)
    processed: bool = False
    longest: int = 1024
    runtime_lora: bool = True
    model: Any = None
    heard: list[tuple[str, Any]] = field(default_factory=list)
    adapters: dict[str, str] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.RLock)
    port: int = 0
    done: int = 0
    deaths: int = 0

    def __enter__(self) -> "Served":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def completions(self) -> list[Any]:
        """The bodies of requests for replies."""
        drawn = [body for path, body in self.heard if path == "/v1/completions"]
        return [body for body in drawn if "prompt_logprobs" not in body and body["logprobs"] == 0]

    def start(self) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()
        self.adapters = {}
        ThreadingHTTPServer.allow_reuse_address = True
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), _handler(self))
        self.http.daemon_threads = True
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def die(self) -> None:
        """Go away, and come back without adapters where that is asked for."""
        self.deaths, self.faults.dies_after = self.deaths + 1, None
        back = self.faults.back

        def go() -> None:
            self.stop()
            if back is not None:
                time.sleep(back)
                self.base = self.faults.another or self.base
                self.start()

        threading.Thread(target=go, daemon=True).start()

    # --- what it does

    def models(self) -> tuple[int, Any]:
        def card(name: str, root: str, parent: str | None, longest: int | None) -> dict[str, Any]:
            return {
                "id": name, "object": "model", "created": 1, "owned_by": "vllm", "root": root, "parent": parent,
                "max_model_len": longest, "permission": [],
            }  # fmt: skip

        cards = [card("base", str(self.base), None, self.longest)]
        cards += [card(name, root, "base", None) for name, root in self.adapters.items()]
        return 200, {"object": "list", "data": cards}

    def load(self, body: Any) -> tuple[int, Any]:
        name, folder = body["lora_name"], body["lora_path"]
        if name in self.adapters:
            return error(400, f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput")
        if not (Path(folder) / "adapter_config.json").is_file():
            return error(404, f"Loading lora {name} failed: No adapter found for {folder}", "NotFoundError")
        if isinstance(self.model, PeftModel):
            self.model.load_adapter(folder, name)
        else:
            self.model = PeftModel.from_pretrained(self.model, folder, adapter_name=name).eval()
        self.adapters[name] = folder
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body: Any) -> tuple[int, Any]:
        name = body["lora_name"]
        if name not in self.adapters:
            return error(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        del self.adapters[name]
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    def complete(self, body: Any) -> tuple[int, Any] | None:
        name = body.get("model") or "base"
        if name != "base" and name not in self.adapters:
            return error(404, f"The model `{name}` does not exist.", "NotFoundError")
        if len(body["prompt"]) + body["max_tokens"] > self.longest:
            return error(400, f"This model's maximum context length is {self.longest} tokens.", "BadRequestError")
        drawn = "prompt_logprobs" not in body and body.get("logprobs") == 0
        if drawn and self.faults.dies_after is not None and self.done >= self.faults.dies_after:
            self.die()
            return None
        time.sleep(self.faults.slow)
        with torch.no_grad():
            choice = self._drawn(body, name)
            if "prompt_logprobs" in body:
                choice["prompt_logprobs"] = self._scores(body["prompt"], name)
        self.done += drawn
        usage = {"prompt_tokens": len(body["prompt"]), "total_tokens": 0, "completion_tokens": 0}
        usage |= dict.fromkeys(("prompt_tokens_details", "completion_tokens_details"))
        return 200, {
            "id": "cmpl-0", "object": "text_completion", "created": 1, "model": self.faults.stale or name,
            "choices": [choice], "service_tier": None, "system_fingerprint": "vllm", "usage": usage,
            "kv_transfer_params": None, "ec_transfer_params": None, "metrics": None,
        }  # fmt: skip

    def logits(self, ids: list[int], name: str) -> torch.Tensor:
        """[T, V], under that adapter."""
        row = torch.tensor([ids])
        if not isinstance(self.model, PeftModel):
            return self.model(input_ids=row).logits[0].float()
        if name == "base" or self.faults.deaf:
            with self.model.disable_adapter():
                return self.model(input_ids=row).logits[0].float()
        self.model.set_adapter(name)
        return self.model(input_ids=row).logits[0].float()

    def _scores(self, ids: list[int], name: str) -> list[Any]:
        logps = self.logits(ids, name)[:-1].log_softmax(-1)
        told = [
            {str(t): {"logprob": float(logps[i, t]), "rank": 1, "decoded_token": "x"}} for i, t in enumerate(ids[1:])
        ]
        return [None, *told]

    def _drawn(self, body: Any, name: str) -> dict[str, Any]:
        ids, tokens, told = list(body["prompt"]), [], []
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        temperature, top_k, top_p = body["temperature"], body["top_k"], body["top_p"]
        likeliest: list[dict[str, float]] = []
        stops = [*body.get("stop_token_ids", []), *([] if self.faults.ends is None else [self.faults.ends])]
        for _ in range(body["max_tokens"]):
            raw = self.logits(ids, name)[-1]
            probs = (raw / (temperature or 1.0)).softmax(-1)
            kept = probs.clone()
            if top_k > 0:
                kept[probs < probs.topk(top_k).values[-1]] = 0
            if top_p < 1:
                order = probs.sort(descending=True)
                kept[order.indices[order.values.cumsum(0) - order.values >= top_p]] = 0
            token = int(raw.argmax()) if temperature == 0 else int(kept.multinomial(1, generator=generator))
            logps = (kept / kept.sum()).log() if self.processed else raw.log_softmax(-1)
            ids, tokens, told = [*ids, token], [*tokens, token], [*told, float(logps[token])]
            best = logps.topk(max(body.get("logprobs") or 0, 1))
            likeliest.append({f"token_id:{int(i)}": float(v) for v, i in zip(best.values, best.indices, strict=True)})
            if token in stops and not self.faults.long:
                break
        stopped = tokens[-1] in stops
        told = told[: len(told) - self.faults.short]
        logprobs = {"text_offset": [0] * len(told), "token_logprobs": told, "tokens": [f"token_id:{t}" for t in tokens]}
        return {
            "index": 0, "text": "", "routed_experts": None,
            "logprobs": {**logprobs, "top_logprobs": likeliest} if "logprobs" in body else None,
            "finish_reason": "stop" if stopped else "length", "stop_reason": tokens[-1] if stopped else None,
            "token_ids": tokens, "prompt_logprobs": None, "prompt_token_ids": list(body["prompt"]),
        }  # fmt: skip


def error(status: int, message: str, kind: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": kind, "param": None, "code": status}}


def _handler(server: Served) -> type[BaseHTTPRequestHandler]:
    deaths = server.deaths  # who was asked before it died does not answer once it is back

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/health":
                self.answer((200, ""))
                return
            self.answer(server.models() if self.path == "/v1/models" else (404, {"detail": "Not Found"}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            paths = {"/v1/completions": server.complete}
            if server.runtime_lora:
                paths |= {"/v1/load_lora_adapter": server.load, "/v1/unload_lora_adapter": server.unload}
            with server.lock:
                server.heard.append((self.path, body))
                found = None
                if server.deaths == deaths:
                    found = paths[self.path](body) if self.path in paths else (404, {"detail": "Not Found"})
                found = found if server.deaths == deaths else None
            if found is not None:
                self.answer(found)

        def answer(self, found: tuple[int, Any]) -> None:
            status, payload = found
            content = (payload if isinstance(payload, str) else json.dumps(payload)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            if not isinstance(payload, str):
                self.send_header("Content-Type", "application/json")
            with suppress(BrokenPipeError, ConnectionResetError):  # who asked has gone
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    return Handler
