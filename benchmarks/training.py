"""How fast is training fed, and what does it cost? ``python benchmarks/training.py DATA.zarr [--out FILE.json]``.

Milliseconds per tile of a store, in random order: with nothing decoded yet, with all chunks at hand, with no room to
keep any, and by four threads without that room; then the cost of the presets (see ``ge2hist_core.training_cost``).
Run on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def reading(path: Path, n: int) -> dict[str, float]:
    """Milliseconds per tile."""
    from ge2hist_core import rng, store
    from ge2hist_core.loader import ahead

    def opened() -> store.TissueStore:
        return store.TissueStore(path)

    tissue = opened()
    rows = rng.stream(0, "benchmark").permutation(tissue.rows(tissue.donors))[:n]

    def timed(tissue: store.TissueStore, workers: int = 0) -> float:
        start = time.perf_counter()
        for _ in ahead(tissue.tiles, np.array_split(rows, max(1, len(rows) // 16)), workers):
            pass
        return 1000 * (time.perf_counter() - start) / len(rows)

    result = {"tile_cold_ms": timed(tissue), "tile_cached_ms": timed(tissue)}
    store.CACHE_BYTES = 0
    return result | {"tile_uncached_ms": timed(opened()), "tile_uncached_4_workers_ms": timed(opened(), 4)}


def main() -> None:
    from ge2hist_core.config import PRESETS
    from ge2hist_core.training_cost import Gpu, hours, stage_costs

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tiles", type=int, default=512)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    figures = reading(args.data, args.tiles)
    for name, preset in PRESETS.items():
        costs = stage_costs(preset)
        figures[f"{name}_gflop_per_step"] = costs[-1].flops_per_step / 1e9
        figures[f"{name}_hours_assumed_h100"] = hours(sum(cost.flops for cost in costs), Gpu())
    text = json.dumps({name: round(value, 3) for name, value in figures.items()}, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
