"""Is a cell inside what the model has seen? Nearest training neighbour of its embedding, as a conformal p-value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["OUTSIDE", "Support"]

OUTSIDE = 0.05
"""A conformal p-value below this says: fewer than 1 in 20 cells like those of training lie as far out."""


@dataclass(frozen=True, eq=False)
class Support:
    """Training embeddings to compare with, and how far unseen donors' cells lie from them.

    Parameters
    ----------
    reference: ``[reference, dim]`` unit-length embeddings of training cells.
    cell_id: ``[reference]`` names of these cells.
    calibration: ``[calibration]`` distances of cells of held-out donors, measured as :meth:`distance` does.
    """

    reference: np.ndarray
    cell_id: np.ndarray
    calibration: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "reference", np.asarray(self.reference, dtype=np.float32))
        object.__setattr__(self, "calibration", np.sort(np.asarray(self.calibration, dtype=np.float32)))
        if self.reference.ndim != 2 or len(self.reference) != len(self.cell_id) or not len(self.reference):
            raise ValueError(f"reference {self.reference.shape} must have one row per cell id ({len(self.cell_id)})")

    @classmethod
    def fit(cls, reference: np.ndarray, cell_id: np.ndarray, held_out: np.ndarray) -> Support:
        """From embeddings of training cells ``[reference, dim]`` and of cells of held-out donors ``[cell, dim]``."""
        bare = cls(reference, cell_id, np.empty(0))
        return cls(reference, cell_id, bare.distance(held_out))

    def _nearest(self, embedding: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        embedding = np.atleast_2d(np.asarray(embedding, dtype=np.float32))
        squared = (self.reference**2).sum(1) - 2 * embedding @ self.reference.T
        row = squared.argmin(1)
        # Through the difference itself: the expanded square loses digits for near cells.
        return row, np.linalg.norm(embedding - self.reference[row], axis=1)

    def nearest(self, embedding: np.ndarray) -> np.ndarray:
        """``[cell, dim]`` -> row of the nearest reference cell, ``[cell]`` int."""
        return self._nearest(embedding)[0]

    def distance(self, embedding: np.ndarray) -> np.ndarray:
        """``[cell, dim]`` -> Euclidean distance to the nearest reference cell, ``[cell]``, 0 to 2 for unit length."""
        return self._nearest(embedding)[1]

    def p(self, embedding: np.ndarray) -> np.ndarray:
        """Conformal p-value ``[cell]``: ``(1 + #{calibration >= distance}) / (1 + n)``.

        For a cell drawn as the calibration cells were, ``P(p <= a) <= a``. Small means: unlike anything seen in
        training. (Vovk, Gammerman and Shafer 2005.)
        """
        n = len(self.calibration)
        larger = n - np.searchsorted(self.calibration, self.distance(embedding), side="left")
        return (1 + larger) / (1 + n)
