"""Arms -> tables: readouts per picture, statistics over seeds, states of the cells, what the encoder saw."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ge2hist_core.config import READER_CLASSES
from ge2hist_core.niche import niche_stats
from ge2hist_core.support import OUTSIDE
from ge2hist_core.types import Cells
from perturb.cache import engine_fingerprint, versions
from perturb.edits import MIN_REFERENCE, Perturbation
from perturb.grn import Network
from perturb.recipe import Recipe
from perturb.result import Arm, Result
from perturb.stats import Estimate, bh_fdr, crossed_effect, crossed_mean

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist

__all__ = [
    "LEVEL",
    "UNITS",
    "compare",
    "edit_table",
    "readout_table",
    "spread_effects",
    "spread_table",
    "state_table",
    "statistics",
    "steps",
    "technical_warnings",
]

LEVEL = 0.95
FEW = 4
"""Warnings of a kind that are given one by one, at most."""
CONTRASTS = ("direct - unedited", "network - direct", "control - direct", "network - control")
UNITS = {"density": "cells/mm²", "fraction": "fraction", "spacing": "µm", "spacing_var": "µm²"}
"""Unit of a readout by the part of its name before the colon."""


def compare(
    recipe: Recipe,
    model: GE2Hist,
    cells: Cells,
    expression: dict[str, Cells],
    arms: dict[str, Arm],
    network: Network | None = None,
) -> Result:
    """The tables of finished arms. Costs milliseconds, so that it is never read from the cache in a run.

    Parameters
    ----------
    expression: arm -> the recipe's cells as it shows them to the encoder.
    """
    um_per_px = model.config.um_per_px
    readouts = readout_table(recipe, arms, um_per_px)
    summary, comparison = statistics(recipe, readouts)
    states = state_table(recipe, model, arms["base"], arms["edited"])
    edits = edit_table(recipe.perturbation, expression["base"], model, recipe.encoder_seed, cells, expression["edited"])
    spread = spread_table(recipe, model, expression)
    return Result(
        recipe=recipe,
        **{f"{name}_arm": arm for name, arm in arms.items()},
        um_per_px=um_per_px,
        readouts=readouts,
        summary=summary,
        comparison=comparison,
        states=states,
        edits=edits,
        spread=spread,
        spread_effects=spread_effects(recipe, readouts),
        warnings=tuple(
            dict.fromkeys(technical_warnings(recipe, model, expression["base"], states, edits, spread, network))
        ),
        provenance={
            "source": cells.source,
            "scgpt_sha256": model.scgpt.sha256,
            "engine": engine_fingerprint(),
            "versions": versions(),
        }
        | ({} if network is None else {"network": {"source": network.source, "edges": len(network)}}),
        model_card=_model_card(model),
        network=network if recipe.propagation is not None else None,
    )


def _model_card(model: GE2Hist) -> str:
    path = None if model.folder is None else model.folder / "MODEL_CARD.md"
    return path.read_text(encoding="utf-8") if path is not None and path.exists() else ""


def edit_table(
    perturbation: Perturbation,
    chosen: Cells,
    model: GE2Hist,
    seed: int,
    reference: Cells | None = None,
    edited: Cells | None = None,
) -> pd.DataFrame:
    """What each edited gene looks like to the encoder, before and after; no picture is drawn.

    Parameters
    ----------
    chosen: the cells to edit.
    seed: the recipe's ``encoder_seed``.
    reference: cells whose types are compared with; percentiles are NaN where fewer than 20 share the cell's type.
    edited: the cells as they are drawn, where more than the perturbation acts on them; None: edited by it alone.

    Returns
    -------
    DataFrame with the columns of :attr:`Result.edits`; bins are 0 (not seen) to 50.
    """
    if edited is None:
        edited = perturbation.apply(chosen, reference)
    genes = perturbation.genes
    known = dict(zip(chosen.genes, np.asarray(model.scgpt.match(chosen.genes).ids) >= 0, strict=True))
    columns = [int(np.flatnonzero(chosen.genes == gene)[0]) for gene in genes]
    states = (chosen, edited)
    bins = [model.scgpt.bins(cells, seed)[:, columns].toarray() for cells in states] if genes else []
    counts = [cells.counts[:, columns].toarray() for cells in states]
    done = {gene: ",".join(str(edit) for edit in perturbation.edits if edit.gene == gene) for gene in genes}
    levels: dict[str, np.ndarray] = {}
    if reference is not None and reference.cell_type is not None and chosen.cell_type is not None:
        where = [int(np.flatnonzero(reference.genes == gene)[0]) for gene in genes]
        for name in dict.fromkeys(chosen.cell_type):
            peers = np.flatnonzero(reference.cell_type == name)
            if len(peers) >= MIN_REFERENCE:
                levels[name] = reference.counts[peers][:, where].toarray()
    rows = []
    for c, cell_id in enumerate(chosen.cell_id):
        among = None if chosen.cell_type is None else levels.get(chosen.cell_type[c])
        for g, gene in enumerate(genes):
            before, after = (float(count[c, g]) for count in counts)
            percentile = [_percentile(value, None if among is None else among[:, g]) for value in (before, after)]
            seen = [int(one[c, g]) for one in bins]
            rows.append((cell_id, gene, done[gene], before, after, *percentile, *seen, bool(known[gene])))
    names = ["cell_id", "gene", "edit", "count_before", "count_after", "percentile_before", "percentile_after"]
    return pd.DataFrame(rows, columns=[*names, "bin_before", "bin_after", "in_vocabulary"])


def readout_table(recipe: Recipe, arms: dict[str, Arm], um_per_px: float) -> pd.DataFrame:
    """``readouts`` of :class:`perturb.result.Result`; ``arms`` by name."""
    rows = []
    for name, arm in arms.items():
        height, width = (side * um_per_px for side in arm.images.shape[1:3])
        for i, nuclei in enumerate(arm.nuclei):
            cell, seed = divmod(i, len(recipe.seeds))
            stats = niche_stats(nuclei, (width, height), READER_CLASSES)
            size = stats.steps()
            for readout, value in stats.readouts().items():
                unit = UNITS[readout.partition(":")[0]]
                rows.append((name, recipe.cell_ids[cell], recipe.seeds[seed], readout, unit, value, size[readout]))
    return pd.DataFrame(rows, columns=["arm", "cell_id", "seed", "readout", "unit", "value", "step"])


def steps(readouts: pd.DataFrame, first: str = "base", second: str = "edited") -> dict[str, float]:
    """Readout -> what one nucleus more or less makes of it, mean over the pictures of :attr:`Result.readouts`.

    All 0 where no readout of any pair differs between the two arms: then nothing can differ in further pairs either.
    """
    one, other = (readouts.loc[readouts["arm"] == arm, "value"].to_numpy() for arm in (first, second))
    moves = not np.array_equal(one, other, equal_nan=True)
    size = readouts.groupby("readout", sort=False)["step"].mean()
    return {str(name): moves * float(step) for name, step in size.items()}


def statistics(recipe: Recipe, readouts: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """``summary`` and ``comparison`` of :class:`Result`.

    Intervals run over seeds and, where the recipe names several cells, over cells and seeds (see
    :func:`perturb.stats.crossed_mean`). In the comparison a picture pair counts where the readout is defined in both
    pictures, and ``effect = edited - base`` over the same pairs. A type that no picture of either arm shows is left
    out, it would only add tests. Where no readout of any pair differs, the edit does nothing and 0 is certain; else
    every interval allows for the next pairs to differ by a nucleus (:func:`perturb.stats.crossed_mean`).
    """
    size = steps(readouts)
    shape = (len(recipe.cell_ids), len(recipe.seeds))
    summary, comparison = [], []
    for readout, rows in readouts.groupby("readout", sort=False):
        values = {arm: part["value"].to_numpy().reshape(shape) for arm, part in rows.groupby("arm", sort=False)}
        if ":" in readout and not any(np.nan_to_num(value).any() for value in values.values()):
            continue
        unit = rows["unit"].iloc[0]
        for arm, value in values.items():
            found = crossed_mean(value, recipe.encoder_seed, LEVEL)
            # No readout is negative and no share above 1, which the interval of a few cells does not know.
            low, high = np.clip([found.low, found.high], 0.0, 1.0 if readout.startswith("fraction:") else None)
            summary.append((arm, readout, unit, found.value, float(low), float(high), found.n))
        base, edited, found = _paired(values["base"], values["edited"], recipe.encoder_seed, size[readout])
        means = (_mean(base), _mean(edited))
        comparison.append((readout, unit, *means, found.value, found.low, found.high, found.p, found.n))
    table = pd.DataFrame(comparison, columns=["readout", "unit", "base", "edited", "effect", "low", "high", "p", "n"])
    table.insert(8, "q", bh_fdr(table["p"].to_numpy()))
    return pd.DataFrame(summary, columns=["arm", "readout", "unit", "mean", "low", "high", "n"]), table


def spread_effects(recipe: Recipe, readouts: pd.DataFrame) -> pd.DataFrame:
    """``spread_effects`` of :class:`Result`: q is adjusted within each contrast."""
    names = {"network": "edited", "unedited": "base"}
    shape, tables = (len(recipe.cell_ids), len(recipe.seeds)), []
    columns = ["contrast", "readout", "unit", "effect", "low", "high", "p", "n"]
    for contrast in CONTRASTS if "direct" in recipe.arms else ():
        second, first = (names.get(name, name) for name in contrast.split(" - "))
        size = steps(readouts, first, second)
        rows = []
        for readout, part in readouts.groupby("readout", sort=False):
            values = {arm: some["value"].to_numpy().reshape(shape) for arm, some in part.groupby("arm", sort=False)}
            if ":" in readout and not any(np.nan_to_num(value).any() for value in values.values()):
                continue
            found = _paired(values[first], values[second], recipe.encoder_seed, size[readout])[2]
            unit = part["unit"].iloc[0]
            rows.append((contrast, readout, unit, found.value, found.low, found.high, found.p, found.n))
        table = pd.DataFrame(rows, columns=columns)
        table.insert(7, "q", bh_fdr(table["p"].to_numpy()))
        tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=[*columns[:7], "q", "n"])


def _paired(base: np.ndarray, edited: np.ndarray, seed: int, step: float) -> tuple[np.ndarray, np.ndarray, Estimate]:
    """Both arms ``[cell, seed]`` where both are defined, else NaN, and their paired difference."""
    defined = np.isfinite(base) & np.isfinite(edited)
    base, edited = (np.where(defined, arm, np.nan) for arm in (base, edited))
    return base, edited, crossed_effect(base, edited, seed, LEVEL, step)


def spread_table(recipe: Recipe, model: GE2Hist, expression: dict[str, Cells]) -> pd.DataFrame:
    """``spread`` of :class:`Result`: genes in which the edited arm differs from the direct edit."""
    columns = ["cell_id", "gene", "count_before", "count_after", "bin_before", "bin_after"]
    if "direct" not in expression:
        return pd.DataFrame(columns=columns)
    direct, edited = expression["direct"], expression["edited"]
    bins = [model.scgpt.bins(cells, recipe.encoder_seed).toarray() for cells in (direct, edited)]
    counts = [cells.counts.toarray() for cells in (direct, edited)]
    cell, gene = np.nonzero(counts[0] != counts[1])
    table = pd.DataFrame(
        {
            "cell_id": direct.cell_id[cell],
            "gene": direct.genes[gene],
            "count_before": counts[0][cell, gene].astype(np.float64),
            "count_after": counts[1][cell, gene].astype(np.float64),
            "bin_before": bins[0][cell, gene].astype(int),
            "bin_after": bins[1][cell, gene].astype(int),
        },
        columns=columns,
    )
    moved = (table["bin_after"] - table["bin_before"]).abs().to_numpy()
    return table.iloc[np.argsort(-moved, kind="stable")].reset_index(drop=True)


def _mean(values: np.ndarray) -> float:
    """Mean of the defined entries, NaN where there are none."""
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def _percentile(value: float, levels: np.ndarray | None) -> float:
    """Mid-rank percentile of ``value`` among ``levels``, NaN without levels."""
    if levels is None:
        return float("nan")
    return float(50.0 * ((levels < value).mean() + (levels <= value).mean()))


def state_table(recipe: Recipe, model: GE2Hist, base: Arm, edited: Arm) -> pd.DataFrame:
    """``states`` of :class:`perturb.result.Result`; shifts are Euclidean distances between the arms."""
    names = np.asarray(model.cell_types, dtype=object)
    columns: dict[str, Any] = {"cell_id": list(recipe.cell_ids)}
    for arm_name, arm in (("base", base), ("edited", edited)):
        columns[f"type_{arm_name}"] = names[arm.types.argmax(axis=1)]
        columns[f"probability_{arm_name}"] = arm.types.max(axis=1).astype(np.float64)
        columns[f"support_{arm_name}"] = arm.support.astype(np.float64)
    for name, a, b in (
        ("embedding", base.embedding, edited.embedding),
        ("z_c", base.latent.z_c, edited.latent.z_c),
        ("z_e", base.latent.z_e, edited.latent.z_e),
    ):
        columns[f"shift_{name}"] = np.linalg.norm(b.astype(np.float64) - a.astype(np.float64), axis=1)
    return pd.DataFrame(columns)


def technical_warnings(
    recipe: Recipe,
    model: GE2Hist,
    chosen: Cells,
    states: pd.DataFrame,
    edits: pd.DataFrame,
    spread: pd.DataFrame,
    network: Network | None,
) -> Iterator[str]:
    """What makes this run doubtful for reasons of technique, one sentence each."""
    match = model.scgpt.match(chosen.genes)
    if match.rate < 0.5:
        yield f"The model knows only {match.matched} of the {match.total} genes of these data."
    for row in states.itertuples():
        if row.support_base < OUTSIDE:
            yield (
                f"Cell {row.cell_id} lies outside of what this model has seen (p = {row.support_base:.3g}): "
                "its pictures are extrapolation."
            )
        elif row.support_edited < OUTSIDE:
            yield (
                f"The edit takes cell {row.cell_id} outside of what this model has seen "
                f"(p = {row.support_edited:.3g}): the edited pictures are extrapolation."
            )
    yield from _edit_warnings(edits)
    if recipe.propagation is not None and recipe.perturbation and network is not None:
        if not len(spread):
            yield (
                f"The network {network.name} moves no gene of these cells: it has no edge from the edited genes, "
                "or the range that the cells show is reached already."
            )
        elif (spread["bin_before"] == spread["bin_after"]).all():
            yield f"The network {network.name} moves {spread['gene'].nunique()} genes, but none into another bin."
    several = len(recipe.cell_ids) > 1
    n, unit = (len(recipe.cell_ids), "cell") if several else (len(recipe.seeds), "seed")
    if recipe.perturbation and n < 6:
        yield (
            f"With {n} {unit}{'s' * (n > 1)} no difference can reach p < 0.05: "
            f"this is a draft, choose at least 6 {unit}s."
        )


def _edit_warnings(edits: pd.DataFrame) -> Iterator[str]:
    """Edits that change nothing: one sentence each, or one for all of a kind where there are many."""
    unknown = edits[~edits["in_vocabulary"].astype(bool)]
    rest = edits[edits["in_vocabulary"].astype(bool)]
    silent = rest[(rest["count_before"] == 0) & (rest["count_after"] == 0)]
    moved = rest[rest["count_before"] != rest["count_after"]]
    plateau = moved[moved["bin_before"] == moved["bin_after"]]
    for gene in dict.fromkeys(unknown["gene"]) if unknown["gene"].nunique() <= FEW else ():
        yield f"The model does not know the gene {gene}: its edit changes nothing."
    if unknown["gene"].nunique() > FEW:
        yield f"The model does not know {unknown['gene'].nunique()} of the edited genes: their edits change nothing."
    if len(silent) > FEW:
        yield (
            f"{len(silent)} of {len(edits)} edits change nothing, because their cell has no counts of the gene; "
            "GENE:set=COUNT adds expression."
        )
    else:
        for row in silent.itertuples():
            yield (
                f"{row.gene} in cell {row.cell_id} has no counts: {row.edit} changes nothing; "
                "GENE:set=COUNT adds expression."
            )
    if len(plateau) > FEW:
        yield f"{len(plateau)} of {len(edits)} edits stay in the encoder's bin: they are on a plateau."
    else:
        for row in plateau.itertuples():
            yield (
                f"{row.gene} in cell {row.cell_id} goes from {row.count_before:g} to {row.count_after:g} counts but "
                f"stays in the encoder's bin {row.bin_before} of 50: the edit is on a plateau."
            )
