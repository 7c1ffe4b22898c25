"""Folders of images, checkpoints and probes, good and bad, for the tests of invalid input."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from support.in_process import pretrain, probe
from support.processes import write_labelled_images


def make_bad_world(root: Path) -> SimpleNamespace:
    """All of them below `root`, by name."""
    paths = {name: root / name for name in ("data", "two", "renamed", "hole", "empty", "clever", "dino", "probe")}
    world = SimpleNamespace(root=root, **paths)
    write_labelled_images(world.data, train=4, val=2)
    for name in ("two", "renamed", "hole"):
        shutil.copytree(world.data, getattr(world, name))
    for split in ("train", "val"):
        shutil.rmtree(world.two / split / "red")
    (world.renamed / "val" / "red").rename(world.renamed / "val" / "blue")
    (world.hole / "train" / "void").mkdir()
    world.empty.mkdir()

    for net, flags in (("clever", ("--net", "CLeVER")), ("dino", ("--net", "dino"))):
        outcome = pretrain(world.data / "train", getattr(world, net), "--saveckp_freq", 0, *flags)
        assert outcome.status == 0, outcome
    assert probe(world.clever / "checkpoint.pth", world.data, world.probe).status == 0

    world.checkpoint = world.clever / "checkpoint.pth"
    world.probe_file = world.probe / "checkpoint_linear_0.001_1_.pth.tar"
    state = torch.load(world.checkpoint, weights_only=True)
    world.bare = root / "bare.pth"  # a state dict, which says nothing about its network
    torch.save(state["teacher"], world.bare)
    world.damaged = root / "damaged.pth"
    world.damaged.write_bytes(world.checkpoint.read_bytes()[:-1000])
    world.foreign = root / "foreign.pth"
    torch.save({"teacher": np.ones(3)}, world.foreign)
    world.file = root / "file"
    world.file.write_text("in the way")
    return world
