"""Goal search on the Screen page: choose a target, start, see the trade-off, open a set in the explorer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import streamlit as st

from pages import _tables, _ui
from pages._cells import LISTED_CELLS
from pages._experiment import Experiment, describe
from perturb.edits import Perturbation

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd

    from ge2hist_core.data import H5adSource
    from ge2hist_core.model import GE2Hist
    from perturb.goal import Goal, GoalResult, NicheTarget, ReadoutTarget

WHAT = ("A readout", "The niche of another cell")
SECONDS_PER_GUESS = 0.025


def goal_panel(experiment: Experiment, model: GE2Hist, source: H5adSource) -> None:
    """Search at most three edits that move the niche of the experiment's cells towards a target."""
    cell = _ui.plain(experiment.recipe.cell_ids[0])
    more = len(experiment.recipe.cell_ids) - 1
    st.markdown(
        f"Which at most three edits move the niche of **{cell}**{f' and {more} more cells of its type' * bool(more)} "
        "towards a target? Many sets of edits are judged by the neighbours that the model expects. This is a guess of "
        "the model; the best set of each size is then drawn to see whether the pictures agree. Sets that take the cell "
        "outside of what the model has seen are penalised and marked."
    )
    goal = _choices(experiment, model, source)
    if goal is not None:
        _search(goal, experiment, model, source)


def _choices(experiment: Experiment, model: GE2Hist, source: H5adSource) -> Goal | None:
    from perturb.goal import MAX_EDITS, Goal, default_candidates

    recipe = replace(experiment.recipe, perturbation=Perturbation(), propagation=None, seeds=(0,))
    left, right = st.columns([2, 1])
    what = left.segmented_control("Target", WHAT, default=WHAT[0], key="goal target", required=True)
    max_edits = right.segmented_control(
        "Edits, at most", list(range(1, MAX_EDITS + 1)), default=MAX_EDITS, key="goal edits", required=True
    )
    target = _readout() if what == WHAT[0] else _niche(experiment, model, source)
    if target is None:
        return None
    with st.expander("More", key="goal more"):
        most = st.slider("Single edits to choose from, at most", 50, 1000, 600, 50, key="goal candidates")
        penalty = st.slider(
            "Penalty for a cell outside the data (1: as much as the whole gap)", 0.0, 3.0, 1.0, 0.25, key="goal penalty"
        )
    candidates = default_candidates(recipe, _ui.get_cells(recipe, source), model, int(most))
    return Goal(recipe, target, candidates, max_edits=int(max_edits), penalty=float(penalty))


def _readout() -> ReadoutTarget:
    from perturb.charts import readable
    from perturb.goal import ReadoutTarget
    from perturb.screen import READOUTS

    left, right = st.columns(2)
    names = [name for name in READOUTS if name != "spacing"]
    readout = left.selectbox(
        "Readout",
        names,
        key="goal readout",
        format_func=lambda name: "Density of all nuclei" if name == "density" else readable(name),
    )
    if readout == "density":
        change = right.number_input("Wished change (cells/mm²)", value=1000.0, step=100.0, key="goal density")
        return ReadoutTarget(readout, change=float(change))
    points = right.number_input("Wished change (percentage points)", -100.0, 100.0, 10.0, 1.0, key="goal share")
    return ReadoutTarget(readout, change=float(points) / 100)


def _niche(experiment: Experiment, model: GE2Hist, source: H5adSource) -> NicheTarget | None:
    from perturb.goal import niche_target

    ids = source.cell_id[~source.empty].tolist()
    if len(ids) <= LISTED_CELLS:
        others = [name for name in ids if name not in experiment.recipe.cell_ids]
        other = st.selectbox("Cell whose niche is wished", others, index=None, key="goal cell")
    else:
        other = st.text_input("Id of the cell whose niche is wished", key="goal cell text").strip()
    if not other:
        st.caption("Choose a cell.")
        return None
    target = niche_target(source, other, model, experiment.recipe.encoder_seed)
    expected = ", ".join(f"{n:.1f} {_ui.plain(name)}" for name, n in zip(target.classes, target.counts, strict=True))
    st.caption(f"Neighbours that the model expects there, which are the target: {expected}.")
    return target


def _search(goal: Goal, experiment: Experiment, model: GE2Hist, source: H5adSource) -> None:
    from perturb.goal import load_goal

    def prepare() -> Callable[..., object]:
        from perturb.goal import run_goal

        return partial(run_goal, goal, model, _ui.get_cells(goal.recipe, source), _ui.get_cache())

    result = load_goal(goal.hash, _ui.get_cache())
    label = "Start the search" if result is None else None if result.complete else "Go on with the search"
    guesses = goal.guesses * len(goal.recipe.cell_ids)
    seconds = goal.pictures * _ui.SECONDS_PER_PICTURE + guesses * SECONDS_PER_GUESS
    caption = (
        f"Tries at most {goal.guesses:,} sets, made of {len(goal.candidates):,} single edits, and draws at most "
        f"{goal.pictures:,} pictures: about {max(seconds, 1):.0f} seconds on two cores with the demo bundle. It "
        f"can be cancelled; pictures that are drawn are kept. {goal.reach()}"
    )
    if _ui.offer(goal.hash, label, prepare, name="start goal", caption=caption):
        return
    if result is not None:
        _show(goal, result, experiment)


def _show(goal: Goal, result: GoalResult, experiment: Experiment) -> None:
    from perturb import charts
    from perturb.goal import sentences

    if not result.complete:
        st.caption(":material/warning: This is a part: the search was cancelled or is not finished.")
    st.markdown("\n".join(f"- {_ui.plain(sentence)}" for sentence in sentences(goal, result)))
    found = result.tradeoff[result.tradeoff["size"] > 0]
    if not len(found):
        st.info("No set of these edits brings the niche nearer to the target.")
        return
    st.plotly_chart(
        charts.tradeoff(result.tradeoff, _ui.theme()), theme=None, key="tradeoff", config=charts.CHART_CONFIG
    )
    _open_one(found, experiment)
    st.markdown("##### Best sets, judged without drawing")
    _tables.show(result.tradeoff, key="table tradeoff")
    st.caption(
        "No other set has as few edits, as good support and as small a distance. Closed: share of the gap to the "
        f"target. Distance and towards: in {goal.target.unit}. Support: conformal p, mean over cells; outside: "
        "number of cells with p < 0.05. Objective: what is left of the gap, plus the penalty. Distance real: to the "
        "nuclei of the other cell's real tile, where the file tells them. The first row is the cell as the search "
        "found it."
    )
    if len(result.confirmed):
        st.markdown("##### Drawn sets")
        _tables.show(result.confirmed, key="table goal drawn")
        st.caption(
            f"Effect: mean paired difference to the start over {len(goal.further_seeds)} seeds that chose nothing, "
            "with its 95 % interval over seeds (and cells, where there are several); n counts picture pairs. Towards: "
            "movement along the way to the target. Surrogate: what the model expected without drawing. Random: the "
            "same kinds of edits on genes of like expression. q: Benjamini-Hochberg over the rows of the found sets "
            "with a p; the share of a type that fewer than half of the picture pairs show has none. "
            "All of it speaks of this model's pictures, not of an experiment."
        )
    for name, table in (("trade-off", result.tradeoff), ("drawn sets", result.confirmed)):
        if len(table):
            st.download_button(
                f"{name.capitalize()} (CSV)",
                _ui.csv(table),
                f"goal-{goal.hash[:8]}-{name.replace(' ', '-')}.csv",
                "text/csv",
                key=f"download goal {name}",
                on_click="ignore",
                icon=":material/download:",
            )


def _open_one(found: pd.DataFrame, experiment: Experiment) -> None:
    """Choose a set, the one of the lowest objective first, and open it in the explorer."""
    ranked = found.sort_values("objective", kind="stable").set_index("edits")
    left, right = st.columns([3, 1], vertical_alignment="bottom")
    chosen = left.selectbox(
        "Set of edits",
        ranked.index.tolist(),
        key="goal set",
        format_func=lambda text: (
            f"{', '.join(map(describe, Perturbation.parse(text).parts))} · {100 * ranked.at[text, 'closed']:.0f} % of "
            f"the gap{' · outside the data' if ranked.at[text, 'outside'] else ''}"
        ),
    )
    if right.button("Open in Explore", icon=":material/open_in_new:", key="open goal", width="stretch"):
        experiment.edit(Perturbation.parse(chosen))
        st.switch_page("pages/explore.py")
