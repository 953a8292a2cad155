"""Autoencoder: pixels there and back, statistics, loss terms by hand, and that it can learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ge2hist_core import rng
from ge2hist_core.autoencoder import TileAutoencoder, autoencoder_loss, from_uint8, psnr, to_uint8
from ge2hist_core.config import ModelConfig

SMALL = ModelConfig(tile_px=16, latent_px=2, latent_channels=4, ae_channels=(8, 16))


def tiles(n: int, px: int = 16) -> np.ndarray:
    return rng.stream(0, "tiles").integers(0, 256, (n, px, px, 3), dtype=np.uint8)


@pytest.fixture
def autoencoder() -> TileAutoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TileAutoencoder(SMALL)


def test_uint8_survives_the_way_to_floats_and_back():
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    np.testing.assert_array_equal(to_uint8(from_uint8(every)), every)


def test_out_of_range_pixels_are_clipped_not_wrapped():
    assert to_uint8(torch.full((1, 3, 1, 1), 1.5)).tolist() == [[[[255, 255, 255]]]]
    assert to_uint8(torch.full((1, 3, 1, 1), -1.5)).tolist() == [[[[0, 0, 0]]]]


@pytest.mark.parametrize("n", [1, 3])
def test_shapes_and_types(autoencoder: TileAutoencoder, n: int):
    latents = autoencoder.encode(tiles(n))
    assert latents.shape == (n, 4, 2, 2) and latents.dtype == torch.float32
    decoded = autoencoder.decode(latents)
    assert decoded.shape == (n, 16, 16, 3) and decoded.dtype == np.uint8


def test_latents_have_zero_mean_and_unit_variance_and_decoding_undoes_the_scaling(autoencoder: TileAutoencoder):
    some = tiles(64)
    raw = autoencoder.encode(some)
    before = autoencoder.decode(raw[:4])
    autoencoder.fit_statistics(3 * raw + 2)
    autoencoder.fit_statistics(raw)
    latents = autoencoder.encode(some)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    # Rounding in the scaling may move a pixel by one grey level.
    assert np.abs(autoencoder.decode(latents[:4]).astype(int) - before).max() <= 1


def test_loss_of_a_picture_shifted_by_a_constant_has_no_gradient_term():
    pixels = rng.normal(0, "pixels", (2, 3, 8, 8))
    terms = autoencoder_loss(pixels + 0.25, pixels)
    assert terms["l1"].item() == pytest.approx(0.25)
    assert terms["gradient"].item() == pytest.approx(0.0, abs=1e-6)


def test_gradient_term_of_a_ramp_is_its_slope():
    ramp = 0.1 * torch.arange(8.0).expand(1, 3, 8, 8)
    assert autoencoder_loss(ramp, torch.zeros_like(ramp))["gradient"].item() == pytest.approx(0.1, rel=1e-5)


def test_psnr_of_a_known_error():
    grey = np.full((1, 4, 4, 3), 100, np.uint8)
    assert psnr(grey + np.uint8(10), grey) == pytest.approx(28.13, abs=0.01)


def test_every_weight_gets_a_finite_gradient(autoencoder: TileAutoencoder):
    pixels = from_uint8(tiles(2))
    out, raw = autoencoder(pixels, torch.ones(2, 4, 2, 2), 0.05)
    assert raw.shape == (2, 4, 2, 2)
    sum(autoencoder_loss(out, pixels).values()).backward()
    for name, weight in autoencoder.named_parameters():
        assert weight.grad is not None and torch.isfinite(weight.grad).all(), name
        assert weight.grad.abs().sum() > 0, name


def test_it_learns_two_pictures(autoencoder: TileAutoencoder):
    colours = np.array([(200, 120, 180), (90, 60, 150)], dtype=np.uint8)
    pixels = from_uint8(np.tile(colours[:, None, None], (1, 16, 16, 1)))
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        out, _ = autoencoder(pixels)
        loss = autoencoder_loss(out, pixels)["l1"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="8 times latent_px"):
        TileAutoencoder(ModelConfig(tile_px=128, latent_px=8))
