"""export.py from outside: the files it writes against the eager model, and restoring without PyTorch."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import diffem
import export
from diffem import Blur, Jpeg, Mask
from export import Restorer, sealed

ROOT = Path(__file__).parents[1]


def python(*arguments, cwd):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


# Restores in a process where these three cannot be imported
RESTORE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
for name in ("torch", "onnx", "diffem"):
    sys.modules[name] = None
import export
sys.exit(export.main(["restore", *sys.argv[1:]]))
"""


def make_run(folder, shape, corruption="mask", parameters=None, **config):
    """A run folder whose model has left its start, where F is 0."""
    small = dict(
        channels=(8, 16), blocks=1, batch=4, steps=1, method="ddpm", sample_steps=5, dataset="folder"
    )
    config = small | config
    kind = diffem.CORRUPTIONS[corruption]
    settings = diffem.Settings(
        corruption=corruption, parameters=diffem.parameters_of(kind) | (parameters or {}), **config
    )
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(4, *shape, generator=generator)
    corruption, gaussian = kind(**settings.parameters), diffem.Gaussian(list(shape), power=3.0)
    corruption.learn(gaussian.sample(64, generator), generator)
    state = diffem.new_state(x0, diffem.new_denoiser(gaussian, corruption, settings, "cpu"), settings)
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    folder.mkdir(parents=True)
    diffem.save_checkpoint(folder, state, settings)
    return folder


def exported(folder, *arguments):
    assert export.main([str(folder), *arguments]) == 0
    return Restorer(folder / "model.onnx", "cpu", threads=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An exported model of colour images with missing pixels, with attention and dropout."""
    config = dict(channels=(8, 16, 16), attention=(1, 2), heads=2, dropout=0.5, precision="float32")
    folder = make_run(tmp_path_factory.mktemp("export") / "runs" / "colour", (3, 16, 16), **config)
    done = python(ROOT / "export.py", folder, cwd=folder.parent)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all(
        re.search(r"MB, largest error against PyTorch \d\.\de[-+]\d\d$", line) for line in lines
    )
    assert {path.name for path in folder.iterdir()} == {"checkpoint.pt", "model.ts.pt", "model.onnx"}
    return folder


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """The folder of an exported model of each corruption, of images (3, 16, 16), made once. That of masks is of
    images which are smaller than what its network halves."""
    folders = {}

    def folder_of(name):
        if name not in folders:
            paper = dict(width=2.0, noise=1e-3) if name == "blur" else {}  # w is up to 1e6
            tiny = dict(shape=(3, 2, 3), channels=(8, 8, 8)) if name == "mask" else dict(shape=(3, 16, 16))
            folder = tmp_path_factory.mktemp("frozen") / name
            folders[name] = make_run(folder, corruption=name, parameters=paper, **tiny)
            exported(folders[name])
        return folders[name]

    return folder_of


@pytest.fixture(scope="module")
def restorer(run):
    return Restorer(run / "model.onnx", "cpu", threads=2)


def observations(shape, seed=0, rate=0.5):
    """Images of missing pixels (N, C + 1, H, W) of values that 8 bits can hold."""
    generator = np.random.default_rng(seed)
    N, C, H, W = shape
    known = generator.random((N, 1, H, W)) >= rate
    x = generator.integers(0, 256, (N, C, H, W)) * (4 / 255) - 2
    return np.concatenate([x * known, known], 1).astype(np.float32)


def eager_sample(model, y, steps, method, seeds):
    """`Denoiser.sample`'s loop on PyTorch, with the noise that a Restorer draws."""
    generators = [np.random.default_rng(seed) for seed in seeds]
    shape = (y.shape[1] - 1, *y.shape[2:])

    def draw():
        return torch.from_numpy(
            np.stack([generator.standard_normal(shape, np.float32) for generator in generators])
        )

    xt = model.sigma_max * draw()
    previous = torch.zeros_like(xt)
    for sigma, a, b, c, d in diffem.sampler(method, steps, model.sigma_min, model.sigma_max):
        with torch.no_grad():
            x0 = model(xt, torch.full((len(y),), sigma), torch.from_numpy(y))
        xt, previous = a * xt + b * x0 + c * previous + (d * draw() if d else 0), x0
    return xt.numpy()


# ---- The files against the eager model


@pytest.mark.parametrize(
    "batch, height, width", [(1, 16, 16), (5, 16, 16), (2, 21, 34), (3, 4, 7), (1, 1, 1)]
)
def test_onnx_equals_eager(run, restorer, batch, height, width, generator):
    model = diffem.load(run)
    x, previous, noise = torch.randn(3, batch, 3, height, width, generator=generator)
    y = torch.from_numpy(observations((batch, 3, height, width)))
    a, b, c, d = coefficients = torch.randn(4, generator=generator)
    sigma = torch.logspace(-3, 1, batch)
    xt = x + sigma.view(-1, 1, 1, 1) * noise
    with torch.no_grad():
        x0 = model(xt, sigma, y)
    inputs = dict(xt=xt, sigma=sigma, y=y, coefficients=coefficients, x0_previous=previous, noise=noise)
    xs, estimate = restorer.session.run(["xs", "x0"], {name: value.numpy() for name, value in inputs.items()})
    assert x0.std() > 0.1
    torch.testing.assert_close(torch.from_numpy(estimate), x0, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        torch.from_numpy(xs), a * xt + b * x0 + c * previous + d * noise, atol=2e-4, rtol=1e-5
    )


@pytest.mark.parametrize("method", ["ddpm", "ddim", "sde2m", "dpm2m"])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_restorer_equals_eager_sampling_with_the_same_noise(run, restorer, method, steps):
    y = observations((3, 3, 12, 20))
    x = restorer(y, steps=steps, method=method, seed=4)
    expected = eager_sample(diffem.load(run), y, steps, method, [(4, i) for i in range(3)])
    known = np.broadcast_to(y[:, -1:] == 1, x.shape)
    np.testing.assert_allclose(x[~known], expected[~known], atol=1e-3)
    np.testing.assert_array_equal(x[known], y[:, :-1][known])  # observed pixels are the input's own
    assert np.abs(x - restorer(y, steps=steps, method=method, seed=5)).max() > 0.1


def test_images_smaller_than_the_network_halves_are_padded(restorer):
    """Others are not: a pixel that is added counts as missing, and a blur says nothing of an image with such a pixel."""
    y = observations((2, 3, 3, 21))
    padded = np.pad(y, ((0, 0), (0, 0), (0, 1), (0, 0)))  # by pixels that were not observed
    np.testing.assert_array_equal(restorer(y, steps=3), restorer(padded, steps=3)[..., :3, :])
    y, sizes, loop = observations((2, 3, 10, 21)), [], Restorer._loop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Restorer, "_loop", lambda self, y, *rest: sizes.append(y.shape[2:]) or loop(self, y, *rest)
        )
        restorer(y, steps=3)
    assert sizes == [(10, 21)]


def test_an_observation_that_the_corruption_cannot_make_is_refused(frozen):
    """With blur, one missing pixel would take all that y says of the image; y = 0 is an unconditional sample."""
    restorer, y = (
        Restorer(frozen("blur") / "model.onnx", "cpu", threads=1),
        np.ones((2, 4, 16, 16), np.float32),
    )
    y[1] = 0
    assert np.isfinite(restorer(y, steps=2)).all()
    y[0, :, 3, 3] = 0
    with pytest.raises(export.DiffEMError, match="no pixels may be missing where the corruption is blur"):
        restorer(y, steps=2)


class Camera(diffem.Downsample):
    """A corruption of one's own that is like one of ours."""


def test_metadata_tell_what_the_files_have_replaced_and_how_large_images_are_cut():
    def of(corruption, **parameters):
        denoiser = diffem.new_denoiser(
            diffem.Gaussian([3, 8, 8]), corruption, diffem.Config(channels=(8,)), "cpu"
        )
        return export.describe(denoiser, diffem.Settings(parameters=parameters), False)

    masked = Mask(0.75)
    masked.masked.fill_(True)
    assert of(masked, rate=0.75, noise=0.0)["parameters"] == dict(noise=0.0)
    assert of(Jpeg(tables=[9] * 64), quality=20, tables=(9,) * 64)["parameters"] == dict(tables=(9,) * 64)
    assert of(Jpeg(30), quality=30, tables=())["parameters"] == dict(quality=30, tables=())
    assert of(Camera(2), factor=2)["factor"] == 2 and of(Mask(0.5))["factor"] == 1
    own = diffem.Corruption()
    own.block = 12
    assert of(own)["grid"] == 48 and of(Mask(0.5))["overlap"] == 64
    # The blur of one tile reaches over its border: 4 widths, and what is restored still farther
    assert (
        of(Blur(10.0))["overlap"] == 200
        and of(Blur(1.0))["overlap"] == 64
        and of(Blur(99.0))["overlap"] == 256
    )


@pytest.mark.parametrize("method", ["ddpm", "ddim", "sde2m", "dpm2m"])
@pytest.mark.parametrize("steps", [1, 2, 3, 40])
def test_both_samplers_have_the_same_coefficients(method, steps):
    ours, reference = (module.sampler(method, steps, 2e-3, 80.0) for module in (export, diffem))
    np.testing.assert_allclose(ours, np.array(reference), rtol=1e-9, atol=1e-12)


def test_torchscript_file_alone_equals_eager(run, generator, tmp_path):
    model, y = diffem.load(run), torch.from_numpy(observations((2, 3, 12, 20)))
    xt, sigma = torch.randn(2, 3, 12, 20, generator=generator), torch.tensor([0.1, 3.0])
    torch.save(dict(y=y, xt=xt, sigma=sigma), tmp_path / "inputs.pt")
    shutil.copy(run / "model.ts.pt", tmp_path)
    code = """
import sys
sys.modules["diffem"] = sys.modules["export"] = None
import torch
inputs, model = torch.load("inputs.pt"), torch.jit.load("model.ts.pt")
y = inputs["y"]
seeded = lambda: torch.Generator().manual_seed(3)
results = [model(inputs["xt"], inputs["sigma"], y), model.sample(y, 7, "ddpm", seeded()), model.sample(y, 7, "dpm2m", seeded())]
assert not any(result.requires_grad for result in results)
torch.save(results, "results.pt")
try:
    model.sample(y, 7, "magic", seeded())
except Exception as error:
    assert "unknown method magic" in str(error)
"""
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "results.pt")
    with torch.no_grad():
        expected = [model(xt, sigma, y)]
    for method in ("ddpm", "dpm2m"):
        expected.append(model.sample(y, 7, method, torch.Generator().manual_seed(3)))
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value, atol=1e-5, rtol=1e-5)


def test_the_torchscript_file_goes_to_another_device(run):
    """Nothing in it is bound to the CPU: not its weights, and not what it makes itself."""
    model = torch.jit.load(run / "model.ts.pt", map_location="meta")
    x, y = torch.zeros(2, 3, 16, 16, device="meta"), torch.zeros(2, 4, 16, 16, device="meta")
    assert model(x, torch.ones(2, device="meta"), y).device.type == "meta"


def test_the_onnx_file(run, restorer):
    content = (run / "model.onnx").read_bytes()
    assert not re.search(
        rb"\.py|site-packages|" + str(run).encode(), content
    )  # nothing of the machine it was made on
    model = onnx.load(run / "model.onnx")
    onnx.checker.check_model(model)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    for value in list(model.graph.input) + list(model.graph.output):
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        sizes = [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        expected = dict(sigma=["batch"], coefficients=[4], y=["batch", 4, "height", "width"])
        assert sizes == expected.get(value.name, ["batch", 3, "height", "width"])
    assert [value.name for value in model.graph.input] == [
        "xt",
        "sigma",
        "y",
        "coefficients",
        "x0_previous",
        "noise",
    ]
    assert [value.name for value in model.graph.output] == ["xs", "x0"]
    recorded = {entry.key: json.loads(entry.value) for entry in model.metadata_props if entry.key != "sha256"}
    assert recorded == restorer.metadata
    assert recorded == dict(
        format=3, channels=3, image_size=[16, 16], range=[-2, 2], dtype="float32", sigma_min=1e-3, sigma_max=100.0,
        schedule="log-uniform from sigma_max to sigma_min, then 0", method="ddpm", steps=5, corruption="mask",
        parameters=dict(rate=0.75, noise=1e-3), masks=True, masked_noise=1e-3, grid=16, multiple=4, overlap=64, factor=1,
    )  # fmt: skip


def test_pixels_of_float_images_are_kept_below_half_a_grey_level_only(run, tmp_path, monkeypatch):
    thresholds = []

    def sample(restorer, y, steps, method, seeds, exact):
        thresholds.append(exact)
        return y[:, :-1]

    monkeypatch.setattr(Restorer, "sample", sample)
    np.save(tmp_path / "a.npy", np.full((16, 16, 3), 0.5, np.float32))
    words = ["restore", run / "model.onnx", tmp_path / "a.npy", "-o", tmp_path / "out"]
    assert export.main([str(word) for word in words]) == 0
    assert thresholds == [2 / 255]


PLAIN = """
import sys
sys.modules["torch"] = sys.modules["export"] = None
import json, numpy as np, onnxruntime

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
meta = {key: json.loads(session.get_modelmeta().custom_metadata_map[key]) for key in ("channels", "sigma_max", "sigma_min")}
y = np.zeros((4, meta["channels"] + 1, 32, 32), np.float32)
y[:, :, ::2] = 1
noise = lambda: np.random.standard_normal((4, meta["channels"], 32, 32)).astype(np.float32)
levels = np.append(np.geomspace(meta["sigma_max"], meta["sigma_min"], 16), 0).astype(np.float32)
xt, x0 = levels[0] * noise(), noise()
for sigma_t, sigma_s in zip(levels, levels[1:]):  # ddpm
    r = sigma_s / sigma_t
    coefficients = np.array([r**2, 1 - r**2, 0, sigma_s * np.sqrt(1 - r**2)], np.float32)
    inputs = dict(xt=xt, sigma=np.full(4, sigma_t), y=y, coefficients=coefficients, x0_previous=x0, noise=noise())
    xt, x0 = session.run(["xs", "x0"], inputs)
np.save("samples.npy", xt)
"""


def test_the_inputs_that_the_docstring_names_are_enough_for_another_runtime(run):
    for name in ("xt", "sigma", "y", "coefficients", "x0_previous", "noise"):
        assert re.search(rf"^    {name} +(batch|4)\b", export.__doc__, re.M), name
    done = python("-c", PLAIN, cwd=run)
    assert done.returncode == 0, done.stderr
    x = np.load(run / "samples.npy")
    assert x.shape == (4, 3, 32, 32) and np.abs(x[:, :, ::2] - 1).max() < 0.01 and x[:, :, 1::2].std() > 0.1
    (run / "samples.npy").unlink()


def test_half(run):
    assert export.main([str(run), "--half"]) == 0
    half, full = (Restorer(run / f"model{kind}.onnx", "cpu", threads=2) for kind in (".half", ""))
    assert half.metadata == full.metadata | {"dtype": "float16"}
    assert (run / "model.half.onnx").stat().st_size < 0.8 * (run / "model.onnx").stat().st_size
    y = observations((4, 3, 16, 16))
    for method in ("ddpm", "dpm2m"):
        difference = half(y, 16, method) - full(y, 16, method)
        assert 0 < np.abs(difference).max() < 2 * 0.02  # 0.02 on [-1, 1]


def test_a_file_that_differs_from_the_model_is_not_kept(run, tmp_path, monkeypatch, capsys):
    other = shutil.copytree(run, tmp_path / "other", ignore=shutil.ignore_patterns("*.half.onnx"))
    content = (run / "model.onnx").read_bytes()
    saved = torch.load(other / "checkpoint.pt", weights_only=True)
    saved["state"]["average"]["network.gain.bias"] += 0.02
    torch.save(saved, other / "checkpoint.pt")
    monkeypatch.setattr(export, "onnx_step", lambda *rest: content)  # that of the weights before
    assert export.main([str(other)]) == 2
    assert re.fullmatch(
        r"export: model.onnx differs from PyTorch by 0\.0\d+, more than 0.0001: .*\n", capsys.readouterr().err
    )
    assert {path.name for path in other.iterdir()} == {"checkpoint.pt", "model.ts.pt", "model.onnx"}
    for name in ("model.onnx", "model.ts.pt"):  # what was there before
        assert (other / name).read_bytes() == (run / name).read_bytes()


# ---- Other corruptions


def test_downsampled_images_grow(frozen, tmp_path):
    model = frozen("downsample") / "model.onnx"
    pixels = np.arange(90, dtype=np.uint8).reshape(5, 6, 3)
    Image.fromarray(pixels).save(tmp_path / "small.png")
    done = python("-c", RESTORE, model, "small.png", "-o", "out", "--samples", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    x = np.kron(pixels.transpose(2, 0, 1), np.ones((1, 2, 2))) * (4 / 255) - 2
    y = np.concatenate([x, np.ones((1, 10, 12))])[None].astype(np.float32)
    x = Restorer(model, "cpu", threads=1).sample(y, 0, "", [(0, 1)])[0].transpose(1, 2, 0)
    expected = np.round((x + 2) * (255 / 4)).clip(0, 255)
    difference = np.abs(np.asarray(Image.open(tmp_path / "out/small_sample2.png")) - expected)
    assert difference.max() <= 1 and difference.mean() < 0.01  # of another number of threads


class Saturate(diffem.Corruption):
    def __init__(self, limit_at: float = 1.0):
        super().__init__(limit_at=limit_at)
        self.names = {"not": "for", "TorchScript": 1}

    def A(self, x):
        return x.clamp(-self.limit_at, self.limit_at)


def test_a_corruption_of_ones_own(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setitem(diffem.CORRUPTIONS, "saturate", Saturate)
        folder = make_run(tmp_path / "run", (1, 8, 8), "saturate")
    assert export.main([str(folder)]) == 2
    assert "saturate" in capsys.readouterr().err
    with pytest.raises(diffem.DiffEMError, match="trained on {'limit_at': 1.0}, not on {'limit_at': 0.5}"):
        export.export(str(folder), corruption=Saturate(0.5))
    export.export(str(folder), corruption=Saturate(1.0))
    metadata = Restorer(folder / "model.onnx", "cpu", threads=1).metadata
    assert (
        metadata["corruption"] == "saturate"
        and metadata["parameters"] == {"limit_at": 1.0}
        and not metadata["masks"]
    )


@pytest.mark.parametrize("name", ["mask", "blur", "downsample", "jpeg"])
def test_exported_files_equal_eager_for_every_corruption(name, frozen):
    """On images of other sizes than it was made for, y = 0 among them. The denoiser of `block` and that of
    `noise` are as that of `mask`."""
    folder, generator = frozen(name), torch.Generator().manual_seed(0)
    restorer, denoiser = Restorer(folder / "model.onnx", "cpu", threads=1), diffem.load(folder)
    denoiser.bfloat16 = False
    for size in ((16, 16), (20, 28)):
        x = torch.randn(4, 3, *size, generator=generator).clamp(-2, 2)
        y, sigma = denoiser.corruption(x, generator), torch.tensor([0.01, 0.3, 5.0, 50.0])
        y[1] = 0
        with torch.no_grad():
            expected = denoiser(x, sigma, y)
        torch.testing.assert_close(
            torch.jit.load(folder / "model.ts.pt")(x, sigma, y), expected, atol=1e-5, rtol=1e-5
        )
        inputs = dict(xt=x, sigma=sigma, y=y, coefficients=torch.ones(4), x0_previous=x, noise=x)
        (x0,) = restorer.session.run(["x0"], {name: value.numpy() for name, value in inputs.items()})
        torch.testing.assert_close(
            torch.from_numpy(x0), expected, atol=5e-4, rtol=1e-3
        )  # a thirtieth of a grey level


# ---- Restoring image files


@pytest.fixture
def pictures(tmp_path):
    """A folder of pictures with missing pixels of two sizes, one in a folder of its own. Their alpha is the mask."""
    (tmp_path / "in/more").mkdir(parents=True)
    for i, (name, height, width) in enumerate([("a", 9, 14), ("b", 16, 16), ("more/c", 16, 16)]):
        y = observations((1, 3, height, width), seed=i)[0].transpose(1, 2, 0)
        pixels = (
            np.random.default_rng(i).integers(0, 256, y.shape).astype(np.uint8)
        )  # a missing pixel's colours: anything
        known = y[..., -1:] == 1
        pixels = np.where(known, np.round((y + 2) * (255 / 4)).astype(np.uint8), pixels)
        pixels[..., -1] = 255 * known[..., 0]
        Image.fromarray(pixels).save(tmp_path / f"in/{name}.png")
    return tmp_path


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_restore_without_pytorch(run, restorer, pictures):
    code = "--samples 3 --steps 4 --method ddim --seed 7".split()
    done = python("-c", RESTORE, run / "model.onnx", "in", "-o", "out", *code, cwd=pictures)
    assert done.returncode == 0 and re.fullmatch(r"(on the CPU: .*\n)?", done.stderr), (
        done.stderr
    )  # no bar: no terminal
    names = {str(path.relative_to(pictures / "out")) for path in (pictures / "out").rglob("*.png")}
    kinds = ["sample1", "sample2", "sample3", "mean", "std"]
    assert names == {f"{name}_{kind}.png" for name in ("a", "b", "more/c") for kind in kinds}
    for name in ("a", "b", "more/c"):
        observed = read(pictures / f"in/{name}.png")
        known = observed[..., -1] == 255
        x = np.stack([read(pictures / f"out/{name}_sample{i}.png") for i in (1, 2, 3)])  # (3, H, W, C)
        y = np.concatenate([(observed[..., :3] * (4 / 255) - 2) * known[..., None], known[..., None]], -1)
        expected = restorer.sample(np.stack([y.transpose(2, 0, 1)] * 3), 4, "ddim", [(7, 0), (7, 1), (7, 2)])
        assert np.abs(x - ((expected.transpose(0, 2, 3, 1) + 2) * (255 / 4)).clip(0, 255)).max() < 0.51
        assert (x[:, known] == observed[known][:, :3]).all() and not (x[0] == x[1]).all()
        mean, std = (read(pictures / f"out/{name}_{kind}.png") for kind in ("mean", "std"))
        inside = ((x > 0) & (x < 255)).all((0, 3))  # rounding aside, where no sample was cut
        assert inside.mean() > 0.3 and np.abs(mean - x.mean(0))[inside].max() <= 1
        spread = 4 * np.sqrt(x.var(0, ddof=1).mean(-1))  # white, 255, at a quarter of the range
        assert std.shape == known.shape and (std[known] == 0).all()
        assert np.abs(std - spread.clip(0, 255))[inside].max() <= 4

    # One image alone, by two processes, has the same result as among others; another seed another
    for i, seed in enumerate((7, 7, 8)):
        arguments = ["in/b.png", "-o", f"alone{i}", *code[:-1], seed, "--device", "cpu"]
        done = python("-c", RESTORE, run / "model.onnx", *arguments, cwd=pictures)
        assert done.returncode == 0 and done.stderr == "", done.stderr
    files = [pictures / folder / "b_sample1.png" for folder in ("out", "alone0", "alone1", "alone2")]
    same = [files[0].read_bytes() == file.read_bytes() for file in files[1:]]
    assert same == [True, True, False]


def test_masks_in_files_of_their_own(run, pictures):
    (pictures / "masks/more").mkdir(parents=True)
    (pictures / "plain/more").mkdir(parents=True)
    (pictures / "plain/masks").symlink_to(pictures / "masks")  # in a folder of images, masks are none
    for name in ("a", "b", "more/c"):
        image = Image.open(pictures / f"in/{name}.png")
        image.convert("RGB").save(pictures / f"plain/{name}.bmp")
        image.getchannel("A").save(pictures / f"masks/{name}.png")
    commands = {
        "out": ["in"],
        "folder": ["plain", "--masks", "plain/masks"],
        "file": ["plain/a.bmp", "--masks", "masks/a.png"],
    }
    for out, arguments in commands.items():
        done = python("-c", RESTORE, run / "model.onnx", *arguments, "-o", out, "--samples", 1, cwd=pictures)
        assert done.returncode == 0, done.stderr
    for name, other in [("a", "folder"), ("b", "folder"), ("more/c", "folder"), ("a", "file")]:
        expected = read(pictures / f"out/{name}_sample1.png")
        np.testing.assert_array_equal(read(pictures / other / f"{name}_sample1.png"), expected)
    assert not list((pictures / "out").rglob("*mean*"))  # of one sample


def test_the_batch_does_not_matter_and_shrinks_where_memory_is_short(restorer, monkeypatch):
    y = observations((5, 3, 16, 16))
    expected = restorer(y, steps=3, seed=1)
    genuine, batches = Restorer._loop, []

    def short_of_memory(self, y, *rest):
        batches.append(len(y))
        if len(y) > 2:
            raise RuntimeError("Failed to allocate memory for requested buffer")
        return genuine(self, y, *rest)

    monkeypatch.setattr(Restorer, "_loop", short_of_memory)
    monkeypatch.setitem(export.PIXELS, "cpu", 4 * 256)
    np.testing.assert_allclose(restorer(y, steps=3, seed=1), expected, atol=1e-4)
    assert batches == [4, 2, 2, 1]


# ---- Bad input: one line, exit code 2


def fails(capsys, *arguments) -> str:
    """The one line on standard error."""
    assert export.main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("export: "), err
    return err


def rewritten(content: bytes, key: str, value) -> bytes:
    """The model with another value in its metadata, and the hash that belongs to it."""
    model = onnx.load_from_string(content)
    for entry in model.metadata_props:
        if entry.key == key:
            entry.value = json.dumps(value)
    return sealed(model.SerializeToString())


def broken_graph(content: bytes) -> bytes:
    """The model without one of its nodes, and the hash that belongs to it."""
    model = onnx.load_from_string(content)
    del model.graph.node[len(model.graph.node) // 2]
    return sealed(model.SerializeToString())


def test_bad_models(run, pictures, monkeypatch, capsys):
    monkeypatch.chdir(pictures)
    content = (run / "model.onnx").read_bytes()
    weights = content.rfind(b"denoiser.network.out.weight")
    alien = onnx.helper.make_model(onnx.helper.make_graph([], "none", [], []))
    files = {
        "empty": (b"", "not a model written by export.py"),
        "text": (b"a picture, perhaps", "not a model written by export.py"),
        "alien": (alien.SerializeToString(), "not a model written by export.py"),
        "checkpoint": ((run / "checkpoint.pt").read_bytes(), "not a model written by export.py"),
        "truncated": (content[: len(content) // 2], "not a whole one"),
        "bit": (
            content[: weights - 9] + bytes([content[weights - 9] ^ 1]) + content[weights - 8 :],
            "sha256",
        ),
        "format": (rewritten(content, "format", 1), "has format 1, this export.py reads format 3: export"),
        "sigma": (rewritten(content, "sigma_min", 0), "metadata"),
        "multiple": (rewritten(content, "multiple", 0), "metadata"),
        "channels": (rewritten(content, "channels", "3"), "metadata of channels.onnx are not those"),
        "steps": (rewritten(content, "steps", None), "(steps)"),
        "method": (rewritten(content, "method", "euler"), "metadata"),
        "graph": (broken_graph(content), "cannot be loaded"),
    }
    for name, (content, message) in files.items():
        (pictures / f"{name}.onnx").write_bytes(content)
        assert message in fails(capsys, "restore", f"{name}.onnx", "in"), name
    fails(capsys, "restore", "absent.onnx", "in")
    assert not (pictures / "restored").exists()


def test_bad_pictures(run, pictures, monkeypatch, capsys):
    monkeypatch.chdir(pictures)
    Image.new("RGB", (16, 16), (90, 90, 90)).save("opaque.png")
    Image.new("L", (15, 16), 255).save("mask.png")
    Path("broken.png").write_bytes(Path("in/b.png").read_bytes()[:100])
    Path("empty").mkdir()
    Path("file").write_text("")
    Image.open("in/b.png").save("in/b.webp", lossless=True)
    for folder in ("in/deep", "more/deep"):
        Path(folder).mkdir(parents=True)
    Image.open("in/b.png").save("in/deep/a_mean.png")
    Image.open("in/b.png").save("more/deep/a.png")
    for arguments, message in [
        ("opaque.png --masks mask.png", "its mask has 15x16 pixels, not 16x16"),
        ("opaque.png --masks opaque.png", "black where a pixel is missing"),
        ("opaque.png --masks absent.png", "absent.png"),
        ("broken.png", "broken.png cannot be read as an image"),
        ("absent.png", "no file or folder absent.png"),
        ("empty", "no images in empty"),
        ("in", "in/b.png and in/b.webp would both be restored to restored/b: rename one"),
        ("in/a.png -o in", "in is the folder of the input"),
        ("more in/deep/a_mean.png -o in", "a result would replace in/deep/a_mean.png"),
        ("in/a.png -o file", "file"),
        ("in/a.png -o file/out", "file"),
        ("in/a.png --steps -1", "steps"),
        ("in/a.png --samples 0", "samples"),
        ("in/a.png --method euler", "unknown method euler: ddpm, ddim, sde2m, dpm2m"),
        ("in/a.png --device tpu", "unknown device tpu"),
        ("in/a.png --seed x", "--seed"),
        ("", "required"),
    ]:
        assert message in fails(capsys, "restore", run / "model.onnx", "--device=cpu", *arguments.split()), (
            arguments
        )


def test_pictures_that_the_model_cannot_take(frozen, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = str(frozen("blur") / "model.onnx")
    Image.new("L", (1, 9)).save("thin.png")
    Image.new("LA", (8, 8)).save("holes.png")
    Image.new("L", (8, 8)).save("plain.png")
    for arguments, message in [
        ("thin.png", "thin.png has 9x1 pixels: the model takes 2x2 or more"),
        ("holes.png", "no pixels may be missing"),
        ("plain.png --masks plain.png", "no pixels may be"),
    ]:
        assert message in fails(capsys, "restore", model, *arguments.split(), "-o", "out", "--device", "cpu")
    assert export.main(["restore", model, "plain.png", "--device", "cpu"]) == 0


def test_what_may_not_suit_the_model_is_said(frozen, tmp_path, monkeypatch, capsys):
    """A JPEG model was trained on one quality. What is left out is counted."""
    monkeypatch.chdir(tmp_path)
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for name, quality in (("same", 20), ("other", 60)):
        pixels.save(f"{name}.jpg", quality=quality)
    pixels.save("png.png")
    content = (frozen("jpeg") / "model.onnx").read_bytes()
    known = export.jpeg_tables([tmp_path / "same.jpg"]) | dict(quality=20)
    capsys.readouterr()  # what the export wrote
    Path("model.onnx").write_bytes(rewritten(content, "parameters", known))
    command = ["restore", "model.onnx", "--steps", "1", "--samples", "1", "--device", "cpu"]
    assert export.main([*command, "same.jpg"]) == 0 and capsys.readouterr().err == ""
    assert export.main([*command, "same.jpg", "other.jpg", "png.png"]) == 0
    assert (
        capsys.readouterr().err == "2 of 3 images: the model was trained on JPEG files of another quality\n"
    )
    Path("broken.jpg").write_bytes(b"x")
    assert export.main([*command, "same.jpg", "broken.jpg", "--skip-bad-images"]) == 0
    assert capsys.readouterr().err.startswith("left out: broken.jpg")
    assert "broken.jpg" in fails(capsys, *command, "broken.jpg", "--skip-bad-images")
    assert "--masks" in fails(capsys, *command, "same.jpg", "--invert-masks")


def test_what_pillow_could_not_write_again_is_dropped(tmp_path):
    """A resolution of 0 / 0; the profile of colours that are read as grey."""
    image = Image.fromarray(np.full((4, 4, 3), 90, np.uint8))
    image.save(tmp_path / "a.tif", tiffinfo={282: 0, 283: 0, 296: 2}, icc_profile=b"p" * 99)
    for channels, profile in ((3, b"p" * 99), (1, None)):
        picture = export.read_image(tmp_path / "a.tif", channels)
        assert "dpi" not in picture.extra and picture.extra.get("icc_profile") == profile
        export.write_images(tmp_path / "b", picture.y[None, :-1], picture)
    Image.open(tmp_path / "b_sample1.png").load()


def test_images_smaller_than_the_network_halves(frozen):
    restorer = Restorer(frozen("mask") / "model.onnx", "cpu", threads=1)
    assert restorer(observations((1, 3, 2, 3))).shape == (1, 3, 2, 3)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda y: y[:, 1:], r"must be \(N, 4, H, W\), not \(2, 3, 8, 8\)"),
        (lambda y: y[0], r"not \(4, 8, 8\)"),
        (lambda y: np.where(y == y[0, 0, 0, 0], np.nan, y), "must be finite numbers"),
        (lambda y: y * np.array([100, 100, 100, 1]).reshape(1, 4, 1, 1), "black -2 and white 2"),
        (lambda y: y * 0.5, "must be 0 or 1"),
        (lambda y: np.concatenate([y[:, :-1] + 0.1, y[:, -1:]], 1), "the others must be 0 too"),
    ],
)
def test_bad_observations(restorer, change, message):
    with pytest.raises(export.DiffEMError, match=message):
        restorer(change(observations((2, 3, 8, 8))))


def test_bad_runs(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "no checkpoint nowhere/checkpoint.pt" in fails(capsys, "nowhere")
    Path("junk").mkdir()
    Path("junk/checkpoint.pt").write_bytes((run / "model.onnx").read_bytes())
    assert "junk/checkpoint.pt is not a checkpoint" in fails(capsys, "junk")
    Path("file").write_text("")
    fails(capsys, run, "-o", "file/below")
    assert "runs/NAME" in fails(capsys)


# ---- CUDA, where there is none: said, never passed over


@pytest.mark.parametrize("driver, piece", [("raise OSError", "no NVIDIA driver"), ("return", "CUDA")])
def test_cuda_says_which_piece_is_missing(run, pictures, driver, piece):
    # Without a driver, and with one but with no GPU
    hidden = f"""
import ctypes, os
os.environ["CUDA_VISIBLE_DEVICES"] = ""
class CDLL(ctypes.CDLL):
    def __init__(self, name, *rest, **more):
        if name in ("libcuda.so.1", "nvcuda.dll"):
            {driver}
        super().__init__(name, *rest, **more)
ctypes.CDLL = CDLL
"""
    cuda, auto = (python("-c", hidden + RESTORE, run / "model.onnx", "in/a.png", "--device", device, cwd=pictures)
                  for device in ("cuda", "auto"))  # fmt: skip
    assert cuda.returncode == 2 and re.fullmatch(
        rf"export: cannot run on CUDA: .*{piece}.*\n", cuda.stderr
    ), cuda.stderr
    assert auto.returncode == 0 and re.fullmatch(rf"on the CPU: .*{piece}.*\n", auto.stderr), auto.stderr
