r"""Statistics of edits whose true effect is known; arrays in, plain JSON out.

Every figure comes with its number of edits. Intervals are 95 % percentile intervals over donors drawn with replacement
(all edits are made in the same cells, so that a donor drawn twice weighs twice in every effect), their levels widened
for the number of donors as in :func:`perturb.stats.bootstrap_mean`. They say what other donors of the same tissue would
change; not what another choice of genes, another training run or another tissue would. Shares of edits that are counted
rather than measured (``right of n``) bear Wilson intervals over edits instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ge2hist_core import rng
from ge2hist_core.intervals import expanded_tail
from perturb.true_effects import READOUTS

__all__ = [
    "ARMS",
    "COVERS",
    "NETWORKS",
    "PARTS",
    "ROLES",
    "Case",
    "Effects",
    "donor_weights",
    "interval",
    "rows",
    "share",
    "sign_test",
    "summary",
]

ROLES = ("programme", "driver", "reporter", "inert")
ARMS = ("direct", "true network", "fitted network", "known regulators", "random wiring")
NETWORKS = ARMS[1:]
HELD = "programmes held"
"""Arm that is measured only to see whether it lowers false effects."""
PARTS = {"density": slice(0, 1), "shares": slice(1, None)}
CLEAR = 2.0
"""A true effect counts as clear from this many standard errors over cells."""
RESAMPLES = 1000
LEVEL = 0.95
BINS = 8
COVERS = (
    "95 % over donors of the same tissue drawn with replacement; not over other genes, another training run or another "
    "tissue. Counted shares (right of n): Wilson interval over edits."
)


@dataclass(frozen=True)
class Case:
    """One edit: ``role`` of :data:`ROLES`; ``dose`` multiplies, ``factors`` say what it does to each gene's counts."""

    role: str
    name: str
    dose: float
    factors: tuple[tuple[str, float], ...]

    @property
    def direction(self) -> str:
        return "up" if self.dose > 1 else "down"

    @property
    def moves_the_niche(self) -> bool:
        """Whether the tissue itself answers to the edit."""
        return self.role in ROLES[:2]


@dataclass(frozen=True, eq=False)
class Effects:
    """True and modelled effects of all cases.

    Parameters
    ----------
    cases: as given. donor: ``[cell]``.
    true: ``[case, readout, cell]`` change in the tissue; 0 where the edit moves nothing.
    model: arm -> ``[case, readout, cell]``.
    probes: description of :data:`perturb.encoder_ablation.ENCODERS` -> arm -> the same through a linear probe.
    outside: bool ``[case, cell]``, the edited cell is outside the data; None where no gate was asked.
    """

    cases: list[Case]
    donor: np.ndarray
    true: np.ndarray
    model: dict[str, np.ndarray]
    probes: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    outside: np.ndarray | None = None

    @cached_property
    def role(self) -> np.ndarray:
        """``[case]``."""
        return np.array([case.role for case in self.cases], dtype=object)


# --- intervals --------------------------------------------------------------------------------------------------------


def donor_weights(donor: np.ndarray, seed: int) -> np.ndarray:
    """``[1 + resample, cell]`` weights that average cells: of the data, then of donors drawn with replacement."""
    names, place = np.unique(donor.astype(str), return_inverse=True)
    draw = rng.stream(seed, "known-truth donors")
    times = np.stack(
        [np.bincount(draw.integers(len(names), size=len(names)), minlength=len(names)) for _ in range(RESAMPLES)]
    )
    counts = np.vstack([np.ones(len(donor)), times[:, place]])
    # Donors have different numbers of cells, one of them at least one.
    return counts / counts.sum(axis=1, keepdims=True)


def interval(values: np.ndarray, n_donors: int | None = None) -> dict[str, float | None]:
    """``value, low, high`` of ``[1 + resample]``, the first of which is the data; None for what is not defined.

    Parameters
    ----------
    n_donors: widens the levels; None leaves them as they are.
    """
    tail = (1 - LEVEL) / 2
    if n_donors is not None:
        if n_donors < 2:
            return {"value": _number(values[0]), "low": None, "high": None}
        tail = expanded_tail(n_donors, LEVEL)
    drawn = values[1:][np.isfinite(values[1:])]
    low, high = np.quantile(drawn, [tail, 1 - tail]) if len(drawn) else (math.nan, math.nan)
    return {"value": _number(values[0]), "low": _number(low), "high": _number(high)}


def _number(value: float) -> float | None:
    """Five digits, None where not finite."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def share(k: int, n: int) -> dict[str, float | int | None]:
    """``right, of, value, low, high``: ``k`` of ``n`` with Wilson's interval (1927, doi:10.2307/2276774)."""
    if not n:
        return {"right": 0, "of": 0, "value": None, "low": None, "high": None}
    from scipy.stats import binomtest

    found = binomtest(int(k), int(n)).proportion_ci(LEVEL, method="wilson")
    return {"right": int(k), "of": int(n), "value": _number(k / n), "low": _number(found.low)} | {
        "high": _number(found.high)
    }


def sign_test(gain: np.ndarray) -> dict[str, float | int | None]:
    """``nearer, farther, same, p``: how many gains are above and below 0, and the exact two-sided sign test."""
    from scipy.stats import binomtest

    nearer, farther = int((gain > 0).sum()), int((gain < 0).sum())
    n = nearer + farther
    return {"nearer": nearer, "farther": farther, "same": int((gain == 0).sum())} | {
        "p": float(binomtest(nearer, n).pvalue) if n else None
    }


# --- the summary ------------------------------------------------------------------------------------------------------


class _Means:
    """Mean effects over cells, of the data and of every resample, ``[case, readout, 1 + resample]``."""

    def __init__(self, effects: Effects, seed: int) -> None:
        self.effects = effects
        self.n_donors = len(set(effects.donor))
        self.weights = donor_weights(effects.donor, seed)
        self.true = effects.true @ self.weights.T
        error = effects.true.std(axis=2, ddof=1) / np.sqrt(effects.true.shape[2])
        clear = np.abs(self.true[..., 0]) > CLEAR * np.where(error > 0, error, np.inf)
        self.clear = clear & np.isin(effects.role, ROLES[:2])[:, None]
        """bool ``[case, readout]``, clear true effects, as the data have them."""

    def arm(self, name: str) -> np.ndarray:
        return self.effects.model[name] @ self.weights.T

    def interval(self, values: np.ndarray) -> dict[str, float | None]:
        return interval(values, self.n_donors)

    def ends(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Interval of each effect ``[case, readout, 1 + resample]`` -> two ``[case, readout]``, NaN of one donor."""
        if self.n_donors < 2:
            return np.full(values.shape[:2], np.nan), np.full(values.shape[:2], np.nan)
        tail = expanded_tail(self.n_donors, LEVEL)
        low, high = np.quantile(values[..., 1:], [tail, 1 - tail], axis=-1)
        return low, high


def summary(effects: Effects, seed: int = 0) -> dict[str, Any]:
    """What the effects say, arm by arm.

    Returns
    -------
    ``slopes``: modelled on true effect of the programmes through the origin, for density and for shares (1 is right);
    ``doses``: the same for each dose. ``signs``: clear true effects of programmes whose sign is right. ``roles``: per
    arm, role and readout, see :func:`_roles`. ``propagation``: how often a network brings effects nearer to the truth
    than the direct edit, see :func:`_propagation`. ``beyond_inert``: per role, the share of effects (edits times
    readouts) larger than 95 % of those of inert genes: power for drivers, false effects for reporters.
    ``calibration``: mean true effect of edits of like modelled effect. ``remedies``: what lowers the rate of false
    effects, and what it costs. ``probes``: slopes through linear probes.
    """
    means = _Means(effects, seed)
    role = effects.role
    programme = role == "programme"
    out: dict[str, Any] = {
        "n_cells": len(effects.donor),
        "n_donors": means.n_donors,
        "n_cases": {name: int((role == name).sum()) for name in ROLES if (role == name).any()},
        "intervals": COVERS,
        "slopes": {},
        "signs": {},
        "beyond_inert": {},
        "roles": [],
        "doses": [],
        "propagation": [],
        "calibration": [],
    }
    for name in (arm for arm in ARMS if arm in effects.model):
        value = means.arm(name)
        out["slopes"][name] = _slopes(means, value, programme)
        out["signs"][name] = _sign(means, value, means.clear & programme[:, None])
        out["doses"] += _doses(means, name, value)
        if name != ARMS[-1]:
            out["roles"] += _roles(means, name, value)
            out["calibration"] += _calibration(means, name, value)
        if (role == "inert").any():
            out["beyond_inert"][name] = {
                kind: means.interval(_beyond(value, _limit(value, role), role == kind))
                | {"of": int((role == kind).sum() * len(READOUTS))}
                for kind in out["n_cases"]
                if kind != "inert"
            }
        if name != ARMS[0]:
            out["propagation"] += _propagation(means, name, value)
    if (role == "inert").any() and (role == "reporter").any():
        out["remedies"] = list(_remedies(means))
    out["probes"] = {
        encoder: {arm: _slopes(means, values @ means.weights.T, programme) for arm, values in arms.items()}
        for encoder, arms in effects.probes.items()
    }
    return out


def _slope(true: np.ndarray, value: np.ndarray) -> np.ndarray:
    """``sum(t m) / sum(t t)`` over cases and readouts, ``[1 + resample]``; NaN without a true effect."""
    square = (true**2).sum(axis=(0, 1))
    return np.divide((true * value).sum(axis=(0, 1)), square, out=np.full(square.shape, np.nan), where=square > 1e-30)


def _slopes(means: _Means, value: np.ndarray, chosen: np.ndarray) -> dict[str, Any]:
    return {
        part: means.interval(_slope(means.true[chosen][:, where], value[chosen][:, where]))
        for part, where in PARTS.items()
    }


def _sign(means: _Means, value: np.ndarray, chosen: np.ndarray) -> dict[str, Any]:
    """Right signs among the chosen (case, readout) pairs; the interval is over donors."""
    right = (np.sign(value[chosen]) == np.sign(means.true[chosen])).astype(float)
    if not len(right):
        return {"right": 0, "of": 0, "value": None, "low": None, "high": None}
    return {"right": int(right[:, 0].sum()), "of": len(right)} | means.interval(right.mean(axis=0))


def _limit(value: np.ndarray, role: np.ndarray) -> np.ndarray:
    """Size that 95 % of inert genes' effects stay below, ``[readout, 1 + resample]``."""
    return np.quantile(np.abs(value[role == "inert"]), LEVEL, axis=0)


def _beyond(value: np.ndarray, limit: np.ndarray, chosen: np.ndarray, among: np.ndarray | None = None) -> np.ndarray:
    """Share of the chosen cases' effects beyond the limit, ``[1 + resample]``.

    Parameters
    ----------
    among: bool ``[case, readout]``, which effects count; None: all.
    """
    beyond = np.abs(value[chosen]) > limit[None]
    if among is None:
        return beyond.mean(axis=(0, 1)) if len(beyond) else np.full(value.shape[-1], np.nan)
    beyond = beyond[among[chosen]]
    return beyond.mean(axis=0) if len(beyond) else np.full(value.shape[-1], np.nan)


def _roles(means: _Means, arm: str, value: np.ndarray) -> Iterator[dict[str, Any]]:
    """One row per role and readout.

    ``n`` edits, ``n_clear`` of clear true effect; ``sign`` of these; ``slope`` on the true effect; ``covers_truth``:
    edits whose modelled effect's interval over donors holds the true mean; ``excludes_0``: edits whose interval leaves
    out 0, for inert genes the rate of false claims of a test over cells, for drivers its power; ``beyond_inert``;
    ``size``: mean absolute modelled effect, in the readout's unit.
    """
    effects = means.effects
    low, high = means.ends(value)
    true = means.true[..., 0]
    limit = _limit(value, effects.role) if (effects.role == "inert").any() else None
    for role in ROLES:
        mine = effects.role == role
        for j, readout in enumerate(READOUTS if mine.any() else ()):
            this = np.zeros_like(means.clear)
            this[:, j] = mine
            clear = this & means.clear
            yield {
                "arm": arm,
                "role": role,
                "readout": readout,
                "n": int(mine.sum()),
                "n_clear": int(clear.sum()),
                "sign": _sign(means, value, clear),
                "slope": means.interval(_slope(means.true[mine][:, [j]], value[mine][:, [j]])),
                "covers_truth": share(int(((low <= true) & (true <= high))[this].sum()), int(mine.sum())),
                "excludes_0": share(int(((low > 0) | (high < 0))[this].sum()), int(mine.sum())),
                "beyond_inert": None
                if limit is None or role == "inert"
                else means.interval(_beyond(value[:, [j]], limit[[j]], mine)),
                "size": _number(float(np.abs(value[mine, j, 0]).mean())),
            }


def _doses(means: _Means, arm: str, value: np.ndarray) -> Iterator[dict[str, Any]]:
    """Slope and signs of the programmes, dose by dose."""
    dose = np.array([case.dose for case in means.effects.cases])
    for one in np.unique(dose[means.effects.role == "programme"]):
        chosen = (dose == one) & (means.effects.role == "programme")
        yield {
            "arm": arm,
            "dose": float(one),
            "n": int(chosen.sum()),
            "slopes": _slopes(means, value, chosen),
            "sign": _sign(means, value, means.clear & chosen[:, None]),
        }


def _propagation(means: _Means, arm: str, value: np.ndarray) -> Iterator[dict[str, Any]]:
    """Per role: effects that the network brings nearer to the truth than the direct edit, and farther.

    ``effects`` counts clear true effects (for reporters all readouts, the truth being 0); they depend on each other,
    so ``edits`` sums the gains of an edit, each readout in units of the mean true effect of programmes, and the sign
    test is over edits: a programme's direction (all doses together) or a gene.
    """
    effects, direct = means.effects, means.arm(ARMS[0])[..., 0]
    true = means.true[..., 0]
    gain = np.abs(direct - true) - np.abs(value[..., 0] - true)
    # Sums of many cells differ in their last bits where nothing spread.
    gain[np.abs(gain) <= 1e-9 * (np.abs(direct) + np.abs(true))] = 0.0
    scale = np.abs(true[effects.role == "programme"]).mean(axis=0) if (effects.role == "programme").any() else 1.0
    scaled = np.divide(gain, scale, out=np.zeros_like(gain), where=np.asarray(scale) > 0)
    for role in ROLES[:3]:
        mine = effects.role == role
        counted = (np.ones_like(means.clear) if role == "reporter" else means.clear) & mine[:, None]
        if not counted.any():
            continue
        sums: dict[tuple[str, str], float] = {}
        for i in np.flatnonzero(counted.any(axis=1)):
            case = effects.cases[i]
            unit = (case.name, case.direction if role == "programme" else "")
            sums[unit] = sums.get(unit, 0.0) + float(scaled[i][counted[i]].sum())
        yield {
            "arm": arm,
            "role": role,
            "effects": {key: n for key, n in sign_test(gain[counted]).items() if key != "p"},
            "edits": sign_test(np.array(list(sums.values()))),
        }


def _calibration(means: _Means, arm: str, value: np.ndarray) -> Iterator[dict[str, Any]]:
    """Effects in bins of like modelled effect: its mean, and the mean true effect with its interval over donors."""
    groups = {"causes": ROLES[:2], "followers": ROLES[2:3]}
    for group, roles in groups.items():
        chosen = np.isin(means.effects.role, roles)
        for part, where in PARTS.items():
            x = value[chosen][:, where].reshape(-1, value.shape[-1])
            y = means.true[chosen][:, where].reshape(-1, value.shape[-1])
            if len(x) < BINS:
                continue
            for rows in np.array_split(np.argsort(x[:, 0], kind="stable"), BINS):
                true = means.interval(y[rows].mean(axis=0))
                yield {
                    "arm": arm,
                    "group": group,
                    "part": part,
                    "model": _number(float(x[rows, 0].mean())),
                    "true": true["value"],
                    "low": true["low"],
                    "high": true["high"],
                    "n": len(rows),
                }


# --- what lowers the rate of false effects ----------------------------------------------------------------------------


def _remedies(means: _Means) -> Iterator[dict[str, Any]]:
    """Each way of answering less to genes that only follow: the rate of false effects, the power that is left.

    ``false_effects``: share of reporters' effects beyond 95 % of inert genes' in the same arm. ``power_drivers``,
    ``power_programmes``: the same share among clear true effects. A refused edit makes no claim. ``refused``: share of
    edits, by role.
    """
    effects, role = means.effects, means.effects.role
    nobody = np.zeros(len(role), dtype=bool)
    no_cause = ~np.isin(role, ROLES[:2])
    ways: list[tuple[str, str, np.ndarray, np.ndarray | None]] = [("none", "direct", nobody, None)]
    if HELD in effects.model:
        ways.append(("programmes held at their level", HELD, nobody, None))
    if effects.outside is not None:
        inside = ~effects.outside
        ways.append(("refused where most cells leave the data", "direct", inside.mean(axis=1) < 0.5, inside))
    # The simulator's own list of causes: what perfect knowledge of regulators would be worth, nobody has it.
    ways.append(("refused unless a known regulator (right by construction)", "direct", no_cause, None))
    for arm, name, refused in (
        ("fitted network", "spread, every edited gene a regulator", nobody),
        ("known regulators", "spread, known regulators only, others refused (right by construction)", no_cause),
    ):
        if arm in effects.model:
            ways.append((name, arm, refused, None))
    for name, arm, refused, kept in ways:
        value = means.arm(arm)
        limit = _limit(value, role)
        if kept is not None:
            value = _over_cells(effects.model[arm], kept, means.weights)
        claimed = np.where(refused[:, None, None], 0.0, value)
        yield {
            "remedy": name,
            "arm": arm,
            "false_effects": means.interval(_beyond(claimed, limit, role == "reporter")),
            "power_drivers": means.interval(_beyond(claimed, limit, role == "driver", means.clear)),
            "power_programmes": means.interval(_beyond(claimed, limit, role == "programme", means.clear)),
            "refused": {kind: _number(float(refused[role == kind].mean())) for kind in ROLES if (role == kind).any()},
        }


def _over_cells(values: np.ndarray, kept: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean effects over the kept cells alone, ``[case, readout, 1 + resample]``; 0 where none is kept."""
    total = np.einsum("crn,cn,bn->crb", values, kept.astype(float), weights, optimize=True)
    weight = kept.astype(float) @ weights.T
    return np.divide(total, weight[:, None], out=np.zeros_like(total), where=weight[:, None] > 0)


def rows(effects: Effects) -> Iterator[dict[str, Any]]:
    """One row per case and readout: true and modelled mean effects."""
    for i, case in enumerate(effects.cases):
        for j, readout in enumerate(READOUTS):
            yield {
                "role": case.role,
                "edit": case.name,
                "dose": case.dose,
                "readout": readout,
                "true": float(effects.true[i, j].mean()),
            } | {arm: float(values[i, j].mean()) for arm, values in effects.model.items()}
