"""Checkpoints that other programs wrote: whatever stands beside the weights, under whatever names, the weights are read."""

import argparse
import collections
import datetime
import enum
import json
import pathlib

import numpy as np
import pytest
import torch
from support.golden import fill_
from support.in_process import assert_refused, pretrain, probe

from backbones import backbone_state, build_backbone, load_backbone_file, load_backbone_weights
from checkpoint import load_checkpoint, stored_arguments
from evaluation import load_backbone
from utils import InputError


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
