"""Freeze a denoiser trained by diffem.py to TorchScript and ONNX, and restore images without PyTorch.

    python export.py runs/NAME                               # writes model.ts.pt and model.onnx to runs/NAME
    python export.py restore runs/NAME/model.onnx photo.png  # needs numpy, Pillow and onnxruntime only

model.ts.pt  the denoiser, for torch.jit.load: model(xt, sigma, y); model.sample(y, steps, method, generator)
             (torch.export cannot keep a loop over a number of steps that is chosen later, nor a generator)
model.onnx   one step of a sampler, which the coefficients choose. The metadata are JSON: sigma_min,
             sigma_max, channels, corruption, method, steps and more; sha256, plain text, is that of the file
             without these 64 digits. Values of downsampled images are repeated to the size of x. Float32:

    xt            batch, C, height, width      noisy image; at first sigma_max times normal noise
    sigma         batch                        its noise level
    y             batch, C + 1, height, width  observation in [-2, 2]; last channel 1 if observed, else all 0
    coefficients  4                            a, b, c, d of  xs = a xt + b x0 + c x0_previous + d noise
    x0_previous   batch, C, height, width      x0 of the previous step; any finite numbers where c is 0
    noise         batch, C, height, width      normal noise; any finite numbers where d is 0
    xs (output)   batch, C, height, width      image at the next lower level; after the last step, restored
    x0 (output)   batch, C, height, width      the denoiser's estimate
"""

import argparse
import contextlib
import copy
import ctypes
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

# torch, diffem, onnxruntime and Pillow are imported where they are used: restoring must not need PyTorch

FORMAT = 3  # of model.onnx: its inputs, outputs and metadata
TILE, OVERLAP = 512, 64  # pixels of the tiles of a large image: below 1 GB with the small networks
PIXELS = {"cpu": 2**16, "cuda": 2**20}  # of the images that are sampled at once, at first
SHA256 = re.compile(rb"\x0a\x06sha256\x12\x40([0-9a-f]{64})")  # this entry of the metadata
METHODS = ("ddpm", "ddim", "sde2m", "dpm2m")
FORMATS = ("PNG", "JPEG", "MPO", "TIFF", "WEBP", "GIF", "BMP", "PPM", "TGA")  # whose depth is checked
METADATA = dict.fromkeys(("channels", "steps", "multiple", "grid", "overlap", "factor"), int)
METADATA |= dict.fromkeys(("sigma_min", "sigma_max", "masked_noise"), (int, float))
METADATA |= dict(method=str, corruption=str, masks=bool, parameters=dict)


class DiffEMError(OSError):
    """An error that the user can mend. The command line prints it as one line and exits with code 2."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise DiffEMError(message)


def in_one_line(error: BaseException) -> str:
    """Its message, or the name of its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def explained(message: str):
    """Any error becomes a DiffEMError with this message: Pillow, numpy and onnxruntime have many classes."""
    try:
        yield
    except Exception as error:
        raise DiffEMError(f"{message}: {in_one_line(error):.300}") from error


@contextlib.contextmanager
def replacing(path: Path):
    """A new file, put in the place of another when it is complete. A failure leaves the old one as it was."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with explained(f"cannot write {path} (the old file, if any, is unchanged)"):
            with open(new, "wb") as file:
                yield file
            new.replace(path)
    finally:
        new.unlink(missing_ok=True)


# ---- Export -----------------------------------------------------------------------------------------------
def onnx_step(denoiser, half: bool, metadata: dict) -> bytes:
    """One step of the sampler as an ONNX file. half: the network computes in float16, the rest in float32,
    since sigma^2 is below what float16 can hold. Changes the denoiser."""
    import torch

    class Step(torch.nn.ModuleDict):
        def forward(self, xt, sigma, y, coefficients, x0_previous, noise):
            x0 = self["denoiser"](xt, sigma, y)
            a, b, c, d = coefficients.unbind(0)
            return a * xt + b * x0 + c * x0_previous + d * noise, x0

    network = denoiser.network.to(memory_format=torch.contiguous_format)
    if half:
        network.half().emb.float()  # float16 is too coarse for the sines of `emb`
        network.register_forward_pre_hook(lambda network, xs: (*[x.half() for x in xs[:3]], xs[3]))
    least = metadata["multiple"] + 1
    C, H, W = denoiser.x_shape[0], *(max(n, least) for n in denoiser.x_shape[1:])
    xt, previous, noise = torch.zeros(3, 2, C, H, W)  # one tensor for all three would be taken for one input
    inputs = xt, torch.ones(2), torch.zeros(2, C + 1, H, W), torch.ones(4), previous, noise
    # Without these, PyTorch would find out that smaller images differ, and trace the model a second time
    sizes = dict(batch=0, height=least, width=least)
    batch, height, width = (torch.export.Dim(name, min=n) for name, n in sizes.items())
    image = {0: batch, 2: height, 3: width}
    options = dict(dynamic_shapes=(image, {0: batch}, image, {}, image, image), output_names=["xs", "x0"])
    step = Step(dict(denoiser=denoiser)).eval()
    program = torch.onnx.export(step, inputs, dynamo=True, opset_version=18, verbose=False, **options)
    model = program.model
    # PyTorch's notes name paths of this machine
    for part in (model, model.graph, *model.graph.all_nodes(), *model.graph.initializers.values()):
        part.metadata_props.clear()
    model.metadata_props.update({key: json.dumps(value) for key, value in metadata.items()})
    model.metadata_props["sha256"] = "0" * 64
    return sealed(program.model_proto.SerializeToString())


def sealed(content: bytes) -> bytes:
    """A model.onnx, with the sha256 of the rest of it in the place for that."""
    start, end = SHA256.search(content).span(1)
    digest = hashlib.sha256(content[:start] + content[end:]).hexdigest()
    return content[:start] + digest.encode() + content[end:]


def describe(denoiser, settings, half: bool) -> dict:
    """The metadata of model.onnx."""
    from diffem import Blur, Downsample, Mask

    corruption, (channels, *size) = denoiser.corruption, denoiser.x_shape
    multiple = 2 ** (len(settings.channels) - 1)  # sides that the U-Net halves without a rest; the least side
    # Of the tiles of a large image. A wide blur reaches far over their borders
    grid = math.lcm(16, multiple, corruption.patch, corruption.block or 1)
    width = corruption.width if isinstance(corruption, Blur) else 0
    overlap = round(min(TILE / 2, max(OVERLAP, 20 * width)))
    factor = corruption.factor if isinstance(corruption, Downsample) else 1
    # s of the pixels that are observed: below half a grey level they keep their values
    noise = corruption.noise if isinstance(corruption, Mask) else 4.0
    kind, schedule = "float16" if half else "float32", "log-uniform from sigma_max to sigma_min, then 0"
    meta = {name: getattr(settings, name) for name in ("sigma_min", "sigma_max", "method", "corruption")}
    # Not those that the files have replaced
    unused = ["rate"] * bool(corruption.masked) + ["quality"] * bool(settings.parameters.get("tables"))
    parameters = {name: value for name, value in settings.parameters.items() if name not in unused}
    meta |= dict(steps=settings.sample_steps, parameters=parameters, schedule=schedule, factor=factor)
    meta |= dict(format=FORMAT, channels=channels, image_size=size, range=[-2, 2], dtype=kind, grid=grid)
    masks = corruption.hides_pixels() or bool(corruption.masked)
    return meta | dict(multiple=multiple, overlap=overlap, masks=masks, masked_noise=noise)


def largest_errors(denoiser, script: bytes, onnx: bytes) -> list[float]:
    """Of both files against the denoiser, on random inputs of another batch and size than the traced ones, as
    a fraction of the largest value where that is above 1: random numbers are no blurred image."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = [3] + [n + 3 * i for i, n in enumerate(denoiser.x_shape)]  # not square, and no multiple of 8
    sigma, (x, previous, noise) = torch.tensor([0.01, 1, 50]), torch.randn(3, *shape, generator=generator)
    y = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    restorer = Restorer(onnx, "cpu")
    if restorer.metadata["masks"]:
        y = y * (torch.rand(y[:, :1].shape, generator=generator) > 0.5)
    xt = x + sigma.view(-1, 1, 1, 1) * noise
    models = denoiser, torch.jit.load(io.BytesIO(script))
    with torch.no_grad():
        x0 = denoiser(xt, sigma, y)
        drawn, redrawn = (model.sample(y, 3, "ddpm", generator.manual_seed(0)) for model in models)
    a, b, c, d = coefficients = torch.tensor([0.1, 1, -0.2, 0.3])
    inputs = dict(xt=xt, sigma=sigma, y=y, coefficients=coefficients, x0_previous=previous, noise=noise)
    (xs,) = restorer.session.run(["xs"], {name: v.numpy() for name, v in inputs.items()})
    xs = torch.tensor(xs) - (a * xt + b * x0 + c * previous + d * noise)
    largest = x0.abs().max().clamp_min(1)
    return [float(difference.abs().max() / largest) for difference in (redrawn - drawn, xs)]


def export(folder: str, out: str = "", half: bool = False, best: bool = False, corruption=None) -> None:
    """Writes model.ts.pt and model.onnx (half: model.half.onnx) of the last lap, or of the best. Both are
    compared with the denoiser first. Raises DiffEMError if one differs by more than 1e-4 (float16: 0.04, 1 %
    of the range). corruption: an instance, if it is your own."""
    import torch

    import diffem

    checkpoint = diffem.Checkpoint(folder)
    settings, denoiser = checkpoint.settings, diffem.load(checkpoint, corruption, best)
    denoiser.bfloat16, out = False, Path(out or folder)  # the files compute in float32
    out.mkdir(parents=True, exist_ok=True)
    message = f"cannot export this model by PyTorch {torch.__version__} (2.14 can, with onnx and onnxscript)"
    with explained(message), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        # Not frozen: constants could not be moved to another device
        script = torch.jit.script(denoiser.requires_grad_(False)).save_to_buffer()
        onnx = onnx_step(copy.deepcopy(denoiser), half, describe(denoiser, settings, half))
        errors = largest_errors(denoiser, script, onnx)
    names, limits = ("model.ts.pt", f"model{'.half' * half}.onnx"), (1e-4, 0.04 if half else 1e-4)
    for name, error, most in zip(names, errors, limits):
        require(error <= most, f"{name} differs from PyTorch by {error:.2g}, more than {most:g}: not kept")
    for name, error, content in zip(names, errors, (script, onnx)):
        with replacing(out / name) as file:
            file.write(content)
        print(f"{out / name}: {len(content) / 1e6:.1f} MB, largest error against PyTorch {error:.1e}")


# ---- Images on disk, as training and restoring read them: numpy and Pillow only ---------------------------
@dataclass
class Picture:
    """An image as it was read, and what is needed to write another like it."""

    y: np.ndarray  # (C + 1, H, W): values in [-2, 2], then 1 where a pixel is observed; 0 where missing
    levels: int  # 255 or 65535 for 8 or 16 bits; 1 for floating point
    grey: bool = False
    suffix: str = ".png"  # of what is written
    soft: float = 0.0  # the fraction of half transparent pixels, which are missing
    extra: dict = field(default_factory=dict)  # colour profile, resolution and EXIF, for Pillow's save
    doubt: str = ""  # why the model may not suit it


def find_images(folder: Path, arrays: bool = False, *ignore: str | Path | None) -> list[Path]:
    """The image files, and the .npy files if wanted, at any depth of a folder. Hidden files, hidden folders,
    folders `runs` and `restored`, and those to ignore are left out; a linked folder is followed once. Raises
    OSError for a folder that cannot be read."""

    def fail(error: OSError):
        raise error

    suffixes = image_suffixes() + [".npy"] * arrays
    ignored = {os.path.realpath(path) for path in ignore if path}
    found, seen = [], set(ignored)
    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        new = os.path.realpath(root) not in seen
        seen.add(os.path.realpath(root))
        ours = "runs", "restored"
        folders[:] = sorted(name for name in folders if new and name[0] != "." and name not in ours)
        paths = (Path(root, name) for name in names if new and name[0] != ".")
        files = (path for path in paths if path.suffix.lower() in suffixes and path.is_file())
        found += [path for path in files if not ignored or os.path.realpath(path) not in ignored]
    return sorted(found)


def image_suffixes() -> list[str]:
    from PIL import Image

    return [suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN]


def find_mask(path: Path, folder: str | Path, masks: str | Path) -> Path:
    """The image in `masks` named like an image in `folder`, with any ending."""
    name = Path(masks) / path.relative_to(folder)
    changed = name.parent.stat().st_mtime_ns if name.parent.is_dir() else 0
    files = names_in(name.parent, changed).get(name.stem, [])
    require(len(files) == 1, f"{path}: {len(files)} masks {name.with_suffix('')}.*")
    return files[0]


@functools.lru_cache(16)
def names_in(folder: Path, changed: int) -> dict[str, list[Path]]:
    """The image files of a folder by their names without ending."""
    found, suffixes = {}, image_suffixes()
    for file in folder.glob("[!.]*"):
        if file.suffix.lower() in suffixes and file.is_file():
            found.setdefault(file.stem, []).append(file)
    return found


def read_image(path: Path, channels: int, mask=None, alpha=True, resize=None, raw=False) -> Picture:
    """An image or .npy file. Pixels are missing where it is transparent (if `alpha`) or NaN, and where `mask`
    (H, W) is False. resize: a function of a Pillow image. raw: leave values of 8 bits as bytes. Raises
    DiffEMError for what cannot be read without a doubt."""
    with explained(f"{path} cannot be read as an image"):
        require(path.is_file(), "it is not a regular file")
        picture = read_pixels(path, channels, alpha, resize)
        require(picture.y.size > 0, "it has no pixels")
        if picture.levels == 1:
            values, m = picture.y, np.isfinite(picture.y).all(2, keepdims=True)
            ok = ((values >= 0) & (values <= 1) | ~m).all()
            require(ok, "floating-point numbers must be from 0 to 1, or NaN where a pixel is missing")
            picture.y = np.concatenate([np.where(m, 4 * values - 2, 0), m], 2, dtype=np.float32)
        y = picture.y = picture.y.transpose(2, 0, 1)
        if mask is not None:
            (H, W), (h, w) = y.shape[1:], mask.shape
            require((H, W) == (h, w), f"its mask has {w}x{h} pixels, not {W}x{H}")
            y *= mask
        if picture.levels == 255 and not raw:
            m = y[-1:]
            picture.y = np.concatenate([m * (np.float32(4 / 255) * y[:-1] - 2), m], dtype=np.float32)
        return picture


def image_size(path: Path) -> tuple[int, int]:
    """The two sides of an image or .npy file, which is not read."""
    from PIL import Image

    if path.suffix.lower() == ".npy":
        H, W = np.load(path, mmap_mode="r").shape[:2]  # an error if it has fewer
        return H, W
    with Image.open(path, formats=FORMATS) as image:
        return image.size


def open_image(path: Path):
    """A Pillow image, turned upright. Refuses what Pillow would read only in part."""
    from PIL import Image, ImageOps

    require(path.is_file(), "it is not a regular file")
    # Given a name, Pillow would map a raw TIFF into memory, and turn it wrongly
    with open(path, "rb") as content, Image.open(content) as file:
        require(file.format in FORMATS, f"{file.format} is not supported: save it as PNG")
        frames = getattr(file, "n_frames", 1) if file.format != "MPO" else 1  # phones add a preview to photos
        require(frames == 1, f"it has {frames} pages or frames: save one of them")
        codec, how = (file.tile[0][0], file.tile[0][-1]) if file.tile else ("", "")
        deep = ";16" in str(how) or codec.startswith("ppm") and how[-1] > 255
        deep |= file.format == "TIFF" and max(file.tag_v2.get(258, (1,))) > 8
        ok = not deep or file.mode[0] in "IF" and ";12" not in str(how)
        require(ok, "colours of 16 bits, and 12 bits, are not supported: save 8 bits, or .npy from 0 to 1")
        ok = file.mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "F")
        ok = ok or file.mode.startswith("I;16") or file.mode == "I" and file.format == "PNG"
        require(ok, f"mode {file.mode} is not supported: save it as grey or RGB of 8 bits")
        inverted = file.format == "TIFF" and file.mode[0] in "FI" and file.tag_v2.get(262) == 0
        require(not inverted, "0 is white in this TIFF: save it with 0 as black")
        # Pillow scales the values, but not the one that is transparent
        shallow = file.mode == "L" and "transparency" in file.info and re.search(";[24]'", str(file.tile))
        require(not shallow, "grey of 2 or 4 bits with transparency is not supported: save it with 8 bits")
        return ImageOps.exif_transpose(file)


def read_pixels(path: Path, channels: int, alpha: bool, resize) -> Picture:
    """See `read_image`. Here y is (H, W, C + 1), or in floating point the numbers of the file, (H, W, C)."""
    if path.suffix.lower() == ".npy":
        values = np.load(path, allow_pickle=False)
        ok = values.dtype.kind in "fiub" and (*values.shape, 1)[2:3] == (channels,) and values.ndim < 4
        require(ok, f"it is a {values.dtype} array {values.shape}, not numbers (H, W, {channels})")
        values = np.atleast_3d(values).astype(np.float32)
        return Picture(values, 1, channels == 1, ".npy")
    image = open_image(path)
    info, grey = image.info, image.mode[0] in "1LIF"
    # Not the profile of colours that are written as other ones, nor the 0 / 0 or 1 dpi of some TIFF
    kept = dict(icc_profile=image.mode != "CMYK" and (grey or channels > 1), exif=True)
    kept["dpi"] = all(1 < n < 1e6 for n in info.get("dpi", ()))
    extra = {name: info[name] for name, keep in kept.items() if keep and info.get(name)}
    like = dict(grey=channels == 1 or grey, extra=extra)
    if image.mode[0] not in "FI":
        image = image.convert("RGBA")  # what is transparent by a palette or a colour, too
        image = image.convert("LA") if channels == 1 else image
    values = np.atleast_3d(np.asarray(resize(image) if resize else image))
    if image.mode == "F":
        return Picture(values.repeat(channels, 2), 1, suffix=".tif", **like)
    if image.mode[0] == "I":
        transparent = image.info.get("transparency")
        m = values != transparent if alpha and isinstance(transparent, int) else np.ones_like(values, bool)
        y = np.concatenate([m * (4 / 65535 * values - 2)] * channels + [m], 2, dtype=np.float32)
        return Picture(y, 65535, **like)
    values, a = values[..., :-1], values[..., -1:]
    m = a == 255 if alpha else np.ones_like(a, bool)
    soft = float((~m & (a > 0)).mean())  # a soft edge: the colour there is a mixture
    return Picture(np.concatenate([values, m], 2), 255, soft=soft, **like)


def summary(pictures: list[Picture]) -> str:
    """What was read, in words."""
    depths = {1: "floating-point", 255: "8 bits", 65535: "16 bits"}
    kinds = [depths[n] for n in sorted({picture.levels for picture in pictures})]
    kinds += ["grey" if grey else "colour" for grey in sorted({picture.grey for picture in pictures})]
    soft = sum(picture.soft for picture in pictures) / len(pictures)
    kinds += [f"{soft:.2%} half transparent, taken as missing"] if soft else []
    return f"{len(pictures)} images read ({', '.join(kinds)})"


def read_mask(path: Path, invert: bool = False) -> np.ndarray:
    """(H, W), False where a pixel is missing: black, or white if `invert`. Raises DiffEMError if unclear."""
    with explained(f"{path} cannot be read as a mask"):
        image = open_image(path)
        require(not image.has_transparency_data, "a mask must not be transparent: save it in black and white")
        image = image if image.mode[0] in "FI" else image.convert("RGB")
        values = np.atleast_3d(np.asarray(image, np.float32))
        grey, values = np.ptp(values, 2).max() < 32, values.mean(2)
        top = 255 if image.mode == "RGB" and values.max() > 1 else values.max()
        middle = ((values > top / 4) & (values < top * 3 / 4)).mean()
        clear = grey and middle < 0.05 and values.max() >= top * 3 / 4
        require(clear, "a mask must be black where a pixel is missing and white elsewhere")
    return (values > top / 2) != invert


def jpeg_tables(files: list[Path]) -> dict:
    """The quantisation tables and the subsampling of the JPEG files among these, which must have the same."""
    from PIL import Image, JpegImagePlugin

    found, others = {}, 0
    for path in files:
        with contextlib.suppress(Exception), Image.open(path) as file:  # which reading the file will report
            if file.format not in ("JPEG", "MPO"):
                others += 1
                continue
            used = list(dict.fromkeys(layer[3] for layer in file.layer))
            tables = tuple(q for i in used for q in file.quantization[i])
            colours, sampling = len(file.layer), JpegImagePlugin.get_sampling(file)
            ok = len(used) < 3 and (colours == 1 or colours == 3 and sampling >= 0)
            ok = ok and (colours == 1 or file.info.get("adobe_transform") != 0)  # else RGB
            ok = ok and file.getexif().get(0x0112, 1) == 1  # else its blocks are turned with the image
            found.setdefault((tables, max(0, sampling), ok), str(path))
    names, how = ", ".join(found.values()), "give --quality and --subsampling"
    require(len(found) > 0, f"none of the observations is a JPEG file: {how}, or --tables")
    require(len(found) == 1, f"JPEG of different kinds, {names}: {how}, or sort them")
    tables, subsampling, ok = next(iter(found))
    require(ok, f"{names}: turned by EXIF, or colours are no YCbCr or subsampled unusually: save it anew")
    if others:
        print(f"{others} of {len(files)} files are no JPEG, and taken as if they had been")
    return dict(tables=tables, subsampling=subsampling)


def same_jpeg(path: Path, parameters: dict) -> bool:
    """Has a file the quantisation tables and the subsampling that these parameters have?"""
    with contextlib.suppress(DiffEMError):
        found = jpeg_tables([path])
        return json.dumps(found) == json.dumps({name: parameters[name] for name in found})
    return False


# ---- Restore: numpy, Pillow and onnxruntime only ----------------------------------------------------------
def sampler(method: str, steps: int, sigma_min: float, sigma_max: float) -> np.ndarray:
    """(steps, 5): sigma_t, a, b, c, d of each step, as `diffem.sampler`."""
    require(method in METHODS, f"unknown method {method}: {', '.join(METHODS)}")
    require(1 <= steps <= 1e5, f"steps must be from 1 to 100000, not {steps}")
    levels = np.append(np.geomspace(sigma_max, sigma_min, steps), 0)
    sigma_t, sigma_s = levels[:-1], levels[1:]
    a, c, d = sigma_s / sigma_t, np.zeros(steps), np.zeros(steps)
    if method in ("ddpm", "sde2m"):
        a, d = a**2, sigma_s * np.sqrt(1 - a**2)
    if method in ("sde2m", "dpm2m"):  # (3 D - D_previous) / 2 in place of D
        c[1:-1] = (a[1:-1] - 1) / 2
    return np.stack([sigma_t, a, 1 - a - c, c, d], 1)


def cuda_session(session_of):
    """onnxruntime's session on CUDA. Raises DiffEMError with the part of CUDA that is missing."""
    import onnxruntime

    driver = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    with explained(f"there is no NVIDIA driver ({driver})"):
        ctypes.CDLL(driver)
    built = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    require(built, "this onnxruntime was built without CUDA: pip install onnxruntime-gpu")
    # EXHAUSTIVE, the default, would search anew for the last, smaller batch; the Gaussian needs all bits
    cuda = ("CUDAExecutionProvider", dict(cudnn_conv_algo_search="HEURISTIC", use_tf32="0"))
    # preload_dlls prints what it does not find
    with explained("CUDA does not start"), contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()
        session = session_of(providers=[cuda, "CPUExecutionProvider"], enable_fallback=0)
    loaded = session.get_providers()[0] == "CUDAExecutionProvider"
    require(loaded, "CUDA or cuDNN do not load: pip install onnxruntime-gpu[cuda,cudnn]")
    return session


class Restorer:
    """A model.onnx, or its content, to sample x0 ~ q(x0 | y) with. Raises DiffEMError if it is anything else.

    device: cuda, cpu, or auto for the first of the two that works. threads: of the CPU, by default all.
    Attributes: `device`; `no_cuda`, why it is not cuda; `metadata`, what was recorded at the export.
    """

    def __init__(self, path: str | Path | bytes, device: str = "auto", threads: int = 0):
        import onnxruntime

        require(device in ("auto", "cuda", "cpu"), f"unknown device {device}: auto, cuda or cpu")
        content = path if isinstance(path, bytes) else Path(path).read_bytes()
        path, found = "the model" if content is path else path, SHA256.search(content) is not None
        require(found, f"{path} is not a model written by export.py, or not a whole one")
        require(sealed(content) == content, f"{path} is damaged: its sha256 is not the one recorded in it")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or cores
        onnxruntime.set_default_logger_severity(4)  # what matters of its warnings is said here
        session_of = functools.partial(onnxruntime.InferenceSession, content, options)
        self.device, self.no_cuda = "cpu", "not asked for"
        try:
            if device != "cpu":
                self.session = cuda_session(session_of)
                self.device, self.no_cuda = "cuda", ""
        except DiffEMError as error:
            require(device != "cuda", f"cannot run on CUDA: {error}")
            self.no_cuda = str(error)
        with explained(f"{path} cannot be loaded"):
            if self.device == "cpu":
                self.session = session_of(providers=["CPUExecutionProvider"])
            metadata = self.session.get_modelmeta().custom_metadata_map
            meta = self.metadata = {key: json.loads(v) for key, v in metadata.items() if key != "sha256"}
        version = meta.get("format")
        mine = f"this export.py reads format {FORMAT}: export the run anew"
        require(version == FORMAT, f"{path} has format {version}, {mine}")
        wrong = [name for name, kind in METADATA.items() if not isinstance(meta.get(name), kind)]
        ok = not wrong and 0 < meta["sigma_min"] < meta["sigma_max"] and meta["method"] in METHODS
        ok = ok and min(value for name, value in meta.items() if METADATA.get(name) is int) > 0
        wrong = ", ".join(wrong) or "values"
        require(ok, f"the metadata of {path} are not those of an exported model ({wrong})")

    def __call__(self, y: np.ndarray, steps: int = 0, method: str = "", seed: int = 0) -> np.ndarray:
        """A sample x0 ~ q(x0 | y) for each of observations y (N, C + 1, H, W) -> (N, C, H, W). Black is -2,
        white 2; some values lie outside: clip them before you round.

        The last channel of y is 1 where a pixel is observed; where it is 0, so is the rest. steps, method: 0
        and "" for those of the export. Row i has the noise of default_rng((seed, i)), whatever the batch.
        Raises DiffEMError if the model cannot take y.
        """
        return self.sample(y, steps, method, [(seed, i) for i in range(len(y))])

    def sample(self, y: np.ndarray, steps: int, method: str, seeds: list, exact=2 / 255) -> np.ndarray:
        """As `__call__`, with a seed for each row. Observed pixels are kept if the noise is below `exact`."""
        meta, y = self.metadata, np.asarray(y, np.float32)
        C, least = meta["channels"], meta["multiple"]
        ok = y.ndim == 4 and y.shape[1] == C + 1 and y.size > 0
        require(ok, f"observations must be (N, {C + 1}, H, W), not {y.shape}")
        (H, W), m = y.shape[2:], y[:, -1:]
        ok = np.abs(y).max() < 30  # False for NaN, too
        require(ok, "the observations must be finite numbers, black -2 and white 2")
        require(np.isin(m, (0, 1)).all(), "the last channel of the observations must be 0 or 1")
        require((y == y * m).all(), "where the last channel of y is 0, the others must be 0 too")
        ok = meta["masks"] or (m.all((1, 2, 3)) | ~m.any((1, 2, 3))).all()
        require(ok, f"no pixels may be missing where the corruption is {meta['corruption']}")
        if meta["masks"]:  # what is added was not observed, and is cut off in the end
            y = np.pad(y, ((0, 0), (0, 0), (0, max(0, least - H)), (0, max(0, least - W))))
        require(min(y.shape[2:]) >= least, f"{H}x{W} pixels: the model takes {least}x{least} or more")
        steps, method = steps or meta["steps"], method or meta["method"]
        table = sampler(method, steps, meta["sigma_min"], meta["sigma_max"])
        batch, parts, done = max(1, PIXELS[self.device] // (H * W)), [], 0
        while done < len(y):
            try:
                parts.append(self._loop(y[done : done + batch], table, seeds[done : done + batch]))
                done += batch
            except Exception as error:  # onnxruntime has classes of its own
                if not out_of_memory(error):
                    raise
                require(batch > 1, f"{H}x{W} pixels are too many for the memory of this machine")
                batch //= 2
        x = np.concatenate(parts)[..., :H, :W]
        require(np.isfinite(x).all(), "the model gave values that are not finite")
        return np.where(m == 1, y[:, :-1, :H, :W], x) if meta["masked_noise"] < exact else x

    def _loop(self, y: np.ndarray, table: np.ndarray, seeds: list) -> np.ndarray:
        """All steps of one batch, with the noise from numpy, since that of a graph cannot be seeded. A large
        image is denoised by overlapping tiles, whose weights fall to 0 near an edge that is not the image's.
        """
        generators = [np.random.default_rng(seed) for seed in seeds]
        (N, C, H, W), how = y.shape, (self.metadata["grid"], self.metadata["overlap"])
        parts = list(itertools.product(tiles(H, *how), tiles(W, *how)))

        def draw() -> np.ndarray:
            return np.stack([g.standard_normal((C - 1, H, W), np.float32) for g in generators])

        xt = np.float32(table[0, 0]) * draw()
        x0 = np.zeros_like(xt)
        with ThreadPoolExecutor(1) as thread:
            for sigma, a, b, c, d in table.astype(np.float32):
                noise = thread.submit(draw) if d else None  # while the model computes
                level = dict(sigma=np.full(N, sigma), coefficients=np.zeros(4, np.float32))
                previous, x0, total = x0, np.zeros_like(xt), np.zeros((H, W), np.float32)
                for (rows, row), (columns, column) in parts:
                    part, weight = xt[..., rows, columns], row[:, None] * column
                    inputs = level | dict(xt=part, y=y[..., rows, columns], x0_previous=part, noise=part)
                    x0[..., rows, columns] += weight * self.session.run(["x0"], inputs)[0]
                    total[rows, columns] += weight
                x0 /= total
                xt = a * xt + b * x0 + c * previous + (d * noise.result() if noise else 0)
        return xt


def tiles(n: int, grid: int = 16, overlap: int = OVERLAP) -> list[tuple[slice, np.ndarray]]:
    """Parts of a side of n pixels, about TILE long, from multiples of `grid` on; weights of their pixels."""
    step = max(1, (TILE - overlap) // grid) * grid
    length, number = step + overlap, max(1, -(-(n - overlap) // step))
    first = [grid * round(i * (n - length) / max(1, number - 1) / grid) for i in range(number)]
    last = [start + length for start in first[:-1]] + [n]
    parts = []
    for i, (start, stop) in enumerate(zip(first, last)):
        near = np.arange(stop - start) + 0.5  # to the edges; a quarter of the overlap is not used at all
        near = np.minimum(near + 1e9 * (i == 0), near[::-1] + 1e9 * (i == number - 1))
        parts.append((slice(start, stop), np.clip(near / overlap * 2 - 0.5, 1e-6, 1).astype(np.float32)))
    return parts


def write_images(target: Path, x: np.ndarray, like: Picture) -> None:
    """Of samples x (S, C, H, W): target_sample1 .., target_mean, and target_std, grey, white at 1. Of the
    kind of the input: 8 or 16 bits as PNG, numbers from 0 to 1 as .npy or TIFF."""
    from PIL import Image

    pictures = {f"sample{i + 1}": sample for i, sample in enumerate(x)}
    if len(x) > 1:
        std = np.sqrt(x.var(0, ddof=1).mean(0, keepdims=True))
        pictures |= {"mean": x.mean(0), "std": 4 * std - 2}
    target.parent.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        values = like.levels * ((picture + 2) / 4).clip(0, 1).transpose(1, 2, 0)  # (H, W, C)
        values = values.mean(2) if like.grey or values.shape[2] == 1 else values
        kind = {1: "float32", 255: "uint8", 65535: "uint16"}[like.levels]
        values = (values if like.levels == 1 else np.round(values)).astype(kind)
        with replacing(Path(f"{target}_{name}{like.suffix}")) as file:
            if like.suffix == ".npy":
                np.save(file, values)
            else:
                extra = like.extra if name != "std" else {}
                Image.fromarray(values).save(file, Image.registered_extensions()[like.suffix], **extra)


def targets(inputs: list[str], out: Path, masks: str | None) -> dict[Path, tuple[Path, Path]]:
    """The image files of the inputs, with the folder of each, by the path of its results without ending."""
    found = {}
    for given in map(Path, inputs):
        require(given.exists(), f"no file or folder {given}")
        folder = given if given.is_dir() else given.parent
        same = folder.resolve() == out.resolve()
        require(not same, f"{folder} is the folder of the input: choose another one for --out")
        files = find_images(given, True, out, masks) if given.is_dir() else [given]
        require(len(files) > 0, f"no images in {given}")
        for file in files:
            target = out / file.relative_to(folder).parent / file.stem
            other = found.setdefault(target, (file, folder))[0]
            same = other == file or other.samefile(file)
            way_out = "rename one, or restore it to another --out"
            require(same, f"{other} and {file} would both be restored to {target}: {way_out}")
    names = {target.resolve() for target in found}
    for file, _ in found.values():
        name = file.resolve().with_suffix("")
        other = name.with_name(re.sub(r"_(sample\d+|mean|std)$", "", name.name))
        require(other == name or other not in names, f"a result would replace {file}: choose another --out")
    return found


def observations(files: dict, metadata: dict, options: argparse.Namespace, bad: list):
    """Each target with its picture, as the model takes it. What cannot be read goes to `bad`."""
    corruption, least, masks = metadata["corruption"], metadata["multiple"], Path(options.masks or "")
    factor = metadata["factor"]
    for target, (path, folder) in files.items():
        try:
            mask = None
            if options.masks:
                mask = find_mask(path, folder, masks) if masks.is_dir() else masks
                mask = read_mask(mask, options.invert_masks)
            picture = read_image(path, metadata["channels"], mask)
            whole = metadata["masks"] or picture.y[-1].all()
            require(whole, f"{path}: no pixels may be missing where the corruption is {corruption}")
            H, W = picture.y.shape[1:]
            side = -(-least // factor)
            ok = metadata["masks"] or min(H, W) >= side
            require(ok, f"{path} has {H}x{W} pixels: the model takes {side}x{side} or more")
            picture.y = picture.y.repeat(factor, 1).repeat(factor, 2)  # y has the size of x
            if metadata["masks"] and picture.y[-1].all():
                picture.doubt = "no pixel is missing: alpha, NaN or --masks?"
            if not picture.y[-1].any():
                picture.doubt = "every pixel is missing"
            if metadata["parameters"].get("tables") and not same_jpeg(path, metadata["parameters"]):
                picture.doubt = "the model was trained on JPEG files of another quality"
            yield target, picture
        except DiffEMError as error:
            bad.append(str(error))


def restore(options: argparse.Namespace) -> None:
    """Restores image files. The result for an image does not depend on the others. Those that cannot be read
    are counted in the end, and raise DiffEMError unless they may be skipped."""
    restorer, out, samples = Restorer(options.model, options.device), Path(options.out), options.samples
    meta, bad, done, doubts = restorer.metadata, [], 0, Counter()
    steps, method = options.steps or meta["steps"], options.method or meta["method"]
    sampler(method, steps, 1, 2)  # raises if there is no such method or number
    require(1 <= samples <= 1000 and options.seed >= 0, "--samples must be from 1 to 1000, --seed at least 0")
    require(options.masks or not options.invert_masks, "--invert-masks needs --masks")
    files = targets(options.inputs, out, options.masks)
    out.mkdir(parents=True, exist_ok=True)
    if options.device == "auto" and restorer.no_cuda:
        print(f"on the CPU: {restorer.no_cuda}", file=sys.stderr)
    seeds, pictures = [(options.seed, i) for i in range(samples)], observations(files, meta, options, bad)
    # Pictures of one size and depth are sampled together
    for (shape, levels), same in itertools.groupby(pictures, lambda item: (item[1].y.shape, item[1].levels)):
        most = PIXELS[restorer.device] // (samples * shape[1] * shape[2]) + 1
        while group := list(itertools.islice(same, most)):
            y = np.stack([picture.y for _, picture in group])
            x = restorer.sample(np.repeat(y, samples, 0), steps, method, seeds * len(y), 2 / max(levels, 255))
            for (target, picture), images in zip(group, np.split(x, len(y))):
                write_images(target, images, picture)
                doubts[picture.doubt] += 1
            done += len(group)
            if sys.stderr.isatty():
                print(f"\r{done} of {len(files)} ", end="", file=sys.stderr, flush=True)
    for doubt, number in doubts.items():
        if doubt:
            print(f"{number} of {len(files)} images: {doubt}", file=sys.stderr)
    print(f"{out}: {done} restored, {samples} samples each, by {steps} steps of {method}")
    left_out = ", and ".join(bad[:1] + [f"{len(bad) - 1} more"] * (len(bad) > 1))
    if bad and options.skip_bad_images and done:
        print(f"left out: {left_out}", file=sys.stderr)
    elif bad:
        raise DiffEMError(left_out + "; --skip-bad-images leaves them out" * (not options.skip_bad_images))


# ---- Command line -----------------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise DiffEMError(message)


def run(argv: list[str]) -> None:
    if argv[:1] == ["restore"]:
        parser = Parser(prog="export.py restore", description="Restore images with an exported model.")
        flag = parser.add_argument
        flag("model", help="a model.onnx")
        flag("inputs", nargs="+", help="images, or folders of them; missing pixels are transparent")
        flag("-o", "--out", default="restored", help="folder for the results (default: %(default)s)")
        flag("--masks", help="image, black where a pixel is missing, or folder with the inputs' names")
        flag("--invert-masks", action="store_true", help="masks are white where a pixel is missing")
        flag("--skip-bad-images", action="store_true", help="no error for images that cannot be read")
        flag("--steps", type=int, default=0, help="evaluations of the network (default: as trained)")
        flag("--method", default="", help=f"{', '.join(METHODS)} (default: as trained)")
        flag("--samples", type=int, default=4, help="posterior samples of each image (default: %(default)s)")
        flag("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
        flag("--device", default="auto", help="auto, cuda or cpu (default: %(default)s)")
        return restore(parser.parse_args(argv[1:]))
    parser = Parser(description="Freeze a trained model to TorchScript and ONNX.")
    parser.epilog = "python export.py restore --help explains how to use the ONNX file."
    flag = parser.add_argument
    flag("folder", metavar="runs/NAME", help="a run of diffem.py")
    flag("-o", "--out", help="folder for the files (default: that of the run)")
    flag("--half", action="store_true", help="write model.half.onnx, its network in float16")
    flag("--best", action="store_true", help="the lap with the best energy score, not the last")
    export(**vars(parser.parse_args(argv)))


def out_of_memory(error: Exception) -> bool:
    """PyTorch, CUDA's libraries and onnxruntime have no class in common."""
    text = str(error).lower()
    found = re.search("memory|alloc|unable to find an engine", text) and "illegal" not in text
    return isinstance(error, MemoryError) or bool(found)


def exit_code(program, name: str) -> int:
    """Runs a program. Returns its exit code: 2 after an error that the user can mend, which is one line of
    standard error. SIGTERM is as Ctrl-C. Letters that the terminal lacks are escaped."""

    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, interrupt)
    with contextlib.suppress(AttributeError):  # of a notebook
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", module="PIL")  # of large images
    try:
        code = program() or 0
        sys.stdout.flush()  # here, where a closed pipe is noticed
        return code
    except KeyboardInterrupt as error:
        reason, code = "stopped", 128 + (error.args or [signal.SIGINT])[0]
    except (OSError, ImportError) as error:
        reason, code = error, 2
        if isinstance(error, BrokenPipeError):
            sys.stdout = open(os.devnull, "w")  # or Python tries once more to write what is left
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        reason, code = f"out of memory: take fewer or smaller images or batches ({error!r:.90})", 2
    print(f"{name}: {reason}", file=sys.stderr)
    return code


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code, 2 after an error that the user can mend."""
    return exit_code(lambda: run(sys.argv[1:] if argv is None else argv), "export")


if __name__ == "__main__":
    sys.exit(main())
