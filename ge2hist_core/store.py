"""Tissue sections on disk: one SpatialData zarr store, the same format for simulated tissue and real slides.

A store holds for each donor an image ``{donor}_image``, the nucleus masks ``{donor}_labels`` and their outlines
``{donor}_nuclei``, and for all donors together one table ``cells``. Image and masks carry a scale to the coordinate
system ``{donor}``, in which outlines and ``obsm["spatial"]`` are given in um; x runs right and y down from the
section's top left corner. ``spatialdata``, ``squidpy`` and ``napari-spatialdata`` open it as it is.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from ge2hist_core import rng
from ge2hist_core.config import CELL_TYPES, TILE_PX, UM_PER_PX, VISIBLE_CLASS
from ge2hist_core.files import atomic_folder
from ge2hist_core.types import NUCLEI_COLUMNS, BadInput, Cells

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

__all__ = ["SectionRecord", "TissueStore", "section_picture", "write_store"]

SCHEMA = 1
ATTRS = "ge2hist"
TABLE = "cells"
CHUNK_PX = 256
CACHE_BYTES = 1_500_000_000
"""Decoded chunks of pictures that a store keeps in memory."""
VERTICES_PER_OUTLINE = 48


@dataclass(frozen=True, eq=False)
class SectionRecord:
    """One donor's section, ready to be written.

    Parameters
    ----------
    donor: letters, digits, ``_``, ``-``, ``.``.
    image: uint8 ``[H, W, 3]`` RGB.
    labels: int32 ``[H, W]`` nucleus masks, 0 is background; value ``i + 1`` is row ``i`` of ``nuclei``.
    nuclei: one row per nucleus with ``x_um``, ``y_um``, ``cell_type``; every further column is kept in the table.
    counts: ``[nucleus, gene]`` raw counts, CSR.
    """

    donor: str
    image: np.ndarray
    labels: np.ndarray
    nuclei: pd.DataFrame
    counts: sp.csr_matrix

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", self.donor):
            raise BadInput(f"Donor name {self.donor!r} cannot name a folder: use letters, digits, '_', '-' and '.'.")
        if self.image.dtype != np.uint8 or self.image.ndim != 3 or self.image.shape[2] != 3:
            raise ValueError(f"image must be uint8 [H, W, 3], got {self.image.dtype} {self.image.shape}")
        if self.labels.shape != self.image.shape[:2]:
            raise ValueError(f"labels have shape {self.labels.shape}, the image {self.image.shape[:2]}")
        missing = {"x_um", "y_um", "cell_type"} - set(self.nuclei.columns)
        if missing:
            raise ValueError(f"nuclei lack the column {min(missing)!r}")
        if self.labels.max(initial=0) > len(self.nuclei) or self.labels.min(initial=0) < 0:
            raise ValueError(f"labels run to {self.labels.max()}, nuclei have {len(self.nuclei)} rows")
        if self.counts.shape[0] != len(self.nuclei):
            raise ValueError(f"counts have {self.counts.shape[0]} rows, nuclei {len(self.nuclei)}")


def write_store(
    path: str | Path,
    sections: Iterable[SectionRecord],
    genes: Sequence[str] | pd.DataFrame,
    simulation: dict[str, Any] | None = None,
    um_per_px: float = UM_PER_PX,
) -> None:
    """Write sections one by one; ``path`` appears only when all are written.

    Parameters
    ----------
    sections: may be a generator; only one section's pixels are held at a time.
    genes: symbols, or a table indexed by symbol whose columns (role, programme) are kept in ``var``.
    simulation: what rebuilds the tissue (``seed``, ``donors``, ``size_um``), or None for real slides.
    um_per_px: resolution of images and masks.

    Raises
    ------
    BadInput: ``path`` exists and is not a store; no section; a donor given twice.
    """
    import spatialdata

    path = Path(path)
    if path.exists() and not (path / "zarr.json").is_file():
        raise BadInput(f"{path} exists and is not a zarr store: choose another name.")
    var = genes if isinstance(genes, pd.DataFrame) else pd.DataFrame(index=pd.Index(list(genes)))
    var = var.set_axis(var.index.astype(str).rename(None), axis=0)
    if not var.index.is_unique:
        raise BadInput(f"Gene {var.index[var.index.duplicated()][0]!r} occurs twice: give each gene once.")

    tables: list[tuple[pd.DataFrame, np.ndarray, sp.csr_matrix]] = []
    donors: list[str] = []
    with atomic_folder(path) as temporary, _quiet():
        temporary.rmdir()  # spatialdata insists on making the folder
        sdata = spatialdata.SpatialData(
            attrs={ATTRS: {"schema": SCHEMA, "um_per_px": um_per_px, "simulation": simulation}}
        )
        sdata.write(temporary)
        for section in sections:
            if section.donor in donors:
                raise BadInput(f"Donor {section.donor!r} has two sections: give each section its own donor name.")
            if section.counts.shape[1] != len(var):
                raise ValueError(f"{section.donor}: counts have {section.counts.shape[1]} genes, expected {len(var)}")
            outlines = _outlines(section.labels, section.nuclei, um_per_px)
            _write_pixels_and_outlines(sdata, section, outlines, um_per_px)
            tables.append(_table_part(section, outlines["area_um2"].to_numpy()))
            donors.append(section.donor)
        if not donors:
            raise BadInput("There is no section to write: give at least one donor.")
        # Only the outlines are opened again: the table is checked against what it annotates.
        sdata = spatialdata.read_zarr(temporary, selection=("shapes",))
        sdata[TABLE] = _table(tables, var, donors)
        sdata.write_element(TABLE)
        sdata.write_consolidated_metadata()


def section_picture(store: Path, donor: str) -> Any:
    """The zarr array ``[c, y, x]`` of a section's picture at full resolution, not yet read.

    Raises
    ------
    BadInput: the section has no picture, or it is damaged.
    """
    import zarr

    folder = store / "images" / f"{donor}_image"
    try:
        group = zarr.open_group(folder, mode="r")
        attributes: Mapping[str, Any] = group.attrs.asdict()
        levels = attributes.get("ome", attributes)["multiscales"][0]["datasets"]
        return group[levels[0]["path"]]
    except Exception as error:  # zarr raises a dozen classes for what is missing or damaged
        raise BadInput(
            f"{store} lacks the picture of section {donor!r} ({type(error).__name__}): write the store again."
        ) from error


class _Pictures:
    """Windows of the sections' pictures, decoded chunk by chunk; several threads may read at once.

    Chunks stay decoded up to ``CACHE_BYTES``, those used last the longest. Arrays are read by zarr itself: a window of
    a dask array costs a task graph over all chunks of the picture, more than ten times the decoding.

    Parameters
    ----------
    path: the store. donors: whose pictures to open.

    Raises
    ------
    BadInput: a picture is missing or cannot be read.
    """

    def __init__(self, path: Path, donors: Sequence[str]) -> None:
        self._path = path
        self._arrays = {donor: section_picture(path, donor) for donor in donors}
        self._chunks: OrderedDict[tuple[str, int, int], np.ndarray] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()

    def size(self, donor: str) -> tuple[int, int]:
        """Width and height, px."""
        _, height, width = self._arrays[donor].shape
        return width, height

    def window(self, donor: str, x: int, y: int, side: int) -> np.ndarray:
        """uint8 ``[side, side, 3]`` with its top left corner at pixel (x, y), inside the picture."""
        _, high, wide = self._arrays[donor].chunks
        out = np.empty((side, side, 3), dtype=np.uint8)
        for i in range(y // high, (y + side - 1) // high + 1):
            for j in range(x // wide, (x + side - 1) // wide + 1):
                top, bottom = max(y, i * high), min(y + side, (i + 1) * high)
                left, right = max(x, j * wide), min(x + side, (j + 1) * wide)
                part = self._chunk(donor, i, j)[top - i * high : bottom - i * high, left - j * wide : right - j * wide]
                out[top - y : bottom - y, left - x : right - x] = part
        return out

    def _chunk(self, donor: str, i: int, j: int) -> np.ndarray:
        """uint8 ``[h, w, 3]``: the chunk in row i and column j of the grid."""
        key = (donor, i, j)
        with self._lock:
            if key in self._chunks:
                self._chunks.move_to_end(key)
                return self._chunks[key]
        array = self._arrays[donor]
        _, high, wide = array.chunks
        try:
            pixels = np.asarray(array[:, i * high : (i + 1) * high, j * wide : (j + 1) * wide])
        except Exception as error:  # the codec's class for a damaged file is not ours to know
            raise BadInput(
                f"The image of donor {donor!r} in {self._path} is damaged near pixel ({j * wide}, {i * high}): write "
                "the store again."
            ) from error
        chunk = np.ascontiguousarray(np.moveaxis(pixels, 0, -1))
        with self._lock:
            if key not in self._chunks:
                self._chunks[key] = chunk
                self._held += chunk.nbytes
            while self._held > CACHE_BYTES:
                self._held -= self._chunks.popitem(last=False)[1].nbytes
        return chunk


class TissueStore:
    """Reader of a store: cells, tiles and nuclei of every donor.

    Tiles are ``tile_px`` wide windows centred on a cell (to the nearest pixel) at the store's own resolution. They are
    read from disk when they are asked for, by any number of threads.

    Parameters
    ----------
    path: the store's folder. tile_px: side of a tile, even.

    Raises
    ------
    BadInput: the folder is not such a store, or a part is missing.
    """

    def __init__(self, path: str | Path, tile_px: int = TILE_PX) -> None:
        import spatialdata

        if tile_px < 2 or tile_px % 2:
            raise BadInput(f"tile_px is {tile_px}: give an even number above 0.")
        self.tile_px = tile_px
        self.path = Path(path)
        if not self.path.is_dir():
            raise BadInput(f"{self.path} is not a folder: give the store that `simulate` or `prepare` wrote.")
        try:
            with _quiet():
                sdata = spatialdata.read_zarr(self.path, selection=("tables",))
        except Exception as error:  # zarr, anndata and spatialdata raise a dozen classes for damaged stores
            raise BadInput(
                f"{self.path} cannot be read as a SpatialData store ({type(error).__name__}): write it again."
            ) from error
        if ATTRS not in sdata.attrs or TABLE not in sdata.tables:
            raise BadInput(
                f"{self.path} is not a GE2Hist store (no table {TABLE!r}): make one with `simulate` or `prepare`."
            )
        header = sdata.attrs[ATTRS]
        if header.get("schema") != SCHEMA:
            raise BadInput(
                f"{self.path} has store schema {header.get('schema')!r}, this version reads {SCHEMA}: write it again."
            )
        table = sdata.tables[TABLE]
        self.um_per_px = float(header["um_per_px"])
        self.simulation: dict[str, Any] | None = header["simulation"]
        self.obs: pd.DataFrame = table.obs
        """Everything known per cell: donor, cell_type, area_um2 and whatever the writer gave."""
        self.var: pd.DataFrame = table.var
        """Everything known per gene, indexed by symbol."""
        self.donors: list[str] = [str(name) for name in table.obs["donor"].cat.categories]
        self.cell_types: tuple[str, ...] = tuple(str(name) for name in table.obs["cell_type"].cat.categories)
        self.cells = Cells(
            counts=table.X,
            genes=table.var_names.to_numpy(),
            cell_id=table.obs_names.to_numpy(),
            cell_type=table.obs["cell_type"].to_numpy(),
            donor=table.obs["donor"].to_numpy(),
            xy_um=table.obsm["spatial"],
            source=self.path.name,
        )
        self._pictures = _Pictures(self.path, self.donors)
        self._donor = table.obs["donor"].cat.codes.to_numpy()
        # The table's float64 positions: float32 would move a cell of a large slide to a neighbouring pixel.
        xy = np.asarray(table.obsm["spatial"], dtype=np.float64)
        self._xy = xy
        self._corner = np.floor(xy / self.um_per_px + 0.5).astype(np.int64) - tile_px // 2

    def __len__(self) -> int:
        return len(self.cells)

    @cached_property
    def interior(self) -> np.ndarray:
        """bool ``[cell]``: the whole tile lies inside the section."""
        size = np.array([self._pictures.size(donor) for donor in self.donors])
        return ((self._corner >= 0) & (self._corner + self.tile_px <= size[self._donor])).all(axis=1)

    @cached_property
    def identity(self) -> str:
        """SHA-256 over the cells (names, positions, counts), the genes and the resolution; tells stores apart."""
        cells = self.cells
        digest = hashlib.sha256(json.dumps([SCHEMA, self.um_per_px, [*cells.genes], [*cells.cell_id]]).encode())
        for array in (self._xy, cells.counts.indptr, cells.counts.indices, cells.counts.data):
            digest.update(np.ascontiguousarray(array, dtype=np.float64).tobytes())
        return digest.hexdigest()

    @property
    def provenance(self) -> dict[str, Any]:
        """Which tissue this is and how its donors are split, to be kept with whatever learns from it."""
        return {"store": self.identity, "simulation": self.simulation, "donors": self.split()}

    def split(self, seed: int = 0) -> dict[str, list[str]]:
        """Donors of ``train``, ``validation`` and ``test``, about 80 / 7 / 13 %; each of three or more gets one.

        Depends on the donors' names and the seed alone.
        """
        names = sorted(self.donors)
        order = np.argsort(rng.uniforms(seed, "split", names), kind="stable")
        shuffled = [names[i] for i in order]
        n = len(names)
        least = 1 if n >= 3 else 0
        n_test, n_validation = max(least, round(0.13 * n)), max(least, round(0.07 * n))
        parts = np.split(np.array(shuffled, dtype=object), [n_test, n_test + n_validation])
        return {name: sorted(part) for name, part in zip(("test", "validation", "train"), parts, strict=True)}

    def rows(self, donors: Iterable[str], interior: bool = True) -> np.ndarray:
        """Rows of the cells of these donors, in table order; by default only those with a whole tile."""
        chosen = np.isin(self._donor, [self.donors.index(donor) for donor in donors])
        return np.flatnonzero(chosen & self.interior if interior else chosen)

    def tiles(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 ``[n, tile_px, tile_px, 3]`` RGB, centred on the cells.

        Raises
        ------
        BadInput: a cell so near the section's edge that its tile would leave it; a damaged picture.
        """
        rows = np.asarray(rows, dtype=np.int64)
        self._require_interior(rows)
        out = np.empty((len(rows), self.tile_px, self.tile_px, 3), dtype=np.uint8)
        x, y = self._corner[rows].T
        # Neighbours after one another, so that a chunk that they share is decoded once even if none is kept for long.
        for i in np.lexsort((x // CHUNK_PX, y // CHUNK_PX, self._donor[rows])):
            out[i] = self._pictures.window(self.donors[self._donor[rows[i]]], int(x[i]), int(y[i]), self.tile_px)
        return out

    def nuclei(self, row: int) -> pd.DataFrame:
        """True nuclei whose centre lies in the tile of one cell, columns ``NUCLEI_COLUMNS``.

        Positions are relative to the tile's top left corner; ``cell_type`` is the class visible in H&E
        (CD4 T, CD8 T and B cells are "Lymphocyte"); ``probability`` is 1.
        """
        self._require_interior(np.array([row]))
        near = self._rows_of_donor[self._donor[row]]
        corner_um = self._corner[row] * self.um_per_px
        relative = self._xy[near] - corner_um
        inside = ((relative >= 0) & (relative < self.tile_px * self.um_per_px)).all(axis=1)
        chosen = near[inside]
        return pd.DataFrame(
            {
                "x_um": relative[inside, 0],
                "y_um": relative[inside, 1],
                "area_um2": self.obs["area_um2"].to_numpy()[chosen],
                "cell_type": self._visible[chosen],
                "probability": 1.0,
            },
            columns=list(NUCLEI_COLUMNS),
        )

    def neighbour_counts(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """How many *other* nuclei of each of ``cell_types`` lie in the tile of each cell, int ``[n, type]``."""
        from scipy.spatial import cKDTree

        rows = np.asarray(rows, dtype=np.int64)
        counts = np.zeros((len(rows), len(self.cell_types)), dtype=np.int64)
        kind = self.obs["cell_type"].cat.codes.to_numpy()
        for donor, near in enumerate(self._rows_of_donor):
            mine = np.flatnonzero(self._donor[rows] == donor)
            if len(mine):
                tree = cKDTree(self._xy[near])
                hits = tree.query_ball_point(self._xy[rows[mine]], self.tile_px / 2 * self.um_per_px, p=np.inf)
                for i, hit in zip(mine, hits, strict=True):
                    counts[i] = np.bincount(kind[near[hit]], minlength=counts.shape[1])
                    counts[i, kind[rows[i]]] -= 1
        return counts

    @cached_property
    def _visible(self) -> np.ndarray:
        return np.array([VISIBLE_CLASS.get(name, name) for name in self.cells.cell_type], dtype=object)

    @cached_property
    def _rows_of_donor(self) -> list[np.ndarray]:
        return [np.flatnonzero(self._donor == i) for i in range(len(self.donors))]

    def _require_interior(self, rows: np.ndarray) -> None:
        outside = rows[~self.interior[rows]]
        if len(outside):
            raise BadInput(
                f"The tile of cell {self.cells.cell_id[outside[0]]!r} leaves its section: choose cells with `interior`."
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the user can do nothing about: future defaults inside zarr, and outlines left closed on purpose."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", message="zarr v3 autosharding")
        warnings.filterwarnings("ignore", message="The table is annotating")
        yield


def _outlines(labels: np.ndarray, nuclei: pd.DataFrame, um_per_px: float) -> GeoDataFrame:
    """Outline of each nucleus from its mask, um; ``area_um2`` is the mask's area, 0 for a nucleus without a pixel."""
    import geopandas
    import shapely
    from scipy.ndimage import find_objects
    from skimage.measure import find_contours

    area = np.bincount(labels.ravel(), minlength=len(nuclei) + 1)[1:] * um_per_px**2
    boxes = find_objects(labels, max_label=len(nuclei))
    shapes = []
    for i, (box, x, y) in enumerate(zip(boxes, nuclei["x_um"], nuclei["y_um"], strict=True)):
        if box is None:
            shapes.append(shapely.Point(x, y).buffer(um_per_px / 2))
            continue
        mask = np.pad(labels[box] == i + 1, 1)
        contour = max(find_contours(mask, 0.5), key=len)
        # Pixel (r, c) covers [c, c + 1): its centre is half a pixel in, and the padding moved it by one.
        corner = np.array([box[1].start, box[0].start]) - 0.5
        step = -(-len(contour) // VERTICES_PER_OUTLINE)
        shapes.append(shapely.Polygon((contour[:-1:step, ::-1] + corner) * um_per_px))
    return geopandas.GeoDataFrame(
        {"cell_type": nuclei["cell_type"].astype(str).to_numpy(), "area_um2": area, "geometry": shapes},
        index=np.arange(1, len(nuclei) + 1),
    )


def _write_pixels_and_outlines(
    sdata: SpatialData, section: SectionRecord, outlines: GeoDataFrame, um_per_px: float
) -> None:
    from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel
    from spatialdata.transformations import Identity, Scale

    to_um = {section.donor: Scale([um_per_px, um_per_px], axes=("x", "y"))}
    elements = {
        "image": Image2DModel.parse(
            np.moveaxis(section.image, -1, 0),
            dims=("c", "y", "x"),
            c_coords=["r", "g", "b"],
            transformations=to_um,
            chunks=(3, CHUNK_PX, CHUNK_PX),
        ),
        "labels": Labels2DModel.parse(
            section.labels.astype(np.int32), dims=("y", "x"), transformations=to_um, chunks=(CHUNK_PX, CHUNK_PX)
        ),
        "nuclei": ShapesModel.parse(outlines, transformations={section.donor: Identity()}),
    }
    for name, element in elements.items():
        key = f"{section.donor}_{name}"
        sdata[key] = element
        sdata.write_element(key)
        del sdata[key]  # from memory; it stays on disk


def _table_part(section: SectionRecord, area_um2: np.ndarray) -> tuple[pd.DataFrame, np.ndarray, sp.csr_matrix]:
    obs = section.nuclei.drop(columns=["x_um", "y_um"]).assign(
        area_um2=area_um2,
        donor=section.donor,
        region=f"{section.donor}_nuclei",
        instance_id=np.arange(1, len(section.nuclei) + 1),
    )
    obs.index = pd.Index([f"{section.donor}_{i}" for i in obs["instance_id"]])
    xy = section.nuclei[["x_um", "y_um"]].to_numpy(np.float64)
    return obs, xy, sp.csr_matrix(section.counts, dtype=np.float32)


def _table(parts: list[tuple[pd.DataFrame, np.ndarray, sp.csr_matrix]], var: pd.DataFrame, donors: list[str]) -> Any:
    from anndata import AnnData
    from spatialdata.models import TableModel

    obs = pd.concat([part[0] for part in parts])
    found = set(obs["cell_type"].astype(str))
    types = CELL_TYPES if found <= set(CELL_TYPES) else sorted(found)
    regions = [f"{donor}_nuclei" for donor in donors]
    obs["cell_type"] = pd.Categorical(obs["cell_type"].astype(str), categories=types)
    obs["donor"] = pd.Categorical(obs["donor"], categories=donors)
    obs["region"] = pd.Categorical(obs["region"], categories=regions)
    table = AnnData(sp.vstack([part[2] for part in parts], format="csr"), obs=obs, var=var)
    table.obsm["spatial"] = np.concatenate([part[1] for part in parts])
    return TableModel.parse(table, region=regions, region_key="region", instance_key="instance_id")
