"""``run(recipe) -> Result``: all arms from the same noise, nuclei, statistics, paired comparison.

Whatever is not in the recipe cannot change a number of the result; the percentile of a gene's count among other cells
of the type is the one description that also looks at the cells around it.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from ge2hist_core import rng
from ge2hist_core.types import BadInput, Cells, Latent
from perturb.cache import DiskCache
from perturb.edits import MIN_REFERENCE
from perturb.grn import Network, observed_range, propagate, randomised
from perturb.recipe import Recipe
from perturb.result import Arm, Result, load_arm, store_result
from perturb.tables import compare

if TYPE_CHECKING:
    from ge2hist_core.data import H5adSource
    from ge2hist_core.model import GE2Hist, Preview

__all__ = [
    "Progress",
    "cells_for",
    "cells_asked_for",
    "cells_like",
    "choose_cells",
    "edited_cells",
    "first_of_type",
    "open_recipe",
    "print_progress",
    "replay",
    "run",
    "run_arguments",
]

FRAMES = 24
"""Steps of the first picture that are kept for replay, at most."""

PEERS = 500
"""Cells of each type that :func:`cells_for` adds for percentiles, at most."""


@dataclass(frozen=True)
class Progress:
    """How far a run is: ``fraction`` of the whole in [0, 1], ``text`` for the user.

    ``preview()`` decodes the current clean-image estimates of the pictures in work, as ``(arm, picture, image)``: arm
    ``base`` or ``edited``, the picture's place in the arm, uint8 ``[H, W, 3]``. It costs a decoder call, so it is made
    only when asked for. None where no picture is in work.
    """

    fraction: float
    text: str
    preview: Callable[[], list[tuple[str, int, np.ndarray]]] | None = None


def run(
    recipe: Recipe,
    model: GE2Hist,
    cells: Cells,
    *,
    network: Network | None = None,
    cache: DiskCache | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> Result:
    """Draw all arms (:attr:`Recipe.arms`) with the same noise and compare them.

    Parameters
    ----------
    cells: hold at least the recipe's cells; further cells of the same types give the percentiles and the range that
        propagation stays in. Take them from :func:`cells_for`: such edits depend on them.
    network: that of the recipe's propagation.
    cache: arms and results are taken from it and kept in it.
    on_progress: called after each denoising step, in this thread.
    cancel: when set, the run ends at the next denoising step.

    Raises
    ------
    BadInput: a cell that ``cells`` lack, a gene that they lack, another model or network than the recipe's.
    ge2hist_core.sampler.Stopped: cancelled. Arms that the cache held stay there.
    """
    if model.sha256 != recipe.model_sha256:
        raise BadInput(
            f"The recipe was made with model {recipe.model_sha256[:12]}, but {model.sha256[:12]} is loaded: "
            "load that bundle or make the recipe again."
        )
    if recipe.propagation is not None and (network is None or network.sha256 != recipe.propagation.network_sha256):
        raise BadInput(
            f"The recipe spreads edits through the network {recipe.propagation.network_name!r} "
            f"({recipe.propagation.network_sha256[:12]}): open that network."
        )
    chosen, recipes = choose_cells(cells, recipe.cell_ids), recipe.arms
    expression = {name: edited_cells(one, chosen, cells, network) for name, one in recipes.items()}
    kept = {name: load_arm(one, cache) for name, one in recipes.items()}
    arms = {name: arm for name, arm in kept.items() if arm is not None}
    wanted = {name: some for name, some in expression.items() if name not in arms}
    for name, arm in _draw(recipe, model, wanted, on_progress, cancel).items():
        arms[name] = arm
        if cache is not None:
            cache.store_arrays(recipes[name].hash, arm.to_arrays())
    result = compare(recipe, model, cells, {name: some[0] for name, some in expression.items()}, arms, network)
    if cache is not None:
        store_result(result, cache)
    return result


def edited_cells(recipe: Recipe, chosen: Cells, cells: Cells, network: Network | None = None) -> list[Cells]:
    """The recipe's cells with edited counts: once, or for a control once per noise seed, each with its own network.

    Parameters
    ----------
    chosen: the recipe's cells. cells, network: as for :func:`run`.
    """
    direct = recipe.perturbation.apply(chosen, cells)
    how = recipe.propagation
    if how is None or network is None or not recipe.perturbation:
        return [direct]
    networks = [randomised(network, seed) for seed in recipe.seeds] if how.control else [network]
    genes, out = recipe.perturbation.genes, []
    for one in networks:
        order, parts = [], []
        for rows, reference in _by_type(chosen, cells):
            span, before, after = observed_range(reference, how.quantiles), chosen.counts[rows], direct.counts[rows]
            parts.append(propagate(one, chosen.genes, before, after, *span, steps=how.steps, edited=genes).counts)
            order.append(rows)
        stacked = sp.vstack(parts, format="csr")
        out.append(direct.with_counts(stacked[np.argsort(np.concatenate(order))]))
    return out


def _by_type(chosen: Cells, cells: Cells) -> Iterator[tuple[np.ndarray, Cells]]:
    """Places of the chosen cells of each type, and the cells whose expression shows what that type reaches.

    All cells where types are not given, or fewer than 20 share one.
    """
    if chosen.cell_type is None or cells.cell_type is None:
        yield np.arange(len(chosen)), cells
        return
    for name in dict.fromkeys(chosen.cell_type):
        peers = np.flatnonzero(cells.cell_type == name)
        yield np.flatnonzero(chosen.cell_type == name), cells.take(peers) if len(peers) >= MIN_REFERENCE else cells


def replay(arm: Arm, model: GE2Hist) -> np.ndarray:
    """The arm's first picture while it was denoised, uint8 ``[frame, H, W, 3]``."""
    import torch

    return model.autoencoder.decode(torch.from_numpy(arm.frames))


def cells_for(source: H5adSource, cell_ids: Sequence[str]) -> Cells:
    """The cells of a recipe and, after them, at most 500 others of each of their types (of all, where the file gives no
    types), drawn at random once for all.

    Raises
    ------
    BadInput: a cell that the file lacks or that has no counts.
    """
    rows = [source.index_of(name) for name in cell_ids]
    if source.cell_type is not None:
        for cell_type in dict.fromkeys(source.cell_type[rows]):
            peers = np.flatnonzero((source.cell_type == cell_type) & ~source.empty)
            # Not the first ones: files are often sorted by donor or slide.
            peers = rng.stream(0, "peers", str(cell_type)).permutation(peers)[:PEERS]
            rows += np.setdiff1d(peers, rows).tolist()
    else:
        peers = rng.stream(0, "peers").permutation(np.flatnonzero(~source.empty))[:PEERS]
        rows += np.setdiff1d(peers, rows).tolist()
    return source.take(rows)


def cells_like(source: H5adSource, cell_id: str, n: int) -> tuple[str, ...]:
    """The cell and ``n - 1`` others of its type, drawn at random from those with counts; the same ones every time.

    Raises
    ------
    BadInput: no such cell, a file without types, fewer such cells.
    """
    row = source.index_of(cell_id)
    if n < 1:
        raise BadInput(f"{n} cells were asked for: choose at least 1.")
    if n == 1:
        return (cell_id,)
    if source.cell_type is None:
        raise BadInput(f"{source.path.name} gives no cell types: choose the cells by name.")
    peers = np.flatnonzero((source.cell_type == source.cell_type[row]) & ~source.empty)
    others = rng.stream(0, "cells like", str(cell_id)).permutation(peers[peers != row])
    if n > len(others) + 1:
        raise BadInput(
            f"{n} cells of type {source.cell_type[row]!r} were asked for, the file has {len(others) + 1} with counts: "
            "choose fewer."
        )
    return (cell_id, *source.cell_id[others[: n - 1]].tolist())


def first_of_type(source: H5adSource, cell_type: str) -> str:
    """The file's first cell of a type that has counts.

    Raises
    ------
    BadInput: a file without types, or without such a cell.
    """
    if source.cell_type is None:
        raise BadInput(f"{source.path.name} gives no cell types: choose the cells by name.")
    fits = (source.cell_type == cell_type) & ~source.empty
    if not fits.any():
        known = ", ".join(sorted(set(source.cell_type[~source.empty].tolist())))
        raise BadInput(f"{source.path.name} has no cell of type {cell_type!r} with counts: choose one of {known}.")
    return str(source.cell_id[int(fits.argmax())])


def cells_asked_for(args: argparse.Namespace, source: H5adSource) -> tuple[str, ...]:
    """The cells that :func:`perturb.recipe.add_cells` was told on the command line.

    Raises
    ------
    BadInput: no such cell or type, fewer such cells, or ``--n-cells`` beside several cells.
    """
    cell_ids = (first_of_type(source, args.type),) if args.type is not None else tuple(args.cell)
    if args.n_cells is None:
        return cell_ids
    if len(cell_ids) > 1:
        raise BadInput(f"--n-cells stands beside {len(cell_ids)} cells: give one --cell or --type, or leave it out.")
    return cells_like(source, cell_ids[0], args.n_cells)


def choose_cells(cells: Cells, cell_ids: Sequence[str]) -> Cells:
    """The named cells in this order.

    Raises
    ------
    BadInput: one that ``cells`` lack.
    """
    row = {name: i for i, name in enumerate(cells.cell_id)}
    unknown = [name for name in cell_ids if name not in row]
    if unknown:
        raise BadInput(f"The data have no cell {unknown[0]!r}: choose one of its {len(cells)} cell ids.")
    return cells.take([row[name] for name in cell_ids])


def _draw(
    recipe: Recipe,
    model: GE2Hist,
    wanted: dict[str, list[Cells]],
    on_progress: Callable[[Progress], None] | None,
    cancel: threading.Event | None,
) -> dict[str, Arm]:
    """The wanted arms, drawn together: pictures of the same cell and seed lie side by side.

    A picture does not depend on its company (:meth:`GE2Hist.generate`), so an arm is the same drawn alone.

    Parameters
    ----------
    wanted: arm -> its cells, once for all seeds or once per seed.
    """
    if not wanted:
        return {}
    names, n_seeds = list(wanted), len(recipe.seeds)
    embedding = {name: [model.embed(cells, recipe.encoder_seed) for cells in some] for name, some in wanted.items()}
    latent = {name: [model.encode(one) for one in some] for name, some in embedding.items()}
    n_pictures = n_seeds * len(recipe.cell_ids)
    places = [(name, i) for i in range(n_pictures) for name in names]

    def state(name: str, i: int) -> tuple[np.ndarray, np.ndarray]:
        cell, seed = divmod(i, n_seeds)
        one = latent[name][seed % len(latent[name])]
        return one.z_c[cell], one.z_e[cell]

    stacked = Latent(*map(np.stack, zip(*(state(*place) for place in places), strict=True)))
    steps = recipe.sample.steps
    frames: dict[str, list[np.ndarray]] = {name: [] for name in names}
    one_niche = {"base": "unedited", "edited": "edited"}.get(names[0], names[0])
    text = "Drawing the niches" if len(names) > 1 else f"Drawing the {one_niche} niche"

    def on_step(i: int, n: int, under_way: Preview) -> bool:
        step = (i - 1) % steps + 1
        for j, row in enumerate(under_way.rows):
            name, picture = places[row]
            if picture == 0 and (step == steps or step % -(-steps // FRAMES) == 0):
                frames[name].append(under_way.latents[j].numpy().copy())
        if on_progress is not None:

            def preview() -> list[tuple[str, int, np.ndarray]]:
                shown = zip(under_way.rows, under_way.images(), strict=True)
                return [(*places[row], image) for row, image in shown if places[row][0] in ("base", "edited")]

            on_progress(Progress(i / n, text, preview))
        return cancel is not None and cancel.is_set()

    images = model.generate(stacked, [recipe.seeds[i % n_seeds] for _, i in places], recipe.sample, on_step)
    return {
        name: Arm(
            images=images[k :: len(names)],
            nuclei=model.read_nuclei(images[k :: len(names)]),
            embedding=embedding[name][0],
            latent=latent[name][0],
            types=model.classify(latent[name][0]),
            support=np.full(len(recipe.cell_ids), np.nan)
            if model.support is None
            else model.support.p(embedding[name][0]),
            frames=np.stack(frames[name]),
        )
        for k, name in enumerate(names)
    }


def add_arguments(parser: argparse.ArgumentParser, evidence: bool = True) -> None:
    """Options of ``python -m perturb run``; ``evidence``: with the one that asks for it."""
    parser.add_argument("recipe", help="recipe.json")
    parser.add_argument("--out", required=True, help="folder for report, tables and pictures")
    parser.add_argument("--bundle", default="assets/demo_bundle", help="folder of the model")
    parser.add_argument(
        "--cells", default="assets/demo_cells.h5ad", help="the h5ad or store that the recipe was made with"
    )
    parser.add_argument(
        "--network", help="table or JSON of a recipe whose edits spread, if no network.json lies beside it"
    )
    parser.add_argument("--cache", help="folder in which finished arms are kept and looked up")
    if evidence:
        from perturb.evidence import add_parts

        parser.add_argument("--evidence", action="store_true", help="add to the report whether its effects hold up")
        add_parts(parser)


def open_recipe(args: argparse.Namespace) -> tuple[Recipe, GE2Hist, Cells]:
    """Recipe, model and cells named on the command line (``recipe``, ``bundle``, ``cells``).

    Raises
    ------
    BadInput: one that cannot be used, or that do not belong together.
    """
    from ge2hist_core.data import open_cells
    from ge2hist_core.model import GE2Hist

    recipe = Recipe.read(args.recipe)
    model = GE2Hist.load(args.bundle)
    options = {"matrix": recipe.matrix, "gene_column": recipe.gene_column}
    with open_cells(args.cells, model.scgpt.vocab, **options) as source:
        if source.sha256 != recipe.data_sha256:
            raise BadInput(
                f"The recipe was made with data {recipe.data_sha256[:12]}, but {args.cells} is {source.sha256[:12]}: "
                "give --cells the file of the recipe."
            )
        return recipe, model, cells_for(source, recipe.cell_ids)


def print_progress() -> Callable[[Progress], None]:
    """Prints every twentieth of the work on standard error."""
    last = -1

    def show(progress: Progress) -> None:
        nonlocal last
        percent = int(100 * progress.fraction)
        if percent // 5 != last // 5:
            print(f"{percent:3d} %  {progress.text}", file=sys.stderr, flush=True)
        last = percent

    return show


@contextmanager
def run_arguments(args: argparse.Namespace) -> Iterator[tuple[Result, GE2Hist, Cells, DiskCache]]:
    """The result of the recipe named on the command line, and what it was made with; progress on standard error.

    The report is to be written inside of the block: see :func:`perturb.cache.report_folder`.

    Raises
    ------
    BadInput: a recipe, bundle, data file or folder that cannot be used, or that do not belong together.
    """
    from perturb.cache import report_folder
    from perturb.networks import network_for

    recipe, model, cells = open_recipe(args)
    network = network_for(recipe, args.network, args.recipe)
    with report_folder(args.out, args.cache, recipe.hash) as cache:
        result = run(recipe, model, cells, network=network, cache=cache, on_progress=print_progress())
        yield result, model, cells, cache


def main(args: argparse.Namespace) -> None:
    """Run a recipe and write its report.

    Raises
    ------
    BadInput: a recipe, bundle or data file that cannot be used, or that do not belong together.
    """
    from perturb.evidence import from_arguments
    from perturb.report import write_report

    with run_arguments(args) as (result, model, cells, cache):
        evidence = from_arguments(args, result, model, cells, cache) if args.evidence else None
        for path in write_report(result, args.out, cells, evidence=evidence):
            print(path)
