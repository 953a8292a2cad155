"""Right side of the Explore page: both niches, the draft, the full run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import streamlit as st

from ge2hist_core.config import READER_CLASSES, SampleConfig
from pages import _ui
from pages._experiment import Experiment, describe, with_edit, with_set
from perturb.colours import colour_of
from perturb.edits import Edit

if TYPE_CHECKING:
    from ge2hist_core.data import H5adSource
    from ge2hist_core.model import GE2Hist
    from perturb.profile import Profile
    from perturb.recipe import Recipe
    from perturb.result import Result
    from perturb.run import Progress

POLL_S = 0.6
PREVIEW_S = 0.15
VIEWS = {"picture": "H&E", "nuclei": "Nuclei", "difference": "Difference"}
LAST_SEED = 2**53 - 1
"""The largest whole number that a browser keeps exactly."""
SEED_CHOICES = (6, 8, 12, 16, 24, 32, 64)
BLANK = "<div class='blank'>Move a gene, and the edited niche<br>is drawn here from the same noise.</div>"
SOLVERS = {"dpm++": "DPM-Solver++ (fast)", "ddim": "DDIM", "ddpm": "DDPM (slow, 1000 steps)"}


def niche_panel(experiment: Experiment, source: H5adSource, model: GE2Hist, profile: Profile) -> Result | None:
    """Draw the niches; the result that is shown, None while a full run is under way or when drawing failed."""
    recipe = experiment.recipe
    _title(experiment, profile)
    result = _ui.get_result(recipe) if recipe != recipe.draft else None
    state = None if result is not None else _ui.job(recipe)
    running = state is not None and not state.over
    view, types, picture = _view_controls(recipe, result)
    shown = None
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
    return shown


def _title(experiment: Experiment, profile: Profile) -> None:
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key="chips"):
        more = len(experiment.recipe.cell_ids) - 1
        st.markdown(f"#### Niche of {_ui.plain(profile.cell_id)}{f' and {more} more' * bool(more)}")
        now = experiment.recipe.perturbation
        for part in now.parts:
            single = isinstance(part, Edit)
            st.button(
                _ui.plain(describe(part)),
                icon=":material/close:",
                icon_position="right",
                help="Undo this edit",
                key=f"chip {part.gene}" if single else f"chip set {part.name}",
                on_click=experiment.edit,
                args=(with_edit(now, part.gene, None) if single else with_set(now, part.name, None),),
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
        if result is not None and len(recipe.cell_ids) > 1:
            cells = list(recipe.cell_ids)
            cell = st.selectbox(
                "Cell shown",
                cells,
                key=f"shown of {len(cells)}",
                format_func=lambda name: f"Cell {name}",
                label_visibility="collapsed",
                width=190,
            )
            picture = cells.index(cell) * len(recipe.seeds)
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
            picture += seeds.index(seed)
    types: list[str] = list(READER_CLASSES)
    if view == "nuclei":
        rules = (
            f".st-key-types button:nth-of-type({i})::before {{ background: {colour_of(name)}; }}"
            for i, name in enumerate(READER_CLASSES, start=1)
        )
        st.html(f"<style>{''.join(rules)}</style>")
        types = st.pills(
            "Nuclei types",
            READER_CLASSES,
            selection_mode="multi",
            default=READER_CLASSES,
            key="types",
            label_visibility="collapsed",
            wrap=True,
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
    for slot, arm, title in zip(
        slots, ("base", "edited"), ("Before: unedited", "After: edited, same noise"), strict=True
    ):
        with slot.container(key=f"tile-{arm}", gap="small"):
            if arm == "edited" and not recipe.perturbation:
                st.html(BLANK)
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
            st.caption(f"{what} · seed {recipe.seeds[picture % len(recipe.seeds)]} · {n} nuclei read")


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
                    st.image(_ui.enlarged(image), width="stretch", alt="Generated picture of the niche, taking shape")
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
        # Several seeds are in work at once; the last of each arm is shown.
        for arm, (picture, image) in {arm: (picture, image) for arm, picture, image in pictures}.items():
            with columns[arm == "edited"]:
                st.image(_ui.enlarged(image), width="stretch", alt="Generated picture of the niche, taking shape")
                st.caption(
                    f"{'After' if arm == 'edited' else 'Before'} · seed {recipe.seeds[picture % len(recipe.seeds)]}, "
                    "taking shape"
                )
        if progress is None:
            waiting = f"Waiting for {state.position} run(s) before this one" if state.position else "Starting"
            st.progress(0.0, text=waiting)
        else:
            st.progress(progress.fraction, text=f"{progress.text}: {progress.fraction:.0%}")


def _run_bar(experiment: Experiment, source: H5adSource, model: GE2Hist, result: Result | None, state: Any) -> None:
    recipe = experiment.recipe
    other = st.session_state.get("running")
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key="run-bar"):
        if state is not None and not state.over:
            st.button("Cancel", icon=":material/stop_circle:", key="cancel", on_click=_ui.cancel, args=(recipe,))
        elif result is None:
            st.button(
                _run_label(recipe),
                type="primary",
                icon=":material/play_arrow:",
                key="run",
                on_click=_ui.safely(_ui.submit),
                args=(recipe, model, source),
                disabled=not recipe.perturbation or recipe == recipe.draft,
                help=f"Draws {2 * len(recipe.cell_ids) * len(recipe.seeds):,} niches, with and without the edit from "
                "each seed's noise, and compares them with intervals.",
            )
        with st.popover("Settings", icon=":material/tune:"):
            _settings(experiment, source)
        if result is None and not (state is not None and not state.over):
            st.caption(
                "Draft: one draw from one seed." if recipe.perturbation else "Draft: one draw from one seed, unedited."
            )
    if state is not None and state.status == "failed":
        st.error(_ui.plain(state.message), icon=":material/error:")
    elif state is not None and state.status == "cancelled":
        st.caption("The run was cancelled; nothing was changed.")
    if other is not None and other != recipe and (job := _ui.job(other)) is not None and not job.over:
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            st.caption(f"Still drawing the run of “{_ui.plain(other.perturbation)}”.")
            st.button("Cancel it", key="cancel other", type="tertiary", on_click=_ui.cancel, args=(other,))


def _run_label(recipe: Recipe) -> str:
    cells, seeds = len(recipe.cell_ids), len(recipe.seeds)
    if recipe == recipe.draft:
        return "Choose more seeds to compare"
    over = f"{seeds} seed{'s' * (seeds > 1)}"
    return f"Compare over {over}" if cells == 1 else f"Compare {cells} cells over {over}"


def _settings(experiment: Experiment, source: H5adSource) -> None:
    recipe = experiment.recipe
    alike = 1
    if source.cell_type is not None:
        of_type = source.cell_type == source.cell_type[source.index_of(recipe.cell_ids[0])]
        alike = int((of_type & ~source.empty).sum())
    values = {
        "n cells": len(recipe.cell_ids),
        "n seeds": len(recipe.seeds),
        "solver": recipe.sample.solver,
        "steps": recipe.sample.steps,
        "guidance": recipe.sample.guidance,
        "first seed": min(recipe.seeds[0], LAST_SEED),
    }
    for name, value in values.items():
        st.session_state[name] = value
    change = {"on_change": _ui.safely(_set_sampling), "args": (experiment,)}
    st.number_input(
        f"Cells of this type (of {alike:,})",
        1,
        max(alike, len(recipe.cell_ids)),
        key="n cells",
        on_change=_ui.safely(_set_cells),
        args=(experiment, source),
        disabled=alike == 1,
        help="The edit is made in each of them. With several cells the intervals run over cells and seeds.",
    )
    st.selectbox("Seeds to compare", sorted({*SEED_CHOICES, len(recipe.seeds)}), key="n seeds", **change)
    st.number_input("First seed", 0, LAST_SEED, key="first seed", **change)
    st.selectbox(
        "Solver",
        list(SOLVERS),
        key="solver",
        format_func=SOLVERS.__getitem__,
        help="How noise is turned into a picture, step by step. The fast one gives nearly the same pictures.",
        **change,
    )
    st.number_input(
        "Denoising steps",
        1,
        1000,
        key="steps",
        help="More steps cost more time; too few spread the pictures too little. Drafts take at most 50.",
        **change,
    )
    st.number_input(
        "Guidance",
        0.0,
        10.0,
        step=0.5,
        key="guidance",
        help="1: the model as trained. Above 1 pictures follow the cell more strongly than the training data do; "
        "0 leaves the cell out.",
        **change,
    )


def _set_cells(experiment: Experiment, source: H5adSource) -> None:
    from perturb.run import cells_like

    cell_ids = cells_like(source, experiment.recipe.cell_ids[0], int(st.session_state["n cells"]))
    recipe = replace(experiment.recipe, cell_ids=cell_ids)
    _ui.check_recipe(recipe, source)
    experiment.recipe = recipe


def _set_sampling(experiment: Experiment) -> None:
    state = st.session_state
    first, n = int(state["first seed"]), int(state["n seeds"])
    seeds = experiment.recipe.seeds
    if (first, n) != (min(seeds[0], LAST_SEED), len(seeds)):  # seeds of a link need not be a range
        seeds = tuple(range(first, first + n))
    solver, steps = state["solver"], int(state["steps"])
    if solver != experiment.recipe.sample.solver:
        steps = {"ddpm": 1000, "ddim": 50}.get(solver, SampleConfig().steps)
    sample = SampleConfig(solver, steps, float(state["guidance"]))
    experiment.recipe = replace(experiment.recipe, sample=sample, seeds=seeds)
