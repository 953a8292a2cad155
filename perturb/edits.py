"""Edits of raw counts: knock-out, a graded factor, a set count, a set percentile, and ordered combinations of them.

The text form is ``GENE:ko``, ``GENE:x0.5`` (half the count), ``GENE:set=3`` (three counts, also for a gene that the
cell does not express), ``GENE:p90`` (the 90th percentile of the gene among cells of the cell's type), joined by commas;
the order is kept. Edits that belong together, those of a drug signature at a dose or of a gene set, are written
``NAME@DOSE(GENE:x2;GENE:x0.5)`` or ``NAME(GENE:ko;GENE:ko)``. scGPT sees the rank of a count within its cell, so counts
need not stay whole numbers and are never re-normalised.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote

import numpy as np

from ge2hist_core.types import BadInput, Cells, check_text

__all__ = ["MAX_COUNT", "MAX_FACTOR", "MIN_REFERENCE", "Edit", "EditSet", "Perturbation", "nearest_genes"]

MAX_FACTOR = 4.0
"""400 %, the top of the slider."""

MAX_COUNT = 1e6
"""More than any cell holds; keeps a typing error from becoming infinite in float32."""

MIN_REFERENCE = 20
"""Cells of a type from which a percentile within the type is stated or used."""

FORMS = "GENE:ko, GENE:x0.5, GENE:set=3 or GENE:p90"

_LIMITS = {"ko": 0.0, "factor": MAX_FACTOR, "set": MAX_COUNT, "percentile": 100.0}
_FORM = {"ko": "ko", "factor": "x{}", "set": "set={}", "percentile": "p{}"}

_RESERVED = re.compile(r"[%,;:@()\s]")


@dataclass(frozen=True)
class Edit:
    """One gene's change.

    Parameters
    ----------
    gene: name as in ``Cells.genes``.
    kind: ``"ko"`` (count 0), ``"factor"`` (count times ``amount``), ``"set"`` (count becomes ``amount``) or
        ``"percentile"`` (count becomes this percentile of the gene among cells of the cell's type).
    amount: factor in [0, 4], count in [0, 1e6] or percentile in [0, 100]; 0 for a knock-out.

    Raises
    ------
    BadInput: no gene, an unknown kind, an amount out of range.

    Examples
    --------
    >>> str(Edit("CD8A", "ko")), str(Edit("VEGFA", "factor", 0.5)), str(Edit("TGFB1", "set", 3))
    ('CD8A:ko', 'VEGFA:x0.5', 'TGFB1:set=3')
    >>> str(Edit("MYC", "percentile", 90))
    'MYC:p90'
    """

    gene: str
    kind: str
    amount: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.gene, str) or not self.gene.strip():
            raise BadInput(f"An edit names no gene: write {FORMS}.")
        check_text("The gene of an edit", self.gene)
        if self.kind not in _LIMITS:
            raise BadInput(f"The edit of {self.gene} has kind {self.kind!r}: choose {', '.join(_LIMITS)}.")
        amount = _as_float(self.amount)
        if not 0 <= amount <= _LIMITS[self.kind]:
            raise BadInput(
                f"The edit of {self.gene} has amount {self.amount!r:.40}: "
                f"for {self.kind} choose a number from 0 to {_LIMITS[self.kind]:g}."
            )
        object.__setattr__(self, "amount", amount + 0.0)  # -0.0 -> 0.0, so that equal edits print alike

    def __str__(self) -> str:
        return _quote(self.gene) + ":" + _FORM[self.kind].format(repr(self.amount).removesuffix(".0"))

    @classmethod
    def parse(cls, text: str) -> Edit:
        """Inverse of ``str``.

        Raises
        ------
        BadInput: text of another form.
        """
        gene, _, action = text.strip().rpartition(":")
        for prefix, kind in (("set=", "set"), ("x", "factor"), ("p", "percentile")):
            if action.startswith(prefix):
                try:
                    return cls(unquote(gene), kind, float(action.removeprefix(prefix)))
                except BadInput:
                    raise
                except ValueError:
                    break
        if action == "ko":
            return cls(unquote(gene), "ko")
        raise BadInput(f"Cannot read the edit {text.strip()!r}: write {FORMS}.")

    def apply(self, counts: np.ndarray, level: np.ndarray | None = None) -> np.ndarray:
        """Counts of this gene ``[cell, column]`` after the edit; ``level [cell]`` is what a percentile means there."""
        if self.kind == "factor":
            return counts * np.asarray(self.amount, counts.dtype)
        if self.kind == "percentile":
            if level is None:
                raise ValueError("an edit to a percentile needs the level of each cell's type")
            return np.broadcast_to(np.asarray(level, counts.dtype)[:, None], counts.shape).copy()
        return np.full_like(counts, self.amount)


def _as_float(value: object) -> float:
    """NaN for what is no number, or a whole number beyond the largest float."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _quote(name: str) -> str:
    return _RESERVED.sub(lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), name)


@dataclass(frozen=True)
class EditSet:
    """Edits that belong together under one name: a signature at a dose, or a gene set.

    Parameters
    ----------
    name: of the signature or set. edits: what it does to each gene; these alone decide the result.
    dose: of a signature, in its own unit; None for a gene set.

    Raises
    ------
    BadInput: no name, no edit, a dose that is not finite.

    Examples
    --------
    >>> s = EditSet("IFN gamma", (Edit("STAT1", "factor", 2), Edit("MYC", "ko")), 1.5)
    >>> str(s), EditSet.parse(str(s)) == s
    ('IFN%20gamma@1.5(STAT1:x2;MYC:ko)', True)
    """

    name: str
    edits: tuple[Edit, ...]
    dose: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", tuple(self.edits))
        if not isinstance(self.name, str) or not self.name.strip():
            raise BadInput("A set of edits has no name: write NAME(GENE:x2;GENE:ko).")
        check_text("The name of a set of edits", self.name)
        if not self.edits or not all(isinstance(edit, Edit) for edit in self.edits):
            raise BadInput(f"The set {self.name} holds no edit: write NAME(GENE:x2;GENE:ko).")
        if self.dose is not None:
            number = isinstance(self.dose, int | float) and not isinstance(self.dose, bool)
            if not number or not math.isfinite(_as_float(self.dose)):
                raise BadInput(f"The dose of {self.name} is {self.dose!r:.40}: give a number.")
            object.__setattr__(self, "dose", float(self.dose) + 0.0)

    def __str__(self) -> str:
        dose = "" if self.dose is None else "@" + repr(self.dose).removesuffix(".0")
        return f"{_quote(self.name)}{dose}({';'.join(map(str, self.edits))})"

    @classmethod
    def parse(cls, text: str) -> EditSet:
        """Inverse of ``str``.

        Raises
        ------
        BadInput: text of another form.
        """
        head, bracket, inside = text.strip().partition("(")
        name, at, dose = head.partition("@")
        if not bracket or not inside.endswith(")"):
            raise BadInput(f"Cannot read the set {text.strip()!r}: write NAME@DOSE(GENE:x2;GENE:ko).")
        try:
            number = float(dose) if at else None
        except ValueError:
            raise BadInput(f"The dose of {unquote(name)} is {dose!r}: give a number.") from None
        return cls(unquote(name), tuple(Edit.parse(part) for part in inside[:-1].split(";")), number)


@dataclass(frozen=True)
class Perturbation:
    """Edits and sets of edits in the order in which they act. Empty: nothing is changed.

    Examples
    --------
    >>> p = Perturbation.parse("CD8A:ko,VEGFA:x0.5")
    >>> str(p), Perturbation.parse(str(p)) == p, p.genes
    ('CD8A:ko,VEGFA:x0.5', True, ('CD8A', 'VEGFA'))
    """

    parts: tuple[Edit | EditSet, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))

    def __bool__(self) -> bool:
        return bool(self.parts)

    def __str__(self) -> str:
        return ",".join(map(str, self.parts))

    @property
    def edits(self) -> tuple[Edit, ...]:
        """All edits one by one, those of sets in their place."""
        return tuple(edit for part in self.parts for edit in (part.edits if isinstance(part, EditSet) else (part,)))

    @property
    def genes(self) -> tuple[str, ...]:
        """Edited genes, each once, in the order of their first edit."""
        return tuple(dict.fromkeys(edit.gene for edit in self.edits))

    @classmethod
    def parse(cls, text: str) -> Perturbation:
        """``"CD8A:ko,VEGFA:x0.5"`` -> Perturbation; blank text is the empty one.

        Raises
        ------
        BadInput: an edit of another form.
        """
        if not text.strip():
            return cls()
        return cls(tuple((EditSet if "(" in part else Edit).parse(part) for part in text.split(",")))

    def apply(self, cells: Cells, reference: Cells | None = None) -> Cells:
        """The same cells with edited counts. Every column that bears an edited gene's name is edited.

        Parameters
        ----------
        reference: cells of the same genes that percentiles are taken of, by default ``cells`` themselves.

        Raises
        ------
        BadInput: a gene that ``cells`` does not have, the message names the nearest ones; a percentile in a type of
            fewer than 20 reference cells.
        """
        if not self.edits:
            return cells
        columns = {gene: np.flatnonzero(cells.genes == gene) for gene in self.genes}
        for gene, where in columns.items():
            if not len(where):
                near = nearest_genes(gene, cells.genes)
                cure = f"did you mean {' or '.join(near)}?" if near else "choose a gene of the data."
                raise BadInput(f"The data have no gene {gene!r}: {cure}")
        counts = cells.counts.tocsc(copy=True)
        edited = {gene: counts[:, where].toarray() for gene, where in columns.items()}
        for edit in self.edits:
            level = _levels(edit, cells, cells if reference is None else reference)
            edited[edit.gene] = edit.apply(edited[edit.gene], level)
        counts = counts.tolil()
        for gene, where in columns.items():
            counts[:, where] = edited[gene]
        return cells.with_counts(counts.tocsr())


def _levels(edit: Edit, cells: Cells, reference: Cells) -> np.ndarray | None:
    """Count that an edit to a percentile means for each cell, ``[cell]``; None for other edits."""
    if edit.kind != "percentile":
        return None
    if cells.cell_type is None or reference.cell_type is None:
        cure = f"write {edit.gene}:x2 or {edit.gene}:set=3"
        raise BadInput(f"{edit} needs cell types, which the data do not give: {cure}.")
    column = np.flatnonzero(reference.genes == edit.gene)
    of_type = {}
    for name in dict.fromkeys(cells.cell_type):
        peers = np.flatnonzero(reference.cell_type == name)
        if len(peers) < MIN_REFERENCE:
            raise BadInput(
                f"{edit} is a percentile among {len(peers)} cells of type {name!r}, fewer than {MIN_REFERENCE}: "
                f"write {edit.gene}:x2 or {edit.gene}:set=3."
            )
        of_type[name] = float(np.percentile(reference.counts[peers][:, column].toarray().max(axis=1), edit.amount))
    return np.array([of_type[name] for name in cells.cell_type])


def nearest_genes(gene: str, genes: Iterable[str], n: int = 3) -> list[str]:
    """At most ``n`` names that look like ``gene``, the same name in other letter case first.

    Examples
    --------
    >>> nearest_genes("cd8a", ["CD8A", "CD8B", "VEGFA"])
    ['CD8A', 'CD8B']
    """
    by_upper = {name.upper(): name for name in genes}
    return [by_upper[key] for key in difflib.get_close_matches(gene.upper(), list(by_upper), n=n, cutoff=0.6)]
