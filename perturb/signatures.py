"""Signatures of drugs and genes: signed gene lists, a dose that turns one into edits, file readers, a curated library.

A signature states by how much each gene's expression changes, as log2 fold changes or as directions alone. At dose
``d`` the counts of gene ``g`` are multiplied by

    factor_g = 2 ** (d * log2_fc_g),   clipped to the range of an edit, 0 to ``MAX_FACTOR``.

The dose has no unit of concentration. It says "times the signature's log2 fold changes", and for a signature of
directions alone "log2 fold change of every gene": 1 halves or doubles. A negative dose reverses the signature.

What was measured elsewhere need not hold in the cells at hand: a signature comes from its cell line, time and
concentration, and multiplying counts leaves a silent gene silent.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import re
import warnings
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ge2hist_core.types import BadInput
from perturb.edits import MAX_FACTOR, Edit, Perturbation, nearest_genes

__all__ = [
    "LIBRARY_CSV",
    "MAX_BYTES",
    "MAX_DOSE",
    "MAX_LOG2_FC",
    "MAX_SIGNATURES",
    "DoseResponse",
    "Expansion",
    "Hill",
    "Signature",
    "dose_response",
    "doses",
    "expand",
    "library_table",
    "load_library",
    "read_signatures",
]

MAX_DOSE = 4.0
"""Four times a measured signature, or 16-fold for every gene of a direction-only one: the end of what is arguable."""

MAX_LOG2_FC = 100.0
"""No ratio of counts comes near 2 ** 100: larger values are on another scale."""

MAX_BYTES = 100_000_000
MAX_SIGNATURES = 50_000
"""More than the largest Enrichr library holds (33,132 LINCS terms)."""

Z_CUTOFF = 2.0
"""|z| from which CMap counts a gene as changed (Subramanian et al. 2017, doi:10.1016/j.cell.2017.10.049)."""

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
GZIP_MAGIC = b"\x1f\x8b"
ZIP_MAGIC = b"PK\x03\x04"

LIBRARY_CSV = Path(__file__).parents[1] / "assets" / "signatures" / "mechanisms.csv"
LIBRARY_COLUMNS = ("signature", "mechanism", "gene", "sign", "source")

_DOI = re.compile(r"doi:10\.\d{4,9}/\S+$")


@dataclass(frozen=True)
class Signature:
    """Genes and how their expression changes.

    Parameters
    ----------
    name: unique within its file.
    genes: symbols, each once.
    log2_fc: ``[gene]`` log2 fold changes; exactly +1 or -1 where only directions are meant.
    direction_only: only the signs of ``log2_fc`` are meant.
    padj: ``[gene]`` adjusted p-values, 1 where the source gives none; None where the source has no such column.
    source: what to cite.
    description: what it stands for, in words.
    kind: ``"mechanism"``, ``"gene set"``, ``"drug"``, ``"differential expression"`` or ``"z-scores"``.
    cell_line, drug: names, empty where unknown.
    dose_um, time_h: concentration (uM) and duration (h) of the experiment, None where unknown.
    notes: what reading left out or assumed, one sentence each.

    Raises
    ------
    BadInput: a field of the wrong form.
    """

    name: str
    genes: tuple[str, ...]
    log2_fc: tuple[float, ...]
    direction_only: bool = False
    padj: tuple[float, ...] | None = None
    source: str = ""
    description: str = ""
    kind: str = ""
    cell_line: str = ""
    drug: str = ""
    dose_um: float | None = None
    time_h: float | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise BadInput("A signature has no name: give it one.")
        genes = tuple(self.genes)
        if not genes:
            raise BadInput(f"The signature {self.name!r} names no gene: give at least one.")
        if not all(isinstance(gene, str) and gene.strip() for gene in genes):
            raise BadInput(f"The signature {self.name!r} has an empty gene name: leave that row out.")
        if len(set(genes)) != len(genes):
            twice = next(gene for gene in genes if genes.count(gene) > 1)
            raise BadInput(f"The signature {self.name!r} names the gene {twice!r} twice: keep one of them.")
        object.__setattr__(self, "genes", genes)
        object.__setattr__(self, "log2_fc", self._numbers("log2_fc", self.log2_fc))
        object.__setattr__(self, "notes", tuple(self.notes))
        self._check_changes()
        if self.padj is not None:
            object.__setattr__(self, "padj", self._numbers("padj", self.padj))
            bad = next((p for p in self.padj if not 0 <= p <= 1), None)
            if bad is not None:
                raise BadInput(f"The signature {self.name!r} has the adjusted p-value {bad:g}: choose 0 to 1.")

    def _numbers(self, field: str, values: Iterable[float]) -> tuple[float, ...]:
        try:
            numbers = tuple(float(value) for value in values)
        except (TypeError, ValueError):
            raise BadInput(f"The signature {self.name!r} has a {field} that is no number: give numbers.") from None
        if len(numbers) != len(self.genes):
            raise BadInput(
                f"The signature {self.name!r} has {len(numbers)} values of {field} for {len(self.genes)} genes: "
                "give one for each gene."
            )
        return numbers

    def _check_changes(self) -> None:
        for gene, change in zip(self.genes, self.log2_fc, strict=True):
            if self.direction_only and change not in (-1.0, 1.0):
                raise BadInput(
                    f"The direction-only signature {self.name!r} gives {gene} the value {change:g}: choose +1 or -1."
                )
            if not abs(change) <= MAX_LOG2_FC:
                raise BadInput(
                    f"The signature {self.name!r} gives {gene} the log2 fold change {change:g}: "
                    f"give a number from -{MAX_LOG2_FC:g} to {MAX_LOG2_FC:g}."
                )

    @property
    def dose_unit(self) -> str:
        """What one unit of dose means for this signature."""
        return "log2 fold change per gene" if self.direction_only else "x the signature's log2 fold changes"


# ------------------------------------------------------------------ from a signature and a dose to edits


@dataclass(frozen=True, eq=False)
class Expansion:
    """A signature at a dose, on the genes of the data.

    Parameters
    ----------
    signature, dose: what was expanded, in the signature's ``dose_unit``.
    perturbation: one factor edit per changed gene, in the signature's order; empty at dose 0.
    table: one row per gene of the signature: ``gene`` (the signature's name), ``data_gene`` (the data's, or empty),
        ``match``, ``log2_fc``, ``wanted_factor`` and ``factor`` (in use, of six digits; NaN where it is not).
        ``match`` is ``exact``, ``case`` (equal but for letter case), ``mended`` (a name that a spreadsheet or a
        renaming changed), ``unmatched``, ``ambiguous`` (two genes of the data could be meant), ``duplicate`` (an
        earlier row has that gene of the data) or ``not in top``.
    """

    signature: Signature
    dose: float
    perturbation: Perturbation
    table: pd.DataFrame

    def _genes(self, column: str, rows: pd.Series) -> tuple[str, ...]:
        return tuple(self.table.loc[rows, column])

    @property
    def matched(self) -> tuple[str, ...]:
        """Genes of the data that the signature acts on."""
        return self._genes("data_gene", self.table["factor"].notna())

    @property
    def unmatched(self) -> tuple[str, ...]:
        """Genes of the signature that the data lack or where two could be meant."""
        return self._genes("gene", self.table["match"].isin(("unmatched", "ambiguous")))

    @property
    def clipped(self) -> tuple[str, ...]:
        """Genes of the data whose wanted factor lies above ``MAX_FACTOR``."""
        return self._genes("data_gene", self.table["factor"].notna() & (self.table["wanted_factor"] > MAX_FACTOR))

    @property
    def mended(self) -> dict[str, str]:
        """The signature's name -> the data's, where a changed name was mended."""
        rows = self.table[self.table["match"] == "mended"]
        return dict(zip(rows["gene"], rows["data_gene"], strict=True))

    @property
    def sentences(self) -> tuple[str, ...]:
        """What a user should know, one sentence each."""
        n = len(self.table)
        said = [f"{len(self.matched)} of {n} genes of the signature are in the data and in use."]
        if self.unmatched:
            said.append(f"Not found in the data: {_listed(self.unmatched)}.")
        if self.mended:
            said.append("Names mended: " + _listed([f"{old} to {new}" for old, new in self.mended.items()]) + ".")
        if self.clipped:
            said.append(f"Factors above {MAX_FACTOR:g} were lowered to {MAX_FACTOR:g}: {_listed(self.clipped)}.")
        if self.signature.direction_only:
            said.append("The signature gives directions alone: every gene changes by the same factor or its inverse.")
        return tuple(said)


def expand(signature: Signature, cells_genes: Iterable[str], dose: float, *, top: int | None = None) -> Expansion:
    """The edits of a signature at a dose, on data with these genes.

    A name is looked for as it stands, then in any letter case, then as one that a spreadsheet turned into a date
    (1-Mar, Mar-1, Mar-01, 2023-03-01: MARCHF1 or MARCH1) or that was renamed since (SEPT2, SEPTIN2). Serial numbers of
    dates are not mended: they look like Entrez ids. Genes without a change get no edit.

    Parameters
    ----------
    cells_genes: ``[gene]`` names as in ``Cells.genes``.
    dose: -4 to 4, in ``signature.dose_unit``.
    top: only that many of the matched genes, the strongest by |log2 fold change|, earlier ones first among equals.

    Returns
    -------
    Expansion

    Raises
    ------
    BadInput: a dose or ``top`` out of range, or no gene that the data have.

    Examples
    --------
    >>> signature = Signature("toy", ("CD8A", "VEGFA", "1-Mar"), (1.0, -0.5, 3.0))
    >>> expansion = expand(signature, ["CD8A", "VEGFA", "MARCHF1"], 1)
    >>> str(expansion.perturbation), expansion.clipped, expansion.mended
    ('CD8A:x2,VEGFA:x0.707107,MARCHF1:x4', ('MARCHF1',), {'1-Mar': 'MARCHF1'})
    """
    dose = _checked_dose(dose)
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
        raise BadInput(f"top is {top!r}: choose a whole number of genes from 1, or None for all.")
    names = list(cells_genes)
    matches = _match_all(signature.genes, names)
    found = [i for i, (gene, _) in enumerate(matches) if gene]
    if not found:
        raise BadInput(
            f"None of the {len(signature.genes)} genes of {signature.name!r} ({_listed(signature.genes[:3])}) is among "
            f"the {len(names)} of the data ({_listed(names[:3])}): give both the same kind of gene names."
        )
    changes = np.array(signature.log2_fc)
    strongest = set(sorted(found, key=lambda i: -abs(changes[i]))[:top])
    wanted = np.exp2(dose * changes)
    # Six digits are far more than a fold change has, and keep links short.
    used = np.array([min(float(f"{w:.6g}"), MAX_FACTOR) if i in strongest else math.nan for i, w in enumerate(wanted)])
    table = pd.DataFrame(
        {
            "gene": signature.genes,
            "data_gene": [gene for gene, _ in matches],
            "match": [how if i in strongest or not gene else "not in top" for i, (gene, how) in enumerate(matches)],
            "log2_fc": changes,
            "wanted_factor": wanted,
            "factor": used,
        }
    )
    edited = [i for i in sorted(strongest) if used[i] != 1.0]
    edits = tuple(Edit(matches[i][0], "factor", float(used[i])) for i in edited)
    return Expansion(signature, dose, Perturbation(edits), table)


def _checked_dose(dose: float) -> float:
    try:
        number = math.nan if isinstance(dose, bool) else float(dose)
    except (TypeError, ValueError):
        number = math.nan
    if not abs(number) <= MAX_DOSE:
        raise BadInput(f"The dose is {dose!r}: choose a number from -{MAX_DOSE:g} to {MAX_DOSE:g}.")
    return number


def _listed(names: Sequence[str], n: int = 5) -> str:
    """``"A, B and 7 more"``."""
    more = len(names) - n
    return ", ".join(map(str, names[:n])) + (f" and {more} more" if more > 0 else "")


_FAMILIES = {
    "MAR": (("MARCHF", "MARCH"), ("MTARC", "MARC")),
    "SEP": (("SEPTIN", "SEPT"),),
    "DEC": (("DELEC", "DEC"),),
}
"""Month -> families of genes whose symbols spreadsheets take for dates, new and old prefix (Bruford et al. 2020,
doi:10.1038/s41588-020-0669-3)."""

_SINGLE = {("SEP", 15): ("SELENOF", "SEP15"), ("OCT", 4): ("POU5F1", "OCT4")}

_DATES = (
    re.compile(r"(?P<day>\d{1,2})[-/. ]?(?P<month>MAR|SEPT?|OCT|DEC)([-/. ](\d{2}|\d{4}))?"),
    re.compile(r"(?P<month>MAR|SEPT?|OCT|DEC)[-/. ](?P<day>\d{1,2})"),
    # With a year the spreadsheet has put its own: March 1 of the year of typing.
    re.compile(r"\d{4}[-/](?P<month>03|09|10|12)[-/](?P<day>\d{2})([ T][\d:.]+)?"),
)
_MONTHS = {"03": "MAR", "09": "SEP", "10": "OCT", "12": "DEC", "SEPT": "SEP"}
_PREFIXED = re.compile(r"(MARCHF|MARCH|MTARC|MARC|SEPTIN|SEPT|DELEC|DEC)(\d{1,2})")


def _spellings(name: str) -> list[tuple[str, ...]]:
    """Genes that a changed name may mean, each as its spellings; empty for any other name."""
    name = name.strip().upper()
    if match := _PREFIXED.fullmatch(name):
        families = [family for group in _FAMILIES.values() for family in group if match[1] in family]
        return [tuple(f"{prefix}{int(match[2])}" for prefix in family) for family in families]
    for pattern in _DATES:
        if match := pattern.fullmatch(name):
            month, day = _MONTHS.get(match["month"], match["month"]), int(match["day"])
            if (month, day) in _SINGLE:
                return [_SINGLE[month, day]]
            return [tuple(f"{prefix}{day}" for prefix in family) for family in _FAMILIES.get(month, ())]
    return []


def _match_all(genes: Sequence[str], names: Sequence[str]) -> list[tuple[str, str]]:
    """``[gene]`` (name in the data or empty, how it was found); no name of the data is given twice."""
    exact = set(names)
    by_upper: dict[str, str] = {}
    for name in names:
        by_upper.setdefault(str(name).upper(), name)
    taken = exact & set(genes)
    matches = []
    for gene in genes:
        if gene in exact:
            matches.append((gene, "exact"))
            continue
        found, how = _match_changed(gene, by_upper)
        if found in taken:
            found, how = "", "duplicate"
        elif found:
            taken.add(found)
        matches.append((found, how))
    return matches


def _match_changed(gene: str, by_upper: dict[str, str]) -> tuple[str, str]:
    if gene.upper() in by_upper:
        return by_upper[gene.upper()], "case"
    known = [[name for name in spellings if name in by_upper] for spellings in _spellings(gene)]
    found = [names[0] for names in known if names]
    if len(found) == 1:
        return by_upper[found[0]], "mended"
    return "", "ambiguous" if found else "unmatched"


# ------------------------------------------------------------------ from doses and responses to EC50

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
    maximum = _checked_dose(maximum)
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


# ------------------------------------------------------------------ files


@dataclass(frozen=True)
class _Options:
    """Arguments of :func:`read_signatures`, checked."""

    names: tuple[str, ...] | None
    limit: int
    max_bytes: int
    padj_below: float | None
    base: float
    z_cutoff: float
    z_scale: float | None

    def __post_init__(self) -> None:
        if self.names == ():
            raise BadInput("The names of signatures to read are an empty list: give at least one, or None for all.")
        if not (math.isfinite(self.base) and self.base > 1):
            raise BadInput(f"The base of the logarithm is {self.base!r}: choose 2, 2.71828 or 10.")
        if self.padj_below is not None and not 0 < self.padj_below <= 1:
            raise BadInput(f"The limit of adjusted p-values is {self.padj_below!r}: choose a number from 0 to 1.")
        if not 0 <= self.z_cutoff < math.inf:
            raise BadInput(f"The cutoff of |z| is {self.z_cutoff!r}: choose a number from 0, such as 2.")
        if self.z_scale is not None and not 0 < self.z_scale < math.inf:
            raise BadInput(f"The log2 fold change per z is {self.z_scale!r}: choose a number above 0, or None.")

    def choose(self, present: Collection[str], path: Path) -> list[str]:
        """The asked names, all of them if none is asked for."""
        if self.names is None:
            if len(present) > self.limit:
                raise BadInput(
                    f"{path.name} holds {len(present):,} signatures, more than the limit of {self.limit:,}: "
                    "choose some by name."
                )
            return list(present)
        known = set(present)
        for name in self.names:
            if name not in known:
                near = nearest_genes(name, present) or list(present)[:3]
                raise BadInput(f"{path.name} has no signature {name!r}: choose for example {_listed(near, 3)}.")
        return list(self.names)


def read_signatures(
    path: str | Path,
    *,
    names: Collection[str] | None = None,
    limit: int = MAX_SIGNATURES,
    max_bytes: int = MAX_BYTES,
    padj_below: float | None = None,
    base: float = 2.0,
    z_cutoff: float = Z_CUTOFF,
    z_scale: float | None = None,
) -> list[Signature]:
    """Signatures of a file, whose format is told from its content and suffix. Text formats may be gzipped.

    - **GMT**, Enrichr's libraries among them: sets ``X_UP`` and ``X_DN`` (also ``X up``, ``X-down``) become one signed
      signature X; a set without a direction is read as up, or as down in a file whose name ends in ``down``.
      ``GENE,weight``: weights order the genes, their size is not used. LINCS terms such as
      ``LJP005_A375_24H-afatinib-10`` name cell line, hours, drug and uM.
    - **CSV, TSV** with a header: gene and log2 fold change, optionally adjusted p-value and the name of one of several
      signatures, as DESeq2, limma, edgeR, Seurat, scanpy and pertpy write them; or gene and z-score; or gene and sign.
    - **GCT** 1.2 and 1.3, **GCTX**: one signature per column, symbols from the row metadata.
    - **h5ad** with scanpy's ``uns["rank_genes_groups"]``: one signature per group.

    z-scores (L1000 level 5) say how sure a change is, not how large. They are read as directions of the genes with
    |z| >= ``z_cutoff``, surest first, unless ``z_scale`` states a log2 fold change per unit of z; a note says which.

    Parameters
    ----------
    names: only these signatures, in this order.
    limit: most signatures that are read without ``names``.
    max_bytes: largest file, unpacked; of a matrix also the largest part that is read.
    padj_below: only genes with a smaller adjusted p-value.
    base: of the logarithm that the fold changes have: 2, or e or 10 for natural or decadic ones (Seurat before 4).
    z_cutoff: least |z| of a gene whose direction is used.
    z_scale: log2 fold change per unit of z, None for directions alone.

    Returns
    -------
    list of Signature: at least one, in the order of the file or of ``names``.

    Raises
    ------
    BadInput: a file of another form, too large or damaged, an option out of range, nothing left.
    """
    path = Path(path)
    names = None if names is None else tuple(names)
    options = _Options(names, limit, max_bytes, padj_below, base, z_cutoff, z_scale)
    try:
        size, head = path.stat().st_size, _head(path)
    except OSError as error:
        raise BadInput(f"{path.name} cannot be read ({error.strerror}): choose another file.") from None
    if size > max_bytes:
        raise _too_large(path, size, max_bytes)
    if head == HDF5_MAGIC:
        return _kept(_read_hdf5(path, options), path, options)
    text = _text(path, max_bytes)
    if re.match(r"#1\.[23]\s", text):
        return _kept(_read_gct(text, path, options), path, options)
    if _looks_like_gmt(text, path):
        return _read_gmt(text, path, options)
    return _kept(_read_table(text, path, options), path, options)


def _kept(found: Iterable[Signature | None], path: Path, options: _Options) -> list[Signature]:
    """Those that are left after the cutoffs."""
    signatures = [signature for signature in found if signature is not None]
    if not signatures:
        cure = "lower the cutoffs" if options.padj_below is not None or options.z_cutoff else "choose another file"
        raise BadInput(f"{path.name} has no row with a gene and a change that passes the cutoffs: {cure}.")
    return signatures


def _head(path: Path) -> bytes:
    with path.open("rb") as handle:
        return handle.read(8)


def _too_large(path: Path, size: int, max_bytes: int) -> BadInput:
    return BadInput(
        f"{path.name} holds {size / 1e6:,.1f} MB, more than the limit of {max_bytes / 1e6:,.1f} MB: "
        "choose fewer signatures or a smaller file."
    )


def _text(path: Path, max_bytes: int) -> str:
    """Unpacked, decoded text with ``\\n`` line ends."""
    data = path.read_bytes()
    if data.startswith(GZIP_MAGIC):
        try:
            with gzip.open(io.BytesIO(data)) as handle:
                data = handle.read(max_bytes + 1)
        except (OSError, EOFError, zlib.error):
            raise BadInput(f"{path.name} is a damaged gzip file: fetch it again.") from None
        if len(data) > max_bytes:
            raise _too_large(path, len(data), max_bytes)
    if data.startswith(HDF5_MAGIC):
        raise BadInput(f"{path.name} is a packed HDF5 file: unpack it first.")
    if data.startswith(ZIP_MAGIC):
        raise BadInput(f"{path.name} is a zip archive or an Excel workbook: save it as CSV.")
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        raise BadInput(f"{path.name} is not a text in UTF-8: save it as CSV in UTF-8.") from None
    if "\0" in text:
        raise BadInput(f"{path.name} is not a text file: save it as CSV, TSV or GMT.")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise BadInput(f"{path.name} is empty: choose a file with signatures.")
    return text


def _stem(path: Path) -> str:
    """File name without its suffixes .gz, .txt, .csv and the like."""
    name = path.name.removesuffix(".gz")
    return re.sub(r"\.(txt|tsv|csv|tab|gmt|gct|gctx|h5ad)$", "", name, flags=re.IGNORECASE) or name


# ---------------------------------- GMT

_DIRECTION = re.compile(r"(?P<stem>.*\S)[\s_-]+(?P<direction>up|dn|down)", re.IGNORECASE)
_LINCS_TERM = re.compile(
    r"(?P<plate>[A-Z0-9.]+)_(?P<cell>[A-Za-z0-9.]+)_(?P<hours>\d+(?:\.\d+)?)H[-_](?P<drug>.+)-(?P<um>\d+(?:\.\d+)?)"
)


def _looks_like_gmt(text: str, path: Path) -> bool:
    if path.name.lower().removesuffix(".gz").endswith(".gmt"):
        return True
    fields = text.lstrip("\n").partition("\n")[0].split("\t")
    described = len(fields) > 2 and (fields[1].strip().lower() in ("", "na") or fields[1].startswith("http"))
    return described and not _roles(fields).keys() & {"log2_fc", "z", "sign"}


def _read_gmt(text: str, path: Path, options: _Options) -> list[Signature]:
    sets: dict[str, dict[int, tuple[str, dict[str, float]]]] = {}
    default, notes = _default_direction(path)
    undirected = set()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        name, description, weights = _gmt_line(line, number, path)
        match = _DIRECTION.fullmatch(name)
        stem = match["stem"] if match else name
        sign = (1 if match["direction"].lower() == "up" else -1) if match else default
        if match is None:
            undirected.add(stem)
        if sign in sets.setdefault(stem, {}):
            raise BadInput(f"Line {number} of {path.name} names the set {name!r} again: leave one of them out.")
        sets[stem][sign] = (description, weights)
    return [
        _gmt_signature(stem, sets[stem], path, notes if stem in undirected else ())
        for stem in options.choose(sets, path)
    ]


def _default_direction(path: Path) -> tuple[int, tuple[str, ...]]:
    match = _DIRECTION.fullmatch(_stem(path))
    if match and match["direction"].lower() != "up":
        return -1, ("The file's name ends in 'down': its sets are read as down-regulated.",)
    return 1, ("A set without a direction is read as up-regulated.",)


def _gmt_line(line: str, number: int, path: Path) -> tuple[str, str, dict[str, float]]:
    """Name, description and gene -> weight of one line."""
    name, *rest = (field.strip() for field in line.split("\t"))
    genes = [field for field in rest[1:] if field]
    if not name or not genes:
        raise BadInput(
            f"Line {number} of {path.name} is no gene set: write a name, a description and genes, separated by tabs."
        )
    weights: dict[str, float] = {}
    for field in genes:
        gene, _, weight = field.rpartition(",")
        value = _as_float(weight) if gene else math.nan
        weights.setdefault(*((gene.strip(), value) if math.isfinite(value) else (field, 1.0)))
    return name, rest[0], weights


def _gmt_signature(
    name: str, directions: dict[int, tuple[str, dict[str, float]]], path: Path, notes: tuple[str, ...]
) -> Signature:
    weights = {sign: found for sign, (_, found) in directions.items()}
    both = weights.get(1, {}).keys() & weights.get(-1, {}).keys()
    pairs = [(gene, sign, w) for sign in (1, -1) for gene, w in weights.get(sign, {}).items() if gene not in both]
    if not pairs:
        raise BadInput(f"The sets of {name!r} in {path.name} have the same genes up and down: leave one out.")
    if both:
        notes += (f"Genes named both up and down were left out: {_listed(sorted(both))}.",)
    pairs.sort(key=lambda pair: -abs(pair[2]))
    description = next((text for text, _ in directions.values() if text.lower() not in ("", "na")), "")
    term = _LINCS_TERM.fullmatch(name)
    return Signature(
        name=name,
        genes=tuple(gene for gene, _, _ in pairs),
        log2_fc=tuple(float(sign) for _, sign, _ in pairs),
        direction_only=True,
        source=description if description.startswith("http") else path.name,
        description=description,
        kind="drug" if term else "gene set",
        cell_line=term["cell"] if term else "",
        drug=term["drug"] if term else "",
        dose_um=float(term["um"]) if term else None,
        time_h=float(term["hours"]) if term else None,
        notes=notes,
    )


def _as_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


# ---------------------------------- tables

_SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons"}

_ROLES = {
    "gene": (
        *("symbol", "genesymbol", "hgncsymbol", "externalgenename", "genename", "genenames", "gene", "genes"),
        *("names", "name", "variable", "featurename", "feature", "geneid", "id", "unnamed0", ""),
    ),
    "log2_fc": (
        *("log2foldchange", "log2fc", "avglog2fc", "logfc", "logfoldchanges", "logfoldchange", "avglogfc", "lfc"),
    ),
    "z": ("zscore", "zscores", "z", "modz"),
    "sign": ("sign",),
    "padj": (
        *("padj", "adjpval", "adjpvalue", "pvalsadj", "pvaladj", "pvalueadj", "fdr", "qvalue", "qval", "bonferroni"),
        "nlog10bonferronipval",
    ),
    "name": (
        *("signature", "signaturename", "perturbagen", "perturbation", "pertiname", "drug", "compound", "contrast"),
        *("comparison", "group", "cluster", "term"),
    ),
}
"""Role of a column -> names, in lower case without other than letters and digits, preferred ones first. From DESeq2,
limma (logFC, adj.P.Val), edgeR (logFC, FDR), Seurat (avg_log2FC, p_val_adj), scanpy (names, logfoldchanges, pvals_adj),
pertpy (variable, log_fc, adj_p_value), CMap; the unnamed one is R's row names."""

_MISSING = {"", "na", "n/a", "nan", "null", "none", "-", ".", "inf", "-inf", "+inf"}


def _roles(header: Sequence[str]) -> dict[str, int]:
    """Role -> column."""
    plain = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in header]
    found = {role: next((plain.index(n) for n in names if n in plain), None) for role, names in _ROLES.items()}
    return {role: column for role, column in found.items() if column is not None}


def _header(lines: Sequence[str], path: Path) -> tuple[str, list[str]]:
    """Separator and column names of a table's first two lines, with "" for row names that R left without one."""
    headers = {}
    for separator in _SEPARATORS:
        try:
            header, *second = csv.reader(lines, delimiter=separator)
        except csv.Error:  # a field of 131,072 characters or more, or a quotation mark that never ends
            raise BadInput(f"The first lines of {path.name} are no table: save it as CSV, TSV or GMT.") from None
        if second and len(second[0]) == len(header) + 1:
            header = ["", *header]
        roles = _roles(header)
        if "gene" in roles and roles.keys() & {"log2_fc", "z", "sign"}:
            return separator, header
        headers[separator] = header
    separator = max(headers, key=lambda s: len(headers[s]))
    widest = headers[separator]
    if len(widest) == 1:
        raise BadInput(
            f"The first line of {path.name} is one column, {widest[0][:60]!r}: separate columns by commas, tabs or "
            "semicolons."
        )
    lacking = "genes" if "gene" not in _roles(widest) else "log2 fold changes"
    raise BadInput(
        f"{path.name}, read with {_SEPARATORS[separator]} as separators, has no column of {lacking} among "
        f"{_listed(widest, 8)}: name the columns gene and log2FoldChange."
    )


def _read_table(text: str, path: Path, options: _Options) -> Iterator[Signature | None]:
    lines = text.split("\n")
    start = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), None)
    if start is None:
        raise BadInput(f"{path.name} holds comments alone: choose a file with genes.")
    separator, header = _header(lines[start : start + 2], path)
    roles = _roles(header)
    if options.padj_below is not None and "padj" not in roles:
        raise BadInput(f"{path.name} has no column of adjusted p-values: add one named padj, or set no limit for it.")
    groups = _table_groups(lines, start + 1, path, separator, header)
    unit = next(role for role in ("log2_fc", "z", "sign") if role in roles)
    column = header[roles[unit]]
    notes: tuple[str, ...] = ()
    if unit == "log2_fc" and options.base == 2 and "log2" not in column.lower():
        notes = (f"The fold changes in the column {column} are taken as log2.",)
    for name in options.choose(groups, path):
        genes, values, padj = groups[name]
        yield _assemble(
            name,
            np.array(genes, dtype=object),
            np.array(values),
            np.array(padj) if "padj" in roles else None,
            unit,
            options,
            notes=notes,
            source=path.name,
        )


_Rows = tuple[list[str], list[float], list[float]]


def _table_groups(lines: list[str], start: int, path: Path, separator: str, header: list[str]) -> dict[str, _Rows]:
    """Name of a signature -> its genes, changes and adjusted p-values, NaN where a cell is empty.

    ``start`` is the index of the first line after the header.
    """
    roles = _roles(header)
    value_column = next(roles[role] for role in ("log2_fc", "z", "sign") if role in roles)
    padj_column, name_column = roles.get("padj"), roles.get("name")
    log10 = padj_column is not None and header[padj_column].lower().startswith("nlog10")
    groups: dict[str, _Rows] = {}
    reader = csv.reader((line + "\n" for line in lines[start:]), delimiter=separator)
    try:
        for row in reader:
            number = start + reader.line_num
            if not any(map(str.strip, row)):
                continue
            if len(row) != len(header):
                raise BadInput(
                    f"Line {number} of {path.name} has {len(row)} fields and the header {len(header)}: "
                    "give every row the same columns."
                )
            where = (path, number, separator == ";")
            name = _stem(path) if name_column is None else row[name_column].strip() or "unnamed"
            genes, values, padj = groups.setdefault(name, ([], [], []))
            gene = row[roles["gene"]].strip()
            genes.append("" if gene.lower() in ("na", "nan", "---") else gene)
            values.append(_cell(row[value_column], header[value_column], *where))
            if padj_column is not None:
                p = _cell(row[padj_column], header[padj_column], *where)
                padj.append(10.0**-p if log10 else p)
    except csv.Error as error:
        number = start + reader.line_num
        raise BadInput(f"Line {number} of {path.name} cannot be read ({error}): save the file again.") from None
    if not groups:
        raise BadInput(f"{path.name} has a header and no rows: choose a file with genes.")
    return groups


def _cell(text: str, column: str, path: Path, line: int, decimal_comma: bool) -> float:
    """The number in a cell, NaN where it is missing or infinite."""
    text = text.strip()
    if text.lower() in _MISSING:
        return math.nan
    number = _as_float(text.replace(",", ".") if decimal_comma else text)
    if math.isnan(number):
        raise BadInput(f"Line {line} of {path.name} has {text!r} in the column {column}: give a number or NA.")
    return number


_KINDS = {"log2_fc": "differential expression", "z": "z-scores", "sign": "mechanism"}


def _assemble(
    name: str,
    genes: np.ndarray,
    values: np.ndarray,
    padj: np.ndarray | None,
    unit: str,
    options: _Options,
    *,
    notes: tuple[str, ...] = (),
    **about: Any,
) -> Signature | None:
    """One signature from ``[row]`` arrays; None if the cutoffs leave nothing.

    ``unit`` is ``"log2_fc"`` (of base ``options.base``), ``"z"`` or ``"sign"``.
    """
    usable = np.isfinite(values) & (genes != "")
    if dropped := int((~usable).sum()):
        notes += (f"{dropped} rows without a gene or a finite number were left out.",)
    p = np.ones(len(values)) if padj is None else np.where(np.isnan(padj), 1.0, padj)
    if options.padj_below is not None and padj is not None:
        passing = p < options.padj_below
        if failing := int((usable & ~passing).sum()):
            notes += (f"{failing} rows with an adjusted p-value of {options.padj_below:g} or more were left out.",)
        usable &= passing
    if unit == "z" and options.z_scale is None:
        usable &= np.abs(values) >= max(options.z_cutoff, np.finfo(float).tiny)
    rows, repeated = _without_repeats(np.flatnonzero(usable), genes, values, p)
    if not len(rows):
        return None
    if repeated:
        rule = "largest change" if padj is None else "smallest adjusted p-value"
        notes += (f"Of genes with several rows the one with the {rule} was kept: {_listed(repeated)}.",)
    if unit == "z":
        rows = rows[np.argsort(-np.abs(values[rows]), kind="stable")]
        notes += (_z_note(options),)
    direction_only = unit == "sign" or (unit == "z" and options.z_scale is None)
    return Signature(
        name=name,
        genes=tuple(genes[rows]),
        log2_fc=tuple(_log2(values[rows], unit, options).tolist()),
        direction_only=direction_only,
        padj=None if padj is None else tuple(p[rows].tolist()),
        kind=_KINDS[unit],
        notes=notes,
        **about,
    )


def _without_repeats(
    rows: np.ndarray, genes: np.ndarray, values: np.ndarray, p: np.ndarray
) -> tuple[np.ndarray, list[str]]:
    """Rows with each gene once, in their order, and the genes that had several."""
    best: dict[str, int] = {}
    repeated: dict[str, None] = {}
    for row in rows[np.lexsort((-np.abs(values[rows]), p[rows]))].tolist():
        if best.setdefault(genes[row], row) != row:
            repeated[genes[row]] = None
    return np.array(sorted(best.values()), dtype=np.intp), list(repeated)


def _log2(values: np.ndarray, unit: str, options: _Options) -> np.ndarray:
    if unit == "log2_fc":
        return values * math.log2(options.base)
    if unit == "z":
        return np.sign(values) if options.z_scale is None else values * options.z_scale
    return values


def _z_note(options: _Options) -> str:
    if options.z_scale is None:
        return (
            "The values are z-scores, which say how sure a change is and not how large: only the directions of genes "
            f"with |z| of at least {options.z_cutoff:g} are used."
        )
    return f"The values are z-scores; {options.z_scale:g} log2 fold change per unit of z is assumed."


# ---------------------------------- GCT and GCTX (Enache et al. 2019, doi:10.1093/bioinformatics/bty784)

_SYMBOL_COLUMNS = ("pr_gene_symbol", "gene_symbol", "symbol", "Description")
_CELL_COLUMNS = ("cell_iname", "cell_id", "cell_line")
_DRUG_COLUMNS = ("cmap_name", "pert_iname", "pert_desc")
_NO_VALUE = ("-666", "-666.0", "na", "nan", "---", "")
"""CMap writes -666 for "unknown"."""


@dataclass(frozen=True, eq=False)
class _Matrix:
    """What a GCT or GCTX file says beside its numbers: ``[row]`` symbols, ``[column]`` ids and metadata."""

    genes: np.ndarray
    columns: list[str]
    metadata: dict[str, list[str]]

    def about(self, column: int) -> dict[str, Any]:
        def first(names: Sequence[str]) -> str:
            values = (self.metadata[name][column] for name in names if name in self.metadata)
            return next((value for value in values if value.strip().lower() not in _NO_VALUE), "")

        return {"cell_line": first(_CELL_COLUMNS), "drug": first(_DRUG_COLUMNS)}

    def check(self, path: Path, n_rows: int) -> None:
        if len(self.genes) != n_rows or any(len(v) != len(self.columns) for v in self.metadata.values()):
            raise BadInput(f"{path.name} has metadata of another size than its matrix: fetch the file again.")
        if len(set(self.columns)) != len(self.columns):
            twice = next(name for name in self.columns if self.columns.count(name) > 1)
            raise BadInput(f"{path.name} has two columns named {twice!r}: rename one.")


def _symbols(metadata: dict[str, list[str]], ids: list[str]) -> np.ndarray:
    """``[row]`` symbols, empty where unknown; the row ids if no metadata has any."""
    found = next((metadata[name] for name in _SYMBOL_COLUMNS if name in metadata), None)
    if found is None or all(value.strip().lower() in _NO_VALUE for value in found):
        found = ids
    symbols = [value.strip() for value in found]
    return np.array(["" if symbol.lower() in _NO_VALUE else symbol for symbol in symbols], dtype=object)


def _column_signatures(
    matrix: _Matrix, values: np.ndarray, chosen: Sequence[str], path: Path, options: _Options
) -> Iterator[Signature | None]:
    """One signature per chosen column of ``values [row, chosen]``, which are z-scores."""
    finite = values[np.isfinite(values)]
    if len(finite) and finite.min() >= 0:
        raise BadInput(
            f"{path.name} has no negative value, as expression levels have none: give z-scores (level 5) or log2 fold "
            "changes."
        )
    place = {name: i for i, name in enumerate(matrix.columns)}
    for i, name in enumerate(chosen):
        about = matrix.about(place[name])
        yield _assemble(name, matrix.genes, values[:, i], None, "z", options, source=path.name, **about)


def _read_gct(text: str, path: Path, options: _Options) -> Iterator[Signature | None]:
    lines = text.rstrip("\n").split("\n")
    n_rows, n_columns, n_row_meta, n_column_meta = _gct_sizes(lines, path)
    first, start = 1 + n_row_meta, 3 + n_column_meta
    head = [line.split("\t") for line in lines[2:start]]
    if len(lines) != start + n_rows or any(len(fields) != first + n_columns for fields in head):
        raise _other_sizes(path, n_rows, n_columns)
    names = [name.strip() for name in head[0]]
    columns = names[first:]
    chosen = options.choose(columns, path)
    where = [first + columns.index(name) for name in chosen]
    described: list[list[str]] = []
    values = np.empty((n_rows, len(where)))
    for i, line in enumerate(lines[start:]):
        fields = line.split("\t")
        if len(fields) != first + n_columns:
            raise _other_sizes(path, n_rows, n_columns)
        described.append(fields[:first])
        values[i] = [_cell(fields[j], names[j], path, start + i + 1, decimal_comma=False) for j in where]
    row_meta = {name: [fields[j] for fields in described] for j, name in enumerate(names[:first])}
    metadata = {fields[0]: fields[first:] for fields in head[1:]}
    matrix = _Matrix(_symbols(row_meta, [fields[0] for fields in described]), columns, metadata)
    matrix.check(path, n_rows)
    yield from _column_signatures(matrix, values, chosen, path, options)


def _gct_sizes(lines: Sequence[str], path: Path) -> tuple[int, int, int, int]:
    """Rows, columns, columns of row metadata, lines of column metadata."""
    sizes = [int(field) for field in (lines[1] if len(lines) > 1 else "").split() if field.isdigit()]
    expected = 2 if lines[0].startswith("#1.2") else 4
    if len(sizes) != expected or len(lines) < 3:
        raise BadInput(f"Line 2 of {path.name} must give {expected} sizes, as line 1 says: save the file again.")
    return (sizes[0], sizes[1], 1, 0) if expected == 2 else (sizes[0], sizes[1], sizes[2], sizes[3])


def _other_sizes(path: Path, n_rows: int, n_columns: int) -> BadInput:
    return BadInput(
        f"{path.name} states {n_rows} rows and {n_columns} columns and holds other ones: fetch the file again."
    )


def _read_hdf5(path: Path, options: _Options) -> Iterator[Signature | None]:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            if "0/DATA/0/matrix" in file:
                yield from _read_gctx(file, path, options)
            elif "uns/rank_genes_groups" in file:
                yield from _read_ranked(file["uns/rank_genes_groups"], path, options)
            else:
                raise BadInput(
                    f"{path.name} holds neither a GCTX matrix nor scanpy's rank_genes_groups: choose another file."
                )
    except BadInput:
        raise
    except (KeyError, IndexError, OSError, RuntimeError, TypeError, ValueError):  # h5py meets damage with any of these
        raise BadInput(f"{path.name} is a damaged or incomplete HDF5 file: fetch it again.") from None


def _strings(dataset: Any) -> list[str]:
    """Values of an HDF5 dataset as text."""
    values = np.asarray(dataset[()]).ravel().tolist()
    return [v.decode("utf-8", "replace").strip("\0 ") if isinstance(v, bytes) else str(v) for v in values]


def _read_gctx(file: Any, path: Path, options: _Options) -> Iterator[Signature | None]:
    rows, columns = file["0/META/ROW"], file["0/META/COL"]
    ids, names = _strings(rows["id"]), _strings(columns["id"])
    stored = file["0/DATA/0/matrix"]
    if stored.shape != (len(names), len(ids)):  # GCTX stores one row per column of the matrix
        raise BadInput(
            f"{path.name} has {len(names)} columns and {len(ids)} rows and a stored matrix of shape {stored.shape}: "
            "fetch the file again."
        )
    row_meta = {name: _strings(rows[name]) for name in _SYMBOL_COLUMNS if name in rows}
    metadata = {name: _strings(columns[name]) for name in (*_CELL_COLUMNS, *_DRUG_COLUMNS) if name in columns}
    matrix = _Matrix(_symbols(row_meta, ids), names, metadata)
    matrix.check(path, len(ids))
    chosen = options.choose(names, path)
    size = len(chosen) * len(ids) * 8
    if size > options.max_bytes:
        raise _too_large(path, size, options.max_bytes)
    place = {name: i for i, name in enumerate(names)}
    values = np.array([stored[place[name]] for name in chosen], dtype=np.float64).reshape(len(chosen), len(ids)).T
    yield from _column_signatures(matrix, values, chosen, path, options)


# ---------------------------------- h5ad


def _read_ranked(ranked: Any, path: Path, options: _Options) -> Iterator[Signature | None]:
    """scanpy's ``rank_genes_groups``: tables with one column per group; ``logfoldchanges`` are log2."""
    if "logfoldchanges" not in ranked:
        raise BadInput(
            f"The rank_genes_groups of {path.name} have no logfoldchanges: run scanpy with method wilcoxon or t-test."
        )
    names, changes = ranked["names"][()], ranked["logfoldchanges"][()]
    if getattr(names.dtype, "names", None) is None:
        raise BadInput(f"The rank_genes_groups of {path.name} are not in scanpy's layout: write the file with anndata.")
    padj = ranked["pvals_adj"][()] if "pvals_adj" in ranked else None
    if options.padj_below is not None and padj is None:
        raise BadInput(f"The rank_genes_groups of {path.name} have no pvals_adj: set no limit for adjusted p-values.")
    reference = _strings(ranked["params/reference"])[0] if "params/reference" in ranked else "unknown"
    for group in options.choose(names.dtype.names, path):
        genes = [g.decode("utf-8", "replace") if isinstance(g, bytes) else str(g) for g in names[group]]
        yield _assemble(
            group,
            np.array(genes, dtype=object),
            np.asarray(changes[group], dtype=np.float64),
            None if padj is None else np.asarray(padj[group], dtype=np.float64),
            "log2_fc",
            options,
            source=path.name,
            description=f"group {group} against {reference}",
        )


# ------------------------------------------------------------------ the curated library


@cache
def load_library(path: Path = LIBRARY_CSV) -> tuple[Signature, ...]:
    """Signatures of drug mechanisms and stimuli, curated from the literature; a path is read once per process.

    The signs come from the source that each row cites: what the mechanism does to the gene's transcript where it has
    been measured, and the reverse of an activation signature for an inhibitor. Magnitudes were not curated: every
    signature is direction-only. A mechanism acts only in cells that have its target.

    Raises
    ------
    BadInput: columns other than the documented ones, a sign other than +1 and -1, a source without a DOI, a gene named
        twice, a signature with two mechanisms.
    """
    return tuple(
        Signature(
            name=str(name),
            genes=tuple(rows["gene"]),
            log2_fc=tuple(rows["sign"]),
            direction_only=True,
            source="; ".join(dict.fromkeys(rows["source"])),
            description=rows["mechanism"].iloc[0],
            kind="mechanism",
            notes=("The directions are curated from the literature, the magnitudes are not.",),
        )
        for name, rows in _library_rows(path).groupby("signature", sort=False)
    )


def _library_rows(path: Path) -> pd.DataFrame:
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    if tuple(rows.columns) != LIBRARY_COLUMNS:
        raise BadInput(f"{path.name} has the columns {_listed(list(rows), 8)}: give {', '.join(LIBRARY_COLUMNS)}.")
    for row in rows.itertuples():
        if row.sign not in ("+1", "1", "-1"):
            raise BadInput(f"{path.name} gives {row.gene} in {row.signature} the sign {row.sign!r}: choose +1 or -1.")
        if not _DOI.search(str(row.source)):
            raise BadInput(f"{path.name} gives {row.gene} in {row.signature} a source without doi:10...: add the DOI.")
    mechanisms = rows.groupby("signature")["mechanism"].nunique()
    if (mechanisms != 1).any():
        raise BadInput(f"{path.name} gives {mechanisms.idxmax()} more than one mechanism: give it one.")
    return rows.assign(sign=rows["sign"].astype(float))


def library_table(path: Path = LIBRARY_CSV) -> pd.DataFrame:
    """Overview of the library.

    Returns
    -------
    DataFrame: one row per signature: ``signature``, ``mechanism``, ``n_up``, ``n_down``, ``up``, ``down`` (genes,
        comma-separated) and ``sources``.
    """
    rows = []
    for signature in load_library(path):
        pairs = list(zip(signature.genes, signature.log2_fc, strict=True))
        up, down = ([gene for gene, sign in pairs if sign * side > 0] for side in (1, -1))
        rows.append(
            {
                "signature": signature.name,
                "mechanism": signature.description,
                "n_up": len(up),
                "n_down": len(down),
                "up": ", ".join(up),
                "down": ", ".join(down),
                "sources": signature.source,
            }
        )
    return pd.DataFrame(rows)
