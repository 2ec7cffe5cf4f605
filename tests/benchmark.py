"""Comparisons by measurement:  python tests/benchmark.py speed | samplers | images | stopping | misspecified | export
prints a table and appends it to benchmark.jsonl. `speed` compares with diffusers where it is installed.

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
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
sys.path.insert(0, str(ROOT))
import baselines  # noqa: E402

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
    settings = diffem.Settings(dataset="folder", channels=channels, blocks=blocks, precision="float32",
                               parameters=dict(rate=0.75, noise=1e-3))  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    denoiser = diffem.new_denoiser(diffem.Gaussian([3, 32, 32], power=3.0), diffem.Mask(0.75, 1e-3), settings, "cpu")
    state = diffem.new_state(torch.zeros(1, 3, 32, 32), denoiser, settings)
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


# ---- speed: where the time of a lap goes, and what the M-step gains -------------------------------------------------


def image_state(channels: tuple, **settings) -> tuple:
    """A state on 512 images of 32x32 pixels in colour, 75 % of them masked, with its observations and settings."""
    config = diffem.Settings(dataset="folder", channels=channels, blocks=2, flip=True, parameters=dict(rate=0.75, noise=1e-3),
                             **settings)  # fmt: skip
    x0 = torch.randn(512, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-2, 2).to(DEVICE)
    corruption = diffem.Mask(0.75).to(DEVICE)
    y = corruption(x0, torch.Generator(DEVICE).manual_seed(1))
    denoiser = diffem.new_denoiser(diffem.Gaussian([3, 32, 32], power=3.0), corruption, config, DEVICE)
    return diffem.new_state(x0, denoiser, config), y, corruption, config


def flops_of(config: diffem.Settings) -> float:
    """Of one evaluation of the network on one image."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network, inputs = diffem.UNet(10, 3, config), (torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, 32, 32))
        with FlopCounterMode(display=False) as counter:
            network(*inputs, torch.ones(1))
    return counter.get_total_flops()


def synchronised(function):
    """As it is, but it returns when the GPU, if any, is done."""

    def wrapper(*arguments, **keywords):
        result = function(*arguments, **keywords)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    return wrapper


def naive_m_step(channels: tuple):
    """The M-step in float32, contiguous, eager, Adam and the moving average one parameter after another."""
    state, _, corruption, config = image_state(channels, precision="float32", compile="off")
    for model in (state.denoiser, state.average.module):
        model.network.to(memory_format=torch.contiguous_format)
    state.optimizer = torch.optim.Adam(state.denoiser.parameters(), lr=1e-3, foreach=False)

    def update(model: torch.nn.Module) -> None:
        with torch.no_grad():
            for average, parameter in zip(state.average.module.parameters(), model.parameters()):
                average.mul_(0.99).add_(parameter, alpha=0.01)

    state.average.update_parameters = update
    return m_steps(state, corruption, config)


def m_steps(state: diffem.State, corruption: diffem.Corruption, config: diffem.Settings):
    def run() -> None:
        state.step = 0
        diffem.m_step(state, corruption, config, diffem.generator_for(DEVICE, 0))

    return synchronised(run)


def diffusers_step(channels: tuple, flops: float):
    """A training step of diffusers' UNet2DModel, of as many multiply-adds, or None where it is not installed."""
    try:
        from diffusers import UNet2DModel
    except ImportError:
        print("diffusers is not installed: not compared")
        return None
    from torch.utils.flop_counter import FlopCounterMode

    best = None
    for width in range(8, 8 * channels[0], 8):
        widths = [width * c // channels[0] for c in channels]
        model = UNet2DModel(sample_size=32, in_channels=10, out_channels=3, block_out_channels=widths, norm_num_groups=8,
                            down_block_types=["DownBlock2D"] * len(widths), up_block_types=["UpBlock2D"] * len(widths),
                            add_attention=False)  # fmt: skip
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 10, 32, 32), torch.zeros(1))
        off = abs(counter.get_total_flops() - flops)
        best = (off, model, counter.get_total_flops()) if best is None or off < best[0] else best
    _, model, flops_there = best
    print(f"diffusers' UNet2DModel: {flops_there / 1e6:.0f} MFLOP an image, ours {flops / 1e6:.0f}")
    model.to(DEVICE)
    optimizer, x = torch.optim.Adam(model.parameters(), lr=1e-3), torch.randn(64, 10, 32, 32, device=DEVICE)

    def run() -> None:
        loss = (model(x, torch.zeros(64, device=DEVICE)).sample - x[:, :3]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return synchronised(run)


@contextlib.contextmanager
def stopwatch(parts: dict):
    """Adds up the seconds spent in functions, {name of a part: [(owner, attribute), ..]}, into the dict it yields."""
    seconds, before = dict.fromkeys(parts, 0.0), []

    def timed(function, part: str):
        def wrapper(*arguments, **keywords):
            if not torch.is_grad_enabled() and part == "forward":  # sampling's
                return function(*arguments, **keywords)
            start = time.perf_counter()
            result = synchronised(function)(*arguments, **keywords)
            seconds[part] += time.perf_counter() - start
            return result

        return wrapper

    for part, functions in parts.items():
        for owner, name in functions:
            before.append((owner, name, getattr(owner, name)))
            setattr(owner, name, timed(getattr(owner, name), part))
    try:
        yield seconds
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def lap_table(channels: tuple, steps: int) -> list[dict]:
    """Where a lap's time goes: as many steps of 64 images as shown, 512 images redrawn, and the metrics and pictures."""
    state, y, corruption, config = image_state(channels, steps=steps, laps=1, held_out=64)
    x0, history = state.x0[:64].float(), []
    flops = flops_of(config)
    parts = {
        "data": [(diffem, "random_images"), (diffem, "augment"), (diffem.Corruption, "__call__")],
        "forward": [(diffem.Denoiser, "loss")], "backward": [(torch.Tensor, "backward")],
        "optimiser": [(state.optimizer, "step"), (torch.nn.utils, "clip_grad_norm_")],
        "average": [(diffem.AveragedModel, "update_parameters")], "sampling": [(diffem, "e_step")],
        "metrics, pictures": [(diffem, "report")],
    }  # fmt: skip
    state.drawn = len(y)
    with tempfile.TemporaryDirectory() as folder, stopwatch(parts) as seconds:
        start = time.perf_counter()
        for state in diffem.em(y, corruption, config, state):
            pass
        diffem.report(state, (y[:64], x0), corruption, config, Path(folder), history, None)
        total = time.perf_counter() - start
    work = {"forward": steps * 64, "backward": 2 * steps * 64, "sampling": 512 * config.sample_steps}
    rows = []
    for part, value in (seconds | {"all else": total - sum(seconds.values())}).items():
        row = {"part": part, "seconds": value, "share": value / total}
        if part in work:
            row["GFLOP a second"] = work[part] * flops / value / 1e9
        rows.append(row)
    train = sum(seconds[part] for part in ("data", "forward", "backward", "optimiser", "average"))
    return rows + [{"part": "M-step", "seconds": train, "images a second": steps * 64 / train},
                   {"part": "E-step", "seconds": seconds["sampling"],
                    "images a second": 512 * config.sample_steps / seconds["sampling"]}]  # fmt: skip


def compare_speed(options: argparse.Namespace) -> None:
    """Where the time of a lap goes, and the M-step's images a second against other ways to train."""
    networks = [(16, 32, 64), (32, 64, 128)]
    print(f"{len(networks)} networks, 5 candidates, {options.rounds} rounds, and a lap: about four minutes on 2 cores")
    rows = []
    with tqdm(total=5 * len(networks) * (options.rounds + 1), mininterval=2) as bar:
        for channels in networks:
            float32, default = dict(precision="float32", compile="off"), image_state(channels)
            flops = flops_of(default[3])
            candidates = {"naive: float32, contiguous": naive_m_step(channels), "default": m_steps(default[0], *default[2:])}
            state, _, corruption, config = image_state(channels, **float32)
            candidates["float32"] = m_steps(state, corruption, config)
            if options.compile:
                state, _, corruption, config = image_state(channels, compile="on")
                candidates["default, compiled"] = m_steps(state, corruption, config)
            candidates |= {"diffusers' UNet2DModel": diffusers_step(channels, flops)}
            candidates = {name: function for name, function in candidates.items() if function}
            for name, seconds in medians(candidates, options.rounds, bar).items():
                rows.append({"network": f"{channels} x 2", "M-step": name, "images a second": 64 / seconds, "GFLOP a second":
                             3 * 64 * flops / seconds / 1e9})  # fmt: skip
            first = rows[-len(candidates)]["images a second"]
            for row in rows[-len(candidates) :]:
                row["against naive"] = row["images a second"] / first
            small, large = image_state(channels), image_state(channels)
            small[0].sample_batch = large[0].sample_batch = 64
            one, two = (lambda state=s, y=y, c=c: redraw(state, y, c) for s, y, c in
                        ((small[0], small[1][:128], small[3]), (large[0], large[1][:256], large[3])))  # fmt: skip
            times = medians({"one": one, "two": two}, 3, tqdm(disable=True))
            print(f"E-step of 256 images against 128: {times['two'] / times['one']:.2f} times the time")
    settings = {key: value for key, value in vars(options).items() if key != "function"}
    table("M-step, batch 64 of 32x32 in colour", rows, settings)
    table("One lap: 100 steps of 64, 512 images redrawn, U-Net (16, 32, 64) x 2", lap_table((16, 32, 64), 100), settings)


def redraw(state: diffem.State, y: torch.Tensor, config: diffem.Settings) -> None:
    state.drawn, state.lap = 0, 1
    while state.drawn < len(y):
        diffem.e_step(state, y, config, torch.Generator(DEVICE).manual_seed(0))


# ---- samplers: how many evaluations each method needs ----------------------------------------------------------------

EVALUATIONS = (4, 8, 16, 32, 64, 256)


def compare_samplers(options: argparse.Namespace) -> None:
    """Posterior samples of one model of the digits by each method with 4 to 256 evaluations: PSNR, spread, Frechet distance."""
    print("a run on the digits, then each way to sample them: about ten minutes")
    jobs = [(method, steps) for method in options.methods for steps in EVALUATIONS]
    settings = diffem.Settings(**diffem.PRESETS["digits", "small"])
    x0, truth = diffem.load_data(settings)
    corruption, generator = diffem.Mask(0.5), diffem.generator_for("cpu", 0, 0, 0)
    y, observed = (corruption(v, generator) for v in (x0, truth))
    model, rows = diffem.fit(y, corruption, settings), []
    features = principal_features(x0)
    for method, steps in tqdm(jobs, mininterval=5):
        generator = diffem.generator_for("cpu", 0, 7)
        samples = torch.stack([diffem.sample(model, observed, steps, method, generator) for _ in range(options.seeds)])
        distances = [frechet(features, x, x0) for x in samples]
        rows.append({"method": method, "evaluations": steps, "PSNR": diffem.psnr(samples[0], truth),
                     "PSNR of the mean": diffem.psnr(samples.mean(0), truth),
                     "spread": float(samples.std(0).square().mean().sqrt()),
                     "Frechet": float(np.mean(distances)), "+-": float(np.std(distances))})  # fmt: skip
    shown = {key: value for key, value in vars(options).items() if key != "function"}
    table(f"Samplers on digits, Frechet distance of the truth {frechet(features, truth, x0):.2f}", rows, shown)


def principal_features(x0: torch.Tensor):
    """The 32 principal components of small images, as features to compare sets of them by."""
    fitted = diffem.Gaussian(list(x0.shape[1:]), 32).fit(x0, diffem.generator_for("cpu", 0))
    return lambda x: diffem.transform(x - fitted.mean, 0).flatten(1) @ torch.nn.functional.normalize(fitted.U, dim=0)


# ---- images: DiffEM, EM-MMPS and Ambient Diffusion at equal CPU-seconds ----------------------------------------------


def read_classes(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, H, W) in [-2, 2] and their classes (N,), the names of their folders, in a random order."""
    settings = diffem.Settings(dataset="folder", data_dir=options.data_dir)
    files = diffem.image_files(settings)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[: options.images + 1000]
    files = [files[i] for i in order]
    names = sorted({file.parent.name for file in files})
    return diffem.read_images(files, settings)[:, :-1], torch.tensor([names.index(file.parent.name) for file in files])


def train_classifier(x0: torch.Tensor, classes: torch.Tensor) -> torch.nn.Module:
    """A small network for the classes of clean images, for the sake of its 64 features."""
    nn, F = torch.nn, torch.nn.functional
    torch.manual_seed(0)
    layers = [layer for a, b in ((3, 32), (32, 64), (64, 128))
              for layer in (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.SiLU(), nn.AvgPool2d(2))]  # fmt: skip
    features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 64), nn.SiLU())
    head = nn.Linear(64, int(classes.max()) + 1)
    optimizer = torch.optim.Adam([*features.parameters(), *head.parameters()], lr=2e-3)
    for _ in tqdm(range(10), desc="classifier", leave=False):
        for batch in torch.randperm(len(x0)).split(128):
            loss = F.cross_entropy(head(features(x0[batch])), classes[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    features.eval()
    with torch.no_grad():
        right = [(head(features(x)).argmax(1) == c).float() for x, c in zip(x0[-1000:].split(500), classes[-1000:].split(500))]
    print(f"classifier: {100 * float(torch.cat(right).mean()):.0f} % right on its training images")
    return features


@torch.no_grad()
def frechet(features, x: torch.Tensor, x0: torch.Tensor) -> float:
    """The Frechet distance of two sets of images in these features."""
    f, f0 = (torch.cat([features(part.clamp(-2, 2)) for part in images.split(500)]) for images in (x, x0))
    return float(diffem.frechet_distance(f, f0))


def train_on_images(name: str, y: torch.Tensor, corruption: diffem.Corruption, config: diffem.Settings, seconds: int, bar: tqdm):
    """A denoiser to sample the posterior with, after so many CPU-seconds."""
    start = time.process_time()
    shown = bar.n

    def within() -> bool:
        used = time.process_time() - start
        bar.update(round(shown + min(used, seconds) - bar.n, 1))
        return used < seconds

    if name == "Ambient":
        denoiser = baselines.ambient(y, corruption.rate, 0.1, config, within)
        return baselines.MMPS(denoiser, corruption, 1), denoiser, "-"
    for state in baselines.em_mmps(y, corruption, config) if name == "EM-MMPS" else diffem.em(y, corruption, config):
        if not within():
            break
    return state.model, state.average.module.eval(), state.lap


def named_corruption(text: str) -> diffem.Corruption:
    """Of "mask 0.5" and the like: a name and its arguments."""
    kind, *numbers = text.split()
    return diffem.CORRUPTIONS[kind](*(float(number) if "." in number else int(number) for number in numbers))


def compare_on_images(options: argparse.Namespace) -> None:
    """DiffEM, EM-MMPS and Ambient Diffusion on images, with as many CPU-seconds for each."""
    jobs = [(text, name) for text in options.corruptions for name in options.methods
            if not (name == "Ambient" and "mask" not in text or name == "EM-MMPS" and "jpeg" in text)]  # fmt: skip
    total = len(jobs) * options.seconds
    print(f"{len(jobs)} runs of {options.seconds} CPU-seconds: {total / 60:.0f} minutes, and the classifier and metrics")
    x, classes = read_classes(options)
    x0, truth = x[:-1000], x[-1000:][: options.held_out]
    features, rows = train_classifier(x0, classes[:-1000]), []
    with tqdm(total=total, unit="CPU-s", mininterval=5) as bar:
        for text, name in jobs:
            corruption = named_corruption(text)
            preset = diffem.PHOTOS | dict(laps=10**6, steps=500, sample_steps=16, first_sample_steps=0, seed=options.seed)
            config = diffem.Settings(dataset="folder", **preset)
            generator = diffem.generator_for("cpu", options.seed, 0)
            y, observed = (diffem.corrupt(v, corruption, generator) for v in (x0, truth))
            guided, prior, lap = train_on_images(name, y, corruption, config, options.seconds, bar)
            generator, start = diffem.generator_for("cpu", options.seed, 2), time.process_time()
            parts = observed.split(250) * 4
            samples = torch.cat([diffem.sample(guided, part, 16, "ddpm", generator) for part in parts]).view(4, *truth.shape)
            speed = samples[:, :, 0, 0, 0].numel() / (time.process_time() - start)
            fine = torch.cat([diffem.sample(guided, part, 64, "ddpm", generator) for part in observed.split(250)])
            blank = torch.zeros_like(observed)
            new = torch.cat([diffem.sample(prior, part, 64, "ddpm", generator) for part in blank.split(250)])
            mean = samples.mean(0)
            rows.append({
                "corruption": text, "method": name, "lap": lap, "PSNR": diffem.psnr(samples[0], truth),
                "PSNR of the mean": diffem.psnr(mean, truth), "SSIM": diffem.ssim(samples[0], truth),
                "SSIM of the mean": diffem.ssim(mean, truth), "spread": float(samples.std(0).square().mean().sqrt()),
                "Frechet, posterior": frechet(features, samples[0], x0),
                "64 evaluations: PSNR": diffem.psnr(fine, truth),
                "Frechet, 64 evaluations": frechet(features, fine, x0),
                "Frechet, prior": frechet(features, new, x0),
                "samples a CPU-second": speed,
            })  # fmt: skip
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    floor = frechet(features, truth, x0)
    table(f"Images, {options.seconds} CPU-seconds each, Frechet distance of the held-out truth itself {floor:.2f}", rows,
          {key: value for key, value in vars(options).items() if key != "function"})  # fmt: skip


# ---- Without clean images: which lap to keep, and what a wrong corruption does ---------------------------------------


def judged_laps(true: str, assumed: str, laps: int, bar: tqdm, seed: int = 0, **others):
    """A row a lap of a run on digits corrupted by one law and learnt by another: what is seen without the truth, and what
    the truth says; and the parts of the scores."""
    settings = diffem.Settings(**diffem.PRESETS["digits", "small"] | dict(laps=laps, seed=seed) | others)
    corruption, generator = named_corruption(assumed), diffem.generator_for("cpu", seed, 0, 0)
    x0, truth = diffem.load_data(settings)
    y, held_out = (diffem.corrupt(x, named_corruption(true), generator) for x in (x0, truth))
    features, start = principal_features(x0), time.process_time()
    for state in diffem.em(y, corruption, settings):
        if state.drawn < len(y):
            continue
        lap_took, start = time.process_time() - start, time.process_time()
        scores, parts = diffem.judge(state, held_out, corruption, settings)
        share = (time.process_time() - start) / lap_took
        metrics, samples = diffem.evaluate(state, held_out, truth, corruption, settings)
        row = {"data": true, "learnt by": assumed, "lap": state.lap, "PSNR of the mean": metrics["psnr_mean"],
               "Frechet, restored": frechet(features, state.x0, x0), "Frechet, new": frechet(features, samples["prior"], x0),
               "spread": metrics["spread"], **scores, "scores' share of time": share}  # fmt: skip
        print(json.dumps(row), file=sys.stderr, flush=True)
        bar.update()
        yield row, parts
        start = time.process_time()


def compare_stopping(options: argparse.Namespace) -> None:
    """The lap that is kept by held-out observations against the best by the truth, on digits."""
    print(f"{len(options.corruptions)} runs of {options.laps} laps, 15 to 30 CPU-seconds each")
    rows, others = [], dict(method="ddpm", sample_steps=16) if options.degrade else {}
    with tqdm(total=len(options.corruptions) * (options.laps + 1), mininterval=5) as bar:
        for text in options.corruptions:
            laps = list(judged_laps(text, text, options.laps, bar, **others))[1:]  # the Gaussian's is not to choose from
            best = None
            for row, parts in laps:
                best = diffem.keep(row["lap"], {}, parts, best)
            kept = laps[best["lap"] - 1][0]
            restored, psnr = (lambda row: row["Frechet, restored"]), (lambda row: row["PSNR of the mean"])
            by_frechet, by_psnr = min((row for row, _ in laps), key=restored), max((row for row, _ in laps), key=psnr)
            rows.append({"corruption": text, "kept": kept["lap"], "best Frechet": by_frechet["lap"], "best PSNR": by_psnr["lap"],
                         "Frechet lost (%)": 100 * (restored(kept) / restored(by_frechet) - 1),
                         "by the last lap": 100 * (restored(laps[-1][0]) / restored(by_frechet) - 1),
                         "PSNR lost (dB)": psnr(by_psnr) - psnr(kept),
                         **{name: kept[name] for name in ("energy", "frechet", "covers_50", "covers_90", "spread")},
                         "scores' share of time": float(np.mean([row["scores' share of time"] for row, _ in laps]))})  # fmt: skip
    table(f"Which of {options.laps} laps to keep", rows, {key: value for key, value in vars(options).items() if key != "function"})


def compare_misspecified(options: argparse.Namespace) -> None:
    """The last lap on digits whose corruption is another than the one that is learnt by, and block against mask."""
    print(f"{len(options.cases)} runs of {options.laps} laps, 15 to 30 CPU-seconds each")
    rows = []
    with tqdm(total=len(options.cases) * (options.laps + 1), mininterval=5) as bar:
        for case in options.cases:
            true, _, assumed = case.partition(" as ")
            *_, (row, _) = judged_laps(true, assumed or true, options.laps, bar)
            rows.append({name: value for name, value in row.items() if name not in ("lap", "scores' share of time")})
    table("A wrong corruption", rows, {key: value for key, value in vars(options).items() if key != "function"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("export", help=compare_exports.__doc__)
    command.add_argument("--rounds", type=int, default=15)
    command.set_defaults(function=compare_exports)
    command = commands.add_parser("speed", help=compare_speed.__doc__)
    command.add_argument("--rounds", type=int, default=9)
    command.add_argument("--compile", action="store_true", help="also with torch.compile, which takes minutes at first")
    command.set_defaults(function=compare_speed)
    command = commands.add_parser("samplers", help=compare_samplers.__doc__)
    command.add_argument("--seeds", type=int, default=4)
    command.add_argument("--methods", nargs="*", default=["ddpm", "sde2m", "ddim", "dpm2m"])
    command.set_defaults(function=compare_samplers)
    command = commands.add_parser("images", help=compare_on_images.__doc__)
    command.add_argument("--data-dir", required=True, help="images in a folder a class")
    command.add_argument("--images", type=int, default=10_000)
    command.add_argument("--held-out", type=int, default=500)
    command.add_argument("--corruptions", nargs="*", default=["mask 0.75", "mask 0.5", "blur 1.0", "jpeg 10"])
    command.add_argument("--methods", nargs="*", default=["DiffEM", "EM-MMPS", "Ambient"])
    command.add_argument("--seconds", type=int, default=1200, help="CPU-seconds a run")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(function=compare_on_images)
    command = commands.add_parser("stopping", help=compare_stopping.__doc__)
    command.add_argument("--laps", type=int, default=10)
    command.add_argument("--corruptions", nargs="*", default=["mask 0.9", "mask 0.5", "block 0.5", "block 0.9", "noise 0.5", "noise 0.9",
                                                              "blur 0.5", "blur 0.9"])  # fmt: skip
    command.add_argument("--degrade", action="store_true", help="draw by ddpm with 16 evaluations throughout, which misleads EM")
    command.set_defaults(function=compare_stopping)
    command = commands.add_parser("misspecified", help=compare_misspecified.__doc__)
    command.add_argument("--laps", type=int, default=5)
    command.add_argument("--cases", nargs="*", metavar="TRUE as ASSUMED", default=[
        "mask 0.5", "mask 0.5 as mask 0.2", "mask 0.5 as mask 0.8", "block 0.5", "block 0.5 as mask 0.5", "mask 0.5 as block 0.5",
        "blur 0.8", "blur 0.8 as blur 0.5", "blur 0.8 as blur 1.1", "noise 0.5", "noise 0.5 as noise 0.25", "noise 0.5 as noise 1.0",
        "jpeg 20", "jpeg 20 as jpeg 50", "jpeg 20 as jpeg 8"])  # fmt: skip
    command.set_defaults(function=compare_misspecified)
    options = parser.parse_args()
    options.function(options)


if __name__ == "__main__":
    main()
