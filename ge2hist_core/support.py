"""Is a cell inside what the model has seen? Conformal p-values, and the first of them: nearest training neighbour.

:mod:`ge2hist_core.gates` adds three more of the same kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["OUTSIDE", "Support", "bonferroni", "conformal_p"]

OUTSIDE = 0.05
"""A conformal p-value below this says: fewer than 1 in 20 cells like those of training lie as far out."""


def conformal_p(score: np.ndarray, calibration: np.ndarray) -> np.ndarray:
    """Split-conformal p-value ``(1 + #{calibration >= score}) / (1 + n)`` of each score; NaN where the score is NaN.

    Parameters
    ----------
    score: any shape; larger is stranger.
    calibration: ``[n]`` scores of cells from which the score's own parameters were not learned. NaN is left out.

    Notes
    -----
    For a score drawn as the calibration scores were, ``P(p <= a) <= a`` (Vovk, Gammerman and Shafer 2005). Cells of a
    few donors are not quite that: a new donor's cells are strange together, so that the rate differs between donors
    and holds on average over them. A guarantee that counts donors as the unit (Lee, Barber and Willett 2023,
    arXiv:2306.06342) cannot give a p below 1 / (1 + donors) and would need twenty of them to say anything at 0.05.
    """
    score = np.asarray(score, dtype=np.float64)
    kept = np.sort(np.asarray(calibration, dtype=np.float64))
    kept = kept[~np.isnan(kept)]
    larger = len(kept) - np.searchsorted(kept, score, side="left")
    return np.where(np.isnan(score), np.nan, (1.0 + larger) / (1.0 + len(kept)))


def bonferroni(p: np.ndarray) -> np.ndarray:
    """One p-value for "all is well" out of several, ``[..., test]`` -> ``[...]``: tests times the smallest, at most 1.

    NaN, a test that could not be made, is not counted; NaN where none could. Valid however the tests depend on each
    other. The harmonic mean needs a factor too (about e ln m; Vovk and Wang 2020, doi:10.1093/biomet/asaa027), follows
    the smallest p anyway, and no longer says which test it was.
    """
    p = np.asarray(p, dtype=np.float64)
    made = ~np.isnan(p)
    smallest = np.where(made, p, np.inf).min(axis=-1, initial=np.inf)
    n = made.sum(axis=-1)
    return np.where(n > 0, np.minimum(1.0, n * np.where(n > 0, smallest, 1.0)), np.nan)


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
        """Conformal p-value ``[cell]`` of the distance. Small means: unlike anything seen in training."""
        return conformal_p(self.distance(embedding), self.calibration)
