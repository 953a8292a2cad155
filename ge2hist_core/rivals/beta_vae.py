"""Beta-VAE of expression: what RNA-GAN and RNA-CDM make of a cell before any picture is drawn.

Both papers compress log-transformed, standardised expression with one variational autoencoder (Higgins et al. 2017,
beta-VAE, openreview.net/forum?id=Sy2fzU9gl) and condition on the whole latent. There is no second latent and no label:
identity and environment are not told apart.

Published (RNA-GAN's configuration): 19,198 genes -> 6000 -> 4000 -> 2048 and back, dropout of the input, batch
normalisation, leaky ReLU, ``L = MSE + beta KL`` with beta = 0.0005, Adam at 5e-5, 500 epochs of bulk samples. Changed
here:

- widths 768 -> 512 -> 256 by default: the panel has hundreds of genes, and two CPU cores train it;
- depth is removed first (counts per 10,000), since cells, unlike bulk samples, differ in it;
- no tanh on the decoder: standardised counts of single cells often exceed 1;
- Adam at 1e-3 for ``vae_steps`` steps, the rates of the paper being made for some hundred epochs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ge2hist_core import rng
from ge2hist_core.rivals.common import Rival, TrainingTiles, descend

if TYPE_CHECKING:
    import scipy.sparse as sp

__all__ = ["BetaVAE", "ExpressionRival"]

STATISTICS_CELLS = 4096


class BetaVAE(nn.Module):
    """Standardisation, encoder and decoder of expression.

    Parameters
    ----------
    n_genes: columns of the counts. hidden: widths of the encoder's layers, the last is also the latent's size.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, n_genes: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.dim = hidden[-1]
        self.encoder = _layers((n_genes, *hidden))
        self.mu, self.log_variance = nn.Linear(self.dim, self.dim), nn.Linear(self.dim, self.dim)
        back = hidden[-2::-1]
        self.decoder = nn.Sequential(_layers((self.dim, *back)), nn.Linear((self.dim, *back)[-1], n_genes))
        self.register_buffer("mean", torch.zeros(n_genes))
        self.register_buffer("std", torch.ones(n_genes))

    def fit_standardisation(self, counts: sp.csr_matrix) -> None:
        """Take mean and standard deviation of each gene from training counts ``[cell, gene]``."""
        values = log_normalised(counts)
        self.mean.copy_(values.mean(0))
        self.std.copy_(values.std(0).clamp_min(1e-3))

    def standardise(self, counts: sp.csr_matrix) -> Tensor:
        """Raw counts ``[cell, gene]`` -> log counts per 10,000, 0 +- 1 over training cells."""
        return (log_normalised(counts) - self.mean) / self.std

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised expression ``[cell, gene]`` -> mean and log variance of q(z|x), ``[cell, dim]``."""
        hidden = self.encoder(x)
        return self.mu(hidden), self.log_variance(hidden).clamp(-12, 6)

    def terms(self, x: Tensor, keep: Tensor, eps: Tensor) -> dict[str, Tensor]:
        """``rec``: mean squared error; ``kl``: KL to N(0, I) in nats, summed over dimensions, mean over cells.

        Parameters
        ----------
        x: ``[cell, gene]``. keep: bool ``[cell, gene]``, False where the input is dropped. eps: ``[cell, dim]``.
        """
        mu, log_variance = self.encode(2.0 * x * keep)  # dropout of one half
        z = mu + (0.5 * log_variance).exp() * eps
        kl = 0.5 * (mu.square() + log_variance.exp() - 1.0 - log_variance).sum(1).mean()
        return {"rec": nn.functional.mse_loss(self.decoder(z), x), "kl": kl}


def _layers(sizes: tuple[int, ...]) -> nn.Sequential:
    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    return nn.Sequential(
        *(layer for a, b in pairs for layer in (nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.LeakyReLU()))
    )


def log_normalised(counts: sp.csr_matrix) -> Tensor:
    """``ln(1 + 10,000 count / total)`` as float32 ``[cell, gene]``; a cell without counts stays 0."""
    dense = counts.toarray().astype(np.float32)
    total = np.maximum(dense.sum(axis=1, keepdims=True), 1.0)
    return torch.from_numpy(np.log1p(1e4 * dense / total))


class ExpressionRival(Rival):
    """A rival whose first ``vae_steps`` steps train the beta-VAE; the picture's networks follow on its frozen latent.

    Its latents are standardised over the training cells, so that a network sees numbers of unit scale.
    """

    conditional = True

    def _build(self) -> dict[str, nn.Module]:
        vae = BetaVAE(len(self.genes), self.config.vae_hidden)
        vae.register_buffer("latent_mean", torch.zeros(vae.dim))
        vae.register_buffer("latent_variance", torch.ones(vae.dim))
        return {"vae": vae, **self._build_pictures(vae.dim)}

    @abstractmethod
    def _build_pictures(self, dim: int) -> dict[str, nn.Module]:
        """Fresh networks of the picture; ``dim`` is the latent's size."""

    @abstractmethod
    def _update_pictures(
        self, step: int, tiles: TrainingTiles, optimizers: Mapping[str, torch.optim.Optimizer]
    ) -> dict[str, float]:
        """One step of the picture's networks; ``step`` counts from the end of the beta-VAE's training."""

    @property
    def vae(self) -> BetaVAE:
        vae = self.nets["vae"]
        assert isinstance(vae, BetaVAE)
        return vae

    def _vae_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.vae.parameters(), lr=self.config.vae_learning_rate)

    def _fit_statistics(self, tiles: TrainingTiles) -> None:
        self.vae.fit_standardisation(tiles.counts(self._some(tiles)))

    def _some(self, tiles: TrainingTiles) -> np.ndarray:
        return rng.stream(self.seed, "beta-VAE statistics").permutation(tiles.rows)[:STATISTICS_CELLS]

    def _first_step_alike(self, step: int) -> int:
        # The very first step of the picture's networks also fits the latent's statistics.
        return 0 if step < self.config.vae_steps else self.config.vae_steps + 1

    def _decay(self, step: int) -> float:
        return super()._decay(max(0, step - self.config.vae_steps))

    def _update(
        self, step: int, tiles: TrainingTiles, optimizers: Mapping[str, torch.optim.Optimizer]
    ) -> dict[str, float]:
        if step < self.config.vae_steps:
            return self._update_vae(step, tiles, optimizers["vae"])
        self.vae.eval()
        if step == self.config.vae_steps:
            self._fit_latent(tiles)
        return self._update_pictures(step - self.config.vae_steps, tiles, optimizers)

    def _update_vae(self, step: int, tiles: TrainingTiles, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        n = self.config.vae_batch
        x = self.vae.standardise(tiles.counts(tiles.choose("beta-VAE cells", step, n)))
        keep = torch.from_numpy(rng.stream(self.seed, "beta-VAE dropout", step).random(tuple(x.shape)) < 0.5)
        terms = self.vae.terms(x, keep, rng.normal(self.seed, "beta-VAE eps", (n, self.vae.dim), step))
        loss = terms["rec"] + self.config.beta * terms["kl"]
        descend(optimizer, loss)
        return {name: value.item() for name, value in terms.items()}

    @torch.no_grad()
    def _fit_latent(self, tiles: TrainingTiles) -> None:
        mu = self.vae.encode(self.vae.standardise(tiles.counts(self._some(tiles))))[0]
        self.vae.get_buffer("latent_mean").copy_(mu.mean(0))
        self.vae.get_buffer("latent_variance").copy_(mu.var(0, unbiased=False))

    @torch.no_grad()
    def condition(self, counts: sp.csr_matrix) -> Tensor:
        """Raw counts ``[n, gene]`` -> mean of q(z|x), ``[n, dim]``."""
        vae = self.vae.eval()
        # Cell by cell: in a small matrix product a row's rounding depends on its place.
        return torch.cat([vae.encode(x[None])[0] for x in vae.standardise(counts)])
