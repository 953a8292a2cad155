"""All figures of a bundle on the donors of a store that it has not learned from."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ge2hist_core import rng
from ge2hist_core.config import READER_CLASSES, SampleConfig
from ge2hist_core.evaluation.contest import FLOOR, feature_sets, figure_3_verdicts, table_1, verdict
from ge2hist_core.evaluation.methods import OWN, Method, controls, own, rivals, trained
from ge2hist_core.evaluation.read_back import expression_scores, fit_reader, picture_features, recovered
from ge2hist_core.evaluation.readings import Readings, compare, compare_fully
from ge2hist_core.evaluation.states import central_class, central_types, classifier_figures, separation
from ge2hist_core.evaluation.truth import effects_against_truth, noise_seeds
from ge2hist_core.evaluation.work import Work
from ge2hist_core.niche import niche_stats
from ge2hist_core.types import BadInput, Latent

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.store import TissueStore

__all__ = ["QUICK", "Counts", "evaluate"]

EMBED_BLOCK = 512
REFERENCE = SampleConfig("ddpm", 1000)
REAL = "real"


@dataclass(frozen=True)
class Counts:
    """How much is drawn.

    Parameters
    ----------
    tiles: cells whose niche each method draws once, compared with the real tile.
    reference_tiles: of these, how many are also drawn with 1000 steps of DDPM; 0 leaves the comparison out.
    edit_cells: cells on which each driver programme is edited (known-truth stores only); 0 leaves it out.
    type_pictures: pictures per cell type drawn from its mixture; 0 leaves it out.
    training_cells: cells of training donors for retrieval, probes and read-back; 0 leaves these out.
    classified_cells: held-out cells that are classified; None: all.
    """

    tiles: int = 500
    reference_tiles: int = 32
    edit_cells: int = 48
    type_pictures: int = 48
    training_cells: int = 3000
    classified_cells: int | None = None

    def __post_init__(self) -> None:
        if self.tiles < 2:
            raise BadInput(f"--tiles is {self.tiles}: give at least 2.")
        for name in ("reference_tiles", "edit_cells", "type_pictures"):
            n = getattr(self, name)
            if n != 0 and not 2 <= n <= self.tiles:
                option = f"--{name.replace('_', '-')}"
                raise BadInput(f"{option} is {n}: give 0, or 2 to {self.tiles}, which is --tiles.")
        if self.training_cells < 0:
            raise BadInput(f"--training-cells is {self.training_cells}: give 0 or more.")


QUICK = Counts(24, 0, 4, 4, 200, 400)
"""A look at everything in a few minutes; the intervals are wide."""


@dataclass(frozen=True, eq=False)
class _Asked:
    """What every part of the evaluation is about: the cells, their noise, who keeps the work."""

    model: GE2Hist
    store: TissueStore
    rows: np.ndarray
    pool: np.ndarray
    seeds: list[int]
    sample: SampleConfig
    seed: int
    work: Work

    @property
    def tile_um(self) -> float:
        return self.model.config.tile_px * self.model.config.um_per_px

    @property
    def key(self) -> list[Any]:
        return [self.store.identity, self.rows.tolist(), self.seed]

    @property
    def central(self) -> np.ndarray:
        return _types(self.store)[self.rows]

    @property
    def donor(self) -> np.ndarray:
        return _donors(self.store)[self.rows]

    def read(self, images: np.ndarray, at: np.ndarray | slice = slice(None)) -> Readings:
        """Readings of pictures of the asked cells, or of those at some positions."""
        return _read(self.model.read_nuclei(images), self.central[at], self.tile_um, self.donor[at])

    def embed(self, rows: np.ndarray, title: str) -> np.ndarray:
        cells = self.store.cells
        asked = ["embedding", self.model.sha256, self.store.identity, self.seed, rows.tolist()]
        return self.work.blocks(
            asked, len(rows), lambda at: self.model.embed(cells.take(rows[at]), self.seed), title, EMBED_BLOCK
        )


def _types(store: TissueStore) -> np.ndarray:
    assert store.cells.cell_type is not None
    return store.cells.cell_type


def _donors(store: TissueStore) -> np.ndarray:
    assert store.cells.donor is not None
    return store.cells.donor


def evaluate(
    model: GE2Hist,
    store: TissueStore,
    counts: Counts | None = None,
    *,
    seed: int = 0,
    sample: SampleConfig | None = None,
    rival_folders: Sequence[Path] = (),
    inception: Path | None = None,
    lpips: tuple[Path, Path] | None = None,
    work: Path | None = None,
) -> dict[str, Any]:
    """All figures of a bundle on the held-out donors of a store.

    Parameters
    ----------
    counts: how much is drawn. seed: of cells, noise and resampling. sample: how GE2Hist draws.
    rival_folders: of ``train-rival``. inception: weight file of Inception-v3. lpips: those of AlexNet and of LPIPS.
    work: folder in which pictures and features are kept, so that a run that was stopped goes on; None keeps nothing.

    Raises
    ------
    BadInput: a number of tiles that cannot be, too few held-out cells, a store of another resolution, no reader, a
        rival that has learned from held-out donors, a wrong weight file.
    """
    counts, sample = counts or Counts(), sample or SampleConfig()
    kept = Work(work)
    if not math.isclose(store.um_per_px, model.config.um_per_px):
        raise BadInput(
            f"{store.path} has {store.um_per_px:g} um per px, the bundle {model.config.um_per_px:g}: "
            "give a store of the bundle's resolution."
        )
    seen = model.has_learned_from(store)
    donors = [name for name in store.donors if name not in seen]
    eligible = np.flatnonzero(np.isin(_donors(store), donors))
    pool = eligible[store.interior[eligible]]
    tiles = counts.tiles
    if len(pool) < 2 * tiles:
        raise BadInput(
            f"--tiles is {tiles}, the held-out donors have {len(pool)} whole tiles and the floor needs as many others: "
            f"give at most {len(pool) // 2} or simulate more donors."
        )
    rows = np.sort(rng.stream(seed, "evaluation_cells").choice(pool, tiles, replace=False))
    asked = _Asked(model, store, rows, pool, noise_seeds(seed, rows), sample, seed, kept)
    result: dict[str, Any] = {
        "bundle_sha256": model.sha256,
        "store": store.identity,
        "donors": list(donors),
        "seed": seed,
        "sample": {"solver": sample.solver, "steps": sample.steps, "guidance": sample.guidance},
        "counts": asdict(counts),
        "simulated": store.simulation is not None,
    }

    # Before anything slow: a bundle without a reader, wrong weights and unfit rivals end here.
    features, distances = feature_sets(model, kept, inception, lpips)
    cells = store.cells.take(rows)
    others = rivals(rival_folders, store, cells, asked.seeds, model.config.tile_px, sample, asked.key)
    real_images = store.tiles(rows)
    real = asked.read(real_images)
    training_rows = _training_rows(model, store, counts.training_cells, seed)

    classified = _classified(eligible, rows, counts.classified_cells, seed)
    _say_cost(asked, counts, others, len(classified), len(training_rows), _judge(asked, features, distances))
    latent = model.encode(asked.embed(classified, "embedding held-out cells"))
    guess = np.array(model.cell_types, dtype=object)[model.classify(latent).argmax(axis=1)]
    result["classifier"] = classifier_figures(guess, _types(store)[classified], _donors(store)[classified], seed)
    state = latent.take(np.searchsorted(classified, rows))

    methods = [own(model, state, asked.seeds, sample, asked.key), *others, *_controls(asked, cells, training_rows)]
    methods[0].facts["training"] = trained(model)
    pictures = {method.name: method.pictures(tiles, kept) for method in methods}
    result["methods"] = {method.name: method.to_json() for method in methods}

    floor_rows = _matched_other(store, rows, pool, seed)
    floor_images = store.tiles(floor_rows)
    generated = asked.read(pictures[OWN])
    result |= _old_comparisons(asked, generated, real, floor_images, floor_rows)
    comparisons = {
        name: compare_fully(generated if name == OWN else asked.read(images), real, seed)
        for name, images in pictures.items()
    }
    result["figure_3"] = {
        "floor": result["floor_real_vs_real"],
        "reader": result["reader_vs_truth_on_real"],
        "methods": {name: comparison.json for name, comparison in comparisons.items()},
        "verdicts": figure_3_verdicts(comparisons, methods),
    }
    figures, drawn = table_1(real_images, {FLOOR: floor_images, **pictures}, features, distances, asked.donor, seed)
    verdicts = [
        verdict(
            name,
            {k: (v["value"], v["low"], v["high"]) for k, v in by_method.items()},
            methods,
            drawn[name],
            comparisons[OWN].freedom,
        )
        for name, by_method in figures.items()
    ]
    result["table_1"] = {"figures": figures, "verdicts": [v for v in verdicts if v]}

    if len(training_rows):
        result |= _with_training(asked, counts, features, state, real_images, floor_images, pictures, training_rows)
    if counts.reference_tiles:
        result["steps"] = _steps(asked, counts.reference_tiles, state, generated, real)
    if counts.type_pictures and model.mixture is not None:
        result["central_types"] = _central(asked, counts.type_pictures, state, real_images)
    if counts.edit_cells and store.simulation is not None:
        few = rng.stream(seed, "evaluation_edit_cells").choice(tiles, counts.edit_cells, replace=False)
        effects = effects_against_truth(model, store, rows[np.sort(few)], sample, seed, asked.tile_um, kept)
        clear = [e for e in effects if e["exceeds_noise"]]
        result["driver_programmes"] = {
            "n_cells": counts.edit_cells,
            "edits_exceeding_noise": len(clear),
            "signs_right": sum(e["sign_right"] for e in clear),
            "clear_readouts": sum(e["clear_readouts"] for e in effects),
            "clear_signs_right": sum(e["clear_signs_right"] for e in effects),
            "edits": effects,
        }
    return result


# --- which cells ------------------------------------------------------------------------------------------------------


def _training_rows(model: GE2Hist, store: TissueStore, n: int, seed: int) -> np.ndarray:
    """At most ``n`` cells with whole tiles of the donors that the bundle was trained on; none in a foreign store."""
    donors = sorted(model.has_learned_from(store, ("train",)))
    if not n or not donors:
        return np.empty(0, dtype=np.int64)
    return np.sort(rng.stream(seed, "evaluation_training").permutation(store.rows(donors))[:n])


def _classified(eligible: np.ndarray, rows: np.ndarray, n: int | None, seed: int) -> np.ndarray:
    """Held-out cells to be classified, sorted; the asked ones are among them."""
    if n is None or n >= len(eligible):
        return eligible
    rest = rng.stream(seed, "evaluation_classified").permutation(np.setdiff1d(eligible, rows))
    return np.sort(np.concatenate([rows, rest[: max(0, n - len(rows))]]))


def _matched_other(store: TissueStore, rows: np.ndarray, pool: np.ndarray, seed: int) -> np.ndarray:
    """For each row another cell of the same type, of the same donor where there is one; each cell is used once."""
    kinds, donors, draw = _types(store), _donors(store), rng.stream(seed, "evaluation_floor")
    free = list(draw.permutation(np.setdiff1d(pool, rows)))
    chosen = []
    for row in rows:
        same = [i for i in free if kinds[i] == kinds[row]]
        near = [i for i in same if donors[i] == donors[row]] or same or free
        if not near:
            raise BadInput(
                f"The store has {len(pool)} held-out cells for {len(rows)} tiles and a floor of as many others: "
                "lower --tiles or simulate more donors."
            )
        chosen.append(near[0])
        free.remove(near[0])
    return np.array(chosen)


# --- the parts --------------------------------------------------------------------------------------------------------


def _read(
    tables: Sequence[pd.DataFrame], central: np.ndarray, tile_um: float, donor: np.ndarray | None = None
) -> Readings:
    return Readings([niche_stats(t, (tile_um, tile_um), READER_CLASSES) for t in tables], central, donor)


def _controls(asked: _Asked, cells: Any, training_rows: np.ndarray) -> list[Method]:
    found = controls(
        asked.model, asked.store, training_rows, cells, asked.seeds, asked.sample, asked.seed, asked.key,
        lambda: asked.embed(training_rows, "embedding training cells"),
    )  # fmt: skip
    return found if len(training_rows) else found[1:]


def _old_comparisons(
    asked: _Asked, generated: Readings, real: Readings, floor_images: np.ndarray, floor_rows: np.ndarray
) -> dict[str, Any]:
    """Generated tiles between floor and ceiling, and the reader against the truth."""
    seed, n = asked.seed, len(asked.rows)
    true = _read([asked.store.nuclei(row) for row in asked.rows], asked.central, asked.tile_um, asked.donor)
    exchanged = rng.stream(seed, "evaluation_exchange").permutation(n)
    ceiling = Readings(generated.take(exchanged).stats, asked.central, asked.donor)
    result = {
        "generated_vs_real": compare(generated, real, seed),
        "floor_real_vs_real": compare(asked.read(floor_images), real, seed),
        "ceiling_conditions_exchanged": compare(ceiling, real, seed),
    }
    for name in ("density_relative", "composition_kl", "spacing_um", "spacing_var_um2"):
        # Over all cells together they are those of the generated tiles by construction.
        result["ceiling_conditions_exchanged"][name] = {"value": None, "low": None, "high": None}
    same_type = _types(asked.store)[floor_rows] == asked.central
    result["floor_real_vs_real"]["n_same_type"] = int(same_type.sum())
    result["reader_vs_truth_on_real"] = compare(real, true, seed)
    return result


def _steps(asked: _Asked, n: int, state: Latent, generated: Readings, real: Readings) -> dict[str, Any]:
    """Few tiles drawn again with all steps."""
    few = np.sort(rng.stream(asked.seed, "evaluation_reference").choice(len(asked.rows), n, replace=False))
    method = own(asked.model, state.take(few), [asked.seeds[i] for i in few], REFERENCE, [*asked.key, few.tolist()])
    slow = asked.read(replace(method, title="GE2Hist, 1000 steps").pictures(n, asked.work), few)
    name = f"{asked.sample.solver} {asked.sample.steps}"
    return {
        f"{name} vs real": compare(generated.take(few), real.take(few), asked.seed),
        "ddpm 1000 vs real": compare(slow, real.take(few), asked.seed),
        f"{name} vs ddpm 1000": compare(generated.take(few), slow, asked.seed),
    }


def _central(asked: _Asked, n: int, state: Latent, real_images: np.ndarray) -> dict[str, Any]:
    model = asked.model
    chosen = np.sort(rng.stream(asked.seed, "evaluation_environments").choice(len(asked.rows), n, replace=False))
    read = [central_class(table, asked.tile_um) for table in model.read_nuclei(real_images)]
    real = {kind: [c for c, k in zip(read, asked.central, strict=True) if k == kind] for kind in model.cell_types}
    return central_types(
        model, state.take(chosen), [asked.seeds[i] for i in chosen], asked.donor[chosen], real, asked.sample,
        asked.seed, [*asked.key, chosen.tolist()], asked.work,
    )  # fmt: skip


def _with_training(
    asked: _Asked,
    counts: Counts,
    features: Sequence[Any],
    state: Latent,
    real_images: np.ndarray,
    floor_images: np.ndarray,
    pictures: dict[str, np.ndarray],
    training_rows: np.ndarray,
) -> dict[str, Any]:
    """What needs cells of the training donors: the probes of the state, and read-back."""
    store, seed = asked.store, asked.seed
    kinds = _types(store)
    result: dict[str, Any] = {}
    if len(np.unique(kinds[training_rows])) > 1:
        training = asked.model.encode(asked.embed(training_rows, "embedding training cells"))
        result["separation"] = separation(
            training, kinds[training_rows], np.sqrt(store.neighbour_counts(training_rows)),
            state, asked.central, np.sqrt(store.neighbour_counts(asked.rows)), asked.donor, store.cell_types, seed,
        )  # fmt: skip
    reader, texture = features[:2]
    scores, true, share = expression_scores(store.cells.counts[training_rows], store.cells.counts[asked.rows])
    _say(f"read-back: features of {len(training_rows)} training tiles")
    ridge = fit_reader(
        picture_features(store.tiles(training_rows), reader, texture), scores, _donors(store)[training_rows]
    )
    guesses = {
        name: ridge(picture_features(images, reader, texture))
        for name, images in {REAL: real_images, FLOOR: floor_images, **pictures}.items()
    }
    result["read_back"] = {
        "n_training": len(training_rows),
        "components": scores.shape[1],
        "variance_in_components": share,
        "alpha": ridge.alpha,
        "methods": recovered(true, guesses, REAL, asked.donor, seed),
    }
    return result


# --- how long ---------------------------------------------------------------------------------------------------------


def _judge(asked: _Asked, features: Sequence[Any], distances: Sequence[Any]) -> Callable[[np.ndarray], None]:
    """Everything that is computed of a picture, without keeping it."""

    def judge(images: np.ndarray) -> None:
        asked.model.read_nuclei(images)
        for one in features:
            one.features(images)
        for one in distances:
            one.features.distance(images, images)

    return judge


def _say_cost(
    asked: _Asked,
    counts: Counts,
    others: Sequence[Method],
    n_classified: int,
    n_training: int,
    judge: Callable[[np.ndarray], None],
) -> None:
    """Print what the run is expected to take, from one chunk of each method timed on this machine."""
    from ge2hist_core.model import CHUNK

    model, few = asked.model, np.arange(min(CHUNK, counts.tiles))
    cells = asked.store.cells.take(asked.rows[few])
    embedding, per_cell = _timed(lambda: model.embed(cells, asked.seed), len(few))
    state = model.encode(embedding)
    one = own(model, state, asked.seeds, asked.sample, asked.key)
    _, per_picture = _timed(lambda: one.draw(few), len(few))
    _, per_judgement = _timed(lambda: judge(asked.store.tiles(asked.rows[few])), len(few))
    n_types = len(model.cell_types) if model.mixture is not None else 0
    edits = 0
    if asked.store.simulation is not None and counts.edit_cells:
        from ge2hist_core.simulator.programmes import PROGRAMMES

        edits = (1 + 2 * len(PROGRAMMES)) * counts.edit_cells
    drawn: dict[str, int] = {
        "GE2Hist": 2 * counts.tiles + counts.type_pictures * n_types + edits
    }  # its shuffled control included
    seconds = {"GE2Hist": drawn["GE2Hist"] * per_picture}
    if counts.reference_tiles:
        drawn["GE2Hist, 1000 steps"] = counts.reference_tiles
        seconds["GE2Hist, 1000 steps"] = counts.reference_tiles * per_picture * REFERENCE.steps / asked.sample.steps
    for method in others:
        missing = asked.work.missing(method.asked, counts.tiles)
        drawn[method.title] = missing
        seconds[method.title] = missing * _timed(partial(method.draw, few), len(few))[1] if missing else 0.0
    judged = (4 + len(others) + 1) * counts.tiles + n_training + drawn["GE2Hist"] - 2 * counts.tiles
    lines = [f"  {n:,} pictures of {title}: {seconds[title]:.0f} s" for title, n in drawn.items()]
    lines += [f"  {judged:,} pictures read and measured: {judged * per_judgement:.0f} s"]
    lines += [f"  {n_classified + n_training:,} cells embedded: {(n_classified + n_training) * per_cell:.0f} s"]
    total = sum(seconds.values()) + judged * per_judgement + (n_classified + n_training) * per_cell
    kept = "" if asked.work.folder is None else "; what is kept from an earlier run is not drawn again"
    _say("\n".join([f"expected: about {total / 60:.0f} min at the most{kept}", *lines]))


def _timed(run: Callable[[], Any], n: int) -> tuple[Any, float]:
    """The result and the seconds per item."""
    started = time.perf_counter()
    found = run()
    return found, (time.perf_counter() - started) / n


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
