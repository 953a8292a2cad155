"""Read-back: how much of a cell's expression an independent regression recovers from its picture.

A ridge regression from features of the picture to expression is fitted on real tiles of training donors and applied to
pictures of held-out cells: real tiles, GE2Hist's, its rivals'. It knows no model. A picture that shows what the
expression says lets it recover as much as the real tile does; a beautiful picture of another cell lets it recover
nothing.

Features: those of the bundle's reader, of the whole tile and of its middle, and of stain and texture. Expression: the
leading principal components of standardised log counts per 10,000, weighed by their variance.

    R2 = 1 - sum (y - prediction)^2 / sum (y - mean y)^2

It is negative where the prediction is worse than the mean of the held-out cells, as when pictures are off in stain;
the correlation over components does not see such shifts and is given beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ge2hist_core.evaluation.readings import bootstrap_weights, percentiles, units

if TYPE_CHECKING:
    import scipy.sparse as sp

    from ge2hist_core.image_features import Features

__all__ = ["PictureReader", "expression_scores", "fit_reader", "picture_features", "recovered"]

COMPONENTS = 20
MOST_GENES = 2000
MIDDLE_PX = 48
ALPHAS = np.logspace(0, 6, 7)
FOLDS = 4


def picture_features(images: np.ndarray, reader: Features, texture: Features) -> np.ndarray:
    """``[n, d]``: the reader on the tile and on the square of ``MIDDLE_PX`` in its middle, stain and texture."""
    side = min(MIDDLE_PX, images.shape[1])
    start = (images.shape[1] - side) // 2
    middle = np.ascontiguousarray(images[:, start : start + side, start : start + side])
    return np.concatenate([reader(images), reader(middle), texture(images)], axis=1)


def expression_scores(training: sp.csr_matrix, held_out: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray, float]:
    """Principal components of expression, fitted on the training cells.

    Returns
    -------
    Scores ``[training cell, component]``, ``[held-out cell, component]``, and the share of the training cells' variance
    that the components hold.
    """
    fitted, asked = _log_normalised(training), _log_normalised(held_out)
    variance = fitted.var(axis=0)
    genes = np.sort(np.argsort(-variance, kind="stable")[:MOST_GENES])
    genes = genes[variance[genes] > 0]
    mean, std = fitted[:, genes].mean(axis=0), fitted[:, genes].std(axis=0)
    fitted, asked = (fitted[:, genes] - mean) / std, (asked[:, genes] - mean) / std
    values, axes = np.linalg.eigh(fitted.T @ fitted / len(fitted))
    k = min(COMPONENTS, len(values), len(fitted) - 1)
    leading = axes[:, ::-1][:, :k]
    return fitted @ leading, asked @ leading, float(values[::-1][:k].sum() / values.sum())


def _log_normalised(counts: sp.csr_matrix) -> np.ndarray:
    dense = np.asarray(counts.toarray(), dtype=np.float64)
    return np.log1p(1e4 * dense / np.maximum(dense.sum(axis=1, keepdims=True), 1.0))


@dataclass(frozen=True, eq=False)
class PictureReader:
    """Ridge regression from standardised features; ``alpha`` was chosen by leaving out donors of the training."""

    mean: np.ndarray
    std: np.ndarray
    coefficients: np.ndarray
    intercept: np.ndarray
    alpha: float

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """``[n, d]`` -> ``[n, component]``."""
        # What training tiles never show is cut off: a foreign picture must not decide by one wild feature.
        z = np.clip((features - self.mean) / self.std, -6.0, 6.0)
        return z @ self.coefficients.T + self.intercept


def fit_reader(features: np.ndarray, scores: np.ndarray, donor: np.ndarray) -> PictureReader:
    """Fit on features ``[tile, d]`` and scores ``[tile, component]`` of training tiles with their ``donor [tile]``."""
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GroupKFold

    mean, std = features.mean(axis=0), features.std(axis=0)
    std = np.where(std > 1e-9, std, 1.0)
    z = np.clip((features - mean) / std, -6.0, 6.0)
    donors = len(np.unique(donor))
    folds = list(GroupKFold(min(FOLDS, donors)).split(z, scores, donor)) if donors > 1 else None
    ridge = RidgeCV(ALPHAS, cv=folds).fit(z, scores)
    intercept = np.broadcast_to(ridge.intercept_, scores.shape[1:])
    return PictureReader(mean, std, np.atleast_2d(ridge.coef_), intercept, float(ridge.alpha_))


def recovered(
    true: np.ndarray, predictions: Mapping[str, np.ndarray], real: str, donor: np.ndarray, seed: int
) -> dict[str, dict[str, Any]]:
    """How much of ``true [cell, component]`` each method's predictions recover.

    Parameters
    ----------
    predictions: method -> ``[cell, component]``. real: the key of the real tiles. donor: ``[cell]``.

    Returns
    -------
    Method -> ``n``, ``r2``, ``share_of_real`` (of the real tiles' R2, paired) and ``correlation``, each with the 95 %
    percentile interval over donors and their cells.
    """
    weights = np.concatenate([np.ones((1, len(true))), bootstrap_weights(seed, donor, len(true))])
    r2 = {name: _r2(true, guess, weights) for name, guess in predictions.items()}
    out = {}
    for name, guess in predictions.items():
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(r2[real] > 0, r2[name] / r2[real], np.nan)
        figures = {"r2": r2[name], "share_of_real": share, "correlation": _correlation(true, guess, weights)}
        out[name] = {"n": len(true)} | {
            key: _figure(values, units(donor, len(true))) for key, values in figures.items()
        }
    return out


def _figure(values: np.ndarray, resampled: int) -> dict[str, float]:
    low, high = percentiles(values[1:], resampled)
    return {"value": float(values[0]), "low": low, "high": high}


def _r2(true: np.ndarray, guess: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """``[resample]`` R2 over all components together."""
    error, spread = weights @ ((true - guess) ** 2).sum(axis=1), _products(true, true, weights)
    # A resample of few cells may hold a single one.
    return 1.0 - error / np.where(spread > 1e-9, spread, np.nan)


def _correlation(true: np.ndarray, guess: np.ndarray, weights: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.sqrt(_products(true, true, weights) * _products(guess, guess, weights))
        return np.where(scale > 1e-12, _products(true, guess, weights) / scale, np.nan)


def _products(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """``[resample]`` weighted sum of products of deviations from the weighted mean, over cells and components."""
    shifted = a - a.mean(axis=0), b - b.mean(axis=0)
    total = weights.sum(axis=1)
    means = (weights @ shifted[0]) * (weights @ shifted[1])
    return weights @ (shifted[0] * shifted[1]).sum(axis=1) - means.sum(axis=1) / total
