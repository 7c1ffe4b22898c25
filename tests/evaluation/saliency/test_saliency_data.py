"""Folders, sizes and ground truths of the saliency evaluation."""

from itertools import product

import numpy as np
import pytest
from PIL import Image

from clever.data.augmentations import ToNormalizedTensor
from clever.evaluation.saliency.data import (
    LAYOUTS,
    Pair,
    ResizeToPatches,
    SaliencyDataset,
    dataset_folders,
    find_pairs,
    patch_grid,
)
from clever.utils import InputError


@pytest.mark.parametrize("side, patches", [(24, 2), (40, 2), (41, 3), (16, 1), (9, 1), (152, 10), (200, 12), (193, 12)])
def test_sizes_are_rounded_to_patches_as_in_the_original(side, patches):
    assert patch_grid(side, 160, 16) == (10, patches) and patch_grid(160, side, 16) == (patches, 10)


def test_half_a_patch_is_too_small():
    with pytest.raises(InputError, match="8x100 pixels: too small for a patch of 16"):
        patch_grid(8, 100, 16)


def test_network_sees_whole_patches_by_lanczos():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 75, 3), dtype=np.uint8))
    view = ResizeToPatches(16, 0, 100, ToNormalizedTensor((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))(image)
    pixels = np.asarray(image.resize((80, 32), Image.Resampling.LANCZOS)) / 255
    expected = (pixels - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    np.testing.assert_allclose(view.numpy(), expected.transpose(2, 0, 1), atol=1e-5)


@pytest.mark.parametrize("max_side, patches", [(0, (7, 3)), (200, (7, 3)), (112, (7, 3)), (56, (4, 2)), (10, None)])
def test_large_images_are_shrunk_to_the_longest_side(max_side, patches):
    """Sizes in patches of 16, columns by rows, of an image of 112 x 48 pixels."""
    transform = ResizeToPatches(16, max_side, 21, ToNormalizedTensor((0.5,) * 3, (0.5,) * 3))
    image = Image.new("RGB", (112, 48))
    if patches is None:
        with pytest.raises(InputError, match="too small for a patch of 16"):
            transform(image)
    else:
        assert transform(image).shape == (3, 16 * patches[1], 16 * patches[0])


def test_images_with_too_many_patches_are_refused():
    transform = ResizeToPatches(16, 0, 20, ToNormalizedTensor((0.5,) * 3, (0.5,) * 3))
    with pytest.raises(InputError, match="112x48 pixels: 21 patches, more than 20; give --max_side"):
        transform(Image.new("RGB", (112, 48)))


@pytest.mark.parametrize("threshold, expected", [(1, [0, 1, 1, 1]), (128, [0, 0, 1, 1]), (255, [0, 0, 0, 1])])
def test_ground_truth_from_the_threshold_on_is_object(tmp_path, threshold, expected):
    Image.new("RGB", (4, 1)).save(tmp_path / "image.png")
    Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8)).save(tmp_path / "truth.png")
    pair = Pair("x", str(tmp_path / "image.png"), str(tmp_path / "truth.png"))
    example = SaliencyDataset([pair], transform=lambda image: None, gt_threshold=threshold)[0]
    assert example.truth.tolist() == [[bool(value) for value in expected]]


def test_pairs_are_found_by_name_at_any_depth(tmp_path):
    for path in ("img/a/1.jpg", "img/2.png", "img/3.jpeg", "gt/a/1.png", "gt/2.bmp", "gt/4.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / path)
    found = find_pairs("x", tmp_path / "img", tmp_path / "gt")
    assert [(pair.name, pair.truth) for pair in found.pairs] == [
        ("2", str(tmp_path / "gt" / "2.bmp")),
        ("a/1", str(tmp_path / "gt" / "a" / "1.png")),
    ]
    assert set(found.unpaired) == {"3", "4"}
    Image.new("RGB", (4, 4)).save(tmp_path / "img" / "2.jpg")
    with pytest.raises(InputError, match="2.jpg and 2.png differ by suffix only"):
        find_pairs("x", tmp_path / "img", tmp_path / "gt")


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_found(tmp_path, name):
    roots, folders = LAYOUTS[name]
    for number, (root, (images, truths)) in enumerate(product(roots, folders)):
        paths = tmp_path / str(number) / root / images, tmp_path / str(number) / root / truths
        for path in paths:
            path.mkdir(parents=True)
        assert dataset_folders(str(tmp_path / str(number)), name) == paths
