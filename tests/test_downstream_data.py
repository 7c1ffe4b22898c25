"""Data of downstream classification: lists of images, torchvision's sets, bad input, and the ten jobs of the launch script."""

import argparse
import json
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.downstream_world import downstream, make_world, parse, result_of
from support.in_process import assert_refused, times
from support.processes import ROOT, write_images
from torchvision import datasets as torchvision_datasets

import eval_linear_ds as ds
import utils
from checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def loaders(monkeypatch):
    """The loaders of the epochs that are trained."""
    seen, real = [], ds.train_one_epoch
    monkeypatch.setattr(ds, "train_one_epoch", lambda *arguments: seen.append(arguments[3]) or real(*arguments))
    return seen


# --- partial labels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["semi_1", "semi_10"])
def test_semi_uses_exactly_the_listed_images(world, loaders, tmp_path, mode):
    """At the default place and by its flag; the classes keep their numbers."""
    data = shutil.copytree(world.data, tmp_path / "data")
    shutil.copy(world.listed, data / f"data_{mode.removeprefix('semi_')}percent.txt")
    for folder, more in (("default", ()), ("flag", ("--semi_list", world.listed))):
        outcome = downstream(world, world.vit, tmp_path / folder, "--ds_mode", mode, "--data_path", data, *more)
        assert outcome.status == 0, outcome
        dataset = loaders[-1].dataset
        expected = [("cyan/00.png", 0), ("cyan/02.png", 0), ("grey/03.png", 1), ("red/01.png", 2)]
        assert [(Path(path).relative_to(data / "train").as_posix(), label) for path, label in dataset.samples] == expected
        seen = torch.cat([labels for _, labels in loaders[-1]])
        assert sorted(seen.tolist()) == [0, 0, 1, 2]
        result = result_of(tmp_path / folder)
        assert (result["num_train_images"], result["num_test_images"], result["num_labels"]) == (4, 13, 3)


def test_names_of_imagenet_tell_the_class(tmp_path):
    for number, wnid in enumerate(("n01440764", "n01443537")):
        folder = tmp_path / "train" / wnid
        write_images(folder, 3, seed=number)
        for i, path in enumerate(sorted(folder.glob("*.png"))):
            path.rename(folder / f"{wnid}_{i}.JPEG")
    (tmp_path / "list.txt").write_text("n01443537_2.JPEG\n\nn01440764_0.JPEG\nn01443537_0.JPEG\n")
    args = parse("--ds_mode", "semi_1", "--data_path", tmp_path, "--semi_list", tmp_path / "list.txt")
    classes, samples = ds.find_images(args, "train")
    assert classes == ["n01440764", "n01443537"]
    assert [(Path(path).name, label) for path, label in samples] == [
        ("n01443537_2.JPEG", 1), ("n01440764_0.JPEG", 0), ("n01443537_0.JPEG", 1),
    ]  # fmt: skip
    assert all(Path(path).is_file() for path, _ in samples)


# --- torchvision's data sets -------------------------------------------------------------------------------------------


def save_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Look-alikes with an image per class and split (Pets: two for training)."""
    root = tmp_path_factory.mktemp("sets")
    food, meta = root / "food-101", {"train": {}, "test": {}}
    for label in range(101):
        for split, number in (("train", 1), ("test", 2)):
            meta[split][f"dish_{label:03}"] = [f"dish_{label:03}/{number}"]
            save_image(food / "images" / f"dish_{label:03}" / f"{number}.jpg")
    (food / "meta").mkdir()
    for split, images in meta.items():
        (food / "meta" / f"{split}.json").write_text(json.dumps(images))
    pets, lines = root / "oxford-iiit-pet", {"trainval": [], "test": []}
    for label in range(37):
        for split, numbers in (("trainval", (1, 2)), ("test", (3,))):
            for number in numbers:
                lines[split].append(f"Pet_{label}_{number} {label + 1} 1 1\n")
                save_image(pets / "images" / f"Pet_{label}_{number}.jpg")
    (pets / "annotations").mkdir()
    for split, rows in lines.items():
        (pets / "annotations" / f"{split}.txt").write_text("".join(rows))
    return root


@pytest.fixture
def flowers(tmp_path, monkeypatch):
    """Image i + 102 * split is of class i, counted from 1; torchvision would refuse these files by their MD5."""
    from scipy.io import savemat

    folder = tmp_path / "flowers-102"
    for number in range(1, 307):
        save_image(folder / "jpg" / f"image_{number:05}.jpg")
    numbers = np.arange(1, 307)
    savemat(folder / "imagelabels.mat", {"labels": (numbers - 1) % 102 + 1})
    savemat(folder / "setid.mat", dict(zip(("trnid", "valid", "tstid"), numbers.reshape(3, 102), strict=True)))
    monkeypatch.setattr(torchvision_datasets.Flowers102, "_check_integrity", lambda self: True)
    return tmp_path


def found(root, name, split, *more):
    classes, samples = ds.find_images(parse("--dataset_type", name, "--data_path", root, *more), split)
    assert len(classes) == ds.CLASSES[name] and all(Path(path).is_file() for path, _ in samples)
    return [(Path(path).stem, label) for path, label in samples]


def test_splits_of_food_and_pets(sets):
    assert found(sets, "Food101", "train") == [("1", label) for label in range(101)]
    assert found(sets, "Food101", "test") == [("2", label) for label in range(101)]
    assert found(sets, "OxfordIIITPet", "train") == [(f"Pet_{i}_{number}", i) for i in range(37) for number in (1, 2)]
    assert found(sets, "OxfordIIITPet", "test") == [(f"Pet_{i}_3", i) for i in range(37)]


def test_splits_of_flowers(flowers):
    image = [[(f"image_{1 + i + 102 * split:05}", i) for i in range(102)] for split in range(3)]
    assert found(flowers, "Flowers102", "train") == image[0]
    assert found(flowers, "Flowers102", "train", "--train_on_val", "true") == image[0] + image[1]
    assert found(flowers, "Flowers102", "test", "--train_on_val", "true") == image[2]


def test_a_run_on_pets(world, sets, tmp_path):
    outcome = downstream(world, world.resnet, tmp_path, "--dataset_type", "OxfordIIITPet", "--data_path", sets, "--epochs", 1)
    assert outcome.status == 0, outcome
    result = result_of(tmp_path)
    counts = [result[name] for name in ("num_labels", "num_train_images", "num_test_images", "dataset")]
    assert counts == [37, 74, 37, "OxfordIIITPet"] and result["top5"] >= result["accuracy"]


def test_the_network_is_used_only_when_asked(monkeypatch, tmp_path):
    asked = []

    def food(root, split, download):
        asked.append(download)
        raise RuntimeError("nothing came")

    monkeypatch.setattr(torchvision_datasets, "Food101", food)
    (tmp_path / "food-101").mkdir()
    for flags in ((), ("--download",)):
        with pytest.raises(utils.InputError, match="Food101.*nothing came"):
            ds.find_images(parse("--dataset_type", "Food101", "--data_path", tmp_path, *flags), "train")
    assert asked == [False, True]


# --- bad input ---------------------------------------------------------------------------------------------------------

BAD = [
    ("--ds_mode semi_5", "'semi_5'", "linear, ds_ft, semi_1, semi_10"),
    ("--dataset_type Cars", "'Cars'", "Imagenet, IN100, CUB200, Flowers102, Food101, OxfordIIITPet"),
    ("--dataset_type IN100", "--dataset_type IN100", "100 classes", "holds 3"),
    ("--dataset_type CUB200", "--dataset_type CUB200", "200 classes", "holds 3"),
    ("--num_labels 4", "--num_labels 4", "holds 3"),
    ("--else_part DIR", "'DIR'", "ALL, main_part, else_part"),
    ("--test_aug_type aug9", "'aug9'"),
    ("--data_path {root}/absent", "{root}/absent/val", "does not exist"),
    ("--data_path {raw}", "{raw}", "python -m scripts.data.make_cub200"),
    ("--data_path {hole}", "{hole}/train/void", "has no images"),
    ("--data_path {renamed}", "same class folders", "blue"),
    ("--dataset_type Food101", "Food101", "{data}/food-101", "--download"),
    ("--dataset_type Flowers102", "Flowers102", "{data}/flowers-102", "--download"),
    ("--dataset_type OxfordIIITPet --data_path {few}", "OxfordIIITPet", "split test", "1 classes, expected 37"),
    ("--dataset_type Food101 --data_path {few}", "Food101", "cannot be read", "test.json"),
    ("--dataset_type Flowers102 --data_path {few}", "Flowers102", "not found or corrupted"),
    ("--download", "--download", "Flowers102, Food101, OxfordIIITPet"),
    ("--train_on_val true", "--train_on_val true", "Flowers102"),
    ("--train_on_val true --dataset_type OxfordIIITPet", "--train_on_val true", "Flowers102"),
    ("--ds_mode semi_1", "{data}/data_1percent.txt", "no such file", "python -m scripts.data.make_semi_lists", "--semi_list"),
    ("--ds_mode semi_1 --semi_list {root}/absent.txt", "{root}/absent.txt", "no such file"),
    ("--ds_mode semi_1 --dataset_type Food101", "semi_1", "Food101"),
    ("--semi_list {listed}", "--semi_list {listed}", "semi_1 or semi_10", "linear"),
    ("--backbone_lr 0.1", "--backbone_lr 0.1", "must be 0", "linear"),
    ("--weight_decay 0.1", "--weight_decay 0.1", "must be 0", "linear"),
    ("--ds_mode ds_ft --backbone_lr -1", "--backbone_lr -1", "0 or greater"),
    ("--ds_mode ds_ft --weight_decay nan", "--weight_decay nan", "0 or greater"),
    ("--lr 0", "--lr 0", "greater than 0"),
    ("--trial_name a/b", "'a/b'"),
    ("--avgpool_patchtokens true", "--avgpool_patchtokens true", "ViT"),
    ("--pretrained_weights {root}/absent.pth", "{root}/absent.pth", "no such file"),
    ("--pretrained_weights {dino} --else_part main_part", "main_part", "dino", "only ALL"),
    ("--hp1 0.5", "--hp1 0.5", "0.8"),
    ("--pretrained_weights {bare} --arch resnet8 --net CLeVER --hp1 1 --else_part else_part", "hp1 1", "EF", "empty"),
    ("--pretrained_weights {bare} --arch resnet8 --net CLeVER --hp1 0.001 --else_part main_part", "hp1 0.001", "IR", "empty"),
    ("--evaluate", "ds_linear_data_linear_sgd_lr0.5_lrbk0_ep2_bs4_li_aug1.pth.tar", "no such file"),
    ("--evaluate --final_eval_weights {resnet}", "{resnet}", "no linear classifier"),
    ("--output_dir {file}", "{file}", "is a file"),
    ("--output_dir {file}/x.pth.tar", "{file}", "is a file"),
    ("--output_dir {folder}", "{folder}", "is a folder"),
]  # fmt: skip
LISTS = [
    ("", "is empty"),
    ("cyan/00.png\nblue/00.png\nteal_1.png\n", "lists class folders that are not in", "blue, teal (2 in total)"),
    ("cyan/00.png\ngrey/99.png\nred/00.png\n", "lists images that are not in", "grey/99.png (1 in total)"),
    ("cyan/00.png\nred_7.png\n", "red/red_7.png"),
    ("cyan/00.png\nred/00.png\n", "lists no image of these class folders", "grey (1 in total)"),
    ("cyan/00.png\nred/00.png\ngrey/00.png\ncyan/00.png\n", "lists cyan/00.png twice"),
    ("cyan/../cyan/00.png\nred/00.png\ngrey/00.png\n", "cyan/../cyan/00.png"),
]


@pytest.fixture(scope="module")
def bad(world):
    root = world.root / "bad"
    hole, renamed = (shutil.copytree(world.data, root / name) for name in ("hole", "renamed"))
    (hole / "train" / "void").mkdir()
    (renamed / "val" / "red").rename(renamed / "val" / "blue")
    (root / "raw").mkdir()
    (root / "raw" / "image_class_labels.txt").touch()
    (root / "x.pth.tar").mkdir()
    (root / "file").touch()
    few = root / "few"
    for name in ("oxford-iiit-pet/annotations", "food-101/meta", "food-101/images", "flowers-102/jpg"):
        (few / name).mkdir(parents=True)
    save_image(few / "oxford-iiit-pet" / "images" / "Pet_1.jpg")
    for split in ("trainval", "test"):
        (few / "oxford-iiit-pet" / "annotations" / f"{split}.txt").write_text("Pet_1 1 1 1\n")
    weights = load_checkpoint(world.resnet)["teacher"]
    torch.save({k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}, root / "bare.pth")
    return argparse.Namespace(
        **vars(world), hole=hole, renamed=renamed, raw=root / "raw", folder=root / "x.pth.tar", file=root / "file", few=few,
        bare=root / "bare.pth",
    )  # fmt: skip


@pytest.mark.parametrize("flags, mentioned", [(flags, mentioned) for flags, *mentioned in BAD])
def test_refuses(bad, tmp_path, flags, mentioned):
    before = times(bad.root)
    outcome = downstream(bad, bad.resnet, tmp_path / "out", *flags.format(**vars(bad)).split())
    assert_refused(outcome, *(text.format(**vars(bad)) for text in mentioned))
    assert not (tmp_path / "out").exists() and times(bad.root) == before


@pytest.mark.parametrize("text, mentioned", [(text, mentioned) for text, *mentioned in LISTS])
def test_refuses_lists(world, tmp_path, text, mentioned):
    path = tmp_path / "list.txt"
    path.write_text(text)
    outcome = downstream(world, world.resnet, tmp_path / "out", "--ds_mode", "semi_1", "--semi_list", path)
    assert_refused(outcome, str(path), *mentioned)
    assert not (tmp_path / "out").exists()


def test_several_processes_do_not_download(world, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = downstream(world, world.resnet, tmp_path / "out", "--dataset_type", "Food101", "--download")
    assert_refused(outcome, "--download", "with one process only")
    assert not (tmp_path / "out").exists()


# --- launch script -----------------------------------------------------------------------------------------------------

pytest_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def dry_run(tmp_path, **variables):
    """[(arguments of eval_linear_ds.py, log file)] of scripts/downstream.sh."""
    command = ["bash", str(ROOT / "scripts" / "downstream.sh")]
    env = {"PATH": "/usr/bin:/bin:/usr/local/bin", "HOME": str(tmp_path), "DRY_RUN": "1", "Result_dir": "out"} | variables
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    title, *lines = result.stdout.splitlines()
    assert title.startswith("downstream: ")
    words = [shlex.split(line) for line in lines[::2]]
    start = [next(i for i, word in enumerate(line) if word.endswith("eval_linear_ds.py")) + 1 for line in words]
    return [
        (line[first:], log.removeprefix("log: ")) for line, first, log in zip(words, start, lines[1::2], strict=True)
    ]  # fmt: skip


@pytest_bash
def test_the_ten_jobs(tmp_path):
    launches = [(ds.get_args_parser().parse_args(words), log) for words, log in dry_run(tmp_path)]
    sets = ("CUB200", "Flowers102", "Food101", "OxfordIIITPet")
    jobs = [(mode, name) for mode in ("linear", "ds_ft") for name in sets] + [("semi_1", "IN100"), ("semi_10", "IN100")]
    parts = [(mode, name, part) for mode, name in jobs for part in ("ALL", "main_part")]
    assert [(args.ds_mode, args.dataset_type, args.else_part) for args, _ in launches] == parts
    trial = "CLeVER_vit_small_128_0.8_65536_1.0_reg0.001"
    folder = f"out/IN100_ep200/CLeVER_vit_small/aug1_2/128/0.8/{trial}"
    for args, log in launches:
        frozen = args.ds_mode == "linear"
        hp1, rate = "" if args.else_part == "ALL" else "_hp0.8", "0" if frozen else "0.001"
        name = f"ds_{args.ds_mode}_{args.dataset_type}_linear{hp1}_{trial}_sgd_lr0.001_lrbk{rate}_ep200_bs256_li_aug1"
        assert log == f"{folder}/ds/{name}.txt" and args.output_dir == f"{folder}/ds/{name}.pth.tar"
        numbers = (args.lr, args.backbone_lr, args.weight_decay, args.epochs, args.batch_size_per_gpu, args.n_last_blocks)
        assert numbers == (0.001, float(rate), 0 if frozen else 1e-4, 200, 256, 4)
        assert args.pretrained_weights == f"{folder}/checkpoint.pth" and (args.net, args.hp1) == ("CLeVER", 0.8)
        data = {"CUB200": "/CUB200", "IN100": "/IN100"}.get(args.dataset_type, "")
        assert args.data_path == f"{ROOT}/data{data}"
        args.output_dir = f"{folder}/ds"  # the names that eval_linear_ds.py gives are the same
        assert str(ds.checkpoint_path(args, args.hp1)) == f"{folder}/ds/{name}.pth.tar"
    assert [args.semi_list for args, _ in launches[16:]] == [f"{ROOT}/data/IN100/IN100_{p}percent.txt" for p in (1, 1, 10, 10)]


@pytest_bash
def test_jobs_of_choice(tmp_path):
    variables = {"DATASET": "digits", "DATASET_PATH": "my data", "JOBS": "semi_1:digits linear:Food101", "DATA_ROOT": "sets"}
    more = {"net_name": "dino", "DS_FLAGS": "--seed 3", "EPOCH_DS": "5", "SEMI_LISTS": "lists"}
    (semi, _), (food, _) = dry_run(tmp_path, **variables, **more)
    args = ds.get_args_parser().parse_args(semi)
    assert (args.data_path, args.dataset_type, args.semi_list) == ("my data", None, "lists/digits_1percent.txt")
    assert (args.else_part, args.seed, args.epochs) == ("ALL", 3, 5)
    assert ds.get_args_parser().parse_args(food).data_path == "sets"
