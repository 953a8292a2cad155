"""Preview and download of the report; replay of a recipe that someone saved."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import streamlit as st

from ge2hist_core.types import BadInput
from pages import _ui
from pages._experiment import Experiment

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist


def page() -> None:
    model = _ui.get_model()
    opened = _ui.open_experiment(model)
    _ui.show_message()
    with st.sidebar:
        _replay(model)
    if opened is None:
        st.info("There are no cells here yet: upload an `.h5ad` file on the Explore page first.")
        return
    experiment, source = opened
    _ui.write_address(experiment)
    recipe = experiment.recipe
    st.markdown("#### Report")
    running = _ui.job(recipe)
    if running is not None and not running.over:
        st.fragment(_wait, run_every=1.0)(experiment)
        return
    if running is not None and running.status == "failed":
        st.error(_ui.plain(running.message), icon=":material/error:")
    result = _ui.get_result(recipe) or _ui.get_result(recipe.draft)
    if result is None or not recipe.perturbation:
        with st.container(border=True, key="empty-report"):
            st.subheader("Nothing to report yet")
            st.markdown(
                "Choose a cell and edit a gene on the Explore page, then compare over several seeds. "
                "Or replay a recipe that was saved before: upload it on the left."
            )
            st.page_link("pages/explore.py", label="Go to Explore", icon=":material/biotech:")
        return
    if len(result.recipe.seeds) < len(recipe.seeds):
        st.caption("This is the draft of one seed. Compare over several seeds for intervals:")
        st.button(
            f"Compare over {len(recipe.seeds)} seeds",
            type="primary",
            icon=":material/play_arrow:",
            key="run",
            on_click=_ui.safely(_ui.submit),
            args=(recipe, model, source),
        )
    _ui.downloads(result)
    st.iframe(_ui.report_html(result.recipe.hash, result), height=900, alt="Preview of the report")


def _wait(experiment: Experiment) -> None:
    with _ui.guard():
        state = _ui.job(experiment.recipe)
        if state is None or state.over:
            st.rerun()
        fraction = state.progress.fraction if state.progress else 0.0
        st.progress(fraction, text=f"Drawing and comparing: {fraction:.0%}")
        st.button("Cancel", icon=":material/stop_circle:", on_click=_ui.cancel, args=(experiment.recipe,))


def _replay(model: GE2Hist) -> None:
    st.markdown("#### Replay a recipe")
    st.caption("A recipe says all that determines a result: with the same cells and model it gives the same pictures.")
    uploaded = st.file_uploader("Upload recipe.json", type="json", key="recipe file", max_upload_size=1)
    if uploaded is None:
        return
    with _ui.guard():
        experiment = _read(uploaded, model)
        recipe = experiment.recipe
        edits = _ui.plain(recipe.perturbation) or "no edit"
        st.markdown(f"**{_ui.plain(', '.join(recipe.cell_ids))}** · {edits} · {len(recipe.seeds)} seeds")
        st.button("Replay it", type="primary", key="replay", on_click=_ui.safely(_start), args=(experiment, model))


def _read(uploaded: Any, model: GE2Hist) -> Experiment:
    from perturb.recipe import Recipe

    try:
        text = uploaded.getvalue().decode()
    except UnicodeDecodeError:
        raise BadInput(f"{uploaded.name} is not a text file: give a recipe.json that GE2Hist wrote.") from None
    recipe = Recipe.from_json(text)
    if recipe.model_sha256 != model.sha256:
        raise BadInput(
            f"The recipe was made with model {recipe.model_sha256[:12]}, this app has {model.sha256[:12]}: "
            "start the app with that bundle, or make the recipe again."
        )
    path = _ui.find_data(recipe.data_sha256, model)
    _ui.check_recipe(recipe, _ui.get_source(path, model, recipe.matrix, recipe.gene_column))
    return Experiment(recipe, path)


def _start(experiment: Experiment, model: GE2Hist) -> None:
    recipe = experiment.recipe
    st.session_state["experiment"] = replace(experiment)
    source = _ui.get_source(experiment.path, model, recipe.matrix, recipe.gene_column)
    if _ui.get_result(recipe) is None:
        _ui.submit(recipe, model, source)


with _ui.guard():
    page()
