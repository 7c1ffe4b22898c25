"""Pairs of image and ground truth, from the saliency data sets or from any two folders."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from clever.data.files import DECODE_ERRORS, list_images, read_image
from clever.utils import InputError, error_prefix

# Name -> (folders below the data path, (folder of images, folder of ground truths) inside them): the layout that TokenCut
# expects, then that of the archives as their authors distribute them.
LAYOUTS: dict[str, tuple[list[str], list[tuple[str, str]]]] = {
    "ECSSD": (["ECSSD"], [("img", "gt"), ("images", "ground_truth_mask")]),
    "DUTS": (["DUTS_Test", "DUTS-TE"], [("img", "gt"), ("DUTS-TE-Image", "DUTS-TE-Mask")]),
    "DUT": (["DUT_OMRON", "DUT-OMRON"], [("img", "gt"), ("DUT-OMRON-image", "pixelwiseGT-new-PNG")]),
}


@dataclass
class Pair:
    """An image and its ground truth."""

    name: str  # path below the folder, without suffix: the same for both
    image: str
    truth: str | None = None


@dataclass
class ImageSet:
    """A data set, a folder of images, or a single image."""

    name: str  # of the data set, else ""
    inputs: list[Path]  # the folders, or the single file
    pairs: list[Pair]
    unpaired: dict[str, str] = field(default_factory=dict)  # files without a counterpart: name -> reason


def dataset_folders(data_path: str, name: str) -> tuple[Path, Path]:
    """Folders of the images and of the ground truths of a data set. Raises InputError, listing the layouts, if not found."""
    roots, folders = LAYOUTS[name]
    choices = [(Path(data_path, root, images), Path(data_path, root, truths)) for root in roots for images, truths in folders]
    for images, truths in choices:
        if images.is_dir() and truths.is_dir():
            return images, truths
    layouts = "; or ".join(f"{images.relative_to(data_path)} and {truths.name}" for images, truths in choices)
    raise InputError(f"--dataset {name}: {data_path} must contain the folders {layouts}")


def _images_by_name(folder: Path) -> dict[str, str]:
    """{path below the folder, without suffix: path} of all images. Raises InputError if two have the same name."""
    paths: dict[str, str] = {}
    for path in list_images(folder):
        name = os.path.splitext(os.path.relpath(path, folder))[0]
        if name in paths:
            raise InputError(f"{folder}: {os.path.basename(paths[name])} and {os.path.basename(path)} differ by suffix only")
        paths[name] = path
    return paths


def find_pairs(name: str, images: Path, truths: Path | None) -> ImageSet:
    """The images of a folder, each with the ground truth of the same name; without `truths`, all images without one.

    Raises InputError if a folder is missing, or if no image has a ground truth.
    """
    with error_prefix("images"):
        by_name = _images_by_name(images)
    if truths is None:
        return ImageSet(name, [images], [Pair(key, path) for key, path in by_name.items()])
    with error_prefix("ground truths"):
        truth_by_name = _images_by_name(truths)
    pairs = [Pair(key, path, truth_by_name[key]) for key, path in by_name.items() if key in truth_by_name]
    if not pairs:
        raise InputError(f"no image of {images} has a ground truth of its name in {truths}")
    unpaired = {key: f"no ground truth in {truths}" for key in by_name if key not in truth_by_name}
    unpaired |= {key: f"no image in {images}" for key in truth_by_name if key not in by_name}
    return ImageSet(name, [images, truths], pairs, unpaired)


def patch_grid(width: int, height: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches that an image is resized to; halves are rounded to even, as in TokenCut.

    Raises InputError if there is less than one row or column.
    """
    rows, columns = round(height / patch_size), round(width / patch_size)
    if min(rows, columns) < 1:
        raise InputError(f"image of {width}x{height} pixels: too small for a patch of {patch_size}")
    return rows, columns


class ResizeToPatches:
    """PIL image -> normalised tensor whose sides are multiples of the patch size; at most about `max_side` pixels (0: any).

    Raises InputError if the image has less than one patch or more than `max_patches`.
    """

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
    """A pair that has been read, or the reason why it cannot be used."""

    pair: Pair
    network_input: Tensor | None = None  # normalised and resized to whole patches, [3, rows * p, columns * p]
    pixels: np.ndarray | None = None  # H, W, 3, uint8: the input of the bilateral solver
    truth: np.ndarray | None = None  # H, W, bool
    error: str | None = None


class SaliencyDataset(Dataset):
    """An Example for each pair; one whose files cannot be used has an `error`."""

    def __init__(self, pairs: list[Pair], transform: ResizeToPatches, gt_threshold: int = 1) -> None:
        self.pairs, self.transform, self.gt_threshold = pairs, transform, gt_threshold

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Example:
        pair = self.pairs[index]
        try:
            return self._read(pair)
        except InputError as error:
            return Example(pair, error=str(error))

    def _read(self, pair: Pair) -> Example:
        image = read_image(pair.image)
        truth = None
        if pair.truth is not None:
            truth = read_truth(pair.truth) >= self.gt_threshold
            if truth.shape[::-1] != image.size:
                H, W = truth.shape
                raise InputError(f"image of {image.width}x{image.height} pixels, its ground truth {pair.truth} of {W}x{H}")
        return Example(pair, self.transform(image), np.asarray(image), truth)


def read_truth(path: str) -> np.ndarray:
    """The grey levels of a ground truth, [H, W], 0 to 255. Levels of 16 bits are scaled, unless the largest fits into 8 bits.

    Raises InputError if the file cannot be read.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):
                levels = np.asarray(image)
                return levels if levels.max() <= 255 else levels / 257
            if "A" in image.getbands():
                alpha, colour = np.asarray(image.getchannel("A")), np.asarray(image.convert("L"))
                if alpha.min() < alpha.max() and colour.min() == colour.max():
                    raise InputError(f"ground truth {path}: a transparency over one colour; convert it to black and white")
    except InputError:
        raise
    except DECODE_ERRORS:
        pass  # read_image gives the reason
    return np.asarray(read_image(path).convert("L"))
