"""May a comparison be believed? One light per readout, its reasons on click, and the evidence behind them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import streamlit as st

from pages import _tables, _ui

if TYPE_CHECKING:
    from collections.abc import Callable

    from ge2hist_core.data import H5adSource
    from ge2hist_core.model import GE2Hist
    from perturb.evidence import Evidence
    from perturb.result import Result
    from perturb.verdict import Verdict

LOOKS = {
    "green": ":green-badge[:material/check_circle: supported]",
    "amber": ":orange-badge[:material/error: partly supported]",
    "grey": ":gray-badge[:material/help: no evidence]",
}
MARKS = {True: ":green[:material/check:]", False: ":gray[:material/close:]"}


def evidence_of(result: Result, model: GE2Hist, source: H5adSource) -> tuple[Evidence | None, bool]:
    """What is known of a comparison without further work, and whether all was gathered; None for a draft."""
    recipe = result.recipe
    if not recipe.perturbation or recipe == recipe.draft:
        return None, False
    return _ui.get_evidence(result, model, source)


def lights(result: Result, evidence: Evidence | None) -> None:
    """A line per headline readout; opened, it says why."""
    from perturb.verdict import verdicts

    with st.container(gap="small", key="lights"):
        for verdict in verdicts(result, evidence):
            _line(verdict)


def _line(verdict: Verdict) -> None:
    from perturb.evidence_words import name_of

    with st.expander(f"{LOOKS[verdict.light]} **{_ui.plain(name_of(verdict.readout))}.** {_ui.plain(verdict.claim)}"):
        lines = [f"{MARKS[check.passed]} {_ui.plain(check.reason)}" for check in verdict.checks]
        lines += [f":gray[:material/info:] {_ui.plain(note)}" for note in verdict.notes]
        st.markdown("  \n".join(lines))


def gather_button(result: Result, model: GE2Hist, source: H5adSource) -> None:
    """The button that gathers all evidence, or how far that is."""
    _ui.offer(
        f"evidence of {result.recipe.hash}",
        "Gather the evidence",
        partial(_prepare, result, model, source),
        name="gather evidence",
        caption="Encodes and draws the cell again, edits random genes, exchanges the states: about a minute for one "
        "cell. It is kept.",
    )


def _prepare(result: Result, model: GE2Hist, source: H5adSource) -> Callable[..., object]:
    from perturb.evidence import gather, niches_of

    cells, cache = _ui.get_cells(result.recipe, source), _ui.get_cache()
    return partial(gather, result, model, cells, niches=partial(niches_of, source), cache=cache)


def parts(evidence: Evidence) -> None:
    """Every part that was made: question, sentences, tables; and why others could not be."""
    from perturb.evidence_words import TITLES, sections

    for name, title, sentences, tables in sections(evidence):
        with st.expander(f"**{title}**"):
            st.markdown("\n".join(f"- {_ui.plain(one)}" for one in sentences[:-1]))
            for table, caption in tables:
                _table(name, table, caption)
            st.caption(_ui.plain(sentences[-1]))
    for name, reason in evidence.missing.items():
        with st.expander(f":gray[{TITLES[name]}]"):
            st.caption(f"Not at hand. {_ui.plain(reason)}")


def _table(part: str, table: Any, caption: str) -> None:
    with st.container(gap="small"):
        _tables.show(table, key=f"evidence {part} {caption}")
        st.caption(_ui.plain(caption))
