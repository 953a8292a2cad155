"""Gene attribution: which genes of a cell does a readout of its drawn niche hang on, and in which direction?

The whole chain is differentiable once two steps are made smooth. The encoder reads the *rank bin* of a gene, a whole
number from 1 to 50, but its value network takes it as a real number, so the derivative with respect to the bin exists;
a nuclei *count* is replaced by the sum of the reader's centre probabilities, scaled so that it equals the count in the
cell's own pictures. The rest is the model as it is: encoder, posterior means of both VAEs, a few deterministic DDIM
steps from fixed noise, decoder, reader. The gradient is in the readout's unit per bin.

A gradient is a slope at the cell as it is. It says what a small change would do, not what a knock-out does: the
first-order guess of a knock-out, ``gradient x (bins after - bins before)`` summed over all genes whose bins it moves,
is judged below.

Checks, all of which must pass before an attribution is shown:

- finite differences: bins of the leading and of random genes are moved by +-``STEP`` through the same chain;
- real edits: knock-outs of leading and random genes, embedded anew, through the niche network
  (:meth:`GE2Hist.expected_neighbours`), against the first-order guess of that same network;
- random weights (Adebayo et al. 2018, arXiv:1810.03292): with the encoder, the VAEs or the U-Net initialised anew the
  attribution must become another one. One that stays describes the architecture, not what was learned.

With ``through="neighbours"`` the niche network takes the place of picture and reader: milliseconds instead of seconds,
density and composition only.
"""

from __future__ import annotations

import copy
import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ge2hist_core import rng
from ge2hist_core.config import READER_CLASSES, VISIBLE_CLASS
from ge2hist_core.types import BadInput, Cells
from perturb.cache import DiskCache
from perturb.result import pack_table, unpack_table
from perturb.run import Progress
from perturb.stats import bootstrap_mean
from perturb.tables import LEVEL, UNITS

if TYPE_CHECKING:
    from torch import Tensor

    from ge2hist_core.model import GE2Hist

__all__ = ["Attribution", "Chain", "attribute", "readout_names"]

STEPS = 4
SEEDS = (0, 1, 2, 3)
STEP = 0.25
"""Bins by which a gene is moved to each side in the finite differences: float32 leaves three digits of the slope."""
N_CHECKED = 4
"""Leading genes, and as many random ones, in the checks against finite differences and real edits."""
REDRAWN = 2
"""Independent random initialisations of each part."""
BATCH = 4
"""Pictures in one pass of a check, the number at which one costs least (see :mod:`ge2hist_core.model`)."""

MIN_RANK = 0.9
"""Least rank correlation with the finite differences."""
MAX_ERROR = 0.2
"""Largest relative error, norm of the difference over norm of the finite differences."""
MIN_RANK_EDIT = 0.5
"""Least rank correlation with real knock-outs: those are large steps, a slope need not meet their size."""
MAX_RANK_RANDOM = 0.7
"""Largest mean absolute rank correlation with the attribution from random weights. All slopes pass through the few
directions of the state, so that unrelated ones agree by chance: 24 random U-Nets in the demo bundle gave 0.34 on
average with a standard deviation of 0.2, by which the mean of two exceeds 0.7 once in a hundred times."""

PARTS = {"encoder": "the encoder", "vae": "the VAEs", "unet": "the U-Net"}


@dataclass(frozen=True, eq=False)
class Attribution:
    """Slope of one readout of one cell by gene.

    Parameters
    ----------
    cell_id, readout, unit, through: what was attributed.
    value: the smooth readout at the cell as it is, mean over seeds.
    table: one row per gene that the encoder sees, the steepest first: ``gene, bin, gradient`` (unit per bin, mean over
        seeds), ``low, high`` (95 % interval over seeds; NaN for one seed and through the niche network).
    checks: ``check, value, limit, passed``: what was measured and what it must keep to; empty if none was made.
    passed: all checks were made and passed; only then may the attribution be shown.
    reasons: one sentence for each check that failed.
    warnings: one sentence each.
    """

    cell_id: str
    readout: str
    unit: str
    through: str
    value: float
    table: pd.DataFrame
    checks: pd.DataFrame
    passed: bool
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]


def readout_names(through: str = "picture") -> tuple[str, ...]:
    """Readouts that can be attributed: ``density``, ``fraction:<class>`` and, through the picture, ``density:<class>``.

    Spacing hangs on which two nuclei are nearest and has no useful slope.
    """
    kinds = ("density", "fraction") if through == "picture" else ("fraction",)
    return ("density", *(f"{kind}:{name}" for kind in kinds for name in READER_CLASSES))


class Chain:
    """From real-valued bins of one cell to smooth readouts, differentiable throughout.

    Parameters
    ----------
    model: its weights are used as they are; :meth:`with_part` puts others in their place.
    cells: the one cell.
    readout: see :func:`readout_names`. through: ``picture`` or ``neighbours``.
    seeds: of the noise. steps: of DDIM. encoder_seed: of ties between counts.

    Attributes
    ----------
    genes: ``[token]`` names. bins: float32 ``[token]``, the cell as it is. noise: ``[seed, channel, h, w]`` x_T.
    """

    def __init__(
        self,
        model: GE2Hist,
        cells: Cells,
        readout: str,
        *,
        through: str = "picture",
        seeds: Sequence[int] = SEEDS,
        steps: int = STEPS,
        encoder_seed: int = 0,
    ) -> None:
        import torch

        self.model, self.readout, self.through = model, readout, through
        self.seeds, self.steps = tuple(seeds), steps
        self.parts: dict[str, Any] = {
            "encoder": model.scgpt.network, "vae": model.encoder, "unet": model.denoiser
        }  # fmt: skip
        row = model.scgpt.bins(cells, encoder_seed)
        if not row.nnz:
            raise BadInput(f"Cell {cells.cell_id[0]} expresses no gene that the encoder knows: choose another cell.")
        self.columns = row.indices.astype(int)
        self.genes = cells.genes[self.columns]
        self.bins = row.data.astype(np.float32)
        ids = model.scgpt.match(cells.genes).ids[self.columns]
        self._ids = torch.from_numpy(np.concatenate([[model.scgpt.vocab["<cls>"]], ids]))
        size = (model.config.latent_channels, model.config.latent_px, model.config.latent_px)
        self.noise = torch.stack([rng.normal(seed, "x_T", size) for seed in self.seeds])
        self._scale = 1.0  # counts per sum of centre probabilities

    def with_part(self, name: str, part: Any, seed: int | None = None) -> Chain:
        """The same chain with another ``encoder`` (scGPT network), ``vae`` (state encoder) or ``unet`` (denoiser).

        ``seed``: keep the noise of this one alone, counted from 0.
        """
        other = copy.copy(self)
        other.parts = self.parts | {name: part}
        if seed is not None:
            other.seeds, other.noise = self.seeds[seed : seed + 1], self.noise[seed : seed + 1]
        return other

    def state(self, bins: Tensor) -> Tensor:
        """Bins ``[n, token]`` -> ``z_s [n, d_c + d_e]``."""
        import torch

        network = self.parts["encoder"]
        pad = torch.full((len(bins), 1), float(self.model.scgpt.pad_value))
        tokens = network.encoder(self._ids) + network.value_encoder(torch.cat([pad, bins], dim=1))
        first = network.first(tokens)
        q_c, q_e = self.parts["vae"](first / first.norm(dim=1, keepdim=True))
        return torch.cat([q_c.loc, q_e.loc], dim=1)

    def pixels(self, z_s: Tensor, noise: Tensor, on_step: Callable[[], None] | None = None) -> Tensor:
        """States and noise ``[n, ...]`` -> pixels ``[n, 3, H, W]`` in [-1, 1]; DDIM as in :mod:`ge2hist_core.sampler`.

        On the way back every step is held in memory, some tens of MB each for four pictures of the demo bundle.
        """
        import torch

        from ge2hist_core.sampler import alphas_cumprod, timesteps

        length = self.model.config.train_timesteps
        times = timesteps(self.steps, length)
        levels = [(alphas_cumprod(length)[t] ** 0.5, (1 - alphas_cumprod(length)[t]) ** 0.5) for t in times]
        x = noise
        for i, t in enumerate(times):
            (alpha, sigma), (alpha_s, sigma_s) = levels[i], [*levels, (1.0, 0.0)][i + 1]
            estimate = alpha * x - sigma * self.parts["unet"](x, torch.tensor(t), z_s)
            x = sigma_s / sigma * x + (alpha_s - alpha * sigma_s / sigma) * estimate
            if on_step is not None:
                on_step()
        part = self.model.autoencoder
        return part.picture(x * part.latent_std + part.latent_mean).clamp(-1.0, 1.0)

    def read(self, pixels: Tensor) -> Tensor:
        """Pixels ``[n, 3, H, W]`` -> smooth readout ``[n]``."""
        import torch

        reader = self.model.reader
        assert reader is not None
        out = reader.net(pixels)
        heat = torch.sigmoid(out[:, 0])
        classes = (out[:, 4:] + torch.tensor(reader.class_bias)[None, :, None, None]).softmax(dim=1)
        kind, _, name = self.readout.partition(":")
        part = heat if not name else heat * classes[:, reader.classes.index(name)]
        total = part.sum(dim=(1, 2))
        if kind == "fraction":
            return total / heat.sum(dim=(1, 2)).clamp_min(1e-6)
        return total * self._scale / self._area_mm2

    def calibrate(self, pixels: Tensor) -> None:
        """Set the scale at which the sum of centre probabilities equals the count of nuclei in these pictures."""
        import torch

        from ge2hist_core.autoencoder import to_uint8

        reader = self.model.reader
        assert reader is not None
        with torch.no_grad():
            heat = float(torch.sigmoid(reader.net(pixels)[:, 0]).sum())
        n = sum(map(len, self.model.read_nuclei(to_uint8(pixels.detach().clone()))))
        self._scale = n / max(heat, 1e-6)

    def neighbours(self, z_s: Tensor) -> Tensor:
        """States ``[n, d_z]`` -> readout ``[n]`` of the expected neighbours, as :meth:`GE2Hist.expected_readouts`."""
        import torch

        scale = (self.model.report or {}).get("neighbours")
        if not scale:
            raise BadInput("This bundle cannot guess a niche without drawing it: train it again with this version.")
        types = self.model.cell_types
        mean, std = (torch.tensor([scale[t][key] for t in types]) for key in ("root_mean", "root_std"))
        # Not its expected_neighbours(): that lets no gradient through to z_c.
        root = self.parts["vae"].niche_vae.neighbours(z_s) * std + mean
        counts = root.clamp_min(0.0) ** 2
        kind, _, name = self.readout.partition(":")
        if kind == "density":
            return (counts.sum(dim=1) + 1) / self._area_mm2
        mine = torch.tensor([VISIBLE_CLASS.get(t, t) == name for t in types])
        return counts[:, mine].sum(dim=1) / counts.sum(dim=1).clamp_min(1e-9)

    @property
    def _area_mm2(self) -> float:
        return (self.model.config.tile_px * self.model.config.um_per_px / 1000.0) ** 2

    def values(self, bins: np.ndarray) -> np.ndarray:
        """Bins ``[n, token]`` -> readout ``[n]`` float64 with the first seed's noise, without gradient."""
        import torch

        with torch.no_grad():
            z_s = self.state(torch.from_numpy(np.asarray(bins, dtype=np.float32)))
            if self.through == "neighbours":
                return self.neighbours(z_s).double().numpy()
            noise = self.noise[:1]
            found = [self.read(self.pixels(part, noise.expand(len(part), -1, -1, -1))) for part in z_s.split(BATCH)]
        return torch.cat(found).double().numpy()

    def gradient(
        self, *, calibrate: bool = False, on_step: Callable[[], None] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Readout ``[seed]`` and its slope by bin ``[seed, token]`` at the cell as it is, both float64.

        Backwards in two parts: from the readouts to the state of each seed, and once per seed through the encoder.
        Through the neighbours there is one row.

        Parameters
        ----------
        calibrate: first set the scale from the pictures under way (:meth:`calibrate`).
        """
        import torch

        bins = torch.from_numpy(self.bins)[None].requires_grad_()
        with torch.enable_grad():
            z_s = self.state(bins)
            if self.through == "neighbours":
                value = self.neighbours(z_s)
                (slope,) = torch.autograd.grad(value.sum(), bins)
                return value.detach().double().numpy(), slope.double().numpy()
            value, by_state = self.by_state(z_s.expand(len(self.noise), -1), self.noise, calibrate, on_step)
            slopes = [torch.autograd.grad(z_s, bins, row[None], retain_graph=True)[0][0] for row in by_state]
        return value.double().numpy(), torch.stack(slopes).double().numpy()

    def by_state(
        self, z_s: Tensor, noise: Tensor, calibrate: bool = False, on_step: Callable[[], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """States and noise ``[n, ...]`` -> readout ``[n]`` of the picture and its slope by state ``[n, d_z]``."""
        import torch

        leaf = z_s.detach().clone().requires_grad_()
        with torch.enable_grad():
            pixels = self.pixels(leaf, noise, on_step)
            if calibrate:
                self.calibrate(pixels)
            value = self.read(pixels)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), slope


def attribute(
    model: GE2Hist,
    cells: Cells,
    readout: str = "density",
    *,
    through: str = "picture",
    seeds: Sequence[int] = SEEDS,
    steps: int = STEPS,
    encoder_seed: int = 0,
    check: bool = True,
    cache: DiskCache | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> Attribution:
    """Attribute a readout of one cell to its genes, and check the attribution.

    Parameters
    ----------
    cells: exactly one.
    readout: see :func:`readout_names`. through: ``picture``, or ``neighbours`` for the niche network alone.
    seeds, steps: noise and DDIM steps of the pictures. encoder_seed: of ties between counts.
    check: False leaves the checks out; the attribution then counts as not passed.
    cache: a finished attribution is taken from it and kept in it.

    Raises
    ------
    BadInput: more than one cell, an unknown readout, a cell that the encoder cannot see, a bundle without reader.
    ge2hist_core.sampler.Stopped: cancelled.
    """
    from ge2hist_core.sampler import Stopped

    if len(cells) != 1:
        raise BadInput(f"Attribution was asked for {len(cells)} cells: give one at a time.")
    if through not in ("picture", "neighbours"):
        raise BadInput(f"through is {through!r}: choose picture or neighbours.")
    if readout not in readout_names(through):
        raise BadInput(f"readout is {readout!r}: choose {', '.join(readout_names(through))}.")
    if not seeds or len(set(seeds)) != len(seeds):
        raise BadInput(f"seeds is {tuple(seeds)}: give at least one, each once.")
    if through == "picture" and model.reader is None:
        raise BadInput("This bundle has no nuclei reader: train one with `python -m ge2hist_core train-reader`.")
    key = _key(model, cells, readout, through, seeds, steps, encoder_seed, check)
    stored = None if cache is None else cache.load_json(key)
    if stored is not None:
        return _unpack(stored)

    chain = Chain(model, cells, readout, through=through, seeds=seeds, steps=steps, encoder_seed=encoder_seed)
    total = 5 if check else 1
    done = 0.0

    def advance(text: str, amount: float = 1.0) -> None:
        nonlocal done
        done += amount
        if on_progress is not None:
            on_progress(Progress(min(1.0, done / total), text))
        if cancel is not None and cancel.is_set():
            raise Stopped

    text = "Following the readout back to the genes"
    value, slopes = chain.gradient(calibrate=True, on_step=lambda: advance(text, 1.0 / steps))
    if through == "neighbours":
        advance(text)
    checks: list[tuple[str, float, float, bool]] = []
    if check:
        checks += _finite_differences(chain, slopes)
        advance("Checking against finite differences")
        checks += _real_edits(chain, model, cells, encoder_seed)
        advance("Checking against knock-outs")
        checks += _random_states(chain, slopes)
        advance("Checking against random weights")
        checks += _random_denoiser(chain, slopes) if through == "picture" else []
        advance("Checking against random weights")
    table = pd.DataFrame(checks, columns=["check", "value", "limit", "passed"])
    attribution = Attribution(
        cell_id=str(cells.cell_id[0]),
        readout=readout,
        unit=UNITS[readout.partition(":")[0]],
        through=through,
        value=float(value.mean()),
        table=_by_gene(chain, slopes, encoder_seed),
        checks=table,
        passed=bool(len(table)) and bool(table["passed"].all()),
        reasons=tuple(_reasons(table)),
        warnings=tuple(_warnings(chain)),
    )
    if cache is not None:
        cache.store_json(key, _pack(attribution))
    return attribution


def _by_gene(chain: Chain, slopes: np.ndarray, seed: int) -> pd.DataFrame:
    found = [bootstrap_mean(column, seed, LEVEL) for column in slopes.T]
    table = pd.DataFrame(
        {
            "gene": chain.genes,
            "bin": chain.bins.astype(int),
            "gradient": [one.value for one in found],
            "low": [one.low for one in found],
            "high": [one.high for one in found],
        }
    )
    return table.iloc[np.argsort(-table["gradient"].abs().to_numpy(), kind="stable")].reset_index(drop=True)


def _leading_and_random(slope: np.ndarray, name: str) -> np.ndarray:
    """Tokens of the steepest genes and of as many others drawn at random."""
    order = np.argsort(-np.abs(slope), kind="stable")
    rest = rng.stream(0, "attribution check", name, len(slope)).permutation(order[N_CHECKED:])
    return np.concatenate([order[:N_CHECKED], rest[:N_CHECKED]])


def _finite_differences(chain: Chain, slopes: np.ndarray) -> list[tuple[str, float, float, bool]]:
    """Central differences of the same chain with the same noise, for leading and random genes."""
    slope = slopes[0]
    tokens = _leading_and_random(slope, "finite differences")
    moved = np.repeat(chain.bins[None], 2 * len(tokens), axis=0)
    for i, token in enumerate(tokens):
        moved[2 * i, token] += STEP
        moved[2 * i + 1, token] -= STEP
    up, down = chain.values(moved).reshape(-1, 2).T
    difference = (up - down) / (2 * STEP)
    size = float(np.linalg.norm(difference))
    error = float(np.linalg.norm(slope[tokens] - difference)) / size if size > 0 else float("nan")
    rank = _rank_correlation(slope[tokens], difference)
    return [
        ("rank correlation with finite differences", rank, MIN_RANK, rank >= MIN_RANK),
        ("relative error against finite differences", error, MAX_ERROR, error <= MAX_ERROR),
    ]


def _real_edits(chain: Chain, model: GE2Hist, cells: Cells, seed: int) -> list[tuple[str, float, float, bool]]:
    """Knock-outs through the niche network against its own first-order guess, for leading and random genes."""
    import torch

    # The niche network has no density by class: the fraction of that class stands in.
    name = chain.readout.replace("density:", "fraction:")
    near = Chain(model, cells, name, through="neighbours", seeds=(0,), encoder_seed=seed)
    slope = near.gradient()[1][0]
    before = model.scgpt.bins(cells, seed).toarray()[0]
    tokens = _leading_and_random(slope * near.bins, "knock-outs")
    guessed, true = [], []

    def value(some: Cells) -> float:
        latent = model.encode(model.embed(some, seed))
        return float(near.neighbours(torch.from_numpy(latent.z_s))[0])

    start = value(cells)
    for token in tokens:
        counts = cells.counts.toarray()
        counts[0, near.columns[token]] = 0.0
        edited = cells.with_counts(counts)
        if not (edited.counts > 0).sum() or not len(model.scgpt.bins(edited, seed).indices):
            continue
        after = model.scgpt.bins(edited, seed).toarray()[0]
        guessed.append(float(slope @ (after - before)[near.columns]))
        true.append(value(edited) - start)
    rank = _rank_correlation(np.array(guessed), np.array(true))
    return [("rank correlation with knock-outs", rank, MIN_RANK_EDIT, rank >= MIN_RANK_EDIT)]


def _random_states(chain: Chain, slopes: np.ndarray) -> list[tuple[str, float, float, bool]]:
    """Encoder or VAEs initialised anew; their states pass through the U-Net together."""
    import torch

    whose, bins, states = [], [], []
    for part in ("encoder", "vae"):
        for draw in range(REDRAWN):
            other = chain.with_part(part, _initialised_anew(chain.model, part, draw))
            whose.append(part)
            bins.append(torch.from_numpy(chain.bins)[None].requires_grad_())
            with torch.enable_grad():
                # Through the neighbours the readout depends on the VAEs themselves, not on their states alone.
                states.append(other.neighbours(other.state(bins[-1])) if chain.through == "neighbours"
                              else other.state(bins[-1]))  # fmt: skip
    if chain.through == "neighbours":
        by_state = [torch.ones(1)] * len(states)
    else:
        noise = chain.noise[[draw % len(chain.seeds) for draw in range(REDRAWN)] * 2]
        by_state = list(chain.by_state(torch.cat(states), noise)[1][:, None])
    found: dict[str, list[np.ndarray]] = {"encoder": [], "vae": []}
    for part, bin_, state, slope in zip(whose, bins, states, by_state, strict=True):
        found[part].append(torch.autograd.grad(state, bin_, slope)[0][0].double().numpy())
    return [_unlike(part, some, slopes) for part, some in found.items()]


def _random_denoiser(chain: Chain, slopes: np.ndarray) -> list[tuple[str, float, float, bool]]:
    """U-Net initialised anew."""
    found = []
    for draw in range(REDRAWN):
        other = chain.with_part("unet", _initialised_anew(chain.model, "unet", draw), draw % len(chain.seeds))
        found.append(other.gradient()[1][0])
    return [_unlike("unet", found, slopes)]


def _unlike(part: str, found: Sequence[np.ndarray], slopes: np.ndarray) -> tuple[str, float, float, bool]:
    """Mean absolute rank correlation of slopes ``[token]`` from random weights with the attribution."""
    value = float(np.mean([abs(_rank_correlation(one, slopes.mean(axis=0))) for one in found]))
    return f"rank correlation with {PARTS[part]} initialised anew", value, MAX_RANK_RANDOM, value <= MAX_RANK_RANDOM


def _initialised_anew(model: GE2Hist, part: str, draw: int) -> Any:
    """The part with weights of its own initialisation; statistics of the data (standardisation) stay."""
    import torch

    from ge2hist_core.denoiser import Denoiser
    from ge2hist_core.embedding import Encoder
    from ge2hist_core.vae import StateEncoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.stream(draw, "random weights", part).integers(2**63)))
        if part == "encoder":
            fresh: Any = Encoder(model.scgpt.network.size)
        elif part == "vae":
            fresh = StateEncoder(model.config)
            fresh.embedding_mean.copy_(model.encoder.embedding_mean)
            fresh.embedding_std.copy_(model.encoder.embedding_std)
        else:
            fresh = Denoiser(model.config)
    return fresh.eval().requires_grad_(False)


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, 0 where either side is constant: nothing agrees then."""
    from scipy.stats import rankdata

    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def _reasons(checks: pd.DataFrame) -> list[str]:
    said = []
    for row in checks[~checks["passed"].astype(bool)].itertuples() if len(checks) else ():
        most = row.check.startswith("relative error") or "initialised anew" in row.check
        said.append(
            f"The {row.check} is {row.value:.2f}, it should be at {'most' if most else 'least'} {row.limit:.2f}."
        )
    return said


def _warnings(chain: Chain) -> list[str]:
    limit = 1200
    if len(chain.bins) >= limit:
        return [
            f"The encoder sees {limit - 1} of this cell's {len(chain.bins)} genes in a run; the attribution is of all."
        ]
    return []


def _key(
    model: GE2Hist, cells: Cells, readout: str, through: str, seeds: Sequence[int], steps: int, seed: int, check: bool
) -> str:
    digest = hashlib.sha256(
        json.dumps(
            ["attribution", model.sha256, [*map(str, cells.genes)], str(cells.cell_id[0]), readout, through,
             list(seeds), steps, seed, check]
        ).encode()
    )  # fmt: skip
    for array in (cells.counts.indices.astype(np.int64), cells.counts.data):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


_PLAIN = ("cell_id", "readout", "unit", "through", "value", "passed")


def _pack(attribution: Attribution) -> dict[str, Any]:
    packed: dict[str, Any] = {name: getattr(attribution, name) for name in _PLAIN}
    packed |= {name: pack_table(getattr(attribution, name)) for name in ("table", "checks")}
    return packed | {name: list(getattr(attribution, name)) for name in ("reasons", "warnings")}


def _unpack(packed: dict[str, Any]) -> Attribution:
    values = dict(packed)
    values |= {name: unpack_table(packed[name]) for name in ("table", "checks")}
    return Attribution(**values | {name: tuple(packed[name]) for name in ("reasons", "warnings")})
