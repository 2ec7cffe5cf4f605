"""How many evaluations each sampler needs:  python tests/experiments/samplers.py

One model is trained on digits of which half of the pixels are missing. A row for each method and number of
evaluations: the metrics of diffem.py and SSIM, of --seeds samples of each held-out image; the Frechet
distance of a sample from the clean images, in 32 principal components, and its standard deviation over the
seeds.
"""

import numpy as np
import table
import torch
from features import accuracy, frechet, observed, principal_components
from tqdm import tqdm

import diffem


def main() -> None:
    evaluations = [4, 8, 16, 32, 64, 256]
    options = table.parse(__doc__, methods=[*diffem.METHODS], evaluations=evaluations, seeds=4)
    settings = table.preset("digits", "mask", **options.settings)
    x0, truth = diffem.load_images(settings)
    y, held_out = observed("mask 0.5", settings, x0, truth)
    corruption = table.named_corruption("mask 0.5")
    model = diffem.fit(y, corruption, settings)
    features, rows = principal_components(x0), []
    jobs = [(method, steps) for method in options.methods for steps in options.evaluations]
    for method, steps in tqdm(jobs, disable=None):
        generator = diffem.generator_for("cpu", settings.seed, 7)
        x = torch.stack([model.sample(held_out, steps, method, generator) for _ in range(options.seeds)])
        distances = [frechet(features, sample, x0) for sample in x]
        row = dict(method=method, evaluations=steps) | accuracy(x, held_out, truth, corruption)
        rows.append(row | {"frechet": float(np.mean(distances)), "+-": float(np.std(distances))})
    floor = frechet(features, truth, x0)
    table.table(f"Samplers on digits, Frechet distance of the truth {floor:.2f}", rows, vars(options))


if __name__ == "__main__":
    main()
