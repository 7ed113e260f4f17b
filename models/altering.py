"""The starts of an adapter that there are, by PEFT's names. Imports no torch."""

import re
from collections.abc import Iterable

from ..errors import UserError

ALTERING = re.compile(r"pissa|pissa_niter_[1-9]\d*|olora")
"""Starts with a part of the base's weights, which PEFT takes out of the base."""
DRAWN = (True, "gaussian", "orthogonal")
"""Starts whose change of the base is nothing."""

PLACE = "lora.init_lora_weights"
_REFUSED = {
    "eva": "draws A from activations of the data, which are not read before an adapter is there",
    "corda": "needs the covariance of activations, which are not read before an adapter is there, and alters the base",
    "lora_ga": "needs gradients of the data, which are not read before an adapter is there, and alters the base",
    "loftq": "replaces the base by a quantised one, and every role shares the base",
    "mica": "holds B still, and a stage that goes on from the adapter would not",
    "false": "starts with a random change of the base",
}


def check_start(start: bool | str | None, ranks: Iterable[int]) -> None:
    """A start that is offered, of ranks that it can have.

    Raises:
        UserError: another one, with why.
    """
    if start in DRAWN or ALTERING.fullmatch(str(start)):
        if start == "orthogonal" and (odd := [r for r in ranks if r % 2]):
            raise UserError(PLACE, f"orthogonal has even ranks, and {odd[0]} is odd", f"use r: {odd[0] + 1}")
        return
    remedy = "use true, gaussian, orthogonal, pissa, pissa_niter_16 (any number) or olora"
    raise UserError(PLACE, f"{start} {_REFUSED.get(str(start).lower(), 'is no start of an adapter')}", remedy)
