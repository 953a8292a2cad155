"""Choosing cells: one or many become those of the experiment; one gene over all cells of the file."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import streamlit as st

from pages import _ui

if TYPE_CHECKING:
    from ge2hist_core.data import H5adSource
    from pages._experiment import Experiment
    from perturb.recipe import Recipe

SELECTED = 32
"""Cells of a selection that are taken, at most."""


def choose(experiment: Experiment, source: H5adSource, cell_ids: tuple[str, ...]) -> None:
    """Make these cells the experiment's.

    Raises
    ------
    BadInput: cells, or edits of them, that cannot be used.
    """
    recipe = replace(experiment.recipe, cell_ids=cell_ids)
    _ui.check_recipe(recipe, source)
    experiment.recipe = recipe


def some(ids: list[str]) -> tuple[str, ...]:
    """At most ``SELECTED`` of the cells, the same ones every time."""
    from ge2hist_core import rng

    if len(ids) <= SELECTED:
        return tuple(ids)
    order = rng.stream(0, "selected cells").permutation(len(ids))[:SELECTED]
    return tuple(ids[i] for i in sorted(order))


def gene_counts(recipe: Recipe, source: H5adSource, gene: str) -> tuple[Any, Any]:
    """A gene's counts and the totals of all cells, see :func:`perturb.cell_map.gene_counts`."""
    return _gene_counts(recipe.data_sha256, recipe.matrix, recipe.gene_column, gene, source)


@st.cache_data(max_entries=16, show_spinner="Reading the gene in every cell")
def _gene_counts(
    data: str, matrix: str | None, gene_column: str | None, gene: str, _source: H5adSource
) -> tuple[Any, Any]:
    from perturb.cell_map import gene_counts

    return gene_counts(_source, gene)


def gene_input(source: H5adSource, key: str) -> str | None:
    """A text field for a gene of the file; what was typed is completed by a few buttons, None until it is a gene.

    The names themselves stay here: a file may have tens of thousands. Set ``st.session_state[key]`` to preset it.
    """
    from perturb.cell_map import find_genes

    typed = st.text_input("Gene", key=key, placeholder="Type a gene's name, such as CD8A")
    found = find_genes(source.genes, typed)
    if not typed.strip():
        return None
    if found and found[0].casefold() == typed.strip().casefold():
        return found[0]
    if not found:
        st.caption(f"No gene of this file has “{_ui.plain(typed.strip())}” in its name.")
        return None
    with st.container(horizontal=True, gap="small", key=f"{key} found"):
        for name in found:
            st.button(_ui.plain(name), key=f"{key} is {name}", on_click=_take_gene, args=(key, name))
    return None


def _take_gene(key: str, name: str) -> None:
    st.session_state[key] = name
