"""The registry of backbones: names, options, timm models, loading of weights, synchronised batch norm."""

import sys

import pytest
import timm
import torch
import torchvision
from support.golden import CORE, fill_, rel_error, tensor

from backbones import (
    BACKBONES,
    backbone_names,
    backbone_state,
    build_backbone,
    check_timm_size,
    image_size_of,
    is_ours,
    load_backbone_file,
    load_backbone_weights,
    synchronize_batch_norm,
    vit_names,
)
from utils import InputError
from vision_transformer import vit_micro

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


@pytest.mark.parametrize("prefix", ["", "module."])
def test_original_clever_checkpoint(prefix):
    state = {prefix + name: tensor(name, shape) for name, shape in CORE["clever_state_dict_keys"]}
    checkpoint = {"student": {"x": torch.zeros(1)}, "teacher": state, "epoch": 3, "args": None}
    found = backbone_state(checkpoint)
    network = build_backbone("vit_tiny")
    assert found.keys() == network.state_dict().keys()
    load_backbone_weights(network, found)
    assert torch.equal(network.norm.weight, tensor("backbone.norm.weight", (192,)))
    assert image_size_of(found, 16) == 224


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone.", "backbone.module.", "module.module."])
def test_prefixes_are_stripped_at_the_front_only(prefix):
    state = {f"{prefix}layer.module.backbone.weight": torch.ones(1), f"{prefix}xmodule.weight": torch.ones(1)}
    assert list(backbone_state(state)) == ["layer.module.backbone.weight", "xmodule.weight"]


def test_only_heads_and_classifiers_are_dropped():
    dropped = [
        "head.mlp.0.weight",
        "head.last_layer.weight_v",
        "head2.mlp.0.bias",
        "head.weight",
        "fc.bias",
        "head.fc.weight",
    ]
    kept = ["header.weight", "blocks.0.mlp.fc1.weight", "layer.head.weight", "head.norm.weight"]
    state = {f"module.{name}": torch.ones(1) for name in dropped + kept}
    assert list(backbone_state(state)) == kept


def test_key_is_not_needed_for_a_plain_state_dict():
    state = {"norm.weight": torch.ones(2)}
    assert backbone_state(state, "teacher").keys() == backbone_state(state, None).keys() == state.keys()
    assert backbone_state({"model": state}, "model").keys() == state.keys()


@pytest.mark.parametrize(
    "checkpoint, key",
    [
        ({"student": {"a": torch.ones(1)}, "epoch": 1}, "teacher"),
        ({"student": {"a": torch.ones(1)}, "epoch": 1}, None),
        ({"student": {"a": torch.ones(1)}, "epoch": 1}, "epoch"),
        ({"student": {}, "epoch": 1}, "student"),
    ],
)
def test_wrong_key_names_what_there_is(checkpoint, key):
    with pytest.raises(InputError, match=rf"{key!r}.*student, epoch"):
        backbone_state(checkpoint, key)


@torch.no_grad()
def test_torchvision_weights_with_their_classifier():
    reference = fill_(torchvision.models.resnet18(weights=None)).eval()
    network = build_backbone("resnet18").eval()
    load_backbone_weights(network, backbone_state(reference.state_dict()))
    reference.fc = torch.nn.Identity()
    images = tensor("resnet.images", (2, 3, 64, 64))
    assert torch.equal(network(images), reference(images))


def test_batch_counters_may_be_absent():
    state = {k: v for k, v in fill_(build_backbone("resnet8")).state_dict().items() if "num_batches" not in k}
    network = build_backbone("resnet8")
    load_backbone_weights(network, state)
    assert torch.equal(network.layer3[0].bn2.running_var, state["layer3.0.bn2.running_var"])


def test_missing_buffers_are_an_error():
    state = build_backbone("resnet8").state_dict()
    del state["bn1.running_mean"]
    with pytest.raises(InputError, match="1 missing: bn1.running_mean"):
        load_backbone_weights(build_backbone("resnet8"), state)


def test_every_mismatch_is_named_and_nothing_is_loaded():
    network = vit_micro(**SMALL)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = fill_(vit_micro(patch_size=8, img_size=32)).state_dict()
    for name in [name for name in state if name.startswith("blocks.5.")]:
        state[name.replace("blocks.5.", "blocks.9.")] = state.pop(name)
    with pytest.raises(InputError) as error:
        load_backbone_weights(network, state)
    message = str(error.value)
    assert "12 missing: blocks.5.norm1.weight, blocks.5.norm1.bias, blocks.5.attn.qkv.weight, ..." in message
    assert "12 unexpected: blocks.9.norm1.weight" in message
    assert "1 of another shape: pos_embed ([1, 17, 128] in the file, [1, 65, 128] in the backbone)" in message
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("patch_size, img_size", [(16, 224), (8, 224), (4, 32), (16, 16)])
def test_image_size_of_a_vit(patch_size, img_size):
    state = vit_micro(patch_size=patch_size, img_size=img_size).state_dict()
    assert image_size_of(state, patch_size) == img_size


def test_image_size_of_timm_vits_with_other_prefix_tokens():
    weight = torch.zeros(8, 3, 16, 16)
    for tokens in (196, 197, 198, 200):
        assert image_size_of({"pos_embed": torch.zeros(1, tokens, 8), "patch_embed.proj.weight": weight}, 16) == 224


def test_image_size_of_a_resnet_is_unknown():
    assert image_size_of(build_backbone("resnet8").state_dict(), 16) is None


def test_patch_size_that_contradicts_the_weights():
    with pytest.raises(InputError, match="patch size 16.*trained with patch size 8"):
        image_size_of(vit_micro(patch_size=8).state_dict(), 16)


def batch_norms(network):
    return {type(m).__name__ for m in network.modules() if hasattr(m, "running_mean")}


def test_synchronised_batch_norm_keeps_the_activations_of_timm_models(monkeypatch):
    """timm's batch norms may contain an activation, which torch's own conversion would drop."""
    monkeypatch.setattr("backbones.is_distributed", lambda: True)
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
    monkeypatch.setattr("backbones.is_distributed", lambda: True)
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


def test_the_file_that_does_not_fit_is_named(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"teacher": build_backbone("resnet8").state_dict()}, path)
    with pytest.raises(InputError, match="other.pth: the weights do not fit"):
        load_backbone_file(build_backbone("vit_micro"), str(path))
    load_backbone_file(build_backbone("resnet8"), str(path))
