"""Attention of [CLS], threshold masks, and the pictures of both."""

from unittest import mock

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from support.golden import GOLDEN, fill_, rel_error, tensor

from clever.data.augmentations import ToNormalizedTensor
from clever.evaluation.attention import (
    ResizeAndCrop,
    cls_attention,
    draw_pictures,
    masked,
    overlay,
    threshold_mask,
)
from clever.models.backbones import build_backbone
from clever.models.vision_transformer import VisionTransformer, vit_tiny
from clever.utils import InputError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def backbone():
    """Four heads, patches of 8."""
    return fill_(build_backbone("vit_micro", patch_size=8, img_size=32)).eval()


# --- attention ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_attention_of_cls_matches_original():
    attention = fill_(vit_tiny()).eval().get_last_cls_attention(tensor("image.224x224", (2, 3, 224, 224)))
    assert rel_error(attention, GOLDEN["vit_tiny.attn_cls_row"]) < 1e-4


@pytest.mark.parametrize("H, W", [(32, 32), (24, 56), (8, 8)])
@torch.no_grad()
def test_attention_of_cls_is_a_row_of_the_whole_matrix(backbone, H, W):
    images = tensor("attention.images", (2, 3, H, W))
    row = backbone.get_last_cls_attention(images)
    whole = backbone.get_last_selfattention(images)  # B, M, 1+N, 1+N
    assert row.shape == (2, 4, H * W // 64)
    torch.testing.assert_close(row, whole[:, :, 0, 1:])
    torch.testing.assert_close(row.sum(-1) + whole[:, :, 0, 0], torch.ones(2, 4))
    grid = cls_attention(backbone, images)
    assert grid.shape == (2, 4, H // 8, W // 8) and torch.equal(grid.flatten(2), row)


def test_the_attention_matrix_of_the_last_block_is_never_built():
    network = VisionTransformer(patch_size=4, img_size=32, embed_dim=48, depth=2, num_heads=3).eval()
    softmaxed = []
    plain = network.blocks[-1].attn._weights

    def record(q, k):
        softmaxed.append((q.shape[-2], k.shape[-2]))
        return plain(q, k)

    with mock.patch.object(network.blocks[-1].attn, "_weights", record):
        network.get_last_cls_attention(torch.zeros(1, 3, 32, 32))
    assert softmaxed == [(1, 65)]


def test_patches_that_are_equal_get_equal_attention():
    network = fill_(build_backbone("vit_micro", patch_size=8, img_size=32)).eval()
    torch.nn.init.zeros_(network.pos_embed)
    attention = cls_attention(network, torch.ones(1, 3, 32, 40))[0]
    assert attention.std((1, 2)).max() < 1e-6 * attention.mean()
    flat = draw_pictures(torch.ones(3, 32, 40), torch.full((4, 4, 5), 0.05), 0.5)
    for name, picture in flat.items():
        assert name.startswith("mask") or (picture == picture[0, 0]).all(), name


# Attention to 2 x 3 patches, threshold, patches of the mask.
@pytest.mark.parametrize(
    "attention, threshold, expected",
    [
        ([[0, 0, 0], [0, 1, 0]], 0.6, [[0, 0, 0], [0, 1, 0]]),
        ([[0, 0, 0], [0, 1, 0]], 1.0, [[0, 0, 0], [0, 1, 0]]),
        ([[0.1, 0.4, 0.1], [0.1, 0.3, 0]], 0.35, [[0, 1, 0], [0, 0, 0]]),
        ([[0.1, 0.4, 0.1], [0.1, 0.3, 0]], 0.5, [[0, 1, 0], [0, 1, 0]]),  # the one that crosses the threshold is kept
        ([[1, 4, 1], [1, 3, 0]], 0.69, [[0, 1, 0], [0, 1, 0]]),  # fractions of the sum
        ([[1, 4, 1], [1, 3, 0]], 1.0, [[1, 1, 1], [1, 1, 0]]),
        ([[1, 1, 1], [1, 0, 0]], 0.5, [[1, 1, 0], [0, 0, 0]]),  # the first of equal ones
    ],
)
def test_mask_by_hand(attention, threshold, expected):
    mask = threshold_mask(torch.tensor([attention], dtype=torch.float), threshold)
    assert mask.int().tolist() == [expected]


@pytest.mark.parametrize("threshold", [0.1, 0.6, 0.95])
def test_mask_holds_enough_with_the_fewest_patches(threshold):
    """The same as DINO's definition: sorted upwards, the cumulative sum exceeds 1 - threshold."""
    attention = tensor("attention.map", (5, 6, 7)).exp()
    mask = threshold_mask(attention, threshold)
    for head, kept in zip(attention.double(), mask, strict=True):
        share = head / head.sum()
        assert share[kept].sum() >= threshold > share[kept].sum() - share[kept].min()
        assert share[kept].min() >= share[~kept].max()
        upwards, order = share.flatten().sort()
        assert torch.equal(kept.flatten()[order], upwards.cumsum(0) > 1 - threshold)


# --- pictures ----------------------------------------------------------------------------------------------------------


# Size of a 50 x 37 image (width x height), --image_size, the resized image cropped to whole patches of 8 (H, W).
@pytest.mark.parametrize(
    "size, expected",
    [([0], (32, 48)), ([37], (32, 48)), ([74], (72, 96)), ([24, 60], (24, 56)), ([8, 8], (8, 8)), ([480, 480], (480, 480))],
)
def test_images_are_resized_and_cropped_to_whole_patches(size, expected):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8))
    prepared = ResizeAndCrop(size, 8, MEAN, STD)(image)
    assert prepared.shape == (3, *expected)
    if size == [0]:
        assert torch.equal(prepared, ToNormalizedTensor(MEAN, STD)(image)[:, :32, :48])  # cropped at the right and the bottom


def test_image_smaller_than_a_patch():
    with pytest.raises(InputError, match="image of 50x7 pixels: smaller than a patch of 8; give a larger --image_size"):
        ResizeAndCrop([0], 8, MEAN, STD)(Image.new("RGB", (50, 7)))


def test_outline_and_inside_of_a_mask():
    mask = np.zeros((7, 7), bool)
    mask[1:6, 1:6] = True
    picture = masked(np.full((7, 7, 3), 100, np.uint8), mask)
    assert picture[0, 0].tolist() == [100] * 3  # outside
    for row, column in ((1, 3), (5, 3), (3, 1), (3, 5)):  # outline
        assert picture[row, column].tolist() == [255, 0, 0]
    assert picture[3, 3].tolist() == picture[2, 4].tolist() == [177, 50, 50]  # half red
    whole = masked(np.full((2, 2, 3), 100, np.uint8), np.ones((2, 2), bool))
    assert (whole == [177, 50, 50]).all()  # the border of the image is no outline


def test_overlay_adds_heat_to_the_image():
    image = np.array([[[0, 0, 0], [255, 255, 255]], [[0, 0, 0], [102, 51, 0]]], np.uint8)
    heads = np.array([[[0, 0], [1, 1]], [[5, 5], [5, 9.0]]])  # stretched: 0 0 1 1 and 0 0 0 1, mean 0 0 0.5 1
    jet = matplotlib.colormaps["jet"]([[0.0, 0.0], [0.5, 1.0]])[..., :3]
    blend = jet + image / 255
    assert np.allclose(overlay(image, heads), 255 * blend / blend.max(), atol=1)
    assert overlay(image, heads).max() == 255
