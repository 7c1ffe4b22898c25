"""Damaged and hostile images and checkpoints, read by main_dino.py and eval_linear.py: one clear line, and nothing lost."""

import errno
import os
import pickle
import shutil

import pytest
import torch
from PIL import Image
from support.in_process import assert_refused, pretrain, probe, snapshot
from support.processes import write_images


@pytest.fixture
def world(world_of_bad_input):
    return world_of_bad_input


# --- images ------------------------------------------------------------------------------------------------------------


def write_text(folder):
    (folder / "bad.png").write_text("no image")


def write_truncated_png(folder):
    data = (folder / "00.png").read_bytes()
    (folder / "bad.png").write_bytes(data[: len(data) // 2])


def write_truncated_jpeg(folder):
    Image.open(folder / "00.png").save(folder / "bad.jpg")
    data = (folder / "bad.jpg").read_bytes()
    (folder / "bad.jpg").write_bytes(data[: len(data) * 2 // 3])


BAD_IMAGES = [write_text, write_truncated_png, write_truncated_jpeg]


@pytest.mark.parametrize("write", BAD_IMAGES)
def test_an_unreadable_image_is_named(world, tmp_path, write):
    shutil.copytree(world.data, tmp_path / "data")
    write(tmp_path / "data" / "train" / "grey")
    (bad,) = (tmp_path / "data" / "train" / "grey").glob("bad.*")
    message = ("1 of 13 images cannot be read", str(bad), "--skip_bad_images")
    assert_refused(pretrain(tmp_path / "data" / "train", tmp_path / "out"), *message)
    assert_refused(probe(world.checkpoint, tmp_path / "data", tmp_path / "out"), *message)
    assert not (tmp_path / "out").exists()


def test_bad_images_can_be_left_out(world, tmp_path):
    shutil.copytree(world.data, tmp_path / "data")
    for folder, write in zip(("cyan", "grey", "red"), BAD_IMAGES, strict=False):
        for split in ("train", "val"):
            write(tmp_path / "data" / split / folder)
    flags = ("--skip_bad_images", "true")
    outcome = pretrain(tmp_path / "data" / "train", tmp_path / "pretrained", "--knn_data", tmp_path / "data", *flags)
    assert outcome.status == 0 and "left out: 3 of 15 images" in outcome.stdout and "12 images," in outcome.stdout
    assert (tmp_path / "pretrained" / "checkpoint.pth").exists()
    outcome = probe(world.checkpoint, tmp_path / "data", tmp_path / "probe", *flags)
    assert outcome.status == 0 and "left out: 3 of 15 images" in outcome.stdout
    assert "on the 7 test images" in outcome.stdout


def test_an_image_that_a_worker_finds_bad_is_named_in_one_line(world, tmp_path):
    shutil.copytree(world.data, tmp_path / "data")
    bad = tmp_path / "data" / "train" / "grey" / "00.png"
    bad.write_text("no image")
    flags = ("--check_images", "false", "--num_workers", 1)
    assert_refused(pretrain(tmp_path / "data" / "train", tmp_path / "out", *flags), str(bad), "cannot be read")
    assert not (tmp_path / "out" / "checkpoint.pth").exists()


@pytest.mark.parametrize("size", [(1, 1), (3, 40)])
def test_images_smaller_than_the_crop_are_enlarged(tmp_path, size):
    for path in write_images(tmp_path / "data", 4).iterdir():
        with Image.open(path) as image:
            small = image.resize(size)
        small.save(path)
    assert pretrain(tmp_path / "data", tmp_path / "out", "--aug", "aug1_4_2").status == 0
    assert (tmp_path / "out" / "checkpoint.pth").exists()


# --- damaged and hostile checkpoints -----------------------------------------------------------------------------------


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_truncated_checkpoint_is_refused_wherever_it_is_cut(world, tmp_path):
    (tmp_path / "out").mkdir()
    for source, name in ((world.checkpoint, "checkpoint.pth"), (world.probe_file, world.probe_file.name)):
        data, path = source.read_bytes(), tmp_path / "out" / name
        for size in (0, 100, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:size])
            before = snapshot(tmp_path / "out")
            if name == "checkpoint.pth":
                outcome = pretrain(world.data / "train", tmp_path / "out", "--epochs", 2)
            else:
                outcome = probe(world.checkpoint, world.data, tmp_path / "out", "--evaluate")
            assert_refused(outcome, str(path), "damaged")
            assert snapshot(tmp_path / "out") == before
        path.unlink()


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(world, tmp_path, monkeypatch):
    def forbid(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(torch, "load", forbid)
    outcome = pretrain(world.data / "train", tmp_path / "out", "--init_from", world.checkpoint)
    assert_refused(outcome, f"{world.checkpoint}: Permission denied")


def as_zip(obj, path):
    torch.save(obj, path)


def as_legacy(obj, path):
    torch.save(obj, path, _use_new_zipfile_serialization=False)


def as_pickle(obj, path):
    path.write_bytes(pickle.dumps(obj))


@pytest.mark.parametrize("save", [as_zip, as_legacy, as_pickle])
def test_code_in_a_checkpoint_does_not_run(world, tmp_path, save):
    sprung = tmp_path / "sprung"
    hostile = tmp_path / "hostile" / "checkpoint.pth"
    hostile.parent.mkdir()
    state = torch.load(world.checkpoint, weights_only=True)
    save(state | {"extra": Trap(sprung)}, hostile)
    before = snapshot(hostile.parent)
    out = tmp_path / "out"
    assert_refused(pretrain(world.data / "train", out, "--init_from", hostile), str(hostile))
    assert_refused(pretrain(world.data / "train", hostile.parent), str(hostile))
    assert_refused(probe(hostile, world.data, out), str(hostile))
    assert_refused(probe(world.checkpoint, world.data, out, "--evaluate", "--final_eval_weights", hostile), str(hostile))
    assert not sprung.exists() and not out.exists() and snapshot(hostile.parent) == before
    if save is as_pickle:
        pickle.loads(hostile.read_bytes())
    else:
        torch.load(hostile, weights_only=False)
    assert sprung.exists()  # the trap does work
