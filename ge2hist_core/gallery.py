"""Pictures for chosen states: cell types x environments (the paper's Figure 4), and the way between two cells.

The second way of conditioning, equation (3): z_c is drawn from a type's mixture component instead of coming from a
cell's expression; z_e comes from a cell, from its prior N(0, I), or from a step along one of its main axes over
training cells. All pictures of a gallery share their noise, so that what differs between two of them comes from the
state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ge2hist_core.config import READER_CLASSES, SampleConfig, to_json
from ge2hist_core.niche import niche_stats
from ge2hist_core.types import BadInput, Latent

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist, Preview

__all__ = [
    "MAX_PICTURES",
    "Gallery",
    "axis_environments",
    "between",
    "cell_types",
    "draw",
    "prior_environments",
    "readouts",
]

MAX_PICTURES = 256
AXIS_STEPS = (-2.0, -1.0, 0.0, 1.0, 2.0)
"""Standard deviations along an axis of z_e."""


@dataclass(frozen=True, eq=False)
class Gallery:
    """A grid of states: each row's z_c with each column's z_e, or the rows alone where there are no columns.

    Parameters
    ----------
    rows, columns: titles. z_c: ``[row, d_c]``. z_e: ``[column, d_e]``.
    seed: of the noise that all pictures share. sample: how they are drawn.
    paired: True where picture i has row i's z_c and column i's z_e (a path), so that the grid is a single row.

    Raises
    ------
    BadInput: no row or column, more than 256 pictures.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    z_c: np.ndarray
    z_e: np.ndarray
    seed: int = 0
    sample: SampleConfig = SampleConfig()
    paired: bool = False

    def __post_init__(self) -> None:
        if not self.rows or not self.columns:
            raise BadInput("The gallery is empty: choose at least one cell type and one environment.")
        if len(self.rows) != len(self.z_c) or len(self.columns) != len(self.z_e):
            raise ValueError(f"{len(self.rows)} x {len(self.columns)} titles, {len(self.z_c)} x {len(self.z_e)} states")
        if self.paired and len(self.rows) != len(self.columns):
            raise ValueError(f"a path needs as many z_c as z_e, got {len(self.rows)} and {len(self.columns)}")
        if len(self.latent) > MAX_PICTURES:
            raise BadInput(
                f"{len(self.latent)} pictures are more than {MAX_PICTURES}: choose fewer types or environments."
            )

    @property
    def latent(self) -> Latent:
        """``[picture]`` states, row by row."""
        if self.paired:
            return Latent(self.z_c, self.z_e)
        n = len(self.columns)
        return Latent(np.repeat(self.z_c, n, axis=0), np.tile(self.z_e, (len(self.rows), 1)))

    @property
    def titles(self) -> list[tuple[str, str]]:
        """Row and column title of each picture."""
        if self.paired:
            return list(zip(self.rows, self.columns, strict=True))
        return [(row, column) for row in self.rows for column in self.columns]

    def hash(self, model_sha256: str) -> str:
        """SHA-256 of all that decides the pictures."""
        digest = hashlib.sha256(json.dumps([model_sha256, self.seed, to_json(self.sample)], sort_keys=True).encode())
        for part in (self.latent.z_c, self.latent.z_e):
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()


def cell_types(model: GE2Hist, names: Sequence[str], seed: int) -> np.ndarray:
    """One z_c per type, drawn from its mixture component, ``[type, d_c]``.

    Raises
    ------
    BadInput: a type that the model does not know, or a bundle without mixture.
    """
    rows = [model.sample_type(name, 1, seed) for name in names]
    return np.concatenate(rows) if rows else np.empty((0, model.config.d_c), np.float32)


def prior_environments(model: GE2Hist, n: int, seed: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Titles and z_e of ``n`` draws from the prior."""
    return tuple(f"prior draw {i + 1}" for i in range(n)), model.sample_environment(n, seed)


def axis_environments(model: GE2Hist, axis: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Titles and z_e at -2 to 2 standard deviations along a principal axis of z_e over training cells.

    Parameters
    ----------
    axis: 0 is the axis of the largest variance. The sign of an axis is chosen so that its largest loading is positive.

    Raises
    ------
    BadInput: a bundle without training cells to take the axes from, or no such axis.
    """
    from sklearn.decomposition import PCA

    if model.support is None:
        raise BadInput("This bundle holds no training cells to take the axes of z_e from: use the prior or a cell.")
    z_e = model.encode(model.support.reference).z_e.astype(np.float64)
    most = min(z_e.shape[1], len(z_e) - 1)
    if not 0 <= axis < most:
        raise BadInput(f"axis is {axis}: choose 0 to {most - 1}.")
    pca = PCA(axis + 1, svd_solver="full").fit(z_e)
    direction = pca.components_[axis] * np.sign(pca.components_[axis][np.abs(pca.components_[axis]).argmax()])
    steps = np.array(AXIS_STEPS)[:, None] * np.sqrt(pca.explained_variance_[axis])
    return tuple(f"{step:+g} sd" for step in AXIS_STEPS), (pca.mean_ + steps * direction).astype(np.float32)


def between(a: Latent, b: Latent, n: int, part: str) -> Latent:
    """States on the straight line from one cell to another, both ends included.

    Parameters
    ----------
    a, b: one cell each. n: states, at least 2. part: ``"z_c"``, ``"z_e"`` or ``"both"``; the other stays as in ``a``.

    Raises
    ------
    BadInput: fewer than two states, or another part.
    """
    if n < 2:
        raise BadInput(f"{n} states make no way between two cells: choose at least 2.")
    if part not in ("z_c", "z_e", "both"):
        raise BadInput(f"part is {part!r}: choose z_c, z_e or both.")
    share = np.linspace(0.0, 1.0, n, dtype=np.float32)[:, None]
    moved = {name: getattr(a, name) * (1 - share) + getattr(b, name) * share for name in ("z_c", "z_e")}
    still = {name: np.repeat(getattr(a, name), n, axis=0) for name in ("z_c", "z_e")}
    return Latent(*(moved[name] if part in (name, "both") else still[name] for name in ("z_c", "z_e")))


def draw(
    gallery: Gallery, model: GE2Hist, on_step: Callable[[int, int, Preview], bool | None] | None = None
) -> np.ndarray:
    """Every picture from the same noise, uint8 ``[picture, H, W, 3]``; ``on_step`` as in :meth:`GE2Hist.generate`."""
    latent = gallery.latent
    return model.generate(latent, [gallery.seed] * len(latent), gallery.sample, on_step)


def readouts(gallery: Gallery, model: GE2Hist, images: np.ndarray) -> pd.DataFrame:
    """What the reader sees in each picture: ``row, column, n, density, spacing``, ``fraction:<class>``."""
    side = model.config.tile_px * model.config.um_per_px
    rows = []
    for (row, column), nuclei in zip(gallery.titles, model.read_nuclei(images), strict=True):
        values = niche_stats(nuclei, (side, side), READER_CLASSES).readouts()
        kept = {name: v for name, v in values.items() if name in ("density", "spacing") or name.startswith("fraction")}
        rows.append({"row": row, "column": column, "n": len(nuclei)} | kept)
    return pd.DataFrame(rows)
