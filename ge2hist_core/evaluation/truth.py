"""Known truth: the drivers of a programme set by hand in the simulated tissue, and the same edit in the model.

The section is simulated again from the same random numbers with the genes changed, and true nuclei are counted in the
niches of the same cells. Only stores of simulated tissue have it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ge2hist_core import rng
from ge2hist_core.config import READER_CLASSES, VISIBLE_CLASS, SampleConfig
from ge2hist_core.evaluation.work import Work
from ge2hist_core.niche import niche_stats

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.store import TissueStore

__all__ = ["EDIT_FACTORS", "driver_programmes", "effects_against_truth", "noise_seeds", "true_readings"]

EDIT_FACTORS = {"down": 0.0, "up": 4.0}


def driver_programmes(programme: str, direction: str) -> dict[str, float]:
    """Factors that push a programme up or down through its drivers, those of negative weight the other way."""
    from ge2hist_core.simulator.expression import load_genes

    table = load_genes()
    other = {"up": "down", "down": "up"}[direction]
    factors = {}
    for gene in table.drivers:
        name, weight = table.programme_of(gene)
        if name == programme:
            factors[gene] = EDIT_FACTORS[direction if weight > 0 else other]
    return factors


def true_readings(
    store: TissueStore, rows: np.ndarray, factors: Mapping[str, float], tile_um: float
) -> list[dict[str, float]]:
    """Readouts of the true nuclei in the niche of each cell, in the tissue with the genes set by hand."""
    from ge2hist_core.simulator.tissue import simulate_section

    simulation, cells = store.simulation, store.cells
    assert simulation is not None and cells.donor is not None and cells.xy_um is not None
    donor_number = {f"donor{d:03d}": d for d in simulation["donors"]}
    out: list[dict[str, float]] = [{} for _ in rows]
    for donor in np.unique(cells.donor[rows]):
        section = simulate_section(simulation["seed"], donor_number[donor], simulation["size_um"], factors)
        for i in np.flatnonzero(cells.donor[rows] == donor):
            # As the store's tiles are: centred on the cell to the nearest pixel.
            corner = np.floor(cells.xy_um[rows[i]] / store.um_per_px + 0.5) * store.um_per_px - tile_um / 2
            near = section.nuclei.assign(
                x_um=section.nuclei["x_um"] - corner[0],
                y_um=section.nuclei["y_um"] - corner[1],
                cell_type=section.nuclei["cell_type"].map(VISIBLE_CLASS),
            )
            out[i] = niche_stats(near, (tile_um, tile_um), READER_CLASSES).readouts()
    return out


def noise_seeds(seed: int, rows: np.ndarray) -> list[int]:
    """One noise seed per cell, so that the pictures of different cells are independent draws."""
    return [int(rng.stream(seed, "evaluation_noise", int(row)).integers(2**31)) for row in rows]


def effects_against_truth(
    model: GE2Hist,
    store: TissueStore,
    rows: np.ndarray,
    sample: SampleConfig,
    seed: int,
    tile_um: float,
    work: Work | None = None,
) -> list[dict[str, Any]]:
    """One row per programme and direction: the true and the model's mean change of each readout."""
    from ge2hist_core.simulator.programmes import PROGRAMMES

    work = work or Work(None)
    readouts = ["density", *(f"fraction:{name}" for name in READER_CLASSES)]
    cells, seeds = store.cells.take(rows), noise_seeds(seed, rows)

    def model_readings(title: str, factors: Mapping[str, float]) -> pd.DataFrame:
        def draw(at: np.ndarray) -> np.ndarray:
            latent = model.encode(model.embed(cells.take(at).scale_genes(factors), seed))
            return model.generate(latent, [seeds[i] for i in at], sample)

        asked = ["edit", model.sha256, store.identity, rows.tolist(), seed, repr(sample), dict(factors)]
        images = work.blocks(asked, len(rows), draw, f"GE2Hist, {title}")
        tables = model.read_nuclei(images)
        return pd.DataFrame([niche_stats(t, (tile_um, tile_um), READER_CLASSES).readouts() for t in tables])[readouts]

    def truth(factors: Mapping[str, float]) -> pd.DataFrame:
        asked = ["truth", store.identity, json.dumps(store.simulation), rows.tolist(), dict(factors), tile_um]
        found = work.array(
            asked, lambda: pd.DataFrame(true_readings(store, rows, factors, tile_um))[readouts].to_numpy(np.float64)
        )
        return pd.DataFrame(found, columns=readouts)

    true_base, model_base = truth({}), model_readings("not edited", {})
    standard_error = true_base.std(ddof=1) / np.sqrt(len(rows))
    table = []
    for programme in PROGRAMMES:
        for direction in ("down", "up"):
            factors = driver_programmes(programme, direction)
            true = (truth(factors) - true_base).mean()
            change = model_readings(f"{programme.replace('_', ' ')} {direction}", factors) - model_base
            model_change = change.mean()
            # A readout that is the same in all tiles (but for rounding) gives no noise to measure its change by.
            strength = (true / standard_error.where(standard_error > 1e-9)).abs().fillna(0.0)
            clear = [name for name in readouts if strength[name] > 2.0]
            main = strength.idxmax()
            table.append(
                {
                    "programme": programme,
                    "direction": direction,
                    "genes": factors,
                    "main_readout": main,
                    "true": float(true[main]),
                    "model": float(model_change[main]),
                    "true_over_standard_error": float(strength[main]),
                    "exceeds_noise": bool(strength[main] > 2.0),
                    "sign_right": bool(np.sign(true[main]) == np.sign(model_change[main])),
                    "clear_readouts": len(clear),
                    "clear_signs_right": int((np.sign(true[clear]) == np.sign(model_change[clear])).sum()),
                    "all": {k: {"true": float(true[k]), "model": float(model_change[k])} for k in readouts},
                }
            )
    return table
