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
    VIEW,
    MultiCropAugmentation,
    ViewDistribution,
    Views,
    eval_transform,
)
from clever.data.codes import COLUMNS, GROUPS
from clever.data.datasets import ImageDataset
from clever.data.rendering import choose_renderer

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
    widths = [codes.absolute(first, [group]).shape[1] for group in groups]
    assert widths == [values.shape[1] for values in codes.relative(first, second, groups).values()]
    assert torch.equal(codes.absolute(first, ["blur", "crop"]), first[:, [12, 0, 1, 2, 3]])


@pytest.mark.parametrize(("aug", "constant"), [("aug1", {"rotation", "elastic"}), ("aug1_2", {"elastic"}), ("aug1_4_2", set())])
def test_what_a_recipe_never_changes(aug, constant):
    views = MultiCropAugmentation(aug, local_crops_number=0)
    assert {group for group in GROUPS if codes.is_constant(group, views)} == constant


# --- the data set ------------------------------------------------------------------------------------------------------

BASE = MultiCropAugmentation("aug1_4_2", local_crops_number=2, global_crops_size=32, local_crops_size=16)
EXTRA = Views([ViewDistribution(16, scale=(0.05, 0.14), flip_p=0.5, blur_p=0.5)] * 2)  # of the size of the local views


@pytest.fixture
def samples(tmp_path):
    """Eight images, of which all but the first have one size."""
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 30 if i else 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return [(str(tmp_path / f"{i}.png"), -1) for i in range(8)]


@pytest.mark.parametrize("renderer", ["torchvision", choose_renderer("auto")])
@pytest.mark.parametrize("images_per_draw", [1, 3])
def test_extra_views_leave_the_base_views_as_they_are(samples, renderer, images_per_draw):
    indices = [3, 0, 5, 6, 1]
    plain, _ = ImageDataset(samples, BASE, seed=4, renderer=renderer).__getitems__(indices)
    told, codes_only = ImageDataset(samples, BASE, 4, (), renderer, Views([])).__getitems__(indices)
    tensors, all_codes = ImageDataset(samples, BASE, 4, (), renderer, EXTRA, images_per_draw).__getitems__(indices)
    assert len(plain) == len(told) == 2 and [tuple(tensor.shape) for tensor in tensors[2:]] == [(2, 5, 3, 16, 16)]
    for base, same, again in zip(plain, told, tensors, strict=False):
        assert torch.equal(base, same) and torch.equal(base, again)
    assert codes_only.shape == (5, 2, len(COLUMNS)) and all_codes.shape == (5, 4, len(COLUMNS))
    assert all_codes.dtype == torch.float32 and torch.equal(all_codes[:, :2], codes_only)
    sizes = [40] * 5, [30, 50, 30, 30, 30]
    drawn = BASE.draw_seeded([np.random.SeedSequence((4, 0, i)).generate_state(1)[0] for i in indices], *sizes)
    assert torch.equal(codes_only, torch.from_numpy(codes.encode(drawn[:, :2], *sizes, Views(BASE.distributions[:2]))))


def test_chunks_of_a_batch_have_equal_draws_in_the_extra_views(samples):
    def extra_codes(indices, epoch=0, images_per_draw=3):
        dataset = ImageDataset(samples, BASE, extra=EXTRA, images_per_draw=images_per_draw)
        dataset.set_epoch(epoch)
        return dataset.__getitems__(indices)[1][:, 2:]

    first = extra_codes([1, 2, 3, 4, 5, 6, 7])
    assert torch.equal(first, extra_codes([1, 2, 3, 4, 5, 6, 7]))
    assert torch.equal(first, first[[0, 0, 0, 3, 3, 3, 6]]) and len(first.flatten(1).unique(dim=0)) == 3
    assert not torch.equal(first[:, 0], first[:, 1]) and not torch.equal(first, extra_codes([1, 2, 3, 4, 5, 6, 7], epoch=1))
    alone = extra_codes([7, 4, 1], images_per_draw=1)  # functions of the index, whatever the batch
    assert torch.equal(alone, first[[6, 3, 0]]) and len(extra_codes(list(range(1, 8)), images_per_draw=1).unique(dim=0)) == 7
