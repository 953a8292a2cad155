"""From doses and responses to a plateau and, only where it can be told, a half-effective dose."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ge2hist_core.types import BadInput
from perturb.signatures import MAX_DOSE, checked_dose

__all__ = ["DoseResponse", "Hill", "dose_response", "doses"]

N_DOSES = 7
N_LAST = 3
"""So many last points make a plateau."""
MIN_POINTS = 5
MIN_RESPONDING = 3
PLATEAU_NOISE = 0.25
"""Half an interval may be this share of the whole change; under wider ones a plateau says nothing."""
LAST_STEP = 0.2
"""Saturation is seen if the last step of dose adds at most this share of the whole change, noise included."""
SLOPES = (0.2, 10.0)
MISFIT_P = 0.01
Z95 = 1.96


def doses(maximum: float) -> tuple[float, ...]:
    """Seven doses: 0 and six that double up to ``maximum`` (evenly spaced on the log scale, as EC50 is estimated).

    Raises
    ------
    BadInput: a maximum outside (0, 4].

    Examples
    --------
    >>> doses(2)
    (0.0, 0.0625, 0.125, 0.25, 0.5, 1.0, 2.0)
    """
    maximum = checked_dose(maximum)
    if maximum <= 0:
        raise BadInput(f"The largest dose is {maximum:g}: choose a number above 0 and up to {MAX_DOSE:g}.")
    return (0.0, *(maximum / 2.0**k for k in range(N_DOSES - 2, -1, -1)))


@dataclass(frozen=True)
class Hill:
    """``response = bottom + (top - bottom) * dose**slope / (ec50**slope + dose**slope)``.

    Parameters
    ----------
    ec50, ec50_low, ec50_high: half-effective dose and its 95% interval, in the unit of the doses.
    bottom, top: response at dose 0 and far above EC50, in the unit of the response.
    slope: Hill coefficient, no unit.
    """

    ec50: float
    ec50_low: float
    ec50_high: float
    bottom: float
    top: float
    slope: float


@dataclass(frozen=True)
class DoseResponse:
    """What a row of doses shows.

    Parameters
    ----------
    plateau: the last three or more responses differ from dose 0 and no longer from each other, within intervals that
        are narrow against the change.
    plateau_from: the dose at which the plateau begins, NaN without one.
    hill: the fit, None where its parameters cannot be told from these points.
    reason: why there is no fit, one sentence; empty where there is one.
    """

    plateau: bool
    plateau_from: float
    hill: Hill | None
    reason: str


@dataclass(frozen=True, eq=False)
class _Points:
    """``[dose]`` arrays of the doses with a defined response."""

    dose: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def half(self) -> np.ndarray:
        return (self.high - self.low) / 2

    @property
    def change(self) -> float:
        """Of the last points against dose 0, signed."""
        return float(self.value[-N_LAST:].mean() - self.value[0])

    @property
    def responding(self) -> np.ndarray:
        """``[dose]`` bool: the interval shares no value with that of dose 0."""
        return (self.low > self.high[0]) | (self.high < self.low[0])


def dose_response(
    doses: Sequence[float], values: Sequence[float], low: Sequence[float], high: Sequence[float]
) -> DoseResponse:
    """Plateau and, only where it can be told, EC50.

    A Hill curve (Hill 1910; Goutelle et al. 2008, doi:10.1111/j.1472-8206.2008.00633.x) is fitted by least squares,
    weighted by the intervals, if at least three doses lie beyond the interval of dose 0, the response nowhere turns
    back beyond its intervals, and it levels off. The fit is given only if the curve describes the points, its
    covariance is finite, and EC50 lies within the tested doses with an interval narrower than their range.

    Parameters
    ----------
    doses: ``[dose]`` increasing from 0; for a reversed signature without the minus sign.
    values, low, high: ``[dose]`` response and its 95% interval. A dose with NaN is left out.

    Returns
    -------
    DoseResponse

    Raises
    ------
    ValueError: arrays of different shape, doses that do not increase from 0, an interval without its value.
    """
    points = _points(doses, values, low, high)
    start = _plateau_start(points)
    fitted = _why_no_fit(points, plateau=start is not None) or _fit_hill(points)
    return DoseResponse(
        plateau=start is not None,
        plateau_from=math.nan if start is None else float(points.dose[start]),
        hill=fitted if isinstance(fitted, Hill) else None,
        reason=fitted if isinstance(fitted, str) else "",
    )


def _points(*columns: Sequence[float]) -> _Points:
    table = [np.asarray(column, dtype=np.float64) for column in columns]
    if table[0].ndim != 1 or len({column.shape for column in table}) != 1:
        raise ValueError(f"a dose response needs four [dose] arrays, got shapes {[column.shape for column in table]}")
    dose, value, low, high = (column[np.isfinite(table).all(axis=0)] for column in table)
    if len(table[0]) == 0 or table[0][0] != 0 or not (np.diff(table[0]) > 0).all():
        raise ValueError(f"doses must increase from 0, got {table[0].tolist()}")
    if not ((low <= value) & (value <= high)).all():
        raise ValueError("every response must lie within its interval")
    return _Points(dose, value, low, high)


def _plateau_start(points: _Points) -> int | None:
    """Index of the first dose from which on all intervals share a value; None if that is no plateau."""
    n = len(points.dose)
    if n < MIN_POINTS or points.dose[0] != 0:
        return None
    start = n - 1
    while start > 0 and points.low[start - 1 :].max() <= points.high[start - 1 :].min():
        start -= 1
    narrow = points.half[-N_LAST:].max() <= PLATEAU_NOISE * abs(points.change)
    return start if n - start >= N_LAST and narrow and points.responding[start:].all() else None


def _why_no_fit(points: _Points, *, plateau: bool) -> str:
    """The first reason against a fit, empty if there is none."""
    if len(points.dose) < MIN_POINTS or points.dose[0] != 0:
        return f"Fewer than {MIN_POINTS} doses, dose 0 among them, have a defined response."
    responding = int(points.responding.sum())
    if responding < MIN_RESPONDING:
        return f"{responding} doses lie beyond the noise of dose 0, and an EC50 needs at least {MIN_RESPONDING}."
    sign = np.sign(points.change)
    up, down = (points.low, points.high) if sign > 0 else (-points.high, -points.low)
    if (np.maximum.accumulate(up) > down).any():
        return "The response turns back beyond its noise, so that no single curve rises or falls through it."
    step = sign * (points.value[-1] - points.value[-2]) + np.hypot(points.half[-1], points.half[-2])
    if not plateau and step > LAST_STEP * abs(points.change):
        return "The response does not visibly level off within the tested doses, so that EC50 would be a guess."
    return ""


def _fit_hill(points: _Points) -> Hill | str:
    """The fit, or one sentence on why it is not to be used."""
    from scipy.optimize import OptimizeWarning, curve_fit
    from scipy.special import expit
    from scipy.stats import chi2

    positive = points.dose[1:]
    log_dose = np.log(np.maximum(points.dose, np.finfo(float).tiny))  # of dose 0 finite, and far below every EC50
    span = np.ptp(points.value)
    sigma = np.maximum(points.half / Z95, 1e-3 * span)

    def curve(x: np.ndarray, bottom: float, top: float, log_ec50: float, slope: float) -> np.ndarray:
        return bottom + (top - bottom) * expit(slope * (x - log_ec50))

    ends = (points.value.min() - span, points.value.max() + span)
    lower = (ends[0], ends[0], np.log(positive[0] / 8), SLOPES[0])
    upper = (ends[1], ends[1], np.log(positive[-1] * 8), SLOPES[1])
    half_way = np.abs(points.value[1:] - (points.value[0] + points.change / 2)).argmin()
    start = (points.value[0], points.value[-1], np.log(positive[half_way]), 1.0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)  # a covariance that is not finite is told below
            found, covariance = curve_fit(
                curve, log_dose, points.value, start, sigma, absolute_sigma=True, bounds=(lower, upper)
            )
    except RuntimeError:
        return "The Hill curve's fit did not converge."
    bottom, top, log_ec50, slope = map(float, found)
    misfit = float((((points.value - curve(log_dose, *found)) / sigma) ** 2).sum())
    if chi2.sf(misfit, len(points.dose) - len(found)) < MISFIT_P:
        return "A Hill curve does not pass through the points within their intervals."
    error = Z95 * float(np.sqrt(covariance[2, 2])) if np.isfinite(covariance).all() else math.inf
    ec50 = math.exp(log_ec50)
    if not positive[0] <= ec50 <= positive[-1]:
        return f"The fitted EC50 of {ec50:.3g} lies outside the tested doses."
    if error > math.log(positive[-1] / positive[0]) or not SLOPES[0] * 1.01 < slope < SLOPES[1] * 0.99:
        return "The points leave EC50 or the slope of the Hill curve open."
    hill = Hill(ec50, math.exp(log_ec50 - error), math.exp(log_ec50 + error), bottom, top, slope)
    if hill.ec50_high - hill.ec50_low >= positive[-1] - positive[0]:
        return f"The interval of EC50, {hill.ec50_low:.3g} to {hill.ec50_high:.3g}, is as wide as the tested doses."
    return hill
