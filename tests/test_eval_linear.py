"""The linear probe: its recipe, what it reaches on easy and on impossible data, resume, parts, evaluation."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from support.in_process import assert_refused, pretrain, probe, snapshot
from test_resume import assert_same

from clever.checkpoint import load_checkpoint
from clever.evaluation.features import FeatureExtractor
from clever.evaluation.names import linear_probe_name
from clever.evaluation.probe import ProbeGroup


def write_colours(folder, classes, train, val, mixed=False):
    """Class folders a, b, ... of 16 x 16 noise in one hue per class; with `mixed`, every folder holds all hues alike."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            path = folder / split / "abcdefgh"[label]
            path.mkdir(parents=True)
            for number in range(count):
                hue = (number if mixed else label) * 256 // classes % 256
                pixels = np.full((16, 16, 3), (hue, 200, 200)) + rng.integers(-15, 16, (16, 16, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8), mode=None).convert("RGB")
                image = Image.merge("HSV", image.split()).convert("RGB")
                image.save(path / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return write_colours(tmp_path_factory.mktemp("colours") / "data", classes=3, train=24, val=10)


@pytest.fixture(scope="module")
def weights(tmp_path_factory, colours):
    """An untrained resnet8, as main_dino.py writes it with --epochs 0."""
    folder = tmp_path_factory.mktemp("weights")
    outcome = pretrain(colours / "train", folder, "--arch", "resnet8", "--global_crops_size", 16, "--epochs", 0)
    assert outcome.status == 0, outcome
    return folder / "checkpoint.pth"


RECIPE = ("--lr", 5, "--batch_size_per_gpu", 24)  # rate 0.47 per step of 24 images


def read_result(folder, name="linear_5_8_"):
    return json.loads((folder / f"{name}.json").read_text())


# --- training ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(weights, colours, tmp_path_factory):
    """A probe of 8 epochs: its folder and its output."""
    folder = tmp_path_factory.mktemp("trained")
    outcome = probe(weights, colours, folder, *RECIPE, "--epochs", 8)
    assert outcome.status == 0, outcome
    return folder, outcome.stdout


def test_a_probe_separates_colours(trained):
    folder, stdout = trained
    result = read_result(folder)
    assert result["accuracy"] > 90 and result["best_accuracy"] >= result["accuracy"]
    lines = re.findall(r"Accuracy at epoch (\d+) of the network on the 30 test images: ([\d.]+)%", stdout)
    assert [int(epoch) for epoch, _ in lines] == list(range(8))
    accuracies = [float(accuracy) for _, accuracy in lines]
    assert result["accuracy"] == pytest.approx(accuracies[-1], abs=0.01)
    assert result["best_accuracy"] == pytest.approx(max(accuracies), abs=0.01)
    assert f"last {accuracies[-1]:.2f}%, best {max(accuracies):.2f}%" in stdout
    assert f"lr {5 * 24 / 256:.4g} for 24 images per step" in stdout and result["effective_lr"] == 5 * 24 / 256


def test_labels_without_meaning_give_chance(weights, tmp_path):
    """Every class folder holds the same share of each hue, so that no rule on hues beats one in three."""
    data = write_colours(tmp_path / "data", classes=3, train=24, val=30, mixed=True)
    assert probe(weights, data, tmp_path, *RECIPE, "--epochs", 8).status == 0
    assert 18 < read_result(tmp_path)["accuracy"] < 50


def interrupt_at(monkeypatch, epoch):
    """Stop the next training at the beginning of an epoch."""
    real = ProbeGroup.train_one_epoch

    def train_one_epoch(self, active, loader, number):
        if number == epoch:
            raise KeyboardInterrupt
        return real(self, active, loader, number)

    monkeypatch.setattr(ProbeGroup, "train_one_epoch", train_one_epoch)


def test_a_probe_is_not_used_for_other_classes(trained, weights, colours, tmp_path):
    """As many as it was trained on, with other names."""
    data = shutil.copytree(colours, tmp_path / "data")
    for split in ("train", "val"):
        (data / split / "a").rename(data / split / "z")
    out = shutil.copytree(trained[0], tmp_path / "out")
    before = snapshot(out)
    for more in ((), ("--evaluate",)):
        outcome = probe(weights, data, out, *RECIPE, "--epochs", 8, *more)
        assert_refused(outcome, "classes ", "checkpoint_linear_5_8_.pth.tar was trained with", "--trial_name")
    assert snapshot(out) == before


# --- several parts and perturbations -----------------------------------------------------------------------------------

THREE_PARTS = ("main_part", "ALL", "else_part")
MORE_EPOCHS = (*RECIPE, "--epochs", 5, "--val_freq", 2)


@pytest.fixture(scope="module", params=["resnet8", "vit_micro"])
def network(request, weights, colours, tmp_path_factory):
    """Weights and flags of a pooled backbone, and of a ViT whose ALL features are interleaved."""
    if request.param == "resnet8":
        return weights, MORE_EPOCHS
    folder = tmp_path_factory.mktemp("vit")
    flags = ("--arch", "vit_micro", "--patch_size", 8, "--global_crops_size", 16, "--epochs", 0)
    assert pretrain(colours / "train", folder, *flags).status == 0
    return folder / "checkpoint.pth", (*MORE_EPOCHS, "--n_last_blocks", 1, "--avgpool_patchtokens", "true")


@pytest.fixture(scope="module")
def separate(network, colours, tmp_path_factory):
    """The folder of three trainings and six evaluations, each a run of its own."""
    weights, flags = network
    folder = tmp_path_factory.mktemp("separate")
    for part in THREE_PARTS:
        assert probe(weights, colours, folder, *flags, "--else_part", part).status == 0
        for perturbation in ("aug1_2", "basic"):
            evaluation = ("--evaluate", "--test_aug_type", perturbation)
            assert probe(weights, colours, folder, *flags, "--else_part", part, *evaluation).status == 0
    return folder


def content(folder):
    """{file name: checkpoint or result} without the output folder, which the arguments contain."""
    files = {path.name: path for path in folder.iterdir()}
    records = {
        name: load_checkpoint(path) if name.endswith(".pth.tar") else json.loads(path.read_text())
        for name, path in files.items()
    }
    for record in records.values():
        del record["args"]["output_dir"]
    return records


def test_several_parts_equal_separate_runs(network, separate, colours, tmp_path, monkeypatch):
    """To the last bit and with the same recorded arguments, by one pass of the backbone per batch."""
    weights, flags = network
    passes, real = [], FeatureExtractor.tokens
    monkeypatch.setattr(FeatureExtractor, "tokens", lambda *inputs: passes.append(1) or real(*inputs))
    trained = probe(weights, colours, tmp_path, *flags, "--else_part", *THREE_PARTS)
    assert trained.status == 0 and len(passes) == 5 * 3 + 2  # 72 training images, 30 test images once
    assert re.findall(r"ALL: Accuracy at epoch (\d+)", trained.stdout) == ["1", "3", "4"]  # --val_freq 2, and the last one
    passes.clear()
    evaluation = ("--evaluate", "--test_aug_type", "aug1_2", "basic")
    evaluated = probe(weights, colours, tmp_path, *flags, "--else_part", *THREE_PARTS, *evaluation)
    assert evaluated.status == 0 and len(passes) == 2 * 2
    assert_same(content(tmp_path), content(separate))
    written = re.findall(r"wrote .*/only_eval_(\w+)_linear(\S*?)_5_5_.json", evaluated.stdout)
    assert written == [(aug, part) for aug in ("aug1_2", "basic") for part in ("_hp0.8", "", "_hp0.8_else")]
    accuracy = json.loads((separate / "linear_hp0.8_5_5_.json").read_text())["accuracy"]
    assert f"main_part: Accuracy at epoch 4 of the network on the 30 test images: {accuracy:.2f}%" in trained.stdout


def test_parts_are_resumed_from_unequal_epochs(network, separate, colours, tmp_path, monkeypatch):
    """One is finished, one was interrupted between two validations, one has not begun."""
    weights, flags = network
    assert probe(weights, colours, tmp_path, *flags, "--else_part", "ALL").status == 0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 3)
        probe(weights, colours, tmp_path, *flags, "--else_part", "main_part")
    outcome = probe(weights, colours, tmp_path, *flags, "--else_part", *THREE_PARTS)
    assert outcome.status == 0 and outcome.stdout.count("continuing ") == 2
    expected = content(separate)
    assert_same(content(tmp_path), {name: value for name, value in expected.items() if "only_eval" not in name})


@pytest.mark.parametrize(
    "flags, mentioned",
    [
        ("--else_part main_part ALL IR", "--else_part 'main_part': given twice"),
        ("--else_part ALL --lr 5 --epochs 8 --batch_size_per_gpu 5", "images_per_step 5: the probe "),
        ("--evaluate --else_part ALL IR --final_eval_weights x", "x: only with one part, not ALL main_part"),
        ("--evaluate --else_part ALL EF --lr 5 --epochs 8", "checkpoint_linear_hp0.8_else_5_8_.pth.tar: no such file"),
    ],
)
def test_refused_lists(trained, weights, colours, tmp_path, flags, mentioned):
    shutil.copytree(trained[0], tmp_path / "out")  # the probe of ALL only
    before = snapshot(tmp_path / "out")
    assert_refused(probe(weights, colours, tmp_path / "out", *RECIPE, *flags.split()), mentioned)
    assert snapshot(tmp_path / "out") == before


# --- evaluation --------------------------------------------------------------------------------------------------------


def test_the_only_probe_of_a_part_is_evaluated_whatever_its_recipe(weights, colours, tmp_path):
    """Results are named after the probe; lr and hp1 stand in its name as they were typed."""
    typed = ("--lr", "5e0", "--hp1", "0.80", "--else_part", "main_part", "--trial_name", "T", "--epochs", 2)
    assert probe(weights, colours, tmp_path, *typed).status == 0
    name = linear_probe_name("IR", "0.80", "5e0", 2, "T")
    assert set(snapshot(tmp_path)) == {f"checkpoint_{name}.pth.tar", f"{name}.json"}
    evaluation = ("--evaluate", "--else_part", "main_part", "--trial_name", "T")
    outcome = probe(weights, colours, tmp_path, *evaluation)
    assert outcome.status == 0 and f"taking {tmp_path}/checkpoint_{name}.pth.tar" in outcome.stdout
    assert read_result(tmp_path, f"only_eval_ori_{name}")["accuracy"] == read_result(tmp_path, name)["accuracy"]
    shutil.copy(tmp_path / f"checkpoint_{name}.pth.tar", tmp_path / "checkpoint_linear_hp0.8_5_3_T.pth.tar")
    for more in ((), ("--trial_name", "U"), ("--else_part", "ALL"), ("--else_part", "else_part")):
        assert_refused(probe(weights, colours, tmp_path, *evaluation, *more), "no such file")
