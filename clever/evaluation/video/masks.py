"""Label images of videos: reading and writing them, and conversion between pixels and soft labels of patches.

Shapes: n number of objects; h w size in pixels of the frames that the network sees.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from clever.data.files import DECODE_ERRORS
from clever.evaluation.video.metrics import VOID
from clever.utils import InputError, describe_error


def read_labels(path: Path) -> np.ndarray:
    """The label of each pixel [H, W] of a palette or grey PNG; pixels marked as void (255) are background.

    Raises InputError if the file cannot be read, or if it contains colours instead of labels.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "1"):
                raise ValueError(f"labels are palette or 8-bit grey images, not {image.mode}")
            labels = np.array(image, np.uint8)
    except DECODE_ERRORS as error:
        raise InputError(f"{path}: cannot be read ({describe_error(error)})") from error
    labels[labels == VOID] = 0
    return labels


def one_hot_labels(labels: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """Labels [H, W] sampled at a grid of patches (nearest), one-hot: [rows, columns, 1 + n].

    n is the largest label before sampling, so an object that is missed by the samples still has its channel.
    """
    sampled = np.asarray(Image.fromarray(labels).resize(grid[::-1], Image.Resampling.NEAREST))
    return F.one_hot(torch.from_numpy(sampled.astype(np.int64)), int(labels.max()) + 1).float()


def palette(entries: int = 256) -> np.ndarray:
    """Colours of labels [entries, 3] as in PASCAL VOC and DAVIS: the bits of the label go to red, green and blue in turn."""
    labels, colours = np.arange(entries), np.zeros((entries, 3), np.uint8)
    for place in range(8):
        for channel in range(3):
            colours[:, channel] |= ((labels >> (3 * place + channel) & 1) << (7 - place)).astype(np.uint8)
    return colours


def soft_labels_to_mask(soft: Tensor, patch_size: int, size: tuple[int, int]) -> np.ndarray:
    """Label of each pixel [H, W] of a frame of `size`, from soft labels of patches [rows, columns, 1 + n].

    As in DINO's evaluation: soft labels are upsampled to the pixels of the network's frame (bilinear), each channel is
    stretched to 0..1 over the frame (unless it is constant or never positive), the largest channel gives the label, and
    labels are resized to `size` (nearest).
    """
    maps = rearrange(soft, "rows columns channels -> 1 channels rows columns")
    maps = F.interpolate(maps, scale_factor=patch_size, mode="bilinear", align_corners=False)[0]  # 1+n, h, w
    low, high = maps.flatten(1).aminmax(dim=1)
    stretch = (high > 0) & (high > low)
    low, span = torch.where(stretch, low, 0), torch.where(stretch, high - low, 1)
    maps = (maps - low[:, None, None]) / span[:, None, None]
    labels = maps.max(0).indices.to(torch.uint8)  # h, w; argmax(0) gives the same in twenty times the time on a CPU
    return np.asarray(Image.fromarray(labels.cpu().numpy()).resize(size[::-1], Image.Resampling.NEAREST))


def write_mask(labels: np.ndarray, path: Path) -> None:
    """Write labels [H, W] as a palette PNG."""
    image = Image.fromarray(labels)
    image.putpalette(palette().tobytes())
    image.save(path)
