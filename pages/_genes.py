"""Middle of the Explore page: genes, their sliders, undo and redo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import streamlit as st

from ge2hist_core.types import BadInput
from pages import _ui
from pages._experiment import Experiment, with_edit
from pages._gene_search import matches
from perturb.edits import MAX_COUNT, MAX_FACTOR, Edit, Perturbation

if TYPE_CHECKING:
    from perturb.profile import Profile


MANY_GENES = 1000
"""From here on a list of all names would be felt: it travels to the browser whenever the page changes."""


def gene_panel(experiment: Experiment, profile: Profile, edits: dict[str, dict[str, Any]]) -> None:
    with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center", gap="small"):
        st.markdown("#### Genes")
        with st.container(horizontal=True, horizontal_alignment="right", gap="small", width="content"):
            st.button(
                ":material/undo:", help="Undo", key="undo", on_click=experiment.undo, disabled=not experiment.past
            )
            st.button(
                ":material/redo:", help="Redo", key="redo", on_click=experiment.redo, disabled=not experiment.future
            )
            st.button(
                ":material/restart_alt:",
                help="Reset all genes to 100 %",
                key="reset",
                on_click=experiment.edit,
                args=(Perturbation(),),
                disabled=not experiment.recipe.perturbation,
            )
    table = profile.genes
    _gene_box(experiment, profile)
    if not experiment.genes:
        st.caption("Add a gene, or start with one of the strongest of this cell:")
        with st.container(horizontal=True, gap="small"):
            for gene in table.index[table["known"] & (table["count"] > 0)][:6]:
                st.button(_ui.plain(gene), key=f"suggest {gene}", on_click=experiment.show_gene, args=(gene,))
    for gene in experiment.genes:
        with st.container(border=True, key=f"gene-{gene}", gap="small"):
            _gene_card(experiment, profile, gene, edits)


def _gene_box(experiment: Experiment, profile: Profile) -> None:
    """A list of all genes to type in; of many genes, a search whose matches alone are sent to the browser."""
    genes = [gene for gene in profile.genes.index if gene not in experiment.genes]
    hint = "Add a gene: type its name"
    if len(genes) > MANY_GENES:
        typed = st.text_input(
            "Add a gene: search",
            key="gene search",
            placeholder="Add a gene: type its name, or a part",
            on_change=_ui.safely(_add_typed_gene),
            args=(experiment, genes),
            label_visibility="collapsed",
        )
        genes, hint = matches(genes, typed), "Choose from what was found"
        if not genes:
            if typed.strip():
                st.caption("No gene of these cells has such a name.")
            return
    st.selectbox(
        "Add a gene",
        genes,
        index=None,
        key="gene",
        placeholder=hint,
        format_func=_gene_label(profile),
        on_change=_ui.safely(_add_gene),
        args=(experiment,),
        label_visibility="collapsed",
    )


def _gene_label(profile: Profile) -> Callable[[str], str]:
    facts = profile.genes[["count", "bin", "known"]].to_dict("index")

    def label(gene: str) -> str:
        row = facts[gene]
        if not row["known"]:
            return f"{gene} · unknown to the model"
        return f"{gene} · {row['count']:g} counts, bin {row['bin']}" if row["count"] else f"{gene} · not expressed"

    return label


def _add_gene(experiment: Experiment) -> None:
    if gene := st.session_state["gene"]:
        experiment.show_gene(gene)
        st.session_state["gene"] = None
        st.session_state["gene search"] = ""


def _add_typed_gene(experiment: Experiment, genes: Sequence[str]) -> None:
    """Takes a name that was typed in full; a part stays, to choose from what it matches."""
    typed = st.session_state["gene search"].strip().casefold()
    if gene := next((gene for gene in genes if gene.casefold() == typed), None):
        experiment.show_gene(gene)
        st.session_state["gene search"] = ""


def _gene_card(experiment: Experiment, profile: Profile, gene: str, edits: dict[str, dict[str, Any]]) -> None:
    if gene not in profile.genes.index:
        raise BadInput(f"These cells have no gene {gene!r}: remove it from the address.")
    row = profile.genes.loc[gene]
    parts = experiment.recipe.perturbation.parts
    edit = next((one for one in parts if isinstance(one, Edit) and one.gene == gene), None)
    share = "" if row["percentile"] != row["percentile"] else f" · {_ordinal(row['percentile'])} percentile of its type"
    with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center", gap="small"):
        st.markdown(f"**{_ui.plain(gene)}**")
        with st.container(horizontal=True, horizontal_alignment="right", gap="small", width="content"):
            knocked = edit is not None and edit.kind == "ko"
            st.session_state[f"ko {gene}"] = knocked
            st.toggle(
                "Knock out",
                key=f"ko {gene}",
                on_change=_ui.safely(_knock_out),
                args=(experiment, gene),
                disabled=not row["known"] or not row["count"],
            )
            st.button(
                ":material/close:",
                help=f"Remove {_ui.plain(gene)}",
                key=f"drop {gene}",
                type="tertiary",
                on_click=experiment.drop_gene,
                args=(gene,),
            )
    by_percentile = _by_percentile(edit, gene, row)
    if by_percentile:
        st.session_state[f"percentile {gene}"] = round(row["percentile"] if edit is None else edit.amount)
        st.slider(
            f"Level of {gene} as a percentile of the cell's type",
            0,
            100,
            format="p%d",
            key=f"percentile {gene}",
            on_change=_ui.safely(_set_percentile),
            args=(experiment, gene),
            disabled=not row["known"],
            label_visibility="collapsed",
        )
    elif row["count"]:
        st.session_state[f"amount {gene}"] = _percent(edit, row["count"])
        st.slider(
            f"Level of {gene} in % of its counts",
            0,
            round(100 * MAX_FACTOR),
            step=5,
            format="%d %%",
            key=f"amount {gene}",
            on_change=_ui.safely(_set_level),
            args=(experiment, gene),
            disabled=knocked or not row["known"],
            label_visibility="collapsed",
        )
    else:
        st.session_state[f"set {gene}"] = round(edit.amount) if edit is not None and edit.kind == "set" else 0
        st.number_input(
            f"Set {_ui.plain(gene)} to this many counts",
            0,
            int(MAX_COUNT),
            key=f"set {gene}",
            on_change=_ui.safely(_set_count),
            args=(experiment, gene),
            disabled=not row["known"],
        )
    if not row["known"]:
        st.caption("The model does not know this gene: an edit would change nothing.")
        return
    after = edits.get(gene)
    if after is None:
        seen = f"bin {row['bin']} of 50" if row["bin"] else "not seen by the encoder"
        st.caption(
            f"{row['count']:g} counts{share} · {seen}",
            help="The encoder sees the rank of a gene's count within the cell, in 50 bins; 50 is the cell's highest.",
        )
        return
    st.caption(
        f"{row['count']:g} → {after['count_after']:.3g} counts · bin {after['bin_before']} → {after['bin_after']} of 50"
    )
    if edit is None:
        st.caption("Changed by a signature below.")
    elif after["count_before"] != after["count_after"] and after["bin_before"] == after["bin_after"]:
        st.caption(
            ":material/horizontal_rule: Plateau: the encoder still sees the same bin, so nothing changes. Move further."
        )


def _by_percentile(edit: Edit | None, gene: str, row: Any) -> bool:
    """Whether the gene's level is set as a percentile of its type; the switch is there where percentiles are."""
    if row["percentile"] != row["percentile"]:
        return False
    if edit is not None:
        st.session_state[f"mode {gene}"] = "percentile" if edit.kind == "percentile" else "counts"
    mode = st.segmented_control(
        f"How to set {gene}",
        ("counts", "percentile"),
        default=None if edit is not None else "counts",
        key=f"mode {gene}",
        format_func={"counts": "% of its counts" if row["count"] else "counts", "percentile": "percentile"}.__getitem__,
        disabled=edit is not None,
        label_visibility="collapsed",
        help="Percentile: the level that this share of the cells of its type stays below. Undo the edit to switch.",
        required=True,
    )
    return mode == "percentile"


def _ordinal(value: float) -> str:
    n = round(value)
    ending = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"


def _percent(edit: Edit | None, count: float) -> int:
    if edit is None or edit.kind == "percentile":
        return 100
    if edit.kind == "set":
        return min(round(100 * edit.amount / count), round(100 * MAX_FACTOR))
    return 0 if edit.kind == "ko" else round(100 * edit.amount)


def _knock_out(experiment: Experiment, gene: str) -> None:
    edit = Edit(gene, "ko") if st.session_state[f"ko {gene}"] else None
    experiment.edit(with_edit(experiment.recipe.perturbation, gene, edit))


def _set_level(experiment: Experiment, gene: str) -> None:
    percent = st.session_state[f"amount {gene}"]
    edit = None if percent == 100 else Edit(gene, "factor", percent / 100)
    experiment.edit(with_edit(experiment.recipe.perturbation, gene, edit))


def _set_percentile(experiment: Experiment, gene: str) -> None:
    edit = Edit(gene, "percentile", st.session_state[f"percentile {gene}"])
    experiment.edit(with_edit(experiment.recipe.perturbation, gene, edit))


def _set_count(experiment: Experiment, gene: str) -> None:
    count = st.session_state[f"set {gene}"]
    experiment.edit(with_edit(experiment.recipe.perturbation, gene, Edit(gene, "set", count) if count else None))
