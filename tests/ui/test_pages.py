"""Every page through ``app.py``, on a small real bundle: what a user sees, without a browser."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from ge2hist_core.data import write_cells
from ge2hist_core.types import Cells
from pages import _ui
from pages._experiment import Experiment, with_edit
from perturb.edits import Edit, Perturbation
from perturb.recipe import Recipe

APP = Path(__file__).parents[2] / "app.py"
START = "pages/explore.py"
PAGES = sorted(f"pages/{path.name}" for path in (APP.parent / "pages").glob("[!_]*.py"))
TIMEOUT = 300
GENE = "GAPDH"


@pytest.fixture(scope="module")
def cells_file(tmp_path_factory: pytest.TempPathFactory, demo_cells: Cells) -> Path:
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    write_cells(demo_cells, path)
    return path


@pytest.fixture
def settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, cells_file: Path
) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setenv("GE2HIST_BUNDLE", str(tiny_folder))
    monkeypatch.setenv("GE2HIST_CELLS", str(cells_file))
    monkeypatch.setenv("GE2HIST_HOME", str(tmp_path_factory.mktemp("home")))
    yield monkeypatch
    _ui.get_worker().close()
    _ui.get_worker.clear()
    st.cache_resource.clear()
    st.cache_data.clear()


def start(query: dict[str, str] | None = None) -> AppTest:
    at = AppTest.from_file(str(APP), default_timeout=TIMEOUT)
    for name, value in (query or {}).items():
        at.query_params[name] = value
    return at.run()


def texts(at: AppTest) -> str:
    """All that the page says."""
    kinds = (at.markdown, at.caption, at.error, at.warning, at.info, at.subheader, at.get("html"))
    return "\n".join(str(getattr(one, "value", None) or one.proto) for kind in kinds for one in kind)


def address(at: AppTest) -> dict[str, str]:
    return {name: value[0] if isinstance(value, list) else value for name, value in at.query_params.items()}


def add_gene(at: AppTest, gene: str = GENE) -> AppTest:
    return at.selectbox(key="gene").set_value(gene).run()


@pytest.mark.parametrize("path", PAGES)
def test_every_page_opens_without_an_error(settings: pytest.MonkeyPatch, path: str) -> None:
    at = start()
    if path != START:
        at.switch_page(path).run()
    assert not at.exception and not at.error
    assert "predicts" not in texts(at)


@pytest.mark.parametrize("path", PAGES)
def test_without_a_bundle_every_page_says_what_to_do(settings: pytest.MonkeyPatch, tmp_path: Path, path: str) -> None:
    settings.setenv("GE2HIST_BUNDLE", str(tmp_path / "none"))
    at = start()
    if path != START:
        at.switch_page(path).run()
    assert not at.exception and not at.error
    if path != "pages/about.py":
        assert "No model bundle found" in texts(at)


def test_a_broken_bundle_is_one_sentence(settings: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text("{")
    settings.setenv("GE2HIST_BUNDLE", str(tmp_path))
    at = start()
    assert not at.exception
    assert len(at.error) == 1 and "damaged" in at.error[0].value


def test_without_demo_cells_an_upload_is_asked_for(settings: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings.setenv("GE2HIST_CELLS", str(tmp_path / "none.h5ad"))
    at = start()
    assert not at.exception and "No cells yet" in texts(at)


def test_edits_reach_the_address_and_can_be_undone(settings: pytest.MonkeyPatch) -> None:
    at = add_gene(start())
    assert address(at)["genes"] == GENE
    at.slider(key=f"amount {GENE}").set_value(50).run()
    assert address(at)["edit"] == f"{GENE}:x0.5"
    at.toggle(key=f"ko {GENE}").set_value(True).run()
    assert address(at)["edit"] == f"{GENE}:ko"
    assert at.slider(key=f"amount {GENE}").disabled
    at.button(key="undo").click().run()
    assert address(at)["edit"] == f"{GENE}:x0.5" and at.slider(key=f"amount {GENE}").value == 50
    at.button(key="redo").click().run()
    assert address(at)["edit"] == f"{GENE}:ko"
    at.button(key="reset").click().run()
    assert "edit" not in address(at) and at.slider(key=f"amount {GENE}").value == 100


def test_a_draft_is_a_pair_of_marked_pictures_and_its_numbers(settings: pytest.MonkeyPatch) -> None:
    at = add_gene(start())
    assert len(at.image) == 1
    at.toggle(key=f"ko {GENE}").set_value(True).run()
    assert not at.exception and not at.error
    assert len(at.image) == 2
    assert len(at.get("plotly_chart")) == 3
    assert len(at.get("download_button")) == 6
    assert "counts · bin" in texts(at)


def test_the_address_alone_restores_everything(settings: pytest.MonkeyPatch, demo_cells: Cells) -> None:
    at = add_gene(start(), "ACTB")
    add_gene(at)
    at.toggle(key=f"ko {GENE}").set_value(True).run()
    other = start(address(at))
    assert other.toggle(key=f"ko {GENE}").value
    assert other.slider(key="amount ACTB").value == 100
    assert address(other) == address(at)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"edit": "NOSUCHGENE:ko"}, "NOSUCHGENE"),
        ({"edit": "GAPDH"}, "GENE"),
        ({"cell": "no-such-cell"}, "no-such-cell"),
        ({"seeds": "x"}, "seeds"),
        ({"schema": "99"}, "schema"),
        ({"data": "0" * 12}, "upload"),
    ],
)
def test_a_bad_address_is_explained_and_the_demo_opens(
    settings: pytest.MonkeyPatch, change: dict[str, str], says: str
) -> None:
    query = address(start()) | change
    at = start(query)
    assert not at.exception
    assert len(at.warning) == 1 and says in at.warning[0].value.replace("\\", "")
    assert len(at.image) == 1


def test_two_tabs_do_not_mix(settings: pytest.MonkeyPatch) -> None:
    one, two = add_gene(start()), add_gene(start())
    one.toggle(key=f"ko {GENE}").set_value(True).run()
    two.slider(key=f"amount {GENE}").set_value(200).run()
    one.run()
    assert address(one)["edit"] == f"{GENE}:ko" and address(two)["edit"] == f"{GENE}:x2"


def test_ten_sessions_at_once_each_see_their_own_result(settings: pytest.MonkeyPatch) -> None:
    """A gate in the worker holds all runs back until everybody has asked: the last one is told how many are before."""
    gate = threading.Event()
    _ui.get_worker().submit("gate", lambda on_progress, cancel: gate.wait(TIMEOUT), "test")
    sessions = []
    for i in range(10):
        at = start({"seeds": "0-1", "steps": "1"} | address(start()) | {"edit": f"{GENE}:set={i + 2}", "seeds": "0-1"})
        at.button(key="run").click().run()
        assert not at.exception and not at.error
        sessions.append(at)
    recipes = [at.session_state["experiment"].recipe for at in sessions]
    assert len({recipe.hash for recipe in recipes}) == 10
    assert [_ui.get_worker().state(recipe.hash).position for recipe in recipes] == list(range(1, 11))
    gate.set()
    for recipe in recipes:
        state = _ui.get_worker().wait(recipe.hash, timeout=TIMEOUT)
        assert state is not None and state.status == "done", state
    for i, at in enumerate(sessions):
        at.run()
        assert not at.exception and not at.error
        assert address(at)["edit"] == f"{GENE}:set={i + 2}"
        result = _ui.get_result(recipes[i])
        assert result.recipe == recipes[i] and result.edits["count_after"].item() == i + 2


def test_a_full_run_is_done_by_the_worker_and_survives_the_tab(settings: pytest.MonkeyPatch) -> None:
    at = start(address(start()) | {"seeds": "0-5", "steps": "2", "edit": f"{GENE}:ko"})
    at.button(key="run").click().run()
    recipe = at.session_state["experiment"].recipe
    state = _ui.get_worker().wait(recipe.hash, timeout=TIMEOUT)
    assert state is not None and state.status == "done", state
    later = start(address(at))
    assert not later.exception and not later.error
    assert later.selectbox(key="seed of 6").value == 0
    assert "Draft" not in texts(later)
    later.switch_page("pages/report.py").run()
    assert not later.exception and later.get("iframe")
    assert address(later)["edit"] == f"{GENE}:ko"


def test_changing_the_page_keeps_the_experiment(settings: pytest.MonkeyPatch) -> None:
    at = add_gene(start())
    at.toggle(key=f"ko {GENE}").set_value(True).run()
    at.switch_page("pages/about.py").run()
    at.query_params.clear()
    at.switch_page("pages/explore.py").run()
    assert at.toggle(key=f"ko {GENE}").value


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x80abc", "not a text file"),
        (b"{", "not valid JSON"),
        (b'{"schema": 99}', "schema 99"),
    ],
)
def test_a_bad_recipe_is_one_sentence(settings: pytest.MonkeyPatch, content: bytes, says: str) -> None:
    at = start()
    at.switch_page("pages/report.py").run()
    at.file_uploader(key="recipe file").upload("recipe.json", content, "application/json").run()
    assert not at.exception
    assert len(at.error) == 1 and says in at.error[0].value.replace("\\", "")


def test_a_saved_recipe_is_replayed(settings: pytest.MonkeyPatch) -> None:
    at = start()
    recipe = at.session_state["experiment"].recipe
    wanted = json.loads(recipe.to_json()) | {
        "seeds": [0, 1],
        "perturbation": [{"gene": GENE, "kind": "ko", "amount": 0}],
    }
    at.switch_page("pages/report.py").run()
    at.file_uploader(key="recipe file").upload("recipe.json", json.dumps(wanted).encode(), "application/json").run()
    at.button(key="replay").click().run()
    state = _ui.get_worker().wait(Recipe.from_json(json.dumps(wanted)).hash, timeout=TIMEOUT)
    assert state is not None and state.status == "done"
    assert address(at.run())["edit"] == f"{GENE}:ko"


def test_an_upload_is_kept_by_its_hash_and_opened(
    settings: pytest.MonkeyPatch, demo_cells: Cells, tmp_path: Path
) -> None:
    write_cells(demo_cells.take([7, 9]), tmp_path / "mine.h5ad")
    at = start()
    at.file_uploader(key="file 0").upload("mine.h5ad", (tmp_path / "mine.h5ad").read_bytes()).run()
    assert not at.exception and not at.error
    assert address(at)["cell"] == "cell-7"
    assert start(address(at)).session_state["experiment"].path.name == "mine.h5ad"


def test_a_bad_upload_is_one_sentence_and_nothing_is_lost(settings: pytest.MonkeyPatch) -> None:
    at = add_gene(start())
    at.toggle(key=f"ko {GENE}").set_value(True).run()
    before = address(at)
    at.file_uploader(key="file 0").upload("mine.h5ad", b"no hdf5").run()
    assert not at.exception
    assert len(at.warning) == 1 and "not an .h5ad file" in at.warning[0].value.replace("\\", "")
    assert address(at) == before
    assert not list((_ui.home() / "uploads").glob("*/*"))


@pytest.fixture
def one_type(settings: pytest.MonkeyPatch, demo_cells: Cells, tmp_path: Path) -> None:
    """The demo cells as sixty of one type: enough for percentiles."""
    path = tmp_path / "one.h5ad"
    write_cells(replace(demo_cells, cell_type=np.repeat("One type", len(demo_cells))), path)
    settings.setenv("GE2HIST_CELLS", str(path))


def test_a_gene_is_set_to_a_percentile_of_its_type(one_type: None) -> None:
    at = add_gene(start())
    at.segmented_control(key=f"mode {GENE}").set_value("percentile").run()
    at.slider(key=f"percentile {GENE}").set_value(90).run()
    assert not at.exception and not at.error
    assert address(at)["edit"] == f"{GENE}:p90" and len(at.image) == 2
    again = start(address(at))
    assert again.slider(key=f"percentile {GENE}").value == 90
    at.button(key="undo").click().run()
    assert "edit" not in address(at)


def test_an_edit_is_made_in_many_cells_of_the_type(one_type: None) -> None:
    at = start(address(start()) | {"seeds": "0-1", "steps": "2", "edit": f"{GENE}:x4"})
    at.number_input(key="n cells").set_value(5).run()
    recipe = at.session_state["experiment"].recipe
    assert len(set(recipe.cell_ids)) == 5 and "and 4 more" in texts(at)
    assert at.button(key="run").label == "Compare 5 cells over 2 seeds"
    at.button(key="run").click().run()
    state = _ui.get_worker().wait(recipe.hash, timeout=TIMEOUT)
    assert state is not None and state.status == "done", state
    later = start(address(at))
    assert not later.exception and not later.error
    later.selectbox(key="shown of 5").set_value(recipe.cell_ids[3]).run()
    assert not later.exception and len(later.image) == 2


def test_a_signature_gets_a_dose_and_one_card(settings: pytest.MonkeyPatch) -> None:
    """The small encoder's data have some of its genes: STAT1, CXCL9, CXCL10, HLA-DRA among others."""
    at = start()
    at.selectbox(key="signature").set_value("interferon_gamma").run()
    at.button(key="add signature").click().run()
    assert not at.exception and not at.error
    assert address(at)["edit"].startswith("interferon_gamma@1(")
    assert "interferon_gamma at dose 1" in {button.label.replace("\\", "") for button in at.button}
    at.slider(key="dose interferon_gamma").set_value(0.0).run()
    assert address(at)["edit"].startswith("interferon_gamma@0(") and not at.exception
    other = start(address(at))
    assert other.slider(key="dose interferon_gamma").value == 0.0
    at.button(key="drop set interferon_gamma").click().run()
    assert "edit" not in address(at)


def test_seven_doses_are_drawn_by_the_worker(settings: pytest.MonkeyPatch) -> None:
    at = start(address(start()) | {"seeds": "0-1", "steps": "1"})
    at.selectbox(key="signature").set_value("interferon_gamma").run()
    at.button(key="add signature").click().run()
    at.segmented_control(key="section").set_value("Doses").run()
    at.button(key="run doses").click().run()
    assert not at.exception and not at.error
    (key,) = [key for key in _ui.get_worker().keys if key != at.session_state["experiment"].recipe.hash]
    state = _ui.get_worker().wait(key, timeout=TIMEOUT)
    assert state is not None and state.status == "done", state
    at.run()
    assert not at.exception and at.get("plotly_chart")
    assert "half-effective dose" in texts(at).lower()
    assert "Report (ZIP)" in {button.proto.label for button in at.get("download_button")}


def test_a_screen_runs_in_the_worker_and_shows_its_tables(settings: pytest.MonkeyPatch) -> None:
    at = start(address(start()) | {"steps": "1"})
    at.switch_page("pages/screen.py").run()
    at.segmented_control(key="candidates").set_value("A list of genes").run()
    at.text_input(key="screen genes search").set_value("gapdh, ACTB CD8A;KRT8").run()
    assert at.multiselect(key="screen genes").value == ["GAPDH", "ACTB", "CD8A", "KRT8"]
    at.number_input(key="keep").set_value(2).run()
    assert not at.exception and not at.error
    at.button(key="start screen").click().run()
    (key,) = _ui.get_worker().keys
    state = _ui.get_worker().wait(key, timeout=TIMEOUT)
    assert state is not None and state.status == "done", state
    at.run()
    assert not at.exception and len(at.dataframe) == 2 and at.get("plotly_chart")
    assert "Start the screen" not in {button.label for button in at.button}
    labels = {button.proto.label for button in at.get("download_button")}
    assert {"Report (HTML)", "Report (PDF)", "Cells (h5ad)", "Everything (ZIP)"} <= labels


def test_types_and_environments_are_drawn_by_the_worker(settings: pytest.MonkeyPatch, tmp_path: Path) -> None:
    at = start()
    at.switch_page("pages/cell_types.py").run()
    at.multiselect(key="gallery types").set_value(["Fibroblast", "B cell"]).run()
    for kind, pictures in (("Grid", 10), ("Between two cells", 5)):
        at.segmented_control(key="gallery kind").set_value(kind).run()
        assert not at.exception and not at.error
        at.button(key="draw gallery").click().run()
        key = _ui.get_worker().keys[-1]
        state = _ui.get_worker().wait(key, timeout=TIMEOUT)
        assert state is not None and state.status == "done", state
        at.run()
        assert not at.exception and len(at.image) == pictures and len(at.dataframe) == 1
        assert [one.proto.label for one in at.get("download_button")] == ["Table (CSV)", "Everything (ZIP)"]


def test_scenarios_are_kept_changed_drawn_and_survive_the_tab(settings: pytest.MonkeyPatch) -> None:
    at = start(address(start()) | {"seeds": "0-1", "steps": "1", "edit": f"{GENE}:ko"})
    at.switch_page("pages/compare.py").run()
    assert "No scenario yet" in texts(at)
    at.button(key="add scenario").click().run()
    at.button(key="copy scenario 0").click().run()
    at.text_input(key="scenario name 1").set_value("<b>the second</b>").run()
    assert not at.exception and not at.error
    at.button(key="down scenario 0").click().run()
    assert at.text_input(key="scenario name 0").value == "<b>the second</b>"
    at.button(key="undo scenarios").click().run()
    assert at.text_input(key="scenario name 1").value == "<b>the second</b>"
    at.button(key="draw scenarios").click().run()
    key = _ui.get_worker().keys[-1]
    state = _ui.get_worker().wait(key, timeout=TIMEOUT)
    assert state is not None and state.status == "done", state
    at.run()
    assert not at.exception and len(at.image) == 2 and at.get("plotly_chart")
    at.button(key="delete scenario 0").click().run()
    assert len(at.image) == 1
    other = start()
    for name, value in address(at).items():
        other.query_params[name] = value
    other.switch_page("pages/compare.py").run()
    assert other.text_input(key="scenario name 0").value == "<b>the second</b>"


def test_an_uploaded_signature_can_be_chosen_and_a_bad_one_is_one_sentence(settings: pytest.MonkeyPatch) -> None:
    at = start()
    at.file_uploader(key="signatures 0").upload("bad.csv", b"one line without any columns", "text/csv").run()
    assert not at.exception and len(at.error) == 1
    at.file_uploader(key="signatures 0").upload("mine.csv", b"gene,logFC\nGAPDH,1.5\nACTB,-2\n", "text/csv").run()
    assert not at.exception
    at.selectbox(key="signature").set_value("mine").run()
    at.button(key="add signature").click().run()
    assert address(at)["edit"] == "mine@1(GAPDH:x2.82843;ACTB:x0.25)"


def test_how_an_uploaded_signature_is_read_can_be_changed(settings: pytest.MonkeyPatch) -> None:
    at = start()
    text = b"gene,logFC,padj\nGAPDH,0.5,0.01\nACTB,-2,0.3\nCD8A,0.1,0.001\n"
    at.file_uploader(key="signatures 0").upload("mine.csv", text, "text/csv").run()

    def added() -> str:
        at.selectbox(key="signature").set_value("mine").run()
        at.button(key="add signature").click().run()
        assert not at.exception and not at.error
        return address(at)["edit"]

    at.number_input(key="signature padj").set_value(0.05).run()
    assert added() == "mine@1(GAPDH:x1.41421;CD8A:x1.07177)"
    at.number_input(key="signature top").set_value(1).run()
    assert added() == "mine@1(GAPDH:x1.41421)"
    at.segmented_control(key="signature base").set_value("10").run()
    assert added() == f"mine@1(GAPDH:x{10**0.5:.6g})"
    at.toggle(key="signature directions").set_value(True).run()
    assert added() == "mine@1(GAPDH:x2)"
    # What the file cannot be read by is one sentence, and the choices before stay.
    at.number_input(key="signature padj").set_value(1e-9).run()
    assert "no row with a gene and a change that passes" in texts(at) and not at.exception
    assert at.number_input(key="signature padj").value == 0.05 and added() == "mine@1(GAPDH:x2)"


def test_uploaded_signatures_can_be_screened(settings: pytest.MonkeyPatch) -> None:
    at = start(address(start()) | {"steps": "1"})
    table = b"gene,logFC,contrast\nGAPDH,1,A\nACTB,-2,A\nKRT8,2,B\nNOSUCHGENE,1,C\n"
    at.switch_page("pages/screen.py").run()
    at.segmented_control(key="candidates").set_value("Drug signatures").run()
    assert "of 29 signatures act on genes" in texts(at)
    at.file_uploader(key="signatures 0").upload("bad.csv", b"one line without any columns", "text/csv").run()
    assert len(at.error) == 1 and not at.exception
    at.file_uploader(key="signatures 0").upload("mine.csv", table, "text/csv").run()
    assert not at.exception and not at.error and "2 of 3 signatures act on genes" in texts(at)
    at.number_input(key="keep").set_value(2).run()
    at.button(key="start screen").click().run()
    (key,) = _ui.get_worker().keys
    state = _ui.get_worker().wait(key, timeout=TIMEOUT)
    assert state is not None and state.status == "done", state
    at.run()
    shown = {name for table in at.dataframe for name in table.value.iloc[:, 0]}
    assert {"A@1(GAPDH:x2;ACTB:x0.25)", "B@1(KRT8:x4)"} <= shown
    at.segmented_control(key="signatures of 2").set_value("The library").run()
    assert "of 29 signatures act on genes" in texts(at) and not at.exception
    # The file goes along to the Explore page, and what was uploaded there would come here.
    at.switch_page("pages/explore.py").run()
    at.selectbox(key="signature").set_value("B").run()
    assert not at.exception and not at.error


def test_changing_one_edit_leaves_repeated_edits_of_others_alone() -> None:
    before = Perturbation.parse("CD8A:x2,CD8A:x3,VEGFA:ko")
    assert str(with_edit(before, "MYC", Edit("MYC", "ko"))) == "CD8A:x2,CD8A:x3,VEGFA:ko,MYC:ko"
    assert str(with_edit(before, "CD8A", Edit("CD8A", "ko"))) == "CD8A:ko,VEGFA:ko"
    assert str(with_edit(before, "CD8A", None)) == "VEGFA:ko"


def test_an_address_too_long_for_a_browser_is_kept_on_disk(settings: pytest.MonkeyPatch) -> None:
    settings.setattr(_ui, "ADDRESS", 40)
    at = add_gene(start())
    at.toggle(key=f"ko {GENE}").set_value(True).run()
    short = address(at)
    assert "edit" not in short and len(short["kept"]) == 32
    again = start(short)
    assert again.toggle(key=f"ko {GENE}").value and not again.exception
    lost = start(short | {"kept": "0" * 32})
    assert "are kept on the server that made it" in texts(lost) and not lost.exception


def test_edits_spread_through_a_network_that_a_link_finds_again(settings: pytest.MonkeyPatch) -> None:
    from perturb.networks import known_truth

    at = add_gene(start())
    at.toggle(key=f"ko {GENE}").set_value(True).run()
    at.selectbox(key="network").set_value(known_truth().sha256).run()
    assert not at.exception and not at.error
    assert "edges start at an edited gene" in texts(at)
    assert "moves no gene of these cells" in texts(at)
    again = start(address(at))
    assert again.selectbox(key="network").value == known_truth().sha256
    lost = start(address(at) | {"network": "0" * 12 + ",3,0,0.99,gone"})
    assert "is not here" in texts(lost) and not lost.exception


def test_undo_and_redo_walk_the_history() -> None:
    recipe = Recipe("0" * 64, "1" * 64, ("c",))
    one = Experiment(recipe, Path("x"))
    first, second = Perturbation.parse("A:ko"), Perturbation.parse("A:ko,B:x2")
    one.edit(first)
    one.edit(second)
    one.edit(second)
    one.undo()
    assert one.recipe.perturbation == first
    one.undo()
    one.undo()
    assert not one.recipe.perturbation and one.genes == ("A", "B")
    one.redo()
    one.drop_gene("A")
    assert not one.future and one.genes == ("B",) and not one.recipe.perturbation
