"""What an on-policy run writes: checkpoints, the policies that it keeps on its way, some of its generations.

A checkpoint holds, beyond what those of every stage hold (see `checkpoints.py`) and so that resuming is exact:

    ppo_trainables.safetensors      policy and value, fp32, every parameter that trains
    ppo_rollout.safetensors         the rollout in flight, where the checkpoint fell between two minibatches
    ppo_state.json                  KL coefficient, place in the iteration, metrics so far
"""

import json
import logging
import re
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ...errors import UserError
from ...files import ADAPTER_CONFIG, whole_folder, write_whole
from ...models.adapters import AdapterSet
from ..callbacks import keep_rows
from .rollout import Rollout

logger = logging.getLogger(__name__)

STATE, TRAINABLES, ROLLOUT = "ppo_state.json", "ppo_trainables.safetensors", "ppo_rollout.safetensors"


@dataclass
class LoopState:
    """Where the loop stands.

    iteration: the one under way, or the next. slot: minibatches of it that are done. stopped: its epochs ended early.
    log_due, eval_due: a step to log, or to evaluate at, fell in it. kl_coef: the controller's. running: the running
    reward scale. metrics: the rollout's. totals: token sums and counts over the minibatches done.
    """

    iteration: int = 0
    slot: int = 0
    stopped: bool = False
    log_due: bool = False
    eval_due: bool = False
    kl_coef: float = 0.0
    running: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    metrics: dict[str, float] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)


def save_tensors(folder: Path, trainables: dict[str, nn.Parameter], rollout: Rollout | None, process: int) -> None:
    """The parameters and the rollout in flight, which every process has alike: the first one writes."""
    if process != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: p.detach().cpu().contiguous() for name, p in trainables.items()}, folder / TRAINABLES)
    if rollout is not None:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in rollout.tensors().items()}
        save_file(tensors, folder / ROLLOUT)


def save_state(folder: Path, state: LoopState) -> None:
    """Where the loop stands, the same on every process."""
    write_whole(folder / STATE, json.dumps(asdict(state)))


def load_trainables(folder: Path, trainables: dict[str, nn.Parameter]) -> None:
    """Copy the saved values into the parameters, in place.

    Raises:
        UserError: the checkpoint holds other parameters (another rank, value setting or base).
    """
    saved = load_file(folder / TRAINABLES)
    differing = [
        name for name in {*saved, *trainables}
        if name not in saved or name not in trainables or saved[name].shape != trainables[name].shape
    ]  # fmt: skip
    if differing:
        raise UserError(
            str(folder),
            f"its trained parameters differ from this run's ({len(differing)} of them, first {min(differing)})",
            "resume with the LoRA and value settings that it was made with",
        )
    with torch.no_grad():
        for name, parameter in trainables.items():
            parameter.copy_(saved[name])


def load_state(folder: Path) -> LoopState:
    """The loop's place.

    Raises:
        UserError: no complete PPO checkpoint, or one of another version.
    """
    if not (folder / STATE).is_file():
        raise UserError(str(folder), f"it has no {STATE}: no PPO checkpoint, or one cut off", "name another checkpoint")
    held = json.loads((folder / STATE).read_text(encoding="utf-8"))
    known = {each.name for each in fields(LoopState)}
    state = LoopState(**{name: value for name, value in held.items() if name in known})
    if state.slot and not (folder / ROLLOUT).is_file():
        problem = f"it has no {ROLLOUT}: the version that wrote it kept the rollout in flight in another way"
        raise UserError(str(folder), problem, "start the stage anew: --force")
    return state


def load_rollout(folder: Path, device: torch.device) -> Rollout:
    """The rollout in flight, of all processes."""
    return Rollout.from_tensors(load_file(folder / ROLLOUT), device)


POLICIES = "policies"
"""In a stage's folder: step-<optimiser step>, complete PEFT adapters each."""


def keep_policy(adapters: AdapterSet, folder: Path, step: int) -> None:
    """Write the policy as it is now into `folder`/step-N; the folder appears whole or not at all."""
    with whole_folder(folder / f"step-{step}", lambda there: (there / ADAPTER_CONFIG).is_file()) as beside:
        adapters.save("default", beside)


def forget_policies(folder: Path, after: int) -> None:
    """Remove the policies kept after that step, and what a kill cut off."""
    for step, place in kept_policies(folder).items():
        if step > after:
            shutil.rmtree(place)
    for place in folder.glob(".step-*"):
        shutil.rmtree(place)


def kept_policies(folder: Path) -> dict[int, Path]:
    """Optimiser step -> adapter folder, in the order of the steps; empty where nothing was kept."""
    found = {
        int(match[1]): place
        for place in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"step-(\d+)", place.name))
    }
    return dict(sorted(found.items()))


class SampleLog:
    """Writes `rollouts.jsonl`.

    Args:
        path: the file.
        every: iterations between two writings; 0: never.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every

    def start(self, iteration: int) -> None:
        """The run stands before `iteration`: rows of it and of later ones, left by an interrupted run, go."""
        if not self.every or not self.path.exists():
            return
        keep_rows(self.path, lambda row: row["iteration"] < iteration)

    def write(self, iteration: int, samples: list[dict[str, object]]) -> None:
        """Write an iteration's samples, if it is one that is written, and show the first."""
        if not self.every or iteration % self.every:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for row in samples:
                file.write(json.dumps({"iteration": iteration, **row}, ensure_ascii=False) + "\n")
        for row in samples[:1]:
            scored = f", score {row['score']:.3g}" if "score" in row else ""
            logger.info("iteration %d%s: %r", iteration, scored, str(row["completion"])[:200])
