"""The evidence page through ``app.py``: lights of a full result, the bundle's figures, empty states."""

from __future__ import annotations

import io
import json
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from ge2hist_core.config import SampleConfig
from ge2hist_core.data import open_h5ad, write_cells
from ge2hist_core.evaluation.report import sections
from ge2hist_core.model import GE2Hist
from ge2hist_core.types import Cells
from pages import _ui
from perturb.cache import DiskCache
from perturb.edits import Perturbation
from perturb.evidence import at_hand
from perturb.recipe import Recipe
from perturb.report import zip_bytes
from perturb.result import load_result
from perturb.run import cells_for, run

APP = Path(__file__).parents[2] / "app.py"
DEMO = APP.parent / "assets" / "demo_bundle" / "evaluation.json"
TIMEOUT = 300


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Path, demo_cells: Cells) -> Iterator[Path]:
    """A bundle, cells and results of this test alone."""
    shutil.copytree(tiny_folder, tmp_path / "bundle")
    write_cells(demo_cells, tmp_path / "cells.h5ad")
    monkeypatch.setenv("GE2HIST_BUNDLE", str(tmp_path / "bundle"))
    monkeypatch.setenv("GE2HIST_CELLS", str(tmp_path / "cells.h5ad"))
    monkeypatch.setenv("GE2HIST_HOME", str(tmp_path / "home"))
    yield tmp_path
    _ui.get_worker().close()
    _ui.get_worker.clear()
    st.cache_resource.clear()
    st.cache_data.clear()


def open_page(query: dict[str, str] | None = None) -> AppTest:
    at = AppTest.from_file(str(APP), default_timeout=TIMEOUT)
    for name, value in (query or {}).items():
        at.query_params[name] = value
    at.run()
    return at.switch_page("pages/evidence.py").run()


def texts(at: AppTest) -> str:
    """All that the page says, as the reader sees it."""
    assert not at.exception and not at.error
    kinds = (at.markdown, at.caption, at.warning, at.info, at.subheader)
    lines = [str(one.value) for kind in kinds for one in kind] + [one.label for one in at.expander]
    return "\n".join(lines).replace("\\", "")


def put_evaluation(home: Path, **changed: Any) -> None:
    """The demo bundle's figures, as if they were of the test's bundle."""
    model = GE2Hist.load(home / "bundle")
    evaluation = json.loads(DEMO.read_text()) | {"bundle_sha256": model.sha256} | changed
    (home / "bundle" / "evaluation.json").write_text(json.dumps(evaluation))


def test_without_a_comparison_and_an_evaluation_it_says_how_to_get_both(home: Path) -> None:
    said = texts(open_page())
    assert "No edit yet" in said and "was not evaluated" in said and "Not diagnostic" in said


def test_a_draft_is_no_evidence(home: Path) -> None:
    at = AppTest.from_file(str(APP), default_timeout=TIMEOUT).run()
    at.session_state["experiment"].edit(Perturbation.parse("GAPDH:ko"))
    at.switch_page("pages/evidence.py").run()
    assert "Not compared yet" in texts(at) and not at.expander


def test_a_full_result_gets_a_light_per_headline_readout_with_its_reasons(home: Path) -> None:
    model = GE2Hist.load(home / "bundle")
    with open_h5ad(home / "cells.h5ad", model.scgpt.vocab) as source:
        cells = cells_for(source, ("cell-3",))
        edits = Perturbation.parse("GAPDH:ko")
        recipe = Recipe(source.sha256, model.sha256, ("cell-3",), edits, SampleConfig(steps=1), (0, 1))
    result = run(recipe, model, cells, cache=DiskCache(home / "home" / "results"))
    at = AppTest.from_file(str(APP), default_timeout=TIMEOUT).run()
    at.session_state["experiment"].recipe = recipe
    at.switch_page("pages/evidence.py").run()
    said = texts(at)
    assert "GAPDH:ko in **cell-3**" in said.replace("**GAPDH:ko**", "GAPDH:ko") and "Not compared yet" not in said
    lights = [one.label for one in at.expander if any(word in one.label for word in ("no evidence", "supported"))]
    shares = result.comparison["readout"].str.startswith("fraction:").sum()
    assert (
        len(lights) == 2 + min(3, shares) and "Density" in lights[0] and "Distance to the nearest nucleus" in lights[1]
    )
    assert "not donors" in said and "compare over more seeds" in said
    assert "GAPDH:ko" in at.query_params["edit"]

    at.button(key="gather evidence").click().run()
    key = f"evidence of {recipe.hash}"
    deadline = time.monotonic() + TIMEOUT
    while not (state := _ui.get_worker().state(key, at.session_state["owner"])).over and time.monotonic() < deadline:
        time.sleep(0.1)
    assert state.status == "done"
    at.run()
    said = texts(at)
    assert "gather evidence" not in [one.key for one in at.button]
    assert "identity z_c" in said and "random genes" in said and "Not at hand" in said
    with zipfile.ZipFile(io.BytesIO(_zip_of(at, recipe))) as report:
        lights = json.loads(report.read("evidence.json"))["lights"]
    assert [one["readout"] for one in lights][:2] == ["density", "spacing"]


def _zip_of(at: AppTest, recipe: Recipe) -> bytes:
    """The report that the buttons of the Report page would give, evidence included."""
    result = load_result(recipe.hash, _ui.get_cache())
    model = GE2Hist.load(_ui.bundle_folder())
    with open_h5ad(_ui.start_cells(), model.scgpt.vocab) as source:
        cells = cells_for(source, recipe.cell_ids)
    evidence, complete = at_hand(result, model, cells, _ui.get_cache())
    assert complete
    return zip_bytes(result, cells, evidence=evidence)


def papers_charts() -> int:
    told = sections(json.loads(DEMO.read_text()))
    return sum(len(section.charts) for section in told if section.key not in ("steps", "driver_programmes"))


def test_the_evaluation_is_told_with_chart_table_and_sentences(home: Path) -> None:
    put_evaluation(home)
    at = open_page()
    said = texts(at)
    assert len(at.get("plotly_chart")) == 1 + papers_charts() > 4
    told = {one.label.replace("\\", "") for one in at.expander}
    assert {"**Table 1: distance to real tiles**", "**Figure 3: cells in the niche**", "**Who wins**"} <= told
    found = json.loads(DEMO.read_text())["driver_programmes"]
    for right, of in (("signs_right", "edits_exceeding_noise"), ("clear_signs_right", "clear_readouts")):
        assert f"**{found[right]} of {found[of]}**" in said
    assert "smaller than true ones" in said and "n = " in said
    assert "| Density |" in said and "wrong cell's pictures" in said
    assert "predicts" not in said


def test_figures_of_other_weights_are_not_shown(home: Path) -> None:
    put_evaluation(home, bundle_sha256="0" * 64)
    at = open_page()
    assert "of other weights" in texts(at) and not at.get("plotly_chart")


def test_an_evaluation_of_real_tissue_has_no_known_truth(home: Path) -> None:
    put_evaluation(home, driver_programmes=None)
    at = open_page()
    assert "simulated tissue alone" in texts(at) and len(at.get("plotly_chart")) == papers_charts()


@pytest.mark.parametrize("content", ["{", '{"generated_vs_real": 3, "bundle_sha256": "%s"}'])
def test_a_damaged_evaluation_is_one_sentence_and_the_limits_stay(home: Path, content: str) -> None:
    sha256 = GE2Hist.load(home / "bundle").sha256
    (home / "bundle" / "evaluation.json").write_text(content.replace("%s", sha256))
    at = open_page()
    assert not at.exception and len(at.error) == 1 and "evaluate" in at.error[0].value
    assert any("Not diagnostic" in one.value for one in at.markdown)
