"""Pairs of image and ground truth, from the saliency data sets or from any two folders."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from clever.evaluation.images import images_by_name, read_upright
from clever.utils import InputError

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


def dataset_folders(data_path: str, name: str) -> tuple[Path, Path]:
    """Folders of the images and of the ground truths of a data set. Raises InputError, listing the layouts, if not found."""
    roots, folders = LAYOUTS[name]
    choices = [(Path(data_path, root, images), Path(data_path, root, truths)) for root in roots for images, truths in folders]
    for images, truths in choices:
        if images.is_dir() and truths.is_dir():
            return images, truths
    layouts = "; or ".join(f"{images.relative_to(data_path)} and {truths.name}" for images, truths in choices)
    raise InputError(f"--dataset {name}: {data_path} must contain the folders {layouts}")


def find_pairs(images: str | Path, truths: str | Path | None) -> list[Pair]:
    """The images of a folder, each with the ground truth of its name in another folder, if that is given.

    An image without a ground truth of its name gets a path that does not exist. Raises InputError if all are such, or if a
    folder is missing.
    """
    by_name = images_by_name(images)
    if truths is None:
        return [Pair(name, path) for name, path in by_name.items()]
    truth_by_name = images_by_name(truths)
    if not by_name.keys() & truth_by_name.keys():
        raise InputError(f"no image of {images} has a ground truth of its name in {truths}")
    return [Pair(name, path, truth_by_name.get(name, f"{truths}/{name}.png")) for name, path in by_name.items()]


def resize_to_patches(image: Image.Image, patch_size: int, max_side: int) -> Image.Image:
    """An image whose sides are multiples of the patch size, the longer one about `max_side` at most (0: no limit).

    As in TokenCut, a side that ends with half a patch gets the even number of patches.
    """
    scale = min(1, max_side / max(image.size)) if max_side else 1
    columns, rows = (max(1, round(side * scale / patch_size)) for side in image.size)
    return image.resize((columns * patch_size, rows * patch_size), Image.Resampling.LANCZOS)


@dataclass
class Example:
    """A pair that has been read, or the reason why it cannot be used."""

    pair: Pair
    network_input: Tensor | None = None  # normalised and resized to whole patches, [3, rows * p, columns * p]
    pixels: np.ndarray | None = None  # H, W, 3, uint8: the input of the bilateral solver
    truth: np.ndarray | None = None  # H, W, bool
    error: str | None = None


@dataclass
class SaliencyDataset(Dataset):
    """An Example for each pair; one whose files cannot be used has an `error`.

    Grey levels of a ground truth from `gt_threshold` on are object.
    """

    pairs: list[Pair]
    patch_size: int
    to_tensor: Callable[[Image.Image], Tensor]
    max_side: int = 0
    gt_threshold: int = 1

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Example:
        pair = self.pairs[index]
        try:
            image = read_upright(pair.image)
            truth = None if pair.truth is None else self._read_truth(pair.truth, image.size)
        except InputError as error:
            return Example(pair, error=str(error))
        resized = resize_to_patches(image, self.patch_size, self.max_side)
        return Example(pair, self.to_tensor(resized), np.asarray(image), truth)

    def _read_truth(self, path: str, size: tuple[int, int]) -> np.ndarray:
        truth = read_upright(path).convert("L")
        if truth.size != size:
            raise InputError(f"ground truth {path}: {truth.width}x{truth.height} pixels, its image has {size[0]}x{size[1]}")
        return np.asarray(truth) >= self.gt_threshold
