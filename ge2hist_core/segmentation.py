"""Nuclei of a whole slide as one label image, tile by tile, with any segmenter.

A segmenter turns one small picture into instance labels. :func:`segment` leads it over the slide in tiles that overlap,
and merges at the seams: a nucleus belongs to the tile in whose core its centre lies, is written with all its pixels,
and is left out where half of it is taken already (the neighbour tile has found it too). Outlines from elsewhere
(Space Ranger 4, QuPath) become labels by :func:`paint_outlines`.

Label images are int32 arrays or memory maps ``[H, W]``; 0 is background.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd

from ge2hist_core.slide_image import SlideImage
from ge2hist_core.types import BadInput

__all__ = [
    "SEGMENTERS",
    "Crop",
    "Segmenter",
    "TileDone",
    "expand_labels_tiled",
    "load_segmenter",
    "nuclei_table",
    "paint_outlines",
    "segment",
]

CORE_UM = 256.0
MARGIN_UM = 20.0
"""Context around a core: more than a large nucleus and the surroundings that thresholds look at."""
SEAM_UM = 1.5
"""A centre may be seen this far on the wrong side of a seam: two tiles never see quite the same."""
TAKEN = 0.5
MIN_AREA_UM2 = 6.0
EXPAND_PX = 2048
LEAST_PX = 16
"""Smaller pictures are not looked at."""


class Crop(NamedTuple):
    """Part of a slide on the pixel grid of its scale: pixel (0, 0) of the crop is (top, left) of the slide's grid."""

    top: int
    left: int
    height: int
    width: int


class TileDone(NamedTuple):
    """A finished tile: how many of ``tiles`` are done, and the highest label given so far."""

    done: int
    tiles: int
    n_labels: int


class Segmenter(Protocol):
    """Anything that outlines nuclei in one picture.

    ``um_per_px`` is the scale at which it wants to look; called with uint8 ``[h, w, 3]`` and the scale that the picture
    has, it returns int ``[h, w]`` instance labels. Called from several threads at once if ``workers`` is above 1.
    """

    @property
    def um_per_px(self) -> float: ...

    def __call__(self, picture: np.ndarray, um_per_px: float) -> np.ndarray: ...


@dataclass(frozen=True)
class ClassicalSegmenter:
    """The training-free reader of :mod:`ge2hist_core.nuclei`: needs no weights, counts crowded nuclei too few."""

    um_per_px: float = 0.25

    def __call__(self, picture: np.ndarray, um_per_px: float) -> np.ndarray:
        from ge2hist_core.nuclei import ClassicalReader

        # Empty glass has no threshold to find.
        if int(np.ptp(picture.astype(np.int16), axis=(0, 1)).max()) < 16:
            return np.zeros(picture.shape[:2], dtype=np.int32)
        return ClassicalReader().segment(picture, um_per_px)


@dataclass(frozen=True, eq=False)
class StarDistSegmenter:
    """StarDist (Schmidt et al. 2018, doi:10.1007/978-3-030-00934-2_30) with its H&E model ``2D_versatile_he``."""

    model: Any
    um_per_px: float = 0.25

    @classmethod
    def load(cls, weights: Path | None) -> StarDistSegmenter:
        try:
            from stardist.models import StarDist2D
        except ImportError:
            raise BadInput(
                "The segmenter stardist needs its package: pip install stardist tensorflow, or choose --segmenter "
                "classical."
            ) from None
        if weights is None:
            return cls(_fetched("stardist", lambda: StarDist2D.from_pretrained("2D_versatile_he")))
        if not (weights / "config.json").is_file():
            raise BadInput(f"{weights} holds no config.json: give the unpacked StarDist model folder.")
        return cls(StarDist2D(None, name=weights.name, basedir=str(weights.parent)))

    def __call__(self, picture: np.ndarray, um_per_px: float) -> np.ndarray:
        low, high = np.percentile(picture, (1.0, 99.8))
        labels, _ = self.model.predict_instances((picture - low) / max(high - low, 1.0), verbose=False)
        return labels


@dataclass(frozen=True, eq=False)
class InstanSegSegmenter:
    """InstanSeg (Goldsborough et al. 2024, arXiv:2408.15954) with its ``brightfield_nuclei`` model."""

    model: Any
    um_per_px: float = 0.5

    @classmethod
    def load(cls, weights: Path | None) -> InstanSegSegmenter:
        try:
            from instanseg import InstanSeg
        except ImportError:
            raise BadInput(
                "The segmenter instanseg needs its package: pip install instanseg-torch, or choose --segmenter "
                "classical."
            ) from None
        if weights is None:
            return cls(_fetched("instanseg", lambda: InstanSeg("brightfield_nuclei", verbosity=0)))
        import torch

        if not weights.is_file():
            raise BadInput(f"{weights} does not exist: give the TorchScript file instanseg.pt.")
        try:
            module = torch.jit.load(str(weights), map_location="cpu")
        except RuntimeError as error:
            raise BadInput(f"{weights.name} is no TorchScript file: download it again.") from error
        return cls(InstanSeg(module, verbosity=0))

    def __call__(self, picture: np.ndarray, um_per_px: float) -> np.ndarray:
        found = self.model.eval_small_image(
            np.moveaxis(picture, -1, 0), pixel_size=um_per_px, return_image_tensor=False, target="nuclei"
        )
        return np.asarray(found.cpu()).reshape(-1, *picture.shape[:2])[0].astype(np.int32)


def _fetched(name: str, fetch: Callable[[], Any]) -> Any:
    """A model that its own package downloads; without internet the user is told how to give it by path."""
    try:
        model = fetch()
    except (OSError, RuntimeError, ValueError) as error:
        raise BadInput(f"The weights of {name} cannot be fetched ({error}): give them by --weights.") from error
    if model is None:
        raise BadInput(f"The weights of {name} cannot be fetched: give them by --weights.")
    return model


def _classical(weights: Path | None) -> Segmenter:
    if weights is not None:
        raise BadInput("The segmenter classical has no weights: leave out --weights.")
    return ClassicalSegmenter()


SEGMENTERS: dict[str, Callable[[Path | None], Segmenter]] = {
    "classical": _classical,
    "stardist": StarDistSegmenter.load,
    "instanseg": InstanSegSegmenter.load,
}


def load_segmenter(name: str, weights: str | Path | None = None) -> Segmenter:
    """A segmenter by name.

    Parameters
    ----------
    weights: StarDist: the model's folder; InstanSeg: the TorchScript file; None lets the package fetch its own.

    Raises
    ------
    BadInput: an unknown name, a package or weights that are not there.
    """
    if name not in SEGMENTERS:
        raise BadInput(f"segmenter is {name!r}: choose {', '.join(SEGMENTERS)}.")
    return SEGMENTERS[name](None if weights is None else Path(weights))


def segment(
    image: SlideImage,
    crop: Crop,
    um_per_px: float,
    segmenter: Segmenter,
    labels: np.ndarray,
    *,
    where: Callable[[Crop], bool] = lambda tile: True,
    start: int = 0,
    n_labels: int = 0,
    workers: int = 1,
) -> Iterator[TileDone]:
    """Write the labels of all nuclei of a crop into ``labels``; yields after every tile.

    Parameters
    ----------
    um_per_px: scale of ``crop`` and ``labels``.
    labels: int32 ``[crop.height, crop.width]``, zeros; when resumed, without labels above ``n_labels``.
    where: whether a tile (its core, in the slide's grid) is to be looked at; glass need not be.
    start, n_labels: ``done`` and ``n_labels`` of the last finished tile, to go on where a run stopped.
    workers: threads that segment tiles ahead; merging keeps the tiles' order, so labels do not depend on it.
    """
    tiles = _tiles(crop, um_per_px)
    margin, seam = round(MARGIN_UM / um_per_px), SEAM_UM / um_per_px
    least = MIN_AREA_UM2 / um_per_px**2

    def look(tile: Crop) -> np.ndarray | None:
        return _labels_of(image, tile, margin, um_per_px, segmenter) if where(tile) else None

    def merged(i: int, found: np.ndarray | None) -> TileDone:
        nonlocal n_labels
        if found is not None:
            n_labels = _merge(labels, found, tiles[i], crop, margin, seam, least, n_labels)
        return TileDone(i + 1, len(tiles), n_labels)

    if workers <= 1:
        for i in range(start, len(tiles)):
            yield merged(i, look(tiles[i]))
        return
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[tuple[int, Future[np.ndarray | None]]] = deque()
        following = iter(range(start, len(tiles)))
        try:
            while True:
                while len(ahead) < 2 * workers and (new := next(following, None)) is not None:
                    ahead.append((new, pool.submit(look, tiles[new])))
                if not ahead:
                    break
                i, future = ahead.popleft()
                yield merged(i, future.result())
        finally:
            for _, future in ahead:
                future.cancel()


def _tiles(crop: Crop, um_per_px: float) -> list[Crop]:
    core = max(64, round(CORE_UM / um_per_px))
    rows, columns = (range(0, n, core) for n in (crop.height, crop.width))
    return [
        Crop(crop.top + r, crop.left + c, min(core, crop.height - r), min(core, crop.width - c))
        for r in rows
        for c in columns
    ]


def _labels_of(image: SlideImage, tile: Crop, margin: int, um_per_px: float, segmenter: Segmenter) -> np.ndarray:
    """Labels of a core with its margin at the scale of the crop, whatever scale the segmenter works at."""
    step = max(1, round(um_per_px / segmenter.um_per_px))
    # A whole number of fine pixels per pixel, so that the labels' grid is the crop's; nothing beyond the picture, whose
    # white would shift thresholds.
    size = (int(n * image.um_per_px / um_per_px) for n in (image.height, image.width))
    spans = [
        (max(start - margin, 0), min(start + n + margin, end))
        for start, n, end in zip((tile.top, tile.left), (tile.height, tile.width), size, strict=True)
    ]
    out = np.zeros((tile.height + 2 * margin, tile.width + 2 * margin), dtype=np.int32)
    (top, bottom), (left, right) = spans
    if min(bottom - top, right - left) * step < LEAST_PX:
        return out
    picture = image.at_scale((top * step, bottom * step), (left * step, right * step), um_per_px / step)
    found = np.asarray(segmenter(picture, um_per_px / step))[step // 2 :: step, step // 2 :: step]
    row, column = top - tile.top + margin, left - tile.left + margin
    out[row : row + found.shape[0], column : column + found.shape[1]] = found
    return out


def _merge(
    labels: np.ndarray, found: np.ndarray, tile: Crop, crop: Crop, margin: int, seam: float, least: float, n: int
) -> int:
    """Copy the nuclei whose centre lies in the tile's core into ``labels``; returns the highest label."""
    from scipy.ndimage import find_objects

    top, left = tile.top - crop.top - margin, tile.left - crop.left - margin
    for label, box in enumerate(find_objects(found), start=1):
        if box is None:
            continue
        mask = found[box] == label
        rows, columns = np.nonzero(mask)
        rows, columns = rows + box[0].start, columns + box[1].start
        y, x = rows.mean() + 0.5 - margin, columns.mean() + 0.5 - margin
        if not (-seam <= y < tile.height + seam and -seam <= x < tile.width + seam) or len(rows) < least:
            continue
        rows, columns = rows + top, columns + left
        within = (rows >= 0) & (rows < crop.height) & (columns >= 0) & (columns < crop.width)
        rows, columns = rows[within], columns[within]
        free = labels[rows, columns] == 0
        if free.sum() < max(1.0, (1 - TAKEN) * len(mask[mask])):
            continue
        n += 1
        labels[rows[free], columns[free]] = n
    return n


def paint_outlines(
    outlines: Sequence[Any], crop: Crop, um_per_px: float, labels: np.ndarray, contested: np.ndarray | None = None
) -> None:
    """Paint polygons (um of the picture) into ``labels``: polygon ``i`` gets label ``i + 1``.

    Where two overlap, the pixel keeps the first and ``contested`` becomes true.
    """
    from skimage.draw import polygon

    for i, shape in enumerate(outlines):
        for part in getattr(shape, "geoms", [shape]):
            xy = np.asarray(part.exterior.coords)[:, :2] / um_per_px - (crop.left, crop.top)
            # Pixel (r, c) covers [c, c + 1): its centre is half a pixel in.
            rows, columns = polygon(xy[:, 1] - 0.5, xy[:, 0] - 0.5, shape=labels.shape)
            before = labels[rows, columns]
            free = before == 0
            labels[rows[free], columns[free]] = i + 1
            if contested is not None:
                second = ~free & (before != i + 1)
                contested[rows[second], columns[second]] = True


def expand_labels_tiled(labels: np.ndarray, out: np.ndarray, distance_px: float) -> None:
    """Write ``labels`` grown by up to ``distance_px`` into ``out``, each pixel to the nearest nucleus; tile by tile."""
    from skimage.segmentation import expand_labels

    reach, side = int(np.ceil(distance_px)) + 1, EXPAND_PX
    for top in range(0, labels.shape[0], side):
        for left in range(0, labels.shape[1], side):
            y, x = max(0, top - reach), max(0, left - reach)
            part = np.asarray(labels[y : top + side + reach, x : left + side + reach])
            grown = expand_labels(part, distance_px) if part.any() else part
            target = out[top : top + side, left : left + side]
            target[...] = grown[top - y : top - y + target.shape[0], left - x : left - x + target.shape[1]]


def nuclei_table(labels: np.ndarray, n_labels: int, um_per_px: float) -> pd.DataFrame:
    """Centre and area of every label, index label 1 to ``n_labels``; NaN and 0 for a label without a pixel.

    Columns ``x_um``, ``y_um`` (from the label image's corner) and ``area_um2``. Reads the labels strip by strip.
    """
    sums = np.zeros((3, n_labels + 1))
    for top in range(0, labels.shape[0], 1024):
        strip = np.asarray(labels[top : top + 1024])
        rows, columns = np.nonzero(strip)
        at = strip[rows, columns]
        for k, weight in enumerate((None, columns + 0.5, rows + top + 0.5)):
            sums[k] += np.bincount(at, weight, minlength=n_labels + 1)
    n, x, y = sums[:, 1:]
    with np.errstate(invalid="ignore"):
        return pd.DataFrame(
            {"x_um": x / n * um_per_px, "y_um": y / n * um_per_px, "area_um2": n * um_per_px**2},
            index=pd.RangeIndex(1, n_labels + 1),
        )
