"""The sampler against closed forms and against diffusers' schedulers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ge2hist_core import rng
from ge2hist_core.config import SampleConfig
from ge2hist_core.sampler import Stopped, alphas_cumprod, sample, timesteps

MEAN, VARIANCE = 0.3, 0.25
T = 1000


def exact_v(x_t: Tensor, t: Tensor, _: Tensor) -> Tensor:
    """v of the exact denoiser for data ~ N(MEAN, VARIANCE)."""
    bar = alphas_cumprod(T)[int(t)]
    alpha, sigma = math.sqrt(bar), math.sqrt(1 - bar)
    x_0 = MEAN + alpha * VARIANCE / (bar * VARIANCE + 1 - bar) * (x_t - alpha * MEAN)
    eps = (x_t - alpha * x_0) / sigma
    return alpha * eps - sigma * x_0


def noise(*shape: int) -> Tensor:
    return rng.normal(5, "x_T", shape).double()


def scheduler(name: str, steps: int):
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

    common = {
        "num_train_timesteps": T,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
    made = {
        "ddim": lambda: DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=True),
        "ddpm": lambda: DDPMScheduler(**common, clip_sample=False),
        "dpm++": lambda: DPMSolverMultistepScheduler(**common, algorithm_type="dpmsolver++", solver_order=2),
    }[name]()
    made.set_timesteps(steps)
    return made


def test_the_cosine_schedule_is_the_one_that_diffusers_calls_squaredcos_cap_v2():
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(num_train_timesteps=T, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    np.testing.assert_allclose(alphas_cumprod(T), theirs.numpy(), rtol=1e-3, atol=1e-8)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers
@pytest.mark.parametrize(
    ("solver", "steps"),
    # Their DDIM goes from t to t - T // steps, which is the next time of its own list only where steps divides T.
    [("ddim", n) for n in (1, 2, 5, 8, 20, 50)] + [("dpm++", n) for n in (1, 2, 5, 8, 12, 16, 20, 50)],
)
def test_times_and_pictures_agree_with_diffusers(solver: str, steps: int):
    theirs = scheduler(solver, steps)
    assert theirs.timesteps.tolist() == timesteps(steps, T)
    x = noise(3, 4)
    for t in theirs.timesteps:
        x = theirs.step(exact_v(x, t, x), t, x).prev_sample
    ours = sample(exact_v, noise(3, 4), torch.empty(3, 0), SampleConfig(solver=solver, steps=steps))
    # Their coefficients are float32.
    np.testing.assert_allclose(ours, x, atol=2e-4)


@pytest.mark.parametrize("steps", [4, 50])
def test_ddpm_agrees_with_diffusers_from_the_same_step_noise(steps: int, monkeypatch: pytest.MonkeyPatch):
    from diffusers.schedulers import scheduling_ddpm

    theirs, x = scheduler("ddpm", steps), noise(3, 4)
    for i, t in enumerate(theirs.timesteps):
        draw = rng.normal(5, "step", (3, 4), i).double()
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, draw=draw, **__: draw)
        x = theirs.step(exact_v(x, t, x), t, x).prev_sample
    ours = sample(
        exact_v,
        noise(3, 4),
        torch.empty(3, 0),
        SampleConfig(solver="ddpm", steps=steps),
        step_noise=lambda i: rng.normal(5, "step", (3, 4), i).double(),
    )
    np.testing.assert_allclose(ours, x, atol=5e-4)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 20, 50, 200, 1000])
def test_ddim_with_an_exact_denoiser_is_an_affine_map_known_for_every_step_count(steps: int):
    """x_0 - m is linear in x_t - alpha m, so each step multiplies the deviation by a known gain."""
    bars = [alphas_cumprod(T)[t] for t in timesteps(steps, T)] + [1.0]
    gain = 1.0
    for bar, bar_s in zip(bars[:-1], bars[1:], strict=True):
        spread = bar * VARIANCE + 1 - bar
        gain *= (math.sqrt(bar * bar_s) * VARIANCE + math.sqrt((1 - bar) * (1 - bar_s))) / spread
    x = noise(6)
    expected = MEAN + gain * (x - math.sqrt(bars[0]) * MEAN)
    ours = sample(exact_v, x, torch.empty(6, 0), SampleConfig(solver="ddim", steps=steps))
    np.testing.assert_allclose(ours, expected, atol=1e-9)


def test_the_second_order_solver_is_nearer_the_exact_flow_than_the_first():
    """The probability flow of Gaussian data maps x_T to m + sqrt(v) (x_T - alpha_T m) / spread_T."""
    x, bar = noise(100), alphas_cumprod(T)[-1]
    exact = MEAN + math.sqrt(VARIANCE) * (x - math.sqrt(bar) * MEAN) / math.sqrt(bar * VARIANCE + 1 - bar)

    def error(solver: str) -> float:
        ours = sample(exact_v, x, torch.empty(100, 0), SampleConfig(solver=solver, steps=16))
        return float((ours - exact).abs().mean())

    assert error("dpm++") < 0.5 * error("ddim")


def test_ddpm_of_1000_steps_draws_the_data_distribution():
    """A wrong weight of eps in (7), such as the paper's misprint, gives another mean and spread."""
    n = 4000
    ours = sample(
        exact_v,
        noise(n),
        torch.empty(n, 0),
        SampleConfig(solver="ddpm", steps=1000),
        step_noise=lambda i: rng.normal(5, "step", (n,), i).double(),
    )
    assert abs(float(ours.mean()) - MEAN) < 4 * math.sqrt(VARIANCE / n)
    # "Small" variance of the reverse step loses a little spread; sampling error of a variance is v sqrt(2 / n).
    assert abs(float(ours.var()) - VARIANCE) < 0.02


def test_on_step_sees_every_clean_estimate_and_the_last_is_the_answer():
    seen: list[tuple[int, int, Tensor]] = []
    config = SampleConfig(solver="ddim", steps=7)
    answer = sample(
        exact_v, noise(2), torch.empty(2, 0), config, on_step=lambda i, n, x: seen.append((i, n, x.clone()))
    )
    assert [(i, n) for i, n, _ in seen] == [(i, 7) for i in range(1, 8)]
    np.testing.assert_allclose(seen[-1][2], answer, atol=1e-12)


def test_true_from_on_step_stops_without_another_network_call():
    calls: list[int] = []

    def net(x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        calls.append(int(t))
        return exact_v(x_t, t, condition)

    with pytest.raises(Stopped):
        sample(net, noise(2), torch.empty(2, 0), SampleConfig(steps=9), on_step=lambda i, n, x: i == 3)
    assert len(calls) == 3


def test_ddpm_without_step_noise_is_refused():
    with pytest.raises(ValueError, match="pass step_noise"):
        sample(exact_v, noise(2), torch.empty(2, 0), SampleConfig(solver="ddpm", steps=4))
