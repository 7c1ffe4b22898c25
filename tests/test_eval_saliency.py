"""eval_saliency.py from folders to files: the scores of the original, files, several processes, bad input."""

import csv
import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from support.in_process import assert_refused, call, pretrain, snapshot
from support.processes import run, write_images
from support.synthetic_saliency import colour_probe_, constant_network_, save_checkpoint, shallow_vit_tiny, write_saliency

import eval_saliency
from clever.models import backbones

NAMES = ["0000", "0001", "0002", "0003"]
BOTH = ("TokenCut", "TokenCut + bilateral solver")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four images, each with an ellipse, in img/ and gt/."""
    return write_saliency(tmp_path_factory.mktemp("saliency"))


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """A ViT whose keys are the colours of the patches."""
    return save_checkpoint(colour_probe_(shallow_vit_tiny()), tmp_path_factory.mktemp("probe") / "probe.pth")


def saliency(weights, output, *flags):
    """eval_saliency.py, where vit_tiny has one block."""
    common = ("--pretrained_weights", weights, "--output_dir", output, "--num_workers", 0)
    with mock.patch.dict(backbones.BACKBONES, vit_tiny=shallow_vit_tiny):
        return call(eval_saliency.main, *common, *(() if "--arch" in flags else ("--arch", "vit_tiny")), *flags)


def score(weights, data, output, *flags):
    return saliency(weights, output, "--images", data / "img", "--ground_truth", data / "gt", *flags)


def result(folder):
    return json.loads((folder / "results.json").read_text())


def table(folder):
    with open(folder / "results.csv", newline="") as file:
        return {row["image"]: row for row in csv.DictReader(file)}


def read(path):
    return np.asarray(Image.open(path))


def test_colour_probe_scores_what_the_original_does(probe, data, tmp_path):
    outcome = score(probe, data, tmp_path)
    assert outcome.status == 0 and outcome.stderr == "", outcome
    rows, record = table(tmp_path), result(tmp_path)
    assert record[BOTH[0]] == pytest.approx({"IoU": 0.799, "accuracy": 0.969, "F_max": 0.892}, abs=0.002)
    assert record[BOTH[1]] == pytest.approx({"IoU": 0.961, "accuracy": 0.994, "F_max": 0.986}, abs=0.002)
    assert record["num_images"] == record["num_scored"] == 4 and record["num_degenerate"] == 0 and record["failed"] == []
    assert "TokenCut: IoU 0.79" in outcome.stdout and "saliency 4/4" in outcome.stdout

    kinds = {f"{kind}/{name}.png" for kind in ("masks", "solver", "objects") for name in NAMES}
    assert set(snapshot(tmp_path)) == kinds | {"results.csv", "results.json", "overview.png"}
    assert list(rows) == NAMES and rows["0002"]["patches"] == "12x9"  # 193 x 147 pixels
    for name, row in rows.items():
        truth = read(data / "gt" / f"{name}.png") > 0
        mask, soft, thing = (read(tmp_path / kind / f"{name}.png") for kind in ("masks", "solver", "objects"))
        assert set(np.unique(mask)) == set(np.unique(thing)) == {0, 255} and len(np.unique(soft)) > 20
        assert float(row["IoU"]) == pytest.approx((truth & (mask > 0)).sum() / (truth | (mask > 0)).sum(), abs=1e-5)
        assert (soft[truth] > 127).mean() > 0.95 and (soft[~truth] < 128).mean() > 0.98
        assert ((thing > 0) == truth).mean() > 0.98
    assert read(tmp_path / "overview.png").shape == (4 * 150, 5 * 200, 3)


def test_constant_features_have_no_cut(data, tmp_path):
    weights = save_checkpoint(constant_network_(shallow_vit_tiny()), tmp_path / "constant.pth")
    outcome = score(weights, data, tmp_path / "out")
    assert outcome.status == 0 and "4 of 4 images have no defined cut" in outcome.stdout, outcome
    record = result(tmp_path / "out")
    shares = [1 - (read(data / "gt" / f"{name}.png") > 0).mean() for name in NAMES]
    for method in BOTH:
        assert record[method] == pytest.approx({"IoU": 0, "accuracy": np.mean(shares), "F_max": 0}, abs=1e-5)
    assert {row["degenerate"] for row in table(tmp_path / "out").values()} == {"all patches are alike"}
    assert not read(tmp_path / "out" / "masks" / "0000.png").any()


def test_two_processes_score_what_one_does(data, tmp_path):
    """With an untrained network as saved by main_dino.py; any network separates two colours."""
    assert pretrain(write_images(tmp_path / "images", 4), tmp_path / "run", "--epochs", 0).status == 0
    weights = tmp_path / "run" / "checkpoint.pth"
    flags = ("--pretrained_weights", weights, "--images", data / "img", "--ground_truth", data / "gt", "--num_workers", 1)
    for processes in (1, 2):
        log = {"output": tmp_path / f"log{processes}", "processes": processes}
        run("eval_saliency.py", *flags, "--output_dir", tmp_path / str(processes), **log)
    one, two = (snapshot(tmp_path / processes) for processes in "12")
    assert set(one) == set(two) and all(one[name] == two[name] for name in one if name != "results.json")
    one, two = result(tmp_path / "1"), result(tmp_path / "2")
    assert one.pop("args") != two.pop("args") and one == two and one[BOTH[1]]["IoU"] > 0.7


def test_data_sets_by_name_from_another_directory(data, tmp_path, probe, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data, "data/ECSSD")
    shutil.copytree(data / "img", "data/DUT-OMRON/DUT-OMRON-image")
    shutil.copytree(data / "gt", "data/DUT-OMRON/pixelwiseGT-new-PNG")
    Path("data/ECSSD/img/Thumbs.db").write_text("no image")
    outcome = saliency(probe, "out", "--data_path", "data", "--dataset", "ECSSD", "DUT", "--nb_vis", 0)
    assert outcome.status == 0, outcome
    for name in ("ECSSD", "DUT"):
        assert f"{name}, 4 images, TokenCut + bilateral solver: IoU 0.9" in outcome.stdout
        assert result(Path("out", name))["dataset"] == name and Path("out", name, "masks/0003.png").exists()
        assert not Path("out", name, "overview.png").exists()


def test_a_photo_without_ground_truth(data, tmp_path, probe):
    """The scores of the result are there, and empty."""
    shutil.copy(data / "img" / "0001.jpg", tmp_path / "photo.jpg")
    outcome = saliency(probe, tmp_path, "--image_path", tmp_path / "photo.jpg")
    assert outcome.status == 0 and "IoU" not in outcome.stdout, outcome
    truth = read(data / "gt" / "0001.png") > 0
    assert ((read(tmp_path / "objects" / "photo.png") > 0) == truth).mean() > 0.98
    assert [set(result(tmp_path)[method].values()) for method in BOTH] == [{None}, {None}]
    assert table(tmp_path)["photo"]["IoU"] == "" and read(tmp_path / "overview.png").shape == (150, 4 * 200, 3)


def test_flags_reach_data_and_detector(data, tmp_path, probe):
    """Images are shrunk for the network but not for the masks; grey levels below the threshold are background."""
    for folder, suffix in (("img", "jpg"), ("gt", "png")):
        (tmp_path / folder).mkdir()
        shutil.copy(data / folder / f"0001.{suffix}", tmp_path / folder)
    truth = read(tmp_path / "gt" / "0001.png").copy()
    truth[:20] = 127
    Image.fromarray(truth).save(tmp_path / "gt" / "0001.png")
    flags = ("--max_side", 112, "--gt_threshold", 128, "--vit_feat", "kqv", "--sigma_spatial", 8)
    outcome = score(probe, tmp_path, tmp_path / "out", *flags)
    assert outcome.status == 0 and table(tmp_path / "out")["0001"]["patches"] == "6x7", outcome
    assert read(tmp_path / "out" / "masks" / "0001.png").shape == (200, 160)
    assert result(tmp_path / "out")[BOTH[1]]["IoU"] > 0.85


def test_bad_files_do_not_lose_the_others(tmp_path, data, probe):
    shutil.copytree(data, tmp_path / "data")
    img, gt = tmp_path / "data" / "img", tmp_path / "data" / "gt"
    (img / "0000.jpg").write_bytes((img / "0000.jpg").read_bytes()[:700])
    (gt / "0001.png").write_bytes(b"no picture")
    Image.new("L", (50, 60)).save(gt / "0002.png")
    Image.new("RGB", (20, 20)).save(img / "dot.png")  # one patch
    Image.new("L", (20, 20), 255).save(gt / "dot.png")
    shutil.copy(img / "0003.jpg", img / "no_truth.jpg")
    assert_refused(score(probe, tmp_path / "data", tmp_path / "out"), "4 of 6 failed: image", "0000.jpg: cannot be read")
    rows, record = table(tmp_path / "out"), result(tmp_path / "out")
    reasons = {name: row["error"] for name, row in rows.items() if row["error"]}
    for name, reason in {
        "0000": "0000.jpg: cannot be read",
        "0001": "0001.png: cannot be read",
        "0002": "0002.png: 50x60 pixels, its image has 193x147",
        "no_truth": "no_truth.png: cannot be read",
    }.items():
        assert reason in reasons.pop(name), name
    assert reasons == {} and len(record["failed"]) == 4 and record["num_scored"] == 2
    assert rows["dot"]["degenerate"] == "a cut needs three patches" and rows["dot"]["IoU"] == "0.000000"
    assert record[BOTH[0]]["IoU"] == pytest.approx(float(rows["0003"]["IoU"]) / 2, abs=1e-5)
    assert sorted(path.name for path in (tmp_path / "out" / "masks").iterdir()) == ["0003.png", "dot.png"]


def test_networks_that_do_not_fit(tmp_path, data, probe):
    weights = save_checkpoint(backbones.build_backbone("resnet8"), tmp_path / "pooled.pth")
    assert_refused(score(weights, data, tmp_path / "out", "--arch", "resnet8"), "--arch resnet8: its features are pooled")
    state = torch.load(probe, weights_only=True)
    state["teacher"]["module.backbone.blocks.0.norm1.weight"].fill_(3e38)  # finite weights whose features overflow
    torch.save(state, tmp_path / "overflow.pth")
    outcome = score(tmp_path / "overflow.pth", data, tmp_path / "out")
    assert outcome.status == 1 and "not finite: features of image" in outcome.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, mentioned",
    [
        ("", "--dataset --images --image_path"),
        ("--images a --sigma_luma 0", "--sigma_luma 0"),
        ("--images {root} --ground_truth {data}/gt", "has a ground truth of its name in {data}/gt"),
        ("--data_path {root} --dataset ECSSD", "folders ECSSD/img and gt; or ECSSD/images and ground_truth_mask"),
        ("--images {data}/img --ground_truth {data}/gt/../masks --output_dir {data}", "masks/ would mix with the input"),
    ],
)
def test_bad_input(flags, mentioned, tmp_path, data, probe):
    Image.new("RGB", (9, 9)).save(tmp_path / "picture.png")
    shutil.copytree(data, tmp_path / "data")
    shutil.copytree(data / "gt", tmp_path / "data" / "masks")
    paths, before = {"root": tmp_path, "data": tmp_path / "data"}, snapshot(tmp_path)
    outcome = saliency(probe, tmp_path / "out", *(word.format(**paths) for word in flags.split()))
    assert_refused(outcome, mentioned.format(**paths))
    assert snapshot(tmp_path) == before
