"""Scores that need no clean image: right where the truth is known, and what a run makes of them."""

import copy

import pytest
import torch

import diffem
from diffem import Blur, Gaussian, Jpeg, Mask, Noise, Settings, frechet_distance, gain, hide, judge

SMALL = ("--channels 8 8 --blocks 1 --steps 3 --batch 8 --sample-steps 3 --prior-laps 2 --prior-rank 4 --held-out 40 --samples 2 "
         "--limit 40 --name one").split()  # fmt: skip


def test_hidden_squares(generator):
    y = torch.ones(4000, 2, 8, 8)
    share = torch.tensor([0.0, 0.2, 0.7, 1.0]).repeat(1000)
    for cell in (1, 2, 3, 8):
        seen = hide(y, share, cell, generator)
        assert seen.shape == y.shape and set(seen.unique().tolist()) <= {0.0, 1.0}
        for i, expected in enumerate((1.0, 0.8, 0.3, 0.0)):
            assert float(seen[i::4].mean()) == pytest.approx(expected, abs=0.05 if cell > 3 else 0.02)
        if cell == 2:
            assert torch.equal(seen[..., ::2, ::2], seen[..., 1::2, 1::2])


def test_frechet_distance_of_gaussians(generator):
    x = torch.randn(200_000, 3, generator=generator)
    scale, shift = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.0, 1.0, -2.0])
    # commuting covariances: |m - m0|^2 + |s - s0|^2
    assert float(frechet_distance(x * scale + shift, torch.randn(200_000, 3, generator=generator))) == pytest.approx(6.25, rel=0.02)
    assert float(frechet_distance(x, x)) == pytest.approx(0, abs=1e-4)
    both = frechet_distance(torch.stack([x[:500], x[:500] + shift]), x[None, :500])
    torch.testing.assert_close(both, torch.tensor([0.0, 5.0]).double(), atol=1e-4, rtol=1e-4)


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
    state.prior = prior
    return state, y, settings


@pytest.mark.parametrize("corruption", [Mask(0.5, 0.1), Noise(0.5), Blur(0.8, 0.2)])
def test_scores_of_exact_draws_are_calibrated_and_the_best(corruption, generator):
    state, y, settings = gaussian_state(corruption, generator)
    scores, parts = judge(state, y, corruption, settings)
    assert scores["covers_50"] == pytest.approx(0.5, abs=0.03) and scores["covers_90"] == pytest.approx(0.9, abs=0.02)
    assert 290 < len(parts["energy"]) <= 300 and scores["energy"] == pytest.approx(float(parts["energy"].mean()))
    assert judge(state, y, corruption, settings)[0] == scores  # the same noise for every lap
    prior = state.prior
    worse = {
        "too narrow": dict(scale=0.25 * prior.scale), "too wide": dict(scale=4 * prior.scale), "elsewhere": dict(mean=prior.mean + 1),
        "structureless": dict(power=0 * prior.power, scale=torch.ones(1, 1, 1)),
    }  # fmt: skip
    for name, change in worse.items():
        state.prior = changed(prior, **change)
        wrong, wrong_parts = judge(state, y, corruption, settings)
        assert wrong["energy"] > scores["energy"], name
        assert wrong["frechet"] > 1.5 * scores["frechet"], name
        change, error = gain(wrong_parts, parts, generator)
        assert change < -3 * error < 0, name
        assert gain(parts, wrong_parts, generator)[0] == pytest.approx(-change, rel=1e-5)
    state.prior = changed(prior, **worse["too narrow"])
    assert judge(state, y, corruption, settings)[0]["covers_90"] < scores["covers_90"] - 0.03


def test_jpeg_hides_whole_blocks(generator):
    corruption = Jpeg(30)
    state, _, settings = gaussian_state(Noise(0.3), generator)
    y = corruption(torch.randn(60, 1, 8, 8, generator=generator).clamp(-2, 2), generator)
    _, parts = judge(state, y, corruption, settings)
    assert len(parts["energy"]) < 30  # those images of which all is hidden


def test_the_error_is_that_of_the_mean(generator):
    """Where one set of energies is another plus independent noise, the gain's error is that of the noise's mean."""
    sets = torch.randn(2, 400, 2, generator=generator)
    before = dict(energy=torch.ones(900), sets=sets)
    after = dict(energy=1 + 0.3 * torch.randn(900, generator=generator), sets=sets)
    change, error = gain(after, before, generator)
    assert change == pytest.approx(-float(after["energy"].mean().log()), abs=1e-6)
    assert error == pytest.approx(0.3 / 30, rel=0.3)


@pytest.mark.parametrize("energies, patience, laps, kept", [
    ([1, 0.5, 0.6, 0.7, 0.8], 2, 4, 2), ([1, 0.5, 0.6, 0.7, 0.8], 0, 5, 2), ([1, 0.9, 0.8, 0.7, 0.6], 1, 5, 5),
    ([1, 0.5, 0.505, 0.6, 0.7], 0, 5, 3),  # as good as the best, within the error
])  # fmt: skip
def test_the_best_lap_is_kept_and_patience_ends(energies, patience, laps, kept, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    generator, weights = torch.Generator().manual_seed(0), {}
    sets = torch.randn(2, 40, 2, generator=generator)

    def fake(state, y, corruption, settings):
        weights[state.lap] = [p.clone() for p in state.model.parameters()]
        energy = float(energies[state.lap - 1]) if state.lap else 2.0
        spread = 1 + 0.1 * torch.randn(40, generator=generator)  # the bootstrap's error is about 0.02
        spread /= spread.mean()
        return dict(covers_50=0.5, covers_90=0.9, energy=energy, frechet=1.0), dict(energy=energy * spread, sets=sets)

    monkeypatch.setattr(diffem, "judge", fake)
    assert diffem.main([*SMALL, "--laps", "5", "--patience", str(patience)]) == 0
    out = capsys.readouterr().out
    assert f"kept: lap {kept} of {laps}, " in out and f"lap_{kept:02d}.png" in out
    for ours, theirs in zip(diffem.load(tmp_path / "runs/one").parameters(), weights[kept]):
        assert torch.equal(ours, theirs)
    last = diffem.load_checkpoint(tmp_path / "runs/one")
    assert last["lap"] == laps and last["best"]["lap"] == kept
    if laps < 5:  # it waits on where it is told to
        assert diffem.main(["--resume", "runs/one", "--patience", "0"]) == 0
        assert f"kept: lap {kept} of 5" in capsys.readouterr().out
