from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ge2hist_core.simulator.expression import load_genes
from ge2hist_core.types import BadInput
from perturb.grn import Network, read_network
from perturb.networks import keep_network, kept_network, kept_networks, known_truth

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
