"""What one browser tab is looking at: recipe, genes on show, undo and redo. Knows neither Streamlit nor the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote, unquote

from perturb.edits import Edit, EditSet, Perturbation
from perturb.recipe import Recipe

__all__ = ["Experiment", "describe", "with_edit", "with_set"]


@dataclass
class Experiment:
    """State of the Explore page.

    Parameters
    ----------
    recipe: what is shown. path: the h5ad it was made for.
    genes: genes with a slider, in the order in which they were added; genes edited one by one are always among them.
    past, future: perturbations for undo (latest last) and redo (next last).
    """

    recipe: Recipe
    path: Path
    genes: tuple[str, ...] = ()
    past: list[Perturbation] = field(default_factory=list)
    future: list[Perturbation] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._show_edited()

    def edit(self, perturbation: Perturbation) -> None:
        """Make ``perturbation`` current; the one before can be had back by :meth:`undo`."""
        if perturbation != self.recipe.perturbation:
            self.past.append(self.recipe.perturbation)
            self.future.clear()
            self._become(perturbation)

    def undo(self) -> None:
        """One edit back, if there is one."""
        if self.past:
            self.future.append(self.recipe.perturbation)
            self._become(self.past.pop())

    def redo(self) -> None:
        """Take the last undo back, if there is one."""
        if self.future:
            self.past.append(self.recipe.perturbation)
            self._become(self.future.pop())

    def show_gene(self, gene: str) -> None:
        """Give a gene its slider."""
        self.genes = tuple(dict.fromkeys((*self.genes, gene)))

    def drop_gene(self, gene: str) -> None:
        """Take a gene's slider, and its edit, away."""
        self.edit(with_edit(self.recipe.perturbation, gene, None))
        self.genes = tuple(name for name in self.genes if name != gene)

    def query(self) -> dict[str, str]:
        """The state as URL parameters: the recipe's short form, and genes that are on show but not edited."""
        edited = {part.gene for part in self.recipe.perturbation.parts if isinstance(part, Edit)}
        idle = [gene for gene in self.genes if gene not in edited]
        return self.recipe.to_query() | ({"genes": ",".join(quote(gene, safe="") for gene in idle)} if idle else {})

    @staticmethod
    def idle_genes(query: Mapping[str, str]) -> tuple[str, ...]:
        """Genes on show that are not edited, from URL parameters."""
        return tuple(unquote(gene) for gene in query.get("genes", "").split(",") if gene)

    def _become(self, perturbation: Perturbation) -> None:
        self.recipe = replace(self.recipe, perturbation=perturbation)
        self._show_edited()

    def _show_edited(self) -> None:
        edited = (part.gene for part in self.recipe.perturbation.parts if isinstance(part, Edit))
        self.genes = tuple(dict.fromkeys((*self.genes, *edited)))


def with_edit(perturbation: Perturbation, gene: str, edit: Edit | None) -> Perturbation:
    """The perturbation with everything done to ``gene`` replaced by ``edit``, in its place; None takes it out.

    Examples
    --------
    >>> p = Perturbation.parse("CD8A:ko,VEGFA:x0.5")
    >>> str(with_edit(p, "CD8A", Edit("CD8A", "factor", 2))), str(with_edit(p, "CD8A", None))
    ('CD8A:x2,VEGFA:x0.5', 'VEGFA:x0.5')
    """
    return _with_part(perturbation, gene, edit)


def with_set(perturbation: Perturbation, name: str, edits: EditSet | None) -> Perturbation:
    """The perturbation with the set called ``name`` replaced by ``edits``, in its place; None takes it out."""
    return _with_part(perturbation, ("set", name), edits)


def _with_part(perturbation: Perturbation, key: object, part: Edit | EditSet | None) -> Perturbation:
    """The first part of this key replaced, or one added at the end; further ones of the key go, all others stay."""
    kept: list[Edit | EditSet | None] = []
    placed = False
    for one in perturbation.parts:
        if (one.gene if isinstance(one, Edit) else ("set", one.name)) != key:
            kept.append(one)
        elif not placed:
            kept.append(part)
            placed = True
    if not placed:
        kept.append(part)
    return Perturbation(tuple(one for one in kept if one is not None))


def describe(edit: Edit | EditSet) -> str:
    """An edit, or a set of them, in a few words.

    Examples
    --------
    >>> describe(Edit("CD8A", "ko")), describe(Edit("VEGFA", "factor", 0.5)), describe(Edit("TGFB1", "set", 3))
    ('CD8A knocked out', 'VEGFA at 50 %', 'TGFB1 set to 3 counts')
    """
    if isinstance(edit, EditSet):
        return edit.name + ("" if edit.dose is None else f" at dose {edit.dose:g}")
    if edit.kind == "ko":
        return f"{edit.gene} knocked out"
    if edit.kind == "factor":
        return f"{edit.gene} at {100 * edit.amount:g} %"
    if edit.kind == "percentile":
        return f"{edit.gene} at percentile {edit.amount:g}"
    return f"{edit.gene} set to {edit.amount:g} counts"
