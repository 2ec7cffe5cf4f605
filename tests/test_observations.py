"""Images that are observations already, from a folder on disk: how they are read, and a run from them to restored pictures."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffem
import export
from diffem import Settings

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
FLAGS = ("--channels 8 8 --blocks 1 --laps 1 --steps 3 --batch 8 --sample-steps 3 --start-laps 2 --start-rank 4 --held-out 12 "
         "--num-samples 2 --device cpu --name own").split()  # fmt: skip


def settings(folder, **others):
    return Settings(dataset="observations", observations=str(folder), held_out=2, **others)


def read(settings):
    return diffem.as_float(diffem.read_images(diffem.image_files(settings), settings), "cpu")


def pixels(number=40, channels=3):
    """Images of four squares of one colour, and masks of whole columns."""
    generator = np.random.default_rng(0)
    values = np.kron(generator.integers(0, 256, (number, 2, 2, channels)), np.ones((1, 4, 4, 1))).astype(
        np.uint8
    )
    return values, np.repeat(generator.random((number, 1, 8)) < 0.6, 8, 1)


def write_transparent(folder, number=40):
    values, known = pixels(number)
    folder.mkdir(parents=True)
    for i in range(number):
        Image.fromarray(np.dstack([values[i], 255 * known[i].astype(np.uint8)])).save(folder / f"{i:02d}.{['png', 'webp'][i % 2]}",
                                                                                   lossless=True, exact=True)  # fmt: skip
    return values, known


def test_transparent_pixels_nan_and_masks_say_the_same(tmp_path):
    values, known = write_transparent(tmp_path / "alpha")
    (tmp_path / "arrays").mkdir()
    (tmp_path / "plain").mkdir()
    (tmp_path / "masks").mkdir()
    for i, (value, k) in enumerate(zip(values, known)):
        np.save(tmp_path / "arrays" / f"{i:02d}.npy", np.where(k[..., None], value / 255, np.nan))
        Image.fromarray(value).save(tmp_path / "plain" / f"{i:02d}.png")
        Image.fromarray(255 * k.astype(np.uint8)).save(tmp_path / "masks" / f"{i:02d}.png")
    x, k = (
        torch.from_numpy(values).permute(0, 3, 1, 2) * (4 / 255) - 2,
        torch.from_numpy(known)[:, None].float(),
    )
    expected = torch.cat([x * k, k], 1)
    masks = dict(masks=str(tmp_path / "masks"))
    for folder, others in (("alpha", {}), ("arrays", {}), ("plain", masks)):
        torch.testing.assert_close(read(settings(tmp_path / folder, **others)), expected, atol=1e-5, rtol=0)


def test_grey_of_16_bits(tmp_path):
    array = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(array).save(tmp_path / "a.png")
    y = read(settings(tmp_path, grey=True))
    assert y.shape == (1, 2, 8, 8)
    torch.testing.assert_close(y[0, 0], torch.from_numpy(array / 65535 * 4 - 2).float(), atol=1e-6, rtol=0)


def test_the_m_step_draws_the_masks_that_were_observed(tmp_path, generator):
    write_transparent(tmp_path / "in")
    data = diffem.make_data(settings(tmp_path / "in", parameters=dict(rate=0.5)))
    y, corruption = diffem.as_float(data.y, "cpu"), data.corruption
    assert data.truth is None and len(y) == 38 and len(data.held_out) == 2
    drawn = corruption(torch.randn(500, 3, 8, 8, generator=generator), generator)[:, -1]
    rows = {tuple(mask.flatten().tolist()) for mask in y[:, -1]}
    assert {tuple(mask.flatten().tolist()) for mask in drawn} == rows  # all of them, and no others


@pytest.mark.parametrize("corruption", ["jpeg", "noise", "mask"])
def test_a_model_remembers_that_pixels_were_missing(corruption, tmp_path, monkeypatch):
    """So that it restores images of the kind that it was trained on, whatever the corruption."""
    monkeypatch.chdir(tmp_path)
    write_transparent(tmp_path / "in")
    own = ["--quality", "20"] if corruption == "jpeg" else []
    flags = ["--observations", "in", "--corruption", corruption, *own, *FLAGS]
    assert diffem.main(flags) == 0
    denoiser, saved = diffem.load("runs/own"), diffem.Checkpoint("runs/own").settings
    assert export.describe(denoiser, saved, False)["masks"] is True
    denoiser = diffem.new_denoiser(diffem.Gaussian([3, 8, 8]), diffem.Noise(), diffem.Config(), "cpu")
    assert export.describe(denoiser, saved, False)["masks"] is False


def test_a_smaller_image_is_an_observation_of_a_larger_one(tmp_path):
    values, _ = pixels(4)
    for i, value in enumerate(values):
        Image.fromarray(value).save(tmp_path / f"{i}.png")
    y = diffem.make_data(settings(tmp_path, corruption="downsample", parameters=dict(factor=2))).y
    assert y.shape == (2, 4, 16, 16) and torch.equal(y[..., ::2, ::2], y[..., 1::2, 1::2])
    assert diffem.make_data(settings(tmp_path, corruption="blur")).corruption.masks is None


def test_few_images_ask_for_few_steps(tmp_path, monkeypatch, capsys):
    """80 faces, by steps of 400 and of 80 times each image in a lap: energy 0.37 (0.28 in the best lap) and 0.28 (0.27)."""
    monkeypatch.chdir(tmp_path)
    write_transparent(tmp_path / "in")
    monkeypatch.setattr(diffem, "train", lambda *arguments: 0)
    for steps, advice in (("500", "on each image 1142 times"), ("35", "")):
        flags = ["--observations", "in", *FLAGS, "--batch", "64", "--steps", steps]
        assert diffem.main(flags) == 0
        out = capsys.readouterr().out
        assert (advice in out and "try --steps 35" in out) if advice else "by heart" not in out


def test_tables_are_enough_for_jpeg(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_transparent(tmp_path / "in")
    flags = ["--observations", "in", "--corruption", "jpeg", "--tables", *["9"] * 64, *FLAGS]
    assert diffem.main(flags) == 0
    assert diffem.Checkpoint("runs/own").settings.parameters["tables"] == (9,) * 64


def test_jpeg_observations_bring_their_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for i, value in enumerate(pixels()[0]):
        Image.fromarray(value).save(tmp_path / "in" / f"{i}.jpg", quality=30, subsampling=2)
    flags = ["--observations", "in", "--corruption", "jpeg", *FLAGS]
    assert diffem.main(flags) == 0
    saved = json.loads((tmp_path / "runs/own/config.json").read_text())["parameters"]
    assert saved["subsampling"] == 2 and saved["tables"][:3] == [27, 18, 17]  # 16, 11, 10 by 50 / 30, rounded
    assert diffem.main(["--resume", "runs/own", "--laps", "2"]) == 0
    Image.fromarray(value).save(tmp_path / "in" / "0.jpg", quality=50)
    capsys.readouterr()
    assert diffem.main(flags) == 2
    assert re.search(r"JPEG of different kinds, in/0.jpg, in/1.jpg", capsys.readouterr().err)
    for path in (tmp_path / "in").iterdir():
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
    assert diffem.main(flags) == 2
    assert "give --quality" in capsys.readouterr().err


def script(*arguments, cwd):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def test_from_a_folder_to_restored_pictures(tmp_path):
    write_transparent(tmp_path / "in")
    before = {path: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    done = script(ROOT / "diffem.py", "--observations", "in", *FLAGS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "runs/own/metrics.jsonl").read_text().splitlines()]
    assert [line["lap"] for line in lines] == [0, 1] and "psnr" not in lines[1] and lines[1]["residual"] < 5
    (tmp_path / "in").rename(tmp_path / "moved")
    done = script(
        ROOT / "diffem.py", "--resume", "runs/own", "--laps", "2", "--observations", "moved", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "moved").rename(tmp_path / "in")
    done = script(ROOT / "export.py", "runs/own", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = script(
        ROOT / "export.py",
        "restore",
        "runs/own/model.onnx",
        "in",
        "--samples",
        "1",
        "--device",
        "cpu",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "restored").glob("*_sample1.png"))) == 40
    assert {path: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before


def spoil(folder):
    (folder / "07.webp").write_bytes(b"junk")


def make_opaque(folder):
    for path in folder.iterdir():
        Image.open(path).convert("RGB").save(path)


@pytest.mark.parametrize(
    "change, arguments, message",
    [
        (spoil, "--observations in", "in/07.webp"),
        (make_opaque, "--observations in", "no pixel is missing"),
        (None, "--observations nowhere", "no folder nowhere .--observations."),
        (None, "--observations in --masks nowhere", "no folder nowhere .--masks."),
        (None, "--observations in --corruption blur", "blur needs images of which no pixel is missing"),
        (
            None,
            "--observations in --corruption jpeg --quality 9 --crop 8",
            "--crop must be a multiple of 16, as jpeg",
        ),
        (None, "--observations in --image-size 4", "--image-size is for --dataset folder"),
        (None, "--dataset observations", "--observations FOLDER"),
        (None, "--dataset digits --observations in", "--observations FOLDER"),
        (None, "--masks in", "--masks is for"),
        (
            lambda folder: np.save(folder / "x.npy", np.full((8, 8, 3), 200.0)),
            "--observations in",
            "x.npy .* from 0 to 1",
        ),
    ],
)
def test_bad_observations(change, arguments, message, tmp_path, monkeypatch, capsys):
    write_transparent(tmp_path / "in", 20)
    if change:
        change(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    assert diffem.main([*arguments.split(), *FLAGS]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert not (tmp_path / "runs").exists()


def test_a_broken_file_is_skipped_where_that_is_asked_for(tmp_path):
    write_transparent(tmp_path / "in", 20)
    spoil(tmp_path / "in")
    assert len(read(settings(tmp_path / "in", skip_bad_images=True))) == 19
