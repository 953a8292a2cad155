"""Buttons for everything that a comparison or a screen leaves; files are made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import streamlit as st

from pages import _ui

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.types import Cells
    from perturb.evidence import Evidence
    from perturb.result import Result
    from perturb.screen import Screen, ScreenResult

File = tuple[str, str, str, "bytes | Callable[[], bytes | str]"]
"""Label, ending, MIME type, content."""


def result_downloads(result: Result, evidence: Evidence | None, cells: Callable[[], Cells]) -> None:
    """Of a comparison and the evidence on it. ``cells`` gives those that it was made from, for the h5ad."""
    from perturb import report
    from perturb.page import json_bytes, noted

    recipe = json_bytes(noted(result.recipe.to_dict()))

    def everything() -> bytes:
        return report.zip_bytes(result, cells(), evidence=evidence)

    _buttons(
        f"ge2hist-{result.recipe.hash[:8]}",
        "downloads",
        (
            ("Report (HTML)", "html", "text/html", lambda: _ui.report_html(result, evidence)),
            ("Report (PDF)", "pdf", "application/pdf", lambda: report.pdf(result, evidence)),
            ("Table (CSV)", "csv", "text/csv", lambda: report.csv_bytes(result.comparison)),
            ("Cells (h5ad)", "h5ad", "application/x-hdf5", lambda: report.h5ad(result, cells())),
            ("Everything (ZIP)", "zip", "application/zip", everything),
            ("Recipe (JSON)", "json", "application/json", recipe),
        ),
    )


def screen_downloads(screen: Screen, result: ScreenResult, model: GE2Hist, cells: Cells) -> None:
    """Of a screen, whole or in part; pictures as far as the cache still has them."""
    from perturb import screen_report
    from perturb.wording import Origin

    def parts() -> tuple[Screen, ScreenResult, Origin, dict[str, Result]]:
        drawn = screen_report.drawn_results(screen, result, _ui.get_cache())
        return screen, result, Origin.of_model(model, cells), drawn

    def h5ad() -> bytes:
        return screen_report.h5ad(screen, screen_report.drawn_results(screen, result, _ui.get_cache()), cells)

    def everything() -> bytes:
        return screen_report.zip_bytes(*parts(), cells)

    files: tuple[File, ...] = (
        ("Report (HTML)", "html", "text/html", lambda: screen_report.html(*parts())),
        ("Report (PDF)", "pdf", "application/pdf", lambda: screen_report.pdf(*parts())),
        ("Everything (ZIP)", "zip", "application/zip", everything),
    )
    if len(result.confirmed) and result.confirmed["p"].notna().any():
        files += (("Cells (h5ad)", "h5ad", "application/x-hdf5", h5ad),)
    _buttons(f"ge2hist-screen-{screen.hash[:8]}", "screen downloads", files)


def _buttons(name: str, key: str, files: tuple[File, ...]) -> None:
    with st.container(horizontal=True, gap="small", key=key):
        for label, ending, mime, data in files:
            st.download_button(
                label,
                data,
                f"{name}.{ending}",
                mime,
                key=f"download {ending}",
                on_click="ignore",
                icon=":material/download:",
            )
