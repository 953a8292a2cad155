"""``run(recipe) -> Result``: both arms from the same noise, nuclei, statistics, paired comparison.

Whatever is not in the recipe cannot change a number of the result; the percentile of a gene's count among other cells
of the type is the one description that also looks at the cells around it.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ge2hist_core.types import BadInput, Cells
from perturb.cache import DiskCache
from perturb.recipe import Recipe
from perturb.result import Arm, Result, load_arm, store_result
from perturb.tables import compare

if TYPE_CHECKING:
    import torch

    from ge2hist_core.model import GE2Hist

__all__ = ["Progress", "replay", "run"]

PICTURES_PER_CALL = 16
FRAMES = 24
"""Steps of the first picture that are kept for replay, at most."""


@dataclass(frozen=True)
class Progress:
    """How far a run is: ``fraction`` of the whole in [0, 1], ``text`` for the user.

    ``preview()`` decodes the current clean-image estimate of the pictures in work, uint8 ``[picture, H, W, 3]``; it
    costs a decoder call, so it is made only when asked for. None where no picture is in work.
    """

    fraction: float
    text: str
    preview: Callable[[], np.ndarray] | None = None


def run(
    recipe: Recipe,
    model: GE2Hist,
    cells: Cells,
    *,
    cache: DiskCache | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> Result:
    """Draw both arms with the same noise and compare them.

    Parameters
    ----------
    cells: hold at least the recipe's cells; further cells of the same types give the percentiles.
    cache: arms and results are taken from it and kept in it.
    on_progress: called after each denoising step, in this thread.
    cancel: when set, the run ends at the next denoising step.

    Raises
    ------
    BadInput: a cell that ``cells`` lack, a gene that they lack, another model than the recipe's.
    ge2hist_core.sampler.Stopped: cancelled. Finished arms stay in the cache.
    """
    if model.sha256 != recipe.model_sha256:
        raise BadInput(
            f"The recipe was made with model {recipe.model_sha256[:12]}, but {model.sha256[:12]} is loaded: "
            "load that bundle or make the recipe again."
        )
    chosen = _choose(cells, recipe.cell_ids)
    edited_cells = recipe.perturbation.apply(chosen)
    recipes = [recipe.base, recipe]
    arms = [load_arm(one, cache) for one in recipes]
    missing = [i for i, arm in enumerate(arms) if arm is None]
    for turn, i in enumerate(missing):

        def report(fraction: float, preview: Callable[[], np.ndarray], turn: int = turn, i: int = i) -> None:
            if on_progress is not None:
                text = ("Unedited niche", "Edited niche")[i]
                on_progress(Progress((turn + fraction) / len(missing), text, preview))

        arms[i] = _draw(recipes[i], model, (chosen, edited_cells)[i], report, cancel)
        if cache is not None:
            cache.store_arrays(recipes[i].hash, arms[i].to_arrays())
    base, edited = arms
    result = compare(recipe, model, cells, chosen, edited_cells, base, edited)
    if cache is not None:
        store_result(result, cache)
    return result


def replay(arm: Arm, model: GE2Hist) -> np.ndarray:
    """The first picture while it was denoised, uint8 ``[frame, H, W, 3]``."""
    return model.decode(arm.frames)


def _choose(cells: Cells, cell_ids: tuple[str, ...]) -> Cells:
    row = {name: i for i, name in enumerate(cells.cell_id)}
    unknown = [name for name in cell_ids if name not in row]
    if unknown:
        raise BadInput(f"The data have no cell {unknown[0]!r}: choose one of its {len(cells)} cell ids.")
    return cells.take([row[name] for name in cell_ids])


def _draw(
    recipe: Recipe,
    model: GE2Hist,
    cells: Cells,
    report: Callable[[float, Callable[[], np.ndarray]], None],
    cancel: threading.Event | None,
) -> Arm:
    """One arm. Both arms come from this function with the same seeds, in calls of the same size."""
    embedding = model.embed(cells, recipe.encoder_seed)
    latent = model.encode(embedding)
    n_pictures = len(cells) * len(recipe.seeds)
    rows = np.repeat(np.arange(len(cells)), len(recipe.seeds))
    seeds = np.tile(recipe.seeds, len(cells))
    starts = range(0, n_pictures, PICTURES_PER_CALL)
    images, frames = [], []
    for start in starts:
        part = slice(start, start + PICTURES_PER_CALL)

        def on_step(i: int, n: int, x0: torch.Tensor, start: int = start) -> bool:
            if start == 0 and (i + 1 == n or i % -(-n // FRAMES) == 0):
                frames.append(x0[0].float().cpu().numpy().copy())
            report((start / PICTURES_PER_CALL + (i + 1) / n) / len(starts), lambda: model.decode(x0))
            return cancel is not None and cancel.is_set()

        images.append(model.generate(latent.take(rows[part]), seeds[part].tolist(), recipe.sample, on_step))
    pictures = np.concatenate(images)
    return Arm(
        images=pictures,
        nuclei=model.read_nuclei(pictures),
        embedding=embedding,
        latent=latent,
        types=model.classify(latent),
        support=model.support.distance(embedding),
        frames=np.stack(frames),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m perturb run``."""
    parser.add_argument("recipe", help="recipe.json")
    parser.add_argument("--out", required=True, help="folder for report, tables and pictures")
    parser.add_argument("--bundle", default="assets/demo_bundle", help="folder of the model")
    parser.add_argument("--cells", default="assets/demo_cells.h5ad", help="the h5ad that the recipe was made with")
    parser.add_argument("--cache", help="folder in which finished arms are kept and looked up")


def main(args: argparse.Namespace) -> None:
    """Run a recipe and write its report.

    Raises
    ------
    BadInput: a recipe, bundle or data file that cannot be used, or that do not belong together.
    """
    from ge2hist_core.data import open_h5ad
    from ge2hist_core.model import GE2Hist
    from perturb.report import write_report

    recipe = Recipe.read(args.recipe)
    source = open_h5ad(args.cells)
    try:
        if source.sha256 != recipe.data_sha256:
            raise BadInput(
                f"The recipe was made with data {recipe.data_sha256[:12]}, but {args.cells} is {source.sha256[:12]}: "
                "give --cells the file of the recipe."
            )
        model = GE2Hist.load(args.bundle)
        cells = source.take([source.index_of(name) for name in recipe.cell_ids])
    finally:
        source.close()
    last = -1

    def show(progress: Progress) -> None:
        nonlocal last
        percent = int(100 * progress.fraction)
        if percent // 5 != last // 5:
            print(f"{percent:3d} %  {progress.text}", file=sys.stderr, flush=True)
        last = percent

    result = run(recipe, model, cells, cache=DiskCache(args.cache) if args.cache else None, on_progress=show)
    for path in write_report(result, args.out):
        print(path)
