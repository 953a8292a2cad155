"""The h5ad of a result is read back by anndata alone and compared with the arms, the edits and hand-made means."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest

from ge2hist_core.config import SampleConfig
from ge2hist_core.data import open_h5ad
from ge2hist_core.model import GE2Hist
from ge2hist_core.types import BadInput, Cells
from perturb.edits import Perturbation
from perturb.recipe import Recipe
from perturb.report import report_files, write_report
from perturb.result import Result
from perturb.run import run


@pytest.fixture(scope="module")
def result(tiny_bundle: GE2Hist, demo_cells: Cells) -> Result:
    edits = Perturbation.parse("GAPDH:x4,CD8A:set=9")
    recipe = Recipe("d" * 64, tiny_bundle.sha256, ("cell-9", "cell-3"), edits, SampleConfig(steps=2), (0, 5))
    return run(recipe, tiny_bundle, demo_cells)


@pytest.fixture(scope="module")
def path(result: Result, demo_cells: Cells, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    write_report(result, folder, demo_cells)
    return folder / "result.h5ad"


def test_counts_are_those_before_and_after_the_edit(path: Path, demo_cells: Cells) -> None:
    table = anndata.read_h5ad(path)
    assert table.obs["arm"].tolist() == ["base"] * 2 + ["edited"] * 2
    assert table.obs["cell_id"].tolist() == ["cell-9", "cell-3"] * 2
    before = demo_cells.counts[[9, 3]].toarray()
    after = before.copy()
    after[:, demo_cells.genes == "GAPDH"] *= 4
    after[:, demo_cells.genes == "CD8A"] = 9
    np.testing.assert_array_equal(table.X.toarray(), np.concatenate([before, after]))
    assert table.var_names.tolist() == demo_cells.genes.tolist()


def test_states_and_readouts_are_those_of_the_arms(path: Path, result: Result, demo_cells: Cells) -> None:
    table = anndata.read_h5ad(path)
    arms = (result.base_arm, result.edited_arm)
    np.testing.assert_array_equal(table.obsm["X_scGPT"], np.concatenate([arm.embedding for arm in arms]))
    np.testing.assert_array_equal(table.obsm["X_z_c"], np.concatenate([arm.latent.z_c for arm in arms]))
    np.testing.assert_array_equal(table.obsm["X_z_e"], np.concatenate([arm.latent.z_e for arm in arms]))
    np.testing.assert_allclose(table.obs["ge2hist_support_p"], np.concatenate([arm.support for arm in arms]))
    assert table.obs["cell_type"].tolist() == demo_cells.cell_type[[9, 3]].tolist() * 2
    read = [*result.states["type_base"], *result.states["type_edited"]]
    assert table.obs["ge2hist_type"].tolist() == read
    area = (32 * result.um_per_px / 1000) ** 2
    for i, nuclei in enumerate((result.base_nuclei, result.edited_nuclei)):
        for cell in (0, 1):
            n = [len(one) for one in nuclei[2 * cell : 2 * cell + 2]]
            assert table.obs["density"].iloc[2 * i + cell] == pytest.approx(np.mean(n) / area)
            assert table.obs["density_n"].iloc[2 * i + cell] == 2
    rows = result.readouts[(result.readouts["arm"] == "edited") & (result.readouts["readout"] == "spacing")]
    values = rows[rows["cell_id"] == "cell-3"]["value"]
    assert table.obs["spacing_n"].iloc[3] == values.notna().sum()


def test_the_file_says_what_it_is_and_holds_no_objects(path: Path, result: Result) -> None:
    about = anndata.read_h5ad(path).uns["ge2hist"]
    assert about["notice"] == "Generated, not diagnostic"
    assert Recipe.from_json(about["recipe"]) == result.recipe
    assert json.loads(about["provenance"]) == result.provenance
    assert about["units"]["spacing"] == "µm"
    with h5py.File(path) as file:
        kinds: list[str] = []
        file.visititems(lambda _, node: kinds.append(node.dtype.kind) if isinstance(node, h5py.Dataset) else None)
        assert "V" not in kinds


def test_the_same_result_gives_the_same_bytes(path: Path, result: Result, demo_cells: Cells) -> None:
    files = report_files(result, demo_cells)
    assert files["result.h5ad"] == path.read_bytes()
    assert "left out" not in files["README.txt"].decode()


def test_the_app_opens_the_file_again(path: Path, tiny_bundle: GE2Hist, demo_cells: Cells) -> None:
    with open_h5ad(path, tiny_bundle.scgpt.vocab) as source:
        assert source.cell_id.tolist() == ["cell-9|base", "cell-3|base", "cell-9|edited", "cell-3|edited"]
        cells = source.take([1])
    np.testing.assert_array_equal(cells.counts.toarray(), demo_cells.counts[[3]].toarray())
    np.testing.assert_allclose(cells.xy_um, demo_cells.xy_um[[3]])


def test_genes_of_one_name_stay_apart(result: Result, demo_cells: Cells, tmp_path: Path) -> None:
    genes = demo_cells.genes.copy()
    genes[genes == "ACTB"] = "VWF"
    write_report(result, tmp_path, replace(demo_cells, genes=genes))
    table = anndata.read_h5ad(tmp_path / "result.h5ad")
    assert table.var_names.is_unique and (table.var["symbol"] == "VWF").sum() == 2


def test_other_cells_are_refused(result: Result, demo_cells: Cells) -> None:
    with pytest.raises(BadInput, match=r"result\.h5ad lack 'cell-9'"):
        report_files(result, demo_cells.take(slice(0, 5)))
    counts = demo_cells.counts.tolil(copy=True)
    counts[3, int(np.flatnonzero(demo_cells.genes == "GAPDH")[0])] += 1
    with pytest.raises(BadInput, match="GAPDH in cell cell-3 where the result saw"):
        report_files(result, demo_cells.with_counts(counts.tocsr()))
