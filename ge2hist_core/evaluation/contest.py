"""Table 1 and Figure 3 of the paper: who draws tiles that are nearest to the real ones of the same cells.

A figure's name says its features: "KID (reader features)" and "KID (Inception-v3 features)" are different figures. All
methods are compared with the same real tiles, under the same resamples of donors and cells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ge2hist_core.evaluation.methods import OWN, Method
from ge2hist_core.evaluation.readings import FIGURES, Comparison, reach
from ge2hist_core.evaluation.work import Kept, Work
from ge2hist_core.files import sha256_file
from ge2hist_core.metrics import KID, Estimate, kid, paired_mean

if TYPE_CHECKING:
    from ge2hist_core.image_features import Features
    from ge2hist_core.model import GE2Hist

__all__ = ["FLOOR", "feature_sets", "figure_3_verdicts", "table_1", "verdict"]

FLOOR = "floor"
"""Key of the real tiles of other cells: what a perfect generator that does not copy would reach."""


def feature_sets(
    model: GE2Hist, work: Work, inception: Path | None = None, lpips: tuple[Path, Path] | None = None
) -> tuple[list[Features], list[Any]]:
    """Features for KID and distances of pairs: always those of the reader, of stain and texture; others from files.

    Parameters
    ----------
    inception: weights of Inception-v3. lpips: weights of AlexNet and of LPIPS v0.1.

    Raises
    ------
    BadInput: the bundle has no reader, or a file does not hold the weights.
    """
    from ge2hist_core.image_features import LPIPS, InceptionFeatures, ReaderFeatures, TextureFeatures

    model.read_nuclei(np.zeros((0, 16, 16, 3), np.uint8))  # says what to do where there is no reader
    assert model.reader is not None
    reader = Kept(ReaderFeatures(model.reader, model.config.um_per_px), ["reader", model.sha256], work)
    features: list[Features] = [reader, Kept(TextureFeatures(), ["texture"], work)]
    distances: list[Any] = [reader]
    if inception is not None:
        features.append(Kept(InceptionFeatures(inception), ["inception", sha256_file(inception)], work))
    if lpips is not None:
        distances.append(Kept(LPIPS(*lpips), ["lpips", *(sha256_file(path) for path in lpips)], work))
    return features, distances


def distance_name(features: Any) -> str:
    """LPIPS by its own name; the same form on other activations by theirs."""
    return features.name if features.name.startswith("LPIPS") else f"LPIPS-type distance ({features.name} features)"


def table_1(
    real: np.ndarray,
    pictures: Mapping[str, np.ndarray],
    features: Sequence[Features],
    distances: Sequence[Any],
    donor: np.ndarray,
    seed: int,
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, np.ndarray]]]:
    """KID and distance to the real tile of each method, by figure and method.

    Parameters
    ----------
    real: uint8 ``[cell, H, W, 3]``. pictures: method -> the same cells' pictures; :data:`FLOOR` among them.
    donor: ``[cell]``.

    Returns
    -------
    Figure's name -> method -> :class:`ge2hist_core.metrics.KID` or :class:`~ge2hist_core.metrics.Estimate` as JSON, and
    figure's name -> method -> ``[resample]``, the same resamples for every method. Features of reader and stain-texture
    are standardised by the real tiles.
    """
    from ge2hist_core.image_features import Standardised

    out: dict[str, dict[str, Any]] = {}
    drawn: dict[str, dict[str, np.ndarray]] = {}

    def keep(method: str, found: KID | Estimate) -> None:
        out.setdefault(found.name, {})[method] = found.to_json()
        drawn.setdefault(found.name, {})[method] = found.drawn

    for raw in features:
        space = raw if raw.name.startswith("Inception") else Standardised(raw, real)
        target = space(real)
        for name, images in pictures.items():
            keep(name, kid(target, space(images), raw.name, seed, donor_real=donor, donor_generated=donor, paired=True))
    for measure in distances:
        title = distance_name(measure)
        for name, images in pictures.items():
            keep(name, paired_mean(measure.distance(images, real), title, seed, donor=donor))
    return out, drawn


# --- who wins ---------------------------------------------------------------------------------------------------------

_NAMES = {
    "density_relative": ("density", 100.0, "%", ".1f"),
    "composition_kl": ("composition KL", 1.0, "nats", ".4f"),
    "spacing_um": ("mean nearest-neighbour distance", 1.0, "um", ".2f"),
    "spacing_var_um2": ("variance of the nearest-neighbour distance", 1.0, "um2", ".2f"),
}


def figure_3_verdicts(comparisons: Mapping[str, Comparison], methods: Sequence[Method]) -> list[dict[str, Any]]:
    """One :func:`verdict` per line of Figure 3: over all cells, and as the mean over types of the central cell."""
    out = []
    for key in [*FIGURES, *(f"by_type:{name}" for name in FIGURES)]:
        name, factor, unit, form = _NAMES[key.removeprefix("by_type:")]
        label = f"Absolute difference of {name}" if key != "composition_kl" else name.capitalize()
        label = f"{label}, {'mean over types of the central cell' if key.startswith('by_type:') else 'all cells'}"
        entries, drawn = {}, {}
        for method, comparison in comparisons.items():
            if key in comparison.value:
                entries[method] = _absolute(key, comparison)
                drawn[method] = comparison.drawn[key]
        freedom = comparisons[OWN].freedom if OWN in comparisons else 0
        found = verdict(label, entries, methods, drawn, freedom, factor, unit, form)
        if found:
            out.append(found)
    return out


def _absolute(key: str, comparison: Comparison) -> tuple[float, float, float]:
    """Value and interval of an absolute figure; of a signed one, its interval folded at 0."""
    json = comparison.json
    if key.startswith("by_type:"):
        ends = json["by_type_interval"][key.removeprefix("by_type:")]
        return comparison.value[key], ends["low"], ends["high"]
    low, high = json[key]["low"], json[key]["high"]
    folded = sorted((abs(low), abs(high)))
    return comparison.value[key], 0.0 if low <= 0 <= high else folded[0], folded[1]


def verdict(
    figure: str,
    entries: Mapping[str, tuple[float, float | None, float | None]],
    methods: Sequence[Method],
    drawn: Mapping[str, np.ndarray],
    freedom: int,
    factor: float = 1.0,
    unit: str = "",
    form: str = ".4f",
) -> dict[str, Any] | None:
    """Who is nearest to the real tiles in one figure, the smaller the nearer, by paired differences.

    All methods are judged on the same donors and cells, so a difference is far better known than its two sides: its
    interval is ``difference +- t sd`` over the common resamples. GE2Hist is nearer than a rival, or farther, where that
    interval excludes 0; else the two cannot be told apart.

    Parameters
    ----------
    entries: method -> value, low, high. methods: models and rivals compete, controls do not.
    drawn: method -> ``[resample]``, the same resamples of donors and cells for all. freedom: of Student's t, resampled
        units (donors) less 1.

    Returns
    -------
    ``figure``; ``against``: per rival ``difference`` (GE2Hist less rival), ``low``, ``high`` and ``result``: nearer,
    farther or undecided; ``nearer``, ``farther``, ``undecided``: how many; ``ge2hist_wins``: nearer than every rival;
    ``sentence``. None where GE2Hist has no rival with this figure.
    """
    titles = {m.name: m.title for m in methods if m.kind != "control"}
    of = {name: entries[name] for name in titles if name in entries and math.isfinite(entries[name][0])}
    if OWN not in of or len(of) < 2:
        return None

    def number(value: float) -> str:
        return f"{factor * value:{form}}"

    def said(name: str) -> str:
        value, low, high = of[name]
        ends = "" if low is None or high is None or not math.isfinite(low) else f", {number(low)} to {number(high)}"
        return f"{number(value)}{ends}{' ' + unit if unit else ''}"

    against, words = [], []
    for name in sorted((name for name in of if name != OWN), key=lambda name: of[name][0]):
        difference, half = of[OWN][0] - of[name][0], math.nan
        if OWN in drawn and name in drawn:
            half = reach(np.asarray(drawn[OWN]) - np.asarray(drawn[name]), freedom)
        result = "undecided"
        if math.isfinite(half) and abs(difference) > half:
            result = "nearer" if difference < 0 else "farther"
        ends = (difference - half, difference + half) if math.isfinite(half) else (None, None)
        against.append({"rival": name, "difference": difference, "low": ends[0], "high": ends[1], "result": result})
        paired = "no interval" if ends[0] is None else f"{number(ends[0])} to {number(ends[1])}"
        verb = {"nearer": "nearer than", "farther": "farther than", "undecided": "not told apart from"}[result]
        words.append(f"{verb} {titles[name]} ({said(name)}; difference {number(difference)}, {paired})")
    count = {result: sum(line["result"] == result for line in against) for result in ("nearer", "farther", "undecided")}
    return {
        "figure": figure,
        "against": against,
        **count,
        "ge2hist_wins": count["nearer"] == len(against),
        "sentence": f"{figure}: GE2Hist ({said(OWN)}) is {'; '.join(words)}.",
    }
