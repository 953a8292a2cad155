"""``python -m ge2hist_core evaluate BUNDLE DATA.zarr --out DIR``: generated against real tiles of the same cells.

The cells come from donors that the bundle has not learned from.

Both kinds of tile go through the bundle's own nuclei reader, which sees pixels only. Every figure stands between a
floor (real tiles of other cells of the same types and donors) and a ceiling (the conditions of the cells exchanged at
random). The means over all cells do not change when conditions are exchanged, so every comparison is also made type
by type of the central cell.

On a known-truth store the effects of driver programmes are compared with the true ones: the section is simulated again
from the same random numbers with the genes set by hand, and true nuclei are counted in the niches of the same cells.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ge2hist_core import rng
from ge2hist_core.config import READER_CLASSES, VISIBLE_CLASS, SampleConfig
from ge2hist_core.files import write_json
from ge2hist_core.niche import composition_kl, niche_stats
from ge2hist_core.types import BadInput, Latent, NicheStats

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.store import TissueStore

__all__ = ["Readings", "compare", "driver_programmes", "evaluate"]

LEVEL = 0.95
BOOTSTRAP = 1000
EDIT_FACTORS = {"down": 0.0, "up": 4.0}


@dataclass(frozen=True, eq=False)
class Readings:
    """What was read from one tile of each of several cells.

    Parameters
    ----------
    stats: ``[cell]``. central: ``[cell]`` type of the cell. donor: ``[cell]`` its donor, None if all are of one.
    """

    stats: Sequence[NicheStats]
    central: np.ndarray
    donor: np.ndarray | None = None

    @cached_property
    def density(self) -> np.ndarray:
        """``[cell]`` nuclei per mm2."""
        return np.array([s.density_per_mm2 for s in self.stats])

    @cached_property
    def spacing(self) -> np.ndarray:
        """``[cell]`` mean nearest-neighbour distance in um, NaN where undefined."""
        return np.array([s.spacing_um for s in self.stats])

    @cached_property
    def counts(self) -> np.ndarray:
        """``[cell, class]`` nuclei of each class."""
        return np.stack([s.per_type["n"].to_numpy() for s in self.stats])

    def take(self, rows: np.ndarray) -> Readings:
        donor = None if self.donor is None else self.donor[rows]
        return Readings([self.stats[i] for i in rows], self.central[rows], donor)


def _figures(a: Readings, b: Readings) -> tuple[float, float, float]:
    return (
        float(a.density.mean() / b.density.mean() - 1.0),
        composition_kl(b.counts.sum(axis=0), a.counts.sum(axis=0)),
        _mean(a.spacing) - _mean(b.spacing),
    )


def _mean(values: np.ndarray) -> float:
    """Mean of the values that are not NaN; NaN, without a warning, where there is none."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else math.nan


@np.errstate(divide="ignore", invalid="ignore")
def compare(a: Readings, b: Readings, seed: int) -> dict[str, Any]:
    """Readings ``a`` against ``b``, the same cells in the same order.

    Returns
    -------
    ``density_relative`` (mean of a over mean of b, minus 1), ``composition_kl`` (nats, KL(b || a) of pooled counts),
    ``spacing_um`` (difference of means), each with ``low`` and ``high`` (None for the KL), the 95 % percentile
    bootstrap interval over donors and, within each donor drawn, its cells: tiles of one section overlap and share its
    stain; ``by_type``: the mean over central types of the absolute figures; ``density_r``: correlation over cells. NaN
    where a figure has no answer, as the spacing of pictures without nuclei.
    """
    names = ("density_relative", "composition_kl", "spacing_um")
    value = _figures(a, b)
    draw = rng.stream(seed, "evaluation_bootstrap")
    n = len(a.stats)
    density, spacing, counts = ((getattr(a, k), getattr(b, k)) for k in ("density", "spacing", "counts"))
    drawn = []
    for _ in range(BOOTSTRAP):
        rows = _resampled(draw, a.donor, n)
        drawn.append(
            (
                density[0][rows].mean() / density[1][rows].mean() - 1.0,
                composition_kl(counts[1][rows].sum(axis=0), counts[0][rows].sum(axis=0)),
                _mean(spacing[0][rows]) - _mean(spacing[1][rows]),
            )
        )
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    by_type = []
    for name in np.unique(a.central):
        rows = np.flatnonzero(a.central == name)
        if len(rows) >= 10:
            by_type.append(np.abs(_figures(a.take(rows), b.take(rows))))
    result: dict[str, Any] = {"n": n, "density_r": float(np.corrcoef(a.density, b.density)[0, 1])}
    for i, name in enumerate(names):
        result[name] = {"value": value[i], "low": float(low[i]), "high": float(high[i])}
    # Resampling adds to a divergence that is never negative: its percentiles lie above the value that they are for.
    result["composition_kl"] |= {"low": None, "high": None}
    if by_type:
        result["by_type"] = dict(zip(names, np.mean(by_type, axis=0).tolist(), strict=True)) | {"types": len(by_type)}
    return result


def _resampled(draw: np.random.Generator, donor: np.ndarray | None, n: int) -> np.ndarray:
    """Rows of a two-level bootstrap: donors with replacement, then each one's cells with replacement."""
    if donor is None:
        return draw.integers(0, n, n)
    names = np.unique(donor)
    chosen = names[draw.integers(0, len(names), len(names))]
    parts = [np.flatnonzero(donor == name) for name in chosen]
    return np.concatenate([part[draw.integers(0, len(part), len(part))] for part in parts])


def _read(
    tables: Sequence[pd.DataFrame], central: np.ndarray, tile_um: float, donor: np.ndarray | None = None
) -> Readings:
    return Readings([niche_stats(t, (tile_um, tile_um), READER_CLASSES) for t in tables], central, donor)


def _matched_other(store: TissueStore, rows: np.ndarray, pool: np.ndarray, seed: int) -> np.ndarray:
    """For each row another cell of the same type, of the same donor where there is one; each cell is used once."""
    cells, draw = store.cells, rng.stream(seed, "evaluation_floor")
    free = list(draw.permutation(np.setdiff1d(pool, rows)))
    chosen = []
    for row in rows:
        same = [i for i in free if cells.cell_type[i] == cells.cell_type[row]]
        near = [i for i in same if cells.donor[i] == cells.donor[row]] or same or free
        if not near:
            raise BadInput(
                f"The store has {len(pool)} held-out cells for {len(rows)} tiles and a floor of as many others: "
                "lower --tiles or simulate more donors."
            )
        chosen.append(near[0])
        free.remove(near[0])
    return np.array(chosen)


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
    assert simulation is not None
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


def _effects_against_truth(
    model: GE2Hist, store: TissueStore, rows: np.ndarray, sample: SampleConfig, seed: int, tile_um: float
) -> list[dict[str, Any]]:
    """One row per programme and direction: the true and the model's mean change of each readout."""
    from ge2hist_core.simulator.programmes import PROGRAMMES

    def model_readings(factors: Mapping[str, float]) -> list[dict[str, float]]:
        latent = model.encode(model.embed(store.cells.take(rows).scale_genes(factors), seed))
        images = model.generate(latent, _seeds(seed, rows), sample)
        return [niche_stats(t, (tile_um, tile_um), READER_CLASSES).readouts() for t in model.read_nuclei(images)]

    readouts = ["density", *(f"fraction:{name}" for name in READER_CLASSES)]
    true_base = pd.DataFrame(true_readings(store, rows, {}, tile_um))[readouts]
    model_base = pd.DataFrame(model_readings({}))[readouts]
    standard_error = true_base.std(ddof=1) / np.sqrt(len(rows))
    table = []
    for programme in PROGRAMMES:
        for direction in ("down", "up"):
            factors = driver_programmes(programme, direction)
            true = (pd.DataFrame(true_readings(store, rows, factors, tile_um))[readouts] - true_base).mean()
            model_change = (pd.DataFrame(model_readings(factors))[readouts] - model_base).mean()
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


def _seeds(seed: int, rows: np.ndarray) -> list[int]:
    """One noise seed per cell, so that the pictures of different cells are independent draws."""
    return [int(rng.stream(seed, "evaluation_noise", int(row)).integers(2**31)) for row in rows]


def evaluate(
    model: GE2Hist,
    store: TissueStore,
    *,
    tiles: int = 500,
    reference_tiles: int = 32,
    edit_cells: int = 48,
    seed: int = 0,
    sample: SampleConfig | None = None,
) -> dict[str, Any]:
    """All figures of a bundle on the held-out donors of a store.

    Parameters
    ----------
    tiles: cells whose niche is generated once each and compared with the real tile.
    reference_tiles: of these, how many are also drawn with 1000 steps of DDPM; 0 leaves the comparison out.
    edit_cells: cells on which each driver programme is edited (known-truth stores only); 0 leaves it out.

    Raises
    ------
    BadInput: a number of tiles that cannot be, too few held-out cells, a store of another resolution, no reader.
    """
    sample = sample or SampleConfig()
    tile_um = model.config.tile_px * model.config.um_per_px
    if tiles < 2:
        raise BadInput(f"--tiles is {tiles}: give at least 2.")
    for name, n in (("--reference-tiles", reference_tiles), ("--edit-cells", edit_cells)):
        if n != 0 and not 2 <= n <= tiles:
            raise BadInput(f"{name} is {n}: give 0, or 2 to {tiles}, which is --tiles.")
    if not math.isclose(store.um_per_px, model.config.um_per_px):
        raise BadInput(
            f"{store.path} has {store.um_per_px:g} um per px, the bundle {model.config.um_per_px:g}: "
            "give a store of the bundle's resolution."
        )
    seen = model.has_learned_from(store)
    donors = [name for name in store.donors if name not in seen]
    cells = store.cells
    eligible = np.flatnonzero(np.isin(cells.donor, donors))
    pool = eligible[store.interior[eligible]]
    if len(pool) < 2 * tiles:
        raise BadInput(
            f"--tiles is {tiles}, the held-out donors have {len(pool)} whole tiles and the floor needs as many others: "
            f"give at most {len(pool) // 2} or simulate more donors."
        )
    rows = np.sort(rng.stream(seed, "evaluation_cells").choice(pool, tiles, replace=False))
    central = cells.cell_type[rows]
    result: dict[str, Any] = {
        "bundle_sha256": model.sha256,
        "store": store.identity,
        "donors": list(donors),
        "seed": seed,
        "sample": {"solver": sample.solver, "steps": sample.steps, "guidance": sample.guidance},
    }

    # Before anything slow: a bundle without a reader ends here.
    donor = cells.donor[rows]
    real = _read(model.read_nuclei(store.tiles(rows)), central, tile_um, donor)

    _say(f"encoding {len(eligible)} cells of {len(donors)} held-out donors")
    latent = model.encode(model.embed(cells.take(eligible), seed))
    truth = cells.cell_type[eligible]
    guess = np.array(model.cell_types, dtype=object)[model.classify(latent).argmax(axis=1)]
    result["classifier"] = {
        "accuracy": float((guess == truth).mean()),
        "n": len(truth),
        "recall": {str(t): float((guess[truth == t] == t).mean()) for t in np.unique(truth)},
    }

    position = {row: i for i, row in enumerate(eligible)}
    state: Latent = latent.take(np.array([position[row] for row in rows]))
    started = time.perf_counter()
    images = model.generate(state, _seeds(seed, rows), sample)
    _say(f"generated {tiles} tiles in {time.perf_counter() - started:.0f} s")
    generated = _read(model.read_nuclei(images), central, tile_um, donor)
    true = _read([store.nuclei(row) for row in rows], central, tile_um, donor)
    others = _matched_other(store, rows, pool, seed)
    floor = _read(model.read_nuclei(store.tiles(others)), central, tile_um, donor)
    exchanged = rng.stream(seed, "evaluation_exchange").permutation(tiles)
    ceiling = Readings(generated.take(exchanged).stats, central, donor)
    result["generated_vs_real"] = compare(generated, real, seed)
    result["floor_real_vs_real"] = compare(floor, real, seed)
    result["ceiling_conditions_exchanged"] = compare(ceiling, real, seed)
    for name in ("density_relative", "composition_kl", "spacing_um"):
        # Over all cells together they are those of the generated tiles by construction.
        result["ceiling_conditions_exchanged"][name] = {"value": None, "low": None, "high": None}
    same_type = cells.cell_type[others] == central
    result["floor_real_vs_real"]["n_same_type"] = int(same_type.sum())
    result["reader_vs_truth_on_real"] = compare(real, true, seed)

    if reference_tiles:
        few = np.sort(rng.stream(seed, "evaluation_reference").choice(tiles, reference_tiles, replace=False))
        started = time.perf_counter()
        reference = model.generate(state.take(few), _seeds(seed, rows[few]), SampleConfig("ddpm", 1000))
        seconds = time.perf_counter() - started
        _say(f"generated {reference_tiles} tiles with 1000 steps in {seconds:.0f} s")
        slow = _read(model.read_nuclei(reference), central[few], tile_um, donor[few])
        result["steps"] = {
            f"{sample.solver} {sample.steps} vs real": compare(generated.take(few), real.take(few), seed),
            "ddpm 1000 vs real": compare(slow, real.take(few), seed),
            f"{sample.solver} {sample.steps} vs ddpm 1000": compare(generated.take(few), slow, seed),
        }
    if edit_cells and store.simulation is not None:
        chosen = rows[np.sort(rng.stream(seed, "evaluation_edit_cells").choice(tiles, edit_cells, replace=False))]
        effects = _effects_against_truth(model, store, chosen, sample, seed, tile_um)
        clear = [e for e in effects if e["exceeds_noise"]]
        result["driver_programmes"] = {
            "n_cells": edit_cells,
            "edits_exceeding_noise": len(clear),
            "signs_right": sum(e["sign_right"] for e in clear),
            "clear_readouts": sum(e["clear_readouts"] for e in effects),
            "clear_signs_right": sum(e["clear_signs_right"] for e in effects),
            "edits": effects,
        }
    return result


def _without_nan(value: Any) -> Any:
    """The same nested value with None, which JSON has, for numbers that are not finite, which it has not."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def summary(result: Mapping[str, Any]) -> str:
    """The main figures as lines of text."""
    lines = [f"classifier accuracy {result['classifier']['accuracy']:.4f} (n = {result['classifier']['n']} cells)"]
    for key in ("generated_vs_real", "floor_real_vs_real", "ceiling_conditions_exchanged", "reader_vs_truth_on_real"):
        lines.append(f"{key}: {_line(result[key])}")
    for key, value in result.get("steps", {}).items():
        lines.append(f"{key}: {_line(value)}")
    if "driver_programmes" in result:
        d = result["driver_programmes"]
        lines.append(f"driver programmes: sign right for {d['signs_right']} of {d['edits_exceeding_noise']}")
    return "\n".join(lines)


def _line(c: Mapping[str, Any]) -> str:
    by_type = c.get("by_type", {})
    tail = (
        f"; by type |density| {by_type['density_relative']:.1%}, KL {by_type['composition_kl']:.3f}, "
        f"|spacing| {by_type['spacing_um']:.2f} um"
        if by_type
        else ""
    )
    if c["density_relative"]["value"] is None:
        return f"n = {c['n']}: r {c['density_r']:.2f}{tail}"
    return (
        f"n = {c['n']}: density {c['density_relative']['value']:+.1%} "
        f"[{c['density_relative']['low']:+.1%}, {c['density_relative']['high']:+.1%}], "
        f"composition KL {c['composition_kl']['value']:.4f} nats, spacing {c['spacing_um']['value']:+.2f} um, "
        f"r {c['density_r']:.2f}{tail}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("data", type=Path, metavar="DATA.zarr")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for evaluation.json")
    parser.add_argument("--tiles", type=int, default=500)
    parser.add_argument("--reference-tiles", type=int, default=32, help="tiles also drawn with 1000 DDPM steps")
    parser.add_argument("--edit-cells", type=int, default=48, help="cells on which driver programmes are edited")
    parser.add_argument("--steps", type=int, default=SampleConfig().steps)
    parser.add_argument("--guidance", type=float, default=SampleConfig().guidance)
    parser.add_argument("--seed", type=int, default=0)


def main(args: argparse.Namespace) -> None:
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.store import TissueStore

    result = evaluate(
        GE2Hist.load(args.bundle),
        TissueStore(args.data),
        tiles=args.tiles,
        reference_tiles=args.reference_tiles,
        edit_cells=args.edit_cells,
        seed=args.seed,
        sample=SampleConfig(steps=args.steps, guidance=args.guidance),
    )
    write_json(args.out / "evaluation.json", _without_nan(result))
    print(summary(result))
