"""Policies that a PPO run keeps on its way: STAGE/policies/step-<optimiser step>, complete PEFT adapters each."""

import os
import re
import shutil
from pathlib import Path

from ..models.adapters import AdapterSet

POLICIES = "policies"


def keep_policy(adapters: AdapterSet, folder: Path, step: int) -> None:
    """Writes the policy as it is now into `folder`/step-N; the folder appears whole or not at all."""
    final = folder / f"step-{step}"
    beside = folder / f".{final.name}.{os.getpid()}"
    shutil.rmtree(beside, ignore_errors=True)
    adapters.save("default", beside)
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)


def forget_policies(folder: Path, after: int) -> None:
    """Removes the policies kept after that step, and what a kill cut off."""
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
