"""Which signature, and how its file is read: the same choices for every command and for the app."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from ge2hist_core.types import BadInput
from perturb.edits import nearest_genes
from perturb.signature_files import Z_CUTOFF, read_signatures
from perturb.signatures import Signature, directions, load_library

__all__ = ["LOG_BASES", "Reading", "add_reading", "file_signatures", "find_signature"]

LOG_BASES = {"2": 2.0, "e": math.e, "10": 10.0}
"""Bases of the logarithm that fold changes come in; Seurat before version 4 wrote natural logarithms."""


@dataclass(frozen=True)
class Reading:
    """How a signature file is read; None leaves a choice to :func:`perturb.signature_files.read_signatures`.

    Parameters
    ----------
    padj_below, base, z_cutoff, z_scale: as there.
    top: act only on that many of a signature's genes, the strongest of those that the data have.
    direction_only: use the signs of fold changes alone.
    """

    padj_below: float | None = None
    top: int | None = None
    base: float | None = None
    z_cutoff: float | None = None
    z_scale: float | None = None
    direction_only: bool = False

    def read(self, path: str | Path) -> list[Signature]:
        """The signatures of a file, at least one.

        Raises
        ------
        BadInput: as ``read_signatures``; a choice for which the file has nothing, such as a limit of adjusted p-values
            where it gives none.
        """
        given = {name: getattr(self, name) for name in ("padj_below", "base", "z_cutoff", "z_scale")}
        found = read_signatures(path, **{name: value for name, value in given.items() if value is not None})
        kinds, name = {signature.kind for signature in found}, Path(path).name
        if self.padj_below is not None and all(signature.padj is None for signature in found):
            raise BadInput(f"{name} gives no adjusted p-values: set no limit for them.")
        if self.base is not None and self.base != 2 and "differential expression" not in kinds:
            raise BadInput(f"{name} holds no fold changes: state no base of the logarithm.")
        if (self.z_cutoff is not None or self.z_scale is not None) and "z-scores" not in kinds:
            raise BadInput(f"{name} holds no z-scores: leave their cutoff and scale out.")
        if self.direction_only:
            found = [signed for signature in found if (signed := directions(signature)) is not None]
            if not found:
                raise BadInput(f"{name} has no gene that changes: choose another file.")
        return found if self.top is None else [replace(signature, top=self.top) for signature in found]


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Options that say how ``--signature-file`` is read."""
    how = parser.add_argument_group("how --signature-file is read")
    how.add_argument("--padj-below", type=float, metavar="P", help="only genes with a smaller adjusted p-value")
    how.add_argument("--top", type=int, metavar="N", help="only the N strongest genes that the cells' file has")
    how.add_argument(
        "--log-base", choices=list(LOG_BASES), help="of the fold changes (default: 2; Seurat before 4 wrote e)"
    )
    how.add_argument("--z-cutoff", type=float, metavar="Z", help=f"least |z| of a gene (default: {Z_CUTOFF:g})")
    how.add_argument("--z-scale", type=float, metavar="S", help="log2 fold change per unit of z (default: signs alone)")
    how.add_argument("--direction-only", action="store_true", help="use the signs of fold changes alone")


def _reading(args: argparse.Namespace) -> Reading:
    base = None if args.log_base is None else LOG_BASES[args.log_base]
    return Reading(args.padj_below, args.top, base, args.z_cutoff, args.z_scale, args.direction_only)


def file_signatures(args: argparse.Namespace) -> Sequence[Signature] | None:
    """The signatures of ``--signature-file``, read as the options say; None where no file is given.

    Raises
    ------
    BadInput: a file that cannot be read, or options that say how and no file.
    """
    reading = _reading(args)
    if args.signature_file is not None:
        return reading.read(args.signature_file)
    for field in fields(Reading):
        if getattr(reading, field.name) != field.default:
            option = "--log-base" if field.name == "base" else f"--{field.name.replace('_', '-')}"
            raise BadInput(f"{option} says how a signature file is read: give --signature-file too, or leave it out.")
    return None


def find_signature(name: str, path: str | None, read: Sequence[Signature] | None) -> Signature:
    """A signature of the library, or of a file where one was read.

    Parameters
    ----------
    path, read: ``--signature-file`` and its :func:`file_signatures`.

    Raises
    ------
    BadInput: no such signature.
    """
    known = {signature.name: signature for signature in (load_library() if read is None else read)}
    if name not in known:
        near = nearest_genes(name, known)
        where = "the library" if read is None else path
        cure = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(list(known)[:3])} and others."
        raise BadInput(f"There is no signature {name!r} in {where}: {cure}")
    return known[name]
