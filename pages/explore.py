"""Pick a cell, move its genes, see the niche drawn anew beside the unedited one, from the same noise."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import streamlit as st

from ge2hist_core.config import READER_CLASSES, SampleConfig
from ge2hist_core.types import BadInput
from pages import _ui
from pages._experiment import Experiment, describe, with_edit
from perturb.colours import TYPE_COLOURS, colour_of
from perturb.edits import MAX_FACTOR, Edit, Perturbation

if TYPE_CHECKING:
    from ge2hist_core.data import H5adSource
    from ge2hist_core.model import GE2Hist
    from perturb.profile import Profile
    from perturb.recipe import Recipe
    from perturb.result import Result
    from perturb.run import Progress

MAP_POINTS = 20_000
LISTED_CELLS = 2_000
POLL_S = 0.6
PREVIEW_S = 0.15
VIEWS = {"picture": "H&E", "nuclei": "Nuclei", "difference": "Difference"}
SECTIONS = ("Charts", "All seeds", "Denoising", "Table")
SEED_CHOICES = (6, 8, 12, 16, 24, 32, 64)
SOLVERS = {"dpm++": "DPM-Solver++ (fast)", "ddim": "DDIM", "ddpm": "DDPM (slow, 1000 steps)"}


def page() -> None:
    model = _ui.get_model()
    opened = _ui.open_experiment(model)
    if opened is None:
        with st.sidebar:
            _upload(model)
        _ui.show_message()
        with st.container(border=True, key="empty-data"):
            st.subheader("No cells yet")
            st.markdown("There are no demo cells here. Upload an `.h5ad` file with raw counts on the left to begin.")
        return
    experiment, source = opened
    _ui.show_message()
    profile = _ui.get_profile(experiment.recipe, model, source)
    with st.sidebar:
        _data_panel(experiment, source, model)
        _cell_panel(experiment, source, profile)
    genes, niche = st.columns([1, 2.35], gap="medium")
    with genes, _ui.guard():
        _gene_panel(experiment, profile, _ui.get_edits(experiment.recipe, model, source))
    with niche:
        _niche_panel(experiment, source, model, profile)
    _ui.write_address(experiment)


# Data


def _data_panel(experiment: Experiment, source: H5adSource, model: GE2Hist) -> None:
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
        _upload(model)
        if not is_demo and _ui.demo_cells().is_file():
            st.button("Back to the demo cells", on_click=_ui.safely(_open_data), args=(_ui.demo_cells(), model))


def _upload(model: GE2Hist) -> None:
    # The widget holds the whole file in memory: once the file is on disk, a fresh widget lets it go.
    turn = st.session_state.setdefault("upload turn", 0)
    uploaded = st.file_uploader("Upload an .h5ad file (raw counts, up to 1 GB)", type="h5ad", key=f"file {turn}")
    if uploaded is None:
        return
    with _ui.guard():
        with st.spinner("Saving and reading the file"):
            path = _ui.save_upload(uploaded)
            _open_data(path, model)
        st.session_state["upload turn"] = turn + 1
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


# Cell


def _cell_panel(experiment: Experiment, source: H5adSource, profile: Profile) -> None:
    st.markdown("#### Cell")
    current = experiment.recipe.cell_ids[0]
    rows = (~source.empty).nonzero()[0]
    if source.cell_type is not None:
        types = sorted(set(source.cell_type[rows]))
        counts = {name: int((source.cell_type[rows] == name).sum()) for name in types}
        st.session_state["type"] = profile.cell_type
        st.selectbox(
            "Cell type",
            types,
            key="type",
            format_func=lambda name: f"{name} ({counts[name]:,})",
            on_change=_ui.safely(_choose_type),
            args=(experiment, source),
        )
        rows = rows[source.cell_type[rows] == profile.cell_type]
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
                args=(experiment, source, ids[(place + step) % len(ids)]),
            )
        if (source.xy is not None or source.umap is not None) and st.button("Map", icon=":material/scatter_plot:"):
            _map(experiment, source)
    _card(profile)


def _choose(experiment: Experiment, source: H5adSource, cell_id: str) -> None:
    recipe = replace(experiment.recipe, cell_ids=(cell_id,))
    _ui.check_recipe(recipe, source)
    experiment.recipe = recipe


def _choose_type(experiment: Experiment, source: H5adSource) -> None:
    fits = (source.cell_type == st.session_state["type"]) & ~source.empty
    _choose(experiment, source, str(source.cell_id[int(fits.argmax())]))


def _choose_listed(experiment: Experiment, source: H5adSource) -> None:
    _choose(experiment, source, st.session_state["cell"])


def _choose_typed(experiment: Experiment, source: H5adSource) -> None:
    _choose(experiment, source, st.session_state["cell text"].strip())


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
            selection_mode="points",
            key=f"map {name}",
            config={"displaylogo": False, "scrollZoom": True},
        )
        if len(source) > MAP_POINTS:
            st.caption(f"{MAP_POINTS:,} of {len(source):,} cells are shown; every cell can be found by its id.")
        st.caption("Click a point to choose that cell. Scroll to zoom, drag to move.")
        points = event["selection"]["points"]
        if points:
            _choose(experiment, source, str(points[0]["customdata"]))
            st.rerun()


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
            name=cell_type,
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


# Genes


def _gene_panel(experiment: Experiment, profile: Profile, edits: dict[str, dict[str, Any]]) -> None:
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
    st.selectbox(
        "Add a gene",
        [gene for gene in table.index if gene not in experiment.genes],
        index=None,
        key="gene",
        placeholder="Add a gene: type its name",
        format_func=_gene_label(profile),
        on_change=_ui.safely(_add_gene),
        args=(experiment,),
        label_visibility="collapsed",
    )
    if not experiment.genes:
        st.caption("Add a gene, or start with one of the strongest of this cell:")
        with st.container(horizontal=True, gap="small"):
            for gene in table.index[table["known"] & (table["count"] > 0)][:6]:
                st.button(str(gene), key=f"suggest {gene}", on_click=experiment.show_gene, args=(gene,))
    for gene in experiment.genes:
        with st.container(border=True, key=f"gene-{gene}", gap="small"):
            _gene_card(experiment, profile, gene, edits)


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


def _gene_card(experiment: Experiment, profile: Profile, gene: str, edits: dict[str, dict[str, Any]]) -> None:
    if gene not in profile.genes.index:
        raise BadInput(f"These cells have no gene {gene!r}: remove it from the address.")
    row = profile.genes.loc[gene]
    edit = next((one for one in experiment.recipe.perturbation.edits if one.gene == gene), None)
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
                help=f"Remove {gene}",
                key=f"drop {gene}",
                type="tertiary",
                on_click=experiment.drop_gene,
                args=(gene,),
            )
    if row["count"]:
        st.session_state[f"amount {gene}"] = _percent(edit)
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
        st.session_state[f"set {gene}"] = int(edit.amount) if edit is not None and edit.kind == "set" else 0
        st.number_input(
            f"Set {gene} to this many counts",
            0,
            1000,
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
        st.caption(f"{row['count']:g} counts{share} · {seen}")
        return
    st.caption(
        f"{row['count']:g} → {after['count_after']:.3g} counts · bin {after['bin_before']} → {after['bin_after']} of 50"
    )
    if after["count_before"] != after["count_after"] and after["bin_before"] == after["bin_after"]:
        st.caption(
            ":material/horizontal_rule: Plateau: the encoder still sees the same bin, so nothing changes. Move further."
        )


def _ordinal(value: float) -> str:
    n = round(value)
    ending = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"


def _percent(edit: Edit | None) -> int:
    if edit is None or edit.kind == "set":
        return 100
    return 0 if edit.kind == "ko" else round(100 * edit.amount)


def _knock_out(experiment: Experiment, gene: str) -> None:
    edit = Edit(gene, "ko") if st.session_state[f"ko {gene}"] else None
    experiment.edit(with_edit(experiment.recipe.perturbation, gene, edit))


def _set_level(experiment: Experiment, gene: str) -> None:
    percent = st.session_state[f"amount {gene}"]
    edit = None if percent == 100 else Edit(gene, "factor", percent / 100)
    experiment.edit(with_edit(experiment.recipe.perturbation, gene, edit))


def _set_count(experiment: Experiment, gene: str) -> None:
    count = st.session_state[f"set {gene}"]
    experiment.edit(with_edit(experiment.recipe.perturbation, gene, Edit(gene, "set", count) if count else None))


# Pictures


def _niche_panel(experiment: Experiment, source: H5adSource, model: GE2Hist, profile: Profile) -> None:
    recipe = experiment.recipe
    _title(experiment, profile)
    result = _ui.get_result(recipe) if len(recipe.seeds) > 1 else None
    state = None if result is not None else _ui.job(recipe)
    running = state is not None and not state.over
    view, types, picture = _view_controls(recipe, result)
    with _ui.guard():
        if running:
            st.fragment(_watch, run_every=POLL_S)(recipe)
        else:
            columns = st.columns(2, gap="small")
            slots = [column.empty() for column in columns]
            shown = result or _ui.draw(recipe.draft, model, source, _live(slots, recipe))
            _tiles(slots, shown, view, types, picture)
    with _ui.guard():
        _run_bar(experiment, source, model, result, state)
        if not running:
            _results(shown, model)


def _title(experiment: Experiment, profile: Profile) -> None:
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key="chips"):
        st.markdown(f"#### Niche of {_ui.plain(profile.cell_id)}")
        for edit in experiment.recipe.perturbation.edits:
            st.button(
                _ui.plain(describe(edit)),
                icon=":material/close:",
                icon_position="right",
                help="Undo this edit",
                key=f"chip {edit.gene}",
                on_click=experiment.edit,
                args=(with_edit(experiment.recipe.perturbation, edit.gene, None),),
            )


def _view_controls(recipe: Recipe, result: Result | None) -> tuple[str, tuple[str, ...], int]:
    """How to show the tiles: view, nuclei types, which seed."""
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        view = st.segmented_control(
            "View",
            list(VIEWS),
            default="picture",
            key="view",
            format_func=VIEWS.__getitem__,
            label_visibility="collapsed",
            required=True,
        )
        picture = 0
        if result is not None:
            seeds = list(recipe.seeds)
            seed = st.selectbox(
                "Seed",
                seeds,
                key=f"seed of {len(seeds)}",
                format_func=lambda number: f"Noise seed {number}",
                label_visibility="collapsed",
                width=170,
            )
            picture = seeds.index(seed)
    types: list[str] = list(READER_CLASSES)
    if view == "nuclei":
        types = st.pills(
            "Nuclei types",
            READER_CLASSES,
            selection_mode="multi",
            default=READER_CLASSES,
            key="types",
            label_visibility="collapsed",
        )
    elif view == "difference":
        st.html(
            "<div class='legend'><span class='swatch' style='background:#D55E00'></span>darker after the edit "
            "<span class='swatch' style='background:#0072B2'></span>lighter after the edit "
            "<span class='swatch' style='background:#fff'></span>unchanged</div>"
        )
    return view, tuple(types), picture


def _tiles(slots: list[Any], result: Result, view: str, types: tuple[str, ...], picture: int) -> None:
    recipe = result.recipe
    for slot, arm, title in zip(slots, ("base", "edited"), ("Before: unedited", "After: edited, same noise"), strict=True):
        with slot.container(key=f"tile-{arm}", gap="small"):
            if arm == "edited" and not recipe.perturbation:
                st.html("<div class='blank'><div>Move a gene, and the edited niche<br>is drawn here from the same noise.</div></div>")
                st.caption("After")
                continue
            shown = "picture" if view == "difference" and arm == "base" else view
            st.image(
                _ui.tile_png(recipe.hash, arm, picture, shown, types, result),
                width="stretch",
                alt=f"Generated H&E picture of the niche, {title}",
            )
            n = len(getattr(result, f"{arm}_nuclei")[picture])
            what = "Difference" if shown == "difference" else title
            st.caption(f"{what} · seed {recipe.seeds[picture]} · {n} nuclei read")


def _live(slots: list[Any], recipe: Recipe) -> Callable[[Progress], None]:
    """Shows the picture while it is denoised, a few times a second."""
    last = time.monotonic()

    def show(progress: Progress) -> None:
        nonlocal last
        if progress.preview is None or time.monotonic() - last < PREVIEW_S:
            return
        for arm, _, image in progress.preview():
            if arm == "base" or recipe.perturbation:
                with slots[arm == "edited"].container(gap="small"):
                    st.image(_ui.enlarged(image), width="stretch")
                    st.caption(f"{'After' if arm == 'edited' else 'Before'} · taking shape, {progress.fraction:.0%}")
        last = time.monotonic()

    return show


def _watch(recipe: Recipe) -> None:
    """The full run: polled, with the picture in work."""
    with _ui.guard():
        state = _ui.job(recipe)
        if state is None or state.over:
            st.rerun()
        columns = st.columns(2, gap="small")
        progress = state.progress
        pictures = [] if progress is None or progress.preview is None else progress.preview()
        for arm, picture, image in pictures:
            with columns[arm == "edited"]:
                st.image(_ui.enlarged(image), width="stretch")
                st.caption(
                    f"{'After' if arm == 'edited' else 'Before'} · seed {recipe.seeds[picture % len(recipe.seeds)]}, "
                    "taking shape"
                )
        if progress is None:
            waiting = f"Waiting for {state.position} run(s) before this one" if state.position else "Starting"
            st.progress(0.0, text=waiting)
        else:
            st.progress(progress.fraction, text=f"{progress.text}: {progress.fraction:.0%}")


def _run_bar(
    experiment: Experiment, source: H5adSource, model: GE2Hist, result: Result | None, state: Any
) -> None:
    recipe = experiment.recipe
    other = st.session_state.get("running")
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key="run-bar"):
        if state is not None and not state.over:
            st.button("Cancel", icon=":material/stop_circle:", key="cancel", on_click=_ui.cancel, args=(recipe,))
        elif result is None:
            st.button(
                f"Compare over {len(recipe.seeds)} seeds" if len(recipe.seeds) > 1 else "Choose more seeds to compare",
                type="primary",
                icon=":material/play_arrow:",
                key="run",
                on_click=_ui.safely(_ui.submit),
                args=(recipe, model, source),
                disabled=not recipe.perturbation or len(recipe.seeds) < 2,
                help="Draws both niches from each seed's noise and compares them with intervals.",
            )
        with st.popover("Settings", icon=":material/tune:"):
            _settings(experiment)
        if result is None and not (state is not None and not state.over):
            st.caption(
                "Draft from one seed: a single draw says little, compare over several."
                if recipe.perturbation
                else "Draft from one seed, unedited."
            )
    if state is not None and state.status == "failed":
        st.error(_ui.plain(state.message), icon=":material/error:")
    elif state is not None and state.status == "cancelled":
        st.caption("The run was cancelled; nothing was changed.")
    if other is not None and other != recipe and (job := _ui.job(other)) is not None and not job.over:
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            st.caption(f"Still drawing the run of “{_ui.plain(other.perturbation)}”.")
            st.button("Cancel it", key="cancel other", type="tertiary", on_click=_ui.cancel, args=(other,))


def _settings(experiment: Experiment) -> None:
    recipe = experiment.recipe
    values = {
        "n seeds": len(recipe.seeds),
        "solver": recipe.sample.solver,
        "steps": recipe.sample.steps,
        "guidance": recipe.sample.guidance,
        "first seed": recipe.seeds[0],
    }
    for name, value in values.items():
        st.session_state[name] = value
    change = {"on_change": _ui.safely(_set_sampling), "args": (experiment,)}
    st.selectbox("Seeds to compare", sorted({*SEED_CHOICES, len(recipe.seeds)}), key="n seeds", **change)
    st.number_input("First seed", 0, 1_000_000, key="first seed", **change)
    st.selectbox("Solver", list(SOLVERS), key="solver", format_func=SOLVERS.__getitem__, **change)
    st.number_input("Denoising steps", 1, 1000, key="steps", **change)
    st.number_input("Guidance", 0.0, 10.0, step=0.5, key="guidance", **change)


def _set_sampling(experiment: Experiment) -> None:
    state = st.session_state
    first, n = int(state["first seed"]), int(state["n seeds"])
    solver, steps = state["solver"], int(state["steps"])
    if solver != experiment.recipe.sample.solver:
        steps = {"ddpm": 1000, "ddim": 50}.get(solver, SampleConfig().steps)
    sample = SampleConfig(solver, steps, float(state["guidance"]))
    experiment.recipe = replace(experiment.recipe, sample=sample, seeds=tuple(range(first, first + n)))


# Numbers


def _results(result: Result, model: GE2Hist) -> None:
    if not result.recipe.perturbation:
        return
    _headline(result)
    for warning in result.warnings:
        st.caption(f":material/warning: {_ui.plain(warning)}")
    section = st.segmented_control(
        "Results", SECTIONS, default=SECTIONS[0], key="section", label_visibility="collapsed", required=True
    )
    {"Charts": _charts, "All seeds": _all_seeds, "Denoising": _denoising, "Table": _table}[section](result, model)
    _ui.downloads(result)


def _headline(result: Result) -> None:
    rows = result.comparison.set_index("readout")
    shares = rows[rows.index.str.startswith("fraction:")]
    wanted = [("density", "Density", 1, "{:,.0f}", " cells/mm²"), ("spacing", "Nearest neighbour", 1, "{:.2f}", " µm")]
    if len(shares) and shares["effect"].notna().any():
        name = shares["effect"].abs().idxmax()
        wanted.append((name, f"Share of {name.partition(':')[2]}", 100, "{:.1f}", " %"))
    for column, (name, title, scale, form, unit) in zip(st.columns(len(wanted)), wanted, strict=True):
        if name not in rows.index:
            continue
        row = rows.loc[name]
        before, after, effect, low, high = (row[key] * scale for key in ("base", "edited", "effect", "low", "high"))
        if effect != effect:
            column.metric(f"{title},{unit}", "undefined", help="Too few nuclei in one of the pictures.")
            continue
        interval = f" ({form.format(low)} to {form.format(high)})" if low == low and row["n"] > 1 else ""
        column.metric(
            f"{title},{unit}",
            f"{form.format(before)} → {form.format(after)}",
            f"{'+' if effect >= 0 else ''}{form.format(effect)}{interval}",
            delta_color="off",
            help="Mean before and after; below, the mean paired difference"
            + (" with its 95 % interval over seeds." if interval else ", of one seed alone."),
        )


def _charts(result: Result, model: GE2Hist) -> None:
    from perturb import charts

    theme = _ui.theme()
    if len(result.recipe.seeds) == 1:
        st.caption("One seed: no intervals. Compare over several seeds to see how far the noise alone moves these.")
    show = {"theme": None, "config": {"displaylogo": False}}
    st.plotly_chart(charts.density(result.summary, theme), key="density", **show)
    left, right = st.columns(2)
    left.plotly_chart(charts.composition(result.summary, theme), key="composition", **show)
    right.plotly_chart(charts.spacing(result.readouts, result.summary, theme), key="spacing", **show)


def _all_seeds(result: Result, model: GE2Hist) -> None:
    for column, arm, title in zip(st.columns(2), ("base", "edited"), ("Before", "After"), strict=True):
        column.image(_ui.sheet_png(result.recipe.hash, arm, result), width="stretch", alt=f"All seeds, {title}")
        column.caption(f"{title}: seeds {_span(result.recipe.seeds)}, row by row; the same place has the same noise.")


def _span(seeds: tuple[int, ...]) -> str:
    return f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else str(seeds[0])


def _denoising(result: Result, model: GE2Hist) -> None:
    st.fragment(_replay)(result, model)


def _replay(result: Result, model: GE2Hist) -> None:
    with _ui.guard():
        frames = {arm: _ui.frame_pngs(result.recipe.hash, arm, result, model) for arm in ("base", "edited")}
        n = len(frames["base"])
        with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
            play = st.button("Play", icon=":material/play_arrow:", key="play")
            step = st.slider("Denoising step shown", 1, n, n, key=f"frame of {n}") if n > 1 else 1
        slots = [column.empty() for column in st.columns(2)]
        for i in range(n) if play else (step - 1,):
            for slot, arm in zip(slots, frames, strict=True):
                slot.image(
                    frames[arm][i],
                    width="stretch",
                    caption=f"{'Before' if arm == 'base' else 'After'}, {i + 1} of {n}: the clean picture as estimated",
                )
            if play:
                time.sleep(0.12)


def _table(result: Result, model: GE2Hist) -> None:
    number = st.column_config.NumberColumn
    st.dataframe(
        result.comparison,
        hide_index=True,
        column_config={
            "readout": "Readout",
            "unit": "Unit",
            "base": number("Before", format="%.4g"),
            "edited": number("After", format="%.4g"),
            "effect": number("Difference", format="%.4g"),
            "low": number("95 % from", format="%.4g"),
            "high": number("to", format="%.4g"),
            "p": number("p", format="%.3g"),
            "q": number("q (FDR)", format="%.3g"),
            "n": "Seeds",
        },
    )


with _ui.guard():
    page()
