"""A signature at seven doses, against the same unedited niche: ``python -m perturb dose``.

Every dose is an ordinary recipe, so each comparison can be opened by itself, and the unedited arm is drawn once.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ge2hist_core.types import BadInput, Cells
from perturb.dose_response import DoseResponse, Hill, dose_response, doses
from perturb.edits import Edit, EditSet, Perturbation
from perturb.grn import Network
from perturb.recipe import Recipe
from perturb.result import pack_table, unpack_table
from perturb.run import Progress, run
from perturb.signature_options import add_reading, file_signatures, find_signature
from perturb.signatures import Signature, expand
from perturb.stats import crossed_effect
from perturb.tables import LEVEL, steps

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist
    from perturb.cache import DiskCache

__all__ = [
    "at_dose",
    "at_every_dose",
    "comes_from",
    "dose_series",
    "hill_curve",
    "load_doses",
    "respond",
    "run_doses",
    "series_key",
]

COLUMNS = ("dose", "readout", "unit", "base", "edited", "effect", "low", "high", "p", "n")


def at_dose(recipe: Recipe, signature: Signature, genes: Sequence[str], dose: float) -> Recipe:
    """The recipe with the signature at this dose in the place where it stands, else after all other edits.

    At dose 0 the signature is left out. A set of the same name without a dose is another thing and stays.

    Raises
    ------
    BadInput: as :func:`perturb.signatures.expand`.
    """
    edits = expand(signature, genes, dose).perturbation.edits
    new = (EditSet(signature.name, edits, dose),) if edits else ()
    parts = recipe.perturbation.parts
    here = (
        i for i, p in enumerate(parts) if isinstance(p, EditSet) and p.name == signature.name and p.dose is not None
    )
    place = next(here, len(parts))
    return replace(recipe, perturbation=Perturbation((*parts[:place], *new, *parts[place + 1 :])))


def comes_from(part: Edit | EditSet, signature: Signature, genes: Sequence[str]) -> bool:
    """Whether a set of edits is this signature at the set's dose: same name, and exactly the same edits on these data.

    A name alone says little: a file may hold another signature of that name, and sets without a dose are no signatures.
    At dose 0, where a signature has no edit, a set that leaves its genes at their counts is meant.
    """
    if not isinstance(part, EditSet) or part.dose is None or part.name != signature.name:
        return False
    try:
        found = expand(signature, genes, part.dose)
    except BadInput:  # a dose out of range, or none of its genes is in these data
        return False
    if part.dose == 0:
        return all(edit.kind == "factor" and edit.amount == 1 and edit.gene in found.matched for edit in part.edits)
    return found.perturbation.edits == part.edits


def dose_series(
    recipe: Recipe, signature: Signature, genes: Sequence[str], maximum: float
) -> list[tuple[float, Recipe]]:
    """Dose and recipe for dose 0 and six that double up to ``maximum`` (below 0: the signature reversed).

    Raises
    ------
    BadInput: a maximum of 0 or outside -4 to 4; no gene of the signature in the data.
    """
    sign = -1.0 if maximum < 0 else 1.0
    return [(sign * d, at_dose(recipe, signature, genes, sign * d)) for d in doses(abs(maximum))]


def series_key(series: Sequence[tuple[float, Recipe]]) -> str:
    """Name of a series in the cache: SHA-256 of its recipes' hashes."""
    return hashlib.sha256("\n".join(recipe.hash for _, recipe in series).encode()).hexdigest()


def load_doses(series: Sequence[tuple[float, Recipe]], cache: DiskCache) -> pd.DataFrame | None:
    """What :func:`run_doses` gave for this series, or None."""
    stored = cache.load_json(series_key(series))
    return None if stored is None else unpack_table(stored)


def run_doses(
    series: Sequence[tuple[float, Recipe]],
    model: GE2Hist,
    cells: Cells,
    cache: DiskCache,
    *,
    network: Network | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> pd.DataFrame:
    """Draw and compare every dose; one row per dose and readout.

    Parameters
    ----------
    cache: keeps the unedited arm from one dose to the next, and finished doses for a run that goes on.

    Returns
    -------
    DataFrame ``dose, readout, unit, base, edited, effect, low, high, p, n``; ``p`` is not adjusted over doses. A
    readout that is seen at any dose has a row at each.
    """
    tables, readouts = [], []
    for i, (dose, recipe) in enumerate(series):

        def report(progress: Progress, i: int = i, dose: float = dose) -> None:
            if on_progress is not None:
                text = f"Dose {dose:g}, {i + 1} of {len(series)}"
                on_progress(Progress((i + progress.fraction) / len(series), text, progress.preview))

        result = run(recipe, model, cells, network=network, cache=cache, on_progress=report, cancel=cancel)
        tables.append(result.comparison.assign(dose=dose))
        readouts.append(result.readouts)
    table = at_every_dose(tables, readouts, series[0][1].encoder_seed)
    cache.store_json(series_key(series), pack_table(table))
    return table


def at_every_dose(comparisons: Sequence[pd.DataFrame], readouts: Sequence[pd.DataFrame], seed: int) -> pd.DataFrame:
    """One table of all doses, in which a type that some dose shows is 0 where no picture of either arm shows it.

    A comparison leaves such types out (:func:`perturb.tables.statistics`); a dose response needs them, dose 0 first.

    Parameters
    ----------
    comparisons: ``[dose]`` tables ``dose, readout, unit, base, edited, effect, low, high, p, n``.
    readouts: ``[dose]`` readouts per picture behind them (:attr:`perturb.result.Result.readouts`).
    seed: of the intervals.

    Returns
    -------
    DataFrame with these columns. ``n`` counts, as everywhere, the pairs in which the readout is defined.
    """
    names = list(dict.fromkeys(name for one in comparisons for name in one["readout"]))
    tables = []
    for one, pictures in zip(comparisons, readouts, strict=True):
        rows, size = [], steps(pictures)
        for name in names:
            if (one["readout"] == name).any():
                continue
            part = pictures[pictures["readout"] == name]
            base, edited = (
                part[part["arm"] == arm].pivot(index="cell_id", columns="seed", values="value").to_numpy()
                for arm in ("base", "edited")
            )
            found = crossed_effect(base, edited, seed, LEVEL, size[name])
            level = 0.0 if found.n else np.nan
            numbers = (level, level, found.value, found.low, found.high, found.p, found.n)
            rows.append((one["dose"].iloc[0], name, part["unit"].iloc[0], *numbers))
        tables += [one[list(COLUMNS)]] + [pd.DataFrame(rows, columns=list(COLUMNS))] * bool(rows)
    return pd.concat(tables, ignore_index=True)


def respond(table: pd.DataFrame, readout: str) -> DoseResponse:
    """Plateau and EC50 of one readout of :func:`run_doses`; without a row at dose 0 there is neither, and a reason."""
    rows = table[table["readout"] == readout].copy()
    rows["dose"] = rows["dose"].abs()
    rows = rows.sort_values("dose")
    if not (rows["dose"] == 0).any():
        return DoseResponse(False, math.nan, None, "The readout has no value at dose 0 to compare with.")
    return dose_response(*(rows[name].to_numpy() for name in ("dose", "effect", "low", "high")))


def hill_curve(hill: Hill, doses: np.ndarray, n: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """A fitted curve over the range of the doses: ``(dose [n], effect [n])``."""
    x = np.linspace(0.0, np.abs(doses).max(), n)
    share = x**hill.slope / (hill.ec50**hill.slope + x**hill.slope)
    return x * (-1.0 if doses.min() < 0 else 1.0), hill.bottom + (hill.top - hill.bottom) * share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m perturb dose``."""
    parser.add_argument("recipe", help="recipe.json: cells, seeds and further edits")
    parser.add_argument("--signature", required=True, help="name in the library or in --signature-file")
    parser.add_argument("--signature-file", help="GMT, CSV, TSV, GCT, GCTX or h5ad with the signature")
    add_reading(parser)
    parser.add_argument("--max-dose", type=float, default=2.0, help="-4 to 4; below 0 the signature is reversed")
    parser.add_argument("--out", required=True, help="folder for the report: page, table, recipes")
    parser.add_argument("--bundle", default="assets/demo_bundle", help="folder of the model")
    parser.add_argument(
        "--cells", default="assets/demo_cells.h5ad", help="the h5ad or store that the recipe was made with"
    )
    parser.add_argument("--network", help="the network table of a recipe whose edits spread")
    parser.add_argument("--cache", help="folder in which finished arms are kept and looked up")


def main(args: argparse.Namespace) -> None:
    """Run seven doses and write the report: page, table, recipes.

    Raises
    ------
    BadInput: a recipe, bundle, data or signature file that cannot be used, or that do not belong together.
    """
    from perturb.cache import report_folder
    from perturb.dose_report import report_files
    from perturb.networks import network_for
    from perturb.page import write_files
    from perturb.run import open_recipe, print_progress
    from perturb.wording import Origin

    signature = find_signature(args.signature, args.signature_file, file_signatures(args))
    recipe, model, cells = open_recipe(args)
    network = network_for(recipe, args.network, args.recipe)
    series = dose_series(recipe, signature, list(cells.genes), args.max_dose)
    for sentence in expand(signature, list(cells.genes), args.max_dose).sentences:
        print(sentence)
    with report_folder(args.out, args.cache, series_key(series)) as cache:
        table = run_doses(series, model, cells, cache, network=network, on_progress=print_progress())
        origin = replace(Origin.of_model(model, cells), network="" if network is None else network.source)
        for path in write_files(report_files(series, table, signature, origin, network), args.out):
            print(path)
    for readout in ("density", "spacing"):
        found = respond(table, readout)
        said = found.reason if found.hill is None else (
            f"half-effective dose {found.hill.ec50:.3g} [{found.hill.ec50_low:.3g}, {found.hill.ec50_high:.3g}] "
            f"{signature.dose_unit}"
        )  # fmt: skip
        print(f"{readout}: {said}")
