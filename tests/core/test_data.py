"""Users' files: anndata's own in-memory reading is the oracle, every refusal is provoked by a file made here."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from ge2hist_core import data
from ge2hist_core.data import open_h5ad, write_cells
from ge2hist_core.types import BadInput, Cells

GENES = ["CD8A", "CD4", "MS4A1", "EPCAM", "COL1A1", "VEGFA", "PECAM1"]
SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture
def table() -> ad.AnnData:
    generator = np.random.default_rng(1)
    counts = generator.poisson(0.7, (23, len(GENES))).astype(np.float32)
    counts[:, 3] = generator.integers(1, 40, 23)  # no cell is empty
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical(["T", "B"] * 11 + ["T"]), "donor": ["d1"] * 23},
        index=[f"cell{i}" for i in range(23)],
    )
    return ad.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=GENES))


@pytest.fixture
def save(tmp_path):
    def save(table: ad.AnnData, name: str = "cells.h5ad") -> Path:
        table.write_h5ad(tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.parametrize("block", [1, 9, 10**6])
@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, np.asarray])
@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint16])
def test_rows_equal_those_of_anndata(table, save, monkeypatch, block, form, dtype):
    monkeypatch.setattr(data, "BLOCK", block)
    dense = table.X.toarray().astype(dtype)
    dense[4:7] = 0  # empty rows within a run
    table.X = form(dense)
    with open_h5ad(save(table)) as source:
        np.testing.assert_allclose(source.totals, dense.sum(axis=1))
        np.testing.assert_array_equal(source.empty, dense.sum(axis=1) == 0)
        rows = [20, 3, 21, 4, 22, 0, 5]
        cells = source.take(rows, allow_empty=True)
        np.testing.assert_array_equal(cells.counts.toarray(), dense[rows])
        assert list(cells.cell_id) == [f"cell{i}" for i in rows]
        assert list(cells.cell_type) == list(table.obs["cell_type"].astype(str).iloc[rows])
        assert source.take([]).counts.shape == (0, len(GENES))


def test_preview_says_what_was_recognised(table, save):
    table.obsm["X_umap"] = np.arange(46.0).reshape(23, 2)
    table.obs["x_centroid"], table.obs["y_centroid"] = np.arange(23.0), np.arange(23.0) * 2
    table.var["feature_name"] = GENES
    table.var_names = [f"ENSG{i:011d}" for i in range(len(GENES))]
    with open_h5ad(save(table), vocab={"CD8A", "EPCAM", "OTHER"}) as source:
        preview = source.preview
        assert (preview.n_cells, preview.n_genes, preview.n_known) == (23, 7, 2)
        assert (preview.matrix, preview.scale, preview.gene_column) == ("X", "counts", "feature_name")
        assert (preview.type_column, preview.donor_column) == ("cell_type", "donor")
        assert (preview.position, preview.position_unit) == ("obs['x_centroid'], obs['y_centroid']", "um")
        assert preview.umap == "obsm['X_umap']" and preview.warnings == ()
        assert list(source.genes) == GENES and list(source.known) == [g in ("CD8A", "EPCAM") for g in GENES]
        np.testing.assert_array_equal(source.umap, table.obsm["X_umap"])
        np.testing.assert_array_equal(source.take([3]).xy_um, [[3.0, 6.0]])
        assert source.index_of("cell7") == 7
        with pytest.raises(BadInput, match="no cell 'x7': its cells are named like 'cell0'"):
            source.index_of("x7")


def test_the_best_matching_column_wins(table, save):
    table.var["gene_name"] = GENES
    table.var["feature_name"] = [f"probe_{g}" for g in GENES]
    path = save(table)
    with open_h5ad(path, vocab=set(GENES)) as source:
        assert source.preview.gene_column in ("gene_name", "index") and source.preview.n_known == 7
    with (
        pytest.raises(BadInput, match="Only 0 of the 7 genes"),
        open_h5ad(path, vocab=set(GENES), gene_column="feature_name"),
    ):
        pass


def test_positions_of_unknown_unit_are_shown_but_not_taken_for_um(table, save):
    table.obsm["spatial"] = np.ones((23, 2))
    with open_h5ad(save(table)) as source:
        assert source.preview.position_unit == "unknown"
        assert source.xy.shape == (23, 2) and source.take([0]).xy_um is None


@pytest.mark.parametrize("where", ["layer", "raw"])
def test_counts_are_found_beside_scaled_values(table, save, where):
    counts = table.X.copy()
    if where == "layer":
        table.layers["counts"] = counts
    else:
        table.raw = table.copy()
    table.X = table.X.toarray() - 1.5
    path = save(table)
    with open_h5ad(path) as source:
        assert source.preview.matrix == ("layers['counts']" if where == "layer" else "raw.X")
        assert source.preview.scale == "counts"
        assert "X holds negative values (minimum -1.5)" in source.preview.warnings[0]
        np.testing.assert_array_equal(source.take([1, 0]).counts.toarray(), counts[[1, 0]].toarray())
    with pytest.raises(BadInput, match=r"X of cells.h5ad holds negative .* scaled data do: use (layers|raw)"):
        open_h5ad(path, matrix="X")


def test_raw_counts_keep_their_own_genes(table, save):
    table.raw = table.copy()
    table = table[:, :3].copy()
    table.X = table.X.toarray() - 0.5
    with open_h5ad(save(table)) as source:
        assert list(source.genes) == GENES
        assert source.take([0]).counts.shape == (1, 7)


@pytest.mark.parametrize("base", [None, 2.0])
def test_log_values_are_turned_back(table, save, base):
    """What comes out is proportional to the counts within each cell, so an edit by a factor means what it says."""
    counts = table.X.toarray().astype(np.float64)
    scaled = counts / counts.sum(axis=1, keepdims=True) * 1e4
    table.X = (np.log1p(scaled) / (1.0 if base is None else np.log(base))).astype(np.float32)
    table.uns["log1p"] = {} if base is None else {"base": base}
    with open_h5ad(save(table)) as source:
        assert source.preview.scale == "log-normalised"
        assert "exp(x) - 1" in source.preview.warnings[0]
        np.testing.assert_allclose(source.take(range(23)).counts.toarray(), scaled, rtol=1e-5)


def test_normalised_values_are_used_as_they_are(table, save):
    table.X = table.X.toarray() * 1.7
    with open_h5ad(save(table)) as source:
        assert source.preview.scale == "normalised" and "not whole counts" in source.preview.warnings[0]
        np.testing.assert_allclose(source.take([2]).counts.toarray(), table.X[[2]], rtol=1e-6)


def test_repeated_genes_and_cells_are_said(table, save):
    table.var["feature_name"] = ["CD8A", "CD8A", *GENES[2:]]
    table.obs_names = ["same", "same", *table.obs_names[2:]]
    with open_h5ad(save(table)) as source:
        text = " ".join(source.preview.warnings)
        assert "1 gene columns repeat a name (first 'CD8A')" in text and "make obs_names unique" in text
        assert len(set(source.cell_id)) == 23 and source.index_of("same") == 0
        np.testing.assert_array_equal(source.take([1]).counts.toarray(), table.X[[1]].toarray())


def test_an_empty_cell_is_named(table, save):
    counts = table.X.tolil()
    counts[5] = 0
    table.X = counts.tocsr()
    with open_h5ad(save(table)) as source:
        assert source.preview.n_empty == 1 and "first 'cell5'" in source.preview.warnings[0]
        with pytest.raises(BadInput, match="Cell 'cell5' has no counts: choose another"):
            source.take([4, 5])
        assert source.take([5], allow_empty=True).counts.nnz == 0


def refuse(table: ad.AnnData, change: str) -> ad.AnnData:
    """The table with one fault."""
    dense = table.X.toarray()
    if change == "negative":
        dense[0, 0] = -3
    elif change == "nan":
        dense[0, 0] = np.nan
    elif change == "zeros":
        dense[:] = 0
    elif change == "numbered":
        table.var_names = [str(i) for i in range(7)]
    elif change == "ensembl":
        table.var_names = [f"ENSG{i:011d}.3" for i in range(7)]
    elif change == "foreign":
        table.var_names = [f"at{i}g" for i in range(7)]
    elif change == "mouse":
        table.var_names = [gene.capitalize() for gene in GENES]
    table.X = sp.csr_matrix(dense)
    return {"no cells": table[:0].copy(), "no genes": table[:, :0].copy()}.get(change, table)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("negative", r"X of .* negative values \(minimum -3\), as scaled data do: store the raw counts in X or layers"),
        ("nan", r"X of .* holds NaN or infinite values: store the raw counts"),
        ("zeros", "holds only zeros: give the raw counts"),
        ("numbered", r"has no gene names \(found '0', ...\): set adata.var_names to human gene symbols"),
        ("ensembl", "by Ensembl ids only: add a column of symbols"),
        ("foreign", "Only 0 of the 7 genes .* 'at0g'.*: give human gene symbols"),
        ("mouse", "look like mouse genes .*'Cd8a'.*: give human symbols"),
        ("no cells", "holds 0 cells .*: give a file with cells and genes"),
        ("no genes", "no values to read: give a file with cells and genes"),
    ],
)
@pytest.mark.parametrize("vocab", [None, set(GENES)])
def test_refused_with_cause_and_cure(table, save, change, text, vocab):
    if vocab is None and change in ("foreign", "mouse"):
        vocab = {gene: i for i, gene in enumerate([*GENES, *(f"GENE{i}" for i in range(90))])}
    path = save(refuse(table, change))
    with pytest.raises(BadInput, match=text) as caught:
        open_h5ad(path, vocab)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and len(message) < 250


def test_known_share_is_of_the_smaller_list(table, save):
    """A panel of 7 genes in a vocabulary of 60,000, and 60,000 genes before a small model, are both fine."""
    path = save(table)
    big = {*GENES, *(f"G{i}" for i in range(500))}
    with open_h5ad(path, big) as source:
        assert source.preview.n_known == 7
    wide = ad.AnnData(sp.csr_matrix(np.ones((2, 500), np.float32)), var=pd.DataFrame(index=sorted(big)[:500]))
    with open_h5ad(save(wide, "wide.h5ad"), {"CD8A", "CD4", "KRT5"}) as source:
        assert source.preview.n_known == 2


def test_files_that_are_no_h5ad(table, save, tmp_path):
    with pytest.raises(BadInput, match="absent.h5ad is not a file"):
        open_h5ad(tmp_path / "absent.h5ad")
    (tmp_path / "a.h5ad").write_bytes(gzip.compress(b"gene,cell\n"))
    with pytest.raises(BadInput, match="a.h5ad is not an .h5ad file: save"):
        open_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "empty.h5ad").touch()
    with pytest.raises(BadInput, match="is not an .h5ad file"):
        open_h5ad(tmp_path / "empty.h5ad")
    with h5py.File(tmp_path / "b.h5ad", "w") as file:
        file["matrix/barcodes"] = [1]
    with pytest.raises(BadInput, match="HDF5 file without the parts X, obs and var"):
        open_h5ad(tmp_path / "b.h5ad")
    whole = save(table).read_bytes()
    for share in (0.1, 0.5, 0.99):
        (tmp_path / "cut.h5ad").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(BadInput, match="cut.h5ad is cut off or damaged: copy or upload"):
            open_h5ad(tmp_path / "cut.h5ad")


def test_damage_inside_a_file_is_one_sentence(table, tmp_path):
    path = tmp_path / "c.h5ad"
    table.write_h5ad(path, compression="gzip")
    with h5py.File(path) as file:
        chunk = file["X/data"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = os.urandom(chunk.size)
    path.write_bytes(content)
    with pytest.raises(BadInput, match="c.h5ad is damaged .*: write or upload it again"):
        open_h5ad(path)


@pytest.mark.parametrize(
    ("where", "value"), [("X/indices", 10**6), ("X/indptr", 3), ("obs/_index", None), ("X/indices", -1)]
)
def test_a_matrix_that_points_outside_itself_is_refused(table, save, where, value):
    path = save(table)
    with h5py.File(path, "r+") as file:
        if value is None:
            del file[where]
        else:
            file[where][0] = value
    with pytest.raises(BadInput, match="is damaged"), open_h5ad(path) as source:
        source.take([0])


def test_a_file_may_not_make_the_server_read_another(table, save, tmp_path):
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["x"] = np.ones((23, 7))
    path = save(table)
    with h5py.File(path, "r+") as file:
        del file["X"]
        file["X"] = h5py.ExternalLink(str(secret), "/x")
    with pytest.raises(BadInput, match="links to another file at 'X'"):
        open_h5ad(path)
    with h5py.File(path, "r+") as file:
        del file["X"]
        file.create_dataset("X", (23, 7), "u1", external=[(str(secret), 0, 161)])
    with pytest.raises(BadInput, match="keeps values of 'X' in another file"):
        open_h5ad(path)


def test_too_large_a_file_is_refused_before_it_is_read(table, save, monkeypatch):
    path = save(table)
    monkeypatch.setattr(data, "MAX_BYTES", 1000)
    with pytest.raises(BadInput, match="the limit is .* GB: keep only the cells of interest"):
        open_h5ad(path)


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ({"matrix": "spliced"}, "has no matrix 'spliced': it has X"),
        ({"gene_column": "symbol"}, "has no gene column 'symbol'"),
        ({"type_column": "leiden"}, "has no cell type column 'leiden': it has cell_type, donor"),
        ({"donor_column": "who"}, "has no donor column 'who'"),
    ],
)
def test_choices_that_the_file_lacks(table, save, choice, text):
    with pytest.raises(BadInput, match=text):
        open_h5ad(save(table), **choice)


def test_cells_round_trip(table, tmp_path):
    cells = Cells(
        counts=table.X,
        genes=np.array(GENES),
        cell_id=table.obs_names.to_numpy(),
        cell_type=table.obs["cell_type"].to_numpy(),
        donor=table.obs["donor"].to_numpy(),
        xy_um=np.arange(46.0).reshape(23, 2),
        source="seed 1",
    )
    truth = pd.DataFrame({"fibrosis": np.linspace(0, 1, 23)})
    for name in ("a.h5ad", "b.h5ad"):
        write_cells(cells, tmp_path / name, truth, pd.DataFrame({"role": ["inert"] * 7}))
    with open_h5ad(tmp_path / "a.h5ad", set(GENES)) as source, open_h5ad(tmp_path / "b.h5ad") as twin:
        assert source.sha256 == twin.sha256 and source.preview.warnings == ()
        back = source.take(range(23))
        np.testing.assert_array_equal(source.obs["fibrosis"], truth["fibrosis"])
    np.testing.assert_array_equal(back.counts.toarray(), cells.counts.toarray())
    np.testing.assert_array_equal(back.xy_um, cells.xy_um)
    for field in ("genes", "cell_id", "cell_type", "donor"):
        np.testing.assert_array_equal(getattr(back, field), getattr(cells, field))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5ad", "b.h5ad"]


def test_scanpys_scaled_example_is_read_from_raw():
    """The file that scanpy ships is in the form of anndata 0.6, scaled, with log-normalised ``raw``."""
    import scanpy

    path = Path(scanpy.datasets.__file__).with_name("10x_pbmc68k_reduced.h5ad")
    with open_h5ad(path) as source:
        assert (source.preview.matrix, source.preview.scale) == ("raw.X", "log-normalised")
        assert source.preview.type_column == "bulk_labels" and source.umap.shape == (700, 2)
        assert "X holds negative values" in source.preview.warnings[0]
        assert source.take([0, 699]).counts.shape == (2, 765)
    with pytest.raises(BadInput, match="as scaled data do: use raw.X"):
        open_h5ad(path, matrix="X")


@pytest.mark.parametrize(
    ("file", "n", "g", "column", "total"),
    [
        ("xenium_breast/ghist_breast_cells.h5ad", 4308, 280, "index", 88),
        ("xenium_lung/NCBI858.h5ad", 200, 338, "gene_symbol", 195),
    ],
)
def test_real_xenium_cells(file, n, g, column, total):
    if not (SHARED / file).is_file():
        pytest.skip("the real cells are not part of the repository")
    with open_h5ad(SHARED / file) as source:
        preview = source.preview
        assert (preview.n_cells, preview.n_genes, preview.gene_column) == (n, g, column)
        assert (preview.scale, preview.median_total, preview.warnings) == ("counts", total, ())
        whole = ad.read_h5ad(SHARED / file)
        dense = whole.X.toarray() if sp.issparse(whole.X) else whole.X
        np.testing.assert_array_equal(source.take(range(n)).counts.toarray(), dense)
