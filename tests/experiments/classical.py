"""Classical restoration by scikit-image, beside DiffEM:  python tests/experiments/classical.py --data-dir DIR

A row for each corruption: PSNR, SSIM and Frechet distance, in the features of a small classifier, of held-out
photographs as observed and as restored. Missing pixels: biharmonic inpainting; blur: Wiener filter and
Richardson-Lucy; noise: non-local means; downsampling: bicubic; JPEG: total variation. What such a method
leaves open is chosen by the truth, in its favour. --data-dir: a folder for each class.
"""

import numpy as np
import table
import torch
import torch.nn.functional as F
from evaluate import ssim
from features import frechet, observed, read_classes, train_classifier
from skimage import restoration
from torch import Tensor

import diffem


def each(function, y: Tensor) -> Tensor:
    """Of observations y, by a function of one image (H, W, C) from 0 to 1 and its mask (H, W)."""
    pixels = ((y[:, :-1] + 2) / 4).permute(0, 2, 3, 1).numpy()
    images = [function(image, mask > 0) for image, mask in zip(pixels, y[:, -1].numpy())]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().clamp(0, 1) * 4 - 2


def point_spread(width: float) -> np.ndarray:
    kernel = np.exp(-0.5 * (np.arange(-int(4 * width + 0.5), int(4 * width + 0.5) + 1) / width) ** 2)
    return np.outer(kernel, kernel) / kernel.sum() ** 2


def padded(image: np.ndarray, function) -> np.ndarray:
    """A deconvolution of each channel of an image that is mirrored at its border, and so becomes periodic."""
    h, w = (n // 2 for n in image.shape[:2])
    wide = np.pad(image, [(h, h), (w, w), (0, 0)], mode="symmetric")
    return np.stack([function(wide[..., c]) for c in range(image.shape[2])], 2)[h:-h, w:-w]


def methods(corruption: diffem.Corruption) -> dict:
    """By name, functions of observations y (N, C + 1, H, W)."""
    name, found = type(corruption).__name__.lower(), {}
    if name in ("mask", "block"):
        inpaint = restoration.inpaint_biharmonic
        found["biharmonic"] = lambda y: each(lambda x, m: inpaint(x, ~m, channel_axis=-1), y)
    if name == "noise":
        for h in (0.4, 0.6, 0.8):
            how = dict(patch_size=3, patch_distance=7, sigma=corruption.noise / 4, h=h * corruption.noise / 4)
            found[f"non-local means, h {h}"] = lambda y, how=how: each(
                lambda x, m: restoration.denoise_nl_means(x, channel_axis=-1, **how), y
            )
    if name == "blur":
        psf = point_spread(corruption.width)
        for b in (1e-5, 1e-4, 1e-3):
            found[f"Wiener, {b}"] = lambda y, b=b: each(
                lambda x, m: padded(x, lambda u: restoration.wiener(u, psf, b)), y
            )
        for n in (20, 80, 320):
            found[f"Richardson-Lucy, {n}"] = lambda y, n=n: each(
                lambda x, m: padded(x, lambda u: restoration.richardson_lucy(u.clip(1e-3), psf, n)), y
            )
    if name == "downsample":
        f = corruption.factor
        found["bicubic"] = lambda y: F.interpolate(y[:, :-1, ::f, ::f], scale_factor=f, mode="bicubic")
    if name == "jpeg":
        for w in (0.01, 0.03, 0.06):
            found[f"total variation, {w}"] = lambda y, w=w: each(
                lambda x, m: restoration.denoise_tv_chambolle(x, w, channel_axis=-1), y
            )
    return found


def main() -> None:
    named = [
        "mask 0.75",
        "mask 0.9",
        "blur 1.0",
        "blur 2.0 0.001",
        "noise 0.5",
        "downsample 2",
        "jpeg 10",
        "jpeg 50",
    ]
    options = table.parse(__doc__, data_dir="data", images=10_000, held_out=500, corruptions=named)
    x0, truth, classes = read_classes(options)
    features, rows = train_classifier(x0, classes), []
    for text in options.corruptions:
        (y,) = observed(text, table.preset("folder", text), truth)
        for name, method in (
            {"observed": lambda y: y[:, :-1]} | methods(table.named_corruption(text))
        ).items():
            x = method(y)
            row = dict(corruption=text, method=name, psnr=diffem.psnr(x, truth), ssim=ssim(x, truth))
            rows.append(row | dict(frechet=frechet(features, x, x0)))
            table.show(rows[-1])
    table.table("Classical methods", rows, vars(options))


if __name__ == "__main__":
    main()
