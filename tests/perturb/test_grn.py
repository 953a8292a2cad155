from __future__ import annotations

import gzip
import json
import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from scipy.stats import t as student_t
from sklearn.linear_model import Ridge

from ge2hist_core import rng
from ge2hist_core.config import from_json, to_json
from ge2hist_core.types import BadInput, Cells
from perturb.edits import Perturbation
from perturb.grn import (
    Network,
    Propagation,
    bagged_ridge,
    fit_network,
    log_expression,
    observed_range,
    propagate,
    randomised,
    read_network,
    spread,
)

GENES = list("ABCDE")
WIDE = (np.zeros(5), np.ones(5))
"""A range that cuts nothing but what falls below 0."""


def network(*edges: tuple[str, str, float], **fields) -> Network:
    regulators, targets, weights = zip(*edges, strict=True) if edges else ((), (), ())
    return Network(np.array(regulators), np.array(targets), np.array(weights, dtype=float), **fields)


def edges_of(net: Network) -> dict[tuple[str, str], float]:
    return {(r, t): w for r, t, w in zip(net.regulators, net.targets, net.weights, strict=True)}


def random_network(regulators: int, genes: int, edges: int, seed: int = 0) -> Network:
    draws = rng.stream(seed, "test network")
    pairs = [(f"g{i}", f"g{j}") for i in range(regulators) for j in range(genes) if i != j]
    chosen = [pairs[i] for i in draws.choice(len(pairs), edges, replace=False)]
    return network(*((r, t, w) for (r, t), w in zip(chosen, draws.normal(size=edges), strict=True)))


def cells_of(counts: np.ndarray, genes: list[str], **fields) -> Cells:
    ids = np.array([f"c{i:05d}" for i in range(len(counts))])
    return Cells(sp.csr_matrix(np.asarray(counts, dtype=np.float32)), np.array(genes), ids, **fields)


def one_sentence(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert text.endswith(".") and ". " not in text and "\n" not in text
    return text


# ---- Network -------------------------------------------------------------------------------------------------------


def test_edges_have_one_order_and_one_hash_whatever_the_order_given() -> None:
    edges = [("B", "C", -0.5), ("A", "C", 2.0), ("A", "B", 1.0)]
    first, second = network(*edges, name="x"), network(*reversed(edges), name="y", source="z")
    assert list(zip(first.regulators, first.targets, strict=True)) == [("A", "B"), ("A", "C"), ("B", "C")]
    assert first.sha256 == second.sha256 and re.fullmatch("[0-9a-f]{64}", first.sha256)


@pytest.mark.parametrize(
    "other",
    [
        network(("A", "B", 1.0), ("B", "C", -0.5)),
        network(("A", "B", 1.0), ("B", "C", 0.5000001)),
        network(("A", "B", 1.0), ("C", "B", 0.5)),
        network(("A", "B", 1.0)),
        network(("A", "B", 1.0), ("B", "C", 0.5), signed=False),
        network(("A", "B", 1.0), ("B", "C", 0.5), scale=1000),
    ],
)
def test_what_changes_the_result_changes_the_hash(other: Network) -> None:
    assert other.sha256 != network(("A", "B", 1.0), ("B", "C", 0.5)).sha256


def test_self_loops_are_dropped_and_counted() -> None:
    net = network(("A", "A", 3.0), ("A", "B", 1.0), ("B", "B", 1.0))
    assert edges_of(net) == {("A", "B"): 1.0} and net.n_self_loops == 2
    assert replace(net, name="again").n_self_loops == 2


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([("A", "B", math.nan)], "A -> B has weight nan"),
        ([("A", "B", math.inf)], "A -> B has weight inf"),
        ([("A", "B", 0.0)], "A -> B has weight 0: give a number"),
        ([("A", "B", 2e6)], r"from -1e\+06 to 1e\+06"),
        ([("A", "B", 1.0), ("B", "C", 1.0), ("A", "B", 2.0)], "A -> B is given more than once: keep one"),
        ([("A", " ", 1.0)], "'A' -> ' ' lacks a gene"),
    ],
)
def test_a_bad_edge_is_refused_by_name(edges: list[tuple[str, str, float]], message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        network(*edges)
    one_sentence(error)


def test_arrays_of_different_length_and_a_bad_scale_are_refused() -> None:
    with pytest.raises(ValueError, match="edges have shapes"):
        Network(np.array(["A"]), np.array(["B", "C"]), np.array([1.0]))
    with pytest.raises(BadInput, match="scale is 0: choose a number"):
        network(("A", "B", 1.0), scale=0)


def test_matrix_holds_the_edges_between_the_given_genes() -> None:
    net = network(("A", "B", 1.5), ("B", "A", -2.0), ("A", "X", 9.0), ("C", "A", 0.5))
    matrix = net.matrix(["C", "B", "A"])
    assert matrix.format == "csr"
    np.testing.assert_array_equal(matrix.toarray(), [[0, 0, 0.5], [0, 0, -2.0], [0, 1.5, 0]])
    assert network().matrix(["A", "B"]).nnz == 0


def test_a_gene_in_two_columns_drives_with_their_mean_and_both_are_targets() -> None:
    net = network(("A", "B", 1.0), ("B", "C", 3.0))
    matrix = net.matrix(["A", "B", "A", "B", "C"]).toarray()
    expected = np.zeros((5, 5))
    expected[[0, 0, 2, 2], [1, 3, 1, 3]] = 0.5
    expected[[1, 3], [4, 4]] = 1.5
    np.testing.assert_array_equal(matrix, expected)


def test_edges_without_sign_cannot_be_propagated() -> None:
    with pytest.raises(BadInput, match="'base' has edges without sign: fit it to cells first") as error:
        network(("A", "B", 1.0), signed=False, name="base").matrix(["A", "B"])
    one_sentence(error)


# ---- Recursion -----------------------------------------------------------------------------------------------------

small = st.floats(-2, 2).map(lambda value: round(value, 3))


@given(
    st.lists(small, min_size=25, max_size=25),
    st.lists(st.floats(-1, 1), min_size=10, max_size=10),
    st.lists(st.booleans(), min_size=10, max_size=10),
    st.integers(1, 5),
)
def test_recursion_is_a_sum_of_matrix_powers_where_no_gene_reaches_zero(
    weights: list[float], change: list[float], held: list[bool], steps: int
) -> None:
    """Delta_n of the unedited genes U is delta_E W_EU (I + W_UU + ... + W_UU^(n-1)), cell by cell."""
    w, fixed = np.array(weights).reshape(5, 5), np.array(held).reshape(2, 5)
    delta_0 = np.where(fixed, np.array(change).reshape(2, 5), 0.0)
    found = spread(delta_0, fixed, np.full((2, 5), 1e9), w, steps)
    for cell in range(2):
        u, e = np.flatnonzero(~fixed[cell]), np.flatnonzero(fixed[cell])
        inner = w[np.ix_(u, u)]
        powers = sum((np.linalg.matrix_power(inner, k) for k in range(steps)), np.zeros_like(inner))
        np.testing.assert_allclose(found[cell, u], delta_0[cell, e] @ w[np.ix_(e, u)] @ powers, rtol=1e-9, atol=1e-9)
        np.testing.assert_array_equal(found[cell, e], delta_0[cell, e])


def slow_spread(delta_0, fixed, x, w, steps: int) -> list[float]:
    """One cell, gene by gene, as the module's text says it."""
    delta = list(delta_0)
    for _ in range(steps):
        felt = [max(d, -level) for d, level in zip(delta, x, strict=True)]
        delta = [delta_0[j] if fixed[j] else math.fsum(felt[i] * w[i][j] for i in range(len(x))) for j in range(len(x))]
    return delta


@given(st.integers(0, 10_000), st.integers(0, 6))
def test_recursion_with_the_floor_follows_the_text(seed: int, steps: int) -> None:
    draws = rng.stream(seed, "floor")
    x = draws.exponential(0.5, size=5) * draws.integers(0, 2, size=5)
    w = draws.normal(size=(5, 5)) * (1 - np.eye(5))
    fixed = draws.integers(0, 2, size=5).astype(bool)
    delta_0 = np.where(fixed, np.maximum(draws.normal(size=5), -x), 0.0)
    found = spread(delta_0[None], fixed[None], x[None], sp.csr_matrix(w), steps)[0]
    np.testing.assert_allclose(found, slow_spread(delta_0, fixed, x, w, steps), rtol=1e-9, atol=1e-9)


def test_one_step_reaches_one_edge_further_along_a_chain() -> None:
    w = network(("A", "B", 0.5), ("B", "C", -2.0), ("C", "D", 3.0)).matrix(GENES)
    delta_0, fixed = np.array([[0.4, 0, 0, 0, 0]]), np.array([[True, False, False, False, False]])
    x = np.full((1, 5), 9.0)
    for steps, expected in enumerate(
        ([0.4, 0, 0, 0, 0], [0.4, 0.2, 0, 0, 0], [0.4, 0.2, -0.4, 0, 0], [0.4, 0.2, -0.4, -1.2, 0])
    ):
        np.testing.assert_allclose(spread(delta_0, fixed, x, w, steps), [expected], atol=1e-12)


def test_a_gene_that_is_not_expressed_passes_no_fall_on_but_a_rise() -> None:
    w = network(("A", "B", 1.0), ("B", "C", 1.0)).matrix(GENES)
    fixed = np.array([[True, False, False, False, False]])
    x = np.array([[3.0, 0.0, 3.0, 0.0, 0.0]])
    fall, rise = (spread(np.array([[d, 0, 0, 0, 0]]), fixed, x, w, 2)[0, 2] for d in (-1.0, 1.0))
    assert (fall, rise) == (0.0, 1.0)


# ---- Propagation of counts -----------------------------------------------------------------------------------------


def test_counts_of_a_chain_by_hand() -> None:
    """A: 10 -> 20 of a library of 100, at 1,000 counts per cell; B gains half of A's log change, C loses as much."""
    before, after = np.array([[10.0, 30, 40, 20, 0]]), np.array([[20.0, 30, 40, 20, 0]])
    net = network(("A", "B", 0.5), ("B", "C", -1.0), scale=1000)
    found = propagate(net, GENES, before, after, *WIDE, steps=2)
    half = math.sqrt(201 / 101)
    expected = [20, (301 * half - 1) / 10, (401 / half - 1) / 10, 20, 0]
    np.testing.assert_allclose(found.counts, [expected], rtol=1e-12)
    assert found.clipped.tolist() == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("edit", ["A:ko", "A:x0.5", "A:x2"])
@pytest.mark.parametrize("weight", [0.7, -0.7])
def test_a_target_moves_with_the_sign_of_edit_times_weight(edit: str, weight: float) -> None:
    cells = cells_of(np.full((3, 5), 8.0), GENES)
    after = Perturbation.parse(edit).apply(cells).counts
    counts = propagate(network(("A", "C", weight)), GENES, cells.counts, after, *WIDE).counts.toarray()
    rise = (1 if edit == "A:x2" else -1) * weight > 0
    assert ((counts[:, 2] > 8) if rise else (counts[:, 2] < 8)).all()
    np.testing.assert_array_equal(counts[:, [1, 3, 4]], 8)


def test_edited_genes_keep_the_edited_value_though_others_act_on_them() -> None:
    cells = cells_of([[5, 5, 5, 5, 5], [0, 5, 5, 5, 5]], GENES)
    p = Perturbation.parse("A:ko,B:x3")
    net = network(("A", "B", 1.0), ("B", "A", 2.0), ("B", "C", 1.0))
    counts = propagate(net, GENES, cells.counts, p.apply(cells).counts, *WIDE, edited=p.genes).counts.toarray()
    np.testing.assert_array_equal(counts[:, :2], [[0, 15], [0, 15]])
    assert (counts[:, 2] > 5).all()


def test_a_knock_out_of_what_a_cell_lacks_is_held_only_if_it_is_named() -> None:
    """A knock-out changes no count of A in this cell, so the counts alone cannot tell that A is edited."""
    before, after = np.array([[0.0, 5, 5, 5, 5]]), np.array([[0.0, 10, 5, 5, 5]])
    net = network(("B", "A", 1.0))
    assert propagate(net, GENES, before, after, *WIDE, edited=("A", "B")).counts[0, 0] == 0
    assert propagate(net, GENES, before, after, *WIDE).counts[0, 0] > 0


def test_values_are_cut_to_the_range_and_the_genes_are_told() -> None:
    low, high = np.array([0, 0.1, 0, 0.2, 0]), np.array([1, 0.25, 0.3, 0.25, 1])
    before = np.tile([20.0, 20, 20, 20, 20], (2, 1))
    after = before.copy()
    after[0, 0] = 80
    net = network(("A", "B", 5.0), ("A", "C", 0.1), ("A", "D", -5.0))
    found = propagate(net, GENES, before, after, low, high)
    np.testing.assert_allclose(found.counts[0, [1, 3]], [25, 20], rtol=1e-6)
    assert 20 < found.counts[0, 2] < 30
    np.testing.assert_array_equal(found.counts[1], before[1])
    assert found.clipped.tolist() == [0, 1, 0, 1, 0]


def test_a_cell_outside_of_the_range_is_not_pulled_in_but_moves_no_further_out() -> None:
    high = np.array([1, 0.05, 0.05, 1, 1])
    before = np.array([[20.0, 20, 20, 20, 20]])
    up = propagate(network(("A", "B", 1.0), ("A", "C", -0.5)), GENES, before, before * [2, 1, 1, 1, 1], WIDE[0], high)
    assert up.counts[0, 1] == 20 and 5 < up.counts[0, 2] < 20
    assert up.clipped.tolist() == [0, 1, 0, 0, 0]
    low = np.array([0, 0.4, 0.4, 0, 0])
    down = propagate(network(("A", "B", -1.0), ("A", "C", 0.5)), GENES, before, before * [2, 1, 1, 1, 1], low, WIDE[1])
    assert down.counts[0, 1] == 20 and 20 < down.counts[0, 2] < 40
    assert down.clipped.tolist() == [0, 1, 0, 0, 0]


def test_a_gene_that_nothing_reaches_keeps_its_count_bit_for_bit() -> None:
    before = rng.stream(0, "untouched").gamma(0.5, 3.0, size=(200, 5))
    after = before * [2, 1, 1, 1, 1]
    low, high = np.full(5, 0.3), np.full(5, 0.31)
    counts = propagate(network(("A", "B", 1.0), ("C", "D", 1.0)), GENES, before, after, low, high).counts
    assert counts[:, 2:].tobytes() == before[:, 2:].tobytes()


def test_an_unexpressed_gene_rises_into_the_range_and_never_below_zero() -> None:
    before = np.array([[20.0, 0, 0, 40, 40]])
    after = before * [3, 1, 1, 1, 1]
    found = propagate(network(("A", "B", 9.0), ("A", "C", -9.0)), GENES, before, after, WIDE[0], np.full(5, 0.1))
    np.testing.assert_allclose(found.counts[0, :3], [60, 10, 0], rtol=1e-6)
    assert found.clipped.tolist() == [0, 1, 1, 0, 0]


def test_a_cell_without_counts_keeps_the_direct_edit() -> None:
    before, after = np.zeros((2, 5)), np.zeros((2, 5))
    before[1] = after[1] = 5
    after[:, 0] = 7
    counts = propagate(network(("A", "B", 1.0)), GENES, before, after, *WIDE).counts
    np.testing.assert_array_equal(counts[0], [7, 0, 0, 0, 0])
    assert counts[1, 1] > 5


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_matrix])
@pytest.mark.parametrize(("steps", "edit"), [(0, "A:x2"), (3, ""), (10, "A:x1")])
def test_no_step_or_no_edit_gives_the_input_bit_for_bit(kind, steps: int, edit: str) -> None:
    cells = cells_of(rng.stream(0, "identity").gamma(0.5, 3.0, size=(20, 5)), GENES)
    after = Perturbation.parse(edit).apply(cells).counts
    before, after = (kind(value.toarray()) for value in (cells.counts, after))
    found = propagate(random_letters(), GENES, before, after, *WIDE, steps=steps, edited=["A"]).counts
    assert found.dtype == np.float32 and sp.issparse(found) == sp.issparse(after)
    dense = [value.toarray() if sp.issparse(value) else value for value in (found, after)]
    assert dense[0].tobytes() == dense[1].tobytes()


def random_letters(seed: int = 0) -> Network:
    draws = rng.stream(seed, "letters")
    return network(*((a, b, draws.normal()) for a in GENES for b in GENES if a != b and draws.random() < 0.6))


def test_dense_sparse_and_batches_agree_exactly() -> None:
    draws = rng.stream(1, "batches")
    before = draws.poisson(2.0, size=(40, 5)).astype(np.float32)
    after = before * np.array([3, 1, 1, 0, 1], dtype=np.float32)
    net = random_letters()
    whole = propagate(net, GENES, before, after, *WIDE)
    sparse = propagate(net, GENES, sp.csr_matrix(before), sp.csr_matrix(after), *WIDE)
    mixed = propagate(net, GENES, before.astype(int), sp.csr_matrix(after), *WIDE)
    np.testing.assert_array_equal(whole.counts, sparse.counts.toarray())
    np.testing.assert_array_equal(whole.counts, mixed.counts.toarray())
    rows = [propagate(net, GENES, before[[i]], after[[i]], *WIDE) for i in range(40)]
    np.testing.assert_array_equal(whole.counts, np.concatenate([row.counts for row in rows]))
    np.testing.assert_array_equal(whole.clipped, sum(row.clipped for row in rows))


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    before = rng.stream(2, "blocks").poisson(2.0, size=(40, 5)).astype(np.float32)
    call = (random_letters(), GENES, before, before * np.float32([2, 1, 1, 1, 1]))
    cells = cells_of(before, GENES)
    whole, ends = propagate(*call, *WIDE), observed_range(cells)
    monkeypatch.setattr("perturb.grn._BLOCK_VALUES", 35)
    np.testing.assert_array_equal(propagate(*call, *WIDE).counts, whole.counts)
    np.testing.assert_array_equal(observed_range(cells), ends)


@given(st.permutations(range(5)), st.integers(0, 100))
def test_the_order_of_genes_does_not_matter(order: list[int], seed: int) -> None:
    draws = rng.stream(seed, "order")
    before = draws.poisson(3.0, size=(6, 5)).astype(float)
    after = before * [0, 1, 4, 1, 1]
    low, high = np.zeros(5), draws.uniform(0.2, 0.6, size=5)
    net = random_letters(seed)
    straight = propagate(net, GENES, before, after, low, high)
    turned = propagate(
        net, [GENES[i] for i in order], before[:, order], after[:, order], low[order], high[order], steps=3
    )
    np.testing.assert_allclose(turned.counts, straight.counts[:, order], rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(turned.clipped, straight.clipped[order])


@settings(max_examples=60)
@given(
    st.lists(st.floats(0, 1e6, width=32), min_size=10, max_size=10),
    st.lists(st.sampled_from(["A:ko", "B:x4", "C:set=1e6", "D:x0.5", "E:set=0.001"]), max_size=3),
    st.lists(st.sampled_from([-1e6, -3.0, -1e-6, 0.2, 1e6]), min_size=20, max_size=20),
    st.integers(0, 10),
)
def test_counts_stay_finite_and_not_negative(
    counts: list[float], edits: list[str], weights: list[float], steps: int
) -> None:
    cells = cells_of(np.array(counts).reshape(2, 5), GENES)
    p = Perturbation.parse(",".join(edits))
    after = p.apply(cells).counts
    pairs = [(a, b) for a in GENES for b in GENES if a != b]
    net = network(*((a, b, w) for (a, b), w in zip(pairs, weights, strict=True)))
    found = propagate(net, GENES, cells.counts, after, *WIDE, steps=steps, edited=p.genes).counts.toarray()
    assert np.isfinite(found).all() and (found >= 0).all()
    held = [GENES.index(gene) for gene in p.genes]
    np.testing.assert_array_equal(found[:, held], after.toarray()[:, held])
    if not edits or not steps:
        np.testing.assert_array_equal(found, after.toarray())


@pytest.mark.parametrize("steps", [-1, 11, 2.0, True, "3"])
def test_steps_out_of_range_are_refused(steps) -> None:
    with pytest.raises(BadInput, match="choose a whole number from 0 to 10"):
        propagate(network(), GENES, np.ones((1, 5)), np.ones((1, 5)), *WIDE, steps=steps)


def test_what_does_not_fit_is_refused() -> None:
    ones = np.ones((2, 5))
    with pytest.raises(ValueError, match="counts have shapes"):
        propagate(network(), GENES, ones, np.ones((1, 5)), *WIDE)
    with pytest.raises(ValueError, match="range"):
        propagate(network(), GENES, ones, ones, np.zeros(4), np.ones(5))
    with pytest.raises(ValueError, match="after holds negative"):
        propagate(network(), GENES, ones, -ones, *WIDE)
    with pytest.raises(ValueError, match="shares from 0 to 1"):
        propagate(network(), GENES, ones, ones, np.zeros(5), np.full(5, 1.2))
    with pytest.raises(BadInput, match="edited gene 'Z' is not among the 5 genes"):
        propagate(network(), GENES, ones, ones, *WIDE, edited=["Z"])
    with pytest.raises(BadInput, match="without sign"):
        propagate(network(("A", "B", 1.0), signed=False), GENES, ones, ones, *WIDE)


# ---- Range and normalisation ---------------------------------------------------------------------------------------


def test_observed_range_is_the_quantile_of_shares() -> None:
    counts = rng.stream(3, "range").poisson([0.01, 1, 5, 20], size=(300, 4))
    counts[7] = 0
    low, high = observed_range(cells_of(counts, list("ABCD")), (0.05, 0.9))
    kept = counts[counts.sum(axis=1) > 0]
    shares = kept / kept.sum(axis=1, keepdims=True)
    np.testing.assert_allclose([low, high], np.quantile(shares, [0.05, 0.9], axis=0), rtol=1e-12)
    low, high = observed_range(cells_of(counts, list("ABCD")))
    np.testing.assert_allclose([low, high], np.quantile(shares, [0, 0.99], axis=0), rtol=1e-12)


def test_observed_range_refuses_cells_without_counts_and_odd_quantiles() -> None:
    with pytest.raises(BadInput, match="None of the 3 reference cells has a count"):
        observed_range(cells_of(np.zeros((3, 2)), ["A", "B"]))
    with pytest.raises(BadInput, match="quantiles is .* a lower and an upper one from 0 to 1"):
        observed_range(cells_of(np.ones((3, 2)), ["A", "B"]), (0.9, 0.1))


def test_log_expression_is_that_of_scanpy() -> None:
    import scanpy as sc
    from anndata import AnnData

    counts = rng.stream(4, "log").poisson(3.0, size=(20, 6)).astype(np.float64)
    data = AnnData(counts.copy())
    sc.pp.normalize_total(data, target_sum=1e4)
    sc.pp.log1p(data)
    np.testing.assert_allclose(log_expression(counts, counts.sum(axis=1), 1e4), data.X, rtol=1e-9)


# ---- Fit -----------------------------------------------------------------------------------------------------------


def test_bagged_ridge_is_sklearn_on_each_bag_target_by_target() -> None:
    draws = rng.stream(5, "ridge")
    x = draws.normal(size=(80, 4))
    y = x @ draws.normal(size=(4, 3)) + draws.normal(size=(80, 3)) + 5
    allowed = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 1, 0]], dtype=bool)
    weights, p = bagged_ridge(x, y, allowed, alpha=7.0, bags=12, seed=3)
    picks = [rng.stream(3, "bag", b).integers(0, 80, size=80) for b in range(12)]
    for j in range(3):
        rows = np.flatnonzero(allowed[:, j])
        if not len(rows):
            continue
        fits = np.array([Ridge(alpha=7.0).fit(x[pick][:, rows], y[pick, j]).coef_ for pick in picks])
        np.testing.assert_allclose(weights[rows, j], fits.mean(axis=0), rtol=1e-9)
        t = fits.mean(axis=0) / (fits.std(axis=0, ddof=1) * math.sqrt(13 / 12))
        np.testing.assert_allclose(p[rows, j], 2 * student_t.cdf(-np.abs(t), 11), rtol=1e-7)
    assert (weights[~allowed] == 0).all() and np.isnan(p[~allowed]).all()


def test_p_is_uniform_where_there_is_no_effect() -> None:
    """Also for targets that are mostly zeros, beside one regulator that does act and resembles another."""
    draws = rng.stream(6, "null")
    shared = draws.normal(size=(600, 1))
    x = draws.normal(size=(600, 8)) + 0.7 * shared
    y = np.log1p(8 * draws.poisson(0.3, size=(600, 200))) + 0.5 * x[:, :1]
    weights, p = bagged_ridge(x, y, np.ones((8, 200), dtype=bool), alpha=0.1, bags=60, seed=0)
    null = p[1:].ravel()
    # The 7 tests of a target share its noise, and bags are shared by all: the tolerance is wider than 1,400 allow.
    assert abs((null < 0.05).mean() - 0.05) < 0.02 and kstest(null, "uniform").statistic < 0.04
    assert (p[0] < 1e-6).mean() > 0.95 and (weights[0] > 0).all()


def test_a_constant_gene_has_no_p() -> None:
    x = rng.stream(7, "constant").normal(size=(50, 2))
    weights, p = bagged_ridge(x, np.full((50, 1), 0.1), np.ones((2, 1), dtype=bool), alpha=1.0, bags=10, seed=0)
    assert np.isnan(p).all() and (np.abs(weights) < 1e-9).all()


def planted(seed: int, n: int = 1500, regulators: int = 12, targets: int = 120) -> tuple[Cells, Network]:
    """Counts whose log means follow a known network; 1 in 8 pairs is an edge."""
    draws = rng.stream(seed, "planted")
    genes = [f"R{i:02d}" for i in range(regulators)] + [f"T{j:03d}" for j in range(targets)]
    w = draws.choice([-0.7, 0.7], size=(regulators, targets)) * (draws.random((regulators, targets)) < 1 / 8)
    level = 0.6 * draws.normal(size=(n, regulators))
    noise = 0.2 * draws.normal(size=(n, targets))
    mean = np.exp(np.concatenate([level + np.log(20), level @ w + noise + np.log(8)], axis=1))
    # Shares add up to 1: beside small libraries a risen target would press all others down. A large gene prevents it.
    filler = np.full((n, 1), 40_000.0)
    counts = draws.poisson(np.concatenate([mean, filler], axis=1))
    i, j = np.nonzero(w)
    truth = network(*((genes[a], genes[regulators + b], w[a, b]) for a, b in zip(i, j, strict=True)))
    return cells_of(counts, [*genes, "FILLER"]), truth


def test_a_planted_network_is_recovered_with_its_signs() -> None:
    cells, truth = planted(0)
    found = fit_network(cells, [f"R{i:02d}" for i in range(12)], max_q=0.01)
    # That a regulator's rise lowers the large gene's share is true, though no edge was planted.
    true, kept = edges_of(truth), {pair: w for pair, w in edges_of(found).items() if pair[1] != "FILLER"}
    hits = [pair for pair in kept if pair in true]
    assert len(hits) / len(kept) > 0.97 and len(hits) / len(true) > 0.97
    assert all(np.sign(kept[pair]) == np.sign(true[pair]) for pair in hits)
    # Counting noise in the regulator shrinks a slope of 0.7, and log(1 + x) is flatter than log(x).
    ratio = np.array([kept[pair] / true[pair] for pair in hits])
    assert 0.6 < np.median(ratio) < 1.0
    assert found.scale == np.median(cells.counts.toarray().sum(axis=1))


def test_few_edges_are_kept_where_there_are_none() -> None:
    """Also among genes of a few cells: pairs never seen together once made most of what was kept."""
    for seed in range(3):
        draws = rng.stream(seed, "nothing")
        counts = draws.poisson(np.exp(draws.uniform(-5, 3, size=200)), size=(1000, 200))
        genes = [f"g{i:03d}" for i in range(200)]
        assert len(fit_network(cells_of(counts, genes), genes[:30], max_q=0.01)) <= 2


def test_the_fit_is_the_same_in_any_order_of_cells_and_genes() -> None:
    cells, _ = planted(1, n=200, targets=30)
    order, rows = rng.stream(0, "columns").permutation(len(cells.genes)), rng.stream(0, "rows").permutation(200)
    turned = Cells(cells.counts[rows][:, order], cells.genes[order], cells.cell_id[rows])
    call = {"bags": 20, "max_q": 0.05}
    first = fit_network(cells, ["R00", "R01", "R02"], **call)
    assert len(first) > 3
    assert first.sha256 == fit_network(turned, ["R02", "R00", "R01", "R00"], **call).sha256
    assert first.sha256 != fit_network(cells, ["R00", "R01", "R02"], **call, seed=1).sha256


def test_columns_of_one_gene_are_added_up() -> None:
    cells, _ = planted(1, n=200, targets=30)
    half = cells.counts.multiply(cells.counts.astype(int).toarray() % 2).tocsr()
    split = Cells(sp.hstack([cells.counts - half, half]), np.concatenate([cells.genes] * 2), cells.cell_id)
    call = {"bags": 20, "max_q": 0.05}
    assert fit_network(cells, ["R00"], **call).sha256 == fit_network(split, ["R00"], **call).sha256


def test_blocks_of_targets_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    cells, _ = planted(1, n=200, targets=30)
    whole = fit_network(cells, ["R00", "R01"], bags=10)
    monkeypatch.setattr("perturb.grn._TARGET_BLOCK", 7)
    np.testing.assert_allclose(fit_network(cells, ["R00", "R01"], bags=10).weights, whole.weights, atol=2e-6)


def test_a_base_network_limits_the_edges_and_gets_its_signs_from_the_cells() -> None:
    cells, truth = planted(2, n=600)
    true = edges_of(truth)
    wrong = [("R00", t) for t in cells.genes[12:40] if ("R00", t) not in true][:5]
    base = network(*((r, t, 1.0) for r, t in [*list(true)[:60], *wrong, ("R00", "ELSEWHERE")]), signed=False)
    kept = edges_of(fit_network(cells, base))
    assert set(kept) <= set(edges_of(base)) and len(kept) > 50
    assert all(np.sign(w) == np.sign(true[pair]) for pair, w in kept.items() if pair in true)


def test_the_strongest_edges_are_kept() -> None:
    cells, _ = planted(2, n=600)
    regulators = [f"R{i:02d}" for i in range(12)]
    everything, few = (fit_network(cells, regulators, max_edges=n) for n in (2000, 10))
    strongest = sorted(edges_of(everything).items(), key=lambda item: -abs(item[1]))[:10]
    assert edges_of(few) == dict(strongest)


def two_types(per_type: int = 150) -> Cells:
    """R and T are both high in type b and independent within types; Q drives T within type b alone."""
    draws = rng.stream(10, "types")
    kind = np.repeat([0, 1], per_type)
    level = draws.normal(size=(2 * per_type, 2))
    means = [8 * np.exp(kind), 8 * np.exp(0.5 * level[:, 0]), 8 * np.exp(kind + 0.5 * kind * level[:, 0])]
    counts = draws.poisson(np.stack([*means, np.full(2 * per_type, 20_000.0)], axis=1))
    return cells_of(counts, ["R", "Q", "T", "FILLER"], cell_type=np.array(["a", "b"])[kind])


def test_a_difference_between_types_is_no_edge_unless_asked_for() -> None:
    cells = two_types()
    assert ("R", "T") in edges_of(fit_network(cells, ["R"], within=()))
    assert ("R", "T") not in edges_of(fit_network(cells, ["R"]))


def test_a_network_of_one_type_comes_from_its_cells() -> None:
    cells = two_types()
    in_a, in_b = (edges_of(fit_network(cells, ["Q"], cell_type=name)) for name in "ab")
    assert ("Q", "T") not in in_a and in_b["Q", "T"] > 0
    alone = cells.take(cells.cell_type == "b")
    assert fit_network(alone, ["Q"]).sha256 == fit_network(cells, ["Q"], cell_type="b").sha256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidates": ["Z", "Y"]}, "None of the 2 candidate regulators is among the 4 genes"),
        ({"candidates": network(("Z", "T", 1.0), name="base")}, "None of the edges of 'base' is among"),
        ({"cell_type": "c"}, "cell_type is 'c': choose one of a, b"),
        ({"within": ["donor"]}, "within names 'donor'"),
        ({"within": ["sex"]}, "within names 'sex'"),
        ({"alpha": 0}, "alpha is 0: choose a number"),
        ({"bags": 5}, "bags is 5: choose a number from 10 to 1000"),
        ({"max_q": 0.0}, "max_q is 0.0"),
        ({"max_edges": 0}, "max_edges is 0"),
    ],
)
def test_a_fit_that_cannot_be_made_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        fit_network(two_types(40), **{"candidates": ["R"], **arguments})
    one_sentence(error)


def test_pairs_seldom_seen_together_are_not_tested_within_any_stratum() -> None:
    """R and T are common, but each in its own type: across types alone they would be expected together."""
    draws = rng.stream(11, "together")
    kind = np.repeat([0, 1], 200)
    expressed = np.stack([np.where(kind == 0, 5.0, 0.02), np.where(kind == 0, 0.02, 5.0), np.full(400, 900.0)], axis=1)
    cells = cells_of(draws.poisson(expressed), ["R", "T", "FILLER"], cell_type=np.array(["a", "b"])[kind])
    assert ("R", "T") in edges_of(fit_network(cells, ["R"], max_q=1.0, within=()))
    assert ("R", "T") not in edges_of(fit_network(cells, ["R"], max_q=1.0))


def test_a_fit_to_few_cells_is_refused() -> None:
    with pytest.raises(BadInput, match="The fit has 20 cells with counts: give at least 30"):
        fit_network(two_types(10), ["R"])


# ---- Known-truth tissue --------------------------------------------------------------------------------------------


def test_known_truth_drivers_find_their_reporters_and_a_knock_out_moves_them_as_it_truly_does() -> None:
    """The truth of an edit is the same tissue simulated again with the driver knocked out."""
    from ge2hist_core.simulator.expression import draw_counts, load_genes
    from ge2hist_core.simulator.tissue import simulate_section

    table, section = load_genes(), simulate_section(0, 0, 512.0)
    cells = cells_of(
        draw_counts(section).toarray(), list(table.symbols), cell_type=section.nuclei["cell_type"].to_numpy()
    )
    net = fit_network(cells, table.drivers)
    kind = {gene: (role, *table.programme_of(gene)) for gene, role in zip(table.symbols, table.role, strict=True)}
    pairs = [(kind[r], kind[t], w) for (r, t), w in edges_of(net).items() if kind[t][0] == "reporter"]
    own = [(r, t, w) for r, t, w in pairs if r[1] == t[1]]
    # By chance 1 in 6 reporter edges would stay in its programme, and half of the signs would be right.
    assert len(own) > 100 and len(own) / len(pairs) > 0.9
    assert np.mean([np.sign(w) == np.sign(r[2] * t[2]) for r, t, w in own]) > 0.98
    inert = sum(kind[t][0] == "inert" for t in net.targets)
    assert inert / len(net) < 0.1

    low, high = observed_range(cells)
    p = Perturbation.parse("MYC:ko")
    own_reporters = np.array([kind[gene][:2] == ("reporter", kind["MYC"][1]) for gene in cells.genes])

    def log_fold(counts: sp.csr_matrix) -> float:
        mean, base = (value.toarray().mean(axis=0)[own_reporters] for value in (counts, cells.counts))
        return float(np.log(mean / base).mean())

    call = (cells.genes, cells.counts, p.apply(cells).counts, low, high)
    predicted = log_fold(propagate(net, *call, edited=p.genes).counts)
    control = log_fold(propagate(randomised(net, 0), *call, edited=p.genes).counts)
    true = log_fold(draw_counts(section.intervene({"MYC": 0.0})))
    assert true < -0.3 and 0.4 < predicted / true < 1.7
    assert abs(control) < 0.3 * abs(predicted)


# ---- Randomised control --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_randomised_network_keeps_degrees_signs_and_strengths_but_not_edges(seed: int) -> None:
    net = random_network(30, 400, 900, seed)
    other = randomised(net, seed)
    assert Counter(other.regulators) == Counter(net.regulators) and Counter(other.targets) == Counter(net.targets)
    assert (other.weights > 0).sum() == (net.weights > 0).sum()
    assert not (other.regulators == other.targets).any() and other.scale == net.scale
    for gene in set(net.regulators):
        mine, theirs = (np.sort(np.abs(n.weights[n.regulators == gene])) for n in (net, other))
        np.testing.assert_array_equal(mine, theirs)
    # With these degrees about 1 in 13 pairs of a regulator is an edge.
    assert len(edges_of(net).keys() & edges_of(other).keys()) / len(net) < 0.15


def test_a_randomised_network_is_deterministic_and_not_always_the_same() -> None:
    net = random_network(10, 100, 200)
    assert randomised(net, 1).sha256 == randomised(net, 1).sha256 != randomised(net, 2).sha256
    assert "randomised (seed 1)" in randomised(net, 1).name and net.sha256 in randomised(net, 1).source


def test_every_allowed_wiring_of_a_small_network_is_as_likely() -> None:
    """A -> {C, D}, B -> {E, F} has 6 wirings with these degrees; each should come up in 1 of 6 of the seeds."""
    net = network(*((r, t, 1.0) for r, t in ("AC", "AD", "BE", "BF")))
    n = 600
    seen = Counter(tuple(sorted(edges_of(randomised(net, seed)))) for seed in range(n))
    assert len(seen) == 6
    expected = n / 6
    assert sum((count - expected) ** 2 / expected for count in seen.values()) < 20.5  # chi-square, 5 df, p = 0.001


def test_signs_are_dealt_over_all_edges() -> None:
    net = network(*(("A", f"t{i}", 1.0) for i in range(20)), *(("B", f"u{i}", -1.0) for i in range(20)))
    share = np.mean(
        [(other.weights[other.regulators == "A"] > 0).mean() for other in (randomised(net, s) for s in range(40))]
    )
    assert 0.4 < share < 0.6


def test_rewiring_makes_no_self_loop_among_regulators() -> None:
    """Drawn from pairs in both directions, where a trade that forgot the rule would soon give A -> A."""
    net = network(*((a, b, 1.0) for a, b in ("AB", "BC", "CD", "DE", "EA", "AC", "BD")))
    for seed in range(50):
        other = randomised(net, seed)
        assert len(other) == 7 and other.n_self_loops == 0
        assert Counter(other.targets) == Counter(net.targets)


def test_one_regulator_keeps_its_targets_and_an_empty_network_stays_empty() -> None:
    alone = network(("A", "B", 1.0), ("A", "C", -2.0))
    assert set(edges_of(randomised(alone, 0))) == {("A", "B"), ("A", "C")}
    assert len(randomised(network(), 0)) == 0
    assert not randomised(network(("A", "B", 1.0), ("C", "D", 1.0), signed=False), 0).signed


# ---- Record --------------------------------------------------------------------------------------------------------


def test_the_record_goes_through_json() -> None:
    record = Propagation("ab" * 32, "CollecTRI", 5, (0, 0.95))
    text = json.dumps(to_json(record))
    assert from_json(Propagation, json.loads(text)) == record
    assert json.loads(text)["quantiles"] == [0.0, 0.95]
    assert Propagation("ab" * 32, "x").steps == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network_sha256": "abc"}, "network_sha256 is 'abc': give the 64 hexadecimal digits"),
        ({"network_name": " "}, "network_name is ' '"),
        ({"steps": 11}, "steps is 11: choose a whole number from 0 to 10"),
        ({"quantiles": [0.5]}, "quantiles is"),
        ({"quantiles": [0.5, math.nan]}, "quantiles is"),
        ({"quantiles": None}, "quantiles is None"),
        ({"control": 1}, "control is 1: give true or false"),
        ({"quantiles": [0, 10**400]}, "quantiles is"),
        ({"network_name": "\ud800"}, "network_name holds '\\ud800'"),
        ({"extra": 1}, "Unknown field 'extra'"),
    ],
)
def test_a_malformed_record_is_refused(change: dict, message: str) -> None:
    good = to_json(Propagation("ab" * 32, "CollecTRI"))
    with pytest.raises(BadInput, match=re.escape(message)):
        from_json(Propagation, good | change)


# ---- Files ---------------------------------------------------------------------------------------------------------

COLLECTRI = (
    "source,target,weight,resources,references,sign_decision\n"
    'MYC,TERT,1.0,ExTRI;HTRI,"10022128;10491298",PMID\n'
    "SPI1,BGLAP,-1.0,ExTRI,10022617,regulon\n"
    "AP1,JUN,1.0,ExTRI,10022869,default activation\n"
)
DOROTHEA = "source\ttarget\tweight\tconfidence\nMYC\tTERT\t1.0\tA\nMYC\tNA\t-0.5\tB\nMYC\tE2F1\t0.25\tD\n"
BASE_GRN = (
    "peak_id,gene_short_name,MYC,SPI1,NA\n"
    "chr1_1_2,TERT,1.0,0.0,0\nchr1_5_6,TERT,1.0,1.0,0\nchr2_1_2,NA,0.0,0.0,0\nchr2_8_9,SPI1,0.0,1.0,1\n"
)


PACKED = {"edges": [["A", "B", 1.0]], "name": "n", "source": "", "scale": 1e4, "signed": True}


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_collectri_as_decoupler_gives_it(tmp_path: Path) -> None:
    net = read_network(write(tmp_path, "CollecTRI_regulons.csv", COLLECTRI))
    assert edges_of(net) == {("AP1", "JUN"): 1.0, ("MYC", "TERT"): 1.0, ("SPI1", "BGLAP"): -1.0}
    assert net.signed and net.name == "CollecTRI_regulons" and "SHA-256 " in net.source


def test_dorothea_by_levels_and_a_gene_named_na(tmp_path: Path) -> None:
    path = write(tmp_path, "dorothea.tsv", DOROTHEA)
    assert edges_of(read_network(path)) == {("MYC", "TERT"): 1.0, ("MYC", "NA"): -0.5, ("MYC", "E2F1"): 0.25}
    assert edges_of(read_network(path, confidence="ABC")) == {("MYC", "TERT"): 1.0, ("MYC", "NA"): -0.5}
    assert read_network(path, name="mine").name == "mine"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plain.csv", "source,target,weight\nA,B,1\nB,C,-0.5\n"),
        ("semicolon.csv", "source;target;weight\r\nA;B;1\r\nB;C;-0.5\r\n"),
        ("mor.txt", "TF\tConfidence\tTarget\tMOR\nA\tA\tB\t1\nB\tC\tC\t-0.5\n"),
        ("index.csv", ",source,target,weight\n0,A,B,1\n1,B,C,-0.5\n"),
        ("index.tsv", "\tsource\ttarget\tweight\n0\tA\tB\t1\n1\tB\tC\t-0.5\n"),
        ("r.tsv", '"source"\t"target"\t"weight"\n"1"\t"A"\t"B"\t1\n"2"\t"B"\t"C"\t-0.5\n'),
        ("excel.csv", "\ufeffsep=;\r\nsource;target;weight\r\nA;B;1\r\nB;C;-0.5\r\n"),
        ("bar.csv", '"SEP=|"\nsource|target|weight\nA|B|1\nB|C|-0.5\n'),
        ("bom.csv", "\ufeffsource,target,weight\n A ,B,1\nB,C , -0.5\n"),
    ],
)
def test_long_tables_of_every_form(tmp_path: Path, name: str, text: str) -> None:
    net = read_network(write(tmp_path, name, text))
    assert edges_of(net) == {("A", "B"): 1.0, ("B", "C"): -0.5}
    packed = read_network(write(tmp_path, f"{name}.gz", gzip.compress(text.encode())))
    assert packed.sha256 == net.sha256 and packed.name == name.split(".")[0]


def test_a_base_grn_is_unsigned_and_joins_peaks(tmp_path: Path) -> None:
    text = read_network(write(tmp_path, "base.csv", BASE_GRN))
    assert set(edges_of(text)) == {("MYC", "TERT"), ("SPI1", "TERT"), ("NA", "SPI1")}
    assert not text.signed and text.n_self_loops == 1
    with pytest.raises(BadInput, match="fit it to cells first"):
        text.matrix(["MYC", "TERT"])
    pd.read_csv(tmp_path / "base.csv", keep_default_na=False).to_parquet(tmp_path / "base.parquet")
    assert read_network(tmp_path / "base.parquet").sha256 == text.sha256


def test_a_base_grn_written_with_its_index_and_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pd.read_csv(write(tmp_path, "base.csv", BASE_GRN), keep_default_na=False)
    table.to_csv(tmp_path / "index.csv")
    table.rename_axis(None).set_index(np.array([3, 1, 2, 5])).to_parquet(tmp_path / "index.parquet")
    monkeypatch.setattr("perturb.grn._ROW_CHUNK", 2)
    found = {read_network(tmp_path / name).sha256 for name in ("base.csv", "index.csv", "index.parquet")}
    assert len(found) == 1


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), unique=True, min_size=1), st.integers(0, 99))
def test_a_network_reads_back_from_its_table(pairs: list[tuple[int, int]], seed: int) -> None:
    import tempfile

    weights = rng.stream(seed, "weights").normal(size=len(pairs))
    net = network(*((f"r{a}", f"t,{b}", w) for (a, b), w in zip(pairs, weights, strict=True)))
    with tempfile.TemporaryDirectory() as folder:
        for name, write_table in (("n.csv", net.table().to_csv), ("n.parquet", net.table().to_parquet)):
            write_table(Path(folder) / name, index=False)
            assert read_network(Path(folder) / name).sha256 == net.sha256


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no table"),
        ("\n\n", "is no readable table|holds no table|none named"),
        ("source,target,weight\n", "holds no edge"),
        ("gene,value\nA,1\n", "has columns gene, value and none named source or tf or regulator"),
        ("source,target\nA,B\n", "none named weight or mor"),
        ("source,target,weight\nA,B,1\nA,C,up\n", "Row 2 of bad.csv has weight 'up': give a number"),
        ("source,target,weight\nA,B,1\nA,C,\n", "Row 2 of bad.csv has weight ''"),
        ("source,target,weight\nA,B,nan\n", "Row 1 of bad.csv has weight 'nan'"),
        ("source,target,weight\nA,B,inf\n", "A -> B has weight inf"),
        ("source,target,weight\nA,B,0\n", "A -> B has weight 0"),
        ("source,target,weight\nA,B,1\n,C,1\n", "Row 2 of bad.csv has no source: name a gene"),
        ("source,target,weight\nA,B,1\nA,,1\n", "Row 2 of bad.csv has no target"),
        ("source,target,weight\nA,B,1\nA,B,1\n", "A -> B is given more than once"),
        ("source,target,weight\nA,B,1\nA,B,1,2,3\n", "bad.csv is no readable table"),
        ("source,target,weight\nA,B,1\nA\n", "Row 2 of bad.csv has no target"),
        ('source,target,weight\nA,B,1\n"A,C,1\n', "bad.csv is no readable table"),
        (b"\xff\xfe\x00source", "bad.csv is no readable table"),
        (b"\x00\x01\x02\x03" * 50, "bad.csv"),
        ('{"edges": ' + "[" * 100_000, "bad.csv is no table and is nested more than 50 deep"),
        ('{"edges": ' + "1" * 5000 + "}", "whole number of thousands of digits"),
        (json.dumps(PACKED | {"edges": [["A", "B", 10**400]]}), "stored network is damaged"),
        (json.dumps(PACKED | {"edges": [["A", "\ud800", 1]]}), r"'A' -> '.ud800' has a gene that is no name"),
        (json.dumps(PACKED | {"edges": [["'=A", "B", 1]]}), "has a gene that is no name"),
        (json.dumps(PACKED | {"edges": [["A\r", "B", 1]]}), "has a gene that is no name: leave out control characters"),
        (json.dumps(PACKED | {"name": 5}), "name of a network is 5: give text"),
        (json.dumps(PACKED | {"source": "\ud800"}), "source of a network holds"),
        (json.dumps(PACKED | {"signed": "yes"}), "signed is 'yes': give true or false"),
        ("sep=;\n", "holds no table"),
        (b"PAR1 this is not parquet", "bad.csv is no readable table"),
        (b"\x1f\x8bnot gzip at all", "bad.csv cannot be unpacked"),
        (gzip.compress(b"source,target,weight\nA,B,1\n" * 99)[:-20], "bad.csv cannot be unpacked"),
        ("peak_id,gene_short_name,MYC\np,TERT,2\n", "Column 'MYC' of bad.csv holds '2': a base GRN has 0 or 1"),
        ("peak_id,gene_short_name,MYC\np,TERT,yes\n", "Column 'MYC' of bad.csv holds 'yes'"),
        ("peak_id,gene_short_name,MYC\np,TERT,\n", "Column 'MYC' of bad.csv holds"),
        ("peak_id,gene_short_name,MYC\np,TERT,0\n", "holds no edge: give a base GRN"),
        ("peak_id,gene_short_name,MYC\np,,1\n", "'MYC' -> '' lacks a gene"),
        ("peak_id,gene_short_name\np,TERT\n", "holds no edge"),
    ],
)
def test_a_malformed_file_is_refused_with_one_sentence(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        read_network(write(tmp_path, "bad.csv", text))
    one_sentence(error)


def test_levels_that_a_file_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="No edge of d.tsv has confidence E: choose of A, B, D"):
        read_network(write(tmp_path, "d.tsv", DOROTHEA), confidence="E")
    with pytest.raises(BadInput, match="c.csv has no column 'confidence' to choose A, B by"):
        read_network(write(tmp_path, "c.csv", COLLECTRI), confidence=["A", "B"])
    with pytest.raises(BadInput, match="base.csv is a base GRN without levels"):
        read_network(write(tmp_path, "base.csv", BASE_GRN), confidence="A")


def test_a_file_that_is_missing_or_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not a file: give the path of a network table"):
        read_network(tmp_path / "none.csv")
    text = COLLECTRI + "".join(f"MYC,T{i},1,x,y,z\n" for i in range(5000))
    path, packed = write(tmp_path, "n.csv", text), write(tmp_path, "n.csv.gz", gzip.compress(text.encode()))
    assert packed.stat().st_size < 40_000 < path.stat().st_size
    for file in (path, packed):
        assert len(read_network(file)) == 5003
        with pytest.raises(BadInput, match="has more than .* MiB: give only the edges among your genes"):
            read_network(file, max_bytes=40_000)


# ---- Weight of the import ------------------------------------------------------------------------------------------


def test_the_module_opens_without_torch_and_streamlit() -> None:
    """A recipe holds a Propagation, and pages read recipes."""
    code = "import perturb.grn, sys; print(sorted(set(sys.modules) & {'torch', 'streamlit', 'sklearn', 'scanpy'}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
