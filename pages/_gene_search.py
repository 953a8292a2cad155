"""Choosing genes by typing: only the names that match are sent to the browser, a file may have tens of thousands."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import streamlit as st

from perturb.cell_map import find_genes

if TYPE_CHECKING:
    from ge2hist_core.data import H5adSource

__all__ = ["choose_genes", "matches"]

SHOWN = 30
"""Matches that the list offers, at most."""


def choose_genes(
    label: str, source: H5adSource, key: str, default: Sequence[str] = (), explained: str | None = None
) -> list[str]:
    """Genes of a file, chosen from the matches of a search; whole names typed or pasted are taken at once.

    Parameters
    ----------
    key: of the list; the search's is ``<key> search``. default: chosen at first. explained: help of the list.
    """
    genes = list(dict.fromkeys(map(str, source.genes)))
    if key not in st.session_state:
        st.session_state[key] = list(default)
    typed = st.text_input(
        f"{label}: search",
        key=f"{key} search",
        placeholder="Part of a name, or whole names to take",
        on_change=_take,
        args=(genes, key),
    )
    chosen = st.session_state[key]
    found = matches(genes, typed)
    if typed.strip() and not found:
        st.caption("No gene of these cells has such a name.")
    return st.multiselect(
        label,
        list(dict.fromkeys((*chosen, *found))),
        key=key,
        help=explained,
        placeholder="Choose from what was found" if found else "Search a gene above",
    )


def matches(genes: Sequence[str], text: str, most: int = SHOWN) -> list[str]:
    """Names that the words of ``text`` are, begin, or are part of, in this order, at most ``most``; case is ignored.

    Examples
    --------
    >>> matches(["XCD8", "CD8A", "CD8", "MYC"], "cd8"), matches(["CD8A", "MYC"], "myc, cd8a"), matches(["MYC"], " ")
    (['CD8', 'CD8A', 'XCD8'], ['MYC', 'CD8A'], [])
    """
    found: dict[str, None] = {}
    for word in _words(text):
        found |= dict.fromkeys(find_genes(genes, word, most))
    return list(found)[:most]


def _words(text: str) -> list[str]:
    return re.split(r"[\s,;]+", text.casefold().strip(" \t\n,;")) if text.strip(" \t\n,;") else []


def _take(genes: Sequence[str], key: str) -> None:
    """Adds the names that stand in the search in full, and empties it if that is all that stands there."""
    words = _words(st.session_state[f"{key} search"])
    by_name = {name.casefold(): name for name in genes}
    whole = [by_name[word] for word in words if word in by_name]
    st.session_state[key] = list(dict.fromkeys((*st.session_state[key], *whole)))
    if words and len(whole) == len(words):
        st.session_state[f"{key} search"] = ""
