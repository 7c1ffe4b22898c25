"""Transformations of images with known parameters, and the views that show them. TRANSFORMS lists them, one per line.

Every view of an image differs from the clean one by a single transformation.

Shapes: B images in a batch, V transformed views of each, T targets, S side of the views.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clever.data.augmentations import DINO_VIEW, Views, eval_transform
from clever.data.codes import describe
from clever.data.datasets import image_seed, read_batch
from clever.data.rendering import render_batch

# A target as a function of what was drawn: `codes.describe`, columns [B, V] each.
Target = Callable[[dict[str, np.ndarray]], np.ndarray]  # -> B, V


@dataclass(frozen=True)
class Transform:
    """A transformation, and what is to be predicted about it.

    Args:
        changes: fields of ViewDistribution in which the transformed views differ from the clean one.
        targets: what is to be predicted.
        kind: `values` (scored by R2), `angle` (also by the error in degrees; the targets are sine and cosine), or `class`
            (also by accuracy and AUC; the target is 1 or -1).
        disc: all views, the clean one too, are black outside their inscribed circle.
        inputs: what regressors may get: `pair`, the features of the clean and the transformed view side by side, or
            `single`, those of the transformed view.
        factor: the targets are sine and cosine of this multiple of the angle.
    """

    changes: dict[str, Any]
    targets: dict[str, Target]
    kind: str = "values"
    disc: bool = False
    inputs: tuple[str, ...] = ("pair", "single")
    factor: float = 1.0


def _angle(factor: float = 1.0) -> dict[str, Target]:
    return {"sin": lambda drawn: np.sin(factor * drawn["angle"]), "cos": lambda drawn: np.cos(factor * drawn["angle"])}


def _applied(name: str) -> dict[str, Target]:
    return {name: lambda drawn: 2.0 * drawn[name] - 1}


def _scaled(names: Sequence[str], factor: float = 1.0) -> dict[str, Target]:
    return {name: lambda drawn, name=name: factor * drawn[name] for name in names}


_BOX: dict[str, Target] = {  # as shares of the image
    **_scaled(("centre x", "centre y")),
    "log width": lambda drawn: np.log(drawn["width"]),
    "log height": lambda drawn: np.log(drawn["height"]),
}
_COLOURS = _scaled(("brightness", "contrast", "saturation", "hue"), 2)  # as shares of the largest changes, those of DINO
_JITTER = {name: getattr(DINO_VIEW, name) for name in _COLOURS}
_RADIUS: dict[str, Target] = {"radius": lambda drawn: DINO_VIEW.radius[1] * drawn["blur"]}  # pixels

TRANSFORMS = {
    "rotation": Transform({"rotation": 90.0}, _angle(), "angle", disc=True),
    "rotation_corners": Transform({"rotation": 90.0}, _angle(), "angle"),  # the black corners give the angle away
    "crop": Transform({"scale": DINO_VIEW.scale}, _BOX),
    "jitter": Transform({"jitter_p": 1.0, **_JITTER}, _COLOURS),
    "blur": Transform({"blur_p": 1.0}, _RADIUS),
    "elastic": Transform({"elastic_p": 1.0, "elastic_least": 0.0}, _scaled(["elastic"])),
    "flip": Transform({"flip_p": 0.5}, _applied("flip"), "class", inputs=("pair",)),
    "solarize": Transform({"solarize_p": 0.5}, _applied("solarize"), "class"),
    "grey": Transform({"grey_p": 0.5}, _applied("grey"), "class"),
}


def with_half_angles(transform: Transform) -> Transform:
    """The same with sine and cosine of half the angle, the quaternion of a rotation about one axis (SIE's targets)."""
    return replace(transform, targets=_angle(0.5), factor=0.5) if transform.kind == "angle" else transform


class TransformDataset(Dataset):
    """Every image as its clean view and V transformed ones, with the targets of these.

    The views of an image are a function of (seed, stream, index): they depend neither on the number of processes nor on other
    transformations.

    Args:
        paths: files of the images.
        size: side of the views, pixels.
        views: V.
        stream: gives data sets with the same seed different draws.
        images_per_draw: so many consecutive images are transformed alike.
    """

    def __init__(
        self, paths: Sequence[str], transform: Transform, size: int, views: int = 8, seed: int = 0, stream: int = 0,
        renderer: str = "torchvision", images_per_draw: int = 1,
    ) -> None:  # fmt: skip
        (clean,) = eval_transform("ori", size).distributions
        self.views = Views([clean, *[replace(clean, **transform.changes)] * views])
        self.paths, self.transform, self.size, self.renderer = list(paths), transform, size, renderer
        self.seed, self.stream, self.images_per_draw = seed, stream, images_per_draw

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Pixels, uint8 [B, 1+V, 3, S, S], the clean view first, and targets, float64 [B, V, T]."""
        seeds = [image_seed(self.seed, self.stream, index // self.images_per_draw) for index in indices]
        images, sizes = read_batch([self.paths[index] for index in indices])
        parameters = self.views.draw_seeded(seeds, *sizes)  # B, 1+V
        (pixels,) = render_batch(images, parameters, self.renderer)  # 1+V, B, 3, S, S
        if self.transform.disc:
            pixels *= inscribed_disc(self.size)
        drawn = describe(parameters[:, 1:], *sizes, Views(self.views.distributions[1:]))
        targets = np.stack([target(drawn) for target in self.transform.targets.values()], axis=-1, dtype=float)
        return pixels.transpose(0, 1), torch.from_numpy(targets)  # B, V, T


def inscribed_disc(size: int) -> Tensor:
    """1 for pixels whose centres lie within the inscribed circle of a square, else 0: uint8 [size, size]."""
    squares = (torch.arange(size) - (size - 1) / 2).square()
    return (squares[:, None] + squares <= (size / 2) ** 2).to(torch.uint8)
