"""What was measured of a bundle, as tables and plain sentences: effects against the truth, fit to real tissue.

Reads the bundle's ``evaluation.json`` (of ``evaluate``) and ``known_truth.json`` (of ``known-truth``); computes no
picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ge2hist_core.files import parse_json
from ge2hist_core.types import BadInput
from perturb.stats import Estimate, clustered_ratio

__all__ = [
    "Fit",
    "aims",
    "calibration",
    "driver_effects",
    "drawn_in_words",
    "encoders_in_words",
    "false_effects_in_words",
    "fits",
    "how_often_right",
    "propagation_in_words",
    "read_evaluation",
    "read_known_truth",
    "remedies",
    "roles",
    "signs",
    "size_in_words",
    "slopes",
    "undersized",
]

POINTS = "percentage points"
DENSITY = "cells/mm²"


def read_evaluation(bundle: Path) -> dict[str, Any] | None:
    """The bundle's ``evaluation.json``, None where it has none.

    Raises
    ------
    BadInput: the file is damaged.
    """
    return _read(bundle / "evaluation.json", "evaluate")


def _read(path: Path, command: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found = parse_json(path.read_bytes(), path.name, f"run `{command}` again")
    if not isinstance(found, dict):
        raise BadInput(f"{path.name} holds a {type(found).__name__}, not named figures: run `{command}` again.")
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


# --- edits of known effect -------------------------------------------------------------------------------------------

SCHEMA = 2
"""Of ``known_truth.json``, as :mod:`perturb.known_truth` writes it."""
ROLE_NAMES = {
    "programme": "All drivers of a programme",
    "driver": "One driver",
    "reporter": "A gene that only follows",
    "inert": "An unlinked gene",
}
ARM_NAMES = {
    "direct": "Direct edit",
    "true network": "Through the tissue's true network",
    "fitted network": "Through a network fitted with every edited gene as regulator",
    "known regulators": "Through a network fitted with the known regulators",
    "random wiring": "Through random wiring",
}


def read_known_truth(bundle: Path) -> dict[str, Any] | None:
    """The bundle's ``known_truth.json``, None where it has none.

    Raises
    ------
    BadInput: the file is damaged or of another version.
    """
    found = _read(bundle / "known_truth.json", "known-truth")
    if found is not None and found.get("schema") != SCHEMA:
        raise BadInput(
            f"known_truth.json has schema {found.get('schema')!r}, this version reads {SCHEMA}: "
            "run `known-truth` again."
        )
    return found


def _section(known: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = known.get(name) or {}
    if not isinstance(found, Mapping):
        raise _damaged_truth(name)
    return found


def _damaged_truth(section: str) -> BadInput:
    return BadInput(f"known_truth.json: {section} has another form than this version writes: run `known-truth` again.")


def _percent(figure: Mapping[str, Any]) -> str:
    """``"93 % (88 to 97)"`` of a share with its interval; "not measured" without a value."""
    if figure.get("value") is None:
        return "not measured"
    low, high = figure.get("low"), figure.get("high")
    ends = "" if low is None or high is None else f" ({100 * low:.0f} to {100 * high:.0f})"
    return f"{100 * figure['value']:.0f} %{ends}"


def _ratio(figure: Mapping[str, Any]) -> str:
    if figure.get("value") is None:
        return "not measured"
    low, high = figure.get("low"), figure.get("high")
    return f"{figure['value']:.2f}" + ("" if low is None or high is None else f" ({low:.2f} to {high:.2f})")


def how_often_right(known: Mapping[str, Any], arms: tuple[str, ...] = ("direct", "true network")) -> list[str]:
    """One sentence per way of editing: how often the direction of clear programme effects was right, and their size.

    Raises
    ------
    BadInput: the section is damaged.
    """
    niche, said = _section(known, "niche network"), []
    try:
        for arm in (one for one in arms if one in niche.get("slopes", {})):
            sign, slope = niche["signs"][arm], niche["slopes"][arm]
            said.append(
                f"{ARM_NAMES[arm]}: the direction was right in {sign['right']} of {sign['of']} clear effects of driver "
                f"programmes, {_percent(sign)}; a change was {_ratio(slope['density'])} of the true one for density "
                f"and {_ratio(slope['shares'])} for shares of cell types."
            )
        if said:
            said.append(
                f"{niche['n_cells']} cells of {niche['n_donors']} donors that the model has not learnt from, "
                f"{niche['n_cases']['programme']} edits of programmes; in brackets 95 % intervals over such donors, "
                "not over other tissues or trainings."
            )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged_truth("niche network") from error
    return said


AIMS = {
    "direction": (0.95, 1.0),
    "size": (0.7, 1.3),
    "type-I": (0.0, 0.06),
    "coverage": (0.9, 0.98),
}
"""What this project asked of the model before it was measured: lowest and highest value that meets an aim."""


def aims(known: Mapping[str, Any]) -> list[str]:
    """What was aimed at for edits of known effect, one sentence each: the figure, and whether it was met or missed.

    Raises
    ------
    BadInput: the section is damaged.
    """
    niche, drawn, said = _section(known, "niche network"), _section(known, "pictures"), []

    def judge(what: str, aim: str, figure: Mapping[str, Any], text: str) -> None:
        low, high = AIMS[aim]
        asked = {"direction": f"at least {low:.0%}", "type-I": f"at most {high:.0%}"}.get(aim, f"{low:g} to {high:g}")
        asked = asked.replace("%", " %")
        verdict = "not measured" if figure.get("value") is None else "missed"
        verdict = "met" if verdict == "missed" and low <= figure["value"] <= high else verdict
        said.append(f"{what}, aim {asked}: {text} - {verdict}.")

    try:
        for arm in (one for one in ("direct", "true network") if one in niche.get("slopes", {})):
            name = ARM_NAMES[arm]
            judge(
                f"Direction of driver programmes ({name})",
                "direction",
                niche["signs"][arm],
                _percent(niche["signs"][arm]),
            )
            for readout, what in (("density", "density"), ("shares", "shares of cell types")):
                figure = niche["slopes"][arm][readout]
                judge(f"Size as a multiple of the true change, {what} ({name})", "size", figure, _ratio(figure))
        for row in drawn.get("tests", ()):
            if row["role"] == "inert" and row["readout"] == "all":
                judge("p < 0.05 for genes without effect, in pictures", "type-I", row["p"], _percent(row["p"]))
        for row in drawn.get("own_conditional", ()):
            if row["what"] == "all":
                judge("Coverage of 95 % intervals for the model's own answer", "coverage", row, _percent(row))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged_truth("niche network") from error
    return said


def false_effects_in_words(known: Mapping[str, Any]) -> str:
    """What the model makes of genes that only follow, in two sentences; empty where it was not measured.

    Raises
    ------
    BadInput: the section is damaged.
    """
    try:
        figure = _section(known, "niche network").get("beyond_inert", {}).get("direct", {}).get("reporter")
        if not figure:
            return ""
        return (
            "Some genes cause nothing and merely rise and fall with a cause; editing such a gene changes nothing in "
            f"the simulated tissue, but in {_percent(figure)} of {figure['of']} readouts of such edits the model's "
            "niche network (a quick guess of the neighbours, no pictures) answers more strongly than to 95 % of "
            "unlinked genes, where 5 % would be chance. That is the price of learning from tissue as it is: the model "
            "knows what goes together with a gene, and cannot tell a cause from its companion."
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged_truth("niche network") from error


def propagation_in_words(known: Mapping[str, Any]) -> list[str]:
    """One sentence per network and kind of gene: how often spreading brings effects nearer to the truth than not.

    Raises
    ------
    BadInput: the section is damaged.
    """
    said = []
    try:
        for row in _section(known, "niche network").get("propagation", ()):
            effects, edits = row["effects"], row["edits"]
            total = effects["nearer"] + effects["farther"] + effects["same"]
            if row["role"] == "reporter" and not effects["nearer"] + effects["farther"]:
                said.append(f"{ARM_NAMES[row['arm']]}, {ROLE_NAMES['reporter'].lower()}: nothing spreads.")
                continue
            p = "" if edits["p"] is None else f", sign test over edits p = {edits['p']:.2g}"
            said.append(
                f"{ARM_NAMES[row['arm']]}, {ROLE_NAMES[row['role']].lower()}: {effects['nearer']} effects nearer to "
                f"the truth than the direct edit, {effects['farther']} farther, of {total}; edit by edit "
                f"{edits['nearer']} nearer, {edits['farther']} farther{p}."
            )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged_truth("propagation") from error
    return said


def roles(known: Mapping[str, Any]) -> pd.DataFrame:
    """Per way of editing, kind of gene and readout what became of effects; shares of edits from 0 to 1.

    Returns
    -------
    ``arm, role, readout, n, n_clear, sign, sign_low, sign_high, slope, slope_low, slope_high, covers_truth,
    excludes_0, beyond_inert, beyond_low, beyond_high``, NaN where a figure has no answer: ``sign`` of clear true
    effects; ``covers_truth``, ``excludes_0``: intervals over donors that hold the true effect, and that leave out 0;
    ``beyond_inert``: effects beyond 95 % of those of unlinked genes.

    Raises
    ------
    BadInput: the section is damaged.
    """
    columns = ["arm", "role", "readout", "n", "n_clear"]
    triples = {"sign": "sign", "slope": "slope", "beyond_inert": "beyond"}
    out = []
    try:
        for row in _section(known, "niche network").get("roles", ()):
            line = {name: row[name] for name in columns}
            for key, short in triples.items():
                figure = row[key] or {}
                line |= {
                    key: figure.get("value"),
                    f"{short}_low": figure.get("low"),
                    f"{short}_high": figure.get("high"),
                }
            out.append(line | {key: row[key]["value"] for key in ("covers_truth", "excludes_0")})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged_truth("roles") from error
    names = [*columns, *(f for key, s in triples.items() for f in (key, f"{s}_low", f"{s}_high"))]
    table = pd.DataFrame(out, columns=[*names, "covers_truth", "excludes_0"])
    numbers = [name for name in table if name not in columns[:3]]
    return table.astype(dict.fromkeys(numbers, np.float64))


def calibration(known: Mapping[str, Any]) -> pd.DataFrame:
    """Mean true effect of edits of like modelled effect, for :func:`perturb.charts.calibration`.

    Returns
    -------
    ``arm, group, unit, model, true, low, high, n``, shares in percentage points; group ``causes`` (programmes and
    single drivers) or ``followers`` (genes that only follow, whose true effect is 0).

    Raises
    ------
    BadInput: the section is damaged.
    """
    columns = ["arm", "group", "unit", "model", "true", "low", "high", "n"]
    out = []
    try:
        for row in _section(known, "niche network").get("calibration", ()):
            scale, unit = (1.0, DENSITY) if row["part"] == "density" else (100.0, POINTS)
            values = [np.nan if row[key] is None else scale * float(row[key]) for key in columns[3:7]]
            out.append((row["arm"], row["group"], unit, *values, int(row["n"])))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged_truth("calibration") from error
    return pd.DataFrame(out, columns=columns)


def remedies(known: Mapping[str, Any]) -> pd.DataFrame:
    """What lowers the rate of false effects and what it costs, as text ready to show, the plain edit first.

    Returns
    -------
    ``remedy, false_effects, power_drivers, power_programmes, refused_drivers``: shares in percent with intervals;
    ``refused_drivers`` is the share of edits of single drivers that would be refused.

    Raises
    ------
    BadInput: the section is damaged.
    """
    columns = ["false_effects", "power_drivers", "power_programmes"]
    try:
        out = [
            (row["remedy"], *(_percent(row[key]) for key in columns), _percent({"value": row["refused"].get("driver")}))
            for row in _section(known, "niche network").get("remedies", ())
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged_truth("remedies") from error
    return pd.DataFrame(out, columns=["remedy", *columns, "refused_drivers"])


def drawn_in_words(known: Mapping[str, Any]) -> list[str]:
    """What the app's own test and intervals are worth on drawn pictures; empty where none were drawn.

    Raises
    ------
    BadInput: the section is damaged.
    """
    drawn, said = _section(known, "pictures"), []
    words = {
        "inert": "unlinked genes, whose true effect is none (type-I error; 5 % is the aim)",
        "reporter": "genes that only follow, whose true effect is none",
        "programme": "driver programmes, also of readouts that hardly change (power)",
    }
    try:
        tests = {row["role"]: row for row in drawn.get("tests", ()) if row["readout"] == "all"}
        for role in (one for one in words if one in tests):
            row = tests[role]
            said.append(
                f"p < 0.05 with {drawn['seeds']} seeds in one cell: {_percent(row['p'])} of {row['p']['of']} tests of "
                f"{words[role]}; after the correction for several readouts {_percent(row['q'])}. Intervals over seeds "
                f"held the true change of that niche in {_percent(row['covers_truth'])}."
            )
        for row in drawn.get("own_conditional", ()):
            if row["what"] == "all":
                said.append(
                    f"95 % intervals from {row['seeds']} seeds held the mean over further seeds, which is the model's "
                    f"own answer and not the truth, in {_percent(row)} of {row['of']} cases ({row['n_pairs']} pairs)."
                )
        for row in drawn.get("smallest", ()):
            if row["readout"] == "density" and row["effect"] is not None:
                said.append(
                    f"The smallest change of density in the pictures that {drawn['seeds']} seeds find in four of five "
                    f"runs is {row['effect']:.0f} {DENSITY}."
                )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged_truth("pictures") from error
    return said


def encoders_in_words(known: Mapping[str, Any]) -> list[str]:
    """What the cell encoder knows of the niche beside principal components of the counts; empty if not measured.

    Raises
    ------
    BadInput: the section is damaged.
    """
    encoders, niche, said = _section(known, "encoders"), _section(known, "niche network"), []
    try:
        r2 = {(row["encoder"], row["what"]): row["r2"] for row in encoders.get("r2", ())}
        for name in dict.fromkeys(encoder for encoder, _ in r2):
            parts = [
                f"{words} R2 {_ratio(r2[name, what])}"
                for what, words in (("density", "density"), ("shares", "shares"), ("programmes", "programmes"))
                if (name, what) in r2
            ]
            slope = niche.get("probes", {}).get(name, {}).get("direct")
            sized = (
                ""
                if not slope
                else f"; direct edits of programmes move its density {_ratio(slope['density'])} of the true way"
            )
            said.append(f"{name} ({encoders['width'][name]} numbers), linear probe: {', '.join(parts)}{sized}.")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged_truth("encoders") from error
    return said
