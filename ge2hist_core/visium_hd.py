"""A Space Ranger folder of Visium HD -> bins in um of the H&E, and from bins to cells.

Space Ranger 3 writes ``binned_outputs/square_002um``: a feature-barcode matrix (HDF5, one column per 2-um bin), the
bins' places in px of the full-resolution picture and the scale. Space Ranger 4 adds ``segmented_outputs`` with outlines
of nuclei and cells (GeoJSON) and a feature-cell matrix. Matrices are read column block by column block.

Coordinates are um from the top left corner of the full-resolution picture, x right and y down. A bin is a square whose
sides follow the capture grid, which may be turned or mirrored against the picture.

Bins become cells as in the paper: a bin belongs to the nucleus that covers its centre; a bin that overlaps a second
nucleus is ambiguous and dropped; the UMIs of the others are summed per nucleus. Every UMI of the matrix ends in exactly
one line of a :class:`Ledger`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from ge2hist_core.slide_image import SlideImage
from ge2hist_core.types import BadInput

__all__ = [
    "AMBIGUOUS",
    "BIN_UM",
    "Ledger",
    "SpaceRanger",
    "assign_bins",
    "check_image",
    "open_space_ranger",
    "read_outlines",
    "sum_counts",
]

BIN_UM = 2.0
PITCH_TOLERANCE = 0.02
"""Relative difference between the bins' pitch by the positions and 2 um that is still taken for rounding."""
IMAGE_MATCH = 0.5
"""Least correlation of the picture with the run's own reduced copy of it."""
AMBIGUOUS = -1
SAMPLES = 4
"""A bin is looked up at SAMPLES x SAMPLES places: 0.5 um apart, one per pixel of the label image."""
BLOCK_BINS = 400_000
POSITION_COLUMNS = ("in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
GENE_EXPRESSION = "Gene Expression"
BIN_NAME = re.compile(rb"s_002um_(\d{5})_(\d{5})(-\d+)?")
CELL_NAME = re.compile(r"cellid_(\d+)(?:-\d+)?")


@dataclass(frozen=True)
class Ledger:
    """Where the UMIs of the gene expression matrix went; the parts sum to ``total`` exactly.

    Parameters
    ----------
    assigned: in the cells of the store.
    outside_tissue: of bins that Space Ranger found outside the tissue.
    no_nucleus: of bins whose centre lies in no nucleus.
    ambiguous: of bins that overlap two nuclei.
    below_minimum: of nuclei with too few UMIs to be a cell.
    between_regions: of nuclei in the gaps that keep regions apart.
    """

    total: int
    assigned: int
    outside_tissue: int
    no_nucleus: int
    ambiguous: int
    below_minimum: int = 0
    between_regions: int = 0

    def __post_init__(self) -> None:
        parts = asdict(self)
        total = parts.pop("total")
        if sum(parts.values()) != total:
            raise ValueError(f"{sum(parts.values())} UMIs are accounted for, the matrix holds {total}: {parts}")

    def text(self) -> str:
        """One line for the user: every part in UMIs and percent."""
        parts = asdict(self)
        total = parts.pop("total")
        share = {name: 100.0 * n / max(total, 1) for name, n in parts.items()}
        listed = ", ".join(f"{name.replace('_', ' ')} {n:,} ({share[name]:.1f} %)" for name, n in parts.items())
        return f"{total:,} UMIs = {listed}"


@dataclass(frozen=True, eq=False)
class SpaceRanger:
    """One Visium HD run.

    Parameters
    ----------
    folder: the folder that holds ``binned_outputs``.
    matrix: the feature-barcode matrix in use.
    software: what wrote it, "" where it does not say.
    um_per_px: scale of the full-resolution picture.
    genes: one row per measured gene, index symbol (unique), column ``gene_id``.
    feature_gene: int ``[feature]`` row of ``genes`` of each feature, -1 for what is no gene expression.
    row, column: int32 ``[bin]`` place in the capture grid, bins in the order of the matrix's columns.
    xy_um: float32 ``[bin, 2]`` centre.
    in_tissue: bool ``[bin]``.
    axes: ``[2, 2]`` um; ``axes[0]`` is the step (x, y) from one column to the next, ``axes[1]`` from row to row.
    segmented: ``segmented_outputs`` of Space Ranger 4, or None.
    hires: the run's reduced picture, or None. hires_scale: its px per full-resolution px.
    """

    folder: Path
    matrix: Path
    software: str
    um_per_px: float
    genes: pd.DataFrame
    feature_gene: np.ndarray
    row: np.ndarray
    column: np.ndarray
    xy_um: np.ndarray
    in_tissue: np.ndarray
    axes: np.ndarray
    segmented: Path | None
    hires: Path | None
    hires_scale: float

    @property
    def n_bins(self) -> int:
        return len(self.row)

    @property
    def version(self) -> int:
        """Layout: 3, or 4 where there are segmented outputs."""
        return 3 if self.segmented is None else 4

    @cached_property
    def umi(self) -> np.ndarray:
        """int64 ``[bin]`` UMIs of gene expression per bin; reads the matrix once."""
        out = np.zeros(self.n_bins, dtype=np.int64)
        for start, counts in self.blocks():
            out[start : start + counts.shape[0]] = np.asarray(counts.sum(axis=1)).ravel()
        return out

    def blocks(self, size: int = BLOCK_BINS) -> Iterator[tuple[int, sp.csr_matrix]]:
        """The matrix in pieces: first bin, and counts ``[bin, gene]`` CSR int64 with one column per row of ``genes``.

        Raises
        ------
        BadInput: a part of the file that cannot be read, or counts that are not whole numbers >= 0.
        """
        import h5py

        with _h5_damage(self.matrix), h5py.File(self.matrix) as file:
            group = file["matrix"]
            indptr = np.asarray(group["indptr"], dtype=np.int64)
            for start in range(0, self.n_bins, size):
                stop = min(start + size, self.n_bins)
                first, last = indptr[start], indptr[stop]
                gene = self.feature_gene[np.asarray(group["indices"][first:last])]
                data = np.asarray(group["data"][first:last])
                if data.size and (data.min() < 0 or (data.dtype.kind == "f" and (data != np.floor(data)).any())):
                    raise BadInput(f"{self.matrix.name} holds values that are not counts: give the raw run folder.")
                bins = np.repeat(np.arange(stop - start), np.diff(indptr[start : stop + 1]))
                known = gene >= 0
                entries = (data[known].astype(np.int64), (bins[known], gene[known]))
                yield start, sp.csr_matrix(entries, shape=(stop - start, len(self.genes)))


def open_space_ranger(folder: str | Path, genome: str = "GRCh38", raw: bool = False) -> SpaceRanger:
    """Open a run's output folder (``outs``) and check that its parts belong together.

    Parameters
    ----------
    folder: ``outs``, or the folder above it, or ``square_002um`` itself.
    genome: what the name of the reference must contain.
    raw: read the raw matrix, with the bins outside the tissue, instead of the filtered one.

    Raises
    ------
    BadInput: a part is missing, truncated, of another run, another genome, or contradicts the scale factors.
    """
    folder = _locate(Path(folder))
    bins = folder / "binned_outputs" / "square_002um" if (folder / "binned_outputs").is_dir() else folder
    wanted = ["raw_feature_bc_matrix.h5"] if raw else ["filtered_feature_bc_matrix.h5", "raw_feature_bc_matrix.h5"]
    matrix = next((bins / name for name in wanted if (bins / name).is_file()), None)
    if matrix is None:
        raise BadInput(f"{bins} lacks {wanted[0]}: copy the whole run folder.")
    scales = _scale_factors(bins / "spatial" / "scalefactors_json.json")
    um_per_px = float(scales["microns_per_pixel"])
    software, genes, feature_gene, row, column = _matrix_header(matrix, genome)
    segmented = folder / "segmented_outputs"
    if segmented.is_dir():
        _same_run(matrix, segmented / "filtered_feature_cell_matrix.h5")
    xy_um, in_tissue = _positions(bins / "spatial" / "tissue_positions.parquet", row, column, um_per_px, matrix.name)
    axes = _grid_axes(row, column, xy_um, um_per_px)
    hires = next(
        (f for f in (bins / "spatial" / "tissue_hires_image.png", folder / "spatial" / "tissue_hires_image.png")
         if f.is_file()), None,
    )  # fmt: skip
    return SpaceRanger(
        folder=folder,
        matrix=matrix,
        software=software,
        um_per_px=um_per_px,
        genes=genes,
        feature_gene=feature_gene,
        row=row,
        column=column,
        xy_um=xy_um,
        in_tissue=in_tissue,
        axes=axes,
        segmented=segmented if segmented.is_dir() else None,
        hires=hires,
        hires_scale=float(scales.get("tissue_hires_scalef", 0.0)),
    )


def check_image(run: SpaceRanger, image: SlideImage) -> dict[str, float]:
    """Whether the picture is the one that the run was given.

    Three tests: the bins in the tissue lie within it; the scale that the file names is that of the run; and where the
    run kept its reduced copy, size and content agree (correlation of grey values in the copy's busiest windows).

    Returns
    -------
    ``bins_inside`` (share) and, where there is a copy, ``copy_correlation``.

    Raises
    ------
    BadInput: a test fails.
    """
    size = np.array([image.width, image.height]) * image.um_per_px
    seen = run.xy_um[run.in_tissue] if run.in_tissue.any() else run.xy_um
    inside = float(((seen >= 0) & (seen <= size)).all(axis=1).mean())
    if inside < 0.98:
        raise BadInput(
            f"{100 * (1 - inside):.0f} % of the bins in the tissue lie outside {image.name} ({image.width} x "
            f"{image.height} px): give the full-resolution image that Space Ranger was run with, uncropped."
        )
    said = image.file_um_per_px
    if said is not None and abs(said / run.um_per_px - 1.0) > 0.05:
        raise BadInput(
            f"{image.name} has {said:.4g} um per pixel, the run's scalefactors_json.json says {run.um_per_px:.4g}: "
            "give the image that Space Ranger was run with, or correct the scale factors."
        )
    figures = {"bins_inside": inside}
    if run.hires is not None and run.hires_scale > 0:
        figures["copy_correlation"] = _compare_with_copy(run, image)
    return figures


def read_outlines(path: Path, um_per_px: float) -> tuple[np.ndarray, np.ndarray]:
    """Outlines of a GeoJSON in px of the full-resolution picture -> names ``[cell]`` and polygons in um ``[cell]``.

    Names are ``cellid_000000001-1`` for the numbers that Space Ranger gives, otherwise the ``id`` or row number.

    Raises
    ------
    BadInput: missing or damaged file, no polygon.
    """
    import geopandas
    import shapely

    if not path.is_file():
        raise BadInput(f"{path} does not exist: give the GeoJSON with the outlines.")
    try:
        table = geopandas.read_file(path)
    except Exception as error:  # pyogrio, fiona and GDAL each have their own
        raise BadInput(f"{path.name} cannot be read as GeoJSON ({type(error).__name__}): copy it again.") from error
    shapes = np.asarray(table.geometry.array)
    good = np.array([s is not None and s.geom_type in ("Polygon", "MultiPolygon") and not s.is_empty for s in shapes])
    if not good.any():
        raise BadInput(f"{path.name} holds no polygon: give outlines of nuclei in px of the full-resolution image.")
    if "cell_id" in table.columns:
        ids = table["cell_id"]
        numeric = pd.to_numeric(ids, errors="coerce")
        names = [f"cellid_{int(n):09d}-1" if np.isfinite(n) else str(t) for n, t in zip(numeric, ids, strict=True)]
    else:
        names = [str(value) for value in (table["id"] if "id" in table.columns else range(len(table)))]
    shapes = shapely.transform(shapes[good], lambda xy: xy * um_per_px)
    return np.array(names, dtype=object)[good], shapes


def assign_bins(
    run: SpaceRanger,
    labels: np.ndarray,
    um_per_px: float,
    origin_um: tuple[float, float],
    shift_um: tuple[float, float] = (0.0, 0.0),
    contested: np.ndarray | None = None,
) -> np.ndarray:
    """Nucleus of every bin, int32 ``[bin]``: its label, 0 for none, ``AMBIGUOUS`` where a second nucleus is touched.

    Parameters
    ----------
    labels: int ``[H, W]`` label image (an array or a memory map), 0 is background.
    um_per_px, origin_um: its scale, and the (x, y) of its corner in um of the picture.
    shift_um: (x, y) added to the bins' places, to correct the registration.
    contested: bool ``[H, W]``, true where outlines of two nuclei overlap.
    """
    out = np.zeros(run.n_bins, dtype=np.int32)
    fractions = (np.arange(SAMPLES) + 0.5) / SAMPLES - 0.5
    offsets = [(0.0, 0.0), *((float(u), float(v)) for v in fractions for u in fractions)]
    corner = np.array(origin_um) - np.array(shift_um)
    for start in range(0, run.n_bins, BLOCK_BINS):
        xy = run.xy_um[start : start + BLOCK_BINS].astype(np.float64) - corner
        owner, other = np.zeros(len(xy), dtype=np.int32), np.zeros(len(xy), dtype=bool)
        for k, (u, v) in enumerate(offsets):
            at = np.floor((xy + u * run.axes[0] + v * run.axes[1]) / um_per_px).astype(np.int64)
            inside = ((at >= 0) & (at < np.array(labels.shape)[::-1])).all(axis=1)
            place = (at[inside, 1], at[inside, 0])
            seen = np.zeros(len(xy), dtype=np.int32)
            seen[inside] = labels[place]
            if k == 0:
                owner = seen
            else:
                other |= (seen != 0) & (seen != owner)
            if contested is not None:
                other[inside] |= contested[place]
        out[start : start + len(xy)] = np.where(owner == 0, 0, np.where(other, AMBIGUOUS, owner))
    return out


def sum_counts(
    run: SpaceRanger, owner: np.ndarray, n_labels: int, on_bins: Callable[[int], object] = lambda n: None
) -> tuple[sp.csr_matrix, np.ndarray]:
    """Sum the counts of the bins of each label.

    Parameters
    ----------
    owner: int ``[bin]`` label 1 to ``n_labels``; every other bin is left out.
    on_bins: told the number of bins of each finished block.

    Returns
    -------
    Counts ``[label, gene]`` CSR float32 (row ``i`` is label ``i + 1``), and int64 ``[bin]`` UMIs of every bin.
    """
    umi = np.zeros(run.n_bins, dtype=np.int64)
    parts: list[sp.coo_matrix] = []
    for start, counts in run.blocks():
        n = counts.shape[0]
        umi[start : start + n] = np.asarray(counts.sum(axis=1)).ravel()
        mine = owner[start : start + n]
        bins = np.flatnonzero(mine > 0)
        if len(bins):
            cells, at = np.unique(mine[bins], return_inverse=True)
            to_cell = sp.csr_matrix((np.ones(len(bins), np.int64), (at, bins)), shape=(len(cells), n))
            part = (to_cell @ counts).tocoo()
            values = part.data.astype(np.float32)
            parts.append(sp.coo_matrix((values, (cells[part.row] - 1, part.col)), shape=(n_labels, len(run.genes))))
        on_bins(n)
    rows, columns, values = (
        np.concatenate([getattr(p, name) for p in parts]) if parts else np.zeros(0, dtype)
        for name, dtype in (("row", np.int32), ("col", np.int32), ("data", np.float32))
    )
    return sp.csr_matrix((values, (rows, columns)), shape=(n_labels, len(run.genes))), umi


def _locate(folder: Path) -> Path:
    """The folder that holds ``binned_outputs``, or ``square_002um`` itself."""
    if not folder.is_dir():
        raise BadInput(f"{folder} is not a folder: give the `outs` folder of a Space Ranger run.")
    for place in (folder, folder / "outs"):
        if (place / "binned_outputs" / "square_002um").is_dir():
            return place
    if folder.name == "binned_outputs":
        return folder.parent
    if folder.name == "square_002um" and (folder / "spatial").is_dir():
        return folder.parent.parent if folder.parent.name == "binned_outputs" else folder
    if any(folder.rglob("*binned_outputs.tar.gz")):
        raise BadInput(f"{folder} holds packed outputs: unpack *binned_outputs.tar.gz first.")
    raise BadInput(f"{folder} has no binned_outputs/square_002um: give the `outs` folder of a Visium HD run.")


def _scale_factors(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BadInput(f"{path} is missing: copy the whole run folder.")
    try:
        scales = json.loads(path.read_text(encoding="utf-8"))
        um_per_px, bin_um = float(scales["microns_per_pixel"]), float(scales["bin_size_um"])
        diameter = float(scales["spot_diameter_fullres"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path.name} lacks or garbles a scale factor ({error}): copy it again from the run.") from None
    if bin_um != BIN_UM:
        raise BadInput(f"{path.name} is of {bin_um:g}-um bins: give the folder square_002um.")
    if not 0.05 <= um_per_px <= 5.0 or abs(diameter * um_per_px / BIN_UM - 1.0) > PITCH_TOLERANCE:
        raise BadInput(
            f"{path.name} contradicts itself: {diameter:g} px of {um_per_px:g} um are not the {BIN_UM:g} um of a bin; "
            "copy it again from the run."
        )
    return scales


@contextmanager
def _h5_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, KeyError, RuntimeError, AttributeError) as error:
        reason = str(error).strip("'\"").split("(")[0].strip()
        raise BadInput(f"{path.name} is truncated or damaged ({reason}): copy it again from the run.") from error


def _matrix_header(path: Path, genome: str) -> tuple[str, pd.DataFrame, np.ndarray, np.ndarray, np.ndarray]:
    """Software, genes, gene of each feature, and grid row and column of each bin."""
    import h5py

    with _h5_damage(path), h5py.File(path) as file:
        group = file["matrix"]
        n_features, n_bins = (int(n) for n in group["shape"][:2])
        features = {name: np.asarray(group["features"][name]).astype(str) for name in ("id", "name", "feature_type")}
        genomes = sorted({*np.asarray(group["features"]["genome"]).astype(str)} - {""})
        names = np.asarray(group["barcodes"])
        software = file.attrs.get("software_version", "")
        lengths = (group["indptr"].shape[0], group["indices"].shape[0], group["data"].shape[0])
        last = int(group["indptr"][-1]) if lengths[0] else -1
    if len(features["id"]) != n_features or len(names) != n_bins or lengths != (n_bins + 1, last, last):
        raise BadInput(f"{path.name} is truncated: its parts differ in length; copy it again from the run.")
    if len(genomes) > 1 or not all(genome.lower() in g.lower() for g in genomes):
        raise BadInput(
            f"{path.name} was made with the genome {' + '.join(genomes)}, expected {genome}: choose a slide of that "
            "species, or say --genome."
        )
    expression = features["feature_type"] == GENE_EXPRESSION
    if not expression.any():
        raise BadInput(f"{path.name} holds no feature of type {GENE_EXPRESSION!r}: give a gene expression run.")
    # Some symbols stand for two Ensembl genes; their counts are summed.
    symbols, at = np.unique(features["name"][expression], return_inverse=True)
    first = np.full(len(symbols), n_features)
    np.minimum.at(first, at, np.flatnonzero(expression))
    order = np.argsort(first)  # as in the file
    feature_gene = np.full(n_features, -1, dtype=np.int32)
    feature_gene[expression] = np.argsort(order)[at]
    genes = pd.DataFrame({"gene_id": features["id"][first[order]]}, index=pd.Index(symbols[order]))
    row, column = _bin_places(names, path.name)
    return software.decode() if isinstance(software, bytes) else str(software), genes, feature_gene, row, column


def _bin_places(names: np.ndarray, file: str) -> tuple[np.ndarray, np.ndarray]:
    """Grid row and column from ``s_002um_00012_00345-1``, vectorised over the bytes."""
    names = names.astype("S")
    if not len(names) or not BIN_NAME.fullmatch(names[0]):
        first = names[0].decode(errors="replace") if len(names) else ""
        raise BadInput(
            f"{file} has barcodes like {first!r}, not s_002um_00000_00000-1: give the 2-um Visium HD matrix."
        )
    letters = np.ascontiguousarray(names).view(np.uint8).reshape(len(names), -1)
    if (letters[:, :8] != letters[0, :8]).any() or (letters[:, 13] != ord("_")).any():
        raise BadInput(f"{file} mixes barcodes of several kinds: give the matrix of one run.")
    digits = letters.astype(np.int32) - ord("0")
    power = 10 ** np.arange(4, -1, -1)
    return (digits[:, 8:13] @ power).astype(np.int32), (digits[:, 14:19] @ power).astype(np.int32)


def _same_run(matrix: Path, cells: Path) -> None:
    """Refuse a cell matrix of other software or another reference than the bins'."""
    import h5py

    if not cells.is_file():
        return

    def facts(path: Path) -> tuple[str, int, bytes]:
        with _h5_damage(path), h5py.File(path) as file:
            ids = np.asarray(file["matrix/features/id"])
            software = file.attrs.get("software_version", "")
            return software.decode() if isinstance(software, bytes) else str(software), len(ids), ids.tobytes()

    bins, segmented = facts(matrix), facts(cells)
    if bins != segmented:
        raise BadInput(
            f"{matrix.name} ({bins[0] or 'unknown software'}, {bins[1]} features) and {cells.name} "
            f"({segmented[0] or 'unknown software'}, {segmented[1]} features) are of different runs: use one run's "
            "folder as Space Ranger wrote it."
        )


def _positions(
    path: Path, row: np.ndarray, column: np.ndarray, um_per_px: float, matrix: str
) -> tuple[np.ndarray, np.ndarray]:
    """Centre in um and tissue flag of each bin of the matrix."""
    import pyarrow.parquet

    if not path.is_file():
        raise BadInput(f"{path} is missing: copy the whole run folder.")
    try:
        table = pyarrow.parquet.read_table(path, columns=list(POSITION_COLUMNS))
        missing = [name for name in POSITION_COLUMNS if name not in table.column_names]
        if missing:
            raise BadInput(f"{path.name} lacks the column {missing[0]!r}: copy it again from the run.")
        values = {name: table[name].to_numpy() for name in POSITION_COLUMNS}
    except (OSError, ValueError, KeyError) as error:  # pyarrow's ArrowInvalid is a ValueError
        if isinstance(error, BadInput):
            raise
        reason = str(error).splitlines()[0].rstrip(".")
        raise BadInput(f"{path.name} is truncated or damaged ({reason}): copy it again from the run.") from error
    rows, columns = values["array_row"].astype(np.int64), values["array_col"].astype(np.int64)
    width = int(max(columns.max(initial=0), column.max(initial=0))) + 1
    height = int(max(rows.max(initial=0), row.max(initial=0))) + 1
    where = np.full(height * width, -1, dtype=np.int32)
    where[rows * width + columns] = np.arange(len(rows), dtype=np.int32)
    at = where[row.astype(np.int64) * width + column]
    if (at < 0).any():
        i = int(np.flatnonzero(at < 0)[0])
        raise BadInput(
            f"{path.name} has no place for {(at < 0).sum():,} bins of {matrix} (first s_002um_{row[i]:05d}_"
            f"{column[i]:05d}): the two files are of different runs or one is cut, copy both again."
        )
    px = np.stack([values["pxl_col_in_fullres"][at], values["pxl_row_in_fullres"][at]], axis=1)
    return (px * um_per_px).astype(np.float32), values["in_tissue"][at].astype(bool)


def _grid_axes(row: np.ndarray, column: np.ndarray, xy_um: np.ndarray, um_per_px: float) -> np.ndarray:
    """Least-squares steps of the capture grid in um, checked against 2 um."""
    if len(row) < 16:
        raise BadInput(f"The matrix holds {len(row)} bins: give a whole run.")
    some = np.linspace(0, len(row) - 1, min(len(row), 100_000)).astype(np.int64)
    design = np.stack([column[some], row[some], np.ones(len(some))], axis=1).astype(np.float64)
    fit, _, rank, _ = np.linalg.lstsq(design, xy_um[some].astype(np.float64), rcond=None)
    pitch = np.linalg.norm(fit[:2], axis=1)
    if rank < 3 or (np.abs(pitch / BIN_UM - 1.0) > PITCH_TOLERANCE).any():
        raise BadInput(
            f"By microns_per_pixel = {um_per_px:g} the bins lie {pitch.mean():.3g} um apart, they are {BIN_UM:g} um: "
            "scalefactors_json.json and tissue_positions.parquet are not of the same run, copy both again."
        )
    off = np.linalg.norm(design @ fit - xy_um[some], axis=1)
    if np.sqrt((off**2).mean()) > 20.0:
        raise BadInput("tissue_positions.parquet does not describe a regular grid: copy it again from the run.")
    return fit[:2]


def _compare_with_copy(run: SpaceRanger, image: SlideImage, windows: int = 6, side: int = 48) -> float:
    """Correlation of grey values between picture and the run's copy, over the copy's busiest windows."""
    assert run.hires is not None
    with SlideImage(run.hires, um_per_px=min(5.0, run.um_per_px / run.hires_scale)) as copy:
        size = np.array([image.height, image.width]) * run.hires_scale
        if (np.abs(size - [copy.height, copy.width]) > np.maximum(2.0, 0.01 * size)).any():
            raise BadInput(
                f"{image.name} has {image.width} x {image.height} px, the run's image had by its copy "
                f"{run.hires.name} {copy.width / run.hires_scale:.0f} x {copy.height / run.hires_scale:.0f}: "
                "give the image that Space Ranger was run with."
            )
        side = min(side, copy.height, copy.width)
        grey = copy.window((0, copy.height), (0, copy.width)).mean(axis=2)
    tops, lefts = (range(0, n - side + 1, side) for n in grey.shape)
    spread = {(t, c): grey[t : t + side, c : c + side].std() for t in tops for c in lefts}
    busiest = sorted(spread, key=lambda k: -spread[k])[:windows]
    scale = image.um_per_px / run.hires_scale
    theirs = [grey[t : t + side, c : c + side] for t, c in busiest]
    ours = [image.at_scale((t, t + side), (c, c + side), scale).mean(axis=2) for t, c in busiest]
    a, b = (np.concatenate([w.ravel() for w in ws]) for ws in (theirs, ours))
    correlation = float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else 0.0
    if correlation < IMAGE_MATCH:
        raise BadInput(
            f"{image.name} does not show what the run's {run.hires.name} shows (correlation {correlation:.2f}): it is "
            "another slide, or turned or mirrored; give the image that Space Ranger was run with."
        )
    return correlation
