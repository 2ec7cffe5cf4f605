"""Several processes under torchrun, on a CPU by Gloo: the same training as in one, and what becomes of a run whose process dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import diffem
from diffem import Config, Mask

ROOT = Path(__file__).parents[1]
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc-per-node=2",
    "--rdzv-backend=c10d",
    "--rdzv-endpoint=localhost:0",
]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
CONFIG = dict(
    channels=(8, 8),
    blocks=1,
    laps=2,
    steps=12,
    batch=8,
    sample_steps=3,
    start_laps=2,
    start_rank=4,
    sample_batch=10,
    precision="float32",
)

TRAIN = f"""
import os, sys, torch
sys.path.insert(0, {str(ROOT)!r})
import diffem
with diffem.process_group():
    rank, y, losses = diffem.ranks()[0], torch.load("y.pt"), []
    for state in diffem.em(y, diffem.Mask(0.5), diffem.Config(**{CONFIG!r})):
        if state.drawn == len(y) and state.lap:
            losses.append(state.losses.clone())
    weights = torch.cat([p.flatten() for p in state.model.parameters()])
    torch.save([losses, weights, state.x0], f"rank{{rank}}.pt")
os._exit(0)  # as diffem.py does: Gloo's threads may outlive the process group, and abort Python as it ends
"""


def test_two_processes_train_as_one_with_the_same_batches(tmp_path, monkeypatch):
    x0 = torch.randn(41, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = Mask(0.5)(x0, torch.Generator().manual_seed(1))
    torch.save(y, tmp_path / "y.pt")
    (tmp_path / "train.py").write_text(TRAIN)
    subprocess.run(
        [*TORCHRUN, "train.py"], cwd=tmp_path, env=ENVIRONMENT, check=True, timeout=300, capture_output=True
    )
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert torch.equal(results[0][1], results[1][1])

    config, corruption = Config(**CONFIG), Mask(0.5)
    half = Config(**CONFIG | dict(batch=4))
    generator = diffem.generator_for("cpu", 0, 0, 1, 0)
    state, losses = diffem.first_state(y, corruption, config, generator), []
    genuine = diffem.optimise
    monkeypatch.setattr(diffem, "optimise", lambda state, loss, config: parts_of_the_loss.append(loss))
    for state.lap in (1, 2):
        for state.step in range(config.steps):
            parts_of_the_loss = []
            for rank in (0, 1):
                diffem.m_step(state, half, diffem.generator_for("cpu", 0, state.lap, state.step, rank))
            genuine(state, sum(parts_of_the_loss) / 2, config)
            losses.append(float(state.losses[state.step - 1]))
        # 41 observations by batches of 2 x 10: the second process has none of the last one
        for drawn in (0, 20, 40):
            for rank in (0, 1) if drawn < 40 else (0,):
                generator = diffem.generator_for("cpu", 0, state.lap, config.steps + drawn, rank)
                part = slice(drawn + rank, drawn + 20, 2)
                state.x0[part] = state.model.sample(y[part], *config.e_step_sampler(state.lap), generator)
    torch.testing.assert_close(torch.cat(results[0][0]), torch.tensor(losses), rtol=1e-4, atol=1e-5)
    for result in results:
        torch.testing.assert_close(result[2], state.x0, rtol=1e-3, atol=1e-3)


FLAGS = "--device cpu --channels 8 8 --blocks 1 --batch 8 --held-out 8 --num-samples 2 --sample-steps 2 --start-laps 1 --start-rank 4 --limit 101 --name two"


def test_a_run_of_two_processes_prints_once_and_goes_on_in_one(tmp_path):
    command = [str(ROOT / "diffem.py"), *FLAGS.split(), "--laps", "1", "--steps", "20"]
    done = subprocess.run(
        [*TORCHRUN, *command], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.count("lap 1/1")
        == done.stdout.count("101 observations")
        == done.stdout.count("2 processes on cpu")
        == 1
    )
    checkpoint = diffem.Checkpoint(tmp_path / "runs/two")
    assert len(checkpoint.state["x0"]) == checkpoint.state["drawn"] == 101
    command = [sys.executable, str(ROOT / "diffem.py"), "--resume", "runs/two", "--laps", "2"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [
        json.loads(line)["lap"] for line in (tmp_path / "runs/two/metrics.jsonl").read_text().splitlines()
    ] == [0, 1, 2]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes in /proc")
def test_a_dead_process_ends_the_run_and_leaves_the_checkpoint_whole(tmp_path):
    command = [*TORCHRUN, str(ROOT / "diffem.py"), *FLAGS.split(), "--laps", "100", "--steps", "20"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as run:
        deadline = time.monotonic() + 120
        while (
            not (tmp_path / "runs/two/lap_01.png").exists()
            and time.monotonic() < deadline
            and run.poll() is None
        ):
            time.sleep(0.2)
        children = (
            int(child) for child in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        )
        second = next(
            child for child in children if b"RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes()
        )
        os.kill(second, signal.SIGKILL)
        _, errors = run.communicate(timeout=120)
    assert run.returncode != 0
    assert "another process of this run has died" in errors, errors
    assert diffem.Checkpoint(tmp_path / "runs/two").state["lap"] >= 0


def test_the_reason_is_told_once_by_the_process_that_has_it(tmp_path):
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import diffem
if os.environ["RANK"] == "1":
    def broken(settings):
        raise diffem.DiffEMError("no such disk here")
    diffem.make_data = broken
sys.exit(diffem.main())
"""
    (tmp_path / "one_fails.py").write_text(code)
    for file, flags, reason in (
        ("one_fails.py", [], "no such disk here"),
        (ROOT / "diffem.py", ["--lr", "-1"], "--lr"),
    ):
        command = [*TORCHRUN, file, *FLAGS.split(), "--device", "cpu", *flags]
        done = subprocess.run(
            command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
        )
        lines = [line for line in done.stderr.splitlines() if line.startswith("diffem: ")]
        assert done.returncode != 0 and len(lines) == 1 and reason in lines[0], done.stderr
