"""Screen: which of many edits move a cell's niche? ``python -m perturb screen``.

Two stages.

1. **Guess.** Every candidate is embedded and encoded, and the model's niche network says which neighbours it expects
   (:meth:`GE2Hist.expected_neighbours`): no picture is drawn. Each candidate's shift is compared with those of genes
   of like expression (matched-gene null).
2. **Confirm.** The leading candidates are drawn with the same noise as the unedited cell. A first set of seeds keeps
   the better half; p-values and intervals come from *further* seeds alone, which took no part in the choice, so that
   the choice does not flatter them. Both sets are shown beside each other (replication).

A knock-out of a gene that a cell does not express changes nothing at all, so such genes are not candidates.

Everything that decides the result is in the :class:`Screen`; candidates are drawn by ordinary recipes, one at a time,
so that they can be spread over processes or a ``dask.distributed`` cluster without changing a number.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ge2hist_core.config import READER_CLASSES
from ge2hist_core.types import BadInput, Cells
from perturb.edits import Edit, EditSet, Perturbation
from perturb.recipe import Recipe
from perturb.result import pack_table, unpack_table
from perturb.run import Progress, run
from perturb.stats import bh_fdr, crossed_effect

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist
    from perturb.cache import DiskCache

__all__ = [
    "Screen",
    "ScreenResult",
    "agreement",
    "confirm",
    "guess",
    "knock_outs",
    "load_screen",
    "run_screen",
    "signature_edits",
]

MATCHED = 30
"""Genes of like expression in the null of a gene."""
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
    BadInput: no candidate, one given twice, a number of seeds below 2, an unknown readout.
    """

    recipe: Recipe
    candidates: tuple[Perturbation, ...]
    keep: int = 20
    first_seeds: tuple[int, ...] = (0, 1, 2, 3)
    further_seeds: tuple[int, ...] = (4, 5, 6, 7, 8, 9, 10, 11)
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
        """Inverse of :meth:`to_dict`.

        Raises
        ------
        BadInput: an unknown, missing or malformed field.
        """
        names = ("recipe", "candidates", "keep", "first_seeds", "further_seeds", "readout")
        cure = "give a screen.json that GE2Hist wrote"
        if not isinstance(value, dict):
            raise BadInput(f"The screen is no table of fields: {cure}.")
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
    def edited_pictures(self) -> int:
        """How many edited pictures the second stage draws."""
        n = min(self.keep, len(self.candidates))
        kept = -(-n // 2)
        return len(self.recipe.cell_ids) * (n * len(self.first_seeds) + kept * len(self.further_seeds))

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


def signature_edits(genes: Sequence[str], dose: float = 1.0) -> tuple[Perturbation, ...]:
    """Every signature of the library that acts on genes of the data, at one dose."""
    from perturb.signatures import expand, load_library

    found = []
    for signature in load_library():
        try:
            edits = expand(signature, genes, dose).perturbation.edits
        except BadInput:  # none of its genes is in these data
            continue
        found.append(Perturbation((EditSet(signature.name, edits, dose),)))
    return tuple(found)


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
    ``p_matched``, ``q_matched``: ``(b + 1) / (n + 1)`` with ``b`` of the ``n`` candidates of nearest level moved at
    least as far, and its Benjamini-Hochberg adjustment. NaN with fewer than 30 others.

    Raises
    ------
    ge2hist_core.sampler.Stopped: cancelled.
    """
    from ge2hist_core.sampler import Stopped

    recipe = screen.recipe
    row = {name: i for i, name in enumerate(cells.cell_id)}
    chosen = cells.take([row[name] for name in recipe.cell_ids])
    base = _State(model, recipe.perturbation.apply(chosen, cells), recipe.encoder_seed)
    rows = []
    for i, candidate in enumerate(screen.candidates):
        if cancel is not None and cancel.is_set():
            raise Stopped
        edited = _State(model, screen.edited(candidate, (0,)).perturbation.apply(chosen, cells), recipe.encoder_seed)
        columns = np.isin(chosen.genes, candidate.genes)
        rows.append({"candidate": str(candidate)} | edited.against(base) | {"level": _level(chosen, columns)})
        if on_progress is not None:
            on_progress(Progress((i + 1) / len(screen.candidates), "Ranking the candidates"))
    table = pd.DataFrame(rows)
    order = table[screen.readout].abs().to_numpy()
    table["p_matched"] = _matched_p(order, table["level"].to_numpy())
    table["q_matched"] = bh_fdr(table["p_matched"].to_numpy())
    return table.iloc[np.argsort(-order, kind="stable")].reset_index(drop=True)


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
    """Empirical p of each score among the ``MATCHED`` others of nearest level."""
    p = np.full(len(score), np.nan)
    if len(score) <= MATCHED:
        return p
    for i in range(len(score)):
        gap = np.abs(np.log1p(level) - np.log1p(level[i]))
        gap[i] = np.inf
        others = np.argsort(gap, kind="stable")[:MATCHED]
        p[i] = ((score[others] >= score[i]).sum() + 1) / (MATCHED + 1)
    return p


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
    seeds left out), ``q`` (Benjamini-Hochberg over all rows with a p), ``replicated`` (both sets agree in sign).
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
    yield _confirmed(rows, {})
    best = sorted(rows, key=lambda name: -_strength(first[name], screen.readout))
    kept = [by_name[name] for name in best[: -(-len(best) // 2)]]
    further: dict[str, pd.DataFrame] = {}
    for name, table in _drawn(screen, kept, screen.further_seeds, draw):
        further[name] = _effects(table, screen.recipe.encoder_seed)
        yield _confirmed(rows, further)


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
    rows = []
    for readout in READOUTS:
        base, edited, unit = _pairs(readouts, readout)
        if ":" in readout and not (np.nan_to_num(base).any() or np.nan_to_num(edited).any()):
            continue
        found = crossed_effect(base, edited, seed)
        rows.append((readout, unit, found.value, found.low, found.high, found.p, found.n))
    return pd.DataFrame(rows, columns=["readout", "unit", "effect", "low", "high", "p", "n"])


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


def _confirmed(first: dict[str, pd.DataFrame], further: dict[str, pd.DataFrame]) -> pd.DataFrame:
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
    table["replicated"] = np.sign(table["first_effect"]) == np.sign(table["effect"])
    columns = ["candidate", "readout", "unit", "first_effect", "effect", "low", "high", "p", "q", "n", "replicated"]
    return table.sort_values(["q", "p"], kind="stable", na_position="last")[columns].reset_index(drop=True)


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

            yield run(recipe, model, cells, cache=cache, on_progress=report, cancel=cancel).readouts
            done += len(recipe.seeds) * len(recipe.cell_ids)

    result = ScreenResult(screen.hash, ranked, pd.DataFrame(), complete=False)
    _store(result, cache)
    for table in confirm(screen, ranked, draw or here):
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


@lru_cache(maxsize=1)
def _opened(bundle: str, cells: str, matrix: str | None, gene_column: str | None) -> tuple[Any, Any]:
    from ge2hist_core.data import open_h5ad
    from ge2hist_core.model import GE2Hist

    model = GE2Hist.load(bundle)
    return model, open_h5ad(cells, model.scgpt.vocab, matrix=matrix, gene_column=gene_column)


def draw_one(recipe_json: str, bundle: str, cells: str) -> pd.DataFrame:
    """Readouts of one recipe, in a worker process that finds bundle and cells at these paths."""
    from perturb.run import cells_for

    recipe = Recipe.from_json(recipe_json)
    model, source = _opened(bundle, cells, recipe.matrix, recipe.gene_column)
    return run(recipe, model, cells_for(source, recipe.cell_ids)).readouts


def on_cluster(client: Any, bundle: str, cells: str) -> Draw:
    """Recipes drawn by the workers of a ``dask.distributed`` client; a worker that dies has its recipe drawn again."""

    def draw(recipes: Sequence[Recipe]) -> Iterator[pd.DataFrame]:
        futures = client.map(draw_one, [r.to_json() for r in recipes], bundle=bundle, cells=cells, retries=3)
        for future in futures:
            yield future.result()

    return draw


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m perturb screen``."""
    parser.add_argument("--cell", action="append", required=True, help="cell id; may be given several times")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--genes", help="comma-separated genes to knock out (default: all that the cells express)")
    what.add_argument("--signatures", action="store_true", help="screen the library of drug signatures instead")
    parser.add_argument("--dose", type=float, default=1.0, help="of the signatures")
    parser.add_argument("--edit", default="", help="edits made before each candidate")
    parser.add_argument("--keep", type=int, default=20, help="candidates to draw")
    parser.add_argument("--readout", default="shift", help="rank by shift, density or fraction:TYPE")
    parser.add_argument("--out", required=True, help="folder for report and tables")
    parser.add_argument("--bundle", default="assets/demo_bundle", help="folder of the model")
    parser.add_argument("--cells", default="assets/demo_cells.h5ad", help="h5ad with raw counts")
    parser.add_argument("--cache", help="folder in which finished work is kept and looked up")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="of a dask.distributed cluster that sees the same files")


def main(args: argparse.Namespace) -> None:
    """Screen and write the report, both tables among its files.

    Raises
    ------
    BadInput: a bundle, data file, gene or scheduler that cannot be used.
    """
    import tempfile
    from pathlib import Path

    from ge2hist_core.data import open_h5ad
    from ge2hist_core.model import GE2Hist
    from perturb.cache import DiskCache
    from perturb.run import cells_for, print_progress
    from perturb.screen_report import write_report
    from perturb.wording import Origin

    model = GE2Hist.load(args.bundle)
    with open_h5ad(args.cells, model.scgpt.vocab) as source:
        cells = cells_for(source, args.cell)
        recipe = Recipe(source.sha256, model.sha256, tuple(args.cell), Perturbation.parse(args.edit))
    chosen = cells.take(slice(len(args.cell)))
    candidates = (
        signature_edits(list(cells.genes), args.dose)
        if args.signatures
        else knock_outs(chosen, None if args.genes is None else [gene.strip() for gene in args.genes.split(",")])
    )
    screen = Screen(recipe, candidates, keep=args.keep, readout=args.readout)
    print(f"{len(candidates)} candidates; {min(args.keep, len(candidates))} of them drawn, {screen.pictures} pictures")
    draw = None
    if args.scheduler:
        from distributed import Client

        try:
            client = Client(args.scheduler, timeout=20)
        except (OSError, ValueError, TimeoutError) as error:
            raise BadInput(
                f"--scheduler {args.scheduler} does not answer ({error}): start it, or leave it out."
            ) from None
        draw = on_cluster(client, str(Path(args.bundle).resolve()), str(Path(args.cells).resolve()))
    with tempfile.TemporaryDirectory() as folder:
        cache = DiskCache(args.cache or folder)
        result = run_screen(screen, model, cells, cache, draw=draw, on_progress=print_progress())
    for path in write_report(screen, result, Origin.of_model(model, cells), args.out):
        print(path)
