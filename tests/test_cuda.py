"""On a GPU, against the CPU. Without one, all of it is skipped.

    python -m pytest tests/test_cuda.py

The network is the published one, with few steps: with fewer channels a card's matrix units would not be used.
"""

import numpy as np
import pytest
import torch

import diffem
import export

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TINY = dict(channels=(16, 32), blocks=1, laps=1, steps=20, batch=16, sample_steps=4, sample_batch=32)
TINY |= dict(precision="float32")


@pytest.fixture(autouse=True)
def exact_products():
    """A card multiplies float32 with 10 bits by default in convolutions."""
    before, precision = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    yield
    torch.backends.cudnn.allow_tf32 = before
    torch.set_float32_matmul_precision(precision)


def images(number: int, name: str = "mask"):
    """Observations on the CPU, and their corruption."""
    generator = torch.Generator().manual_seed(0)
    corruption = diffem.CORRUPTIONS[name]()
    x0 = diffem.Gaussian([3, 32, 32], power=3.0).sample(number, generator).clamp(-2, 2)
    return corruption(x0, generator), corruption


def published(**settings) -> diffem.Settings:
    given = dict(dataset="cifar10", preset="published") | settings
    return diffem.Settings(**diffem.preset("cifar10", "published", diffem.Mask, given))


@pytest.fixture(scope="module")
def lap(tmp_path_factory):
    """A lap of the published network, with its E-step: the state, its observations and the peak of memory."""
    y, corruption = images(1200)
    settings = published(laps=1, steps=20, batch=64, sample_steps=4, compile="off", start_laps=2)
    torch.cuda.reset_peak_memory_stats()
    for state in diffem.em(y.cuda(), corruption, settings):
        assert state.losses.isfinite().all()
    folder = tmp_path_factory.mktemp("run")
    state.history.append(dict(lap=1, energy=1.0))
    diffem.save_checkpoint(folder, state, settings)
    return state, y, folder, torch.cuda.max_memory_allocated()


def test_a_lap_of_the_published_network(lap):
    state, y, _, peak = lap
    assert state.drawn == len(y) and state.x0.isfinite().all() and state.x0.is_cuda
    assert peak < 16e9, f"{peak / 1e9:.1f} GB"
    error = ((state.x0.cpu() - y[:, :-1]) * y[:, -1:]).abs()
    assert error.max() < 0.02  # observed pixels stay; x0 is in float16


def test_the_cpu_and_the_card_agree(lap):
    """float32 on both: an estimate differs by 1e-3 at most, of values from -2 to 2."""
    _, y, folder, _ = lap
    y = y[:4]
    ours, theirs = (diffem.load(folder, device=device) for device in ("cpu", "cuda"))
    for denoiser in (ours, theirs):
        denoiser.bfloat16 = False
    for sigma in (0.01, 1.0, 50.0):
        xt, level = y[:, :-1] + sigma * torch.randn(4, 3, 32, 32), torch.full((4,), sigma)
        with torch.no_grad():
            a, b = ours(xt, level, y), theirs(xt.cuda(), level.cuda(), y.cuda()).cpu()
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0)


def test_a_checkpoint_of_the_card_is_resumed_on_it(lap):
    state, y, folder, _ = lap
    checkpoint, corruption = diffem.Checkpoint(folder), diffem.Mask()
    checkpoint.settings = published(laps=2, steps=20, batch=64, sample_steps=4, compile="off")
    again = diffem.restore_state(checkpoint, corruption, "cuda", "cuda")
    assert torch.equal(again.x0, state.x0)
    *_, last = diffem.em(y.cuda(), corruption, checkpoint.settings, again)
    assert last.lap == 2 and last.x0.isfinite().all()


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
def test_the_exported_files_on_the_card(lap):
    _, y, folder, _ = lap
    export.export(str(folder))
    y, generator = y[:4], torch.Generator("cuda").manual_seed(0)
    scripted = torch.jit.load(folder / "model.ts.pt").cuda()
    *_, x = (scripted.sample(y.cuda(), 4, "ddpm", generator) for _ in range(3))  # the second fuses kernels
    assert x.shape == (4, 3, 32, 32) and x.isfinite().all()
    try:
        card = export.Restorer(folder / "model.onnx", "cuda")
    except export.DiffEMError as error:
        pytest.skip(str(error))
    a, b = card(y.numpy(), 4), export.Restorer(folder / "model.onnx", "cpu")(y.numpy(), 4)
    assert np.abs(a - b).max() < 5e-3


@pytest.mark.parametrize("name", diffem.CORRUPTIONS)
def test_neither_step_waits_for_the_card(name):
    """20 M-steps and an E-step, with every corruption. The 20th step reads the losses, and may wait."""
    y, corruption = images(64, name)
    config = diffem.Config(**TINY, flip=True, jitter=True, rescale=name != "downsample", smoothness=3.0)
    states = diffem.em(y.cuda(), corruption, config)
    state = next(states)
    try:
        for _ in range(19):
            torch.cuda.set_sync_debug_mode("error")
            next(states)
        torch.cuda.set_sync_debug_mode("default")
        next(states)
        torch.cuda.set_sync_debug_mode("error")
        next(states)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.drawn == 32


def test_observed_masks_on_the_cpu_serve_the_card():
    y, corruption = images(64)
    corruption.masks = y[:, -1:].bool()
    model = diffem.fit(y, corruption, diffem.Config(**TINY, smoothness=3.0), device="cuda")
    assert next(model.parameters()).is_cuda


def test_auto_goes_on_where_nothing_compiles(monkeypatch, capsys):
    def broken(*rest, **more):
        raise RuntimeError("no Triton")

    monkeypatch.setattr(torch, "compile", broken)
    y, corruption = images(32)
    config = diffem.Config(**TINY | dict(laps=1000), smoothness=3.0, compile="auto")
    next(diffem.em(y.cuda(), corruption, config))
    error = capsys.readouterr().err
    assert "no Triton" in error and error.count("\n") == 1


def test_compiled_equals_eager():
    y, corruption = images(64)
    y, config = y.cuda(), diffem.Config(**TINY | dict(steps=2), smoothness=3.0, compile="on")
    *_, state = diffem.em(y, corruption, config)
    torch.nn.init.ones_(state.model.network.gain.bias)  # or the network gives nearly 0

    def draw():
        return state.model.sample(y, 4, "ddpm", torch.Generator("cuda").manual_seed(0))

    compiled, state.model.network._compiled_call_impl = draw(), None
    torch.testing.assert_close(compiled, draw(), atol=2e-3, rtol=0)
