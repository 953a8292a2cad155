"""Grids and ways: states from the same noise, the command's files against the functions', recipes read back."""

from __future__ import annotations

import io
import json
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ge2hist_core.__main__ import run_command
from ge2hist_core.config import SampleConfig
from ge2hist_core.data import H5adSource, open_h5ad, write_cells
from ge2hist_core.real_tiles import RealTiles
from ge2hist_core.sampler import Stopped
from ge2hist_core.types import BadInput, Cells, Latent
from perturb.__main__ import COMMANDS
from perturb.cache import DiskCache
from perturb.run import Progress
from perturb.types_grid import TypesGrid, draw_types, load_types, statistics, types_files, zip_bytes

QUICK = SampleConfig(steps=1)
TYPES = ("Fibroblast", "B cell")


@pytest.fixture(scope="module")
def cells_file(tmp_path_factory: pytest.TempPathFactory, demo_cells: Cells) -> Path:
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    write_cells(demo_cells, path)
    return path


@pytest.fixture
def source(cells_file: Path, tiny_bundle) -> H5adSource:
    with open_h5ad(cells_file, tiny_bundle.scgpt.vocab) as opened:
        yield opened


def grid(model, **changes) -> TypesGrid:
    return TypesGrid(**({"model_sha256": model.sha256, "types": TYPES, "n": 3, "sample": QUICK} | changes))


def test_a_grid_has_the_types_states_in_rows_and_the_environments_in_columns(tiny_bundle, source) -> None:
    gallery = grid(tiny_bundle, seed=4).gallery(tiny_bundle)
    assert gallery.rows == TYPES and len(gallery.latent) == 6 and gallery.seed == 4
    np.testing.assert_array_equal(gallery.z_e, tiny_bundle.sample_environment(3, 4))
    np.testing.assert_array_equal(gallery.z_c[1:], tiny_bundle.sample_type("B cell", 1, 4))
    assert grid(tiny_bundle, environments="axis", axis=2).gallery(tiny_bundle).columns[0] == "-2 sd"
    named = {"environments": "cells", "cell_ids": ("cell-3", "cell-9"), "data_sha256": source.sha256}
    of_cells = grid(tiny_bundle, **named).gallery(tiny_bundle, source)
    assert of_cells.columns == ("as cell-3", "as cell-9")
    latent = tiny_bundle.encode(tiny_bundle.embed(source.take([3, 9]), 0))
    np.testing.assert_array_equal(of_cells.z_e, latent.z_e)


@pytest.mark.parametrize("part", ["z_c", "z_e", "both"])
def test_a_way_leads_from_one_cell_to_the_other_in_its_part(part: str, tiny_bundle, source) -> None:
    recipe = TypesGrid(
        tiny_bundle.sha256, cell_ids=("cell-3", "cell-9"), part=part, n=3, sample=QUICK, data_sha256=source.sha256
    )
    gallery = recipe.gallery(tiny_bundle, source)
    latent = tiny_bundle.encode(tiny_bundle.embed(source.take([3, 9]), 0))
    assert gallery.paired and gallery.rows == ("0 %", "50 %", "100 %")
    for name in ("z_c", "z_e"):
        start, end = getattr(latent, name)
        last = end if part in (name, "both") else start
        np.testing.assert_allclose(getattr(gallery, name), [start, (start + last) / 2, last], atol=1e-6)


def test_pictures_are_kept_told_about_and_can_be_cancelled(tiny_bundle, tmp_path: Path) -> None:
    gallery, cache, cancel = grid(tiny_bundle).gallery(tiny_bundle), DiskCache(tmp_path), threading.Event()
    cancel.set()
    with pytest.raises(Stopped):
        draw_types(gallery, tiny_bundle, cache, cancel=cancel)
    assert load_types(gallery, tiny_bundle, cache) is None
    told: list[Progress] = []
    images = draw_types(gallery, tiny_bundle, cache, on_progress=told.append)
    assert [one.fraction for one in told] == sorted(one.fraction for one in told) and told[-1].fraction == 1.0
    np.testing.assert_array_equal(images, tiny_bundle.generate(gallery.latent, [0] * 6, QUICK))
    kept = draw_types(gallery, tiny_bundle, cache, on_progress=lambda _: pytest.fail("was drawn again"))
    np.testing.assert_array_equal(kept, images)


def test_the_nearest_real_tile_stands_in_the_table_and_beside_the_pictures(tiny_bundle, tmp_path: Path) -> None:
    recipe = grid(tiny_bundle)
    gallery = recipe.gallery(tiny_bundle)
    images = draw_types(gallery, tiny_bundle, DiskCache(tmp_path))
    latent = Latent(gallery.latent.z_c[::-1].copy(), gallery.latent.z_e[::-1].copy())
    names = np.array([f"real-{i}" for i in range(6)], dtype=object)
    real = RealTiles(images[::-1], latent, names, names, names, tiny_bundle.sha256, {})
    table = statistics(gallery, tiny_bundle, images, real)
    assert table["real_cell_id"].tolist() == names[::-1].tolist()
    assert table["real_distance"].to_numpy() == pytest.approx(0.0, abs=1e-6)
    files = types_files(recipe, gallery, tiny_bundle, images, real)
    assert sum(name.startswith("nearest_real/") for name in files) == 6
    with Image.open(io.BytesIO(next(v for k, v in files.items() if k.startswith("nearest_real/")))) as picture:
        assert picture.info["generated"] == "false" and picture.info["cell_id"] == "real-5"


def test_file_names_and_tables_are_safe_whatever_cells_are_called(tiny_bundle, tmp_path: Path, demo_cells) -> None:
    names = np.array(["=1+1", "../../a", *demo_cells.cell_id[2:]], dtype=object)
    write_cells(replace(demo_cells, cell_id=names), tmp_path / "odd.h5ad")
    with open_h5ad(tmp_path / "odd.h5ad", tiny_bundle.scgpt.vocab) as source:
        recipe = grid(
            tiny_bundle, environments="cells", cell_ids=("=1+1", "../../a"), data_sha256=source.sha256, types=TYPES[:1]
        )
        gallery = recipe.gallery(tiny_bundle, source)
    images = np.zeros((2, 32, 32, 3), np.uint8)
    files = types_files(recipe, gallery, tiny_bundle, images)
    assert [name for name in files if name.startswith("pictures/")] == [
        "pictures/01_Fibroblast_as-1-1.png",
        "pictures/02_Fibroblast_as-a.png",
    ]
    assert not any(line.startswith(("=", "+", "@")) for line in files["statistics.csv"].decode().splitlines())
    with zipfile.ZipFile(io.BytesIO(zip_bytes(recipe, gallery, tiny_bundle, images))) as archive:
        assert archive.testzip() is None and set(archive.namelist()) == set(files)


def test_the_command_writes_what_the_functions_give_and_draws_it_again(
    tiny_bundle, tiny_folder: Path, cells_file: Path, tmp_path: Path, capsys
) -> None:
    where = ["--bundle", str(tiny_folder), "--cells", str(cells_file)]
    words = ["types", "grid", "--types", "Fibroblast, B cell", "--prior", "2", "--steps", "1", "--seed", "3", *where]
    assert run_command("perturb", "", COMMANDS, [*words, "--out", str(tmp_path / "one")]) == 0
    recipe = TypesGrid.from_text((tmp_path / "one" / "types.json").read_text())
    assert recipe == grid(tiny_bundle, n=2, seed=3)
    gallery = recipe.gallery(tiny_bundle)
    images = draw_types(gallery, tiny_bundle, DiskCache(tmp_path / "cache"))
    wanted = types_files(recipe, gallery, tiny_bundle, images)
    written = {str(path.relative_to(tmp_path / "one")): path for path in (tmp_path / "one").rglob("[!.]*.*")}
    assert {name: path.read_bytes() for name, path in written.items()} == wanted
    table = pd.read_csv(written["statistics.csv"])
    assert len(table) == 4 and set(table["notice"]) == {"Generated, not diagnostic"}
    assert table["density"].tolist() == pytest.approx((table["n"] / (32 * recipe_um(tiny_bundle)) ** 2 * 1e6).tolist())
    again = ["types", "again", str(tmp_path / "one" / "types.json"), *where, "--out", str(tmp_path / "two")]
    assert run_command("perturb", "", COMMANDS, again) == 0
    for name, path in written.items():
        assert (tmp_path / "two" / name).read_bytes() == path.read_bytes(), name
    way = ["types", "way", "cell-3", "cell-9", "--part", "z_e", "--states", "3", "--steps", "1", *where]
    assert run_command("perturb", "", COMMANDS, [*way, "--out", str(tmp_path / "way")]) == 0
    assert "3 pictures" in capsys.readouterr().out
    assert len(list((tmp_path / "way" / "pictures").iterdir())) == 3


def recipe_um(model) -> float:
    return model.config.um_per_px


def test_a_recipe_reads_back_from_its_json(tiny_bundle) -> None:
    recipe = grid(tiny_bundle, environments="cells", cell_ids=("a", "b"), data_sha256="d" * 64, matrix="raw.X")
    assert TypesGrid.from_text(json.dumps(recipe.to_dict())) == recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"types": ()}, "The grid has no row"),
        ({"types": ("\ud800",)}, "A name of types holds"),
        ({"types": (5,)}, "A name of types is 5: give text"),
        ({"data_sha256": 5}, "data_sha256 is 5"),
        ({"matrix": 5}, "matrix is 5: give text"),
        ({"gene_column": "\ud800"}, "gene_column holds"),
        ({"types": ("B cell", "B cell")}, "types holds 'B cell' twice"),
        ({"environments": "elsewhere"}, "choose prior, axis, cells"),
        ({"n": 0}, "n is 0: give a whole number from 1"),
        ({"n": True}, "n is True"),
        ({"seed": -1}, "seed is -1"),
        ({"part": "z"}, "part is 'z': choose z_e, z_c, both"),
        ({"part": "both"}, "has 0 ends: give two cells"),
        ({"cell_ids": ("a",)}, "give cells for environments 'cells' alone"),
        ({"environments": "cells", "cell_ids": ("a",)}, "cell_ids and data_sha256 go together"),
    ],
)
def test_what_cannot_be_a_grid_is_refused(tiny_bundle, changes: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        grid(tiny_bundle, **changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "The file is not valid JSON"),
        ("[" * 100_000, "The file is nested more than 50 deep"),
        ('{"schema": 1, "sample": {}, "seed": ' + "1" * 5000 + "}", "whole number of thousands of digits"),
        ('{"schema": true, "sample": {}}', "no schema 1"),
        ('{"schema": 1, "sample": {}, "model_sha256": 5}', "model_sha256 is 5: give the 64 hexadecimal digits"),
        ('{"schema": 1, "sample": {}, "model_sha256": null}', "model_sha256 is None"),
        ("[]", "no schema 1"),
        ('{"schema": 1, "sample": {}}', "A field is missing"),
        ('{"schema": 1, "sample": {}, "model_sha256": "m", "colour": 1}', "Unknown field 'colour'"),
        ('{"schema": 1, "sample": {"steps": 0}, "model_sha256": "m"}', "steps is 0"),
    ],
)
def test_a_damaged_recipe_is_one_sentence(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        TypesGrid.from_text(text)


def test_another_model_data_type_or_axis_is_refused(tiny_bundle, source) -> None:
    named = {"environments": "cells", "cell_ids": ("cell-3",)}
    cases = [
        (grid(tiny_bundle, model_sha256="e" * 64), "was made with model eeeeeeeeeeee"),
        (grid(tiny_bundle, **named, data_sha256="d" * 64), "was made with data dddddddddddd"),
        (grid(tiny_bundle, types=("Neuron",)), "Cell type 'Neuron' is unknown"),
        (grid(tiny_bundle, environments="axis", axis=99), "axis is 99: choose 1 to 4"),
        (grid(tiny_bundle, n=200), "400 pictures are more than"),
    ]
    for recipe, message in cases:
        with pytest.raises(BadInput, match=message):
            recipe.gallery(tiny_bundle, source)
    with pytest.raises(BadInput, match="none is open"):
        grid(tiny_bundle, **named, data_sha256=source.sha256).gallery(tiny_bundle)
