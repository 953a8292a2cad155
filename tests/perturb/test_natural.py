"""Planted truth: a confounder that matching must take out, an effect that it must leave, niches counted by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from ge2hist_core.config import CELL_TYPES, READER_CLASSES
from ge2hist_core.types import BadInput, Cells
from perturb.natural import LABEL, match_pairs, natural_experiment, niche_readouts, split_cells

N = 600


def planted(effect: float, seed: int = 0) -> tuple[Cells, pd.DataFrame]:
    """A confounder raises gene G, twelve marker genes and the density; G itself adds ``effect`` times its log count."""
    draws = np.random.default_rng(seed)
    confounder = draws.normal(size=N)
    gene = draws.poisson(np.exp(1.5 + 0.4 * confounder))
    markers = draws.poisson(np.exp(3.0 + 0.6 * confounder[:, None]), size=(N, 12))
    others = draws.poisson(20.0, size=(N, 30))
    density = 1000 + 50 * confounder + effect * np.log1p(gene) + draws.normal(0, 20, N)
    cells = Cells(
        counts=np.column_stack([gene, markers, others]),
        genes=np.array(["G", *(f"M{i}" for i in range(12)), *(f"O{i}" for i in range(30))]),
        cell_id=np.array([f"c{i}" for i in range(N)]),
        cell_type=np.repeat("Fibroblast", N),
        donor=np.array([f"d{i % 10}" for i in range(N)]),
    )
    return cells, pd.DataFrame({"density": density}, index=cells.cell_id)


def test_matching_takes_a_planted_confounder_out() -> None:
    cells, readouts = planted(effect=0.0)
    found = natural_experiment(cells, "G", "Fibroblast", readouts)
    row = found.table.set_index("readout").loc["density"]
    assert row["before"] > 20
    assert abs(row["difference"]) < 0.3 * row["before"] and row["low"] < 0.25 * row["before"]
    score = found.balance.set_index("covariate").loc["propensity (log odds)"]
    assert score["before"] > 0.5 and abs(score["after"]) < 0.1
    assert found.label == LABEL and row["n"] == len(found.pairs) and row["donors"] == 10


def test_matching_leaves_a_planted_effect() -> None:
    cells, readouts = planted(effect=60.0)
    found = natural_experiment(cells, "G", "Fibroblast", readouts)
    counts = dict(zip(cells.cell_id, np.log1p(cells.counts.toarray()[:, 0]), strict=True))
    true = 60 * np.mean(
        [counts[h] - counts[low] for low, h in zip(found.pairs["low"], found.pairs["high"], strict=True)]
    )
    row = found.table.iloc[0]
    assert row["low"] > 0 and row["p"] < 0.05
    assert row["difference"] == pytest.approx(true, rel=0.2)
    assert row["low"] < true < row["high"] + 0.1 * true


def test_the_numbers_are_those_of_the_pairs(tmp_path) -> None:
    cells, readouts = planted(effect=10.0, seed=3)
    readouts.iloc[::7] = np.nan
    found = natural_experiment(cells, "G", "Fibroblast", readouts)
    value = readouts["density"]
    difference = value[found.pairs["high"]].to_numpy() - value[found.pairs["low"]].to_numpy()
    row = found.table.iloc[0]
    assert row["difference"] == pytest.approx(np.nanmean(difference)) and row["n"] == np.isfinite(difference).sum()
    assert not set(found.pairs["low"]) & set(found.pairs["high"])
    assert found.pairs["low"].is_unique and found.pairs["high"].is_unique
    donor = dict(zip(cells.cell_id, cells.donor, strict=True))
    same = [donor[a] == donor[b] for a, b in zip(found.pairs["low"], found.pairs["high"], strict=True)]
    assert found.pairs["same_donor"].tolist() == same and np.mean(same) > 0.5


def test_the_order_of_cells_and_genes_does_not_matter() -> None:
    cells, readouts = planted(effect=10.0)
    one = natural_experiment(cells, "G", "Fibroblast", readouts)
    draws = np.random.default_rng(1)
    order, genes = draws.permutation(N), draws.permutation(len(cells.genes))
    mixed = cells.take(order)
    mixed = Cells(mixed.counts[:, genes], mixed.genes[genes], mixed.cell_id, mixed.cell_type, mixed.donor)
    other = natural_experiment(mixed, "G", "Fibroblast", readouts.sample(frac=1, random_state=0))
    assert set(zip(one.pairs["low"], one.pairs["high"], strict=True)) == set(
        zip(other.pairs["low"], other.pairs["high"], strict=True)
    )
    assert other.table["difference"][0] == pytest.approx(one.table["difference"][0])


def test_pairs_agree_in_the_propensity_and_donors_come_first() -> None:
    draws = np.random.default_rng(2)
    x = draws.normal(size=(200, 3))
    treated = draws.random(200) < 1 / (1 + np.exp(-x[:, 0]))
    donor = np.array([f"d{i % 4}" for i in range(200)])
    score, pairs = match_pairs(x, treated, donor)
    assert not treated[pairs[:, 0]].any() and treated[pairs[:, 1]].all()
    assert np.abs(np.diff(score[pairs], axis=1)).max() <= 0.2 * score.std()
    assert len(set(pairs.ravel())) == pairs.size
    alone, same = match_pairs(x[donor == "d1"], treated[donor == "d1"]), donor[pairs] == "d1"
    assert (same.all(axis=1)).sum() > 0.5 * len(alone[1])
    # Mirror images pair with each other: nothing else is as near.
    mirrored = np.repeat(np.arange(30.0), 2)[:, None]
    _, twins = match_pairs(mirrored, np.tile([False, True], 30))
    assert (mirrored[twins[:, 0]] == mirrored[twins[:, 1]]).all() and len(twins) == 30


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        ([0, 0, 0, 0, 5, 6, 7, 8, 9], {0, 1, 2, 3}, {6, 7, 8}),
        ([0, 0, 0, 0, 0, 0, 0, 4, 5], {0, 1, 2, 3, 4, 5, 6}, {7, 8}),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], {0, 1, 2}, {6, 7, 8}),
    ],
)
def test_low_and_high_cells(counts: list[int], low: set[int], high: set[int]) -> None:
    rest = 100 - np.array(counts)  # equal totals: the share is the count
    cells = Cells(np.column_stack([counts, rest]), np.array(["G", "R"]), np.array([f"c{i}" for i in range(9)]))
    found = split_cells(cells, "G")
    assert (set(found.low), set(found.high)) == (low, high)


def test_niches_are_counted_in_a_square_around_each_cell() -> None:
    draws = np.random.default_rng(3)
    n = 400
    cells = Cells(
        np.ones((n, 1)), np.array(["G"]), np.array([f"c{i}" for i in range(n)]), draws.choice(CELL_TYPES, n),
        np.repeat(["a", "b"], n // 2), draws.uniform(0, 200, (n, 2)),
    )  # fmt: skip
    found = niche_readouts(cells)
    lymphocytes = ("CD4 T cell", "CD8 T cell", "B cell")
    for cell_id in found.index[::20]:
        i = int(cell_id[1:])
        mine = cells.donor == cells.donor[i]
        near = mine & (np.abs(cells.xy_um - cells.xy_um[i]).max(axis=1) <= 32)
        assert found.at[cell_id, "density"] == pytest.approx(near.sum() / 0.064**2)
        share = np.isin(cells.cell_type[near], lymphocytes).mean()
        assert found.at[cell_id, "fraction:Lymphocyte"] == pytest.approx(share)
        low, high = cells.xy_um[mine].min(axis=0), cells.xy_um[mine].max(axis=0)
        assert (cells.xy_um[i] >= low + 32).all() and (cells.xy_um[i] <= high - 32).all()
    np.testing.assert_allclose(found[[f"fraction:{name}" for name in READER_CLASSES]].sum(axis=1), 1.0)


def test_beside_the_model_both_speak_of_the_edit() -> None:
    cells, readouts = planted(effect=60.0)
    found = natural_experiment(cells, "G", "Fibroblast", readouts)
    comparison = pd.DataFrame({"readout": ["density"], "effect": [-5.0], "low": [-8.0], "high": [-2.0]})
    edits = pd.DataFrame({"gene": ["G"], "count_before": [4.0], "count_after": [0.0]})
    table = found.beside(SimpleNamespace(edits=edits, comparison=comparison))
    row, natural = table.iloc[0], found.table.iloc[0]
    assert (row["natural"], row["natural_low"], row["natural_high"]) == pytest.approx(
        (-natural["difference"], -natural["high"], -natural["low"])
    )
    assert row["agree"] is True
    raised = edits.assign(count_after=9.0)
    assert found.beside(SimpleNamespace(edits=raised, comparison=comparison)).iloc[0]["agree"] is False
    unclear = comparison.assign(low=-20.0, high=3.0)
    assert found.beside(SimpleNamespace(edits=edits, comparison=unclear)).iloc[0]["agree"] is None
    with pytest.raises(BadInput, match="does not change G"):
        found.beside(SimpleNamespace(edits=edits.assign(count_after=4.0), comparison=comparison))


def test_without_donors_the_interval_is_said_to_be_too_narrow() -> None:
    cells, readouts = planted(effect=0.0)
    bare = Cells(cells.counts, cells.genes, cells.cell_id, cells.cell_type)
    found = natural_experiment(bare, "G", "Fibroblast", readouts)
    assert any("too narrow" in warning for warning in found.warnings)
    assert found.table["donors"][0] == 0 and not math.isnan(found.table["low"][0])


def test_what_cannot_be_compared_is_refused_with_a_cure() -> None:
    cells, readouts = planted(effect=0.0)
    with pytest.raises(BadInput, match="no gene 'X'"):
        natural_experiment(cells, "X", "Fibroblast", readouts)
    with pytest.raises(BadInput, match="choose Fibroblast"):
        natural_experiment(cells, "G", "B cell", readouts)
    with pytest.raises(BadInput, match="positions"):
        natural_experiment(cells, "G", "Fibroblast")
    with pytest.raises(BadInput, match="20 are needed"):
        natural_experiment(cells, "G", "Fibroblast", readouts.iloc[:30])
    constant = Cells(np.ones((5, 2)), np.array(["G", "R"]), np.array(list("abcde")))
    with pytest.raises(BadInput, match="the same in all 5 cells"):
        split_cells(constant, "G")
    untyped = Cells(cells.counts, cells.genes, cells.cell_id)
    with pytest.raises(BadInput, match="no cell types"):
        natural_experiment(untyped, "G", "Fibroblast", readouts)
    narrow = Cells(np.ones((3, 1)), np.array(["G"]), np.array(list("abc")), np.repeat("A", 3), None, np.eye(3)[:, :2])
    with pytest.raises(BadInput, match="wider than 64 um"):
        niche_readouts(narrow)
