"""Scenarios side by side -> one self-contained HTML page and PDF: pictures, effects, contrasts, method, hashes.

As in :mod:`perturb.report`: the same comparison gives the same bytes, and ``python -m perturb replay`` runs it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from perturb import charts, pictures, wording
from perturb.grn import pack_network
from perturb.page import Table, csv_bytes, for_people, render
from perturb.report import cell_pictures, page_figure
from perturb.result import Result
from perturb.tables import LEVEL
from perturb.workspace import Workspace, contrast_table, effects_table

__all__ = ["html", "pdf", "provenance"]


def html(workspace: Workspace, results: Sequence[Result], reference: str) -> str:
    """The comparison as one page.

    Parameters
    ----------
    results: of :attr:`Workspace.on_shared_noise`, in that order.
    reference: name of the scenario that the others are compared with.

    Raises
    ------
    BadInput: an unknown reference.
    """
    names = [scenario.name for scenario in workspace.scenarios]
    effects, contrasts = effects_table(names, results), contrast_table(names, results, reference)
    recipes, first = [result.recipe for result in results], results[0]
    several = len({recipe.cell_ids for recipe in recipes}) > 1
    return render(
        "scenario_report.html.j2",
        {"panels": charts.scenario_panels(effects, contrasts)},
        {
            "workspace": workspace.to_dict() | {"reference": reference},
            "provenance": first.provenance,
            "networks": [pack_network(result.network) for result in results if result.network is not None],
            "effects": csv_bytes(effects).decode(),
        }
        | ({"contrasts": csv_bytes(contrasts).decode()} if len(contrasts) else {}),
        question=wording.scenarios_question(recipes),
        warnings=[f"{name}: {one}" for name, result in zip(names, results, strict=True) for one in result.warnings],
        cautions=wording.CAUTIONS,
        method=wording.scenarios_method(names, results, reference),
        references=list(dict.fromkeys(one for recipe in recipes for one in wording.references(recipe))),
        licences=list(dict.fromkeys(one for recipe in recipes for one in wording.licences(recipe))),
        provenance=wording.scenarios_facts(names, results),
        card=first.model_card,
        level=f"{100 * LEVEL:g} %",
        reference=reference,
        scenarios=Table.of(scenario_list(names, results), "The scenarios"),
        seed=first.recipe.seeds[0],
        n_seeds=len(first.recipe.seeds),
        figures_shown=[page_figure(*one) for one in side_by_side(names, results)],
        details=[cell_pictures(result, 0) | {"scenario": name} for name, result in zip(names, results, strict=True)],
        effects=Table.of(_front(effects, "scenario"), "Effects: edited minus unedited, within each scenario"),
        contrasts=Table.of(
            _front(contrasts.drop(columns="reference"), "scenario"),
            f"Contrasts: edited pictures of each scenario minus those of {reference}",
        )
        if len(contrasts)
        else None,
        several=several,
        designs=_designs(names, results),
    )


def pdf(workspace: Workspace, results: Sequence[Result], reference: str) -> bytes:
    """The comparison as a PDF of a few A4 pages."""
    from perturb.pdf import scenarios_pdf

    names = [scenario.name for scenario in workspace.scenarios]
    return scenarios_pdf(names, results, reference)


def provenance(workspace: Workspace, results: Sequence[Result], reference: str) -> dict[str, Any]:
    """Versions and hashes that the numbers were made with."""
    hashes = {scenario.name: result.recipe.hash for scenario, result in zip(workspace.scenarios, results, strict=True)}
    return {"reference": reference, "recipe_sha256": hashes} | results[0].provenance


def scenario_list(names: Sequence[str], results: Sequence[Result]) -> pd.DataFrame:
    """What each scenario is: cells, edits in words, network."""
    rows = []
    for name, result in zip(names, results, strict=True):
        recipe, how = result.recipe, result.recipe.propagation
        cells = recipe.cell_ids[0] + (f" and {len(recipe.cell_ids) - 1} more" if len(recipe.cell_ids) > 1 else "")
        spread = "" if how is None or not recipe.perturbation else how.network_name
        rows.append((name, cells, wording.label(recipe.perturbation), spread))
    table = pd.DataFrame(rows, columns=["scenario", "cells", "edits", "spread through network"])
    return table if table["spread through network"].any() else table.drop(columns="spread through network")


def side_by_side(names: Sequence[str], results: Sequence[Result]) -> list[tuple[str, str, Any, str]]:
    """Title, words, picture and recipe hash of the first cell and seed: the unedited niche of each cell once, before
    the first scenario that has it, then the edited ones.
    """
    shown, seen = [], set()
    cells = {result.recipe.base.hash for result in results}
    for name, result in zip(names, results, strict=True):
        base, cell = result.recipe.base.hash, result.recipe.cell_ids[0]
        if base not in seen:
            seen.add(base)
            title = "Generated: unedited" + (f", cell {cell}" if len(cells) > 1 else "")
            shown.append(
                (title, f"Generated H&E niche of cell {cell}, unedited", pictures.show(result.base[0], 3), base)
            )
        alt = f"Generated H&E niche of cell {cell}, scenario {name}"
        shown.append((f"Generated: {name}", alt, pictures.show(result.edited[0], 3), result.recipe.hash))
    return shown


def _front(table: pd.DataFrame, name: str) -> pd.DataFrame:
    shown = for_people(table).rename(columns={"reference_mean": "reference"})
    return shown[[name, *shown.columns.drop(name)]]


def _designs(names: Sequence[str], results: Sequence[Result]) -> list[tuple[str, dict[str, Any]]]:
    """What the intervals are over: once where all scenarios have as many cells, else by number of cells."""
    found: dict[int, list[str]] = {}
    for name, result in zip(names, results, strict=True):
        found.setdefault(len(result.recipe.cell_ids), []).append(name)
    n_seeds = len(results[0].recipe.seeds)
    return [
        (f"{', '.join(some)}:" if len(found) > 1 else "", wording.design(n_cells, n_seeds))
        for n_cells, some in found.items()
    ]
