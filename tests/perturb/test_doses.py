"""A dose is an ordinary recipe: its comparison is that of the recipe run alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ge2hist_core.__main__ import run_command
from ge2hist_core.config import SampleConfig
from ge2hist_core.data import open_h5ad, write_cells
from ge2hist_core.types import BadInput, Cells
from perturb import charts
from perturb.__main__ import COMMANDS
from perturb.cache import DiskCache
from perturb.dose_report import read_series, report_files
from perturb.doses import COLUMNS, at_dose, at_every_dose, comes_from, dose_series, load_doses, respond, run_doses
from perturb.edits import Edit, EditSet, Perturbation
from perturb.recipe import Recipe
from perturb.run import run
from perturb.signatures import Signature, expand
from perturb.tables import statistics
from perturb.wording import Origin

TOY = Signature("toy", ("GAPDH", "ACTB"), (1.0, -1.0))


def make(model, edit: str = "CD8A:set=3", seeds: tuple[int, ...] = (0, 1)) -> Recipe:
    return Recipe("d" * 64, model.sha256, ("cell-3",), Perturbation.parse(edit), SampleConfig(steps=2), seeds)


def test_the_signature_takes_its_place_among_the_edits(tiny_bundle, demo_cells: Cells) -> None:
    genes = list(demo_cells.genes)
    added = at_dose(make(tiny_bundle), TOY, genes, 1.0)
    assert str(added.perturbation) == "CD8A:set=3,toy@1(GAPDH:x2;ACTB:x0.5)"
    between = make(tiny_bundle, "CD8A:set=3,toy@1(GAPDH:x2),CD4:ko")
    assert str(at_dose(between, TOY, genes, -1.0).perturbation) == "CD8A:set=3,toy@-1(GAPDH:x0.5;ACTB:x2),CD4:ko"
    assert str(at_dose(between, TOY, genes, 0.0).perturbation) == "CD8A:set=3,CD4:ko"
    knocked_out = make(tiny_bundle, "toy(GAPDH:ko)")
    assert str(at_dose(knocked_out, TOY, genes, 1.0).perturbation) == "toy(GAPDH:ko),toy@1(GAPDH:x2;ACTB:x0.5)"


def test_a_set_comes_from_a_signature_only_with_its_dose_and_exactly_its_edits(demo_cells: Cells) -> None:
    genes = list(demo_cells.genes)
    part = EditSet("toy", expand(TOY, genes, 1.5).perturbation.edits, 1.5)
    assert comes_from(part, TOY, genes) and comes_from(EditSet.parse(str(part)), TOY, genes)
    assert not comes_from(part, Signature("toy", ("GAPDH", "ACTB"), (1.0, -0.5)), genes)
    assert not comes_from(part, Signature("toy", ("GAPDH", "KRT8"), (1.0, -1.0)), genes)
    assert not comes_from(part, Signature("toy", ("NOSUCHGENE",), (1.0,)), genes)
    assert not comes_from(part, Signature("other", TOY.genes, TOY.log2_fc), genes)
    assert not comes_from(EditSet("toy", part.edits, 1.0), TOY, genes)
    assert not comes_from(EditSet("toy", part.edits), TOY, genes)
    assert not comes_from(EditSet("toy", (Edit("GAPDH", "ko"), Edit("ACTB", "ko"))), TOY, genes)
    assert comes_from(EditSet("toy", (Edit("GAPDH", "factor", 1.0),), 0.0), TOY, genes)
    assert not comes_from(EditSet("toy", (Edit("KRT8", "factor", 1.0),), 0.0), TOY, genes)


def pictures(recipe: Recipe, edited: list[float]) -> pd.DataFrame:
    """Readouts of pictures whose edited arm shows a type in these shares, and whose unedited arm does not."""
    rows = [
        (arm, "cell-3", seed, readout, unit, value)
        for arm in ("base", "edited")
        for seed in recipe.seeds
        for readout, unit, value in (
            ("density", "cells/mm²", 100.0 + seed),
            ("fraction:Plasma cell", "fraction", edited[seed] if arm == "edited" else 0.0),
            ("fraction:Lymphocyte", "fraction", 0.0),
        )
    ]
    return pd.DataFrame(rows, columns=["arm", "cell_id", "seed", "readout", "unit", "value"]).assign(step=0.0)


def test_a_type_that_only_the_largest_dose_shows_is_zero_at_the_others(tiny_bundle) -> None:
    recipe, doses = make(tiny_bundle, ""), (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
    readouts = [pictures(recipe, [0.2, 0.4] if dose == 4 else [0.0, 0.0]) for dose in doses]
    readouts[1].loc[readouts[1]["seed"] == 1, "value"] = np.nan  # pictures without a nucleus
    tables = [statistics(recipe, one)[1].assign(dose=dose) for dose, one in zip(doses, readouts, strict=True)]
    assert ["fraction:Plasma cell" in set(one["readout"]) for one in tables] == [False] * 6 + [True]
    table = at_every_dose(tables, readouts, 0)
    assert list(table.columns) == list(COLUMNS) and "fraction:Lymphocyte" not in set(table["readout"])
    rows = table[table["readout"] == "fraction:Plasma cell"].set_index("dose")
    assert tuple(rows.index) == doses and rows["n"].tolist() == [2, 1, 2, 2, 2, 2, 2]
    assert (rows.loc[[0.0, 0.25, 2.0], ["base", "edited", "effect", "low", "high"]] == 0.0).all(axis=None)
    assert rows.at[4.0, "effect"] == pytest.approx(0.3) and (rows["unit"] == "fraction").all()
    found = respond(table, "fraction:Plasma cell")
    assert not found.plateau and found.hill is None and "1 doses lie beyond the noise of dose 0" in found.reason
    seen_late = table[(table["readout"] != "fraction:Plasma cell") | (table["dose"] == 4)]
    assert "no value at dose 0" in respond(seen_late, "fraction:Plasma cell").reason


def test_seven_doses_double_up_and_share_the_unedited_arm(tiny_bundle, demo_cells: Cells, tmp_path: Path) -> None:
    series = dose_series(make(tiny_bundle, ""), TOY, list(demo_cells.genes), -2.0)
    assert [dose for dose, _ in series] == [0, -0.0625, -0.125, -0.25, -0.5, -1, -2]
    fractions: list[float] = []
    cache = DiskCache(tmp_path)
    table = run_doses(
        series, tiny_bundle, demo_cells, cache, on_progress=lambda progress: fractions.append(progress.fraction)
    )
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    rows = table[table["readout"] == "density"].set_index("dose")
    assert list(rows.index) == [dose for dose, _ in series]
    assert rows.at[0.0, "effect"] == rows.at[0.0, "low"] == rows.at[0.0, "high"] == 0.0
    alone = run(series[-1][1], tiny_bundle, demo_cells).comparison.set_index("readout")
    assert rows.at[-2.0, "effect"] == alone.at["density", "effect"]
    assert rows["base"].nunique() == 1
    pd.testing.assert_frame_equal(load_doses(series, cache), table)
    assert load_doses(series[1:], cache) is None
    assert respond(table, "density").reason or respond(table, "density").hill


def test_the_chart_shows_the_table(tiny_bundle, demo_cells: Cells, tmp_path: Path) -> None:
    series = dose_series(make(tiny_bundle, ""), TOY, list(demo_cells.genes), 1.0)[-2:]
    table = run_doses(series, tiny_bundle, demo_cells, DiskCache(tmp_path))
    figure = charts.dose_response(table, "fraction:Lymphocyte", TOY.dose_unit)
    points = figure.data[-1]
    rows = table[table["readout"] == "fraction:Lymphocyte"]
    np.testing.assert_allclose(points.x, [0.5, 1.0])
    np.testing.assert_allclose(points.y, 100 * rows["effect"])
    assert "percentage points" in figure.layout.yaxis.title.text
    assert TOY.dose_unit in figure.layout.xaxis.title.text


def test_the_command_writes_table_and_chart(tiny_folder: Path, demo_cells: Cells, tmp_path: Path, capsys) -> None:
    from ge2hist_core.model import GE2Hist

    write_cells(demo_cells, tmp_path / "cells.h5ad")
    model = GE2Hist.load(tiny_folder)
    with open_h5ad(tmp_path / "cells.h5ad", model.scgpt.vocab) as source:
        recipe = Recipe(source.sha256, model.sha256, ("cell-3",), sample=SampleConfig(steps=1), seeds=(0, 1))
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    (tmp_path / "mine.csv").write_text("gene,logFC\nGAPDH,1\nNOSUCHGENE,2\n")
    command = ["dose", str(tmp_path / "recipe.json"), "--bundle", str(tiny_folder), "--out", str(tmp_path / "out")]
    command += ["--cells", str(tmp_path / "cells.h5ad"), "--signature-file", str(tmp_path / "mine.csv")]
    assert run_command("perturb", "", COMMANDS, [*command, "--signature", "mine", "--max-dose", "1"]) == 0
    out = tmp_path / "out"
    table = pd.read_csv(out / "doses.csv")
    assert len(table) > 7 and "1 of 2 genes" in capsys.readouterr().out
    page = (out / "doses.html").read_text()
    readouts = table["readout"].nunique()
    figures = json.loads(page.split('id="figures">')[1].split("</script>")[0])
    assert page.count('<div id="dose') == len(figures) == readouts
    value = json.loads((out / "doses.json").read_text())
    series = read_series(value)
    assert [dose for dose, _ in series] == sorted(table["dose"].unique()) and value["signature"] == "mine"
    largest = Recipe.read(out / "recipe.json")
    assert largest == series[-1][1] and str(largest.perturbation) == "mine@1(GAPDH:x2)"
    for said in (largest.hash, series[0][1].hash, "bootstrap intervals over noise seeds", "noise seeds", "Apache-2.0"):
        assert said in page
    for name in ("doses.json", "recipe.json", "provenance.json"):
        assert json.loads((out / name).read_text())["notice"] == "Generated, not diagnostic"
    again = ["--bundle", str(tiny_folder), "--cells", str(tmp_path / "cells.h5ad")]
    for form in (out, out / "doses.html"):
        assert run_command("perturb", "", COMMANDS, ["replay", str(form), *again]) == 0
        assert f"same: {len(table)} rows" in capsys.readouterr().out
    table.loc[table["dose"].eq(0.5) & table["readout"].eq("density"), "effect"] += 1e6
    table.to_csv(out / "doses.csv", index=False)
    assert run_command("perturb", "", COMMANDS, ["replay", str(out), *again]) == 1
    assert "(0.5, density, effect)" in capsys.readouterr().out
    del value["series"][2]["recipe"]["cell_ids"]
    with pytest.raises(BadInput, match="no field 'cell_ids'"):
        read_series(value)
    with pytest.raises(BadInput, match="The series of doses is damaged"):
        read_series({})
    assert run_command("perturb", "", COMMANDS, [*command, "--signature", "mina"]) == 2
    assert "did you mean mine?" in capsys.readouterr().err


def test_what_a_signature_is_called_is_escaped(tiny_bundle, demo_cells: Cells, tmp_path: Path) -> None:
    evil = replace(TOY, name="</script><script>alert(1)</script><b>")
    series = dose_series(make(tiny_bundle), evil, list(demo_cells.genes), 1.0)
    table = run_doses(series, tiny_bundle, demo_cells, DiskCache(tmp_path))
    files = report_files(series, table, evil, Origin.of_model(tiny_bundle, demo_cells))
    page = files["doses.html"].decode()
    assert "alert(1)</script>" not in page and "&lt;script&gt;alert(1)" in page
    named = re.findall(r"^([a-z]+\.[a-z]+) ", files["README.txt"].decode(), re.MULTILINE)
    assert set(files) == {*named, "README.txt"}


def test_a_maximum_of_nothing_is_refused(tiny_bundle, demo_cells: Cells) -> None:
    with pytest.raises(BadInput, match="The largest dose is 0"):
        dose_series(make(tiny_bundle), TOY, list(demo_cells.genes), 0.0)
