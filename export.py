"""Freeze a denoiser trained by diffem.py to TorchScript and ONNX, and restore images with onnxruntime, without PyTorch.

    python export.py runs/NAME                                    # writes model.ts.pt and model.onnx beside checkpoint.pt
    python export.py restore runs/NAME/model.onnx photo.png       # needs numpy, Pillow and onnxruntime alone

model.ts.pt  for `torch.jit.load`: forward(xt, sigma, y) is the denoiser, sample(y, steps, seed, method) the whole sampler.
             (PyTorch would have torch.export in place of torch.jit; that cannot keep a loop over a number of steps yet to be
             chosen, nor a generator.)
model.onnx   one step of every sampler:  x0 = D(xt, sigma, y),  xs = a xt + b x0 + c x0_previous + d noise.  What a runtime
             needs besides is in the file's metadata, each value as JSON. `Restorer` holds the loop over the steps.
"""

import argparse
import contextlib
import copy
import ctypes
import hashlib
import io
import json
import os
import re
import sys
import time
import warnings
from pathlib import Path

import numpy as np

# torch, diffem, onnxruntime and Pillow are imported where they are used: to restore must not need PyTorch

FORMAT = 2  # of model.onnx: its inputs, outputs and metadata
PIXELS = {"cpu": 2**16, "cuda": 2**20}  # of all images sampled at once, at first
SHA256 = re.compile(rb"\x0a\x06sha256\x12\x40([0-9a-f]{64})")  # this metadata entry as it lies in the file


class ExportError(OSError):
    """An error that the user can mend. The command line prints it as one line and exits with code 2."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ExportError(message)


# ---- Export ---------------------------------------------------------------------------------------------------------


def torchscript(denoiser, settings):
    """The denoiser and its `sample` as one scripted module."""
    import torch
    from torch import Tensor

    class Sampler(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.denoiser = denoiser

        def forward(self, xt: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
            with torch.no_grad():
                return self.denoiser(xt, sigma, y)

        @torch.jit.export
        def sample(
            self, y: Tensor, steps: int = settings.sample_steps, seed: int = 0, method: str = settings.method
        ) -> Tensor:
            generator = torch.Generator(device=y.device)
            generator.manual_seed(seed)
            return self.denoiser.sample(y, steps, method, generator)

    return torch.jit.script(Sampler().eval())


def onnx_step(denoiser, half: bool, metadata: dict) -> bytes:
    """One step of the sampler as an ONNX file. half: the network computes in float16, all around it in float32 still, since
    sigma^2 is below what float16 can hold. Changes the denoiser."""
    import torch

    class Half(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network.half()
            self.network.emb.float()  # float16 would be too coarse for its sines

        def forward(self, xt, mean, y, log_sigma):
            return self.network(xt.half(), mean.half(), y.half(), log_sigma).float()

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.denoiser = denoiser

        def forward(self, xt, sigma, y, coefficients, x0_previous, noise):
            x0 = self.denoiser(xt, sigma, y)
            a, b, c, d = coefficients.unbind(0)
            return a * xt + b * x0 + c * x0_previous + d * noise, x0

    denoiser.network.to(memory_format=torch.contiguous_format)
    if half:
        denoiser.network = Half(denoiser.network)
    C, H, W = denoiser.x_shape
    xt, previous, noise = torch.zeros(3, 2, C, H, W)  # one tensor for all three would be taken for one input
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    image = {0: batch, 2: height, 3: width}
    program = torch.onnx.export(
        Step().eval(), (xt, torch.ones(2), torch.zeros(2, C + 1, H, W), torch.ones(4), previous, noise),
        dynamo=True, opset_version=20, verbose=False,
        input_names=["xt", "sigma", "y", "coefficients", "x0_previous", "noise"], output_names=["xs", "x0"],
        dynamic_shapes=(image, {0: batch}, image, {}, image, image),
    )  # fmt: skip
    graph = program.model.graph
    for part in (
        graph,
        *graph.all_nodes(),
        *graph.initializers.values(),
    ):  # PyTorch's notes, paths of this machine among them
        part.metadata_props.clear()
    program.model.metadata_props.clear()
    program.model.metadata_props.update(
        {key: json.dumps(value) for key, value in metadata.items()} | {"sha256": "0" * 64}
    )
    return sealed(program.model_proto.SerializeToString())


def sealed(content: bytes) -> bytes:
    """A model.onnx, with the sha256 of all the rest of it in the place kept for that."""
    start, end = SHA256.search(content).span(1)
    digest = hashlib.sha256(content[:start] + content[end:]).hexdigest()
    return content[:start] + digest.encode() + content[end:]


def describe(denoiser, settings, half: bool) -> dict:
    """The metadata of model.onnx."""
    from diffem import Mask

    corruption, (channels, *size) = denoiser.corruption, denoiser.x_shape
    return dict(
        format=FORMAT, channels=channels, image_size=size, range=[-2, 2], dtype="float16" if half else "float32",
        schedule="log-uniform from sigma_max to sigma_min, then 0", sigma_min=settings.sigma_min, sigma_max=settings.sigma_max,
        method=settings.method, steps=settings.sample_steps,
        corruption=settings.corruption, parameters=settings.parameters,
        masks=corruption.hides_pixels(),
        exact=isinstance(corruption, Mask) and corruption.noise < 2 / 255,  # are the others right to half a grey level?
        multiple=2 ** (len(settings.channels) - 1),  # of the sides that the U-Net halves without a rest
    )  # fmt: skip


def largest_errors(denoiser, script: Path, onnx: Path) -> dict[Path, float]:
    """Of each file against the denoiser itself, on random inputs of another batch and size than the traced ones."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = [3] + [
        n + 3 * i for i, n in enumerate(denoiser.x_shape)
    ]  # another height than width, and no multiple of 8
    sigma = torch.tensor([0.01, 1.0, 50.0])
    x, previous, noise = torch.randn(3, *shape, generator=generator)
    y = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    if denoiser.corruption.hides_pixels():
        y = y * (torch.rand(y[:, :1].shape, generator=generator) > 0.5)
    xt = x + sigma.view(-1, 1, 1, 1) * noise
    with torch.no_grad():
        x0 = denoiser(xt, sigma, y)
    scripted = torch.jit.load(script)
    drawn = denoiser.sample(y, 3, "ddpm", torch.Generator().manual_seed(0))
    errors = {script: [scripted(xt, sigma, y) - x0, scripted.sample(y, 3, 0, "ddpm") - drawn]}
    a, b, c, d = coefficients = torch.tensor([0.1, 0.7, -0.2, 0.3])
    inputs = dict(xt=xt, sigma=sigma, y=y, coefficients=coefficients, x0_previous=previous, noise=noise)
    xs, estimate = Restorer(onnx, "cpu").session.run(
        ["xs", "x0"], {name: value.numpy() for name, value in inputs.items()}
    )
    errors[onnx] = [
        torch.tensor(estimate) - x0,
        torch.tensor(xs) - (a * xt + b * x0 + c * previous + d * noise),
    ]
    return {
        path: max(float(difference.abs().max()) for difference in values) for path, values in errors.items()
    }


def export(
    folder: str, out: str | None = None, half: bool = False, best: bool = False, corruption=None
) -> None:
    """Writes model.ts.pt and model.onnx (half: model.half.onnx) of the last lap, or of the best. Each is put in its place
    only after it was compared with the denoiser. Raises ExportError if it differs by more than 1e-4 (float16: 0.04, 1 %
    of the range). corruption: an instance, if it is your own."""
    import torch

    import diffem

    try:
        settings = diffem.load_checkpoint(folder).settings
        denoiser = diffem.load(folder, corruption, best)
        denoiser.bfloat16 = False  # the files compute in float32
    except diffem.DiffEMError as error:
        raise ExportError(str(error)) from error
    out = Path(out or folder)
    out.mkdir(parents=True, exist_ok=True)
    script, onnx = out / "model.ts.pt.new", out / f"model{'.half' * half}.onnx.new"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # that torch.jit is deprecated, and what torch.onnx says of its own code
            try:
                script.write_bytes(torchscript(denoiser, settings).save_to_buffer())
                onnx.write_bytes(onnx_step(copy.deepcopy(denoiser), half, describe(denoiser, settings, half)))
                errors = largest_errors(denoiser, script, onnx)
            except OSError:
                raise
            except Exception as error:  # torch.jit, torch.onnx and onnxruntime raise many kinds
                reason = " ".join(str(error).split())[:200]
                raise ExportError(
                    f"PyTorch {torch.__version__} cannot export this model (2.14 can): {reason}"
                ) from error
        for path, error in errors.items():
            most = 0.04 if path == onnx and half else 1e-4
            require(
                error <= most,
                f"{path.stem} differs from PyTorch by {error:.2g}, more than {most:g}: not kept",
            )
        for path, error in errors.items():
            final = path.replace(path.with_suffix(""))
            print(f"{final}: {final.stat().st_size / 1e6:.1f} MB, largest error against PyTorch {error:.1e}")
    finally:
        script.unlink(missing_ok=True)
        onnx.unlink(missing_ok=True)


# ---- Images on disk, as training and restoring read them: numpy and Pillow only ----------------------------


SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}


def find_images(folder: Path, arrays: bool = False) -> list[Path]:
    """The image files, and the .npy files if wanted, at any depth of a folder."""
    suffixes = SUFFIXES | ({".npy"} if arrays else set())
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)


def find_mask(path: Path, folder: Path, masks: Path) -> Path:
    """The image in `masks` named like an image in `folder`, with any ending."""
    name = masks / path.relative_to(folder).with_suffix("")
    files = [file for file in name.parent.glob("*") if file.stem == name.name]
    require(len(files) == 1, f"{len(files)} masks {name}.*")
    return files[0]


def read_image(
    path: Path, channels: int, mask: Path | None = None, alpha: bool = True, resize=None
) -> np.ndarray:
    """y (channels + 1, H, W) of an image or .npy file: values from -2 to 2, then 1 where a pixel is observed; both 0
    where it is missing: transparent (if `alpha`), NaN, or black in the mask. resize: a function of a Pillow image."""
    from PIL import Image, ImageOps

    try:
        if path.suffix.lower() == ".npy":
            values = np.atleast_3d(np.load(path, allow_pickle=False)).astype(np.float32)
            observed = np.isfinite(values).all(2, keepdims=True)
            require(values.ndim == 3 and values.shape[2] == channels, f"an array {values.shape}")
            require(((values >= 0) & (values <= 1) | ~observed).all(), "numbers must be from 0 to 1")
            values = np.where(observed, values, 0)
        else:
            with Image.open(path) as file:
                sixteen = file.mode.startswith("I")
                require(
                    file.mode != "F" and ";16" not in str(file.tile) or sixteen,
                    f"mode {file.mode} of more than 8 bits",
                )
                image = ImageOps.exif_transpose(file)
                image = image if sixteen else image.convert("LA" if channels == 1 else "RGBA")
            values = np.asarray(resize(image) if resize else image, np.float32)
            values = np.repeat(values[..., None], channels + 1, 2) / 65535 if sixteen else values / 255
            observed = values[..., -1:] > 0 if alpha and not sixteen else np.ones_like(values[..., -1:])
            values = values[..., :-1]
        if mask:
            with Image.open(mask) as file:
                seen = np.asarray(file.convert("L"))[..., None] >= 128
            (H, W), (h, w) = values.shape[:2], seen.shape[:2]
            require((H, W) == (h, w), f"its mask {mask} has {w}x{h} pixels, not {W}x{H}")
            observed = observed * seen
    except Exception as error:  # Pillow and numpy raise many classes
        raise ExportError(f"{path} cannot be read as an image ({error})") from error
    return np.concatenate([observed * (4 * values - 2), observed], 2, dtype=np.float32).transpose(2, 0, 1)


def jpeg_tables(files: list[Path]) -> dict:
    """The quantisation tables and the subsampling of the JPEG files among these, which must have the same."""
    from PIL import Image, JpegImagePlugin

    found = {}
    for path in (path for path in files if path.suffix.lower() in (".jpg", ".jpeg")):
        with contextlib.suppress(OSError), Image.open(path) as file:  # what cannot be read is reported later
            tables = tuple(q for table in file.quantization.values() for q in table)
            found.setdefault((tables, max(0, JpegImagePlugin.get_sampling(file))), str(path))
    require(len(found) > 0, "none of the observations is a JPEG file: give --quality")
    require(
        len(found) == 1,
        f"JPEG of different tables, {', '.join(found.values())}: give --quality, or sort them",
    )
    tables, subsampling = next(iter(found))
    return dict(tables=tables, subsampling=subsampling)


# ---- Restore: numpy and onnxruntime alone ---------------------------------------------------------------------------


def sampler(method: str, steps: int, sigma_min: float, sigma_max: float) -> np.ndarray:
    """(steps, 5): sigma_t, a, b, c, d of each step, as by `diffem.sampler`."""
    require(
        method in ("ddpm", "ddim", "sde2m", "dpm2m"), f"unknown method {method}: ddpm, ddim, sde2m, dpm2m"
    )
    require(steps >= 1, f"steps must be at least 1, not {steps}")
    levels = np.append(np.geomspace(sigma_max, sigma_min, steps), 0)
    sigma_t, sigma_s = levels[:-1], levels[1:]
    a, c, d = sigma_s / sigma_t, np.zeros(steps), np.zeros(steps)
    if method in ("ddpm", "sde2m"):
        a, d = a**2, sigma_s * np.sqrt(1 - a**2)
    if method in ("sde2m", "dpm2m"):  # (3 D - D_before) / 2 in place of D, but in the first and last step
        c[1:-1] = (a[1:-1] - 1) / 2
    return np.stack([sigma_t, a, 1 - a - c, c, d], 1)


def missing_cuda() -> str:
    """Which piece of CUDA is missing; "" if none, as far as can be told before a session is made."""
    import onnxruntime

    driver = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        ctypes.CDLL(driver)
    except OSError:
        return f"there is no NVIDIA driver ({driver})"
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "this onnxruntime was built without CUDA: pip install onnxruntime-gpu"
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        onnxruntime.preload_dlls()
    return ""


class Restorer:
    """A model.onnx, to sample x0 ~ q(x0 | y) with. Raises ExportError where the file is anything else, or damaged.

    device: cuda, cpu, or auto for the first of the two that works. Attributes: `device`; `no_cuda`, why it is not cuda;
    `metadata`, what was recorded at the export. threads: of the CPU, by default all.
    """

    def __init__(self, path: str | Path, device: str = "auto", threads: int = 0):
        import onnxruntime

        require(device in ("auto", "cuda", "cpu"), f"unknown device {device}: auto, cuda or cpu")
        content = Path(path).read_bytes()
        require(
            SHA256.search(content) is not None,
            f"{path} is not a model written by export.py, or not a whole one",
        )
        require(sealed(content) == content, f"{path} is damaged: its sha256 is not the one recorded in it")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or cores
        onnxruntime.set_default_logger_severity(4)  # what matters of its warnings is said here

        def session(*providers: str):
            return onnxruntime.InferenceSession(
                content, options, providers=list(providers), enable_fallback=0
            )

        self.no_cuda = "not asked for" if device == "cpu" else missing_cuda()
        if not self.no_cuda:
            try:
                self.session = session("CUDAExecutionProvider", "CPUExecutionProvider")
                if self.session.get_providers()[0] != "CUDAExecutionProvider":
                    self.no_cuda = (
                        "onnxruntime cannot load CUDA or cuDNN: pip install onnxruntime-gpu[cuda,cudnn]"
                    )
            except Exception as error:  # onnxruntime raises kinds of its own
                self.no_cuda = f"CUDA does not start ({' '.join(str(error).split())})"
        require(device != "cuda" or not self.no_cuda, f"cannot run on CUDA: {self.no_cuda}")
        self.device = "cpu" if self.no_cuda else "cuda"
        if self.no_cuda:
            self.session = session("CPUExecutionProvider")
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.metadata = {key: json.loads(value) for key, value in metadata.items() if key != "sha256"}
        found = self.metadata.get("format")
        require(found == FORMAT, f"{path} has format {found}, this export.py reads format {FORMAT}")

    def __call__(
        self, observations: np.ndarray, steps: int = 0, method: str = "", seed: int = 0
    ) -> np.ndarray:
        """A sample x0 ~ q(x0 | y) for each of observations y (N, C + 1, H, W) -> (N, C, H, W), values in [-2, 2].

        The last channel of y is 1 where something was observed; where it is 0 so must be the rest. steps, method: 0 and "" for
        those that the model was exported with. Row i's noise is default_rng((seed, i))'s, whatever the batch. Raises
        ExportError where y is not finite, or of a size or with missing pixels that the model cannot take.
        """
        return self.sample(observations, (steps, method), [(seed, i) for i in range(len(observations))])

    def sample(self, y: np.ndarray, how: tuple[int, str], seeds: list, progress=lambda n: None) -> np.ndarray:
        """As `__call__`, with how = (steps, method), a seed for each row, and progress(images) called after each step."""
        meta = self.metadata
        (C, multiple), y = (meta["channels"], meta["multiple"]), np.asarray(y, np.float32)
        require(
            y.ndim == 4 and y.shape[1] == C + 1 and len(y) > 0,
            f"observations must be (N, {C + 1}, H, W), not {y.shape}",
        )
        require(bool(np.isfinite(y).all()), "the observations have values that are not finite")
        known, (H, W) = y[:, -1:], y.shape[-2:]
        require(
            bool(((known == 0) | (known == 1)).all()), "the last channel of the observations must be 0 or 1"
        )
        require(
            bool((y * (1 - known) == 0).all()),
            "where the last channel of the observations is 0, the others must be 0 too",
        )
        if meta["masks"]:
            y = np.pad(
                y, ((0, 0), (0, 0), (0, -H % multiple), (0, -W % multiple))
            )  # not observed, and cropped in the end
        require(
            min(y.shape[-2:]) >= multiple, f"{H}x{W} pixels: the model takes {multiple}x{multiple} or more"
        )
        table = sampler(
            how[1] or meta["method"], how[0] or meta["steps"], meta["sigma_min"], meta["sigma_max"]
        )
        batch, parts, done = max(1, PIXELS[self.device] // (H * W)), [], 0
        while done < len(y):
            try:
                parts.append(self._loop(y[done : done + batch], table, seeds[done : done + batch], progress))
                done += batch
            except Exception as error:  # onnxruntime raises kinds of its own
                if "alloc" not in str(error):
                    raise
                require(batch > 1, f"{H}x{W} pixels are too many for the memory of this machine")
                batch //= 2
        x = np.concatenate(parts)[..., :H, :W]
        require(bool(np.isfinite(x).all()), "the model gave values that are not finite")
        return np.where(known == 1, y[:, :-1, :H, :W], x) if meta["exact"] else x

    def _loop(self, y: np.ndarray, table: np.ndarray, seeds: list, progress) -> np.ndarray:
        """All steps of one batch. What is as large as an image stays on the device; noise comes from the CPU, since a graph's
        own cannot be seeded."""
        from onnxruntime import OrtValue

        generators = [np.random.default_rng(seed) for seed in seeds]
        shape = (len(y), y.shape[1] - 1, *y.shape[2:])

        def draw() -> np.ndarray:
            return np.stack([generator.standard_normal(shape[1:], np.float32) for generator in generators])

        def put(value: np.ndarray) -> OrtValue:
            return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value, np.float32), self.device, 0)

        xt, xs, x0, x0_previous, noise = (
            put(value) for value in [table[0, 0] * draw()] + 4 * [np.zeros(shape)]
        )
        y, binding = put(y), self.session.io_binding()
        for sigma, *coefficients in table:
            if coefficients[3]:
                noise.update_inplace(draw())
            inputs = dict(
                xt=xt, sigma=put(np.full(len(seeds), sigma)), y=y, coefficients=put(np.array(coefficients))
            )
            for name, value in (inputs | dict(x0_previous=x0_previous, noise=noise)).items():
                binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output("xs", xs)
            binding.bind_ortvalue_output("x0", x0)
            self.session.run_with_iobinding(binding)
            xt, xs, x0, x0_previous = xs, xt, x0_previous, x0
            progress(len(seeds))
        return xt.numpy().copy()  # on the CPU it is the OrtValue's own memory


def restore_image(path: Path, mask: Path | None, metadata: dict) -> np.ndarray:
    """An observation y (C + 1, H, W) for a model. Pixels may be missing only if the model knows missing pixels."""
    masks, corruption = metadata["masks"], metadata["corruption"]
    y = read_image(path, metadata["channels"], mask)
    missing = (y[-1] == 0).any()
    require(
        masks or not missing and not mask,
        f"{path}: no pixels may be missing where the corruption is {corruption}",
    )
    if corruption == "downsample":  # y repeats each pixel
        y = y.repeat(metadata["parameters"]["factor"], 1).repeat(metadata["parameters"]["factor"], 2)
    return y


def progress_bar(total: int):
    """A function to be told of evaluations done, which shows their share of the total where standard error is a terminal."""
    start, done = time.monotonic(), 0

    def advance(evaluations: int) -> None:
        nonlocal done
        done += evaluations
        if sys.stderr.isatty():
            left = (time.monotonic() - start) * (total / done - 1)
            end = "\n" if done >= total else ""
            print(f"\r{100 * done // total:3d} %, {left:.0f} s left ", end=end, file=sys.stderr, flush=True)

    return advance


def write_images(target: Path, x: np.ndarray) -> None:
    """From samples x (S, C, H, W): target_sample1.png and so on, target_mean.png, and target_std.png, grey, white at 1."""
    from PIL import Image

    pictures = {f"sample{i + 1}": sample for i, sample in enumerate(x)}
    if len(x) > 1:
        std = np.sqrt(x.var(0, ddof=1).mean(0, keepdims=True))
        pictures |= {"mean": x.mean(0), "std": 4 * std - 2}
    target.parent.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        pixels = (
            np.round((picture + 2) * (255 / 4)).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
        )  # (H, W, C)
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(f"{target}_{name}.png")


def targets(inputs: list[str], out: Path) -> dict[Path, tuple[Path, Path]]:
    """The image files among the inputs and in folders among them, with the folder of each, by the path of its results
    without ending."""
    found = {}
    for given in map(Path, inputs):
        require(given.exists(), f"no file or folder {given}")
        files, folder = (find_images(given), given) if given.is_dir() else ([given], given.parent)
        require(len(files) > 0, f"no images in {given}")
        for file in files:
            target = (out / file.relative_to(folder)).with_suffix("")
            require(
                target not in found, f"two inputs, {file} is one of them, would both be restored to {target}"
            )
            found[target] = (file, folder)
    return found


def restore(options: argparse.Namespace) -> None:
    """Restores image files. The result for an image does not depend on the others."""
    restorer, out, samples = Restorer(options.model, options.device), Path(options.out), options.samples
    meta, mask = restorer.metadata, options.mask and Path(options.mask)
    steps, method = options.steps or meta["steps"], options.method or meta["method"]
    sampler(method, steps, 1, 2)  # raises if there is no such method or number
    require(samples >= 1 and options.seed >= 0, "--samples must be at least 1 and --seed 0")
    require(meta["channels"] in (1, 3), f"images have 1 or 3 channels, the model takes {meta['channels']}")
    files = targets(options.inputs, out)
    out.mkdir(parents=True, exist_ok=True)
    if options.device == "auto" and restorer.no_cuda:
        print(f"on the CPU: {restorer.no_cuda}", file=sys.stderr)
    bar, waiting = progress_bar(len(files) * samples * steps), {}

    def flush() -> None:
        y = np.repeat(np.stack(list(waiting.values())), samples, 0)
        seeds = [(options.seed, i) for i in range(samples)] * len(waiting)
        x = restorer.sample(y, (steps, method), seeds, bar)
        for target, images in zip(waiting, x.reshape(len(waiting), samples, *x.shape[1:])):
            write_images(target, images)
        waiting.clear()

    for target, (file, folder) in files.items():
        y = restore_image(file, find_mask(file, folder, mask) if mask and mask.is_dir() else mask, meta)
        full = (len(waiting) + 1) * samples * y[0].size > PIXELS["cuda"]
        if waiting and (full or next(iter(waiting.values())).shape != y.shape):
            flush()
        waiting[target] = y
    flush()
    print(f"{out}: {len(files)} restored, {samples} samples each, by {steps} steps of {method}")


# ---- Command line ---------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ExportError(message)


def parse(argv: list[str]) -> argparse.Namespace:
    if argv[:1] == ["restore"]:
        parser = Parser(prog="export.py restore", description="Restore images with an exported model.")
        parser.add_argument("model", help="a model.onnx")
        parser.add_argument(
            "inputs", nargs="+", help="images, or folders of images; transparent where a pixel is missing"
        )
        parser.add_argument(
            "-o", "--out", default="restored", help="folder for the results (default: %(default)s)"
        )
        parser.add_argument(
            "--mask", help="image, black where a pixel is missing, or folder of images named like the inputs"
        )
        parser.add_argument(
            "--steps", type=int, default=0, help="network evaluations of each sample (default: as trained)"
        )
        parser.add_argument("--method", default="", help="ddpm, ddim, sde2m or dpm2m (default: as trained)")
        parser.add_argument(
            "--samples", type=int, default=4, help="posterior samples of each image (default: %(default)s)"
        )
        parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
        parser.add_argument("--device", default="auto", help="auto, cuda or cpu (default: %(default)s)")
        return parser.parse_args(argv[1:])
    parser = Parser(description="Freeze a trained model to TorchScript and ONNX.")
    parser.epilog = "python export.py restore --help explains how to use the ONNX file."
    parser.add_argument("folder", metavar="runs/NAME", help="a run of diffem.py")
    parser.add_argument("-o", "--out", help="folder for the files (default: the run's)")
    parser.add_argument(
        "--half", action="store_true", help="write model.half.onnx, whose network computes in float16"
    )
    parser.add_argument(
        "--best", action="store_true", help="the lap with the best energy score, not the last one"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command line: returns the exit code, 2 after an error that the user can mend."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        options = parse(argv)
        restore(options) if argv[0] == "restore" else export(**vars(options))
    except OSError as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
