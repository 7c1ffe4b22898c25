"""Every method of METHODS in the loop: trained, interrupted and continued, evaluated; flags that it does not have."""

import json
from unittest import mock

import pytest
import torch
from support.in_process import assert_refused, call, pretrain
from support.processes import write_images, write_labelled_images
from test_resume import assert_same

import eval_knn
from clever import signals
from clever.checkpoint import load_checkpoint
from clever.methods import METHODS
from clever.training.pretraining import Pretraining

RESNET = ("--arch", "resnet8", "--local_crops_number", 0)
OWN = {"care": ("--care_chunk", 2), "sie": ("--sie_width", 8)}


def flags(net, *more):
    return ("--net", net, "--warmup_epochs", 0, "--freeze_last_layer", 0, "--lr", 0.05, *OWN.get(net, ()), *more)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "flat", 8)


KINDS = ("resnet8", "vit_micro", "vssm2-vmambav2_micro", "test_efficientnet.r160_in1k")


@pytest.mark.parametrize("net, arch", [(net, KINDS[(i + j) % 4]) for i, net in enumerate(METHODS) for j in range(2)])
def test_a_step_of_every_method_with_two_kinds_of_backbone(net, arch, images, tmp_path):
    """In bf16 with local views, and in fp32 without them."""
    if arch.startswith("test_"):
        pytest.importorskip("timm")
    common = (*flags(net), "--arch", arch, "--lr", 1e-3)
    half = (*common, "--use_fp16", "true", "--amp_dtype", "bf16")
    for folder, more in (("bf16", half), ("fp32", (*common, "--local_crops_number", 0))):
        outcome = pretrain(images, tmp_path / folder, *more)
        assert outcome.status == 0, outcome.stderr
        record = json.loads((tmp_path / folder / "log.txt").read_text())
        state = load_checkpoint(tmp_path / folder / "checkpoint.pth")
        has_term = METHODS[net].term is not None
        assert ("term" in state) == ("train_loss_term" in record) == has_term
        if has_term:
            weighted = record["train_loss_base"] + state["args"]["equiv_lambd"] * record["train_loss_term"]
            assert record["train_loss"] == pytest.approx(weighted, rel=1e-3)


@pytest.mark.parametrize("net", ["augself", "equimod_pair"])
def test_without_weight_and_views_of_its_own_a_method_is_dino_bit_for_bit(net, images, tmp_path):
    pretrain(images, tmp_path / "dino", *flags("dino", *RESNET), "--epochs", 2)
    outcome = pretrain(images, tmp_path / net, *flags(net, *RESNET, "--equiv_lambd", 0), "--epochs", 2)
    assert outcome.status == 0, outcome.stderr
    states = [load_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("dino", net)]
    for part in ("student", "teacher", "dino_loss"):
        assert_same(states[1][part], states[0][part], part)


@pytest.mark.parametrize("net", ["equimod", "sie", "care"])
def test_an_interrupted_epoch_of_a_method_goes_on_to_the_same_bits(net, images, tmp_path):
    more = flags(net, "--epochs", 2, "--batch_size_per_gpu", 2, "--drop_path_rate", 0.3)
    assert pretrain(images, tmp_path / "whole", *more).status == 0
    step, steps = Pretraining.train_step, []

    def interrupted(self, *arguments):
        step(self, *arguments)
        steps.append(1)

    with (
        mock.patch.object(Pretraining, "train_step", interrupted),
        mock.patch.object(signals, "is_requested", lambda: len(steps) == 6),  # the second step of the second epoch
    ):
        assert "after step 2 of 4 of epoch 1/2" in pretrain(images, tmp_path / "parts", *more).stderr
    assert pretrain(images, tmp_path / "parts", *more).status == 0
    whole, parts = (load_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("whole", "parts"))
    for part in ("student", "teacher", "optimizer", "dino_loss", "term"):
        assert_same(parts[part], whole[part], part)


@pytest.mark.parametrize("net, part, parts", [("dino", None, 1), ("augself", None, 1), ("augself", "EF", 3), ("sie", None, 3)])
def test_evaluations_know_the_parts_of_a_method(net, part, parts, tmp_path):
    data = write_labelled_images(tmp_path / "data", train=4, val=2)
    chosen = ("--equiv_part", part) if part else ()
    assert pretrain(data / "train", tmp_path / "run", *flags(net, *RESNET, *chosen)).status == 0
    words = ("--pretrained_weights", tmp_path / "run/checkpoint.pth", "--data_path", data, "--num_workers", 0, "--nb_knn", 3)
    for name, has in (("ALL", True), ("main_part", parts == 3), ("else_part", parts == 3)):
        outcome = call(eval_knn.main, *words, "--output_dir", tmp_path / name, "--else_part", name)
        assert (outcome.status == 0) == has, outcome.stderr
    record = json.loads((tmp_path / "ALL" / "knn.json").read_text())
    assert (record["net"], record.get("equiv_part")) == (net, {1: "ALL", 3: "EF"}[parts] if net != "dino" else None)


def test_parts_of_a_told_ef_are_trained_apart(images, tmp_path):
    """With the term on the EF alone, the IR head reads only the IR, and the term only the EF."""
    outcome = pretrain(images, tmp_path / "run", *flags("augself", *RESNET, "--equiv_part", "EF", "--hp1", 0.75))
    assert outcome.status == 0, outcome.stderr
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pth")
    assert state["student"]["head.mlp.0.weight"].shape[1] == 96 and "head2.mlp.0.weight" not in state["student"]
    inputs = {value.shape[1] for name, value in state["term"].items() if name.endswith("0.weight") and value.ndim == 2}
    assert inputs == {2 * 32}  # two views of 32 columns


BAD = [
    ("dino", "--equiv_lambd 1", "--equiv_lambd", "no equivariant term", "augself"),
    ("CLeVER", "--equiv_part EF", "--equiv_part", "no equivariant term"),
    ("augself", "--equiv_part IR", "--equiv_part", "'IR'", "ALL"),
    ("sie", "--equiv_part ALL", "--equiv_part 'ALL'", "EF"),
    ("augself", "--equiv_lambd -1", "--equiv_lambd -1.0", "0 or greater"),
    ("augself", "--equiv_params colour", "--equiv_params 'colour'", "crop"),
    ("augself", "--aug aug1 --equiv_params rotation", "--equiv_params rotation", "--aug aug1 never change it"),
    ("essl", "--equiv_params crop", "--equiv_params", "is not told"),
    ("equimod", "--batch_size_per_gpu 1", "--batch_size_per_gpu 1", "2 or greater"),
    ("sie", "--batch_size_per_gpu 1", "--batch_size_per_gpu 1", "2 or greater"),
    ("sie", "--hp1 nan", "--hp1 nan", "(0, 1]"),
    ("care", "--care_chunk 3", "--care_chunk 3"),
    ("care", "--care_chunk 2 --equiv_part EF", "--equiv_part 'EF'", "ALL"),
    ("essl", "--essl_size 20", "--patch_size 8", "extra views' size 20"),
    ("sie", "--hp1 0.999", "hp1 0.999"),
    ("simclr", "", "'simclr'", "dino, CLeVER, augself"),
]


@pytest.mark.parametrize("net, more, mentioned", [(net, more, mentioned) for net, more, *mentioned in BAD])
def test_flags_that_do_not_fit_are_refused(net, more, mentioned, images, tmp_path):
    assert_refused(pretrain(images, tmp_path / "run", "--net", net, *more.split()), *mentioned)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_method_is_not_continued(images, tmp_path):
    assert pretrain(images, tmp_path / "run", *flags("augself", *RESNET)).status == 0
    for other in (flags("equimod_pair", *RESNET), flags("augself", *RESNET, "--equiv_params", "crop")):
        assert_refused(pretrain(images, tmp_path / "run", *other, "--epochs", 2), "was made with")


def test_a_term_that_is_not_finite_is_named(images, tmp_path):
    with mock.patch.object(METHODS["augself"].term, "forward", lambda self, z, codes, extra: {"term": z.sum() * torch.nan}):
        outcome = pretrain(images, tmp_path / "run", *flags("augself", *RESNET))
    assert outcome.status == 1 and "loss_term is nan" in outcome.stderr
