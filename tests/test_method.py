"""The method against closed forms: linear-Gaussian data, where p(x0 | y) is known."""

import math

import pytest
import torch
from torch import nn

import diffem
from diffem import (
    Blur, Config, Denoiser, Downsample, GaussianPrior, Jpeg, Mask, Noise, Projection, denoising_loss, fit_prior, m_step,
    new_state, noise_level, principal_components, sample,
)  # fmt: skip


class ExactDenoiser(nn.Module):
    """E[x0 | xt, y] for x0 ~ N(mean, covariance) and y = A x0 + s eps: what a perfect network would give."""

    def __init__(self, mean, covariance, corruption, sigma_min=1e-3, sigma_max=1e2):
        super().__init__()
        self.mean, self.precision, self.corruption = mean, torch.linalg.inv(covariance), corruption
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def posterior(self, y):
        """Precision (B, d, d) and precision times mean (B, d) of x0 given y."""
        A, value = y[..., :-1].double(), y[..., -1].double()
        P = self.precision + A.mT @ A / self.corruption.noise**2
        return P, self.precision @ self.mean + torch.einsum("bmd,bm->bd", A, value) / self.corruption.noise**2

    def forward(self, xt, sigma, y):
        P, h = self.posterior(y)
        variance = sigma.double()[:, None] ** 2
        P = P + torch.eye(P.shape[-1]) / variance[..., None]
        return torch.linalg.solve(P, (h + xt / variance)[..., None])[..., 0].float()


def gaussian(d, generator):
    root = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(d, generator=generator, dtype=torch.float64), root @ root.T / d + 0.05 * torch.eye(d)


def draw(mean, covariance, number, generator):
    eps = torch.randn(number, len(mean), generator=generator, dtype=torch.float64)
    return (mean + eps @ torch.linalg.cholesky(covariance).T).float()


@pytest.mark.parametrize("method, steps", [("ddpm", 300), ("ddim", 300), ("sde2m", 64), ("dpm2m", 64)])
def test_sampler_with_exact_denoiser_gives_the_exact_posterior(method, steps, generator):
    mean, covariance = gaussian(3, generator)
    corruption = Projection(rows=1, noise=0.3)
    y = corruption(draw(mean, covariance, 1, generator), generator)
    denoiser = ExactDenoiser(mean, covariance, corruption)
    x = sample(denoiser, y.expand(20_000, -1, -1), steps, method, generator).double()
    P, h = denoiser.posterior(y)
    C = torch.linalg.inv(P)[0]
    expected = C @ h[0]
    # Monte-Carlo error of 20,000 draws, and 3 % for the finite steps
    assert ((x.mean(0) - expected).abs() < 4 * (C.diag() / len(x)).sqrt() + 0.03 * C.diag().sqrt()).all()
    scale = (C.diag()[:, None] * C.diag()).sqrt()
    assert ((torch.cov(x.T) - C).abs() / scale).max() < 0.06


def test_zero_observation_samples_the_prior(generator):
    mean, covariance = gaussian(3, generator)
    denoiser = ExactDenoiser(mean, covariance, Projection(rows=1, noise=0.3))
    x = sample(denoiser, torch.zeros(20_000, 1, 4), 300, "ddpm", generator).double()
    assert (x.mean(0) - mean).abs().max() < 0.05
    assert (torch.cov(x.T) - covariance).abs().max() < 0.06 * covariance.max()


def log_likelihood(mean, covariance, y, noise):
    """Of observations y (N, m, d + 1) under x0 ~ N(mean, covariance)."""
    A, value = y[..., :-1].double(), y[..., -1].double()
    S = A @ covariance @ A.mT + noise**2 * torch.eye(A.shape[1])
    normal = torch.distributions.MultivariateNormal(A @ mean, S)
    return float(normal.log_prob(value).mean())


def test_exact_em_raises_the_likelihood_at_every_lap(generator):
    """DiffEM with a perfect M-step: the E-step by `sample`, then the Gaussian of the samples."""
    mean, covariance = gaussian(3, generator)
    corruption = Projection(rows=1, noise=0.1)
    y = corruption(draw(mean, covariance, 8000, generator), generator)
    m, C = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    likelihoods = [log_likelihood(m, C, y, 0.1)]
    for _ in range(5):
        x = sample(ExactDenoiser(m, C, corruption), y, 64, "ddpm", generator).double()
        m, C = x.mean(0), torch.cov(x.T)
        likelihoods.append(log_likelihood(m, C, y, 0.1))
    gains = torch.tensor(likelihoods).diff()
    assert (gains > 0).all(), likelihoods
    assert likelihoods[-1] > log_likelihood(mean, covariance, y, 0.1) - 0.05


def test_the_gaussian_priors_em_raises_the_likelihood_at_every_lap(generator):
    mean, covariance = gaussian(4, generator)
    corruption = Projection(rows=2, noise=0.1)
    y = corruption(draw(mean, covariance, 6000, generator), generator)
    likelihoods = [log_likelihood(torch.zeros(4).double(), torch.eye(4).double(), y, 0.1)]
    for laps in range(1, 6):
        prior = fit_prior(y, corruption, rank=3, laps=laps, generator=torch.Generator().manual_seed(1))
        C = (prior.U @ prior.U.T + prior.psi * torch.eye(4)).double()
        likelihoods.append(log_likelihood(prior.mean.double(), C, y, 0.1))
    assert (torch.tensor(likelihoods).diff() > 0).all(), likelihoods


@pytest.mark.parametrize(
    "corruption, shape",
    [(Mask(0.5, 0.1), [1, 6, 6]), (Blur(0.6, 0.1), [1, 6, 6]), (Downsample(2, 0.1), [1, 6, 6]), (Projection(2, 0.1), [6])],
)
def test_matheron_draws_match_the_closed_form(corruption, shape, generator):
    d, number = math.prod(shape), 20_000
    mean, U = torch.randn(d, generator=generator), torch.randn(d, 4, generator=generator)
    prior = GaussianPrior(mean.view(shape), U, 0.2, corruption)
    y = corruption(prior.sample(1, generator), generator)
    x = prior.posterior(y.expand(number, *y.shape[1:]), generator).flatten(1).double()
    # A as a matrix; of repeated rows (downsample) one each, of masked ones none
    basis = torch.eye(d).view(d, *shape)
    A = torch.cat([corruption.measure(e[None], y).flatten(1) for e in basis]).T.double()
    rows = torch.unique(A, dim=0, return_inverse=True)[1]
    first = [int((rows == i).nonzero()[0]) for i in rows.unique()]
    first = [i for i in first if A[i].abs().sum() > 0]
    A, value = A[first], corruption.value(y).flatten().double()[first]
    Sigma = (U @ U.T + 0.2 * torch.eye(d)).double()
    K = Sigma @ A.T @ torch.linalg.inv(A @ Sigma @ A.T + 0.1**2 * torch.eye(len(A)))
    expected, C = mean.double() + K @ (value - A @ mean.double()), Sigma - K @ A @ Sigma
    assert ((x.mean(0) - expected).abs() < 5 * (C.diag() / number).sqrt() + 2e-3).all()
    scale = (C.diag()[:, None] * C.diag()).sqrt()
    assert ((torch.cov(x.T) - C).abs() < 0.05 * scale + 2e-3).all()


def test_draws_agree_with_blurred_observations_where_some_variances_are_a_million_times_the_noises(generator):
    corruption, shape = Blur(1.0, 0.02), (3, 32, 32)
    smooth = torch.nn.functional.interpolate(torch.randn(64, 3, 8, 8, generator=generator), size=(32, 32), mode="bicubic")
    prior = GaussianPrior(torch.zeros(shape), smooth.flatten(1).T / 8, 0.5, corruption)
    y = corruption(prior.sample(8, generator), generator)
    x = prior.posterior(y, generator)
    assert (corruption.measure(x, y) - corruption.value(y)).square().mean().sqrt() < 1.05 * 0.02


def test_principal_components_recover_a_low_rank_gaussian(generator):
    truth = GaussianPrior(torch.randn(20, generator=generator), torch.randn(20, 3, generator=generator), 0.1, Noise())
    mean, U, psi = principal_components(truth.sample(50_000, generator), 3, generator)
    torch.testing.assert_close(mean, truth.mean, atol=0.05, rtol=0)
    torch.testing.assert_close(U @ U.T, truth.U @ truth.U.T, atol=0.15, rtol=0)
    assert psi == pytest.approx(0.1, rel=0.02)


def test_nonlinear_prior_does_not_stay_at_the_observations(generator):
    x0 = torch.nn.functional.interpolate(torch.randn(200, 1, 4, 4, generator=generator), size=(16, 16), mode="bicubic")
    corruption = Jpeg(quality=10)
    y = corruption(x0.clamp(-2, 2), generator)
    prior = fit_prior(y, corruption, 16, 4, generator)
    error = float((y[:, :-1] - x0.clamp(-2, 2)).square().mean().sqrt())
    assert 0.3 * error < prior.corruption.noise < 3 * error  # the white noise it stands for is of the right size
    x = prior.posterior(y, generator)
    assert float((corruption.value(corruption(x, generator)) - x).square().mean().sqrt()) > 0.3 * error


def test_noise_levels():
    config = Config(sigma_min=1e-3, sigma_max=1e2)
    levels = noise_level(torch.tensor([0.0, 0.4, 1.0]), config)
    torch.testing.assert_close(levels, torch.tensor([1e-3, 1e-1, 1e2]))


@pytest.mark.parametrize("sigma", [0.03, 1.0, 10.0])
@pytest.mark.parametrize("corruption", [Mask(0.5, 0.1), Blur(1.0, 0.1), Projection(2, 0.1)])
def test_loss_of_an_untrained_denoiser_is_one_on_white_data(corruption, sigma, generator):
    """Its network gives 0, so D is the posterior mean under N(0, I): the right one, and the loss is normalised by it."""
    shape = [5] if isinstance(corruption, Projection) else [1, 8, 8]
    x0 = torch.randn(4000, *shape, generator=generator)
    y = corruption(x0, generator)
    denoiser = Denoiser(shape, list(y.shape[1:]), corruption, Config(channels=(8, 16), blocks=1))
    loss = denoising_loss(denoiser, x0, y, torch.full((4000,), sigma), generator)
    assert float(loss.detach().mean()) == pytest.approx(1.0, abs=5 * float(loss.detach().std()) / math.sqrt(4000) + 0.01)


def test_trained_denoiser_comes_close_to_the_exact_one(generator):
    """At least nine tenths of the way from the untrained denoiser to E[x0 | xt, y], in mean square."""
    mean, covariance = gaussian(3, generator)
    mean, covariance = 0.5 * mean, covariance / covariance.diag().mean()
    corruption = Projection(rows=1, noise=0.3)
    x0 = draw(mean, covariance, 20_000, generator)
    config = Config(channels=(96, 96), batch=512, steps=700, lr=3e-3, ema=0.98, blank=0.0)
    state = new_state(x0, [1, 4], corruption, config)
    untrained = Denoiser([3], [1, 4], corruption, config)
    for step in range(config.steps):
        m_step(state, corruption, config, diffem.generator_for("cpu", 0, 1, step))
    exact = ExactDenoiser(mean, covariance, corruption)
    x0 = draw(mean, covariance, 4000, generator)
    y = corruption(x0, generator)
    for sigma in (0.3, 1.0, 3.0, 20.0):
        level = torch.full((len(x0),), sigma)
        xt = x0 + sigma * torch.randn(x0.shape, generator=generator)
        with torch.no_grad():
            best, ours, before = (D(xt, level, y) for D in (exact, state.model, untrained))
        assert (ours - best).square().mean() < 0.1 * (before - best).square().mean(), sigma


NETWORKS = [
    ([3, 16, 16], Mask(), Config(channels=(16, 32), blocks=1, attention=(1,), dropout=0.1, precision="float32")),
    ([1, 7, 5], Blur(0.5), Config(channels=(8, 8, 16), blocks=2, precision="float32")),  # sizes that do not halve evenly
    ([5], Projection(), Config(channels=(32, 32))),
]


def trained(shape, corruption, config, generator):
    """A denoiser that has left its start, where the last layer is 0, by a few steps."""
    x0 = torch.randn(32, *shape, generator=generator)
    y = corruption(x0, generator)
    config.batch, config.steps = 16, 5
    state = new_state(x0, list(y.shape[1:]), corruption, config)
    for step in range(config.steps):
        m_step(state, corruption, config, diffem.generator_for("cpu", 0, 1, step))
    return state, x0, y


@pytest.mark.parametrize("shape, corruption, config", NETWORKS)
def test_every_parameter_has_a_finite_gradient(shape, corruption, config, generator):
    state, _, _ = trained(shape, corruption, config, generator)
    for name, parameter in state.denoiser.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad.reshape(len(parameter), -1).abs().sum(1) > 0).all(), name  # every row of it is in use


@pytest.mark.parametrize("shape, corruption, config", NETWORKS)
def test_batched_equals_single_and_scripted(shape, corruption, config, generator):
    state, x0, y = trained(shape, corruption, config, generator)
    sigma = torch.logspace(-2, 1, len(x0))
    with torch.no_grad():
        batch = state.model(x0, sigma, y)
        singles = torch.cat([state.model(x0[i : i + 1], sigma[i : i + 1], y[i : i + 1]) for i in range(len(x0))])
        scripted = torch.jit.script(state.model)(x0, sigma, y)
    torch.testing.assert_close(batch, singles, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch, scripted, atol=1e-6, rtol=1e-6)


def test_bfloat16_is_near_float32(generator):
    shape, corruption, config = NETWORKS[0]
    state, x0, y = trained(shape, corruption, config, generator)
    sigma = torch.logspace(-2, 1, len(x0))
    with torch.no_grad():
        full = state.model(x0, sigma, y)
        state.model.bfloat16 = True
        half = state.model(x0, sigma, y)
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().max() < 0.02  # bfloat16 has 8 bits


def test_the_order_the_sign_and_the_mixture_of_rows_do_not_matter(generator):
    state, x0, y = trained(*NETWORKS[2], generator)
    sigma = torch.logspace(-3, 1, len(x0))
    turn = torch.linalg.qr(torch.randn(2, 2, generator=generator)).Q
    with torch.no_grad():
        torch.testing.assert_close(state.model(x0, sigma, turn @ y), state.model(x0, sigma, y), atol=1e-4, rtol=1e-4)


def test_the_learning_rate_is_constant_and_then_falls():
    config = Config(laps=4, steps=100, lr=1e-3)
    assert [config.learning_rate(lap, 0) for lap in (1, 2, 3, 4)] == pytest.approx([1e-3, 1e-3, 1e-3, 5e-4])
    assert config.learning_rate(4, 50) == pytest.approx(2.5e-4) and config.learning_rate(4, 99) > 0
