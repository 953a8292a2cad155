"""A Xenium output folder and its aligned H&E -> cells in um of the H&E.

Read are ``experiment.xenium``, ``cell_feature_matrix.h5``, ``cells``, ``nucleus_boundaries``, and where they are there
``transcripts`` and ``cell_boundaries`` (each ``.parquet`` or ``.csv.gz``), as Xenium Onboard Analysis 1 to 4 writes
them. Their lengths are um of the Xenium stage; a px of its morphology image has ``pixel_size`` um.

The H&E is a picture of its own. Xenium Explorer exports the 3 x 3 matrix that takes (x, y) px of the H&E to (x, y) px
of the morphology image; its inverse brings outlines and transcripts to the H&E, which itself is never resampled.

As the paper counts per nucleus, the transcripts that overlap a nucleus are summed (``overlaps_nucleus``; quality of at
least ``MIN_QV``, as 10x counts them). ``whole_cells`` takes the matrix of cells instead, as does a folder without
transcripts. Control probes and codewords are no genes and are left out of every sum.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from ge2hist_core.slide_cells import SCALE_DIFFERENCE, SlideCells, project, scale_of, whole_counts
from ge2hist_core.slide_image import SlideImage
from ge2hist_core.types import BadInput

__all__ = ["is_xenium", "open_xenium", "read_alignment"]

SPECS = "experiment.xenium"
MATRIX = "cell_feature_matrix.h5"
GENE_EXPRESSION = "Gene Expression"
MIN_QV = 20.0
GRID_UM = 2.0
"""Transcripts are counted on this grid to check the registration by, as Visium HD's bins."""
BATCH = 1_000_000
UNASSIGNED = ("UNASSIGNED", "-1", "0", "", "nan", "None")
"""What stands for no cell: the versions differ. ``cells`` is asked first, which may hold a cell 0."""
TRANSCRIPT_COLUMNS = ("cell_id", "overlaps_nucleus", "feature_name", "x_location", "y_location", "qv")
ORGANISMS = {"human": ("grch", "hg"), "mouse": ("grcm", "mm")}
"""How names of references of an organism begin."""


def is_xenium(folder: Path) -> bool:
    """Whether a folder looks like Xenium's output."""
    return (folder / SPECS).is_file() or (folder / "transcripts.parquet").is_file()


def read_alignment(path: str | Path | None) -> np.ndarray:
    """Xenium Explorer's matrix ``[3, 3]`` from px of the H&E to px of the morphology image; None is no alignment.

    Raises
    ------
    BadInput: missing, not 3 rows of 3 numbers, or without an inverse.
    """
    if path is None:
        return np.eye(3)
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path} does not exist: give the alignment CSV that Xenium Explorer exported.")
    try:
        matrix = np.loadtxt(path, delimiter=",", encoding="utf-8-sig", ndmin=2)
    except (ValueError, UnicodeDecodeError) as error:
        raise BadInput(f"{path.name} is no alignment matrix ({error}): give 3 lines of 3 numbers.") from error
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-12:
        raise BadInput(
            f"{path.name} holds {' x '.join(map(str, matrix.shape))} numbers or a matrix without an inverse: give the "
            "3 x 3 matrix that Xenium Explorer exported (not the keypoints)."
        )
    return matrix / matrix[2, 2]


def open_xenium(
    folder: str | Path,
    image: str | Path,
    alignment: str | Path | None = None,
    whole_cells: bool = False,
    genome: str = "GRCh38",
    on_transcripts: Callable[[int], object] = lambda n: None,
) -> SlideCells:
    """Read a folder; the H&E stays open in the result.

    Parameters
    ----------
    image: the H&E. alignment: CSV from px of it to px of the morphology image; None if the two have the same pixels.
    whole_cells: count whole cells, not nuclei.
    genome: what the reference of the panel's organism is called.
    on_transcripts: told the number of transcripts of each block that was read.

    Raises
    ------
    BadInput: a part is missing, damaged or of another run, or the matrix contradicts the picture's scale.
    """
    import shapely

    folder = Path(folder)
    pixel_um, software = _specs(folder, genome)
    genes, names, cell_counts = _matrix(folder / MATRIX)
    cells = _table(folder, "cells", ("cell_id", "x_centroid", "y_centroid"))
    ids = _text(cells["cell_id"])
    if set(ids) != set(names):
        raise BadInput(
            f"{MATRIX} holds {len(names):,} cells, cells {len(ids):,}, {len(set(ids) & set(names)):,} in common: the "
            "two are of different runs, copy the whole folder again."
        )
    centroid = cells[["x_centroid", "y_centroid"]].to_numpy(np.float64)
    matrix = np.linalg.inv(read_alignment(alignment)) @ np.diag([1 / pixel_um, 1 / pixel_um, 1.0])
    um_per_px = 1.0 / scale_of(matrix, centroid)
    picture = SlideImage(image, um_per_px=um_per_px)
    try:
        _check_picture(picture, project(matrix, centroid), alignment)
        to_um = np.diag([um_per_px, um_per_px, 1.0]) @ matrix
        outlines = _outlines(folder, "nucleus_boundaries", names)
        has_nucleus = np.array([shape is not None for shape in outlines])
        if whole_cells:
            wide = _outlines(folder, "cell_boundaries", names)
            outlines = np.array(
                [a if a is not None else b for a, b in zip(outlines, wide, strict=True)], dtype=object
            )  # a cell without a nucleus is drawn by its own outline
        transcripts = next((f for f in _names(folder, "transcripts") if f.is_file()), None)
        warnings: list[str] = []
        figures: dict[str, Any] = {"software": software, "pixel_um": pixel_um, "cells_with_nucleus": has_nucleus.mean()}
        if transcripts is None:
            density = (project(to_um, centroid), np.asarray(cell_counts.sum(axis=1)).ravel()[_order(ids, names)])
            counts, dropped = cell_counts, {}
            if not whole_cells:
                warnings.append(f"{folder.name} has no transcripts: whole cells were counted instead of nuclei.")
            unit = "cell"
        else:
            read = _Transcripts(names, genes.index, to_um, whole_cells)
            for table in _batches(transcripts):
                read.add(table)
                on_transcripts(len(table))
            counts, dropped, density = read.counts(), read.dropped, read.density()
            unit = "cell" if whole_cells else "nucleus"
            figures["control_transcripts"] = read.controls
            figures["matrix_agreement"] = _agreement(read.per_cell, cell_counts, transcripts.name)
        outlined = np.array([shape is not None for shape in outlines])
        dropped["no_outline"] = int(counts[~outlined].sum())
        shapes = shapely.transform(outlines[outlined], lambda xy: project(to_um, xy))
        return SlideCells(
            section="",
            image=picture,
            unit=unit,
            names=names[outlined],
            outlines=shapes,
            counts=counts[outlined],
            genes=genes,
            dropped=dropped,
            density=density,
            obs=pd.DataFrame(index=pd.RangeIndex(int(outlined.sum()))),
            figures={k: float(v) if isinstance(v, np.floating) else v for k, v in figures.items()},
            warnings=tuple(warnings),
        )
    except BaseException:
        picture.close()
        raise


class _Transcripts:
    """Sums of transcripts per nucleus (or cell) and gene, of the rest by reason, and their map."""

    def __init__(self, names: np.ndarray, genes: pd.Index, to_um: np.ndarray, whole_cells: bool) -> None:
        self._cells, self._genes = pd.Index(names), genes
        self._to_um, self._whole = to_um, whole_cells
        self._parts: list[sp.coo_matrix] = []
        self._map: dict[int, int] = {}
        self.per_cell = np.zeros(len(names), dtype=np.int64)
        self.controls = 0
        self.dropped = {"low_quality": 0, "no_cell": 0} | ({} if whole_cells else {"outside_nucleus": 0})

    def add(self, table: pd.DataFrame) -> None:
        gene = self._genes.get_indexer(_text(table["feature_name"]))
        self.controls += int((gene < 0).sum())
        table, gene = table[gene >= 0], gene[gene >= 0]
        good = table["qv"].to_numpy() >= MIN_QV
        self.dropped["low_quality"] += int((~good).sum())
        table, gene = table[good], gene[good]
        self._note_places(table)
        named = _text(table["cell_id"])
        cell = self._cells.get_indexer(named)
        strange = (cell < 0) & ~np.isin(named.astype(str), UNASSIGNED)
        if strange.any():
            raise BadInput(
                f"The transcripts name the cell {named[strange][0]!r} that {MATRIX} does not hold: the two are of "
                "different runs, copy the whole folder again."
            )
        self.dropped["no_cell"] += int((cell < 0).sum())
        self.per_cell += np.bincount(cell[cell >= 0], minlength=len(self._cells))
        mine = cell >= 0
        if not self._whole:
            nuclear = table["overlaps_nucleus"].to_numpy().astype(bool)
            self.dropped["outside_nucleus"] += int((mine & ~nuclear).sum())
            mine &= nuclear
        shape = (len(self._cells), len(self._genes))
        part = sp.coo_matrix((np.ones(int(mine.sum()), np.float32), (cell[mine], gene[mine])), shape=shape)
        part.sum_duplicates()
        self._parts.append(part)

    def counts(self) -> sp.csr_matrix:
        out = sp.csr_matrix((len(self._cells), len(self._genes)), dtype=np.float32)
        if self._parts:
            rows, columns, data = (
                np.concatenate([getattr(p, name) for p in self._parts]) for name in ("row", "col", "data")
            )
            out = sp.csr_matrix((data, (rows, columns)), shape=out.shape)
        return out

    def density(self) -> tuple[np.ndarray, np.ndarray]:
        key = np.fromiter(self._map.keys(), np.int64, len(self._map))
        rows, columns = np.divmod(key, 2**24)
        return (np.stack([columns, rows], axis=1) + 0.5) * GRID_UM, np.fromiter(self._map.values(), np.int64, len(key))

    def _note_places(self, table: pd.DataFrame) -> None:
        xy = project(self._to_um, table[["x_location", "y_location"]].to_numpy())
        at = np.floor(xy / GRID_UM).astype(np.int64)
        at = at[(at >= 0).all(axis=1)]
        for key, n in zip(*np.unique(at[:, 1] * 2**24 + at[:, 0], return_counts=True), strict=True):
            self._map[int(key)] = self._map.get(int(key), 0) + int(n)


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, KeyError, ValueError, RuntimeError, EOFError) as error:  # pyarrow's ArrowInvalid is a ValueError
        if isinstance(error, BadInput):
            raise
        reason = (str(error).strip("'\"").splitlines() or [type(error).__name__])[0].rstrip(".")
        raise BadInput(f"{path.name} is truncated or damaged ({reason}): copy it again from the run.") from error


def _names(folder: Path, name: str) -> list[Path]:
    return [folder / f"{name}.parquet", folder / f"{name}.csv.gz"]


def _specs(folder: Path, genome: str) -> tuple[float, str]:
    """um per px of the morphology image, and the software."""
    path = folder / SPECS
    if not path.is_file():
        raise BadInput(f"{path} is missing: copy the whole Xenium output folder.")
    with _damage(path):
        specs = json.loads(path.read_text(encoding="utf-8"))
        pixel_um = float(specs["pixel_size"])
    if not 0.05 <= pixel_um <= 2.0:
        raise BadInput(f"{SPECS} gives a pixel_size of {pixel_um:g} um: copy it again from the run.")
    organism = str(specs.get("panel_organism", "")).lower()
    if organism in ORGANISMS and not any(name in genome.lower() for name in ORGANISMS[organism]):
        raise BadInput(
            f"The panel is of {organism} genes, expected {genome}: choose a slide of that species, or say --genome."
        )
    return pixel_um, str(specs.get("analysis_sw_version", ""))


def _matrix(path: Path) -> tuple[pd.DataFrame, np.ndarray, sp.csr_matrix]:
    """Genes, names of cells, counts ``[cell, gene]`` of gene expression."""
    import h5py

    if not path.is_file():
        raise BadInput(f"{path} is missing: copy the whole Xenium output folder.")
    with _damage(path), h5py.File(path) as file:
        group = file["matrix"]
        n_features, n_cells = (int(n) for n in group["shape"][:2])
        ids, symbols, kind = (
            np.asarray(group["features"][name]).astype(str) for name in ("id", "name", "feature_type")
        )
        names = np.asarray(group["barcodes"]).astype(str).astype(object)
        parts = tuple(np.asarray(group[name]) for name in ("data", "indices", "indptr"))
        counts = sp.csr_matrix(parts, shape=(n_cells, n_features))
        counts.check_format()
    keep = np.flatnonzero(kind == GENE_EXPRESSION)
    if not len(keep):
        raise BadInput(f"{path.name} holds no feature of type {GENE_EXPRESSION!r}: give a gene expression run.")
    twice = pd.Index(symbols[keep]).duplicated()
    if twice.any():
        raise BadInput(f"{path.name} names the gene {symbols[keep][twice][0]!r} twice: make the panel's names unique.")
    genes = pd.DataFrame({"gene_id": ids[keep]}, index=pd.Index(symbols[keep]))
    return genes, names, whole_counts(counts[:, keep].astype(np.float32), path.name)


def _table(folder: Path, name: str, columns: tuple[str, ...]) -> pd.DataFrame:
    path = next((f for f in _names(folder, name) if f.is_file()), None)
    if path is None:
        raise BadInput(f"{folder / name}.parquet is missing (or {name}.csv.gz): copy the whole Xenium output folder.")
    with _damage(path):
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    missing = [c for c in columns if c not in table.columns]
    if missing:
        raise BadInput(f"{path.name} lacks the column {missing[0]!r}: copy it again from the run.")
    return table


def _batches(path: Path) -> Iterator[pd.DataFrame]:
    """The transcripts, block by block."""
    import pyarrow.parquet

    with _damage(path):
        if path.suffix == ".parquet":
            file = pyarrow.parquet.ParquetFile(path)
            missing = [c for c in TRANSCRIPT_COLUMNS if c not in file.schema_arrow.names]
            if missing:
                raise BadInput(f"{path.name} lacks the column {missing[0]!r}: copy it again from the run.")
            for batch in file.iter_batches(BATCH, columns=list(TRANSCRIPT_COLUMNS)):
                yield batch.to_pandas()
        else:
            yield from pd.read_csv(path, usecols=list(TRANSCRIPT_COLUMNS), chunksize=BATCH)


def _text(values: pd.Series) -> np.ndarray:
    """Names as strings: the versions write strings, bytes or whole numbers."""
    array = values.to_numpy()
    if array.dtype == object and len(array) and isinstance(array[0], bytes):
        return np.array([value.decode() for value in array], dtype=object)
    if array.dtype.kind == "f":
        array = array.astype(np.int64)
    return array.astype(str).astype(object)


def _outlines(folder: Path, name: str, names: np.ndarray) -> np.ndarray:
    """``[cell]`` polygon in um of the stage, None for a cell without one; several nuclei make a MultiPolygon."""
    import shapely

    table = _table(folder, name, ("cell_id", "vertex_x", "vertex_y"))
    cell = pd.Index(names).get_indexer(_text(table["cell_id"]))
    part = table["label_id"].to_numpy() if "label_id" in table.columns else cell
    keep = cell >= 0
    cell, part, xy = cell[keep], part[keep], table.loc[keep, ["vertex_x", "vertex_y"]].to_numpy(np.float64)
    first = np.flatnonzero(np.r_[True, (cell[1:] != cell[:-1]) | (part[1:] != part[:-1])]) if len(cell) else cell
    rings = np.r_[first, len(cell)]
    out = np.full(len(names), None, dtype=object)
    parts: dict[int, list[Any]] = {}
    for start, stop in zip(rings, rings[1:], strict=False):
        if stop - start >= 3:
            parts.setdefault(int(cell[start]), []).append(shapely.Polygon(xy[start:stop]))
    for i, polygons in parts.items():
        out[i] = polygons[0] if len(polygons) == 1 else shapely.MultiPolygon(polygons)
    if not parts:
        raise BadInput(f"{name} outlines none of the {len(names):,} cells: it is of another run, copy it again.")
    return out


def _order(ids: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Row of ``names`` of each of ``ids``."""
    return pd.Index(names).get_indexer(ids)


def _agreement(per_cell: np.ndarray, matrix: sp.csr_matrix, name: str) -> float:
    """Share of the matrix' counts that the transcripts give to the same cells.

    Raises
    ------
    BadInput: less than half.
    """
    counted = np.asarray(matrix.sum(axis=1)).ravel()
    share = float(np.minimum(per_cell, counted).sum() / max(counted.sum(), 1.0))
    if share < 0.5:
        raise BadInput(
            f"{name} gives {100 * share:.0f} % of the counts of {MATRIX} to the same cells: the two are of different "
            "runs or the transcripts are cut, copy the whole folder again."
        )
    return share


def _check_picture(image: SlideImage, px: np.ndarray, alignment: str | Path | None) -> None:
    """Refuse a picture in which the cells do not lie, or whose own scale is another."""
    cure = "give the matrix that Xenium Explorer exported for this H&E by --alignment"
    inside = float(((px >= 0) & (px < (image.width, image.height))).all(axis=1).mean())
    if inside == 0:
        raise BadInput(f"No cell lies within {image.name} ({image.width} x {image.height} px): {cure}.")
    said = image.file_um_per_px
    if said is not None and abs(said / image.um_per_px - 1.0) > SCALE_DIFFERENCE:
        by = "the alignment matrix" if alignment is not None else "the morphology image, without an alignment,"
        raise BadInput(f"{image.name} has {said:.4g} um per pixel, by {by} {image.um_per_px:.4g}: {cure}.")
