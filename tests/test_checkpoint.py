"""Checkpoint files: the originals' are read and continued, and ours hold plain types only."""

import argparse
import json
import pathlib
import re
import shutil
import zipfile

import numpy as np
import pytest
import torch
from support.golden import CORE
from support.in_process import plain, pretrain
from support.processes import write_labelled_images
from torch import nn

import eval_linear
import main_dino
from clever.checkpoint import load_checkpoint
from clever.evaluation.pretrained import load_pretrained
from clever.evaluation.stored import stored_arguments
from clever.models.backbones import build_backbone
from clever.models.weights import backbone_state, load_backbone_weights
from clever.training.build import build_network
from clever.utils import InputError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_labelled_images(tmp_path_factory.mktemp("images") / "data", train=4, val=2)


@pytest.fixture(scope="module", params=["dino", "CLeVER"])
def finished(request, tmp_path_factory, data):
    """Output folder of one epoch of two, whose arguments were typed oddly."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    flags = ("--net", request.param, "--lr", "1e-3", "--hp1", "0.80", "--local_crops_scale", ".05", "4e-1")
    outcome = pretrain(data / "train", folder, *flags, "--aug", "aug1", "--min_lr", "1E-6")
    assert outcome.status == 0, outcome
    return folder


# --- files as the originals pickle them --------------------------------------------------------------------------------


def as_original(state: dict, module: str) -> dict:
    """Our checkpoint in the originals' form: `module.` before the student's names (and the teacher's, if it has batch norms,
    which `module` stands for), a Namespace, numpy scalars in the optimizer's groups, and no options of ours there."""
    groups = [
        {name: value for name, value in group.items() if name not in ("fixed_weight_decay", "fused", "decoupled_weight_decay")}
        for group in state["optimizer"]["param_groups"]
    ]
    for group in groups:
        group["lr"] = np.float64(group["lr"])
    groups[0]["weight_decay"] = np.float64(groups[0]["weight_decay"])
    return {
        "student": {f"module.{name}": value for name, value in state["student"].items()},
        "teacher": {f"{module}{name}": value for name, value in state["teacher"].items()},
        "optimizer": {"state": state["optimizer"]["state"], "param_groups": groups},
        "epoch": state["epoch"],
        "args": argparse.Namespace(**state["args"]),
        "dino_loss": state["dino_loss"],
        "fp16_scaler": None,
    }


def save_as_numpy(obj, path, numpy_module):
    """torch.save as under a numpy whose scalars live in `numpy_module`: 1.x has numpy.core, 2.x numpy._core."""
    torch.save(obj, path)
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            if name.endswith("data.pkl"):
                content, found = re.subn(rb"numpy\._?core\.multiarray\n", f"{numpy_module}\n".encode(), content)
                assert found
            archive.writestr(name, content)


@pytest.mark.parametrize("numpy_module, module", [("numpy.core.multiarray", "module."), ("numpy._core.multiarray", "")])
def test_originals_files_are_read(finished, tmp_path, numpy_module, module):
    state = torch.load(finished / "checkpoint.pth", weights_only=True)
    path = tmp_path / "checkpoint.pth"
    save_as_numpy(as_original(state, module), path, numpy_module)
    read = load_checkpoint(path)
    lr = read["optimizer"]["param_groups"][0]["lr"]
    assert type(lr) is np.float64 and lr == state["optimizer"]["param_groups"][0]["lr"]
    assert type(read["args"]) is argparse.Namespace and read["args"].out_dim == 64
    for key in ("teacher", "student"):
        backbone = build_backbone("vit_micro", patch_size=8, img_size=32)
        load_backbone_weights(backbone, backbone_state(read, key, backbone.state_dict()))
        for name, value in backbone.state_dict().items():
            assert torch.equal(value, state[key][f"backbone.{name}"]), name


def test_originals_arguments_name_the_network(finished, tmp_path):
    state = torch.load(finished / "checkpoint.pth", weights_only=True)
    save_as_numpy(as_original(state, ""), tmp_path / "original.pth", "numpy.core.multiarray")
    flags = ["--pretrained_weights", str(tmp_path / "original.pth"), "--data_path", "unused"]
    pretrained = load_pretrained(eval_linear.get_args_parser().parse_args(flags), CPU)
    assert pretrained.arch == "vit_micro" and pretrained.backbone.patch_embed.patch_size == 8
    assert pretrained.net == state["args"]["net"]
    assert pretrained.hp1 == (0.8 if pretrained.net == "CLeVER" else 1.0)
    assert pretrained.img_size == 32 and pretrained.epochs == 1


@pytest.mark.parametrize(
    "args, stored",
    [
        (argparse.Namespace(mean=None, std=[58.4, 57.1, 57.4], model="resnet18"), {"model": "resnet18"}),
        ({"net": "resnet18", "hp1": "half", "mean": 0.5, "patch_size": [4, 4], "seed": 1}, {"seed": 1}),
        ({"mean": [-0.1, 0.5, 1.5], "std": [float("nan")] * 3}, {"mean": [-0.1, 0.5, 1.5]}),
        ([1, 2], {}),
    ],
)
def test_arguments_of_other_programs_are_taken_where_they_mean_the_same(args, stored):
    assert stored_arguments({"args": args}) == stored
    assert stored_arguments({"args": args, "arch": "resnet18"}) == stored | {"arch": "resnet18"}


@pytest.mark.parametrize("content", [{"w": torch.ones(2), "path": pathlib.PurePosixPath("x")}, nn.Linear(2, 2)])
def test_objects_of_other_types_are_named(tmp_path, content):
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(InputError, match=r"c.pth: holds (pathlib\S*PurePosixPath|torch\S*Linear); save its state dict alone"):
        load_checkpoint(tmp_path / "c.pth")


def test_a_run_continues_from_an_originals_file_as_from_its_own(finished, tmp_path, data):
    own, original = tmp_path / "own", tmp_path / "original"
    shutil.copytree(finished, own)
    original.mkdir()
    state = torch.load(finished / "checkpoint.pth", weights_only=True)
    save_as_numpy(as_original(state, "module."), original / "checkpoint.pth", "numpy.core.multiarray")
    flags = ("--net", state["args"]["net"], "--lr", "1e-3", "--aug", "aug1", "--epochs", 2)
    for folder in (own, original):
        outcome = pretrain(data / "train", folder, *flags)
        assert outcome.status == 0 and "from epoch 1" in outcome.stdout, outcome
    assert [json.loads(line)["epoch"] for line in (original / "log.txt").read_text().splitlines()] == [1]
    ends = [torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (own, original)]
    for network in ("student", "teacher", "dino_loss"):
        for name, value in ends[0][network].items():
            assert torch.equal(value, ends[1][network][name]), (network, name)
        assert set(ends[0][network]) == set(ends[1][network])
    assert not torch.equal(ends[0]["student"]["head.mlp.0.weight"], state["student"]["head.mlp.0.weight"])
    assert [group["weight_decay"] for group in ends[1]["optimizer"]["param_groups"]][1] == 0


def test_names_and_shapes_are_the_originals():
    flags = ["--data_path", "unused", "--net", "CLeVER", "--arch", "vit_tiny", "--out_dim", "256", "--DVR_out_dim", "128"]
    network = build_network(main_dino.get_args_parser().parse_args(flags), drop_path_rate=0.0)
    assert [[name, list(value.shape)] for name, value in network.state_dict().items()] == CORE["clever_state_dict_keys"]


# --- our own files -----------------------------------------------------------------------------------------------------


def read_without_allow_list(path):
    """As any other program reads a safe file; utils' list of allowed types is not in force here."""
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    return torch.load(path, weights_only=True)


def test_checkpoints_hold_plain_types_only(finished):
    paths = sorted(finished.glob("*.pth"))
    assert [path.name for path in paths] == ["checkpoint.pth", "checkpoint0000.pth"]
    for path in paths:
        state = read_without_allow_list(path)
        assert plain(state)
        for key in ("student", "teacher"):
            assert not any(name.startswith("module.") for name in state[key])
        assert state["args"]["lr"] == 1e-3 and state["args"]["hp1"] == 0.8 and state["epoch"] == 1


def test_init_from_takes_the_teachers_backbone_only(finished, tmp_path, data):
    state = torch.load(finished / "checkpoint.pth", weights_only=True)
    flags = ("--init_from", finished / "checkpoint.pth", "--epochs", 0, "--net", "CLeVER", "--seed", 7)
    assert pretrain(data / "train", tmp_path / "run", *flags).status == 0
    started = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    for network in ("student", "teacher"):
        for name, value in started[network].items():
            if name.startswith("backbone."):
                assert torch.equal(value, state["teacher"][name]), name
    assert not torch.equal(started["student"]["head.mlp.2.weight"], state["student"]["head.mlp.2.weight"])
