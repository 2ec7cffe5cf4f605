"""DiffEM: learn to restore images, and a model of the clean ones, from corrupted images alone.

After Hosseintabar et al., "DiffEM: Learning from Corrupted Data with Diffusion Models via Expectation
Maximization", arXiv 2510.12691. Clean images x0 ~ p* are never seen, only y ~ Q(y | x0), Q a known
corruption. A conditional diffusion model q(x0 | y) is trained and sampled in turn:

    X(0)_i ~ p0(x0 | y_i)                     p0: a Gaussian, fitted to the observations by EM
    for lap = 1 .. laps:
        M-step   theta <- argmin E_{x0 in X(lap-1)} E_{y ~ Q(.|x0)} E_{sigma, eps}
                              lambda(sigma) || D_theta(x0 + sigma eps, sigma, y) - x0 ||^2         (Eq. 10)
        E-step   X(lap)_i ~ q_theta(x0 | y_i)    by diffusion, from sigma_max down to sigma_min

In the laps, the E-step uses the real observations y_i. The M-step draws a new y ~ Q for every batch.

    python diffem.py                        # 8x8 digits, half of the pixels missing: minutes on a laptop
    python diffem.py --dataset cifar10      # the paper's network and laps (without a GPU, a small version)
    python diffem.py --observations FOLDER  # your own corrupted images
    torchrun --nproc-per-node=8 diffem.py --dataset cifar10

Symbols   x0 clean, xt = x0 + sigma eps noisy, y observation, sigma noise level, eps ~ N(0, 1), D denoiser,
          A forward map of the corruption, m its mask, s standard deviation of the observation's noise,
          T an orthonormal basis, in which y says w (a precision) and h of each coefficient of T x,
          S spectrum of a Gaussian, G and v its mean and variance of x0 given xt and y
Words     lap: one EM iteration. start: the Gaussian p0 and its draws X(0), which are lap 0. evaluation: one
          pass of an image through the network. unconditional: given y = 0, "nothing observed"; the network
          then samples the model of clean images
Shapes    images x (B, C, H, W), values from -2 (black) to 2 (white), so that their variance is near 1
          observations y (B, C + 1, H, W): the measurement, and a last channel that is 1 where a pixel was
          observed, else 0; where it is 0, so is the measurement
"""

import argparse
import copy
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import signal
import sys
import time
import zipfile
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm

import export  # files and command lines: its numpy part
from export import METHODS, DiffEMError, require

# Pillow, matplotlib, torchvision and scikit-learn are imported where they are used: the method needs none of
# them, and together they would double the time of `import diffem`.


def generator_for(device, *key: int) -> torch.Generator:
    """A generator seeded by integers, so that a run needs no stored state to resume. M-step: (seed, lap,
    step, rank). E-step: (seed, lap, steps + images drawn, rank). Else (seed, 0, k): k = 0 the observations, 1
    the start, 2 the weights, 3 a report's samples, 4 the order of images, 5 their squares, 6 the scores."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)
    return torch.Generator(device).manual_seed(int(seed))


def on_cpu(generator: torch.Generator) -> torch.Generator:
    """The generator, or one on the CPU, seeded by its seed: reading a number from a GPU would wait for it."""
    return generator if generator.device.type == "cpu" else generator_for("cpu", generator.initial_seed())


@contextmanager
def torch_seeded_by(generator: torch.Generator):
    """Seeds torch's global generator, for initial weights, dropout and svd_lowrank, and restores it after."""
    with torch.random.fork_rng([generator.device] if generator.device.type == "cuda" else []):
        # + 1: with the same seed, dropout would repeat the generator's numbers
        torch.manual_seed(generator.initial_seed() + 1)
        yield


def at_most(number: int, image: Tensor) -> int:
    """How many images like this one to take at once: `number`, or as many as have 2^23 values."""
    return min(number, max(1, 2**23 // image.numel()))


def randn_like(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator, device=x.device)


def cut(x: Tensor, size: tuple, grid: int, generator: torch.Generator) -> Tensor:
    """A part of a size (H, W) of each image x (B, C, ..), its corner at a random multiple of `grid`."""
    for axis, n in zip((2, 3), size):
        places = (x.shape[axis] - n) // grid + 1
        first = grid * torch.randint(places, (len(x), 1, 1, 1), generator=generator, device=x.device)
        i = torch.arange(n, device=x.device).view([-1, 1] if axis == 2 else [-1])
        x = x.take_along_dim(first + i, axis)
    return x


def values(pixels: Tensor) -> Tensor:
    """Images in floating point, from -2 to 2. Those of files are kept as bytes, which take less memory."""
    return pixels if pixels.is_floating_point() else pixels * (4 / 255) - 2


def ranks() -> tuple[int, int]:
    """This process's number and the number of processes: (0, 1) except under torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def any_rank(condition: bool) -> bool:
    """Is it true in any of the processes? All must call it together."""
    votes = torch.tensor(int(condition))
    if ranks()[1] > 1:
        dist.all_reduce(votes)
    return bool(votes)


# ---- Settings of the method -------------------------------------------------------------------------------
Pair = tuple[Tensor, Tensor]
Step = tuple[float, float, float, float, float]


def setting(default, help: str, low: float = 0, high: float = 1e6, choices: tuple = ()):
    """A field that is also a flag: a number in [low, high], or one of the choices, if any."""
    help += f" [{', '.join(choices)}]" if choices else ""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclass
class Config:
    """The settings of `fit`. Raises DiffEMError where a value is of a wrong type or out of its range."""

    channels: tuple = setting((32, 64), "channels of each level of the U-Net, the finest first", 1)
    blocks: int = setting(1, "residual blocks in each level, on either side of the U-Net", 1, 100)
    attention: tuple = setting((), "levels of the U-Net with self-attention; 0 is the finest")
    heads: int = setting(4, "attention heads", 1)
    dropout: float = setting(0.0, "dropout rate in the residual blocks", 0, 0.99)
    sigma_min: float = setting(1e-3, "lowest noise level", 1e-6)
    sigma_max: float = setting(1e2, "highest noise level", 1e-6)
    laps: int = setting(6, "EM iterations", 1)
    steps: int = setting(400, "optimiser steps in each lap", 1)
    batch: int = setting(64, "images in each optimiser step", 1)
    lr: float = setting(1e-3, "learning rate of Adam; falls to 0 in the second half of the laps", 1e-12)
    clip: float = setting(1.0, "largest norm of the gradient", 1e-12)
    precision: str = setting("auto", "number format of the U-Net", choices=("auto", "float32", "bfloat16"))
    compile: str = setting("auto", "compile the U-Net; auto: in long GPU runs", choices=("auto", "on", "off"))
    ema: float = setting(0.99, "decay of the weights' moving average, used in the E-step", 0, 0.999999)
    p_unconditional: float = setting(0.1, "probability of y = 0 in training; as often, a part is 0", 0, 1)
    flip: bool = setting(False, "mirror training images at random")
    jitter: bool = setting(False, "change hue and saturation of training images slightly")
    crop: int = setting(0, "train on random squares of so many pixels, of images of any size; 0: whole")
    rescale: bool = setting(False, "train on smaller copies too, down to half the size")
    method: str = setting("sde2m", "sampler", choices=METHODS)
    first_method: str = setting("ddpm", "sampler of E-steps in the first part of the laps", choices=METHODS)
    first_part: float = setting(0.5, "fraction of the laps with --first-method", 0, 1)
    sample_steps: int = setting(8, "evaluations to restore an image", 1, 1e5)
    first_sample_steps: int = setting(16, "in lap 1, growing if fewer; 0: --sample-steps", 0, 1e5)
    sample_batch: int = setting(512, "images sampled at once; halved where memory is short", 1)
    unconditional_steps: int = setting(32, "evaluations to sample a new image", 1, 1e5)
    smoothness: float = setting(0.0, "first guess of the spectrum's power in the start; 0: low rank", 0, 6)
    start_rank: int = setting(32, "rank of the start's covariance if smoothness is 0", 1)
    start_laps: int = setting(8, "EM iterations that fit the start", 1)
    preconditioning: str = setting("gaussian", "edm: the paper's", choices=("gaussian", "edm"))
    seed: int = setting(0, "seed of all random numbers", 0, 2**63)

    def __post_init__(self):
        for f in (f for f in fields(self) if f.metadata):
            value, name = getattr(self, f.name), f.name.replace("_", "-")
            if isinstance(f.default, tuple):
                value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
                setattr(self, f.name, value)
            kinds = {float: (int, float), tuple: int}.get(type(f.default), type(f.default))
            low, high, words = (f.metadata[key] for key in ("low", "high", "choices"))
            for v in value if isinstance(value, tuple) else (value,):
                require(isinstance(v, kinds), f"--{name} cannot be {v!r}")
                require(not words or v in words, f"unknown {name} {v!r}: {', '.join(words)}")
                ok = isinstance(v, str) or low <= v <= high
                require(ok, f"--{name} must be from {low:g} to {high:g}, not {v}")
        last = len(self.channels) - 1
        odd = [i for i in self.attention if i > last or self.channels[i] % self.heads]
        require(last >= 0, "--channels needs a number for each level")
        require(not odd, f"--attention {odd}: levels are 0 to {last}, with channels for {self.heads} heads")
        require(self.sigma_min < self.sigma_max, "--sigma-min must be below --sigma-max")

    def e_step_sampler(self, lap: int) -> tuple[int, str]:
        """Evaluations of each image, and method, in the E-step of a lap >= 1. A few steps of ddpm draw too
        narrowly. In the first part of the laps this speeds EM up, like over-relaxation. Later laps need the
        right spread: else the model becomes too certain of its own draws."""
        last = self.first_part * self.laps
        if lap > last:
            return self.sample_steps, self.method
        first = self.first_sample_steps or self.sample_steps
        growing = first * (self.sample_steps / first) ** ((lap - 1) / last)
        return round(max(first, growing)), self.first_method


# ---- Corruptions y ~ Q(. | x0) ----------------------------------------------------------------------------
#
# y = m (A x + s eps), m a mask. Each corruption has an orthonormal basis T, in which what y says about x is
# (nearly) diagonal: a precision w >= 0, and h, w times an estimate, for each coefficient t of T x,
#     log p(y | x) = sum (h t - w t^2 / 2) + const.
# T x = D_H (O x) D_W^T: D is the DCT of blocks, of 1 pixel (none), 8 (JPEG) or the image. O is the DCT of the
# channels: red, green and blue become grey, red - blue and red - 2 green + blue, the opponent colours.


def fractions(size: int, device: torch.device) -> Tensor:
    """(size,): 0, 1 / size, 2 / size, .. (ONNX cannot divide by a number that depends on an input's size.)"""
    i = torch.arange(size, device=device)
    return i / (i[-1:] + 1)


def dct(block: int, size: int, device: torch.device) -> Tensor:
    """D (size, size), orthonormal: DCT-II matrices of `block` (0: size) on the diagonal, the last smaller."""
    i = torch.arange(size, device=device)
    k = i % block if block > 0 else i  # both the place within the block and the frequency
    n = i[-1:] + 1 - i + k
    n = (n.clamp_max(block) if block > 0 else n)[:, None]
    # D_ki = sqrt(2 / n) cos(pi k (i + 1/2) / n), and sqrt(1 / n) where k = 0
    D = ((1 + (k > 0).float()[:, None]) / n).sqrt() * torch.cos(math.pi * k[:, None] * (k + 0.5) / n)
    return D * ((i - k)[:, None] == i - k)


def transform(x: Tensor, block: int) -> Tensor:
    """T x = D_H (O x) D_W^T, (B, C, H, W) -> (B, C, H, W)."""
    t = (dct(0, x.shape[1], x.device) @ x.flatten(2)).view(x.shape)
    return t if block == 1 else dct(block, x.shape[-2], x.device) @ t @ dct(block, x.shape[-1], x.device).T


def inverse(t: Tensor, block: int) -> Tensor:
    """x = T^T t."""
    if block != 1:
        t = dct(block, t.shape[-2], t.device).T @ t @ dct(block, t.shape[-1], t.device)
    return (dct(0, t.shape[1], t.device).T @ t.flatten(2)).view(t.shape)


class Corruption(nn.Module):
    """The known law y ~ Q(. | x0): one object corrupts in the data set, the M-step and every metric.

    A subclass defines `A` if it is not the identity, `mask` if it hides pixels, `eps` if the noise is not
    white, `observe` if the noise depends on x. The arguments of its __init__ have defaults; they become
    flags, and attributes if passed to super().__init__. w and h are measured on draws of the start, in the
    basis that `block` names, and need not be exact. A subclass of `Linear` gives them by a formula instead.
    """

    __constants__ = ["noise", "block", "patch"]
    noise = 0.0  # s
    block = 1  # side of the blocks of T; 0: the whole image, which says nothing if a pixel is hidden
    patch = 1  # side of the squares that are observed together
    multiple = 1  # the sides of images must be multiples of this
    rescale = False  # the default of --rescale: True if every image loses the same detail
    smoothness = 0.0  # the default of --smoothness is at least this
    limits = {}  # of the arguments by name: (low, high)

    def __init__(self, **parameters):
        super().__init__()
        for name, value in parameters.items():
            setattr(self, name, value)
            if name in self.limits:
                low, high = self.limits[name]
                message = f"--{name.replace('_', '-')} must be from {low} to {high}, not {value}"
                if name == "noise" and value > 4:
                    message += f": {value:g} of 255 grey levels are {value * 4 / 255:.2g} here"
                require(low <= value <= high, message)
        self.register_buffer("masks", None, persistent=False)  # (K, 1, H, W), observed: in place of `mask`
        self.register_buffer("masked", torch.tensor(False))  # trained on observations with missing pixels?
        self.register_buffer("w", torch.zeros(1, 1, 1))  # (C, n, n), by `learn`
        self.register_buffer("slope", torch.zeros(1, 1, 1))  # (C, n, n): h / T y

    def A(self, x: Tensor) -> Tensor:
        """The measurement without noise and mask: (B, C, H, W) -> (B, C, H, W). Some values of x are outside
        [-2, 2], since x may be a sample: clamp it if A needs that."""
        return x

    def mask(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """(B, C, H, W) -> (B, 1, H, W): 1 where a pixel is observed, else 0."""
        return torch.ones_like(x[:, :1])

    def eps(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The noise of the measurement of x, of variance 1 in each value."""
        return randn_like(x, generator)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """y ~ Q(. | x): (B, C, H, W) -> (B, C + 1, H, W)."""
        most = at_most(1024, x[0]) if len(x) else 0
        if len(x) > most:  # a data set: in parts, to save memory
            return torch.cat([self(part, generator) for part in x.split(most)])
        x = values(x)
        if self.masks is None:
            return self.observe(x, self.mask(x, generator), generator)
        i = torch.randint(len(self.masks), (len(x),), generator=generator, device=x.device)
        # Crops and smaller copies take a part of a mask; what is observed together stays together
        m = cut(self.masks[i].to(x.dtype), x.shape[2:], self.patch, generator)
        return self.observe(x, m, generator)

    def observe(self, x: Tensor, m: Tensor, generator: torch.Generator) -> Tensor:
        """y = m (A x + s eps), with m (B, 1, H, W) as its last channel."""
        value = self.A(x)
        return torch.cat([m * (value + self.noise * self.eps(x, generator) if self.noise else value), m], 1)

    def hides_pixels(self) -> bool:
        """Are pixels missing in its observations?"""
        return self.masks is not None or type(self).mask is not Corruption.mask

    def observed(self, y: Tensor) -> Tensor:
        """m, (B, 1, H, W). If T is of the whole image, (B, 1, 1, 1): 1 only if no pixel is missing."""
        m = y[:, -1:]
        return m.amin((2, 3), keepdim=True) if self.block == 0 else m

    def information(self, y: Tensor) -> Pair:
        """w and h: (B, C + 1, H, W) -> both (B, C, H, W). In a block that is observed in part, gaps are
        interpolated, and w and h are multiplied by the fraction observed. An image that is one block must be
        observed whole: else w and h are 0."""
        i, j = [torch.arange(n, device=y.device) % self.w.shape[-1] for n in y.shape[-2:]]
        m = self.observed(y)
        if self.block > 1:
            y = interpolate(y, torch.zeros_like(y[:1, :-1]))
            # The means of blocks: their first coefficients alone
            m = inverse(((i[:, None] == 0) & (j == 0)) * transform(m, self.block), self.block)
        t, w, slope = transform(y[:, :-1], self.block), self.w[:, i][:, :, j], self.slope[:, i][:, :, j]
        return (m * w).expand_as(t), m * slope * t

    def learn(self, x: Tensor, generator: torch.Generator) -> None:
        """Measures w and h for each channel and coefficient of a block, on x (N, C, H, W) like clean ones."""
        (N, C, H, W), n = x.shape, max(1, self.block)
        require(min(H, W) >= n, f"images of {H}x{W} pixels are smaller than a block of {n}x{n}")
        x = x[..., : H // n * n, : W // n * n].clamp(-2, 2)
        y = self.observe(x, torch.ones_like(x[:, :1]), generator)
        t, u = transform(x, self.block), transform(y[:, :-1], self.block)
        # The best linear estimate of t from u is r u,  r = E[t u] / E[u^2].  Its error is
        #     E[t^2] - 2 r E[t u] + r^2 E[u^2] = 1 / (1 / E[t^2] + w)
        moments = [v.view(N, C, H // n, n, W // n, n).mean((0, 2, 4)) for v in (t * t, t * u, u * u)]
        tt, tu, uu = moments[0].clamp_min(1e-9), moments[1], moments[2].clamp_min(1e-9)
        most = (tt.sum() / uu.sum()).sqrt().clamp_min(1)  # a larger r means that u is almost always 0
        r = (tu / uu).clamp(-most, most)
        precision = 1 / (tt - 2 * r * tu + r**2 * uu).clamp_min(1e-6)
        self.w, self.slope = (precision - 1 / tt).clamp_min(0), precision * r


class Linear(Corruption):
    """A = T^T k T with a known k, `transfer`. Then w = k^2 / s^2 and h = k T y / s^2, 0 where a pixel is
    missing. An s below 1e-3 counts as 1e-3."""

    def transfer(self, y: Tensor) -> Tensor:
        """k, in a shape that expands to (H, W)."""
        return torch.ones(1, 1, device=y.device)

    def information(self, y: Tensor) -> Pair:
        # p x p pixels share one noise value: p s in T y. A larger precision would hide 1 / S in float32
        k, precision = self.transfer(y), self.observed(y) / max((self.patch * self.noise) ** 2, 1e-6)
        t = transform(y[:, :-1], self.block)
        return (precision * k**2).expand_as(t), precision * k * t

    def learn(self, x: Tensor, generator: torch.Generator) -> None:
        pass


class Mask(Linear):
    """Pixels missing independently with probability `rate`: y = m (x + s eps)."""

    limits = dict(rate=(0, 0.999), noise=(0, 4))

    def __init__(self, rate: float = 0.75, noise: float = 1e-3):
        super().__init__(rate=rate, noise=noise)

    def mask(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return (torch.rand(x[:, :1].shape, generator=generator, device=x.device) >= self.rate).to(x.dtype)


class Block(Mask):
    """Rectangles and stripes missing, one added after another until `rate` of the pixels are. Where 24 do not
    suffice, at high rates, the rest is missing in reading order."""

    def __init__(self, rate: float = 0.5, noise: float = 1e-3):
        super().__init__(rate, noise)

    def mask(self, x: Tensor, generator: torch.Generator) -> Tensor:
        (B, _, H, W), shapes = x.shape, 24
        kind, *u = torch.rand(5, B, shapes, 1, generator=generator, device=x.device)
        # Half sides relative to the image: a third each rectangles, horizontal stripes, vertical stripes
        height = torch.where(kind < 1 / 3, 0.02 + 0.06 * u[0], 0.08 + 0.17 * u[0]) + (kind > 2 / 3)
        width = torch.where(kind > 2 / 3, 0.02 + 0.06 * u[1], 0.08 + 0.17 * u[1]) + (kind < 1 / 3)
        rows = ((torch.arange(H, device=x.device) + 0.5) / H - u[2]).abs() < height  # (B, shapes, H)
        columns = ((torch.arange(W, device=x.device) + 0.5) / W - u[3]).abs() < width  # (B, shapes, W)
        inside = (rows[..., :, None] & columns[..., None, :]).flatten(2)
        # Pixels go missing in the order of the first shape that covers them, then in reading order
        first = torch.where(inside.any(1), inside.int().argmax(1), shapes)  # (B, H W)
        place = first.argsort(dim=1, stable=True).argsort(dim=1)
        return (place >= round(self.rate * H * W)).to(x.dtype).view(B, 1, H, W)


class Noise(Linear):
    """White noise: y = x + s eps."""

    limits = dict(noise=(0, 4))

    def __init__(self, noise: float = 0.5):
        super().__init__(noise=noise)


class Blur(Linear):
    """Gaussian blur of `width` pixels (standard deviation), mirrored at the border (b a | a b): y = K x + s
    eps."""

    block, rescale, limits = 0, True, dict(width=(0.01, 1e3), noise=(0, 4))

    def __init__(self, width: float = 1.5, noise: float = 0.02):
        super().__init__(width=width, noise=noise)

    def A(self, x: Tensor) -> Tensor:
        return inverse(self.transfer(x) * transform(x, 0), 0)

    def transfer(self, y: Tensor) -> Tensor:
        # k_i = sum_r kernel_r cos(pi i r / n),  the kernel cut off as in scipy.ndimage
        radius = int(4 * self.width + 0.5)
        r = torch.arange(-radius, radius + 1, device=y.device)
        kernel = torch.exp(-0.5 * (r / self.width) ** 2)
        angles = [math.pi * fractions(n, y.device)[:, None] * r for n in y.shape[-2:]]
        rows, columns = [torch.cos(angle) @ kernel / kernel.sum() for angle in angles]
        return rows[:, None] * columns


class Downsample(Linear):
    """Means of factor x factor pixels, with noise, each repeated to the image's size: y = R (M x + s eps)."""

    rescale, smoothness = True, 3.0  # a low rank cannot fill in what no image shows
    limits = dict(factor=(1, 1e3), noise=(0, 4))

    def __init__(self, factor: int = 2, noise: float = 0.01):
        super().__init__(factor=factor, noise=noise)
        self.patch = self.block = self.multiple = factor

    def A(self, x: Tensor) -> Tensor:
        (H, W), f = x.shape[-2:], self.factor
        require(H % f == W % f == 0, f"{H}x{W} pixels cannot be downsampled by {f}")
        return F.interpolate(F.avg_pool2d(x, f), size=(H, W), mode="nearest")

    def eps(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return self.factor * self.A(randn_like(x, generator))

    def transfer(self, y: Tensor) -> Tensor:
        # 1 at the first coefficient of a block, which is its mean times factor, else 0
        i, j = [torch.arange(n, device=y.device) % self.factor == 0 for n in y.shape[-2:]]
        return (i[:, None] & j).float()


class Jpeg(Corruption):
    """JPEG as libjpeg writes and reads it, bit for bit from a width of 5 pixels on. quality: 1 to 100.
    tables: in its place the quantisation tables of a file, 64 numbers (grey) or 128. subsampling: 0 is 4:4:4,
    1 is 4:2:2, 2 is 4:2:0."""

    block, patch, rescale, limits = 8, 8, True, dict(quality=(1, 100))
    # The left half of libjpeg's DCT matrix, times 8192 sqrt(8), and its colour matrices, times 65536
    DCT = [[8192, 8192, 8192, 8192], [11363, 9633, 6437, 2260], [10703, 4433, -4433, -10703],
           [9633, -2259, -11362, -6436], [8192, -8192, -8192, 8192], [6437, -11362, 2261, 9633],
           [4433, -10704, 10704, -4433], [2260, -6436, 9633, -11363]]  # fmt: skip
    YCC = [[19595, 38470, 7471], [-11059, -21709, 32768], [32768, -27439, -5329]]
    RGB = [[65536, 0, 91881], [65536, -22554, -46802], [65536, 116130, 0]]

    def __init__(self, quality: int = 20, subsampling: int = 0, tables: tuple = ()):
        super().__init__(quality=quality, subsampling=subsampling, tables=tuple(tables))
        ok = subsampling in (0, 1, 2) and len(tables) in (0, 64, 128) and all(1 <= q <= 255 for q in tables)
        require(ok, "--subsampling takes 0, 1 or 2, --tables 64 or 128 numbers from 1 to 255")
        if not tables:  # those that libjpeg has for a quality
            from PIL import Image

            Image.new("RGB", (8, 8)).save(file := io.BytesIO(), "JPEG", quality=quality)
            tables = [q for table in Image.open(file).quantization.values() for q in table]
        q = torch.tensor(tables).float().view(-1, 8, 8)[[0, -1, -1]]
        D = torch.tensor(self.DCT).double() / 8192
        D = torch.cat([D, D.flip(1) * torch.tensor([1, -1] * 4)[:, None]], 1)
        colours = torch.tensor([self.YCC, self.RGB]).double() / 65536
        for name, value in dict(q=q.double(), D=D, ycc=colours[0], rgb=colours[1]).items():
            self.register_buffer(name, value, persistent=False)  # q: (3, 8, 8) of Y, Cb, Cr, in grey levels

    def A(self, x: Tensor) -> Tensor:
        require(x.shape[1] in (1, 3), f"jpeg takes images of 1 or 3 channels, not {x.shape[1]}")
        (H, W), step = x.shape[-2:], [2 if self.subsampling == 2 else 1, 2 if self.subsampling else 1]
        pixels = ((x + 2) * (255 / 4)).clamp(0, 255).round().expand(-1, 3, -1, -1)  # of grey, Cb = Cr = 0
        ycc = self.ycc @ pixels.double().flatten(2)  # Cb and Cr about 0, their halves rounded down
        ycc = torch.cat([ycc[:, :1] + 0.5, ycc[:, 1:] + 32767 / 65536], 1).floor().view(pixels.shape).float()
        luma, chroma = self.quantised(ycc[:, :1] - 128, self.q[:1]) + 128, ycc[:, 1:]
        chroma = F.avg_pool2d(F.pad(chroma, [0, -W % 16, 0, -H % step[0]], mode="replicate"), step)
        chroma = self.rounded(chroma, 0.25 if step[0] == 2 else 0.0, 0.5)
        chroma = self.quantised(chroma, self.q[1:])[..., : -(-H // step[0]), : -(-W // step[1])]
        chroma = F.interpolate(chroma, scale_factor=step, mode="bilinear")[..., :H, :W]
        chroma = self.rounded(chroma, *((0.5, 0.4375) if step[0] == 2 else (0.25, 0.5)))
        rgb = self.rgb @ torch.cat([luma, chroma], 1).double().flatten(2) + 0.5
        return rgb.floor().view(pixels.shape)[:, : x.shape[1]].float().clamp(0, 255) * (4 / 255) - 2

    def rounded(self, x: Tensor, even: float, odd: float) -> Tensor:
        """libjpeg adds different numbers in even and odd columns before it rounds down."""
        return (x + even + (odd - even) * (torch.arange(x.shape[-1], device=x.device) % 2)).floor()

    def quantised(self, x: Tensor, q: Tensor) -> Tensor:
        """x (B, C, H, W) in grey levels about 0, its blocks' DCT rounded to multiples of q (C, 8, 8)."""
        H, W = x.shape[-2:]
        x = F.pad(x, [0, -W % 8, 0, -H % 8], mode="replicate").double()
        x = x.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)  # (B, C, H / 8, W / 8, 8, 8)
        D, q = self.D, q[:, None, None]
        # libjpeg's whole numbers: rows in quarters, coefficients in eighths, of which halves go away from 0
        t = (D @ (4 * x @ D.T + 0.5).floor() / 4 + 0.5).floor()
        t = t.sign() * ((t.abs() + 4 * q) / (8 * q)).floor() * q
        x = ((4 * D.T @ t + 0.5).floor() @ D / 32 + 0.5).floor()
        return x.transpose(3, 4).flatten(4).flatten(2, 3)[..., :H, :W].clamp(-128, 127).float()


CORRUPTIONS = dict(mask=Mask, block=Block, blur=Blur, downsample=Downsample, noise=Noise, jpeg=Jpeg)


def mask_patches(y: Tensor, fraction: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Observations y (B, C + 1, H, W) without a random fraction (B,) of their squares of so many pixels."""
    B, _, H, W = y.shape
    squares = torch.rand(B, 1, -(-H // side), -(-W // side), generator=generator, device=y.device)
    kept = (squares >= fraction.view(-1, 1, 1, 1)).to(y.dtype)
    return y * F.interpolate(kept, scale_factor=side, mode="nearest")[..., :H, :W]


# ---- The start: a Gaussian which knows that images are smooth ---------------------------------------------
class Gaussian(nn.Module):
    """x ~ N(mean, Sigma), Sigma = S + U U^T. S is diagonal in the DCT of the image and in opponent colours,
    where it falls with the frequency, S_ij = scale / (1 + i^2 + j^2)^(power / 2). U is of low rank, for
    images that are not alike everywhere, such as digits. With power 0, S is white: the published start."""

    def __init__(self, shape: list, rank: int = 0, power: float = 0.0):
        """shape: of one x, (C, H, W). Its variance is 1 until it is fitted."""
        super().__init__()
        (C, self.height, self.width), self.rank = shape, rank
        self.register_buffer("mean", torch.zeros(shape if rank else [C, 1, 1]))
        self.register_buffer("power", torch.full([C, 1, 1], power))
        self.register_buffer("scale", torch.ones(C, 1, 1))
        self.scale = 1 / self.spectrum(self.height, self.width).mean((1, 2), keepdim=True)
        self.register_buffer("U", torch.zeros(math.prod(shape), rank))
        self.register_buffer("V", torch.zeros(math.prod(shape), rank))  # Sigma^-1 = S^-1 - V V^T

    def spectrum(self, H: int, W: int) -> Tensor:
        """S (C, H, W), with i and j relative to the size that was fitted."""
        i, j = self.height * fractions(H, self.power.device), self.width * fractions(W, self.power.device)
        return self.scale * torch.exp(-self.power / 2 * (1 + i[:, None] ** 2 + j**2).log())

    def fit(self, x: Tensor, generator: torch.Generator) -> "Gaussian":
        """Maximum likelihood for x (N, C, H, W); a power of 0 stays. Returns itself."""
        self.mean = x.mean(0) if self.rank else x.mean((0, 2, 3))[:, None, None]
        z = transform(x - self.mean, 0).flatten(1)  # (N, d)
        (N, d), U, variance = z.shape, self.U[:, :0], z.new_zeros(0)
        if self.rank:
            with torch_seeded_by(generator):
                _, singular, U = torch.svd_lowrank(z, q=min(self.rank + 8, N, d), niter=2)
            rank = min(self.rank, d - 1, N - 1)
            U, variance = U[:, :rank], singular[:rank].square() / N
        # Probabilistic PCA (Tipping & Bishop 1999): S is what U leaves,  U <- U (variance - U^T S U)^(1/2)
        rest = (z.square().mean(0) - U.square() @ variance).clamp_min(0).view(x.shape[1:])
        rest = rest * (d / (d - U.shape[1]))
        # The power of maximum likelihood:  min_p log mean(rest / shape_p) + mean log shape_p
        powers = torch.linspace(0, 6 if self.power.any() else 0, 121, device=x.device).view(-1, 1, 1, 1)
        self.power, self.scale = powers, torch.ones_like(powers)
        shapes = self.spectrum(*x.shape[-2:])  # of scale 1, for each power
        scales = (rest / shapes).mean((2, 3), keepdim=True).clamp_min(1e-6)  # (121, C, 1, 1)
        best = (scales.log() + shapes.log().mean((2, 3), keepdim=True)).argmin(0, keepdim=True)
        self.power, self.scale = (v.expand_as(scales).gather(0, best)[0] for v in (powers, scales))
        S = self.spectrum(*x.shape[-2:]).view(-1, 1)
        self.U = U * (variance - (U * S * U).sum(0)).clamp_min(0).sqrt()
        # Woodbury:  V = S^-1 U L^-T,  L L^T = I + U^T S^-1 U
        L = torch.linalg.cholesky(torch.eye(U.shape[1], device=x.device) + self.U.T @ (self.U / S))
        self.V = torch.linalg.solve_triangular(L, (self.U / S).T, upper=False).T
        return self

    def sample(self, number: int, generator: torch.Generator) -> Tensor:
        """x ~ p(x), (number, C, H, W)."""
        S = self.spectrum(self.height, self.width)
        z = torch.randn(number, self.U.shape[1], generator=generator, device=S.device) @ self.U.T
        eps = torch.randn(number, *S.shape, generator=generator, device=S.device)
        return self.mean + inverse(z.view_as(eps) + S.sqrt() * eps, 0)

    def draw(self, y: Tensor, corruption: Corruption, generator: torch.Generator) -> Tensor:
        """x ~ p(x | y) for each of y (N, C + 1, H, W), exact if w and h are: the posterior mean, with a
        sample in place of the mean and h + w^(1/2) eps in place of h (Papandreou & Yuille 2010)."""
        parts, steps = [], max(64, 2 * max(y.shape[2:]))  # more where large areas may be missing
        for part in y.split(at_most(512, y[0])):
            part = as_float(part, generator.device)
            (w, h), x = corruption.information(part), self.sample(len(part), generator)
            h = h + w.sqrt() * randn_like(h, generator)
            t, _ = self.posterior(part, (w, h), x, corruption.block, steps)
            parts.append(inverse(t, corruption.block).to(y.device))
        return torch.cat(parts)

    def precision(self, t: Tensor, S: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Sigma^-1 t. rows, columns: from the coordinates of t to the DCT of the whole image."""
        z = rows @ t @ columns.T
        q = z / S
        if self.rank > 0:
            q = q - (z.flatten(1) @ self.V @ self.V.T).view(z.shape)
        return rows.T @ q @ columns

    def posterior(self, y: Tensor, wh: Pair, mean: Tensor, block: int, steps: int) -> Pair:
        """Mean and variances of t = T x under log p(x) + sum (h t - w t^2 / 2), p with `mean` for its own.

        T has blocks of `block`. wh: w and h, (B, C, H, W); y, their source, gives a first guess. Solves
            (Sigma^-1 + w) t = Sigma^-1 mean + h
        by conjugate gradients: one step is exact where T is the basis of S, 4 are close. The variances are
        1 / (a + w). a is what the other coefficients say of one, under N(0, S): `given_least` if of each of
        them only the smallest w is known, `given_all` if they are known exactly; in between by the fraction
        of neighbours observed, `near`. Exact where T is the basis of S or w is constant.
        """
        (w, h), (H, W) = wh, y.shape[-2:]
        S, mean = self.spectrum(H, W), mean.expand(h.shape)
        rows, columns = [dct(0, n, h.device) @ dct(block, n, h.device).T for n in (H, W)]
        least = w.amin((1, 2, 3), keepdim=True)  # what is known of every coefficient: 1 / sigma^2, by xt
        rows2, columns2 = rows.T**2, columns**2  # diag T X T^T = rows2 X columns2, X diagonal as S is
        given_all = rows2 @ (1 / S) @ columns2  # diag T S^-1 T^T
        # 1 / diag T (S^-1 + least)^-1 T^T - least = diag T u T^T / diag T S u T^T,  u = 1 / (1 + least S)
        u = 1 / (1 + least * S)
        given_least = (rows2 @ u @ columns2) / (rows2 @ (S * u) @ columns2)
        near, t = torch.zeros_like(least), transform(mean, block)
        b = self.precision(t, S, rows, columns) + h
        if block > 0:
            guess, alone = interpolate(y, mean), 1 / (rows2 @ S @ columns2)  # 1 / diag T S T^T
            # The fraction of x that y tells, and the same near each pixel
            known = ((w - least) / (w - least + alone)).mean((1, 2, 3), keepdim=True).clamp_max(0.999)
            observed = y[:, -1:].mean((1, 2, 3), keepdim=True).clamp_min(1e-3)
            near = (guess[:, -1:] * known / observed).clamp(0, 1)
            rough = alone + near * (given_all - alone)  # as `a`, from what is known before xt
            # A Wiener filter of what is known of all coefficients, `least`, about the guess, of precision r
            z, r = h / w.clamp_min(1e-9), rough.mean((2, 3), keepdim=True) * known / (1 - known)
            t = torch.where(known > 1e-6, transform(guess[:, :-1], block), t)
            t = t + rows.T @ (rows @ (z - t) @ columns.T * (least / (1 / S + r + least))) @ columns
            t = t + (w - least) / (rough + w) * (z - t)
        residual = b - self.precision(t, S, rows, columns) - w * t
        p, rq = torch.zeros_like(b), torch.ones_like(least)
        for _ in range(steps):
            q, last_rq = residual / (given_all + w), rq  # preconditioned by the diagonal
            rq = (residual * q).sum((1, 2, 3), keepdim=True)
            p = q + rq / last_rq.clamp_min(1e-30) * p
            Ap = self.precision(p, S, rows, columns) + w * p
            step = rq / (p * Ap).sum((1, 2, 3), keepdim=True).clamp_min(1e-30)
            t, residual = t + step * p, residual - step * Ap
        return t, 1 / (given_least + near * (given_all - given_least) + w)


def interpolate(y: Tensor, mean: Tensor) -> Tensor:
    """y (B, C + 1, H, W), its gaps filled by averages of what is observed at most 10 rows and columns away,
    of weights (distance^2 + 0.3)^(-5/2); far from all, by `mean`. Last channel: the fraction of neighbours
    observed."""
    H, W = y.shape[-2:]
    d = torch.arange(-10, 11, device=y.device)
    kernel = (d[:, None] ** 2 + d**2 + 0.3) ** -2.5 * (d[:, None] ** 2 + d**2 > 0)
    # A convolution of the mirrored image:  k_ij = sum_rs kernel_rs cos(pi i r / H) cos(pi j s / W)
    cos_i, cos_j = [torch.cos(math.pi * fractions(n, y.device)[:, None] * d) for n in (H, W)]
    rows, columns, observed = dct(0, H, y.device), dct(0, W, y.device), y[:, -1:]
    z = torch.cat([observed * (y[:, :-1] - mean), observed], 1)
    z = rows.T @ (cos_i @ kernel @ cos_j.T * (rows @ z @ columns.T)) @ columns
    value = torch.where(observed > 0, y[:, :-1], mean + z[:, :-1] / z[:, -1:].clamp_min(1e-3))
    return torch.cat([value, z[:, -1:] / kernel.sum()], 1)


def fit_start(y: Tensor, corruption: Corruption, config: Config, generator: torch.Generator) -> Gaussian:
    """The Gaussian p0, fitted by EM to some of the observations y (N, C + 1, H, W): draw each x given its y,
    fit to the draws, repeat. What no observation shows keeps the law of the spectrum."""
    shape, rank = [y.shape[1] - 1, *y.shape[2:]], 0 if config.smoothness else config.start_rank
    gaussian = Gaussian(shape, rank, config.smoothness).to(generator.device)
    few = at_most(512, y[0])
    y = as_float(y[: 8 * few if rank else few], generator.device)
    x = interpolate(y, gaussian.mean)[:, :-1]
    gaussian.mean += x.mean((0, 2, 3))[:, None, None]
    gaussian.scale *= transform(x - gaussian.mean, 0).square().mean((0, 2, 3)).clamp_min(1e-6)[:, None, None]
    x = gaussian.sample(few, generator)
    for _ in range(config.start_laps):
        corruption.learn(x, generator)
        x = gaussian.draw(y, corruption, generator)
        gaussian.fit(x, generator)
    return gaussian


# ---- Networks, which TorchScript compiles as they are -----------------------------------------------------
def zeroed(layer: nn.Module) -> nn.Module:
    """The layer, initialised to give 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def group_norm(channels: int, affine: bool = True) -> nn.GroupNorm:
    """Groups of 16 channels, or a single group."""
    return nn.GroupNorm(channels // 16 if channels % 16 == 0 else 1, channels, affine=affine)


class Attention(nn.Module):
    """x + self-attention over the pixels of x."""

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
    """x + gate conv(dropout(silu(conv((1 + scale) norm(x) + shift)))), scale, shift and gate from the noise
    level; then, in some levels, attention."""

    def __init__(self, level: int, config: Config):
        super().__init__()
        channels = config.channels[level]
        self.norm = group_norm(channels, affine=False)
        self.modulation = zeroed(nn.Linear(4 * config.channels[0], 3 * channels))
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.attention = Attention(channels, config.heads) if level in config.attention else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift, gate = self.modulation(emb)[:, :, None, None].chunk(3, 1)  # each (B, C, 1, 1)
        h = (1 + scale) * self.norm(x) + shift
        h = self.conv1(h.contiguous(memory_format=torch.channels_last))  # on a GPU, GroupNorm changes it
        h = self.conv2(self.dropout(F.silu(h)))
        return self.attention(x + gate * h)


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
    """F for images of any size. Level i has channels[i] channels at 2^-i of the resolution, rounded up.

    All gates and F are 0 at first, F by a gain for each noise level and channel. Without these, a few
    features grow a hundredfold while there is little to learn; the norms then shrink the others, and what
    they learnt is lost.
    """

    def __init__(self, inputs: int, outputs: int, config: Config):
        super().__init__()
        channels, coarsest = config.channels, len(config.channels) - 1

        def level(i: int, inputs: int, stride: int) -> tuple[nn.Module, nn.ModuleList]:
            conv = nn.Conv2d(inputs, channels[i], 3, stride, padding=1)
            return conv, nn.ModuleList(ResidualBlock(i, config) for _ in range(config.blocks))

        self.emb = NoiseEmbedding(4 * channels[0])
        down = [level(i, channels[i - 1] if i else inputs, 2 if i else 1) for i in range(coarsest + 1)]
        up = [level(i, channels[min(i + 1, coarsest)] + channels[i], 1) for i in range(coarsest, -1, -1)]
        self.down, self.encoder = (nn.ModuleList(part) for part in zip(*down))
        self.up, self.decoder = (nn.ModuleList(part) for part in zip(*up))  # the coarsest level first
        self.norm = group_norm(channels[0])
        self.out = nn.Conv2d(channels[0], outputs, 3, padding=1)
        self.gain = zeroed(nn.Linear(4 * channels[0], outputs))

    def forward(self, xt: Tensor, G: Tensor, y: Tensor, log_sigma: Tensor) -> Tensor:
        emb = self.emb(log_sigma).to(xt.dtype)
        x = torch.cat([xt, G, y], 1)
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
        return self.gain(emb)[:, :, None, None] * self.out(F.silu(self.norm(x)))


# ---- Noise levels, sampler, denoiser ----------------------------------------------------------------------
def random_noise_level(number: int, config: Config, generator: torch.Generator) -> Tensor:
    """(number,) of sigma(t) = exp((1 - t) log sigma_min + t log sigma_max), t ~ Beta(3, 3): a median of 5."""
    t = torch.rand(number, 5, generator=generator, device=generator.device).median(1).values
    return torch.exp((1 - t) * math.log(config.sigma_min) + t * math.log(config.sigma_max))


def sampler(method: str, steps: int, sigma_min: float, sigma_max: float) -> list[Step]:
    """Noise level sigma_t and coefficients a, b, c, d of each step,  xs = a xt + b D + c D_previous + d eps.
    D is the denoiser's estimate, D_previous that of the previous step. The levels fall log-uniformly from
    sigma_max to sigma_min, then to 0. From sigma_t to sigma_s, with r = sigma_s / sigma_t:

        ddpm   xs = r^2 xt + (1 - r^2) D + sigma_s sqrt(1 - r^2) eps          (ancestral, as published)
        ddim   xs = r xt + (1 - r) D                                          (Song et al. 2021)
        sde2m, dpm2m: as ddpm and ddim, with (3 D - D_previous) / 2 in place of D but in the first and last
                      step                                    (DPM-Solver++(2M), SDE and ODE, Lu et al. 2022)
    """
    methods = "ddpm, ddim, sde2m, dpm2m"  # TorchScript cannot read METHODS
    require(method in methods.split(", "), f"unknown method {method}: {methods}")
    require(steps >= 1, f"steps must be at least 1, not {steps}")
    table: list[Step] = []
    levels = [sigma_max * (sigma_min / sigma_max) ** (i / max(steps - 1, 1)) for i in range(steps)] + [0.0]
    for i in range(steps):
        a, c, d = levels[i + 1] / levels[i], 0.0, 0.0
        if method == "ddpm" or method == "sde2m":
            a, d = a * a, levels[i + 1] * math.sqrt(1 - a * a)
        if (method == "sde2m" or method == "dpm2m") and 0 < i and i < steps - 1:
            c = -0.5 * (1 - a)
        table.append((levels[i], a, 1 - a - c, c, d))
    return table


class Denoiser(nn.Module):
    """D(xt, sigma, y), an estimate of E[x0 | xt, y].

    D = G + O^T v^(1/2) O F(c_in xt, G, y, log sigma),  c_in = 1 / sqrt(sigma^2 + 1). G is the mean of x0
    given xt and y under a smooth Gaussian, v its variance for each pixel and opponent colour: y says w and h
    of T x0, xt adds 1 / sigma^2 to w. The network F is 0 at first, so D starts as the best guess under that
    Gaussian, agrees with y, and learns only what is not Gaussian. (With v in T in place of O, the convolution
    F would have to know the place of each block, and would learn nothing.) For preconditioning "edm" (Karras
    et al. 2022), N(0, I) and w = h = 0:  G = xt / (sigma^2 + 1),  v = sigma^2 / (sigma^2 + 1),  as published.
    """

    def __init__(self, gaussian: Gaussian, corruption: Corruption, config: Config):
        super().__init__()
        C = gaussian.power.shape[0]
        self.corruption, self.x_shape = corruption, [C, gaussian.height, gaussian.width]
        self.gaussian, self.likelihood = gaussian, corruption
        if config.preconditioning == "edm":
            self.gaussian, self.likelihood = Gaussian(self.x_shape), Corruption(block=0)
        self.sigma_min, self.sigma_max, self.bfloat16 = config.sigma_min, config.sigma_max, False
        self.network = UNet(3 * C + 1, C, config)

    def shape(self, y: Tensor) -> list[int]:
        """The shape of the x that y observes."""
        C = self.x_shape[0]
        ok = y.dim() == 4 and y.shape[1] == C + 1
        require(ok, f"observations must be (B, {C + 1}, H, W), the mask last, not {list(y.shape)}")
        return [y.shape[0], C, y.shape[2], y.shape[3]]

    def posterior(self, xt: Tensor, sigma: Tensor, y: Tensor) -> Pair:
        """G and v, both (B, C, H, W). sigma: (B, 1, 1, 1)."""
        block, (w, h) = self.likelihood.block, self.likelihood.information(y)
        w, h = w + sigma**-2, h + transform(xt, block) / sigma**2
        mean, c = self.gaussian.posterior(y, (w, h), self.gaussian.mean, block, 1 if block == 0 else 4)
        if block != 1:  # v = diag T^T c T
            rows, columns = [dct(block, n, c.device).square() for n in c.shape[-2:]]
            c = rows.T @ c @ columns
        return inverse(mean, block), c

    def estimate(self, xt: Tensor, sigma: Tensor, y: Tensor) -> Pair:
        """D and v. sigma: (B,)."""
        log_sigma, sigma = sigma.log(), sigma.view(-1, 1, 1, 1)
        G, v = self.posterior(xt, sigma, y)
        scaled = xt * (sigma**2 + 1).rsqrt()
        if torch.jit.is_scripting() or not self.bfloat16:
            output = self.network(scaled, G, y, log_sigma)
        else:
            with torch.autocast(xt.device.type, torch.bfloat16):
                output = self.network(scaled, G, y, log_sigma)
        return G + inverse(v.sqrt() * transform(output.float(), 1), 1), v

    def forward(self, xt: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        """xt (B, C, H, W), sigma (B,), y (B, C + 1, H, W) -> (B, C, H, W)."""
        return self.estimate(xt, sigma, y)[0]

    def loss(self, x0: Tensor, y: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
        """Eq. 10 for each x0 (B, C, H, W) at noise level sigma (B,): (B,), about 1 while F is 0, but larger
        at the highest levels.

        The paper's lambda(sigma) |e|^2 / d,  lambda = 1 / sigma^2 + 1,  weighs the error e = D - x0 by the
        precision of x0 given xt under N(0, I). Here it is the Gaussian's, given xt and y,  |e|^2 / sum v. For
        "edm" it is the same. (|v^(-1/2) e|^2 would spend the network on pixels that are almost certain.)
        """
        D, v = self.estimate(x0 + sigma.view(-1, 1, 1, 1) * randn_like(x0, generator), sigma, y)
        return (D - x0).square().flatten(1).sum(1) / v.flatten(1).sum(1)

    @torch.jit.export
    def sample(self, y: Tensor, steps: int, method: str, generator: torch.Generator) -> Tensor:
        """x0 ~ q(x0 | y), unconditional where y = 0: (B, C + 1, H, W) -> (B, C, H, W). steps: evaluations."""
        with torch.no_grad():
            shape = self.shape(y)
            xt = self.sigma_max * torch.randn(shape, generator=generator, device=y.device)
            x0 = torch.zeros_like(xt)
            for sigma, a, b, c, d in sampler(method, steps, self.sigma_min, self.sigma_max):
                previous, x0 = x0, self(xt, torch.full(shape[:1], sigma, device=y.device), y)
                xt = a * xt + b * x0 + c * previous + d * randn_like(xt, generator)
            return xt


# ---- Expectation maximisation -----------------------------------------------------------------------------
@dataclass
class State:
    """Where a run stands. Lap 0 is the start."""

    x0: Tensor  # the reconstructions X, one for each observation; the E-step overwrites them
    denoiser: Denoiser
    average: Denoiser  # the same with averaged weights
    optimizer: torch.optim.Optimizer
    losses: Tensor  # (steps,) of this lap
    sample_batch: int  # images to sample at once
    start: Gaussian | None = None  # draws in lap 0; None later
    lap: int = 0
    step: int = 0  # optimiser steps done in this lap
    drawn: int = 0  # reconstructions drawn in this lap
    history: list = field(default_factory=list)  # metrics, a row for each lap
    best_weights: dict = field(default_factory=dict)  # those of the lap with the smallest energy score

    @property
    def model(self) -> Denoiser:
        """The denoiser to sample from."""
        return self.average

    def draw(self, y: Tensor, steps: int, method: str, generator: torch.Generator) -> Tensor:
        """x0 ~ q(x0 | y) by the model, or in lap 0 by the start."""
        if self.start is not None:
            return self.start.draw(y, self.denoiser.corruption, generator)
        parts = y.split(self.sample_batch)
        return torch.cat([self.model.sample(part, steps, method, generator) for part in parts])

    def check(self) -> None:
        """Raises DiffEMError if a loss of this lap is not finite."""
        good = int(self.losses[: self.step].isfinite().cumprod(0).sum())  # steps before the first bad one
        require(good == self.step, f"loss not finite in lap {self.lap}, step {good + 1}: try a lower --lr")


def new_denoiser(gaussian: Gaussian, corruption: Corruption, config: Config, device, cls=Denoiser):
    """A denoiser of random weights. Only its network computes in bfloat16, where that is fast."""
    with torch_seeded_by(generator_for("cpu", config.seed, 0, 2)):
        denoiser = cls(gaussian, corruption, config)
    denoiser.to(device).network.to(memory_format=torch.channels_last)  # faster for convolutions
    if torch.device(device).type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    denoiser.bfloat16 = config.precision == "bfloat16" or config.precision == "auto" and fast
    return denoiser


def new_state(x0: Tensor, denoiser: nn.Module, config: Config) -> State:
    """The state before lap 1, of reconstructions x0 (N, ...)."""
    device = next(denoiser.parameters()).device
    masks = denoiser.corruption.masks
    average = copy.deepcopy(denoiser.train(), {id(masks): masks}).eval()  # both use these: they are large
    long = config.laps * config.steps >= 20_000  # in shorter runs the compiler takes longer than it saves
    if config.compile == "on" or config.compile == "auto" and device.type == "cuda" and long:
        try:
            torch.compile(lambda x: x + 1)(torch.ones(1, device=device))
            denoiser.network.compile()
            average.network.compile()
        except Exception as error:  # no Triton, no C compiler, an old card
            reason = f"the network cannot be compiled here ({export.in_one_line(error):.200})"
            require(config.compile == "auto", reason + ": --compile off")
            print(reason, file=sys.stderr)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=config.lr, fused=True)
    losses = torch.zeros(config.steps, device=device)
    return State(x0, denoiser, average, optimizer, losses, at_most(config.sample_batch, x0[0]))


def fit(y: Tensor, corruption: Corruption, config: Config, device=None) -> Denoiser:
    """Trains on observations y ~ Q(. | x0) alone, (N, C + 1, H, W). The `sample` of the model restores them.
    device: to compute on (default: that of y). Raises DiffEMError if a loss is not finite."""
    for state in em(y, corruption, config, device=device):
        pass
    return state.model


def em(y: Tensor, corruption: Corruption, config: Config, state: State | None = None, device=None):
    """Runs DiffEM on observations y (N, ...), from a new state or a given one. It never sees a clean image.

    Yields the state after lap 0, after each optimiser step and after each batch of the E-step: there a run
    can stop, be saved and resume. A lap is complete where state.drawn == N. Under torchrun all processes have
    the same y and state, and share the work of each batch.
    """
    device, (rank, size) = torch.device(device or y.device), ranks()
    require(config.batch % size == 0, f"--batch {config.batch} must be a multiple of the {size} processes")
    if state is None:
        for part in y.chunk(1 + len(y) // 4096):
            check_observations(as_float(part, part.device))
        state = first_state(y, corruption.to(device), config, generator_for(device, config.seed, 0, 1))
        yield state
    while state.lap < config.laps or state.drawn < len(y):
        if state.drawn == len(y):
            state.start, state.lap, state.step, state.drawn = None, state.lap + 1, 0, 0
        while state.step < config.steps:  # M-step
            m_step(state, config, generator_for(device, config.seed, state.lap, state.step, rank))
            yield state
        while state.drawn < len(y):  # E-step
            key = config.seed, state.lap, config.steps + state.drawn, rank
            e_step(state, y, config, generator_for(device, *key))
            yield state


def as_float(y: Tensor, device: torch.device) -> Tensor:
    """Observations (N, C + 1, H, W) in floating point, on a device. Bytes: as in files, the mask 0 or 1."""
    y = y.to(device)
    if y.is_floating_point():
        return y
    m = y[:, -1:].float()
    return torch.cat([m * values(y[:, :-1]), m], 1)


def check_observations(y: Tensor) -> None:
    """Raises DiffEMError if y (N, C + 1, H, W) is not what the docstring of this file says."""
    ok = y.ndim == 4 and y.shape[1] > 1 and len(y) > 0 and y[0, 0].numel() > 1
    expected = "(N, C + 1, H, W), the mask last, of more than one pixel"
    require(ok, f"observations must be {expected}, not {list(y.shape)}")
    value, m = y[:, :-1], y[:, -1:]
    require(y.dtype == torch.float32, f"observations must be float32, not {y.dtype}")
    require(not ((m != 0) & (m != 1)).any(), "the last channel of y must be 1 where observed, else 0")
    require(value.isfinite().all(), "y has values that are not finite: set missing pixels to 0")
    require((value * (1 - m) == 0).all(), "y must be 0 where its last channel is: y * y[:, -1:]")
    low, high = float(value.min()), float(value.max())
    ok = -30 < low and high < 30 and (low < 0 or high > 1 or high == low)
    require(ok, f"values of y are from {low:.3g} to {high:.3g}, but black is -2 and white 2")


def first_state(y: Tensor, corruption: Corruption, config: Config, generator: torch.Generator) -> State:
    """Lap 0: draws of the fitted start, and a denoiser whose Gaussian is fitted to the draws."""
    start = fit_start(y, corruption, config, generator)
    x0 = start.draw(y, corruption, generator)
    x0 = x0.half() if x0.is_cuda else x0  # to save memory of the GPU
    gaussian = Gaussian(list(x0.shape[1:]), power=1.0).to(generator.device)
    gaussian.fit(random_images(x0, 8 * at_most(512, x0[0]), generator), generator)
    if ranks()[1] > 1:  # one denoiser for all processes
        for buffer in (*gaussian.state_dict().values(), *corruption.state_dict().values()):
            dist.broadcast(buffer, 0)
    state = new_state(x0, new_denoiser(gaussian, corruption, config, generator.device), config)
    state.start, state.drawn = start, len(y)
    return state


def m_step(state: State, config: Config, generator: torch.Generator) -> None:
    """One optimiser step on Eq. 10, the mean over a batch of reconstructions that are corrupted anew. With
    probability p_unconditional y is replaced by 0. If the corruption hides no pixels, with the same
    probability a random part of y is hidden, as the scores do."""
    corruption, p, device = state.denoiser.corruption, config.p_unconditional, generator.device
    x0 = random_images(state.x0, config.batch // ranks()[1], generator)
    x0 = augment(x0, config, generator, math.lcm(4, corruption.multiple))
    y = corruption(x0, generator)
    nothing = torch.rand(len(y), generator=generator, device=device) < p
    y = y.masked_fill(nothing.view(-1, *[1] * (y.ndim - 1)), 0)
    if not corruption.hides_pixels():
        fraction, u = torch.rand(2, len(y), generator=generator, device=device)
        y = mask_patches(y, fraction * (u < p), corruption.patch, generator)
    sigma = random_noise_level(len(y), config, generator)
    with torch_seeded_by(generator):  # for dropout
        loss = state.denoiser.loss(x0, y, sigma, generator).mean()
    optimise(state, loss, config)
    # Reading a loss waits for the device: on a GPU only now and then
    if device.type == "cpu" or state.step % 50 == 0 or state.step == config.steps:
        state.check()


def optimise(state: State, loss: Tensor, config: Config) -> None:
    """One step of the optimiser and of the weights' average, by gradients averaged over all processes."""
    # Constant, then falling to 0: in the end only the noise of the weights is left to reduce
    fall = 2 - 2 * (state.lap - 1 + state.step / config.steps) / config.laps
    state.optimizer.param_groups[0]["lr"] = config.lr * min(1, fall)
    state.optimizer.zero_grad()
    loss.backward()
    state.losses[state.step] = loss.detach()
    if ranks()[1] > 1:
        parts = [state.losses[state.step], *(p.grad for p in state.denoiser.parameters())]
        mean = torch.cat([part.flatten() for part in parts]) / ranks()[1]
        dist.all_reduce(mean)
        means = mean.split([part.numel() for part in parts])
        torch._foreach_copy_(parts, [v.view(part.shape) for v, part in zip(means, parts)])
    nn.utils.clip_grad_norm_(state.denoiser.parameters(), config.clip)
    state.optimizer.step()
    # average <- ema average + (1 - ema) denoiser,  at first the denoiser
    weight = 1 - config.ema if state.lap > 1 or state.step else 1.0
    with torch.no_grad():
        torch._foreach_lerp_(list(state.average.parameters()), list(state.denoiser.parameters()), weight)
    state.step += 1


def random_images(x0: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """(number, ...) of x0 (N, ...), on the generator's device, which need not be that of x0."""
    if x0.device.type == generator.device.type:
        return x0[torch.randint(len(x0), (number,), generator=generator, device=x0.device)].float()
    i = torch.randint(len(x0), (number,), generator=on_cpu(generator))
    return x0[i].pin_memory().to(generator.device, non_blocking=True).float()  # while the GPU is busy


def augment(x0: Tensor, config: Config, generator: torch.Generator, multiple: int = 4) -> Tensor:
    """Mirrored images; slightly other hues (up to 0.01 of a turn) and saturations (up to 5 %), as published;
    smaller copies, by one factor down to 1/2, their sides multiples of a number; random squares."""
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
        factor = 1 - torch.rand(1, generator=on_cpu(generator), device="cpu").item() / 2
        size = [min(n, multiple * max(1, round(n * factor / multiple))) for n in x0.shape[2:]]
        x0 = F.interpolate(x0, size=size, mode="bicubic", antialias=True)
    if config.crop:
        # The corruption's blocks then lie elsewhere on each image: what one place loses, another shows. The
        # border of a square is treated as an image's: the U-Net pads it by 0, the corruption mirrors it
        x0 = cut(x0, (min(config.crop, *x0.shape[2:]),) * 2, 1, generator)
    return x0


def e_step(state: State, y: Tensor, config: Config, generator: torch.Generator) -> None:
    """Draws the next batch of reconstructions. If it does not fit into memory, batches are halved."""
    rank, size = ranks()
    now = slice(state.drawn, state.drawn + size * state.sample_batch)
    batch, x0 = as_float(y[now][rank::size], generator.device), None
    most = min(state.sample_batch, math.ceil(len(y[now]) / size))  # the same in all processes
    try:
        how = *config.e_step_sampler(state.lap), generator
        x0 = state.model.sample(batch, *how) if len(batch) else batch[:, :-1]
    except RuntimeError as error:  # PyTorch has a class of its own for a GPU's memory only
        if most == 1 or not export.out_of_memory(error):
            raise
    if any_rank(x0 is None):
        state.sample_batch = most // 2
        return
    state.x0[now] = 0
    state.x0[now][rank::size] = x0
    if size > 1:
        dist.all_reduce(state.x0[now])
    state.drawn += len(y[now])


# ---- Settings of a run, presets of the data sets, command line --------------------------------------------
SMALL = dict(channels=(16, 32, 64), blocks=2, steps=1000, ema=0.995, laps=8, sample_batch=256)
SMALL |= dict(start_rank=64, start_laps=16)
PHOTOS = SMALL | dict(steps=500, flip=True, first_sample_steps=4, smoothness=3.0, start_laps=8)
PHOTOS |= dict(first_part=1 / 3)
PAPER = dict(blocks=5, dropout=0.1, laps=20, steps=50_000, batch=256, ema=0.9999, flip=True, jitter=True)
PAPER |= dict(method="ddpm", sample_steps=256, first_sample_steps=0, unconditional_steps=256)
PAPER |= dict(sample_batch=1024, smoothness=3.0)
CIFAR = dict(channels=(128, 256, 384), attention=(1,), lr=2e-4, start_rank=64)
CELEBA = dict(channels=(128, 256, 384, 512), blocks=3, attention=(3,), lr=1e-4, start_rank=1024)
# What each data set changes of the defaults, which are those of the digits
PRESETS = {
    ("digits", "small"): dict(parameters=dict(rate=0.5)),
    ("mnist", "small"): SMALL | dict(limit=10_000),
    ("fashion_mnist", "small"): SMALL | dict(limit=10_000, flip=True),
    ("cifar10", "small"): PHOTOS | dict(limit=10_000),
    ("cifar10", "published"): PAPER | CIFAR,
    ("celeba", "small"): PHOTOS | dict(channels=(16, 32, 64, 128), limit=10_000, image_size=64),
    ("celeba", "published"): PAPER | CELEBA | dict(sample_batch=512, image_size=64),
    ("folder", "small"): PHOTOS | dict(held_out=0),
    ("observations", "small"): PHOTOS | dict(held_out=0),
}
DATASETS, KINDS = (tuple(dict.fromkeys(names)) for names in zip(*PRESETS))


def preset(dataset: str, kind: str, corruption: type[Corruption], given: dict) -> dict:
    """The settings of a preset for a corruption, overridden by those that are given."""
    chosen = PRESETS[dataset, kind]
    smoothness = given.get("smoothness", max(chosen.get("smoothness", 0.0), corruption.smoothness))
    return chosen | dict(smoothness=smoothness, rescale=smoothness > 0 and corruption.rescale) | given


@dataclass
class Settings(Config):
    """The settings of a run of the command line: each field but `parameters` is a flag."""

    dataset: str = setting("digits", "data set; folder: clean images, to be corrupted", choices=DATASETS)
    observations: str = setting("", "folder of corrupted images; missing pixels are transparent or NaN")
    masks: str = setting("", "folder of images named like the observations, black where a pixel is missing")
    invert_masks: bool = setting(False, "masks are white where a pixel is missing")
    preset: str = setting("small", "for a CPU, or the paper's network and schedule", choices=KINDS)
    data_dir: str = setting("data", "where data sets are stored; for folder: the images, at any depth")
    image_size: int = setting(0, "folder, celeba: crop to a central square and resize; 0: images as they are")
    grey: bool = setting(False, "read images as grey")
    skip_bad_images: bool = setting(False, "leave out images that cannot be read")
    limit: int = setting(0, "train on so many images; 0: on all", 0, 1e9)
    held_out: int = setting(256, "images held out for metrics; 0 (folder, observations): a part")
    num_samples: int = setting(8, "restorations of each held-out image, for their mean and spread", 2, 1000)
    corruption: str = setting("mask", ", ".join(CORRUPTIONS))
    parameters: dict = field(default_factory=dict)  # of the corruption
    name: str = setting("", "folder below runs/; by default data set, corruption and a number")
    resume: str = setting("", "runs/NAME to continue; --laps and the folders of data may change")
    device: str = setting("auto", "device to compute on", choices=("auto", "cpu", "cuda"))

    def __post_init__(self):
        super().__post_init__()
        own, both = ("observations",), ("folder", "observations")
        ok = (self.dataset in own) == bool(self.observations)
        require(ok, "give --observations FOLDER, and no other --dataset")
        require(self.masks or not self.invert_masks, "--invert-masks needs --masks")
        ok = self.held_out > 1 or self.held_out == 0 and self.dataset in both
        require(ok, "--held-out must be at least 2, or 0 for a part of a folder")
        ok = Path(self.name).name == self.name != ".." and self.name.isprintable()
        require(ok, f"--name {self.name!r} must be the name of a folder below runs/")
        places = dict(masks=own, image_size=("folder", "celeba"), grey=both, skip_bad_images=both)
        for name, names in places.items():
            ok = self.dataset in names or not getattr(self, name)
            require(ok, f"--{name.replace('_', '-')} is for --dataset {' or '.join(names)}")

    def number_to_hold_out(self, images: int) -> int:
        """--held-out, or a fifth of so many images, at least 2 and at most 256."""
        return self.held_out or max(2, min(256, images // 5))

    def number_to_read(self) -> int | None:
        """--limit and those to hold out."""
        return self.limit + self.number_to_hold_out(self.limit * 5 // 4) if self.limit else None


def parameters_of(corruption: type[Corruption]) -> dict:
    """The arguments of a corruption with their defaults."""
    arguments = [p for p in inspect.signature(corruption).parameters.values() if p.kind != p.VAR_KEYWORD]
    taken = Settings.__dataclass_fields__
    odd = [p.name for p in arguments if p.default is p.empty or p.default is None or p.name in taken]
    require(not odd, f"{corruption.__name__}: {odd} need defaults, and names that are not those of settings")
    return {p.name: p.default for p in arguments}


def make_parser(defaults: dict, parameters: dict) -> export.Parser:
    """A flag for each setting and parameter of the corruption. Flags not given are absent from the result."""
    parser = export.Parser(allow_abbrev=False, add_help=bool(defaults))
    parser.description = __doc__.partition("\n")[0]
    parser.epilog = "presets: " + ", ".join(" ".join(key) for key in PRESETS)
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110)
    flags = {f.name: (f.default, f.metadata["help"]) for f in fields(Settings) if f.metadata}
    flags |= {name: (v, f"of --corruption {defaults['corruption']}") for name, v in parameters.items()}
    for name, (default, text) in flags.items():
        kind = dict(type=type(default))
        kind = dict(type=type((*default, 0)[0]), nargs="*") if isinstance(default, tuple) else kind
        kind = dict(action=argparse.BooleanOptionalAction) if isinstance(default, bool) else kind
        value = defaults.get(name, default)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        kind |= dict(help=f"{text} (default: {shown})", default=argparse.SUPPRESS)
        parser.add_argument("--" + name.replace("_", "-"), **kind)
    return parser


def parse(argv: list[str], given: dict, saved: dict) -> Settings:
    """Flags, over those saved of the run to resume, over the data set's preset, over the defaults. given: the
    flags that need no corruption."""
    chosen = saved | given
    chosen.setdefault("dataset", "observations" if given.get("observations") else "digits")
    cuda = torch.cuda.is_available() and chosen.get("device") != "cpu"
    paper = cuda and (chosen["dataset"], "published") in PRESETS
    key = chosen["dataset"], chosen.setdefault("preset", "published" if paper else "small")
    name = chosen.setdefault("corruption", "mask")
    require(key in PRESETS, f"there is no data set {key[0]!r} with preset {key[1]!r}: --help lists them")
    names = ", ".join(CORRUPTIONS)
    require(name in CORRUPTIONS, f"unknown corruption {name!r}: {names}, or run the file that defines it")
    chosen = preset(*key, CORRUPTIONS[name], chosen)
    parameters = parameters_of(CORRUPTIONS[name])
    parameters |= {k: v for k, v in chosen.get("parameters", {}).items() if k in parameters}
    flags = vars(make_parser(chosen, parameters).parse_args(argv))
    own = {k: tuple(v) if isinstance(v, list) else v for k, v in flags.items() if k in parameters}
    if name == "jpeg" and given.get("observations") and not saved and not own.keys() & {"quality", "tables"}:
        own = export.jpeg_tables(image_files(Settings(**chosen))) | own
    settings = Settings(**chosen | dict(parameters=parameters | own))
    now, free = asdict(settings), ("laps", "data_dir", "observations", "masks", "resume", "device")
    changed = [k for k in saved if k not in free and now[k] != saved[k]]
    require(not changed, f"{settings.resume} was made with other values of {', '.join(changed)}")
    return settings


# ---- Data -------------------------------------------------------------------------------------------------
@dataclass
class Data:
    """What a run learns from and what it is measured on."""

    corruption: Corruption  # their law
    y: Tensor  # observations to train on
    held_out: Tensor  # other observations, for the metrics
    truth: Tensor | None  # clean images of the held-out observations, if they are known
    digest: str = ""  # sha256 of y


@contextmanager
def named(kind: type[Corruption]):
    """Puts its file and class in front of the errors of your own corruption."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if kind.__module__ == __name__:
            raise
        file = getattr(sys.modules[kind.__module__], "__file__", "this session")
        raise DiffEMError(f"{file}, {kind.__name__}: {type(error).__name__}: {error}") from error


def try_out(corruption: Corruption, C: int, H: int, W: int) -> None:
    """Raises DiffEMError if it does not give observations of two images."""
    generator = generator_for("cpu", 0)
    x = 6 * torch.rand(2, C, H, W, generator=generator) - 3  # samples may leave [-2, 2]
    y = corruption(x, generator)
    given, shape = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__, (2, C + 1, H, W)
    require(given == shape, f"it gives {given} in place of a tensor {shape}, the mask last")
    check_observations(y)


def make_data(settings: Settings) -> Data:
    """The observations of a data set. Clean images are corrupted here, once, and not used elsewhere."""
    own, name, kind = bool(settings.observations), settings.corruption, CORRUPTIONS[settings.corruption]
    with named(kind):
        corruption = kind(**settings.parameters).to("cpu")
    grid = 16 if own and isinstance(corruption, Jpeg) else corruption.multiple  # of the blocks in the files
    require(settings.crop % grid == 0, f"--crop must be a multiple of {grid}, as {name} needs")
    train, test = load_images(settings)
    if kind.__module__ != __name__:
        with named(kind):
            try_out(corruption, train.shape[1] - int(own), *train.shape[2:])  # without the mask
    if not own:
        generator = generator_for("cpu", settings.seed, 0, 0)
        return Data(corruption, corruption(train, generator), corruption(test, generator), values(test))
    if isinstance(corruption, Downsample):
        train, test = (F.interpolate(y, scale_factor=corruption.factor) for y in (train, test))  # nearest
    missing = bool((train[:, -1:] == 0).any())
    ok = missing or not isinstance(corruption, Mask)
    require(ok, f"no pixel is missing in {settings.observations}: give alpha, NaN or --masks")
    require(corruption.block or not missing, f"{name} needs images of which no pixel is missing")
    corruption.masks = train[:, -1:].bool() if missing else None
    corruption.masked.fill_(missing)
    return Data(corruption, train, as_float(test, test.device), None)


def load_images(settings: Settings) -> tuple[Tensor, Tensor]:
    """Images to train on and to hold out, in an order given by the seed: clean ones x0, or observations."""
    name, n, limit = settings.dataset, settings.held_out, settings.limit
    generator, few = generator_for("cpu", settings.seed, 0, 4), "images are too few to hold out"
    if name in ("folder", "observations"):
        files, wanted = image_files(settings), settings.number_to_read()
        order = torch.randperm(len(files), generator=generator).tolist()
        images = read_images([files[i] for i in order[:wanted]], settings)[:wanted]
        n = settings.number_to_hold_out(len(images))
        require(len(images) > n, f"{len(images)} {few} {n} (--held-out)")
        return images[n:], images[:n]
    if name == "digits":
        from sklearn.datasets import load_digits

        images = torch.from_numpy(load_digits().images)[:, None].float() / 4 - 2
        test, train = images[torch.randperm(len(images), generator=generator)].tensor_split([n])
        require(len(train) > 0, f"{len(images)} {few} {n} (--held-out)")
    else:
        train, test = torchvision_images(settings)
    return train[torch.randperm(len(train), generator=generator)[: limit or None]], test[:n]


def torchvision_images(settings: Settings) -> tuple[Tensor, Tensor]:
    """The training and the test set, downloaded at first use."""
    from torchvision import datasets

    name, root, (rank, size) = settings.dataset, Path(settings.data_dir), ranks()
    source, files = dict(
        mnist=(datasets.MNIST, "MNIST/raw/*-ubyte.gz"),
        fashion_mnist=(datasets.FashionMNIST, "FashionMNIST/raw/*-ubyte.gz"),
        cifar10=(datasets.CIFAR10, "cifar-10-python.tar.gz"),
        celeba=(datasets.CelebA, "celeba/img_align_celeba.zip and, beside it, list_*.txt and identity_*.txt"),
    )[name]
    which, parts = ("split", ("train", "test")) if name == "celeba" else ("train", (True, False))
    folder = root / "celeba/img_align_celeba"
    archive = folder.with_suffix(".zip")
    if rank > 0:
        dist.barrier()  # the first process downloads
    with export.explained(f"cannot download {name} (put {files} into {root.resolve()})"):
        if name == "celeba" and archive.exists() and not folder.exists():
            datasets.utils.extract_archive(str(archive))  # torchvision unpacks only what it has downloaded
        train, test = (source(root, download=True, **{which: part}) for part in parts)
    if rank == 0 and size > 1:
        dist.barrier()
    if name == "celeba":
        names = train.filename[: settings.limit or None], test.filename[: settings.held_out]
        return tuple(read_images([folder / name for name in part], settings) for part in names)
    pixels = (torch.as_tensor(part.data) for part in (train, test))
    return tuple(p[:, None] if p.ndim == 3 else p.permute(0, 3, 1, 2) for p in pixels)


def image_files(settings: Settings) -> list[Path]:
    own, folder = bool(settings.observations), Path(settings.observations or settings.data_dir)
    require(folder.is_dir(), f"no folder {folder} ({'--observations' if own else '--data-dir'})")
    files = export.find_images(folder, own, settings.masks)
    require(len(files) > 0, f"no images in {folder}, outside hidden folders, runs, restored and the masks")
    require(Path(settings.masks).is_dir(), f"no folder {settings.masks} (--masks)")  # "" is this folder
    return files


def squares(files: list[Path], settings: Settings) -> tuple[int, int, int]:
    """For --crop, which takes images of any size: the side of the squares to cut, twice --crop if all images
    that are large enough allow it; the number to cut from each image, and from all."""
    observed = settings.observations and issubclass(CORRUPTIONS[settings.corruption], Downsample)
    crop = settings.crop // (settings.parameters.get("factor", 1) if observed else 1)  # of small files
    sizes = []
    for path in files:
        with suppress(Exception):  # which reading the file will report
            sizes.append((settings.image_size,) * 2 if settings.image_size else export.image_size(path))
    sizes = [size for size in sizes if min(size) >= crop]
    side = min([2 * crop] + [min(size) for size in sizes])
    if side > 16:  # the blocks of JPEG stay in place
        side = max(side - side % 16, crop)
    each = math.ceil(settings.number_to_read() / len(files)) if settings.limit else 10**9
    return side, each, sum(min(each, (H // side) * (W // side)) for H, W in sizes)


def read_picture(path: Path, settings: Settings):
    """An image file with its mask. Raises OSError."""
    from PIL import ImageOps

    def square(image):
        image = image.crop((19, 39, 159, 179)) if settings.dataset == "celeba" else image
        return ImageOps.fit(image, (settings.image_size,) * 2, method=1)  # Lanczos

    own, mask, resize = settings.observations, None, square if settings.image_size else None
    if settings.masks:
        mask = export.read_mask(export.find_mask(path, own, settings.masks), settings.invert_masks)
    return export.read_image(path, 1 if settings.grey else 3, mask, bool(own), resize, raw=True)


def read_images(files: list[Path], settings: Settings) -> Tensor:
    """Clean images (N, C, H, W), or observations with the mask as last channel; bytes if all files have 8
    bits. Prints what was understood."""
    own, pictures, done, images = bool(settings.observations), [], 0, None
    side, each, number = squares(files, settings) if settings.crop else (0, 1, len(files))
    generator = generator_for("cpu", settings.seed, 0, 5)
    memory = math.inf
    with suppress(AttributeError, ValueError):  # on Windows
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    advice = "take fewer (--limit), squares of them (--crop) or, if clean, smaller ones (--image-size)"
    for path in tqdm(files, desc="reading images", leave=False, disable=None):
        try:
            picture = read_picture(path, settings)
            least = min(picture.y.shape[1:])
            require(least >= side, f"{path} has a side of {least} pixels: take a smaller --crop")
        except OSError as error:
            require(settings.skip_bad_images, f"{error}; --skip-bad-images leaves such images out")
            continue
        y = torch.from_numpy(picture.y if own else picture.y[:-1])[None]
        if side:  # squares from random places of a grid
            y = y[0].unfold(1, side, side).unfold(2, side, side).flatten(1, 2).transpose(0, 1)
            y = y[torch.randperm(len(y), generator=generator)[:each]]
        (H, W), need = y.shape[2:], 12 * number * y[0].numel()  # observations, reconstructions and work
        require(need < memory, f"{number} images of {W}x{H} pixels need {need / 1e9:.3g} GB: {advice}")
        images = images if pictures else torch.empty(number, *y.shape[1:], dtype=y.dtype)
        H0, W0 = images.shape[2:]
        message = f"{path} has {W}x{H} pixels, others {W0}x{H0}: --crop N takes squares of any images"
        require((H, W) == (H0, W0), message + ", --image-size N resizes them" * (not own))
        if y.dtype != images.dtype:  # 8 bits and others
            images, y = (as_float(v, v.device) if own else values(v) for v in (images, y))
        images[done : done + len(y)] = y
        done, picture.y, picture.extra = done + len(y), None, {}  # the rest is for the line below
        pictures.append(picture)
    require(len(pictures) > 0, "none of the images can be read")
    images = images[:done]
    missing = 1 - float(images[:, -1].mean(dtype=torch.float32)) if own else 0.0
    require(missing < 1, f"every pixel is missing in {settings.observations}")
    left_out, cuts = len(files) - len(pictures), f"{len(images)} squares of " if side else ""
    line = f"{export.summary(pictures)}, {left_out} left out, {cuts}{W}x{H} pixels, {missing:.1%} missing"
    hint = bool(settings.masks) and missing > 0.5 and not settings.invert_masks
    print(line + "; if white pixels of the masks are the missing ones: --invert-masks" * hint)
    return images


# ---- Metrics and pictures, of held-out observations -------------------------------------------------------
def psnr(x: Tensor, x0: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(4^2 / mean |x - x0|^2), averaged over images."""
    return float((10 * torch.log10(16 / (x - x0).square().flatten(1).mean(1))).mean())


def frechet_distance(x: Tensor, x0: Tensor) -> float:
    """|m - m0|^2 + tr(C + C0 - 2 (C C0)^(1/2)), of the means and covariances of x and x0, both (N, d)."""
    (m, C), (m0, C0) = ((v.mean(0), torch.atleast_2d(torch.cov(v.T))) for v in (x.double(), x0.double()))
    root = torch.linalg.eigvals((C @ C0).cpu()).real.clamp_min(0).sqrt().sum()
    return float((m - m0).square().sum() + C.trace() + C0.trace() - 2 * root)


def draw_samples(state: State, y: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Posterior samples (num_samples, B, C, H, W) given y, and as many unconditional ones as y has rows."""
    generator = generator_for(y.device, settings.seed, 0, 3)  # the same noise in every lap
    how = settings.sample_steps, settings.method, generator
    x = torch.stack([state.draw(y, *how) for _ in range(settings.num_samples)])
    return x, state.draw(torch.zeros_like(y), settings.unconditional_steps, settings.method, generator)


def accuracy(x: Tensor, y: Tensor, x0: Tensor | None, corruption: Corruption) -> dict:
    """Of posterior samples x (S, B, C, H, W) given y, and the truth x0 if it is known. residual: root mean
    square of y - A(x) where something was observed, in units of s (if 0: grey levels). spread: root mean
    square standard deviation. psnr: of one sample; psnr_mean: of the mean of all."""
    error = y[:, :-1] - y[:, -1:] * corruption.A(x[0])
    observed = y[:, -1:].expand_as(error).sum().clamp_min(1)
    residual = float((error.square().sum() / observed).sqrt()) / (corruption.noise or 4 / 255)
    metrics = dict(residual=residual, spread=float(x.var(0).mean().sqrt()))
    return metrics if x0 is None else metrics | dict(psnr=psnr(x[0], x0), psnr_mean=psnr(x.mean(0), x0))


@torch.no_grad()
def scores(state: State, y: Tensor, config: Config) -> dict:
    """Scores by held-out observations y (N, C + 1, H, W) alone, at about a tenth of a lap's cost. Values v, a
    fifth of the observed ones, are hidden from the model and predicted, by sde2m with 8 evaluations:

    energy        E|X - v| - E|X - X'| / 2 of predictions X, X', a proper scoring rule, smaller is better;
                  |.|: root mean square over the hidden values of an image
    coverage_*    fraction of v inside the central 50 and 90 % of 19 predictions
    frechet_pca   Frechet distance of corrupted unconditional samples to the observations, in PCA space (after
                  the proximal FID of Denoising Score Distillation, arXiv 2503.07578)
    """
    generator, draws, steps = generator_for(y.device, config.seed, 0, 6), 19, 8  # the same noise in every lap
    corruption = state.denoiser.corruption
    # Evaluations: three for each image of an optimiser step
    lap = 3 * config.steps * config.batch + len(state.x0) * config.sample_steps
    n = min(len(y), at_most(512, y[0]), max(16, int(0.1 * lap / steps - len(y)) // draws))
    seen, fraction = y[:n], torch.full((n,), 0.2, device=y.device)
    rest = mask_patches(seen, fraction, corruption.patch, generator)
    hidden = seen[:, -1:] - rest[:, -1:]  # (n, 1, H, W)
    x = state.draw(rest.repeat(draws, 1, 1, 1), steps, "sde2m", generator)
    v, X = seen[:, :-1], corruption.observe(x, seen[:, -1:].repeat(draws, 1, 1, 1), generator)[:, :-1]
    X = X.view(draws, *v.shape)
    number = hidden.flatten(1).sum(1) * v.shape[1]  # (n,) of hidden values
    require(number.any(), "too little is held out to hide a fifth of it: raise --held-out")
    below = (X < v).sum(0) + (X == v).sum(0) / 2  # 0 .. draws
    inside = dict(coverage_50=(below >= 5) & (below <= 14), coverage_90=(below >= 1) & (below <= 18))
    result = {name: float((hidden * within).sum() / number.sum()) for name, within in inside.items()}
    X, v = ((hidden * u).flatten(2).transpose(0, 1) for u in (X, v[None]))  # (n, draws, C H W), (n, 1, C H W)
    energy = torch.cdist(X, v).mean((1, 2)) - torch.cdist(X, X).sum((1, 2)) / (2 * draws * (draws - 1))
    energy = (energy / number.sqrt())[number > 0]
    new = corruption(state.draw(torch.zeros_like(y), steps, "sde2m", generator), generator)
    pca = Gaussian(list(state.x0.shape[1:]), 32).to(y.device).fit(y[:, :-1], generator)
    f, f0 = (transform(u[:, :-1], 0).flatten(1) @ F.normalize(pca.U, dim=0) for u in (new, y))
    return result | dict(energy=float(energy.mean()), frechet_pca=frechet_distance(f, f0))


def save_picture(path: Path, data: Data, x: Tensor, new: Tensor) -> None:
    """Rows: observation, two posterior samples, mean and standard deviation of x, truth; new images."""
    from matplotlib.figure import Figure

    y, red = data.held_out, torch.tensor([1.2, -0.8, -0.8], device=x.device).view(3, 1, 1)
    rows = {"observation": torch.where(y[:, -1:] > 0, y[:, :-1], red), "sample 1": x[0], "sample 2": x[1]}
    rows |= {"mean": x.mean(0), "std (white: 1)": 4 * x.std(0) - 2}
    rows |= ({} if data.truth is None else {"truth": data.truth}) | {"unconditional": new}
    columns = min(10, len(y))
    figure = Figure((0.9 * columns + 1.2, 0.9 * len(rows)), layout="constrained")
    for axes, (label, images) in zip(figure.subplots(len(rows), columns, squeeze=False), rows.items()):
        axes[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for axis, image in zip(axes, ((images + 2) / 4).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=100)


# ---- A run: config.json, checkpoint.pt, metrics.jsonl, lap_NN.png -----------------------------------------
def save_checkpoint(folder: Path, state: State, settings: Settings, data: str = "") -> None:
    """Writes checkpoint.pt: tensors and plain types only. data: sha256 of the observations to train on."""
    state.check()
    parts = {name: v.state_dict() if hasattr(v, "state_dict") else v for name, v in vars(state).items()}
    with export.replacing(folder / "checkpoint.pt") as file:
        torch.save(dict(settings=asdict(settings), data=data, state=parts | dict(start=None)), file)
        file.flush()
        os.fsync(file.fileno())


class Checkpoint:
    """checkpoint.pt, read without running code from it. Raises DiffEMError if it is anything else."""

    def __init__(self, folder: str | Path):
        self.folder, path = Path(folder), Path(folder) / "checkpoint.pt"
        require(path.is_file(), f"no checkpoint {path}")
        with export.explained(f"{path} is not a checkpoint of DiffEM, or is damaged"):
            with zipfile.ZipFile(path) as file:  # torch.load does not look at the checksums
                require(file.testzip() is None, "a checksum is wrong")
            saved = torch.load(path, map_location="cpu", weights_only=True)
            self.settings, self.data = Settings(**saved["settings"]), saved["data"]
            self.state = saved["state"]


def restore_state(checkpoint: Checkpoint, corruption: Corruption, device="cpu", data_device="cpu") -> State:
    """The state that was saved, by however many processes."""
    saved, settings = checkpoint.state, checkpoint.settings
    with export.explained(f"weights in {checkpoint.folder} are not those of its own settings, or too large"):
        for name in ("w", "slope"):  # their shapes depend on the data
            setattr(corruption, name, saved["denoiser"][f"corruption.{name}"])
        gaussian = Gaussian(list(saved["x0"].shape[1:]))
        denoiser = new_denoiser(gaussian, corruption.to(device), settings, device)
        state = new_state(saved["x0"].to(data_device), denoiser, settings)
        state.losses[:] = saved["losses"]
        for name in (saved.keys() | vars(state).keys()) - {"x0", "losses"}:  # of one alone: an error
            part, value = getattr(state, name), saved[name]
            part.load_state_dict(value) if hasattr(part, "load_state_dict") else setattr(state, name, value)
        require(0 <= state.drawn <= len(state.x0), "the number of reconstructions is wrong")
        for p in denoiser.parameters() if state.lap else ():  # fused Adam does not look at the shapes
            moments = state.optimizer.state[p]
            ok = moments["exp_avg"].shape == moments["exp_avg_sq"].shape == p.shape
            require(ok, "the optimiser's moments have other shapes")
    return state


def load(run, corruption: Corruption | None = None, best: bool = False, device="cpu") -> Denoiser:
    """The model of a run folder or Checkpoint, of its last lap or of that with the best energy score. Your
    own corruption must be given: loading runs no code of yours."""
    checkpoint = run if isinstance(run, Checkpoint) else Checkpoint(run)
    name, parameters = checkpoint.settings.corruption, checkpoint.settings.parameters
    known = corruption is not None or name in CORRUPTIONS
    require(known, f"{checkpoint.folder} has its own corruption {name!r}: give it to load() or export()")
    corruption = CORRUPTIONS[name](**parameters) if corruption is None else corruption
    given = {key: getattr(corruption, key, value) for key, value in parameters.items()}
    require(given == parameters, f"{checkpoint.folder} was trained on {parameters}, not on {given}")
    checkpoint.settings.compile = "off"  # it may be loaded where nothing can be compiled
    state = restore_state(checkpoint, corruption, device)
    if best and state.best_weights:
        state.average.load_state_dict(state.best_weights)
    return state.model


@contextmanager
def claimed(settings: Settings):
    """The folder of the run. No other process can claim it meanwhile. It is removed if nothing is saved."""
    numbered = (f"{settings.dataset}-{settings.corruption}-{i}" for i in itertools.count(1))
    # The first that has no checkpoint and that nobody holds
    for name in [settings.name] if settings.name or settings.resume else numbered:
        folder = Path(settings.resume or Path("runs", name))
        folder.mkdir(parents=True, exist_ok=True)
        lock, reason = FileLock(folder / ".lock"), f"another process is at work in {folder}"
        if not settings.resume and (folder / "checkpoint.pt").exists():
            reason = f"{folder} exists: choose another --name, or continue it by --resume {folder}"
            continue
        with suppress(Timeout):
            lock.acquire(blocking=False)
            break
    else:
        raise DiffEMError(reason)
    try:
        yield folder
    finally:
        lock.release()
        for remove in (Path(lock.lock_file).unlink, folder.rmdir, folder.parent.rmdir):
            with suppress(OSError):  # it is not empty
                remove()


def prepare(settings: Settings, folder: Path) -> Data:
    """Reads or makes the observations."""
    size, cuda = ranks()[1], torch.cuda.is_available() and settings.device != "cpu"
    require(cuda or settings.device != "cuda", "there is no CUDA device here: --device cpu")
    if cuda:
        local, cards = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        require(local < cards, f"only {cards} GPUs: a smaller --nproc-per-node, or --device cpu")
        torch.cuda.set_device(local)
        # The Gaussian's DCT needs it, and an environment can have set less
        torch.set_float32_matmul_precision("highest")
    device, data = "cuda" if cuda else "cpu", make_data(settings)
    data.digest = hashlib.sha256(data.y.contiguous().numpy()).hexdigest()
    need = (6 if data.y.is_floating_point() else 16) * data.y.nbytes  # y, x0, lap 0, and as much to train
    full = any_rank(cuda and need >= torch.cuda.mem_get_info()[0])  # then all keep the data on the CPU
    data.y, data.held_out = data.y.to("cpu" if full else device), data.held_out.to(device)
    data.truth = None if data.truth is None else data.truth.to(device)
    shown = {name: value for name, value in settings.parameters.items() if value != ()}
    shown |= dict(quality="of the tables", tables=len(shown["tables"])) if "tables" in shown else {}
    shown |= {} if data.corruption.masks is None else dict(rate="of the observed masks")
    given = ", ".join(f"{name} {value}" for name, value in shown.items())
    processes = f"{size} processes on " if size > 1 else ""
    print(f"{folder}: {len(data.y)} observations, {settings.corruption} ({given}), {processes}{device}")
    times = settings.steps * settings.batch // len(data.y)
    if len(data.y) < 1000 and times > 100:
        few = max(1, 80 * len(data.y) // settings.batch)
        print(f"a lap trains on each image {times} times, and may learn them by heart: try --steps {few}")
    return data


def train(settings: Settings, data: Data, folder: Path, checkpoint: Checkpoint | None) -> int:
    """EM with a report and a checkpoint of each lap, and others in between. Returns the exit code."""
    rank, device, state, due = ranks()[0], data.held_out.device, None, time.monotonic() + 180
    if checkpoint:
        same = data.digest == checkpoint.data
        require(same, f"{folder} was made from other data: give the same, or leave out --resume")
        checkpoint.settings = settings
        state = restore_state(checkpoint, data.corruption, device, data.y.device)
        require(settings.laps >= state.lap, f"{folder} has reached lap {state.lap} already: raise --laps")
    shape = "{percentage:3.0f} %|{bar}| {elapsed}, {remaining} left{postfix}"
    bar = tqdm(total=settings.laps, bar_format=shape, disable=rank > 0 or None)
    states = em(data.y, data.corruption, settings, state, device)
    first = [next(states)] if state is None else []  # Ctrl-C ends lap 0 at once: there is nothing to save yet
    with stop_signals() as stop, bar:
        for state in itertools.chain(first, states):
            done = state.lap - 1 + (state.step / settings.steps + state.drawn / len(data.y)) / 2
            bar.update(max(0, done) - bar.n)
            if not bar.disable and state.step % 20 == 0 and 0 < state.step < settings.steps:
                loss = state.losses[state.step - 20 : state.step].mean()
                bar.set_postfix_str(f"lap {state.lap}, loss {loss:.3f}")
            complete = state.drawn == len(data.y)
            line = report(settings, data, folder, state) if complete and rank == 0 else ""
            stopping = any_rank(bool(stop))
            if rank == 0 and (stopping or complete or time.monotonic() > due):
                begin = time.monotonic()
                save_checkpoint(folder, state, settings, data.digest)
                # Every three minutes, or less often if it takes long to write
                due = time.monotonic() + max(180, 10 * (time.monotonic() - begin))
            if line:
                bar.write(line)
            if stopping:
                any_rank(False)  # torchrun ends the first process once another has left: not before it saved
                bar.write(f"stopped; to continue: python {sys.argv[0]} --resume {folder}")
                return 128 + (stop or [signal.SIGINT])[0]
    if rank == 0:
        first, *rest = state.history
        last, best = state.history[-1], min(rest or [first], key=lambda row: row["energy"])
        if last["energy"] > 1.05 * best["energy"]:
            print(f"lap {best['lap']} has a better energy score than the last: export.py {folder} --best")
        if "psnr_mean" in last:
            a, b = first["psnr_mean"], last["psnr_mean"]
            print(f"PSNR of the posterior mean: start {a:.2f} dB, DiffEM {b:.2f} dB ({b - a:+.2f} dB)")
        print(f"picture: {folder}/lap_{last['lap']:02d}.png")
    return 0


@torch.no_grad()
def report(settings: Settings, data: Data, folder: Path, state: State) -> str:
    """Measures a complete lap, for state.history, metrics.jsonl and a picture. Returns a line to print."""
    y = data.held_out
    x, new = draw_samples(state, y, settings)
    row = dict(lap=state.lap) | (dict(loss=float(state.losses.mean())) if state.lap else {})
    row |= accuracy(x, y, data.truth, data.corruption) | scores(state, y, settings)
    state.history.append({name: round(value, 5) for name, value in row.items()})
    if state.lap and all(old["energy"] > state.history[-1]["energy"] for old in state.history[1:-1]):
        state.best_weights = {name: value.clone() for name, value in state.average.state_dict().items()}
    for name, rows in {"config.json": [asdict(settings)], "metrics.jsonl": state.history}.items():
        with export.replacing(folder / name) as file:
            file.write("".join(json.dumps(line) + "\n" for line in rows).encode())
    save_picture(folder / f"lap_{state.lap:02d}.png", data, x, new)
    words = [f"{name} {value:.4g}" for name, value in row.items() if name != "lap"]
    return "  ".join([f"lap {state.lap}/{settings.laps}", *words])


@contextmanager
def stop_signals():
    """A list that receives the first Ctrl-C or SIGTERM: a run stops between two steps. A second one kills."""
    received = []

    def receive(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL if ranks()[1] == 1 else signal.SIG_IGN)  # torchrun repeats it

    with ExitStack() as before:
        with suppress(ValueError):  # only the main thread receives signals
            for number in (signal.SIGINT, signal.SIGTERM):
                before.callback(signal.signal, number, signal.signal(number, receive))
        yield received


@contextmanager
def process_group():
    """Joins the processes of torchrun. The first one prints; the first that fails says why."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))  # the others wait for reports of the first
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        yield
        dist.destroy_process_group()
    except BaseException as error:
        with suppress(RuntimeError):  # the store goes with torchrun
            first = dist.distributed_c10d._get_default_store().add("failures", 1) == 1
            sys.stderr = sys.stderr if first else open(os.devnull, "w")
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = f"{export.in_one_line(error):.200}"
        message = f"another process of this run has died, or cannot be reached ({reason})"
        raise DiffEMError(message + ": --resume the last checkpoint") from error


def run(argv: list[str]) -> int:
    with process_group() if dist.is_torchelastic_launched() else nullcontext():
        given = vars(make_parser({}, {}).parse_known_args(argv)[0])  # the flags that need no corruption
        for name, value in given.items():
            require(value != "", f"--{name.replace('_', '-')} is given, but empty")
        checkpoint = Checkpoint(given["resume"]) if given.get("resume") else None
        settings = parse(argv, given, asdict(checkpoint.settings) if checkpoint else {})
        if (settings.dataset, "published") in PRESETS and settings.preset == "small":
            print("small preset, for a CPU; --preset published is the paper's: about a day on a GPU")
        # The first process saves
        with claimed(settings) if ranks()[0] == 0 else nullcontext(Path(settings.resume)) as folder:
            return train(settings, prepare(settings, folder), folder, checkpoint)


def main(argv: list[str] | None = None, **corruptions: type[Corruption]) -> int:
    """The command line, with your own corruptions by name. Returns the exit code, 2 after a DiffEMError.
    Under torchrun it ends the process."""
    CORRUPTIONS.update(corruptions)
    code = 1
    try:
        code = export.exit_code(lambda: run(sys.argv[1:] if argv is None else argv), "diffem")
    except BaseException:
        if not dist.is_torchelastic_launched():
            raise
        sys.excepthook(*sys.exc_info())
    if dist.is_torchelastic_launched():
        sys.stdout.flush()
        os._exit(code)  # the threads of Gloo and NCCL may outlive the process group, and wait
    return code


if __name__ == "__main__":
    sys.exit(main())
