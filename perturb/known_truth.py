r"""How claims of this kind fare where the truth is known: ``python -m perturb known-truth BUNDLE DATA.zarr``.

On held-out donors of a simulated store, genes are edited in the model and, with the same factors, in the tissue itself
(:func:`ge2hist_core.simulator.tissue.simulate_section` run again with the genes set by hand). Four kinds of edits:

- driver programmes: all drivers of a programme, up and down: their true effect is the programme's;
- single drivers, knocked out or at four times their counts: a part of that;
- single reporters: they follow a programme and drive nothing, their true effect on the niche is none;
- single inert genes: none either. What the model makes of them is the null that the others are measured by.

And four ways of making an edit: directly; spread through the tissue's true network, through one fitted to the training
donors' cells with the edited genes as regulators, and through networks of random wiring. A model that has learned from
observation answers to reporters too, because it conditions on expression instead of intervening on it: the price is
stated here as a rate of false effects.

Effects are those of the niche network (:meth:`GE2Hist.expected_readouts`, no picture) or, for programmes and with
``--pictures``, of drawn pictures, one per cell, the same noise in all arms. Intervals resample donors.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from ge2hist_core import rng
from ge2hist_core.config import READER_CLASSES, SampleConfig
from ge2hist_core.types import BadInput, Cells

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.store import TissueStore
    from perturb.grn import Network

__all__ = ["ARMS", "READOUTS", "Case", "Effects", "cases", "measure", "summary"]

ARMS = ("direct", "true network", "fitted network", "random wiring")
READOUTS = ("density", *(f"fraction:{name}" for name in READER_CLASSES))
KNOCKED_OUT, RAISED = 0.0, 4.0
CLEAR = 2.0
"""A true effect counts as clear from this many standard errors over cells."""
FIT_CELLS = 4000
RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Case:
    """One edit: ``role`` is ``programme``, ``driver``, ``reporter`` or ``inert``; ``factors`` multiply counts."""

    role: str
    name: str
    direction: str
    factors: tuple[tuple[str, float], ...]

    @property
    def moves_the_niche(self) -> bool:
        """Whether the tissue itself answers to the edit."""
        return self.role in ("programme", "driver")


def cases(per_role: int = 24, seed: int = 0) -> list[Case]:
    """All driver programmes up and down, and ``per_role`` single genes of each role, each down and up.

    Reporters are as many of each programme; inert genes are drawn among those as highly expressed as reporters.
    """
    from ge2hist_core.evaluation import driver_programmes
    from ge2hist_core.simulator.expression import load_genes
    from ge2hist_core.simulator.programmes import PROGRAMMES

    found = [
        Case("programme", programme, direction, tuple(driver_programmes(programme, direction).items()))
        for programme in PROGRAMMES
        for direction in ("down", "up")
    ]
    table, draw = load_genes(), rng.stream(seed, "known-truth genes")
    level = table.base.mean(axis=1)
    low, high = np.quantile(level[table.role == "reporter"], (0.1, 0.9))
    for role in ("driver", "reporter", "inert"):
        pool = table.symbols[(table.role == role) & ((role != "inert") | ((level >= low) & (level <= high)))]
        order = draw.permutation(len(pool))
        by_programme: dict[str, list[str]] = {}
        for i in order:
            by_programme.setdefault(table.programme_of(pool[i])[0], []).append(pool[i])
        turns = [
            gene for turn in range(len(pool)) for genes in by_programme.values() for gene in genes[turn : turn + 1]
        ]
        for gene in turns[:per_role]:
            found += [
                Case(role, gene, direction, ((gene, factor),))
                for direction, factor in (("down", KNOCKED_OUT), ("up", RAISED))
            ]
    return found


@dataclass(frozen=True, eq=False)
class Effects:
    """True and modelled effects of all cases.

    Parameters
    ----------
    cases: as given. donor: ``[cell]``.
    true: ``[case, readout, cell]`` change in the tissue; 0 where the edit moves nothing.
    model: arm -> ``[case, readout, cell]``; NaN for cases that were not drawn.
    """

    cases: list[Case]
    donor: np.ndarray
    true: np.ndarray
    model: dict[str, np.ndarray]


def measure(
    model: GE2Hist,
    store: TissueStore,
    chosen: Sequence[Case],
    *,
    cells: int = 48,
    pictures: bool = False,
    seed: int = 0,
    on_case: Callable[[], object] | None = None,
) -> Effects:
    """Make every edit in the model, in all ways, and in the tissue.

    Parameters
    ----------
    cells: of held-out donors, drawn at random among those with a whole tile.
    pictures: draw pictures, of programmes alone, instead of asking the niche network.

    Raises
    ------
    BadInput: a store that was not simulated, or has too few held-out cells.
    """
    from ge2hist_core.evaluation import true_readings
    from perturb.grn import fit_network, observed_range, randomised
    from perturb.networks import known_truth

    if store.simulation is None:
        raise BadInput(f"{store.path} is no simulated tissue, so no truth is known: give a store that simulate wrote.")
    seen = model.has_learned_from(store)
    pool = store.rows([name for name in store.donors if name not in seen])
    if len(pool) < cells or cells < 2:
        raise BadInput(f"--cells is {cells}, the held-out donors have {len(pool)} whole tiles: give 2 to {len(pool)}.")
    rows = np.sort(rng.stream(seed, "known-truth cells").choice(pool, cells, replace=False))
    some, reference = store.cells.take(rows), store.cells.take(pool[:FIT_CELLS])
    learned = store.rows(sorted(model.has_learned_from(store, ("train",))), interior=False)
    sample = np.sort(rng.stream(seed, "known-truth fit").permutation(learned)[:FIT_CELLS])
    truth, span = known_truth(), observed_range(reference)
    edited = sorted({gene for case in chosen for gene, _ in case.factors})
    fitted = fit_network(store.cells.take(sample), edited)
    tile_um = model.config.tile_px * model.config.um_per_px
    base_true = _table(true_readings(store, rows, {}, tile_um))
    read = _drawn(model, rows, seed) if pictures else _guessed(model, seed)
    base = read(some)
    shape = (len(chosen), len(READOUTS), cells)
    true, found = np.zeros(shape), {arm: np.full(shape, np.nan) for arm in ARMS}
    for i, case in enumerate(chosen):
        factors = dict(case.factors)
        if case.moves_the_niche:
            true[i] = _table(true_readings(store, rows, factors, tile_um)) - base_true
        if pictures and case.role != "programme":
            continue
        direct = some.scale_genes(factors)
        ways = {arm: [network] for arm, network in zip(ARMS[1:3], (truth, fitted), strict=True)}
        # Another wiring for every cell, so that the mean over cells is one over wirings.
        ways[ARMS[3]] = [randomised(truth, seed + k) for k in range(cells)]
        found[ARMS[0]][i] = read(direct) - base
        for arm, networks in ways.items():
            found[arm][i] = read(_spread(networks, some, direct, span, factors)) - base
        if on_case is not None:
            on_case()
    return Effects(list(chosen), np.asarray(some.donor), true, found)


def _spread(
    networks: Sequence[Network], some: Cells, direct: Cells, span: tuple[np.ndarray, np.ndarray], edited: Iterable[str]
) -> Cells:
    """The direct edit spread through one network, or through another one for each cell."""
    from perturb.grn import propagate

    parts = [slice(None)] if len(networks) == 1 else [slice(k, k + 1) for k in range(len(some))]
    counts = [
        sp.csr_matrix(
            propagate(network, some.genes, some.counts[part], direct.counts[part], *span, edited=list(edited)).counts
        )
        for network, part in zip(networks, parts, strict=True)
    ]
    return direct.with_counts(sp.vstack(counts, format="csr"))


def _table(readings: list[dict[str, float]]) -> np.ndarray:
    """``[readout, cell]``; a share of no nuclei is 0."""
    return np.nan_to_num(np.array([[one[name] for one in readings] for name in READOUTS]))


def _guessed(model: GE2Hist, seed: int) -> Callable[[Cells], np.ndarray]:
    def read(cells: Cells) -> np.ndarray:
        readouts = model.expected_readouts(model.encode(model.embed(cells, seed)))
        return np.stack([readouts[name] for name in READOUTS])

    return read


def _drawn(model: GE2Hist, rows: np.ndarray, seed: int) -> Callable[[Cells], np.ndarray]:
    from ge2hist_core.niche import niche_stats

    seeds = [int(rng.stream(seed, "known-truth noise", int(row)).integers(2**31)) for row in rows]
    tile_um = model.config.tile_px * model.config.um_per_px

    def read(cells: Cells) -> np.ndarray:
        images = model.generate(model.encode(model.embed(cells, seed)), seeds, SampleConfig())
        tables = model.read_nuclei(images)
        return _table([niche_stats(table, (tile_um, tile_um), READER_CLASSES).readouts() for table in tables])

    return read


def summary(effects: Effects, seed: int = 0) -> dict[str, Any]:
    """What the effects say, per arm; every figure with its 95 % interval over donors.

    Returns
    -------
    ``slopes``: modelled on true effect of the programmes through the origin, for density and for shares (1 is right).
    ``signs``: clear true effects of programmes whose sign is right. ``against_direct``: of the clear true effects, how
    many each network brings nearer to the truth and how many farther. ``beyond_inert``: per role, the share of effects
    (edits times readouts) larger than 95 % of those of inert genes: power for drivers, false effects for reporters.
    """
    drawn = np.isfinite(effects.model["direct"]).all(axis=(1, 2))
    role = np.array([case.role for case in effects.cases], dtype=object)
    weights = _donor_weights(effects.donor, seed)
    mean_true = effects.true @ weights.T  # [case, readout, resample]; the first one is the data
    error = effects.true.std(axis=2, ddof=1) / np.sqrt(effects.true.shape[2])
    clear = np.abs(mean_true[..., 0]) > CLEAR * np.where(error > 0, error, np.inf)
    means = {arm: values[drawn] @ weights.T for arm, values in effects.model.items()}
    programme, clear_programme = role[drawn] == "programme", (clear & (role == "programme")[:, None])[drawn]
    out: dict[str, Any] = {
        "n_cells": len(effects.donor),
        "n_donors": len(set(effects.donor)),
        "n_cases": {name: int((role[drawn] == name).sum()) for name in dict.fromkeys(role)},
        "slopes": {},
        "signs": {},
        "against_direct": {},
        "beyond_inert": {},
    }
    true = mean_true[drawn]
    for arm, value in means.items():
        parts = {"density": [0], "shares": list(range(1, len(READOUTS)))}
        out["slopes"][arm] = {
            name: _interval(
                (true[programme][:, part] * value[programme][:, part]).sum(axis=(0, 1))
                / np.maximum((true[programme][:, part] ** 2).sum(axis=(0, 1)), 1e-30)
            )
            for name, part in parts.items()
        }
        right = np.sign(value[..., 0]) == np.sign(true[..., 0])
        out["signs"][arm] = {"right": int(right[clear_programme].sum()), "of": int(clear_programme.sum())}
        if arm != "direct":
            gain = np.abs(means["direct"][..., 0] - true[..., 0]) - np.abs(value[..., 0] - true[..., 0])
            out["against_direct"][arm] = {
                "nearer": int((gain[clear_programme] > 0).sum()),
                "farther": int((gain[clear_programme] < 0).sum()),
                "of": int(clear_programme.sum()),
            }
    for arm, value in means.items() if (role[drawn] == "inert").any() else ():
        size = np.abs(value[..., 0])
        limit = np.quantile(size[role[drawn] == "inert"], LEVEL, axis=0)
        out["beyond_inert"][arm] = {
            name: {"share": float((size[role[drawn] == name] > limit).mean()), "of": int(mine * len(READOUTS))}
            for name, mine in out["n_cases"].items()
            if name != "inert"
        }
    return out


def _donor_weights(donor: np.ndarray, seed: int) -> np.ndarray:
    """``[1 + resample, cell]`` weights that average cells: of the data, then of donors drawn with replacement."""
    names, place = np.unique(donor.astype(str), return_inverse=True)
    draw = rng.stream(seed, "known-truth donors")
    times = np.stack(
        [np.bincount(draw.integers(len(names), size=len(names)), minlength=len(names)) for _ in range(RESAMPLES)]
    )
    counts = np.vstack([np.ones(len(donor)), times[:, place]])
    return counts / counts.sum(axis=1, keepdims=True)


def _interval(values: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(values[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def rows(effects: Effects) -> Iterator[dict[str, Any]]:
    """One row per case and readout: true and modelled mean effects."""
    for i, case in enumerate(effects.cases):
        for j, readout in enumerate(READOUTS):
            yield {
                "role": case.role,
                "edit": case.name,
                "direction": case.direction,
                "readout": readout,
                "true": float(effects.true[i, j].mean()),
            } | {arm: float(values[i, j].mean()) for arm, values in effects.model.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m perturb known-truth``."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("data", type=Path, metavar="DATA.zarr", help="simulated tissue with donors that are held out")
    parser.add_argument("--out", type=Path, required=True, help="folder for known_truth.json and known_truth.csv")
    parser.add_argument("--cells", type=int, default=48)
    parser.add_argument("--per-role", type=int, default=24, help="single genes of each role")
    parser.add_argument("--pictures", type=int, default=0, help="cells on which programmes are drawn as well")
    parser.add_argument("--seed", type=int, default=0)


def main(args: argparse.Namespace) -> None:
    """Write ``known_truth.json`` and the table of all effects."""
    from tqdm import tqdm

    from ge2hist_core.files import atomic_path, write_json
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.store import TissueStore

    model, store = GE2Hist.load(args.bundle), TissueStore(args.data)
    chosen = cases(args.per_role, args.seed)
    result: dict[str, Any] = {"bundle_sha256": model.sha256, "store": store.identity, "seed": args.seed}
    for name, cells in (("niche network", args.cells), ("pictures", args.pictures)):
        if not cells:
            continue
        some = [case for case in chosen if case.role == "programme"] if name == "pictures" else chosen
        with tqdm(total=len(some), desc=name) as bar:
            effects = measure(
                model, store, some, cells=cells, pictures=name == "pictures", seed=args.seed, on_case=bar.update
            )
        result[name] = summary(effects, args.seed)
        with atomic_path(args.out / f"known_truth_{name.replace(' ', '_')}.csv") as temporary:
            pd.DataFrame(rows(effects)).to_csv(temporary, index=False)
    write_json(args.out / "known_truth.json", result)
    for name in ("niche network", "pictures"):
        for arm, slopes in result.get(name, {}).get("slopes", {}).items():
            print(name, arm, {part: round(value["value"], 3) for part, value in slopes.items()})
