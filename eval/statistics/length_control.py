"""Length-controlled win-rates: how often a model would win with replies as long as the baseline's (checklist E3).

The regression of AlpacaEval 2 (Dubois et al., arXiv 2404.04475), fitted to all models jointly:

    logit P(model m wins on prompt x) = quality_m + length * tanh(d_mx / std(d)) + slope_m * difficulty_x

where d is the length of the model's reply minus that of the baseline's. The length-controlled win-rate of a model is
its mean prediction over its prompts with the length term left out. What differs from AlpacaEval: its difficulties come
from a table and its length coefficients are a model's own; here both come from the given judgements alone, and since
all models share the length coefficient they share the scale std(d) as well. The qualities are not penalised, so a model
whose replies are exactly as long as the baseline's keeps its win-rate.

Shape suffixes: N judgements, M models, X prompts.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit

FOLDS = 5
DIFFICULTY_GRID = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SLOPE_GRID = (3.0, 10.0, 30.0, 100.0, 300.0)


@dataclass(frozen=True)
class Judgements:
    """One judgement per row; several models' judgements stand one after the other.

    Attributes:
        outcome_N: in [0, 1], 1 where the model wins.
        length_N: tanh of the standardised length difference, see `length_feature`.
        model_N, prompt_N: whole numbers below `models` and `prompts`.
    """

    outcome_N: np.ndarray
    length_N: np.ndarray
    model_N: np.ndarray
    prompt_N: np.ndarray
    models: int
    prompts: int

    def part(self, keep_N: np.ndarray) -> "Judgements":
        """The judgements where `keep_N` is true."""
        rows = {name: getattr(self, name)[keep_N] for name in ("outcome_N", "length_N", "model_N", "prompt_N")}
        return replace(self, **rows)

    def shares_prompts(self) -> bool:
        """Whether two models were judged on one prompt; nothing is known of difficulties otherwise."""
        cells = np.unique(np.stack([self.model_N, self.prompt_N]), axis=1)
        return len(np.unique(cells[1])) < cells.shape[1]

    def mean_by_model(self, values_N: np.ndarray) -> np.ndarray:
        """[M] mean of the values over each model's judgements; nan for a model without any."""
        counts_M = np.bincount(self.model_N, minlength=self.models)
        with np.errstate(invalid="ignore"):
            return np.bincount(self.model_N, values_N, self.models) / counts_M


@dataclass(frozen=True)
class Penalty:
    """Ridge penalties: half of each, times the sum of squares, is added to the negative log-likelihood.

    Attributes:
        difficulty: on difficulty_x.
        slope: on slope_m - 1.
        length: on the length coefficient. So weak that it only matters where length alone tells winners from losers
            without fail, and the coefficient would grow without end.
    """

    difficulty: float = 1.0
    slope: float = 30.0
    length: float = 0.01


@dataclass(frozen=True)
class Fit:
    """The regression's coefficients; without shared prompts all difficulties are 0 and all slopes 1."""

    quality_M: np.ndarray
    length: float
    slope_M: np.ndarray
    difficulty_X: np.ndarray

    def logits(self, judgements: Judgements, *, same_length: bool = False) -> np.ndarray:
        """[N] log-odds that the model wins, as judged or (`same_length`) with no difference in length."""
        model_N = judgements.model_N
        equal_N = self.quality_M[model_N] + self.slope_M[model_N] * self.difficulty_X[judgements.prompt_N]
        return equal_N if same_length else equal_N + self.length * judgements.length_N


def length_feature(difference_N: np.ndarray) -> np.ndarray:
    """tanh of the length differences over their standard deviation; no difference stays exactly 0.

    All 0 where the differences do not vary: length cannot be told from quality then.
    """
    spread = difference_N.std() if len(difference_N) else 0.0
    return np.tanh(difference_N / spread) if spread > 0 else np.zeros(len(difference_N))


def log_losses(logit_N: np.ndarray, outcome_N: np.ndarray) -> np.ndarray:
    """[N] -y log p - (1 - y) log(1 - p), for outcomes y anywhere in [0, 1]."""
    return np.logaddexp(0.0, logit_N) - outcome_N * logit_N


def fit(judgements: Judgements, penalty: Penalty, start: Fit | None = None, tolerance: float = 1e-9) -> Fit:
    """Minimises the penalised log loss over all coefficients at once.

    Args:
        start: where to begin; None: every difficulty 0, every slope 1.
        tolerance: of the gradient of the mean log loss.
    """
    data, models = judgements, judgements.models
    shared = data.shares_prompts()
    if start is None:
        rates_M = np.nan_to_num(data.mean_by_model(data.outcome_N), nan=0.5)
        start = Fit(logit(rates_M.clip(0.01, 0.99)), 0.0, np.ones(models), np.zeros(data.prompts))

    def unpack(vector: np.ndarray) -> Fit:
        quality_M, length, rest = vector[:models], float(vector[models]), vector[models + 1 :]
        if not shared:
            return Fit(quality_M, length, np.ones(models), np.zeros(data.prompts))
        return Fit(quality_M, length, rest[:models], rest[models:])

    def loss(vector: np.ndarray) -> tuple[float, np.ndarray]:
        now = unpack(vector)
        logit_N = now.logits(data)
        residual_N = expit(logit_N) - data.outcome_N
        squares = penalty.length * now.length**2
        gradient: list[np.ndarray] = [np.bincount(data.model_N, residual_N, models)]
        gradient.append(np.array([residual_N @ data.length_N + penalty.length * now.length]))
        if shared:
            off_M, difficulty_N = now.slope_M - 1.0, now.difficulty_X[data.prompt_N]
            squares += penalty.slope * off_M @ off_M + penalty.difficulty * now.difficulty_X @ now.difficulty_X
            gradient.append(np.bincount(data.model_N, residual_N * difficulty_N, models) + penalty.slope * off_M)
            along_X = np.bincount(data.prompt_N, residual_N * now.slope_M[data.model_N], data.prompts)
            gradient.append(along_X + penalty.difficulty * now.difficulty_X)
        total = log_losses(logit_N, data.outcome_N).sum() + 0.5 * squares
        return total / len(logit_N), np.concatenate(gradient) / len(logit_N)

    first = [start.quality_M, [start.length], *([start.slope_M, start.difficulty_X] if shared else [])]
    options = {"maxiter": 5000, "maxfun": 10000, "gtol": tolerance, "ftol": 0.0}
    return unpack(minimize(loss, np.concatenate(first), jac=True, method="L-BFGS-B", options=options).x)


def choose_penalty(judgements: Judgements, seed: int = 0) -> Penalty:
    """The penalties of the grid with the least log loss on prompts that were held out.

    A fifth of each model's prompts is held out at a time, another fifth from model to model: the difficulty of a
    held-out prompt is known from the models for which it was not.
    """
    if not judgements.shares_prompts():
        return Penalty()
    generator = np.random.default_rng(seed)
    fold_MX = np.stack([generator.permutation(judgements.prompts) % FOLDS for _ in range(judgements.models)])
    fold_N = fold_MX[judgements.model_N, judgements.prompt_N]
    losses: dict[Penalty, float] = {}
    starts: list[Fit | None] = [None] * FOLDS
    for difficulty, slope in product(DIFFICULTY_GRID, SLOPE_GRID):
        penalty = Penalty(difficulty, slope)
        losses[penalty] = 0.0
        for fold in range(FOLDS):
            kept, held = judgements.part(fold_N != fold), judgements.part(fold_N == fold)
            starts[fold] = fitted = fit(kept, penalty, starts[fold], tolerance=1e-5)
            losses[penalty] += float(log_losses(fitted.logits(held), held.outcome_N).sum())
    return min(losses, key=lambda penalty: losses[penalty])


def length_controlled_rates(judgements: Judgements, seed: int = 0) -> np.ndarray:
    """[M] length-controlled win-rates, fractions of 1; nan for a model without judgements."""
    fitted = fit(judgements, choose_penalty(judgements, seed))
    return judgements.mean_by_model(expit(fitted.logits(judgements, same_length=True)))


def control_length(
    outcomes: Sequence[np.ndarray],
    differences: Sequence[np.ndarray],
    prompts: Sequence[Sequence[Hashable]],
    seed: int = 0,
) -> list[float]:
    """Length-controlled win-rates of several models, fitted jointly.

    Args:
        outcomes: for each model its outcomes in [0, 1], nan where there is no verdict.
        differences: for each model and outcome the length of its reply minus the baseline's, in any one unit.
        prompts: for each model and outcome the prompt, named alike for all models.
        seed: of the folds in which the penalties are chosen.

    Returns:
        One fraction of 1 a model; nan where there is no verdict at all.
    """
    if not outcomes:
        return []
    outcome_N = np.concatenate([np.asarray(each, dtype=np.float64) for each in outcomes])
    difference_N = np.concatenate([np.asarray(each, dtype=np.float64) for each in differences])
    model_N = np.repeat(np.arange(len(outcomes)), [len(each) for each in outcomes])
    places: dict[Hashable, int] = {}
    prompt_N = np.array([places.setdefault(prompt, len(places)) for each in prompts for prompt in each], dtype=np.int64)
    judged = ~np.isnan(outcome_N)
    if not judged.any():
        return [float("nan")] * len(outcomes)
    length_N = np.zeros(len(outcome_N))
    length_N[judged] = length_feature(difference_N[judged])
    everything = Judgements(outcome_N, length_N, model_N, prompt_N, len(outcomes), len(places))
    return length_controlled_rates(everything.part(judged), seed).tolist()
