"""eval_saliency.py from folders to files: the scores of the original, files, several processes, bad input."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.in_process import assert_refused, call, pretrain, snapshot
from support.processes import run, write_images
from support.synthetic_saliency import colour_probe_, write_saliency

import eval_saliency
from clever.models import vision_transformer
from clever.models.backbones import build_backbone

NAMES = ["0000", "0001", "0002", "0003"]
BOTH = ("TokenCut", "TokenCut + bilateral solver")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four images, each with an ellipse, in img/ and gt/."""
    return write_saliency(tmp_path_factory.mktemp("saliency"))


def save(network, path, **more):
    """A checkpoint as DINO writes it."""
    torch.save({"teacher": {f"module.backbone.{name}": value for name, value in network.state_dict().items()}, **more}, path)
    return path


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """ViT-S whose keys are the colours of the patches."""
    network = colour_probe_(vision_transformer.vit_small())
    return save(network, tmp_path_factory.mktemp("probe") / "probe.pth")


@pytest.fixture(scope="module")
def small_probe(tmp_path_factory):
    """The same in a ViT-Ti, which is faster."""
    network = colour_probe_(vision_transformer.vit_tiny())
    return save(network, tmp_path_factory.mktemp("small") / "probe.pth", args={"arch": "vit_tiny"})


def saliency(weights, output, *flags):
    return call(eval_saliency.main, "--pretrained_weights", weights, "--output_dir", output, "--num_workers", 0, *flags)


def score(weights, data, output, *flags):
    return saliency(weights, output, "--images", data / "img", "--ground_truth", data / "gt", *flags)


def result(folder):
    return json.loads((folder / "results.json").read_text())


def table(folder):
    with open(folder / "results.csv", newline="") as file:
        return {row["image"]: row for row in csv.DictReader(file)}


def read(path):
    return np.asarray(Image.open(path))


# --- golden scores -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(probe, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    return folder, score(probe, data, folder)


def test_colour_probe_scores_what_the_original_does(scored):
    folder, outcome = scored
    assert outcome.status == 0 and outcome.stderr == "", outcome
    plain, solver = (result(folder)[method] for method in BOTH)
    assert plain == pytest.approx({"IoU": 0.799, "accuracy": 0.969, "F_max": 0.892}, abs=0.002)
    assert solver == pytest.approx({"IoU": 0.961, "accuracy": 0.994, "F_max": 0.986}, abs=0.002)
    assert "TokenCut: IoU 0.79" in outcome.stdout and "saliency 4/4" in outcome.stdout and "left 0:00:00" in outcome.stdout


def test_means_are_those_of_the_table_and_of_the_masks(scored, data):
    folder, _ = scored
    rows, record = table(folder), result(folder)
    assert list(rows) == NAMES and all(row["error"] == row["degenerate"] == "" for row in rows.values())
    for prefix, method in zip(("", "solver_"), BOTH, strict=True):
        for name in ("IoU", "accuracy"):
            mean = np.mean([float(row[prefix + name]) for row in rows.values()])
            assert record[method][name] == pytest.approx(mean, abs=1e-5)
        assert record[method]["F_max"] <= np.mean([float(row[prefix + "F_max"]) for row in rows.values()]) + 1e-5
    for name, row in rows.items():
        truth, mask = read(data / "gt" / f"{name}.png") > 0, read(folder / "masks" / f"{name}.png") > 0
        assert float(row["IoU"]) == pytest.approx((truth & mask).sum() / (truth | mask).sum(), abs=1e-5)
        assert float(row["foreground"]) == pytest.approx(mask.mean(), abs=1e-5)
    assert rows["0002"]["patches"] == "12x9"  # 193 x 147 pixels
    assert record["num_images"] == record["num_scored"] == 4 and record["num_degenerate"] == 0 and record["failed"] == []
    assert record["args"]["tau"] == 0.2 and record["backbone"]


def test_pictures_have_the_size_of_the_image_and_show_its_object(scored, data):
    folder, _ = scored
    kinds = {f"{kind}/{name}.png" for kind in ("masks", "solver", "objects") for name in NAMES}
    assert set(snapshot(folder)) == kinds | {"results.csv", "results.json", "overview.png"}
    for name in NAMES:
        truth = read(data / "gt" / f"{name}.png") > 0
        mask, soft, thing = (read(folder / kind / f"{name}.png") for kind in ("masks", "solver", "objects"))
        assert mask.shape == soft.shape == thing.shape == truth.shape and mask.dtype == soft.dtype == np.uint8
        assert set(np.unique(mask)) == set(np.unique(thing)) == {0, 255} and len(np.unique(soft)) > 20
        assert (soft[truth] > 127).mean() > 0.95 and (soft[~truth] < 128).mean() > 0.98
        assert ((thing > 0) == truth).mean() > 0.98
    overview = read(folder / "overview.png")
    assert overview.shape[0] > 600 and overview.shape[1] > 1000 and overview.std() > 30


def test_constant_features_have_no_cut(data, tmp_path, small_probe):
    state = torch.load(small_probe, weights_only=True)
    for name, value in state["teacher"].items():
        if "patch_embed.proj" in name:
            value.fill_(0.1 if name.endswith("bias") else 0)
        if name.endswith("norm1.bias"):
            value.fill_(0.5)
    torch.save(state, tmp_path / "constant.pth")
    outcome = score(tmp_path / "constant.pth", data, tmp_path / "out")
    assert outcome.status == 0 and "4 of 4 images have no defined cut" in outcome.stdout, outcome
    record = result(tmp_path / "out")
    shares = [1 - (read(data / "gt" / f"{name}.png") > 0).mean() for name in NAMES]
    for method in BOTH:
        assert record[method] == pytest.approx({"IoU": 0, "accuracy": np.mean(shares), "F_max": 0}, abs=1e-5)
    assert record["num_degenerate"] == 4
    assert {row["degenerate"] for row in table(tmp_path / "out").values()} == {"all patches are alike"}
    assert not read(tmp_path / "out" / "masks" / "0000.png").any()


def test_random_network_scores_almost_as_well(data, tmp_path):
    """Any network separates two colours: the set tests the pipeline, not features."""
    torch.manual_seed(0)
    save(vision_transformer.vit_tiny(), tmp_path / "random.pth", args={"arch": "vit_tiny"})
    assert score(tmp_path / "random.pth", data, tmp_path / "out").status == 0
    plain, solver = (result(tmp_path / "out")[method]["IoU"] for method in BOTH)
    assert plain > 0.7 and solver > 0.9 and solver > plain


# --- runs --------------------------------------------------------------------------------------------------------------


def test_two_processes_score_what_one_does(data, tmp_path, small_probe, one_thread):
    flags = ("--pretrained_weights", small_probe, "--images", data / "img", "--ground_truth", data / "gt", "--num_workers", 1)
    run("eval_saliency.py", *flags, "--output_dir", tmp_path / "two", output=tmp_path / "log", processes=2)
    assert score(small_probe, data, tmp_path / "one").status == 0
    one, two = snapshot(tmp_path / "one"), snapshot(tmp_path / "two")
    assert set(one) == set(two) and all(one[name] == two[name] for name in one if name != "results.json")
    one, two = result(tmp_path / "one"), result(tmp_path / "two")
    assert one.pop("args") != two.pop("args") and one == two


def test_data_sets_by_name_from_another_directory(data, tmp_path, small_probe, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data, "data/ECSSD")
    shutil.copytree(data / "img", "data/DUT-OMRON/DUT-OMRON-image")
    shutil.copytree(data / "gt", "data/DUT-OMRON/pixelwiseGT-new-PNG")
    Path("data/ECSSD/img/Thumbs.db").write_text("no image")
    outcome = saliency(small_probe, "out", "--data_path", "data", "--dataset", "ECSSD", "DUT", "--nb_vis", 0)
    assert outcome.status == 0, outcome
    for name in ("ECSSD", "DUT"):
        assert f"{name}, 4 images, TokenCut + bilateral solver: IoU 0.9" in outcome.stdout
        assert result(Path("out", name))["dataset"] == name and Path("out", name, "masks/0003.png").exists()
        assert not Path("out", name, "overview.png").exists()


def test_checkpoint_of_pretraining_and_images_without_ground_truth(tmp_path):
    images = write_images(tmp_path / "images", 4)
    assert pretrain(images, tmp_path / "run", "--epochs", 0).status == 0
    outcome = saliency(tmp_path / "run" / "checkpoint.pth", tmp_path / "out", "--images", images)
    assert outcome.status == 0 and "IoU" not in outcome.stdout, outcome
    record, rows = result(tmp_path / "out"), table(tmp_path / "out")
    assert record["arch"] == "vit_micro" and record["num_scored"] == 0 and not set(BOTH) & set(record)
    assert rows["00"]["patches"] == "5x4" and rows["00"]["IoU"] == ""
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 4 and (tmp_path / "out" / "overview.png").exists()


def test_single_image(data, tmp_path, small_probe):
    shutil.copy(data / "img" / "0001.jpg", tmp_path / "photo.jpg")
    outcome = saliency(small_probe, tmp_path, "--image_path", tmp_path / "photo.jpg")
    assert outcome.status == 0, outcome
    truth = read(data / "gt" / "0001.png") > 0
    assert ((read(tmp_path / "objects" / "photo.png") > 0) == truth).mean() > 0.98
    assert (tmp_path / "overview.png").exists() and list(table(tmp_path)) == ["photo"]


def test_flags_reach_data_and_detector(data, tmp_path, small_probe):
    """Images are shrunk for the network but not for the masks; grey levels below the threshold are background."""
    for folder, suffix in (("img", "jpg"), ("gt", "png")):
        (tmp_path / folder).mkdir()
        shutil.copy(data / folder / f"0001.{suffix}", tmp_path / folder)
    truth = read(tmp_path / "gt" / "0001.png").copy()
    truth[:20] = 127
    Image.fromarray(truth).save(tmp_path / "gt" / "0001.png")
    flags = ("--max_side", 112, "--gt_threshold", 128, "--vit_feat", "kqv", "--sigma_spatial", 8)
    outcome = score(small_probe, tmp_path, tmp_path / "out", *flags)
    assert outcome.status == 0 and table(tmp_path / "out")["0001"]["patches"] == "6x7", outcome
    assert read(tmp_path / "out" / "masks" / "0001.png").shape == (200, 160)
    assert result(tmp_path / "out")[BOTH[1]]["IoU"] > 0.85


# --- one bad image among good ones -------------------------------------------------------------------------------------


def test_bad_files_do_not_lose_the_others(tmp_path, data, small_probe):
    shutil.copytree(data, tmp_path / "data")
    img, gt = tmp_path / "data" / "img", tmp_path / "data" / "gt"
    (img / "0000.jpg").write_bytes((img / "0000.jpg").read_bytes()[:700])
    (gt / "0001.png").write_bytes(b"no picture")
    Image.new("L", (50, 60)).save(gt / "0002.png")
    Image.new("RGB", (300, 7)).save(img / "flat.png")
    Image.new("L", (300, 7)).save(gt / "flat.png")
    Image.new("RGB", (20, 20)).save(img / "dot.png")  # one patch
    Image.new("L", (20, 20), 255).save(gt / "dot.png")
    shutil.copy(img / "0003.jpg", img / "no_truth.jpg")
    shutil.copy(gt / "0003.png", gt / "no_image.png")
    outcome = score(small_probe, tmp_path / "data", tmp_path / "out")
    assert_refused(outcome, "6 of 8 left out, all others are evaluated: 0000 (")
    rows, record = table(tmp_path / "out"), result(tmp_path / "out")
    reasons = {name: row["error"] for name, row in rows.items() if row["error"]}
    for name, reason in {
        "0000": "0000.jpg: cannot be read",
        "0001": "0001.png: cannot be read",
        "0002": "image of 193x147 pixels, its ground truth",
        "flat": "300x7 pixels: too small for a patch of 16",
        "no_truth": "no ground truth in",
        "no_image": "no image in",
    }.items():
        assert reason in reasons.pop(name), name
    assert reasons == {} and len(record["failed"]) == 6 and record["num_scored"] == 2
    assert rows["dot"]["degenerate"] == "1 patch: a cut needs three" and rows["dot"]["IoU"] == "0.000000"
    assert float(rows["0003"]["solver_IoU"]) > 0.9
    assert record[BOTH[0]]["IoU"] == pytest.approx(float(rows["0003"]["IoU"]) / 2, abs=1e-5)
    assert sorted(path.name for path in (tmp_path / "out" / "masks").iterdir()) == ["0003.png", "dot.png"]
    assert (tmp_path / "out" / "overview.png").exists()


def test_features_that_are_not_finite(tmp_path, data, small_probe):
    state = torch.load(small_probe, weights_only=True)
    state["teacher"]["module.backbone.norm.weight"].fill_(1)
    state["teacher"]["module.backbone.blocks.11.norm1.weight"].fill_(3e38)  # finite weights whose features overflow
    torch.save(state, tmp_path / "overflow.pth")
    outcome = score(tmp_path / "overflow.pth", data, tmp_path / "out")
    assert_refused(outcome, "4 of 4 left out", "features are not finite")
    assert result(tmp_path / "out")["num_scored"] == 0


# --- refused before anything is computed -------------------------------------------------------------------------------


def test_pooled_backbones_are_refused(tmp_path, data):
    weights = save(build_backbone("resnet8"), tmp_path / "pooled.pth")
    outcome = score(weights, data, tmp_path / "out", "--arch", "resnet8")
    assert_refused(outcome, "--arch resnet8: its features are pooled", "vit_small")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "checkpoint, flags, reason",
    [
        ({"weights": 3}, (), "no state dict under checkpoint key 'teacher'"),
        ({"teacher": {"module.encoder.norm.bias": torch.zeros(192)}}, (), "weights do not fit the backbone"),
        (None, ("--patch_size", 8), "patch size 16"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(tmp_path, data, small_probe, checkpoint, flags, reason):
    weights = small_probe
    if checkpoint:
        weights = tmp_path / "other.pth"
        torch.save(checkpoint, weights)
    assert_refused(score(weights, data, tmp_path / "out", *flags), weights.name, reason)
    assert not (tmp_path / "out").exists()


def test_missing_folders_are_named(tmp_path, data, probe):
    (tmp_path / "empty").mkdir()
    for flags, mentioned in [
        (("--images", tmp_path / "none"), (tmp_path / "none",)),
        (("--images", tmp_path / "empty"), (tmp_path / "empty", "has no images")),
        (("--images", data / "img", "--ground_truth", tmp_path / "none"), (tmp_path / "none", "ground truth")),
        (("--pretrained_weights", tmp_path / "none.pth", "--images", data / "img"), ("none.pth: no such file",)),
        (("--image_path", tmp_path / "none.jpg"), ("none.jpg", "no such file")),
        (("--image_path", tmp_path / "empty"), ("is a folder; give --images",)),
        (("--data_path", tmp_path, "--dataset", "ECSSD"), ("ECSSD", "ECSSD/img and gt", "ECSSD/images and ground_truth_mask")),
        (("--data_path", tmp_path, "--dataset", "VOC"), ("VOC", "ECSSD", "DUTS", "DUT")),
    ]:
        assert_refused(saliency(probe, tmp_path / "out", *flags), *map(str, mentioned))
    assert not (tmp_path / "out").exists()


def test_folders_without_a_common_name_are_refused(tmp_path, data, probe):
    images = write_images(tmp_path / "images", 2)
    outcome = saliency(probe, tmp_path / "out", "--images", images, "--ground_truth", data / "gt")
    assert_refused(outcome, "no image of", "has a ground truth of its name")


@pytest.mark.parametrize(
    "flags, mentioned",
    [
        ((), ("--dataset", "--images", "--image_path")),
        (("--images", "a", "--image_path", "b"), ("--images, --image_path",)),
        (("--images", "a", "--data_path", "b"), ("--data_path",)),
        (("--dataset", "ECSSD"), ("--data_path",)),
        (("--image_path", "a", "--ground_truth", "b"), ("--ground_truth b",)),
        (("--images", "a", "--tau", "1.5"), ("--tau 1.5", "[-1, 1)")),
        (("--images", "a", "--sigma_luma", "0"), ("--sigma_luma 0",)),
        (("--images", "a", "--gt_threshold", "0"), ("--gt_threshold 0", "1..255")),
        (("--images", "a", "--nb_vis", "1000"), ("--nb_vis 1000", "0..50")),
        (("--images", "a", "--max_side", "-1"), ("--max_side -1",)),
        (("--images", "a", "--vit_feat", "x"), ("--vit_feat", "kqv")),
    ],
)
def test_bad_flags_are_refused(flags, mentioned, tmp_path, probe):
    assert_refused(saliency(probe, tmp_path / "out", *flags), *mentioned)


def test_output_that_would_mix_with_the_input_is_refused(tmp_path, data, probe):
    shutil.copytree(data / "img", tmp_path / "set" / "img")
    shutil.copytree(data / "gt", tmp_path / "set" / "masks")
    before = snapshot(tmp_path)
    flags = ("--images", tmp_path / "set" / "img", "--ground_truth", tmp_path / "set" / "masks")
    assert_refused(saliency(probe, tmp_path / "set", *flags), "masks would mix with the input")
    assert_refused(saliency(probe, tmp_path / "set" / "img", *flags), "would mix with the input")
    flags = ("--image_path", tmp_path / "set" / "masks" / "0000.png")
    assert_refused(saliency(probe, tmp_path / "set", *flags), "would mix with the input")
    assert snapshot(tmp_path) == before
