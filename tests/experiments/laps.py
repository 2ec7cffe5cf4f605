"""Does the energy score find the best lap of digits:  python tests/experiments/laps.py

A row for each corruption. The energy score sees no truth. Two laps are the best by the truth: one has the
least Frechet distance of restored images, in 32 principal components, and one the largest PSNR of the mean.
The row says what the lap of the best energy and the last lap lose against these. In most runs the last lap is
the best. EM that draws too narrowly degrades:

    python tests/experiments/laps.py --corruptions "mask 0.9" "block 0.9" \\
        --settings '{"laps": 6, "method": "ddpm", "sample_steps": 16, "first_sample_steps": 0}'

10 laps, unless --settings says otherwise.
"""

import table
from features import frechet, measure, observed, principal_components
from tqdm import tqdm

import diffem


def run(true: str, assumed: str, settings: diffem.Settings, every: bool = True) -> list[dict]:
    """A row for each lap of a run, or for the last. One law corrupts the digits, another may be assumed."""
    x0, truth = diffem.load_images(settings)
    y, held_out = observed(true, settings, x0, truth)
    features, rows = principal_components(x0), []

    def distance(x) -> float:
        return frechet(features, x, x0)

    with tqdm(total=settings.laps, desc=f"{true} as {assumed}", leave=False, disable=None) as bar:
        for state in diffem.em(y, table.named_corruption(assumed), settings):
            if state.lap and state.drawn == len(y) and (every or state.lap == settings.laps):
                row = dict(lap=state.lap) | measure(state, held_out, truth, settings, distance)
                rows.append(row | dict(frechet_restored=distance(state.x0)))
            bar.update(state.lap - bar.n)
    return rows


def compare(rows: list[dict]) -> dict:
    """What the lap of the best energy and the last lap lose."""
    chosen, last = min(rows, key=lambda row: row["energy"]), rows[-1]
    nearest = min(rows, key=lambda row: row["frechet_restored"])
    sharpest = max(rows, key=lambda row: row["psnr_mean"])
    result = {"best energy": chosen["lap"], "best Frechet": nearest["lap"], "best PSNR": sharpest["lap"]}
    for name, row in (("best energy", chosen), ("last", last)):
        more = row["frechet_restored"] / nearest["frechet_restored"] - 1
        result[f"{name}: Frechet lost (%)"] = 100 * more
        result[f"{name}: PSNR lost (dB)"] = sharpest["psnr_mean"] - row["psnr_mean"]
    return result | {
        name: chosen[name] for name in ("energy", "coverage_50", "coverage_90", "spread", "frechet_pca")
    }


def main() -> None:
    names = [f"{kind} {value}" for kind in ("mask", "block", "noise", "blur") for value in (0.5, 0.9)]
    options, rows = table.parse(__doc__, corruptions=names), []
    for text in options.corruptions:
        settings = table.preset("digits", text, **dict(laps=10) | options.settings)
        rows.append(dict(corruption=text) | compare(run(text, text, settings)))
        table.show(rows[-1])
    table.table("The lap with the best energy", rows, vars(options))


if __name__ == "__main__":
    main()
