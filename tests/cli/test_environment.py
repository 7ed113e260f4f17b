"""`preftune env`: what a bug report needs, and no key."""

import builtins
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from preftune.cli.environment import environment, shown_variable

from .conftest import Shell

KEYS = {
    "HF_TOKEN": "short",
    "OPENAI_API_KEY": "whatever it may be",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "PREFTUNE_SECRET": "hush",
    "SLURM_JWT": "hush hush",
    "HTTPS_PROXY": "http://me:password1@proxy.example:3128",
    "WANDB_BASE_URL": "https://wandb.example/?token=abcdefgh12345",
    "HF_ENDPOINT": "https://hf_abcdefghijklmnopqrst@hub.example",
}


def test_versions_and_machine_are_told(shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "deep"
    monkeypatch.setenv("PREFTUNE_CACHE", str(cache))
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    code, out, _ = shell("env", "--json")
    facts = {row["name"]: row["value"] for row in map(json.loads, out.splitlines())}
    assert code == 0
    for name in ("torch", "transformers", "peft", "trl", "accelerate", "datasets"):
        assert facts[name] == version(name)
    assert {"preftune", "python", "system", "cpu", "cpu flags", "memory", "gpus", "cuda of torch"} <= facts.keys()
    assert facts["$PREFTUNE_CACHE"] == str(cache)
    # it changes nothing, and tells of no setting that we would make ourselves
    assert facts["cache"].startswith(f"{cache}, not made yet, ") and not cache.parent.exists()
    assert "$HF_HUB_DISABLE_PROGRESS_BARS" not in facts
    cache.mkdir(parents=True)
    (cache / "weights").write_bytes(bytes(3 << 20))
    assert f"{cache}, 3.0 MiB, " in shell("env")[1]


def test_no_key_is_shown(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("UNRELATED", "nobody's business")
    for words in ("env",), ("env", "--json"):
        _, out, _ = shell(*words)
        assert all(f"${name}" in out for name in KEYS)
        hidden = ("short", "whatever", "0123456789", "hush", "password1", "abcdefgh", "nobody")
        assert not [each for each in hidden if each in out]
    assert "https://wandb.example/?token=***" in out


def test_what_is_no_key_is_shown() -> None:
    assert shown_variable("TOKENIZERS_PARALLELISM", "false") == "false"
    assert shown_variable("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1") == "1"
    assert shown_variable("CUDA_VISIBLE_DEVICES", "") == "(empty)"
    assert shown_variable("HF_HOME", "/data/hf") == "/data/hf"


def test_a_torch_that_cannot_be_imported_is_told_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def broken(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch":
            raise OSError("libcudart.so.13: cannot open shared object file")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    facts = dict(environment())
    assert facts["import torch"] == "fails: OSError: libcudart.so.13: cannot open shared object file"
    assert "cache" in facts and "memory" in facts
