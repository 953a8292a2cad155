"""What was read from tiles, and two readings of the same cells compared: the paper's Figure 3. Pure numpy.

Every figure stands with an interval from one bootstrap: donors with replacement and, within each donor drawn, its
cells, since tiles of one section overlap and share its stain. Readings that are compared with the same real tiles under
the same seed are resampled alike, so that two methods can be compared resample by resample.

Intervals. Signed differences (density, spacing) have percentile intervals, their levels expanded for the number of
donors (:func:`ge2hist_core.intervals.expanded_tail`). Figures that are never negative (a
divergence, a mean of absolute values) grow by resampling itself: their percentiles lie above the value that they are
for. They have ``value +- t sd`` over resamples with Student's t for (donors - 1) degrees of freedom, cut off at 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ge2hist_core import rng
from ge2hist_core.intervals import expanded_tail
from ge2hist_core.types import NicheStats

__all__ = [
    "FIGURES",
    "Comparison",
    "Readings",
    "bootstrap_weights",
    "compare",
    "compare_fully",
    "percentiles",
    "reach",
    "units",
]

LEVEL = 0.95
BOOTSTRAP = 1000
PSEUDO_COUNT = 0.5
LEAST_OF_A_TYPE = 10

FIGURES = ("density_relative", "composition_kl", "spacing_um", "spacing_var_um2")
"""Figure 3: relative density, composition (nats), mean (um) and variance (um2) of the nearest-neighbour distance."""


@dataclass(frozen=True, eq=False)
class Readings:
    """What was read from one tile of each of several cells.

    Parameters
    ----------
    stats: ``[cell]``. central: ``[cell]`` type of the cell. donor: ``[cell]`` its donor, None if all are of one.
    """

    stats: Sequence[NicheStats]
    central: np.ndarray
    donor: np.ndarray | None = None

    @cached_property
    def density(self) -> np.ndarray:
        """``[cell]`` nuclei per mm2."""
        return np.array([s.density_per_mm2 for s in self.stats])

    @cached_property
    def spacing(self) -> np.ndarray:
        """``[cell]`` mean nearest-neighbour distance in um, NaN where undefined."""
        return np.array([s.spacing_um for s in self.stats])

    @cached_property
    def spacing_var(self) -> np.ndarray:
        """``[cell]`` variance of the nearest-neighbour distance in um2, NaN where undefined."""
        return np.array([s.spacing_var_um2 for s in self.stats])

    @cached_property
    def counts(self) -> np.ndarray:
        """``[cell, class]`` nuclei of each class."""
        return np.stack([s.per_type["n"].to_numpy() for s in self.stats])

    @cached_property
    def class_density(self) -> np.ndarray:
        """``[cell, class]`` nuclei of each class per mm2."""
        return self.counts / np.array([s.area_mm2 for s in self.stats])[:, None]

    @property
    def classes(self) -> list[str]:
        return [str(name) for name in self.stats[0].per_type.index]

    def take(self, rows: np.ndarray) -> Readings:
        donor = None if self.donor is None else self.donor[rows]
        return Readings([self.stats[i] for i in rows], self.central[rows], donor)


@dataclass(frozen=True, eq=False)
class Comparison:
    """A comparison as JSON, and the absolute figures behind it for comparing methods.

    Parameters
    ----------
    json: see :func:`compare`. value: name -> absolute figure, of :data:`FIGURES` and ``by_type:<figure>``.
    drawn: name -> ``[resample]`` absolute figures. freedom: degrees of freedom of intervals, resampled units less 1.
    """

    json: dict[str, Any]
    value: Mapping[str, float]
    drawn: Mapping[str, np.ndarray]
    freedom: int


def compare(a: Readings, b: Readings, seed: int) -> dict[str, Any]:
    """Readings ``a`` against ``b``, the same cells in the same order.

    Returns
    -------
    ``density_relative`` (mean of a over mean of b, minus 1), ``composition_kl`` (nats, KL(b || a) of pooled counts),
    ``spacing_um`` and ``spacing_var_um2`` (differences of means over tiles of the tile's mean and variance of the
    nearest-neighbour distance), each with ``value``, ``low`` and ``high``, a 95 % interval; ``class_density``: the same
    for each class' cells per mm2 (difference), with ``real``, the mean of b; ``density_r``: correlation over cells;
    ``each_type``: the four figures for cells of each type of which there are ten or more; ``by_type``: the mean over
    these types of the absolute figures, with ``by_type_interval``. NaN where a figure has no answer, as the spacing of
    pictures without nuclei.
    """
    return compare_fully(a, b, seed).json


def compare_fully(a: Readings, b: Readings, seed: int) -> Comparison:
    """:func:`compare` with the resamples behind it."""
    n = len(a.stats)
    weights = bootstrap_weights(seed, a.donor, n)
    freedom = units(a.donor, n) - 1
    everyone = np.ones(n)
    value, drawn = _figures(a, b, everyone[None]), _figures(a, b, weights)
    with np.errstate(divide="ignore", invalid="ignore"):
        result: dict[str, Any] = {"n": n, "density_r": float(np.corrcoef(a.density, b.density)[0, 1])}
    for name in FIGURES:
        result[name] = _with_interval(name, value[name][0], drawn[name], freedom)
    result["class_density"] = _class_density(a, b, weights, freedom)
    absolute = {name: float(abs(value[name][0])) for name in FIGURES}
    absolute_drawn = {name: np.abs(drawn[name]) for name in FIGURES}

    each, per_type, per_type_drawn = {}, [], []
    for kind in np.unique(a.central):
        mine = (a.central == kind).astype(float)
        if mine.sum() < LEAST_OF_A_TYPE:
            continue
        of_type, of_type_drawn = _figures(a, b, mine[None]), _figures(a, b, weights * mine)
        each[str(kind)] = {"n": int(mine.sum())} | {
            name: _with_interval(name, of_type[name][0], of_type_drawn[name], freedom) for name in FIGURES
        }
        per_type.append([abs(of_type[name][0]) for name in FIGURES])
        per_type_drawn.append([np.abs(of_type_drawn[name]) for name in FIGURES])
    if each:
        means, mean_drawn = np.mean(per_type, axis=0), _mean_of_defined(np.array(per_type_drawn))
        result["by_type"] = dict(zip(FIGURES, means.tolist(), strict=True)) | {"types": len(each)}
        result["by_type_interval"] = {}
        for i, name in enumerate(FIGURES):
            low, high = _never_negative(means[i], mean_drawn[i], freedom)
            result["by_type_interval"][name] = {"low": low, "high": high}
            absolute[f"by_type:{name}"], absolute_drawn[f"by_type:{name}"] = float(means[i]), mean_drawn[i]
        result["each_type"] = each
    return Comparison(result, absolute, absolute_drawn, freedom)


def _figures(a: Readings, b: Readings, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Figures of every row of ``weights [resample, cell]``, how often each cell is drawn; ``[resample]`` each."""
    with np.errstate(divide="ignore", invalid="ignore"):
        density = (weights @ a.density) / (weights @ b.density) - 1.0
        p, q = weights @ b.counts + PSEUDO_COUNT, weights @ a.counts + PSEUDO_COUNT
        p, q = p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)
        return {
            "density_relative": density,
            "composition_kl": (p * np.log(p / q)).sum(axis=1),
            "spacing_um": _means(a.spacing, weights) - _means(b.spacing, weights),
            "spacing_var_um2": _means(a.spacing_var, weights) - _means(b.spacing_var, weights),
        }


def _means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means of the values that are not NaN."""
    known = ~np.isnan(values)
    return (weights[:, known] @ values[known]) / weights[:, known].sum(axis=1)


def _mean_of_defined(drawn: np.ndarray) -> np.ndarray:
    """``[type, figure, resample]`` -> mean over the types that a resample has, ``[figure, resample]``."""
    known = np.isfinite(drawn)
    with np.errstate(invalid="ignore"):
        return np.where(known, drawn, 0.0).sum(axis=0) / known.sum(axis=0)


def _class_density(a: Readings, b: Readings, weights: np.ndarray, freedom: int) -> dict[str, dict[str, float]]:
    difference, real = a.class_density - b.class_density, b.class_density.mean(axis=0)
    drawn = (weights @ difference) / weights.sum(axis=1, keepdims=True)
    out = {}
    for i, name in enumerate(a.classes):
        low, high = percentiles(drawn[:, i], freedom + 1)
        out[name] = {"value": float(difference[:, i].mean()), "low": low, "high": high, "real": float(real[i])}
    return out


def _with_interval(name: str, value: float, drawn: np.ndarray, freedom: int) -> dict[str, float]:
    low, high = _never_negative(value, drawn, freedom) if name == "composition_kl" else percentiles(drawn, freedom + 1)
    return {"value": float(value), "low": low, "high": high}


def _never_negative(value: float, drawn: np.ndarray, freedom: int) -> tuple[float, float]:
    half = reach(drawn, freedom)
    return max(0.0, float(value) - half) if math.isfinite(half) else math.nan, float(value) + half


def units(donor: np.ndarray | None, n: int) -> int:
    """What is resampled as a whole: donors where there are several, else cells."""
    donors = 1 if donor is None else len(np.unique(donor))
    return donors if donors > 1 else n


def percentiles(drawn: np.ndarray, resampled: int) -> tuple[float, float]:
    """Ends of the 95 % percentile interval of the finite ones of ``drawn``; NaN where there are fewer than two.

    ``resampled``: :func:`units` that were resampled, for which the levels are expanded.
    """
    finite = drawn[np.isfinite(drawn)]
    if len(finite) < 2 or resampled < 2:
        return math.nan, math.nan
    tail = expanded_tail(resampled, LEVEL)
    low, high = np.quantile(finite, [tail, 1 - tail])
    return float(low), float(high)


def reach(drawn: np.ndarray, freedom: int) -> float:
    """Half width ``t sd`` of the interval from resampled values; NaN where fewer than two are finite."""
    from scipy.stats import t

    finite = drawn[np.isfinite(drawn)]
    if len(finite) < 2 or freedom < 1:
        return math.nan
    return float(t.ppf((1 + LEVEL) / 2, freedom) * finite.std(ddof=1))


def bootstrap_weights(seed: int, donor: np.ndarray | None, n: int, resamples: int = BOOTSTRAP) -> np.ndarray:
    """How often each of ``n`` cells is drawn in each resample, ``[resample, cell]``."""
    draw = rng.stream(seed, "evaluation_bootstrap")
    return np.stack([np.bincount(_resampled(draw, donor, n), minlength=n) for _ in range(resamples)]).astype(float)


def _resampled(draw: np.random.Generator, donor: np.ndarray | None, n: int) -> np.ndarray:
    """Rows of a two-level bootstrap: donors with replacement, then each one's cells with replacement."""
    if donor is None:
        return draw.integers(0, n, n)
    names = np.unique(donor)
    chosen = names[draw.integers(0, len(names), len(names))]
    parts = [np.flatnonzero(donor == name) for name in chosen]
    return np.concatenate([part[draw.integers(0, len(part), len(part))] for part in parts])
