from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from ge2hist_core.data import open_h5ad, write_cells
from ge2hist_core.model import GE2Hist
from ge2hist_core.types import BadInput, Cells
from perturb import charts
from perturb.cell_map import (
    Reference,
    at_least,
    find_genes,
    gene_counts,
    in_words,
    log_normalised,
    place,
    reference_rows,
    shifts,
)
from perturb.colours import colour_of
from perturb.edits import Perturbation
from perturb.recipe import Recipe


def test_a_gene_is_found_whatever_its_case_and_its_own_name_comes_first() -> None:
    genes = [f"GENE{i}" for i in range(18_000)] + ["CD8B", "Cd8a", "CD8A", "CD8A", "ACD8"]
    assert find_genes(genes, " CD8A ") == ["CD8A", "Cd8a"]
    assert find_genes(genes, "cd8") == ["CD8A", "CD8B", "Cd8a", "ACD8"]
    assert len(find_genes(genes, "gene1")) == 8 and find_genes(genes, "gene1")[0] == "GENE1"
    assert find_genes(genes, "  ") == [] and find_genes(genes, "nothing") == []


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_a_gene_is_read_block_by_block_and_repeated_names_are_summed(tmp_path: Path, block: int) -> None:
    counts = np.array([[1, 0, 2, 5], [0, 0, 0, 0], [0, 3, 4, 0], [7, 0, 0, 1]], dtype=np.float32)
    cells = Cells(sp.csr_matrix(counts), np.array(["A", "B", "A", "C"]), np.array(["a", "b", "c", "d"]))
    write_cells(cells, tmp_path / "cells.h5ad")
    with open_h5ad(tmp_path / "cells.h5ad") as source:
        count, total = gene_counts(source, "A", block)
        np.testing.assert_array_equal(count, [3, 0, 4, 7])
        np.testing.assert_array_equal(total, [8, 0, 7, 8])
        with pytest.raises(BadInput, match="no gene 'Z'.*type a name"):
            gene_counts(source, "Z")


def test_log_normalised_values_are_those_of_scanpy(demo_cells: Cells) -> None:
    import scanpy as sc
    from anndata import AnnData

    table = AnnData(demo_cells.counts.copy())
    sc.pp.normalize_total(table, target_sum=1e4)
    sc.pp.log1p(table)
    column = 3
    ours = log_normalised(demo_cells.counts.toarray()[:, column], np.asarray(demo_cells.counts.sum(axis=1)).ravel())
    np.testing.assert_allclose(ours, table.X.toarray()[:, column], rtol=1e-5)
    assert np.isnan(log_normalised(np.zeros(1), np.zeros(1))).all()


def test_cells_with_a_gene_are_listed_highest_first_and_only_those_asked_for() -> None:
    count, among = np.array([0.0, 2, 5, 2, 9]), np.array([True, True, True, True, False])
    assert at_least(count, 1, among).tolist() == [2, 1, 3]
    assert at_least(count, 3, among).tolist() == [2]
    assert at_least(count, 10, among).tolist() == []
    with pytest.raises(BadInput, match="above 0"):
        at_least(count, 0, among)


def test_reference_cells_have_counts_and_a_smaller_draw_is_part_of_a_larger() -> None:
    empty = np.arange(100) % 3 == 0
    many, few = reference_rows(empty, 50), reference_rows(empty, 20)
    assert len(set(many.tolist())) == 50 and not empty[many].any()
    np.testing.assert_array_equal(few, many[:20])
    assert sorted(reference_rows(empty, 1000)) == np.flatnonzero(~empty).tolist()


def line(n: int = 40) -> Reference:
    """Cells on a straight line through embedding space, mapped to a line: the place of any point of it is known."""
    along = np.linspace(0, 1, n)
    direction = np.array([0.6, 0.8, 0.0])
    return Reference(
        np.array([f"c{i}" for i in range(n)]), along[:, None] * direction, np.column_stack([along, -along])
    )


def test_on_a_straight_line_a_place_is_where_the_point_lies() -> None:
    """Symmetric weights reproduce linear functions; between the cells of an even line they are symmetric."""
    reference = line(41)
    inner = reference.embedding[15:26]
    np.testing.assert_allclose(place(inner, reference, k=8), reference.place[15:26], atol=1e-12)
    midway = (reference.embedding[19] + reference.embedding[20]) / 2
    np.testing.assert_allclose(place(midway[None], reference, k=7)[0], [0.4875, -0.4875], atol=1e-12)


def test_a_place_is_the_weighted_mean_written_out(demo_cells: Cells) -> None:
    draws = np.random.Generator(np.random.Philox(1))
    reference = Reference(np.arange(30).astype(str), draws.normal(size=(30, 4)), draws.normal(size=(30, 2)))
    query = draws.normal(size=4)
    distance = sorted((float(np.sqrt(((e - query) ** 2).sum())), tuple(m)) for e, m in zip(
        reference.embedding, reference.place, strict=True))  # fmt: skip
    h = distance[5][0]
    weights = [(1 - (d / h) ** 3) ** 3 for d, _ in distance[:5]]
    wanted = [sum(w * m[axis] for w, (_, m) in zip(weights, distance, strict=False)) / sum(weights) for axis in (0, 1)]
    np.testing.assert_allclose(place(query[None], reference, k=5)[0], wanted, rtol=1e-12)


def test_a_place_does_not_jump_when_a_neighbour_is_exchanged_and_ignores_the_order_of_cells() -> None:
    draws = np.random.Generator(np.random.Philox(2))
    reference = Reference(np.arange(50).astype(str), draws.normal(size=(50, 3)), draws.normal(size=(50, 2)))
    way = np.linspace(-1, 1, 4001)[:, None] * np.array([1.0, 0.3, -0.2])
    places = place(way, reference, k=6)
    assert np.linalg.norm(np.diff(places, axis=0), axis=1).max() < 0.02
    order = draws.permutation(50)
    other = Reference(reference.cell_id[order], reference.embedding[order], reference.place[order])
    np.testing.assert_allclose(place(way[:50], other, k=6), places[:50], atol=1e-12)


def test_cells_all_equally_near_count_alike_and_one_cell_is_too_few() -> None:
    same = Reference(np.array(["a", "b", "c"]), np.ones((3, 2)), np.array([[0.0, 0], [3, 0], [0, 3]]))
    np.testing.assert_allclose(place(np.array([[1.0, 1], [5, 5]]), same), [[1, 1], [1, 1]])
    with pytest.raises(BadInput, match="at least 2 cells"):
        place(np.ones((1, 2)), same.without(["a", "c"]))


@pytest.fixture
def moved(tiny_bundle: GE2Hist, demo_cells: Cells):
    embedding = tiny_bundle.embed(demo_cells, 0)
    plane = np.asarray(demo_cells.xy_um, dtype=np.float64)
    reference = Reference(demo_cells.cell_id, embedding, plane)

    def run(edit: str, ids: tuple[str, ...] = ("cell-3",), **how: object) -> pd.DataFrame:
        recipe = Recipe("0" * 64, tiny_bundle.sha256, ids, Perturbation.parse(edit), seeds=(0,))
        rows = [int(name.partition("-")[2]) for name in ids]
        return shifts(recipe, tiny_bundle, demo_cells, reference, plane[rows], **how)

    return run


def test_no_edit_is_no_arrow_and_a_strong_one_moves_the_cell(moved) -> None:
    none = moved("ACTB:x1")
    assert none.loc[0, ["dx", "dy", "length", "distance"]].tolist() == [0, 0, 0, 0] and none.at[0, "p"] == 1.0
    assert "sees no difference" in in_words(none)
    some = moved("GAPDH:ko,KRT8:x4").loc[0]
    assert some["length"] > 0 and some["distance"] > 0 and 0.05 <= some["p"] <= 1
    np.testing.assert_allclose(np.hypot(some["dx"], some["dy"]), some["length"])


def test_a_cells_arrow_does_not_depend_on_the_other_cells(moved) -> None:
    together, alone = moved("GAPDH:ko", ("cell-3", "cell-20")), moved("GAPDH:ko", ("cell-20",))
    pd.testing.assert_frame_equal(together.iloc[[1]].reset_index(drop=True), alone)


def test_the_noise_is_measured_for_the_first_cells_and_the_words_say_so(moved) -> None:
    table = moved("GAPDH:ko", ("cell-3", "cell-20"), noise_cells=1)
    assert table["p"].notna().tolist() == [True, False] == table["wander"].notna().tolist()
    assert "first 1 of 2 cells" in in_words(table)


def test_words_tell_noise_from_a_move() -> None:
    columns = ["cell_id", "x", "y", "dx", "dy", "length", "distance", "p", "wander", "support"]
    noise = pd.DataFrame([("c", 0, 0, 1, 0, 1.0, 0.2, 0.4, 2.0, 0.5)], columns=columns)
    assert "take the pale arrow for noise" in in_words(noise) and "outside" not in in_words(noise)
    real = noise.assign(p=0.05, support=0.01)
    assert "by 1 map units; ties alone move its place by 2" in in_words(real)
    assert "lies outside the training data" in in_words(real) and "noise" not in in_words(real)


# --- the figure ------------------------------------------------------------------------------------------------------

CHOSEN = {"cell_id": ["c1"], "x": [1.0], "y": [2.0]}


@pytest.fixture
def cells() -> pd.DataFrame:
    return pd.DataFrame({"cell_id": ["c0", "c1", "c2", "c3"], "x": [0.0, 1, 2, 3], "y": [1.0, 2, 3, 4]})


@pytest.mark.parametrize("theme", charts.THEMES)
def test_a_gene_colours_the_map_with_unexpressed_cells_grey_and_below(cells: pd.DataFrame, theme: str) -> None:
    table = cells.assign(value=[2.0, 0.0, 0.5, np.nan])
    figure = charts.cell_map(table, CHOSEN, colour="gene", value="CD8A, ln(1 + counts per 10,000)", theme=theme)
    grey, shown, ring = figure.data
    assert list(grey.customdata) == ["c1", "c3"] and grey.marker.color == charts.THEMES[theme]["grid"]
    assert list(shown.customdata) == ["c2", "c0"] and list(shown.marker.color) == [0.5, 2.0]
    assert shown.marker.colorbar.title.text == "CD8A, ln(1 + counts per 10,000)"
    assert list(ring.customdata) == ["c1"]


def test_types_keep_their_colour_and_names_of_files_are_escaped(cells: pd.DataFrame) -> None:
    table = cells.assign(group=["Fibroblast", "<b>x</b>", "Fibroblast", "B cell"])
    figure = charts.cell_map(table, CHOSEN, colour="type")
    by_name = {trace.name: trace for trace in figure.data}
    assert by_name["Fibroblast"].marker.color == colour_of("Fibroblast")
    assert "&lt;b&gt;x&lt;/b&gt;" in by_name and not any("<b>" in str(trace.hovertemplate) for trace in figure.data)


def test_forty_eight_donors_differ_in_colour_or_shape() -> None:
    n = 48
    table = pd.DataFrame({"cell_id": [str(i) for i in range(n)], "x": 0.0, "y": 0.0})
    figure = charts.cell_map(table.assign(group=[f"donor-{i}" for i in range(n)]), CHOSEN, colour="donor")
    looks = {(trace.marker.color, trace.marker.symbol) for trace in figure.data[:-1]}
    assert len(looks) == n


def test_support_draws_what_was_not_looked_at_first(cells: pd.DataFrame) -> None:
    inside, outside, unknown = charts.SUPPORT
    figure = charts.cell_map(cells.assign(group=[inside, outside, unknown, inside]), CHOSEN, colour="support")
    assert [trace.name for trace in figure.data[:3]] == [unknown, outside, inside]


def test_an_arrow_leads_from_the_cell_by_its_shift_and_is_pale_where_it_is_noise(cells: pd.DataFrame) -> None:
    moves = pd.DataFrame(
        [("c1", 1.0, 2.0, 0.5, -1.0, 1.1, 0.05), ("c2", 2.0, 3.0, 1.0, 0.0, 1.0, 0.6), ("c3", 3.0, 4.0, 0, 0, 0, 1.0)],
        columns=["cell_id", "x", "y", "dx", "dy", "length", "p"],
    )
    figure = charts.cell_map(cells.assign(group="B cell"), CHOSEN, colour="type", moves=moves)
    real, noise = figure.data[-2:]
    assert (list(real.customdata), list(noise.customdata)) == (["c1"], ["c2"])
    drawn = {(arrow.ax, arrow.ay, arrow.x, arrow.y, arrow.arrowcolor) for arrow in figure.layout.annotations}
    look = charts.THEMES["light"]
    assert drawn == {(1.0, 2.0, 1.5, 1.0, look["ink"]), (2.0, 3.0, 3.0, 3.0, look["muted"])}
    assert all((arrow.axref, arrow.ayref) == ("x", "y") for arrow in figure.layout.annotations)


def test_a_section_counts_downwards_and_its_axes_carry_their_unit(cells: pd.DataFrame) -> None:
    figure = charts.cell_map(cells.assign(group=""), CHOSEN, colour="type", axes=("x (µm)", "y (µm)"), downwards=True)
    assert figure.layout.yaxis.autorange == "reversed" and figure.layout.yaxis.scaleanchor == "x"
    assert figure.layout.xaxis.title.text == "x (µm)"
