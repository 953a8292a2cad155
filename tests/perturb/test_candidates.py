"""Candidates and random sets against the counts of the cells, read off by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ge2hist_core.config import SampleConfig
from ge2hist_core.types import BadInput, Cells
from perturb.candidates import default_candidates, random_sets
from perturb.edits import Edit, Perturbation
from perturb.goal import Goal, ReadoutTarget
from perturb.recipe import Recipe
from perturb.screen import MATCHED

CELL = "cell-3"


def make(model) -> Goal:
    recipe = Recipe("d" * 64, model.sha256, (CELL,), sample=SampleConfig(steps=2), seeds=(0,))
    candidates = Perturbation.parse("GAPDH:ko,CD3E:ko").edits
    return Goal(recipe, ReadoutTarget("density", change=4000.0), candidates, random=9, controls=2)


def test_default_candidates_edit_known_genes_by_level(tiny_bundle, demo_cells: Cells) -> None:
    recipe = make(tiny_bundle).recipe
    row = demo_cells.counts.toarray()[3]
    count = dict(zip(demo_cells.genes, row, strict=True))
    found = default_candidates(replace(recipe, perturbation=Perturbation.parse("ACTB:ko")), demo_cells, tiny_bundle)
    knocked = [edit.gene for edit in found if edit.kind == "ko"]
    known = [gene for gene in demo_cells.genes if gene not in ("NOTINVOCAB1", "ACTB")]
    assert sorted(knocked) == sorted(gene for gene in known if count[gene] > 0)
    assert [count[gene] for gene in knocked] == sorted((count[gene] for gene in knocked), reverse=True)
    factors = {amount: [e.gene for e in found if (e.kind, e.amount) == ("factor", amount)] for amount in (0.5, 2, 4)}
    assert all(genes == knocked for genes in factors.values())
    # Fewer than 20 cells of the type: no percentile, and of the donor: all other cells are looked at.
    others = np.delete(demo_cells.counts.toarray(), 3, axis=0)
    silent = [edit for edit in found if edit.kind == "set"]
    share = {gene: (others[:, i] > 0).mean() for i, gene in enumerate(demo_cells.genes)}
    assert {e.gene for e in silent} == {gene for gene in known if count[gene] == 0 and share[gene] >= 0.1}
    for edit in silent:
        column = others[:, demo_cells.genes.tolist().index(edit.gene)]
        assert edit.amount == max(1.0, np.median(column[column > 0]))
    assert (
        default_candidates(recipe, demo_cells, tiny_bundle, most=7)
        == default_candidates(recipe, demo_cells, tiny_bundle)[:7]
    )
    assert len({e.kind for e in default_candidates(recipe, demo_cells, tiny_bundle, most=5)}) == 3


def one_type(cells: Cells) -> Cells:
    return replace(cells, cell_type=np.full(len(cells), "B cell"), donor=np.full(len(cells), "one"))


def test_a_silent_gene_is_set_to_the_90th_percentile_of_a_large_type(tiny_bundle, demo_cells: Cells) -> None:
    cells = one_type(demo_cells)
    found = default_candidates(make(tiny_bundle).recipe, cells, tiny_bundle)
    counts = cells.counts.toarray()
    at = dict(zip(cells.genes, np.percentile(counts, 90, axis=0), strict=True))
    raised = [edit for edit in found if edit.kind in ("percentile", "set")]
    assert {edit.kind for edit in raised if at[edit.gene] > 0} == {"percentile"}
    edited = Perturbation(tuple(raised)).apply(cells.take([3]), cells).counts.toarray()[0]
    for edit in raised:
        if edit.kind == "percentile":
            assert edited[cells.genes.tolist().index(edit.gene)] == pytest.approx(at[edit.gene])


def test_random_sets_are_different_and_matched_in_kind_and_level(tiny_bundle, demo_cells: Cells) -> None:
    cells, goal = one_type(demo_cells), make(tiny_bundle)
    row = cells.counts.toarray()[3]
    count = dict(zip(cells.genes, row, strict=True))
    around = dict(zip(cells.genes, np.delete(cells.counts.toarray(), 3, axis=0).mean(axis=0), strict=True))
    silent = next(gene for gene in cells.genes if count[gene] == 0 and around[gene] > 0)
    edits = (Edit("GAPDH", "ko"), Edit(silent, "percentile", 90), Edit("CDH1", "factor", 4))
    found = random_sets(goal, edits, cells, tiny_bundle, 40)
    assert len({frozenset(one) for one in found}) == len(found) == 40
    assert found == random_sets(goal, edits, cells, tiny_bundle, 40)
    for one in found:
        assert [(e.kind, e.amount) for e in one] == [(e.kind, e.amount) for e in edits]
        genes = [edit.gene for edit in one]
        assert len(set(genes)) == 3 and not set(genes) & {"GAPDH", silent, "CDH1", "NOTINVOCAB1"}
        assert [count[gene] > 0 for gene in genes] == [count[e.gene] > 0 for e in edits]
        assert (Perturbation((one[1],)).apply(cells.take([3]), cells).counts != cells.take([3]).counts).nnz == 1
    pool = [g for g in cells.genes if count[g] > 0 and g not in ("GAPDH", "NOTINVOCAB1")]
    alone = random_sets(goal, edits[:1], cells, tiny_bundle)
    nearest = sorted(pool, key=lambda g: abs(np.log1p(count[g]) - np.log1p(count["GAPDH"])))[:MATCHED]
    assert {one[0].gene for one in alone} <= set(nearest) and len(alone) == goal.random
    assert len(random_sets(goal, edits[:1], cells, tiny_bundle, 999)) == min(MATCHED, len(pool))


def test_no_gene_or_no_room_is_refused(tiny_bundle, demo_cells: Cells) -> None:
    recipe = make(tiny_bundle).recipe
    with pytest.raises(BadInput, match="most is 0: choose at least 1 candidate"):
        default_candidates(recipe, demo_cells, tiny_bundle, most=0)
    every = Perturbation(tuple(Edit(gene, "ko") for gene in demo_cells.genes))
    with pytest.raises(BadInput, match="No gene of these cells is left to edit"):
        default_candidates(replace(recipe, perturbation=every), demo_cells, tiny_bundle)
