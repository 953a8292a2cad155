"""Paired statistics over noise seeds and cells: effect with interval, sign-flip p-value, false discovery rate.

What they speak about is the model: the same cell drawn again with other noise, or other cells like the chosen ones.
They say nothing about donors or repeated biological experiments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student_t

from ge2hist_core import rng

__all__ = [
    "EXACT_UP_TO",
    "Estimate",
    "bh_fdr",
    "bootstrap_mean",
    "crossed_effect",
    "crossed_mean",
    "sign_flip_p",
]

EXACT_UP_TO = 16
"""All ``2**n`` sign patterns are counted up to this many pairs, above that they are sampled."""

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


def bootstrap_mean(values: np.ndarray, seed: int, level: float = 0.95) -> Estimate:
    r"""Mean with its expanded percentile bootstrap interval.

    The plain percentile interval of a mean is too narrow by about ``sqrt((n - 1) / n)`` and by Student's against
    normal quantiles. Both are mended by reading the bootstrap distribution at the levels
    :math:`\Phi(\pm\sqrt{n/(n-1)}\,t_{n-1})` (Hesterberg 2015, doi:10.1080/00031305.2015.1089789).

    Parameters
    ----------
    values: ``[seed]``; NaN (undefined readout) is left out and lowers ``n``.
    seed: of the resampling.

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
    picks = rng.stream(seed, "bootstrap", n).integers(0, n, size=(N_BOOTSTRAP, n))
    tail = _expanded_tail(n, level)
    low, high = np.quantile(values[picks].mean(axis=1), [tail, 1 - tail])
    return Estimate(mean, float(low), float(high), n, level)


def _expanded_tail(n: int, level: float) -> float:
    return float(norm.cdf(np.sqrt(n / (n - 1)) * student_t.ppf((1 - level) / 2, n - 1)))


def crossed_mean(values: np.ndarray, seed: int, level: float = 0.95) -> Estimate:
    """Mean over cells and seeds, with an interval over both.

    Every cell is drawn with every seed, so the values are crossed. Cells and seeds are resampled independently of each
    other (the pigeonhole bootstrap, Owen 2007, doi:10.1214/07-AOAS122), which is somewhat wide where neither matters
    and right where cells, or seeds, differ. Its levels are expanded as in :func:`bootstrap_mean`, for the number of
    cells. With one cell it is :func:`bootstrap_mean` over the seeds.

    Parameters
    ----------
    values: ``[cell, seed]``; NaN (undefined readout) is left out.

    Returns
    -------
    Estimate: ``n`` counts the defined values; no interval where there is a single cell and a single seed.
    """
    values = np.asarray(values, dtype=np.float64)
    n_cells, n_seeds = values.shape
    if n_cells == 1:
        return bootstrap_mean(values[0], seed, level)
    if n_seeds == 1:
        return bootstrap_mean(values[:, 0], seed, level)
    defined = np.isfinite(values)
    n = int(defined.sum())
    if n == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0, level)
    draws = rng.stream(seed, "crossed bootstrap", n_cells, n_seeds)
    cells = _weights(draws, n_cells)
    seeds = _weights(draws, n_seeds)
    total = np.einsum("bc,cs,bs->b", cells, np.where(defined, values, 0.0), seeds)
    count = np.einsum("bc,cs,bs->b", cells, defined.astype(float), seeds)
    means = total[count > 0] / count[count > 0]
    tail = _expanded_tail(n_cells, level)
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(float(values[defined].mean()), float(low), float(high), n, level)


def _weights(draws: np.random.Generator, n: int) -> np.ndarray:
    """How often each of ``n`` is drawn in ``n`` draws with replacement, ``[resample, n]``."""
    return draws.multinomial(n, np.full(n, 1.0 / n), size=N_BOOTSTRAP).astype(np.float64)


def crossed_effect(base: np.ndarray, edited: np.ndarray, seed: int, level: float = 0.95) -> Estimate:
    """Mean of ``edited - base`` over cells and seeds, interval of :func:`crossed_mean`, sign-flip p.

    The unit that p flips is the cell (its mean over seeds) where there are several, else the seed: draws of one cell do
    not stand in for other cells.

    Parameters
    ----------
    base, edited: ``[cell, seed]`` in the same unit and order. A pair with NaN on either side is left out.

    Raises
    ------
    ValueError: arrays of different shape.
    """
    base, edited = np.asarray(base, dtype=np.float64), np.asarray(edited, dtype=np.float64)
    if base.shape != edited.shape or base.ndim != 2:
        raise ValueError(f"pairs need two [cell, seed] arrays, got shapes {base.shape} and {edited.shape}")
    difference = edited - base
    found = crossed_mean(difference, seed, level)
    units = difference[0] if len(difference) == 1 else _row_means(difference)
    return Estimate(found.value, found.low, found.high, found.n, level, sign_flip_p(units, seed))


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
