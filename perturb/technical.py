"""Technical null: how far the *unedited* cell moves when nothing but technique is drawn again.

The encoder breaks ties between equal counts, and chooses genes in long cells, at random; the pictures start from noise.
The unedited cell is encoded again with other encoder seeds and drawn again with other noise, and each redraw's distance
from the unedited arm is a point of the cloud that an edit has to leave:

    p = (1 + #{redraws at least as far as the edited arm}) / (1 + redraws)

Under "the edit does no more than a redraw" the edited arm is one of the redraws, so that p <= a in at most a of cases.
It shares ties and noise with the unedited arm, as the redraws do not, and lies nearer for it: the null is a hard one,
which an effect can fail and still be seen by the paired comparison.

A cell without ties has no technical spread in its state: the cloud is a point, and any change leaves it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ge2hist_core import rng
from ge2hist_core.config import READER_CLASSES
from ge2hist_core.types import BadInput, Cells, Latent

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist
    from perturb.recipe import Recipe
    from perturb.result import Arm

__all__ = ["DRAWS", "SPACES", "Redraws", "left_cloud", "readout_null", "redraw", "state_null"]

DRAWS = 19
"""Redraws; p can then reach 1 / 20."""

SPACES = ("embedding", "z_c", "z_e")

POINT = 1e-5
"""Distances below this are rounding: embeddings have length 1, states a spread of about 1 in each direction."""


@dataclass(frozen=True, eq=False)
class Redraws:
    """The unedited cells encoded again.

    Parameters
    ----------
    seeds: ``[draw]`` encoder seeds.
    embedding: ``[draw, cell, dim]``. z_c: ``[draw, cell, d_c]``. z_e: ``[draw, cell, d_e]``.
    """

    seeds: tuple[int, ...]
    embedding: np.ndarray
    z_c: np.ndarray
    z_e: np.ndarray

    def __len__(self) -> int:
        return len(self.seeds)

    def latent(self, draw: int) -> Latent:
        return Latent(self.z_c[draw], self.z_e[draw])


def redraw(model: GE2Hist, cells: Cells, encoder_seed: int, draws: int = DRAWS) -> Redraws:
    """Encode unedited cells with other encoder seeds, those of the stream ``(encoder_seed, "technical null")``.

    Raises
    ------
    BadInput: fewer than 1 draw; a cell that expresses nothing that the encoder knows.
    """
    if draws < 1:
        raise BadInput(f"The number of redraws is {draws}: choose at least 1, 19 for p down to 0.05.")
    stream = rng.stream(encoder_seed, "technical null")
    seeds: list[int] = []
    while len(seeds) < draws:
        seed = int(stream.integers(2**31))
        if seed != encoder_seed and seed not in seeds:
            seeds.append(seed)
    embedding = [model.embed(cells, seed) for seed in seeds]
    latent = [model.encode(one) for one in embedding]
    z_c, z_e = (np.stack([getattr(one, part) for one in latent]) for part in ("z_c", "z_e"))
    return Redraws(tuple(seeds), np.stack(embedding), z_c, z_e)


def left_cloud(distance: float, cloud: np.ndarray, tolerance: float = 0.0) -> tuple[float, float]:
    """How far outside of a cloud a distance lies.

    Parameters
    ----------
    distance: of the edited arm from the unedited one, >= 0.
    cloud: ``[draw]`` of the redraws. NaN on either side is left out.
    tolerance: two distances at most this far apart are equal, and one at most this large is none.

    Returns
    -------
    ``ratio``: distance over the cloud's root mean square; infinite for a distance from a point, NaN for none.
    ``p``: see the module; NaN without a distance or a cloud.

    Examples
    --------
    >>> left_cloud(3.0, np.array([1.0, -1.0, 1.0]))
    (3.0, 0.25)
    >>> left_cloud(0.5, np.zeros(19))
    (inf, 0.05)
    """
    cloud = np.abs(cloud[np.isfinite(cloud)])
    if not np.isfinite(distance) or not len(cloud):
        return float("nan"), float("nan")
    p = (1 + int((cloud >= distance - tolerance).sum())) / (1 + len(cloud))
    scale = float(np.sqrt(np.square(cloud).mean()))
    if scale > tolerance:
        return float(distance / scale), p
    return (float("inf") if distance > tolerance else float("nan")), p


def state_null(recipe: Recipe, redraws: Redraws, base: Arm, edited: Arm) -> pd.DataFrame:
    """Does the edited cell leave the cloud of its own redraws in embedding, z_c and z_e?

    Returns
    -------
    One row per cell and space: ``cell_id, space, distance`` (Euclidean, edited from unedited), ``cloud`` (root mean
    square of the redraws' distances), ``ratio, p, n`` (redraws) and ``point``: every redraw is the same to rounding.
    """
    rows = []
    for space in SPACES:
        before, after, drawn = _states(space, base), _states(space, edited), getattr(redraws, space)
        distance = np.linalg.norm(after - before, axis=1)
        cloud = np.linalg.norm(drawn.astype(np.float64) - before, axis=2)
        for c, cell_id in enumerate(recipe.cell_ids):
            ratio, p = left_cloud(float(distance[c]), cloud[:, c], POINT)
            root = float(np.sqrt(np.square(cloud[:, c]).mean()))
            point = bool((cloud[:, c] <= POINT).all())
            rows.append((cell_id, space, float(distance[c]), root, ratio, p, len(redraws), point))
    return pd.DataFrame(rows, columns=["cell_id", "space", "distance", "cloud", "ratio", "p", "n", "point"])


def _states(space: str, arm: Arm) -> np.ndarray:
    return np.asarray(arm.embedding if space == "embedding" else getattr(arm.latent, space), dtype=np.float64)


def readout_null(
    recipe: Recipe,
    model: GE2Hist,
    redraws: Redraws,
    base: Arm,
    edited: Arm,
    *,
    noise: str = "other",
    seeds: int | None = None,
    cancel: threading.Event | None = None,
) -> pd.DataFrame:
    """Do the readouts leave the cloud of the unedited cells drawn again?

    Redraw d shows the cells as :class:`Redraws` ``d`` encoded them, each with as many noise seeds as are compared; its
    readouts are means over these pictures, as are those of both arms.

    Parameters
    ----------
    noise: ``"other"``: each redraw has noise of its own, so that the cloud is that of the whole technique; ``"same"``:
        it has the recipe's, so that the cloud is that of the encoder alone, the null of a paired effect.
    seeds: of the recipe's noise seeds, how many are compared, the first ones; None for all. The redraws cost
        ``draws * cells * seeds`` pictures.
    cancel: when set, drawing ends with :class:`ge2hist_core.sampler.Stopped`.

    Returns
    -------
    One row per readout: ``readout, unit, base, edited, effect, cloud`` (root mean square of the redraws' differences
    from the unedited arm), ``ratio, p, n`` (redraws in which the readout is defined). Readouts that no picture of the
    unedited arm, the edited arm and the redraws shows are left out.

    Raises
    ------
    BadInput: another kind of noise, a number of seeds that the recipe does not have, a bundle without a reader.
    """
    if noise not in ("other", "same"):
        raise BadInput(f"noise is {noise!r}: choose other or same.")
    n_seeds = len(recipe.seeds) if seeds is None else seeds
    if not 1 <= n_seeds <= len(recipe.seeds):
        raise BadInput(f"seeds is {seeds!r}: choose 1 to {len(recipe.seeds)}, the recipe's number of noise seeds.")
    n_cells = len(recipe.cell_ids)
    size_um = tuple(side * model.config.um_per_px for side in base.images.shape[2:0:-1])
    keep = [c * len(recipe.seeds) + s for c in range(n_cells) for s in range(n_seeds)]
    arms = {name: _means([arm.nuclei[i] for i in keep], size_um) for name, arm in (("base", base), ("edited", edited))}

    places = [(d, c, s) for d in range(len(redraws)) for c in range(n_cells) for s in range(n_seeds)]
    latent = Latent(*(np.stack([part[d, c] for d, c, _ in places]) for part in (redraws.z_c, redraws.z_e)))
    if noise == "same":
        drawn_seeds = [recipe.seeds[s] for _, _, s in places]
    else:
        drawn_seeds = [
            int(rng.stream(recipe.encoder_seed, "technical noise", d, c, recipe.seeds[s]).integers(2**62))
            for d, c, s in places
        ]

    def stop(*_: object) -> bool:
        return cancel is not None and cancel.is_set()

    images = model.generate(latent, drawn_seeds, recipe.sample, stop)
    nuclei = model.read_nuclei(images)
    block = n_cells * n_seeds
    drawn = [_means(nuclei[d * block : (d + 1) * block], size_um) for d in range(len(redraws))]

    rows = []
    for readout, before in arms["base"].items():
        after = arms["edited"][readout]
        values = np.array([one[readout] for one in drawn])
        if ":" in readout and not np.nan_to_num([before, after, *values]).any():
            continue
        cloud = values - before
        cloud = cloud[np.isfinite(cloud)]
        ratio, p = left_cloud(abs(after - before), cloud, 1e-9 * max(abs(before), abs(after), 1e-9))
        root = float(np.sqrt(np.square(cloud).mean())) if len(cloud) else float("nan")
        rows.append((readout, _unit(readout), before, after, after - before, root, ratio, p, len(cloud)))
    columns = ["readout", "unit", "base", "edited", "effect", "cloud", "ratio", "p", "n"]
    return pd.DataFrame(rows, columns=columns)


def _unit(readout: str) -> str:
    from perturb.tables import UNITS

    return UNITS[readout.partition(":")[0]]


def _means(nuclei: Sequence[pd.DataFrame], size_um: tuple[float, ...]) -> dict[str, float]:
    """Readout -> mean over the pictures in which it is defined, NaN where there is none."""
    from ge2hist_core.niche import niche_stats

    width, height = size_um
    values = pd.DataFrame([niche_stats(one, (width, height), READER_CLASSES).readouts() for one in nuclei])
    return {str(name): float(value) for name, value in values.mean().items()}
