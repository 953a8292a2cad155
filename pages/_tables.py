"""Tables of results as the pages show them: headings in words, numbers to four digits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import streamlit as st
from pandas.api.types import is_float_dtype

if TYPE_CHECKING:
    import pandas as pd

HEADINGS = {
    "base": "Before",
    "edited": "After",
    "effect": "Difference",
    "first_effect": "First difference",
    "low": "95 % from",
    "high": "to",
    "p": "p",
    "q": "q (FDR)",
    "n": "n",
    "density": "Density (cells/mm²)",
    "spacing": "Spacing (µm)",
}


def show(table: pd.DataFrame, key: str | None = None, **options: Any) -> Any:
    """``st.dataframe`` of a result; ``options`` go on to it, its value comes back."""
    return st.dataframe(table, hide_index=True, column_config=_columns(table), key=key, **options)


def _columns(table: pd.DataFrame) -> dict[str, Any]:
    """Column -> its heading and, for floats, a format of as many digits as mean something."""
    return {
        name: st.column_config.NumberColumn(_heading(name), format="%.2g" if name in ("p", "q") else "%.4g")
        if is_float_dtype(table[name])
        else _heading(name)
        for name in table.columns
    }


def _heading(name: str) -> str:
    if name.startswith("fraction:"):
        return f"Share of {name.partition(':')[2]}"
    plain = name.replace("_", " ").replace("z c", "z_c").replace("z e", "z_e")
    return HEADINGS.get(name, plain[:1].upper() + plain[1:])
