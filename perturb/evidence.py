"""May this effect be believed? All evidence on one comparison, gathered part by part, the cheap ones first.

A part asks one question (``PARTS``): how precise is the effect, does the model beat trivial rules, what do the reader's
errors change, is the cell inside the data, what do real cells show, does the effect leave the cloud of technical
redraws and that of random genes, on which genes does it hang, which way did it act. Each stands alone: it is asked for
by name, can be cancelled, is kept on disk by recipe and data, and if it cannot be made, the reason is kept in its
place. What the parts say in words is in :mod:`perturb.evidence_words`, what they make of the lights in
:mod:`perturb.verdict`.

Whatever is compared with the drawn effect has the recipe's encoder seed, sampler and first noise seeds. All of it
speaks about the model; the one part that looks at real cells says that it is confounded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd

from ge2hist_core.types import BadInput, Cells
from perturb.cache import DiskCache
from perturb.result import Result, pack_table, unpack_table
from perturb.run import Progress, choose_cells, edited_cells
from perturb.verdict import headline_readouts

if TYPE_CHECKING:
    from ge2hist_core.data import H5adSource
    from ge2hist_core.model import GE2Hist
    from perturb.edits import Perturbation

__all__ = [
    "ALL_PARTS",
    "COSTS",
    "PARTS",
    "Evidence",
    "Niches",
    "Part",
    "at_hand",
    "gather",
    "kept",
    "niches_of",
    "steps",
]

COSTS = {
    "instant": "less than a second",
    "seconds": "a few seconds",
    "pictures": "draws pictures: up to half a minute for one cell on two cores",
}
"""Cost classes, the cheap ones first."""

PARTS = {
    "precision": "instant",
    "baselines": "instant",
    "reader": "instant",
    "natural": "seconds",
    "technical": "seconds",
    "gates": "seconds",
    "matched": "seconds",
    "attribution": "seconds",
    "route": "pictures",
    "technical_drawn": "pictures",
    "matched_drawn": "pictures",
}
"""Part -> cost class, in the order in which they are made."""

ALL_PARTS = tuple(PARTS)
_BUNDLE_FILES = ("baselines/baselines.json", "gates.json", "reader.json")
KEPT = ("natural", "technical", "gates", "matched", "attribution", "route", "technical_drawn", "matched_drawn")
"""Parts that are kept on disk; the others cost less than reading them, or come from files of the bundle."""

DRAWN_PICTURES = 4
"""Pictures per redraw and per random edit: noise seeds times cells, at least one seed. Nineteen of each and the two
exchanged arms of sixteen seeds are then some 180 pictures, a minute of one core with the demo bundle."""
GUESSED = 99
"""Random edits that the niche network guesses: p reaches 0.01, four headline readouts q = 0.04. More of them would be
less like the edited gene: a panel has only so many."""
ATTRIBUTED = "density"
"""Readout that is attributed: always the same one, so that the choice does not look at the effects."""
LEAST_CELLS = 3.0
"""Cells around a cell, itself included, in the median window: fewer say that the file holds part of the section."""


@dataclass(frozen=True, eq=False)
class Part:
    """What one part found.

    Parameters
    ----------
    name: of ``PARTS``.
    tables: by name; numbers in the readout's unit, NaN where undefined.
    facts: plain JSON values: settings, counts, names.
    """

    name: str
    tables: Mapping[str, pd.DataFrame]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def pack(self) -> dict[str, Any]:
        """As JSON holds it."""
        tables = {name: pack_table(_finite(table)) for name, table in self.tables.items()}
        return {"name": self.name, "tables": tables, "facts": dict(self.facts)}

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> Part:
        """Inverse of :meth:`pack`."""
        tables = {name: unpack_table(table) for name, table in packed["tables"].items()}
        return cls(packed["name"], tables, packed["facts"])


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of one comparison beyond the comparison itself.

    Parameters
    ----------
    recipe_hash: of the result that it belongs to.
    headline: readouts that get a light (:func:`perturb.verdict.headline_readouts`).
    n_cells: of the recipe.
    parts: by name, in the order of ``PARTS``; those that were made.
    missing: part -> one sentence why it could not be made, of those that were asked for.
    """

    recipe_hash: str
    headline: tuple[str, ...]
    n_cells: int
    parts: Mapping[str, Part] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)

    def table(self, part: str, name: str) -> pd.DataFrame | None:
        """A table of a part, None where it was not made."""
        return self.parts[part].tables.get(name) if part in self.parts else None


Niches: TypeAlias = pd.DataFrame | Callable[[], pd.DataFrame]
"""Readouts of the real cells' niches by cell id, or what gives them when they are asked for."""


@dataclass(frozen=True, eq=False)
class _Asked:
    """What the parts are made from; ``edited`` are the recipe's cells after the edit."""

    result: Result
    model: GE2Hist
    cells: Cells
    chosen: Cells
    edited: Cells
    niches: Niches | None
    cache: DiskCache | None
    report: Callable[[Progress], None]
    cancel: threading.Event | None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.result.recipe.cell_ids), len(self.result.recipe.seeds)

    @property
    def drawn_seeds(self) -> int:
        """Noise seeds of the parts that draw many arms."""
        return min(self.shape[1], max(1, DRAWN_PICTURES // self.shape[0]))


def gather(
    result: Result,
    model: GE2Hist,
    cells: Cells,
    *,
    parts: Sequence[str] = ALL_PARTS,
    niches: Niches | None = None,
    cache: DiskCache | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> Evidence:
    """All the evidence that is asked for; :func:`steps` gives it part by part.

    Parameters
    ----------
    cells: as for :func:`perturb.run.run`: the result's cells and others of their types.
    parts: of ``PARTS``, in any order.
    niches: readouts of the niches of the recipe's file, for the natural experiment; see :func:`niches_of`.
    cache: finished parts are taken from it and kept in it, and the reasons for those that could not be had.
    on_progress: called as work goes on, in this thread. cancel: ends the work at the next chance.

    Raises
    ------
    BadInput: an unknown part, nothing edited, another model than the result's.
    ge2hist_core.sampler.Stopped: cancelled. Parts that were finished are in the cache.
    """
    *_, last = steps(
        result, model, cells, parts=parts, niches=niches, cache=cache, on_progress=on_progress, cancel=cancel
    )
    if cache is not None and set(parts) == set(ALL_PARTS):
        cache.store_json(_key("missing", result, cells), {"missing": dict(last.missing), "fitted": _fitted(model)})
    return last


def steps(
    result: Result,
    model: GE2Hist,
    cells: Cells,
    *,
    parts: Sequence[str] = ALL_PARTS,
    niches: Niches | None = None,
    cache: DiskCache | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> Iterator[Evidence]:
    """The evidence so far, first without any part, then after each one, from cheap to expensive; see :func:`gather`."""
    from ge2hist_core.sampler import Stopped

    recipe = result.recipe
    unknown = [name for name in parts if name not in PARTS]
    if unknown:
        raise BadInput(f"There is no part {unknown[0]!r} of the evidence: choose {', '.join(PARTS)}.")
    if not recipe.perturbation:
        raise BadInput("The result edits nothing: evidence needs an edit.")
    if model.sha256 != recipe.model_sha256:
        raise BadInput(
            f"The result was made with model {recipe.model_sha256[:12]}, but {model.sha256[:12]} is loaded: "
            "load that bundle."
        )
    chosen = choose_cells(cells, recipe.cell_ids)
    edited = edited_cells(recipe, chosen, cells, result.network)[0]
    wanted = [name for name in PARTS if name in parts]
    weights = np.cumsum([0.0, *({"instant": 1.0, "seconds": 5.0, "pictures": 20.0}[PARTS[name]] for name in wanted)])
    weights /= max(weights[-1], 1.0)
    evidence = Evidence(recipe.hash, tuple(headline_readouts(result.comparison)), len(chosen))
    yield evidence
    for i, name in enumerate(wanted):

        def report(progress: Progress, start: float = weights[i], end: float = weights[i + 1]) -> None:
            if on_progress is not None:
                fraction = float(start + (end - start) * progress.fraction)
                on_progress(Progress(fraction, progress.text, progress.preview))

        if cancel is not None and cancel.is_set():
            raise Stopped
        report(Progress(0.0, DOING[name]))
        asked = _Asked(result, model, cells, chosen, edited, niches, cache, report, cancel)
        try:
            found = _made(name, asked)
            evidence = replace(evidence, parts={**evidence.parts, name: found})
        except BadInput as error:
            evidence = replace(evidence, missing={**evidence.missing, name: str(error)})
        report(Progress(1.0, DOING[name]))
        yield evidence


def kept(result: Result, model: GE2Hist, cells: Cells, cache: DiskCache) -> tuple[str, ...]:
    """Parts that the cache holds, in order, and ``missing`` where all was gathered: what :func:`at_hand` depends on."""
    around = _around(cells)
    there = [name for name in KEPT if cache.load_json(_key_of(name, result.recipe.hash, around)) is not None]
    return (*there, *(["missing"] if _missing(result, model, cells, cache) is not None else []))


def _missing(result: Result, model: GE2Hist, cells: Cells, cache: DiskCache) -> dict[str, str] | None:
    """Why parts could not be had, None where not all was asked for, or the bundle has been fitted with more since."""
    noted = cache.load_json(_key("missing", result, cells)) or {}
    return noted["missing"] if noted.get("fitted") == _fitted(model) else None


def _fitted(model: GE2Hist) -> list[str]:
    """Which of the files that parts of the evidence need the bundle has."""
    folder = model.folder
    return [] if folder is None else [name for name in _BUNDLE_FILES if (folder / name).is_file()]


def at_hand(result: Result, model: GE2Hist, cells: Cells, cache: DiskCache) -> tuple[Evidence, bool]:
    """What can be said without work: the instant parts and those that the cache holds. True where all was gathered.

    Parameters
    ----------
    cells: as for :func:`gather`; parts are kept for these cells.

    Raises
    ------
    BadInput: as :func:`gather`.
    """
    there = kept(result, model, cells, cache)
    parts = [name for name, cost in PARTS.items() if cost == "instant" or name in there]
    evidence = gather(result, model, cells, parts=parts, cache=cache)
    missing = _missing(result, model, cells, cache)
    if missing is None:
        return evidence, False
    return replace(evidence, missing={name: missing[name] for name in PARTS if name in missing}), True


def _made(name: str, asked: _Asked) -> Part:
    key = _key(name, asked.result, asked.cells)
    stored = asked.cache.load_json(key) if asked.cache is not None and name in KEPT else None
    if stored is not None:
        return Part.unpack(stored)
    tables, facts = MAKERS[name](asked)
    part = Part(name, {one: _finite(table) for one, table in tables.items()}, facts)
    if asked.cache is not None and name in KEPT:
        asked.cache.store_json(key, part.pack())
    return part


def _key(name: str, result: Result, cells: Cells) -> str:
    return _key_of(name, result.recipe.hash, _around(cells))


def _key_of(name: str, recipe_hash: str, around: str) -> str:
    """Of a part in the cache, which keeps each version of the engine apart."""
    return hashlib.sha256(json.dumps(["evidence", name, recipe_hash, around]).encode()).hexdigest()


def _around(cells: Cells) -> str:
    return hashlib.sha256("\x1f".join([*cells.cell_id, *map(str, cells.genes)]).encode()).hexdigest()


def _finite(table: pd.DataFrame) -> pd.DataFrame:
    """NaN for infinite: the ratio to a cloud that is a point, which another column says."""
    numbers = [name for name, dtype in table.dtypes.items() if getattr(dtype, "kind", "O") == "f"]
    return table.assign(**{str(name): table[name].where(np.isfinite(table[name])) for name in numbers})


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


Found = tuple[dict[str, pd.DataFrame], dict[str, Any]]

# --- parts that look at what is there already ------------------------------------------------------------------------


def _precision(asked: _Asked) -> Found:
    from perturb.route import values_of
    from perturb.stats import pairing_gain, seeds_for

    def more(difference: np.ndarray, half_width: float) -> float:
        if not (np.isfinite(half_width) and half_width > 0):
            return float("nan")
        found = seeds_for(difference, half_width)
        return float("nan") if found is None else float(found)

    base, edited = (values_of(asked.result.readouts, arm, asked.shape) for arm in ("base", "edited"))
    rows = []
    for row in asked.result.comparison.itertuples():
        before, after = base[row.readout], edited[row.readout]
        half = (row.high - row.low) / 2
        clear = row.low > 0 or row.high < 0
        rows.append(
            (row.readout, row.unit, row.effect, row.low, row.high, row.n, half, more(after - before, half / 2),
             0.0 if clear else more(after - before, abs(row.effect)), pairing_gain(before, after))
        )  # fmt: skip
    columns = ["readout", "unit", "effect", "low", "high", "n", "half_width"]
    table = pd.DataFrame(rows, columns=[*columns, "seeds_to_halve", "seeds_to_exclude_0", "pairing_gain"])
    return {"precision": table}, {"cells": asked.shape[0], "seeds": asked.shape[1]}


def _baselines(asked: _Asked) -> Found:
    from ge2hist_core.files import sha256_file
    from perturb.baselines import FOLDER, load_baselines

    found = load_baselines(asked.model)
    if found is None:
        raise BadInput("This bundle has no baselines to compare with: fit them with `python -m perturb baselines`.")
    effects = found.effects(asked.result, asked.chosen, asked.edited)
    skill = found.skill[found.skill["readout"].isin(effects["readout"])].reset_index(drop=True)
    doubts = found.doubts(headline_readouts(asked.result.comparison))
    # They are no part of the bundle's own hash: baselines may be fitted anew beside the same weights.
    assert asked.model.folder is not None
    said = sha256_file(asked.model.folder / FOLDER / "baselines.json")
    return {"effects": effects, "skill": skill}, {"doubts": list(doubts), "baselines_sha256": said}


def _reader(asked: _Asked) -> Found:
    from ge2hist_core.reader_error import ReaderError
    from perturb.reader_error import COVERS, corrected_comparison, count_table

    reader, result = asked.model.reader, asked.result
    if reader is None:
        raise BadInput("This bundle has no nuclei reader: train one with `python -m ge2hist_core train-reader`.")
    judged = reader.figures.get("reconstructed", reader.figures)
    if not {"true_counts", "found_counts"} <= set(judged):
        raise BadInput(
            "This bundle's reader was judged without counting missed and made-up nuclei by type, so that no corrected "
            "interval can be given: train it again with `python -m ge2hist_core train-reader`."
        )
    error = ReaderError.from_figures(reader.figures, reader.classes)
    height, width = (side * result.um_per_px for side in result.base_arm.images.shape[1:3])
    base, edited = (
        count_table(arm.nuclei, (width, height), reader.classes).reshape(*asked.shape, -1)
        for arm in (result.base_arm, result.edited_arm)
    )
    table = corrected_comparison(base, edited, error, width * height / 1e6, result.recipe.encoder_seed)
    recall = {name: _number(value) for name, value in zip(reader.classes, error.recall, strict=True)}
    return {"corrected": table}, {"covers": COVERS, "recall": recall, "nuclei": int(error.outcome.sum())}


def _natural(asked: _Asked) -> Found:
    from perturb.natural import natural_experiment

    genes = asked.result.recipe.perturbation.genes
    if len(genes) != 1:
        raise BadInput(
            f"{len(genes)} genes are edited at once: real cells are compared by the expression of a single gene."
        )
    if asked.niches is None:
        raise BadInput("The niches of the real cells are not at hand: give cells with their positions in um.")
    types = () if asked.chosen.cell_type is None else tuple(dict.fromkeys(asked.chosen.cell_type))
    if len(types) != 1:
        raise BadInput(f"The chosen cells are of {len(types)} known types: real cells are compared within one type.")
    niches = asked.niches() if callable(asked.niches) else asked.niches
    found = natural_experiment(asked.cells, genes[0], types[0], niches, seed=asked.result.recipe.encoder_seed)
    beside = found.beside(asked.result)
    pairs = found.table.set_index("readout")
    beside["n"] = pairs["n"].reindex(beside["readout"]).fillna(0).astype(int).to_numpy()
    facts = {
        "gene": found.gene, "cell_type": found.cell_type, "rule": found.rule, "label": found.label,
        "pairs": len(found.pairs), "donors": int(np.nan_to_num(found.table["donors"].max())),
        "warnings": list(found.warnings),
    }  # fmt: skip
    return {"beside": beside, "balance": found.balance}, facts


def niches_of(source: H5adSource) -> pd.DataFrame:
    """Readouts of the real cells' niches, by cell id.

    Columns ``niche_<readout>`` of the file are taken where there are any; else density and composition are counted
    from positions and types (:func:`perturb.natural.niche_readouts`).

    Raises
    ------
    BadInput: neither is there, or the positions are those of a part of the cells.
    """
    import scipy.sparse as sp

    from perturb.natural import HALF_WIDTH_UM, niche_readouts
    from perturb.tables import UNITS

    own = {
        str(name): str(name).removeprefix("niche_")
        for name in source.obs.columns
        if str(name).startswith("niche_") and str(name).removeprefix("niche_").partition(":")[0] in UNITS
    }
    if own:
        table = source.obs[list(own)].rename(columns=own).apply(pd.to_numeric, errors="coerce")
        return table.astype(np.float64).set_axis(pd.Index(source.cell_id, dtype=object, name="cell_id"))
    in_um = source.xy is not None and source.preview.position_unit == "um"
    bare = Cells(
        counts=sp.csr_matrix((len(source), 1)),  # a niche is counted from positions and types alone
        genes=np.array(["none"]),
        cell_id=source.cell_id,
        cell_type=source.cell_type,
        donor=source.donor,
        xy_um=source.xy if in_um else None,
        source=source.path.name,
    )
    table = niche_readouts(bare)
    cells = float(table["density"].median()) * (2 * HALF_WIDTH_UM / 1000.0) ** 2
    if cells < LEAST_CELLS:
        raise BadInput(
            f"{source.path.name} has {cells:.1f} cells in the median window of {2 * HALF_WIDTH_UM:g} um, as a file "
            "with part of a section's cells has: give all cells of the sections."
        )
    return table


# --- parts that encode -----------------------------------------------------------------------------------------------


def _technical(asked: _Asked) -> Found:
    from perturb.technical import redraw, state_null

    result = asked.result
    redraws = redraw(asked.model, asked.chosen, result.recipe.encoder_seed)
    table = state_null(result.recipe, redraws, result.base_arm, result.edited_arm)
    return {"states": table}, {"draws": len(redraws)}


def _gates(asked: _Asked) -> Found:
    from perturb.gates import gate_table, nearest_supported

    result, model, recipe = asked.result, asked.model, asked.result.recipe
    genes = recipe.perturbation.genes
    table = gate_table(model, model.gates, asked.chosen, asked.edited, genes, result.base_arm, result.edited_arm)
    inside = {arm: rows["inside"].tolist() for arm, rows in table.groupby("arm", sort=False)}
    left = [
        i for i, (before, after) in enumerate(zip(inside["base"], inside["edited"], strict=True))
        if before is True and after is False
    ]  # fmt: skip
    nearest = None
    if left:
        cell = asked.chosen.take([left[0]])

        def apply(one: Perturbation) -> Cells:
            weaker = replace(recipe, cell_ids=recipe.cell_ids[left[0] : left[0] + 1], perturbation=one)
            return edited_cells(weaker, cell, asked.cells, result.network)[0]

        found = nearest_supported(
            recipe.perturbation, cell, model, model.gates, reference=asked.cells, apply=apply, seed=recipe.encoder_seed
        )
        if found is not None:
            nearest = {
                "cell_id": str(cell.cell_id[0]), "share": found.share, "edit": str(found.perturbation),
                "p": _number(found.p), "p_asked": _number(found.p_asked),
            }  # fmt: skip
    return {"gates": table}, {"fitted": model.gates is not None, "left": len(left), "nearest": nearest}


def _matched(asked: _Asked) -> Found:
    return _random_genes(asked, drawn=False)


def _random_genes(asked: _Asked, drawn: bool) -> Found:
    from perturb.matched import matched_null
    from perturb.stats import bh_fdr

    result = asked.result
    found = matched_null(
        result,
        asked.model,
        asked.cells,
        n=None if drawn else GUESSED,
        drawn=drawn,
        seeds=asked.drawn_seeds if drawn else None,
        seed=result.recipe.encoder_seed,
        network=result.network,
        cache=asked.cache if drawn else None,
        on_progress=asked.report,
        cancel=asked.cancel,
    )
    table = found.table.rename(columns={"q": "q_all"})
    headline = table["readout"].isin(headline_readouts(result.comparison)).to_numpy()
    table.insert(6, "q", bh_fdr(np.where(headline, table["p"], np.nan)))
    edits = int(found.effects["edit"].nunique())
    return {"readouts": table, "genes": found.genes}, {"edits": edits, "seeds": asked.drawn_seeds if drawn else 0}


def _attribution(asked: _Asked) -> Found:
    from perturb.attribution import attribute

    recipe = asked.result.recipe
    found = attribute(
        asked.model,
        asked.chosen.take([0]),
        ATTRIBUTED,
        encoder_seed=recipe.encoder_seed,
        cache=asked.cache,
        on_progress=asked.report,
        cancel=asked.cancel,
    )
    if not found.passed:
        raise BadInput("The attribution did not pass its own checks and is not shown. " + " ".join(found.reasons))
    place = {str(gene): rank for rank, gene in enumerate(found.table["gene"], start=1)}
    facts = {
        "cell_id": found.cell_id, "readout": found.readout, "unit": found.unit, "value": _number(found.value),
        "ranks": {gene: place.get(gene) for gene in recipe.perturbation.genes}, "warnings": list(found.warnings),
    }  # fmt: skip
    return {"genes": found.table, "checks": found.checks}, facts


# --- parts that draw -------------------------------------------------------------------------------------------------


def _route(asked: _Asked) -> Found:
    from perturb.route import route

    found = route(asked.result, asked.model, cache=asked.cache, on_progress=asked.report, cancel=asked.cancel)
    moved = {"moved_z_c": _number(found.moved_z_c), "moved_z_e": _number(found.moved_z_e)}
    return {"effects": found.table, "shares": found.shares}, moved


def _technical_drawn(asked: _Asked) -> Found:
    from perturb.technical import readout_null, redraw

    result, seeds = asked.result, asked.drawn_seeds
    redraws = redraw(asked.model, asked.chosen, result.recipe.encoder_seed)
    table = readout_null(
        result.recipe,
        asked.model,
        redraws,
        result.base_arm,
        result.edited_arm,
        noise="same",
        seeds=seeds,
        cancel=asked.cancel,
    )
    return {"readouts": table}, {"draws": len(redraws), "seeds": seeds}


def _matched_drawn(asked: _Asked) -> Found:
    return _random_genes(asked, drawn=True)


MAKERS: dict[str, Callable[[_Asked], Found]] = {
    "precision": _precision,
    "baselines": _baselines,
    "reader": _reader,
    "natural": _natural,
    "technical": _technical,
    "gates": _gates,
    "matched": _matched,
    "attribution": _attribution,
    "route": _route,
    "technical_drawn": _technical_drawn,
    "matched_drawn": _matched_drawn,
}

DOING = {
    "precision": "Working out how precise the effect is",
    "baselines": "Comparing with trivial rules",
    "reader": "Carrying the reader's errors along",
    "natural": "Comparing real cells",
    "technical": "Encoding the unedited cell again",
    "gates": "Asking whether the cell is inside the data",
    "matched": "Guessing edits of random genes",
    "attribution": "Following the density back to the genes",
    "route": "Exchanging identity and environment",
    "technical_drawn": "Drawing the unedited cell encoded again",
    "matched_drawn": "Drawing edits of random genes",
}
"""What the user reads while a part is made."""


# --- command ---------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m perturb evidence``: those of ``run``, and which parts."""
    from perturb import run

    run.add_arguments(parser, evidence=False)
    add_parts(parser)


def add_parts(parser: argparse.ArgumentParser) -> None:
    """``--parts``."""
    costs = ", ".join(f"{name} ({cost})" for name, cost in PARTS.items())
    parser.add_argument("--parts", metavar="NAME,NAME", help=f"of the evidence: {costs}; all by default")


def from_arguments(
    args: argparse.Namespace, result: Result, model: GE2Hist, cells: Cells, cache: DiskCache | None
) -> Evidence:
    """The evidence that the command line asks for; each part's seconds are printed on standard error.

    Raises
    ------
    BadInput: an unknown part, or evidence that cannot be had of this result.
    """
    recipe = result.recipe

    def niches() -> pd.DataFrame:
        from ge2hist_core.data import open_cells

        options = {"matrix": recipe.matrix, "gene_column": recipe.gene_column}
        with open_cells(args.cells, model.scgpt.vocab, **options) as source:
            return niches_of(source)

    parts = ALL_PARTS if args.parts is None else tuple(filter(None, args.parts.split(",")))
    evidence, done, start = None, 0, time.monotonic()
    for evidence in steps(result, model, cells, parts=parts, niches=niches, cache=cache):
        if len(evidence.parts) + len(evidence.missing) > done:
            done += 1
            name = [name for name in PARTS if name in parts][done - 1]
            print(f"{time.monotonic() - start:6.1f} s  {DOING[name]}", file=sys.stderr, flush=True)
        start = time.monotonic()
    assert evidence is not None
    return evidence


def main(args: argparse.Namespace) -> None:
    """Run a recipe, gather the evidence on it, write the report with both and print the lights.

    Raises
    ------
    BadInput: a recipe, bundle or data file that cannot be used, or that do not belong together.
    """
    from perturb.evidence_words import name_of
    from perturb.report import write_report
    from perturb.run import run_arguments
    from perturb.verdict import verdicts

    with run_arguments(args) as (result, model, cells, cache):
        evidence = from_arguments(args, result, model, cells, cache)
        for path in write_report(result, args.out, cells, evidence=evidence):
            if path.name.startswith(("report", "evidence")):
                print(path)
    for verdict in verdicts(result, evidence):
        print(f"{verdict.light:5}  {name_of(verdict.readout)}: {verdict.claim}")
