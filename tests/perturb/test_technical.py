"""Technical null: exchangeable clouds give uniform p, ties make a cloud, their absence a point."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from ge2hist_core import rng
from ge2hist_core.config import READER_CLASSES, SampleConfig
from ge2hist_core.model import GE2Hist
from ge2hist_core.niche import niche_stats
from ge2hist_core.sampler import Stopped
from ge2hist_core.types import BadInput, Cells
from perturb.edits import Perturbation
from perturb.recipe import Recipe
from perturb.result import Result
from perturb.run import run
from perturb.technical import Redraws, left_cloud, readout_null, redraw, state_null


def recipe(model: GE2Hist, edit: str, cells: tuple[str, ...] = ("cell-3",)) -> Recipe:
    return Recipe("d" * 64, model.sha256, cells, Perturbation.parse(edit), SampleConfig(steps=2), (4, 7, 9))


@pytest.fixture(scope="module")
def result(tiny_bundle: GE2Hist, demo_cells: Cells) -> Result:
    return run(recipe(tiny_bundle, "GAPDH:x4,CD8A:set=9", ("cell-3", "cell-9")), tiny_bundle, demo_cells)


@pytest.fixture(scope="module")
def redraws(tiny_bundle: GE2Hist, demo_cells: Cells) -> Redraws:
    return redraw(tiny_bundle, demo_cells.take([3, 9]), encoder_seed=0, draws=5)


def test_a_redraw_among_redraws_has_a_uniform_p() -> None:
    draws = np.abs(rng.stream(0, "clouds").standard_normal((2000, 20)))
    p = np.array([left_cloud(row[0], row[1:])[1] for row in draws])
    assert set(np.round(20 * p, 9)) <= set(range(1, 21))
    assert abs((p <= 0.05).mean() - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 2000)
    assert abs((p <= 0.5).mean() - 0.5) < 4 * math.sqrt(0.25 / 2000)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=20), st.floats(0, 20), st.floats(0, 5))
def test_a_larger_distance_never_has_the_larger_p(cloud: list[float], distance: float, more: float) -> None:
    near, far = left_cloud(distance, np.array(cloud))[1], left_cloud(distance + more, np.array(cloud))[1]
    assert 1 / (len(cloud) + 1) <= far <= near <= 1


def test_nothing_to_compare_has_no_p() -> None:
    for distance, cloud in ((math.nan, [1.0]), (1.0, []), (1.0, [math.nan])):
        assert all(math.isnan(value) for value in left_cloud(distance, np.array(cloud)))
    ratio, p = left_cloud(0.0, np.zeros(9))
    assert math.isnan(ratio) and p == 1


def test_redraws_are_encodings_of_the_same_cells_under_other_seeds(
    redraws: Redraws, tiny_bundle: GE2Hist, demo_cells: Cells
) -> None:
    assert len(set(redraws.seeds)) == 5 and 0 not in redraws.seeds
    again = tiny_bundle.embed(demo_cells.take([3, 9]), redraws.seeds[2])
    np.testing.assert_array_equal(redraws.embedding[2], again)
    np.testing.assert_array_equal(redraws.z_e[2], tiny_bundle.encode(again).z_e)
    np.testing.assert_array_equal(redraw(tiny_bundle, demo_cells.take([3]), 0, 2).z_c[:, 0], redraws.z_c[:2, 0])


def test_distances_of_the_edit_are_set_against_those_of_the_redraws(result: Result, redraws: Redraws) -> None:
    table = state_null(result.recipe, redraws, result.base_arm, result.edited_arm)
    assert sorted(zip(table["cell_id"], table["space"], strict=True)) == [
        (cell, space) for cell in ("cell-3", "cell-9") for space in ("embedding", "z_c", "z_e")
    ]
    row = table[(table["cell_id"] == "cell-9") & (table["space"] == "z_e")].iloc[0]
    cloud = [math.dist(z[1], result.base_arm.latent.z_e[1]) for z in redraws.z_e]
    distance = math.dist(result.edited_arm.latent.z_e[1], result.base_arm.latent.z_e[1])
    assert row["distance"] == pytest.approx(distance)
    assert row["cloud"] == pytest.approx(math.sqrt(sum(d * d for d in cloud) / 5))
    assert row["p"] == (1 + sum(d >= distance for d in cloud)) / 6
    assert row["n"] == 5 and row["ratio"] == pytest.approx(row["distance"] / row["cloud"]) and not row["point"]


def test_a_cell_without_ties_has_a_point_for_a_cloud_which_any_edit_leaves(tiny_bundle: GE2Hist) -> None:
    genes = np.array(["CD8A", "CD4", "MKI67", "VEGFA", "LYZ"])
    cells = Cells(sp.csr_matrix(np.array([[1.0, 2, 4, 8, 16]])), genes, np.array(["one"]))
    redraws = redraw(tiny_bundle, cells, 0, draws=4)
    tables = {}
    for edit in ("CD8A:ko", "CD8A:x1"):
        one = run(recipe(tiny_bundle, edit, ("one",)), tiny_bundle, cells)
        tables[edit] = state_null(one.recipe, redraws, one.base_arm, one.edited_arm)
    assert tables["CD8A:ko"]["point"].all() and np.isinf(tables["CD8A:ko"]["ratio"]).all()
    assert (tables["CD8A:ko"]["p"] == 1 / 5).all() and (tables["CD8A:x1"]["p"] == 1).all()


def test_readouts_are_means_over_pictures_of_the_unedited_cells_with_other_noise(
    result: Result, redraws: Redraws, tiny_bundle: GE2Hist
) -> None:
    table = readout_null(result.recipe, tiny_bundle, redraws, result.base_arm, result.edited_arm, seeds=2)
    row = table.set_index("readout").loc["density"]
    keep = [0, 1, 3, 4]
    density = {
        name: np.mean([niche_stats(arm.nuclei[i], (16.0, 16.0), READER_CLASSES).density_per_mm2 for i in keep])
        for name, arm in (("base", result.base_arm), ("edited", result.edited_arm))
    }
    assert row["base"] == pytest.approx(density["base"]) and row["edited"] == pytest.approx(density["edited"])
    assert row["effect"] == pytest.approx(density["edited"] - density["base"]) and row["n"] == 5
    assert row["unit"] == "cells/mm²" and row["cloud"] > 0
    assert 1 / 6 <= row["p"] <= 1 and (6 * row["p"]) % 1 == pytest.approx(0, abs=1e-9)


def test_the_same_noise_and_no_ties_give_the_unedited_arm_again(tiny_bundle: GE2Hist) -> None:
    genes = np.array(["CD8A", "CD4", "MKI67", "VEGFA", "LYZ"])
    cells = Cells(sp.csr_matrix(np.array([[1.0, 2, 4, 8, 16]])), genes, np.array(["one"]))
    one = run(recipe(tiny_bundle, "LYZ:ko", ("one",)), tiny_bundle, cells)
    redraws = redraw(tiny_bundle, cells, 0, draws=2)
    same = readout_null(one.recipe, tiny_bundle, redraws, one.base_arm, one.edited_arm, noise="same")
    assert (same["cloud"].dropna() <= 1e-9).all()
    other = readout_null(one.recipe, tiny_bundle, redraws, one.base_arm, one.edited_arm)
    assert other.set_index("readout").loc["density", "cloud"] > 0


def test_bad_numbers_and_a_stop_are_said(
    result: Result, redraws: Redraws, tiny_bundle: GE2Hist, demo_cells: Cells
) -> None:
    arms = (result.base_arm, result.edited_arm)
    with pytest.raises(BadInput, match="number of redraws is 0: choose at least 1"):
        redraw(tiny_bundle, demo_cells.take([3]), 0, draws=0)
    with pytest.raises(BadInput, match="noise is 'none': choose other or same"):
        readout_null(result.recipe, tiny_bundle, redraws, *arms, noise="none")
    with pytest.raises(BadInput, match="seeds is 4: choose 1 to 3"):
        readout_null(result.recipe, tiny_bundle, redraws, *arms, seeds=4)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        readout_null(result.recipe, tiny_bundle, redraws, *arms, cancel=stop)
