"""How well photographs are restored, lap by lap:  python tests/experiments/restore.py --data-dir DIR

A row for each lap of each corruption: CPU-seconds of training so far, without those of the metrics; the
metrics and scores of diffem.py, and SSIM, on held-out images; the Frechet distances of one sample of each
image (frechet) and of new images (frechet_new) from the clean images, in the features of a small classifier.
The last row is of ddpm with 16 evaluations. --data-dir: a folder for each class. --clean: train on
the clean images, which gives a bound.
"""

import argparse
import time

import table
import torch
from features import accuracy, frechet, measure, observed, read_classes, train_classifier
from torch import Tensor

import diffem


def run(text: str, x0: Tensor, truth: Tensor, distance, options: argparse.Namespace) -> list[dict]:
    """A row for the observations, for each lap, and for the last model with the other sampler."""
    settings = table.preset("folder", text, **options.settings)
    y, held_out = observed(text, settings, x0, truth)
    corruption, seen = table.named_corruption(text), held_out[:, :-1]
    name = dict(corruption=text + " (clean)" * options.clean)
    rows = [name | dict(lap="observed", psnr=diffem.psnr(seen, truth), frechet=distance(seen))]
    start, measuring = time.process_time(), 0.0
    for state in diffem.em(y, corruption, settings):
        if state.drawn < len(y):
            continue
        now = time.process_time()
        if options.clean:
            state.x0 = x0.clone()
        row = name | {"lap": state.lap, "CPU-s": now - start - measuring}
        rows.append(row | measure(state, held_out, truth, settings, distance))
        table.show(rows[-1])
        measuring += time.process_time() - now
    generator = diffem.generator_for("cpu", settings.seed, 0, 3)
    x = torch.stack([state.draw(held_out, 16, "ddpm", generator) for _ in range(settings.num_samples)])
    row = name | dict(lap=f"{state.lap}, ddpm 16") | accuracy(x, held_out, truth, corruption)
    return rows + [row | dict(frechet=distance(x[0]))]


def main() -> None:
    photographs = dict(data_dir="data", images=10_000, held_out=500)
    options = table.parse(__doc__, **photographs, corruptions=["mask 0.75"], clean=False)
    x0, truth, classes = read_classes(options)
    features, rows = train_classifier(x0, classes), []

    def distance(x: Tensor) -> float:
        return frechet(features, x, x0)

    for text in options.corruptions:
        rows += run(text, x0, truth, distance, options)
    table.table(f"Restored, Frechet distance of the truth {distance(truth):.2f}", rows, vars(options))


if __name__ == "__main__":
    main()
