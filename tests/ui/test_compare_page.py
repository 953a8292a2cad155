"""The Compare page through ``app.py``: whose list it is, which counts a scenario is drawn from, what is taken home."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from ge2hist_core.data import write_cells
from ge2hist_core.types import BadInput, Cells
from pages import _ui
from perturb.edits import Perturbation
from perturb.workspace import Workspace, save_workspace

APP = Path(__file__).parents[2] / "app.py"
TIMEOUT = 300
EDIT = {"seeds": "0-1", "steps": "1", "edit": "GAPDH:ko"}


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Path, demo_cells: Cells) -> Iterator[Path]:
    """The app's folder; the cells' file has counts in X and, in a layer, four times as many."""
    write_cells(demo_cells, tmp_path / "cells.h5ad")
    table = anndata.read_h5ad(tmp_path / "cells.h5ad")
    table.layers["fourfold"] = table.X * 4
    table.write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.setenv("GE2HIST_BUNDLE", str(tiny_folder))
    monkeypatch.setenv("GE2HIST_CELLS", str(tmp_path / "cells.h5ad"))
    monkeypatch.setenv("GE2HIST_HOME", str(tmp_path / "home"))
    yield tmp_path / "home"
    _ui.get_worker().close()
    _ui.get_worker.clear()
    st.cache_resource.clear()
    st.cache_data.clear()


def address(at: AppTest) -> dict[str, str]:
    return {name: value[0] if isinstance(value, list) else value for name, value in at.query_params.items()}


def opened(query: dict[str, str] | None = None) -> AppTest:
    """A new tab on the Compare page with this address."""
    at = AppTest.from_file(str(APP), default_timeout=TIMEOUT)
    for name, value in (EDIT | (query or {})).items():
        at.query_params[name] = value
    at.run()
    at.switch_page("pages/compare.py")
    for name, value in (query or {}).items():
        at.query_params[name] = value
    at.run()
    assert not at.exception and not at.error
    return at


@pytest.fixture
def edited(home: Path) -> dict[str, str]:
    """Address of an experiment with an edit."""
    at = AppTest.from_file(str(APP), default_timeout=TIMEOUT).run()
    return address(at) | EDIT


def scenarios(at: AppTest) -> list[str]:
    return [one.value for one in at.text_input if one.key.startswith("scenario name")]


def click(at: AppTest, key: str) -> AppTest:
    at.button(key=key).click().run()
    assert not at.exception and not at.error
    return at


def draw(at: AppTest) -> AppTest:
    click(at, "draw scenarios")
    state = _ui.get_worker().wait(_ui.get_worker().keys[-1], timeout=TIMEOUT)
    assert state is not None and state.status == "done", state
    at.run()
    assert not at.exception and not at.error
    return at


def test_who_opens_a_link_changes_a_list_of_their_own(home: Path, edited: dict[str, str]) -> None:
    """A tab once saved under the id of the link that it came from: whoever wrote last erased the other's list."""
    owner = click(opened(edited), "add scenario")
    guest = opened(address(owner))
    assert scenarios(guest) == scenarios(owner) and address(guest)["workspace"] == address(owner)["workspace"]
    click(click(guest, "add scenario"), "copy scenario 0")
    click(owner, "add scenario")
    assert address(guest)["workspace"] != address(owner)["workspace"]
    assert len(scenarios(opened(address(owner)))) == 2 == len(scenarios(owner))
    assert len(scenarios(opened(address(guest)))) == 3 == len(scenarios(guest))
    click(guest, "undo scenarios")
    assert len(scenarios(opened(address(guest)))) == 2


def test_a_scenario_with_other_seeds_is_said_to_be_drawn_with_those_of_the_first(
    home: Path, edited: dict[str, str]
) -> None:
    at = click(opened(edited), "add scenario")
    assert not any("instead of" in caption.value for caption in at.caption)
    at = click(opened(address(at) | {"seeds": "0-3"}), "add scenario")
    (said,) = [caption.value for caption in at.caption if "instead of" in caption.value]
    assert "is drawn with seeds 0-1 instead of 0-3, as the first one is" in said.replace("\\", "")


def test_reload_and_server_restart_lose_nothing(home: Path, edited: dict[str, str]) -> None:
    at = click(click(opened(edited), "add scenario"), "add scenario")
    st.cache_resource.clear()
    st.cache_data.clear()
    again = opened(address(at))
    assert scenarios(again) == scenarios(at) and len(scenarios(at)) == 2
    click(again, "delete scenario 0")
    assert scenarios(opened(address(again))) == scenarios(at)[1:]


def test_an_empty_list_has_no_address(edited: dict[str, str]) -> None:
    assert "workspace" not in address(opened(edited))


@pytest.mark.parametrize(
    ("name", "says"), [("../x", "no valid name"), ("0" * 32, "are not here"), ("d" * 32, "is not valid JSON")]
)
def test_a_bad_link_starts_a_new_list_and_says_so(home: Path, edited: dict[str, str], name: str, says: str) -> None:
    damaged = home / "workspaces" / ("d" * 32 + ".json")
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{")
    at = opened(edited | {"workspace": name})
    assert len(at.warning) == 1
    said = at.warning[0].value.replace("\\", "")
    assert says in said and said.endswith("This is a new, empty list.")
    click(at, "add scenario")
    assert not at.warning and len(scenarios(opened(address(at)))) == 1
    assert damaged.read_text() == "{"


def test_each_scenario_is_drawn_from_its_own_matrix(home: Path, edited: dict[str, str]) -> None:
    """Explore's matrix was once read for all scenarios, and kept under the others' hashes."""
    at = click(opened(edited), "add scenario")
    recipe = at.session_state["experiment"].recipe
    # An edit to a number of counts: ranks within a cell do not see that all counts are fourfold.
    perturbation = Perturbation.parse("GAPDH:set=9")
    plain, layer = (replace(recipe, perturbation=perturbation, matrix=name) for name in (None, "fourfold"))
    save_workspace(Workspace().added("plain", plain).added("layer", layer), home / "workspaces", "a" * 32)
    at = draw(opened(edited | {"workspace": "a" * 32}))
    counts = {}
    for one in (plain, layer):
        result = _ui.get_result(one)
        assert result is not None
        counts[one.matrix] = result.edits["count_before"].to_numpy()
    assert (counts[None] > 0).all()
    np.testing.assert_allclose(counts["fourfold"], 4 * counts[None])


def test_cells_are_not_read_for_a_recipe_of_another_matrix_or_file(home: Path, edited: dict[str, str]) -> None:
    at = opened(edited)
    experiment = at.session_state["experiment"]
    model = _ui.get_model()
    source = _ui.get_source(experiment.path, model)
    with pytest.raises(BadInput, match=r"not open with the recipe's matrix \(fourfold\)"):
        _ui.get_cells(replace(experiment.recipe, matrix="fourfold"), source)
    with pytest.raises(BadInput, match=r"gene column \(index\)"):
        _ui.get_cells(replace(experiment.recipe, gene_column="index"), source)
    with pytest.raises(BadInput, match="made with data 000000000000"):
        _ui.get_cells(replace(experiment.recipe, data_sha256="0" * 64), source)
    other = _ui.get_source(experiment.path, model, "fourfold")
    four = _ui.get_cells(replace(experiment.recipe, matrix="fourfold"), other)
    np.testing.assert_allclose(four.counts.sum(), 4 * _ui.get_cells(experiment.recipe, source).counts.sum())


def test_scenarios_are_compared_with_each_other_and_taken_home(home: Path, edited: dict[str, str]) -> None:
    at = opened(edited)
    recipe = at.session_state["experiment"].recipe
    ko, up = (replace(recipe, perturbation=Perturbation.parse(f"GAPDH:{edit}")) for edit in ("ko", "x4"))
    save_workspace(Workspace().added("ko", ko).added("<b>up</b>", up), home / "workspaces", "b" * 32)
    at = draw(opened(edited | {"workspace": "b" * 32}))
    assert [one.key for one in at.selectbox][-1] == "reference scenario"
    assert len(at.get("plotly_chart")) == 2 and len(at.dataframe) == 2
    contrast = at.dataframe[1].value.iloc[0]
    assert contrast["scenario"] == "<b>up</b>"
    at.selectbox(key="reference scenario").set_value("<b>up</b>").run()
    assert not at.exception
    other = at.dataframe[1].value.iloc[0]
    assert other["scenario"] == "ko" and other["effect"] == pytest.approx(-contrast["effect"])
    values = {}
    for name, one in (("ko", ko), ("up", up)):
        result = _ui.get_result(one)
        assert result is not None
        rows = result.readouts
        rows = rows[(rows["arm"] == "edited") & (rows["readout"] == at.selectbox(key="readout compared").value)]
        values[name] = rows.set_index("seed")["value"]
    assert other["effect"] == pytest.approx((values["ko"] - values["up"]).mean())
    labels = {button.proto.label for button in at.get("download_button")}
    assert {"Report (ZIP)", "Table (CSV)", "Differences (CSV)"} <= labels


def test_what_nobody_used_for_days_goes_and_what_is_open_stays(home: Path, edited: dict[str, str]) -> None:
    old = time.time() - (_ui.UPLOAD_DAYS + 1) * 86400
    kept = home / "networks" / ("1" * 64 + ".json")
    files = [home / "uploads" / "2" / "a.h5ad", home / "signatures" / "3" / "b.csv", kept]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
        os.utime(path.parent if path != kept else path, (old, old))
    fresh, link, old_link = (home / name for name in ("networks/4.json", "links/5.json", "links/6.json"))
    for path in (fresh, link, old_link):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    os.utime(link, (old, old))
    os.utime(old_link, (old - _ui.LINK_DAYS * 86400, old - _ui.LINK_DAYS * 86400))
    st.cache_resource.clear()
    opened(edited)
    assert fresh.is_file() and link.is_file() and not old_link.exists() and not any(path.exists() for path in files)


def test_an_upload_that_is_used_again_is_not_removed(home: Path, demo_cells: Cells, tmp_path: Path) -> None:
    write_cells(demo_cells.take([7, 9]), tmp_path / "mine.h5ad")
    at = AppTest.from_file(str(APP), default_timeout=TIMEOUT).run()
    at.file_uploader(key="file 0").upload("mine.h5ad", (tmp_path / "mine.h5ad").read_bytes()).run()
    (path,) = (home / "uploads").glob("*/mine.h5ad")
    old = time.time() - (_ui.UPLOAD_DAYS + 1) * 86400
    os.utime(path.parent, (old, old))
    st.cache_resource.clear()
    again = AppTest.from_file(str(APP), default_timeout=TIMEOUT)
    for name, value in address(at).items():
        again.query_params[name] = value
    again.run()
    assert not again.exception and again.session_state["experiment"].path == path and path.is_file()
