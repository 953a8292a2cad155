r"""What the cell encoder knows of the niche, beside principal components and the counts themselves: linear probes.

Three descriptions of the same cells: the bundle's scGPT embedding; as many principal components of log-normalised
counts, fitted on training donors; the log-normalised counts of all genes. From each a ridge regression reads the niche
(density, shares) and, in simulated tissue, the programmes that the simulator set:

.. math:: \hat\beta = \arg\min_\beta \|Y - X\beta\|^2 + \alpha\,n\,\|\beta\|^2

with standardised columns, fitted on training donors, the penalty chosen on validation donors, R2 on donors that the
bundle has not seen. Linear probes say what is easy to read, not what a network could get out at best; they are the
same for all descriptions, which is what an ablation needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ge2hist_core import rng
from ge2hist_core.types import BadInput, Cells
from perturb.known_truth_summary import donor_weights, interval
from perturb.true_effects import READOUTS

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.store import TissueStore

__all__ = ["ENCODERS", "Ablation", "Probe", "Ridge", "fit_probes", "log_normalised", "principal_axes"]

ENCODERS = ("scGPT embedding", "PCA of counts", "all counts")
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
SCALE = 1e4
"""Counts per cell after normalisation."""


@dataclass(frozen=True, eq=False)
class Ridge:
    """A fitted linear reader: ``(x - mean) / scale @ coefficients + intercept``."""

    mean: np.ndarray
    scale: np.ndarray
    coefficients: np.ndarray
    intercept: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """``[cell, feature]`` -> ``[cell, target]``."""
        return (x - self.mean) / self.scale @ self.coefficients + self.intercept

    @classmethod
    def fit(cls, x: np.ndarray, y: np.ndarray, held_out: tuple[np.ndarray, np.ndarray]) -> Ridge:
        """From training features ``[cell, feature]`` and targets ``[cell, target]``.

        Parameters
        ----------
        held_out: features and targets of validation cells; each target takes the penalty of :data:`PENALTIES` with
            the least squared error there.
        """
        mean, scale, centre = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-8), y.mean(axis=0)
        z = (x - mean) / scale
        values, vectors = np.linalg.eigh(z.T @ z / len(z))
        cross = vectors.T @ (z.T @ (y - centre)) / len(z)
        best, least = np.zeros((x.shape[1], y.shape[1])), np.full(y.shape[1], np.inf)
        for penalty in PENALTIES:
            one = cls(mean, scale, vectors @ (cross / (np.maximum(values, 0.0) + penalty)[:, None]), centre)
            error = np.square(one(held_out[0]) - held_out[1]).mean(axis=0)
            better = error < least
            best[:, better], least[better] = one.coefficients[:, better], error[better]
        return cls(mean, scale, best, centre)


def log_normalised(cells: Cells) -> np.ndarray:
    """``[cell, gene]`` float64, log(1 + 10,000 n / N); 0 in a cell without counts."""
    counts = cells.counts.toarray().astype(np.float64)
    return np.log1p(SCALE * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1e-12))


def principal_axes(x: np.ndarray, n: int) -> np.ndarray:
    """The first ``n`` principal axes ``[feature, axis]`` of ``[cell, feature]``, orthonormal, the longest first."""
    _, vectors = np.linalg.eigh(np.cov(x, rowvar=False))
    return vectors[:, ::-1][:, :n]


@dataclass(frozen=True, eq=False)
class Probe:
    """Reads the niche from one description of a cell.

    Parameters
    ----------
    encoder: of :data:`ENCODERS`. readouts: linear reader of :data:`perturb.true_effects.READOUTS`.
    centre, axes: of the principal components, None where the description needs none.
    """

    encoder: str
    readouts: Ridge
    centre: np.ndarray | None = None
    axes: np.ndarray | None = None

    def describe(self, cells: Cells, embedding: np.ndarray) -> np.ndarray:
        """``[cell, feature]`` of these cells, whose embedding is at hand."""
        if self.encoder == ENCODERS[0]:
            return np.asarray(embedding, dtype=np.float64)
        x = log_normalised(cells)
        return x if self.axes is None or self.centre is None else (x - self.centre) @ self.axes

    def __call__(self, cells: Cells, embedding: np.ndarray) -> np.ndarray:
        """``[readout, cell]``."""
        return self.readouts(self.describe(cells, embedding)).T


@dataclass(frozen=True, eq=False)
class Ablation:
    """The probes, and how much each description says.

    Parameters
    ----------
    probes: one per description.
    programmes: reader of the programmes from the embedding, None where the store does not know them.
    figures: plain JSON: ``n`` cells and donors, ``r2`` rows with intervals over donors.
    """

    probes: tuple[Probe, ...]
    programmes: Ridge | None
    figures: dict[str, Any]

    def hold_programmes(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Embeddings after an edit, moved back until the linear reader sees the programmes of before it.

        The least move that does so, ``[cell, dim]`` each; unit length is kept but for the second order of the edit.

        Raises
        ------
        ValueError: no reader of programmes.
        """
        if self.programmes is None:
            raise ValueError("the programmes of this store are not known")
        axes = self.programmes.coefficients / self.programmes.scale[:, None]
        return (after + (before - after) @ axes @ np.linalg.pinv(axes)).astype(np.float32)


def fit_probes(
    model: GE2Hist, store: TissueStore, *, cells: tuple[int, int, int] = (4000, 1000, 1500), seed: int = 0
) -> Ablation:
    """Fit the probes and measure them.

    Parameters
    ----------
    cells: of training, validation and unseen donors, at the most; drawn at random among those with a whole tile.

    Raises
    ------
    BadInput: donors of a part are missing.
    """
    learned = {part: model.has_learned_from(store, (part,)) for part in ("train", "validation")}
    learned["validation"] = learned["validation"] - learned["train"]
    unseen = set(store.donors) - model.has_learned_from(store)
    rows = {}
    for (part, donors), most in zip((learned | {"unseen": unseen}).items(), cells, strict=True):
        pool = store.rows(sorted(donors))
        if len(pool) < 10:
            raise BadInput(
                f"{store.path} has {len(pool)} cells of {part} donors for the ablation of the encoder: "
                "give the store that the bundle was trained on."
            )
        rows[part] = np.sort(rng.stream(seed, "ablation cells", part).permutation(pool)[:most])
    some = {part: store.cells.take(one) for part, one in rows.items()}
    embedding = {part: model.embed(one, seed).astype(np.float64) for part, one in some.items()}
    counts = {part: log_normalised(one) for part, one in some.items()}
    centre = counts["train"].mean(axis=0)
    axes = principal_axes(counts["train"], model.config.embedding_dim)
    described = dict(
        zip(ENCODERS, (embedding, {part: (x - centre) @ axes for part, x in counts.items()}, counts), strict=True)
    )
    columns = [name for name in store.obs if str(name).startswith("programme_")]
    niche = {part: _readings(store, one) for part, one in rows.items()}
    programmes = {part: store.obs[columns].to_numpy(dtype=np.float64)[one] for part, one in rows.items()}
    weights = donor_weights(np.asarray(some["unseen"].donor), seed)
    names = [*READOUTS, *(name.removeprefix("programme_") for name in columns)]
    probes, readers, r2 = [], {}, {}
    for name, x in described.items():
        y = {part: np.hstack([niche[part], programmes[part]]) for part in rows}
        ridge = Ridge.fit(x["train"], y["train"], (x["validation"], y["validation"]))
        k = len(READOUTS)
        niche_part = replace(ridge, coefficients=ridge.coefficients[:, :k], intercept=ridge.intercept[:k])
        readers[name] = replace(ridge, coefficients=ridge.coefficients[:, k:], intercept=ridge.intercept[k:])
        probes.append(Probe(name, niche_part, *((centre, axes) if name == ENCODERS[1] else ())))
        r2[name] = _r2(y["unseen"], ridge(x["unseen"]), weights)
    figures = {
        "n": {part: len(one) for part, one in rows.items()},
        "n_donors": {part: len(set(one.donor)) for part, one in some.items() if one.donor is not None},
        "width": {name: int(x["train"].shape[1]) for name, x in described.items()},
        "r2": _table(r2, names, len(unseen)),
        "difference": _table({f"{ENCODERS[0]} - {ENCODERS[1]}": r2[ENCODERS[0]] - r2[ENCODERS[1]]}, names, len(unseen)),
    }
    return Ablation(tuple(probes), readers[ENCODERS[0]] if columns else None, figures)


def _readings(store: TissueStore, rows: np.ndarray) -> np.ndarray:
    """True readouts of the tissue as it is, ``[cell, readout]``, the cell itself counted."""
    from ge2hist_core.config import READER_CLASSES, TILE_PX, VISIBLE_CLASS

    classes = [READER_CLASSES.index(VISIBLE_CLASS.get(name, name)) for name in store.cell_types]
    own = np.array([READER_CLASSES.index(VISIBLE_CLASS.get(name, name)) for name in store.obs["cell_type"]])[rows]
    counts = store.neighbour_counts(rows) @ np.eye(len(READER_CLASSES))[classes]
    counts[np.arange(len(rows)), own] += 1
    total = counts.sum(axis=1, keepdims=True)
    return np.hstack([total / (TILE_PX * store.um_per_px / 1000.0) ** 2, counts / total])


def _r2(true: np.ndarray, read: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """``[target, resample]``; NaN for a target that does not vary."""
    left = np.square(true - read).T @ weights.T
    spread = np.square(true).T @ weights.T - np.square(true.T @ weights.T)
    return 1.0 - np.divide(left, spread, out=np.full_like(left, np.nan), where=spread > 1e-12)


def _table(r2: dict[str, np.ndarray], names: Sequence[str], n_donors: int) -> list[dict[str, Any]]:
    """Per description: density, shares and programmes (mean over classes or programmes), then each one."""
    groups = {"density": [0], "shares": list(range(1, len(READOUTS)))}
    if len(names) > len(READOUTS):
        groups["programmes"] = list(range(len(READOUTS), len(names)))
    groups |= {name: [i] for i, name in enumerate(names) if i}
    rows = []
    for encoder, values in r2.items():
        for what, part in groups.items():
            # A class that no tile of these cells shows has no R2 and is left out of the mean.
            known = [i for i in part if np.isfinite(values[i, 0])]
            if known:
                rows.append({"encoder": encoder, "what": what, "r2": interval(values[known].mean(axis=0), n_donors)})
    return rows
