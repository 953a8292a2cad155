"""Give a bundle's decoder fine texture: ``python -m ge2hist_core train-decoder BUNDLE DATA.zarr``.

The decoder that ``train`` leaves draws the mean of all pictures that a latent may stand for: nuclei and fibres in their
places, without grain. Here it goes on from there against a critic, with noise to make the grain from
(:mod:`ge2hist_core.autoencoder`). Encoder and latents stay as they are, so U-Net, VAEs and reader go on fitting; gates,
which know the decoder's pictures, are removed and must be fitted again.

Loss of the decoder, as in VQGAN (Esser et al. 2021, arXiv 2012.09841, equation 7): a reconstruction and the critic's
score, weighed so that at the decoder's last layer the score's gradient has ``adversarial`` times the length of the
reconstruction's. What differs:

- The reconstruction is compared after averaging 2 x 2 pixels, and with a tenth of the weight at full resolution: it
  holds structures in place and leaves the grain to the critic.
- The critic sees patches of 26 px (13 um at 0.5 um per px, a nucleus and its rim): texture is local, and what is
  farther apart is the diffusion model's to arrange.
- Hinge loss, spectral normalisation (Miyato et al. 2018, arXiv 1802.05957).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ge2hist_core import rng
from ge2hist_core.autoencoder import TileAutoencoder, autoencoder_loss, from_uint8, psnr
from ge2hist_core.config import TrainConfig, to_json
from ge2hist_core.model import GE2Hist
from ge2hist_core.training import Batch, Objective, Record, device_name, dihedral, fit, limited_rows
from ge2hist_core.types import BadInput

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ge2hist_core.store import TissueStore

__all__ = ["DecoderObjective", "PatchCritic", "add_arguments", "main", "train_decoder"]

ADVERSARIAL = 2.0
"""The usual pull of the critic: at 0.5 reconstruction won, and texture stayed half way."""
FULL_RESOLUTION = 0.1
_REPORTED = (
    "autoencoder_batch", "autoencoder_learning_rate", "latent_noise", "cells_per_donor", "warmup_steps", "ema",
    "mixed_precision", "seed",
)  # fmt: skip
BETAS = (0.5, 0.9)
"""Adam's, as adversarial training has them; 0.9 for the first lets decoder and critic run past each other."""


class PatchCritic(nn.Module):
    """Pixels ``[n, 3, H, W]`` -> score of every patch ``[n, 1, h, w]``, large for real ones."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        sizes = ((3, width, 4, 2), (width, 2 * width, 4, 2), (2 * width, 4 * width, 3, 1), (4 * width, 1, 3, 1))
        layers: list[nn.Module] = []
        for inputs, outputs, kernel, stride in sizes:
            conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=1)
            layers += [nn.utils.parametrizations.spectral_norm(conv), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)


class DecoderObjective(Objective):
    """Losses of decoder and critic in one pass, each with the other held; batch: ``tiles, noise, grain``.

    ``rec`` and ``adversarial`` are the decoder's terms, ``critic`` is the critic's; ``balance`` is the weight of
    ``adversarial``.
    """

    def __init__(
        self, autoencoder: TileAutoencoder, critic: PatchCritic, noise_level: float, adversarial: float = ADVERSARIAL
    ) -> None:
        super().__init__()
        self.autoencoder, self.critic = autoencoder, critic
        self.noise_level, self.adversarial = noise_level, adversarial

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        part, real = self.autoencoder, from_uint8(batch["tiles"])
        with torch.no_grad():
            raw = part.encoder(real).float()
        drawn = part.picture(raw + self.noise_level * part.latent_std * batch["noise"], batch["grain"]).float()
        coarse = autoencoder_loss(F.avg_pool2d(drawn, 2), F.avg_pool2d(real, 2))
        rec = coarse["l1"] + coarse["gradient"] + FULL_RESOLUTION * (drawn - real).abs().mean()
        self.critic.requires_grad_(False)
        adversarial = -self.critic(drawn).float().mean()
        self.critic.requires_grad_(True)
        balance = self._balance(rec, adversarial) if torch.is_grad_enabled() else rec.new_tensor(0.0)
        critic = F.relu(1 - self.critic(real).float()).mean() + F.relu(1 + self.critic(drawn.detach()).float()).mean()
        loss = rec + balance * adversarial + critic
        return {"loss": loss, "rec": rec, "adversarial": adversarial, "critic": critic, "balance": balance}

    def _balance(self, rec: Tensor, adversarial: Tensor) -> Tensor:
        last: Any = self.autoencoder.decoder[-2]
        lengths = [torch.autograd.grad(t, last.weight, retain_graph=True)[0].norm() for t in (rec, adversarial)]
        return self.adversarial * (lengths[0] / (lengths[1] + 1e-6)).clamp(max=1e4)


def train_decoder(
    model: GE2Hist,
    store: TissueStore,
    config: TrainConfig,
    work: Path,
    accelerator: Accelerator | None = None,
    deadline: float = float("inf"),
    adversarial: float = ADVERSARIAL,
) -> Iterator[Record]:
    """Train the decoder on in place; a record per step. ``model`` has grain and its new decoder when it ends, no gates.

    Parameters
    ----------
    model: a trained bundle. store: the tissue it was trained on. config: of this training; ``autoencoder_steps``,
        ``autoencoder_batch`` and ``autoencoder_learning_rate`` are its length, batch and rate.
    work: folder of the checkpoint; a run goes on from there. adversarial: pull of the critic, in that of the
        reconstruction.

    Raises
    ------
    BadInput: another store than the bundle's; a checkpoint of another run.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    if (model.report or {}).get("store") != store.identity:
        raise BadInput(f"{store.path} is not the tissue that the bundle was trained on: give that one.")
    if accelerator is None:
        handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
        accelerator = Accelerator(mixed_precision=config.mixed_precision, kwargs_handlers=handlers)
    rows = limited_rows(store, store.rows(store.split()["train"]), config)
    test = rng.stream(config.seed, "subset", "test").permutation(store.rows(store.split()["test"]))[:256]
    judged = store.tiles(np.sort(test))
    before = psnr(model.autoencoder.decode(model.autoencoder.encode(judged)), judged)
    digest = hashlib.sha256(json.dumps([to_json(model.config), store.identity]).encode())
    for value in model.autoencoder.state_dict().values():
        digest.update(value.numpy().tobytes())
    free = ("accumulation", "workers", "checkpoint_every", "autoencoder_steps")  # a resumed run may change these
    settings = {k: v for k, v in to_json(config).items() if k not in free} | {"adversarial": adversarial}
    digest.update(json.dumps(settings, sort_keys=True).encode())

    if not model.config.grain:
        model.config = replace(model.config, grain=True)
        old = model.autoencoder.state_dict()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.stream(config.seed, "grain weights").integers(2**63)))
            model.autoencoder = TileAutoencoder(model.config)
        model.autoencoder.load_state_dict({**model.autoencoder.state_dict(), **old})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.stream(config.seed, "critic weights").integers(2**63)))
        critic = PatchCritic()
    m, n = model.config, config.autoencoder_batch
    grain = (n, 3 * 16, 2 * m.latent_px, 2 * m.latent_px)

    def batch(step: int, part: slice) -> Batch:
        g = rng.stream(config.seed, "decoder batch", step)
        chosen = rows[g.integers(len(rows), size=n)][part]
        tiles = dihedral(store.tiles(chosen), int(g.integers(8)))
        noise = g.standard_normal((n, m.latent_channels, m.latent_px, m.latent_px), dtype=np.float32)
        drawn = g.standard_normal(grain, dtype=np.float32)
        values = {"tiles": tiles, "noise": noise[part], "grain": drawn[part]}
        return {name: torch.from_numpy(value) for name, value in values.items()}

    work.mkdir(parents=True, exist_ok=True)
    objective, began = DecoderObjective(model.autoencoder, critic, config.latent_noise, adversarial), time.monotonic()
    last = Record("decoder", 0, config.autoencoder_steps, {})
    for record in fit(
        "decoder", objective, batch, work, accelerator, digest.hexdigest(),
        steps=config.autoencoder_steps, size=("autoencoder_batch", n), config=config, settings=settings,
        peak_rate=config.autoencoder_learning_rate, deadline=deadline, betas=BETAS,
    ):  # fmt: skip
        last = record
        yield record
    model.gates, earlier = None, (model.report or {}).get("decoder")
    model.report = {
        **(model.report or {}),
        "autoencoder_psnr_db": psnr(model.autoencoder.decode(model.autoencoder.encode(judged)), judged),
        "decoder": {
            "steps": last.step,
            "seconds": time.monotonic() - began,
            "device": device_name(accelerator.device),
            "psnr_db_before": before,
            "terms": last.terms,
            "train": {name: getattr(config, name) for name in _REPORTED} | {"adversarial": adversarial},
            "started_from": earlier,
        },
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="its decoder is exchanged, its gates are removed")
    parser.add_argument("data", type=Path, metavar="DATA.zarr", help="the store that the bundle was trained on")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument(
        "--adversarial", type=float, default=ADVERSARIAL, metavar="W", help="pull of the critic (default %(default)g)"
    )
    parser.add_argument("--minutes", type=float, help="of this run; --resume goes on")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="threads that load ahead; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on with the work in BUNDLE")


def main(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ge2hist_core.store import TissueStore

    deadline = float("inf") if args.minutes is None else time.monotonic() + 60 * args.minutes
    for name, value in (("--steps", args.steps), ("--batch-size", args.batch_size)):
        if value < 1:
            raise BadInput(f"{name} is {value}: give at least 1.")
    if not args.adversarial > 0:
        raise BadInput(f"--adversarial is {args.adversarial}: give a number above 0.")
    work = args.bundle / ".decoder"
    if work.exists() and not args.resume:
        raise BadInput(f"{args.bundle} holds the work of another run: go on with --resume, or remove {work}.")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    model = GE2Hist.load(args.bundle, gates=False)
    config = TrainConfig(
        autoencoder_steps=args.steps, autoencoder_batch=args.batch_size, autoencoder_learning_rate=args.learning_rate,
        mixed_precision=args.mixed_precision, workers=args.workers, seed=args.seed,
    )  # fmt: skip
    store = TissueStore(args.data, model.config.tile_px)
    with tqdm(total=args.steps, unit="step", desc="decoder") as bar:
        for record in train_decoder(model, store, config, work, deadline=deadline, adversarial=args.adversarial):
            bar.update(record.step - bar.n)
            bar.set_postfix({name: f"{value:.3f}" for name, value in record.terms.items()}, refresh=False)
    decoder = (model.report or {})["decoder"]
    if decoder["steps"] < args.steps:
        print(f"paused after step {decoder['steps']}; the bundle is as it was, --resume goes on")
        return
    model.save(args.bundle)
    shutil.rmtree(work)
    print(json.dumps(decoder, indent=1))
