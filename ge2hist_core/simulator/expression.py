"""Counts of the known-truth cells: tissue state -> mean of every gene -> negative-binomial draw.

For nucleus i of type t at position x and gene g, with base level b (``genes.csv``)::

    own(i, g)  = library_i * donor_g * b[g, t] * response_g(x)
    response   = exp(d_g(x))             driver: its own log level, the cause of its programme
               = exp(strength_g P_k(x))  reporter of programme k: an effect of the programme
               = 1                       inert
    mean(i, g) = (1 - a) own(i, g) + a <own(j, g)> over the nuclei j around i
    count      ~ NB(mean, variance = mean + dispersion_g mean^2)

``a`` is RNA that diffused from the neighbourhood. Each count is the NB quantile of one uniform number that depends on
(seed, donor, nucleus key, gene) alone. A section and its intervened twin share those numbers, so an unedited gene of a
nucleus in unchanged surroundings keeps its count, and editing one gene never re-draws another.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.ndimage import map_coordinates
from scipy.spatial import cKDTree
from scipy.special import ndtri

from ge2hist_core.config import CELL_TYPES
from ge2hist_core.rng import stream
from ge2hist_core.simulator.programmes import PROGRAMMES
from ge2hist_core.types import BadInput

__all__ = ["GeneTable", "SectionLike", "draw_counts", "expected_counts", "load_genes", "nb_quantile"]

GENES_CSV = Path(__file__).with_name("genes.csv")
TYPE_COLUMNS = (
    "tumour", "prolif", "luminal", "fibroblast", "endothelium", "cd4", "cd8", "b", "plasma", "macrophage",
)  # fmt: skip
"""Columns of ``genes.csv`` in the order of ``config.CELL_TYPES``."""

ROLES = ("driver", "reporter", "inert")

LIBRARY_SIGMA = 0.35
"""Standard deviation of the log library size between nuclei of one donor."""
DONOR_GENE_SIGMA = 0.15
"""Standard deviation of the log donor effect of each gene."""
DONOR_DETECTION_SIGMA = 0.2
"""Standard deviation of the log detection efficiency between donors."""
AREA_EXPONENT = 0.3
REFERENCE_AREA_UM2 = 40.0
"""A nucleus of this area has library factor 1; the library grows as (area / reference) ** AREA_EXPONENT."""
AMBIENT_FRACTION = 0.03
AMBIENT_NEIGHBOURS = 12


class SectionLike(Protocol):
    """What this module needs of a simulated section.

    ``nuclei`` has columns x_um, y_um, cell_type, major_um, minor_um (full axes) and key (int64). Fields are ``[y, x]``
    grids whose node (r, c) lies at ((c + 0.5) grid_um, (r + 0.5) grid_um). ``driver_levels[g]`` is the log level of
    driver g, 0 = typical, -inf everywhere = knocked out. ``gene_factors`` multiplies reporters and inert genes.
    """

    @property
    def nuclei(self) -> pd.DataFrame: ...
    @property
    def fields(self) -> Mapping[str, np.ndarray]: ...
    @property
    def driver_levels(self) -> Mapping[str, np.ndarray]: ...
    @property
    def gene_factors(self) -> Mapping[str, float]: ...
    @property
    def grid_um(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def donor(self) -> int: ...


@dataclass(frozen=True, eq=False)
class GeneTable:
    """The simulator's genes.

    Parameters
    ----------
    symbols: ``[gene]`` human gene symbols, unique.
    role: ``[gene]`` driver, reporter or inert.
    programme: ``[gene]`` programme of a driver or reporter, "" of an inert gene.
    strength: ``[gene]`` driver: signed weight on its programme; reporter: log fold per unit of it; inert: 0.
    base: ``[gene, type]`` expected UMI at library factor 1, types as in ``config.CELL_TYPES``.
    dispersion: ``[gene]`` alpha > 0 of the NB variance ``mean + alpha mean^2``.
    source: ``[gene]`` DOI where role or marker is biology, else "background".

    Raises
    ------
    ValueError: a column breaks these rules; the message names the gene.
    """

    symbols: np.ndarray
    role: np.ndarray
    programme: np.ndarray
    strength: np.ndarray
    base: np.ndarray
    dispersion: np.ndarray
    source: np.ndarray

    def __post_init__(self) -> None:
        n = len(self.symbols)
        for name in ("symbols", "role", "programme", "source"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=object))
        for name in ("strength", "base", "dispersion"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        for name in ("role", "programme", "strength", "dispersion", "source"):
            if getattr(self, name).shape != (n,):
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, expected ({n},)")
        if self.base.shape != (n, len(CELL_TYPES)):
            raise ValueError(f"base has shape {self.base.shape}, expected ({n}, {len(CELL_TYPES)})")
        if len(set(self.symbols)) != n:
            names, times = np.unique(self.symbols.astype(str), return_counts=True)
            raise ValueError(f"gene {names[times > 1][0]} stands in more than one row")
        acting = self.role != "inert"
        self._require(np.isin(self.role, ROLES), f"role must be one of {', '.join(ROLES)}")
        self._require(np.isin(self.programme, PROGRAMMES) == acting, "drivers and reporters alone have a programme")
        self._require(np.isfinite(self.strength) & ((self.strength != 0) == acting), "inert means strength 0")
        self._require((np.isfinite(self.base) & (self.base >= 0)).all(axis=1), "base levels must be >= 0")
        self._require(np.isfinite(self.dispersion) & (self.dispersion > 0), "dispersion must be > 0")
        self._require(self.source != "", "source is empty")
        self._require(~acting | (self.source != "background"), "a driver or reporter needs a citation")
        for name in ("symbols", "role", "programme", "strength", "base", "dispersion", "source"):
            getattr(self, name).setflags(write=False)

    def _require(self, good: np.ndarray, rule: str) -> None:
        if not good.all():
            raise ValueError(f"gene {self.symbols[~good][0]}: {rule}")

    def __len__(self) -> int:
        return len(self.symbols)

    def rows(self, role: str, programme: str | None = None) -> np.ndarray:
        """Row numbers of the genes of one role, of one programme where it is given."""
        keep = self.role == role
        return np.flatnonzero(keep if programme is None else keep & (self.programme == programme))

    @property
    def drivers(self) -> list[str]:
        """Symbols of the drivers."""
        return list(self.symbols[self.rows("driver")])

    def programme_of(self, symbol: str) -> tuple[str, float]:
        """Programme and strength of a driver or reporter; ``("", 0.0)`` of an inert gene.

        Raises
        ------
        KeyError: the table has no such gene.
        """
        found = np.flatnonzero(self.symbols == symbol)
        if not found.size:
            raise KeyError(symbol)
        return str(self.programme[found[0]]), float(self.strength[found[0]])


@cache
def load_genes(path: Path = GENES_CSV) -> GeneTable:
    """Read and check the gene table; a path is read once per process.

    Raises
    ------
    ValueError: columns other than the documented ones, or a row that :class:`GeneTable` refuses.
    """
    expected = ["symbol", "role", "programme", "strength", *TYPE_COLUMNS, "dispersion", "source"]
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    if header != expected:
        raise ValueError(f"{path.name} has columns {header}, expected {expected}")
    symbol, role, programme, strength, *levels, dispersion, source = map(list, zip(*rows, strict=True))
    return GeneTable(
        symbols=np.array(symbol, dtype=object),
        role=np.array(role, dtype=object),
        programme=np.array(programme, dtype=object),
        strength=np.array([float(value or 0) for value in strength]),
        base=np.array(levels, dtype=np.float64).T,
        dispersion=np.array(dispersion, dtype=np.float64),
        source=np.array(source, dtype=object),
    )


def draw_counts(section: SectionLike, genes: GeneTable | None = None) -> sp.csr_matrix:
    """Raw counts of every nucleus, ``[cell, gene]`` CSR float32, rows as in ``section.nuclei``.

    Raises
    ------
    BadInput, ValueError: as :func:`expected_counts`.
    """
    genes = load_genes() if genes is None else genes
    mean = expected_counts(section, genes)
    u = _uniforms(section.nuclei["key"].to_numpy(), _salts(section, "counts", list(genes.symbols)))
    counts = nb_quantile(u, mean, np.broadcast_to(genes.dispersion, mean.shape))
    return sp.csr_matrix(counts.astype(np.float32))


def expected_counts(section: SectionLike, genes: GeneTable) -> np.ndarray:
    """Mean of every count, ``[cell, gene]`` float64, in UMI.

    Raises
    ------
    BadInput: ``gene_factors`` names an unknown gene or holds a negative or non-finite factor.
    ValueError: a driver without level, an unknown cell type, a level that is partly -inf.
    """
    nuclei = section.nuclei
    types = pd.Index(CELL_TYPES).get_indexer(nuclei["cell_type"])
    if (types < 0).any():
        raise ValueError(f"unknown cell type {nuclei['cell_type'].to_numpy()[types < 0][0]!r}")
    own = genes.base.T[types] * _library(section)[:, None]
    own *= _donor_effects(section, genes) * _factors(section, genes)

    programmes = {name: _at_nuclei(section, section.fields[name]) for name in PROGRAMMES}
    for g in genes.rows("reporter"):
        own[:, g] *= np.exp(genes.strength[g] * programmes[genes.programme[g]])
    for g in genes.rows("driver"):
        own[:, g] *= _driver_response(section, genes.symbols[g])
    return _with_ambient(own, nuclei[["x_um", "y_um"]].to_numpy())


def nb_quantile(u: np.ndarray, mean: np.ndarray, dispersion: np.ndarray) -> np.ndarray:
    """Smallest k with NB cumulative probability >= u, exact, elementwise; int64 in the shape of ``u``.

    NB with the given mean and variance ``mean + dispersion mean^2``. Sums the probabilities upwards by their ratio
    ``p(k+1) / p(k) = (k + r) / (k + 1) * q``, r = 1 / dispersion, q = mean / (mean + r), keeping only the entries not
    yet reached: for counts of a few this is many times faster than inverting the incomplete beta function. Meant for
    means below some thousands at dispersions above 0.05, where p(0) does not underflow.

    Parameters
    ----------
    u: in (0, 1).
    mean: >= 0, 0 gives 0.
    dispersion: > 0.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.stats import nbinom
    >>> nb_quantile(np.array([0.1, 0.5, 0.99]), np.full(3, 4.0), np.full(3, 0.25))
    array([ 1,  3, 13])
    >>> nbinom.ppf([0.1, 0.5, 0.99], 4, 0.5)
    array([ 1.,  3., 13.])
    """
    out = np.zeros(u.shape, dtype=np.int64)
    r = 1.0 / dispersion
    q = mean / (mean + r)
    p = np.exp(r * np.log1p(-q)).ravel()
    left = u.ravel() - p
    active = np.flatnonzero(left > 0)
    p, left, r, q = p[active], left[active], r.ravel()[active], q.ravel()[active]
    flat, mode = out.ravel(), mean.ravel()[active]
    k = 0
    while active.size:
        p = p * ((k + r) / (k + 1) * q)
        left = left - p
        k += 1
        flat[active] = k
        # Past the mean with no probability left to add, rounding alone keeps u above the sum.
        more = (left > 0) & ((p > 1e-18) | (k <= mode))
        active, p, left, r, q, mode = active[more], p[more], left[more], r[more], q[more], mode[more]
    return out


def _library(section: SectionLike) -> np.ndarray:
    """Library factor of every nucleus, ``[cell]``: log-normal, mildly larger in larger nuclei."""
    nuclei = section.nuclei
    z = ndtri(_uniforms(nuclei["key"].to_numpy(), _salts(section, "library", [""]))[:, 0])
    area = np.pi / 4 * nuclei["major_um"].to_numpy() * nuclei["minor_um"].to_numpy()
    return np.exp(LIBRARY_SIGMA * z) * (area / REFERENCE_AREA_UM2) ** AREA_EXPONENT


def _donor_effects(section: SectionLike, genes: GeneTable) -> np.ndarray:
    """Factor of every gene in this donor, ``[gene]``: its own effect times the donor's detection efficiency."""
    z = np.array([stream(section.seed, "donor gene", section.donor, g).standard_normal() for g in genes.symbols])
    detection = stream(section.seed, "donor detection", section.donor).standard_normal()
    return np.exp(DONOR_GENE_SIGMA * z + DONOR_DETECTION_SIGMA * detection)


def _factors(section: SectionLike, genes: GeneTable) -> np.ndarray:
    """Edits of reporters and inert genes, ``[gene]``. A driver's edit is in its level already."""
    factors = np.ones(len(genes))
    row = {symbol: g for g, symbol in enumerate(genes.symbols)}
    for symbol, factor in section.gene_factors.items():
        if symbol not in row:
            raise BadInput(f"The simulator has no gene {symbol!r}: choose one of the {len(genes)} in genes.csv.")
        if not (np.isfinite(factor) and factor >= 0):
            raise BadInput(f"The factor of {symbol} is {factor}: give a finite number >= 0.")
        if genes.role[row[symbol]] != "driver":
            factors[row[symbol]] = factor
    return factors


def _driver_response(section: SectionLike, symbol: str) -> np.ndarray:
    """``exp`` of the driver's log level at the nuclei, ``[cell]``; 0 where it is knocked out."""
    if symbol not in section.driver_levels:
        raise ValueError(f"the section has no level of driver {symbol}")
    level = section.driver_levels[symbol]
    if np.isneginf(level).all():
        return np.zeros(len(section.nuclei))
    if not np.isfinite(level).all():
        raise ValueError(f"the level of driver {symbol} must be finite, or -inf everywhere for a knock-out")
    return np.exp(_at_nuclei(section, level))


def _at_nuclei(section: SectionLike, field: np.ndarray) -> np.ndarray:
    """Bilinear value of a ``[y, x]`` grid at the nuclei, ``[cell]``; beyond the outer nodes the border value."""
    at = section.nuclei[["y_um", "x_um"]].to_numpy().T / section.grid_um - 0.5
    return map_coordinates(np.asarray(field, dtype=np.float64), at, order=1, mode="nearest")


def _with_ambient(own: np.ndarray, xy_um: np.ndarray) -> np.ndarray:
    """Mix in the mean of the nearest nuclei: RNA that left its cell. A lone nucleus keeps its own."""
    n = len(own)
    k = min(AMBIENT_NEIGHBOURS, n - 1)
    if k < 1:
        return own
    neighbours = cKDTree(xy_um).query(xy_um, k=k + 1)[1][:, 1:]
    mix = sp.csr_matrix((np.full(n * k, 1.0 / k), (np.repeat(np.arange(n), k), neighbours.ravel())), shape=(n, n))
    return (1 - AMBIENT_FRACTION) * own + AMBIENT_FRACTION * (mix @ own)


def _salts(section: SectionLike, name: str, parts: list[str]) -> np.ndarray:
    """One 64-bit number per part from (seed, donor, name), ``[part]`` uint64."""
    draws = [stream(section.seed, name, section.donor, part).integers(2**64, dtype=np.uint64) for part in parts]
    return np.array(draws, dtype=np.uint64)


def _uniforms(keys: np.ndarray, salts: np.ndarray) -> np.ndarray:
    """Uniform numbers in (0, 1), ``[key, salt]``, each a hash of its own (key, salt) pair."""
    mixed = _splitmix64(keys.astype(np.int64).view(np.uint64))[:, None] ^ salts[None, :]
    return ((_splitmix64(mixed) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """Steele, Lea and Flood's SplitMix64 output for state ``x`` (doi:10.1145/2714064.2660195), uint64, wrapping."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
