"""Goal search: which at most three edits move a cell's niche towards a wished one? ``python -m perturb goal``.

The wish is a readout's value or change (:class:`ReadoutTarget`) or the niche of another cell (:class:`NicheTarget`).

1. **Search.** Sets of edits are judged by the neighbours that the model expects (:meth:`GE2Hist.expected_neighbours`),
   without a picture: all candidates alone, then the leading sets with one more edit each (beam search). A set's
   objective is

       distance / gap + penalty * mean over cells of max(0, 1 - p / 0.05),

   where ``gap`` is the distance before the search's edits and ``p`` the support of the edited cell
   (:mod:`ge2hist_core.support`): 1 before any edit of a cell inside the data, 0 at the target.
2. **Confirm.** The leading sets of each size are drawn with the same noise as the cell that the search started from. A
   first set of seeds chooses one set per size; what is stated of it comes from *further* seeds, beside random sets of
   the same kinds of edits on genes of like expression, drawn alike.

The distance to a readout's wish is its absolute difference, in the readout's unit. The distance to a niche is the
Euclidean one between root counts of the expected neighbours by visible class: the root of a Poisson count has a
standard deviation of about 1/2 whatever its mean, so that all classes weigh alike. Both are means over cells.

The search optimises the model's own expectation: it finds what the model believes, not what a tissue would do.
Everything that decides the result is in the :class:`Goal`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ge2hist_core import rng
from ge2hist_core.config import VISIBLE_CLASS
from ge2hist_core.support import OUTSIDE
from ge2hist_core.types import BadInput, Cells
from perturb.edits import MIN_REFERENCE, Edit, Perturbation
from perturb.recipe import Recipe
from perturb.result import pack_table, unpack_table
from perturb.run import Progress, choose_cells, run
from perturb.screen import MATCHED, READOUTS
from perturb.stats import bh_fdr, crossed_effect
from perturb.tables import UNITS

if TYPE_CHECKING:
    from ge2hist_core.data import H5adSource
    from ge2hist_core.model import GE2Hist
    from perturb.cache import DiskCache
    from perturb.result import Result

__all__ = [
    "MAX_EDITS",
    "Goal",
    "GoalResult",
    "NicheTarget",
    "ReadoutTarget",
    "default_candidates",
    "load_goal",
    "niche_target",
    "pareto",
    "random_sets",
    "run_goal",
    "search",
    "sentences",
]

MAX_EDITS = 3
MAX_CANDIDATES = 5000
COMMON = 0.1
"""Share of the donor's cells that express a silent gene, at least, for it to be a candidate."""
GUESS = 0.1
"""What judging a set costs, in pictures; for the progress alone."""
TOWARDS = "towards"
"""Name of the movement along the way to the target, in the unit of the distance."""


@dataclass(frozen=True)
class ReadoutTarget:
    """A wished value of a readout, or a wished change of it.

    Parameters
    ----------
    readout: ``density`` (cells/mm2) or ``fraction:<class>`` (0 to 1).
    value, change: one of the two, in the readout's unit.

    Raises
    ------
    BadInput: another readout, both or neither of value and change, a number that the readout cannot have.
    """

    readout: str
    value: float | None = None
    change: float | None = None

    def __post_init__(self) -> None:
        known = [name for name in READOUTS if name != "spacing"]
        if self.readout not in known:
            raise BadInput(f"readout is {self.readout!r}: choose {', '.join(known)}.")
        if (self.value is None) == (self.change is None):
            raise BadInput(f"The target for {self.readout} needs either a value or a change: give one of the two.")
        for name in ("value", "change"):
            if getattr(self, name) is None:
                continue
            number = float(getattr(self, name))
            if not math.isfinite(number):
                raise BadInput(f"{name} of {self.readout} is {number!r}: give a finite number.")
            object.__setattr__(self, name, number)
        if self.value is not None and not 0 <= self.value <= self.largest:
            raise BadInput(f"value of {self.readout} is {self.value:g}: choose a number from 0 to {self.largest:g}.")
        if self.change == 0:
            raise BadInput(f"change of {self.readout} is 0: give a change, above 0 for more and below 0 for less.")

    @property
    def largest(self) -> float:
        """Largest possible value."""
        return math.inf if self.readout == "density" else 1.0

    @property
    def unit(self) -> str:
        return UNITS[self.readout.partition(":")[0]]

    def __str__(self) -> str:
        wish = f"{self.change:+g}" if self.value is None else f"to {self.value:g}"
        return f"{self.readout} {wish} {'' if self.unit == 'fraction' else self.unit}".strip()


@dataclass(frozen=True)
class NicheTarget:
    """The niche of another cell. Make one with :func:`niche_target`.

    Parameters
    ----------
    cell_id: of the other cell.
    classes: visible classes of the model's cell types.
    counts: ``[class]`` other nuclei that the model expects in that cell's tile: what the search aims at.
    real: ``[class]`` other nuclei that its real tile holds, where known. One tile is one noisy draw, so it is no aim;
        the distance to it is stated beside.

    Raises
    ------
    BadInput: counts that are not one finite number >= 0 per class.
    """

    cell_id: str
    classes: tuple[str, ...]
    counts: tuple[float, ...]
    real: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("counts", "real"):
            values = getattr(self, name)
            if values is None:
                continue
            values = tuple(float(value) for value in values)
            if len(values) != len(self.classes) or not all(0 <= value < math.inf for value in values):
                raise BadInput(
                    f"{name} of the target {self.cell_id!r} is {values!r}: give one number >= 0 for each of "
                    f"{len(self.classes)} classes."
                )
            object.__setattr__(self, name, values)

    @property
    def unit(self) -> str:
        return "root counts"

    def __str__(self) -> str:
        return f"niche of cell {self.cell_id}"


Target = ReadoutTarget | NicheTarget


@dataclass(frozen=True)
class Goal:
    """What to reach, from which cells, with which edits.

    Parameters
    ----------
    recipe: cells, sampler and the encoder's seed; its own edits are made first and the search starts from there. Its
        seeds are not used.
    target: what to reach.
    candidates: edits to choose from, such as :func:`default_candidates`; a set holds at most one per gene.
    max_edits: 1 to 3.
    penalty: what a cell far outside the data costs, in units of the gap; 0 ignores the support.
    shortlist: best candidates, one per gene, that sets of two and three are made of.
    beam: sets of one size that are carried on to the next.
    keep: leading sets of each size that the first seeds choose from.
    first_seeds, further_seeds: seeds that choose, and seeds that the stated numbers come from.
    random: random sets that the chosen set's objective is compared with, at most.
    controls: how many of them are drawn.

    Raises
    ------
    BadInput: a field out of range, a candidate given twice or on a gene that the recipe edits, seeds shared by both, a
        recipe whose edits spread through a network.
    """

    recipe: Recipe
    target: Target
    candidates: tuple[Edit, ...]
    max_edits: int = MAX_EDITS
    penalty: float = 1.0
    shortlist: int = 24
    beam: int = 6
    keep: int = 3
    first_seeds: tuple[int, ...] = (0, 1, 2, 3)
    further_seeds: tuple[int, ...] = (4, 5, 6, 7, 8, 9, 10, 11)
    random: int = 99
    controls: int = 5

    def __post_init__(self) -> None:
        object.__setattr__(self, "candidates", tuple(self.candidates))
        if not self.candidates:
            raise BadInput("The goal has no candidate: give edits of genes that the model knows.")
        if len(self.candidates) > MAX_CANDIDATES:
            raise BadInput(f"The goal has {len(self.candidates)} candidates: give at most {MAX_CANDIDATES}.")
        names = [str(candidate) for candidate in self.candidates]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise BadInput(f"The goal has the candidate {twice} twice: give it once.")
        if self.recipe.propagation is not None:
            raise BadInput("The recipe spreads edits through a network, which the search cannot follow: leave it out.")
        own = set(self.recipe.perturbation.genes)
        for candidate in self.candidates:
            if candidate.gene in own:
                raise BadInput(
                    f"The candidate {candidate} edits a gene that the recipe edits already: leave out one of the two."
                )
        if self.max_edits not in range(1, MAX_EDITS + 1):
            raise BadInput(f"max_edits is {self.max_edits!r}: choose 1 to {MAX_EDITS}.")
        if not 0 <= self.penalty < math.inf:
            raise BadInput(f"penalty is {self.penalty!r}: choose a number >= 0.")
        object.__setattr__(self, "penalty", float(self.penalty))
        for name in ("shortlist", "beam", "keep", "random"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}: choose at least 1.")
        if not 0 <= self.controls <= self.random:
            raise BadInput(f"controls is {self.controls}: choose 0 to {self.random}, the number of random sets.")
        for name in ("first_seeds", "further_seeds"):
            if len(getattr(self, name)) < 2:
                raise BadInput(f"{name} has {len(getattr(self, name))} seeds: give at least 2.")
        if set(self.first_seeds) & set(self.further_seeds):
            raise BadInput("first_seeds and further_seeds share a seed: a statement needs seeds that chose nothing.")

    def to_dict(self) -> dict[str, Any]:
        """All that decides the result, as plain JSON."""
        fields = {name: value for name, value in vars(self).items() if name in self.__dataclass_fields__}
        kind = "readout" if isinstance(self.target, ReadoutTarget) else "niche"
        return fields | {
            "recipe": replace(self.recipe, seeds=(0,)).to_dict(),
            "target": {"kind": kind} | asdict(self.target),
            "candidates": [str(candidate) for candidate in self.candidates],
        }

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all that decides the result."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    @property
    def sizes(self) -> range:
        """Numbers of edits that sets can have."""
        return range(1, min(self.max_edits, len({candidate.gene for candidate in self.candidates})) + 1)

    @property
    def guesses(self) -> int:
        """How many sets are judged without drawing, at most."""
        longer = (len(self.sizes) - 1) * self.beam * self.shortlist
        return 1 + len(self.candidates) + longer + len(self.sizes) * self.random

    @property
    def pictures(self) -> int:
        """How many pictures are drawn, at most, those of the start and of the random sets among them."""
        first = len(self.first_seeds) if self.keep > 1 else 0
        further = len(self.further_seeds)
        starts = 2 if self.recipe.perturbation else 1  # with edits of its own, the unedited cell is drawn beside it
        per_size = self.keep * first + (1 + self.controls) * further
        return len(self.recipe.cell_ids) * (len(self.sizes) * per_size + starts * (first + further))

    def edited(self, edits: Sequence[Edit], seeds: tuple[int, ...]) -> Recipe:
        """The recipe of a set: the recipe's own edits, then the set's."""
        parts = (*self.recipe.perturbation.parts, *edits)
        return replace(self.recipe, perturbation=Perturbation(parts), seeds=seeds)


@dataclass(frozen=True, eq=False)
class GoalResult:
    """What came out.

    Parameters
    ----------
    goal_hash: of the :class:`Goal`.
    searched: sets of at least one edit that were judged, random ones not counted.
    tradeoff: the sets that no other beats in all of number of edits, support and distance: see :func:`pareto`.
    confirmed: what was drawn: see :func:`run_goal`. Fewer rows where the run was cancelled.
    complete: False for the partial result of a run under way or cancelled.
    """

    goal_hash: str
    searched: int
    tradeoff: pd.DataFrame
    confirmed: pd.DataFrame
    complete: bool


# --- what to reach, what to choose from -----------------------------------------------------------------------------


def niche_target(source: H5adSource, cell_id: str, model: GE2Hist, encoder_seed: int = 0) -> NicheTarget:
    """The niche of a cell of a file: what the model expects, and the real tile's counts where the file tells them.

    Real counts are read from the columns ``niche_density:<class>`` (cells/mm2) that ``ge2hist_core demo-cells`` writes;
    the cell itself is taken off its own class.

    Raises
    ------
    BadInput: no such cell, or a cell without counts.
    """
    cell = source.take([source.index_of(cell_id)])
    view = _View(model, cell, encoder_seed)
    columns = [f"niche_density:{name}" for name in view.classes]
    real = None
    if cell.cell_type is not None and set(columns) <= set(source.obs.columns):
        row = source.obs.iloc[source.index_of(cell_id)]
        values = pd.to_numeric(row[columns], errors="coerce").to_numpy(np.float64) * view.area_mm2
        values[[name == _visible(cell.cell_type[0]) for name in view.classes]] -= 1
        real = tuple(np.maximum(values, 0.0).round(6).tolist()) if np.isfinite(values).all() else None
    return NicheTarget(cell_id, view.classes, tuple(view.counts[0].tolist()), real)


def default_candidates(recipe: Recipe, cells: Cells, model: GE2Hist, most: int = 600) -> tuple[Edit, ...]:
    """Edits worth trying on the recipe's cells: of genes that the model knows and that the recipe does not edit.

    Genes that the cells express, those of the highest mean count first: knock-out, x4, x0.5, x2. Genes that none of
    them expresses but at least 10 % of the other cells of their donors among ``cells`` do (of all of ``cells`` where
    these are fewer than 20), the most common first: the 90th percentile of the cells' types where there is one above
    0, else the median count where expressed. The five kinds take turns until there are ``most``.

    Parameters
    ----------
    cells: as for :func:`perturb.run.run`.

    Raises
    ------
    BadInput: ``most`` below 1; no known gene is left.
    """
    if most < 1:
        raise BadInput(f"most is {most}: choose at least 1 candidate.")
    genes = _Genes(recipe, cells, model)
    expressed = sorted(genes.usable(expressed=True), key=lambda gene: -genes.level[gene])
    common = {gene: genes.common[gene] for gene in genes.usable(expressed=False) if genes.common[gene] >= COMMON}
    silent = sorted(common, key=lambda gene: -common[gene])
    at_p90 = genes.percentile(silent, 90.0)
    kinds = [
        [Edit(gene, "ko") for gene in expressed],
        [
            Edit(gene, "percentile", 90) if at_p90.get(gene, 0.0) > 0 else Edit(gene, "set", genes.usual(gene))
            for gene in silent
        ],
        *([Edit(gene, "factor", factor) for gene in expressed] for factor in (4, 0.5, 2)),
    ]
    turns = [edits[i] for i in range(max(map(len, kinds))) for edits in kinds if i < len(edits)]
    if not turns:
        raise BadInput("No gene of these cells is left to edit: the model must know it and the recipe not edit it.")
    return tuple(turns[:most])


class _Genes:
    """What the choice of candidates and of random genes looks at, by gene name."""

    def __init__(self, recipe: Recipe, cells: Cells, model: GE2Hist) -> None:
        self._cells = cells
        self._chosen = choose_cells(cells, recipe.cell_ids)
        start = recipe.perturbation.apply(self._chosen, cells)
        self._known = set(cells.genes[np.asarray(model.scgpt.match(cells.genes).ids) >= 0])
        self._known -= set(recipe.perturbation.genes)
        self._column: dict[str, int] = {}
        for column, gene in enumerate(cells.genes):
            self._column.setdefault(str(gene), column)
        self.level = self._by_gene(start.counts.mean(axis=0))
        """Mean count in the recipe's cells at the start."""
        peers = self._peers()
        self.around = self._by_gene(peers.mean(axis=0))
        """Mean count in the other cells of the donors."""
        self.common = self._by_gene((peers > 0).mean(axis=0))
        """Share of these that express it."""
        self._peers_by_column = peers.tocsc()

    def usable(self, *, expressed: bool) -> list[str]:
        """Known genes in the order of the data."""
        return [gene for gene in self._column if gene in self._known and (self.level[gene] > 0) == expressed]

    def usual(self, gene: str) -> float:
        """Median count of the other cells of the donors that express the gene, at least 1."""
        counts = self._peers_by_column[:, [self._column[gene]]].data
        return max(1.0, float(np.median(counts))) if len(counts) else 1.0

    def percentile(self, genes: Sequence[str], amount: float) -> dict[str, float]:
        """The lowest over the recipe's cells' types; nothing where a type is unknown or has too few cells."""
        types, known = self._chosen.cell_type, self._cells.cell_type
        if types is None or known is None or not genes:
            return {}
        columns, lowest = [self._column[gene] for gene in genes], np.full(len(genes), np.inf)
        for name in dict.fromkeys(types):
            peers = np.flatnonzero(known == name)
            if len(peers) < MIN_REFERENCE:
                return {}
            block = self._cells.counts[peers].tocsc()[:, columns].toarray()
            lowest = np.minimum(lowest, np.percentile(block, amount, axis=0))
        return dict(zip(genes, lowest.tolist(), strict=True))

    def _peers(self) -> Any:
        own = np.isin(self._cells.cell_id, self._chosen.cell_id)
        if self._cells.donor is not None and self._chosen.donor is not None:
            same = np.isin(self._cells.donor, self._chosen.donor) & ~own
            if same.sum() >= MIN_REFERENCE:
                return self._cells.counts[np.flatnonzero(same)]
        return self._cells.counts if own.all() else self._cells.counts[np.flatnonzero(~own)]

    def _by_gene(self, values: Any) -> dict[str, float]:
        flat = np.asarray(values, dtype=np.float64).ravel()
        return {gene: float(flat[column]) for gene, column in self._column.items()}


def random_sets(
    goal: Goal, edits: Sequence[Edit], cells: Cells, model: GE2Hist, n: int | None = None
) -> list[tuple[Edit, ...]]:
    """Different random sets of the same kinds of edits on other genes of like expression, the same ones every time.

    Each gene is replaced by one of the 30 known genes nearest to it in level: the mean count in the recipe's cells
    where they express it, else in the other cells of their donors. An edit to a percentile is only made on silent genes
    whose percentile is above 0, since it does nothing on the others.

    Returns
    -------
    At most ``n`` sets (by default ``goal.random``), fewer where there are not so many different ones.
    """
    n = goal.random if n is None else n
    genes = _Genes(goal.recipe, cells, model)
    taken = {edit.gene for edit in edits}
    pools = [_alike(genes, edit, taken) for edit in edits]
    draws = rng.stream(goal.recipe.encoder_seed, "goal random", str(Perturbation(tuple(edits))))
    found: dict[frozenset[Edit], tuple[Edit, ...]] = {}
    for _ in range(20 * n):
        chosen = [pool[int(draws.integers(len(pool)))] if pool else "" for pool in pools]
        if all(chosen) and len(set(chosen)) == len(chosen):
            one = tuple(replace(edit, gene=gene) for edit, gene in zip(edits, chosen, strict=True))
            found.setdefault(frozenset(one), one)
        if len(found) == n:
            break
    return list(found.values())


def _alike(genes: _Genes, edit: Edit, taken: set[str]) -> list[str]:
    expressed = genes.level[edit.gene] > 0
    level = genes.level if expressed else genes.around
    others = [gene for gene in genes.usable(expressed=expressed) if gene not in taken]
    if edit.kind == "percentile" and not expressed:
        at = genes.percentile(others, edit.amount)
        others = [gene for gene in others if at.get(gene, 0.0) > 0]
    return sorted(others, key=lambda gene: abs(math.log1p(level[gene]) - math.log1p(level[edit.gene])))[:MATCHED]


# --- the search -----------------------------------------------------------------------------------------------------


def _visible(cell_type: str) -> str:
    return VISIBLE_CLASS.get(cell_type, cell_type)


class _View:
    """Cells as the niche network sees them: ``counts [cell, class]`` expected neighbours, ``support [cell]``."""

    def __init__(self, model: GE2Hist, cells: Cells, seed: int) -> None:
        embedding = model.embed(cells, seed)
        by_type = model.expected_neighbours(model.encode(embedding))
        visible = np.array([_visible(name) for name in model.cell_types], dtype=object)
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


class _Aim:
    """A target as seen from the start: distances of expected niches, and the way there as one axis per cell.

    ``gap``: mean distance of the start. ``axis``: ``[cell, class]`` unit vectors in root counts, or ``[cell]`` signs.
    """

    def __init__(self, target: Target, start: _View) -> None:
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

    def _place(self, view: _View) -> np.ndarray:
        return np.sqrt(view.counts) if isinstance(self.target, NicheTarget) else view.readout(self.target.readout)

    def distance(self, view: _View) -> float:
        """Mean over cells, root counts or the readout's unit."""
        way = self._place(view) - self.wished
        return float((np.linalg.norm(way, axis=1) if way.ndim == 2 else np.abs(way)).mean())

    def along(self, view: _View) -> np.ndarray:
        """``[cell]`` place on the way to the target."""
        at = self._place(view) * self.axis
        return at.sum(axis=1) if at.ndim == 2 else at

    def towards(self, view: _View) -> float:
        """Mean over cells of the expected movement along the way."""
        return float((self.along(view) - self._start).mean())


class _Setting:
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
        self.aim = _Aim(goal.target, self.start)

    def view(self, edits: Sequence[Edit]) -> _View:
        perturbation = self.goal.edited(edits, (0,)).perturbation
        # One set at a time: scGPT breaks ties by the cell's name, which only one cell of a batch can bear.
        return _View(self.model, perturbation.apply(self._chosen, self.cells), self.goal.recipe.encoder_seed)

    def row(self, edits: Sequence[Edit], view: _View | None = None) -> dict[str, Any]:
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
    yield from _search(_Setting(goal, model, cells), tick)


def _search(setting: _Setting, tick: Callable[[str], None] | None) -> Iterator[pd.DataFrame]:
    goal, edits = setting.goal, setting.goal.candidates
    rows = [setting.row((), setting.start)]
    objective: dict[tuple[int, ...], float] = {}

    def judge(members: tuple[int, ...], text: str) -> None:
        rows.append(setting.row([edits[i] for i in members]))
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


# --- what the pictures say ------------------------------------------------------------------------------------------


class _Drawn:
    """One arm as the reader saw it: ``roots [cell, seed, class]`` of the other nuclei, ``values`` by readout."""

    def __init__(self, result: Result, arm: str, classes: Sequence[str]) -> None:
        shape = (len(result.recipe.cell_ids), len(result.recipe.seeds))
        niches, tables = getattr(result, arm), getattr(result, f"{arm}_nuclei")
        counts = np.zeros((len(tables), len(classes)))
        for i, (niche, nuclei) in enumerate(zip(niches, tables, strict=True)):
            height, width = (side * niche.um_per_px for side in niche.image.shape[:2])
            centre = np.hypot(nuclei["x_um"] - width / 2, nuclei["y_um"] - height / 2).to_numpy()
            others = np.arange(len(nuclei)) != (centre.argmin() if len(nuclei) else -1)  # the cell is in the centre
            found = nuclei["cell_type"].to_numpy()[others]
            counts[i] = [(found == name).sum() for name in classes]
        self.roots = np.sqrt(counts).reshape(*shape, len(classes))
        rows = result.readouts[result.readouts["arm"] == arm]
        self.values = {
            str(name): part["value"].to_numpy(np.float64).reshape(shape)
            for name, part in rows.groupby("readout", sort=False)
        }

    def along(self, aim: _Aim) -> np.ndarray:
        """``[cell, seed]`` place on the way to the target."""
        if isinstance(aim.target, NicheTarget):
            return np.einsum("csk,ck->cs", self.roots, aim.axis)
        return self.values[aim.target.readout] * aim.axis[:, None]


def _effects(setting: _Setting, edits: Sequence[Edit], start: _Drawn, drawn: _Drawn, *, all_: bool) -> pd.DataFrame:
    """Paired movement along the way and, where ``all_``, of every readout: rows of ``confirmed``."""
    goal, aim, view = setting.goal, setting.aim, setting.view(edits)
    expected = {TOWARDS: aim.towards(view)}
    pairs = {TOWARDS: (start.along(aim), drawn.along(aim))}
    for name in READOUTS if all_ else ():
        base, edited = start.values[name], drawn.values[name]
        if ":" in name and not (np.nan_to_num(base).any() or np.nan_to_num(edited).any()):
            continue
        pairs[name] = base, edited
        if name == "density" or name.partition(":")[2] in view.classes:
            expected[name] = float((view.readout(name) - setting.start.readout(name)).mean())
    rows = []
    for name, (base, edited) in pairs.items():
        found = crossed_effect(base, edited, goal.recipe.encoder_seed)
        both = np.isfinite(base) & np.isfinite(edited)
        surrogate = expected.get(name, math.nan)
        rows.append(
            {
                "size": len(edits),
                "edits": str(Perturbation(tuple(edits))),
                "readout": name,
                "unit": goal.target.unit if name == TOWARDS else UNITS[name.partition(":")[0]],
                "surrogate": surrogate,
                "start": float(base[both].mean()) if both.any() else math.nan,
                "end": float(edited[both].mean()) if both.any() else math.nan,
                "effect": found.value,
                "low": found.low,
                "high": found.high,
                "p": found.p,
                "n": found.n,
                "share": found.value / aim.gap if name == TOWARDS else math.nan,
                "surrogate_inside": bool(found.low <= surrogate <= found.high),
                "support": float(view.support.mean()),
                "outside": int((view.support < OUTSIDE).sum()),
            }
        )
    return pd.DataFrame(rows)


def _verdict(row: Any) -> str:
    """Whether the drawing goes the way that the search expected."""
    if row.readout != TOWARDS or not math.isfinite(row.low):
        return ""
    if row.p >= 0.05:  # the interval of few seeds that mostly do not move can exclude 0 where the test does not
        return "open"
    return "agrees" if row.low > 0 else "disagrees" if row.high < 0 else "open"


CONFIRMED = (
    *("size", "edits", "role", "readout", "unit", "surrogate", "start", "end", "effect", "low", "high", "p", "q", "n"),
    *("share", "verdict", "surrogate_inside", "support", "outside", "p_random", "n_random"),
)


def _confirmed(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    if not parts:
        return pd.DataFrame(columns=list(CONFIRMED))
    table = pd.concat(parts, ignore_index=True)
    table["q"] = bh_fdr(np.where(table["role"] == "found", table["p"], np.nan))
    table["verdict"] = [_verdict(row) for row in table.itertuples()]
    return table[list(CONFIRMED)]


class _Work:
    """Progress and cancel of both stages."""

    def __init__(
        self, goal: Goal, on_progress: Callable[[Progress], None] | None, cancel: threading.Event | None
    ) -> None:
        self._goal = goal
        self._total = GUESS * goal.guesses + goal.pictures
        self._done = 0.0
        self._on_progress, self._cancel = on_progress, cancel

    def searched(self, size: int) -> None:
        """Sets of this size are judged, fewer perhaps than were allowed for."""
        longer = (size - 1) * self._goal.beam * self._goal.shortlist
        self._done = max(self._done, GUESS * (1 + len(self._goal.candidates) + longer))

    def drawn(self, size: int) -> None:
        """What there is to draw of this size is drawn."""
        goal = self._goal
        judged = GUESS * (goal.guesses - goal.random * len(goal.sizes))
        self._done = max(self._done, judged + (self._total - judged) * size / len(goal.sizes))

    def guessed(self, text: str) -> None:
        from ge2hist_core.sampler import Stopped

        if self._cancel is not None and self._cancel.is_set():
            raise Stopped
        self._done += GUESS
        self._tell(0.0, text, None)

    def draw(self, setting: _Setting, edits: Sequence[Edit], seeds: tuple[int, ...], cache: DiskCache) -> Result:
        recipe = setting.goal.edited(edits, seeds)
        pictures = len(recipe.cell_ids) * len(seeds)

        def report(progress: Progress) -> None:
            text = f"Drawing {Perturbation(tuple(edits))}" if edits else "Drawing the start"
            self._tell(progress.fraction * pictures, text[:80], progress.preview)

        result = run(recipe, setting.model, setting.cells, cache=cache, on_progress=report, cancel=self._cancel)
        self._done += pictures
        return result

    def _tell(self, more: float, text: str, preview: Any) -> None:
        if self._on_progress is not None:
            self._on_progress(Progress(min(1.0, (self._done + more) / self._total), text, preview))

    def finish(self) -> None:
        self._done = self._total
        self._tell(0.0, "Done", None)


def run_goal(
    goal: Goal,
    model: GE2Hist,
    cells: Cells,
    cache: DiskCache,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> GoalResult:
    """Both stages. Pictures that are drawn are kept in the cache: a run that is cancelled or killed goes on from there.

    A size without a set that is nearer to the target and has a lower objective than the start is not drawn.

    Returns
    -------
    Its ``confirmed`` has one row per drawn set and readout, ``readout`` being ``towards`` (movement along the way to
    the target: root counts, or the readout's unit), ``density``, ``spacing`` or ``fraction:<class>``; random sets have
    the first alone. ``role`` (``found`` or ``random``); ``surrogate``, the expected change; ``start`` and ``end``,
    means over pictures; ``effect, low, high, p, n``, paired over ``further_seeds`` (and cells, see
    :func:`perturb.stats.crossed_effect`); ``q`` (Benjamini-Hochberg over the found sets' rows); ``share`` of the
    expected gap; ``verdict`` (``agrees``: the interval of ``towards`` lies above 0 and p < 0.05, ``disagrees``: below
    0 and p < 0.05, else ``open``, which fewer than 6 seeds of one cell always are);
    ``surrogate_inside``: the expected change lies in the interval; ``support``, ``outside`` as in :func:`search`;
    ``p_random = (b + 1) / (n_random + 1)`` with ``b`` of ``n_random`` random sets (:func:`random_sets`) of no larger
    objective, without drawing. The set was searched for and the random ones were not, so a small ``p_random`` says
    that these genes matter more to the model than genes of like expression, not that the effect is real.

    Raises
    ------
    BadInput: as :func:`search` and :func:`perturb.run.run`. ge2hist_core.sampler.Stopped: cancelled;
        :func:`load_goal` has the part.
    """
    work = _Work(goal, on_progress, cancel)
    setting = _Setting(goal, model, cells)
    searched = pd.DataFrame()
    result = GoalResult(goal.hash, 0, pd.DataFrame(), _confirmed(()), complete=False)
    for size, searched in enumerate(_search(setting, work.guessed), start=1):
        work.searched(size)
        result = replace(result, searched=len(searched) - 1, tradeoff=pareto(searched))
        _store(result, cache)
    starts: dict[tuple[int, ...], _Drawn] = {}

    def draw(edits: Sequence[Edit], seeds: tuple[int, ...]) -> tuple[_Drawn, _Drawn]:
        """The start and a set, from the same noise."""
        drawn = work.draw(setting, edits, seeds, cache)
        if seeds not in starts:
            own = bool(goal.recipe.perturbation)
            first = work.draw(setting, (), seeds, cache) if own else drawn
            starts[seeds] = _Drawn(first, "edited" if own else "base", setting.start.classes)
        return starts[seeds], _Drawn(drawn, "edited", setting.start.classes)

    parts: list[pd.DataFrame] = []
    for size in goal.sizes:
        work.drawn(size - 1)
        leading = _leading(searched, size, goal.keep)
        if not leading:
            continue
        chosen = leading[0]
        if len(leading) > 1:
            left = [_left(setting, edits, *draw(edits, goal.first_seeds)) for edits in leading]
            chosen = leading[int(np.argmin(left))]
        found = _effects(setting, chosen, *draw(chosen, goal.further_seeds), all_=True)
        random = random_sets(goal, chosen, cells, model)
        least = searched.loc[searched["edits"] == found["edits"].iloc[0], "objective"].iloc[0]
        b = 0
        for edits in random:
            b += setting.row(edits)["objective"] <= least
            work.guessed("Comparing with random genes")
        p = (b + 1) / (len(random) + 1) if random else math.nan
        parts.append(found.assign(role="found", p_random=p, n_random=len(random)))
        for edits in random[: goal.controls]:
            control = _effects(setting, edits, *draw(edits, goal.further_seeds), all_=False)
            parts.append(control.assign(role="random", p_random=math.nan, n_random=0))
            result = replace(result, confirmed=_confirmed(parts))
            _store(result, cache)
    result = replace(result, confirmed=_confirmed(parts), complete=True)
    _store(result, cache)
    work.finish()
    return result


def _leading(searched: pd.DataFrame, size: int, keep: int) -> list[tuple[Edit, ...]]:
    """Sets of a size with the lowest objective, nearer than the start and below its objective."""
    better = (searched[["objective", "distance"]] < searched[["objective", "distance"]].iloc[0]).all(axis=1)
    rows = searched[(searched["size"] == size) & better].sort_values("objective", kind="stable")
    return [Perturbation.parse(text).edits for text in rows["edits"][:keep]]


def _left(setting: _Setting, edits: Sequence[Edit], start: _Drawn, drawn: _Drawn) -> float:
    """The objective as drawn: what the movement along the way leaves of the gap, and the penalty."""
    moved = drawn.along(setting.aim) - start.along(setting.aim)
    moved = moved[np.isfinite(moved)]
    left = abs(1.0 - moved.mean() / setting.aim.gap) if len(moved) else math.inf
    return float(left + setting.goal.penalty * setting.view(edits).unsupported)


def _store(result: GoalResult, cache: DiskCache) -> None:
    value = {
        "searched": result.searched,
        "tradeoff": pack_table(result.tradeoff),
        "confirmed": pack_table(result.confirmed),
        "complete": result.complete,
    }
    cache.store_json(result.goal_hash, value)


def load_goal(goal_hash: str, cache: DiskCache) -> GoalResult | None:
    """A finished or partial result, or None."""
    stored = cache.load_json(goal_hash)
    if stored is None:
        return None
    tradeoff, confirmed = (unpack_table(stored[name]) for name in ("tradeoff", "confirmed"))
    return GoalResult(goal_hash, stored["searched"], tradeoff, confirmed, stored["complete"])


def sentences(goal: Goal, result: GoalResult) -> list[str]:
    """What was searched and what came of it, for the user; edits stand in it as they are written."""
    table, cells = result.tradeoff, len(goal.recipe.cell_ids)
    said = [
        f"{result.searched} sets of at most {goal.max_edits} edits were tried for the target: {goal.target}. They were "
        "judged by the neighbours that the model expects, a guess that draws no picture."
    ]
    if len(table) and table["outside"].iloc[0]:
        said.append(f"Before any edit of the search, {_where(table['outside'].iloc[0], cells)}.")
    for size in goal.sizes if len(table) else ():
        rows = table[table["size"] == size]
        if not len(rows):
            said.append(f"{_edits(size)}: nothing better than with fewer edits was found.")
            continue
        best = rows.loc[rows["objective"].idxmin()]
        said.append(
            f"{_edits(size)}: {best['edits']} closes {100 * best['closed']:.0f} % of the gap by this guess (support "
            f"p = {best['support']:.2g}).{_mark(best['outside'], cells)}"
        )
    drawn = result.confirmed[result.confirmed["readout"] == TOWARDS]
    for row in drawn[drawn["role"] == "found"].itertuples():
        others = drawn[(drawn["role"] == "random") & (drawn["size"] == row.size)]
        as_far = int((others["effect"] >= row.effect).sum())
        verdict = {"agrees": "agrees with the guess", "disagrees": "goes the other way"}
        said.append(
            f"Drawn over {len(goal.further_seeds)} further seeds, {row.edits} moves {_number(row.effect)} {row.unit} "
            f"towards the target (95 % interval {_number(row.low)} to {_number(row.high)}, p = {row.p:.2g}, "
            f"n = {row.n}; expected {_number(row.surrogate)}): the drawing "
            f"{verdict.get(row.verdict, 'leaves open whether it helps')}. "
            f"{as_far} of {len(others)} random sets on like genes moved at least as far; without drawing, p = "
            f"{row.p_random:.2g} against {row.n_random} of them.{_mark(row.outside, cells)}"
        )
    if result.complete and not len(drawn):
        said.append("Nothing was drawn: no set is nearer to the target at a lower objective than the start.")
    return said


def _number(value: float) -> str:
    return f"{value:+,.0f}" if abs(value) >= 100 else f"{value:+.3g}"


def _edits(size: int) -> str:
    return f"{size} edit{'s' * (size > 1)}"


def _where(outside: int, cells: int) -> str:
    who = "the cell lies" if cells == 1 else f"{outside} of {cells} cells lie"
    return f"{who} outside of what this model has seen (p < {OUTSIDE:g}): its answer is extrapolation"


def _mark(outside: int, cells: int) -> str:
    return f" With it, {_where(outside, cells)}." if outside else ""


# --- from the command line ------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m perturb goal``."""
    parser.add_argument("recipe", help="recipe.json: cells, sampler and edits that are made first")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--readout", help="density or fraction:CLASS, with --value or --change")
    what.add_argument("--like", metavar="CELL", help="id of the cell whose niche is wished")
    wish = parser.add_mutually_exclusive_group()
    wish.add_argument("--value", type=float, help="wished cells/mm2, or share from 0 to 1")
    wish.add_argument("--change", type=float, help="wished change, such as +500 cells/mm2 or -0.1 of a share")
    parser.add_argument("--max-edits", type=int, default=MAX_EDITS, help=f"1 to {MAX_EDITS}")
    parser.add_argument("--penalty", type=float, default=1.0, help="of edits outside the data, in units of the gap")
    parser.add_argument("--candidates", help="edits to choose from, such as CD8A:ko,MYC:x2 (default: a list is made)")
    parser.add_argument("--most", type=int, default=600, help="length of the list that is made, at most")
    parser.add_argument("--out", required=True, help="folder for goal.json, tradeoff.csv and .html, confirmed.csv")
    parser.add_argument("--bundle", default="assets/demo_bundle", help="folder of the model")
    parser.add_argument("--cells", default="assets/demo_cells.h5ad", help="the h5ad that the recipe was made with")
    parser.add_argument("--cache", help="folder in which finished work is kept and looked up")


def main(args: argparse.Namespace) -> None:
    """Search, draw and write the tables.

    Raises
    ------
    BadInput: a recipe, target, bundle or data file that cannot be used, or that do not belong together.
    """
    import tempfile
    from pathlib import Path

    from ge2hist_core.data import open_h5ad
    from ge2hist_core.files import atomic_path
    from perturb import charts
    from perturb.cache import DiskCache
    from perturb.page import chart_page, csv_bytes
    from perturb.run import open_recipe, print_progress
    from perturb.wording import NOTICE

    if args.like is not None and (args.value is not None or args.change is not None):
        raise BadInput("--like takes no --value or --change: leave it out, or give --readout instead.")
    target: Target
    if args.readout is not None:
        target = ReadoutTarget(args.readout, args.value, args.change)
    recipe, model, cells = open_recipe(args)
    if args.like is not None:
        with open_h5ad(args.cells, model.scgpt.vocab, matrix=recipe.matrix, gene_column=recipe.gene_column) as source:
            target = niche_target(source, args.like, model, recipe.encoder_seed)
    candidates = (
        default_candidates(recipe, cells, model, args.most)
        if args.candidates is None
        else Perturbation.parse(args.candidates).edits
    )
    goal = Goal(recipe, target, candidates, max_edits=args.max_edits, penalty=args.penalty)
    print(f"{len(candidates)} candidates; at most {goal.guesses} guesses and {goal.pictures} pictures")
    with tempfile.TemporaryDirectory() as folder:
        cache = DiskCache(args.cache or folder)
        result = run_goal(goal, model, cells, cache, on_progress=print_progress())
    said = sentences(goal, result)
    value = goal.to_dict() | {"hash": goal.hash, "searched": result.searched, "sentences": said, "notice": NOTICE}
    files = {
        "goal.json": (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(),
        "tradeoff.csv": csv_bytes(result.tradeoff),
        "confirmed.csv": csv_bytes(result.confirmed),
        "tradeoff.html": chart_page(charts.tradeoff(result.tradeoff), "Edits towards a target", said),
    }
    for sentence in said:
        print(sentence)
    for name, content in files.items():
        with atomic_path(Path(args.out) / name) as temporary:
            temporary.write_bytes(content)
        print(Path(args.out) / name)
