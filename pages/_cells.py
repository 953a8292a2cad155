"""Left side of the Explore page: which file, which cell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import streamlit as st

from ge2hist_core.types import BadInput
from pages import _ui
from pages._choice import choose
from pages._experiment import Experiment
from pages._find import find_panel
from pages._map import map_dialog
from pages._open import open_panel
from perturb.colours import colour_of

if TYPE_CHECKING:
    from ge2hist_core.data import H5adSource
    from ge2hist_core.model import GE2Hist
    from perturb.profile import Profile

LISTED_CELLS = 2_000
"""With more cells of a type their ids are typed, not picked from a list."""


def data_panel(experiment: Experiment, source: H5adSource, model: GE2Hist) -> None:
    st.markdown("#### Cells")
    start = _ui.start_cells()
    own = experiment.path != start
    preview = source.preview
    st.markdown(
        f"**{_ui.plain(_ui.name_of(experiment.path))}** · {preview.n_cells:,} cells · {preview.n_genes:,} genes"
    )
    if preview.warnings:
        st.caption(f":material/warning: {len(preview.warnings)} notes on this file, see *What was recognised*")
    with st.popover("What was recognised", width="stretch"):
        _preview(source)
    with st.expander("Change the file" if own else "Use your own cells", key="upload"):
        upload(model)
        if own and _ui.is_there(start):
            back = f"Back to {_ui.plain(_ui.name_of(start).replace('Demo', 'the demo'))}"
            st.button(back, on_click=_ui.safely(_open_data), args=(start, model))
    open_panel(model)


def upload(model: GE2Hist) -> None:
    # The widget holds the whole file in memory: once the file is on disk, a fresh widget lets it go.
    turn = st.session_state.setdefault("upload turn", 0)
    uploaded = st.file_uploader("Upload an .h5ad file (raw counts, up to 1 GB)", type="h5ad", key=f"file {turn}")
    if uploaded is None:
        return
    st.session_state["upload turn"] = turn + 1
    with st.spinner("Saving and reading the file"):
        path = _ui.save_upload(uploaded)
        try:
            _open_data(path, model)
        except BadInput as error:
            _ui.drop_upload(path)
            st.session_state["message"] = str(error)
    st.rerun()


def _open_data(path: Any, model: GE2Hist) -> None:
    st.session_state["experiment"] = _ui.new_experiment(path, model)
    for key in ("type", "cell", "map donor"):
        st.session_state.pop(key, None)


def _preview(source: H5adSource) -> None:
    found = source.preview
    known = "not compared" if found.n_known is None else f"{found.n_known:,} of {found.n_genes:,} known to the model"
    unit = {"um": "µm", "px": "pixels", "unknown": "unit unknown", None: ""}[found.position_unit]
    rows = {
        "Values": f"{found.matrix}, {found.scale}",
        "Genes": f"{found.gene_column}: {known}",
        "Cell type": found.type_column or "none found",
        "Donor": found.donor_column or "none found",
        "Position": f"{found.position} ({unit})" if found.position else "none found",
        "UMAP": found.umap or "none found",
        "Median counts per cell": f"{found.median_total:,.0f}",
        "Cells without counts": f"{found.n_empty:,}",
    }
    st.html(
        "<table class='facts'>"
        + "".join(f"<tr><th>{name}</th><td>{_ui.escape(value)}</td></tr>" for name, value in rows.items())
        + "</table>"
    )
    for warning in found.warnings:
        st.caption(f":material/warning: {_ui.plain(warning)}")


def cell_panel(experiment: Experiment, source: H5adSource, model: GE2Hist, profile: Profile | None) -> None:
    st.markdown("#### Cell")
    current = experiment.recipe.cell_ids[0]
    rows = (~source.empty).nonzero()[0]
    if source.cell_type is not None:
        types = sorted(set(source.cell_type[rows]))
        counts = {name: int((source.cell_type[rows] == name).sum()) for name in types}
        of_current = str(source.cell_type[source.index_of(current)])
        st.session_state["type"] = of_current
        st.selectbox(
            "Cell type",
            types,
            key="type",
            format_func=lambda name: f"{name} ({counts[name]:,})",
            on_change=_ui.safely(_choose_type),
            args=(experiment, source),
        )
        rows = rows[source.cell_type[rows] == of_current]
    ids = source.cell_id[rows].tolist()
    if len(ids) <= LISTED_CELLS:
        st.session_state["cell"] = current
        st.selectbox("Cell id", ids, key="cell", on_change=_ui.safely(_choose_listed), args=(experiment, source))
    else:
        st.session_state["cell text"] = current
        st.text_input("Cell id", key="cell text", on_change=_ui.safely(_choose_typed), args=(experiment, source))
    with st.container(horizontal=True, gap="small"):
        place = ids.index(current)
        for label, step in (("Previous", -1), ("Next", 1)):
            st.button(
                label,
                help=f"{label} cell of this type",
                key=f"step {step}",
                on_click=_ui.safely(choose),
                args=(experiment, source, (ids[(place + step) % len(ids)],)),
            )
        if source.xy is not None or source.umap is not None:
            # By a callback: what a button returns is lost where the script is run again before it gets here.
            st.button("Map", icon=":material/scatter_plot:", key="open map", on_click=_ask_for_map)
            if st.session_state.pop("map wanted", False):
                map_dialog(experiment, source, model)
    find_panel(experiment, source)
    if profile is not None:
        _card(profile)
    _real_tile(source, current, model)


def _real_tile(source: H5adSource, cell_id: str, model: GE2Hist) -> None:
    """What the slide shows around the cell, to stand beside the generated picture."""
    with _ui.guard():
        if _ui.as_store(source) is None:  # an h5ad holds no pictures
            return
        niche = _ui.real_tile(source, cell_id, model)
        if niche is None:
            st.caption("The real tile of this cell would leave its section: none is shown.")
            return
        side = niche.image.shape[0] * niche.um_per_px
        st.image(_ui.picture_png(niche.image, generated=False), width="stretch", alt="Real H&E picture of this cell")
        st.caption(f"Real tile of this cell, {side:g} µm wide. It is not what the edit is compared with.")


def _ask_for_map() -> None:
    st.session_state["map wanted"] = True


def _choose_type(experiment: Experiment, source: H5adSource) -> None:
    from perturb.run import first_of_type

    choose(experiment, source, (first_of_type(source, st.session_state["type"]),))


def _choose_listed(experiment: Experiment, source: H5adSource) -> None:
    choose(experiment, source, (st.session_state["cell"],))


def _choose_typed(experiment: Experiment, source: H5adSource) -> None:
    choose(experiment, source, (st.session_state["cell text"].strip(),))


def _card(profile: Profile) -> None:
    inside = {
        True: ("ok", "Inside the training data"),
        False: ("warn", "Outside the training data: pictures are extrapolation"),
        None: ("", "This bundle holds nothing to tell inside from outside"),
    }[profile.inside]
    p = "" if profile.inside is None else f" (p = {profile.support:.2g})"
    name = profile.cell_type or "Type not given"
    facts = {
        "Donor": profile.donor or "not given",
        "Counts": f"{profile.total:,.0f} in {profile.n_expressed:,} genes",
        "Model reads": f"{profile.read_type}, {profile.probability:.0%}",
    }
    st.html(
        f"<div class='card'><div class='card-title'><span class='dot' style='background:{colour_of(name)}'></span>"
        f"{_ui.escape(name)}</div><table class='facts'>"
        + "".join(f"<tr><th>{key}</th><td>{_ui.escape(value)}</td></tr>" for key, value in facts.items())
        + f"</table><div class='support {inside[0]}'>{inside[1]}{p}</div></div>"
    )
