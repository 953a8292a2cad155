"""How fast is what a user waits for? ``python benchmarks/speed.py [--out FILE.json]``, on an otherwise idle machine.

Times are medians in one run on one machine; the ratios are what travels. The app itself is started with an empty cache
and looked at in headless Chromium (requirements-dev.txt, and a Chromium on the machine); its memory is the server's
peak after a comparison over 16 seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median wall time of ``repeats`` calls after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def engine(repeats: int) -> dict[str, float]:
    """Drafts, comparison, sampler, in this process."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    from ge2hist_core.config import SampleConfig
    from ge2hist_core.data import open_h5ad
    from ge2hist_core.model import GE2Hist
    from perturb.edits import Perturbation
    from perturb.recipe import Recipe
    from perturb.run import cells_for, run

    model = GE2Hist.load(ROOT / "assets" / "demo_bundle")
    with open_h5ad(ROOT / "assets" / "demo_cells.h5ad", model.scgpt.vocab) as source:
        cell = str(source.cell_id[0])
        cells = cells_for(source, (cell,))
        gene = str(cells.genes[cells.counts[0].indices[0]])
        recipe = Recipe(source.sha256, model.sha256, (cell,), Perturbation.parse(f"{gene}:ko"), seeds=(0,))

    result: dict[str, float] = {"threads": torch.get_num_threads(), "sample_steps": recipe.sample.steps}
    result["draft_pair_s"] = median_seconds(lambda: run(recipe, model, cells), repeats)
    result["comparison_16_seeds_s"] = median_seconds(
        lambda: run(replace(recipe, seeds=tuple(range(16))), model, cells), 1
    )

    latent = model.encode(model.embed(cells.take([0]), 0)).take([0, 0])
    pair = median_seconds(lambda: model.generate(latent, [0, 0], recipe.sample), repeats)
    size = (2, model.config.latent_channels, model.config.latent_px, model.config.latent_px)
    x, z = torch.zeros(size), torch.from_numpy(latent.z_s)

    @torch.inference_mode()
    def bare() -> None:
        for t in range(recipe.sample.steps):
            model.denoiser(x, torch.tensor(t), z)

    calls = median_seconds(bare, repeats)
    decode = median_seconds(lambda: model.autoencoder.decode(x), repeats)
    result["sampler_overhead"] = (pair - decode) / calls - 1.0
    start = time.perf_counter()
    model.generate(latent, [0, 0], SampleConfig("ddpm", 1000))
    result["times_faster_than_ddpm_1000"] = (time.perf_counter() - start) / pair
    return result


def screen() -> dict[str, float]:
    """All knock-outs of a cell ranked and the leading 20 drawn, by the default design, once, with an empty cache."""
    from ge2hist_core.data import open_h5ad
    from ge2hist_core.model import GE2Hist
    from perturb.cache import DiskCache
    from perturb.edits import Perturbation
    from perturb.recipe import Recipe
    from perturb.run import cells_for
    from perturb.screen import Screen, knock_outs, run_screen

    model = GE2Hist.load(ROOT / "assets" / "demo_bundle")
    with open_h5ad(ROOT / "assets" / "demo_cells.h5ad", model.scgpt.vocab) as source:
        cell = str(source.cell_id[0])
        cells = cells_for(source, (cell,))
        recipe = Recipe(source.sha256, model.sha256, (cell,), Perturbation(()), seeds=(0,))
    asked = Screen(recipe, knock_outs(cells.take([0])))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run_screen(asked, model, cells, DiskCache(folder))
        seconds = time.perf_counter() - start
    return {"screen_candidates": len(asked.candidates), "screen_pictures": asked.pictures, "screen_top_20_s": seconds}


def app() -> dict[str, float]:
    """Start of ``streamlit run app.py`` to the first picture in a browser, and the server's peak memory."""
    from playwright.sync_api import sync_playwright

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.headless=true"]
    command += [f"--server.port={port}", "--server.address=127.0.0.1", "--server.fileWatcherType=none"]
    with tempfile.TemporaryDirectory() as home, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        start = time.perf_counter()
        server = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"GE2HIST_HOME": home}, stdout=subprocess.DEVNULL)
        try:
            while True:
                try:
                    page.goto(f"http://127.0.0.1:{port}")
                    break
                except Exception:  # noqa: BLE001 - the server is not up yet
                    time.sleep(0.1)
            page.set_default_timeout(120_000)
            page.get_by_alt_text("Generated H&E picture of the niche, Before: unedited").wait_for()
            first = time.perf_counter() - start
            still = page.locator("[data-testid='stApp'][data-test-script-state='notRunning']")
            still.wait_for()
            page.locator("[class*='st-key-suggest'] button").first.click()
            page.locator("[class*='st-key-gene-'] label", has_text="Knock out").first.wait_for()
            still.wait_for()
            page.locator("[class*='st-key-gene-'] label", has_text="Knock out").first.click()
            page.get_by_alt_text("Generated H&E picture of the niche, After: edited, same noise").wait_for()
            page.get_by_role("button", name="Compare over 16 seeds").click()
            page.get_by_role("combobox", name="Seed", exact=True).wait_for()
            status = Path(f"/proc/{server.pid}/status").read_text()
            peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        finally:
            browser.close()
            server.terminate()
            server.wait(timeout=60)
    return {"app_start_to_first_picture_s": first, "app_peak_memory_mib": peak / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    figures: dict[str, float] = {}
    for part in (lambda: engine(args.repeats), screen, app):
        found = {name: round(value, 3) for name, value in part().items()}
        print(json.dumps(found, indent=1), flush=True)  # a later part may fail
        figures |= found
    text = json.dumps(figures, indent=1)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
