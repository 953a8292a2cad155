"""Four gates: is a cell, edited or not, still inside the data that the model was trained on?

Each gate turns a cell into one number that grows with its strangeness and ranks it among cells of held-out donors, a
split-conformal p-value (:func:`ge2hist_core.support.conformal_p`). What a number is measured from (means, spreads,
directions) comes from training donors, what it is ranked among from validation donors alone.

- ``expression``: log expression of each gene against the cells of the same type, in standard deviations of that type.
  ``profile`` is the mean absolute deviation over all genes, ``range`` the largest over the edited genes, ranked among
  the held-out cells' deviations *of the same genes*. The gate is the smaller of both, times two.
- ``embedding``: distance to the nearest training cell, :class:`ge2hist_core.support.Support`.
- ``latent``: -log density of z_c in the mixture of all types and of z_e in one Gaussian; the gate is their sum, which
  is one number and needs no correction.
- ``picture``: real tiles, as the autoencoder gives them back (a generated picture passes the same decoder), in the
  space of the reader's pooled activations and of the stain's mean and spread: -log density of probabilistic principal
  components (Tipping and Bishop 1999, doi:10.1111/1467-9868.00196), up to constants.

All gates together: :func:`ge2hist_core.support.bonferroni`. They see the same cell and depend on each other, so that
the rate at which ordinary cells are called outside lies somewhat below the level.

``python -m ge2hist_core gates BUNDLE DATA.zarr`` fits them, measures the rate of alarms on the test donors, and writes
``gates.safetensors`` and ``gates.json`` into the bundle. A bundle without them has the embedding's gate alone.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from ge2hist_core import rng
from ge2hist_core.files import atomic_path, sha256_file, write_json
from ge2hist_core.support import OUTSIDE, bonferroni, conformal_p
from ge2hist_core.types import BadInput, Cells, Latent

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.store import TissueStore
    from ge2hist_core.vae import Mixture

__all__ = [
    "GATES",
    "ExpressionGate",
    "Gates",
    "LatentGate",
    "PictureGate",
    "alarm_rates",
    "exchange_genes",
    "fit_gates",
    "mixture_log_density",
    "picture_features",
    "several_pictures",
]

GATES = ("expression", "embedding", "latent", "picture")

SCHEMA = 1
SCALE = 1e4
"""Counts per cell after normalisation: log expression is log(1 + SCALE n / N)."""
MIN_GENES = 20
"""Genes that data and gate share, below which the gate does not answer."""
MAX_DEVIATION = 8.0
"""Standard deviations that one gene can add to the mean over all genes, so that no single gene is the whole profile."""
PRIOR_CELLS = 20
"""Weight, in cells, of the spread over all types in the spread within a type."""
LEAST_SPREAD = 0.05
LEVELS_PER_NAT = 20
COMPONENTS = 24

_FITTED_ON = ("vae.safetensors", "mixture.safetensors", "autoencoder.safetensors", "reader.safetensors")


def _levels(counts: np.ndarray) -> np.ndarray:
    """Counts as uint8, exact up to about 20, then in steps of 5 %; below 350,000."""
    return np.clip(np.rint(LEVELS_PER_NAT * np.log1p(counts)), 0, 255).astype(np.uint8)


def _counts(levels: np.ndarray) -> np.ndarray:
    return np.rint(np.expm1(levels.astype(np.float64) / LEVELS_PER_NAT))


def _log_expression(counts: np.ndarray, total: np.ndarray) -> np.ndarray:
    """``[cell, gene]`` log(1 + SCALE n / N), NaN for a cell whose total ``[cell]`` is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log1p(SCALE * counts / total[:, None])


@dataclass(frozen=True, eq=False)
class ExpressionGate:
    """What each type's cells express, and held-out cells to rank among.

    Parameters
    ----------
    genes: ``[gene]`` symbols. cell_types: ``[type]``.
    mean, spread: ``[type, gene]`` log expression of the training cells.
    levels: ``[calibration, gene]`` uint8, held-out cells' counts on a logarithmic scale.
    kind: ``[calibration]`` int, their type as the model reads it.
    """

    genes: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    levels: np.ndarray
    kind: np.ndarray

    @classmethod
    def fit(
        cls,
        reference: Cells,
        reference_kind: np.ndarray,
        n_types: int,
        calibration: Cells,
        calibration_kind: np.ndarray,
    ) -> ExpressionGate:
        """From training cells with their types ``[cell]`` and held-out cells of the same genes with theirs."""
        counts = reference.counts.toarray().astype(np.float64)
        x = _log_expression(counts, counts.sum(1))
        filled = np.isfinite(x[:, 0])
        x, reference_kind = x[filled], np.asarray(reference_kind)[filled]
        overall = x.mean(0)
        mean = np.tile(overall, (n_types, 1))
        n = np.bincount(reference_kind, minlength=n_types)
        for kind in np.flatnonzero(n):
            mean[kind] = x[reference_kind == kind].mean(0)
        within = np.square(x - mean[reference_kind])
        pooled = within.mean(0)
        variance = np.stack([within[reference_kind == k].sum(0) for k in range(n_types)])
        variance = (variance + PRIOR_CELLS * pooled) / (n + PRIOR_CELLS)[:, None]
        # A type without cells is compared with all cells.
        variance[n == 0] = x.var(0)
        spread = np.sqrt(variance + LEAST_SPREAD**2)
        return cls(
            reference.genes.astype(str),
            mean.astype(np.float32),
            spread.astype(np.float32),
            _levels(calibration.counts.toarray()),
            np.asarray(calibration_kind, dtype=np.uint8),
        )

    def panel(self, genes: np.ndarray) -> _Panel:
        """The gate for data of these genes; both sides are normalised over the genes in common."""
        return _Panel(self, np.asarray(genes).astype(str))


class _Panel:
    """An :class:`ExpressionGate` on the genes that some data share with it.

    Held-out cells and asked ones lose the same genes, so that the p-values hold for any panel; a small one only makes
    them less telling.
    """

    def __init__(self, gate: ExpressionGate, genes: np.ndarray) -> None:
        column = {gene: i for i, gene in enumerate(gate.genes)}
        pairs = [(i, column[gene]) for i, gene in enumerate(genes) if gene in column]
        self.columns = np.unique([j for _, j in pairs]).astype(int)
        place = {j: k for k, j in enumerate(self.columns)}
        rows, targets = [i for i, _ in pairs], [place[j] for _, j in pairs]
        shape = (len(genes), len(self.columns))
        self._choose = sp.csr_matrix((np.ones(len(pairs)), (rows, targets)), shape=shape)
        self.genes = gate.genes[self.columns]
        self._mean, self._spread = (value[:, self.columns].astype(np.float64) for value in (gate.mean, gate.spread))
        counts = _counts(gate.levels[:, self.columns])
        self.calibration = self._deviation(counts, counts.sum(1), gate.kind)

    def _deviation(self, counts: np.ndarray, total: np.ndarray, kind: np.ndarray) -> np.ndarray:
        """Signed deviation from the mean of the type in its standard deviations, ``[cell, gene]``."""
        return (_log_expression(counts, total) - self._mean[kind]) / self._spread[kind]

    def _counts(self, cells: Cells) -> np.ndarray:
        return np.asarray((cells.counts @ self._choose).toarray(), dtype=np.float64)

    def deviation(self, cells: Cells, kind: np.ndarray, unedited: Cells | None = None) -> np.ndarray:
        """Deviations of cells, ``[cell, gene]``; an edit is measured by the library size from before it.

        Otherwise one gene set to very many counts would move all others.
        """
        counts = self._counts(cells)
        before = counts if unedited is None else self._counts(unedited)
        return self._deviation(counts, before.sum(1), np.asarray(kind))

    def p(
        self, cells: Cells, kind: np.ndarray, edited: tuple[str, ...] = (), unedited: Cells | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """``profile [cell]`` and ``range [cell]``; NaN where there is nothing to compare, see :class:`Gates`."""
        profile = np.full(len(cells), np.nan)
        inside = profile.copy()
        if len(self.genes) < MIN_GENES:
            return profile, inside
        z = self.deviation(cells, kind, unedited)
        profile = conformal_p(_profile(z), _profile(self.calibration))
        genes = np.flatnonzero(np.isin(self.genes, edited))
        if len(genes):
            inside = conformal_p(np.abs(z[:, genes]).max(1), np.abs(self.calibration[:, genes]).max(1))
        return profile, inside


def _profile(z: np.ndarray) -> np.ndarray:
    return np.minimum(np.abs(z), MAX_DEVIATION).mean(axis=1)


def mixture_log_density(mixture: Mixture, z_c: np.ndarray) -> np.ndarray:
    """Log density of ``z_c [cell, d_c]`` when every type is as frequent as the others, ``[cell]`` in nats."""
    from scipy.linalg import solve_triangular
    from scipy.special import logsumexp

    z_c = np.asarray(z_c, dtype=np.float64)
    n_types, n_components, d = mixture.means.shape
    terms = []
    for t in range(n_types):
        for k in range(n_components):
            if mixture.weights[t, k] > 0:
                lower = mixture.cholesky[t, k].astype(np.float64)
                y = solve_triangular(lower, (z_c - mixture.means[t, k]).T, lower=True)
                log_norm = 0.5 * d * math.log(2 * math.pi) + np.log(np.diag(lower)).sum()
                terms.append(np.log(mixture.weights[t, k]) - 0.5 * np.square(y).sum(0) - log_norm)
    return logsumexp(terms, axis=0) - math.log(n_types)


@dataclass(frozen=True, eq=False)
class LatentGate:
    """Gaussian of z_e over training cells, and the scores of held-out cells.

    Parameters
    ----------
    mean: ``[d_e]``. cholesky: ``[d_e, d_e]`` lower triangular L with covariance L L^T.
    z_c, z_e: ``[calibration]`` negative log densities, nats, of the same cells in the same order.
    """

    mean: np.ndarray
    cholesky: np.ndarray
    z_c: np.ndarray
    z_e: np.ndarray

    @classmethod
    def fit(cls, mixture: Mixture, reference: Latent, calibration: Latent) -> LatentGate:
        """From states of training and of held-out cells."""
        z = reference.z_e.astype(np.float64)
        covariance = np.cov(z.T) + 1e-4 * np.eye(z.shape[1])
        nothing = np.empty(0, np.float32)
        bare = cls(z.mean(0).astype(np.float32), np.linalg.cholesky(covariance).astype(np.float32), nothing, nothing)
        z_c, z_e = bare.scores(mixture, calibration)
        return replace(bare, z_c=z_c.astype(np.float32), z_e=z_e.astype(np.float32))

    def scores(self, mixture: Mixture, latent: Latent) -> tuple[np.ndarray, np.ndarray]:
        """Negative log densities of z_c and z_e, each ``[cell]``."""
        from scipy.linalg import solve_triangular

        lower = self.cholesky.astype(np.float64)
        y = solve_triangular(lower, (latent.z_e.astype(np.float64) - self.mean).T, lower=True)
        log_norm = 0.5 * len(lower) * math.log(2 * math.pi) + np.log(np.diag(lower)).sum()
        return -mixture_log_density(mixture, latent.z_c), 0.5 * np.square(y).sum(0) + log_norm

    def p(self, mixture: Mixture, latent: Latent) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of z_c alone, of z_e alone, and of both together (the gate), each ``[cell]``."""
        z_c, z_e = self.scores(mixture, latent)
        own_c, own_e = self.z_c.astype(np.float64), self.z_e.astype(np.float64)
        return conformal_p(z_c, own_c), conformal_p(z_e, own_e), conformal_p(z_c + z_e, own_c + own_e)


def picture_features(model: GE2Hist, images: np.ndarray) -> np.ndarray:
    """What the nuclei reader and the stain say of pictures uint8 ``[n, H, W, 3]``, float64 ``[n, feature]``.

    Means over the picture of the reader's coarsest and finest activations, and mean and standard deviation of the
    optical density of red, green and blue.

    Raises
    ------
    BadInput: the bundle has no reader.
    """
    import torch
    from torch.nn import functional as F

    from ge2hist_core.config import UM_PER_PX
    from ge2hist_core.nuclei import to_input

    if model.reader is None:
        raise BadInput("This bundle has no nuclei reader: train one with `python -m ge2hist_core train-reader`.")
    net = model.reader.net
    device = next(net.parameters()).device
    rows = []
    for image in images:
        density = -np.log(np.maximum(image, 1) / 255.0).reshape(-1, 3)
        x = to_input(torch.from_numpy(np.ascontiguousarray(image[None])).to(device))
        if not math.isclose(model.config.um_per_px, UM_PER_PX):
            scale = model.config.um_per_px / UM_PER_PX
            x = F.interpolate(x, scale_factor=scale, mode="bilinear", antialias=True)
        height, width = x.shape[2:]
        with torch.inference_mode():
            fine = net.stem(F.pad(x, (0, -width % 8, 0, -height % 8), mode="replicate"))
            coarse = net.down2(net.down1(fine))
            pooled = [part.float().mean((2, 3))[0].cpu().numpy() for part in (coarse, fine)]
        rows.append(np.concatenate([*pooled, density.mean(0), density.std(0)]))
    return np.asarray(rows, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class PictureGate:
    """Principal components of real tiles' features, and the scores of held-out tiles.

    Parameters
    ----------
    mean, scale: ``[feature]``, to standardise.
    axes: ``[component, feature]`` orthonormal. variance: ``[component]`` along them, ``rest`` per remaining direction.
    calibration: ``[n]`` scores of held-out tiles.
    """

    mean: np.ndarray
    scale: np.ndarray
    axes: np.ndarray
    variance: np.ndarray
    rest: np.ndarray
    calibration: np.ndarray

    @classmethod
    def fit(cls, reference: np.ndarray, calibration: np.ndarray) -> PictureGate:
        """From features ``[tile, feature]`` of training and of held-out tiles."""
        mean, scale = reference.mean(0), np.maximum(reference.std(0), 1e-6)
        standard = (reference - mean) / scale
        _, singular, axes = np.linalg.svd(standard, full_matrices=False)
        spectrum = singular**2 / len(reference)
        k = min(COMPONENTS, len(spectrum) - 1)
        rest = max(spectrum[k:].sum() / max(1, reference.shape[1] - k), 1e-4)
        parts: tuple[Any, ...] = (mean, scale, axes[:k], np.maximum(spectrum[:k], rest), [rest], [])
        bare = cls(*[np.asarray(part, dtype=np.float32) for part in parts])
        return replace(bare, calibration=bare.score(calibration).astype(np.float32))

    def score(self, features: np.ndarray) -> np.ndarray:
        """Squared distance from the mean tile in standard deviations of each direction, ``[picture]``."""
        standard = (np.asarray(features, dtype=np.float64) - self.mean) / self.scale
        along = standard @ self.axes.T.astype(np.float64)
        left = np.maximum(np.square(standard).sum(1) - np.square(along).sum(1), 0.0)
        return (np.square(along) / self.variance).sum(1) + left / self.rest[0]

    def p(self, features: np.ndarray) -> np.ndarray:
        """``[picture, feature]`` -> ``[picture]``."""
        # Stored as float32: the asked score is rounded the same way.
        return conformal_p(self.score(features).astype(np.float32), self.calibration)


def several_pictures(p: np.ndarray) -> np.ndarray:
    """One p-value for several pictures of a cell, ``[cell, picture]`` -> ``[cell]``: twice the median, at most 1.

    Valid however the pictures depend on each other (Rueger 1978, doi:10.1007/BF01898000; Vovk and Wang 2020,
    doi:10.1093/biomet/asaa027). With an even number of pictures the larger of the two in the middle counts.
    """
    p = np.sort(np.asarray(p, dtype=np.float64), axis=1)
    n = p.shape[1]
    k = n // 2 + 1
    return np.minimum(1.0, p[:, k - 1] * n / k)


@dataclass(frozen=True, eq=False)
class Gates:
    """The three gates beside the model's own support; see the module.

    Parameters
    ----------
    picture: None for a bundle without a reader. latent: None for one without a mixture.
    provenance: store, donors, numbers of cells and tiles, and the alarm rates measured on the test donors.
    """

    expression: ExpressionGate
    latent: LatentGate | None
    picture: PictureGate | None
    provenance: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def _panels(self) -> dict[bytes, _Panel]:
        return {}

    def panel(self, genes: np.ndarray) -> _Panel:
        """:meth:`ExpressionGate.panel`, kept for the genes that were asked for last."""
        key = "\n".join(map(str, genes)).encode()
        if key not in self._panels:
            self._panels.clear()
            self._panels[key] = self.expression.panel(genes)
        return self._panels[key]

    def cell_p(
        self,
        model: GE2Hist,
        cells: Cells,
        embedding: np.ndarray,
        latent: Latent,
        kind: np.ndarray,
        *,
        edited: tuple[str, ...] = (),
        unedited: Cells | None = None,
    ) -> pd.DataFrame:
        """All that needs no picture.

        Parameters
        ----------
        embedding, latent: of ``cells``.
        kind: ``[cell]`` index among ``model.cell_types``, the type whose range counts: of an edited cell that of the
            unedited one.
        edited: genes that ``range`` looks at. unedited: the same cells before the edit.

        Returns
        -------
        One row per cell, conformal p-values: the gates ``expression``, ``embedding``, ``latent``, and what they are
        made of, ``profile``, ``range``, ``z_c``, ``z_e``. NaN: not answered (no such part in the bundle, no edited
        gene that the gate knows, fewer than 20 genes in common).
        """
        profile, inside = self.panel(cells.genes).p(cells, kind, edited, unedited)
        missing = np.full(len(cells), np.nan)
        z_c, z_e, both = missing, missing, missing
        if self.latent is not None and model.mixture is not None:
            z_c, z_e, both = self.latent.p(model.mixture, latent)
        return pd.DataFrame(
            {
                "expression": bonferroni(np.stack([profile, inside], axis=1)),
                "embedding": missing if model.support is None else model.support.p(embedding),
                "latent": both,
                "profile": profile,
                "range": inside,
                "z_c": z_c,
                "z_e": z_e,
            },
            index=pd.Index(cells.cell_id, name="cell_id"),
        )

    def picture_p(self, model: GE2Hist, images: np.ndarray) -> np.ndarray:
        """Conformal p-value of each picture, ``[picture]``; NaN where the bundle cannot say."""
        if self.picture is None or model.reader is None:
            return np.full(len(images), np.nan)
        return self.picture.p(picture_features(model, images))

    def save(self, folder: str | Path) -> None:
        """Write ``gates.safetensors``, then ``gates.json``, each atomically, into the bundle that they were fitted on.

        An earlier ``gates.json`` is removed first: a half-written pair does not open.
        """
        from safetensors.numpy import save_file

        folder = Path(folder)
        (folder / "gates.json").unlink(missing_ok=True)
        arrays: dict[str, np.ndarray] = {}
        for name in ("expression", "latent", "picture"):
            part = getattr(self, name)
            if part is not None:
                arrays |= {f"{name}.{key}": value for key, value in vars(part).items() if key != "genes"}
        with atomic_path(folder / "gates.safetensors") as temporary:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)
        header = {
            "schema": SCHEMA,
            "fitted_on": _fitted_on(folder),
            "genes": self.expression.genes.tolist(),
            "provenance": self.provenance,
        }
        write_json(folder / "gates.json", header)

    @classmethod
    def load(cls, folder: str | Path) -> Gates | None:
        """The gates of a bundle, None where it has none.

        Raises
        ------
        BadInput: a damaged file, another schema, or gates that were fitted before the bundle was trained further.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        folder = Path(folder)
        path = folder / "gates.json"
        if not path.is_file():
            return None
        cure = "run `python -m ge2hist_core gates` again"
        try:
            header = json.loads(path.read_text(encoding="utf-8"))
            if header["schema"] != SCHEMA:
                raise BadInput(f"{path} has schema {header['schema']!r}, this version reads {SCHEMA}: {cure}.")
            if header["fitted_on"] != _fitted_on(folder):
                raise BadInput(f"{path} was fitted on another training of this bundle: {cure}.")
            parts: dict[str, dict[str, np.ndarray]] = {"expression": {}, "latent": {}, "picture": {}}
            for name, array in load_file(folder / "gates.safetensors").items():
                part, _, key = name.partition(".")
                parts[part][key] = array
            genes = np.array(header["genes"], dtype=str)
            if parts["expression"]["mean"].shape[1] != len(genes):
                raise ValueError("the number of genes differs between both files")
            return cls(
                ExpressionGate(genes, **parts["expression"]),
                LatentGate(**parts["latent"]) if parts["latent"] else None,
                PictureGate(**parts["picture"]) if parts["picture"] else None,
                header["provenance"],
            )
        except BadInput:
            raise
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise BadInput(f"The gates in {folder} are damaged ({error}): {cure}.") from error


def _fitted_on(folder: Path) -> dict[str, str]:
    """SHA-256 of the bundle's files that the gates depend on."""
    paths = [folder / name for name in (*_FITTED_ON, "scgpt/best_model.pt")]
    return {path.name: sha256_file(path) for path in paths if path.is_file()}


# --- fitting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GateConfig:
    """How many cells and tiles the gates are fitted on.

    Parameters
    ----------
    reference_cells: training cells per type. calibration_cells: held-out cells. kept_cells: of these, how many are
        kept with their counts (677 bytes each for 677 genes). tiles: training tiles, and as many held-out ones.
    """

    reference_cells: int = 500
    calibration_cells: int = 2000
    kept_cells: int = 800
    tiles: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("reference_cells", "calibration_cells", "kept_cells", "tiles"):
            if getattr(self, name) < 20:
                raise BadInput(f"{name} is {getattr(self, name)}: give at least 20.")


def _some(rows: np.ndarray, n: int, seed: int, name: str) -> np.ndarray:
    return np.sort(rng.stream(seed, "gates", name).permutation(rows)[:n])


def _donors(model: GE2Hist, store: TissueStore) -> dict[str, list[str]]:
    """Donors that the model was trained on, that it was tuned on, and that it has not seen.

    Of a store that it does not know, those of the store's own split.
    """
    learned = model.has_learned_from(store, ("train",))
    if learned:
        tuned = model.has_learned_from(store) - learned
        donors = {"reference": learned, "calibration": tuned, "test": set(store.donors) - learned - tuned}
    else:
        split = store.split()
        names = {"reference": "train", "calibration": "validation", "test": "test"}
        donors = {part: set(split[name]) for part, name in names.items()}
    for part in ("reference", "calibration"):
        if not donors[part]:
            raise BadInput(
                f"{store.path} has no donor left for the gates' {part}: give the store that the bundle was trained on."
            )
    return {part: sorted(names) for part, names in donors.items()}


def _encoded(model: GE2Hist, cells: Cells, seed: int) -> tuple[Cells, np.ndarray, Latent, np.ndarray]:
    """Cells with a known gene, their embedding, state and type as read."""
    embedding = model.scgpt.embed(cells, seed, on_empty="nan")
    known = np.flatnonzero(np.isfinite(embedding[:, 0]))
    latent = model.encode(embedding[known])
    return cells.take(known), embedding[known], latent, model.classify(latent).argmax(1)


def _tile_features(model: GE2Hist, store: TissueStore, rows: np.ndarray) -> np.ndarray:
    parts = []
    for start in range(0, len(rows), 32):
        tiles = store.tiles(rows[start : start + 32])
        parts.append(picture_features(model, model.autoencoder.decode(model.autoencoder.encode(tiles))))
    return np.concatenate(parts)


def fit_gates(model: GE2Hist, store: TissueStore, config: GateConfig = GateConfig()) -> Gates:
    """Fit the gates on a store: parameters on training donors, ranks on validation donors.

    Raises
    ------
    BadInput: no donor left for a part, no type that model and store share, tiles of another resolution.
    """
    donors = _donors(model, store)
    index = {name: i for i, name in enumerate(model.cell_types)}
    kind = np.array([index.get(name, -1) for name in store.obs["cell_type"]])
    reference = store.rows(donors["reference"], interior=False)
    by_type = [reference[kind[reference] == i] for i in range(len(index))]
    rows = np.concatenate(
        [_some(part, config.reference_cells, config.seed, name) for part, name in zip(by_type, index, strict=True)]
    )
    if not len(rows):
        raise BadInput(
            f"{store.path} names no type that the bundle knows ({', '.join(model.cell_types)}): give its own store."
        )
    held_out = store.rows(donors["calibration"], interior=False)
    # In random order, so that the first ones are a random choice too.
    held_out = rng.stream(config.seed, "gates", "calibration").permutation(held_out)[: config.calibration_cells]
    calibration, _, latent, read = _encoded(model, store.cells.take(held_out), config.seed)
    kept = slice(config.kept_cells)
    expression = ExpressionGate.fit(store.cells.take(rows), kind[rows], len(index), calibration.take(kept), read[kept])
    n = {"reference_cells": len(rows), "expression": len(expression.kind), "latent": 0, "picture": 0}
    fitted_latent = fitted_picture = None
    if model.mixture is not None:
        if model.support is not None:
            embedding = model.support.reference
        else:
            embedding = _encoded(model, store.cells.take(_some(rows, 3000, config.seed, "latent")), config.seed)[1]
        fitted_latent = LatentGate.fit(model.mixture, model.encode(embedding), latent)
        n["latent"] = len(latent)
    if model.reader is not None:
        if not math.isclose(store.um_per_px, model.config.um_per_px):
            raise BadInput(
                f"{store.path} has {store.um_per_px:g} um per px, the bundle {model.config.um_per_px:g}: "
                "give a store of the bundle's resolution."
            )
        rows_of = {part: store.rows(donors[part]) for part in ("reference", "calibration")}
        if any(len(part) < 20 for part in rows_of.values()):
            raise BadInput(f"{store.path} has fewer than 20 whole tiles for the picture's gate: give larger sections.")
        features = [
            _tile_features(model, store, _some(part, config.tiles, config.seed, f"{name} tiles"))
            for name, part in rows_of.items()
        ]
        fitted_picture = PictureGate.fit(*features)
        n["picture"] = len(fitted_picture.calibration)
    if model.support is not None:
        n["embedding"] = len(model.support.calibration)
    provenance = {"store": store.identity, "data": store.path.name, "donors": donors, "n": n, "seed": config.seed}
    return Gates(expression, fitted_latent, fitted_picture, provenance)


# --- do they keep their word? ----------------------------------------------------------------------------------------


def exchange_genes(cells: Cells, seed: int) -> Cells:
    """Foreign cells of ordinary genes: every gene's counts exchanged between the cells, gene by gene."""
    counts = cells.counts.toarray()
    for j in range(counts.shape[1]):
        counts[:, j] = counts[rng.stream(seed, "exchange genes", j).permutation(len(counts)), j]
    return cells.with_counts(sp.csr_matrix(counts))


def alarm_rates(model: GE2Hist, gates: Gates, store: TissueStore, n: int = 1000, seed: int = 0) -> pd.DataFrame:
    """How often each gate calls cells of the test donors outside (p <= 0.05), and cells with exchanged genes.

    Parameters
    ----------
    n: cells, and at most as many whole tiles.

    Returns
    -------
    One row per gate and part of a gate, and ``all`` (the four together, without pictures where a cell has no whole
    tile): ``rate``, ``n``, ``donors``, ``lowest`` and ``highest`` rate among donors, ``exchanged`` the rate among
    cells whose genes were exchanged (NaN for pictures, which are not drawn here), ``minimum_p``.

    Raises
    ------
    BadInput: no test donor that the bundle has not seen.
    """
    donors = gates.provenance.get("donors", {}).get("test") or _donors(model, store)["test"]
    if not donors:
        raise BadInput(f"{store.path} has no donor that the bundle has not seen: simulate more donors.")
    rows = _some(store.rows(donors, interior=False), n, seed, "test")
    cells, embedding, latent, kind = _encoded(model, store.cells.take(rows), seed)
    table = gates.cell_p(model, cells, embedding, latent, kind)
    # For the range of one gene: another gene at random for every cell.
    panel = gates.panel(cells.genes)
    z, own = np.abs(panel.deviation(cells, kind)), np.abs(panel.calibration)
    gene = rng.stream(seed, "gates", "gene").integers(z.shape[1], size=len(z))
    table["range"] = [conformal_p(z[i, g], own[:, g]).item() for i, g in enumerate(gene)]
    table["expression"] = bonferroni(table[["profile", "range"]].to_numpy())
    picture = np.full(len(cells), np.nan)
    if gates.picture is not None:
        row = pd.Series(np.arange(len(store)), index=store.cells.cell_id)[cells.cell_id].to_numpy()
        whole = np.flatnonzero(store.interior[row])
        picture[whole] = gates.picture.p(_tile_features(model, store, row[whole]))
    table["picture"] = picture
    table["all"] = bonferroni(table[list(GATES)].to_numpy())

    foreign, f_embedding, f_latent, f_kind = _encoded(model, exchange_genes(cells, seed), seed)
    strange = gates.cell_p(model, foreign, f_embedding, f_latent, f_kind)
    strange["all"] = bonferroni(strange[[name for name in GATES if name in strange]].to_numpy())
    strange["range"] = np.nan
    out = []
    for name in (*GATES, "profile", "range", "z_c", "z_e", "all"):
        asked = table[name].notna().to_numpy()
        if not asked.any():
            continue
        alarm = (table[name] <= OUTSIDE)[asked]
        by_donor = alarm.groupby(np.asarray(cells.donor)[asked]).mean()
        exchanged = strange[name].dropna() if name in strange else pd.Series(dtype=float)
        out.append(
            {
                "gate": name,
                "rate": float(alarm.mean()),
                "n": int(asked.sum()),
                "donors": len(by_donor),
                "lowest": float(by_donor.min()),
                "highest": float(by_donor.max()),
                "exchanged": float((exchanged <= OUTSIDE).mean()) if len(exchanged) else math.nan,
                "minimum_p": float(table[name].min()),
            }
        )
    return pd.DataFrame(out)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = GateConfig()
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder that gets gates.safetensors and gates.json")
    parser.add_argument("data", type=Path, metavar="DATA.zarr", help="the store that the bundle was trained on")
    parser.add_argument("--cells", type=int, default=default.calibration_cells, help="held-out cells to rank among")
    parser.add_argument("--tiles", type=int, default=default.tiles, help="training tiles, and as many held-out ones")
    parser.add_argument("--test-cells", type=int, default=1000, help="cells of test donors for the rate of alarms")
    parser.add_argument("--seed", type=int, default=0)


def main(args: argparse.Namespace) -> None:
    """Fit the gates, print and keep their rate of alarms on test donors, write them into the bundle."""
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.store import TissueStore

    if args.test_cells < 20:
        raise BadInput(f"--test-cells is {args.test_cells}: give at least 20.")
    kept = min(GateConfig.kept_cells, args.cells)
    config = GateConfig(calibration_cells=args.cells, kept_cells=kept, tiles=args.tiles, seed=args.seed)
    model = GE2Hist.load(args.bundle, gates=False)
    store = TissueStore(args.data, model.config.tile_px)
    gates = fit_gates(model, store, config)
    rates = alarm_rates(model, gates, store, args.test_cells, args.seed)
    rows = json.loads(rates.to_json(orient="records"))
    gates = replace(gates, provenance={**gates.provenance, "alarms": {"level": OUTSIDE, "gates": rows}})
    gates.save(args.bundle)
    print(rates.round(3).to_string(index=False))
