"""Cells of a section whose outlines and counts are given: what the readers of other formats hand to ``prepare``.

Xenium folders, SpatialData stores and spot data each have their own files and coordinates. Their readers bring them to
one record: outlines in um of the H&E (x right, y down from its top left corner), counts per cell, and an account of
every count that is in no cell. This module knows no file format.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import scipy.sparse as sp

from ge2hist_core.slide_image import SlideImage
from ge2hist_core.types import BadInput

__all__ = ["Account", "SlideCells", "clusters", "outlines_of_labels", "project", "scale_of", "whole_counts"]

SCALE_DIFFERENCE = 0.05
"""Relative difference between two statements of a picture's scale that is still taken for rounding."""
COMPONENTS = 30
TARGET_SUM = 1e4


@dataclass(frozen=True)
class Account:
    """Where the UMIs (Xenium: transcripts) of genes went; ``parts`` sum to ``total`` exactly.

    Parameters
    ----------
    parts: by reason; ``assigned`` are those in the cells of the store.
    """

    total: int
    parts: Mapping[str, int]

    def __post_init__(self) -> None:
        if sum(self.parts.values()) != self.total:
            raise ValueError(f"{sum(self.parts.values())} UMIs are accounted for, there are {self.total}: {self.parts}")

    @classmethod
    def of(cls, figures: Mapping[str, int]) -> Account:
        """From ``total`` and the parts in one mapping, as the report keeps them."""
        return cls(figures["total"], {k: v for k, v in figures.items() if k != "total"})

    @classmethod
    def together(cls, accounts: Iterable[Account]) -> Account:
        """Of several sections."""
        accounts = list(accounts)
        names = dict.fromkeys(name for account in accounts for name in account.parts)
        return cls(
            sum(a.total for a in accounts), {name: sum(a.parts.get(name, 0) for a in accounts) for name in names}
        )

    def text(self) -> str:
        """One line for the user: every part in UMIs and percent."""
        share = 100.0 / max(self.total, 1)
        listed = (f"{name.replace('_', ' ')} {n:,} ({n * share:.1f} %)" for name, n in self.parts.items())
        return f"{self.total:,} UMIs = {', '.join(listed)}"


@dataclass(frozen=True, eq=False)
class SlideCells:
    """The cells of one section.

    Parameters
    ----------
    section: its name, "" where there is one only.
    image: the H&E, open.
    unit: what one row is: ``nucleus``, ``cell`` or ``spot``.
    names: ``[cell]`` as their file calls them.
    outlines: ``[cell]`` shapely polygons, um of the picture.
    counts: ``[cell, gene]`` CSR, whole numbers.
    genes: one row per gene, index symbol (unique).
    dropped: UMIs of genes that are in no row, by reason.
    density: places ``[n, 2]`` um of the picture and UMIs ``[n]`` there, to check the registration by; None for spots.
    obs: further columns ``[cell]`` for the store's table, among them ``cell_type`` where the file has one.
    spot_um: diameter of a spot.
    figures: what the reader has found out, for the report. warnings: sentences for the user.
    """

    section: str
    image: SlideImage
    unit: str
    names: np.ndarray
    outlines: np.ndarray
    counts: sp.csr_matrix
    genes: pd.DataFrame
    dropped: dict[str, int]
    density: tuple[np.ndarray, np.ndarray] | None
    obs: pd.DataFrame
    spot_um: float | None = None
    figures: dict[str, object] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.names)
        if self.unit not in ("nucleus", "cell", "spot"):
            raise ValueError(f"unit is {self.unit!r}")
        if (len(self.outlines), self.counts.shape, len(self.obs)) != (n, (n, len(self.genes)), n):
            raise ValueError(
                f"{n} names, {len(self.outlines)} outlines, counts {self.counts.shape}, {len(self.genes)} genes, "
                f"{len(self.obs)} rows of obs"
            )
        if len(set(self.names)) != n:
            raise BadInput(f"A {self.unit} is named twice in {self.section or self.image.name}: give each name once.")

    @property
    def xy_um(self) -> np.ndarray:
        """``[cell, 2]`` centroids of the outlines."""
        import shapely

        return shapely.get_coordinates(shapely.centroid(self.outlines)).reshape(-1, 2)


def project(matrix: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Points ``[n, 2]`` through a ``[3, 3]`` homography (affine: last row 0, 0, 1)."""
    xy = np.asarray(xy, dtype=np.float64)
    out = xy @ matrix[:2, :2].T + matrix[:2, 2]
    return out / (xy @ matrix[2, :2] + matrix[2, 2])[:, None]


def scale_of(matrix: np.ndarray, xy: np.ndarray) -> float:
    """Units out per unit in about the points ``[n, 2]``: the root of the area that a small square becomes.

    Raises
    ------
    BadInput: it differs by more than 2 % between the points, or is 0: no picture of one scale lies so.
    """
    w = np.asarray(xy) @ matrix[2, :2] + matrix[2, 2]
    # The Jacobian determinant of a homography is det(H) / w^3.
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = np.sqrt(np.abs(np.linalg.det(matrix) / w**3))
    if not np.isfinite(scales).all() or scales.min() <= 0 or np.ptp(scales) > 0.02 * scales.mean():
        raise BadInput(
            f"The alignment matrix scales by {np.nanmin(scales):.3g} to {np.nanmax(scales):.3g} over the picture: give "
            "the 3 x 3 matrix that Xenium Explorer exports (affine: last row 0, 0, 1)."
        )
    return float(scales.mean())


def outlines_of_labels(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels ``[H, W]`` -> the labels that occur, and their outlines in px: pixel (r, c) covers [c, c + 1)."""
    import shapely
    from scipy.ndimage import find_objects
    from skimage.measure import find_contours

    ids, dense = np.unique(labels, return_inverse=True)
    dense = dense.reshape(labels.shape) + int(ids[0] != 0)
    ids = ids[ids != 0]
    shapes = []
    for i, box in enumerate(find_objects(dense), start=1):
        contour = max(find_contours(np.pad(dense[box] == i, 1).astype(float), 0.5), key=len)
        shapes.append(shapely.Polygon(contour[:, ::-1] + np.array([box[1].start, box[0].start]) - 0.5))
    return ids, np.array(shapes, dtype=object)


def whole_counts(counts: sp.spmatrix | np.ndarray, source: str) -> sp.csr_matrix:
    """Counts as CSR.

    Raises
    ------
    BadInput: values that are no counts.
    """
    counts = sp.csr_matrix(counts)
    data = counts.data
    if data.size and (not np.isfinite(data).all() or data.min() < 0 or (data != np.floor(data)).any()):
        raise BadInput(
            f"{source} holds values that are no raw counts (from {np.nanmin(data):g} to {np.nanmax(data):g}): give the "
            "matrix of counts before normalisation."
        )
    counts.sum_duplicates()
    return counts


def clusters(counts: sp.csr_matrix, n_clusters: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows by expression: log-normalised counts, ``COMPONENTS`` directions of a truncated SVD, k-means.

    Clusters are named by size, ``Cluster 1`` the largest.

    Returns
    -------
    Names ``[row]`` and confidences ``[row]``: 1 - (distance to the own centre) / (distance to the next), 0 on the
    border between two.

    Raises
    ------
    BadInput: fewer rows than clusters.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD

    from ge2hist_core.rng import stream

    if not 2 <= n_clusters <= counts.shape[0]:
        raise BadInput(f"clusters is {n_clusters}: choose 2 to {counts.shape[0]}, the number of rows.")
    total = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1.0)
    x = sp.csr_matrix(sp.diags_array(TARGET_SUM / total) @ counts, dtype=np.float64)
    x.data = np.log1p(x.data)
    state = int(stream(seed, "clusters").integers(2**31))
    n = min(COMPONENTS, min(x.shape) - 1)
    # The first direction of uncentred data is close to the mean; k-means does not mind.
    points = TruncatedSVD(n, algorithm="arpack", random_state=state).fit_transform(x) if n else x.toarray()
    fitted = KMeans(n_clusters, n_init=10, random_state=state).fit(points)
    distance = np.sort(fitted.transform(points), axis=1)
    confidence = 1.0 - np.divide(distance[:, 0], distance[:, 1], out=np.ones(len(distance)), where=distance[:, 1] > 0)
    rank = np.empty(n_clusters, dtype=np.int64)
    rank[np.argsort(-np.bincount(fitted.labels_, minlength=n_clusters), kind="stable")] = np.arange(1, n_clusters + 1)
    return np.array([f"Cluster {rank[k]}" for k in fitted.labels_], dtype=object), confidence.astype(np.float32)
