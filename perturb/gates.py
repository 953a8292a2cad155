"""Is the edited cell still inside the data, and what is the strongest form of the edit that is?

The gates themselves are :mod:`ge2hist_core.gates`; here they meet the two arms of an experiment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ge2hist_core.support import OUTSIDE, bonferroni
from ge2hist_core.types import BadInput, Cells
from perturb.edits import Edit, EditSet, Perturbation

if TYPE_CHECKING:
    from ge2hist_core.gates import Gates
    from ge2hist_core.model import GE2Hist
    from perturb.result import Arm

__all__ = ["GATES", "GRID", "Supported", "gate_table", "nearest_supported", "shrink"]

GATES = ("expression", "embedding", "latent", "picture")
"""Names of ``ge2hist_core.gates.GATES``, here so that a page need not load the engine to name them."""

GRID = 1024
"""Doses tried are multiples of one 1,024th of the edit's: ten counts of ``set=1e4``, where a cell has a thousand."""


def gate_table(
    model: GE2Hist,
    gates: Gates | None,
    unedited: Cells,
    edited_cells: Cells,
    genes: tuple[str, ...],
    base: Arm,
    edited: Arm,
) -> pd.DataFrame:
    """Conformal p-values of both arms at every gate.

    Parameters
    ----------
    gates: of the bundle; None leaves the embedding's gate alone.
    unedited, edited_cells: the recipe's cells before and after the edit.
    genes: that were edited; ``range`` asks how far these lie from the cells of the type, in both arms.
    base, edited: the arms, pictures over cells, then seeds.

    Returns
    -------
    Two rows per cell, ``base`` and ``edited``: ``cell_id``, ``arm``, the p-values ``expression``, ``embedding``,
    ``latent``, ``picture`` (NaN where a gate has no answer; of several seeds, twice the median); ``p``, the smallest
    times the number of gates that answered; ``gate``, the one it came from, empty without an answer; ``inside``, p at
    least 0.05, None without an answer; and the parts ``profile``, ``range``, ``z_c``, ``z_e`` of the first and third.
    The type whose range counts is the one that the model reads in the unedited cell.
    """
    kind = base.types.argmax(axis=1)
    tables = []
    for name, cells, arm in (("base", unedited, base), ("edited", edited_cells, edited)):
        table = _cell_p(model, gates, cells, arm, kind, genes, unedited)
        table.insert(3, "picture", _picture_p(model, gates, arm, len(cells)))
        values = table[list(GATES)].to_numpy(dtype=np.float64)
        answered = np.isfinite(values).any(axis=1)
        p = bonferroni(values)
        table.insert(4, "p", p)
        smallest = np.where(np.isfinite(values), values, np.inf).argmin(axis=1)
        table.insert(5, "gate", np.where(answered, np.array(GATES, dtype=object)[smallest], ""))
        verdict = [bool(one >= OUTSIDE) if known else None for one, known in zip(p, answered, strict=True)]
        table.insert(6, "inside", pd.Series(verdict, index=table.index, dtype=object))
        table.insert(0, "cell_id", list(unedited.cell_id))
        table.insert(1, "arm", name)
        tables.append(table.reset_index(drop=True))
    return pd.concat(tables, ignore_index=True)


def _cell_p(
    model: GE2Hist,
    gates: Gates | None,
    cells: Cells,
    arm: Arm,
    kind: np.ndarray,
    genes: tuple[str, ...],
    unedited: Cells,
) -> pd.DataFrame:
    if gates is not None:
        found = gates.cell_p(model, cells, arm.embedding, arm.latent, kind, edited=genes, unedited=unedited)
        return found.reset_index(drop=True)
    columns = ("expression", "embedding", "latent", "profile", "range", "z_c", "z_e")
    table = pd.DataFrame(np.nan, index=range(len(cells)), columns=pd.Index(columns))
    if model.support is not None:
        table["embedding"] = model.support.p(arm.embedding)
    return table


def _picture_p(model: GE2Hist, gates: Gates | None, arm: Arm, n_cells: int) -> np.ndarray:
    if gates is None or gates.picture is None or model.reader is None or not len(arm.images):
        return np.full(n_cells, np.nan)
    from ge2hist_core.gates import several_pictures

    return several_pictures(gates.picture_p(model, arm.images).reshape(n_cells, -1))


# --- the nearest supported edit --------------------------------------------------------------------------------------


def shrink(perturbation: Perturbation, cell: Cells, share: float, reference: Cells | None = None) -> Perturbation:
    """The same perturbation at a share of its strength, 1 as it is, 0 none.

    A factor f becomes ``f ** share``, a knock-out the factor ``1 - share``, a set count and a percentile the count that
    lies this share of the way from the one before the edit; a set's dose is multiplied by the share. Edits of one gene
    act in turn, as they do at full strength. Amounts are given to six digits.

    Parameters
    ----------
    cell: the one cell to edit; counts and percentiles are on the way from its own.
    reference: cells that percentiles are taken of, as in :meth:`Perturbation.apply`.

    Raises
    ------
    BadInput: several cells, a share outside of 0 to 1, an edit that does not fit the cell.
    """
    return _Shrinker(perturbation, cell, reference)(share)


class _Shrinker:
    """:func:`shrink` with what does not depend on the share looked up once."""

    def __init__(self, perturbation: Perturbation, cell: Cells, reference: Cells | None) -> None:
        if len(cell) != 1:
            raise BadInput(f"{len(cell)} cells were given to weaken an edit for: give one, each has its own counts.")
        self.perturbation = perturbation
        perturbation.apply(cell, reference)  # refuses what cannot be applied
        column = {gene: np.flatnonzero(cell.genes == gene)[0] for gene in perturbation.genes}
        counts = cell.counts.toarray()[0]
        self.start = {gene: float(counts[i]) for gene, i in column.items()}
        self.target = {}
        for edit in perturbation.edits:
            if edit.kind == "percentile":
                after = Perturbation((edit,)).apply(cell, reference)
                self.target[edit] = float(after.counts[0, column[edit.gene]])
            elif edit.kind == "set":
                self.target[edit] = edit.amount

    def __call__(self, share: float) -> Perturbation:
        if not 0.0 <= share <= 1.0:
            raise BadInput(f"The share of an edit is {share!r}: choose a number from 0 to 1.")
        if share in (0.0, 1.0):
            return self.perturbation if share else Perturbation()
        counts = dict(self.start)

        def weaker(edit: Edit) -> Edit:
            now = counts[edit.gene]
            if edit in self.target:
                new = Edit(edit.gene, "set", _six(now + share * (self.target[edit] - now)))
                counts[edit.gene] = new.amount
            else:
                strong = edit.kind == "ko" or edit.amount == 0
                new = Edit(edit.gene, "factor", _six(1.0 - share if strong else edit.amount**share))
                counts[edit.gene] = now * new.amount
            return new

        parts: list[Edit | EditSet] = []
        for part in self.perturbation.parts:
            if isinstance(part, EditSet):
                dose = None if part.dose is None else _six(part.dose * share)
                parts.append(EditSet(part.name, tuple(map(weaker, part.edits)), dose))
            else:
                parts.append(weaker(part))
        return Perturbation(tuple(parts))


def _six(value: float) -> float:
    return float(f"{value:.6g}")


@dataclass(frozen=True)
class Supported:
    """An edit that keeps the cell inside the data.

    Parameters
    ----------
    perturbation: the weakened edit; empty where none was inside.
    share: of the asked strength, 0 to 1.
    p: of all gates together, and ``p_asked`` that of the full edit (NaN where it leaves the cell empty).
    """

    perturbation: Perturbation
    share: float
    p: float
    p_asked: float


def nearest_supported(
    perturbation: Perturbation,
    cell: Cells,
    model: GE2Hist,
    gates: Gates | None,
    *,
    reference: Cells | None = None,
    apply: Callable[[Perturbation], Cells] | None = None,
    seed: int = 0,
    alpha: float = OUTSIDE,
    grid: int = GRID,
) -> Supported | None:
    """The perturbation at the largest dose, found by bisection, at which the cell is inside the data.

    Inside means that the expression, embedding and latent gates together (three times the smallest p) give at least
    ``alpha``: the rule of :func:`gate_table`, without pictures, which would have to be drawn at every dose. The dose
    that is returned was itself judged inside, and the next larger one outside; all smaller ones are inside where
    strangeness grows with the dose, which is usual and not checked. Costs about twelve encodings of the cell.

    Parameters
    ----------
    cell: one cell. reference: cells that percentiles are taken of. seed: of the encoder.
    apply: the cell under a perturbation where that is more than :meth:`Perturbation.apply`, as with a network.
    grid: doses are the multiples of one over this number.

    Returns
    -------
    None where the unedited cell is outside, or where no gate answers. A share of 0, with no edit left, where not even
    the smallest dose is inside.

    Raises
    ------
    BadInput: several cells, alpha outside of 0 to 1, a grid without doses, an edit that does not fit the cell.
    """
    if grid < 1:
        raise BadInput(f"grid is {grid!r}: choose at least 1 dose.")
    if not 0.0 < alpha < 1.0:
        raise BadInput(f"alpha is {alpha!r}: choose a number between 0 and 1, such as 0.05.")
    weaker = _Shrinker(perturbation, cell, reference)
    judge = _judge(perturbation, cell, model, gates, apply or (lambda one: one.apply(cell, reference)), seed)
    unedited = judge(Perturbation())
    if not unedited >= alpha:
        return None
    asked = judge(perturbation)
    if asked >= alpha:
        return Supported(perturbation, 1.0, asked, asked)
    best, p, beyond = 0, unedited, grid
    while beyond - best > 1:
        middle = (best + beyond) // 2
        found = judge(weaker(middle / grid))
        if found >= alpha:
            best, p = middle, found
        else:
            beyond = middle
    return Supported(weaker(best / grid), best / grid, p, asked)


def _judge(
    perturbation: Perturbation,
    cell: Cells,
    model: GE2Hist,
    gates: Gates | None,
    apply: Callable[[Perturbation], Cells],
    seed: int,
) -> Callable[[Perturbation], float]:
    """p of the cell under a perturbation of the same genes, NaN where it expresses nothing that the encoder knows."""
    kind: np.ndarray | None = None

    def judge(one: Perturbation) -> float:
        nonlocal kind
        cells = apply(one)
        embedding = model.scgpt.embed(cells, seed, on_empty="nan")
        if not np.isfinite(embedding).all():
            return float("nan")
        latent = model.encode(embedding)
        if kind is None:  # the first one asked is the unedited cell
            kind = model.classify(latent).argmax(axis=1)
        if gates is None:
            return float("nan") if model.support is None else float(model.support.p(embedding)[0])
        table = gates.cell_p(model, cells, embedding, latent, kind, edited=perturbation.genes, unedited=cell)
        return float(bonferroni(table[list(GATES[:3])].to_numpy())[0])

    return judge
