"""Picture -> nuclei table. Two readers with one interface, and the figures that judge them.

``LearnedReader`` is a small fully convolutional network, trained by :mod:`ge2hist_core.nuclei_training` on tiles with
known nuclei: a heat map with a peak at each centre (Zhou et al. 2019, Objects as points, arXiv:1904.07850), and at the
peak the sub-pixel offset, the area and the type. ``ClassicalReader`` needs no training and names no type: stain
separation, local threshold, distance-transform watershed. It is the one for foreign pictures.

Knows neither the generative model nor where a picture comes from: it reads real and generated tiles alike.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from skimage import color, feature, filters, measure, morphology, segmentation
from torch import Tensor, nn

from ge2hist_core.config import READER_CLASSES, UM_PER_PX
from ge2hist_core.files import atomic_path, write_json
from ge2hist_core.types import NUCLEI_COLUMNS, BadInput

__all__ = [
    "ClassicalReader",
    "LearnedReader",
    "Matches",
    "Reader",
    "ReaderNet",
    "classical_reader",
    "confusion",
    "detection_scores",
    "match_detections",
]

READER_SCHEMA = 1


class Reader(Protocol):
    """Anything that finds nuclei."""

    def read(self, images: np.ndarray, um_per_px: float = UM_PER_PX) -> list[pd.DataFrame]:
        """One nuclei table (``types.NUCLEI_COLUMNS``) per picture of ``images`` uint8 ``[n, H, W, 3]``."""
        ...


def _check(images: np.ndarray, um_per_px: float) -> np.ndarray:
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or min(images.shape[1:3]) < 8:
        raise BadInput(
            f"images is {images.dtype} {images.shape}: give uint8 RGB [n, height, width, 3] of at least 8 x 8 px."
        )
    if not 0.1 <= um_per_px <= 2.0:
        raise BadInput(f"um_per_px is {um_per_px!r}: nuclei can be read between 0.1 and 2 um per pixel.")
    return images


def _table(xy_um: np.ndarray, area_um2: np.ndarray, cell_type: np.ndarray, probability: np.ndarray) -> pd.DataFrame:
    columns = (xy_um[:, 0], xy_um[:, 1], area_um2, cell_type, probability)
    return pd.DataFrame(dict(zip(NUCLEI_COLUMNS, columns, strict=True)))


# --- The learned reader -----------------------------------------------------------------------------------------


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.GroupNorm(8, outputs), nn.SiLU())


class ReaderNet(nn.Module):
    """U-Net with additive skips, half a million weights: ``[n, 3, H, W]`` in [-1, 1] -> ``[n, 4 + type, H/2, W/2]``.

    Output channels, one position per 2 px = 1 um: 0 logit of "a centre lies here", 1-2 offset (x, y) in um from the
    middle of the position to the centre, 3 natural logarithm of the area in um2, 4- logits of the types.
    ``H`` and ``W`` must be multiples of 8. Centres are rare: the first channel starts at probability 0.02.
    """

    def __init__(self, n_classes: int, channels: Sequence[int] = (24, 64, 128)):
        super().__init__()
        a, b, c = channels
        self.stem = nn.Sequential(nn.PixelUnshuffle(2), _block(12, a), _block(a, a))
        self.down1 = nn.Sequential(_block(a, b, stride=2), _block(b, b))
        self.down2 = nn.Sequential(_block(b, c, stride=2), _block(c, c), _block(c, c))
        self.up1, self.merge1 = nn.Conv2d(c, b, 1), _block(b, b)
        self.up0, self.merge0 = nn.Conv2d(b, a, 1), _block(a, a)
        self.head = nn.Conv2d(a, 4 + n_classes, 1)
        first_guess = [-4.0, 0.0, 0.0, float(np.log(40.0))] + [0.0] * n_classes
        self.head.bias = nn.Parameter(torch.tensor(first_guess))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        middle = self.down1(fine)
        coarse = self.down2(middle)
        middle = self.merge1(middle + F.interpolate(self.up1(coarse), scale_factor=2.0))
        fine = self.merge0(fine + F.interpolate(self.up0(middle), scale_factor=2.0))
        return self.head(fine)


def to_input(images: Tensor) -> Tensor:
    """``[n, H, W, 3]`` uint8 -> ``[n, 3, H, W]`` float32 in [-1, 1]."""
    return (images.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0).contiguous(memory_format=torch.channels_last)


@dataclass
class LearnedReader:
    """A trained network and how its output is read.

    Parameters
    ----------
    net: the network, in evaluation mode.
    classes: names of the types, in the order of the network's channels.
    threshold: least heat of a peak to count as a nucleus; calibrated so that counts are right on average.
    class_bias: one number per class, added to its logit; calibrated so that the composition is right on average.
        () means zeros.
    figures: measured on held-out donors, as JSON; {} for a reader that was not judged.
    """

    net: ReaderNet
    classes: tuple[str, ...] = READER_CLASSES
    threshold: float = 0.3
    class_bias: tuple[float, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.net.eval()
        self.class_bias = tuple(self.class_bias) or (0.0,) * len(self.classes)
        if len(self.class_bias) != len(self.classes) or not 0.0 < self.threshold < 1.0:
            raise ValueError("class_bias must have one value per class and threshold lie between 0 and 1")

    def read(self, images: np.ndarray, um_per_px: float = UM_PER_PX) -> list[pd.DataFrame]:
        """Nuclei of every picture; ``probability`` is the heat at the peak.

        Parameters
        ----------
        images: uint8 ``[n, H, W, 3]`` RGB; any size, one size for all.
        um_per_px: their scale; pictures at another scale than the network's are resampled first.

        Notes
        -----
        Pictures pass one by one: a table does not depend on what else is in the batch, and on a CPU nothing is lost.
        """
        images = _check(images, um_per_px)
        return [self.pick(*self.peaks(image, um_per_px)) for image in images]

    @torch.inference_mode()
    def peaks(self, image: np.ndarray, um_per_px: float = UM_PER_PX, floor: float = 0.02) -> tuple[np.ndarray, ...]:
        """Every local maximum of the heat map that reaches ``floor``, for calibration.

        Returns
        -------
        ``xy_um [peak, 2]``, ``area_um2 [peak]``, ``logits [peak, type]`` without bias, ``heat [peak]``.
        """
        device = next(self.net.parameters()).device
        x = to_input(torch.from_numpy(np.ascontiguousarray(image[None])).to(device))
        height, width = (max(8, round(side * um_per_px / UM_PER_PX)) for side in image.shape[:2])
        if (height, width) != image.shape[:2]:
            x = F.interpolate(x, size=(height, width), mode="bilinear", antialias=True)
        x = F.pad(x, (0, -width % 8, 0, -height % 8), mode="replicate")
        out = self.net(x)[0].float()
        heat = torch.sigmoid(out[0])
        # Two centres are at least 3 um apart: the window spans two positions to each side.
        top = F.max_pool2d(heat[None, None], 5, stride=1, padding=2)[0, 0]
        row, column = torch.nonzero((heat == top) & (heat >= floor), as_tuple=True)
        step = 2 * UM_PER_PX
        x_um = (column + 0.5) * step + out[1, row, column]
        y_um = (row + 0.5) * step + out[2, row, column]
        # The resampled picture is a whole number of pixels wide: undo the rounding.
        x_um = x_um * (image.shape[1] * um_per_px) / (width * UM_PER_PX)
        y_um = y_um * (image.shape[0] * um_per_px) / (height * UM_PER_PX)
        xy = torch.stack([x_um, y_um], dim=1).cpu().numpy().astype(np.float64)
        inside = ((xy >= 0) & (xy <= np.array([image.shape[1], image.shape[0]]) * um_per_px)).all(axis=1)
        area, logits = out[3, row, column].exp(), out[4:, row, column].T
        return xy[inside], *(t.cpu().numpy()[inside] for t in (area, logits, heat[row, column]))

    def pick(self, xy_um: np.ndarray, area_um2: np.ndarray, logits: np.ndarray, heat: np.ndarray) -> pd.DataFrame:
        """The peaks of :meth:`peaks` that count as nuclei, with their types."""
        keep = heat >= self.threshold
        names = np.asarray(self.classes, dtype=object)[(logits[keep] + np.array(self.class_bias)).argmax(axis=1)]
        return _table(xy_um[keep], area_um2[keep], names, heat[keep])

    def save(self, folder: str | Path) -> None:
        """Write ``reader.safetensors`` and ``reader.json`` into ``folder``, each atomically."""
        folder = Path(folder)
        weights = {name: tensor.contiguous().cpu() for name, tensor in self.net.state_dict().items()}
        with atomic_path(folder / "reader.safetensors") as temporary:
            save_file(weights, temporary)
        settings = {
            "schema": READER_SCHEMA,
            "classes": list(self.classes),
            "channels": [self.net.up0.out_channels, self.net.up1.out_channels, self.net.up1.in_channels],
            "um_per_px": UM_PER_PX,
            "threshold": self.threshold,
            "class_bias": list(self.class_bias),
            "figures": self.figures,
        }
        write_json(folder / "reader.json", settings)

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> LearnedReader:
        """The reader of a bundle folder.

        Raises
        ------
        BadInput: a file is missing, damaged, of another schema, or the weights do not fit the settings.
        """
        folder = Path(folder)
        try:
            settings = json.loads((folder / "reader.json").read_text(encoding="utf-8"))
            if settings["schema"] != READER_SCHEMA:
                raise BadInput(
                    f"{folder / 'reader.json'} has schema {settings['schema']!r}, this version reads "
                    f"{READER_SCHEMA}: train the reader again."
                )
            with torch.random.fork_rng(devices=[]):
                net = ReaderNet(len(settings["classes"]), settings["channels"])
            net.load_state_dict(load_file(folder / "reader.safetensors"))
            net.to(device)
            return cls(
                net, tuple(settings["classes"]), settings["threshold"], settings["class_bias"], settings["figures"]
            )
        except FileNotFoundError as error:
            raise BadInput(f"{error.filename or folder} is missing: choose a folder with a trained reader.") from None
        except BadInput:
            raise
        except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise BadInput(f"The reader in {folder} is damaged ({reason}): copy or train it again.") from None


# --- The training-free reader -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassicalReader:
    """Training-free reader for H&E: every length in um, so that it works at any scale between 0.1 and 1 um per pixel.

    1. The picture is brought to ``work_um_per_px`` and turned into haematoxylin density: optical density unmixed with
       the stain vectors of Ruifrok & Johnston (2001, Anal. Quant. Cytol. Histol. 23, 291-299; skimage's ``rgb2hed``).
    2. Foreground is darker than its surroundings (Gaussian-weighted mean over ``surround_um``) and than a fraction of
       the picture's Otsu threshold; small holes and grains are removed.
    3. Touching nuclei are split by watershed from the peaks of distance transform plus blurred density.

    ``cell_type`` is always "Nucleus"; ``probability`` is the mean contrast to the surroundings, squashed to [0, 1].

    Measured on annotated H&E, F1 of centres within 6 um and of instances with IoU > 0.5:

    - MoNuSeg (breast, colon), middle quarters of four images: 0.86 and 0.71; whole images 0.83 and 0.66, with 28 % too
      many nuclei.
    - CoNSeP (colon), one tile of each of 27 images: 0.70 and 0.35. Nuclei of crowded glands merge: a quarter to a third
      are missing from the count.

    Compare counts within one tissue and scanner only. ``pytest -s -k annotated tests/core/test_nuclei.py`` prints the
    figures of the quarters and of the 27 tiles.
    """

    work_um_per_px: float = 0.25
    blur_um: float = 0.55
    surround_um: float = 4.0
    otsu_fraction: float = 0.9
    min_area_um2: float = 6.0
    split_um: float = 0.4
    min_separation_um: float = 2.3

    def segment(self, image: np.ndarray, um_per_px: float = UM_PER_PX) -> np.ndarray:
        """Instance labels int32 ``[H, W]`` of one uint8 RGB picture, 0 = background."""
        return self._segment(_check(image[None], um_per_px)[0], um_per_px)[0]

    def _segment(self, image: np.ndarray, um_per_px: float) -> tuple[np.ndarray, np.ndarray]:
        """Labels and contrast, both ``[H, W]`` at the scale of ``image``."""
        scale = um_per_px / self.work_um_per_px
        shape = tuple(max(8, round(side * scale)) for side in image.shape[:2])
        small = F.interpolate(
            torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float(),
            size=shape, mode="bilinear", antialias=True,
        )  # fmt: skip
        rgb = small[0].permute(1, 2, 0).clamp(0, 255).numpy() / 255.0
        px = 1.0 / self.work_um_per_px
        density = filters.gaussian(color.rgb2hed(rgb)[..., 0], self.blur_um * px)
        surround = filters.gaussian(density, self.surround_um * px, mode="reflect")
        contrast = density - surround
        mask = (contrast > 0) & (density > self.otsu_fraction * filters.threshold_otsu(density))
        mask = morphology.opening(mask, morphology.disk(max(1, round(px))))
        mask = ndimage.binary_fill_holes(mask)
        smallest = max(1, round(self.min_area_um2 * px**2))
        mask = morphology.remove_small_objects(mask, max_size=smallest - 1)
        distance = filters.gaussian(ndimage.distance_transform_edt(mask), self.split_um * px)
        tops = feature.peak_local_max(
            distance, min_distance=max(1, round(self.min_separation_um * px)), labels=measure.label(mask),
            exclude_border=False,
        )  # fmt: skip
        markers = np.zeros(mask.shape, dtype=np.int32)
        markers[tuple(tops.T)] = np.arange(1, len(tops) + 1)
        labels = segmentation.watershed(-distance, markers, mask=mask)
        if labels.shape != image.shape[:2]:
            rows, columns = (
                np.minimum(((np.arange(n) + 0.5) * m / n).astype(int), m - 1)
                for n, m in zip(image.shape[:2], labels.shape, strict=True)
            )
            labels, contrast = labels[np.ix_(rows, columns)], contrast[np.ix_(rows, columns)]
        return labels.astype(np.int32), contrast

    def read(self, images: np.ndarray, um_per_px: float = UM_PER_PX) -> list[pd.DataFrame]:
        """Nuclei of every picture; see :class:`Reader`."""
        return [self._read(image, um_per_px) for image in _check(images, um_per_px)]

    def _read(self, image: np.ndarray, um_per_px: float) -> pd.DataFrame:
        labels, contrast = self._segment(image, um_per_px)
        regions = measure.regionprops(labels, intensity_image=contrast)
        yx = np.array([r.centroid for r in regions], dtype=np.float64).reshape(-1, 2)
        xy = (yx[:, ::-1] + 0.5) * um_per_px
        area = np.array([r.area for r in regions], dtype=np.float64) * um_per_px**2
        probability = np.array([1.0 - np.exp(-max(r.intensity_mean, 0.0) / 0.02) for r in regions], dtype=np.float64)
        return _table(xy, area, np.full(len(regions), "Nucleus", dtype=object), probability)


def classical_reader(images: np.ndarray, um_per_px: float = UM_PER_PX) -> list[pd.DataFrame]:
    """:class:`ClassicalReader` with its default settings."""
    return ClassicalReader().read(images, um_per_px)


# --- How good is a reader? --------------------------------------------------------------------------------------


class Matches(NamedTuple):
    """One-to-one pairs: row ``found[i]`` of the found nuclei is row ``true[i]`` of the true ones."""

    found: np.ndarray
    true: np.ndarray
    distance_um: np.ndarray


def match_detections(found: pd.DataFrame, true: pd.DataFrame, max_um: float = 6.0) -> Matches:
    """As many one-to-one pairs with centres at most ``max_um`` apart as there can be, of least total distance.

    Both tables need ``x_um`` and ``y_um``. Solved exactly as an assignment problem.
    """
    a, b = (t[["x_um", "y_um"]].to_numpy(dtype=np.float64) for t in (found, true))
    distance = np.linalg.norm(a[:, None] - b[None], axis=-1)
    # A pair out of reach costs more than all pairs within reach together, so the number of pairs comes first.
    cost = np.where(distance <= max_um, distance, (min(len(a), len(b)) + 1) * (max_um + 1.0))
    i, j = linear_sum_assignment(cost)
    near = distance[i, j] <= max_um
    return Matches(i[near], j[near], distance[i, j][near])


def detection_scores(n_matched: int, n_found: int, n_true: int) -> dict[str, float]:
    """``precision``, ``recall``, ``f1`` and ``count_bias`` = found / true - 1; NaN where the denominator is 0.

    Examples
    --------
    >>> detection_scores(n_matched=8, n_found=10, n_true=16)
    {'precision': 0.8, 'recall': 0.5, 'f1': 0.6153846153846154, 'count_bias': -0.375}
    """

    def ratio(a: float, b: float) -> float:
        return a / b if b else float("nan")

    return {
        "precision": ratio(n_matched, n_found),
        "recall": ratio(n_matched, n_true),
        "f1": ratio(2 * n_matched, n_found + n_true),
        "count_bias": ratio(n_found - n_true, n_true),
    }


def confusion(found: pd.DataFrame, true: pd.DataFrame, matches: Matches, classes: Sequence[str]) -> pd.DataFrame:
    """Matched nuclei by true type (rows) and found type (columns), ``[type, type]`` counts.

    Raises
    ------
    ValueError: a type that is not in ``classes``.
    """
    index = pd.Index(classes)
    rows = index.get_indexer(true["cell_type"].to_numpy(dtype=object)[matches.true])
    columns = index.get_indexer(found["cell_type"].to_numpy(dtype=object)[matches.found])
    if (rows < 0).any() or (columns < 0).any():
        raise ValueError(f"a nucleus has a type that is not among {', '.join(classes)}")
    table = np.zeros((len(index), len(index)), dtype=int)
    np.add.at(table, (rows, columns), 1)
    return pd.DataFrame(table, index=index.rename("true"), columns=index.rename("found"))
