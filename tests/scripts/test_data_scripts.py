"""The scripts that prepare downstream data: lists of images (make_semi_lists.py) and CUB-200-2011 (make_cub200.py)."""

from collections import Counter
from pathlib import Path

import pytest
from support.in_process import assert_refused, call, snapshot

from datasets import labelled_samples
from evaluation.downstream_data import listed_samples
from scripts.data import make_cub200, make_semi_lists

# --- lists of images ---------------------------------------------------------------------------------------------------


def write_classes(root, counts, name="{wnid}_{number}.JPEG"):
    """Empty images <root>/train/<wnid>/..., as many as `counts` says of each class."""
    for wnid, count in counts.items():
        folder = root / "train" / wnid
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / name.format(wnid=wnid, number=number)).touch()
    return root


def draw(data, out, percent, *more):
    return call(make_semi_lists.main, "draw", "--percent", percent, "--data_path", data, "--out", out, *more)


def classes_in(path):
    return Counter(line.split("_")[0].split("/")[0] for line in path.read_text().splitlines())


def test_a_draw_is_balanced_and_depends_on_the_seed_alone(tmp_path):
    data = write_classes(tmp_path / "data", {"n01": 40, "n02": 25, "n03": 60})
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        outcome = draw(data, tmp_path / name, 10, "--seed", seed)
        assert outcome.status == 0, outcome
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1] != texts[2]
    counts = classes_in(tmp_path / "a")  # 10 % of 125 are 12
    assert counts == {"n01": 4, "n02": 4, "n03": 4} and "12 images of 3 classes, 4 to 4 of each" in outcome.stdout
    assert len(set(texts[0].splitlines())) == 12 and "n01_" in texts[0] and "/" not in texts[0]
    classes, samples = listed_samples(tmp_path / "a", data / "train")
    assert classes == ["n01", "n02", "n03"] and sorted(Path(path).name for path, _ in samples) == texts[0].splitlines()


@pytest.mark.parametrize(
    "counts, percent, expected",
    [
        ((10, 55, 60), 1, [1, 1, 1]),  # one of each class at least
        ((40, 25, 60), 11, [4, 5, 5]),  # 13.75 are 14
        ((10, 55, 60), 60, [10, 32, 33]),  # 75: all of the small class
        ((10, 55, 60), 100, [10, 55, 60]),
    ],
)
def test_sizes_of_draws(tmp_path, counts, percent, expected):
    data = write_classes(tmp_path / "data", dict(zip(("a", "b", "c"), counts, strict=True)))
    assert draw(data, tmp_path / "list", percent).status == 0
    assert sorted(classes_in(tmp_path / "list").values()) == expected


def test_other_names_keep_their_folder(tmp_path):
    data = write_classes(tmp_path / "data", {"my_class": 3, "9": 3}, name="{number}.png")
    (data / "train" / "9" / "deeper").mkdir()
    (data / "train" / "9" / "deeper" / "9_1.png").touch()
    assert draw(data, tmp_path / "list", 100).status == 0
    lines = (tmp_path / "list").read_text().splitlines()
    assert {"my_class/0.png", "9/deeper/9_1.png"} <= set(lines) and len(lines) == 7
    assert len(listed_samples(tmp_path / "list", data / "train")[1]) == 7


def test_a_filter_keeps_the_classes_that_are_there(tmp_path):
    data = write_classes(tmp_path / "data", {"n01": 3, "n03": 3})
    (tmp_path / "all").write_text("n03_2.JPEG\nn01_0.JPEG\nn02_5.JPEG\nn01_2.JPEG\nn04_0.JPEG\n")
    flags = ("filter", "--list", tmp_path / "all", "--data_path", data, "--out", data / "IN100_1percent.txt")
    outcome = call(make_semi_lists.main, *flags)
    assert outcome.status == 0 and "3 images of 2 classes, 1 to 2 of each" in outcome.stdout, outcome
    assert (data / "IN100_1percent.txt").read_text() == "n01_0.JPEG\nn01_2.JPEG\nn03_2.JPEG\n"
    assert call(make_semi_lists.main, *flags).status == 0  # the same list again
    (data / "IN100_1percent.txt").write_text("mine\n")
    assert_refused(call(make_semi_lists.main, *flags), "other content")
    assert (data / "IN100_1percent.txt").read_text() == "mine\n"


@pytest.mark.parametrize(
    "words, mentioned",
    [
        ("draw --percent 0", "--percent 0"),
        ("draw --percent 101", "--percent 101"),
        ("draw --percent nan", "--percent nan"),
        ("draw --percent 1 --seed -1", "--seed -1"),
        ("draw --percent 1 --data_path {absent}", "does not exist"),
        ("filter --list {absent}", "cannot be read"),
        ("filter --list {foreign}", "no image of the 2 class folders"),
        ("filter --list {wrong}", "1 of its images are not in the class folders: n01/n01_9.JPEG"),
        ("filter --list {twice}", "lists n01_0.JPEG twice"),
        ("sort", "sort"),
    ],
)
def test_lists_that_cannot_be_made(tmp_path, words, mentioned):
    data = write_classes(tmp_path / "data", {"n01": 3, "n02": 3})
    lists = {"foreign": "n07_1.JPEG\n", "wrong": "n01_9.JPEG\nn02_0.JPEG\n", "twice": "n01_0.JPEG\nn01_0.JPEG\n"}
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
    words = words.format(absent=tmp_path / "absent", **{name: tmp_path / name for name in lists}).split()
    outcome = call(make_semi_lists.main, words[0], "--data_path", data, "--out", tmp_path / "out" / "list", *words[1:])
    assert_refused(outcome, mentioned)
    assert not (tmp_path / "out").exists()


# --- CUB-200-2011 ------------------------------------------------------------------------------------------------------

IMAGES = {
    1: "001.Black_bird/a_1.jpg",
    2: "001.Black_bird/a_2.jpg",
    3: "002.Auk/b_1.jpg",
    4: "002.Auk/b_2.jpg",
    5: "002.Auk/b_3.jpg",
}


@pytest.fixture
def cub(tmp_path):
    """Five images of two classes as published; images 1, 4 and 5 are for training."""
    root = tmp_path / "CUB_200_2011"
    for path in IMAGES.values():
        (root / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "images" / path).write_text(f"image {path}")
    write_tables(root)
    return root


def write_tables(root, images=IMAGES, train=(1, 4, 5), labels=(1, 1, 2, 2, 2)):
    (root / "images.txt").write_text("".join(f"{number} {path}\n" for number, path in images.items()))
    (root / "train_test_split.txt").write_text("".join(f"{number} {int(number in train)}\n" for number in images))
    pairs = zip(images, labels, strict=False)
    (root / "image_class_labels.txt").write_text("".join(f"{number} {label}\n" for number, label in pairs))


@pytest.mark.parametrize("copy", [(), ("--copy",)])
def test_cub_becomes_an_image_folder(cub, tmp_path, copy):
    out = tmp_path / "out"
    for _ in range(2):  # the second call finds all there
        outcome = call(make_cub200.main, "--cub", cub, "--out", out, *copy)
        assert outcome.status == 0, outcome
    assert "train: 2 classes, 3 images" in outcome.stdout and "val: 2 classes, 2 images" in outcome.stdout
    expected = {"train": (1, 4, 5), "val": (2, 3)}
    for split, numbers in expected.items():
        classes, samples = labelled_samples(out / split)
        assert classes == ["001.Black_bird", "002.Auk"]
        found = [(Path(path).relative_to(out / split).as_posix(), label) for path, label in samples]
        assert found == [(IMAGES[number], int(number > 2)) for number in numbers]
    files = snapshot(out)
    assert files.keys() == {f"{split}/{IMAGES[number]}" for split, numbers in expected.items() for number in numbers}
    assert all(text == f"image {name.split('/', 1)[1]}".encode() for name, text in files.items())
    assert all((out / name).is_symlink() == (not copy) for name in files)


def test_an_interrupted_copy_is_finished(cub, tmp_path):
    out = tmp_path / "out"
    assert call(make_cub200.main, "--cub", cub, "--out", out, "--copy").status == 0
    whole = snapshot(out)
    image = out / "val" / IMAGES[3]
    image.rename(f"{image}.part").write_text("half")
    assert call(make_cub200.main, "--cub", cub, "--out", out, "--copy").status == 0
    assert snapshot(out) == whole


def no_images(cub):
    (cub / "images" / IMAGES[3]).unlink()


def no_split(cub):
    (cub / "train_test_split.txt").unlink()


def other_numbers(cub):
    write_tables(cub, labels=(1, 1, 2, 2))


def two_labels(cub):
    write_tables(cub, labels=(1, 1, 2, 2, 1))


def one_label(cub):
    write_tables(cub, labels=(1, 1, 1, 1, 1))


def three_words(cub):
    (cub / "image_class_labels.txt").write_text("1 1 1\n")


def number_twice(cub):
    (cub / "images.txt").write_text(f"1 {IMAGES[1]}\n1 {IMAGES[2]}\n")


def outside(cub):
    write_tables(cub, {**IMAGES, 2: "../x.jpg"}, labels=(1, 3, 2, 2, 2))


@pytest.mark.parametrize(
    "damage, mentioned",
    [
        (no_images, "lacks 1 of 5 images: val/002.Auk/b_1.jpg"),
        (no_split, "cannot read train_test_split.txt"),
        (other_numbers, "image_class_labels.txt is about other images"),
        (two_labels, "contradict each other"),
        (one_label, "contradict each other"),
        (three_words, "image_class_labels.txt must have lines"),
        (number_twice, "images.txt must have lines"),
        (outside, "as <class>/<image>"),
    ],
)
def test_damaged_cub(cub, tmp_path, damage, mentioned):
    damage(cub)
    assert_refused(call(make_cub200.main, "--cub", cub, "--out", tmp_path / "out"), str(cub), mentioned)
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_something_else_are_left_alone(cub, tmp_path):
    out = tmp_path / "out"
    for name in ("notes.txt", f"train/{IMAGES[2]}", "train/003.Owl/c_1.jpg"):
        (out / name).parent.mkdir(parents=True)
        (out / name).touch()
        before = snapshot(out)
        assert_refused(call(make_cub200.main, "--cub", cub, "--out", out, "--copy"), str(out), "holds something else")
        assert snapshot(out) == before
        (out / name).unlink()
        for folder in sorted(out.rglob("*"), reverse=True):
            folder.rmdir()
        out.rmdir()
