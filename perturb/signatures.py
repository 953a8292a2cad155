"""Signatures of drugs and genes: signed gene lists, a dose that turns one into edits, a curated library.

A signature states by how much each gene's expression changes, as log2 fold changes or as directions alone. At dose
``d`` the counts of gene ``g`` are multiplied by

    factor_g = 2 ** (d * log2_fc_g),   clipped to the range of an edit, 0 to ``MAX_FACTOR``.

The dose has no unit of concentration. It says "times the signature's log2 fold changes", and for a signature of
directions alone "log2 fold change of every gene": 1 halves or doubles. A negative dose reverses the signature.

What was measured elsewhere need not hold in the cells at hand: a signature comes from its cell line, time and
concentration, and multiplying counts leaves a silent gene silent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from ge2hist_core.types import BadInput, check_text
from perturb.edits import MAX_FACTOR, Edit, Perturbation

__all__ = [
    "LIBRARY_CSV",
    "MAX_DOSE",
    "MAX_LOG2_FC",
    "Expansion",
    "Signature",
    "checked_dose",
    "directions",
    "expand",
    "library_table",
    "listed",
    "load_library",
]

MAX_DOSE = 4.0
"""Four times a measured signature, or 16-fold for every gene of a direction-only one: the end of what is arguable."""

MAX_LOG2_FC = 100.0
"""No ratio of counts comes near 2 ** 100: larger values are on another scale."""

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
    top: act only on that many of the genes that the data have, the strongest ones; None for all.

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
    top: int | None = None

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
        texts = (self.name, self.source, self.description, self.kind, self.cell_line, self.drug, *self.notes, *genes)
        check_text(f"The signature {self.name!r}", "\n".join(texts))
        object.__setattr__(self, "genes", genes)
        object.__setattr__(self, "log2_fc", self._numbers("log2_fc", self.log2_fc))
        object.__setattr__(self, "notes", tuple(self.notes))
        self._check_changes()
        _check_top(self.top)
        if self.padj is not None:
            object.__setattr__(self, "padj", self._numbers("padj", self.padj))
            bad = next((p for p in self.padj if not 0 <= p <= 1), None)
            if bad is not None:
                raise BadInput(f"The signature {self.name!r} has the adjusted p-value {bad:g}: choose 0 to 1.")

    def _numbers(self, field: str, values: Iterable[float]) -> tuple[float, ...]:
        try:
            numbers = tuple(float(value) for value in values)
        except (TypeError, ValueError, OverflowError):
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


def directions(signature: Signature) -> Signature | None:
    """The same with the signs of its changes alone, the strongest genes first; None where no gene changes.

    For fold changes whose size is not to be trusted, such as those of another platform or of few cells.
    """
    if signature.direction_only:
        return signature
    order = [i for i in np.argsort(-np.abs(signature.log2_fc), kind="stable").tolist() if signature.log2_fc[i]]
    if not order:
        return None
    return replace(
        signature,
        genes=tuple(signature.genes[i] for i in order),
        log2_fc=tuple(math.copysign(1.0, signature.log2_fc[i]) for i in order),
        padj=None if signature.padj is None else tuple(signature.padj[i] for i in order),
        direction_only=True,
        notes=(*signature.notes, "Only the directions of the fold changes are used, as was asked."),
    )


def _check_top(top: int | None) -> None:
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
        raise BadInput(f"top is {top!r}: choose a whole number of genes from 1, or None for all.")


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
        if weaker := int((self.table["match"] == "not in top").sum()):
            said.append(f"{weaker} weaker genes that the data have were left out, as was asked.")
        if self.unmatched:
            said.append(f"Not found in the data: {listed(self.unmatched)}.")
        if self.mended:
            said.append("Names mended: " + listed([f"{old} to {new}" for old, new in self.mended.items()]) + ".")
        if self.clipped:
            said.append(f"Factors above {MAX_FACTOR:g} were lowered to {MAX_FACTOR:g}: {listed(self.clipped)}.")
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
    top: only that many of the matched genes, the strongest by |log2 fold change|, earlier ones first among equals; by
        default the signature's own ``top``.

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
    dose = checked_dose(dose)
    _check_top(top)
    top = signature.top if top is None else top
    names = list(cells_genes)
    matches = _match_all(signature.genes, names)
    found = [i for i, (gene, _) in enumerate(matches) if gene]
    if not found:
        raise BadInput(
            f"None of the {len(signature.genes)} genes of {signature.name!r} ({listed(signature.genes[:3])}) is among "
            f"the {len(names)} of the data ({listed(names[:3])}): give both the same kind of gene names."
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


def checked_dose(dose: float) -> float:
    try:
        number = math.nan if isinstance(dose, bool) else float(dose)
    except (TypeError, ValueError):
        number = math.nan
    if not abs(number) <= MAX_DOSE:
        raise BadInput(f"The dose is {dose!r}: choose a number from -{MAX_DOSE:g} to {MAX_DOSE:g}.")
    return number


def listed(names: Sequence[str], n: int = 5) -> str:
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
        raise BadInput(f"{path.name} has the columns {listed(list(rows), 8)}: give {', '.join(LIBRARY_COLUMNS)}.")
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
