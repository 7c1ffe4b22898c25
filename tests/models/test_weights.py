"""Backbone weights in checkpoints of this and other programs: found under any prefix and key, checked, loaded."""

import argparse
import json

import pytest
import timm
import torch
import torchvision
from support.golden import fill_, tensor
from support.in_process import assert_refused, pretrain, probe

import eval_linear
from clever import load_backbone
from clever.evaluation.pretrained import load_pretrained, trained_image_size
from clever.models.backbones import build_backbone
from clever.models.vision_transformer import vit_micro
from clever.models.weights import backbone_state, load_backbone_file, load_backbone_weights
from clever.utils import InputError


def state_of(arch, **options):
    return fill_(build_backbone(arch, **options)).state_dict()


RESNET8 = state_of("resnet8")
NAMES = {arch: build_backbone(arch).state_dict() for arch in ("vit_micro", "resnet8")}


def found(checkpoint, key="teacher", arch="resnet8"):
    return backbone_state(checkpoint, key, NAMES[arch])


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def assert_loaded(state, arch="resnet8"):
    network = build_backbone(arch)
    load_backbone_weights(network, state)
    for name, value in state_of(arch).items():
        assert torch.equal(network.state_dict()[name], value), name


# --- finding -----------------------------------------------------------------------------------------------------------


BESIDE = {"projector.0.weight": torch.ones(2), "queue": torch.ones(3), "epoch": 4, "fc.weight": torch.ones(2)}
PROGRAMS = {
    "DINO": {"teacher": prefixed(RESNET8, "backbone.") | {"head.mlp.0.weight": torch.ones(2)}, "student": {}, "epoch": 3},
    "MoCo": {"arch": "resnet8", "state_dict": prefixed(RESNET8, "module.base_encoder.") | prefixed(BESIDE, "module.momentum.")},
    "VISSL": {"classy_state_dict": {"base_model": {"model": {"trunk": prefixed(RESNET8, "_feature_blocks.")}}}},
    "timm": {"state_dict": RESNET8 | BESIDE, "state_dict_ema": RESNET8, "optimizer": {"state": {0: {"x": torch.ones(2)}}}},
    "torch.compile": prefixed(RESNET8, "_orig_mod.module."),
    "a plain state dict": RESNET8 | BESIDE,
    "one network": {"student": prefixed(RESNET8, "module.backbone."), "epoch": 3},
}  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_weights_of_other_programs(program, capsys):
    assert_loaded(found(PROGRAMS[program]))
    assert ("weights are taken from `student.module.backbone`" in capsys.readouterr().out) == (program == "one network")


def test_of_several_networks_the_key_names_one():
    both = prefixed(RESNET8, "module.encoder_q.") | prefixed({k: v + 1 for k, v in RESNET8.items()}, "module.encoder_k.")
    assert_loaded(found({"state_dict": both, "epoch": 3}, "encoder_q"))
    assert_loaded(found({"online": {"net": {}}, "target": {"net": RESNET8}}, "target"))
    for checkpoint, key, message in (
        ({"state_dict": both}, "teacher", "choose one of module.encoder_q, module.encoder_k"),
        ({"student": RESNET8, "target": RESNET8}, "taecher", "'taecher', or several; choose one of student, target"),
        ({"student": {}, "epoch": 1}, "student", "choose one of student, epoch"),
    ):
        with pytest.raises(InputError, match=message):
            found(checkpoint, key)


@torch.no_grad()
def test_torchvision_weights_with_their_classifier():
    reference = fill_(torchvision.models.resnet18(weights=None)).eval()
    network = build_backbone("resnet18").eval()
    load_backbone_weights(network, backbone_state(reference.state_dict(), "teacher", network.state_dict()))
    reference.fc = torch.nn.Identity()
    images = tensor("resnet.images", (2, 3, 64, 64))
    assert torch.equal(network(images), reference(images))


# --- timm --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["test_byobnet", "deit_tiny_distilled_patch16_224"])
def test_timms_files_with_their_classifiers_and_ours_with_heads(tmp_path, arch):
    model = timm.create_model(arch, num_classes=7)
    args = argparse.Namespace(mean=None, std=None, img_size=None, model=arch)
    torch.save({"epoch": 3, "arch": arch, "state_dict": model.state_dict(), "args": args}, tmp_path / "last.pth.tar")
    own = load_backbone(tmp_path / "last.pth.tar").network.state_dict()
    assert len(own) > 20 and all(torch.equal(value, model.state_dict()[name]) for name, value in own.items())
    state = prefixed(own, "module.backbone.") | {"module.head.mlp.0.weight": torch.ones(2, 2)}
    torch.save({"teacher": state}, tmp_path / "c.pth")
    load_backbone_file(build_backbone(arch), tmp_path / "c.pth")


def test_timm_converts_weights_for_its_model():
    """DINOv2's release has a mask token and, with registers, position embeddings without those of [CLS]: timm knows."""
    network = build_backbone("vit_small_patch14_reg4_dinov2", img_size=56)
    state = network.state_dict()
    release = {name: value for name, value in state.items() if name not in ("reg_token", "pos_embed")}
    release |= {"register_tokens": state["reg_token"] + 1, "mask_token": torch.zeros(1, 384)}
    release |= {"pos_embed": torch.ones(1, 17, 384)}
    load_backbone_weights(network, backbone_state(release, "teacher", state))
    assert torch.equal(network.reg_token, release["register_tokens"]) and (network.pos_embed == 1).all()


def test_timms_own_statistics_are_the_default(tmp_path):
    arch = "vit_tiny_patch16_224.augreg_in21k"
    torch.save(timm.create_model(arch, num_classes=0).state_dict(), tmp_path / "c.pth")
    flags = ["--pretrained_weights", str(tmp_path / "c.pth"), "--arch", arch, "--data_path", "x"]
    pretrained = load_pretrained(eval_linear.get_args_parser().parse_args(flags), torch.device("cpu"))
    assert pretrained.stats == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


# --- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classifier", ["classifier", "heads.head", "fc", "decoder"])
def test_classifiers_and_decoders_are_left_out(classifier, capsys):
    state = state_of("vit_micro") | {f"{classifier}.weight": torch.ones(10, 128), f"{classifier}.bias": torch.ones(10)}
    assert_loaded(found({"model": state}, arch="vit_micro"), "vit_micro")
    assert (f"no such layers: {classifier.split('.')[0]} (" in capsys.readouterr().out) == (classifier != "fc")


def test_every_mismatch_is_named_and_nothing_is_loaded():
    network = vit_micro(patch_size=8, img_size=64)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = fill_(vit_micro(patch_size=8, img_size=32)).state_dict()
    for name in [name for name in state if name.startswith("blocks.5.")]:
        state[name.replace("blocks.5.", "blocks.9.")] = state.pop(name)
    state["norm.bias"][3] = float("nan")
    with pytest.raises(InputError) as error:
        load_backbone_weights(network, state)
    message = str(error.value)
    assert "12 missing: blocks.5.norm1.weight, blocks.5.norm1.bias, blocks.5.attn.qkv.weight, ..." in message
    assert "12 unexpected: blocks.9.norm1.weight" in message and "1 NaN or infinite: norm.bias" in message
    assert "1 of another shape: pos_embed ([1, 17, 128] in the file, [1, 65, 128] in the backbone)" in message
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("more", ["layer3.1.conv1.weight", "attnpool.weight"])
def test_layers_that_change_the_features_are_not_left_out(more):
    with pytest.raises(InputError, match=f"1 unexpected: {more}"):
        load_backbone_weights(build_backbone("resnet8"), RESNET8 | {more: torch.ones(2)})


# --- positions ---------------------------------------------------------------------------------------------------------


def test_image_size_of_a_vit():
    for patch_size, img_size in ((16, 224), (4, 32), (16, 16)):
        state = vit_micro(patch_size=patch_size, img_size=img_size).state_dict()
        assert trained_image_size("vit_micro", state) == img_size
    weight = torch.zeros(8, 3, 16, 16)
    for tokens in (196, 197, 198, 200):  # timm's, with other numbers of tokens before the patches
        state = {"pos_embed": torch.zeros(1, tokens, 8), "patch_embed.proj.weight": weight}
        assert trained_image_size("vit_tiny_patch16_224", state) == 224
    assert trained_image_size("resnet8", RESNET8) is None


def test_positions_of_timms_vits_are_resampled_by_timm(tmp_path):
    large = fill_(build_backbone("test_vit", img_size=96))
    torch.save(large.state_dict(), tmp_path / "c.pth")
    assert torch.equal(load_backbone(tmp_path / "c.pth", arch="test_vit").network.pos_embed, large.pos_embed)
    network = build_backbone("test_vit", img_size=160)
    load_backbone_file(network, tmp_path / "c.pth")
    assert torch.equal(network.pos_embed[:, 0], large.pos_embed[:, 0]) and network.pos_embed.shape == (1, 101, 64)


def test_positions_of_another_image_size_are_interpolated(tmp_path):
    source = build_backbone("vit_micro", img_size=32, patch_size=8)
    with torch.no_grad():  # a plane over the grid of 4 x 4 patches
        rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        source.pos_embed[0, 1:] = (rows + 10 * columns).reshape(16, 1)
        source.pos_embed[0, 0] = -7
    torch.save({"model": source.state_dict()}, tmp_path / "c.pth")
    network = build_backbone("vit_micro", img_size=64, patch_size=8)
    load_backbone_file(network, tmp_path / "c.pth")
    plane = network.pos_embed[0, 1:, 0].reshape(8, 8)
    assert network.pos_embed.shape == (1, 65, 128) and (network.pos_embed[0, 0] == -7).all()
    inner = plane[3:5, 3:5]  # away from the border the plane is kept: half a step per patch
    assert torch.allclose(inner[1] - inner[0], torch.tensor(0.5), atol=0.05)
    assert torch.allclose(inner[:, 1] - inner[:, 0], torch.tensor(5.0), atol=0.5)


# --- the scripts -------------------------------------------------------------------------------------------------------


def test_a_foreign_checkpoint_goes_through_the_scripts(world_of_bad_input, tmp_path):
    world = world_of_bad_input
    state = prefixed(RESNET8, "model.") | {"model.fc.weight": torch.ones(3, 256)}
    args = argparse.Namespace(output_dir="x", mean=None, net="resnet18")
    torch.save({"state_dict": state, "args": args, "epoch": "3"}, tmp_path / "foreign.ckpt")
    flags = ("--arch", "resnet8")
    outcome = probe(tmp_path / "foreign.ckpt", world.data, tmp_path / "probe", *flags)
    assert outcome.status == 0, outcome.stderr
    (result,) = (tmp_path / "probe").glob("linear_*.json")
    assert json.loads(result.read_text())["pretrained_epochs"] is None
    outcome = pretrain(world.data / "train", tmp_path / "run", *flags, "--init_from", tmp_path / "foreign.ckpt")
    assert outcome.status == 0, outcome.stderr
    state["model.conv1.weight"] = torch.full_like(state["model.conv1.weight"], torch.nan)
    torch.save({"state_dict": state}, tmp_path / "nan.ckpt")
    assert_refused(probe(tmp_path / "nan.ckpt", world.data, tmp_path / "new", *flags), "nan.ckpt", "NaN or infinite")
    assert not (tmp_path / "new").exists()
