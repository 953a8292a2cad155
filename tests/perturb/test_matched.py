"""Random genes like the edited ones: alike in what counts, drawn with the same noise, p by counting."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from ge2hist_core.config import SampleConfig
from ge2hist_core.model import GE2Hist
from ge2hist_core.sampler import Stopped
from ge2hist_core.types import BadInput, Cells
from perturb.cache import DiskCache
from perturb.edits import Perturbation
from perturb.grn import Network
from perturb.matched import MatchedNull, matched_edits, matched_null, null_table
from perturb.recipe import Recipe
from perturb.result import Result
from perturb.run import Progress, run
from perturb.screen import Screen, guess

QUICK = SampleConfig(steps=2)


def make(model: GE2Hist, edit: str, seeds: tuple[int, ...] = (0, 1, 2)) -> Recipe:
    return Recipe("d" * 64, model.sha256, ("cell-3", "cell-4"), Perturbation.parse(edit), QUICK, seeds)


@pytest.fixture(scope="module")
def result(tiny_bundle: GE2Hist, demo_cells: Cells) -> Result:
    return run(make(tiny_bundle, "GAPDH:x4"), tiny_bundle, demo_cells)


@pytest.fixture(scope="module")
def drawn(result: Result, tiny_bundle: GE2Hist, demo_cells: Cells) -> MatchedNull:
    return matched_null(result, tiny_bundle, demo_cells, n=4)


def test_stand_ins_are_like_the_gene_and_none_is_edited_itself(tiny_bundle: GE2Hist, demo_cells: Cells) -> None:
    chosen = demo_cells.take([3, 4])
    counts = chosen.counts.toarray()
    expressed = {g for g, n in zip(chosen.genes, counts.sum(axis=0), strict=True) if n > 0}
    silent = next(g for g in chosen.genes if g not in expressed and g in tiny_bundle.scgpt.vocab)
    vocabulary = tiny_bundle.scgpt.vocab
    for text, pool in (("GAPDH:ko", expressed), (f"{silent}:set=5", set(chosen.genes) - expressed)):
        copies, table = matched_edits(Perturbation.parse(text), chosen, demo_cells, 5, vocabulary, seed=0)
        edit = Perturbation.parse(text).edits[0]
        assert len({str(copy) for copy in copies}) == len(copies) == 5
        for copy in copies:
            (own,) = copy.edits
            assert own.gene in pool - {edit.gene} and own.gene in vocabulary
            assert (own.kind, own.amount) == (edit.kind, edit.amount)
        assert table["gene"][0] == edit.gene and table["random"].tolist() == [False] + [True] * 5
    again, _ = matched_edits(Perturbation.parse("GAPDH:ko"), chosen, demo_cells, 5, vocabulary, seed=0)
    first, _ = matched_edits(Perturbation.parse("GAPDH:ko"), chosen, demo_cells, 5, vocabulary, seed=0)
    other, _ = matched_edits(Perturbation.parse("GAPDH:ko"), chosen, demo_cells, 5, vocabulary, seed=1)
    assert again == first != other


def test_the_figures_are_means_over_the_type(tiny_bundle: GE2Hist, demo_cells: Cells) -> None:
    chosen = demo_cells.take([3, 4])
    _, table = matched_edits(Perturbation.parse("GAPDH:ko"), chosen, demo_cells, 3, tiny_bundle.scgpt.vocab, 0)
    peers = demo_cells.counts.toarray()[demo_cells.cell_type == chosen.cell_type[0]]
    for row in table.itertuples():
        column = list(demo_cells.genes).index(row.gene)
        assert row.level == pytest.approx(peers[:, column].mean())
        assert row.detection == pytest.approx((peers[:, column] > 0).mean())
        assert row.count == pytest.approx(chosen.counts.toarray()[:, column].mean())


def test_the_nearest_genes_stand_in_where_there_are_many() -> None:
    """Two hundred genes of rising level: those drawn lie near the edited one."""
    levels = np.linspace(1, 200, 200)
    counts = np.tile(levels, (30, 1))
    genes = np.array([f"G{i}" for i in range(200)])
    cells = Cells(counts, genes, np.array([f"c{i}" for i in range(30)]), np.repeat("A", 30))
    copies, _ = matched_edits(Perturbation.parse("G100:ko"), cells.take([0]), cells, 10, dict.fromkeys(genes, 0), 0)
    assert len(copies) == 10
    assert max(abs(int(copy.genes[0][1:]) - 100) for copy in copies) <= 20


def test_sets_keep_their_form_and_no_gene_stands_in_twice(tiny_bundle: GE2Hist, demo_cells: Cells) -> None:
    perturbation = Perturbation.parse("IFN@2(GAPDH:x2;ACTB:x0.5),GAPDH:x2")
    copies, _ = matched_edits(perturbation, demo_cells.take([3, 4]), demo_cells, 4, tiny_bundle.scgpt.vocab, 0)
    for copy in copies:
        first, second = copy.parts
        assert (first.name, first.dose, [edit.amount for edit in first.edits]) == ("IFN", 2.0, [2.0, 0.5])
        assert second.gene == first.edits[0].gene != first.edits[1].gene
        assert not set(copy.genes) & {"GAPDH", "ACTB"}


def test_drawn_effects_are_those_of_the_whole_chain(
    drawn: MatchedNull, result: Result, tiny_bundle: GE2Hist, demo_cells: Cells
) -> None:
    assert drawn.drawn and drawn.effects["edit"].nunique() == 4
    for edit in drawn.effects["edit"].unique()[:2]:
        alone = run(make(tiny_bundle, edit), tiny_bundle, demo_cells).comparison.set_index("readout")
        mine = drawn.effects[drawn.effects["edit"] == edit].set_index("readout")["effect"]
        for readout in ("density", "spacing"):
            assert mine[readout] == pytest.approx(alone.at[readout, "effect"], nan_ok=True)
    table, comparison = drawn.table.set_index("readout"), result.comparison.set_index("readout")
    both = table.index.intersection(comparison.index)  # random edits may show further types
    np.testing.assert_allclose(table.loc[both, "effect"], comparison.loc[both, "effect"])
    assert {"density", "spacing"} <= set(both)


def test_fewer_seeds_compare_like_with_like(result: Result, tiny_bundle: GE2Hist, demo_cells: Cells) -> None:
    found = matched_null(result, tiny_bundle, demo_cells, n=2, seeds=2).table.set_index("readout")
    short = run(make(tiny_bundle, "GAPDH:x4", (0, 1)), tiny_bundle, demo_cells).comparison.set_index("readout")
    assert found.at["density", "effect"] == pytest.approx(short.at["density", "effect"])


def test_p_counts_and_q_is_adjusted_over_the_readouts() -> None:
    draws = np.random.default_rng(0)
    null = pd.DataFrame(
        [
            (f"e{i}", name, value)
            for i in range(19)
            for name, value in zip(("density", "spacing"), draws.normal(size=2), strict=True)
        ],
        columns=["edit", "readout", "effect"],
    )
    null.loc[0, "effect"] = np.nan
    table = null_table({"density": -1.0, "spacing": 9.0, "spacing_var": np.nan}, null).set_index("readout")
    density = null[(null["readout"] == "density") & null["effect"].notna()]["effect"]
    assert table.at["density", "p"] == ((density.abs() >= 1).sum() + 1) / 19 and table.at["density", "n"] == 18
    assert table.at["spacing", "p"] == 1 / 20 and "spacing_var" not in table.index
    np.testing.assert_allclose(table["q"], scipy.stats.false_discovery_control(table["p"]))


def test_p_is_level_where_the_edit_is_one_of_its_kind() -> None:
    """Exchangeable effects: P(p <= 0.1) = 0.1, within the binomial error of 2,000 trials."""
    draws = np.random.default_rng(1)
    hits = 0
    for _ in range(2000):
        values = draws.normal(size=20)
        effects = pd.DataFrame({"edit": "e", "readout": "density", "effect": values[1:]})
        hits += null_table({"density": values[0]}, effects)["p"][0] <= 0.1
    assert hits / 2000 == pytest.approx(0.1, abs=0.02)


def test_guessed_effects_are_those_of_the_screens_first_stage(tiny_bundle: GE2Hist, demo_cells: Cells) -> None:
    result = run(make(tiny_bundle, "GAPDH:x4", (0,)), tiny_bundle, demo_cells)
    found = matched_null(result, tiny_bundle, demo_cells, n=6, drawn=False)
    candidates = tuple(Perturbation.parse(text) for text in ("GAPDH:x4", *found.effects["edit"].unique()))
    screen = Screen(replace(result.recipe, perturbation=Perturbation()), candidates)
    ranked = guess(screen, tiny_bundle, demo_cells).set_index("candidate")
    table = found.table.set_index("readout")
    assert not found.drawn and set(table.index) <= {"density", *(c for c in ranked if c.startswith("fraction:"))}
    for readout in table.index:
        assert table.at[readout, "effect"] == pytest.approx(ranked.at["GAPDH:x4", readout])
    for row in found.effects.itertuples():
        assert row.effect == pytest.approx(ranked.at[row.edit, row.readout])


def test_the_expected_fractions_sum_to_one(tiny_bundle: GE2Hist, demo_cells: Cells) -> None:
    found = tiny_bundle.expected_readouts(tiny_bundle.encode(tiny_bundle.embed(demo_cells.take([0, 9]), 0)))
    np.testing.assert_allclose(sum(v for name, v in found.items() if name.startswith("fraction:")), 1.0)


def test_finished_edits_come_from_the_cache_and_a_cancelled_run_goes_on(
    drawn: MatchedNull, result: Result, tiny_bundle: GE2Hist, demo_cells: Cells, tmp_path: Path
) -> None:
    cache, cancel, fractions = DiskCache(tmp_path), threading.Event(), []

    def stop_half_way(progress: Progress) -> None:
        if progress.fraction > 0.6:
            cancel.set()

    with pytest.raises(Stopped):
        matched_null(result, tiny_bundle, demo_cells, n=4, cache=cache, on_progress=stop_half_way, cancel=cancel)
    assert len(list(tmp_path.rglob("*.json"))) == 2
    again = matched_null(
        result, tiny_bundle, demo_cells, n=4, cache=cache, on_progress=lambda p: fractions.append(p.fraction)
    )
    pd.testing.assert_frame_equal(again.table, drawn.table)
    assert fractions == sorted(fractions) and fractions[-1] == 1.0


def test_what_cannot_be_compared_is_refused_with_a_cure(
    result: Result, tiny_bundle: GE2Hist, demo_cells: Cells
) -> None:
    empty = run(make(tiny_bundle, "", (0,)), tiny_bundle, demo_cells)
    with pytest.raises(BadInput, match="edits nothing"):
        matched_null(empty, tiny_bundle, demo_cells)
    with pytest.raises(BadInput, match="choose 1 to 3"):
        matched_null(result, tiny_bundle, demo_cells, seeds=4)
    with pytest.raises(BadInput, match="at least 1"):
        matched_null(result, tiny_bundle, demo_cells, n=0)
    other = replace(result, recipe=replace(result.recipe, model_sha256="e" * 64))
    with pytest.raises(BadInput, match="eeeeeeeeeeee"):
        matched_null(other, tiny_bundle, demo_cells)
    few = Cells(np.ones((2, 2)), np.array(["GAPDH", "NOTINVOCAB1"]), np.array(["a", "b"]), np.array(["T", "T"]))
    with pytest.raises(BadInput, match="like GAPDH"):
        matched_edits(Perturbation.parse("GAPDH:ko"), few, few, 3, tiny_bundle.scgpt.vocab, 0)


def test_where_edits_spread_a_regulators_stand_ins_are_mostly_regulators() -> None:
    """400 genes of like expression, of which 60 regulate six others each: most stand-ins are of these."""
    genes = np.array([f"G{i}" for i in range(400)])
    counts = np.random.default_rng(0).poisson(5.0, (30, 400)) + 1
    cells = Cells(counts, genes, np.array([f"c{i}" for i in range(30)]))
    regulators = set(genes[:60])
    names = np.repeat(genes[:60], 6)
    network = Network(names, np.tile(genes[-6:], 60), np.ones(len(names)))
    edit, shares = Perturbation.parse("G7:ko"), []
    for given in (network, None):
        _, table = matched_edits(edit, cells.take([0]), cells, 10, dict.fromkeys(genes, 0), 0, given)
        shares.append(table.loc[table["random"], "gene"].isin(regulators).mean())
        assert ("targets" in table) == (given is not None)
    assert shares[0] >= 0.6 and shares[1] <= 0.3
