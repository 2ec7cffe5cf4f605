"""The method against closed forms: linear-Gaussian data, where p(x0 | y) is known."""

import math

import pytest
import torch
from manifold import Projection, VectorDenoiser
from sklearn.datasets import load_sample_image
from torch import nn

import diffem
from diffem import (
    Block,
    Blur,
    Config,
    Corruption,
    Denoiser,
    Downsample,
    Gaussian,
    Jpeg,
    Mask,
    Noise,
    fit_start,
    inverse,
    m_step,
    new_denoiser,
    new_state,
    random_noise_level,
    transform,
)  # fmt: skip


class ExactDenoiser(nn.Module):
    """E[x0 | xt, y] for x0 ~ N(mean, covariance) and y = A x0 + s eps: what a perfect network would give."""

    def __init__(self, mean, covariance, corruption, sigma_min=1e-3, sigma_max=1e2):
        super().__init__()
        self.mean, self.precision, self.corruption = mean, torch.linalg.inv(covariance), corruption
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    sample = Denoiser.sample

    def shape(self, y):
        return [len(y), y.shape[2] - 1]

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
    x = denoiser.sample(y.expand(20_000, -1, -1), steps, method, generator).double()
    P, h = denoiser.posterior(y)
    C = torch.linalg.inv(P)[0]
    expected = C @ h[0]
    # Monte-Carlo error of 20,000 draws, and 3 % for the finite steps
    assert ((x.mean(0) - expected).abs() < 4 * (C.diag() / len(x)).sqrt() + 0.03 * C.diag().sqrt()).all()
    scale = (C.diag()[:, None] * C.diag()).sqrt()
    assert ((torch.cov(x.T) - C).abs() / scale).max() < 0.06


@pytest.mark.parametrize("method", diffem.METHODS)
def test_one_evaluation_gives_the_posterior_mean(method, generator):
    mean, covariance = gaussian(3, generator)
    y = (corruption := Projection(rows=1, noise=0.3))(draw(mean, covariance, 8, generator), generator)
    denoiser = ExactDenoiser(mean, covariance, corruption)
    P, h = denoiser.posterior(y)
    expected = torch.linalg.solve(P, h[..., None])[..., 0].float()
    # sigma_max is 100: xt still says a little
    torch.testing.assert_close(denoiser.sample(y, 1, method, generator), expected, atol=0.1, rtol=0)


def test_zero_observation_samples_the_prior(generator):
    mean, covariance = gaussian(3, generator)
    denoiser = ExactDenoiser(mean, covariance, Projection(rows=1, noise=0.3))
    x = denoiser.sample(torch.zeros(20_000, 1, 4), 300, "ddpm", generator).double()
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
        x = ExactDenoiser(m, C, corruption).sample(y, 64, "ddpm", generator).double()
        m, C = x.mean(0), torch.cov(x.T)
        likelihoods.append(log_likelihood(m, C, y, 0.1))
    gains = torch.tensor(likelihoods).diff()
    assert (gains > 0).all(), likelihoods
    assert likelihoods[-1] > log_likelihood(mean, covariance, y, 0.1) - 0.05


# ---- The smooth Gaussian


def smooth_gaussian(channels, generator, rank=0):
    """With another scale and power in each colour, and a mean."""
    gaussian = Gaussian([channels, 8, 8], rank, power=2.0)
    gaussian.power, gaussian.scale = (
        torch.linspace(1, 3, channels).view(-1, 1, 1),
        torch.linspace(9, 4, channels).view(-1, 1, 1),
    )
    gaussian.mean = gaussian.mean + torch.linspace(0.3, -0.2, channels).view(-1, 1, 1)
    if rank:
        U, S = torch.randn(channels * 64, rank, generator=generator), gaussian.spectrum(8, 8).view(-1, 1)
        gaussian.U = U
        root = torch.linalg.cholesky(torch.linalg.inv(torch.eye(rank) + U.T @ (U / S)))
        gaussian.V = U / S @ root  # Woodbury
    return gaussian


def dense_gaussian(gaussian):
    """Mean and covariance of the flattened image, in float64."""
    C, d = gaussian.power.shape[0], gaussian.power.shape[0] * 64
    T = (
        transform(torch.eye(d).view(d, C, 8, 8), 0).flatten(1).T.double()
    )  # its columns are the unit vectors' coefficients
    S = gaussian.spectrum(8, 8).flatten().double().diag() + (gaussian.U @ gaussian.U.T).double()
    return gaussian.mean.expand(C, 8, 8).flatten().double(), T.T @ S @ T


def dense_posterior(gaussian, corruption, y, xt=None, sigma=None):
    """Mean and covariance of the flattened x0 given one y, and xt if that is given."""
    mean, Sigma = dense_gaussian(gaussian)
    d = len(mean)
    A = (corruption.A(torch.eye(d).view(d, -1, 8, 8)) * y[:, -1:]).flatten(1).T.double()
    N = corruption.noise**2 * (
        4 * A if isinstance(corruption, Downsample) else torch.eye(d, dtype=torch.float64)
    )
    J = A.T @ torch.linalg.pinv(N, hermitian=True)
    precision, h = (
        torch.linalg.inv(Sigma) + J @ A,
        torch.linalg.solve(Sigma, mean) + J @ y[0, :-1].flatten().double(),
    )
    if xt is not None:
        precision, h = precision + torch.eye(d) / sigma**2, h + xt.flatten().double() / sigma**2
    C = torch.linalg.inv(precision)
    return C @ h, C


LINEAR = [Mask(0.5, 0.1), Block(0.5, 0.1), Noise(0.3), Blur(0.8, 0.1), Downsample(2, 0.1)]


@pytest.mark.parametrize("corruption", LINEAR, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("channels, rank", [(1, 0), (3, 0), (1, 4)])
def test_the_gaussian_posterior_is_the_dense_one(corruption, channels, rank, generator):
    gaussian = smooth_gaussian(channels, generator, rank)
    y = corruption(gaussian.sample(1, generator), generator)
    wh = corruption.information(y)
    steps = 1 if corruption.block == 0 and not rank else 100
    t, c = gaussian.posterior(y, wh, gaussian.mean, corruption.block, steps)
    mean, C = dense_posterior(gaussian, corruption, y)
    torch.testing.assert_close(inverse(t, corruption.block).flatten().double(), mean, atol=2e-3, rtol=1e-3)
    if corruption.block == 0 and not rank:  # T is the basis of S
        T = transform(torch.eye(len(mean)).view(-1, channels, 8, 8), 0).flatten(1).T.double()
        torch.testing.assert_close(T @ C @ T.T, c.flatten().double().diag(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("corruption", [*LINEAR, Jpeg(20)], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("sigma", [0.05, 0.5, 20.0])
def test_the_denoiser_starts_as_the_gaussian_posterior(corruption, sigma, generator):
    """D = G where the network is 0: the dense posterior's mean given xt and y, at once or, for masks, nearly; given y = 0 exactly."""
    gaussian = smooth_gaussian(3, generator)
    x0 = gaussian.sample(64, generator)
    corruption.learn(x0, generator)
    y = corruption(x0, generator)
    denoiser = new_denoiser(gaussian, corruption, Config(channels=(8, 8)), "cpu")
    xt = x0 + sigma * torch.randn(x0.shape, generator=generator)
    with torch.no_grad():
        D = denoiser(xt, torch.full((64,), sigma), y)
        blank = denoiser(xt, torch.full((64,), sigma), torch.zeros_like(y))
    nothing = dense_posterior(gaussian, Mask(0.5, 0.1), torch.zeros_like(y[:1]), xt[:1], sigma)[0]
    torch.testing.assert_close(blank[0].flatten().double(), nothing, atol=5e-3, rtol=1e-2)
    if isinstance(corruption, Jpeg):
        return
    exact = torch.stack(
        [dense_posterior(gaussian, corruption, y[i : i + 1], xt[i : i + 1], sigma)[0] for i in range(64)]
    )
    if corruption.block == 0:
        torch.testing.assert_close(D.flatten(1).double(), exact, atol=5e-3, rtol=1e-2)
    best, ours = ((v - x0.flatten(1)).square().mean() for v in (exact, D.flatten(1)))
    assert ours < 1.25 * best


def test_the_scale_of_the_networks_output_is_that_of_the_error(generator):
    """E (T e)^2 / c = 1 for the exact posterior's error e: exactly where T is the basis of S, to a factor of 2 for masks."""
    gaussian = smooth_gaussian(3, generator)
    x0 = gaussian.sample(500, generator)
    for corruption, tolerance in (
        (Blur(0.8, 0.1), 1.05),
        (Noise(0.3), 1.05),
        (Mask(0.75, 0.01), 2),
        (Block(0.5, 0.01), 2),
        (Downsample(2, 0.1), 2),
    ):
        y = corruption(x0, generator)
        t, c = gaussian.posterior(y, corruption.information(y), gaussian.mean, corruption.block, 100)
        ratio = float(((t - diffem.transform(x0, corruption.block)).square() / c).mean())
        assert 1 / tolerance < ratio < tolerance, (type(corruption), ratio)


@pytest.mark.parametrize("block", [1, 2, 8, 0])
@pytest.mark.parametrize("known", [0.01, 1.0, 1e4])
def test_variances_are_exact_where_as_much_is_known_of_all(block, known, generator):
    """Such as where nothing is observed: 1 / sigma^2 of each coefficient."""
    gaussian = smooth_gaussian(3, generator)
    w, h = torch.full((1, 3, 8, 8), known), known * torch.randn(1, 3, 8, 8, generator=generator)
    _, c = gaussian.posterior(torch.zeros(1, 4, 8, 8), (w, h), gaussian.mean, block, 4)
    _, Sigma = dense_gaussian(gaussian)
    C = torch.linalg.inv(torch.linalg.inv(Sigma) + known * torch.eye(len(Sigma)))
    T = transform(torch.eye(len(C)).view(-1, 3, 8, 8), block).flatten(1).T.double()
    torch.testing.assert_close(c.flatten().double(), (T @ C @ T.T).diag(), atol=0, rtol=2e-3)


@pytest.mark.parametrize("corruption", LINEAR, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("rank", [0, 4])
def test_draws_have_the_dense_posteriors_mean_and_covariance(corruption, rank, generator):
    gaussian, number = smooth_gaussian(1, generator, rank), 20_000
    y = corruption(gaussian.sample(1, generator), generator)
    x = gaussian.draw(y.expand(number, -1, -1, -1), corruption, generator).flatten(1).double()
    mean, C = dense_posterior(gaussian, corruption, y)
    assert ((x.mean(0) - mean).abs() < 5 * (C.diag() / number).sqrt() + 2e-3).all()
    scale = (C.diag()[:, None] * C.diag()).sqrt()
    assert ((torch.cov(x.T) - C).abs() < 0.05 * scale + 2e-3).all()


def test_conjugate_gradients_may_go_on_after_they_have_converged(generator):
    gaussian, corruption = Gaussian([3, 32, 32], power=3.0), Mask(0.0, 4.0)
    y = corruption(gaussian.sample(4, generator), generator)
    few, many = (gaussian.posterior(y, corruption.information(y), gaussian.mean, 1, n)[0] for n in (60, 2000))
    torch.testing.assert_close(many, few, atol=1e-4, rtol=1e-4)


def test_draws_of_large_images_with_large_gaps_are_those_of_more_steps(generator):
    """64 steps do not reach far enough."""
    gaussian, corruption = Gaussian([1, 64, 64], power=3.0), Block(0.5, 1e-3)
    x0 = gaussian.sample(2, generator)
    y = corruption(x0, generator)
    missing, errors = 1 - y[:, -1:], []
    for steps in (0, 512):
        noise = torch.Generator().manual_seed(1)
        with pytest.MonkeyPatch.context() as patch:
            exact = Gaussian.posterior
            if steps:
                patch.setattr(Gaussian, "posterior", lambda *a: exact(*a[:-1], steps))
            x = gaussian.draw(y, corruption, noise)
        errors.append(float(((x - x0) * missing).square().sum() / missing.sum()) ** 0.5)
    assert errors[0] < 1.25 * errors[1], errors


def test_draws_agree_with_the_papers_blur(generator):
    """Width 2 and s = 1e-3 in float32: nine tenths of the coefficients are all but removed, and y tells the rest to 1e-3."""
    corruption, gaussian = Blur(2.0, 1e-3), Gaussian([3, 32, 32], power=3.0)
    x0 = gaussian.sample(64, generator)
    y = corruption(x0, generator)
    x = gaussian.draw(y, corruption, generator)
    assert float((corruption.A(x) - y[:, :-1]).square().mean().sqrt()) == pytest.approx(1e-3, rel=0.1)
    assert (
        float((x - x0).square().mean())
        < 2.2 * float((gaussian.draw(y, corruption, generator) - x).square().mean() / 2)
        < 0.05
    )


def test_fit_recovers_the_power_and_the_low_rank(generator):
    truth = smooth_gaussian(3, generator)
    fitted = Gaussian([3, 8, 8], power=1.0).fit(truth.sample(20_000, generator), generator)
    for name in ("mean", "power"):
        torch.testing.assert_close(getattr(fitted, name), getattr(truth, name), atol=0.06, rtol=0)
    torch.testing.assert_close(fitted.spectrum(8, 8), truth.spectrum(8, 8), atol=0, rtol=0.05)
    truth = smooth_gaussian(1, generator, rank=3)
    truth.power, truth.scale = torch.zeros(1, 1, 1), torch.full((1, 1, 1), 0.1)
    fitted = Gaussian([1, 8, 8], 3).fit(truth.sample(50_000, generator), generator)
    assert not fitted.power.any() and float(fitted.scale) == pytest.approx(0.1, rel=0.02)
    torch.testing.assert_close(fitted.U @ fitted.U.T, truth.U @ truth.U.T, atol=0.15, rtol=0)
    Sigma = fitted.spectrum(8, 8).flatten().diag() + fitted.U @ fitted.U.T
    t = torch.randn(2, 1, 8, 8, generator=generator)
    S, one = fitted.spectrum(8, 8), torch.eye(8)
    torch.testing.assert_close(
        fitted.precision(t, S, one, one).flatten(1) @ Sigma, t.flatten(1), atol=1e-3, rtol=1e-3
    )


def test_the_starts_em_finds_the_gaussian_of_the_data(generator):
    """From masked images alone, half of the pixels missing: the spectrum of what they were drawn from."""
    truth = smooth_gaussian(1, generator)
    truth.power += 1
    y = Mask(0.5, 0.05)(truth.sample(512, generator), generator)
    fitted = fit_start(y, Mask(0.5, 0.05), Config(smoothness=3.0, start_laps=12), generator)
    torch.testing.assert_close(fitted.spectrum(8, 8).log(), truth.spectrum(8, 8).log(), atol=0.35, rtol=0)


@pytest.mark.parametrize("name", ["jpeg", "own"])
def test_the_start_does_not_stay_at_the_observations(name, generator):
    """Where y is not A x and noise: draws keep the variance that y lacks, and their mean comes nearer to the truth than y is."""

    class Rounded(Corruption):
        def A(self, x):
            return (2 * x).round() / 2

    x0 = Gaussian([1, 16, 16], power=3.0).sample(300, generator)
    x0 = (0.7 * x0).clamp(-2, 2)
    corruption = Jpeg(10) if name == "jpeg" else Rounded()
    y = corruption(x0, generator)
    gaussian = fit_start(y, corruption, Config(smoothness=3.0), generator)
    x = torch.stack([gaussian.draw(y, corruption, generator) for _ in range(8)])
    error = (y[:, :-1] - x0).square().mean()
    assert (x.mean(0) - x0).square().mean() < error
    assert x.var(0).mean() > 0.3 * (x.mean(0) - x0).square().mean()


def test_the_start_of_few_smooth_jpeg_images(generator):
    """Coefficients that are nearly always 0 in y, with blocks cut off by the border: draws once had values of 26."""
    photo = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1)[None].float() * (4 / 255) - 2
    photo = torch.nn.functional.avg_pool2d(photo, 2).expand(80, -1, -1, -1)
    x0, corruption = diffem.cut(photo, (20, 28), 1, generator), Jpeg(10)
    y = corruption(x0, generator)
    x = fit_start(y, corruption, Config(smoothness=3.0, start_laps=4), generator).draw(
        y, corruption, generator
    )
    assert x.abs().max() < 4 and (x - x0).square().mean() < 4 * (y[:, :-1] - x0).square().mean()


# ---- Denoiser and loss


def test_noise_levels(generator):
    """log sigma is linear in t ~ Beta(3, 3), of mean 1 / 2, variance 1 / 28 and fourth moment 1 / 6."""
    config = Config(sigma_min=1e-3, sigma_max=1e2)
    sigma = random_noise_level(200_000, config, generator)
    t = (sigma.log() - math.log(1e-3)) / math.log(1e5)
    assert 0 <= t.min() and t.max() <= 1
    moments = [t.mean(), t.var(), (t**4).mean()]  # of Beta(3, 3): E t^4 = 3 4 5 6 / (6 7 8 9)
    torch.testing.assert_close(torch.stack(moments), torch.tensor([1 / 2, 1 / 28, 5 / 42]), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "corruption", [Mask(0.5, 0.1), Blur(1.0, 0.1), Jpeg(20)], ids=lambda c: type(c).__name__
)
def test_preconditioning_and_loss_are_edms_where_that_is_asked_for(corruption, generator):
    """G = xt / (sigma^2 + 1), c = sigma^2 / (sigma^2 + 1), and the paper's lambda = 1 / sigma^2 + 1, whatever y says."""
    x0 = torch.randn(6, 3, 8, 8, generator=generator)
    gaussian = smooth_gaussian(3, generator)
    corruption.learn(x0, generator)
    y, sigma = corruption(x0, generator), torch.logspace(-2, 1, 6)
    denoiser = new_denoiser(
        gaussian, corruption, Config(channels=(8, 8), preconditioning="edm", precision="float32"), "cpu"
    )
    with torch.no_grad():
        for parameter in denoiser.network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        s = sigma.view(-1, 1, 1, 1)
        xt = x0 + s * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
        mean = xt / (s**2 + 1)
        D = mean + s * (s**2 + 1).rsqrt() * denoiser.network(xt * (s**2 + 1).rsqrt(), mean, y, sigma.log())
        torch.testing.assert_close(denoiser(xt, sigma, y), D, atol=1e-4, rtol=1e-4)
        loss = (1 / sigma**2 + 1) * (D - x0).square().flatten(1).mean(1)
        torch.testing.assert_close(
            denoiser.loss(x0, y, sigma, torch.Generator().manual_seed(1)), loss, atol=1e-4, rtol=1e-3
        )


@pytest.mark.parametrize("sigma", [0.03, 1.0, 10.0])
@pytest.mark.parametrize("corruption", [Noise(0.3), Blur(1.0, 0.1)], ids=["noise", "blur"])
def test_loss_of_an_untrained_denoiser_is_one(corruption, sigma, generator):
    """On data of its own Gaussian, given y or y = 0: D is the posterior mean, and the loss is normalised by the variances."""
    gaussian = smooth_gaussian(1, generator)
    x0 = gaussian.sample(4000, generator)
    denoiser = new_denoiser(gaussian, corruption, Config(channels=(8, 16)), "cpu")
    for y in (corruption(x0, generator), torch.zeros(4000, 2, 8, 8)):
        loss = denoiser.loss(x0, y, torch.full((4000,), sigma), generator).detach()
        assert float(loss.mean()) == pytest.approx(1.0, abs=5 * float(loss.std()) / math.sqrt(4000) + 0.01)


@pytest.mark.parametrize("name", diffem.CORRUPTIONS)
def test_the_m_step_creates_nothing_on_another_device(name, generator):
    """Under a default device "meta", what is made without a device cannot meet what is on the CPU."""
    corruption, config = (
        diffem.CORRUPTIONS[name](),
        Config(channels=(8, 8), batch=4, steps=1, flip=True, jitter=True, crop=8, rescale=True),
    )
    x0 = torch.randn(8, 3, 16, 16, generator=generator).clamp(-2, 2)
    if name == "downsample":
        config.rescale = False  # of sizes that 2 does not divide
    corruption.learn(x0, generator)
    gaussian = Gaussian([3, 16, 16], power=1.0).fit(x0, generator)
    state = new_state(x0, new_denoiser(gaussian, corruption, config, "cpu"), config)
    state.lap = 1
    with torch.device("meta"):
        m_step(state, config, generator)
        x = state.model.sample(corruption(x0, generator), 2, "sde2m", generator)
        drawn = gaussian.draw(corruption(x0, generator), corruption, generator)
    assert x.isfinite().all() and drawn.isfinite().all() and state.losses.isfinite().all()


def test_trained_denoiser_comes_close_to_the_exact_one(generator):
    """At least nine tenths of the way from the untrained denoiser to E[x0 | xt, y], in mean square."""
    mean, covariance = gaussian(3, generator)
    mean, covariance = 0.5 * mean, covariance / covariance.diag().mean()
    corruption = Projection(rows=1, noise=0.3)
    x0 = draw(mean, covariance, 20_000, generator)
    config = Config(channels=(96, 96), batch=512, steps=700, lr=3e-3, ema=0.98, p_unconditional=0.0)
    torch.manual_seed(0)
    state, untrained = (
        new_state(x0, VectorDenoiser(3, corruption, config), config),
        VectorDenoiser(3, corruption, config),
    )
    for step in range(config.steps):
        m_step(state, config, diffem.generator_for("cpu", 0, 1, step))
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
    (
        [3, 16, 16],
        Mask(),
        Config(channels=(16, 32), blocks=1, attention=(1,), dropout=0.1, precision="float32"),
    ),
    (
        [1, 7, 5],
        Blur(0.5),
        Config(channels=(8, 8, 16), blocks=2, precision="float32"),
    ),  # sizes that do not halve evenly
    ([3, 12, 10], Jpeg(30, 2), Config(channels=(8, 8), precision="float32")),  # nor into blocks
]


def test_features_stay_of_one_size_while_there_is_nothing_to_learn(generator):
    """Else F becomes small by a few huge features, which hide all others from the norms, and remains so."""
    gaussian, corruption = Gaussian([3, 16, 16], power=3.0), Blur(1.0, 0.02)
    x0 = gaussian.sample(1024, generator)  # of which the denoiser's own Gaussian knows all
    config = Config(channels=(16, 32, 64), blocks=2, steps=100, laps=4, precision="float32")
    state = diffem.new_state(x0, diffem.new_denoiser(gaussian, corruption, config, "cpu"), config)
    state.lap, features = 1, []
    for step in range(config.steps):
        diffem.m_step(state, config, diffem.generator_for("cpu", 0, 1, step))
    state.denoiser.network.norm.register_forward_hook(lambda norm, inputs, _: features.append(inputs[0]))
    state.denoiser.loss(x0[:64], corruption(x0[:64], generator), torch.full((64,), 0.3), generator)
    size = features[0].square().mean((0, 2, 3)).sqrt()  # of each channel
    assert size.max() < 8 * size.median()


def trained(shape, corruption, config, generator):
    """A denoiser that has left its start, where F is 0, by a few steps."""
    x0 = torch.randn(32, *shape, generator=generator)
    y = corruption(x0, generator)
    config.batch, config.steps = 16, 5
    gaussian = Gaussian(shape, power=1.0).fit(x0, generator)
    state = new_state(x0, new_denoiser(gaussian, corruption, config, "cpu"), config)
    torch.nn.init.ones_(state.denoiser.network.gain.bias)  # or F would be nearly 0
    for step in range(config.steps):
        m_step(state, config, diffem.generator_for("cpu", 0, 1, step))
    return state, x0, y


@pytest.mark.parametrize("shape, corruption, config", NETWORKS)
def test_every_parameter_has_a_finite_gradient(shape, corruption, config, generator):
    state, _, _ = trained(shape, corruption, config, generator)
    for name, parameter in state.denoiser.named_parameters():
        assert parameter.grad.isfinite().all(), name
        rows = parameter.grad.reshape(len(parameter), -1).abs().sum(1)
        if name.endswith("qkv.bias"):  # a softmax does not see the bias of the keys: its gradient is rounding
            q, _, v = rows.chunk(3)
            rows = torch.cat([q, v])
        assert (rows > 0).all(), name  # every row of it is in use


@pytest.mark.parametrize("shape, corruption, config", NETWORKS)
def test_batched_equals_single_and_scripted(shape, corruption, config, generator):
    state, x0, y = trained(shape, corruption, config, generator)
    sigma = torch.logspace(-2, 1, len(x0))
    with torch.no_grad():
        batch = state.model(x0, sigma, y)
        singles = torch.cat(
            [state.model(x0[i : i + 1], sigma[i : i + 1], y[i : i + 1]) for i in range(len(x0))]
        )
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
    corruption, x0 = Projection(), torch.randn(32, 5, generator=generator)
    y, config = corruption(x0, generator), Config(channels=(32, 32), batch=16, steps=5)
    torch.manual_seed(0)
    state = new_state(x0, VectorDenoiser(5, corruption, config), config)
    for step in range(5):
        m_step(state, config, diffem.generator_for("cpu", 0, 1, step))
    sigma = torch.logspace(-3, 1, len(x0))
    turn = torch.linalg.qr(torch.randn(2, 2, generator=generator)).Q
    with torch.no_grad():
        torch.testing.assert_close(
            state.model(x0, sigma, turn @ y), state.model(x0, sigma, y), atol=1e-4, rtol=1e-4
        )


def test_the_learning_rate_is_constant_and_then_falls(generator):
    x0, config = (
        torch.randn(8, 1, 8, 8, generator=generator),
        Config(channels=(8, 8), batch=2, laps=4, steps=4, lr=1e-3),
    )
    state, rates = new_state(x0, new_denoiser(Gaussian([1, 8, 8]), Mask(0.5), config, "cpu"), config), []
    for state.lap in (1, 2, 3, 4):
        for state.step in range(4):
            m_step(state, config, generator)
            rates.append(state.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(
        [1e-3] * 8 + [1e-3, 8.75e-4, 7.5e-4, 6.25e-4, 5e-4, 3.75e-4, 2.5e-4, 1.25e-4]
    )
