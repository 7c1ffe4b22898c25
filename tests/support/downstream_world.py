"""A small world for tests of eval_linear_ds.py: textures of three classes, untrained networks, and calls with them."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

from support.in_process import Outcome, call, pretrain
from support.processes import write_labelled_images

import eval_linear_ds as ds


def make_world(root: Path) -> SimpleNamespace:
    """Labelled textures (12 for training, 13 for testing), untrained networks, and a list of four images."""
    data = write_labelled_images(root / "data", train=4, val=4)
    assert pretrain(data / "train", root / "vit", "--net", "CLeVER", "--epochs", 0).status == 0
    resnet = ("--arch", "resnet8", "--global_crops_size", 16, "--epochs", 0)
    assert pretrain(data / "train", root / "resnet", "--net", "CLeVER", *resnet).status == 0
    assert pretrain(data / "train", root / "dino", "--net", "dino", *resnet).status == 0
    (root / "list.txt").write_text("cyan/00.png\ncyan/02.png\ngrey/03.png\nred/01.png\n")
    return SimpleNamespace(
        root=root, data=data, listed=root / "list.txt", vit=root / "vit/checkpoint.pth", resnet=root / "resnet/checkpoint.pth",
        dino=root / "dino/checkpoint.pth",
    )  # fmt: skip


def flags_of(world: SimpleNamespace, weights: Path, output: Path, *more: object) -> tuple[object, ...]:
    """Arguments of eval_linear_ds.py for two epochs on the textures, unless `more` says otherwise."""
    common = ("--data_path", world.data, "--output_dir", output, "--pretrained_weights", weights)
    return *common, "--epochs", 2, "--batch_size_per_gpu", 4, "--lr", 0.5, "--num_workers", 0, *more


def downstream(world: SimpleNamespace, weights: Path, output: Path, *more: object) -> Outcome:
    return call(ds.main, *flags_of(world, weights, output, *more))


def parse(*words: object) -> argparse.Namespace:
    return ds.resolve_args(ds.get_args_parser().parse_args(["--pretrained_weights", "x", "--data_path", "x", *map(str, words)]))


def only(folder: Path, pattern: str) -> Path:
    [path] = folder.glob(pattern)
    return path


def result_of(folder: Path, pattern: str = "ds_*.json") -> dict:
    return json.loads(only(folder, pattern).read_text())
