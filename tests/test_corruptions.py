"""Corruptions against Pillow, torchvision and dense linear algebra."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from diffem import CORRUPTIONS, Block, Blur, DiffEMError, Downsample, Jpeg, Mask, Noise, Projection, jpeg_parameters

IMAGE_CORRUPTIONS = [name for name in CORRUPTIONS if name != "projection"]


def photo(height: int, width: int) -> np.ndarray:
    return np.ascontiguousarray(load_sample_image("china.jpg")[100 : 100 + height, 200 : 200 + width])


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() * (4 / 255) - 2


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("cls", [Mask, Block])
def test_masks_hit_their_rate(cls, rate, generator):
    corruption = cls(rate=rate, noise=0.0)
    x = 1 + torch.rand(400, 3, 16, 16, generator=generator)
    y = corruption(x, generator)
    known = y[:, -1:]
    assert set(known.unique().tolist()) <= {0.0, 1.0}
    tolerance = 5 * np.sqrt(rate * (1 - rate) / known.numel()) if cls is Mask else 0.5 / 256
    assert abs(1 - known.mean() - rate) <= tolerance + 1e-6
    assert torch.equal(y[:, :-1], x * known)
    if rate:
        assert not torch.equal(known[0], known[1])


def test_block_is_structured(generator):
    """Neighbours share their fate far more often than in a random mask of the same rate (1/2 of the pairs)."""
    known = Block(rate=0.5)(torch.zeros(200, 1, 32, 32), generator)[:, -1]
    assert (known[:, 1:] == known[:, :-1]).float().mean() > 0.85
    assert (known[:, :, 1:] == known[:, :, :-1]).float().mean() > 0.85


@pytest.mark.parametrize("name", IMAGE_CORRUPTIONS)
def test_contract_of_image_corruptions(name, generator):
    corruption = CORRUPTIONS[name]()
    x = torch.rand(4, 3, 16, 16, generator=generator) * 4 - 2
    y = corruption(x, torch.Generator().manual_seed(1))
    assert y.shape == (4, 4, 16, 16)
    assert torch.equal(y, corruption(x, torch.Generator().manual_seed(1)))
    measured = corruption.measure(x, y)
    assert measured.shape == corruption.value(y).shape == x.shape
    assert (measured * (1 - y[:, -1:]) == 0).all()
    # what is observed differs from the forward map by noise of the stated size
    error = (corruption.value(y) - measured) * y[:, -1:]
    rms = float((error.square().sum() / (3 * y[:, -1:].sum())).sqrt())
    assert rms == pytest.approx(corruption.noise, rel=0.15)
    assert (corruption.measure(x, torch.zeros_like(y)) == 0).all()
    if corruption.linear:
        a, b = torch.randn(2, *x.shape, generator=generator)
        both = corruption.measure(2 * a - b, y)
        torch.testing.assert_close(both, 2 * corruption.measure(a, y) - corruption.measure(b, y), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("width", [0.6, 1.5, 3.0])
def test_blur_is_a_gaussian_mirrored_at_the_border(width, generator):
    x = torch.randn(24, 20, generator=generator, dtype=torch.float64)
    radius = int(np.ceil(3 * width))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / width) ** 2)
    A, B = (np.zeros((n, n)) for n in x.shape)
    for K in (A, B):
        for i in range(len(K)):
            for j, k in zip(range(i - radius, i + radius + 1), kernel / kernel.sum()):
                K[i, abs(j) if j < len(K) else 2 * (len(K) - 1) - j] += k
    corruption = Blur(width=width, noise=0.0)
    value = corruption.value(corruption(x.float()[None, None], generator))
    torch.testing.assert_close(value[0, 0].double(), torch.from_numpy(A) @ x @ torch.from_numpy(B.T), atol=1e-5, rtol=1e-5)


def test_downsample_repeats_block_means(generator):
    x = torch.randn(2, 3, 8, 8, generator=generator)
    value = Downsample(factor=4, noise=0.0).value(Downsample(factor=4, noise=0.0)(x, generator))
    means = x.reshape(2, 3, 2, 4, 2, 4).mean((3, 5))
    torch.testing.assert_close(value, means.repeat_interleave(4, 2).repeat_interleave(4, 3))
    noisy = Downsample(factor=4, noise=0.5)
    error = noisy.value(noisy(torch.zeros(500, 1, 8, 8), generator))
    assert torch.equal(error[..., ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3), error)
    assert float(error.std()) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("quality, subsampling", [(10, 0), (50, 2), (95, 1)])
@pytest.mark.parametrize("shape", [(256, 256, 3), (245, 251, 3), (245, 250)])
def test_jpeg_is_that_of_a_file(quality, subsampling, shape, tmp_path, generator):
    """By its quality, and by the tables that stand in the file."""
    pixels = photo(*shape[:2])
    pixels = pixels if len(shape) == 3 else np.array(Image.fromarray(pixels).convert("L"))
    path = tmp_path / "photo.jpg"
    Image.fromarray(pixels).save(path, quality=quality, subsampling=subsampling)
    expected = to_tensor(np.asarray(Image.open(path)))
    for corruption in (Jpeg(quality, subsampling), Jpeg(**jpeg_parameters([path]))):
        torch.testing.assert_close(corruption.value(corruption(to_tensor(pixels), generator)), expected)
    assert not torch.equal(expected, to_tensor(pixels))


def test_jpeg_of_a_batch_is_jpeg_of_each(generator):
    x = torch.cat([to_tensor(photo(32, 32)), to_tensor(photo(64, 64)[32:, 32:])])
    batch = Jpeg()(x, generator)
    assert torch.equal(batch, torch.cat([Jpeg()(x[:1], generator), Jpeg()(x[1:], generator)]))


def test_projection_rows_are_unit_and_fresh(generator):
    corruption = Projection(rows=3, noise=0.1)
    x = torch.randn(5000, 5, generator=generator)
    y = corruption(x, generator)
    A = y[..., :-1]
    assert y.shape == (5000, 3, 6)
    torch.testing.assert_close(A.norm(dim=-1), torch.ones(5000, 3))
    error = y[..., -1] - torch.einsum("bmd,bd->bm", A, x)
    assert float(error.std()) == pytest.approx(0.1, rel=0.05)
    assert A.flatten(1).mean(0).abs().max() < 0.05


def dense(corruption, y):
    """A of the closed forms, as a matrix on flattened x: (d', d), with s^2."""
    d = corruption.clean_shape(y)[1:]
    basis = torch.eye(int(np.prod(d)), dtype=torch.float64).view(-1, *d)
    return torch.cat([corruption.measure(e[None], y).flatten(1) for e in basis]).T, corruption.noise**2


@pytest.mark.parametrize("sigma", [0.01, 0.3, 5.0])
@pytest.mark.parametrize("corruption", [Mask(0.5, 0.1), Block(0.5, 1e-3), Noise(0.7), Projection(2, 0.05)])
def test_preconditioning_is_the_gaussian_posterior(corruption, sigma, generator):
    """Mean and covariance of x0 given xt and y under x0 ~ N(0, I), against dense linear algebra."""
    shape = [4] if isinstance(corruption, Projection) else [1, 3, 3]
    x0 = torch.randn(1, *shape, generator=generator, dtype=torch.float64)
    y = corruption(x0.float(), generator).double()
    xt = x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    level = torch.full([1] * xt.ndim, sigma, dtype=torch.float64)
    mean, root = corruption.precondition(xt, level, y)
    A, s2 = dense(corruption, y)
    C = torch.linalg.inv(torch.eye(A.shape[1], dtype=torch.float64) * (1 + 1 / sigma**2) + A.T @ A / s2)
    expected = C @ (A.T @ corruption.value(y).flatten() / s2 + xt.flatten() / sigma**2)
    torch.testing.assert_close(mean.flatten(), expected, atol=1e-6, rtol=1e-5)
    root = root[0] if isinstance(corruption, Projection) else torch.diag(root.flatten())
    torch.testing.assert_close(root @ root.T, C, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("name", ["mask", "block", "noise", "projection"])
def test_preconditioning_is_edms_when_nothing_is_observed(name, generator):
    corruption = CORRUPTIONS[name]()
    shape = [5] if name == "projection" else [3, 8, 8]
    xt = 3 * torch.randn(6, *shape, generator=generator)
    y = torch.zeros_like(corruption(xt, generator))
    sigma = torch.logspace(-2, 1, 6).view(-1, *[1] * len(shape))
    mean, root = corruption.precondition(xt, sigma, y)
    edm_mean, edm_root = Blur().precondition(xt, sigma, y)
    torch.testing.assert_close(mean, edm_mean)
    if name == "projection":
        edm_root = torch.diag_embed(edm_root)
    torch.testing.assert_close(root, edm_root)


def test_a_noise_free_mask_is_kept_exactly(generator):
    corruption = Mask(rate=0.5, noise=0.0)
    x0 = torch.randn(2, 1, 8, 8, generator=generator)
    y = corruption(x0, generator)
    mean, root = corruption.precondition(torch.randn(x0.shape, generator=generator), torch.full((2, 1, 1, 1), 0.5), y)
    known = y[:, -1:] > 0
    torch.testing.assert_close(mean[known], x0[known])
    assert (root[known] == 0).all()


@pytest.mark.parametrize(
    "make",
    [lambda: Mask(rate=1.0), lambda: Block(rate=-0.1), lambda: Noise(-1.0), lambda: Blur(width=0.0), lambda: Jpeg(0),
     lambda: Jpeg(101), lambda: Downsample(factor=0), lambda: Projection(noise=0.0), lambda: Mask(rate=float("nan"))],
)  # fmt: skip
def test_bad_parameters(make):
    with pytest.raises(DiffEMError):
        make()
