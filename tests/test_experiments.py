"""The experiments run, on tiny arguments: what they print is a table with a row for each lap."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Small photographs in two folders."""
    root, generator = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for i in range(1100):
        (root / f"class{i % 2}").mkdir(exist_ok=True)
        pixels = np.kron(generator.integers(0, 255, (2, 2, 3)), np.ones((4, 4, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"class{i % 2}" / f"{i}.png")
    return root


@pytest.mark.parametrize("flags", [[], ["--clean"]])
def test_restore(flags, classes, tmp_path):
    settings = dict(laps=2, steps=2, channels=(8, 8), blocks=1, batch=8, sample_steps=2, prior_steps=2, prior_laps=1, samples=2)
    command = [sys.executable, ROOT / "tests/experiments/restore.py", "--data-dir", classes, "--images", "100", "--held-out", "20",
               "--corruptions", "mask 0.5", "--settings", json.dumps(settings), *flags]  # fmt: skip
    done = subprocess.run([str(word) for word in command], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "benchmark.jsonl").read_text().splitlines()[-1])
    assert [row["lap"] for row in table["rows"]] == ["observed", 0, 1, 2]
    assert all(row["mean of 8"] > 5 and row["Frechet, new"] > 0 for row in table["rows"][1:])
    assert "| corruption | lap |" in done.stdout
