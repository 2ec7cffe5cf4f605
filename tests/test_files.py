"""Users' files: what each is, and what it must be read as, or the one line that refuses it. Small files of many kinds."""

import io
import itertools
import os
import re
import struct
import subprocess
import sys
import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffem
import export
from export import DiffEMError, find_images, find_mask, read_image, read_mask

RNG = np.random.default_rng(0)
P = RNG.integers(1, 255, (6, 8, 3)).astype(np.uint8)  # a photo, without pure black or white
G = P[..., 0]
K = np.ones((6, 8), bool)  # where it is observed
K[2:4, 3:6] = False
A = (255 * K).astype(np.uint8)
RED = np.where(K[..., None], P, np.array([255, 0, 0], np.uint8))


def png16(path: Path, array: np.ndarray, colour: int, transparent: int | None = None, bits: int = 16):
    """A PNG of 16 bits, or of 4: Pillow does not write those in colour, or with a transparent grey."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = array.shape[:2]
    packed = array[:, ::2] << 4 | array[:, 1::2] if bits == 4 else array
    rows = b"".join(b"\0" + row.astype("u1" if bits == 4 else ">u2").tobytes() for row in packed)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    head += chunk(b"tRNS", struct.pack(">H", transparent)) if transparent is not None else b""
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def pillow(array, mode=None, **options):
    """A function that writes an array by Pillow."""

    def write(path):
        image = array if isinstance(array, Image.Image) else Image.fromarray(array)
        (image.convert(mode) if mode else image).save(path, **options)

    return write


def turned(orientation, transpose, mode=None, array=None, **options):
    def write(path):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = Image.fromarray(P if array is None else array).transpose(transpose)
        (image.convert(mode) if mode else image).save(path, exif=exif, **options)

    return write


def tiff(array: np.ndarray, bits: int, planar: int = 1):
    """A function that writes a plain TIFF of kinds that Pillow does not write: the array holds its bytes."""
    samples, (height, width) = (3, array.shape[-2:]) if planar == 2 else (1, array.shape[:2])

    def write(path):
        size = array.nbytes // samples
        tags = {256: [width], 257: [height], 258: [bits] * samples, 259: [1], 262: [2 if samples == 3 else 1]}
        tags |= {
            273: [8 + i * size for i in range(samples)],
            277: [samples],
            278: [height],
            279: [size] * samples,
            284: [planar],
        }
        entries, rest, place = b"", b"", 8 + array.nbytes + 2 + 12 * len(tags) + 4
        for tag, numbers in tags.items():
            data = struct.pack(f"<{len(numbers)}I", *numbers)
            where = data if len(data) == 4 else struct.pack("<I", place + len(rest))
            rest += data if len(data) > 4 else b""
            entries += struct.pack("<HHI", tag, 4, len(numbers)) + where
        head = b"II*\0" + struct.pack("<I", 8 + array.nbytes) + array.tobytes()
        path.write_bytes(head + struct.pack("<H", len(tags)) + entries + b"\0" * 4 + rest)

    return write


def pages(path):
    image = Image.fromarray(G)
    image.save(path, save_all=True, append_images=[Image.fromarray(G // 2), image])


def array(values):
    return lambda path: np.save(path, values)


def palette(values):
    image = Image.fromarray(values.astype(np.uint8), "P")
    image.putpalette([0, 0, 0, 255, 255, 255] + [0] * 762)
    return image


GREY3 = np.dstack([G] * 3)
F = G.astype(np.float32) / 255
SIXTEEN = G.astype(np.uint16) * 257
CMYK = np.asarray(Image.fromarray(P).convert("CMYK").convert("RGB"))
T = Image.Transpose
# name, how it is written, channels to read, values from 0 to 255 (a tolerance beside them for lossy ones), observed
GOOD = [
    ("rgb.png", pillow(P), 3, P, None),
    ("rgb.bmp", pillow(P), 3, P, None),
    ("rgb.tif", pillow(P), 3, P, None),
    ("rgb.TIFF", pillow(P), 3, P, None),
    ("rgb.ppm", pillow(P), 3, P, None),
    ("rgb.tga", pillow(P), 3, P, None),
    ("rgb.webp", pillow(P, lossless=True), 3, P, None),
    ("rgb.jpg", pillow(P, quality=100, subsampling=0), 3, (P, 4), None),
    ("progressive.JPEG", pillow(P, quality=100, subsampling=0, progressive=True), 3, (P, 4), None),
    ("grey.png", pillow(G), 3, GREY3, None),
    ("grey.png", pillow(G), 1, G[..., None], None),
    ("grey.jpg", pillow(G, quality=100), 3, (GREY3, 4), None),
    ("rgb as grey.png", pillow(P), 1, np.asarray(Image.fromarray(P).convert("L"))[..., None], None),
    ("bit.png", pillow(G > 100), 3, np.dstack([255 * (G > 100)] * 3), None),
    ("palette.png", pillow(Image.fromarray(np.dstack([RED])).quantize(256)), 3, (RED, 8), None),
    ("palette.gif", pillow(palette(K)), 3, np.dstack([A] * 3), None),
    ("cmyk.jpg", pillow(P, "CMYK", quality=100, subsampling=0), 3, (CMYK, 6), None),
    ("cmyk.tif", pillow(P, "CMYK"), 3, CMYK, None),
    ("ycbcr.tif", pillow(P, "YCbCr"), 3, (P, 3), None),
    ("alpha.png", pillow(np.dstack([P, A])), 3, P, K),
    ("alpha.tif", pillow(np.dstack([P, A])), 3, P, K),
    ("alpha.webp", pillow(np.dstack([P, A]), lossless=True, exact=True), 3, P, K),
    ("alpha as grey.png", pillow(np.dstack([GREY3, A])), 1, G[..., None], K),
    ("grey alpha.png", pillow(np.dstack([G, A])), 3, GREY3, K),
    ("grey alpha.png", pillow(np.dstack([G, A])), 1, G[..., None], K),
    ("soft.png", pillow(np.dstack([P, np.where(K, 255, 200).astype(np.uint8)])), 3, P, K),
    ("nearly opaque.png", pillow(np.dstack([P, np.where(K, 255, 254).astype(np.uint8)])), 3, P, K),
    ("nearly transparent.png", pillow(np.dstack([P, np.where(K, 255, 1).astype(np.uint8)])), 3, P, K),
    ("palette with alpha.png", pillow(Image.fromarray(np.dstack([RED, A])).quantize(64)), 3, (RED, 60), K),
    ("grey trns.png", pillow(np.where(K, G, 0).astype(np.uint8), transparency=0), 3, GREY3, K),
    ("grey trns as grey.png", pillow(np.where(K, G, 0).astype(np.uint8), transparency=0), 1, G[..., None], K),
    ("rgb trns.png", pillow(P * K[..., None], transparency=(0, 0, 0)), 3, P, K),
    ("grey 16.png", pillow(SIXTEEN), 1, G[..., None], None),
    ("grey 16 as colour.png", pillow(SIXTEEN), 3, GREY3, None),
    ("grey 16.tif", pillow(SIXTEEN), 1, G[..., None], None),
    ("grey 16 trns.png", lambda p: png16(p, np.where(K, SIXTEEN, 7), 0, 7), 1, G[..., None], K),
    ("float.tif", pillow(F), 1, G[..., None], None),
    ("float as colour.tif", pillow(F), 3, GREY3, None),
    ("float nan.tif", pillow(np.where(K, F, np.nan).astype(np.float32)), 1, G[..., None], K),
    ("colour.npy", array(P / 255), 3, P, None),
    ("colour nan.npy", array(np.where(K[..., None], P / 255, np.nan)), 3, P, K),
    ("one channel nan.npy", array(np.where(K[..., None] | [True, False, True], P / 255, np.nan)), 3, P, K),
    ("infinite.npy", array(np.where(K[..., None], P / 255, np.inf)), 3, P, K),
    ("grey.npy", array(F), 1, G[..., None], None),
    ("grey float16.npy", array(F.astype(np.float16)), 1, (G[..., None], 0.2), None),
    ("photo[1].png", pillow(P), 3, P, None),
    ("scan.2024.01.png", pillow(P), 3, P, None),
    ("été 猫 (1).png", pillow(P), 3, P, None),
    ("profile.png", pillow(P, icc_profile=b"x" * 200, dpi=(600, 600)), 3, P, None),
    *(
        (f"turned{o}.{end}", turned(o, t, **kind), 3, (P, tolerance), None)
        for end, kind, tolerance in (
            ("jpg", dict(quality=100, subsampling=0), 4),
            ("png", {}, 0),
            ("tif", {}, 0),
        )
        for o, t in ((6, T.ROTATE_90), (3, T.ROTATE_180), (8, T.ROTATE_270), (2, T.FLIP_LEFT_RIGHT))
    ),
    # Raw ones, which Pillow would map into memory
    ("turned L.tif", turned(6, T.ROTATE_90, array=G), 3, GREY3, None),
    ("turned RGBA.tif", turned(8, T.ROTATE_270, array=np.dstack([P, A])), 3, P, K),
    ("turned CMYK.tif", turned(6, T.ROTATE_90, "CMYK"), 3, CMYK, None),
    ("turned 16.tif", turned(8, T.ROTATE_270, array=SIXTEEN), 1, G[..., None], None),
]
# name, how it is written, channels, what the message must say
BAD = [
    ("rgb 16.png", lambda p: png16(p, P.astype(np.uint16) * 256 + 128, 2), 3, "16 bits"),
    ("rgba 16.png", lambda p: png16(p, np.dstack([P, A]).astype(np.uint16) * 257, 6), 3, "16 bits"),
    ("grey alpha 16.png", lambda p: png16(p, np.dstack([G, A]).astype(np.uint16) * 257, 4), 1, "16 bits"),
    ("planar 16.tif", tiff(np.moveaxis(P, 2, 0).astype("<u2") * 256 + 5, 16, planar=2), 3, "16 bits"),
    ("grey 12.tif", tiff(np.resize(G, (6, 12)).view("<u1")[:, :8].copy(), 12), 1, "12 bits"),
    ("rgb 16.ppm", lambda p: p.write_bytes(b"P6 8 6 65535\n" + P.astype(">u2").tobytes()), 3, "16 bits"),
    ("rgb 12.ppm", lambda p: p.write_bytes(b"P3 1 1 4095 4095 7 9\n"), 3, "16 bits"),
    ("rgb.sgi", pillow(P), 3, "SGI is not supported"),
    ("rgb.jp2", pillow(P), 3, "JPEG2000 is not supported"),
    ("grey 4 trns.png", lambda p: png16(p, np.where(K, G // 17, 15), 0, 15, 4), 1, "2 or 4 bits with transp"),
    ("pages.tif", pages, 3, "3 pages"),
    ("film.gif", pages, 3, "3 pages or frames"),
    ("film.webp", pages, 3, "3 pages or frames"),
    ("counts.tif", pillow(G.astype(np.float32) * 40), 1, "from 0 to 1"),
    ("negative.tif", pillow(F - 0.5), 1, "from 0 to 1"),
    ("int32.tif", pillow(G.astype(np.int32) * 1000), 1, "mode I is not supported"),
    ("lab.tif", pillow(P, "LAB"), 3, "mode LAB"),
    ("white is 0.tif", pillow(SIXTEEN, tiffinfo={262: 0}), 1, "0 is white"),
    ("float white is 0.tif", pillow(F, tiffinfo={262: 0}), 1, "0 is white"),
    ("bytes.npy", array(P), 3, "from 0 to 1"),
    ("counts.npy", array(P * 1000.0), 3, "from 0 to 1"),
    ("four channels.npy", array(np.dstack([P, A]) / 255), 3, "array"),
    ("channels first.npy", array(P.transpose(2, 0, 1) / 255), 3, "array"),
    ("complex.npy", array(F + 1j), 1, "complex"),
    ("one number.npy", array(np.array(0.5)), 1, "array ()"),
    ("a row.npy", array(F[0]), 1, "array (8,)"),
    ("nothing.npy", array(F[:0]), 1, "no pixels"),
    ("batch.npy", array(P[None] / 255), 3, "array"),
    ("grey.npy", array(F), 3, "array"),
    ("objects.npy", array(np.array([{}, {}])), 3, "objects.npy"),
    ("text.npy", array(np.array([["a"]])), 1, "text.npy"),
    ("empty.png", lambda p: p.write_bytes(b""), 3, "empty.png"),
    ("text.jpg", lambda p: p.write_text("hello"), 3, "text.jpg"),
    ("truncated.png", lambda p: (pillow(P)(p), p.write_bytes(p.read_bytes()[:80])), 3, "truncated.png"),
    ("truncated.jpg", lambda p: (pillow(P)(p), p.write_bytes(p.read_bytes()[:-40])), 3, "truncated.jpg"),
    ("truncated.npy", lambda p: (array(F)(p), p.write_bytes(p.read_bytes()[:-9])), 1, "truncated.npy"),
]


@pytest.mark.parametrize(
    "name, write, channels, expected, observed", GOOD, ids=[f"{g[0]}-{g[2]}" for g in GOOD]
)
def test_read_right(name, write, channels, expected, observed, tmp_path):
    write(tmp_path / name)
    assert find_images(tmp_path, arrays=True) == [tmp_path / name]
    y = read_image(tmp_path / name, channels).y
    values, tolerance = expected if isinstance(expected, tuple) else (expected, 0)
    m = np.ones(y.shape[1:], bool) if observed is None else observed
    assert y.dtype == np.float32 and y.shape == (channels + 1, *values.shape[:2])
    np.testing.assert_array_equal(y[-1], m)
    assert np.abs((y[:-1] + 2) * (255 / 4) - values.transpose(2, 0, 1))[:, m].max() <= tolerance + 1e-3
    assert not y[:, ~m].any()


@pytest.mark.parametrize("name, write, channels, message", BAD, ids=[b[0] for b in BAD])
def test_refused_in_one_line(name, write, channels, message, tmp_path):
    write(tmp_path / name)
    with pytest.raises(DiffEMError) as error:
        read_image(tmp_path / name, channels)
    assert name in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


MASKS = [
    ("black.png", pillow(A), False),
    ("inverse.png", pillow(255 - A), True),
    ("zero one.png", pillow(K.astype(np.uint8)), False),
    ("zero one inverse.png", pillow((~K).astype(np.uint8)), True),
    ("jpeg.jpg", pillow(np.kron(A, np.ones((8, 8), np.uint8)), quality=60), False),
    ("sixteen.png", pillow(K.astype(np.uint16) * 65535), False),
    ("sixteen zero one.png", pillow(K.astype(np.uint16)), False),
    ("float.tif", pillow(K.astype(np.float32)), False),
    ("bit.png", pillow(K), False),
    ("three.png", pillow(np.dstack([A] * 3)), False),
    ("palette.png", pillow(palette(K)), False),
    ("turned.png", lambda p: turned_mask(p), False),
    ("alpha.png", pillow(np.dstack([np.zeros_like(P), A])), "transparent"),
    ("red.png", pillow(RED), "black where a pixel is missing"),
    ("photo.png", pillow(G), "black where a pixel is missing"),
    ("dark.png", pillow((60 * K).astype(np.uint8)), "black where a pixel is missing"),
    ("labels.png", pillow((2 * K).astype(np.uint8)), "black where a pixel is missing"),
    ("broken.png", lambda p: p.write_bytes(b"x"), "broken.png"),
]


def turned_mask(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(A).transpose(T.ROTATE_90).save(path, exif=exif)


@pytest.mark.parametrize("name, write, outcome", MASKS, ids=[m[0] for m in MASKS])
def test_masks(name, write, outcome, tmp_path):
    write(tmp_path / name)
    if isinstance(outcome, str):
        with pytest.raises(DiffEMError, match=outcome):
            read_mask(tmp_path / name)
        return
    expected = np.kron(K, np.ones((8, 8), bool)) if name == "jpeg.jpg" else K
    np.testing.assert_array_equal(read_mask(tmp_path / name, invert=outcome), expected)


def test_which_files_of_a_folder_are_images(tmp_path):
    for name in ("a.png", "deep/er/b.JPG", "._a.png", ".ipynb_checkpoints/a.png", "deep/.thumbnails/x.png", "out/a.png",
                 "runs/one/lap_00.png", "deep/runs/x.png", "restored/a_mean.png", "notes.txt", "c.npy"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "deep/round").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "deep/d.png").mkdir()
    names = [str(path.relative_to(tmp_path)) for path in find_images(tmp_path, False, tmp_path / "out")]
    assert names == ["a.png", "deep/er/b.JPG"]
    assert len(find_images(tmp_path, True, tmp_path / "out")) == 3


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all folders")
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "in/locked").mkdir(parents=True)
    (tmp_path / "in/locked").chmod(0)
    with pytest.raises(OSError, match="locked"):
        find_images(tmp_path / "in")


def test_only_images_are_masks(tmp_path):
    for name in ("img/2021/0.png", "img/2021.png", "masks/2021/0.png", "masks/2021.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pillow(A)(tmp_path / name)
    (tmp_path / "masks/2021.json").write_text("{}")
    assert (
        find_mask(tmp_path / "img/2021.png", tmp_path / "img", tmp_path / "masks")
        == tmp_path / "masks/2021.png"
    )


@pytest.mark.parametrize("stem", ["plain", "scan.2024.01", "photo[1]", "my photo (1)", "été 猫", "a.b"])
@pytest.mark.parametrize("end", ["png", "bmp", "tif"])
def test_the_mask_of_an_image_has_its_name(stem, end, tmp_path):
    for folder in ("img/sub", "mask/sub"):
        (tmp_path / folder).mkdir(parents=True)
    image, mask = tmp_path / f"img/sub/{stem}.png", tmp_path / f"mask/sub/{stem}.{end}"
    for path in (
        mask,
        tmp_path / "mask/sub/plain2.png",
        tmp_path / "mask/sub/a.b.c.png",
        tmp_path / f"mask/sub/._{stem}.{end}",
    ):
        pillow(A)(path)
    assert find_mask(image, tmp_path / "img", tmp_path / "mask") == mask
    mask.unlink()
    with pytest.raises(DiffEMError, match="0 masks"):
        find_mask(image, tmp_path / "img", tmp_path / "mask")


# ---- Whole commands


TINY = ("--channels 8 8 --blocks 1 --laps 1 --steps 3 --batch 8 --sample-steps 2 --unconditional-steps 2 --start-laps 1 "
        "--held-out 4 --num-samples 2 --device cpu --name own").split()  # fmt: skip


def folder_of(path: Path, write, end: str, number: int = 12):
    path.mkdir()
    for i in range(number):
        write(i)(path / f"{i:02d}.{end}")


def holes(i):
    return np.roll(K, i, (0, 1))


KINDS = {
    "8 bits in colour": (lambda i: pillow(np.dstack([P, 255 * holes(i).astype(np.uint8)])), "png", []),
    "16 bits": (lambda i: lambda p: png16(p, np.where(holes(i), SIXTEEN + i, 7), 0, 7), "png", ["--grey"]),
    "float TIFF": (lambda i: pillow(np.where(holes(i), F, np.nan).astype(np.float32)), "tif", ["--grey"]),
    ".npy": (lambda i: array(np.where(holes(i)[..., None], P / 255, np.nan)), "npy", []),
    "colour as grey": (lambda i: pillow(np.dstack([P, 255 * holes(i).astype(np.uint8)])), "png", ["--grey"]),
    "some without holes": (lambda i: pillow(np.dstack([P, 255 * holes(i).astype(np.uint8)]) if i % 4 else P), "png", []),
    "with a profile": (
        lambda i: pillow(np.dstack([P, 255 * holes(i).astype(np.uint8)]), icc_profile=b"p" * 99, dpi=(600, 600)), "png", [],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model.onnx of a run on colour images, and one on grey ones."""
    root, paths = tmp_path_factory.mktemp("models"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        folder_of(root / "in", KINDS["8 bits in colour"][0], "png")
        for flags in ([], ["--grey"]):
            name = f"own{len(flags)}"
            assert diffem.main(["--observations", "in", *TINY[:-1], name, *flags]) == 0
            assert export.main([f"runs/{name}"]) == 0
            paths[len(flags)] = root / "runs" / name / "model.onnx"
    return paths


@pytest.mark.parametrize("kind", KINDS)
def test_what_trains_restores_to_the_same_kind(kind, models, tmp_path, monkeypatch, capsys):
    write, end, flags = KINDS[kind]
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "in", write, end)
    (tmp_path / "in/._00.png").write_bytes(b"junk")
    assert diffem.main(["--observations", "in", *TINY, *flags]) == 0
    out = capsys.readouterr().out
    assert "12 images read" in out and "8x6 pixels" in out and "rate of the observed masks" in out
    command = ["restore", str(models[len(flags)]), "in", "--samples", "2", "--steps", "2", "--device", "cpu"]
    assert export.main(command) == 0
    names = {path.name for path in (tmp_path / "restored").iterdir()}
    suffix = {"npy": ".npy", "tif": ".tif"}.get(end, ".png")
    assert names == {
        f"{i:02d}_{part}{suffix}" for i in range(12) for part in ("sample1", "sample2", "mean", "std")
    }
    path = tmp_path / f"restored/01_sample1{suffix}"
    values, m = np.load(path) if end == "npy" else np.asarray(Image.open(path)), holes(1)
    if kind == "16 bits":
        assert (
            values.dtype == np.uint16 and np.abs(values[m].astype(int) - SIXTEEN[m] - 1).max() < 300
        )  # s is 16 levels
    elif kind == "float TIFF":
        assert values.dtype == np.float32 and np.abs(values[m] - F[m]).max() < 0.01
    elif kind == ".npy":
        assert values.dtype == np.float32 and values.shape == P.shape
        np.testing.assert_allclose(values[m], P[m] / 255, atol=1e-6)
    elif kind == "colour as grey":
        np.testing.assert_array_equal(values[m], np.asarray(Image.fromarray(P).convert("L"))[m])
    else:
        np.testing.assert_array_equal(values[m], P[m])  # bit for bit
    if kind == "with a profile":
        info = Image.open(path).info
        assert info["icc_profile"] == b"p" * 99 and round(info["dpi"][0]) == 600


def test_restoring_a_folder_again_finds_the_same_images(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "in", KINDS["8 bits in colour"][0], "png")
    assert diffem.main(["--observations", ".", *TINY]) == 0 and "12 images read" in capsys.readouterr().out
    assert (
        diffem.main(["--observations", ".", *TINY[:-1], "again"]) == 0
        and "12 images read" in capsys.readouterr().out
    )
    restore = ["restore", str(models[0]), "--samples", "1", "--steps", "1", "--device", "cpu"]
    for _ in range(2):
        assert export.main([*restore, "."]) == 0
        assert "12 restored" in capsys.readouterr().out
    (tmp_path / "in/bad.png").write_bytes(b"junk")
    (tmp_path / "in/deep.png").write_bytes(b"junk")
    pillow(np.dstack([P, 0 * A]))(tmp_path / "nothing.png")
    assert export.main([*restore, "nothing.png", "-o", "none"]) == 0
    assert capsys.readouterr().err == "1 of 1 images: every pixel is missing\n"
    command = [*restore, "in", "-o", "out"]
    assert export.main(command) == 2
    captured = capsys.readouterr()
    assert "12 restored" in captured.out and "bad.png" in captured.err and "1 more" in captured.err
    assert captured.err.count("\n") == 1 and len(list((tmp_path / "out").glob("*.png"))) == 12
    assert export.main([*command, "--skip-bad-images"]) == 0


@pytest.mark.parametrize(
    "write, flags, message",
    [
        (lambda i: pillow(np.dstack([P, 0 * A])), [], "every pixel is missing"),
        (lambda i: pillow(P), [], "no pixel is missing"),
        (lambda i: pillow(np.dstack([P, A]), ), ["--masks", "absent"], "no folder absent"),
        (lambda i: pillow(np.dstack([P, A])), ["--masks", ""], "--masks is given, but empty"),
        (lambda i: pillow(np.dstack([P, A])), ["--masks", "in"], "no images in in, outside"),
        (lambda i: pages, [], "3 pages"),
    ],
)  # fmt: skip
def test_folders_that_are_refused(write, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "in", write, "tif")
    assert diffem.main(["--observations", "in", *TINY, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_masks_the_other_way_round_are_questioned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "in", lambda i: pillow(P), "png")
    folder_of(tmp_path / "masks", lambda i: pillow(255 * (~holes(i)).astype(np.uint8)), "bmp")
    flags = ["--observations", "in", "--masks", "masks", *TINY]
    assert diffem.main(flags) == 0
    assert (
        "87.5% missing; if white pixels of the masks are the missing ones: --invert-masks"
        in capsys.readouterr().out
    )
    assert diffem.main([*flags[:-1], "right", "--invert-masks"]) == 0
    out = capsys.readouterr().out
    assert "12.5% missing" in out and "if white" not in out


# ---- The library


def tensors():
    x = torch.from_numpy(np.stack([np.roll(P, i, 0) for i in range(12)])).permute(0, 3, 1, 2) * (4 / 255) - 2
    m = torch.from_numpy(np.stack([holes(i) for i in range(12)]))[:, None].float()
    return x.float(), m, torch.cat([x * m, m], 1).float()


X, M, Y = tensors()


@pytest.mark.parametrize(
    "y, message",
    [
        (X, "last channel of y must be 1"),
        (torch.cat([(X + 2) * (255 / 4) * M, M], 1), "black is -2 and white 2"),
        (torch.cat([(X + 2) / 4 * M, M], 1), "from 0 to .*, but black is -2"),
        (torch.where(M > 0, Y, torch.nan), "last channel|not finite"),
        (torch.cat([torch.where(M > 0, X, torch.nan), M], 1), "not finite"),
        (torch.cat([X, M], 1), "must be 0 where its last channel is"),
        (Y.double(), "float32"),
        (Y[:, -1:], "the mask last"),
        (Y[:, 0], r"must be \(N, C \+ 1, H, W\)"),
        (torch.cat([Y[:, :-1], 255 * M], 1), "last channel"),
    ],
)
def test_fit_says_what_is_wrong_with_observations(y, message):
    with pytest.raises(diffem.DiffEMError, match=message):
        diffem.fit(y, diffem.Mask(0.5), diffem.Config(laps=1, steps=1))


def test_sample_says_what_is_wrong_with_observations(generator):
    config = diffem.Config(
        laps=1, steps=2, batch=4, channels=(8,), sample_steps=2, start_laps=1, start_rank=4
    )
    model = diffem.fit(Y, diffem.Mask(0.5), config)
    assert model.sample(Y, 2, "ddpm", generator).shape == X.shape
    for y in (Y[0], X, Y[:, :, None]):
        with pytest.raises(diffem.DiffEMError, match=r"must be \(B, 4, H, W\), the mask last"):
            model.sample(y, 2, "ddpm", generator)


@pytest.mark.parametrize(
    "x", [X.mean(1, keepdim=True).expand_as(X), torch.zeros_like(X)], ids=["grey", "constant"]
)
def test_the_start_of_images_without_colours_or_detail(x, generator):
    """Grey images saved in colour, or a colour that all share: what has no variance is no reason for NaN."""
    y, corruption = torch.cat([x * M, M], 1), diffem.Mask(0.5)
    start = diffem.fit_start(y, corruption, diffem.Config(smoothness=3.0, start_laps=3), generator)
    error = start.draw(y, corruption, generator) - x
    assert error.isfinite().all() and error.square().mean() < 0.5 and error.mean(1).square().mean() < 0.5


def test_noise_in_grey_levels_is_questioned():
    with pytest.raises(diffem.DiffEMError, match="25 of 255 grey levels are 0.39 here"):
        diffem.Noise(25)


def test_main_works_in_a_thread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    codes = []
    thread = threading.Thread(
        target=lambda: codes.append(diffem.main([*TINY, "--limit", "32", "--start-rank", "4"]))
    )
    thread.start()
    thread.join()
    assert codes == [0]


class Poisson(diffem.Corruption):
    """Photon counts: the noise depends on the image."""

    def __init__(self, peak: float = 20.0):
        super().__init__(peak=peak)

    def observe(self, x, m, generator):
        counts = torch.poisson(((x + 2) / 4).clamp(0, 1) * self.peak, generator)
        return torch.cat([m * (4 * counts / self.peak - 2), m], 1)


class SaltAndPepper(diffem.Corruption):
    def observe(self, x, m, generator):
        u = torch.rand(x[:, :1].shape, generator=generator, device=x.device)
        return torch.cat([m * torch.where(u < 0.05, -2, torch.where(u > 0.95, 2, x)), m], 1)


class DeadRows(diffem.Corruption):
    noise = 1e-3

    def __init__(self, fraction: float = 0.3):
        super().__init__(fraction=fraction)

    def mask(self, x, generator):
        rows = torch.rand(len(x), 1, x.shape[2], 1, generator=generator, device=x.device) >= self.fraction
        return rows.to(x.dtype).expand(-1, -1, -1, x.shape[3])


@pytest.mark.parametrize("own", [Poisson, SaltAndPepper, DeadRows])
def test_own_corruptions_whose_noise_depends_on_the_image(own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diffem, "CORRUPTIONS", dict(diffem.CORRUPTIONS))
    flags = [*TINY, "--limit", "300", "--start-rank", "8", "--corruption", "own"]
    assert diffem.main(flags, own=own) == 0
    corruption = diffem.load("runs/own").corruption
    assert isinstance(corruption, own) and float(corruption.w.min()) >= 0 and float(corruption.w.max()) > 0.5


@pytest.mark.parametrize("when", ["reading", "lap 0"])
def test_ctrl_c_before_there_is_anything_to_save(when, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def interrupt(*rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(diffem, "load_images" if when == "reading" else "fit_start", interrupt)
    assert diffem.main(TINY) == 130
    assert capsys.readouterr().err == "diffem: stopped\n" and not (tmp_path / "runs").exists()


# ---- Large images


def test_tiles_cover_a_side_and_overlap():
    for n in (1, 100, export.TILE, export.TILE + 1, 1000, 1500, 4321):
        parts, weights = export.tiles(n), np.zeros(n)
        for part, weight in parts:
            assert part.start % 16 == 0 and len(weight) == part.stop - part.start <= export.TILE + 16
            weights[part] += weight
        assert weights.min() >= 0.9 and (len(parts) == 1) == (n <= export.TILE)
        assert all(a.stop - b.start >= 48 for (a, _), (b, _) in zip(parts, parts[1:]))
    assert all(a.stop - b.start >= 200 for (a, _), (b, _) in itertools.pairwise(export.tiles(4321, 48, 200)))
    for grid in range(1, 130):  # as of a downsampling by 3, 11, ...
        for n in (300, 953, 2281, 2744):
            parts = [part for part, _ in export.tiles(n, grid)]
            assert (
                parts[0].start == 0 and parts[-1].stop == n and all(part.start % grid == 0 for part in parts)
            )
            assert all(a.stop - b.start >= export.OVERLAP for a, b in zip(parts, parts[1:])), (grid, n)


@pytest.mark.parametrize("size", [(128, 100), (70, 260)])
def test_a_large_image_in_tiles_is_the_image_at_once(size, models, monkeypatch):
    """The same noise, and a network of local reach: no seam, and nowhere another value."""
    restorer, generator = export.Restorer(models[0], "cpu", threads=1), np.random.default_rng(0)
    smooth = (
        np.asarray(Image.fromarray(P).resize(size[::-1], Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        * (4 / 255)
        - 2
    )
    m = generator.random((1, *size)) > 0.5
    y = np.concatenate([m * smooth, m])[None].astype(np.float32)
    whole = restorer(y, steps=6, method="ddim")
    monkeypatch.setattr(export, "TILE", 64)
    monkeypatch.setitem(restorer.metadata, "overlap", 48)
    assert len(export.tiles(size[0], 16, 48)) * len(export.tiles(size[1], 16, 48)) > 4
    tiled = restorer(y, steps=6, method="ddim")
    difference = np.abs(tiled - whole)
    assert difference.max() < 0.1 and difference.mean() < 0.01, (difference.max(), difference.mean())


def test_memory_of_lap_0_does_not_grow_with_the_size_of_images(tmp_path):
    """Few large images need few draws of the start: 4,096 of 256x256 would be 1 GB a copy."""
    program = f"""
import resource, sys
sys.path.insert(0, {str(Path(diffem.__file__).parent)!r})
import diffem, torch
y = diffem.Mask(0.5)(torch.zeros(4, 1, 256, 256), torch.Generator().manual_seed(0))
config = diffem.Config(channels=(8,), smoothness=3.0, start_laps=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
state = next(diffem.em(y, diffem.Mask(0.5), config))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, state.sample_batch)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    kilobytes, batch = map(int, done.stdout.split())
    assert kilobytes < 1.2e6 and batch == 128


def test_limit_is_the_number_to_train_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "in", KINDS["8 bits in colour"][0], "png", 40)
    flags = [word for word in TINY if word not in ("--held-out", "4")]
    for limit in (5, 11, 30):
        assert diffem.main(["--observations", "in", "--limit", str(limit), *flags[:-1], f"l{limit}"]) == 0
        assert f": {limit} observations" in capsys.readouterr().out


def test_smaller_copies_are_not_larger(generator):
    config = diffem.Config(rescale=True)
    for side, multiple in ((10, 20), (12, 12), (11, 4), (35, 20)):
        sizes = [
            diffem.augment(torch.zeros(1, 1, side, side), config, generator, multiple).shape[2]
            for _ in range(9)
        ]
        assert max(sizes) <= side


def test_squares_that_a_corruption_cannot_take(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "in", lambda i: pillow(np.kron(P, np.ones((2, 2, 1), np.uint8))), "png")
    flags = ["--observations", "in", "--corruption", "downsample", "--factor", "4", "--crop", "6", *TINY]
    assert diffem.main(flags) == 2
    out, err = capsys.readouterr()
    assert "--crop must be a multiple of 4" in err and "images read" not in out  # before they are read


def test_squares_of_small_observations(tmp_path):
    """--crop counts the pixels of x: 24x24 observations, downsampled by 2, give squares of 24 at most."""
    folder_of(tmp_path / "in", lambda i: pillow(np.kron(P[:, :6], np.ones((4, 4, 1), np.uint8))), "png")
    common = dict(
        dataset="observations", observations=str(tmp_path / "in"), corruption="downsample", held_out=2
    )
    for crop, side in ((48, 24), (32, 16), (8, 8)):  # twice the crop, multiples of 16
        settings = diffem.Settings(**common, crop=crop, parameters=dict(factor=2, noise=0.01))
        data = diffem.make_data(settings)
        assert data.y.shape[2:] == (2 * side, 2 * side), (crop, data.y.shape)
    with pytest.raises(DiffEMError, match="take a smaller --crop"):
        diffem.make_data(diffem.Settings(**common, crop=50, parameters=dict(factor=2, noise=0.01)))


# ---- Kinds of JPEG


def jpeg(**options):
    return pillow(np.kron(P, np.ones((4, 4, 1), np.uint8)), format="JPEG", **options)


def other_order(path):
    """The same file, in which the table of the colours is the first."""
    jpeg(quality=30)(path)
    content = path.read_bytes()
    start = content.index(b"\xff\xdb")
    assert content[start + 69 : start + 71] == b"\xff\xdb"  # two segments of 69 bytes
    grey, colours = content[start : start + 69], content[start + 69 : start + 138]
    path.write_bytes(content[:start] + colours + grey + content[start + 138 :])


@pytest.mark.parametrize(
    "name, write, message",
    [
        ("a.jpg", jpeg(quality=30), ""),
        ("a.jfif", jpeg(quality=30), ""),
        ("a.jpg", other_order, ""),
        ("a.jpg", pillow(P, format="PNG"), "none of the observations is a JPEG file"),
        ("a.jpg", turned(6, T.ROTATE_90), "turned by EXIF"),
        ("a.jpg", pillow(P, keep_rgb=True), "no YCbCr"),
        ("a.jpg", jpeg(mode="CMYK"), "no YCbCr"),
        ("a.jpg", lambda path: path.write_bytes(b"x"), "none of the observations"),
    ],
)
def test_the_quantisation_tables_of_a_file(name, write, message, tmp_path):
    write(tmp_path / name)
    if message:
        with pytest.raises(DiffEMError, match=message):
            export.jpeg_tables([tmp_path / name])
    else:
        found = export.jpeg_tables([tmp_path / name])
        jpeg(quality=30)(tmp_path / "plain.jpg")
        tables = Image.open(tmp_path / "plain.jpg").quantization
        assert found == dict(tables=(*tables[0], *tables[1]), subsampling=2)


def test_more_images_than_fit_into_memory_are_refused_after_the_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "in", KINDS["8 bits in colour"][0], "png")
    monkeypatch.setattr(os, "sysconf", lambda name: 141, raising=False)  # pages, and bytes in each
    assert diffem.main(["--observations", "in", *TINY]) == 2
    error = capsys.readouterr().err
    assert "12 images of 8x6 pixels need" in error and "--limit" in error and error.count("\n") == 1


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_few_images_work_or_say_so(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "in", KINDS["8 bits in colour"][0], "png", number)
    flags = [word for word in TINY if word not in ("--held-out", "4")]
    code = diffem.main(["--observations", "in", *flags])
    error = capsys.readouterr().err
    if number > 2:
        assert code == 0, error
        assert "NaN" not in (tmp_path / "runs/own/metrics.jsonl").read_text()
    else:
        assert code == 2 and "too few to hold out 2" in error and error.count("\n") == 1


@pytest.mark.parametrize("size", [(1, 1), (1, 16), (2, 3), (5, 7)])
def test_small_and_odd_sizes_work(size, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def write(i):
        generator = np.random.default_rng(i)
        alpha = 255 * (generator.random((*size, 1)) < 0.6)
        return pillow(np.concatenate([generator.integers(0, 256, (*size, 3)), alpha], 2).astype(np.uint8))

    folder_of(tmp_path / "in", write, "png", 16)
    code = diffem.main(["--observations", "in", *TINY])
    error = capsys.readouterr().err
    if size == (1, 1):
        assert code == 2 and "more than one pixel" in error and error.count("\n") == 1
        return
    assert code == 0, error
    assert "NaN" not in (tmp_path / "runs/own/metrics.jsonl").read_text()


def test_squares_of_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"no image")
    assert diffem.main(["--observations", "in", "--crop", "8", "--skip-bad-images", *TINY]) == 2
    assert "none of the images can be read" in capsys.readouterr().err


def test_squares_where_some_images_are_too_small(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "in", lambda i: pillow(np.kron(np.dstack([P, 255 * holes(i)]), np.ones((2, 2, 1))).astype(np.uint8)), "png")  # fmt: skip
    pillow(np.dstack([P, A])[:4])(tmp_path / "in/icon.png")
    np.save(tmp_path / "in/number.npy", 0.5)
    (tmp_path / "in/labels.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + b"0" * 64)
    flags = ["--observations", "in", "--crop", "8", *TINY]
    assert diffem.main(flags) == 2
    assert re.search(r"icon.png has a side of 4|labels.h5|number.npy", error := capsys.readouterr().err), (
        error
    )
    assert diffem.main([*flags, "--skip-bad-images"]) == 0
    out = capsys.readouterr().out
    assert "12 images read" in out and "3 left out, 12 squares of 12x12 pixels" in out


def test_squares_of_images_of_mixed_sizes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    generator, seen = np.random.default_rng(0), set()
    for folder in ("in", "masks"):
        (tmp_path / folder).mkdir()
    for i, (H, W) in enumerate([(40, 70), (64, 40), (48, 48), (100, 35)] * 3):
        photo, known = generator.integers(0, 256, (H, W, 3)).astype(np.uint8), generator.random((H, W)) < 0.6
        pillow(photo)(tmp_path / f"in/{i}.png")
        pillow(known)(tmp_path / f"masks/{i}.png")
        cells = [
            (slice(j, j + 32), slice(k, k + 32)) for j in range(0, H - 31, 32) for k in range(0, W - 31, 32)
        ]
        seen |= {((photo * known[..., None])[cell].tobytes(), known[cell].tobytes()) for cell in cells}
    flags = ["--observations", "in", "--masks", "masks", *TINY]
    assert diffem.main(flags) == 2
    assert "pixels, others " in (error := capsys.readouterr().err) and "--crop" in error
    for crop in (20, 33, 35):  # of images of 35 pixels or more: a square is not cut smaller than asked for
        settings = diffem.Settings(dataset="observations", observations="in", crop=crop, held_out=3)
        assert diffem.squares(diffem.image_files(settings), settings)[0] == max(crop, 32)
    assert diffem.main([*flags, "--crop", "50"]) == 2
    assert "has a side of 35 pixels: take a smaller --crop" in capsys.readouterr().err
    settings = diffem.Settings(dataset="observations", observations="in", masks="masks", crop=20, held_out=3)
    y = diffem.make_data(settings).y
    assert y.dtype == torch.uint8 and y.shape == (
        len(seen) - 3,
        4,
        32,
        32,
    )  # 2 x 20, but for 35 pixels and 16
    cut = {
        ((v[:3] * v[3:]).permute(1, 2, 0).numpy().tobytes(), v[3].numpy().astype(bool).tobytes()) for v in y
    }
    assert cut < seen and len(cut) == len(y)
    assert diffem.main([*flags, "--crop", "20", "--limit", "7"]) == 0
    assert "11 squares of 32x32 pixels" in (out := capsys.readouterr().out) and "7 observations" in out


def test_images_of_8_bits_are_bytes_in_memory(tmp_path):
    folder_of(
        tmp_path / "in", lambda i: pillow(np.dstack([np.roll(P, i), 255 * holes(i)]).astype(np.uint8)), "png"
    )
    for own in (
        dict(observations=str(tmp_path / "in")),
        dict(dataset="folder", data_dir=str(tmp_path / "in")),
    ):
        settings = diffem.Settings(**dict(dataset="observations") | own, held_out=2)
        train, test = diffem.load_images(settings)
        assert train.dtype == test.dtype == torch.uint8
        images = diffem.read_images(diffem.image_files(settings), settings)
        exact = torch.stack([torch.from_numpy(read_image(path, 3, alpha="observations" in own).y)
                             for path in diffem.image_files(settings)])  # fmt: skip
        if "observations" in own:
            assert torch.equal(diffem.as_float(images, "cpu"), exact)
        else:
            assert torch.equal(diffem.values(images), exact[:, :3])
        pillow(SIXTEEN)(tmp_path / "in/deep.png")  # among others: all in floating point then
        mixed = diffem.read_images(diffem.image_files(settings), settings)
        assert mixed.dtype == torch.float32 and torch.equal(mixed[:12, :3], exact[:, :3])
        (tmp_path / "in/deep.png").unlink()


def test_celeba_from_its_archive_and_lists(tmp_path, monkeypatch, capsys):
    """A synthetic data set in the layout of CelebA's files, from the archive to a picture at 64x64."""
    root, generator = tmp_path / "data/celeba", np.random.default_rng(0)
    root.mkdir(parents=True)
    names = [f"{i:06d}.jpg" for i in range(1, 31)]
    with zipfile.ZipFile(root / "img_align_celeba.zip", "w") as archive:
        for name in names:
            image = Image.fromarray(generator.integers(0, 255, (7, 6, 3)).astype(np.uint8)).resize((178, 218))
            image.paste((255, 0, 0), (0, 0, 178, 39))  # outside of the 140 pixels that are taken
            image.save(file := io.BytesIO(), "JPEG")
            archive.writestr(f"img_align_celeba/{name}", file.getvalue())
    columns = dict(list_eval_partition="", identity_CelebA="", list_attr_celeba="30\nSmiling Young\n")
    columns |= dict(list_bbox_celeba="30\nimage_id x_1 y_1 width height\n",
                    list_landmarks_align_celeba="30\n" + " ".join("abcdefghij") + "\n")  # fmt: skip
    width = dict(list_eval_partition=1, identity_CelebA=1, list_attr_celeba=2, list_bbox_celeba=4)
    for file, head in columns.items():
        rows = (
            f"{name} " + " ".join(["2" if i > 22 else "0"] * width.get(file, 10))
            for i, name in enumerate(names)
        )
        (root / f"{file}.txt").write_text(head + "\n".join(rows) + "\n")
    for module in ("celeba", "utils"):  # the checksums are those of the real files
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: Path(path).is_file()
        )
    monkeypatch.chdir(tmp_path)
    flags = [*TINY[:-2], "--dataset", "celeba", "--preset", "small", "--name", "faces"]
    assert diffem.main(flags) == 0
    assert (
        "23 images read" in (out := capsys.readouterr().out)
        and "64x64 pixels" in out
        and "4 images read" in out
    )
    settings = diffem.Checkpoint("runs/faces").settings
    red = diffem.values(diffem.load_images(settings)[0])
    assert (red[:, 0] > 1.9).float().mean() < 0.05
