"""Codes of views: hand-computed cases, AugSelf's golden numbers, and what the data set tells."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.golden import DATA

from clever.data import codes
from clever.data.augmentations import VIEW, MultiCropAugmentation, ViewDistribution, Views, eval_transform
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


def test_each_operation_by_hand():
    assert list(code_of(view_of_the_whole()).values()) == IDENTITY
    rotated = code_of(view_of_the_whole(angle=30))
    assert rotated["sin"] == pytest.approx(0.5) and rotated["cos"] == pytest.approx(0.75**0.5)
    jittered = code_of(view_of_the_whole(jitter=2, brightness=1.4, contrast=0.6, saturation=1.1, hue=-0.1), saturation=0.2)
    assert list(jittered.values())[7:11] == pytest.approx([0.5, -0.5, 0.25, -0.5])
    assert code_of(view_of_the_whole(jitter=1, brightness=1.4), brightness=0.8)["brightness"] == pytest.approx(0.25)
    assert code_of(view_of_the_whole(blur=1.5))["blur"] == 0.75
    for name, field, value in (
        ("flip", "flip", 1),
        ("grey", "grey", 1),
        ("solarize", "solarize", 1),
        ("elastic", "elastic_alpha", 100),
    ):
        assert code_of(view_of_the_whole(**{field: value}))[name] == 1
    assert code_of(view_of_the_whole(elastic_alpha=30), elastic_alpha=50)["elastic"] == pytest.approx(0.6)


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


def golden_codes(case, view, strengths=(0.4, 0.4, 0.4, 0.1), angle=0.0):
    """Codes [B, P] of a view of a golden case."""
    inputs = CASES["cases"][case]["inputs"]
    values = dict(zip(inputs["columns"], np.array(inputs[view]).T, strict=True))
    parameters = np.zeros((len(inputs[view]), 1), VIEW)
    for name in ("size", "resized_height", "resized_width"):
        parameters[name] = 224
    for name in inputs["columns"][2:]:
        parameters[name] = values[name][:, None]
    parameters["angle"] = angle
    ranges = dict(zip(("brightness", "contrast", "saturation", "hue"), strengths, strict=True))
    views = Views([ViewDistribution(224, **ranges)])
    return torch.from_numpy(codes.encode(parameters, values["image_height"], values["image_width"], views))[:, 0]


@pytest.mark.parametrize("name", [name for name in CASES["cases"] if name.startswith("augself.targets")])
def test_relative_codes_are_those_of_augself(name):
    strengths = CASES["cases"][name]["settings"]["jitter_strength"]
    first, second = (golden_codes(name, view, strengths) for view in ("view1", "view2"))
    for order, pair in (("d12", (first, second)), ("d21", (second, first))):
        for group, values in codes.relative(*pair, ("crop", "color", "flip")).items():
            number = f"{name}.{order}.{group}"
            assert (values - NUMBERS[number]).norm() <= CASES["numbers"][number]["tolerance"], number


def test_relative_codes_by_hand():
    """Golden case 9; angles of 70 and -40 degrees differ by 110."""
    first, second = golden_codes("hand9", "view1", angle=70), golden_codes("hand9", "view2", angle=-40)
    crop12, crop21, flip = NUMBERS["hand9.value"].float()
    for pair, crop, angle in (((first, second), crop12, 110), ((second, first), crop21, -110)):
        told = codes.relative(*pair, list(GROUPS))
        assert torch.allclose(told["crop"], crop[None]) and torch.equal(told["flip"], flip[:1, None])
        assert told["rotation"][0].tolist() == pytest.approx([np.sin(np.deg2rad(angle)), np.cos(np.deg2rad(angle))])
        assert all(values.shape == codes.absolute(first, [group]).shape for group, values in told.items())
    assert torch.equal(codes.absolute(first, ["blur", "crop"]), first[:, [12, 0, 1, 2, 3]])


@pytest.mark.parametrize(("aug", "constant"), [("aug1", {"rotation", "elastic"}), ("aug1_2", {"elastic"}), ("aug1_4_2", set())])
def test_what_a_recipe_never_changes(aug, constant):
    views = MultiCropAugmentation(aug, local_crops_number=0)
    assert {group for group in GROUPS if codes.is_constant(group, views)} == constant


BASE = MultiCropAugmentation("aug1_4_2", local_crops_number=2, global_crops_size=32, local_crops_size=16)
EXTRA = Views([ViewDistribution(16, scale=(0.05, 0.14), flip_p=0.5, blur_p=0.5)] * 2)  # of the size of the local views


@pytest.fixture
def samples(tmp_path):
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
    assert all_codes.shape == (5, 4, len(COLUMNS)) and torch.equal(all_codes[:, :2], codes_only)
    sizes = [40] * 5, [30, 50, 30, 30, 30]
    drawn = BASE.draw_seeded([np.random.SeedSequence((4, 0, i)).generate_state(1)[0] for i in indices], *sizes)
    assert torch.equal(codes_only, torch.from_numpy(codes.encode(drawn[:, :2], *sizes, Views(BASE.distributions[:2]))))


def test_chunks_of_a_batch_have_equal_draws_in_the_extra_views(samples):
    def extra_codes(indices, epoch=0, images_per_draw=3):
        dataset = ImageDataset(samples, BASE, extra=EXTRA, images_per_draw=images_per_draw)
        dataset.set_epoch(epoch)
        return dataset.__getitems__(list(indices))[1][:, 2:]

    first = extra_codes(range(1, 8))
    assert torch.equal(first, extra_codes(range(1, 8)))
    assert torch.equal(first, first[[0, 0, 0, 3, 3, 3, 6]]) and len(first.flatten(1).unique(dim=0)) == 3
    assert not torch.equal(first[:, 0], first[:, 1]) and not torch.equal(first, extra_codes(range(1, 8), epoch=1))
    alone = extra_codes([7, 4, 1], images_per_draw=1)  # functions of the index, whatever the batch
    assert torch.equal(alone, first[[6, 3, 0]]) and len(extra_codes(range(1, 8), images_per_draw=1).unique(dim=0)) == 7
