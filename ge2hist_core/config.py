"""Configuration is data: frozen dataclasses, presets, JSON. Also the vocabulary of cell types."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ge2hist_core.types import BadInput

__all__ = [
    "CELL_TYPES",
    "PRESETS",
    "READER_CLASSES",
    "TILE_PX",
    "UM_PER_PX",
    "VISIBLE_CLASS",
    "ModelConfig",
    "SampleConfig",
    "TrainConfig",
    "from_json",
    "to_json",
]

TILE_PX = 128
UM_PER_PX = 0.5

CELL_TYPES = (
    "Tumour epithelium",
    "Proliferating tumour",
    "Luminal epithelium",
    "Fibroblast",
    "Endothelium",
    "CD4 T cell",
    "CD8 T cell",
    "B cell",
    "Plasma cell",
    "Macrophage",
)
"""Cell types of the known-truth tissue, the order is that of every type axis."""

VISIBLE_CLASS = {name: "Lymphocyte" if name in ("CD4 T cell", "CD8 T cell", "B cell") else name for name in CELL_TYPES}
"""What H&E can tell apart: CD4 T, CD8 T and B cells are all small round lymphocytes."""

READER_CLASSES = tuple(dict.fromkeys(VISIBLE_CLASS.values()))
"""Classes that the nuclei reader names; composition is counted over these."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of every trained part. ``d_c + d_e`` is the paper's 64-D z_s.

    ``grain``: the decoder draws fine texture from noise; ``train-decoder`` turns it on.
    """

    embedding_dim: int = 256
    d_c: int = 32
    d_e: int = 32
    vae_hidden: int = 256
    tile_px: int = TILE_PX
    um_per_px: float = UM_PER_PX
    latent_px: int = 16
    latent_channels: int = 8
    ae_channels: tuple[int, ...] = (64, 128)
    grain: bool = False
    unet_channels: tuple[int, ...] = (96, 128, 160)
    layers_per_block: int = 1
    attention_heads: int = 4
    time_embedding_dim: int = 256
    condition_tokens: int = 8
    condition_dim: int = 128
    train_timesteps: int = 1000
    cell_types: tuple[str, ...] = CELL_TYPES


@dataclass(frozen=True)
class TrainConfig:
    """How the parts are trained. ``beta`` and ``gamma`` are the paper's, equation (9).

    ``type_prior``, ``type_leak``, ``reconstruction`` and ``neighbours`` weigh the terms that keep type and environment
    apart (see :mod:`ge2hist_core.vae`), ``state_steps`` is how long they act on the VAEs before the U-Net comes in,
    ``freeze_encoder`` leaves the VAEs as they are from then on and trains the U-Net alone, ``latent_noise`` is the
    noise on the autoencoder's latents in their standard deviations, ``latent_variants`` how many of a tile's eight
    rotations and reflections are encoded, ``cells_per_donor`` how many cells of a donor are used at the most, and
    ``cells_per_type`` how many of each type and donor are used even beyond that.

    A cell is drawn with a weight of ``E ** -class_alpha``, where ``E = (1 - class_beta ** n) / (1 - class_beta)`` is
    the effective number of its type's ``n`` training cells (Cui et al. 2019, arXiv 1901.05555): ``class_beta`` 1 is
    ``n`` itself, below it numbers beyond ``1 / (1 - class_beta)`` count alike. ``class_alpha`` 0 draws types as they
    occur, 1 with ``class_beta`` 1 all alike.

    ``batch_size`` and ``autoencoder_batch`` are those of one step, all processes together. A process takes its share in
    ``accumulation`` parts, one after the other, and ``workers`` threads load ahead; neither changes the result.
    """

    steps: int = 20000
    batch_size: int = 32
    learning_rate: float = 3e-4
    warmup_steps: int = 300
    ema: float = 0.999
    beta: float = 0.2
    gamma: float = 0.1
    type_prior: float = 1.0
    type_leak: float = 0.3
    reconstruction: float = 0.1
    neighbours: float = 1.0
    freeze_encoder: bool = False
    condition_dropout: float = 0.1
    vae_steps: int = 2000
    state_steps: int = 4000
    autoencoder_steps: int = 2000
    autoencoder_batch: int = 16
    autoencoder_learning_rate: float = 1e-3
    latent_noise: float = 0.05
    latent_variants: int = 2
    cells_per_donor: int = 400
    checkpoint_every: int = 250
    mixed_precision: str = "no"
    seed: int = 0
    cells_per_type: int = 0
    class_alpha: float = 0.5
    class_beta: float = 1.0
    accumulation: int = 1
    workers: int = 0

    def __post_init__(self) -> None:
        if self.mixed_precision not in ("no", "bf16"):
            raise BadInput(f"mixed_precision is {self.mixed_precision!r}: choose no or bf16.")
        from_one = ("steps", "batch_size", "autoencoder_batch", "accumulation", "cells_per_donor", "checkpoint_every")
        for name in (*from_one, "workers", "cells_per_type"):
            least = 1 if name in from_one else 0
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= least):
                raise BadInput(f"{name} is {value!r}: choose a whole number from {least} on.")
        if not 0 <= self.class_alpha <= 2:
            raise BadInput(f"class_alpha is {self.class_alpha!r}: choose a number from 0 to 2.")
        if not 0 < self.class_beta <= 1:
            raise BadInput(f"class_beta is {self.class_beta!r}: choose a number above 0, 1 at the most.")


@dataclass(frozen=True)
class SampleConfig:
    """How a picture is drawn. Part of the Recipe: few steps spread too little."""

    solver: str = "dpm++"
    steps: int = 16
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.solver not in ("ddpm", "ddim", "dpm++"):
            raise BadInput(f"solver is {self.solver!r}: choose ddpm, ddim or dpm++.")
        if not (isinstance(self.steps, int) and 1 <= self.steps <= 1000):
            raise BadInput(f"steps is {self.steps!r}: choose a whole number from 1 to 1000.")
        if not 0 <= self.guidance <= 10:
            raise BadInput(f"guidance is {self.guidance!r}: choose a number from 0 to 10.")


@dataclass(frozen=True)
class Preset:
    """A named pair of model and training configuration."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


_PAPER = Preset(
    ModelConfig(unet_channels=(192, 384, 512), layers_per_block=2, attention_heads=8, time_embedding_dim=768),
    TrainConfig(
        steps=400_000, batch_size=128, learning_rate=1e-4, mixed_precision="bf16", ema=0.9999, vae_steps=20_000,
        state_steps=20_000, autoencoder_steps=50_000, autoencoder_batch=64, latent_variants=8,
        cells_per_donor=1_000_000, checkpoint_every=2000, workers=4,
    ),
)  # fmt: skip

PRESETS: dict[str, Preset] = {
    "demo": Preset(),
    "paper": _PAPER,
    "paper-256": dataclasses.replace(
        _PAPER,
        model=dataclasses.replace(_PAPER.model, tile_px=256, latent_px=32),
        train=dataclasses.replace(_PAPER.train, latent_variants=2),
    ),
}
"""``paper``: the paper's sizes (64-D z_s, T = 1000) on tiles of 128 px; ``paper-256``: the same on 256 px."""

T = TypeVar("T")


def to_json(config: Any) -> dict[str, Any]:
    """Dataclass -> plain dict that :func:`from_json` reads back to an equal dataclass."""
    return dataclasses.asdict(config)


def from_json(cls: type[T], value: dict[str, Any]) -> T:
    """Plain dict -> dataclass. Unknown fields are refused by name; lists become tuples.

    Raises
    ------
    BadInput: a field that ``cls`` does not have.
    """
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(value) - known)
    if unknown:
        raise BadInput(f"Unknown field {unknown[0]!r} in {cls.__name__}: known are {', '.join(sorted(known))}.")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})
