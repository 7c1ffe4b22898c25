"""E-SSL: which of four quarter turns was a small view given?

Shapes: N = B views, of side S; d width of the features.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clever.arguments import check_positive
from clever.data.augmentations import DINO_VIEW, ViewDistribution, check_crop_scale
from clever.methods.pairs import at_least_float32
from clever.methods.term import Term, mlp

SMALL = 96  # side of a global view in pixels, below which the extra view is like it


class ESSL(Term):
    """Cross-entropy of the quarter turn of an extra view, predicted from the features of that view alone.

    Dangovski et al., Equivariant Contrastive Learning (arXiv 2111.00899):

        x = small view of every image                               # B, 3, S, S
        images = rotate(x)                                          # 4B, 3, S, S: by k = 0, 1, 2, 3 quarter turns
        term = cross_entropy(head(backbone(images)), k)

    As for ImageNet in the authors' code (imagenet/simclr): a view of 96 pixels of 5 to 14 % of the image, blurred with
    probability 0.1; the head has two hidden layers of 2048 and a bottleneck of 128. Weight: 0.4 (on DINO, arXiv 2603.06693
    takes 0.3).

    On DINO: the view has DINO's colours, and is upright whatever --aug says, since a rotation of its own would make the label
    ambiguous. The student alone sees it, and DINO's loss does not. If global views have fewer than 96 pixels, 5 to 14 % of the
    image show nothing: the view is then drawn like a global one (there, for CIFAR: half the side, 20 to 100 % of the image).
    With 70 to 100 % of a digit, this term alone learns to name 64 % of the turns in 12 epochs; with 20 to 100 %, half of them.
    """

    about: ClassVar[str] = "DINO, and which of four quarter turns a small extra view was given (E-SSL)"
    lambd: ClassVar[float] = 0.4
    is_told: ClassVar[bool] = False

    def __init__(self, dim: int, args: argparse.Namespace, groups: Sequence[str] = ()):
        super().__init__()
        hidden_layers = mlp(dim, 2048, 2048, 128, norm=nn.LayerNorm, bias=True)
        self.head = nn.Sequential(*hidden_layers, nn.LayerNorm(128), nn.Linear(128, 4))

    @staticmethod
    def add_arguments(group: argparse._ArgumentGroup) -> None:
        add = group.add_argument
        add("--essl_size", type=int, help="side of the extra view, pixels (default: that of a local view; of a global one if "
            f"that is less than {SMALL})")  # fmt: skip
        add("--essl_scale", type=float, nargs="+", help="minimum and maximum share of the image's area in it (default: 0.05 "
            f"0.14; of a global view if that has less than {SMALL} pixels)")  # fmt: skip

    @staticmethod
    def check_args(args: argparse.Namespace) -> None:
        if args.essl_size is not None:
            check_positive(args, "essl_size")
        if args.essl_scale is not None:
            check_crop_scale("essl_scale", args.essl_scale)

    @staticmethod
    def extra_views(args: argparse.Namespace) -> list[ViewDistribution]:
        if args.global_crops_size < SMALL:
            size, scale = args.global_crops_size, args.global_crops_scale
        else:
            size, scale = args.local_crops_size, (0.05, 0.14)
        return [replace(DINO_VIEW, size=args.essl_size or size, scale=tuple(args.essl_scale or scale), blur_p=0.1)]

    def images(self, extra: Tensor) -> Tensor:
        return rotate(extra.flatten(0, 1))

    def forward(self, z: Tensor, codes: Tensor, extra: Tensor) -> dict[str, Tensor]:
        """Features [4N, d] of `images` -> term, and the share of turns that the head names."""
        labels = torch.arange(4, device=extra.device).repeat_interleave(len(extra) // 4)  # 4N
        logits = at_least_float32(self.head(extra))  # 4N, 4
        return {"term": F.cross_entropy(logits, labels), "rotation_accuracy": (logits.argmax(1) == labels).float().mean()}


def rotate(images: Tensor) -> Tensor:
    """Square images [N, 3, S, S] -> [4N, 3, S, S], in blocks turned counter-clockwise by 0, 90, 180 and 270 degrees."""
    return torch.cat([torch.rot90(images, k, dims=(-2, -1)) for k in range(4)])
