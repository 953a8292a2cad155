"""Denoiser: gradients, condition and null condition, guidance, diffusers' folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ge2hist_core import rng
from ge2hist_core.config import ModelConfig
from ge2hist_core.denoiser import ConditionTokens, Denoiser, Guided

SMALL = ModelConfig(
    d_c=4, d_e=3, latent_px=4, latent_channels=2, unet_channels=(8, 16), condition_tokens=4, condition_dim=8,
    attention_heads=2, time_embedding_dim=16,
)  # fmt: skip


@pytest.fixture
def denoiser() -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Denoiser(SMALL).eval()


def batch(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return rng.normal(0, "x", (n, 2, 4, 4)), torch.full((n,), 300), rng.normal(0, "z", (n, 7))


def test_every_weight_gets_a_finite_gradient(denoiser: Denoiser):
    x, t, z = batch(4)
    denoiser.train()(x, t, z, torch.tensor([True, False, True, False])).square().mean().backward()
    for name, weight in denoiser.named_parameters():
        assert weight.grad is not None and torch.isfinite(weight.grad).all(), name
        assert weight.grad.abs().sum() > 0, name


@pytest.mark.parametrize("n", [1, 3])
def test_output_has_the_latents_shape(denoiser: Denoiser, n: int):
    x, t, z = batch(n)
    assert denoiser(x, t, z).shape == x.shape
    assert denoiser(x, torch.tensor(300), z).shape == x.shape


def test_both_halves_of_the_state_reach_the_picture_on_both_ways(denoiser: Denoiser):
    tokens, vector = denoiser.tokens(batch(1)[2])
    assert tokens.shape == (1, 4, 8) and vector.shape == (1, 7)
    for part, moved in ((slice(0, 4), slice(0, 2)), (slice(4, 7), slice(2, 4))):
        z = batch(1)[2].clone()
        z[:, part] += 1
        changed = (denoiser.tokens(z)[0] - tokens).abs().amax(-1)[0]
        assert (changed[moved] > 0).all()
        assert changed.sum() == changed[moved].sum(), "tokens of one half must not see the other"


def test_where_the_condition_is_dropped_the_state_does_not_matter(denoiser: Denoiser):
    x, t, z = batch(2)
    drop = torch.tensor([True, False])
    with torch.inference_mode():
        a, b = denoiser(x, t, z, drop), denoiser(x, t, z + 1, drop)
    torch.testing.assert_close(a[0], b[0], rtol=0, atol=0)
    assert (a[1] - b[1]).abs().max() > 1e-4


def test_guidance_is_linear_between_null_and_condition(denoiser: Denoiser):
    x, t, z = batch(2)
    every = torch.ones(2, dtype=torch.bool)
    with torch.inference_mode():
        null, conditional = denoiser(x, t, z, every), denoiser(x, t, z)
        for scale in (0.0, 1.0, 2.5):
            expected = null + scale * (conditional - null)
            torch.testing.assert_close(Guided(denoiser, scale)(x, torch.tensor(300), z), expected, atol=1e-5, rtol=0)


def test_saved_and_loaded_weights_are_the_same_bits_and_diffusers_opens_the_folder(denoiser: Denoiser, tmp_path: Path):
    from diffusers import UNet2DConditionModel

    denoiser.to(memory_format=torch.channels_last).save(tmp_path / "unet")
    loaded = Denoiser.load(tmp_path / "unet", SMALL)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    state = loaded.state_dict()
    assert state.keys() == denoiser.state_dict().keys()
    for name, value in denoiser.state_dict().items():
        assert torch.equal(state[name], value), name
    for name, value in denoiser.unet.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value), name


@pytest.mark.parametrize("channels", [(8, 12), (32, 48, 80)])
def test_any_even_widths_make_a_network(channels: tuple[int, ...]):
    made = Denoiser(replace(SMALL, unet_channels=channels)).eval()
    assert made(*batch(1)).shape == (1, 2, 4, 4)


def test_an_odd_number_of_tokens_cannot_be_shared():
    with pytest.raises(ValueError, match="must be even"):
        ConditionTokens(ModelConfig(condition_tokens=3))


def test_rounded_weights_are_stored_in_half_the_space_with_the_same_bits(tmp_path: Path):
    made = Denoiser(SMALL).eval()
    made.save(tmp_path / "full")
    made.round_to_half()
    made.save(tmp_path / "half")
    again = Denoiser.load(tmp_path / "half", SMALL)
    for name, value in made.state_dict().items():
        assert again.state_dict()[name].dtype == torch.float32, name
        assert torch.equal(again.state_dict()[name], value), name
    full, half = ((tmp_path / n / "diffusion_pytorch_model.safetensors").stat().st_size for n in ("full", "half"))
    assert half < 0.7 * full
