"""The 2 x 2 exchange: parts that add up, closed forms, pictures that are those of the mixed states."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ge2hist_core.config import SampleConfig
from ge2hist_core.model import GE2Hist
from ge2hist_core.sampler import Stopped
from ge2hist_core.types import BadInput, Cells, Latent
from perturb.cache import DiskCache
from perturb.edits import Perturbation
from perturb.recipe import Recipe
from perturb.result import Result
from perturb.route import PARTS, Route, exchange, route
from perturb.run import Progress, run

QUICK = SampleConfig(steps=2)


def make(model: GE2Hist, cells: Cells, edit: str) -> Result:
    recipe = Recipe("d" * 64, model.sha256, ("cell-3", "cell-9"), Perturbation.parse(edit), QUICK, (0, 1, 2))
    return run(recipe, model, cells)


@pytest.fixture(scope="module")
def result(tiny_bundle: GE2Hist, demo_cells: Cells) -> Result:
    return make(tiny_bundle, demo_cells, "GAPDH:x4,CD8A:set=9")


@pytest.fixture(scope="module")
def found(result: Result, tiny_bundle: GE2Hist) -> Route:
    return route(result, tiny_bundle)


def wide(table: pd.DataFrame) -> pd.DataFrame:
    return table.pivot(index="readout", columns="part", values="effect").dropna()


def test_identity_and_environment_add_up_to_the_effect_of_the_result(found: Route, result: Result) -> None:
    parts = wide(found.table)
    assert len(parts) and set(found.table["part"]) == set(PARTS)
    np.testing.assert_allclose(parts["identity"] + parts["environment"], parts["total"], rtol=1e-9, atol=1e-9)
    assert parts["identity"].abs().max() > 0 and parts["environment"].abs().max() > 0
    comparison = result.comparison.set_index("readout")
    total = found.table[found.table["part"] == "total"].set_index("readout")
    total = total.loc[total.index.intersection(comparison.index)]  # the mixed arms may show further types
    whole = total.index[total["n"] == comparison.loc[total.index, "n"]]
    assert "density" in whole
    columns = ["effect", "low", "high", "p"]
    np.testing.assert_allclose(total.loc[whole, columns], comparison.loc[whole, columns])


def test_the_mixed_pictures_are_drawn_from_the_mixed_states(found: Route, result: Result, tiny_bundle: GE2Hist) -> None:
    old, new = result.base_arm.latent, result.edited_arm.latent
    for arm, state in (
        (found.identity_arm, Latent(new.z_c, old.z_e)),
        (found.environment_arm, Latent(old.z_c, new.z_e)),
    ):
        for cell in range(2):
            picture = tiny_bundle.generate(state.take([cell]), [1], QUICK)[0]
            np.testing.assert_array_equal(arm.images[3 * cell + 1], picture)
    assert found.moved_z_c == pytest.approx(np.mean(result.states["shift_z_c"]))
    assert found.moved_z_e == pytest.approx(np.mean(result.states["shift_z_e"]))


NO_STEPS = {"density": 0.0, "spacing": 0.0}


def test_parts_of_a_product_are_the_shapley_values_written_out() -> None:
    """y = c e with c from 2 to 5 and e from 3 to 4: by hand, over both orders."""
    y = {(c, e): np.full((1, 4), float(c * e)) for c in (2, 5) for e in (3, 4)}
    table = exchange(*({"density": y[key]} for key in ((2, 3), (5, 3), (2, 4), (5, 4))), seed=0, size=NO_STEPS)
    effect = table.set_index("part")["effect"]
    assert effect["total"] == 14.0
    assert effect["identity"] == ((5 - 2) * 3 + (5 - 2) * 4) / 2
    assert effect["environment"] == ((4 - 3) * 2 + (4 - 3) * 5) / 2
    assert effect["interaction"] == (5 - 2) * (4 - 3)


def test_without_interaction_each_part_is_what_its_half_does_alone() -> None:
    draws = np.random.default_rng(0)
    noise, c, e = draws.normal(size=(2, 5)), draws.normal(size=(2, 5)), draws.normal(size=(2, 5))
    arms = [{"spacing": y} for y in (noise, noise + c, noise + e, noise + c + e)]
    effect = exchange(*arms, seed=0, size=NO_STEPS).set_index("part")["effect"]
    assert (effect["identity"], effect["environment"]) == pytest.approx((c.mean(), e.mean()))
    assert effect["interaction"] == pytest.approx(0.0, abs=1e-12)
    # Exchanging the names of the halves exchanges the parts.
    other = exchange(arms[0], arms[2], arms[1], arms[3], seed=0, size=NO_STEPS).set_index("part")
    assert other.at["identity", "effect"] == pytest.approx(effect["environment"])


def test_a_picture_counts_where_all_four_arms_are_defined() -> None:
    draws = np.random.default_rng(1)
    arms = [draws.normal(size=(1, 6)) for _ in range(4)]
    for i, arm in enumerate(arms):
        arm[0, i] = np.nan
    table = exchange(*({"spacing": arm} for arm in arms), seed=0, size=NO_STEPS)
    assert (table["n"] == 2).all()
    effect = table.set_index("part")["effect"]
    assert effect["identity"] + effect["environment"] == pytest.approx(effect["total"])
    assert effect["total"] == pytest.approx((arms[3] - arms[0])[0, 4:].mean())


def test_shares_are_given_where_the_total_is_clear(tiny_bundle: GE2Hist, demo_cells: Cells) -> None:
    still = make(tiny_bundle, demo_cells, "NOTINVOCAB1:x3")
    nothing = route(still, tiny_bundle)
    assert (wide(nothing.table) == 0).all(axis=None) and nothing.shares["identity"].isna().all()
    noise = np.random.default_rng(2).normal(0, 0.01, (1, 8))
    arms = ({"density": y} for y in (noise, noise + 3, noise + 1, noise + 4))
    table = exchange(*arms, seed=0, size=NO_STEPS).set_index("part")
    assert table.at["identity", "effect"] / table.at["total", "effect"] == pytest.approx(0.75)


def test_finished_arms_come_from_the_cache_and_a_cancelled_run_goes_on(
    found: Route, result: Result, tiny_bundle: GE2Hist, tmp_path: Path
) -> None:
    cache, cancel, seen = DiskCache(tmp_path), threading.Event(), []

    def stop_in_the_second_arm(progress: Progress) -> None:
        if progress.fraction > 0.6:
            cancel.set()

    with pytest.raises(Stopped):
        route(result, tiny_bundle, cache=cache, on_progress=stop_in_the_second_arm, cancel=cancel)
    again = route(result, tiny_bundle, cache=cache, on_progress=lambda p: seen.append((p.fraction, p.text)))
    pd.testing.assert_frame_equal(again.table, found.table)
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert seen[0] == (0.5, "Read from the cache")
    third = route(result, tiny_bundle, cache=cache)
    np.testing.assert_array_equal(third.environment_arm.images, found.environment_arm.images)
    pd.testing.assert_frame_equal(third.identity_arm.nuclei[0], found.identity_arm.nuclei[0], check_dtype=False)


def test_another_model_is_refused(result: Result, tiny_bundle: GE2Hist) -> None:
    other = replace(result, recipe=replace(result.recipe, model_sha256="e" * 64))
    with pytest.raises(BadInput, match="eeeeeeeeeeee"):
        route(other, tiny_bundle)
