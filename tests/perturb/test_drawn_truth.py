"""Edits through the whole chain: the plan, the smallest effect, coverage of planted conditionals."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from ge2hist_core.types import BadInput
from perturb import drawn_truth
from perturb.drawn_truth import Design, Pair, perturbation, plan, smallest_effect
from perturb.known_truth import programme_factors
from perturb.known_truth_summary import Case
from perturb.true_effects import READOUTS


def result_of(difference: np.ndarray, first_seed: int = 0, step: float = 0.1) -> SimpleNamespace:
    """Readout table of one pair with these differences ``[readout, seed]``, as :func:`perturb.run.run` leaves it."""
    seeds = tuple(range(first_seed, first_seed + difference.shape[1]))
    rows = [
        (arm, "cell", seed, readout, "unit", 100.0 + (arm == "edited") * difference[j, k], step)
        for arm in ("base", "edited")
        for j, readout in enumerate(READOUTS)
        for k, seed in enumerate(seeds)
    ]
    table = pd.DataFrame(rows, columns=["arm", "cell_id", "seed", "readout", "unit", "value", "step"])
    return SimpleNamespace(readouts=table, recipe=SimpleNamespace(seeds=seeds, cell_ids=("cell",)))


def test_differences_come_back_readout_by_readout_and_seed_by_seed() -> None:
    difference = np.random.default_rng(0).normal(0, 1, (len(READOUTS), 5))
    np.testing.assert_allclose(drawn_truth._differences(result_of(difference)), difference, atol=1e-12)


def test_intervals_of_normal_differences_cover_their_own_conditional_in_95_of_100() -> None:
    draw, blocks = np.random.default_rng(1), []
    pair = Pair(Case("inert", "G", 4.0, (("G", 4.0),)), 0, True)
    for i in range(12):
        few, more = (draw.normal(0.3, 1.0, (len(READOUTS), n)) for n in (16, 64))
        blocks += list(drawn_truth._blocks(result_of(few), result_of(more, 16), i, pair))
    found = {(row["seeds"], row["what"]): row for row in drawn_truth._coverage(pd.DataFrame(blocks), 0)}
    for seeds, n in ((8, 10), (16, 5)):
        row = found[seeds, "all"]
        assert row["of"] == 12 * n * len(READOUTS) and row["n_pairs"] == 12
        assert row["value"] == pytest.approx(0.95, abs=0.03)
        assert row["low"] <= row["value"] <= row["high"]


def test_readouts_that_never_vary_do_not_count_as_covered() -> None:
    pair = Pair(Case("inert", "G", 0.0, (("G", 0.0),)), 0, True)
    nothing = np.zeros((len(READOUTS), 4))
    assert not list(drawn_truth._blocks(result_of(nothing), result_of(nothing, 4), 0, pair))


def test_intervals_of_seeds_without_a_change_hold_a_rare_one() -> None:
    """Of 16 and 64 seeds the last 8 change by half a nucleus; blocks of zeros still allow for it."""
    few, more = np.zeros((len(READOUTS), 16)), np.zeros((len(READOUTS), 64))
    more[:, -8:] = 0.5
    pair = Pair(Case("inert", "G", 0.0, (("G", 0.0),)), 0, True)
    blocks = pd.DataFrame(drawn_truth._blocks(result_of(few, step=1.0), result_of(more, 16, 1.0), 0, pair))
    found = {(row["seeds"], row["what"]): row for row in drawn_truth._coverage(blocks, 0)}
    # The block of eight changes, and that of sixteen which is half ones, are far from all others.
    assert found[8, "density"]["of"] == 10 and found[8, "density"]["value"] == 0.9
    assert found[16, "density"]["of"] == 5 and found[16, "density"]["value"] == 0.8


def test_the_smallest_effect_is_found_by_a_t_test_as_often_as_said() -> None:
    effect = smallest_effect(2.0, 16)
    draws = np.random.default_rng(2).normal(effect, 2.0, (20000, 16))
    assert (ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.01)
    # With many seeds Student's quantiles are the normal ones.
    assert smallest_effect(2.0, 1000) == pytest.approx((1.959964 + 0.841621) * 2.0 / np.sqrt(1000), rel=5e-3)


def test_shares_of_tests_are_counted_over_edits_and_a_refused_null_is_covered() -> None:
    table = pd.DataFrame(
        {
            "pair": [0, 0, 1, 1],
            "role": "inert",
            "donor": ["a", "a", "b", "b"],
            "readout": ["density", READOUTS[1]] * 2,
            "effect": [3.0, 0.0, -1.0, 0.0],
            "low": [1.0, -1.0, -2.0, 0.0],
            "high": [5.0, 1.0, 0.5, 0.0],
            "p": [0.01, 0.8, 0.2, 1.0],
            "q": [0.06, 0.8, 0.4, 1.0],
            "true": 0.0,
            "variance": [4.0, 1.0, 16.0, 1.0],
        }
    )
    found = {row["readout"]: row for row in drawn_truth._tests(table, 0)}
    assert found["all"]["p"]["value"] == 0.25 and found["all"]["q"]["value"] == 0
    assert found["all"]["covers_truth"]["value"] == 0.75 and found["density"]["p"]["value"] == 0.5
    assert found["all"]["n_edits"] == 2 and found["all"]["sign"]["value"] is None
    smallest = {row["readout"]: row for row in drawn_truth._smallest(table, 16)}
    assert smallest["density"]["sd"] == pytest.approx(np.sqrt(10), rel=1e-4)
    assert smallest["density"]["effect"] == pytest.approx(smallest_effect(np.sqrt(10), 16), rel=1e-4)


def test_the_app_would_write_the_same_edit() -> None:
    factors = tuple(programme_factors("hypoxia", 4.0).items())
    text = str(perturbation(Case("programme", "hypoxia", 4.0, factors)))
    assert text == ",".join(f"{gene}:{'ko' if f == 0 else f'x{f:g}'}" for gene, f in factors)


def test_cells_are_of_many_donors_and_single_genes_are_expressed() -> None:
    import scipy.sparse as sp

    from ge2hist_core.simulator.expression import load_genes
    from ge2hist_core.types import Cells

    table, n = load_genes(), 40
    counts = np.random.default_rng(3).poisson(1.5, (n, len(table.symbols))).astype(np.float32)
    donor = np.array([f"d{i % 5}" for i in range(n)])
    cells = Cells(sp.csr_matrix(counts), table.symbols, np.array([f"c{i}" for i in range(n)]), donor=donor)
    design = Design(cells=4, wide_cells=6, long_cells=2)
    pairs, wide = plan(SimpleNamespace(cells=cells), np.arange(n), design, seed=0)
    assert len(pairs) == 4 * (design.inert + design.reporters + design.programmes)
    assert len({donor[pair.row] for pair in pairs}) == 4 and len(wide) == 6
    assert not {pair.row for pair in pairs} & set(wide)
    column, role = {g: j for j, g in enumerate(table.symbols)}, dict(zip(table.symbols, table.role, strict=True))
    for pair in pairs:
        if pair.case.role != "programme":
            assert counts[pair.row, column[pair.case.name]] >= 2 and role[pair.case.name] == pair.case.role
    assert {pair.case.dose for pair in pairs if pair.case.role == "inert"} == {0.0, 4.0}
    assert sum(pair.further for pair in pairs) == 2 * design.long_cells
    assert len({pair.case.name for pair in pairs if pair.case.role == "programme"}) == 6
    with pytest.raises(BadInput, match="lower --pictures"):
        plan(SimpleNamespace(cells=cells), np.arange(n), Design(cells=30, wide_cells=20))


def test_the_cost_is_that_of_the_pictures_that_are_drawn() -> None:
    design = Design(cells=2, inert=1, reporters=1, programmes=1, seeds=(0, 1, 2), further=5, long_cells=1, wide_cells=4)
    # Two cells with base and three edits at 3 seeds; one with base and two edits at 5; 12 edits of 4 cells in 3 arms.
    assert design.pictures == 2 * 4 * 3 + 3 * 5 + 4 * (1 + 12 * 3)
    with pytest.raises(BadInput, match="--pictures is 0"):
        Design.of(0)
