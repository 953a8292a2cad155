"""Nuclei table -> numbers: density, composition, spacing and neighbourhood enrichment of a tile.

Pure numpy, scipy and pandas; knows neither pictures nor models. A tile is the rectangle ``[0, width] x [0, height]``
in um; a nucleus belongs to it when its centre lies inside.

Spacing is the distance ``s_i`` from a nucleus to its nearest neighbour, seen in a window. Two things go wrong near the
edge: the true neighbour may lie outside, so that the observed distance is too long, and leaving out all nuclei near
the edge throws short distances away together with long ones. Hanisch's estimator of the nearest-neighbour distribution
keeps a nucleus when its neighbour is nearer than the edge, ``s_i < b_i``, where the observed distance is certainly the
true one, and undoes the preference for short distances by the area in which a distance can be seen at all:

    w_i = 1 / ((width - 2 s_i) (height - 2 s_i)),    mean = sum w_i s_i / sum w_i

The variance uses the same weights with the usual correction for reliability weights,
``sum w_i (s_i - mean)^2 / (sum w_i - sum w_i^2 / sum w_i)``; with equal weights it is the sample variance.
Distances that hardly fit into the window are hardly ever seen: means over many small tiles with few nuclei stay too
short. :func:`pool` therefore says over how many tiles a mean runs.

References
----------
Hanisch (1984), Some remarks on estimators of the distribution function of nearest-neighbour distance in stationary
spatial point processes, Math. Operationsforsch. Statist. 15, 409-412 (his estimator D4).
Stoyan (2006), On estimators of the nearest neighbour distance distribution function for stationary point processes,
Metrika 64, 139-150, doi:10.1007/s00184-006-0040-4.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from ge2hist_core import rng
from ge2hist_core.types import BadInput, NicheStats

__all__ = ["composition_kl", "enrichment", "nearest_neighbours", "niche_stats", "pool", "spacing"]


def _inside(nuclei: pd.DataFrame, size_um: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """``xy [nucleus, 2]`` and ``cell_type [nucleus]`` of the nuclei in the tile, after checking both arguments."""
    width, height = size_um
    if not (width > 0 and height > 0 and np.isfinite([width, height]).all()):
        raise ValueError(f"size_um is {size_um}: give a finite width and height > 0 in um")
    xy = nuclei[["x_um", "y_um"]].to_numpy(dtype=np.float64)
    if not np.isfinite(xy).all():
        raise ValueError("x_um and y_um must be finite")
    keep = ((xy >= 0) & (xy <= [width, height])).all(axis=1)
    return xy[keep], nuclei["cell_type"].to_numpy(dtype=object)[keep]


def _codes(cell_type: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """``[nucleus]`` position of each nucleus' type in ``classes``."""
    codes = pd.Index(classes).get_indexer(cell_type)
    if (codes < 0).any():
        unknown = cell_type[codes < 0][0]
        raise ValueError(f"cell_type {unknown!r} is not among the classes {', '.join(classes)}")
    return codes


def nearest_neighbours(xy_um: np.ndarray) -> np.ndarray:
    """``[point]`` distance in um to the nearest other point, NaN for a lone point. ``xy_um`` is ``[point, 2]``."""
    if len(xy_um) < 2:
        return np.full(len(xy_um), np.nan)
    # k=2: the nearest point is the point itself, or its exact double, at distance 0 either way.
    return cKDTree(xy_um).query(xy_um, k=2)[0][:, 1]


def spacing(xy_um: np.ndarray, size_um: tuple[float, float]) -> tuple[float, float]:
    """Mean (um) and variance (um2) of the nearest-neighbour distance, Hanisch-corrected for the tile's edge.

    Parameters
    ----------
    xy_um: ``[point, 2]`` positions inside the tile.
    size_um: width and height of the tile.

    Returns
    -------
    The mean is NaN when no point's nearest neighbour is nearer than the edge (always so with fewer than two points),
    the variance when fewer than two are.

    Examples
    --------
    The two middle points of four; the outer ones are nearer to the edge than to their neighbours.

    >>> spacing(np.array([[1.0, 5.0], [4.0, 5.0], [6.0, 5.0], [9.0, 5.0]]), (10.0, 10.0))
    (2.0, 0.0)
    """
    distance = nearest_neighbours(xy_um)
    edge = np.minimum(xy_um, np.asarray(size_um) - xy_um).min(axis=1, initial=np.inf)
    s = distance[distance < edge]
    if not len(s):
        return float("nan"), float("nan")
    weight = 1.0 / ((size_um[0] - 2 * s) * (size_um[1] - 2 * s))
    weight /= weight.sum()
    mean = float(weight @ s)
    if len(s) < 2:
        return mean, float("nan")
    return mean, float(weight @ (s - mean) ** 2 / (1.0 - weight @ weight))


def niche_stats(nuclei: pd.DataFrame, size_um: tuple[float, float], classes: Sequence[str]) -> NicheStats:
    """Density, composition and spacing of one tile.

    Parameters
    ----------
    nuclei: table with ``x_um``, ``y_um`` and ``cell_type``; nuclei outside the tile are left out.
    size_um: width and height of the tile.
    classes: the types to count over; the order of ``per_type``.

    Returns
    -------
    NicheStats. Densities are per mm2. Fractions are NaN in an empty tile. Spacings are NaN where :func:`spacing`
    has no answer; the spacing of a type is the distance to the nearest nucleus of the same type.

    Raises
    ------
    ValueError: a type that is not in ``classes``, a position or size that is not finite.

    Examples
    --------
    >>> table = pd.DataFrame({"x_um": [20.0, 30.0, 40.0], "y_um": [32.0, 32.0, 32.0], "cell_type": ["A", "A", "B"]})
    >>> stats = niche_stats(table, (64.0, 64.0), ("A", "B"))
    >>> stats.n, round(stats.density_per_mm2, 1), stats.spacing_um
    (3, 732.4, 10.0)
    >>> stats.per_type["fraction"].round(3).to_dict()
    {'A': 0.667, 'B': 0.333}
    """
    xy, cell_type = _inside(nuclei, size_um)
    codes = _codes(cell_type, classes)
    area_mm2 = size_um[0] * size_um[1] / 1e6
    n = np.bincount(codes, minlength=len(classes))
    mean, variance = spacing(xy, size_um)
    per_type = pd.DataFrame(
        {
            "n": n,
            "density_per_mm2": n / area_mm2,
            "fraction": n / len(xy) if len(xy) else np.full(len(classes), np.nan),
            "spacing_um": [spacing(xy[codes == k], size_um)[0] for k in range(len(classes))],
        },
        index=pd.Index(classes, name="cell_type"),
    )
    return NicheStats(per_type, len(xy), len(xy) / area_mm2, mean, variance, area_mm2)


def pool(stats: Sequence[NicheStats]) -> pd.DataFrame:
    """Many tiles in one table.

    Returns
    -------
    One row per readout (names of :meth:`NicheStats.readouts`): ``mean`` over the tiles where the readout is defined,
    ``sd`` between tiles (NaN below two tiles), ``n`` the number of such tiles. The mean of a fraction is that of the
    pooled counts, as if all tiles were one, so that a tile of three nuclei does not weigh as much as one of sixty.

    Raises
    ------
    ValueError: no tile, or tiles with different classes.
    """
    if not stats:
        raise ValueError("pool needs at least one tile")
    if any(not s.per_type.index.equals(stats[0].per_type.index) for s in stats):
        raise ValueError("the tiles were counted over different classes")
    values = pd.DataFrame([s.readouts() for s in stats])
    table = pd.DataFrame({"mean": values.mean(), "sd": values.std(ddof=1), "n": values.notna().sum()})
    counts = sum(s.per_type["n"] for s in stats)
    total = counts.sum()
    for name, count in counts.items():
        table.loc[f"fraction:{name}", "mean"] = count / total if total else np.nan
    return table


def composition_kl(p_counts: np.ndarray, q_counts: np.ndarray, pseudo_count: float = 0.5) -> float:
    """Kullback-Leibler divergence KL(p || q) in nats between two compositions given as counts ``[type]``.

    ``pseudo_count`` is added to every type of both sides (0.5: Jeffreys' prior), so that a type that one side lacks
    costs a finite amount which depends on how many nuclei were counted.

    Examples
    --------
    >>> composition_kl(np.array([10, 30]), np.array([100, 300]), pseudo_count=0.0)
    0.0
    """
    p, q = (np.asarray(counts, dtype=np.float64) + pseudo_count for counts in (p_counts, q_counts))
    if p.shape != q.shape or p.ndim != 1:
        raise ValueError(f"the compositions have shapes {p.shape} and {q.shape}, expected two equal [type] vectors")
    p, q = p / p.sum(), q / q.sum()
    seen = p > 0
    return float(np.sum(p[seen] * np.log(p[seen] / q[seen])))


def enrichment(
    nuclei: pd.DataFrame,
    size_um: tuple[float, float],
    classes: Sequence[str],
    radius_um: float = 15.0,
    n_permutations: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Which types are neighbours more often than when the same labels are shuffled over the same positions.

    Positions stay fixed, so that the edge of the tile needs no correction. The shuffles come from the stream
    ``(seed, "enrichment")`` and are applied to the nuclei in order of position: the table's order does not matter.

    Parameters
    ----------
    radius_um: two nuclei are neighbours when their centres are at most this far apart.
    n_permutations: number of shuffles, at least 2.

    Returns
    -------
    One row per unordered pair of types: ``type_a``, ``type_b``, ``observed`` number of neighbouring pairs, ``expected``
    mean over the shuffles, ``z`` = (observed - expected) / standard deviation over the shuffles (positive: together
    more often than by chance), NaN where all shuffles agree, as when a type is absent.
    """
    if not radius_um > 0:
        raise BadInput(f"radius_um is {radius_um!r}: choose a number > 0.")
    if n_permutations < 2:
        raise BadInput(f"n_permutations is {n_permutations!r}: choose at least 2.")
    xy, cell_type = _inside(nuclei, size_um)
    codes = _codes(cell_type, classes)
    order = np.lexsort((codes, xy[:, 1], xy[:, 0]))
    xy, codes = xy[order], codes[order]
    pairs = cKDTree(xy).query_pairs(radius_um, output_type="ndarray") if len(xy) else np.empty((0, 2), dtype=int)
    k = len(classes)

    def count(labels: np.ndarray) -> np.ndarray:
        """``[type, type]`` pairs, upper triangle."""
        a, b = labels[pairs[:, 0]], labels[pairs[:, 1]]
        return np.bincount(np.minimum(a, b) * k + np.maximum(a, b), minlength=k * k).reshape(k, k)

    draw = rng.stream(seed, "enrichment")
    shuffled = np.stack([count(draw.permutation(codes)) for _ in range(n_permutations)])
    observed, expected, deviation = count(codes), shuffled.mean(axis=0), shuffled.std(axis=0, ddof=1)
    z = np.full((k, k), np.nan)
    np.divide(observed - expected, deviation, out=z, where=deviation > 0)
    a, b = np.triu_indices(k)
    return pd.DataFrame(
        {
            "type_a": np.asarray(classes, dtype=object)[a],
            "type_b": np.asarray(classes, dtype=object)[b],
            "observed": observed[a, b],
            "expected": expected[a, b],
            "z": z[a, b],
        }
    )
