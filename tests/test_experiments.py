"""The experiments run, on tiny arguments, and print a table with the rows expected and finite numbers."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
SMALL = dict(laps=2, steps=2, channels=(8, 8), blocks=1, batch=8, sample_steps=2, unconditional_steps=2)
SMALL |= dict(start_rank=4, start_laps=1, num_samples=2)
DIGITS = SMALL | dict(limit=60, held_out=20)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Small photographs in two folders."""
    root, generator = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for i in range(120):
        (root / f"class{i % 2}").mkdir(exist_ok=True)
        pixels = np.kron(generator.integers(0, 255, (2, 2, 3)), np.ones((4, 4, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"class{i % 2}" / f"{i}.png")
    return ["--data-dir", root, "--images", 100, "--held-out", 20]


@pytest.fixture
def experiment(tmp_path):
    """Runs an experiment. Returns its tables, which are lists of rows."""

    def run(name: str, settings: dict, *flags) -> list[list[dict]]:
        script = ROOT / "tests/experiments" / f"{name}.py"
        command = [sys.executable, script, "--settings", json.dumps(settings), *flags]
        how = dict(env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
        done = subprocess.run([str(word) for word in command], cwd=tmp_path, **how)
        assert done.returncode == 0, done.stderr
        saved = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
        tables = [printed(text) for text in done.stdout.split("\n**")[1:]]
        assert [len(rows) for rows in tables] == [len(entry["rows"]) for entry in saved]
        assert all(entry["machine"]["threads"] == 1 and entry["settings"] for entry in saved)
        return tables

    return run


def printed(text: str) -> list[dict]:
    """The rows of a table in Markdown. All numbers are finite."""
    names, _, *rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rows = [{name: number(cell) for name, cell in zip(names, row, strict=True)} for row in rows]
    assert all(math.isfinite(v) for row in rows for v in row.values() if not isinstance(v, str))
    return rows


def number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


@pytest.mark.parametrize("flags", [[], ["--clean"]])
def test_restore(flags, classes, experiment):
    (rows,) = experiment("restore", SMALL, *classes, "--corruptions", "mask 0.5", *flags)
    assert [row["lap"] for row in rows] == ["observed", 0, 1, 2, "2, ddpm 16"]
    assert {row["corruption"] for row in rows} == {"mask 0.5 (clean)" if flags else "mask 0.5"}
    assert all(row["psnr_mean"] > 5 and row["ssim"] <= 1 for row in rows[1:])
    assert all(row["frechet_new"] > 0 and 0 <= row["coverage_90"] <= 1 for row in rows[1:4])


def test_peers(classes, experiment):
    settings = {key: value for key, value in SMALL.items() if key in ("steps", "channels", "blocks", "batch")}
    flags = ["--corruptions", "mask 0.5", "jpeg 10", "--seconds", 1, "--evaluations", 4, 8]
    (rows,) = experiment("peers", settings, *classes, *flags)
    names = [(row["corruption"], row["method"]) for row in rows]
    masked = [("mask 0.5", method) for method in ("DiffEM", "EM-MMPS", "Ambient")]
    assert names == [*masked, ("jpeg 10", "DiffEM")]
    assert all(row["psnr_mean"] > 0 and row["frechet_new"] > 0 for row in rows)


def test_classical(classes, experiment):
    pytest.importorskip("skimage")  # which nothing else here needs
    names = ["mask 0.5", "blur 1.0", "noise 0.5", "downsample 2", "jpeg 10"]
    (rows,) = experiment("classical", SMALL, *classes, "--corruptions", *names)
    assert [sum(row["corruption"] == name for row in rows) for name in names] == [2, 7, 4, 2, 4]
    assert all(row["psnr"] > 5 and row["ssim"] <= 1 and row["frechet"] > 0 for row in rows)


def test_samplers(experiment):
    (rows,) = experiment(
        "samplers", DIGITS, "--evaluations", 2, 3, "--seeds", 2, "--methods", "ddpm", "dpm2m"
    )
    cases = [(row["method"], row["evaluations"]) for row in rows]
    assert cases == [("ddpm", 2), ("ddpm", 3), ("dpm2m", 2), ("dpm2m", 3)]
    assert all(row["psnr"] > 0 and row["frechet"] > 0 for row in rows)


def test_laps(experiment):
    (rows,) = experiment("laps", DIGITS, "--corruptions", "mask 0.5", "blur 0.9")
    assert [row["corruption"] for row in rows] == ["mask 0.5", "blur 0.9"]
    for row in rows:
        assert {row["best energy"], row["best Frechet"], row["best PSNR"]} <= {1, 2}
        losses = [value for name, value in row.items() if "lost" in name]
        assert len(losses) == 4 and min(losses) >= 0
        assert row["best energy"] != row["best PSNR"] or row["best energy: PSNR lost (dB)"] == 0


def test_warm(experiment):
    (rows,) = experiment("warm", DIGITS, "--first", 1)
    runs = [("EM-MMPS", 0), ("EM-MMPS", 1), ("warm", 1), ("warm", 2), ("cold", 0), ("cold", 1), ("cold", 2)]
    assert [(row["start"], row["lap"]) for row in rows] == runs
    assert all(row["frechet_restored"] > 0 for row in rows)


def test_misspecified(experiment):
    (rows,) = experiment(
        "misspecified", DIGITS, "--cases", "mask 0.5", "mask 0.5 as block 0.5", "jpeg 20 as jpeg 8"
    )
    cases = [(row["data"], row["learnt with"]) for row in rows]
    assert cases == [("mask 0.5", "mask 0.5"), ("mask 0.5", "block 0.5"), ("jpeg 20", "jpeg 8")]
    assert all(row["lap"] == 2 and row["frechet_restored"] > 0 for row in rows)


def test_speed(experiment):
    flags = ["--networks", "8 16 x 1", "--rounds", 1, "--images", 64]
    rows, parts = experiment("speed", dict(batch=4, steps=3, num_samples=2), *flags)
    ours = [row["M-step"] for row in rows if "diffusers" not in row["M-step"]]
    assert ours == ["naive", "float32", "default"]
    assert rows[0]["against naive"] == 1 and all(row["images a second"] > 0 for row in rows)
    assert [row["part"] for row in parts][:3] == ["data", "forward", "backward"] and len(parts) == 9
    assert sum(row["share"] for row in parts) == pytest.approx(1, abs=0.01)
    assert all(row["seconds"] > 0 for row in parts)


def test_freeze(experiment):
    (rows,) = experiment("freeze", {}, "--networks", "8 x 1", "--rounds", 1, "--steps", 2)
    names = ["PyTorch", "PyTorch, channels_last", "TorchScript", "onnxruntime", "onnxruntime, float16"]
    assert [row["candidate"] for row in rows] == names
    assert all(row["images a second"] > 0 for row in rows) and rows[0]["time"] == 1
    assert rows[3]["one image, cold (s)"] > 0 and rows[3]["peak (MB)"] > 10
    assert 0 < rows[4]["error of float16"] < 0.05


def test_unconditional(classes, experiment, tmp_path):
    flags = "--channels 8 8 --blocks 1 --laps 1 --steps 2 --batch 8 --start-laps 1 --sample-steps 2".split()
    flags += "--unconditional-steps 2 --held-out 20 --num-samples 2 --name one".split()
    command = [sys.executable, ROOT / "diffem.py", "--dataset", "folder", "--data-dir", classes[1], *flags]
    done = subprocess.run(
        [str(word) for word in command], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (rows,) = experiment("unconditional", {}, *classes, "--run", "runs/one", "--steps", 2, "--p", 1.0, 0.5)
    assert [row["p"] for row in rows] == [0.1, 1.0, 0.5]
    last = json.loads((tmp_path / "runs/one/metrics.jsonl").read_text().splitlines()[-1])
    for name in ("psnr", "psnr_mean", "energy"):  # by the images that the run has held out
        assert rows[0][name] == pytest.approx(last[name], abs=0.01)
    assert (
        all(row["frechet_new"] > 0 and row["psnr"] > 0 for row in rows)
        and rows[0]["seconds"] < rows[1]["seconds"]
    )
