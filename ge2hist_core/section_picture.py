"""Pictures of a store's sections for looking at: a whole section small, or the tile of one cell at its full scale.

Nothing is held: a section is read strip by strip, a tile from the few chunks that it touches.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ge2hist_core.files import atomic_path
from ge2hist_core.store import section_picture
from ge2hist_core.types import BadInput, Niche

__all__ = ["OVERVIEW_PX", "kept_overview", "overview", "real_tile", "section_size_um"]

OVERVIEW_PX = 1200
"""Longer side of an overview, at most."""
STRIP_PX = 1024


def section_size_um(store: Path, donor: str, um_per_px: float) -> tuple[float, float]:
    """Width and height of a section, um."""
    _, height, width = section_picture(store, donor).shape
    return width * um_per_px, height * um_per_px


def overview(
    store: Path, donor: str, longest: int = OVERVIEW_PX, on_part: Callable[[float], object] = lambda share: None
) -> np.ndarray:
    """A whole section, small: means over boxes of ``k x k`` px, ``k`` the smallest that fits into ``longest``.

    Parameters
    ----------
    on_part: called with the share that is done, 0 to 1.

    Returns
    -------
    uint8 ``[ceil(H / k), ceil(W / k), 3]`` RGB; boxes at the right and lower edge hold what there is.

    Raises
    ------
    BadInput: the section has no picture, or it is damaged.
    """
    array = section_picture(store, donor)
    _, height, width = array.shape
    k = max(1, -(-max(height, width) // longest))
    out = np.empty((-(-height // k), -(-width // k), 3), dtype=np.uint8)
    side = k * max(1, STRIP_PX // k)
    for top in range(0, height, side):
        for left in range(0, width, side):
            part = _window(array, donor, left, top, min(left + side, width), min(top + side, height))
            small = _box_means(part, k)
            out[top // k : top // k + small.shape[0], left // k : left // k + small.shape[1]] = small
        on_part(min(1.0, (top + side) / height))
    return out


def kept_overview(
    store: Path, donor: str, path: Path, on_part: Callable[[float], object] = lambda share: None
) -> np.ndarray:
    """The same, from the PNG file ``path`` if it is there, else computed and kept there."""
    from PIL import Image

    if path.is_file():
        path.touch()
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    found = overview(store, donor, on_part=on_part)
    with atomic_path(path) as temporary:
        Image.fromarray(found).save(temporary)
    return found


def real_tile(
    store: Path, donor: str, xy_um: tuple[float, float], um_per_px: float, side_um: float, px: int
) -> Niche | None:
    """The real picture around a place of a section, or None where it would leave the section.

    Parameters
    ----------
    xy_um: centre, from the section's top left corner. um_per_px: of the store.
    side_um: of the tile. px: its side in pixels; the picture is resampled where its own scale is another.

    Raises
    ------
    BadInput: the section has no picture, or it is damaged.
    """
    array = section_picture(store, donor)
    _, height, width = array.shape
    side = round(side_um / um_per_px)
    # The same pixels as ``TissueStore.tiles`` gives where the scales are equal.
    left, top = (int(np.floor(value / um_per_px + 0.5)) - side // 2 for value in xy_um)
    if left < 0 or top < 0 or left + side > width or top + side > height:
        return None
    tile = _window(array, donor, left, top, left + side, top + side)
    if side != px:
        from PIL import Image

        tile = np.asarray(Image.fromarray(tile).resize((px, px), Image.Resampling.BOX if side > px else None))
    return Niche(tile, side_um / px)


def _window(array: Any, donor: str, left: int, top: int, right: int, bottom: int) -> np.ndarray:
    """uint8 ``[y, x, 3]``."""
    try:
        return np.ascontiguousarray(np.moveaxis(np.asarray(array[:, top:bottom, left:right]), 0, -1))
    except Exception as error:  # the codec's class for a damaged file is not ours to know
        raise BadInput(
            f"The picture of section {donor!r} is damaged near pixel ({left}, {top}): write the store again."
        ) from error


def _box_means(part: np.ndarray, k: int) -> np.ndarray:
    """uint8 means over boxes of ``k x k`` px; the last row and column of boxes may be narrower."""
    if k == 1:
        return part
    rows, columns = np.arange(0, part.shape[0], k), np.arange(0, part.shape[1], k)
    sums = np.add.reduceat(np.add.reduceat(part.astype(np.uint32), rows, axis=0), columns, axis=1)
    high = np.diff(np.append(rows, part.shape[0]))
    wide = np.diff(np.append(columns, part.shape[1]))
    area = high[:, None, None] * wide[None, :, None]
    return ((sums + area // 2) // area).astype(np.uint8)
