"""Image and ground-truth pairs of the saliency data sets, or of any two folders."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from datasets import list_images, read_image
from utils import InputError, error_prefix

# Name -> folders below the data path, and the folders of images and ground truths in them: TokenCut's layout, then the
# authors' own archives.
LAYOUTS: dict[str, tuple[list[str], list[tuple[str, str]]]] = {
    "ECSSD": (["ECSSD"], [("img", "gt"), ("images", "ground_truth_mask")]),
    "DUTS": (["DUTS_Test", "DUTS-TE"], [("img", "gt"), ("DUTS-TE-Image", "DUTS-TE-Mask")]),
    "DUT": (["DUT_OMRON", "DUT-OMRON"], [("img", "gt"), ("DUT-OMRON-image", "pixelwiseGT-new-PNG")]),
}


@dataclass
class Pair:
    """An image and its ground truth, found by their common name."""

    name: str  # path below the folder, without suffix
    image: str
    truth: str | None = None


@dataclass
class ImageSet:
    """What one evaluation runs over."""

    name: str  # "" for folders given one by one
    inputs: list[Path]  # folders, or the one file
    pairs: list[Pair]
    unpaired: dict[str, str] = field(default_factory=dict)  # name -> why it is left out


def dataset_folders(data_path: str, name: str) -> tuple[Path, Path]:
    """Folders of the images and of the ground truths of a data set. Raises InputError listing the layouts if there are none."""
    tops, inner = LAYOUTS[name]
    choices = [(Path(data_path, top, images), Path(data_path, top, truths)) for top in tops for images, truths in inner]
    for images, truths in choices:
        if images.is_dir() and truths.is_dir():
            return images, truths
    wanted = "; or ".join(f"{images.relative_to(data_path)} and {truths.name}" for images, truths in choices)
    raise InputError(f"--dataset {name}: {data_path} must hold the folders {wanted}")


def _by_name(folder: Path) -> dict[str, str]:
    """Images below a folder by their path in it, without suffix. Raises InputError if two have the same."""
    found: dict[str, str] = {}
    for path in list_images(folder):
        name = os.path.splitext(os.path.relpath(path, folder))[0]
        if name in found:
            raise InputError(f"{folder}: {os.path.basename(found[name])} and {os.path.basename(path)} differ by suffix only")
        found[name] = path
    return found


def find_pairs(name: str, images: Path, truths: Path | None) -> ImageSet:
    """The images of a folder, each with the ground truth of the same name; without `truths` all images alone.

    What has no counterpart is `unpaired`. Raises InputError if a folder is missing, or nothing has a counterpart.
    """
    with error_prefix("images"):
        by_name = _by_name(images)
    if truths is None:
        return ImageSet(name, [images], [Pair(key, path) for key, path in by_name.items()])
    with error_prefix("ground truths"):
        truth_by_name = _by_name(truths)
    pairs = [Pair(key, path, truth_by_name[key]) for key, path in by_name.items() if key in truth_by_name]
    if not pairs:
        raise InputError(f"no image of {images} has a ground truth of its name in {truths}")
    unpaired = {key: f"no ground truth in {truths}" for key in by_name if key not in truth_by_name}
    unpaired |= {key: f"no image in {images}" for key in truth_by_name if key not in by_name}
    return ImageSet(name, [images, truths], pairs, unpaired)


def patch_grid(width: int, height: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches that an image in pixels is resized to, halves rounded to even as in TokenCut.

    Raises InputError if a side is none.
    """
    rows, columns = round(height / patch_size), round(width / patch_size)
    if min(rows, columns) < 1:
        raise InputError(f"image of {width}x{height} pixels: too small for a patch of {patch_size}")
    return rows, columns


class Preparation:
    """PIL image -> normalised tensor [3, h*p, w*p]: shrunk to `max_side` pixels if it is larger, then to whole patches."""

    def __init__(self, patch_size: int, max_side: int, max_patches: int, to_tensor: Callable[[Image.Image], Tensor]) -> None:
        self.patch_size, self.max_side, self.max_patches, self.to_tensor = patch_size, max_side, max_patches, to_tensor

    def __call__(self, image: Image.Image) -> Tensor:
        scale = min(1, self.max_side / max(image.size)) if self.max_side else 1
        rows, columns = patch_grid(round(image.width * scale), round(image.height * scale), self.patch_size)
        if rows * columns > self.max_patches:
            raise InputError(
                f"image of {image.width}x{image.height} pixels: {rows * columns} patches, more than {self.max_patches}; "
                "give --max_side"
            )
        size = (columns * self.patch_size, rows * self.patch_size)
        return self.to_tensor(image.resize(size, Image.Resampling.LANCZOS))


@dataclass
class Example:
    """An image as the network and as the solver see it, H by W pixels, and its ground truth; or why there is none."""

    pair: Pair
    view: Tensor | None = None  # 3, h*p, w*p
    pixels: np.ndarray | None = None  # H, W, 3, uint8
    truth: np.ndarray | None = None  # H, W, bool
    error: str | None = None


class SaliencyDataset(Dataset):
    """(example,) for each pair; a file that cannot be used is an example with an error."""

    def __init__(self, pairs: list[Pair], prepare: Preparation, gt_threshold: int = 1) -> None:
        self.pairs, self.prepare, self.gt_threshold = pairs, prepare, gt_threshold

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[list[Example]]:
        pair = self.pairs[index]
        try:
            return ([self._read(pair)],)
        except InputError as error:
            return ([Example(pair, error=str(error))],)

    def _read(self, pair: Pair) -> Example:
        image = read_image(pair.image)
        truth = None
        if pair.truth is not None:
            truth = np.asarray(read_image(pair.truth).convert("L")) >= self.gt_threshold
            if truth.shape[::-1] != image.size:
                sizes = [f"{width}x{height}" for width, height in (image.size, truth.shape[::-1])]
                raise InputError(f"image of {sizes[0]} pixels, its ground truth {pair.truth} of {sizes[1]}")
        return Example(pair, self.prepare(image), np.asarray(image), truth)


def no_batching(sample: Any) -> Any:
    """For a DataLoader with batch_size=None, whose default turns arrays into tensors."""
    return sample
