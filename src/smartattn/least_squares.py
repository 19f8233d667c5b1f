"""Least squares with coefficients that are not negative, of relative errors."""

from __future__ import annotations

from typing import Any

import numpy as np

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

#: Samples whose error is more than this many times the median one count less.
_OUTLIER = 4.0
#: An error that is no outlier however small the median is.
_EXACT = 0.01
#: Keeps coefficients that nothing decides at 0 instead of at chance.
_RIDGE = 1e-6
#: Bounds of predicted / measured between which predictions count in the weights.
_CREDIBLE = 4.0


def nonnegative_least_squares(matrix: FloatArray, target: FloatArray) -> FloatArray:
    """x >= 0 with the smallest ``|matrix @ x - target|``, by Lawson and Hanson's active sets.

    Source: C. L. Lawson, R. J. Hanson, Solving Least Squares Problems, 1974, chapter 23.
    """
    columns = matrix.shape[1]
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    a = matrix / scale
    x = np.zeros(columns)
    free = np.zeros(columns, dtype=bool)
    tolerance = 1e-10 * max(1.0, float(np.abs(a.T @ target).max(initial=0.0)))
    for _ in range(10 * columns):
        gradient = a.T @ (target - a @ x)
        gradient[free] = -np.inf
        if free.all() or gradient.max() <= tolerance:
            break
        free[int(gradient.argmax())] = True
        while True:
            solution = np.zeros(columns)
            solution[free] = np.linalg.lstsq(a[:, free], target, rcond=None)[0]
            negative = free & (solution <= 0)
            if not negative.any():
                x = solution
                break
            step = float((x[negative] / (x[negative] - solution[negative])).min())
            x = x + step * (solution - x)
            free &= x > 1e-14
            x[~free] = 0.0
            if not free.any():
                break
    result: FloatArray = x / scale
    return result


def relative_fit(
    amounts: FloatArray,
    times: FloatArray,
    prior: FloatArray | None = None,
    *,
    least: FloatArray | None = None,
    strength: float = 1.0,
    prior_shares: FloatArray | None = None,
    rounds: int = 5,
    above: float = 1.0,
) -> FloatArray:
    """Coefficients >= 0 with the smallest squared relative errors; outliers count less.

    The error is (predicted - measured) / sqrt(predicted x measured), which like a logarithm takes
    half the time and twice the time for equally wrong: divided by the measured time alone, what is
    too low would hardly count, and a backend that looks too fast is what makes a bad choice.

    Args:
        amounts: (samples, features).
        times: (samples,) in microseconds, positive.
        prior: (features,) coefficients that each count as much as ``strength`` samples.
        prior_shares: (features,) amounts / times of the samples that the prior is from, root mean
            square. What is next to nothing in the samples given would else be free to take any
            coefficient, and be most of the time in others.
        least: (features,) what the coefficients are at least; zeros if not given.
        above: what a sample that took longer than predicted counts; far below 1 the fit is the
            lower edge of the samples.
    """
    low = np.zeros(amounts.shape[1]) if least is None else least
    goal = low if prior is None else prior
    share = (_RIDGE if prior is None else strength / len(times)) ** 0.5
    weights = 1.0 / times
    coefficients = np.zeros(amounts.shape[1])
    for _ in range(rounds):
        matrix = amounts * weights[:, None]
        pull = share * np.linalg.norm(matrix, axis=0)
        if prior_shares is not None:
            pull = np.maximum(pull, strength**0.5 * prior_shares)
        coefficients = low + nonnegative_least_squares(
            np.concatenate([matrix, np.diag(pull)]),
            np.concatenate([(times - amounts @ low) * weights, pull * (goal - low)]),
        )
        predicted = np.clip(amounts @ coefficients, times / _CREDIBLE, times * _CREDIBLE)
        errors = log_errors(amounts @ coefficients, times)
        counts = outlier_weights(errors) * np.where(times > predicted, above, 1.0)
        weights = np.sqrt(counts / (predicted * times))
    return coefficients


def outlier_weights(errors: FloatArray) -> FloatArray:
    """What samples count with such errors (absolute, in the logarithm), 1 unless they stand out."""
    limit = max(_OUTLIER * float(np.median(errors)), _EXACT)
    weights: FloatArray = np.minimum(1.0, limit / np.maximum(errors, 1e-12))
    return weights


def log_errors(predicted: FloatArray, measured: FloatArray) -> FloatArray:
    """|log(predicted / measured)|; a prediction of 0 is wrong by a lot, not by infinity."""
    errors: FloatArray = np.abs(np.log(np.maximum(predicted, 1e-9) / measured))
    return errors
