"""Rendering of views: an image and the parameters of augmentations.py -> uint8 pixels.

`render_view` is the readable definition, by torchvision and Pillow. The compiled renderer (csrc/views, called by
rendering_cpp.py) computes the same much faster. `render_batch` takes either.
"""

import argparse
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby, permutations

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from clever.data import rendering_cpp
from clever.utils import InputError

JITTER = (
    ("brightness", F.adjust_brightness), ("contrast", F.adjust_contrast), ("saturation", F.adjust_saturation),
    ("hue", F.adjust_hue),
)  # fmt: skip
JITTER_ORDERS = list(permutations(range(4)))
ELASTIC_SIGMA = 5.0  # pixels
RENDERERS = ("torchvision", "cpp")


def render_view(image: np.ndarray, view: np.void) -> np.ndarray:
    """One view, uint8 [3, S, S], of an image, uint8 [H, W, 3]; `view` is a record of augmentations.VIEW."""
    pixels = _crop(torch.from_numpy(image).permute(2, 0, 1), view)  # 3, S, S
    if view["flip"]:
        pixels = pixels.flip(-1)
    if view["angle"]:
        pixels = F.pil_to_tensor(F.to_pil_image(pixels).rotate(float(view["angle"]), Image.Resampling.NEAREST))
    steps = {0: (_elastic,), 1: (_elastic, _jitter), 2: (_jitter, _elastic)}[int(view["jitter"])]
    for step in steps:
        pixels = step(pixels, view)
    picture = F.to_pil_image(pixels)
    if view["grey"]:
        picture = F.to_grayscale(picture, num_output_channels=3)
    if view["blur"]:
        picture = picture.filter(ImageFilter.GaussianBlur(float(view["blur"])))
    if view["solarize"]:
        picture = F.solarize(picture, threshold=128)
    return F.pil_to_tensor(picture).numpy()


def _crop(pixels: Tensor, view: np.void) -> Tensor:
    """The box, resized, and its window: [3, H, W] -> [3, S, S]."""
    mode = v2.InterpolationMode.BICUBIC if view["bicubic"] else v2.InterpolationMode.BILINEAR
    box = [int(view[name]) for name in ("top", "left", "height", "width")]
    resized = [int(view["resized_height"]), int(view["resized_width"])]
    pixels = F.resized_crop(pixels, *box, resized, interpolation=mode, antialias=True)
    return F.crop(pixels, int(view["y"]), int(view["x"]), int(view["size"]), int(view["size"]))


def _jitter(pixels: Tensor, view: np.void) -> Tensor:
    """Brightness, contrast, saturation and hue, in the drawn order."""
    picture = F.to_pil_image(pixels)
    for operation in JITTER_ORDERS[view["order"]]:
        name, adjust = JITTER[operation]
        picture = adjust(picture, float(view[name]))
    return F.pil_to_tensor(picture)


def _elastic(pixels: Tensor, view: np.void) -> Tensor:
    """A smooth random distortion, distributed as in torchvision's ElasticTransform; black outside. uint8 [3, S, S].

    Noise in -1..1 per pixel and direction is smoothed by a Gaussian of ELASTIC_SIGMA pixels and scaled so that a value of 1
    is a displacement of elastic_alpha / 2 pixels.
    """
    if not view["elastic_alpha"]:
        return pixels
    size = pixels.shape[-1]
    noise = torch.from_numpy(elastic_noise(int(view["elastic_seed"]), size))  # 2, S, S
    smoothing = smoothing_matrix(size, ELASTIC_SIGMA)
    field = smoothing @ noise @ smoothing.T * (float(view["elastic_alpha"]) / size)  # 2, S, S
    return F.elastic(pixels, field.permute(1, 2, 0)[None], fill=0)


def elastic_noise(seed: int, size: int) -> np.ndarray:
    """Uniform noise in -1..1, float32 [2, size, size], a function of the seed: the same in every renderer, forever."""
    key = mix(np.uint32(seed) ^ np.uint32(0x9E3779B9))
    mixed = mix(mix(np.arange(2 * size * size, dtype=np.uint32)) ^ key)
    return ((mixed ^ np.uint32(0x80000000)).view(np.int32).astype(np.float32) * np.float32(2**-31)).reshape(2, size, size)


def mix(x: np.ndarray) -> np.ndarray:
    """A bijection of 32-bit numbers in which every output bit depends on every input bit (Wellons' lowbias32)."""
    x = np.atleast_1d(x)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


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


def add_renderer_argument(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """--views, the same in every script that renders views."""
    parser.add_argument(
        "--views", default="auto", choices=("auto", *RENDERERS),
        help="renderer of the views: cpp (compiled), torchvision (slower, runs everywhere), or auto",
    )  # fmt: skip


def choose_renderer(name: str) -> str:
    """The renderer for --views; auto is cpp where its compiled library can be used. Raises InputError for cpp where not."""
    reason = rendering_cpp.unavailable_reason()
    if name == "cpp" and reason:
        raise InputError(f"--views cpp: {reason}")
    if name == "auto":
        return "torchvision" if reason else "cpp"
    return name


def renderer_line(name: str) -> str:
    """Which renderer runs, and why if it is not the fastest."""
    reason = rendering_cpp.unavailable_reason() or "--views cpp is faster, and available"
    return "views: compiled renderer (cpp)" if name == "cpp" else f"views: torchvision and Pillow ({reason})"


def render_batch(images: Sequence[np.ndarray], views: np.ndarray, renderer: str) -> list[Tensor]:
    """Views VIEW [B, V] of B images, uint8 [H, W, 3] each, contiguous -> one tensor uint8 [V', B, 3, S, S] per resolution.

    V' views of equal size are adjacent, as the crops of `MultiCropWrapper` are.
    """
    sizes = [int(size) for size in views["size"][0]]  # V
    tensors = [torch.empty(len(list(group)), len(images), 3, size, size, dtype=torch.uint8) for size, group in groupby(sizes)]
    outputs = [view.numpy() for tensor in tensors for view in tensor]  # V times B, 3, S, S
    first, step = np.array([(output.ctypes.data, output.strides[0]) for output in outputs], np.uint64).reshape(-1, 2).T  # V
    addresses = first + step * np.arange(len(images), dtype=np.uint64)[:, None]  # B, V
    for b, (image, parameters) in enumerate(zip(images, np.ascontiguousarray(views), strict=True)):
        if renderer == "cpp":
            rendering_cpp.render(image, parameters, addresses[b])
        else:
            for view, output in zip(parameters, outputs, strict=True):
                output[b] = render_view(image, view)
    return tensors
