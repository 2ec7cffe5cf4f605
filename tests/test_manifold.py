"""The vector experiment: an own corruption, network and start, given to the same `em`."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from manifold import Projection, VectorDenoiser, VectorGaussian, manifold

from diffem import Config

ROOT = Path(__file__).parents[1]


def test_projection_rows_are_unit_and_fresh(generator):
    x = torch.randn(5000, 5, generator=generator)
    y = Projection(rows=3, noise=0.1)(x, generator)
    A = y[..., :-1]
    assert y.shape == (5000, 3, 6)
    torch.testing.assert_close(A.norm(dim=-1), torch.ones(5000, 3))
    error = y[..., -1] - torch.einsum("bmd,bd->bm", A, x)
    assert float(error.std()) == pytest.approx(0.1, rel=0.05)
    assert A.flatten(1).mean(0).abs().max() < 0.05


@pytest.mark.parametrize("sigma", [0.01, 0.3, 5.0])
def test_preconditioning_is_the_gaussian_posterior(sigma, generator):
    corruption = Projection(2, 0.05)
    x0 = torch.randn(1, 4, generator=generator, dtype=torch.float64)
    y = corruption(x0.float(), generator).double()
    xt = x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    mean, root = VectorDenoiser(4, corruption, Config(channels=(8,))).posterior(
        xt, torch.full((1, 1), sigma).double(), y
    )
    A = y[0, :, :-1]
    C = torch.linalg.inv(torch.eye(4, dtype=torch.float64) * (1 + 1 / sigma**2) + A.T @ A / 0.05**2)
    torch.testing.assert_close(
        mean[0], C @ (A.T @ y[0, :, -1] / 0.05**2 + xt[0] / sigma**2), atol=1e-6, rtol=1e-5
    )
    torch.testing.assert_close(root[0] @ root[0].T, C, atol=1e-9, rtol=1e-6)


def test_the_starts_draws_match_the_closed_form(generator):
    gaussian, corruption = (
        VectorGaussian(torch.randn(6, generator=generator), torch.randn(6, 4, generator=generator), 0.2),
        Projection(2, 0.1),
    )
    y = corruption(gaussian.sample(1, generator), generator)
    x = gaussian.draw(y.expand(20_000, -1, -1), corruption, generator).double()
    A, Sigma = y[0, :, :-1].double(), (gaussian.U @ gaussian.U.T + 0.2 * torch.eye(6)).double()
    K = Sigma @ A.T @ torch.linalg.inv(A @ Sigma @ A.T + 0.01 * torch.eye(2))
    mean, C = (
        gaussian.mean.double() + K @ (y[0, :, -1].double() - A @ gaussian.mean.double()),
        Sigma - K @ A @ Sigma,
    )
    assert ((x.mean(0) - mean).abs() < 5 * (C.diag() / len(x)).sqrt() + 2e-3).all()
    assert ((torch.cov(x.T) - C).abs() < 0.05 * (C.diag()[:, None] * C.diag()).sqrt() + 2e-3).all()


def test_manifold_is_a_smooth_closed_curve_in_its_box():
    x = manifold(torch.linspace(0, 1, 5001), seed=3)
    assert x.shape == (5001, 5) and float(x.amin()) >= -2.001 and float(x.amax()) <= 2.001
    torch.testing.assert_close(x.amin(0), torch.full((5,), -2.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(x[0], x[-1], atol=1e-5, rtol=0)
    assert (x[1:] - x[:-1]).norm(dim=1).max() < 0.02
    assert not torch.equal(x, manifold(torch.linspace(0, 1, 5001), seed=4))


def test_the_experiment_comes_nearer_to_the_curve(monkeypatch, capsys):
    """A few laps of a small network, scored by the mean distance to the nearest of the true points in place of POT's transport."""
    monkeypatch.setitem(sys.modules, "ot", types.SimpleNamespace(
        dist=lambda x, x0: torch.cdist(torch.tensor(x), torch.tensor(x0)).numpy() ** 2,
        emd2=lambda a, b, cost, numItermax: cost.min(1).mean(),
    ))  # fmt: skip
    import manifold as experiment

    monkeypatch.setattr(
        experiment, "CONFIG", experiment.CONFIG | dict(channels=(64, 64), steps=300, batch=512)
    )
    monkeypatch.setattr(
        experiment,
        "observed_curve",
        lambda data, corruption, seed, genuine=experiment.observed_curve: genuine(
            data, corruption, seed, 2048
        ),
    )
    monkeypatch.setattr(sys, "argv", ["manifold.py", "--laps", "6", "--seconds", "300"])
    experiment.main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (
        rows[0]["lap"] == 0
        and rows[-1]["transport"] < 0.7 * rows[0]["transport"]
        and rows[-1]["residual"] < 2
    )


def test_the_command_names_its_flags():
    done = subprocess.run(
        [sys.executable, ROOT / "tests/manifold.py", "--help"], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0 and "--data" in done.stdout and "CPU-seconds" in done.stdout


def test_the_command_runs_em_mmps(tmp_path):
    """As a program its classes are those of __main__, which baselines.py does not know."""
    (tmp_path / "ot.py").write_text("dist = lambda x, x0: x\nemd2 = lambda a, b, cost, numItermax: 1.0\n")
    flags = "--guided --laps 1 --seconds 1 --evaluations 1 --method sde2m".split()
    command = [sys.executable, ROOT / "tests/manifold.py", *flags]
    environment = os.environ | dict(PYTHONPATH=str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["evaluations"] == 1, done.stderr
