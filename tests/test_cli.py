"""The script from outside: subprocesses, exit codes, files on disk."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image

import diffem

ROOT = Path(__file__).parents[1]
SMALL = ("--channels 8 8 --blocks 1 --laps 1 --steps 3 --batch 8 --sample-steps 3 --start-laps 2 --start-rank 4 --held-out 12 "
         "--num-samples 2 --limit 40 --device cpu").split()  # fmt: skip


def start(*arguments, cwd, **kind):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "https_proxy": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
    }
    return subprocess.Popen([sys.executable, str(ROOT / "diffem.py"), *map(str, arguments)], cwd=cwd, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kind)  # fmt: skip


def script(*arguments, cwd, **kind):
    process = start(*arguments, cwd=cwd, **kind)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A tree of 60 small colour images."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for i in range(60):
        pixels = np.kron(generator.integers(0, 255, (4, 4, 3)), np.ones((4, 4, 1))).astype(np.uint8)
        (root / f"class{i % 3}").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / f"class{i % 3}" / f"{i}.png")
    return root


def idx(path: Path, array: np.ndarray):
    """A file of MNIST's format."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def check_run(folder: Path, laps: int = 1):
    names = {"config.json", "checkpoint.pt", "metrics.jsonl"} | {f"lap_{i:02d}.png" for i in range(laps + 1)}
    assert {path.name for path in folder.iterdir()} == names
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["lap"] for line in lines] == list(range(laps + 1))
    for line in lines:
        assert {
            "psnr",
            "psnr_mean",
            "residual",
            "spread",
            "energy",
            "coverage_90",
            "frechet_pca",
        } <= line.keys()
        assert all(np.isfinite(value) for value in line.values())
    assert "loss" in lines[-1]
    assert Image.open(folder / f"lap_{laps:02d}.png").width > 500


@pytest.mark.parametrize(
    "corruption",
    [
        "mask --rate 0.4",
        "block",
        "blur --width 0.8",
        "downsample --factor 4",
        "noise --noise 0.3",
        "jpeg --quality 30",
    ],
)
def test_run_with_every_corruption(corruption, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert diffem.main([*SMALL, "--corruption", *corruption.split()]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.search(r"PSNR of the posterior mean: start \d+\.\d+ dB, DiffEM \d+\.\d+ dB", out)
    check_run(tmp_path / "runs" / f"digits-{corruption.split()[0]}-1")


def test_script_on_a_folder_in_colour_and_on_mnist_files(photos, tmp_path):
    code, out, err = script(
        *SMALL, "--dataset", "folder", "--data-dir", photos, "--image-size", 12, cwd=tmp_path
    )
    assert code == 0 and err == "", err
    check_run(tmp_path / "runs" / "folder-mask-1")
    for stem, number in (("train", 50), ("t10k", 15)):
        raw = tmp_path / "data" / "FashionMNIST" / "raw"
        idx(raw / f"{stem}-images-idx3-ubyte", np.random.default_rng(0).integers(0, 255, (number, 28, 28)))
        idx(raw / f"{stem}-labels-idx1-ubyte", np.zeros(number))
    code, out, err = script(*SMALL, "--dataset", "fashion_mnist", cwd=tmp_path)
    assert code == 0 and err == "", err
    check_run(tmp_path / "runs" / "fashion_mnist-mask-1")


class FakeCIFAR10:
    """torchvision's class, as far as it is used, without the download."""

    def __init__(self, root, train, download):
        assert download
        self.data = (
            np.random.default_rng(train).integers(0, 255, (50 if train else 20, 32, 32, 3)).astype(np.uint8)
        )


def test_cifar10_without_a_gpu_takes_the_small_preset_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCIFAR10)
    monkeypatch.chdir(tmp_path)
    assert diffem.main([*SMALL, "--dataset", "cifar10", "--device", "cpu"]) == 0
    assert re.search("small preset, for a CPU", capsys.readouterr().out)
    assert diffem.main(["--resume", "runs/cifar10-mask-1", "--laps", "2", "--device", "cpu"]) == 0
    check_run(tmp_path / "runs/cifar10-mask-1", laps=2)
    saved = json.loads((tmp_path / "runs/cifar10-mask-1/config.json").read_text())
    assert saved["preset"] == "small" and saved["flip"] and saved["parameters"]["rate"] == 0.75


OWN = """
import sys
import diffem

class Saturate(diffem.Corruption):
    def __init__(self, limit_at: float = 1.0):
        super().__init__(limit_at=limit_at)

    def A(self, x):
        return x.clamp(-self.limit_at, self.limit_at)

if __name__ == "__main__":
    sys.exit(diffem.main(saturate=Saturate))
"""


def test_a_corruption_of_ones_own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)

    def own(*arguments):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "own.py", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

    done = own(*SMALL, "--corruption", "saturate", "--limit-at", "0.8")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    check_run(tmp_path / "runs" / "digits-saturate-1")
    assert "limit_at 0.8" in done.stdout
    code, out, err = script("--resume", "runs/digits-saturate-1", "--laps", 2, cwd=tmp_path)
    assert code == 2 and "unknown corruption 'saturate'" in err
    done = own("--resume", "runs/digits-saturate-1", "--laps", "2")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    check_run(tmp_path / "runs" / "digits-saturate-1", laps=2)
    assert "--limit-at" in own("--corruption", "saturate", "--help").stdout


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path):
    flags = [*SMALL, "--laps", "2", "--steps", "60", "--dropout", "0.1"]
    assert script(*flags, "--name", "whole", cwd=tmp_path)[0] == 0
    process = start(*flags, "--name", "parts", cwd=tmp_path)
    for line in process.stdout:
        if line.startswith("lap 0"):
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, (out, err)
    assert "--resume runs/parts" in out and "Traceback" not in err
    assert torch.load(tmp_path / "runs/parts/checkpoint.pt", weights_only=True)["state"]["lap"] <= 1
    with open(
        tmp_path / "runs/parts/metrics.jsonl", "a"
    ) as file:  # as if it had been killed between a report and its checkpoint
        file.write('{"lap": 1, "psnr": 0}\n')
    code, out, err = script("--resume", "runs/parts", cwd=tmp_path)
    assert code == 0 and err == "", err
    check_run(tmp_path / "runs/parts", laps=2)
    whole, parts = (
        torch.load(tmp_path / "runs" / name / "checkpoint.pt", weights_only=True)["state"]
        for name in ("whole", "parts")
    )
    for name, weight in whole["average"].items():
        assert torch.equal(weight, parts["average"][name]), name
    assert torch.equal(whole["x0"], parts["x0"])
    assert (tmp_path / "runs/whole/metrics.jsonl").read_text() == (
        tmp_path / "runs/parts/metrics.jsonl"
    ).read_text()


def test_help(tmp_path):
    code, out, err = script("--help", cwd=tmp_path)
    assert code == 0
    for words in (
        "--image-size",
        "--resume",
        "--start-rank",
        "(default: 0.001)",
        "--rate",
        "(default: 0.5)",
        "cifar10 published",
    ):
        assert words in " ".join(out.split()), words
    code, out, err = script(
        "--help", "--dataset", "cifar10", "--preset", "published", "--corruption", "jpeg", cwd=tmp_path
    )
    for words in (
        "(default: 50000)",
        "(default: 128 256 384)",
        "--quality",
        "(default: 20)",
    ):  # those that hold there
        assert words in " ".join(out.split()), words
    assert list(tmp_path.iterdir()) == []


def test_import_runs_nothing(tmp_path):
    code = "import sys; sys.argv = ['x', '--nonsense']; import diffem; print(sorted(m for m in sys.modules if m in " \
           "('matplotlib', 'torchvision', 'sklearn', 'PIL')))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
    assert list(tmp_path.iterdir()) == []


def test_readme_examples(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    assert len(blocks) == 2
    for i, block in enumerate(blocks):
        (tmp_path / f"example{i}.py").write_text(block)
        flags = [*SMALL, "--corruption", "saturate", "--limit-at", "0.8"] if "main(" in block else []
        command = [sys.executable, f"example{i}.py", *flags]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    check_run(tmp_path / "runs" / "digits-saturate-1")


def fake_fidelity(input1, input2, **options):
    """torch-fidelity as far as it is used: its FID says how many images it was given."""
    sizes = [{Image.open(path).size for path in Path(folder).iterdir()} for folder in (input1, input2)]
    assert sizes[0] == sizes[1] and options["kid_subset_size"] <= 30
    if options["feature_extractor_weights_path"] is None:
        raise OSError("no\ninternet")
    number = len(list(Path(input1).iterdir())) + 1000 * len(list(Path(input2).iterdir()))
    others = dict(inception_score_mean=0.5, kernel_inception_distance_mean=0.5, precision=0.25, recall=0.75)
    return {"frechet_inception_distance": number, **others}


def test_evaluation_of_a_run(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [*SMALL, "--dataset", "folder", "--data-dir", str(photos), "--image-size", "8", "--name", "one"]
    assert diffem.main(flags) == 0
    evaluation = ["runs/one", "--num-samples", "30"]
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    capsys.readouterr()
    assert evaluate.main(evaluation) == 2
    out, err = capsys.readouterr()
    assert re.search(r"12 held-out images: PSNR \d+\.\d+ dB, SSIM", out)
    assert (
        err
        == "evaluate: FID, IS, KID, precision and recall need torch-fidelity: pip install torch-fidelity\n"
    )
    for kind in ("posterior", "unconditional"):
        files = sorted((tmp_path / "runs/one/samples" / kind).iterdir())
        assert len(files) == 30 and Image.open(files[-1]).size == (8, 8)
    monkeypatch.setitem(
        sys.modules, "torch_fidelity", type("module", (), {"calculate_metrics": staticmethod(fake_fidelity)})
    )
    assert evaluate.main(evaluation) == 2
    assert (
        "no internet" in (err := capsys.readouterr().err)
        and "--inception-weights" in err
        and err.count("\n") == 1
    )
    weights = ["--inception-weights", "weights.pt"]
    assert evaluate.main([*evaluation, *weights]) == 0  # against the 40 images that it was trained to restore
    # torch-fidelity takes its first input for the real images
    assert "posterior: FID 4.003e+04, IS 0.5, KID 0.5, precision 0.75, recall 0.25" in capsys.readouterr().out
    assert (
        evaluate.main(
            [
                *evaluation,
                *weights,
                "--reference",
                str(photos / "class0"),
                "--method",
                "ddim",
                "--sample-steps",
                "2",
            ]
        )
        == 0
    )
    assert "unconditional: FID 2.003e+04" in capsys.readouterr().out
    for flags, message in (
        (["--reference", "nowhere"], "nowhere"),
        (["--method", "euler"], "unknown method euler"),
    ):
        assert evaluate.main([*evaluation, *flags]) == 2
        assert message in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert evaluate.main(["runs/two"]) == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_ssim(generator):
    x0 = torch.rand(3, 1, 16, 16, generator=generator) * 4 - 2
    assert evaluate.ssim(x0, x0) == pytest.approx(1.0, abs=1e-5)
    # Wang et al.'s formula, window by window
    x, window = (
        x0 + 0.5 * torch.randn(x0.shape, generator=generator),
        np.outer(*[np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)] * 2),
    )
    window /= window.sum()
    values = []
    for a, b in zip(x[:, 0].double().numpy(), x0[:, 0].double().numpy()):
        for i in range(6):
            for j in range(6):
                p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq, c = (
                    (window * (p - mp) ** 2).sum(),
                    (window * (q - mq) ** 2).sum(),
                    (window * (p - mp) * (q - mq)).sum(),
                )
                c1, c2 = 0.04**2, 0.12**2
                values.append((2 * mp * mq + c1) * (2 * c + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert evaluate.ssim(x, x0) == pytest.approx(np.mean(values), abs=1e-4)
    assert 0 < evaluate.ssim(x[..., :8, :8], x0[..., :8, :8]) < 1


# ---- Bad input: one line, exit code 2


def fails(arguments, cwd, monkeypatch, capsys) -> str:
    """The one line on standard error."""
    monkeypatch.chdir(cwd)
    assert diffem.main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("diffem: "), err
    return err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--dataset imagenet", "no data set 'imagenet'"),
        ("--corruption fog", "unknown corruption 'fog'"),
        ("--rate 1.0", r"--rate must be from 0 to 0.999, not 1.0"),
        ("--rate -0.1", r"--rate must be from 0 to 0.999, not -0.1"),
        ("--rate nan", r"--rate must be from 0 to 0.999, not nan"),
        ("--rate many", "--rate"),
        ("--corruption jpeg --quality 0", "quality"),
        ("--corruption downsample --factor 3", "cannot be downsampled by 3"),
        ("--corruption projection", "unknown corruption 'projection'"),
        ("--dataset manifold", "no data set 'manifold'"),
        ("--preconditioning none", "unknown preconditioning 'none'"),
        ("--smoothness -1", "smoothness"),
        ("--frobnicate 3", "--frobnicate"),
        ("--preset published", "no data set 'digits' with preset 'published'"),
        ("--method euler", "unknown method 'euler'"),
        ("--laps 0", "--laps must be from 1 to"),
        ("--sigma-max 1e-4", "--sigma-min must be below"),
        ("--attention 1 --heads 5", "5 heads"),
        ("--attention 2", "levels are 0 to 1"),
        ("--sample-steps 1000000000", "--sample-steps must be from 1 to"),
        ("--first-sample-steps -1", "--first-sample-steps must be from 0"),
        ("--held-out 2000", "too few"),
        ("--image-size 16", "--dataset folder"),
        ("--device tpu", "unknown device 'tpu'"),
        ("--precision float16", "unknown precision 'float16'"),
        ("--compile maybe", "unknown compile 'maybe'"),
        ("--dataset observations", "give --observations FOLDER"),
        ("--observations . --crop 8", "no images in"),
        ("--dataset folder --data-dir nowhere", "no folder nowhere"),
        ("--resume runs/nothing", "no checkpoint"),
    ],
)
def test_bad_flags(arguments, message, tmp_path, monkeypatch, capsys):
    err = fails([*SMALL, *arguments.split()], tmp_path, monkeypatch, capsys)
    assert re.search(message, err), err
    assert not (tmp_path / "runs").exists()


def test_compiling_without_a_compiler(tmp_path, monkeypatch):
    for name, value in dict(CXX="/none", CC="/none", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache")).items():
        monkeypatch.setenv(name, value)
    code, _, err = script(*SMALL, "--compile", "on", cwd=tmp_path)
    assert code == 2 and err.count("\n") == 1 and "cannot be compiled here" in err and "--compile off" in err
    assert not (tmp_path / "runs").exists()


def test_bad_folders(photos, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    flags = [*SMALL, "--dataset", "folder", "--data-dir", folder]
    assert "no images in" in fails(flags, tmp_path, monkeypatch, capsys)
    for i, path in enumerate(sorted(photos.rglob("*.png"))):
        (folder / f"{i}.png").write_bytes(path.read_bytes())
    (folder / "broken.png").write_bytes(path.read_bytes()[:40])
    assert "broken.png" in fails(flags, tmp_path, monkeypatch, capsys)
    assert diffem.main([*map(str, flags), "--skip-bad-images", "--name", "skipped"]) == 0
    (folder / "broken.png").unlink()
    Image.new("RGB", (20, 9)).save(folder / "wide.png")
    err = fails([*flags, "--limit", 0], tmp_path, monkeypatch, capsys)
    assert "pixels, others " in err and "20x9" in err and "--image-size" in err
    assert diffem.main([*map(str, flags), "--image-size", "8", "--grey", "--name", "cropped"]) == 0
    capsys.readouterr()


def test_a_data_set_that_cannot_be_downloaded(tmp_path):
    code, out, err = script(*SMALL, "--dataset", "cifar10", cwd=tmp_path)
    assert code == 2 and "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert "cannot download cifar10" in last and "cifar-10-python.tar.gz" in last and str(tmp_path) in last


def test_bad_checkpoints_and_folders(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert diffem.main([*SMALL, "--name", "one"]) == 0
    capsys.readouterr()
    path = tmp_path / "runs/one/checkpoint.pt"
    whole = path.read_bytes()
    assert "runs/one exists" in fails([*SMALL, "--name", "one"], tmp_path, monkeypatch, capsys)
    assert "other values of parameters" in fails(
        ["--resume", "runs/one", "--rate", 0.3], tmp_path, monkeypatch, capsys
    )
    assert "other values of steps" in fails(
        ["--resume", "runs/one", "--steps", 4], tmp_path, monkeypatch, capsys
    )
    assert "dataset" in fails(["--resume", "runs/one", "--dataset", "mnist"], tmp_path, monkeypatch, capsys)
    for junk in (whole[: len(whole) // 2], b"junk", b"", whole[:-1000] + b"\0" * 1000):
        path.write_bytes(junk)
        assert "not a checkpoint" in fails(["--resume", "runs/one"], tmp_path, monkeypatch, capsys)
    torch.save({"weights": torch.zeros(3)}, path)
    assert "not a checkpoint" in fails(["--resume", "runs/one"], tmp_path, monkeypatch, capsys)
    path.write_bytes(whole)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["settings"]["channels"] = (16, 8)
    torch.save(checkpoint, path)
    assert "not those of its own settings" in fails(
        ["--resume", "runs/one", "--laps", 2], tmp_path, monkeypatch, capsys
    )


def test_a_run_on_other_data_is_not_resumed(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [*SMALL, "--dataset", "folder", "--data-dir", str(photos), "--image-size", "8", "--name", "one"]
    assert diffem.main(flags) == 0
    folder = tmp_path / "other"
    folder.mkdir()
    for i in range(60):
        Image.new("RGB", (8, 8), (i, i, i)).save(folder / f"{i}.png")
    capsys.readouterr()
    err = fails(["--resume", "runs/one", "--data-dir", folder, "--laps", 2], tmp_path, monkeypatch, capsys)
    assert "other data" in err


def test_nan_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    err = fails([*SMALL, "--lr", "1e6", "--name", "nan"], tmp_path, monkeypatch, capsys)
    assert re.search(r"lap 1, step \d", err)
    checkpoint = diffem.Checkpoint(tmp_path / "runs/nan")
    assert checkpoint.state["lap"] == 0 and all(
        w.isfinite().all() for w in checkpoint.state["denoiser"].values()
    )


def test_full_disk(tmp_path):
    """Files may grow to 60 kB: the pictures fit, the checkpoint does not."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # noqa: E731
    code, out, err = script(*SMALL, "--channels", 16, 32, "--name", "full", cwd=tmp_path, preexec_fn=limit)
    assert code == 2 and err.count("\n") == 1, err
    assert "cannot write" in err and "checkpoint.pt" in err
    assert not list((tmp_path / "runs/full").glob("*.new"))
