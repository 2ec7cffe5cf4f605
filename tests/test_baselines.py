"""The baselines against closed forms."""

import baselines
import pytest
import torch
from manifold import Projection, VectorGaussian, first_state, manifold
from test_method import ExactDenoiser, draw, gaussian

from diffem import Blur, Config, Corruption, Denoiser, Downsample, Gaussian, Mask, Noise


@pytest.mark.parametrize("variant", ["jacobian", "covariance"])
def test_moment_matching_is_exact_for_a_gaussian(variant, generator):
    mean, covariance = gaussian(4, generator)
    corruption = Projection(rows=2, noise=0.3)
    y = corruption(draw(mean, covariance, 16, generator), generator)
    exact = ExactDenoiser(mean, covariance, corruption)  # where y = 0, unconditional
    prior = None
    if variant == "covariance":
        l, V = torch.linalg.eigh(covariance.float())
        psi = float(l[0]) / 2
        prior = VectorGaussian(mean.float(), V * (l - psi).sqrt(), psi)
    xt, sigma = torch.randn(16, 4, generator=generator), torch.linspace(0.1, 3, 16)
    for iterations in (0, 10):  # exactly, and by conjugate gradients
        guided = baselines.MMPS(exact, corruption, iterations, prior)
        torch.testing.assert_close(guided(xt, sigma, y), exact(xt, sigma, y), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("corruption", [Noise(0.3), Blur(1.0, 0.1), Downsample(2, 0.3)])
def test_moment_matching_agrees_with_the_conditional_denoiser(corruption, generator):
    """While F is 0, both are the posterior mean of a smooth Gaussian."""
    gaussian, config = Gaussian([1, 8, 8], power=3.0), Config(channels=(8,))
    conditional, other = (Denoiser(gaussian, corruption, config) for _ in range(2))
    other.likelihood = Corruption(block=0)
    x0, sigma = gaussian.sample(4, generator), torch.tensor([0.1, 0.5, 1.0, 5.0])
    xt = x0 + sigma.view(-1, 1, 1, 1) * torch.randn(x0.shape, generator=generator)
    y = corruption(x0, generator)
    with torch.no_grad():
        guided = baselines.MMPS(other, corruption, 50)(xt, sigma, y)
        least = 5e-3 if corruption.block != 2 else 0.04  # D takes 4 steps of conjugate gradients there
        torch.testing.assert_close(guided, conditional(xt, sigma, y), atol=least, rtol=0)


def test_em_mmps_samples_agree_with_the_observations(generator):
    x0 = manifold(torch.rand(512, generator=generator), 0)
    corruption = Projection(noise=0.1)
    y = corruption(x0, generator)
    config = Config(
        channels=(32,), laps=1, steps=50, batch=64, sigma_max=10.0, sample_steps=128, start_rank=4
    )
    for gaussian_covariance in (False, True):
        run = baselines.em_mmps(y, corruption, config, 0, first_state(y, corruption, config))
        state = next(run)
        state.gaussian = gaussian_covariance
        *_, state = run
        assert state.lap == 1 and state.drawn == 512
        error = (corruption.measure(state.x0, y) - y[..., -1]) / corruption.noise
        assert 0.5 < error.square().mean().sqrt() < 1.5
        # The denoiser has never been shown an observation
        blank = state.average(state.x0, torch.ones(512), torch.zeros_like(y))
        assert blank.isfinite().all()


def test_ambient_diffusion_learns_what_is_masked(generator):
    """Constant images, of which half of the pixels are missing, each white or black: the rest follows from any pixel."""
    x0 = torch.randn(256, 1, 1, 1, generator=generator).sign().expand(-1, 1, 8, 8)
    y = Mask(0.5, noise=0.0)(x0, generator)
    config = Config(channels=(16,), blocks=1, batch=32, ema=0.9)
    steps = iter(range(400))
    denoiser = baselines.ambient(y, 0.5, 0.2, config, lambda: next(steps, None) is not None)
    assert denoiser.rate == pytest.approx(0.6)
    xt = x0[:64] + 0.5 * torch.randn(64, 1, 8, 8, generator=generator)
    with torch.no_grad():
        error = denoiser(xt, torch.full((64,), 0.5), y[:64]) - x0[:64]
    assert error.square().mean().sqrt() < 0.25
    restored = baselines.AmbientMean(denoiser.denoiser).sample(y[:64], 8, "ddpm", generator)
    assert (restored - x0[:64]).square().mean().sqrt() < 0.25
    masks = []  # of new images: one for each, the same in all steps
    denoiser.denoiser.register_forward_pre_hook(lambda module, inputs: masks.append(inputs[2][:, -1]))
    denoiser.sample(y[:2], 2, "ddpm", generator)
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0][0], masks[0][1])
