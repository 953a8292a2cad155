"""Many edits of one cell: rank them, draw the leading ones, open one in the explorer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import streamlit as st

from ge2hist_core.types import BadInput
from pages import _tables, _ui
from pages._downloads import screen_downloads
from pages._experiment import Experiment
from pages._gene_search import choose_genes
from pages._goal import goal_panel
from pages._signatures import LISTED, edits_of_all, upload, uploaded_signatures
from perturb.edits import Perturbation

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd

    from ge2hist_core.data import H5adSource
    from ge2hist_core.model import GE2Hist
    from perturb.screen import Screen, ScreenResult

KINDS = ("Which edits move the niche?", "Edits towards a target")
WHAT = ("All expressed genes", "A list of genes", "Drug signatures")
FROM = ("The library", "The uploaded file")


def page() -> None:
    model = _ui.get_model()
    opened = _ui.open_experiment(model)
    _ui.show_message()
    if opened is None:
        st.info("There are no cells here yet: upload an `.h5ad` file on the Explore page first.")
        return
    experiment, source = opened
    st.markdown("#### Screen")
    kind = st.segmented_control(
        "What to look for", KINDS, default=KINDS[0], key="screen kind", label_visibility="collapsed", required=True
    )
    with _ui.guard():
        if kind == KINDS[0]:
            _ranking(experiment, model, source)
        else:
            goal_panel(experiment, model, source)
    _ui.write_address(experiment)


def _ranking(experiment: Experiment, model: GE2Hist, source: H5adSource) -> None:
    cell = _ui.plain(experiment.recipe.cell_ids[0])
    more = len(experiment.recipe.cell_ids) - 1
    st.markdown(
        f"Which edits move the niche of **{cell}**{f' and {more} more cells of its type' * bool(more)} the most? All "
        "candidates are ranked without drawing; the leading ones are then drawn from the same noise as the unedited "
        "niche. Another cell is chosen on the Explore page."
    )
    screen = _choices(experiment, model, source)
    if screen is not None:
        _screen(screen, experiment, model, source)


def _choices(experiment: Experiment, model: GE2Hist, source: H5adSource) -> Screen | None:
    from perturb.screen import READOUTS, Screen, knock_outs

    recipe = replace(experiment.recipe.base, seeds=(0,))
    cells = _ui.get_cells(recipe, source)
    chosen = cells.take(slice(len(recipe.cell_ids)))
    left, middle, right = st.columns([2, 1.4, 1])
    what = left.segmented_control("Candidates", WHAT, default=WHAT[0], key="candidates", required=True)
    readouts = ["shift", *(name for name in READOUTS if name != "spacing")]
    readout = middle.selectbox(
        "Rank by",
        readouts,
        key="screen readout",
        format_func=lambda name: {"shift": "Any change of the neighbours", "density": "Density"}.get(
            name, f"Share of {name.partition(':')[2]}"
        ),
    )
    keep = right.number_input("Draw the leading", 2, 100, 20, key="keep")
    if what == WHAT[0]:
        candidates = knock_outs(chosen)
        st.caption(
            f"{len(candidates)} knock-outs. A gene that the cell does not express is no candidate: knocking it out "
            "changes nothing at all."
        )
    elif what == WHAT[1]:
        names = choose_genes("Genes to knock out", source, "screen genes")
        if not names:
            st.caption("Choose at least one gene.")
            return None
        candidates = knock_outs(chosen, names)
    else:
        candidates = _signatures(source)
    return Screen(recipe, candidates, keep=int(keep), readout=readout)


def _signatures(source: H5adSource) -> tuple[Perturbation, ...]:
    """Those of the library or of the uploaded file at one dose."""
    from perturb.signatures import load_library

    uploaded = uploaded_signatures()
    choices = FROM if uploaded else FROM[:1]
    left, right = st.columns(2)
    # Another key with a file than without: whoever uploads one means it.
    where = left.segmented_control(
        "Signatures", choices, default=choices[-1], key=f"signatures of {len(choices)}", required=True
    )
    wanted = uploaded if where == FROM[1] else load_library()
    units = dict.fromkeys(signature.dose_unit for signature in wanted)
    dose = right.slider(f"Dose of every signature ({' or '.join(units)})", 0.25, 2.0, 1.0, 0.25, key="screen dose")
    with st.expander("Upload signatures of your own", icon=":material/upload:"):
        upload("GMT, CSV, TSV, GCT, GCTX or h5ad")
    candidates = edits_of_all(source, dose, wanted is uploaded)
    if not candidates:
        raise BadInput(f"No signature of {where.lower()} has a gene in these data: choose other candidates.")
    first = "the first " * (len(wanted) == LISTED)
    st.caption(f"{len(candidates):,} of {first}{len(wanted):,} signatures act on genes of these data.")
    return candidates


def _screen(screen: Screen, experiment: Experiment, model: GE2Hist, source: H5adSource) -> None:
    from perturb.screen import load_screen

    def prepare() -> Callable[..., object]:
        from perturb.screen import run_screen

        return partial(run_screen, screen, model, _ui.get_cells(screen.recipe, source), _ui.get_cache())

    result = load_screen(screen.hash, _ui.get_cache())
    label = "Start the screen" if result is None else None if result.complete else "Go on with the screen"
    minutes = (screen.pictures * _ui.SECONDS_PER_PICTURE + screen.guesses * 0.02) / 60
    caption = (
        f"Ranks {len(screen.candidates)} candidates and draws {screen.pictures} pictures: about "
        f"{max(minutes, 0.1):.1f} minutes on two cores with the demo bundle. It can be cancelled; what is finished "
        f"is kept. {screen.reach()}"
    )
    if _ui.offer(screen.hash, label, prepare, name="start screen", caption=caption):
        return
    if result is not None:
        _show(result, screen, experiment)
        screen_downloads(screen, result, model, _ui.get_cells(screen.recipe, source))


def _show(result: ScreenResult, screen: Screen, experiment: Experiment) -> None:
    from perturb import charts
    from perturb.screen import agreement
    from perturb.screen_report import headline
    from perturb.wording import matched_in_words

    if not result.complete:
        st.caption(":material/warning: This is a part: the screen was cancelled or is not finished.")
    confirmed = result.confirmed
    if len(confirmed):
        st.markdown(_ui.plain(headline(result, screen)))
        readout = st.selectbox("Readout", list(dict.fromkeys(confirmed["readout"])), key="volcano readout", width=280)
        rows = confirmed[confirmed["readout"] == readout]
        event = st.plotly_chart(
            charts.volcano(rows, _ui.theme()),
            theme=None,
            key="volcano",
            on_select="rerun",
            selection_mode="points",
            config=charts.CHART_CONFIG,
        )
        points = event["selection"]["points"]
        if points:
            _open(experiment, str(points[0]["customdata"][0]))
        found = agreement(result, readout)
        if found is not None:
            st.caption(
                f"Guess and drawing of this readout agree with Spearman r = {found[0]:.2f} over the {found[1]} drawn "
                "candidates (first seeds): how far the ranking below can be trusted for those that were not drawn."
            )
        st.markdown("##### Drawn candidates, hits first")
        _table(rows.drop(columns="readout"), experiment, "confirmed")
        st.caption(
            f"Effect: mean paired difference over {len(screen.further_seeds)} further seeds, with its 95 % interval; "
            f"n counts picture pairs. First effect: over the {len(screen.first_seeds)} seeds that chose the better "
            "half, which no p-value uses. q: Benjamini-Hochberg over all rows with a p-value; the share of a type that "
            "fewer than half of the picture pairs show has none. Shift image: mean absolute difference of optical "
            "density between the pictures of a pair, over the first seeds; shift embedding: Euclidean change of the "
            "encoder's embedding; both describe a candidate, without a test. All of it speaks of this model's "
            "pictures, not of an experiment."
        )
    st.markdown("##### All candidates, ranked without drawing")
    _table(result.guess, experiment, "guess")
    st.caption(
        "Shift: Euclidean change of the expected root counts of the neighbours. "
        f"{_ui.plain(matched_in_words(len(result.guess)))} Only drawing tests."
    )


def _table(table: pd.DataFrame, experiment: Experiment, key: str) -> None:
    """A ranked table; a chosen row opens its edit in the explorer."""
    event = _tables.show(table, key=f"table {key}", on_select="rerun", selection_mode="single-row")
    rows = event["selection"]["rows"]
    if rows:
        _open(experiment, str(table["candidate"].iloc[rows[0]]))


def _open(experiment: Experiment, candidate: str) -> None:
    experiment.edit(Perturbation.parse(candidate))
    st.switch_page("pages/explore.py")


with _ui.guard():
    page()
