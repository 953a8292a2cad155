"""Below the pictures of the Explore page: numbers, charts, all seeds, the denoising, downloads."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import streamlit as st

from pages import _tables, _ui
from pages._doses import dose_panel
from pages._downloads import result_downloads
from pages._lights import evidence_of, gather_button, lights
from pages._network import spread_section
from perturb.edits import EditSet

if TYPE_CHECKING:
    from ge2hist_core.data import H5adSource
    from ge2hist_core.model import GE2Hist
    from perturb.result import Result

SECTIONS = ("Charts", "All seeds", "Denoising", "Table", "Network", "Doses")


def results(result: Result, model: GE2Hist, source: H5adSource) -> None:
    if not result.recipe.perturbation:
        return
    _headline(result)
    evidence, complete = evidence_of(result, model, source)
    if evidence is not None:
        lights(result, evidence)
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            if not complete:
                gather_button(result, model, source)
            st.page_link("pages/evidence.py", label="All evidence", icon=":material/fact_check:")
    for warning in result.warnings:
        st.caption(f":material/warning: {_ui.plain(warning)}")
    dosed = [part for part in result.recipe.perturbation.parts if isinstance(part, EditSet) and part.dose is not None]
    there = {"Network": result.network is not None, "Doses": bool(dosed)}
    shown = [name for name in SECTIONS if there.get(name, True)]
    if st.session_state.get("section") not in shown:
        st.session_state["section"] = SECTIONS[0]
    section = st.segmented_control("Results", shown, key="section", label_visibility="collapsed", required=True)
    {
        "Charts": _charts,
        "All seeds": _all_seeds,
        "Denoising": _denoising,
        "Table": _table,
        "Network": lambda result, model: spread_section(result),
        "Doses": dose_panel,
    }[section](result, model)
    result_downloads(result, evidence, lambda: _ui.get_cells(result.recipe, source))


def _headline(result: Result) -> None:
    rows = result.comparison.set_index("readout")
    over = "seeds" if len(result.recipe.cell_ids) == 1 else "cells and seeds"
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
            delta_arrow="off",
            help="Mean before and after; below, the mean paired difference"
            + (f" with its 95 % interval over {over}." if interval else ", of one seed alone."),
        )


def _charts(result: Result, model: GE2Hist) -> None:
    from perturb import charts

    theme = _ui.theme()
    if len(result.recipe.seeds) == 1:
        st.caption("One seed: no intervals. Compare over several seeds to see how far the noise alone moves these.")
    show = {"theme": None, "config": charts.CHART_CONFIG}
    st.plotly_chart(charts.density(result.summary, theme), key="density", **show)
    st.plotly_chart(charts.composition(result.summary, theme), key="composition", **show)
    st.plotly_chart(charts.spacing(result.readouts, result.summary, theme), key="spacing", **show)


def _all_seeds(result: Result, model: GE2Hist) -> None:
    for column, arm, title in zip(st.columns(2), ("base", "edited"), ("Before", "After"), strict=True):
        column.image(_ui.sheet_png(result.recipe.hash, arm, result), width="stretch", alt=f"All seeds, {title}")
        cells = len(result.recipe.cell_ids)
        each = f"{cells} cells, each with seeds" if cells > 1 else "seeds"
        column.caption(
            f"{title}: {each} {_span(result.recipe.seeds)}, row by row; the same place has the same cell and noise."
        )


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
                when = "Before" if arm == "base" else "After"
                slot.image(
                    frames[arm][i],
                    width="stretch",
                    caption=f"{when}, {i + 1} of {n}: the clean picture as estimated",
                    alt=f"{when} the edit, denoising step {i + 1} of {n}",
                )
            if play:
                time.sleep(0.12)


def _table(result: Result, model: GE2Hist) -> None:
    _tables.show(result.comparison.rename(columns={"n": "pairs"}))
