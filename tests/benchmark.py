"""Comparisons by measurement:  python tests/benchmark.py export  prints a table and appends it to benchmark.jsonl.

Speeds are ratios within one run: the candidates take turns, the median of their times counts.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import diffem  # noqa: E402
import export  # noqa: E402


def machine() -> dict:
    """What a figure depends on besides the code."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.partition(": ")[2] for line in info.splitlines() if line.startswith("model name")), platform.processor())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(cpu=model, cores=os.cpu_count(), threads=torch.get_num_threads(), gpu=gpu, torch=torch.__version__,
                python=platform.python_version(), date=time.strftime("%Y-%m-%d"))  # fmt: skip


def table(title: str, rows: list[dict], settings: dict) -> None:
    """Prints rows as Markdown, and appends them to benchmark.jsonl with the settings and the machine."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    print(f"\n**{title}** ({', '.join(f'{key} {value}' for key, value in machine().items() if value)})\n")
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        values = (row.get(name, "") for name in names)
        print("| " + " | ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in values) + " |")
    with open("benchmark.jsonl", "a") as file:
        file.write(json.dumps(dict(title=title, settings=settings, machine=machine(), rows=rows)) + "\n")


def medians(candidates: dict, rounds: int, bar: tqdm) -> dict[str, float]:
    """Seconds of each of the candidates, functions that take turns, after one turn to warm up."""
    times = {name: [] for name in candidates}
    for i in range(rounds + 1):
        for name, function in candidates.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
            bar.update()
    return {name: float(np.median(values[1:])) for name, values in times.items()}


# ---- export: what freezing a model brings ---------------------------------------------------------------------------


def random_run(folder: Path, channels: tuple, blocks: int) -> Path:
    """A run folder of a model of 32x32 colour images with missing pixels, whose weights are random."""
    settings = diffem.Settings(dataset="folder", channels=channels, blocks=blocks, parameters=dict(rate=0.75, noise=1e-3))
    generator = torch.Generator().manual_seed(0)
    state = diffem.new_state(torch.zeros(1, 3, 32, 32), [4, 32, 32], diffem.Mask(0.75, 1e-3), settings)
    with torch.no_grad():
        for parameter in state.average.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    folder.mkdir()
    diffem.save_checkpoint(folder, state, settings, "")
    return folder


def cold_start(model: Path, folder: Path) -> tuple[float, float]:
    """Seconds and MB of a process that restores one 32x32 image by 32 steps."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    pixels[..., 3] = 255 * (pixels[..., 3] > 191)
    Image.fromarray(pixels).save(folder / "photo.png")
    code = f"""
import re, sys
sys.path.insert(0, {str(ROOT)!r})
import export
code = export.main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
sys.exit(code)"""
    arguments = ["restore", model, folder / "photo.png", "-o", folder / "out", "--steps=32", "--samples=1", "--device=cpu"]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True)
    return time.perf_counter() - start, int(done.stdout.split()[-1]) / 1024


def compare_exports(options: argparse.Namespace) -> None:
    """PyTorch, TorchScript, onnxruntime and its float16 graph, each sampling 16 images of 32x32 pixels by 8 steps."""
    networks = {"(16, 32, 64) x 2": ((16, 32, 64), 2), "(64, 128, 192) x 3": ((64, 128, 192), 3)}
    rounds, steps, rows = options.rounds, 8, []
    print(f"{len(networks)} networks, 5 candidates, {rounds} rounds of {steps} steps: about two minutes on 2 cores")
    y = diffem.Mask(0.75)(torch.randn(16, 3, 32, 32).clamp(-2, 2), torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as root, tqdm(total=len(networks) * 5 * (rounds + 1), mininterval=2) as bar:
        for number, (name, (channels, blocks)) in enumerate(networks.items()):
            folder = random_run(Path(root, str(number)), channels, blocks)
            with contextlib.redirect_stdout(io.StringIO()):
                for half in (True, False):
                    export.export(str(folder), half=half)
            generator = torch.Generator().manual_seed(0)
            last, contiguous = diffem.load(folder), diffem.load(folder)
            contiguous.network.to(memory_format=torch.contiguous_format)
            script, threads = torch.jit.load(folder / "model.ts.pt"), torch.get_num_threads()
            full, half = (export.Restorer(folder / f"model{kind}.onnx", "cpu", threads) for kind in ("", ".half"))
            seconds = medians({
                "PyTorch": lambda: diffem.sample(contiguous, y, steps, "ddpm", generator),
                "PyTorch, channels_last": lambda: diffem.sample(last, y, steps, "ddpm", generator),
                "TorchScript": lambda: script.sample(y, steps),
                "onnxruntime": lambda: full(y.numpy(), steps),
                "onnxruntime, float16": lambda: half(y.numpy(), steps),
            }, rounds, bar)  # fmt: skip
            difference = np.abs(half(y.numpy(), 32) - full(y.numpy(), 32)).max() / 2  # on [-1, 1]
            start, memory = cold_start(folder / "model.onnx", folder)
            parameters = sum(p.numel() for p in last.parameters()) / 1e6
            for candidate, value in seconds.items():
                row = dict(network=name, parameters=f"{parameters:.2f} M", candidate=candidate, time=value / seconds["PyTorch"])
                rows.append(row | {"images a second": 16 / value})
            rows[-2] |= {"one image, cold (s)": start, "peak (MB)": memory}
            rows[-1] |= {"error by float16": float(difference)}
    table("Sampling 16 images of 32x32 by 8 steps", rows, dict(rounds=rounds, steps=steps, seed=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("export", help=compare_exports.__doc__)
    command.add_argument("--rounds", type=int, default=15)
    command.set_defaults(function=compare_exports)
    options = parser.parse_args()
    options.function(options)


if __name__ == "__main__":
    main()
