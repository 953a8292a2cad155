"""Edits of raw counts: knock-out, a graded factor, a set count, and ordered combinations of them.

The text form is ``GENE:ko``, ``GENE:x0.5`` (half the count), ``GENE:set=3`` (three counts, also for a gene that the
cell does not express), joined by commas; the order is kept. scGPT sees the rank of a count within its cell, so counts
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

from ge2hist_core.types import BadInput, Cells

__all__ = ["MAX_COUNT", "MAX_FACTOR", "Edit", "Perturbation", "nearest_genes"]

MAX_FACTOR = 4.0
"""400 %, the top of the slider."""

MAX_COUNT = 1e6
"""More than any cell holds; keeps a typing error from becoming infinite in float32."""

_RESERVED = re.compile(r"[%,:\s]")


@dataclass(frozen=True)
class Edit:
    """One gene's change.

    Parameters
    ----------
    gene: name as in ``Cells.genes``.
    kind: ``"ko"`` (count 0), ``"factor"`` (count times ``amount``) or ``"set"`` (count becomes ``amount``).
    amount: factor in [0, 4] or count in [0, 1e6]; 0 for a knock-out.

    Raises
    ------
    BadInput: no gene, an unknown kind, an amount out of range.

    Examples
    --------
    >>> str(Edit("CD8A", "ko")), str(Edit("VEGFA", "factor", 0.5)), str(Edit("TGFB1", "set", 3))
    ('CD8A:ko', 'VEGFA:x0.5', 'TGFB1:set=3')
    """

    gene: str
    kind: str
    amount: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.gene, str) or not self.gene.strip():
            raise BadInput("An edit names no gene: write GENE:ko, GENE:x0.5 or GENE:set=3.")
        limits = {"ko": 0.0, "factor": MAX_FACTOR, "set": MAX_COUNT}
        if self.kind not in limits:
            raise BadInput(f"The edit of {self.gene} has kind {self.kind!r}: choose ko, factor or set.")
        try:
            amount = float(self.amount)
        except (TypeError, ValueError):
            amount = math.nan
        if not 0 <= amount <= limits[self.kind]:
            raise BadInput(
                f"The edit of {self.gene} has amount {self.amount!r}: "
                f"for {self.kind} choose a number from 0 to {limits[self.kind]:g}."
            )
        object.__setattr__(self, "amount", amount + 0.0)  # -0.0 -> 0.0, so that equal edits print alike

    def __str__(self) -> str:
        gene = _RESERVED.sub(lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), self.gene)
        number = repr(self.amount).removesuffix(".0")
        return gene + ":" + {"ko": "ko", "factor": f"x{number}", "set": f"set={number}"}[self.kind]

    @classmethod
    def parse(cls, text: str) -> Edit:
        """Inverse of ``str``.

        Raises
        ------
        BadInput: text of another form.
        """
        gene, _, action = text.strip().rpartition(":")
        for prefix, kind in (("set=", "set"), ("x", "factor")):
            if action.startswith(prefix):
                try:
                    return cls(unquote(gene), kind, float(action.removeprefix(prefix)))
                except BadInput:
                    raise
                except ValueError:
                    break
        if action == "ko":
            return cls(unquote(gene), "ko")
        raise BadInput(f"Cannot read the edit {text.strip()!r}: write GENE:ko, GENE:x0.5 or GENE:set=3.")

    def apply(self, counts: np.ndarray) -> np.ndarray:
        """Counts of this gene, any shape, after the edit."""
        if self.kind == "factor":
            return counts * np.asarray(self.amount, counts.dtype)
        return np.full_like(counts, self.amount)


@dataclass(frozen=True)
class Perturbation:
    """Edits in the order in which they act. Empty: nothing is changed.

    Examples
    --------
    >>> p = Perturbation.parse("CD8A:ko,VEGFA:x0.5")
    >>> str(p), Perturbation.parse(str(p)) == p, p.genes
    ('CD8A:ko,VEGFA:x0.5', True, ('CD8A', 'VEGFA'))
    """

    edits: tuple[Edit, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", tuple(self.edits))

    def __bool__(self) -> bool:
        return bool(self.edits)

    def __str__(self) -> str:
        return ",".join(map(str, self.edits))

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
        return cls(tuple(Edit.parse(part) for part in text.split(",")) if text.strip() else ())

    def apply(self, cells: Cells) -> Cells:
        """The same cells with edited counts. Every column that bears an edited gene's name is edited.

        Raises
        ------
        BadInput: a gene that ``cells`` does not have; the message names the nearest ones.
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
            edited[edit.gene] = edit.apply(edited[edit.gene])
        counts = counts.tolil()
        for gene, where in columns.items():
            counts[:, where] = edited[gene]
        return cells.with_counts(counts.tocsr())


def nearest_genes(gene: str, genes: Iterable[str], n: int = 3) -> list[str]:
    """At most ``n`` names that look like ``gene``, the same name in other letter case first.

    Examples
    --------
    >>> nearest_genes("cd8a", ["CD8A", "CD8B", "VEGFA"])
    ['CD8A', 'CD8B']
    """
    by_upper = {name.upper(): name for name in genes}
    return [by_upper[key] for key in difflib.get_close_matches(gene.upper(), list(by_upper), n=n, cutoff=0.6)]
