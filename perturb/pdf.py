"""Result -> a PDF of a few A4 pages: question, pictures, effects with intervals, method, recipe. For print and mail.

Drawn with matplotlib, whose text cannot run anything: what users and files say is shown as it is. The same result gives
the same bytes.
"""

from __future__ import annotations

import io
import json
import textwrap
from typing import TYPE_CHECKING, Any

import pandas as pd

from perturb import pictures
from perturb.charts import readable
from perturb.colours import colour_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from perturb.result import Result

__all__ = ["pdf_bytes"]

A4 = (8.27, 11.69)
LEFT, RIGHT, TOP, BOTTOM = 0.09, 0.93, 0.95, 0.06
WIDTH = 96
"""Characters of running text on a line."""
LINES = 62
"""Lines of small text on a page."""


def pdf_bytes(result: Result, question: str, notice: str, cautions: tuple[str, ...]) -> bytes:
    """The PDF.

    Parameters
    ----------
    question: what was asked, in words. notice: stands on every page. cautions: sentences to read before believing.
    """
    from matplotlib.backends.backend_pdf import PdfPages

    out = io.BytesIO()
    about = {"Title": f"{notice}: {question}", "Creator": "GE2Hist digital twin", "CreationDate": None}
    with PdfPages(out, metadata=about) as pages:
        for figure in (_first(result, question, notice), _effects(result, notice), *_text(result, notice, cautions)):
            pages.savefig(figure)
    return out.getvalue()


def _page(notice: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=A4)
    figure.text(LEFT, 0.975, notice, fontsize=8, color="#6b4600", va="top")
    figure.text(RIGHT, 0.975, "GE2Hist digital twin", fontsize=8, color="#555555", va="top", ha="right")
    return figure


def _write(figure: Figure, y: float, text: str, size: float, width: int, **style: Any) -> float:
    """Running text from ``y`` (share of the page's height) downwards; returns where it ends."""
    lines = textwrap.wrap(text, width) or [""]
    # A dollar would start mathematics.
    body = "\n".join(lines).replace("$", r"\$")
    figure.text(LEFT, y, body, fontsize=size, va="top", linespacing=1.35, **style)
    return y - len(lines) * size * 1.45 / 72 / A4[1]


def _first(result: Result, question: str, notice: str) -> Figure:
    figure = _page(notice)
    recipe = result.recipe
    y = _write(figure, TOP, question, 15, 52, weight="bold")
    cells = f"{len(recipe.cell_ids)} cells, each with " if len(recipe.cell_ids) > 1 else ""
    y = _write(
        figure, y - 0.01, f"{cells}{len(recipe.seeds)} noise seeds, each drawn without and with the edit.", 10, WIDTH
    )
    for warning in result.warnings[:8]:
        y = _write(figure, y - 0.004, f"! {warning}", 9, 104, color="#8a5a00")
    niches = (result.base[0], result.edited[0])
    images = (
        ("Unedited", pictures.show(niches[0], 3)),
        ("Edited, same noise", pictures.show(niches[1], 3)),
        ("Difference", pictures.difference(*niches, 3)),
        ("Nuclei, unedited", pictures.overlay(niches[0], result.base_nuclei[0], 3)),
        ("Nuclei, edited", pictures.overlay(niches[1], result.edited_nuclei[0], 3)),
    )
    side = 0.27
    height = side * A4[0] / A4[1]
    for i, (title, image) in enumerate(images):
        row, column = divmod(i, 3)
        bottom = y - 0.03 - height - row * (height + 0.035)
        axes = figure.add_axes((LEFT + column * (side + 0.015), bottom, side, height))
        axes.imshow(image, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(title, fontsize=9, loc="left")
    below = f"Cell {recipe.cell_ids[0]}, seed {recipe.seeds[0]}".replace("$", r"\$")
    figure.text(LEFT, y - 0.055 - 2 * (height + 0.035), below, fontsize=9, color="#555555", va="top")
    return figure


def _effects(result: Result, notice: str) -> Figure:
    """A forest of the effects and their table."""
    figure = _page(notice)
    y = _write(figure, TOP, "Paired effects", 14, WIDTH, weight="bold")
    groups = [(unit, rows) for unit, rows in result.comparison.groupby("unit", sort=False)]
    total = sum(len(rows) + 2.5 for _, rows in groups)
    space = 0.50
    for unit, rows in groups:
        height = space * len(rows) / total
        axes = figure.add_axes((0.36, y - 0.015 - height, RIGHT - 0.36, height))
        places = range(len(rows) - 1, -1, -1)
        for place, row in zip(places, rows.itertuples(), strict=True):
            colour = colour_of(row.readout.partition(":")[2]) if ":" in row.readout else "#777777"
            if row.effect == row.effect:
                if row.low == row.low:
                    axes.plot([row.low, row.high], [place, place], color="#222222", linewidth=1)
                axes.plot(
                    row.effect, place, "o", color=colour, fillstyle="full" if row.q < 0.05 else "none", markersize=6
                )
        axes.axvline(0, color="#999999", linewidth=0.8, linestyle=":")
        axes.set_yticks(list(places), [readable(name).replace("$", r"\$") for name in rows["readout"]], fontsize=7.5)
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.tick_params(axis="x", labelsize=7.5)
        axes.set_xlabel(f"Edited - unedited ({unit})", fontsize=8)
        y -= space * (len(rows) + 2.5) / total
    y = _write(
        figure, y - 0.01,
        "Filled: q < 0.05. Lines: 95 % bootstrap intervals over noise seeds, and over cells where there are several. "
        "They cover how much the model's answer varies, not other donors, repeated experiments or the model's errors.",
        8.5, 112, color="#555555",
    )  # fmt: skip
    _table(figure, y - 0.012, result.comparison)
    return figure


def _table(figure: Figure, y: float, comparison: pd.DataFrame) -> None:
    columns = ("readout", "unit", "base", "edited", "effect", "low", "high", "p", "q", "n")
    places = (0.0, 0.26, 0.37, 0.45, 0.53, 0.61, 0.69, 0.77, 0.84, 0.91)
    step = 0.0128
    for place, name in zip(places, columns, strict=True):
        figure.text(LEFT + place * (RIGHT - LEFT), y, name, fontsize=7.5, weight="bold", va="top")
    for i, row in enumerate(comparison[list(columns)].itertuples(index=False), start=1):
        for place, value in zip(places, row, strict=True):
            text = str(value)
            if isinstance(value, float) and value == value:
                text = f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
            text = "undefined" if text == "nan" else text.replace("$", r"\$")
            figure.text(LEFT + place * (RIGHT - LEFT), y - i * step, text, fontsize=7, va="top")


def _text(result: Result, notice: str, cautions: tuple[str, ...]) -> list[Figure]:
    """Cautions, provenance and recipe, over as many pages as they need."""
    sample = result.recipe.sample
    paragraphs = [
        "Method",
        "Raw counts were edited and embedded with scGPT without and with the edit, sharing the random draws of its "
        "tokeniser. GE2Hist turned each embedding into an identity and a niche state, and a diffusion model "
        f"({sample.solver}, {sample.steps} steps, guidance {sample.guidance:g}) drew H&E pictures at "
        f"{result.um_per_px:g} um per pixel from the same noise in both arms. Nuclei were found and typed in the "
        "pictures alone; density, composition and edge-corrected nearest-neighbour distance were compared in pairs. "
        "p is a two-sided sign-flip p-value, q its Benjamini-Hochberg adjustment over the readouts.",
        "",
        "Read with care",
        *(f"- {caution}" for caution in cautions),
        "",
        "Provenance",
        f"recipe {result.recipe.hash}",
        *(f"{name}: {value}" for name, value in result.provenance.items() if not isinstance(value, dict)),
        "",
        "Recipe",
        json.dumps(result.recipe.to_dict(), ensure_ascii=False),
    ]
    lines = [line for text in paragraphs for line in (textwrap.wrap(text, 118) or [""])]
    figures = []
    for start in range(0, len(lines), LINES):
        figure = _page(notice)
        body = "\n".join(lines[start : start + LINES]).replace("$", r"\$")
        figure.text(LEFT, TOP, body, fontsize=8, va="top", linespacing=1.5)
        figures.append(figure)
    return figures
