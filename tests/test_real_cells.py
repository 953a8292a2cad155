"""Real cells go the whole way through the shipped bundle: types, support, a knock-out, its report.

The data are not part of the project; the tests run where a folder ``shared/data`` lies beside it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ge2hist_core.config import SampleConfig
from ge2hist_core.data import open_h5ad
from ge2hist_core.encoding import agreement, encode_cells, read_type_map
from ge2hist_core.model import GE2Hist
from ge2hist_core.support import OUTSIDE
from perturb.edits import Perturbation
from perturb.recipe import Recipe
from perturb.report import html
from perturb.run import cells_for, run

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
BREAST, LUNG = DATA / "xenium_breast" / "ghist_breast_cells.h5ad", DATA / "xenium_lung" / "NCBI858.h5ad"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the real data are not beside the project")


@pytest.fixture(scope="module")
def model() -> GE2Hist:
    return GE2Hist.load(ROOT / "assets" / "demo_bundle")


def test_breast_cells_are_known_by_their_genes_and_their_types_are_compared(model: GE2Hist) -> None:
    with open_h5ad(BREAST, model.scgpt.vocab) as source:
        assert source.preview.n_known / source.preview.n_genes > 0.9
        rows = np.arange(0, len(source), 20)
        cells = source.take(rows, allow_empty=True)
        encoded = encode_cells(model, _Part(source, rows))
        table = agreement(cells.cell_type, encoded.cell_type, read_type_map(ROOT / "assets/type_maps/xenium_breast.csv",
                                                                            model.cell_types))  # fmt: skip
    assert table["recall"].notna().all() and table["n"].sum() == encoded.known.sum()
    # Nothing of these cells was learned from; by chance a tenth would be right.
    assert table["right"].sum() / table["n"].sum() > 0.2


class _Part:
    """Some rows of an open file, as a file of their own."""

    def __init__(self, source, rows: np.ndarray) -> None:
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows, *, allow_empty: bool = False):
        return self.source.take(self.rows[rows], allow_empty=allow_empty)


def test_a_knock_out_in_a_breast_cell_goes_to_pictures_numbers_and_report(model: GE2Hist) -> None:
    with open_h5ad(BREAST, model.scgpt.vocab) as source:
        row = int(np.flatnonzero((source.cell_type == "Malignant") & ~source.empty)[0])
        cell = str(source.cell_id[row])
        cells = cells_for(source, (cell,))
        expressed = cells.genes[cells.counts[0].toarray()[0] > 0]
        gene = str(next(gene for gene in expressed if gene in model.scgpt.vocab))
        recipe = Recipe(
            source.sha256, model.sha256, (cell,), Perturbation.parse(f"{gene}:ko"), SampleConfig(steps=4), (0, 1)
        )
    result = run(recipe, model, cells)
    assert result.edits["bin_before"].item() > 0 == result.edits["bin_after"].item()
    assert (result.base_arm.images != result.edited_arm.images).any()
    assert result.comparison.set_index("readout").loc["density", ["base", "edited"]].notna().all()
    page = html(result)
    assert f"{gene} is knocked out" in page and cell in page


def test_lung_cells_are_said_to_lie_outside(model: GE2Hist) -> None:
    with open_h5ad(LUNG, model.scgpt.vocab) as source:
        rows = np.arange(0, len(source), 4)
        encoded = encode_cells(model, _Part(source, rows))
    assert (encoded.support[encoded.known] < OUTSIDE).mean() > 0.9
