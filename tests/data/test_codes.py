"""Codes of views: hand-computed cases, AugSelf's golden numbers, and what the data set tells."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.golden import DATA

from clever.data import codes
from clever.data.augmentations import (
    RANDOM_NUMBERS,
    VIEW,
    MultiCropAugmentation,
    ViewDistribution,
    Views,
    eval_transform,
)
from clever.data.codes import COLUMNS, GROUPS

CASES = json.loads((DATA / "methods.json").read_text())
NUMBERS = load_file(DATA / "methods.safetensors")
IDENTITY = [0.5, 0.5, 1, 1, 0, 0, 1, *[0] * 8]


def view_of_the_whole(side=24, **changes):
    """Parameters VIEW [1, 1] of a square image, shown as it is except for `changes`."""
    views = np.zeros((1, 1), VIEW)
    values = {"size": side, "brightness": 1, "contrast": 1, "saturation": 1} | changes
    for name in ("height", "width", "resized_height", "resized_width"):
        views[name] = side
    for name, value in values.items():
        views[name] = value
    return views


def code_of(parameters, height=24, width=24, **distribution):
    """The code of one view, {column: value}."""
    (row,) = codes.encode(parameters, [height], [width], Views([ViewDistribution(24, **distribution)]))[0]
    return dict(zip(COLUMNS, row.tolist(), strict=True))


def test_identity():
    assert list(code_of(view_of_the_whole()).values()) == IDENTITY


def test_each_operation_by_hand():
    rotated = code_of(view_of_the_whole(angle=30))
    assert rotated["sin"] == pytest.approx(0.5) and rotated["cos"] == pytest.approx(0.75**0.5)
    jittered = view_of_the_whole(jitter=2, brightness=1.4, contrast=0.6, saturation=1.1, hue=-0.1)
    expected = {"brightness": 0.5, "contrast": -0.5, "saturation": 0.25, "hue": -0.5}
    assert expected == pytest.approx({name: code_of(jittered, saturation=0.2)[name] for name in expected})
    assert code_of(view_of_the_whole(jitter=1, brightness=1.4), brightness=0.8)["brightness"] == pytest.approx(0.25)
    assert code_of(view_of_the_whole(blur=1.5))["blur"] == 0.75
    for name in ("flip", "grey", "solarize"):
        assert code_of(view_of_the_whole(**{name: 1}))[name] == 1
    assert code_of(view_of_the_whole(elastic_alpha=50))["elastic"] == 1


def test_what_was_not_applied_is_not_told():
    hidden = view_of_the_whole(jitter=0, brightness=1.3, contrast=0.7, saturation=0.5, hue=0.1, order=7, elastic_seed=5)
    assert list(code_of(hidden).values()) == IDENTITY
    assert list(code_of(view_of_the_whole(jitter=1), brightness=0, hue=0, radius=(0, 0)).values()) == IDENTITY


def test_box_that_is_seen():
    """Of a random crop the box; of a clean view the window that is cut out of the resized image."""
    box = code_of(view_of_the_whole(top=10, left=20, height=50, width=100), 100, 200)
    assert [box[name] for name in COLUMNS[:4]] == pytest.approx([0.35, 0.35, 0.5, 0.5])
    views = eval_transform("ori", 224)  # 300 x 600 is resized to 256 x 512
    clean = codes.encode(views.draw_seeded([0], [300], [600]), [300], [600], views)[0, 0]
    np.testing.assert_allclose(clean[:4], [0.5, 0.5, 224 / 256, 224 / 512], rtol=1e-6)
    assert clean[4:].tolist() == IDENTITY[4:]


def parameters_of(rows, columns):
    """Golden rows -> VIEW [B, 1], heights, widths."""
    values = dict(zip(columns, np.array(rows).T, strict=True))
    views = np.zeros((len(rows), 1), VIEW)
    views["size"] = views["resized_height"] = views["resized_width"] = 224
    for name in columns[2:]:
        views[name] = values[name][:, None]
    return views, values["image_height"], values["image_width"]


@pytest.mark.parametrize("name", ["augself.targets0", "augself.targets1", "augself.targets2", "augself.targets3"])
def test_relative_codes_are_those_of_augself(name):
    case = CASES["cases"][name]
    strengths = zip(("brightness", "contrast", "saturation", "hue"), case["settings"]["jitter_strength"], strict=True)
    views = Views([ViewDistribution(224, **dict(strengths))])
    first, second = (
        torch.from_numpy(codes.encode(*parameters_of(case["inputs"][view], case["inputs"]["columns"]), views))[:, 0]
        for view in ("view1", "view2")
    )
    for order, pair in (("d12", (first, second)), ("d21", (second, first))):
        for group, values in codes.relative(*pair, ("crop", "color", "flip")).items():
            number = f"{name}.{order}.{group}"
            error = (values - NUMBERS[number]).norm()
            assert error <= CASES["numbers"][number]["tolerance"], number


def test_relative_codes_by_hand():
    """Golden case 9; angles of 70 and -40 degrees differ by 110."""
    inputs = CASES["cases"]["hand9"]["inputs"]
    views = Views([ViewDistribution(224)])
    first, second = (parameters_of(inputs[view], inputs["columns"]) for view in ("view1", "view2"))
    first[0]["angle"], second[0]["angle"] = 70, -40
    first, second = (torch.from_numpy(codes.encode(*view, views))[:, 0] for view in (first, second))
    crop12, crop21, flip = NUMBERS["hand9.value"].float()
    groups = list(GROUPS)
    for told, crop, sign in (
        (codes.relative(first, second, groups), crop12, 1),
        (codes.relative(second, first, groups), crop21, -1),
    ):
        assert torch.allclose(told["crop"], crop[None]) and torch.equal(told["flip"], flip[:1, None])
        assert told["rotation"][0].tolist() == pytest.approx([sign * np.sin(np.deg2rad(110)), np.cos(np.deg2rad(110))])
    assert codes.Told(groups).absolute(first).shape == (1, sum(codes.Told(groups).widths.values()))


@pytest.mark.parametrize(("aug", "constant"), [("aug1", {"rotation", "elastic"}), ("aug1_2", {"elastic"}), ("aug1_4_2", set())])
def test_what_a_recipe_never_changes(aug, constant):
    views = MultiCropAugmentation(aug, local_crops_number=0)
    assert {group for group in GROUPS if codes.is_constant(group, views)} == constant
