"""What a training costs on one GPU: floating point operations counted over real steps, hours from an assumed GPU.

``python -m ge2hist_core train --preset paper --cost`` runs one forward and backward pass of each stage on a single
cell, at the preset's full sizes, under Torch's own counter (a multiply-add is two operations; convolutions and matrix
products are counted, all else is left out). Operations grow in proportion to the batch. The hours stand and fall with
the utilisation, which is an assumption, not a measurement: ``hours = operations / (peak * utilisation)``. Encoding the
tiles and embedding the cells is one forward pass each and is left out, as is the wait for data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ge2hist_core import rng
from ge2hist_core.autoencoder import TileAutoencoder
from ge2hist_core.config import ModelConfig, Preset, TrainConfig, from_json
from ge2hist_core.decoder_training import DecoderObjective, PatchCritic
from ge2hist_core.denoiser import Denoiser
from ge2hist_core.training import AutoencoderObjective, Batch, MainObjective, Objective, StateObjective, VAEObjective
from ge2hist_core.types import BadInput
from ge2hist_core.vae import StateEncoder

__all__ = ["Gpu", "StageCost", "cost_table", "hours", "random_batch", "stage_costs", "training_macs"]


@dataclass(frozen=True)
class Gpu:
    """``peak_tflops``: 10^12 operations per second at the best (989: NVIDIA H100 SXM, bf16, data sheet);
    ``utilisation``: share of it that training reaches, from 0 to 1."""

    peak_tflops: float = 989.0
    utilisation: float = 0.2

    def __post_init__(self) -> None:
        if not self.peak_tflops > 0:
            raise BadInput(f"peak_tflops is {self.peak_tflops!r}: give a number above 0.")
        if not 0 < self.utilisation <= 1:
            raise BadInput(f"utilisation is {self.utilisation!r}: give a number above 0, 1 at the most.")


@dataclass(frozen=True)
class StageCost:
    """Forward and backward passes of one stage: ``flops_per_cell`` is counted, ``batch`` and ``steps`` are settings."""

    stage: str
    parameters: int
    flops_per_cell: int
    batch: int
    steps: int

    @property
    def flops_per_step(self) -> int:
        return self.flops_per_cell * self.batch

    @property
    def flops(self) -> int:
        return self.flops_per_step * self.steps


def hours(flops: float, gpu: Gpu) -> float:
    """Time for so many operations on this GPU."""
    return flops / (gpu.peak_tflops * 1e12 * gpu.utilisation) / 3600


def random_batch(model: ModelConfig, n: int) -> Batch:
    """Whatever any stage asks of a batch, for ``n`` cells; values have the right kind and no meaning."""
    latent, pixels = (n, model.latent_channels, model.latent_px, model.latent_px), (n, 3, model.tile_px, model.tile_px)
    draw = rng.stream(0, "cost")
    return {
        "pixels": rng.normal(0, "cost pixels", pixels).clamp(-1, 1),
        "embedding": rng.normal(0, "cost embedding", (n, model.embedding_dim)),
        "label": torch.from_numpy(draw.integers(len(model.cell_types), size=n)),
        "neighbours": rng.normal(0, "cost neighbours", (n, len(model.cell_types))),
        "eps_c": rng.normal(0, "cost eps_c", (n, model.d_c)),
        "eps_e": rng.normal(0, "cost eps_e", (n, model.d_e)),
        "latent": rng.normal(0, "cost latent", latent),
        "noise": rng.normal(0, "cost noise", latent),
        "t": torch.from_numpy(draw.integers(model.train_timesteps, size=n)),
        "drop": torch.zeros(n, dtype=torch.bool),
        "tiles": torch.zeros((n, model.tile_px, model.tile_px, 3), dtype=torch.uint8),
        "grain": rng.normal(0, "cost grain", (n, 48, 2 * model.latent_px, 2 * model.latent_px)),
    }


def measured_flops(objective: Objective, batch: Batch) -> int:
    """Operations of one forward and backward pass."""
    with FlopCounterMode(display=False) as counter:
        objective(batch)["loss"].backward()
    objective.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


def stage_costs(preset: Preset) -> list[StageCost]:
    """Cost of every stage that takes gradient steps, in their order."""
    model, train = preset.model, preset.train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        autoencoder, encoder, denoiser = TileAutoencoder(model), StateEncoder(model), Denoiser(model)
    stages: list[tuple[str, Objective, int, int]] = [
        ("autoencoder", AutoencoderObjective(autoencoder, train), train.autoencoder_batch, train.autoencoder_steps),
        ("vae", VAEObjective(encoder, train), train.batch_size, train.vae_steps),
        ("states", StateObjective(encoder, model, train), train.batch_size, train.state_steps),
        ("main", MainObjective(encoder, denoiser, model, train), train.batch_size, train.steps),
    ]
    batch = random_batch(model, 1)
    return [
        StageCost(name, sum(p.numel() for p in objective.parameters()), measured_flops(objective, batch), size, steps)
        for name, objective, size, steps in stages
    ]


def training_macs(model: ModelConfig, report: Mapping[str, Any]) -> int:
    """Multiply-accumulates of all gradient steps behind a bundle, as the rivals count theirs.

    Every run of ``train`` that its report names (of the first one the autoencoder, too) and of ``train-decoder``. The
    cell encoder's pre-training and the short training of the VAEs are left out.
    """
    total, run = 0, report if report.get("train") else None
    decoder = report.get("decoder")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        autoencoder = TileAutoencoder(model)
        if decoder:
            per_tile = measured_flops(DecoderObjective(autoencoder, PatchCritic(), 0.0), random_batch(model, 1))
        costs = {c.stage: c.flops_per_cell for c in stage_costs(Preset(model, TrainConfig()))}
    while run:
        train, before = from_json(TrainConfig, dict(run["train"])), run.get("started_from")
        total += costs["main"] * train.batch_size * (run["steps"] or train.steps)
        if not before:
            total += costs["autoencoder"] * train.autoencoder_batch * train.autoencoder_steps
        run = before and before["training"]
    while decoder:
        total += per_tile * decoder["train"]["autoencoder_batch"] * decoder["steps"]
        decoder = decoder.get("started_from")
    return total // 2


def cost_table(name: str, preset: Preset, gpu: Gpu) -> str:
    """The costs as text, with the assumptions in the last lines."""
    costs = stage_costs(preset)
    lines = [f"{'stage':<12}{'parameters':>12}{'GFLOP/cell':>12}{'batch':>7}{'GFLOP/step':>12}{'steps':>9}{'hours':>9}"]
    for c in costs:
        lines.append(
            f"{c.stage:<12}{c.parameters:>12,}{c.flops_per_cell / 1e9:>12.3f}{c.batch:>7}"
            f"{c.flops_per_step / 1e9:>12.1f}{c.steps:>9,}{hours(c.flops, gpu):>9.2f}"
        )
    total = sum(c.flops for c in costs)
    return "\n".join(
        [
            *lines,
            f"Preset {name}, {preset.model.tile_px} px tiles: {total / 1e15:,.1f} PFLOP in all, "
            f"{hours(total, gpu):.1f} h on one GPU of {gpu.peak_tflops:g} TFLOP/s at a utilisation of "
            f"{gpu.utilisation:.0%}.",
            "Operations are counted over one real step of each stage; peak and utilisation are assumptions "
            "(--peak-tflops, --utilisation).",
        ]
    )
