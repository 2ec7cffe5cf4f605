"""Does it matter where the laps start:  python tests/experiments/warm.py

Digits. DiffEM from the smooth Gaussian's draws ("cold"), and from the reconstructions of a run of EM-MMPS of
--first laps ("warm"), as in the paper's experiment: does it gain what EM-MMPS left, and does a cold start come
as far? A row for each lap: the metrics and scores of diffem.py; Frechet distances in 32 principal components.
10 laps, unless --settings says otherwise.
"""

import time

import table
from baselines import em_mmps
from features import frechet, measure, observed, principal_components
from torch import Tensor
from tqdm import tqdm

import diffem


def warm_state(x0: Tensor, corruption: diffem.Corruption, settings: diffem.Settings) -> diffem.State:
    """As after lap 0, with other reconstructions x0."""
    gaussian = diffem.Gaussian(list(x0.shape[1:]), power=1.0).fit(x0, diffem.generator_for("cpu", 0))
    state = diffem.new_state(x0.clone(), diffem.new_denoiser(gaussian, corruption, settings, "cpu"), settings)
    state.drawn = len(x0)
    return state


def main() -> None:
    options, rows = table.parse(__doc__, corruption="mask 0.75", first=3), []
    settings = table.preset("digits", options.corruption, **dict(laps=10) | options.settings)
    x0, truth = diffem.load_images(settings)
    y, held_out = observed(options.corruption, settings, x0, truth)
    corruption, features = table.named_corruption(options.corruption), principal_components(x0)

    def distance(x: Tensor) -> float:
        return frechet(features, x, x0)

    def follow(name: str, states, laps: int) -> diffem.State:
        start, aside = time.process_time(), 0.0  # aside: the metrics
        for state in tqdm(states, desc=name, leave=False, disable=None):
            if state.drawn == len(y):
                now = time.process_time()
                row = {"start": name, "lap": state.lap, "CPU-s": now - start - aside}
                row |= dict(frechet_restored=distance(state.x0))
                if state.lap:
                    row |= measure(state, held_out, truth, settings, distance)
                rows.append(row)
                table.show(row)
                aside += time.process_time() - now
                if state.lap == laps:
                    return state

    other = follow("EM-MMPS", em_mmps(y, corruption, settings), options.first)
    states = diffem.em(y, corruption, settings, warm_state(other.x0, corruption, settings))
    follow("warm", states, settings.laps)
    follow("cold", diffem.em(y, corruption, settings), settings.laps)
    table.table("Where the laps start", rows, vars(options))


if __name__ == "__main__":
    main()
