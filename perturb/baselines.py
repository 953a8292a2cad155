"""Baselines: what is known of a niche, and of an edit, without any diffusion; and one skill number against the best.

Four predictors, fitted on real tiles of training donors as the bundle's own reader sees them:

- ``no change``: for an edit no effect at all; for a tile the mean of all training cells;
- ``class mean``: the mean of the cell's type; an edit has an effect only where the model reads another type after it;
- ``nearest cells``: mean over the 20 training cells of nearest embedding (one cell's tile varies as much again as the
  tile that it stands for); an edit's effect is the difference between the neighbours after and before it;
- ``ridge``: linear regression from log expression to the readout, its penalty chosen by cross-validation over donors;
  an edit's effect is the difference of its two answers.

Skill is ``1 - MSE(model) / MSE(best baseline)`` on real tiles of validation donors: 1 is perfect, 0 is no better than
the best baseline, below 0 is worse. The model's answer is the mean over endless pictures of a cell; from the few that
are drawn its mean squared error is estimated as that of their mean less ``variance / pictures``. The best baseline is
chosen on the same tiles, which favours the baselines.

Everything is kept in ``BUNDLE/baselines/``, apart from the files that the bundle's hash covers: it changes no picture.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ge2hist_core import rng
from ge2hist_core.config import READER_CLASSES, SampleConfig
from ge2hist_core.files import atomic_path, write_json
from ge2hist_core.niche import niche_stats
from ge2hist_core.types import BadInput, Cells
from perturb.stats import clustered_ratio
from perturb.tables import LEVEL, UNITS

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.store import TissueStore
    from perturb.result import Result

__all__ = [
    "BASELINES",
    "Baselines",
    "Ridge",
    "fit_baselines",
    "fit_ridge",
    "load_baselines",
    "measure_skill",
    "real_readouts",
    "skill_table",
]

FORMAT = 1
FOLDER = "baselines"
BASELINES = ("no change", "class mean", "nearest cells", "ridge")
NEIGHBOURS = 20
COMPONENTS = 48
"""Principal components of the embedding that neighbours are sought in."""
FOLDS = 5
PENALTIES = tuple(float(p) for p in 10.0 ** np.arange(0.0, 7.1, 0.5))
"""Ridge penalties tried, in squared log counts: from almost none to almost nothing left."""
SCALE = 1000.0
"""Counts that a cell is brought to before the logarithm."""


@dataclass(frozen=True, eq=False)
class Ridge:
    """``y = intercept + (x - mean) @ coefficients``.

    Parameters
    ----------
    mean: ``[feature]``. coefficients: ``[feature, target]``. intercept, penalty: ``[target]``.
    """

    mean: np.ndarray
    coefficients: np.ndarray
    intercept: np.ndarray
    penalty: np.ndarray

    def predict(self, x: np.ndarray) -> np.ndarray:
        """``[cell, feature]`` -> ``[cell, target]`` float64."""
        return self.intercept + (np.asarray(x, dtype=np.float64) - self.mean) @ self.coefficients


def fit_ridge(
    x: np.ndarray, y: np.ndarray, donor: np.ndarray, penalties: Sequence[float] = PENALTIES, seed: int = 0
) -> Ridge:
    """Ridge regression, for each target with the penalty of least error on donors left out.

    Minimises ``|y - a - (x - mean) b|^2 + penalty |b|^2``. Donors are dealt to at most five folds; with a single donor
    the cells are.

    Parameters
    ----------
    x: ``[cell, feature]``. y: ``[cell, target]``; NaN (undefined readout) is left out, target by target.
    donor: ``[cell]``. seed: of the folds.

    Raises
    ------
    BadInput: a target with fewer than two defined values.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    fold = _folds(donor, seed)
    mean = x.mean(axis=0)
    out = Ridge(mean, np.zeros((x.shape[1], y.shape[1])), np.zeros(y.shape[1]), np.zeros(y.shape[1]))
    # Readouts that are defined in the same cells share their decompositions.
    defined = np.isfinite(y)
    patterns, which = np.unique(defined.T, axis=0, return_inverse=True)
    for number, rows in enumerate(patterns):
        targets = np.flatnonzero(which.ravel() == number)
        if rows.sum() < 2:
            raise BadInput(f"A readout is defined in {rows.sum()} training tiles: fit the baselines on more cells.")
        a, b, f = x[rows] - mean, y[rows][:, targets], fold[rows]
        error = np.zeros((len(penalties), len(targets)))
        for k in np.unique(f):
            out_of = f == k
            if out_of.all():
                continue
            for i, (slope, start) in enumerate(_paths(a[~out_of], b[~out_of], penalties)):
                error[i] += ((b[out_of] - start - a[out_of] @ slope) ** 2).sum(axis=0)
        best = error.argmin(axis=0)
        for i, (slope, start) in enumerate(_paths(a, b, penalties)):
            mine = best == i
            out.coefficients[:, targets[mine]] = slope[:, mine]
            out.intercept[targets[mine]] = start[mine]
            out.penalty[targets[mine]] = penalties[i]
    return out


def _paths(x: np.ndarray, y: np.ndarray, penalties: Sequence[float]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Coefficients ``[feature, target]`` and intercept ``[target]`` at every penalty, from one decomposition."""
    centre, level = x.mean(axis=0), y.mean(axis=0)
    u, s, vt = np.linalg.svd(x - centre, full_matrices=False)
    projected = u.T @ (y - level)
    found = []
    for penalty in penalties:
        slope = vt.T @ (projected * (s / (s**2 + penalty))[:, None])
        found.append((slope, level - centre @ slope))
    return found


def _folds(donor: np.ndarray, seed: int) -> np.ndarray:
    """Fold of each cell, int ``[cell]``; all cells of a donor share it."""
    names = np.unique(np.asarray(donor).astype(str))
    if len(names) < 2:
        return rng.stream(seed, "ridge folds").permutation(np.arange(len(donor)) % FOLDS)
    order = rng.stream(seed, "ridge folds").permutation(len(names))
    of_name = dict(zip(names[order], np.arange(len(names)) % FOLDS, strict=True))
    return np.array([of_name[str(name)] for name in donor])


@dataclass(frozen=True, eq=False)
class Baselines:
    """Fitted baselines of one bundle.

    Parameters
    ----------
    readouts: names of the targets.
    genes: ``[gene]`` of the regression. share: ``[gene]`` mean share of a training cell's counts.
    embedding_mean, components: ``[dim]`` and ``[component, dim]`` of the embedding's principal components.
    reference: ``[cell, component]`` float16, training cells. reference_readouts: ``[cell, readout]``, their tiles.
    types: of the bundle, in its order. type_means: ``[type, readout]``, the mean of all cells for one without any.
    overall: ``[readout]`` mean of all training cells.
    ridge: from log expression to the readouts.
    skill: table of :func:`skill_table`, empty until :func:`measure_skill`.
    provenance: bundle, store, donors, numbers of cells.
    """

    readouts: tuple[str, ...]
    genes: np.ndarray
    share: np.ndarray
    embedding_mean: np.ndarray
    components: np.ndarray
    reference: np.ndarray
    reference_readouts: np.ndarray
    types: tuple[str, ...]
    type_means: np.ndarray
    overall: np.ndarray
    ridge: Ridge
    skill: pd.DataFrame
    provenance: dict[str, Any] = field(default_factory=dict)

    def predict(self, embedding: np.ndarray, cells: Cells, types: np.ndarray) -> dict[str, np.ndarray]:
        """Each baseline's readouts of the niches of cells, ``[cell, readout]`` float64.

        Parameters
        ----------
        embedding: ``[cell, dim]`` of the bundle's encoder. types: ``[cell]`` names; the mean of all cells stands in for
            a type that the baselines do not know.
        """
        place = {name: i for i, name in enumerate(self.types)}
        known = np.array([place.get(str(name), -1) for name in types])
        by_type = np.where(known[:, None] >= 0, self.type_means[known], self.overall)
        return {
            "no change": np.tile(self.overall, (len(cells), 1)),
            "class mean": by_type,
            "nearest cells": self._nearest(embedding),
            "ridge": self.ridge.predict(_log_expression(cells, self.genes, self.share, self.ridge.mean)),
        }

    def _nearest(self, embedding: np.ndarray) -> np.ndarray:
        query = (np.asarray(embedding, dtype=np.float64) - self.embedding_mean) @ self.components.T.astype(np.float64)
        reference = self.reference.astype(np.float64)
        squared = (query**2).sum(1)[:, None] - 2 * query @ reference.T + (reference**2).sum(1)
        near = np.argsort(squared, axis=1, kind="stable")[:, : min(NEIGHBOURS, len(reference))]
        values = self.reference_readouts[near].astype(np.float64)  # [cell, neighbour, readout]
        defined = np.isfinite(values)
        n = defined.sum(axis=1)
        mean = np.where(defined, values, 0.0).sum(axis=1) / np.maximum(n, 1)
        return np.where(n > 0, mean, self.overall)

    def effects(self, result: Result, chosen: Cells, edited: Cells) -> pd.DataFrame:
        """What each baseline says of the result's edit, beside the model's effect.

        Parameters
        ----------
        chosen, edited: the result's cells before and after the edit. Their types are those that the model reads.

        Returns
        -------
        DataFrame, one row per readout: ``readout, unit, model, low, high`` (the model's effect and interval) and one
        column per baseline, means over the cells.
        """
        names = np.asarray(self.types, dtype=object)
        arms = ((result.base_arm, chosen), (result.edited_arm, edited))
        before, after = (self.predict(arm.embedding, cells, names[arm.types.argmax(axis=1)]) for arm, cells in arms)
        change = {name: (after[name] - before[name]).mean(axis=0) for name in BASELINES}
        rows = []
        for row in result.comparison.itertuples():
            if row.readout in self.readouts:
                place = self.readouts.index(row.readout)
                own = [float(change[name][place]) for name in BASELINES]
                rows.append((row.readout, row.unit, row.effect, row.low, row.high, *own))
        return pd.DataFrame(rows, columns=["readout", "unit", "model", "low", "high", *BASELINES])

    def doubts(self, readouts: Sequence[str] | None = None) -> tuple[str, ...]:
        """One sentence for each readout on which the model does not beat the best baseline.

        Parameters
        ----------
        readouts: of these alone; by default of all.
        """
        said = []
        for row in self.skill.itertuples():
            if (readouts is None or row.readout in readouts) and not row.beats:
                name = row.readout.replace(":", " of ").replace("_", " ")
                said.append(
                    f'For {name} the pictures are not shown to tell more than the baseline "{row.best}": skill '
                    f"{row.skill:.2f} (95 % interval {row.low:.2f} to {row.high:.2f}, {row.n} tiles of {row.donors} "
                    "donors)."
                )
        return tuple(said)

    def save(self, folder: str | Path) -> None:
        """Write ``baselines/`` into a bundle folder, each file atomically, the JSON last."""
        from safetensors.numpy import save_file

        folder = Path(folder) / FOLDER
        arrays = {
            "share": self.share.astype(np.float32),
            "embedding_mean": self.embedding_mean.astype(np.float32),
            "components": self.components.astype(np.float32),
            "reference": self.reference.astype(np.float16),
            "reference_readouts": self.reference_readouts.astype(np.float32),
            "type_means": self.type_means,
            "overall": self.overall,
            "ridge_mean": self.ridge.mean.astype(np.float32),
            "ridge_coefficients": self.ridge.coefficients.astype(np.float32),
            "ridge_intercept": self.ridge.intercept,
            "ridge_penalty": self.ridge.penalty,
        }
        with atomic_path(folder / "baselines.safetensors") as temporary:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)
        header = {
            "format": FORMAT,
            "readouts": list(self.readouts),
            "genes": [str(gene) for gene in self.genes],
            "types": list(self.types),
            "skill": json.loads(self.skill.to_json(orient="records")),
            "provenance": self.provenance,
        }
        write_json(folder / "baselines.json", header)


def _log_expression(cells: Cells, genes: np.ndarray, share: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """``log(1 + counts per 1000)`` of the regression's genes, ``[cell, gene]`` float64.

    Cells that were measured on part of the genes are brought to that part's usual share of the 1000, and the missing
    genes get the training mean.
    """
    column = {str(gene): i for i, gene in enumerate(cells.genes)}
    place = np.array([column.get(str(gene), -1) for gene in genes])
    there = place >= 0
    if not there.any():
        raise BadInput(
            "The cells have none of the genes that the baselines were fitted on: give the same kind of panel."
        )
    counts = cells.counts[:, place[there]].toarray().astype(np.float64)
    total = counts.sum(axis=1, keepdims=True)
    out = np.tile(np.asarray(mean, dtype=np.float64), (len(cells), 1))
    out[:, there] = np.log1p(counts / np.maximum(total, 1e-9) * SCALE * float(share[there].sum()))
    return out


def real_readouts(model: GE2Hist, store: TissueStore, rows: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and values ``[cell, readout]`` that the bundle's reader finds in the real tiles of cells."""
    size = model.config.tile_px * store.um_per_px
    found: list[dict[str, float]] = []
    for start in range(0, len(rows), 256):
        for nuclei in model.read_nuclei(store.tiles(rows[start : start + 256])):
            found.append(niche_stats(nuclei, (size, size), READER_CLASSES).readouts())
    names = tuple(found[0])
    return names, np.array([[one[name] for name in names] for one in found])


def fit_baselines(
    model: GE2Hist,
    store: TissueStore,
    cells: int = 2000,
    seed: int = 0,
    on_progress: Callable[[str], None] | None = None,
) -> Baselines:
    """Fit all baselines on real tiles of training donors.

    Parameters
    ----------
    store: the bundle's training store, or one whose training donors it may be compared with.
    cells: training cells, drawn at random over all donors. seed: of the draw, the encoder and the folds.
    on_progress: called with a sentence as work goes on.

    Raises
    ------
    BadInput: too few cells, no reader, tiles at another scale than the model's.
    """
    if cells < 100:
        raise BadInput(f"cells is {cells}: fit the baselines on at least 100.")
    if abs(store.um_per_px - model.config.um_per_px) > 1e-6:
        raise BadInput(
            f"The store has {store.um_per_px:g} um per pixel, the bundle {model.config.um_per_px:g}: give a store at "
            "the bundle's scale."
        )
    say = on_progress or (lambda text: None)
    pool = store.rows(store.split()["train"])
    rows = np.sort(rng.stream(seed, "baselines").choice(pool, min(cells, len(pool)), replace=False))
    some = store.cells.take(rows)
    assert some.donor is not None and some.cell_type is not None
    say(f"Reading the tiles of {len(rows)} cells")
    names, values = real_readouts(model, store, rows)
    say(f"Embedding {len(rows)} cells")
    embedding = model.embed(some, seed).astype(np.float64)
    mean = embedding.mean(axis=0)
    _, _, axes = np.linalg.svd(embedding - mean, full_matrices=False)
    components = axes[: min(COMPONENTS, len(axes))].astype(np.float32)
    say("Fitting the regression")
    counts = some.counts.toarray().astype(np.float64)
    share = (counts / np.maximum(counts.sum(axis=1, keepdims=True), 1e-9)).mean(axis=0)
    x = _log_expression(some, some.genes, share, np.zeros(len(some.genes)))
    overall = np.nanmean(values, axis=0)
    types = model.cell_types
    type_means = np.stack([_mean_where(values[some.cell_type == name], overall) for name in types])
    return Baselines(
        readouts=names,
        genes=some.genes,
        share=share,
        embedding_mean=mean,
        components=components,
        reference=((embedding - mean) @ components.T.astype(np.float64)).astype(np.float16),
        reference_readouts=values.astype(np.float32),
        types=types,
        type_means=type_means,
        overall=overall,
        ridge=fit_ridge(x, values, some.donor, seed=seed),
        skill=pd.DataFrame(columns=_SKILL_COLUMNS),
        provenance={
            "model_sha256": model.sha256,
            "store": store.identity,
            "data": store.path.name,
            "simulation": store.simulation,
            "seed": seed,
            "train": {"cells": len(rows), "donors": sorted(set(some.donor.tolist()))},
        },
    )


def _mean_where(values: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """Column means of the defined values ``[cell, readout]``, ``otherwise [readout]`` where there is none."""
    defined = np.isfinite(values)
    n = defined.sum(axis=0)
    return np.where(n > 0, np.where(defined, values, 0.0).sum(axis=0) / np.maximum(n, 1), otherwise)


_SKILL_COLUMNS = ["readout", "unit", "skill", "low", "high", "best", "beats", "n", "donors",
                  "rmse model", *(f"rmse {name}" for name in BASELINES)]  # fmt: skip


def skill_table(
    readouts: Sequence[str],
    truth: np.ndarray,
    model: np.ndarray,
    variance: np.ndarray,
    baselines: dict[str, np.ndarray],
    donor: np.ndarray,
    seed: int,
) -> pd.DataFrame:
    """Skill of the model against the best baseline, readout by readout.

    Parameters
    ----------
    truth: ``[cell, readout]`` of the real tiles. model: ``[cell, readout]`` mean over the pictures of a cell.
    variance: ``[cell, readout]`` of that mean, its pictures' variance divided by their number; NaN counts as undefined.
    baselines: name -> ``[cell, readout]``. donor: ``[cell]``. seed: of the resampling of donors.

    Returns
    -------
    DataFrame, one row per readout: ``readout, unit, skill, low, high`` (95 % interval over donors), ``best`` baseline,
    ``beats`` (the interval lies above 0), ``n`` tiles in which all are defined, ``donors``, and the root mean squared
    errors in the readout's unit. A readout that is constant over the real tiles is left out.
    """
    rows = []
    for j, name in enumerate(readouts):
        own = (model[:, j] - truth[:, j]) ** 2 - variance[:, j]
        others = {key: (value[:, j] - truth[:, j]) ** 2 for key, value in baselines.items()}
        defined = np.isfinite(own) & np.isfinite(list(others.values())).all(axis=0)
        if defined.sum() < 2 or np.ptp(truth[defined, j]) == 0:
            continue
        mse = {key: float(value[defined].mean()) for key, value in others.items()}
        best = min(mse, key=lambda key: mse[key])
        found = clustered_ratio(own[defined], others[best][defined], donor[defined], seed, LEVEL)
        root = [float(np.sqrt(max(value, 0.0))) for value in (float(own[defined].mean()), *mse.values())]
        skill, low, high = 1 - found.value, 1 - found.high, 1 - found.low
        unit = UNITS.get(name.partition(":")[0], "")
        n_donors = len(set(donor[defined].tolist()))
        rows.append((name, unit, skill, low, high, best, bool(low > 0), int(defined.sum()), n_donors, *root))
    columns = [*_SKILL_COLUMNS[:10], *(f"rmse {name}" for name in baselines)]
    return pd.DataFrame(rows, columns=columns)


def measure_skill(
    baselines: Baselines,
    model: GE2Hist,
    store: TissueStore,
    cells: int = 200,
    pictures: int = 4,
    sample: SampleConfig = SampleConfig(),  # noqa: B008 - frozen
    seed: int = 0,
    on_progress: Callable[[str], None] | None = None,
) -> Baselines:
    """The same baselines with the model's skill on real tiles of validation donors.

    The class mean is that of the type which the store gives, the best that a table of types can do.

    Parameters
    ----------
    cells: validation cells, drawn at random over all donors. pictures: drawn per cell, at least 2.

    Raises
    ------
    BadInput: fewer than 2 cells or pictures, a bundle other than the baselines'.
    """
    if cells < 2 or pictures < 2:
        raise BadInput(f"Skill was asked for {cells} cells with {pictures} pictures each: give at least 2 of both.")
    if baselines.provenance.get("model_sha256") != model.sha256:
        raise BadInput("These baselines belong to another bundle: fit them again with `python -m perturb baselines`.")
    say = on_progress or (lambda text: None)
    pool = store.rows(store.split()["validation"])
    rows = np.sort(rng.stream(seed, "skill").choice(pool, min(cells, len(pool)), replace=False))
    some = store.cells.take(rows)
    assert some.donor is not None and some.cell_type is not None
    names, truth = real_readouts(model, store, rows)
    embedding = model.embed(some, seed)
    latent = model.encode(embedding)
    n = len(rows)
    # Every cell has seeds of its own: shared noise would tie the errors of all cells together.
    seeds = rng.stream(seed, "skill seeds").integers(2**62, size=n * pictures).tolist()
    images = model.generate(
        latent.take(np.repeat(np.arange(n), pictures)),
        seeds,
        sample,
        lambda i, total, _: say(f"Drawing: {i} of {total} steps") if i % 160 == 0 else None,
    )
    size = model.config.tile_px * model.config.um_per_px
    drawn = np.array(
        [
            [niche_stats(nuclei, (size, size), READER_CLASSES).readouts()[name] for name in names]
            for nuclei in model.read_nuclei(images)
        ]
    ).reshape(n, pictures, len(names))
    own, variance = _mean_and_variance(drawn)
    others = baselines.predict(embedding, some, some.cell_type)
    skill = skill_table(names, truth, own, variance, others, some.donor, seed)
    provenance = baselines.provenance | {
        "skill": {
            "cells": n, "pictures": pictures, "donors": sorted(set(some.donor.tolist())),
            "sample": {"solver": sample.solver, "steps": sample.steps, "guidance": sample.guidance},
        }
    }  # fmt: skip
    return replace(baselines, skill=skill, provenance=provenance)


def _mean_and_variance(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over pictures ``[cell, picture, readout]`` and the variance of that mean; NaN below two defined pictures."""
    defined = np.isfinite(drawn)
    n = defined.sum(axis=1)
    mean = np.where(defined, drawn, 0.0).sum(axis=1) / np.maximum(n, 1)
    squares = np.where(defined, (drawn - mean[:, None]) ** 2, 0.0).sum(axis=1)
    variance = np.where(n > 1, squares / np.maximum(n - 1, 1) / np.maximum(n, 1), np.nan)
    return np.where(n > 0, mean, np.nan), variance


def load_baselines(model: GE2Hist) -> Baselines | None:
    """The baselines in a bundle's folder, read once; None where there are none.

    Raises
    ------
    BadInput: a damaged file, another format, or baselines that were fitted for another bundle.
    """
    if model.folder is None or not (model.folder / FOLDER / "baselines.json").is_file():
        return None
    path = model.folder / FOLDER / "baselines.json"
    found = _read(path, path.stat().st_mtime_ns)
    if found.provenance.get("model_sha256") != model.sha256:
        raise BadInput(f"{path} belongs to another bundle: fit them again with `python -m perturb baselines`.")
    return found


@lru_cache(maxsize=2)
def _read(path: Path, changed: int) -> Baselines:
    """``changed``: time of the last change, so that a new file is read anew."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        if header["format"] != FORMAT:
            raise BadInput(
                f"{path} has format {header['format']!r}, this version reads {FORMAT}: fit the baselines again."
            )
        arrays = load_file(path.with_suffix(".safetensors"))
        names = ("mean", "coefficients", "intercept", "penalty")
        ridge = Ridge(**{name: arrays.pop(f"ridge_{name}") for name in names})
        columns = None if header["skill"] else _SKILL_COLUMNS
        return Baselines(
            readouts=tuple(header["readouts"]),
            genes=np.array(header["genes"], dtype=object),
            types=tuple(header["types"]),
            ridge=ridge,
            skill=_numbers(pd.DataFrame(header["skill"], columns=columns)),
            provenance=header["provenance"],
            **arrays,
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path} is damaged ({error}): fit the baselines again.") from None


def _numbers(skill: pd.DataFrame) -> pd.DataFrame:
    """JSON's null stands for NaN."""
    words = ("readout", "unit", "best", "beats", "n", "donors")
    return skill.astype({name: np.float64 for name in skill.columns if name not in words})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m perturb baselines``."""
    parser.add_argument("bundle", metavar="BUNDLE", help="folder of the model; baselines/ is written into it")
    parser.add_argument("data", metavar="DATA.zarr", help="the store that the bundle was trained on")
    parser.add_argument("--cells", type=int, default=2000, help="training cells to fit on")
    parser.add_argument("--skill-cells", type=int, default=200, help="validation cells to measure skill on; 0: none")
    parser.add_argument("--pictures", type=int, default=4, help="pictures per validation cell")
    parser.add_argument("--seed", type=int, default=0)


def main(args: argparse.Namespace) -> None:
    """Fit the baselines, measure the skill and write both into the bundle.

    Raises
    ------
    BadInput: a bundle or store that cannot be used.
    """
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.store import TissueStore

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    model = GE2Hist.load(args.bundle)
    store = TissueStore(args.data, model.config.tile_px)
    found = fit_baselines(model, store, args.cells, args.seed, say)
    if args.skill_cells:
        found = measure_skill(found, model, store, args.skill_cells, args.pictures, seed=args.seed, on_progress=say)
    found.save(args.bundle)
    print(Path(args.bundle) / FOLDER / "baselines.json")
    if len(found.skill):
        print(found.skill.drop(columns="unit").to_string(index=False, float_format="{:.3f}".format))
    for sentence in found.doubts():
        print(sentence)
