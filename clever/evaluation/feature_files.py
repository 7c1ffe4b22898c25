"""Features of a training and a test set, and the folders that they are saved in, as DINO's k-NN script does.

Shapes: D width of the representation, M training images, N test images.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from clever.checkpoint import load_file, save_atomically
from clever.evaluation.stored import stored_arguments
from clever.utils import InputError, error_prefix, save_json, unfinished

# Field -> file, with DINO's names. Folders written here also contain a description, which DINO's lack.
TENSORS = {"train": "trainfeat.pth", "test": "testfeat.pth", "train_labels": "trainlabels.pth", "test_labels": "testlabels.pth"}
DESCRIPTION = "features.json"


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


def load_features(folder: str | Path) -> FeatureSet:
    """Read features that were saved here or by DINO.

    Raises InputError if a file is missing or damaged, or if the tensors do not belong together.
    """
    tensors = {name: _read(Path(folder) / file) for name, file in TENSORS.items()}
    path = Path(folder) / DESCRIPTION
    description = stored_arguments({"args": _read(path)}) if path.exists() else {}
    for split in ("train", "test"):
        x, labels = tensors[split], tensors[f"{split}_labels"]
        if not _belong_together(x, labels):
            raise InputError(f"--load_features {folder}: {split} must be finite features [M, D] and class numbers [M]")
        tensors[split], tensors[f"{split}_labels"] = F.normalize(x.float(), dim=-1), labels.long()
    known = description.get("classes")
    classes = known if isinstance(known, list) else list(range(1 + int(tensors["train_labels"].max())))
    largest = max(int(tensors[f"{split}_labels"].max()) for split in ("train", "test"))
    if tensors["train"].shape[1] != tensors["test"].shape[1] or largest >= len(classes):
        raise InputError(f"--load_features {folder}: train and test differ in width, or labels exceed {len(classes) - 1}")
    return FeatureSet(**tensors, description=description | {"classes": classes})


def _read(path: Path) -> Any:
    with error_prefix("--load_features"):
        if path.name != DESCRIPTION:
            return load_file(path)
        try:
            return json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: damaged ({error})") from error


def _belong_together(x: Any, labels: Any) -> bool:
    """Whether these are finite features [M, D] and class numbers [M]."""
    if not isinstance(x, torch.Tensor) or not isinstance(labels, torch.Tensor) or x.ndim != 2 or labels.shape != x.shape[:1]:
        return False
    return x.numel() > 0 and bool(x.isfinite().all()) and not labels.is_floating_point() and int(labels.min()) >= 0
