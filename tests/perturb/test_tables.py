"""The comparison's table: what has an interval and what cannot have one."""

from __future__ import annotations

import pandas as pd
import pytest

from perturb.edits import Perturbation
from perturb.recipe import Recipe
from perturb.tables import statistics

SEEDS = tuple(range(8))


STEP = 0.5
"""What one nucleus makes of a readout here."""


def recipe(cells: int = 1) -> Recipe:
    names = tuple(f"cell-{i}" for i in range(cells))
    return Recipe("d" * 64, "e" * 64, names, Perturbation.parse("GAPDH:ko"), seeds=SEEDS)


def readouts(density: list[float], share: list[float], cells: int = 1) -> pd.DataFrame:
    """Both readouts after the edit, by picture; before it they are 10 and 0.5."""
    rows = [
        (arm, f"cell-{c}", seed, readout, unit, value if arm == "base" else after[c * len(SEEDS) + i])
        for arm in ("base", "edited")
        for readout, unit, value, after in (
            ("density", "cells/mm²", 10.0, density),
            ("fraction:Lymphocyte", "fraction", 0.5, share),
        )
        for c in range(cells)
        for i, seed in enumerate(SEEDS)
    ]
    return pd.DataFrame(rows, columns=["arm", "cell_id", "seed", "readout", "unit", "value"]).assign(step=STEP)


@pytest.mark.parametrize("cells", [1, 2])
def test_a_readout_that_no_pair_differs_in_may_differ_in_the_next_where_others_do(cells: int) -> None:
    n = cells * len(SEEDS)
    some = [10.0] * (n - 1) + [12.0]
    table = statistics(recipe(cells), readouts(some, [0.5] * n, cells))[1].set_index("readout")
    still = table.loc["fraction:Lymphocyte"]
    assert (still["effect"], still["n"], still["p"]) == (0.0, n, 1.0)
    # The rule of three allows 3 / n of further pairs to change, here by half a step.
    assert STEP / n < still["high"] < 3 * STEP / n and still["low"] == pytest.approx(-still["high"], rel=0.1)
    moved = table.loc["density"]
    assert moved["low"] <= moved["effect"] <= moved["high"] and moved["effect"] == pytest.approx(2 / n)


def test_an_edit_that_moves_nothing_at_all_is_exactly_nothing() -> None:
    table = statistics(recipe(), readouts([10.0] * 8, [0.5] * 8))[1]
    assert (table[["effect", "low", "high"]] == 0).all(axis=None) and (table["p"] == 1).all()


def test_an_arms_interval_stays_where_its_readout_can_be() -> None:
    """Two cells far apart: Student's interval alone would go far below 0 and beyond 1."""
    n = 2 * len(SEEDS)
    table = statistics(recipe(2), readouts([0.0] * 8 + [30.0] * 8, [0.05] * 8 + [0.9] * 8, 2))[0]
    edited = table[table["arm"] == "edited"].set_index("readout")
    assert edited.loc["density", "low"] == 0 and edited.loc["density", "high"] > 30
    assert (edited.loc["fraction:Lymphocyte", ["low", "high"]] == [0.0, 1.0]).all() and n == edited["n"].iloc[0]
