"""What DiffEM is compared with, on its own networks, schedule, data and corruptions.

EM-MMPS   Rozet et al. 2024, arXiv 2405.13712: EM with an unconditional denoiser, guided by moment matching in the E-step.
Ambient   Ambient Diffusion, Daras et al. 2023, arXiv 2305.19256: no EM; a denoiser trained on masked images with further
          pixels masked. It restores an image by one evaluation, E[x0 | y]: of what its own mask hides it gives no
          covariance, which a guidance would need.
"""

from dataclasses import replace

import torch
from manifold import VectorGaussian
from torch import Tensor, nn

import diffem
from diffem import Config, Corruption, Denoiser, Gaussian, Mask, State


def measure(corruption: Corruption, x: Tensor, y: Tensor) -> Tensor:
    """A x, 0 where y is masked."""
    return corruption.measure(x, y) if hasattr(corruption, "measure") else y[:, -1:] * corruption.A(x)


def conjugate_gradients(operator, b: Tensor, iterations: int) -> Tensor:
    """Solves operator(v) = b, symmetric and positive, for each of b (B, ...)."""

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).flatten(1).sum(1).view(-1, *[1] * (b.ndim - 1)).clamp_min(1e-30)

    v, r, p, rr = torch.zeros_like(b), b, 0.0, 1.0  # so that the first p is r
    for _ in range(iterations):
        rr, before = dot(r, r), rr
        p = r + rr / before * p
        Ap = operator(p)
        alpha = rr / dot(p, Ap)
        alpha = alpha * (alpha < 1e20)  # no step where a network's Jacobian is not positive
        v, r = v + alpha * p, r - alpha * Ap
    return v


class MMPS(nn.Module):
    """The posterior mean from an unconditional denoiser, by moment matching; to be sampled as any denoiser.

    E[x0 | xt, y] = D + sigma^2 J^T A^T (s^2 I + A (sigma^2 J^T) A^T)^-1 (y - A D),  J = dD / dxt the denoiser's Jacobian: a
    symmetric matrix, as sigma^2 J = Cov[x0 | xt].

    prior: where given, a Gaussian's Cov[x0 | xt] = (Sigma^-1 + I / sigma^2)^-1 is taken for sigma^2 J (for the manifold, it
    was published in the inverse only). iterations: of conjugate gradients, 1 as published for masks; a blur, which is
    ill-conditioned, needs 3. 0: exact, for vectors.
    """

    def __init__(
        self, denoiser: Denoiser, corruption: Corruption, iterations: int, prior: VectorGaussian | None = None
    ):
        super().__init__()
        self.denoiser, self.corruption, self.iterations, self.prior = denoiser, corruption, iterations, prior
        self.sigma_min, self.sigma_max, self.shape = denoiser.sigma_min, denoiser.sigma_max, denoiser.shape

    sample = Denoiser.sample

    def forward(self, xt: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        nothing, variance = torch.zeros_like(y), sigma.view(-1, *[1] * (xt.ndim - 1)) ** 2
        if self.prior is None:
            x0, jacobian = torch.func.vjp(lambda xt: self.denoiser(xt, sigma, nothing), xt)
            C = None
            if self.iterations == 0:
                units = torch.eye(xt.shape[1], device=xt.device)
                rows = torch.stack([jacobian(e.expand_as(xt))[0] for e in units], 1)
                l, V = torch.linalg.eigh(
                    variance[..., None] * (rows + rows.mT) / 2
                )  # positive but for the network's errors
                C = (V * l.clamp_min(0)[:, None]) @ V.mT  # (B, d, d)
        else:
            x0 = self.denoiser(xt, sigma, nothing)
            l, V = torch.linalg.eigh(self.prior.U @ self.prior.U.T)  # Sigma = U U^T + psi I = V diag(l) V^T
            l = l.clamp_min(0) + self.prior.psi
            C = (V * (l * variance / (l + variance))[:, None]) @ V.T  # (B, d, d)

        def covariance(v: Tensor) -> Tensor:
            return variance * jacobian(v)[0] if C is None else (C @ v[..., None])[..., 0]

        _, adjoint = torch.func.vjp(lambda x: measure(self.corruption, x, y), x0)

        # p x p pixels of a downsampled image share one noise value, of variance (p s)^2 in their mean
        noise = self.corruption.patch * self.corruption.noise

        def operator(v: Tensor) -> Tensor:
            return noise**2 * v + measure(self.corruption, covariance(adjoint(v)[0]), y)

        residual = (y[..., -1] if y.ndim == 3 else y[:, :-1]) - measure(self.corruption, x0, y)
        if self.iterations == 0:
            units = torch.eye(residual.shape[1], device=xt.device)
            S = torch.stack([operator(e.expand_as(residual)) for e in units], 2)  # (B, m, m)
            v = torch.linalg.solve(S, residual)
        else:
            v = conjugate_gradients(operator, residual, self.iterations)
        return x0 + covariance(adjoint(v)[0])


class MMPSState(State):
    """A state whose E-step is guided: `em` needs no more to run EM-MMPS."""

    iterations: int = 1
    gaussian: bool = False  # guided by the draws' Gaussian
    observed_by: Corruption

    @property
    def model(self) -> MMPS:
        denoiser, prior = self.average, None
        if self.gaussian:
            prior = VectorGaussian.fit(self.x0, self.x0.shape[1] - 1)
        return MMPS(denoiser, self.observed_by, self.iterations, prior)


def em_mmps(
    y: Tensor, corruption: Corruption, config: Config, iterations: int = 1, start: State | None = None
):
    """As `diffem.em`, from the same start, with a denoiser that is never shown an observation."""
    config = replace(config, p_unconditional=1.0)
    state = MMPSState(**vars(start or next(diffem.em(y, corruption, config))))
    state.iterations, state.observed_by = iterations, corruption
    if y.ndim == 4:  # without y, one step of the Gaussian's conjugate gradients is exact, and has a gradient
        for denoiser in (state.denoiser, state.average):
            denoiser.likelihood = Corruption(block=0).to(y.device)
    yield state
    yield from diffem.em(y, corruption, config, state)


class Masked(Denoiser):
    """Preconditioning for an xt of which only the pixels are shown that y's last channel says: 0 and N(0, I) elsewhere."""

    def posterior(self, xt: Tensor, sigma: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return xt / (sigma**2 + 1), (1 - y[:, -1:] / (sigma**2 + 1)).expand_as(xt)


class AmbientDenoiser(nn.Module):
    """D(A~ xt, sigma, A~) with a further mask A~ for each image, the same at all noise levels: y (B, C + 1, H, W) is looked
    at for its size alone."""

    def __init__(self, denoiser: Denoiser, rate: float, seed: int):
        super().__init__()
        self.denoiser, self.rate, self.seed = denoiser, rate, seed
        self.sigma_min, self.sigma_max, self.shape = denoiser.sigma_min, denoiser.sigma_max, denoiser.shape

    sample = Denoiser.sample

    def forward(self, xt: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        mask = Mask(self.rate).mask(xt, diffem.generator_for(xt.device, self.seed))
        return self.denoiser(mask * xt, sigma, torch.cat([torch.zeros_like(xt), mask], 1))


class AmbientMean(nn.Module):
    """E[x0 | y] by one evaluation, in place of samples: A~ is the mask of y, whose noise is about sigma_min."""

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser

    @torch.no_grad()
    def sample(self, y: Tensor, steps: int, method: str, generator: torch.Generator) -> Tensor:
        sigma = torch.full(y.shape[:1], self.denoiser.sigma_min, device=y.device)
        return self.denoiser(y[:, :-1], sigma, torch.cat([torch.zeros_like(y[:, :-1]), y[:, -1:]], 1))


def ambient(y: Tensor, rate: float, further: float, config: Config, seconds) -> AmbientDenoiser:
    """Trains on masked images y (N, C + 1, H, W) until `seconds()` is False.

    Each image loses a further share of its pixels, A~ = B A. The network sees A~ (x0 + sigma eps), and is to give what A shows:
        E_{A~, sigma, eps} lambda(sigma, A~) || A (D(A~ xt, sigma, A~) - x0) ||^2,  lambda = 1 / (1 - A~ / (sigma^2 + 1))
    """
    gaussian = Gaussian([y.shape[1] - 1, *y.shape[2:]])
    state = diffem.new_state(
        y[:1, :-1], diffem.new_denoiser(gaussian, Corruption(), config, y.device, Masked), config
    )
    step = 0
    while seconds():
        generator = diffem.generator_for(y.device, config.seed, 1, step)
        batch = diffem.augment(
            y[torch.randint(len(y), (config.batch,), generator=generator, device=y.device)], config, generator
        )
        x0, known = batch[:, :-1], batch[:, -1:]
        mask = known * (torch.rand(known.shape, generator=generator, device=y.device) >= further)
        sigma = diffem.random_noise_level(len(x0), config, generator).view(-1, 1, 1, 1)
        xt = x0 + sigma * diffem.randn_like(x0, generator)
        error = known * (
            state.denoiser(mask * xt, sigma.flatten(), torch.cat([torch.zeros_like(x0), mask], 1)) - x0
        )
        # A constant learning rate; the average of the weights begins with the second step
        state.lap, state.step, step = 1 + (step > 0), 0, step + 1
        diffem.optimise(state, (error.square() / (1 - mask / (sigma**2 + 1))).mean(), config)
    return AmbientDenoiser(state.average, 1 - (1 - rate) * (1 - further), config.seed)
