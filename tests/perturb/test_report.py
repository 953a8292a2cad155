from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import zipfile
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ge2hist_core.config import SampleConfig
from ge2hist_core.data import write_cells
from ge2hist_core.model import GE2Hist
from ge2hist_core.types import Cells, Niche
from perturb import pictures
from perturb.__main__ import COMMANDS
from perturb.edits import Perturbation
from perturb.page import csv_bytes, for_people
from perturb.recipe import Recipe
from perturb.report import html, pdf, report_files, write_report, zip_bytes
from perturb.result import Result
from perturb.run import run

EVIL = '=HYPERLINK("x")</script><script>alert(1)</script>'


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "script"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def result(tiny_bundle: GE2Hist, demo_cells: Cells) -> Result:
    names = demo_cells.cell_id.copy()
    names[3] = EVIL
    recipe = Recipe(
        "d" * 64, tiny_bundle.sha256, (EVIL,), Perturbation.parse("GAPDH:x4"), SampleConfig(steps=2), (0, 5)
    )
    return run(recipe, tiny_bundle, replace(demo_cells, cell_id=names))


@pytest.fixture(scope="module")
def page(result: Result) -> str:
    return html(result)


def test_page_needs_no_network_and_runs_only_its_own_scripts(page: str) -> None:
    seen = Page(page)
    for tag, attributes in seen.tags:
        for name in ("src", "href", "action", "data", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    assert not any(tag in ("link", "iframe", "object", "base") for tag, _ in seen.tags)
    policy = next(a["content"] for t, a in seen.tags if t == "meta" and a.get("http-equiv"))
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy and "unsafe-eval" not in policy
    machine, data, *run_by_browser = seen.scripts
    assert set(json.loads(machine)) == {"recipe", "comparison", "provenance"}
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    assert len(run_by_browser) == 2
    assert {base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in run_by_browser} == allowed
    assert set(json.loads(data)) == {"effects", "density", "composition", "spacing"}


def test_what_users_and_files_say_is_escaped(page: str) -> None:
    assert "alert(1)</script>" not in page
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in page
    assert "Random weights, &lt;b&gt;no&lt;/b&gt; meaning." in page  # the model card


def test_page_says_what_it_is_and_what_the_interval_covers(page: str, result: Result) -> None:
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page[: page.index('<script type="application/json"')]))
    for phrase in (
        "Generated, not diagnostic",
        "GAPDH is set to 400 % of its counts",
        "2 noise seeds",
        "Intervals are 95 %",
        "It does not cover other cells, other donors, repeated experiments",
        "no difference can reach p &lt; 0.05",
        result.recipe.hash,
        "torch",
        "smallest p that 2 seeds can give is 0.5",
        "Licences",
    ):
        assert phrase in text, phrase
    assert "predict" not in text.lower()
    numbers = result.comparison.set_index("readout").loc["density"]
    assert f"{numbers['effect']:.4g}" in text


def test_page_shows_the_marked_pictures_with_words_beside_them(page: str, result: Result) -> None:
    images = [attributes for tag, attributes in Page(page).tags if tag == "img"]
    assert len(images) == 7 and all(attributes["alt"] for attributes in images)
    first = Image.open(io.BytesIO(base64.b64decode(images[0]["src"].partition(",")[2])))
    assert first.text["recipe_sha256"] == result.recipe.hash
    np.testing.assert_array_equal(np.asarray(first), pictures.show(result.base[0], 3))


def test_tables_pictures_and_recipe_go_home(result: Result) -> None:
    files = report_files(result)
    assert files["report.pdf"].startswith(b"%PDF") and files["report.pdf"] == pdf(result)
    table = pd.read_csv(io.BytesIO(files["comparison.csv"]), float_precision="round_trip")
    assert (table.pop("notice") == "Generated, not diagnostic").all()
    pd.testing.assert_frame_equal(table, result.comparison, check_exact=True)
    assert Recipe.from_json(files["recipe.json"].decode()) == result.recipe
    nuclei = pd.read_csv(io.BytesIO(files["nuclei.csv"]))
    assert len(nuclei) == sum(map(len, (*result.base_nuclei, *result.edited_nuclei)))
    assert set(nuclei["seed"]) <= {0, 5} and (nuclei["cell_id"] == "'" + EVIL).all()
    states = pd.read_csv(io.BytesIO(files["states.csv"]))
    assert states["cell_id"].item() == "'" + EVIL  # no spreadsheet formula
    names = [name for name in files if name.startswith("pictures/")]
    assert names == [f"pictures/cell001_seed{s}_{arm}.png" for arm in ("unedited", "edited") for s in (0, 5)]
    picture = Image.open(io.BytesIO(files[names[3]]))
    assert picture.text["generated"] == "true" and json.loads(picture.text["recipe"])["seeds"] == [0, 5]
    np.testing.assert_array_equal(np.asarray(picture), pictures.mark(result.edited[1].image))


def test_the_same_result_gives_the_same_bytes_and_other_files_stay(result: Result, tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    paths = write_report(result, tmp_path)
    assert paths[0] == tmp_path / "report.html" and (tmp_path / "notes.txt").read_text() == "mine"
    with zipfile.ZipFile(io.BytesIO(zip_bytes(result))) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {
            path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in paths
        }
    assert zip_bytes(result) == zip_bytes(result)


def test_every_file_is_explained_and_says_what_it_is(result: Result) -> None:
    files = report_files(result)
    readme = files["README.txt"].decode()
    for name in files:
        assert name.startswith("pictures/") or name == "README.txt" or f"\n{name} " in readme, name
    assert "result.h5ad is left out" in readme and "result.h5ad" not in files
    notice = b"enerated, not diagnostic"
    for name, content in files.items():
        if name.endswith((".csv", ".html", "provenance.json")):
            assert notice in content, name
    assert "GENERATED, NOT DIAGNOSTIC" in readme


def test_the_method_can_be_pasted_and_names_all_that_decides(page: str, result: Result) -> None:
    text = " ".join(re.search(r'<p id="method">(.*?)</p>', page, re.DOTALL)[1].split())
    for phrase in (
        "scGPT (Cui et al. 2024; weights SHA-256 " + result.provenance["scgpt_sha256"],
        "two variational autoencoders",
        "DPM-Solver++ (Lu et al. 2022) in 2 steps at guidance 1",
        "32 x 32 px (16 x 16 µm, 0.5 µm per pixel)",
        "2 noise seeds (0, 5); the arms shared all noise of a seed",
        "nuclei reader",
        "4,000 resamples",
        "(n = 2), are symmetric about zero (all 4 sign patterns; the smallest possible p is 0.5",
        f"adjust them over {result.comparison['p'].notna().sum()} readouts",
        result.recipe.data_sha256,
        result.recipe.model_sha256,
        result.recipe.hash,
        f"torch {result.provenance['versions']['torch']}",
    ):
        assert phrase in text, phrase
    assert "<" not in text  # one paragraph without markup


def test_shares_are_shown_in_percent(result: Result) -> None:
    shown, row = for_people(result.comparison), result.comparison.set_index("readout").loc["fraction:Fibroblast"]
    found = shown[shown["readout"] == "Share of Fibroblast"].iloc[0]
    assert found["unit"] == "%" and found["unedited"] == pytest.approx(100 * row["base"])
    assert found["95 % interval"] == f"{100 * row['low']:.3g} to {100 * row['high']:.3g}"


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "\uff1d"])
def test_no_text_in_a_csv_starts_a_formula(start: str) -> None:
    text = start + "1+1"
    table = pd.DataFrame({"name": [text, "fine"], "kind": pd.Categorical([text, "fine"]), "number": [-1.0, 2.0]})
    read = pd.read_csv(io.BytesIO(csv_bytes(table)))
    assert read["name"][0].startswith("'") and read["kind"][0].startswith("'")
    assert read["name"][1] == "fine" and read["number"].tolist() == [-1.0, 2.0]


def test_a_carriage_return_inside_a_text_starts_no_row() -> None:
    assert len(pd.read_csv(io.BytesIO(csv_bytes(pd.DataFrame({"name": ["a\r=1+1", "b\n=1+1"]}))))) == 2


def test_the_pdf_stands_letters_that_its_font_lacks(tiny_bundle: GE2Hist, demo_cells: Cells) -> None:
    names = demo_cells.cell_id.copy()
    names[3] = "細胞 $x$ \U0001f9ec"
    recipe = Recipe("d" * 64, tiny_bundle.sha256, (names[3],), sample=SampleConfig(steps=2), seeds=(0,))
    assert pdf(run(recipe, tiny_bundle, replace(demo_cells, cell_id=names))).startswith(b"%PDF")


def test_empty_comparisons_are_reported_too(result: Result, tiny_bundle: GE2Hist, demo_cells: Cells) -> None:
    recipe = replace(result.recipe.draft.base, cell_ids=tuple(f"cell-{i}" for i in range(5)))
    text = html(run(recipe, tiny_bundle, demo_cells))
    assert "5 cells when nothing is edited" in text and "Pictures of 1 more cells" in text


def test_command_line_writes_the_report_of_the_recipe(
    tiny_folder, tiny_bundle: GE2Hist, demo_cells: Cells, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ge2hist_core.__main__ import run_command

    def command(*argv: str) -> int:
        return run_command("python -m perturb", "", COMMANDS, argv)

    write_cells(demo_cells, tmp_path / "cells.h5ad")
    where = ["--bundle", str(tiny_folder), "--cells", str(tmp_path / "cells.h5ad")]
    options = ["--cell", "cell-3", "--edit", "GAPDH:x4", "--seeds", "0-1", "--steps", "2"]
    assert command("recipe", *options, *where) == 0
    text = capsys.readouterr().out
    (tmp_path / "recipe.json").write_text(text)
    out = tmp_path / "out"
    assert command("run", str(tmp_path / "recipe.json"), "--out", str(out), *where) == 0
    assert f"{out}/report.html" in capsys.readouterr().out
    recipe = Recipe.from_json(text)
    direct = run(recipe, tiny_bundle, demo_cells)
    table = pd.read_csv(out / "comparison.csv", float_precision="round_trip").drop(columns="notice")
    pd.testing.assert_frame_equal(table, direct.comparison, check_exact=True)

    (tmp_path / "other.json").write_text(replace(recipe, data_sha256="0" * 64).to_json())
    assert command("run", str(tmp_path / "other.json"), "--out", str(out), *where) == 2
    assert "made with data 000000000000" in capsys.readouterr().err
    assert command("recipe", "--cell", "cell-3", "--edit", "CD8X:ko", *where) == 2
    assert "did you mean CD8" in capsys.readouterr().err


def test_overlay_draws_the_nucleus_where_it_is_in_its_colour() -> None:
    niche = Niche(np.full((64, 64, 3), 200, np.uint8), 0.5)
    nuclei = pd.DataFrame(
        [(8.0, 20.0, np.pi * 4.0**2, "Lymphocyte", 0.9)],
        columns=["x_um", "y_um", "area_um2", "cell_type", "probability"],
    )
    drawn = pictures.overlay(niche, nuclei, scale=4)
    assert drawn.shape == (256, 256, 3)
    # Right edge of the circle: (8 + 4 um) * 2 px/um * 4 = 96 px, on the row of its centre.
    on_rim = drawn[160, 95].astype(int)
    assert np.abs(on_rim - [0x00, 0x72, 0xB2]).max() < 60
    np.testing.assert_array_equal(drawn[160, 64], [200, 200, 200])
    np.testing.assert_array_equal(drawn[30, 200], [200, 200, 200])


def test_difference_is_white_where_equal_orange_where_darker_blue_where_lighter() -> None:
    base = Niche(np.full((48, 48, 3), 100, np.uint8), 0.5)
    image = base.image.copy()
    image[0, 0], image[0, 1] = 50, 200
    view = pictures.difference(base, Niche(image, 0.5))
    np.testing.assert_array_equal(view[0, 0], [213, 94, 0])
    np.testing.assert_array_equal(view[0, 1], [0, 114, 178])
    assert (view[1:20] == 255).all()
    with pytest.raises(ValueError, match="differ in size"):
        pictures.difference(base, Niche(np.zeros((8, 8, 3), np.uint8), 0.5))


def test_generated_pictures_are_marked_and_real_ones_are_not() -> None:
    image = np.full((128, 128, 3), 200, np.uint8)
    real, generated = Niche(image, 0.5), Niche(image, 0.5, 0, generated=True)
    np.testing.assert_array_equal(pictures.show(real), image)
    marked = pictures.show(generated)
    changed = (marked != image).any(axis=2)
    assert changed[-8:, :30].any() and not changed[:100].any() and not changed[:, 80:].any()
    np.testing.assert_array_equal(image, 200)
    sheet = pictures.contact_sheet([generated, real, generated], columns=2)
    assert sheet.shape == (2 * 128 + 4, 2 * 128 + 4, 3)
    np.testing.assert_array_equal(sheet[132:, :128], marked)
    assert (sheet[132:, 132:] == 255).all()
