"""Do the stages belong together: one base, one tokenizer, one template, the parents that lie there?"""

import math
from collections.abc import Mapping
from typing import Any

from .finding import Finding, judge

_KEYS = {"template": ("chat_template_sha256",), "tokenizer": ("sha256",), "pad and eos": ("pad_token", "eos_token")}
"""Check -> the keys of a lineage's `tokenizer` entry that must agree. Any difference is broken: a stage that reads
other ids than its neighbours scores and continues text that they never write."""


def check_tokenizer(stage: str, ours: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """A finding each for template, tokenizer, and PAD and EOS.

    Args:
        ours: the stage's `tokenizer` entry in lineage.json.
        others: what it must agree with, by name: the parents' entries, the base's, that of the files beside it.
    """
    found = []
    for check, keys in _KEYS.items():
        wrong = [name for name, theirs in others.items() if any(theirs.get(key) != ours.get(key) for key in keys)]
        same = check == "pad and eos" and ours.get("pad_token") == ours.get("eos_token")
        unit = f"of {len(others)} compared differ" + (f": {', '.join(wrong)}" if wrong else "")
        if same:
            unit += f"; PAD and EOS are both {ours.get('eos_token')}"
        found.append(
            judge(
                stage,
                check,
                len(wrong),
                unit=unit,
                threshold="broken: any, or PAD is EOS" if check == "pad and eos" else "broken: any",
                broken=bool(wrong) or same,
                remedy=f"train {stage} and what it is compared with on one tokenizer and model.chat_template",
            )
        )
    return found


def check_files(stage: str, damage: str) -> Finding:
    """A stage whose files are not as they were written.

    Args:
        damage: what is not, in words.
    """
    return judge(
        stage,
        "files",
        math.nan,
        unit=damage,
        threshold="broken: any that is not as it was written",
        broken=True,
        remedy=f"run the recipe again: {stage} is trained anew, and what comes from it stays as it is",
    )


def check_use(stage: str) -> Finding:
    """A stage that others are made to start from, or to be scored by, and that nothing uses."""
    return judge(
        stage,
        "use",
        0,
        unit="stages start from it or are scored by it",
        threshold="look: 0",
        look=True,
        remedy=f"write from: {stage} (or reward: {stage}) in the stages that come after it, or leave it out",
    )


def check_bos(stage: str, leading: int, *, token: str | None, base_token: str | None) -> Finding:
    """One BOS at most before a prompt, and the base's (D9).

    Args:
        leading: how many BOS a prompt of the data begins with, as the tokenizer beside the adapter encodes it.
        token, base_token: BOS of that tokenizer and of the base's.
    """
    return judge(
        stage,
        "bos",
        leading,
        unit=f"BOS before a prompt ({token!r}; the base's is {base_token!r})",
        threshold="broken: two or more, or another token than the base's",
        broken=leading > 1 or token != base_token,
        remedy="let either the template or the tokenizer write BOS, and leave the base's BOS as it is",
    )


def check_base(stage: str, theirs: Mapping[str, Any], sha256: str) -> Finding:
    """The base that the adapter was trained on is the one that the run's recipe names."""
    differs = theirs.get("sha256") != sha256
    return judge(
        stage,
        "base",
        int(differs),
        unit=f"base differs ({theirs.get('spec')})" if differs else "bases differ",
        threshold="broken: any difference in its config or weights",
        broken=differs,
        remedy="train the stage again on the recipe's base",
    )


def check_parent(stage: str, parent: str, recorded: str, found: str) -> Finding:
    """The parent's adapter is still the one that the stage was made from, by the hash of its tensors."""
    return judge(
        stage,
        f"parent {parent}",
        int(recorded != found),
        unit="adapter differs from the one it was made from" if recorded != found else "differences",
        threshold="broken: any",
        broken=recorded != found,
        remedy=f"{parent} was changed or trained again since: run {stage} again, or put the old {parent} back",
    )


def check_data(stage: str, recorded: str, found: str) -> Finding:
    """The rows are still those that the stage read; if not, what is measured on them is about other rows."""
    return judge(
        stage,
        "data",
        int(recorded != found),
        unit="rows differ from those it was trained on" if recorded != found else "differences",
        threshold="look: any",
        look=recorded != found,
        remedy="put the old rows back, or run the stage again on the new ones",
    )
