"""A small run of every kind, for the tests of full disks and kills, and comparison of what such runs leave."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from support.in_process import pretrain
from support.processes import TINY_NETWORK, write_images, write_labelled_images
from support.synthetic_davis import write_list, write_video
from support.synthetic_saliency import write_saliency

KINDS = ("pretraining", "probe", "fine-tuning", "k-NN", "equivariance", "DAVIS", "saliency", "embeddings")
MEASURED = {"seconds", "memory_gib", "train_images_per_second", "seconds_probe", "date", "time", "features_seconds"}


def make_runs(root: Path) -> dict[str, tuple[str, list[str]]]:
    """Writes data and networks below `root`. Per kind the script and its arguments, in which {out} is the output folder."""
    data = write_labelled_images(root / "data", train=4, val=4)
    flat = write_images(root / "flat", 22)
    for name, arch in (("vit", ()), ("resnet", ("--arch", "resnet8", "--global_crops_size", 16))):
        assert pretrain(data / "train", root / name, "--net", "CLeVER", "--epochs", 0, *arch).status == 0
    for name in ("first", "second", "third"):
        write_video(root / "DAVIS", name, frames=4, height=64, width=96, side=24, step=(0, 2))
    write_list(root / "DAVIS", "first", "second", "third")
    write_saliency(root / "saliency")
    vit, resnet = (["--pretrained_weights", root / name / "checkpoint.pth"] for name in ("vit", "resnet"))
    labelled = ["--data_path", data, "--output_dir", "{out}", "--num_workers", 0]
    runs = {
        "pretraining": ("main_dino", [*TINY_NETWORK, "--net", "CLeVER", "--data_path", flat, "--output_dir", "{out}",
                                      "--epochs", 6, "--batch_size_per_gpu", 4, "--num_workers", 0, "--saveckp_freq", 2]),
        "probe": ("eval_linear", [*vit, *labelled, "--epochs", 8, "--else_part", "ALL", "main_part",
                                  "--batch_size_per_gpu", 4]),
        "fine-tuning": ("eval_linear_ds", [*resnet, *labelled, "--epochs", 6, "--ds_mode", "ds_ft", "--backbone_lr", 0.1,
                                           "--batch_size_per_gpu", 4]),
        "k-NN": ("eval_knn", [*vit, *labelled, "--nb_knn", 3, 5, "--dump_features", "{out}/features"]),
        "equivariance": ("eval_equivariance", [*vit, *labelled, "--transforms", "rotation", "blur", "--views_per_image", 4]),
        "DAVIS": ("eval_video_segmentation", [*vit, "--data_path", root / "DAVIS", "--output_dir", "{out}",
                                              "--short_side", 64]),
        "saliency": ("eval_saliency", [*vit, "--images", root / "saliency/img", "--ground_truth", root / "saliency/gt",
                                       "--output_dir", "{out}", "--num_workers", 0]),
        "embeddings": ("embed", [*vit, "--data_path", data / "train", "--out", "{out}/features.npz", "--overwrite",
                                 "--num_workers", 0]),
    }  # fmt: skip
    return {kind: (script, [str(flag) for flag in flags]) for kind, (script, flags) in runs.items()}


def words_of(flags: list[str], out: Path) -> list[str]:
    return [flag.replace("{out}", str(out)) for flag in flags]


# --- what a run leaves -------------------------------------------------------------------------------------------------


def content(path: Path) -> Any:
    """What a file holds, without what is measured; raises an error if the file is not whole."""
    if path.suffix in (".pth", ".tar", ".pt"):
        return plain(torch.load(path, map_location="cpu", weights_only=True))
    if path.suffix == ".json":
        return plain(json.loads(path.read_text()))
    if path.name == "log.txt":
        return [plain(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".npz":
        assert zipfile.ZipFile(path).testzip() is None
        return {name: array.tobytes() for name, array in np.load(path).items()}
    if path.suffix == ".npy":
        return None if path.name == "checked_images.npy" else np.load(path).tobytes()  # the former knows the files' times
    if path.suffix in (".png", ".jpg"):
        return np.asarray(Image.open(path)).tobytes()
    return path.read_text()


def plain(value: Any) -> Any:
    """Tensors as their bytes; what is measured, and where the run was, left out."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in MEASURED | {"output_dir", "args", "out"}}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    return value


def contents(folder: Path) -> dict[str, Any]:
    """Everything below a folder by name. Locks, which a killed run leaves, do not count."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): content(path) for path in files}


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Contents of two folders are equal; an error names the files that differ."""
    assert sorted(found) == sorted(expected), sorted(found.keys() ^ expected.keys())
    differing = [name for name in found if found[name] != expected[name]]
    assert not differing, differing


def assert_whole(folder: Path) -> None:
    """Every file that has its final name is whole. A log may end within a line: it is cut when the run goes on."""
    for path in folder.rglob("*") if folder.exists() else ():
        if not path.is_file() or path.suffix in (".lock", ".tmp") or ".unfinished" in str(path) or path.name == "log.txt":
            continue
        content(path)
