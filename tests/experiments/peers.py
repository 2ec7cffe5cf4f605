"""DiffEM, EM-MMPS and Ambient at equal CPU-seconds:  python tests/experiments/peers.py --data-dir DIR

The three have the same photographs, network and noise levels, and as many CPU-seconds of training; the first
two have the same start of EM. These restore held-out images by ddpm: 4 samples of each image with the first
number of --evaluations, and one with the second. Ambient restores by one evaluation, E[x0 | y]. New images are
drawn with the second number. Frechet distances from the clean images are in the features of a small classifier.
EM-MMPS needs a linear corruption; it has 1 iteration of conjugate gradients for masks, as published, and 3 for
others, or --iterations. Ambient needs a mask. --data-dir: a folder for each class. --seconds: CPU-seconds for
each row.
"""

import argparse
import time

import table
import torch
from baselines import AmbientMean, ambient, em_mmps
from features import accuracy, frechet, observed, read_classes, train_classifier
from torch import Tensor
from tqdm import tqdm

import diffem


def train(method: str, y: Tensor, corruption, settings: diffem.Settings, options: argparse.Namespace):
    """The model that restores, the model that draws new images, and the lap, after the CPU-seconds."""
    start, seconds = time.process_time(), options.seconds
    bar = tqdm(total=seconds, unit="CPU-s", desc=method, leave=False, disable=None)

    def within() -> bool:
        used = time.process_time() - start
        bar.update(min(used, seconds) - bar.n)
        return used < seconds

    with bar:
        if method == "Ambient":
            denoiser = ambient(y, corruption.rate, 0.1, settings, within)
            return AmbientMean(denoiser.denoiser), denoiser, "-"
        em, own = diffem.em, {}
        if method == "EM-MMPS":
            em, own = em_mmps, dict(iterations=options.iterations or (1 if corruption.hides_pixels() else 3))
        for state in em(y, corruption, settings, **own):
            if not within():
                break
        return state.model, state.average, state.lap


def run(text: str, method: str, x0: Tensor, truth: Tensor, features, options: argparse.Namespace) -> dict:
    """The row of a method."""
    # The lap that the time ends in is not known: no plan for the learning rate and the sampler
    constant = dict(laps=10**6, sample_steps=16, first_sample_steps=0)
    settings = table.preset("folder", text, **constant | options.settings)
    corruption = table.named_corruption(text)
    y, held_out = observed(text, settings, x0, truth)
    restore, create, lap = train(method, y, corruption, settings, options)
    generator, start = diffem.generator_for("cpu", settings.seed, 2), time.process_time()

    def draw(model, y: Tensor, steps: int) -> Tensor:
        return torch.cat([model.sample(part, steps, "ddpm", generator) for part in y.split(250)])

    few, many = options.evaluations
    x = torch.stack([draw(restore, held_out, few) for _ in range(4)])
    speed = 4 * len(truth) / (time.process_time() - start)
    fine, new = draw(restore, held_out, many), draw(create, torch.zeros_like(held_out), many)
    row = dict(corruption=text, method=method, lap=lap) | accuracy(x, held_out, truth, corruption)
    row |= dict(frechet=frechet(features, x[0], x0), frechet_new=frechet(features, new, x0))
    row[f"psnr, {many} evaluations"] = diffem.psnr(fine, truth)
    row[f"frechet, {many} evaluations"] = frechet(features, fine, x0)
    return row | {"samples a CPU-second": speed}


def main() -> None:
    photographs = dict(data_dir="data", images=10_000, held_out=500)
    corruptions = ["mask 0.75", "mask 0.5", "blur 1.0", "jpeg 10"]
    own = dict(corruptions=corruptions, methods=["DiffEM", "EM-MMPS", "Ambient"], seconds=1200)
    own |= dict(evaluations=[16, 64], iterations=0)
    options = table.parse(__doc__, **photographs, **own)
    x0, truth, classes = read_classes(options)
    features, rows = train_classifier(x0, classes), []
    for text in options.corruptions:
        for method in options.methods:
            if method == "DiffEM" or "mask" in text or method == "EM-MMPS" and "jpeg" not in text:
                rows.append(run(text, method, x0, truth, features, options))
                table.show(rows[-1])
    floor = frechet(features, truth, x0)
    title = f"Photographs, {options.seconds} CPU-seconds each, Frechet distance of the truth {floor:.2f}"
    table.table(title, rows, vars(options))


if __name__ == "__main__":
    main()
