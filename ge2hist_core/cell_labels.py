"""Types for the cells of a slide: from a user's table, from marker genes, or by CellTypist; each with a confidence.

A table names cells of the store, Space Ranger's cells, or bins of 2, 8 or 16 um; of a cell's bins the most frequent
type counts, and the confidence is its share.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from ge2hist_core.types import BadInput

__all__ = ["UNLABELLED", "CellLabels", "by_celltypist", "by_markers", "by_table", "read_label_table", "read_markers"]

UNLABELLED = "Unlabelled"
ID_COLUMNS = ("barcode", "cell_id", "cell", "id", "cellid")
TYPE_COLUMNS = ("cell_type", "celltype", "type", "label", "deconvolutionlabel1", "annotation", "cluster", "group")
BIN_ID = re.compile(r"s_(\d{3})um_(\d{5})_(\d{5})(?:-\d+)?")
TARGET_SUM = 1e3
"""Library size to which counts are brought before the logarithm; nuclei of Visium HD hold some hundred UMIs."""


@dataclass(frozen=True, eq=False)
class CellLabels:
    """``cell_type [cell]`` strings, ``UNLABELLED`` where unknown, and ``confidence [cell]`` in 0..1 (0 there)."""

    cell_type: np.ndarray
    confidence: np.ndarray


def read_label_table(path: str | Path, column: str | None = None) -> pd.Series:
    """CSV or TSV -> types indexed by the id of a cell or bin.

    Parameters
    ----------
    column: the column with the types; None takes the first that is named like one.

    Raises
    ------
    BadInput: missing file or column, an id twice.
    """
    path = Path(path)
    table = _table(path)
    lower = {str(name).lower().replace(" ", "_"): name for name in table.columns}
    ids = next((lower[name] for name in ID_COLUMNS if name in lower), table.columns[0])
    if column is not None and column not in table.columns:
        raise BadInput(f"{path.name} has no column {column!r}: its columns are {', '.join(map(str, table.columns))}.")
    types = column or next((lower[n] for n in TYPE_COLUMNS if n in lower and lower[n] != ids), None)
    if types is None:
        raise BadInput(f"{path.name} has no column named like a cell type: say which by --label-column.")
    kept = table.dropna(subset=[ids, types])
    series = pd.Series(kept[types].astype(str).str.strip().to_numpy(), index=kept[ids].astype(str).str.strip())
    if not len(series):
        raise BadInput(f"{path.name} labels nothing: give one row per cell or bin.")
    if not series.index.is_unique:
        raise BadInput(f"{path.name} names {series.index[series.index.duplicated()][0]!r} twice: give each id once.")
    return series


def by_table(
    labels: pd.Series, names: Sequence[np.ndarray], owner: np.ndarray, row: np.ndarray, column: np.ndarray
) -> CellLabels:
    """Types from a table of cells or bins.

    Parameters
    ----------
    labels: from :func:`read_label_table`.
    names: arrays ``[cell]`` of names under which a cell may stand in the table (the store's, Space Ranger's).
    owner: int ``[bin]`` cell number 1.. of every bin, else <= 0. row, column: ``[bin]`` place in the 2-um grid.

    Raises
    ------
    BadInput: none of the table's ids is known.
    """
    n = len(names[0])
    first = BIN_ID.fullmatch(str(labels.index[0]))
    if first is None:
        found = [labels.reindex(pd.Index(ids)) for ids in names]
        best = max(found, key=lambda s: s.notna().sum())
        if not best.notna().any():
            raise BadInput(
                f"None of the {len(labels):,} ids of the label table is a cell here: ids are like {names[0][0]!r}, the "
                f"table has {labels.index[0]!r}."
            )
        known = best.notna().to_numpy()
        return CellLabels(np.where(known, best.to_numpy(dtype=object), UNLABELLED), known.astype(np.float32))

    size = int(first.group(1))
    places = labels.index.to_series().str.extract(BIN_ID.pattern)
    if size % 2 or places[0].isna().any() or (places[0].astype(int) != size).any():
        raise BadInput("The label table mixes bins of several sizes or kinds of ids: give one kind.")
    types, codes = np.unique(labels.to_numpy(dtype=str), return_inverse=True)
    across = int(max(column.max(initial=0) // (size // 2), places[2].astype(int).max())) + 1
    key = pd.Index(places[1].astype(np.int64).to_numpy() * across + places[2].astype(np.int64).to_numpy())
    mine = np.flatnonzero(owner > 0)
    at = key.get_indexer((row[mine] // (size // 2)).astype(np.int64) * across + column[mine] // (size // 2))
    mine, at = mine[at >= 0], at[at >= 0]
    if not len(mine):
        raise BadInput(f"None of the {len(labels):,} bins of the label table lies in a cell: give this slide's labels.")
    votes = sp.csr_matrix((np.ones(len(mine)), (owner[mine] - 1, codes[at])), shape=(n, len(types)))
    return _most(votes, types)


def read_markers(path: str | Path) -> pd.DataFrame:
    """CSV or TSV with the columns ``cell_type``, ``gene`` and, if wanted, ``weight`` (1 where it is left out).

    Raises
    ------
    BadInput: a missing column, a weight that is no number, fewer than two types.
    """
    path = Path(path)
    table = _table(path).rename(columns=lambda name: str(name).strip().lower())
    for name in ("cell_type", "gene"):
        if name not in table.columns:
            raise BadInput(f"{path.name} has no column {name!r}: give cell_type, gene and, if wanted, weight.")
    if "weight" not in table.columns:
        table["weight"] = 1.0
    table["weight"] = pd.to_numeric(table["weight"], errors="coerce")
    if not np.isfinite(table["weight"]).all() or (table["weight"] == 0).any():
        raise BadInput(
            f"{path.name} has a weight that is 0 or no number: give numbers, negative for genes that are absent."
        )
    if table["cell_type"].nunique() < 2:
        raise BadInput(f"{path.name} names fewer than two cell types: markers tell types apart.")
    return table[["cell_type", "gene", "weight"]].astype({"cell_type": str, "gene": str})


def by_markers(counts: sp.csr_matrix, genes: Sequence[str], markers: pd.DataFrame) -> CellLabels:
    """Types by the enrichment of marker genes.

    Counts are brought to ``TARGET_SUM`` per cell, ``log(1 + x)`` taken and each gene standardised over the cells; the
    score of type t is Stouffer's ``sum_g w_gt z_g / sqrt(sum_g w_gt^2)``, standard normal for a cell that is like the
    average in genes that vary independently. The type is that of the highest score; the confidence is its softmax
    share, 1 / types where markers say nothing. It orders cells; it is no calibrated probability. The matrix stays
    sparse.

    Parameters
    ----------
    counts: ``[cell, gene]`` raw counts.

    Raises
    ------
    BadInput: a type of which no marker is measured.
    """
    index = pd.Index(list(genes))
    types = list(dict.fromkeys(markers["cell_type"]))
    at = index.get_indexer(markers["gene"])
    known = at >= 0
    weights = np.zeros((len(index), len(types)))
    np.add.at(weights, (at[known], pd.Index(types).get_indexer(markers["cell_type"])[known]), markers["weight"][known])
    for k, name in enumerate(types):
        if not weights[:, k].any():
            asked = ", ".join(markers.loc[markers["cell_type"] == name, "gene"].head(5))
            raise BadInput(f"None of the markers of {name!r} ({asked}) is measured: give other genes or drop the type.")
    used = np.flatnonzero(weights.any(axis=1))
    weights = weights[used]
    total = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1.0)
    x = sp.diags_array(TARGET_SUM / total) @ sp.csr_matrix(counts[:, used], dtype=np.float64)
    x = sp.csr_matrix(x)
    x.data = np.log1p(x.data)
    mean = np.asarray(x.mean(axis=0)).ravel()
    spread = np.sqrt(np.maximum(np.asarray(x.multiply(x).mean(axis=0)).ravel() - mean**2, 0.0))
    # A gene that never varies says nothing.
    scaled = np.divide(weights, spread[:, None], out=np.zeros_like(weights), where=spread[:, None] > 0)
    score = (x @ scaled - mean @ scaled) / np.sqrt((weights**2).sum(axis=0))
    share = np.exp(score - score.max(axis=1, keepdims=True))
    share /= share.sum(axis=1, keepdims=True)
    best = score.argmax(axis=1)
    return CellLabels(np.array(types, dtype=object)[best], share[np.arange(len(best)), best].astype(np.float32))


def by_celltypist(counts: sp.csr_matrix, genes: Sequence[str], model: str | Path) -> CellLabels:
    """Types and probabilities by CellTypist (Dominguez Conde et al. 2022, doi:10.1126/science.abl5197).

    Its model files are read by its own package and can run code: give only files that you trust.

    Raises
    ------
    BadInput: the package or the model is not there.
    """
    try:
        import celltypist
    except ImportError:
        raise BadInput(
            "CellTypist is not installed: pip install celltypist, or label by --labels or --markers."
        ) from None
    from anndata import AnnData

    total = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1.0)
    x = sp.csr_matrix(sp.diags_array(1e4 / total) @ counts)
    x.data = np.log1p(x.data)
    try:
        found = celltypist.annotate(AnnData(x, var=pd.DataFrame(index=pd.Index(list(genes)))), model=str(model))
    except (OSError, ValueError) as error:
        raise BadInput(f"CellTypist cannot use the model {model} ({error}): give another.") from error
    types = found.predicted_labels["predicted_labels"].astype(str).to_numpy(dtype=object)
    return CellLabels(types, found.probability_matrix.max(axis=1).to_numpy(dtype=np.float32))


def _table(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise BadInput(f"{path} does not exist: give a CSV or TSV.")
    try:
        with path.open(encoding="utf-8-sig") as file:
            header = file.readline()
        separator = max("\t,;", key=header.count)
        table = pd.read_csv(path, sep=separator, dtype=str, encoding="utf-8-sig")
    except (ValueError, UnicodeDecodeError) as error:  # pandas' ParserError and EmptyDataError are ValueErrors
        raise BadInput(f"{path.name} is no table ({str(error).splitlines()[0]}): give a CSV or TSV.") from error
    if table.shape[1] < 2:
        raise BadInput(f"{path.name} has one column: give an id and a type, separated by commas or tabs.")
    return table


def _most(votes: sp.csr_matrix, types: np.ndarray) -> CellLabels:
    """The type with most votes and its share; ties go to the first in the alphabet."""
    total = np.asarray(votes.sum(axis=1)).ravel()
    best = np.asarray(votes.argmax(axis=1)).ravel()
    top = np.asarray(votes.max(axis=1).todense()).ravel()
    confidence = np.divide(top, total, out=np.zeros_like(total), where=total > 0).astype(np.float32)
    return CellLabels(np.where(total > 0, types.astype(object)[best], UNLABELLED), confidence)
