"""The report of a screen holds the screen's own numbers, runs nothing but its own scripts, and reads back."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ge2hist_core.config import SampleConfig
from ge2hist_core.model import GE2Hist
from ge2hist_core.types import BadInput, Cells
from perturb import pictures, screen_report
from perturb.cache import DiskCache
from perturb.edits import Perturbation
from perturb.recipe import Recipe
from perturb.result import Result
from perturb.run import run
from perturb.screen import Screen, ScreenResult, drawn_readouts, knock_outs, run_screen
from perturb.screen_report import drawn_results, h5ad, headline, hits_first, html, report_files, write_report, zip_bytes
from perturb.wording import Origin, screen_question

EVIL = '=x"</script><script>alert(1)</script><b>'


@pytest.fixture(scope="module")
def cells(demo_cells: Cells) -> Cells:
    names, genes = demo_cells.cell_id.copy(), demo_cells.genes.copy()
    names[3], genes[genes == "GAPDH"] = EVIL, "<i>GAPDH</i>"
    return replace(demo_cells, cell_id=names, genes=genes)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> DiskCache:
    return DiskCache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def made(tiny_bundle: GE2Hist, cells: Cells, cache: DiskCache) -> tuple[Screen, ScreenResult, Origin]:
    recipe = Recipe("d" * 64, tiny_bundle.sha256, (EVIL,), sample=SampleConfig(steps=2), seeds=(0,))
    screen = Screen(recipe, knock_outs(cells.take([3])), keep=4, first_seeds=(0, 1), further_seeds=(2, 3, 4))
    return screen, run_screen(screen, tiny_bundle, cells, cache), Origin.of_model(tiny_bundle, cells)


@pytest.fixture(scope="module")
def drawn(made: tuple[Screen, ScreenResult, Origin], cache: DiskCache) -> dict[str, Result]:
    return drawn_results(*made[:2], cache)


@pytest.fixture(scope="module")
def files(made: tuple[Screen, ScreenResult, Origin], drawn: dict[str, Result], cells: Cells) -> dict[str, bytes]:
    return report_files(*made, drawn, cells)


def test_all_that_decides_the_screen_is_in_the_file(made, files: dict[str, bytes]) -> None:
    screen = Screen.from_dict(json.loads(files["screen.json"]))
    assert screen == replace(made[0], recipe=screen.recipe) and screen.hash == made[0].hash
    for name in ("screen.json", "provenance.json"):
        assert json.loads(files[name])["notice"] == "Generated, not diagnostic"


def test_tables_go_home_as_they_are(made, files: dict[str, bytes]) -> None:
    for name in ("guess", "confirmed"):
        table = pd.read_csv(io.BytesIO(files[f"{name}.csv"]), float_precision="round_trip")
        assert (table.pop("notice") == "Generated, not diagnostic").all()
        pd.testing.assert_frame_equal(table, getattr(made[1], name), check_exact=True)


def test_the_page_runs_only_its_own_scripts_and_escapes_what_others_say(files: dict[str, bytes]) -> None:
    page = files["report.html"].decode()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 2 and "default-src 'none'" in policy
    for script in scripts:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert "alert(1)</script>" not in page and "<i>GAPDH" not in page
    assert "&lt;script&gt;alert(1)" in page and "&lt;i&gt;GAPDH" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page.split("<script")[0])


def test_the_page_shows_the_numbers_with_n_interval_null_and_method(made, files: dict[str, bytes]) -> None:
    screen, result, _ = made
    page = files["report.html"].decode()
    text = " ".join(re.sub(r"<[^>]+>", " ", page[: page.index('<script type="application/json"')]).split())
    row = result.confirmed[result.confirmed["p"].notna()].iloc[0]
    factor = 100 if row["readout"].startswith("fraction") else 1
    for phrase in (
        f"Which of {len(screen.candidates)} knock-outs move the niche of cell",
        f"{row['low'] * factor:.3g} to {row['high'] * factor:.3g}",
        "With 3 seeds no p is below 0.25, so that no q can be below 0.05",
        "random edits that move at least as far: the candidate",
        "could be shown to move a readout",
        "mean paired one (edited - unedited) over 3 further seeds",
        f"{len(screen.candidates)} knock-outs were compared",
        "Noise seeds 0, 1 chose the better half",
        "further seeds 2 to 4 alone",
        screen.hash,
        screen.recipe.model_sha256,
        "Apache-2.0",
        "Generated, not diagnostic",
    ):
        assert phrase in text, phrase
    assert "shift image" in text and f"{row['shift_image']:.4g}" in text
    assert "predict" not in text.lower()


def test_pictures_of_the_tested_candidates_are_those_that_the_p_values_come_from(
    made, drawn: dict[str, Result], files: dict[str, bytes], tiny_bundle: GE2Hist, cells: Cells
) -> None:
    screen, result, _ = made
    tested = result.confirmed[result.confirmed["p"].notna()]
    assert list(drawn) == list(dict.fromkeys(tested["candidate"])) and len(drawn) == screen.tested
    name, first = next(iter(drawn.items()))
    again = run(screen.edited(Perturbation.parse(name), screen.further_seeds), tiny_bundle, cells)
    np.testing.assert_array_equal(first.edited_arm.images, again.edited_arm.images)
    row = tested[(tested["candidate"] == name) & (tested["readout"] == "density")].iloc[0]
    table = pd.read_csv(io.BytesIO(files["readouts.csv"]))
    density = table[table["readout"] == "density"].set_index("candidate")["value"]
    assert (density[name].to_numpy() - density["unedited"].to_numpy()).mean() == pytest.approx(row["effect"])
    wide = drawn_readouts(first)
    assert len(table) == len(wide[wide["arm"] == "base"]) * (1 + len(drawn))
    pngs = [path for path in files if path.startswith("pictures/")]
    assert len(pngs) == (1 + len(drawn)) * len(screen.further_seeds)
    shown = Image.open(io.BytesIO(files[[path for path in pngs if path.startswith("pictures/01_")][1]]))
    assert shown.text["generated"] == "true" and Recipe.from_json(shown.text["recipe"]) == first.recipe
    np.testing.assert_array_equal(np.asarray(shown), pictures.mark(first.edited_arm.images[1]))
    page = files["report.html"].decode()
    assert page.count("<img ") == 5 * len(drawn) and page.count("Generated: edited, same noise") == len(drawn)
    readme = files["README.txt"].decode()
    assert all(f"\n{path} " in readme for path in files if "/" not in path and path != "README.txt")


def test_the_h5ad_holds_edited_counts_states_and_mean_readouts_of_each_candidate(
    made, drawn: dict[str, Result], files: dict[str, bytes], cells: Cells, tmp_path: Path
) -> None:
    (tmp_path / "candidates.h5ad").write_bytes(files["candidates.h5ad"])
    table = anndata.read_h5ad(tmp_path / "candidates.h5ad")
    assert table.obs["candidate"].tolist() == ["unedited", *drawn] and table.obs_names.is_unique
    genes, counts = list(cells.genes), cells.counts[3].toarray().ravel()
    for i, (name, result) in enumerate(drawn.items(), start=1):
        expected, gene = counts.copy(), Perturbation.parse(name).genes[0]
        assert expected[genes.index(gene)] > 0
        expected[genes.index(gene)] = 0
        np.testing.assert_array_equal(table.X[i].toarray().ravel(), expected)
        np.testing.assert_array_equal(table.obsm["X_z_e"][i], result.edited_arm.latent.z_e[0])
        np.testing.assert_array_equal(table.obsm["X_scGPT"][i], result.edited_arm.embedding[0])
        rows = result.readouts[(result.readouts["arm"] == "edited") & (result.readouts["readout"] == "density")]
        assert table.obs["density"].iloc[i] == pytest.approx(rows["value"].mean())
    about = table.uns["ge2hist"]
    assert Screen.from_dict(json.loads(about["screen"])).hash == made[0].hash
    assert about["notice"] == "Generated, not diagnostic" and table.X[0].toarray().ravel().tolist() == counts.tolist()
    with pytest.raises(BadInput, match="lack"):
        report_files(*made, drawn, cells.take([0, 1]))
    with pytest.raises(BadInput, match="No candidate's pictures are kept"):
        h5ad(made[0], {}, cells)


def test_what_the_cache_lost_is_drawn_again_or_left_out_and_many_pictures_mean_fewer_candidates(
    made, drawn: dict[str, Result], tiny_bundle: GE2Hist, cells: Cells, tmp_path: Path, monkeypatch
) -> None:
    screen, result, origin = made
    empty = DiskCache(tmp_path)
    assert drawn_results(screen, result, empty) == {}
    files = report_files(screen, result, origin, {}, cells)
    assert b"Pictures and readouts of 0 of the 2 tested candidates are here" in files["README.txt"]
    assert not any(name.startswith("pictures/") or name.endswith(".h5ad") for name in files)
    monkeypatch.setattr(screen_report, "MAX_PICTURES", len(screen.further_seeds))
    again = drawn_results(screen, result, empty, lambda recipe: run(recipe, tiny_bundle, cells))
    assert list(again) == list(drawn)[:1]
    np.testing.assert_array_equal(
        again[next(iter(again))].edited_arm.images, drawn[next(iter(drawn))].edited_arm.images
    )


def test_hits_come_first_and_a_hit_needs_q_and_replication() -> None:
    columns = ["candidate", "readout", "unit", "first_effect", "effect", "low", "high", "p", "q", "n", "replicated"]
    rows = [
        ("A:ko", "density", "cells/mm²", -1.0, 5.0, 4.0, 6.0, 0.001, 0.01, 8.0, False),
        ("B:ko", "fraction:Fibroblast", "fraction", 0.1, 0.2, 0.15, 0.25, 0.002, 0.02, 8.0, True),
        ("C:ko", "density", "cells/mm²", 1.0, 1.0, -1.0, 3.0, 0.4, 0.6, 8.0, True),
        ("D:ko", "density", "cells/mm²", 1.0, np.nan, np.nan, np.nan, np.nan, np.nan, np.nan, False),
    ]
    result = ScreenResult("0" * 64, pd.DataFrame(), pd.DataFrame(rows, columns=columns), complete=True)
    found, others, hits = hits_first(result)
    assert found["candidate"].tolist() == ["B knocked out", "A knocked out", "C knocked out"] and hits == 1
    assert others["candidate"].tolist() == ["D knocked out"]
    said = headline(result)
    assert "1 of 3 tested candidates moves a readout" in said
    assert "B knocked out, share of fibroblast +20 % (15 to 25, n = 8)" in said


def test_without_a_hit_the_headline_says_what_the_design_could_show(made) -> None:
    screen, result, _ = made
    said = headline(result, screen)
    n = int(result.confirmed["p"].notna().sum())
    assert said.startswith("None of the 2 tested candidates could be shown to move a readout")
    assert said.endswith(screen.reach(n)) and "take more further seeds" in said


def test_part_of_a_screen_is_reported_as_a_part(made) -> None:
    screen, result, origin = made
    nothing = ScreenResult(screen.hash, result.guess, pd.DataFrame(), complete=False)
    page = html(screen, nothing, origin)
    assert "This is a part" in page and "No candidate has been drawn" in page
    assert report_files(screen, nothing, origin)["report.pdf"].startswith(b"%PDF")


def test_the_same_screen_gives_the_same_bytes(
    made, drawn: dict[str, Result], cells: Cells, files: dict[str, bytes], tmp_path: Path
) -> None:
    again = zip_bytes(*made, drawn, cells)
    with zipfile.ZipFile(io.BytesIO(again)) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == files
    paths = write_report(*made, tmp_path, drawn, cells)
    assert paths[0].name == "report.html"
    assert {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in paths} == files


def test_questions_name_what_was_screened(made) -> None:
    screen, _, _ = made
    sets = (Perturbation.parse("S@1(GAPDH:x2)"), Perturbation.parse("T@1(GAPDH:x0.5)"))
    other = replace(
        screen,
        candidates=sets,
        readout="fraction:Fibroblast",
        recipe=replace(screen.recipe, cell_ids=("a", "b"), perturbation=Perturbation.parse("CD4:ko")),
    )
    assert screen_question(other) == (
        "Which of 2 signatures move the niche of 2 cells in its share of Fibroblast most, after CD4 knocked out?"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": "4"}, "keep or readout of the screen is of another type"),
        ({"first_seeds": [0, "1"]}, "first_seeds of the screen is no list of numbers"),
        ({"candidates": "A:ko"}, "candidates of the screen is no list of texts"),
        ({"more": 1}, "an unknown field 'more'"),
        ({"candidates": ["A:blow"]}, "Cannot read the edit"),
        ({"recipe": 3}, "no field 'schema'"),
    ],
)
def test_a_malformed_screen_is_one_sentence(made, change: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Screen.from_dict(made[0].to_dict() | change)
    with pytest.raises(BadInput, match="no field 'keep'"):
        Screen.from_dict({k: v for k, v in made[0].to_dict().items() if k != "keep"})
