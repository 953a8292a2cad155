"""Loss terms against independent formulas, the mixture against planted clusters, probes against planted codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

from ge2hist_core import rng
from ge2hist_core.config import ModelConfig
from ge2hist_core.vae import (
    StateEncoder,
    active_units,
    classification_loss,
    fit_mixture,
    follow_type_mean,
    kl_divergence,
    probe_accuracy,
    probe_r2,
    type_leak,
    type_prior,
)

SMALL = ModelConfig(embedding_dim=12, d_c=3, d_e=2, vae_hidden=8, cell_types=("a", "b", "c"))


def test_losses_are_those_of_torch_distributions_and_of_the_definition():
    q = Normal(rng.normal(0, "loc", (5, 3)), rng.normal(0, "scale", (5, 3)).exp())
    expected = torch_kl(q, Normal(0.0, 1.0)).sum(1).mean() / 12
    torch.testing.assert_close(kl_divergence(q, 12), expected)

    means, labels = rng.normal(0, "means", (3, 3)), torch.tensor([0, 2, 1, 1, 0])
    expected = torch_kl(q, Normal(means[labels], 1.0)).sum(1).mean() / 12
    torch.testing.assert_close(type_prior(q, means, labels, 12), expected)

    logits = rng.normal(0, "logits", (5, 3))
    expected = -torch.stack([row.softmax(0)[j].log() for row, j in zip(logits, labels, strict=True)]).mean()
    torch.testing.assert_close(classification_loss(logits, labels), expected)


def test_standardised_training_embeddings_have_zero_mean_and_unit_variance_whatever_their_scale():
    encoder = StateEncoder(SMALL)
    embedding = 0.01 * rng.normal(0, "e", (400, 12)) + 0.06
    encoder.fit_standardisation(embedding, torch.arange(400) % 3)
    standard = encoder.standardise(embedding)
    torch.testing.assert_close(standard.mean(0), torch.zeros(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(standard.std(0), torch.ones(12), atol=1e-3, rtol=0)


def test_the_niche_vae_sees_what_the_type_leaves_in_units_of_the_spread_within_types():
    """With a classifier that knows the types for certain, type means vanish and the spread within types becomes 1."""
    encoder, labels = StateEncoder(SMALL), torch.arange(600) % 3
    shift = 5.0 * rng.normal(0, "shift", (3, 12))
    embedding = shift[labels] + rng.normal(0, "within", (600, 12)) * torch.linspace(0.5, 2.0, 12)
    encoder.fit_standardisation(embedding, labels)
    standard = encoder.standardise(embedding)
    q_c = encoder.type_vae.inference(standard)
    certain = 100.0 * torch.eye(3)[labels]
    encoder.type_vae.logits = lambda z_c: certain
    left = encoder.residual(standard, q_c)
    for name in range(3):
        torch.testing.assert_close(left[labels == name].mean(0), torch.zeros(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(left.std(0), torch.ones(12), atol=1e-2, rtol=0)
    # In doubt between two types, half of each one's mean is taken away.
    encoder.type_vae.logits = lambda z_c: torch.tensor([[50.0, 50.0, -50.0]]).expand(len(z_c), 3)
    half = standard - encoder.type_mean[:2].mean(0)
    torch.testing.assert_close(encoder.residual(standard, q_c) * encoder.residual_std, half, atol=1e-4, rtol=1e-4)


def test_a_dimension_that_never_varies_stays_finite():
    encoder = StateEncoder(SMALL)
    encoder.fit_standardisation(torch.ones(10, 12), torch.zeros(10, dtype=torch.int64))
    q_c, q_e = encoder(torch.ones(2, 12))
    assert q_c.loc.shape == (2, 3) and q_e.loc.shape == (2, 2)
    assert torch.isfinite(q_c.loc).all() and torch.isfinite(q_e.scale).all()


def test_the_mixture_finds_planted_components_and_samples_from_them():
    """Type 0 has two clusters, type 1 one correlated cluster, type 2 no cells at all (it gets the mixture of all)."""
    g = rng.stream(0, "planted")
    a = np.concatenate([g.normal((-4, 0), 0.5, (300, 2)), g.normal((4, 0), 0.5, (100, 2))])
    root = np.array([[1.0, 0.0], [0.8, 0.6]])
    b = (1, 5) + g.standard_normal((500, 2)) @ root.T
    mixture = fit_mixture(np.concatenate([a, b]), np.repeat([0, 1], [400, 500]), 3, seed=0)

    assert (mixture.weights > 0).sum(1)[:2].tolist() == [2, 1]
    np.testing.assert_allclose(mixture.weights.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(sorted(mixture.weights[0])[1:], [0.25, 0.75], atol=0.02)
    drawn = mixture.sample(1, 4000, seed=1)
    np.testing.assert_allclose(drawn.mean(0), b.mean(0), atol=4 / np.sqrt(4000))
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(b.T), atol=0.1)
    left = (mixture.sample(0, 2000, seed=1)[:, 0] < 0).mean()
    assert abs(left - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 2000) + 0.01


def test_a_draw_depends_on_its_number_alone():
    mixture = fit_mixture(rng.normal(0, "z", (200, 2)).numpy(), np.zeros(200, int), 1, seed=0)
    np.testing.assert_array_equal(mixture.sample(0, 7, seed=3)[:4], mixture.sample(0, 4, seed=3))
    assert mixture.sample(0, 0, seed=3).shape == (0, 2)


def test_probes_read_what_was_planted_and_nothing_else():
    g = rng.stream(0, "probe")
    labels = g.integers(3, size=2000)
    code = np.eye(3)[labels] + 0.1 * g.standard_normal((2000, 3))
    blank = g.standard_normal((2000, 3))
    half = slice(None, 1000), slice(1000, None)
    assert probe_accuracy(code[half[0]], labels[half[0]], code[half[1]], labels[half[1]]) > 0.99
    assert abs(probe_accuracy(blank[half[0]], labels[half[0]], blank[half[1]], labels[half[1]]) - 1 / 3) < 0.07

    values = np.stack([blank[:, 0] + g.standard_normal(2000), g.standard_normal(2000)], axis=1)
    r2 = probe_r2(blank[half[0]], values[half[0]], blank[half[1]], values[half[1]])
    np.testing.assert_allclose(r2, [0.5, 0.0], atol=0.06)


def test_active_units_are_the_dimensions_that_vary():
    mu = rng.stream(0, "mu").standard_normal((500, 4)) * (1.0, 0.0, 0.3, 0.05)
    assert active_units(mu) == 2


@pytest.mark.parametrize("n", [1, 3])
def test_shapes(n: int):
    encoder = StateEncoder(SMALL)
    q_c, q_e = encoder(torch.zeros(n, 12))
    assert q_c.loc.shape == q_c.scale.shape == (n, 3)
    assert encoder.type_vae.logits(q_c.loc).shape == (n, 3)
    assert encoder.niche_vae.generative(q_e.loc).shape == (n, 12)


def test_type_leak_is_the_mean_inner_product_with_the_types_mean_over_the_mean_square():
    mu, labels, means = rng.normal(0, "mu", (7, 3)), torch.tensor([0, 1, 0, 2, 1, 0, 3]), rng.normal(0, "m", (4, 3))
    products = torch.stack([mu[i] @ means[labels[i]] for i in range(7)])
    expected = products.mean() / torch.stack([row @ row for row in mu]).mean()
    assert type_leak(mu, labels, means).item() == pytest.approx(expected.item(), abs=1e-6)
    assert type_leak(9 * mu, labels, 9 * means).item() == pytest.approx(expected.item(), abs=1e-6), "free of scale"


def test_type_leak_pulls_type_means_to_zero_and_leaves_the_scale_alone():
    labels = torch.arange(2).repeat(8)
    means = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]])
    mu = (rng.normal(0, "mu", (16, 3)) * 0.1 + means[labels]).requires_grad_(True)
    leak = type_leak(mu, labels, means)
    leak.backward()
    assert 0.9 < leak.item() <= 1.1
    assert (mu.grad[:, 0] * mu.detach()[:, 0] > 0).all(), "a step down moves every cell towards 0 along the type's axis"
    assert (mu.grad[:, 1:] == 0).all()


def test_the_running_mean_follows_the_types_that_occur():
    means = torch.zeros(3, 2)
    mu, labels = torch.tensor([[2.0, 0.0], [4.0, 2.0], [1.0, 1.0]]), torch.tensor([0, 0, 2])
    follow_type_mean(means, mu, labels, 0.5)
    torch.testing.assert_close(means, torch.tensor([[1.5, 0.5], [0.0, 0.0], [0.5, 0.5]]))
    for _ in range(50):
        follow_type_mean(means, mu, labels, 0.5)
    torch.testing.assert_close(means[0], torch.tensor([3.0, 1.0]))
