"""The map of cells and the search by a gene, on a small real bundle: what a user sees, without a browser."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from ge2hist_core.data import write_cells
from ge2hist_core.types import Cells
from pages._map import ALL_DONORS, COLOURS, MapView
from tests.ui.test_pages import address, cells_file, settings, start, texts

__all__ = ["cells_file", "settings"]

GENE = "KRT8"


def counts_of(cells: Cells, gene: str) -> np.ndarray:
    return cells.counts.toarray()[:, list(cells.genes).index(gene)]


def open_map(at: AppTest) -> AppTest:
    return at.button(key="open map").click().run()


def traces(at: AppTest) -> list[dict]:
    """Of the map."""
    figures = [json.loads(chart.proto.spec) for chart in at.get("plotly_chart")]
    return next(figure["data"] for figure in figures if figure["layout"].get("uirevision") == "map")


def ids(trace: dict) -> list[str]:
    return list(trace["customdata"])


@pytest.mark.parametrize(
    "view",
    [
        MapView(),
        MapView("umap", "donor"),
        MapView("section", "support", "", True),
        MapView("", "gene", "HLA-DRA"),
        MapView("umap", "gene", "a:b", True),
    ],
)
def test_a_view_comes_back_from_its_address(view: MapView) -> None:
    assert MapView.from_query(view.to_query()) == view


def test_the_view_at_the_start_leaves_nothing_in_the_address_and_nonsense_is_the_start() -> None:
    assert MapView().to_query() == {}
    assert MapView("", "gene", "").to_query() == {}
    for query in ({"colour": "gene"}, {"colour": "donor:x"}, {"colour": "<b>"}, {"map": "tsne"}, {"arrows": "yes"}):
        assert MapView.from_query(query) == MapView()


def test_what_was_typed_is_completed_and_the_highest_cell_is_chosen(
    settings: pytest.MonkeyPatch, demo_cells: Cells
) -> None:
    at = start()
    at.text_input(key="find gene").set_value("krt").run()
    assert {button.label for button in at.button} >= {"KRT8", "KRT18", "KRT19"}
    at.button(key=f"find gene is {GENE}").click().run()
    count = counts_of(demo_cells, GENE)
    assert f"{(count >= 1).sum()} of 60 cells have at least 1 count of {GENE}" in texts(at)
    best = str(demo_cells.cell_id[int(count.argmax())])
    box = at.selectbox(key="find cell")
    assert box.options[0].startswith(f"{best} · {count.max():g} counts")
    box.set_value(best).run()
    assert not at.exception and not at.error and address(at)["cell"] == best


def test_all_cells_of_a_type_with_enough_of_a_gene_are_edited(settings: pytest.MonkeyPatch, demo_cells: Cells) -> None:
    at = start()
    at.text_input(key="find gene").set_value(GENE).run()
    at.number_input(key="find least counts").set_value(2).run()
    fits = counts_of(demo_cells, GENE) >= 2
    name = max(set(demo_cells.cell_type), key=lambda one: int((fits & (demo_cells.cell_type == one)).sum()))
    at.selectbox(key="find type").set_value(name).run()
    at.button(key="find all").click().run()
    chosen = at.session_state["experiment"].recipe.cell_ids
    assert set(chosen) == set(demo_cells.cell_id[fits & (demo_cells.cell_type == name)])


def test_no_cell_and_no_gene_are_one_sentence(settings: pytest.MonkeyPatch) -> None:
    at = start()
    at.text_input(key="find gene").set_value("no such gene").run()
    assert "No gene of this file has" in texts(at) and not at.exception
    at.text_input(key="find gene").set_value(GENE).run()
    at.number_input(key="find least counts").set_value(100000).run()
    assert "the highest has" in texts(at) and not at.exception and not at.error


@pytest.mark.parametrize("colour", [name for name in COLOURS if name != "gene"])
def test_the_map_is_coloured_and_shows_every_cell_once(
    settings: pytest.MonkeyPatch, demo_cells: Cells, colour: str
) -> None:
    at = start({"colour": colour} if colour != "type" else {})
    at.session_state["map donor"] = ALL_DONORS
    open_map(at)
    assert not at.exception and not at.error
    *groups, ring = traces(at)
    assert sorted(sum(map(ids, groups), [])) == sorted(demo_cells.cell_id)
    assert ids(ring) == [at.session_state["experiment"].recipe.cell_ids[0]]
    if colour == "donor":
        assert {trace["name"] for trace in groups} == set(demo_cells.donor)
    if colour == "support":
        assert "of the 60 cells looked at" in texts(at)


def test_sections_are_not_laid_over_each_other_unasked(settings: pytest.MonkeyPatch, demo_cells: Cells) -> None:
    *groups, ring = traces(open_map(start()))
    donor = demo_cells.donor[list(demo_cells.cell_id).index(ids(ring)[0])]
    assert set(sum(map(ids, groups), [])) == set(demo_cells.cell_id[demo_cells.donor == donor])


def test_a_gene_colours_the_map_from_the_address_and_changes_no_recipe(
    settings: pytest.MonkeyPatch, demo_cells: Cells
) -> None:
    plain, at = start(), start({"colour": f"gene:{GENE}"})
    assert at.session_state["experiment"].recipe.hash == plain.session_state["experiment"].recipe.hash
    assert address(at)["colour"] == f"gene:{GENE}" and "colour" not in address(plain)
    at.session_state["map donor"] = ALL_DONORS
    open_map(at)
    grey, shown, _ = traces(at)
    assert set(ids(shown)) == set(demo_cells.cell_id[counts_of(demo_cells, GENE) > 0])
    assert set(ids(grey)) == set(demo_cells.cell_id[counts_of(demo_cells, GENE) == 0])
    assert "ln(1 + counts per 10,000)" in json.dumps(shown)
    assert start(address(at)).session_state["map view"] == MapView("", "gene", GENE)


def test_a_gene_that_the_file_lacks_leaves_the_map_by_type(settings: pytest.MonkeyPatch) -> None:
    at = open_map(start({"colour": "gene:NOSUCHGENE"}))
    assert not at.exception and not at.error and "No gene of this file has" in texts(at)
    assert "Fibroblast" in {trace["name"] for trace in traces(at)}


def test_an_arrow_shows_where_the_edit_moves_the_cell(
    settings: pytest.MonkeyPatch, demo_cells: Cells, tmp_path: Path
) -> None:
    write_cells(demo_cells, tmp_path / "umap.h5ad", umap=np.asarray(demo_cells.xy_um) / 50)
    settings.setenv("GE2HIST_CELLS", str(tmp_path / "umap.h5ad"))
    first = address(start())
    at = open_map(start(first | {"edit": f"GAPDH:ko,{GENE}:set=30", "map": "umap", "arrows": "1"}))
    assert not at.exception and not at.error and not at.warning
    arrow = traces(at)[-1]
    assert ids(arrow) == [first["cell"]] and arrow["marker"]["symbol"].startswith("diamond")
    assert "A place on a UMAP is an approximation" in texts(at)
    unedited = open_map(start(first | {"map": "umap", "arrows": "1"}))
    assert traces(unedited)[-1]["name"] == "Chosen cell"
