"""A pretrained backbone for users' own code: `load_backbone`."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from clever.data.augmentations import eval_transform
from clever.data.files import to_rgb
from clever.data.rendering import choose_renderer, render_batch
from clever.evaluation.pretrained import load_pretrained
from clever.models.heads import Split
from clever.models.layers import normalize
from clever.utils import InputError


class CleanView:
    """PIL image of any mode and size -> normalised float32 [3, S, S], as the evaluations see a clean test image.

    The shorter side is resized to S * 256 / 224 (bicubic), and the centre is cropped.
    """

    def __init__(self, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.views, self.mean, self.std = eval_transform("ori", size), mean, std
        self.renderer = choose_renderer("auto")

    def __call__(self, image: Image.Image) -> Tensor:
        image = to_rgb(image)
        view = self.views.draw_seeded([0], [image.height], [image.width])  # the same for every seed
        (pixels,) = render_batch([np.array(image)], view, self.renderer)  # uint8 [1, 1, 3, S, S]
        return normalize(pixels[0, 0], self.mean, self.std)


class LoadedBackbone(NamedTuple):
    """What `load_backbone` returns.

    Args:
        network: images [B, 3, S, S] -> representation z [B, D]; in eval mode and frozen, on the CPU.
        transform: PIL image -> [3, S, S].
        split: z -> IR [B, int(D * hp1)] and EF, the other columns. Raises InputError for a network that has no parts.
    """

    network: nn.Module
    transform: Callable[[Image.Image], Tensor]
    split: Callable[[Tensor], tuple[Tensor, Tensor]]


def load_backbone(
    path: str | Path, checkpoint_key: str = "teacher", *, arch: str | None = None, patch_size: int | None = None,
    net: str | None = None, hp1: float | None = None, img_size: int | None = None,
) -> LoadedBackbone:  # fmt: skip
    """The pretrained backbone of a checkpoint, the transform of its images, and the split of its output.

        network, transform, split = load_backbone("results/photos/checkpoint.pth")
        z = network(transform(Image.open("photo.jpg"))[None])  # 1, D
        ir, ef = split(z)

    Args:
        path: a checkpoint, ours or an original's, or a safetensors file of export.py. No code in it is run.
        checkpoint_key: which network of the checkpoint.
        arch, patch_size, net, hp1, img_size: needed only where the checkpoint does not contain them, as the flags of the
            evaluation scripts.

    Raises:
        InputError: there is no such checkpoint, it is damaged, or it does not fit the arguments.
    """
    args = argparse.Namespace(
        pretrained_weights=str(path), checkpoint_key=checkpoint_key, arch=arch, patch_size=patch_size, net=net, hp1=hp1,
        img_size=img_size,
    )  # fmt: skip
    pretrained = load_pretrained(args, torch.device("cpu"))
    split = partial(_split, pretrained.split, f"split: a {pretrained.net} network with hp1 {pretrained.hp1} has no IR and EF")
    return LoadedBackbone(pretrained.backbone, CleanView(pretrained.img_size, *pretrained.stats), split)


def _split(cut: Split | None, refusal: str, z: Tensor) -> tuple[Tensor, Tensor]:  # at the top: workers of a loader pickle it
    if cut is None:
        raise InputError(refusal)
    return z[..., cut.ir], z[..., cut.ef]
