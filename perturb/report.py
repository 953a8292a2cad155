"""Result -> files to take home: one self-contained HTML page, CSV tables, PNG pictures, the recipe.

The page opens without a network and is bound to that by its content security policy: nothing is loaded from anywhere,
and of all scripts only the two below run, known by their hash. The same result gives the same bytes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ge2hist_core.config import READER_CLASSES
from ge2hist_core.files import atomic_path
from ge2hist_core.niche import enrichment
from ge2hist_core.types import Niche
from perturb import charts, pictures
from perturb.edits import Edit, EditSet
from perturb.result import TABLES, Result
from perturb.tables import LEVEL

__all__ = ["csv_bytes", "html", "pdf", "report_files", "write_report", "zip_bytes"]

NOTICE = "Generated, not diagnostic"
CAUTIONS = (
    "These pictures are generated. They are no tissue, no diagnosis and no evidence that an experiment would turn out "
    "alike.",
    "A difference says how this model's picture depends on the gene's count, which mixes cause and correlation in its "
    "training data.",
    "The encoder ranks counts within a cell: an edit that changes no rank changes nothing, and one that moves many "
    "ranks may act through them.",
    "The reader miscounts and mistypes some nuclei, in both arms; its measured errors are in the model card.",
)
EPOCH = (1980, 1, 1, 0, 0, 0)
FEW_CELLS = 4
"""Cells whose pictures the page shows; the others are among the files."""

DRAW_CHARTS = """
const figures = JSON.parse(document.getElementById("figures").textContent);
for (const [id, figure] of Object.entries(figures))
  Plotly.newPlot(id, figure.data, figure.layout, {displaylogo: false, responsive: true});
"""


def html(result: Result) -> str:
    """The report as one page."""
    plotly = _plotly()
    figures = {
        "effects": charts.effects(result.comparison),
        "density": charts.density(result.summary),
        "composition": charts.composition(result.summary),
        "spacing": charts.spacing(result.readouts, result.summary),
    }
    data = "{" + ",".join(f'"{name}":{figure.to_json()}' for name, figure in figures.items()) + "}"
    recipe = result.recipe
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            notice=NOTICE,
            cautions=CAUTIONS,
            question=_question(result),
            result=result,
            n_seeds=len(recipe.seeds),
            n_cells=len(recipe.cell_ids),
            level=f"{100 * LEVEL:g} %",
            cells=[_cell_pictures(result, c) for c in range(min(FEW_CELLS, len(recipe.cell_ids)))],
            more_cells=max(0, len(recipe.cell_ids) - FEW_CELLS),
            charts=list(figures),
            comparison=_readable(result.comparison),
            edits=_readable(result.edits),
            states=_readable(result.states),
            recipe_json=json.dumps(recipe.to_dict(), indent=1, ensure_ascii=False),
            provenance=_flat(result.provenance),
            card=result.model_card,
            machine=Markup(_machine(result).replace("<", "\\u003c")),
            figures=Markup(data.replace("<", "\\u003c")),  # no text inside can end the script element
            plotly=Markup(plotly),
            draw=Markup(DRAW_CHARTS),
            hashes=Markup(" ".join(f"'sha256-{_sha256(script)}'" for script in (plotly, DRAW_CHARTS))),
        )
    )


def pdf(result: Result) -> bytes:
    """The report as a PDF of a few A4 pages."""
    from perturb.pdf import pdf_bytes

    return pdf_bytes(result, _question(result), NOTICE, CAUTIONS)


def report_files(result: Result) -> dict[str, bytes]:
    """Every file of the report by its relative name: report.html, recipe.json, ``*.csv``, ``pictures/*.png``."""
    files = {
        "report.html": html(result).encode(),
        "report.pdf": pdf(result),
        "recipe.json": (json.dumps(result.recipe.to_dict(), indent=1, ensure_ascii=False) + "\n").encode(),
        "nuclei.csv": csv_bytes(_nuclei(result)),
        "enrichment.csv": csv_bytes(_enrichment(result)),
    } | {f"{name}.csv": csv_bytes(getattr(result, name)) for name in TABLES}
    n = len(result.recipe.seeds)
    for arm, title in (("base", "unedited"), ("edited", "edited")):
        for i, niche in enumerate(getattr(result, arm)):
            name = f"pictures/cell{i // n + 1:03d}_seed{niche.seed}_{title}.png"
            files[name] = _png(result, niche, result.recipe.cell_ids[i // n], title)
    return files


def zip_bytes(result: Result) -> bytes:
    """All files of the report as one ZIP; the same result gives the same bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in report_files(result).items():
            archive.writestr(zipfile.ZipInfo(name, EPOCH), content, zipfile.ZIP_DEFLATED)
    return out.getvalue()


def write_report(result: Result, out_dir: str | Path) -> list[Path]:
    """Write every file of the report under ``out_dir``; other files there stay. Returns the paths, the page first."""
    paths = []
    for name, content in report_files(result).items():
        path = Path(out_dir) / name
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
        paths.append(path)
    return paths


@functools.cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs().replace("</script", "<\\/script")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment


def _number(value: object) -> str:
    """A table entry for people: four significant digits or whole, "undefined" for NaN."""
    if isinstance(value, float):
        return "undefined" if value != value else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return str(value)


def _in_words(edit: Edit | EditSet) -> str:
    if isinstance(edit, EditSet):
        dose = "" if edit.dose is None else f" at dose {edit.dose:g}"
        return f"{edit.name}{dose} acts on {len(edit.edits)} genes"
    if edit.kind == "ko":
        return f"{edit.gene} is knocked out"
    if edit.kind == "factor":
        return f"{edit.gene} is set to {100 * edit.amount:g} % of its counts"
    if edit.kind == "percentile":
        return f"{edit.gene} is set to percentile {edit.amount:g} of the cell's type"
    return f"{edit.gene} is set to {edit.amount:g} counts"


def _question(result: Result) -> str:
    cells, edits = result.recipe.cell_ids, result.recipe.perturbation.parts
    subject = f"cell {cells[0]}" if len(cells) == 1 else f"{len(cells)} cells"
    what = "when " + ", then ".join(map(_in_words, edits)) if edits else "when nothing is edited"
    return f"How does the model draw the niche of {subject} {what}?"


def _png(result: Result, niche: Niche, cell_id: str, arm: str) -> bytes:
    metadata = {
        "Title": f"{NOTICE}: {arm} niche of cell {cell_id}, seed {niche.seed}",
        "Software": "GE2Hist digital twin",
        "generated": "true",
        "recipe_sha256": result.recipe.hash,
        "recipe": result.recipe.to_json(),
        "um_per_px": niche.um_per_px,
    }
    return pictures.png_bytes(pictures.show(niche), metadata)


def _cell_pictures(result: Result, cell: int) -> dict[str, Any]:
    """Pictures of one cell as data addresses, with the words that stand in for them."""
    n = len(result.recipe.seeds)
    name = result.recipe.cell_ids[cell]
    part = slice(cell * n, (cell + 1) * n)
    base, edited = result.base[part], result.edited[part]
    first = (base[0], edited[0])
    nuclei = (result.base_nuclei[cell * n], result.edited_nuclei[cell * n])
    views = [
        ("Unedited", f"Generated H&E niche of cell {name}, unedited", pictures.show(first[0], 3)),
        ("Edited, same noise", f"Generated H&E niche of cell {name}, edited", pictures.show(first[1], 3)),
        ("Difference", "Orange where the edited picture is darker, blue where lighter", pictures.difference(*first, 3)),
        ("Nuclei, unedited", f"{len(nuclei[0])} nuclei outlined by type", pictures.overlay(first[0], nuclei[0], 3)),
        ("Nuclei, edited", f"{len(nuclei[1])} nuclei outlined by type", pictures.overlay(first[1], nuclei[1], 3)),
    ]
    sheets = [
        (f"All {n} seeds, unedited", "Contact sheet of the unedited niches", pictures.contact_sheet(base)),
        (f"All {n} seeds, edited", "Contact sheet of the edited niches", pictures.contact_sheet(edited)),
    ]
    metadata = {"generated": "true", "recipe_sha256": result.recipe.hash}

    def figure(view: tuple[str, str, Any]) -> dict[str, str]:
        title, alt, image = view
        content = base64.b64encode(pictures.png_bytes(image, metadata)).decode()
        return {"title": title, "alt": alt, "src": f"data:image/png;base64,{content}"}

    return {
        "name": name,
        "seed": first[0].seed,
        "views": [figure(view) for view in views],
        "sheets": [figure(sheet) for sheet in sheets if n > 1],
    }


def _nuclei(result: Result) -> pd.DataFrame:
    n, parts = len(result.recipe.seeds), []
    for arm, tables in (("base", result.base_nuclei), ("edited", result.edited_nuclei)):
        for i, table in enumerate(tables):
            cell, seed = result.recipe.cell_ids[i // n], result.recipe.seeds[i % n]
            parts.append(table.assign(arm=arm, cell_id=cell, seed=seed))
    table = pd.concat(parts, ignore_index=True)
    return table[["arm", "cell_id", "seed", *table.columns.difference(["arm", "cell_id", "seed"], sort=False)]]


def _machine(result: Result) -> str:
    """What :mod:`perturb.replay` reads from the page: recipe and effects as JSON."""
    return json.dumps({"recipe": result.recipe.to_dict(), "comparison": csv_bytes(result.comparison).decode()})


def _enrichment(result: Result) -> pd.DataFrame:
    """Which types are neighbours more often than by chance, per picture: see :func:`ge2hist_core.niche.enrichment`."""
    n, parts = len(result.recipe.seeds), []
    for arm, niches, tables in (
        ("base", result.base, result.base_nuclei),
        ("edited", result.edited, result.edited_nuclei),
    ):
        for i, (niche, nuclei) in enumerate(zip(niches, tables, strict=True)):
            height, width = (side * niche.um_per_px for side in niche.image.shape[:2])
            table = enrichment(nuclei, (width, height), READER_CLASSES, n_permutations=200)
            table = table[table["observed"] + table["expected"] > 0]
            parts.append(table.assign(arm=arm, cell_id=result.recipe.cell_ids[i // n], seed=niche.seed))
    table = pd.concat(parts, ignore_index=True)
    return table[["arm", "cell_id", "seed", "type_a", "type_b", "observed", "expected", "z"]]


def csv_bytes(table: pd.DataFrame) -> bytes:
    """CSV whose text entries no spreadsheet takes for a formula."""
    safe = table.copy()
    for name in safe.select_dtypes("object").columns:
        safe[name] = [re.sub(r"^(?=[=+\-@\t\r])", "'", str(value)) for value in safe[name]]
    return safe.to_csv(index=False, lineterminator="\n").encode()


def _readable(table: pd.DataFrame) -> dict[str, Any]:
    return {
        "columns": [name.replace("_", " ") for name in table.columns],
        "rows": [[_number(value) for value in row] for row in table.itertuples(index=False, name=None)],
    }


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        rows += _flat(item, f"{prefix}{key} ") if isinstance(item, dict) else [(prefix + key, str(item))]
    return rows
