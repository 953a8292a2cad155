"""The central types: frozen, shape, unit and finiteness checked once, at construction."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import scipy.sparse as sp

__all__ = ["NUCLEI_COLUMNS", "BadInput", "Cells", "Latent", "Niche", "NicheStats", "check_sha256", "check_text"]

NUCLEI_COLUMNS = ("x_um", "y_um", "area_um2", "cell_type", "probability")
"""Columns of every nuclei table. ``x_um`` runs right and ``y_um`` down from the picture's top left corner."""


class BadInput(ValueError):
    """The user's input cannot be used. The message is one sentence naming field, value and cure.

    The command line prints it and exits with 2; the app shows it as it is.
    """


_HALF_PAIR = re.compile(r"[\ud800-\udfff]")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_text(field: str, value: object) -> None:
    """Refuse what is no text, and half of a surrogate pair: JSON can spell it, but no file can hold it.

    Raises
    ------
    BadInput: such a value; the sentence begins with ``field``.
    """
    if not isinstance(value, str):
        raise BadInput(f"{field} is {value!r:.80}: give text.")
    if half := _HALF_PAIR.search(value):
        near = ascii(value[max(0, half.start() - 20) : half.end() + 20])
        raise BadInput(f"{field} holds {near}: half of a surrogate pair is no text, leave it out.")


def check_sha256(field: str, value: object) -> None:
    """Refuse what is not the SHA-256 of something.

    Raises
    ------
    BadInput: not 64 hexadecimal digits in lower case; the sentence begins with ``field``.
    """
    if not (isinstance(value, str) and _SHA256.fullmatch(value)):
        raise BadInput(f"{field} is {value!r:.80}: give the 64 hexadecimal digits of a SHA-256.")


@dataclass(frozen=True, eq=False)
class Cells:
    """Raw expression of cells and what is known of each.

    Parameters
    ----------
    counts: ``[cell, gene]`` CSR float32, raw counts, >= 0.
    genes: ``[gene]`` symbols as given, unique is not required (scGPT takes each column as its own token).
    cell_id: ``[cell]`` unique names.
    cell_type, donor: ``[cell]`` strings or None where unknown.
    xy_um: ``[cell, 2]`` position in its section, um, or None.
    source: where the cells come from, for provenance.
    """

    counts: sp.csr_matrix
    genes: np.ndarray
    cell_id: np.ndarray
    cell_type: np.ndarray | None = None
    donor: np.ndarray | None = None
    xy_um: np.ndarray | None = None
    source: str = ""

    def __post_init__(self) -> None:
        counts = sp.csr_matrix(self.counts, dtype=np.float32)
        counts.sum_duplicates()
        counts.eliminate_zeros()
        n, g = counts.shape
        if not np.isfinite(counts.data).all():
            raise BadInput("The count matrix holds NaN or infinite values: give raw counts.")
        if counts.nnz and counts.data.min() < 0:
            raise BadInput(
                f"The count matrix holds negative values (minimum {counts.data.min():g}), as scaled data do: "
                "give raw counts."
            )
        for name, value, length in (
            ("genes", self.genes, g),
            ("cell_id", self.cell_id, n),
            ("cell_type", self.cell_type, n),
            ("donor", self.donor, n),
        ):
            if value is None:
                continue
            array = np.asarray(value).astype(str).astype(object)
            if array.shape != (length,):
                raise ValueError(f"{name} has shape {array.shape}, the counts need ({length},)")
            object.__setattr__(self, name, array)
        if len(set(self.cell_id)) != n:
            raise BadInput("Cell ids are not unique: make obs_names unique.")
        if self.xy_um is not None:
            xy = np.asarray(self.xy_um, dtype=np.float32)
            if xy.shape != (n, 2):
                raise ValueError(f"xy_um has shape {xy.shape}, expected ({n}, 2)")
            object.__setattr__(self, "xy_um", xy)
        object.__setattr__(self, "counts", counts)

    def __len__(self) -> int:
        return self.counts.shape[0]

    def take(self, rows: np.ndarray | list[int] | slice) -> Cells:
        """The chosen cells, in the given order."""
        if not isinstance(rows, slice):
            rows = np.asarray(rows)

        def pick(value: np.ndarray | None) -> np.ndarray | None:
            return None if value is None else value[rows]

        return replace(
            self,
            counts=self.counts[rows],
            cell_id=self.cell_id[rows],
            cell_type=pick(self.cell_type),
            donor=pick(self.donor),
            xy_um=pick(self.xy_um),
        )

    def scale_genes(self, factors: Mapping[str, float]) -> Cells:
        """The same cells with the counts of each named gene multiplied by its factor (0: knocked out).

        Raises
        ------
        BadInput: a gene that these cells do not have.
        """
        unknown = [gene for gene in factors if gene not in set(self.genes)]
        if unknown:
            raise BadInput(f"Gene {unknown[0]!r} is not among the {len(self.genes)} genes of these cells.")
        column = np.array([factors.get(gene, 1.0) for gene in self.genes], dtype=np.float32)
        return self.with_counts(self.counts @ sp.diags_array(column, format="csr"))

    def with_counts(self, counts: sp.spmatrix) -> Cells:
        """The same cells with other counts (an edit)."""
        return replace(self, counts=sp.csr_matrix(counts))


@dataclass(frozen=True, eq=False)
class Latent:
    """State of cells: ``z_c [cell, d_c]`` identity and ``z_e [cell, d_e]`` microenvironment, float32."""

    z_c: np.ndarray
    z_e: np.ndarray

    def __post_init__(self) -> None:
        for name in ("z_c", "z_e"):
            value = np.asarray(getattr(self, name), dtype=np.float32)
            if value.ndim != 2 or not np.isfinite(value).all():
                raise ValueError(f"{name} must be a finite [cell, dimension] array, got shape {value.shape}")
            object.__setattr__(self, name, value)
        if len(self.z_c) != len(self.z_e):
            raise ValueError(f"z_c has {len(self.z_c)} cells, z_e {len(self.z_e)}")

    def __len__(self) -> int:
        return len(self.z_c)

    @property
    def z_s(self) -> np.ndarray:
        """``[cell, d_c + d_e]``: the whole state, z_c first."""
        return np.concatenate([self.z_c, self.z_e], axis=1)

    def take(self, rows: np.ndarray | list[int] | slice) -> Latent:
        return Latent(self.z_c[rows], self.z_e[rows])


@dataclass(frozen=True, eq=False)
class Niche:
    """One picture of a cell's niche: ``image`` uint8 ``[H, W, 3]`` RGB, the cell in its centre."""

    image: np.ndarray
    um_per_px: float
    seed: int | None = None
    generated: bool = False

    def __post_init__(self) -> None:
        if self.image.dtype != np.uint8 or self.image.ndim != 3 or self.image.shape[2] != 3:
            raise ValueError(f"image must be uint8 [H, W, 3], got {self.image.dtype} {self.image.shape}")
        if not self.um_per_px > 0:
            raise ValueError(f"um_per_px must be > 0, got {self.um_per_px}")

    @property
    def area_mm2(self) -> float:
        height, width = self.image.shape[:2]
        return height * width * self.um_per_px**2 / 1e6


@dataclass(frozen=True, eq=False)
class NicheStats:
    """Statistics of one tile.

    Parameters
    ----------
    per_type: index = cell type; columns ``n``, ``density_per_mm2``, ``fraction``, ``spacing_um`` (mean distance to
        the nearest neighbour of the same type). NaN, not 0, where undefined.
    n: number of nuclei whose centre lies in the tile.
    density_per_mm2: all nuclei.
    spacing_um, spacing_var_um2: mean and variance of the distance to the nearest neighbour of any type,
        edge-corrected; NaN with fewer than two nuclei.
    area_mm2: area of the tile.
    """

    per_type: pd.DataFrame
    n: int
    density_per_mm2: float
    spacing_um: float
    spacing_var_um2: float
    area_mm2: float

    def readouts(self) -> dict[str, float]:
        """``name -> value``: ``density``, ``spacing``, ``spacing_var``, ``density:<type>``, ``fraction:<type>``."""
        out = {"density": self.density_per_mm2, "spacing": self.spacing_um, "spacing_var": self.spacing_var_um2}
        for name, row in self.per_type.iterrows():
            out[f"density:{name}"] = float(row["density_per_mm2"])
            out[f"fraction:{name}"] = float(row["fraction"])
        return out

    def steps(self) -> dict[str, float]:
        """What one nucleus more or less makes of each of :meth:`readouts`, in its unit; 0 in a tile without nuclei.

        One nucleus per area for a density, ``1 / n`` for a share, the ``n``-th part of a spacing or its variance.
        """
        one = 1.0 / self.n if self.n else 0.0
        sizes = {"density": 1.0 / self.area_mm2, "fraction": one}
        for name, value in (("spacing", self.spacing_um), ("spacing_var", self.spacing_var_um2)):
            sizes[name] = one * value if value > 0 else 0.0  # NaN, too
        return {name: sizes[name.partition(":")[0]] for name in self.readouts()}
