"""A metric over documents, its standard error, and its difference to another policy's on the same documents.

What a metric is made of is recognised by the number itself: the mean of its documents' values, exp of minus that (a
perplexity), or bits or a perplexity over (log-likelihood, weight) of each. Each document then has an influence, which
is its part in the metric's error (linearised, as in Cochran 1977, section 6.3). Of two policies the influences are
subtracted document by document, so that what makes a document hard for both does not count as noise.

Legend of shape suffixes: N documents.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
_NEAR = 1e-9


def influences(values_N: Sequence[Any], metric: float) -> Values | None:
    """Each document's influence on the metric [N]; None where the metric is made of them in another way.

    Args:
        values_N: numbers, or (log-likelihood in nats, weight) pairs.
        metric: what lm-eval made of them.
    """
    try:
        array = np.asarray(values_N, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    if array.size == 0 or not np.isfinite(array).all():
        return None
    if array.ndim == 1:
        mean, own_N = array.mean(), (array - array.mean()) / len(array)
        return own_N if _same(mean, metric) else _of_exp(-own_N, -mean, metric)
    if array.ndim != 2 or array.shape[1] != 2 or array[:, 1].sum() <= 0:
        return None
    loss_N, weight_N = -array[:, 0], array[:, 1]
    ratio = loss_N.sum() / weight_N.sum()
    own_N = (loss_N - ratio * weight_N) / weight_N.sum()
    return own_N / math.log(2) if _same(ratio / math.log(2), metric) else _of_exp(own_N, ratio, metric)


def _of_exp(own_N: Values, exponent: float, metric: float) -> Values | None:
    """Of exp of a metric, where that is what it is: its derivative is itself."""
    finite = exponent < math.log(sys.float_info.max)
    return own_N * metric if finite and _same(math.exp(exponent), metric) else None


def standard_error(influences_N: Values) -> float:
    """Over documents; nan of a single one."""
    count = len(influences_N)
    return math.sqrt(float((influences_N**2).sum()) * count / (count - 1)) if count > 1 else math.nan


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_NEAR, abs_tol=_NEAR)
