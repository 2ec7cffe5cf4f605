"""Where the time of a lap goes, and how fast the M-step is:  python tests/experiments/speed.py

The M-step is compared with a naive loop (float32, contiguous tensors, Adam one parameter after another)
and, if diffusers is installed, with a training step of its UNet2DModel of the same channels
and blocks. The candidates take turns; the median of their times counts. The images are random, 32x32 pixels
in colour (--settings '{"image_size": 64}': 64x64), 75 % of them missing. The lap has 100 steps and redraws
--images.
"""

import time

import table
import torch
from features import measure
from table import DEVICE
from timing import diffusers_step, flops_of, medians, random_state, timed

import diffem


def m_step(text: str, naive: bool = False, **settings):
    """An M-step of a new state, as a function."""
    state, _, settings = random_state(text, 512, DEVICE, **settings)
    if naive:
        state.denoiser.network.to(memory_format=torch.contiguous_format)
        state.optimizer = torch.optim.Adam(state.denoiser.parameters(), settings.lr, foreach=False)

    def run() -> None:
        state.step = 0
        diffem.m_step(state, settings, diffem.generator_for(DEVICE, 0))

    return run


def compare(text: str, rounds: int, settings: dict) -> list[dict]:
    """A row for each way to train a network."""
    float32 = settings | dict(precision="float32", compile="off")
    candidates = {"naive": m_step(text, True, **float32), "float32": m_step(text, **float32)}
    candidates["default"] = m_step(text, **settings)
    state, y, config = random_state(text, **settings)
    inputs = state.x0, state.x0, y, torch.zeros(1)
    flops = dict.fromkeys(candidates, flops_of(state.denoiser.network, *inputs))
    try:
        step = diffusers_step(text, config.batch, config.image_size)
        candidates["diffusers, float32"], flops["diffusers, float32"] = step
    except ImportError:
        print("diffusers is not installed: not compared")
    rows, seconds = [], medians(candidates, rounds)
    for name, value in seconds.items():
        work = 3e-9 * config.batch * flops[name]  # a step costs as much as three evaluations
        row = {"network": text, "M-step": name, "MFLOP an image": flops[name] / 1e6}
        row |= {"images a second": config.batch / value, "GFLOP a second": work / value}
        rows.append(row | {"against naive": seconds["naive"] / value})
    return rows


def lap(text: str, images: int, **own) -> tuple[str, list[dict]]:
    """A title, and a row for each part of one lap and of its metrics."""
    state, y, settings = random_state(text, images, DEVICE, **own | dict(laps=1))
    functions = {diffem: "m_step optimise e_step scores", diffem.Denoiser: "loss"}
    s = timed(functions | {torch.Tensor: "backward", torch: "_foreach_lerp_"})
    held_out, truth, start = y[: images // 8], state.x0[: images // 8].clone(), time.perf_counter()
    *_, state = diffem.em(y, state.denoiser.corruption, settings, state)
    learnt = time.perf_counter() - start
    measure(state, held_out, truth, settings, lambda x: 0.0)
    total = time.perf_counter() - start
    parts = {"data": s["m_step"] - s["loss"] - s["optimise"], "forward": s["loss"], "backward": s["backward"]}
    parts["optimiser"] = s["optimise"] - s["backward"] - s["_foreach_lerp_"]
    parts |= {"average": s["_foreach_lerp_"], "E-step": s["e_step"], "scores": s["scores"]}
    parts |= {"other metrics": total - learnt - s["scores"], "all else": learnt - s["m_step"] - s["e_step"]}
    train = settings.steps * settings.batch / s["m_step"]
    draw = images * settings.e_step_sampler(1)[0] / s["e_step"]
    title = f"One lap of {text}: M-step {train:.0f} images a second, E-step {draw:.0f} evaluations a second"
    return title, [dict(part=name, seconds=value, share=value / total) for name, value in parts.items()]


def main() -> None:
    networks = ["16 32 64 x 2", "32 64 128 x 2"]
    options, rows = table.parse(__doc__, networks=networks, rounds=9, images=512), []
    for text in options.networks:
        rows += compare(text, options.rounds, options.settings)
    table.table("M-step on images in colour", rows, vars(options))
    title, rows = lap(options.networks[0], options.images, **dict(steps=100) | options.settings)
    table.table(title, rows, vars(options))


if __name__ == "__main__":
    main()
