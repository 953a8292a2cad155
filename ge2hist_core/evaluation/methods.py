"""Who draws: GE2Hist, its rivals and the two controls, each asked for pictures of the same cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ge2hist_core.config import SampleConfig
from ge2hist_core.evaluation.work import Work
from ge2hist_core.files import sha256_file
from ge2hist_core.types import BadInput, Cells, Latent

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.rivals.common import Rival
    from ge2hist_core.store import TissueStore

__all__ = ["OWN", "Method", "controls", "own", "rivals", "trained"]

OWN = "ge2hist"


@dataclass(frozen=True, eq=False)
class Method:
    """A way to a picture of each of the asked cells.

    Parameters
    ----------
    name, title: key in the result and how tables call it. kind: ``model``, ``rival`` or ``control``; controls show what
        copying, guessing and other bundles reach and take no part in the contest.
    asked: plain JSON that decides the pictures. draw: positions ``[k]`` among the asked cells -> uint8
        ``[k, H, W, 3]``.
    facts: what the tables say of it: whether it sees the cell, on how much it was trained.
    """

    name: str
    title: str
    kind: str
    asked: list[Any]
    draw: Callable[[np.ndarray], np.ndarray]
    facts: dict[str, Any] = field(default_factory=dict)

    def pictures(self, n: int, work: Work) -> np.ndarray:
        """uint8 ``[n, H, W, 3]`` of all asked cells."""
        return work.blocks(self.asked, n, self.draw, self.title)

    def to_json(self) -> dict[str, Any]:
        return {"title": self.title, "kind": self.kind, **self.facts}


def own(model: GE2Hist, state: Latent, seeds: Sequence[int], sample: SampleConfig, asked: list[Any]) -> Method:
    """GE2Hist itself; ``asked`` names cells and seeds."""
    return Method(
        OWN,
        "GE2Hist",
        "model",
        ["ge2hist", model.sha256, repr(sample), *asked],
        lambda at: model.generate(state.take(at), [seeds[i] for i in at], sample),
        {"sees_the_cell": True},
    )


def rivals(
    folders: Sequence[Path],
    store: TissueStore,
    cells: Cells,
    seeds: Sequence[int],
    tile_px: int,
    sample: SampleConfig,
    asked: list[Any],
) -> list[Method]:
    """The rivals that ``train-rival`` left in ``folders``, and other bundles, as controls.

    Parameters
    ----------
    sample: how other bundles draw.

    Raises
    ------
    BadInput: no rival in a folder, other tiles than the bundle's, or one that has learned from the asked cells' donors.
    """
    from ge2hist_core.rivals import load_rival

    assert cells.donor is not None
    found: list[Method] = []
    for folder in folders:
        if (folder / "bundle.json").is_file():
            found.append(_other_bundle(folder, store, cells, seeds, tile_px, sample, asked))
            continue
        rival = load_rival(folder)
        if rival.config.tile_px != tile_px:
            raise BadInput(
                f"{folder} draws tiles of {rival.config.tile_px} px, the bundle {tile_px} px: train it on this tissue."
            )
        seen = _learned_from(rival, store) & {str(name) for name in np.unique(cells.donor)}
        if seen:
            raise BadInput(
                f"{folder} has learned from donor {min(seen)!r}, on which it would be judged: train it with the same "
                "store and split as the bundle."
            )
        report = rival.report or {}
        known = [m.name for m in found]
        name, title = rival.name, rival.title
        if name in known:
            name, title = f"{name}:{Path(folder).name}", f"{title} ({Path(folder).name})"
        if name in known:
            raise BadInput(f"--rivals names {folder} twice: give each folder once.")
        facts = {"sees_the_cell": rival.conditional, "training": {k: report.get(k) for k in _REPORTED}}
        files = [sha256_file(Path(folder) / part) for part in ("rival.json", "weights.safetensors")]
        found.append(Method(name, title, "rival", ["rival", *files, *asked], _drawing(rival, cells, seeds), facts))
    return found


_REPORTED = ("steps", "batch_size", "cells", "macs", "cpu_seconds", "seconds", "threads", "device", "parameters")


def trained(model: GE2Hist) -> dict[str, Any]:
    """What the tables say of a bundle's training: the last run's steps, cells and time, all runs' operations."""
    from ge2hist_core.training_cost import training_macs

    report = model.report or {}
    return {k: report.get(k) for k in ("steps", "seconds", "cells", "device")} | {
        "macs": training_macs(model.config, report)
    }


def _other_bundle(
    folder: Path,
    store: TissueStore,
    cells: Cells,
    seeds: Sequence[int],
    tile_px: int,
    sample: SampleConfig,
    asked: list[Any],
) -> Method:
    """Another bundle on the same cells and noise: what a change of the model, or more training, was worth."""
    from ge2hist_core.model import GE2Hist

    assert cells.donor is not None
    other = GE2Hist.load(folder, gates=False)
    if other.config.tile_px != tile_px:
        raise BadInput(f"{folder} draws tiles of {other.config.tile_px} px, the bundle {tile_px} px: give one like it.")
    seen = other.has_learned_from(store) & {str(name) for name in np.unique(cells.donor)}
    if seen:
        raise BadInput(f"{folder} has learned from donor {min(seen)!r}, on which it would be judged: leave it out.")

    @cache
    def state() -> Latent:
        return other.encode(other.embed(cells, asked[-1]))

    return Method(
        f"{OWN}:{folder.name}", f"GE2Hist ({folder.name})", "control",
        ["bundle", other.sha256, repr(sample), *asked],
        lambda at: other.generate(state().take(at), [seeds[i] for i in at], sample),
        {"sees_the_cell": True, "training": trained(other)},
    )  # fmt: skip


def _drawing(rival: Rival, cells: Cells, seeds: Sequence[int]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda at: rival.generate(cells.take(at) if rival.conditional else None, [seeds[i] for i in at])


def _learned_from(rival: Rival, store: TissueStore) -> set[str]:
    """Donors of ``store`` among those that a rival was trained on; a simulated donor is its seed and number."""
    report = rival.report or {}
    simulation = report.get("simulation")
    same_seed = store.simulation and simulation and store.simulation["seed"] == simulation["seed"]
    if not same_seed and report.get("store") != store.identity:
        return set()
    return set(report.get("learned_from", ())) & set(store.donors)


def controls(
    model: GE2Hist,
    store: TissueStore,
    training_rows: np.ndarray,
    cells: Cells,
    seeds: Sequence[int],
    sample: SampleConfig,
    seed: int,
    asked: list[Any],
    embedding: Callable[[], np.ndarray],
) -> list[Method]:
    """Retrieval from ``training_rows`` and GE2Hist with another cell's condition.

    Parameters
    ----------
    embedding: the model's embedding of ``training_rows``, computed when something has to be drawn.
    """
    from ge2hist_core.rivals.controls import NearestTile, ShuffledCondition

    @cache
    def nearest() -> NearestTile:
        return NearestTile(model, store, training_rows, seed, embedding())

    @cache
    def shuffled() -> ShuffledCondition:
        return ShuffledCondition(model, cells, sample, seed)

    def drawing(made: Callable[[], Any]) -> Callable[[np.ndarray], np.ndarray]:
        return lambda at: made().generate(cells.take(at), [seeds[i] for i in at])

    return [
        Method(
            NearestTile.name, NearestTile.title, "control",
            ["nearest", model.sha256, store.identity, training_rows.tolist(), *asked], drawing(nearest),
            {"sees_the_cell": True, "tiles": len(training_rows)},
        ),
        Method(
            ShuffledCondition.name, ShuffledCondition.title, "control",
            ["shuffled", model.sha256, repr(sample), *asked], drawing(shuffled), {"sees_the_cell": False},
        ),
    ]  # fmt: skip
