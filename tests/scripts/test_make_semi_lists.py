"""make_semi_lists.py: seeded draws, filtered lists, and refused input."""

import os
from collections import Counter
from pathlib import Path

import pytest
from support.in_process import assert_refused, call

from clever.evaluation.downstream_data import listed_samples
from scripts.data import make_semi_lists


def write_classes(root, counts, name="{wnid}_{number}.JPEG"):
    """Empty images <root>/train/<wnid>/...; `counts` gives their number per class."""
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


def test_draw_is_balanced_and_reproducible(tmp_path):
    data = write_classes(tmp_path / "data", {"n01": 40, "n02": 25, "n03": 60})
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        outcome = draw(data, tmp_path / name, 10, "--seed", seed)
        assert outcome.status == 0, outcome
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1] != texts[2]
    counts = classes_in(tmp_path / "a")  # 10 % of 125, rounded to even
    assert counts == {"n01": 4, "n02": 4, "n03": 4} and "12 images of 3 classes, 4 to 4 per class" in outcome.stdout
    assert len(set(texts[0].splitlines())) == 12 and "n01_" in texts[0] and "/" not in texts[0]
    classes, samples = listed_samples(tmp_path / "a", data / "train")
    assert classes == ["n01", "n02", "n03"] and sorted(Path(path).name for path, _ in samples) == texts[0].splitlines()


@pytest.mark.parametrize(
    "percent, expected",
    [(0.5, [1, 1, 1]), (11, [4, 5, 5]), (60, [25, 25, 25]), (80, [25, 37, 38]), (100, [25, 40, 60])],  # 11 %: 13.75 images
)
def test_class_sizes_of_a_draw(tmp_path, percent, expected):
    data = write_classes(tmp_path / "data", {"a": 40, "b": 25, "c": 60})
    assert draw(data, tmp_path / "list", percent).status == 0
    assert sorted(classes_in(tmp_path / "list").values()) == expected


def test_names_of_any_form_are_listed_and_found_again(tmp_path):
    data = write_classes(tmp_path / "data", {"my_class": 3, "9": 3}, name="{number}.png")
    (data / "train" / "9" / "deeper").mkdir()
    (data / "train" / "9" / "deeper" / "9_1.png").touch()
    open(os.fsencode(data / "train" / "9") + b"/9_caf\xe9 1.png", "wb").close()  # not UTF-8
    assert draw(data, tmp_path / "list", 100).status == 0
    lines = set(os.fsdecode((tmp_path / "list").read_bytes()).splitlines())
    assert {"my_class/0.png", "9/deeper/9_1.png", os.fsdecode(b"9_caf\xe9 1.png")} <= lines and len(lines) == 8
    assert len(listed_samples(tmp_path / "list", data / "train")[1]) == 8
    (data / "train" / "9" / "new\nline.png").touch()
    assert_refused(draw(data, tmp_path / "second", 100), "a list cannot hold a name with line breaks")


def test_filter_keeps_the_existing_classes(tmp_path):
    data = write_classes(tmp_path / "data", {"n01": 3, "n03": 3})
    (tmp_path / "all").write_text("n03_2.JPEG\nn01_0.JPEG\nn02_5.JPEG\nn01_2.JPEG\nn04_0.JPEG\n")
    flags = ("filter", "--list", tmp_path / "all", "--data_path", data, "--out", data / "IN100_1percent.txt")
    outcome = call(make_semi_lists.main, *flags)
    assert outcome.status == 0 and "3 images of 2 classes, 1 to 2 per class" in outcome.stdout, outcome
    assert (data / "IN100_1percent.txt").read_text() == "n01_0.JPEG\nn01_2.JPEG\nn03_2.JPEG\n"
    assert call(make_semi_lists.main, *flags).status == 0  # the same list again
    (data / "IN100_1percent.txt").write_text("mine\n")
    assert_refused(call(make_semi_lists.main, *flags), "other content")
    assert (data / "IN100_1percent.txt").read_text() == "mine\n"


@pytest.mark.parametrize(
    "words, mentioned",
    [
        ("draw --percent 0", "--percent 0"),
        ("filter --list {absent}", "cannot be read"),
        ("filter --list {wrong}", "of which 1 do not exist: n01/n01_9.JPEG"),
    ],
)
def test_refuses(tmp_path, words, mentioned):
    data = write_classes(tmp_path / "data", {"n01": 3, "n02": 3})
    (tmp_path / "wrong").write_text("n01_9.JPEG\nn02_0.JPEG\n")
    words = words.format(absent=tmp_path / "absent", wrong=tmp_path / "wrong").split()
    outcome = call(make_semi_lists.main, words[0], "--data_path", data, "--out", tmp_path / "out" / "list", *words[1:])
    assert_refused(outcome, mentioned)
    assert not (tmp_path / "out").exists()
