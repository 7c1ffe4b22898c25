"""Attention of [CLS], threshold masks, and the pictures of both."""

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from support.golden import fill_, tensor

from clever.evaluation.attention import PictureDataset, cls_attention, overlay, threshold_mask
from clever.evaluation.images import ToNormalizedTensor
from clever.models.backbones import build_backbone

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def backbone():
    """Four heads, patches of 8."""
    return fill_(build_backbone("vit_micro", patch_size=8, img_size=32)).eval()


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


# Size of a 50 x 37 image (width x height), --image_size, the resized image cropped to whole patches of 8 (H, W).
@pytest.mark.parametrize(
    "size, expected",
    [([0], (32, 48)), ([74], (72, 96)), ([24, 60], (24, 56)), ([480, 480], (480, 480))],
)
def test_images_are_resized_and_cropped_to_whole_patches(size, expected, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8))
    image.save(tmp_path / "x.png")
    path, prepared = PictureDataset([str(tmp_path / "x.png")], size, 8, MEAN, STD)[0]
    assert path == str(tmp_path / "x.png") and prepared.shape == (3, *expected)
    if size == [0]:
        assert torch.equal(prepared, ToNormalizedTensor(MEAN, STD)(image)[:, :32, :48])  # cropped at the right and the bottom


def test_overlay_adds_heat_to_the_image():
    image = np.array([[[0, 0, 0], [255, 255, 255]], [[0, 0, 0], [102, 51, 0]]], np.uint8)
    heads = np.array([[[0, 0], [1, 1]], [[5, 5], [5, 9.0]]])  # stretched: 0 0 1 1 and 0 0 0 1, mean 0 0 0.5 1
    jet = matplotlib.colormaps["jet"]([[0.0, 0.0], [0.5, 1.0]])[..., :3]
    blend = jet + image / 255
    assert np.allclose(overlay(image, heads), 255 * blend / blend.max(), atol=1)
    assert overlay(image, heads).max() == 255
