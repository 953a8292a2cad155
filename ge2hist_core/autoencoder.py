"""Tile <-> latent: a small convolutional autoencoder, 8 times smaller per side.

128 x 128 px RGB -> ``[8, 16, 16]``. Pixels are first folded into channels (``pixel_unshuffle(4)``), so that no
convolution runs on more than 32 x 32 positions; that is what makes it cheap on a CPU. Loss: L1 plus L1 of
horizontal and vertical differences (keeps nuclear borders), with a little noise on the latents so that the decoder
tolerates the diffusion model's errors. Latents leave with zero mean and unit variance per channel, as the
diffusion process expects of its data.

That loss asks for the mean of all pictures that a latent may stand for, and a mean has neither grain nor fine
chromatin. A decoder trained on by :mod:`ge2hist_core.decoder_training` draws them from noise: ``grain``, as many
numbers as the picture has pixels. It is one fixed draw for all pictures, so that two arms of an edit have the same
grain and differ by their latents alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ge2hist_core import rng
from ge2hist_core.config import ModelConfig

__all__ = ["TileAutoencoder", "autoencoder_loss", "from_uint8", "psnr", "to_uint8"]

_FOLD = 4
_WIDE_FROM = 6
"""The decoder's layers from here on work on the grid of the folded picture."""


def from_uint8(tiles: np.ndarray | Tensor) -> Tensor:
    """uint8 ``[n, H, W, 3]`` -> float32 ``[n, 3, H, W]`` in [-1, 1], channels-last in memory."""
    return torch.as_tensor(tiles).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_uint8(pixels: Tensor) -> np.ndarray:
    """float ``[n, 3, H, W]`` in [-1, 1] -> uint8 ``[n, H, W, 3]``, clipped and rounded."""
    return pixels.add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


class _ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x))))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = min(8, channels)
        self.body = nn.Sequential(
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class TileAutoencoder(nn.Module):
    """Encoder, decoder and the channel statistics of the latents. With ``config.grain`` the decoder has grain, too."""

    latent_mean: Tensor
    latent_std: Tensor
    grain: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.tile_px != 2 * _FOLD * config.latent_px:
            raise ValueError(f"tile_px {config.tile_px} must be {2 * _FOLD} times latent_px {config.latent_px}")
        wide, deep = config.ae_channels
        latent = config.latent_channels
        folded = 3 * _FOLD**2
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(_FOLD),
            nn.Conv2d(folded, wide, 3, padding=1),
            _ResidualBlock(wide),
            nn.Conv2d(wide, deep, 3, stride=2, padding=1),
            _ResidualBlock(deep),
            _ResidualBlock(deep),
            nn.GroupNorm(min(8, deep), deep),
            nn.SiLU(),
            nn.Conv2d(deep, latent, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent, deep, 3, padding=1),
            _ResidualBlock(deep),
            _ResidualBlock(deep),
            _ResidualBlock(deep),
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(deep, wide, 3, padding=1),
            _ResidualBlock(wide),
            _ResidualBlock(wide),
            nn.GroupNorm(min(8, wide), wide),
            nn.SiLU(),
            nn.Conv2d(wide, folded, 3, padding=1),
            nn.PixelShuffle(_FOLD),
        )
        self.register_buffer("latent_mean", torch.zeros(latent, 1, 1))
        self.register_buffer("latent_std", torch.ones(latent, 1, 1))
        side = config.tile_px // _FOLD
        self.register_buffer("grain", rng.normal(0, "grain", (folded, side, side)) if config.grain else None)
        if config.grain:
            self.grain_in = nn.Conv2d(folded, wide, 3, padding=1)
            self.grain_gate = nn.Conv2d(wide, wide, 1)
            # Without grain at first: a decoder that has learned without it goes on from where it is.
            for value in self.grain_gate.parameters():
                nn.init.zeros_(value)

    def picture(self, raw: Tensor, grain: Tensor | None = None) -> Tensor:
        """Raw latents ``[n, channel, h, w]`` -> pixels ``[n, 3, H, W]``, about [-1, 1].

        ``grain``: ``[n, 48, 2 h, 2 w]`` standard normal in place of the fixed one, as training draws it.
        """
        x = self.decoder[:_WIDE_FROM](raw)
        if self.grain is not None:
            x = x + self.grain_gate(x) * self.grain_in(self.grain[None] if grain is None else grain)
        return self.decoder[_WIDE_FROM:](x)

    def fit_statistics(self, raw: Tensor) -> None:
        """Take the channel statistics from raw encoder outputs ``[n, channel, h, w]``."""
        self.latent_mean.copy_(raw.mean((0, 2, 3))[:, None, None])
        self.latent_std.copy_(raw.std((0, 2, 3))[:, None, None].clamp_min(1e-6))

    @torch.inference_mode()
    def encode(self, tiles: np.ndarray) -> Tensor:
        """uint8 ``[n, tile_px, tile_px, 3]`` -> float32 ``[n, channel, latent_px, latent_px]`` of unit variance."""
        pixels = from_uint8(torch.as_tensor(tiles).to(self.latent_mean.device))  # bytes travel, not floats
        return (self.encoder(pixels) - self.latent_mean) / self.latent_std

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> np.ndarray:
        """float32 ``[n, channel, latent_px, latent_px]`` of unit variance -> uint8 ``[n, tile_px, tile_px, 3]``."""
        raw = (latents * self.latent_std + self.latent_mean).contiguous(memory_format=torch.channels_last)
        return to_uint8(self.picture(raw).float().cpu())

    def forward(self, pixels: Tensor, noise: Tensor | None = None, noise_level: float = 0.0) -> tuple[Tensor, Tensor]:
        """Training pass: pixels in [-1, 1] -> reconstruction and raw latents.

        ``noise``, of the latents' shape, is added at ``noise_level`` times the batch's channel standard deviation.
        """
        raw = self.encoder(pixels)
        noisy = raw
        if noise is not None:
            noisy = raw + noise_level * raw.detach().float().std((0, 2, 3), keepdim=True) * noise
        return self.picture(noisy), raw


def autoencoder_loss(reconstruction: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    """Terms by name: ``l1`` and ``gradient`` (L1 of neighbouring differences in x and y); pixels run from -1 to 1."""
    error = reconstruction.float() - pixels
    return {
        "l1": error.abs().mean(),
        "gradient": error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean(),
    }


def psnr(reconstruction: np.ndarray, tiles: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 pictures."""
    error = reconstruction.astype(np.float64) - tiles.astype(np.float64)
    return float(10 * np.log10(255.0**2 / np.mean(error**2)))
