"""A store is as good as an h5ad wherever a command asks for cells."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ge2hist_core.__main__ import run_command
from ge2hist_core.store import SectionRecord, write_store
from ge2hist_core.types import Cells
from perturb.__main__ import COMMANDS


@pytest.fixture(scope="module")
def store(demo_cells: Cells, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo cells as a section of 64 um, without nuclei in its picture."""
    rows = np.arange(12)
    nuclei = pd.DataFrame({"x_um": 5.0 * rows, "y_um": 60.0 - 5.0 * rows, "cell_type": demo_cells.cell_type[rows]})
    picture, labels = np.full((128, 128, 3), 240, dtype=np.uint8), np.zeros((128, 128), dtype=np.int32)
    path = tmp_path_factory.mktemp("store") / "cells.zarr"
    section = SectionRecord("a", picture, labels, nuclei, demo_cells.counts[rows])
    write_store(path, [section], [str(gene) for gene in demo_cells.genes])
    return path


def run(*argv: object) -> int:
    return run_command("perturb", "", COMMANDS, [str(one) for one in argv])


def test_a_recipe_is_made_and_run_on_a_store(
    store: Path, tiny_folder: Path, demo_cells: Cells, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gene = str(demo_cells.genes[demo_cells.counts[3].indices[0]])
    asked = ("--cells", store, "--bundle", tiny_folder, "--cell", "a_4", "--edit", f"{gene}:ko", "--seeds", "0-1")
    assert run("recipe", *asked) == 0
    recipe = tmp_path / "recipe.json"
    recipe.write_text(capsys.readouterr().out, encoding="utf-8")
    assert json.loads(recipe.read_text())["cell_ids"] == ["a_4"]
    assert run("run", recipe, "--cells", store, "--bundle", tiny_folder, "--out", tmp_path / "report") == 0
    assert (tmp_path / "report" / "comparison.csv").is_file()


def test_a_folder_that_is_no_store_is_one_sentence(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("recipe", "--cells", tmp_path, "--bundle", tiny_folder, "--cell", "a_4", "--edit", "ACTB:ko") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and tmp_path.name in said
