"""The patch features that TokenCut compares."""

import numpy as np
import pytest
import torch
from einops import rearrange

from clever.evaluation.saliency.detection import patch_features
from clever.models import vision_transformer


@pytest.mark.parametrize("kind, expected", [("k", [1]), ("q", [0]), ("v", [2]), ("kqv", [1, 0, 2])])
def test_features_are_those_of_the_last_attention(kind, expected):
    torch.manual_seed(0)
    network = vision_transformer.vit_tiny().eval()
    outputs = []
    network.blocks[-1].attn.qkv.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    features = patch_features(network, torch.randn(3, 48, 80), kind)
    qkv = rearrange(outputs[0][0, 1:], "N (three D) -> three N D", three=3)  # without [CLS]
    np.testing.assert_array_equal(features, np.concatenate([qkv[index] for index in expected], axis=1))
    assert features.shape == (15, 192 * len(expected))
    assert len(network.blocks[-1].attn.qkv._forward_hooks) == 1  # ours: none was left behind
