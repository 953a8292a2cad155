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
   the same kinds of edits on genes of like expression, drawn alike. There are as many seeds as in a screen: with 12
   further ones one row alone reaches q = 0.016 among the 33 of three sizes, with 8 none could.

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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ge2hist_core.config import from_json
from ge2hist_core.support import OUTSIDE
from ge2hist_core.types import BadInput, Cells
from perturb.candidates import default_candidates, random_sets
from perturb.edits import Edit, Perturbation
from perturb.goal_search import Aim, Setting, niche_target, pareto, search
from perturb.reach import FALSE_DISCOVERIES, reach, smallest_q
from perturb.recipe import Recipe
from perturb.result import pack_table, unpack_table
from perturb.run import Progress, run
from perturb.screen import FIRST_SEEDS, FURTHER_SEEDS, READOUTS, SEEN, _seen
from perturb.stats import bh_fdr, crossed_effect
from perturb.tables import UNITS, steps
from perturb.targets import NicheTarget, ReadoutTarget, Target

if TYPE_CHECKING:
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
GUESS = 0.1
"""What judging a set costs, in pictures; for the progress alone."""
TOWARDS = "towards"
"""Name of the movement along the way to the target, in the unit of the distance."""


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
    first_seeds: tuple[int, ...] = FIRST_SEEDS
    further_seeds: tuple[int, ...] = FURTHER_SEEDS
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

    @classmethod
    def from_dict(cls, value: object) -> Goal:
        """Inverse of :meth:`to_dict`; what else a goal.json holds (hash, sentences) does not matter.

        Raises
        ------
        BadInput: a missing or malformed field.
        """
        cure = "give a goal.json that GE2Hist wrote"
        if not isinstance(value, dict) or not isinstance(value.get("target"), dict):
            raise BadInput(f"The goal has no target: {cure}.")
        fields = {name: value[name] for name in cls.__dataclass_fields__ if name in value}
        kinds: dict[str, Any] = {"readout": ReadoutTarget, "niche": NicheTarget}
        target = {name: part for name, part in value["target"].items() if name != "kind"}
        try:
            return cls(
                **fields
                | {
                    "recipe": Recipe.from_json(json.dumps(value["recipe"])),
                    "target": from_json(kinds[value["target"]["kind"]], target),
                    "candidates": Perturbation.parse(",".join(value["candidates"])).edits,
                    "first_seeds": tuple(value["first_seeds"]),
                    "further_seeds": tuple(value["further_seeds"]),
                }
            )
        except BadInput:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"The goal is damaged ({error}): {cure}.") from None

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

    @property
    def design(self) -> tuple[int, int]:
        """How many cells and how many seeds a p-value is over."""
        return len(self.recipe.cell_ids), len(self.further_seeds)

    @property
    def rows(self) -> int:
        """How many rows are tested, at most: the way to the target and every readout, of one set of each size."""
        return len(self.sizes) * (1 + len(READOUTS))

    def smallest_q(self, rows: int | None = None) -> float:
        """The smallest q that one row alone can reach, by default among the most rows that there can be."""
        return smallest_q(*self.design, self.rows if rows is None else rows)

    def reach(self, rows: int | None = None) -> str:
        """What this design can show at best, one sentence; ``rows`` as for :meth:`smallest_q`."""
        return reach(*self.design, self.rows if rows is None else rows)

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
        self.steps = steps(result.readouts)
        self.values = {
            str(name): part["value"].to_numpy(np.float64).reshape(shape)
            for name, part in rows.groupby("readout", sort=False)
        }

    def along(self, aim: Aim) -> np.ndarray:
        """``[cell, seed]`` place on the way to the target."""
        if isinstance(aim.target, NicheTarget):
            return np.einsum("csk,ck->cs", self.roots, aim.axis)
        return self.values[aim.target.readout] * aim.axis[:, None]

    def step_along(self, aim: Aim) -> float:
        """What one nucleus more or less makes of that place, mean over the cells."""
        if isinstance(aim.target, NicheTarget):
            one = np.sqrt(self.roots**2 + 1.0) - self.roots
            return float(np.abs(one * aim.axis[:, None]).mean())
        return self.steps[aim.target.readout] * float(np.abs(aim.axis).mean())


def _effects(setting: Setting, edits: Sequence[Edit], start: _Drawn, drawn: _Drawn, *, all_: bool) -> pd.DataFrame:
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
    size = drawn.steps | {TOWARDS: drawn.step_along(aim)}
    for name, (base, edited) in pairs.items():
        found = crossed_effect(base, edited, goal.recipe.encoder_seed, step=size[name])
        both = np.isfinite(base) & np.isfinite(edited)
        surrogate = expected.get(name, math.nan)
        rare = ":" in name and _seen(base, edited) < SEEN
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
                "p": math.nan if rare else found.p,
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
    if not row.q < FALSE_DISCOVERIES:  # an interval of few seeds that mostly do not move can exclude 0 alone
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

    def draw(self, setting: Setting, edits: Sequence[Edit], seeds: tuple[int, ...], cache: DiskCache) -> Result:
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
    :func:`perturb.stats.crossed_effect`); ``q`` (Benjamini-Hochberg over the found sets' rows with a p; as in a screen,
    a type that fewer than half of the picture pairs show has none); ``share`` of the expected gap; ``verdict``
    (``agrees``: the interval of ``towards`` lies above 0 and q < 0.05, ``disagrees``: below 0 and q < 0.05, else
    ``open``; :meth:`Goal.reach` says what the seeds allow);
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
    setting = Setting(goal, model, cells)
    searched = pd.DataFrame()
    result = GoalResult(goal.hash, 0, pd.DataFrame(), _confirmed(()), complete=False)
    for size, searched in enumerate(setting.search(work.guessed), start=1):
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


def _left(setting: Setting, edits: Sequence[Edit], start: _Drawn, drawn: _Drawn) -> float:
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
            f"q = {row.q:.2g}, n = {row.n}; expected {_number(row.surrogate)}): the drawing "
            f"{verdict.get(row.verdict, 'leaves open whether it helps')}. "
            f"{as_far} of {len(others)} random sets on like genes moved at least as far; without drawing, p = "
            f"{row.p_random:.2g} against {row.n_random} of them.{_mark(row.outside, cells)}"
        )
    if tested := int(result.confirmed["q"].notna().sum()):
        said.append(f"{goal.reach(tested)} A drawing agrees with the guess where q < {FALSE_DISCOVERIES:g}.")
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
    parser.add_argument(
        "--cells", default="assets/demo_cells.h5ad", help="the h5ad or store that the recipe was made with"
    )
    parser.add_argument("--cache", help="folder in which finished work is kept and looked up")


def main(args: argparse.Namespace) -> None:
    """Search, draw and write the tables and what ``python -m perturb replay`` needs.

    Raises
    ------
    BadInput: a recipe, target, bundle or data file that cannot be used, or that do not belong together.
    """
    from ge2hist_core.data import open_cells
    from perturb import charts
    from perturb.cache import report_folder
    from perturb.page import chart_page, csv_bytes, json_bytes, noted, write_files
    from perturb.run import open_recipe, print_progress
    from perturb.wording import Origin

    if args.like is not None and (args.value is not None or args.change is not None):
        raise BadInput("--like takes no --value or --change: leave it out, or give --readout instead.")
    target: Target
    if args.readout is not None:
        target = ReadoutTarget(args.readout, args.value, args.change)
    recipe, model, cells = open_recipe(args)
    if args.like is not None:
        with open_cells(args.cells, model.scgpt.vocab, matrix=recipe.matrix, gene_column=recipe.gene_column) as source:
            target = niche_target(source, args.like, model, recipe.encoder_seed)
    candidates = (
        default_candidates(recipe, cells, model, args.most)
        if args.candidates is None
        else Perturbation.parse(args.candidates).edits
    )
    goal = Goal(recipe, target, candidates, max_edits=args.max_edits, penalty=args.penalty)
    print(f"{len(candidates)} candidates; at most {goal.guesses} guesses and {goal.pictures} pictures")
    print(goal.reach())
    with report_folder(args.out, args.cache, goal.hash) as cache:
        result = run_goal(goal, model, cells, cache, on_progress=print_progress())
        said = sentences(goal, result)
        value = goal.to_dict() | {"hash": goal.hash, "searched": result.searched, "sentences": said}
        files = {
            "goal.json": json_bytes(noted(value)),
            "provenance.json": json_bytes(noted(Origin.of_model(model, cells).provenance)),
            "tradeoff.csv": csv_bytes(result.tradeoff),
            "confirmed.csv": csv_bytes(result.confirmed),
            "tradeoff.html": chart_page(charts.tradeoff(result.tradeoff), "Edits towards a target", said),
        }
        for sentence in said:
            print(sentence)
        for path in write_files(files, args.out):
            print(path)
