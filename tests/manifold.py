"""The paper's first experiment, a curve in R^5 of which each point is seen through a random 2 x 5 matrix:

    python tests/manifold.py                                       # a curve of our own generator, 308 CPU-seconds
    python tests/manifold.py --data manifold-seed0.npz --seconds 616

It shows that `diffem.em` takes any data: here are a corruption, a network with its preconditioning, and a start of its own, for
vectors x (B, d) with y (B, m, d + 1), the rows of A, each with its measured value at the end. y = 0: nothing was observed.
"""

import argparse
import itertools
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import diffem  # noqa: E402
from diffem import (  # noqa: E402
    Config,
    Corruption,
    NoiseEmbedding,
    State,
    generator_for,
    randn_like,
    torch_seeded_by,
    zeroed,
)

CONFIG = dict(
    channels=(256, 256, 256), laps=60, steps=200, batch=1024, ema=0.98, sigma_max=10.0, method="ddpm", sample_steps=16,
    first_sample_steps=4, sample_batch=16384, start_rank=4, start_laps=16,
)  # fmt: skip


class Projection(Corruption):
    """Vectors seen through a random matrix A of `rows` unit rows, drawn anew for each: y = A x + s eps."""

    def __init__(self, rows: int = 2, noise: float = 0.01):
        super().__init__()
        self.rows, self.noise = rows, noise

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """(B, d) -> (B, rows, d + 1)."""
        A = F.normalize(
            torch.randn(len(x), self.rows, x.shape[1], generator=generator, device=x.device), dim=-1
        )
        return self.observe(x, F.pad(A, [0, 1]), generator)

    def observe(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """A new observation of x through the A of y."""
        value = self.measure(x, y)
        return torch.cat([y[..., :-1], (value + self.noise * randn_like(value, generator))[..., None]], -1)

    def measure(self, x: Tensor, y: Tensor) -> Tensor:
        """A x, (B, rows)."""
        return (y[..., :-1] @ x[..., None])[..., 0]

    def hides_pixels(self) -> bool:
        return True  # all that A does not show


class MLP(nn.Module):
    """F for vectors; y (B, d, d)."""

    def __init__(self, inputs: int, outputs: int, config: Config):
        super().__init__()
        self.emb = NoiseEmbedding(64)
        widths = [inputs + 64, *config.channels]
        hidden = [[nn.Linear(a, b), nn.SiLU(), nn.LayerNorm(b)] for a, b in zip(widths, widths[1:])]
        self.layers = nn.Sequential(*sum(hidden, []))
        self.out = zeroed(nn.Linear(widths[-1], outputs))

    def forward(self, xt: Tensor, mean: Tensor, y: Tensor, log_sigma: Tensor) -> Tensor:
        return self.out(self.layers(torch.cat([xt, mean, y.flatten(1), self.emb(log_sigma)], 1)))


class VectorDenoiser(nn.Module):
    """D = G + C^(1/2) F(c_in xt, G, C^(1/2), log sigma), G and C mean and covariance of x0 given xt and y under N(0, I).

    F is given C^(1/2), in units of EDM's, in place of y: it tells what y does, and does not change with the order, sign or
    mixture of A's rows.
    """

    def __init__(self, d: int, corruption: Projection, config: Config):
        super().__init__()
        self.corruption, self.sigma_min, self.sigma_max = corruption, config.sigma_min, config.sigma_max
        self.network = MLP(2 * d + d**2, d, config)

    sample = diffem.Denoiser.sample

    def shape(self, y: Tensor) -> list[int]:
        return [y.shape[0], y.shape[2] - 1]

    def posterior(self, xt: Tensor, sigma: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """G (B, d) and C^(1/2) (B, d, d). sigma: (B, 1)."""
        A, value = y[..., :-1], y[..., -1:]  # (B, rows, d), (B, rows, 1)
        variance, mean = (sigma**2 / (sigma**2 + 1))[..., None], (xt / (sigma**2 + 1))[..., None]
        # A A^T = U diag(l) U^T, and with B = U^T A:  mean += v B^T (v l + s^2)^-1 U^T (y - A mean)
        eigenvalues, U = torch.linalg.eigh(A @ A.mT)
        l, B, s2 = eigenvalues.clamp_min(0)[..., None], U.mT @ A, self.corruption.noise**2
        gain = variance / (variance * l + s2)  # (B, rows, 1)
        mean = mean + B.mT @ (gain * (U.mT @ (value - A @ mean)))
        # The symmetric root:  sqrt(v) (I + v A^T A / s^2)^(-1/2) = sqrt(v) (I - B^T diag(w) B). It is sqrt(v) I on all that A
        # does not see: there F corrects x0 itself. A triangular one varies with A, and F would have to learn how.
        q = (1 + variance * l / s2).sqrt()
        w = variance / s2 / (q * (1 + q))  # (1 - 1 / q) / l
        return mean[..., 0], variance.sqrt() * (torch.eye(xt.shape[1], dtype=xt.dtype) - B.mT @ (w * B))

    def forward(self, xt: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        log_sigma, sigma = sigma.log(), sigma[:, None]
        mean, root = self.posterior(xt, sigma, y)
        edm = (sigma / (sigma**2 + 1).sqrt())[..., None]
        output = self.network(xt * (sigma**2 + 1).rsqrt(), mean, root / edm, log_sigma)
        return mean + (root @ output[..., None])[..., 0]

    def loss(self, x0: Tensor, y: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
        """lambda(sigma) |e|^2 + |A e|^2 / s^2, e = D - x0, over d: (B,)."""
        error = self(x0 + sigma[:, None] * randn_like(x0, generator), sigma, y) - x0
        seen = (self.corruption.measure(error, y) / self.corruption.noise).square().sum(1)
        return ((1 / sigma**2 + 1) * error.square().sum(1) + seen) / x0.shape[1]


@dataclass
class VectorGaussian:
    """x ~ N(mean, U U^T + psi I) of vectors, with exact draws given y."""

    mean: Tensor  # (d,)
    U: Tensor  # (d, rank)
    psi: float

    @classmethod
    def fit(cls, x: Tensor, rank: int) -> "VectorGaussian":
        """The likeliest for samples x (N, d) (Tipping & Bishop 1999)."""
        variance, V = torch.linalg.eigh(torch.cov(x.T, correction=0))
        psi = variance[:-rank].mean().clamp_min(1e-6)
        return cls(x.mean(0), V[:, -rank:] * (variance[-rank:] - psi).clamp_min(0).sqrt(), float(psi))

    def sample(self, number: int, generator: torch.Generator) -> Tensor:
        z, eps = (
            torch.randn(number, self.U.shape[1], generator=generator),
            torch.randn(number, len(self.mean), generator=generator),
        )
        return self.mean + z @ self.U.T + math.sqrt(self.psi) * eps

    def draw(self, y: Tensor, corruption: Projection, generator: torch.Generator) -> Tensor:
        """Matheron's rule:  x' ~ prior,  y' ~ Q(. | x'),  x = x' + Sigma A^T (A Sigma A^T + s^2 I)^-1 (y - y')."""
        x, A, Sigma = (
            self.sample(len(y), generator),
            y[..., :-1],
            self.U @ self.U.T + self.psi * torch.eye(len(self.mean)),
        )
        S = A @ Sigma @ A.mT + corruption.noise**2 * torch.eye(A.shape[1])
        residual = (y - corruption.observe(x, y, generator))[..., -1:]
        return x + (Sigma @ A.mT @ torch.linalg.solve(S, residual))[..., 0]


def first_state(y: Tensor, corruption: Projection, config: Config) -> State:
    """The state before the first lap: draws from a Gaussian that is fitted to the observations y (N, m, d + 1) by EM."""
    generator, d = generator_for("cpu", config.seed, 0, 1), y.shape[2] - 1
    gaussian = VectorGaussian(torch.zeros(d), torch.zeros(d, 1), 1.0)
    for _ in range(config.start_laps):
        gaussian = VectorGaussian.fit(gaussian.draw(y[:4096], corruption, generator), config.start_rank)
    with torch_seeded_by(generator_for("cpu", config.seed, 0, 2)):
        denoiser = VectorDenoiser(d, corruption, config)
    state = diffem.new_state(gaussian.draw(y, corruption, generator), denoiser, config)
    state.drawn = len(y)
    return state


def manifold(t: Tensor, seed: int) -> Tensor:
    """Points of a smooth random closed curve in R^5, each coordinate from -2 to 2: t (N,) in [0, 1) -> (N, 5)."""
    # x_j(t) = sum_k a_jk cos(2 pi (k t + phase_jk)),  a_jk ~ U(0, 1) / k^3,  k = 1 .. 10, then rescaled
    k = torch.arange(1.0, 11)
    a, phase = torch.rand(2, 5, 1, 10, generator=generator_for("cpu", seed, 0, 5))
    dense = torch.linspace(0, 1, 20_001)[:-1]
    x, curve = ((a / k**3 * torch.cos(2 * math.pi * (k * u[:, None] + phase))).sum(2).T for u in (t, dense))
    return 4 * (x - curve.amin(0)) / (curve.amax(0) - curve.amin(0)) - 2


def transport(x: Tensor, x0: Tensor) -> float:
    """The squared 2-Wasserstein distance of two clouds of as many points, exactly."""
    import ot  # pip install pot

    return float(ot.emd2([], [], ot.dist(x.double().numpy(), x0.double().numpy()), numItermax=10**7))


def observed_curve(
    data: str | None, corruption: Projection, seed: int, number: int = 16384
) -> tuple[Tensor, Tensor]:
    """Points x0 (N, 5) and their observations, from an .npz with x, A and y, or of our own generator."""
    if not data:
        x0 = manifold(torch.rand(number, generator=generator_for("cpu", seed, 0, 4)), seed)
        return x0, corruption(x0, generator_for("cpu", seed, 0, 0))
    arrays = {name: torch.from_numpy(array) for name, array in np.load(data).items()}
    if (corruption.rows, corruption.noise) == (2, 0.01):
        return arrays["x"], torch.cat([arrays["A"], arrays["y"][..., None]], -1)
    return arrays["x"], corruption(arrays["x"], generator_for("cpu", seed, 0, 0))


def run(
    y: Tensor,
    x0: Tensor,
    corruption: Projection,
    config: Config,
    options: argparse.Namespace,
    points: int = 4096,
) -> list[dict]:
    """A row for the first lap that ends in each tenth of the budget of CPU-seconds, without those of the metrics, and for the
    last; and one for draws of the last model by --evaluations."""
    floor, rows, aside, tenth, begun = transport(x0[:points], x0[-points:]), [], 0.0, -1, time.process_time()
    first = first_state(y, corruption, config)
    states, seconds = itertools.chain([first], diffem.em(y, corruption, config, first)), options.seconds
    if options.guided:
        from baselines import em_mmps

        states = em_mmps(y, corruption, config, 0, first)

    def measure(x: Tensor, **row) -> None:
        error = (corruption.measure(x, y[: len(x)]) - y[: len(x), :, -1]) / corruption.noise
        residual = float(error.square().mean().sqrt())
        cost = transport(x[:points], x0[-points:]) - floor  # not those x0 that x was drawn for
        rows.append(dict(lap=state.lap, **row, transport=cost, residual=residual))
        print(json.dumps(rows[-1]), flush=True)

    for state in states:
        used = time.process_time() - begun - aside
        if used > seconds:
            break
        if state.drawn == len(y) and (int(10 * used / seconds) > tenth or state.lap == config.laps):
            now, tenth = time.process_time(), int(10 * used / seconds)
            measure(state.x0, **{"CPU-s": used})
            aside += time.process_time() - now
    generator = generator_for("cpu", config.seed, 0, 3)
    measure(state.draw(y[:points], options.evaluations, "ddpm", generator), evaluations=options.evaluations)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", help="an .npz with x, A and y (default: a curve of our own generator)")
    parser.add_argument("--rows", type=int, default=2, help="dimensions observed, of 5 (default: 2)")
    parser.add_argument(
        "--noise",
        type=float,
        default=0.01,
        help="standard deviation of the observations' noise (default: 0.01)",
    )
    parser.add_argument("--seconds", type=float, default=308, help="CPU-seconds (default: 308, all laps)")
    parser.add_argument("--laps", type=int, default=60, help="EM iterations (default: 60)")
    parser.add_argument(
        "--guided", action="store_true", help="EM-MMPS in place of DiffEM, with the same laps"
    )
    parser.add_argument(
        "--evaluations", type=int, default=64, help="of the last model's own draws (default: 64)"
    )
    parser.add_argument("--method", default=CONFIG["method"], help="of the second half; sde2m for much noise")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    corruption = Projection(options.rows, options.noise)
    x0, y = observed_curve(options.data, corruption, options.seed)
    own = dict(laps=options.laps, seed=options.seed, method=options.method)
    own |= dict(first_sample_steps=0) if options.guided else {}
    run(y, x0, corruption, Config(**CONFIG | own), options)


if __name__ == "__main__":
    main()
