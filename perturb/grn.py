r"""Propagation of gene edits through a signed regulatory network: numpy and scipy alone, no model and no picture.

Expression of cell c and gene g is :math:`x_{cg} = \log(1 + s\,n_{cg} / N_c)` with count n, the network's scale s
(counts per cell after normalisation) and the cell's own library size N, taken before the edit and kept, so that an
edit alone moves no other gene. An edit changes x by :math:`\Delta_0`, 0 for the genes that it does not name. With the
weights W ``[source, target]`` (change of the target's x per change of the source's x), each step is

.. math:: \Delta_{k+1} = \max(\Delta_k, -x)\,W \quad\text{and}\quad \Delta_{k+1} = \Delta_0 \text{ for edited genes.}

This is the signal propagation of CellOracle (Kamimoto et al. 2023, doi:10.1038/s41586-022-05688-9). A step replaces the
change of an unedited gene and does not add to it: because the edited genes are held, :math:`\Delta_k` is then the sum
over all walks of 1 to k edges that start at an edited gene and meet no other, each walk counted once. The maximum says
that a gene cannot fall below 0, so one that a cell does not express passes no fall on. Where it does not bind, the
recursion is linear: with U the unedited genes, :math:`\Delta_n = \Delta_0 W_{\cdot U} (I + W_{UU} + \dots +
W_{UU}^{n-1})` on U.

The model is a linear one fitted to variation between cells. It says in which direction a change would go if the edges
were causal and no more; :func:`randomised` makes the control that a result has to be compared with.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import itertools
import json
import math
import numbers
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from ge2hist_core.files import parse_json, separator_line, sha256_file
from ge2hist_core.types import BadInput, Cells, check_sha256, check_text

# rng and stats draw on torch and scipy.stats; they are imported where they are used, so that a recipe opens fast.

__all__ = [
    "DEFAULT_STEPS",
    "MAX_STEPS",
    "QUANTILES",
    "SCALE",
    "Network",
    "Propagated",
    "Propagation",
    "bagged_ridge",
    "fit_network",
    "log_expression",
    "observed_range",
    "pack_network",
    "propagate",
    "randomised",
    "read_network",
    "spread",
    "unpack_network",
]

SCALE = 1e4
"""Counts per cell after normalisation for networks that were not fitted here: the common "log CP10k"."""

DEFAULT_STEPS = 3
"""CellOracle's default."""
MAX_STEPS = 10

QUANTILES = (0.0, 0.99)
"""Lower and upper end of the observed range. The maximum would be a single cell's."""

MAX_WEIGHT = 1e6
"""Far beyond any ratio of log changes; keeps ten steps from overflowing."""

MAX_BYTES = 2**28
PARQUET_SHARE = 16
"""A parquet file may have this part of the limit: its columns of bits become columns of 64-bit numbers."""

MIN_CELLS = 30
MIN_TOGETHER = 20
"""Cells that express both genes of an edge, as expected by chance. Of rarer genes often no cell has both, in no bag
either: a weak repression that seems to be without error. Counts without any network gave dozens of such edges."""
WEIGHT_DIGITS = 6
"""Decimals of a fitted weight. The last bits of a sum depend on the number of threads; a network's hash must not."""

TRADES = 20
"""Random trades per regulator in :func:`randomised`. In a network as large as CollecTRI (43,000 edges) they leave 7 %
of the edges as they were, 50 trades leave 4 %; in one of 2,000 edges they leave what equal degrees give by chance."""

ROLES = {"source": ("source", "tf", "regulator"), "target": ("target",), "weight": ("weight", "mor")}
"""Columns of a long table. ``mor`` (mode of regulation) is DoRothEA's own name for the signed weight."""

_TAMED = re.compile(r"^'(?=[=+\-@\uff1d\uff0b\uff0d\uff20])")
"""What :func:`perturb.page.csv_bytes` puts before a name that a spreadsheet would take for a formula."""
_NO_NAME = re.compile(rf"[\x00-\x1f\x7f\ud800-\udfff]|{_TAMED.pattern}")
"""What no gene's name has. An apostrophe before a formula would not come back from a table."""
_TEXT_COLUMNS = {*ROLES["source"], *ROLES["target"], "confidence", "peak_id", "gene_short_name", ""}
_ROW_CHUNK = 4096
_BLOCK_VALUES = 2_000_000
_TARGET_BLOCK = 2048


@dataclass(frozen=True, eq=False)
class Network:
    """Who regulates whom, how strongly and with which sign; edges sorted by regulator, then target.

    Parameters
    ----------
    regulators, targets: ``[edge]`` gene symbols.
    weights: ``[edge]`` change of the target's log expression per change of the regulator's, not 0. Prior networks
        give +1 or -1 (over the confidence rank in DoRothEA): a direction, not a measured strength.
    name: for the user.
    source: where it comes from, for provenance.
    scale: counts per cell after normalisation, > 0. Weights belong to it: the log is one of 1 + x.
    signed: False for edges of unknown sign, which are candidates for :func:`fit_network` only.
    n_self_loops: edges of a gene onto itself that were dropped; a held gene has no use for them.

    Raises
    ------
    ValueError: arrays of different length.
    BadInput: an edge without gene, or with one whose name has a control character, half of a surrogate pair or an
        apostrophe before =, +, - or @; a weight that is 0, not finite or above 1e6; an edge given twice; a scale that
        is not a positive number; a name or source that is no text.
    """

    regulators: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    name: str = "network"
    source: str = ""
    scale: float = SCALE
    signed: bool = True
    n_self_loops: int = 0

    def __post_init__(self) -> None:
        ends = [np.asarray(value).astype(str) for value in (self.regulators, self.targets)]
        weights = np.asarray(self.weights, dtype=np.float64)
        if not ends[0].shape == ends[1].shape == weights.shape == (len(weights),):
            raise ValueError(f"edges have shapes {ends[0].shape}, {ends[1].shape}, {weights.shape}")
        _check_number("scale", self.scale, 1e-6, 1e9)
        check_text("The name of a network", self.name)
        check_text("The source of a network", self.source)
        if not isinstance(self.signed, bool):
            raise BadInput(f"signed is {self.signed!r:.40}: give true or false.")
        loops = ends[0] == ends[1]
        order = np.lexsort((ends[1], ends[0]))
        order = order[~loops[order]]
        regulators, targets, weights = ends[0][order], ends[1][order], weights[order]
        _check_edges(regulators, targets, weights)
        for name, array in (
            ("regulators", regulators.astype(object)),
            ("targets", targets.astype(object)),
            ("weights", weights),
        ):
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        object.__setattr__(self, "scale", float(self.scale))
        object.__setattr__(self, "n_self_loops", self.n_self_loops + int(loops.sum()))

    def __len__(self) -> int:
        return len(self.weights)

    @cached_property
    def sha256(self) -> str:
        """Of edges, scale and whether edges are signed, 64 hexadecimal digits; name and order do not count."""
        edges = list(zip(self.regulators, self.targets, map(float, self.weights), strict=True))
        return hashlib.sha256(json.dumps([self.signed, self.scale, edges], ensure_ascii=False).encode()).hexdigest()

    def table(self) -> pd.DataFrame:
        """Columns ``source, target, weight, scale``, which :func:`read_network` reads back to the same network."""
        return pd.DataFrame(
            {"source": self.regulators, "target": self.targets, "weight": self.weights, "scale": self.scale}
        )

    def matrix(self, genes: Sequence[str] | np.ndarray) -> sp.csr_matrix:
        """Weights between the given genes, ``[source gene, target gene]`` CSR float64; other edges are left out.

        A gene that stands in several columns drives with the mean of their changes, and each of them is a target.

        Raises
        ------
        BadInput: a network without signs.
        """
        if not self.signed:
            raise BadInput(f"The network {self.name!r} has edges without sign: fit it to cells first.")
        names, column = np.unique(np.asarray(genes).astype(str), return_inverse=True)
        source, target, here = _locate(self, names)
        by_name = sp.csr_matrix((self.weights[here], (source, target)), shape=(len(names), len(names)))
        member = _member(column, len(names))
        mean = member @ sp.diags_array(1.0 / np.bincount(column, minlength=len(names)), format="csr")
        out = sp.csr_matrix(mean @ by_name @ member.T)
        out.sort_indices()
        return out


def pack_network(network: Network) -> dict[str, Any]:
    """A network as JSON holds it."""
    return {
        "edges": list(map(list, zip(network.regulators, network.targets, map(float, network.weights), strict=True))),
        **{name: getattr(network, name) for name in ("name", "source", "scale", "signed")},
    }


def unpack_network(packed: dict[str, Any]) -> Network:
    """Inverse of :func:`pack_network`.

    Raises
    ------
    BadInput: not a packed network.
    """
    try:
        first, second = (np.array([edge[i] for edge in packed["edges"]], dtype=object) for i in (0, 1))
        weights = np.array([edge[2] for edge in packed["edges"]], dtype=np.float64)
        return Network(first, second, weights, packed["name"], packed["source"], packed["scale"], packed["signed"])
    except BadInput:
        raise
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise BadInput(f"The stored network is damaged ({error}): open its table again.") from None


def _check_edges(regulators: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> None:
    blank = np.flatnonzero((np.char.strip(regulators) == "") | (np.char.strip(targets) == ""))
    if len(blank):
        i = blank[0]
        raise BadInput(f"The edge '{regulators[i]}' -> '{targets[i]}' lacks a gene: name both or leave it out.")
    odd = next(
        (i for i, ends in enumerate(zip(regulators, targets, strict=True)) if any(map(_NO_NAME.search, ends))), None
    )
    if odd is not None:
        raise BadInput(
            f"The edge {ascii(str(regulators[odd]))} -> {ascii(str(targets[odd]))} has a gene that is no name: "
            "leave out control characters, halves of surrogate pairs and an apostrophe before =, +, - or @."
        )
    bad = np.flatnonzero(~((np.abs(weights) <= MAX_WEIGHT) & (weights != 0)))
    if len(bad):
        i = bad[0]
        raise BadInput(
            f"The edge {regulators[i]} -> {targets[i]} has weight {weights[i]:g}: "
            f"give a number from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g} other than 0, or leave the edge out."
        )
    twice = np.flatnonzero((regulators[1:] == regulators[:-1]) & (targets[1:] == targets[:-1]))
    if len(twice):
        i = twice[0]
        raise BadInput(f"The edge {regulators[i]} -> {targets[i]} is given more than once: keep one of them.")


def _locate(network: Network, names: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places of both ends in ``names`` for the edges that have both, and which edges these are."""
    index = pd.Index(names)
    source, target = index.get_indexer(network.regulators), index.get_indexer(network.targets)
    here = np.flatnonzero((source >= 0) & (target >= 0))
    return source[here], target[here], here


def _member(column: np.ndarray, n: int) -> sp.csr_matrix:
    """0/1 matrix ``[item, group]`` float64 from each item's group."""
    return sp.csr_matrix((np.ones(len(column)), (np.arange(len(column)), column)), shape=(len(column), n))


@dataclass(frozen=True)
class Propagation:
    """How edits were propagated, fit for a recipe's JSON.

    Parameters
    ----------
    network_sha256: :attr:`Network.sha256`.
    network_name: for the user.
    steps: 0 to 10; 0 is the direct edit alone.
    quantiles: of the reference cells, lower and upper end of the observed range.
    control: spread through :func:`randomised` networks instead, another one for each noise seed.

    Raises
    ------
    BadInput: a field of the wrong form.
    """

    network_sha256: str
    network_name: str
    steps: int = DEFAULT_STEPS
    quantiles: tuple[float, float] = QUANTILES
    control: bool = False

    def __post_init__(self) -> None:
        check_sha256("network_sha256", self.network_sha256)
        if not isinstance(self.network_name, str) or not self.network_name.strip():
            raise BadInput(f"network_name is {self.network_name!r}: give the network a name.")
        check_text("network_name", self.network_name)
        _check_steps(self.steps)
        if not isinstance(self.control, bool):
            raise BadInput(f"control is {self.control!r}: give true or false.")
        # 0 and 0.0 are the same quantile and must hash alike.
        object.__setattr__(self, "quantiles", _checked_quantiles(self.quantiles))


def _check_steps(steps: int) -> None:
    if type(steps) is not int or not 0 <= steps <= MAX_STEPS:
        raise BadInput(f"steps is {steps!r}: choose a whole number from 0 to {MAX_STEPS}.")


def _checked_quantiles(quantiles: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = (float(value) for value in quantiles)
    except (TypeError, ValueError, OverflowError):
        low, high = math.nan, math.nan
    if not 0 <= low <= high <= 1:
        raise BadInput(f"quantiles is {quantiles!r}: give a lower and an upper one from 0 to 1.")
    return low, high


def log_expression(counts: np.ndarray, total: np.ndarray, scale: float) -> np.ndarray:
    """``log(1 + scale n / N)``, ``[cell, gene]`` float64, from counts n and library sizes N ``[cell]``; 0 if N is 0."""
    per_count = scale / np.where(total > 0, total, np.inf)
    return np.log1p(np.asarray(counts, dtype=np.float64) * per_count[:, None])


def _shares(counts: sp.csr_matrix) -> sp.csr_matrix:
    """Counts over their cell's total, ``[cell, gene]`` CSR float64."""
    counts = sp.csr_matrix(counts, dtype=np.float64, copy=True)
    total = counts.sum(axis=1).A1
    counts.data = counts.data / np.repeat(total, np.diff(counts.indptr))
    return counts


def observed_range(cells: Cells, quantiles: tuple[float, float] = QUANTILES) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper quantile of every gene's share of its cell's counts, each ``[gene]`` float64 in [0, 1].

    Cells without any count are left out. A gene that fewer than 1 in 100 cells express has 0 as its 99th percentile:
    :func:`propagate` then never raises it, because these cells do not show how far it can go.

    Raises
    ------
    BadInput: quantiles out of order or range, or no cell with counts.
    """
    quantiles = _checked_quantiles(quantiles)
    shares = _shares(cells.counts[cells.counts.getnnz(axis=1) > 0]).tocsc()
    n, g = shares.shape
    if not n:
        raise BadInput(f"None of the {len(cells)} reference cells has a count: choose cells with expression.")
    block = max(1, _BLOCK_VALUES // n)
    ends = [
        np.quantile(shares[:, start : start + block].toarray(), quantiles, axis=0) for start in range(0, g, block)
    ] or [np.zeros((2, 0))]
    low, high = np.concatenate(ends, axis=1)
    return low, high


@dataclass(frozen=True, eq=False)
class Propagated:
    """Result of :func:`propagate`.

    Parameters
    ----------
    counts: ``[cell, gene]`` raw counts, CSR if the input was sparse.
    clipped: ``[gene]`` number of cells in which the network asked for a value outside of the range.
    """

    counts: np.ndarray | sp.csr_matrix
    clipped: np.ndarray


def propagate(
    network: Network,
    genes: Sequence[str] | np.ndarray,
    before: np.ndarray | sp.spmatrix,
    after: np.ndarray | sp.spmatrix,
    low: np.ndarray,
    high: np.ndarray,
    *,
    steps: int = DEFAULT_STEPS,
    edited: Collection[str] | None = None,
) -> Propagated:
    """What an edit would change in the other genes, see the module's text for the recursion.

    The new value of an unedited gene is cut to the observed range, widened to the cell's own value where that lies
    outside: a cell above the 99th percentile may fall but not rise further, and is not pulled in. Then it goes back to
    counts at the cell's library size before the edit. Genes that nothing reaches keep their count bit for bit, as do
    all genes for 0 steps, for an empty edit, and in a cell without any count, which has no library size. Every cell is
    computed on its own.

    Parameters
    ----------
    genes: ``[gene]`` symbols of the columns.
    before, after: ``[cell, gene]`` raw counts >= 0 without and with the direct edit, dense or sparse.
    low, high: ``[gene]`` range of the share of a cell's counts, from :func:`observed_range`.
    steps: 0 to 10.
    edited: genes to hold at their edited value (``Perturbation.genes``), also in cells where the edit changes nothing,
        such as a knock-out of a gene that the cell does not express. None: in each cell those whose count changed.

    Returns
    -------
    Propagated: counts in the floating type of ``after``, float64 for whole numbers.

    Raises
    ------
    ValueError: shapes that do not fit, counts that are negative or not finite, a range out of order.
    BadInput: steps out of range, a network without signs, an edited gene that is not among ``genes``.
    """
    _check_steps(steps)
    weights = network.matrix(genes)
    first, second, low, high = _checked_arrays(genes, before, after, low, high)
    held = _held(genes, edited)
    block = max(1, _BLOCK_VALUES // max(1, len(held)))
    parts: list[Any] = []
    clipped = np.zeros(len(held), dtype=np.int64)
    if steps and _differ(first, second):
        for start in range(0, first.shape[0], block):
            rows = slice(start, start + block)
            counts, cut = _propagate_block(
                _dense(first[rows]), _dense(second[rows]), held, weights, network.scale, low, high, steps
            )
            parts.append(sp.csr_matrix(counts) if sp.issparse(second) else counts)
            clipped += cut.sum(axis=0)
    if not parts:
        return Propagated(second, clipped)
    whole = sp.vstack(parts, format="csr") if sp.issparse(second) else np.concatenate(parts)
    return Propagated(whole, clipped)


def spread(
    delta_0: np.ndarray, fixed: np.ndarray, x: np.ndarray, weights: np.ndarray | sp.csr_matrix, steps: int
) -> np.ndarray:
    """The recursion alone: ``[cell, gene]`` change of log expression after ``steps`` steps, not yet cut to a range.

    Parameters
    ----------
    delta_0: ``[cell, gene]`` change by the edit, 0 where not ``fixed``.
    fixed: ``[cell, gene]`` bool, the edited genes.
    x: ``[cell, gene]`` log expression before the edit, >= 0.
    weights: ``[source, target]``.
    """
    delta = delta_0
    for _ in range(steps):
        delta = np.where(fixed, delta_0, np.maximum(delta, -x) @ weights)
    return delta


def _propagate_block(
    before: np.ndarray,
    after: np.ndarray,
    held: np.ndarray,
    weights: sp.csr_matrix,
    scale: float,
    low: np.ndarray,
    high: np.ndarray,
    steps: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Counts ``[cell, gene]`` and where they were cut, bool ``[cell, gene]``."""
    total = before.sum(axis=1, dtype=np.float64)
    x = log_expression(before, total, scale)
    changed = before != after
    delta_0 = np.where(changed, log_expression(after, total, scale) - x, 0.0)
    fixed = changed | held
    wanted = x + spread(delta_0, fixed, x, weights, steps)
    y = np.clip(wanted, np.minimum(np.log1p(scale * low), x), np.maximum(np.log1p(scale * high), x))
    counts = np.expm1(y) * (total / scale)[:, None]
    return np.where(fixed | (y == x), after, counts.astype(after.dtype)), (y != wanted) & ~fixed


def _checked_arrays(
    genes: Sequence[str] | np.ndarray, before: Any, after: Any, low: np.ndarray, high: np.ndarray
) -> tuple[Any, Any, np.ndarray, np.ndarray]:
    second = _floating(after)
    first = (sp.csr_matrix(before) if sp.issparse(second) else _dense(before)).astype(second.dtype)
    low, high = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
    g = len(genes)
    if first.shape != second.shape or first.ndim != 2 or not first.shape[1] == len(low) == len(high) == g:
        raise ValueError(
            f"counts have shapes {first.shape} and {second.shape}, range {low.shape} and {high.shape}, for {g} genes"
        )
    for name, value in (("before", first), ("after", second)):
        data = np.asarray(value.data if sp.issparse(value) else value)
        if not (np.isfinite(data).all() and (data >= 0).all()):
            raise ValueError(f"{name} holds negative or non-finite counts")
    if not ((low >= 0) & (low <= high) & (high <= 1)).all():
        raise ValueError("the observed range must be shares from 0 to 1, low <= high")
    return first, second, low, high


def _floating(counts: Any) -> Any:
    counts = sp.csr_matrix(counts) if sp.issparse(counts) else np.asarray(counts)
    return counts if counts.dtype.kind == "f" else counts.astype(np.float64)


def _dense(counts: Any) -> np.ndarray:
    return counts.toarray() if sp.issparse(counts) else np.asarray(counts)


def _differ(first: Any, second: Any) -> bool:
    different = first != second
    return bool(different.nnz if sp.issparse(different) else np.any(different))


def _held(genes: Sequence[str] | np.ndarray, edited: Collection[str] | None) -> np.ndarray:
    """``[gene]`` bool, genes held in every cell."""
    names = np.asarray(genes).astype(str)
    for gene in edited or ():
        if gene not in names:
            raise BadInput(f"The edited gene {gene!r} is not among the {len(names)} genes: choose a gene of the data.")
    return np.isin(names, list(edited or ()))


def fit_network(
    cells: Cells,
    candidates: Network | Sequence[str],
    *,
    cell_type: str | None = None,
    within: Sequence[str] | None = None,
    alpha: float = 10.0,
    bags: int = 100,
    max_q: float = 0.01,
    max_edges: int = 2000,
    seed: int = 0,
    name: str = "fitted network",
    tick: Callable[[float], None] | None = None,
) -> Network:
    r"""Signed weights from variation between cells: bagged ridge regression per target, in the manner of CellOracle.

    The scale is the cells' median library size, as in CellOracle. The log expression of each target is regressed on
    that of its candidate regulators, both after subtraction of the mean of each stratum (``within``): what merely
    differs between cell types or donors makes no edge. See :func:`bagged_ridge` for formula and p. Tested are pairs
    that at least 20 cells would express together by chance within strata. Edges with Benjamini-Hochberg q up to
    ``max_q`` over all tested pairs are kept, of these the ``max_edges`` of largest \|weight\|. The result depends on no
    order of cells or genes.

    What differs from CellOracle (doi:10.1038/s41586-022-05688-9), and why:

    - It tests the mean over bags against 0 as if bags were independent experiments, ``t = mean / (sd / sqrt(B))``: that
      grows with B where there is no effect. Here sd over bags is what it estimates, the coefficient's standard error.
    - It shows each bag 80 % of the regulators, which charges a regulator with the effect of one left out; here all.
    - It fits anew to the edges kept. Here the bags' mean stays: it is the effect with the other candidates held.
    - It fits to expression smoothed over similar cells, which makes cells dependent and p too small. Here to counts as
      they are; the price is that noise in a regulator's counts shrinks its weights towards 0.

    p takes cells as independent; neighbours in tissue are not, so q is a filter here and no proof of an edge.

    Parameters
    ----------
    candidates: allowed edges, signed or not (a base GRN), or regulators, each then a candidate for every other gene.
        Names that the cells lack are left out.
    cell_type: fit to the cells of this type alone.
    within: strata, of ``cell_type`` and ``donor``; None: those that the cells have. Empty: no strata.
    alpha: ridge penalty > 0, in squared log expression summed over cells.
    bags: bootstrap samples, 10 to 1000. More give smaller attainable p.
    max_q: in (0, 1]. max_edges: at least 1.
    seed: of the bootstrap.
    tick: called after each bag with the share of the fit that is done; may raise to stop.

    Returns
    -------
    Network: possibly without any edge; weights rounded to six decimals.

    Raises
    ------
    BadInput: too few cells, no candidate among the genes, an unknown cell type or stratum, a number out of range.
    """
    _check_number("alpha", alpha, 1e-9, 1e9)
    _check_number("bags", bags, 10, 1000)
    _check_number("max_q", max_q, 1e-12, 1)
    _check_number("max_edges", max_edges, 1, 1e8)
    cells = _usable(cells, cell_type)
    names, shares = _gene_shares(cells)
    scale = round(float(np.median(cells.counts.sum(axis=1, dtype=np.float64).A1)), WEIGHT_DIGITS)
    logs = (shares * scale).log1p().tocsc()
    rows, allowed = _allowed(candidates, names)
    strata = _strata(cells, within)
    targets = np.flatnonzero(allowed.any(axis=0))
    x = _centred(logs[:, rows].toarray(), strata)
    weights, p = np.zeros(allowed.shape), np.full(allowed.shape, np.nan)
    blocks = np.array_split(targets, math.ceil(len(targets) / _TARGET_BLOCK))
    for i, block in enumerate(blocks):

        def part(share: float, before: int = i) -> None:
            if tick is not None:
                tick((before + share) / len(blocks))

        y = _centred(logs[:, block].toarray(), strata)
        weights[:, block], p[:, block] = bagged_ridge(
            x, y, allowed[:, block], alpha=alpha, bags=int(bags), seed=seed, tick=part
        )
    p[_expected_together(logs, rows, strata) < MIN_TOGETHER] = np.nan
    weights = np.round(weights, WEIGHT_DIGITS)
    source, target = _kept_edges(weights, p, max_q, int(max_edges))
    where = f"{len(cells)} cells" + (f" of type {cell_type}" if cell_type else "")
    origin = f"bagged ridge on {where}" + (f" from {cells.source}" if cells.source else "")
    return Network(names[rows[source]], names[target], weights[source, target], name, origin, scale)


def _expected_together(logs: sp.csc_matrix, rows: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """Cells that would express both if genes were independent within strata, ``[regulator, gene]``."""
    member = _member(strata, int(strata.max()) + 1)
    expressing = (member.T @ (logs > 0)).toarray()
    return (expressing[:, rows] / np.bincount(strata)[:, None]).T @ expressing


def _kept_edges(weights: np.ndarray, p: np.ndarray, max_q: float, max_edges: int) -> tuple[np.ndarray, np.ndarray]:
    """Regulators and targets of the strongest significant edges."""
    from perturb.stats import bh_fdr

    q = bh_fdr(p.ravel()).reshape(p.shape)
    source, target = np.nonzero((q <= max_q) & (weights != 0))
    strongest = np.argsort(-np.abs(weights[source, target]), kind="stable")[:max_edges]
    return source[strongest], target[strongest]


def bagged_ridge(
    x: np.ndarray,
    y: np.ndarray,
    allowed: np.ndarray,
    *,
    alpha: float,
    bags: int,
    seed: int,
    tick: Callable[[float], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    r"""Ridge coefficients averaged over bootstrap samples of the cells, and their p.

    In bag b, cell c counts :math:`m_{bc}` times (n draws with replacement), and for each target with its allowed
    regulators

    .. math:: \hat\beta_b = \arg\min_\beta \sum_c m_{bc} (\tilde y_c - \tilde x_c \beta)^2 + \alpha \|\beta\|^2

    with columns centred by their mean in the bag. The weight is the mean m over B bags; their standard deviation s
    estimates the standard error, and m itself carries the error of B draws, so

    .. math:: t = \frac{m}{s \sqrt{1 + 1/B}}, \qquad p = P(|T_{B-1}| \ge |t|).

    Bag b is the same for every target and every set of targets.

    Parameters
    ----------
    x: ``[cell, regulator]``. y: ``[cell, target]``, log expression.
    allowed: ``[regulator, target]`` bool.
    alpha: > 0. bags: at least 2.
    tick: called after each bag with the share of bags that are done; may raise to stop.

    Returns
    -------
    weights, p: ``[regulator, target]``; weight 0 and p NaN where not allowed; p NaN where the weight does not vary,
        as for a gene of constant expression.
    """
    from scipy.stats import t as student_t

    from ge2hist_core import rng

    n = len(x)
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    groups = _groups(allowed)
    mean, squares = np.zeros(allowed.shape), np.zeros(allowed.shape)
    for b in range(bags):
        times = np.bincount(rng.stream(seed, "bag", b).integers(0, n, size=n), minlength=n)
        beta = _ridge(x, y, times.astype(np.float64), groups, alpha)
        step = beta - mean
        mean += step / (b + 1)
        squares += step * (beta - mean)
        if tick is not None:
            tick((b + 1) / bags)
    s = np.sqrt(squares / (bags - 1))
    # What is constant differs from bag to bag by rounding alone.
    varies = allowed & (s > 1e-9)
    t = np.divide(mean, s * math.sqrt(1 + 1 / bags), out=np.full(mean.shape, np.nan), where=varies)
    return mean, 2 * student_t.sf(np.abs(t), bags - 1)


def _ridge(
    x: np.ndarray, y: np.ndarray, times: np.ndarray, groups: list[tuple[np.ndarray, np.ndarray]], alpha: float
) -> np.ndarray:
    """Coefficients ``[regulator, target]`` where cell c counts ``times[c]`` times, 0 outside of the groups."""
    weighted = (x * times[:, None]).T
    n, mean_x = times.sum(), weighted.sum(axis=1) / times.sum()
    gram = weighted @ x - n * np.outer(mean_x, mean_x) + alpha * np.eye(x.shape[1])
    cross = weighted @ y - np.outer(mean_x, times @ y)
    beta = np.zeros(cross.shape)
    for rows, columns in groups:
        beta[np.ix_(rows, columns)] = np.linalg.solve(gram[np.ix_(rows, rows)], cross[np.ix_(rows, columns)])
    return beta


def _groups(allowed: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Targets that share their candidates, as (regulators, targets): one linear system serves them all."""
    patterns, member = np.unique(allowed, axis=1, return_inverse=True)
    member = member.ravel()
    groups = [(np.flatnonzero(patterns[:, i]), np.flatnonzero(member == i)) for i in range(patterns.shape[1])]
    return [(rows, columns) for rows, columns in groups if len(rows)]


def _check_number(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not low <= value <= high:
        raise BadInput(f"{name} is {value!r}: choose a number from {low:g} to {high:g}.")


def _usable(cells: Cells, cell_type: str | None) -> Cells:
    """Cells with counts and of the type, ordered by their id."""
    keep = cells.counts.getnnz(axis=1) > 0
    if cell_type is not None:
        known = sorted(set(cells.cell_type)) if cells.cell_type is not None else []
        if cell_type not in known:
            raise BadInput(f"cell_type is {cell_type!r}: choose one of {', '.join(known) or 'none, as none is given'}.")
        keep &= cells.cell_type == cell_type
    if keep.sum() < MIN_CELLS:
        raise BadInput(f"The fit has {keep.sum()} cells with counts: give at least {MIN_CELLS}.")
    order = np.argsort(cells.cell_id.astype(str), kind="stable")
    return cells.take(order[keep[order]])


def _gene_shares(cells: Cells) -> tuple[np.ndarray, sp.csr_matrix]:
    """Sorted gene names and shares ``[cell, name]``; the columns of one name are added up."""
    names, column = np.unique(cells.genes.astype(str), return_inverse=True)
    return names, _shares(cells.counts.astype(np.float64) @ _member(column, len(names)))


def _allowed(candidates: Network | Sequence[str], names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of the regulators in ``names``, and which may regulate which gene, bool ``[regulator, name]``."""
    if isinstance(candidates, Network):
        source, target, _ = _locate(candidates, names)
        rows, row = np.unique(source, return_inverse=True)
        allowed = np.zeros((len(rows), len(names)), dtype=bool)
        allowed[row, target] = True
        what = f"edges of {candidates.name!r}"
    else:
        wanted = [candidates] if isinstance(candidates, str) else list(candidates)
        rows = np.flatnonzero(np.isin(names, wanted))
        allowed = np.ones((len(rows), len(names)), dtype=bool)
        allowed[np.arange(len(rows)), rows] = False
        what = f"{len(wanted)} candidate regulators"
    if not allowed.any():
        raise BadInput(f"None of the {what} is among the {len(names)} genes of the cells: give genes of the data.")
    return rows, allowed


def _strata(cells: Cells, within: Sequence[str] | None) -> np.ndarray:
    """Stratum of every cell, int ``[cell]``."""
    columns = {"cell_type": cells.cell_type, "donor": cells.donor}
    chosen = [key for key, value in columns.items() if value is not None] if within is None else list(within)
    for key in chosen:
        if columns.get(key) is None:
            raise BadInput(f"within names {key!r}: choose of cell_type and donor what the cells have.")
    labels = ["\x1f".join(parts) for parts in zip(*(columns[key] for key in chosen), strict=True)]
    return np.unique(labels, return_inverse=True)[1] if chosen else np.zeros(len(cells), dtype=np.intp)


def _centred(values: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """Values ``[cell, gene]`` minus the mean of their stratum."""
    member = _member(strata, int(strata.max()) + 1)
    means = (member.T @ values) / np.bincount(strata)[:, None]
    return values - means[strata]


def randomised(network: Network, seed: int) -> Network:
    r"""Control with other wiring: what is left of a result under it does not come from who regulates whom.

    Kept: every regulator's number of targets and its \|weights\|, every target's number of regulators, the number of
    positive and of negative edges. Drawn: who regulates whom, which edge has which of its regulator's strengths, and
    which edges are negative. So an edit of the same gene sends out as many signals of the same strengths, and genes
    that many regulate stay so; permuting targets alone would spread signals evenly and be too easy a control.

    Two random regulators trade the targets that only one of them has, 20 trades per regulator (Curveball: Strona et al.
    2014, doi:10.1038/ncomms5114). Edges that both have stay, as all do with one regulator: where most edges are
    possible, a network has few others with its degrees.
    """
    from ge2hist_core import rng

    draws = rng.stream(seed, "randomised network")
    names, start = np.unique(network.regulators.astype(str), return_index=True)
    held = [set(part) for part in np.split(network.targets, start[1:])]
    for _ in range(TRADES * len(names) if len(names) > 1 else 0):
        a = int(draws.integers(len(names)))
        b = (a + 1 + int(draws.integers(len(names) - 1))) % len(names)
        _trade(held, names, a, b, draws)
    sizes = np.abs(network.weights)
    strengths = [draws.permutation(part) for part in np.split(sizes, start[1:])]
    signs = draws.permutation(np.sign(network.weights))
    return replace(
        network,
        targets=np.array([target for part in held for target in sorted(part)], dtype=object),
        weights=np.concatenate(strengths) * signs,
        name=f"{network.name}, randomised (seed {seed})",
        source=f"randomised from {network.sha256}",
    )


def _trade(held: list[set[str]], names: np.ndarray, a: int, b: int, draws: np.random.Generator) -> None:
    """Deal out anew what only one of two regulators has; what would become a self-loop is no part of it."""
    of_a, of_b = sorted(held[a] - held[b] - {names[b]}), sorted(held[b] - held[a] - {names[a]})
    pool = [(of_a + of_b)[i] for i in draws.permutation(len(of_a) + len(of_b))]
    held[a] = held[a].difference(of_a).union(pool[: len(of_a)])
    held[b] = held[b].difference(of_b).union(pool[len(of_a) :])


def read_network(
    path: str | Path,
    *,
    confidence: Collection[str] | None = None,
    name: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> Network:
    """A network from a table; content decides, not the file's name. Text may be gzipped.

    - Long table, comma, tab or semicolon between columns, or parquet: one edge per row in columns ``source`` (or
      ``tf``), ``target`` and ``weight`` (or ``mor``), as decoupler gives CollecTRI (doi:10.1093/nar/gkad841) and
      DoRothEA (doi:10.1101/gr.240663.118). Excel's line ``sep=;`` may stand first. The apostrophe that keeps a
      spreadsheet from taking a gene for a formula is taken off.
      A column ``scale`` (one number, counts per cell after normalisation) belongs to fitted weights.
    - ``network.json`` of a report (:func:`pack_network`).
    - CellOracle's base GRN, text or parquet: one row per peak, columns ``peak_id``, ``gene_short_name`` and one of 0
      and 1 per regulator. An edge is a regulator with a 1 in any peak of the gene. Such a network has no signs: it
      names candidates for :func:`fit_network`.

    Parameters
    ----------
    confidence: levels to keep, such as ``"ABC"``, of a table with that column; None for all.
    name: None: the file's name without its endings.
    max_bytes: of the file and of its unpacked text; a sixteenth of it for parquet.

    Raises
    ------
    BadInput: no such file, too large, damaged, not such a table, a row without gene or number, an edge given twice.
    """
    path = Path(path)
    content = _content(path, max_bytes)
    if content.lstrip()[:1] == b"{":
        return _packed(content, path.name)
    try:
        frames = _parquet_frames(content) if content[:4] == b"PAR1" else _text_frames(content)
        first = next(frames, None)
        if first is None:
            raise BadInput(f"{path.name} holds no table: give columns source, target and weight.")
        wide = "gene_short_name" in map(_plain, first.columns)
        frames = itertools.chain([first], frames)
        scale = SCALE
        if wide:
            edges = _wide_edges(frames, path.name)
        else:
            *ends, scale = _long_edges(frames, path.name, confidence)
            edges = (ends[0], ends[1], ends[2])
    except BadInput:
        raise
    except (ValueError, OSError, csv.Error) as error:  # pandas' and pyarrow's own are kinds of ValueError
        what = " ".join(str(error).split()).replace(". ", ", ").rstrip(".")
        raise BadInput(f"{path.name} is no readable table ({what}): write it again as CSV, TSV or parquet.") from None
    if wide and confidence is not None:
        raise BadInput(f"{path.name} is a base GRN without levels: leave confidence out.")
    origin = f"{path.name}, SHA-256 {sha256_file(path)}"
    return Network(*edges, name or path.name.split(".")[0] or path.name, origin, scale, signed=not wide)


def _packed(content: bytes, file: str) -> Network:
    return unpack_network(parse_json(content, f"{file} is no table and", "give source, target and weight"))


def _content(path: Path, max_bytes: int) -> bytes:
    """The file's bytes, unpacked if they are gzipped."""
    if not path.is_file():
        raise BadInput(f"{path} is not a file: give the path of a network table.")
    with path.open("rb") as file:
        magic = file.read(4)
    limit = max_bytes // PARQUET_SHARE if magic == b"PAR1" else max_bytes
    try:
        with gzip.open(path) if magic[:2] == b"\x1f\x8b" else path.open("rb") as stream:
            content = stream.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path.name} cannot be unpacked ({error}): write or download it again.") from None
    if len(content) > limit:
        raise BadInput(f"{path.name} has more than {limit / 2**20:g} MiB: give only the edges among your genes.")
    return content


def _parquet_frames(content: bytes) -> Iterator[pd.DataFrame]:
    table = pd.read_parquet(io.BytesIO(content))
    yield from (table[start : start + _ROW_CHUNK] for start in range(0, max(1, len(table)), _ROW_CHUNK))


def _text_frames(content: bytes) -> Iterator[pd.DataFrame]:
    lines = io.BytesIO(content)
    header = lines.readline().decode("utf-8-sig").rstrip("\r\n")
    stated = separator_line(header)
    if stated:
        header = lines.readline().decode("utf-8").rstrip("\r\n")
    separator = stated or max("\t,;", key=header.count)
    columns = next(csv.reader([header], delimiter=separator), [])
    if not columns:
        return
    # Names stay text (the gene NA is no missing value); numbers are left to the parser.
    text = {column: str for column in columns if _plain(column) in _TEXT_COLUMNS}
    with pd.read_csv(
        io.BytesIO(content),
        sep=separator,
        skiprows=1 if stated else 0,
        dtype=text,
        keep_default_na=False,
        encoding="utf-8-sig",
        float_precision="round_trip",
        chunksize=_ROW_CHUNK,
    ) as chunks:
        yield from chunks


def _plain(column: object) -> str:
    return str(column).strip().lower()


def _long_edges(
    frames: Iterable[pd.DataFrame], file: str, confidence: Collection[str] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    table = pd.concat(frames, ignore_index=True)
    table.columns = [_plain(column) for column in table.columns]
    picked = {}
    for role, columns in ROLES.items():
        found = [column for column in columns if column in table.columns]
        if not found:
            raise BadInput(
                f"{file} has columns {', '.join(table.columns[:8])} and none named {' or '.join(columns)}: "
                "give source, target and weight, or CellOracle's base GRN with gene_short_name."
            )
        picked[role] = table[found[0]]
    kept = _of_confidence(table, file, confidence)
    if not kept.any():
        raise BadInput(f"{file} holds no edge: give at least one row of source, target and weight.")
    ends = [
        picked[role].fillna("").astype(str).str.strip().str.replace(_TAMED, "", regex=True)[kept]
        for role in ("source", "target")
    ]
    for role, end in zip(("source", "target"), ends, strict=True):
        if (end == "").any():
            raise BadInput(f"Row {end.index[end == ''][0] + 1} of {file} has no {role}: name a gene or leave it out.")
    values = pd.to_numeric(picked["weight"][kept], errors="coerce")
    if values.isna().any():
        row = values.index[values.isna()][0]
        raise BadInput(f"Row {row + 1} of {file} has weight '{picked['weight'][row]}': give a number other than 0.")
    return ends[0].to_numpy(), ends[1].to_numpy(), values.to_numpy(dtype=np.float64), _scale(table, file)


def _scale(table: pd.DataFrame, file: str) -> float:
    """The one number of column ``scale``, or the common one."""
    if "scale" not in table.columns:
        return SCALE
    values = pd.to_numeric(table["scale"], errors="coerce").unique()
    if len(values) != 1 or not values[0] > 0:
        raise BadInput(f"Column 'scale' of {file} must hold one positive number in all rows: correct or leave it out.")
    return float(values[0])


def _of_confidence(table: pd.DataFrame, file: str, confidence: Collection[str] | None) -> pd.Series:
    """Which rows have one of the levels, bool; all rows without a choice."""
    if confidence is None:
        return pd.Series(True, index=table.index)
    if "confidence" not in table.columns:
        raise BadInput(f"{file} has no column 'confidence' to choose {', '.join(confidence)} by: leave it out.")
    kept = table["confidence"].isin(list(confidence))
    if not kept.any():
        known = ", ".join(sorted(set(table["confidence"].astype(str)))[:8])
        raise BadInput(f"No edge of {file} has confidence {' or '.join(confidence)}: choose of {known}.")
    return kept


def _wide_edges(frames: Iterable[pd.DataFrame], file: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    edges: set[tuple[str, str]] = set()
    for frame in frames:
        plain = [_plain(column) for column in frame.columns]
        # An index that was written along has no name, or one that pandas made up.
        regulators = [
            i for i, c in enumerate(plain) if c not in ("peak_id", "gene_short_name", "") and "unnamed:" not in c
        ]
        genes = frame.iloc[:, plain.index("gene_short_name")].fillna("").astype(str).str.strip().to_numpy()
        values = _bits(frame.iloc[:, regulators], file)
        names = np.array([str(frame.columns[i]).strip() for i in regulators], dtype=object)
        row, column = np.nonzero(values)
        edges.update(zip(names[column], genes[row], strict=True))
    if not edges:
        raise BadInput(f"{file} holds no edge: give a base GRN with a 1 in some column.")
    source, target = map(np.array, zip(*edges, strict=True))
    return source, target, np.ones(len(source))


def _bits(frame: pd.DataFrame, file: str) -> np.ndarray:
    """Values ``[row, column]`` of a base GRN, each 0 or 1."""
    if all(dtype.kind in "biuf" for dtype in frame.dtypes):
        values = frame.to_numpy(dtype=np.float64)
    else:
        values = frame.apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
    odd = np.argwhere((values != 0) & (values != 1))
    if len(odd):
        row, column = odd[0]
        raise BadInput(
            f"Column '{frame.columns[column]}' of {file} holds '{frame.iloc[row, column]}': a base GRN has 0 or 1."
        )
    return values
