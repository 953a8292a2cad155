r"""Edits of known effect through the whole chain: :func:`perturb.run.run`, with the app's own intervals and p-values.

Three questions, three designs:

- one cell and 16 noise seeds, the app's default: how often does its test call an edit of an inert gene an effect
  (type-I error), of a reporter (a false effect all the same), of a programme (power), and how small an effect can it
  find;
- 64 further seeds of some of these pairs: does the interval hold what many seeds would say, that is, the model's own
  conditional? Their mean M is itself uncertain, so k seeds with mean m cover it where M lies in their interval widened
  about m by :math:`\sqrt{1 + k / n_M}`, which happens as often as the interval covers the true mean;
- many cells with one seed each, edits spread through the tissue's true network: slopes, signs and whether spreading
  brings drawn effects nearer to the truth.

Finished pictures stay in ``OUT/.work`` until all is done: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ge2hist_core import rng
from ge2hist_core.config import SampleConfig
from ge2hist_core.types import BadInput, Cells, Latent
from perturb.cache import DiskCache
from perturb.edits import Edit, Perturbation
from perturb.grn import Propagation
from perturb.known_truth import KNOCKED_OUT, RAISED, held_out, programme_factors
from perturb.known_truth_summary import ARMS, COVERS, Case, Effects, summary
from perturb.recipe import DEFAULT_SEEDS, Recipe
from perturb.true_effects import READOUTS, TrueTissue

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.store import TissueStore
    from perturb.result import Result

__all__ = ["Design", "Pair", "draw", "perturbation", "plan", "smallest_effect"]

POWER = 0.8
ALPHA = 0.05
MIN_COUNT = 2.0
"""An edit of a gene that the cell hardly expresses is exactly nothing and would make the test look better."""
MAX_BYTES = 8 * 2**30


@dataclass(frozen=True)
class Design:
    """How much is drawn.

    Parameters
    ----------
    cells: with 16 seeds. inert, reporters, programmes: edits of each kind in each of them.
    seeds: of a pair. further: seeds whose mean stands for the model's own conditional.
    long_cells: cells with further seeds, one inert gene and one programme in each.
    wide_cells: cells with one seed, in which all programmes are knocked out and raised; 0 leaves them out.
    sample: how pictures are drawn.
    """

    cells: int = 8
    inert: int = 5
    reporters: int = 2
    programmes: int = 3
    seeds: tuple[int, ...] = DEFAULT_SEEDS
    further: int = 64
    long_cells: int = 4
    wide_cells: int = 24
    sample: SampleConfig = SampleConfig()

    @classmethod
    def of(cls, cells: int, quick: bool = False) -> Design:
        """For so many cells; quick: the least that exercises every part.

        Raises
        ------
        BadInput: fewer than one cell.
        """
        if cells < 1:
            raise BadInput(f"--pictures is {cells}: give at least 1 cell.")
        if quick:
            return cls(1, 1, 1, 1, (0, 1), 2, 1, 2, SampleConfig(steps=2))
        return cls(cells, long_cells=(cells + 1) // 2, wide_cells=3 * cells)

    @property
    def pictures(self) -> int:
        """To be drawn at the most; pictures that are in ``OUT/.work`` are not drawn again."""
        pairs = self.cells * (1 + self.inert + self.reporters + self.programmes) * len(self.seeds)
        # Two edits of a long cell; 12 programme edits with base, direct, spread and control arms.
        return pairs + self.long_cells * 3 * self.further + self.wide_cells * (1 + 3 * 12)


@dataclass(frozen=True)
class Pair:
    """One edit of one cell of the store; ``further``: with more seeds as well."""

    case: Case
    row: int
    further: bool


def perturbation(case: Case) -> Perturbation:
    """The case as the app would write it."""
    return Perturbation(
        tuple(Edit(gene, "ko") if factor == 0 else Edit(gene, "factor", factor) for gene, factor in case.factors)
    )


def plan(store: TissueStore, pool: np.ndarray, design: Design, seed: int = 0) -> tuple[list[Pair], np.ndarray]:
    """Pairs of edit and cell, and the rows of the wide design.

    Cells are of different donors as far as there are. Every cell gets genes of its own that it expresses with at least
    two counts, knocked out and at four times their counts in turn; programmes go round.

    Raises
    ------
    BadInput: too few cells.
    """
    from ge2hist_core.simulator.expression import load_genes
    from ge2hist_core.simulator.programmes import PROGRAMMES

    needed = design.cells + design.wide_cells
    if len(pool) < needed:
        raise BadInput(
            f"Pictures need {needed} held-out cells with whole tiles, there are {len(pool)}: lower --pictures."
        )
    draws = rng.stream(seed, "drawn truth cells")
    order = draws.permutation(pool)
    donor = np.asarray(store.cells.donor)[order]
    turn = pd.Series(donor).groupby(donor).cumcount().to_numpy()
    order = order[np.argsort(turn, kind="stable")]
    narrow, wide = order[: design.cells], np.sort(order[design.cells : needed])
    table = load_genes()
    role = dict(zip(table.symbols, table.role, strict=True))
    rounds = [(programme, dose) for dose in (RAISED, KNOCKED_OUT) for programme in PROGRAMMES]
    pairs, done = [], 0
    for c, row in enumerate(narrow):
        counts = store.cells.counts[row].toarray()[0]
        expressed = [str(gene) for gene, n in zip(store.cells.genes, counts, strict=True) if n >= MIN_COUNT]
        cases = []
        for kind, n in (("inert", design.inert), ("reporter", design.reporters)):
            genes = draws.permutation([gene for gene in expressed if role.get(gene) == kind])[:n]
            cases += [
                Case(kind, str(gene), dose, ((str(gene), dose),))
                for i, gene in enumerate(genes)
                for dose in [(KNOCKED_OUT, RAISED)[(i + c) % 2]]
            ]
        for _ in range(design.programmes):
            programme, dose = rounds[done % len(rounds)]
            done += 1
            cases.append(Case("programme", programme, dose, tuple(programme_factors(programme, dose).items())))
        first = {
            kind: next((k for k, case in enumerate(cases) if case.role == kind), -1) for kind in ("inert", "programme")
        }
        long = set(first.values()) if c < design.long_cells else set()
        pairs += [Pair(case, int(row), k in long) for k, case in enumerate(cases)]
    return pairs, wide


def draw(
    model: GE2Hist, store: TissueStore, truth: TrueTissue, design: Design, out: Path, seed: int = 0
) -> dict[str, Any]:
    """Draw the plan and say what came out, as plain JSON.

    The cost is said first, from the time that one batch of pictures takes.

    Returns
    -------
    ``tests``: per role and readout, of pairs with the app's 16 seeds. ``own_conditional``: coverage of the intervals
    for the mean over further seeds. ``smallest``: per readout, the effect found with power 0.8. ``wide``: summary of
    the wide design as in :func:`perturb.known_truth_summary.summary`.
    """
    from tqdm import tqdm

    from ge2hist_core.simulator.programmes import PROGRAMMES
    from perturb.networks import known_truth

    pool = held_out(model, store)
    pairs, wide = plan(store, pool, design, seed)
    seconds = _seconds_per_picture(model, design.sample)
    print(
        f"{design.pictures} pictures, about {design.pictures * seconds / 60:.0f} minutes ({seconds:.2f} s each)",
        file=sys.stderr,
        flush=True,
    )
    work = out / ".work"
    cache = DiskCache(work / "drawn", max_bytes=MAX_BYTES)
    reference = store.cells.take(np.unique(np.concatenate([pool[:: max(1, len(pool) // 3000)], wide])))
    network = known_truth()
    common: dict[str, Any] = {"data_sha256": store.identity, "model_sha256": model.sha256, "sample": design.sample}
    further = tuple(range(max(design.seeds) + 1, max(design.seeds) + 1 + design.further))

    programmes = [
        Case("programme", programme, dose, tuple(programme_factors(programme, dose).items()))
        for programme in PROGRAMMES
        for dose in (KNOCKED_OUT, RAISED)
    ]
    total = len(pairs) + sum(pair.further for pair in pairs) + (len(programmes) if design.wide_cells else 0)
    rows: list[pd.DataFrame] = []
    blocks: list[dict[str, Any]] = []
    with tqdm(total=total, desc="pictures", unit="edit") as bar:
        for i, pair in enumerate(pairs):
            cell = store.cells.take(np.array([pair.row]))

            def pictures(seeds: tuple[int, ...], pair: Pair = pair, cell: Cells = cell) -> Result:
                return _run(
                    Recipe(cell_ids=tuple(cell.cell_id), perturbation=perturbation(pair.case), seeds=seeds, **common),
                    model,
                    cell,
                    cache,
                )

            result = pictures(design.seeds)
            bar.update()
            true = np.zeros(len(READOUTS))
            if pair.case.moves_the_niche:
                after = truth.readings(np.array([pair.row]), dict(pair.case.factors))
                true = (after - truth.readings(np.array([pair.row]), {}))[:, 0]
            rows.append(_tested(result, i, pair, str(cell.donor[0]) if cell.donor is not None else "", true))
            if pair.further:
                more = pictures(further)
                bar.update()
                blocks += list(_blocks(result, more, i, pair))
        effects = None
        if design.wide_cells:
            effects = _empty(programmes, store, wide)
            base = truth.readings(wide, {})
            for i, case in enumerate(programmes):
                recipe = Recipe(
                    cell_ids=tuple(store.cells.cell_id[wide]),
                    perturbation=perturbation(case),
                    seeds=design.seeds[:1],
                    propagation=Propagation(network.sha256, network.name),
                    **common,
                )
                found = _arms(_run(recipe, model, reference, cache, network))
                effects.true[i] = truth.readings(wide, dict(case.factors)) - base
                for arm, name in ((ARMS[0], "direct"), (ARMS[1], "edited"), (ARMS[4], "control")):
                    effects.model[arm][i] = found[name] - found["base"]
                bar.update()
    table = pd.concat(rows, ignore_index=True)
    figures: dict[str, Any] = {
        "cells": design.cells,
        "pictures": design.pictures,
        "seeds": len(design.seeds),
        "further": design.further,
        "intervals": COVERS,
        "tests": list(_tests(table, seed)),
        "own_conditional": list(_coverage(pd.DataFrame(blocks), seed)) if blocks else [],
        "smallest": list(_smallest(table, len(design.seeds))),
    }
    if effects is not None:
        figures["wide"] = summary(effects, seed)
    shutil.rmtree(work / "drawn", ignore_errors=True)
    if work.is_dir() and not any(work.iterdir()):
        work.rmdir()
    return figures


def _run(recipe: Recipe, model: GE2Hist, cells: Cells, cache: DiskCache, network: Any = None) -> Result:
    from perturb.run import run

    return run(recipe, model, cells, network=network, cache=cache)


def _seconds_per_picture(model: GE2Hist, sample: SampleConfig) -> float:
    """Of one batch, after the first one, which also warms up."""
    from ge2hist_core.model import CHUNK

    nothing = Latent(np.zeros((CHUNK, model.config.d_c)), np.zeros((CHUNK, model.config.d_e)))
    start = 0.0
    for _ in range(2):
        start = time.perf_counter()
        model.read_nuclei(model.generate(nothing, range(CHUNK), sample))
    return (time.perf_counter() - start) / CHUNK


def _arms(result: Result) -> dict[str, np.ndarray]:
    """Arm -> ``[readout, cell]``, mean over seeds; a share of no nuclei is 0."""
    cells = list(result.recipe.cell_ids)
    found = {}
    for arm, part in result.readouts.groupby("arm", sort=False):
        wide = part.assign(value=part["value"].fillna(0.0)).pivot_table("value", "readout", "cell_id", aggfunc="mean")
        found[str(arm)] = wide.reindex(index=list(READOUTS), columns=cells).to_numpy(dtype=np.float64)
    return found


def _differences(result: Result) -> np.ndarray:
    """``[readout, seed]`` edited minus unedited of a one-cell result, NaN where either is not defined."""
    table = result.readouts.pivot_table("value", "readout", ["arm", "seed"], aggfunc="first", dropna=False)
    table = table.reindex(index=list(READOUTS))
    seeds = list(result.recipe.seeds)
    edited, base = (table[arm].reindex(columns=seeds).to_numpy(dtype=np.float64) for arm in ("edited", "base"))
    return edited - base


def _tested(result: Result, i: int, pair: Pair, donor: str, true: np.ndarray) -> pd.DataFrame:
    """The app's comparison of one pair, a row per readout; one that the app leaves out is no effect."""
    found = result.comparison.set_index("readout").reindex(list(READOUTS))
    difference = _differences(result)
    defined = np.isfinite(difference)
    n = defined.sum(axis=1)
    centred = np.where(
        defined, difference - np.where(n, np.nansum(difference, axis=1) / np.maximum(n, 1), 0)[:, None], 0
    )
    return pd.DataFrame(
        {
            "pair": i,
            "role": pair.case.role,
            "donor": donor,
            "readout": list(READOUTS),
            "effect": found["effect"].fillna(0.0).to_numpy(),
            "low": found["low"].fillna(0.0).to_numpy(),
            "high": found["high"].fillna(0.0).to_numpy(),
            "p": found["p"].fillna(1.0).to_numpy(),
            "q": found["q"].fillna(1.0).to_numpy(),
            "true": true,
            "variance": np.where(n > 1, np.square(centred).sum(axis=1) / np.maximum(n - 1, 1), np.nan),
        }
    )


def _tests(table: pd.DataFrame, seed: int) -> Iterator[dict[str, Any]]:
    """Per role, of all readouts together and of each: shares of tests, each with an interval over donors.

    ``p``, ``q``: share with p or q below 0.05, for inert genes the type-I error, for reporters false effects, for
    programmes power (all readouts, also those that hardly change). ``covers_truth``: share of intervals over seeds
    that hold the true change of that very niche, which is 0 for inert genes and reporters. ``sign``: right signs among
    true changes that are not 0.
    """
    from perturb.stats import clustered_ratio

    def rate(hits: pd.Series | np.ndarray, donor: pd.Series) -> dict[str, Any]:
        found = clustered_ratio(np.asarray(hits, dtype=np.float64), np.ones(len(donor)), donor.to_numpy(), seed)
        return {key: _finite(getattr(found, key)) for key in ("value", "low", "high")} | {"of": found.n}

    for role, mine in table.groupby("role", sort=False):
        for readout in ("all", *READOUTS):
            part = mine if readout == "all" else mine[mine["readout"] == readout]
            moved = part[part["true"] != 0]
            yield {
                "role": str(role),
                "readout": readout,
                "n_edits": int(part["pair"].nunique()),
                "n_donors": int(part["donor"].nunique()),
                "p": rate(part["p"] < ALPHA, part["donor"]),
                "q": rate(part["q"] < ALPHA, part["donor"]),
                "covers_truth": rate((part["low"] <= part["true"]) & (part["true"] <= part["high"]), part["donor"]),
                "sign": rate(np.sign(moved["effect"]) == np.sign(moved["true"]), moved["donor"]),
            }


def _finite(value: float) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) else None


def _blocks(result: Result, more: Result, i: int, pair: Pair) -> Iterator[dict[str, Any]]:
    """Intervals of every 8 and every 16 seeds of a pair, held against the mean of its other seeds.

    Readouts that differ in no pair of any seed are left out: every interval would hold their mean.
    """
    from perturb.stats import bootstrap_mean
    from perturb.tables import steps

    step = steps(pd.concat([result.readouts, more.readouts]))
    difference = np.hstack([_differences(result), _differences(more)])
    size = len(result.recipe.seeds)
    for k in dict.fromkeys((max(2, size // 2), size)):
        for j, readout in enumerate(READOUTS):
            for start in range(0, difference.shape[1] - k + 1, k):
                here = np.zeros(difference.shape[1], dtype=bool)
                here[start : start + k] = True
                own, rest = difference[j, here], difference[j, ~here]
                own, rest = own[np.isfinite(own)], rest[np.isfinite(rest)]
                if len(own) < 2 or len(rest) < 2 or not (own.any() or rest.any()):
                    continue
                found, aim = bootstrap_mean(own, start, step=step[readout]), float(rest.mean())
                widen = np.sqrt(1.0 + len(own) / len(rest))
                low, high = (found.value + widen * (end - found.value) for end in (found.low, found.high))
                covers = bool(low <= aim <= high)
                yield {"pair": i, "role": pair.case.role, "seeds": k, "readout": readout, "covers": covers}


def _coverage(blocks: pd.DataFrame, seed: int) -> Iterator[dict[str, Any]]:
    """Coverage per number of seeds, of all readouts, of density and of shares; the interval is over pairs."""
    from perturb.stats import clustered_ratio

    for k, some in blocks.groupby("seeds"):
        shares = some["readout"].str.startswith("fraction:")
        for what, part in (("all", some), ("density", some[~shares]), ("shares", some[shares])):
            if len(part):
                found = clustered_ratio(
                    part["covers"].to_numpy(float), np.ones(len(part)), part["pair"].to_numpy(), seed
                )
                yield (
                    {"seeds": int(k), "what": what, "n_pairs": int(part["pair"].nunique())}
                    | {key: _finite(getattr(found, key)) for key in ("value", "low", "high")}
                    | {"of": found.n}
                )


def smallest_effect(sd: float, n: int, power: float = POWER, alpha: float = ALPHA) -> float:
    r"""Effect that a two-sided paired t test on ``n`` seeds finds with this power, in the unit of ``sd``.

    ``sd``: of the paired difference over seeds. For normal differences the power at shift d (in standard errors) is the
    mean over :math:`U^2 \sim \chi^2_{n-1} / (n-1)` of the normal probability beyond :math:`\pm t U`, here over 2000
    quantiles of U. The app's sign-flip test has nearly the same power there.

    Examples
    --------
    >>> round(smallest_effect(1.0, 16), 2)
    0.75
    """
    from scipy.optimize import brentq
    from scipy.stats import chi2, norm
    from scipy.stats import t as student_t

    u = np.sqrt(chi2.ppf((np.arange(2000) + 0.5) / 2000, n - 1) / (n - 1))
    limit = student_t.ppf(1 - alpha / 2, n - 1) * u
    shift = brentq(lambda d: float((norm.sf(limit - d) + norm.cdf(-limit - d)).mean()) - power, 0.0, 1e3)
    return float(shift * sd / np.sqrt(n))


def _smallest(table: pd.DataFrame, n: int) -> Iterator[dict[str, Any]]:
    """Per readout: pooled standard deviation of a pair's difference over seeds, smallest effect found by power 0.8."""
    for readout, part in table.groupby("readout", sort=False):
        variance = part["variance"].dropna()
        if len(variance) and n > 1:
            sd = float(np.sqrt(variance.mean()))
            yield {"readout": str(readout), "n_pairs": len(variance), "sd": _finite(sd), "power": POWER} | {
                "effect": _finite(smallest_effect(sd, n))
            }


def _empty(cases: Sequence[Case], store: TissueStore, rows: np.ndarray) -> Effects:
    shape = (len(cases), len(READOUTS), len(rows))
    arms = (ARMS[0], ARMS[1], ARMS[4])
    donor = np.asarray(store.cells.donor)[rows]
    return Effects(list(cases), donor, np.zeros(shape), {arm: np.zeros(shape) for arm in arms})
