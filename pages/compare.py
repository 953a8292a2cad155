"""Several scenarios side by side on the same noise: pictures, effects, one table."""

from __future__ import annotations

import uuid
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import streamlit as st

from ge2hist_core.types import BadInput
from pages import _tables, _ui
from perturb.workspace import (
    MAX_AGE_DAYS,
    MAX_SCENARIOS,
    Workspace,
    contrast_table,
    effects_table,
    load_workspace,
    save_workspace,
)

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from ge2hist_core.data import H5adSource
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.types import Cells
    from pages._experiment import Experiment
    from perturb.cache import DiskCache
    from perturb.grn import Network
    from perturb.recipe import Recipe
    from perturb.result import Result
    from perturb.run import Progress


def page() -> None:
    model = _ui.get_model()
    opened = _ui.open_experiment(model)
    _ui.show_message()
    st.markdown("#### Compare scenarios")
    if opened is None:
        st.info("There are no cells here yet: upload an `.h5ad` file on the Explore page first.")
        return
    experiment, source = opened
    workspace = current_workspace()
    with st.sidebar:
        _file(workspace)
    _add(experiment, workspace)
    if not len(workspace):
        with st.container(border=True, key="empty-compare"):
            st.subheader("No scenario yet")
            st.markdown(
                "A scenario is a cell with its edits. Edit a gene on the Explore page, come back and add it here; two "
                "or more are compared on the same noise."
            )
            st.page_link("pages/explore.py", label="Go to Explore", icon=":material/biotech:")
    else:
        _list(workspace, experiment)
        with _ui.guard():
            _compare(workspace, model, source)
    kept = st.session_state["workspace id"]
    _ui.write_address(experiment, {} if kept is None else {"workspace": kept})


def current_workspace() -> Workspace:
    """This tab's workspace: from the session, or from the disk where the address names one.

    What was opened by its address belongs to whoever made it: the first change here is saved under another id.
    """
    state = st.session_state
    if "workspace" not in state:
        state["workspace"], state["workspace past"] = Workspace(), []
        state["workspace id"], state["workspace is mine"] = None, False
        wanted = st.query_params.get("workspace")
        if wanted:
            try:
                found = load_workspace(_folder(), wanted)
                if found is None:
                    raise BadInput(
                        f"The scenarios of this link are not here: they are removed {MAX_AGE_DAYS} days after their "
                        "last use."
                    )
                state["workspace"], state["workspace id"] = found, wanted
            except BadInput as error:
                st.warning(_ui.plain(f"{error} This is a new, empty list."), icon=":material/warning:")
    return state["workspace"]


def _folder() -> Path:
    return _ui.home() / "workspaces"


def _become(workspace: Workspace) -> None:
    state = st.session_state
    _save(workspace)
    state["workspace past"].append(state["workspace"])
    state["workspace"] = workspace


def _undo() -> None:
    state = st.session_state
    _save(state["workspace past"][-1])
    state["workspace"] = state["workspace past"].pop()


def _save(workspace: Workspace) -> None:
    state = st.session_state
    if not state["workspace is mine"]:
        state["workspace id"], state["workspace is mine"] = uuid.uuid4().hex, True
    save_workspace(workspace, _folder(), state["workspace id"])


def _add(experiment: Experiment, workspace: Workspace) -> None:
    edits = str(experiment.recipe.perturbation) or "unedited"
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.button(
            "Add what Explore shows",
            icon=":material/add:",
            key="add scenario",
            on_click=_ui.safely(lambda: _become(workspace.added(edits[:60], experiment.recipe))),
            disabled=len(workspace) >= MAX_SCENARIOS,
        )
        st.button(
            ":material/undo:",
            help="Undo the last change of this list",
            key="undo scenarios",
            on_click=_ui.safely(_undo),
            disabled=not st.session_state["workspace past"],
        )
        st.caption(f"Explore shows cell {_ui.plain(experiment.recipe.cell_ids[0])}: {_ui.plain(edits[:120])}")


def _list(workspace: Workspace, experiment: Experiment) -> None:
    for i, scenario in enumerate(workspace.scenarios):
        with st.container(horizontal=True, vertical_alignment="center", gap="small", key=f"scenario {i}"):
            st.session_state[f"scenario name {i}"] = scenario.name
            st.text_input(
                f"Name of scenario {i + 1}",
                key=f"scenario name {i}",
                on_change=_ui.safely(_rename),
                args=(workspace, i),
                label_visibility="collapsed",
                width=320,
            )
            for icon, text, key, change in (
                (":material/arrow_upward:", "Move up", "up", lambda i=i: workspace.moved(i, -1)),
                (":material/arrow_downward:", "Move down", "down", lambda i=i: workspace.moved(i, 1)),
                (":material/content_copy:", "Duplicate", "copy", lambda i=i: workspace.duplicated(i)),
                (":material/delete:", "Delete", "delete", lambda i=i: workspace.removed(i)),
            ):
                st.button(
                    icon,
                    help=f"{text} scenario {i + 1}",
                    key=f"{key} scenario {i}",
                    type="tertiary",
                    on_click=_ui.safely(lambda change=change: _become(change())),
                )
            recipe = scenario.recipe
            st.caption(
                f"cell {_ui.plain(recipe.cell_ids[0])} · {_ui.plain(str(recipe.perturbation)[:100]) or 'no edit'}"
            )


def _rename(workspace: Workspace, i: int) -> None:
    _become(workspace.renamed(i, st.session_state[f"scenario name {i}"].strip()))


def _file(workspace: Workspace) -> None:
    from perturb.page import json_bytes, noted

    st.markdown("#### Workspace")
    st.caption(
        f"The list is kept on this server until {MAX_AGE_DAYS} days after it was last saved or opened. Whoever opens "
        "this page's address sees it; what they change is saved as their own list. As a file it can be taken "
        "elsewhere, with the same cells and model."
    )
    st.download_button(
        "Save as a file",
        json_bytes(noted(workspace.to_dict())),
        "workspace.json",
        "application/json",
        key="download workspace",
        on_click="ignore",
        icon=":material/download:",
    )
    turn = st.session_state.setdefault("workspace turn", 0)
    uploaded = st.file_uploader("Open a workspace file", type="json", key=f"workspace file {turn}", max_upload_size=5)
    if uploaded is not None:
        with _ui.guard():
            text = uploaded.getvalue().decode("utf-8", errors="replace")
            _become(Workspace.from_json(text))
            st.session_state["workspace turn"] = turn + 1
            st.rerun()


def _compare(workspace: Workspace, model: GE2Hist, source: H5adSource) -> None:
    recipes = workspace.on_shared_noise
    others = [
        recipe for recipe in recipes if recipe.data_sha256 != source.sha256 or recipe.model_sha256 != model.sha256
    ]
    if others:
        st.warning("A scenario was made with other cells or another model: open those on the Explore page first.")
        return
    for recipe in recipes:
        _ui.in_use(recipe, source.path)
    for sentence in workspace.changed_for_noise:
        st.caption(f":material/info: {_ui.plain(sentence)}")
    results = [_ui.get_result(recipe) for recipe in recipes]
    missing = [recipe for recipe, result in zip(recipes, results, strict=True) if result is None]
    if missing:
        _draw(missing, model, source.path)
        return
    drawn = [result for result in results if result is not None]
    names = [scenario.name for scenario in workspace.scenarios]
    seed = st.selectbox("Noise seed shown", recipes[0].seeds, key="seed compared", width=170)
    place = recipes[0].seeds.index(seed)
    for start in range(0, len(names), 4):
        for column, name, result in zip(
            st.columns(4), names[start : start + 4], drawn[start : start + 4], strict=False
        ):
            column.image(
                _ui.tile_png(result.recipe.hash, "edited", place, "picture", (), result),
                width="stretch",
                alt=f"Generated H&E picture of scenario {name}",
            )
            column.caption(_ui.plain(name))
    reference = _effects(names, drawn)
    st.download_button(
        "Report (ZIP)",
        lambda: _report(workspace, drawn, model, source.path, reference),
        "scenarios.zip",
        "application/zip",
        key="download comparison",
        on_click="ignore",
        icon=":material/download:",
    )


def _report(workspace: Workspace, results: list[Result], model: GE2Hist, path: Path, reference: str) -> bytes:
    from perturb.compare import zip_bytes

    return zip_bytes(workspace, results, [_cells(result.recipe, model, path) for result in results], reference)


def _cells(recipe: Recipe, model: GE2Hist, path: Path) -> Cells:
    """The recipe's cells, read with the recipe's own matrix and gene column."""
    return _ui.get_cells(recipe, _ui.get_source(path, model, recipe.matrix, recipe.gene_column))


def _effects(names: list[str], results: list[Result]) -> str:
    """Charts and tables of one readout. Returns the name of the reference scenario."""
    from perturb import charts
    from perturb.compare import contrast_chart

    table = effects_table(names, results)
    readouts = list(dict.fromkeys(table["readout"]))
    readout = st.selectbox("Readout", readouts, key="readout compared", width=280)
    n = len(results[0].recipe.seeds)
    st.markdown("##### Edited against unedited")
    figure = charts.scenarios(table, readout, _ui.theme())
    st.plotly_chart(figure, theme=None, key="scenarios", config=charts.CHART_CONFIG)
    shown = table[table["readout"] == readout].drop(columns="readout").set_index("scenario").reset_index()
    _tables.show(shown)
    st.caption(
        f"Effect: edited minus unedited over {n} noise seeds that all scenarios share, with its 95 % interval. "
        "q is adjusted within each scenario."
    )
    st.download_button("Table (CSV)", _ui.csv(table), "scenarios.csv", "text/csv", key="download scenarios")
    if len(names) < 2:
        return names[0]
    st.markdown("##### Scenario against scenario")
    reference = st.selectbox("Reference scenario", names, key="reference scenario", width=320)
    contrasts = contrast_table(names, results, reference)
    rows = contrasts[contrasts["readout"] == readout]
    if len(rows):
        figure = contrast_chart(contrasts, readout, reference, _ui.theme())
        st.plotly_chart(figure, theme=None, key="contrasts", config=charts.CHART_CONFIG)
        _tables.show(rows.drop(columns=["readout", "reference"]))
    else:
        st.caption(f"No scenario's pictures show {_ui.plain(readout)}.")
    st.caption(
        f"Effect: the scenario's edited pictures minus the reference's, paired over the {n} noise seeds that both "
        "share, with its 95 % interval. Scenarios of the same cells are paired cell by cell, those of other cells by "
        "their mean over the cells; the last column says what the interval covers. q is adjusted within each scenario."
    )
    st.download_button("Differences (CSV)", _ui.csv(contrasts), "contrasts.csv", "text/csv", key="download contrasts")
    return reference


def _draw(missing: list[Recipe], model: GE2Hist, path: Path) -> None:
    def prepare() -> Callable[..., object]:
        inputs = [(_cells(recipe, model, path), _ui.network_of(recipe)) for recipe in missing]
        return partial(_draw_all, missing, inputs, model, _ui.get_cache())

    pictures = 2 * sum(len(recipe.cell_ids) * len(recipe.seeds) for recipe in missing)
    label = f"Draw {len(missing)} scenario{'s' * (len(missing) > 1)} (at most {pictures:,} pictures)"
    _ui.offer("scenarios " + " ".join(recipe.hash for recipe in missing), label, prepare, name="draw scenarios")


def _draw_all(
    recipes: list[Recipe],
    inputs: list[tuple[Cells, Network | None]],
    model: GE2Hist,
    cache: DiskCache,
    *,
    on_progress: Callable[[Progress], None],
    cancel: threading.Event,
) -> None:
    from perturb.run import Progress, run

    for i, (recipe, (cells, network)) in enumerate(zip(recipes, inputs, strict=True)):

        def report(progress: Progress, i: int = i) -> None:
            text = f"Scenario {i + 1} of {len(recipes)}"
            on_progress(Progress((i + progress.fraction) / len(recipes), text, progress.preview))

        run(recipe, model, cells, network=network, cache=cache, on_progress=report, cancel=cancel)


with _ui.guard():
    page()
