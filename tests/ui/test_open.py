"""Bundles and stores opened by path: in one tab only, by one sentence where it cannot be, and found by a link."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from streamlit.testing.v1 import AppTest

from ge2hist_core import rng
from ge2hist_core.store import SectionRecord, write_store
from ge2hist_core.types import BadInput
from pages import _ui
from pages._open import recognise
from tests.conftest import GENES
from tests.ui.test_pages import address, cells_file, settings, start, texts

__all__ = ["cells_file", "settings"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draws = rng.stream(0, "opened store")
    sections = []
    for donor in ("north", "south"):
        n = 10
        xy = draws.uniform(20, 40, (n, 2))
        nuclei = pd.DataFrame({"x_um": xy[:, 0], "y_um": xy[:, 1], "cell_type": ["Fibroblast", "B cell"] * 5})
        counts = sp.csr_matrix(1 + draws.poisson(2.0, (n, len(GENES))).astype(np.float32))
        image = draws.integers(0, 256, (120, 130, 3)).astype(np.uint8)
        sections.append(SectionRecord(donor, image, np.zeros((120, 130), dtype=np.int32), nuclei, counts))
    path = tmp_path_factory.mktemp("opened") / "mine.zarr"
    write_store(path, sections, GENES)
    return path


def open_by_path(at: AppTest, path: Path | str) -> AppTest:
    return at.text_input(key="open path").set_value(str(path)).run()


def test_a_store_opens_in_this_tab_and_its_link_elsewhere(settings: pytest.MonkeyPatch, store: Path) -> None:
    other = start()
    at = open_by_path(start(), store)
    assert not at.exception and not at.error and not at.warning
    assert "mine.zarr" in texts(at) and "Real tile of this cell" in texts(at)
    assert at.session_state["experiment"].path == store
    assert other.run().session_state["experiment"].path == _ui.start_cells()
    again = start(address(at))
    assert not again.error and not again.warning and again.session_state["experiment"].path == store


def test_the_map_of_a_store_has_the_picture_of_one_section_below(settings: pytest.MonkeyPatch, store: Path) -> None:
    at = open_by_path(start(), store)
    at.button(key="open map").click().run()
    assert not at.exception and not at.error
    figures = [json.loads(chart.proto.spec) for chart in at.get("plotly_chart")]
    layout = next(figure["layout"] for figure in figures if figure["layout"].get("uirevision") == "map")
    (image,) = layout["images"]
    assert (image["sizex"], image["sizey"], image["layer"]) == (65.0, 60.0, "below")
    assert layout["yaxis"]["range"] == [60.0, 0] and layout["xaxis"]["range"] == [0, 65.0]
    assert len(list((_ui.home() / "sections").glob("*.png"))) == 1


def test_a_bundle_opens_in_this_tab_and_about_shows_its_card(
    settings: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(tiny_folder, mine)
    (mine / "MODEL_CARD.md").write_text("# Card of my slide\n")
    other = start()
    at = open_by_path(start(), mine)
    assert not at.exception and not at.error and at.session_state["opened bundle"] == mine.resolve()
    assert "Card of my slide" in texts(at.switch_page("pages/about.py").run())
    assert "Card of my slide" not in texts(other.switch_page("pages/about.py").run())


def test_a_folder_lists_what_it_holds(settings: pytest.MonkeyPatch, store: Path) -> None:
    at = open_by_path(start(), store.parent)
    assert at.button(key="open 0").label.endswith("· store")
    at.button(key="open 0").click().run()
    assert not at.error and at.session_state["experiment"].path == store


def test_what_cannot_be_opened_is_one_sentence(settings: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "bundle.json").write_text("{")
    for path, says in ((tmp_path / "none", "There is no"), (tmp_path / "notes.txt", "neither a bundle")):
        with pytest.raises(BadInput, match=says):
            recognise(str(path))
    with pytest.raises(BadInput, match="No path was given"):
        recognise(" ")
    at = open_by_path(start(), tmp_path / "bundle")
    assert not at.exception and len(at.warning) == 1 and "damaged" in at.warning[0].value
    assert "opened bundle" not in at.session_state


def test_paths_can_be_forbidden(settings: pytest.MonkeyPatch, store: Path) -> None:
    link = address(open_by_path(start(), store))
    settings.setenv("GE2HIST_OPEN", "0")
    at = start(link)
    assert "open path" not in [field.key for field in at.text_input]
    assert at.session_state["experiment"].path == _ui.start_cells()


def test_a_store_at_the_start_has_its_own_name(settings: pytest.MonkeyPatch, store: Path) -> None:
    settings.setenv("GE2HIST_CELLS", str(store))
    said = " ".join(text.value for text in start().sidebar.markdown)
    assert _ui.plain(store.name) in said and "Demo cells" not in said


def test_the_start_takes_bundle_and_data_before_the_environment(
    settings: pytest.MonkeyPatch, store: Path, tmp_path: Path
) -> None:
    settings.setattr(sys, "argv", ["app.py", "--bundle", str(tmp_path), "--data", str(store)])
    assert _ui.start_bundle() == tmp_path and _ui.start_cells() == store
    settings.setattr(sys, "argv", ["other.py", "--bundle", str(tmp_path), "--data", str(store)])
    assert _ui.start_cells() != store
    settings.setattr(sys, "argv", ["app.py", "--data"])
    with pytest.raises(BadInput, match="--data and no path"):
        _ui.start_cells()
