"""Paired statistics over noise seeds and cells: effect with interval, sign-flip p-value, false discovery rate.

What they speak about is the model: the same cell drawn again with other noise, or other cells like the chosen ones.
They say nothing about donors or repeated biological experiments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student_t

from ge2hist_core import rng
from ge2hist_core.intervals import expanded_tail
from ge2hist_core.types import BadInput

__all__ = [
    "EXACT_UP_TO",
    "Estimate",
    "allowance",
    "bh_fdr",
    "bootstrap_mean",
    "clustered_ratio",
    "crossed_effect",
    "crossed_mean",
    "pairing_gain",
    "seeds_for",
    "sign_flip_p",
]

EXACT_UP_TO = 16
"""All ``2**n`` sign patterns are counted up to this many pairs, above that they are sampled."""

MOST_SEEDS = 10**6
"""What so many seeds do not narrow no number of seeds does."""

FEW = 3
"""Up to so many cells, or seeds, their own degrees of freedom are the limit."""

N_BOOTSTRAP = 4000
N_FLIPS = 9999


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` seeds with its interval at confidence ``level``, in the unit of the values; ``p`` or NaN."""

    value: float
    low: float
    high: float
    n: int
    level: float
    p: float = float("nan")


def bootstrap_mean(values: np.ndarray, seed: int, level: float = 0.95, step: float = 0.0) -> Estimate:
    """Mean with its percentile bootstrap interval, expanded (:func:`ge2hist_core.intervals.expanded_tail`).

    Differences of counts are often 0 in most pairs, and resampling zeros gives zeros, though 16 pairs without a change
    do not exclude one in every tenth. With a ``step`` two further values, half a step above and below the mean, are
    drawn with the others, in the spirit of Agresti and Coull 1998 (doi:10.1080/00031305.1998.10480550). The mean stays,
    its variance grows by :math:`step^2 / (2 n^2)`: where values spread over many steps the interval hardly changes.

    Parameters
    ----------
    values: ``[seed]``; NaN (undefined readout) is left out and lowers ``n``.
    seed: of the resampling. step: the least by which a value can change, in its unit; 0 for none.

    Returns
    -------
    Estimate: all NaN for no value, no interval for one value.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values)]
    n = len(values)
    mean = float(values.mean()) if n else float("nan")
    if n < 2:
        return Estimate(mean, float("nan"), float("nan"), n, level)
    values = values - mean
    if step > 0:
        values = np.append(values, [-step / 2, step / 2]) * np.sqrt((n + 2) / n)  # n of n + 2 values are drawn
    picks = rng.stream(seed, "bootstrap", n).integers(0, len(values), size=(N_BOOTSTRAP, n))
    tail = expanded_tail(n, level)
    low, high = mean + np.quantile(values[picks].mean(axis=1), [tail, 1 - tail])
    return Estimate(mean, float(low), float(high), n, level)


def crossed_mean(values: np.ndarray, seed: int, level: float = 0.95, step: float = 0.0) -> Estimate:
    r"""Mean over cells and seeds, with an interval over both.

    Every cell is drawn with every seed: a crossed design of two random factors, in which values of one cell, and of one
    seed, belong together. With :math:`C` cells, :math:`S` seeds and the mean squares of cells, seeds and rest
    (:math:`M_c, M_s, M_r`) the variance of the mean is :math:`\max(M_c + M_s - M_r, M_c, M_s, M_r) / (CS)`, the
    interval Student's with the degrees of freedom of Satterthwaite 1946 (doi:10.2307/3002019), at most the smaller of
    :math:`C - 1` and :math:`S - 1` where that is 1 or 2: two or three units hardly tell how much units differ.

    With one cell the interval is that of :func:`bootstrap_mean` over its seeds and says nothing of other cells; with
    one seed it is that over the cells and says nothing of other noise.

    Parameters
    ----------
    values: ``[cell, seed]``; NaN (undefined readout) is left out. seed: of the bootstrap.
    step: the least by which a value can change, see :func:`bootstrap_mean`; with several cells and seeds its part of
        the variance is known, and needs no degrees of freedom.

    Returns
    -------
    Estimate: ``n`` counts the defined values, ``p`` is left NaN; no interval where there is a single cell and a single
    seed.
    """
    values = np.asarray(values, dtype=np.float64)
    n_cells, n_seeds = values.shape
    if n_cells == 1:
        return bootstrap_mean(values[0], seed, level, step)
    if n_seeds == 1:
        return bootstrap_mean(values[:, 0], seed, level, step)
    n = int(np.isfinite(values).sum())
    if n == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0, level)
    mean, error, freedom = _crossed(values)
    half = np.hypot(student_t.ppf((1 + level) / 2, freedom) * error, allowance(step, n, level))
    return Estimate(mean, float(mean - half), float(mean + half), n, level)


def allowance(step: float | np.ndarray, n: int, level: float = 0.95) -> Any:
    """Half-width that two further values half a step about the mean of ``n`` add to an interval, root of squares."""
    return norm.ppf((1 + level) / 2) * step / (np.sqrt(2) * n)


def _crossed(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, its standard error and degrees of freedom over two random factors ``[cell, seed]``.

    Rows and columns without a value are left out; where one row or one column is left, the factor that is left.
    """
    values = values[np.isfinite(values).any(axis=1)][:, np.isfinite(values).any(axis=0)]
    mean, (c, s) = float(np.nanmean(values)), values.shape
    if min(c, s) == 1:
        units = values[np.isfinite(values)]
        if len(units) < 2:
            return mean, float("nan"), 1.0
        return mean, float(units.std(ddof=1) / np.sqrt(len(units))), len(units) - 1.0
    square, freedom = _satterthwaite(*_mean_squares(values), c, s)
    return mean, float(np.sqrt(square / np.isfinite(values).sum())), freedom


def _satterthwaite(cell: float, seed: float, rest: float, c: int, s: int) -> tuple[float, float]:
    """Mean square of the mean over ``c`` cells and ``s`` seeds and its degrees of freedom, from three mean squares."""
    parts = ((cell, c - 1.0), (seed, s - 1.0), (rest, (c - 1.0) * (s - 1.0)))
    both = cell + seed - rest
    largest, freedom = max(parts)
    if both > largest:
        largest, freedom = both, both**2 / sum(square**2 / df for square, df in parts)
    if min(c, s) <= FEW:
        freedom = min(freedom, min(c, s) - 1.0)
    return largest, max(1.0, freedom)


def _weights(draws: np.random.Generator, n: int) -> np.ndarray:
    """How often each of ``n`` is drawn in ``n`` draws with replacement, ``[resample, n]``."""
    return draws.multinomial(n, np.full(n, 1.0 / n), size=N_BOOTSTRAP).astype(np.float64)


def crossed_effect(base: np.ndarray, edited: np.ndarray, seed: int, level: float = 0.95, step: float = 0.0) -> Estimate:
    """Mean of ``edited - base`` over cells and seeds, interval and p over both.

    With several cells and seeds p is that of Student's test that goes with the interval of :func:`crossed_mean` without
    a step; the sign flip would take cells for independent that share their seeds. Where all differences are alike up
    to rounding, and with one cell or one seed, p is that of :func:`sign_flip_p`, of the factor with fewer units: draws
    of one cell do not stand in for other cells. No p knows of the step: an interval with it may hold 0 beside a p just
    below 0.05.

    Parameters
    ----------
    base, edited: ``[cell, seed]`` in the same unit and order. A pair with NaN on either side is left out.
    step: what one nucleus more or less makes of the readout, see :func:`bootstrap_mean`.

    Raises
    ------
    ValueError: arrays of different shape.
    """
    base, edited = np.asarray(base, dtype=np.float64), np.asarray(edited, dtype=np.float64)
    if base.shape != edited.shape or base.ndim != 2:
        raise ValueError(f"pairs need two [cell, seed] arrays, got shapes {base.shape} and {edited.shape}")
    difference = edited - base
    found = crossed_mean(difference, seed, level, step)
    return Estimate(found.value, found.low, found.high, found.n, level, _crossed_p(difference, seed))


def _crossed_p(difference: np.ndarray, seed: int) -> float:
    defined = np.isfinite(difference)
    if not defined.any():
        return float("nan")
    if 1 in difference.shape:
        return sign_flip_p(difference.ravel(), seed)
    mean, error, freedom = _crossed(difference)
    if not error > 1e-9 * np.abs(difference[defined]).max():
        return max(sign_flip_p(_row_means(difference), seed), sign_flip_p(_row_means(difference.T), seed))
    return float(2 * student_t.sf(abs(mean) / error, freedom))


def _row_means(values: np.ndarray) -> np.ndarray:
    defined = np.isfinite(values)
    n = defined.sum(axis=1)
    return np.where(n > 0, np.where(defined, values, 0.0).sum(axis=1) / np.maximum(n, 1), np.nan)


def sign_flip_p(difference: np.ndarray, seed: int) -> float:
    """Two-sided p of "the differences are symmetric about 0", statistic: absolute mean.

    All ``2**n`` patterns for ``n <= 16``, which count the observed one; else ``(b + 1) / (m + 1)`` with ``b`` of
    ``m = 9999`` random patterns at least as extreme (Phipson and Smyth 2010, doi:10.2202/1544-6115.1585).
    NaN without any finite difference.
    """
    difference = np.asarray(difference, dtype=np.float64)
    difference = difference[np.isfinite(difference)]
    n = len(difference)
    if n == 0:
        return float("nan")
    # Equal up to rounding counts as extreme: sums in another order differ in the last bits.
    threshold = abs(difference.sum()) - 1e-9 * np.abs(difference).sum()
    if n <= EXACT_UP_TO:
        sums = np.zeros(1)
        for value in difference:
            sums = np.concatenate([sums + value, sums - value])
        return float((np.abs(sums) >= threshold).mean())
    signs = rng.stream(seed, "sign flip", n).integers(0, 2, size=(N_FLIPS, n)) * 2 - 1
    b = int((np.abs(signs @ difference) >= threshold).sum())
    return (b + 1) / (N_FLIPS + 1)


def bh_fdr(p: np.ndarray) -> np.ndarray:
    """Benjamini-Hochberg adjusted p-values, same order; NaN stays NaN and is not counted as a test.

    Source: Benjamini and Hochberg 1995, doi:10.1111/j.2517-6161.1995.tb02031.x.

    Examples
    --------
    >>> bh_fdr([0.01, 0.04, 0.03]).round(3).tolist()
    [0.03, 0.04, 0.04]
    """
    p = np.asarray(p, dtype=np.float64)
    q = np.full(p.shape, np.nan)
    tested = np.flatnonzero(np.isfinite(p))
    order = tested[np.argsort(-p[tested], kind="stable")]
    ranks = np.arange(len(order), 0, -1)
    q[order] = np.minimum.accumulate(np.minimum(p[order] * len(order) / ranks, 1.0)) if len(order) else []
    return q


# --- what pairing buys, how many seeds, cells of several donors -------------------------------------------------------


def pairing_gain(base: np.ndarray, edited: np.ndarray) -> float:
    """Share of the variance of an effect that common noise removes, at most 1.

    ``1 - var(edited - base) / (var(base) + var(edited))``: the denominator is the variance that a difference between
    pictures of unrelated noise would have. 0.75 means that four times as many unpaired seeds would be needed; below 0
    pairing harms. Variances run over the seeds of a cell and are pooled over the cells, since cells differ in either
    design.

    Parameters
    ----------
    base, edited: ``[cell, seed]`` in the same unit and order. A pair with NaN on either side is left out.

    Returns
    -------
    NaN where no cell has two pairs, or neither arm varies.

    Raises
    ------
    ValueError: arrays of different shape.

    Examples
    --------
    >>> pairing_gain(np.array([[1.0, 2.0, 3.0]]), np.array([[2.0, 3.0, 4.0]]))
    1.0
    """
    base, edited = np.asarray(base, dtype=np.float64), np.asarray(edited, dtype=np.float64)
    if base.shape != edited.shape or base.ndim != 2:
        raise ValueError(f"pairs need two [cell, seed] arrays, got shapes {base.shape} and {edited.shape}")
    paired = np.isfinite(base) & np.isfinite(edited)

    def within(values: np.ndarray) -> float:
        values = np.where(paired, values, np.nan)
        return float(np.where(paired, (values - _row_means(values)[:, None]) ** 2, 0.0).sum())

    unpaired = within(base) + within(edited)
    return 1.0 - within(edited - base) / unpaired if unpaired > 0 else float("nan")


def seeds_for(difference: np.ndarray, half_width: float, level: float = 0.95) -> int | None:
    r"""How many more seeds narrow the interval of an effect to +- ``half_width``, if the spread stays as it is.

    With one cell: the least ``N`` with ``t(N - 1) s / sqrt(N) <= half_width``, ``s`` the standard deviation of the
    paired differences, minus the seeds at hand. With several cells more seeds narrow only the part of the interval that
    comes from seeds: the half-width at ``S`` seeds is that of :func:`crossed_mean` with the mean squares to be expected
    there, :math:`S\sigma_c^2 + \sigma_r^2, C\sigma_s^2 + \sigma_r^2, \sigma_r^2`, from the variance components at hand.
    Where some seeds gave no value, as many more are drawn in proportion.

    ``s`` is itself an estimate: from 8 seeds it is off by a quarter as a rule, and the number by half.

    Parameters
    ----------
    difference: ``[seed]`` or ``[cell, seed]``, edited - base; NaN (undefined readout) is left out.
    half_width: wanted, in the unit of the differences.

    Returns
    -------
    0 where the interval is narrow enough already; None where it cannot be said (fewer than two differences), or where
    no number of seeds suffices because the cells differ: then more cells are needed.

    Raises
    ------
    BadInput: a half-width that is not above 0.

    Examples
    --------
    >>> seeds_for(np.array([-1.0, 1.0, -1.0, 1.0]), 1.0)  # s = 1.155, t(7) s / sqrt(8) = 0.965
    4
    """
    if not (np.isfinite(half_width) and half_width > 0):
        raise BadInput(f"The half-width is {half_width!r}: give a number above 0 in the readout's unit.")
    values = np.atleast_2d(np.asarray(difference, dtype=np.float64))
    values = values[np.isfinite(values).any(axis=1)]
    defined = np.isfinite(values)
    if not defined.any():
        return None
    n_cells, drawn = values.shape
    if n_cells == 1:
        found = values[defined]
        if len(found) < 2:
            return None
        s = float(found.std(ddof=1))
        wanted = _least(lambda n: student_t.ppf((1 + level) / 2, n - 1) * s <= half_width * np.sqrt(n))
        wanted = int(np.ceil(wanted * drawn / len(found)))
    else:
        values = values[:, defined.any(axis=0)]
        n_seeds = values.shape[1]
        if n_seeds < 2:
            return None
        cell, seed, rest = _components(values)

        def narrow(n: int) -> bool:
            squares = (n * cell + rest, n_cells * seed + rest, rest)
            square, freedom = _satterthwaite(*squares, n_cells, n)
            return bool(student_t.ppf((1 + level) / 2, freedom) * np.sqrt(square / (n_cells * n)) <= half_width)

        if not narrow(MOST_SEEDS):
            return None
        wanted = int(np.ceil(_least(narrow) * drawn / n_seeds))
    return max(0, wanted - drawn)


def _least(narrow: Callable[[int], bool]) -> int:
    """Least n of at least 2 that is enough, by bisection: whatever is more than enough is enough, too."""
    low, high = 1, 2
    while not narrow(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if narrow(middle) else (middle, high)
    return high


def _mean_squares(values: np.ndarray) -> tuple[float, float, float]:
    """Mean squares of cells, seeds and rest; ``[cell, seed]`` of at least two each, a gap filled additively."""
    rows, columns = _row_means(values), _row_means(values.T)
    grand = float(np.nanmean(values))
    fitted = rows[:, None] + columns[None] - grand
    filled = np.where(np.isfinite(values), values, fitted)
    c, s = values.shape
    rest = float(((filled - fitted) ** 2).sum() / ((c - 1) * (s - 1)))
    return s * float(rows.var(ddof=1)), c * float(columns.var(ddof=1)), rest


def _components(values: np.ndarray) -> tuple[float, float, float]:
    """Variance components of cells, seeds and rest, each at least 0."""
    cell, seed, rest = _mean_squares(values)
    c, s = values.shape
    return max(0.0, (cell - rest) / s), max(0.0, (seed - rest) / c), rest


def clustered_ratio(
    numerator: np.ndarray, denominator: np.ndarray, cluster: np.ndarray, seed: int, level: float = 0.95
) -> Estimate:
    """``sum(numerator) / sum(denominator)`` with an interval over clusters, such as donors.

    Cells of a donor share its stain, its tissue and often its window: they are not independent. Whole clusters are
    resampled with replacement; the levels are expanded as in :func:`bootstrap_mean`, for the number of clusters. With
    ones as denominator it is a mean.

    Parameters
    ----------
    numerator, denominator, cluster: ``[cell]``; a cell with NaN in either is left out.

    Returns
    -------
    Estimate: ``n`` counts the cells; no interval for fewer than two clusters.
    """
    numerator, denominator = (np.asarray(a, dtype=np.float64) for a in (numerator, denominator))
    defined = np.isfinite(numerator) & np.isfinite(denominator)
    n = int(defined.sum())
    if n == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0, level)
    names, index = np.unique(np.asarray(cluster).astype(str)[defined], return_inverse=True)
    top, bottom = (np.bincount(index, a[defined], minlength=len(names)) for a in (numerator, denominator))
    value = float(top.sum() / bottom.sum()) if bottom.sum() else float("nan")
    if len(names) < 2:
        return Estimate(value, float("nan"), float("nan"), n, level)
    weights = _weights(rng.stream(seed, "clustered bootstrap", len(names)), len(names))
    below = weights @ bottom
    drawn = (weights @ top)[below > 0] / below[below > 0]
    tail = expanded_tail(len(names), level)
    low, high = np.quantile(drawn, [tail, 1 - tail]) if len(drawn) else (float("nan"), float("nan"))
    return Estimate(value, float(low), float(high), n, level)
