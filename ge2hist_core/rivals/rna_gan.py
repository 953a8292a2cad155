"""RNA-GAN: beta-VAE of expression and a DCGAN whose noise is shifted by the cell's latent.

Carrillo-Perez, Pizurica, Ozawa, Vogel, West, Kong, Herrera, Shen, Gevaert 2023, Synthetic whole-slide image tile
generation with gene expression profile-infused deep generative models, Cell Reports Methods 3, 100534,
doi:10.1016/j.crmeth.2023.100534; code: github.com/gevaertlab/RNA-GAN.

As published: the generator's input is the latent's mean plus uniform noise in [-0.3, 0.3], standardised; up-sampling
by bilinear interpolation and 3 x 3 convolution with batch normalisation and leaky ReLU; a critic of strided 4 x 4
convolutions; Wasserstein loss with gradient penalty of weight 10; Adam at 1e-4 (generator) and 4e-4 (critic) with
betas (0.5, 0.999), one update of each per batch.

Scaled down and changed:

- 128 px instead of 256 px, that is one level less, and ``channels`` 24 instead of 64: two CPU cores;
- latent of 256 instead of 2048 numbers (see :mod:`ge2hist_core.rivals.beta_vae`); the noise is standardised with
  statistics of the training cells where the paper takes those of the batch, or a picture would depend on its
  neighbours;
- self-attention (Zhang et al. 2019, arXiv 1805.08318) at 16 x 16 in both networks. The repository offers it as another
  architecture; the commands it gives for the paper train without. ``attention=False`` is that;
- the critic has group instead of batch normalisation, since the penalty is a property of single pictures (Gulrajani et
  al. 2017, section 4), and the penalty is taken per picture, over half of each batch, in one update with the loss;
- the generator's output passes tanh, without which colours leave the range in a short training;
- pictures are drawn with a moving average of the generator's weights, which a short training needs most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ge2hist_core import rng
from ge2hist_core.config import TILE_PX
from ge2hist_core.rivals.beta_vae import ExpressionRival, log_normalised
from ge2hist_core.rivals.common import TrainingTiles, pixels_of, wasserstein_step
from ge2hist_core.types import BadInput

if TYPE_CHECKING:
    import scipy.sparse as sp

__all__ = ["RNAGAN", "RNAGANConfig"]

NOISE = 0.3
"""Half width of the uniform noise on the latent."""


@dataclass(frozen=True)
class RNAGANConfig:
    """Sizes and training; ``channels`` is the number at the finest level, doubled at every coarser one."""

    tile_px: int = TILE_PX
    channels: int = 24
    attention: bool = True
    vae_hidden: tuple[int, ...] = (768, 512, 256)
    vae_steps: int = 1500
    vae_batch: int = 128
    vae_learning_rate: float = 1e-3
    beta: float = 0.0005
    batch_size: int = 16
    generator_rate: float = 1e-4
    critic_rate: float = 4e-4
    penalty: float = 10.0
    ema: float = 0.999
    checkpoint_every: int = 250

    def __post_init__(self) -> None:
        if self.tile_px < 32 or self.tile_px & (self.tile_px - 1):
            raise BadInput(f"tile_px is {self.tile_px}: RNA-GAN draws powers of two from 32 on.")
        if self.channels < 4 or self.channels % 4:
            raise BadInput(f"channels is {self.channels}: give a multiple of 4.")


class SelfAttention(nn.Module):
    """SAGAN's attention over all positions: ``x + gain attention(x)``, the gain starting at 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qk = nn.Conv2d(channels, 2 * max(1, channels // 8), 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).flatten(2).chunk(2, dim=1)
        weights = (q.transpose(1, 2) @ k).softmax(-1)  # [n, to, from]
        return x + self.gain * (self.value(x).flatten(2) @ weights.transpose(1, 2)).view_as(x)


def _up(a: int, b: int, bias: bool = False) -> list[nn.Module]:
    """Without a bias where batch normalisation would take it out again."""
    return [nn.Upsample(scale_factor=2, mode="bilinear"), nn.ReflectionPad2d(1), nn.Conv2d(a, b, 3, bias=bias)]


class Generator(nn.Module):
    """``[n, dim]`` of unit scale -> pixels ``[n, 3, tile_px, tile_px]`` in [-1, 1]."""

    def __init__(self, config: RNAGANConfig, dim: int) -> None:
        super().__init__()
        levels = int(math.log2(config.tile_px)) - 3  # from 4 x 4 to half the picture
        width = config.channels * 2**levels
        first = nn.ConvTranspose2d(dim, width, 4, bias=False)
        layers: list[nn.Module] = [first, nn.BatchNorm2d(width), nn.LeakyReLU(0.2)]
        for level in range(levels):
            layers += [*_up(width, width // 2), nn.BatchNorm2d(width // 2), nn.LeakyReLU(0.2)]
            width //= 2
            if config.attention and 4 * 2 ** (level + 1) == 16:
                layers.append(SelfAttention(width))
        self.layers = nn.Sequential(*layers, *_up(width, 3, bias=True), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z[:, :, None, None])


class Critic(nn.Module):
    """Pixels ``[n, 3, tile_px, tile_px]`` -> one number each, ``[n]``."""

    def __init__(self, config: RNAGANConfig) -> None:
        super().__init__()
        levels = int(math.log2(config.tile_px)) - 3
        width = config.channels
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for level in range(levels):
            layers += [nn.Conv2d(width, 2 * width, 4, 2, 1), nn.GroupNorm(4, 2 * width), nn.LeakyReLU(0.2)]
            width *= 2
            if config.attention and config.tile_px // 2 ** (level + 2) == 16:
                layers.append(SelfAttention(width))
        # No bias: the loss is a difference of scores.
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, bias=False))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)[:, 0, 0, 0]


class RNAGAN(ExpressionRival):
    name = "rna-gan"
    title = "RNA-GAN"
    Config = RNAGANConfig
    drawing = ("vae", "generator")
    averaged = ("generator",)

    def _build_pictures(self, dim: int) -> dict[str, nn.Module]:
        return {"generator": Generator(self.config, dim), "critic": Critic(self.config)}

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        rates = {"generator": self.config.generator_rate, "critic": self.config.critic_rate}
        adam = {k: torch.optim.Adam(self.nets[k].parameters(), lr=r, betas=(0.5, 0.999)) for k, r in rates.items()}
        return {"vae": self._vae_optimizer(), **adam}

    def _input(self, latent: Tensor, noise: Tensor) -> Tensor:
        """Latent and noise, both ``[n, dim]``, standardised together."""
        mean, variance = self.vae.get_buffer("latent_mean"), self.vae.get_buffer("latent_variance")
        return (latent + noise - mean) / (variance + NOISE**2 / 3.0).sqrt()

    def _batch_pictures(self, step: int, tiles: TrainingTiles) -> dict[str, Tensor]:
        n = self.config.batch_size
        chosen, draw = tiles.choose("rna-gan cells", step, n), rng.stream(self.seed, "rna-gan noise", step)
        return {
            "pictures": tiles.pictures(chosen, "rna-gan", step),
            "values": log_normalised(tiles.counts(chosen)),
            "critic noise": _noise(draw.random((n, self.vae.dim))),
            "mix": torch.from_numpy(draw.random(max(1, n // 2))).float(),
            "generator noise": _noise(draw.random((n, self.vae.dim))),
        }

    def _update_pictures(
        self, step: int, batch: Mapping[str, Tensor], optimizers: Mapping[str, torch.optim.Optimizer]
    ) -> dict[str, Tensor]:
        generator, critic, latent = self.nets["generator"], self.nets["critic"], self.condition(batch["values"])

        def drawn(whose: str) -> Tensor:
            return generator(self._input(latent, batch[f"{whose} noise"]))

        with torch.no_grad():
            fake = drawn("critic")
        return wasserstein_step(
            critic, optimizers, pixels_of(batch["pictures"]), fake, lambda: drawn("generator"), batch["mix"],
            penalty=self.config.penalty,
        )  # fmt: skip

    def _draw(self, counts: sp.csr_matrix | None, seeds: Sequence[int]) -> Tensor:
        assert counts is not None
        uniform = np.stack([rng.stream(seed, "rna-gan draw").random(self.vae.dim) for seed in seeds])
        latent = self.condition(log_normalised(counts))
        return self.net("generator")(self._input(latent, _noise(uniform)))


def _noise(uniform: np.ndarray) -> Tensor:
    """Numbers in [0, 1) -> float32 in [-``NOISE``, ``NOISE``)."""
    return torch.from_numpy(NOISE * (2.0 * uniform - 1.0)).float()
