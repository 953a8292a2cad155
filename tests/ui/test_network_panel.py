"""Fitting a network is a job of the worker, and genes are chosen without sending all names to the browser."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import streamlit as st
from streamlit.testing.v1 import AppTest

from ge2hist_core import rng
from ge2hist_core.data import open_h5ad, write_cells
from ge2hist_core.sampler import Stopped
from ge2hist_core.types import Cells
from pages import _ui
from pages._gene_search import SHOWN, matches
from perturb.cache import DiskCache
from perturb.networks import fit_and_keep, fit_kept, fitted, kept_network
from perturb.run import Progress

APP = Path(__file__).parents[2] / "app.py"
TIMEOUT = 300
GENE, TARGET = "GAPDH", "ACTB"


@pytest.fixture(scope="module")
def driven(demo_cells: Cells) -> Cells:
    """Cells of one type in which one gene's count follows another's; the rest is noise."""
    draws = rng.stream(0, "driven cells")
    genes = demo_cells.genes.tolist()
    counts = draws.poisson(20.0, size=demo_cells.counts.shape).astype(np.float32)
    counts[:, genes.index(GENE)] = draws.poisson(np.linspace(2, 80, len(counts)))
    counts[:, genes.index(TARGET)] = counts[:, genes.index(GENE)] * 2 + draws.poisson(3, len(counts))
    one = np.full(len(counts), "B cell", dtype=object)
    return replace(demo_cells, counts=sp.csr_matrix(counts), cell_type=one, donor=np.full(len(counts), "d"))


@pytest.fixture
def app(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Path, driven: Cells
) -> Iterator[pytest.MonkeyPatch]:
    write_cells(driven, tmp_path / "cells.h5ad")
    monkeypatch.setenv("GE2HIST_BUNDLE", str(tiny_folder))
    monkeypatch.setenv("GE2HIST_CELLS", str(tmp_path / "cells.h5ad"))
    monkeypatch.setenv("GE2HIST_HOME", str(tmp_path / "home"))
    yield monkeypatch
    _ui.get_worker().close()
    _ui.get_worker.clear()
    st.cache_resource.clear()
    st.cache_data.clear()


def start() -> AppTest:
    return AppTest.from_file(str(APP), default_timeout=TIMEOUT).run()


def regulators(at: AppTest):
    (found,) = [one for one in at.multiselect if "regulators" in one.label]
    return found


def search(at: AppTest, text: str) -> AppTest:
    (found,) = [one for one in at.text_input if "regulators" in one.label]
    return found.set_value(text).run()


def test_a_fit_tells_how_far_it_is_is_kept_and_can_be_stopped(driven: Cells, tmp_path: Path) -> None:
    write_cells(driven, tmp_path / "cells.h5ad")
    cache, folder, cancel = DiskCache(tmp_path / "cache"), tmp_path / "networks", threading.Event()
    with open_h5ad(tmp_path / "cells.h5ad") as source:

        def stop(progress: Progress) -> None:
            if progress.fraction > 0.5:
                cancel.set()

        with pytest.raises(Stopped):
            fit_and_keep(source, [GENE], folder, cache, on_progress=stop, cancel=cancel)
        assert fit_kept(source, [GENE], folder, cache) is None and not folder.exists()
        told: list[float] = []
        network = fit_and_keep(source, [GENE], folder, cache, on_progress=lambda one: told.append(one.fraction))
        assert len(told) == 100 and told == sorted(told) and told[-1] == pytest.approx(1.0)
        assert network.sha256 == fitted(source, [GENE], name="quietly").sha256
        assert (GENE, TARGET) in set(zip(network.regulators, network.targets, strict=True))
        assert fit_kept(source, [GENE, GENE], folder, cache) == network.sha256
        assert fit_kept(source, [TARGET], folder, cache) is None
        (folder / f"{network.sha256}.json").unlink()
        assert fit_kept(source, [GENE], folder, cache) is None, "a link to nothing"


def test_a_network_is_fitted_by_the_worker_and_then_chosen(app: pytest.MonkeyPatch) -> None:
    """It was fitted in the page's script, under a lock that all tabs shared."""
    gate = threading.Event()
    _ui.get_worker().submit("gate", lambda on_progress, cancel: gate.wait(TIMEOUT), "test")
    try:
        at = search(start(), GENE)
        assert regulators(at).value == [GENE]
        at.button(key="fit network").click().run()
        assert not at.exception and not at.error
        assert "Waiting for 1 run(s)" in str(at.get("progress")[0].proto), "the page does not wait for the fit"
    finally:
        gate.set()
    key = _ui.get_worker().keys[-1]
    state = _ui.get_worker().wait(key, timeout=TIMEOUT)
    assert state is not None and state.status == "done", state
    at.run()
    assert not at.exception and not at.error
    chosen = at.selectbox(key="network").value
    network = kept_network(chosen, _ui.networks_folder())
    assert set(network.regulators) == {GENE} and at.session_state["experiment"].recipe.propagation is not None
    at.selectbox(key="network").set_value("").run()
    at.button(key="use fitted").click().run()
    assert at.selectbox(key="network").value == chosen, "a second fit of the same is not needed"


def test_a_fit_that_is_cancelled_leaves_the_panel_as_it_was(app: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    _ui.get_worker().submit("gate", lambda on_progress, cancel: gate.wait(TIMEOUT), "test")
    try:
        at = search(start(), GENE)
        at.button(key="fit network").click().run()
        next(button for button in at.button if button.label == "Cancel").click().run()
        assert not at.exception and not at.error and not at.get("progress")
        assert at.button(key="fit network").label == "Fit" and at.selectbox(key="network").value == ""
    finally:
        gate.set()


def test_a_page_sends_the_matching_genes_alone(app: pytest.MonkeyPatch, driven: Cells) -> None:
    at = start()
    assert regulators(at).options == [] and at.button(key="fit network").disabled
    at = search(at, "krt")
    assert regulators(at).options == ["KRT8", "KRT18", "KRT19"] and regulators(at).value == []
    at = regulators(at).set_value(["KRT19"]).run()
    at = search(at, "nothing like it")
    assert regulators(at).options == ["KRT19"] == regulators(at).value
    assert any("No gene of these cells has such a name" in one.value for one in at.caption)
    at.switch_page("pages/screen.py").run()
    at.segmented_control(key="candidates").set_value("A list of genes").run()
    assert at.multiselect(key="screen genes").options == []
    at.text_input(key="screen genes search").set_value("cd8a, MYC").run()
    assert at.multiselect(key="screen genes").value == ["CD8A"], "whole names are taken, of others there is no choice"
    assert len(driven.genes) > SHOWN


def test_matches_are_whole_names_then_beginnings_then_parts_and_few() -> None:
    genes = [f"{a}{b}" for a in ("A", "B", "XA") for b in range(100)]
    assert matches(genes, "a7")[:2] == ["A7", "A70"]
    assert len(matches(genes, "a")) == SHOWN and all(name.startswith("A") for name in matches(genes, "a"))
    assert matches(genes, "xa99, b3;a1")[0] == "XA99" and "B3" in matches(genes, "xa99, b3;a1")
    assert matches(genes, ",; ") == matches(genes, "nope") == []
    brute = [name for name in genes if "99" in name]
    assert sorted(matches(genes, "99")) == sorted(brute)


def test_the_tables_own_download_is_hidden_where_ours_is_escaped() -> None:
    """A rule for the label that this version of Streamlit gives the button."""
    rule = '[data-testid="stElementToolbarButton"]:has(button[aria-label^="Download as CSV"]) { display: none; }'
    assert rule in (APP.parent / "assets" / "style.css").read_text(encoding="utf-8")
    scripts = (Path(st.__file__).parent / "static" / "static" / "js").glob("*.js")
    text = "".join(path.read_text(encoding="utf-8") for path in scripts)
    assert "`Download as CSV`" in text and '"data-testid":`stElementToolbarButton`' in text
