"""How fast is what a user waits for? ``python benchmarks/speed.py [--out FILE.json]``, on an otherwise idle machine.

Times are medians in one run on one machine; the ratios are what travels. Cold caches: nothing is read from disk that a
first-time user would not have.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

STARTED = """
import resource, time
t = time.perf_counter()
from ge2hist_core.data import open_h5ad
from ge2hist_core.model import GE2Hist
from perturb.recipe import Recipe
from perturb.run import cells_for, run
model = GE2Hist.load("assets/demo_bundle")
source = open_h5ad("assets/demo_cells.h5ad", vocab=set(model.scgpt.vocab))
recipe = Recipe(source.sha256, model.sha256, (str(source.obs.index[0]),), seeds=(0,))
run(recipe, model, cells_for(source, recipe.cell_ids))
print(time.perf_counter() - t, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median wall time of ``repeats`` calls after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    from ge2hist_core.config import SampleConfig
    from ge2hist_core.data import open_h5ad
    from ge2hist_core.model import CHUNK, GE2Hist
    from perturb.edits import Perturbation
    from perturb.recipe import Recipe
    from perturb.run import cells_for, run

    model = GE2Hist.load(ROOT / "assets" / "demo_bundle")
    source = open_h5ad(ROOT / "assets" / "demo_cells.h5ad", vocab=set(model.scgpt.vocab))
    cell = str(source.obs.index[0])
    cells = cells_for(source, (cell,))
    gene = str(cells.genes[cells.counts[0].indices[0]])
    recipe = Recipe(source.sha256, model.sha256, (cell,), Perturbation.parse(f"{gene}:ko"), seeds=(0,))

    result = {"threads": torch.get_num_threads(), "sample_steps": recipe.sample.steps}
    result["draft_pair_s"] = median_seconds(lambda: run(recipe, model, cells), args.repeats)
    result["comparison_16_seeds_s"] = median_seconds(
        lambda: run(replace(recipe, seeds=tuple(range(16))), model, cells), 1
    )

    latent = model.encode(model.embed(cells.take([0]), 0)).take([0, 0])
    pair = median_seconds(lambda: model.generate(latent, [0, 0], recipe.sample), args.repeats)
    size = (CHUNK, model.config.latent_channels, model.config.latent_px, model.config.latent_px)
    x, z = torch.zeros(size), torch.from_numpy(latent.z_s[[0, 1, 0, 1]])

    @torch.inference_mode()
    def bare() -> None:
        for t in range(recipe.sample.steps):
            model.denoiser(x, torch.tensor(t), z)

    calls = median_seconds(bare, args.repeats)
    decode = median_seconds(lambda: model.autoencoder.decode(x), args.repeats)
    result["sampler_overhead"] = (pair - decode) / calls - 1.0
    start = time.perf_counter()
    model.generate(latent, [0, 0], SampleConfig("ddpm", 1000))
    result["times_faster_than_ddpm_1000"] = (time.perf_counter() - start) / pair

    fresh = subprocess.run([sys.executable, "-c", STARTED], cwd=ROOT, capture_output=True, text=True, check=True)
    result["start_to_first_picture_s"], result["peak_memory_mib"] = map(float, fresh.stdout.split())
    text = json.dumps({k: round(v, 3) for k, v in result.items()}, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
