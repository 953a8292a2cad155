"""What ``evaluate`` measured of a bundle, as tables and plain sentences: effects against the truth, fit to real tissue.

Reads the bundle's ``evaluation.json`` and computes no picture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ge2hist_core.types import BadInput
from perturb.stats import Estimate, clustered_ratio

__all__ = ["Fit", "driver_effects", "fits", "read_evaluation", "signs", "size_in_words", "slopes", "undersized"]

POINTS = "percentage points"
DENSITY = "cells/mm²"


def read_evaluation(bundle: Path) -> dict[str, Any] | None:
    """The bundle's ``evaluation.json``, None where it has none.

    Raises
    ------
    BadInput: the file is damaged.
    """
    path = bundle / "evaluation.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path.name} is not valid JSON ({error}): run `evaluate` again.") from error
    if not isinstance(found, dict):
        raise BadInput(f"{path.name} holds a {type(found).__name__}, not named figures: run `evaluate` again.")
    return found


def _damaged(section: str) -> BadInput:
    return BadInput(f"evaluation.json: {section} has another form than this version writes: run `evaluate` again.")


# --- effects against the truth ---------------------------------------------------------------------------------------


def driver_effects(evaluation: Mapping[str, Any]) -> pd.DataFrame:
    """True and drawn mean change of each readout when the drivers of a programme are edited.

    Returns
    -------
    ``programme, direction, readout, unit, true, drawn``, shares in percentage points; empty where the evaluation has
    none, as one of tissue whose truth is not known.

    Raises
    ------
    BadInput: the section is damaged.
    """
    columns = ["programme", "direction", "readout", "unit", "true", "drawn"]
    rows = []
    try:
        for edit in (evaluation.get("driver_programmes") or {}).get("edits", ()):
            for readout, change in edit.get("all", {}).items():
                share = readout.startswith("fraction:")
                pair = [np.nan if change[key] is None else float(change[key]) for key in ("true", "model")]
                unit = POINTS if share else DENSITY
                rows.append(
                    (
                        edit["programme"],
                        edit["direction"],
                        readout,
                        unit,
                        *(v * (100.0 if share else 1.0) for v in pair),
                    )
                )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged("driver_programmes") from error
    return pd.DataFrame(rows, columns=columns)


def slopes(effects: pd.DataFrame, seed: int = 0) -> dict[str, Estimate]:
    """Drawn change per true change, by unit: the least-squares line through the origin, ``sum(t d) / sum(t t)``.

    1 means that drawn effects are as large as true ones, 0 that they do not answer. The interval resamples programmes:
    both directions and all readouts of one belong together. True changes are themselves means over a few cells, which
    lowers the slope a little.

    Parameters
    ----------
    effects: of :func:`driver_effects`. seed: of the resampling.

    Returns
    -------
    ``n`` counts the points; no interval for fewer than two programmes.
    """
    found = {}
    for unit, rows in effects.groupby("unit", sort=False):
        true, drawn = rows["true"].to_numpy(dtype=np.float64), rows["drawn"].to_numpy(dtype=np.float64)
        found[str(unit)] = clustered_ratio(true * drawn, true**2, rows["programme"].to_numpy(), seed)
    return found


def undersized(found: Mapping[str, Estimate]) -> bool:
    """Whether every slope's interval lies below 1: drawn effects are smaller than true ones."""
    return bool(found) and all(one.high < 1 for one in found.values())


def size_in_words(unit: str, slope: Estimate, programmes: int) -> str:
    """How large drawn effects are beside true ones, as far as the interval allows to say."""
    what = "Density" if unit == DENSITY else "Shares of cell types"
    if not np.isfinite(slope.value):
        return f"{what}: no slope can be computed."
    said = f"{what}: a drawn change was {slope.value:.2f} of the true one"
    if not np.isfinite(slope.low):
        return f"{said} (no interval, n = {slope.n} changes)."
    if slope.low > 1:
        verdict = "larger than true ones"
    elif slope.high >= 1:
        verdict = "not told apart from true ones in size"
    else:
        verdict = "smaller than true ones"
    doubt = "; whether they grow with the true ones is not shown" * (slope.low <= 0)
    interval = f"95 % interval {slope.low:.2f} to {slope.high:.2f} over {programmes} programmes"
    return f"{said} ({interval}, n = {slope.n} changes): {verdict}{doubt}."


def signs(evaluation: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """``(what, right, of)``: how often the drawn change went the way of a clear true change; empty where unknown."""
    section = evaluation.get("driver_programmes") or {}
    rows = (
        ("main readout of each edit", "signs_right", "edits_exceeding_noise"),
        ("all readouts that clearly change", "clear_signs_right", "clear_readouts"),
    )
    try:
        return [
            (what, int(section[right]), int(section[of])) for what, right, of in rows if {right, of} <= set(section)
        ]
    except (TypeError, ValueError) as error:
        raise _damaged("driver_programmes") from error


# --- fit to real tissue ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """One readout of generated tiles beside real ones, as text ready to show.

    Parameters
    ----------
    generated, floor: difference from the real tiles of the same cells, with interval where there is one; of generated
        tiles and of real tiles of other cells of the same types.
    generated_by_type, floor_by_type, exchanged_by_type: mean over types of the absolute difference; the last one of
        tiles drawn for other cells' expression. Empty where it was not measured.
    sentence: what they say.
    n, donors: pictures compared, and the donors that they come from.
    """

    readout: str
    generated: str
    floor: str
    generated_by_type: str
    floor_by_type: str
    exchanged_by_type: str
    sentence: str
    n: int
    donors: int


_READOUTS = (
    # key, name, signed form, unsigned form, factor, unit
    ("density_relative", "Density", "+.1f", ".1f", 100.0, " %"),
    ("composition_kl", "Composition (KL, 0 = same mix)", ".3f", ".3f", 1.0, " nats"),
    ("spacing_um", "Nearest neighbour", "+.2f", ".2f", 1.0, " µm"),
)


def fits(evaluation: Mapping[str, Any]) -> list[Fit]:
    """Density, composition and spacing of generated against real tiles; empty where the evaluation has none.

    Raises
    ------
    BadInput: a section is damaged.
    """
    generated = evaluation.get("generated_vs_real")
    if not generated:
        return []
    floor, exchanged = (evaluation.get(key) or {} for key in ("floor_real_vs_real", "ceiling_conditions_exchanged"))
    try:
        basis = int(generated["n"]), len(evaluation.get("donors") or ())
        return [_fit(basis, generated, floor, exchanged, *one) for one in _READOUTS]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged("generated_vs_real") from error


def _fit(
    basis: tuple[int, int],
    generated: Mapping[str, Any],
    floor: Mapping[str, Any],
    exchanged: Mapping[str, Any],
    key: str,
    name: str,
    signed: str,
    form: str,
    factor: float,
    unit: str,
) -> Fit:
    def text(value: float | None, how: str) -> str:
        return "" if value is None else f"{format(value * factor, how)}{unit}"

    def with_interval(figure: Mapping[str, Any]) -> str:
        if not figure or figure["value"] is None:
            return ""
        if figure["low"] is None:
            return text(figure["value"], signed)
        low, high = (format(figure[end] * factor, signed) for end in ("low", "high"))
        return f"{text(figure['value'], signed)} ({low} to {high})"

    by_type = [text((one.get("by_type") or {}).get(key), form) for one in (generated, floor, exchanged)]
    sentence = _overall(key, generated[key], floor.get(key) or {}, lambda value: text(value, form))
    if by_type[0]:
        sentence += f" Type by type it is off by {by_type[0]} on average"
        others = ["other real tiles by " + by_type[1]] * bool(by_type[1])
        others += ["pictures drawn for the wrong cells by " + by_type[2]] * bool(by_type[2])
        sentence += "".join(f", {one}" for one in others) + "."
    whole = with_interval(generated[key]), with_interval(floor.get(key) or {})
    return Fit(name, whole[0], whole[1], by_type[0], by_type[1], by_type[2], sentence, *basis)


def _overall(key: str, figure: Mapping[str, Any], floor: Mapping[str, Any], text: Any) -> str:
    value, low, high = (figure[name] for name in ("value", "low", "high"))
    if value is None:
        return "Not defined on these tiles."
    if key == "composition_kl":
        beside = "" if floor.get("value") is None else f", that of other real tiles by {text(floor['value'])}"
        return f"The mix of cell types in the pictures differs from the real one by {text(value)}{beside}."
    size = text(abs(value))
    said = {
        "density_relative": f"The pictures hold {size} {'more' if value > 0 else 'fewer'} nuclei than the real tiles",
        "spacing_um": f"Nearest nuclei are {size} {'farther apart' if value > 0 else 'closer'} than in the real tiles",
    }[key]
    if low is None or high is None:
        return f"{said} (no interval)."
    clear = "excludes 0, a clear difference" if low > 0 or high < 0 else "includes 0, no clear difference"
    return f"{said}; the interval {clear}."
