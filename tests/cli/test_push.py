"""`preftune push` against a stand-in of the hub's HTTP API on this machine: what goes, what does not, what is said."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from preftune.cli.cards import refresh_cards
from preftune.files import LINEAGE
from preftune.intact import contents
from preftune.models.lineage import Lineage, base_info, tokenizer_info, write_lineage
from preftune.models.loading import resolve_base
from preftune.models.model_card import card, write_card
from preftune.models.tokens import load_tokenizer

TOKEN = "hf_" + "a" * 34


class Hub(HTTPServer):
    """What it was asked for, the files that it was given, and what it answers to a path's first part instead."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.refuse: dict[str, int] = {}
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        if "whoami" not in self.path:
            self.server.refuse.setdefault(self.path.partition("?")[0], 404)
        self.answer({"name": "me", "type": "user", "orgs": []})

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        body = self.body()
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for each in files
            ]
            self.answer({"files": modes})
        elif self.path.endswith("/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.server.address}/put/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "lfsFile":
                    self.server.files[entry["value"]["path"]] = self.server.objects[entry["value"]["oid"]]
            url = f"{self.server.address}/me/x/commit/{'a' * 40}"
            self.answer({"success": True, "commitOid": "a" * 40, "commitUrl": url, "hookOutput": ""})
        else:
            self.answer({"url": f"{self.server.address}/me/x", "name": "me/x", "id": "1"})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, content: Any) -> None:
        self.server.asked.append(f"{self.command} {self.path.partition('?')[0]}")
        code = next((code for part, code in self.server.refuse.items() if part in self.path), 200)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not self.path.startswith("/put/"):
            code = 401
        sent = json.dumps(content if code == 200 else {"error": "refused"}).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def stage(run: Path) -> Path:
    """A finished stage with its lineage, and what must stay here beside it."""
    folder, base = run / "dpo", resolve_base("random:llama")
    tokenizer = load_tokenizer(base)
    tokenizer.save_pretrained(folder)
    sources = [{"path": "/home/anna/secret/pairs.jsonl"}, {"path": "trl-lib/ultrafeedback_binarized"}]
    write_lineage(
        folder,
        Lineage(
            stage="dpo",
            kind="dpo",
            base=base_info(base),
            tokenizer=tokenizer_info(tokenizer),
            parents=[{"stage": "sft", "sha256": "b" * 64, "adapter": "/home/anna/runs/sft"}],
            config={"dtype": "float32", "method": {"beta": 0.1}, "train": {"learning_rate": 5e-5}},
            data={"spec": {"sources": sources}, "fingerprint": "c" * 64, "rows": 7},
            seed=3,
            versions={"preftune": "0.1.0"},
            created="2026-11-26T12:00:00+00:00",
            seconds=12.0,
        ),
    )
    (folder / "metrics.json").write_text('{"train_loss": 0.5, "train_seconds": 12.0}\n')
    write_card(folder)
    for name in ("log.jsonl", "rollouts.jsonl", "notes.txt", ".env", ".key.json"):
        (folder / name).write_text("{}")
    (folder / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (folder / "checkpoints" / "checkpoint-1" / "optimizer.pt").write_text("x")
    return folder


GONE = {"README.md", "adapter_config.json", "adapter_model.safetensors", "lineage.json", "metrics.json"}


@pytest.mark.filterwarnings("ignore:Use 'content=")  # huggingface_hub's own, in its upload of large files
def test_what_belongs_to_the_adapter_goes_and_nothing_else(stage: Path, hub: Hub, shell) -> None:
    code, said, err = shell("push", stage, "me/x", "--private", "--revision", "dev")
    assert code == 0, err
    assert f"{hub.address}/me/x" in said
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert hub.files.keys() == GONE | tokenizer
    assert hub.files["adapter_model.safetensors"] == (stage / "adapter_model.safetensors").read_bytes()
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "random:llama"
    assert b"anna" not in b"".join(hub.files[name] for name in GONE - {"adapter_model.safetensors"})
    assert json.loads(hub.files["lineage.json"])["data"]["spec"]["sources"][0] == {"path": "pairs.jsonl"}
    assert any(each.endswith("/me/x/branch/dev") for each in hub.asked)
    assert any(each.endswith("/me/x/commit/dev") for each in hub.asked)


def test_a_dry_run_lists_and_sends_nothing(stage: Path, hub: Hub, shell) -> None:
    code, said, _ = shell("push", stage, "me/x", "--dry-run")
    assert code == 0 and hub.asked == []
    assert "adapter_model.safetensors" in said and "would go to me/x: nothing was sent" in said
    assert not {"optimizer.pt", ".env", "notes.txt", "rollouts.jsonl"} & {
        each.split()[-1] for each in said.splitlines()
    }


@pytest.mark.filterwarnings("ignore:Use 'content=")
@pytest.mark.parametrize(
    ("part", "code", "said"),
    [
        ("whoami", 401, "the token is not valid"),
        ("repos/create", 403, "may not write to me/x"),
        ("commit", 409, "is being changed, or is there"),
        ("preupload", 404, "is not there, or is not yours"),
    ],
)
def test_what_the_hub_refuses_is_one_line(stage: Path, hub: Hub, shell, part: str, code: int, said: str) -> None:
    hub.refuse[part] = code
    shell.refused("push", stage, "me/x", said=said)


def test_no_token_no_hub_and_no_name_are_one_line(stage: Path, hub: Hub, shell, monkeypatch) -> None:
    shell.refused("push", stage, "a/b/c", said="write OWNER/NAME")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    shell.refused("push", stage, "me/x", said="cannot be reached")
    monkeypatch.delenv("HF_TOKEN")
    shell.refused("push", stage, "me/x", said="no token; set .HF_TOKEN")


def test_a_key_is_not_pushed(stage: Path, hub: Hub, shell) -> None:
    text = (stage / LINEAGE).read_text()
    entry = json.loads(text)
    entry["config"]["train"]["note"] = "hf_" + "b" * 34
    (stage / LINEAGE).write_text(json.dumps(entry))
    shell.refused("push", stage, "me/x", "--dry-run", said="looks like a key or a password")
    assert hub.asked == []


def test_the_card_is_the_hubs_and_takes_up_the_evaluation(stage: Path) -> None:
    before = contents(stage)
    text = (stage / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "peft" and front["datasets"] == ["trl-lib/ultrafeedback_binarized"]
    assert "base_model" not in front and {"preftune", "lora", "dpo"} == set(front["tags"])
    assert "/home/anna" not in text and "`pairs.jsonl`" in text and "| beta | 0.1 |" in text
    run = stage.parent
    (run / "eval").mkdir()
    row = {"policy": "dpo", "reference": "sft", "judge": "rubric", "win_rate": 0.61, "ci_low": 0.55, "ci_high": 0.67}
    (run / "eval" / "results.json").write_text(json.dumps([row | {"n": 100, "kl": 1.5}]))
    refresh_cards(run)
    assert "| rubric | sft | 0.610 [0.550, 0.670] | 100 | 1.5 |" in (stage / "README.md").read_text()
    assert contents(stage) == before
    (stage / "README.md").write_text((stage / "README.md").read_text() + "\nMine.\n")
    (run / "eval" / "results.json").unlink()
    refresh_cards(run)
    assert (stage / "README.md").read_text().endswith("Mine.\n")


def test_a_hubs_base_is_named_in_the_card(stage: Path) -> None:
    entry = json.loads((stage / LINEAGE).read_text())
    entry["base"]["spec"] = "HuggingFaceTB/SmolLM2-135M"
    (stage / LINEAGE).write_text(json.dumps(entry))
    text = card(stage)
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert "AutoPeftModelForCausalLM.from_pretrained" in text
