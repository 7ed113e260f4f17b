"""KL coefficients: fixed, or adaptive towards a target (Ziegler et al. 2019, arXiv 1909.08593, section 2.2)."""

from typing import Protocol


class KLController(Protocol):
    """Holds `value`, the KL coefficient of the next iteration."""

    value: float

    def update(self, kl: float, episodes: int) -> None:
        """Called once an iteration with the measured KL (nats per sequence) and the number of episodes it took."""
        ...


class FixedKL:
    """The coefficient never changes."""

    def __init__(self, coef: float) -> None:
        self.value = coef

    def update(self, kl: float, episodes: int) -> None:
        """Nothing to adapt."""


class AdaptiveKL:
    """coef *= 1 + clip(KL / target - 1, -0.2, 0.2) * n / horizon, n in episodes.

    Args:
        coef: the coefficient to start from.
        target: KL(policy || reference) to hold, nats per sequence.
        horizon: episodes over which a saturated error changes the coefficient by about 20%.
    """

    def __init__(self, coef: float, target: float, horizon: float) -> None:
        if target <= 0 or horizon <= 0:
            raise ValueError(f"kl_target is {target}, kl_horizon is {horizon}, expected both > 0")
        self.value, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, episodes: int) -> None:
        """See the class: the sign follows KL - target, the size saturates at 20% of `episodes / horizon`."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.value *= 1.0 + error * episodes / self.horizon


def kl_controller(coef: float, target: float | None, horizon: float) -> KLController:
    """Adaptive when there is a target, fixed otherwise."""
    return FixedKL(coef) if target is None else AdaptiveKL(coef, target, horizon)
