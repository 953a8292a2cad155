"""A screen is its recipes drawn one by one; its null and its choice are checked against counting by hand."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ge2hist_core.__main__ import run_command
from ge2hist_core.config import SampleConfig
from ge2hist_core.data import write_cells
from ge2hist_core.sampler import Stopped
from ge2hist_core.types import BadInput, Cells
from perturb.__main__ import COMMANDS
from perturb.cache import DiskCache
from perturb.edits import Perturbation
from perturb.recipe import Recipe
from perturb.run import Progress, run
from perturb.screen import (
    MATCHED,
    Screen,
    _matched_p,
    guess,
    knock_outs,
    load_screen,
    run_screen,
    signature_edits,
)


def make(model, cells: Cells, **changes) -> Screen:
    recipe = Recipe("d" * 64, model.sha256, ("cell-3",), sample=SampleConfig(steps=2), seeds=(0,))
    options = {"keep": 4, "first_seeds": (0, 1), "further_seeds": (2, 3, 4)} | changes
    return Screen(recipe, options.pop("candidates", knock_outs(cells.take([3]))), **options)


@pytest.fixture(scope="module")
def finished(tiny_bundle, demo_cells: Cells, tmp_path_factory: pytest.TempPathFactory):
    cache = DiskCache(tmp_path_factory.mktemp("cache"))
    screen = make(tiny_bundle, demo_cells)
    fractions: list[float] = []
    result = run_screen(
        screen, tiny_bundle, demo_cells, cache, on_progress=lambda progress: fractions.append(progress.fraction)
    )
    assert fractions == sorted(fractions) and fractions[-1] == pytest.approx(1.0)
    return screen, result, cache


def test_candidates_are_the_expressed_genes_alone(demo_cells: Cells) -> None:
    one = demo_cells.take([3])
    names = [candidate.genes[0] for candidate in knock_outs(one)]
    assert names == list(one.genes[one.counts.toarray()[0] > 0])
    silent = one.genes[one.counts.toarray()[0] == 0][0]
    assert [c.genes[0] for c in knock_outs(one, [silent, "GAPDH"])] == ["GAPDH"]
    with pytest.raises(BadInput, match="None of these genes is expressed"):
        knock_outs(one, [silent])
    with pytest.raises(BadInput, match="The data have no gene 'NOPE'"):
        knock_outs(one, ["NOPE"])


def test_a_knock_out_of_a_silent_gene_is_exactly_nothing(tiny_bundle, demo_cells: Cells) -> None:
    one = demo_cells.take([3])
    silent = str(one.genes[one.counts.toarray()[0] == 0][0])
    screen = make(tiny_bundle, demo_cells, candidates=(Perturbation.parse(f"{silent}:ko"),))
    row = guess(screen, tiny_bundle, demo_cells).iloc[0]
    assert row[["shift", "shift_embedding", "shift_z_c", "shift_z_e", "density"]].tolist() == [0.0] * 5


def test_the_guess_is_the_change_of_expected_neighbours(finished, tiny_bundle, demo_cells: Cells) -> None:
    screen, result, _ = finished
    assert sorted(result.guess["candidate"]) == sorted(map(str, screen.candidates))
    assert (np.diff(result.guess["shift"]) <= 0).all()
    name = result.guess["candidate"][0]
    counts = []
    for cells in (demo_cells.take([3]), Perturbation.parse(name).apply(demo_cells.take([3]))):
        counts.append(tiny_bundle.expected_neighbours(tiny_bundle.encode(tiny_bundle.embed(cells, 0)))[0])
    before, after = counts
    row = result.guess.iloc[0]
    assert row["shift"] == pytest.approx(np.linalg.norm(np.sqrt(after) - np.sqrt(before)))
    area = (32 * tiny_bundle.config.um_per_px / 1000) ** 2
    assert row["density"] == pytest.approx((after.sum() - before.sum()) / area)
    place = tiny_bundle.cell_types.index("Fibroblast")
    assert row["fraction:Fibroblast"] == pytest.approx(after[place] / after.sum() - before[place] / before.sum())


def test_the_leading_half_is_confirmed_with_seeds_that_chose_nothing(finished, tiny_bundle, demo_cells: Cells) -> None:
    screen, result, _ = finished
    drawn = list(dict.fromkeys(result.confirmed["candidate"]))
    assert set(drawn) == set(result.guess["candidate"][:4])
    tested = result.confirmed[result.confirmed["p"].notna()]
    assert tested["candidate"].nunique() == 2
    for name in tested["candidate"].unique():
        candidate = next(c for c in screen.candidates if str(c) == name)
        for seeds, column in ((screen.further_seeds, "effect"), (screen.first_seeds, "first_effect")):
            alone = run(screen.edited(candidate, seeds), tiny_bundle, demo_cells).comparison.set_index("readout")
            rows = result.confirmed[result.confirmed["candidate"] == name].set_index("readout")
            for readout in ("density", "spacing"):
                assert rows.at[readout, column] == pytest.approx(alone.at[readout, "effect"], nan_ok=True)
    assert (tested["q"] >= tested["p"] - 1e-12).all() and (tested["n"] <= 3).all()
    agree = np.sign(tested["first_effect"]) == np.sign(tested["effect"])
    assert (tested["replicated"] == agree).all()


def test_the_matched_null_counts_the_nearest_in_level() -> None:
    draws = np.random.default_rng(0)
    score, level = draws.random(80), draws.gamma(1.0, 3.0, 80)
    p = _matched_p(score, level)
    for i in (0, 41, 79):
        others = sorted((j for j in range(80) if j != i), key=lambda j: abs(np.log1p(level[j]) - np.log1p(level[i])))
        b = sum(score[j] >= score[i] for j in others[:MATCHED])
        assert p[i] == pytest.approx((b + 1) / (MATCHED + 1))
    assert np.isnan(_matched_p(score[:MATCHED], level[:MATCHED])).all()


def test_a_cancelled_screen_keeps_its_part_and_goes_on(
    finished, tiny_bundle, demo_cells: Cells, tmp_path: Path
) -> None:
    screen, whole, _ = finished
    cache, cancel = DiskCache(tmp_path), threading.Event()

    def stop_half_way(progress: Progress) -> None:
        if progress.fraction > 0.6:
            cancel.set()

    with pytest.raises(Stopped):
        run_screen(screen, tiny_bundle, demo_cells, cache, on_progress=stop_half_way, cancel=cancel)
    part = load_screen(screen.hash, cache)
    assert part is not None and not part.complete and len(part.guess) == len(whole.guess)
    result = run_screen(screen, tiny_bundle, demo_cells, cache)
    pd.testing.assert_frame_equal(result.confirmed, whole.confirmed)
    stored = load_screen(screen.hash, cache)
    assert stored.complete
    pd.testing.assert_frame_equal(stored.confirmed, whole.confirmed, check_dtype=False)


def test_the_screens_own_edits_are_made_in_every_arm(tiny_bundle, demo_cells: Cells) -> None:
    screen = make(tiny_bundle, demo_cells)
    other = replace(screen, recipe=replace(screen.recipe, perturbation=Perturbation.parse("CD8A:set=9")))
    assert str(other.edited(screen.candidates[0], (0,)).perturbation) == f"CD8A:set=9,{screen.candidates[0]}"
    assert other.hash != screen.hash


def test_signatures_can_be_screened(tiny_bundle, demo_cells: Cells) -> None:
    candidates = signature_edits(list(demo_cells.genes))
    assert len(candidates) > 5 and all("@1(" in str(candidate) for candidate in candidates)
    table = guess(make(tiny_bundle, demo_cells, candidates=candidates), tiny_bundle, demo_cells)
    assert len(table) == len(candidates) and (table["shift"] >= 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": ()}, "The screen has no candidate"),
        ({"candidates": (Perturbation.parse("A:ko"),) * 2}, "has the candidate A:ko twice"),
        ({"keep": 0}, "keep is 0"),
        ({"first_seeds": (0,)}, "first_seeds has 1 seeds: give at least 2"),
        ({"further_seeds": (1, 2)}, "share a seed"),
        ({"readout": "colour"}, "readout is 'colour': choose shift"),
        ({"readout": "spacing"}, "cannot be guessed without drawing"),
    ],
)
def test_what_cannot_be_screened_is_refused(tiny_bundle, demo_cells: Cells, changes: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make(tiny_bundle, demo_cells, **changes)


@pytest.fixture
def files(tiny_folder: Path, demo_cells: Cells, tmp_path: Path) -> list[str]:
    write_cells(demo_cells, tmp_path / "cells.h5ad")
    command = ["screen", "--cell", "cell-3", "--bundle", str(tiny_folder), "--cells", str(tmp_path / "cells.h5ad")]
    return [*command, "--genes", "GAPDH,ACTB,CD8A,KRT8,EPCAM,STAT1", "--keep", "2"]


def test_the_command_writes_both_tables(files: list[str], tmp_path: Path, capsys) -> None:
    assert run_command("perturb", "", COMMANDS, [*files, "--out", str(tmp_path / "out")]) == 0
    table = pd.read_csv(tmp_path / "out" / "confirmed.csv")
    assert table["candidate"].nunique() == 2 and table["p"].notna().any()
    assert "candidates; 2 of them drawn" in capsys.readouterr().out
    assert (
        run_command("perturb", "", COMMANDS, [*files, "--out", str(tmp_path), "--scheduler", "tcp://127.0.0.1:9"]) == 2
    )
    assert "does not answer" in capsys.readouterr().err


@pytest.mark.slow
def test_a_cluster_gives_the_numbers_of_one_process_although_a_worker_is_killed(
    files: list[str], tmp_path: Path
) -> None:
    from distributed import LocalCluster

    assert run_command("perturb", "", COMMANDS, [*files, "--out", str(tmp_path / "one")]) == 0
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        victim = next(iter(cluster.workers.values()))
        timer = threading.Timer(4.0, lambda: victim.process.process.kill())
        timer.start()
        command = [*files, "--out", str(tmp_path / "two"), "--scheduler", cluster.scheduler_address]
        assert run_command("perturb", "", COMMANDS, command) == 0
        timer.cancel()
    for name in ("guess.csv", "confirmed.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
