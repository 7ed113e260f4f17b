"""`preftune serve`: the command is the one that the stage needs, and the server that it starts ends with it."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from preftune.errors import UserError
from preftune.stages.serving.command import Serving, server_command, server_environment, start_of
from preftune.stages.serving.process import ServerProcess, answers, check_free, free_port

FAKE = Path(__file__).with_name("fake_vllm.py")
SERVING = Serving(
    engine="vllm", base=Path("/b"), tokenizer=Path("/s"), rank=16, dtype="bfloat16", max_model_len=1024, port=8123
)


def options(words: list[str]) -> dict[str, str]:
    """Each option with the word behind it."""
    return {word: after for word, after in zip(words, [*words[1:], ""], strict=True) if word.startswith("--")}


@pytest.fixture
def interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `--python` names; its notes lie beside it."""
    file = tmp_path / "python-of-vllm"
    file.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
    file.chmod(0o755)
    monkeypatch.setenv("FAKE_VLLM_NOTES", str(tmp_path / "notes.json"))
    return file


@pytest.fixture
def notes(tmp_path: Path) -> Callable[[], dict[str, Any]]:
    return lambda: json.loads((tmp_path / "notes.json").read_text())


@pytest.fixture
def serving(run: Path, interpreter: Path) -> Iterator[Callable[..., tuple["subprocess.Popen[str]", str]]]:
    """Starts `preftune serve RUN/dpo --run` and waits until it says where."""
    begun: list[subprocess.Popen[str]] = []

    def start() -> tuple["subprocess.Popen[str]", str]:
        words = ["serve", str(run / "dpo"), "--run", "--python", str(interpreter), "--port", str(free_port())]
        # a background job's children ignore SIGINT, and a command keeps to that
        heard = "import signal as s; s.signal(s.SIGINT, s.default_int_handler)"
        command = [sys.executable, "-c", f"{heard}; from preftune.cli.main import main; main()", *words]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        begun.append(process)
        assert process.stdout is not None and process.stderr is not None
        url = process.stdout.readline().strip()
        assert url, process.stderr.read()
        return process, url

    yield start
    for process in begun:
        if process.poll() is None:
            process.kill()
        process.communicate()


def are_gone(pids: list[int], within: float = 20.0) -> bool:
    until = time.monotonic() + within
    while time.monotonic() < until:
        if not any(Path(f"/proc/{pid}").exists() and "Z" not in _state(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@pytest.mark.checklist("V8")
def test_v08_the_printed_command_serves_the_stage_on_its_base(run: Path, shell) -> None:
    (run / "dpo" / "tokenizer.json").write_text("{}")
    (run / "dpo" / "chat_template.jinja").write_text("x")
    code, said, _ = shell("serve", run / "dpo", "--port", 8123)
    assert code == 0
    words = shlex.split(said)
    assert words[0] == "env" and {"HF_HUB_OFFLINE=1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"} <= set(words)
    place = words.index("vllm")
    assert words[place + 1] == "serve" and (Path(words[place + 2]) / "model.safetensors").is_file()
    found = options(words)
    dpo = str((run / "dpo").resolve())
    wanted = {
        "--served-model-name": "base",
        "--max-lora-rank": "8",
        "--lora-modules": f"dpo={dpo}",
        "--tokenizer": dpo,
        "--chat-template": f"{dpo}/chat_template.jinja",
        "--port": "8123",
        "--host": "127.0.0.1",
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",
        "--hf-overrides": '{"head_dtype": "float32"}',
    }
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.checklist("V8")
def test_v08_a_recipe_is_served_for_the_largest_of_its_policies(run: Path, shell) -> None:
    file = run / "recipe.yaml"
    said = file.read_text().replace("ipo: {kind: dpo,", "ipo: {kind: dpo, lora: {r: 20, alpha: 40},")
    said = said.replace("lora: {r: 2, alpha: 4}", "lora: {r: 4, alpha: 8}")
    for given in (run, file):
        file.write_text(said)
        found = options(shlex.split(shell("serve", given)[1]))
        assert found["--max-lora-rank"] == "32" and found["--dtype"] == "float32"
        assert "--lora-modules" not in found
    file.write_text(
        said.replace("init_lora", "").replace("r: 20, alpha: 40", "r: 20, alpha: 40, init_lora_weights: pissa")
    )
    assert options(shlex.split(shell("serve", run)[1]))["--max-lora-rank"] == "64"


@pytest.mark.checklist("V9")
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"use_dora": True}, "is a DoRA, which vLLM does not take"),
        ({"modules_to_save": ["lm_head"]}, r"trains whole modules \(lm_head\)"),
        ({"rank_pattern": {"q_proj": 4}}, "ranks or scalings of its own by layer"),
        ({"r": 513}, "has rank 513"),
        ({"task_type": "SEQ_CLS"}, "is a reward model, and a policy is served"),
    ],
)
def test_v09_what_a_server_does_not_take_is_refused(run: Path, changed: dict[str, Any], said: str, shell) -> None:
    file = run / "dpo" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    shell.refused("serve", run / "dpo", said=said)


def test_other_mistakes_are_one_line(run: Path, tmp_path: Path, shell) -> None:
    shell.refused("serve", run / "dpx", said="holds no adapter; did you mean 'dpo'")
    shell.refused("serve", run / "kto", said="holds no adapter")
    shell.refused("serve", run / "dpo", "--dtype", "int4", said="'int4' is unknown")
    missing = tmp_path / "none" / "python"
    shell.refused("serve", run / "dpo", "--run", "--python", missing, "--port", free_port(), said="there is no program")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        at = ("--python", sys.executable, "--port", port)
        shell.refused("serve", run / "dpo", "--run", *at, said=f"port {port} of 127.0.0.1 cannot be had")


def test_sglang_is_told_the_same_in_its_own_words(run: Path, shell) -> None:
    words = shlex.split(shell("serve", run / "dpo", "--engine", "sglang", "--python", "/p")[1])
    assert words[words.index("/p") + 1 : words.index("/p") + 3] == ["-m", "sglang.launch_server"]
    found = options(words)
    assert found["--max-lora-rank"] == "2" and found["--lora-paths"] == f"dpo={(run / 'dpo').resolve()}"
    assert not any("VLLM" in word for word in words)


@pytest.mark.checklist("V10")
def test_v10_words_of_the_users_own_hold_unless_they_name_another_server() -> None:
    start = ["/p", "-m", "x", "--dtype", "float32", "--max-model-len=64"]
    words = server_command(SERVING, start, "rollout.command")
    assert words[: len(start)] == start and words.count("--dtype") == 1 and "--max-model-len" not in words
    assert options(words)["--model"] == "/b"
    for taken in (["--port", "1"], ["--model=x"], ["--max-lora-rank", "8"], ["--generation-config", "auto"]):
        with pytest.raises(UserError, match=f"rollout.command: says {taken[0].partition('=')[0]} itself"):
            server_command(SERVING, ["vllm", "serve", *taken], "rollout.command")
    assert server_command(SERVING, start_of("vllm", None), "x")[:3] == ["vllm", "serve", "/b"]


def test_memory_that_the_environment_says_holds() -> None:
    from dataclasses import replace

    on_cpu = replace(SERVING, on_cpu=True)
    assert "--no-enable-chunked-prefill" in server_command(on_cpu, ["vllm", "serve"], "x")
    assert "--no-enable-chunked-prefill" not in server_command(SERVING, ["vllm", "serve"], "x")
    assert server_environment(on_cpu, {})["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert "VLLM_CPU_KVCACHE_SPACE" not in server_environment(on_cpu, {"VLLM_CPU_KVCACHE_SPACE": "9"})
    assert "VLLM_CPU_KVCACHE_SPACE" not in server_environment(SERVING, {})


@pytest.mark.checklist("V11")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_v11_a_signal_ends_the_server_and_all_that_it_started(serving, notes, number: int) -> None:
    process, url = serving()
    assert answers(url)
    seen = notes()
    assert seen["argv"][:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert seen["environment"]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    # a session of its own: a terminal's Ctrl-C does not reach it
    assert all(os.getpgid(pid) not in (os.getpgid(process.pid), os.getpgrp()) for pid in seen["pids"])
    process.send_signal(number)
    assert process.wait(30) == 0
    assert are_gone(seen["pids"]) and not answers(url)


@pytest.mark.checklist("V11")
def test_v11_a_killed_command_leaves_no_server_behind(serving, notes) -> None:
    process, _ = serving()
    process.kill()
    process.wait()
    assert are_gone(notes()["pids"])


def test_a_server_that_ends_at_once_is_said_with_its_last_words(
    run: Path, interpreter: Path, notes, shell, monkeypatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM_ENDS", "3")
    said = r"the server ended before it answered \(ValueError: no room for the keys and values\); look at /\S+\.log"
    code, _, err = shell("serve", run / "dpo", "--run", "--python", interpreter, "--port", free_port())
    assert code == 2 and re.search(said, err.strip().splitlines()[-1]), err
    assert are_gone(notes()["pids"])


def test_what_it_says_is_kept_behind_what_was_said_before(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    for word in ("one", "two"):
        server = ServerProcess(["sh", "-c", f"echo {word}; exit 4"], "http://127.0.0.1:1", log, {}, "x")
        assert server.wait() == 4 and not server.alive
        server.stop()
    assert server.last_words() == ["one", "two"]


def test_a_free_port_is_one() -> None:
    check_free("127.0.0.1", free_port(), "x")
