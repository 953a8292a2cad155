"""A workspace against a plain list that is treated alike, its file against itself and against bad ones, differences
between scenarios against plain loops over pairs."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from ge2hist_core.__main__ import run_command
from ge2hist_core.config import SampleConfig
from ge2hist_core.data import open_h5ad, write_cells
from ge2hist_core.model import GE2Hist
from ge2hist_core.types import BadInput, Cells
from perturb import compare
from perturb.__main__ import COMMANDS
from perturb.edits import Perturbation
from perturb.grn import Network, Propagation, pack_network
from perturb.networks import known_truth
from perturb.page import write_files, zip_of
from perturb.recipe import Recipe
from perturb.replay import read_report, rerun
from perturb.result import Result
from perturb.run import cells_for, run
from perturb.stats import crossed_effect
from perturb.workspace import (
    MAX_AGE_DAYS,
    MAX_SCENARIOS,
    Scenario,
    Workspace,
    contrast_table,
    effects_table,
    load_workspace,
    save_workspace,
)

PLAIN = Recipe("d" * 64, "e" * 64, ("cell-1",))
THREE = Workspace(tuple(Scenario(name, PLAIN) for name in "abc"))
ID = "0123456789abcdef" * 2


def names(workspace: Workspace) -> list[str]:
    return [scenario.name for scenario in workspace.scenarios]


@given(st.integers(0, 2), st.integers(-5, 5))
def test_moving_is_taking_out_and_putting_in(i: int, step: int) -> None:
    expected = list("abc")
    one = expected.pop(i)
    expected.insert(min(max(i + step, 0), 2), one)
    assert names(THREE.moved(i, step)) == expected


def test_operations_leave_the_workspace_before_as_it_was() -> None:
    assert names(THREE.removed(1)) == ["a", "c"]
    assert names(THREE.renamed(1, "new")) == ["a", "new", "c"]
    assert names(THREE.duplicated(0)) == ["a", "a (2)", "b", "c"]
    assert names(THREE.added("c", PLAIN).added("c", PLAIN)) == ["a", "b", "c", "c (2)", "c (3)"]
    assert names(THREE) == ["a", "b", "c"]
    long = Workspace().added("x" * 100, PLAIN).added("x" * 100, PLAIN)
    assert [len(name) for name in names(long)] == [60, 60]


def test_scenarios_share_the_noise_of_the_first() -> None:
    other = replace(PLAIN, seeds=(7, 8), perturbation=Perturbation.parse("A:ko"), cell_ids=("cell-2",))
    workspace = Workspace((Scenario("first", replace(PLAIN, seeds=(1, 2, 3))), Scenario("other", other)))
    first, second = workspace.on_shared_noise
    assert second.seeds == first.seeds == (1, 2, 3)
    assert second.perturbation == other.perturbation and second.cell_ids == ("cell-2",)
    assert Workspace().on_shared_noise == ()


def test_a_file_reads_back_and_a_strange_name_finds_no_file(tmp_path: Path) -> None:
    assert load_workspace(tmp_path, ID) is None
    save_workspace(THREE, tmp_path, ID)
    assert load_workspace(tmp_path, ID) == THREE
    for name in ("../secret", "A" * 32, "", "0" * 31):
        with pytest.raises(BadInput, match="no valid name"):
            load_workspace(tmp_path, name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "The workspace is nested more than 50 deep"),
        ('{"workspace_schema": ' + "1" * 5000 + "}", "whole number of thousands of digits"),
        ("[]", "cannot be read"),
        ('{"workspace_schema": 9, "scenarios": []}', "schema 9, this version reads 1"),
        ('{"workspace_schema": 1, "scenarios": [{"name": "a"}]}', "cannot be read"),
        ('{"workspace_schema": 1, "scenarios": [{"name": "a", "recipe": {}}]}', "no field 'schema'"),
    ],
)
def test_a_bad_file_is_one_sentence(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Workspace.from_json(text)


def test_names_and_numbers_have_limits() -> None:
    with pytest.raises(BadInput, match="Two scenarios are called 'a'"):
        THREE.renamed(1, "a")
    with pytest.raises(BadInput, match="has no name"):
        THREE.renamed(0, "  ")
    with pytest.raises(BadInput, match="half of a surrogate pair"):
        THREE.renamed(0, "a\ud800")
    with pytest.raises(BadInput, match="61 characters"):
        THREE.renamed(0, "x" * 61)
    with pytest.raises(BadInput, match=f"at most {MAX_SCENARIOS}"):
        Workspace(tuple(Scenario(str(i), PLAIN) for i in range(9)))
    assert json.loads(json.dumps(THREE.to_dict()))["scenarios"][0]["name"] == "a"


def test_a_file_goes_ninety_days_after_it_was_saved_or_opened(tmp_path: Path) -> None:
    opened, forgotten = ID, ID[::-1]
    for name in (opened, forgotten):
        save_workspace(THREE, tmp_path, name)
        old = time.time() - (MAX_AGE_DAYS + 1) * 86400
        os.utime(tmp_path / f"{name}.json", (old, old))
        if name == opened:
            load_workspace(tmp_path, name)
    save_workspace(THREE, tmp_path, "f" * 32)
    assert load_workspace(tmp_path, opened) == THREE
    assert load_workspace(tmp_path, forgotten) is None


# Differences between scenarios


@pytest.fixture(scope="module")
def cells_file(demo_cells: Cells, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    write_cells(demo_cells, path)
    return path


@pytest.fixture(scope="module")
def workspace(tiny_bundle: GE2Hist, cells_file: Path) -> Workspace:
    """Two edits of the same two cells, one of other cells."""
    with open_h5ad(cells_file, tiny_bundle.scgpt.vocab) as source:
        sha256 = source.sha256
    recipe = Recipe(sha256, tiny_bundle.sha256, ("cell-3", "cell-9"), sample=SampleConfig(steps=1), seeds=(0, 1, 2))
    return (
        Workspace()
        .added("ko", replace(recipe, perturbation=Perturbation.parse("GAPDH:ko")))
        .added("more/../up", replace(recipe, perturbation=Perturbation.parse("GAPDH:x4"), seeds=(7,)))
        .added("other cells", replace(recipe, cell_ids=("cell-20",)))
    )


@pytest.fixture(scope="module")
def results(workspace: Workspace, tiny_bundle: GE2Hist, demo_cells: Cells) -> list[Result]:
    return [run(recipe, tiny_bundle, demo_cells) for recipe in workspace.on_shared_noise]


def edited(result: Result, readout: str) -> dict[tuple[str, int], float]:
    rows = result.readouts[(result.readouts["arm"] == "edited") & (result.readouts["readout"] == readout)]
    return {(row.cell_id, row.seed): row.value for row in rows.itertuples()}


def test_scenarios_of_the_same_cells_are_paired_picture_by_picture(workspace: Workspace, results: list[Result]) -> None:
    table = contrast_table(names(workspace), results, "ko").set_index(["scenario", "readout"]).loc["more/../up"]
    assert set(table["over"]) == {"cells and seeds"} and set(table["reference"]) == {"ko"}
    assert "density" in table.index
    for readout, row in table.iterrows():
        before, after = edited(results[0], readout), edited(results[1], readout)
        pairs = {key: after[key] - before[key] for key in before if np.isfinite(after[key] - before[key])}
        assert row["n"] == len(pairs)
        if not pairs:
            assert np.isnan(row["effect"])
            continue
        assert row["effect"] == pytest.approx(np.mean(list(pairs.values())))
        assert row["mean"] - row["reference_mean"] == pytest.approx(row["effect"])
        assert row["low"] <= row["effect"] + 1e-9 and row["effect"] <= row["high"] + 1e-9
        cells, seeds = (sorted({key[i] for key in before}) for i in (0, 1))
        difference = np.array([[pairs.get((cell, seed), np.nan) for seed in seeds] for cell in cells])
        assert row["p"] == pytest.approx(crossed_effect(np.zeros(difference.shape), difference, 0).p)
    tested = table["p"].dropna()
    assert table["q"].dropna().to_numpy() == pytest.approx(false_discovery_control(tested))


def test_scenarios_of_other_cells_are_paired_by_their_mean_of_each_seed(
    workspace: Workspace, results: list[Result]
) -> None:
    table = contrast_table(names(workspace), results, "ko").set_index(["scenario", "readout"])
    row = table.loc[("other cells", "density")]
    before, after = edited(results[0], "density"), edited(results[2], "density")
    by_seed = [after["cell-20", s] - np.mean([before[c, s] for c in ("cell-3", "cell-9")]) for s in (0, 1, 2)]
    assert row["effect"] == pytest.approx(np.mean(by_seed)) and row["n"] == 3 and row["over"] == "seeds"


def test_the_other_way_round_a_difference_changes_its_sign(workspace: Workspace, results: list[Result]) -> None:
    there = contrast_table(names(workspace), results, "ko").set_index(["scenario", "readout"]).loc["more/../up"]
    back = contrast_table(names(workspace), results, "more/../up").set_index(["scenario", "readout"]).loc["ko"]
    for one, other, sign in (("effect", "effect", -1), ("low", "high", -1), ("p", "p", 1), ("q", "q", 1)):
        np.testing.assert_allclose(there[one], sign * back.loc[there.index, other], atol=1e-9)


def test_a_scenario_against_its_copy_is_zero(results: list[Result]) -> None:
    table = contrast_table(["a", "b"], [results[0], results[0]], "a")
    assert len(table) and (table["effect"].dropna() == 0).all() and (table["p"].dropna() == 1).all()


def test_what_does_not_share_noise_or_is_no_scenario_is_refused(results: list[Result]) -> None:
    with pytest.raises(BadInput, match="The reference is 'c': choose one of 'a', 'b'"):
        contrast_table(["a", "b"], results[:2], "c")
    alone = replace(results[1], recipe=replace(results[1].recipe, seeds=(4, 5, 6)))
    with pytest.raises(BadInput, match="other seeds"):
        contrast_table(["a", "b"], [results[0], alone], "a")


# The comparison to take home


def test_the_command_line_writes_what_the_page_gives(
    workspace: Workspace,
    results: list[Result],
    tiny_folder: Path,
    cells_file: Path,
    tiny_bundle: GE2Hist,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = []
    for i, scenario in enumerate(workspace.scenarios[:2]):
        paths.append(tmp_path / f"recipe{i}.json")
        paths[-1].write_text(scenario.recipe.to_json())
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    said = ["--out", str(tmp_path / "out"), "--bundle", str(tiny_folder), "--cells", str(cells_file)]
    compare.main(parser.parse_args([*map(str, paths), *said, "--reference", "2"]))
    two = Workspace(tuple(Scenario(f"recipe{i}", one.recipe) for i, one in enumerate(workspace.scenarios[:2])))
    with open_h5ad(cells_file, tiny_bundle.scgpt.vocab) as source:
        cells = [cells_for(source, recipe.cell_ids) for recipe in two.on_shared_noise]
    archive = zipfile.ZipFile(io.BytesIO(compare.zip_bytes(two, results[:2], cells, "recipe1")))
    assert {name: archive.read(name) for name in archive.namelist()}.keys() == {
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("[!.]*") if path.is_file()
    }
    for name in ("effects.csv", "contrasts.csv", "README.txt", "workspace.json", "1_recipe0/comparison.csv"):
        assert archive.read(name) == (tmp_path / "out" / name).read_bytes()
    table = pd.read_csv(tmp_path / "out" / "contrasts.csv")
    assert set(table["scenario"]) == {"recipe0"} and set(table["reference"]) == {"recipe1"}
    effects = pd.read_csv(tmp_path / "out" / "effects.csv")
    assert effects["effect"].to_numpy() == pytest.approx(
        effects_table(["a", "b"], results[:2])["effect"].to_numpy(), nan_ok=True
    )
    saved = read_report(tmp_path / "out" / "2_recipe1")
    assert saved.recipe == two.on_shared_noise[1]
    assert "2_recipe1/" in archive.read("README.txt").decode()
    printed = capsys.readouterr().out
    assert str(tmp_path / "out" / "README.txt") in printed
    (sentence,) = two.changed_for_noise
    assert "recipe1 is drawn with " in sentence
    assert sentence in printed.splitlines() and sentence in archive.read("README.txt").decode().splitlines()


@pytest.fixture(scope="module")
def written(
    workspace: Workspace, results: list[Result], demo_cells: Cells, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder, ZIP and page of the three scenarios."""
    folder = tmp_path_factory.mktemp("written")
    files = compare.comparison_files(workspace, results, [demo_cells] * 3, "ko")
    write_files(files, folder / "all")
    (folder / "all.zip").write_bytes(zip_of(files))
    return folder


def test_one_page_holds_the_pictures_both_tables_and_what_the_intervals_cover(
    workspace: Workspace, results: list[Result], written: Path
) -> None:
    page = (written / "all" / "comparison.html").read_text()
    text = " ".join(re.sub(r"<[^>]+>", " ", page[: page.index('<script type="application/json"')]).split())
    effects = effects_table([one.name for one in workspace.scenarios], results)
    contrasts = contrast_table([one.name for one in workspace.scenarios], results, "ko")
    for table in (effects, contrasts):
        row = table[table["readout"] == "density"].iloc[-1]
        assert f"{row['low']:.3g} to {row['high']:.3g}" in text
    for phrase in (
        "more/../up",
        "GAPDH knocked out",
        "Generated: unedited, cell cell-3",
        "Generated: unedited, cell cell-20",
        "Generated: other cells",
        "ko, more/../up:",
        "The interval is over 2 cells and 3 noise seeds as two crossed random factors",
        "The smallest p that 3 seeds can give is 0.25",
        "noise seeds",
        results[0].recipe.hash,
        "Apache-2.0",
        "Scenarios of other cells are paired by their mean over the cells of each seed",
    ):
        assert phrase in text, phrase
    shown = page[: page.index("<details>")]
    assert shown.count("<img ") == 2 + len(results)  # two unedited niches, three edited ones
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', page, re.DOTALL)[1])
    named = [trace["name"] for trace in figures["panels"]["data"] if trace.get("showlegend") is not False]
    assert named == [one.name for one in workspace.scenarios]
    assert (written / "all" / "comparison.pdf").read_bytes().startswith(b"%PDF")
    for name in ("workspace.json", "provenance.json"):
        assert json.loads((written / "all" / name).read_text())["notice"] == "Generated, not diagnostic"
    assert Workspace.from_json((written / "all" / "workspace.json").read_text()) == workspace


@pytest.mark.parametrize("form", ["all", "all.zip", "all/comparison.html"])
def test_scenarios_replay_to_the_same_numbers(written: Path, tiny_folder: Path, cells_file: Path, form, capsys) -> None:
    command = ["replay", str(written / form), "--bundle", str(tiny_folder), "--cells", str(cells_file)]
    assert run_command("perturb", "", COMMANDS, command) == 0
    n = sum(len((written / "all" / f"{name}.csv").read_text().splitlines()) - 1 for name in ("effects", "contrasts"))
    assert f"same: {n} rows" in capsys.readouterr().out


def test_a_changed_contrast_or_reference_is_found(
    written: Path, tiny_folder: Path, cells_file: Path, tmp_path: Path, capsys
) -> None:
    for name in ("workspace.json", "effects.csv", "contrasts.csv"):
        (tmp_path / name).write_bytes((written / "all" / name).read_bytes())
    table = pd.read_csv(tmp_path / "contrasts.csv")
    table.loc[table["scenario"].eq("other cells") & table["readout"].eq("density"), "effect"] += 1e6
    table.to_csv(tmp_path / "contrasts.csv", index=False)
    command = ["replay", str(tmp_path), "--bundle", str(tiny_folder), "--cells", str(cells_file)]
    assert run_command("perturb", "", COMMANDS, command) == 1
    assert "(other cells, ko, density, effect)" in capsys.readouterr().out
    value = json.loads((tmp_path / "workspace.json").read_text()) | {"reference": "nobody"}
    (tmp_path / "workspace.json").write_text(json.dumps(value))
    with pytest.raises(BadInput, match="'nobody' is none of the scenarios"):
        read_report(tmp_path)


def test_a_scenarios_network_comes_with_the_comparison(
    tiny_bundle: GE2Hist, workspace: Workspace, demo_cells: Cells, tmp_path: Path
) -> None:
    network = Network(np.array(["GAPDH"]), np.array(["ACTB"]), np.array([0.8]), "mine")
    plain = workspace.scenarios[0].recipe
    spread = replace(plain, propagation=Propagation(network.sha256, network.name))
    two = Workspace().added("<b>direct</b>", plain).added("spread", spread)
    results = [run(one, tiny_bundle, demo_cells, network=network) for one in two.on_shared_noise]
    files = compare.comparison_files(two, results, [demo_cells, demo_cells], "spread")
    assert "<b>direct" not in files["comparison.html"].decode().split('<script type="application/json"')[0]
    write_files(files, tmp_path)
    for form in (tmp_path, tmp_path / "comparison.html"):
        saved = read_report(form)
        assert [one if one is None else one.sha256 for one in map(saved.network_of, saved.recipes)] == [
            None,
            network.sha256,
        ]
        assert rerun(saved, tiny_bundle, [demo_cells, demo_cells]).same


def test_a_name_cannot_leave_the_folder(workspace: Workspace, results: list[Result], demo_cells: Cells) -> None:
    one = Workspace((replace(workspace.scenarios[1], name="../../up\nREADME"),))
    with pytest.raises(BadInput, match="not those of the scenarios"):
        compare.comparison_files(one, results[1:2], [demo_cells], one.scenarios[0].name)
    files = compare.comparison_files(
        Workspace((replace(one.scenarios[0], recipe=results[1].recipe),)),
        results[1:2],
        [demo_cells.take([3, 9])],
        one.scenarios[0].name,
    )
    assert {name.split("/")[0] for name in files if "/" in name} == {"1_up-README"}
    assert "contrasts.csv" not in files


@pytest.mark.parametrize(
    ("recipes", "more", "message"),
    [
        (["a.json"], [], "1 recipe cannot be compared"),
        (["a.json", "b.json"], ["--reference", "3"], "--reference is 3: give a number from 1 to 2"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(recipes: list[str], more: list[str], message: str) -> None:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    with pytest.raises(BadInput, match=message):
        compare.main(parser.parse_args([*recipes, "--out", "x", *more]))


def test_the_command_line_takes_networks_that_are_given_lie_beside_or_are_the_truth(tmp_path: Path) -> None:
    beside, given, truth = (
        Network(np.array(["A"]), np.array(["B"]), np.array([1.0]), "beside"),
        Network(np.array(["A"]), np.array(["C"]), np.array([1.0]), "given"),
        known_truth(),
    )
    (tmp_path / "network.json").write_text(json.dumps(pack_network(beside)))
    given.table().to_csv(tmp_path / "given.csv", index=False)
    at_hand = compare._networks([str(tmp_path / "given.csv")])
    for network in (beside, given, truth):
        recipe = replace(PLAIN, perturbation=Perturbation.parse("A:ko"), propagation=Propagation(network.sha256, "x"))
        found = compare._network(recipe, at_hand, str(tmp_path / "recipe.json"))
        assert found is not None and found.sha256 == network.sha256
    assert compare._network(PLAIN, at_hand, str(tmp_path / "recipe.json")) is None


def test_networks_for_recipes_that_do_not_spread_are_refused(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(PLAIN.to_json())
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    said = [str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--out", "x", "--network", "net.csv"]
    with pytest.raises(
        BadInput, match="--network is of no use, as the edits of none of the recipes spread: leave it out"
    ):
        compare.main(parser.parse_args(said))


def test_what_shared_noise_changes_is_said_for_each_scenario() -> None:
    first = replace(PLAIN, seeds=(0, 1, 2))
    other = replace(first, seeds=(0, 1, 7), sample=SampleConfig("ddim", 5, 2.0), encoder_seed=3)
    workspace = Workspace((Scenario("a", first), Scenario("b\nB", other), Scenario("c", first)))
    default = first.sample
    assert workspace.changed_for_noise == (
        f"The scenario b B is drawn with seeds 0-2 instead of 0-1,7, sampler {default.solver} with "
        f"{default.steps} steps and guidance 1 instead of ddim with 5 steps and guidance 2, "
        "encoder seed 0 instead of 3, as the first one is.",
    )
    assert Workspace().changed_for_noise == ()
