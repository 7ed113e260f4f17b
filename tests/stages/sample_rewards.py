"""Reward functions for tests of sampling stages; what they saw lies in files, as they may run in other processes."""

import json
import os
import signal
from pathlib import Path


def number(text: str) -> float:
    """The same for the same text on every machine."""
    return float(sum(place * ord(letter) for place, letter in enumerate(text, start=1)) % 11)


def scored(prompts, completions, **columns):
    """A number of the reply's text."""
    return [number(each[0]["content"]) for each in completions]


def noted(prompts, completions, place, **columns):
    """`scored`; the prompts' places go into $SAMPLE_NOTES, a line a call."""
    with Path(os.environ["SAMPLE_NOTES"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(sorted(set(place))) + "\n")
    return scored(prompts, completions)


def killing(prompts, completions, place, **columns):
    """`noted`, and where $SAMPLE_KILLS is among the places this process dies."""
    if int(os.environ.get("SAMPLE_KILLS", "-1")) in place:
        os.kill(os.getpid(), signal.SIGKILL)
    return noted(prompts, completions, place)
