"""Lists of labelled images, and torchvision's datasets: what is found, and what is refused."""

from pathlib import Path

import pytest
from PIL import Image
from torchvision import datasets as torchvision_datasets

from clever.evaluation.downstream_data import listed_samples, torchvision_samples
from clever.utils import InputError

# --- lists of images ---------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    """Class folders cyan, grey and red with images 00.png to 03.png, and n01 with a file named as in ImageNet."""
    names = [f"{name}/{number:02}.png" for name in ("cyan", "grey", "red") for number in range(4)]
    for name in [*names, "n01/n01_5.JPEG"]:
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).touch()
    return tmp_path / "train"


def test_listed_images_in_the_order_of_the_list(root, tmp_path):
    (tmp_path / "list.txt").write_text("red/01.png\n\n n01_5.JPEG \ncyan/02.png\ngrey/00.png\ncyan/00.png\n")
    classes, samples = listed_samples(tmp_path / "list.txt", root)
    assert classes == ["cyan", "grey", "n01", "red"]
    expected = [("red/01.png", 3), ("n01/n01_5.JPEG", 2), ("cyan/02.png", 0), ("grey/00.png", 1), ("cyan/00.png", 0)]
    assert samples == [(str(root / name), label) for name, label in expected]


ONE_OF_EACH = "cyan/00.png\nred/00.png\ngrey/00.png\nn01_5.JPEG\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (ONE_OF_EACH + "blue/00.png\nteal_1.png\n", "lists class folders that are not in .*: blue, teal .2 in total"),
        (ONE_OF_EACH + "grey/99.png\n", "lists images that are not in .*: grey/99.png .1 in total"),
        (ONE_OF_EACH + "red_7.png\n", "lists images that are not in .*: red/red_7.png"),
        (ONE_OF_EACH + "cyan/../cyan/00.png\n", "lists images that are not in .*: cyan/../cyan/00.png"),
        ("cyan/00.png\nred/00.png\n", "lists no image of these class folders of .*: grey, n01 .2 in total"),
        (ONE_OF_EACH + "cyan/00.png\n", "lists cyan/00.png twice"),
    ],
)
def test_refuses_lists(root, tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(InputError, match=f"list of images {tmp_path}/list.txt: {message}"):
        listed_samples(tmp_path / "list.txt", root)


def test_refuses_a_list_that_is_no_file(root):
    with pytest.raises(InputError, match=f"list of images {root}: cannot be read"):
        listed_samples(root, root)


# --- torchvision's datasets --------------------------------------------------------------------------------------------


@pytest.fixture
def incomplete(tmp_path):
    """The folders of torchvision's datasets; Pets have one image, the others nothing."""
    pets, food = ("oxford-iiit-pet/annotations", "oxford-iiit-pet/images"), ("food-101/meta", "food-101/images")
    for name in (*pets, *food, "flowers-102/jpg"):
        (tmp_path / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "oxford-iiit-pet" / "images" / "Pet_1.jpg")
    (tmp_path / "oxford-iiit-pet" / "annotations" / "test.txt").write_text("Pet_1 1 1 1\n")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("OxfordIIITPet", "split test has images of 1 classes, expected 37"),
        ("Food101", "cannot be read .*test.json"),
        ("Flowers102", "cannot be read .*not found or corrupted"),
    ],
)
def test_refuses_incomplete_datasets(incomplete, name, message):
    with pytest.raises(InputError, match=f"{name} in {incomplete}.*: {message}"):
        torchvision_samples(name, incomplete, "test")


def test_downloads_only_on_request(monkeypatch, tmp_path):
    requests = []

    def food(root: Path, split: str, download: bool):
        requests.append(download)
        raise RuntimeError("no network")

    monkeypatch.setattr(torchvision_datasets, "Food101", food)
    with pytest.raises(InputError, match=f"Food101: no folder {tmp_path}/food-101 .*--download"):
        torchvision_samples("Food101", tmp_path, "train")
    with pytest.raises(InputError, match="Food101.*no network"):
        torchvision_samples("Food101", tmp_path, "train", download=True)
    (tmp_path / "food-101").mkdir()
    with pytest.raises(InputError, match="Food101.*no network"):
        torchvision_samples("Food101", tmp_path, "train")
    assert requests == [True, False]
