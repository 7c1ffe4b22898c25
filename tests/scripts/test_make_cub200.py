"""make_cub200.py: image folders from CUB-200-2011, and refused input."""

import pytest
from support.in_process import assert_refused, call, snapshot

from scripts.data import make_cub200

IMAGES = {
    1: "001.Black_bird/a_1.jpg",
    2: "001.Black_bird/a_2.jpg",
    3: "002.Auk/b_1.jpg",
    4: "002.Auk/b_2.jpg",
    5: "002.Auk/b_3.jpg",
}


@pytest.fixture
def cub(tmp_path):
    """Five images of two classes in the published layout; images 1, 4 and 5 are for training."""
    root = tmp_path / "CUB_200_2011"
    for path in IMAGES.values():
        (root / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "images" / path).write_text(f"image {path}")
    write_tables(root)
    return root


def write_tables(root, images=IMAGES, split="10011"):
    (root / "images.txt").write_text("".join(f"{number} {path}\n" for number, path in images.items()))
    (root / "train_test_split.txt").write_text("".join(f"{number} {x}\n" for number, x in zip(images, split, strict=False)))


@pytest.mark.parametrize("copy", [(), ("--copy",)])
def test_makes_an_image_folder(cub, tmp_path, copy):
    out = tmp_path / "out"
    outcome = call(make_cub200.main, "--cub", cub, "--out", out, *copy)
    assert outcome.status == 0, outcome
    assert "train: 2 classes, 3 images" in outcome.stdout and "val: 2 classes, 2 images" in outcome.stdout
    names = [f"{split}/{IMAGES[number]}" for split, numbers in (("train", (1, 4, 5)), ("val", (2, 3))) for number in numbers]
    assert snapshot(out) == {name: f"image {name.split('/', 1)[1]}".encode() for name in names}
    assert all((out / name).is_symlink() == (not copy) for name in names)


@pytest.mark.parametrize(
    "damage, mentioned",
    [
        (lambda cub: (cub / "images" / IMAGES[3]).unlink(), "lacks 1 of 5 images: val/002.Auk/b_1.jpg"),
        (lambda cub: write_tables(cub, split="10012"), "0 or 1 for each image"),
    ],
)
def test_refuses_damaged_data(cub, tmp_path, damage, mentioned):
    damage(cub)
    assert_refused(call(make_cub200.main, "--cub", cub, "--out", tmp_path / "out"), str(cub), mentioned)
    assert not (tmp_path / "out").exists()
