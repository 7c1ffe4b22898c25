"""What is drawn for training views and perturbations: probabilities and ranges of the parameters, without any image."""

import json
import math

import numpy as np
import pytest
import torch
from support.golden import DATA
from torchvision.transforms import v2

from clever.data import augmentations
from clever.data.augmentations import RANDOM_NUMBERS, RECIPES, VIEW, MultiCropAugmentation, eval_transform
from clever.evaluation.probe_arguments import probe_train_transform

DRAWS = 4000


def draw(views, height=375, width=500, draws=DRAWS, seed=0):
    """Parameters VIEW [draws, V]."""
    u = np.random.default_rng(seed).random((draws, len(views), RANDOM_NUMBERS))
    return views.draw(u, [height] * draws, [width] * draws)


def assert_share(flags, share):
    """Within four standard errors of `share`, and exact for 0 and 1."""
    margin = 4 * math.sqrt(share * (1 - share) / len(flags))
    assert abs(np.mean(flags) - share) <= margin, (np.mean(flags), share)


def assert_uniform(values, low, high):
    """Ends nearly reached but not passed, and mean and quartiles where they belong."""
    spread = high - low
    assert low - 1e-6 <= values.min() < low + 0.01 * spread and high - 0.01 * spread < values.max() <= high + 1e-6
    quartiles = np.array([0.25, 0.5, 0.75])
    np.testing.assert_allclose(np.quantile(values, quartiles), low + spread * quartiles, atol=0.04 * spread)


@pytest.mark.parametrize(("aug", "rotation", "elastic_p"), [("aug1", 0, 0), ("aug1_2", 90, 0), ("aug1_4_2", 90, 0.5)])
def test_training_views_follow_the_recipe(aug, rotation, elastic_p):
    """Every number of CLeVER's and DINO's recipes, view by view."""
    views = draw(MultiCropAugmentation(aug))
    assert views.shape == (DRAWS, 10)
    for v in range(10):
        view = views[:, v]
        assert set(view["size"]) == {224 if v < 2 else 96} and set(view["bicubic"]) == {1}
        assert_share(view["flip"], 0.5)
        if rotation:
            assert_uniform(view["angle"], -rotation, rotation)
        assert rotation or not view["angle"].any()
        assert_share(view["elastic_alpha"] == 100, elastic_p)
        assert set(view["elastic_alpha"]) <= {0, 100}
        assert_share(view["jitter"] == 1, 0.8)
        for name, reach in (("brightness", 0.4), ("contrast", 0.4), ("saturation", 0.2)):
            assert_uniform(view[name], 1 - reach, 1 + reach)
        assert_uniform(view["hue"], -0.1, 0.1)
        assert set(view["order"]) == set(range(24))
        assert_share(view["grey"], 0.2)
        blurred = view["blur"] > 0
        assert_share(blurred, 1.0 if v == 0 else 0.1 if v == 1 else 0.5)
        assert_uniform(view["blur"][blurred], 0.1, 2.0) if v != 1 else None
        assert_share(view["solarize"], 0.2 if v == 1 else 0)


def test_crops_are_distributed_as_torchvisions():
    """Area and ratio of the boxes, beside those that RandomResizedCrop draws."""
    box = draw(MultiCropAugmentation("aug1", (0.4, 1.0), local_crops_number=0))[:, 0]
    torch.manual_seed(0)
    crop, blank, quantiles = v2.RandomResizedCrop(224, (0.4, 1.0)), torch.empty(3, 375, 500), (0.05, 0.25, 0.5, 0.75, 0.95)
    theirs = [crop.make_params([blank]) for _ in range(DRAWS)]
    for name in ("top", "left", "height", "width"):
        reference = np.array([parameters[name] for parameters in theirs])
        margin = reference.std() * 9 / math.sqrt(DRAWS) + 4
        assert np.abs(np.quantile(box[name], quantiles) - np.quantile(reference, quantiles)).max() < margin, name


@pytest.mark.parametrize(("height", "width"), [(375, 500), (1, 1), (1, 4000), (4000, 1), (7, 5)])
def test_boxes_of_odd_images(height, width):
    """Inside the image, never empty; where no random box fits, the largest central one with a ratio from 3/4 to 4/3."""
    box = draw(MultiCropAugmentation("aug1", (0.05, 1.0)), height, width, draws=300).ravel()
    assert (box["height"] >= 1).all() and (box["width"] >= 1).all()
    assert (box["top"] + box["height"] <= height).all() and (box["left"] + box["width"] <= width).all()
    if max(height, width) == 4000:
        assert 1999 in box["left" if width == 4000 else "top"]


def test_a_recipe_changes_only_what_it_names():
    """The same random numbers give the same boxes, colours and blurs in all recipes."""
    views = {aug: draw(MultiCropAugmentation(aug), draws=50) for aug in RECIPES}
    for name in VIEW.names:
        if name not in ("angle", "elastic_alpha"):
            assert all(np.array_equal(views[aug][name], views["aug1"][name]) for aug in RECIPES), name


@pytest.mark.parametrize(
    ("name", "flip", "rotation", "jitter", "alpha"),
    [
        ("ori", 0, 0, 0, 0), ("basic", 0, 0, 1, 0), ("aug1", 1, 0, 1, 0), ("aug1_2", 0, 90, 1, 0), ("aug1_3", 0, 180, 1, 0),
        ("aug1_4_1", 0, 90, 2, 50), ("aug1_4_2", 0, 90, 2, 100), ("aug1_4_3", 0, 90, 2, 150),
    ],
)  # fmt: skip
def test_perturbations(name, flip, rotation, jitter, alpha):
    """Always all operations, without probabilities; elastic distortion (jitter 2) comes last."""
    view = draw(eval_transform(name, 64))[:, 0]
    for field, value in (("flip", flip), ("jitter", jitter), ("elastic_alpha", alpha), ("bicubic", name == "ori")):
        assert set(view[field]) == {value}, field
    assert not view["grey"].any() and not view["blur"].any() and not view["solarize"].any()
    assert_uniform(view["angle"], -rotation, rotation) if rotation else None
    assert rotation or not view["angle"].any()
    if jitter:
        for field in ("brightness", "contrast", "saturation"):
            assert_uniform(view[field], 0.6, 1.4)
        assert_uniform(view["hue"], -0.1, 0.1)
    assert set(augmentations.PERTURBATIONS) == {"ori", "basic", "aug1", "aug1_2", "aug1_3", "aug1_4_1", "aug1_4_2", "aug1_4_3"}


@pytest.mark.parametrize(("size", "side"), [(224, 256), (32, 37)])
@pytest.mark.parametrize(("height", "width"), [(500, 375), (75, 90), (1, 300)])
def test_centre_crops_are_torchvisions(size, side, height, width):
    view = draw(eval_transform("ori", size), height, width, draws=1)[0, 0]
    resized = v2.Resize(side)(torch.empty(3, height, width)).shape[1:]
    assert (view["resized_height"], view["resized_width"]) == tuple(resized)
    assert (view["y"], view["x"]) == tuple(round((length - size) / 2) for length in resized)
    assert (view["top"], view["left"], view["height"], view["width"], view["size"]) == (0, 0, height, width, size)


def test_probe_training_images():
    view = draw(probe_train_transform(32, (0.5, 0.75)), 400, 400)[:, 0]
    area = view["height"] * view["width"] / 400**2
    assert 0.49 < area.min() < 0.51 and 0.74 < area.max() < 0.76
    assert_share(view["flip"], 0.5)
    for name in ("bicubic", "angle", "elastic_alpha", "jitter", "grey", "blur", "solarize"):
        assert not view[name].any(), name


def test_the_parameters_of_a_seed_never_change():
    """Golden: a later version that draws otherwise would break every run that resumes."""
    views = MultiCropAugmentation("aug1_4_2", local_crops_number=1)
    drawn = views.draw_seeded([0, 2**32 - 1], [375, 28], [500, 28])
    golden = json.loads((DATA / "views.json").read_text())
    assert (
        golden["names"] == list(VIEW.names)
        and golden["torch_rand"] == torch.rand(2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    )
    for view, expected in zip(drawn.ravel(), golden["views"], strict=True):
        assert np.allclose(view.tolist(), expected, rtol=1e-6, atol=1e-7)
