"""From noise to a clean latent: DDPM, DDIM and second-order DPM-Solver++ as plain steps.

Forward process (4): ``x_t = alpha_t x_0 + sigma_t eps`` with ``alpha_t^2 = alphabar_t = 1 - sigma_t^2`` and the
cosine schedule of Nichol and Dhariwal 2021 (arXiv 2102.09672), T = 1000. The network predicts ``v``, hence
``x_0 = alpha_t x_t - sigma_t v`` and ``eps = sigma_t x_t + alpha_t v``. Going from time t to an earlier time s:

- ``ddim`` (Song et al. 2021, arXiv 2010.02502, eta = 0): ``x_s = alpha_s x_0 + sigma_s eps``;
- ``dpm++`` (Lu et al. 2022, arXiv 2211.01095, algorithm 2, two-step): the same with ``x_0`` extrapolated from the
  last two estimates in ``lambda = log(alpha / sigma)``; first and last step are of first order;
- ``ddpm`` (5)-(7): ``x_s ~ N(mu, Sigma)`` with ``a = alphabar_t / alphabar_s``. The paper's (7) prints
  ``mu = (x_t - sqrt(1 - a) eps) / sqrt(a)``, a misprint; Ho et al. 2020 (arXiv 2006.11239, eq. 11) has
  ``mu = (x_t - (1 - a) / sqrt(1 - alphabar_t) eps) / sqrt(a)``, which is used here.

Step coefficients are Python floats worked out once in double precision, so a step costs a few multiply-adds beside
the network. Few steps are part of the meaning of a picture: with an exact denoiser DDIM spreads too little at 5-20
steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ge2hist_core.config import SampleConfig

__all__ = ["Net", "OnStep", "Stopped", "alphas_cumprod", "sample", "timesteps"]

Net = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(x_t [n, ...], t int64 scalar tensor, condition [n, ...]) -> v [n, ...]``."""

OnStep = Callable[[int, int, Tensor], "bool | None"]
"""``(i, n, x0_hat)``: step i of n (from 1) is done, ``x0_hat`` is the estimate of the clean latent. True stops."""


class Stopped(Exception):
    """``on_step`` asked to stop; nothing was drawn."""


@cache
def alphas_cumprod(train_timesteps: int) -> tuple[float, ...]:
    """Cosine schedule alphabar_t for t = 0 .. T-1 (``squaredcos_cap_v2``: beta capped at 0.999)."""

    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    out, product = [], 1.0
    for t in range(train_timesteps):
        product *= 1.0 - min(1.0 - f((t + 1) / train_timesteps) / f(t / train_timesteps), 0.999)
        out.append(product)
    return tuple(out)


def timesteps(steps: int, train_timesteps: int) -> list[int]:
    """The times visited, noisiest first: evenly spaced and always beginning at T-1 ("trailing").

    Starting below T-1 would feed pure noise to a network that expects some signal (Lin et al. 2024, arXiv 2305.08891).
    """
    if not 1 <= steps <= train_timesteps:
        raise ValueError(f"steps must be from 1 to {train_timesteps}, got {steps}")
    return [round(train_timesteps * (1 - i / steps)) - 1 for i in range(steps)]


@dataclass(frozen=True)
class _Step:
    """``x_s = x x_t + x0 x0_hat + last x0_hat_before + noise w``."""

    t: int
    alpha: float
    sigma: float
    x: float
    x0: float
    last: float
    noise: float


@cache
def _plan(solver: str, steps: int, train_timesteps: int) -> tuple[_Step, ...]:
    bars = alphas_cumprod(train_timesteps)
    times = timesteps(steps, train_timesteps)
    levels = [(math.sqrt(bars[t]), math.sqrt(1 - bars[t])) for t in times] + [(1.0, 0.0)]
    plan = []
    for i, t in enumerate(times):
        (alpha, sigma), (alpha_s, sigma_s) = levels[i], levels[i + 1]
        # eps = (x_t - alpha x_0) / sigma, so DDIM, and first-order DPM-Solver++, is linear in x_t and x_0.
        x, x0, last, noise = sigma_s / sigma, alpha_s - alpha * sigma_s / sigma, 0.0, 0.0
        if solver == "dpm++" and 0 < i < steps - 1:
            lam_before, lam, lam_s = (math.log(a / s) for a, s in levels[i - 1 : i + 2])
            half_ratio = (lam_s - lam) / (2 * (lam - lam_before))
            last = -half_ratio * x0
            x0 = (1 + half_ratio) * x0
        elif solver == "ddpm":
            a = (alpha / alpha_s) ** 2
            # mu of (7) in its correct form, with eps written in x_t and x_0 as above.
            eps_weight = (1 - a) / sigma / math.sqrt(a)
            x = 1 / math.sqrt(a) - eps_weight / sigma
            x0 = eps_weight * alpha / sigma
            noise = math.sqrt((1 - a) * sigma_s**2) / sigma
        plan.append(_Step(t, alpha, sigma, x, x0, last, noise))
    return tuple(plan)


@torch.inference_mode()
def sample(
    net: Net,
    noise: Tensor,
    condition: Tensor,
    config: SampleConfig,
    *,
    step_noise: Callable[[int], Tensor] | None = None,
    on_step: OnStep | None = None,
    train_timesteps: int = 1000,
) -> Tensor:
    """Draw clean latents.

    Parameters
    ----------
    net: predicts v. Guidance is a wrapper of the network (:class:`ge2hist_core.denoiser.Guided`), not a case here.
    noise: ``[n, ...]`` standard normal x_T. condition: ``[n, ...]``, handed to the network as it is.
    config: solver and steps.
    step_noise: for ``ddpm``: step index (0 first) -> standard normal tensor of noise's shape.
    on_step: called after each step; see :data:`OnStep`.

    Returns
    -------
    ``[n, ...]`` estimate of x_0.

    Raises
    ------
    Stopped: ``on_step`` returned True. ValueError: ``ddpm`` without ``step_noise``.
    """
    if config.solver == "ddpm" and step_noise is None:
        raise ValueError("ddpm draws noise at every step: pass step_noise")
    plan = _plan(config.solver, config.steps, train_timesteps)
    x, before = noise, noise
    for i, step in enumerate(plan):
        v = net(x, torch.tensor(step.t, device=x.device), condition)
        estimate = step.alpha * x - step.sigma * v
        x = step.x * x + step.x0 * estimate
        if step.last:
            x = x + step.last * before
        if step.noise and step_noise is not None:
            x = x + step.noise * step_noise(i)
        before = estimate
        if on_step is not None and on_step(i + 1, len(plan), estimate):
            raise Stopped
    return x
