"""Image folders, reproducible random draws, unreadable files."""

import json
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from support.pictures import photo

from clever.data import datasets
from clever.data.augmentations import MultiCropAugmentation, eval_transform
from clever.data.datasets import (
    CheckRecord,
    ImageDataset,
    check_images,
    keep_readable,
    make_loader,
    read_batch,
)
from clever.data.files import labelled_samples, list_images, read_image, read_pixels
from clever.data.rendering import render_batch
from clever.evaluation.features import shard
from clever.utils import InputError


def save_image(path, size=(20, 16), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def make_bad_images(folder):
    """{name: path} of files with image suffixes that cannot be decoded."""
    whole = Path(save_image(folder / "whole.jpg", (200, 150))).read_bytes()
    png = Path(save_image(folder / "whole.png", (200, 150))).read_bytes()
    contents = {
        "empty.jpg": b"", "text.png": b"no image\n",
        "cut.jpg": whole[: len(whole) // 2], "cut.png": png[: len(png) // 2], "head.jpg": whole[:12], "head.png": png[:30],
        "damaged.png": png[:5000] + bytes(500) + png[5500:],
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(folder / "float.tif")
    contents["float.tif"] = None
    return {name: str(folder / name) for name in contents}


@pytest.fixture
def samples(tmp_path):
    return [(save_image(tmp_path / f"{i}.png", seed=i), i % 3) for i in range(8)]


def test_list_images_is_recursive_sorted_and_finds_all_suffixes(tmp_path):
    names = ["b/deep/er/1.JPG", "a.jpeg", "b/2.PnG", "c.bmp", "d.ppm", "e.webp", "f.tif", "g.TIFF", "b.jpg", "h.pgm", "i.jfif"]
    hidden = [".hidden.jpg", "._a.png", ".cache/y.jpg", "__MACOSX/a.png", "b/@eaDir/a.png", "$RECYCLE.BIN/a.png"]
    for name in [*names, *hidden, "notes.txt", "x.jpg.part"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list_images(tmp_path) == sorted(str(tmp_path / name) for name in names)
    assert labelled_samples(tmp_path)[0] == ["b"]


def test_list_images_follows_links_but_not_in_circles(tmp_path, capsys):
    save_image(tmp_path / "store" / "1.png")
    (tmp_path / "root" / "sub").mkdir(parents=True)
    (tmp_path / "root" / "notes.txt").touch()
    for name, target in (("link", "store"), ("sub/up", "root"), ("sub/above", ""), ("twice", "store")):
        (tmp_path / "root" / name).symlink_to(tmp_path / target)
    assert list_images(tmp_path / "root") == [str(tmp_path / "root" / "link" / "1.png")]
    said = f"left out below {tmp_path}/root: 3 links to folders listed already, 1 .txt; taken are .jpg .jpeg"
    assert capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize("name", ["photos.zip", "photos.TAR.GZ", "x.npy", "x.parquet", "IMG_1.HEIC", "noname"])
def test_a_folder_without_images_is_refused_with_what_it_has(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"but 1 {os.path.splitext(name)[1].lower() or 'without suffix'}; taken are .jpg"):
        list_images(tmp_path)


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "test"), ("train", "validation"), ("cats", "test")])
def test_a_tree_of_splits_given_whole_is_said(tmp_path, capsys, names):
    for name in names:
        save_image(tmp_path / name / "a" / "1.png")
    assert len(list_images(tmp_path)) == 2
    said = f"{tmp_path} has {' and '.join(sorted(names))}: images of all are taken; give one of them to leave out the others\n"
    assert capsys.readouterr().out == ("" if "cats" in names else said)


def save_png_16(path, value):
    """A PNG of 16 bits and three channels, which Pillow cannot write, of one value."""
    row, size = b"\0" + struct.pack(">H", value) * 3 * 8, struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", size), (b"IDAT", zlib.compress(row * 8)), (b"IEND", b""))
    whole = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(whole))


@pytest.mark.parametrize("bits, shown", [(12, (15, 16)), (14, (63, 64)), (16, ())])
def test_dark_images_are_said(tmp_path, capsys, bits, shown):
    """Of 12 or 14 bits in files of 16 bits, in colour (whose lower 8 bits Pillow drops) and grey."""
    value = 2**bits - 1
    save_png_16(tmp_path / "colour.png", value)
    Image.fromarray(np.full((8, 8), value, np.uint16)).save(tmp_path / "grey.png")
    for path in (str(tmp_path / name) for name in ("colour.png", "grey.png")):
        assert keep_readable([(path, 0)]) == [(path, 0)]
        said = capsys.readouterr().out
        assert (any(f"is {peak} of 255" in said for peak in shown) and path in said) if shown else said == ""


def test_an_error_that_is_not_the_file_s_keeps_its_kind(tmp_path, monkeypatch):
    """One line in changed code is no damaged image."""
    path = save_image(tmp_path / "1.png")
    monkeypatch.setattr("clever.data.files.to_rgb", lambda image: {}["bands"])
    for read in (read_image, read_pixels, lambda path: keep_readable([(path, 0)], skip_bad_images=True)):
        with pytest.raises(KeyError, match="bands"):
            read(path)


def test_labelled_samples(tmp_path, capsys):
    save_image(tmp_path / "stray.png")
    with pytest.raises(InputError, match="no class folders"):
        labelled_samples(tmp_path)
    names = ["a/1.png", "b/1.png", "b/deep/2.png"]
    paths = [save_image(tmp_path / name) for name in names]
    assert labelled_samples(tmp_path) == (["a", "b"], list(zip(paths, (0, 1, 1), strict=True)))
    assert capsys.readouterr().out == f"left out of {tmp_path}: 1 images without a class folder or label\n"
    (tmp_path / "c").mkdir()
    with pytest.raises(InputError, match=f"{tmp_path}/c.*no images"):
        labelled_samples(tmp_path)


@pytest.mark.parametrize("mode", ["1", "LA", "P", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    """A dark left half stays dark and a light right half light, without a warning."""
    grey = np.full((8, 8), 64, np.uint8)
    grey[:, 4:] = 200
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path, **({"transparency": bytes([128] * 256)} if mode == "P" else {}))
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
    """By both readers, and by the check, which finds no others."""
    bad = [*make_bad_images(tmp_path).values(), str(tmp_path / "absent.png")]
    good = [save_image(tmp_path / f"good.{suffix}", (1, 300)) for suffix in ("jpg", "png", "webp")]
    for path in bad:
        for read in (read_image, read_pixels, lambda path: ImageDataset([(path, 0)], CLEAN)[0]):
            with pytest.raises(InputError, match=f"{path}: cannot be read") as caught:
                read(path)
            assert "\n" not in str(caught.value)
    found = check_images([*bad, *good], threads=3)
    assert set(found) == set(bad) and all(reason and "\n" not in reason for reason in found.values())
    assert check_images(good, threads=0) == {}


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_files_are_decoded_as_pillow_does(tmp_path, monkeypatch, mode, installed):
    """With simplejpeg and without it, and under another suffix."""
    if not installed:
        monkeypatch.setattr("clever.data.files.simplejpeg", None)
    path = tmp_path / "picture.png"
    photo(60, 45).convert(mode).save(path, format="JPEG", quality=90)
    pixels = read_pixels(path)
    assert pixels.dtype == np.uint8 and pixels.flags["C_CONTIGUOUS"] and pixels.flags["WRITEABLE"]
    np.testing.assert_array_equal(pixels, np.asarray(read_image(path)))


CLEAN = eval_transform("ori", 16)
TRAINING = MultiCropAugmentation("aug1_4_2", local_crops_number=2, global_crops_size=48, local_crops_size=24)


def test_batches_are_the_items(samples):
    """One tensor [V', B, 3, S, S] per resolution, or [B, 3, S, S] for a single view."""
    dataset = ImageDataset(samples, TRAINING, classes=("a", "b", "c"))
    tensors, labels = dataset.__getitems__([5, 2, 7])
    assert [tuple(tensor.shape) for tensor in tensors] == [(2, 3, 3, 48, 48), (2, 3, 3, 24, 24)]
    assert labels.tolist() == [samples[i][1] for i in (5, 2, 7)] and len(dataset) == 8 and dataset.classes == ["a", "b", "c"]
    for b, i in enumerate((5, 2, 7)):
        assert all(torch.equal(tensor[:, b], own) for tensor, own in zip(tensors, dataset[i][0], strict=True))
    images, _ = ImageDataset(samples, CLEAN).__getitems__([5, 2, 7])
    pixels, sizes = read_batch([samples[i][0] for i in (5, 2, 7)])
    (expected,) = render_batch(pixels, CLEAN.draw_seeded([0, 0, 0], *sizes), "torchvision")
    assert images.shape == (3, 3, 16, 16) and torch.equal(images, expected[0])


def test_draws_depend_on_seed_epoch_and_index_only(samples):
    def draws(seed, epoch):
        dataset = ImageDataset(samples[:1] * 4, TRAINING, seed=seed)  # one image four times: only the index differs
        dataset.set_epoch(epoch)
        return torch.stack([dataset[i][0][0] for i in range(len(dataset))]).flatten(1)

    first = draws(0, 0)
    torch.rand(10)
    assert torch.equal(first, draws(0, 0))
    everything = torch.cat([first, draws(0, 1), draws(1, 0), draws(1, 1)])
    assert len(everything.unique(dim=0)) == len(everything)  # also: (seed 0, epoch 1) is not (seed 1, epoch 0)


def test_views_do_not_depend_on_workers_and_leave_the_global_generator_alone(samples):
    dataset = ImageDataset(samples, TRAINING)
    loader = make_loader(dataset, 3, num_workers=2)
    state = torch.get_rng_state()
    for epoch in (0, 1):  # the workers stay, and see the new epoch
        dataset.set_epoch(epoch)
        here, there = ([tensor for tensors, _ in each for tensor in tensors] for each in (make_loader(dataset, 3), loader))
        assert len(here) == len(there) == 6
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    assert torch.equal(torch.get_rng_state(), state) and loader.persistent_workers


@pytest.mark.parametrize("world_size", [3, 11])
def test_shards_contain_every_image_once_with_its_own_draws(samples, world_size):
    dataset = ImageDataset(samples, eval_transform("aug1_2", 16))
    shards = [shard(dataset, rank, world_size) for rank in range(world_size)]
    assert sum(map(len, shards)) == len(samples)
    for i in range(len(samples)):
        assert torch.equal(shards[i % world_size][i // world_size][0], dataset[i][0])


def check_in_a_group(rank, store, paths, opened):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    opened_here, decode_error = [], datasets.decode_error
    datasets.decode_error = lambda path: (opened_here.append(path), decode_error(path))[1]
    Path(f"{opened}{rank}").write_text(json.dumps([sorted(check_images(paths, threads=2)), opened_here]))
    dist.destroy_process_group()


def test_check_images_shares_the_work_between_processes(tmp_path):
    bad = sorted(make_bad_images(tmp_path).values())
    paths = [*bad, *(save_image(tmp_path / f"{i}.png") for i in range(4))]
    mp.start_processes(check_in_a_group, (tmp_path / "store", paths, tmp_path / "opened"), nprocs=2, start_method="fork")
    (first, opened), (second, others) = (json.loads((tmp_path / f"opened{rank}").read_text()) for rank in (0, 1))
    assert first == second == bad and sorted(opened + others) == sorted(paths)


def test_a_second_start_decodes_only_changed_files(tmp_path, monkeypatch):
    paths = [save_image(tmp_path / "images" / f"{i}.png", seed=i) for i in range(4)]
    record, decoded = tmp_path / "record.npy", []
    real = datasets.decode_error
    monkeypatch.setattr(datasets, "decode_error", lambda path: decoded.append(os.path.basename(path)) or real(path))

    def start():
        decoded.clear()
        check = CheckRecord(record)
        keep_readable([(path, 0) for path in list_images(tmp_path / "images")], record=check)
        check.save()
        return sorted(decoded)

    assert start() == ["0.png", "1.png", "2.png", "3.png"] and start() == []
    save_image(tmp_path / "images" / "1.png", size=(5, 5))
    save_image(tmp_path / "images" / "4.png")
    os.remove(paths[2])
    assert start() == ["1.png", "4.png"] and start() == []
    (tmp_path / "images" / "5.png").symlink_to("gone")
    with pytest.raises(InputError, match="5.png"):
        start()
    (tmp_path / "images" / "5.png").unlink()
    record.write_bytes(b"damaged")
    assert len(start()) == 4 and start() == []
