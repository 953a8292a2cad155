"""Left side of the Explore page: which file, which cell."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import streamlit as st

from ge2hist_core.types import BadInput
from pages import _ui
from pages._experiment import Experiment
from perturb.colours import colour_of

if TYPE_CHECKING:
    from ge2hist_core.data import H5adSource
    from ge2hist_core.model import GE2Hist
    from perturb.profile import Profile

SELECTED = 32
"""Cells of a selection on the map that are taken, at most."""
MAP_POINTS = 20_000
"""Cells on a map, at most."""
LISTED_CELLS = 2_000
"""With more cells of a type their ids are typed, not picked from a list."""


def data_panel(experiment: Experiment, source: H5adSource, model: GE2Hist) -> None:
    st.markdown("#### Cells")
    is_demo = experiment.path == _ui.demo_cells()
    preview = source.preview
    st.markdown(
        f"**{'Demo cells' if is_demo else _ui.plain(experiment.path.name)}** · {preview.n_cells:,} cells · "
        f"{preview.n_genes:,} genes"
    )
    if preview.warnings:
        st.caption(f":material/warning: {len(preview.warnings)} notes on this file, see *What was recognised*")
    with st.popover("What was recognised", width="stretch"):
        _preview(source)
    with st.expander("Use your own cells" if is_demo else "Change the file", key="upload"):
        upload(model)
        if not is_demo and _ui.demo_cells().is_file():
            st.button("Back to the demo cells", on_click=_ui.safely(_open_data), args=(_ui.demo_cells(), model))


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
    for key in ("type", "cell"):
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


def cell_panel(experiment: Experiment, source: H5adSource, profile: Profile | None) -> None:
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
        for label, step, name in ((":material/chevron_left:", -1, "Previous"), (":material/chevron_right:", 1, "Next")):
            st.button(
                label,
                help=f"{name} cell of this type",
                key=f"step {step}",
                on_click=_ui.safely(_choose),
                args=(experiment, source, (ids[(place + step) % len(ids)],)),
            )
        if (source.xy is not None or source.umap is not None) and st.button("Map", icon=":material/scatter_plot:"):
            _map(experiment, source)
    if profile is not None:
        _card(profile)


def _choose(experiment: Experiment, source: H5adSource, cell_ids: tuple[str, ...]) -> None:
    recipe = replace(experiment.recipe, cell_ids=cell_ids)
    _ui.check_recipe(recipe, source)
    experiment.recipe = recipe


def _choose_type(experiment: Experiment, source: H5adSource) -> None:
    fits = (source.cell_type == st.session_state["type"]) & ~source.empty
    _choose(experiment, source, (str(source.cell_id[int(fits.argmax())]),))


def _choose_listed(experiment: Experiment, source: H5adSource) -> None:
    _choose(experiment, source, (st.session_state["cell"],))


def _choose_typed(experiment: Experiment, source: H5adSource) -> None:
    _choose(experiment, source, (st.session_state["cell text"].strip(),))


@st.dialog("Choose a cell on the map", width="large")
def _map(experiment: Experiment, source: H5adSource) -> None:
    with _ui.guard():
        planes = {"Section": source.xy, "UMAP": source.umap}
        names = [name for name, plane in planes.items() if plane is not None]
        name = st.segmented_control("Map", names, default=names[0], label_visibility="collapsed") or names[0]
        figure = _map_figure(source, planes[name], name, experiment.recipe.cell_ids[0])
        event = st.plotly_chart(
            figure,
            theme=None,
            on_select="rerun",
            selection_mode=("points", "lasso", "box"),
            key=f"map {name}",
            config={"displaylogo": False, "scrollZoom": True},
        )
        if len(source) > MAP_POINTS:
            st.caption(f"{MAP_POINTS:,} of {len(source):,} cells are shown; every cell can be found by its id.")
        st.caption(
            "Click a point to choose that cell, or take the lasso or box above the map to choose many: the edit is "
            "then made in each of them. Scroll to zoom, drag to move."
        )
        ids = list(dict.fromkeys(str(point["customdata"]) for point in event["selection"]["points"]))
        if len(ids) == 1:
            _choose(experiment, source, tuple(ids))
            st.rerun()
        if ids:
            some = _some(ids)
            drawn = f", drawn at random from the {len(ids):,} selected" * (len(some) < len(ids))
            if st.button(f"Edit {len(some)} cells{drawn}", type="primary", key="take selection"):
                _choose(experiment, source, some)
                st.rerun()


def _some(ids: list[str]) -> tuple[str, ...]:
    """At most ``SELECTED`` of the cells, the same ones every time."""
    from ge2hist_core import rng

    if len(ids) <= SELECTED:
        return tuple(ids)
    order = rng.stream(0, "selected cells").permutation(len(ids))[:SELECTED]
    return tuple(ids[i] for i in sorted(order))


def _map_figure(source: H5adSource, plane: Any, name: str, current: str) -> Any:
    import plotly.graph_objects as go

    from perturb.charts import THEMES

    look = THEMES[_ui.theme()]
    rows = (~source.empty).nonzero()[0]
    rows = rows[:: -(-len(rows) // MAP_POINTS)]
    types = ["Cells"] * len(rows) if source.cell_type is None else source.cell_type[rows].tolist()
    groups: dict[str, list[int]] = {}
    for row, cell_type in zip(rows.tolist(), types, strict=True):
        groups.setdefault(cell_type, []).append(row)
    figure = go.Figure()
    for cell_type in sorted(groups):
        part = groups[cell_type]
        figure.add_scattergl(
            x=plane[part, 0],
            y=plane[part, 1],
            customdata=source.cell_id[part].tolist(),
            mode="markers",
            name=_ui.escape(cell_type),
            marker={"size": 7 if len(rows) < 3000 else 4, "color": colour_of(cell_type)},
            hovertemplate="%{customdata}<br>" + _ui.escape(cell_type) + "<extra></extra>",
        )
    here = source.index_of(current)
    figure.add_scatter(
        x=[plane[here, 0]],
        y=[plane[here, 1]],
        mode="markers",
        name="Chosen cell",
        customdata=[current],
        marker={"size": 16, "symbol": "circle-open", "color": look["ink"], "line": {"width": 3}},
        hovertemplate="%{customdata}<br>chosen<extra></extra>",
    )
    unit = {"um": " (µm)", "px": " (pixels)"}.get(source.preview.position_unit or "", "") if name == "Section" else ""
    figure.update_layout(
        template=look["template"],
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": look["ink"]},
        height=480,
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        dragmode="pan",
        clickmode="event+select",
    )
    figure.update_xaxes(title_text=f"{'x' if name == 'Section' else 'UMAP 1'}{unit}", gridcolor=look["grid"])
    figure.update_yaxes(title_text=f"{'y' if name == 'Section' else 'UMAP 2'}{unit}", gridcolor=look["grid"])
    if name == "Section":  # pictures count y downwards
        figure.update_yaxes(autorange="reversed", scaleanchor="x")
    return figure


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
