"""Codes of views: what was drawn for a view, as columns of numbers. The one table that methods and evaluations tell from.

Each operation stands in the frame in which it is applied: the box in that of the image, whatever flip and rotation follow.
What was not applied has the code of what it leaves unchanged. GROUPS are what a method can be told.

Shapes: B images; V views; P columns of a code; n columns of a group, p of all groups told.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from clever.data.augmentations import RANDOM_NUMBERS, Views

COLUMNS = (
    "centre y", "centre x", "height", "width",  # of the box that is seen, as shares of the image; 0.5, 0.5, 1, 1 for all of it
    "flip",  # this and the others without a remark: 1 where applied, else 0
    "sin", "cos",  # of the rotation, counter-clockwise
    "brightness", "contrast", "saturation", "hue",  # change as a share of the range's width, -0.5 to 0.5
    "grey", "blur",  # of the blur, the standard deviation as a share of the largest one
    "solarize", "elastic",  # the strength of "elastic" as a share of the largest one
)  # fmt: skip
GROUPS = {
    "crop": slice(0, 4), "flip": slice(4, 5), "rotation": slice(5, 7), "color": slice(7, 11), "grey": slice(11, 12),
    "blur": slice(12, 13), "solarize": slice(13, 14), "elastic": slice(14, 15),
    "brightness": slice(7, 8), "contrast": slice(8, 9),  # alone, for grey images: no other colour operation changes them
}  # fmt: skip


def describe(parameters: np.ndarray, heights: Sequence[int], widths: Sequence[int], views: Views) -> dict[str, np.ndarray]:
    """COLUMNS, and the "angle" in radians, [B, V] each, of the parameters VIEW [B, V] that `views` drew for these images."""
    view, jitter = parameters, parameters["jitter"] > 0
    H, W = (np.asarray(lengths)[:, None] for lengths in (heights, widths))  # B, 1
    size = view["size"].astype(float)  # of the window that was cut out of the resized box
    height, width = size * view["height"] / view["resized_height"], size * view["width"] / view["resized_width"]
    top, left = height * view["y"] / size, width * view["x"] / size  # of the window in the box
    angle = np.deg2rad(view["angle"].astype(float))
    columns = {name: view[name] for name in ("flip", "grey", "solarize")} | {
        "centre y": (view["top"] + top + height / 2) / H,
        "centre x": (view["left"] + left + width / 2) / W,
        "height": height / H,
        "width": width / W,
        "angle": angle,
        "sin": np.sin(angle),
        "cos": np.cos(angle),
        "blur": view["blur"] / _divisors(distribution.radius[1] for distribution in views.distributions),
        "elastic": view["elastic_alpha"] / _divisors(distribution.elastic_alpha for distribution in views.distributions),
    }
    for name, neutral in (("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0)):
        ranges = _divisors(2 * getattr(distribution, name) for distribution in views.distributions)  # V
        columns[name] = jitter * (view[name] - np.float32(neutral)) / ranges
    return columns


def _divisors(ranges: Iterable[float]) -> np.ndarray:
    """As float32 [V]; 1 for a range of 0, within which nothing changes."""
    return np.array([value or 1 for value in ranges], np.float32)


def encode(parameters: np.ndarray, heights: Sequence[int], widths: Sequence[int], views: Views) -> np.ndarray:
    """Codes float32 [B, V, P] of the parameters VIEW [B, V] that `views` drew for images of these heights and widths [B]."""
    columns = describe(parameters, heights, widths, views)
    return np.stack([columns[name] for name in COLUMNS], axis=-1).astype(np.float32)


def is_constant(group: str, views: Views, draws: int = 1000) -> bool:
    """Whether all views have the same code of a group, so that there is nothing to tell."""
    u = np.random.default_rng(0).random((draws, len(views), RANDOM_NUMBERS))
    sides = np.full(draws, 256)
    codes = encode(views.draw(u, sides, sides), sides, sides, views)[..., GROUPS[group]]
    return bool((codes == codes[0, 0]).all())


def absolute(codes: Tensor, groups: Sequence[str]) -> Tensor:
    """Codes [..., P] -> the columns of these groups [..., p]."""
    return torch.cat([codes[..., GROUPS[group]] for group in groups], dim=-1)


def relative(codes1: Tensor, codes2: Tensor, groups: Sequence[str]) -> dict[str, Tensor]:
    """Codes of two views [B, P] -> how the first differs from the second, [B, n] for each group.

    AugSelf's convention (arXiv 2111.09613): differences, in the frame of the first view, where the horizontal one changes sign
    if that view is flipped; flip: 1 if both or neither are. Rotation: sine and cosine of angle 1 - angle 2, whatever the flips.
    """
    differences = codes1 - codes2  # B, P
    differences[..., COLUMNS.index("centre x")] *= 1 - 2 * codes1[..., COLUMNS.index("flip")]
    told = {group: differences[..., GROUPS[group]] for group in groups}
    if "flip" in told:
        told["flip"] = 1 - told["flip"].abs()
    if "rotation" in told:
        (sin1, cos1), (sin2, cos2) = (codes[..., GROUPS["rotation"]].unbind(-1) for codes in (codes1, codes2))
        told["rotation"] = torch.stack([sin1 * cos2 - cos1 * sin2, cos1 * cos2 + sin1 * sin2], dim=-1)  # B, 2
    return told
