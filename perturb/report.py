"""Result -> files to take home: one self-contained HTML page, PDF, CSV tables, h5ad, PNG pictures, the recipe.

The same result gives the same bytes. How pages, CSV and ZIP are made is in :mod:`perturb.page`, what they say in
:mod:`perturb.wording`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ge2hist_core.config import READER_CLASSES
from ge2hist_core.niche import enrichment
from ge2hist_core.types import Cells, Niche
from perturb import charts, pictures, wording
from perturb.grn import pack_network
from perturb.page import (
    Table,
    csv_bytes,
    for_people,
    json_bytes,
    json_lines,
    noted,
    readme,
    render,
    write_files,
    zip_of,
)
from perturb.result import TABLES, Result
from perturb.tables import LEVEL
from perturb.wording import NOTICE, Origin

if TYPE_CHECKING:
    from perturb.evidence import Evidence

__all__ = [
    "cell_pictures",
    "csv_bytes",
    "h5ad",
    "html",
    "page_figure",
    "pdf",
    "picture_png",
    "report_files",
    "write_report",
    "zip_bytes",
]

FEW_CELLS = 4
"""Cells whose pictures the page shows; the others are among the files."""

ARMS = {"base": "unedited", "edited": "edited", "direct": "direct", "control": "control"}
"""Arms by the word that stands in the names of their pictures."""

SHOWN = {
    "spread_effects": "What spreading through the network did: paired differences between the arms, the control being "
    "networks of random wiring",
    "edits": "What the encoder sees of each edited gene (bin 0: not seen, 50: the cell's highest)",
    "spread": "Genes that the network moved, with the bins that the encoder sees",
    "states": "The cells before (base) and after (edited): type read by the model, its probability, support p-value, "
    "distance moved",
}
"""Tables of a result that the page shows below the effects, with their captions; empty ones are left out.
Every table of ``perturb.result.TABLES`` is among the files as CSV without further ado."""

FILES = {
    "report.html": "this report as one page, interactive, needs no network",
    "report.pdf": "the same for print and mail",
    "recipe.json": "what was done: `python -m perturb run recipe.json --out DIR` does it again",
    "provenance.json": "versions and hashes that the numbers were made with",
    "network.json": "the network through which the edits were spread",
    "result.h5ad": "counts, embeddings, z_c and z_e of each arm and cell, readouts in obs, for scanpy",
    "comparison.csv": "paired effect of the edit on each readout, with interval, p and q",
    "summary.csv": "mean of each readout in each arm, with interval",
    "readouts.csv": "every readout of every picture",
    "states.csv": "type, probability, support and distance moved of each cell",
    "edits.csv": "what the encoder sees of each edited gene",
    "spread.csv": "genes that the network moved",
    "spread_effects.csv": "what spreading through the network did",
    "nuclei.csv": "every nucleus found: position and area in um, type, probability",
    "enrichment.csv": "which types are neighbours more often than by chance, per picture",
    "evidence.json": "lights with their reasons, and every part of the evidence: question, sentences, tables, settings",
    "evidence.csv": "every number of the evidence, one a line, with n, interval and what it covers",
    "pictures/": "every picture at full size, marked as generated, the recipe inside",
}
"""What stands in README.txt for each file that there is."""


def html(result: Result, evidence: Evidence | None = None) -> str:
    """The report as one page; with ``evidence`` a section that says whether the effects may be believed."""
    recipe, origin = result.recipe, Origin.of_result(result)
    n_cells, n_seeds = len(recipe.cell_ids), len(recipe.seeds)
    several = n_cells > 1
    figures = {
        "effects": charts.effects(result.comparison),
        "density": charts.density(result.summary),
        "composition": charts.composition(result.summary),
        "spacing": charts.spacing(result.readouts, result.summary),
    }
    over = "cells and seeds" if several else "seeds"
    return render(
        "report.html.j2",
        figures,
        _machine(result),
        question=wording.question(recipe),
        warnings=result.warnings,
        cautions=wording.CAUTIONS,
        method=wording.method(result, evidence),
        references=wording.references(recipe),
        licences=wording.licences(recipe),
        provenance=wording.facts(recipe, origin),
        card=result.model_card,
        n_seeds=n_seeds,
        n_cells=n_cells,
        design=wording.design(n_cells, n_seeds),
        level=f"{100 * LEVEL:g} %",
        cells=[cell_pictures(result, c) for c in range(min(FEW_CELLS, n_cells))],
        more_cells=max(0, n_cells - FEW_CELLS),
        charts=list(figures),
        comparison=Table.of(
            for_people(result.comparison), f"Paired effect of the edit on each readout, mean over {over}"
        ),
        evidence=None if evidence is None else _evidence(result, evidence),
        further=[Table.of(table, caption) for table, caption in _further(result)],
        recipe_sha256=recipe.hash,
        recipe_json=json_lines(recipe.to_dict()),
    )


def _evidence(result: Result, evidence: Evidence) -> dict[str, Any]:
    """Lights, parts and what is missing, as the page's template takes them."""
    from perturb.evidence_words import TITLES, name_of, sections
    from perturb.verdict import RULE, verdicts

    parts = [
        {"title": title, "sentences": sentences, "tables": [Table.of(*table) for table in tables]}
        for _, title, sentences, tables in sections(evidence)
    ]
    lights = [(name_of(one.readout), one) for one in verdicts(result, evidence)]
    missing = [(TITLES[name], reason) for name, reason in evidence.missing.items()]
    return {"rule": RULE, "lights": lights, "parts": parts, "missing": missing}


def pdf(result: Result, evidence: Evidence | None = None) -> bytes:
    """The report as a PDF of a few A4 pages."""
    from perturb.pdf import result_pdf

    return result_pdf(result, evidence)


def h5ad(result: Result, cells: Cells) -> bytes:
    """Counts, embeddings, states and readouts of each arm and cell; see :func:`perturb.anndata_out.result_h5ad`."""
    from perturb.anndata_out import result_h5ad

    return result_h5ad(result, cells)


def report_files(result: Result, cells: Cells | None = None, *, evidence: Evidence | None = None) -> dict[str, bytes]:
    """Every file of the report by its relative name; ``README.txt`` says what each holds.

    Parameters
    ----------
    cells: those that the result was made from (:func:`perturb.run.cells_for`). A result does not hold counts, so
        without them ``result.h5ad`` is left out, which README.txt says.
    evidence: on this result; adds a section to the page and the PDF, ``evidence.json`` and ``evidence.csv``.

    Raises
    ------
    BadInput: cells other than those of the result. ValueError: evidence on another result.
    """
    files = {
        "report.html": html(result, evidence).encode(),
        "report.pdf": pdf(result, evidence),
        "recipe.json": json_bytes(noted(result.recipe.to_dict())),
        "provenance.json": json_bytes(noted({"recipe_sha256": result.recipe.hash} | result.provenance)),
        "nuclei.csv": csv_bytes(_nuclei(result)),
        "enrichment.csv": csv_bytes(_enrichment(result)),
    } | {f"{name}.csv": csv_bytes(getattr(result, name)) for name in TABLES if _holds(result, name)}
    if result.network is not None:
        files["network.json"] = json_bytes(noted(pack_network(result.network)))
    if evidence is not None:
        from perturb.evidence_words import csv_table, json_value
        from perturb.verdict import verdicts

        files["evidence.json"] = json_bytes(json_value(evidence, verdicts(result, evidence)))
        files["evidence.csv"] = csv_bytes(csv_table(evidence))
    if cells is not None:
        files["result.h5ad"] = h5ad(result, cells)
    n = len(result.recipe.seeds)
    for arm, title, i, niche, _ in _drawn(result):
        name = f"pictures/cell{i // n + 1:03d}_seed{niche.seed}_{title}.png"
        files[name] = picture_png(result, niche, result.recipe.cell_ids[i // n], ARMS[arm])
    said = {name: text for name, text in FILES.items() if name in files or name == "pictures/"}
    left_out = (
        ""
        if cells is not None
        else "result.h5ad is left out: the cells were not at hand when this report was written. "
    )
    further = f"{left_out}Every number and picture here comes from a generative model. It is no measurement."
    return files | {"README.txt": readme(wording.question(result.recipe), said, further)}


def zip_bytes(result: Result, cells: Cells | None = None, *, evidence: Evidence | None = None) -> bytes:
    """All files of the report as one ZIP; parameters as there. The same result gives the same bytes."""
    return zip_of(report_files(result, cells, evidence=evidence))


def write_report(
    result: Result, out_dir: str | Path, cells: Cells | None = None, *, evidence: Evidence | None = None
) -> list[Path]:
    """Write every file of the report under ``out_dir``; other files there stay. Returns the paths, the page first."""
    return write_files(report_files(result, cells, evidence=evidence), out_dir)


def _holds(result: Result, name: str) -> bool:
    """Whether a result has this table; the tables of spreading are there only where edits spread."""
    return not name.startswith("spread") or result.network is not None


def _further(result: Result) -> Iterator[tuple[pd.DataFrame, str]]:
    for name, caption in SHOWN.items():
        table = getattr(result, name)
        if len(table):
            yield (for_people(table) if "readout" in table else table), caption


def _machine(result: Result) -> dict[str, Any]:
    """What :mod:`perturb.replay` reads from the page: recipe, effects and what they were made with."""
    tables = [name for name in ("comparison", "spread_effects") if _holds(result, name)]
    network = {} if result.network is None else {"network": pack_network(result.network)}
    return {
        "recipe": result.recipe.to_dict(),
        "provenance": result.provenance,
        **{name: csv_bytes(getattr(result, name)).decode() for name in tables},
    } | network


def _drawn(result: Result) -> Iterator[tuple[str, str, int, Niche, pd.DataFrame]]:
    """Arm, its title, place in the arm, picture and nuclei of every picture, arm by arm."""
    seeds = result.recipe.seeds
    for name, arm in result.arms.items():
        for i, (image, nuclei) in enumerate(zip(arm.images, arm.nuclei, strict=True)):
            yield name, ARMS[name], i, Niche(image, result.um_per_px, seeds[i % len(seeds)], generated=True), nuclei


def picture_png(result: Result, niche: Niche, cell_id: str, arm: str) -> bytes:
    """A picture of a result at full size, marked as generated, with its origin inside; ``arm`` in words."""
    metadata = {
        "Title": f"{NOTICE}: {arm} niche of cell {cell_id}, seed {niche.seed}",
        "Software": "GE2Hist digital twin",
        "generated": "true",
        "recipe_sha256": result.recipe.hash,
        "recipe": result.recipe.to_json(),
        "um_per_px": niche.um_per_px,
    }
    return pictures.png_bytes(pictures.show(niche), metadata)


def cell_pictures(result: Result, cell: int) -> dict[str, Any]:
    """Pictures of one cell as data addresses, with the words that stand in for them: ``views`` of the first seed
    (unedited, edited, difference, nuclei of both) and, where there are several, ``sheets`` of all seeds.
    """
    n = len(result.recipe.seeds)
    name = result.recipe.cell_ids[cell]
    part = slice(cell * n, (cell + 1) * n)
    base, edited = result.base[part], result.edited[part]
    first = (base[0], edited[0])
    nuclei = (result.base_nuclei[cell * n], result.edited_nuclei[cell * n])
    views = [
        ("Generated: unedited", f"Generated H&E niche of cell {name}, unedited", pictures.show(first[0], 3)),
        ("Generated: edited, same noise", f"Generated H&E niche of cell {name}, edited", pictures.show(first[1], 3)),
        ("Difference", "Orange where the edited picture is darker, blue where lighter", pictures.difference(*first, 3)),
        ("Nuclei, unedited", f"{len(nuclei[0])} nuclei outlined by type", pictures.overlay(first[0], nuclei[0], 3)),
        ("Nuclei, edited", f"{len(nuclei[1])} nuclei outlined by type", pictures.overlay(first[1], nuclei[1], 3)),
    ]
    sheets = [
        (f"Generated: all {n} seeds, unedited", "Contact sheet of the unedited niches", pictures.contact_sheet(base)),
        (f"Generated: all {n} seeds, edited", "Contact sheet of the edited niches", pictures.contact_sheet(edited)),
    ]
    return {
        "name": name,
        "seed": first[0].seed,
        "views": [page_figure(*view, result.recipe.hash) for view in views],
        "sheets": [page_figure(*sheet, result.recipe.hash) for sheet in sheets if n > 1],
    }


def page_figure(title: str, alt: str, image: np.ndarray, recipe_sha256: str) -> dict[str, str]:
    """A picture as a data address, as the templates' figures take it."""
    content = pictures.png_bytes(image, {"generated": "true", "recipe_sha256": recipe_sha256})
    return {"title": title, "alt": alt, "src": f"data:image/png;base64,{base64.b64encode(content).decode()}"}


def _nuclei(result: Result) -> pd.DataFrame:
    n, parts = len(result.recipe.seeds), []
    for arm, _, i, niche, table in _drawn(result):
        parts.append(table.assign(arm=arm, cell_id=result.recipe.cell_ids[i // n], seed=niche.seed))
    table = pd.concat(parts, ignore_index=True)
    return table[["arm", "cell_id", "seed", *table.columns.difference(["arm", "cell_id", "seed"], sort=False)]]


def _enrichment(result: Result) -> pd.DataFrame:
    """Which types are neighbours more often than by chance, per picture: see :func:`ge2hist_core.niche.enrichment`."""
    n, parts = len(result.recipe.seeds), []
    for arm, _, i, niche, nuclei in _drawn(result):
        height, width = (side * niche.um_per_px for side in niche.image.shape[:2])
        table = enrichment(nuclei, (width, height), READER_CLASSES, n_permutations=200)
        table = table[table["observed"] + table["expected"] > 0]
        parts.append(table.assign(arm=arm, cell_id=result.recipe.cell_ids[i // n], seed=niche.seed))
    table = pd.concat(parts, ignore_index=True)
    return table[["arm", "cell_id", "seed", "type_a", "type_b", "observed", "expected", "z"]]
