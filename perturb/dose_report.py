"""Doses of a signature -> files to take home: one self-contained HTML page, the table, the recipes of all doses.

As in :mod:`perturb.report`: the same series gives the same bytes, and ``python -m perturb replay`` runs it again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pandas as pd

from ge2hist_core.types import BadInput
from perturb import charts, wording
from perturb.doses import hill_curve, respond
from perturb.grn import Network, pack_network
from perturb.page import Table, csv_bytes, for_people, json_bytes, noted, readme, render, zip_of
from perturb.recipe import Recipe
from perturb.signatures import Signature
from perturb.tables import LEVEL
from perturb.wording import Origin

__all__ = ["html", "read_series", "report_files", "responses", "zip_bytes"]

Series = Sequence[tuple[float, Recipe]]

FILES = {
    "doses.html": "this report as one page, interactive, needs no network",
    "doses.csv": "paired effect of every dose on each readout, with interval and p",
    "doses.json": "the recipe of every dose: `python -m perturb replay` runs them again",
    "recipe.json": "the recipe at the largest dose: `python -m perturb run recipe.json --out DIR` draws it",
    "provenance.json": "versions and hashes that the numbers were made with",
    "network.json": "the network through which the edits were spread",
}


def report_files(
    series: Series, table: pd.DataFrame, signature: Signature, origin: Origin, network: Network | None = None
) -> dict[str, bytes]:
    """Every file of the report by its name; ``README.txt`` says what each holds.

    Parameters
    ----------
    series: of :func:`perturb.doses.dose_series`. table: that :func:`perturb.doses.run_doses` made of it.
    network: through which the edits spread, or None.
    """
    last = series[-1][1]
    files = {
        "doses.html": html(series, table, signature, origin, network).encode(),
        "doses.csv": csv_bytes(table),
        "doses.json": json_bytes(
            noted({"signature": signature.name, "dose_unit": signature.dose_unit} | _pack(series))
        ),
        "recipe.json": json_bytes(noted(last.to_dict())),
        "provenance.json": json_bytes(noted(origin.provenance)),
    }
    if network is not None:
        files["network.json"] = json_bytes(noted(pack_network(network)))
    said = {name: text for name, text in FILES.items() if name in files}
    further = "Every number here comes from a generative model. It is no measurement."
    return files | {"README.txt": readme(wording.doses_question(series, signature.name), said, further)}


def zip_bytes(
    series: Series, table: pd.DataFrame, signature: Signature, origin: Origin, network: Network | None = None
) -> bytes:
    """All files of the report as one ZIP; parameters as there."""
    return zip_of(report_files(series, table, signature, origin, network))


def html(
    series: Series, table: pd.DataFrame, signature: Signature, origin: Origin, network: Network | None = None
) -> str:
    """The report as one page, with a chart of every readout."""
    last = series[-1][1]
    readouts = list(dict.fromkeys(table["readout"]))
    figures = {}
    for i, readout in enumerate(readouts):
        found = respond(table, readout)
        curve = None if found.hill is None else hill_curve(found.hill, table["dose"].to_numpy())
        figure = charts.dose_response(table, readout, signature.dose_unit, curve=curve)
        figure.update_yaxes(title_font_size=10).update_xaxes(title_font_size=11)
        figures[f"dose{i}"] = figure.update_layout(
            height=320, title={"text": charts.readable(readout), "font": {"size": 14}}
        )
    machine = _pack(series) | {"provenance": origin.provenance, "doses": csv_bytes(table).decode()}
    return render(
        "dose_report.html.j2",
        figures,
        machine | ({} if network is None else {"network": pack_network(network)}),
        question=wording.doses_question(series, signature.name),
        warnings=(),
        cautions=wording.CAUTIONS,
        method=wording.doses_method(series, signature.name, signature.dose_unit, origin),
        references=[one for one in wording.references(last) if one != wording.REFERENCES["q"]],
        licences=wording.licences(last),
        provenance=wording.doses_facts(series, origin),
        card=origin.model_card,
        n_seeds=len(last.seeds),
        n_cells=len(last.cell_ids),
        level=f"{100 * LEVEL:g} %",
        dose_unit=signature.dose_unit,
        charts=list(figures),
        design=wording.design(len(last.cell_ids), len(last.seeds)),
        responses=Table.of(responses(table, signature.dose_unit), "Plateau and half-effective dose of each readout"),
        table=Table.of(for_people(table), "Paired effect of every dose on each readout", max_rows=len(table)),
    )


def responses(table: pd.DataFrame, dose_unit: str) -> pd.DataFrame:
    """What :func:`perturb.doses.respond` finds for each readout, in words."""
    rows = []
    for readout in dict.fromkeys(table["readout"]):
        found = respond(table, readout)
        plateau = f"from dose {found.plateau_from:g}" if found.plateau else "none"
        h = found.hill
        half = found.reason if h is None else f"{h.ec50:.3g} ({h.ec50_low:.3g} to {h.ec50_high:.3g}) {dose_unit}"
        rows.append((charts.readable(readout), plateau, half))
    return pd.DataFrame(rows, columns=["readout", "plateau", "half-effective dose (95 % interval)"])


def _pack(series: Series) -> dict[str, Any]:
    return {"series": [{"dose": dose, "recipe": recipe.to_dict()} for dose, recipe in series]}


def read_series(value: Any) -> tuple[tuple[float, Recipe], ...]:
    """Doses and recipes of a ``doses.json`` or of a page.

    Raises
    ------
    BadInput: no such series.
    """
    try:
        return tuple((float(one["dose"]), Recipe.from_json(json.dumps(one["recipe"]))) for one in value["series"])
    except BadInput:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"The series of doses is damaged ({error}): write the report again.") from None
