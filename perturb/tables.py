"""Two arms -> tables: readouts per picture, statistics over seeds, states of the cells, what the encoder saw."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ge2hist_core.config import READER_CLASSES
from ge2hist_core.niche import niche_stats
from ge2hist_core.support import OUTSIDE
from ge2hist_core.types import Cells
from perturb.cache import engine_fingerprint
from perturb.edits import MIN_REFERENCE, Perturbation
from perturb.recipe import Recipe
from perturb.result import Arm, Result
from perturb.stats import bh_fdr, crossed_effect, crossed_mean

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist

__all__ = [
    "LEVEL",
    "UNITS",
    "compare",
    "edit_table",
    "readout_table",
    "state_table",
    "statistics",
    "technical_warnings",
]

LEVEL = 0.95
UNITS = {"density": "cells/mm²", "fraction": "fraction", "spacing": "µm", "spacing_var": "µm²"}
"""Unit of a readout by the part of its name before the colon."""


def compare(
    recipe: Recipe, model: GE2Hist, cells: Cells, chosen: Cells, edited_cells: Cells, base: Arm, edited: Arm
) -> Result:
    """The tables of two finished arms. Costs milliseconds, so that it is never read from the cache in a run."""
    um_per_px = model.config.um_per_px
    readouts = readout_table(recipe, {"base": base, "edited": edited}, um_per_px)
    summary, comparison = statistics(recipe, readouts)
    states = state_table(recipe, model, base, edited)
    edits = edit_table(recipe.perturbation, chosen, model, recipe.encoder_seed, cells)
    return Result(
        recipe=recipe,
        base_arm=base,
        edited_arm=edited,
        um_per_px=um_per_px,
        readouts=readouts,
        summary=summary,
        comparison=comparison,
        states=states,
        edits=edits,
        warnings=tuple(dict.fromkeys(technical_warnings(recipe, model, chosen, states, edits))),
        provenance={
            "source": cells.source,
            "scgpt_sha256": model.scgpt.sha256,
            "engine": engine_fingerprint(),
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "numpy", "scipy", "pandas")},
        },
        model_card=_model_card(model),
    )


def _model_card(model: GE2Hist) -> str:
    path = None if model.folder is None else model.folder / "MODEL_CARD.md"
    return path.read_text(encoding="utf-8") if path is not None and path.exists() else ""


def edit_table(
    perturbation: Perturbation, chosen: Cells, model: GE2Hist, seed: int, reference: Cells | None = None
) -> pd.DataFrame:
    """What each edited gene looks like to the encoder, before and after; no picture is drawn.

    Parameters
    ----------
    chosen: the cells to edit.
    seed: the recipe's ``encoder_seed``.
    reference: cells whose types are compared with; percentiles are NaN where fewer than 20 share the cell's type.

    Returns
    -------
    DataFrame with the columns of :attr:`Result.edits`; bins are 0 (not seen) to 50.
    """
    edited = perturbation.apply(chosen, reference)
    known = dict(zip(chosen.genes, np.asarray(model.scgpt.match(chosen.genes).ids) >= 0, strict=True))
    bins = [model.scgpt.bins(cells, seed) for cells in (chosen, edited)] if perturbation else []
    rows = []
    for c, cell_id in enumerate(chosen.cell_id):
        peers = None
        if reference is not None and reference.cell_type is not None and chosen.cell_type is not None:
            peers = np.flatnonzero(reference.cell_type == chosen.cell_type[c])
        for gene in perturbation.genes:
            column = np.flatnonzero(chosen.genes == gene)[0]
            before, after = float(chosen.counts[c, column]), float(edited.counts[c, column])
            levels = None
            if reference is not None and peers is not None and len(peers) >= MIN_REFERENCE:
                levels = reference.counts[peers][:, np.flatnonzero(reference.genes == gene)[0]].toarray()
            rows.append(
                {
                    "cell_id": cell_id,
                    "gene": gene,
                    "edit": ",".join(str(edit) for edit in perturbation.edits if edit.gene == gene),
                    "count_before": before,
                    "count_after": after,
                    "percentile_before": _percentile(before, levels),
                    "percentile_after": _percentile(after, levels),
                    "bin_before": int(bins[0][c, column]),
                    "bin_after": int(bins[1][c, column]),
                    "in_vocabulary": bool(known[gene]),
                }
            )
    columns = ["cell_id", "gene", "edit", "count_before", "count_after", "percentile_before", "percentile_after"]
    return pd.DataFrame(rows, columns=[*columns, "bin_before", "bin_after", "in_vocabulary"])


def readout_table(recipe: Recipe, arms: dict[str, Arm], um_per_px: float) -> pd.DataFrame:
    """``readouts`` of :class:`perturb.result.Result`; ``arms`` by name, ``base`` and ``edited``."""
    rows = []
    for name, arm in arms.items():
        height, width = (side * um_per_px for side in arm.images.shape[1:3])
        for i, nuclei in enumerate(arm.nuclei):
            cell, seed = divmod(i, len(recipe.seeds))
            stats = niche_stats(nuclei, (width, height), READER_CLASSES)
            for readout, value in stats.readouts().items():
                unit = UNITS[readout.partition(":")[0]]
                rows.append((name, recipe.cell_ids[cell], recipe.seeds[seed], readout, unit, value))
    return pd.DataFrame(rows, columns=["arm", "cell_id", "seed", "readout", "unit", "value"])


def statistics(recipe: Recipe, readouts: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """``summary`` and ``comparison`` of :class:`Result`.

    Intervals run over seeds and, where the recipe names several cells, over cells and seeds (see
    :func:`perturb.stats.crossed_mean`). In the comparison a picture pair counts where the readout is defined in both
    pictures, and ``effect = edited - base`` over the same pairs. A type that no picture of either arm shows is left
    out, it would only add tests.
    """
    shape = (len(recipe.cell_ids), len(recipe.seeds))
    summary, comparison = [], []
    for readout, rows in readouts.groupby("readout", sort=False):
        values = {arm: part["value"].to_numpy().reshape(shape) for arm, part in rows.groupby("arm", sort=False)}
        if ":" in readout and not any(np.nan_to_num(value).any() for value in values.values()):
            continue
        unit = rows["unit"].iloc[0]
        for arm, value in values.items():
            found = crossed_mean(value, recipe.encoder_seed, LEVEL)
            summary.append((arm, readout, unit, found.value, found.low, found.high, found.n))
        defined = np.isfinite(values["base"]) & np.isfinite(values["edited"])
        base, edited = (np.where(defined, values[arm], np.nan) for arm in ("base", "edited"))
        found = crossed_effect(base, edited, recipe.encoder_seed, LEVEL)
        means = (_mean(base), _mean(edited))
        comparison.append((readout, unit, *means, found.value, found.low, found.high, found.p, found.n))
    table = pd.DataFrame(comparison, columns=["readout", "unit", "base", "edited", "effect", "low", "high", "p", "n"])
    table.insert(8, "q", bh_fdr(table["p"].to_numpy()))
    return pd.DataFrame(summary, columns=["arm", "readout", "unit", "mean", "low", "high", "n"]), table


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
    recipe: Recipe, model: GE2Hist, chosen: Cells, states: pd.DataFrame, edits: pd.DataFrame
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
    for row in edits.itertuples():
        where = f"{row.gene} in cell {row.cell_id}"
        if not row.in_vocabulary:
            yield f"The model does not know the gene {row.gene}: its edit changes nothing."
        elif row.count_before == row.count_after == 0:
            yield f"{where} has no counts: {row.edit} changes nothing; GENE:set=COUNT adds expression."
        elif row.count_before != row.count_after and row.bin_before == row.bin_after:
            yield (
                f"{where} goes from {row.count_before:g} to {row.count_after:g} counts but stays in the encoder's bin "
                f"{row.bin_before} of 50: the edit is on a plateau."
            )
    several = len(recipe.cell_ids) > 1
    n, unit = (len(recipe.cell_ids), "cell") if several else (len(recipe.seeds), "seed")
    if recipe.perturbation and n < 6:
        yield (
            f"With {n} {unit}{'s' * (n > 1)} no difference can reach p < 0.05: "
            f"this is a draft, choose at least 6 {unit}s."
        )
