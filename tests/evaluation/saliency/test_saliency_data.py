"""Folders, sizes and ground truths of the saliency evaluation, and the features that it compares."""

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from clever.evaluation.images import ToNormalizedTensor, images_by_name
from clever.evaluation.saliency.data import Pair, SaliencyDataset, find_pairs, resize_to_patches
from clever.evaluation.saliency.detection import patch_features
from clever.models import vision_transformer
from clever.utils import InputError


@pytest.mark.parametrize("side, patches", [(8, 1), (9, 1), (16, 1), (24, 2), (40, 2), (41, 3), (152, 10), (200, 12), (193, 12)])
def test_sizes_are_rounded_to_patches_as_in_the_original(side, patches):
    assert resize_to_patches(Image.new("RGB", (side, 160)), 16, 0).size == (16 * patches, 160)


def test_network_sees_whole_patches_by_lanczos(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 75, 3), dtype=np.uint8))
    image.save(tmp_path / "x.png")
    to_tensor = ToNormalizedTensor((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    example = SaliencyDataset([Pair("x", str(tmp_path / "x.png"))], 16, to_tensor)[0]
    pixels = np.asarray(image.resize((80, 32), Image.Resampling.LANCZOS)) / 255
    expected = (pixels - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    np.testing.assert_allclose(example.network_input.numpy(), expected.transpose(2, 0, 1), atol=1e-5)
    assert (example.pixels == np.asarray(image)).all() and example.truth is None


def test_photos_are_turned_as_they_were_taken(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: viewers turn the picture clockwise
    Image.new("RGB", (40, 16)).save(tmp_path / "photo.jpg", exif=exif)
    Image.new("L", (16, 40)).save(tmp_path / "truth.png")
    pair = Pair("x", str(tmp_path / "photo.jpg"), str(tmp_path / "truth.png"))
    example = SaliencyDataset([pair], 8, ToNormalizedTensor((0,) * 3, (1,) * 3))[0]
    assert example.error is None and example.network_input.shape == (3, 40, 16) and example.pixels.shape == (40, 16, 3)


def test_images_are_found_by_name_at_any_depth_in_natural_order(tmp_path):
    for path in ("img/a/1.jpg", "img/10.png", "img/9.jpeg", "gt/a/1.png", "gt/10.bmp", "gt/4.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / path)
    assert list(images_by_name(tmp_path / "img")) == ["9", "10", "a/1"]
    pairs = find_pairs(tmp_path / "img", tmp_path / "gt")
    assert [(pair.name, pair.truth) for pair in pairs] == [
        (name, str(tmp_path / "gt" / file)) for name, file in (("9", "9.png"), ("10", "10.bmp"), ("a/1", "a/1.png"))
    ]
    assert "9.png: cannot be read" in SaliencyDataset(pairs, 1, lambda image: None)[0].error  # it does not exist
    Image.new("RGB", (4, 4)).save(tmp_path / "img" / "10.jpg")
    with pytest.raises(InputError, match="10.jpg: another image differs from it by suffix only"):
        images_by_name(tmp_path / "img")


@pytest.mark.parametrize("kind, expected", [("q", [0]), ("kqv", [1, 0, 2])])
def test_features_are_those_of_the_last_attention(kind, expected):
    torch.manual_seed(0)
    network = vision_transformer.vit_tiny(depth=2).eval()
    outputs = []
    network.blocks[-1].attn.qkv.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    features = patch_features(network, torch.randn(3, 48, 80), kind)
    qkv = rearrange(outputs[0][0, 1:], "N (three D) -> three N D", three=3)  # without [CLS]
    np.testing.assert_array_equal(features, np.concatenate([qkv[index] for index in expected], axis=1))
    assert features.shape == (15, 192 * len(expected))
