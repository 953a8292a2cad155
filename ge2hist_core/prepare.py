"""``python -m ge2hist_core prepare OUTS --image HE.tif --out DATA.zarr``: a lab's slide as a store to train on.

A Visium HD run and its H&E become the same SpatialData store that ``simulate`` writes: registration is checked, nuclei
are outlined, 2-um bins summed per nucleus, cells labelled, and the slide cut into regions that take the place of donors
when cells are split for training. Regions are kept apart by a gap, and each has a picture of its own, so no tile of one
shows a pixel of another.

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
from contextlib import contextmanager
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
    from ge2hist_core.slide_image import SlideImage
    from ge2hist_core.store import SectionRecord
    from ge2hist_core.visium_hd import Ledger, SpaceRanger

__all__ = ["Settings", "add_arguments", "main", "prepare"]

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
    folder: Space Ranger's ``outs``. image: full-resolution H&E. out: the store to write.
    segmenter: one of ``METHODS``. weights: of StarDist or InstanSeg. outlines: GeoJSON for ``geojson``.
    whole_cells: with ``space-ranger``, count the bins of its cell outlines instead of its nuclei.
    expand_um: nuclei are grown by so much before bins are assigned, towards the cytoplasm.
    labels, label_column, markers, celltypist: where types come from; one of the three or none.
    regions: ``auto`` or rows x columns. gap_um: between regions, one tile if None.
    donor: name of the slide's donor, the folder's name if None.
    um_per_px: scale of the store's picture.
    shift_um: (x, y) added to the bins' places.
    min_umi: nuclei with fewer UMIs are no cells.
    genome: what the reference's name must contain. raw: read the raw matrix.
    """

    folder: Path
    image: Path
    out: Path
    segmenter: str = "classical"
    weights: Path | None = None
    outlines: Path | None = None
    whole_cells: bool = False
    expand_um: float = 0.0
    labels: Path | None = None
    label_column: str | None = None
    markers: Path | None = None
    celltypist: str | None = None
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
        if self.whole_cells and self.segmenter != OWN_OUTLINES:
            raise BadInput(f"--whole-cells needs the outlines of --segmenter {OWN_OUTLINES}: give both or neither.")
        if sum(value is not None for value in (self.labels, self.markers, self.celltypist)) > 1:
            raise BadInput("--labels, --markers and --celltypist each label all cells: give one.")
        if not 0 <= self.expand_um <= 20:
            raise BadInput(f"expand_um is {self.expand_um:g}: choose 0 to 20 um.")
        if not 0.1 <= self.um_per_px <= 1.0:
            raise BadInput(f"um_per_px is {self.um_per_px:g}: choose 0.1 to 1 um per pixel.")
        if self.gap_um is not None and not 0 <= self.gap_um <= 1000:
            raise BadInput(f"gap_um is {self.gap_um:g}: choose 0 to 1000 um.")
        if self.min_umi < 1 or self.workers < 1:
            raise BadInput(f"min_umi is {self.min_umi}, workers {self.workers}: give at least 1 of each.")
        if self.regions != "auto" and not re.fullmatch(r"[1-9]\d?x[1-9]\d?", self.regions):
            raise BadInput(f"regions is {self.regions!r}: give auto, or rows x columns such as 3x3.")
        if self.donor is not None and not re.fullmatch(r"[A-Za-z0-9_.-]+", self.donor):
            raise BadInput(f"donor is {self.donor!r}: use letters, digits, '_', '-' and '.'.")

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
    from ge2hist_core.slide_image import SlideImage
    from ge2hist_core.visium_hd import check_image, open_space_ranger

    if settings.out.exists() and not settings.overwrite:
        raise BadInput(f"{settings.out} exists: give another name, or --overwrite to replace it.")
    with _disk(settings):
        run = open_space_ranger(settings.folder, settings.genome, settings.raw)
        with SlideImage(settings.image, um_per_px=run.um_per_px) as image:
            figures = check_image(run, image)
            crop = _crop(run, image, settings)
            regions = _regions(crop, settings)
            stages = _Stages(settings, run, crop)
            report = _prepare(settings, run, image, crop, regions, stages)
        report["image_check"] = figures
        write_json(settings.work / "report.json", report)
        if not settings.keep:
            stages.clean()
    return report


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
    """Which stages are done, on disk: a stage counts as done if all that it depends on is as it was."""

    def __init__(self, settings: Settings, run: SpaceRanger, crop: Crop) -> None:
        self.folder = settings.work
        self.path = self.folder / "state.json"
        picture = [_stamp(settings.image), settings.um_per_px, run.um_per_px, list(crop)]
        outlines = [
            picture, settings.segmenter, str(settings.weights), settings.whole_cells,
            _stamp(settings.outlines) if settings.outlines else None,
            [_stamp(p) for p in sorted(run.segmented.glob("*.geojson"))] if run.segmented else [],
        ]  # fmt: skip
        counts = [outlines, _stamp(run.matrix), settings.expand_um, list(settings.shift_um)]
        wanted = {"image": picture, "labels": outlines, "counts": counts}
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


def _crop(run: SpaceRanger, image: SlideImage, settings: Settings) -> Crop:
    """The part of the picture with bins in the tissue and half a tile around, px of the store's scale."""
    um = settings.um_per_px
    seen = run.xy_um[run.in_tissue]
    if not len(seen):
        raise BadInput("No bin lies in the tissue: look at Space Ranger's tissue detection.")
    seen = seen + np.array(settings.shift_um)
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


def _regions(crop: Crop, settings: Settings) -> list[Region]:
    """The section cut into a grid with a gap between; names are the slide's donor and the place in the grid."""
    donor = settings.donor or re.sub(r"[^A-Za-z0-9_.-]", "-", settings.out.stem).strip(".-") or "slide"
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

    genes = run.genes.index
    if settings.labels is not None:
        table = cell_labels.read_label_table(settings.labels, settings.label_column)
        return cell_labels.by_table(table, (cell_id, names), bin_cell, run.row, run.column)
    if settings.markers is not None:
        return cell_labels.by_markers(counts, genes, cell_labels.read_markers(settings.markers))
    if settings.celltypist is not None:
        return cell_labels.by_celltypist(counts, genes, settings.celltypist)
    return CellLabels(np.full(len(cell_id), UNLABELLED, dtype=object), np.zeros(len(cell_id), dtype=np.float32))


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
        nuclei = nuclei.drop(columns="area_um2")
        yield SectionRecord(
            region.donor, picture[rows, columns], number[labels[rows, columns]], nuclei, counts[kept[mine]]
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="OUTS", help="output folder of Space Ranger 3 or 4")
    parser.add_argument("--image", type=Path, required=True, metavar="HE.tif", help="full-resolution H&E of the run")
    parser.add_argument("--out", type=Path, required=True, metavar="DATA.zarr")
    parser.add_argument("--segmenter", choices=METHODS, default="classical", help="who outlines the nuclei")
    parser.add_argument("--weights", type=Path, help="StarDist model folder, or InstanSeg TorchScript file")
    parser.add_argument("--outlines", type=Path, metavar="NUCLEI.geojson", help="for --segmenter geojson, in px")
    parser.add_argument("--whole-cells", action="store_true", help="count bins of Space Ranger's cells, not nuclei")
    parser.add_argument("--expand-um", type=float, default=0.0, help="grow nuclei so far before bins are assigned")
    parser.add_argument("--labels", type=Path, metavar="TYPES.csv", help="types of cells, or of bins of 2, 8 or 16 um")
    parser.add_argument("--label-column", metavar="NAME")
    parser.add_argument("--markers", type=Path, metavar="MARKERS.csv", help="cell_type, gene and, if wanted, weight")
    parser.add_argument("--celltypist", metavar="MODEL", help="CellTypist model; only one that you trust")
    parser.add_argument("--regions", default="auto", metavar="NxM", help="rows x columns that are split as donors are")
    parser.add_argument("--gap-um", type=float, help="left out between regions; one tile if not given")
    parser.add_argument("--donor", help="name of the donor; the store's name if not given")
    parser.add_argument("--um-per-px", type=float, default=UM_PER_PX, help="scale of the store's picture")
    parser.add_argument("--shift-um", default="0,0", metavar="X,Y", help="added to the bins' places, um")
    parser.add_argument("--min-umi", type=int, default=10, help="nuclei with fewer UMIs are no cells")
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
    settings = Settings(**{**values, "shift_um": (float(match[1]), float(match[2]))})
    return replace(settings, folder=settings.folder.expanduser(), image=settings.image.expanduser())


def main(args: argparse.Namespace) -> None:
    from ge2hist_core.visium_hd import Ledger

    settings = settings_of(args)
    report = prepare(settings)
    print(Ledger(**report["umi"]).text())
    print(
        f"{report['cells']:,} cells of {report['nuclei']:,} nuclei in {len(report['regions'])} region(s), median "
        f"{report['median_umi']:.0f} UMIs, in {settings.out}; report and overlay in {settings.work}"
    )
    if UNLABELLED in report["cell_types"]:
        print(f"{report['cell_types'][UNLABELLED]:,} cells have no type: see --labels, --markers and --celltypist.")
    if len(report["regions"]) < 3:
        print("Fewer than three regions: nothing can be held out for evaluation; see --regions.")
