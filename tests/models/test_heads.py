"""Heads, the split into IR and EF, and the multi-crop network."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support.golden import GOLDEN, fill_, rel_error, tensor

from clever.models.heads import DINOHead, MultiCropWrapper, Split, WeightNormLinear, split_ir_ef
from clever.models.vision_transformer import vit_tiny
from clever.utils import InputError


def test_head_golden():
    head = fill_(DINOHead(154, 256))
    assert rel_error(head(tensor("head.in", (5, 154))), GOLDEN["dino_head.out"]) < 1e-5


def test_multicrop_golden():
    network = fill_(MultiCropWrapper(vit_tiny(), DINOHead(153, 256), DINOHead(39, 128), hp1=0.8)).eval()
    crops = [tensor(f"crop.{i}", (2, 3, size, size)) for i, size in enumerate((224, 224, 96, 96, 96))]
    with torch.no_grad():
        (p1, p2), z = network(crops, return_features=True)
    z_ir, z_ef = split_ir_ef(z, 0.8)
    for name, value in (("p1", p1), ("p2", p2), ("z_ir", z_ir), ("z_ef", z_ef)):
        assert rel_error(value, GOLDEN[f"multicrop.{name}"]) < 1e-4, name


class CountingBackbone(nn.Module):
    embed_dim = 6

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, x):
        self.sizes.append(tuple(x.shape))
        return x.mean((2, 3)).repeat(1, 2)


def test_backbone_runs_once_per_resolution_and_keeps_the_order_of_the_views():
    backbone = CountingBackbone()
    network = MultiCropWrapper(backbone, nn.Identity())
    crops = [torch.full((2, 3, s, s), float(i)) for i, s in enumerate((8, 8, 4, 4, 4))]
    out = network(crops)
    assert backbone.sizes == [(4, 3, 8, 8), (6, 3, 4, 4)]
    assert out[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize(
    "dim, sizes", [(192, (153, 39)), (384, (307, 77)), (512, (409, 103)), (768, (614, 154)), (2048, (1638, 410))]
)
def test_split_truncates(dim, sizes):
    assert Split(dim, 0.8).widths == sizes
    z = torch.arange(2 * dim).view(2, dim)
    ir, ef = split_ir_ef(z, 0.8)
    assert (ir.shape[1], ef.shape[1]) == sizes and torch.equal(torch.cat([ir, ef], 1), z)


@pytest.mark.parametrize("hp1", [0.0, 1.2, 0.01])
def test_empty_parts_are_refused(hp1):
    with pytest.raises(InputError, match=f"hp1 {hp1}.*width 64"):
        Split(64, hp1)


@pytest.mark.parametrize("train_g", [False, True])
def test_last_layer_equals_torchs_weight_norm_with_all_gradients(train_g):
    torch.manual_seed(0)
    layer = WeightNormLinear(8, 20).double()
    layer.weight_g.data.uniform_(0.5, 2)
    layer.weight_g.requires_grad = train_g
    x = torch.randn(6, 8, dtype=torch.double, requires_grad=True)
    weight = torch.randn(6, 20, dtype=torch.double)
    (layer(x) * weight).sum().backward()
    found = x.grad.clone(), layer.weight_v.grad.clone(), layer.weight_g.grad
    x.grad = layer.weight_v.grad = layer.weight_g.grad = None
    normalized = layer.weight_g * layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True)
    reference = F.linear(x, normalized)
    torch.testing.assert_close(layer(x), reference)
    (reference * weight).sum().backward()
    torch.testing.assert_close(found[0], x.grad)
    torch.testing.assert_close(found[1], layer.weight_v.grad)
    assert (found[2] is None) == (not train_g)
    if train_g:
        torch.testing.assert_close(found[2], layer.weight_g.grad)


def test_last_layer_under_autocast():
    layer, x = WeightNormLinear(16, 32), torch.randn(4, 16, requires_grad=True)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and rel_error(y.float(), exact) < 0.02
    y.sum().backward()
    assert layer.weight_v.grad.dtype == torch.float32 and x.grad.dtype == torch.float32


def test_head_initialisation_and_structure():
    torch.manual_seed(0)
    head = DINOHead(192, 1000)
    hidden = head.mlp[2].weight
    assert hidden.std().item() == pytest.approx(0.02, rel=0.02) and hidden.abs().max() > 0.06
    assert all(not m.bias.any() for m in head.mlp if isinstance(m, nn.Linear))
    bound = 256**-0.5
    assert head.last_layer.weight_v.abs().max().item() <= bound
    assert head.last_layer.weight_v.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert torch.equal(head.last_layer.weight_g, torch.ones(1000, 1)) and not head.last_layer.weight_g.requires_grad
    assert DINOHead(8, 10, norm_last_layer=False).last_layer.weight_g.requires_grad
