"""Scores that need no clean image: right where the truth is known, and what a run makes of them."""

import copy

import pytest
import torch

import diffem
from diffem import Blur, Gaussian, Jpeg, Mask, Noise, Settings, frechet_distance, mask_patches, scores

SMALL = ("--channels 8 8 --blocks 1 --steps 3 --batch 8 --sample-steps 3 --start-laps 2 --start-rank 4 --held-out 40 --num-samples 2 "
         "--limit 40 --name one --device cpu").split()  # fmt: skip


def test_hidden_squares(generator):
    y = torch.ones(4000, 2, 8, 8)
    fraction = torch.tensor([0.0, 0.2, 0.7, 1.0]).repeat(1000)
    for side in (1, 2, 3, 8):
        seen = mask_patches(y, fraction, side, generator)
        assert seen.shape == y.shape and set(seen.unique().tolist()) <= {0.0, 1.0}
        for i, expected in enumerate((1.0, 0.8, 0.3, 0.0)):
            assert float(seen[i::4].mean()) == pytest.approx(expected, abs=0.05 if side > 3 else 0.02)
        if side == 2:
            assert torch.equal(seen[..., ::2, ::2], seen[..., 1::2, 1::2])


def test_frechet_distance_of_gaussians(generator):
    x = torch.randn(200_000, 3, generator=generator)
    scale, shift = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.0, 1.0, -2.0])
    # commuting covariances: |m - m0|^2 + |s - s0|^2
    assert frechet_distance(x * scale + shift, torch.randn(200_000, 3, generator=generator)) == pytest.approx(
        6.25, rel=0.02
    )
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-4)


def changed(gaussian, **buffers):
    gaussian = copy.deepcopy(gaussian)
    for name, value in buffers.items():
        setattr(gaussian, name, value)
    return gaussian


def gaussian_state(corruption, generator):
    """Lap 0 with the Gaussian that the data are drawn from: its posterior draws are exact where nothing more is hidden, or masks
    hide it (of a partly hidden image w is 0 where T is the whole image's)."""
    prior = Gaussian([1, 8, 8], power=2.0)
    corruption.learn(prior.sample(300, generator), generator)
    y = corruption(prior.sample(300, generator), generator)
    settings = Settings(held_out=300, steps=10_000)
    denoiser = diffem.new_denoiser(prior, corruption, settings, "cpu")
    state = diffem.new_state(prior.sample(300, generator), denoiser, settings)
    state.start = prior
    return state, y, settings


def test_coverage_where_few_images_have_a_hidden_value(generator):
    """Of six observed pixels a fifth is hidden: of many images none. They do not count."""
    state, y, settings = gaussian_state(Mask(0.9, 0.1), generator)
    exact = scores(state, y, settings)
    assert exact["coverage_90"] == pytest.approx(0.9, abs=0.04)
    assert exact["coverage_50"] == pytest.approx(0.5, abs=0.07)


@pytest.mark.parametrize("corruption", [Mask(0.5, 0.1), Noise(0.5), Blur(0.8, 0.2)])
def test_scores_of_exact_draws_are_calibrated_and_the_best(corruption, generator):
    state, y, settings = gaussian_state(corruption, generator)
    exact = scores(state, y, settings)
    assert exact["coverage_50"] == pytest.approx(0.5, abs=0.03) and exact["coverage_90"] == pytest.approx(
        0.9, abs=0.02
    )
    assert scores(state, y, settings) == exact  # the same noise for every lap
    start = state.start
    worse = {
        "too narrow": dict(scale=0.25 * start.scale), "too wide": dict(scale=4 * start.scale), "elsewhere": dict(mean=start.mean + 1),
        "structureless": dict(power=0 * start.power, scale=torch.ones(1, 1, 1)),
    }  # fmt: skip
    for name, change in worse.items():
        state.start = changed(start, **change)
        wrong = scores(state, y, settings)
        assert wrong["energy"] > exact["energy"], name
        assert wrong["frechet_pca"] > 1.5 * exact["frechet_pca"], name
    state.start = changed(start, **worse["too narrow"])
    assert scores(state, y, settings)["coverage_90"] < exact["coverage_90"] - 0.03


def test_the_energy_score_is_that_of_its_definition(generator):
    """For draws of N(0, 1) and values N(0, 1), all hidden ones alike:  E|X - v| - E|X - X'| / 2 in d dimensions."""
    state, y, settings = gaussian_state(Noise(4.0), generator)
    state.start = Gaussian([1, 8, 8])
    y = torch.cat([torch.randn(300, 1, 8, 8, generator=generator), torch.ones(300, 1, 8, 8)], 1)
    # Where a pixel is hidden, w is 0 in the whole image: draws are of N(0, 1)
    state.denoiser.corruption.noise = 1e-3
    d = 64 / 5  # about that many are hidden: E|X - v| = E|X - X'| = sqrt(2) E|N(0, I_d)|
    expected = (
        2**0.5
        * (2**0.5 * torch.exp(torch.lgamma(torch.tensor((d + 1) / 2)) - torch.lgamma(torch.tensor(d / 2))))
        / 2
        / d**0.5
    )
    assert scores(state, y, settings)["energy"] == pytest.approx(float(expected), rel=0.04)


def test_scores_of_images_that_are_too_few_are_refused(generator):
    """Two images of one block of JPEG each, of which none is hidden: there is no energy, and no NaN in its place."""
    state, y, settings = gaussian_state(Jpeg(30), generator)
    refused = 0
    for seed in range(8):
        try:
            energy = scores(state, y[:2], Settings(seed=seed))["energy"]
        except diffem.DiffEMError as error:
            refused += "raise --held-out" in str(error)
        else:
            assert energy > 0
    assert 0 < refused < 8


def test_jpeg_hides_whole_blocks(generator):
    corruption = Jpeg(30)
    y = corruption(torch.randn(60, 1, 16, 16, generator=generator).clamp(-2, 2), generator)
    rest = mask_patches(y, torch.full((60,), 0.5), corruption.patch, generator)
    blocks = (
        rest[:, -1].unflatten(1, (2, 8)).unflatten(3, (2, 8)).mean((2, 4))
    )  # the fraction seen of each block
    assert set(blocks.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("energies, best, warns", [
    ([1, 0.9, 0.8, 0.7, 0.6], 5, False), ([1, 0.6, 0.5, 0.52, 0.52], 3, False), ([1, 0.5, 0.6, 0.7, 0.8], 2, True),
])  # fmt: skip
def test_the_best_lap_is_kept_too_and_named_where_it_is_better(
    energies, best, warns, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    weights = {}

    def fake(state, y, settings):
        weights[state.lap] = [p.clone() for p in state.model.parameters()]
        energy = float(energies[state.lap - 1]) if state.lap else 0.1  # the start is not to choose from
        return dict(coverage_50=0.5, coverage_90=0.9, energy=energy, frechet_pca=1.0)

    monkeypatch.setattr(diffem, "scores", fake)
    assert diffem.main([*SMALL, "--laps", "3"]) == 0  # interrupted, in effect, and continued
    assert diffem.main(["--resume", "runs/one", "--laps", "5"]) == 0
    out = capsys.readouterr().out
    assert (f"lap {best} has a better energy score" in out and "export.py runs/one --best" in out) == warns
    for chosen, lap in ((dict(best=True), best), ({}, 5)):
        for ours, theirs in zip(diffem.load(tmp_path / "runs/one", **chosen).parameters(), weights[lap]):
            assert torch.equal(ours, theirs)
