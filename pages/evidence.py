"""May I believe this effect? Lights on this comparison, how such claims fared, fit to real tissue, limits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import streamlit as st

from pages import _ui
from pages._lights import evidence_of, gather_button, lights, parts

if TYPE_CHECKING:
    from ge2hist_core.data import H5adSource
    from ge2hist_core.model import GE2Hist
    from pages._experiment import Experiment
    from perturb.evidence import Evidence
    from perturb.result import Result
    from perturb.track_record import Fit

REMEDIES = {
    "remedy": "What is done", "false_effects": "false effects", "power_drivers": "power, one driver",
    "power_programmes": "power, programme", "refused_drivers": "drivers refused",
}  # fmt: skip

SIMULATED = (
    "- **Simulated tissue.** It learnt from one simulated kind of tissue, and draws real cells by extrapolation."
)
MEASURED = "- **One tissue.** It knows the cell types, genes and stains of its training tissue, nothing else."
LIMITS = """
- **Not diagnostic.** No picture here is tissue, and none is a basis for a decision about a patient.
- **Conditional, not causal.** It shows what surrounded cells of such expression. It answers to a gene that merely
  travels along as it does to a cause, and nothing here tells the two apart.
- **No donors.** More seeds make the model's answer more precise. They replace neither donors nor an experiment.
- **The reader errs.** Nuclei are counted and typed in the pictures by a trained reader that misses and mistypes some.
- **Alike in H&E.** CD4 T, CD8 T and B cells are not told apart in a picture; they count as *Lymphocyte*.
"""


def page() -> None:
    model = _ui.get_model()
    opened = _ui.open_experiment(model)
    _ui.show_message()
    st.markdown("#### Evidence")
    st.markdown("##### This comparison")
    with _ui.guard():
        if opened is None:
            st.info("There are no cells here yet: upload an `.h5ad` file on the Explore page first.")
        else:
            _comparison(*opened, model)
    with _ui.guard():
        _evaluation(model)
    st.markdown("##### What this model cannot do")
    simulated = (model.report or {}).get("simulation")
    st.markdown((SIMULATED if simulated else MEASURED) + LIMITS)
    st.page_link("pages/about.py", label="Model card, data and all limits", icon=":material/info:")
    if opened is not None:
        _ui.write_address(opened[0])


# This comparison


def _comparison(experiment: Experiment, source: H5adSource, model: GE2Hist) -> None:
    recipe = experiment.recipe
    if _ui.under_way(recipe.hash):
        return
    result = _ui.get_result(recipe) if recipe.perturbation and recipe != recipe.draft else None
    if result is None:
        _how_to_compare(experiment)
        return
    evidence, complete = evidence_of(result, model, source)
    _lights(result, evidence)
    if evidence is None:
        return
    if not complete:
        gather_button(result, model, source)
    st.markdown("##### The evidence, question by question")
    parts(evidence)


def _how_to_compare(experiment: Experiment) -> None:
    recipe = experiment.recipe
    with st.container(border=True, key="empty-evidence"):
        if not recipe.perturbation:
            st.markdown("**No edit yet.** Edit a gene on the Explore page, then press *Compare* there.")
        else:
            st.markdown(
                f"**Not compared yet.** {_ui.plain(recipe.perturbation)} has been drawn from one seed at most, which "
                "cannot tell an effect from noise. Press *Compare* on the Explore page; what the lights find is shown "
                "here."
            )
        st.page_link("pages/explore.py", label="Go to Explore", icon=":material/biotech:")


def _lights(result: Result, evidence: Evidence | None) -> None:
    from perturb.verdict import RULE

    recipe = result.recipe
    more = len(recipe.cell_ids) - 1
    st.markdown(
        f"**{_ui.plain(recipe.perturbation)}** in **{_ui.plain(recipe.cell_ids[0])}**"
        f"{f' and {more} more cells' * bool(more)}, {len(recipe.seeds)} noise seeds. Open a line for its reasons."
    )
    lights(result, evidence)
    st.caption(f"{RULE} Shares: the three most frequent types before the edit; all readouts are on the Explore page.")
    if result.warnings:
        with st.expander(f"Technical doubts about this run ({len(result.warnings)})", icon=":material/warning:"):
            for warning in result.warnings:
                st.markdown(f"- {_ui.plain(warning)}")


# What was measured of the bundle


def _evaluation(model: GE2Hist) -> None:
    from perturb.track_record import driver_effects, fits, read_evaluation

    evaluation = read_evaluation(_ui.bundle_folder())
    known = evaluation is not None and evaluation.get("bundle_sha256") == model.sha256
    st.markdown("##### How such claims have fared where the truth is known")
    if evaluation is None or not known:
        _no_evaluation(older=evaluation is not None)
        return
    with _ui.guard():
        effects = driver_effects(evaluation)
        if len(effects):
            _known_truth(evaluation, effects)
        else:
            st.caption(
                "This bundle's evaluation holds no edits of known effect: truth is known for simulated tissue alone."
            )
    with _ui.guard():
        _genes_of_known_effect(model)
    st.markdown("##### How well pictures fit real tissue")
    with _ui.guard():
        rows = fits(evaluation)
        if rows:
            _fit(evaluation, rows)
        else:
            st.caption("This bundle's evaluation does not compare pictures with real tissue.")
    with _ui.guard():
        _papers_figures(evaluation)


# Sections of an evaluation that are shown whole; what else it holds is told above in its own way.
PAPERS_FIGURES = (
    "verdicts",
    "table_1",
    "figure_3",
    "methods",
    "classifier",
    "separation",
    "central_types",
    "read_back",
)


def _papers_figures(evaluation: dict[str, Any]) -> None:
    """The paper's tables in kind, and what they were measured against, as `evaluate` wrote them."""
    from ge2hist_core.evaluation.report import sections
    from perturb import charts

    shown = [section for section in sections(evaluation) if section.key in PAPERS_FIGURES]
    if not shown:
        return
    st.markdown("##### The paper's tables, on donors that the model has not learnt from")
    for section in shown:
        with st.expander(f"**{_ui.plain(section.title)}**"):
            for text in section.text:
                st.markdown(f"- {_ui.plain(text[2:])}" if text.startswith("- ") else _ui.plain(text))
            for i, chart in enumerate(section.charts):
                figure = charts.methods(chart.title, chart.points, _ui.theme())
                st.plotly_chart(figure, theme=None, key=f"{section.key} {i}", config=charts.CHART_CONFIG)
            for i, table in enumerate(section.tables):
                columns = dict(zip(table.header, zip(*table.rows, strict=True), strict=True)) if table.rows else {}
                st.dataframe(columns, hide_index=True, key=f"table {section.key} {i}")


def _no_evaluation(older: bool) -> None:
    with st.container(border=True, key="empty-evaluation"):
        st.subheader("The evaluation is of other weights" if older else "This bundle was not evaluated")
        st.markdown(
            (
                "The model was trained again since its `evaluation.json` was written, so its figures are not shown. "
                * older
            )
            + "Evaluate it on donors it has not learnt from, then reload this page. Until then nothing is known here "
            "of how its claims fare."
        )
        st.code("python -m ge2hist_core evaluate BUNDLE DATA.zarr --out BUNDLE", language="bash")


def _known_truth(evaluation: dict[str, Any], effects: Any) -> None:
    from perturb import charts
    from perturb.track_record import signs, size_in_words, slopes, undersized

    found, programmes = slopes(effects), effects["programme"].nunique()
    sized = [size_in_words(unit, slope, programmes) for unit, slope in found.items()]
    cells = _ui.plain(evaluation["driver_programmes"].get("n_cells", ""))
    st.markdown(
        "In simulated tissue the causes are set by hand, so each drawn change can be held against the true one. All "
        f"driver genes of a programme were switched off or raised fourfold{f' in {cells} cells' * bool(cells)}."
    )
    right = signs(evaluation)
    if right:
        said = " and ".join(f"**{a} of {n}** ({_ui.plain(what)})" for what, a, n in right)
        st.markdown(f"**Direction.** The drawn change went the true way in {said}. Guessing would be right in half.")
    advice = " Drawn effects are smaller than true ones: take a direction from such pictures, not a size."
    st.markdown(f"**Size.**{advice * undersized(found)}\n" + "\n".join(f"- {_ui.plain(one)}" for one in sized))
    figure = charts.true_against_drawn(effects, {unit: one.value for unit, one in found.items()}, _ui.theme())
    st.plotly_chart(figure, theme=None, key="true against drawn", config=charts.CHART_CONFIG)
    st.caption(
        "One triangle per programme, direction and readout, pointing the way the programme was pushed. Only causes "
        "were edited here; genes that merely travel along, whose true effect is none, are not in this chart."
    )


def _genes_of_known_effect(model: GE2Hist) -> None:
    """What ``known-truth`` measured: causes, followers and unlinked genes, with and without networks."""
    from perturb import charts, track_record

    known = track_record.read_known_truth(_ui.bundle_folder())
    if known is None or known.get("bundle_sha256") != model.sha256:
        return
    with st.expander("**Causes and companions: how often is an effect real?**"):
        _paragraph(track_record.false_effects_in_words(known))
        _bullets(track_record.how_often_right(known))
        table = track_record.remedies(known)
        if len(table):
            st.markdown("What lowers false effects, and what it costs:")
            st.dataframe(table.rename(columns=REMEDIES), hide_index=True, key="remedies")
            st.caption(
                "False effects: readouts of edits of genes that only follow, beyond 95 % of those of unlinked genes. "
                "Power: the same share for edits of causes. In brackets 95 % intervals over held-out donors."
            )
    aims = track_record.aims(known)
    if aims:
        with st.expander("**What was aimed at, and what was reached**"):
            _bullets(aims)
    with st.expander("**Does a network of regulators help?**"):
        _bullets(track_record.propagation_in_words(known))
        st.caption(
            "Compared on readouts whose true effect is clear; followers have none. The true network can be known for "
            "simulated tissue alone; one fitted to the cells in hand is what the Explore page offers."
        )
    with st.expander("**Are effects as large as they are said to be?**"):
        curve = track_record.calibration(known)
        if len(curve):
            figure = charts.calibration(curve, _ui.theme())
            st.plotly_chart(figure, theme=None, key="calibration", config=charts.CHART_CONFIG)
        st.caption(
            "Edits of like modelled effect are taken together; bars: 95 % intervals of the mean true effect over "
            "held-out donors. Modelled by the niche network, without pictures."
        )
        _bullets(track_record.drawn_in_words(known))
    encoders = track_record.encoders_in_words(known)
    if encoders:
        with st.expander("**What does the cell encoder know of the niche?**"):
            _bullets(encoders)


def _paragraph(text: str) -> None:
    if text:
        st.markdown(_ui.plain(text))


def _bullets(lines: list[str]) -> None:
    if lines:
        st.markdown("\n".join(f"- {_ui.plain(one)}" for one in lines))


def _fit(evaluation: dict[str, Any], rows: list[Fit]) -> None:
    donors = f", of {rows[0].donors} donors it has not learnt from" * bool(rows[0].donors)
    st.markdown(
        f"{rows[0].n:,} pictures beside the real tiles of the same cells{donors}; both went through the same reader."
        f"{' *Real* is here the simulated tissue itself.' * bool(evaluation.get('driver_programmes'))}"
    )
    dash = "–"
    header = (
        "| | Pictures − real | Other real tiles − real | By type: pictures | By type: other real tiles | "
        "By type: wrong cell's pictures |\n|---|---|---|---|---|---|\n"
    )
    lines = [
        " | ".join(
            _ui.plain(text or dash)
            for text in (
                row.readout,
                row.generated,
                row.floor,
                row.generated_by_type,
                row.floor_by_type,
                row.exchanged_by_type,
            )
        )
        for row in rows
    ]
    st.markdown(header + "\n".join(f"| {line} |" for line in lines))
    st.caption(
        "In brackets: 95 % intervals over donors and their cells. By type: mean absolute difference over the types of "
        "the central cell. Other real tiles, of cells of the same type, are as near as one can ask for; the "
        "wrong cell's pictures, drawn for another cell's expression, are what ignoring the cell would give."
    )
    st.markdown("\n".join(f"- **{_ui.plain(row.readout)}.** {_ui.plain(row.sentence)}" for row in rows))


with _ui.guard():
    page()
