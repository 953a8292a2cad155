"""Train a bundle: ``python -m ge2hist_core train DATA.zarr --scgpt DIR --out BUNDLE``.

Stages, each resumable, with their work in ``BUNDLE/.work``:

1. ``autoencoder``: tile <-> latent;
2. ``latents``: the training tiles in several rotations and reflections as float16 latents;
3. ``embeddings``: scGPT embedding of the cells; the stages before do without the encoder, so it may be exchanged
   after them;
4. ``vae``: both VAEs by themselves, no separation yet;
5. ``states``: VAEs and classifier without the U-Net, (9) less ``L_CDM``, and the four terms of separation that
   :mod:`ge2hist_core.vae` explains;
6. ``main``: the same with the U-Net, (9) ``L = L_CDM + beta L_cls + gamma L_KL``;
7. mixture of z_c, support, report, and the bundle written.

Every draw comes from a stream named by stage and step and the state of a stage is one checkpoint, so that a run
killed at any moment and resumed ends in the weights of an uninterrupted one (same machine, same number of threads and
processes).

``accelerate launch -m ge2hist_core train ...`` trains on several processes, which must see the same folders. A batch is
that of the whole step, with draws that do not know of processes; each takes its share, gradients are averaged, and what
a loss needs of the whole batch (:meth:`Objective.totals`) is summed over all shares first. The loss curve is that of
one process but for rounding, and a run may be resumed on another number of processes. Accumulation cuts the share of a
process into parts in the same way. The main process alone writes.

``--start-from BUNDLE`` goes on from a finished bundle: to train it longer, on other tissue, or with another encoder.
Its autoencoder stays as it is, its VAEs and U-Net are where the main stage begins; with another encoder the VAEs are
trained anew before that. With ``--freeze-encoder`` the VAEs stay as they are when the main stage begins, and the U-Net
learns (8) on a condition that no longer moves.

Choices
- Types are seen in proportion to the square root of their frequency: one that is 100 times rarer is seen 10 times less
  (``class_alpha`` and ``class_beta`` of :class:`~ge2hist_core.config.TrainConfig` say otherwise).
- The loss on v is not re-weighted. Min-SNR (Hang et al. 2023) would lower the weight of the noisiest times, where the
  layout, that is density and composition, is decided and the condition matters most.
- Times are stratified over the batch (Kingma et al. 2021, arXiv 2107.00630, appendix I.1): less noise in the loss for
  nothing.
- Learning rate: linear warm-up, constant, last fifth linear to 0 (Haegele et al. 2024, arXiv 2405.18392), so that
  ``--steps`` may be raised later.
- bf16 autocast only on request: a step takes two thirds of the time on a CPU with AVX512-BF16, twice the time on one
  without.
- Attention in training by its plain formula: on CPUs the backward pass of Torch's fused kernel takes a fifth of a step
  at these short sequences.
"""

from __future__ import annotations

import argparse
import copy
import csv
import errno
import hashlib
import json
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn.attention import SDPBackend, sdpa_kernel

from ge2hist_core import rng
from ge2hist_core.autoencoder import TileAutoencoder, autoencoder_loss, from_uint8, psnr
from ge2hist_core.config import CELL_TYPES, PRESETS, ModelConfig, Preset, TrainConfig, from_json, to_json
from ge2hist_core.denoiser import Denoiser
from ge2hist_core.files import atomic_path, parse_json, write_json
from ge2hist_core.loader import ahead, share
from ge2hist_core.model import GE2Hist
from ge2hist_core.sampler import alphas_cumprod
from ge2hist_core.support import Support
from ge2hist_core.types import BadInput
from ge2hist_core.vae import (
    StateEncoder,
    active_units,
    classification_loss,
    fit_mixture,
    follow_type_mean,
    kl_divergence,
    neighbours_loss,
    probe_accuracy,
    probe_r2,
    reconstruction_loss,
    type_leak,
    type_prior,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ge2hist_core.store import TissueStore

__all__ = ["Record", "Trainer", "add_arguments", "class_weights", "device_name", "limited_rows", "main"]

Batch = dict[str, Tensor]
MakeBatch = Callable[[int, slice], Batch]
"""(step, part) -> that part of the step's batch."""

_WHOLE = slice(None)
_FREE = ("steps", "checkpoint_every", "accumulation", "workers")
"""Settings that a resumed run may change."""
_YOUNGER: dict[str, Any] = {"cells_per_type": 0, "class_alpha": 0.5, "class_beta": 1.0}
"""Settings younger than the oldest checkpoints: at these values a run goes on from work that does not know them."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# Elements of the square's symmetry group in the order in which variants of a tile are used: 0-3 are quarter turns,
# 4-7 the same after a reflection. The first two, four and eight are balanced between both kinds.
_VARIANTS = (0, 5, 2, 7, 4, 1, 6, 3)


@dataclass(frozen=True)
class Record:
    """One step of a stage: ``step`` is done of ``total``; ``terms`` are the losses by name (empty for plain work)."""

    stage: str
    step: int
    total: int
    terms: dict[str, float]


def device_name(device: torch.device) -> str:
    """What a report calls the device: the GPU's own name, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# --- objectives: batch -> loss terms, "loss" is what is minimised --------------------------------------------------


class Objective(nn.Module):
    """Loss of a batch, a mean over its cells. Where a step's batch is cut into parts, the loop first sums
    :meth:`totals` over the parts, gives the sums to each part's :meth:`forward` beside the batch, and then once to
    :meth:`follow`."""

    @torch.no_grad()
    def totals(self, batch: Batch) -> Batch:
        """Sums over a part of the batch of what the loss needs to know of the whole; names begin with ``total_``."""
        return {}

    @torch.no_grad()
    def follow(self, totals: Batch) -> None:
        """Move running statistics towards those of the whole batch."""


class AutoencoderObjective(Objective):
    """L1 plus gradient loss of tiles; batch: ``pixels``, ``noise``."""

    def __init__(self, autoencoder: TileAutoencoder, config: TrainConfig) -> None:
        super().__init__()
        self.autoencoder, self.noise_level = autoencoder, config.latent_noise

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        raw = self.autoencoder.encoder(batch["pixels"])
        if "total_values" in batch:
            n, mean = batch["total_values"], batch["total_sum"] / batch["total_values"]
            std = ((batch["total_square"] - n * mean**2) / (n - 1)).clamp_min(0).sqrt().float()[:, None, None]
        else:
            std = raw.detach().float().std((0, 2, 3), keepdim=True)
        reconstruction = self.autoencoder.picture(raw + self.noise_level * std * batch["noise"])
        terms = autoencoder_loss(reconstruction, batch["pixels"])
        # Keeps raw latents near unit scale; too weak to shape them.
        scale = 1e-4 * raw.float().square().mean()
        return {"loss": terms["l1"] + terms["gradient"] + scale, **terms}

    @torch.no_grad()
    def totals(self, batch: Batch) -> Batch:
        raw = self.autoencoder.encoder(batch["pixels"]).double()
        n = torch.tensor(float(raw[:, 0].numel()), dtype=torch.float64, device=raw.device)
        return {"total_values": n, "total_sum": raw.sum((0, 2, 3)), "total_square": raw.square().sum((0, 2, 3))}


class VAEObjective(Objective):
    """Each VAE by itself: reconstruction of its own input, and KL; batch: ``embedding, label, eps_c, eps_e``.

    The classifier learns along, because the niche VAE's input depends on it.
    """

    def __init__(self, encoder: StateEncoder, config: TrainConfig) -> None:
        super().__init__()
        self.encoder, self.config = encoder, config

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        embedding, c = batch["embedding"], self.config
        q_c, q_e = self.encoder(embedding)
        standard = self.encoder.standardise(embedding)
        terms: dict[str, Tensor] = {}
        for name, vae, q, target in (
            ("c", self.encoder.type_vae, q_c, standard),
            ("e", self.encoder.niche_vae, q_e, self.encoder.residual(standard, q_c)),
        ):
            z = q.loc + q.scale * batch[f"eps_{name}"]
            terms[f"rec_{name}"] = reconstruction_loss(vae.generative(z), target)
            terms[f"kl_{name}"] = kl_divergence(q, embedding.shape[1])
        terms["cls"] = classification_loss(self.encoder.type_vae.logits(q_c.loc), batch["label"])
        loss = terms["rec_c"] + terms["rec_e"] + c.gamma * (terms["kl_c"] + terms["kl_e"]) + c.beta * terms["cls"]
        return {"loss": loss, **terms}


class StateObjective(Objective):
    """Equation (9) without (8), and the terms of separation; batch: ``embedding, label, neighbours, eps_c, eps_e``."""

    type_mean: Tensor

    def __init__(self, encoder: StateEncoder, model: ModelConfig, config: TrainConfig) -> None:
        super().__init__()
        self.encoder, self.config = encoder, config
        self.register_buffer("type_mean", torch.zeros(len(model.cell_types), model.d_e))

    def states(self, batch: Batch) -> tuple[Normal, Normal, Tensor, Tensor]:
        """Posteriors of z_c and z_e, and a draw from each."""
        q_c, q_e = self.encoder(batch["embedding"])
        return q_c, q_e, q_c.loc + q_c.scale * batch["eps_c"], q_e.loc + q_e.scale * batch["eps_e"]

    def terms(self, batch: Batch, q_c: Normal, q_e: Normal, z_c: Tensor, z_e: Tensor) -> dict[str, Tensor]:
        """The loss and what it is made of."""
        embedding, label, c = batch["embedding"], batch["label"], self.config
        type_vae, niche_vae = self.encoder.type_vae, self.encoder.niche_vae
        logits = type_vae.logits(z_c)
        cls = classification_loss(logits, label)  # (1)
        kl = kl_divergence(q_e, embedding.shape[1])  # (2)
        leak = type_leak(q_e.loc, label, self.type_mean)
        if "total_cells" in batch:
            # type_leak divides by the mean square over the part: exchange it for that over the whole batch.
            part = q_e.loc.detach().square().sum(1).mean().clamp_min(1e-6)
            leak = leak * part / (batch["total_square"] / batch["total_cells"].sum()).clamp_min(1e-6).float()
        else:
            follow_type_mean(self.type_mean, q_e.loc, label)
        prior = type_prior(q_c, type_vae.prior_mean, label, embedding.shape[1])
        together = type_vae.generative(z_c) + self.encoder.residual_std * niche_vae.generative(z_e)
        rec = reconstruction_loss(together, self.encoder.standardise(embedding))
        around = neighbours_loss(niche_vae.expected_neighbours(z_c, z_e), batch["neighbours"])
        loss = c.beta * cls + c.gamma * kl
        loss = loss + c.type_prior * prior + c.type_leak * leak + c.reconstruction * rec + c.neighbours * around
        accuracy = (logits.argmax(1) == label).float().mean()
        return {
            "loss": loss,
            "cls": cls,
            "kl": kl,
            "prior": prior,
            "leak": leak,
            "rec": rec,
            "neighbours": around,
            "accuracy": accuracy,
        }

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.terms(batch, *self.states(batch))

    @torch.no_grad()
    def totals(self, batch: Batch) -> Batch:
        mu, label = self.encoder(batch["embedding"])[1].loc.double(), batch["label"]
        by_type = torch.zeros(self.type_mean.shape, dtype=mu.dtype, device=mu.device).index_add_(0, label, mu)
        cells = torch.bincount(label, minlength=len(by_type)).double()
        return {"total_cells": cells, "total_mu": by_type, "total_square": mu.square().sum()}

    @torch.no_grad()
    def follow(self, totals: Batch) -> None:
        seen = torch.nonzero(totals["total_cells"])[:, 0]
        mean = totals["total_mu"][seen] / totals["total_cells"][seen, None]
        follow_type_mean(self.type_mean, mean.to(self.type_mean.dtype), seen)


class MainObjective(Objective):
    """Equation (9); batch: that of :class:`StateObjective` and ``latent, t, noise, drop``."""

    alpha: Tensor
    sigma: Tensor

    def __init__(self, encoder: StateEncoder, denoiser: Denoiser, model: ModelConfig, config: TrainConfig) -> None:
        super().__init__()
        self.state, self.denoiser, self.frozen = StateObjective(encoder, model, config), denoiser, config.freeze_encoder
        bars = torch.tensor(alphas_cumprod(model.train_timesteps), dtype=torch.float64)
        self.register_buffer("alpha", bars.sqrt().float(), persistent=False)
        self.register_buffer("sigma", (1 - bars).sqrt().float(), persistent=False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        x_0, noise = batch["latent"], batch["noise"]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            q_c, q_e, z_c, z_e = self.state.states(batch)
        alpha, sigma = (level[batch["t"]][:, None, None, None] for level in (self.alpha, self.sigma))
        x_t = alpha * x_0 + sigma * noise  # (4)
        with sdpa_kernel(SDPBackend.MATH) if x_t.device.type == "cpu" else nullcontext():
            v = self.denoiser(x_t, batch["t"], torch.cat([z_c, z_e], dim=1), batch["drop"])
        cdm = (v.float() - (alpha * noise - sigma * x_0)).square().mean()  # (8), on v
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            terms = self.state.terms(batch, q_c, q_e, z_c, z_e)
        return {**terms, "loss": cdm if self.frozen else cdm + terms["loss"], "cdm": cdm}  # (9)

    def totals(self, batch: Batch) -> Batch:
        return self.state.totals(batch)

    def follow(self, totals: Batch) -> None:
        self.state.follow(totals)


# --- one loop for all of them ----------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Warm-up, constant, last fifth linear to 0."""
    return peak * min(1.0, (step + 1) / max(1, warmup), (steps - step) / max(1.0, 0.2 * steps))


def fit(
    stage: str,
    objective: Objective,
    batch: MakeBatch,
    work: Path,
    accelerator: Accelerator,
    identity: str,
    *,
    steps: int,
    size: tuple[str, int],
    peak_rate: float,
    config: TrainConfig,
    settings: Mapping[str, Any] | None = None,
    deadline: float = float("inf"),
    betas: tuple[float, float] = (0.9, 0.999),
) -> Iterator[Record]:
    """Minimise the mean of ``objective`` over each step's batch; yields a record per step.

    When the iterator ends, ``objective`` holds the exponential moving average of its weights. Goes on from
    ``work/<stage>.pt`` where that exists; losses are in ``work/<stage>.csv``.

    Parameters
    ----------
    batch: gives any part of a step's batch; may be called by several threads. size: of the whole, after the name of
        the setting that says so.
    identity: of data and configuration; a checkpoint of another one is refused. settings: what made it, by name.
    deadline: ``time.monotonic()`` after which the stage pauses with a checkpoint. betas: Adam's.

    Raises
    ------
    BadInput: the checkpoint belongs to other data or another configuration, or is damaged; the batch cannot be shared
        evenly; the disk is full.
    """
    parts = share(*size, accelerator.num_processes, accelerator.process_index, config.accumulation)
    cut = accelerator.num_processes * len(parts) > 1
    settings = dict(settings or {})
    objective.train().requires_grad_(True).to(accelerator.device)
    average = copy.deepcopy(objective).requires_grad_(False)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=peak_rate, betas=betas, weight_decay=1e-4)
    checkpoint, log = work / f"{stage}.pt", _Log(work / f"{stage}.csv")
    start, before, began = 0, 0.0, time.monotonic()
    if checkpoint.exists():
        state = _read_checkpoint(checkpoint)
        _refuse_other_work(checkpoint, state["identity"], state.get("settings"), identity, settings)
        objective.load_state_dict(state["objective"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start, before = state["step"], state.get("seconds", 0.0)
    trained, optimizer = accelerator.prepare(objective, optimizer)
    if accelerator.is_main_process:
        log.start(start)

    def load(step: int) -> list[Batch]:
        own = batch(step, slice(parts[0].start, parts[-1].stop))
        split = {name: value.split(parts[0].stop - parts[0].start) for name, value in own.items()}
        pieces = [{name: values[i] for name, values in split.items()} for i in range(len(parts))]
        if accelerator.device.type == "cuda":
            return [{name: value.pin_memory() for name, value in piece.items()} for piece in pieces]
        return pieces

    def save(step: int, optimizer_state: dict[str, Any]) -> None:
        state = {"identity": identity, "step": step, "objective": objective.state_dict()}
        state |= {"seconds": before + time.monotonic() - began, "settings": json.dumps(settings)}
        state |= {"average": average.state_dict(), "optimizer": optimizer_state}
        with _told_of_a_full_disk(checkpoint):
            log.flush()
            with atomic_path(checkpoint) as temporary, temporary.open("wb") as handle:
                torch.save(state, handle)

    with closing(ahead(load, range(start, steps), config.workers)) as pieces:
        for step, pieces_of_step in zip(range(start, steps), pieces, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, config.warmup_steps, peak_rate)
            values = [
                {name: value.to(accelerator.device, non_blocking=True) for name, value in piece.items()}
                for piece in pieces_of_step
            ]
            totals = _totals(accelerator, objective, values) if cut else {}
            optimizer.zero_grad(set_to_none=True)
            terms: list[dict[str, Tensor]] = []
            for i, piece in enumerate(values):
                # Gradients of all parts are summed here; processes exchange them with the last.
                last = i + 1 == len(values)
                with nullcontext() if last else accelerator.no_sync(trained):
                    with accelerator.autocast():
                        terms.append(trained(piece | totals))
                    accelerator.backward(terms[-1]["loss"] / len(values))
            if totals:
                objective.follow(totals)
            accelerator.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            _update_average(average, objective, min(config.ema, (1 + step) / (10 + step)))
            means, late = _mean_terms(accelerator, terms, time.monotonic() > deadline)
            record = Record(stage, step + 1, steps, means)
            log.add({"step": record.step, **record.terms})
            due = late or record.step % config.checkpoint_every == 0 or record.step == steps
            if due and accelerator.is_main_process:
                save(record.step, optimizer.state_dict())
            yield record
            if late:
                break
    # A later stage trains parts of the same weights: this one's hooks on their gradients must be gone by then.
    del trained, optimizer
    accelerator.free_memory()
    objective.load_state_dict(average.state_dict())
    objective.eval().requires_grad_(False).to("cpu")


@torch.no_grad()
def _totals(accelerator: Accelerator, objective: Objective, pieces: Sequence[Batch]) -> Batch:
    """:meth:`Objective.totals` of the whole batch: summed over the pieces of every process."""
    with accelerator.autocast():
        each = [objective.totals(piece) for piece in pieces]
    totals = {name: torch.stack([part[name] for part in each]).sum(0) for name in each[0]}
    if accelerator.num_processes > 1:
        totals = {name: accelerator.reduce(value, "sum") for name, value in totals.items()}
    return totals


def _mean_terms(
    accelerator: Accelerator, terms: Sequence[dict[str, Tensor]], late: bool
) -> tuple[dict[str, float], bool]:
    """Means over all parts of the batch, and whether any process is late: all must leave the loop at the same step."""
    names = list(terms[0])
    mean = torch.stack([torch.stack([part[name].detach().float() for name in names]) for part in terms]).mean(0)
    if accelerator.num_processes > 1:
        mean = accelerator.reduce(torch.cat([mean, mean.new_tensor([float(late)])]), "mean")
        late = bool(mean[-1] > 0)
    return dict(zip(names, mean.tolist(), strict=False)), late


def _read_checkpoint(path: Path) -> dict[str, Any]:
    needed = {"identity", "step", "objective", "average", "optimizer"}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise _damaged(path) from error
    if not isinstance(state, dict) or needed - set(state):
        raise _damaged(path)
    return state


def _damaged(path: Path) -> BadInput:
    return BadInput(f"{path} is damaged: delete it to repeat its stage from the beginning, the stages before are kept.")


def _refuse_other_work(
    path: Path, identity: str, made_with: str | None, wanted: str, settings: Mapping[str, Any]
) -> None:
    """Refuse work of another identity, and say which setting differs where that is known."""
    if identity == wanted:
        return
    old = json.loads(made_with) if made_with else {}
    # As JSON, which knows no tuples.
    changed = [name for name, value in json.loads(json.dumps(settings)).items() if old.get(name, value) != value]
    why = f" ({changed[0]} was {old[changed[0]]!r}, now it is {settings[changed[0]]!r})" if changed else ""
    raise BadInput(f"{path} was made with other data or settings{why}: use the same, or choose another --out.")


@contextmanager
def _told_of_a_full_disk(path: Path) -> Iterator[None]:
    """Turn the system's error of a full disk into :class:`BadInput`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise BadInput(
            f"There is no room to write {path} ({os.strerror(error.errno)}): make room and go on with --resume, the "
            "work up to the checkpoint before is kept."
        ) from error


@torch.no_grad()
def _update_average(average: nn.Module, objective: nn.Module, decay: float) -> None:
    pairs = list(zip(average.parameters(), objective.parameters(), strict=True))
    torch._foreach_lerp_([a for a, _ in pairs], [p for _, p in pairs], 1 - decay)


class _Log:
    """Losses of a stage as CSV; rows wait in memory for the next checkpoint, which they must not run behind."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, list[dict[str, Any]]()

    def start(self, step: int) -> None:
        """Keep the whole rows up to ``step``: what a killed run wrote after its checkpoint is done again."""
        if not self.path.exists():
            return
        with self.path.open(newline="", encoding="utf-8") as handle:
            rows = [row for row in csv.DictReader(handle) if None not in row.values() and int(row["step"]) <= step]
        if rows:
            self._write(rows)
        else:
            self.path.unlink()

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        with (
            _told_of_a_full_disk(self.path),
            atomic_path(self.path) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as handle,
        ):
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def flush(self) -> None:
        if self.rows:
            new = not self.path.exists()
            with self.path.open("a", newline="", encoding="utf-8") as handle:
                writer = csv.DictWriter(handle, list(self.rows[0]))
                if new:
                    writer.writeheader()
                writer.writerows(self.rows)
            self.rows = []


def class_weights(label: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """Weight of each cell in the draw of batches, ``[cell]``: ``E ** -alpha`` for its type's effective number ``E``.

    Parameters
    ----------
    label: int ``[cell]``. alpha: 0 draws types as they occur. beta: below 1, ``E = (1 - beta ** n) / (1 - beta)`` for
        ``n`` cells of the type (Cui et al. 2019, arXiv 1901.05555); at 1, its limit ``n``.
    """
    n = np.bincount(label)[label]
    effective = n if beta == 1 else -np.expm1(n * np.log(beta)) / (1 - beta)
    return 1 / effective**alpha


def limited_rows(store: TissueStore, rows: np.ndarray, config: TrainConfig) -> np.ndarray:
    """Rows to learn: at most ``cells_per_donor`` of a donor, drawn at random; ``cells_per_type`` of a type if more.

    The cells of one seed are the same for everyone who learns from a store, so that rivals have no other material.
    """
    draw, donor = rng.stream(config.seed, "cells per donor"), store.cells.donor[rows]
    some = []
    for name in np.unique(donor):
        mine = draw.permutation(rows[donor == name])
        some.append(mine[: config.cells_per_donor])
        if config.cells_per_type:
            kind = store.cells.cell_type[mine]
            some += [mine[kind == one][: config.cells_per_type] for one in np.unique(kind)]
    return np.unique(np.concatenate(some)) if some else rows


def dihedral(tiles: np.ndarray, element: int) -> np.ndarray:
    """Tiles ``[n, H, W, 3]`` turned by ``element % 4`` quarter turns after a reflection if ``element >= 4``."""
    if element >= 4:
        tiles = tiles[:, :, ::-1]
    return np.ascontiguousarray(np.rot90(tiles, element % 4, axes=(1, 2)))


# --- the whole run --------------------------------------------------------------------------------------------------


class Trainer:
    """All stages of one bundle; :meth:`run` is the generator that does the work.

    Parameters
    ----------
    store: the tissue; donors are split by ``store.split()`` and only training donors are learned from.
    scgpt_folder: cell encoder. out: the bundle to be. model, config: sizes and training.
    accelerator: device, precision and processes; by default what ``accelerate`` finds.
    start: a trained bundle of these sizes to go on from, or None to begin from random weights.

    Raises
    ------
    BadInput: a cell type that the model does not have, a split without cells, a ``start`` that does not fit.
    """

    def __init__(
        self,
        store: TissueStore,
        scgpt_folder: str | Path,
        out: str | Path,
        model: ModelConfig,
        config: TrainConfig,
        accelerator: Accelerator | None = None,
        start: GE2Hist | None = None,
    ) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

        if store.tile_px != model.tile_px:
            raise BadInput(
                f"The store is read in tiles of {store.tile_px} px, the model has {model.tile_px} px: use one."
            )

        self.store, self.out, self.config, self.start = store, Path(out), config, start
        self.work = self.out / ".work"
        # The VAE stage leaves classifier and neighbours without a gradient, which several processes must be told.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        # The main process finishes the bundle while the others wait.
        patient = InitProcessGroupKwargs(timeout=timedelta(hours=12))
        self.accelerator = accelerator or Accelerator(
            mixed_precision=config.mixed_precision, kwargs_handlers=[unused, patient]
        )
        self.accelerator.gradient_accumulation_steps = 1  # the launcher's; ours is config.accumulation
        for name in ("batch_size", "autoencoder_batch"):
            share(name, getattr(config, name), self.accelerator.num_processes, 0, config.accumulation)
        self.model = GE2Hist.untrained(model, scgpt_folder, config.seed)
        self._refuse_leaks(self.model)
        if start is not None:
            self._take_over(start)
        if (self.out / "reader.safetensors").exists():
            from ge2hist_core.nuclei import LearnedReader

            self.model.reader = LearnedReader.load(self.out)
        types = np.array(model.cell_types, dtype=object)
        unknown = sorted(set(store.cells.cell_type) - set(types))
        if unknown:
            raise BadInput(f"The store has the cell type {unknown[0]!r}, which is not in the model's configuration.")
        self.label = np.searchsorted(np.sort(types), store.cells.cell_type.astype(str))
        self.label = np.argsort(types.astype(str), kind="stable")[self.label]
        split = store.split()
        self.rows = {name: limited_rows(store, store.rows(donors), config) for name, donors in split.items()}
        for name, rows in self.rows.items():
            if not len(rows):
                raise BadInput(f"The {name} donors have no cell with a whole tile: give more or larger sections.")
        self.neighbours = self._standardised_neighbours()
        self.picture_identity = self._identity(model, "")
        self.embedding_identity = f"{self.picture_identity} {self.model.scgpt.sha256}"
        self.identity = self._identity(model, self.model.scgpt.sha256)

    @property
    def keeps_states(self) -> bool:
        """Whether the VAEs come from the bundle that the run starts from: they speak of its encoder's embeddings."""
        return self.start is not None and self.start.scgpt.sha256 == self.model.scgpt.sha256

    def _take_over(self, start: GE2Hist) -> None:
        """Weights of a trained bundle in place of the random ones."""
        changed = [k for k, v in to_json(start.config).items() if to_json(self.model.config)[k] != v]
        if changed:
            raise BadInput(f"{start.folder} has another {changed[0]} than this run: use its preset and kind of store.")
        self._refuse_leaks(start)
        for part in ("autoencoder", "denoiser", *(["encoder"] if self.keeps_states else [])):
            getattr(self.model, part).load_state_dict(getattr(start, part).state_dict())

    def _refuse_leaks(self, model: GE2Hist) -> None:
        """Nothing that this run builds on may have been trained on donors that its figures are made on."""
        split = self.store.split()
        leaked = sorted(model.has_learned_from(self.store, ("train",)) & {*split["validation"], *split["test"]})
        if leaked:
            raise BadInput(
                f"{model.folder or model.scgpt_folder} has learned from donor {leaked[0]!r}, which this store holds "
                "out: use the store that it was trained on, or donors that it has not seen."
            )

    def _standardised_neighbours(self) -> np.ndarray:
        """Root counts of each type in the tiles of the cells used, ``[row, type]``, 0 +- 1 over training cells."""
        rows = np.concatenate(list(self.rows.values()))
        kinds = np.array([self.model.cell_types.index(name) for name in self.store.cell_types])
        roots = np.zeros((len(self.store), len(self.model.cell_types)), dtype=np.float32)
        roots[np.ix_(rows, kinds)] = np.sqrt(self.store.neighbour_counts(rows))
        train = roots[self.rows["train"]]
        self.root_mean, self.root_std = train.mean(axis=0), np.maximum(train.std(axis=0), 1e-6)
        return (roots - self.root_mean) / self.root_std

    def _identity(self, model: ModelConfig, encoder_sha256: str) -> str:
        """Of what decides the result: everything with the encoder, what concerns pictures alone without it."""
        pictures = ("autoencoder_", "latent_", "cells_per_", "warmup_steps", "ema", "mixed_precision", "seed")
        sizes = ("tile_px", "um_per_px", "latent_", "ae_channels")
        settings = {k: v for k, v in to_json(self.config).items() if k not in _FREE}
        settings = {k: v for k, v in settings.items() if k not in _YOUNGER or v != _YOUNGER[k]}
        network = {k: v for k, v in to_json(model).items() if k != "grain" or v}  # younger than the oldest work
        if not encoder_sha256:
            settings = {k: v for k, v in settings.items() if k.startswith(pictures)}
            network = {k: v for k, v in network.items() if k.startswith(sizes)}
        start = [] if self.start is None else [self.start.sha256]
        digest = hashlib.sha256(json.dumps([network, settings, encoder_sha256, *start]).encode())
        for array in (self.store.cells.counts.data, self.store.cells.counts.indices, self.store.cells.counts.indptr):
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update("\n".join(self.store.cells.cell_id).encode())
        digest.update(self.store.tiles(self.rows["train"][:8]).tobytes())  # another renderer or scanner shows here
        return digest.hexdigest()

    def run(self, deadline: float = float("inf")) -> Iterator[Record]:
        """Go through all stages, from wherever the work folder is; yields a record per step, in every process.

        ``deadline`` (``time.monotonic()``) ends the main stage early; the bundle is written all the same.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        model, config = self.model, self.config
        objective: Objective
        if self.start is None:
            objective = AutoencoderObjective(model.autoencoder, config)
            yield from self._fit(objective, "autoencoder", self._autoencoder_batch, config.autoencoder_steps)
            model.autoencoder.fit_statistics(self._raw_latents())
        yield from self._encode_tiles()
        yield from self._embed()
        self._drop_empty_cells()

        if not self.keeps_states:
            rows = self.rows["train"]
            model.encoder.fit_standardisation(
                torch.from_numpy(self.embedding[rows]), torch.from_numpy(self.label[rows])
            )
            objective = VAEObjective(model.encoder, config)
            yield from self._fit(objective, "vae", self._vae_batch, config.vae_steps)
            objective = StateObjective(model.encoder, model.config, config)
            yield from self._fit(objective, "states", self._states_batch, config.state_steps)
        objective = MainObjective(model.encoder, model.denoiser, model.config, config)
        yield from self._fit(objective, "main", self._main_batch, config.steps, deadline)
        if self.accelerator.is_main_process:
            state = _read_checkpoint(self.work / "main.pt")
            self.finish(state["step"], state.get("seconds"))
        self.accelerator.wait_for_everyone()

    def _fit(
        self,
        objective: Objective,
        stage: str,
        batch: MakeBatch,
        steps: int,
        deadline: float = float("inf"),
    ) -> Iterator[Record]:
        pictures = stage == "autoencoder"
        size = "autoencoder_batch" if pictures else "batch_size"
        return fit(
            stage, objective, batch, self.work, self.accelerator,
            self.picture_identity if pictures else self.identity,
            steps=steps, size=(size, getattr(self.config, size)), config=self.config, settings=self._settings(),
            peak_rate=self.config.autoencoder_learning_rate if pictures else self.config.learning_rate,
            deadline=deadline,
        )  # fmt: skip

    def _settings(self) -> dict[str, Any]:
        """Whatever the identity is made of that has a name, to say what has changed."""
        settings = {name: value for name, value in to_json(self.config).items() if name not in _FREE}
        data = {"store": self.store.path.name, "encoder_sha256": self.model.scgpt.sha256}
        return to_json(self.model.config) | settings | data

    # --- stages that fill an array, block by block ------------------------------------------------------------------

    def _fill(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        block: int,
        read: Callable[[slice], Any],
        compute: Callable[[Any], np.ndarray],
    ) -> Iterator[Record]:
        """Fill ``work/<name>.npy`` in blocks of its first axis with ``compute(read(block))``.

        Processes take turns at the blocks, worker threads read ahead, and what a killed run has filled stays.
        """
        path, mark = self.work / f"{name}.npy", self.work / f"{name}.json"
        identity = self.picture_identity if name == "latents" else self.embedding_identity
        processes, index = self.accelerator.num_processes, self.accelerator.process_index
        done = self._filled(path, mark, identity, shape, dtype)
        self.accelerator.wait_for_everyone()
        array = self._open_array(path, shape, dtype, fresh=not done) if self.accelerator.is_main_process else None

        blocks = [slice(start, min(start + block, shape[0])) for start in range(done, shape[0], block)]
        rounds = [blocks[i : i + processes] for i in range(0, len(blocks), processes)]
        # In the last round some processes may have no block: they compute the last one again.
        mine = [some[min(index, len(some) - 1)] for some in rounds]
        with closing(ahead(read, mine, self.config.workers)) as pieces:
            for some, piece in zip(rounds, pieces, strict=True):
                for part, values in zip(some, self._gathered(compute(piece), block), strict=False):
                    if array is not None:
                        array[part] = values[: part.stop - part.start]
                if array is not None:
                    array.flush()
                    note = {"identity": identity, "done": some[-1].stop, "settings": json.dumps(self._settings())}
                    write_json(mark, note)
                yield Record(name, some[-1].stop, shape[0], {})
        self.accelerator.wait_for_everyone()

    def _filled(self, path: Path, mark: Path, identity: str, shape: tuple[int, ...], dtype: str) -> int:
        """How far an earlier run has filled the array, rows."""
        if not mark.exists():
            return 0
        try:
            state = json.loads(mark.read_text(encoding="utf-8"))
            _refuse_other_work(path, state["identity"], state.get("settings"), identity, self._settings())
            array = np.load(path, mmap_mode="r")
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(array.shape)
        except BadInput:
            raise
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise BadInput(f"{path} or {mark.name} beside it is damaged: delete both to fill it again.") from error
        return int(state["done"])

    @staticmethod
    def _open_array(path: Path, shape: tuple[int, ...], dtype: str, fresh: bool) -> np.memmap:
        if not fresh:
            return np.lib.format.open_memmap(path, mode="r+")
        array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):
            # A mapped file without room on the disk would end the process with a signal later.
            with _told_of_a_full_disk(path), path.open("r+b") as handle:
                os.posix_fallocate(handle.fileno(), 0, path.stat().st_size)
        return array

    def _gathered(self, values: np.ndarray, block: int) -> Sequence[np.ndarray]:
        """The block of each process, in their order, the last padded with zeros."""
        if self.accelerator.num_processes == 1:
            return [values]
        padded = np.zeros((1, block, *values.shape[1:]), dtype=values.dtype)
        padded[0, : len(values)] = values
        # Bytes, which every backend can send.
        sent = torch.from_numpy(padded.reshape(1, -1).view(np.uint8)).to(self.accelerator.device)
        return self.accelerator.gather(sent).cpu().numpy().view(values.dtype).reshape(-1, *padded.shape[1:])

    def _embed(self) -> Iterator[Record]:
        rows = np.sort(np.concatenate(list(self.rows.values())))
        cells, seed, encoder = self.store.cells, self.config.seed, self.model.scgpt
        if self.accelerator.device.type != "cpu":
            from ge2hist_core.embedding import ScGPT

            encoder = ScGPT.load(self.model.scgpt_folder, str(self.accelerator.device))

        def compute(some: Any) -> np.ndarray:
            return encoder.embed(some, seed, on_empty="nan")

        shape = (len(rows), self.model.scgpt.dim)
        yield from self._fill("embeddings", shape, "float32", 512, lambda part: cells.take(rows[part]), compute)
        self.embedding = np.full((len(self.store), self.model.scgpt.dim), np.nan, dtype=np.float32)
        self.embedding[rows] = np.load(self.work / "embeddings.npy")

    def _drop_empty_cells(self) -> None:
        """Cells without a gene that the encoder knows have no embedding; ``latent_rows`` finds the others' latents."""
        self.latent_rows = np.flatnonzero(np.isfinite(self.embedding[self.rows["train"], 0]))
        self.rows = {name: rows[np.isfinite(self.embedding[rows, 0])] for name, rows in self.rows.items()}
        label = self.label[self.rows["train"]]
        weight = class_weights(label, self.config.class_alpha, self.config.class_beta)
        self.cumulative = np.cumsum(weight) / weight.sum()

    def _encode_tiles(self) -> Iterator[Record]:
        rows, m, autoencoder = self.rows["train"], self.model.config, self.model.autoencoder
        variants = _VARIANTS[: self.config.latent_variants]

        def compute(tiles: np.ndarray) -> np.ndarray:
            latents = [autoencoder.encode(dihedral(tiles, element)) for element in variants]
            return torch.stack(latents, dim=1).cpu().numpy().astype(np.float16)

        shape = (len(rows), len(variants), m.latent_channels, m.latent_px, m.latent_px)
        autoencoder.to(self.accelerator.device)
        yield from self._fill("latents", shape, "float16", 64, lambda part: self.store.tiles(rows[part]), compute)
        autoencoder.to("cpu")
        self.latents = np.load(self.work / "latents.npy", mmap_mode="r")

    def _raw_latents(self) -> Tensor:
        rows = rng.stream(self.config.seed, "latent statistics").permutation(self.rows["train"])[:1024]
        tiles = self.store.tiles(rows)
        encode = self.model.autoencoder.encode  # statistics are still 0 and 1 here
        return torch.cat([encode(tiles[i : i + 64]) for i in range(0, len(tiles), 64)])

    # --- batches: all is drawn for the whole step, then loaded for the part that is asked for -------------------------

    def _stream(self, stage: str, step: int) -> np.random.Generator:
        # The 0 was the index of the process when each had a batch of its own; runs of one process stay what they were.
        return rng.stream(self.config.seed, f"{stage} batch", step, 0)

    def _autoencoder_batch(self, step: int, part: slice = _WHOLE) -> Batch:
        g, n, m = self._stream("autoencoder", step), self.config.autoencoder_batch, self.model.config
        rows = self.rows["train"][g.integers(len(self.rows["train"]), size=n)][part]
        pixels = from_uint8(dihedral(self.store.tiles(rows), int(g.integers(8))))
        noise = g.standard_normal((n, m.latent_channels, m.latent_px, m.latent_px), dtype=np.float32)
        return {"pixels": pixels, "noise": torch.from_numpy(noise[part])}

    def _state_batch(self, g: np.random.Generator, part: slice = _WHOLE) -> tuple[np.ndarray, Batch]:
        n, m = self.config.batch_size, self.model.config
        chosen = np.searchsorted(self.cumulative, g.random(n), side="right").clip(max=len(self.cumulative) - 1)[part]
        rows = self.rows["train"][chosen]
        return chosen, {
            "embedding": torch.from_numpy(self.embedding[rows]),
            "label": torch.from_numpy(self.label[rows]),
            "neighbours": torch.from_numpy(self.neighbours[rows]),
            "eps_c": torch.from_numpy(g.standard_normal((n, m.d_c), dtype=np.float32)[part]),
            "eps_e": torch.from_numpy(g.standard_normal((n, m.d_e), dtype=np.float32)[part]),
        }

    def _vae_batch(self, step: int, part: slice = _WHOLE) -> Batch:
        return self._state_batch(self._stream("vae", step), part)[1]

    def _states_batch(self, step: int, part: slice = _WHOLE) -> Batch:
        return self._state_batch(self._stream("states", step), part)[1]

    def _main_batch(self, step: int, part: slice = _WHOLE) -> Batch:
        g = self._stream("main", step)
        chosen, batch = self._state_batch(g, part)
        n, steps = self.config.batch_size, self.model.config.train_timesteps
        variant = g.integers(self.latents.shape[1], size=n)[part]
        latent = self.latents[self.latent_rows[chosen], variant].astype(np.float32)
        times = (np.arange(n) + g.random(n)) / n * steps
        noise = g.standard_normal((n, *latent.shape[1:]), dtype=np.float32)[part]
        return {
            **batch,
            "latent": torch.from_numpy(latent),
            "noise": torch.from_numpy(noise),
            "t": torch.from_numpy(times.astype(np.int64).clip(max=steps - 1)[part]),
            "drop": torch.from_numpy((g.random(n) < self.config.condition_dropout)[part]),
        }

    # --- after the training ---------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _means(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        q_c, q_e = self.model.encoder(torch.from_numpy(self.embedding[rows]))
        return q_c.loc.numpy(), q_e.loc.numpy()

    def _some(self, name: str, n: int) -> np.ndarray:
        return np.sort(rng.stream(self.config.seed, "subset", name).permutation(self.rows[name])[:n])

    def finish(self, steps_done: int, seconds: float | None = None) -> None:
        """Fit the mixture and the support, judge the separation, write the bundle."""
        model, seed = self.model, self.config.seed
        model.denoiser.round_to_half()
        train = self.rows["train"]
        model.mixture = fit_mixture(self._means(train)[0], self.label[train], len(model.cell_types), seed)
        reference, held_out = self._some("train", 3000), self._some("validation", 2000)
        ids = self.store.cells.cell_id[reference]
        model.support = Support.fit(self.embedding[reference], ids, self.embedding[held_out])
        model.report = {
            "data": self.store.path.name,
            **self.store.provenance,
            "cells": {name: len(rows) for name, rows in self.rows.items()},
            "steps": steps_done,
            "seconds": seconds,
            "device": device_name(self.accelerator.device),
            "train": to_json(self.config),
            "started_from": None
            if self.start is None
            else {"bundle_sha256": self.start.sha256, "training": self.start.report},
            "neighbours": {
                name: {"root_mean": float(mean), "root_std": float(std)}
                for name, mean, std in zip(model.cell_types, self.root_mean, self.root_std, strict=True)
            },
            "separation": self.separation(),
            "autoencoder_psnr_db": self._psnr(),
        }
        model.save(self.out)

    def separation(self) -> dict[str, Any]:
        """Does z_c hold the type and z_e the environment? All figures on donors never trained on.

        Returns
        -------
        ``classifier_accuracy`` (and of the validation donors); ``classifier_recall`` of each type that the test donors
        have and their mean, ``classifier_balanced_accuracy``, which a rare type lowers as much as a frequent one;
        ``active_units`` of both halves; balanced accuracy of
        a linear probe of the type from each half (``chance`` = 1 / types); ``neighbours_r2``: share of the variance of
        each type's root count in the tile that both halves together explain; R2 of linear probes of every
        ``programme_*`` column that the store knows.
        """
        rows = {"train": self._some("train", 5000), "test": self._some("test", 5000)}
        z = {name: dict(zip(("z_c", "z_e"), self._means(some), strict=True)) for name, some in rows.items()}
        label = {name: self.label[some] for name, some in rows.items()}
        report: dict[str, Any] = {
            "classifier_accuracy": float(self._right("test").mean()),
            "classifier_accuracy_validation": float(self._right("validation").mean()),
            **self._recall(),
            "chance": 1 / len(np.unique(label["test"])),
            "neighbours_r2": self._neighbours_r2(z["test"], self.neighbours[rows["test"]]),
        }
        programmes = [name for name in self.store.obs.columns if name.startswith("programme_")]
        values = {name: self.store.obs[programmes].to_numpy()[some] for name, some in rows.items()}
        for half in ("z_c", "z_e"):
            fitted, asked = z["train"][half], z["test"][half]
            report[f"active_units_{half}"] = active_units(asked)
            report[f"type_accuracy_{half}"] = probe_accuracy(fitted, label["train"], asked, label["test"])
            if programmes:
                r2 = probe_r2(fitted, values["train"], asked, values["test"])
                report[f"r2_{half}"] = {
                    name.removeprefix("programme_"): float(value) for name, value in zip(programmes, r2, strict=True)
                }
        return report

    @torch.inference_mode()
    def _neighbours_r2(self, z: dict[str, np.ndarray], true: np.ndarray) -> dict[str, float | None]:
        both = torch.from_numpy(z["z_c"]), torch.from_numpy(z["z_e"])
        error = ((self.model.encoder.niche_vae.expected_neighbours(*both).numpy() - true) ** 2).mean(axis=0)
        spread = true.var(axis=0)
        return {
            name: 1 - float(e / s) if s > 0 else None
            for name, e, s in zip(self.model.cell_types, error, spread, strict=True)
        }

    @torch.inference_mode()
    def _right(self, name: str) -> np.ndarray:
        """bool ``[cell]``: the classifier names the cell's type."""
        rows = self.rows[name]
        logits = self.model.encoder.type_vae.logits(torch.from_numpy(self._means(rows)[0]))
        return logits.argmax(1).numpy() == self.label[rows]

    def _recall(self) -> dict[str, Any]:
        right, label = self._right("test"), self.label[self.rows["test"]]
        recall = {self.model.cell_types[kind]: float(right[label == kind].mean()) for kind in np.unique(label)}
        return {"classifier_recall": recall, "classifier_balanced_accuracy": float(np.mean([*recall.values()]))}

    def _psnr(self) -> float:
        tiles = self.store.tiles(self._some("test", 256))
        return psnr(self.model.autoencoder.decode(self.model.autoencoder.encode(tiles)), tiles)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, nargs="?", metavar="DATA.zarr")
    parser.add_argument("--scgpt", type=Path, metavar="DIR", help="folder of a scGPT checkpoint")
    parser.add_argument("--out", type=Path, metavar="BUNDLE")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="demo")
    parser.add_argument(
        "--config", type=Path, metavar="FILE.json", help='fields in place of the preset\'s: {"model": {}, "train": {}}'
    )
    parser.add_argument("--steps", type=int, help="of the main training; may be raised on a later --resume")
    parser.add_argument("--minutes", type=float, help="of this run; then the bundle is written, --resume goes on")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"))
    parser.add_argument("--accumulation", type=int, metavar="N", help="parts in which a process takes its batch")
    parser.add_argument("--workers", type=int, metavar="N", help="threads that load ahead; 0 for none")
    parser.add_argument("--class-alpha", type=float, metavar="A", help="0: types as they occur, 1: all alike")
    parser.add_argument("--class-beta", type=float, metavar="B", help="of the effective number of cells; 1: the number")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--start-from", type=Path, metavar="BUNDLE", help="a finished bundle to train on from")
    parser.add_argument("--freeze-encoder", action="store_true", help="train the U-Net alone in the main stage")
    parser.add_argument("--tensorboard", action="store_true", help="write the losses for TensorBoard, too")
    parser.add_argument("--resume", action="store_true", help="go on with the work in BUNDLE")
    parser.add_argument("--cost", action="store_true", help="only say what the training would cost on one GPU")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of that GPU, bf16 without sparsity")
    parser.add_argument("--utilisation", type=float, default=0.2, help="share of the peak that is reached, assumed")


def preset_of(args: argparse.Namespace) -> Preset:
    """The preset with the fields of ``--config`` and of the options in place of its own."""
    preset, changes = PRESETS[args.preset], {}
    if args.config is not None:
        try:
            content = args.config.read_bytes()
        except OSError as error:
            raise BadInput(f"{args.config} cannot be read ({error}): see --config in --help.") from error
        changes = parse_json(content, str(args.config), "see --config in --help")
        if not isinstance(changes, dict) or not all(isinstance(part, dict) for part in changes.values()):
            raise BadInput(f'{args.config} must hold {{"model": {{...}}, "train": {{...}}}}.')
        if unknown := sorted(set(changes) - {"model", "train"}):
            raise BadInput(f"{args.config} has the part {unknown[0]!r}: known are model and train.")
    names = ("steps", "mixed_precision", "seed", "accumulation", "workers", "class_alpha", "class_beta")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    model = from_json(ModelConfig, to_json(preset.model) | changes.get("model", {}))
    train = from_json(TrainConfig, to_json(preset.train) | changes.get("train", {}) | given)
    return Preset(model, replace(train, freeze_encoder=train.freeze_encoder or args.freeze_encoder))


def _writer(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise BadInput(
            "--tensorboard needs a package that is not installed: `pip install tensorboard`, or read the CSV files in "
            f"{out / '.work'}."
        ) from error
    return SummaryWriter(str(out / ".work" / "tensorboard"))


def main(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ge2hist_core.embedding import ScGPT
    from ge2hist_core.store import TissueStore

    deadline = float("inf") if args.minutes is None else time.monotonic() + 60 * args.minutes
    if args.steps is not None and args.steps < 1:
        raise BadInput(f"--steps is {args.steps}: give at least 1.")
    preset = preset_of(args)
    if args.cost:
        from ge2hist_core.training_cost import Gpu, cost_table

        print(cost_table(args.preset, preset, Gpu(args.peak_tflops, args.utilisation)))
        return
    if missing := [name for name in ("data", "scgpt", "out") if getattr(args, name) is None]:
        raise BadInput(f"{'DATA.zarr' if missing[0] == 'data' else '--' + missing[0]} is not given: see --help.")
    if (args.out / ".work").exists() and not args.resume:
        raise BadInput(f"{args.out} holds the work of another run: go on with --resume, or choose another --out.")
    store = TissueStore(args.data, preset.model.tile_px)
    start = None if args.start_from is None else GE2Hist.load(args.start_from)
    model = replace(
        preset.model,
        grain=preset.model.grain if start is None else start.config.grain,
        embedding_dim=ScGPT.load(args.scgpt).dim,
        um_per_px=store.um_per_px,
        cell_types=CELL_TYPES if set(store.cell_types) <= set(CELL_TYPES) else store.cell_types,
    )
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or max(1, cores)))
    trainer = Trainer(store, args.scgpt, args.out, model, preset.train, start=start)
    main_process = trainer.accelerator.is_main_process
    writer = _writer(args.out) if args.tensorboard and main_process else None
    bar: tqdm | None = None
    for record in trainer.run(deadline):
        if bar is None or bar.desc.rstrip(": ") != record.stage:
            if bar is not None:
                bar.close()
            bar = tqdm(total=record.total, desc=record.stage, disable=not main_process)
        bar.update(record.step - bar.n)
        bar.set_postfix({name: f"{value:.3f}" for name, value in record.terms.items()}, refresh=False)
        if writer is not None:
            for name, value in record.terms.items():
                writer.add_scalar(f"{record.stage}/{name}", value, record.step)
    if bar is not None:
        bar.close()
    if writer is not None:
        writer.close()
    if main_process:
        print(json.dumps(trainer.model.report and trainer.model.report["separation"], indent=1))
    trainer.accelerator.end_training()
