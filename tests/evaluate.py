"""Standard metrics of a run:  python tests/evaluate.py runs/NAME

Writes restored and new images to runs/NAME/samples as PNG, and prints PSNR and SSIM where the truth is known, and FID, IS, KID,
precision and recall by torch-fidelity (pip install torch-fidelity) where there are clean images to compare with.
"""

import argparse
import importlib.util
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import diffem  # noqa: E402


def write_images(folder: Path, x: torch.Tensor) -> None:
    """x (N, C, H, W) in [-2, 2] as 00000.png, 00001.png, .. in a folder that holds nothing else."""
    from PIL import Image

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pixels = (
        ((x.clamp(-2, 2) + 2) * (255 / 4)).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    )  # (N, H, W, C)
    for i, image in enumerate(pixels):
        Image.fromarray(image.squeeze(-1) if x.shape[1] == 1 else image).save(folder / f"{i:05d}.png")


def ssim(x: torch.Tensor, x0: torch.Tensor) -> float:
    """Structural similarity (Wang et al. 2004), by a Gaussian window of 1.5 pixels cut at 11x11, or at a small image."""
    from torchvision.transforms.functional import gaussian_blur

    radius = min(5, (min(x.shape[-2:]) - 1) // 2)
    blurred = (gaussian_blur(v, 2 * radius + 1, 1.5) for v in (x, x0, x * x, x0 * x0, x * x0))
    mean, mean0, xx, yy, xy = (
        F.pad(v, [-radius] * 4) for v in blurred
    )  # where the window lies within the image
    c1, c2 = (0.01 * 4) ** 2, (0.03 * 4) ** 2
    luminance = (2 * mean * mean0 + c1) / (mean**2 + mean0**2 + c1)
    return float((luminance * (2 * (xy - mean * mean0) + c2) / (xx - mean**2 + yy - mean0**2 + c2)).mean())


def fidelity(folder: Path, reference: Path, device: str, weights: str | None) -> dict:
    """FID, IS, KID, precision and recall of a folder of images, by torch-fidelity."""
    try:
        from torch_fidelity import calculate_metrics
    except ImportError as error:
        raise diffem.DiffEMError(
            "FID, IS, KID, precision and recall need torch-fidelity: pip install torch-fidelity"
        ) from error
    number = min(len(list(path.iterdir())) for path in (folder, reference))
    try:
        metrics = calculate_metrics(
            input1=str(folder), input2=str(reference), cuda=device == "cuda", isc=True, fid=True, kid=True, prc=True,
            kid_subset_size=min(1000, number), feature_extractor="inception-v3-compat", feature_layer_prc="2048",
            feature_extractor_weights_path=weights, verbose=False, cache=False, save_cpu_ram=True,
        )  # fmt: skip
    except Exception as error:  # of the download, of the weights, of torch-fidelity
        reason = " ".join(str(error).split())[:200]
        raise diffem.DiffEMError(
            f"torch-fidelity fails ({reason}); its weights may be given as --inception-weights FILE"
        ) from error
    names = dict(frechet_inception_distance="FID", inception_score_mean="IS", kernel_inception_distance_mean="KID",
                 recall="precision", precision="recall")  # fmt: skip  # torch-fidelity takes input1 for the real ones
    return {short: metrics[name] for name, short in names.items()}


def evaluate(options: argparse.Namespace) -> None:
    folder, number = Path(options.run), options.num_samples
    diffem.require(number >= 2, "--num-samples takes 2 or more")
    checkpoint, device = diffem.Checkpoint(folder), "cuda" if torch.cuda.is_available() else "cpu"
    settings, model = checkpoint.settings, diffem.load(checkpoint, best=options.best, device=device)
    data = diffem.make_data(settings)
    y, truth, reference = (
        torch.cat([data.held_out, diffem.as_float(data.y[:number], "cpu")])[:number],
        data.truth,
        None,
    )
    if options.reference:  # read before anything is sampled, so that a wrong folder costs nothing
        (H, W), like = y.shape[-2:], dict(dataset="folder", data_dir=options.reference)
        like |= dict(observations="", masks="", invert_masks=False, image_size=H if H == W else 0)
        like = replace(settings, **like)
        reference = diffem.values(diffem.read_images(diffem.image_files(like), like))
        available = sys.modules.get("torch_fidelity") or importlib.util.find_spec("torch_fidelity")
        diffem.require(bool(available), "FID needs torch-fidelity: pip install torch-fidelity")
    elif truth is not None:
        reference = diffem.values(diffem.load_images(settings)[0])
    generator = diffem.generator_for(device, settings.seed, 0, 7)

    def draw(y: torch.Tensor, steps: int) -> torch.Tensor:
        parts, method = (
            tqdm(y.split(settings.sample_batch), desc="sampling", leave=False, disable=None),
            options.method or settings.method,
        )
        return torch.cat([model.sample(part.to(device), steps, method, generator).cpu() for part in parts])

    posterior = draw(y, options.sample_steps or settings.sample_steps)
    steps = options.unconditional_steps or settings.unconditional_steps
    unconditional = draw(torch.zeros_like(y[:1]).expand(number, -1, -1, -1), steps)
    for name, x in (("posterior", posterior), ("unconditional", unconditional)):
        write_images(folder / "samples" / name, x)
        print(f"{folder}/samples/{name}: {len(x)} images")
    if truth is not None:
        x, truth = (v[: min(len(truth), number)] for v in (posterior, truth))
        print(
            f"posterior, {len(x)} held-out images: PSNR {diffem.psnr(x, truth):.2f} dB, SSIM {ssim(x, truth):.3f}"
        )
    if reference is None:
        print("FID and the like need clean images to compare with: --reference FOLDER")
        return
    write_images(folder / "samples" / "reference", reference)
    for name in ("posterior", "unconditional"):
        metrics = fidelity(
            folder / "samples" / name, folder / "samples" / "reference", device, options.inception_weights
        )
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in metrics.items()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", metavar="runs/NAME")
    parser.add_argument("--num-samples", type=int, default=1000, help="images of each kind (default: 1000)")
    parser.add_argument(
        "--reference",
        metavar="FOLDER",
        help="clean images (default: those that the run's data were made from)",
    )
    parser.add_argument("--method", help="sampler (default: the run's)")
    parser.add_argument(
        "--sample-steps", type=int, help="evaluations to restore an image (default: the run's)"
    )
    parser.add_argument(
        "--unconditional-steps", type=int, help="evaluations to sample a new image (default: the run's)"
    )
    parser.add_argument(
        "--best", action="store_true", help="the lap with the best energy score, not the last one"
    )
    parser.add_argument(
        "--inception-weights", metavar="FILE", help="Inception's, where they cannot be downloaded"
    )
    try:
        evaluate(parser.parse_args(argv))
    except (diffem.DiffEMError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
