"""make_small_data.py: digits and Fashion-MNIST as image folders, whole or absent, and refused input."""

import gzip
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.in_process import assert_refused, call, snapshot

from datasets import labelled_samples, list_images
from scripts.data import make_small_data
from scripts.data.make_small_data import write_digits, write_fashion_mnist
from utils import InputError


def test_digits_are_complete_balanced_and_reproducible(tmp_path, capsys):
    root = tmp_path / "deep" / "digits"
    write_digits(root)
    sizes = {}
    for split in ("train", "val"):
        classes, found = labelled_samples(root / split)
        assert classes == [str(digit) for digit in range(10)]
        sizes[split] = Counter(label for _, label in found)
    assert sum(sizes["train"].values()) == 1437 and sum(sizes["val"].values()) == 360
    assert all(abs(sizes["val"][d] / (sizes["val"][d] + sizes["train"][d]) - 0.2) < 0.01 for d in range(10))
    pixels = np.stack([np.asarray(Image.open(path)) for path in list_images(root)])
    assert pixels.shape == (1797, 8, 8) and pixels.dtype == np.uint8 and pixels.min() == 0 and pixels.max() == 255

    from sklearn.datasets import load_digits

    digits = load_digits()
    contents = [image.round().astype(int).tobytes() for image in digits.images]
    originals = Counter(zip(contents, digits.target, strict=True))
    written = Counter(
        ((np.asarray(Image.open(path)) / 255 * 16).round().astype(int).tobytes(), int(Path(path).parent.name))
        for path in list_images(root)
    )
    assert written == originals

    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    capsys.readouterr()
    write_digits(root)
    assert "already complete" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    write_digits(tmp_path / "again")
    assert snapshot(tmp_path / "again") == snapshot(root)


def test_an_interrupted_call_leaves_nothing(tmp_path, monkeypatch):
    save, saved = Image.Image.save, []

    def fail_later(self, path, *args, **kwargs):
        saved.append(path)
        if len(saved) == 100:
            raise KeyboardInterrupt
        save(self, path, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", fail_later)
    with pytest.raises(KeyboardInterrupt):
        write_digits(tmp_path / "digits")
    assert len(saved) == 100 and list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "digits").mkdir()  # an empty folder may exist
    write_digits(tmp_path / "digits")
    assert len(list_images(tmp_path / "digits")) == 1797


def test_other_data_is_not_touched(tmp_path):
    mine = tmp_path / "digits" / "train" / "0" / "mine.png"
    mine.parent.mkdir(parents=True)
    Image.new("RGB", (20, 16)).save(mine)
    with pytest.raises(InputError, match=f"{tmp_path}/digits: contains something else"):
        write_digits(tmp_path / "digits")
    assert list(snapshot(tmp_path)) == ["digits/train/0/mine.png"]


def write_idx(path, array, packed):
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    if packed:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


@pytest.fixture(params=["gz", "idx", "torchvision"])
def fashion_source(request, tmp_path):
    """200 training and 50 test images in the format of Fashion-MNIST; all pixels of an image equal its class."""
    source = tmp_path / "source"
    raw = source / "FashionMNIST" / "raw" if request.param == "torchvision" else source
    for part, number in (("train", 200), ("t10k", 50)):
        labels = np.arange(number) % 10
        images = np.broadcast_to(labels[:, None, None], (number, 28, 28))
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
            assert pixels.shape == (28, 28) and (pixels == label).all()
    assert snapshot(fashion_source) == before


@pytest.mark.parametrize("fashion_source", ["gz"], indirect=True)
def test_fashion_mnist_errors(fashion_source, tmp_path):
    out = tmp_path / "out"
    for number in (9, 201, -1):
        with pytest.raises(InputError, match=f"--train {number}: must be between 10 and 200"):
            write_fashion_mnist(out, fashion_source, train=number)
    cut = fashion_source / "train-images-idx3-ubyte.gz"
    cut.write_bytes(cut.read_bytes()[:100])
    with pytest.raises(InputError, match=f"{fashion_source}: cannot be read"):
        write_fashion_mnist(out, fashion_source)
    cut.unlink()
    with pytest.raises(InputError, match=f"{fashion_source}: lacks train-images-idx3-ubyte .*--download"):
        write_fashion_mnist(out, fashion_source)
    assert not out.exists()


@pytest.mark.parametrize("fashion_source", ["gz"], indirect=True)
def test_command_line(fashion_source, tmp_path):
    outcome = call(make_small_data.main, "digits", "--out", tmp_path / "digits")
    assert outcome.status == 0 and "1437 train, 360 val" in outcome.stdout, outcome
    numbers = ("--train", 20, "--val", 10)
    outcome = call(make_small_data.main, "fashion-mnist", "--out", tmp_path / "fashion", "--source", fashion_source, *numbers)
    assert outcome.status == 0, outcome
    assert [len(list_images(tmp_path / name)) for name in ("digits", "fashion/train", "fashion/val")] == [1797, 20, 10]
    assert_refused(call(make_small_data.main, "letters"), "letters")
