"""A report is run again from each of its forms; a planted difference is found where it was planted."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ge2hist_core.__main__ import run_command
from ge2hist_core.config import SampleConfig
from ge2hist_core.data import open_h5ad, write_cells
from ge2hist_core.model import GE2Hist
from ge2hist_core.types import BadInput, Cells
from perturb import replay, screen_report
from perturb.__main__ import COMMANDS
from perturb.cache import DiskCache
from perturb.edits import Perturbation
from perturb.recipe import Recipe
from perturb.replay import changed_versions, difference, parse_report, read_report, rerun
from perturb.report import write_report, zip_bytes
from perturb.result import load_result
from perturb.run import cells_for, run
from perturb.screen import Screen, knock_outs, run_screen
from perturb.wording import Origin

NUMBERS = ("base", "edited", "effect", "low", "high", "p", "q", "n")


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
    with open_h5ad(home / "cells.h5ad", model.scgpt.vocab) as source:
        cells = cells_for(source, ("cell-3",))
        recipe = Recipe(source.sha256, model.sha256, ("cell-3",), sample=SampleConfig(steps=2), seeds=(0,))
    screen = Screen(recipe, knock_outs(cells.take([0]))[:4], keep=2, first_seeds=(0, 1), further_seeds=(2, 3))
    found = run_screen(screen, model, cells, DiskCache(home / "cache"))
    origin = Origin.of_model(model, cells)
    screen_report.write_report(screen, found, origin, home / "screen")
    (home / "screen.zip").write_bytes(screen_report.zip_bytes(screen, found, origin))
    part = replace(found, complete=False)
    (home / "part.html").write_text(screen_report.html(screen, part, origin))
    return home


@pytest.mark.parametrize(
    "form", ["report", "report.zip", "report/report.html", "screen", "screen.zip", "screen/report.html"]
)
def test_every_form_of_a_report_replays_to_the_same_numbers(home: Path, tiny_folder: Path, form: str, capsys) -> None:
    command = ["replay", str(home / form), "--bundle", str(tiny_folder), "--cells", str(home / "cells.h5ad")]
    assert run_command("perturb", "", COMMANDS, command) == 0
    assert "same: " in capsys.readouterr().out


def test_a_changed_number_is_found(home: Path, tiny_folder: Path, tmp_path: Path, capsys) -> None:
    table = pd.read_csv(home / "report" / "comparison.csv")
    table.loc[table["readout"] == "density", "effect"] += 1e4
    (tmp_path / "comparison.csv").write_text(table.to_csv(index=False))
    (tmp_path / "recipe.json").write_text((home / "report" / "recipe.json").read_text())
    command = ["replay", str(tmp_path), "--bundle", str(tiny_folder), "--cells", str(home / "cells.h5ad")]
    assert run_command("perturb", "", COMMANDS, command) == 1
    assert "(density, effect)" in capsys.readouterr().out


def test_a_changed_number_of_a_screen_is_found(home: Path, tiny_folder: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(home / "screen", tmp_path / "screen")
    table = pd.read_csv(tmp_path / "screen" / "guess.csv")
    table.loc[1, "shift"] *= 1.5
    table.to_csv(tmp_path / "screen" / "guess.csv", index=False)
    command = ["replay", str(tmp_path / "screen"), "--bundle", str(tiny_folder), "--cells", str(home / "cells.h5ad")]
    assert run_command("perturb", "", COMMANDS, command) == 1
    said = capsys.readouterr().out
    assert f"difference 0.333 ({table['candidate'][1]}, shift)" in said


def test_a_screen_that_was_not_finished_is_not_compared(home: Path) -> None:
    with pytest.raises(BadInput, match="was not finished"):
        read_report(home / "part.html")


def test_other_versions_are_named(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "report", tmp_path / "report")
    path = tmp_path / "report" / "provenance.json"
    assert changed_versions(read_report(tmp_path / "report")) == ""
    value = json.loads(path.read_text())
    value["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(value))
    assert "torch 1.0, here " in changed_versions(read_report(tmp_path / "report"))


def test_a_replay_takes_nothing_from_the_cache_and_leaves_its_result_there(home: Path, tiny_folder: Path) -> None:
    saved, model = read_report(home / "report.zip"), GE2Hist.load(tiny_folder)
    with open_h5ad(home / "cells.h5ad", model.scgpt.vocab) as source:
        cells = cells_for(source, saved.recipe.cell_ids)
    cache = DiskCache(home / "replayed")
    wrong = run(replace(saved.recipe, seeds=(7, 8, 9)), model, cells).edited_arm.to_arrays()
    cache.store_arrays(saved.recipe.hash, wrong)
    assert rerun(saved, model, cells, cache=cache).same
    kept = load_result(saved.recipe.hash, cache)
    assert not np.array_equal(kept.edited_arm.images, wrong["images"])
    assert rerun(replace(saved, network=None), model, cells).same


def test_damaged_archives_are_one_sentence(home: Path) -> None:
    whole = (home / "report.zip").read_bytes()
    start = whole.index(b"recipe.json") + len("recipe.json")
    broken = whole[:start] + bytes(20) + whole[start + 20 :]
    with pytest.raises(BadInput, match="Cannot read the report mine.zip"):
        parse_report(broken, "mine.zip")
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("notes.txt", "no report")
    with pytest.raises(BadInput, match="holds neither recipe.json nor screen.json"):
        parse_report(out.getvalue(), "mine.zip")


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
    with pytest.raises(BadInput, match="Cannot read the report"):
        read_report("a\0b")
    for text, message in (
        ("[" * 100_000, "nested more than 50 deep"),
        ('{"a": ' + "1" * 5000 + "}", "thousands of digits"),
    ):
        (tmp_path / "provenance.json").write_text(text)
        with pytest.raises(BadInput, match=f"provenance.json .*{message}"):
            read_report(tmp_path)
        (tmp_path / "bad.html").write_text(f'<script type="application/json" id="ge2hist">{text}</script>')
        with pytest.raises(BadInput, match=message):
            read_report(tmp_path / "bad.html")
    (tmp_path / "provenance.json").unlink()
    (tmp_path / "recipe.json").write_text(json.dumps({"schema": 99}))
    (tmp_path / "comparison.csv").write_text("a\n")
    with pytest.raises(BadInput, match="schema"):
        read_report(tmp_path)


def test_a_report_is_run_again_with_its_own_number_of_threads(home: Path, tmp_path: Path) -> None:
    """Sums are split among threads, and rounded otherwise for another number: the last digits would differ."""
    import torch

    saved = read_report(home / "report")
    assert saved.versions["threads"] == str(torch.get_num_threads())
    seen, before = [], torch.get_num_threads()
    with replay._threads("3"):
        seen.append(torch.get_num_threads())
    with replay._threads("unknown"), replay._threads("100000"):
        seen.append(torch.get_num_threads())
    assert seen == [3, before] and torch.get_num_threads() == before


def test_numbers_that_differ_by_rounding_are_the_same_and_said_to_differ() -> None:
    a = pd.DataFrame({"low": [1.0, 2.0]}, index=["x", "y"])
    rounded, other = difference(a, a * (1 + 1e-4)), difference(a, a * 1.01)
    assert rounded.same and rounded.verdict.startswith("same up to rounding: 2 rows")
    assert not other.same and other.verdict.startswith("different")
