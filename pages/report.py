"""Preview and download of the report; replay of a report or recipe that someone saved."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import streamlit as st

from ge2hist_core.types import BadInput
from pages import _ui
from pages._downloads import result_downloads
from pages._experiment import Experiment
from pages._lights import evidence_of, gather_button

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ge2hist_core.model import GE2Hist
    from perturb.grn import Network
    from perturb.recipe import Recipe
    from perturb.replay import SavedReport

MAX_UPLOAD_MB = 200


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
    if _ui.under_way(recipe.hash):
        return
    result = _ui.get_result(recipe) or _ui.get_result(recipe.draft)
    if result is None or not recipe.perturbation:
        with st.container(border=True, key="empty-report"):
            st.subheader("Nothing to report yet")
            st.markdown(
                "Choose a cell and edit a gene on the Explore page, then compare over several seeds. "
                "Or replay a report or recipe that was saved before: upload it on the left."
            )
            st.page_link("pages/explore.py", label="Go to Explore", icon=":material/biotech:")
        return
    if result.recipe != recipe:
        cells, seeds = len(recipe.cell_ids), len(recipe.seeds)
        of = f" of the {cells}" if cells > 1 else ""
        st.caption(f"This is a draft: the first cell{of} with one seed. Draw the whole comparison for its intervals:")
        many = f"{cells} cells over " if cells > 1 else "over "
        st.button(
            f"Compare {many}{seeds} seed{'s' * (seeds > 1)}",
            type="primary",
            icon=":material/play_arrow:",
            key="run",
            on_click=_ui.safely(_ui.submit),
            args=(recipe, model, source),
        )
    evidence, complete = evidence_of(result, model, source)
    if evidence is not None and not complete:
        st.caption("The report holds the evidence that is at hand. Gather the rest to have it in the report:")
        gather_button(result, model, source)
    result_downloads(result, evidence, lambda: _ui.get_cells(result.recipe, source))
    st.iframe(_ui.report_html(result, evidence), height=900, alt="Preview of the report")


def _replay(model: GE2Hist) -> None:
    st.markdown("#### Replay")
    st.caption(
        "A report is run again from nothing and its numbers are compared. A recipe says all that determines a result: "
        "with the same cells and model it gives the same pictures."
    )
    uploaded = st.file_uploader(
        "Upload a report (HTML, ZIP) or recipe (JSON)",
        type=["html", "zip", "json"],
        key="recipe file",
        max_upload_size=MAX_UPLOAD_MB,
    )
    if uploaded is None:
        return
    with _ui.guard():
        if uploaded.name.lower().endswith(".json"):
            experiment = _read(uploaded, model)
            _describe(experiment.recipe.perturbation, experiment.recipe, len(experiment.recipe.seeds))
            st.button("Replay it", type="primary", key="replay", on_click=_ui.safely(_start), args=(experiment, model))
        else:
            _report(uploaded, model)


def _describe(edits: object, recipe: Recipe, seeds: int) -> None:
    cells = _ui.plain(", ".join(recipe.cell_ids))
    st.markdown(f"**{cells}** · {_ui.plain(edits) or 'no edit'} · {seeds} seed{'s' * (seeds > 1)}")


def _report(uploaded: Any, model: GE2Hist) -> None:
    """An uploaded report: what it is, a button, progress, the verdict."""
    from perturb.goal import Goal
    from perturb.recipe import Recipe
    from perturb.replay import changed_versions, parse_report
    from perturb.screen import Screen
    from perturb.workspace import Workspace

    content = uploaded.getvalue()
    saved = parse_report(content, uploaded.name)
    path = [_place(recipe, model, saved.network_of(recipe)) for recipe in saved.recipes][-1]
    if isinstance(saved.what, Screen | Goal):
        kind = "screen of" if isinstance(saved.what, Screen) else "search among"
        of = f"{kind} {len(saved.what.candidates)} candidates, {saved.what.pictures} pictures"
        _describe(of, saved.recipe, len(saved.what.first_seeds) + len(saved.what.further_seeds))
    else:
        many = f"{len(saved.recipes)} {'scenarios' if isinstance(saved.what, Workspace) else 'doses'}"
        of = str(saved.what.perturbation) if isinstance(saved.what, Recipe) else many
        _describe(of, saved.recipe, len(saved.recipe.seeds))
    key = hashlib.sha256(b"replay" + content).hexdigest()
    verdict = _ui.get_cache().load_json(key)
    label = "Replay it" if verdict is None else "Replay it again"
    prepare = partial(_prepare, key, saved, path, model)
    if _ui.offer(key, label, prepare, name="replay", primary=verdict is None) or verdict is None:
        return
    show = st.success if verdict["same"] else st.error
    show(_ui.plain(verdict["verdict"]), icon=":material/check:" if verdict["same"] else ":material/error:")
    if not verdict["same"] and (why := changed_versions(saved)):
        st.caption(_ui.plain(why))
    if isinstance(saved.what, Recipe):
        st.button("Open it", key="open replayed", on_click=_ui.safely(_open), args=(saved, model))


def _prepare(key: str, saved: SavedReport, path: Path, model: GE2Hist) -> Callable[..., object]:
    from perturb.workspace import Workspace

    cache = _ui.get_cache()
    each = [
        _ui.get_cells(recipe, _ui.get_source(path, model, recipe.matrix, recipe.gene_column))
        for recipe in (saved.recipes if isinstance(saved.what, Workspace) else (saved.recipe,))
    ]
    cells = each if isinstance(saved.what, Workspace) else each[0]

    def task(**how: Any) -> None:
        from perturb.replay import rerun

        found = rerun(saved, model, cells, cache=cache, **how)
        cache.store_json(key, {"same": found.same, "verdict": found.verdict})

    return task


def _open(saved: SavedReport, model: GE2Hist) -> None:
    st.session_state["experiment"] = Experiment(saved.recipe, _place(saved.recipe, model, saved.network))


def _place(recipe: Recipe, model: GE2Hist, network: Network | None = None) -> Path:
    """Where the recipe's cells are. The network that its report brings is kept, so that the recipe can be drawn here.

    Raises
    ------
    BadInput: a recipe for another model; cells, genes or a network that are not here.
    """
    from perturb.networks import keep_network

    if recipe.model_sha256 != model.sha256:
        raise BadInput(
            f"The recipe was made with model {recipe.model_sha256[:12]}, this app has {model.sha256[:12]}: "
            "start the app with that bundle, or make the recipe again."
        )
    path = _ui.find_data(recipe.data_sha256, model)
    if network is not None and recipe.propagation is not None:
        if network.sha256 != recipe.propagation.network_sha256:
            raise BadInput(
                f"The report brings the network {network.sha256[:12]}, its recipe names "
                f"{recipe.propagation.network_sha256[:12]}: write the report again."
            )
        keep_network(network, _ui.networks_folder())
    _ui.check_recipe(recipe, _ui.get_source(path, model, recipe.matrix, recipe.gene_column))
    return path


def _read(uploaded: Any, model: GE2Hist) -> Experiment:
    from perturb.recipe import Recipe

    try:
        text = uploaded.getvalue().decode()
    except UnicodeDecodeError:
        raise BadInput(f"{uploaded.name} is not a text file: give a recipe.json that GE2Hist wrote.") from None
    recipe = Recipe.from_json(text)
    return Experiment(recipe, _place(recipe, model))


def _start(experiment: Experiment, model: GE2Hist) -> None:
    recipe = experiment.recipe
    path = _place(recipe, model)
    if _ui.get_result(recipe) is None:
        _ui.submit(recipe, model, _ui.get_source(path, model, recipe.matrix, recipe.gene_column))
    st.session_state["experiment"] = replace(experiment)


with _ui.guard():
    page()
