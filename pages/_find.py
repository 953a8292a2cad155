"""Left side of the Explore page: cells found by a gene, without a mouse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import streamlit as st

from pages import _ui
from pages._choice import choose, gene_counts, gene_input, some

if TYPE_CHECKING:
    from ge2hist_core.data import H5adSource
    from pages._experiment import Experiment

LISTED = 50
"""Found cells in the list, the highest ones."""
ALL_TYPES = "All cells"


def find_panel(experiment: Experiment, source: H5adSource) -> None:
    """Cells of a type with at least so much of a gene: choose one, or edit them all."""
    with st.expander("Find cells by a gene", icon=":material/search:", key="find"):
        gene = gene_input(source, "find gene")
        among = ~source.empty
        if source.cell_type is not None:
            types = [ALL_TYPES, *sorted(set(source.cell_type[among]))]
            chosen = st.selectbox("Among", types, key="find type")
            if chosen != ALL_TYPES:
                among &= source.cell_type == chosen
        whole = source.preview.scale == "counts"
        least = st.number_input(
            "At least this many counts" if whole else "At least this normalised value",
            1 if whole else 0.001,
            value=1 if whole else 1.0,
            key=f"find least {'counts' if whole else 'values'}",
        )
        if gene is not None:
            _found(experiment, source, gene, among, float(least), whole)


def _found(experiment: Experiment, source: H5adSource, gene: str, among: Any, least: float, whole: bool) -> None:
    from perturb.cell_map import at_least

    count, _ = gene_counts(experiment.recipe, source, gene)
    rows = at_least(count, least, among)
    name, n = _ui.plain(gene), int(among.sum())

    def amount(value: float) -> str:
        return f"{value:.4g}" + (" (normalised)" if not whole else f" count{'s' * (value != 1)}")

    if not len(rows):
        highest = float(count[among].max()) if n else 0.0
        st.caption(
            f"None of these {n:,} cells has at least {amount(least)} of {name}; the highest has {amount(highest)}."
        )
        return
    st.caption(f"{len(rows):,} of {n:,} cells have at least {amount(least)} of {name}.")
    types = source.cell_type
    labels = {
        str(source.cell_id[row]): f"{source.cell_id[row]} · {amount(float(count[row]))}"
        + (f" · {types[row]}" if types is not None else "")
        for row in rows[:LISTED]
    }
    st.selectbox(
        f"Highest first{f', the first {LISTED}' * (len(rows) > LISTED)}",
        list(labels),
        index=None,
        key="find cell",
        placeholder="Choose one",
        format_func=labels.__getitem__,
        on_change=_ui.safely(_take),
        args=(experiment, source),
    )
    ids = [str(source.cell_id[row]) for row in rows]
    taken = some(ids)
    if len(ids) > 1:
        drawn = ", drawn at random" * (len(taken) < len(ids))
        st.button(
            f"Edit {len(taken)} of these cells{drawn}" if drawn else f"Edit these {len(taken)} cells",
            key="find all",
            on_click=_ui.safely(choose),
            args=(experiment, source, taken),
            help="The edit is made in each of them; intervals then run over cells and seeds.",
        )


def _take(experiment: Experiment, source: H5adSource) -> None:
    if cell := st.session_state["find cell"]:
        st.session_state["find cell"] = None
        choose(experiment, source, (cell,))
