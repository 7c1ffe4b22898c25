"""Pictures of the saliency evaluation: the masks of an image, and an overview of several images."""

from pathlib import Path

import numpy as np
from PIL import Image

from clever.evaluation.images import montage, read_upright, save_png
from clever.evaluation.saliency.bilateral_solver import largest_object
from clever.evaluation.saliency.data import Pair
from clever.evaluation.saliency.detection import Detection

MASK_FOLDERS = ("masks", "solver", "objects")


def save_masks(detection: Detection, output: Path, name: str) -> None:
    """Write <output>/{masks,solver,objects}/<name>.png."""
    masks = (detection.mask, detection.refined, largest_object(detection.refined))
    for folder, values in zip(MASK_FOLDERS, masks, strict=True):
        save_png((255 * values.clip(0, 1)).round().astype(np.uint8), output / folder / f"{name}.png")


def save_overview(pairs: list[Pair], output: Path) -> None:
    """Write <output>/overview.png: a row per image with its masks in the order of MASK_FOLDERS, then its ground truth."""
    rows = []
    for pair in pairs:
        masks = [Image.open(output / folder / f"{pair.name}.png") for folder in MASK_FOLDERS]
        truth = [] if pair.truth is None else [read_upright(pair.truth)]
        rows.append([read_upright(pair.image), *masks, *truth])
    if rows:
        save_png(montage(rows), output / "overview.png")
