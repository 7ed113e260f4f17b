"""What the libraries below us would tell their makers about a training is off, unless the user has said otherwise.

TRL reports each trainer that it makes to the Hub (device, GPU, architecture), the Hub's client says more in a request
than it needs, datasets counts what is loaded, gradio, wandb, mlflow and comet report starts or errors. Each reads a
variable of the environment when it is imported: it is set with `import preftune`, and our child processes inherit it.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Switch:
    """One opt-out.

    Attributes:
        of: whose, for people. variables: what it is read from; one that the user has set, to whatever, is their choice.
        off: the first variable's value that says no.
        loaded: (module, name, value) that says so to a library which is imported already.
    """

    of: str
    variables: tuple[str, ...]
    off: str
    loaded: tuple[str, str, bool] | None = None


SWITCHES = (
    Switch(
        "huggingface_hub, transformers, trl",
        ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK"),
        "1",
        ("huggingface_hub.constants", "HF_HUB_DISABLE_TELEMETRY", True),
    ),
    Switch(
        "datasets, evaluate",
        ("HF_UPDATE_DOWNLOAD_COUNTS",),
        "0",
        ("datasets.config", "HF_UPDATE_DOWNLOAD_COUNTS", False),
    ),
    Switch("gradio, trackio", ("GRADIO_ANALYTICS_ENABLED",), "False"),
    Switch("wandb (errors)", ("WANDB_ERROR_REPORTING",), "false"),
    Switch("mlflow", ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"), "true"),
    Switch("comet (errors)", ("COMET_ERROR_TRACKING_ENABLE",), "false"),
    Switch("ray", ("RAY_USAGE_STATS_ENABLED",), "0"),
    Switch("vllm", ("VLLM_NO_USAGE_STATS", "VLLM_DO_NOT_TRACK", "DO_NOT_TRACK"), "1"),
)
_ours: set[str] = set()


def switch_off() -> None:
    """Say no for each library that the user has said nothing about. Imports nothing."""
    for switch in SWITCHES:
        if _theirs(switch, os.environ) is not None:
            continue
        os.environ[switch.variables[0]] = switch.off
        _ours.add(switch.variables[0])
        if switch.loaded and (module := sys.modules.get(switch.loaded[0])) is not None:
            setattr(module, *switch.loaded[1:])


def is_ours(variable: str) -> bool:
    """Whether this process has set it, and nobody before."""
    return variable in _ours


def told(environment: Mapping[str, str]) -> str:
    """What holds, in a line: for whom it is off, and which of the user's variables decides for the others."""
    deciding = {switch.of: _theirs(switch, environment) for switch in SWITCHES}
    off = ", ".join(of for of, name in deciding.items() if name is None)
    theirs = [f"${name}={environment[name]} decides for {of}" for of, name in deciding.items() if name is not None]
    return "; ".join([*([f"off for {off}"] if off else []), *theirs])


def _theirs(switch: Switch, environment: Mapping[str, str]) -> str | None:
    """The user's variable that this library goes by."""
    return next((name for name in switch.variables if name in environment and name not in _ours), None)
