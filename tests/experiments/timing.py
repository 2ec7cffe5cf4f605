"""Times of functions, and networks of which only the speed matters."""

import time

import numpy as np
import torch
from table import DEVICE, preset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import diffem


def wait() -> None:
    """Until the GPU, if there is one, is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def medians(candidates: dict, rounds: int) -> dict[str, float]:
    """Seconds of each of the candidates, functions that take turns, after one turn to warm up."""
    times = {name: [] for name in candidates}
    for _ in tqdm(range(rounds + 1), leave=False, disable=None):
        for name, function in candidates.items():
            start = time.perf_counter()
            function()
            wait()
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(values[1:])) for name, values in times.items()}


def timed(functions: dict) -> dict[str, float]:
    """From now on, adds up the seconds of all calls of functions, {owner: "their names"}, by name."""
    seconds = {}

    def wrapped(function, name: str):
        def wrapper(*arguments, **keywords):
            wait()
            start = time.perf_counter()
            result = function(*arguments, **keywords)
            wait()
            seconds[name] += time.perf_counter() - start
            return result

        return wrapper

    for owner, names in functions.items():
        for name in names.split():
            seconds[name] = 0.0
            setattr(owner, name, wrapped(getattr(owner, name), name))
    return seconds


def flops_of(network: torch.nn.Module, *inputs) -> int:
    """Of one evaluation."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    return counter.get_total_flops()


def named_network(text: str) -> dict:
    """Of "16 32 64 x 2": the channels of each level, and the blocks in each."""
    channels, _, blocks = text.partition("x")
    return dict(channels=tuple(map(int, channels.split())), blocks=int(blocks))


def random_state(text: str, number: int = 1, device: str = "cpu", **settings) -> tuple:
    """A state of a named network, its observations and settings. The images are random, in colour, of 32x32
    pixels unless image_size is given, and 75 % of the pixels are missing."""
    values = named_network(text) | dict(parameters=dict(rate=0.75), image_size=32) | settings
    settings = preset("folder", "mask", **values)
    generator, corruption = diffem.generator_for(device, 0), diffem.Mask(0.75)
    shape = [3, settings.image_size, settings.image_size]
    x0 = torch.randn(number, *shape, generator=generator, device=device).clamp(-2, 2)
    denoiser = diffem.new_denoiser(diffem.Gaussian(shape, power=3.0), corruption, settings, device)
    state = diffem.new_state(x0, denoiser, settings)
    state.drawn = number
    return state, corruption(x0, generator), settings


def diffusers_step(text: str, batch: int, size: int) -> tuple:
    """A training step of diffusers' UNet2DModel, as a function, and the FLOP of an evaluation."""
    from diffusers import UNet2DModel

    channels, blocks = named_network(text).values()
    down, up = ([kind] * len(channels) for kind in ("DownBlock2D", "UpBlock2D"))
    own = dict(norm_num_groups=8, down_block_types=down, up_block_types=up, add_attention=False)
    model = UNet2DModel(size, 10, 3, block_out_channels=channels, layers_per_block=blocks, **own)
    flops = flops_of(model, torch.zeros(1, 10, size, size), torch.zeros(1))
    optimizer = torch.optim.Adam(model.to(DEVICE).parameters())
    x, t = torch.randn(batch, 10, size, size, device=DEVICE), torch.zeros(batch, device=DEVICE)

    def run() -> None:
        optimizer.zero_grad()
        (model(x, t).sample - x[:, :3]).square().mean().backward()
        optimizer.step()

    return run, flops
