"""What all reports share: one offline HTML page, safe CSV, a ZIP of files, files written one by one.

The page opens without a network and is bound to that by its content security policy: nothing is loaded from anywhere,
and of all scripts only the two below run, known by their hash. The same values give the same bytes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ge2hist_core.files import atomic_path
from perturb import charts
from perturb.wording import NOTICE

__all__ = [
    "Table",
    "chart_page",
    "csv_bytes",
    "file_name",
    "for_people",
    "json_bytes",
    "json_lines",
    "noted",
    "readme",
    "render",
    "write_files",
    "zip_of",
]

EPOCH = (1980, 1, 1, 0, 0, 0)
MAX_ROWS = 200
"""Rows of a table on the page; the files hold all."""

DRAW_CHARTS = """
const figures = JSON.parse(document.getElementById("figures").textContent);
const PRINTED_PX = {whole: 660, half: 320};
for (const [id, figure] of Object.entries(figures)) {
  Plotly.newPlot(id, figure.data, figure.layout, CONFIG);
  const row = document.createElement("p");
  row.className = "save";
  for (const [format, scale] of [["svg", 1], ["png", 3]]) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Save as " + format.toUpperCase();
    button.onclick = () => Plotly.downloadImage(id, {format, scale, filename: "ge2hist-" + id});
    row.append(button);
  }
  document.getElementById(id).after(row);
}
const resize = (printing) => {
  for (const id of Object.keys(figures)) {
    const share = document.getElementById(id).closest(".halves") ? "half" : "whole";
    Plotly.relayout(id, {width: printing ? PRINTED_PX[share] : null, autosize: !printing});
  }
};
addEventListener("beforeprint", () => resize(true));
addEventListener("afterprint", () => resize(false));
""".replace("CONFIG", json.dumps(charts.CHART_CONFIG))


@dataclass(frozen=True, eq=False)
class Table:
    """A table as the page shows it: text by row, and which columns hold numbers.

    ``left_out`` counts the rows beyond ``MAX_ROWS``.
    """

    caption: str
    columns: list[str]
    rows: list[list[str]]
    numeric: list[bool]
    left_out: int = 0

    @classmethod
    def of(cls, table: pd.DataFrame, caption: str, max_rows: int = MAX_ROWS) -> Table:
        """Numbers to four significant digits, "undefined" for NaN, blanks for underscores in the names of columns."""
        return cls(
            caption,
            [str(name).replace("_", " ") for name in table.columns],
            [[_text(value) for value in row] for row in table.head(max_rows).itertuples(index=False, name=None)],
            [bool(pd.api.types.is_numeric_dtype(dtype) and dtype.kind != "b") for dtype in table.dtypes],
            max(0, len(table) - max_rows),
        )


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "undefined" if value != value else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return str(value)


def for_people(table: pd.DataFrame) -> pd.DataFrame:
    """A table of effects with readable readouts, shares in percent, and one column for the interval.

    Parameters
    ----------
    table: with the columns ``readout, unit`` and numbers in that unit.
    """
    table = table.copy()
    share = table["readout"].str.startswith("fraction:").to_numpy(dtype=bool)
    numbers = ("base", "edited", "reference_mean", "mean", "first_effect", "effect", "low", "high")
    scaled = [name for name in numbers if name in table]
    table[scaled] = table[scaled].astype(float)
    table.loc[share, scaled] *= 100.0
    table.loc[share, "unit"] = "%"
    table["readout"] = [charts.readable(name) for name in table["readout"]]
    interval = [
        f"{low:.3g} to {high:.3g}" if low == low else "undefined"
        for low, high in zip(table["low"], table["high"], strict=True)
    ]
    table.insert(table.columns.get_loc("high"), "95 % interval", interval)
    names = {"base": "unedited", "effect": "difference", "first_effect": "difference, first seeds"}
    return table.drop(columns=["low", "high"]).rename(columns=names)


def render(template: str, figures: Mapping[str, Any], machine: Mapping[str, Any], **values: Any) -> str:
    """The page of a template beside this file.

    Parameters
    ----------
    figures: plotly figures by the id of the element that the template has for each.
    machine: what :mod:`perturb.replay` reads from the page.
    values: for the template; every text among them is escaped.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    plotly = _plotly()
    data = "{" + ",".join(f"{json.dumps(name)}:{figure.to_json()}" for name, figure in figures.items()) + "}"
    return environment.get_template(template).render(
        notice=NOTICE,
        machine=_inert(json.dumps(machine)),
        figures=_inert(data),
        plotly=Markup(plotly),
        draw=Markup(DRAW_CHARTS),
        hashes=Markup(" ".join(f"'sha256-{_sha256(script)}'" for script in (plotly, DRAW_CHARTS))),
        **values,
    )


def chart_page(figure: Any, title: str, sentences: Sequence[str] = ()) -> bytes:
    """One chart as an offline page of the same kind, with what is to be said about it."""
    return render("chart.html.j2", {"chart": figure}, {}, title=title, sentences=sentences).encode()


def _inert(text: str) -> Markup:
    """JSON in which no text can end the script element that holds it."""
    return Markup(text.replace("<", "\\u003c"))


@functools.cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs().replace("</script", "<\\/script")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def csv_bytes(table: pd.DataFrame) -> bytes:
    """CSV whose text entries no spreadsheet takes for a formula, with a column that says what the numbers are."""
    safe = table.copy()
    for name in safe.columns[[dtype.kind == "O" or str(dtype) == "category" for dtype in safe.dtypes]]:
        safe[name] = [_tame(str(value)) for value in safe[name]]
    return safe.assign(notice=NOTICE).to_csv(index=False, lineterminator="\n").encode()


def _tame(text: str) -> str:
    """Text that no spreadsheet takes for a formula, and whose carriage returns start no row."""
    return re.sub(r"^(?=[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20])", "'", text).replace("\r", " ")


def json_lines(value: Mapping[str, Any]) -> str:
    """JSON for the eye: one line per field."""
    lines = (f" {json.dumps(name)}: {json.dumps(item, ensure_ascii=False)}" for name, item in value.items())
    return "{\n" + ",\n".join(lines) + "\n}"


def noted(value: Mapping[str, Any]) -> dict[str, Any]:
    """A table of fields for a JSON file, with the notice first; readers leave the notice out."""
    return {"notice": NOTICE, **value}


def file_name(text: str) -> str:
    """Letters, digits and hyphens of a text, at most 40; empty where it has none."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[:40]


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def readme(title: str, files: Mapping[str, str], further: str) -> bytes:
    """``README.txt`` of a report: what each file holds, and what is left out."""
    width = max(map(len, files)) + 2
    lines = [NOTICE.upper(), "", title, "", *(f"{name:{width}}{text}" for name, text in files.items()), "", further]
    return ("\n".join(lines) + "\n").encode()


def zip_of(files: Mapping[str, bytes]) -> bytes:
    """The files as one ZIP without times: the same files give the same bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, EPOCH), content, zipfile.ZIP_DEFLATED)
    return out.getvalue()


def write_files(files: Mapping[str, bytes], out_dir: str | Path) -> list[Path]:
    """Write every file under ``out_dir``, each atomically; other files there stay. Returns the paths in their order."""
    paths = []
    for name, content in files.items():
        path = Path(out_dir) / name
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
        paths.append(path)
    return paths
