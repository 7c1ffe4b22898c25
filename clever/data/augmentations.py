"""Training views and test perturbations: what is drawn for each view of an image.

A view is a function of an image and of parameters, which are plain numbers (`VIEW`). This module draws the parameters from
uniform random numbers; rendering.py turns an image and parameters into pixels. So the random stream, and with it a resumed
run, does not depend on how views are rendered, and an evaluation of equivariance knows what was done to each image.

Shapes: V views of an image, R random numbers of a view.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from clever.arguments import check_choices
from clever.utils import InputError

# The parameters of a view, in the order in which they are applied. The compiled renderer reads the same layout.
VIEW = np.dtype(
    [
        ("top", "i4"), ("left", "i4"), ("height", "i4"), ("width", "i4"),  # this box of the image, pixels,
        ("resized_height", "i4"), ("resized_width", "i4"),  # is resized to this size, with antialiasing,
        ("y", "i4"), ("x", "i4"), ("size", "i4"),  # and the square of this size is cut out of it at (y, x)
        ("bicubic", "i4"),  # 1: bicubic, 0: bilinear interpolation
        ("flip", "i4"),  # horizontally
        ("order", "i4"),  # of the four colour operations: an index into JITTER_ORDERS
        ("jitter", "i4"),  # 0: no colour operations, 1: after the elastic distortion, 2: before it
        ("grey", "i4"), ("solarize", "i4"),  # 1: applied
        ("elastic_seed", "u4"),  # of the displacement field
        ("angle", "f4"),  # of the rotation about the centre, degrees counter-clockwise; 0: none
        ("elastic_alpha", "f4"),  # elastic distortion: twice the largest shift before smoothing, pixels; 0: none
        ("brightness", "f4"), ("contrast", "f4"), ("saturation", "f4"),  # factors; 1: unchanged
        ("hue", "f4"),  # shift, as a share of the colour circle; 0: unchanged
        ("blur", "f4"),  # standard deviation of the Gaussian blur, pixels; 0: none
    ]
)  # fmt: skip

# Places of the random numbers that determine a view. Every view takes all of them, whatever its recipe: so a change of one
# probability leaves everything else as it was.
CROP_TRIES = 10
AREA = slice(0, CROP_TRIES)
RATIO = slice(CROP_TRIES, 2 * CROP_TRIES)
(TOP, LEFT, FLIP, ANGLE, ELASTIC, ELASTIC_SEED, JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GREY, BLUR, RADIUS,
 SOLARIZE) = range(2 * CROP_TRIES, 2 * CROP_TRIES + 16)  # fmt: skip
RANDOM_NUMBERS = 2 * CROP_TRIES + 16
RATIOS = (3 / 4, 4 / 3)  # width / height of a random crop, drawn uniformly on a logarithmic scale


@dataclass(frozen=True)
class ViewDistribution:
    """The distribution of a random view: ranges, and probabilities of the operations (ending in `_p`).

    Args:
        size: side of the square view, pixels.
        scale: share of the image's area in the crop, from and to; None: the centre, as in evaluations.
        bicubic: interpolation; False: bilinear.
        rotation: largest angle, degrees in either direction.
        elastic_alpha: strength of the elastic distortion, or from `elastic_least` times this on; `elastic_last`: after colour.
        brightness, contrast, saturation: a factor f is drawn from 1 - b to 1 + b.
        hue: the shift is drawn from -hue to hue.
        radius: standard deviation of the blur, from and to, pixels.
    """

    size: int
    scale: tuple[float, float] | None = None
    bicubic: bool = True
    flip_p: float = 0.0
    rotation: float = 0.0
    elastic_p: float = 0.0
    elastic_alpha: float = 100.0
    elastic_least: float = 1.0
    elastic_last: bool = False
    jitter_p: float = 0.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grey_p: float = 0.0
    blur_p: float = 0.0
    radius: tuple[float, float] = (0.1, 2.0)
    solarize_p: float = 0.0

    def draw(self, u: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """Parameters VIEW [B] of one view of each of B images, from random numbers u [B, R] in [0, 1)."""
        views = np.zeros(len(u), VIEW)
        views["size"], views["bicubic"] = self.size, self.bicubic
        if self.scale is None:
            centre_crop(views, self.size, heights, widths)
        else:
            random_resized_crop(views, u, self.scale, heights, widths)
        views["flip"] = u[:, FLIP] < self.flip_p
        views["angle"] = (2 * u[:, ANGLE] - 1) * self.rotation
        share = self.elastic_least + (1 - self.elastic_least) * u[:, ELASTIC] / (self.elastic_p or 1)  # of the strength
        views["elastic_alpha"] = np.where(u[:, ELASTIC] < self.elastic_p, self.elastic_alpha * share, 0)
        views["elastic_seed"] = u[:, ELASTIC_SEED] * 2**32
        views["jitter"] = np.where(u[:, JITTER] < self.jitter_p, 2 if self.elastic_last else 1, 0)
        for name, place in (("brightness", BRIGHTNESS), ("contrast", CONTRAST), ("saturation", SATURATION)):
            views[name] = 1 + (2 * u[:, place] - 1) * getattr(self, name)
        views["hue"] = (2 * u[:, HUE] - 1) * self.hue
        views["order"] = u[:, ORDER] * 24
        views["grey"] = u[:, GREY] < self.grey_p
        low, high = self.radius
        views["blur"] = np.where(u[:, BLUR] < self.blur_p, low + (high - low) * u[:, RADIUS], 0)
        views["solarize"] = u[:, SOLARIZE] < self.solarize_p
        return views


def random_resized_crop(views: np.ndarray, u: np.ndarray, scale: tuple[float, float], heights, widths) -> None:
    """Fill in a random box of an area in `scale` and a ratio in RATIOS, resized to the view (Szegedy et al., arXiv 1409.4842).

    The first of CROP_TRIES boxes that fits into the image is taken; if none does, the largest central one with a ratio in
    RATIOS. The distribution is that of torchvision's RandomResizedCrop.
    """
    H, W = heights[:, None], widths[:, None]  # B, 1
    area = H * W * (scale[0] + (scale[1] - scale[0]) * u[:, AREA])  # B, tries
    log_low, log_high = np.log(RATIOS)
    ratio = np.exp(log_low + (log_high - log_low) * u[:, RATIO])
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= W) & (h > 0) & (h <= H)
    rows, first = np.arange(len(u)), fits.argmax(1)
    fallback_w = np.minimum(widths, np.rint(heights * RATIOS[1]))
    fallback_h = np.minimum(heights, np.rint(widths / RATIOS[0]))
    found = fits.any(1)
    width, height = np.where(found, w[rows, first], fallback_w), np.where(found, h[rows, first], fallback_h)
    views["width"], views["height"] = width, height
    views["top"] = np.where(found, np.floor(u[:, TOP] * (heights - height + 1)), (heights - height) // 2)
    views["left"] = np.where(found, np.floor(u[:, LEFT] * (widths - width + 1)), (widths - width) // 2)
    views["resized_height"] = views["resized_width"] = views["size"]


def centre_crop(views: np.ndarray, size: int, heights: np.ndarray, widths: np.ndarray) -> None:
    """Fill in the centre of the image, whose short side is resized to size * 256 / 224."""
    short = round(size * 256 / 224)
    views["height"], views["width"] = heights, widths
    smaller = np.minimum(heights, widths)
    resized = [np.maximum(short * side // smaller, 1) for side in (heights, widths)]  # as torchvision rounds
    views["resized_height"], views["resized_width"] = resized
    # torchvision's CenterCrop rounds half to even.
    views["y"], views["x"] = (np.rint((side - size) / 2) for side in resized)


# DINO's views (arXiv 2104.14294), common to all recipes of the pretraining.
DINO_VIEW = ViewDistribution(
    size=224, scale=(0.4, 1.0), flip_p=0.5, jitter_p=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, grey_p=0.2
)
# What a training recipe adds to DINO's views (CLeVER, arXiv 2406.00262).
RECIPES: dict[str, dict[str, Any]] = {
    "aug1": {},  # BAug: DINO's
    "aug1_2": {"rotation": 90.0},  # CAug
    "aug1_4_2": {"rotation": 90.0, "elastic_p": 0.5, "elastic_alpha": 100.0},  # CAug+
}

_JITTER = {"jitter_p": 1.0}
_ROTATION_JITTER = {"rotation": 90.0, "jitter_p": 1.0}
_ELASTIC = {**_ROTATION_JITTER, "elastic_p": 1.0, "elastic_last": True}
# What is done to the centre of each test image; `ori` is resized bicubically, all others bilinearly (CLeVER's evaluation).
PERTURBATIONS: dict[str, dict[str, Any]] = {
    "ori": {"bicubic": True},
    "basic": _JITTER,
    "aug1": {"flip_p": 1.0, **_JITTER},
    "aug1_2": _ROTATION_JITTER,
    "aug1_3": {"rotation": 180.0, **_JITTER},
    "aug1_4_1": {**_ELASTIC, "elastic_alpha": 50.0},
    "aug1_4_2": {**_ELASTIC, "elastic_alpha": 100.0},
    "aug1_4_3": {**_ELASTIC, "elastic_alpha": 150.0},
}


class Views:
    """The views that are drawn of every image: one distribution for each, those of equal size adjacent."""

    def __init__(self, distributions: Sequence[ViewDistribution]) -> None:
        self.distributions = list(distributions)

    def __len__(self) -> int:
        return len(self.distributions)

    def draw(self, u: np.ndarray, heights: Sequence[int], widths: Sequence[int]) -> np.ndarray:
        """Parameters VIEW [B, V] for images of these heights and widths [B], from random numbers u [B, V, R] in [0, 1)."""
        sizes = np.asarray(heights), np.asarray(widths)
        drawn = np.empty(u.shape[:2], VIEW)
        for v, view in enumerate(self.distributions):
            drawn[:, v] = view.draw(u[:, v], *sizes)
        return drawn

    def draw_seeded(self, seeds: Sequence[int], heights: Sequence[int], widths: Sequence[int]) -> np.ndarray:
        """The same with random numbers from torch's generator, seeded for every image: seeds [B] -> VIEW [B, V]."""
        generator, shape = torch.Generator(), (len(self), RANDOM_NUMBERS)
        u = [torch.rand(shape, generator=generator.manual_seed(int(seed)), dtype=torch.float64) for seed in seeds]
        return self.draw(torch.stack(u).numpy(), heights, widths)


class MultiCropAugmentation(Views):
    """Training views: 2 global and `local_crops_number` local ones by the recipe `aug`, with DINO's blur and solarisation."""

    def __init__(
        self, aug: str, global_crops_scale: Sequence[float] = (0.4, 1.0), local_crops_scale: Sequence[float] = (0.05, 0.4),
        local_crops_number: int = 8, global_crops_size: int = 224, local_crops_size: int = 96,
    ) -> None:  # fmt: skip
        check_choices("aug", [aug], RECIPES)
        view = replace(DINO_VIEW, **RECIPES[aug])
        large = replace(view, size=global_crops_size, scale=tuple(global_crops_scale))
        small = replace(view, size=local_crops_size, scale=tuple(local_crops_scale), blur_p=0.5)
        first, second = replace(large, blur_p=1.0), replace(large, blur_p=0.1, solarize_p=0.2)
        super().__init__([first, second] + [small] * local_crops_number)


def eval_transform(test_aug_type: str = "ori", size: int = 224) -> Views:
    """The resized centre crop, perturbed. Raises InputError on an unknown perturbation."""
    check_choices("test_aug_type", [test_aug_type], PERTURBATIONS)
    return Views([ViewDistribution(size, **{"bicubic": False, **PERTURBATIONS[test_aug_type]})])


def check_crop_scale(name: str, scale: Sequence[float]) -> None:
    """Raise InputError, which names the flag, unless `scale` is a minimum and a maximum share of the image's area."""
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        raise InputError(f"--{name} {' '.join(map(str, scale))}: must be two numbers in (0, 1], minimum and maximum")
