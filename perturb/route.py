"""Which way did an edit act: through the cell's identity ``z_c`` or through its environment ``z_e``?

The model draws a niche from both halves of the state. Exchanging them one at a time gives four arms with the same
noise: nothing edited ``y00``, identity alone ``y10``, environment alone ``y01``, both ``y11``. Two of them are the arms
of the result; two more are drawn. For every picture

- identity ``((y10 - y00) + (y11 - y01)) / 2`` and environment ``((y01 - y00) + (y11 - y10)) / 2``: the Shapley values
  of the two halves, which add up to the total ``y11 - y00`` (Shapley 1953, doi:10.1515/9781400881970-018);
- interaction ``y11 - y10 - y01 + y00``: what one half does differently once the other is edited. Each of the two parts
  holds half of it.

Intervals run over seeds and cells, as those of the result do. They speak about the model: a state of an edited
identity in the old environment is one that no cell of the training data need have had.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ge2hist_core.config import READER_CLASSES
from ge2hist_core.niche import niche_stats
from ge2hist_core.types import NUCLEI_COLUMNS, BadInput, Latent
from perturb.cache import DiskCache
from perturb.recipe import Recipe
from perturb.result import Result
from perturb.run import Progress
from perturb.stats import Estimate, crossed_effect
from perturb.tables import LEVEL, UNITS, steps

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist, Preview

__all__ = ["PARTS", "MixedArm", "Route", "draw_states", "exchange", "readouts_of", "route", "values_of"]

PARTS = ("total", "identity", "environment", "interaction")


@dataclass(frozen=True, eq=False)
class MixedArm:
    """Pictures of states that mix an unedited and an edited half: cells, then seeds, as in :class:`Arm`."""

    images: np.ndarray
    nuclei: list[pd.DataFrame]


@dataclass(frozen=True, eq=False)
class Route:
    """What came through which half of the state.

    Parameters
    ----------
    table: ``readout, unit, part, effect, low, high, p, n``; the parts of a readout run over the same pictures.
    shares: ``readout, identity, environment``: of the total, NaN where the total's interval holds 0. A share above 1
        or below 0 says that the two halves pull in opposite directions.
    identity_arm, environment_arm: pictures with the edited ``z_c`` alone and with the edited ``z_e`` alone.
    moved_z_c, moved_z_e: mean Euclidean distance by which the edit moves each half.
    """

    table: pd.DataFrame
    shares: pd.DataFrame
    identity_arm: MixedArm
    environment_arm: MixedArm
    moved_z_c: float
    moved_z_e: float


def route(
    result: Result,
    model: GE2Hist,
    *,
    cache: DiskCache | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> Route:
    """Draw the two mixed arms with the seeds of the result and take its effects apart.

    Parameters
    ----------
    cache: mixed arms are taken from it and kept in it.
    on_progress: called after each denoising step, in this thread. cancel: ends the run at the next one.

    Raises
    ------
    BadInput: another model than the result's. ge2hist_core.sampler.Stopped: cancelled.
    """
    recipe = result.recipe
    if model.sha256 != recipe.model_sha256:
        raise BadInput(
            f"The result was made with model {recipe.model_sha256[:12]}, but {model.sha256[:12]} is loaded: "
            "load that bundle."
        )
    old, new = result.base_arm.latent, result.edited_arm.latent
    mixed = {"identity": Latent(new.z_c, old.z_e), "environment": Latent(old.z_c, new.z_e)}
    arms: dict[str, MixedArm] = {}
    for i, (name, latent) in enumerate(mixed.items()):

        def report(progress: Progress, before: float = i / 2) -> None:
            if on_progress is not None:
                on_progress(Progress(before + progress.fraction / 2, progress.text, progress.preview))

        key = _key(recipe, name)
        arrays = None if cache is None else cache.load_arrays(key)
        if arrays is not None:
            arms[name] = MixedArm(arrays["images"], _unpack_nuclei(arrays))
            report(Progress(1.0, "Read from the cache"))
            continue
        text = f"Drawing the niche with the edited {name} alone"
        images, nuclei = draw_states(recipe, model, latent, text=text, on_progress=report, cancel=cancel)
        arms[name] = MixedArm(images, nuclei)
        if cache is not None:
            cache.store_arrays(key, {"images": images} | _pack_nuclei(nuclei))
    shape = (len(recipe.cell_ids), len(recipe.seeds))
    y00, y11 = (values_of(result.readouts, arm, shape) for arm in ("base", "edited"))
    y10, y01 = (readouts_of(arms[name].nuclei, shape, result.um_per_px, arms[name].images) for name in mixed)
    table = exchange(y00, y10, y01, y11, recipe.encoder_seed, steps(result.readouts))
    return Route(
        table=table,
        shares=_shares(table),
        identity_arm=arms["identity"],
        environment_arm=arms["environment"],
        moved_z_c=float(np.linalg.norm(new.z_c.astype(np.float64) - old.z_c, axis=1).mean()),
        moved_z_e=float(np.linalg.norm(new.z_e.astype(np.float64) - old.z_e, axis=1).mean()),
    )


def exchange(
    y00: dict[str, np.ndarray], y10: dict[str, np.ndarray], y01: dict[str, np.ndarray], y11: dict[str, np.ndarray],
    seed: int, size: dict[str, float],
) -> pd.DataFrame:  # fmt: skip
    """Effects of the four arms of a 2 x 2 exchange.

    Parameters
    ----------
    y00, y10, y01, y11: readout -> ``[cell, seed]``; the first digit says whether ``z_c`` is the edited one, the second
        whether ``z_e`` is. A picture counts where the readout is defined in all four arms.
    seed: of the resampling. size: readout -> what one nucleus more or less makes of it.

    Returns
    -------
    DataFrame with the columns of :attr:`Route.table`. Readouts that are 0 or undefined in every picture are left out.
    """
    rows = []
    for readout in y00:
        arms = [np.asarray(y[readout], dtype=np.float64) for y in (y00, y10, y01, y11)]
        defined = np.isfinite(arms).all(axis=0)
        if ":" in readout and not np.nan_to_num(arms).any():
            continue
        a00, a10, a01, a11 = (np.where(defined, arm, np.nan) for arm in arms)
        pairs = {
            "total": (a00, a11),
            "identity": ((a00 + a01) / 2, (a10 + a11) / 2),
            "environment": ((a00 + a10) / 2, (a01 + a11) / 2),
            "interaction": (a10 + a01, a00 + a11),
        }
        for part in PARTS:
            found: Estimate = crossed_effect(*pairs[part], seed, LEVEL, size[readout])
            unit = UNITS.get(readout.partition(":")[0], "")
            rows.append((readout, unit, part, found.value, found.low, found.high, found.p, found.n))
    return pd.DataFrame(rows, columns=["readout", "unit", "part", "effect", "low", "high", "p", "n"])


def _shares(table: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for readout, parts in table.groupby("readout", sort=False):
        by_part = parts.set_index("part")
        total = by_part.loc["total"]
        clear = total["low"] > 0 or total["high"] < 0
        shares = [by_part.at[p, "effect"] / total["effect"] if clear else np.nan for p in ("identity", "environment")]
        rows.append((readout, *shares))
    return pd.DataFrame(rows, columns=["readout", "identity", "environment"])


def draw_states(
    recipe: Recipe,
    model: GE2Hist,
    latent: Latent,
    *,
    text: str,
    on_progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> tuple[np.ndarray, list[pd.DataFrame]]:
    """Pictures and nuclei of states ``[cell]`` with the recipe's sampler and seeds, cells, then seeds.

    The pictures are those that :func:`perturb.run.run` draws from the same states.
    """
    n_seeds = len(recipe.seeds)
    rows = np.repeat(np.arange(len(latent)), n_seeds)

    def on_step(i: int, n: int, under_way: Preview) -> bool:
        if on_progress is not None:
            on_progress(Progress(i / n, text))
        return cancel is not None and cancel.is_set()

    images = model.generate(latent.take(rows), list(recipe.seeds) * len(latent), recipe.sample, on_step)
    return images, model.read_nuclei(images)


def readouts_of(
    nuclei: list[pd.DataFrame], shape: tuple[int, int], um_per_px: float, images: np.ndarray
) -> dict[str, np.ndarray]:
    """Readout -> ``[cell, seed]`` of nuclei tables in picture order; ``images`` give the size of a picture."""
    height, width = (side * um_per_px for side in images.shape[1:3])
    rows = [niche_stats(table, (width, height), READER_CLASSES).readouts() for table in nuclei]
    return {name: np.array([row[name] for row in rows]).reshape(shape) for name in rows[0]}


def values_of(readouts: pd.DataFrame, arm: str, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Readout -> ``[cell, seed]`` of one arm of :attr:`Result.readouts`."""
    part = readouts[readouts["arm"] == arm]
    return {name: rows["value"].to_numpy().reshape(shape) for name, rows in part.groupby("readout", sort=False)}


def _key(recipe: Recipe, name: str) -> str:
    return hashlib.sha256(json.dumps(["route", name, recipe.hash]).encode()).hexdigest()


def _pack_nuclei(nuclei: list[pd.DataFrame]) -> dict[str, np.ndarray]:
    table = pd.concat(nuclei, ignore_index=True)
    return {"nuclei_n": np.array([len(one) for one in nuclei])} | {
        f"nuclei_{name}": np.asarray(table[name], dtype=str if name == "cell_type" else np.float64)
        for name in NUCLEI_COLUMNS
    }


def _unpack_nuclei(arrays: dict[str, np.ndarray]) -> list[pd.DataFrame]:
    table = pd.DataFrame({name: arrays[f"nuclei_{name}"] for name in NUCLEI_COLUMNS})
    table["cell_type"] = table["cell_type"].astype(object)
    ends = np.cumsum(arrays["nuclei_n"])
    return [table.iloc[end - n : end].reset_index(drop=True) for n, end in zip(arrays["nuclei_n"], ends, strict=True)]
