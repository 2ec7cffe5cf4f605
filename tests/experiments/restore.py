"""How well photographs are restored, lap by lap:  python tests/experiments/restore.py --data-dir DIR --corruptions "mask 0.75"

A row a lap and run: CPU-seconds so far (less those of the metrics), PSNR and SSIM on held-out images of one sample and of the
mean of 8, their spread, coverage of hidden values, and the Frechet distance, in the features of a small classifier trained on
clean images, of posterior and of new samples. --clean: the bound, the same network trained on the clean images themselves.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
import benchmark  # noqa: E402

import diffem  # noqa: E402


def measure(state, y, truth, x0, corruption, settings, features) -> dict:
    metrics, samples = diffem.evaluate(state, y, truth, corruption, settings)
    scores, _ = diffem.judge(state, y, corruption, settings)
    row = {"sample": metrics["psnr"], "mean of 8": metrics["psnr_mean"], "SSIM": metrics["ssim"], "SSIM of the mean": metrics["ssim_mean"]}
    row |= {name: scores[name] for name in ("energy", "covers_90")} | dict(spread=metrics["spread"])
    row["Frechet"] = benchmark.frechet(features, samples["x"][0], x0)
    row["Frechet, new"] = benchmark.frechet(features, samples["prior"], x0)
    return row


def run(text: str, x0, truth, features, options) -> list[dict]:
    """A row for each lap."""
    corruption = benchmark.named_corruption(text)
    own = dict(dataset="folder", seed=options.seed, rescale=text.split()[0] in diffem.ALIKE)
    settings = diffem.Settings(**diffem.PRESETS["folder", "small"] | own | options.settings)
    generator = diffem.generator_for("cpu", settings.seed, 0, 0)
    y, held_out = (diffem.corrupt(x, corruption, generator) for x in (x0, truth))
    rows, aside, begun = [], 0.0, time.process_time()
    observed = {"sample": diffem.psnr(held_out[:, :-1], truth), "Frechet": benchmark.frechet(features, held_out[:, :-1], x0)}
    rows.append({"corruption": text, "lap": "observed"} | observed)
    for state in diffem.em(y, corruption, settings):
        if options.clean and state.drawn == len(y):
            state.x0 = x0.clone()
        if state.drawn == len(y):
            now = time.process_time()
            metrics = measure(state, held_out, truth, x0, corruption, settings, features)
            rows.append({"corruption": text + " (clean)" * options.clean, "lap": state.lap, "CPU-s": now - begun - aside} | metrics)
            print({key: round(value, 3) if isinstance(value, float) else value for key, value in rows[-1].items()}, flush=True)
            aside += time.process_time() - now
            if state.lap == settings.laps:
                generator = diffem.generator_for("cpu", settings.seed, 0, 3)
                x = torch.stack([diffem.sample(state.model, held_out, 16, "ddpm", generator) for _ in range(8)])
                rows[-1] |= {"ddpm 16: sample": diffem.psnr(x[0], truth), "mean": diffem.psnr(x.mean(0), truth)}
                rows[-1] |= {"ddpm 16: Frechet": benchmark.frechet(features, x[0], x0)}
                print(rows[-1], flush=True)
            if options.save:
                torch.save([state.average.module.state_dict(), state.x0.half()], options.save)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", required=True, help="images in a folder a class")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--held-out", type=int, default=500)
    parser.add_argument("--corruptions", nargs="*", default=["mask 0.75"])
    parser.add_argument("--clean", action="store_true", help="train on clean images: the bound")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON: settings on top of the preset's")
    parser.add_argument("--save", help="a file for weights and reconstructions")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    x, classes = benchmark.read_classes(options)
    x0, truth = x[:-1000], x[-1000:][: options.held_out]
    features, rows = benchmark.train_classifier(x0, classes[:-1000]), []
    for text in options.corruptions:
        rows += run(text, x0, truth, features, options)
    shown = {key: value for key, value in vars(options).items() if key not in ("data_dir", "save")}
    benchmark.table(f"Restored, Frechet distance of the truth {benchmark.frechet(features, truth, x0):.2f}", rows, shown)


if __name__ == "__main__":
    main()
