"""EM as a whole: what it may see, what it repeats, what survives an interruption; and the metrics."""

import math
import pickle
from pathlib import Path

import pytest
import torch

import diffem
from diffem import (
    Checkpoint,
    Config,
    Denoiser,
    DiffEMError,
    Gaussian,
    Mask,
    Settings,
    accuracy,
    em,
    fit,
    load,
    new_denoiser,
    new_state,
    psnr,
    restore_state,
    save_checkpoint,
)  # fmt: skip

TINY = dict(
    channels=(8, 8), blocks=1, dropout=0.1, laps=2, steps=6, batch=8, sample_steps=4, sample_batch=16, start_laps=2, start_rank=4,
)  # fmt: skip


def images(number=40):
    x0 = torch.nn.functional.interpolate(
        torch.rand(number, 1, 3, 3, generator=torch.Generator().manual_seed(5)) * 4 - 2,
        size=(8, 8),
        mode="bilinear",
    )
    return x0, Mask(0.5)(x0, torch.Generator().manual_seed(6))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_fit_never_sees_the_clean_images():
    x0, y = images()
    expected = weights(fit(y, Mask(0.5), Config(**TINY)))
    x0, y = images()
    x0.fill_(math.nan)
    assert torch.equal(weights(fit(y, Mask(0.5), Config(**TINY))), expected)


def test_same_seed_same_result_and_torchs_generator_is_left_alone():
    _, y = images()
    torch.manual_seed(1)
    first = weights(fit(y, Mask(0.5), Config(**TINY)))
    after = torch.rand(1)
    torch.manual_seed(2)
    assert torch.equal(weights(fit(y, Mask(0.5), Config(**TINY))), first)
    assert not torch.equal(weights(fit(y, Mask(0.5), Config(**TINY, seed=1))), first)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)


def test_the_first_e_steps_take_fewer_evaluations(monkeypatch):
    _, y = images()
    config, taken = Config(**TINY | dict(laps=8, steps=1, sample_steps=16, first_sample_steps=4)), []
    genuine = Denoiser.sample
    monkeypatch.setattr(
        Denoiser, "sample", lambda m, y, steps, *rest: taken.append(steps) or genuine(m, y, steps, *rest)
    )
    for _ in em(y, Mask(0.5), config):
        pass
    assert taken[::3] == [4, 6, 8, 11, 16, 16, 16, 16]  # 4 * 4^(lap / 4), in three batches each
    samplers = [
        Config(laps=4, sample_steps=4, first_sample_steps=first).e_step_sampler(lap)[0]
        for first in (0, 9)
        for lap in (1, 2, 3)
    ]
    assert samplers == [4, 4, 4, 9, 9, 4]
    methods = [
        Config(laps=laps, first_method="ddim").e_step_sampler(lap)[1]
        for laps in (1, 2, 5)
        for lap in range(1, laps + 1)
    ]
    assert methods == ["sde2m", "ddim", "sde2m", "ddim", "ddim", "sde2m", "sde2m", "sde2m"]
    third, never = (Config(laps=6, first_sample_steps=2, first_part=part) for part in (1 / 3, 0))
    assert [third.e_step_sampler(lap) for lap in (1, 2, 3)] == [(2, "ddpm"), (4, "ddpm"), (8, "sde2m")]
    assert never.e_step_sampler(1) == (8, "sde2m")
    with pytest.raises(DiffEMError, match="first-sample-steps"):
        Config(first_sample_steps=-1)


def test_a_batch_that_does_not_fit_into_memory_is_halved(monkeypatch):
    _, y = images()
    genuine, sizes = Denoiser.sample, []

    def small_memory(model, y, *rest):
        if len(y) > 10:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 TB")
        sizes.append(len(y))
        return genuine(model, y, *rest)

    monkeypatch.setattr(Denoiser, "sample", small_memory)
    states = [(state.lap, state.drawn) for state in em(y, Mask(0.5), Config(**TINY))]
    assert states[-1] == (2, 40) and sizes == 10 * [8]  # 16, halved once

    def no_memory(model, y, *rest):
        raise RuntimeError(f"CUDA out of memory for {len(y)}")

    monkeypatch.setattr(Denoiser, "sample", no_memory)
    with pytest.raises(RuntimeError, match="memory for 1$"):
        fit(y, Mask(0.5), Config(**TINY))
    monkeypatch.setattr(Denoiser, "sample", lambda *rest: genuine(*rest).view(7))
    with pytest.raises(RuntimeError, match="invalid"):  # other errors are not for us to mend
        fit(y, Mask(0.5), Config(**TINY))


def test_reconstructions_are_redrawn_each_lap_and_agree_with_the_observations():
    _, y = images()
    laps = {}
    for state in em(y, Mask(0.5), Config(**TINY)):
        if state.drawn == len(y):
            laps[state.lap] = state.x0.clone()
    assert sorted(laps) == [0, 1, 2]
    assert not torch.equal(laps[1], laps[2])
    for x in laps.values():
        assert ((x - y[:, :-1]) * y[:, -1:]).abs().max() < 6 * 1e-3


def test_a_lap_starts_from_the_averaged_weights():
    _, y = images()
    averages = []
    for state in em(y, Mask(0.5), Config(**TINY, lr=1e-12)):
        averages.append(weights(state.model))
    torch.testing.assert_close(
        averages[0], averages[-1], atol=1e-8, rtol=0
    )  # nothing is reset but the optimiser


def test_the_average_of_the_weights_is_exponential_from_the_first_step_on():
    _, y = images()
    config, expected = Config(**TINY, ema=0.9), None
    for state in em(y, Mask(0.5), config):
        if 0 < state.step and state.drawn == 0:
            now = weights(state.denoiser)
            expected = now if expected is None else 0.9 * expected + 0.1 * now
            torch.testing.assert_close(weights(state.average), expected, atol=1e-6, rtol=1e-5)


def test_the_network_is_compiled_whole_and_in_few_variants():
    """Training, sampling, and sampling of other numbers of images: a graph each, without a break."""
    _, y = images(44)
    config, graphs = Config(**TINY | dict(channels=(8, 16), attention=(1,), sample_batch=10)), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for state in em(y, Mask(0.5), config):
        if state.lap == 0:
            for denoiser in (state.denoiser, state.average):
                denoiser.network.compile(backend=backend, fullgraph=True)
    assert 2 <= len(graphs) <= 3, len(graphs)


@pytest.mark.parametrize(
    "stop_at", [1, 4, 8, 9, 13]
)  # lap 0, within an M-step, within an E-step, between two laps
def test_resumed_equals_uninterrupted(stop_at, tmp_path):
    _, y = images()
    settings = Settings(**TINY)
    expected = weights(fit(y, Mask(0.5), settings))
    for count, state in enumerate(em(y, Mask(0.5), settings), 1):
        if count == stop_at:
            save_checkpoint(tmp_path, state, settings)
            break
    checkpoint = Checkpoint(tmp_path)
    before = state.lap, state.step, state.drawn
    state = restore_state(checkpoint, Mask(0.5))
    assert (state.lap, state.step, state.drawn) == before
    for state in em(y, Mask(0.5), settings, state):
        pass
    assert torch.equal(weights(state.model), expected)


def test_save_and_load_give_equal_outputs(tmp_path):
    _, y = images()
    settings = Settings(**TINY, parameters={"rate": 0.5, "noise": 1e-3})
    for state in em(y, Mask(0.5), settings):
        pass
    save_checkpoint(tmp_path, state, settings)
    first, second = (
        m.sample(y, 4, "ddpm", torch.Generator().manual_seed(0)) for m in (state.model, load(tmp_path))
    )
    assert torch.equal(first, second)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


class Payload:
    def __reduce__(self):
        return Path("executed").touch, ()


def test_loading_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(DiffEMError, match="not a checkpoint"):
        load(tmp_path)
    torch.save({"settings": Payload()}, tmp_path / "checkpoint.pt")
    with pytest.raises(DiffEMError, match="not a checkpoint"):
        load(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_corruption_of_ones_own_is_given_to_load(tmp_path):
    _, y = images()
    settings = Settings(**TINY, corruption="own")
    for state in em(y, Mask(0.5), settings):
        break
    save_checkpoint(tmp_path, state, settings)
    with pytest.raises(DiffEMError, match="own"):
        load(tmp_path)
    assert load(tmp_path, corruption=Mask(0.5)) is not None


def test_nan_stops_with_lap_and_step():
    _, y = images()
    with pytest.raises(DiffEMError, match=r"lap 1, step \d"):
        fit(y, Mask(0.5), Config(**TINY, lr=1e6))


def test_unconditional_and_conditional_train_one_network(generator):
    """With p_unconditional = 0 no observation is replaced by 0; with 0.9 nine of ten are."""
    seen = []

    class Spy(Mask):
        def information(self, y):
            seen.append((y != 0).flatten(1).any(1).float().mean())
            return super().information(y)

    for p, expected in ((0.0, 1.0), (0.9, 0.1)):
        x0, _ = images()
        config, corruption = Config(**TINY | dict(batch=2000, steps=1), p_unconditional=p), Spy(0.5)
        state = new_state(x0, new_denoiser(Gaussian([1, 8, 8]), corruption, config, "cpu"), config)
        seen.clear()
        diffem.m_step(state, config, generator)
        assert float(seen[0]) == pytest.approx(expected, abs=0.03)


def test_augmentation_keeps_images_in_kind(generator):
    x0 = torch.randn(64, 3, 8, 8, generator=generator).clamp(-2, 2)
    mirrored = diffem.augment(x0, Config(flip=True), generator)
    flipped = (mirrored == x0.flip(3)).flatten(1).all(1)
    assert ((mirrored == x0).flatten(1).all(1) ^ flipped).all() and 10 < flipped.sum() < 54
    turned = diffem.augment(x0, Config(jitter=True), generator)
    torch.testing.assert_close(turned.mean(1), x0.mean(1), atol=1e-6, rtol=0)
    chroma, before = (v - v.mean(1, keepdim=True) for v in (turned, x0))
    ratio = chroma.flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
    assert (ratio > 0.949).all() and (ratio < 1.051).all() and ratio.std() > 0.01
    angle = torch.nn.functional.cosine_similarity(chroma, before, dim=1).clamp(-1, 1).arccos() / (2 * math.pi)
    assert 0.005 < angle.max() < 0.0101
    assert torch.equal(diffem.augment(x0, Config(), generator), x0)


def test_crops_lie_anywhere_and_smaller_copies_keep_the_mean(generator):
    x0 = torch.arange(64.0).view(1, 1, 8, 8).expand(500, 2, 8, 8)  # each pixel tells where it was
    crops = diffem.augment(x0, Config(crop=5), generator)
    assert crops.shape == (500, 2, 5, 5)
    corner = crops[:, 0, 0, 0]
    assert len(corner.unique()) == 16 and torch.equal(
        crops[:, 0] - corner.view(-1, 1, 1), (x0[:, 0, :5, :5] - x0[:, 0, :1, :1])
    )
    smooth = Gaussian([3, 16, 16], power=4.0).sample(50, generator)
    sizes = set()
    for _ in range(30):
        copy = diffem.augment(smooth, Config(rescale=True), generator)
        sizes.add(tuple(copy.shape[2:]))
        torch.testing.assert_close(copy.mean((2, 3)), smooth.mean((2, 3)), atol=0.1, rtol=0)
    assert sizes == {(8, 8), (12, 12), (16, 16)}


# ---- Metrics


def test_psnr(generator):
    x0 = torch.rand(3, 1, 16, 16, generator=generator) * 4 - 2
    assert psnr(x0 + 0.4, x0) == pytest.approx(20.0, abs=1e-4)  # a tenth of the range


def test_residual_and_spread_of_the_true_posterior(generator):
    """Lap 0 with the data's own Gaussian: y - A x of exact posterior samples, and calibrated spread."""
    corruption, prior = Mask(0.5, 0.1), Gaussian([1, 8, 8], power=2.0)
    x0 = prior.sample(2000, generator)
    y = corruption(x0, generator)
    x = torch.stack([prior.draw(y, corruption, generator) for _ in range(8)])
    metrics = accuracy(x, y, x0, corruption)
    # y - A x = s eps - A (x - x0): posterior and truth are alike, so its variance is that of y' - y with y' drawn from x
    error = (x.mean(0) - x0).square().mean()
    assert metrics["spread"] == pytest.approx(float((error / (1 + 1 / 8)).sqrt()), rel=0.03)
    assert 0.8 < metrics["residual"] < 1.05
    assert (
        metrics["psnr_mean"] == pytest.approx(psnr(x.mean(0), x0)) and metrics["psnr"] < metrics["psnr_mean"]
    )
    assert accuracy(x, y, None, corruption).keys() == {"residual", "spread"}


@pytest.mark.parametrize(
    "changes", [dict(rescale=True), dict(crop=5), dict(crop=100), dict(rescale=True, crop=7)]
)
@pytest.mark.parametrize("corruption", [Mask(0.5), diffem.Jpeg(30), diffem.Blur(), diffem.Downsample(3)])
def test_crops_and_copies_with_observed_masks_and_with_blocks(changes, corruption, generator):
    x0 = torch.rand(16, 3, 24, 24, generator=generator) * 4 - 2
    if isinstance(corruption, diffem.Downsample) and "crop" in changes:
        return  # crops of any size have no whole blocks, and say so
    masks = torch.rand(5, 1, 24, 24, generator=generator) > 0.5
    corruption.masks = None if isinstance(corruption, diffem.Downsample) else masks
    corruption.learn(x0, generator)
    config = Config(**TINY | dict(batch=4, steps=9), **changes)
    state = new_state(x0, new_denoiser(Gaussian([3, 24, 24]), corruption, config, "cpu"), config)
    state.lap = 1
    for step in range(9):
        diffem.m_step(state, config, diffem.generator_for("cpu", step))
    corruption.masks = None
    assert state.losses.isfinite().all() and (state.losses > 0).all()


def test_the_range_of_values_is_not_that_of_the_last_image_alone(generator, monkeypatch):
    """Observations are checked in parts. 4,097 of them would leave a part of one."""
    y = torch.cat([4 * torch.rand(4097, 1, 2, 2, generator=generator) - 2, torch.ones(4097, 1, 2, 2)], 1)
    y[-1, 0] = torch.tensor([[0.3, 0.4], [0.6, 0.8]])
    monkeypatch.setattr(diffem, "first_state", lambda *rest: "a state")
    assert next(diffem.em(y, diffem.Noise(0.1), diffem.Config())) == "a state"
