"""RNA-CDM: beta-VAE of expression as the condition of a cascade of two diffusion models on pixels.

Carrillo-Perez, Pizurica, Zheng, Nandi, Madduri, Shen, Gevaert 2024, Generation of synthetic whole-slide image tiles of
tumours from RNA-sequencing data via cascaded diffusion models, Nature Biomedical Engineering 9, 320-332 (2025),
doi:10.1038/s41551-024-01193-8.

As published: one latent of the expression, without a split into type and environment, conditions both stages, by
cross-attention and through the time embedding; a base model draws a small tile and a super-resolution model, which sees
it blurred by a little noise (Ho et al. 2022, Cascaded diffusion models, JMLR 23), the large one; classifier-free
guidance is trained for by dropping the condition.

Scaled down and changed:

- 32 px and 128 px where the paper has 64 px and 256 px, the same factor of four: the project's tiles have 128 px;
- latent of 256 numbers (see :mod:`ge2hist_core.rivals.beta_vae`), U-Nets of a few million weights: two CPU cores;
- pixels are folded into channels before the first convolution (2 x 2 in the base, 4 x 4 in the super-resolution model),
  as Imagen's efficient U-Net moves its work to small grids (Saharia et al. 2022, arXiv 2205.11487, appendix F.1);
- both predict v and are drawn with the 16 steps of DPM-Solver++ that GE2Hist uses, so that pictures differ by what was
  learned, not by the solver; the paper's library predicts the noise and walks through all its time steps;
- one training step updates each stage once; the paper trains them one after the other;
- no guidance when drawing (scale 1), as in GE2Hist's evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ge2hist_core import rng
from ge2hist_core.config import TILE_PX, SampleConfig
from ge2hist_core.rivals.beta_vae import ExpressionRival, log_normalised
from ge2hist_core.rivals.common import TrainingTiles, pixels_of
from ge2hist_core.sampler import alphas_cumprod, sample
from ge2hist_core.types import BadInput

if TYPE_CHECKING:
    import scipy.sparse as sp

__all__ = ["RNACDM", "RNACDMConfig"]

FACTOR = 4
BASE_FOLD = 2
T = 1000


@dataclass(frozen=True)
class RNACDMConfig:
    """Sizes and training. ``blur``: noise on the small tile as ``sigma`` of its diffusion, uniform in [0, blur] in
    training and ``blur_drawing`` when drawing.
    """

    tile_px: int = TILE_PX
    base_channels: tuple[int, ...] = (96, 128, 160)
    super_channels: tuple[int, ...] = (64, 96, 128)
    heads: int = 4
    tokens: int = 4
    condition_dim: int = 128
    vae_hidden: tuple[int, ...] = (768, 512, 256)
    vae_steps: int = 1500
    vae_batch: int = 128
    vae_learning_rate: float = 1e-3
    beta: float = 0.0005
    batch_size: int = 16
    learning_rate: float = 3e-4
    warmup_steps: int = 300
    condition_dropout: float = 0.1
    blur: float = 0.5
    blur_drawing: float = 0.1
    steps: int = 16
    ema: float = 0.999
    checkpoint_every: int = 250

    def __post_init__(self) -> None:
        for name, fold in (("base_channels", FACTOR * BASE_FOLD), ("super_channels", FACTOR)):
            least = fold * 2 ** (len(getattr(self, name)) - 1)
            if self.tile_px % least:
                raise BadInput(f"tile_px is {self.tile_px}: with these {name} it must be a multiple of {least}.")
        if not 0 <= self.blur_drawing <= self.blur < 1:
            raise BadInput(f"blur_drawing is {self.blur_drawing}: choose a number from 0 to blur ({self.blur}).")


class Stage(nn.Module):
    """One model of the cascade: ``(x_t, t, z, low) -> v`` on folded pixels.

    Parameters
    ----------
    channels: of the U-Net's levels. pixels: channels of the folded picture; ``low``: channels of the folded small tile
        that is given beside it, 0 in the base model. side: grid of the folded picture. dim: of the latent.
    """

    def __init__(
        self, config: RNACDMConfig, channels: tuple[int, ...], pixels: int, low: int, side: int, dim: int
    ) -> None:
        from diffusers import UNet2DConditionModel

        super().__init__()
        cross = [False] + [True] * (len(channels) - 1)
        self.unet = UNet2DConditionModel(
            sample_size=side,
            in_channels=pixels + low,
            out_channels=pixels,
            down_block_types=tuple("CrossAttnDownBlock2D" if c else "DownBlock2D" for c in cross),
            up_block_types=tuple("CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(cross)),
            block_out_channels=channels,
            layers_per_block=1,
            norm_num_groups=math.gcd(32, *channels),
            cross_attention_dim=config.condition_dim,
            attention_head_dim=config.heads,  # diffusers reads this as the number of heads
            class_embed_type="projection",
            projection_class_embeddings_input_dim=dim + 1,
            resnet_time_scale_shift="scale_shift",
        )
        self.tokens = nn.Sequential(
            nn.Linear(dim, 2 * config.condition_dim),
            nn.SiLU(),
            nn.Linear(2 * config.condition_dim, config.tokens * config.condition_dim),
            nn.Unflatten(1, (config.tokens, config.condition_dim)),
        )
        self.null_tokens = nn.Parameter(0.02 * torch.randn(config.tokens, config.condition_dim))
        self.null_vector = nn.Parameter(torch.zeros(dim))

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        z: Tensor,
        low: Tensor | None = None,
        blur: Tensor | None = None,
        drop: Tensor | None = None,
    ) -> Tensor:
        """Predicted v.

        Parameters
        ----------
        x_t: ``[n, pixels, side, side]``. t: int64 ``[n]`` or scalar. z: ``[n, dim]``.
        low: ``[n, low, side, side]`` with ``blur [n]``, the sigma of the noise on it. drop: bool ``[n]``.
        """
        tokens, vector = self.tokens(z), z
        if drop is not None:
            tokens = torch.where(drop[:, None, None], self.null_tokens, tokens)
            vector = torch.where(drop[:, None], self.null_vector, vector)
        level = z.new_zeros(len(z)) if blur is None else blur
        vector = torch.cat([vector, level[:, None]], dim=1)
        x = x_t if low is None else torch.cat([x_t, low], dim=1)
        # On a CPU the fused kernel's backward pass is slow on short sequences.
        with sdpa_kernel(SDPBackend.MATH) if x.device.type == "cpu" else nullcontext():
            return self.unet(x, t, encoder_hidden_states=tokens, class_labels=vector, return_dict=False)[0]


class RNACDM(ExpressionRival):
    name = "rna-cdm"
    title = "RNA-CDM"
    Config = RNACDMConfig
    drawing = ("vae", "base", "super")
    averaged = ("base", "super")

    def _build_pictures(self, dim: int) -> dict[str, nn.Module]:
        c, small = self.config, self.config.tile_px // FACTOR
        folded = 3 * FACTOR**2
        return {
            "base": Stage(c, c.base_channels, 3 * BASE_FOLD**2, 0, small // BASE_FOLD, dim),
            "super": Stage(c, c.super_channels, folded, 3, small, dim),
        }

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        rate = self.config.learning_rate
        adam = {k: torch.optim.AdamW(self.nets[k].parameters(), lr=rate, weight_decay=1e-4) for k in self.averaged}
        return {"vae": self._vae_optimizer(), **adam}

    def _latent(self, values: Tensor) -> Tensor:
        mean, variance = self.vae.get_buffer("latent_mean"), self.vae.get_buffer("latent_variance")
        return (self.condition(values) - mean) / (variance + 0.01).sqrt()

    def _batch_pictures(self, step: int, tiles: TrainingTiles) -> dict[str, Tensor]:
        c, n, side = self.config, self.config.batch_size, self.config.tile_px // FACTOR
        chosen, draw = tiles.choose("rna-cdm cells", step, n), rng.stream(self.seed, "rna-cdm blur", step)
        batch = {
            "pictures": tiles.pictures(chosen, "rna-cdm", step),
            "values": log_normalised(tiles.counts(chosen)),
            "blur": torch.from_numpy(c.blur * draw.random(n)).float(),
            "blur noise": rng.normal(self.seed, "rna-cdm blur", (n, 3, side, side), step),
        }
        shapes = {
            "base": (n, 3 * BASE_FOLD**2, side // BASE_FOLD, side // BASE_FOLD),
            "super": (n, 3 * FACTOR**2, side, side),
        }
        bar = torch.tensor(alphas_cumprod(T))
        for name, shape in shapes.items():
            draw = rng.stream(self.seed, "rna-cdm diffusion", name, step)
            # Times stratified over the batch, as in GE2Hist's training.
            t = torch.from_numpy(((np.arange(n) + draw.random(n)) / n * T).astype(np.int64).clip(max=T - 1))
            batch[f"{name} t"], batch[f"{name} bar"] = t, bar[t]
            batch[f"{name} noise"] = torch.from_numpy(draw.standard_normal(shape, dtype=np.float32))
            batch[f"{name} drop"] = torch.from_numpy(draw.random(n) < c.condition_dropout)
        return batch

    def _update_pictures(
        self, step: int, batch: Mapping[str, Tensor], optimizers: Mapping[str, torch.optim.Optimizer]
    ) -> dict[str, Tensor]:
        c, pixels, z, blur = self.config, pixels_of(batch["pictures"]), self._latent(batch["values"]), batch["blur"]
        small = F.avg_pool2d(pixels, FACTOR)
        # The noise of the base model's own diffusion, at the level where its sigma is `blur`.
        low = _blurred(small, blur, batch["blur noise"])
        given = {
            "base": (F.pixel_unshuffle(small, BASE_FOLD), None, None),
            "super": (F.pixel_unshuffle(pixels, FACTOR), low, blur),
        }
        terms = {}
        for name, (x_0, beside, level) in given.items():
            for group in optimizers[name].param_groups:
                group["lr"] = c.learning_rate * min(1.0, (step + 1) / max(1, c.warmup_steps))
            t, bar, noise, drop = (batch[f"{name} {what}"] for what in ("t", "bar", "noise", "drop"))
            alpha, sigma = bar[:, None, None, None].sqrt(), (1 - bar)[:, None, None, None].sqrt()
            v = self.nets[name](alpha * x_0 + sigma * noise, t, z, beside, level, drop)
            loss = F.mse_loss(v, alpha * noise - sigma * x_0)
            optimizers[name].zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.nets[name].parameters(), 1.0)
            optimizers[name].step()
            terms[name] = loss
        return terms

    def _draw(self, counts: sp.csr_matrix | None, seeds: Sequence[int]) -> Tensor:
        assert counts is not None
        z, config = self._latent(log_normalised(counts)), SampleConfig("dpm++", self.config.steps)
        small_px = self.config.tile_px // FACTOR

        def draw(name: str, *size: int) -> Tensor:
            return torch.stack([rng.normal(seed, name, size) for seed in seeds])

        side = small_px // BASE_FOLD
        noise = draw("rna-cdm base", 3 * BASE_FOLD**2, side, side)
        small = F.pixel_shuffle(sample(self.net("base"), noise, z, config, train_timesteps=T), BASE_FOLD).clamp(-1, 1)
        blur = torch.full((len(seeds),), self.config.blur_drawing)
        low = _blurred(small, blur, draw("rna-cdm low", *small.shape[1:]))
        net = self.net("super")

        def enlarge(x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            return net(x_t, t, condition, low, blur)

        noise = draw("rna-cdm super", 3 * FACTOR**2, small_px, small_px)
        return F.pixel_shuffle(sample(enlarge, noise, z, config, train_timesteps=T), FACTOR)


def _blurred(small: Tensor, blur: Tensor, noise: Tensor) -> Tensor:
    """``sqrt(1 - blur^2) x + blur noise``; ``small, noise [n, 3, h, w]``, ``blur [n]``."""
    sigma = blur[:, None, None, None]
    return (1 - sigma.square()).sqrt() * small + sigma * noise
