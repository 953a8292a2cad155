"""What the state of a cell holds: the type in z_c, the environment in z_e, a drawn type in the middle of the picture.

Linear probes are fitted on cells of training donors and judged on donors that the bundle has not learned from. All
intervals are 95 % percentiles of a bootstrap over these donors and their cells, unless they are said to be Wilson's,
which take cells for independent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ge2hist_core import rng
from ge2hist_core.config import VISIBLE_CLASS, SampleConfig
from ge2hist_core.evaluation.readings import BOOTSTRAP, bootstrap_weights, percentiles, units
from ge2hist_core.evaluation.work import Work
from ge2hist_core.types import Latent

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist

__all__ = ["CENTRE_UM", "central_class", "central_types", "classifier_figures", "separation", "wilson"]

CENTRE_UM = 10.0
"""The nucleus nearest to the middle of a picture is the central one if it is no farther away than this."""


def wilson(right: int, n: int) -> dict[str, float]:
    """Wilson's 95 % interval of a share."""
    from scipy.stats import binomtest

    interval = binomtest(right, n).proportion_ci(0.95, method="wilson")
    return {"low": float(interval.low), "high": float(interval.high)}


def classifier_figures(guess: np.ndarray, truth: np.ndarray, donor: np.ndarray, seed: int) -> dict[str, Any]:
    """Accuracy of the classifier on z_c.

    Returns
    -------
    ``accuracy``, ``n`` cells, ``donors``; ``low, high`` over donors and their cells, None with a single donor;
    ``wilson``; ``recall`` by type with ``recall_wilson`` and ``recall_n``.
    """
    right = guess == truth
    names = np.unique(donor)
    n = np.array([(donor == name).sum() for name in names])
    hits = np.array([right[donor == name].sum() for name in names])
    low = high = None
    if len(names) > 1:
        draw = rng.stream(seed, "classifier bootstrap")
        chosen = draw.integers(0, len(names), (BOOTSTRAP, len(names)))
        # Cells that are right or wrong, drawn again within a donor, are right by the binomial distribution.
        drawn = draw.binomial(n[chosen], (hits / n)[chosen]).sum(axis=1) / n[chosen].sum(axis=1)
        low, high = percentiles(drawn, len(names))
    kinds = [str(kind) for kind in np.unique(truth)]
    return {
        "accuracy": float(right.mean()),
        "n": len(truth),
        "donors": len(names),
        "low": low,
        "high": high,
        "wilson": wilson(int(right.sum()), len(right)),
        "recall": {kind: float(right[truth == kind].mean()) for kind in kinds},
        "recall_n": {kind: int((truth == kind).sum()) for kind in kinds},
        "recall_wilson": {kind: wilson(int(right[truth == kind].sum()), int((truth == kind).sum())) for kind in kinds},
    }


# --- separation -------------------------------------------------------------------------------------------------------


def separation(
    training: Latent,
    training_type: np.ndarray,
    training_niche: np.ndarray,
    held_out: Latent,
    held_out_type: np.ndarray,
    held_out_niche: np.ndarray,
    donor: np.ndarray,
    niche_names: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """How well linear probes of z_c and of z_e tell type and niche.

    Parameters
    ----------
    training_niche, held_out_niche: ``[cell, target]`` numbers that describe the niche. niche_names: ``[target]``.
    donor: ``[held-out cell]``.

    Returns
    -------
    For ``z_c``, ``z_e`` and ``both``: ``type_accuracy``, the balanced accuracy of a logistic probe, and ``niche_r2``,
    the mean over targets of the R2 of ridge regression, each with interval; ``niche_r2_each`` by target. ``chance``:
    one over the types present.
    """
    weights, resampled = bootstrap_weights(seed, donor, len(held_out)), units(donor, len(held_out))
    kinds = np.unique(held_out_type)
    result: dict[str, Any] = {
        "n_training": len(training),
        "n": len(held_out),
        "donors": len(np.unique(donor)),
        "chance": 1 / len(kinds),
    }
    for part in ("z_c", "z_e", "both"):
        name = "z_s" if part == "both" else part
        fitted, asked = getattr(training, name), getattr(held_out, name)
        right = _type_probe(fitted, training_type, asked) == held_out_type
        guess = _niche_probe(fitted, training_niche, asked)
        one = np.ones((1, len(held_out)))
        r2, drawn = _r2(held_out_niche, guess, one)[0], _r2(held_out_niche, guess, weights)
        varies = np.isfinite(r2)
        recall = _balanced(right, held_out_type, kinds, weights)
        result[part] = {
            "type_accuracy": _figure(_balanced(right, held_out_type, kinds, one)[0], recall, resampled),
            "niche_r2": _figure(r2[varies].mean(), drawn[:, varies].mean(axis=1), resampled)
            if varies.any()
            else {"value": np.nan, "low": np.nan, "high": np.nan},
            "niche_r2_each": dict(zip(niche_names, r2.tolist(), strict=True)),
        }
    return result


def _type_probe(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, class_weight="balanced"))
    return probe.fit(train, labels.astype(str)).predict(test)


def _niche_probe(train: np.ndarray, values: np.ndarray, test: np.ndarray) -> np.ndarray:
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 4, 7))).fit(train, values).predict(test)


def _balanced(right: np.ndarray, truth: np.ndarray, kinds: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """``[resample]`` mean recall over the types that a resample holds."""
    member = (truth[:, None] == kinds[None]).astype(float)
    with np.errstate(invalid="ignore"):
        recall = (weights @ (member * right[:, None])) / (weights @ member)
    known = np.isfinite(recall)
    return np.where(known, recall, 0.0).sum(axis=1) / known.sum(axis=1)


def _r2(true: np.ndarray, guess: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """``[resample, target]`` 1 - squared error / variance; NaN for a target that does not vary."""
    centred = true - true.mean(axis=0)  # the same variance, without cancellation
    spread = weights @ centred**2 - (weights @ centred) ** 2 / weights.sum(axis=1, keepdims=True)
    return 1.0 - (weights @ (true - guess) ** 2) / np.where(spread > 1e-9, spread, np.nan)


def _figure(value: float, drawn: np.ndarray, resampled: int) -> dict[str, float]:
    low, high = percentiles(drawn, resampled)
    return {"value": float(value), "low": low, "high": high}


# --- Figure 4 ---------------------------------------------------------------------------------------------------------


def central_class(table: pd.DataFrame, tile_um: float) -> str | None:
    """Class of the nucleus nearest to the middle of a tile, None where there is none within :data:`CENTRE_UM`."""
    if not len(table):
        return None
    away = np.hypot(table["x_um"].to_numpy() - tile_um / 2, table["y_um"].to_numpy() - tile_um / 2)
    nearest = int(away.argmin())
    return str(table["cell_type"].iloc[nearest]) if away[nearest] <= CENTRE_UM else None


def _drawing(
    model: GE2Hist, state: Latent, seeds: Sequence[int], sample: SampleConfig
) -> Callable[[np.ndarray], np.ndarray]:
    return lambda at: model.generate(state.take(at), [seeds[i] for i in at], sample)


def central_types(
    model: GE2Hist,
    environments: Latent,
    seeds: Sequence[int],
    donor: np.ndarray,
    real: Mapping[str, Sequence[str | None]],
    sample: SampleConfig,
    seed: int,
    asked: list[Any],
    work: Work,
) -> dict[str, Any]:
    """Pictures for z_c drawn from each type's mixture component, with z_e fixed: is that type in the middle?

    Every type is drawn in the same environments with the same noise, so that what differs comes from z_c.

    Parameters
    ----------
    environments: cells whose z_e is kept. seeds: ``[environment]`` noise. donor: ``[environment]``.
    real: type -> class read in the middle of real tiles of cells of that type.
    asked: decides environments and seeds.

    Returns
    -------
    Per type ``n`` pictures, ``share`` whose central nucleus is read as the type's class, ``chance``: that share in the
    pictures drawn for types of other classes, ``raised``: their difference with interval; ``real``: the share in real
    tiles of such cells, what reader and tissue allow. ``shares``: type x class read. ``no_nucleus``: share of all
    pictures without a nucleus in the middle.
    """
    tile_um = model.config.tile_px * model.config.um_per_px
    k = len(environments)
    read: dict[str, np.ndarray] = {}
    for kind in model.cell_types:
        state = Latent(model.sample_type(kind, k, seed), environments.z_e)
        images = work.blocks(
            ["central", model.sha256, repr(sample), kind, seed, *asked],
            k,
            _drawing(model, state, seeds, sample),
            f"GE2Hist, {kind} in the middle",
        )
        found = [central_class(table, tile_um) for table in model.read_nuclei(images)]
        read[kind] = np.array([name or "" for name in found], dtype=object)
    classes = {kind: VISIBLE_CLASS.get(kind, kind) for kind in read}
    weights, resampled = bootstrap_weights(seed, donor, k), units(donor, k)
    types: dict[str, Any] = {}
    for kind in read:
        own = (read[kind] == classes[kind]).astype(float)
        others = [(read[other] == classes[kind]) for other in read if classes[other] != classes[kind]]
        chance = np.mean(others, axis=0) if others else np.full(k, np.nan)
        drawn = (weights @ own) / weights.sum(axis=1)
        raised = (weights @ (own - chance)) / weights.sum(axis=1)
        known = [name == classes[kind] for name in real.get(kind, ())]
        types[kind] = {
            "class": classes[kind],
            "n": k,
            "share": _figure(own.mean(), drawn, resampled),
            "chance": float(chance.mean()),
            "raised": _figure((own - chance).mean(), raised, resampled),
            "real": float(np.mean(known)) if known else None,
            "n_real": len(known),
        }
    every = list(dict.fromkeys(classes.values()))
    return {
        "environments": k,
        "donors": len(np.unique(donor)),
        "radius_um": CENTRE_UM,
        "types": types,
        "raised_types": sum(bool(row["raised"]["low"] > 0) for row in types.values()),
        "mean_share": float(np.mean([row["share"]["value"] for row in types.values()])),
        "mean_chance": float(np.mean([row["chance"] for row in types.values()])),
        "no_nucleus": float(np.mean([(found == "").mean() for found in read.values()])),
        "shares": {kind: {name: float((found == name).mean()) for name in every} for kind, found in read.items()},
    }
