"""Cells from users' ``.h5ad`` files and from stores; the only file that reads AnnData.

A file of up to ``MAX_BYTES`` is never loaded whole: its values are looked over once, block by block, and then only
the rows asked for are read. What was recognised is said in a :class:`Preview`; what cannot be used is refused with
one sentence that names cause and cure.

Which matrix is used: ``X`` if it holds raw counts, otherwise the first raw counts among ``layers`` and ``raw.X``,
otherwise non-negative values of ``X``, ``raw.X`` or a layer, with a warning. The encoder sees only the order of a
cell's values, so normalised values embed as counts do; log-normalised ones are turned back by exp(x) - 1, because an
edit multiplies expression and not its logarithm. Scaled values have no such way back and are never used.

A store that ``prepare`` or ``simulate`` wrote is read in the same way (:func:`open_store`), in place and of any size:
its cells come with positions in um, and with their pictures (:class:`StoreSource`).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import scipy.sparse as sp

from ge2hist_core.files import atomic_path, sha256_file
from ge2hist_core.types import BadInput, Cells

__all__ = [
    "MAX_BYTES",
    "H5adSource",
    "Preview",
    "StoreSource",
    "annotate_h5ad",
    "open_cells",
    "open_h5ad",
    "open_store",
    "write_cells",
]

MAX_BYTES = 2**30
MIN_KNOWN = 0.1
"""Least share of known genes, of the file's or the encoder's genes, whichever are fewer."""
LOG_MAX = 20.0
"""Non-integers below this are taken for logarithms: exp(20) counts exist in no cell."""
BLOCK = 4_000_000

COUNT_LAYERS = ("counts", "raw_counts", "count", "raw", "umi")
GENE_COLUMNS = ("feature_name", "gene_symbols", "gene_symbol", "gene_name", "gene_names", "symbol", "index")
TYPE_COLUMNS = (
    *("cell_type", "celltype", "cell_types", "cell_type_name", "cell_label", "annotation", "bulk_labels", "cluster"),
    *("clusters", "leiden", "louvain"),
)
DONOR_COLUMNS = ("donor", "donor_id", "patient", "patient_id", "individual", "sample", "sample_id", "orig.ident")
POSITION_COLUMNS = {
    ("x_um", "y_um"): "um",
    ("x_centroid", "y_centroid"): "um",
    ("center_x", "center_y"): "um",
    ("x_location", "y_location"): "unknown",
    ("x_pixel", "y_pixel"): "px",
    ("x", "y"): "unknown",
}
"""Position columns and their unit: Xenium and MERSCOPE write um."""
ENSEMBL = re.compile(r"ENS[A-Z]*G\d{6,}(\.\d+)?")
HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
NOTE = "ge2hist"


@dataclass(frozen=True)
class Preview:
    """What was recognised in a file.

    Parameters
    ----------
    matrix: ``X``, ``layers['counts']`` or ``raw.X``.
    scale: ``counts``, ``log-normalised`` or ``normalised``.
    gene_column: column of ``var``, or ``index`` for its names.
    n_known: genes that the encoder knows, None if it was not asked.
    type_column, donor_column, position, umap: where each was found, None if nowhere.
    position_unit: ``um``, ``px`` or ``unknown``.
    n_empty: cells without any count.
    warnings: one sentence each.
    """

    n_cells: int
    n_genes: int
    matrix: str
    scale: str
    gene_column: str
    n_known: int | None
    type_column: str | None
    donor_column: str | None
    position: str | None
    position_unit: str | None
    umap: str | None
    n_empty: int
    median_total: float
    warnings: tuple[str, ...]


def open_h5ad(
    path: str | Path,
    vocab: Collection[str] | None = None,
    *,
    matrix: str | None = None,
    gene_column: str | None = None,
    type_column: str | None = None,
    donor_column: str | None = None,
) -> H5adSource:
    """Open a file, look it over once and say what is in it.

    Parameters
    ----------
    vocab: genes that the encoder knows; decides which column holds the gene symbols.
    matrix: ``X``, ``raw.X`` or a layer's name, instead of the choice made here.
    gene_column: column of ``var`` or ``index``, instead of the best match.
    type_column, donor_column: columns of ``obs``, instead of those recognised by name.

    Raises
    ------
    BadInput: anything that keeps the file from being used.
    """
    path = Path(path)
    parts = _read_parts(path)
    try:
        return H5adSource(path, parts, vocab, matrix, gene_column, type_column, donor_column)
    except BaseException:
        parts.close()
        raise


def open_store(
    path: str | Path,
    vocab: Collection[str] | None = None,
    *,
    matrix: str | None = None,
    gene_column: str | None = None,
    type_column: str | None = None,
    donor_column: str | None = None,
) -> StoreSource:
    """Open a store's cells, look them over once and say what is in them; parameters as for :func:`open_h5ad`.

    Raises
    ------
    BadInput: the folder is no store of this project, or a part of it is damaged.
    """
    path = Path(path)
    um_per_px, parts = _read_store_parts(path)
    return StoreSource(path, parts, vocab, matrix, gene_column, type_column, donor_column, um_per_px=um_per_px)


def open_cells(path: str | Path, vocab: Collection[str] | None = None, **choices: str | None) -> H5adSource:
    """Open what ``path`` is: a store where it is a folder, an ``.h5ad`` file otherwise.

    Raises
    ------
    BadInput: as :func:`open_store` and :func:`open_h5ad`.
    """
    return (open_store if Path(path).is_dir() else open_h5ad)(path, vocab, **choices)


class H5adSource:
    """Cells of one open file; made by :func:`open_h5ad`.

    Attributes
    ----------
    preview: what was recognised.
    obs: everything the file says per cell.
    genes: ``[gene]`` symbols. known: bool ``[gene]``, None without a vocabulary.
    cell_id: ``[cell]`` unique. cell_type, donor: ``[cell]`` or None.
    totals: float64 ``[cell]`` sum of each cell's values as stored. empty: bool ``[cell]`` no value above 0.
    xy: float64 ``[cell, 2]`` positions in ``preview.position_unit``, or None. umap: ``[cell, 2]`` or None.
    """

    def __init__(
        self,
        path: Path,
        parts: _Parts,
        vocab: Collection[str] | None,
        matrix: str | None,
        gene_column: str | None,
        type_column: str | None,
        donor_column: str | None,
    ) -> None:
        self.path = path
        self._parts = parts
        name = path.name
        self.obs = parts.obs
        n = len(self.obs)
        if n == 0 or all(m.shape[1] == 0 for m in parts.matrices.values()):
            raise BadInput(f"{name} holds {n} cells and no values to read: give a file with cells and genes.")
        said: list[str] = []

        chosen, facts, scale = _choose_matrix(name, parts, matrix, said)
        self._matrix = chosen
        self._scale = scale
        self.totals = facts.totals
        self.empty = facts.totals == 0
        if self.empty.all():
            raise BadInput(f"{chosen.name} of {name} holds only zeros: give the raw counts.")
        if self.empty.any():
            first = self.obs.index[int(np.flatnonzero(self.empty)[0])]
            said.append(f"{self.empty.sum()} cells have no counts (first {first!r}) and cannot be chosen.")

        var = parts.raw_var if chosen.name == "raw.X" else parts.var
        column, self.genes, self.known = _gene_column(name, var, vocab, gene_column)
        twice = pd.Index(self.genes).duplicated()
        if twice.any():
            said.append(
                f"{twice.sum()} gene columns repeat a name (first {self.genes[twice][0]!r}) and are read as separate "
                "measurements: sum them before upload if they are one gene."
            )
        self.cell_id = self.obs.index.astype(str).to_numpy().astype(object)
        if not self.obs.index.is_unique:
            from anndata.utils import make_index_unique

            self.cell_id = make_index_unique(pd.Index(self.cell_id)).to_numpy().astype(object)
            said.append("Cell names repeat and were numbered: make obs_names unique to find cells by their own name.")

        type_column = _obs_column(name, self.obs, type_column, TYPE_COLUMNS, "cell type")
        donor_column = _obs_column(name, self.obs, donor_column, DONOR_COLUMNS, "donor")
        self.cell_type = None if type_column is None else _text(self.obs[type_column])
        self.donor = None if donor_column is None else _text(self.obs[donor_column])
        position, unit, self.xy = _positions(parts)
        umap, self.umap = _plane(parts, ("X_umap", "umap", "UMAP", "X_UMAP"))
        self.preview = Preview(
            n_cells=n,
            n_genes=len(self.genes),
            matrix=chosen.name,
            scale=scale,
            gene_column=column,
            n_known=None if self.known is None else int(self.known.sum()),
            type_column=type_column,
            donor_column=donor_column,
            position=position,
            position_unit=unit,
            umap=umap,
            n_empty=int(self.empty.sum()),
            median_total=float(np.median(facts.totals)),
            warnings=tuple(said),
        )

    def __len__(self) -> int:
        return len(self.obs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file. Rows can no longer be taken."""
        self._parts.close()

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file's bytes."""
        return sha256_file(self.path)

    def index_of(self, cell_id: str) -> int:
        """Row of a cell.

        Raises
        ------
        BadInput: the file has no such cell.
        """
        row = self._row_of.get(cell_id)
        if row is None:
            raise BadInput(f"{self.path.name} has no cell {cell_id!r}: its cells are named like {self.cell_id[0]!r}.")
        return row

    def take(self, rows: Sequence[int] | np.ndarray, *, allow_empty: bool = False) -> Cells:
        """The chosen cells, in the given order, with linear-scale values. ``xy_um`` is given where the unit is um.

        Parameters
        ----------
        rows: row numbers, each at most once.
        allow_empty: whether cells without counts may be among them.

        Raises
        ------
        BadInput: a cell without counts; a damaged block.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if not allow_empty and self.empty[rows].any():
            cell = self.cell_id[rows[self.empty[rows]][0]]
            raise BadInput(f"Cell {cell!r} has no counts: choose another cell.")
        with _damage(self.path.name):
            values = self._matrix.rows(rows)
        if self._scale == "log-normalised":
            values.data = np.expm1(values.data.astype(np.float64) * self._parts.log_base)
        in_um = self.xy is not None and self.preview.position_unit == "um"
        return Cells(
            counts=values,
            genes=self.genes,
            cell_id=self.cell_id[rows],
            cell_type=None if self.cell_type is None else self.cell_type[rows],
            donor=None if self.donor is None else self.donor[rows],
            xy_um=self.xy[rows] if in_um and self.xy is not None else None,
            source=self.path.name,
        )

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {str(cell): row for row, cell in enumerate(self.cell_id)}


class StoreSource(H5adSource):
    """Cells of a store, read in place; made by :func:`open_store`. Each donor has a section with a picture.

    Attributes
    ----------
    um_per_px: of the pictures. All others are those of :class:`H5adSource`; ``xy`` is in um from the top left corner
        of the cell's own section.
    """

    def __init__(self, *args: Any, um_per_px: float) -> None:
        super().__init__(*args)
        self.um_per_px = um_per_px

    @cached_property
    def sha256(self) -> str:
        """``TissueStore.identity``, computed block by block."""
        from ge2hist_core.store import SCHEMA, TABLE

        parts = self._parts
        stored = parts.matrices["X"]
        with _damage(self.path.name):
            header = [SCHEMA, self.um_per_px, [str(g) for g in parts.var.index], [str(c) for c in parts.obs.index]]
            digest = hashlib.sha256(json.dumps(header).encode())
            if (xy := parts.planes.get("spatial")) is None:
                raise BadInput(f"Table {TABLE!r} of {self.path.name} gives no positions: write the store again.")
            n = stored.shape[0]
            lengths = [np.diff(block.indptr) for block in stored.blocks()]
            indptr = np.concatenate([[0], np.cumsum(np.concatenate(lengths or [np.zeros(n)]))])
            digest.update(np.ascontiguousarray(xy, dtype=np.float64).tobytes())
            digest.update(indptr.astype(np.float64).tobytes())
            for part in ("indices", "data"):
                for block in stored.blocks():
                    digest.update(getattr(block, part).astype(np.float64).tobytes())
        return digest.hexdigest()


def write_cells(
    cells: Cells,
    path: str | Path,
    obs: pd.DataFrame | None = None,
    var: pd.DataFrame | None = None,
    umap: np.ndarray | None = None,
) -> None:
    """Write cells as an h5ad that :func:`open_h5ad` reads back; same cells, same bytes.

    Parameters
    ----------
    obs: further columns per cell (known truth), in the cells' order.
    var: further columns per gene (role, programme), in the genes' order.
    umap: ``[cell, 2]`` coordinates of a map of the cells.
    """
    from anndata import AnnData

    frame = pd.DataFrame(index=pd.Index(cells.cell_id.astype(str)))
    for column, value in (("cell_type", cells.cell_type), ("donor", cells.donor)):
        if value is not None:
            frame[column] = pd.Categorical(value)
    if obs is not None:
        frame = frame.join(obs.set_axis(frame.index).drop(columns=frame.columns, errors="ignore"))
    symbols = pd.Index(cells.genes.astype(str))
    genes = pd.DataFrame(index=symbols) if var is None else var.set_axis(symbols)
    table = AnnData(cells.counts, obs=frame, var=genes)
    table.uns[NOTE] = {"source": cells.source, "position_unit": "um"}
    if cells.xy_um is not None:
        table.obsm["spatial"] = cells.xy_um
    if umap is not None:
        table.obsm["X_umap"] = umap
    with atomic_path(path) as temporary:
        table.write_h5ad(temporary, compression="gzip")


def annotate_h5ad(
    source: Path,
    path: Path,
    *,
    obs: Mapping[str, np.ndarray] | None = None,
    obsm: Mapping[str, np.ndarray] | None = None,
    uns: Mapping[str, Any] | None = None,
) -> None:
    """A copy of an h5ad with further entries; those of the same name are replaced. The matrix is never in memory.

    Raises
    ------
    BadInput: a file of a format before anndata 0.8, which keeps these parts otherwise.
    """
    import h5py
    from anndata.io import write_elem

    with atomic_path(path) as temporary:
        shutil.copyfile(source, temporary)
        with h5py.File(temporary, "r+") as file:
            for part, values in (("obs", obs or {}), ("obsm", obsm or {}), ("uns", uns or {})):
                if part not in file:
                    write_elem(file, part, {})
                if not isinstance(file[part], h5py.Group):
                    raise BadInput(f"{source} is of an old format: read and write it with anndata, then use that.")
                for name, value in values.items():
                    write_elem(file, f"{part}/{name}", value)
            columns = file["obs"].attrs["column-order"].tolist()
            file["obs"].attrs["column-order"] = list(dict.fromkeys([*columns, *(obs or {})]))


# What a file holds, before anything is chosen


@dataclass(eq=False)
class _Matrix:
    """A matrix on disk (or in memory, for files older than the current format), read in blocks.

    ``data``, ``indices`` and ``indptr`` are h5py datasets or arrays; the latter two are None for a dense matrix.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    data: Any
    indices: Any = None
    indptr: Any = None

    def facts(self) -> _Facts:
        """Look over all values once."""
        n, g = self.shape
        out = _Facts(np.zeros(n))
        if self.kind == "dense":
            step = max(1, BLOCK // max(g, 1))
            for lo in range(0, n, step):
                block = np.asarray(self.data[lo : lo + step])
                out.see(block.ravel())
                out.totals[lo : lo + step] = block.sum(axis=1, dtype=np.float64)
            return out
        for lo, hi in self._spans():
            values = np.asarray(self.data[lo:hi])
            out.see(values)
            if self.kind == "csr":
                first = int(np.searchsorted(self.indptr, lo, side="right")) - 1
                last = int(np.searchsorted(self.indptr, hi, side="left"))
                bounds = np.clip(self.indptr[first : last + 1], lo, hi) - lo
                running = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
                out.totals[first:last] += np.diff(running[bounds])
            else:
                out.totals += np.bincount(self._checked(self.indices[lo:hi]), weights=values, minlength=n)
        return out

    def rows(self, rows: np.ndarray) -> sp.csr_matrix:
        """Rows in the given order, ``[row, gene]`` float32."""
        if self.kind == "csc":
            return self._rows_of_csc(rows)
        wanted, order = np.unique(rows, return_inverse=True)
        breaks = np.flatnonzero(np.diff(wanted) > 1) + 1
        runs = [(int(run[0]), int(run[-1]) + 1) for run in np.split(wanted, breaks) if len(run)]
        blocks = [self._run(lo, hi) for lo, hi in runs]
        if not blocks:
            return sp.csr_matrix((0, self.shape[1]), dtype=np.float32)
        return sp.vstack(blocks, format="csr")[order]

    def blocks(self) -> Iterator[sp.csr_matrix]:
        """All rows of a CSR matrix in order, some ``BLOCK`` values at a time, as :class:`Cells` holds them."""
        lo = 0
        while lo < self.shape[0]:
            hi = int(np.searchsorted(self.indptr, self.indptr[lo] + BLOCK, side="right")) - 1
            hi = min(max(hi, lo + 1), self.shape[0])
            block = self._run(lo, hi)
            block.sum_duplicates()
            block.eliminate_zeros()
            yield block
            lo = hi

    def _run(self, lo: int, hi: int) -> sp.csr_matrix:
        if self.kind == "dense":
            return sp.csr_matrix(np.asarray(self.data[lo:hi], dtype=np.float32))
        start, stop = int(self.indptr[lo]), int(self.indptr[hi])
        parts = (
            np.asarray(self.data[start:stop], dtype=np.float32),
            self._checked(self.indices[start:stop]),
            self.indptr[lo : hi + 1] - start,
        )
        return sp.csr_matrix(parts, shape=(hi - lo, self.shape[1]))

    def _rows_of_csc(self, rows: np.ndarray) -> sp.csr_matrix:
        place = np.full(self.shape[0], -1, dtype=np.int64)
        place[rows] = np.arange(len(rows))
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for lo, hi in self._spans():
            target = place[self._checked(self.indices[lo:hi])]
            hit = np.flatnonzero(target >= 0)
            if len(hit):
                column = np.searchsorted(self.indptr, hit + lo, side="right") - 1
                found.append((np.asarray(self.data[lo:hi], dtype=np.float32)[hit], target[hit], column))
        shape = (len(rows), self.shape[1])
        if not found:
            return sp.csr_matrix(shape, dtype=np.float32)
        values, target, column = (np.concatenate(part) for part in zip(*found, strict=True))
        return sp.csr_matrix((values, (target, column)), shape=shape)

    def _spans(self) -> Iterator[tuple[int, int]]:
        total = self.data.shape[0]
        return ((lo, min(lo + BLOCK, total)) for lo in range(0, total, BLOCK))

    def _checked(self, indices: Any) -> np.ndarray:
        """Indices inside the matrix; scipy would follow others into foreign memory."""
        array = np.asarray(indices)
        limit = self.shape[1 if self.kind == "csr" else 0]
        if len(array) and (array.min() < 0 or array.max() >= limit):
            raise IndexError(f"index beyond {limit}")
        return array


@dataclass(eq=False)
class _Facts:
    totals: np.ndarray
    minimum: float = 0.0
    maximum: float = 0.0
    integer: bool = True
    finite: bool = True

    def see(self, values: np.ndarray) -> None:
        if not len(values):
            return
        if values.dtype.kind == "f":
            self.finite = self.finite and bool(np.isfinite(values).all())
            self.integer = self.integer and self.finite and bool((values == np.floor(values)).all())
        self.minimum = min(self.minimum, float(values.min()))
        self.maximum = max(self.maximum, float(values.max()))

    @property
    def scale(self) -> str:
        if not self.finite:
            return "not finite"
        if self.minimum < 0:
            return "scaled"
        if self.integer:
            return "counts"
        return "log-normalised" if self.maximum < LOG_MAX else "normalised"

    @property
    def fault(self) -> str:
        if not self.finite:
            return "holds NaN or infinite values"
        return f"holds negative values (minimum {self.minimum:.3g}), as scaled data do"


@dataclass(eq=False)
class _Parts:
    obs: pd.DataFrame
    var: pd.DataFrame
    raw_var: pd.DataFrame
    matrices: dict[str, _Matrix]
    planes: dict[str, np.ndarray]
    log_base: float
    note: dict[str, str]
    file: Any = None

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """Turn what h5py and anndata raise inside a damaged file into one sentence."""
    try:
        yield
    except (BadInput, MemoryError):
        raise
    except Exception as error:  # a dozen classes, depending on which byte is wrong
        raise BadInput(
            f"{name} is damaged ({type(error).__name__} while reading): write or upload it again."
        ) from error


def _read_parts(path: Path) -> _Parts:
    import h5py

    if not path.is_file():
        raise BadInput(f"{path} is not a file: give the path of an .h5ad file.")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise BadInput(
            f"{path.name} has {size / 2**30:.1f} GB, the limit is {MAX_BYTES / 2**30:.0f} GB: "
            "keep only the cells of interest, adata[cells].write_h5ad(...)."
        )
    with path.open("rb") as handle:
        magic = handle.read(len(HDF5_MAGIC))
    if magic != HDF5_MAGIC:
        raise BadInput(f"{path.name} is not an .h5ad file: save your AnnData object with adata.write_h5ad(...).")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise BadInput(f"{path.name} is cut off or damaged: copy or upload the whole file again.") from error
    try:
        with _damage(path.name):
            if not ({"obs", "var"} <= set(file)) or not ({"X", "layers"} & set(file)):
                raise BadInput(
                    f"{path.name} is an HDF5 file without the parts X, obs and var of an .h5ad: "
                    "read it with scanpy and save it with adata.write_h5ad(...)."
                )
            _refuse_links(path.name, file)
            parts = _parts_in_memory(path) if isinstance(file["obs"], h5py.Dataset) else _parts_on_disk(file)
            for matrix in parts.matrices.values():
                if matrix.shape[0] != len(parts.obs):
                    raise BadInput(
                        f"{path.name}: {matrix.name} has {matrix.shape[0]} rows and obs {len(parts.obs)}: "
                        "write the file again."
                    )
    except BaseException:
        file.close()
        raise
    parts.file = file
    return parts


def _read_store_parts(path: Path) -> tuple[float, _Parts]:
    """um per px of a store's pictures, and its table."""
    import zarr
    from anndata.io import read_elem

    from ge2hist_core.store import ATTRS, SCHEMA, TABLE

    if not path.is_dir():
        raise BadInput(f"{path} is not a folder: give the store that `simulate` or `prepare` wrote.")
    try:
        root = zarr.open_group(path, mode="r")
        header = dict(root.attrs).get(ATTRS)
    except Exception as error:  # zarr raises a dozen classes for what is missing or damaged
        raise BadInput(f"{path.name} is not a zarr store: give one that `simulate` or `prepare` wrote.") from error
    if not isinstance(header, dict) or f"tables/{TABLE}" not in root:
        raise BadInput(f"{path.name} is not a GE2Hist store (no table {TABLE!r}): make one of it with `prepare`.")
    if header.get("schema") != SCHEMA:
        raise BadInput(
            f"{path.name} has store schema {header.get('schema')!r}, this version reads {SCHEMA}: write it again."
        )
    with _damage(path.name):
        table: Any = root[f"tables/{TABLE}"]
        node = table["X"]
        kind = str(node.attrs.get("encoding-type", "")).removesuffix("_matrix")
        if kind != "csr":
            raise BadInput(f"X of {path.name} is stored as {kind or 'an unknown kind'!r}: write the store again.")
        shape = tuple(int(size) for size in node.attrs["shape"])
        x = _sparse("X", kind, shape, node["data"], node["indices"], node["indptr"][:])
        obs, var = read_elem(table["obs"]), read_elem(table["var"])
        planes = {"spatial": np.asarray(table["obsm/spatial"][:, :2])}
        if x.shape != (len(obs), len(var)) or len(planes["spatial"]) != len(obs):
            raise ValueError("X, obs, var and positions do not fit")
        return float(header["um_per_px"]), _Parts(obs, var, var, {"X": x}, planes, 1.0, {"position_unit": "um"})


def _refuse_links(name: str, file: Any) -> None:
    """An uploaded file must not make the server read another one."""
    import h5py

    def walk(group: Any) -> None:
        for key in group:
            if isinstance(group.get(key, getlink=True), h5py.ExternalLink):
                raise BadInput(f"{name} links to another file at {key!r}: save it as one file.")
            node = group[key]
            if isinstance(node, h5py.Group) and isinstance(group.get(key, getlink=True), h5py.HardLink):
                walk(node)
            elif isinstance(node, h5py.Dataset) and (node.external or node.is_virtual):
                raise BadInput(f"{name} keeps values of {key!r} in another file: save it as one file.")

    walk(file)


def _parts_on_disk(file: Any) -> _Parts:
    import h5py
    from anndata.io import read_elem

    nodes = {"X": file.get("X"), "raw.X": file.get("raw/X")}
    layers = file.get("layers", {})
    nodes |= {f"layers[{key!r}]": layers[key] for key in layers}
    matrices = {name: _matrix_on_disk(name, node) for name, node in nodes.items() if node is not None}
    planes = {
        key: node[:, :2]  # two columns of a map, never a whole embedding
        for key, node in file.get("obsm", {}).items()
        if isinstance(node, h5py.Dataset) and node.ndim == 2 and node.shape[1] >= 2
    }
    base = file.get("uns/log1p/base")
    base = float(base[()]) if base is not None and base.shape == () and base.dtype.kind in "fi" else np.e
    note = read_elem(file[f"uns/{NOTE}"]) if f"uns/{NOTE}" in file else {}
    var = read_elem(file["var"])
    raw_var = read_elem(file["raw/var"]) if "raw/var" in file else var
    return _Parts(read_elem(file["obs"]), var, raw_var, matrices, planes, float(np.log(base)), note)


def _matrix_on_disk(name: str, node: Any) -> _Matrix:
    import h5py

    if isinstance(node, h5py.Dataset):
        return _Matrix(name, "dense", tuple(node.shape), node)
    kind = str(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", ""))).removesuffix("_matrix")
    if kind not in ("csr", "csc"):
        raise BadInput(f"{name} is stored as {kind or 'an unknown kind'!r}: store it dense or as CSR or CSC.")
    shape = tuple(int(size) for size in node.attrs.get("shape", node.attrs.get("h5sparse_shape")))
    return _sparse(name, kind, shape, node["data"], node["indices"], node["indptr"][:])


def _sparse(name: str, kind: str, shape: Any, data: Any, indices: Any, indptr: np.ndarray) -> _Matrix:
    lines = shape[0 if kind == "csr" else 1]
    sound = len(indptr) == lines + 1 and indptr[0] == 0 and (np.diff(indptr) >= 0).all() and indptr[-1] == data.shape[0]
    if not sound or indices.shape != data.shape:
        raise ValueError(f"{name}: index pointers do not fit")
    return _Matrix(name, kind, shape, data, indices, np.asarray(indptr, dtype=np.int64))


def _parts_in_memory(path: Path) -> _Parts:
    """Files of anndata before 0.7 keep tables in another form, which anndata reads only whole."""
    import warnings

    import anndata

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # announces that the format is old, which is known here
        table = anndata.read_h5ad(path)
    stored = {"X": table.X} | {f"layers[{key!r}]": value for key, value in table.layers.items()}
    if table.raw is not None:
        stored["raw.X"] = table.raw.X
    matrices = {}
    for name, value in stored.items():
        if sp.issparse(value):
            csr = value.tocsr()
            matrices[name] = _sparse(name, "csr", csr.shape, csr.data, csr.indices, csr.indptr)
        elif value is not None:
            matrices[name] = _Matrix(name, "dense", value.shape, value)
    planes = {key: np.asarray(value) for key, value in table.obsm.items() if value.ndim == 2 and value.shape[1] >= 2}
    raw_var = table.var if table.raw is None else table.raw.var
    return _Parts(table.obs, table.var, raw_var, matrices, planes, 1.0, dict(table.uns.get(NOTE, {})))


# Choices


def _choose_matrix(name: str, parts: _Parts, wanted: str | None, said: list[str]) -> tuple[_Matrix, _Facts, str]:
    order = ["X", *(f"layers[{layer!r}]" for layer in COUNT_LAYERS), "raw.X"]
    present = [key for key in order if key in parts.matrices]
    if wanted is not None:
        key = wanted if wanted in parts.matrices else f"layers[{wanted!r}]"
        if key not in parts.matrices:
            raise BadInput(f"{name} has no matrix {wanted!r}: it has {', '.join(sorted(parts.matrices))}.")
        present = [key]
    seen: dict[str, _Facts] = {}
    for key in present:
        with _damage(name):
            seen[key] = parts.matrices[key].facts()
        if seen[key].scale == "counts" and seen[key].maximum > 0:
            break
    usable = [key for key in seen if seen[key].scale in ("counts", "log-normalised", "normalised")]
    if not usable:
        first = next(iter(seen), None)
        if first is None:
            raise BadInput(f"{name} has no matrix X: store the raw counts in X or layers['counts'].")
        others = [key for key in order if key in parts.matrices and key != first]
        cure = f"use {others[0]}" if wanted is not None and others else "store the raw counts in X or layers['counts']"
        raise BadInput(f"{first} of {name} {seen[first].fault}: {cure}.")
    # Counts first, then the order above; an all-zero matrix only if there is nothing else.
    best = min(usable, key=lambda key: (seen[key].maximum == 0, seen[key].scale != "counts", list(seen).index(key)))
    scale = seen[best].scale
    if best != "X" and "X" in seen and wanted is None:
        fault = seen["X"].fault if "X" not in usable else f"is {seen['X'].scale}"
        said.append(f"X {fault}, so {best} is used instead.")
    if scale == "log-normalised":
        said.append(f"{best} looks log-normalised: values are turned back by exp(x) - 1, raw counts would be better.")
    if scale == "normalised":
        said.append(f"{best} holds normalised values, not whole counts: they are used as they are.")
    return parts.matrices[best], seen[best], scale


def _gene_column(
    name: str, var: pd.DataFrame, vocab: Collection[str] | None, wanted: str | None
) -> tuple[str, np.ndarray, np.ndarray | None]:
    """Column of gene symbols, the symbols, and which the encoder knows."""
    if wanted not in (None, "index", *var.columns):
        raise BadInput(f"{name} has no gene column {wanted!r}: choose from {', '.join([*var.columns, 'index'])}.")
    keys = [key for key in GENE_COLUMNS if key == "index" or key in var.columns] if wanted is None else [wanted]
    columns = {key: _text(var.index if key == "index" else var[key]) for key in keys}
    named = {key: genes for key, genes in columns.items() if _share(r"\d+|nan|", genes) <= 0.5}
    if not named:
        cause = "no gene names" if wanted is None else f"no gene names in {wanted!r}"
        example = next(iter(columns.values()))[0]
        raise BadInput(f"{name} has {cause} (found {example!r}, ...): set adata.var_names to human gene symbols.")
    if vocab is None:
        symbols = {key: genes for key, genes in named.items() if _share(ENSEMBL, genes) <= 0.5}
        if not symbols:
            raise BadInput(_ensembl_only(name))
        key = next(iter(symbols))
        return key, symbols[key], None
    known = {key: np.array([gene in vocab for gene in genes]) for key, genes in named.items()}
    key = max(named, key=lambda k: known[k].sum())
    needed = MIN_KNOWN * min(len(var), len(vocab))
    n_known = int(known[key].sum())
    if n_known < needed or n_known == 0:
        genes = named[key]
        if all(_share(ENSEMBL, other) > 0.5 for other in named.values()):
            raise BadInput(_ensembl_only(name))
        if sum(gene.upper() in vocab for gene in genes) >= max(needed, 1):
            raise BadInput(
                f"Gene names of {name} look like mouse genes (such as {genes[0]!r}): give human symbols, "
                "for mouse data those of the orthologues."
            )
        raise BadInput(
            f"Only {n_known} of the {len(genes)} genes of {name} are known to this model (names such as "
            f"{genes[0]!r}): give human gene symbols, or choose a model that knows these genes."
        )
    return key, named[key], known[key]


def _ensembl_only(name: str) -> str:
    return f"{name} names its genes by Ensembl ids only: add a column of symbols to var, e.g. var['feature_name']."


def _share(pattern: str | re.Pattern[str], names: np.ndarray) -> float:
    """Share of names that match as a whole."""
    return sum(re.fullmatch(pattern, str(gene)) is not None for gene in names) / max(len(names), 1)


def _obs_column(name: str, obs: pd.DataFrame, wanted: str | None, known: Sequence[str], what: str) -> str | None:
    if wanted is not None:
        if wanted not in obs.columns:
            raise BadInput(f"{name} has no {what} column {wanted!r}: it has {', '.join(map(str, obs.columns))}.")
        return wanted
    lower = {str(column).lower(): str(column) for column in reversed(obs.columns)}
    return next((lower[key] for key in known if key in lower), None)


def _positions(parts: _Parts) -> tuple[str | None, str | None, np.ndarray | None]:
    where, xy = _plane(parts, ("spatial", "X_spatial"))
    if where is not None:
        return where, parts.note.get("position_unit", "unknown"), xy
    for (x, y), unit in POSITION_COLUMNS.items():
        if {x, y} <= set(parts.obs.columns):
            xy = parts.obs[[x, y]].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
            if np.isfinite(xy).all():
                return f"obs['{x}'], obs['{y}']", unit, xy
    return None, None, None


def _plane(parts: _Parts, keys: Sequence[str]) -> tuple[str | None, np.ndarray | None]:
    """First two dimensions of the first finite ``obsm`` entry of these names."""
    for key in keys:
        if key in parts.planes:
            xy = parts.planes[key][:, :2].astype(np.float64)
            if np.isfinite(xy).all():
                return f"obsm['{key}']", xy
    return None, None


def _text(values: pd.Series | pd.Index) -> np.ndarray:
    return np.asarray(values).astype(str).astype(object)
