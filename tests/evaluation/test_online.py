"""Measurements during pretraining: equal to those of the evaluation scripts, at the right epochs, without side effects."""

import json

import pytest
import torch
from support.in_process import assert_refused, call, pretrain, snapshot
from support.processes import TINY_NETWORK, write_labelled_images

import eval_equivariance
import eval_knn
from clever.checkpoint import load_checkpoint
from clever.evaluation.online import ROTATED_VIEWS

FLAGS = (*TINY_NETWORK, "--batch_size_per_gpu", 4, "--epochs", 3, "--views", "torchvision")


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_labelled_images(tmp_path_factory.mktemp("online") / "data", train=7, val=5)


@pytest.fixture(scope="module")
def clever(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clever")
    outcome = pretrain(data / "train", folder, *FLAGS, "--net", "CLeVER", "--probe_data", data, "--probe_freq", 2)
    assert outcome.status == 0, outcome
    return folder, outcome


def test_every_second_and_the_last_epoch_are_measured(clever):
    folder, outcome = clever
    parts = ("ALL", "IR", "EF")
    keys = {f"{name}_{part}" for name in ("knn", "rotation_r2") for part in parts} | {"seconds_probe"}
    assert [keys <= record.keys() for record in log_of(folder)] == [False, True, True]
    lines = [line for line in outcome.stdout.splitlines() if line.startswith("probe ")]
    assert len(lines) == 2 and lines[0].startswith("probe 1/3: 20-NN ALL ") and "R2 of rotation ALL " in lines[0]
    assert log_of(folder)[2]["seconds_probe"] < log_of(folder)[2]["seconds"]


def test_values_are_those_of_the_evaluation_scripts(clever, data, tmp_path):
    """All images are used here: the numbers of the last epoch are those of eval_knn.py and eval_equivariance.py."""
    folder, _ = clever
    last = log_of(folder)[-1]
    shared = ("--pretrained_weights", folder / "checkpoint.pth", "--data_path", data, "--output_dir", tmp_path)
    settings = ("--num_workers", 0, "--views", "torchvision")
    knn = call(eval_knn.main, *shared, *settings, "--nb_knn", 20, "--else_part", "ALL", "IR", "EF")
    assert knn.status == 0, knn
    for part, name in (("ALL", "knn"), ("IR", "knn_hp0.8"), ("EF", "knn_hp0.8_else")):
        (result,) = json.loads((tmp_path / f"{name}.json").read_text())["results"]
        assert result["top1"] == pytest.approx(last[f"knn_{part}"])
    rotation = call(
        eval_equivariance.main, *shared, *settings, "--transforms", "rotation", "--views_per_image", ROTATED_VIEWS,
        "--random_subspaces", 0, "--untrained", "false",
    )  # fmt: skip
    assert rotation.status == 0, rotation
    records = json.loads((tmp_path / "equivariance.json").read_text())["results"]
    found = {record["part"]: record["r2"] for record in records if not record["control"]}
    names = {"ALL": "ALL", "main_part": "IR", "else_part": "EF"}
    for part, r2 in found.items():
        assert r2 == pytest.approx(last[f"rotation_r2_{names.get(part, part)}"], abs=1e-5)
    assert len(found) == 3


def test_measuring_does_not_change_the_run(clever, data, tmp_path):
    outcome = pretrain(data / "train", tmp_path, *FLAGS, "--net", "CLeVER")
    assert outcome.status == 0, outcome
    measured, plain = (load_checkpoint(folder / "checkpoint.pth") for folder in (clever[0], tmp_path))
    for name, weights in plain["teacher"].items():
        assert torch.equal(measured["teacher"][name], weights), name
    for with_probe, without in zip(log_of(clever[0]), log_of(tmp_path), strict=True):
        assert with_probe["train_loss"] == without["train_loss"]


def test_dino_has_no_parts(data, tmp_path):
    flags = ("--net", "dino", "--epochs", 1, "--probe_data", data, "--knn_data", data)
    outcome = pretrain(data / "train", tmp_path, *FLAGS, *flags)
    assert outcome.status == 0, outcome
    (record,) = log_of(tmp_path)
    assert {name for name in record if name.startswith(("knn", "rotation"))} == {"knn_top1", "knn_ALL", "rotation_r2_ALL"}
    assert record["knn_top1"] == record["knn_ALL"]


@pytest.mark.parametrize(
    "flags, mentioned",
    [
        (("--probe_freq", 0), "--probe_freq 0: must be greater than 0"),
        (("--probe_data", "few"), "few: train/ and val/ need 5 images each"),
    ],
)
def test_bad_input(data, tmp_path, monkeypatch, flags, mentioned):
    monkeypatch.chdir(tmp_path)
    write_labelled_images(tmp_path / "few", train=3, val=1)
    (tmp_path / "few" / "val" / "grey" / "01.png").unlink()
    before = snapshot(tmp_path)
    assert_refused(pretrain(data / "train", tmp_path / "out", *FLAGS, *flags), mentioned)
    assert snapshot(tmp_path) == before
