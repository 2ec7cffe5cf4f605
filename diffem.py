"""DiffEM: learn to restore images, and a model of the clean ones, from corrupted images alone.

After Hosseintabar et al., "DiffEM: Learning from Corrupted Data with Diffusion Models via Expectation Maximization",
arXiv 2510.12691. Clean images x0 ~ p* are never seen, only y ~ Q(y | x0) for a known corruption Q. A conditional
diffusion model q(x0 | y) is trained and sampled in turn:

    X(0)_i ~ p0(x0 | y_i)                        p0: a smooth Gaussian, fitted to the observations by EM
    for lap = 1 .. laps:
        M-step   theta <- argmin E_{x0 in X(lap-1)} E_{y ~ Q(.|x0)} E_{sigma, eps}
                              lambda(sigma) || D_theta(x0 + sigma eps, sigma, y) - x0 ||^2              (Eq. 10)
        E-step   X(lap)_i ~ q_theta(x0 | y_i)    by diffusion, from sigma_max down to sigma_min

The real observations y_i enter in the E-step alone; in the M-step y is drawn afresh from Q for every batch.

    python diffem.py                        # 8x8 digits, half of the pixels missing: minutes on a laptop's CPU
    python diffem.py --dataset cifar10      # the paper's experiment (without a GPU, a small version of it)
    python diffem.py --observations FOLDER  # corrupted images of your own
    torchrun --nproc-per-node=8 diffem.py --dataset cifar10
    python diffem.py --help

Symbols   x0 clean, xt = x0 + sigma eps noisy, y observation, sigma noise level, eps ~ N(0, 1), D denoiser, A the forward
          map of the corruption, s the standard deviation of the observation's noise, lap one EM iteration
Shapes    images x (B, C, H, W), values in [-2, 2] from black to white, so that their standard deviation is near 1, with
          y (B, C + 1, H, W): the measurement, and a last channel that is 1 where something was observed.
          y = 0 everywhere means that nothing was observed: the model then samples the prior.
"""

import argparse
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

# Pillow, matplotlib, torchvision and scikit-learn are imported where they are used: the method needs none of them, and
# together they would double the time of `import diffem`.


class DiffEMError(ValueError):
    """Something that the user can mend. The command line prints it as one line and exits with code 2."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise DiffEMError(message)


# ---- Settings of the method, randomness, processes ------------------------------------------------------------------


def setting(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """What `fit` must know besides the observations and the corruption. Each field is also a flag of the command line."""

    channels: tuple = setting((32, 64), "width of each level of the U-Net, or of each hidden layer of the MLP")
    blocks: int = setting(1, "residual blocks a level and side of the U-Net")
    attention: tuple = setting((), "levels of the U-Net with self-attention, 0 the finest")
    heads: int = setting(4, "attention heads")
    dropout: float = setting(0.0, "dropout in the residual blocks")
    sigma_min: float = setting(1e-3, "lowest noise level")
    sigma_max: float = setting(1e2, "highest noise level")
    laps: int = setting(6, "EM iterations")
    steps: int = setting(400, "optimiser steps a lap")
    batch: int = setting(64, "images a step")
    lr: float = setting(1e-3, "learning rate of Adam; it falls to 0 over the second half of the laps")
    clip: float = setting(1.0, "largest norm of the gradient")
    precision: str = setting("auto", "of the U-Net: float32, bfloat16, or auto, bfloat16 where the hardware computes in it")
    compile: str = setting("auto", "torch.compile the network: on, off, or auto, on where it runs on a GPU")
    ema: float = setting(0.99, "decay of the moving average of the weights, from which the E-step samples")
    blank: float = setting(0.1, "share of the M-step's observations that are blanked, to learn the prior")
    flip: bool = setting(False, "mirror images at random in the M-step")
    jitter: bool = setting(False, "change hue and saturation slightly in the M-step")
    crop: int = setting(0, "learn from squares of so many pixels a side at random places, in the M-step; 0: whole images")
    rescale: bool = setting(False, "learn from smaller copies too, by a factor down to 1/2, in the M-step; for blur, downsample and "
                            "jpeg the default is True where smoothness is not 0")  # fmt: skip
    method: str = setting("sde2m", "sampler: ddpm, ddim, sde2m or dpm2m")
    first_method: str = setting("ddpm", "that of the E-steps in the first half of the laps")
    sample_steps: int = setting(8, "network evaluations to sample an image")
    first_sample_steps: int = setting(16, "those of the first half of the laps, growing to sample_steps if below it; 0: as many")
    sample_batch: int = setting(512, "images sampled at once; halved where they do not fit into memory")
    prior_steps: int = setting(32, "network evaluations to sample a new image, of the prior")
    smoothness: float = setting(0.0, "of the Gaussian that EM starts from: the power by which variance falls with the frequency, 3 "
                                "for photographs, fitted from there on; 0: white noise and a low rank, as published")  # fmt: skip
    prior_rank: int = setting(32, "rank of that Gaussian's covariance, where smoothness is 0")
    prior_laps: int = setting(8, "EM iterations of that Gaussian")
    preconditioning: str = setting("gaussian", "what the network starts from: gaussian, the posterior given y under a smooth Gaussian; "
                                   "edm, as published")  # fmt: skip
    seed: int = setting(0, "seed of everything random")

    def __post_init__(self):
        self.channels, self.attention = tuple(self.channels), tuple(self.attention)
        require(len(self.channels) > 0 and min(self.channels) > 0, "channels must be positive")
        for name in ("blocks", "heads", "laps", "steps", "batch", "sample_steps", "sample_batch", "prior_steps", "prior_rank",
                     "prior_laps"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        require(0 <= self.blank <= 1, f"blank must be in [0, 1], not {self.blank}")
        for name in ("dropout", "ema"):
            require(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1), not {getattr(self, name)}")
        require(self.lr > 0 and self.clip > 0, "lr and clip must be above 0")
        require(self.precision in ("auto", "float32", "bfloat16"), f"unknown precision {self.precision}: auto, float32, bfloat16")
        require(self.preconditioning in ("gaussian", "edm"), f"unknown preconditioning {self.preconditioning}: gaussian, edm")
        require(self.smoothness >= 0 and self.crop >= 0, "smoothness and crop must not be negative")
        require(self.compile in ("auto", "on", "off"), f"unknown compile {self.compile}: auto, on, off")
        require(0 < self.sigma_min < self.sigma_max, "sigma_min must be above 0 and below sigma_max")
        for method in (self.method, self.first_method):
            sampler(method, self.sample_steps, self.sigma_min, self.sigma_max)  # raises where there is no such method
        require(self.first_sample_steps >= 0, f"first_sample_steps must not be negative, as is {self.first_sample_steps}")
        require(self.seed >= 0, f"seed must not be negative, as is {self.seed}")
        levels = range(len(self.channels))
        odd = [i for i in self.attention if i not in levels or self.channels[i] % self.heads]
        require(not odd, f"attention at {odd} needs levels in 0 to {levels[-1]}, of channels that {self.heads} heads divide")

    def learning_rate(self, lap: int, step: int) -> float:
        """Constant, then falling to 0: once EM has come near, what is left is the noise of the weights."""
        return self.lr * min(1, 2 - 2 * (lap - 1 + step / self.steps) / self.laps)

    def bfloat16(self, device: torch.device) -> bool:
        """Does the U-Net compute in bfloat16 there? The weights, and all outside of it, stay float32."""
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return self.precision == "bfloat16" or self.precision == "auto" and fast

    def e_step_sampler(self, lap: int) -> tuple[int, str]:
        """Evaluations of the network for an image, and method, in the E-step of a lap from 1 on. Draws of ddpm by few steps lie
        too close together. In the first half of the laps that makes up for the lag of EM, which is the slower the more is
        missing: an over-relaxed EM. It must end by honest draws, or it takes its own for too certain."""
        if lap > self.laps / 2:
            return self.sample_steps, self.method
        first = self.first_sample_steps or self.sample_steps
        growing = first * (self.sample_steps / first) ** (2 * (lap - 1) / self.laps)
        return round(max(first, growing)), self.first_method


def generator_for(device, *key: int) -> torch.Generator:
    """A generator seeded by integers such as (seed, lap, step): a run can go on from any step with no state stored."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)
    return torch.Generator(device).manual_seed(int(seed))


def ranks() -> tuple[int, int]:
    """The number of this process, and how many share the work: (0, 1) but under torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


@contextmanager
def torch_seeded_by(generator: torch.Generator):
    """For what draws from torch's global generator alone (initial weights, dropout, torch.svd_lowrank): seeds it, and
    puts it back afterwards. Seed + 1, lest dropout repeat the generator's own draws."""
    with torch.random.fork_rng([generator.device] if generator.device.type == "cuda" else []):
        torch.manual_seed(generator.initial_seed() + 1)
        yield


def randn_like(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator, device=x.device)


# ---- Corruptions y ~ Q(. | x0) --------------------------------------------------------------------------------------
#
# y = m (A x + s eps), m a mask. Each corruption has an orthonormal basis T, in which what y says of x is (nearly) diagonal:
# of each coefficient t of T x a precision w >= 0 and a product h, log p(y | x) = sum (h t - w t^2 / 2) + const.
# T turns colours by O, then takes the DCT of each block of n x n pixels: 1 (none), 8 (JPEG), or the whole image.


def fractions(size: int, device: torch.device) -> Tensor:
    """(size,): 0, 1 / size, 2 / size, .. (divided by a tensor, since ONNX would take no number that depends on an input's size)."""
    i = torch.arange(size, device=device)
    return i / (i[-1:] + 1)


def dct(block: int, size: int, device: torch.device) -> Tensor:
    """(size, size), orthonormal: DCT-II matrices of `block` (0: size) along the diagonal, the last one smaller where it must."""
    i = torch.arange(size, device=device)
    k = i % block if block > 0 else i  # the place within the block, and the frequency
    n = i[-1:] + 1 - i + k
    n = (n.clamp_max(block) if block > 0 else n)[:, None]
    # D_ki = sqrt(2 / n) cos(pi k (i + 1/2) / n), and sqrt(1 / n) where k = 0
    D = ((1 + (k > 0).float()[:, None]) / n).sqrt() * torch.cos(math.pi * k[:, None] * (k + 0.5) / n)
    return D * ((i - k)[:, None] == i - k)


def opponent(channels: int, device: torch.device) -> Tensor:
    """O, orthonormal: grey, red - blue and red - 2 green + blue, each of length 1; of other channels than 3 the identity."""
    if channels != 3:
        return torch.eye(channels, device=device)
    rows = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]], device=device)
    return rows / rows.square().sum(1, keepdim=True).sqrt()


def transform(x: Tensor, block: int) -> Tensor:
    """T x = D_H (O x) D_W^T, (B, C, H, W) -> (B, C, H, W)."""
    t = (opponent(x.shape[1], x.device) @ x.flatten(2)).view(x.shape)
    if block == 1:
        return t
    return dct(block, x.shape[-2], x.device) @ t @ dct(block, x.shape[-1], x.device).T


def inverse(t: Tensor, block: int) -> Tensor:
    """T^T t."""
    if block != 1:
        t = dct(block, t.shape[-2], t.device).T @ t @ dct(block, t.shape[-1], t.device)
    return (opponent(t.shape[1], t.device).T @ t.flatten(2)).view(t.shape)


class Corruption(nn.Module):
    """The known law y ~ Q(. | x0): the one object that corrupts, in the data set, the M-step and every metric.

    A subclass gives `A` if it is not the identity, and `mask` if it hides pixels; one of your own needs no more. Its arguments
    are numbers with defaults, kept under the same names, and become flags. It has no trainable parameters.

    What y says of x, w and h, EM starts from and so does the network, which need not learn it then. They are measured, in the
    basis that `block` names, unless a subclass of `Linear` gives `precision`. They need not be exact.
    """

    __constants__ = ["noise", "block"]
    noise = 0.0  # s
    block = 1  # n, the side of the blocks of T; 0: the whole image
    masks = None  # (K, 1, H, W), where there are observed ones to draw from in place of `mask`
    cell = 1  # side of the squares of pixels that are measured together

    def __init__(self):
        super().__init__()
        self.register_buffer("w", torch.zeros(1, 1, 1))  # (C, n, n), as `learn` finds them: w, and h / T y
        self.register_buffer("gain", torch.zeros(1, 1, 1))

    def hides(self) -> bool:
        """Can values be missing, different ones in each image?"""
        return self.masks is not None or type(self).mask is not Corruption.mask

    def mask(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """(B, C, H, W) -> (B, 1, H, W): 1 where something is observed, 0 elsewhere."""
        return torch.ones_like(x[:, :1])

    def A(self, x: Tensor) -> Tensor:
        """What is measured of x, before noise and mask: (B, C, H, W) in [-2, 2] -> (B, C, H, W)."""
        return x

    def eps(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The observation's noise, each value of variance 1."""
        return randn_like(x, generator)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """y ~ Q(. | x): (B, C, H, W) -> (B, C + 1, H, W)."""
        if self.masks is None:
            return self.observe(x, self.mask(x, generator), generator)
        drawn = torch.randint(len(self.masks), (len(x),), generator=generator, device=x.device)
        return self.observe(x, self.masks[drawn].to(x.dtype), generator)

    def observe(self, x: Tensor, m: Tensor, generator: torch.Generator) -> Tensor:
        """y = m (A x + s eps), and beside it m (B, 1, H, W)."""
        value = self.A(x)
        return torch.cat([m * (value + self.noise * self.eps(x, generator) if self.noise else value), m], 1)

    def T(self, x: Tensor) -> Tensor:
        return transform(x, self.block)

    def precision(self, y: Tensor) -> Tensor:
        """w: (B, C + 1, H, W) -> (B, C, H, W)."""
        return tiled(self.w, y)

    def product(self, y: Tensor) -> Tensor:
        """h: (B, C + 1, H, W) -> (B, C, H, W)."""
        return tiled(self.gain, y) * self.T(y[:, :-1])

    def learn(self, x: Tensor, generator: torch.Generator) -> None:
        """w and h by measurement, for each colour and each coefficient of a block, on images x (N, C, H, W) like the clean ones."""
        (N, C, H, W), n = x.shape, max(1, self.block)
        require(min(H, W) >= n, f"{H}x{W} pixels are less than a block of {n}x{n}")
        x = x[..., : H // n * n, : W // n * n].clamp(-2, 2)
        t, u = self.T(x), self.T(self.A(x) + self.noise * self.eps(x, generator))
        # The best linear estimate of t from u is  E[t u] / E[u^2] u,  of error  E[t^2] - E[t u]^2 / E[u^2] = 1 / (1 / E[t^2] + w)
        tt, tu, uu = [v.view(N, C, H // n, n, W // n, n).mean((0, 2, 4)).clamp_min(1e-9) for v in (t * t, t * u, u * u)]
        precision = 1 / (tt - tu**2 / uu).clamp_min(1e-6)
        self.w, self.gain = (precision - 1 / tt).clamp_min(0), precision * tu / uu


class Linear(Corruption):
    """A corruption of which w is known, diag T A^T A T^T / s^2, and h = w T y, as where A keeps what it measures."""

    def product(self, y: Tensor) -> Tensor:
        return self.precision(y) * self.T(y[:, :-1])

    def learn(self, x: Tensor, generator: torch.Generator) -> None:
        pass


def tiled(table: Tensor, y: Tensor) -> Tensor:
    """table (C, n, n), of each block of n x n values: (B, C, H, W), and 0 where y is masked."""
    i, j = [torch.arange(n, device=y.device) % table.shape[-1] for n in y.shape[-2:]]
    return (y[:, -1:] * table[:, i][:, :, j]).expand_as(y[:, :-1])


def complete(y: Tensor) -> Tensor:
    """(B, 1, 1, 1): 1 where nothing of an observation is hidden, else 0."""
    return y[:, -1:].amin((2, 3), keepdim=True)


def variance(noise: float) -> float:
    """s^2, no less than 1e-6: beyond that float32 could no longer add w to what a Gaussian knows."""
    return max(noise**2, 1e-6)


class Mask(Linear):
    """Pixels missing independently with probability `rate`: y = m (x + s eps)."""

    def __init__(self, rate: float = 0.75, noise: float = 1e-3):
        super().__init__()
        require(0 <= rate < 1 and noise >= 0, f"rate must be in [0, 1) and noise at least 0, not {rate:g} and {noise:g}")
        self.rate, self.noise = rate, noise

    def mask(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return (torch.rand(x[:, :1].shape, generator=generator, device=x.device) >= self.rate).to(x.dtype)

    def precision(self, y: Tensor) -> Tensor:
        return (y[:, -1:] / variance(self.noise)).expand_as(y[:, :-1])


class Block(Mask):
    """Rectangles and stripes missing, one after another until `rate` of the pixels are."""

    def __init__(self, rate: float = 0.5, noise: float = 1e-3):
        super().__init__(rate, noise)

    def mask(self, x: Tensor, generator: torch.Generator) -> Tensor:
        (B, _, H, W), shapes = x.shape, 24
        kind, height, width, top, left = torch.rand(5, B, shapes, 1, generator=generator, device=x.device)
        # Half sides as shares of the image's: a third each rectangles, horizontal stripes and vertical stripes
        height = torch.where(kind < 1 / 3, 0.02 + 0.06 * height, 0.08 + 0.17 * height) + (kind > 2 / 3)
        width = torch.where(kind > 2 / 3, 0.02 + 0.06 * width, 0.08 + 0.17 * width) + (kind < 1 / 3)
        rows = ((torch.arange(H, device=x.device) + 0.5) / H - top).abs() < height  # (B, shapes, H)
        columns = ((torch.arange(W, device=x.device) + 0.5) / W - left).abs() < width  # (B, shapes, W)
        inside = rows[..., :, None] & columns[..., None, :]
        # The rank of a pixel: by the first shape that covers it, then in reading order
        first = torch.where(inside.any(1), inside.int().argmax(1), shapes).flatten(1)  # (B, H W)
        rank = first.argsort(dim=1, stable=True).argsort(dim=1)
        return (rank >= round(self.rate * H * W)).to(x.dtype).view(B, 1, H, W)


class Noise(Linear):
    """White noise: y = x + s eps."""

    block = 0

    def __init__(self, noise: float = 0.5):
        super().__init__()
        require(noise >= 0, f"noise must be at least 0, not {noise:g}")
        self.noise = noise

    def precision(self, y: Tensor) -> Tensor:
        return (complete(y) / variance(self.noise)).expand_as(y[:, :-1])


class Blur(Linear):
    """Gaussian blur of standard deviation `width` pixels, mirrored at the image's edge (d c b a | a b c d): y = K x + s eps.

    The DCT makes K diagonal. float32 is enough for s of 1e-3 and more: w is 1e6 at most, and where K all but removes a
    frequency w is below what the Gaussian knows of it, whatever its error. A smaller s counts as 1e-3 in w.
    """

    block = 0

    def __init__(self, width: float = 1.5, noise: float = 0.02):
        super().__init__()
        require(width > 0 and noise >= 0, f"width must be above 0 and noise at least 0, not {width:g} and {noise:g}")
        self.width, self.noise = width, noise

    def transfer(self, y: Tensor) -> Tensor:
        """(H, W): the factor by which the blur multiplies each coefficient."""
        radius = int(4 * self.width + 0.5)  # as scipy.ndimage cuts it
        r = torch.arange(-radius, radius + 1, device=y.device)
        kernel = torch.exp(-0.5 * (r / self.width) ** 2)
        # k_i = sum_r kernel_r cos(pi i r / n)
        H, W = [torch.cos(math.pi * fractions(n, y.device)[:, None] * r) @ kernel / kernel.sum() for n in y.shape[-2:]]
        return H[:, None] * W

    def A(self, x: Tensor) -> Tensor:
        return inverse(self.transfer(x) * self.T(x), 0)

    def precision(self, y: Tensor) -> Tensor:
        return (complete(y) * self.transfer(y) ** 2 / variance(self.noise)).expand_as(y[:, :-1])

    def product(self, y: Tensor) -> Tensor:
        return complete(y) * self.transfer(y) / variance(self.noise) * self.T(y[:, :-1])


class Downsample(Linear):
    """Means of factor x factor pixels, with noise, repeated to the image's own size: y = R (M x + s eps)."""

    def __init__(self, factor: int = 2, noise: float = 0.01):
        super().__init__()
        require(factor >= 1 and noise >= 0, f"factor must be at least 1 and noise 0, not {factor} and {noise:g}")
        self.factor, self.cell, self.block, self.noise = factor, factor, factor, noise

    def A(self, x: Tensor) -> Tensor:
        H, W = x.shape[-2:]
        require(H % self.factor == W % self.factor == 0, f"{H}x{W} pixels cannot be downsampled by {self.factor}")
        return F.interpolate(F.avg_pool2d(x, self.factor), size=(H, W), mode="nearest")

    def eps(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return self.factor * self.A(randn_like(x, generator))

    def precision(self, y: Tensor) -> Tensor:
        # A block's first coefficient is its mean times factor
        i, j = [torch.arange(n, device=y.device) % self.factor == 0 for n in y.shape[-2:]]
        return (y[:, -1:] * (i[:, None] & j) / (self.factor**2 * variance(self.noise))).expand_as(y[:, :-1])


class Jpeg(Corruption):
    """JPEG, as libjpeg writes and reads it, of `quality` 1 to 100, or by the quantisation `tables` of a file: 64 numbers for
    grey images, 128 for colour. subsampling: of the chroma, 0 none (4:4:4), 1 across (4:2:2), 2 both ways (4:2:0)."""

    block, cell = 8, 8
    # The left half of libjpeg's DCT matrix, times 8192 sqrt(8)
    DCT = [[8192, 8192, 8192, 8192], [11363, 9633, 6437, 2260], [10703, 4433, -4433, -10703], [9633, -2259, -11362, -6436],
           [8192, -8192, -8192, 8192], [6437, -11362, 2261, 9633], [4433, -10704, 10704, -4433], [2260, -6436, 9633, -11363]]  # fmt: skip
    YCC = [[19595, 38470, 7471], [-11059, -21709, 32768], [32768, -27439, -5329]]  # its colours, times 65536
    RGB = [[65536, 0, 91881], [65536, -22554, -46802], [65536, 116130, 0]]

    def __init__(self, quality: int = 20, subsampling: int = 0, tables: tuple = ()):
        super().__init__()
        require(1 <= quality <= 100 and 0 <= subsampling <= 2, "jpeg takes quality 1 to 100 and subsampling 0 to 2, not "
                f"{quality:g} and {subsampling:g}")  # fmt: skip
        require(len(tables) in (0, 64, 128) and all(1 <= q <= 255 for q in tables), "tables takes 64 or 128 numbers, 1 to 255")
        self.quality, self.subsampling, self.tables = quality, subsampling, tuple(tables)
        q = torch.tensor(tables or standard_tables(quality)).float().view(-1, 8, 8)[[0, -1, -1]]
        self.register_buffer("q", q, persistent=False)  # (3, 8, 8) of Y, Cb and Cr, in grey levels

    def A(self, x: Tensor) -> Tensor:
        require(x.shape[1] in (1, 3), f"jpeg takes images of 1 or 3 channels, not {x.shape[1]}")
        pixels = ((x + 2) * (255 / 4)).clamp(0, 255).round()
        if x.shape[1] == 1:
            return (self.quantised(pixels - 128, self.q[:1]) + 128) * (4 / 255) - 2
        ycc = self.mixed(self.YCC, pixels, [32768, 32767, 32767])  # Cb and Cr about 0
        Y, chroma = self.quantised(ycc[:, :1] - 128, self.q[:1]) + 128, ycc[:, 1:]
        (H, W), step = x.shape[-2:], [2 if self.subsampling == 2 else 1, 2 if self.subsampling else 1]
        if self.subsampling:
            # libjpeg's halves go down and up by turns
            chroma = F.avg_pool2d(F.pad(chroma, [0, -W % 16, 0, -H % 16], mode="replicate"), step)
            chroma = self.by_turns(chroma, 0.25, 0.5) if step[0] == 2 else self.by_turns(chroma, 0.0, 0.5)
        chroma = self.quantised(chroma, self.q[1:])[..., : -(-H // step[0]), : -(-W // step[1])]
        if self.subsampling:
            chroma = F.interpolate(chroma, scale_factor=step, mode="bilinear")[..., :H, :W]
            chroma = self.by_turns(chroma, 0.5, 0.4375) if step[0] == 2 else self.by_turns(chroma, 0.25, 0.5)
        return self.mixed(self.RGB, torch.cat([Y, chroma], 1), [32768] * 3).clamp(0, 255) * (4 / 255) - 2

    def mixed(self, matrix: list, x: Tensor, half: list) -> Tensor:
        """The colours of whole numbers x (B, 3, H, W), by a matrix in parts of 65536 of which so many are added to round."""
        matrix, half = torch.tensor(matrix, device=x.device).double(), torch.tensor(half, device=x.device)[:, None]
        return ((matrix @ x.double().flatten(2) + half) / 65536).floor().view(x.shape).float()

    def by_turns(self, x: Tensor, even: float, odd: float) -> Tensor:
        """Rounded, with this much added in even and in odd columns."""
        return (x + even + (odd - even) * (torch.arange(x.shape[-1], device=x.device) % 2)).floor()

    def quantised(self, x: Tensor, q: Tensor) -> Tensor:
        """x (B, C, H, W) in grey levels about 0, padded to whole blocks, its coefficients rounded to multiples of q (C, 8, 8)."""
        H, W = x.shape[-2:]
        x = F.pad(x, [0, -W % 8, 0, -H % 8], mode="replicate").double()
        q = q.repeat(1, x.shape[-2] // 8, x.shape[-1] // 8).double()
        # libjpeg's whole numbers: its own DCT matrix, rows kept in quarters, coefficients in eighths; ties go away from 0
        D = torch.tensor(self.DCT, device=x.device).double() / 8192
        D = torch.cat([D, D.flip(1) * torch.tensor([1, -1] * 4, device=x.device)[:, None]], 1)
        rows, columns = (torch.kron(torch.eye(n // 8, device=x.device), D) for n in x.shape[-2:])
        t = (rows @ (4 * x @ columns.T + 0.5).floor() / 4 + 0.5).floor()
        t = t.sign() * ((t.abs() + 4 * q) / (8 * q)).floor() * q
        return ((4 * rows.T @ t + 0.5).floor() @ columns / 32 + 0.5).floor()[..., :H, :W].clamp(-128, 127).float()


def standard_tables(quality: int) -> list[int]:
    """The quantisation tables of luminance and chroma that libjpeg takes for a quality."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality)
    return [q for table in Image.open(file).quantization.values() for q in table]


CORRUPTIONS = dict(mask=Mask, block=Block, blur=Blur, downsample=Downsample, noise=Noise, jpeg=Jpeg)


def corrupt(x: Tensor, corruption: Corruption, generator: torch.Generator) -> Tensor:
    """The observations of a whole data set, in parts, lest memory grow."""
    return torch.cat([corruption(part, generator) for part in x.split(1024)])


def hide(y: Tensor, share: Tensor, cell: int, generator: torch.Generator) -> Tensor:
    """Observations y (B, C + 1, H, W) less a random share (B,) of their squares of cell x cell pixels."""
    (B, _, H, W), share = y.shape, share.view(-1, 1, 1, 1)
    squares = torch.rand(B, 1, -(-H // cell), -(-W // cell), generator=generator, device=y.device) >= share
    return y * F.interpolate(squares.to(y.dtype), scale_factor=cell, mode="nearest")[..., :H, :W]


# ---- A Gaussian that knows that images are smooth: the start of EM, and what the denoiser starts from ----------------


class Gaussian(nn.Module):
    """x ~ N(mean, Sigma), Sigma = S + U U^T: S diagonal in the DCT of the whole image and in opponent colours, where it falls
    as a power of the frequency, S_ij = scale / (1 + i^2 + j^2)^(power / 2); U of low rank, for images that are not alike
    everywhere, as digits are not. With power 0 it is the published start: white noise and a low rank.
    """

    def __init__(self, shape: list, rank: int = 0, power: float = 0.0):
        """shape: of one x, (C, H, W). Until it is fitted, of variance 1."""
        super().__init__()
        (C, self.height, self.width), self.rank = shape, rank
        self.register_buffer("mean", torch.zeros(shape if rank else [C, 1, 1]))
        self.register_buffer("power", torch.full([C, 1, 1], power))
        self.register_buffer("scale", torch.ones(C, 1, 1))
        self.scale = 1 / self.spectrum(self.height, self.width).mean((1, 2), keepdim=True)
        self.register_buffer("U", torch.zeros(math.prod(shape), rank))
        self.register_buffer("V", torch.zeros(math.prod(shape), rank))  # Sigma^-1 = S^-1 - V V^T

    def shape(self, H: int, W: int, power: Tensor) -> Tensor:
        """(1 + i^2 + j^2)^(-power / 2), with i and j counted as in images of the size that was learnt from."""
        i, j = self.height * fractions(H, power.device), self.width * fractions(W, power.device)
        return torch.exp(-power / 2 * (1 + i[:, None] ** 2 + j**2).log())

    def spectrum(self, H: int, W: int) -> Tensor:
        """S, (C, H, W)."""
        return self.scale * self.shape(H, W, self.power)

    def fit(self, x: Tensor, generator: torch.Generator) -> "Gaussian":
        """The likeliest one for x (N, C, H, W); a power of 0 stays. Returns itself."""
        self.mean = x.mean(0) if self.rank else x.mean((0, 2, 3))[:, None, None]
        z = transform(x - self.mean, 0).flatten(1)  # (N, d)
        (N, d), U, variance = z.shape, self.U[:, :0], z.new_zeros(0)
        if self.rank:
            with torch_seeded_by(generator):
                _, singular, U = torch.svd_lowrank(z, q=min(self.rank + 8, N, d), niter=2)
            kept = min(self.rank, d - 1, N - 1)
            U, variance = U[:, :kept], singular[:kept].square() / N
        # Probabilistic principal components (Tipping & Bishop 1999): S is what U leaves,  U <- U (variance - U^T S U)^(1/2)
        left = (z.square().mean(0) - U.square() @ variance).clamp_min(0).view(x.shape[1:]) * (d / (d - U.shape[1]))
        # The likeliest power:  min_p log mean(left / shape_p) + mean log shape_p
        powers = torch.linspace(0, 6 if self.power.any() else 0, 121, device=x.device).view(-1, 1, 1, 1)
        shapes = self.shape(*x.shape[-2:], powers)
        scales = (left / shapes).mean((2, 3), keepdim=True).clamp_min(1e-6)  # (121, C, 1, 1)
        best = (scales.log() + shapes.log().mean((2, 3), keepdim=True)).argmin(0, keepdim=True)
        self.power, self.scale = powers.expand_as(scales).gather(0, best)[0], scales.gather(0, best)[0]
        S = self.spectrum(*x.shape[-2:]).view(-1, 1)
        self.U = U * (variance - (U * S * U).sum(0)).clamp_min(0).sqrt()
        # Woodbury:  V = S^-1 U L^-T,  L L^T = I + U^T S^-1 U
        L = torch.linalg.cholesky(torch.eye(U.shape[1], device=x.device) + self.U.T @ (self.U / S))
        self.V = torch.linalg.solve_triangular(L, (self.U / S).T, upper=False).T
        return self

    def sample(self, number: int, generator: torch.Generator) -> Tensor:
        """(number, C, H, W)."""
        S = self.spectrum(self.height, self.width)
        z = torch.randn(number, self.U.shape[1], generator=generator, device=S.device) @ self.U.T
        eps = torch.randn(number, *S.shape, generator=generator, device=S.device)
        return self.mean + inverse(z.view_as(eps) + S.sqrt() * eps, 0)

    def draw(self, y: Tensor, corruption: Corruption, generator: torch.Generator) -> Tensor:
        """x ~ p(x | y) for each of y (N, C + 1, H, W), exactly where w is exact: the posterior's mean for a draw of the prior
        in place of its mean, and h + w^(1/2) eps in place of h (Papandreou & Yuille 2010)."""
        parts = []
        for part in y.split(512):
            part = part.to(generator.device)
            w, h, x = corruption.precision(part), corruption.product(part), self.sample(len(part), generator)
            t, _ = self.posterior(part, w, h + w.sqrt() * randn_like(h, generator), x, corruption.block, 64)
            parts.append(inverse(t, corruption.block).to(y.device))
        return torch.cat(parts)

    def precision(self, t: Tensor, S: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Sigma^-1 t. rows, columns: from the coordinates of t to the DCT of the whole image."""
        z = rows @ t @ columns.T
        q = z / S
        if self.rank > 0:
            q = q - (z.flatten(1) @ self.V @ self.V.T).view(z.shape)
        return rows.T @ q @ columns

    def posterior(self, y: Tensor, w: Tensor, h: Tensor, mean: Tensor, block: int, steps: int) -> tuple[Tensor, Tensor]:
        """Mean and variances of t = T x, T of blocks `block`, under log p(x) + sum (h t - w t^2 / 2), p of another mean.

        w, h: (B, C, H, W); y, which they count, for a first guess. The mean solves
            (Sigma^-1 + w) t = Sigma^-1 mean + h
        by conjugate gradients: one step is exact where T is the basis of S, 4 are near. The variances are 1 / (a + w), a between
        the precision under N(0, S) of a coefficient of which no other is known, and of one of which all are, by the share of its
        neighbours that is known: exact where T is the basis of S, or w is the same everywhere.
        """
        H, W = h.shape[-2:]
        S, mean = self.spectrum(H, W), mean.expand(h.shape)
        rows, columns = [dct(0, n, h.device) @ dct(block, n, h.device).T for n in (H, W)]
        alone, last = 1 / (rows.T**2 @ S @ columns**2), rows.T**2 @ (1 / S) @ columns**2  # 1 / diag T S T^T, diag T S^-1 T^T
        least = w.amin((1, 2, 3), keepdim=True)
        a, t = alone.expand_as(h), transform(mean, block)
        b = self.precision(t, S, rows, columns) + h
        if block > 0:
            guess = interpolate(y, mean)
            known = ((w - least) / (w - least + alone)).mean((1, 2, 3), keepdim=True).clamp_max(0.999)
            share = guess[:, -1:] * known / y[:, -1:].mean((1, 2, 3), keepdim=True).clamp_min(1e-3)
            a = alone + share.clamp(0, 1) * (last - alone)
            # A Wiener filter, of what is known of every coefficient, about y interpolated, which is worth a precision r
            z, r = h / w.clamp_min(1e-9), a.mean((2, 3), keepdim=True) * known / (1 - known)
            t = torch.where(known > 1e-6, transform(guess[:, :-1], block), t)
            t = t + rows.T @ (rows @ (z - t) @ columns.T * (least / (1 / S + r + least))) @ columns
            t = t + (w - least) / (a + w) * (z - t)
        residual, p, rz = b - self.precision(t, S, rows, columns) - w * t, torch.zeros_like(b), torch.ones_like(least)
        for _ in range(steps):
            q, before = residual / (last + w), rz  # preconditioned by the diagonal
            rz = (residual * q).sum((1, 2, 3), keepdim=True).clamp_min(1e-30)
            p = q + rz / before * p
            Ap = self.precision(p, S, rows, columns) + w * p
            step = rz / (p * Ap).sum((1, 2, 3), keepdim=True).clamp_min(1e-30)
            t, residual = t + step * p, residual - step * Ap
        return t, 1 / (a + w)


def interpolate(y: Tensor, mean: Tensor) -> Tensor:
    """y (B, C + 1, H, W) with its gaps filled: by means of the observed values, weighted by (d^2 + 0.3)^(-5/2), d the distance in
    pixels, up to 10, and by `mean` far from all. The last channel is the share of a pixel's neighbours that is observed."""
    H, W = y.shape[-2:]
    d = torch.arange(-10, 11, device=y.device)
    kernel = (d[:, None] ** 2 + d**2 + 0.3) ** -2.5 * (d[:, None] ** 2 + d**2 > 0)
    # A convolution of the mirrored image, by the DCT:  k_ij = sum_rs kernel_rs cos(pi i r / H) cos(pi j s / W)
    i, j = [torch.cos(math.pi * fractions(n, y.device)[:, None] * d) for n in (H, W)]
    rows, columns, observed = dct(0, H, y.device), dct(0, W, y.device), y[:, -1:]
    z = torch.cat([observed * (y[:, :-1] - mean), observed], 1)
    z = rows.T @ (i @ kernel @ j.T * (rows @ z @ columns.T)) @ columns
    value = torch.where(observed > 0, y[:, :-1], mean + z[:, :-1] / z[:, -1:].clamp_min(1e-3))
    return torch.cat([value, z[:, -1:] / kernel.sum()], 1)


def start(y: Tensor, corruption: Corruption, config: "Config", generator: torch.Generator) -> Gaussian:
    """The Gaussian to start EM from, itself fitted by EM to some observations y (N, C + 1, H, W): draw every x given its y, fit
    the Gaussian to the draws, repeat. What no observation shows stays as its law, the power of the frequency, says."""
    shape = [y.shape[1] - 1, *y.shape[2:]]
    gaussian = Gaussian(shape, 0 if config.smoothness else config.prior_rank, config.smoothness).to(generator.device)
    y = y[: 4096 if gaussian.rank else 512].to(generator.device)
    x = interpolate(y, gaussian.mean)[:, :-1]
    gaussian.mean += x.mean((0, 2, 3))[:, None, None]
    gaussian.scale *= transform(x - gaussian.mean, 0).square().mean((0, 2, 3))[:, None, None]
    x = gaussian.sample(512, generator)
    for _ in range(config.prior_laps):
        corruption.learn(x, generator)
        x = gaussian.draw(y, corruption, generator)
        gaussian.fit(x, generator)
    return gaussian


# ---- Networks. TorchScript compiles them as they stand: hence one signature (x, emb) for every block ----------------


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer, made to give 0 at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels: int, affine: bool = True) -> nn.GroupNorm:
    """Groups of 16 channels, or a single one."""
    return nn.GroupNorm(channels // 16 if channels % 16 == 0 else 1, channels, affine=affine)


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
    """x + gate conv(silu(conv(scale norm(x) + shift))): scale, shift and gate from the embedding of the noise level."""

    def __init__(self, channels: int, emb: int, heads: int, dropout: float):
        super().__init__()
        self.norm = group_norm(channels, affine=False)
        self.modulation = zeroed(nn.Linear(emb, 3 * channels))
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.attention = Attention(channels, heads) if heads else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift, gate = self.modulation(emb)[:, :, None, None].chunk(3, 1)  # each (B, C, 1, 1)
        h = self.conv1((1 + scale) * self.norm(x) + shift)
        h = self.conv2(self.dropout(F.silu(h)))
        return self.attention(x + (1 + gate) * h)


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
    """F for images of any size. Level i has channels[i] channels at 2^-i of the resolution, rounded up."""

    def __init__(self, inputs: int, outputs: int, config: Config):
        super().__init__()
        channels, coarsest = config.channels, len(config.channels) - 1

        def blocks(i: int) -> nn.ModuleList:
            arguments = (channels[i], 4 * channels[0], config.heads if i in config.attention else 0, config.dropout)
            return nn.ModuleList(ResidualBlock(*arguments) for _ in range(config.blocks))

        self.emb = NoiseEmbedding(4 * channels[0])
        self.down, self.encoder = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(channels):
            self.down.append(nn.Conv2d(channels[i - 1] if i else inputs, width, 3, stride=2 if i else 1, padding=1))
            self.encoder.append(blocks(i))
        self.up, self.decoder = nn.ModuleList(), nn.ModuleList()  # in the order of execution, from the coarsest level,
        for i in range(coarsest, -1, -1):  # which is joined with its own encoder's output
            self.up.append(nn.Conv2d(channels[min(i + 1, coarsest)] + channels[i], channels[i], 3, padding=1))
            self.decoder.append(blocks(i))
        self.norm = group_norm(channels[0])
        self.out = zeroed(nn.Conv2d(channels[0], outputs, 3, padding=1))

    def forward(self, xt: Tensor, mean: Tensor, y: Tensor, log_sigma: Tensor) -> Tensor:
        emb = self.emb(log_sigma).to(xt.dtype)
        x = torch.cat([xt, mean, y], 1)
        skips: list[Tensor] = []
        for down, blocks in zip(self.down, self.encoder):
            x = down(x)
            for block in blocks:
                x = block(x, emb)
            skips.append(x)
        for up, blocks in zip(self.up, self.decoder):
            skip = skips.pop()
            x = up(torch.cat([F.interpolate(x, size=skip.shape[-2:], mode="nearest"), skip], 1))
            for block in blocks:
                x = block(x, emb)
        return self.out(F.silu(self.norm(x)))


class Denoiser(nn.Module):
    """D(xt, sigma, y), an estimate of E[x0 | xt, y].

    D = G + O^T v^(1/2) O F(c_in xt, G, y, log sigma),  c_in = 1 / sqrt(sigma^2 + 1),  G and v the mean and, pixel by pixel in
    opponent colours O, the variance of x0 given xt and y, were x0 of a smooth Gaussian: it is told what y says of T x0, and what
    xt says, a precision 1 / sigma^2 more. The network F starts at 0, so D starts as the best guess under that Gaussian, agrees
    with y, and learns only what is not Gaussian. (A root of the variance in T in place of O would ask F, a convolution, to know
    the place of each block: it learns nothing then.) Preconditioning "edm": the Gaussian is N(0, I) and told nothing of y, hence
    G = xt / (sigma^2 + 1),  v = sigma^2 / (sigma^2 + 1),  as published (Karras et al. 2022).
    """

    def __init__(self, gaussian: Gaussian, corruption: Corruption, config: Config):
        super().__init__()
        C = gaussian.power.shape[0]
        self.corruption, self.x_shape = corruption, [C, gaussian.height, gaussian.width]
        self.gaussian, self.told = gaussian, corruption
        if config.preconditioning == "edm":
            self.gaussian, self.told = Gaussian(self.x_shape), Corruption()  # N(0, I), and w = h = 0
            self.told.block = 0
        self.sigma_min, self.sigma_max, self.bfloat16 = config.sigma_min, config.sigma_max, False
        self.network = UNet(3 * C + 1, C, config)

    def shape(self, y: Tensor) -> list[int]:
        """Of the x that y observes."""
        return [y.shape[0], y.shape[1] - 1, y.shape[2], y.shape[3]]

    def posterior(self, xt: Tensor, sigma: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """G and v, both (B, C, H, W). sigma: (B, 1, 1, 1)."""
        w, h = self.told.precision(y) + sigma**-2, self.told.product(y) + self.told.T(xt) / sigma**2
        mean, c = self.gaussian.posterior(y, w, h, self.gaussian.mean, self.told.block, 1 if self.told.block == 0 else 4)
        if self.told.block != 1:  # v = diag T^T c T
            rows, columns = [dct(self.told.block, n, c.device).square() for n in c.shape[-2:]]
            c = rows.T @ c @ columns
        return inverse(mean, self.told.block), c

    def estimate(self, xt: Tensor, sigma: Tensor, y: Tensor, G: Tensor, v: Tensor) -> Tensor:
        """D, given the posterior."""
        scaled, log_sigma = xt * (sigma**2 + 1).rsqrt(), sigma.flatten().log()
        if torch.jit.is_scripting() or not self.bfloat16:
            output = self.network(scaled, G, y, log_sigma)
        else:
            with torch.autocast(xt.device.type, torch.bfloat16):
                output = self.network(scaled, G, y, log_sigma)
        return G + inverse(v.sqrt() * transform(output.float(), 1), 1)

    def forward(self, xt: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        """xt (B, C, H, W), sigma (B,), y (B, C + 1, H, W) -> (B, C, H, W)."""
        sigma = sigma.view(-1, 1, 1, 1)
        G, v = self.posterior(xt, sigma, y)
        return self.estimate(xt, sigma, y, G, v)

    def loss(self, x0: Tensor, y: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
        """Eq. 10 for each x0 (B, C, H, W), of noise level sigma (B,): (B,), about 1 while F is 0.

        The paper's lambda(sigma) |e|^2 / d,  lambda = 1 / sigma^2 + 1,  weighs the error e = D - x0 by the precision of x0 given
        xt under N(0, I). Here that is the Gaussian's given xt and y,  |e|^2 / sum v,  the same for "edm". (|v^(-1/2) e|^2 would
        spend the network on what is small already: colours and observed pixels.)
        """
        sigma = sigma.view(-1, 1, 1, 1)
        xt = x0 + sigma * randn_like(x0, generator)
        with torch.no_grad():
            G, v = self.posterior(xt, sigma, y)
        error = self.estimate(xt, sigma, y, G, v) - x0
        return error.square().flatten(1).sum(1) / v.flatten(1).sum(1)


# ---- Noise levels, sampler ------------------------------------------------------------------------------------------


def noise_level(t: Tensor, config: Config) -> Tensor:
    """sigma(t) = exp((1 - t) log sigma_min + t log sigma_max), t in [0, 1]."""
    return torch.exp((1 - t) * math.log(config.sigma_min) + t * math.log(config.sigma_max))


def random_noise_level(number: int, config: Config, generator: torch.Generator) -> Tensor:
    """(number,): sigma(t), t ~ Beta(3, 3), the median of five uniform numbers."""
    return noise_level(torch.rand(number, 5, generator=generator, device=generator.device).median(1).values, config)


def sampler(method: str, steps: int, sigma_min: float, sigma_max: float) -> list[tuple[float, float, float, float, float]]:
    """Each step's noise level sigma_t and coefficients a, b, c, d of  xs = a xt + b D + c D_before + d eps,  where D is
    the denoiser's estimate, D_before that of the step before. Down log-uniform levels from sigma_max to sigma_min, then 0.

    From sigma_t to the next lower level sigma_s, with r = sigma_s / sigma_t:
        ddpm   xs = r^2 xt + (1 - r^2) D + sigma_s sqrt(1 - r^2) eps          (ancestral: the paper's)
        ddim   xs = r xt + (1 - r) D                                          (Song et al. 2021)
        sde2m, dpm2m: as these, with (3 D - D_before) / 2 in place of D but in the first and last step
                                                                              (DPM-Solver++(2M), SDE and ODE, Lu et al. 2022)
    """
    if method != "ddpm" and method != "ddim" and method != "sde2m" and method != "dpm2m":
        raise DiffEMError(f"unknown method {method}: ddpm, ddim, sde2m, dpm2m")
    table: list[tuple[float, float, float, float, float]] = []
    levels = [sigma_max * (sigma_min / sigma_max) ** (i / max(steps - 1, 1)) for i in range(steps)] + [0.0]
    for i in range(steps):
        a, d = levels[i + 1] / levels[i], 0.0
        if method == "ddpm" or method == "sde2m":
            d = levels[i + 1] * math.sqrt(1 - a * a)
            a = a * a
        c = 0.0
        if (method == "sde2m" or method == "dpm2m") and 0 < i and i < steps - 1:
            c = -0.5 * (1 - a)
        table.append((levels[i], a, 1 - a - c, c, d))
    return table


@torch.no_grad()
def sample(denoiser: Denoiser, y: Tensor, steps: int, method: str, generator: torch.Generator) -> Tensor:
    """x0 ~ q(x0 | y) by `steps` evaluations of the denoiser; y (B, C + 1, H, W) -> (B, C, H, W). y = 0 samples the prior."""
    shape = denoiser.shape(y)
    xt = denoiser.sigma_max * torch.randn(shape, generator=generator, device=y.device)
    before = torch.zeros_like(xt)
    for sigma, a, b, c, d in sampler(method, steps, denoiser.sigma_min, denoiser.sigma_max):
        x0 = denoiser(xt, torch.full(shape[:1], sigma, device=y.device), y)
        xt = a * xt + b * x0 + c * before + d * randn_like(xt, generator)
        before = x0
    return xt


# ---- Expectation maximisation ---------------------------------------------------------------------------------------


@dataclass
class State:
    """Where a run stands: what a checkpoint keeps. Lap 0 is the Gaussian prior's."""

    x0: Tensor  # the reconstructions X, one for each observation; the E-step writes this lap's over the last lap's
    denoiser: Denoiser
    average: AveragedModel  # of the denoiser's weights
    optimizer: torch.optim.Optimizer
    losses: Tensor  # (steps,) of this lap
    sample_batch: int  # reconstructions to draw at once
    prior: Gaussian | None = None  # in lap 0 alone
    lap: int = 0
    step: int = 0  # optimiser steps done in this lap
    drawn: int = 0  # reconstructions drawn in this lap

    @property
    def model(self) -> Denoiser:
        """The denoiser to sample from."""
        return self.average.module.eval()

    def check(self) -> None:
        """Raises DiffEMError where a loss of this lap is not finite."""
        bad = (~self.losses[: self.step].isfinite()).nonzero()
        if len(bad):
            raise DiffEMError(f"the loss is not finite in lap {self.lap}, step {int(bad[0]) + 1}: a lower --lr may help")


def new_denoiser(gaussian: Gaussian, corruption: Corruption, config: Config, device) -> Denoiser:
    with torch_seeded_by(generator_for("cpu", config.seed, 0, 2)):
        denoiser = Denoiser(gaussian, corruption, config)
    denoiser.to(device).network.to(memory_format=torch.channels_last)  # the faster one for convolutions
    denoiser.bfloat16 = config.bfloat16(torch.device(device))
    return denoiser


def new_state(x0: Tensor, denoiser: nn.Module, config: Config) -> State:
    """The state before the first lap, of reconstructions x0 (N, ...) and a denoiser that is on the device to compute on."""
    device = next(denoiser.parameters()).device
    average = AveragedModel(denoiser, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    if config.compile == "on" or config.compile == "auto" and device.type == "cuda":
        denoiser.network.compile()
        average.module.network.compile()
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=config.lr, fused=True)
    return State(x0, denoiser, average, optimizer, torch.zeros(config.steps, device=device), config.sample_batch)


def em(y: Tensor, corruption: Corruption, config: Config, state: State | None = None, device=None):
    """Runs DiffEM on observations y (N, ...). It never sees a clean image. device: to compute on (default: that of y).

    Yields the state once for lap 0, after each optimiser step and after each batch of the E-step: there a run can stop, be
    saved and go on. A lap is complete where state.drawn == N. Raises DiffEMError where the loss is not finite.

    Under torchrun, each process runs it on observations of its own, and only gradients pass between them.
    """
    device, (rank, size) = torch.device(device or y.device), ranks()
    require(config.batch % size == 0, f"batch {config.batch} cannot be shared by {size} processes")
    corruption = corruption.to(device)
    if state is None:
        generator = generator_for(device, config.seed, 0, 1, rank)
        prior = start(y, corruption, config, generator)
        x0 = prior.draw(y, corruption, generator)
        x0 = x0.half() if x0.is_cuda else x0  # for the sake of the GPU's memory
        gaussian = Gaussian(list(x0.shape[1:]), power=1.0).to(device).fit(random_images(x0, 4096, generator), generator)
        for buffer in (*gaussian.buffers(), *corruption.buffers()) if size > 1 else ():
            dist.broadcast(buffer, 0)  # one denoiser for all
        state = new_state(x0, new_denoiser(gaussian, corruption, config, device), config)
        state.prior, state.drawn = prior, len(y)
        yield state
    while state.lap < config.laps or state.drawn < len(y):
        if state.drawn == len(y):
            state.prior, state.lap, state.step, state.drawn = None, state.lap + 1, 0, 0
        if state.step < config.steps:
            m_step(state, corruption, config, generator_for(device, config.seed, state.lap, state.step, rank))
            # To read the loss is to wait for the device: on a GPU only now and then
            if device.type == "cpu" or state.step % 50 == 0 or state.step == config.steps:
                state.check()
        else:
            e_step(state, y, config, generator_for(device, config.seed, state.lap, config.steps + state.drawn, rank))
        yield state


def m_step(state: State, corruption: Corruption, config: Config, generator: torch.Generator) -> None:
    """One optimiser step of the M-step."""
    for group in state.optimizer.param_groups:
        group["lr"] = config.learning_rate(state.lap, state.step)
    state.losses[state.step] = descend(state, batch_loss(state, corruption, config, generator), config)
    state.step += 1


def batch_loss(state: State, corruption: Corruption, config: Config, generator: torch.Generator) -> Tensor:
    """Eq. 10, the mean over a batch of reconstructions, or over this process's share of it, corrupted afresh."""
    device = generator.device
    x0 = random_images(state.x0, config.batch // ranks()[1], generator)
    y = corruption(x0 := augment(x0, config, generator), generator)
    blank = torch.rand(len(y), generator=generator, device=device) < config.blank
    y = y.masked_fill(blank.view(-1, *[1] * (y.ndim - 1)), 0)
    if not corruption.hides():  # as many lose a part, for the sake of `judge`
        share, some = torch.rand(2, len(y), generator=generator, device=device)
        y = hide(y, share * (some < config.blank), corruption.cell, generator)
    sigma = random_noise_level(len(y), config, generator)
    state.denoiser.train()
    with torch_seeded_by(generator):  # for dropout
        return state.denoiser.loss(x0, y, sigma, generator).mean()


def random_images(x0: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """(number, ...) of x0 (N, ...), on the generator's device, which need not be that of x0."""
    if x0.device.type == generator.device.type:
        return x0[torch.randint(len(x0), (number,), generator=generator, device=x0.device)].float()
    chosen = torch.randint(len(x0), (number,), generator=generator_for("cpu", generator.initial_seed()))
    return x0[chosen].pin_memory().to(generator.device, non_blocking=True).float()  # while the GPU is busy with the last step


def descend(state: State, loss: Tensor, config: Config) -> Tensor:
    """One step of the optimiser, and of the weights' average. Returns the loss, the mean over all processes."""
    state.optimizer.zero_grad()
    loss.backward()
    loss, size = loss.detach(), ranks()[1]
    if size > 1:
        parts = [loss, *(p.grad for p in state.denoiser.parameters())]
        total = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(total)
        for part, mean in zip(parts, (total / size).split([part.numel() for part in parts])):
            part.copy_(mean.view_as(part))
    nn.utils.clip_grad_norm_(state.denoiser.parameters(), config.clip)
    state.optimizer.step()
    state.average.update_parameters(state.denoiser)
    return loss


def e_step(state: State, y: Tensor, config: Config, generator: torch.Generator) -> None:
    """Draws the next batch of reconstructions; where it does not fit into memory, half of it, then and from then on."""
    while True:
        batch = y[state.drawn : state.drawn + state.sample_batch].to(generator.device)
        try:
            x0 = sample(state.model, batch, *config.e_step_sampler(state.lap), generator)
            break
        except RuntimeError as error:  # PyTorch has a kind of its own for a GPU's memory alone
            if len(batch) == 1 or "memory" not in str(error):
                raise
        state.sample_batch = len(batch) // 2
        generator.manual_seed(generator.initial_seed())
    state.x0[state.drawn : state.drawn + len(batch)] = x0
    state.drawn += len(batch)


def augment(x0: Tensor, config: Config, generator: torch.Generator) -> Tensor:
    """Mirrored images, slightly other hues (up to 0.01 of a turn) and saturations (up to 5 %), as in the paper; a smaller copy,
    by a factor down to 1/2 for the whole batch; squares cut out at random places."""
    mirror, turn, saturation = torch.rand(3, len(x0), 1, 1, 1, generator=generator, device=x0.device)
    if config.flip:
        x0 = torch.where(mirror < 0.5, x0.flip(3), x0)
    if config.jitter and x0.shape[1] == 3:
        # The chroma c = x0 - grey turns about the grey axis:  cos(a) c + sin(a) (1, 1, 1) x c / sqrt(3)
        grey = x0.mean(1, keepdim=True)
        chroma, angle = x0 - grey, 0.02 * math.pi * (2 * turn - 1)
        cross = (chroma.roll(1, 1) - chroma.roll(-1, 1)) / math.sqrt(3)
        x0 = grey + (0.95 + 0.1 * saturation) * (angle.cos() * chroma + angle.sin() * cross)
    if config.rescale:
        factor = 1 - torch.rand(1, generator=generator, device=x0.device).item() / 2
        size = [4 * max(1, round(n * factor / 4)) for n in x0.shape[2:]]
        x0 = F.interpolate(x0, size=size, mode="bicubic", antialias=True)
    if config.crop:
        # The corruption's blocks then lie elsewhere on each image, and what they leave at one place is learnt at another. The
        # crop's edge is an image's: there the U-Net pads by 0 and the corruption mirrors
        top, left = [torch.randint(n - config.crop + 1, (len(x0), 1, 1, 1), generator=generator, device=x0.device) for n in x0.shape[2:]]
        i = torch.arange(config.crop, device=x0.device)
        x0 = x0.take_along_dim(top + i[:, None], 2).take_along_dim(left + i, 3)
    return x0


def fit(y: Tensor, corruption: Corruption, config: Config, device=None) -> Denoiser:
    """Learns from observations y ~ Q(. | x0) alone, (N, C + 1, H, W), the model with which `sample` restores them. Same seed and device, same result. Raises DiffEMError where the loss is not finite."""
    for state in em(y, corruption, config, device=device):
        pass
    return state.model


# ---- Settings of a run, and each data set's ------------------------------------------------------------------------


@dataclass
class Settings(Config):
    """All that describes a run of the command line: one field, one flag, but for `parameters`."""

    dataset: str = setting("digits", "digits, mnist, fashion_mnist, cifar10, celeba, folder, observations")
    observations: str = setting("", "a folder of images that are observations, for --corruption to undo; a pixel is missing "
                                "where it is transparent, or NaN in an .npy")  # fmt: skip
    masks: str = setting("", "for observations: a folder of images named like them, black where a pixel is missing")
    preset: str = setting("small", "published: the paper's network and schedule, the default on a GPU, from the smooth Gaussian (with "
                          "--preconditioning edm --smoothness 0 the paper's own start); small: for a CPU")  # fmt: skip
    data_dir: str = setting("data", "where data sets are kept; for folder: the images, at any depth")
    image_size: int = setting(0, "for folder, celeba: crop the centre square and resize it to this; 0: leave images as they are")
    grey: bool = setting(False, "read images as grey")
    skip_bad_images: bool = setting(False, "go on without images that cannot be read")
    limit: int = setting(0, "train on so many images; 0: on all")
    held_out: int = setting(256, "images held out for the metrics; of folder, observations: 0 for a twentieth, but 256 where "
                            "there are many")  # fmt: skip
    samples: int = setting(8, "posterior samples of each held-out image, for the mean and the spread")
    patience: int = setting(0, "stop after so many laps that are no better than the best one, beyond the scores' own error; 0: "
                            "never, for the learning rate that falls in the second half mends much")  # fmt: skip
    corruption: str = setting("mask", "one of the list below, or path/to/file.py:ClassName")
    parameters: dict = field(default_factory=dict)  # of the corruption

    def __post_init__(self):
        super().__post_init__()
        few = min(self.held_out - (self.dataset not in ("folder", "observations")), self.samples - 2, self.limit, self.patience)
        require(few >= 0, "held_out takes 1 or more (folder, observations: or 0), samples 2, limit and patience 0")
        require((self.dataset == "observations") == bool(self.observations), "--observations FOLDER is the data set")
        both = ["folder", "observations"]
        own = {"image_size": ["folder", "celeba"], "masks": ["observations"], "grey": both, "skip_bad_images": both}
        for name, places in own.items():
            require(not getattr(self, name) or self.dataset in places, f"{name} is for --dataset {' or '.join(places)}")


SMALL = dict(channels=(16, 32, 64), blocks=2, steps=1000, ema=0.995, laps=8, sample_batch=256, prior_rank=64, prior_laps=16)
PHOTOS = SMALL | dict(steps=500, flip=True, first_sample_steps=4, smoothness=3.0, prior_laps=8)
ALIKE = ("blur", "downsample", "jpeg")  # the same for all images: what they hide of one, smaller copies of others show
PUBLISHED = dict(
    blocks=5, dropout=0.1, laps=20, steps=50_000, batch=256, ema=0.9999, flip=True, jitter=True, method="ddpm",
    sample_steps=256, first_sample_steps=256, prior_steps=256, sample_batch=1024, smoothness=3.0,
)  # fmt: skip
# What each data set changes of the defaults above, which are the digits' own
PRESETS = {
    ("digits", "small"): dict(parameters=dict(rate=0.5)),
    ("mnist", "small"): SMALL | dict(limit=10_000),
    ("fashion_mnist", "small"): SMALL | dict(limit=10_000, flip=True),
    ("cifar10", "small"): PHOTOS | dict(limit=10_000),
    ("cifar10", "published"): PUBLISHED | dict(channels=(128, 256, 384), attention=(1,), lr=2e-4, prior_rank=64),
    ("celeba", "small"): PHOTOS | dict(channels=(16, 32, 64, 128), limit=10_000, image_size=64),
    ("celeba", "published"): PUBLISHED | dict(
        channels=(128, 256, 384, 512), blocks=3, attention=(3,), lr=1e-4, sample_batch=512, prior_rank=1024, image_size=64,
    ),
    ("folder", "small"): PHOTOS,
    ("observations", "small"): PHOTOS | dict(held_out=0),
}  # fmt: skip


# ---- Data sets: observations, and what clean images there are, for the metrics alone --------------------------------


def load_data(settings: Settings) -> tuple[Tensor, Tensor]:
    """Clean x0 to train on and to hold out, in an order that the seed decides: (N, C, H, W) in [-2, 2]."""
    name, held_out = settings.dataset, settings.held_out
    generator = generator_for("cpu", settings.seed, 0, 4)
    if name == "folder":
        x0 = read_images(chosen(image_files(settings), settings, generator), settings)[:, :-1]
    elif name == "digits":
        from sklearn.datasets import load_digits

        x0 = torch.from_numpy(load_digits().images * (255 / 16))[:, None].float() * (4 / 255) - 2
    else:
        x0, test = torchvision_images(settings)
    if name in ("folder", "digits"):
        x0, test = split(x0[torch.randperm(len(x0), generator=generator)], held_out)
    return x0[torch.randperm(len(x0), generator=generator)[: settings.limit or None]], test[:held_out]


def chosen(files: list[Path], settings: Settings, generator: torch.Generator) -> list[Path]:
    """In a random order, no more than are trained on and held out."""
    order = torch.randperm(len(files), generator=generator)
    return [files[i] for i in order[: settings.limit + settings.held_out if settings.limit else None]]


def split(images: Tensor, held_out: int) -> tuple[Tensor, Tensor]:
    """Those to train on, and the first ones, which are held out (0: 5 %, but 256 if these are no more than a fifth)."""
    held_out = held_out or max(len(images) // 20, min(256, len(images) // 5))
    require(len(images) > held_out, f"{len(images)} images are too few to hold out {held_out} (--held-out) and train on the rest")
    return images[held_out:], images[:held_out]


def torchvision_images(settings: Settings) -> tuple[Tensor, Tensor]:
    """Pixels, 0 to 255, of the training and the test set, downloaded at first use."""
    from torchvision import datasets

    name, root = settings.dataset, settings.data_dir
    source, files = {
        "mnist": (datasets.MNIST, "MNIST/raw/*-ubyte.gz"),
        "fashion_mnist": (datasets.FashionMNIST, "FashionMNIST/raw/*-ubyte.gz"),
        "cifar10": (datasets.CIFAR10, "cifar-10-python.tar.gz"),
        "celeba": (datasets.CelebA, "celeba/img_align_celeba.zip and, beside it, the list_*.txt and identity_CelebA.txt"),
    }[name]
    splits = [{"split": "train"}, {"split": "test"}] if name == "celeba" else [{"train": True}, {"train": False}]
    try:
        parts = [source(root, download=True, **split) for split in splits]
    except Exception as error:  # torchvision and gdown raise many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DiffEMError(f"cannot download {name} ({reason}): put {files} into {Path(root).resolve()}") from error
    if name == "celeba":
        number = (settings.limit or len(parts[0]), settings.held_out)
        paths = [[Path(root, "celeba/img_align_celeba", file) for file in p.filename[:n]] for p, n in zip(parts, number)]
        return tuple(read_images(files, settings)[:, :-1] for files in paths)
    pixels = [torch.as_tensor(part.data) for part in parts]
    return tuple((p[:, None] if p.ndim == 3 else p.permute(0, 3, 1, 2)).float() * (4 / 255) - 2 for p in pixels)


def image_files(settings: Settings) -> list[Path]:
    root, flag = (settings.observations, "--observations") if settings.observations else (settings.data_dir, "--data-dir")
    require(Path(root).is_dir(), f"no folder {root} ({flag})")
    kinds = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
    kinds |= {".npy"} if settings.observations else set()
    files = sorted(path for path in Path(root).rglob("*") if path.suffix.lower() in kinds)
    require(len(files) > 0, f"no images in {root}")
    return files


def read_images(files: list[Path], settings: Settings) -> Tensor:
    """(N, C + 1, H, W): values from -2 to 2, and a last channel that is 1 where a pixel is there; both 0 where it is not."""
    images, number = torch.empty(0), 0
    for path in tqdm(files, desc="reading images", leave=False, disable=None):
        try:
            image = torch.from_numpy(read_array(path, settings) if path.suffix.lower() == ".npy" else read_image(path, settings))
            known = image[..., -1:] * read_mask(path, settings)
        except Exception as error:  # Pillow and numpy raise many kinds
            require(settings.skip_bad_images, f"{path} cannot be read as an image ({error}); --skip-bad-images goes on without")
            continue
        image = torch.cat([known * (4 * image[..., :-1] - 2), known], 2).permute(2, 0, 1)  # (C + 1, H, W)
        images = images if number else torch.empty(len(files), *image.shape)
        (H, W), (H0, W0) = image.shape[1:], images.shape[2:]
        advice = "; --image-size N crops and resizes them" if settings.dataset == "folder" else ""
        require((H, W) == (H0, W0), f"images of mixed sizes: {path} has {W}x{H} pixels, others {W0}x{H0}{advice}")
        images[number] = image
        number += 1
    require(number > 0, "none of the images can be read")
    return images[:number]


def read_image(path: Path, settings: Settings) -> np.ndarray:
    """(H, W, C + 1), 0 to 1. Where image_size is set: the largest centre square (celeba: of 140 pixels), resized to it."""
    from PIL import Image
    from torchvision.transforms.functional import center_crop

    with Image.open(path) as file:
        sixteen = file.mode.startswith("I")
        image = file.copy() if sixteen else file.convert("LA" if settings.grey else "RGBA")
    if settings.image_size and image.size != (settings.image_size, settings.image_size):
        image = center_crop(image, 140 if settings.dataset == "celeba" else min(image.size))
        image = image.resize((settings.image_size, settings.image_size), Image.Resampling.LANCZOS)
    values = np.atleast_3d(np.asarray(image, np.float32)) / (65535 if sixteen else 255)
    if sixteen:
        return np.concatenate([values] * (1 if settings.grey else 3) + [np.ones_like(values)], 2)
    # That a pixel is transparent says that it is missing, but not of images that are to be taken for clean
    values[..., -1] = values[..., -1] > 0 if settings.observations else 1
    return values


def read_array(path: Path, settings: Settings) -> np.ndarray:
    """(H, W, C + 1) of an .npy of (H, W) or (H, W, C) numbers from 0 to 1, or NaN."""
    values = np.atleast_3d(np.load(path, allow_pickle=False)).astype(np.float32)
    known = np.isfinite(values).all(2, keepdims=True)
    require(values.ndim == 3 and values.shape[2] == (1 if settings.grey else 3), f"an array {values.shape}")
    require(bool(((values >= 0) & (values <= 1) | ~known).all()), "numbers must be from 0 to 1")
    return np.concatenate([np.where(known, values, 0), known], 2, dtype=np.float32)


def read_mask(path: Path, settings: Settings) -> Tensor:
    """(H, W, 1), or 1: the image of the same name in the folder of masks."""
    from PIL import Image

    if not settings.masks:
        return torch.tensor(1.0)
    name = Path(settings.masks, path.relative_to(settings.observations).with_suffix(""))
    files = [file for file in name.parent.glob(name.name + ".*") if file.stem == name.name]
    require(len(files) == 1, f"{len(files)} masks {name}.*")
    with Image.open(files[0]) as file:
        return torch.from_numpy(np.asarray(file.convert("L"), np.float32)[..., None] > 127).float()


def jpeg_parameters(files: list[Path]) -> dict:
    """The quantisation tables and the subsampling that the JPEG files among these were made with, the same for all."""
    from PIL import Image, JpegImagePlugin

    found = {}
    for path in files:
        try:
            with Image.open(path) as file:
                if file.format == "JPEG":
                    tables = tuple(q for table in file.quantization.values() for q in table)
                    found.setdefault((tables, max(0, JpegImagePlugin.get_sampling(file))), path)
        except OSError:
            continue  # it is named when it is read
    require(len(found) > 0, "none of the observations is a JPEG file: give --quality")
    require(len(found) == 1, "JPEG of different tables: " + ", ".join(map(str, found.values())) + ": give --quality, or sort them")
    tables, subsampling = next(iter(found))
    return dict(tables=tables, subsampling=subsampling)


def observe(settings: Settings, corruption: Corruption) -> tuple[Tensor, Tensor, Tensor | None]:
    """Observations to train on, those held out for the metrics, and the truth of these, if it is known."""
    if settings.dataset != "observations":
        x0, x0_held_out = load_data(settings)  # nobody sees x0 but here
        generator = generator_for("cpu", settings.seed, 0, 0)
        return corrupt(x0, corruption, generator), corrupt(x0_held_out, corruption, generator), x0_held_out
    y = read_images(chosen(image_files(settings), settings, generator_for("cpu", settings.seed, 0, 4)), settings)
    if isinstance(corruption, Downsample):
        y = F.interpolate(y, scale_factor=corruption.factor, mode="nearest")
    y, held_out = split(y, settings.held_out)
    missing = bool((y[:, -1:] == 0).any())
    require(missing or not isinstance(corruption, Mask), f"no pixel is missing in {settings.observations}: alpha, NaN or --masks")
    corruption.masks = y[:, -1:].bool() if missing else None
    return y, held_out, None


# ---- Metrics, most of them by the truth -----------------------------------------------------------------------------


def psnr(x: Tensor, x0: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(4^2 / mean |x - x0|^2), the mean over images."""
    return float((10 * torch.log10(16 / (x - x0).square().flatten(1).mean(1))).mean())


def ssim(x: Tensor, x0: Tensor) -> float:
    """Structural similarity (Wang et al. 2004), by a Gaussian window of 1.5 pixels cut at 11x11, or at a small image."""
    from torchvision.transforms.functional import gaussian_blur

    radius = min(5, (min(x.shape[-2:]) - 1) // 2)
    blurred = (gaussian_blur(v, 2 * radius + 1, 1.5) for v in (x, x0, x * x, x0 * x0, x * x0))
    mean, mean0, xx, yy, xy = (F.pad(v, [-radius] * 4) for v in blurred)  # where the window lies within the image
    c1, c2 = (0.01 * 4) ** 2, (0.03 * 4) ** 2
    luminance = (2 * mean * mean0 + c1) / (mean**2 + mean0**2 + c1)
    return float((luminance * (2 * (xy - mean * mean0) + c2) / (xx - mean**2 + yy - mean0**2 + c2)).mean())


@torch.no_grad()
def evaluate(state: State, y: Tensor, x0: Tensor | None, corruption: Corruption, settings: Settings) -> tuple[dict, dict]:
    """Metrics on held-out observations y, with their truth x0 if it is known, and the samples they were taken from.

    residual  root mean square of y - A(x) where something was observed, in units of s, or of a grey level where s = 0
    spread    standard deviation of the posterior samples, root mean square over the pixels
    loss_*    Eq. 10 at that noise level, on posterior samples of the held-out observations, corrupted afresh
    """
    generator = generator_for(y.device, settings.seed, 0, 3)  # the same noise for every lap

    def draw(y: Tensor) -> Tensor:
        if state.prior:
            return state.prior.draw(y, corruption, generator)
        steps = settings.sample_steps if y.any() else settings.prior_steps
        return torch.cat([sample(state.model, part, steps, settings.method, generator) for part in y.split(state.sample_batch)])

    x = torch.stack([draw(y) for _ in range(settings.samples)])  # (samples, B, ...)
    prior = state.prior.sample(len(y), generator) if state.prior else draw(torch.zeros_like(y))
    samples = dict(x=x, mean=x.mean(0), std=x.std(0), prior=prior)
    error = y[:, :-1] - y[:, -1:] * corruption.A(x[0])  # 0 where nothing was observed
    observed = y[:, -1:].expand_as(error).sum().clamp_min(1)
    residual = float((error.square().sum() / observed).sqrt()) / (corruption.noise or 4 / 255)
    metrics = dict(residual=residual, spread=float(samples["std"].square().mean().sqrt()))
    if x0 is not None:
        metrics |= dict(psnr=psnr(x[0], x0), psnr_mean=psnr(samples["mean"], x0))
        metrics |= dict(ssim=ssim(x[0], x0), ssim_mean=ssim(samples["mean"], x0))
    if not state.prior:
        fresh = corruption(x[0], generator)
        for sigma in (s for s in (0.01, 0.1, 1.0, 10.0, 100.0) if settings.sigma_min <= s <= settings.sigma_max):
            level = torch.full(y.shape[:1], sigma, device=y.device)
            metrics[f"loss_{sigma:g}"] = float(state.model.loss(x[0], fresh, level, generator).mean())
    return metrics, samples


# ---- Scores by held-out observations alone, and the lap to keep -----------------------------------------------------


@torch.no_grad()
def judge(state: State, y: Tensor, corruption: Corruption, settings: Settings) -> tuple[dict, dict]:
    """Scores by held-out observations y (N, C + 1, H, W) alone, at about a tenth of a lap's cost:

    energy    E|X - v| - E|X - X'| / 2, a proper scoring rule, smaller is better: v are values hidden from the model, a
              fifth of those observed, X and X' its predictions; root mean square over the values, mean over n images
    covers_*  share of v within the central 50 and 90 % of 19 predictions
    frechet   proximal Frechet distance (Denoising Score Distillation, arXiv 2503.07578): of new images, corrupted, from the
              observations, in the principal components of these

    and what they were taken from, for `gain`: the energy of each image (n,), the components of both sets (2, N, d).
    """
    generator, steps, draws = generator_for(y.device, settings.seed, 0, 6), 8, 19  # the same noise for every lap

    def draw(y: Tensor) -> Tensor:
        if state.prior:
            return state.prior.draw(y, corruption, generator)
        return torch.cat([sample(state.model, part, steps, "sde2m", generator) for part in y.split(state.sample_batch)])

    lap = 3 * settings.steps * settings.batch + len(state.x0) * ranks()[1] * settings.sample_steps  # evaluations
    number = min(len(y), max(16, int(0.1 * lap / steps - len(y)) // draws))
    seen, share = y[:number], torch.full((number,), 0.2, device=y.device)
    rest = hide(seen, share, corruption.cell, generator)
    hidden = seen[:, -1:] - rest[:, -1:]  # (n, 1, H, W)
    x = draw(rest.repeat(draws, 1, 1, 1))
    v, X = seen[:, :-1], corruption.observe(x, seen[:, -1:].repeat(draws, 1, 1, 1), generator)[:, :-1]
    X = X.view(draws, *v.shape)
    values = (hidden.flatten(1).sum(1) * v.shape[1]).clamp_min(1)  # (n,): how many are hidden
    rank = (X < v).sum(0) + (X == v).sum(0) / 2  # 0 .. draws
    inside = {50: (rank >= 5) & (rank <= 14), 90: (rank >= 1) & (rank <= 18)}
    scores = {f"covers_{percent}": float((hidden * within).sum() / values.sum()) for percent, within in inside.items()}

    X, v = ((hidden * u).flatten(2).transpose(0, 1) for u in (X, v[None]))  # (n, draws, C H W), (n, 1, C H W)
    energy = torch.cdist(X, v).mean((1, 2)) - torch.cdist(X, X).sum((1, 2)) / (2 * draws * (draws - 1))
    energy = (energy / values.sqrt())[hidden.flatten(1).any(1)]
    new = state.prior.sample(len(y), generator) if state.prior else draw(torch.zeros_like(y))
    components = Gaussian(list(new.shape[1:]), 32).to(y.device).fit(y[:, :-1], generator)
    sets = torch.stack([transform(v[:, :-1], 0).flatten(1) for v in (corruption(new, generator), y)])
    sets = sets @ F.normalize(components.U, dim=0)
    scores |= dict(energy=float(energy.mean()), frechet=float(frechet_distance(*sets)))
    return scores, dict(energy=energy, sets=sets)


def gain(after: dict, before: dict, generator: torch.Generator) -> tuple[float, float]:
    """By how much `judge` finds a lap better than another, log(energy frechet), and the bootstrap error of that."""

    def total(parts: dict, images: Tensor, pairs: Tensor) -> Tensor:
        new, observed = parts["sets"][:, pairs]  # (R, N, d)
        return (parts["energy"][images].mean(1) * frechet_distance(new, observed)).log()

    n, N = len(after["energy"]), after["sets"].shape[1]
    images, pairs = (torch.randint(k, (64, k), generator=generator, device=generator.device) for k in (n, N))
    images[0], pairs[0] = torch.arange(n), torch.arange(N)  # the scores themselves
    gains = total(before, images, pairs) - total(after, images, pairs)
    return float(gains[0]), float(gains[1:].std())


def frechet_distance(x: Tensor, x0: Tensor) -> Tensor:
    """|m - m0|^2 + tr(C + C0 - 2 (C C0)^(1/2)), of the means and covariances of x and x0, both (.., N, d)."""
    (m, C), (m0, C0) = ((v.mean(-2), (v - v.mean(-2, keepdim=True))) for v in (x.double(), x0.double()))
    C, C0 = (c.mT @ c / (c.shape[-2] - 1) for c in (C, C0))
    root = torch.linalg.eigvals(C @ C0).real.clamp_min(0).sqrt().sum(-1)
    return (m - m0).square().sum(-1) + (C + C0).diagonal(dim1=-2, dim2=-1).sum(-1) - 2 * root


def keep(lap: int, weights: dict, parts: dict, best: dict | None) -> dict:
    """The lap to keep, this one or that before: the latest that is not worse, beyond the error, than the best so far, whose
    energy and sets are kept too. waited: for how many laps none has been better beyond the error."""
    parts = {name: value.cpu() for name, value in parts.items()}
    change, error = gain(parts, best, generator_for("cpu", lap)) if best else (1, 0)
    best = dict(best or {}, waited=0 if change > error else best["waited"] + 1)
    if change > -error:
        best |= dict(lap=lap, average={name: value.clone() for name, value in weights.items()})
    return best | (parts if change > 0 else {})


# ---- Pictures -------------------------------------------------------------------------------------------------------


def picture_images(path: Path, y: Tensor, x0: Tensor | None, samples: dict) -> None:
    """Rows: observation, two posterior samples, posterior mean and standard deviation, truth; samples of the prior."""
    from matplotlib.figure import Figure

    observed = y[:, :-1].expand(-1, 3 if y.shape[1] == 2 else -1, -1, -1)
    if observed.shape[1] == 3:
        red = torch.tensor([1.2, -0.8, -0.8], device=y.device).view(3, 1, 1)
        observed = torch.where(y[:, -1:] > 0, observed, red)
    rows = {"observation": observed, "sample 1": samples["x"][0], "sample 2": samples["x"][1], "mean": samples["mean"]}
    rows |= {"std (white: 1)": 4 * samples["std"] - 2} | ({} if x0 is None else {"truth": x0}) | {"prior": samples["prior"]}
    columns = min(10, len(y))
    figure = Figure((0.9 * columns + 1.2, 0.9 * len(rows)), layout="constrained")
    for line, (label, images) in zip(figure.subplots(len(rows), columns, squeeze=False), rows.items()):
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for axis, image in zip(line, ((images + 2) / 4).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=100)


def picture_curves(path: Path, history: list[dict]) -> None:
    """The metrics, and the held-out loss by noise level, against the lap."""
    from matplotlib.figure import Figure

    names = history[-1].keys()
    groups = [("psnr", "psnr_mean"), ("energy", "frechet", "spread", "covers_90")]
    panels = [[k for k in names if k in group] for group in groups] + [[k for k in names if "loss_" in k]]
    panels = [keys for keys in panels if keys]
    figure = Figure((5 * len(panels), 4), layout="constrained")
    for axis, keys in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for key in keys:
            axis.plot(*zip(*[(line["lap"], line[key]) for line in history if key in line]), "o-", label=key)
        axis.set(xlabel="lap", yscale="log" if "energy" in keys else "linear")
        axis.legend()
    figure.savefig(path, dpi=100)


# ---- The run folder: config.json, checkpoint.pt, metrics.jsonl, lap_NN.png, curves.png -------------------------------


def save_checkpoint(folder: Path, state: State, settings: Settings, data: str, best: dict | None = None) -> None:
    """Writes checkpoint.pt, of tensors and plain types alone; a failure leaves the one before whole. Under torchrun all
    processes must call it together, before or after an E-step, and the first one writes. best: the lap to sample from."""
    state.check()
    x0 = gathered(state.x0)
    if ranks()[0] > 0:
        return
    checkpoint = dict(
        settings=asdict(settings), data=data, best=best, x_shape=state.denoiser.x_shape, lap=state.lap, step=state.step,
        drawn=len(x0) if state.drawn == len(state.x0) else state.drawn, x0=x0, losses=state.losses,
        denoiser=state.denoiser.state_dict(), average=state.average.state_dict(), optimizer=state.optimizer.state_dict(),
    )  # fmt: skip
    temporary = folder / "checkpoint.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / "checkpoint.pt")
    except (OSError, RuntimeError) as error:  # torch.save makes the one into the other
        temporary.unlink(missing_ok=True)
        raise DiffEMError(f"cannot write {folder / 'checkpoint.pt'} ({error}); the one before, if any, is whole") from error


def gathered(x0: Tensor) -> Tensor:
    """The reconstructions of all processes, in the order of the observations: of R, rank r has r, r + R, r + 2 R, .."""
    size = ranks()[1]
    if size == 1:
        return x0
    number = torch.tensor(len(x0), device=x0.device)
    dist.all_reduce(number)
    padded = torch.cat([x0, x0.new_zeros(-(-int(number) // size) - len(x0), *x0.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, 1).flatten(0, 1)[: int(number)]


def load_checkpoint(folder: str | Path) -> dict:
    """What `save_checkpoint` wrote; runs no code from the file. Raises DiffEMError where it is anything else."""
    path = Path(folder) / "checkpoint.pt"
    require(path.is_file(), f"no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["settings"] = Settings(**checkpoint["settings"])
    except Exception as error:  # junk raises many kinds
        raise DiffEMError(f"{path} is not a checkpoint of DiffEM, or not a whole one") from error
    return checkpoint


def restore_state(checkpoint: dict, corruption: Corruption, config: Config, device="cpu", data_device="cpu") -> State:
    """The state that `save_checkpoint` was given; under torchrun, this process's share of it, however many there were."""
    rank, size = ranks()
    try:
        x0 = checkpoint["x0"][rank::size].to(data_device)
        for name in ("w", "gain"):
            setattr(corruption, name, checkpoint["denoiser"][f"corruption.{name}"])
        denoiser = new_denoiser(Gaussian(checkpoint["x_shape"]), corruption.to(device), config, device)
        state = new_state(x0, denoiser, config)
        state.denoiser.load_state_dict(checkpoint["denoiser"])
        state.average.load_state_dict(checkpoint["average"])
        state.optimizer.load_state_dict(checkpoint["optimizer"])
        state.losses[:] = checkpoint["losses"]
        state.lap, state.step = checkpoint["lap"], checkpoint["step"]
        state.drawn = len(range(rank, checkpoint["drawn"], size))
    except (KeyError, ValueError, RuntimeError) as error:
        raise DiffEMError("the weights in the checkpoint are not those of its own settings") from error
    return state


def best_model(checkpoint: dict, corruption: Corruption, device="cpu") -> Denoiser:
    """The model of the lap that was kept, or else of the last one."""
    best = checkpoint.get("best")
    return restore_state(checkpoint | (dict(average=best["average"]) if best else {}), corruption, checkpoint["settings"], device).model


def load(folder: str | Path, device="cpu", corruption: Corruption | None = None) -> Denoiser:
    """The trained model of a run folder, for `sample`. A corruption of your own must be given."""
    checkpoint = load_checkpoint(folder)
    settings = checkpoint["settings"]
    corruption = corruption or corruption_class(settings.corruption, trusted=False)(**settings.parameters)
    return best_model(checkpoint, corruption, device)


# ---- Command line ---------------------------------------------------------------------------------------------------


def corruption_class(name: str, trusted: bool = True) -> type[Corruption]:
    """By its name, or from path/to/file.py:ClassName, which runs the file: only where the user named it, `trusted`."""
    if name in CORRUPTIONS:
        return CORRUPTIONS[name]
    path, colon, class_name = name.rpartition(":")
    require(colon, f"unknown corruption {name!r}: {', '.join(CORRUPTIONS)}, or path/to/file.py:ClassName")
    require(trusted, f"the run has a corruption of its own: give --corruption {name} again, if you trust that file")
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        corruption = getattr(module, class_name)
    except Exception as error:  # whatever the user's file raises
        raise DiffEMError(f"cannot load the corruption {name} ({type(error).__name__}: {error})") from error
    require(inspect.isclass(corruption) and issubclass(corruption, Corruption), f"{name} is not a subclass of Corruption")
    return corruption


def parameters_of(corruption: type[Corruption]) -> dict:
    """The arguments of a corruption, with their defaults."""
    parameters = {name: p.default for name, p in inspect.signature(corruption).parameters.items()}
    open_ended = [name for name, default in parameters.items() if default is inspect.Parameter.empty]
    require(not open_ended, f"{corruption.__name__}: the arguments {open_ended} need defaults")
    return parameters


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise DiffEMError(message)


def make_parser() -> Parser:
    """Flags without defaults, so that those given can be told from the rest."""
    corruptions = "; ".join(f"{name} {describe(parameters_of(c))}" for name, c in CORRUPTIONS.items())
    presets = "; ".join(f"{' '.join(key)} {describe(values)}" for key, values in PRESETS.items())
    parser = Parser(
        description="DiffEM: learn to restore images, and a model of the clean ones, from corrupted images alone.",
        epilog=f"Corruptions, with their own flags and defaults: {corruptions}. What presets change: {presets}.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110),
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
    )  # fmt: skip
    run, data, method = (parser.add_argument_group(title) for title in ("run", "data and corruption", "method"))
    run.add_argument("--name", help="folder below runs/ (default: data set, corruption and a number)")
    run.add_argument("--resume", metavar="runs/NAME", help="go on with this run, which may be given more --laps")
    run.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    run.add_argument("--data-device", default="auto", help="where observations and reconstructions are kept: auto, cpu or cuda"
                     " (default: auto, the device where they take less than half of its memory, else cpu)")  # fmt: skip
    for f in fields(Settings):
        if isinstance(f.default, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        else:
            kind = dict(type=int, nargs="*") if isinstance(f.default, tuple) else dict(type=type(f.default))
        if f.name != "parameters":
            group, text = method if f.name in Config.__dataclass_fields__ else data, f.metadata["help"]
            group.add_argument("--" + f.name.replace("_", "-"), help=f"{text} (default: {f.default})", **kind)
    return parser


def parse(argv: list[str]) -> tuple[Settings, dict]:
    """The settings, and the flags of this start alone: device, data_device, and where they are given name, and resume, with
    the checkpoint.

    A setting not given as a flag has the value of the run to resume; else of the data set's preset; else its default.
    """
    options, rest = make_parser().parse_known_args(argv)
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(options).items()}
    of_start = "device data_device name resume"
    start = {name: given.pop(name) for name in of_start.split() if name in given}
    devices = start["device"], start["data_device"]
    for name in devices:
        require(name in ("auto", "cpu", "cuda"), f"unknown device {name!r}: auto, cpu or cuda")
    require("cuda" not in devices or torch.cuda.is_available(), "no CUDA device can be used here: --device cpu")
    start["device"] = "cuda" if torch.cuda.is_available() and start["device"] != "cpu" else "cpu"
    require("name" not in start or "resume" not in start, "--resume goes on in the run's own folder: no --name")
    saved = {}
    folder = start.get("resume")
    if folder:
        start["checkpoint"] = load_checkpoint(folder)
        saved = asdict(start["checkpoint"]["settings"])

    if given.get("observations"):
        given.setdefault("dataset", "observations")
    dataset = (given | saved).get("dataset", "digits")
    presets = [p for d, p in PRESETS if d == dataset]
    require(presets, f"unknown data set {dataset!r}: {', '.join(dict.fromkeys(d for d, _ in PRESETS))}")
    best = "published" if start["device"] == "cuda" and "published" in presets else "small"
    preset = (given | saved).get("preset", best)
    require(preset in presets, f"{dataset} has no preset {preset!r}: {', '.join(presets)}")
    values = dict(dataset=dataset, preset=preset) | PRESETS[dataset, preset]
    values |= dict(rescale=(values | given).get("smoothness", 0) > 0 and given.get("corruption", "mask") in ALIKE) | saved
    corruption = corruption_class((values | given).get("corruption", "mask"), trusted="corruption" in given)
    own = Parser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for name, default in parameters_of(corruption).items():
        kind = dict(type=int, nargs="*") if isinstance(default, tuple) else dict(type=type(default))
        own.add_argument("--" + name.replace("_", "-"), **kind)
    flags = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(own.parse_args(rest)).items()}
    kept = {name: value for name, value in values.get("parameters", {}).items() if name in parameters_of(corruption)}
    given["parameters"] = parameters_of(corruption) | kept | flags
    if corruption is Jpeg and dataset == "observations" and not saved and "quality" not in flags:
        given["parameters"] |= jpeg_parameters(image_files(Settings(**values | given)))
    for name in saved.keys() - {"laps", "patience", "data_dir", "observations", "masks"}:
        now = given.get(name, saved[name])
        require(now == saved[name], f"{folder} was made with {name} {saved[name]}, not {now}")
    return Settings(**values | given), start


def describe(parameters: dict) -> str:
    return "(" + ", ".join(f"{name}={str(value)[:40]}" for name, value in parameters.items() if value != ()) + ")"


def work_before(lap: int, settings: Settings, number: int) -> int:
    """Evaluations of the network in the laps before this one. A step is three an image: one forwards, two backwards."""
    return sum(3 * settings.steps * settings.batch + number * settings.e_step_sampler(i)[0] for i in range(1, lap))


def new_folder(name: str | None, settings: Settings) -> Path:
    """runs/NAME, which must not exist yet; without a name, the first number that is free."""
    stem = f"{settings.dataset}-{settings.corruption.rpartition(':')[2].lower()}"
    free = (f"{stem}-{i}" for i in itertools.count(1) if not Path("runs", f"{stem}-{i}").exists())
    folder = Path("runs", name or next(free))
    require(not folder.exists(), f"{folder} exists: choose another --name, or go on with it by --resume {folder}")
    folder.mkdir(parents=True)
    return folder


def report(
    state: State, held_out: tuple, corruption: Corruption, settings: Settings, folder: Path, history: list, best: dict | None
) -> tuple[str, dict | None]:
    """Adds a lap to `history`, to metrics.jsonl and to the pictures. Returns its line, and the best lap from now on."""
    metrics, samples = evaluate(state, *held_out, corruption, settings)
    if state.lap:
        metrics = {"loss": float(state.losses.mean())} | metrics
    scores, parts = judge(state, held_out[0], corruption, settings)
    metrics |= scores
    if state.lap:
        best = keep(state.lap, state.average.state_dict(), parts, best)
    history.append({"lap": state.lap} | {name: round(value, 5) for name, value in metrics.items()})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    picture = folder / f"lap_{state.lap:02d}.png"
    picture_images(picture, *held_out, samples)
    picture_curves(folder / "curves.png", history)
    shown = {name: value for name, value in metrics.items() if not name.startswith("loss_")}
    return f"lap {state.lap}/{settings.laps}  " + "  ".join(f"{name} {value:.4g}" for name, value in shown.items()), best


@contextmanager
def stop_signals():
    """A list to which a first Ctrl-C (or SIGTERM) adds, so that a run can stop between two steps. A second one kills."""
    received = []

    def receive(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def any_rank(condition: bool) -> bool:
    """Does it hold in any of the processes? All must call it together."""
    if ranks()[1] == 1:
        return condition
    votes = torch.tensor(int(condition))
    dist.all_reduce(votes)
    return votes > 0


def train(y: Tensor, data: str, held_out: tuple, corruption: Corruption, settings: Settings, folder: Path, start: dict, state) -> int:
    """EM with a progress bar, a report a lap, and a checkpoint a lap and every three minutes. Returns the exit code.

    data: a hash of all observations, to be kept; held_out: observations for the metrics, and their truth; state: to go on
    from, or None. Under torchrun, y are those of this process, and the first one alone prints and writes.
    """
    rank, size = ranks()
    history, share, best = [], replace(settings, batch=settings.batch // size), None
    if state and rank == 0:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        history = [line for line in map(json.loads, lines) if line["lap"] < state.lap + (state.drawn == len(y))]
        best = start["checkpoint"].get("best")

    def work(state: State | None) -> int:  # evaluations of the network, done so far
        if state is None or state.lap == 0:
            return 0
        before = work_before(state.lap, share, len(y))
        return before + 3 * state.step * share.batch + state.drawn * settings.e_step_sampler(state.lap)[0]

    saved, total, hidden = time.monotonic(), work_before(settings.laps + 1, share, len(y)), rank > 0 or None
    with stop_signals() as stop, tqdm(total=total, initial=work(state), unit="eval", unit_scale=True, disable=hidden) as bar:
        for state in em(y, corruption, settings, state, start["device"]):
            bar.update(work(state) - bar.n)
            if state.step % 20 == 0 and 0 < state.step < settings.steps:
                bar.set_postfix(lap=state.lap, loss=f"{state.losses[state.step - 20 : state.step].mean():.3f}")
            complete = state.drawn == len(y)
            if complete and rank == 0:
                line, best = report(state, held_out, corruption, settings, folder, history, best)
                bar.write(line)
            # Several processes can stop together, or gather their reconstructions, at steps that they all come to
            common = size == 1 or complete or state.drawn == 0 and state.step % 20 == 0
            stopping = common and any_rank(bool(stop))
            if stopping or complete or common and any_rank(time.monotonic() - saved > 180):
                save_checkpoint(folder, state, settings, data, best)
                saved = time.monotonic()
            if stopping:
                bar.write(f"stopped in lap {state.lap}; to go on: python diffem.py --resume {folder}")
                return 130
            if complete and any_rank(bool(best and settings.patience and best["waited"] >= settings.patience)):
                break
    if rank == 0:
        conclude(history, best, folder)
    return 0


def conclude(history: list, best: dict | None, folder: Path) -> None:
    """The last lines of a run."""
    chosen = history[-1]
    if best:
        chosen = next(line for line in history if line["lap"] == best["lap"])
        print(f"kept: lap {best['lap']} of {history[-1]['lap']}, by held-out observations (energy {chosen['energy']:.3g}, "
              f"proximal Frechet distance {chosen['frechet']:.3g}): a heuristic")  # fmt: skip
    if "psnr_mean" in chosen:
        first, last = history[0]["psnr_mean"], chosen["psnr_mean"]
        print(f"PSNR of the posterior mean: Gaussian prior {first:.2f} dB, DiffEM {last:.2f} dB ({last - first:+.2f} dB)")
    print(f"pictures: {folder}/lap_{chosen['lap']:02d}.png, {folder}/curves.png")


def run(argv: list[str]) -> int:
    settings, start = parse(argv)
    device, corruption = start["device"], corruption_class(settings.corruption)(**settings.parameters)
    if (settings.dataset, "published") in PRESETS and settings.preset == "small" and device == "cpu" and "resume" not in start:
        print("no GPU, so the small preset: the published one would take months here (--preset published)")
    return observe_and_train(settings, start, corruption)


def observe_and_train(settings: Settings, start: dict, corruption: Corruption) -> int:
    (rank, size), device = ranks(), start["device"]
    y, y_held_out, x0_held_out = observe(settings, corruption)
    require(bool(y.isfinite().all()), f"the corruption {settings.corruption} gives values that are not finite")
    data, number, state = hashlib.sha256(y.numpy().tobytes()).hexdigest(), len(y), None
    y = y[rank::size]
    if start["data_device"] == "auto":
        fits = device == "cpu" or 2 * 1.5 * y.nbytes < torch.cuda.mem_get_info()[0]  # y, and x0 in float16
        start["data_device"] = device if fits else "cpu"
    y = y.to(start["data_device"])
    if "resume" in start:
        folder, checkpoint = Path(start["resume"]), start["checkpoint"]
        require(data == checkpoint["data"], f"{folder} was made from other data")
        state = restore_state(checkpoint, corruption, settings, device, start["data_device"])
    else:
        folder = new_folder(start.get("name"), settings) if rank == 0 else None
    if rank == 0:
        (folder / "config.json").write_text(json.dumps(asdict(settings), indent=1) + "\n")
    on = f"{size} processes on {device}" if size > 1 else device
    print(f"{folder}: {number} observations, {settings.corruption} {describe(settings.parameters)}, {on}")
    if corruption.masks is not None:
        corruption.masks = corruption.masks.to(device)
    truth = None if x0_held_out is None else x0_held_out.to(device)
    return train(y, data, (y_held_out.to(device), truth), corruption, settings, folder, start, state)


@contextmanager
def process_group():
    """Joins the other processes of torchrun, if that started this one. The first one alone prints."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The others wait while the first one takes metrics and pictures
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=2))
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        yield
        dist.destroy_process_group()
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        print("diffem: another process of this run has died; the last checkpoint is whole: --resume", file=sys.stderr)
        sys.exit(2)


def main(argv: list[str] | None = None) -> int:
    """The command line: returns the exit code, 2 after an error that the user can mend."""
    try:
        with process_group():
            return run(sys.argv[1:] if argv is None else argv)
    except (DiffEMError, OSError) as error:
        if ranks()[0] == 0:
            print(f"diffem: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.modules["diffem"] = sys.modules["__main__"]  # what a user's own corruption imports from
    code = main()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # Gloo's threads may outlive the process group, and abort Python as it ends
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
