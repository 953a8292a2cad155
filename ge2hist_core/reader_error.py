r"""Counts as the reader finds them -> counts as they are, from the reader's measured errors.

On tiles with known nuclei the reader finds a nucleus of true type t with probability :math:`r_t` (recall) and names it
f with probability :math:`c_{tf}` (confusion); it also finds nuclei where there are none, :math:`\varphi_f` of each type
per mm2. With the true counts T and the tile's area A the found counts F have the mean

.. math:: E[F] = T R + \varphi A, \qquad R_{tf} = r_t c_{tf},

so that :math:`(\bar F - \varphi A) R^{-1}` estimates the mean of T whatever the composition: the correction of a
screening test's prevalence (Rogan and Gladen 1978, doi:10.1093/oxfordjournals.aje.a112510) for several classes. Solved
by least squares over T >= 0, with a small pull towards the counts as found, so that two types that the reader cannot
tell apart stay as found instead of running off against each other.

Assumed: errors on the pictures at hand are those on the tiles judged (for generated pictures the ones that the
autoencoder gave back, where the bundle records them), and false nuclei come per area.

Knows tables alone, neither pictures nor models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ge2hist_core import rng
from ge2hist_core.config import TILE_PX, UM_PER_PX
from ge2hist_core.types import BadInput

__all__ = ["RIDGE", "ReaderError"]

RIDGE = 1e-4
"""Squared weight of "as found" against the fit. It moves a type read with 0.9 by 1 in 10,000 of its correction's size
and stops one read with less than about 0.01."""

_TILE_MM2 = (TILE_PX * UM_PER_PX) ** 2 / 1e6


@dataclass(frozen=True, eq=False)
class ReaderError:
    """What became of the nuclei of the tiles that a reader was judged on.

    Parameters
    ----------
    classes: types, in the order of every axis.
    outcome: ``[type, type + 1]`` nuclei by true type (rows) and found type; the last column counts the missed ones.
    false: ``[type]`` found nuclei that are none, by the type they were given.
    area_mm2: of all tiles judged.

    Raises
    ------
    ValueError: shapes that do not fit, negative counts, no area.
    """

    classes: tuple[str, ...]
    outcome: np.ndarray
    false: np.ndarray
    area_mm2: float

    def __post_init__(self) -> None:
        k = len(self.classes)
        for name, shape in (("outcome", (k, k + 1)), ("false", (k,))):
            value = np.asarray(getattr(self, name), dtype=np.float64)
            if value.shape != shape or not np.isfinite(value).all() or (value < 0).any():
                raise ValueError(f"{name} must hold counts >= 0 of shape {shape}, got {value.shape}")
            object.__setattr__(self, name, value)
        if not self.area_mm2 > 0:
            raise ValueError(f"area_mm2 must be > 0, got {self.area_mm2}")

    @classmethod
    def from_figures(cls, figures: Mapping[str, Any], classes: Sequence[str]) -> ReaderError:
        """From ``reader.json``'s figures; those of tiles that the autoencoder gave back are taken where there are any.

        ``true_counts`` and ``found_counts`` by type say which types were missed and made up. Figures without them
        (written by earlier versions) have one recall for all types, and false nuclei in the proportions of those found.

        Raises
        ------
        BadInput: a reader that was not judged, or figures of other types.
        """
        figures = figures.get("reconstructed", figures)
        try:
            matched = np.array([[figures["confusion"][t][f] for f in classes] for t in classes], dtype=np.float64)
            recall, precision, n_tiles = (float(figures[name]) for name in ("recall", "precision", "n_tiles"))
            true = figures.get("true_counts")
            found = figures.get("found_counts")
            if true is None or found is None:
                missed = matched.sum(1) * (1 / recall - 1)
                false = matched.sum(0) * (1 / precision - 1)
            else:
                missed = np.array([true[name] for name in classes]) - matched.sum(1)
                false = np.array([found[name] for name in classes]) - matched.sum(0)
            return cls(tuple(classes), np.column_stack([matched, missed]), false, n_tiles * _TILE_MM2)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise BadInput(
                f"The reader's figures lack its errors by type ({error}): judge it with `train-reader`."
            ) from None

    @property
    def matrix(self) -> np.ndarray:
        """``[true, found]`` R: probability that a nucleus of a type is found as each type.

        With the prior that one more nucleus of each type was found as what it is: a type that no judged tile held is
        taken to be read without error, which its interval then does not widen.
        """
        k = len(self.classes)
        outcome = self.outcome + np.eye(k, k + 1)
        return (outcome / outcome.sum(1, keepdims=True))[:, :k]

    @property
    def false_per_mm2(self) -> np.ndarray:
        """``[type]`` false nuclei per mm2."""
        return self.false / self.area_mm2

    @property
    def recall(self) -> np.ndarray:
        """``[type]`` share of the nuclei that are found, as whatever type; NaN for a type that was not judged."""
        total = self.outcome.sum(1)
        found = self.outcome[:, :-1].sum(1)
        return np.divide(found, total, out=np.full(len(total), np.nan), where=total > 0)

    def correct(self, found: np.ndarray, area_mm2: float, ridge: float = RIDGE) -> np.ndarray:
        """True counts ``[..., type]`` for mean found counts ``[..., type]`` of pictures of an area, never negative.

        Give means over an arm's pictures: "never negative" applied to single pictures would push their mean up.

        Parameters
        ----------
        ridge: see the module; 0 for the plain inverse.
        """
        return _solve(np.asarray(found, dtype=np.float64), self.matrix, self.false_per_mm2 * area_mm2, ridge)

    def draws(self, n: int, seed: int) -> list[ReaderError]:
        """``n`` readers whose errors are drawn as another judging would have counted them.

        Each true type's nuclei fall anew into found and missed (multinomial), false nuclei are Poisson. Draw i depends
        on (seed, i) alone, so that both arms of a comparison can be corrected with the same ones.
        """
        k = len(self.classes)
        prior = self.outcome + np.eye(k, k + 1)
        share = prior / prior.sum(1, keepdims=True)
        n_true = np.rint(self.outcome.sum(1)).astype(int)
        drawn = []
        for i in range(n):
            stream = rng.stream(seed, "reader error", i)
            drawn.append(
                ReaderError(self.classes, stream.multinomial(n_true, share), stream.poisson(self.false), self.area_mm2)
            )
        return drawn


def _solve(found: np.ndarray, matrix: np.ndarray, false: np.ndarray, ridge: float) -> np.ndarray:
    """Minimum over T >= 0 of ``|F - false - T R|^2 + ridge |T - F|^2``, each row of ``found [..., type]``."""
    from scipy.optimize import nnls

    k = len(matrix)
    rows = found.reshape(-1, k)
    a = np.vstack([matrix.T, np.sqrt(ridge) * np.eye(k)])
    b = np.hstack([rows - false, np.sqrt(ridge) * rows])
    # Most answers are positive without being told so; only the others need the slower solver.
    answer = np.linalg.lstsq(a, b.T, rcond=None)[0].T
    for i in np.flatnonzero((answer < 0).any(axis=1)):
        answer[i] = nnls(a, b[i])[0]
    return answer.reshape(found.shape)
