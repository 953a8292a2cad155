"""Two controls with the rivals' ``generate``: nearest real tile, and GE2Hist with another cell's condition.

Retrieval shows what copying reaches: its pictures are real, so only the match of niche to cell can be wrong. The
shuffled condition shows what GE2Hist reaches without looking at the cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ge2hist_core import rng
from ge2hist_core.config import SampleConfig
from ge2hist_core.types import BadInput, Cells, Latent

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.store import TissueStore

__all__ = ["NearestTile", "ShuffledCondition"]


class NearestTile:
    """The real tile of the training cell that is nearest in the model's expression embedding.

    Parameters
    ----------
    model: its encoder embeds the cells. store: the tissue. rows: training cells with whole tiles.
    seed: of the embedding. embedding: that of ``rows`` where it is known, ``[row, dim]``.
    """

    name = "nearest-tile"
    title = "Nearest real tile"
    conditional = True

    def __init__(
        self,
        model: GE2Hist,
        store: TissueStore,
        rows: np.ndarray,
        seed: int = 0,
        embedding: np.ndarray | None = None,
    ) -> None:
        self.model, self.store, self.rows, self.seed = model, store, np.asarray(rows), seed
        if not len(self.rows):
            raise BadInput("There is no training cell to retrieve tiles from: give rows of cells with whole tiles.")
        known = model.embed(store.cells.take(self.rows), seed) if embedding is None else embedding
        self.embedding = known.astype(np.float64)

    def nearest(self, cells: Cells) -> np.ndarray:
        """``[cell]`` rows of the store; of equally near cells the first."""
        asked = self.model.embed(cells, self.seed).astype(np.float64)
        chosen = [int(((self.embedding - e) ** 2).sum(axis=1).argmin()) for e in asked]
        return self.rows[np.array(chosen, dtype=np.int64)]

    def generate(self, cells: Cells | None, seeds: Sequence[int]) -> np.ndarray:
        """uint8 ``[cell, H, W, 3]``; ``seeds`` is there for the common form: nothing is drawn."""
        if cells is None:
            raise BadInput(f"{self.title} is chosen by expression: give the cells.")
        if len(cells) != len(seeds):
            raise ValueError(f"{len(cells)} cells need as many seeds, got {len(seeds)}")
        return self.store.tiles(self.nearest(cells))


class ShuffledCondition:
    """GE2Hist conditioned on the state of another cell, drawn from a pool by the picture's seed.

    Parameters
    ----------
    model: the bundle. pool: cells whose states are handed out. sample: how pictures are drawn.
    seed: of the embedding.
    """

    name = "shuffled"
    title = "GE2Hist, another cell's condition"
    conditional = True

    def __init__(self, model: GE2Hist, pool: Cells, sample: SampleConfig | None = None, seed: int = 0) -> None:
        if len(pool) < 2:
            raise BadInput(f"The pool has {len(pool)} cells: exchanging conditions takes at least 2.")
        self.model, self.sample = model, sample or SampleConfig()
        self.cell_id = pool.cell_id
        self.state: Latent = model.encode(model.embed(pool, seed))

    def generate(self, cells: Cells | None, seeds: Sequence[int]) -> np.ndarray:
        """uint8 ``[picture, H, W, 3]``; no cell of ``cells`` gets its own state back."""
        if cells is not None and len(cells) != len(seeds):
            raise ValueError(f"{len(cells)} cells need as many seeds, got {len(seeds)}")
        rows = [self._other(None if cells is None else cells.cell_id[i], seed) for i, seed in enumerate(seeds)]
        return self.model.generate(self.state.take(rows), seeds, self.sample)

    def _other(self, cell_id: str | None, seed: int) -> int:
        draw = rng.stream(seed, "shuffled condition").permutation(len(self.cell_id))[:2]
        return int(draw[0] if self.cell_id[draw[0]] != cell_id else draw[1])
