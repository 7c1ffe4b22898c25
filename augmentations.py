"""Training views and test perturbations, as pipelines of torchvision.transforms.v2.

All random draws come from torch's global generator, so a seed determines the views of an image.
Shapes: S side of a square view.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torchvision.transforms import v2

from utils import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Stats = Sequence[float]  # a number per channel, for pixel values in 0..1


# --- operations that torchvision does not have, or only in a slow version --------------------------------------------


@lru_cache(maxsize=16)
def smoothing_matrix(size: int, sigma: float) -> Tensor:
    """The matrix [size, size] that convolves `size` numbers with a Gaussian of int(8 * sigma + 1) taps, rounded up to odd.

    The numbers are padded by reflection, repeatedly if the padding is longer than the numbers.
    """
    radius = int(8 * sigma + 1) // 2
    offsets = torch.arange(-radius, radius + 1)  # [2R+1]
    taps = torch.softmax(-0.5 * (offsets.double() / sigma) ** 2, dim=0)
    period = max(2 * (size - 1), 1)
    source = (torch.arange(size)[:, None] + offsets) % period  # [size, 2R+1]
    source = torch.minimum(source, period - source)
    return torch.zeros(size, size, dtype=torch.double).scatter_add_(1, source, taps.expand(size, -1)).float()


class ElasticTransform(nn.Module):
    """Distort a PIL or tensor image by a smooth random displacement field, distributed as in v2.ElasticTransform.

    Uniform noise in -1..1 per pixel and direction is smoothed by a Gaussian of `sigma` pixels and scaled so that a
    value of 1 is a displacement of alpha / 2 pixels. Sampling is bilinear, with black outside the image. Two products
    with a cached matrix replace the dense 41 x 41 convolution that takes most of the time in torchvision.
    """

    def __init__(self, alpha: float, sigma: float = 5.0) -> None:
        super().__init__()
        self.alpha, self.sigma = alpha, sigma

    def displacement(self, height: int, width: int) -> Tensor:
        """A random field [1, H, W, 2] of displacements (x, y), in coordinates in which the image spans -1..1."""
        noise = torch.rand(2, height, width) * 2 - 1
        field = smoothing_matrix(height, self.sigma) @ noise @ smoothing_matrix(width, self.sigma).T  # [2, H, W]
        return (field * self.alpha / torch.tensor([width, height])[:, None, None]).permute(1, 2, 0)[None]

    def forward(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        height, width = v2.functional.get_size(image)
        return v2.functional.elastic(image, self.displacement(height, width), fill=0)


class GaussianBlur(nn.Module):
    """Pillow's Gaussian blur (repeated box filters) with a radius drawn uniformly from the range `radius`, in pixels."""

    def __init__(self, radius: tuple[float, float] = (0.1, 2.0)) -> None:
        super().__init__()
        self.radius = radius

    def forward(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(torch.empty(1).uniform_(*self.radius).item()))


class ToNormalizedTensor(nn.Module):
    """PIL image (RGB) -> float32 tensor [3, H, W], normalised per channel, in one pass instead of v2's four operations."""

    def __init__(self, mean: Stats, std: Stats) -> None:
        super().__init__()
        self.mean = 255 * torch.tensor(mean)[:, None, None]  # [3, 1, 1]
        self.std = 255 * torch.tensor(std)[:, None, None]

    def forward(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # uint8 [3, H, W]
        return pixels.to(torch.float32, memory_format=torch.contiguous_format).sub_(self.mean).div_(self.std)


# --- training views --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What a training recipe adds to DINO's augmentation (CLeVER, arXiv 2406.00262)."""

    rotation: float = 0.0  # largest angle in either direction, degrees
    elastic_p: float = 0.0  # probability of elastic distortion


RECIPES = {
    "aug1": Recipe(),  # BAug: that of DINO
    "aug1_2": Recipe(rotation=90.0),  # CAug
    "aug1_4_2": Recipe(rotation=90.0, elastic_p=0.5),  # CAug+
}


def view_transform(
    size: int,
    scale: Sequence[float],
    recipe: Recipe,
    blur_p: float,
    solarize_p: float,
    mean: Stats = IMAGENET_MEAN,
    std: Stats = IMAGENET_STD,
) -> v2.Compose:
    """One random view: uint8 tensor [3, H, W] -> float32 tensor [3, S, S].

    Each operation runs where it is fastest: resizing on a tensor, rotation and colour changes on a PIL image.
    """
    steps: list[nn.Module] = [
        v2.RandomResizedCrop(size, tuple(scale), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(0.5),
        v2.ToPILImage(),
    ]
    if recipe.rotation:
        steps.append(v2.RandomRotation(recipe.rotation, v2.InterpolationMode.NEAREST, fill=0))
    if recipe.elastic_p:
        steps.append(v2.RandomApply([ElasticTransform(alpha=100.0)], recipe.elastic_p))
    steps += [
        v2.RandomApply([v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], 0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([GaussianBlur()], blur_p),
        v2.RandomSolarize(threshold=128, p=solarize_p),
    ]
    return v2.Compose([*steps, ToNormalizedTensor(mean, std)])


class MultiCropAugmentation:
    """PIL image (RGB) -> list of float32 tensors [3, S, S]: 2 global views, then `local_crops_number` local views.

    Raises InputError for an unknown recipe, a crop scale that is not a range within (0, 1], or a negative number of crops.
    """

    def __init__(
        self,
        aug: str,
        global_crops_scale: Sequence[float] = (0.4, 1.0),
        local_crops_scale: Sequence[float] = (0.05, 0.4),
        local_crops_number: int = 8,
        global_crops_size: int = 224,
        local_crops_size: int = 96,
        mean: Stats = IMAGENET_MEAN,
        std: Stats = IMAGENET_STD,
    ) -> None:
        recipe = _choose("aug", aug, RECIPES)
        check_crop_scale("global_crops_scale", global_crops_scale)
        check_crop_scale("local_crops_scale", local_crops_scale)
        if local_crops_number < 0:
            raise InputError(f"local_crops_number {local_crops_number}: must be 0 or more")
        common = {"recipe": recipe, "mean": mean, "std": std}
        global1 = view_transform(global_crops_size, global_crops_scale, blur_p=1.0, solarize_p=0.0, **common)
        global2 = view_transform(global_crops_size, global_crops_scale, blur_p=0.1, solarize_p=0.2, **common)
        local = view_transform(local_crops_size, local_crops_scale, blur_p=0.5, solarize_p=0.0, **common)
        self.views = [global1, global2] + [local] * local_crops_number

    def __call__(self, image: Image.Image) -> list[Tensor]:
        pixels = v2.functional.pil_to_tensor(image)  # uint8 [3, H, W]
        return [view(pixels) for view in self.views]


# --- evaluation ------------------------------------------------------------------------------------------------------

_JITTER = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)

# Always applied to the centre crop, in this order.
PERTURBATIONS: dict[str, tuple[nn.Module, ...]] = {
    "ori": (),
    "basic": (_JITTER,),
    "aug1": (v2.RandomHorizontalFlip(1.0), _JITTER),
    "aug1_2": (v2.RandomRotation(90), _JITTER),
    "aug1_3": (v2.RandomRotation(180), _JITTER),
    "aug1_4_1": (v2.RandomRotation(90), _JITTER, ElasticTransform(alpha=50.0)),
    "aug1_4_2": (v2.RandomRotation(90), _JITTER, ElasticTransform(alpha=100.0)),
    "aug1_4_3": (v2.RandomRotation(90), _JITTER, ElasticTransform(alpha=150.0)),
}


def eval_transform(
    test_aug_type: str = "ori", size: int = 224, mean: Stats = IMAGENET_MEAN, std: Stats = IMAGENET_STD
) -> v2.Compose:
    """Resize, centre crop and perturbation: PIL image (RGB) -> float32 tensor [3, S, S].

    The clean image, `ori`, is resized bicubically, all others bilinearly, as in CLeVER's evaluation.
    Raises InputError for an unknown perturbation.
    """
    perturbation = _choose("test_aug_type", test_aug_type, PERTURBATIONS)
    mode = v2.InterpolationMode.BICUBIC if test_aug_type == "ori" else v2.InterpolationMode.BILINEAR
    resize = v2.Resize(round(size * 256 / 224), interpolation=mode, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(size), *perturbation, ToNormalizedTensor(mean, std)])


def probe_train_transform(size: int = 224, mean: Stats = IMAGENET_MEAN, std: Stats = IMAGENET_STD) -> v2.Compose:
    """Random crop and flip for training a probe and for fine-tuning: PIL image (RGB) -> float32 tensor [3, S, S]."""
    crop = v2.RandomResizedCrop(size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(0.5), ToNormalizedTensor(mean, std)])


# --- checks of user input --------------------------------------------------------------------------------------------


def check_crop_scale(name: str, scale: Sequence[float]) -> None:
    """Raise InputError unless `scale` is two increasing fractions of the image's area, in (0, 1]."""
    if len(scale) != 2 or not 0 < scale[0] < scale[1] <= 1:
        raise InputError(f"{name} {' '.join(map(str, scale))}: must be two increasing numbers in (0, 1]")


def _choose(name, choice, table):
    if choice not in table:
        raise InputError(f"{name} {choice!r}: choose one of {', '.join(table)}")
    return table[choice]
