"""eval_knn.py: votes by hand and by scikit-learn, parts, saved features, several processes, bad input."""

import errno
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.in_process import assert_refused, call, snapshot
from support.processes import run, write_images, write_labelled_images

import eval_knn
from clever.data.augmentations import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    eval_transform,
    normalize,
)
from clever.data.datasets import labelled_dataset
from clever.data.rendering import choose_renderer
from clever.evaluation.feature_files import TENSORS, FeatureSet, save_features
from clever.evaluation.features import select_part
from clever.evaluation.hits import unpack_hits
from clever.evaluation.knn import MIN_TEMPERATURE, knn_predict
from clever.evaluation.names import PARTS
from clever.models.backbones import build_backbone
from clever.progress import with_progress


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


def at_angles(*degrees):
    angle = torch.tensor(degrees).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=1)


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
    torch.save({"teacher": state, "args": arguments | {"hp1": 1.0}, "epoch": 7}, root / "whole.pth")
    broken = state | {"backbone.norm.weight": torch.full((128,), 3e38)}  # finite, but the features overflow
    torch.save({"teacher": broken, "args": arguments, "epoch": 7}, root / "overflow.pth")
    flags = ("--pretrained_weights", root / "clever.pth", "--data_path", data, "--nb_knn", 1, 5, 20, "--temperature", 0.07, 1)
    outcome = knn(*flags, "--output_dir", root / "all", "--dump_features", root / "features", "--batch_size_per_gpu", 4)
    assert outcome.status == 0, outcome
    return SimpleNamespace(root=root, data=data, backbone=backbone, flags=flags, outcome=outcome, features=root / "features")


# --- votes -------------------------------------------------------------------------------------------------------------


def test_vote_of_three_neighbours_by_hand(tmp_path):
    """A query at 0 degrees; 10 (class 2), -20 and 30 (class 1); the three of class 0 are too far to vote.

    At 0.07 one near neighbour outweighs two further ones (1.27e6 against 6.8e5 + 2.4e5); at 0.7 it does not (4.1 < 3.8 + 3.4).
    """
    train, labels = at_angles(10.0, -20, 30, 60, 70, -80), [2, 1, 1, 0, 0, 0]
    folder = write_features(tmp_path / "features", train, labels, at_angles(0.0), [2])
    outcome = knn("--load_features", folder, "--output_dir", tmp_path, "--nb_knn", 3, "--temperature", 0.07, 0.7)
    assert outcome.status == 0, outcome
    assert results(tmp_path) == {(3, 0.07): (100, 100), (3, 0.7): (0, 100)}
    assert "3-NN classifier result: Top1: 100.00, Top5: 100.00 (temperature 0.07)" in outcome.stdout
    assert "3-NN classifier result: Top1: 0.00, Top5: 100.00 (temperature 0.7)" in outcome.stdout


def test_a_class_without_a_vote_is_never_a_hit(tmp_path):
    folder = write_features(
        tmp_path / "features", at_angles(0.0, 5, 40, 50), [0, 1, 2, 3], at_angles(0.0, 0, 0, 0), [0, 1, 2, 3]
    )
    knn("--load_features", folder, "--output_dir", tmp_path, "--nb_knn", 1, 3, 4)
    assert results(tmp_path) == {(1, 0.07): (25, 25), (3, 0.07): (25, 75), (4, 0.07): (25, 100)}


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


def test_the_lowest_temperature_overflows_nothing(tmp_path):
    folder = write_features(tmp_path / "features", at_angles(0.0, 4, 5), [0, 1, 1], at_angles(0.0, 180), [0, 0])
    knn("--load_features", folder, "--output_dir", tmp_path, "--nb_knn", 3, "--temperature", MIN_TEMPERATURE)
    assert results(tmp_path) == {(3, MIN_TEMPERATURE): (50, 100)}


def test_shuffled_labels_are_at_chance(tmp_path):
    torch.manual_seed(0)
    labels = torch.arange(400) % 10
    train, test = (torch.eye(10)[labels] + 0.05 * torch.randn(400, 10) for _ in range(2))
    folders = {"right": labels, "shuffled": labels[torch.randperm(400)]}
    for name, given in folders.items():
        folder = write_features(tmp_path / name / "features", train, given, test, labels)
        knn("--load_features", folder, "--output_dir", tmp_path / name, "--nb_knn", 10)
    assert results(tmp_path / "right")[10, 0.07][0] == 100
    assert results(tmp_path / "shuffled")[10, 0.07][0] < 25


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
    assert "CLeVER vit_micro, 128 dimensions, images of 32 pixels" in out
    assert "ALL: 27 training images, 16 test images, 3 classes" in out
    assert out.index("training features 27/27") < out.index("test features 16/16") < out.index("nearest neighbours 16/16")
    assert "img/s  left 00:00" in out
    record = json.loads((world.root / "all" / "knn.json").read_text())
    expected = {"kind": "knn", "net": "CLeVER", "arch": "vit_micro", "part": "ALL", "hp1": 0.8, "pretrained_epochs": 7,
                "aug": "aug1_2", "pretraining_seed": 3, "num_train_images": 27, "num_test_images": 16,
                "num_labels": 3}  # fmt: skip
    assert record.items() >= expected.items() and record["args"]["nb_knn"] == [1, 5, 20]
    assert sorted(path.name for path in world.features.iterdir()) == sorted([*TENSORS.values(), "features.json"])


@pytest.mark.parametrize("part, name", [("ALL", "knn"), ("main_part", "knn_hp0.8"), ("else_part", "knn_hp0.8_else")])
def test_saved_features_serve_every_part(world, part, name, tmp_path):
    """As if the part had been cut before anything was normalised; and as the run on images with this part."""
    loaded = knn("--load_features", world.features, "--output_dir", tmp_path / "loaded", "--else_part", part,
                 "--nb_knn", 1, 5, 20, "--temperature", 0.07, 1)  # fmt: skip
    computed = knn(*world.flags, "--output_dir", tmp_path / "computed", "--else_part", part)
    assert (loaded.status, computed.status) == (0, 0), (loaded, computed)
    found = results(tmp_path / "loaded", name)
    assert found == results(tmp_path / "computed", name)

    raw, labels = {}, {}
    for split in ("train", "val"):
        dataset = clean_images(world.data / split)
        with torch.no_grad():
            raw[split] = select_part(world.backbone(normalized_images(dataset)), 128, PARTS[part], 0.8)
        labels[split] = torch.tensor([label for _, label in dataset.samples])
    for (k, temperature), (top1, _) in found.items():
        scores = knn_predict(raw["train"], labels["train"], raw["val"], k, 3, temperature)
        assert top1 == pytest.approx(100 * (scores.argmax(1) == labels["val"]).float().mean().item())
    records = [json.loads((tmp_path / kind / f"{name}.json").read_text()) for kind in ("loaded", "computed")]
    for field in records[0].keys() - {"args"}:
        assert records[0][field] == records[1][field], field


def test_several_parts_equal_separate_runs(world, tmp_path):
    parts = ("else_part", "ALL", "main_part")
    together = knn("--load_features", world.features, "--output_dir", tmp_path / "together", "--else_part", *parts)
    for part in parts:
        knn("--load_features", world.features, "--output_dir", tmp_path / "separate", "--else_part", part)
    records = [
        {path.name: json.loads(path.read_text()) for path in (tmp_path / kind).iterdir()} for kind in ("together", "separate")
    ]
    for record in [*records[0].values(), *records[1].values()]:
        del record["args"]["output_dir"]
    assert records[0] == records[1] and len(records[0]) == 3
    lines = [line.split(":")[0] for line in together.stdout.splitlines() if "27 training images, 16" in line]
    assert lines == list(parts)


def test_several_perturbations_equal_separate_runs(world, tmp_path):
    flags = (*world.flags, "--else_part", "ALL", "EF", "--per_image", "true", "--test_aug_type")
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


def test_other_trial_names_end_the_files_name(world, tmp_path):
    for trial in ("aug1x", "basics", "hpx", "elsewhere", 100 * "x"):
        assert knn("--load_features", world.features, "--output_dir", tmp_path, "--trial_name", trial).status == 0
        assert (tmp_path / f"knn_{trial}.json").exists()


def test_hits_of_every_image_by_hand(tmp_path):
    """Nine queries at the angle of one of two training images; the true class is the other one's for images 1 and 6."""
    labels = [0, 1, 0, 1, 0, 1, 0, 1, 0]
    angles = [90.0 * label for label in labels]
    angles[1], angles[6] = 0.0, 90.0
    folder = write_features(tmp_path / "features", at_angles(0.0, 90), [0, 1], at_angles(*angles), labels)
    knn("--load_features", folder, "--output_dir", tmp_path, "--nb_knn", 1, 2, "--per_image", "true")
    for result in json.loads((tmp_path / "knn.json").read_text())["results"]:
        assert np.flatnonzero(~unpack_hits(result["correct"], 9)).tolist() == [1, 6]
        assert result["top1"] == pytest.approx(700 / 9)


def test_new_features_replace_old_ones(world, tmp_path):
    folder = write_features(tmp_path / "features", torch.ones(2, 3), [0, 1], torch.ones(2, 3), [0, 1])
    assert knn(*world.flags, "--output_dir", tmp_path, "--dump_features", folder).status == 0
    assert snapshot(folder).keys() == snapshot(world.features).keys()
    for name in TENSORS.values():
        new, first = (torch.load(path / name, weights_only=True) for path in (folder, world.features))
        assert torch.allclose(new, first, atol=1e-6)


def test_old_features_stay_until_the_new_ones_are_written(tmp_path, monkeypatch):
    folder = tmp_path / "features"
    features = FeatureSet(torch.ones(2, 4), torch.tensor([0, 1]), torch.ones(2, 4), torch.tensor([0, 1]))
    save_features(features, folder)
    before = snapshot(folder)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("clever.evaluation.feature_files.save_json", full)
    with pytest.raises(OSError):
        save_features(features, folder)
    assert snapshot(folder) == before


def test_two_processes_agree_with_one(world, tmp_path):
    """27 and 16 images: the shares of the training images are unequal."""
    flags = (
        *world.flags, "--num_workers", 0, "--output_dir", tmp_path, "--dump_features", tmp_path / "features",
        "--per_image", "true",
    )  # fmt: skip
    log = run("eval_knn.py", *flags, output=tmp_path / "log", processes=2)
    assert log.count("classifier result") == 6 and "training features 14/14  " in log
    assert results(tmp_path) == results(world.root / "all")
    knn(*world.flags, "--output_dir", tmp_path / "one", "--per_image", "true")
    records = [json.loads((folder / "knn.json").read_text())["results"] for folder in (tmp_path, tmp_path / "one")]
    assert records[0] == records[1]
    for name in TENSORS.values():
        two, one = (torch.load(folder / name, weights_only=True) for folder in (tmp_path / "features", world.features))
        assert torch.allclose(two, one, atol=1e-6), name


def test_more_processes_than_test_images(tmp_path):
    folder = write_features(tmp_path / "features", at_angles(0.0, 90), [0, 1], at_angles(3.0), [0])
    run("eval_knn.py", "--load_features", folder, "--nb_knn", 1, "--output_dir", tmp_path, output=tmp_path / "log", processes=2)
    assert results(tmp_path) == {(1, 0.07): (100, 100)}


def test_more_neighbours_than_training_images(world, tmp_path):
    outcome = knn("--load_features", world.features, "--output_dir", tmp_path, "--nb_knn", 200, 5, 27, 100)
    assert outcome.status == 0
    assert "--nb_knn 100: there are only 27 training images, all of them vote" in outcome.stdout
    assert [k for k, _ in results(tmp_path)] == [5, 27]


def test_progress_of_many_batches(capsys):
    batches = [(torch.empty(3),), (torch.empty(3),), (torch.empty(1),)]
    assert list(with_progress(batches, "features", 7, seconds=0)) == batches
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[-3:]] == ["features 3/7", "features 6/7", "features 7/7"]
    assert " img/s" in lines[-1] and "left 00:00" in lines[-1]


# --- bad input ---------------------------------------------------------------------------------------------------------

CLEVER = "--pretrained_weights {root}/clever.pth --data_path {data} "
# Flags, and what the message must hold.
BAD = [
    (CLEVER + "--else_part DIR", "'DIR'", "ALL, main_part, else_part"),
    (CLEVER + "--else_part ALL IR main_part", "--else_part 'main_part'", "given twice"),
    (CLEVER + "--test_aug_type aug9", "--test_aug_type 'aug9'", "ori, basic"),
    (CLEVER + "--test_aug_type ori ori", "--test_aug_type 'ori'", "given twice"),
    (CLEVER + "--dump_features {root}/again --test_aug_type ori aug1", "--dump_features", "only with ori"),
    ("--load_features {features} --test_aug_type basic", "--load_features", "only with ori"),
    (CLEVER + "--hp1 0.5 --else_part main_part", "--hp1 0.5", "hp1 0.8"),
    (CLEVER + "--net dino", "--net dino", "net CLeVER"),
    (CLEVER + "--arch vit_tiny", "--arch vit_tiny", "arch vit_micro"),
    (CLEVER + "--nb_knn 10 0", "--nb_knn 0", "1 or more"),
    (CLEVER + "--nb_knn", "--nb_knn", "at least one argument"),
    (CLEVER + "--temperature 0", "--temperature 0.0", "0.002 or more"),
    (CLEVER + "--temperature nan", "--temperature nan", "0.002 or more"),
    (CLEVER + "--temperature 0.07 0.001", "--temperature 0.001", "0.002 or more"),
    (CLEVER + "--batch_size_per_gpu 0", "--batch_size_per_gpu 0", "greater than 0"),
    (CLEVER + "--trial_name a/b", "'a/b'", "must not contain /"),
    (CLEVER + "--trial_name aug1_2", "--trial_name 'aug1_2'", "must not begin with aug1"),
    (CLEVER + "--trial_name aug1_3_again", "'aug1_3_again'", "must not begin with aug1"),
    (CLEVER + "--trial_name basic_", "'basic_'", "must not begin with basic"),
    (CLEVER + "--trial_name hp0.8", "'hp0.8'", "must not begin with hp0.8"),
    (CLEVER + "--trial_name else_t", "'else_t'", "must not begin with else"),
    (CLEVER + "--trial_name " + 101 * "x", "--trial_name of 101 bytes", "at most 100"),
    (CLEVER + "--output_dir {root}/clever.pth", "{root}/clever.pth", "is a file"),
    (CLEVER + "--dump_features {root}/clever.pth", "{root}/clever.pth", "is a file"),
    ("--pretrained_weights {root}/dino.pth --data_path {data} --else_part main_part", "dino checkpoint has no parts"),
    ("--pretrained_weights {root}/whole.pth --data_path {data} --else_part else_part", "hp1 1.0: leaves the IR or"),
    ("--pretrained_weights {root}/absent.pth --data_path {data}", "{root}/absent.pth", "no such file"),
    ("--pretrained_weights {root}/clever.pth --data_path {root}/absent", "{root}/absent/train", "does not exist"),
    ("--pretrained_weights {root}/clever.pth --data_path {data}/train", "{data}/train/train", "does not exist"),
    ("--pretrained_weights {root}/clever.pth --data_path {root}/other", "only one of them: blue"),
    ("--pretrained_weights {root}/clever.pth", "--data_path", "must be given"),
    ("--data_path {data}", "--pretrained_weights", "must be given"),
    ("--load_features {features} --pretrained_weights {root}/clever.pth", "--pretrained_weights", "give only one of the two"),
    ("--load_features {features} --data_path {data}", "--data_path", "give only one of the two"),
    ("--load_features {features} --dump_features {root}/again", "--dump_features", "give only one of the two"),
    ("--load_features {features} --hp1 0.5", "--hp1 0.5", "the features were made with hp1 0.8"),
    ("--load_features {features} --net dino", "--net dino", "the features were made with net CLeVER"),
    ("--load_features {root}/absent", "{root}/absent", "lacks trainfeat.pth"),
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
    ("trainfeat", torch.ones(3, 4), "do not belong together"),
    ("testfeat", torch.ones(2, 5), "features [2, 5] and labels [2] of test do not belong together"),
    ("testlabels", torch.tensor([0, 9]), "labels of test must be whole numbers in 0..1"),
    ("trainlabels", torch.tensor([0.5, 1]), "labels of train must be whole"),
    ("trainfeat", torch.full((2, 4), float("nan")), "features of train are not finite"),
    ("trainfeat", torch.empty(0, 4), "trainfeat.pth: contains no tensor"),
    ("trainfeat", torch.tensor(1.0), "trainfeat.pth: contains no tensor"),
    ("testfeat", torch.tensor(1.0), "testfeat.pth: contains no tensor"),
    ("trainlabels", torch.tensor(1), "trainlabels.pth: contains no tensor"),
    ("testfeat", {"x": torch.ones(2, 4)}, "testfeat.pth: contains no tensor"),
    ("testfeat", np.ones((2, 4)), "testfeat.pth: holds numpy"),
    ("testfeat", None, "testfeat.pth: damaged"),
    ("trainfeat", torch.ones(2, 4).to_sparse(), "must hold an ordinary tensor of numbers, not sparse_coo"),
    ("trainfeat", torch.ones(2, 4, device="meta"), "must hold an ordinary tensor"),
    ("trainfeat", torch.ones(2, 4, dtype=torch.complex64), "must hold an ordinary tensor"),
    ("trainlabels", torch.tensor([0, 10**12]), "there may be 1000000 classes at most"),
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


def test_features_of_clever_need_their_cut(tmp_path):
    folder = write_features(tmp_path / "features", torch.ones(2, 4), [0, 1], torch.ones(2, 4), [0, 1])
    for flags, message in (
        (("--net", "CLeVER"), "--hp1: the features do not say"),
        (("--net", "CLeVER", "--hp1", 1.5), "--hp1 1.5: must lie in (0, 1]"),
        (("--else_part", "main_part"), "a dino checkpoint has no parts"),
    ):
        assert_refused(knn("--load_features", folder, "--output_dir", tmp_path, *flags), message)
    (folder / "features.json").write_text("{")
    assert_refused(knn("--load_features", folder, "--output_dir", tmp_path), "features.json: damaged")
    for content in ('{"hp1": "0.8"}', '{"hp1": [1]}', '{"net": 5}', '{"hp1": NaN}'):
        (folder / "features.json").write_text(content)
        assert_refused(knn("--load_features", folder, "--output_dir", tmp_path), "is not one of ours")
    (folder / "features.json").write_text('{"classes": ["a"]}')
    assert_refused(knn("--load_features", folder, "--output_dir", tmp_path), "labels of train must be whole numbers in 0..0")
    for content in ("5", '{"classes": 5}', '{"classes": null}'):
        (folder / "features.json").write_text(content)
        assert_refused(knn("--load_features", folder, "--output_dir", tmp_path), "features.json: must contain a JSON object")


def test_features_that_are_not_finite_are_an_error(world, tmp_path):
    outcome = knn("--pretrained_weights", world.root / "overflow.pth", "--data_path", world.data, "--output_dir", tmp_path)
    assert outcome.status == 1 and "not finite: training features of the network in" in outcome.stderr
    assert not list(tmp_path.iterdir())


def test_a_broken_image_is_named_or_left_out(world, tmp_path):
    data = write_labelled_images(tmp_path / "data", train=2, val=1)
    (data / "train" / "red" / "00.png").write_bytes(b"no image")
    flags = ("--pretrained_weights", world.root / "clever.pth", "--data_path", data, "--output_dir", tmp_path / "output")
    assert_refused(knn(*flags), "train/red/00.png")
    outcome = knn(*flags, "--skip_bad_images", "true")
    assert outcome.status == 0 and "ALL: 5 training images, 4 test images" in outcome.stdout
