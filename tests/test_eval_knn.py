"""eval_knn.py: votes by hand and by scikit-learn, parts, saved features, several processes, bad input."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.in_process import assert_refused, call
from support.processes import run, write_images, write_labelled_images

import eval_knn
from clever.data.augmentations import eval_transform
from clever.data.datasets import labelled_dataset
from clever.data.rendering import choose_renderer
from clever.evaluation.feature_files import TENSORS
from clever.models.backbones import build_backbone
from clever.models.layers import normalize
from clever.utils import IMAGENET_MEAN, IMAGENET_STD


def knn(*flags):
    return call(eval_knn.main, "--num_workers", 0, *flags)


def results(output, name="knn"):
    """{(k, temperature): (top1, top5)} of a result file."""
    record = json.loads((output / f"{name}.json").read_text())
    return {(r["k"], r["temperature"]): (r["top1"], r["top5"]) for r in record["results"]}


def write_features(folder, train, train_labels, test, test_labels):
    """A folder as DINO's script saves it."""
    folder.mkdir(parents=True)
    for name, x in zip(
        ("trainfeat", "trainlabels", "testfeat", "testlabels"), (train, train_labels, test, test_labels), strict=True
    ):
        torch.save(torch.as_tensor(x), folder / f"{name}.pth")
    return folder


def clean_images(folder):
    """The images of a folder as the script renders them by default."""
    return labelled_dataset(folder, eval_transform("ori", 32), renderer=choose_renderer("auto"), check=False)


def normalized_images(dataset):
    """All images of a dataset as a network takes them, float [M, 3, S, S]."""
    return normalize(torch.stack([image for image, _ in dataset]), IMAGENET_MEAN, IMAGENET_STD)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images of three classes (27 and 16), a CLeVER checkpoint, and the features that one run saved."""
    root = tmp_path_factory.mktemp("knn")
    data = write_labelled_images(root / "data", train=9, val=5)
    torch.manual_seed(0)
    backbone = build_backbone("vit_micro", patch_size=8, img_size=32).eval()
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    arguments = {"arch": "vit_micro", "patch_size": 8, "net": "CLeVER", "hp1": 0.8, "global_crops_size": 32, "aug": "aug1_2"}
    arguments["seed"] = 3
    torch.save({"teacher": state, "args": arguments, "epoch": 7}, root / "clever.pth")
    torch.save({"teacher": state, "args": arguments | {"net": "dino"}, "epoch": 7}, root / "dino.pth")
    broken = state | {"backbone.norm.weight": torch.full((128,), 3e38)}  # finite, but the features overflow
    torch.save({"teacher": broken, "args": arguments, "epoch": 7}, root / "overflow.pth")
    flags = ("--pretrained_weights", root / "clever.pth", "--data_path", data, "--nb_knn", 1, 5, 20, "--temperature", 0.07, 1)
    outcome = knn(*flags, "--output_dir", root / "all", "--dump_features", root / "features", "--batch_size_per_gpu", 4)
    assert outcome.status == 0, outcome
    return SimpleNamespace(root=root, data=data, backbone=backbone, flags=flags, outcome=outcome, features=root / "features")


# --- votes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part, columns", [("ALL", slice(None)), ("main_part", slice(0, 8)), ("else_part", slice(8, None))])
def test_accuracies_equal_scikit_learns(part, columns, tmp_path):
    neighbors = pytest.importorskip("sklearn.neighbors")
    rng = np.random.default_rng(0)
    labels, test_labels = rng.integers(0, 8, 120), rng.integers(0, 8, 53)
    centers = 0.5 * rng.normal(size=(8, 10))
    train, test = centers[labels] + rng.normal(size=(120, 10)), centers[test_labels] + rng.normal(size=(53, 10))
    folder = write_features(tmp_path / "features", train, labels, test, test_labels)
    kind = ("--net", "CLeVER", "--hp1", "0.8", "--else_part", part)
    outcome = knn("--load_features", folder, "--output_dir", tmp_path, *kind, "--nb_knn", 30, 1, 7, "--temperature", 0.07, 0.5)
    assert outcome.status == 0, outcome
    name = {"ALL": "knn", "main_part": "knn_hp0.8", "else_part": "knn_hp0.8_else"}[part]
    found = results(tmp_path, name)
    assert list(found) == [(k, t) for k in (1, 7, 30) for t in (0.07, 0.5)]
    for (k, temperature), (top1, top5) in found.items():
        reference = neighbors.KNeighborsClassifier(
            k, weights=lambda d, t=temperature: np.exp((1 - d) / t), metric="cosine", algorithm="brute"
        ).fit(train[:, columns], labels)
        scores = reference.predict_proba(test[:, columns])
        own = scores[np.arange(53), test_labels]
        assert top1 == pytest.approx(100 * (scores.argmax(1) == test_labels).mean())
        assert top5 == pytest.approx(100 * ((own > 0) & ((scores > own[:, None]).sum(1) < 5)).mean())
    assert 30 < found[30, 0.07][0] < 95 or part == "else_part"  # neither chance nor all


# --- features ----------------------------------------------------------------------------------------------------------


def test_features_are_the_networks_of_clean_images(world):
    """In the order of the folder, L2-normalised, the last block's [CLS]."""
    for split, name in (("train", "train"), ("val", "test")):
        dataset = clean_images(world.data / split)
        with torch.no_grad():
            expected = F.normalize(world.backbone(normalized_images(dataset)), dim=-1)
        saved = torch.load(world.features / f"{name}feat.pth", weights_only=True)
        assert torch.allclose(saved, expected, atol=1e-6)
        labels = torch.load(world.features / f"{name}labels.pth", weights_only=True)
        assert labels.tolist() == [label for _, label in dataset.samples]


def test_what_a_run_prints_and_writes(world):
    out = world.outcome.stdout
    assert "ALL: 27 training images, 16 test images, 3 classes" in out
    assert out.index("training features 27/27") < out.index("test features 16/16") < out.index("nearest neighbours 16/16")
    record = json.loads((world.root / "all" / "knn.json").read_text())
    expected = {"kind": "knn", "net": "CLeVER", "arch": "vit_micro", "part": "ALL", "hp1": 0.8, "pretrained_epochs": 7,
                "aug": "aug1_2", "pretraining_seed": 3, "num_train_images": 27, "num_test_images": 16,
                "num_labels": 3}  # fmt: skip
    assert record.items() >= expected.items() and record["args"]["nb_knn"] == [1, 5, 20]
    assert sorted(path.name for path in world.features.iterdir()) == sorted([*TENSORS.values(), "features.json"])


def test_saved_features_serve_every_part(world, tmp_path):
    """As the run on the images with these parts; and as if each part had been cut before anything was normalised."""
    settings, raw = ("--nb_knn", 1, 5, 20, "--temperature", 0.07, 1), []
    parts = ("--else_part", "else_part", "ALL", "main_part")
    assert knn("--load_features", world.features, "--output_dir", tmp_path / "loaded", *parts, *settings).status == 0
    assert knn(*world.flags, "--output_dir", tmp_path / "computed", *parts).status == 0
    for split in ("train", "val"):
        dataset = clean_images(world.data / split)
        with torch.no_grad():
            raw += [world.backbone(normalized_images(dataset)), torch.tensor([label for _, label in dataset.samples])]
    columns = {"knn": slice(None), "knn_hp0.8": slice(0, 102), "knn_hp0.8_else": slice(102, None)}
    for name, part in columns.items():
        folder = write_features(tmp_path / name, raw[0][:, part], raw[1], raw[2][:, part], raw[3])
        knn("--load_features", folder, "--output_dir", tmp_path / name, *settings)
        assert results(tmp_path / "loaded", name) == pytest.approx(results(tmp_path / name))
        records = [json.loads((tmp_path / kind / f"{name}.json").read_text()) for kind in ("loaded", "computed")]
        assert records[0] | {"args": None} == records[1] | {"args": None}


def test_several_perturbations_equal_separate_runs(world, tmp_path):
    flags = (*world.flags, "--else_part", "ALL", "EF", "--test_aug_type")
    assert knn(*flags, "ori", "aug1_2", "--output_dir", tmp_path / "together").status == 0
    for perturbation in ("ori", "aug1_2"):
        assert knn(*flags, perturbation, "--output_dir", tmp_path / "separate").status == 0
    names = {"knn", "knn_hp0.8_else", "knn_aug1_2", "knn_aug1_2_hp0.8_else"}
    for name in names:
        together, separate = (json.loads((tmp_path / kind / f"{name}.json").read_text()) for kind in ("together", "separate"))
        assert together["test_aug_type"] == ("aug1_2" if "aug1_2" in name else "ori")
        del together["args"]["output_dir"], separate["args"]["output_dir"]
        assert together == separate
    assert {path.stem for path in (tmp_path / "together").iterdir()} == names
    assert results(tmp_path / "together") == results(world.root / "all")
    assert results(tmp_path / "together", "knn_aug1_2") != results(world.root / "all")


def test_two_processes_agree_with_one(world, tmp_path):
    """27 and 16 images: the shares of the training images are unequal."""
    flags = (*world.flags, "--num_workers", 0, "--output_dir", tmp_path, "--dump_features", tmp_path / "features")
    log = run("eval_knn.py", *flags, output=tmp_path / "log", processes=2)
    assert log.count("classifier result") == 6 and "training features 14/14  " in log
    assert results(tmp_path) == results(world.root / "all")
    knn(*world.flags, "--output_dir", tmp_path / "one")
    records = [json.loads((folder / "knn.json").read_text())["results"] for folder in (tmp_path, tmp_path / "one")]
    assert records[0] == records[1]
    for name in TENSORS.values():
        two, one = (torch.load(folder / name, weights_only=True) for folder in (tmp_path / "features", world.features))
        assert torch.allclose(two, one, atol=1e-6), name


# --- bad input ---------------------------------------------------------------------------------------------------------

CLEVER = "--pretrained_weights {root}/clever.pth --data_path {data} "
SAVED = "--load_features {features} "
# Flags, and what the message must hold.
BAD = [
    (CLEVER + "--dump_features {root}/again --test_aug_type ori aug1", "--test_aug_type ori aug1", "clean images"),
    (CLEVER + "--nb_knn 10 0", "--nb_knn [10, 0]", "at least 1"),
    (CLEVER + "--temperature 0.07 nan", "--temperature [0.07, nan]", "0.002"),
    ("--pretrained_weights {root}/clever.pth --data_path {root}/other", "only one of them: blue"),
    ("--pretrained_weights {root}/clever.pth", "--data_path", "--load_features"),
    (SAVED + "--hp1 0.5", "--hp1 0.5", "made with hp1 0.8"),
    ("--load_features {root}/absent", "{root}/absent/trainfeat.pth", "no such file"),
]  # fmt: skip


@pytest.mark.parametrize("flags, mentioned", [(flags, mentioned) for flags, *mentioned in BAD])
def test_bad_input(world, flags, mentioned, tmp_path):
    if not (world.root / "other").exists():
        for split, names in (("train", "red blue"), ("val", "red")):
            for name in names.split():
                write_images(world.root / "other" / split / name, 1)
    output = () if "--output_dir" in flags else ("--output_dir", tmp_path / "output")
    words = [word.format(**vars(world)) for word in flags.split()]
    assert_refused(knn(*words, *output), *(text.format(**vars(world)) for text in mentioned))
    assert not list(tmp_path.iterdir())


# What is wrong with a folder of features: the file to replace, its content, what the message must hold.
FEATURES = [
    ("trainfeat", torch.ones(3, 4), "train must be finite features"),
    ("testfeat", torch.ones(2, 5), "train and test differ in width"),
    ("trainlabels", torch.tensor([0.5, 1]), "train must be finite features [M, D] and class numbers [M]"),
    ("testfeat", None, "testfeat.pth: damaged"),
]


@pytest.mark.parametrize("name, content, message", FEATURES)
def test_features_that_do_not_belong_together(name, content, message, tmp_path):
    folder = write_features(tmp_path / "features", torch.ones(2, 4), [0, 1], torch.ones(2, 4), [0, 1])
    assert knn("--load_features", folder, "--output_dir", tmp_path).status == 0
    if content is None:
        (folder / f"{name}.pth").write_bytes(b"PK\x03\x04cut short")
    else:
        torch.save(content, folder / f"{name}.pth")
    assert_refused(knn("--load_features", folder, "--output_dir", tmp_path), message)


def test_features_that_are_not_finite_are_an_error(world, tmp_path):
    outcome = knn("--pretrained_weights", world.root / "overflow.pth", "--data_path", world.data, "--output_dir", tmp_path)
    assert outcome.status == 1 and "not finite: training features of the network" in outcome.stderr
    assert not list(tmp_path.iterdir())
