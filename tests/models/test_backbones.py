"""The registry of backbones: names, options, timm models, synchronised batch norm."""

import pytest
import torch

from clever.evaluation.pretrained import resolve_arch
from clever.models.backbones import BACKBONES, backbone_names, build_backbone, is_ours, synchronize_batch_norm, vit_names
from clever.utils import InputError

SMALL = {"patch_size": 8, "img_size": 64}
TIMM = ["vit_tiny_patch16_224", "convnext_atto", "efficientnet_b0"]


FAMILIES = ["vit_micro", "resnet8", "resnet18", "resnet50_small", "vssm2-vmambav2_tiny_224"]


def test_all_backbones_can_be_built():
    with torch.device("meta"):
        networks = {arch: build_backbone(arch) for arch in backbone_names()}
    assert set(FAMILIES) < set(networks) and all(network.embed_dim > 0 for network in networks.values())
    assert list(networks["deit_small"].state_dict()) == list(networks["vit_small"].state_dict())
    assert resolve_arch("deit_small", "vit_small") == "deit_small"


@pytest.mark.parametrize("arch, checkpointing", [(arch, False) for arch in FAMILIES] + [("vit_tiny", True), ("resnet8", True)])
def test_backbones_run_forward_and_backward(arch, checkpointing):
    torch.manual_seed(0)
    network = build_backbone(arch, **SMALL, checkpointing=checkpointing).train()
    features = torch.cat([network(torch.randn(2, 3, size, size)) for size in (64, 32)])
    assert features.shape == (4, network.embed_dim)
    (features * torch.randn_like(features)).sum().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


class Pooled(torch.nn.Module):
    """A backbone that has none of the options."""

    embed_dim = 3

    def forward(self, images):
        return images.mean((-2, -1))


def test_a_backbone_is_added_with_one_entry(monkeypatch):
    monkeypatch.setitem(BACKBONES, "pooled", Pooled)
    assert isinstance(build_backbone("pooled", drop_path_rate=0.3), Pooled)
    assert is_ours("pooled") and "pooled" in backbone_names() and "pooled" not in vit_names()
    with pytest.raises(InputError, match="pooled has no activation checkpointing"):
        build_backbone("pooled", checkpointing=True)


@pytest.mark.parametrize("arch", TIMM)
def test_timm_models(arch):
    torch.manual_seed(0)
    network = build_backbone(arch, img_size=96, drop_path_rate=0.1, checkpointing=True).train()
    features = torch.cat([network(torch.randn(2, 3, size, size)) for size in (96, 64)])
    assert features.shape == (4, network.embed_dim)
    (features * torch.randn_like(features)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    if arch == "vit_tiny_patch16_224":
        assert network.pos_embed.shape[1] == 37 and network.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)


@pytest.mark.parametrize("arch", ["resnet_18", "hf-hub:someone/something"])
def test_unknown_names_are_refused_without_network(arch):
    with pytest.raises(InputError, match="choose one of vit_micro, .*vssm.*, or a timm model"):
        build_backbone(arch)


def batch_norms(network):
    return {type(m).__name__ for m in network.modules() if hasattr(m, "running_mean")}


def test_synchronised_batch_norm_keeps_the_activations_of_timm_models(monkeypatch):
    """timm's batch norms may contain an activation, which torch's own conversion would drop."""
    monkeypatch.setattr("clever.models.backbones.is_distributed", lambda: True)
    arch = "efficientnet_b0"
    model = build_backbone(arch).eval()
    activations = sum(type(getattr(m, "act", None)).__name__ == "SiLU" for m in model.modules())
    assert activations > 10
    (converted,) = synchronize_batch_norm([model], arch, torch.device("cuda"))
    assert batch_norms(converted) == {"SyncBatchNormAct"}
    ours = synchronize_batch_norm([build_backbone("resnet8"), build_backbone("resnet8")], "resnet8", torch.device("cuda"))
    assert [batch_norms(network) for network in ours] == [{"SyncBatchNorm"}] * 2
