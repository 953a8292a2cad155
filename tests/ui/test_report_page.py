"""The report page through ``app.py``: a report is uploaded, run again from nothing, and judged."""

from __future__ import annotations

import io
import json
import re
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from ge2hist_core.config import SampleConfig
from ge2hist_core.data import open_h5ad, write_cells
from ge2hist_core.model import GE2Hist
from ge2hist_core.types import Cells
from pages import _ui
from perturb import compare, dose_report, screen_report
from perturb.cache import DiskCache
from perturb.doses import dose_series, run_doses
from perturb.edits import Perturbation
from perturb.grn import Network, Propagation
from perturb.networks import keep_network
from perturb.recipe import Recipe
from perturb.report import html, zip_bytes
from perturb.run import cells_for, run
from perturb.screen import Screen, knock_outs, run_screen
from perturb.signatures import Signature
from perturb.wording import Origin
from perturb.workspace import Workspace

APP = Path(__file__).parents[2] / "app.py"
TIMEOUT = 300
MINE = Signature("mine", ("GAPDH",), (1.0,))
NETWORK = Network(np.array(["GAPDH"]), np.array(["ACTB"]), np.array([0.8]), "a network that only the report has")


@pytest.fixture(scope="module")
def reports(tiny_folder: Path, demo_cells: Cells, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Reports as users have them, and the cells they were made with."""
    folder = tmp_path_factory.mktemp("reports")
    write_cells(demo_cells, folder / "cells.h5ad")
    model = GE2Hist.load(tiny_folder)
    with open_h5ad(folder / "cells.h5ad", model.scgpt.vocab) as source:
        cells = cells_for(source, ("cell-3",))
        edits = Perturbation.parse("GAPDH:ko")
        recipe = Recipe(source.sha256, model.sha256, ("cell-3",), edits, SampleConfig(steps=2), (0, 1))
    result = run(recipe, model, cells)
    spread = replace(recipe, propagation=Propagation(NETWORK.sha256, NETWORK.name))
    with_network = run(spread, model, cells, network=NETWORK)
    screen = Screen(recipe.base, knock_outs(cells.take([0]))[:3], keep=2, first_seeds=(0, 1), further_seeds=(2, 3))
    found = run_screen(screen, model, cells, DiskCache(folder / "cache"))
    both = Workspace().added("direct", recipe).added("spread", spread)
    series = dose_series(recipe.base, MINE, list(cells.genes), 1.0)
    doses = run_doses(series, model, cells, DiskCache(folder / "cache"))
    return {
        "cells.h5ad": (folder / "cells.h5ad").read_bytes(),
        "report.zip": zip_bytes(result, cells),
        "network.zip": zip_bytes(with_network),
        "network.json": spread.to_json().encode(),
        "report.html": html(result).encode(),
        "screen.zip": screen_report.zip_bytes(screen, found, Origin.of_model(model, cells)),
        "scenarios.zip": compare.zip_bytes(both, [result, with_network], [cells, cells], "direct"),
        "doses.zip": dose_report.zip_bytes(series, doses, MINE, Origin.of_model(model, cells)),
    }


@pytest.fixture
def page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Path, reports: dict[str, bytes]
) -> Iterator[AppTest]:
    (tmp_path / "cells.h5ad").write_bytes(reports["cells.h5ad"])
    monkeypatch.setenv("GE2HIST_BUNDLE", str(tiny_folder))
    monkeypatch.setenv("GE2HIST_CELLS", str(tmp_path / "cells.h5ad"))
    monkeypatch.setenv("GE2HIST_HOME", str(tmp_path / "home"))
    at = AppTest.from_file(str(APP), default_timeout=TIMEOUT).run()
    yield at.switch_page("pages/report.py").run()
    _ui.get_worker().close()
    _ui.get_worker.clear()
    st.cache_resource.clear()
    st.cache_data.clear()


def upload(at: AppTest, name: str, content: bytes) -> AppTest:
    at.file_uploader(key="recipe file").upload(name, content).run()
    assert not at.exception
    return at


def plain(markdown: str) -> str:
    """Text as the reader sees it."""
    return markdown.replace("\\", "")


def replay(at: AppTest) -> AppTest:
    at.button(key="replay").click().run()
    assert not at.exception
    for key in _ui.get_worker().keys:
        state = _ui.get_worker().wait(key, timeout=TIMEOUT)
        assert state is not None and state.status == "done", state
    return at.run()


@pytest.mark.parametrize("name", ["report.zip", "report.html", "screen.zip", "scenarios.zip", "doses.zip"])
def test_an_uploaded_report_is_run_again_and_found_the_same(
    page: AppTest, reports: dict[str, bytes], name: str
) -> None:
    at = replay(upload(page, name, reports[name]))
    assert not at.error and len(at.success) == 1 and plain(at.success[0].value).startswith("same: ")
    if name.startswith("report"):
        at.button(key="open replayed").click().run()
        assert not at.exception and at.get("iframe")
        assert str(at.session_state["experiment"].recipe.perturbation) == "GAPDH:ko"


def test_a_report_with_another_number_is_found_to_differ(page: AppTest, reports: dict[str, bytes]) -> None:
    text = reports["report.html"].decode()
    found = re.search(r'id="ge2hist">(.*?)</script>', text, re.DOTALL)
    value = json.loads(found[1])
    lines = value["comparison"].splitlines()
    fields = lines[1].split(",")
    fields[2] = str(float(fields[2]) + 1000.0)
    value["comparison"] = "\n".join([lines[0], ",".join(fields), *lines[2:]]) + "\n"
    changed = text[: found.start(1)] + json.dumps(value) + text[found.end(1) :]
    at = replay(upload(page, "report.html", changed.encode()))
    assert len(at.error) == 1
    assert re.fullmatch(r"different: largest relative difference \S+ \(density, base\)", plain(at.error[0].value))


def test_what_is_no_report_is_one_sentence(page: AppTest) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("x", "")
    at = upload(page, "<b>mine</b>.zip", out.getvalue())
    assert len(at.error) == 1 and "holds neither" in at.error[0].value and "<b>" not in at.error[0].value


def test_a_reports_network_is_kept_and_its_recipe_opens(page: AppTest, reports: dict[str, bytes]) -> None:
    at = replay(upload(page, "report.zip", reports["network.zip"]))
    assert not at.error and plain(at.success[0].value).startswith("same: ")
    at.button(key="open replayed").click().run()
    assert not at.exception and not at.error and at.get("iframe")
    opened = at.session_state["experiment"].recipe
    assert opened.propagation is not None and opened.propagation.network_sha256 == NETWORK.sha256
    link = AppTest.from_file(str(APP), default_timeout=TIMEOUT)
    for name, value in at.query_params.items():
        link.query_params[name] = value[0] if isinstance(value, list) else value
    link.run()
    assert not link.exception and not link.warning and link.session_state["experiment"].recipe == opened


def test_a_recipe_whose_network_is_not_here_leaves_the_experiment_alone(
    page: AppTest, reports: dict[str, bytes]
) -> None:
    before = page.session_state["experiment"].recipe
    at = upload(page, "recipe.json", reports["network.json"])
    assert len(at.error) == 1 and "is not here" in plain(at.error[0].value)
    assert at.session_state["experiment"].recipe == before
    keep_network(NETWORK, _ui.networks_folder())
    at.run()
    assert not at.error
    for path in _ui.networks_folder().iterdir():  # meanwhile it goes
        path.unlink()
    st.cache_resource.clear()
    at.button(key="replay").click().run()
    assert not at.exception
    assert len(at.warning) == 1 and "is not here" in plain(at.warning[0].value)
    assert at.session_state["experiment"].recipe == before


def test_the_draft_of_several_cells_with_one_seed_says_so(page: AppTest) -> None:
    """The seeds alone were once compared, and the first cell passed for all of them."""
    recipe = page.session_state["experiment"].recipe
    recipe = replace(
        recipe,
        cell_ids=("cell-3", "cell-4"),
        perturbation=Perturbation.parse("GAPDH:ko"),
        sample=SampleConfig(steps=2),
        seeds=(0,),
    )
    at = AppTest.from_file(str(APP), default_timeout=TIMEOUT)
    for name, value in recipe.to_query().items():
        at.query_params[name] = value
    at.run()
    at.switch_page("pages/report.py").run()
    assert not at.exception and any("first cell of the 2 with one seed" in one.value for one in at.caption)
    assert at.button(key="run").label == "Compare 2 cells over 1 seed"
    at.button(key="run").click().run()
    assert not at.exception and not at.error
    state = _ui.get_worker().wait(recipe.hash, timeout=TIMEOUT)
    assert state is not None and state.status == "done", state
    at.run()
    assert at.get("iframe") and not any("draft" in one.value for one in at.caption)


def test_the_report_page_says_how_many_runs_are_before(page: AppTest) -> None:
    """The page had a progress bar of its own that stood at 0 % in the queue."""
    recipe = replace(page.session_state["experiment"].recipe, seeds=(0, 1), sample=SampleConfig(steps=2))
    gate = threading.Event()
    _ui.get_worker().submit("gate", lambda on_progress, cancel: gate.wait(TIMEOUT), "test")
    try:
        at = upload(page, "recipe.json", recipe.to_json().encode())
        at.button(key="replay").click().run()
        assert not at.exception
        bars = [str(bar.proto) for bar in at.get("progress")]
        assert len(bars) == 1 and "Waiting for 1 run(s) before this one" in bars[0]
        next(button for button in at.button if button.label == "Cancel").click().run()
        assert not at.exception and not at.get("progress")
    finally:
        gate.set()
