"""What an experiment leaves: two arms, tables, warnings, provenance; written to and read from the disk cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ge2hist_core.types import NUCLEI_COLUMNS, Latent, Niche
from perturb.cache import DiskCache
from perturb.grn import Network, pack_network, unpack_network
from perturb.recipe import Recipe

__all__ = ["Arm", "Result", "load_arm", "load_result", "pack_table", "store_result", "unpack_table"]

TABLES = ("readouts", "summary", "comparison", "states", "edits", "spread", "spread_effects")


@dataclass(frozen=True, eq=False)
class Arm:
    """One arm. Pictures run over cells, then seeds: picture ``c * n_seeds + s``.

    What stands per cell is, in a control arm, that of the first seed's network.

    Parameters
    ----------
    images: uint8 ``[picture, H, W, 3]``.
    nuclei: ``[picture]`` tables with the columns of ``NUCLEI_COLUMNS``.
    embedding: ``[cell, embedding dimension]`` of the encoder.
    latent: posterior means of the cells.
    types: ``[cell, type]`` probabilities of the model's type classifier.
    support: ``[cell]`` conformal p-value: how unusual the cell is for the model's training data.
    frames: ``[frame, channel, h, w]`` clean-image estimates (latent) of the first picture while it is denoised.
    """

    images: np.ndarray
    nuclei: list[pd.DataFrame]
    embedding: np.ndarray
    latent: Latent
    types: np.ndarray
    support: np.ndarray
    frames: np.ndarray

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Arrays without objects, for :class:`perturb.cache.DiskCache`."""
        table = pd.concat(self.nuclei, ignore_index=True)
        return {
            "images": self.images,
            "embedding": self.embedding,
            "z_c": self.latent.z_c,
            "z_e": self.latent.z_e,
            "types": self.types,
            "support": self.support,
            "frames": self.frames,
            "nuclei_n": np.array([len(one) for one in self.nuclei]),
        } | {
            f"nuclei_{name}": np.asarray(table[name], dtype=str if name == "cell_type" else np.float64)
            for name in NUCLEI_COLUMNS
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Arm:
        """Inverse of :meth:`to_arrays`."""
        table = pd.DataFrame({name: arrays[f"nuclei_{name}"] for name in NUCLEI_COLUMNS})
        table["cell_type"] = table["cell_type"].astype(object)
        ends = np.cumsum(arrays["nuclei_n"])
        nuclei = [
            table.iloc[end - n : end].reset_index(drop=True) for n, end in zip(arrays["nuclei_n"], ends, strict=True)
        ]
        latent = Latent(arrays["z_c"], arrays["z_e"])
        return cls(
            arrays["images"], nuclei, arrays["embedding"], latent, arrays["types"], arrays["support"], arrays["frames"]
        )


@dataclass(frozen=True, eq=False)
class Result:
    """What came out.

    Parameters
    ----------
    recipe: what was done.
    base_arm, edited_arm: pictures, nuclei, states.
    direct_arm, control_arm: where edits spread through a network: the same without spreading, and with networks of
        random wiring, another one for each seed; else None.
    network: through which the edits spread, or None.
    um_per_px: of every picture.
    readouts: one row per arm, cell, seed and readout: ``arm, cell_id, seed, readout, unit, value, step``, the
        last what one nucleus more or less makes of the readout.
    summary: mean and interval per arm: ``arm, readout, unit, mean, low, high, n``.
    comparison: paired effect of the edit: ``readout, unit, base, edited, effect, low, high, p, q, n``.
    states: one row per cell: type that the model reads, its probability, support, distances moved.
    edits: what the encoder saw: ``cell_id, gene, edit, count_before, count_after, percentile_before, percentile_after,
        bin_before, bin_after, in_vocabulary``.
    spread: genes that the network moved, one row per cell and gene: ``cell_id, gene, count_before, count_after,
        bin_before, bin_after``, the largest change of bin first; empty without propagation.
    spread_effects: what spreading did: ``contrast, readout, unit, effect, low, high, p, q, n`` (paired), contrasts
        ``direct - unedited``, ``network - direct``, ``control - direct``, ``network - control``.
    warnings: technical doubts, one sentence each.
    provenance: versions, hashes, sources.
    model_card: text of the bundle's MODEL_CARD.md, empty if it has none.
    """

    recipe: Recipe
    base_arm: Arm
    edited_arm: Arm
    um_per_px: float
    readouts: pd.DataFrame
    summary: pd.DataFrame
    comparison: pd.DataFrame
    states: pd.DataFrame
    edits: pd.DataFrame
    spread: pd.DataFrame
    spread_effects: pd.DataFrame
    warnings: tuple[str, ...]
    provenance: dict[str, Any]
    model_card: str
    direct_arm: Arm | None = None
    control_arm: Arm | None = None
    network: Network | None = None

    @property
    def arms(self) -> dict[str, Arm]:
        """All arms by name, as :attr:`Recipe.arms` names them."""
        found = {name: getattr(self, f"{name}_arm") for name in ("base", "edited", "direct", "control")}
        return {name: arm for name, arm in found.items() if arm is not None}

    def _niches(self, arm: Arm) -> list[Niche]:
        seeds = self.recipe.seeds
        return [
            Niche(image, self.um_per_px, seeds[i % len(seeds)], generated=True) for i, image in enumerate(arm.images)
        ]

    @property
    def base(self) -> list[Niche]:
        """Unedited pictures, cells, then seeds."""
        return self._niches(self.base_arm)

    @property
    def edited(self) -> list[Niche]:
        """Edited pictures in the order of :attr:`base`."""
        return self._niches(self.edited_arm)

    @property
    def base_nuclei(self) -> list[pd.DataFrame]:
        return self.base_arm.nuclei

    @property
    def edited_nuclei(self) -> list[pd.DataFrame]:
        return self.edited_arm.nuclei

    @property
    def latent(self) -> tuple[Latent, Latent]:
        """States of the cells, unedited and edited."""
        return self.base_arm.latent, self.edited_arm.latent

    @property
    def support(self) -> pd.DataFrame:
        """``cell_id, base, edited``: conformal p-value of each cell before and after the edit."""
        return pd.DataFrame(
            {
                "cell_id": list(self.recipe.cell_ids),
                "base": self.base_arm.support,
                "edited": self.edited_arm.support,
            }
        )


def load_arm(recipe: Recipe, cache: DiskCache | None) -> Arm | None:
    """A finished arm from disk, or None."""
    arrays = None if cache is None else cache.load_arrays(recipe.hash)
    return None if arrays is None else Arm.from_arrays(arrays)


def load_result(recipe_hash: str, cache: DiskCache) -> Result | None:
    """A finished result from disk without model or data, or None where it, or one of its arms, is gone."""
    stored = cache.load_json(recipe_hash)
    if stored is None:
        return None
    recipe = Recipe.from_json(stored["recipe"])
    arms: dict[str, Arm] = {}
    for name, one in recipe.arms.items():
        if (arm := load_arm(one, cache)) is None:
            return None
        arms[f"{name}_arm"] = arm
    network = None if recipe.propagation is None else cache.load_json(recipe.propagation.network_sha256)
    if (network is None) != (recipe.propagation is None):
        return None
    return Result(
        recipe=recipe,
        network=None if network is None else unpack_network(network),
        um_per_px=stored["um_per_px"],
        warnings=tuple(stored["warnings"]),
        provenance=stored["provenance"],
        model_card=stored["model_card"],
        **{name: unpack_table(table) for name, table in stored["tables"].items()},
        **arms,
    )


def pack_table(table: pd.DataFrame) -> dict[str, Any]:
    """A table as JSON holds it: per column its type and values, None for NaN."""
    return {
        name: [str(column.dtype), [None if value != value else value for value in column.tolist()]]
        for name, column in table.items()
    }


def unpack_table(packed: dict[str, Any]) -> pd.DataFrame:
    """Inverse of :func:`pack_table`."""
    return pd.DataFrame({name: pd.Series(values, dtype=dtype) for name, (dtype, values) in packed.items()})


def store_result(result: Result, cache: DiskCache) -> None:
    """Keep all but the arms, which are stored when they are drawn."""
    value = {
        "recipe": result.recipe.to_json(),
        "um_per_px": result.um_per_px,
        "tables": {name: pack_table(getattr(result, name)) for name in TABLES},
        "warnings": list(result.warnings),
        "provenance": result.provenance,
        "model_card": result.model_card,
    }
    if result.network is not None:
        cache.store_json(result.network.sha256, pack_network(result.network))
    cache.store_json(result.recipe.hash, value)
