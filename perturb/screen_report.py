"""Screen -> files to take home: one self-contained HTML page, PDF, tables as CSV, pictures, h5ad, the screen as JSON.

Pictures, their readouts and the h5ad are of the candidates that the further seeds drew (:func:`drawn_results`). As in
:mod:`perturb.report`: the same screen gives the same bytes, and ``python -m perturb replay`` runs it again.
"""

from __future__ import annotations

import html as entities
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ge2hist_core.types import Cells
from perturb import charts, wording
from perturb.edits import Perturbation
from perturb.page import (
    Table,
    csv_bytes,
    file_name,
    for_people,
    json_bytes,
    json_lines,
    noted,
    readme,
    render,
    write_files,
    zip_of,
)
from perturb.reach import FALSE_DISCOVERIES
from perturb.screen import SEEN, Screen, ScreenResult
from perturb.tables import LEVEL
from perturb.wording import Origin

if TYPE_CHECKING:
    from perturb.cache import DiskCache
    from perturb.recipe import Recipe
    from perturb.result import Result

__all__ = [
    "PICTURED",
    "drawn_results",
    "h5ad",
    "headline",
    "hits_first",
    "html",
    "labelled",
    "pdf",
    "report_files",
    "write_report",
    "zip_bytes",
]

Drawn = Mapping[str, "Result"]
"""Candidate, as the tables name it -> its comparison over the further seeds, the clearest first."""

MAX_DRAWN = 10
"""Candidates whose pictures go home, at most."""
MAX_PICTURES = 640
"""Edited pictures that go home, at most, unless one candidate alone has more."""
PICTURED = 4
"""Candidates whose pictures page and PDF show."""
UNEDITED = "unedited"

LEADING = 40
"""Candidates of the guess that the page shows outright, at least as many as were drawn."""

NAMED = 8
"""Candidates that bear their name in a volcano, at most."""

CAUTIONS = (
    "The ranking guesses from a network that has seen no picture: a candidate far down may still change the pictures.",
    "The ranking sets each candidate beside this screen's others: one of them always leads, whether it matters or not.",
    *wording.CAUTIONS,
)

FILES = {
    "report.html": "this report as one page, interactive, needs no network",
    "report.pdf": "the same for print and mail",
    "screen.json": "all that decides the screen: cells, candidates, sampler, seeds",
    "provenance.json": "versions and hashes that the numbers were made with",
    "guess.csv": "every candidate, ranked without drawing, with its rank against the trend with expression",
    "confirmed.csv": "every drawn candidate and readout: paired effect with interval, p and q, replication",
    "readouts.csv": "every readout of every picture over the further seeds, of the candidates below pictures/",
    "candidates.h5ad": "their edited counts, embeddings, z_c and z_e, mean readouts in obs, for scanpy",
    "pictures/": "their pictures at full size and the unedited ones on the same noise, marked as generated",
}


def drawn_results(
    screen: Screen, result: ScreenResult, cache: DiskCache, draw: Callable[[Recipe], Result] | None = None
) -> dict[str, Result]:
    """The comparisons behind the p-values, from the cache that the screen was run with: hits first, then by q.

    At most ten candidates, fewer where many cells or seeds make many pictures.

    Parameters
    ----------
    draw: draws what the cache lacks, as after a screen on a cluster; None: such candidates are left out.

    Returns
    -------
    Candidate as the tables name it -> comparison of the unedited and the edited niche over the further seeds.
    """
    from perturb.result import load_result

    per_candidate = len(screen.recipe.cell_ids) * len(screen.further_seeds)
    names = list(dict.fromkeys(_tested(result)[0]["candidate"]))
    found = {}
    for name in names[: min(MAX_DRAWN, max(1, MAX_PICTURES // per_candidate))]:
        recipe = screen.edited(Perturbation.parse(name), screen.further_seeds)
        one = load_result(recipe.hash, cache) or (None if draw is None else draw(recipe))
        if one is not None:
            found[name] = one
    return found


def html(screen: Screen, result: ScreenResult, origin: Origin, drawn: Drawn | None = None) -> str:
    """The report as one page; ``drawn``: what :func:`drawn_results` gave, of which the first are shown."""
    recipe, (n_cells, n_seeds) = screen.recipe, screen.design
    several, least = n_cells > 1, wording.smallest_p(n_cells, n_seeds)
    confirmed, untested, hits = hits_first(result)
    n_drawn = result.confirmed["candidate"].nunique() if len(result.confirmed) else 0
    shown = max(LEADING, n_drawn)
    guess = labelled(result.guess)
    moved = [(readout, rows) for readout, rows in _by_readout(confirmed) if (rows["p"] < 1).any()]
    volcanos = {
        f"volcano{i}": _volcano(rows, readout, least or confirmed["p"].min()) for i, (readout, rows) in enumerate(moved)
    }
    still = [charts.readable(name) for name in dict.fromkeys(confirmed["readout"]) if name not in dict(moved)]
    ranking = charts.ranking(guess.assign(candidate=_tags(guess["candidate"])), screen.readout, n_drawn)
    return render(
        "screen_report.html.j2",
        volcanos | {"ranking": ranking},
        _machine(screen, result, origin),
        question=wording.screen_question(screen),
        warnings=() if result.complete else ("This is a part: the screen was cancelled or is not finished.",),
        cautions=CAUTIONS,
        method=wording.screen_method(screen, result, origin),
        references=wording.references(recipe, screen=True),
        licences=wording.licences(recipe, screen.candidates),
        provenance=wording.screen_facts(screen, origin),
        card=origin.model_card,
        headline=headline(result, screen),
        level=f"{100 * LEVEL:g} %",
        n_candidates=f"{len(screen.candidates):,}",
        n_drawn=n_drawn,
        n_pictures=f"{screen.pictures:,}" if result.complete else f"of {screen.pictures:,}",
        pictures=_pictures(drawn or {}),
        more_pictures=max(0, len(drawn or {}) - PICTURED),
        volcanos=list(volcanos),
        still=", ".join(still),
        confirmed=Table.of(_for_people(confirmed), "Every tested candidate and readout, hits first"),
        hits=hits,
        untested=Table.of(
            _for_people(untested).drop(columns=["difference", "95 % interval", "p", "q", "n", "replicated"]),
            "Drawn, without a p-value",
        ),
        first_seeds=len(screen.first_seeds),
        further_seeds=len(screen.further_seeds),
        several=several,
        n_cells=n_cells,
        reach=screen.reach(len(confirmed) or None),
        seen=f"{100 * SEEN:g} %",
        matched=wording.matched_in_words(len(result.guess)),
        leading=Table.of(_brief(guess.head(shown)), "The leading candidates, the largest guessed change first"),
        others=Table.of(_brief(guess.iloc[shown:]), "Further candidates", max_rows=5000),
        screen_sha256=screen.hash,
        screen_json=json_lines(screen.to_dict()),
    )


def pdf(screen: Screen, result: ScreenResult, origin: Origin, drawn: Drawn | None = None) -> bytes:
    """The report as a PDF of a few A4 pages."""
    from perturb.pdf import screen_pdf

    return screen_pdf(screen, result, origin, drawn or {})


def h5ad(screen: Screen, drawn: Drawn, cells: Cells) -> bytes:
    """Counts, embeddings, states and readouts of each candidate and cell; see :mod:`perturb.anndata_out`."""
    from perturb.anndata_out import screen_h5ad

    return screen_h5ad(screen, drawn, cells)


def report_files(
    screen: Screen, result: ScreenResult, origin: Origin, drawn: Drawn | None = None, cells: Cells | None = None
) -> dict[str, bytes]:
    """Every file of the report by its relative name; ``README.txt`` says what each holds.

    Parameters
    ----------
    drawn: what :func:`drawn_results` gave: their pictures and readouts are among the files.
    cells: those that the screen was run with; without them ``candidates.h5ad`` is left out.

    Raises
    ------
    BadInput: cells other than those of the screen.
    """
    drawn = drawn or {}
    provenance = {"screen_sha256": screen.hash, "complete": result.complete, **origin.provenance}
    files = {
        "report.html": html(screen, result, origin, drawn).encode(),
        "report.pdf": pdf(screen, result, origin, drawn),
        "screen.json": json_bytes(noted(screen.to_dict())),
        "provenance.json": json_bytes(noted(provenance)),
        "guess.csv": csv_bytes(result.guess),
        "confirmed.csv": csv_bytes(result.confirmed),
    }
    if drawn:
        files["readouts.csv"] = csv_bytes(_readouts(drawn))
        if cells is not None:
            files["candidates.h5ad"] = h5ad(screen, drawn, cells)
        files |= _picture_files(drawn)
    said = {name: text for name, text in FILES.items() if name in files or (drawn and name == "pictures/")}
    tested = _tested(result)[0]["candidate"].nunique()
    left_out = (
        f"Pictures and readouts of {len(drawn)} of the {tested} tested candidates are here, the clearest first: the "
        "others are many, or were not kept. "
        if len(drawn) < tested
        else ""
    )
    further = f"{left_out}Every number and picture here comes from a generative model. It is no measurement."
    return files | {"README.txt": readme(wording.screen_question(screen), said, further)}


def zip_bytes(
    screen: Screen, result: ScreenResult, origin: Origin, drawn: Drawn | None = None, cells: Cells | None = None
) -> bytes:
    """All files of the report as one ZIP; parameters as there. The same screen gives the same bytes."""
    return zip_of(report_files(screen, result, origin, drawn, cells))


def write_report(
    screen: Screen,
    result: ScreenResult,
    origin: Origin,
    out_dir: str | Path,
    drawn: Drawn | None = None,
    cells: Cells | None = None,
) -> list[Path]:
    """Write every file of the report under ``out_dir``; other files there stay. Returns the paths, the page first."""
    return write_files(report_files(screen, result, origin, drawn, cells), out_dir)


def _pictures(drawn: Drawn) -> list[dict[str, Any]]:
    """The first cell of the clearest candidates: pictures of the first further seed, sheets of all of them."""
    from perturb.report import cell_pictures

    shown = []
    for name, result in list(drawn.items())[:PICTURED]:
        one = cell_pictures(result, 0)
        shown.append(one | {"candidate": wording.label(Perturbation.parse(name)), "views": one["views"][:3]})
    return shown


def _readouts(drawn: Drawn) -> pd.DataFrame:
    """Readouts per picture; the unedited pictures, which all candidates share, once."""
    first = next(iter(drawn.values())).readouts
    parts = [first[first["arm"] == "base"].assign(candidate=UNEDITED)]
    for name, result in drawn.items():
        parts.append(result.readouts[result.readouts["arm"] == "edited"].assign(candidate=name))
    table = pd.concat(parts, ignore_index=True).drop(columns="arm")
    return table[["candidate", *table.columns.drop("candidate")]]


def _picture_files(drawn: Drawn) -> dict[str, bytes]:
    """Every picture as PNG: the unedited ones in a folder of their own, then a folder for each candidate."""
    from perturb.report import picture_png

    first = next(iter(drawn.values()))
    parts = [(UNEDITED, UNEDITED, first, first.base)]
    parts += [
        (f"{i:02d}_{file_name(name) or 'candidate'}", name, result, result.edited)
        for i, (name, result) in enumerate(drawn.items(), start=1)
    ]
    files = {}
    for folder, name, result, niches in parts:
        n, ids = len(result.recipe.seeds), result.recipe.cell_ids
        for i, niche in enumerate(niches):
            path = f"pictures/{folder}/cell{i // n + 1:03d}_seed{niche.seed}.png"
            files[path] = picture_png(result, niche, ids[i // n], name)
    return files


def hits_first(result: ScreenResult) -> tuple[pd.DataFrame, pd.DataFrame, int]:
    """Rows with a p-value, hits first; drawn rows without one; how many hits there are.

    A hit has q < 0.05 and the same sign in both sets of seeds. A drawn row has no p-value where the first seeds left
    its candidate out, or where it is the share of a type that too few pictures show.
    """
    rows, others, hits = _tested(result)
    return labelled(rows), labelled(others), hits


def _tested(result: ScreenResult) -> tuple[pd.DataFrame, pd.DataFrame, int]:
    """As :func:`hits_first`, candidates by their full names."""
    table = result.confirmed
    if not len(table):
        columns = ["candidate", "readout", "unit", "first_effect", "effect", "low", "high", "p", "q", "n", "replicated"]
        table = pd.DataFrame(columns=columns).astype(dict.fromkeys(columns[3:], float))
    has_p = table["p"].notna()
    rows, others = table[has_p], table[~has_p]
    hit = ((rows["q"] < FALSE_DISCOVERIES) & rows["replicated"].astype(bool)).to_numpy()
    ordered = rows.iloc[np.argsort(~hit, kind="stable")].reset_index(drop=True)
    return ordered, others, int(hit.sum())


def headline(result: ScreenResult, screen: Screen | None = None) -> str:
    """What was found, in a sentence or two; where nothing was, also what the design could have shown."""
    rows, _, hits = hits_first(result)
    if not len(rows):
        return "No candidate has been tested yet."
    n = rows["candidate"].nunique()
    if not hits:
        nothing = (
            f"None of the {n} tested candidates could be shown to move a readout (q < 0.05 and the same sign in both "
            "sets of seeds)."
        )
        return nothing if screen is None else f"{nothing} {screen.reach(len(rows))}"
    found = list(dict.fromkeys(rows["candidate"][:hits]))
    names = "; ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    first = for_people(rows.head(1)).iloc[0]
    return (
        f"{len(found)} of {n} tested candidates move{'s' * (len(found) == 1)} a readout with q < 0.05 and the same "
        f"sign in both sets of seeds: {names}. Clearest: {first['candidate']}, {first['readout'].lower()} "
        f"{first['difference']:+.3g} {first['unit']} ({first['95 % interval']}, n = {first['n']:.0f})."
    )


def labelled(table: pd.DataFrame) -> pd.DataFrame:
    """Candidates by their short names; a name that two share is left as it is."""
    names = {name: wording.label(Perturbation.parse(name)) for name in dict.fromkeys(table["candidate"])}
    shared = {label for label in names.values() if list(names.values()).count(label) > 1}
    return table.assign(candidate=[name if names[name] in shared else names[name] for name in table["candidate"]])


def _for_people(table: pd.DataFrame) -> pd.DataFrame:
    shown = for_people(table)
    return shown.assign(n=[f"{n:.0f}" for n in shown["n"]], replicated=shown["replicated"].astype(bool))


def _brief(guess: pd.DataFrame) -> pd.DataFrame:
    """The guess without the shares of types, which guess.csv holds."""
    return guess[[name for name in guess.columns if not name.startswith("fraction:")]]


def _by_readout(confirmed: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Tested rows by readout, the one with the smallest q first; readouts of types that are never seen are left out."""
    order = list(dict.fromkeys(confirmed.sort_values("q", kind="stable")["readout"]))
    return [(name, confirmed[confirmed["readout"] == name]) for name in order]


def _volcano(rows: pd.DataFrame, readout: str, least: float) -> go.Figure:
    """One readout's volcano: zero in the middle, all p that can be reached in view, names where they can be read."""
    scale = 100.0 if readout.startswith("fraction:") else 1.0
    rows = rows.assign(**{name: rows[name] * scale for name in ("effect", "low", "high")})
    rows = rows.assign(unit="percentage points" if scale == 100.0 else rows["unit"], candidate=_tags(rows["candidate"]))
    figure = charts.volcano(rows)
    named = rows["p"].rank(method="first") <= NAMED
    text = [
        name if shown and p < 0.5 else "" for name, shown, p in zip(rows["candidate"], named, rows["p"], strict=True)
    ]
    reach = 1.25 * max(rows["effect"].abs().max(), 1e-12)
    figure.update_traces(text=text, cliponaxis=False)
    figure.update_xaxes(range=[-reach, reach], title_font_size=12)
    figure.update_yaxes(range=[0, -1.15 * np.log10(least)])
    return figure.update_layout(title={"text": charts.readable(readout), "font": {"size": 15}}, height=320)


def _tags(names: Sequence[str]) -> list[str]:
    """Names for charts: of a knock-out the gene alone; no markup that plotly would follow."""
    return [entities.escape(name.removesuffix(" knocked out")) for name in names]


def _machine(screen: Screen, result: ScreenResult, origin: Origin) -> dict[str, Any]:
    """What :mod:`perturb.replay` reads from the page."""
    return {
        "screen": screen.to_dict(),
        "complete": result.complete,
        "provenance": origin.provenance,
        "guess": csv_bytes(result.guess).decode(),
        "confirmed": csv_bytes(result.confirmed).decode(),
    }
