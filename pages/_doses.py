"""Dose response of a signature, under the pictures of the Explore page."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import streamlit as st

from pages import _ui
from pages._signatures import known_signatures
from perturb.edits import EditSet

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd

    from ge2hist_core.model import GE2Hist
    from perturb.grn import Network
    from perturb.result import Result
    from perturb.signatures import Signature

SEEDS = 8
"""Seeds per dose, at most: seven doses cost seven comparisons."""


def dose_panel(result: Result, model: GE2Hist) -> None:
    """Draw seven doses of a signature, and what came of it."""
    experiment = st.session_state["experiment"]
    source = _ui.get_source(experiment.path, model, result.recipe.matrix, result.recipe.gene_column)
    known, lost = _at_hand(result, list(source.genes))
    if lost:
        st.caption(
            f"The signature of {_ui.plain(', '.join(lost))} in this link or recipe is not at hand, or another one has "
            "its name: upload its file again to vary its dose."
        )
    if not known:
        return
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        name = st.selectbox("Signature", list(known), key="dosed", width=280)
        maximum = st.selectbox("Up to dose", (1.0, 2.0, 4.0, -1.0, -2.0, -4.0), index=1, key="largest dose", width=140)
    signature = known[name]
    from perturb.doses import dose_series, load_doses, series_key

    recipe = replace(experiment.recipe, seeds=experiment.recipe.seeds[:SEEDS])
    series = dose_series(recipe, signature, list(source.genes), maximum)
    key = series_key(series)
    table = load_doses(series, _ui.get_cache())
    if table is not None:
        _show(table, signature)
        st.download_button(
            "Report (ZIP)",
            partial(_report, series, table, signature, result, _ui.network_of(recipe)),
            f"ge2hist-doses-{key[:8]}.zip",
            "application/zip",
            key="download dose report",
            on_click="ignore",
            icon=":material/download:",
        )
        return
    pictures = 7 * len(recipe.cell_ids) * len(recipe.seeds)
    label = f"Draw seven doses over {len(recipe.seeds)} seeds ({pictures:,} pictures)"
    _ui.offer(key, label, partial(_prepare, series, model, source, recipe), name="run doses")


def _report(series: Any, table: pd.DataFrame, signature: Signature, result: Result, network: Network | None) -> bytes:
    from perturb.dose_report import zip_bytes
    from perturb.wording import Origin

    return zip_bytes(series, table, signature, Origin.of_result(result), network)


def _at_hand(result: Result, genes: list[str]) -> tuple[dict[str, Signature], list[str]]:
    """Signatures that made the result's sets with a dose, by name, and names of sets whose signature is not known."""
    from perturb.doses import comes_from
    from perturb.signatures import load_library

    known, found, lost = known_signatures(), {}, []
    for part in result.recipe.perturbation.parts:
        if not isinstance(part, EditSet) or part.dose is None:
            continue
        likely = [known[part.name]] if part.name in known else []
        likely += [signature for signature in load_library() if signature.name == part.name]
        match = next((one for one in likely if comes_from(part, one, genes)), None)
        if match is None:
            lost.append(part.name)
        else:
            found[part.name] = match
    return found, lost


def _prepare(series: Any, model: GE2Hist, source: Any, recipe: Any) -> Callable[..., object]:
    from perturb.doses import run_doses

    cells, network = _ui.get_cells(recipe, source), _ui.network_of(recipe)
    return partial(run_doses, series, model, cells, _ui.get_cache(), network=network)


def _show(table: pd.DataFrame, signature: Signature) -> None:
    from perturb import charts
    from perturb.doses import hill_curve, respond

    names = list(dict.fromkeys(table["readout"]))
    readout = st.selectbox("Readout", names, key="dose readout", width=280)
    found = respond(table, readout)
    curve = None if found.hill is None else hill_curve(found.hill, table["dose"].to_numpy())
    figure = charts.dose_response(table, readout, signature.dose_unit, _ui.theme(), curve)
    st.plotly_chart(figure, theme=None, key="dose chart", config=charts.CHART_CONFIG)
    if found.plateau:
        st.caption(f"Plateau from dose {found.plateau_from:g}: a larger dose changes nothing more.")
    if found.hill is None:
        st.caption(f"No half-effective dose: {_ui.plain(found.reason)}")
    else:
        h = found.hill
        interval = f"{h.ec50_low:.3g} to {h.ec50_high:.3g}"
        st.caption(f"Half-effective dose {h.ec50:.3g} (95 % interval {interval}), slope {h.slope:.2g}.")
    st.download_button("Table (CSV)", _ui.csv(table), "doses.csv", "text/csv", key="download doses")
