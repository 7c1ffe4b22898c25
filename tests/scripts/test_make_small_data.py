"""make_small_data.py: digits and Fashion-MNIST as image folders, whole or absent, and refused input."""

import gzip
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.in_process import assert_refused, call, snapshot

from clever.data.files import labelled_samples, list_images
from clever.utils import InputError
from scripts.data import make_small_data
from scripts.data.make_small_data import write_digits, write_fashion_mnist


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


def contents(folder):
    """What each image file below a folder holds, with its class."""
    return Counter((Path(path).parent.name, np.asarray(Image.open(path)).tobytes()) for path in list_images(folder))


def test_digits_for_tuning_are_training_images(tmp_path, capsys):
    write_digits(tmp_path / "digits", tmp_path / "tune")
    write_digits(tmp_path / "digits_alone")
    assert snapshot(tmp_path / "digits") == snapshot(tmp_path / "digits_alone")
    train, val = contents(tmp_path / "tune" / "train"), contents(tmp_path / "tune" / "val")
    assert (train.total(), val.total()) == (1149, 288)
    assert train + val == contents(tmp_path / "digits" / "train")
    assert not (train + val) & contents(tmp_path / "digits" / "val")  # no two of the digits are equal
    assert all(0.18 < sum(label == str(d) for label, _ in val) / (1437 / 10) < 0.22 for d in range(10))

    write_digits(tmp_path / "digits", tmp_path / "again")  # adds the folder to a data set that is already there
    assert "digits: already complete" in capsys.readouterr().out
    assert snapshot(tmp_path / "again") == snapshot(tmp_path / "tune")


@pytest.mark.parametrize("fashion_source", ["gz"], indirect=True)
def test_fashion_mnist_for_tuning_holds_no_test_image(fashion_source, tmp_path):
    write_fashion_mnist(tmp_path / "data", fashion_source, train=100, val=50, tune=tmp_path / "tune")
    write_fashion_mnist(tmp_path / "alone", fashion_source, train=100, val=50)
    assert snapshot(tmp_path / "data") == snapshot(tmp_path / "alone")
    train, val = contents(tmp_path / "tune" / "train"), contents(tmp_path / "tune" / "val")
    assert train == contents(tmp_path / "data" / "train")
    assert len(val) == val.total() == 20 and Counter(label for label, _ in val) == Counter({label: 2 for label, _ in train})
    assert not train & val and not val & contents(tmp_path / "data" / "val")
    write_fashion_mnist(tmp_path / "again", fashion_source, train=100, tune=tmp_path / "tune_again")
    assert snapshot(tmp_path / "tune_again") == snapshot(tmp_path / "tune")


@pytest.mark.parametrize("fashion_source", ["gz"], indirect=True)
def test_refused_folders_for_tuning(fashion_source, tmp_path):
    """Nothing is written, to neither folder."""
    out, tune = tmp_path / "out", tmp_path / "tune"
    for other in (out, out / "tune", tmp_path):
        with pytest.raises(InputError, match=f"--tune {other}: must be another folder than --out {out}"):
            write_digits(out, other)
    for number in (None, 190):
        with pytest.raises(InputError, match=f"--train {number or 200}: leaves too few of the 200 images for --tune"):
            write_fashion_mnist(out, fashion_source, train=number, tune=tune)
    tune.mkdir()
    (tune / "mine").touch()
    with pytest.raises(InputError, match=f"{tune}: contains something else"):
        write_digits(out, tune)
    assert not out.exists() and [path.name for path in tune.iterdir()] == ["mine"]


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
    outcome = call(make_small_data.main, "digits", "--out", tmp_path / "digits", "--tune", tmp_path / "digits_tune")
    assert outcome.status == 0 and "1437 train, 360 val" in outcome.stdout, outcome
    assert "digits_tune: wrote 1149 train, 288 val" in outcome.stdout
    numbers = ("--train", 20, "--val", 10, "--tune", tmp_path / "fashion_tune")
    outcome = call(make_small_data.main, "fashion-mnist", "--out", tmp_path / "fashion", "--source", fashion_source, *numbers)
    assert outcome.status == 0, outcome
    folders = ("digits", "fashion/train", "fashion/val", "fashion_tune/train", "fashion_tune/val")
    assert [len(list_images(tmp_path / name)) for name in folders] == [1797, 20, 10, 20, 10]
    assert_refused(call(make_small_data.main, "letters"), "letters")
