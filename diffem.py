"""DiffEM: learn to restore images, and a model of the clean ones, from corrupted images alone.

After Hosseintabar et al., "DiffEM: Learning from Corrupted Data with Diffusion Models via Expectation
Maximization", arXiv 2510.12691. Clean images x0 ~ p* are never seen, only y ~ Q(y | x0) for a known corruption Q.
A conditional diffusion model q(x0 | y) is alternately sampled and trained:

    X(0)_i ~ p0(x0 | y_i)                          p0: a Gaussian prior, fitted to the observations by EM
    for lap = 1 .. laps:
        M-step   theta <- argmin E_{x0 in X(lap-1)} E_{y ~ Q(.|x0)} E_{sigma, eps}
                              lambda(sigma) || D_theta(x0 + sigma eps, sigma, y) - x0 ||^2          (Eq. 10)
        E-step   X(lap)_i ~ q_theta(x0 | y_i)      by diffusion, from sigma_max down to sigma_min

The real observations y_i enter in the E-step alone; in the M-step y is drawn afresh from Q for every batch.

    python diffem.py                        # 8x8 digits, half of the pixels missing: minutes on a laptop's CPU
    python diffem.py --dataset cifar10      # the paper's experiment (a small version of it without a GPU)
    python diffem.py --help

Symbols   x0 clean, xt = x0 + sigma eps noisy, y observation, sigma noise level, eps ~ N(0, 1), D denoiser,
          s standard deviation of the observation's noise, lap one EM iteration
Shapes    images x (B, C, H, W) with values in [-2, 2] (black to white, so that their standard deviation is near 1),
          y (B, C + 1, H, W): the measurement and a last channel that is 1 where something was observed;
          vectors x (B, d), y (B, m, d + 1): the rows of the measurement matrix A, each with its measured value.
          y = 0 everywhere means that nothing was observed: the model then samples the prior.
"""

import argparse
import importlib.util
import inspect
import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

# matplotlib, torchvision, Pillow and scikit-learn are imported where they are used: the method needs none of them, and
# together they would double the time that `import diffem` takes.


class DiffEMError(ValueError):
    """Something that the user can mend. The command line prints it as one line and exits with code 2."""


# ---------------------------------------------------------------------------------------------------------------------
# Settings of the method. Every field is a flag of the command line; PRESETS, below, holds what each data set changes.


def setting(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """All that `fit` needs to know apart from the observations and the corruption."""

    channels: tuple = setting((32, 64), "width of each level of the U-Net, or of each hidden layer of the MLP")
    blocks: int = setting(2, "residual blocks a level and side of the U-Net")
    attention: tuple = setting((), "levels of the U-Net with self-attention, 0 the finest")
    heads: int = setting(4, "attention heads")
    dropout: float = setting(0.0, "dropout in the residual blocks")
    sigma_min: float = setting(1e-3, "lowest noise level")
    sigma_max: float = setting(1e2, "highest noise level")
    laps: int = setting(5, "EM iterations")
    steps: int = setting(400, "optimiser steps a lap")
    batch: int = setting(64, "images a step")
    lr: float = setting(2e-3, "learning rate of Adam")
    clip: float = setting(1.0, "largest norm of the gradient")
    ema: float = setting(0.99, "decay of the moving average of the weights, which the E-step uses")
    blank: float = setting(0.1, "share of the M-step's observations that are blanked, to learn the prior")
    flip: bool = setting(False, "mirror images at random in the M-step")
    jitter: bool = setting(False, "change hue and saturation slightly in the M-step")
    method: str = setting("ddpm", "sampler: ddpm or ddim")
    sample_steps: int = setting(16, "network evaluations to sample an image")
    sample_batch: int = setting(512, "images sampled at once")
    prior_rank: int = setting(32, "rank of the Gaussian prior's covariance")
    prior_laps: int = setting(8, "EM iterations of the Gaussian prior")
    seed: int = setting(0, "seed of everything random")


def generator_for(device, *key: int) -> torch.Generator:
    """A generator seeded by integers such as (seed, lap, step): a run can go on from any step with no state stored."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)
    return torch.Generator(device).manual_seed(int(seed))


@contextmanager
def torch_seeded_by(generator: torch.Generator):
    """For what draws from torch's global generator alone (initial weights, dropout, torch.svd_lowrank): seeds it, and
    restores it afterwards. Seed + 1, lest dropout repeat the generator's own draws."""
    with torch.random.fork_rng([generator.device] if generator.device.type == "cuda" else []):
        torch.manual_seed(generator.initial_seed() + 1)
        yield


def randn_like(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator, device=x.device)


# ---------------------------------------------------------------------------------------------------------------------
# Corruptions y ~ Q(. | x0)


class Corruption(nn.Module):
    """The known law y ~ Q(. | x0): the one object that corrupts data, in the data set, the M-step and every metric.

    A subclass gives `measure` and, if it hides pixels, `mask`; one of your own needs no more than that. The arguments
    of its `__init__` must be numbers with defaults, kept under the same names; they become flags of the command line.
    It has no trainable parameters, and keeps tensors as buffers with persistent=False.
    """

    linear = True  # is `measure` linear in x?
    noise = 0.0  # s, the standard deviation of the noise on what is measured
    exact = False  # does `posterior` use y? It does where that is cheap

    def mask(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """(B, C, H, W) -> (B, 1, H, W): 1 where something is observed, 0 elsewhere."""
        return torch.ones_like(x[:, :1])

    def measure(self, x: Tensor, y: Tensor) -> Tensor:
        """The forward map A(x) without noise, given all that y tells of it (its mask): the shape of `value(y)`."""
        raise NotImplementedError

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """y ~ Q(. | x): (B, C, H, W) -> (B, C + 1, H, W)."""
        mask = self.mask(x, generator)
        return self.observe(x, torch.cat([torch.zeros_like(x), mask], 1), generator)

    def observe(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """A new observation A(x) + s eps, with the mask of y."""
        known = y[:, -1:]
        return torch.cat([self.measure(x, y) + self.noise * known * self.eps(x, generator), known], 1)

    def eps(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The observation's noise, of unit variance."""
        return randn_like(x, generator)

    def noise_variance(self) -> float:
        """The variance of the noise as an operator on the range of A."""
        return self.noise**2

    def value(self, y: Tensor) -> Tensor:
        """What was measured: (B, C + 1, H, W) -> (B, C, H, W)."""
        return y[:, :-1]

    def clean_shape(self, y: Tensor) -> list:
        """The shape of the x that y observes."""
        return list(self.value(y).shape)

    def posterior(self, xt: Tensor, sigma: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and root of the covariance of x0 given xt under x0 ~ N(0, I); given y too where `exact`.

        The denoiser is D = mean + root F with F a network: the preconditioning of EDM (Karras et al. 2022).
        """
        # mean = xt / (sigma^2 + 1),  variance = sigma^2 / (sigma^2 + 1)
        variance = sigma**2 / (sigma**2 + 1)
        return xt / (sigma**2 + 1), variance.sqrt().expand_as(xt)

    def spread(self, root: Tensor, output: Tensor) -> Tensor:
        """root F."""
        return root * output


class Pixelwise(Corruption):
    """Corruptions that show some pixels as they are, but for noise: y = known (x + s eps)."""

    exact = True

    def __init__(self, noise: float):
        super().__init__()
        self.noise = at_least("noise", noise, 0)

    def measure(self, x: Tensor, y: Tensor) -> Tensor:
        return y[:, -1:] * x

    def posterior(self, xt: Tensor, sigma: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        # A Kalman update of the posterior given xt:  gain = v / (v + s^2),  mean += gain (y - mean),  v -= gain v
        known = y[:, -1:]
        variance = sigma**2 / (sigma**2 + 1)
        gain = known * variance / (variance + self.noise**2)
        mean = xt / (sigma**2 + 1)
        mean = mean + gain * (y[:, :-1] - mean)
        # 1 - gain, written so that nothing cancels where s is small
        rest = 1 - known + known * self.noise**2 / (variance + self.noise**2)
        return mean, (variance * rest).sqrt().expand_as(xt)


class Mask(Pixelwise):
    """Pixels missing at random, independently, with probability `rate`."""

    def __init__(self, rate: float = 0.75, noise: float = 1e-3):
        super().__init__(noise)
        self.rate = fraction("rate", rate)

    def mask(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return (torch.rand(x[:, :1].shape, generator=generator, device=x.device) >= self.rate).to(x.dtype)


class Block(Pixelwise):
    """Rectangles and stripes missing, until `rate` of the pixels are."""

    shapes = 24

    def __init__(self, rate: float = 0.5, noise: float = 1e-3):
        super().__init__(noise)
        self.rate = fraction("rate", rate)

    def mask(self, x: Tensor, generator: torch.Generator) -> Tensor:
        B, _, H, W = x.shape
        u = torch.rand(6, B, self.shapes, 1, generator=generator, device=x.device)
        kind = (3 * u[0]).long()  # 0: a rectangle, 1: a horizontal stripe, 2: a vertical stripe
        half_height = torch.where(kind == 1, 0.02 + 0.06 * u[1], 0.08 + 0.17 * u[1]) + (kind == 2)
        half_width = torch.where(kind == 2, 0.02 + 0.06 * u[2], 0.08 + 0.17 * u[2]) + (kind == 1)
        rows = (torch.arange(H, device=x.device) + 0.5) / H
        columns = (torch.arange(W, device=x.device) + 0.5) / W
        inside = ((rows - u[3]).abs() < half_height)[..., :, None] & ((columns - u[4]).abs() < half_width)[..., None, :]
        # Pixels go missing shape after shape, in reading order within each, up to the rate.   inside: (B, shapes, H, W)
        first = torch.where(inside.any(1), inside.int().argmax(1), self.shapes).flatten(1)  # (B, H W)
        rank = first.argsort(1, stable=True).argsort(1)
        return (rank >= round(self.rate * H * W)).to(x.dtype).view(B, 1, H, W)


class Noise(Pixelwise):
    """White noise: y = x + s eps."""

    def __init__(self, noise: float = 0.5):
        super().__init__(noise)


def gaussian_kernel(sigma: float, radius: int) -> Tensor:
    """(2 radius + 1,): samples of a Gaussian density, normalised."""
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    return kernel / kernel.sum()


def separable_filter(x: Tensor, kernel: Tensor) -> Tensor:
    """Each channel of x (B, C, H, W) filtered along both axes, no padding."""
    B, C, H, W = x.shape
    x = F.conv2d(x.reshape(B * C, 1, H, W), kernel.view(1, 1, -1, 1))
    x = F.conv2d(x, kernel.view(1, 1, 1, -1))
    return x.view(B, C, x.shape[-2], x.shape[-1])


class Blur(Corruption):
    """Gaussian blur of standard deviation `width` pixels, mirrored at the border: y = K x + s eps."""

    def __init__(self, width: float = 1.5, noise: float = 0.02):
        super().__init__()
        self.width, self.noise = above("width", width, 0), at_least("noise", noise, 0)
        self.register_buffer("kernel", gaussian_kernel(width, math.ceil(3 * width)), persistent=False)

    def measure(self, x: Tensor, y: Tensor) -> Tensor:
        radius = len(self.kernel) // 2
        if min(x.shape[-2:]) <= radius:
            raise DiffEMError(f"a blur of width {self.width} needs images of more than {radius} pixels a side")
        return y[:, -1:] * separable_filter(F.pad(x, [radius] * 4, mode="reflect"), self.kernel)


class Downsample(Corruption):
    """Means of factor x factor pixels, plus noise, shown at the image's own size: y = R (M x + s eps), R repeats."""

    def __init__(self, factor: int = 2, noise: float = 0.01):
        super().__init__()
        self.factor, self.noise = int(at_least("factor", factor, 1)), at_least("noise", noise, 0)

    def measure(self, x: Tensor, y: Tensor) -> Tensor:
        return y[:, -1:] * self.means(x)

    def means(self, x: Tensor) -> Tensor:
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise DiffEMError(f"images of {x.shape[-2]}x{x.shape[-1]} cannot be downsampled by {self.factor}")
        low = F.avg_pool2d(x, self.factor)  # (B, C, H / factor, W / factor)
        return F.interpolate(low, scale_factor=float(self.factor), mode="nearest")

    def eps(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return self.factor * self.means(randn_like(x, generator))

    def noise_variance(self) -> float:
        # cov = s^2 R R^T, and R R^T = factor^2 on the range of R
        return (self.noise * self.factor) ** 2


# The quantisation tables of the JPEG standard (ITU-T T.81, annex K), in reading order
JPEG_LUMINANCE = """16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
    18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""
JPEG_CHROMINANCE = """17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 99
    99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99"""


class Jpeg(Corruption):
    """JPEG at a quality of 1 to 100, without chroma subsampling; grey images by the luminance table."""

    linear = False

    def __init__(self, quality: int = 20):
        super().__init__()
        if not 1 <= quality <= 100:
            raise DiffEMError(f"quality must be from 1 to 100, not {quality:g}")
        self.quality = int(quality)
        percent = 5000 // self.quality if quality < 50 else 200 - 2 * self.quality
        tables = [[int(entry) for entry in table.split()] for table in (JPEG_LUMINANCE, JPEG_CHROMINANCE)]
        tables = ((torch.tensor(tables) * percent + 50) // 100).clamp(1, 255).float()
        self.register_buffer("tables", tables.view(2, 1, 1, 8, 8), persistent=False)
        # dct[k, n] = sqrt(2 / 8) cos(pi k (n + 1/2) / 8), the row of k = 0 divided by sqrt(2)
        k, n = torch.arange(8.0)[:, None], torch.arange(8.0)
        dct = 0.5 * torch.cos(math.pi * k * (n + 0.5) / 8)
        dct[0] /= math.sqrt(2)
        self.register_buffer("dct", dct, persistent=False)
        # BT.601, full range:  (Y, Cb - 128, Cr - 128) = ycbcr (R, G, B)
        ycbcr = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
        self.register_buffer("ycbcr", ycbcr, persistent=False)

    def measure(self, x: Tensor, y: Tensor) -> Tensor:
        B, C, H, W = x.shape
        if C not in (1, 3):
            raise DiffEMError(f"jpeg takes images of 1 or 3 channels, not {C}")
        pixels = ((x + 2) * (255 / 4)).clamp(0, 255).round()
        if C == 3:
            pixels = torch.einsum("ij,bjhw->bihw", self.ycbcr, pixels).round()
            pixels = pixels + torch.tensor([0.0, 128, 128], device=x.device).view(3, 1, 1)
        padded = F.pad(pixels - 128, [0, -W % 8, 0, -H % 8], mode="replicate")
        blocks = padded.unfold(2, 8, 8).unfold(3, 8, 8)  # (B, C, H / 8, W / 8, 8, 8)
        table = self.tables[[0, 1, 1][:C]]  # (C, 1, 1, 8, 8)
        quantised = (self.dct @ blocks @ self.dct.T / table).round() * table
        blocks = (self.dct.T @ quantised @ self.dct + 128).clamp(0, 255).round()
        pixels = blocks.transpose(3, 4).reshape(padded.shape)[..., :H, :W]  # (.., H / 8, 8, W / 8, 8) -> (.., H, W)
        if C == 3:
            pixels = pixels - torch.tensor([0.0, 128, 128], device=x.device).view(3, 1, 1)
            pixels = torch.einsum("ij,bjhw->bihw", self.ycbcr.inverse(), pixels).round().clamp(0, 255)
        return y[:, -1:] * (pixels * (4 / 255) - 2)


class Projection(Corruption):
    """Vectors seen through a random matrix of `rows` unit rows, drawn for each: y = A x + s eps."""

    exact = True

    def __init__(self, rows: int = 2, noise: float = 0.01):
        super().__init__()
        self.rows, self.noise = int(at_least("rows", rows, 1)), above("noise", noise, 0)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """(B, d) -> (B, rows, d + 1): the rows of A, each with its measured value."""
        if x.ndim != 2:
            raise DiffEMError("projection is for vectors; images take another corruption")
        A = torch.randn(len(x), self.rows, x.shape[1], generator=generator, device=x.device)
        A = F.normalize(A, dim=-1)
        return self.observe(x, torch.cat([A, torch.zeros_like(A[..., :1])], -1), generator)

    def measure(self, x: Tensor, y: Tensor) -> Tensor:
        return (y[..., :-1] @ x[..., None])[..., 0]  # (B, rows)

    def observe(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        value = self.measure(x, y)
        return torch.cat([y[..., :-1], (value + self.noise * randn_like(value, generator))[..., None]], -1)

    def value(self, y: Tensor) -> Tensor:
        return y[..., -1]

    def clean_shape(self, y: Tensor) -> list:
        return [y.shape[0], y.shape[-1] - 1]

    def posterior(self, xt: Tensor, sigma: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        A, value = y[..., :-1], y[..., -1:]  # (B, rows, d), (B, rows, 1)
        variance = (sigma**2 / (sigma**2 + 1))[..., None]
        mean = (xt / (sigma**2 + 1))[..., None]
        # mean + v A^T (v A A^T + s^2)^-1 (y - A mean)
        S = variance * A @ A.mT + self.noise**2 * torch.eye(A.shape[1], device=A.device)
        mean = mean + variance * A.mT @ torch.linalg.solve(S, value - A @ mean)
        # precision = 1 / v + A^T A / s^2 = L L^T, so that L^-T is a root of the covariance
        identity = torch.eye(A.shape[2], device=A.device)
        L = torch.linalg.cholesky(identity / variance + A.mT @ A / self.noise**2)
        root = torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False).mT
        return mean[..., 0], root

    def spread(self, root: Tensor, output: Tensor) -> Tensor:
        return (root @ output[..., None])[..., 0]


CORRUPTIONS = {
    "mask": Mask, "block": Block, "blur": Blur, "downsample": Downsample, "noise": Noise, "jpeg": Jpeg,
    "projection": Projection,
}  # fmt: skip


def at_least(name: str, value: float, bound: float) -> float:
    if not value >= bound:
        raise DiffEMError(f"{name} must be at least {bound}, not {value:g}")
    return value


def above(name: str, value: float, bound: float) -> float:
    if not value > bound:
        raise DiffEMError(f"{name} must be above {bound}, not {value:g}")
    return value


def fraction(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise DiffEMError(f"{name} must be in [0, 1), not {value:g}")
    return value


def corrupt(x: Tensor, corruption: Corruption, generator: torch.Generator) -> Tensor:
    """The observations of a whole data set, in parts lest memory grow."""
    return torch.cat([corruption(part, generator) for part in x.split(1024)])


# ---------------------------------------------------------------------------------------------------------------------
# Networks, which TorchScript compiles as they stand: hence one call signature (x, emb) for every block


class Attention(nn.Module):
    """Self-attention over the pixels, added to its input."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(1, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W).transpose(3, 4)
        q, k, v = qkv.unbind(1)  # each (B, heads, H W, C / heads)
        out = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(B, C, H, W)
        return x + self.out(out)


class ResidualBlock(nn.Module):
    """x + gate conv(silu(conv(scale norm(x) + shift))), modulated by the embedding of the noise level."""

    def __init__(self, channels: int, emb: int, heads: int, dropout: float):
        super().__init__()
        self.norm = nn.GroupNorm(max(1, channels // 16), channels, affine=False)
        self.modulation = nn.Linear(emb, 3 * channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.attention = Attention(channels, heads) if heads else nn.Identity()
        nn.init.normal_(self.modulation.weight, std=0.01)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift, gate = self.modulation(emb)[:, :, None, None].chunk(3, 1)  # each (B, C, 1, 1)
        h = self.conv1((1 + scale) * self.norm(x) + shift)
        h = self.conv2(self.dropout(F.silu(h)))
        return self.attention(x + (1 + gate) * h)


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer, set to give 0 at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class NoiseEmbedding(nn.Module):
    """log sigma (B,) -> (B, width): sines and cosines, then an MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(-1, 1, 16), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, log_sigma: Tensor) -> Tensor:
        angle = log_sigma[:, None] * self.frequencies
        return self.mlp(torch.cat([angle.sin(), angle.cos()], 1))


class UNet(nn.Module):
    """F for images of any size. Level l has 2^-l of the resolution, rounded up, and channels[l] channels."""

    def __init__(self, inputs: int, outputs: int, config: Config):
        super().__init__()
        channels = list(config.channels)
        self.emb = NoiseEmbedding(4 * channels[0])
        self.down, self.encoder = nn.ModuleList(), nn.ModuleList()
        self.up, self.decoder = nn.ModuleList(), nn.ModuleList()

        def blocks(level: int) -> nn.ModuleList:
            heads = config.heads if level in config.attention else 0
            return nn.ModuleList(
                ResidualBlock(channels[level], 4 * channels[0], heads, config.dropout) for _ in range(config.blocks)
            )

        for level, width in enumerate(channels):
            before = channels[level - 1] if level else inputs
            self.down.append(nn.Conv2d(before, width, 3, stride=2 if level else 1, padding=1))
            self.encoder.append(blocks(level))
        for level in range(len(channels))[::-1]:  # in the order of execution; the coarsest level joins its own output
            below = channels[min(level + 1, len(channels) - 1)]
            self.up.append(nn.Conv2d(below + channels[level], channels[level], 3, padding=1))
            self.decoder.append(blocks(level))
        self.norm = nn.GroupNorm(max(1, channels[0] // 16), channels[0])
        self.out = zeroed(nn.Conv2d(channels[0], outputs, 3, padding=1))

    def forward(self, xt: Tensor, mean: Tensor, y: Tensor, log_sigma: Tensor) -> Tensor:
        emb = self.emb(log_sigma)
        x = torch.cat([xt, mean, y], 1)
        skips: list[Tensor] = []
        for down, blocks in zip(self.down, self.encoder):
            x = down(x)
            for block in blocks:
                x = block(x, emb)
            skips.append(x)
        for up, blocks in zip(self.up, self.decoder):
            skip = skips.pop()
            x = F.interpolate(x, size=skip.shape[-2:], mode="nearest")
            x = up(torch.cat([x, skip], 1))
            for block in blocks:
                x = block(x, emb)
        return self.out(F.silu(self.norm(x)))


class MLP(nn.Module):
    """F for vectors."""

    def __init__(self, inputs: int, outputs: int, config: Config):
        super().__init__()
        self.emb = NoiseEmbedding(64)
        layers, width = [], inputs + 64
        for hidden in config.channels:
            layers += [nn.Linear(width, hidden), nn.SiLU(), nn.LayerNorm(hidden)]
            width = hidden
        self.layers = nn.Sequential(*layers, zeroed(nn.Linear(width, outputs)))

    def forward(self, xt: Tensor, mean: Tensor, y: Tensor, log_sigma: Tensor) -> Tensor:
        return self.layers(torch.cat([xt, mean, y.flatten(1), self.emb(log_sigma)], 1))


class Denoiser(nn.Module):
    """D(xt, sigma, y), an estimate of E[x0 | xt, y].

    D = G + C^(1/2) F(c_in xt, G, y, log sigma), c_in = 1 / sqrt(sigma^2 + 1), with G and C the mean and covariance of
    x0 given xt, and given y where the corruption's `posterior` is `exact`, had x0 the prior N(0, I). F starts at 0, so
    that D starts as that posterior's mean, which agrees with y, and learns only what is not Gaussian.
    """

    def __init__(self, x_shape: list, y_shape: list, corruption: Corruption, config: Config):
        """x_shape, y_shape: of one x and one y, without the batch."""
        super().__init__()
        self.corruption = corruption
        self.sigma_min, self.sigma_max = config.sigma_min, config.sigma_max
        if len(x_shape) == 3:
            self.network = UNet(2 * x_shape[0] + y_shape[0], x_shape[0], config)
        else:
            self.network = MLP(2 * x_shape[0] + math.prod(y_shape), x_shape[0], config)

    def forward(self, xt: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        """xt (B, ...), sigma (B,), y of the corruption's shape -> (B, ...)."""
        log_sigma = sigma.log()
        sigma = sigma.view([-1] + [1] * (xt.dim() - 1))
        mean, root = self.corruption.posterior(xt, sigma, y)
        output = self.network(xt * (sigma**2 + 1).rsqrt(), mean, y, log_sigma)
        return mean + self.corruption.spread(root, output)


# ---------------------------------------------------------------------------------------------------------------------
# Noise levels, loss, samplers


def noise_level(t: Tensor, config: Config) -> Tensor:
    """sigma(t) = exp((1 - t) log sigma_min + t log sigma_max), t in [0, 1]."""
    return torch.exp((1 - t) * math.log(config.sigma_min) + t * math.log(config.sigma_max))


def denoising_loss(denoiser: Denoiser, x0: Tensor, y: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    """Eq. 10, the loss of each sample: (B,), near 1 for a denoiser whose network gives 0.

    lambda(sigma) |D - x0|^2 / d,  lambda = 1 / sigma^2 + 1;  where the denoiser's preconditioning uses y, the error e =
    D - x0 is weighted by the precision of x0 given y too: lambda(sigma) |e|^2 / d + |A e|^2 / (s^2 d).
    """
    corruption = denoiser.corruption
    sigma_ = sigma.view(-1, *[1] * (x0.ndim - 1))
    error = denoiser(x0 + sigma_ * randn_like(x0, generator), sigma, y) - x0
    loss = (1 / sigma**2 + 1) * error.square().flatten(1).mean(1)
    if corruption.exact and corruption.noise > 0:  # with s = 0, A e = 0 exactly
        loss = loss + corruption.measure(error, y).square().flatten(1).sum(1) / (corruption.noise**2 * error[0].numel())
    return loss


@torch.no_grad()
def sample(denoiser: Denoiser, y: Tensor, steps: int, method: str, generator: torch.Generator) -> Tensor:
    """x0 ~ q(x0 | y) by `steps` evaluations of the denoiser; y (B, ...) -> x0 (B, ...). y = 0 samples the prior.

    From x = sigma_max eps through log-uniform noise levels, each step to the next lower level (`_s` below `_t`):
        ddpm  xs = D + (sigma_s / sigma_t)^2 (xt - D) + sigma_s sqrt(1 - (sigma_s / sigma_t)^2) eps      (ancestral)
        ddim  xs = D +  sigma_s / sigma_t    (xt - D)                                                    (Song et al. 2021)
    """
    sigmas = torch.logspace(math.log10(denoiser.sigma_max), math.log10(denoiser.sigma_min), steps).tolist() + [0.0]
    shape = denoiser.corruption.clean_shape(y)
    xt = sigmas[0] * torch.randn(shape, generator=generator, device=y.device)
    for sigma_t, sigma_s in zip(sigmas, sigmas[1:]):
        x0 = denoiser(xt, torch.full(shape[:1], sigma_t, device=y.device), y)
        ratio = sigma_s / sigma_t
        if method == "ddpm":
            xt = x0 + ratio**2 * (xt - x0) + sigma_s * math.sqrt(1 - ratio**2) * randn_like(xt, generator)
        elif method == "ddim":
            xt = x0 + ratio * (xt - x0)
        else:
            raise DiffEMError(f"unknown sampler {method!r}: ddpm or ddim")
    return xt


# ---------------------------------------------------------------------------------------------------------------------
# The start of EM: a Gaussian prior N(mean, U U^T + psi I), fitted to the observations by EM itself


class GaussianPrior:
    """Probabilistic principal components (Tipping & Bishop 1999) with posterior draws for any linear corruption."""

    def __init__(self, shape: list, mean: Tensor, U: Tensor, psi: float):
        """shape: of one x; mean (d,), U (d, rank), psi > 0, with d the product of shape."""
        self.shape, self.mean, self.U, self.psi = shape, mean, U, psi

    @classmethod
    def of(cls, x: Tensor, rank: int, generator: torch.Generator) -> "GaussianPrior":
        """The most likely such Gaussian for samples x (N, ...)."""
        flat = x.flatten(1)
        N, d = flat.shape
        mean = flat.mean(0)
        rank = min(rank, d - 1, N - 1)
        with torch_seeded_by(generator):
            _, singular, V = torch.svd_lowrank(flat - mean, q=min(rank + 8, N, d), niter=2)
        variance, V = singular[:rank].square() / N, V[:, :rank]
        # psi = mean of the variances left out,  U = V (variance - psi)^(1/2)
        total = (flat - mean).square().sum() / N
        psi = ((total - variance.sum()) / (d - rank)).clamp_min(1e-6)
        return cls(list(x.shape[1:]), mean, V * (variance - psi).clamp_min(0).sqrt(), float(psi))

    @classmethod
    def fit(cls, y: Tensor, corruption: Corruption, rank: int, laps: int, generator: torch.Generator):
        """EM on observations y (N, ...), from N(0, I): draw every x given its y, fit, repeat. -> prior, linear corruption.

        A corruption that is not linear is taken for white noise, of the size of the error it makes on draws from the
        Gaussian fitted to the observations as if they were clean. (x = y as a start would teach nothing: compressing a
        JPEG image once more changes nothing.)
        """
        shape = corruption.clean_shape(y[:1])[1:]
        d = math.prod(shape)
        prior = cls(shape, torch.zeros(d, device=y.device), torch.zeros(d, 1, device=y.device), 1.0)
        if not corruption.linear:
            x = cls.of(corruption.value(y), rank, generator).sample(min(len(y), 1024), generator)
            error = corruption.value(corruption(x, generator)) - x
            corruption = Noise(max(float(error.square().mean().sqrt()), 1e-3)).to(y.device)
        for _ in range(laps):
            prior = cls.of(prior.posterior(y, corruption, generator), rank, generator)
        return prior, corruption

    def sample(self, number: int, generator: torch.Generator) -> Tensor:
        """x ~ N(mean, U U^T + psi I): (number, ...)."""
        z = torch.randn(number, self.U.shape[1], generator=generator, device=self.mean.device)
        eps = torch.randn(number, len(self.mean), generator=generator, device=self.mean.device)
        return (self.mean + z @ self.U.T + math.sqrt(self.psi) * eps).view(number, *self.shape)

    def covariance(self, x: Tensor) -> Tensor:
        """(U U^T + psi I) x for each of (B, ...)."""
        flat = x.flatten(1)
        return (flat @ self.U @ self.U.T + self.psi * flat).view_as(x)

    def posterior(self, y: Tensor, corruption: Corruption, generator: torch.Generator) -> Tensor:
        """A draw x ~ p(x | y) for each y (B, ...), by Matheron's rule.

        x' ~ prior, y' ~ Q(. | x'),  x = x' + Sigma A^T (A Sigma A^T + s^2 I)^-1 (y - y')
        """
        return torch.cat([self._posterior(part, corruption, generator) for part in y.split(1024)])

    def _posterior(self, y: Tensor, corruption: Corruption, generator: torch.Generator) -> Tensor:
        x = self.sample(len(y), generator)
        residual = corruption.value(y) - corruption.value(corruption.observe(x, y, generator))
        _, adjoint = torch.func.vjp(lambda x: corruption.measure(x, y), x)  # A^T, from autograd
        variance = max(corruption.noise_variance(), 1e-8)

        def operator(v: Tensor) -> Tensor:
            return corruption.measure(self.covariance(adjoint(v)[0]), y) + variance * v

        return x + self.covariance(adjoint(conjugate_gradients(operator, residual))[0])


def conjugate_gradients(operator, b: Tensor, tolerance: float = 1e-3, most: int = 200) -> Tensor:
    """Solves operator(v) = b for each of a batch (B, ...), operator symmetric and positive, until the norm of every
    residual is below `tolerance` of that of b, or for `most` iterations."""

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).flatten(1).sum(1).view(-1, *[1] * (b.ndim - 1))

    v, r = torch.zeros_like(b), b
    p, rr = r, dot(r, r)
    goal = tolerance**2 * rr
    for _ in range(most):
        if (rr <= goal).all():
            break
        Ap = operator(p)
        alpha = rr / dot(p, Ap).clamp_min(1e-30)
        v, r = v + alpha * p, r - alpha * Ap
        rr, before = dot(r, r), rr
        p = r + rr / before.clamp_min(1e-30) * p
    return v


# ---------------------------------------------------------------------------------------------------------------------
# Expectation maximisation


@dataclass
class State:
    """Where a run stands: all that a checkpoint needs. Lap 0 is the Gaussian prior's."""

    x0: Tensor  # the reconstructions X, one for each observation; the E-step writes this lap's over the last's
    denoiser: Denoiser
    average: AveragedModel  # the moving average of its weights
    optimizer: torch.optim.Optimizer
    losses: Tensor  # (steps,) of this lap
    prior: GaussianPrior | None = None  # lap 0's, with the corruption as it takes it
    prior_corruption: Corruption | None = None
    lap: int = 0
    step: int = 0  # M-steps done of this lap
    drawn: int = 0  # reconstructions drawn in this lap

    def model(self) -> Denoiser:
        """The denoiser to sample from."""
        return self.average.module.eval()

    def check(self) -> None:
        """Raises DiffEMError where a loss of this lap was not finite."""
        bad = (~self.losses[: self.step].isfinite()).nonzero()
        if len(bad):
            raise DiffEMError(f"the loss is not finite at lap {self.lap}, step {int(bad[0]) + 1}: try a lower --lr")


def new_state(x0: Tensor, y_shape: list, corruption: Corruption, config: Config) -> State:
    """The state before the first lap: x0 (N, ...), a new network and its optimiser."""
    with torch_seeded_by(generator_for("cpu", config.seed, 0, 2)):
        denoiser = Denoiser(list(x0.shape[1:]), y_shape, corruption, config)
    denoiser = denoiser.to(x0.device, memory_format=torch.channels_last)
    state = State(x0, denoiser, *new_optimizer(denoiser, config), torch.zeros(config.steps, device=x0.device))
    return state


def new_optimizer(denoiser: Denoiser, config: Config) -> tuple[AveragedModel, torch.optim.Optimizer]:
    """Both start anew each lap: the optimiser's moments and the average belong to one set of reconstructions."""
    average = AveragedModel(denoiser, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    return average, torch.optim.Adam(denoiser.parameters(), lr=config.lr)


def em(y: Tensor, corruption: Corruption, config: Config, state: State | None = None):
    """Runs DiffEM on observations y (N, ...), on their device, and yields the state after each step: once for lap 0,
    after each optimiser step and each batch of the E-step. Between two of them a run can stop, be saved and go on. A lap
    is complete where state.drawn == N. It never sees a clean image.

    Raises DiffEMError where the loss is not finite.
    """
    corruption = corruption.to(y.device)
    if state is None:
        generator = generator_for(y.device, config.seed, 0, 1)
        prior, linear = GaussianPrior.fit(y, corruption, config.prior_rank, config.prior_laps, generator)
        state = new_state(prior.posterior(y, linear, generator), list(y.shape[1:]), corruption, config)
        state.prior, state.prior_corruption, state.drawn = prior, linear, len(y)
        yield state
    while state.lap < config.laps or state.drawn < len(y):
        if state.drawn == len(y):
            # The next lap goes on from the averaged weights
            state.denoiser.load_state_dict(state.average.module.state_dict())
            state.average, state.optimizer = new_optimizer(state.denoiser, config)
            state.lap, state.step, state.drawn = state.lap + 1, 0, 0
        if state.step < config.steps:
            m_step(state, corruption, config, generator_for(y.device, config.seed, state.lap, state.step))
            state.step += 1
            # Reading the loss waits for the device: on a GPU only now and then
            if y.device.type == "cpu" or state.step % 50 == 0 or state.step == config.steps:
                state.check()
        else:
            part = slice(state.drawn, state.drawn + config.sample_batch)
            generator = generator_for(y.device, config.seed, state.lap, config.steps + state.drawn)
            state.x0[part] = sample(state.model(), y[part], config.sample_steps, config.method, generator)
            state.drawn += len(y[part])
        yield state


def m_step(state: State, corruption: Corruption, config: Config, generator: torch.Generator) -> None:
    """One optimiser step on reconstructions corrupted afresh."""
    device = state.x0.device
    x0 = state.x0[torch.randint(len(state.x0), (config.batch,), generator=generator, device=device)]
    if x0.ndim == 4:
        x0 = augment(x0, config, generator)
    y = corruption(x0, generator)
    blank = torch.rand(len(y), generator=generator, device=device) < config.blank
    y = y.masked_fill(blank.view(-1, *[1] * (y.ndim - 1)), 0)
    # t ~ Beta(3, 3): the median of five uniform numbers
    t = torch.rand(len(x0), 5, generator=generator, device=device).median(1).values
    state.denoiser.train()
    with torch_seeded_by(generator):  # dropout
        loss = denoising_loss(state.denoiser, x0, y, noise_level(t, config), generator).mean()
    state.optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(state.denoiser.parameters(), config.clip)
    state.optimizer.step()
    state.average.update_parameters(state.denoiser)
    state.losses[state.step] = loss.detach()


def augment(x0: Tensor, config: Config, generator: torch.Generator) -> Tensor:
    """Mirrored images, and slightly other hues (up to 0.01 of a turn) and saturations (up to 5 %), as in the paper."""
    u = torch.rand(3, len(x0), 1, 1, 1, generator=generator, device=x0.device)
    if config.flip:
        x0 = torch.where(u[0] < 0.5, x0.flip(3), x0)
    if config.jitter and x0.shape[1] == 3:
        # Around grey g:  x0 = g + saturation (cos(a) (x0 - g) + sin(a) (1, 1, 1)/sqrt(3) x (x0 - g)), a rotation about grey
        grey = x0.mean(1, keepdim=True)
        angle, saturation = 0.02 * math.pi * (2 * u[1] - 1), 0.95 + 0.1 * u[2]
        chroma = x0 - grey
        turned = (chroma.roll(1, 1) - chroma.roll(-1, 1)) / math.sqrt(3)
        x0 = (grey + saturation * (angle.cos() * chroma + angle.sin() * turned)).clamp(-2, 2)
    return x0


def fit(y: Tensor, corruption: Corruption, config: Config) -> Denoiser:
    """Learns from observations y ~ Q(. | x0) alone, (N, C + 1, H, W) or (N, m, d + 1), the model that `sample` restores
    them with. Same seed, same device: same result. Raises DiffEMError where the loss is not finite."""
    for state in em(y, corruption, config):
        pass
    return state.model()


# ---------------------------------------------------------------------------------------------------------------------
# Data sets: clean images, which are corrupted once and then put aside for the metrics

# The paper's settings, and small ones; Config's own defaults are those of the digits.
PUBLISHED = dict(
    steps=50_000, batch=256, blocks=5, heads=4, dropout=0.1, ema=0.9999, laps=20, sample_steps=256, flip=True, jitter=True,
    sample_batch=1024, prior_laps=8,
)  # fmt: skip
SMALL = dict(channels=(32, 64, 96), steps=400, batch=128, ema=0.995, sample_batch=256, prior_rank=64, prior_laps=8)
PRESETS = {
    ("digits", "small"): dict(rate=0.5),
    ("manifold", "small"): dict(
        corruption="projection", channels=(256, 256, 256), laps=16, steps=1024, batch=1024, lr=1e-3, ema=0.995,
        sigma_max=10.0, sample_steps=64, sample_batch=16384, prior_rank=4, prior_laps=16, held_out=4096, samples=4,
    ),
    ("mnist", "small"): SMALL,
    ("fashion_mnist", "small"): SMALL | dict(flip=True),
    ("cifar10", "small"): SMALL | dict(limit=10_000, flip=True),
    ("cifar10", "published"): PUBLISHED | dict(channels=(128, 256, 384), attention=(1,), lr=2e-4, prior_rank=64),
    ("celeba", "small"): SMALL | dict(limit=10_000, flip=True),
    ("celeba", "published"): PUBLISHED | dict(
        channels=(128, 256, 384, 512), blocks=3, attention=(3,), lr=1e-4, prior_rank=1024, sample_batch=512
    ),
    ("folder", "small"): SMALL | dict(flip=True),
}  # fmt: skip
SHAPES = {  # of one clean image, and how many there are to train on
    "digits": ([1, 8, 8], 1541), "manifold": ([5], 16384), "mnist": ([1, 28, 28], 60_000),
    "fashion_mnist": ([1, 28, 28], 60_000), "cifar10": ([3, 32, 32], 50_000), "celeba": ([3, 64, 64], 162_770),
}  # fmt: skip
DATASETS = [*SHAPES, "folder"]
IMAGE_FILES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}


def load_data(settings: dict) -> tuple[Tensor, Tensor]:
    """Clean x0 to train on and to hold out, shuffled by the seed: (N, C, H, W) in [-2, 2], or (N, 5)."""
    name, root, held_out = settings["dataset"], settings["data_dir"], settings["held_out"]
    generator = generator_for("cpu", settings["seed"], 0)
    if name == "manifold":
        t = torch.rand(settings["limit"] or SHAPES[name][1], generator=generator)
        x, test = manifold(t, settings["seed"]), manifold(torch.rand(held_out, generator=generator), settings["seed"])
        return x, test
    number = (settings["limit"] or 10**9) + held_out
    test = None
    if name == "folder":
        files = image_files(root)
        files = [files[i] for i in torch.randperm(len(files), generator=generator).tolist()][:number]
        x = read_images(files, settings["image_size"], settings["grey"], settings["skip_bad_images"])
    elif name == "digits":
        from sklearn.datasets import load_digits

        x = torch.from_numpy(load_digits().images * (255 / 16))[:, None]
    else:
        x, test = torchvision_images(name, root, number)
    if test is None:
        order = torch.randperm(len(x), generator=generator)
        x, test = x[order[held_out:]], x[order[:held_out]]
    if len(x) < 1:
        raise DiffEMError(f"{len(test)} images are too few to hold out {held_out} (--held-out) and train on the rest")
    order = torch.randperm(len(x), generator=generator)[: settings["limit"]]
    return x[order].float() * (4 / 255) - 2, test[:held_out].float() * (4 / 255) - 2


def manifold(t: Tensor, seed: int) -> Tensor:
    """The points at t in [0, 1) of a smooth random closed curve in R^5, in [-2, 2]: (N,) -> (N, 5)."""
    # x_j(t) = sum_k a_jk cos(2 pi k t + phase_jk),  a_jk ~ U(0, 1) / k^3,  k = 1 .. 10, then rescaled
    rng = np.random.default_rng(seed)
    k = torch.arange(1.0, 11)
    a, phase = torch.tensor(rng.random((2, 5, 1, 10)), dtype=torch.float32)
    dense = torch.linspace(0, 1, 20_001)[:-1]
    x = [(a / k**3 * torch.cos(2 * math.pi * (k * u[:, None] + phase))).sum(2).T for u in (t, dense)]
    low, high = x[1].amin(0), x[1].amax(0)
    return 4 * (x[0] - low) / (high - low) - 2


def torchvision_images(name: str, root: str, number: int) -> tuple[Tensor, Tensor]:
    """Pixels 0 to 255 of the training and the test set, downloaded at first use."""
    from torchvision import datasets

    Dataset, home = {
        "mnist": (datasets.MNIST, "MNIST/raw/*-ubyte.gz"),
        "fashion_mnist": (datasets.FashionMNIST, "FashionMNIST/raw/*-ubyte.gz"),
        "cifar10": (datasets.CIFAR10, "cifar-10-python.tar.gz"),
        "celeba": (datasets.CelebA, "celeba/img_align_celeba.zip and the list_*.txt and identity_*.txt files beside it"),
    }[name]
    try:
        if name == "celeba":
            parts = [Dataset(root, split=split, download=True) for split in ("train", "test")]
        else:
            parts = [Dataset(root, train=train, download=True) for train in (True, False)]
    except Exception as error:  # torchvision and gdown raise many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DiffEMError(f"cannot download {name} ({reason}): put {home} into {Path(root).resolve()}") from error
    if name == "celeba":
        files = [[Path(p.root, p.base_folder, "img_align_celeba", f) for f in p.filename[:number]] for p in parts]
        return tuple(read_images(part, 64, grey=False, skip_bad=False, crop=140) for part in files)
    pixels = [torch.as_tensor(part.data) for part in parts]
    return tuple(p[:, None] if p.ndim == 3 else p.permute(0, 3, 1, 2) for p in pixels)


def image_files(root: str) -> list:
    files = sorted(p for p in Path(root).rglob("*") if p.suffix.lower() in IMAGE_FILES)
    if not files:
        raise DiffEMError(f"no images in {root}" if Path(root).is_dir() else f"no folder {root} (--data-dir)")
    return files


def read_images(files: list, size: int | None, grey: bool, skip_bad: bool, crop: int | None = None) -> Tensor:
    """(N, C, H, W), values 0 to 255. With a size: the centre (of `crop` pixels, else the largest square), resized."""
    from PIL import Image
    from torchvision.transforms.functional import center_crop

    images = []
    for path in tqdm(files, desc="reading images", leave=False, disable=None):
        try:
            with Image.open(path) as file:
                image = file.convert("L" if grey else "RGB")
        except Exception as error:  # Pillow raises many kinds for broken files
            if skip_bad:
                continue
            raise DiffEMError(f"{path} is not an image that can be read (--skip-bad-images goes on without)") from error
        if size and image.size != (size, size):
            image = center_crop(image, crop or min(image.size)).resize((size, size), Image.Resampling.LANCZOS)
        if images and image.size != images[0][0].size:
            (first, path0), (w, h) = images[0], image.size
            raise DiffEMError(
                f"images of mixed sizes: {path0} is {first.width}x{first.height}, {path} is {w}x{h}; "
                "--image-size N crops and resizes them all"
            )
        images.append((image, path))
    if not images:
        raise DiffEMError("none of the images can be read")
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image, _ in images]))
    return pixels[:, None] if grey else pixels.permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def psnr(x: Tensor, x0: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the mean over images: 10 log10(4^2 / mean |x - x0|^2)."""
    return float((10 * torch.log10(16 / (x - x0).square().flatten(1).mean(1))).mean())


def ssim(x: Tensor, x0: Tensor) -> float:
    """Structural similarity (Wang et al. 2004): Gaussian window of 11 pixels (less in smaller images), sigma 1.5."""
    radius = min(5, (min(x.shape[-2:]) - 1) // 2)
    kernel = gaussian_kernel(1.5, radius).to(x.device)
    mean, mean0, xx, yy, xy = (separable_filter(v, kernel) for v in (x, x0, x * x, x0 * x0, x * x0))
    c1, c2 = (0.01 * 4) ** 2, (0.03 * 4) ** 2
    covariance = 2 * (xy - mean * mean0) + c2
    variances = xx - mean**2 + yy - mean0**2 + c2
    return float(((2 * mean * mean0 + c1) * covariance / ((mean**2 + mean0**2 + c1) * variances)).mean())


def sliced_wasserstein(x: Tensor, x0: Tensor, generator: torch.Generator, directions: int = 256) -> float:
    """Root mean square, over random directions, of the 2-Wasserstein distance of the projections; equal numbers."""
    u = F.normalize(torch.randn(x.shape[1], directions, generator=generator, device=x.device), dim=0)
    return float(((x @ u).sort(0).values - (x0 @ u).sort(0).values).square().mean().sqrt())


def distance_to_curve(x: Tensor, curve: Tensor) -> float:
    """Mean distance of points (N, d) to the nearest of the curve's (M, d)."""
    return float(torch.cat([torch.cdist(part, curve).amin(1) for part in x.split(512)]).mean())


SIGMAS = (0.01, 0.1, 1.0, 10.0, 100.0)  # the noise levels at which the held-out loss is reported


@torch.no_grad()
def evaluate(state: State, y: Tensor, x0: Tensor | None, corruption: Corruption, settings: dict) -> tuple[dict, dict]:
    """Metrics of the posterior, on held-out observations y, and the samples they were made from. x0: the truth, if any.

    residual  root mean square of y - A(x) on what was observed, in units of s (of a grey level where s = 0)
    loss      by noise level: Eq. 10 on posterior samples of the held-out observations, corrupted afresh
    spread    posterior standard deviation, root mean square over pixels
    """
    config = config_of(settings)
    generator = generator_for(y.device, config.seed, 0, 3)  # the same noise in every lap

    def draw(y: Tensor) -> Tensor:
        if state.lap == 0:
            return state.prior.posterior(y, state.prior_corruption, generator)
        parts = y.split(config.sample_batch)
        return torch.cat([sample(state.model(), p, config.sample_steps, config.method, generator) for p in parts])

    x = torch.stack([draw(y) for _ in range(settings["samples"])])  # (samples, B, ...)
    nothing = torch.zeros_like(y)[:1024]
    prior = state.prior.sample(len(nothing), generator) if state.lap == 0 else draw(nothing)
    samples = {"x": x, "mean": x.mean(0), "std": x.std(0), "prior": prior}
    value, known = corruption.value(y), corruption.measure(torch.ones_like(x[0]), y) != 0
    error = (value - corruption.measure(x[0], y))[known]
    metrics = {"residual": float(error.square().mean().sqrt()) / (corruption.noise or 4 / 255)}
    metrics["spread"] = float(samples["std"].square().mean().sqrt())
    if state.lap:
        fresh = corruption(x[0], generator)
        for sigma in (s for s in SIGMAS if config.sigma_min <= s <= config.sigma_max):
            level = torch.full((len(y),), sigma, device=y.device)
            loss = denoising_loss(state.model(), x[0], fresh, level, generator)
            metrics[f"loss_{sigma:g}"] = float(loss.mean())
    if x0 is not None and x0.ndim == 4:
        metrics |= {"psnr": psnr(x[0], x0), "psnr_mean": psnr(samples["mean"], x0)}
        metrics |= {"ssim": ssim(x[0], x0), "ssim_mean": ssim(samples["mean"], x0)}
    elif x0 is not None:
        curve = manifold(torch.linspace(0, 1, 20_001)[:-1], config.seed).to(y.device)
        metrics["wasserstein"] = sliced_wasserstein(x[0], x0, generator)
        metrics["wasserstein_prior"] = sliced_wasserstein(prior, x0[: len(prior)], generator)
        metrics["to_curve"] = distance_to_curve(x[0], curve)
    return metrics, samples


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def picture_images(path: Path, y: Tensor, x0: Tensor | None, samples: dict, corruption: Corruption) -> None:
    """Rows: observation, two posterior samples, posterior mean and standard deviation, truth, samples of the prior."""
    from matplotlib.figure import Figure

    columns = min(10, len(y))
    observed = corruption.value(y)[:columns].expand(-1, 3 if y.shape[1] == 2 else -1, -1, -1)
    missing = torch.tensor([1.2, -0.8, -0.8], device=y.device).view(3, 1, 1)  # red
    rows = {"observation": torch.where(y[:columns, -1:] > 0, observed, missing)}
    rows |= {"sample 1": samples["x"][0], "sample 2": samples["x"][-1], "mean": samples["mean"]}
    rows |= {"std (white: 1)": 4 * samples["std"].clamp(0, 1) - 2} | ({} if x0 is None else {"truth": x0})
    rows |= {"prior": samples["prior"]}
    figure = Figure((0.9 * columns + 1.2, 0.9 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (label, images) in zip(axes, rows.items()):
        images = ((images[:columns] + 2) / 4).clamp(0, 1).permute(0, 2, 3, 1).cpu()
        for axis, image in zip(line, images):
            axis.imshow(image.expand(-1, -1, 3), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=100)


def picture_vectors(path: Path, x0: Tensor | None, samples: dict) -> None:
    """Two pairs of coordinates of the truth, the posterior samples and samples of the prior."""
    from matplotlib.figure import Figure

    figure = Figure((10, 7), layout="constrained")
    clouds = {"truth": x0, "posterior samples": samples["x"][0], "prior samples": samples["prior"]}
    for line, (i, j) in zip(figure.subplots(2, 3, sharex=True, sharey=True), ((0, 1), (2, 3))):
        for axis, (label, x) in zip(line, clouds.items()):
            axis.set(title=label, xlabel=f"x{i + 1}", ylabel=f"x{j + 1}")
            if x is not None:
                axis.plot(*x[:2000, [i, j]].T.cpu(), ".", markersize=1)
    figure.savefig(path, dpi=100)


def picture_curves(path: Path, history: list[dict]) -> None:
    """The metrics, and the loss by noise level, against the lap."""
    from matplotlib.figure import Figure

    figure = Figure((10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, keys in (
        (left, [k for k in ("psnr", "psnr_mean", "wasserstein", "to_curve", "spread") if k in history[-1]]),
        (right, [k for k in history[-1] if k.startswith("loss_")]),
    ):
        for key in keys:
            lines = [line for line in history if key in line]
            axis.plot([line["lap"] for line in lines], [line[key] for line in lines], "o-", label=key)
        axis.set_xlabel("lap")
        axis.legend()
    figure.savefig(path, dpi=100)


# ---------------------------------------------------------------------------------------------------------------------
# The run folder: config.json, checkpoint.pt, metrics.jsonl, lap_NN.png, curves.png


def save_checkpoint(folder: Path, state: State, settings: dict, y: Tensor) -> None:
    """Writes checkpoint.pt, tensors and plain types alone; a failure leaves the last one whole."""
    state.check()
    checkpoint = {
        "settings": settings, "x_shape": list(state.x0.shape[1:]), "y_shape": list(y.shape[1:]), "data": fingerprint(y),
        "lap": state.lap, "step": state.step, "drawn": state.drawn, "x0": state.x0, "losses": state.losses,
        "denoiser": state.denoiser.state_dict(), "average": state.average.state_dict(),
        "optimizer": state.optimizer.state_dict(),
    }  # fmt: skip
    temporary = folder / "checkpoint.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / "checkpoint.pt")
    except (OSError, RuntimeError) as error:  # torch.save turns some of the first into the second
        temporary.unlink(missing_ok=True)
        raise DiffEMError(f"cannot write {folder / 'checkpoint.pt'} ({error}); the last one, if any, is whole") from error


def load_checkpoint(folder: str | Path, device="cpu") -> dict:
    """The dict of `save_checkpoint`. Runs no code from the file. Raises DiffEMError where it is not a whole checkpoint."""
    path = Path(folder) / "checkpoint.pt"
    if not path.is_file():
        raise DiffEMError(f"no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        checkpoint["settings"]["seed"], checkpoint["denoiser"]["network.out.bias"]
    except Exception as error:  # junk raises many kinds
        raise DiffEMError(f"{path} is not a checkpoint of DiffEM, or is cut short") from error
    return checkpoint


def load(folder: str | Path, device="cpu", corruption: Corruption | None = None) -> Denoiser:
    """The trained model in a run folder, for `sample`. A run with a corruption of your own needs it as an argument."""
    checkpoint = load_checkpoint(folder, device)
    settings = checkpoint["settings"]
    if corruption is None:
        corruption = make_corruption(settings["corruption"], settings["parameters"], trusted=False)
    model = Denoiser(checkpoint["x_shape"], checkpoint["y_shape"], corruption, config_of(settings)).to(device)
    weights = {k.removeprefix("module."): v for k, v in checkpoint["average"].items() if k != "n_averaged"}
    model.load_state_dict(weights)
    return model.eval()


def restore_state(checkpoint: dict, y: Tensor, corruption: Corruption, config: Config) -> State:
    """The state that `save_checkpoint` saw, on y's device."""
    if checkpoint["data"] != fingerprint(y):
        raise DiffEMError("the run to resume was made with other data")
    state = new_state(checkpoint["x0"], list(y.shape[1:]), corruption, config)
    state.denoiser.load_state_dict(checkpoint["denoiser"])
    state.average.load_state_dict(checkpoint["average"])
    state.optimizer.load_state_dict(checkpoint["optimizer"])
    state.losses[:] = checkpoint["losses"]
    state.lap, state.step, state.drawn = checkpoint["lap"], checkpoint["step"], checkpoint["drawn"]
    return state


def fingerprint(y: Tensor) -> list:
    """Tells other observations from these."""
    return [list(y.shape), float(y.double().sum()), float(y[-1].double().sum())]


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def make_corruption(name: str, parameters: dict, trusted: bool = True) -> Corruption:
    """By name, or `path/to/file.py:ClassName`. That runs the file, so it must come from the user, not from a checkpoint."""
    return corruption_class(name, trusted)(**parameters)


def corruption_class(name: str, trusted: bool = True) -> type:
    if name in CORRUPTIONS:
        return CORRUPTIONS[name]
    path, colon, class_name = name.rpartition(":")
    if not colon:
        raise DiffEMError(f"unknown corruption {name!r}: {', '.join(CORRUPTIONS)}, or path/to/file.py:ClassName")
    if not trusted:
        raise DiffEMError(f"this run used a corruption of its own: give --corruption {name} once more, if you trust it")
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        cls = getattr(module, class_name)
    except Exception as error:  # anything that the user's file may raise
        raise DiffEMError(f"cannot load the corruption {name}: {type(error).__name__}: {error}") from error
    if not (inspect.isclass(cls) and issubclass(cls, Corruption)):
        raise DiffEMError(f"{name} is not a subclass of diffem.Corruption")
    return cls


def parameters_of(cls: type) -> dict:
    """The arguments of a corruption with their defaults."""
    return {name: p.default for name, p in inspect.signature(cls).parameters.items() if p.default is not p.empty}


def config_of(settings: dict) -> Config:
    return Config(**{f.name: settings[f.name] for f in fields(Config)})


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise DiffEMError(message)


def parse(argv: list[str]) -> tuple[dict, argparse.Namespace]:
    """The settings of a run, all that config.json keeps, and the flags of this start alone (resume, name, device, ...).

    A flag not given has the value of the run to resume; else of the data set's preset; else its default.
    """
    first = Parser(add_help=False, allow_abbrev=False)
    for flag in ("--dataset", "--preset", "--corruption", "--resume", "--device"):
        first.add_argument(flag)
    given, _ = first.parse_known_args(argv)
    device = pick_device(given.device or "auto")
    saved = load_checkpoint(given.resume)["settings"] if given.resume else {}
    dataset = saved.get("dataset") or given.dataset or "digits"
    if dataset not in DATASETS:
        raise DiffEMError(f"unknown data set {dataset!r}: {', '.join(DATASETS)}")
    preset = saved.get("preset") or given.preset
    if not preset:
        preset = "published" if device == "cuda" and (dataset, "published") in PRESETS else "small"
    if (dataset, preset) not in PRESETS:
        raise DiffEMError(f"{dataset} has the presets {', '.join(p for d, p in PRESETS if d == dataset)}, not {preset!r}")
    values = PRESETS[dataset, preset] | saved
    corruption = given.corruption or values.get("corruption", "mask")
    if saved:
        corruption_class(corruption, trusted=bool(given.corruption))
    parameters = parameters_of(corruption_class(corruption))
    values |= saved.get("parameters", {}) | dict(dataset=dataset, preset=preset, corruption=corruption)

    options = make_parser(values, parameters).parse_args(argv)
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(options).items()}
    for name in ("name", "resume", "device", "dry_run"):
        del settings[name]
    settings["parameters"] = {name: settings.pop(name) for name in parameters}
    for key in saved.keys() - {"laps", "data_dir"}:
        if settings[key] != saved[key]:
            raise DiffEMError(f"{given.resume} was made with {key} {saved[key]}, not {settings[key]}")
    options.device = device
    return settings, options


def make_parser(values: dict, parameters: dict) -> Parser:
    """values: defaults that replace those below; parameters: the corruption's arguments and their defaults."""
    parser = Parser(
        description="DiffEM: learn to restore images, and a model of the clean ones, from corrupted images alone.",
        epilog="The defaults shown are those of --dataset, --preset and --corruption: give them with --help to see others. "
        "Corruptions: " + "; ".join(f"{n} {describe(parameters_of(c))}" for n, c in CORRUPTIONS.items()),
        formatter_class=lambda prog: argparse.ArgumentDefaultsHelpFormatter(prog, max_help_position=32, width=110),
        allow_abbrev=False,
    )

    def add(group, name: str, default, help: str, **kind) -> None:
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif isinstance(default, tuple):
            kind = {"type": int, "nargs": "*"}
        kind = kind or {"type": type(default)}
        group.add_argument("--" + name.replace("_", "-"), default=values.get(name, default), help=help, **kind)

    group = parser.add_argument_group("data")
    add(group, "dataset", "digits", "one of: " + ", ".join(DATASETS))
    add(group, "preset", "small", "published: the paper's settings, the default on a GPU; small: for a CPU")
    add(group, "data_dir", "data", "where data sets are kept; of folder: the images, at any depth")
    add(group, "image_size", None, "of folder: crop the centre square and resize it to this", type=int)
    add(group, "grey", False, "of folder: read images as grey")
    add(group, "skip_bad_images", False, "of folder: go on without images that cannot be read")
    add(group, "limit", None, "train on so many images", type=int)
    add(group, "held_out", 256, "images held out for the metrics")
    group = parser.add_argument_group("corruption")
    add(group, "corruption", "mask", "one of the list below, or path/to/file.py:ClassName")
    for name, default in parameters.items():
        add(group, name, default, f"of {values['corruption']}")
    group = parser.add_argument_group("method")
    for f in fields(Config):
        add(group, f.name, f.default, f.metadata["help"])
    add(group, "samples", 8, "posterior samples of each held-out image, for the mean and the spread")
    group = parser.add_argument_group("run")
    group.add_argument("--name", help="folder below runs/; if not given, from data set, corruption and a number")
    group.add_argument("--resume", metavar="runs/NAME", help="go on with this run; it may be given more --laps")
    group.add_argument("--device", default="auto", help="auto, cpu or cuda")
    group.add_argument("--dry-run", action="store_true", help="print settings, size and cost, and stop")
    return parser


def describe(parameters: dict) -> str:
    return "(" + ", ".join(f"{name}={value}" for name, value in parameters.items()) + ")"


def pick_device(name: str) -> str:
    if name not in ("auto", "cpu", "cuda"):
        raise DiffEMError(f"unknown device {name!r}: auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise DiffEMError("no CUDA device can be used here: --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def cost_of(settings: dict, corruption: Corruption, x_shape: list, number: int) -> dict:
    """Parameters, floating point operations and bytes of a run on `number` observations, found on tensors without data."""
    from torch.utils.flop_counter import FlopCounterMode

    config, saved = config_of(settings), []
    y_shape = list(corruption(torch.zeros(1, *x_shape), torch.Generator()).shape[1:])
    with torch.device("meta"):
        denoiser = Denoiser(x_shape, y_shape, corruption, config)
        batch = [torch.zeros(2, *x_shape), torch.ones(2), torch.zeros(2, *y_shape)]
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            denoiser(*batch)
    parameters, flops = sum(p.numel() for p in denoiser.parameters()), counter.get_total_flops() / 2
    # a step costs 3 evaluations: one forward, two backward
    evaluations = config.laps * (3 * config.steps * config.batch + number * config.sample_steps)
    weights = 5 * parameters  # with gradient, average, and Adam's two moments
    data = number * (math.prod(x_shape) + math.prod(y_shape))
    activations = config.batch * (sum(saved) - parameters) / 2
    return {
        "parameters": parameters, "evaluations": evaluations, "flops": evaluations * flops,
        "bytes": 4 * (weights + data + activations),
    }  # fmt: skip


def hours_here(flops: float) -> float:
    """At the rate of a matrix product on this machine's CPU: a bound from below."""
    a = torch.randn(1024, 1024)
    a @ a
    start = time.perf_counter()
    for _ in range(5):
        a @ a
    return flops / (5 * 2 * 1024**3 / (time.perf_counter() - start)) / 3600


def shape_and_number(settings: dict) -> tuple[list, int]:
    """Of the clean images that a run trains on, without reading them all."""
    if settings["dataset"] == "folder":
        files = image_files(settings["data_dir"])
        shape = list(read_images(files[:1], settings["image_size"], settings["grey"], skip_bad=False).shape[1:])
        number = len(files) - settings["held_out"]
    else:
        shape, number = SHAPES[settings["dataset"]]
    return shape, min(number, settings["limit"] or number)


def check_settings(settings: dict, corruption: Corruption) -> None:
    """What no single flag can tell."""
    vectors = settings["dataset"] == "manifold"
    if vectors != isinstance(corruption, Projection):
        raise DiffEMError("the corruption of the manifold is projection, and it is for nothing else")
    if settings["dataset"] != "folder" and (settings["image_size"] or settings["grey"] or settings["skip_bad_images"]):
        raise DiffEMError("--image-size, --grey and --skip-bad-images go with --dataset folder")
    for key in ("laps", "steps", "batch", "sample_steps", "sample_batch", "held_out", "prior_rank", "prior_laps"):
        at_least(key, settings[key], 1)
    at_least("samples", settings["samples"], 2)
    for key in ("blank", "dropout", "ema"):
        fraction(key, settings[key])
    for key in ("lr", "clip", "sigma_min"):
        above(key, settings[key], 0)
    above("sigma_max", settings["sigma_max"], settings["sigma_min"])
    if settings["method"] not in ("ddpm", "ddim"):
        raise DiffEMError(f"unknown method {settings['method']!r}: ddpm or ddim")


def new_folder(name: str | None, settings: dict) -> Path:
    """runs/NAME, which must not exist; without a name, the first free number."""
    stem = f"{settings['dataset']}-{Path(settings['corruption'].rpartition(':')[0]).stem or settings['corruption']}"
    number = 1
    while name is None and Path("runs", f"{stem}-{number}").exists():
        number += 1
    folder = Path("runs", name or f"{stem}-{number}")
    if folder.exists():
        raise DiffEMError(f"{folder} exists: choose another --name, or go on with it by --resume {folder}")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    return folder


@contextmanager
def stop_signals():
    """A list that a first Ctrl-C (or SIGTERM) adds to, so that a run can stop between two steps; a second one kills."""
    received = []

    def handler(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        print("\nstopping after this step ...", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def report(state: State, y: Tensor, x0: Tensor | None, corruption: Corruption, settings: dict, folder: Path, history: list):
    """Adds a lap's metrics to `history` and the run folder, draws its pictures, and returns its line."""
    metrics, samples = evaluate(state, y, x0, corruption, settings)
    if state.lap:
        metrics = {"loss": float(state.losses.mean())} | metrics
    history.append({"lap": state.lap} | {k: round(v, 5) for k, v in metrics.items()})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    picture = folder / f"lap_{state.lap:02d}.png"
    if y.ndim == 4:
        picture_images(picture, y, x0, samples, corruption)
    else:
        picture_vectors(picture, x0, samples)
    picture_curves(folder / "curves.png", history)
    return f"lap {state.lap}/{settings['laps']}  " + "  ".join(
        f"{name} {value:.3g}" if abs(value) < 10 else f"{name} {value:.2f}"
        for name, value in metrics.items() if not name.startswith("loss_")
    )  # fmt: skip


def train(y: Tensor, held_out: tuple, corruption: Corruption, settings: dict, folder: Path, state: State | None) -> int:
    """EM with a progress bar, a report a lap, a checkpoint a lap and every three minutes. Returns the exit code.

    held_out: observations for the metrics, and their truth or None.
    """
    config, history = config_of(settings), []
    if state:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        history = [line for line in map(json.loads, lines) if line["lap"] < state.lap + (state.drawn == len(y))]
    lap_work = 3 * config.steps * config.batch + len(y) * config.sample_steps

    def work(state: State) -> int:
        done = 3 * state.step * config.batch + state.drawn * config.sample_steps
        return (state.lap - 1) * lap_work + done if state.lap else 0

    saved = time.monotonic()
    bar = tqdm(total=config.laps * lap_work, unit="eval", unit_scale=True, disable=None, initial=work(state) if state else 0)
    with bar, stop_signals() as stop:
        for state in em(y, corruption, config, state):
            bar.update(work(state) - bar.n)
            if state.step % 20 == 0 and 0 < state.step < config.steps:
                bar.set_postfix(lap=state.lap, loss=f"{state.losses[state.step - 20 : state.step].mean():.3f}")
            if state.drawn == len(y):
                bar.write(report(state, *held_out, corruption, settings, folder, history))
            if stop or state.drawn == len(y) or time.monotonic() - saved > 180:
                save_checkpoint(folder, state, settings, y)
                saved = time.monotonic()
            if stop:
                bar.write(f"stopped in lap {state.lap}; go on with: python diffem.py --resume {folder}")
                return 130
    first, last = history[0], history[-1]
    if "psnr_mean" in last:
        print(f"PSNR of the posterior mean: {first['psnr_mean']:.2f} dB by the Gaussian prior, {last['psnr_mean']:.2f} dB "
              f"by lap {last['lap']} ({last['psnr_mean'] - first['psnr_mean']:+.2f} dB)")  # fmt: skip
    print(f"look at {folder / 'lap_{:02d}.png'.format(last['lap'])} and {folder / 'curves.png'}")
    return 0


def run(argv: list[str]) -> int:
    settings, options = parse(argv)
    corruption = make_corruption(settings["corruption"], settings["parameters"])
    check_settings(settings, corruption)
    config, dataset = config_of(settings), settings["dataset"]
    if options.dry_run:
        shape, number = shape_and_number(settings)
        cost = cost_of(settings, corruption, shape, number)
        print(json.dumps(settings, indent=1))
        print(f"{number} observations of {'x'.join(map(str, shape))}, {cost['parameters'] / 1e6:.2f} M parameters")
        print(f"{config.laps} laps of {config.steps} steps and {number} x {config.sample_steps} evaluations: "
              f"{cost['flops'] / 1e15:.3g} PFLOP in all, about {cost['bytes'] / 2**30:.2f} GiB")  # fmt: skip
        return 0
    if (dataset, "published") in PRESETS and settings["preset"] == "small" and options.device == "cpu":
        published, _ = parse(argv + ["--preset", "published", "--device", "cpu"])
        hours = hours_here(cost_of(published, corruption, *shape_and_number(published))["flops"])
        print(f"no GPU: the small preset; the published one (--preset published) would take {hours / 24:.0f} days or more here")
    x0, x0_held_out = load_data(settings)
    generator = generator_for(options.device, config.seed, 0, 0)
    y, y_held_out = (corrupt(x.to(options.device), corruption.to(options.device), generator) for x in (x0, x0_held_out))
    if not y.isfinite().all():
        raise DiffEMError(f"the corruption {settings['corruption']} gives values that are not finite")
    del x0  # nobody sees it from here on
    state, folder = None, Path(options.resume or "")
    if options.resume:
        state = restore_state(load_checkpoint(folder, options.device), y, corruption, config)
        (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    else:
        folder = new_folder(options.name, settings)
    print(f"{folder}: {len(y)} observations, {settings['corruption']} {describe(settings['parameters'])}, {options.device}")
    return train(y, (y_held_out, x0_held_out.to(options.device)), corruption, settings, folder, state)


def main(argv: list[str] | None = None) -> int:
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except (DiffEMError, OSError) as error:
        print(f"diffem: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.modules["diffem"] = sys.modules["__main__"]  # for a user's own corruption, which imports from it
    sys.exit(main())
