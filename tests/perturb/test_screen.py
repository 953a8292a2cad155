"""A screen is its recipes drawn one by one; its ranks and its choice are checked against counting by hand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ge2hist_core.__main__ import run_command
from ge2hist_core.config import SampleConfig
from ge2hist_core.data import open_h5ad, write_cells
from ge2hist_core.files import sha256_file
from ge2hist_core.sampler import Stopped
from ge2hist_core.types import BadInput, Cells
from perturb.__main__ import COMMANDS
from perturb.cache import DiskCache
from perturb.edits import Perturbation
from perturb.matched import matched_edits
from perturb.recipe import Recipe
from perturb.run import Progress, cells_like, first_of_type, run
from perturb.screen import (
    READOUTS,
    STAND_INS,
    Screen,
    _effects,
    _matched_p,
    draw_one,
    guess,
    image_shift,
    knock_outs,
    load_screen,
    on_cluster,
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
    agree = np.sign(tested["first_effect"]) * np.sign(tested["effect"]) > 0
    assert (tested["replicated"] == agree).all()


def test_the_rank_counts_all_others_once_the_trend_with_expression_is_out() -> None:
    draws = np.random.default_rng(0)
    level = np.repeat([1.0, 2.0, 8.0], [60, 50, 40])
    noise = 0.15 * draws.random(150)
    score = np.log1p(level) ** 3 * np.exp(noise)
    score[3] *= 1.5
    assert (score[110:] > score[3]).all()  # by itself the outlier is smaller than every candidate of high expression
    p = _matched_p(score, level)
    assert p[3] == pytest.approx(1 / 150) and sorted(p) == pytest.approx(np.arange(1, 151) / 150)
    beyond = np.log(score)
    for value in (1.0, 2.0, 8.0):
        beyond[level == value] -= np.median(beyond[level == value])
    for i in (0, 70, 149):
        assert p[i] == pytest.approx((sum(beyond[j] >= beyond[i] - 1e-9 for j in range(150) if j != i) + 1) / 150)
    assert _matched_p(7.0 * score, level) == pytest.approx(p)
    score[5] = 0.0
    assert _matched_p(score, level)[5] == 1.0


def test_few_candidates_are_compared_with_random_edits_of_like_genes(tiny_bundle, demo_cells: Cells) -> None:
    base = Screen(make(tiny_bundle, demo_cells).recipe, knock_outs(demo_cells.take([3]))[:2])
    assert base.guesses == 2 * (1 + STAND_INS)
    table = guess(base, tiny_bundle, demo_cells).set_index("candidate")
    chosen = demo_cells.take([list(demo_cells.cell_id).index(base.recipe.cell_ids[0])])
    for candidate in base.candidates:
        copies, _ = matched_edits(
            candidate, chosen, demo_cells, STAND_INS, tiny_bundle.scgpt.vocab, base.recipe.encoder_seed
        )
        assert not set(candidate.genes) & {gene for copy in copies for gene in copy.genes}
        both = replace(base, candidates=(candidate, *copies))
        shift = guess(both, tiny_bundle, demo_cells).set_index("candidate")["shift"]
        own = table.at[str(candidate), "shift"]
        farther = sum(shift[str(copy)] >= own for copy in copies)
        assert table.at[str(candidate), "p_matched"] == pytest.approx((farther + 1) / (len(copies) + 1))


def test_one_row_alone_can_be_a_hit_in_the_default_design(tiny_bundle, demo_cells: Cells) -> None:
    screen = Screen(make(tiny_bundle, demo_cells).recipe, knock_outs(demo_cells.take([3]))[:40])
    assert screen.pictures == 20 * 4 + 10 * 12 + 16 and screen.tested == 10
    assert screen.smallest_q() == pytest.approx(10 * len(READOUTS) * 2 / 2**12) and screen.smallest_q() < 0.05
    assert "one row alone among 100 tested can reach q = 0.049" in screen.reach()
    eleven = replace(screen, further_seeds=tuple(range(4, 15)))
    assert eleven.smallest_q() > 0.05 and "2 of them have to reach that p together" in eleven.reach()
    assert "no q can be below 0.05" in replace(screen, further_seeds=(4, 5, 6)).reach()
    few = replace(screen.recipe, cell_ids=("cell-3", "cell-4"))
    said = replace(screen, recipe=few).reach()
    assert said.startswith("With 2 cells and 12 seeds only a very clear effect") and said.endswith("take more cells.")


@pytest.mark.parametrize(("shown", "tested"), [(5, False), (6, True)])
def test_a_rare_type_has_an_effect_but_no_test_whichever_arm_shows_it(shown: int, tested: bool) -> None:
    values = np.where(np.arange(12) < shown, 0.1, 0.0)
    for rare in ("base", "edited"):
        rows = [
            (arm, "c", seed, readout, "u", values[seed] if readout == READOUTS[-1] and arm == rare else float(seed))
            for readout in READOUTS
            for arm in ("base", "edited")
            for seed in range(12)
            if readout != READOUTS[-1] or arm == rare
        ]
        other = "edited" if rare == "base" else "base"
        rows += [(other, "c", seed, READOUTS[-1], "u", 0.0) for seed in range(12)]
        table = _effects(
            pd.DataFrame(rows, columns=["arm", "cell_id", "seed", "readout", "unit", "value"]).assign(step=0.0), 0
        )
        found = table.set_index("readout").loc[READOUTS[-1]]
        assert abs(found["effect"]) == pytest.approx(shown / 120) and np.isfinite(found["p"]) == tested


def test_the_image_shift_is_the_mean_absolute_difference_of_optical_density(
    finished, tiny_bundle, demo_cells: Cells
) -> None:
    light = np.full((1, 4, 4, 3), 200, np.uint8)
    assert image_shift(light, light).tolist() == [0.0]
    assert image_shift(light, light // 2) == pytest.approx(np.log10(2))
    screen, result, _ = finished
    for name in result.confirmed["candidate"].unique():
        candidate = next(c for c in screen.candidates if str(c) == name)
        alone = run(screen.edited(candidate, screen.first_seeds), tiny_bundle, demo_cells)
        density = [
            -np.log10(np.maximum(arm.images, 1) / 255.0).mean(axis=3) for arm in (alone.base_arm, alone.edited_arm)
        ]
        rows = result.confirmed[result.confirmed["candidate"] == name]
        assert rows["shift_image"].to_numpy() == pytest.approx(np.abs(density[1] - density[0]).mean())
        guessed = result.guess.set_index("candidate").at[name, "shift_embedding"]
        assert (rows["shift_embedding"] == guessed).all()


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
        ({"first_seeds": (0, 0, 1)}, "first_seeds cannot be drawn: seeds names 0 twice"),
        ({"further_seeds": (2, 2**63)}, "further_seeds cannot be drawn: A seed is"),
        ({"further_seeds": tuple(range(2, 5000))}, "further_seeds cannot be drawn: .* more than 4096 pictures"),
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
    command += ["--seeds-first", "0,1", "--seeds-further", "2-5", "--steps", "4"]
    return [*command, "--genes", "GAPDH,ACTB,CD8A,KRT8,EPCAM,STAT1", "--keep", "2"]


def test_the_command_writes_both_tables(files: list[str], tmp_path: Path, capsys) -> None:
    assert run_command("perturb", "", COMMANDS, [*files, "--out", str(tmp_path / "out")]) == 0
    table = pd.read_csv(tmp_path / "out" / "confirmed.csv")
    assert table["candidate"].nunique() == 2 and table["p"].notna().any()
    said = capsys.readouterr().out
    assert "candidates; 2 of them drawn" in said and "With 4 seeds no p is below 0.12" in said
    assert "None of the 1 tested candidates could be shown to move a readout" in said
    assert (
        run_command(
            "perturb", "", COMMANDS, [*files, "--out", str(tmp_path / "new"), "--scheduler", "tcp://127.0.0.1:9"]
        )
        == 2
    )
    assert "does not answer" in capsys.readouterr().err


def test_the_command_screens_the_signatures_of_a_file_with_the_given_sampler(
    files: list[str], tmp_path: Path, capsys
) -> None:
    (tmp_path / "mine.gmt").write_text("A_UP\tx\tGAPDH\nA_DN\tx\tACTB\nB_UP\tx\tKRT8\nB_DN\tx\tNOSUCHGENE\n")
    command = [*files[: files.index("--genes")], "--signature-file", str(tmp_path / "mine.gmt"), "--dose", "2"]
    command += ["--solver", "ddim", "--guidance", "1.5", "--encoder-seed", "3", "--gene-column", "index"]
    assert run_command("perturb", "", COMMANDS, [*command, "--matrix", "X", "--out", str(tmp_path / "out")]) == 0
    screen = Screen.from_dict(json.loads((tmp_path / "out" / "screen.json").read_text()))
    assert [str(one) for one in screen.candidates] == ["A@2(GAPDH:x4;ACTB:x0.25)", "B@2(KRT8:x4)"]
    recipe = screen.recipe
    assert recipe.sample == SampleConfig("ddim", 4, 1.5) and (screen.first_seeds, screen.further_seeds[-1]) == (
        (0, 1),
        5,
    )
    assert (recipe.encoder_seed, recipe.matrix, recipe.gene_column) == (3, "X", "index")
    capsys.readouterr()
    assert run_command("perturb", "", COMMANDS, [*command, "--matrix", "none", "--out", str(tmp_path)]) == 2
    assert "none" in capsys.readouterr().err


def test_a_worker_draws_the_unedited_arm_once_and_refuses_another_file(
    files: list[str], tiny_folder: Path, tiny_bundle, demo_cells: Cells, tmp_path: Path
) -> None:
    path = tmp_path / "cells.h5ad"
    recipe = replace(make(tiny_bundle, demo_cells).recipe, data_sha256=sha256_file(path), seeds=(0, 1))
    edits = [replace(recipe, perturbation=Perturbation.parse(f"{gene}:ko")) for gene in ("GAPDH", "ACTB")]
    drawn = [draw_one(one.to_json(), str(tiny_folder), str(path), str(tmp_path / "kept")) for one in edits]
    assert len(list((tmp_path / "kept").rglob("*.npz"))) == 3  # two edited arms, one unedited
    for one, table in zip(edits, drawn, strict=True):
        alone = run(one, tiny_bundle, demo_cells).readouts
        assert table[table["readout"] != "shift_image"]["value"].tolist() == pytest.approx(
            alone["value"].tolist(), nan_ok=True
        )
    write_cells(demo_cells.take(np.arange(len(demo_cells) - 1)), path)  # another file at the same path
    with pytest.raises(BadInput, match=r"The recipe was made with data .* give all of them the same file"):
        draw_one(edits[0].to_json(), str(tiny_folder), str(path))
    with pytest.raises(BadInput, match="A worker cannot read"):
        draw_one(edits[0].to_json(), str(tiny_folder), str(tmp_path / "absent.h5ad"))


def test_readouts_that_arrived_are_not_drawn_again(
    files: list[str], tiny_folder: Path, tiny_bundle, demo_cells: Cells, tmp_path: Path
) -> None:
    from distributed import Client, LocalCluster

    path, cache = tmp_path / "cells.h5ad", DiskCache(tmp_path / "driver")
    recipe = replace(make(tiny_bundle, demo_cells).recipe, data_sha256=sha256_file(path), seeds=(0, 1))
    edits = [replace(recipe, perturbation=Perturbation.parse(f"{gene}:ko")) for gene in ("GAPDH", "ACTB", "KRT8")]
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        part = list(on_cluster(client, str(tiny_folder), str(path), cache)(edits[:2]))
        assert len(list((tmp_path / "driver").rglob("*.json"))) == 2
        seen: list[Progress] = []
        whole = list(on_cluster(client, str(tiny_folder), str(path), cache, on_progress=seen.append)(edits))
        assert [one.fraction for one in seen] == pytest.approx([0.4, 0.7, 1.0])
        assert [one.text for one in seen] == [f"Drawn {one.perturbation}" for one in edits]
        halves: list[float] = []
        draw = on_cluster(
            client, str(tiny_folder), str(path), cache, pictures=6, on_progress=lambda one: halves.append(one.fraction)
        )
        assert [len(list(draw(some))) for some in (edits[:1], edits[1:])] == [1, 2]
        assert halves == pytest.approx([0.4, 0.7, 1.0])  # it goes on from one call to the next
    for before, after in zip(part, whole[:2], strict=True):
        pd.testing.assert_frame_equal(before, after)
    # The cluster is gone: what comes now was kept.
    again = list(on_cluster(client, str(tiny_folder), str(path), cache)(edits))
    for before, after in zip(whole, again, strict=True):
        pd.testing.assert_frame_equal(before, after)


def test_the_command_screens_cells_of_a_type_and_says_how_a_file_is_read(
    files: list[str], demo_cells: Cells, tmp_path: Path
) -> None:
    (tmp_path / "mine.csv").write_text("gene,logFC,contrast\nGAPDH,3,A\nACTB,-0.5,A\nKRT8,2,B\nCD8A,0,B\n")
    place = files.index("--cell")
    command = [*files[:place], *files[place + 2 : files.index("--genes")], "--type", "Fibroblast", "--n-cells", "2"]
    command += ["--signature-file", str(tmp_path / "mine.csv"), "--direction-only", "--top", "1"]
    assert run_command("perturb", "", COMMANDS, [*command, "--out", str(tmp_path / "out")]) == 0
    screen = Screen.from_dict(json.loads((tmp_path / "out" / "screen.json").read_text()))
    assert [str(one) for one in screen.candidates] == ["A@1(GAPDH:x2)", "B@1(KRT8:x2)"]
    with open_h5ad(tmp_path / "cells.h5ad") as source:
        assert screen.recipe.cell_ids == cells_like(source, first_of_type(source, "Fibroblast"), 2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seeds-first", "0,0,1"], "first_seeds cannot be drawn: seeds names 0 twice"),
        (["--workers", "0"], "--workers is 0: give at least 1 process"),
        (["--dose", "2"], "--dose is that of signatures"),
        (["--direction-only"], "--direction-only says how a signature file is read"),
    ],
)
def test_options_that_cannot_be_used_are_refused_before_the_ranking(
    files: list[str], tmp_path: Path, capsys, more: list[str], message: str
) -> None:
    assert run_command("perturb", "", COMMANDS, [*files, "--out", str(tmp_path / "out"), *more]) == 2
    said = capsys.readouterr().err
    assert message in said and "Ranking" not in said and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_cluster_gives_the_numbers_of_one_process_although_a_worker_is_killed(
    files: list[str], tmp_path: Path
) -> None:
    from distributed import Client, LocalCluster

    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert run_command("perturb", "", COMMANDS, [*files, "--out", str(tmp_path / "one")]) == 0
        with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
            victim = next(iter(cluster.workers.values()))
            timer = threading.Timer(4.0, os.kill, (victim.pid, signal.SIGKILL))
            timer.start()
            command = [*files, "--out", str(tmp_path / "two"), "--scheduler", cluster.scheduler_address]
            assert run_command("perturb", "", COMMANDS, command) == 0
            timer.join()
            assert victim.pid != timer.args[0]  # killed, and started again
        with (
            LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster,
            Client(cluster) as client,
        ):
            address = cluster.scheduler_address
            assert client.submit(torch.get_num_threads, pure=False).result() != before + 1
            command = [*files, "--out", str(tmp_path / "three"), "--scheduler", address]
            assert run_command("perturb", "", COMMANDS, command) == 0
            assert client.submit(torch.get_num_threads, pure=False).result() == before + 1
    finally:
        torch.set_num_threads(before)
    for name in ("guess.csv", "confirmed.csv"):
        for other in ("two", "three"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / other / name).read_bytes()


@pytest.mark.slow
def test_workers_of_this_machine_give_the_numbers_of_one_process_and_report_each_recipe(
    files: list[str], tmp_path: Path, capsys
) -> None:
    assert run_command("perturb", "", COMMANDS, [*files, "--out", str(tmp_path / "one")]) == 0
    capsys.readouterr()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "perturb",
            *files,
            "--out",
            str(tmp_path / "two"),
            "--workers",
            "2",
            "--cache",
            str(tmp_path / "kept"),
        ],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    drawn = [line for line in done.stderr.splitlines() if "Drawn" in line]
    assert len(list((tmp_path / "kept").rglob("*.npz"))) == 5  # the unedited arms for both sets of seeds among them
    assert len(drawn) == 3 and drawn[-1].startswith("100 %")  # two by the first seeds, the better one by the further
    for name in ("guess.csv", "confirmed.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
