"""Libraries report nothing about a training, unless the user says that they may."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from preftune import telemetry
from preftune.cli.environment import environment

NAMES = {name for switch in telemetry.SWITCHES for name in switch.variables}
SENDS = """
from huggingface_hub.utils import _telemetry, send_telemetry
send_telemetry("trl", library_name="trl")
print("sent" if _telemetry._TELEMETRY_THREAD else "silent")
"""
"""What each of TRL's trainers does when it is made."""
READ_IN = {
    "HF_HUB_DISABLE_TELEMETRY": "huggingface_hub.constants",
    "HF_UPDATE_DOWNLOAD_COUNTS": "datasets.config",
    "GRADIO_ANALYTICS_ENABLED": "gradio.analytics",
    "WANDB_ERROR_REPORTING": "wandb.env",
    "MLFLOW_DISABLE_TELEMETRY": "mlflow.environment_variables",
}


def python(code: str, **variables: str) -> str:
    """What a fresh process prints, in which nobody has said anything but `variables`; its Hub is nowhere."""
    silent = NAMES | {"HF_HUB_OFFLINE", "CI"}
    kept = {name: value for name, value in os.environ.items() if name not in silent}
    kept |= {"HF_ENDPOINT": "http://127.0.0.1:9", **variables}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=kept, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def test_the_hub_is_told_nothing() -> None:
    assert python(SENDS) == "sent", "or this test would prove nothing"
    assert python(f"import preftune\n{SENDS}") == "silent"
    # also where the library was imported first, and has read its setting
    assert python(f"import huggingface_hub.constants, preftune\n{SENDS}") == "silent"


@pytest.mark.parametrize("variable", ["HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK"])
def test_the_users_word_wins(variable: str) -> None:
    assert python(f"import preftune\n{SENDS}", **{variable: "0"}) == "sent"


def test_processes_that_are_started_inherit_it() -> None:
    child = "import json, os; print(json.dumps(dict(os.environ)))"
    code = f"import preftune, subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    said = json.loads(python(code, WANDB_ERROR_REPORTING="true"))
    assert NAMES & said.keys() == {each.variables[0] for each in telemetry.SWITCHES}
    assert said["WANDB_ERROR_REPORTING"] == "true" and said["HF_HUB_DISABLE_TELEMETRY"] == "1"


@pytest.mark.parametrize(("variable", "module"), READ_IN.items())
def test_the_libraries_read_these_variables(variable: str, module: str) -> None:
    assert variable in NAMES
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        pytest.skip("not installed")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    text = Path(spec.origin).read_text(encoding="utf-8")
    # wandb builds its names from parts
    assert variable in text or variable.removeprefix("WANDB_") in text


def test_env_says_what_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(telemetry, "_ours", set())
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "true")
    telemetry.switch_off()
    facts = dict(environment())
    assert facts["telemetry"].startswith("off for huggingface_hub, transformers, trl, datasets")
    assert facts["telemetry"].endswith("; $WANDB_ERROR_REPORTING=true decides for wandb (errors)")
    assert facts["$WANDB_ERROR_REPORTING"] == "true" and "$HF_HUB_DISABLE_TELEMETRY" not in facts
    for name in NAMES - {"WANDB_ERROR_REPORTING"}:
        os.environ.pop(name, None)
