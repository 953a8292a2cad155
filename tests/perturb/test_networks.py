from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from ge2hist_core.simulator.expression import load_genes
from ge2hist_core.types import BadInput
from perturb.edits import Perturbation
from perturb.grn import Network, Propagation, pack_network, read_network
from perturb.networks import keep_network, kept_network, kept_networks, known_truth, network_for
from perturb.page import csv_bytes
from perturb.recipe import Recipe

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "perturb", "network", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_known_truth_has_the_simulators_slopes() -> None:
    """The log mean of a reporter by finite difference of the tissue's own formula at a typical level."""
    from ge2hist_core.simulator.tissue import PROGRAMME_SCALE

    table, network = load_genes(), known_truth()
    weight = {(a, b): w for a, b, w in zip(network.regulators, network.targets, network.weights, strict=True)}
    assert len(weight) == 6 * 4 * 11
    for (driver, reporter), value in weight.items():
        programme, strength = table.programme_of(driver)
        other, log_fold = table.programme_of(reporter)
        assert programme == other
        step = 1e-4
        change = PROGRAMME_SCALE * strength * (np.tanh(step / 2) - np.tanh(-step / 2)) * log_fold
        assert value == pytest.approx(change / (2 * step), rel=1e-6)


def test_a_kept_network_is_found_by_digits_and_the_known_truth_always(tmp_path: Path) -> None:
    network = Network(np.array(["A", "B"]), np.array(["B", "C"]), np.array([1.0, -0.5]), "mine", "a table", 500.0)
    keep_network(network, tmp_path)
    found = kept_network(network.sha256[:12], tmp_path)
    assert found.sha256 == network.sha256 and (found.name, found.source, found.scale) == ("mine", "a table", 500.0)
    assert kept_network(known_truth().sha256[:12], tmp_path / "nothing").sha256 == known_truth().sha256
    assert [one.sha256 for one in kept_networks(tmp_path)] == [known_truth().sha256, network.sha256]


def test_a_network_that_is_not_there_or_damaged_is_refused(tmp_path: Path) -> None:
    for digits in ("0" * 12, "../secret", ""):
        with pytest.raises(BadInput, match="is not here: open its table again"):
            kept_network(digits, tmp_path)
    (tmp_path / f"{'a' * 64}.json").write_text('{"edges": 3}')
    with pytest.raises(BadInput, match="stored network is damaged|cannot be read"):
        kept_network("a" * 12, tmp_path)
    assert len(kept_networks(tmp_path)) == 1


def test_the_command_writes_shows_and_fits(tmp_path: Path) -> None:
    out = tmp_path / "truth.csv"
    done = run("known-truth", "--out", str(out))
    assert done.returncode == 0 and "264 edges" in done.stdout, done.stderr
    assert read_network(out).sha256 == known_truth().sha256
    shown = run("show", str(out))
    assert known_truth().sha256 in shown.stdout
    bad = run("fit", "--regulators", "NOSUCHGENE", "--out", str(tmp_path / "x.csv"))
    assert bad.returncode == 2 and "None of the 1 candidate regulators" in bad.stderr
    assert "Traceback" not in bad.stderr and not (tmp_path / "x.csv").exists()


def test_a_fitted_networks_table_reads_back_with_its_scale(tmp_path: Path) -> None:
    network = Network(np.array(["A", "B"]), np.array(["B", "C"]), np.array([0.25, -0.5]), scale=812.0)
    (tmp_path / "net.csv").write_text(network.table().to_csv(index=False))
    assert read_network(tmp_path / "net.csv").sha256 == network.sha256
    (tmp_path / "net.json").write_text(json.dumps(pack_network(network)))
    assert read_network(tmp_path / "net.json").sha256 == network.sha256
    (tmp_path / "two.csv").write_text("source,target,weight,scale\nA,B,1,10\nB,C,1,20\n")
    with pytest.raises(BadInput, match="Column 'scale' of two.csv must hold one positive number"):
        read_network(tmp_path / "two.csv")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(BadInput, match="bad.json is no table and is not valid JSON"):
        read_network(tmp_path / "bad.json")


def test_names_that_look_like_formulas_are_tamed_in_the_table_and_read_back(tmp_path: Path) -> None:
    names = ["=cmd|' /C calc'!A0", "+A", "-B", "@C", "\uff1dD", "E=1", "'F", '=G,"H"', "NA"]
    network = Network(np.array(names), np.array(names[1:] + names[:1]), np.full(len(names), 0.5), scale=77.0)
    (tmp_path / "net.json").write_text(json.dumps(pack_network(network)))
    (tmp_path / "net.csv").write_bytes(csv_bytes(network.table()))
    table = pd.read_csv(tmp_path / "net.csv", dtype=str, keep_default_na=False)
    assert not table["source"].str.match(r"[=+\-@\uff1d]").any() and "'=cmd" in (tmp_path / "net.csv").read_text()
    assert read_network(tmp_path / "net.csv").sha256 == read_network(tmp_path / "net.json").sha256 == network.sha256


def test_the_command_fits_a_network_whose_table_no_spreadsheet_runs(tmp_path: Path) -> None:
    """Genes of the cells that look like formulas."""
    draws = np.random.default_rng(0)
    driver = draws.poisson(5, 300)
    counts = np.stack([driver, draws.poisson(1 + 2 * driver), draws.poisson(20, 300)], axis=1).astype(np.float32)
    genes = pd.DataFrame(index=["=1+1", "@SUM(A1)", "ACTB"])
    cells = ad.AnnData(counts, pd.DataFrame(index=[f"c{i}" for i in range(300)]), genes)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    out = tmp_path / "net.csv"
    done = run("fit", "--regulators", "=1+1", "--cells", str(tmp_path / "cells.h5ad"), "--out", str(out))
    assert done.returncode == 0, done.stderr
    network = read_network(out)
    assert ("=1+1", "@SUM(A1)") in set(zip(network.regulators, network.targets, strict=True))
    assert f"SHA-256 {network.sha256}" in done.stdout
    assert out.read_text().splitlines()[1].startswith("'=1+1,'@SUM(A1),")


def test_a_kept_network_keeps_its_first_name(tmp_path: Path) -> None:
    network = Network(np.array(["A"]), np.array(["B"]), np.array([1.0]), "hers")
    keep_network(network, tmp_path)
    keep_network(replace(network, name="his"), tmp_path)
    assert kept_network(network.sha256[:12], tmp_path).name == "hers"


def test_the_command_line_takes_the_network_that_lies_beside_the_recipe(tmp_path: Path) -> None:
    network = Network(np.array(["A"]), np.array(["B"]), np.array([1.0]), "beside")
    plain = Recipe("d" * 64, "e" * 64, ("c",), Perturbation.parse("A:ko"))
    recipe = replace(plain, propagation=Propagation(network.sha256, "beside"))
    assert network_for(plain, None, tmp_path / "recipe.json") is None
    assert network_for(recipe, None, tmp_path / "recipe.json") is None
    (tmp_path / "network.json").write_text(json.dumps(pack_network(network)))
    assert network_for(recipe, None, tmp_path / "recipe.json").sha256 == network.sha256


def test_a_network_for_a_recipe_whose_edits_do_not_spread_is_refused(tmp_path: Path) -> None:
    plain = Recipe("d" * 64, "e" * 64, ("c",), Perturbation.parse("A:ko"))
    with pytest.raises(
        BadInput, match="--network mine.csv is of no use, as the recipe's edits do not spread: leave it"
    ):
        network_for(plain, "mine.csv", tmp_path / "recipe.json")
