"""Image folders, reproducible draws, unreadable files, and the small built-in data."""

import gzip
import importlib.util
import itertools
import os
import struct
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import pil_to_tensor

import datasets
from augmentations import RECIPES, MultiCropAugmentation, eval_transform
from datasets import (
    ImageDataset,
    check_images,
    keep_readable,
    labelled_dataset,
    labelled_samples,
    list_images,
    pretraining_dataset,
    read_image,
    shard,
    write_digits,
    write_fashion_mnist,
)
from utils import InputError

ROOT = Path(__file__).resolve().parents[1]


def save_image(path, size=(20, 16), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def make_bad_images(folder):
    """Files that name themselves images and cannot be decoded: {name: path}."""
    whole = Path(save_image(folder / "whole.jpg", (200, 150))).read_bytes()
    png = Path(save_image(folder / "whole.png", (200, 150))).read_bytes()
    contents = {
        "empty.jpg": b"", "text.png": b"no image\n",
        "cut.jpg": whole[: len(whole) // 2], "cut.png": png[: len(png) // 2],
        "damaged.png": png[:5000] + bytes(500) + png[5500:],
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: str(folder / name) for name in contents}


@pytest.fixture
def samples(tmp_path):
    return [(save_image(tmp_path / f"{i}.png", seed=i), i % 3) for i in range(8)]


# --- finding images --------------------------------------------------------------------------------------------------


def test_list_images_is_recursive_sorted_and_knows_the_suffixes(tmp_path):
    names = ["b/deep/er/1.JPG", "a.jpeg", "b/2.PnG", "c.bmp", "d.ppm", "e.webp", "f.tif", "g.TIFF", "b.jpg"]
    for name in [*names, "notes.txt", "x.jpg.part", ".hidden.jpg", ".cache/y.jpg"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list_images(tmp_path) == sorted(str(tmp_path / name) for name in names)


def test_list_images_follows_links_but_not_in_circles(tmp_path):
    save_image(tmp_path / "store" / "1.png")
    (tmp_path / "root" / "sub").mkdir(parents=True)
    (tmp_path / "root" / "link").symlink_to(tmp_path / "store")
    (tmp_path / "root" / "sub" / "up").symlink_to(tmp_path / "root")
    assert list_images(tmp_path / "root") == [str(tmp_path / "root" / "link" / "1.png")]


def test_missing_and_empty_folders_are_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for find in (list_images, labelled_samples):
        for name in ("absent", "file", "empty"):
            with pytest.raises(InputError, match=str(tmp_path / name)):
                find(tmp_path / name)


def test_labelled_samples(tmp_path):
    b1, b2 = save_image(tmp_path / "b" / "1.png"), save_image(tmp_path / "b" / "deep" / "2.png")
    a1 = save_image(tmp_path / "a" / "1.png")
    save_image(tmp_path / "stray.png")
    save_image(tmp_path / ".thumbs" / "1.png")
    assert labelled_samples(tmp_path) == (["a", "b"], [(a1, 0), (b1, 1), (b2, 1)])
    (tmp_path / "c").mkdir()
    with pytest.raises(InputError, match=f"{tmp_path}/c.*no images"):
        labelled_samples(tmp_path)


def test_flat_folder_has_no_classes(tmp_path):
    save_image(tmp_path / "1.png")
    with pytest.raises(InputError, match="no class folders"):
        labelled_samples(tmp_path)


# --- reading images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "RGB", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    """A left half that is dark and a right half that is light stay so, without a warning."""
    grey = np.full((8, 8), 64, np.uint8)
    grey[:, 4:] = 200
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path, **({"transparency": bytes([128] * 256)} if mode == "P" else {}))
    with Image.open(path) as stored:
        assert stored.mode == mode or (mode == "I;16" and stored.mode == "I")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rgb = read_image(path)
    assert rgb.mode == "RGB" and rgb.size == (8, 8)
    pixels = np.asarray(rgb).astype(int)
    if mode == "1":
        assert pixels[:, :4].mean() < pixels[:, 4:].mean() and set(np.unique(pixels)) <= {0, 255}
    else:
        assert np.abs(pixels[:, :4] - 64).max() <= 2 and np.abs(pixels[:, 4:] - 200).max() <= 2


def test_undecodable_files_are_named(tmp_path):
    for path in [*make_bad_images(tmp_path).values(), str(tmp_path / "absent.png")]:
        with pytest.raises(InputError, match=f"{path}: cannot be read") as caught:
            ImageDataset([(path, 0)], pil_to_tensor)[0]
        assert "\n" not in str(caught.value)


def test_dataset_items(samples):
    dataset = ImageDataset(samples, pil_to_tensor, classes=("a", "b", "c"))
    assert len(dataset) == 8 and dataset.classes == ["a", "b", "c"]
    for i, (path, label) in enumerate(samples):
        image, found = dataset[i]
        assert found == label and torch.equal(image, pil_to_tensor(Image.open(path)))


# --- random draws ----------------------------------------------------------------------------------------------------


def draw(image):
    return torch.rand(4)


def views(dataset, **options):
    loader = DataLoader(dataset, batch_size=2, collate_fn=list, **options)
    return [view for batch in loader for view, _ in batch]


def test_draws_depend_on_seed_epoch_and_index_only(samples):
    def draws(seed, epoch):
        dataset = ImageDataset(samples, draw, seed=seed)
        dataset.set_epoch(epoch)
        return torch.stack([dataset[i][0] for i in range(len(dataset))])

    first = draws(0, 0)
    torch.rand(10)
    assert torch.equal(first, draws(0, 0))
    everything = torch.cat([first, draws(0, 1), draws(1, 0), draws(1, 1)])
    assert len(everything.unique(dim=0)) == len(everything)  # also: (seed 0, epoch 1) is not (seed 1, epoch 0)


def test_torchs_generator_is_left_as_it_was(samples):
    dataset = ImageDataset(samples, draw)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    dataset[0]
    dataset[1]
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(7)
    with pytest.raises(ZeroDivisionError):
        ImageDataset(samples, lambda image: torch.rand(5) / (1 // 0))[0]
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("aug", RECIPES)
def test_views_do_not_depend_on_the_number_of_workers(samples, aug):
    augment = MultiCropAugmentation(aug, local_crops_number=2, global_crops_size=48, local_crops_size=24)
    dataset = ImageDataset(samples, augment)
    here, there = views(dataset), views(dataset, num_workers=2)
    assert len(here) == len(there) == 8
    for a, b in zip(here, there, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_persistent_workers_see_the_epoch(samples):
    dataset = ImageDataset(samples, draw)
    loader = DataLoader(dataset, batch_size=8, num_workers=2, persistent_workers=True)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        here = torch.stack([dataset[i][0] for i in range(8)])
        (there,) = [batch for batch, _ in loader]
        assert torch.equal(here, there)


@pytest.mark.parametrize("world_size", [1, 2, 3, 11])
def test_shards_hold_every_image_once_with_its_own_draws(samples, world_size):
    dataset = ImageDataset(samples, eval_transform("aug1_2", 16))
    shards = [shard(dataset, rank, world_size) for rank in range(world_size)]
    assert sum(len(part) for part in shards) == len(samples)
    for rank, part in enumerate(shards):
        for i in range(len(part)):
            image, label = part[i]
            expected, expected_label = dataset[rank + i * world_size]
            assert label == expected_label and torch.equal(image, expected)


# --- checking images -------------------------------------------------------------------------------------------------


def test_check_images_finds_exactly_what_cannot_be_read(tmp_path):
    bad = make_bad_images(tmp_path)
    suffixes = (".jpg", ".png", ".webp")
    good = [save_image(tmp_path / f"good{i}{suffix}", (1 + i, 300)) for i, suffix in enumerate(suffixes)]
    absent = str(tmp_path / "absent.png")
    found = check_images([*bad.values(), *good, absent], threads=3)
    assert set(found) == {*bad.values(), absent}
    assert all(reason and "\n" not in reason for reason in found.values())
    for path in good:
        read_image(path)
    assert check_images(good, threads=0) == {}


def test_check_images_covers_long_lists_and_reports_progress(tmp_path, monkeypatch, capsys):
    absent = [str(tmp_path / f"{i}.png") for i in range(1100)]
    assert set(check_images(absent)) == set(absent)
    assert capsys.readouterr().out == ""  # quick: nothing to report
    clock = itertools.count(step=6)
    monkeypatch.setattr(datasets.time, "monotonic", lambda: next(clock))
    check_images(absent)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"checking images: 512 of 1100, {512 / 6:.0f} images/s" and len(lines) == 3


@pytest.mark.parametrize("size", ["0 5", "5 0"])
def test_images_without_pixels_are_reported(tmp_path, size):
    path = tmp_path / "1.ppm"
    path.write_text(f"P6 {size} 255\n")
    assert set(check_images([str(path)])) == {str(path)}
    with pytest.raises(InputError, match="1.ppm: cannot be read"):
        read_image(path)


def check_in_a_group(rank, store, paths, opened):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    seen, why = [], datasets._why_unusable
    datasets._why_unusable = lambda path: (seen.append(path), why(path))[1]
    found = check_images(paths, threads=2)
    Path(f"{opened}{rank}").write_text("\n".join([str(len(found)), *sorted(found), *sorted(seen)]))
    dist.destroy_process_group()


def test_check_images_shares_the_work_between_processes(tmp_path):
    bad = make_bad_images(tmp_path)
    paths = [*bad.values(), *(save_image(tmp_path / f"{i}.png") for i in range(4))]
    opened = tmp_path / "opened"
    arguments = (tmp_path / "store", paths, opened)
    mp.start_processes(check_in_a_group, arguments, nprocs=2, start_method="fork")
    seen = []
    for rank in (0, 1):
        count, *lines = Path(f"{opened}{rank}").read_text().splitlines()
        assert lines[: int(count)] == sorted(bad.values())
        seen += lines[int(count) :]
    assert sorted(seen) == sorted(paths)


def test_keep_readable_refuses_or_drops(tmp_path, capsys):
    bad = make_bad_images(tmp_path)
    good = [(save_image(tmp_path / f"z{i}.png"), i) for i in range(2)]
    assert keep_readable(good) == good
    mixed = [good[0], *((path, 5) for path in bad.values()), good[1]]
    first = sorted(bad.values())[0]
    with pytest.raises(InputError, match=f"5 of 7 images cannot be read: {first} .*--skip_bad_images true"):
        keep_readable(mixed)
    assert capsys.readouterr().out == ""
    assert keep_readable(mixed, skip_bad_images=True) == good
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "5 of 7 images" in printed
    with pytest.raises(InputError, match="5 of 5 images"):
        keep_readable([(path, 0) for path in bad.values()], skip_bad_images=True)


def test_pretraining_dataset(tmp_path):
    paths = [save_image(tmp_path / name) for name in ("1.png", "class/2.png", "class/deep/3.png")]
    dataset = pretraining_dataset(tmp_path, pil_to_tensor, seed=3)
    assert dataset.samples == [(path, -1) for path in paths] and dataset.seed == 3
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(InputError, match="0.png"):
        pretraining_dataset(tmp_path, pil_to_tensor)
    assert pretraining_dataset(tmp_path, pil_to_tensor, skip_bad_images=True).samples == dataset.samples
    assert len(pretraining_dataset(tmp_path, pil_to_tensor, check=False)) == 4


def test_labelled_dataset_accepts_tiny_images(tmp_path):
    save_image(tmp_path / "a" / "1.png", (1, 1))
    save_image(tmp_path / "b" / "1.jpg", (2, 30))
    dataset = labelled_dataset(tmp_path, eval_transform("ori", 32), threads=2)
    assert dataset.classes == ["a", "b"]
    for label in (0, 1):
        image, found = dataset[label]
        assert image.shape == (3, 32, 32) and found == label
    (tmp_path / "a" / "2.png").write_bytes(b"")
    with pytest.raises(InputError, match="1 of 3 images"):
        labelled_dataset(tmp_path, pil_to_tensor)
    assert len(labelled_dataset(tmp_path, pil_to_tensor, skip_bad_images=True)) == 2


# --- small built-in data ---------------------------------------------------------------------------------------------


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


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    script.main()


@pytest.mark.parametrize(
    ("command", "status", "output"),
    [
        ("make_small_data.py --help", 0, "fashion-mnist"),
        ("make_imagenet100.py --imagenet no --out out", 2, "error: --imagenet no: lacks the folder train and val\n"),
    ],
)
def test_scripts_run_from_any_directory(tmp_path, command, status, output):
    """As scripts, not imported: the modules are found, and bad input is one line and status 2."""
    name, *arguments = command.split()
    command = [sys.executable, str(ROOT / "scripts" / name), *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == status and list(tmp_path.iterdir()) == []
    assert result.stderr == output if status else output in result.stdout


@pytest.mark.parametrize("fashion_source", ["gz"], indirect=True)
def test_make_small_data(fashion_source, tmp_path, monkeypatch, capsys):
    script, out = load_script("make_small_data"), tmp_path / "out"
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
    script = load_script("make_imagenet100")
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
    script = load_script("make_imagenet100")

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
    names = (ROOT / "scripts" / "imagenet100.txt").read_text().split()
    assert len(set(names)) == len(names) == 100 and all(name[0] == "n" and name[1:].isdigit() for name in names)
