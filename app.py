"""GE2Hist digital twin: the page table. Start it with ``streamlit run app.py``."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

PAGES = (
    ("pages/explore.py", "Explore", ":material/biotech:"),
    ("pages/compare.py", "Compare", ":material/compare:"),
    ("pages/cell_types.py", "Cell types", ":material/grid_view:"),
    ("pages/screen.py", "Screen", ":material/table_rows:"),
    ("pages/evidence.py", "Evidence", ":material/fact_check:"),
    ("pages/report.py", "Report", ":material/description:"),
    ("pages/about.py", "About", ":material/info:"),
)

st.set_page_config("GE2Hist digital twin", ":material/biotech:", layout="wide", initial_sidebar_state="expanded")
st.html(Path(__file__).parent / "assets" / "style.css")
st.logo(Path(__file__).parent / "assets" / "logo.svg", size="large")
pages = [st.Page(path, title=title, icon=icon, default=not i) for i, (path, title, icon) in enumerate(PAGES)]
st.navigation(pages, position="top").run()
