"""Faults: damaged checkpoints, odd names, kills. Each kind once."""

import io
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import diffem
import export

ROOT = Path(__file__).parents[1]
TINY = ("--channels 8 8 --blocks 1 --laps 2 --steps 30 --batch 8 --sample-steps 2 --unconditional-steps 2 --start-laps 1 "
        "--start-rank 4 --limit 60 --held-out 8 --num-samples 2 --device cpu").split()  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert diffem.main([*TINY, "--name", "one"]) == 0
    return root / "runs/one"


def fails(arguments, capsys) -> str:
    capsys.readouterr()
    assert diffem.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("diffem: "), error
    return error


def copy(run: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for path in run.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder / "checkpoint.pt"


def test_a_flipped_bit_is_not_believed(run, tmp_path, capsys):
    path, generator = copy(run, tmp_path / "runs/one"), random.Random(0)
    content, weights = path.read_bytes(), list(diffem.load(path.parent).parameters())
    refused = 0
    for _ in range(30):
        i = generator.randrange(len(content))
        path.write_bytes(content[:i] + bytes([content[i] ^ 1 << generator.randrange(8)]) + content[i + 1 :])
        try:  # the padding between two entries has no checksum, and no meaning
            same = zip(diffem.load(path.parent).parameters(), weights)
            assert all(torch.equal(ours, theirs) for ours, theirs in same)
        except diffem.DiffEMError as error:
            assert "not a checkpoint of DiffEM, or is damaged" in str(error)
            refused += 1
    assert refused > 15


def change(**values):
    def changed(content):
        content["state"] |= values

    return changed


def smaller_moments(content):
    moments = next(iter(content["state"]["optimizer"]["state"].values()))
    moments["exp_avg"] = torch.zeros(1)


@pytest.mark.parametrize(
    "spoil",
    [
        smaller_moments,
        lambda content: content["state"]["optimizer"]["state"].clear(),
        lambda content: content["settings"].update(batch=1.5),
        lambda content: content["settings"].update(nonsense=1),
        lambda content: content["settings"].update(channels="wide"),
        lambda content: content["state"].pop("average"),
        lambda content: content["state"].pop("x0"),
        lambda content: content.pop("data"),
        lambda content: content["state"]["denoiser"].clear(),
        change(optimizer=3),
        change(losses=torch.zeros(7)),
        change(drawn="many"),
        change(nonsense=1),
    ],
)
def test_wrong_structures_end_in_one_line(spoil, run, tmp_path, monkeypatch, capsys):
    path = copy(run, tmp_path / "runs/one")
    content = torch.load(path, weights_only=True)
    spoil(content)
    torch.save(content, path)
    monkeypatch.chdir(tmp_path)
    fails(["--resume", "runs/one", "--laps", "3"], capsys)


def test_a_spoilt_history_is_written_anew(run, tmp_path, monkeypatch, capsys):
    copy(run, tmp_path / "runs/one")
    monkeypatch.chdir(tmp_path)
    metrics = tmp_path / "runs/one/metrics.jsonl"
    before = metrics.read_text()
    metrics.write_text(before[: len(before) // 2])
    assert diffem.main(["--resume", "runs/one", "--laps", "3"]) == 0
    assert metrics.read_text().startswith(before) and metrics.read_text().count("\n") == 4


@pytest.mark.parametrize("name", ["../out", "a/b", "..", "/tmp/x", "a\nb"])
def test_names_stay_below_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "below runs/" in fails([*TINY, "--name", name], capsys)


def test_fewer_laps_than_are_done(run, tmp_path, monkeypatch, capsys):
    path = copy(run, tmp_path / "runs/one")
    content = path.read_bytes()
    monkeypatch.chdir(tmp_path)
    assert "has reached lap 2" in fails(["--resume", "runs/one", "--laps", "1"], capsys)
    assert path.read_bytes() == content


def test_out_of_memory_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    error = fails([*TINY, "--channels", "1000000", "1000000"], capsys)
    assert "memory" in error and not (tmp_path / "runs").exists()


def test_a_checkpoint_that_does_not_fit_into_memory_is_not_called_bad(run, monkeypatch, capsys):
    def fail(*rest):
        raise RuntimeError("CUDA out of memory. Tried to allocate 3 GiB")

    monkeypatch.setattr(diffem, "new_state", fail)
    monkeypatch.chdir(run.parents[1])
    assert "out of memory" in fails(["--resume", "runs/one", "--laps", "9"], capsys)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a FIFO")
def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    os.mkfifo(tmp_path / "z.npy")
    (tmp_path / "y.png").mkdir()
    assert export.find_images(tmp_path, arrays=True) == []
    for name in ("x.png", "y.png", "z.npy"):
        with pytest.raises(export.DiffEMError, match="not a regular file"):
            export.read_image(tmp_path / name, 3)


def test_killed_at_any_instant_and_resumed(tmp_path):
    """SIGKILL at random instants of a run: what is resumed ends with the same weights and metrics, byte for byte."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import diffem; print(flush=True); sys.exit(diffem.main(sys.argv[1:]))"
    environment, generator = os.environ | {"OMP_NUM_THREADS": "1"}, random.Random(0)

    def start(*arguments):
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE)

    with start(*TINY, "--name", "whole") as process:
        process.stdout.read()
    arguments, kills = [*TINY, "--name", "one"], 0
    for _ in range(12):
        with start(*arguments) as process:
            process.stdout.readline()  # torch is imported
            time.sleep(generator.uniform(0.3, 2.5))
            if process.poll() is None and kills < 3:
                process.send_signal(signal.SIGKILL)
                kills += 1
            process.stdout.read()
        if process.returncode == 0:
            break
        started = (tmp_path / "runs/one/checkpoint.pt").exists()
        arguments = ["--resume", "runs/one", "--device", "cpu"] if started else arguments
    assert process.returncode == 0
    files = (tmp_path / "runs" / name / "checkpoint.pt" for name in ("whole", "one"))
    whole, parts = (torch.load(file, weights_only=True)["state"] for file in files)
    assert all(torch.equal(weight, parts["average"][name]) for name, weight in whole["average"].items())
    assert torch.equal(whole["x0"], parts["x0"])
    metrics = [(tmp_path / "runs" / name / "metrics.jsonl").read_bytes() for name in ("whole", "one")]
    assert metrics[0] == metrics[1]


# ---- Your own corruption, wrong in many ways: one line with its file and class


class Own(diffem.Corruption):
    noise = 0.1


class Fails(Own):
    def A(self, x):
        raise IndexError("out of film")


class Nothing(Own):
    def observe(self, x, m, generator):
        return None


class Smaller(Own):
    def observe(self, x, m, generator):
        return super().observe(x, m, generator)[..., ::2, ::2]


class Double(Own):
    def A(self, x):
        return x.double()


class Numpy(Own):
    def observe(self, x, m, generator):
        return torch.cat([x, m], 1).numpy()


class NotMade(Own):
    def __init__(self, level: float = 1.0):
        self.level = level


class Huge(Own):
    def A(self, x):
        return 1e30 * x


class Exits(Own):
    def A(self, x):
        sys.exit(7)


class HalfMask(Own):
    def mask(self, x, generator):
        return 0.5 * torch.ones_like(x[:, :1])


class Broken(Own):
    def __init__(self, level: float = 1.0):
        super().__init__(level=level)
        raise TypeError("no such camera")


@pytest.mark.parametrize(
    "own, message",
    [(Fails, "out of film"), (Nothing, "NoneType in place of a tensor"), (Smaller, r"\(2, 2, 4, 4\) in place of"),
     (Double, "float32, not torch.float64"), (Numpy, "ndarray in place of a tensor"), (NotMade, "NotMade"),
     (Huge, "black is -2"), (Exits, "SystemExit: 7"), (HalfMask, "must be 1 where observed"), (Broken, "no such camera")],
)  # fmt: skip
def test_a_wrong_own_corruption_is_named(own, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diffem, "CORRUPTIONS", dict(diffem.CORRUPTIONS))
    capsys.readouterr()
    assert diffem.main([*TINY, "--corruption", "own"], own=own) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert f"test_faults.py, {own.__name__}: " in error and not (tmp_path / "runs").exists()


class NoDefault(Own):
    def __init__(self, level):
        super().__init__(level=level)


class NoneDefault(Own):
    def __init__(self, level: float | None = None):
        super().__init__(level=level)


@pytest.mark.parametrize("own", [NoDefault, NoneDefault])
def test_an_argument_whose_flag_would_have_no_type(own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diffem, "CORRUPTIONS", dict(diffem.CORRUPTIONS))
    assert diffem.main([*TINY, "--corruption", "own", "--level", "3"], own=own) == 2
    assert f"{own.__name__}: ['level'] need defaults" in capsys.readouterr().err


# ---- Two processes, one folder; streams that cannot be written


def test_a_run_is_of_one_process(run, tmp_path, monkeypatch, capsys):
    copy(run, tmp_path / "runs/one")
    monkeypatch.chdir(tmp_path)
    settings = diffem.Settings(resume="runs/one")
    with diffem.claimed(settings) as folder:
        assert "another process is at work in runs/one" in fails(
            ["--resume", "runs/one", "--laps", "3"], capsys
        )
    assert (folder / "checkpoint.pt").exists()
    with diffem.claimed(diffem.Settings()) as first, diffem.claimed(diffem.Settings()) as second:
        assert [first.name, second.name] == ["digits-mask-1", "digits-mask-2"]
    (tmp_path / "runs/dead").mkdir()  # of a start that was killed
    assert not first.exists() and not second.exists()
    assert diffem.main([*TINY, "--name", "dead"]) == 0


def test_a_lock_goes_with_its_process(run, tmp_path, monkeypatch):
    copy(run, tmp_path / "runs/one")
    monkeypatch.chdir(tmp_path)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import diffem, time; c = diffem.claimed(diffem.Settings(resume='runs/one'))"
    command = [sys.executable, "-c", code + "; c.__enter__(); print(flush=True); time.sleep(99)"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(diffem.DiffEMError, match="another process"):
            diffem.claimed(diffem.Settings(resume="runs/one")).__enter__()
        process.kill()
    with diffem.claimed(diffem.Settings(resume="runs/one")) as folder:
        pass
    assert {path.name for path in folder.iterdir()} >= {"checkpoint.pt"} and not (folder / ".lock").exists()


@pytest.mark.parametrize("program", ["diffem.py", "export.py"])
def test_a_closed_pipe_is_one_line(program, tmp_path):
    export_prints = (
        "import sys, export; export.export = lambda **rest: print(); sys.exit(export.main(['one']))"
    )
    training = [ROOT / program, *TINY, "--laps", 1, "--steps", 3]
    command = training if program == "diffem.py" else ["-c", export_prints]
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | dict(PYTHONUNBUFFERED="", PYTHONPATH=str(ROOT))
    options = dict(cwd=tmp_path, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True)
    done = subprocess.run([sys.executable, *map(str, command)], **options)
    os.close(writer)
    assert done.returncode == 2 and done.stderr == f"{program[:-3]}: [Errno 32] Broken pipe\n"


@pytest.mark.parametrize("program", [diffem, export])
def test_a_terminal_without_the_letters_of_a_name(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diffem, "prepare", lambda *rest: None)
    monkeypatch.setattr(diffem, "train", lambda *rest: print("runs/\xe9") or 0)
    monkeypatch.setattr(export, "export", lambda **rest: print("runs/\xe9"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert program.main([] if program is diffem else ["runs/one"]) == 0
    assert sys.stdout.buffer.getvalue() == b"runs/\\xe9\n"


def test_restoring_without_memory_is_one_line(monkeypatch, capsys):
    def fail(options):
        raise MemoryError("Unable to allocate 3 GiB")

    monkeypatch.setattr(export, "restore", fail)
    assert export.main(["restore", "model.onnx", "x.png"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("export: out of memory") and "3 GiB" in error and error.count("\n") == 1


def test_restoring_to_a_full_disk_leaves_whole_files_only(tmp_path, monkeypatch):
    y = np.zeros((4, 8, 8), np.float32)
    (tmp_path / "a_sample1.png").write_bytes(b"old")
    monkeypatch.setattr(
        "PIL.Image.Image.save", lambda image, file, *rest, **options: (file.write(b"x"), full())
    )

    def full():
        raise OSError(28, "No space left on device")

    with pytest.raises(export.DiffEMError, match="cannot write .*a_sample1.png .*No space left"):
        export.write_images(tmp_path / "a", y[None, :3], export.Picture(y, 255))
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("program", ["diffem", "export", "restore"])
def test_signals_before_there_is_anything_to_save(program, number, code, run, tmp_path):
    """While an observation is read, a checkpoint exported, a picture restored: one line, and no files."""
    copy(run, tmp_path / "one")
    places = dict(
        diffem=("diffem", "make_data"), export=("export", "onnx_step"), restore=("export", "targets")
    )
    place = places[program]
    arguments = {"diffem": TINY, "export": ["one"], "restore": ["restore", "one", "one"]}[program]
    reader, writer = os.pipe()
    before = sorted(path.name for path in tmp_path.rglob("*"))
    child = os.fork()  # faster than a new process, which would import PyTorch
    if child == 0:

        def wait(*rest):
            os.write(writer, b"x")
            time.sleep(60)

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.chdir(tmp_path)
        sys.stderr = open(tmp_path.parent / f"{tmp_path.name}.err", "w")
        setattr(sys.modules[place[0]], place[1], wait)
        export.Restorer = lambda *rest: type("Model", (), dict(metadata=dict(steps=1, method="ddpm")))
        result = (diffem if program == "diffem" else export).main(arguments)
        sys.stderr.flush()
        os._exit(result)
    os.read(reader, 1)
    os.kill(child, number)
    status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) == code
    error = (tmp_path.parent / f"{tmp_path.name}.err").read_text()
    assert error == f"{program.replace('restore', 'export')}: stopped\n"
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
