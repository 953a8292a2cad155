"""``python -m ge2hist_core demo-cells DATA.zarr --bundle BUNDLE --out CELLS.h5ad``: cells the bundle has never seen.

As many cells of each type as possible are drawn from held-out donors whose whole niche lies inside the section. The
first is the one most like the training cells of the bundle (largest support p-value): the app opens inside the data.
The truth comes along as columns of ``obs``: the six programmes and the niche's true density, spacing and composition.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ge2hist_core import rng
from ge2hist_core.config import READER_CLASSES
from ge2hist_core.types import BadInput

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.types import Cells

__all__ = ["add_arguments", "main"]

LEAST_CELLS = 4
"""Fewer have no UMAP."""
NEIGHBOURS = 15
"""Of each cell on the map; scanpy's default."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="DATA.zarr")
    parser.add_argument("--bundle", type=Path, required=True, metavar="BUNDLE")
    parser.add_argument("--out", type=Path, required=True, metavar="CELLS.h5ad")
    parser.add_argument("--cells", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)


def _balanced(cell_type: np.ndarray, rows: np.ndarray, n: int, seed: int) -> np.ndarray:
    """``n`` of ``rows``, taken from each type in turn."""
    order = rng.stream(seed, "demo cells").permutation(rows)
    place = pd.Series(cell_type[order]).groupby(cell_type[order]).cumcount().to_numpy()
    return np.sort(order[np.argsort(place, kind="stable")[:n]])


def _embedded(model: GE2Hist, cells: Cells, seed: int) -> np.ndarray:
    """Embeddings ``[cell, dim]`` float32, computed in float64 so that no rounding of a sum on the way is left in them.

    In float32 the last bit depends on the number of threads and on where an array lies in memory.
    """
    import torch

    from ge2hist_core.embedding import ScGPT

    return ScGPT.load(model.scgpt_folder, dtype=torch.float64).embed(cells, seed)


def _umap(embedding: np.ndarray, seed: int) -> np.ndarray:
    """A map ``[cell, 2]`` float32, the same to the last bit on any number of threads.

    A UMAP magnifies a last bit to the width of the map. Distances therefore come from a tree, which sums in a fixed
    order where matrix products do not, and the start is rounded.
    """
    import scanpy
    from anndata import AnnData
    from sklearn.neighbors import KNeighborsTransformer

    table = AnnData(embedding.astype(np.float64))
    n = min(NEIGHBOURS, len(embedding) - 1)
    tree = KNeighborsTransformer(n_neighbors=n, algorithm="ball_tree")
    scanpy.pp.neighbors(table, n, use_rep="X", transformer=tree, random_state=seed)
    scanpy.tl.umap(table, init_pos=_start(table.X), random_state=seed)
    return np.asarray(table.obsm["X_umap"], dtype=np.float32)


def _start(x: np.ndarray) -> np.ndarray:
    """The first two principal components in standard deviations, six decimals, ``[cell, 2]``."""
    x = x - x.mean(axis=0)
    _, vectors = np.linalg.eigh(np.einsum("ci,cj->ij", x, x))
    axes = vectors[:, :-3:-1]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1]])
    places = x @ axes
    return np.round(places / places.std(axis=0), 6)


def main(args: argparse.Namespace) -> None:
    from ge2hist_core.data import write_cells
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.niche import niche_stats
    from ge2hist_core.store import TissueStore

    model = GE2Hist.load(args.bundle)
    store = TissueStore(args.data, model.config.tile_px)
    seen = model.has_learned_from(store)
    rows = store.rows([name for name in store.donors if name not in seen])
    if not LEAST_CELLS <= args.cells <= len(rows):
        raise BadInput(
            f"--cells is {args.cells}: the held-out donors have {len(rows)} cells with a whole niche, and a map of "
            f"them needs at least {LEAST_CELLS}."
        )
    rows = _balanced(store.cells.cell_type, rows, args.cells, args.seed)
    embedding = _embedded(model, store.cells.take(rows), args.seed)
    if model.support is not None:
        typical = int(model.support.p(embedding).argmax())
        order = np.r_[typical, np.delete(np.arange(len(rows)), typical)]
        rows, embedding = rows[order], embedding[order]
    cells = store.cells.take(rows)
    tile_um = model.config.tile_px * model.config.um_per_px
    niche = [niche_stats(store.nuclei(row), (tile_um, tile_um), READER_CLASSES).readouts() for row in rows]
    truth = pd.DataFrame(niche).add_prefix("niche_")
    programmes = [name for name in store.obs.columns if name.startswith("programme_")]
    truth[programmes] = store.obs[programmes].to_numpy()[rows]
    write_cells(cells, args.out, truth, store.var, _umap(embedding, args.seed))
    print(f"{len(rows)} cells of {len(set(cells.donor))} held-out donors in {args.out}")
