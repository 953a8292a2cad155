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

    def fit_standardisation(self, values: Tensor) -> None:
        """Take mean and standard deviation of each gene from :func:`log_normalised` training cells ``[cell, gene]``."""
        self.mean.copy_(values.mean(0))
        self.std.copy_(values.std(0).clamp_min(1e-3))

    def standardise(self, values: Tensor) -> Tensor:
        """:func:`log_normalised` counts ``[cell, gene]`` -> 0 +- 1 over training cells."""
        return (values - self.mean) / self.std

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
    def _batch_pictures(self, step: int, tiles: TrainingTiles) -> dict[str, Tensor]:
        """What a step of the picture's networks needs; ``step`` counts from the end of the beta-VAE's training."""

    @abstractmethod
    def _update_pictures(
        self, step: int, batch: Mapping[str, Tensor], optimizers: Mapping[str, torch.optim.Optimizer]
    ) -> dict[str, Tensor]:
        """One step of the picture's networks."""

    @property
    def vae(self) -> BetaVAE:
        vae = self.nets["vae"]
        assert isinstance(vae, BetaVAE)
        return vae

    def _vae_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.vae.parameters(), lr=self.config.vae_learning_rate)

    def _fit_statistics(self, tiles: TrainingTiles) -> None:
        self.vae.fit_standardisation(self._some(tiles))

    def _some(self, tiles: TrainingTiles) -> Tensor:
        rows = rng.stream(self.seed, "beta-VAE statistics").permutation(tiles.rows)[:STATISTICS_CELLS]
        return log_normalised(tiles.counts(rows))

    def _first_step_alike(self, step: int) -> int:
        # The very first step of the picture's networks also fits the latent's statistics.
        return 0 if step < self.config.vae_steps else self.config.vae_steps + 1

    def _decay(self, step: int) -> float:
        return super()._decay(max(0, step - self.config.vae_steps))

    def _batch(self, step: int, tiles: TrainingTiles) -> dict[str, Tensor]:
        c, n = self.config, self.config.vae_batch
        if step >= c.vae_steps:
            some = {"some": self._some(tiles)} if step == c.vae_steps else {}
            return self._batch_pictures(step - c.vae_steps, tiles) | some
        values = log_normalised(tiles.counts(tiles.choose("beta-VAE cells", step, n)))
        keep = rng.stream(self.seed, "beta-VAE dropout", step).random(tuple(values.shape)) < 0.5
        eps = rng.normal(self.seed, "beta-VAE eps", (n, self.vae.dim), step)
        return {"values": values, "keep": torch.from_numpy(keep), "eps": eps}

    def _update(
        self, step: int, batch: Mapping[str, Tensor], optimizers: Mapping[str, torch.optim.Optimizer]
    ) -> dict[str, Tensor]:
        if step < self.config.vae_steps:
            terms = self.vae.terms(self.vae.standardise(batch["values"]), batch["keep"], batch["eps"])
            descend(optimizers["vae"], terms["rec"] + self.config.beta * terms["kl"])
            return terms
        self.vae.eval()
        if step == self.config.vae_steps:
            self._fit_latent(batch["some"])
        return self._update_pictures(step - self.config.vae_steps, batch, optimizers)

    @torch.no_grad()
    def _fit_latent(self, values: Tensor) -> None:
        mu = self.vae.encode(self.vae.standardise(values))[0]
        self.vae.get_buffer("latent_mean").copy_(mu.mean(0))
        self.vae.get_buffer("latent_variance").copy_(mu.var(0, unbiased=False))

    @torch.no_grad()
    def condition(self, values: Tensor) -> Tensor:
        """:func:`log_normalised` counts ``[n, gene]`` -> mean of q(z|x), ``[n, dim]``."""
        vae = self.vae.eval()
        # Cell by cell where pictures are drawn: in a small matrix product a row's rounding depends on its place.
        size = 1 if values.device.type == "cpu" else len(values)
        return torch.cat([vae.encode(x)[0] for x in vae.standardise(values).split(size)])
