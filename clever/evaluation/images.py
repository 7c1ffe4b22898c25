"""Images of the evaluations that draw pictures: found by name, read upright, shown in a grid."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from clever.data.files import list_images, read_image
from clever.models.layers import normalize
from clever.utils import IMAGENET_MEAN, IMAGENET_STD, InputError, atomic_file


class ToNormalizedTensor:
    """RGB image of any size -> float32 [3, H, W], normalised per channel."""

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        self.mean, self.std = mean, std

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # uint8 [3, H, W]
        return normalize(pixels, self.mean, self.std)


def natural_order(path: str | Path) -> list[str | int]:
    """Sort key that puts frame-2 before frame-10."""
    return [int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", str(path))]


def images_by_name(folder: str | Path) -> dict[str, str]:
    """{path below the folder, without suffix: path} of the images of a folder, in natural order.

    Raises InputError if the folder is missing or has no images, or if two of them differ by suffix only.
    """
    paths = sorted(list_images(folder), key=natural_order)
    by_name = {os.path.splitext(os.path.relpath(path, folder))[0]: path for path in paths}
    if len(by_name) < len(paths):
        twice = next(path for path in paths if path not in by_name.values())
        raise InputError(f"image {twice}: another image differs from it by suffix only")
    return by_name


def read_upright(path: str | Path) -> Image.Image:
    """An image as RGB, turned as its EXIF orientation says. Raises InputError if it cannot be read."""
    return ImageOps.exif_transpose(read_image(path))


def montage(rows: Sequence[Sequence[Image.Image]], width: int = 200, height: int = 150) -> np.ndarray:
    """Rows of pictures, each fitted into a cell of `width` x `height`: uint8 [H, W, 3]."""
    sheet = Image.new("RGB", (width * max(map(len, rows)), height * len(rows)), "white")
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            sheet.paste(ImageOps.contain(picture.convert("RGB"), (width, height)), (column * width, row * height))
    return np.asarray(sheet)


def check_failures(failures: dict[str, str], total: int) -> None:
    """Raise InputError, which counts the failures {name: reason} and gives the first three reasons, if there are any."""
    if failures:
        raise InputError(f"{len(failures)} of {total} failed: {'; '.join(list(failures.values())[:3])}")


def save_png(pixels: np.ndarray, path: str | Path) -> None:
    """Write a picture, uint8 [H, W] or [H, W, channels], as PNG, atomically."""
    with atomic_file(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
