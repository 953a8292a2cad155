"""Screen: which of many edits move a cell's niche? ``python -m perturb screen``.

Two stages.

1. **Guess.** Every candidate is embedded and encoded, and the model's niche network says which neighbours it expects
   (:meth:`GE2Hist.expected_neighbours`): no picture is drawn. Each candidate's shift is placed among those of all
   others once the trend with expression is taken out: a rank that says what to draw, not a test.
2. **Confirm.** The leading candidates are drawn with the same noise as the unedited cell. A first set of seeds keeps
   the better half; p-values and intervals come from *further* seeds alone, which took no part in the choice, so that
   the choice does not flatter them. Both sets are shown beside each other (replication). Fractions of types that
   fewer than half of the picture pairs show get no p-value: so few non-zero differences could not reach a small one,
   and would only add tests. The rule looks at both arms alike, so it does not choose by the sign of an effect and
   leaves the sign-flip p-values of the others as they are (independent filtering, Bourgon et al. 2010,
   doi:10.1073/pnas.0914005107).

A knock-out of a gene that a cell does not express changes nothing at all, so such genes are not candidates.

Everything that decides the result is in the :class:`Screen`; candidates are drawn by ordinary recipes, one at a time,
so that they can be spread over processes or a ``dask.distributed`` cluster without changing a number.
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ge2hist_core.config import READER_CLASSES
from ge2hist_core.types import BadInput, Cells
from perturb.edits import Edit, EditSet, Perturbation
from perturb.reach import reach, smallest_q
from perturb.recipe import Recipe, _parse_seeds, _print_seeds, add_cells, add_sampling, asked_for
from perturb.result import Result, pack_table, unpack_table
from perturb.run import Progress, choose_cells, run
from perturb.signature_options import add_reading, file_signatures
from perturb.stats import bh_fdr, crossed_effect
from perturb.tables import steps

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist
    from perturb.cache import DiskCache
    from perturb.signatures import Signature

__all__ = [
    "Screen",
    "ScreenResult",
    "agreement",
    "confirm",
    "draw_one",
    "drawn_readouts",
    "guess",
    "image_shift",
    "knock_outs",
    "load_screen",
    "on_cluster",
    "run_screen",
    "signature_edits",
]

MATCHED = 30
"""Candidates of like expression behind each point of the trend, at least."""
STAND_INS = 39
"""Random edits that a candidate is compared with where there are too few others: p is at least 0.025."""
SEEN = 0.5
"""A type's fraction is tested where at least this share of the picture pairs shows the type in either arm."""
IMAGE_SHIFT = "shift_image"
FIRST_SEEDS = tuple(range(4))
FURTHER_SEEDS = tuple(range(4, 16))
"""With 12 seeds one row alone reaches q = 0.049 among the 100 of ten candidates and ten readouts; 11 would not do."""
READOUTS = ("density", "spacing", *(f"fraction:{name}" for name in READER_CLASSES))
"""What is tested; densities by type follow from these."""

Draw = Callable[[Sequence[Recipe]], Iterator[pd.DataFrame]]
"""Recipes -> their readout tables, in order, each as soon as it is there."""


@dataclass(frozen=True)
class Screen:
    """What to screen and how far.

    Parameters
    ----------
    recipe: cells, sampler and the encoder's seed; its own edits are made in both arms' candidates before each
        candidate, its seeds are not used.
    candidates: edits to compare, each by itself.
    keep: candidates that are drawn at all, the leading ones of the guess.
    first_seeds, further_seeds: seeds that choose the better half, and seeds that p-values come from.
    readout: what the guess ranks by: ``shift`` (all neighbours together), ``density`` or ``fraction:<type>``.

    Raises
    ------
    BadInput: no candidate, one given twice, fewer than 2 seeds or seeds that no recipe can have, an unknown readout.
    """

    recipe: Recipe
    candidates: tuple[Perturbation, ...]
    keep: int = 20
    first_seeds: tuple[int, ...] = FIRST_SEEDS
    further_seeds: tuple[int, ...] = FURTHER_SEEDS
    readout: str = "shift"

    def __post_init__(self) -> None:
        if not self.candidates:
            raise BadInput("The screen has no candidate: give genes that the cells express, or signatures.")
        names = [str(candidate) for candidate in self.candidates]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise BadInput(f"The screen has the candidate {twice} twice: give it once.")
        if self.recipe.propagation is not None:
            raise BadInput("A screen draws direct edits: leave the recipe's propagation out.")
        if self.keep < 1:
            raise BadInput(f"keep is {self.keep}: draw at least one candidate.")
        for name in ("first_seeds", "further_seeds"):
            if len(getattr(self, name)) < 2:
                raise BadInput(f"{name} has {len(getattr(self, name))} seeds: give at least 2.")
            try:
                replace(self.recipe, seeds=getattr(self, name))
            except BadInput as error:
                raise BadInput(f"{name} cannot be drawn: {error}") from None
        if set(self.first_seeds) & set(self.further_seeds):
            raise BadInput("first_seeds and further_seeds share a seed: a p-value needs seeds that chose nothing.")
        if self.readout != "shift" and self.readout not in READOUTS:
            raise BadInput(f"readout is {self.readout!r}: choose shift, {', '.join(READOUTS)}.")
        if self.readout == "spacing":
            raise BadInput("readout is 'spacing', which cannot be guessed without drawing: rank by shift or density.")

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all that decides the result."""
        value = {
            "recipe": replace(self.recipe, seeds=(0,)).to_json(),
            "candidates": [str(candidate) for candidate in self.candidates],
            "keep": self.keep,
            "first_seeds": self.first_seeds,
            "further_seeds": self.further_seeds,
            "readout": self.readout,
        }
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, as in a report's screen.json."""
        return {
            "recipe": replace(self.recipe, seeds=(0,)).to_dict(),
            "candidates": [str(candidate) for candidate in self.candidates],
            "keep": self.keep,
            "first_seeds": list(self.first_seeds),
            "further_seeds": list(self.further_seeds),
            "readout": self.readout,
        }

    @classmethod
    def from_dict(cls, value: object) -> Screen:
        """Inverse of :meth:`to_dict`; a report's ``notice`` does not matter.

        Raises
        ------
        BadInput: an unknown, missing or malformed field.
        """
        names = ("recipe", "candidates", "keep", "first_seeds", "further_seeds", "readout")
        cure = "give a screen.json that GE2Hist wrote"
        if not isinstance(value, dict):
            raise BadInput(f"The screen is no table of fields: {cure}.")
        value = {name: part for name, part in value.items() if name != "notice"}
        for name in (*names, *value):
            if name not in value or name not in names:
                raise BadInput(f"The screen has {'an unknown' if name in value else 'no'} field {name!r}: {cure}.")
        for name, kind in (("candidates", str), ("first_seeds", int), ("further_seeds", int)):
            if not isinstance(value[name], list) or not all(type(part) is kind for part in value[name]):
                raise BadInput(f"{name} of the screen is no list of {'texts' if kind is str else 'numbers'}: {cure}.")
        if type(value["keep"]) is not int or not isinstance(value["readout"], str):
            raise BadInput(f"keep or readout of the screen is of another type: {cure}.")
        return cls(
            recipe=Recipe.from_json(json.dumps(value["recipe"])),
            candidates=tuple(map(Perturbation.parse, value["candidates"])),
            keep=value["keep"],
            first_seeds=tuple(value["first_seeds"]),
            further_seeds=tuple(value["further_seeds"]),
            readout=value["readout"],
        )

    @property
    def tested(self) -> int:
        """How many candidates the further seeds draw: the better half of those that the first seeds draw."""
        return -(-min(self.keep, len(self.candidates)) // 2)

    @property
    def design(self) -> tuple[int, int]:
        """How many cells and how many seeds a p-value is over."""
        return len(self.recipe.cell_ids), len(self.further_seeds)

    def smallest_q(self, rows: int | None = None) -> float:
        """The smallest q that one row alone can reach among ``rows`` tested ones, by default the most there can be."""
        return smallest_q(*self.design, self.tested * len(READOUTS) if rows is None else rows)

    def reach(self, rows: int | None = None) -> str:
        """What this design can show at best, one sentence; ``rows`` as for :meth:`smallest_q`."""
        rows = self.tested * len(READOUTS) if rows is None else rows
        return reach(*self.design, rows)

    @property
    def edited_pictures(self) -> int:
        """How many edited pictures the second stage draws."""
        n = min(self.keep, len(self.candidates))
        return len(self.recipe.cell_ids) * (n * len(self.first_seeds) + self.tested * len(self.further_seeds))

    @property
    def guesses(self) -> int:
        """How many edits the first stage judges without drawing, random ones among them."""
        n = len(self.candidates)
        return n * (1 + STAND_INS) if n <= MATCHED else n

    @property
    def pictures(self) -> int:
        """How many pictures the second stage draws, the unedited ones among them."""
        unedited = len(self.recipe.cell_ids) * (len(self.first_seeds) + len(self.further_seeds))
        return self.edited_pictures + unedited

    def edited(self, candidate: Perturbation, seeds: tuple[int, ...]) -> Recipe:
        """The recipe of a candidate: the screen's own edits, then the candidate's."""
        parts = (*self.recipe.perturbation.parts, *candidate.parts)
        return replace(self.recipe, perturbation=Perturbation(parts), seeds=seeds)


@dataclass(frozen=True, eq=False)
class ScreenResult:
    """What came out.

    Parameters
    ----------
    screen_hash: of the :class:`Screen`.
    guess: one row per candidate, the best first: see :func:`guess`.
    confirmed: one row per drawn candidate and readout: see :func:`confirm`. Fewer where the run was cancelled.
    complete: False for the partial result of a run under way or cancelled.
    """

    screen_hash: str
    guess: pd.DataFrame
    confirmed: pd.DataFrame
    complete: bool


def knock_outs(cells: Cells, genes: Sequence[str] | None = None) -> tuple[Perturbation, ...]:
    """One knock-out per gene that any of the cells expresses, in the order of the data; only of ``genes`` if given.

    Raises
    ------
    BadInput: a gene that the data lack, or none that a cell expresses.
    """
    expressed = list(dict.fromkeys(cells.genes[np.asarray((cells.counts > 0).sum(axis=0)).ravel() > 0]))
    if genes is not None:
        unknown = [gene for gene in genes if gene not in set(cells.genes)]
        if unknown:
            raise BadInput(f"The data have no gene {unknown[0]!r}: leave it out of the list.")
        expressed = [gene for gene in expressed if gene in set(genes)]
    if not expressed:
        raise BadInput("None of these genes is expressed in the chosen cells: a knock-out would change nothing.")
    return tuple(Perturbation((Edit(gene, "ko"),)) for gene in expressed)


def signature_edits(
    genes: Sequence[str], dose: float = 1.0, signatures: Sequence[Signature] | None = None
) -> tuple[Perturbation, ...]:
    """Every signature, by default of the library, that acts on genes of the data, at one dose; each set of edits once.

    Raises
    ------
    BadInput: a dose out of range.
    """
    from perturb.signatures import checked_dose, expand, load_library

    found = {}
    dose = checked_dose(dose)
    for signature in load_library() if signatures is None else signatures:
        try:
            edits = expand(signature, genes, dose).perturbation.edits
        except BadInput:  # none of its genes is in these data
            continue
        if edits:
            candidate = Perturbation((EditSet(signature.name, edits, dose),))
            found[str(candidate)] = candidate
    return tuple(found.values())


def guess(
    screen: Screen,
    model: GE2Hist,
    cells: Cells,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> pd.DataFrame:
    """First stage: expected change of the neighbours, no picture drawn.

    Parameters
    ----------
    cells: as for :func:`perturb.run.run`.

    Returns
    -------
    DataFrame, the largest first, one row per candidate: ``candidate``; ``shift`` (mean over cells of the Euclidean
    change of the expected root counts); ``shift_embedding``, ``shift_z_c``, ``shift_z_e`` (mean Euclidean change);
    ``density`` (cells/mm2) and ``fraction:<class>`` (expected changes); ``level`` (mean count of the edited genes);
    ``p_matched``: ``(b + 1) / (n + 1)`` with ``b`` of the ``n`` other candidates that move at least as far once the
    trend with level is taken out. It is a rank within the screen: over the candidates such ranks are spread evenly
    whatever the edits do, so there is no q of them. With at most 30 candidates ``b`` of ``n`` random edits like the
    candidate's own (:func:`perturb.matched.matched_edits`); NaN where no gene is like an edited one.

    Raises
    ------
    ge2hist_core.sampler.Stopped: cancelled.
    """
    from ge2hist_core.sampler import Stopped

    recipe = screen.recipe
    chosen = choose_cells(cells, recipe.cell_ids)
    base = _State(model, recipe.perturbation.apply(chosen, cells), recipe.encoder_seed)
    rows, few, beyond = [], len(screen.candidates) <= MATCHED, []

    def moved(candidate: Perturbation) -> dict[str, float]:
        if cancel is not None and cancel.is_set():
            raise Stopped
        edited = screen.edited(candidate, (0,)).perturbation.apply(chosen, cells)
        return _State(model, edited, recipe.encoder_seed).against(base)

    for i, candidate in enumerate(screen.candidates):
        columns = np.isin(chosen.genes, candidate.genes)
        found = moved(candidate)
        rows.append({"candidate": str(candidate)} | found | {"level": _level(chosen, columns)})
        if few:
            stand_ins = _stand_ins(candidate, chosen, cells, model, recipe.encoder_seed)
            others = np.array([abs(moved(one)[screen.readout]) for one in stand_ins])
            beyond.append(
                ((others >= abs(found[screen.readout])).sum() + 1) / (len(others) + 1) if len(others) else np.nan
            )
        if on_progress is not None:
            on_progress(Progress((i + 1) / len(screen.candidates), "Ranking the candidates"))
    table = pd.DataFrame(rows)
    order = table[screen.readout].abs().to_numpy()
    table["p_matched"] = beyond if few else _matched_p(order, table["level"].to_numpy())
    return table.iloc[np.argsort(-order, kind="stable")].reset_index(drop=True)


def _stand_ins(candidate: Perturbation, chosen: Cells, cells: Cells, model: GE2Hist, seed: int) -> list[Perturbation]:
    """Random edits like a candidate's; none where no gene is like an edited one."""
    from perturb.matched import matched_edits

    try:
        return matched_edits(candidate, chosen, cells, STAND_INS, model.scgpt.vocab, seed)[0]
    except BadInput:
        return []


class _State:
    """Cells as the encoder, the VAEs and the niche network see them."""

    def __init__(self, model: GE2Hist, cells: Cells, seed: int) -> None:
        self.embedding = model.embed(cells, seed)
        self.latent = model.encode(self.embedding)
        self.counts = model.expected_neighbours(self.latent)  # [cell, type]
        self.readouts = model.expected_readouts(self.latent)

    def against(self, base: _State) -> dict[str, float]:
        def far(a: np.ndarray, b: np.ndarray) -> float:
            return float(np.linalg.norm(a.astype(np.float64) - b, axis=1).mean())

        moved = {
            "shift": far(np.sqrt(self.counts), np.sqrt(base.counts)),
            "shift_embedding": far(self.embedding, base.embedding),
            "shift_z_c": far(self.latent.z_c, base.latent.z_c),
            "shift_z_e": far(self.latent.z_e, base.latent.z_e),
        }
        return moved | {name: float((value - base.readouts[name]).mean()) for name, value in self.readouts.items()}


def _level(cells: Cells, columns: np.ndarray) -> float:
    """Mean count of the edited genes over genes and cells."""
    return float(cells.counts[:, np.flatnonzero(columns)].mean()) if columns.any() else 0.0


def _matched_p(score: np.ndarray, level: np.ndarray) -> np.ndarray:
    """``(b + 1) / (n + 1)``: ``b`` of the ``n`` other candidates lie as far above the trend with level, or farther."""
    n = len(score)
    with np.errstate(divide="ignore"):
        beyond = np.log(score) - _trend(score, level)  # -inf: nothing moved
    rounded = np.round(beyond, 9)  # equal up to rounding counts as far
    return (rounded[None] >= rounded[:, None]).sum(axis=1) / n


def _trend(score: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Median of the log score by level: piecewise linear in log(1 + level) through groups of at least ``MATCHED``.

    Candidates of equal level share a group. Scores of 0 have no logarithm and take no part.
    """
    x, moved = np.log1p(level), score > 0
    if not moved.any():
        return np.zeros(len(score))
    groups: list[np.ndarray] = []
    for value in np.unique(x[moved]):
        same = np.flatnonzero(moved & (x == value))
        if groups and len(groups[-1]) < MATCHED:
            groups[-1] = np.concatenate([groups[-1], same])
        else:
            groups.append(same)
    if len(groups) > 1 and len(groups[-1]) < MATCHED:
        groups[-2:] = [np.concatenate(groups[-2:])]
    centres = [float(x[group].mean()) for group in groups]
    return np.interp(x, centres, [float(np.median(np.log(score[group]))) for group in groups])


def agreement(result: ScreenResult, readout: str) -> tuple[float, int] | None:
    """Spearman correlation of guessed and drawn change (first seeds) over the drawn candidates, and their number.

    None for a readout that is not guessed, or fewer than four candidates.
    """
    from scipy.stats import spearmanr

    if readout not in result.guess or not len(result.confirmed):
        return None
    drawn = result.confirmed[result.confirmed["readout"] == readout].set_index("candidate")["first_effect"].dropna()
    guessed = result.guess.set_index("candidate")[readout].reindex(drawn.index)
    if len(drawn) < 4 or guessed.nunique() < 2 or drawn.nunique() < 2:
        return None
    return float(spearmanr(guessed, drawn).statistic), len(drawn)


def confirm(screen: Screen, ranked: pd.DataFrame, draw: Draw) -> Iterator[pd.DataFrame]:
    """Second stage, candidate by candidate; yields the table so far, the last one is whole.

    Returns
    -------
    DataFrames with one row per drawn candidate and readout: ``candidate, readout, unit, first_effect`` (mean over the
    seeds that chose), ``effect, low, high, p, n`` (paired, over the further seeds; NaN for candidates that the first
    seeds left out; no p for a type that fewer than half of the pairs show), ``q`` (Benjamini-Hochberg over all rows
    with a p), ``replicated`` (both sets move, and agree in sign). Two descriptions of the candidate stand in each of
    its rows: ``shift_image`` (mean absolute difference of optical density between the pictures of a pair, over the
    first seeds; see :func:`image_shift`) and ``shift_embedding`` (of :func:`guess`).
    """
    leading = [screen.candidates[i] for i in _order(screen, ranked)[: screen.keep]]
    by_name = {str(candidate): candidate for candidate in leading}
    first = dict(_drawn(screen, leading, screen.first_seeds, draw))
    rows: dict[str, pd.DataFrame] = {
        name: _effects(table, screen.recipe.encoder_seed)[["readout", "unit", "effect"]].rename(
            columns={"effect": "first_effect"}
        )
        for name, table in first.items()
    }
    seen = ranked.set_index("candidate")["shift_embedding"]
    moved = pd.DataFrame(
        {name: (_image_shift(table), seen[name]) for name, table in first.items()}, index=[IMAGE_SHIFT, seen.name]
    ).T
    yield _confirmed(rows, {}, moved)
    best = sorted(rows, key=lambda name: -_strength(first[name], screen.readout))
    kept = [by_name[name] for name in best[: screen.tested]]
    further: dict[str, pd.DataFrame] = {}
    for name, table in _drawn(screen, kept, screen.further_seeds, draw):
        further[name] = _effects(table, screen.recipe.encoder_seed)
        yield _confirmed(rows, further, moved)


def _order(screen: Screen, ranked: pd.DataFrame) -> list[int]:
    place = {str(candidate): i for i, candidate in enumerate(screen.candidates)}
    return [place[name] for name in ranked["candidate"]]


def _drawn(
    screen: Screen, candidates: Sequence[Perturbation], seeds: tuple[int, ...], draw: Draw
) -> Iterator[tuple[str, pd.DataFrame]]:
    recipes = [screen.edited(candidate, seeds) for candidate in candidates]
    yield from zip(map(str, candidates), draw(recipes), strict=True)


def _pairs(readouts: pd.DataFrame, readout: str) -> tuple[np.ndarray, np.ndarray, str]:
    """``base [cell, seed]``, ``edited [cell, seed]`` and unit of one readout."""
    rows = readouts[readouts["readout"] == readout]
    wide = {
        arm: part.pivot(index="cell_id", columns="seed", values="value").to_numpy() for arm, part in rows.groupby("arm")
    }
    return wide["base"], wide["edited"], str(rows["unit"].iloc[0])


def _effects(readouts: pd.DataFrame, seed: int) -> pd.DataFrame:
    rows, size = [], steps(readouts)
    for readout in READOUTS:
        base, edited, unit = _pairs(readouts, readout)
        if ":" in readout and not (np.nan_to_num(base).any() or np.nan_to_num(edited).any()):
            continue
        found = crossed_effect(base, edited, seed, step=size[readout])
        p = found.p if ":" not in readout or _seen(base, edited) >= SEEN else np.nan
        rows.append((readout, unit, found.value, found.low, found.high, p, found.n))
    return pd.DataFrame(rows, columns=["readout", "unit", "effect", "low", "high", "p", "n"])


def _seen(base: np.ndarray, edited: np.ndarray) -> float:
    """Share of the defined pairs that show the type in either arm."""
    defined = np.isfinite(base) & np.isfinite(edited)
    return float(((base > 0) | (edited > 0))[defined].mean()) if defined.any() else 0.0


def _strength(readouts: pd.DataFrame, readout: str) -> float:
    """How far a candidate moved, in standard errors of its paired differences: of one readout, or the largest."""
    names = READOUTS if readout == "shift" else (readout,)
    strengths = [0.0]
    for name in names:
        base, edited, _ = _pairs(readouts, name)
        difference = (edited - base)[np.isfinite(edited - base)]
        if len(difference) > 1 and difference.any():
            spread = difference.std(ddof=1)
            strengths.append(abs(difference.mean()) / spread * np.sqrt(len(difference)) if spread > 0 else np.inf)
    return float(max(strengths))


def _confirmed(first: dict[str, pd.DataFrame], further: dict[str, pd.DataFrame], moved: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for name, table in first.items():
        before = table.set_index("readout").to_dict("index")
        after = further[name].set_index("readout").to_dict("index") if name in further else {}
        for readout in dict.fromkeys((*before, *after)):
            rows.append({"candidate": name, "readout": readout} | before.get(readout, {}) | after.get(readout, {}))
    numbers = ["first_effect", "effect", "low", "high", "p", "n"]
    table = pd.DataFrame(rows, columns=["candidate", "readout", "unit", *numbers])
    table[numbers] = table[numbers].astype(np.float64)
    table["q"] = bh_fdr(table["p"].to_numpy())
    table["replicated"] = np.sign(table["first_effect"]) * np.sign(table["effect"]) > 0
    columns = ["candidate", "readout", "unit", "first_effect", "effect", "low", "high", "p", "q", "n", "replicated"]
    for name in moved:
        table[name] = moved[name].reindex(table["candidate"]).to_numpy()
        columns.append(name)
    return table.sort_values(["q", "p"], kind="stable", na_position="last")[columns].reset_index(drop=True)


def image_shift(base: np.ndarray, edited: np.ndarray) -> np.ndarray:
    """How far pictures differ: mean over pixels of the absolute difference of optical density.

    Optical density is the mean of ``-log10(intensity / 255)`` over the channels, as in
    :func:`perturb.pictures.difference`; 0 for equal pictures, 0.3 where every pixel lets through half the light. It
    counts nuclei that moved as fully as nuclei that came or went.

    Parameters
    ----------
    base, edited: uint8 ``[picture, H, W, 3]``.

    Returns
    -------
    ``[picture]``.
    """
    table = -np.log10(np.maximum(np.arange(256), 1) / 255.0)
    return np.abs(table[edited].mean(axis=3) - table[base].mean(axis=3)).mean(axis=(1, 2))


def drawn_readouts(result: Result) -> pd.DataFrame:
    """The readouts of a comparison and, as further rows of the edited arm, each pair's :func:`image_shift`."""
    recipe = result.recipe
    shift = pd.DataFrame(
        {
            "arm": "edited",
            "cell_id": np.repeat(recipe.cell_ids, len(recipe.seeds)),
            "seed": np.tile(recipe.seeds, len(recipe.cell_ids)),
            "readout": IMAGE_SHIFT,
            "unit": "optical density",
            "value": image_shift(result.base_arm.images, result.edited_arm.images),
        }
    )
    return pd.concat([result.readouts, shift], ignore_index=True)


def _image_shift(readouts: pd.DataFrame) -> float:
    return float(readouts.loc[readouts["readout"] == IMAGE_SHIFT, "value"].mean())


def run_screen(
    screen: Screen,
    model: GE2Hist,
    cells: Cells,
    cache: DiskCache,
    *,
    draw: Draw | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> ScreenResult:
    """Both stages. What is finished is kept in the cache: a run that is cancelled or killed goes on from there.

    Parameters
    ----------
    draw: how recipes are drawn, by default here, one after the other.

    Raises
    ------
    BadInput: as :func:`perturb.run.run`. ge2hist_core.sampler.Stopped: cancelled; :func:`load_screen` has the part.
    """
    from ge2hist_core.sampler import Stopped

    total = screen.edited_pictures

    def ranking(progress: Progress) -> None:
        if on_progress is not None:
            on_progress(Progress(0.1 * progress.fraction, progress.text))

    ranked = guess(screen, model, cells, on_progress=ranking, cancel=cancel)
    done = 0

    def here(recipes: Sequence[Recipe]) -> Iterator[pd.DataFrame]:
        nonlocal done
        for recipe in recipes:

            def report(progress: Progress, before: int = done, recipe: Recipe = recipe) -> None:
                if on_progress is not None:
                    now = before + progress.fraction * len(recipe.seeds) * len(recipe.cell_ids)
                    text = f"Drawing {recipe.perturbation}"
                    on_progress(Progress(min(1.0, 0.1 + 0.9 * now / total), text[:80], progress.preview))

            yield drawn_readouts(run(recipe, model, cells, cache=cache, on_progress=report, cancel=cancel))
            done += len(recipe.seeds) * len(recipe.cell_ids)

    result = ScreenResult(screen.hash, ranked, pd.DataFrame(), complete=False)
    _store(result, cache)
    for table in confirm(screen, ranked, draw or here):
        if cancel is not None and cancel.is_set():
            raise Stopped
        result = replace(result, confirmed=table)
        _store(result, cache)
    result = replace(result, complete=True)
    _store(result, cache)
    return result


def _store(result: ScreenResult, cache: DiskCache) -> None:
    value = {"guess": pack_table(result.guess), "confirmed": pack_table(result.confirmed), "complete": result.complete}
    cache.store_json(result.screen_hash, value)


def load_screen(screen_hash: str, cache: DiskCache) -> ScreenResult | None:
    """A finished or partial result, or None."""
    stored = cache.load_json(screen_hash)
    if stored is None:
        return None
    return ScreenResult(
        screen_hash, unpack_table(stored["guess"]), unpack_table(stored["confirmed"]), stored["complete"]
    )


# --- on a cluster ---------------------------------------------------------------------------------------------------


Stamp = tuple[tuple[str, int, int], ...]
"""Path, size and time of change (ns) of each file."""


def _stamp(path: str) -> Stamp:
    root = Path(path)
    files = sorted(one for one in root.rglob("*") if one.is_file()) if root.is_dir() else [root]
    return tuple((str(one), one.stat().st_size, one.stat().st_mtime_ns) for one in files)


@lru_cache(maxsize=1)
def _loaded(bundle: str, _: Stamp) -> GE2Hist:
    from ge2hist_core.model import GE2Hist

    return GE2Hist.load(bundle)


@lru_cache(maxsize=1)
def _opened(bundle: str, cells: str, matrix: str | None, gene_column: str | None, stamps: tuple[Stamp, Stamp]) -> Any:
    """Model and source; opened again when a file behind either has another size or time of change."""
    from ge2hist_core.data import open_cells

    model = _loaded(bundle, stamps[0])
    return model, open_cells(cells, model.scgpt.vocab, matrix=matrix, gene_column=gene_column)


@lru_cache(maxsize=1)
def _own_folder() -> str:
    """A temporary folder of this process, gone when it ends."""
    folder = tempfile.mkdtemp(prefix="ge2hist-screen-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def draw_one(
    recipe_json: str, bundle: str, cells: str, cache: str | None = None, threads: int | None = None
) -> pd.DataFrame:
    """:func:`drawn_readouts` of one recipe, in a worker process that finds bundle and cells at these paths.

    Parameters
    ----------
    cache: folder that keeps drawn arms, by default a temporary one of the process: the unedited arm is drawn once.
    threads: of torch in this process from now on; the last digits depend on their number. None leaves it.

    Raises
    ------
    BadInput: as :func:`perturb.run.run`; a data file that is not the recipe's.
    """
    import torch

    from perturb.cache import DiskCache
    from perturb.run import cells_for

    if threads is not None and threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    recipe = Recipe.from_json(recipe_json)
    try:
        stamps = (_stamp(bundle), _stamp(cells))
    except OSError as error:
        raise BadInput(f"A worker cannot read {error.filename}: give bundle and cells by paths that it sees.") from None
    model, source = _opened(bundle, cells, recipe.matrix, recipe.gene_column, stamps)
    if source.sha256 != recipe.data_sha256:
        raise BadInput(
            f"The recipe was made with data {recipe.data_sha256[:12]}, but {cells} is {source.sha256[:12]} for a "
            "worker: give all of them the same file."
        )
    kept = DiskCache(_own_folder() if cache is None else cache)
    return drawn_readouts(run(recipe, model, cells_for(source, recipe.cell_ids), cache=kept))


def on_cluster(
    client: Any,
    bundle: str,
    cells: str,
    cache: DiskCache,
    *,
    arms: str | None = None,
    pictures: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Draw:
    """Recipes drawn by the workers of a ``dask.distributed`` client; a worker that dies has its recipe drawn again.

    Every worker computes with as many torch threads as this process, so that it gives the same bytes.

    Parameters
    ----------
    bundle, cells: paths as the workers see them.
    cache: of this process. Readouts are kept in it in the order in which they arrive, and looked up before a recipe
        is sent out: a screen whose driver was killed goes on from there.
    arms: folder of the workers' drawn arms, as for :func:`draw_one`.
    pictures: edited pictures of all recipes to come (:attr:`Screen.edited_pictures`), by default of each call.
    on_progress: called after each recipe that arrives or was kept, in this thread.
    """
    import torch
    from distributed import as_completed

    done = 0

    def key(recipe: Recipe) -> str:
        return hashlib.sha256(f"drawn readouts {recipe.hash}".encode()).hexdigest()

    def tell(recipe: Recipe, total: int) -> None:
        nonlocal done
        done += _edited_pictures(recipe)
        if on_progress is not None:
            on_progress(Progress(min(1.0, 0.1 + 0.9 * done / total), f"Drawn {recipe.perturbation}"[:80]))

    def draw(recipes: Sequence[Recipe]) -> Iterator[pd.DataFrame]:
        total = pictures or done + sum(map(_edited_pictures, recipes))
        found = {i: unpack_table(kept) for i, one in enumerate(recipes) if (kept := cache.load_json(key(one)))}
        for i in found:
            tell(recipes[i], total)
        open_ones = [i for i in range(len(recipes)) if i not in found]
        texts = [recipes[i].to_json() for i in open_ones]
        same = {"bundle": bundle, "cells": cells, "cache": arms, "threads": torch.get_num_threads()}
        futures = client.map(draw_one, texts, **same, retries=3, pure=False) if texts else []
        place = dict(zip((future.key for future in futures), open_ones, strict=True))
        arriving = iter(as_completed(futures)) if futures else iter(())
        for i in range(len(recipes)):
            while i not in found:
                future = next(arriving)
                at = place[future.key]
                found[at] = future.result()
                cache.store_json(key(recipes[at]), pack_table(found[at]))
                tell(recipes[at], total)
            yield found.pop(i)

    return draw


def _edited_pictures(recipe: Recipe) -> int:
    return len(recipe.cell_ids) * len(recipe.seeds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m perturb screen``."""
    add_cells(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--genes", help="comma-separated genes to knock out (default: all that the cells express)")
    what.add_argument("--signatures", action="store_true", help="screen the library of drug signatures instead")
    what.add_argument("--signature-file", help="screen the signatures of a GMT, CSV, TSV, GCT, GCTX or h5ad instead")
    add_reading(parser)
    parser.add_argument("--dose", type=float, help="of the signatures (default: 1)")
    parser.add_argument("--edit", default="", help="edits made before each candidate")
    parser.add_argument("--keep", type=int, default=20, help="candidates to draw")
    parser.add_argument("--readout", default="shift", help="rank by shift, density or fraction:TYPE")
    parser.add_argument("--seeds-first", default=_print_seeds(FIRST_SEEDS), help="choose the better half")
    parser.add_argument("--seeds-further", default=_print_seeds(FURTHER_SEEDS), help="give effects and p-values")
    add_sampling(parser)
    parser.add_argument("--out", required=True, help="folder for report, tables, pictures and h5ad")
    parser.add_argument("--cache", help="folder in which finished work is kept and looked up")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--scheduler", metavar="ADDRESS", help="of a dask.distributed cluster that sees the same files")
    where.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="draw in N processes of this machine, each with as many torch threads as one process would take: on few "
        "cores set OMP_NUM_THREADS=1",
    )


def main(args: argparse.Namespace) -> None:
    """Screen and write the report: pages, tables, pictures and the h5ad of the candidates that were tested.

    Raises
    ------
    BadInput: a bundle, data or signature file, gene, option or scheduler that cannot be used.
    """
    from perturb.cache import report_folder
    from perturb.run import print_progress
    from perturb.screen_report import drawn_results, headline, write_report
    from perturb.wording import Origin

    if args.workers is not None and args.workers < 1:
        raise BadInput(f"--workers is {args.workers}: give at least 1 process, or leave it out.")
    first, further = _parse_seeds(args.seeds_first), _parse_seeds(args.seeds_further)
    signatures = file_signatures(args)
    recipe, model, cells = asked_for(args, (0,))
    candidates = _candidates(args, cells.take(slice(len(recipe.cell_ids))), signatures)
    screen = Screen(recipe, candidates, keep=args.keep, first_seeds=first, further_seeds=further, readout=args.readout)
    print(f"{len(candidates)} candidates; {min(args.keep, len(candidates))} of them drawn, {screen.pictures} pictures")
    print(screen.reach())
    with report_folder(args.out, args.cache, screen.hash) as cache, ExitStack() as stack:
        kept, draw, show = str(cache.folder.resolve()), None, print_progress()
        if args.scheduler is not None or args.workers is not None:
            client = _client(args.scheduler) if args.workers is None else _local_client(args.workers, stack)
            draw = on_cluster(
                stack.enter_context(client),
                str(Path(args.bundle).resolve()),
                str(Path(args.cells).resolve()),
                cache,
                arms=None if args.workers is None else kept,
                pictures=screen.edited_pictures,
                on_progress=show,
            )
        result = run_screen(screen, model, cells, cache, draw=draw, on_progress=show)
        drawn = drawn_results(screen, result, cache, lambda one: run(one, model, cells, cache=cache, on_progress=show))
        print(headline(result, screen))
        for path in write_report(screen, result, Origin.of_model(model, cells), args.out, drawn, cells):
            print(path)


def _client(address: str) -> Any:
    from distributed import Client

    try:
        return Client(address, timeout=20)
    except (OSError, ValueError, TimeoutError) as error:
        raise BadInput(f"--scheduler {address} does not answer ({error}): start it, or leave it out.") from None


def _local_client(workers: int, stack: ExitStack) -> Any:
    """A client of this machine's own cluster, which ends with ``stack``."""
    import logging

    from distributed import Client, LocalCluster

    cluster = LocalCluster(
        n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=logging.ERROR
    )
    return Client(stack.enter_context(cluster))


def _candidates(
    args: argparse.Namespace, chosen: Cells, signatures: Sequence[Signature] | None
) -> tuple[Perturbation, ...]:
    """What the options ask for; ``signatures`` are those of the file that was given."""
    if args.signatures or signatures is not None:
        found = signature_edits(list(chosen.genes), 1.0 if args.dose is None else args.dose, signatures)
        if not found:
            name = args.signature_file or "the library"
            raise BadInput(f"No signature of {name} has a gene in these data: give another file.")
        return found
    if args.dose is not None:
        raise BadInput("--dose is that of signatures: give --signatures or --signature-file too, or leave it out.")
    return knock_outs(chosen, None if args.genes is None else [gene.strip() for gene in args.genes.split(",")])
