"""The images that eval_linear_ds.py trains and tests on, and the input that it refuses before anything is written."""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.downstream_world import downstream, make_world, parse, result_of
from support.in_process import assert_refused, times
from torchvision import datasets as torchvision_datasets

import eval_linear_ds as ds
from clever.data.datasets import ImageDataset


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


# --- partial labels ----------------------------------------------------------------------------------------------------


@pytest.fixture
def images_read(monkeypatch):
    """(path, label) of every image that a dataset has read."""
    read, get_batch = [], ImageDataset.__getitems__

    def recorded(self, indices):
        read.extend(self.samples[index] for index in indices)
        return get_batch(self, indices)

    monkeypatch.setattr(ImageDataset, "__getitems__", recorded)
    return read


@pytest.mark.parametrize("mode, by_flag", [("semi_1", True), ("semi_10", False)])
def test_semi_trains_on_exactly_the_listed_images(world, images_read, tmp_path, mode, by_flag):
    data, more = world.data, ("--semi_list", world.listed)
    if not by_flag:  # the default list, in the folder of the data
        data, more = shutil.copytree(world.data, tmp_path / "data"), ()
        shutil.copy(world.listed, data / f"data_{mode.removeprefix('semi_')}percent.txt")
    outcome = downstream(world, world.vit, tmp_path / "out", "--ds_mode", mode, "--data_path", data, *more)
    assert outcome.status == 0, outcome
    listed = [("cyan/00.png", 0), ("cyan/02.png", 0), ("grey/03.png", 1), ("red/01.png", 2)]
    expected = [(str(data / "train" / name), label) for name, label in listed]
    trained = [sample for sample in images_read if Path(sample[0]).is_relative_to(data / "train")]
    assert sorted(trained) == sorted(2 * expected)  # two epochs
    result = result_of(tmp_path / "out")
    assert (result["num_train_images"], result["num_test_images"], result["num_labels"]) == (4, 13, 3)


# --- torchvision's datasets --------------------------------------------------------------------------------------------


def save_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Food101 and OxfordIIITPet in torchvision's layout, with one image per class and split (Pets: two for training)."""
    root = tmp_path_factory.mktemp("sets")
    food, meta = root / "food-101", {"train": {}, "test": {}}
    for label in range(101):
        for split, number in (("train", 1), ("test", 2)):
            meta[split][f"dish_{label:03}"] = [f"dish_{label:03}/{number}"]
            save_image(food / "images" / f"dish_{label:03}" / f"{number}.jpg")
    (food / "meta").mkdir()
    for split, images in meta.items():
        (food / "meta" / f"{split}.json").write_text(json.dumps(images))
    pets, lines = root / "oxford-iiit-pet", {"trainval": [], "test": []}
    for label in range(37):
        for split, numbers in (("trainval", (1, 2)), ("test", (3,))):
            for number in numbers:
                lines[split].append(f"Pet_{label}_{number} {label + 1} 1 1\n")
                save_image(pets / "images" / f"Pet_{label}_{number}.jpg")
    (pets / "annotations").mkdir()
    for split, rows in lines.items():
        (pets / "annotations" / f"{split}.txt").write_text("".join(rows))
    return root


@pytest.fixture
def flowers(tmp_path, monkeypatch):
    """Flowers102 with an image per class and split: image 1 + i + 102 * split is of class i. MD5 sums are not checked."""
    from scipy.io import savemat

    folder = tmp_path / "flowers-102"
    for number in range(1, 307):
        save_image(folder / "jpg" / f"image_{number:05}.jpg")
    numbers = np.arange(1, 307)
    savemat(folder / "imagelabels.mat", {"labels": (numbers - 1) % 102 + 1})
    savemat(folder / "setid.mat", dict(zip(("trnid", "valid", "tstid"), numbers.reshape(3, 102), strict=True)))
    monkeypatch.setattr(torchvision_datasets.Flowers102, "_check_integrity", lambda self: True)
    return tmp_path


def found(root, name, split, *more):
    classes, samples = ds.find_images(parse("--dataset_type", name, "--data_path", root, *more), split)
    assert len(classes) == ds.CLASSES[name] and all(Path(path).is_file() for path, _ in samples)
    return [(Path(path).stem, label) for path, label in samples]


def test_splits_of_food_and_pets(sets):
    assert found(sets, "Food101", "train") == [("1", label) for label in range(101)]
    assert found(sets, "Food101", "test") == [("2", label) for label in range(101)]
    assert found(sets, "OxfordIIITPet", "train") == [(f"Pet_{i}_{number}", i) for i in range(37) for number in (1, 2)]
    assert found(sets, "OxfordIIITPet", "test") == [(f"Pet_{i}_3", i) for i in range(37)]


def test_splits_of_flowers(flowers):
    splits = [[(f"image_{1 + i + 102 * split:05}", i) for i in range(102)] for split in range(3)]
    assert found(flowers, "Flowers102", "train") == splits[0]
    assert found(flowers, "Flowers102", "train", "--train_on_val", "true") == splits[0] + splits[1]
    assert found(flowers, "Flowers102", "test", "--train_on_val", "true") == splits[2]


# --- bad input ---------------------------------------------------------------------------------------------------------

# Flags that eval_linear.py has as well are refused by the same functions.
REFUSED = [
    ("--ds_mode semi_5", "'semi_5'", "semi_10"),
    ("--dataset_type CUB200", "--dataset_type CUB200", "200 classes", "holds 3"),
    ("--data_path {raw}", "{raw}", "python -m scripts.data.make_cub200"),
    ("--dataset_type Food101", "Food101", "{data}/food-101", "--download"),
    ("--download", "--download", "Flowers102, Food101, OxfordIIITPet"),
    ("--ds_mode semi_1", "{data}/data_1percent.txt", "scripts.data.make_semi_lists", "--semi_list"),
    ("--backbone_lr 0.1", "--backbone_lr 0.1", "must be 0", "linear"),
    ("--evaluate", "ds_linear_data_linear_sgd_lr0.5_lrbk0_ep2_bs4_li_aug1.pth.tar", "no such file"),
]  # fmt: skip


@pytest.fixture(scope="module")
def bad(world):
    """The world, and paths that eval_linear_ds.py refuses, by name."""
    root = world.root / "bad"
    (root / "raw").mkdir(parents=True)
    (root / "raw" / "image_class_labels.txt").touch()
    return argparse.Namespace(**vars(world), raw=root / "raw")


@pytest.mark.parametrize("flags, mentioned", [(flags, mentioned) for flags, *mentioned in REFUSED])
def test_refuses(bad, tmp_path, flags, mentioned):
    before = times(bad.root)
    outcome = downstream(bad, bad.resnet, tmp_path / "out", *flags.format(**vars(bad)).split())
    assert_refused(outcome, *(text.format(**vars(bad)) for text in mentioned))
    assert not (tmp_path / "out").exists() and times(bad.root) == before
