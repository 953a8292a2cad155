"""``python -m perturb replay REPORT``: run a report's recipe again and say whether the numbers are the same.

A report is its folder, its ZIP or its HTML page; each holds the recipe and the table of effects.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ge2hist_core.types import BadInput
from perturb.recipe import Recipe

__all__ = ["Difference", "difference", "read_report"]

NUMBERS = ("base", "edited", "effect", "low", "high", "p", "q", "n")
MAX_BYTES = 500_000_000
SAME = 1e-9
"""Relative difference up to which two numbers are the same: CSV keeps all digits, other processors round otherwise."""


@dataclass(frozen=True)
class Difference:
    """The largest difference between two tables of effects: ``value`` relative to the larger of both numbers.

    ``where`` names readout and column; ``missing`` lists readouts that one table lacks.
    """

    value: float
    where: str
    missing: tuple[str, ...]

    @property
    def same(self) -> bool:
        return self.value <= SAME and not self.missing


def read_report(path: str | Path) -> tuple[Recipe, pd.DataFrame]:
    """Recipe and table of effects of a report.

    Raises
    ------
    BadInput: not a report, or one too large to be one.
    """
    path = Path(path)
    cure = "give the folder, ZIP or HTML page that a comparison wrote"
    try:
        if path.is_dir():
            recipe, table = (path / name for name in ("recipe.json", "comparison.csv"))
            return Recipe.from_json(recipe.read_text(encoding="utf-8")), _table(table.read_bytes())
        if path.stat().st_size > MAX_BYTES:
            raise BadInput(f"{path} has {path.stat().st_size / 1e6:.0f} MB, more than any report: {cure}.")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in ("recipe.json", "comparison.csv"):
                    if archive.getinfo(name).file_size > MAX_BYTES:
                        raise BadInput(f"{name} in {path} is larger than any report's: {cure}.")
                recipe_text = archive.read("recipe.json").decode()
                return Recipe.from_json(recipe_text), _table(archive.read("comparison.csv"))
        found = re.search(
            r'<script type="application/json" id="ge2hist">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL
        )
        if found is None:
            raise BadInput(f"{path} is no report of GE2Hist: {cure}.")
        value = json.loads(found[1])
        return Recipe.from_json(json.dumps(value["recipe"])), _table(value["comparison"].encode())
    except (OSError, UnicodeDecodeError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise BadInput(f"Cannot read the report {path} ({error}): {cure}.") from None


def _table(content: bytes) -> pd.DataFrame:
    try:
        table = pd.read_csv(io.BytesIO(content), float_precision="round_trip")
        return table.set_index("readout")[list(NUMBERS)].astype(np.float64)
    except (ValueError, KeyError) as error:
        raise BadInput(f"The report's comparison.csv is damaged ({error}): write the report again.") from None


def difference(before: pd.DataFrame, after: pd.DataFrame) -> Difference:
    """Compare two tables of effects, both indexed by readout with the columns ``NUMBERS``."""
    missing = tuple(sorted(set(before.index) ^ set(after.index)))
    shared = [name for name in before.index if name in after.index]
    a, b = before.loc[shared, list(NUMBERS)].to_numpy(), after.loc[shared, list(NUMBERS)].to_numpy()
    gap = np.abs(a - b) / np.maximum(np.maximum(np.abs(a), np.abs(b)), 1e-12)
    gap[np.isnan(a) & np.isnan(b)] = 0.0
    gap[np.isnan(gap)] = np.inf  # defined on one side alone
    if not gap.size:
        return Difference(0.0, "", missing)
    row, column = np.unravel_index(int(gap.argmax()), gap.shape)
    return Difference(float(gap[row, column]), f"{shared[row]}, {NUMBERS[column]}", missing)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m perturb replay``."""
    parser.add_argument("report", help="folder, ZIP or HTML page of a comparison")
    parser.add_argument("--bundle", default="assets/demo_bundle", help="folder of the model")
    parser.add_argument("--cells", default="assets/demo_cells.h5ad", help="the h5ad that the report was made with")


def main(args: argparse.Namespace) -> int:
    """Run the recipe again; returns 0 for the same numbers, 1 for others.

    Raises
    ------
    BadInput: a report, bundle or data file that cannot be used, or that do not belong together.
    """
    import tempfile

    from perturb.run import open_recipe, print_progress, run

    recipe, before = read_report(args.report)
    with tempfile.TemporaryDirectory() as folder:
        args.recipe = Path(folder) / "recipe.json"
        args.recipe.write_text(recipe.to_json(), encoding="utf-8")
        _, model, cells = open_recipe(args)
    after = run(recipe, model, cells, on_progress=print_progress()).comparison
    found = difference(before, after.set_index("readout")[list(NUMBERS)].astype(np.float64))
    if found.same:
        print(f"same: {len(before)} readouts, largest relative difference {found.value:.1g}")
        return 0
    if found.missing:
        print(f"different: only one run has {', '.join(found.missing)}")
    print(f"different: largest relative difference {found.value:.3g} ({found.where})")
    return 1
