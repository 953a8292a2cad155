"""Distances between sets of pictures: KID and the mean of a paired distance, each with n and interval.

Works on features and distances as arrays; where they come from is :mod:`ge2hist_core.image_features`, and the feature
set is part of a number's name: "KID (reader features)" and "KID (Inception-v3 features)" are different figures.

KID (Binkowski et al. 2018, Demystifying MMD GANs, arXiv 1801.01401) is the squared maximum mean discrepancy under the
kernel ``k(x, y) = (x.y / d + 1)^3``, estimated without bias:

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

Like torch-fidelity, :func:`kid` reports the mean over random subsets of equal size. Being unbiased it may be negative,
which says that the sets cannot be told apart.

Interval. The spread over subsets, which papers print after "+-", measures the subsets' size and not what is unknown:
it shrinks as subsets grow, and other tissue would give other numbers. Tiles of one donor share stain and section, so
here donors are drawn again with replacement and, within each, its tiles; with one donor or none named, tiles alone. A
tile that is drawn twice is never compared with itself, or every resample would look tighter than the data. The
standard deviation over resamples gives ``value +- t sd`` with the quantile of Student's t for (donors - 1) degrees of
freedom, since held-out donors are few. It covers what another choice of donors and tiles would change; it does not
cover another training of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ge2hist_core import rng
from ge2hist_core.types import BadInput

__all__ = [
    "Estimate",
    "KID",
    "draw_subsets",
    "kid",
    "kid_over",
    "paired_mean",
    "polynomial_kernel",
    "polynomial_mmd",
]

LEVEL = 0.95
BOOTSTRAP = 500
SUBSETS = 100
SUBSET_SIZE = 100


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval.

    Parameters
    ----------
    name: figure and feature set. value, low, high: 95 % interval, None where it has no answer.
    sd: standard deviation over pictures. n: pictures. donors: 1 if they are not named.
    covers: what the interval covers.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    sd: float
    n: int
    donors: int
    covers: str
    drawn: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False, compare=False)
    """``[resample]`` behind the interval; those of two methods on the same donors and seed belong together in pairs."""

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "drawn"}


@dataclass(frozen=True)
class KID:
    """Kernel inception distance, or its like on other features.

    Parameters
    ----------
    name: "KID (<feature set> features)". value: mean over subsets. low, high: 95 % interval, None where it has no
        answer. subset_sd: standard deviation over subsets, the "+-" of papers.
    n_real, n_generated: pictures. subset_size, subsets: what was drawn of them. donors: 1 if they are not named.
    covers: what the interval covers.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    subset_sd: float
    n_real: int
    n_generated: int
    subset_size: int
    subsets: int
    donors: int
    covers: str
    drawn: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False, compare=False)
    """``[resample]`` behind the interval; those of two methods on the same donors and seed belong together in pairs."""

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "drawn"}


def polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """``(x.y / d + 1)^3`` of rows, ``[n, m]`` float64; ``x [n, d]``, ``y [m, d]``.

    Examples
    --------
    >>> polynomial_kernel(np.array([[1.0, 1.0]]), np.array([[1.0, 3.0], [0.0, 0.0]])).tolist()
    [[27.0, 1.0]]
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def polynomial_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD of features ``[n, d]`` and ``[m, d]``, each of at least two rows."""
    _check(x, y)
    kernels = polynomial_kernel(x, x), polynomial_kernel(y, y), polynomial_kernel(x, y)
    return _mmd(*kernels, np.ones(len(x)), np.ones(len(y)))


def _mmd(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased MMD^2 where row i of x stands for ``a[i]`` and row j of y for ``b[j]`` drawn pictures.

    Copies of one picture are no pair: pairs are weighed by the product of two different pictures' copies.
    """
    within = []
    for kernel, w in ((xx, a), (yy, b)):
        pairs = w.sum() ** 2 - (w**2).sum()
        within.append((w @ kernel @ w - (w**2) @ np.diagonal(kernel)) / pairs if pairs > 0 else np.nan)
    return float(within[0] + within[1] - 2.0 * (a @ xy @ b) / (a.sum() * b.sum()))


def draw_subsets(n_real: int, n_generated: int, size: int, subsets: int, seed: int) -> list[tuple[np.ndarray, ...]]:
    """Row numbers of each subset of both sets, drawn without replacement."""
    draw = rng.stream(seed, "kid subsets")
    return [tuple(draw.choice(n, size, replace=False) for n in (n_real, n_generated)) for _ in range(subsets)]


def kid_over(real: np.ndarray, generated: np.ndarray, pairs: Iterable[Sequence[np.ndarray]]) -> tuple[float, float]:
    """Mean and standard deviation of :func:`polynomial_mmd` over given subsets (rows of ``real``, of ``generated``)."""
    real, generated = _check(real, generated)
    kernels = polynomial_kernel(real, real), polynomial_kernel(generated, generated), polynomial_kernel(real, generated)
    values = []
    for a, b in pairs:
        parts = kernels[0][np.ix_(a, a)], kernels[1][np.ix_(b, b)], kernels[2][np.ix_(a, b)]
        values.append(_mmd(*parts, np.ones(len(a)), np.ones(len(b))))
    return float(np.mean(values)), float(np.std(values))


def kid(
    real: np.ndarray,
    generated: np.ndarray,
    features: str,
    seed: int,
    *,
    donor_real: np.ndarray | None = None,
    donor_generated: np.ndarray | None = None,
    paired: bool = False,
    subset_size: int | None = None,
    subsets: int = SUBSETS,
    bootstrap: int = BOOTSTRAP,
) -> KID:
    """KID of generated against real pictures.

    Parameters
    ----------
    real, generated: features ``[n, d]``, ``[m, d]``. features: name of the feature set.
    donor_real, donor_generated: ``[n]``, ``[m]`` donor of each picture, both or neither.
    paired: row i of both sets is of one cell, or of two of one donor, so that both are drawn again together. Where it
        holds, say so: how donors differ then cancels, which otherwise makes up most of the interval.
    subset_size: pictures per subset, by default ``SUBSET_SIZE`` or all of the smaller set if that has fewer.
    bootstrap: resamples behind the interval; 0 leaves it out.

    Raises
    ------
    BadInput: features that are not finite or do not match, a subset larger than a set, donors of one set alone.
    """
    real, generated = _check(real, generated)
    n, m = len(real), len(generated)
    size = min(SUBSET_SIZE, n, m) if subset_size is None else subset_size
    if not 2 <= size <= min(n, m):
        raise BadInput(f"subset_size is {size}: give a number from 2 to {min(n, m)}, the pictures of the smaller set.")
    if subsets < 1:
        raise BadInput(f"subsets is {subsets}: give at least 1.")
    if (donor_real is None) != (donor_generated is None):
        raise BadInput("Donors are named for one of the two sets: name them for both or for none.")
    if paired and n != m:
        raise BadInput(f"Paired sets have as many pictures each, got {n} and {m}: leave paired out.")
    value, spread = kid_over(real, generated, draw_subsets(n, m, size, subsets, seed))
    groups = (
        np.zeros(n, dtype=object) if donor_real is None else np.asarray(donor_real).astype(object),
        np.zeros(m, dtype=object) if donor_generated is None else np.asarray(donor_generated).astype(object),
    )
    names = sorted({str(name) for group in groups for name in group})
    low = high = None
    drawn = np.empty(0)
    if bootstrap > 1:
        kernels = (
            polynomial_kernel(real, real),
            polynomial_kernel(generated, generated),
            polynomial_kernel(real, generated),
        )
        draw = rng.stream(seed, "kid bootstrap")
        drawn = np.array([_mmd(*kernels, *_resampled_copies(draw, groups, names, paired)) for _ in range(bootstrap)])
        reach = _reach(drawn, len(names), min(n, m))
        low, high = (value - reach, value + reach) if np.isfinite(reach) else (None, None)
    return KID(
        f"KID ({features} features)",
        value,
        low,
        high,
        spread,
        n,
        m,
        size,
        subsets,
        len(names),
        _covers(len(names)),
        drawn,
    )


def _reach(drawn: np.ndarray, donors: int, n: int) -> float:
    """Half width of the interval from resampled values; NaN where fewer than two were possible."""
    from scipy.stats import t

    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < 2:
        return float("nan")
    return float(t.ppf((1 + LEVEL) / 2, (donors if donors > 1 else n) - 1) * drawn.std(ddof=1))


def _covers(donors: int) -> str:
    return "another choice of donors and of their tiles" if donors > 1 else "another choice of tiles"


def _resampled_copies(
    draw: np.random.Generator, groups: tuple[np.ndarray, np.ndarray], names: Sequence[str], paired: bool
) -> tuple[np.ndarray, np.ndarray]:
    """How often each picture of both sets is drawn: donors with replacement, then each one's pictures."""
    chosen = [names[i] for i in draw.integers(0, len(names), len(names))]
    copies = []
    for group in groups[:1] if paired else groups:
        text = group.astype(str)
        out = np.zeros(len(group))
        for name in chosen:
            rows = np.flatnonzero(text == name)
            if len(rows):
                out += np.bincount(rows[draw.integers(0, len(rows), len(rows))], minlength=len(out))
        copies.append(out)
    return (copies[0], copies[0]) if paired else (copies[0], copies[1])


def paired_mean(
    distance: np.ndarray, name: str, seed: int, *, donor: np.ndarray | None = None, bootstrap: int = BOOTSTRAP
) -> Estimate:
    """Mean of one distance per picture, such as LPIPS between a generated and its real tile.

    Parameters
    ----------
    distance: ``[n]``. name: figure and feature set. donor: ``[n]`` or None. Interval as for :func:`kid`.

    Raises
    ------
    BadInput: no distance, or one that is not finite.
    """
    distance = np.asarray(distance, dtype=np.float64)
    if distance.ndim != 1 or not len(distance) or not np.isfinite(distance).all():
        raise BadInput(f"{name}: the distances must be finite numbers, one per picture, got shape {distance.shape}.")
    n = len(distance)
    group = np.zeros(n, dtype=object) if donor is None else np.asarray(donor).astype(object)
    names = sorted({str(name) for name in group})
    draw = rng.stream(seed, "distance bootstrap")
    copies = [_resampled_copies(draw, (group, group), names, True)[0] for _ in range(bootstrap)]
    drawn = np.array([w @ distance / w.sum() for w in copies])
    value, reach = float(distance.mean()), _reach(drawn, len(names), n) if n > 1 else float("nan")
    low, high = (value - reach, value + reach) if np.isfinite(reach) else (None, None)
    return Estimate(name, value, low, high, float(distance.std()), n, len(names), _covers(len(names)), drawn)


def _check(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    for name, value in (("real", x), ("generated", y)):
        if value.ndim != 2 or len(value) < 2 or not value.shape[1]:
            raise BadInput(f"The {name} features have shape {value.shape}: give two pictures or more.")
        if not np.isfinite(value).all():
            raise BadInput(f"The {name} features hold NaN or infinite values: check the pictures.")
    if x.shape[1] != y.shape[1]:
        raise BadInput(f"Real pictures have {x.shape[1]} features, generated {y.shape[1]}: use one set of both.")
    return x, y
