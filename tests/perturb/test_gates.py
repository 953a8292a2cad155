"""Both arms at the gates, and the nearest supported edit: identities, monotone doses, planted gates."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ge2hist_core.config import SampleConfig
from ge2hist_core.gates import GATES as CORE_GATES
from ge2hist_core.gates import ExpressionGate, Gates, LatentGate, PictureGate, picture_features
from ge2hist_core.model import GE2Hist
from ge2hist_core.types import BadInput, Cells
from perturb.edits import Perturbation
from perturb.gates import GATES, gate_table, nearest_supported, shrink
from perturb.recipe import Recipe
from perturb.result import Result
from perturb.run import run


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> GE2Hist:
    return GE2Hist.load(tiny_folder)


@pytest.fixture(scope="module")
def gates(model: GE2Hist, demo_cells: Cells) -> Gates:
    """Fitted on thirty cells and ranked among the other thirty; pictures among those that the model draws."""
    embedding = model.embed(demo_cells, 0)
    latent = model.encode(embedding)
    kind = model.classify(latent).argmax(1)
    one, two = np.arange(0, 60, 2), np.arange(1, 60, 2)
    n_types = len(model.cell_types)
    expression = ExpressionGate.fit(demo_cells.take(one), kind[one], n_types, demo_cells.take(two), kind[two])
    pictures = picture_features(model, model.generate(latent, range(60), SampleConfig(steps=2)))
    return Gates(
        expression,
        LatentGate.fit(model.mixture, latent.take(one), latent.take(two)),
        PictureGate.fit(pictures[one], pictures[two]),
    )


@pytest.fixture(scope="module")
def result(model: GE2Hist, demo_cells: Cells) -> Result:
    perturbation = Perturbation.parse("GAPDH:set=5000,CD8A:ko")
    recipe = Recipe("d" * 64, model.sha256, ("cell-3", "cell-9"), perturbation, SampleConfig(steps=2), (0, 1, 2))
    return run(recipe, model, demo_cells)


def table_of(result: Result, model: GE2Hist, gates: Gates | None, cells: Cells):
    chosen = cells.take([3, 9])
    perturbation = result.recipe.perturbation
    edited = perturbation.apply(chosen, cells)
    return gate_table(model, gates, chosen, edited, perturbation.genes, result.base_arm, result.edited_arm)


def test_both_arms_pass_every_gate_and_the_smallest_p_counts_four_times(
    result: Result, model: GE2Hist, gates: Gates, demo_cells: Cells
) -> None:
    assert GATES == CORE_GATES
    table = table_of(result, model, gates, demo_cells)
    assert list(zip(table["cell_id"], table["arm"], strict=True)) == [
        ("cell-3", "base"), ("cell-9", "base"), ("cell-3", "edited"), ("cell-9", "edited"),
    ]  # fmt: skip
    values = table[list(GATES)]
    assert values.notna().all(axis=None)
    np.testing.assert_allclose(table["p"], np.minimum(1, 4 * values.min(axis=1)))
    assert list(table["gate"]) == list(values.idxmin(axis=1))
    assert list(table["inside"]) == [bool(p >= 0.05) for p in table["p"]]
    # 5,000 counts of one gene: no cell of any type has as many, and thirty cells give 1 / 31 at the least.
    edited = table[table["arm"] == "edited"]
    np.testing.assert_allclose(edited["range"], 1 / 31)
    # Other genes are not edited and do not move.
    base = table[table["arm"] == "base"]
    assert (edited["profile"].to_numpy() <= base["profile"].to_numpy()).all()


def test_a_bundle_without_gates_has_the_embedding_alone(result: Result, model: GE2Hist, demo_cells: Cells) -> None:
    table = table_of(result, model, None, demo_cells)
    assert table[["expression", "latent", "picture", "range"]].isna().all(axis=None)
    np.testing.assert_allclose(table["p"], [*result.base_arm.support, *result.edited_arm.support])
    assert (table["gate"] == "embedding").all()
    bare = GE2Hist.load(model.folder)
    bare.support = None
    table = table_of(result, bare, None, demo_cells)
    assert table["p"].isna().all() and list(table["inside"]) == [None] * 4 and (table["gate"] == "").all()


# --- weaker edits ------------------------------------------------------------------------------------------------

EDITS = "GAPDH:ko,CD8A:x4,VEGFA:x0.25,MYSTERY@2(MKI67:x2;ACTB:ko)"


@pytest.mark.parametrize("edit", ["GAPDH:ko", EDITS.replace("MYSTERY", "drug"), "GAPDH:set=900,GAPDH:x2"])
def test_the_whole_share_is_the_edit_and_none_is_no_edit(edit: str, demo_cells: Cells) -> None:
    perturbation = Perturbation.parse(edit)
    cell = demo_cells.take([3])
    assert shrink(perturbation, cell, 1.0) == perturbation
    assert not shrink(perturbation, cell, 0.0)


def test_half_of_each_kind_of_edit(demo_cells: Cells) -> None:
    cell = demo_cells.take([3])
    own = float(cell.counts[0, list(cell.genes).index("GAPDH")])
    half = {
        "GAPDH:ko": "GAPDH:x0.5",
        "GAPDH:x4": "GAPDH:x2",
        "GAPDH:x0.25": "GAPDH:x0.5",
        "GAPDH:x0": "GAPDH:x0.5",
        "GAPDH:set=100": f"GAPDH:set={(own + 100) / 2:g}",
        "drug@-1.5(GAPDH:x4;CD8A:ko)": "drug@-0.75(GAPDH:x2;CD8A:x0.5)",
        "set(GAPDH:x4)": "set(GAPDH:x2)",
        # The second acts on what the first leaves.
        "GAPDH:x4,GAPDH:set=0": f"GAPDH:x2,GAPDH:set={own:g}",
    }
    for edit, expected in half.items():
        assert str(shrink(Perturbation.parse(edit), cell, 0.5)) == expected


def test_a_percentile_is_approached_from_the_cells_own_count(demo_cells: Cells) -> None:
    from dataclasses import replace

    reference = replace(demo_cells, cell_type=np.array(["one"] * 60))
    cell = reference.take([3])
    column = list(cell.genes).index("ACTB")
    own, top = float(cell.counts[0, column]), float(reference.counts[:, column].max())
    weaker = shrink(Perturbation.parse("ACTB:p100"), cell, 0.25, reference)
    assert weaker.edits[0].kind == "set" and weaker.edits[0].amount == pytest.approx(own + 0.25 * (top - own), rel=1e-5)


@given(st.sampled_from(["GAPDH:ko", "GAPDH:x3.3", "GAPDH:x0.1", "GAPDH:set=77", "CD8A:set=0"]), st.integers(1, 63))
def test_more_of_an_edit_moves_the_count_further_the_same_way(demo_cells: Cells, edit: str, step: int) -> None:
    cell = demo_cells.take([3])
    perturbation = Perturbation.parse(edit)
    column = list(cell.genes).index(perturbation.genes[0])
    counts = [
        float(shrink(perturbation, cell, share).apply(cell).counts[0, column])
        for share in (0, step / 64, (step + 1) / 64)
    ]
    change = np.diff(counts)
    assert (change >= -1e-4).all() or (change <= 1e-4).all()


def test_what_cannot_be_weakened_is_said(demo_cells: Cells) -> None:
    knock_out = Perturbation.parse("GAPDH:ko")
    with pytest.raises(BadInput, match="2 cells were given to weaken an edit for: give one"):
        shrink(knock_out, demo_cells.take([1, 2]), 0.5)
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(BadInput, match="share of an edit is .*: choose a number from 0 to 1"):
            shrink(knock_out, demo_cells.take([1]), share)
    with pytest.raises(BadInput, match="The data have no gene 'GAPDX'"):
        shrink(Perturbation.parse("GAPDX:ko"), demo_cells.take([1]), 0.5)


# --- the nearest supported edit ----------------------------------------------------------------------------------


def test_an_edit_inside_the_data_is_returned_as_it_is(model: GE2Hist, gates: Gates, demo_cells: Cells) -> None:
    cell = demo_cells.take([4])
    same = Perturbation.parse("GAPDH:x1.001,CD8A:x0.999")
    found = nearest_supported(same, cell, model, gates)
    assert found is not None and found.perturbation == same and found.share == 1 and found.p == found.p_asked >= 0.05


def test_an_edit_beyond_the_data_is_weakened_to_the_last_dose_inside(
    model: GE2Hist, gates: Gates, demo_cells: Cells
) -> None:
    """Found by trying all 33 doses one after the other, through the gates themselves."""
    strong, alpha, grid = Perturbation.parse("GAPDH:set=300"), 0.25, 32

    def p(one: Perturbation, cell: Cells) -> float:
        kind = model.classify(model.encode(model.embed(cell, 0))).argmax(1)
        cells = one.apply(cell)
        embedding = model.embed(cells, 0)
        table = gates.cell_p(model, cells, embedding, model.encode(embedding), kind, edited=("GAPDH",), unedited=cell)
        return min(1.0, 3 * table[["expression", "embedding", "latent"]].min(axis=1).item())

    driven_out = 0
    for i in range(len(demo_cells)):
        cell = demo_cells.take([i])
        if p(Perturbation(), cell) < alpha or p(strong, cell) >= alpha:
            continue
        doses = [p(shrink(strong, cell, k / grid), cell) for k in range(grid + 1)]
        found = nearest_supported(strong, cell, model, gates, alpha=alpha, grid=grid)
        assert found is not None and found.p_asked == doses[-1] < alpha
        step = round(found.share * grid)
        assert doses[step] == found.p >= alpha > doses[step + 1]
        assert found.perturbation == shrink(strong, cell, found.share)
        inside = np.array(doses) >= alpha
        if (np.diff(inside.astype(int)) <= 0).all():
            assert step == inside.sum() - 1
            driven_out += step > 0
        if driven_out == 3:
            return
    raise AssertionError("too few cells start inside and are driven out at a dose above 0")


def test_an_edit_that_silences_the_cell_is_outside_and_weakened(
    model: GE2Hist, gates: Gates, demo_cells: Cells
) -> None:
    cell = demo_cells.take([4])
    expressed = [str(g) for g in cell.genes[cell.counts[0].toarray()[0] > 0] if g in model.scgpt.vocab]
    silence = Perturbation.parse("all(" + ";".join(f"{gene}:ko" for gene in expressed) + ")")
    found = nearest_supported(silence, cell, model, gates)
    assert found is not None and 0 <= found.share < 1 and math.isnan(found.p_asked)


def test_a_cell_outside_has_no_supported_edit_and_neither_has_a_bundle_without_gates(
    model: GE2Hist, gates: Gates, demo_cells: Cells
) -> None:
    strange = Perturbation.parse("GAPDH:set=100000,CD8A:set=100000").apply(demo_cells.take([4]))
    edit = Perturbation.parse("GAPDH:x0.5")
    assert nearest_supported(edit, strange, model, gates, alpha=0.2) is None
    bare = GE2Hist.load(model.folder)
    bare.support = None
    assert nearest_supported(edit, demo_cells.take([4]), bare, None) is None


def test_another_way_of_applying_the_edit_is_judged(model: GE2Hist, gates: Gates, demo_cells: Cells) -> None:
    cell = demo_cells.take([4])
    asked: list[str] = []

    def apply(one: Perturbation) -> Cells:
        asked.append(str(one))
        return one.apply(cell)

    nearest_supported(Perturbation.parse("GAPDH:x2"), cell, model, gates, apply=apply)
    assert asked[:2] == ["", "GAPDH:x2"]


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1.0, math.nan])
def test_alpha_is_a_level(model: GE2Hist, gates: Gates, demo_cells: Cells, alpha: float) -> None:
    with pytest.raises(BadInput, match="alpha is .*: choose a number between 0 and 1"):
        nearest_supported(Perturbation.parse("GAPDH:ko"), demo_cells.take([4]), model, gates, alpha=alpha)


def test_a_grid_has_doses(model: GE2Hist, gates: Gates, demo_cells: Cells) -> None:
    with pytest.raises(BadInput, match="grid is 0: choose at least 1 dose"):
        nearest_supported(Perturbation.parse("GAPDH:ko"), demo_cells.take([4]), model, gates, grid=0)
