"""make_imagenet100.py: links and copies of class folders, interrupted copies, and refused input."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from support.in_process import assert_refused, call, snapshot
from support.processes import ROOT

from clever.data.files import labelled_samples
from scripts.data import make_imagenet100


def save_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16)).save(path)


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """The working directory contains three classes of ImageNet and a list of two of them."""
    for split in ("train", "val"):
        for name in ("n1", "n2", "n3"):
            save_image(tmp_path / "imagenet" / split / name / "1.JPEG")
    (tmp_path / "list.txt").write_text("n3\nn1\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("copy", [(), ("--copy",)])
def test_links_or_copies_the_listed_classes(imagenet, copy):
    for repetition in range(2):
        outcome = call(make_imagenet100.main, "--imagenet", "imagenet", "--out", "out", "--classes", "list.txt", *copy)
        assert outcome.status == 0 and outcome.stdout.count("2 classes, 2 images") == 2, outcome
        if repetition == 0 and copy:  # as after an interruption
            (imagenet / "out" / "val" / "n3").rename(imagenet / "out" / "val" / "n3.part")
    for split in ("train", "val"):
        classes, found = labelled_samples(imagenet / "out" / split)
        assert classes == ["n1", "n3"] and len(found) == 2
        assert (imagenet / "out" / split / "n1").is_symlink() == (not copy)


def test_copies_where_there_are_no_links(imagenet, monkeypatch):
    def symlink_to(self, *_, **__):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "symlink_to", symlink_to)
    words = ("--imagenet", "imagenet", "--out", "out", "--classes", "list.txt")
    for repetition in range(2):
        outcome = call(make_imagenet100.main, *words)
        assert outcome.status == 0 and outcome.stdout.count("no symbolic links here") == (repetition == 0), outcome
    files = sorted((imagenet / "out").rglob("*.JPEG"))
    assert len(files) == 4 and not any(path.is_symlink() for path in (imagenet / "out").rglob("*"))


@pytest.mark.parametrize(
    ("changed", "mentioned"),
    [
        ({"classes": "absent.txt"}, "absent.txt: no such file"),
        ({"classes": "empty.txt"}, "lists no classes"),
        ({"imagenet": "elsewhere"}, "lacks the folder train and val"),
        ({"classes": "more.txt"}, "lacks 4 of 6 class folders: train/n8, train/n9, val/n8, val/n9"),
        ({"out": "other"}, "other: contains something else"),
        ({"out": "imagenet"}, "imagenet: contains something else"),
        ({"out": "list.txt"}, "list.txt: is not a folder"),
    ],
)
def test_refuses(imagenet, changed, mentioned):
    (imagenet / "empty.txt").write_text("\n")
    (imagenet / "more.txt").write_text("n1\nn8\nn9\n")
    save_image(imagenet / "other" / "train" / "n1" / "mine.png")
    before = snapshot(imagenet)
    flags = {"imagenet": "imagenet", "classes": "list.txt", "out": "out"} | changed
    outcome = call(make_imagenet100.main, *[word for name, value in flags.items() for word in (f"--{name}", value)])
    assert_refused(outcome, mentioned)
    assert snapshot(imagenet) == before and not (imagenet / "out").exists()


def test_runs_as_a_module_from_the_root():
    command = [sys.executable, "-m", "scripts.data.make_imagenet100", "--imagenet", "no", "--out", "out"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (2, "error: --imagenet no: lacks the folder train and val\n")
    assert not (ROOT / "out").exists()


def test_class_list():
    names = (ROOT / "scripts" / "data" / "imagenet100.txt").read_text().split()
    assert len(set(names)) == len(names) == 100 and all(name[0] == "n" and name[1:].isdigit() for name in names)
