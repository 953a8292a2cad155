"""A goal search against every set tried by hand, and its drawing against ordinary runs."""

from __future__ import annotations

import itertools
import json
import math
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ge2hist_core.__main__ import run_command
from ge2hist_core.config import VISIBLE_CLASS, SampleConfig
from ge2hist_core.data import open_h5ad, write_cells
from ge2hist_core.sampler import Stopped
from ge2hist_core.support import OUTSIDE, Support
from ge2hist_core.types import BadInput, Cells
from perturb.__main__ import COMMANDS
from perturb.cache import DiskCache
from perturb.edits import Edit, Perturbation
from perturb.goal import (
    TOWARDS,
    Goal,
    NicheTarget,
    ReadoutTarget,
    _confirmed,
    load_goal,
    niche_target,
    pareto,
    random_sets,
    run_goal,
    search,
    sentences,
)
from perturb.recipe import Recipe
from perturb.run import Progress, run
from perturb.screen import FIRST_SEEDS, FURTHER_SEEDS, READOUTS, Screen

CELL = "cell-3"
CANDIDATES = Perturbation.parse("GAPDH:ko,CD3E:ko,MKI67:ko,MKI67:x4,JCHAIN:set=9,KRT8:set=9,HIF1A:ko").edits
WISH = 4000.0
"""More cells/mm2 than any single candidate brings."""


def make(model, **changes) -> Goal:
    recipe = Recipe("d" * 64, model.sha256, (CELL,), sample=SampleConfig(steps=2), seeds=(0,))
    options = {
        "recipe": recipe,
        "target": ReadoutTarget("density", change=WISH),
        "candidates": CANDIDATES,
        "keep": 2,
        "first_seeds": (0, 1),
        "further_seeds": (2, 3, 4),
        "random": 9,
        "controls": 2,
    }
    return Goal(**(options | changes))


def neighbours(model, cells: Cells, edits: str) -> tuple[np.ndarray, float]:
    """Expected neighbours by visible class, and support, of the one cell: written again, apart from the search."""
    edited = Perturbation.parse(edits).apply(cells.take([cells.cell_id.tolist().index(CELL)]), cells)
    embedding = model.embed(edited, 0)
    counts: dict[str, float] = {}
    for name, n in zip(model.cell_types, model.expected_neighbours(model.encode(embedding))[0], strict=True):
        counts[VISIBLE_CLASS[name]] = counts.get(VISIBLE_CLASS[name], 0.0) + n
    return np.array(list(counts.values())), float(model.support.p(embedding)[0])


@pytest.fixture(scope="module")
def strict(tiny_bundle, demo_cells: Cells):
    """The model with so narrow a support that edits leave it: p below 0.05 for the start and most sets."""
    support = tiny_bundle.support
    far = support.distance(tiny_bundle.embed(demo_cells.take([3]), 0))[0]
    return replace(tiny_bundle, support=Support(support.reference, support.cell_id, np.linspace(0, 1.03 * far, 200)))


def all_of(goal: Goal, model, cells: Cells) -> pd.DataFrame:
    *_, table = search(goal, model, cells)
    return table


@pytest.fixture(scope="module")
def finished(tiny_bundle, demo_cells: Cells, tmp_path_factory: pytest.TempPathFactory):
    cache, goal = DiskCache(tmp_path_factory.mktemp("cache")), make(tiny_bundle)
    fractions: list[float] = []
    result = run_goal(
        goal, tiny_bundle, demo_cells, cache, on_progress=lambda progress: fractions.append(progress.fraction)
    )
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    return goal, result, cache


# --- the search -----------------------------------------------------------------------------------------------------


def test_a_wide_search_tries_every_set_of_different_genes_once(tiny_bundle, demo_cells: Cells) -> None:
    goal = make(tiny_bundle, shortlist=99, beam=99, candidates=CANDIDATES[:3] + CANDIDATES[4:])
    sets = [edits for n in range(4) for edits in itertools.combinations(goal.candidates, n)]
    table = all_of(goal, tiny_bundle, demo_cells)
    assert sorted(table["edits"]) == sorted(str(Perturbation(edits)) for edits in sets)
    assert [len(part) for part in search(goal, tiny_bundle, demo_cells)] == [7, 22, 42]


def test_a_set_never_edits_a_gene_twice_and_the_search_repeats_itself(tiny_bundle, demo_cells: Cells) -> None:
    goal = make(tiny_bundle, beam=3, shortlist=4)
    table = all_of(goal, tiny_bundle, demo_cells)
    for text, size in zip(table["edits"], table["size"], strict=True):
        assert len(set(Perturbation.parse(text).genes)) == len(Perturbation.parse(text).edits) == size
    assert table["size"].max() == 3 and not table["edits"].duplicated().any()
    pd.testing.assert_frame_equal(table, all_of(goal, tiny_bundle, demo_cells))
    assert len(table) <= goal.guesses


def test_a_longer_set_extends_one_of_the_best_shorter_ones(tiny_bundle, demo_cells: Cells) -> None:
    goal = make(tiny_bundle, beam=2, shortlist=3)
    table = all_of(goal, tiny_bundle, demo_cells)
    parts = {text: frozenset(text.split(",")) for text in table["edits"]}
    for size in (2, 3):
        shorter = table[table["size"] == size - 1].sort_values("objective", kind="stable")["edits"][:2]
        for text in table.loc[table["size"] == size, "edits"]:
            assert any(parts[one] < parts[text] for one in shorter)


@pytest.mark.parametrize("penalty", [0.0, 2.5])
def test_distance_and_objective_are_those_of_the_expected_density(strict, demo_cells: Cells, penalty: float) -> None:
    goal = make(strict, penalty=penalty)
    table = all_of(goal, strict, demo_cells).set_index("edits")
    area = (32 * strict.config.um_per_px / 1000) ** 2
    start = (neighbours(strict, demo_cells, "")[0].sum() + 1) / area
    assert 0 < table["outside"].sum() < len(table) and table["support"].nunique() > 5
    for edits in ("", "MKI67:x4", table.index[-1]):
        counts, p = neighbours(strict, demo_cells, edits)
        density = (counts.sum() + 1) / area
        row = table.loc[edits]
        assert row["density"] == pytest.approx(density) and row["towards"] == pytest.approx(density - start, abs=1e-6)
        assert row["distance"] == pytest.approx(abs(density - start - WISH))
        assert row["closed"] == pytest.approx(1 - abs(density - start - WISH) / WISH)
        assert row["support"] == pytest.approx(p) and row["outside"] == (p < OUTSIDE)
        assert row["objective"] == pytest.approx(1 - row["closed"] + penalty * max(0.0, 1 - p / OUTSIDE))


def test_a_fraction_is_aimed_at_by_value(tiny_bundle, demo_cells: Cells) -> None:
    goal = make(tiny_bundle, target=ReadoutTarget("fraction:Fibroblast", value=0.5), max_edits=1)
    table = all_of(goal, tiny_bundle, demo_cells)
    place = list(dict.fromkeys(VISIBLE_CLASS.values())).index("Fibroblast")
    for row in table.itertuples(index=False):
        counts = neighbours(tiny_bundle, demo_cells, row.edits)[0]
        assert row.distance == pytest.approx(abs(counts[place] / counts.sum() - 0.5))


def planted(model, cells: Cells, edits: str, **more) -> NicheTarget:
    counts = neighbours(model, cells, edits)[0]
    return NicheTarget("planted", tuple(dict.fromkeys(VISIBLE_CLASS.values())), tuple(counts), **more)


def test_the_edits_that_made_a_niche_are_found_again(tiny_bundle, demo_cells: Cells) -> None:
    hidden = "GAPDH:ko,MKI67:x4,HIF1A:ko"
    target = planted(tiny_bundle, demo_cells, hidden, real=(1.0,) * 8)
    table = all_of(make(tiny_bundle, target=target, beam=99, penalty=0.0), tiny_bundle, demo_cells)
    best = table.loc[table["distance"].idxmin()]
    assert best["edits"] == hidden
    assert best["distance"] == pytest.approx(0.0, abs=1e-6) and best["closed"] == pytest.approx(1.0)
    roots = [np.sqrt(neighbours(tiny_bundle, demo_cells, text)[0]) for text in ("", "MKI67:x4", hidden)]
    row = table.set_index("edits").loc["MKI67:x4"]
    assert row["distance"] == pytest.approx(np.linalg.norm(roots[1] - roots[2]))
    assert row["distance_real"] == pytest.approx(np.linalg.norm(roots[1] - 1.0))
    way = (roots[2] - roots[0]) / np.linalg.norm(roots[2] - roots[0])
    assert row["towards"] == pytest.approx((roots[1] - roots[0]) @ way)


def test_a_penalty_buys_support(strict, demo_cells: Cells) -> None:
    best = {}
    for penalty in (0.0, 50.0):
        fewer = ReadoutTarget("density", change=-WISH)
        table = all_of(make(strict, target=fewer, penalty=penalty, beam=99, shortlist=99), strict, demo_cells)
        best[penalty] = table.loc[table["objective"].idxmin()]
    assert best[50.0]["support"] > best[0.0]["support"] and best[50.0]["distance"] > best[0.0]["distance"]


def test_the_trade_off_holds_the_sets_that_no_other_beats() -> None:
    draws = np.random.default_rng(0)
    n = 150
    table = pd.DataFrame(
        {
            "edits": [f"G{i}:ko" for i in range(n)],
            "size": draws.integers(1, 4, n),
            "support": (support := draws.integers(1, 13, n)) / 12,
            "distance": (support + draws.integers(1, 6, n)) / 10,
        }
    )
    table.loc[0] = ["", 0, 0.5, 1.5]

    def beats(a, b) -> bool:
        no_worse = a.size <= b.size and a.support >= b.support and a.distance <= b.distance
        return no_worse and (a.size, a.support, a.distance) != (b.size, b.support, b.distance)

    rows = [row for row in table.itertuples() if row.size == 0 or row.distance < 1.5]
    kept = [row for row in rows if not any(beats(other, row) for other in rows)]
    wanted: dict[tuple, str] = {}
    for row in kept:
        wanted.setdefault((row.size, row.support, row.distance), row.edits)
    front = pareto(table)
    assert sorted(front["edits"]) == sorted(wanted.values()) and front["edits"].iloc[0] == ""
    assert len(front) > 8 and front["size"].is_monotonic_increasing
    blind = pareto(table.assign(support=math.nan))
    assert blind["size"].is_unique and blind["distance"].is_monotonic_decreasing


# --- the drawing ----------------------------------------------------------------------------------------------------


def test_what_is_drawn_is_ordinary_runs_over_seeds_that_chose_nothing(finished, tiny_bundle, demo_cells: Cells) -> None:
    goal, result, _ = finished
    assert result.complete and result.searched + 1 == len(all_of(goal, tiny_bundle, demo_cells))
    found = result.confirmed[result.confirmed["role"] == "found"]
    assert len(found) and set(found["size"]) <= {1, 2, 3}
    for _, rows in found.groupby("size"):
        edits = Perturbation.parse(rows["edits"].iloc[0]).edits
        alone = run(goal.edited(edits, goal.further_seeds), tiny_bundle, demo_cells).comparison.set_index("readout")
        rows = rows.set_index("readout")
        for readout in ("density", "spacing"):
            for drawn, name in (("effect", "effect"), ("start", "base"), ("end", "edited"), ("low", "low"), ("p", "p")):
                assert rows.at[readout, drawn] == pytest.approx(alone.at[readout, name], nan_ok=True)
        # The wish is more cells, so that the way to it is the density itself.
        assert rows.at[TOWARDS, "effect"] == pytest.approx(alone.at["density", "effect"])
        assert rows.at[TOWARDS, "share"] == pytest.approx(alone.at["density", "effect"] / WISH)
        assert rows.at[TOWARDS, "unit"] == "cells/mm²" and rows.at[TOWARDS, "n"] == 3
    assert (found["q"].dropna() >= found["p"].dropna() - 1e-12).all()


def test_the_first_seeds_choose_one_of_the_leading_sets(finished, tiny_bundle, demo_cells: Cells) -> None:
    goal, result, _ = finished
    table = all_of(goal, tiny_bundle, demo_cells)
    start = table.iloc[0]
    better = table[(table["objective"] < start["objective"]) & (table["distance"] < start["distance"])]
    drawn = result.confirmed[(result.confirmed["role"] == "found") & (result.confirmed["readout"] == TOWARDS)]
    assert set(drawn["size"]) == set(better["size"])
    for row in drawn.itertuples():
        leading = better[better["size"] == row.size].sort_values("objective", kind="stable")[: goal.keep]
        left = []
        for one in leading.itertuples():
            edits = Perturbation.parse(one.edits).edits
            effect = run(goal.edited(edits, goal.first_seeds), tiny_bundle, demo_cells).comparison
            moved = effect.set_index("readout").at["density", "effect"] / WISH
            left.append(abs(1 - moved) + goal.penalty * max(0.0, 1 - one.support / OUTSIDE))
        assert row.edits == leading["edits"].iloc[int(np.argmin(left))]


def test_random_sets_are_counted_and_drawn_beside(finished, tiny_bundle, demo_cells: Cells) -> None:
    goal, result, _ = finished
    table = all_of(goal, tiny_bundle, demo_cells).set_index("edits")
    drawn = result.confirmed[result.confirmed["readout"] == TOWARDS]
    for row in drawn[drawn["role"] == "found"].itertuples():
        random = random_sets(goal, Perturbation.parse(row.edits).edits, demo_cells, tiny_bundle)
        singles = [replace(goal, candidates=one, shortlist=9, beam=9) for one in random]
        objectives = [all_of(one, tiny_bundle, demo_cells)["objective"].iloc[-1] for one in singles]
        b = sum(objective <= table.at[row.edits, "objective"] for objective in objectives)
        assert row.n_random == len(random) and row.p_random == pytest.approx((b + 1) / (len(random) + 1))
        controls = drawn[(drawn["role"] == "random") & (drawn["size"] == row.size)]
        assert controls["edits"].tolist() == [str(Perturbation(one)) for one in random[: goal.controls]]
        assert controls["q"].isna().all()


def test_the_drawn_way_to_a_niche_counts_the_other_nuclei(tiny_bundle, demo_cells: Cells, tmp_path: Path) -> None:
    target = planted(tiny_bundle, demo_cells, "CD3E:ko,JCHAIN:set=9")
    goal = make(tiny_bundle, target=target, max_edits=2, keep=1, random=1, controls=0, penalty=0.0)
    result = run_goal(goal, tiny_bundle, demo_cells, DiskCache(tmp_path))
    rows = result.confirmed[(result.confirmed["size"] == 2) & (result.confirmed["readout"] == TOWARDS)]
    assert rows["edits"].tolist() == ["CD3E:ko,JCHAIN:set=9"]
    drawn = run(goal.edited(Perturbation.parse(rows["edits"].iloc[0]).edits, (2, 3, 4)), tiny_bundle, demo_cells)
    axis = np.sqrt(target.counts) - np.sqrt(neighbours(tiny_bundle, demo_cells, "")[0])
    gap, moved = np.linalg.norm(axis), []
    for base, edited in zip(drawn.base_nuclei, drawn.edited_nuclei, strict=True):
        roots = []
        for nuclei in (base, edited):
            far = (nuclei["x_um"] - 8.0) ** 2 + (nuclei["y_um"] - 8.0) ** 2  # 32 px of 0.5 um
            others = nuclei.drop(index=far.idxmin()) if len(nuclei) else nuclei
            roots.append(np.sqrt([(others["cell_type"] == name).sum() for name in target.classes]))
        moved.append((roots[1] - roots[0]) @ axis / gap)
    row = rows.iloc[0]
    assert row["effect"] == pytest.approx(np.mean(moved)) and row["share"] == pytest.approx(np.mean(moved) / gap)
    assert row["surrogate"] == pytest.approx(gap) and row["unit"] == "root counts"


def test_the_recipes_own_edits_are_the_start(tiny_bundle, demo_cells: Cells, tmp_path: Path) -> None:
    recipe = replace(make(tiny_bundle).recipe, perturbation=Perturbation.parse("EPCAM:set=9"))
    goal = make(tiny_bundle, recipe=recipe, max_edits=1, keep=1, random=1, controls=0)
    assert str(goal.edited(CANDIDATES[:1], (0,)).perturbation) == "EPCAM:set=9,GAPDH:ko"
    result = run_goal(goal, tiny_bundle, demo_cells, DiskCache(tmp_path))
    (edits,) = set(result.confirmed["edits"])
    values = []
    for own in ((), Perturbation.parse(edits).edits):
        table = run(goal.edited(own, goal.further_seeds), tiny_bundle, demo_cells).summary
        values.append(table[(table["arm"] == "edited") & (table["readout"] == "density")]["mean"].iloc[0])
    row = result.confirmed.set_index("readout").loc["density"]
    assert [row["start"], row["end"]] == pytest.approx(values)
    with pytest.raises(BadInput, match="edits a gene that the recipe edits already"):
        replace(goal, candidates=(Edit("EPCAM", "ko"),))


def test_a_cancelled_search_keeps_its_part_and_goes_on(finished, tiny_bundle, demo_cells: Cells, tmp_path) -> None:
    goal, whole, stored_in = finished
    for fraction, drawn in ((0.0, False), (0.7, True)):
        cache, cancel = DiskCache(tmp_path / str(fraction)), threading.Event()

        def stop(progress: Progress, fraction: float = fraction, cancel: threading.Event = cancel) -> None:
            if progress.fraction > fraction:
                cancel.set()

        with pytest.raises(Stopped):
            run_goal(goal, tiny_bundle, demo_cells, cache, on_progress=stop, cancel=cancel)
        part = load_goal(goal.hash, cache)
        assert (part is not None) == drawn
        if part is not None:
            assert not part.complete and 0 < len(part.confirmed) < len(whole.confirmed)
            pd.testing.assert_frame_equal(part.tradeoff, whole.tradeoff, check_dtype=False)
    result = run_goal(goal, tiny_bundle, demo_cells, cache)
    stored = load_goal(goal.hash, stored_in)
    for name in ("tradeoff", "confirmed"):
        pd.testing.assert_frame_equal(getattr(result, name), getattr(whole, name))
        pd.testing.assert_frame_equal(getattr(stored, name), getattr(whole, name), check_dtype=False)
    assert stored.complete and stored.searched == whole.searched


def test_a_verdict_needs_interval_and_test() -> None:
    columns = {"role": "found", "readout": TOWARDS, "size": 1, "edits": "A:ko", "unit": "", "n": 8}
    """q of the five: 0.017, 0.25, 0.017, 0.017, 1."""
    cases = [(1.0, 2.0, 0.01), (1.0, 2.0, 0.2), (-2.0, -1.0, 0.01), (-1.0, 1.0, 0.01), (math.nan, math.nan, 1.0)]
    rows = [columns | {"low": low, "high": high, "p": p} for low, high, p in cases]
    rest = ["surrogate", "start", "end", "effect", "share", "surrogate_inside", "support", "outside"]
    table = _confirmed([pd.DataFrame(rows).reindex(columns=[*rows[0], *rest, "p_random", "n_random"])])
    assert table["verdict"].tolist() == ["agrees", "open", "disagrees", "open", ""]
    alone = [pd.DataFrame(rows[:2]).assign(p=[0.04, 0.9]).reindex(columns=table.columns)]
    assert _confirmed(alone)["verdict"].tolist() == ["open", "open"], "p < 0.05, but q = 0.08"


def test_with_the_seeds_of_a_screen_one_row_alone_can_be_a_hit_and_with_eight_none(tiny_bundle) -> None:
    goal = make(tiny_bundle)
    standard = replace(goal, first_seeds=FIRST_SEEDS, further_seeds=FURTHER_SEEDS)
    assert Goal(goal.recipe, goal.target, goal.candidates).further_seeds == FURTHER_SEEDS
    assert standard.rows == 3 * (1 + len(READOUTS))
    # All 12 differences of one sign: 2 of 2^12 assignments of signs are as extreme; Benjamini-Hochberg by hand.
    assert standard.smallest_q() == pytest.approx(2 / 2**12 * standard.rows) and standard.smallest_q() < 0.05
    assert f"one row alone among {standard.rows} tested can reach" in standard.reach()
    eight = replace(standard, further_seeds=FURTHER_SEEDS[:8])
    assert eight.smallest_q() == pytest.approx(2 / 2**8 * eight.rows) and eight.smallest_q() > 0.05
    # k rows at the smallest p have q = p * rows / k.
    needed = next(k for k in range(1, eight.rows) if 2 / 2**8 * eight.rows / k < 0.05)
    assert f"{needed} of them have to reach that p together" in eight.reach()
    assert "no q can be below 0.05: take more further seeds" in goal.reach()
    several = replace(standard, recipe=replace(goal.recipe, cell_ids=("cell-3", "cell-4")))
    assert several.design[0] == 2 and "take more cells" in several.reach()


def test_a_screen_and_a_goal_of_as_many_rows_reach_as_far(tiny_bundle) -> None:
    goal = make(tiny_bundle, first_seeds=FIRST_SEEDS, further_seeds=FURTHER_SEEDS)
    screen = Screen(goal.recipe, (Perturbation.parse("GAPDH:ko"),))
    for rows in (1, 5, 100, 500):
        assert goal.smallest_q(rows) == screen.smallest_q(rows) and goal.reach(rows) == screen.reach(rows)


def test_the_sentences_say_what_was_done_and_mark_what_lies_outside(finished) -> None:
    goal, result, _ = finished
    text = "\n".join(sentences(goal, result))
    assert f"{result.searched} sets of at most 3 edits" in text and "a guess that draws no picture" in text
    assert "density +4000 cells/mm²" in text and "random sets on like genes" in text
    assert goal.reach(int(result.confirmed["q"].notna().sum())) in text
    inside = replace(result, tradeoff=result.tradeoff.assign(outside=0), confirmed=result.confirmed.assign(outside=0))
    assert "extrapolation" not in "\n".join(sentences(goal, inside))
    outside = replace(inside, tradeoff=result.tradeoff.assign(outside=1))
    assert sentences(goal, outside)[1].startswith("Before any edit of the search, the cell lies outside")
    nothing = replace(result, tradeoff=result.tradeoff[:1], confirmed=result.confirmed[:0])
    assert "Nothing was drawn" in sentences(goal, nothing)[-1]


# --- definition and bad input ---------------------------------------------------------------------------------------


def test_the_hash_knows_all_that_decides_the_result(tiny_bundle) -> None:
    goal = make(tiny_bundle)
    changes = {
        "recipe": replace(goal.recipe, encoder_seed=1),
        "target": ReadoutTarget("density", value=WISH),
        "candidates": CANDIDATES[::-1],
        "max_edits": 2,
        "penalty": 2.0,
        "shortlist": 3,
        "beam": 3,
        "keep": 3,
        "first_seeds": (0, 9),
        "further_seeds": (2, 3),
        "random": 8,
        "controls": 1,
    }
    assert set(changes) == set(Goal.__dataclass_fields__)
    hashes = {replace(goal, **{name: value}).hash for name, value in changes.items()}
    assert len(hashes) == len(changes) and goal.hash not in hashes
    assert replace(goal, recipe=replace(goal.recipe, seeds=(5,))).hash == goal.hash
    assert json.loads(json.dumps(goal.to_dict()))["candidates"] == [str(edit) for edit in CANDIDATES]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": ()}, "The goal has no candidate"),
        ({"candidates": CANDIDATES[:1] * 2}, "has the candidate GAPDH:ko twice"),
        ({"max_edits": 4}, "max_edits is 4: choose 1 to 3"),
        ({"max_edits": 0}, "max_edits is 0"),
        ({"penalty": -1.0}, "penalty is -1.0"),
        ({"penalty": math.nan}, "penalty is nan"),
        ({"beam": 0}, "beam is 0"),
        ({"controls": 10}, "controls is 10: choose 0 to 9"),
        ({"first_seeds": (0,)}, "first_seeds has 1 seeds: give at least 2"),
        ({"further_seeds": (1, 2)}, "share a seed"),
    ],
)
def test_what_cannot_be_searched_is_refused(tiny_bundle, changes: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make(tiny_bundle, **changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("colour", 1.0), "readout is 'colour': choose density"),
        (("spacing", 1.0), "readout is 'spacing'"),
        (("density",), "needs either a value or a change"),
        (("density", 1.0, 1.0), "needs either a value or a change"),
        (("density", -1.0), "value of density is -1: choose a number from 0"),
        (("fraction:Fibroblast", 1.5), "choose a number from 0 to 1"),
        (("density", None, 0.0), "change of density is 0"),
        (("density", None, math.inf), "change of density is inf: give a finite number"),
    ],
)
def test_a_readout_that_cannot_be_wished_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        ReadoutTarget(*arguments)


def test_a_target_out_of_reach_or_reached_already_is_refused(tiny_bundle, demo_cells: Cells) -> None:
    cases = [
        (ReadoutTarget("density", change=-1e9), "beyond what it can be"),
        (planted(tiny_bundle, demo_cells, ""), "where the target"),
        (NicheTarget("x", ("Fibroblast",), (1.0,)), "made with another model"),
    ]
    for target, message in cases:
        with pytest.raises(BadInput, match=message):
            all_of(make(tiny_bundle, target=target), tiny_bundle, demo_cells)
    with pytest.raises(BadInput, match="give one number >= 0 for each of 1 classes"):
        NicheTarget("x", ("Fibroblast",), (-1.0,))
    other = replace(make(tiny_bundle).recipe, model_sha256="a" * 64)
    with pytest.raises(BadInput, match="The goal was made with model aaaaaaaaaaaa"):
        all_of(make(tiny_bundle, recipe=other), tiny_bundle, demo_cells)
    elsewhere = replace(make(tiny_bundle).recipe, cell_ids=("nobody",))
    with pytest.raises(BadInput, match="The data have no cell 'nobody'"):
        all_of(make(tiny_bundle, recipe=elsewhere), tiny_bundle, demo_cells)


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tiny_bundle, tiny_folder: Path, demo_cells: Cells, tmp_path: Path) -> list[str]:
    """Cells with the true counts of their niches, a recipe for one, and the command's first words."""
    area = (32 * tiny_bundle.config.um_per_px / 1000) ** 2
    truth = {f"niche_density:{name}": np.full(len(demo_cells), 3 / area) for name in set(VISIBLE_CLASS.values())}
    write_cells(demo_cells, tmp_path / "cells.h5ad", pd.DataFrame(truth))
    with open_h5ad(tmp_path / "cells.h5ad", tiny_bundle.scgpt.vocab) as source:
        recipe = replace(make(tiny_bundle).recipe, data_sha256=source.sha256, sample=SampleConfig(steps=1))
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    where = ["--bundle", str(tiny_folder), "--cells", str(tmp_path / "cells.h5ad"), "--out", str(tmp_path / "out")]
    return ["goal", str(tmp_path / "recipe.json"), *where, "--candidates", "GAPDH:ko,CD3E:ko,JCHAIN:set=9"]


def test_a_damaged_goal_is_one_sentence(tiny_bundle) -> None:
    value = json.loads(json.dumps(make(tiny_bundle).to_dict()))
    assert Goal.from_dict(value).hash == make(tiny_bundle).hash
    for change, message in (
        ({"target": 3}, "no target"),
        ({"target": {"kind": "moon"}}, "The goal is damaged"),
        ({"candidates": [1]}, "The goal is damaged"),
        ({"candidates": ["GAPDH:blow"]}, "Cannot read the edit"),
        ({"penalty": -1}, "penalty is -1"),
        ({"beam": "wide"}, "The goal is damaged"),
    ):
        with pytest.raises(BadInput, match=message):
            Goal.from_dict(value | change)


GOAL = COMMANDS | {"goal": ("perturb.goal", "search edits that move a niche towards a target")}


def test_the_command_writes_the_tables_and_the_chart(files: list[str], tmp_path: Path, capsys) -> None:
    command = [*files, "--readout", "density", "--change", "+9000", "--max-edits", "2"]
    assert run_command("perturb", "", GOAL, command) == 0
    said = capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "goal.json").read_text())
    assert written["target"] == {"kind": "readout", "readout": "density", "value": None, "change": 9000.0}
    assert all(sentence in said for sentence in written["sentences"]) and len(written["hash"]) == 64
    table = pd.read_csv(tmp_path / "out" / "tradeoff.csv")
    assert table["size"].max() <= 2 and table["size"].iloc[0] == 0
    page = (tmp_path / "out" / "tradeoff.html").read_text()
    assert "confirmed.csv" in said and "plotly" in page and "Generated, not diagnostic" in page
    assert Goal.from_dict(written).hash == written["hash"] and written["notice"] == "Generated, not diagnostic"
    out, again = tmp_path / "out", files[2:6]
    assert run_command("perturb", "", COMMANDS, ["replay", str(out), *again]) == 0
    drawn = pd.read_csv(out / "confirmed.csv")
    assert f"same: {len(table) + len(drawn)} rows" in capsys.readouterr().out
    drawn.loc[0, "effect"] += 1e6
    drawn.to_csv(out / "confirmed.csv", index=False)
    assert run_command("perturb", "", COMMANDS, ["replay", str(out), *again]) == 1
    assert "effect)" in capsys.readouterr().out


def test_a_cells_niche_is_a_target_with_its_real_counts(files: list[str], tiny_bundle, tmp_path: Path) -> None:
    assert run_command("perturb", "", GOAL, [*files, "--like", "cell-30", "--max-edits", "1"]) == 0
    written = json.loads((tmp_path / "out" / "goal.json").read_text())
    target = written["target"]
    assert Goal.from_dict(written).hash == written["hash"]
    with open_h5ad(tmp_path / "cells.h5ad", tiny_bundle.scgpt.vocab) as source:
        assert target == json.loads(json.dumps({"kind": "niche"} | vars(niche_target(source, "cell-30", tiny_bundle))))
        cell = source.take([30])
    own = list(target["classes"]).index(VISIBLE_CLASS[cell.cell_type[0]])
    np.testing.assert_allclose(target["real"], [2.0 if i == own else 3.0 for i in range(8)], atol=1e-4)
    expected = tiny_bundle.expected_neighbours(tiny_bundle.encode(tiny_bundle.embed(cell, 0)))[0]
    assert sum(target["counts"]) == pytest.approx(expected.sum())


def test_the_command_refuses_a_wish_that_does_not_fit(files: list[str], capsys) -> None:
    assert run_command("perturb", "", GOAL, [*files, "--like", "cell-30", "--change", "1"]) == 2
    assert "--like takes no --value or --change" in capsys.readouterr().err
    assert run_command("perturb", "", GOAL, [*files, "--like", "nobody"]) == 2
    assert "has no cell 'nobody'" in capsys.readouterr().err
    assert run_command("perturb", "", GOAL, [*files, "--readout", "density"]) == 2
    assert "needs either a value or a change" in capsys.readouterr().err
