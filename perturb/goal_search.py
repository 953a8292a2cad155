"""Sets of edits judged by the neighbours that the model expects, without a picture: the first stage of a goal search.

Why distances and objective are what they are stands in :mod:`perturb.goal`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ge2hist_core.config import VISIBLE_CLASS
from ge2hist_core.support import OUTSIDE
from ge2hist_core.types import BadInput, Cells
from perturb.edits import Edit, Perturbation
from perturb.run import choose_cells
from perturb.targets import NicheTarget, ReadoutTarget, Target

if TYPE_CHECKING:
    from ge2hist_core.data import H5adSource
    from ge2hist_core.model import GE2Hist
    from perturb.goal import Goal

__all__ = ["Aim", "Setting", "View", "niche_target", "pareto", "search"]


def visible_class(cell_type: str) -> str:
    return VISIBLE_CLASS.get(cell_type, cell_type)


class View:
    """Cells as the niche network sees them: ``counts [cell, class]`` expected neighbours, ``support [cell]``."""

    def __init__(self, model: GE2Hist, cells: Cells, seed: int) -> None:
        embedding = model.embed(cells, seed)
        by_type = model.expected_neighbours(model.encode(embedding))
        visible = np.array([visible_class(name) for name in model.cell_types], dtype=object)
        self.classes = tuple(dict.fromkeys(visible))
        self.counts = np.stack([by_type[:, visible == name].sum(axis=1) for name in self.classes], axis=1)
        self.area_mm2 = (model.config.tile_px * model.config.um_per_px / 1000.0) ** 2
        self.support = np.full(len(cells), np.nan) if model.support is None else model.support.p(embedding)

    def readout(self, name: str) -> np.ndarray:
        """``[cell]`` density (cells/mm2, the cell itself included) or share of a class."""
        total = self.counts.sum(axis=1)
        if name == "density":
            return (total + 1) / self.area_mm2
        return self.counts[:, self.classes.index(name.partition(":")[2])] / np.maximum(total, 1e-9)

    @property
    def unsupported(self) -> float:
        """Mean over cells of ``max(0, 1 - p / OUTSIDE)``; 0 where the model cannot tell."""
        return float(np.maximum(0.0, 1.0 - np.nan_to_num(self.support, nan=1.0) / OUTSIDE).mean())


class Aim:
    """A target as seen from the start: distances of expected niches, and the way there as one axis per cell.

    ``gap``: mean distance of the start. ``axis``: ``[cell, class]`` unit vectors in root counts, or ``[cell]`` signs.
    """

    def __init__(self, target: Target, start: View) -> None:
        self.target = target
        if isinstance(target, NicheTarget):
            if target.classes != start.classes:
                raise BadInput(f"The target {target} was made with another model: make it again with this one.")
            self.wished = np.sqrt(np.array(target.counts))[None]
            way = self.wished - np.sqrt(start.counts)
            far = np.linalg.norm(way, axis=1)
            self.axis = way / np.maximum(far, 1e-12)[:, None]
        else:
            name = target.readout.partition(":")[2]
            if name and name not in start.classes:
                raise BadInput(f"This model knows no {name!r}: choose one of {', '.join(start.classes)}.")
            now = start.readout(target.readout)
            self.wished = np.full_like(now, target.value) if target.value is not None else now + target.change
            if ((self.wished < 0) | (self.wished > target.largest)).any():
                raise BadInput(
                    f"change of {target.readout} is {target.change:+g} from {now.mean():.4g}, beyond what it can be: "
                    "choose a smaller one."
                )
            self.axis = np.sign(self.wished - now)
        self.gap = self.distance(start)
        if self.gap < 1e-9:
            raise BadInput(f"The cells are where the target ({target}) wants them: choose another target.")
        self._start = self.along(start)

    def _place(self, view: View) -> np.ndarray:
        return np.sqrt(view.counts) if isinstance(self.target, NicheTarget) else view.readout(self.target.readout)

    def distance(self, view: View) -> float:
        """Mean over cells, root counts or the readout's unit."""
        way = self._place(view) - self.wished
        return float((np.linalg.norm(way, axis=1) if way.ndim == 2 else np.abs(way)).mean())

    def along(self, view: View) -> np.ndarray:
        """``[cell]`` place on the way to the target."""
        at = self._place(view) * self.axis
        return at.sum(axis=1) if at.ndim == 2 else at

    def towards(self, view: View) -> float:
        """Mean over cells of the expected movement along the way."""
        return float((self.along(view) - self._start).mean())


class Setting:
    """A goal with its model and cells: the start, and the judgement of sets."""

    def __init__(self, goal: Goal, model: GE2Hist, cells: Cells) -> None:
        if model.sha256 != goal.recipe.model_sha256:
            raise BadInput(
                f"The goal was made with model {goal.recipe.model_sha256[:12]}, but {model.sha256[:12]} is loaded: "
                "load that bundle or make the goal again."
            )
        self.goal, self.model, self.cells = goal, model, cells
        self._chosen = choose_cells(cells, goal.recipe.cell_ids)
        self.start = self.view(())
        self.aim = Aim(goal.target, self.start)

    def view(self, edits: Sequence[Edit]) -> View:
        perturbation = self.goal.edited(edits, (0,)).perturbation
        # One set at a time: scGPT breaks ties by the cell's name, which only one cell of a batch can bear.
        return View(self.model, perturbation.apply(self._chosen, self.cells), self.goal.recipe.encoder_seed)

    def row(self, edits: Sequence[Edit], view: View | None = None) -> dict[str, Any]:
        """The judgement of one set: a row of :func:`search`'s table."""
        view = self.view(edits) if view is None else view
        distance = self.aim.distance(view)
        row = {
            "edits": str(Perturbation(tuple(edits))),
            "size": len(edits),
            "closed": 1.0 - distance / self.aim.gap,
            "distance": distance,
            "towards": self.aim.towards(view),
            "support": float(view.support.mean()),
            "outside": int((view.support < OUTSIDE).sum()),
            "objective": distance / self.aim.gap + self.goal.penalty * view.unsupported,
            "density": float(view.readout("density").mean()),
        }
        target = self.goal.target
        if isinstance(target, ReadoutTarget):
            return row | {target.readout: float(view.readout(target.readout).mean())}
        if target.real is not None:
            way = np.sqrt(view.counts) - np.sqrt(np.array(target.real))[None]
            row["distance_real"] = float(np.linalg.norm(way, axis=1).mean())
        return row

    def search(self, tick: Callable[[str], None] | None) -> Iterator[pd.DataFrame]:
        """As :func:`search`."""
        goal, edits = self.goal, self.goal.candidates
        rows = [self.row((), self.start)]
        objective: dict[tuple[int, ...], float] = {}

        def judge(members: tuple[int, ...], text: str) -> None:
            rows.append(self.row([edits[i] for i in members]))
            objective[members] = rows[-1]["objective"]
            if tick is not None:
                tick(text)

        for i in range(len(edits)):
            judge((i,), "Trying single edits")
        yield pd.DataFrame(rows)
        best_of_gene: dict[str, int] = {}
        for (i,) in sorted(objective, key=lambda members: (objective[members], members)):
            best_of_gene.setdefault(edits[i].gene, i)
        shortlist = list(best_of_gene.values())[: goal.shortlist]
        for size in goal.sizes[1:]:
            shorter = (members for members in objective if len(members) == size - 1)
            beam = sorted(shorter, key=lambda members: (objective[members], members))[: goal.beam]
            for members in beam:
                genes = {edits[i].gene for i in members}
                for i in shortlist:
                    # Edits of different genes commute, so that a set has one order: that of the candidates.
                    longer = tuple(sorted((*members, i)))
                    if edits[i].gene not in genes and longer not in objective:
                        judge(longer, f"Trying sets of {size} edits")
            yield pd.DataFrame(rows)


def search(
    goal: Goal, model: GE2Hist, cells: Cells, *, tick: Callable[[str], None] | None = None
) -> Iterator[pd.DataFrame]:
    """First stage, size by size; yields the table so far, the last one is whole.

    Parameters
    ----------
    cells: as for :func:`perturb.run.run`.
    tick: called with a text after each judged set; may raise to stop.

    Returns
    -------
    DataFrames in the order of judgement, the start first: ``edits`` (text, "" for the start), ``size``; ``closed``
    (share of the gap, 1 at the target, below 0 farther away than the start); ``distance`` to the target and
    ``towards``, the movement along the way there (root counts, or the readout's unit); ``support`` (mean p over
    cells), ``outside`` (number of cells with p < 0.05), ``objective``; ``density`` (cells/mm2) and the target's
    readout, as expected; ``distance_real`` to the real tile's root counts where these are known.

    Raises
    ------
    BadInput: another model than the recipe's, a target that cannot be reached or is reached already, an edit that
        cannot be made.
    """
    yield from Setting(goal, model, cells).search(tick)


def pareto(searched: pd.DataFrame) -> pd.DataFrame:
    """The start, and of the sets nearer to the target than the start those that no other beats.

    One set beats another where it has no more edits, no lower support and no larger distance, and is better in one of
    the three; of equal ones the first is kept. Without a support p, edits and distance alone count.

    Parameters
    ----------
    searched: a table of :func:`search`.

    Returns
    -------
    Its columns, ordered by size, then distance, the nearest last.
    """
    nearer = searched["distance"] < searched["distance"].iloc[0]
    table = searched[nearer | (searched["size"] == 0)]
    cost = np.stack([table["size"], -table["support"].fillna(0.0), table["distance"]], axis=1).astype(np.float64)
    keep = []
    for i, one in enumerate(cost):
        no_worse = (cost <= one).all(axis=1)
        better = no_worse & (cost < one).any(axis=1)
        same_before = (cost[:i] == one).all(axis=1)
        keep.append(not better.any() and not same_before.any())
    kept = table[np.array(keep, dtype=bool)]
    return kept.sort_values(["size", "distance"], ascending=[True, False], kind="stable").reset_index(drop=True)


def niche_target(source: H5adSource, cell_id: str, model: GE2Hist, encoder_seed: int = 0) -> NicheTarget:
    """The niche of a cell of a file: what the model expects, and the real tile's counts where the file tells them.

    Real counts are read from the columns ``niche_density:<class>`` (cells/mm2) that ``ge2hist_core demo-cells`` writes;
    the cell itself is taken off its own class.

    Raises
    ------
    BadInput: no such cell, or a cell without counts.
    """
    cell = source.take([source.index_of(cell_id)])
    view = View(model, cell, encoder_seed)
    columns = [f"niche_density:{name}" for name in view.classes]
    real = None
    if cell.cell_type is not None and set(columns) <= set(source.obs.columns):
        row = source.obs.iloc[source.index_of(cell_id)]
        values = pd.to_numeric(row[columns], errors="coerce").to_numpy(np.float64) * view.area_mm2
        values[[name == visible_class(cell.cell_type[0]) for name in view.classes]] -= 1
        real = tuple(np.maximum(values, 0.0).round(6).tolist()) if np.isfinite(values).all() else None
    return NicheTarget(cell_id, view.classes, tuple(view.counts[0].tolist()), real)
