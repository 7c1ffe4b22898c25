"""Features of a training and a test set, and the folders that they are saved in, as DINO's k-NN script does.

Shapes: D width of the representation, M training images, N test images.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from clever.checkpoint import load_file, save_atomically, stored_arguments
from clever.utils import InputError, error_prefix, save_json, unfinished

# Field -> file, with DINO's names. Folders written here also contain a description, which DINO's lack.
TENSORS = {"train": "trainfeat.pth", "test": "testfeat.pth", "train_labels": "trainlabels.pth", "test_labels": "testlabels.pth"}
DESCRIPTION = "features.json"
MAX_CLASSES = 1_000_000
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NUMBERS = {*FLOATS, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool}


@dataclass
class FeatureSet:
    """Features of whole representations, L2-normalised, with labels, on every process.

    Args:
        train, test: [M, D] and [N, D].
        train_labels, test_labels: class numbers [M] and [N].
        description: net, arch, hp1, img_size, pretrained_epochs, aug, pretraining_seed, backbone (fingerprint), classes;
            where known.
    """

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor
    description: dict[str, Any] = field(default_factory=dict)


def save_features(features: FeatureSet, folder: str | Path) -> None:
    """Write one file per tensor, and the description; features that are already there are replaced when all are written."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with unfinished(folder / "features") as scratch:
        for name, file in TENSORS.items():
            save_atomically(getattr(features, name).cpu(), scratch / file)
        save_json(features.description, scratch / DESCRIPTION)
        names = (*TENSORS.values(), DESCRIPTION)
        for name in names:  # a kill between these two loops leaves too few files, never a mixture of old and new
            (folder / name).unlink(missing_ok=True)
        for name in names:
            (scratch / name).replace(folder / name)
    print(f"wrote features to {folder}")


def load_features(folder: str | Path, source: str) -> FeatureSet:
    """Read features that were saved here or by DINO. `source` begins the messages of errors.

    Raises InputError if a file is missing or damaged, or if the tensors do not belong together.
    """
    folder = Path(folder)
    tensors = {name: _read_tensor(folder / file, source) for name, file in TENSORS.items()}
    description = _read_description(folder / DESCRIPTION, source)
    num_classes = len(description.get("classes", [])) or 1 + int(tensors["train_labels"].max())
    if num_classes > MAX_CLASSES:
        raise InputError(f"{source} {folder}: labels up to {num_classes - 1}; there may be {MAX_CLASSES} classes at most")
    width = tensors["train"].shape[-1]
    for split in ("train", "test"):
        x, labels = tensors[split], tensors[f"{split}_labels"]
        if x.ndim != 2 or labels.ndim != 1 or len(x) != len(labels) or x.shape[1] != width:
            shapes = f"features {list(x.shape)} and labels {list(labels.shape)} of {split}"
            raise InputError(f"{source} {folder}: {shapes} do not belong together")
        if labels.is_floating_point() or not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise InputError(f"{source} {folder}: labels of {split} must be whole numbers in 0..{num_classes - 1}")
        if not x.is_floating_point() or not x.isfinite().all():
            raise InputError(f"{source} {folder}: features of {split} are not finite numbers")
        tensors[split], tensors[f"{split}_labels"] = F.normalize(x.float(), dim=-1), labels.long()
    return FeatureSet(**tensors, description={"classes": list(range(num_classes)), **description})


def _read_tensor(path: Path, source: str) -> torch.Tensor:
    if not path.is_file():
        raise InputError(f"{source} {path.parent}: lacks {path.name}")
    with error_prefix(source):
        tensor = load_file(path)
    if not isinstance(tensor, torch.Tensor) or tensor.ndim == 0 or tensor.numel() == 0:
        raise InputError(f"{source} {path}: contains no tensor, an empty one, or a single number")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in NUMBERS:
        kind = " ".join(str(word).removeprefix("torch.") for word in (tensor.layout, tensor.dtype, "on", tensor.device))
        raise InputError(f"{source} {path}: must hold an ordinary tensor of numbers, not {kind}")
    return tensor


def _read_description(path: Path, source: str) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text()) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} {path}: damaged ({error})") from error
    if not isinstance(description, dict) or not isinstance(description.get("classes", []), list):
        raise InputError(f"{source} {path}: must contain a JSON object, and its `classes` a list")
    valid = stored_arguments({"args": description})
    for name in ("net", "hp1"):
        if description.get(name) is not None and name not in valid:
            raise InputError(f"{source} {path}: {name} {description[name]!r} is not one of ours")
    return description
