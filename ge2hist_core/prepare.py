"""``python -m ge2hist_core prepare INPUT --image HE.tif --out DATA.zarr``: a lab's slide as a store to train on.

What INPUT is shows by its files (:func:`recognise`): a Visium HD run, a Xenium output folder, a SpatialData store that
others made, a Visium run, or a folder of classic ST sections. All become the same SpatialData store that ``simulate``
writes: registration is checked, cells are outlined and labelled, and the slide is cut into regions that take the place
of donors when cells are split for training. Regions are kept apart by a gap, and each has a picture of its own, so no
tile of one shows a pixel of another.

Of a Visium HD run nuclei are found in the H&E and 2-um bins summed per nucleus. Xenium and SpatialData give outlines
and counts of their own. Of spot data each spot is one row, ``unit: spot``: what is learned from it is about spots.

Everything but the store goes to ``DATA.zarr.prepare`` beside it: ``report.json``, ``registration.png``,
``barcode_mappings.parquet`` (which bin went to which cell) and, until the store is written, the finished stages, which
``--resume`` takes up where a run stopped. The store appears only when it is whole.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp

from ge2hist_core.cell_labels import UNLABELLED, CellLabels
from ge2hist_core.config import TILE_PX, UM_PER_PX
from ge2hist_core.files import atomic_path, write_json
from ge2hist_core.segmentation import SEGMENTERS, Crop
from ge2hist_core.types import BadInput

if TYPE_CHECKING:
    from ge2hist_core.slide_cells import Account, SlideCells
    from ge2hist_core.slide_image import SlideImage
    from ge2hist_core.store import SectionRecord
    from ge2hist_core.visium_hd import Ledger, SpaceRanger

__all__ = ["KINDS", "Settings", "add_arguments", "main", "prepare", "recognise"]

KINDS = {
    "visium-hd": "a Visium HD run (Space Ranger's `outs`)",
    "xenium": "a Xenium output folder",
    "spatialdata": "a SpatialData store",
    "visium": "a Visium run (Space Ranger's `outs`)",
    "st": "a folder of ST sections (NAME.counts.tsv, NAME.spots.tsv, NAME.jpg)",
}
SPOT_KINDS = ("visium", "st")
ST_UM_PER_PX = 1.0
"""Scale for ST where none is given: a tile then holds a spot of 100 um."""
OWN_OUTLINES = "space-ranger"
FROM_FILE = "geojson"
METHODS = (*SEGMENTERS, OWN_OUTLINES, FROM_FILE)
AUTO_REGIONS = (4, 3, 2)
LEAST_REGION_TILES = 4
"""A region of ``--regions auto`` is at least this many tiles wide and high."""
STRIP_PX = 512
NOTE_TILES = 16
"""After so many tiles the segmentation is kept for ``--resume``."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TEMPORARY = (
    "image.npy",
    "labels.npy",
    "cells.npy",
    "contested.npy",
    "names.json",
    "counts.npz",
    "bins.npz",
    "state.json",
)


@dataclass(frozen=True)
class Settings:
    """How a slide is prepared; the fields are the options of the command.

    Parameters
    ----------
    folder: what :func:`recognise` knows. image: full-resolution H&E, None where the folder holds it. out: the store.
    alignment: Xenium Explorer's matrix from px of the H&E to px of the morphology image.
    segmenter: one of ``METHODS``. weights: of StarDist or InstanSeg. outlines: GeoJSON for ``geojson``.
    whole_cells: with ``space-ranger`` or Xenium, count cell outlines instead of nuclei.
    expand_um: nuclei are grown by so much before bins are assigned, towards the cytoplasm.
    labels, label_column, markers, celltypist, clusters: where types come from; one or none. ``label_column`` is of the
        table of labels or, without one, of the input's own table. clusters: how many, by expression.
    image_element, cells_element, table, coordinate_system, um_per_unit, layer: of a SpatialData store, where it leaves
        a choice.
    spot_pitch_um: distance of ST's spots. spot_um: their diameter.
    regions: ``auto`` or rows x columns. gap_um: between regions, one tile if None.
    donor: name of the slide's donor, the folder's name if None.
    um_per_px: scale of the store's picture.
    shift_um: (x, y) added to the bins' places.
    min_umi: nuclei with fewer UMIs are no cells.
    genome: what the reference's name must contain. raw: read the raw matrix.
    """

    folder: Path
    image: Path | None
    out: Path
    alignment: Path | None = None
    segmenter: str = "classical"
    weights: Path | None = None
    outlines: Path | None = None
    whole_cells: bool = False
    expand_um: float = 0.0
    labels: Path | None = None
    label_column: str | None = None
    markers: Path | None = None
    celltypist: str | None = None
    clusters: int | None = None
    image_element: str | None = None
    cells_element: str | None = None
    table: str | None = None
    coordinate_system: str | None = None
    um_per_unit: float | None = None
    layer: str | None = None
    spot_pitch_um: float = 200.0
    spot_um: float = 100.0
    regions: str = "auto"
    gap_um: float | None = None
    donor: str | None = None
    um_per_px: float = UM_PER_PX
    shift_um: tuple[float, float] = (0.0, 0.0)
    min_umi: int = 10
    genome: str = "GRCh38"
    raw: bool = False
    workers: int = 2
    resume: bool = False
    overwrite: bool = False
    keep: bool = False

    def __post_init__(self) -> None:
        if self.segmenter not in METHODS:
            raise BadInput(f"segmenter is {self.segmenter!r}: choose {', '.join(METHODS)}.")
        if (self.segmenter == FROM_FILE) != (self.outlines is not None):
            raise BadInput("--outlines and --segmenter geojson belong together: give both or neither.")
        given = (self.labels, self.markers, self.celltypist, self.clusters)
        if sum(value is not None for value in given) > 1:
            raise BadInput("--labels, --markers, --celltypist and --clusters each label all cells: give one.")
        if not 0 <= self.expand_um <= 20:
            raise BadInput(f"expand_um is {self.expand_um:g}: choose 0 to 20 um.")
        if not 0.1 <= self.um_per_px <= 1.0:
            raise BadInput(f"um_per_px is {self.um_per_px:g}: choose 0.1 to 1 um per pixel.")
        if self.gap_um is not None and not 0 <= self.gap_um <= 1000:
            raise BadInput(f"gap_um is {self.gap_um:g}: choose 0 to 1000 um.")
        if not (1 <= self.spot_um <= self.spot_pitch_um <= 1000):
            raise BadInput(
                f"spot_um is {self.spot_um:g}, spot_pitch_um {self.spot_pitch_um:g}: give 1 to 1000 um, spots narrower "
                "than their pitch."
            )
        if self.um_per_unit is not None and not 1e-6 <= self.um_per_unit <= 1e6:
            raise BadInput(f"um_per_unit is {self.um_per_unit:g}: give the um of one unit of the coordinate system.")
        if self.min_umi < 1 or self.workers < 1:
            raise BadInput(f"min_umi is {self.min_umi}, workers {self.workers}: give at least 1 of each.")
        if self.regions != "auto" and not re.fullmatch(r"[1-9]\d?x[1-9]\d?", self.regions):
            raise BadInput(f"regions is {self.regions!r}: give auto, or rows x columns such as 3x3.")
        if self.donor is not None and not re.fullmatch(r"[A-Za-z0-9_.-]+", self.donor):
            raise BadInput(f"donor is {self.donor!r}: use letters, digits, '_', '-' and '.'.")

    @property
    def donor_name(self) -> str:
        return self.donor or re.sub(r"[^A-Za-z0-9_.-]", "-", self.out.stem).strip(".-") or "slide"

    @property
    def work(self) -> Path:
        """Folder of stages and report."""
        return self.out.with_name(self.out.name + ".prepare")

    @property
    def gap_px(self) -> int:
        return TILE_PX if self.gap_um is None else round(self.gap_um / self.um_per_px)


class Region(NamedTuple):
    """A part of the section that is split as one donor: px of the crop."""

    donor: str
    top: int
    bottom: int
    left: int
    right: int


def prepare(settings: Settings) -> dict[str, Any]:
    """Make the store; returns what is written to ``report.json``.

    Raises
    ------
    BadInput: anything wrong with run, picture, tables or settings; no space on the disk.
    """
    if settings.out.exists() and not settings.overwrite:
        raise BadInput(f"{settings.out} exists: give another name, or --overwrite to replace it.")
    kind = recognise(settings.folder)
    _check_options(settings, kind)
    with _disk(settings):
        report, stages = _prepare_bins(settings) if kind == "visium-hd" else _prepare_given(settings, kind)
        write_json(settings.work / "report.json", report)
        if not settings.keep:
            stages.clean()
    return report


def recognise(folder: Path) -> str:
    """Which of ``KINDS`` a folder is, by the files that it holds.

    Raises
    ------
    BadInput: none of them.
    """
    from ge2hist_core import foreign_spatialdata, spots, xenium

    if not folder.is_dir():
        raise BadInput(f"{folder} is not a folder: give {_listed_kinds()}.")
    if foreign_spatialdata.is_store(folder):
        return "spatialdata"
    if xenium.is_xenium(folder):
        return "xenium"
    if spots.is_st(folder):
        return "st"
    if any((place / "binned_outputs").is_dir() for place in (folder, folder / "outs")):
        return "visium-hd"
    if spots.is_visium(folder):
        return "visium"
    bins = (folder / "spatial" / "tissue_positions.parquet").is_file() or folder.name == "binned_outputs"
    if bins or any(folder.rglob("*binned_outputs.tar.gz")):
        return "visium-hd"
    raise BadInput(f"{folder} holds nothing known: give {_listed_kinds()}.")


def _listed_kinds() -> str:
    *first, last = KINDS.values()
    return f"{', '.join(first)} or {last}"


def _check_options(settings: Settings, kind: str) -> None:
    """Refuse options that mean nothing for a kind, so that none is silently ignored."""
    default = Settings.__dataclass_fields__

    def changed(*names: str) -> list[str]:
        return [name for name in names if getattr(settings, name) != default[name].default]

    if settings.image is None and kind in ("visium-hd", "xenium"):
        raise BadInput(f"{settings.folder} is {KINDS[kind]}: give its full-resolution H&E by --image.")
    if settings.image is not None and kind in ("spatialdata", "st"):
        raise BadInput(f"{settings.folder} is {KINDS[kind]} and holds the picture: leave out --image.")
    if kind == "visium-hd" and settings.whole_cells and settings.segmenter != OWN_OUTLINES:
        raise BadInput(f"--whole-cells needs the outlines of --segmenter {OWN_OUTLINES}: give both or neither.")
    foreign = {
        "visium-hd": ("segmenter", "weights", "outlines", "expand_um", "raw"),
        "xenium": ("alignment",),
        "spatialdata": ("image_element", "cells_element", "table", "coordinate_system", "um_per_unit", "layer"),
        "st": ("spot_pitch_um", "spot_um"),
    }
    for owner, names in foreign.items():
        if owner != kind and (idle := changed(*names)):
            raise BadInput(f"--{idle[0].replace('_', '-')} is for {KINDS[owner]}; this is {KINDS[kind]}: leave it out.")
    if settings.whole_cells and kind not in ("visium-hd", "xenium"):
        raise BadInput(f"--whole-cells is for Visium HD and Xenium; this is {KINDS[kind]}: leave it out.")


def _prepare_bins(settings: Settings) -> tuple[dict[str, Any], _Stages]:
    """A Visium HD run."""
    from ge2hist_core.slide_image import SlideImage
    from ge2hist_core.visium_hd import check_image, open_space_ranger

    assert settings.image is not None
    run = open_space_ranger(settings.folder, settings.genome, settings.raw)
    with SlideImage(settings.image, um_per_px=run.um_per_px) as image:
        figures = check_image(run, image)
        seen = run.xy_um[run.in_tissue]
        if not len(seen):
            raise BadInput("No bin lies in the tissue: look at Space Ranger's tissue detection.")
        crop = _crop(seen + np.array(settings.shift_um), image, settings)
        regions = _regions(crop, settings, settings.donor_name)
        stages = _Stages(settings, _stages_of_bins(settings, run, crop))
        report = _prepare(settings, run, image, crop, regions, stages)
    return report | {"image_check": figures}, stages


def _prepare(
    settings: Settings, run: SpaceRanger, image: SlideImage, crop: Crop, regions: list[Region], stages: _Stages
) -> dict[str, Any]:
    from ge2hist_core.registration import check_registration, draw_overlay
    from ge2hist_core.segmentation import nuclei_table
    from ge2hist_core.store import write_store

    um = settings.um_per_px
    origin = (crop.left * um, crop.top * um)
    labels, cells, contested, names = _outline(settings, run, image, crop, stages)
    table = nuclei_table(labels, len(names), um)
    if not len(table) or not table["area_um2"].any():
        raise BadInput(f"No nucleus was found in {image.name}: look at it, or choose another --segmenter.")
    counts, owner, umi = _count(settings, run, cells, contested, origin, len(names), stages)

    tissue = run.in_tissue
    xy_um = run.xy_um[tissue] + np.asarray(settings.shift_um, dtype=np.float32)
    registration = check_registration(image, xy_um, umi[tissue])
    if registration.warning:
        print(f"warning: {registration.warning}")
    overlay = settings.work / "registration.png"
    draw_overlay(overlay, image, xy_um, umi[tissue], registration, labels, origin, um)

    region_of = _region_of(table, regions, um)
    n_umi = np.asarray(counts.sum(axis=1)).ravel()
    enough = n_umi >= settings.min_umi
    kept = np.flatnonzero(enough & (region_of >= 0))
    kept = kept[np.argsort(region_of[kept], kind="stable")]
    if not len(kept):
        raise BadInput(
            f"No nucleus holds {settings.min_umi} UMIs: look at registration.png in {settings.work}, or give a lower "
            "--min-umi."
        )
    cell_of_label = np.zeros(len(names) + 1, dtype=np.int32)
    cell_of_label[kept + 1] = np.arange(1, len(kept) + 1)
    ledger = _ledger(run, owner, umi, enough, region_of)
    if ledger.assigned != int(counts[kept].sum(dtype=np.float64)):
        raise RuntimeError("the cells' counts and the bins' disagree")

    within = np.concatenate([np.arange(1, n + 1) for n in np.bincount(region_of[kept], minlength=len(regions))])
    cell_id = np.array([f"{regions[r].donor}_{i}" for r, i in zip(region_of[kept], within, strict=True)], dtype=object)
    bin_cell = np.where(owner > 0, cell_of_label[np.maximum(owner, 0)], 0)
    found = _label(settings, run, counts[kept], cell_id, names[kept], bin_cell)
    n_bins = np.bincount(bin_cell, minlength=len(kept) + 1)[1:]
    cells_table = table.iloc[kept].assign(
        cell_type=found.cell_type,
        type_confidence=found.confidence,
        n_umi=n_umi[kept].astype(np.int64),
        n_bins=n_bins,
        x_image_px=(table["x_um"].iloc[kept] + origin[0]) / run.um_per_px,
        y_image_px=(table["y_um"].iloc[kept] + origin[1]) / run.um_per_px,
        slide_cell=names[kept].astype(str),
    )
    _write_mappings(settings.work / "barcode_mappings.parquet", run, bin_cell, cell_id)
    picture = _picture(settings, image, crop, stages)
    sections = _sections(regions, region_of[kept], kept, cells_table, counts, labels, picture, um)
    write_store(settings.out, sections, run.genes, simulation=None, um_per_px=um)
    types = pd.Series(found.cell_type).value_counts()
    return {
        "kind": "visium-hd",
        "unit": "cell" if settings.whole_cells else "nucleus",
        "run": run.folder.name,
        "software": run.software,
        "layout": run.version,
        "image": {"name": image.name, "height_px": image.height, "width_px": image.width, "um_per_px": image.um_per_px},
        "store_um_per_px": um,
        "crop_px": crop._asdict(),
        "segmenter": settings.segmenter,
        "expand_um": settings.expand_um,
        "shift_um": list(settings.shift_um),
        "bins": run.n_bins,
        "nuclei": int((table["area_um2"] > 0).sum()),
        "cells": len(kept),
        "genes": len(run.genes),
        "median_umi": float(np.median(n_umi[kept])),
        "umi": {**vars(ledger)},
        "regions": {r.donor: int((region_of[kept] == i).sum()) for i, r in enumerate(regions)},
        "gap_um": settings.gap_px * um if len(regions) > 1 else 0.0,
        "cell_types": {str(name): int(n) for name, n in types.items()},
        "mean_type_confidence": float(found.confidence.mean()),
        "registration": registration.to_json(),
    }


class _Stages:
    """Which stages are done, on disk: a stage counts as done if all that it depends on is as it was.

    Parameters
    ----------
    wanted: by stage, what it depends on, as JSON can hold it.
    """

    def __init__(self, settings: Settings, wanted: dict[str, Any]) -> None:
        self.folder = settings.work
        self.path = self.folder / "state.json"
        self._wanted = {k: hashlib.sha256(json.dumps(v).encode()).hexdigest() for k, v in wanted.items()}
        self._state: dict[str, dict[str, Any]] = {}
        if settings.resume and self.path.is_file():
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            self._state = {k: v for k, v in stored.items() if v["of"] == self._wanted.get(k)}
        else:
            self.clean()
        self.folder.mkdir(parents=True, exist_ok=True)

    def progress(self, stage: str) -> dict[str, Any]:
        """What was noted of a stage, {} if it has to begin."""
        return dict(self._state.get(stage, {}))

    def restart(self, stage: str) -> None:
        """Forget what was noted of a stage."""
        self._state.pop(stage, None)

    def note(self, stage: str, **values: Any) -> None:
        """Keep how far a stage is."""
        self._state[stage] = {"of": self._wanted[stage], **values}
        write_json(self.path, self._state)

    def array(self, name: str, shape: tuple[int, ...], dtype: Any, new: bool) -> np.ndarray:
        """A zeroed array on disk, or the one that is there. Its space is taken at once: a full disk shows here."""
        path = self.folder / name
        if not new and path.is_file():
            stored = np.lib.format.open_memmap(path, mode="r+")
            if stored.shape == shape and stored.dtype == dtype:
                return stored
        path.unlink(missing_ok=True)
        array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return array

    def clean(self) -> None:
        """Remove the stages; the report stays."""
        for name in TEMPORARY:
            (self.folder / name).unlink(missing_ok=True)


def _stages_of_bins(settings: Settings, run: SpaceRanger, crop: Crop) -> dict[str, Any]:
    assert settings.image is not None
    picture = [_stamp(settings.image), settings.um_per_px, run.um_per_px, list(crop)]
    outlines = [
        picture, settings.segmenter, str(settings.weights), settings.whole_cells,
        _stamp(settings.outlines) if settings.outlines else None,
        [_stamp(p) for p in sorted(run.segmented.glob("*.geojson"))] if run.segmented else [],
    ]  # fmt: skip
    counts = [outlines, _stamp(run.matrix), settings.expand_um, list(settings.shift_um)]
    return {"image": picture, "labels": outlines, "counts": counts}


def _stamp(path: Path) -> list[Any]:
    """Identity of a large file that need not be read: name, size, time of change."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


@contextmanager
def _disk(settings: Settings) -> Iterator[None]:
    """A full disk as one sentence; what was finished stays for ``--resume``."""
    try:
        yield
    except OSError as error:
        cause: BaseException | None = error
        while cause is not None and getattr(cause, "errno", None) not in DISK_FULL:
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        free = shutil.disk_usage(_existing(settings.out)).free / 1e9
        raise BadInput(
            f"{settings.out} could not be written, the disk is full ({free:.1f} GB free) or the file larger than "
            "allowed: make room and run again with --resume."
        ) from error


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def _crop(seen: np.ndarray, image: SlideImage, settings: Settings) -> Crop:
    """The part of the picture with the places ``seen`` (um) and half a tile around, px of the store's scale."""
    um = settings.um_per_px
    size = np.floor(np.array([image.width, image.height]) * image.um_per_px / um).astype(int)
    low = np.maximum(np.floor(seen.min(axis=0) / um).astype(int) - TILE_PX // 2, 0)
    high = np.minimum(np.ceil(seen.max(axis=0) / um).astype(int) + TILE_PX // 2, size)
    crop = Crop(int(low[1]), int(low[0]), int(high[1] - low[1]), int(high[0] - low[0]))
    if min(crop.height, crop.width) < TILE_PX:
        raise BadInput(
            f"The tissue is {crop.width * um:g} x {crop.height * um:g} um: a tile needs {TILE_PX * um:g} um."
        )
    need = crop.height * crop.width * (3 + 4 + 4 * bool(settings.expand_um) + 4) + 200_000_000
    free = shutil.disk_usage(_existing(settings.out)).free
    if free < need:
        raise BadInput(
            f"The store needs about {need / 1e9:.1f} GB while it is made, {_existing(settings.out)} has "
            f"{free / 1e9:.1f} GB free: make room or give another --out."
        )
    return crop


def _regions(crop: Crop, settings: Settings, donor: str) -> list[Region]:
    """The section cut into a grid with a gap between; names are the slide's donor and the place in the grid."""
    gap, least = settings.gap_px, TILE_PX
    if settings.regions == "auto":
        sides = (min((crop.height - (n - 1) * gap) // n, (crop.width - (n - 1) * gap) // n) for n in AUTO_REGIONS)
        n = next((n for n, side in zip(AUTO_REGIONS, sides, strict=True) if side >= LEAST_REGION_TILES * TILE_PX), 1)
        rows = columns = n
    else:
        rows, columns = (int(part) for part in settings.regions.split("x"))
    height, width = (crop.height - (rows - 1) * gap) // rows, (crop.width - (columns - 1) * gap) // columns
    if min(height, width) < least:
        um = settings.um_per_px
        raise BadInput(
            f"regions {rows}x{columns} leaves {width * um:g} x {height * um:g} um each, a tile needs {least * um:g}: "
            "give fewer regions."
        )
    if rows * columns == 1:
        return [Region(donor, 0, crop.height, 0, crop.width)]
    return [
        Region(f"{donor}-r{r}c{c}", r * (height + gap), r * (height + gap) + height,
               c * (width + gap), c * (width + gap) + width)
        for r in range(rows) for c in range(columns)
    ]  # fmt: skip


def _region_of(table: pd.DataFrame, regions: list[Region], um_per_px: float) -> np.ndarray:
    """Region of each nucleus by its centre, -1 in a gap."""
    x, y = table["x_um"].to_numpy() / um_per_px, table["y_um"].to_numpy() / um_per_px
    out = np.full(len(table), -1, dtype=np.int64)
    for i, r in enumerate(regions):
        out[(x >= r.left) & (x < r.right) & (y >= r.top) & (y < r.bottom)] = i
    return out


def _outline(
    settings: Settings, run: SpaceRanger, image: SlideImage, crop: Crop, stages: _Stages
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """Nuclei, the areas whose bins count for them, where outlines overlap, and a name per label."""
    from ge2hist_core.segmentation import expand_labels_tiled

    shape = (crop.height, crop.width)
    noted = stages.progress("labels")
    labels = stages.array("labels.npy", shape, np.dtype(np.int32), new=not noted)
    contested = None
    cells = labels
    if settings.segmenter in SEGMENTERS:
        n = _segment(settings, run, image, crop, labels, noted, stages)
        names = np.arange(1, n + 1).astype(str).astype(object)
    else:
        names, shapes, wide = _given_outlines(settings, run)
        contested = stages.array("contested.npy", shape, np.dtype(bool), new=True)
        cells = _paint(settings, crop, stages, labels, contested, shapes, wide)
    if settings.expand_um:
        grown = stages.array("cells.npy", shape, np.dtype(np.int32), new=True)
        expand_labels_tiled(cells, grown, settings.expand_um / settings.um_per_px)
        cells = grown
    return labels, cells, contested, names


def _segment(
    settings: Settings, run: SpaceRanger, image: SlideImage, crop: Crop, labels: np.ndarray,
    noted: dict[str, Any], stages: _Stages,
) -> int:  # fmt: skip
    from tqdm import tqdm

    from ge2hist_core.segmentation import load_segmenter, segment

    if noted.get("complete"):
        return int(noted["n_labels"])
    done, n_labels = int(noted.get("done", 0)), int(noted.get("n_labels", 0))
    if done:
        for top in range(0, labels.shape[0], STRIP_PX):
            strip = labels[top : top + STRIP_PX]
            strip[strip > n_labels] = 0  # of a tile that was not finished
    steps = segment(
        image, crop, settings.um_per_px, load_segmenter(settings.segmenter, settings.weights), labels,
        where=_tissue(run, settings), start=done, n_labels=n_labels, workers=settings.workers,
    )  # fmt: skip
    with tqdm(unit="tile", desc="segment", initial=done) as bar:
        for step in steps:
            bar.total = step.tiles
            bar.update(1)
            n_labels = step.n_labels
            if step.done % NOTE_TILES == 0:
                labels.flush()  # type: ignore[attr-defined]
                stages.note("labels", done=step.done, n_labels=n_labels)
    labels.flush()  # type: ignore[attr-defined]
    stages.note("labels", complete=True, n_labels=n_labels)
    return n_labels


def _tissue(run: SpaceRanger, settings: Settings) -> Any:
    """Whether a tile holds a bin in the tissue, as a function of the tile."""
    coarse = 32
    at = np.floor(
        (run.xy_um[run.in_tissue] + np.asarray(settings.shift_um, dtype=np.float32)) / (coarse * settings.um_per_px)
    ).astype(int)
    at = np.maximum(at, 0)
    grid = np.zeros(at.max(axis=0)[::-1] + 1, dtype=bool)
    grid[at[:, 1], at[:, 0]] = True

    def holds(tile: Crop) -> bool:
        rows = slice(tile.top // coarse, (tile.top + tile.height) // coarse + 1)
        columns = slice(tile.left // coarse, (tile.left + tile.width) // coarse + 1)
        return bool(grid[rows, columns].any())

    return holds


def _given_outlines(settings: Settings, run: SpaceRanger) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Names, outlines of nuclei, and of whole cells where these are to be counted."""
    from ge2hist_core.visium_hd import read_outlines

    if settings.outlines is not None:
        names, shapes = read_outlines(settings.outlines, run.um_per_px)
        return names, shapes, None
    if run.segmented is None:
        raise BadInput(
            f"{run.folder} has no segmented_outputs, which Space Ranger 4 writes: choose another --segmenter."
        )
    names, shapes = read_outlines(run.segmented / "nucleus_segmentations.geojson", run.um_per_px)
    if not settings.whole_cells:
        return names, shapes, None
    cell_names, cell_shapes = read_outlines(run.segmented / "cell_segmentations.geojson", run.um_per_px)
    at = pd.Index(cell_names).get_indexer(pd.Index(names))
    if (at < 0).all():
        raise BadInput("cell_segmentations.geojson and nucleus_segmentations.geojson share no cell_id: mixed runs.")
    return names, shapes, np.where(at >= 0, cell_shapes[np.maximum(at, 0)], shapes)


def _paint(
    settings: Settings, crop: Crop, stages: _Stages, labels: np.ndarray, contested: np.ndarray,
    shapes: np.ndarray, wide: np.ndarray | None,
) -> np.ndarray:  # fmt: skip
    from ge2hist_core.segmentation import paint_outlines

    labels[...] = 0
    paint_outlines(list(shapes), crop, settings.um_per_px, labels, contested)
    stages.note("labels", complete=True, n_labels=len(shapes))
    if wide is None:
        return labels
    cells = stages.array("cells.npy", labels.shape, np.dtype(np.int32), new=True)
    contested[...] = False
    paint_outlines(list(wide), crop, settings.um_per_px, cells, contested)
    return cells


def _count(
    settings: Settings, run: SpaceRanger, cells: np.ndarray, contested: np.ndarray | None,
    origin: tuple[float, float], n_labels: int, stages: _Stages,
) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:  # fmt: skip
    """Counts ``[label, gene]``, owner and UMIs of every bin."""
    from tqdm import tqdm

    from ge2hist_core.visium_hd import assign_bins, sum_counts

    counts_path, bins_path = stages.folder / "counts.npz", stages.folder / "bins.npz"
    if stages.progress("counts"):
        with np.load(bins_path) as stored:
            return sp.load_npz(counts_path), stored["owner"], stored["umi"]
    owner = assign_bins(run, cells, settings.um_per_px, origin, settings.shift_um, contested)
    owner[~run.in_tissue] = 0
    with tqdm(total=run.n_bins, unit="bin", unit_scale=True, desc="count") as bar:
        counts, umi = sum_counts(run, owner, n_labels, bar.update)
    with atomic_path(counts_path) as temporary:
        sp.save_npz(temporary, counts, compressed=False)
    with atomic_path(bins_path) as temporary:
        np.savez(temporary, owner=owner, umi=umi)
    stages.note("counts", complete=True)
    return counts, owner, umi


def _ledger(run: SpaceRanger, owner: np.ndarray, umi: np.ndarray, enough: np.ndarray, region: np.ndarray) -> Ledger:
    """Every UMI under one reason, counted bin by bin."""
    from ge2hist_core.visium_hd import AMBIGUOUS, Ledger

    mine = run.in_tissue & (owner > 0)
    label = np.maximum(owner, 1) - 1
    reasons = {
        "outside_tissue": ~run.in_tissue,
        "no_nucleus": run.in_tissue & (owner == 0),
        "ambiguous": run.in_tissue & (owner == AMBIGUOUS),
        "below_minimum": mine & ~enough[label],
        "between_regions": mine & enough[label] & (region[label] < 0),
        "assigned": mine & enough[label] & (region[label] >= 0),
    }
    return Ledger(total=int(umi.sum()), **{name: int(umi[chosen].sum()) for name, chosen in reasons.items()})


def _label(
    settings: Settings, run: SpaceRanger, counts: sp.csr_matrix, cell_id: np.ndarray, names: np.ndarray,
    bin_cell: np.ndarray,
) -> CellLabels:  # fmt: skip
    from ge2hist_core import cell_labels

    if settings.labels is not None:
        table = cell_labels.read_label_table(settings.labels, settings.label_column)
        return cell_labels.by_table(table, (cell_id, names), bin_cell, run.row, run.column)
    return _label_by_counts(settings, counts, run.genes.index) or _unlabelled(len(cell_id))


def _label_by_counts(settings: Settings, counts: sp.csr_matrix, genes: pd.Index) -> CellLabels | None:
    """Types by what the cells express, None where the settings ask for none of these ways."""
    from ge2hist_core import cell_labels
    from ge2hist_core.slide_cells import clusters

    if settings.markers is not None:
        return cell_labels.by_markers(counts, genes, cell_labels.read_markers(settings.markers))
    if settings.celltypist is not None:
        return cell_labels.by_celltypist(counts, genes, settings.celltypist)
    return None if settings.clusters is None else CellLabels(*clusters(counts, settings.clusters))


def _unlabelled(n: int) -> CellLabels:
    return CellLabels(np.full(n, UNLABELLED, dtype=object), np.zeros(n, dtype=np.float32))


def _write_mappings(path: Path, run: SpaceRanger, bin_cell: np.ndarray, cell_id: np.ndarray) -> None:
    """Which bin went to which cell, as Space Ranger 4 writes it; bins without a cell are left out."""
    used = np.flatnonzero(bin_cell > 0)
    names = [f"s_002um_{r:05d}_{c:05d}-1" for r, c in zip(run.row[used], run.column[used], strict=True)]
    frame = pd.DataFrame({"square_002um": names, "cell_id": cell_id[bin_cell[used] - 1]})
    with atomic_path(path) as temporary:
        frame.to_parquet(temporary, index=False)


def _picture(settings: Settings, image: SlideImage, crop: Crop, stages: _Stages) -> np.ndarray:
    """The crop at the store's scale, uint8 ``[H, W, 3]`` on disk, written strip by strip."""
    from tqdm import tqdm

    noted = stages.progress("image")
    picture = stages.array("image.npy", (crop.height, crop.width, 3), np.dtype(np.uint8), new=not noted)
    first = int(noted.get("rows", 0))
    columns = (crop.left, crop.left + crop.width)
    with tqdm(total=crop.height, initial=first, unit="row", desc="picture") as bar:
        for top in range(first, crop.height, STRIP_PX):
            bottom = min(top + STRIP_PX, crop.height)
            picture[top:bottom] = image.at_scale((crop.top + top, crop.top + bottom), columns, settings.um_per_px)
            picture.flush()  # type: ignore[attr-defined]
            stages.note("image", rows=bottom)
            bar.update(bottom - top)
    return picture


def _sections(
    regions: list[Region], region_of: np.ndarray, kept: np.ndarray, table: pd.DataFrame, counts: sp.csr_matrix,
    labels: np.ndarray, picture: np.ndarray, um_per_px: float,
) -> Iterator[SectionRecord]:  # fmt: skip
    """One record per region with cells; pixels stay on disk, labels are numbered anew."""
    from tqdm import tqdm

    from ge2hist_core.store import SectionRecord

    for i, region in enumerate(tqdm(regions, unit="region", desc="store")):
        mine = np.flatnonzero(region_of == i)
        if not len(mine):
            continue
        number = np.zeros(counts.shape[0] + 1, dtype=np.int32)
        number[kept[mine] + 1] = np.arange(1, len(mine) + 1)
        rows, columns = slice(region.top, region.bottom), slice(region.left, region.right)
        nuclei = table.iloc[mine].reset_index(drop=True)
        nuclei["x_um"] -= region.left * um_per_px
        nuclei["y_um"] -= region.top * um_per_px
        nuclei = nuclei.drop(columns="area_um2", errors="ignore")
        yield SectionRecord(
            region.donor, picture[rows, columns], number[labels[rows, columns]], nuclei, counts[kept[mine]]
        )


# --- Outlines and counts that are given: Xenium, SpatialData, spots ------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Placed:
    """A section on the grid of the store: its crop, its regions, and which cells are kept (in order of region)."""

    cells: SlideCells
    crop: Crop
    regions: list[Region]
    region_of: np.ndarray
    kept: np.ndarray
    account: Account
    cell_id: np.ndarray


def _prepare_given(settings: Settings, kind: str) -> tuple[dict[str, Any], _Stages]:
    """All kinds but Visium HD: one section or, of ST, several."""
    from ge2hist_core.slide_cells import Account
    from ge2hist_core.store import TissueStore, write_store

    with ExitStack() as stack:
        sections = _open_sections(settings, kind)
        for section in sections:
            stack.callback(section.image.close)
        stages = _Stages(settings, {"image": [str(settings.folder), settings.um_per_px]})
        several = len(sections) > 1
        placed = [_place(settings, section, several) for section in sections]
        kept = [p.cells.counts[p.kept] for p in placed]
        found = _label_given(settings, placed, sp.vstack(kept, format="csr"))
        checks: dict[str, Any] = {}
        write_store(
            settings.out,
            _records(settings, placed, found, stages, checks),
            sections[0].genes,
            um_per_px=settings.um_per_px,
        )
        warnings = [text for s in sections for text in s.warnings]
        warnings += [check["warning"] for check in checks.values() if check["warning"]]
        if sections[0].spot_um is not None and settings.um_per_px * TILE_PX < sections[0].spot_um:
            warnings.append(
                f"A tile is {settings.um_per_px * TILE_PX:g} um wide and shows a part of a spot of "
                f"{sections[0].spot_um:g} um only: give a larger --um-per-px."
            )
        for text in warnings:
            print(f"warning: {text}")
        n_umi = np.concatenate([np.asarray(counts.sum(axis=1)).ravel() for counts in kept])
        account = Account.together(p.account for p in placed)
        if account.parts["assigned"] != int(n_umi.sum()):
            raise RuntimeError("the store's counts and the account disagree")
        types = pd.Series(found.cell_type).value_counts()
        regions = {r.donor: int((p.region_of[p.kept] == i).sum()) for p in placed for i, r in enumerate(p.regions)}
        report = {
            "kind": kind,
            "unit": sections[0].unit,
            "run": settings.folder.name,
            "sections": {
                p.cells.section or settings.donor_name: {
                    "image": {"name": p.cells.image.name, "height_px": p.cells.image.height,
                              "width_px": p.cells.image.width, "um_per_px": p.cells.image.um_per_px},
                    "crop_px": p.crop._asdict(), "given": len(p.cells.names), "cells": len(p.kept),
                    "umi": {"total": p.account.total, **p.account.parts}, **p.cells.figures,
                }
                for p in placed
            },
            "store_um_per_px": settings.um_per_px,
            "tile_um": settings.um_per_px * TILE_PX,
            "spot_um": sections[0].spot_um,
            "shift_um": list(settings.shift_um),
            "given": sum(len(s.names) for s in sections),
            "cells": len(n_umi),
            "genes": len(sections[0].genes),
            "median_umi": float(np.median(n_umi)),
            "umi": {"total": account.total, **account.parts},
            "regions": regions,
            "gap_um": settings.gap_px * settings.um_per_px if any(len(p.regions) > 1 for p in placed) else 0.0,
            "split": TissueStore(settings.out).split(),
            "cell_types": {str(name): int(n) for name, n in types.items()},
            "mean_type_confidence": float(found.confidence.mean()),
            "registration": checks,
            "warnings": warnings,
        }  # fmt: skip
    return report, stages


def _open_sections(settings: Settings, kind: str) -> list[SlideCells]:
    from tqdm import tqdm

    from ge2hist_core import foreign_spatialdata, spots, xenium

    if kind == "st":
        return spots.open_st(settings.folder, settings.spot_pitch_um, settings.spot_um)
    if kind == "visium":
        return [spots.open_visium(settings.folder, settings.image, settings.genome)]
    if kind == "spatialdata":
        own = settings.label_column if settings.labels is None else None
        return [
            foreign_spatialdata.open_spatialdata(
                settings.folder, settings.image_element, settings.cells_element, settings.table,
                settings.coordinate_system, settings.um_per_unit, settings.layer, own,
            )
        ]  # fmt: skip
    assert settings.image is not None
    with tqdm(unit="transcript", unit_scale=True, desc="count") as bar:
        return [
            xenium.open_xenium(
                settings.folder, settings.image, settings.alignment, settings.whole_cells, settings.genome, bar.update
            )
        ]


def _place(settings: Settings, section: SlideCells, several: bool) -> _Placed:
    """Crop and regions of a section, and the account of all its UMIs."""
    from ge2hist_core.slide_cells import Account

    um = settings.um_per_px
    xy = section.xy_um + np.array(settings.shift_um)
    size = np.array([section.image.width, section.image.height]) * section.image.um_per_px
    inside = ((xy >= 0) & (xy < size)).all(axis=1)
    if not inside.any():
        raise BadInput(f"No {section.unit} lies within {section.image.name}: give the picture that belongs to them.")
    crop = _crop(xy[inside], section.image, settings)
    donor = settings.donor_name
    if section.section:
        donor = section.section if settings.donor is None else f"{settings.donor}-{section.section}"
    # Sections are split as donors are: only what has none is cut into regions.
    whole = several and settings.regions == "auto"
    regions = _regions(crop, replace(settings, regions="1x1") if whole else settings, donor)
    corner = np.array([crop.left, crop.top]) * um
    region_of = _region_of(pd.DataFrame(xy - corner, columns=["x_um", "y_um"]), regions, um)
    n_umi = np.asarray(section.counts.sum(axis=1)).ravel()
    enough = n_umi >= settings.min_umi
    good = inside & enough & (region_of >= 0)
    kept = np.flatnonzero(good)
    kept = kept[np.argsort(region_of[kept], kind="stable")]
    if not len(kept):
        raise BadInput(
            f"No {section.unit} of {section.image.name} holds {settings.min_umi} UMIs: give a lower --min-umi."
        )
    parts = {"assigned": good, "outside_image": ~inside, "below_minimum": inside & ~enough,
             "between_regions": inside & enough & (region_of < 0)}  # fmt: skip
    umi = {name: int(n_umi[chosen].sum()) for name, chosen in parts.items()} | section.dropped
    within = np.concatenate([np.arange(1, n + 1) for n in np.bincount(region_of[kept], minlength=len(regions))])
    cell_id = np.array([f"{regions[r].donor}_{i}" for r, i in zip(region_of[kept], within, strict=True)], dtype=object)
    total = int(n_umi.sum()) + sum(section.dropped.values())
    return _Placed(section, crop, regions, region_of, kept, Account(total, umi), cell_id)


def _label_given(settings: Settings, placed: list[_Placed], counts: sp.csr_matrix) -> CellLabels:
    """Types of all kept cells, section after section."""
    from ge2hist_core import cell_labels

    cell_id = np.concatenate([p.cell_id for p in placed])
    if settings.labels is not None:
        table = cell_labels.read_label_table(settings.labels, settings.label_column)
        names = np.concatenate(
            [[f"{p.cells.section}_{name}".removeprefix("_") for name in p.cells.names[p.kept]] for p in placed]
        )
        nothing = np.zeros(0, dtype=np.int64)
        return cell_labels.by_table(table, (cell_id, names), nothing, nothing, nothing)
    found = _label_by_counts(settings, counts, placed[0].cells.genes.index)
    if found is not None:
        return found
    if settings.label_column is not None:
        for p in placed:
            if settings.label_column not in p.cells.obs.columns:
                raise BadInput(
                    f"{p.cells.section or settings.folder.name} has no column {settings.label_column!r}: it has "
                    f"{', '.join(p.cells.obs.columns) or 'none'}; a table of labels is given by --labels."
                )
        values = pd.concat([p.cells.obs[settings.label_column].iloc[p.kept] for p in placed])
        text = values.astype("string").fillna("").str.strip().to_numpy(dtype=object)
        known = text != ""
        return CellLabels(np.where(known, text, UNLABELLED), known.astype(np.float32))
    return _unlabelled(len(cell_id))


def _records(
    settings: Settings, placed: list[_Placed], found: CellLabels, stages: _Stages, checks: dict[str, Any]
) -> Iterator[SectionRecord]:
    """Section after section: paint the outlines, check where they lie, cut the picture."""
    from ge2hist_core.segmentation import paint_outlines

    um, start = settings.um_per_px, 0
    for p in placed:
        cells, crop = p.cells, p.crop
        shift = np.array(settings.shift_um)
        shapes = _shifted(cells.outlines, shift)
        labels = stages.array("labels.npy", (crop.height, crop.width), np.dtype(np.int32), new=True)
        paint_outlines(list(shapes), crop, um, labels)
        checks[cells.section or settings.donor_name] = _check_place(settings, p, shift, labels)
        own = slice(start, start + len(p.kept))
        start += len(p.kept)
        corner = np.array([crop.left, crop.top]) * um
        xy = cells.xy_um[p.kept] + shift
        table = pd.DataFrame(
            {
                "x_um": xy[:, 0] - corner[0],
                "y_um": xy[:, 1] - corner[1],
                "cell_type": found.cell_type[own],
                "type_confidence": found.confidence[own],
                "n_umi": np.asarray(cells.counts[p.kept].sum(axis=1)).ravel().astype(np.int64),
                "unit": pd.Categorical.from_codes(np.zeros(len(p.kept), dtype=np.int8), [cells.unit]),
                "x_image_px": xy[:, 0] / cells.image.um_per_px,
                "y_image_px": xy[:, 1] / cells.image.um_per_px,
                "slide_cell": cells.names[p.kept].astype(str),
            }
        )
        if cells.spot_um is not None:
            table["spot_diameter_um"] = cells.spot_um
        for name in cells.obs.columns.difference(
            [*table.columns, "area_um2", "donor", "region", "instance_id"], sort=False
        ):
            table[name] = cells.obs[name].to_numpy()[p.kept]
        stages.restart("image")
        picture = _picture(settings, cells.image, crop, stages)
        yield from _sections(p.regions, p.region_of[p.kept], p.kept, table, cells.counts, labels, picture, um)


def _shifted(shapes: np.ndarray, shift: np.ndarray) -> np.ndarray:
    import shapely

    return shapely.transform(shapes, lambda xy: xy + shift) if shift.any() else shapes


def _check_place(settings: Settings, p: _Placed, shift: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Whether cells lie where the picture shows them, measured and drawn; ``warning`` is None or a sentence."""
    from ge2hist_core.registration import check_registration, draw_overlay

    cells = p.cells
    name = f"registration{'-' if cells.section else ''}{cells.section}.png"
    if cells.density is None:
        from ge2hist_core.spots import draw_spots, tissue_check

        draw_spots(settings.work / name, cells, shift)
        figures, warning = tissue_check(cells, shift)
        return figures | {"warning": warning}
    xy, umi = cells.density[0] + shift, cells.density[1]
    size = np.array([cells.image.width, cells.image.height]) * cells.image.um_per_px
    within = ((xy >= 0) & (xy < size)).all(axis=1)
    found = check_registration(cells.image, xy[within], umi[within])
    um = settings.um_per_px
    draw_overlay(
        settings.work / name,
        cells.image,
        xy[within],
        umi[within],
        found,
        labels,
        (p.crop.left * um, p.crop.top * um),
        um,
    )
    return found.to_json()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="INPUT", help=_listed_kinds())
    parser.add_argument(
        "--image", type=Path, metavar="HE.tif", help="full-resolution H&E, where INPUT does not hold it"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DATA.zarr")
    parser.add_argument("--alignment", type=Path, metavar="MATRIX.csv", help="Xenium Explorer's matrix of the H&E")
    parser.add_argument("--segmenter", choices=METHODS, default="classical", help="who outlines the nuclei")
    parser.add_argument("--weights", type=Path, help="StarDist model folder, or InstanSeg TorchScript file")
    parser.add_argument("--outlines", type=Path, metavar="NUCLEI.geojson", help="for --segmenter geojson, in px")
    parser.add_argument("--whole-cells", action="store_true", help="count Space Ranger's or Xenium's cells, not nuclei")
    parser.add_argument("--expand-um", type=float, default=0.0, help="grow nuclei so far before bins are assigned")
    parser.add_argument("--labels", type=Path, metavar="TYPES.csv", help="types of cells, or of bins of 2, 8 or 16 um")
    parser.add_argument("--label-column", metavar="NAME", help="column of --labels or of INPUT's own table")
    parser.add_argument("--markers", type=Path, metavar="MARKERS.csv", help="cell_type, gene and, if wanted, weight")
    parser.add_argument("--celltypist", metavar="MODEL", help="CellTypist model; only one that you trust")
    parser.add_argument("--clusters", type=int, metavar="N", help="types by clustering the expression into N")
    store = parser.add_argument_group("a SpatialData store, where it leaves a choice")
    store.add_argument("--image-element", metavar="NAME", help="the H&E")
    store.add_argument("--cells-element", metavar="NAME", help="shapes or labels of cells")
    store.add_argument("--table", metavar="NAME", help="counts")
    store.add_argument("--coordinate-system", metavar="NAME")
    store.add_argument("--um-per-unit", type=float, help="um of one unit of the coordinate system")
    store.add_argument("--layer", metavar="NAME", help="layer of the table with the raw counts")
    parser.add_argument("--spot-pitch-um", type=float, default=200.0, help="of ST: distance of neighbouring spots")
    parser.add_argument("--spot-um", type=float, default=100.0, help="of ST: diameter of a spot")
    parser.add_argument("--regions", default="auto", metavar="NxM", help="rows x columns that are split as donors are")
    parser.add_argument("--gap-um", type=float, help="left out between regions; one tile if not given")
    parser.add_argument("--donor", help="name of the donor; the store's name if not given")
    parser.add_argument(
        "--um-per-px", type=float, help=f"scale of the store's picture; {UM_PER_PX:g}, of ST {ST_UM_PER_PX:g}"
    )
    parser.add_argument("--shift-um", default="0,0", metavar="X,Y", help="added to the bins' places, um")
    parser.add_argument("--min-umi", type=int, default=10, help="nuclei, cells or spots with fewer UMIs are left out")
    parser.add_argument("--genome", default="GRCh38", help="what the name of the reference must contain")
    parser.add_argument("--raw", action="store_true", help="read the raw matrix, with bins outside the tissue")
    parser.add_argument("--workers", type=int, default=2, help="threads that segment")
    parser.add_argument("--resume", action="store_true", help="take up the finished stages of a run that stopped")
    parser.add_argument("--overwrite", action="store_true", help="replace a store that is at --out")
    parser.add_argument("--keep", action="store_true", help="keep the stages, to label or cut anew with --resume")


def settings_of(args: argparse.Namespace) -> Settings:
    """Options of the command line as :class:`Settings`."""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?),(-?\d+(?:\.\d+)?)", args.shift_um)
    if match is None:
        raise BadInput(f"shift_um is {args.shift_um!r}: give x,y in um, such as --shift-um=4.5,-2.")
    values = {name: value for name, value in vars(args).items() if name in Settings.__dataclass_fields__}
    values["folder"] = values["folder"].expanduser()
    if values["image"] is not None:
        values["image"] = values["image"].expanduser()
    if values["um_per_px"] is None:
        values["um_per_px"] = ST_UM_PER_PX if recognise(values["folder"]) == "st" else UM_PER_PX
    return Settings(**{**values, "shift_um": (float(match[1]), float(match[2]))})


def main(args: argparse.Namespace) -> None:
    from ge2hist_core.slide_cells import Account

    settings = settings_of(args)
    report = prepare(settings)
    print(Account.of(report["umi"]).text())
    if report["unit"] == "spot":
        kept = f"{report['cells']:,} of {report['given']:,} spots of {report['spot_um']:g} um, each taken as one cell,"
    else:
        found = f"{report['nuclei']:,} nuclei" if "nuclei" in report else f"{report['given']:,} outlines given"
        kept = f"{report['cells']:,} cells of {found}"
    print(
        f"{kept} in {len(report['regions'])} region(s), median {report['median_umi']:.0f} UMIs, in {settings.out}; "
        f"report and overlay in {settings.work}"
    )
    if UNLABELLED in report["cell_types"]:
        print(f"{report['cell_types'][UNLABELLED]:,} cells have no type: see --labels, --markers and --celltypist.")
    if len(report["regions"]) < 3:
        print("Fewer than three regions: nothing can be held out for evaluation; see --regions.")
