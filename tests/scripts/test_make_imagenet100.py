"""make_imagenet100.py: links and copies of class folders, and refused input."""

import pytest
from PIL import Image
from support.in_process import assert_refused, call, snapshot

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
    outcome = call(make_imagenet100.main, "--imagenet", "imagenet", "--out", "out", "--classes", "list.txt", *copy)
    assert outcome.status == 0 and outcome.stdout.count("2 classes, 2 images") == 2, outcome
    for split in ("train", "val"):
        classes, found = labelled_samples(imagenet / "out" / split)
        assert classes == ["n1", "n3"] and len(found) == 2
        assert (imagenet / "out" / split / "n1").is_symlink() == (not copy)


@pytest.mark.parametrize(
    ("changed", "mentioned"),
    [
        ({"classes": "absent.txt"}, "absent.txt: no such file"),
        ({"classes": "more.txt"}, "lacks 4 of 6 folders: train/n8, train/n9, val/n8, val/n9"),
        ({"out": "imagenet"}, "imagenet: exists; choose a new or empty folder"),
    ],
)
def test_refuses(imagenet, changed, mentioned):
    (imagenet / "more.txt").write_text("n1\nn8\nn9\n")
    before = snapshot(imagenet)
    flags = {"imagenet": "imagenet", "classes": "list.txt", "out": "out"} | changed
    outcome = call(make_imagenet100.main, *[word for name, value in flags.items() for word in (f"--{name}", value)])
    assert_refused(outcome, mentioned)
    assert snapshot(imagenet) == before
