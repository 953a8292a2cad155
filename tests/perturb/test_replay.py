"""A report is run again from each of its forms; a planted difference is found where it was planted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ge2hist_core.__main__ import run_command
from ge2hist_core.config import SampleConfig
from ge2hist_core.data import open_h5ad, write_cells
from ge2hist_core.model import GE2Hist
from ge2hist_core.types import BadInput, Cells
from perturb.__main__ import COMMANDS
from perturb.edits import Perturbation
from perturb.recipe import Recipe
from perturb.replay import NUMBERS, difference, read_report
from perturb.report import write_report, zip_bytes
from perturb.run import cells_for, run


@pytest.fixture(scope="module")
def home(tiny_folder: Path, demo_cells: Cells, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cells.h5ad and the report of a comparison in each of its forms."""
    home = tmp_path_factory.mktemp("replay")
    write_cells(demo_cells, home / "cells.h5ad")
    model = GE2Hist.load(tiny_folder)
    with open_h5ad(home / "cells.h5ad", model.scgpt.vocab) as source:
        edits = Perturbation.parse("S@1(GAPDH:x4;CD8A:set=9)")
        recipe = Recipe(source.sha256, model.sha256, ("cell-3",), edits, SampleConfig(steps=2), (0, 1, 2))
        result = run(recipe, model, cells_for(source, recipe.cell_ids))
    write_report(result, home / "report")
    (home / "report.zip").write_bytes(zip_bytes(result))
    return home


@pytest.mark.parametrize("form", ["report", "report.zip", "report/report.html"])
def test_every_form_of_a_report_replays_to_the_same_numbers(home: Path, tiny_folder: Path, form: str, capsys) -> None:
    command = ["replay", str(home / form), "--bundle", str(tiny_folder), "--cells", str(home / "cells.h5ad")]
    assert run_command("perturb", "", COMMANDS, command) == 0
    assert "same: " in capsys.readouterr().out


def test_a_changed_number_is_found(home: Path, tiny_folder: Path, tmp_path: Path, capsys) -> None:
    table = pd.read_csv(home / "report" / "comparison.csv")
    table.loc[table["readout"] == "density", "effect"] += 1.0
    (tmp_path / "comparison.csv").write_text(table.to_csv(index=False))
    (tmp_path / "recipe.json").write_text((home / "report" / "recipe.json").read_text())
    command = ["replay", str(tmp_path), "--bundle", str(tiny_folder), "--cells", str(home / "cells.h5ad")]
    assert run_command("perturb", "", COMMANDS, command) == 1
    assert "(density, effect)" in capsys.readouterr().out


def test_the_largest_difference_is_relative_and_undefined_equals_undefined() -> None:
    a = pd.DataFrame(np.full((2, len(NUMBERS)), 10.0), index=["x", "y"], columns=list(NUMBERS))
    b = a.copy()
    a.loc["x", "p"] = b.loc["x", "p"] = np.nan
    assert difference(a, b).same
    b.loc["y", "low"] = 8.0
    found = difference(a, b)
    assert found.value == pytest.approx(0.2) and found.where == "y, low" and not found.same
    b.loc["y", "high"] = np.nan
    assert difference(a, b).value == np.inf
    assert difference(a, a.drop(index="y")).missing == ("y",)


def test_what_is_no_report_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<html></html>")
    (tmp_path / "bad.html").write_text('<script type="application/json" id="ge2hist">[3]</script>')
    for name, message in (
        ("page.html", "is no report"),
        ("bad.html", "Cannot read the report"),
        ("none", "Cannot read"),
    ):
        with pytest.raises(BadInput, match=message):
            read_report(tmp_path / name)
    (tmp_path / "recipe.json").write_text(json.dumps({"schema": 99}))
    (tmp_path / "comparison.csv").write_text("a\n")
    with pytest.raises(BadInput, match="schema"):
        read_report(tmp_path)
