"""Conditional U-Net of the diffusion model: ``(x_t, t, z_s) -> v``.

The network is diffusers' ``UNet2DConditionModel`` on latents. ``z_s`` reaches it twice: as tokens for cross-attention
(half of them made of ``z_c``, half of ``z_e``), as in the paper, and added to the time embedding, which scales and
shifts every residual block. The second way acts at every position from the first step on, while attention must first
learn where to look.

It predicts ``v = alpha eps - sigma x_0`` (Salimans and Ho 2022, arXiv 2202.00512). With a cosine schedule the last
step is pure noise, where the paper's eps carries no information about ``x_0``; v does, and
``||v_theta - v||^2`` equals (8) with weight 1 / alphabar_t.

For guidance the condition is dropped in some training steps; the network then sees a learned null condition.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ge2hist_core.config import ModelConfig
from ge2hist_core.files import atomic_folder

__all__ = ["ConditionTokens", "Denoiser", "Guided"]


class ConditionTokens(nn.Module):
    """``z_s`` -> cross-attention tokens and the vector for the time embedding, with their learned null values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.d_c, self.dim = config.d_c, config.condition_dim
        each = config.condition_tokens // 2
        if 2 * each != config.condition_tokens or each < 1:
            raise ValueError(f"condition_tokens must be even and positive, got {config.condition_tokens}")
        self.type_tokens = self._mlp(config.d_c, each)
        self.niche_tokens = self._mlp(config.d_e, each)
        self.null_tokens = nn.Parameter(0.02 * torch.randn(config.condition_tokens, self.dim))
        self.null_vector = nn.Parameter(torch.zeros(config.d_c + config.d_e))

    def _mlp(self, inputs: int, tokens: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(inputs, 2 * self.dim), nn.SiLU(), nn.Linear(2 * self.dim, tokens * self.dim))

    def forward(self, z_s: Tensor, drop: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``z_s [n, d_z]``, ``drop`` bool ``[n]`` -> tokens ``[n, token, condition_dim]``, vector ``[n, d_z]``."""
        parts = (self.type_tokens(z_s[:, : self.d_c]), self.niche_tokens(z_s[:, self.d_c :]))
        tokens = torch.cat([part.unflatten(1, (-1, self.dim)) for part in parts], dim=1)
        if drop is None:
            return tokens, z_s
        return (
            torch.where(drop[:, None, None], self.null_tokens, tokens),
            torch.where(drop[:, None], self.null_vector, z_s),
        )


def _unet(config: ModelConfig) -> nn.Module:
    from diffusers import UNet2DConditionModel

    channels = config.unet_channels
    # No attention at the full latent size: there it would take most of the time and local structure does without.
    cross = [False] + [True] * (len(channels) - 1)
    return UNet2DConditionModel(
        sample_size=config.latent_px,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if c else "DownBlock2D" for c in cross),
        up_block_types=tuple("CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(cross)),
        block_out_channels=channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=math.gcd(32, *channels),
        cross_attention_dim=config.condition_dim,
        attention_head_dim=config.attention_heads,  # diffusers reads this as the number of heads
        time_embedding_dim=config.time_embedding_dim,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=config.d_c + config.d_e,
        resnet_time_scale_shift="scale_shift",
    )


class Denoiser(nn.Module):
    """U-Net and condition tokens together. ``unet`` may be replaced by any network of the same call."""

    def __init__(self, config: ModelConfig, unet: nn.Module | None = None) -> None:
        super().__init__()
        self.unet = _unet(config) if unet is None else unet
        self.tokens = ConditionTokens(config)

    def forward(self, x_t: Tensor, t: Tensor, z_s: Tensor, drop: Tensor | None = None) -> Tensor:
        """Predicted v.

        Parameters
        ----------
        x_t: ``[n, channel, h, w]`` noisy latents. t: ``[n]`` or scalar int64 time step, 0 the cleanest.
        z_s: ``[n, d_c + d_e]`` state. drop: bool ``[n]``, True where the null condition stands in.
        """
        tokens, vector = self.tokens(z_s, drop)
        return self.unet(x_t, t, encoder_hidden_states=tokens, class_labels=vector, return_dict=False)[0]

    @torch.no_grad()
    def round_to_half(self) -> None:
        """Round the U-Net's weights to what float16 holds, about three digits; computing stays float32."""
        for parameter in self.unet.parameters():
            parameter.copy_(parameter.half().float())

    def save(self, folder: Path) -> None:
        """Write ``unet/`` as diffusers does and ``condition.safetensors`` beside its weights.

        Weights that float16 holds exactly (see :meth:`round_to_half`) are stored in it: half the size, the same bits.
        """
        from safetensors.torch import save_file

        with atomic_folder(folder) as temporary:
            # safetensors writes contiguous tensors only; the copy leaves the memory layout of the one in use alone.
            unet: Any = copy.deepcopy(self.unet)
            if all(torch.equal(p, p.half().float()) for p in unet.parameters()):
                unet = unet.half()
            unet.to(memory_format=torch.contiguous_format).save_pretrained(temporary)
            tokens = {name: value.contiguous() for name, value in self.tokens.state_dict().items()}
            save_file(tokens, temporary / "condition.safetensors")

    @classmethod
    def load(cls, folder: Path, config: ModelConfig) -> Denoiser:
        """Read what :meth:`save` wrote. Every weight must be there, with the right shape, and no other."""
        from diffusers import UNet2DConditionModel
        from safetensors.torch import load_file

        settings: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        unet = UNet2DConditionModel.from_config(settings)
        unet.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
        denoiser = cls(config, unet)
        denoiser.tokens.load_state_dict(load_file(folder / "condition.safetensors"))
        return denoiser.eval()


class Guided:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598) as a network that holds a network.

    ``v = v_null + scale (v_condition - v_null)``: 1 is the plain conditional model, 0 ignores the condition.
    """

    def __init__(self, net: Denoiser, scale: float) -> None:
        self.net, self.scale = net, scale

    def __call__(self, x_t: Tensor, t: Tensor, z_s: Tensor) -> Tensor:
        n = len(x_t)
        drop = torch.arange(2 * n, device=x_t.device) >= n
        both = self.net(torch.cat([x_t, x_t]), t, torch.cat([z_s, z_s]), drop)
        conditional, null = both.chunk(2)
        return null + self.scale * (conditional - null)
