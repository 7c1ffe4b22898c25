"""Lists of labelled images, and torchvision's datasets: what is found, and what is refused."""

import pytest

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
        (ONE_OF_EACH + "blue/00.png\nteal_1.png\n", "2 of its images are not in .*: blue/00.png, teal/teal_1.png"),
        (ONE_OF_EACH + "cyan/../cyan/00.png\n", "1 of its images are not in .*: cyan/../cyan/00.png"),
        ("cyan/00.png\nred/00.png\n", "2 class folders have no image in it: grey, n01"),
    ],
)
def test_refuses_lists(root, tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(InputError, match=f"list of images {tmp_path}/list.txt: .*{message}"):
        listed_samples(tmp_path / "list.txt", root)
    with pytest.raises(InputError, match=f"list of images {root}: cannot be read"):
        listed_samples(root, root)


# --- torchvision's datasets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, folder", [("OxfordIIITPet", "oxford-iiit-pet"), ("Food101", "food-101")])
def test_refuses_incomplete_datasets(tmp_path, name, folder):
    for present in (False, True):
        if present:
            (tmp_path / folder / "images").mkdir(parents=True)
            (tmp_path / folder / "meta").mkdir()
            (tmp_path / folder / "annotations").mkdir()
        with pytest.raises(InputError, match=f"{name} in {tmp_path}/{folder}: cannot be read; --download fetches it"):
            torchvision_samples(name, tmp_path, "test")
