"""Edits worth trying on cells, and random ones of the same kinds on genes of like expression to compare them with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ge2hist_core import rng
from ge2hist_core.types import BadInput, Cells
from perturb.edits import MIN_REFERENCE, Edit, Perturbation
from perturb.recipe import Recipe
from perturb.run import choose_cells
from perturb.screen import MATCHED

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist
    from perturb.goal import Goal

__all__ = ["COMMON", "default_candidates", "random_sets"]

COMMON = 0.1
"""Share of the donor's cells that express a silent gene, at least, for it to be a candidate."""


def default_candidates(recipe: Recipe, cells: Cells, model: GE2Hist, most: int = 600) -> tuple[Edit, ...]:
    """Edits worth trying on the recipe's cells: of genes that the model knows and that the recipe does not edit.

    Genes that the cells express, those of the highest mean count first: knock-out, x4, x0.5, x2. Genes that none of
    them expresses but at least 10 % of the other cells of their donors among ``cells`` do (of all of ``cells`` where
    these are fewer than 20), the most common first: the 90th percentile of the cells' types where there is one above
    0, else the median count where expressed. The five kinds take turns until there are ``most``.

    Parameters
    ----------
    cells: as for :func:`perturb.run.run`.

    Raises
    ------
    BadInput: ``most`` below 1; no known gene is left.
    """
    if most < 1:
        raise BadInput(f"most is {most}: choose at least 1 candidate.")
    genes = _Genes(recipe, cells, model)
    expressed = sorted(genes.usable(expressed=True), key=lambda gene: -genes.level[gene])
    common = {gene: genes.common[gene] for gene in genes.usable(expressed=False) if genes.common[gene] >= COMMON}
    silent = sorted(common, key=lambda gene: -common[gene])
    at_p90 = genes.percentile(silent, 90.0)
    kinds = [
        [Edit(gene, "ko") for gene in expressed],
        [
            Edit(gene, "percentile", 90) if at_p90.get(gene, 0.0) > 0 else Edit(gene, "set", genes.usual(gene))
            for gene in silent
        ],
        *([Edit(gene, "factor", factor) for gene in expressed] for factor in (4, 0.5, 2)),
    ]
    turns = [edits[i] for i in range(max(map(len, kinds))) for edits in kinds if i < len(edits)]
    if not turns:
        raise BadInput("No gene of these cells is left to edit: the model must know it and the recipe not edit it.")
    return tuple(turns[:most])


class _Genes:
    """What the choice of candidates and of random genes looks at, by gene name."""

    def __init__(self, recipe: Recipe, cells: Cells, model: GE2Hist) -> None:
        self._cells = cells
        self._chosen = choose_cells(cells, recipe.cell_ids)
        start = recipe.perturbation.apply(self._chosen, cells)
        self._known = set(cells.genes[np.asarray(model.scgpt.match(cells.genes).ids) >= 0])
        self._known -= set(recipe.perturbation.genes)
        self._column: dict[str, int] = {}
        for column, gene in enumerate(cells.genes):
            self._column.setdefault(str(gene), column)
        self.level = self._by_gene(start.counts.mean(axis=0))
        """Mean count in the recipe's cells at the start."""
        peers = self._peers()
        self.around = self._by_gene(peers.mean(axis=0))
        """Mean count in the other cells of the donors."""
        self.common = self._by_gene((peers > 0).mean(axis=0))
        """Share of these that express it."""
        self._peers_by_column = peers.tocsc()

    def usable(self, *, expressed: bool) -> list[str]:
        """Known genes in the order of the data."""
        return [gene for gene in self._column if gene in self._known and (self.level[gene] > 0) == expressed]

    def usual(self, gene: str) -> float:
        """Median count of the other cells of the donors that express the gene, at least 1."""
        counts = self._peers_by_column[:, [self._column[gene]]].data
        return max(1.0, float(np.median(counts))) if len(counts) else 1.0

    def percentile(self, genes: Sequence[str], amount: float) -> dict[str, float]:
        """The lowest over the recipe's cells' types; nothing where a type is unknown or has too few cells."""
        types, known = self._chosen.cell_type, self._cells.cell_type
        if types is None or known is None or not genes:
            return {}
        columns, lowest = [self._column[gene] for gene in genes], np.full(len(genes), np.inf)
        for name in dict.fromkeys(types):
            peers = np.flatnonzero(known == name)
            if len(peers) < MIN_REFERENCE:
                return {}
            block = self._cells.counts[peers].tocsc()[:, columns].toarray()
            lowest = np.minimum(lowest, np.percentile(block, amount, axis=0))
        return dict(zip(genes, lowest.tolist(), strict=True))

    def _peers(self) -> Any:
        own = np.isin(self._cells.cell_id, self._chosen.cell_id)
        if self._cells.donor is not None and self._chosen.donor is not None:
            same = np.isin(self._cells.donor, self._chosen.donor) & ~own
            if same.sum() >= MIN_REFERENCE:
                return self._cells.counts[np.flatnonzero(same)]
        return self._cells.counts if own.all() else self._cells.counts[np.flatnonzero(~own)]

    def _by_gene(self, values: Any) -> dict[str, float]:
        flat = np.asarray(values, dtype=np.float64).ravel()
        return {gene: float(flat[column]) for gene, column in self._column.items()}


def random_sets(
    goal: Goal, edits: Sequence[Edit], cells: Cells, model: GE2Hist, n: int | None = None
) -> list[tuple[Edit, ...]]:
    """Different random sets of the same kinds of edits on other genes of like expression, the same ones every time.

    Each gene is replaced by one of the 30 known genes nearest to it in level: the mean count in the recipe's cells
    where they express it, else in the other cells of their donors. An edit to a percentile is only made on silent genes
    whose percentile is above 0, since it does nothing on the others.

    Returns
    -------
    At most ``n`` sets (by default ``goal.random``), fewer where there are not so many different ones.
    """
    n = goal.random if n is None else n
    genes = _Genes(goal.recipe, cells, model)
    taken = {edit.gene for edit in edits}
    pools = [_alike(genes, edit, taken) for edit in edits]
    draws = rng.stream(goal.recipe.encoder_seed, "goal random", str(Perturbation(tuple(edits))))
    found: dict[frozenset[Edit], tuple[Edit, ...]] = {}
    for _ in range(20 * n):
        chosen = [pool[int(draws.integers(len(pool)))] if pool else "" for pool in pools]
        if all(chosen) and len(set(chosen)) == len(chosen):
            one = tuple(replace(edit, gene=gene) for edit, gene in zip(edits, chosen, strict=True))
            found.setdefault(frozenset(one), one)
        if len(found) == n:
            break
    return list(found.values())


def _alike(genes: _Genes, edit: Edit, taken: set[str]) -> list[str]:
    expressed = genes.level[edit.gene] > 0
    level = genes.level if expressed else genes.around
    others = [gene for gene in genes.usable(expressed=expressed) if gene not in taken]
    if edit.kind == "percentile" and not expressed:
        at = genes.percentile(others, edit.amount)
        others = [gene for gene in others if at.get(gene, 0.0) > 0]
    return sorted(others, key=lambda gene: abs(math.log1p(level[gene]) - math.log1p(level[edit.gene])))[:MATCHED]
