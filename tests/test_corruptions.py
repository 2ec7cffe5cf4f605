"""Corruptions against Pillow, scipy and dense linear algebra; what each says of x, in its own basis."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_image

import diffem
import export
from diffem import (
    CORRUPTIONS,
    Block,
    Blur,
    Corruption,
    DiffEMError,
    Downsample,
    Jpeg,
    Linear,
    Mask,
    Noise,
    dct,
    inverse,
    transform,
)


def photo(height: int, width: int, name: str = "china.jpg") -> np.ndarray:
    return np.ascontiguousarray(load_sample_image(name)[100 : 100 + height, 200 : 200 + width])


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


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_contract_of_corruptions(name, generator):
    corruption = CORRUPTIONS[name]()
    x = torch.rand(4, 3, 16, 16, generator=generator) * 4 - 2
    y = corruption(x, torch.Generator().manual_seed(1))
    assert y.shape == (4, 4, 16, 16)
    assert torch.equal(y, corruption(x, torch.Generator().manual_seed(1)))
    known = y[:, -1:]
    assert (y[:, :-1] * (1 - known) == 0).all()
    # what is observed differs from the forward map by noise of the stated size
    error = (y[:, :-1] - corruption.A(x)) * known
    assert float((error.square().sum() / (3 * known.sum())).sqrt()) == pytest.approx(
        corruption.noise, rel=0.15
    )
    # where nothing was observed, nothing is said
    nothing = torch.zeros_like(y)
    assert not any(v.any() for v in corruption.information(nothing))


@pytest.mark.parametrize("block, height, width", [(0, 7, 12), (1, 5, 6), (2, 6, 8), (8, 16, 24), (8, 13, 10)])
@pytest.mark.parametrize("channels", [1, 3])
def test_bases_are_orthonormal(block, height, width, channels, generator):
    x = torch.randn(2, channels, height, width, generator=generator)
    t = transform(x, block)
    torch.testing.assert_close(t.square().sum(), x.square().sum())
    torch.testing.assert_close(inverse(t, block), x, atol=1e-5, rtol=1e-5)
    for size in (height, width):
        D = dct(block, size, x.device)
        torch.testing.assert_close(D @ D.T, torch.eye(size), atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_whole_images_dct_is_scipys(channels, generator):
    """The three dimensions are colours, rows and columns."""
    from scipy.fft import dctn

    x = torch.randn(1, channels, 9, 12, generator=generator)
    expected = torch.from_numpy(dctn(x[0].numpy(), norm="ortho"))
    torch.testing.assert_close(transform(x, 0)[0], expected, atol=1e-5, rtol=1e-5)


def test_colours_become_opponent_colours():
    colours = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]])[:, :, None, None]  # grey, red - blue, ..
    t = transform(colours, 1)[:, :, 0, 0]
    torch.testing.assert_close(t, torch.diag(torch.tensor([3.0, 2, 6]).sqrt()))


def dense(corruption, shape, y):
    """A with its mask, and T, as matrices (d, d) in float64: columns are the images of unit vectors."""
    d = int(np.prod(shape))
    units = torch.eye(d).view(d, *shape)
    A = (corruption.A(units) * y[:1, -1:]).flatten(1).T.double()
    return A, transform(units, corruption.block).flatten(1).T.double()


LINEAR = [Mask(0.5, 0.1), Block(0.5, 0.3), Noise(0.7), Blur(1.0, 0.05), Downsample(2, 0.2)]


@pytest.mark.parametrize("corruption", LINEAR, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("channels", [1, 3])
def test_what_y_says_is_diagonal_in_the_corruptions_basis(corruption, channels, generator):
    """T A^T N^-1 A T^T = diag w and T A^T N^-1 y = h, N the noise's covariance."""
    shape = [channels, 8, 8]
    y = corruption(torch.randn(1, *shape, generator=generator), generator)
    A, T = dense(corruption, shape, y)
    N = corruption.noise**2 * torch.eye(len(A), dtype=torch.float64)
    if isinstance(
        corruption, Downsample
    ):  # each mean's noise is repeated factor^2 times: N = s^2 R R^T, and A = R M
        N = corruption.noise**2 * 4 * A
    J = T @ A.T @ torch.linalg.pinv(N, hermitian=True)
    w, h = (v.flatten().double() for v in corruption.information(y))
    torch.testing.assert_close(J @ A @ T.T, w.diag(), atol=1e-4 / corruption.noise**2, rtol=1e-4)
    torch.testing.assert_close(
        (J @ y[0, :-1].flatten().double()), h, atol=1e-4 / corruption.noise**2, rtol=1e-3
    )


def test_nothing_is_said_of_a_partly_hidden_image_where_the_basis_is_the_whole_image(generator):
    corruption = Blur()
    y = corruption(torch.randn(2, 1, 8, 8, generator=generator), generator)
    y[0, :, 3] = 0
    w, h = corruption.information(y)
    assert not w[0].any() and not h[0].any() and w[1].any()


@pytest.mark.parametrize("width", [0.6, 1.5, 2.0, 3.0, 9.0])
def test_blur_is_scipys(width, generator):
    x = torch.randn(1, 1, 24, 20, generator=generator)
    expected = gaussian_filter(x[0, 0].double().numpy(), width, mode="reflect")
    y = Blur(width=width, noise=0.0)(x, generator)
    torch.testing.assert_close(y[0, 0].double(), torch.from_numpy(expected), atol=1e-5, rtol=1e-5)


def test_downsample_repeats_block_means(generator):
    x = torch.randn(2, 3, 8, 8, generator=generator)
    value = Downsample(factor=4, noise=0.0)(x, generator)[:, :-1]
    means = x.reshape(2, 3, 2, 4, 2, 4).mean((3, 5))
    torch.testing.assert_close(value, means.repeat_interleave(4, 2).repeat_interleave(4, 3))
    error = Downsample(factor=4, noise=0.5)(torch.zeros(500, 1, 8, 8), generator)[:, :-1]
    torch.testing.assert_close(error[..., ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3), error)
    assert float(error.std()) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("quality", [5, 10, 20, 50, 75, 95])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("size", [(250, 256), (245, 251)])
def test_jpeg_is_pillows(quality, subsampling, grey, size, tmp_path, generator):
    """At most 0.2 grey levels off in the mean, and more than 2 in no more than 0.1 % of the values (with Pillow 13's libjpeg-turbo
    none is off at all); by quality and by tables."""
    if grey and subsampling:
        pytest.skip("grey images have no chroma")
    path, errors = tmp_path / "photo.jpg", []
    for name in ("china.jpg", "flower.jpg"):
        pixels = photo(*size, name)
        pixels = np.array(Image.fromarray(pixels).convert("L")) if grey else pixels
        Image.fromarray(pixels).save(path, quality=quality, subsampling=subsampling)
        expected = np.asarray(Image.open(path), np.float32)
        for corruption in (Jpeg(quality, subsampling), Jpeg(**export.jpeg_tables([path]))):
            ours = (corruption(to_tensor(pixels), generator)[0, :-1].permute(1, 2, 0).numpy() + 2) * (255 / 4)
            errors.append(np.abs(ours.squeeze() - expected))
    errors = np.stack(errors)
    assert errors.mean() <= 0.2 and (errors > 2.01).mean() <= 1e-3, (errors.mean(), (errors > 2.01).mean())
    assert np.abs(expected - pixels).mean() > 0.5  # it does something


def test_jpeg_of_a_batch_is_jpeg_of_each(generator):
    x = torch.cat([to_tensor(photo(32, 32)), to_tensor(photo(64, 64)[32:, 32:])])
    batch = Jpeg()(x, generator)
    assert torch.equal(batch, torch.cat([Jpeg()(x[:1], generator), Jpeg()(x[1:], generator)]))


class Dimmed(Corruption):
    """Half as bright, with noise: an own corruption that says nothing of w and h."""

    noise = 0.3

    def A(self, x):
        return 0.5 * x


def test_what_y_says_is_measured_where_it_is_not_told(generator):
    """y = x / 2 + s eps, x white of variance 2: the best linear estimate, of precision 1 / 2 + (1/2)^2 / s^2, has h = y / (2 s^2)."""
    corruption = Dimmed()
    x = (2**0.5 * torch.randn(4000, 1, 8, 8, generator=generator)).clamp(-2, 2)
    corruption.learn(x, generator)
    y = corruption(x[:100], generator)
    tt = float(x.square().mean())
    w, h = corruption.information(y)
    expected = 1 / (tt - (0.5 * tt) ** 2 / (0.25 * tt + 0.09)) - 1 / tt
    torch.testing.assert_close(w, torch.full_like(w, expected), rtol=0.03, atol=0)
    slope = (expected + 1 / tt) * 0.5 * tt / (0.25 * tt + 0.09)
    torch.testing.assert_close(h, slope * y[:, :1], rtol=0.03, atol=1e-3)
    y[0, :, 2:5] = 0
    w, _ = corruption.information(y)
    assert not w[0, 0, 2:5].any() and w[0, 0, 5:].all()


def test_a_negative_says_as_much_as_the_image(generator):
    class Negative(Dimmed):
        def A(self, x):
            return -0.5 * x

    x, (plain, negative) = torch.randn(500, 1, 8, 8, generator=generator).clamp(-2, 2), (Dimmed(), Negative())
    for corruption in (plain, negative):
        corruption.learn(x, torch.Generator().manual_seed(7))
    torch.testing.assert_close(negative.w, plain.w, rtol=0.05, atol=0)
    torch.testing.assert_close(negative.slope, -plain.slope, rtol=0.05, atol=0)


def test_observed_masks_hide_whole_patches_of_smaller_copies(generator):
    """Of an image of 32 pixels and its copies of 24 or 20, patches are observed or missing as a whole."""
    corruption = Downsample(2)
    known = (torch.rand(5, 1, 16, 16, generator=generator) > 0.3).float()
    corruption.masks = torch.nn.functional.interpolate(known, scale_factor=2).bool()
    for size in (32, 24, 20):
        m = corruption(torch.zeros(8, 3, size, size), generator)[:, -1:]
        assert 0.5 < m.mean() < 0.9
        assert torch.equal(torch.nn.functional.avg_pool2d(m, 2), m[..., ::2, ::2])


def test_lines_of_one_pixel_stay_in_squares_and_smaller_copies(generator):
    """Every eighth row is dead: of 24 rows 3 are. Masks are cut, not resized."""
    corruption = Mask(0.5)
    corruption.masks = torch.ones(4, 1, 32, 32, dtype=torch.bool)
    corruption.masks[:, :, ::8] = False
    m = corruption(torch.zeros(50, 3, 24, 24), generator)[:, -1]
    assert ((m == 0).all(2).sum(1) == 3).all() and ((m == 0).any(2).sum(1) == 3).all()
    assert len(m[:, :8, 0].argmin(1).unique()) > 4  # at many places


def test_jpegs_measured_precision_falls_with_the_quantisation(generator):
    """Of a smooth Gaussian's draws, y tells the more of a coefficient the finer it is quantised."""
    x = 0.7 * diffem.Gaussian([3, 32, 32], power=3.0).sample(200, generator)
    fine, coarse = Jpeg(90), Jpeg(10)
    for corruption in (fine, coarse):
        corruption.learn(x, generator)
    assert fine.w.shape == (3, 8, 8) and (fine.w[:, :2, :2] > 10 * coarse.w[:, :2, :2]).all()
    assert float(coarse.w[0, 0, 0]) > 100 * float(coarse.w[0, 7, 7])  # of the finest detail nothing is left


def test_jpeg_with_missing_pixels_says_what_the_others_tell(generator):
    """Of a smooth image, a fifth of the pixels missing: the mean of each block is told as well as before, with a fifth less weight;
    a block of which nothing is left says nothing, and one of which nothing is missing says what it did."""
    x = 0.7 * diffem.Gaussian([3, 32, 30], power=4.0).sample(100, generator)
    corruption = Jpeg(50)
    corruption.learn(x, generator)
    y = corruption(x, generator)
    m = (torch.rand(100, 1, 32, 30, generator=generator) > 0.2).float()
    m[..., :8, :8], m[..., 8:16, 24:] = 0, 1
    (w, h), (whole_w, whole_h) = (
        corruption.information(torch.cat([y[:, :-1] * m, m], 1)),
        corruption.information(y),
    )
    assert not (w[..., :8, :8].any() or h[..., :8, :8].any())
    torch.testing.assert_close(w[..., 8:16, 24:], whole_w[..., 8:16, 24:])
    torch.testing.assert_close(h[..., 8:16, 24:], whole_h[..., 8:16, 24:], atol=1e-3, rtol=1e-3)
    w, h, whole_w, whole_h = (
        v[:, 0, 16::8, 8::8] for v in (w, h, whole_w, whole_h)
    )  # grey, the means of blocks
    torch.testing.assert_close((w / whole_w).mean(), torch.tensor(0.8), atol=0.01, rtol=0)
    error = ((h / w - whole_h / whole_w).square().mean() / (whole_h / whole_w).square().mean()).sqrt()
    assert error < 0.05, float(error)


@pytest.mark.parametrize(
    "make",
    [lambda: Mask(rate=1.0), lambda: Block(rate=-0.1), lambda: Noise(-1.0), lambda: Blur(width=0.0), lambda: Jpeg(0),
     lambda: Jpeg(101), lambda: Downsample(factor=0), lambda: Mask(rate=float("nan"))],
)  # fmt: skip
def test_bad_parameters(make):
    with pytest.raises(DiffEMError):
        make()


def test_linear_corruptions_are_those_with_a_known_precision():
    assert {name for name, cls in CORRUPTIONS.items() if issubclass(cls, Linear)} == CORRUPTIONS.keys() - {
        "jpeg"
    }
