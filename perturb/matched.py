"""Matched-gene null: is this gene special, or would any gene like it have moved the niche as far?

The edit of a result is made again on random genes that look like the edited ones in cells of the same type: like mean
expression, like detection, and like count in the edited cells themselves (a knock-out of a gene that a cell does not
express changes nothing, and would make any effect look large). Kind and amount of the edit, cells and seeds stay the
same. ``p = (b + 1) / (n + 1)`` with ``b`` of ``n`` random edits that move a readout at least as far in either direction
(Phipson and Smyth 2010, doi:10.2202/1544-6115.1585); ``q`` is adjusted over the readouts (Benjamini and Hochberg).

Two ways: ``drawn`` runs the whole chain for each random edit; without it the model's niche network guesses
(:meth:`GE2Hist.expected_neighbours`), which costs milliseconds an edit and knows density and composition only.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ge2hist_core import rng
from ge2hist_core.types import BadInput, Cells
from perturb.edits import Edit, EditSet, Perturbation
from perturb.recipe import Recipe
from perturb.result import Result
from perturb.route import draw_states, readouts_of, values_of
from perturb.run import Progress, edited_cells
from perturb.stats import bh_fdr
from perturb.tables import LEVEL, UNITS

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist
    from perturb.cache import DiskCache
    from perturb.grn import Network

__all__ = ["DRAWN", "GUESSED", "MatchedNull", "matched_edits", "matched_null", "null_table"]

DRAWN = 19
"""Random edits that are drawn: the fewest with which p can reach 0.05."""
GUESSED = 200
POOL = 40
"""Genes most alike among which one is drawn at random, at least; twice the number of random edits if that is more."""


@dataclass(frozen=True, eq=False)
class MatchedNull:
    """How an effect stands among those of random genes.

    Parameters
    ----------
    table: one row per readout: ``readout, unit, effect, null_low, null_high`` (central 95 % of the random effects),
        ``p, q, n`` (random edits in which the readout is defined).
    effects: ``edit, readout, effect``, the random effects one by one.
    genes: ``gene, level, detection, count`` of the edited genes and of the random ones: mean count and share of cells
        with a count among cells of the type, mean count in the edited cells; ``targets`` in the network through which
        edits spread; ``random`` tells them apart.
    drawn: False where the niche network guessed.
    """

    table: pd.DataFrame
    effects: pd.DataFrame
    genes: pd.DataFrame
    drawn: bool


def matched_null(
    result: Result,
    model: GE2Hist,
    cells: Cells,
    *,
    n: int | None = None,
    drawn: bool = True,
    seeds: int | None = None,
    seed: int = 0,
    network: Network | None = None,
    cache: DiskCache | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> MatchedNull:
    """Effects of ``n`` random edits like the result's.

    Parameters
    ----------
    cells: as for :func:`perturb.run.run`: the result's cells and others of their types, which the genes are matched
        in.
    n: random edits, by default 19 drawn or 200 guessed; fewer where fewer genes are alike.
    seeds: use the first so many seeds of the result alone, for its own effect as for the random ones.
    seed: of the choice of genes.
    network: that of the recipe's propagation; random edits spread through it too.
    cache: finished edits are taken from it and kept in it, one by one.
    on_progress: called after each denoising step or guess. cancel: ends the run at the next one.

    Raises
    ------
    BadInput: nothing is edited; another model; no gene is like an edited one.
    ge2hist_core.sampler.Stopped: cancelled.
    """
    from ge2hist_core.sampler import Stopped

    recipe = result.recipe
    if model.sha256 != recipe.model_sha256:
        raise BadInput(
            f"The result was made with model {recipe.model_sha256[:12]}, but {model.sha256[:12]} is loaded: "
            "load that bundle."
        )
    if seeds is not None and not 1 <= seeds <= len(recipe.seeds):
        raise BadInput(f"seeds is {seeds}: choose 1 to {len(recipe.seeds)}, as many as the result has.")
    n = (DRAWN if drawn else GUESSED) if n is None else n
    chosen = cells.take([{name: i for i, name in enumerate(cells.cell_id)}[name] for name in recipe.cell_ids])
    perturbations, genes = matched_edits(recipe.perturbation, chosen, cells, n, model.scgpt.vocab, seed, network)
    n_seeds = len(recipe.seeds) if seeds is None else seeds
    short = replace(recipe, seeds=recipe.seeds[:n_seeds])
    reference = hashlib.sha256("\x1f".join([*cells.cell_id, *map(str, cells.genes)]).encode()).hexdigest()

    if drawn:
        shape = (len(recipe.cell_ids), len(recipe.seeds))
        whole = {arm: values_of(result.readouts, arm, shape) for arm in ("base", "edited")}
        base, edited = ({name: y[:, :n_seeds] for name, y in whole[arm].items()} for arm in ("base", "edited"))
    else:
        states = (chosen, edited_cells(recipe, chosen, cells, network)[0])
        base, edited = (
            model.expected_readouts(model.encode(model.embed(some, recipe.encoder_seed))) for some in states
        )
    observed = {name: _effect(base[name], edited[name]) for name in base}

    rows = []
    for i, perturbation in enumerate(perturbations):
        if cancel is not None and cancel.is_set():
            raise Stopped
        one = replace(short, perturbation=perturbation)
        key = hashlib.sha256(json.dumps(["matched", drawn, one.hash, reference]).encode()).hexdigest()
        found = None if cache is None else cache.load_json(key)
        if found is None:

            def report(progress: Progress, before: int = i, name: str = str(perturbation)) -> None:
                if on_progress is not None:
                    done = (before + progress.fraction) / len(perturbations)
                    on_progress(Progress(done, f"Drawing {name}"[:80]))

            embedding = model.embed(edited_cells(one, chosen, cells, network)[0], recipe.encoder_seed)
            if drawn:
                found = _drawn_effects(one, model, embedding, base, report, cancel)
            else:
                guessed = model.expected_readouts(model.encode(embedding))
                found = {name: _none_if_nan(_effect(base[name], guessed[name])) for name in base}
            if cache is not None:
                cache.store_json(key, found)
        if on_progress is not None:
            on_progress(Progress((i + 1) / len(perturbations), "Comparing with random genes"))
        rows += [(str(perturbation), name, np.nan if value is None else value) for name, value in found.items()]
    effects = pd.DataFrame(rows, columns=["edit", "readout", "effect"])
    return MatchedNull(null_table(observed, effects), effects, genes, drawn)


def _drawn_effects(
    recipe: Recipe,
    model: GE2Hist,
    embedding: np.ndarray,
    base: Mapping[str, np.ndarray],
    report: Callable[[Progress], None],
    cancel: threading.Event | None,
) -> dict[str, float | None]:
    latent = model.encode(embedding)
    images, nuclei = draw_states(recipe, model, latent, text="", on_progress=report, cancel=cancel)
    shape = (len(recipe.cell_ids), len(recipe.seeds))
    values = readouts_of(nuclei, shape, model.config.um_per_px, images)
    return {name: _none_if_nan(_effect(base[name], values[name])) for name in base}


def _effect(base: np.ndarray, edited: np.ndarray) -> float:
    """Mean paired difference over the pictures in which both are defined, NaN without one."""
    difference = (edited - base)[np.isfinite(edited - base)]
    return float(difference.mean()) if difference.size else float("nan")


def _none_if_nan(value: float) -> float | None:
    return None if np.isnan(value) else value


def null_table(observed: Mapping[str, float], effects: pd.DataFrame) -> pd.DataFrame:
    """:attr:`MatchedNull.table`. Readouts that neither the edit nor a random one moves are left out.

    Parameters
    ----------
    observed: readout -> effect. effects: ``edit, readout, effect`` of the random edits.
    """
    rows = []
    for name, effect in observed.items():
        null = effects.loc[effects["readout"] == name, "effect"].to_numpy(dtype=np.float64)
        null = null[np.isfinite(null)]
        if not np.isfinite(effect) or not (effect or null.any()):
            continue
        low, high = np.quantile(null, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(null) else (np.nan, np.nan)
        # Equal up to rounding counts as at least as far.
        b = int((np.abs(null) >= abs(effect) * (1 - 1e-9)).sum())
        p = (b + 1) / (len(null) + 1) if len(null) else np.nan
        rows.append((name, UNITS.get(name.partition(":")[0], ""), effect, float(low), float(high), p, len(null)))
    table = pd.DataFrame(rows, columns=["readout", "unit", "effect", "null_low", "null_high", "p", "n"])
    table.insert(6, "q", bh_fdr(table["p"].to_numpy()))
    return table


def matched_edits(
    perturbation: Perturbation,
    chosen: Cells,
    cells: Cells,
    n: int,
    vocabulary: Mapping[str, int],
    seed: int,
    network: Network | None = None,
) -> tuple[list[Perturbation], pd.DataFrame]:
    """At most ``n`` different copies of a perturbation with other genes in the place of the edited ones.

    A gene's stand-in is drawn from those nearest to it in three figures, each as its rank among all genes: mean count
    and detection among ``cells`` of the types of ``chosen``, and mean count in ``chosen``; where edits spread through a
    network, in a fourth, the number of genes that it regulates there. It is expressed in
    ``chosen`` if and only if the gene is, known to the encoder if and only if the gene is, and not edited itself.

    Returns
    -------
    The copies, and the table of :attr:`MatchedNull.genes`.

    Raises
    ------
    BadInput: nothing is edited, or no gene is like an edited one.
    """
    if not perturbation:
        raise BadInput("The result edits nothing: a matched-gene null needs an edit.")
    if n < 1:
        raise BadInput(f"n is {n}: compare with at least 1 random edit.")
    figures = _figures(chosen, cells)
    if network is not None:
        figures["targets"] = pd.Series(network.regulators).value_counts().reindex(figures.index, fill_value=0)
    ranks = figures.rank(pct=True)
    expressed = figures["count"].to_numpy() > 0
    known = np.array([gene in vocabulary for gene in figures.index])
    free = ~figures.index.isin(perturbation.genes)
    pools: dict[str, np.ndarray] = {}
    for gene in perturbation.genes:
        place = figures.index.get_loc(gene)
        alike = np.flatnonzero(free & (expressed == expressed[place]) & (known == known[place]))
        if not len(alike):
            raise BadInput(f"No other gene of these cells is like {gene}: give data with more genes.")
        distance = np.linalg.norm(ranks.to_numpy()[alike] - ranks.to_numpy()[place], axis=1)
        pools[gene] = figures.index.to_numpy()[alike[np.argsort(distance, kind="stable")[: max(POOL, 2 * n)]]]
    draws = rng.stream(seed, "matched genes", str(perturbation))
    found: dict[str, Perturbation] = {}
    # Small pools run out: a few more attempts than copies, then what there is.
    for _ in range(20 * n):
        stand_in: dict[str, str] = {}
        for gene, pool in pools.items():
            left = [name for name in draws.permutation(pool) if name not in stand_in.values()]
            if not left:
                break
            stand_in[gene] = str(left[0])
        if len(stand_in) < len(pools):
            raise BadInput(
                f"Fewer other genes than the {len(pools)} edited ones are like them: give data with more genes."
            )
        copy = Perturbation(tuple(_replaced(part, stand_in) for part in perturbation.parts))
        found.setdefault(str(copy), copy)
        if len(found) == n:
            break
    copies = list(found.values())
    used = list(dict.fromkeys(gene for copy in copies for gene in copy.genes))
    table = figures.loc[[*perturbation.genes, *used]].reset_index(names="gene")
    table["random"] = np.arange(len(table)) >= len(perturbation.genes)
    return copies, table


def _figures(chosen: Cells, cells: Cells) -> pd.DataFrame:
    """``level, detection, count`` of each gene name; columns that share a name are added."""
    peers = cells
    if cells.cell_type is not None and chosen.cell_type is not None:
        peers = cells.take(np.flatnonzero(np.isin(cells.cell_type, list(set(chosen.cell_type)))))
    table = pd.DataFrame(
        {
            "gene": cells.genes,
            "level": np.asarray(peers.counts.mean(axis=0)).ravel().astype(np.float64),
            "detection": np.asarray((peers.counts > 0).mean(axis=0)).ravel().astype(np.float64),
            "count": np.asarray(chosen.counts.mean(axis=0)).ravel().astype(np.float64),
        }
    )
    grouped = table.groupby("gene", sort=False).agg({"level": "sum", "detection": "max", "count": "sum"})
    return grouped


def _replaced(part: Edit | EditSet, stand_in: Mapping[str, str]) -> Edit | EditSet:
    if isinstance(part, EditSet):
        return replace(part, edits=tuple(replace(edit, gene=stand_in[edit.gene]) for edit in part.edits))
    return replace(part, gene=stand_in[part.gene])
