"""Explore with a file of 18,000 genes: names are searched on the server, a handful travels to the browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import streamlit as st
from streamlit.testing.v1 import AppTest

from ge2hist_core.data import write_cells
from ge2hist_core.types import Cells
from pages import _ui

APP = Path(__file__).parents[2] / "app.py"
N = 18_000


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Path, demo_cells: Cells) -> Iterator[AppTest]:
    further = [f"FURTHER{i}" for i in range(N - len(demo_cells.genes))]
    counts = sp.hstack([demo_cells.counts, sp.csr_matrix((len(demo_cells), len(further)), dtype=np.float32)], "csr")
    many = Cells(
        counts, np.array([*demo_cells.genes, *further]), demo_cells.cell_id, demo_cells.cell_type, demo_cells.donor,
        demo_cells.xy_um,
    )  # fmt: skip
    shutil.copytree(tiny_folder, tmp_path / "bundle")
    write_cells(many, tmp_path / "cells.h5ad")
    for name, value in (("BUNDLE", "bundle"), ("CELLS", "cells.h5ad"), ("HOME", "home")):
        monkeypatch.setenv(f"GE2HIST_{name}", str(tmp_path / value))
    yield AppTest.from_file(str(APP), default_timeout=300).run()
    _ui.get_worker().close()
    _ui.get_worker.clear()
    st.cache_resource.clear()
    st.cache_data.clear()


def names_sent(at: AppTest) -> int:
    return sum(len(box.options) for box in (*at.selectbox, *at.multiselect))


def test_a_gene_is_found_by_a_part_of_its_name_and_taken_by_the_whole(page: AppTest, demo_cells: Cells) -> None:
    assert not page.exception and names_sent(page) < 200
    search = page.text_input(key="gene search")
    search.set_value("urther1").run()
    found = page.selectbox(key="gene").options
    assert 0 < len(found) <= 30 and all("FURTHER1" in name for name in found) and names_sent(page) < 200
    gene = str(demo_cells.genes[0])
    page.text_input(key="gene search").set_value(gene.lower()).run()
    assert any(one.key == f"drop {gene}" for one in page.button), "its card is there"
    assert page.text_input(key="gene search").value == ""
    page.text_input(key="gene search").set_value("zzzz").run()
    assert any("No gene of these cells" in one.value for one in page.caption)
