"""Real cells on a map: a gene over all of them, who has much of it, and where on the map an edit moves a cell.

A map such as a UMAP is made once, for the cells as they are, and has no place for an edited one. Both states of a cell
are therefore given the mean place of the real cells most like them,

    P(e) = sum_j w_j m_j / sum_j w_j,    w_j = (1 - (d_j / h)^3)^3,    j among the K nearest,

with ``m_j`` the place of real cell j on the map, ``d_j`` the distance of its embedding from ``e`` and ``h`` that of the
(K + 1)-th nearest: tricube weights (Cleveland 1979, doi:10.1080/01621459.1979.10481038) end at 0, so that P does not
jump when a neighbour is exchanged. The arrow of an edit is ``P(edited) - P(unedited)`` from the cell's own place: it is
0 for no edit, and what the mean over neighbours pulls to the middle of the map is in both terms. velocyto (La Manno
2018, doi:10.1038/s41586-018-0414-6), scVelo (Bergen 2020, doi:10.1038/s41587-020-0591-3) and CellOracle (Kamimoto 2023,
doi:10.1038/s41586-022-05688-9) average over neighbours as well, with weights from the angle between a velocity and the
way to each neighbour; here the edited embedding is known, so that its distances are used.

A mean of real places never leaves the map: a cell unlike any real one is shown among those least unlike it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ge2hist_core import rng
from ge2hist_core.support import OUTSIDE
from ge2hist_core.types import BadInput, Cells
from perturb.technical import POINT, left_cloud, redraw

if TYPE_CHECKING:
    from ge2hist_core.data import H5adSource
    from ge2hist_core.model import GE2Hist
    from perturb.grn import Network
    from perturb.recipe import Recipe

__all__ = [
    "LOG_UNIT",
    "NEIGHBOURS",
    "REFERENCE",
    "Reference",
    "at_least",
    "find_genes",
    "gene_counts",
    "in_words",
    "log_normalised",
    "place",
    "reference_rows",
    "shifts",
]

SCALE = 10_000.0
LOG_UNIT = "ln(1 + counts per 10,000)"
BLOCK = 4_000
"""Cells that are read at once when one gene is looked up."""
REFERENCE = 300
"""Real cells that are encoded to find neighbours among."""
NEIGHBOURS = 15
NOISE_CELLS = 4
"""Edited cells whose technical noise is measured, the first ones; each costs 19 encodings."""


def find_genes(genes: Iterable[str], text: str, n: int = 8) -> list[str]:
    """At most ``n`` distinct names that hold ``text``, whatever its case: the name itself first, then what begins so.

    Examples
    --------
    >>> find_genes(["CD8B", "CD8A", "CD80", "SCD8", "ACTB"], "cd8a"), find_genes(["SCD8", "CD80", "CD8A"], "cd8")
    (['CD8A'], ['CD80', 'CD8A', 'SCD8'])
    """
    wanted = text.strip().casefold()
    if not wanted:
        return []
    found = [name for name in dict.fromkeys(map(str, genes)) if wanted in name.casefold()]

    def order(name: str) -> tuple[bool, bool, bool, int, str]:
        low = name.casefold()
        return name != text.strip(), low != wanted, not low.startswith(wanted), len(name), name

    return sorted(found, key=order)[:n]


def gene_counts(source: H5adSource, gene: str, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """One gene in every cell of a file, read in blocks of ``block`` cells.

    Returns
    -------
    The gene's counts, summed where its name repeats, and each cell's total: float32 ``[cell]`` both, in counts (on the
    file's linear scale where it holds no counts).

    Raises
    ------
    BadInput: a gene that the file does not have.
    """
    columns = np.flatnonzero(source.genes == gene)
    if not len(columns):
        raise BadInput(f"{source.path.name} has no gene {gene!r}: type a name that it has.")
    count, total = (np.zeros(len(source), dtype=np.float32) for _ in range(2))
    for start in range(0, len(source), block):
        rows = np.arange(start, min(start + block, len(source)))
        some = source.take(rows, allow_empty=True).counts
        count[rows] = np.asarray(some[:, columns].sum(axis=1)).ravel()
        total[rows] = np.asarray(some.sum(axis=1)).ravel()
    return count, total


def log_normalised(count: np.ndarray, total: np.ndarray) -> np.ndarray:
    """``ln(1 + 10,000 count / total)``, scanpy's normalize_total and log1p; NaN for a cell without counts."""
    share = np.divide(count, total, out=np.full(np.shape(count), np.nan, dtype=np.float64), where=np.asarray(total) > 0)
    return np.log1p(SCALE * share)


def at_least(count: np.ndarray, least: float, among: np.ndarray) -> np.ndarray:
    """Rows with ``count >= least``, the highest first, those of equal count in the file's order.

    Parameters
    ----------
    count: ``[cell]``. least: above 0. among: bool ``[cell]``, the cells that may be chosen.

    Raises
    ------
    BadInput: a threshold that cells without the gene reach.
    """
    if not least > 0:
        raise BadInput(f"The least count is {least:g}: give a number above 0.")
    rows = np.flatnonzero((count >= least) & among)
    return rows[np.argsort(-count[rows], kind="stable")]


def reference_rows(empty: np.ndarray, n: int = REFERENCE) -> np.ndarray:
    """At most ``n`` rows of cells with counts, in random order, the same ones every time; those of a smaller ``n`` are
    the first ones of a larger.
    """
    return rng.stream(0, "map reference").permutation(np.flatnonzero(~empty))[:n]


@dataclass(frozen=True, eq=False)
class Reference:
    """Real cells to find neighbours among: ``cell_id [cell]``, ``embedding [cell, dim]``, ``place [cell, 2]``."""

    cell_id: np.ndarray
    embedding: np.ndarray
    place: np.ndarray

    def without(self, cell_ids: Sequence[str]) -> Reference:
        """The same without these cells."""
        keep = ~np.isin(self.cell_id.astype(str), list(cell_ids))
        return Reference(self.cell_id[keep], self.embedding[keep], self.place[keep])


def place(embedding: np.ndarray, reference: Reference, k: int = NEIGHBOURS) -> np.ndarray:
    """Where embeddings ``[cell, dim]`` belong on the map, ``[cell, 2]``: see the module.

    With at most ``k`` reference cells all of them are neighbours and the furthest counts for nothing.

    Raises
    ------
    BadInput: fewer than two reference cells, k below 1.
    """
    n = len(reference.cell_id)
    if n < 2 or k < 1:
        raise BadInput(f"{n} real cells and k = {k}: give at least 2 cells and 1 neighbour to place a cell on the map.")
    out = np.empty((len(embedding), 2))
    for i, one in enumerate(np.asarray(embedding, dtype=np.float64)):
        distance = np.linalg.norm(reference.embedding - one, axis=1)
        near = np.argsort(distance, kind="stable")[: k + 1]
        width = distance[near[-1]]
        weight = (1.0 - (distance[near] / width) ** 3) ** 3 if width > 0 else np.ones(len(near))
        if not weight.sum() > 0:  # all equally far
            weight = np.ones(len(near))
        out[i] = weight @ reference.place[near] / weight.sum()
    return out


def shifts(
    recipe: Recipe,
    model: GE2Hist,
    cells: Cells,
    reference: Reference,
    own: np.ndarray,
    network: Network | None = None,
    noise_cells: int = NOISE_CELLS,
) -> pd.DataFrame:
    """Where the recipe's edit moves each of its cells on the map.

    No cell is its own neighbour, edited or not. The noise is that of the encoder's ties: the unedited cell is encoded
    again with other seeds (:mod:`perturb.technical`), and p is that of the edited one among these.

    Parameters
    ----------
    cells, network: as for :func:`perturb.run.run`. own: ``[cell, 2]`` places of the recipe's cells on the map.
    noise_cells: of how many cells, the first ones, the noise is measured.

    Returns
    -------
    One row per cell: ``cell_id, x, y`` (its own place), ``dx, dy`` (map units), ``length``; ``distance`` (of the
    embeddings, 0 to 2), ``p`` (1 / 20 at least; NaN where not measured), ``wander`` (root mean square of the map's
    distance between the unedited cell and its redraws, NaN where not measured), ``support`` (conformal p of the edited
    cell, NaN where the bundle cannot tell).

    Raises
    ------
    BadInput: a cell that ``cells`` lack; an edit that silences a cell; too few reference cells.
    """
    from perturb.run import choose_cells, edited_cells

    chosen = choose_cells(cells, recipe.cell_ids)
    edited = edited_cells(recipe, chosen, cells, network)[0]
    before, after = model.embed(chosen, recipe.encoder_seed), model.embed(edited, recipe.encoder_seed)
    measured = min(noise_cells, len(chosen))
    again = redraw(model, chosen.take(slice(measured)), recipe.encoder_seed).embedding if measured else None
    support = np.full(len(chosen), np.nan) if model.support is None else model.support.p(after)
    rows = []
    for i, cell_id in enumerate(chosen.cell_id):
        others = reference.without([cell_id])
        start, end = place(np.stack([before[i], after[i]]), others)
        moved = end - start
        distance = float(np.linalg.norm(after[i].astype(np.float64) - before[i]))
        p = wander = float("nan")
        if again is not None and i < measured:
            cloud = np.linalg.norm(again[:, i].astype(np.float64) - before[i], axis=1)
            p = left_cloud(distance, cloud, POINT)[1]
            wander = float(np.sqrt(np.square(place(again[:, i], others) - start).sum(axis=1).mean()))
        length = float(np.hypot(*moved))
        rows.append((cell_id, *map(float, own[i]), *map(float, moved), length, distance, p, wander, float(support[i])))
    columns = ["cell_id", "x", "y", "dx", "dy", "length", "distance", "p", "wander", "support"]
    return pd.DataFrame(rows, columns=columns)


def in_words(moves: pd.DataFrame) -> str:
    """What the arrows of :func:`shifts` show, what they do not, and which edits do no more than the encoder's ties."""
    measured = moves[moves["p"].notna()]
    still = int((moves["distance"] <= POINT).sum())
    lost = measured[(measured["p"] > OUTSIDE) & (measured["distance"] > POINT)]
    outside = int((moves["support"] < OUTSIDE).sum())
    n, said = len(moves), []
    if still:
        said.append(f"For {still} of {n} cells the encoder sees no difference." if n > 1 else
                    "The encoder sees no difference, so there is no arrow.")  # fmt: skip
    if len(lost):
        names = ", ".join(lost["cell_id"].astype(str))
        said.append(
            f"The edit of {names} moves the embedding no further than the encoder's own tie-breaking does (p > 0.05 "
            "among the unedited cell encoded again 19 times): take the pale arrow for noise."
        )
    moved = measured[~measured.index.isin(lost.index) & (measured["distance"] > POINT)]
    if len(moved) == 1:
        one = moved.iloc[0]
        said.append(
            f"The edit moves {one['cell_id']} by {one['length']:.2g} map units; ties alone move its place by "
            f"{one['wander']:.2g}."
        )
    elif len(moved):
        said.append(f"{len(moved)} of the {len(measured)} cells measured move further than their ties do.")
    if len(measured) < n:
        said.append(f"The noise of ties was measured for the first {len(measured)} of {n} cells.")
    if outside:
        said.append(f"{outside} of {n} edited cells lie outside the training data (p < 0.05)." if n > 1 else
                    "The edited cell lies outside the training data (p < 0.05).")  # fmt: skip
    said.append(
        f"An arrow is the difference between the mean places of the {NEIGHBOURS} real cells (of at most {REFERENCE}) "
        "nearest to the edited and to the unedited embedding. A place on a UMAP is an approximation: distances on it "
        "are not distances between cells, and an edited cell unlike any real one is still put among real ones."
    )
    return " ".join(said)
