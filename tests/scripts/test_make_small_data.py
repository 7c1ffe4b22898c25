"""make_small_data.py: digits and Fashion-MNIST as image folders, whole or absent, and refused input."""

import gzip
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from support.in_process import snapshot

from clever.data.files import labelled_samples, list_images
from clever.utils import InputError
from scripts.data.make_small_data import write_digits, write_fashion_mnist


def test_digits_are_complete_balanced_and_reproducible(tmp_path, capsys):
    """Two folders: the data set, and training images alone, to choose settings by."""
    root, tune = tmp_path / "deep" / "digits", tmp_path / "tune"
    write_digits(root, tune)
    sizes = {}
    for folder in (root / "train", root / "val", tune / "train", tune / "val"):
        classes, found = labelled_samples(folder)
        assert classes == [str(digit) for digit in range(10)]
        sizes[folder] = Counter(label for _, label in found)
    assert [size.total() for size in sizes.values()] == [1437, 360, 1149, 288]
    for whole, val in ((Counter(load_digits().target.tolist()), root / "val"), (sizes[root / "train"], tune / "val")):
        assert all(abs(sizes[val][d] / whole[d] - 0.2) < 0.01 for d in range(10))
    digits = load_digits()
    written = ((label, np.frombuffer(pixels, np.uint8) / 255 * 16) for label, pixels in contents(root).elements())
    originals = Counter((str(label), tuple(image.ravel())) for image, label in zip(digits.images, digits.target, strict=True))
    assert Counter((label, tuple(values.round())) for label, values in written) == originals
    assert contents(tune) == contents(root / "train") and not contents(tune) & contents(root / "val")

    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    capsys.readouterr()
    write_digits(root, tmp_path / "again")  # adds the folder to a data set that is already there
    assert "digits: already complete" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert snapshot(tmp_path / "again") == snapshot(tune)


def contents(folder):
    """What each image file below a folder holds, with its class."""
    return Counter((Path(path).parent.name, np.asarray(Image.open(path)).tobytes()) for path in list_images(folder))


def write_idx(path, array, packed):
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    if packed:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


@pytest.fixture(params=["gz", "torchvision"])
def fashion_source(request, tmp_path):
    """200 training and 50 test images in the format of Fashion-MNIST; all pixels of an image equal its class.

    One pixel differs: with the class, it gives every image its own number.
    """
    source = tmp_path / "source"
    raw = source / "FashionMNIST" / "raw" if request.param == "torchvision" else source
    for part, number in (("train", 200), ("t10k", 50)):
        labels = np.arange(number) % 10
        images = np.broadcast_to(labels[:, None, None], (number, 28, 28)).copy()
        images[:, 0, 0] = np.arange(number) // 10 + (200 if part == "t10k" else 0)
        write_idx(raw / f"{part}-images-idx3-ubyte", images, packed=request.param == "gz")
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels, packed=request.param == "gz")
    return source


def test_fashion_mnist_from_a_local_copy(fashion_source, tmp_path):
    before = snapshot(fashion_source)
    write_fashion_mnist(tmp_path / "all", fashion_source)
    write_fashion_mnist(tmp_path / "part", fashion_source, train=34, val=20)
    sizes = {
        "all/train": [20] * 10, "all/val": [5] * 10, "part/train": [4] * 4 + [3] * 6, "part/val": [2] * 10,
    }  # fmt: skip
    for name, expected in sizes.items():
        classes, found = labelled_samples(tmp_path / name)
        assert len(classes) == 10 and classes[0] == "0-t-shirt-top" and classes[9] == "9-ankle-boot"
        assert [sum(label == number for _, label in found) for number in range(10)] == expected
        for path, label in found:
            pixels = np.asarray(Image.open(path))
            assert pixels.shape == (28, 28) and (pixels.flat[1:] == label).all()
    assert snapshot(fashion_source) == before


@pytest.mark.parametrize("fashion_source", ["gz"], indirect=True)
def test_what_is_refused_before_anything_is_written(fashion_source, tmp_path):
    out, tune = tmp_path / "out", tmp_path / "tune"
    with pytest.raises(InputError, match=f"--tune {tmp_path}: must be another folder than --out {out}"):
        write_digits(out, tmp_path)
    with pytest.raises(InputError, match="--train 201: must be 10 to 200 images"):
        write_fashion_mnist(out, fashion_source, train=201)
    tune.mkdir()
    (tune / "mine").touch()
    with pytest.raises(InputError, match=f"{tune}: contains something else"):
        write_digits(out, tune)
    cut = fashion_source / "train-images-idx3-ubyte.gz"
    cut.write_bytes(cut.read_bytes()[:100])
    with pytest.raises(InputError, match=f"{fashion_source}: cannot be read"):
        write_fashion_mnist(out, fashion_source)
    assert not out.exists() and [path.name for path in tune.iterdir()] == ["mine"]
