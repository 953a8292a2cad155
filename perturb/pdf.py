"""Result or screen -> a PDF of a few A4 pages: question, pictures or volcano, effects with intervals, method, hashes.

For print and mail. Drawn with matplotlib, whose text cannot run anything: what users and files say is shown as it is.
The same result gives the same bytes.
"""

from __future__ import annotations

import functools
import io
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perturb import pictures, wording
from perturb.charts import readable
from perturb.colours import colour_of
from perturb.page import for_people
from perturb.wording import NOTICE, Origin

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from perturb.edits import Perturbation
    from perturb.evidence import Evidence
    from perturb.recipe import Recipe
    from perturb.result import Result
    from perturb.screen import Screen, ScreenResult

__all__ = ["result_pdf", "screen_pdf"]

A4 = (8.27, 11.69)
LEFT, RIGHT, TOP = 0.09, 0.93, 0.95
WIDTH = 96
"""Characters of running text on a line."""
LINES = 62
"""Lines of small text on a page."""
ROWS = 62
"""Rows of a table on a page."""
MAX_ROWS = 2 * ROWS
"""Rows of a table in the PDF; the files hold all."""
EVIDENCE_ROWS = 24
"""Of a table of the evidence."""


def result_pdf(result: Result, evidence: Evidence | None = None) -> bytes:
    """A comparison, with the evidence on it where it is given."""
    recipe, origin = result.recipe, Origin.of_result(result)
    further = [
        ("Recipe", [f"SHA-256 {recipe.hash}", json.dumps(recipe.to_dict(), ensure_ascii=False)]),
    ]
    question = wording.question(recipe)
    method = wording.method(result, evidence)
    words = _sections(recipe, wording.facts(recipe, origin), method, wording.CAUTIONS, further)
    if evidence is not None:
        words = [*_evidence(result, evidence), *words]
    tables = [] if evidence is None else _evidence_tables(evidence)
    return _pdf(question, [_first(result, question), *_effects(result), *_text(words), *tables])


def _evidence(result: Result, evidence: Evidence) -> Iterator[tuple[str, Sequence[str]]]:
    """Lights with their reasons, then what each part says."""
    from perturb.evidence_words import TITLES, name_of, sections
    from perturb.verdict import RULE, verdicts

    lights = [RULE]
    for one in verdicts(result, evidence):
        lights.append(f"{one.light.upper()}  {name_of(one.readout)}: {one.claim}")
        lights += [f"- {'met' if check.passed else 'not met'}: {check.reason}" for check in one.checks]
        lights += [f"- note: {note}" for note in one.notes]
    yield "Evidence", lights
    for _, title, sentences, _ in sections(evidence):
        yield title, [f"- {sentence}" for sentence in sentences]
    if evidence.missing:
        yield "Not answered", [f"- {TITLES[name]} {reason}" for name, reason in evidence.missing.items()]


def _evidence_tables(evidence: Evidence) -> Iterator[Figure]:
    """The tables of the parts, one below the other; the rest of a long one is in the HTML page and the files."""
    from perturb.evidence_words import sections

    figure, y = None, 0.0
    for _, title, _, tables in sections(evidence):
        for table, caption in tables:
            rows = table.head(EVIDENCE_ROWS)
            if figure is None or y - 0.0128 * (len(rows) + 3) - 0.06 < 0.04:
                if figure is not None:
                    yield figure
                figure, y = _page(), TOP
            y = _write(figure, y, title, 11, 90, weight="bold")
            left_out = f" {len(table) - len(rows)} further rows are in the HTML page." * (len(rows) < len(table))
            y = _write(figure, y, caption + left_out, 7.5, 125) - 0.006
            places, size = _layout(rows)
            _table(figure, y, rows, places, size=size)
            y -= 0.0128 * (len(rows) + 3)
    if figure is not None:
        yield figure


def _layout(table: pd.DataFrame) -> tuple[dict[str, float], float]:
    """Where each column begins, as a share of the text's width, and the size in points at which all of them fit."""
    widths = {
        str(name): max(
            len(str(name)) * 1.2, *(9 if isinstance(v, float) else min(len(str(v)), 40) for v in table[name])
        )
        for name in table.columns
    }
    ends = np.cumsum([width + 2 for width in widths.values()])
    places = dict(zip(widths, [0.0, *(ends[:-1] / ends[-1]).tolist()], strict=True))
    return places, 7.0 * min(1.0, 115 / float(ends[-1]))


def screen_pdf(screen: Screen, result: ScreenResult, origin: Origin, drawn: Mapping[str, Result]) -> bytes:
    """A screen; ``drawn``: what :func:`perturb.screen_report.drawn_results` gave."""
    from perturb.screen_report import CAUTIONS

    question = wording.screen_question(screen)
    short = screen.to_dict() | {"candidates": f"{len(screen.candidates)} candidates, listed in screen.json"}
    further = [("Screen", [f"SHA-256 {screen.hash}", json.dumps(short, ensure_ascii=False)])]
    method = wording.screen_method(screen, result, origin)
    words = _sections(screen.recipe, wording.screen_facts(screen, origin), method, CAUTIONS, further, screen.candidates)
    first = _screen_first(screen, result, question)
    return _pdf(question, [first, *_screen_pictures(drawn), *_screen_tables(screen, result), *_text(words)])


def scenarios_pdf(names: Sequence[str], results: Sequence[Result], reference: str) -> bytes:
    """Scenarios on the same noise."""
    from perturb.workspace import contrast_table, effects_table

    recipes = [result.recipe for result in results]
    question = wording.scenarios_question(recipes)
    effects, contrasts = effects_table(names, results), contrast_table(names, results, reference)
    method = wording.scenarios_method(names, results, reference)
    words = _sections(
        recipes[0], wording.scenarios_facts(names, results), method, wording.CAUTIONS, (), others=recipes[1:]
    )
    figures = [_scenarios_first(names, results, question), *_scenario_forests(effects, "Edited - unedited")]
    columns = {"scenario": 0.0, "readout": 0.2, "unit": 0.43, "unedited": 0.51, "edited": 0.58, "difference": 0.65}
    columns |= {"95 % interval": 0.73, "p": 0.87, "q": 0.92, "n": 0.97}
    figures += _table_pages("Effects: edited minus unedited, within each scenario", for_people(effects), columns)
    if len(contrasts):
        figures += _scenario_forests(contrasts, f"Scenario - {' '.join(reference.split())}")
        shown = for_people(contrasts).rename(columns={"reference_mean": "reference's"})
        columns = {"scenario": 0.0, "readout": 0.2, "unit": 0.43, "reference's": 0.51, "mean": 0.59, "difference": 0.65}
        columns |= {"95 % interval": 0.73, "p": 0.87, "q": 0.92, "n": 0.97}
        title = f"Contrasts: edited pictures of each scenario minus those of {' '.join(reference.split())}"
        figures += _table_pages(title, shown, columns)
    return _pdf(question, [*figures, *_text(words)])


def _pdf(question: str, figures: Iterable[Figure]) -> bytes:
    from matplotlib.backends.backend_pdf import PdfPages

    out = io.BytesIO()
    about = {"Title": f"{NOTICE}: {question}", "Creator": "GE2Hist digital twin", "CreationDate": None}
    with PdfPages(out, metadata=about) as pages:
        for figure in figures:
            pages.savefig(figure)
    return out.getvalue()


def _page() -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=A4)
    figure.text(LEFT, 0.975, NOTICE, fontsize=8, color="#6b4600", va="top")
    figure.text(RIGHT, 0.975, "GE2Hist digital twin", fontsize=8, color="#555555", va="top", ha="right")
    return figure


@functools.cache
def _drawable() -> frozenset[int]:
    """Code points that the font has."""
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def _plain(text: str) -> str:
    """Text in which a dollar starts no mathematics and a letter that the font lacks is a question mark."""
    drawn = "".join(c if c == "\n" or ord(c) in _drawable() else "?" for c in text)
    return drawn.replace("$", r"\$")


def _write(figure: Figure, y: float, text: str, size: float, width: int, **style: Any) -> float:
    """Running text from ``y`` (share of the page's height) downwards; returns where it ends."""
    lines = textwrap.wrap(text, width) or [""]
    figure.text(LEFT, y, _plain("\n".join(lines)), fontsize=size, va="top", linespacing=1.35, **style)
    return y - len(lines) * size * 1.45 / 72 / A4[1]


# A comparison


def _first(result: Result, question: str) -> Figure:
    figure = _page()
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
    y = _pictures(figure, y, images, 3)
    below = _plain(f"Generated: cell {recipe.cell_ids[0]}, seed {recipe.seeds[0]}")
    figure.text(LEFT, y - 0.005, below, fontsize=9, color="#555555", va="top")
    return figure


def _pictures(figure: Figure, y: float, images: Sequence[tuple[str, np.ndarray]], columns: int) -> float:
    """Titled pictures in rows from ``y`` downwards; returns where they end."""
    side = (RIGHT - LEFT - 0.015 * (columns - 1)) / columns
    height = side * A4[0] / A4[1]
    for i, (title, image) in enumerate(images):
        row, column = divmod(i, columns)
        bottom = y - 0.03 - height - row * (height + 0.035)
        axes = figure.add_axes((LEFT + column * (side + 0.015), bottom, side, height))
        axes.imshow(image, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(_plain(_shortened(title, 110 // columns)), fontsize=9, loc="left")
    return y - -(-len(images) // columns) * (height + 0.035)


def _effects(result: Result) -> Iterator[Figure]:
    """A forest of the effects and their table; what spreading through a network did on pages of its own."""
    figure = _page()
    y = _write(figure, TOP, "Paired effects", 14, WIDTH, weight="bold")
    y = _forest(figure, y, result.comparison, 0.50)
    y = _write(
        figure, y - 0.01,
        "Filled: q < 0.05. Lines: 95 % intervals over noise seeds, and over cells where there are several. "
        "They cover how much the model's answer varies, not other donors, repeated experiments or the model's errors.",
        8.5, 112, color="#555555",
    )  # fmt: skip
    columns = {"readout": 0.0, "unit": 0.26, "unedited": 0.36, "edited": 0.46, "difference": 0.55}
    columns |= {"95 % interval": 0.65, "p": 0.85, "q": 0.91, "n": 0.97}
    _table(figure, y - 0.012, for_people(result.comparison), columns)
    yield figure
    if len(result.spread_effects):
        columns = {"contrast": 0.0, "readout": 0.19, "unit": 0.43, "difference": 0.53, "95 % interval": 0.64}
        columns |= {"p": 0.85, "q": 0.91, "n": 0.97}
        shown = for_people(result.spread_effects)
        yield from _table_pages("What spreading through the network did", shown, columns)


def _forest(
    figure: Figure,
    y: float,
    comparison: pd.DataFrame,
    space: float,
    axis: str = "Edited - unedited",
    by: str = "unit",
    label: str = "readout",
) -> float:
    """One panel per unit from ``y`` downwards over ``space`` of the page's height; returns where it ends.

    ``by`` and ``label``: columns that panels and rows are of.
    """
    groups = [(name, rows) for name, rows in comparison.groupby(by, sort=False)]
    total = sum(len(rows) + 2.5 for _, rows in groups)
    for name, rows in groups:
        unit = rows["unit"].iloc[0]
        what = f"{unit}" if by == "unit" else f"{readable(name)}, {unit}"
        labels = [readable(one) if label == "readout" else _shortened(one, 40) for one in rows[label]]
        height = space * len(rows) / total
        axes = figure.add_axes((0.36, y - 0.015 - height, RIGHT - 0.36, height))
        places = range(len(rows) - 1, -1, -1)
        for place, row in zip(places, rows.itertuples(), strict=True):
            colour = colour_of(row.readout.partition(":")[2]) if ":" in row.readout else "#777777"
            if row.effect == row.effect:
                if row.low == row.low:
                    axes.plot([row.low, row.high], [place, place], color="#222222", linewidth=1)
                filled = "full" if row.q < 0.05 else "none"
                axes.plot(row.effect, place, "o", color=colour, fillstyle=filled, markersize=6)
        axes.axvline(0, color="#999999", linewidth=0.8, linestyle=":")
        axes.set_yticks(list(places), list(map(_plain, labels)), fontsize=7.5)
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.tick_params(axis="x", labelsize=7.5)
        axes.set_xlabel(_plain(f"{_shortened(axis, 50)} ({what})"), fontsize=8)
        y -= space * (len(rows) + 2.5) / total
    return y


# Scenarios


def _scenarios_first(names: Sequence[str], results: Sequence[Result], question: str) -> Figure:
    """Question, what each scenario is, pictures on the same noise."""
    from perturb.scenario_report import side_by_side

    figure = _page()
    y = _write(figure, TOP, question, 15, 52, weight="bold")
    seeds = results[0].recipe.seeds
    y = _write(figure, y - 0.01, f"{len(seeds)} noise seeds, which all scenarios share.", 10, WIDTH)
    for name, result in zip(names, results, strict=True):
        recipe = result.recipe
        spread = "" if recipe.propagation is None else f", spread through {recipe.propagation.network_name}"
        cells = f"{len(recipe.cell_ids)} cells" if len(recipe.cell_ids) > 1 else f"cell {recipe.cell_ids[0]}"
        said = f"{name}: {cells}, {wording.label(recipe.perturbation)}{spread}"
        y = _write(figure, y - 0.004, _shortened(said, 300), 9, 104)
    y = _write(figure, y - 0.004, f"Generated pictures of seed {seeds[0]}, first cell.", 9, 104, color="#555555")
    images = [(title.removeprefix("Generated: "), image) for title, _, image, _ in side_by_side(names, results)]
    _pictures(figure, y, images, 3 if len(images) <= 6 else 4)
    return figure


def _scenario_forests(table: pd.DataFrame, axis: str) -> Iterator[Figure]:
    """One panel per readout, one row per scenario, over as many pages as that needs."""
    readouts, per_page = list(dict.fromkeys(table["readout"])), max(1, 40 // (table["scenario"].nunique() + 2))
    for start in range(0, len(readouts), per_page):
        some = readouts[start : start + per_page]
        figure, rows = _page(), table[table["readout"].isin(some)]
        y = _write(figure, TOP, axis + ("" if start == 0 else ", continued"), 14, WIDTH, weight="bold")
        y = _forest(figure, y, rows, 0.8 * len(some) / per_page, axis=axis, by="readout", label="scenario")
        said = "Filled: q < 0.05. Lines: 95 % intervals; what they cover stands under Method."
        _write(figure, y - 0.01, said, 8.5, 112, color="#555555")
        yield figure


# A screen


def _screen_first(screen: Screen, result: ScreenResult, question: str) -> Figure:
    """Question, what was found, the volcano of the clearest readout, the ranking."""
    from perturb.screen_report import headline, hits_first

    figure = _page()
    y = _write(figure, TOP, question, 15, 52, weight="bold")
    y = _write(figure, y - 0.01, headline(result, screen), 10, WIDTH)
    if not result.complete:
        y = _write(
            figure, y - 0.004, "! This is a part: the screen was cancelled or is not finished.", 9, 104, color="#8a5a00"
        )
    rows, _, hits = hits_first(result)
    if len(rows):
        first = rows.sort_values("q", kind="stable")["readout"].iloc[0]
        y = _volcano(figure, y, rows[rows["readout"] == first], first)
    return _ranking(figure, y, screen, result)


def _screen_pictures(drawn: Mapping[str, Result]) -> Iterator[Figure]:
    """The clearest candidates, before and after on the same noise; none where nothing is drawn."""
    from perturb.edits import Perturbation
    from perturb.screen_report import PICTURED

    if not drawn:
        return
    recipe = next(iter(drawn.values())).recipe
    figure = _page()
    y = _write(figure, TOP, "The clearest candidates, before and after", 14, WIDTH, weight="bold")
    said = (
        f"Generated: cell {recipe.cell_ids[0]}, noise seed {recipe.seeds[0]}, the first of the further seeds. One "
        "picture is one draw of the model; the tables are over all seeds."
    )
    y = _write(figure, y - 0.008, said, 9, 104, color="#555555")
    images: list[tuple[str, np.ndarray]] = []
    for name, result in list(drawn.items())[:PICTURED]:
        base, edited = result.base[0], result.edited[0]
        images += [
            ("Unedited", pictures.show(base, 3)),
            (wording.label(Perturbation.parse(name)), pictures.show(edited, 3)),
        ]
        images.append(("Difference", pictures.difference(base, edited, 3)))
    _pictures(figure, y, images, 3)
    yield figure


def _volcano(figure: Figure, y: float, rows: pd.DataFrame, readout: str) -> float:
    axes = figure.add_axes((LEFT + 0.07, y - 0.34, RIGHT - LEFT - 0.07, 0.28))
    height = -np.log10(rows["p"].to_numpy())
    hit = ((rows["q"] < 0.05) & rows["replicated"].astype(bool)).to_numpy()
    for kind, fill, colour in ((hit, "full", colour_of("CD8 T cell")), (~hit, "none", "#777777")):
        axes.plot(rows["effect"].to_numpy()[kind], height[kind], "o", color=colour, fillstyle=fill, markersize=6)
    for effect, top, name in zip(rows["effect"], height, rows["candidate"], strict=True):
        axes.annotate(
            _plain(_shortened(name, 24)), (effect, top), (0, 5), textcoords="offset points", fontsize=6.5, ha="center"
        )
    axes.axvline(0, color="#999999", linewidth=0.8, linestyle=":")
    axes.margins(0.12, 0.15)
    axes.set_title(f"{_plain(readable(readout))}; filled: q < 0.05 and replicated", fontsize=9, loc="left")
    axes.set_xlabel(f"Edited - unedited ({rows['unit'].iloc[0]})", fontsize=8)
    axes.set_ylabel("-log10 p", fontsize=8)
    axes.tick_params(labelsize=7.5)
    return y - 0.39


def _ranking(figure: Figure, y: float, screen: Screen, result: ScreenResult) -> Figure:
    axes = figure.add_axes((LEFT + 0.07, y - 0.27, RIGHT - LEFT - 0.07, 0.23))
    score = result.guess[screen.readout].abs().to_numpy()
    level = np.maximum(result.guess["level"].to_numpy(), 0.01)
    drawn = np.arange(len(score)) < (result.confirmed["candidate"].nunique() if len(result.confirmed) else 0)
    for part, colour in ((~drawn, "#999999"), (drawn, colour_of("CD8 T cell"))):
        axes.plot(level[part], score[part], "o", color=colour, markersize=4)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_title("All candidates, ranked without drawing; blue: drawn", fontsize=9, loc="left")
    axes.set_xlabel("Mean count of the edited genes", fontsize=8)
    axes.set_ylabel("Guessed change", fontsize=8)
    axes.tick_params(labelsize=7.5)
    return figure


def _screen_tables(screen: Screen, result: ScreenResult) -> Iterator[Figure]:
    from perturb.screen_report import hits_first, labelled

    rows, _, _ = hits_first(result)
    if len(rows):
        shown = for_people(rows).assign(replicated=np.where(rows["replicated"].astype(bool), "yes", "no"))
        shown["n"] = [f"{n:.0f}" for n in shown["n"]]
        columns = {"candidate": 0.0, "readout": 0.22, "unit": 0.42, "difference, first seeds": 0.5, "difference": 0.58}
        columns |= {"95 % interval": 0.66, "p": 0.82, "q": 0.88, "n": 0.935, "replicated": 0.97}
        names = {"difference, first seeds": "first", "difference": "further", "replicated": "repl."}
        yield from _table_pages("Tested candidates and readouts, hits first", shown, columns, names)
    columns = {"candidate": 0.0, screen.readout: 0.34, "level": 0.46, "shift_embedding": 0.54, "p_matched": 0.72}
    leading = labelled(result.guess.head(ROWS))
    yield from _table_pages("The leading candidates of the ranking", leading, columns)


# Both


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _table_pages(
    title: str, table: pd.DataFrame, columns: dict[str, float], names: dict[str, str] | None = None
) -> Iterator[Figure]:
    """A table over as many pages as it needs."""
    for start in range(0, min(len(table), MAX_ROWS), ROWS):
        figure = _page()
        y = _write(figure, TOP, title if start == 0 else f"{title}, continued", 14, 70, weight="bold")
        _table(figure, y - 0.012, table.iloc[start : start + ROWS], columns, names)
        if start + ROWS >= MAX_ROWS and len(table) > MAX_ROWS:
            figure.text(LEFT, 0.04, f"{len(table) - MAX_ROWS} further rows are in the CSV.", fontsize=8)
        yield figure


def _table(
    figure: Figure,
    y: float,
    table: pd.DataFrame,
    columns: dict[str, float],
    names: dict[str, str] | None = None,
    size: float = 7.0,
) -> None:
    """Rows at ``size`` points. ``columns``: which, and where each begins, as a share of the text's width."""
    step, ends = 0.0128, [*list(columns.values())[1:], 1.06]
    for name, place in columns.items():
        title = (names or {}).get(name, name).replace("_", " ")
        figure.text(LEFT + place * (RIGHT - LEFT), y, title, fontsize=1.07 * size, weight="bold", va="top")
    for i, row in enumerate(table[list(columns)].itertuples(index=False, name=None), start=1):
        for place, end, value in zip(columns.values(), ends, row, strict=True):
            text = str(value)
            if isinstance(value, float):
                text = "undefined" if value != value else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
            text = _shortened(text, int((end - place) * 128 * 7.0 / size))
            figure.text(LEFT + place * (RIGHT - LEFT), y - i * step, _plain(text), fontsize=size, va="top")


def _sections(
    recipe: Recipe,
    facts: Sequence[tuple[str, str]],
    method: str,
    cautions: Sequence[str],
    further: Sequence[tuple[str, Sequence[str]]],
    candidates: Sequence[Perturbation] = (),
    others: Sequence[Recipe] = (),
) -> list[tuple[str, Sequence[str]]]:
    """Title and paragraphs of what follows the numbers; ``others``: further recipes that are compared."""
    references = dict.fromkeys(one for each in (recipe, *others) for one in wording.references(each))
    licences = dict.fromkeys(wording.licences(recipe, candidates))
    licences |= dict.fromkeys(one for each in others for one in wording.licences(each))
    return [
        ("Read with care", [f"- {caution}" for caution in cautions]),
        ("Method", [method]),
        ("References", list(references)),
        ("Versions, hashes and seeds", [f"{name}: {value}" for name, value in facts]),
        ("Licences", [f"{name}: {value}" for name, value in licences]),
        *further,
    ]


def _text(sections: Sequence[tuple[str, Sequence[str]]]) -> Iterator[Figure]:
    """Sections of small text, over as many pages as they need."""
    lines: list[tuple[str, bool]] = []
    for title, paragraphs in sections:
        wrapped = [line for text in paragraphs for line in (textwrap.wrap(text, 112) or [""])]
        if len(lines) % LINES > LINES - 4:
            lines += [("", False)] * (LINES - len(lines) % LINES)  # a title does not stand alone at the foot
        lines += [(title, True), *((line, False) for line in wrapped), ("", False)]
    step = 8 * 1.5 / 72 / A4[1]
    for start in range(0, len(lines), LINES):
        figure = _page()
        for i, (line, bold) in enumerate(lines[start : start + LINES]):
            figure.text(LEFT, TOP - i * step, _plain(line), fontsize=8, va="top", weight="bold" if bold else "normal")
        yield figure
