"""The natural experiment: real cells with little against real cells with much of a gene, and their real niches.

Cells of one type are split by a gene's expression, pairs of low and high cells that agree in everything else that was
measured are formed, and the readouts of their niches are compared. What comes out is **observational and confounded**:
matching removes what the other genes show and leaves whatever they do not; and the niche may as well act on the gene as
the gene on the niche. It is a second opinion on sign and size, no test of cause.

Matching. Covariates are the leading principal components of the other genes' log expression and the log of the total.
A logistic regression gives each cell's propensity to be a high one (Rosenbaum and Rubin 1983,
doi:10.1093/biomet/70.1.41). Pairs are formed without replacement, first within donors and then across, so that the sum
of squared differences in log odds and standardised covariates is least, among pairs whose log odds differ by at most
0.2 standard deviations (Austin 2011, doi:10.1002/pst.433).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ge2hist_core import rng
from ge2hist_core.config import READER_CLASSES, TILE_PX, UM_PER_PX, VISIBLE_CLASS
from ge2hist_core.types import BadInput, Cells
from perturb.stats import clustered_ratio, sign_flip_p
from perturb.tables import LEVEL, UNITS

if TYPE_CHECKING:
    from ge2hist_core.store import TissueStore
    from perturb.result import Result

__all__ = ["LABEL", "Groups", "NaturalExperiment", "match_pairs", "natural_experiment", "niche_readouts", "split_cells"]

LABEL = "observational, confounded"
HALF_WIDTH_UM = TILE_PX * UM_PER_PX / 2
"""Half the side of the window around a cell: the model's tile."""
CALIPER = 0.2
"""Largest difference of two partners in log odds, in standard deviations of the log odds."""
COMPONENTS = 20
MIN_PAIRS = 20
MAX_PER_GROUP = 1200
"""Cells of a group that are matched at most, drawn at random where there are more; the time grows with the cube."""
BALANCED = 0.1
"""Absolute standardised mean difference up to which a covariate counts as balanced (Austin 2009)."""


@dataclass(frozen=True, eq=False)
class Groups:
    """Rows of the cells with little and with much of a gene; ``rule`` says in words how they were told apart."""

    low: np.ndarray
    high: np.ndarray
    rule: str


@dataclass(frozen=True, eq=False)
class NaturalExperiment:
    """What the real cells show.

    Parameters
    ----------
    gene, cell_type, rule: what was compared.
    table: one row per readout: ``readout, unit, low_mean, high_mean, difference`` (high - low over pairs), ``low,
        high`` (95 % interval over donors, over pairs where fewer than two donors are known), ``p`` (sign flips of the
        donors' means), ``before`` (difference without matching), ``n`` pairs, ``donors``.
    balance: one row per covariate: ``covariate, before, after``, standardised mean differences high - low.
    pairs: ``low, high`` (cell ids), ``same_donor``.
    label: to be shown with every number.
    warnings: one sentence each.
    """

    gene: str
    cell_type: str
    rule: str
    table: pd.DataFrame
    balance: pd.DataFrame
    pairs: pd.DataFrame
    label: str = LABEL
    warnings: tuple[str, ...] = ()

    def beside(self, result: Result) -> pd.DataFrame:
        """The natural difference beside the model's effect, both in the direction of the edit.

        Returns
        -------
        DataFrame, one row per common readout: ``readout, unit, natural, natural_low, natural_high, model, model_low,
        model_high, agree``: True or False where both intervals leave out 0, None where one of them does not.

        Raises
        ------
        BadInput: the result does not change this gene.
        """
        edits = result.edits[result.edits["gene"] == self.gene]
        direction = float(np.sign((edits["count_after"] - edits["count_before"]).sum()))
        if not direction:
            raise BadInput(f"The result does not change {self.gene}: choose one of its edited genes.")
        rows = []
        model = result.comparison.set_index("readout")
        for row in self.table.itertuples():
            if row.readout not in model.index:
                continue
            ends = sorted((direction * row.low, direction * row.high))
            other = model.loc[row.readout]
            decided = (ends[0] > 0 or ends[1] < 0) and (other["low"] > 0 or other["high"] < 0)
            natural = direction * row.difference
            agree = bool(np.sign(natural) == np.sign(other["effect"])) if decided else None
            rows.append((row.readout, row.unit, natural, *ends, other["effect"], other["low"], other["high"], agree))
        columns = ["readout", "unit", "natural", "natural_low", "natural_high", "model", "model_low", "model_high"]
        table = pd.DataFrame(rows, columns=[*columns, "agree"])
        return table.astype({"agree": object})


def natural_experiment(
    source: Cells | TissueStore,
    gene: str,
    cell_type: str,
    readouts: pd.DataFrame | None = None,
    *,
    seed: int = 0,
) -> NaturalExperiment:
    """Compare the niches of matched low and high cells.

    Parameters
    ----------
    source: cells with types; with positions where ``readouts`` is left out.
    readouts: numbers of each cell's niche, one column per readout, indexed by cell id; cells that it lacks are left
        out. By default :func:`niche_readouts` of ``source``.
    seed: of the choice among many cells and of the resampling.

    Raises
    ------
    BadInput: no types, an unknown gene or type, no positions, fewer than 20 pairs.
    """
    cells = source if isinstance(source, Cells) else source.cells
    if cells.cell_type is None:
        raise BadInput("The data give no cell types: a natural experiment compares cells of one type.")
    if gene not in cells.genes:
        raise BadInput(f"The data have no gene {gene!r}: choose a gene of the data.")
    if cell_type not in cells.cell_type:
        raise BadInput(
            f"The data have no cells of type {cell_type!r}: choose {', '.join(sorted(set(cells.cell_type)))}."
        )
    if readouts is None:
        readouts = niche_readouts(cells)
    rows = np.flatnonzero(
        (cells.cell_type == cell_type) & np.isin(cells.cell_id, readouts.index.to_numpy(dtype=object))
    )
    part = cells.take(rows)
    values = readouts.loc[part.cell_id]
    groups = split_cells(part, gene)
    low, high = (_at_most(group, seed, name) for name, group in (("low", groups.low), ("high", groups.high)))
    chosen = np.concatenate([low, high])
    covariates = _covariates(part, gene, chosen)
    treated = np.repeat([False, True], [len(low), len(high)])
    donor = None if part.donor is None else part.donor[chosen]
    score, pairs = match_pairs(covariates.to_numpy(), treated, donor)
    if len(pairs) < MIN_PAIRS:
        raise BadInput(
            f"Only {len(pairs)} pairs of {cell_type} cells differ in {gene} and agree in the rest, {MIN_PAIRS} are "
            "needed: give more cells, or choose another gene."
        )
    covariates.insert(0, "propensity (log odds)", score)
    balance = pd.DataFrame(
        {
            "covariate": covariates.columns,
            "before": _smd(covariates.to_numpy()[~treated], covariates.to_numpy()[treated], covariates.to_numpy()),
            "after": _smd(
                covariates.to_numpy()[pairs[:, 0]], covariates.to_numpy()[pairs[:, 1]], covariates.to_numpy()
            ),
        }
    )
    first, second = chosen[pairs[:, 0]], chosen[pairs[:, 1]]
    same = np.ones(len(pairs), bool) if donor is None else donor[pairs[:, 0]] == donor[pairs[:, 1]]
    known = part.donor is not None and len(set(part.donor[second])) > 1
    table = _differences(values, first, second, part.donor[second] if known and part.donor is not None else None,
                         groups, seed)  # fmt: skip
    return NaturalExperiment(
        gene=gene,
        cell_type=cell_type,
        rule=groups.rule,
        table=table,
        balance=balance,
        pairs=pd.DataFrame({"low": part.cell_id[first], "high": part.cell_id[second], "same_donor": same}),
        warnings=tuple(_warnings(balance, known, len(pairs), min(len(low), len(high)))),
    )


def _warnings(balance: pd.DataFrame, known: bool, n_pairs: int, possible: int) -> list[str]:
    said = []
    worst = balance.iloc[int(balance["after"].abs().to_numpy().argmax())]
    if abs(worst["after"]) > BALANCED:
        said.append(
            f"After matching the groups still differ in {worst['covariate']} by {worst['after']:.2f} standard "
            "deviations: part of the difference may be theirs."
        )
    if not known:
        said.append("Fewer than two donors are known: the interval runs over pairs and is too narrow.")
    if n_pairs < 0.5 * possible:
        said.append(f"{n_pairs} of {possible} possible pairs were formed: the rest have no partner alike.")
    return said


def split_cells(cells: Cells, gene: str) -> Groups:
    """Cells with little and with much of a gene, as a share of each cell's total.

    Where at least a third of the cells show no count, these are the low ones and the high ones are the upper third, or
    all that show any if these are fewer. Else the lower and the upper third.

    Raises
    ------
    BadInput: no cell, or no cell that differs from the others.
    """
    counts = cells.counts.tocsc()[:, np.flatnonzero(cells.genes == gene)].sum(axis=1)
    total = np.asarray(cells.counts.sum(axis=1)).ravel()
    share = np.asarray(counts).ravel() / np.maximum(total, 1e-9)
    if not len(share) or share.min() == share.max():
        raise BadInput(f"{gene} is the same in all {len(share)} cells: choose a gene that varies.")
    third, two_thirds = np.quantile(share, [1 / 3, 2 / 3])
    silent = share == 0
    if silent.mean() >= 1 / 3:
        low, high, rule = silent, (share > 0) & (share >= two_thirds), "no count against the upper third"
        if (share > 0).mean() <= 1 / 3:
            rule = "no count against any count"
    else:
        low, high, rule = share <= third, share >= two_thirds, "lower against upper third of the share of counts"
        high &= ~low
    return Groups(np.flatnonzero(low), np.flatnonzero(high), rule)


def _at_most(rows: np.ndarray, seed: int, name: str) -> np.ndarray:
    if len(rows) <= MAX_PER_GROUP:
        return rows
    return np.sort(rng.stream(seed, "natural experiment", name).choice(rows, MAX_PER_GROUP, replace=False))


def _covariates(cells: Cells, gene: str, rows: np.ndarray) -> pd.DataFrame:
    """Log total and leading components of the log expression of the other genes, of the chosen rows."""
    others = cells.counts[rows][:, np.flatnonzero(cells.genes != gene)]
    total = np.asarray(others.sum(axis=1)).ravel()
    x = np.log1p(others.toarray() / np.maximum(total, 1.0)[:, None] * max(float(np.median(total)), 1.0))
    x = x.astype(np.float64) - x.mean(axis=0)
    # The smaller of the two Gram matrices has the components: genes are hundreds, or cells are.
    if x.shape[1] <= x.shape[0]:
        _, vectors = np.linalg.eigh(x.T @ x)
        scores = x @ vectors[:, ::-1][:, :COMPONENTS]
    else:
        size, vectors = np.linalg.eigh(x @ x.T)
        scores = vectors[:, ::-1][:, :COMPONENTS] * np.sqrt(np.maximum(size[::-1][:COMPONENTS], 0.0))
    keep = scores.std(axis=0) > 1e-9 * max(1.0, float(np.abs(x).max()))
    scores = scores[:, keep]
    names = [f"component {i + 1}" for i in range(scores.shape[1])]
    return pd.DataFrame({"log total": np.log1p(total)} | dict(zip(names, scores.T, strict=True)))


def match_pairs(
    covariates: np.ndarray, treated: np.ndarray, donor: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of untreated and treated cells that agree in the covariates.

    Parameters
    ----------
    covariates: ``[cell, covariate]``. treated: bool ``[cell]``. donor: ``[cell]``; partners are sought within donors
        first.

    Returns
    -------
    Log odds of the propensity ``[cell]``, and rows ``[pair, 2]``, untreated first; no row occurs twice.
    """
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist
    from sklearn.linear_model import LogisticRegression

    spread = covariates.std(axis=0)
    x = (covariates - covariates.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    score = LogisticRegression(C=1.0, max_iter=1000).fit(x, treated).decision_function(x)
    width = CALIPER * float(score.std())
    scaled = np.column_stack([x / np.sqrt(x.shape[1]), score / max(float(score.std()), 1e-12)])
    free = [set(np.flatnonzero(~treated).tolist()), set(np.flatnonzero(treated).tolist())]
    found: list[tuple[int, int]] = []

    def assign(low: np.ndarray, high: np.ndarray) -> None:
        if not len(low) or not len(high):
            return
        cost = cdist(scaled[low], scaled[high], "sqeuclidean")
        apart = np.abs(score[low][:, None] - score[high][None]) > width
        # A forbidden pair costs more than any allowed set of pairs, so that as many cells as can be are matched.
        cost[apart] = (cost.max() + 1.0) * (min(len(low), len(high)) + 1)
        for a, b in zip(*linear_sum_assignment(cost), strict=True):
            if not apart[a, b]:
                found.append((int(low[a]), int(high[b])))
                free[0].discard(int(low[a]))
                free[1].discard(int(high[b]))

    if donor is not None:
        for name in np.unique(donor.astype(str)):
            mine = donor.astype(str) == name
            assign(np.flatnonzero(mine & ~treated), np.flatnonzero(mine & treated))
    assign(*(np.array(sorted(group), dtype=int) for group in free))
    return score, np.array(found, dtype=int).reshape(-1, 2)


def _smd(low: np.ndarray, high: np.ndarray, all_cells: np.ndarray) -> np.ndarray:
    """Standardised mean differences high - low, in standard deviations over all cells of both groups."""
    spread = all_cells.std(axis=0)
    return (high.mean(axis=0) - low.mean(axis=0)) / np.where(spread > 0, spread, 1.0)


def _differences(
    values: pd.DataFrame, low: np.ndarray, high: np.ndarray, donor: np.ndarray | None, groups: Groups, seed: int
) -> pd.DataFrame:
    rows = []
    cluster = np.arange(len(low)).astype(str) if donor is None else donor
    for name in values.columns:
        column = values[name].to_numpy(dtype=np.float64)
        difference = column[high] - column[low]
        found = clustered_ratio(difference, np.ones(len(difference)), cluster, seed, LEVEL)
        defined = np.isfinite(difference)
        if not defined.any():
            continue
        means = pd.Series(difference[defined]).groupby(cluster[defined]).mean().to_numpy()
        before = float(np.nanmean(column[groups.high]) - np.nanmean(column[groups.low]))
        unit = UNITS.get(str(name).partition(":")[0], "")
        rows.append(
            (name, unit, float(column[low][defined].mean()), float(column[high][defined].mean()), found.value,
             found.low, found.high, sign_flip_p(means, seed), before, found.n, 0 if donor is None else len(means))
        )  # fmt: skip
    columns = ["readout", "unit", "low_mean", "high_mean", "difference", "low", "high", "p", "before", "n", "donors"]
    return pd.DataFrame(rows, columns=columns)


def niche_readouts(cells: Cells, half_width_um: float = HALF_WIDTH_UM) -> pd.DataFrame:
    """Density and composition in the square around each cell, from positions and types.

    Each donor's cells are taken for one section. Cells nearer to the edge of their section's bounding box than half
    the window are left out; a section with a ragged outline keeps some whose window is partly empty.

    Returns
    -------
    DataFrame indexed by cell id: ``density`` (cells per mm2, the cell itself included) and ``fraction:<type>`` of the
    cells in the window. Types that H&E cannot tell apart are counted together where all types are the model's own.

    Raises
    ------
    BadInput: no positions, no types, or no cell far enough from the edge.
    """
    from scipy.spatial import cKDTree

    if cells.xy_um is None or cells.cell_type is None:
        missing = "positions in um" if cells.xy_um is None else "cell types"
        raise BadInput(f"{cells.source or 'The data'} give no {missing}: the niche of a real cell cannot be counted.")
    names: Sequence[str]
    if set(cells.cell_type) <= set(VISIBLE_CLASS):
        kind, names = np.array([VISIBLE_CLASS[name] for name in cells.cell_type], dtype=object), READER_CLASSES
    else:
        kind, names = cells.cell_type, sorted(set(cells.cell_type))
    code = pd.Index(names).get_indexer(kind)
    section = np.zeros(len(cells), dtype=int) if cells.donor is None else pd.factorize(cells.donor)[0]
    ids: list[Any] = []
    counted = []
    for number in range(section.max(initial=-1) + 1):
        mine = np.flatnonzero(section == number)
        xy = cells.xy_um[mine].astype(np.float64)
        inside = ((xy >= xy.min(axis=0) + half_width_um) & (xy <= xy.max(axis=0) - half_width_um)).all(axis=1)
        ids += cells.cell_id[mine[inside]].tolist()
        for hit in cKDTree(xy).query_ball_point(xy[inside], half_width_um, p=np.inf):
            counted.append(np.bincount(code[mine[hit]], minlength=len(names)))
    if not counted:
        raise BadInput(
            f"No cell lies {half_width_um:g} um inside its section: give sections wider than {2 * half_width_um:g} um."
        )
    counts = np.stack(counted).astype(np.float64)
    n = counts.sum(axis=1)
    table = {"density": n / (2 * half_width_um / 1000.0) ** 2}
    table |= {f"fraction:{name}": counts[:, i] / n for i, name in enumerate(names)}
    return pd.DataFrame(table, index=pd.Index(ids, dtype=object, name="cell_id"))
