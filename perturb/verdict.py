"""May a drawn difference be believed? A traffic light per readout, with its reasons as plain sentences.

The light speaks of the model: whether its pictures differ by more than the noise of drawing them, for a cell that it
has seen the like of. Whether tissue would change is another question, which no light answers.

With :class:`perturb.evidence.Evidence` at hand there are further checks: the effect has to leave the cloud of the
unedited cell encoded again and to exceed the effects of random genes, all gates have to find the cell inside the data,
and for a readout whose skill was measured the model has to beat trivial rules. Evidence that is not there is no check;
what could not be had is among the notes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ge2hist_core.support import OUTSIDE
from perturb.stats import FEW
from perturb.wording import smallest_p

if TYPE_CHECKING:
    import pandas as pd

    from perturb.evidence import Evidence
    from perturb.result import Result

__all__ = [
    "HEADLINE_SHARES",
    "LIGHTS",
    "Q",
    "RULE",
    "Check",
    "Verdict",
    "headline_readouts",
    "judge",
    "light",
    "verdicts",
]

LIGHTS = ("green", "amber", "grey")
Q = 0.05
"""A q-value has to lie below this."""
LEAST_P = 0.05
"""Largest p at which an effect exceeds nineteen others: it lies beyond all of them."""
HEADLINE_SHARES = 3
RULE = (
    "Green: every check that was made is met. Grey: the interval includes 0 and q is not below 0.05, whatever the "
    "other checks say. Amber: between the two. No light says that tissue would change."
)


@dataclass(frozen=True)
class Check:
    """One condition of the light.

    Parameters
    ----------
    name: ``interval``, ``q``, ``support`` (``gates`` in its place where there is evidence of all gates), ``wiring``,
        ``technical``, ``matched`` or ``baseline``.
    passed: whether it is met; one that could not be made is not.
    reason: a sentence with the numbers. short: what is wrong, in a few words; empty where it is met.
    """

    name: str
    passed: bool
    reason: str
    short: str = ""


@dataclass(frozen=True)
class Verdict:
    """One readout: ``light`` of :data:`LIGHTS`, the claim it allows (plain text), the checks behind it.

    ``notes``: sentences that light nothing: what could not be checked, and what the reader's errors change.
    """

    readout: str
    light: str
    claim: str
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()


def light(checks: Sequence[Check]) -> str:
    """The light of some checks.

    Green: all are met. Grey: neither the interval excludes 0 nor is q below 0.05, whatever the others say, since a cell
    inside the data is no evidence of an effect. Amber: between the two.

    Examples
    --------
    >>> light([Check("interval", True, ""), Check("q", False, ""), Check("support", True, "")])
    'amber'
    """
    met = {check.name: check.passed for check in checks}
    if not (met["interval"] or met["q"]):
        return "grey"
    return "green" if all(met.values()) else "amber"


def headline_readouts(comparison: pd.DataFrame) -> list[str]:
    """Density, spacing and the shares of the three types that are most frequent before the edit.

    The choice does not look at the effects, so that no light is lit because its effect happened to be large.
    """
    shares = comparison[comparison["readout"].str.startswith("fraction:") & comparison["base"].notna()]
    most = shares.sort_values("base", ascending=False, kind="stable")["readout"].head(HEADLINE_SHARES)
    there = set(comparison["readout"])
    return [name for name in ("density", "spacing") if name in there] + list(most)


def judge(
    row: Mapping[str, Any],
    support: np.ndarray,
    n_cells: int,
    tested: int,
    wiring: Mapping[str, Any] | None = None,
    evidence: Evidence | None = None,
) -> Verdict:
    """One readout's light.

    Parameters
    ----------
    row: ``readout, effect, low, high, p, q, n`` of :attr:`perturb.result.Result.comparison`.
    support: ``[cell, 2]`` conformal p-values before and after the edit. All have to be at least ``OUTSIDE``: the
        difference of two pictures is no better than the worse of them.
    n_cells: of the recipe. tested: readouts over which q is adjusted.
    wiring: ``effect, low, high, q`` of the contrast ``network - control``, None where no network was used. The effect
        exceeds random wiring where this is clear and on the effect's own side of 0.
    evidence: further checks, as far as it goes.
    """
    gates = None if evidence is None else evidence.table("gates", "gates")
    inside = _support(np.asarray(support, dtype=np.float64)) if gates is None else _gates(gates)
    checks = [_interval(row, n_cells), _q(row, n_cells, tested), inside]
    if wiring is not None:
        checks.append(_wiring(row, wiring))
    notes: list[str] = []
    if evidence is not None:
        checks += [check for make in (_technical, _matched, _baseline) if (check := make(row, evidence)) is not None]
        notes = _notes(row, evidence)
    colour = light(checks)
    return Verdict(str(row["readout"]), colour, _claim(row, colour, checks), tuple(checks), tuple(notes))


def verdicts(result: Result, evidence: Evidence | None = None) -> list[Verdict]:
    """The lights of a result's headline readouts.

    Raises
    ------
    ValueError: evidence on another result.
    """
    if evidence is not None and evidence.recipe_hash != result.recipe.hash:
        raise ValueError(f"evidence on recipe {evidence.recipe_hash[:12]} for the result of {result.recipe.hash[:12]}")
    table = result.comparison.set_index("readout", drop=False)
    contrasts = result.spread_effects
    against = contrasts[contrasts["contrast"] == "network - control"].set_index("readout", drop=False)
    used = result.recipe.propagation is not None
    support = result.support[["base", "edited"]].to_numpy()
    unknown = {"effect": np.nan, "low": np.nan, "high": np.nan, "q": np.nan}
    return [
        judge(
            table.loc[name].to_dict(),
            support,
            len(result.recipe.cell_ids),
            int(table["p"].notna().sum()),
            (against.loc[name].to_dict() if name in against.index else unknown) if used else None,
            evidence,
        )
        for name in headline_readouts(result.comparison)
    ]


def _excludes_0(row: Mapping[str, Any]) -> bool:
    return bool(row["low"] > 0 or row["high"] < 0)


def _interval(row: Mapping[str, Any], n_cells: int) -> Check:
    n, several = int(row["n"]), n_cells > 1
    covers = f"the noise of drawing{' and the choice of these cells' * several}, not donors and not the model's errors"
    if not np.isfinite(row["low"]):
        why = "Too few nuclei in one of the pictures" if n == 0 else "One pair of pictures gives no interval"
        return Check("interval", False, f"{why} (n = {n}).", "there is no interval")
    passed = _excludes_0(row)
    return Check(
        "interval",
        passed,
        f"The 95 % interval, {_range(row)}, {'excludes' if passed else 'includes'} 0 (n = {n} pairs of pictures"
        f"{f' of {n_cells} cells' * several}). It covers {covers}.",
        "" if passed else "the interval includes 0",
    )


def _q(row: Mapping[str, Any], n_cells: int, tested: int) -> Check:
    if not np.isfinite(row["q"]):
        return Check("q", False, "No test could be made.", "no test could be made")
    passed = bool(row["q"] < Q)
    text = (
        f"q = {row['q']:.2g} is {'below' if passed else 'not below'} {Q:g} (p = {row['p']:.2g}, adjusted over all "
        f"{tested} readouts)."
    )
    n_seeds = -(-int(row["n"]) // n_cells)
    units, unit = (n_cells, "cells") if n_cells > 1 else (n_seeds, "seeds")
    least = smallest_p(n_cells, n_seeds)
    if not passed and 1 < min(n_cells, n_seeds) <= FEW:
        few = "cells" if n_cells <= n_seeds else "seeds"
        text += f" {n_cells} cells and {n_seeds} seeds show only a very clear effect: compare over more {few}."
    if not passed and least * tested >= Q:
        text += (
            f" The smallest p that {units} {unit} can give is {least:.2g}, for one readout among {tested} q = "
            f"{min(1.0, least * tested):.2g} at best: compare over more {unit}."
        )
    return Check("q", passed, text, "" if passed else f"q is not below {Q:g}")


def _support(p: np.ndarray) -> Check:
    if not np.isfinite(p).all():
        text = "Whether the cell lies inside the training data is not known: this bundle cannot say."
        return Check("support", False, text, "the cell's support is not known")
    outside = int((p < OUTSIDE).any(axis=1).sum())
    if len(p) == 1:
        where = "inside" if not outside else "outside"
        text = f"The cell lies {where} the training data: p = {p[0, 0]:.2g} before and {p[0, 1]:.2g} after the edit "
        text += f"({OUTSIDE:g} or more is inside)."
    else:
        text = f"{outside} of {len(p)} cells lie outside the training data before or after the edit (p < {OUTSIDE:g})."
        if outside:
            text += " About 1 in 20 cells like those of training does too."
    short = "the cell lies outside the data" if len(p) == 1 else "some cells lie outside the data"
    return Check(
        "support", not outside, text + " Such pictures are extrapolation." * bool(outside), short * (outside > 0)
    )


def _wiring(row: Mapping[str, Any], wiring: Mapping[str, Any]) -> Check:
    if not np.isfinite(wiring["low"]):
        text = "The network could not be compared with random wiring."
        return Check("wiring", False, text, "it was not compared with random wiring")
    passed = bool(_excludes_0(wiring) and wiring["q"] < Q and wiring["effect"] * row["effect"] > 0)
    difference = f"{_amount(row, wiring['effect'])}, 95 % interval {_range(row, wiring)}, q = {wiring['q']:.2g}"
    text = (
        f"The network's effect exceeds that of random wiring ({difference})."
        if passed
        else f"The network's effect is not shown to exceed that of random wiring ({difference}): what it adds "
        "may not come from who regulates whom."
    )
    return Check("wiring", passed, text, "" if passed else "it is not shown to exceed random wiring")


# --- with evidence at hand -------------------------------------------------------------------------------------------


def _gates(table: pd.DataFrame) -> Check:
    """All gates together, in both arms."""
    answered = table["inside"].notna().all()
    if not answered:
        text = "Whether the cell lies inside the training data is not known: this bundle cannot say."
        return Check("gates", False, text, "the cell's support is not known")
    arms = {name: rows.set_index("cell_id") for name, rows in table.groupby("arm", sort=False)}
    cells = list(arms["base"].index)
    outside = [name for name in cells if not all(bool(arm.at[name, "inside"]) for arm in arms.values())]
    if len(cells) == 1:
        base, edited = (arms[name].iloc[0] for name in ("base", "edited"))
        text = (
            f"The cell lies {'outside' if outside else 'inside'} the training data: over all gates p = "
            f"{base['p']:.2g} before and {edited['p']:.2g} after the edit ({OUTSIDE:g} or more is inside)."
        )
        if outside:
            worst = min((base, edited), key=lambda one: one["p"])
            text += f" It is the {worst['gate']} that is unlike them; such pictures are extrapolation."
        return Check("gates", not outside, text, "the cell lies outside the data" * bool(outside))
    text = f"{len(outside)} of {len(cells)} cells lie outside the training data before or after the edit (all gates)."
    if outside:
        text += " About 1 in 20 cells like those of training does too. Such pictures are extrapolation."
    return Check("gates", not outside, text, "some cells lie outside the data" * bool(outside))


def _technical(row: Mapping[str, Any], evidence: Evidence) -> Check | None:
    """Did the state of most cells, and the readout, leave the cloud of the unedited cells encoded again?"""
    states, drawn = evidence.table("technical", "states"), evidence.table("technical_drawn", "readouts")
    said, passed = [], True
    if states is not None:
        # Where the encoder breaks no ties the cloud is a point, which any edit leaves: that is no check.
        states = states[~states.groupby("cell_id")["point"].transform("all").astype(bool)]
        if not len(states):
            return None
    if states is not None:
        p = states.pivot(index="cell_id", columns="space", values="p")
        left = (p["embedding"] <= LEAST_P) & (p[["z_c", "z_e"]].min(axis=1) <= LEAST_P)
        passed = bool(2 * left.sum() > len(left))
        what = "The cell's state" if len(left) == 1 else f"The state of {int(left.sum())} of {len(left)} cells"
        own = f" (p = {p['embedding'].iloc[0]:.2g} in the embedding)" * (len(left) == 1)
        verb = "leaves" if passed or len(left) > 1 else "does not leave"
        said.append(f"{what} {verb} the cloud of {int(states['n'].iloc[0])} encodings of the unedited cell{own}.")
    found = _row(drawn, row)
    if found is not None and np.isfinite(found["p"]):
        out = bool(found["p"] <= LEAST_P)
        passed = passed and out
        seeds = evidence.parts["technical_drawn"].facts["seeds"]
        said.append(
            f"With the same noise the edit moves this readout by {_amount(row, found['effect'])}, encoding the "
            f"unedited cell again by {_amount(row, found['cloud']).lstrip('+')} (root mean square of "
            f"{int(found['n'])}, {seeds} noise seed{'s' * (seeds > 1)}): {'outside' if out else 'inside'} that cloud, "
            f"p = {found['p']:.2g}."
        )
    if not said:
        return None
    return Check("technical", passed, " ".join(said), "" if passed else "encoding the cell again moves it as far")


def _matched(row: Mapping[str, Any], evidence: Evidence) -> Check | None:
    """Does the effect exceed those of random genes, guessed (adjusted) and drawn?"""
    guessed, drawn = (_row(evidence.table(part, "readouts"), row) for part in ("matched", "matched_drawn"))
    said, passed = [], True
    if guessed is not None and np.isfinite(guessed["q"]):
        out = bool(guessed["q"] < Q)
        passed = out
        said.append(
            f"Of {int(guessed['n'])} like edits of random genes, as the niche network guesses them, "
            f"{_exceeding(guessed)} (q = {guessed['q']:.2g})."
        )
    if drawn is not None and np.isfinite(drawn["p"]):
        passed = passed and bool(drawn["p"] <= LEAST_P)
        said.append(f"Of {int(drawn['n'])} that were drawn, {_exceeding(drawn)} (p = {drawn['p']:.2g}).")
    if not said:
        return None
    return Check("matched", passed, " ".join(said), "" if passed else "random genes move it as far")


def _exceeding(found: Mapping[str, Any]) -> str:
    n = round(found["p"] * (found["n"] + 1)) - 1
    return f"{n if n else 'none'} move{'s' * (n < 2)} this readout at least as far"


def _baseline(row: Mapping[str, Any], evidence: Evidence) -> Check | None:
    found = _row(evidence.table("baselines", "skill"), row)
    if found is None:
        return None
    passed = bool(found["beats"])
    text = (
        f"On real tiles of {int(found['donors'])} donors the pictures {'tell' if passed else 'are not shown to tell'} "
        f'more of this readout than the best trivial rule, "{found["best"]}": skill {found["skill"]:.2f} (95 % '
        f"interval over donors {found['low']:.2f} to {found['high']:.2f}, n = {int(found['n'])} tiles; 1 is perfect, "
        "0 no better)."
    )
    return Check("baseline", passed, text, "" if passed else "a trivial rule may know this readout as well")


def _row(table: pd.DataFrame | None, row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    rows = [] if table is None else table[table["readout"] == row["readout"]].to_dict("records")
    return rows[0] if rows else None


def _notes(row: Mapping[str, Any], evidence: Evidence) -> list[str]:
    said = []
    if "baselines" in evidence.parts and _row(evidence.table("baselines", "skill"), row) is None:
        said.append("Whether a trivial rule knows this readout as well was not measured for this bundle.")
    corrected = _row(evidence.table("reader", "corrected"), row)
    if corrected is not None and np.isfinite(corrected["low"]):
        said.append(
            f"Corrected for the reader's measured errors the effect is {_amount(row, corrected['effect'])}, 95 % "
            f"interval {_range(row, corrected)} with those errors in it (n = {int(corrected['n'])})."
        )
    for part in ("technical", "technical_drawn", "matched", "matched_drawn", "gates", "baselines"):
        if part in evidence.missing:
            said.append(f"Not checked ({part.replace('_', ', ')}): {evidence.missing[part]}")
    return said


def _claim(row: Mapping[str, Any], colour: str, checks: Sequence[Check]) -> str:
    effect, readout = row["effect"], str(row["readout"])
    if not np.isfinite(effect):
        return "Undefined: too few nuclei in one of the pictures."
    interval = f" ({_range(row)})" if np.isfinite(row["low"]) else ""
    if effect == 0 and not interval and row["n"] > 1:
        return "No drawn pair of pictures differs in it, which says little of how rare a change is."
    if colour == "grey":
        return f"The drawn difference, {_amount(row, effect)}{interval}, is not told apart from the noise of drawing."
    size = _amount(row, abs(effect)).lstrip("+")
    more = effect > 0
    number, _, per = size.partition(" ")
    said = {
        "density": f"{number} {'more' if more else 'fewer'} nuclei {per}",
        "spacing": f"nearest nuclei {size} {'farther apart' if more else 'closer'}",
    }.get(readout, f"a share {size} {'higher' if more else 'lower'}")
    failed = ", ".join(check.short for check in checks if not check.passed)
    return f"The model draws {said}{interval}" + (f", but {' and '.join(failed.rsplit(', ', 1))}." if failed else ".")


_FORMS = {"density": (1.0, "+,.0f", " per mm²"), "spacing": (1.0, "+.2f", " µm")}


def _form(row: Mapping[str, Any]) -> tuple[float, str, str]:
    return _FORMS.get(str(row["readout"]), (100.0, "+.1f", " percentage points"))


def _amount(row: Mapping[str, Any], value: float) -> str:
    """A value in the readout's unit, signed."""
    scale, form, unit = _form(row)
    return f"{format(value * scale, form)}{unit}"


def _range(row: Mapping[str, Any], interval: Mapping[str, Any] | None = None) -> str:
    scale, form, _ = _form(row)
    low, high = ((interval or row)[key] * scale for key in ("low", "high"))
    return f"{format(low, form)} to {format(high, form)}"
