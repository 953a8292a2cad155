"""``python -m ge2hist_core demo-cells DATA.zarr --bundle BUNDLE --out CELLS.h5ad``: cells the bundle has never seen.

As many cells of each type as possible are drawn from held-out donors whose whole niche lies inside the section. Their
truth comes along as columns of ``obs``: the six programmes and the niche's true density, spacing and composition.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from ge2hist_core import rng
from ge2hist_core.config import READER_CLASSES
from ge2hist_core.types import BadInput

__all__ = ["add_arguments", "main"]

LEAST_CELLS = 4
"""Fewer have no UMAP."""


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


def _umap(embedding: np.ndarray, seed: int) -> np.ndarray:
    import scanpy
    from anndata import AnnData

    table = AnnData(embedding)
    scanpy.pp.neighbors(table, use_rep="X", random_state=seed)
    scanpy.tl.umap(table, random_state=seed)
    return np.asarray(table.obsm["X_umap"], dtype=np.float32)


def main(args: argparse.Namespace) -> None:
    from ge2hist_core.data import write_cells
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.niche import niche_stats
    from ge2hist_core.store import TissueStore

    model, store = GE2Hist.load(args.bundle), TissueStore(args.data)
    seen = model.has_learned_from(store)
    rows = store.rows([name for name in store.donors if name not in seen])
    if not LEAST_CELLS <= args.cells <= len(rows):
        raise BadInput(
            f"--cells is {args.cells}: the held-out donors have {len(rows)} cells with a whole niche, and a map of "
            f"them needs at least {LEAST_CELLS}."
        )
    rows = _balanced(store.cells.cell_type, rows, args.cells, args.seed)
    cells = store.cells.take(rows)
    tile_um = model.config.tile_px * model.config.um_per_px
    niche = [niche_stats(store.nuclei(row), (tile_um, tile_um), READER_CLASSES).readouts() for row in rows]
    truth = pd.DataFrame(niche).add_prefix("niche_")
    programmes = [name for name in store.obs.columns if name.startswith("programme_")]
    truth[programmes] = store.obs[programmes].to_numpy()[rows]
    write_cells(cells, args.out, truth, store.var, _umap(model.embed(cells, args.seed), args.seed))
    print(f"{len(rows)} cells of {len(set(cells.donor))} held-out donors in {args.out}")
