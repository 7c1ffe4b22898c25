"""Checkpoints that other programs wrote: whatever stands beside the weights, under whatever names, the weights are read."""

import argparse
import collections
import datetime
import enum
import json
import pathlib
import re

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from support.golden import fill_
from support.in_process import assert_refused, pretrain, probe

import eval_linear
from clever import load_backbone
from clever.checkpoint import load_checkpoint, stored_arguments
from clever.evaluation.pretrained import load_pretrained
from clever.models.backbones import build_backbone
from clever.models.weights import backbone_state, load_backbone_file, load_backbone_weights
from clever.utils import InputError


class Settings(dict):
    """A dict whose entries are attributes, too, as EasyDict and yacs have it."""

    def __init__(self, **values):
        super().__init__(values)
        self.__dict__.update(values)


class Meter:
    def __init__(self):
        self.values = [1, 2]


class Phase(enum.Enum):
    TRAIN = 1


BESIDE = {
    "path": pathlib.Path("a/b"),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "array": np.arange(3.0),
    "strings": np.array(["a"]),
    "objects": np.array([None, 3], dtype=object),
    "settings": Settings(arch="x"),
    "object": Meter(),
    "enum": Phase.TRAIN,
    "time": datetime.datetime(2026, 1, 2),
    "frozenset": frozenset([1]),
    "class": Meter,
    "function": np.mean,
}
READ = {"path": "a/b", "defaultdict": {"a": [1]}, "settings": {"arch": "x"}, "object": {}, "time": {}}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_beside_the_weights_does_not_matter(tmp_path, name, zipped):
    path = tmp_path / "c.pth"
    weights = {"w": torch.arange(3.0)}
    torch.save({"state_dict": weights, "beside": BESIDE[name]}, path, _use_new_zipfile_serialization=zipped)
    checkpoint = load_checkpoint(path)
    assert torch.equal(checkpoint["state_dict"]["w"], weights["w"])
    if name in READ:
        assert checkpoint["beside"] == READ[name] and type(checkpoint["beside"]) is not type(BESIDE["settings"])
    if name == "array":
        assert np.array_equal(checkpoint["beside"], BESIDE[name])


@pytest.mark.parametrize(
    "args, found",
    [
        (argparse.Namespace(output_dir=pathlib.Path("out"), arch="vit_tiny"), {"output_dir": "out", "arch": "vit_tiny"}),
        (argparse.Namespace(mean=None, std=None, img_size=None, model="resnet18"), {"model": "resnet18"}),
        ({"net": "resnet18", "hp1": "half", "mean": 0.5, "patch_size": [4, 4], "seed": 1}, {"seed": 1}),
        (Settings(hp1=0.8, net="CLeVER"), {"hp1": 0.8, "net": "CLeVER"}),
        (None, {}),
        ([1, 2], {}),
        (Meter(), {}),
    ],
)
def test_arguments_of_other_programs_are_taken_where_they_mean_the_same(tmp_path, args, found):
    torch.save({"args": args, "state_dict": {}}, tmp_path / "c.pth")
    assert stored_arguments(load_checkpoint(tmp_path / "c.pth")) == found


@pytest.mark.parametrize(
    "stats, found",
    [
        (([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])),
        (([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]), ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])),
        (([1.5, 0.2, 0.2], [0.5, 0.5, 0.5]), (None, None)),
        (([float("nan")] * 3, [0.0, 0.0, 0.0]), (None, None)),
        (([True, False, True], [300, 1, 1]), (None, None)),
    ],
)
def test_statistics_of_pixels_up_to_255_are_scaled_and_impossible_ones_ignored(stats, found):
    stored = stored_arguments({"args": dict(zip(("mean", "std"), stats, strict=True))})
    for name, values in zip(("mean", "std"), found, strict=True):
        assert stored.get(name) == (None if values is None else pytest.approx(values, abs=1e-6))


def test_statistics_of_our_own_checkpoints_are_taken_as_they_are():
    args = {"mean": [-0.1, 0.5, 1.5], "std": [2.0, 2.0, 2.0], "global_crops_size": 32}
    stored = stored_arguments({"args": args})
    assert stored["mean"] == args["mean"] and stored["std"] == args["std"]


@pytest.mark.parametrize("arch", ["densenet121", "regnety_002", "dla34", "mambaout_femto", "hgnetv2_b0", "convnext_atto"])
def test_our_checkpoints_of_any_timm_network(arch, tmp_path):
    """Found by all of its names, since its first layer may not be known, or stand in several places, or be called head."""
    pytest.importorskip("timm")
    network = build_backbone(arch)
    state = {f"module.backbone.{name}": value for name, value in network.state_dict().items()}
    torch.save({"teacher": state | {"module.head.mlp.0.weight": torch.ones(2, 2)}}, tmp_path / "c.pth")
    loaded = load_backbone(tmp_path / "c.pth", arch=arch).network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in network.state_dict().items())
    load_backbone_file(build_backbone(arch), tmp_path / "c.pth")


def test_timms_own_statistics_are_the_default(tmp_path):
    timm = pytest.importorskip("timm")
    arch = "vit_tiny_patch16_224.augreg_in21k"
    torch.save(timm.create_model(arch, num_classes=0).state_dict(), tmp_path / "c.pth")
    flags = ["--pretrained_weights", str(tmp_path / "c.pth"), "--arch", arch, "--data_path", "x"]
    pretrained = load_pretrained(eval_linear.get_args_parser().parse_args(flags), torch.device("cpu"))
    assert pretrained.stats == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_the_architecture_may_stand_beside_the_arguments():
    assert stored_arguments({"arch": "resnet18", "args": None}) == {"arch": "resnet18"}
    assert stored_arguments({"arch": "resnet18", "args": {"arch": "resnet50"}}) == {"arch": "resnet50"}


def state_of(arch, **options):
    return fill_(build_backbone(arch, **options)).state_dict()


def assert_loaded(state, arch="resnet8"):
    network = build_backbone(arch)
    load_backbone_weights(network, state)
    expected = state_of(arch)
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("prefix", ["model.", "model.backbone.", "module.encoder.", "_orig_mod.", "online_network.net."])
def test_any_prefix_is_removed(prefix):
    state = {prefix + name: value for name, value in state_of("resnet8").items()}
    projector = {"projector.0.weight": torch.ones(2), "queue": torch.ones(3), "epoch": 4}
    assert_loaded(backbone_state({"state_dict": state | projector, "hyper_parameters": {"lr": 1}}))
    assert_loaded(backbone_state(state | projector))


def test_of_several_networks_the_key_names_one():
    state = {f"module.encoder_q.{name}": value for name, value in state_of("resnet8").items()}
    other = {f"module.encoder_k.{name}": value + 1 for name, value in state_of("resnet8").items()}
    checkpoint = {"state_dict": state | other, "epoch": 3}
    assert_loaded(backbone_state(checkpoint, "encoder_q"))
    with pytest.raises(InputError, match="several networks; choose one of encoder_k, encoder_q"):
        backbone_state(checkpoint)


@pytest.mark.parametrize("classifier", ["classifier", "head_dist", "last_linear", "heads.head", "fc", "head"])
def test_classifiers_of_any_name_are_left_out(classifier):
    state = state_of("vit_micro") | {f"{classifier}.weight": torch.ones(10, 128), f"{classifier}.bias": torch.ones(10)}
    assert_loaded(backbone_state({"model": state}), "vit_micro")


@pytest.mark.parametrize("arch", ["efficientnet_b0", "mobilenetv3_small_100", "deit_tiny_distilled_patch16_224", "test_vit"])
def test_timms_files_with_their_classifiers(tmp_path, arch):
    timm = pytest.importorskip("timm")
    model = timm.create_model(arch, num_classes=7)
    args = argparse.Namespace(mean=None, std=None, img_size=None, model=arch)
    torch.save({"epoch": 3, "arch": arch, "state_dict": model.state_dict(), "args": args}, tmp_path / "last.pth.tar")
    network = load_backbone(tmp_path / "last.pth.tar").network
    own = network.state_dict()
    assert len(own) > 20 and all(torch.equal(value, model.state_dict()[name]) for name, value in own.items())


def test_aliases_agree_and_flags_overrule_what_is_not_ours(tmp_path):
    def load(**stored):
        torch.save({"teacher": state_of("vit_tiny", img_size=32), "args": argparse.Namespace(**stored)}, tmp_path / "c.pth")
        return load_backbone(tmp_path / "c.pth", arch="vit_tiny", net="dino").network

    for arch in ("deit_tiny", "vit_tiny", "vit_tiny_patch16_224", "somebody_elses_vit"):
        assert load(arch=arch, net="resnet18").embed_dim == 192
    with pytest.raises(InputError, match="--arch vit_tiny: the checkpoint was made with arch resnet8"):
        load(arch="resnet8")
    with pytest.raises(InputError, match="--net dino: the checkpoint was made with net CLeVER"):
        load(net="CLeVER", hp1=0.8)


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
    assert plane.mean().item() == pytest.approx(16.5, abs=0.1)
    same = build_backbone("vit_micro", img_size=32, patch_size=8)
    load_backbone_file(same, tmp_path / "c.pth")
    assert torch.equal(same.pos_embed, source.pos_embed)


def renamed(state, *pairs):
    """The state dict with names replaced, in turn, by regular expressions."""
    for pattern, replacement in pairs:
        state = {re.sub(pattern, replacement, name): value for name, value in state.items()}
    return state


def with_query_key_value(state, names):
    """The state dict with each qkv layer as three layers, as transformers has it."""
    parts = {name: names for name in state if ".qkv." in name}
    whole = {name: value for name, value in state.items() if name not in parts}
    split = {name.replace("qkv", own): p for name in parts for own, p in zip(names, state[name].chunk(3), strict=True)}
    return whole | split


def vit_of_torchvision(state):
    return renamed(
        state,
        ("cls_token", "class_token"), ("pos_embed", "encoder.pos_embedding"), ("patch_embed.proj", "conv_proj"),
        (r"^norm\.", "encoder.ln."), (r"blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."), (r"\.norm", ".ln_"),
        (r"attn\.qkv\.", "self_attention.in_proj_"), ("attn.proj", "self_attention.out_proj"), ("mlp.fc1", "mlp.0"),
        ("mlp.fc2", "mlp.3"),
    )  # fmt: skip


def vit_of_open_mmlab(state):
    return renamed(
        state,
        ("patch_embed.proj", "patch_embed.projection"), (r"^norm\.", "norm1."), (r"(^|\.)norm([12])\.", r"\1ln\2."),
        (r"blocks\.", "layers."), ("mlp.fc1", "ffn.layers.0.0"), ("mlp.fc2", "ffn.layers.1"), ("^", "backbone."),
    )  # fmt: skip


def vit_of_transformers_5(state):
    return renamed(
        with_query_key_value(state, ("q_proj", "k_proj", "v_proj")),
        ("cls_token", "embeddings.cls_token"), ("pos_embed", "embeddings.position_embeddings"),
        ("patch_embed.proj", "embeddings.patch_embeddings.projection"), (r"^norm\.", "layernorm."), ("blocks", "layers"),
        ("norm1", "layernorm_before"), ("norm2", "layernorm_after"), (r"attn\.proj", "attention.o_proj"),
        (r"attn\.", "attention."), ("^", "vit."),
    )  # fmt: skip


def vit_of_transformers_4(state):
    return renamed(
        with_query_key_value(state, ("query", "key", "value")),
        ("cls_token", "embeddings.cls_token"), ("pos_embed", "embeddings.position_embeddings"),
        ("patch_embed.proj", "embeddings.patch_embeddings.projection"), (r"^norm\.", "layernorm."),
        ("blocks", "encoder.layer"), ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
        (r"attn\.proj", "attention.output.dense"), (r"attn\.", "attention.attention."), ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    )  # fmt: skip


def resnet_of_transformers(state):
    return renamed(
        state,
        (r"^conv1\.", "embedder.embedder.convolution."), (r"^bn1\.", "embedder.embedder.normalization."),
        *[(rf"^layer{i}\.(\d)\.", rf"encoder.stages.{i - 1}.layers.\1.") for i in (1, 2, 3, 4)],
        *[(rf"\.conv{i}\.", f".layer.{i - 1}.convolution.") for i in (1, 2, 3)],
        *[(rf"\.bn{i}\.", f".layer.{i - 1}.normalization.") for i in (1, 2, 3)],
        (r"downsample\.0", "shortcut.convolution"), (r"downsample\.1", "shortcut.normalization"), ("^", "resnet."),
    )  # fmt: skip


def sequential_resnet(state):
    children = dict(conv1=0, bn1=1, layer1=4, layer2=5, layer3=6, layer4=7)
    return renamed(state, *[(rf"^{name}\.", f"{place}.") for name, place in children.items()])


FOREIGN_NAMES = {
    "torchvision's ViT": (vit_of_torchvision, "vit_micro"),
    "OpenMMLab's ViT": (vit_of_open_mmlab, "vit_micro"),
    "transformers' ViT": (vit_of_transformers_5, "vit_micro"),
    "transformers' ViT before version 5": (vit_of_transformers_4, "vit_micro"),
    "transformers' ResNet-18": (resnet_of_transformers, "resnet18"),
    "transformers' ResNet-50": (resnet_of_transformers, "resnet50"),
    "Sequential": (sequential_resnet, "resnet18"),
}


@pytest.mark.parametrize("prefix", ["model.0."])
@pytest.mark.parametrize("kind", FOREIGN_NAMES)
def test_names_of_other_programs(kind, prefix):
    rename, arch = FOREIGN_NAMES[kind]
    state = rename(state_of(arch))
    assert not {"cls_token", "conv1.weight"} & set(state) or "OpenMMLab" in kind
    state = {f"{prefix}{name}": value for name, value in state.items()}
    assert_loaded(backbone_state({"model_state": state | {"classifier.weight": torch.ones(2, 2)}, "epoch": 3}), arch)


def test_torchvisions_own_vit():
    vit = torchvision.models.VisionTransformer(224, 16, num_layers=6, num_heads=4, hidden_dim=128, mlp_dim=512)
    network, images = build_backbone("vit_micro").eval(), torch.rand(2, 3, 224, 224)
    load_backbone_weights(network, backbone_state(fill_(vit).eval().state_dict()))
    vit.heads = torch.nn.Identity()
    with torch.no_grad():
        assert torch.allclose(network(images), vit(images), atol=1e-4)


def test_a_query_layer_without_its_key_is_missed():
    state = vit_of_transformers_5(state_of("vit_micro"))
    del state["vit.layers.2.attention.k_proj.weight"]
    with pytest.raises(InputError, match="1 missing: blocks.2.attn.qkv.weight"):
        load_backbone_weights(build_backbone("vit_micro"), backbone_state(state))


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.text(max_size=6), min_size=1, max_size=5), st.sampled_from(["vit_micro", "resnet8"]))
def test_any_prefix_and_any_nesting(names, arch):
    """`names` are the keys of nested dicts, the last one a prefix."""
    checkpoint = prefixed(state_of(arch), f"{names[-1]}.")
    for name in names[:-1]:
        checkpoint = {name: checkpoint, "epoch": 3, "beside": {"0.weight": torch.ones(2, 2)}}
    assert_loaded(backbone_state(checkpoint), arch)


PLACES = {
    "nested": lambda state: {"classy_state_dict": {"base_model": {"model": {"trunk": prefixed(state, "_feature_blocks.")}}}},
    "another key": lambda state: {"model_state_dict": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
    "one network": lambda state: {"student": prefixed(state, "module.backbone."), "epoch": 3},
    "numpy": lambda state: {name: value.numpy() for name, value in state.items()},
    "parameters": lambda state: {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in state.items()},
    "big-endian numpy": lambda state: {n: v.numpy().astype(v.numpy().dtype.newbyteorder(">")) for n, v in state.items()},
    "sparse": lambda state: state | {"conv1.weight": state["conv1.weight"].to_sparse()},
    "channels last": lambda state: state | {"conv1.weight": state["conv1.weight"].to(memory_format=torch.channels_last)},
    "double": lambda state: {k: v.double() if v.is_floating_point() else v for k, v in state.items()},
    "beside a mask token": lambda state: {"model": state | {"mask_token": torch.ones(2), "decoder.0.weight": torch.ones(2)}},
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_weights_anywhere_in_the_file(place, tmp_path, capsys):
    torch.save(PLACES[place](state_of("resnet8")), tmp_path / "c.pth")
    assert_loaded(backbone_state(load_checkpoint(tmp_path / "c.pth")))
    out = capsys.readouterr().out
    assert ("no such layers: mask_token, decoder" in out) == (place == "beside a mask token")
    assert ("weights are taken from `student.module.backbone`" in out) == (place == "one network")


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: {"ema": net}, lambda net: {"net": torch.nn.DataParallel(net)}])
def test_modules_that_were_pickled_as_a_whole(wrap, tmp_path):
    torch.save(wrap(fill_(torchvision.models.resnet18())), tmp_path / "c.pth")
    network = build_backbone("resnet18")
    load_backbone_file(network, tmp_path / "c.pth")
    expected = fill_(torchvision.models.resnet18()).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())


def test_what_cannot_be_the_network_is_refused(tmp_path):
    state = state_of("resnet8")
    torch.jit.save(torch.jit.script(build_backbone("resnet8")), tmp_path / "c.pth")
    with pytest.raises(InputError, match="c.pth: a TorchScript program; save its state_dict"):
        load_checkpoint(tmp_path / "c.pth")
    with pytest.raises(InputError, match="several networks; choose one of online, target"):
        backbone_state({"online": {"net": state}, "target": {"net": dict(state)}})
    assert_loaded(backbone_state({"online": {"net": dict(state)}, "target": {"net": state}}, "target"))
    with pytest.raises(InputError, match="'taecher': the keys are student, teacher"):
        backbone_state({"student": state, "teacher": state}, "taecher")
    with pytest.raises(InputError, match="conv1.weight has no values"):
        backbone_state({"model": {name: value.to("meta") for name, value in state.items()}})
    for dtype in (torch.complex64, torch.int8, torch.bool, torch.float8_e4m3fn):
        changed = state | {"conv1.weight": state["conv1.weight"].to(dtype)}
        kind = str(dtype).removeprefix("torch.")
        with pytest.raises(InputError, match=f"1 of another type: conv1.weight .{kind} in the file"):
            load_backbone_weights(build_backbone("resnet8"), backbone_state({"model": changed}))
    with pytest.raises(InputError, match="do not fit"):
        load_backbone_weights(build_backbone("resnet8"), backbone_state({"model": {1: torch.ones(2), ("a", 2): torch.ones(2)}}))
    for more in ("layer3.1.conv1.weight", "layer4.0.conv1.weight", "stages.2.weight", "attnpool.weight", "fc_norm.weight"):
        with pytest.raises(InputError, match=f"1 unexpected: {more}"):
            load_backbone_weights(build_backbone("resnet8"), state | {more: torch.ones(2)})


def test_a_dict_under_two_names_is_found_under_both(capsys):
    state = state_of("resnet8")
    for key in ("student", "teacher"):
        assert_loaded(backbone_state({"x": {"student": state, "teacher": state}}, key))
    assert "weights are taken" not in capsys.readouterr().out


def test_position_embeddings_of_another_rank_are_refused(tmp_path):
    torch.save(state_of("vit_micro") | {"pos_embed": torch.zeros(3)}, tmp_path / "c.pth")
    with pytest.raises(InputError, match="1 of another shape: pos_embed"):
        load_backbone_file(build_backbone("vit_micro"), tmp_path / "c.pth")


def test_dicts_that_contain_themselves_or_are_nested_deeply():
    checkpoint = {"model": state_of("resnet8"), "deep": {}}
    inner = checkpoint["deep"]
    for _ in range(3000):
        inner["deep"] = {}
        inner = inner["deep"]
    inner["self"] = checkpoint["self"] = checkpoint
    assert_loaded(backbone_state(checkpoint))


def test_positions_of_timms_vits(tmp_path):
    large = fill_(build_backbone("vit_tiny_patch16_224", img_size=96))
    torch.save(large.state_dict(), tmp_path / "c.pth")
    assert load_backbone(tmp_path / "c.pth", arch="vit_tiny_patch16_224").network.pos_embed.shape == (1, 37, 192)
    network = build_backbone("vit_tiny_patch16_224", img_size=224)
    load_backbone_file(network, tmp_path / "c.pth")
    assert torch.equal(network.pos_embed[:, 0], large.pos_embed[:, 0]) and network.pos_embed.shape == (1, 197, 192)
    means = [positions[:, 1:].mean((0, 1)) for positions in (network.pos_embed, large.pos_embed)]
    assert torch.allclose(*means, atol=0.02 * large.pos_embed.abs().max().item())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    state = state_of("resnet8")
    state["layer1.0.conv1.weight"][0, 0] = value
    with pytest.raises(InputError, match=r"NaN or infinite values in 1 of \d+ weights: layer1.0.conv1.weight"):
        load_backbone_weights(build_backbone("resnet8"), state)


def test_a_foreign_checkpoint_goes_through_the_scripts(world_of_bad_input, tmp_path):
    world = world_of_bad_input
    state = {f"model.{name}": value for name, value in state_of("resnet8").items()} | {"model.fc.weight": torch.ones(3, 256)}
    args = Settings(output_dir=pathlib.Path("x"), mean=None, net="resnet18")
    torch.save({"state_dict": state, "hyper_parameters": args, "args": args, "epoch": "3"}, tmp_path / "foreign.ckpt")
    flags = ("--arch", "resnet8")
    outcome = probe(tmp_path / "foreign.ckpt", world.data, tmp_path / "probe", *flags)
    assert outcome.status == 0, outcome.stderr
    (result,) = (tmp_path / "probe").glob("linear_*.json")
    assert json.loads(result.read_text())["pretrained_epochs"] is None
    outcome = pretrain(world.data / "train", tmp_path / "run", *flags, "--init_from", tmp_path / "foreign.ckpt")
    assert outcome.status == 0, outcome.stderr
    (tmp_path / "damaged").mkdir()
    state["model.conv1.weight"][:] = torch.nan
    torch.save({"state_dict": state}, tmp_path / "nan.ckpt")
    assert_refused(probe(tmp_path / "nan.ckpt", world.data, tmp_path / "new", *flags), "nan.ckpt", "NaN or infinite")
    assert not (tmp_path / "new").exists()
