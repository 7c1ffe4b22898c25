"""Downstream classification: what each mode trains, processes, resume, evaluation."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.downstream_world import downstream, flags_of, make_world, only, parse, result_of
from support.golden import rel_error
from support.in_process import assert_refused, call
from support.processes import run, run_script
from test_resume import assert_same
from torchvision.ops import StochasticDepth

import eval_linear_ds as ds
from clever.checkpoint import load_checkpoint
from clever.evaluation.pretrained import Pretrained
from clever.evaluation.probe import ProbeGroup
from clever.models.backbones import build_backbone
from clever.models.layers import normalize
from clever.utils import IMAGENET_MEAN, IMAGENET_STD
from vmamba import load_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def watch(monkeypatch):
    """What passes through a run: the backbone before and at the end, rates per epoch, data sets, batches of images."""
    seen = SimpleNamespace(rates=[], loaders=[], batches=[])

    def build_extractor(*arguments):
        seen.extractor = real_build(*arguments)
        seen.before = {name: value.clone() for name, value in seen.extractor.backbone.state_dict().items()}
        return seen.extractor

    def train_one_epoch(self, active, loader, *rest):
        (probe,) = active
        seen.rates.append([group["lr"] for group in probe.optimizer.param_groups])
        seen.optimizer, seen.model = probe.optimizer, probe.model
        seen.loaders.append(loader)
        return real_train(self, active, loader, *rest)

    real_build, real_train = ds.build_extractor, ProbeGroup.train_one_epoch
    monkeypatch.setattr(ds, "build_extractor", build_extractor)
    monkeypatch.setattr(ProbeGroup, "train_one_epoch", train_one_epoch)
    return seen


def pretrained(arch):
    backbone = build_backbone(arch).eval().requires_grad_(False)
    return Pretrained(backbone, arch, "CLeVER", 0.8, 224, (0, 0, 0), (1, 1, 1), None, None, "")


@pytest.mark.parametrize("arch", ["vssm2-vmambav2_tiny_224", "vit_micro"])
def test_only_a_vmamba_is_fine_tuned_with_stochastic_depth(arch):
    network = pretrained(arch)
    rates = []
    for mode in ("linear", "ds_ft"):
        backbone = ds.build_extractor(parse("--ds_mode", mode), network, CPU).backbone
        assert_same(dict(backbone.state_dict()), dict(network.backbone.state_dict()))
        rates.append(max((module.p for module in backbone.modules() if isinstance(module, StochasticDepth)), default=0))
    assert rates == ([0, load_config(arch).drop_path_rate] if arch.startswith("vssm") else [0, 0])


# --- what is trained ---------------------------------------------------------------------------------------------------


def test_linear_leaves_the_backbone_bit_identical(world, watch, tmp_path):
    outcome = downstream(world, world.resnet, tmp_path, "--epochs", 3)
    assert outcome.status == 0, outcome
    after = watch.extractor.backbone.state_dict()
    assert any("running_mean" in name for name in after)
    assert_same(after, watch.before)
    assert "state_dict_model" not in load_checkpoint(only(tmp_path, "*.pth.tar"))
    assert outcome.stdout.count("test images 13/13") == 1  # their features are computed once
    lr = 0.5 * 4 / 256
    assert watch.rates == [[pytest.approx(lr * 0.5 * (1 + math.cos(math.pi * epoch / 3)))] for epoch in range(3)]


@pytest.mark.parametrize("arch, part", [("vit", "ALL"), ("resnet", "main_part"), ("vit", "else_part")])
def test_fine_tuning_trains_everything(world, watch, tmp_path, arch, part):
    flags = ("--ds_mode", "ds_ft", "--backbone_lr", 0.1, "--weight_decay", 1e-4, "--else_part", part)
    outcome = downstream(world, getattr(world, arch), tmp_path, *flags)
    assert outcome.status == 0, outcome
    after = watch.extractor.backbone.state_dict()
    same = [name for name, value in watch.before.items() if torch.equal(after[name], value)]
    assert same == [] and all(value.isfinite().all() for value in after.values())
    assert_same(load_checkpoint(only(tmp_path, "*.pth.tar"))["state_dict_model"], dict(after))
    assert outcome.stdout.count("test images 13/13") == 2


def test_a_last_batch_of_one_image_is_left_out_where_batch_norms_are_trained(world, watch, tmp_path):
    """12 training images in batches of 11. A ViT, which has no batch norm, trains on all of them."""
    flags = ("--ds_mode", "ds_ft", "--backbone_lr", 0.1, "--batch_size_per_gpu", 11, "--epochs", 1)
    for arch in ("resnet", "vit"):
        assert downstream(world, getattr(world, arch), tmp_path / arch, *flags).status == 0
    assert [[len(images) for images, _ in loader] for loader in watch.loaders] == [[11], [11, 1]]


def test_a_step_of_fine_tuning_by_hand(world, watch, tmp_path):
    """All images are one batch, so that the run is two steps of SGD, the second with momentum."""
    words = ("--ds_mode", "ds_ft", "--backbone_lr", 2, "--lr", 4, "--weight_decay", 0.01, "--batch_size_per_gpu", 12)
    batches, start = [], {}
    real = ProbeGroup.train_one_epoch

    def train_one_epoch(self, active, loader, epoch):
        (model,) = (probe.model for probe in active)
        batches.extend(loader)
        start.setdefault("model", {name: value.clone() for name, value in model.named_parameters()})
        assert model[0].backbone.training
        return real(self, active, batches[-1:], epoch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProbeGroup, "train_one_epoch", train_one_epoch)
        assert downstream(world, world.resnet, tmp_path, *words).status == 0
    assert [len(images) for images, _ in batches] == [12, 12]
    sums = [set(images.sum((1, 2, 3)).tolist()) for images, _ in batches]
    assert not sums[0] & sums[1]  # other views in each epoch

    backbone, parameters = build_backbone("resnet8"), {name: value.requires_grad_() for name, value in start["model"].items()}
    momentum = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for (images, labels), cosine in zip(batches, (1.0, 0.5), strict=True):
        body = {name.removeprefix("0.backbone."): p for name, p in parameters.items() if name.startswith("0.")}
        features = torch.func.functional_call(backbone.train(), body, normalize(images, IMAGENET_MEAN, IMAGENET_STD))
        logits = features @ parameters["1.linear.weight"].T + parameters["1.linear.bias"]
        gradients = torch.autograd.grad(F.cross_entropy(logits, labels), parameters.values())
        for (name, p), gradient in zip(list(parameters.items()), gradients, strict=True):
            rate = (2 if name.startswith("0.") else 4) * 12 / 256 * cosine
            momentum[name] = 0.9 * momentum[name] + gradient + 0.01 * p.detach()
            parameters[name] = (p.detach() - rate * momentum[name]).requires_grad_()
    for name, p in watch.extractor.backbone.named_parameters():
        assert rel_error(p, parameters[f"0.backbone.{name}"]) < 1e-4, name


# --- processes, resume, evaluation -------------------------------------------------------------------------------------

FINE_TUNING = ("--ds_mode", "ds_ft", "--backbone_lr", 0.2, "--weight_decay", 1e-3, "--epochs", 3)


def train_and_save(words, variables, output, kill_at):
    """Runs the script, then saves this process's backbone beside `output`."""
    built, build = [], ds.build_extractor
    ds.build_extractor = lambda *arguments: built.append(build(*arguments)) or built[0]
    run_script(words, variables, output, kill_at)
    torch.save(built[0].backbone.state_dict(), output.with_name(variables["RANK"]))


def test_two_processes_train_the_backbone_that_one_trains(world, tmp_path):
    flags = flags_of(world, world.vit, tmp_path / "two", *FINE_TUNING, "--batch_size_per_gpu", 2)
    run("eval_linear_ds.py", *flags, processes=2, target=train_and_save, output=tmp_path / "output")
    run("eval_linear_ds.py", *flags_of(world, world.vit, tmp_path / "one", *FINE_TUNING), output=tmp_path / "output")
    ranks = [torch.load(tmp_path / rank, weights_only=True) for rank in "01"]
    assert_same(dict(ranks[1]), dict(ranks[0]))
    two, one = (load_checkpoint(only(tmp_path / name, "*.pth.tar")) for name in ("two", "one"))
    start = load_checkpoint(world.vit)["teacher"]
    for name, value in one["state_dict_model"].items():
        moved = (value - start[f"backbone.{name}"]).norm()
        assert moved > 0 and (two["state_dict_model"][name] - value).norm() < 1e-3 * moved + 1e-7, name
        assert torch.equal(two["state_dict_model"][name], ranks[0][name])
    assert rel_error(two["state_dict"]["linear.weight"], one["state_dict"]["linear.weight"]) < 1e-4
    results = [result_of(tmp_path / name) for name in ("two", "one")]
    assert results[0]["effective_backbone_lr"] == results[1]["effective_backbone_lr"]
    assert results[0]["accuracy"] == results[1]["accuracy"]


@pytest.fixture(scope="module")
def tuned(world, tmp_path_factory):
    """A fine-tuned resnet8, by two processes whose batch norms are their own: only the buffers of the first one are saved."""
    folder = tmp_path_factory.mktemp("tuned")
    flags = flags_of(world, world.resnet, folder / "run", *FINE_TUNING, "--batch_size_per_gpu", 2)
    text = run("eval_linear_ds.py", *flags, processes=2, output=folder / "output")
    assert "batch norm: statistics are computed per process" in text
    return folder / "run", flags


def test_evaluation_repeats_the_accuracies_to_the_last_digit(tuned, tmp_path):
    """13 images, each counted once by three processes."""
    folder, flags = tuned
    weights = only(folder, "*.pth.tar")
    flags = (*flags, "--output_dir", tmp_path, "--evaluate", "--final_eval_weights", weights)
    text = run("eval_linear_ds.py", *flags, processes=3, output=tmp_path / "output")
    result, trained = result_of(tmp_path, "only_eval_ori_ds_*.json"), result_of(folder)
    for name in ("accuracy", "mean_class_accuracy", "num_test_images"):
        assert result[name] == trained[name], name
    assert result["test_loss"] == pytest.approx(trained["test_loss"], rel=1e-6)
    assert f"Accuracy of the network on the 13 test images: {trained['accuracy']:.2f}%" in text.splitlines()


def test_evaluation_of_a_frozen_backbones_classifier_and_perturbed(world, tmp_path):
    assert downstream(world, world.resnet, tmp_path).status == 0
    losses = []
    for aug, more in (("ori", ()), ("aug1_2", ()), ("aug1_2", ()), ("aug1_2", ("--seed", 1))):
        assert downstream(world, world.resnet, tmp_path, "--evaluate", "--test_aug_type", aug, *more).status == 0
        losses.append(result_of(tmp_path, f"only_eval_{aug}_ds_*.json")["test_loss"])
    trained = result_of(tmp_path)
    assert losses[0] == trained["test_loss"] and losses[0] != losses[1] == losses[2] != losses[3]


def test_an_originals_files_are_evaluated(world, tuned, tmp_path):
    """Their keys carry `module.` where the original wrapped the module, and they say less about themselves."""
    folder, flags = tuned
    state = load_checkpoint(only(folder, "*.pth.tar"))
    original = {name: state[name] for name in ("epoch", "optimizer", "scheduler", "state_dict_model")}
    original["state_dict"] = {f"module.{name}": value for name, value in state["state_dict"].items()}
    original["best_acc"] = np.float64(99)
    path = tmp_path / "original.pth.tar"
    torch.save(original, path)
    evaluation = (*flags, "--output_dir", tmp_path, "--evaluate", "--final_eval_weights", path)
    assert call(ds.main, *evaluation).status == 0
    assert result_of(tmp_path, "only_eval_ori_original.json")["accuracy"] == result_of(folder)["accuracy"]
    del original["state_dict_model"]
    torch.save(original, path)
    assert_refused(call(ds.main, *evaluation), str(path), "same mode")


def test_a_killed_run_started_again_ends_in_the_same_bits(world, tmp_path):
    more = ("--semi_list", world.listed, "--backbone_lr", 0.2, "--weight_decay", 1e-3)

    def start(folder, kill_at=None):
        flags = flags_of(world, world.resnet, folder, "--ds_mode", "semi_1", "--epochs", 4, "--val_freq", 3, *more)
        flags += ("--batch_size_per_gpu", 2, "--num_workers", 1)
        return run("eval_linear_ds.py", *flags, output=tmp_path / "output", kill_at=kill_at)

    whole, folder = tmp_path / "whole", tmp_path / "killed"
    start(whole)
    start(folder, kill_at="epoch 2/4 2/2 ")
    assert load_checkpoint(only(folder, "*.pth.tar"))["epoch"] == 2
    assert "from epoch 2" in start(folder)
    states = [load_checkpoint(only(f, "*.pth.tar")) for f in (folder, whole)]
    results = [result_of(f) for f in (folder, whole)]
    for record in (*states, *results):
        del record["args"]  # the output folders differ
    assert_same(states[0], states[1])
    assert results[0] == results[1]
