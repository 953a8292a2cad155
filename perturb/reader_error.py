"""Density and composition of both arms, corrected for the reader's errors, with an interval that knows of them.

The interval of :func:`perturb.stats.crossed_effect` takes the reader at its word. Here cells and seeds are resampled
independently of each other (Owen 2007, doi:10.1214/07-AOAS122; levels expanded for the smaller number of the two), and
in every resample the reader's errors are drawn anew as another judging would have counted them
(:meth:`ge2hist_core.reader_error.ReaderError.draws`). Both arms share cells, seeds and errors, so that what the reader
does to both alike cancels from the effect. The noise of reading a finite number of nuclei is already in the spread over
pictures. As everywhere, intervals allow for the next pairs to differ by half a nucleus where few do
(:func:`perturb.stats.bootstrap_mean`). Spacing is not corrected: it depends on *which* nuclei are missed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ge2hist_core import rng
from ge2hist_core.intervals import expanded_tail
from ge2hist_core.reader_error import ReaderError
from perturb.stats import allowance

__all__ = ["COVERS", "N_RESAMPLES", "corrected_comparison", "count_table"]

N_RESAMPLES = 2000
N_READERS = 200
"""Drawn readers; each is used in as many resamples as the others."""

COVERS = "noise seeds and cells, and the reader's measured errors; not donors or repeated experiments"


def count_table(nuclei: Sequence[pd.DataFrame], size_um: tuple[float, float], classes: Sequence[str]) -> np.ndarray:
    """Nuclei of each type whose centre lies in the picture, ``[picture, type]``."""
    from ge2hist_core.niche import niche_stats

    return np.stack([niche_stats(one, size_um, classes).per_type["n"].to_numpy() for one in nuclei]).astype(float)


def corrected_comparison(
    base: np.ndarray,
    edited: np.ndarray,
    error: ReaderError,
    area_mm2: float,
    seed: int,
    level: float = 0.95,
    n_resamples: int = N_RESAMPLES,
) -> pd.DataFrame:
    """Corrected density and composition of both arms and the effect between them.

    Parameters
    ----------
    base, edited: found counts ``[cell, seed, type]`` of the same cells and seeds, types in the order of
        ``error.classes``.
    area_mm2: of one picture.
    seed: of resampling and drawn readers.

    Returns
    -------
    One row per readout, ``density`` and per type ``density:`` and ``fraction:`` (of types that either arm shows):
    ``readout, unit, base, edited, effect`` corrected, ``low, high`` of the effect, ``found`` the effect as the reader
    found it, ``reader_share``: of the effect's variance, how much comes from not knowing the reader's errors exactly, n
    (pictures per arm). Fractions are those of the pooled counts. No interval with a single picture.

    Raises
    ------
    ValueError: arrays of different or other shape.
    """
    base, edited = np.asarray(base, dtype=np.float64), np.asarray(edited, dtype=np.float64)
    k = len(error.classes)
    if base.shape != edited.shape or base.ndim != 3 or base.shape[2] != k or not base.size:
        raise ValueError(f"both arms need counts [cell, seed, {k}], got shapes {base.shape} and {edited.shape}")
    n_cells, n_seeds = base.shape[:2]
    arms = np.stack([base, edited])  # [arm, cell, seed, type]
    found = arms.mean((1, 2))
    corrected = _readouts(error.correct(found, area_mm2), area_mm2)
    plain = _readouts(found, area_mm2)
    low = high = share = np.full(corrected.shape[1], np.nan)
    if n_cells * n_seeds > 1:
        effects, fixed = _resampled(arms, error, area_mm2, seed, n_resamples)
        tail = expanded_tail(min(m for m in (n_cells, n_seeds) if m > 1), level)
        low, high = _quantiles(effects, tail), _quantiles(effects, 1 - tail)
        if not np.array_equal(base, edited):
            value = corrected[1] - corrected[0]
            allowed = allowance(_steps(arms, area_mm2), n_cells * n_seeds, level)
            low = value - np.hypot(np.maximum(value - low, 0.0), allowed)
            high = value + np.hypot(np.maximum(high - value, 0.0), allowed)
        variance = _variance(effects)
        unknown = np.clip(variance - _variance(fixed), 0.0, None)
        share = np.divide(unknown, variance, out=np.full(len(variance), np.nan), where=variance > 0)
    rows = []
    for i, (readout, unit) in enumerate(_names(error.classes)):
        if ":" in readout and not np.nan_to_num(plain[:, i]).any():
            continue
        (before, after), was = corrected[:, i], plain[1, i] - plain[0, i]
        rows.append((readout, unit, before, after, after - before, low[i], high[i], was, share[i], n_cells * n_seeds))
    columns = ["readout", "unit", "base", "edited", "effect", "low", "high", "found", "reader_share", "n"]
    return pd.DataFrame(rows, columns=columns)


def _names(classes: Sequence[str]) -> list[tuple[str, str]]:
    densities = [(f"density:{name}", "cells/mm²") for name in classes]
    return [("density", "cells/mm²"), *densities, *((f"fraction:{name}", "fraction") for name in classes)]


def _readouts(counts: np.ndarray, area_mm2: float) -> np.ndarray:
    """Mean counts ``[..., type]`` -> total density, densities, fractions ``[..., 1 + 2 type]``; NaN of no nuclei."""
    total = counts.sum(-1, keepdims=True)
    fraction = np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)
    return np.concatenate([total / area_mm2, counts / area_mm2, fraction], axis=-1)


def _steps(arms: np.ndarray, area_mm2: float) -> np.ndarray:
    """What one nucleus more or less makes of each readout ``[readout]``."""
    k, nuclei = arms.shape[-1], float(arms.sum(axis=-1).mean())
    return np.array([1.0 / area_mm2] * (1 + k) + [1.0 / nuclei if nuclei else 0.0] * k)


def _resampled(
    arms: np.ndarray, error: ReaderError, area_mm2: float, seed: int, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Effects ``[resample, readout]`` with drawn readers, and the same resamples with the one measured."""
    n_cells, n_seeds = arms.shape[1:3]
    draws = rng.stream(seed, "reader bootstrap", n_cells, n_seeds)
    cells, seeds = (draws.multinomial(m, np.full(m, 1.0 / m), size=n) / m for m in (n_cells, n_seeds))
    means = np.einsum("rc,acst,rs->rat", cells, arms, seeds)
    readers = error.draws(min(N_READERS, n), seed)
    with_error = np.empty_like(means)
    for i, reader in enumerate(readers):
        rows = slice(i, None, len(readers))
        with_error[rows] = reader.correct(means[rows], area_mm2)
    found = [_readouts(counts, area_mm2) for counts in (with_error, error.correct(means, area_mm2))]
    effects, fixed = (values[:, 1] - values[:, 0] for values in found)
    return effects, fixed


def _variance(values: np.ndarray) -> np.ndarray:
    """Variance of the defined values of each column, 0 for a column without any."""
    return np.array([np.var(column[np.isfinite(column)]) if np.isfinite(column).any() else 0.0 for column in values.T])


def _quantiles(values: np.ndarray, q: float) -> np.ndarray:
    """Quantile of the defined values of each column, NaN for a column without any."""
    out = np.full(values.shape[1], np.nan)
    for i, column in enumerate(values.T):
        defined = column[np.isfinite(column)]
        if len(defined):
            out[i] = np.quantile(defined, q)
    return out
