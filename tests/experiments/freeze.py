"""PyTorch, TorchScript, onnxruntime and float16 compared:  python tests/experiments/freeze.py

A network of random weights samples 16 images of 32x32 pixels in colour. The candidates take turns; the median
of their times counts. Besides: the seconds and the peak memory of a process that restores one image by 32
evaluations with onnxruntime, from a cold start; and the largest error of float16, on [-1, 1]. --steps:
evaluations.
"""

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import table
import torch
from timing import medians, random_state

import diffem
import export

COLD = """
import re, sys
import export
code = export.main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
sys.exit(code)"""


def random_run(text: str, folder: Path, settings: dict) -> None:
    """Writes a checkpoint of a model whose weights are random."""
    state, _, settings = random_state(text, **dict(precision="float32") | settings)
    generator = diffem.generator_for("cpu", 0)
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter += 0.05 * diffem.randn_like(parameter, generator)
    diffem.save_checkpoint(folder, state, settings)


def cold_start(model: Path, folder: Path) -> dict:
    """Restores one image by 32 evaluations in a new process."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    pixels[..., 3] = 255 * (pixels[..., 3] > 191)  # alpha: 75 % of the pixels are missing
    Image.fromarray(pixels).save(folder / "photo.png")
    words = f"restore {model} {folder}/photo.png -o {folder}/out --steps 32 --samples 1 --device cpu"
    command, start = [sys.executable, "-c", COLD, *words.split()], time.perf_counter()
    done = subprocess.run(command, cwd=table.ROOT, capture_output=True, text=True, check=True)
    seconds, memory = time.perf_counter() - start, int(done.stdout.split()[-1]) / 1024
    return {"one image, cold (s)": seconds, "peak (MB)": memory}


def compare(text: str, folder: Path, options: argparse.Namespace) -> list[dict]:
    """A row for each candidate, of a network."""
    random_run(text, folder, options.settings)
    with contextlib.redirect_stdout(io.StringIO()):
        for half in (True, False):
            export.export(str(folder), half=half)
    last, contiguous = diffem.load(folder), diffem.load(folder)
    contiguous.network.to(memory_format=torch.contiguous_format)
    script, threads = torch.jit.load(folder / "model.ts.pt"), torch.get_num_threads()
    full, half = (export.Restorer(folder / f"model{kind}.onnx", "cpu", threads) for kind in ("", ".half"))
    generator, steps = diffem.generator_for("cpu", 0), options.steps
    y = diffem.Mask(0.75)(torch.randn(16, 3, 32, 32, generator=generator).clamp(-2, 2), generator)
    candidates = {
        "PyTorch": lambda: contiguous.sample(y, steps, "ddpm", generator),
        "PyTorch, channels_last": lambda: last.sample(y, steps, "ddpm", generator),
        "TorchScript": lambda: script.sample(y, steps, "ddpm", generator),
        "onnxruntime": lambda: full(y.numpy(), steps, "ddpm"),
        "onnxruntime, float16": lambda: half(y.numpy(), steps, "ddpm"),
    }
    seconds, rows = medians(candidates, options.rounds), []
    size = f"{sum(p.numel() for p in last.parameters()) / 1e6:.2f} M"
    for name, value in seconds.items():
        row = {"network": text, "parameters": size, "candidate": name, "images a second": len(y) / value}
        rows.append(row | dict(time=value / seconds["PyTorch"]))
    rows[-2] |= cold_start(folder / "model.onnx", folder)
    rows[-1]["error of float16"] = float(np.abs(half(y.numpy(), 32) - full(y.numpy(), 32)).max()) / 2
    return rows


def main() -> None:
    networks = ["16 32 64 x 2", "64 128 192 x 3"]
    options, rows = table.parse(__doc__, networks=networks, rounds=15, steps=8), []
    for text in options.networks:
        with tempfile.TemporaryDirectory() as folder:
            rows += compare(text, Path(folder), options)
    table.table(f"Sampling 16 images of 32x32 by {options.steps} evaluations", rows, vars(options))


if __name__ == "__main__":
    main()
