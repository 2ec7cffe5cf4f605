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
    laps: int = setting(8, "EM iterations")
    steps: int = setting(200, "optimiser steps a lap")
    batch: int = setting(256, "images a step")
    lr: float = setting(2e-3, "learning rate of Adam")
    clip: float = setting(1.0, "largest norm of the gradient")
    ema: float = setting(0.99, "decay of the moving average of the weights, which the E-step uses")
    blank: float = setting(0.1, "share of the M-step's observations that are blanked, to learn the prior")
    flip: bool = setting(False, "mirror images at random in the M-step")
    jitter: bool = setting(False, "change hue and saturation slightly in the M-step")
    method: str = setting("ddpm", "sampler: ddpm or ddim")
    sample_steps: int = setting(32, "network evaluations to sample an image")
    sample_batch: int = setting(512, "images sampled at once")
    prior_rank: int = setting(32, "rank of the Gaussian prior's covariance")
    prior_laps: int = setting(32, "EM iterations of the Gaussian prior")
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
