"""Metrics that need the truth, and features of images, by which two sets of images are compared."""

import argparse

import table
import torch
import torch.nn.functional as F
from evaluate import ssim
from torch import Tensor, nn
from tqdm import tqdm

import diffem


def observed(text: str, settings: diffem.Settings, *images: Tensor) -> list[Tensor]:
    """Observations of each of the sets of clean images."""
    generator, corruption = diffem.generator_for("cpu", settings.seed, 0, 0), table.named_corruption(text)
    return [corruption(x, generator) for x in images]


def accuracy(x: Tensor, y: Tensor, truth: Tensor, corruption: diffem.Corruption) -> dict:
    """That of diffem.py, and SSIM, of posterior samples x (S, B, C, H, W) given y."""
    similarity = dict(ssim=ssim(x[0], truth), ssim_mean=ssim(x.mean(0), truth))
    return diffem.accuracy(x, y, truth, corruption) | similarity


def measure(state: diffem.State, y: Tensor, truth: Tensor, settings: diffem.Settings, distance) -> dict:
    """A row for a complete lap, by held-out observations y. distance: of images from the clean ones."""
    x, new = diffem.draw_samples(state, y, settings)
    row = accuracy(x, y, truth, state.denoiser.corruption) | diffem.scores(state, y, settings)
    return row | dict(frechet=distance(x[0]), frechet_new=distance(new))


@torch.no_grad()
def frechet(features, x: Tensor, x0: Tensor) -> float:
    """The Frechet distance of two sets of images in these features."""
    f, f0 = (torch.cat([features(part.clamp(-2, 2)) for part in images.split(500)]) for images in (x, x0))
    return diffem.frechet_distance(f, f0)


def principal_components(x0: Tensor):
    """Features of small images: their 32 principal components."""
    fitted = diffem.Gaussian(list(x0.shape[1:]), 32).fit(x0, diffem.generator_for("cpu", 0))
    return lambda x: diffem.transform(x - fitted.mean, 0).flatten(1) @ F.normalize(fitted.U, dim=0)


def read_classes(options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Images x0 (N, 3, H, W) in [-2, 2], other images to hold out, and the classes of x0 (N,), which are the
    names of their folders."""
    settings = diffem.Settings(dataset="folder", data_dir=options.data_dir)
    files, held_out = diffem.image_files(settings), options.held_out
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
    files = [files[i] for i in order[: options.images + held_out]]
    names = sorted({file.parent.name for file in files})
    classes = torch.tensor([names.index(file.parent.name) for file in files[:-held_out]])
    x = diffem.values(diffem.read_images(files, settings))
    return x[:-held_out], x[-held_out:], classes


def train_classifier(x0: Tensor, classes: Tensor) -> nn.Module:
    """A small network for the classes of clean images. Returns the part of it that gives 64 features."""
    torch.manual_seed(0)
    layers = [
        layer
        for a, b in ((3, 32), (32, 64), (64, 128))
        for layer in (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.SiLU(), nn.AvgPool2d(2))
    ]
    features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 64), nn.SiLU())
    head = nn.Linear(64, int(classes.max()) + 1)
    optimizer = torch.optim.Adam([*features.parameters(), *head.parameters()], lr=2e-3)
    for _ in tqdm(range(10), desc="classifier", leave=False, disable=None):
        for batch in torch.randperm(len(x0)).split(128):
            loss = F.cross_entropy(head(features(x0[batch])), classes[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    features.eval()
    with torch.no_grad():
        right = (head(features(x0[-1000:])).argmax(1) == classes[-1000:]).float().mean()
    print(f"classifier: {100 * float(right):.0f} % right on its training images")
    return features
