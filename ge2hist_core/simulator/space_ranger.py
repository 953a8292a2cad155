"""``python -m ge2hist_core simulate-slide OUT``: a Visium HD run of known-truth tissue, in Space Ranger's own files.

The tissue is a mosaic of simulated sections, each with gene levels and architecture of its own and all with one
staining. Every UMI of a cell starts at a place in its nucleus or cytoplasm, diffuses by a Gaussian step, and is counted
by the 2-um bin it lands on; the capture grid may be turned against the picture. Written are

    outs/binned_outputs/square_002um/    filtered and raw matrices (HDF5), places of the bins, scale factors
    outs/segmented_outputs/              Space Ranger 4: outlines of nuclei and cells (GeoJSON), feature-cell matrix
    outs/feature_slice.h5                its metadata only
    HE.tif                               BigTIFF pyramid
    truth/                               cells, their counts, and of every bin and gene the cell that each UMI came from

in the formats and with the names of the real thing: ``scanpy``, ``spatialdata-io`` and this project read them alike.
Sections are made one by one and bins are written as soon as no later section can reach them, so memory does not grow
with the slide. All lengths are um; the picture's corner is the origin.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from ge2hist_core.config import UM_PER_PX
from ge2hist_core.files import atomic_folder, write_json
from ge2hist_core.rng import stream
from ge2hist_core.types import BadInput

if TYPE_CHECKING:
    from ge2hist_core.store import TissueStore

__all__ = ["SlideSpec", "add_arguments", "main", "recovery", "write_slide"]

BIN_UM = 2.0
REACH_SIGMA = 5.0
"""Steps of diffusion are cut at so many standard deviations, so that a finished bin stays finished."""
CYTOPLASM = 1.8
"""UMIs of the cytoplasm start at a place of the nucleus moved outwards by a factor of 1 to this."""
CELL_UM = 3.0
"""Space Ranger 4's cells are its nuclei, grown; here by so much."""
MAX_LABEL_PX = 200_000_000
TIFF_TILE = 512
FEATURE_TAGS = ("genome",)
SOFTWARE = {3: "spaceranger-3.1.3", 4: "spaceranger-4.0.1"}
CELL_MATRIX = "filtered_feature_cell_matrix.h5"


@dataclass(frozen=True)
class SlideSpec:
    """What is simulated.

    Parameters
    ----------
    rows, columns: sections of the mosaic. section_um: side of one, a multiple of 2 um.
    um_per_px: scale of the picture.
    sigma_um: standard deviation of diffusion in x and in y.
    nuclear_share: share of a cell's UMIs that start in its nucleus.
    detection: share of a cell's RNA that is counted at all.
    ambient: UMIs per bin that come from no cell, genes as in the whole tissue.
    border_um: bins beyond the tissue. glass_um: picture beyond the bins.
    rotation_deg: of the capture grid against the picture.
    misregistration_um: (x, y) by which the written places of the bins are off.
    version: 3, or 4 with segmented outputs.
    extra_genes: genes without expression added to the table, to reach a real panel's size.
    distinct: how many different sections there are; the mosaic repeats them. None makes each its own.
    compression: of the picture, ``zlib`` (lossless) or ``jpeg``.
    genome: name of the reference.
    """

    seed: int = 0
    rows: int = 1
    columns: int = 1
    section_um: float = 512.0
    um_per_px: float = UM_PER_PX
    sigma_um: float = 2.0
    nuclear_share: float = 0.5
    detection: float = 1.0
    ambient: float = 0.02
    border_um: float = 20.0
    glass_um: float = 40.0
    rotation_deg: float = 0.0
    misregistration_um: tuple[float, float] = (0.0, 0.0)
    version: int = 3
    extra_genes: int = 0
    distinct: int | None = None
    compression: str = "zlib"
    genome: str = "GRCh38"

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise BadInput(f"The mosaic has {self.rows} x {self.columns} sections: give at least 1 x 1.")
        if not (0 <= self.sigma_um <= 20 and 0 <= self.nuclear_share <= 1 and 0 < self.detection <= 1):
            raise BadInput("sigma_um must be 0 to 20, nuclear_share 0 to 1 and detection above 0 and up to 1.")
        if abs(self.rotation_deg) > 45 or not 0.1 <= self.um_per_px <= 1.0:
            raise BadInput("rotation_deg must be -45 to 45 and um_per_px 0.1 to 1.")
        if self.version not in SOFTWARE or self.compression not in ("zlib", "jpeg"):
            raise BadInput(f"version is {self.version}, compression {self.compression!r}: give 3 or 4, zlib or jpeg.")
        if self.version == 4 and self.height_px * self.width_px > MAX_LABEL_PX:
            raise BadInput("Segmented outputs are simulated for pictures up to 200 million px: choose version 3.")

    @property
    def size_um(self) -> np.ndarray:
        """(x, y) of the tissue."""
        return np.array([self.columns, self.rows]) * self.section_um

    @property
    def pad_um(self) -> float:
        """From the picture's corner to the tissue's."""
        return self.border_um + self.glass_um

    @property
    def width_px(self) -> int:
        return int(np.ceil((self.size_um[0] + 2 * self.pad_um) / self.um_per_px))

    @property
    def height_px(self) -> int:
        return int(np.ceil((self.size_um[1] + 2 * self.pad_um) / self.um_per_px))

    @property
    def grid(self) -> tuple[int, int]:
        """Bins (rows, columns)."""
        columns, rows = np.ceil((self.size_um + 2 * self.border_um) / BIN_UM).astype(int)
        return int(rows), int(columns)

    @cached_property
    def axes(self) -> np.ndarray:
        """``[2, 2]`` step (x, y) from column to column, from row to row."""
        angle = np.deg2rad(self.rotation_deg)
        return BIN_UM * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])

    @property
    def grid_corner(self) -> np.ndarray:
        """Where bin (0, 0) begins, in um of the picture: the grid turns about the middle of the tissue."""
        rows, columns = self.grid
        return self.size_um / 2 + self.pad_um - np.array([columns, rows]) / 2 @ self.axes

    def bins_at(self, xy_um: np.ndarray) -> np.ndarray:
        """(column, row) of the bin at each place, int ``[n, 2]``; may lie outside the grid."""
        return np.floor((xy_um - self.grid_corner) @ np.linalg.inv(self.axes)).astype(np.int64)

    def centres(self, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """True centres of bins, um ``[n, 2]``."""
        return self.grid_corner + np.stack([column + 0.5, row + 0.5], axis=1) @ self.axes


@dataclass(frozen=True, eq=False)
class _Section:
    """One simulated section: picture and masks at ``UM_PER_PX``, nuclei, and counts as they are detected."""

    image: np.ndarray
    labels: np.ndarray
    nuclei: pd.DataFrame
    counts: sp.csr_matrix


def write_slide(out: str | Path, spec: SlideSpec, on_section: Any = lambda: None) -> None:
    """Simulate a slide and write it; ``out`` appears when all is written.

    Parameters
    ----------
    on_section: called after each section of the mosaic.

    Raises
    ------
    BadInput: ``out`` exists; a section size that the simulator does not make.
    """
    out = Path(out)
    if out.exists():
        raise BadInput(f"{out} exists: give another name.")
    with atomic_folder(out) as folder:
        _Writer(folder, spec).write(on_section)


class _Writer:
    """Makes the sections one by one and hands their pixels, UMIs and truth to the files."""

    def __init__(self, folder: Path, spec: SlideSpec) -> None:
        from ge2hist_core.simulator.expression import load_genes

        self.folder, self.spec = folder, spec
        table = load_genes()
        extra = [f"SILENT{i:05d}" for i in range(spec.extra_genes)]
        self.symbols = [*map(str, table.symbols), *extra]
        self.n_genes = len(self.symbols)
        self.outs = folder / "outs"
        self.bins = self.outs / "binned_outputs" / "square_002um"
        self.truth = folder / "truth"
        for place in (self.bins / "spatial", self.truth, self.outs / "spatial"):
            place.mkdir(parents=True)
        self._kept: dict[int, _Section] = {}
        self.cells: list[pd.DataFrame] = []
        self.counts: list[sp.csr_matrix] = []
        self.n_cells = 0
        self._waiting: list[np.ndarray] = []

    def write(self, on_section: Any) -> None:
        spec = self.spec
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(TemporaryDirectory(dir=self.folder)))
            picture = np.memmap(scratch / "picture", np.uint8, "w+", shape=(spec.height_px, spec.width_px, 3))
            self.labels = None
            if spec.height_px * spec.width_px <= MAX_LABEL_PX:
                shape = (spec.height_px, spec.width_px)
                self.labels = np.lib.format.open_memmap(self.truth / "labels.npy", "w+", np.int32, shape)
            self._glass(picture)
            files = _BinFiles(self.bins, spec, self.symbols)
            stack.enter_context(files)
            origins = stack.enter_context(_Molecules(self.truth / "molecules.parquet"))
            for r in range(spec.rows):
                for c in range(spec.columns):
                    section = self._section(r * spec.columns + c)
                    corner = np.array([c, r]) * spec.section_um + spec.pad_um
                    self._paint(picture, section, corner)
                    self._scatter(section, corner, r * spec.columns + c, origins)
                    on_section()
                self._flush(files, self._finished_rows(r))
            picture.flush()
            _write_tiff(self.folder / "HE.tif", picture, spec, scratch)
        self._write_rest()

    def _section(self, number: int) -> _Section:
        """Section of a place in the mosaic; with ``distinct``, places share them."""
        from ge2hist_core.simulator.expression import draw_counts
        from ge2hist_core.simulator.rendering import render
        from ge2hist_core.simulator.tissue import simulate_section

        kind = number if self.spec.distinct is None else number % self.spec.distinct
        if kind in self._kept:
            return self._kept[kind]
        seed = int(stream(self.spec.seed, "mosaic", kind).integers(2**31))
        tissue = simulate_section(seed, 0, self.spec.section_um)
        image, labels = render(tissue, self.spec.seed)
        counts = draw_counts(tissue)
        thin = stream(self.spec.seed, "detection", kind).binomial(counts.data.astype(np.int64), self.spec.detection)
        counts = sp.csr_matrix((thin.astype(np.int32), counts.indices, counts.indptr), shape=counts.shape)
        counts.eliminate_zeros()
        section = _Section(image, labels, tissue.nuclei, counts)
        if self.spec.distinct is not None:
            self._kept[kind] = section
        return section

    def _glass(self, picture: np.ndarray) -> None:
        from ge2hist_core.simulator.rendering import draw_stain

        light = draw_stain(self.spec.seed, 0).background * 255
        draw = stream(self.spec.seed, "glass")
        for top in range(0, len(picture), 256):
            part = picture[top : top + 256]
            noise = draw.standard_normal((*part.shape[:2], 1), dtype=np.float32)
            part[...] = np.clip(np.rint(light.astype(np.float32) + noise), 0, 255).astype(np.uint8)

    def _paint(self, picture: np.ndarray, section: _Section, corner: np.ndarray) -> None:
        """The section's pixels and labels at the picture's scale; a pixel belongs where its centre lies."""
        spec = self.spec
        spans, at = [], []
        for start in corner[::-1]:
            first = int(np.ceil(start / spec.um_per_px - 0.5))
            last = int(np.ceil((start + spec.section_um) / spec.um_per_px - 0.5))
            spans.append(slice(first, last))
            at.append(((np.arange(first, last) + 0.5) * spec.um_per_px - start) / UM_PER_PX)
        if spec.um_per_px == UM_PER_PX and len(at[0]) == len(section.image):
            pixels = section.image
        else:
            pixels = _bilinear(section.image, *(a - 0.5 for a in at))
        picture[spans[0], spans[1]] = pixels
        if self.labels is not None:
            rows, columns = (np.minimum(a.astype(int), len(section.labels) - 1) for a in at)
            labels = section.labels[np.ix_(rows, columns)]
            self.labels[spans[0], spans[1]] = np.where(labels > 0, labels + self.n_cells, 0)

    def _scatter(self, section: _Section, corner: np.ndarray, number: int, origins: _Molecules) -> None:
        """Every UMI to its bin; the cells and their truth are noted."""
        spec, nuclei = self.spec, section.nuclei
        draw = stream(spec.seed, "transcripts", number)
        counts = section.counts.tocoo()
        times = counts.data.astype(np.int64)
        cell, gene = np.repeat(counts.row, times), np.repeat(counts.col, times)
        centre = nuclei[["x_um", "y_um"]].to_numpy()
        place = _places_in_nuclei(section.labels, centre, cell, draw)
        grow = np.sqrt(draw.uniform(1.0, CYTOPLASM**2, len(cell)))
        grow[draw.random(len(cell)) < spec.nuclear_share] = 1.0
        place = centre[cell] + (place - centre[cell]) * grow[:, None]
        step = np.clip(draw.standard_normal(place.shape), -REACH_SIGMA, REACH_SIGMA) * spec.sigma_um
        at = spec.bins_at(place + step + corner)

        n_ambient = draw.poisson(spec.ambient * (spec.section_um / BIN_UM) ** 2)
        share = np.asarray(section.counts.sum(axis=0), dtype=np.float64).ravel()
        anywhere = spec.bins_at(draw.random((n_ambient, 2)) * spec.section_um + corner)
        at = np.concatenate([at, anywhere])
        gene = np.concatenate([gene, draw.choice(len(share), n_ambient, p=share / share.sum())])
        origin = np.concatenate([cell + 1 + self.n_cells, np.zeros(n_ambient, dtype=np.int64)])

        rows, columns = spec.grid
        inside: np.ndarray = np.all((at >= 0) & (at < np.array([columns, rows])), axis=1)
        key = ((at[:, 1] * columns + at[:, 0]) * self.n_genes + gene) * (self.n_cells + len(nuclei) + 1) + origin
        key, n = np.unique(key[inside], return_counts=True)
        key, origin = np.divmod(key, self.n_cells + len(nuclei) + 1)
        table = np.stack([*np.divmod(key, self.n_genes), origin], axis=1)
        origins.append(table, n, columns)
        self._waiting.append(np.column_stack([table[:, :2], n]))
        caught = np.bincount(cell[inside[: len(cell)]], minlength=len(nuclei))
        self.cells.append(
            pd.DataFrame(
                {
                    "cell": np.arange(1, len(nuclei) + 1) + self.n_cells,
                    "x_um": nuclei["x_um"].to_numpy() + corner[0],
                    "y_um": nuclei["y_um"].to_numpy() + corner[1],
                    "cell_type": nuclei["cell_type"].astype(str).to_numpy(),
                    "section": number,
                    "n_umi": np.asarray(section.counts.sum(axis=1)).ravel().astype(np.int64),
                    "n_umi_on_grid": caught,
                }
            )
        )
        self.counts.append(section.counts)
        self.n_cells += len(nuclei)

    def _finished_rows(self, mosaic_row: int) -> int:
        """Grid rows that no later section can reach."""
        spec = self.spec
        rows, _ = spec.grid
        if mosaic_row == spec.rows - 1:
            return rows
        reach = REACH_SIGMA * spec.sigma_um * np.sqrt(2) + CYTOPLASM * 30.0
        top = (mosaic_row + 1) * spec.section_um - reach + spec.pad_um
        left, right = spec.pad_um - reach, spec.pad_um + spec.size_um[0] + reach
        below = spec.bins_at(np.array([[left, top], [right, top]]))
        return int(np.clip(below[:, 1].min(), 0, rows))

    def _flush(self, files: _BinFiles, rows: int) -> None:
        """Write the bins of all grid rows below ``rows``."""
        _, columns = self.spec.grid
        table = np.concatenate(self._waiting)
        ready = table[:, 0] < rows * columns
        files.append(table[ready], rows)
        self._waiting = [table[~ready]]

    def _write_rest(self) -> None:
        spec = self.spec
        cells = pd.concat(self.cells, ignore_index=True)
        cells.to_parquet(self.truth / "cells.parquet", index=False)
        counts = sp.vstack(self.counts, format="csr")
        wide = sp.csr_matrix((counts.data, counts.indices, counts.indptr), shape=(counts.shape[0], self.n_genes))
        sp.save_npz(self.truth / "counts.npz", wide)
        write_json(self.truth / "spec.json", {**asdict(spec), "genes": self.symbols})
        scales = _scale_factors(spec)
        _write_reduced(self.folder / "HE.tif", spec, scales, (self.bins / "spatial", self.outs / "spatial"))
        write_json(self.bins / "spatial" / "scalefactors_json.json", scales)
        overall = {k: v for k, v in scales.items() if k != "bin_size_um"}
        write_json(self.outs / "spatial" / "scalefactors_json.json", overall)
        _write_feature_slice(self.outs / "feature_slice.h5", spec)
        if spec.version == 4:
            _write_segmented(self.outs, self.bins, spec, self.symbols, np.asarray(self.labels), scales)


class _BinFiles:
    """The two matrices and the table of places, written grid row by grid row."""

    def __init__(self, folder: Path, spec: SlideSpec, symbols: list[str]) -> None:
        import h5py
        import pyarrow

        self.spec, self.done, self.n_features = spec, 0, len(symbols)
        self._files = {name: h5py.File(folder / f"{name}_feature_bc_matrix.h5", "w") for name in ("raw", "filtered")}
        self._groups = {name: _matrix_group(file, spec, symbols) for name, file in self._files.items()}
        self._schema = pyarrow.schema(
            [
                ("barcode", pyarrow.string()),
                ("in_tissue", pyarrow.int64()),
                ("array_row", pyarrow.int64()),
                ("array_col", pyarrow.int64()),
                ("pxl_row_in_fullres", pyarrow.float64()),
                ("pxl_col_in_fullres", pyarrow.float64()),
            ]
        )
        self._path = folder / "spatial" / "tissue_positions.parquet"

    def __enter__(self) -> _BinFiles:
        import pyarrow.parquet

        self._places = pyarrow.parquet.ParquetWriter(self._path, self._schema)
        return self

    def __exit__(self, *_: object) -> None:
        self._places.close()
        for name, group in self._groups.items():
            group.create_dataset("shape", data=np.array([self.n_features, group["barcodes"].shape[0]], dtype=np.int32))
            self._files[name].close()

    def append(self, table: np.ndarray, rows: int) -> None:
        """Bins up to grid row ``rows``: ``table [n, 3]`` holds bin number, gene, UMIs; a pair may stand twice."""
        import pyarrow

        spec = self.spec
        _, columns = spec.grid
        for first in range(self.done, rows, 200):
            last = min(first + 200, rows)
            low, high = first * columns, last * columns
            mine = table[(table[:, 0] >= low) & (table[:, 0] < high)]
            counts = sp.csr_matrix(
                (mine[:, 2], (mine[:, 0] - low, mine[:, 1])), shape=(high - low, self.n_features), dtype=np.int64
            )
            counts.sum_duplicates()
            number = np.arange(low, high)
            row, column = number // columns, number % columns
            centre = spec.centres(row, column)
            tissue = ((centre >= spec.pad_um) & (centre < spec.pad_um + spec.size_um)).all(axis=1)
            written = (centre + np.array(spec.misregistration_um)) / spec.um_per_px
            names = np.array([_bin_name(r, c) for r, c in zip(row, column, strict=True)], dtype="S")
            arrays = [names.astype(str), tissue.astype(np.int64), row, column, written[:, 1], written[:, 0]]
            self._places.write_table(pyarrow.table([pyarrow.array(a) for a in arrays], schema=self._schema))
            _append_columns(self._groups["raw"], counts, names)
            _append_columns(self._groups["filtered"], counts[tissue], names[tissue])
        self.done = rows


class _Molecules:
    """Truth of every bin and gene: the cell that its UMIs came from, 0 for none."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        names = ("array_row", "array_col", "gene", "cell", "n")
        self._schema = pyarrow.schema([(name, pyarrow.int32()) for name in names])
        self._path = path

    def __enter__(self) -> _Molecules:
        import pyarrow.parquet

        self._writer = pyarrow.parquet.ParquetWriter(self._path, self._schema)
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def append(self, table: np.ndarray, n: np.ndarray, columns: int) -> None:
        import pyarrow

        arrays = [table[:, 0] // columns, table[:, 0] % columns, table[:, 1], table[:, 2], n]
        self._writer.write_table(
            pyarrow.table([pyarrow.array(a.astype(np.int32)) for a in arrays], schema=self._schema)
        )


def _bin_name(row: Any, column: Any) -> str:
    return f"s_002um_{row:05d}_{column:05d}-1"


def _matrix_group(file: Any, spec: SlideSpec, symbols: list[str]) -> Any:
    """An empty feature-barcode matrix as Cell Ranger and Space Ranger write it (CSC, one column per barcode)."""
    file.attrs["filetype"] = "matrix"
    file.attrs["version"] = 2
    file.attrs["chemistry_description"] = "Visium HD (simulated)"
    file.attrs["software_version"] = SOFTWARE[spec.version]
    file.attrs["library_ids"] = np.array([b"simulated"])
    file.attrs["original_gem_groups"] = np.array([1])
    group = file.create_group("matrix")
    for name, dtype in (("data", np.int32), ("indices", np.int64)):
        group.create_dataset(
            name, (0,), dtype, maxshape=(None,), chunks=(65536,), compression="gzip", compression_opts=1
        )
    group.create_dataset("indptr", data=np.zeros(1, np.int64), maxshape=(None,), chunks=(65536,), compression="gzip")
    group.create_dataset("barcodes", (0,), "S21", maxshape=(None,), chunks=(65536,), compression="gzip")
    features = group.create_group("features")
    features["_all_tag_keys"] = np.array([tag.encode() for tag in FEATURE_TAGS])
    features["feature_type"] = np.full(len(symbols), b"Gene Expression")
    features["genome"] = np.full(len(symbols), spec.genome.encode())
    features["id"] = np.array([f"ENSG{i:011d}".encode() for i in range(1, len(symbols) + 1)])
    features["name"] = np.array([s.encode() for s in symbols])
    return group


def _append_columns(group: Any, counts: sp.csr_matrix, names: np.ndarray) -> None:
    counts = sp.csr_matrix(counts)
    counts.sort_indices()
    before = group["data"].shape[0]
    for name, values in (
        ("data", counts.data.astype(np.int32)),
        ("indices", counts.indices.astype(np.int64)),
        ("indptr", counts.indptr[1:].astype(np.int64) + before),
        ("barcodes", names.astype("S21")),
    ):
        n = group[name].shape[0]
        group[name].resize((n + len(values),))
        group[name][n:] = values


def _places_in_nuclei(
    labels: np.ndarray, centre: np.ndarray, cell: np.ndarray, draw: np.random.Generator
) -> np.ndarray:
    """A uniform place in the mask of each UMI's nucleus, um ``[umi, 2]``; the centre where a mask is empty."""
    flat = labels.ravel()
    order = np.argsort(flat, kind="stable")
    begin = np.searchsorted(flat[order], np.arange(1, len(centre) + 2))
    n = np.diff(begin)[cell]
    pixel = order[np.minimum(begin[cell] + (draw.random(len(cell)) * n).astype(np.int64), len(order) - 1)]
    xy = np.stack([pixel % labels.shape[1], pixel // labels.shape[1]], axis=1) + draw.random((len(cell), 2))
    return np.where(n[:, None] > 0, xy * UM_PER_PX, centre[cell])


def _bilinear(image: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    out = image.astype(np.float32)
    for axis, at in enumerate((rows, columns)):
        at = np.clip(at, 0, image.shape[axis] - 1)
        low = np.minimum(at.astype(int), image.shape[axis] - 2)
        weight = (at - low).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        out = out.take(low, axis) * (1 - weight) + out.take(low + 1, axis) * weight
    return np.rint(out).astype(np.uint8)


def _write_tiff(path: Path, picture: np.ndarray, spec: SlideSpec, scratch: Path) -> None:
    """BigTIFF in tiles with reduced levels as SubIFDs; each level is averaged from the one above on disk."""
    import tifffile

    levels: list[np.ndarray] = [picture]
    while max(levels[-1].shape[:2]) > 2 * TIFF_TILE and len(levels) < 8:
        above = levels[-1]
        height, width = above.shape[0] // 2, above.shape[1] // 2
        level: np.ndarray = np.memmap(scratch / f"level{len(levels)}", np.uint8, "w+", shape=(height, width, 3))
        for top in range(0, height, 256):
            part = above[2 * top : 2 * min(top + 256, height), : 2 * width].astype(np.uint16)
            level[top : top + 256] = part.reshape(-1, 2, width, 2, 3).mean(axis=(1, 3)).round().astype(np.uint8)
        levels.append(level)

    def tiles(level: np.ndarray) -> Iterator[np.ndarray]:
        for top in range(0, level.shape[0], TIFF_TILE):
            for left in range(0, level.shape[1], TIFF_TILE):
                part = np.asarray(level[top : top + TIFF_TILE, left : left + TIFF_TILE])
                short = [(0, TIFF_TILE - n) for n in part.shape[:2]]
                yield np.pad(part, (*short, (0, 0)), mode="edge")

    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for i, level in enumerate(levels):
            per_cm = 1e4 / (spec.um_per_px * 2**i)
            writer.write(
                tiles(level), shape=level.shape, dtype=np.uint8, tile=(TIFF_TILE, TIFF_TILE), photometric="rgb",
                compression=spec.compression, resolution=(per_cm, per_cm), resolutionunit="CENTIMETER", metadata=None,
                subifds=(len(levels) - 1 or None) if i == 0 else None, subfiletype=1 if i else 0,
            )  # fmt: skip


def _scale_factors(spec: SlideSpec) -> dict[str, float]:
    longest = max(spec.height_px, spec.width_px)
    return {
        "spot_diameter_fullres": BIN_UM / spec.um_per_px,
        "bin_size_um": BIN_UM,
        "microns_per_pixel": spec.um_per_px,
        "regist_target_img_scalef": min(1.0, 3000 / longest),
        "tissue_lowres_scalef": min(0.25, 600 / longest),
        "fiducial_diameter_fullres": 500.0 / spec.um_per_px,
        "tissue_hires_scalef": min(0.5, 6000 / longest),
    }


def _write_reduced(path: Path, spec: SlideSpec, scales: dict[str, float], folders: tuple[Path, ...]) -> None:
    from PIL import Image

    from ge2hist_core.slide_image import SlideImage

    with SlideImage(path, um_per_px=spec.um_per_px) as image:
        for name in ("hires", "lowres"):
            factor = scales[f"tissue_{name}_scalef"]
            height, width = (max(1, round(n * factor)) for n in (spec.height_px, spec.width_px))
            strips = [
                image.at_scale((top, min(top + 64, height)), (0, width), spec.um_per_px / factor)
                for top in range(0, height, 64)
            ]
            reduced = Image.fromarray(np.concatenate(strips))
            for folder in folders:
                reduced.save(folder / f"tissue_{name}_image.png")


def _write_feature_slice(path: Path, spec: SlideSpec) -> None:
    """The metadata of ``feature_slice.h5``: layout and the matrices between grid and picture; no slices."""
    import h5py

    to_picture = np.eye(3)
    to_picture[:2, :2] = spec.axes.T / spec.um_per_px
    to_picture[:2, 2] = (spec.grid_corner + spec.axes.sum(axis=0) / 2) / spec.um_per_px
    back = np.linalg.inv(to_picture)
    layout = {"file_format": "1.0", "transform": np.eye(3).ravel().tolist()}
    matrices = {
        "spot_colrow_to_microscope_colrow": to_picture,
        "microscope_colrow_to_spot_colrow": back,
        "cytassist_colrow_to_spot_colrow": back,
        "spot_colrow_to_cytassist_colrow": to_picture,
    }
    metadata = {
        "hd_layout_json": json.dumps(layout),
        "transform_matrices": {name: matrix.ravel().tolist() for name, matrix in matrices.items()},
        "nrows": spec.grid[0],
        "ncols": spec.grid[1],
        "spot_pitch": BIN_UM,
    }
    with h5py.File(path, "w") as file:
        file.attrs["metadata_json"] = json.dumps(metadata)


def _write_segmented(
    outs: Path, bins: Path, spec: SlideSpec, symbols: list[str], labels: np.ndarray, scales: dict[str, float]
) -> None:
    """Space Ranger 4: true nuclei as outlines, nuclei grown by ``CELL_UM`` as cells, and the cells' counts."""
    import h5py
    from skimage.segmentation import expand_labels

    folder = outs / "segmented_outputs"
    (folder / "spatial").mkdir(parents=True)
    grown = expand_labels(labels, CELL_UM / spec.um_per_px)
    for name, image in (("nucleus", labels), ("cell", grown)):
        _write_outlines(folder / f"{name}_segmentations.geojson", image)
    write_json(folder / "spatial" / "scalefactors_json.json", {k: v for k, v in scales.items() if k != "bin_size_um"})

    n_cells = int(labels.max())
    rows, columns = spec.grid
    number = np.arange(rows * columns)
    at = np.floor(spec.centres(number // columns, number % columns) / spec.um_per_px).astype(int)
    at = np.clip(at, 0, np.array(labels.shape)[::-1] - 1)
    cell_of, nucleus_of = (image[at[:, 1], at[:, 0]] for image in (grown, labels))
    with h5py.File(bins / "raw_feature_bc_matrix.h5") as file:
        group = file["matrix"]
        parts = (group[name][:] for name in ("data", "indices", "indptr"))
        counts = sp.csr_matrix(tuple(parts), shape=(rows * columns, len(symbols)))
    sums = sp.csr_matrix((np.ones(len(number)), (cell_of, number)), shape=(n_cells + 1, len(number))) @ counts
    present = 1 + np.flatnonzero(np.bincount(cell_of, minlength=n_cells + 1)[1:])
    names = np.array([_cell_name(i) for i in present], dtype="S21")
    with h5py.File(folder / CELL_MATRIX, "w") as file:
        group = _matrix_group(file, spec, symbols)
        _append_columns(group, sums[present], names)
        group.create_dataset("shape", data=np.array([len(symbols), len(names)], dtype=np.int32))
    mapping = pd.DataFrame({"square_002um": [_bin_name(i // columns, i % columns) for i in number]})
    for size in (8, 16):
        k = size // 2
        mapping[f"square_{size:03d}um"] = [
            f"s_{size:03d}um_{i // columns // k:05d}_{i % columns // k:05d}-1" for i in number
        ]
    mapping["cell_id"] = [_cell_name(i) if i else None for i in cell_of]
    mapping["in_nucleus"], mapping["in_cell"] = nucleus_of > 0, cell_of > 0
    mapping.to_parquet(outs / "barcode_mappings.parquet", index=False)


def _cell_name(i: Any) -> str:
    return f"cellid_{i:09d}-1"


def _write_outlines(path: Path, labels: np.ndarray) -> None:
    """Each label's outline in px of the picture, one GeoJSON feature a line."""
    from scipy.ndimage import find_objects
    from skimage.measure import find_contours

    with path.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [\n')
        first = True
        for i, box in enumerate(find_objects(labels), start=1):
            if box is None:
                continue
            contour = max(find_contours(np.pad(labels[box] == i, 1).astype(float), 0.5), key=len)
            ring = contour[:, ::-1] + np.array([box[1].start, box[0].start]) - 0.5
            feature = {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [ring.round(2).tolist()]},
                "properties": {"cell_id": i, "classification": {"name": "Cell", "color": [255, 0, 0]}},
            }
            file.write(("" if first else ",\n") + json.dumps(feature))
            first = False
        file.write("\n]}\n")


def recovery(slide: str | Path, store: TissueStore, mappings: str | Path, max_um: float = 4.0) -> dict[str, float]:
    """How well the cells of a prepared store are the true ones.

    A found cell is matched with the true nucleus of which it is the nearest found one and which is the nearest to it,
    at most ``max_um`` away.

    Parameters
    ----------
    slide: folder of :func:`write_slide`.
    mappings: ``barcode_mappings.parquet`` of ``prepare``: which bin went to which cell.

    Returns
    -------
    ``matched`` share of the found cells with a true one, ``recall`` share of the true nuclei with a found cell (gaps
    between regions and cells below the minimum count as missing), ``umi_right`` share of the assigned UMIs that come
    from the matched true cell, ``umi_cell`` share of the assigned UMIs that come from any cell, ``correlation`` median
    over matched cells of the Pearson correlation over genes between log(1 + found) and log(1 + true) counts, and
    ``correlation_other`` the same with the true counts of another cell, for comparison.
    """
    from scipy.spatial import cKDTree

    truth = Path(slide) / "truth"
    spec = json.loads((truth / "spec.json").read_text(encoding="utf-8"))
    cells = pd.read_parquet(truth / "cells.parquet")
    true_xy = cells[["x_um", "y_um"]].to_numpy()
    xy = store.obs[["x_image_px", "y_image_px"]].to_numpy(np.float64) * spec["um_per_px"]
    distance, nearest = cKDTree(true_xy).query(xy)
    back = cKDTree(xy).query(true_xy)[1]
    good = (back[nearest] == np.arange(len(xy))) & (distance <= max_um)
    true_of = pd.Series(np.where(good, cells["cell"].to_numpy()[nearest], -1), index=store.obs.index)

    bins = pd.read_parquet(mappings)
    place = bins["square_002um"].str.extract(r"s_002um_(\d{5})_(\d{5})").astype(np.int32)
    bins = pd.DataFrame(
        {"array_row": place[0], "array_col": place[1], "wanted": true_of.loc[bins["cell_id"]].to_numpy()}
    )
    joined = pd.read_parquet(truth / "molecules.parquet").merge(bins, on=["array_row", "array_col"])
    total = joined["n"].sum()

    symbols = pd.Index(spec["genes"]).get_indexer(store.var.index)
    true_counts = sp.load_npz(truth / "counts.npz").tocsr()[:, symbols]
    rows = np.flatnonzero(good)
    found = np.log1p(store.cells.counts[rows].toarray())
    true = np.log1p(true_counts[nearest[rows]].toarray().astype(np.float64))
    own, other = (
        [np.corrcoef(a, b)[0, 1] for a, b in zip(found, t, strict=True) if a.std() and b.std()]
        for t in (true, np.roll(true, len(true) // 2, axis=0))
    )
    return {
        "matched": float(good.mean()),
        "recall": float(good.sum() / len(cells)),
        "umi_right": float(joined.loc[joined["cell"] == joined["wanted"], "n"].sum() / total),
        "umi_cell": float(joined.loc[joined["cell"] > 0, "n"].sum() / total),
        "correlation": float(np.median(own)),
        "correlation_other": float(np.median(other)),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=1, help="sections of the mosaic, downwards")
    parser.add_argument("--columns", type=int, default=1, help="sections of the mosaic, across")
    parser.add_argument("--section-um", type=float, default=512.0)
    parser.add_argument("--um-per-px", type=float, default=UM_PER_PX)
    parser.add_argument("--sigma-um", type=float, default=2.0, help="diffusion of transcripts")
    parser.add_argument("--detection", type=float, default=1.0, help="share of the RNA that is counted")
    parser.add_argument("--rotation-deg", type=float, default=0.0, help="of the capture grid")
    parser.add_argument("--space-ranger", type=int, choices=(3, 4), default=3, help="layout of the outputs")
    parser.add_argument("--extra-genes", type=int, default=0, help="genes without expression")
    parser.add_argument("--distinct", type=int, help="different sections in the mosaic, to make a large slide fast")
    parser.add_argument("--compression", choices=("zlib", "jpeg"), default="zlib")


def main(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    spec = SlideSpec(
        seed=args.seed, rows=args.rows, columns=args.columns, section_um=args.section_um, um_per_px=args.um_per_px,
        sigma_um=args.sigma_um, detection=args.detection, rotation_deg=args.rotation_deg, version=args.space_ranger,
        extra_genes=args.extra_genes, distinct=args.distinct, compression=args.compression,
    )  # fmt: skip
    with tqdm(total=spec.rows * spec.columns, unit="section", desc="simulate") as bar:
        write_slide(args.out, spec, bar.update)
    print(f"prepare it by: python -m ge2hist_core prepare {args.out}/outs --image {args.out}/HE.tif --out DATA.zarr")
