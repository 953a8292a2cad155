from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from ge2hist_core.types import BadInput, Cells
from perturb.edits import MAX_COUNT, MAX_FACTOR, Edit, EditSet, Perturbation, nearest_genes

names = st.text(min_size=1, max_size=8).filter(lambda s: s.strip() and s.isprintable()) | st.sampled_from(
    ["HLA-DRA", "a:b", "x,y", "50%", "two words", "MT-CO1", "Ünï"]
)
of_one_cell = st.one_of(
    st.builds(Edit, names, st.just("ko")),
    st.builds(Edit, names, st.just("factor"), st.floats(0, MAX_FACTOR)),
    st.builds(Edit, names, st.just("set"), st.floats(0, MAX_COUNT)),
)
edits = of_one_cell | st.builds(Edit, names, st.just("percentile"), st.floats(0, 100))


def toy(counts: list[list[float]], genes: list[str]) -> Cells:
    return Cells(
        sp.csr_matrix(np.array(counts, np.float32)), np.array(genes), np.array([f"c{i}" for i in range(len(counts))])
    )


doses = st.none() | st.floats(-4, 4)
sets = st.builds(EditSet, names, st.lists(edits, min_size=1, max_size=3).map(tuple), doses)


@given(st.lists(edits | sets, max_size=4).map(tuple).map(Perturbation))
def test_text_form_reads_back(perturbation: Perturbation) -> None:
    assert Perturbation.parse(str(perturbation)) == perturbation


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A:ko", [0, 3, 5]),
        ("A:x0.5", [1, 3, 5]),
        ("A:x4,B:ko", [8, 0, 5]),
        ("C:set=0.25", [2, 3, 0.25]),
        ("A:x2,A:set=7,A:x0.5", [3.5, 3, 5]),
        ("A:set=7,A:x2,A:ko", [0, 3, 5]),
        ("A:x1", [2, 3, 5]),
        ("S@1.5(A:x2;B:ko),A:x2", [8, 0, 5]),
        ("A:set=1,SET(A:x3;C:ko)", [3, 3, 0]),
        ("", [2, 3, 5]),
    ],
)
def test_edits_act_in_their_order(text: str, expected: list[float]) -> None:
    edited = Perturbation.parse(text).apply(toy([[2, 3, 5]], ["A", "B", "C"]))
    np.testing.assert_array_equal(edited.counts.toarray(), [expected])


def test_a_percentile_is_that_of_the_cells_own_type() -> None:
    """Type a has the counts 0..20 of gene A, type b ten times as many; the cells to edit are one of each."""
    counts = np.concatenate([np.arange(21), 10 * np.arange(21)]).astype(np.float32)
    reference = Cells(
        sp.csr_matrix(np.stack([counts, np.ones(42)], axis=1)),
        np.array(["A", "B"]),
        np.array([f"c{i}" for i in range(42)]),
        cell_type=np.repeat(["a", "b"], 21),
    )
    cells = reference.take([3, 25])
    edited = Perturbation.parse("A:p50,A:x2").apply(cells, reference)
    np.testing.assert_array_equal(edited.counts.toarray(), [[20, 1], [200, 1]])
    edited = Perturbation.parse("A:p95").apply(cells, reference)
    np.testing.assert_allclose(edited.counts.toarray()[:, 0], [19, 190])


def test_a_percentile_needs_twenty_cells_of_the_type() -> None:
    cells = toy([[1, 2]] * 30, ["A", "B"])
    with pytest.raises(BadInput, match=r"A:p90 needs cell types, which the data do not give: write A:x2"):
        Perturbation.parse("A:p90").apply(cells)
    few = Cells(cells.counts, cells.genes, cells.cell_id, cell_type=np.array(["t"] * 19 + ["u"] * 11))
    with pytest.raises(BadInput, match=r"A:p90 is a percentile among 19 cells of type 't', fewer than 20"):
        Perturbation.parse("A:p90").apply(few.take([0]), few)


def test_every_column_of_a_repeated_gene_is_edited_and_the_input_is_left_alone() -> None:
    cells = toy([[1, 2, 3], [0, 4, 0]], ["A", "B", "A"])
    edited = Perturbation.parse("A:x2").apply(cells)
    np.testing.assert_array_equal(edited.counts.toarray(), [[2, 2, 6], [0, 4, 0]])
    np.testing.assert_array_equal(cells.counts.toarray(), [[1, 2, 3], [0, 4, 0]])
    assert list(edited.cell_id) == list(cells.cell_id)


def test_set_expresses_a_silent_gene_and_a_factor_does_not() -> None:
    cells = toy([[0, 2]], ["A", "B"])
    assert Perturbation.parse("A:set=3").apply(cells).counts[0, 0] == 3
    factor = Perturbation.parse("A:x4").apply(cells)
    assert (factor.counts != cells.counts).nnz == 0


@settings(max_examples=25)
@given(st.lists(of_one_cell.map(lambda e: Edit("AB"[len(e.gene) % 2], e.kind, e.amount)), max_size=5))
def test_counts_stay_finite_and_not_negative_and_knock_out_is_idempotent(chosen: list[Edit]) -> None:
    cells = toy([[0, 2, 7], [3, 0, 1]], ["A", "B", "C"])
    counts = Perturbation(tuple(chosen)).apply(cells).counts.toarray()
    assert np.isfinite(counts).all() and (counts >= 0).all()
    np.testing.assert_array_equal(counts[:, 2], [7, 1])
    once = Perturbation((Edit("A", "ko"),)).apply(cells)
    twice = Perturbation((Edit("A", "ko"), Edit("A", "ko"))).apply(cells)
    assert (once.counts != twice.counts).nnz == 0


@settings(max_examples=25)
@given(of_one_cell, of_one_cell)
def test_edits_of_different_genes_commute(first: Edit, second: Edit) -> None:
    a, b = Edit("A", first.kind, first.amount), Edit("B", second.kind, second.amount)
    cells = toy([[1, 2, 3]], ["A", "B", "C"])
    ab, ba = (Perturbation(order).apply(cells).counts.toarray() for order in ((a, b), (b, a)))
    np.testing.assert_array_equal(ab, ba)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("S@x(A:ko)", "The dose of S is 'x': give a number"),
        ("S@1(A:ko", r"Cannot read the set 'S@1\(A:ko'"),
        ("S()", "Cannot read the edit ''"),
        ("(A:ko)", "A set of edits has no name"),
        ("CD8A", "Cannot read the edit 'CD8A'"),
        ("CD8A:up", "GENE:ko, GENE:x0.5, GENE:set=3 or GENE:p90"),
        ("CD8A:x", "Cannot read the edit"),
        ("CD8A:xhalf", "Cannot read the edit"),
        ("CD8A:x4.5", "CD8A has amount 4.5: for factor choose a number from 0 to 4"),
        ("CD8A:x-1", "a number from 0 to 4"),
        ("CD8A:xnan", "a number from 0 to 4"),
        ("CD8A:set=inf", "a number from 0 to 1e\\+06"),
        (":ko", "names no gene"),
        ("CD8A:ko,,B:ko", "Cannot read the edit ''"),
    ],
)
def test_bad_text_is_refused_with_field_value_and_cure(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Perturbation.parse(text)


def test_unknown_gene_is_refused_with_the_nearest_names(demo_cells: Cells) -> None:
    with pytest.raises(BadInput, match=r"no gene 'cd8a': did you mean CD8A or CD8B"):
        Perturbation.parse("cd8a:ko").apply(demo_cells)
    with pytest.raises(BadInput, match=r"no gene 'QQQQQQ': choose a gene of the data"):
        Perturbation.parse("QQQQQQ:ko").apply(demo_cells)


def test_nearest_genes_prefers_the_same_name_in_other_case() -> None:
    assert nearest_genes("vegfa", ["VEGFB", "VEGFA", "ACTB"])[0] == "VEGFA"
