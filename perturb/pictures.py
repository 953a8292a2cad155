"""Pictures for eyes and files: nuclei outlines, difference view, contact sheet, PNG with its origin inside.

Every picture that leaves this module is marked as generated in its pixels and in its metadata. Statistics never read
these pictures, they read the unmarked ones of the result.
"""

from __future__ import annotations

import functools
import io
import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ge2hist_core.types import Niche
from perturb.colours import colour_of

__all__ = ["contact_sheet", "difference", "mark", "overlay", "png_bytes", "show"]

MARK = "generated"


def show(niche: Niche, scale: int = 1) -> np.ndarray:
    """The picture enlarged ``scale`` times (bicubic), uint8 ``[H * scale, W * scale, 3]``, marked if generated."""
    enlarged = _enlarge(niche.image, scale)
    return mark(enlarged) if niche.generated else enlarged


def overlay(niche: Niche, nuclei: pd.DataFrame, scale: int = 4) -> np.ndarray:
    """Nuclei as circles of their area in the colour of their type, on a dark rim that keeps them visible on H&E.

    Parameters
    ----------
    nuclei: columns of ``NUCLEI_COLUMNS``; positions and areas in um.

    Returns
    -------
    uint8 ``[H * scale, W * scale, 3]``, marked if generated.
    """
    smooth = 2  # PIL draws without anti-aliasing: draw larger, then shrink.
    image = Image.fromarray(_enlarge(niche.image, scale * smooth))
    draw = ImageDraw.Draw(image)
    px_per_um = scale * smooth / niche.um_per_px
    for row in nuclei.itertuples():
        x, y, r = row.x_um * px_per_um, row.y_um * px_per_um, math.sqrt(row.area_um2 / math.pi) * px_per_um
        colour = colour_of(row.cell_type)
        for rim, fill in ((smooth, "#101010"), (0, colour)):
            box = (x - r - rim, y - r - rim, x + r + rim, y + r + rim)
            draw.ellipse(box, outline=fill, width=2 * smooth + 2 * rim)
    small = np.asarray(image.resize((image.width // smooth, image.height // smooth), Image.Resampling.LANCZOS))
    return mark(small) if niche.generated else small.copy()


def difference(base: Niche, edited: Niche, scale: int = 1) -> np.ndarray:
    """Where the edited picture absorbs more (orange) or less light (blue) than the unedited one, white where equal.

    The value shown is the difference of optical density, mean of -log10(intensity / 255) over the channels, full
    colour at 0.3 (twice or half the light).

    Raises
    ------
    ValueError: pictures of different size.
    """
    if base.image.shape != edited.image.shape:
        raise ValueError(f"pictures differ in size: {base.image.shape} and {edited.image.shape}")
    density = [-np.log10(np.maximum(one.image, 1) / 255.0).mean(axis=2) for one in (base, edited)]
    change = np.clip((density[1] - density[0]) / 0.3, -1.0, 1.0)[..., None]
    more, less = np.array([213.0, 94.0, 0.0]), np.array([0.0, 114.0, 178.0])
    picture = 255.0 + np.abs(change) * (np.where(change > 0, more, less) - 255.0)
    return mark(_enlarge(picture.round().astype(np.uint8), scale))


def contact_sheet(niches: Sequence[Niche], columns: int = 8, scale: int = 1, gap: int = 4) -> np.ndarray:
    """All pictures on one sheet, row by row, each marked; uint8 ``[H, W, 3]`` on white.

    Raises
    ------
    ValueError: no picture.
    """
    if not niches:
        raise ValueError("a contact sheet needs at least one picture")
    tiles = [show(niche, scale) for niche in niches]
    height, width = tiles[0].shape[:2]
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = i // columns * (height + gap), i % columns * (width + gap)
        sheet[y : y + height, x : x + width] = tile
    return sheet


def mark(image: np.ndarray) -> np.ndarray:
    """A copy with the word "generated" in the lower left corner, light on a dark band."""
    size = max(8, min(image.shape[:2]) // 24)
    band = _band(size)
    height, width = (min(a, b) for a, b in zip(band.shape[:2], image.shape[:2], strict=True))
    out = image.copy()
    out[-height:, :width] = band[:height, :width]
    return out


@functools.cache
def _band(size: int) -> np.ndarray:
    font = ImageFont.load_default(size=size)
    left, top, right, bottom = font.getbbox(MARK)
    image = Image.new("RGB", (int(right - left) + 4, int(bottom - top) + 4), "#202020")
    ImageDraw.Draw(image).text((2 - left, 2 - top), MARK, font=font, fill="#ffffff")
    return np.asarray(image)


def _enlarge(image: np.ndarray, scale: int) -> np.ndarray:
    if scale == 1:
        return image.copy()
    height, width = image.shape[:2]
    return np.array(Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.BICUBIC))


def png_bytes(image: np.ndarray, metadata: Mapping[str, object]) -> bytes:
    """PNG of a uint8 ``[H, W, 3]`` picture; each metadata value becomes a text chunk (JSON unless a string)."""
    info = PngInfo()
    for key, value in metadata.items():
        info.add_text(key, value if isinstance(value, str) else json.dumps(value))
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG", pnginfo=info)
    return out.getvalue()
