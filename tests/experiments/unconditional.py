"""A last training for new images:  python tests/experiments/unconditional.py --run runs/NAME --data-dir DIR

Further M-steps on the final reconstructions of a run, with y = 0 more often (--p), as the paper trains a second
network for new images. A row before, and one for each p: CPU-seconds, PSNR and Frechet distance of one sample
of the run's held-out images, Frechet distance of new images, in the features of a small classifier of clean
images; and the metrics and scores of diffem.py.
"""

import time
from dataclasses import replace

import table
from features import frechet, measure, read_classes, train_classifier

import diffem


def main() -> None:
    options = table.parse(
        __doc__, run="", data_dir="data", images=10_000, held_out=500, p=[1.0, 0.5], steps=1000
    )
    checkpoint = diffem.Checkpoint(options.run)
    saved, (x0, _, classes) = checkpoint.settings, read_classes(options)
    features, rows, data = train_classifier(x0, classes), [], diffem.make_data(checkpoint.settings)

    def distance(x) -> float:
        return frechet(features, x, x0)

    for p in [saved.p_unconditional, *options.p]:
        corruption = diffem.CORRUPTIONS[saved.corruption](**saved.parameters)
        state = diffem.restore_state(checkpoint, corruption)
        config = replace(saved, p_unconditional=p, steps=options.steps, laps=1, lr=saved.lr / 2, ema=0.998)
        state = diffem.new_state(state.x0.float(), state.model, config)  # from the averaged weights
        state.lap, start = 1, time.process_time()
        for step in range(options.steps if rows else 0):  # the first row is the run's own
            diffem.m_step(state, config, diffem.generator_for("cpu", 7, step))
        row = dict(p=p, seconds=time.process_time() - start)
        rows.append(row | measure(state, data.held_out, data.truth, config, distance))
        table.show(rows[-1])
    table.table("A last training for new images", rows, vars(options))


if __name__ == "__main__":
    main()
