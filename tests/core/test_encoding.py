"""What ``encode`` writes, against the model called cell by cell; its table of types against counting by hand."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest

from ge2hist_core.__main__ import COMMANDS, run_command
from ge2hist_core.data import open_h5ad, write_cells
from ge2hist_core.encoding import agreement, encode_cells, read_type_map
from ge2hist_core.types import BadInput, Cells


@pytest.fixture
def file(demo_cells: Cells, tmp_path: Path) -> Path:
    """Sixty cells, the third of them with a gene that the encoder does not know and no other."""
    counts = demo_cells.counts.tolil()
    counts[2] = 0
    counts[2, -1] = 5
    path = tmp_path / "cells.h5ad"
    write_cells(demo_cells.with_counts(counts.tocsr()), path)
    return path


def test_every_cell_is_what_the_model_makes_of_it_alone(file: Path, tiny_bundle):
    with open_h5ad(file, tiny_bundle.scgpt.vocab) as source:
        encoded = encode_cells(tiny_bundle, source, seed=4)
        cells = source.take(np.arange(len(source)))
    assert encoded.known.tolist() == [i != 2 for i in range(60)]
    assert encoded.cell_type[2] == "" and np.isnan(encoded.support[2]) and np.isnan(encoded.z_e[2]).all()
    for i in (0, 7, 59):
        embedding = tiny_bundle.embed(cells.take([i]), 4)
        latent = tiny_bundle.encode(embedding)
        np.testing.assert_allclose(encoded.embedding[i], embedding[0], atol=1e-6)
        np.testing.assert_allclose(encoded.z_c[i], latent.z_c[0], atol=1e-5)
        np.testing.assert_allclose(encoded.z_e[i], latent.z_e[0], atol=1e-5)
        assert encoded.cell_type[i] == tiny_bundle.cell_types[tiny_bundle.classify(latent)[0].argmax()]
        assert encoded.support[i] == pytest.approx(tiny_bundle.support.p(embedding)[0], abs=1e-3)


def test_the_command_adds_to_a_copy_and_reports(file: Path, tiny_folder: Path, tmp_path: Path, capsys):
    types = tmp_path / "types.csv"
    types.write_text("given,model\nB cell,B cell|Plasma cell\nFibroblast,Fibroblast\nMacrophage,\n")
    out = tmp_path / "out.h5ad"
    command = ["encode", str(file), "--bundle", str(tiny_folder), "--out", str(out), "--types", str(types)]
    assert run_command("ge2hist", "", COMMANDS, command) == 0
    before, after = anndata.read_h5ad(file), anndata.read_h5ad(out)
    assert (before.X != after.X).nnz == 0
    assert [*after.obs.columns] == [
        *before.obs.columns, "ge2hist_type", "ge2hist_type_probability", "ge2hist_support_p",
    ]  # fmt: skip
    assert {"X_scGPT", "X_z_c", "X_z_e", "spatial"} <= set(after.obsm)
    said = capsys.readouterr().out
    right = after.obs["ge2hist_type"].astype(str)
    given = after.obs["cell_type"].astype(str)
    ok = ((given == "B cell") & right.isin(["B cell", "Plasma cell"])) | ((given == "Fibroblast") & (right == given))
    assert f"accuracy {ok.sum() / 12:.4f} of 12 cells" in said
    outside = (after.obs["ge2hist_support_p"].dropna() < 0.05).mean()
    assert f"{outside:.1%} of 59 cells lie outside" in said


def test_agreement_counts_by_given_type():
    given = np.array(["a", "a", "a", "b", "", "c", "a"], dtype=object)
    read = np.array(["x", "y", "", "b", "x", "z", "x"], dtype=object)
    table = agreement(given, read, {"a": ("y", "q"), "c": ()})
    assert table.loc["a"].tolist() == [3, 1, 1 / 3, "x"]
    assert table.loc[["b", "c"], "recall"].isna().all()
    assert agreement(given, read).loc["b", "recall"] == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("given,model\nT,CD8 T cells\n", "maps to 'CD8 T cells', the model's types are"),
        ("a,b\n1,2\n", "must have the columns given,model"),
        ("", "must have the columns given,model"),
    ],
)
def test_a_table_of_types_is_refused_by_name(text: str, message: str, tmp_path: Path):
    path = tmp_path / "types.csv"
    path.write_text(text)
    with pytest.raises(BadInput, match=message):
        read_type_map(path, ("CD8 T cell", "B cell"))
    with pytest.raises(BadInput, match="Cannot read the table of types"):
        read_type_map(tmp_path / "none.csv", ("B cell",))
