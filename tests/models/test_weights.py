"""Finding a backbone's weights in checkpoints, and loading them."""

import pytest
import torch
import torchvision
from support.golden import CORE, fill_, tensor

from clever.models.backbones import build_backbone
from clever.models.vision_transformer import vit_micro
from clever.models.weights import (
    backbone_state,
    image_size_of,
    load_backbone_file,
    load_backbone_weights,
)
from clever.utils import InputError

SMALL = {"patch_size": 8, "img_size": 64}


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


def test_the_file_that_does_not_fit_is_named(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"teacher": build_backbone("resnet8").state_dict()}, path)
    with pytest.raises(InputError, match="other.pth: the weights do not fit"):
        load_backbone_file(build_backbone("vit_micro"), str(path))
    load_backbone_file(build_backbone("resnet8"), str(path))
