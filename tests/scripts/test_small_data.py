"""The small built-in data, and the scripts that prepare data."""

import gzip
import os
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.processes import ROOT

from datasets import labelled_samples, list_images
from scripts.data import make_imagenet100, make_small_data
from scripts.data.make_small_data import write_digits, write_fashion_mnist
from utils import InputError


def save_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16)).save(path)
    return str(path)


def tree(root):
    """{relative path: content} of every file, hidden ones included."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_digits_are_complete_balanced_and_the_same_each_time(tmp_path, capsys):
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
    assert tree(tmp_path / "again") == tree(root)


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
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
    (tmp_path / "digits").mkdir()  # an empty folder may be there
    write_digits(tmp_path / "digits")
    assert len(list_images(tmp_path / "digits")) == 1797


def test_writers_do_not_touch_other_data(tmp_path):
    path = save_image(tmp_path / "digits" / "train" / "0" / "mine.png")
    with pytest.raises(InputError, match=f"{tmp_path}/digits: holds something else"):
        write_digits(tmp_path / "digits")
    assert list(tree(tmp_path)) == ["digits/train/0/mine.png"] and os.path.exists(path)


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
    """A look-alike of 200 and 50 images whose pixels all equal their class."""
    source = tmp_path / "source"
    raw = source / "FashionMNIST" / "raw" if request.param == "torchvision" else source
    for part, number in (("train", 200), ("t10k", 50)):
        labels = np.arange(number) % 10
        images = np.broadcast_to(labels[:, None, None], (number, 28, 28))
        write_idx(raw / f"{part}-images-idx3-ubyte", images, packed=request.param == "gz")
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels, packed=request.param == "gz")
    return source


def test_fashion_mnist_from_a_local_copy(fashion_source, tmp_path):
    before = tree(fashion_source)
    write_fashion_mnist(tmp_path / "all", fashion_source)
    write_fashion_mnist(tmp_path / "share", fashion_source, train=34, val=20)
    sizes = {
        "all/train": [20] * 10, "all/val": [5] * 10, "share/train": [4] * 4 + [3] * 6, "share/val": [2] * 10,
    }  # fmt: skip
    for name, expected in sizes.items():
        classes, found = labelled_samples(tmp_path / name)
        assert len(classes) == 10 and classes[0] == "0-t-shirt-top" and classes[9] == "9-ankle-boot"
        assert [sum(label == wanted for _, label in found) for wanted in range(10)] == expected
        for path, label in found:
            pixels = np.asarray(Image.open(path))
            assert pixels.shape == (28, 28) and (pixels == label).all()
    assert tree(fashion_source) == before


@pytest.mark.parametrize("fashion_source", ["gz"], indirect=True)
def test_fashion_mnist_errors(fashion_source, tmp_path):
    out = tmp_path / "out"
    for share in (9, 201, -1):
        with pytest.raises(InputError, match=f"train {share}: must be between 10 and 200"):
            write_fashion_mnist(out, fashion_source, train=share)
    cut = fashion_source / "train-images-idx3-ubyte.gz"
    cut.write_bytes(cut.read_bytes()[:100])
    with pytest.raises(InputError, match=f"{fashion_source}: cannot be read"):
        write_fashion_mnist(out, fashion_source)
    cut.unlink()
    with pytest.raises(InputError, match=f"{fashion_source}: lacks train-images-idx3-ubyte .*--download"):
        write_fashion_mnist(out, fashion_source)
    assert not out.exists()


# --- scripts ---------------------------------------------------------------------------------------------------------


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    script.main()


@pytest.mark.parametrize(
    ("command", "status", "output"),
    [
        ("make_small_data --help", 0, "fashion-mnist"),
        ("make_imagenet100 --imagenet no --out out", 2, "error: --imagenet no: lacks the folder train and val\n"),
    ],
)
def test_scripts_run_as_modules(tmp_path, command, status, output):
    """From the root, as the README has it: the modules are found, and bad input is one line and status 2."""
    name, *arguments = command.split()
    command = [sys.executable, "-m", f"scripts.data.{name}", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == status and not (ROOT / "out").exists()
    assert result.stderr == output if status else output in result.stdout


@pytest.mark.parametrize("fashion_source", ["gz"], indirect=True)
def test_make_small_data(fashion_source, tmp_path, monkeypatch, capsys):
    script, out = make_small_data, tmp_path / "out"
    run(script, monkeypatch, "digits", "--out", str(out / "digits"))
    assert "1437 train, 360 val" in capsys.readouterr().out
    source = ("--source", str(fashion_source), "--train", "20", "--val", "10")
    run(script, monkeypatch, "fashion-mnist", "--out", str(out / "fashion"), *source)
    assert [len(list_images(out / name)) for name in ("digits", "fashion/train", "fashion/val")] == [1797, 20, 10]


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """A tree of three classes, and a list of two of them, in the working directory."""
    for split in ("train", "val"):
        for name in ("n1", "n2", "n3"):
            save_image(tmp_path / "imagenet" / split / name / "1.JPEG")
    (tmp_path / "list.txt").write_text("n3\nn1\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("copy", [(), ("--copy",)])
def test_make_imagenet100(imagenet, monkeypatch, capsys, copy):
    script = make_imagenet100
    for call in range(2):
        run(script, monkeypatch, "--imagenet", "imagenet", "--out", "out", "--classes", "list.txt", *copy)
        assert capsys.readouterr().out.count("2 classes, 2 images") == 2
        if call == 0 and copy:  # as after an interruption
            (imagenet / "out" / "val" / "n3").rename(imagenet / "out" / "val" / "n3.part")
    for split in ("train", "val"):
        classes, found = labelled_samples(imagenet / "out" / split)
        assert classes == ["n1", "n3"] and len(found) == 2
        assert (imagenet / "out" / split / "n1").is_symlink() == (not copy)


def test_make_imagenet100_errors_come_before_anything_is_written(imagenet, monkeypatch):
    script = make_imagenet100

    def refused(message, **changed):
        flags = {"imagenet": "imagenet", "classes": "list.txt", "out": "out"} | changed
        before = tree(imagenet)
        with pytest.raises(InputError, match=message):
            run(script, monkeypatch, *[part for name, value in flags.items() for part in (f"--{name}", value)])
        assert tree(imagenet) == before and not (imagenet / "out").exists()

    refused("list9.txt: no such file", classes="list9.txt")
    (imagenet / "empty.txt").write_text("\n")
    refused("lists no classes", classes="empty.txt")
    refused("lacks the folder train and val", imagenet="elsewhere")
    (imagenet / "more.txt").write_text("n1\nn8\nn9\n")
    refused("lacks 4 of 6 class folders: train/n8, train/n9, val/n8, val/n9", classes="more.txt")
    save_image(imagenet / "other" / "train" / "n1" / "mine.png")
    refused("other: holds something else", out="other")
    refused("imagenet: holds something else", out="imagenet")


def test_class_list_of_imagenet100():
    names = (ROOT / "scripts" / "data" / "imagenet100.txt").read_text().split()
    assert len(set(names)) == len(names) == 100 and all(name[0] == "n" and name[1:].isdigit() for name in names)
