"""What PPO logs about its updates, and the identities that must hold before the first one."""

import torch

from .ppo_update import STATS, StepReport
from .rollout import Rollout

FULL_TOLERANCE = 1e-4
"""Mean |difference| per token, nats, that two fp32 forwards of other shapes may show."""
LOW_TOLERANCE = 0.05
"""The same in bf16."""


def add_report(totals: dict[str, float], report: StepReport, seconds: float) -> None:
    """Add a minibatch to the iteration's sums over tokens and over steps; they are divided once, when logged."""
    found = {name: float(x) for name, x in zip(STATS, report.sums, strict=True)}
    found |= {"tokens": report.tokens, "steps": 1.0, "skipped": float(report.skip), "stopped": float(report.stop)}
    found["updates"] = float(not (report.skip or report.stop))
    found |= {"policy_norm": report.policy_norm, "value_norm": report.value_norm, "seconds": seconds}
    for name, x in found.items():
        totals[name] = totals.get(name, 0.0) + x


def update_metrics(totals: dict[str, float], *, kl_in_loss: bool) -> dict[str, float]:
    """Means over all valid tokens of the iteration's minibatches, under the names that people know."""
    mean = {name: totals[name] / totals["tokens"] for name in STATS}
    return {
        "policy/approxkl_avg": mean["approx_kl"],
        "policy/clipfrac_avg": mean["clipped"],
        "policy/entropy_avg": mean["entropy"],
        "loss/policy_avg": mean["policy_loss"],
        "loss/value_avg": mean["value_loss"],
        **({"loss/kl_avg": mean["kl_loss"]} if kl_in_loss else {}),
        "val/clipfrac_avg": mean["value_clipped"],
        "val/ratio": mean["ratio"],
        "val/ratio_var": max(mean["ratio_squared"] - mean["ratio"] ** 2, 0.0),
        "policy/grad_norm": totals["policy_norm"] / totals["steps"],
        "value/grad_norm": totals["value_norm"] / totals["steps"],
        "policy/steps": totals["updates"],
        "policy/skipped": totals["skipped"],
        "policy/stopped": totals["stopped"],
        "time/update": totals["seconds"],
        "lr": totals["lr"],
    }


def tolerance(dtype: torch.dtype, *, autocast: bool) -> float:
    """What two forwards of the same tokens may differ by, for the head's dtype."""
    return FULL_TOLERANCE if dtype == torch.float32 and not autocast else LOW_TOLERANCE


def check_reference(rollout: Rollout, tolerance: float) -> None:
    """KL(policy || reference) = 0 before the first update.

    Raises:
        RuntimeError: it is not.
    """
    gap = (rollout.logps_BR - rollout.ref_logps_BR).abs().sum() / rollout.episodes.length_B.sum()
    if not float(gap) <= tolerance:
        raise RuntimeError(
            f"step 0: |log pi - log pi_ref| is {float(gap):.2g} nats per token, expected 0 within {tolerance:g}: "
            "the reference is not the adapter that training starts from"
        )


def check_ratio(report: StepReport, iteration: int, tolerance: float) -> None:
    """ratio = 1 in the first minibatch of the first epoch.

    Raises:
        RuntimeError: it is not.
    """
    gap = report.mean("abs_log_ratio")
    if not gap <= tolerance:
        raise RuntimeError(
            f"iteration {iteration}: the first minibatch's |log ratio| is {gap:.2g} nats per token, expected 0 within "
            f"{tolerance:g}: rollout and update do not see the same policy"
        )
