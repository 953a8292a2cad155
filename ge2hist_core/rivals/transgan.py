"""TransGAN: a GAN of two transformers without a convolution. Unconditional: it does not see the cell.

Jiang, Chang, Wang 2021, TransGAN: Two pure transformers can make one strong GAN, and that can scale up, NeurIPS 34,
arXiv:2102.07074, doi:10.48550/arXiv.2102.07074; code: github.com/VITA-Group/TransGAN.

As published: the generator makes an 8 x 8 grid of tokens of the noise and doubles its side stage by stage, by bicubic
interpolation at first and by pixel shuffling (a quarter of the width) later; fine grids attend within windows; relative
position bias; pixel normalisation. The discriminator reads patches at several scales, one more at each stage, pools
between them and ends in a class token. Wasserstein loss with gradient penalty of weight 10 and drift of the score,
Adam with betas (0, 0.99), differentiable augmentation of real and generated pictures (translation, cutout, colour:
Zhao et al. 2020, arXiv 2006.10738), moving average of the generator's weights.

Scaled down and changed:

- widths 256 (grids of 8 and 16 tokens), 64 (32) and 16 (64), one or two blocks per stage, noise of 128 numbers; the
  paper's 256 px model has 1024 at the first stages, four or five blocks and noise of 512: two CPU cores;
- the last stage is a grid of 64 x 64 whose tokens are each unfolded to 2 x 2 px; the paper goes on to single pixels,
  where tokens of four numbers would be left here;
- windows of 8 x 8 instead of 16 x 16 tokens, in both networks, and heads of 32 numbers instead of four heads at every
  width: a small part of the attention's cost;
- one update of each network per batch, the discriminator at twice the generator's rate (Heusel et al. 2017, arXiv
  1706.08500), where the paper takes four to five of the discriminator at one rate: a short training cannot spend most
  of its steps on one side;
- the penalty is taken over half of each batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ge2hist_core import rng
from ge2hist_core.config import TILE_PX
from ge2hist_core.rivals.common import Rival, TrainingTiles, pixels_of, wasserstein_step
from ge2hist_core.types import BadInput

if TYPE_CHECKING:
    import scipy.sparse as sp

__all__ = ["TransGAN", "TransGANConfig", "augment", "augmentation"]

BOTTOM = 8
PATCH = 2
DRIFT = 1e-3


@dataclass(frozen=True)
class TransGANConfig:
    """Sizes and training. ``depth``: blocks at 8, 16, 32, ... tokens a side; ``critic_depth``: fine to coarse."""

    tile_px: int = TILE_PX
    latent_dim: int = 128
    width: int = 256
    depth: tuple[int, ...] = (2, 1, 1, 1)
    critic_width: int = 192
    critic_depth: tuple[int, ...] = (1, 1, 2)
    window: int = 8
    head_dim: int = 32
    batch_size: int = 16
    generator_rate: float = 1e-4
    critic_rate: float = 2e-4
    penalty: float = 10.0
    ema: float = 0.995
    checkpoint_every: int = 250

    def __post_init__(self) -> None:
        if self.tile_px != BOTTOM * PATCH * 2 ** (len(self.depth) - 1):
            side = BOTTOM * PATCH * 2 ** (len(self.depth) - 1)
            raise BadInput(f"tile_px is {self.tile_px}: {len(self.depth)} stages in depth draw {side} px.")
        shuffled = 4 ** max(0, len(self.depth) - 2)
        scales = 2 ** (len(self.critic_depth) - 1)
        for name, parts in (("width", shuffled), ("critic_width", 2 * scales)):
            value = getattr(self, name)
            widths = [value // part for part in (1, 2, 4, 16, 64) if part <= parts]
            if value % parts or any(w % self.heads(w) for w in widths):
                raise BadInput(f"{name} is {value}: every stage must have whole heads, give a multiple of 64.")

    def heads(self, dim: int) -> int:
        """Attention heads of a block of this width: one per ``head_dim`` numbers, at least one."""
        return max(1, dim // self.head_dim)


class _PixelNorm(nn.Module):
    """Each token divided by its root mean square (Karras et al. 2018)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-8)


class _Attention(nn.Module):
    """Multi-head self-attention with a learned bias per head and relative position on a ``side x side`` grid.

    Written out: the fused kernel has no second derivative, which the gradient penalty needs.
    """

    index: Tensor

    def __init__(self, dim: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.bias = nn.Parameter(0.02 * torch.randn(heads, (2 * side - 1) ** 2)) if side else None
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        at = torch.stack([y.flatten(), x.flatten()])
        offset = at[:, :, None] - at[:, None, :] + side - 1  # [2, to, from]
        self.register_buffer("index", offset[0] * (2 * side - 1) + offset[1], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, length, dim = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1)) * self.scale
        if self.bias is not None:
            weights = weights + self.bias[:, self.index]
        return self.out((weights.softmax(-1) @ v).transpose(1, 2).reshape(n, length, dim))


class _Block(nn.Module):
    """Transformer block on a square grid of tokens ``[n, side^2, dim]``, attention within ``window x window``.

    ``side`` 0: any number of tokens, without windows and position bias.
    """

    def __init__(self, dim: int, heads: int, side: int, window: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.side, self.window = side, min(window, side)
        self.norm1, self.norm2 = (norm(dim) if norm is nn.LayerNorm else norm() for _ in range(2))
        self.attention = _Attention(dim, heads, self.window)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor) -> Tensor:
        if self.window == self.side:
            return self.attention(x)
        n, _, dim = x.shape
        w, k = self.window, self.side // self.window
        parts = x.view(n, k, w, k, w, dim).transpose(2, 3).reshape(n * k * k, w * w, dim)
        return self.attention(parts).view(n, k, k, w, w, dim).transpose(2, 3).reshape(n, -1, dim)


def _grid(tokens: Tensor) -> Tensor:
    """``[n, side^2, dim]`` -> ``[n, dim, side, side]``."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def _tokens(grid: Tensor) -> Tensor:
    """``[n, dim, side, side]`` -> ``[n, side^2, dim]``."""
    return grid.flatten(2).transpose(1, 2)


class Generator(nn.Module):
    """Noise ``[n, latent_dim]`` -> pixels ``[n, 3, tile_px, tile_px]`` in [-1, 1]."""

    def __init__(self, config: TransGANConfig) -> None:
        super().__init__()
        self.width = config.width
        self.first = nn.Linear(config.latent_dim, BOTTOM**2 * config.width)
        self.positions, self.stages = nn.ParameterList(), nn.ModuleList()
        dim, side = config.width, BOTTOM
        for stage, depth in enumerate(config.depth):
            if stage:
                side *= 2
                dim = dim if stage == 1 else dim // 4
            self.positions.append(nn.Parameter(0.02 * torch.randn(1, side**2, dim)))
            blocks = [_Block(dim, config.heads(dim), side, config.window, _PixelNorm) for _ in range(depth)]
            self.stages.append(nn.Sequential(*blocks))
        self.last = nn.Linear(dim, 3 * PATCH**2)
        self.apply(_small)

    def forward(self, z: Tensor) -> Tensor:
        x = self.first(z).unflatten(1, (BOTTOM**2, self.width))
        for i, (position, stage) in enumerate(zip(self.positions, self.stages, strict=True)):
            if i == 1:
                x = _tokens(F.interpolate(_grid(x), scale_factor=2, mode="bicubic"))
            elif i > 1:
                x = _tokens(F.pixel_shuffle(_grid(x), 2))
            x = stage(x + position)
        return torch.tanh(F.pixel_shuffle(_grid(self.last(x)), PATCH))


class Discriminator(nn.Module):
    """Pixels ``[n, 3, tile_px, tile_px]`` -> one number each, ``[n]``; patches of 4, 8, 16, ... px."""

    def __init__(self, config: TransGANConfig) -> None:
        super().__init__()
        scales = len(config.critic_depth)
        self.patches, self.positions, self.stages = nn.ModuleList(), nn.ParameterList(), nn.ModuleList()
        dim = config.critic_width // 2 ** (scales - 1)
        for scale, depth in enumerate(config.critic_depth):
            patch = 4 * 2**scale
            side = config.tile_px // patch
            new = dim if scale == 0 else dim // 2  # the other half is pooled from the finer scale
            self.patches.append(nn.Sequential(nn.PixelUnshuffle(patch), nn.Conv2d(3 * patch**2, new, 1)))
            self.positions.append(nn.Parameter(0.02 * torch.randn(1, side**2, dim)))
            blocks = [_Block(dim, config.heads(dim), side, config.window, nn.LayerNorm) for _ in range(depth)]
            self.stages.append(nn.Sequential(*blocks))
            dim *= 2
        dim //= 2
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.last = _Block(dim, config.heads(dim), 0, 0, nn.LayerNorm)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 1)
        self.apply(_small)

    def forward(self, pixels: Tensor) -> Tensor:
        x: Tensor | None = None
        for patch, position, stage in zip(self.patches, self.positions, self.stages, strict=True):
            new = _tokens(patch(pixels))
            if x is not None:
                new = torch.cat([_tokens(F.avg_pool2d(_grid(x), 2)), new], dim=2)
            x = stage(new + position)
        assert x is not None
        x = self.last(torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1))
        return self.head(self.norm(x[:, 0]))[:, 0]


def _small(module: nn.Module) -> None:
    """The first weights of the published code for linear layers."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.flatten(1) if module.weight.ndim == 4 else module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def augmentation(n: int, side: int, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The numbers of :func:`augment` for ``n`` pictures of ``side x side`` px.

    Returns
    -------
    colour: ``[3, n]`` in [0, 1). at: int64 ``[4, n]``, top and left of what stays in view of the padded picture and of
    the hole.
    """
    colour = torch.from_numpy(draw.random((3, n))).float()
    most = (2 * (side // 8), 2 * (side // 8), side - side // 4, side - side // 4)
    return colour, torch.from_numpy(np.stack([draw.integers(0, m + 1, n) for m in most]))


def augment(pixels: Tensor, colour: Tensor, at: Tensor) -> Tensor:
    """Differentiable augmentation of ``[n, 3, side, side]`` in [-1, 1]: colour, translation by up to an eighth, cutout.

    Brightness moves by up to 0.25, saturation is scaled by 0-2, contrast by 0.5-1.5; what moves in from outside and
    the square of a quarter of the side that is cut out are 0.

    Parameters
    ----------
    colour, at: from :func:`augmentation`, on the device of the pixels.
    """
    n, channels, side, _ = pixels.shape
    numbers = colour[:, :, None, None, None]
    x = pixels + 0.5 * (numbers[0] - 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (2.0 * numbers[1])
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * (0.5 + numbers[2])
    reach, hole = side // 8, side // 4
    places = torch.arange(side, device=x.device)
    rows = (at[0][:, None] + places)[:, None, :, None].expand(n, channels, side, side + 2 * reach)
    columns = (at[1][:, None] + places)[:, None, None, :].expand(n, channels, side, side)
    moved = F.pad(x, (reach, reach, reach, reach)).gather(2, rows).gather(3, columns)
    row, column = ((places >= first[:, None]) & (places < first[:, None] + hole) for first in (at[2], at[3]))
    return moved * ~(row[:, None, :, None] & column[:, None, None, :])


class TransGAN(Rival):
    name = "transgan"
    title = "TransGAN"
    conditional = False
    Config = TransGANConfig
    drawing = ("generator",)
    averaged = ("generator",)

    def _build(self) -> dict[str, nn.Module]:
        return {"generator": Generator(self.config), "critic": Discriminator(self.config)}

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        rates = {"generator": self.config.generator_rate, "critic": self.config.critic_rate}
        return {k: torch.optim.Adam(self.nets[k].parameters(), lr=r, betas=(0.0, 0.99)) for k, r in rates.items()}

    def _batch(self, step: int, tiles: TrainingTiles) -> dict[str, Tensor]:
        n, side, size = self.config.batch_size, self.config.tile_px, (self.config.batch_size, self.config.latent_dim)
        batch = {"pictures": tiles.pictures(tiles.choose("transgan cells", step, n), "transgan", step)}
        for whose in ("critic", "generator"):
            batch[f"{whose} noise"] = rng.normal(self.seed, "transgan noise", size, step, whose)
        draw = rng.stream(self.seed, "transgan augmentation", step)
        for whose in ("critic", "real"):
            batch[f"{whose} colour"], batch[f"{whose} at"] = augmentation(n, side, draw)
        batch["mix"] = torch.from_numpy(draw.random(max(1, n // 2))).float()
        batch["generator colour"], batch["generator at"] = augmentation(n, side, draw)
        return batch

    def _update(
        self, step: int, batch: Mapping[str, Tensor], optimizers: Mapping[str, torch.optim.Optimizer]
    ) -> dict[str, Tensor]:
        generator, critic = self.nets["generator"], self.nets["critic"]

        def augmented(pixels: Tensor, whose: str) -> Tensor:
            return augment(pixels, batch[f"{whose} colour"], batch[f"{whose} at"])

        def drawn(whose: str) -> Tensor:
            return augmented(generator(batch[f"{whose} noise"]), whose)

        real = augmented(pixels_of(batch["pictures"]), "real")
        with torch.no_grad():
            fake = drawn("critic")
        return wasserstein_step(
            critic, optimizers, real, fake, lambda: drawn("generator"), batch["mix"],
            penalty=self.config.penalty, drift=DRIFT,
        )  # fmt: skip

    def _draw(self, counts: sp.csr_matrix | None, seeds: Sequence[int]) -> Tensor:
        size = (self.config.latent_dim,)
        noise = torch.stack([rng.normal(seed, "transgan draw", size) for seed in seeds])
        return self.net("generator")(noise)
