"""``python -m perturb replay REPORT``: run a report again and say whether the numbers are the same.

A report is the folder, ZIP or HTML page of a comparison, of scenarios, of a screen or of doses, or the folder of a goal
search; each holds all that decides the result, and the tables that came out.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ge2hist_core.files import parse_json
from ge2hist_core.types import BadInput, Cells
from perturb.goal import Goal
from perturb.grn import Network, unpack_network
from perturb.page import csv_bytes
from perturb.recipe import Recipe
from perturb.screen import Screen
from perturb.workspace import Workspace

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist
    from perturb.cache import DiskCache
    from perturb.run import Progress

__all__ = ["Difference", "Doses", "SavedReport", "difference", "parse_report", "read_report", "rerun"]

Doses = tuple[tuple[float, Recipe], ...]
"""A series of :func:`perturb.doses.dose_series`."""

TABLES = {
    "comparison": ("readout",),
    "spread_effects": ("contrast", "readout"),
    "guess": ("candidate",),
    "confirmed": ("candidate", "readout"),
    "effects": ("scenario", "readout"),
    "contrasts": ("scenario", "reference", "readout"),
    "doses": ("dose", "readout"),
    "tradeoff": ("size", "edits"),
    "drawn": ("size", "role", "edits", "readout"),
}
"""Tables that are compared, and the columns that name their rows."""
MAX_BYTES = 500_000_000
MAX_PART_BYTES = 100_000_000
"""Of one table or recipe inside a report."""
SAME = 1e-9
"""Relative difference up to which two numbers are the same: CSV keeps all digits."""
ROUNDING = 1e-3
"""Up to which they are the same but for rounding: other processors and libraries add up in another order."""
MAX_THREADS = 64
CURE = "give the folder, ZIP or HTML page that a comparison or a screen wrote"
NEEDED = {
    Recipe: ("comparison",),
    Screen: ("guess", "confirmed"),
    Workspace: ("effects",),
    Goal: ("tradeoff", "drawn"),
    tuple: ("doses",),
}
"""Tables that a report of each kind must have."""


@dataclass(frozen=True)
class Difference:
    """The largest difference between two sets of tables: ``value`` relative to the larger of both numbers.

    ``where`` names row and column; ``missing`` lists rows and columns that one side lacks; ``n`` counts the rows
    compared.
    """

    value: float
    where: str
    missing: tuple[str, ...]
    n: int = 0

    @property
    def same(self) -> bool:
        """Whether all numbers are the same, at least up to rounding."""
        return self.value <= ROUNDING and not self.missing

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.same:
            how = "same" if self.value <= SAME else "same up to rounding"
            return f"{how}: {self.n} rows, largest relative difference {self.value:.1g}"
        lacking = ", ".join(self.missing[:5]) + (f" and {len(self.missing) - 5} more" if len(self.missing) > 5 else "")
        only = f"only one run has {lacking}; " if self.missing else ""
        return f"different: {only}largest relative difference {self.value:.3g}" + f" ({self.where})" * bool(self.where)


@dataclass(frozen=True, eq=False)
class SavedReport:
    """A report as it was written.

    Parameters
    ----------
    what: all that decides the result: of a comparison, screen, list of scenarios, goal search or series of doses.
    tables: by name, rows named as in ``TABLES``, columns of numbers alone.
    network: through which the edits spread, or None.
    versions: of the libraries that it was made with, and the code's fingerprint; empty where the report does not say.
    networks: those of the scenarios, by their SHA-256.
    reference: scenario that the others are compared with.
    """

    what: Recipe | Screen | Workspace | Goal | Doses
    tables: dict[str, pd.DataFrame]
    network: Network | None = None
    versions: dict[str, str] = field(default_factory=dict)
    networks: dict[str, Network] = field(default_factory=dict)
    reference: str = ""

    @property
    def recipe(self) -> Recipe:
        """Of the comparison, the first scenario or the largest dose, or of what all candidates share."""
        return self.recipes[-1] if isinstance(self.what, tuple) else self.recipes[0]

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """All that the report draws, of a screen or search what its candidates share."""
        if isinstance(self.what, Recipe):
            return (self.what,)
        if isinstance(self.what, Workspace):
            return self.what.on_shared_noise
        return tuple(recipe for _, recipe in self.what) if isinstance(self.what, tuple) else (self.what.recipe,)

    def network_of(self, recipe: Recipe) -> Network | None:
        """The network through which one of the recipes spreads its edits, or None."""
        how = recipe.propagation
        return self.network if how is None else self.networks.get(how.network_sha256, self.network)


def read_report(path: str | Path) -> SavedReport:
    """A report on disk.

    Raises
    ------
    BadInput: not a report, or one too large to be one.
    """
    path = Path(path)
    with _explained(str(path)):
        if path.is_dir():
            return _of_files(_folder_part(path), str(path))
        if path.stat().st_size > MAX_BYTES:
            raise BadInput(f"{path} has {path.stat().st_size / 1e6:.0f} MB, more than any report: {CURE}.")
        return parse_report(path.read_bytes(), str(path))


def parse_report(content: bytes, name: str) -> SavedReport:
    """The bytes of a ZIP or HTML page; ``name`` is for messages.

    Raises
    ------
    BadInput: not a report.
    """
    with _explained(name):
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                return _of_files(_zip_part(archive), name)
        found = re.search(
            r'<script type="application/json" id="ge2hist">(.*?)</script>', content.decode("utf-8"), re.DOTALL
        )
        if found is None:
            raise BadInput(f"{name} is no report of GE2Hist: {CURE}.")
        return _of_page(parse_json(found[1], f"The data in {name}", CURE))


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what a damaged report raises into one sentence; an archive raises half a dozen classes."""
    archive = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)
    text = (ValueError, KeyError, TypeError, AttributeError)
    try:
        yield
    except BadInput:
        raise
    except (OSError, *archive, *text) as error:
        raise BadInput(f"Cannot read the report {name} ({error}): {CURE}.") from None


Part = Callable[[str], "bytes | None"]
"""Content of a file of the report by its name, None where there is no such file."""


def _folder_part(folder: Path) -> Part:
    def read(name: str) -> bytes | None:
        path = folder / name
        if not path.is_file():
            return None
        if path.stat().st_size > MAX_PART_BYTES:
            raise BadInput(f"{name} in {folder} is larger than any report's: {CURE}.")
        return path.read_bytes()

    return read


def _zip_part(archive: zipfile.ZipFile) -> Part:
    names = set(archive.namelist())

    def read(name: str) -> bytes | None:
        if name not in names:
            return None
        if archive.getinfo(name).file_size > MAX_PART_BYTES:
            raise BadInput(f"{name} in the ZIP is larger than any report's: {CURE}.")
        return archive.read(name)

    return read


def _of_files(read: Part, name: str) -> SavedReport:
    """A report in files."""
    provenance = parse_json(read("provenance.json") or b"{}", "provenance.json", CURE)
    for kind, make in (("workspace", _of_workspace), ("doses", _of_doses), ("goal", _of_goal)):
        if (content := read(f"{kind}.json")) is not None:
            return make(parse_json(content, f"{kind}.json", CURE), read, provenance)
    recipe, screen = read("recipe.json"), read("screen.json")
    if recipe is None and screen is None:
        raise BadInput(f"{name} holds neither recipe.json nor screen.json: {CURE}.")
    tables = {one: content for one in TABLES if (content := read(f"{one}.csv")) is not None}
    what: Recipe | Screen
    if recipe is not None:
        what = Recipe.from_json(recipe.decode())
    else:
        what = Screen.from_dict(parse_json(screen or b"", "screen.json", CURE))
        _whole(provenance.get("complete"))
    network = read("network.json")
    packed = None if network is None else parse_json(network, "network.json", CURE)
    return _saved(what, tables, provenance, packed)


def _tables(read: Part, names: Sequence[str]) -> dict[str, bytes]:
    return {one: content for one in names if (content := read(f"{one}.csv")) is not None}


def _of_workspace(value: dict[str, Any], read: Part, provenance: dict[str, Any]) -> SavedReport:
    """Scenarios in files."""
    networks = parse_json(read("networks.json") or b"{}", "networks.json", CURE).get("networks", [])
    return _scenarios(value, _tables(read, ("effects", "contrasts")), provenance, networks)


def _scenarios(
    value: dict[str, Any], tables: dict[str, bytes], provenance: dict[str, Any], networks: list[dict[str, Any]]
) -> SavedReport:
    workspace = Workspace.from_json(json.dumps(value))
    saved = _saved(workspace, tables, provenance, None)
    unpacked = {network.sha256: network for network in map(unpack_network, networks)}
    reference = value.get("reference", workspace.scenarios[0].name if len(workspace) else "")
    if reference not in [scenario.name for scenario in workspace.scenarios]:
        raise BadInput(f"The reference {reference!r} is none of the scenarios: write the report again.")
    return replace(saved, networks=unpacked, reference=reference)


def _of_doses(value: dict[str, Any], read: Part, provenance: dict[str, Any]) -> SavedReport:
    """Doses in files."""
    from perturb.dose_report import read_series

    network = read("network.json")
    packed = None if network is None else parse_json(network, "network.json", CURE)
    return _saved(read_series(value), _tables(read, ("doses",)), provenance, packed)


def _of_goal(value: dict[str, Any], read: Part, provenance: dict[str, Any]) -> SavedReport:
    """A goal search in files."""
    tables = _tables(read, ("tradeoff",))
    if (drawn := read("confirmed.csv")) is not None:
        tables["drawn"] = drawn
    return _saved(Goal.from_dict(value), tables, provenance, None)


def _of_page(value: dict[str, Any]) -> SavedReport:
    """What a page carries for this module."""
    tables = {one: value[one].encode() for one in TABLES if one in value}
    provenance = value.get("provenance", {})
    if "workspace" in value:
        return _scenarios(value["workspace"], tables, provenance, value.get("networks", []))
    if "series" in value:
        from perturb.dose_report import read_series

        return _saved(read_series(value), tables, provenance, value.get("network"))
    if "screen" in value:
        _whole(value.get("complete"))
        return _saved(Screen.from_dict(value["screen"]), tables, provenance, None)
    return _saved(Recipe.from_json(json.dumps(value["recipe"])), tables, provenance, value.get("network"))


def _whole(complete: object) -> None:
    if complete is not True:
        raise BadInput("This is the report of a screen that was not finished: finish the screen and write it again.")


def _saved(
    what: Recipe | Screen | Workspace | Goal | Doses,
    tables: dict[str, bytes],
    provenance: dict[str, Any],
    network: dict[str, Any] | None,
) -> SavedReport:
    for name in NEEDED[type(what)]:
        if name not in tables:
            raise BadInput(f"The report has no table {'confirmed' if name == 'drawn' else name}.csv: {CURE}.")
    versions = {"code": provenance["engine"]} | provenance["versions"] if "engine" in provenance else {}
    return SavedReport(
        what,
        {name: _table(name, content) for name, content in tables.items()},
        None if network is None else unpack_network(network),
        {str(name): str(version) for name, version in versions.items()},
    )


def _table(name: str, content: bytes) -> pd.DataFrame:
    """Numbers of a table, its rows named."""
    try:
        table = pd.read_csv(io.BytesIO(content), float_precision="round_trip", keep_default_na=False, na_values=[""])
        keys = table[list(TABLES[name])].astype(str).agg(", ".join, axis=1) if len(table) else []
        numbers = table.select_dtypes(["number", "bool"]).astype(np.float64)
        return numbers.set_index(pd.Index(keys, dtype=object))
    except (ValueError, KeyError) as error:
        raise BadInput(f"The report's {name}.csv is damaged ({error}): write the report again.") from None


def rerun(
    saved: SavedReport,
    model: GE2Hist,
    cells: Cells | Sequence[Cells],
    *,
    cache: DiskCache | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> Difference:
    """Run a report again, from nothing and with as many threads as it was made with, and compare.

    Parameters
    ----------
    cells: of the recipe's file, as :func:`perturb.run.cells_for` gives them; of scenarios, for each of ``recipes``.
    cache: what comes out of a comparison is kept in it; nothing is taken from it.

    Raises
    ------
    BadInput: as :func:`perturb.run.run`. ge2hist_core.sampler.Stopped: cancelled.
    """
    with _threads(saved.versions.get("threads", "")):
        return _rerun(saved, model, cells, cache, on_progress, cancel)


@contextmanager
def _threads(number: str) -> Iterator[None]:
    """Torch's threads as a report had them, as far as it says so."""
    import torch

    before = torch.get_num_threads()
    if number.isdecimal() and 1 <= int(number) <= MAX_THREADS:
        torch.set_num_threads(int(number))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rerun(
    saved: SavedReport,
    model: GE2Hist,
    cells: Cells | Sequence[Cells],
    cache: DiskCache | None,
    on_progress: Callable[[Progress], None] | None,
    cancel: threading.Event | None,
) -> Difference:
    from perturb.cache import DiskCache
    from perturb.result import store_result
    from perturb.run import run
    from perturb.screen import run_screen

    first = cells if isinstance(cells, Cells) else cells[0]
    if isinstance(saved.what, Recipe):
        result = run(saved.what, model, first, network=saved.network, on_progress=on_progress, cancel=cancel)
        if cache is not None:
            for name, arm in result.arms.items():
                cache.store_arrays(saved.what.arms[name].hash, arm.to_arrays())
            store_result(result, cache)
        after = {name: getattr(result, name) for name in saved.tables if hasattr(result, name)}
    elif not isinstance(saved.what, Screen):
        each = [cells] if isinstance(cells, Cells) else cells
        after = _rerun_many(saved, model, each, on_progress, cancel)
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = run_screen(saved.what, model, first, DiskCache(folder), on_progress=on_progress, cancel=cancel)
        after = {"guess": found.guess, "confirmed": found.confirmed}
    # Through the same text form, so that names and digits are treated alike.
    tables = {name: _table(name, csv_bytes(table)) for name, table in after.items()}
    return _largest({name: difference(table, tables[name]) for name, table in saved.tables.items() if name in tables})


def _rerun_many(
    saved: SavedReport,
    model: GE2Hist,
    cells: Sequence[Cells],
    on_progress: Callable[[Progress], None] | None,
    cancel: threading.Event | None,
) -> dict[str, pd.DataFrame]:
    """Tables of scenarios, doses or a goal search, run again from nothing; arms that several share are drawn once."""
    from perturb.cache import DiskCache
    from perturb.doses import run_doses
    from perturb.goal import run_goal
    from perturb.run import Progress, run
    from perturb.workspace import contrast_table, effects_table

    how: dict[str, Any] = {"on_progress": on_progress, "cancel": cancel}
    with tempfile.TemporaryDirectory() as folder:
        kept = DiskCache(folder)
        if isinstance(saved.what, Goal):
            found = run_goal(saved.what, model, cells[0], kept, **how)
            return {"tradeoff": found.tradeoff, "drawn": found.confirmed}
        if isinstance(saved.what, tuple):
            return {"doses": run_doses(saved.what, model, cells[0], kept, network=saved.network, **how)}
        results, n = [], len(saved.recipes)
        for i, (recipe, some) in enumerate(zip(saved.recipes, cells, strict=True)):

            def report(progress: Progress, i: int = i) -> None:
                if on_progress is not None:
                    text = f"Scenario {i + 1} of {n}"
                    on_progress(Progress((i + progress.fraction) / n, text, progress.preview))

            network = saved.network_of(recipe)
            results.append(run(recipe, model, some, network=network, cache=kept, on_progress=report, cancel=cancel))
    names = [scenario.name for scenario in saved.what.scenarios] if isinstance(saved.what, Workspace) else []
    tables = {"effects": effects_table(names, results), "contrasts": contrast_table(names, results, saved.reference)}
    return {name: table for name, table in tables.items() if len(table)}


def difference(before: pd.DataFrame, after: pd.DataFrame) -> Difference:
    """Compare two tables of numbers, rows and columns by their names."""
    missing = (*sorted(set(before.index) ^ set(after.index)), *sorted(set(before.columns) ^ set(after.columns)))
    rows = [name for name in dict.fromkeys(before.index) if name in after.index]
    columns = [name for name in before.columns if name in after.columns]
    a, b = before.loc[rows, columns].to_numpy(dtype=float), after.loc[rows, columns].to_numpy(dtype=float)
    if a.shape != b.shape:
        return Difference(float("inf"), "a row that is there twice", missing, len(rows))
    gap = np.abs(a - b) / np.maximum(np.maximum(np.abs(a), np.abs(b)), 1e-12)
    gap[(a == b) | (np.isnan(a) & np.isnan(b))] = 0.0
    gap[np.isnan(gap)] = np.inf  # defined on one side alone
    if not gap.size:
        return Difference(0.0, "", missing, len(rows))
    row, column = np.unravel_index(int(gap.argmax()), gap.shape)
    return Difference(float(gap[row, column]), f"{rows[row]}, {columns[column]}", missing, len(rows))


def _largest(found: dict[str, Difference]) -> Difference:
    """The differences of several tables as one."""
    worst = max(found.values(), key=lambda one: one.value)
    missing = tuple(f"{table}: {name}" for table, one in found.items() for name in one.missing)
    return Difference(
        worst.value, worst.where if worst.value > 0 else "", missing, sum(one.n for one in found.values())
    )


def changed_versions(saved: SavedReport) -> str:
    """What is another version here than where the report was written, as a clause; empty where nothing is."""
    from perturb.cache import engine_fingerprint, versions

    here = {"code": engine_fingerprint()} | versions()
    # A report's threads are taken over by its rerun.
    changed = [
        f"{name} {was}, here {here.get(name, 'unknown')}"
        for name, was in saved.versions.items()
        if here.get(name) != was and name != "threads"
    ]
    return f"The report was made with {'; '.join(changed)}." if changed else ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m perturb replay``."""
    parser.add_argument("report", help="folder, ZIP or HTML page of a comparison, scenarios, screen or doses")
    parser.add_argument("--bundle", default="assets/demo_bundle", help="folder of the model")
    parser.add_argument("--cells", default="assets/demo_cells.h5ad", help="the h5ad that the report was made with")


def main(args: argparse.Namespace) -> int:
    """Run the report again; returns 0 for the same numbers, at least up to rounding, 1 for others.

    Raises
    ------
    BadInput: a report, bundle or data file that cannot be used, or that do not belong together.
    """
    from perturb.run import open_recipe, print_progress

    saved = read_report(args.report)
    with tempfile.TemporaryDirectory() as folder:
        args.recipe = Path(folder) / "recipe.json"
        args.recipe.write_text(saved.recipe.to_json(), encoding="utf-8")
        _, model, first = open_recipe(args)
    cells: Cells | list[Cells] = first
    if isinstance(saved.what, Workspace):
        from perturb.compare import recipe_cells

        cells = [recipe_cells(recipe, args.cells, model) for recipe in saved.recipes]
    found = rerun(saved, model, cells, on_progress=print_progress())
    print(found.verdict)
    if found.value > SAME and (why := changed_versions(saved)):
        print(why)
    return 0 if found.same else 1
