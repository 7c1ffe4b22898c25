"""The registry of backbones: names, options, timm models, synchronised batch norm."""

import sys

import pytest
import timm
import torch
from support.golden import fill_, rel_error, tensor

from clever.models.backbones import (
    BACKBONES,
    backbone_names,
    build_backbone,
    check_timm_size,
    is_ours,
    synchronize_batch_norm,
    vit_names,
)
from clever.models.weights import backbone_state, load_backbone_weights
from clever.utils import InputError

SMALL = {"patch_size": 8, "img_size": 64}
TIMM = ["vit_tiny_patch16_224", "convnext_atto", "efficientnet_b0", "resnet34"]


@pytest.mark.parametrize(
    "arch, checkpointing",
    [(arch, False) for arch in backbone_names()] + [("vit_tiny", True), ("resnet8", True), ("resnet18", True)],
)
def test_every_backbone_runs_forward_and_backward(arch, checkpointing):
    torch.manual_seed(0)
    network = build_backbone(arch, **SMALL, checkpointing=checkpointing).train()
    features = torch.cat([network(torch.randn(2, 3, size, size)) for size in (64, 32)])
    assert features.shape == (4, network.embed_dim)
    (features * torch.randn_like(features)).sum().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


@pytest.mark.parametrize("arch", ["vit_micro", "resnet8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_network_in_half_precision(arch, dtype):
    """Converted as a whole, it computes and learns in its type; VMamba's test is in tests/vmamba."""
    network, images = fill_(build_backbone(arch, **SMALL)).eval(), tensor("image.64x64", (2, 3, 64, 64))
    exact = network(images).detach()
    features = network.to(dtype)(images.to(dtype))
    assert features.dtype == dtype and rel_error(features.float(), exact) < 0.05
    features.float().pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_arguments_reach_the_vit():
    network = build_backbone("vit_micro", patch_size=4, img_size=32, drop_path_rate=0.3, checkpointing=True)
    assert network.patch_embed.patch_size == 4 and network.pos_embed.shape == (1, 65, 128)
    assert network.blocks[-1].drop_path.p == pytest.approx(0.3) and network.checkpointing


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


@pytest.mark.parametrize("name, same", [("deit_tiny", "vit_tiny"), ("deit_small", "vit_small")])
def test_deit_means_our_vit(name, same):
    shapes = [{k: v.shape for k, v in build_backbone(arch).state_dict().items()} for arch in (name, same)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_impossible_drop_path_rate(rate):
    with pytest.raises(InputError, match=f"drop path rate {rate}"):
        build_backbone("resnet8", drop_path_rate=rate)


@pytest.mark.parametrize("arch", TIMM)
def test_timm_models(arch):
    torch.manual_seed(0)
    network = build_backbone(arch, img_size=96, drop_path_rate=0.1, checkpointing=True).train()
    features = torch.cat([network(torch.randn(2, 3, size, size)) for size in (96, 64)])
    assert features.shape == (4, network.embed_dim)
    (features * torch.randn_like(features)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    load_backbone_weights(network, backbone_state({"teacher": {f"backbone.{k}": v for k, v in network.state_dict().items()}}))


def test_timm_gets_the_options_that_it_knows():
    network = build_backbone("vit_tiny_patch16_224", img_size=96, drop_path_rate=0.2)
    assert isinstance(network, timm.models.vision_transformer.VisionTransformer) and network.pos_embed.shape[1] == 37
    assert network.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert build_backbone("vit_tiny_patch16_224").pos_embed.shape[1] == 197


def test_timm_model_without_checkpointing():
    with pytest.raises(InputError, match="vgg11 has no activation checkpointing"), torch.device("meta"):
        build_backbone("vgg11", checkpointing=True)


def test_unknown_name_lists_ours_and_close_timm_names():
    with pytest.raises(InputError) as error:
        build_backbone("resnet_18")
    assert all(arch in str(error.value) for arch in backbone_names())
    assert "resnet18d" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("arch", ["", "no-such-thing", "hf-hub:someone/something", "vit_tiny_patch16_224.no_such_tag"])
def test_unknown_names_are_refused_without_network(arch):
    with pytest.raises(InputError):
        build_backbone(arch)


def test_without_timm_unknown_names_still_list_ours(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="vit_tiny.*timm is not installed"):
        build_backbone("resnet34")


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


def test_batch_norm_is_not_synchronised_on_a_cpu_or_in_one_process(monkeypatch, capsys):
    network, vit = build_backbone("resnet8"), build_backbone("vit_micro")
    assert synchronize_batch_norm([network], "resnet8", torch.device("cuda")) == [network]  # no process group
    monkeypatch.setattr("clever.models.backbones.is_distributed", lambda: True)
    assert synchronize_batch_norm([vit], "vit_micro", torch.device("cpu")) == [vit]
    assert capsys.readouterr().out == ""
    assert synchronize_batch_norm([network], "resnet8", torch.device("cpu")) == [network]
    assert capsys.readouterr().out.count("per process") == 1
    assert batch_norms(network) == {"BatchNorm2d"}


def test_timm_models_of_one_size_are_refused_for_other_crops():
    mixer = build_backbone("mixer_s16_224")
    check_timm_size("mixer_s16_224", mixer, 224)
    with pytest.raises(InputError, match="mixer_s16.*crops of 96 pixels"):
        check_timm_size("mixer_s16_224", mixer, 96)
