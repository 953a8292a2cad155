"""What is known of one cell before any edit: how the model reads it, and each of its genes as the encoder sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ge2hist_core.support import OUTSIDE
from ge2hist_core.types import Cells
from perturb.edits import MIN_REFERENCE

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist

__all__ = ["GENE_COLUMNS", "Profile", "profile"]

GENE_COLUMNS = ("count", "percentile", "bin", "known")


@dataclass(frozen=True, eq=False)
class Profile:
    """One cell.

    Parameters
    ----------
    cell_id, cell_type, donor: as the data say; None where they do not.
    total: sum of its counts. n_expressed: genes with a count.
    read_type, probability: the type that the model's classifier reads from the expression, and how surely.
    support: conformal p-value among the training data, NaN where the bundle holds none to compare with.
    genes: index = gene name, expressed ones first, highest count first; columns ``count`` (summed where a name
        repeats), ``percentile`` (mid-rank in [0, 100] among cells of the same type, NaN with fewer than 20),
        ``bin`` (0: not seen by the encoder, 50: the cell's highest), ``known`` (the encoder has a token for it).
    """

    cell_id: str
    cell_type: str | None
    donor: str | None
    total: float
    n_expressed: int
    read_type: str
    probability: float
    support: float
    genes: pd.DataFrame

    @property
    def inside(self) -> bool | None:
        """Whether the cell lies within the training data; None where that cannot be told."""
        return None if np.isnan(self.support) else bool(self.support >= OUTSIDE)


def profile(cells: Cells, model: GE2Hist, seed: int) -> Profile:
    """Describe the first of ``cells``; those after it of the same type are what its counts are compared with.

    Parameters
    ----------
    cells: as from :func:`perturb.run.cells_for`.
    seed: of the encoder's draws, the recipe's ``encoder_seed``.
    """
    one = cells.take([0])
    embedding = model.embed(one, seed)
    probability = model.classify(model.encode(embedding))[0]
    best = int(probability.argmax())
    return Profile(
        cell_id=str(one.cell_id[0]),
        cell_type=None if one.cell_type is None else str(one.cell_type[0]),
        donor=None if one.donor is None else str(one.donor[0]),
        total=float(one.counts.sum()),
        n_expressed=int(one.counts.nnz),
        read_type=model.cell_types[best],
        probability=float(probability[best]),
        support=float("nan") if model.support is None else float(model.support.p(embedding)[0]),
        genes=_genes(cells, one, model, seed),
    )


def _genes(cells: Cells, one: Cells, model: GE2Hist, seed: int) -> pd.DataFrame:
    count = one.counts.toarray()[0].astype(np.float64)
    percentile = np.full(len(count), np.nan)
    if cells.cell_type is not None:
        peers = cells.counts[cells.cell_type == cells.cell_type[0]]
        if peers.shape[0] >= MIN_REFERENCE:
            percentile = _percentiles(count, peers.tocsc())
    table = pd.DataFrame(
        {
            "gene": cells.genes,
            "count": count,
            "percentile": percentile,
            "bin": model.scgpt.bins(one, seed).toarray()[0].astype(int),
            "known": np.asarray(model.scgpt.match(cells.genes).ids) >= 0,
        }
    )
    table = table.groupby("gene", sort=False).agg({"count": "sum", "percentile": "max", "bin": "max", "known": "any"})
    return table.sort_values(["count", "known"], ascending=False, kind="stable")


def _percentiles(count: np.ndarray, peers: object) -> np.ndarray:
    """Mid-rank percentile of each gene's count among the peers' counts ``[peer, gene]``, without making them dense."""
    n, out = peers.shape[0], np.empty(len(count))  # type: ignore[attr-defined]
    for j, value in enumerate(count):
        stored = peers.data[peers.indptr[j] : peers.indptr[j + 1]]  # type: ignore[attr-defined]
        zeros = n - len(stored)
        below = (stored < value).sum() + zeros * (value > 0)
        same = (stored == value).sum() + zeros * (value == 0)
        out[j] = 100.0 * (below + same / 2) / n
    return out
