"""ViT: the original's numbers and names, other image sizes, initialisation, stochastic depth, recomputation."""

import copy
import math

import pytest
import torch
from support.golden import CORE, GOLDEN, fill_, rel_error, tensor

from clever.models.vision_transformer import (
    Attention,
    VisionTransformer,
    vit_tiny,
)
from clever.utils import InputError


def small_vit(**options) -> VisionTransformer:
    return VisionTransformer(patch_size=4, img_size=32, embed_dim=48, depth=3, num_heads=3, **options)


@pytest.fixture(scope="module")
def golden_vit() -> VisionTransformer:
    return fill_(vit_tiny()).eval()


@pytest.mark.parametrize("size", [224, 96])
@torch.no_grad()
def test_cls_matches_original(golden_vit, size):
    cls = golden_vit(tensor(f"image.{size}x{size}", (2, 3, size, size)))
    assert rel_error(cls, GOLDEN[f"vit_tiny.{size}x{size}.cls"]) < 1e-4


@torch.no_grad()
def test_intermediate_layers_match_original(golden_vit):
    images = tensor("image.224x224", (2, 3, 224, 224))
    layers = golden_vit.get_intermediate_layers(images, 4)
    assert [tuple(layer.shape) for layer in layers] == [(2, 197, 192)] * 4
    assert rel_error(torch.stack([layer[:, 0] for layer in layers]), GOLDEN["vit_tiny.last4_cls"]) < 1e-4


@torch.no_grad()
def test_last_attention_matches_original(golden_vit):
    attention = golden_vit.get_last_selfattention(tensor("image.224x224", (2, 3, 224, 224)))
    assert attention.shape == (2, 3, 197, 197)
    assert rel_error(attention[:, :, 0, 1:], GOLDEN["vit_tiny.attn_cls_row"]) < 1e-4
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 3, 197))


def test_gradients_match_original(golden_vit):
    network = copy.deepcopy(golden_vit)
    network(tensor("image.96x96", (2, 3, 96, 96))).square().sum().backward()
    assert rel_error(network.pos_embed.grad[0, :3], GOLDEN["vit_tiny.96x96.grad.pos_embed"]) < 1e-3
    assert rel_error(network.blocks[0].attn.qkv.weight.grad[:4], GOLDEN["vit_tiny.96x96.grad.qkv0"]) < 1e-3


def test_state_dict_is_the_original_one():
    expected = {name: shape for name, shape in CORE["clever_state_dict_keys"] if name.startswith("backbone.")}
    assert {f"backbone.{name}": list(value.shape) for name, value in vit_tiny().state_dict().items()} == expected


def cubic(x: float) -> float:
    """Keys' convolution kernel with a = -0.75, which torch's bicubic uses."""
    a, x = -0.75, abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def interpolation_matrix(n: int, g: int) -> torch.Tensor:
    """[n, g]: weights of g samples in each of n, coordinates scaled by (n + 0.1) / g, border repeated."""
    matrix = torch.zeros(n, g, dtype=torch.float64)
    for i in range(n):
        source = (i + 0.5) * g / (n + 0.1) - 0.5
        for tap in range(math.floor(source) - 1, math.floor(source) + 3):
            matrix[i, min(max(tap, 0), g - 1)] += cubic(source - tap)
    return matrix


@pytest.mark.parametrize("h, w", [(3, 5), (4, 16), (7, 9), (1, 2)])
@torch.no_grad()
def test_positions_of_other_sizes_are_interpolated_by_scale_factor(h, w):
    network = fill_(small_vit()).eval()
    patches = network.pos_embed[0, 1:].double().reshape(8, 8, 48)
    expected = torch.einsum("ig,jk,gkd->ijd", interpolation_matrix(h, 8), interpolation_matrix(w, 8), patches)
    positions = network._positions(h, w)
    assert rel_error(positions[0, 1:], expected.reshape(h * w, 48)) < 1e-5
    assert torch.equal(positions[0, 0], network.pos_embed[0, 0])


def test_size_that_patches_do_not_divide_is_refused():
    with pytest.raises(InputError, match="32x33.*patch size 4"):
        small_vit()(torch.zeros(1, 3, 32, 33))


def test_initialisation():
    torch.manual_seed(0)
    network = vit_tiny()
    for name, p in network.named_parameters():
        if name.startswith("patch_embed"):
            bound = (3 * 16 * 16) ** -0.5  # torch's default: uniform
            assert p.abs().max() <= bound
            assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
        elif name in ("cls_token", "pos_embed") or p.ndim == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.15)
            assert abs(p.mean().item()) < 5 * 0.02 / math.sqrt(p.numel())
        else:
            assert torch.equal(p, torch.full_like(p, float("norm" in name and name.endswith("weight"))))


def test_checkpointing_changes_no_gradient_with_stochastic_depth():
    plain = fill_(small_vit(drop_path_rate=0.5)).train()
    recomputing = fill_(small_vit(drop_path_rate=0.5, checkpointing=True)).train()
    images, outputs = tensor("vit.images", (8, 3, 32, 32)), []
    for network in (plain, recomputing):
        torch.manual_seed(3)
        outputs.append(network(images))
        outputs[-1].square().sum().backward()
    assert torch.equal(*outputs)
    for (name, p), q in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        assert rel_error(q.grad, p.grad) < 1e-5, name


def test_stochastic_depth_rises_linearly_and_is_off_in_evaluation():
    network = fill_(small_vit(drop_path_rate=0.4))
    assert [block.drop_path.p for block in network.blocks] == pytest.approx([0.0, 0.2, 0.4])
    images = tensor("vit.images", (2, 3, 32, 32))
    assert torch.equal(network.eval()(images), fill_(small_vit()).eval()(images))


@pytest.mark.parametrize("tokens", [1, 37, 197])
def test_fused_attention_equals_the_plain_one_with_its_gradients(tokens, monkeypatch):
    attention, results = fill_(Attention(48, 3)), []
    for plain in (True, False):
        monkeypatch.setattr(Attention, "_prefers_plain", lambda self, q, plain=plain: plain)
        attention.zero_grad()
        x = tensor("vit.tokens", (2, tokens, 48)).requires_grad_()
        y = attention(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad.clone() for p in attention.parameters())])
    for expected, actual in zip(*results, strict=True):
        assert rel_error(actual, expected) < 1e-5


@pytest.mark.gpu
def test_fused_attention_on_a_gpu_equals_the_plain_one(golden_vit):
    images = tensor("image.96x96", (2, 3, 96, 96))
    network = copy.deepcopy(golden_vit).cuda()
    assert rel_error(network(images.cuda()).cpu(), GOLDEN["vit_tiny.96x96.cls"]) < 1e-3  # TF32 may be on
