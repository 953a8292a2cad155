"""Known-truth tissue: a structural causal model from genes to the places of nuclei.

    driver genes' levels -> programmes -> compartments, vessels, aggregates -> nuclei of each type

Every random number belongs to (seed, donor, name). :meth:`Section.intervene` rebuilds the same tissue from the same
numbers with a gene's level set by hand, which is what makes the true effect of an edit known (Pearl 2009,
*Causality*, ch. 7: abduction, action, prediction).

Each cell type is an independently thinned Poisson process of candidate places, followed by removal of nuclei that
stand too near to one of higher priority. So a change of one type's intensity leaves the other candidates alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial import cKDTree
from scipy.special import erfinv, expit

from ge2hist_core.rng import stream
from ge2hist_core.simulator import programmes as effects
from ge2hist_core.simulator.expression import load_genes
from ge2hist_core.simulator.programmes import PROGRAMMES
from ge2hist_core.types import BadInput

__all__ = ["Section", "simulate_section"]

GRID_UM = 2.0
DRIVER_SD = {"shared": 0.85, "own": 0.45, "donor": 0.30}
"""Spread of a driver's log level: what the programme's drivers share, the gene's own part, the donor's."""
PROGRAMME_SCALE = 0.75
"""Brings the spread of a programme to about 1."""
PROGRAMME_SIGMA_UM = 45.0
CANDIDATES_PER_MM2 = 26000.0
"""Ceiling of one type's intensity; candidates are drawn at this density and thinned."""


def _gaussian_field(rng: np.random.Generator, n: int, sigma_um: float) -> np.ndarray:
    """Smooth periodic Gaussian field ``[n, n]`` of mean 0 and variance 1 (of the process, not of this draw)."""
    sigma = sigma_um / GRID_UM
    field = gaussian_filter(rng.standard_normal((n, n)), sigma, mode="wrap")
    return field * 2.0 * sigma * np.sqrt(np.pi)


@dataclass(frozen=True, eq=False)
class Section:
    """One donor's section with its causes.

    Parameters
    ----------
    seed, donor: name every random number.
    size_um: side of the square section.
    gene_factors: gene -> factor on its level, the interventions (empty for the tissue as it is).
    driver_levels: driver gene -> log relative level ``[gy, gx]`` (0 = typical, -inf = knocked out).
    fields: the six programmes and the architecture (``epithelium, luminal, lumen, vessel_lumen, aggregate, collagen``
        in 0..1, ``fibre_angle`` in radians) on a grid of ``grid_um``; node i lies at (i + 0.5) grid_um.
    nuclei: one row per nucleus: ``x_um, y_um, cell_type, major_um, minor_um`` (full axes), ``angle`` (radians),
        ``chromatin, darkness`` (0..1), ``key`` (the same nucleus keeps its key in every intervention).
    """

    seed: int
    donor: int
    size_um: float
    gene_factors: Mapping[str, float]
    driver_levels: Mapping[str, np.ndarray]
    fields: Mapping[str, np.ndarray]
    nuclei: pd.DataFrame
    grid_um: float = GRID_UM

    def intervene(self, factors: Mapping[str, float]) -> Section:
        """The same tissue (same random numbers) with each gene's level multiplied by its factor; 0 knocks it out."""
        return simulate_section(self.seed, self.donor, self.size_um, {**self.gene_factors, **factors})

    def at(self, name: str, xy_um: np.ndarray) -> np.ndarray:
        """Value of a field at positions ``[n, 2]`` (bilinear)."""
        return _at(self.fields[name], xy_um)

    @cached_property
    def donor_name(self) -> str:
        return f"donor{self.donor:03d}"


def _at(field: np.ndarray, xy_um: np.ndarray) -> np.ndarray:
    return map_coordinates(field, xy_um.T[::-1] / GRID_UM - 0.5, order=1, mode="nearest")


def simulate_section(
    seed: int, donor: int, size_um: float = 512.0, gene_factors: Mapping[str, float] | None = None
) -> Section:
    """Simulate one donor's section.

    Parameters
    ----------
    seed, donor: name the tissue; every donor has its own genes' levels, architecture and nuclear size.
    size_um: side of the section, a multiple of the 2-um grid.
    gene_factors: interventions, gene -> factor >= 0 on its level. Only drivers change the tissue.

    Raises
    ------
    BadInput: a gene that the table does not hold, a negative factor, or a size that does not fit the grid.
    """
    gene_factors = dict(gene_factors or {})
    table = load_genes()
    for gene, factor in gene_factors.items():
        if gene not in table.symbols:
            raise BadInput(f"gene is {gene!r}, which the known-truth tissue does not have: see genes.csv.")
        if not (np.isfinite(factor) and factor >= 0):
            raise BadInput(f"factor of {gene} is {factor!r}: give a number >= 0.")
    n = round(size_um / GRID_UM)
    if n < 32 or abs(n * GRID_UM - size_um) > 1e-6:
        raise BadInput(f"size_um is {size_um:g}: give a multiple of {GRID_UM:g} um of at least {32 * GRID_UM:g}.")

    levels = _driver_levels(seed, donor, n, gene_factors)
    fields = {name: np.zeros((n, n)) for name in PROGRAMMES}
    for gene, level in levels.items():
        programme, weight = table.programme_of(gene)
        fields[programme] += PROGRAMME_SCALE * weight * np.tanh(level / 2.0)
    fields |= _architecture(seed, donor, n, fields)
    vessels = _vessels(seed, donor, size_um, fields)
    fields["vessel_lumen"] = _vessel_lumen(vessels, n)
    nuclei = _place_nuclei(seed, donor, size_um, fields, vessels)
    return Section(seed, donor, float(size_um), gene_factors, levels, fields, nuclei)


def _driver_levels(seed: int, donor: int, n: int, factors: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Log relative level of each driver over the section: shared by its programme, its own, its donor's."""
    table = load_genes()
    shared = {
        name: DRIVER_SD["shared"] * _gaussian_field(stream(seed, "programme", donor, name), n, PROGRAMME_SIGMA_UM)
        + 0.45 * stream(seed, "programme_donor", donor, name).standard_normal()
        for name in PROGRAMMES
    }
    levels = {}
    for gene in table.drivers:
        programme, weight = table.programme_of(gene)
        own = DRIVER_SD["own"] * _gaussian_field(stream(seed, "driver", donor, gene), n, PROGRAMME_SIGMA_UM)
        own += DRIVER_SD["donor"] * stream(seed, "driver_donor", donor, gene).standard_normal()
        level = np.sign(weight) * shared[programme] + own
        with np.errstate(divide="ignore"):
            levels[gene] = level + np.log(factors.get(gene, 1.0))
    return levels


def _architecture(seed: int, donor: int, n: int, fields: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Nests, glands with lumen, lymphoid aggregates, collagen and its direction."""
    rng = stream(seed, "architecture", donor)
    nest = 0.9 * _gaussian_field(rng, n, 20.0) + 0.35 * _gaussian_field(rng, n, 9.0)
    gland = _gaussian_field(rng, n, 50.0)
    ravel = _gaussian_field(rng, n, 5.0)
    wander = _gaussian_field(rng, n, 40.0)
    threshold = 0.05 + 0.3 * rng.standard_normal()
    gland_threshold = 0.9 + 0.3 * rng.standard_normal()

    for programme, shift in effects.NEST_THRESHOLD.items():
        threshold = threshold + shift * np.clip(fields[programme], -3, 3)
    # Low cohesion frays the border of the nests: single cells and cords leave them.
    fray = 0.45 * np.exp(-0.45 * np.clip(fields["cohesion"], -3, 3))
    luminal = expit((gland - gland_threshold) / 0.12)
    depth = nest + (1 - 0.7 * luminal) * fray * ravel - threshold
    # Normal glands are open in their middle; tumour nests are mostly solid.
    epithelium = expit(depth / 0.10)
    lumen = luminal * expit((depth - 1.0) / 0.06) + (1 - luminal) * expit((depth - 2.5) / 0.06)

    aggregate = np.zeros((n, n))
    count = rng.poisson(14.0 * (n * GRID_UM / 1000.0) ** 2)
    places, radius, mark = rng.random((count, 2)) * n * GRID_UM, rng.uniform(26.0, 48.0, count), rng.random(count)
    yx = (np.mgrid[:n, :n] + 0.5) * GRID_UM
    for (x, y), r, u in zip(places, radius, mark, strict=True):
        infiltration = _at(fields["immune_infiltration"], np.array([[x, y]]))[0]
        intercept, slope = effects.AGGREGATE_SHARE
        size = r * np.clip(1 + 0.15 * infiltration, 0.6, 1.4)
        if u < expit(intercept + slope * infiltration):
            distance2 = ((yx[1] - x) ** 2 + (yx[0] - y) ** 2) / size**2
            aggregate = np.maximum(aggregate, np.exp(-(distance2**2)))
    aggregate = aggregate * (1 - epithelium)

    slope_y, slope_x = np.gradient(gaussian_filter(nest, 3.0, mode="wrap"))
    along_border = np.arctan2(slope_y, slope_x) + np.pi / 2
    near_border = np.exp(-((depth / 0.6) ** 2))
    # Directions have no sign: average them on the doubled angle.
    doubled = near_border * np.exp(2j * along_border) + (1.2 - near_border) * np.exp(2j * np.pi * wander / 2)
    collagen = (1 - epithelium) * np.clip(0.55 + 0.22 * fields["fibrosis"], 0.08, 1.0) * (1 - 0.8 * aggregate)
    return {
        "epithelium": epithelium,
        "luminal": luminal,
        "lumen": np.clip(lumen, 0, 1) * epithelium,
        "aggregate": aggregate,
        "fibre_angle": np.angle(doubled) / 2,
        "collagen": collagen,
    }


def _vessels(seed: int, donor: int, size_um: float, fields: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Vessels that exist: ``x_um, y_um``, half axes ``a_um, b_um``, ``angle``, ``key``."""
    rng = stream(seed, "vessels", donor)
    count = rng.poisson(230.0 * (size_um / 1000.0) ** 2)
    xy = rng.random((count, 2)) * size_um
    a = np.exp(rng.normal(np.log(6.5), 0.4, count)).clip(3.5, 18.0)
    b = a * rng.uniform(0.45, 0.95, count)
    angle, mark = rng.uniform(0, np.pi, count), rng.random(count)
    intercept, slope = effects.VESSEL_SHARE
    share = expit(intercept + slope * _at(fields["angiogenesis"], xy))
    share *= (1 - _at(fields["epithelium"], xy)) * (1 - 0.7 * _at(fields["aggregate"], xy))
    vessels = pd.DataFrame({"x_um": xy[:, 0], "y_um": xy[:, 1], "a_um": a, "b_um": b, "angle": angle})
    vessels["key"] = np.arange(count)
    return vessels[mark < share].reset_index(drop=True)


def _vessel_lumen(vessels: pd.DataFrame, n: int) -> np.ndarray:
    yx = (np.mgrid[:n, :n] + 0.5) * GRID_UM
    lumen = np.zeros((n, n))
    for v in vessels.itertuples():
        dx, dy = yx[1] - v.x_um, yx[0] - v.y_um
        u = (dx * np.cos(v.angle) + dy * np.sin(v.angle)) / v.a_um
        w = (-dx * np.sin(v.angle) + dy * np.cos(v.angle)) / v.b_um
        lumen = np.maximum(lumen, expit((1 - np.hypot(u, w)) * 6.0))
    return lumen


def _place_nuclei(
    seed: int, donor: int, size_um: float, fields: Mapping[str, np.ndarray], vessels: pd.DataFrame
) -> pd.DataFrame:
    area_mm2 = (size_um / 1000.0) ** 2
    open_space = (1 - fields["lumen"]) * (1 - fields["vessel_lumen"])
    compartments = {
        "tumour": fields["epithelium"] * (1 - fields["luminal"]) * open_space,
        "luminal": fields["epithelium"] * fields["luminal"] * open_space,
        "stroma": (1 - fields["epithelium"]) * open_space,
        "aggregate": fields["aggregate"] * open_space,
    }
    parts = [_ring_nuclei(seed, donor, size_um, vessels)]
    for rank, (name, base) in enumerate(effects.BASE_INTENSITY.items()):
        rng = stream(seed, "candidates", donor, name)
        count = rng.poisson(CANDIDATES_PER_MM2 * area_mm2)
        xy = rng.random((count, 2)) * size_um
        mark, priority = rng.random(count), rng.random(count)
        log_fold = sum(
            strength * np.clip(fields[programme], -3.5, 3.5) for programme, strength in effects.LOG_FOLD[name].items()
        )
        intensity = np.exp(log_fold) * sum(value * compartments[place] for place, value in base.items())
        kept = mark < _at(intensity, xy) / CANDIDATES_PER_MM2
        part = pd.DataFrame({"x_um": xy[:, 0], "y_um": xy[:, 1], "cell_type": name, "angle": np.full(count, np.nan)})
        part["key"] = (rank + 1) * 10_000_000 + np.arange(count)
        part["priority"] = priority
        parts.append(part[kept])
    nuclei = pd.concat([part for part in parts if len(part)], ignore_index=True)
    nuclei = _add_shapes(seed, donor, nuclei, fields)
    kept = _remove_crowded(nuclei, fields)
    return nuclei[kept].drop(columns=["priority"]).reset_index(drop=True)


def _ring_nuclei(seed: int, donor: int, size_um: float, vessels: pd.DataFrame) -> pd.DataFrame:
    """Endothelial nuclei on the wall of each vessel; they come first where space is short."""
    rows = []
    for v in vessels.itertuples():
        rng = stream(seed, "wall", donor, int(v.key))
        count = max(2, round(np.pi * (v.a_um + v.b_um) / 12.0))
        phase = 2 * np.pi * (np.arange(count) + rng.uniform(-0.25, 0.25, count) + rng.random()) / count
        ex, ey = (v.a_um + 1.3) * np.cos(phase), (v.b_um + 1.3) * np.sin(phase)
        cos, sin = np.cos(v.angle), np.sin(v.angle)
        tangent = np.arctan2((v.b_um + 1.3) * np.cos(phase), -(v.a_um + 1.3) * np.sin(phase)) + v.angle
        for i in range(count):
            x, y = v.x_um + ex[i] * cos - ey[i] * sin, v.y_um + ex[i] * sin + ey[i] * cos
            if 0 <= x < size_um and 0 <= y < size_um:
                rows.append((x, y, "Endothelium", tangent[i], int(v.key) * 1000 + i, -1.0 + i / 1000))
    return pd.DataFrame(rows, columns=["x_um", "y_um", "cell_type", "angle", "key", "priority"])


def _add_shapes(seed: int, donor: int, nuclei: pd.DataFrame, fields: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Type, size, direction and chromatin of each nucleus, from draws that belong to its key."""
    xy = nuclei[["x_um", "y_um"]].to_numpy()
    draws = _draws_by_key(seed, donor, nuclei["key"].to_numpy())
    intercept, slope = effects.PROLIFERATING_SHARE
    proliferates = draws[:, 0] < expit(intercept + slope * _at(fields["proliferation"], xy))
    tumour = (nuclei["cell_type"] == "Tumour epithelium").to_numpy()
    cell_type = nuclei["cell_type"].to_numpy(dtype=object)
    cell_type[tumour & proliferates] = "Proliferating tumour"

    normal = np.sqrt(2.0) * erfinv(2 * draws[:, 1:6].clip(1e-6, 1 - 1e-6) - 1)
    size = np.array([effects.NUCLEUS[name] for name in cell_type])
    donor_scale = np.exp(0.05 * stream(seed, "nuclear_size", donor).standard_normal())
    pleomorphism = np.where(np.isin(cell_type, ("Tumour epithelium", "Proliferating tumour")), 0.13, 0.07)
    slenderness = np.where(cell_type == "Fibroblast", 0.18, 0.08)
    scale = donor_scale * np.exp(pleomorphism * normal[:, 0])
    shrink = np.where(tumour, np.exp(-0.04 * _at(fields["hypoxia"], xy)), 1.0)
    major = size[:, 0] * scale * shrink * np.exp(slenderness * normal[:, 1])
    minor = np.minimum(size[:, 1] * scale * shrink * np.exp(slenderness * normal[:, 2]), major)

    fibre = _angle_at(fields["fibre_angle"], xy) + 0.25 * normal[:, 3]
    angle = np.where(np.isin(cell_type, ("Fibroblast", "Endothelium")), fibre, np.pi * draws[:, 6])
    # Cells that line a gland stand upright on its wall.
    upright = _angle_at(fields["fibre_angle"], xy) + np.pi / 2 + 0.3 * normal[:, 3]
    angle = np.where(cell_type == "Luminal epithelium", upright, angle)
    own = nuclei["angle"].to_numpy(dtype=float)
    angle = np.where(np.isnan(own), angle, own)
    return nuclei.assign(
        cell_type=cell_type,
        major_um=major,
        minor_um=minor,
        angle=angle,
        chromatin=(size[:, 2] + 0.10 * normal[:, 4]).clip(0, 1),
        darkness=(size[:, 3] + 0.07 * normal[:, 1] + 0.03 * _at(fields["hypoxia"], xy) * tumour).clip(0.05, 1),
    )


def _angle_at(angle: np.ndarray, xy_um: np.ndarray) -> np.ndarray:
    return np.arctan2(_at(np.sin(2 * angle), xy_um), _at(np.cos(2 * angle), xy_um)) / 2


def _draws_by_key(seed: int, donor: int, keys: np.ndarray) -> np.ndarray:
    """Seven uniforms per nucleus, ``[nucleus, 7]``, that depend on (seed, donor, key) alone (counter-based Philox)."""
    counters = np.unique(keys)
    table = {}
    for block in np.unique(counters // 1024):
        table[block] = stream(seed, "shape", donor, int(block)).random((1024, 7))
    return np.stack([table[key // 1024][key % 1024] for key in keys]) if len(keys) else np.empty((0, 7))


def _remove_crowded(nuclei: pd.DataFrame, fields: Mapping[str, np.ndarray]) -> np.ndarray:
    """True for nuclei that stay: none keeps its place within the minimum distance of one of higher priority."""
    xy = nuclei[["x_um", "y_um"]].to_numpy()
    radius = 0.5 * np.sqrt(nuclei["major_um"].to_numpy() * nuclei["minor_um"].to_numpy())
    epithelial = nuclei["cell_type"].isin(("Tumour epithelium", "Proliferating tumour", "Luminal epithelium"))
    loosened = np.exp(effects.COHESION_SPACING * np.clip(_at(fields["cohesion"], xy), -3.5, 3.5))
    reach = radius * np.where(epithelial, 1.12 * loosened, 1.0)
    order = np.argsort(nuclei["priority"].to_numpy(), kind="stable")
    neighbours = cKDTree(xy).query_pairs(2 * reach.max(), output_type="ndarray") if len(xy) else np.empty((0, 2), int)
    close = np.hypot(*(xy[neighbours[:, 0]] - xy[neighbours[:, 1]]).T) < reach[neighbours].sum(axis=1)
    rank = np.empty(len(xy), dtype=int)
    rank[order] = np.arange(len(xy))
    blockers: list[list[int]] = [[] for _ in range(len(xy))]
    for i, j in neighbours[close]:
        low, high = (i, j) if rank[i] > rank[j] else (j, i)
        blockers[low].append(high)
    kept = np.zeros(len(xy), dtype=bool)
    for i in order:
        kept[i] = not any(kept[j] for j in blockers[i])
    return kept
