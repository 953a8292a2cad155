"""Where networks come from: tables, a fit to cells, the known truth; and the folder that keeps them by their hash.

``python -m perturb network show FILE``, ``fit`` and ``known-truth``.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ge2hist_core import rng
from ge2hist_core.files import atomic_path, parse_json, write_json
from ge2hist_core.types import BadInput
from perturb.grn import Network, fit_network, pack_network, read_network, unpack_network

if TYPE_CHECKING:
    from ge2hist_core.data import H5adSource
    from perturb.cache import DiskCache
    from perturb.recipe import Recipe
    from perturb.run import Progress

__all__ = [
    "fit_and_keep",
    "fit_kept",
    "fit_key",
    "fitted",
    "keep_network",
    "kept_network",
    "kept_networks",
    "known_truth",
    "network_for",
]

FIT_CELLS = 4000
"""Cells that a network is fitted to, at most; drawn at random once for all."""


@functools.cache
def known_truth() -> Network:
    r"""The network that the known-truth tissue is made with: every driver on every reporter of its programme.

    In the tissue, a driver's log level d gives its programme ``scale * strength * tanh(d / 2)``, and a reporter's log
    mean is its own strength times the programme. The weight is the slope at ``d = 0``.
    """
    from ge2hist_core.simulator.expression import load_genes
    from ge2hist_core.simulator.tissue import PROGRAMME_SCALE

    table = load_genes()
    edges = [
        (driver, reporter, PROGRAMME_SCALE * table.programme_of(driver)[1] / 2 * table.programme_of(reporter)[1])
        for driver in table.symbols[table.role == "driver"]
        for reporter in table.symbols[table.role == "reporter"]
        if table.programme_of(driver)[0] == table.programme_of(reporter)[0]
    ]
    regulators, targets, weights = zip(*edges, strict=True)
    return Network(
        np.array(regulators, dtype=object),
        np.array(targets, dtype=object),
        np.array(weights),
        "known truth of the simulated tissue",
        "the simulator's gene table",
    )


def fitted(
    source: H5adSource,
    candidates: Network | Sequence[str],
    *,
    name: str,
    cell_type: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> Network:
    """A network fitted to the cells of a file; see :func:`perturb.grn.fit_network`.

    Parameters
    ----------
    candidates: edges to choose from, or genes that may regulate every other gene.
    cell_type: fit to the cells of this type alone.

    Raises
    ------
    BadInput: too few cells with counts, no candidate among their genes, an unknown type.
    ge2hist_core.sampler.Stopped: cancelled.
    """
    from ge2hist_core.sampler import Stopped
    from perturb.run import Progress

    def tick(share: float) -> None:
        if cancel is not None and cancel.is_set():
            raise Stopped
        if on_progress is not None:
            on_progress(Progress(share, "Fitting the network"))

    rows = ~source.empty
    if cell_type is not None:
        known = [] if source.cell_type is None else sorted(set(source.cell_type))
        if cell_type not in known:
            raise BadInput(
                f"cell_type is {cell_type!r}: choose one of {', '.join(known) or 'none, the file has none'}."
            )
        rows &= source.cell_type == cell_type
    chosen = rng.stream(0, "network cells").permutation(np.flatnonzero(rows))[:FIT_CELLS]
    return fit_network(source.take(np.sort(chosen)), candidates, name=name, tick=tick)


def fit_key(source: H5adSource, regulators: Sequence[str]) -> str:
    """SHA-256 of all that decides a network fitted to the cells of a file, as :func:`fit_and_keep` knows it by."""
    read = source.preview
    value = ["fitted network", source.sha256, read.matrix, read.gene_column, sorted(set(regulators))]
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def fit_and_keep(
    source: H5adSource,
    regulators: Sequence[str],
    folder: Path,
    cache: DiskCache,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> Network:
    """Fit a network, keep it in ``folder`` if it has an edge, and note its SHA-256 in the cache under :func:`fit_key`.

    Raises
    ------
    As :func:`fitted`.
    """
    name = f"fitted to {source.path.name}"[:60]
    network = fitted(source, regulators, name=name, on_progress=on_progress, cancel=cancel)
    if len(network):
        keep_network(network, folder)
    cache.store_json(fit_key(source, regulators), {"network_sha256": network.sha256 if len(network) else ""})
    return network


def fit_kept(source: H5adSource, regulators: Sequence[str], folder: Path, cache: DiskCache) -> str | None:
    """SHA-256 of the network that was fitted so, "" if it had no edge; None where it was not, or is no longer kept."""
    found = cache.load_json(fit_key(source, regulators))
    if found is None:
        return None
    sha256 = found["network_sha256"]
    return sha256 if not sha256 or (folder / f"{sha256}.json").is_file() else None


def keep_network(network: Network, folder: Path) -> None:
    """Write a network under its SHA-256; one that is there stays as it is, with the name that it was given first."""
    path = folder / f"{network.sha256}.json"
    if path.is_file():
        path.touch()
    else:
        write_json(path, pack_network(network))


def network_for(recipe: Recipe, given: str | None, beside: str | Path) -> Network | None:
    """The network of a recipe from the command line: the file that is given, else ``network.json`` beside the recipe.

    Raises
    ------
    BadInput: a file that cannot be read, or one that is given for a recipe whose edits do not spread.
    """
    if recipe.propagation is None:
        if given:
            raise BadInput(
                f"--network {given} is of no use, as the recipe's edits do not spread: leave it out, or make the "
                "recipe with `python -m perturb recipe --network`."
            )
        return None
    path = Path(beside).parent / "network.json"
    return read_network(given) if given else read_network(path) if path.is_file() else None


def kept_network(digits: str, folder: Path) -> Network:
    """The kept network whose SHA-256 begins with ``digits``; the known truth is always there.

    Raises
    ------
    BadInput: no such network, or a damaged file.
    """
    if re.fullmatch(r"[0-9a-f]{12,64}", digits):
        if (truth := known_truth()).sha256.startswith(digits):
            return truth
        for path in sorted(folder.glob(f"{digits}*.json")):
            return _read(path)
    raise BadInput(f"The network {digits[:12]} is not here: open its table again.")


def kept_networks(folder: Path) -> list[Network]:
    """All kept networks, the latest first, after the known truth. Damaged files are left out."""
    found = [known_truth()]
    for path in sorted(folder.glob("*.json"), key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            found.append(_read(path))
        except BadInput:
            continue
    return found


def _read(path: Path) -> Network:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"The kept network {path.stem[:12]} cannot be read ({error}): open its table again.") from None
    return unpack_network(parse_json(content, f"The kept network {path.stem[:12]}", "open its table again"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m perturb network``."""
    kinds = parser.add_subparsers(dest="what", required=True, metavar="show | fit | known-truth")
    show = kinds.add_parser("show", help="say what a table holds")
    show.add_argument("table", help="CollecTRI, DoRothEA or CellOracle layout; text, gzip or parquet")
    fit = kinds.add_parser("fit", help="fit weights to the cells of an h5ad")
    fit.add_argument("--cells", default="assets/demo_cells.h5ad", help="h5ad or store with raw counts")
    chosen = fit.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--regulators", help="genes that may regulate others, for example STAT1,HIF1A")
    chosen.add_argument("--candidates", help="table of the edges to choose from, for example a base GRN")
    fit.add_argument("--cell-type", help="fit to the cells of this type alone")
    truth = kinds.add_parser("known-truth", help="write the edges that the simulated tissue is made with")
    for one in (fit, truth):
        one.add_argument("--out", required=True, help="CSV to write: source, target, weight, scale")


def main(args: argparse.Namespace) -> None:
    """Show, fit or write a network.

    Raises
    ------
    BadInput: a table or h5ad that cannot be used.
    """
    from ge2hist_core.data import open_cells
    from perturb.page import csv_bytes
    from perturb.run import print_progress

    if args.what == "show":
        network = read_network(args.table)
    elif args.what == "known-truth":
        network = known_truth()
    else:
        candidates = read_network(args.candidates) if args.candidates else args.regulators.split(",")
        with open_cells(args.cells) as source:
            network = fitted(
                source, candidates, name="fitted network", cell_type=args.cell_type, on_progress=print_progress()
            )
    if args.what != "show":
        with atomic_path(Path(args.out)) as temporary:
            temporary.write_bytes(csv_bytes(network.table()))
    positive = int((network.weights > 0).sum())
    signs = f"{positive} positive, {len(network) - positive} negative" if network.signed else "without signs"
    print(f"{network.name}: {len(network)} edges ({signs}) from {len(set(network.regulators))} regulators")
    print(f"SHA-256 {network.sha256}")
