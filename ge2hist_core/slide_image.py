"""A slide's picture on disk, read window by window and at any scale; never whole.

TIFF, BigTIFF, OME-TIFF and SVS are read through ``tifffile`` in their own tiles. JPEG and PNG have no tiles: they are
decoded once and held, and refused above ``MAX_HELD_PX``. Coordinates are (row, column) px from the top left corner, or
um of the same origin; pixel ``i`` covers ``[i, i + 1)``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Self
from xml.etree import ElementTree

import numpy as np

from ge2hist_core.types import BadInput

__all__ = ["SlideImage"]

TIFF_SUFFIXES = (".tif", ".tiff", ".btf", ".svs", ".scn", ".ndpi")
HELD_SUFFIXES = (".png", ".jpg", ".jpeg")
MAX_HELD_PX = 400_000_000
MAX_CHUNK_PX = 64_000_000
"""A chunk that decodes to more pixels is a picture in one piece: every window would decode all of it."""
UM_PER_UNIT = {2: 25400.0, 3: 10000.0}
"""um per TIFF ``ResolutionUnit``: inch, centimetre."""
OME_UM = {"µm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3}


class SlideImage:
    """One picture of a slide, open for reading.

    Parameters
    ----------
    path: TIFF, BigTIFF, OME-TIFF, SVS, JPEG or PNG; 8 bits, three channels or four (the fourth is not read).
    um_per_px: size of its pixels in um, as the lab's run says; None leaves it to what the file says.

    Attributes
    ----------
    height, width: px.
    um_per_px: the scale in use.
    file_um_per_px: what the file itself says, None if nothing credible.

    Raises
    ------
    BadInput: missing, of another kind, truncated, not 8-bit RGB, not in tiles, or of unknown scale.
    """

    def __init__(self, path: str | Path, um_per_px: float | None = None) -> None:
        self.path = Path(path)
        self.name = self.path.name
        if not self.path.is_file():
            raise BadInput(
                f"The image {self.path} does not exist: give the full-resolution H&E that the run was given."
            )
        suffix = self.path.suffix.lower()
        self._file: Any = None
        self.file_um_per_px: float | None = None
        if suffix in TIFF_SUFFIXES:
            self._pixels = self._open_tiff()
        elif suffix in HELD_SUFFIXES:
            self._pixels = self._held()
        else:
            raise BadInput(
                f"{self.name} is of kind {suffix or 'unknown'!r}: give {', '.join((*TIFF_SUFFIXES, *HELD_SUFFIXES))}."
            )
        try:
            scale = self.file_um_per_px if um_per_px is None else um_per_px
            if scale is None:
                raise BadInput(f"{self.name} does not say how large its pixels are: give um_per_px.")
            if not 0.05 <= scale <= 5.0:
                raise BadInput(f"um_per_px of {self.name} is {scale:g}: nuclei need 0.05 to 5 um per pixel.")
        except BadInput:
            self.close()
            raise
        self.um_per_px = float(scale)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file. Windows can no longer be read."""
        if self._file is not None:
            self._file.close()

    def window(self, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        """Pixels of a window as uint8 ``[h, w, 3]`` RGB; what lies beyond the picture is white.

        Raises
        ------
        BadInput: a part of the file that cannot be decoded.
        """
        out = np.full((rows[1] - rows[0], columns[1] - columns[0], 3), 255, dtype=np.uint8)
        top, bottom = (min(max(v, 0), self.height) for v in rows)
        left, right = (min(max(v, 0), self.width) for v in columns)
        if top < bottom and left < right:
            try:
                part = self._read(slice(top, bottom), slice(left, right))
            except Exception as error:  # every codec has its own exceptions
                raise BadInput(
                    f"{self.name} cannot be decoded at row {top}, column {left} ({type(error).__name__}): the file is "
                    "damaged, copy it again."
                ) from error
            out[top - rows[0] : bottom - rows[0], left - columns[0] : right - columns[0]] = part
        return out

    def at_scale(self, rows: tuple[int, int], columns: tuple[int, int], um_per_px: float) -> np.ndarray:
        """A window of the picture brought to another scale, uint8 ``[h, w, 3]``.

        Rows and columns count pixels of ``um_per_px`` from the same corner, so windows that meet show one picture:
        each pixel depends on its place alone, not on the window. A picture four times smaller or more is first averaged
        over whole squares of pixels; what is left of the ratio is blurred (Gaussian of standard deviation
        (ratio - 1) / 2 px) and read bilinearly.
        """
        from scipy.ndimage import gaussian_filter

        ratio = um_per_px / self.um_per_px
        if abs(ratio - 1.0) < 1e-9:
            return self.window(rows, columns)
        box = max(1, int(ratio // 2.0))
        ratio /= box
        sigma = max(0.0, (ratio - 1.0) / 2.0)
        reach = int(np.ceil(4.0 * sigma)) + 2
        at = [(np.arange(*span) + 0.5) * ratio - 0.5 for span in (rows, columns)]
        first = [int(np.floor(a[0])) - reach for a in at]
        last = [int(np.floor(a[-1])) + reach + 2 for a in at]
        fine = self.window((first[0] * box, last[0] * box), (first[1] * box, last[1] * box))
        source = fine.astype(np.float32) if box == 1 else _averaged(fine, box)
        if sigma:
            source = gaussian_filter(source, (sigma, sigma, 0), mode="nearest", truncate=4.0)
        for axis, (a, start) in enumerate(zip(at, first, strict=True)):
            low = np.floor(a).astype(np.int64) - start
            weight = (a - start - low).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
            source = source.take(low, axis) * (1 - weight) + source.take(low + 1, axis) * weight
        return np.clip(np.rint(source), 0, 255).astype(np.uint8)

    def _open_tiff(self) -> Any:
        import tifffile
        import zarr

        try:
            # Compressed files are decoded by it; tifffile alone would fail tile by tile.
            import imagecodecs  # noqa: F401
        except ImportError:
            raise BadInput("Compressed TIFF needs the package imagecodecs: pip install imagecodecs.") from None
        try:
            self._file = tifffile.TiffFile(self.path)
            level = self._file.series[0].levels[0]
            page = level.keyframe
            self._refuse_truncated(level)
            self.file_um_per_px = self._scale_in_file(page)
            self._axes = level.axes
            store: Any = zarr.open(self._file.aszarr(series=0, level=0), mode="r")
        except BadInput:
            self.close()
            raise
        except Exception as error:  # TiffFileError, struct.error, IndexError, zarr's: all mean a damaged file
            self.close()
            raise BadInput(
                f"{self.name} cannot be read as TIFF ({type(error).__name__}): copy the file again."
            ) from error
        sizes = dict(zip(self._axes, level.shape, strict=True))
        channels = sizes.get("S", sizes.get("C", 1))
        if store.dtype != np.uint8 or channels not in (3, 4) or set(self._axes) - set("YXSC"):
            self.close()
            raise BadInput(
                f"{self.name} holds {store.dtype} pixels with {channels} channel(s) (axes {self._axes}): give the H&E "
                "as 8-bit RGB."
            )
        self.height, self.width = sizes["Y"], sizes["X"]
        if np.prod(store.chunks) / channels > MAX_CHUNK_PX:
            self.close()
            raise BadInput(
                f"{self.name} is stored in one piece: save it in tiles, for example by "
                "`vips tiffsave in.tif out.tif --tile --pyramid --bigtiff --compression jpeg`."
            )
        return store

    def _refuse_truncated(self, level: Any) -> None:
        end = max(
            (
                offset + count
                for page in level.pages
                if page is not None
                for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)
            ),
            default=0,
        )
        size = self.path.stat().st_size
        if end > size or end == 0:
            raise BadInput(f"{self.name} is truncated: its tiles need {end:,} bytes, it has {size:,}; copy it again.")

    def _scale_in_file(self, page: Any) -> float | None:
        """um per px by OME-XML, by Aperio's description, or by the resolution tags; None where nothing is credible."""
        scale = None
        text = page.description or ""
        if aperio := re.search(r"\bMPP\s*=\s*([0-9.]+)", text):
            scale = float(aperio.group(1))
        elif self._file.is_ome and self._file.ome_metadata:
            pixels = ElementTree.fromstring(self._file.ome_metadata).find(".//{*}Pixels")
            if pixels is not None and "PhysicalSizeX" in pixels.attrib:
                unit = OME_UM.get(pixels.get("PhysicalSizeXUnit", "µm"))
                scale = None if unit is None else float(pixels.attrib["PhysicalSizeX"]) * unit
        elif "XResolution" in page.tags and "ResolutionUnit" in page.tags:
            value, by = page.tags["XResolution"].value
            unit = UM_PER_UNIT.get(int(page.tags["ResolutionUnit"].value))
            scale = unit * by / value if unit and value else None
        # 72 or 96 dpi is what programs write that know nothing: 265 to 353 um per px.
        return scale if scale is not None and 0.05 <= scale <= 5.0 else None

    def _held(self) -> np.ndarray:
        from PIL import Image

        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with Image.open(self.path) as picture:
                self.width, self.height = picture.size
                if self.width * self.height > MAX_HELD_PX:
                    raise BadInput(f"{self.name} has {self.width} x {self.height} px and no tiles: save it as TIFF.")
                return np.asarray(picture.convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise BadInput(f"{self.name} cannot be decoded ({error}): copy the file again.") from error
        finally:
            Image.MAX_IMAGE_PIXELS = limit

    def _read(self, rows: slice, columns: slice) -> np.ndarray:
        if isinstance(self._pixels, np.ndarray):
            return self._pixels[rows, columns]
        where = {"Y": rows, "X": columns, "S": slice(0, 3), "C": slice(0, 3)}
        part = np.asarray(self._pixels[tuple(where[axis] for axis in self._axes)])
        return part if self._axes[-1] in "SC" else np.moveaxis(part, 0, -1)


def _averaged(pixels: np.ndarray, box: int) -> np.ndarray:
    """Means over squares of ``box`` px, float32; summed down first, where memory lies in a row."""
    height, width = pixels.shape[0] // box, pixels.shape[1] // box
    down = pixels.reshape(height, box, -1).sum(axis=1, dtype=np.uint32)
    return (down.reshape(height, width, box, 3).sum(axis=2) / box**2).astype(np.float32)
