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
from ge2hist_core.evaluation.readings import FIGURES, Comparison
from ge2hist_core.evaluation.work import Kept, Work
from ge2hist_core.files import sha256_file
from ge2hist_core.metrics import kid, paired_mean

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
) -> dict[str, dict[str, Any]]:
    """KID and distance to the real tile of each method, by figure and method.

    Parameters
    ----------
    real: uint8 ``[cell, H, W, 3]``. pictures: method -> the same cells' pictures; :data:`FLOOR` among them.
    donor: ``[cell]``.

    Returns
    -------
    Figure's name -> method -> :class:`ge2hist_core.metrics.KID` or :class:`~ge2hist_core.metrics.Estimate` as JSON.
    Reader and stain-texture features are standardised by the real tiles.
    """
    from ge2hist_core.image_features import Standardised

    out: dict[str, dict[str, Any]] = {}
    for raw in features:
        space = raw if raw.name.startswith("Inception") else Standardised(raw, real)
        target = space(real)
        for name, images in pictures.items():
            found = kid(target, space(images), raw.name, seed, donor_real=donor, donor_generated=donor, paired=True)
            out.setdefault(found.name, {})[name] = found.to_json()
    for measure in distances:
        title = distance_name(measure)
        for name, images in pictures.items():
            out.setdefault(title, {})[name] = paired_mean(
                measure.distance(images, real), title, seed, donor=donor
            ).to_json()
    return out


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
        found = verdict(label, entries, methods, factor, unit, form, drawn)
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
    factor: float = 1.0,
    unit: str = "",
    form: str = ".4f",
    drawn: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any] | None:
    """Who is nearest to the real tiles in one figure, the smaller the nearer, said with its intervals.

    Parameters
    ----------
    entries: method -> value, low, high. methods: models and rivals compete, controls do not.
    drawn: method -> ``[resample]``, paired: then it is also said in how many of them GE2Hist is nearer.

    Returns
    -------
    None where GE2Hist has no rival with this figure.
    """
    titles = {m.name: m.title for m in methods if m.kind != "control"}
    of = {name: entries[name] for name in titles if name in entries and math.isfinite(entries[name][0])}
    if OWN not in of or len(of) < 2:
        return None
    best = min(of, key=lambda name: of[name][0])
    against = []
    for name in of:
        if name == OWN:
            continue
        overlap = _overlap(of[OWN], of[name])
        line: dict[str, Any] = {"rival": name, "overlap": overlap, "nearer": bool(of[OWN][0] < of[name][0])}
        if drawn is not None and name in drawn:
            a, b = drawn[OWN], drawn[name]
            both = np.isfinite(a) & np.isfinite(b)
            line["nearer_in"] = float((a < b)[both].mean()) if both.any() else None
        against.append(line)

    def said(name: str) -> str:
        value, low, high = (None if v is None or not math.isfinite(v) else v * factor for v in of[name])
        text = f"{value:{form}}"
        if low is not None and high is not None:
            text += f", {low:{form}} to {high:{form}}"
        return f"{titles[name]} ({text}{' ' + unit if unit else ''})"

    words = {True: "intervals overlap", False: "intervals do not overlap", None: "no interval to compare"}
    parts = []
    for line in sorted(against, key=lambda line: of[line["rival"]][0]):
        share = line.get("nearer_in")
        often = "" if share is None else f", GE2Hist nearer in {share:.0%} of resamples"
        parts.append(f"{said(line['rival'])}: {words[line['overlap']]}{often}")
    lead = "GE2Hist wins" if best == OWN else f"{titles[best]} wins, not GE2Hist"
    return {
        "figure": figure,
        "winner": best,
        "ge2hist_wins": best == OWN,
        "clear": best == OWN and all(line["overlap"] is False for line in against),
        "against": against,
        "sentence": f"{figure}: {lead}. {said(OWN)} against {'; '.join(parts)}.",
    }


def _overlap(a: tuple[float, float | None, float | None], b: tuple[float, float | None, float | None]) -> bool | None:
    if a[1] is None or a[2] is None or b[1] is None or b[2] is None:
        return None
    ends = np.array([a[1], a[2], b[1], b[2]], dtype=np.float64)
    if not np.isfinite(ends).all():
        return None
    return bool(ends[0] <= ends[3] and ends[2] <= ends[1])
