"""``python -m ge2hist_core encode CELLS.h5ad --bundle BUNDLE --out OUT.h5ad``: what a bundle makes of one's cells.

The copy holds ``obsm["X_scGPT"]``, ``obsm["X_z_c"]``, ``obsm["X_z_e"]`` and in ``obs`` the type that the bundle's
classifier reads (``ge2hist_type``, ``ge2hist_type_probability``) and the conformal p-value of the support check
(``ge2hist_support_p``; small: unlike the cells that the bundle was trained on). Cells without any known gene get NaN.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ge2hist_core.support import OUTSIDE
from ge2hist_core.types import BadInput, Latent

if TYPE_CHECKING:
    from ge2hist_core.data import H5adSource
    from ge2hist_core.model import GE2Hist

__all__ = ["Encoded", "agreement", "encode_cells", "read_type_map"]

BLOCK = 2048


class Encoded:
    """Arrays over the cells of a file; rows of cells without any known gene are NaN.

    Parameters
    ----------
    embedding: ``[cell, embedding_dim]``. z_c, z_e: ``[cell, d]``. probability: ``[cell, type]``. support: ``[cell]``.
    """

    def __init__(self, model: GE2Hist, n: int) -> None:
        sizes = (model.config.embedding_dim, model.config.d_c, model.config.d_e, len(model.cell_types))
        self.embedding, self.z_c, self.z_e, self.probability = (np.full((n, d), np.nan, np.float32) for d in sizes)
        self.support = np.full(n, np.nan, np.float32)
        self._types = np.array(model.cell_types, dtype=object)

    @property
    def known(self) -> np.ndarray:
        """bool ``[cell]``: the encoder knows a gene of the cell."""
        return np.isfinite(self.probability[:, 0])

    @property
    def cell_type(self) -> np.ndarray:
        """``[cell]`` the most probable type, "" for cells without any known gene."""
        best = self._types[np.nan_to_num(self.probability).argmax(axis=1)]
        return np.where(self.known, best, "")


def encode_cells(model: GE2Hist, source: H5adSource, seed: int = 0) -> Encoded:
    """Embedding, state, type and support of every cell of an open file, read in blocks."""
    from tqdm import tqdm

    out = Encoded(model, len(source))
    with tqdm(total=len(source), unit="cell", desc="encode") as bar:
        for start in range(0, len(source), BLOCK):
            rows = np.arange(start, min(start + BLOCK, len(source)))
            cells = source.take(rows, allow_empty=True)
            out.embedding[rows] = model.scgpt.embed(cells, seed, on_empty="nan", on_cells=bar.update)
            rows = rows[np.isfinite(out.embedding[rows, 0])]
            latent: Latent = model.encode(out.embedding[rows])
            out.z_c[rows], out.z_e[rows] = latent.z_c, latent.z_e
            out.probability[rows] = model.classify(latent)
            if model.support is not None and len(rows):
                out.support[rows] = model.support.p(out.embedding[rows])
    return out


def read_type_map(path: str | Path, model_types: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """CSV with the columns ``given`` and ``model``: a file's type -> the model's types that count as right.

    Several of the model's types are separated by ``|``; an empty field leaves the given type out.

    Raises
    ------
    BadInput: no such file, other columns, a type that the model does not have.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as handle:
            rows = list(csv.DictReader(handle))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"Cannot read the table of types {path}: {error}.") from None
    if not rows or not {"given", "model"} <= set(rows[0]):
        raise BadInput(f"{path} must have the columns given,model and at least one row.")
    mapping = {}
    for row in rows:
        names = tuple(name.strip() for name in (row["model"] or "").split("|") if name.strip())
        unknown = sorted(set(names) - set(model_types))
        if unknown:
            raise BadInput(f"{path} maps to {unknown[0]!r}, the model's types are {', '.join(model_types)}.")
        mapping[(row["given"] or "").strip()] = names
    return mapping


def agreement(
    given: np.ndarray, read: np.ndarray, mapping: Mapping[str, tuple[str, ...]] | None = None
) -> pd.DataFrame:
    """How often the model's type is the one given: index = given type, columns ``n, right, recall, mostly``.

    Parameters
    ----------
    given, read: ``[cell]`` types of the file and of the model; cells with "" are left out.
    mapping: as :func:`read_type_map` gives it; without one equal names are right. Types that it lacks, or that it maps
        to nothing, have no recall.

    Examples
    --------
    >>> given, read = np.array(["T", "T", "B"]), np.array(["CD8 T cell", "B cell", "B cell"])
    >>> agreement(given, read, {"T": ("CD8 T cell",)}).loc["T", "recall"].item()
    0.5
    """
    rows = {}
    for name in dict.fromkeys(given[given != ""]):
        found = read[(given == name) & (read != "")]
        names = (name,) if mapping is None else mapping.get(name, ())
        right = int(np.isin(found, names).sum())
        rows[name] = {
            "n": len(found),
            "right": right,
            "recall": right / len(found) if names and len(found) else np.nan,
            "mostly": pd.Series(found).mode().iloc[0] if len(found) else "",
        }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["n", "right", "recall", "mostly"]).sort_index()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cells", type=Path, metavar="CELLS.h5ad", help="raw counts")
    parser.add_argument("--bundle", type=Path, required=True, metavar="BUNDLE")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT.h5ad")
    parser.add_argument("--types", type=Path, metavar="MAP.csv", help="columns given,model: which types count as right")
    parser.add_argument("--seed", type=int, default=0, help="of ties in the encoder")


def main(args: argparse.Namespace) -> None:
    from ge2hist_core.data import annotate_h5ad, open_h5ad
    from ge2hist_core.model import GE2Hist

    model = GE2Hist.load(args.bundle)
    mapping = None if args.types is None else read_type_map(args.types, model.cell_types)
    with open_h5ad(args.cells, model.scgpt.vocab) as source:
        match = model.scgpt.match(source.genes)
        print(f"{match.matched} of {match.total} genes known, names from {source.preview.gene_column}")
        for warning in source.preview.warnings:
            print(f"note: {warning}")
        encoded = encode_cells(model, source, args.seed)
        given = source.cell_type
    known = encoded.known
    if model.support is not None:
        outside = (encoded.support[known] < OUTSIDE).mean()
        print(f"{outside:.1%} of {known.sum()} cells lie outside the training data (support p < {OUTSIDE})")
    if given is not None:
        table = agreement(given, encoded.cell_type, mapping)
        print(table.to_string(float_format="{:.3f}".format))
        judged = table[table["recall"].notna()]
        if len(judged):
            right, n = judged["right"].sum(), judged["n"].sum()
            print(f"accuracy {right / n:.4f} of {n} cells; mean recall over {len(judged)} types "
                  f"{judged['recall'].mean():.4f}")  # fmt: skip
    annotate_h5ad(
        args.cells,
        args.out,
        obs={
            "ge2hist_type": encoded.cell_type.astype(str),
            "ge2hist_type_probability": encoded.probability.max(axis=1),
            "ge2hist_support_p": encoded.support,
        },
        obsm={"X_scGPT": encoded.embedding, "X_z_c": encoded.z_c, "X_z_e": encoded.z_e},
        uns={"ge2hist": {"bundle_sha256": model.sha256, "scgpt_sha256": model.scgpt.sha256, "seed": args.seed}},
    )
