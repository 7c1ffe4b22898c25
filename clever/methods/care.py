"""CARE: images that are transformed alike keep their inner products.

Shapes: B images in chunks of n, which share random numbers; E width of the embeddings.
"""

import argparse
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clever.data.augmentations import MultiCropAugmentation, ViewDistribution
from clever.methods.pairs import at_least_float32
from clever.methods.term import Term
from clever.utils import InputError


class CARE(Term):
    """Equal inner products of the embeddings of two views, among images that were transformed alike.

    Gupta et al., Structuring Representation Geometry with Rotationally Equivariant Contrastive Learning (arXiv 2306.13924):
    a transformation acts on the sphere as one orthogonal map of all images, which leaves their inner products as they are.

        a, b = unit(embedding of view 1), unit(embedding of view 2)               # n, E of a chunk
        term = mean over chunks of 2/n sum_{i != j} (<a_i, a_j> - <b_i, b_j>)^2

    As in the authors' code: two extra global views, without stop-gradient, and the embeddings are those of the base loss, which
    keeps them spread; embeddings of a projector that nothing else uses collapse. There it is the contrastive loss's projector,
    here the student's head as far as its bottleneck. The EF has no such head: hence no --equiv_part EF. Weight and n: 0.03 and
    16 as for CIFAR-10; CIFAR-100: 0.001 and 64, ImageNet-100: 0.005 and 8, there without random crops in the extra views.

    On DINO: the extra views are drawn as the two global views of --aug; the student sees both as one batch (there: one call per
    view), which matters to batch norms alone. The images of a chunk share random numbers, in the authors' code all of a batch.
    """

    about: ClassVar[str] = "DINO, and equal inner products among images that are transformed alike (CARE)"
    lambd: ClassVar[float] = 0.03
    is_told: ClassVar[bool] = False
    parts: ClassVar[tuple[str, ...]] = ("ALL",)
    takes_embeddings: ClassVar[bool] = True

    def __init__(self, dim: int, args: argparse.Namespace, groups: Sequence[str] = ()):
        super().__init__()
        self.chunk = args.care_chunk

    @staticmethod
    def add_arguments(group: argparse._ArgumentGroup) -> None:
        group.add_argument("--care_chunk", type=int, default=16, help="images that are transformed alike; a divisor of "
            "--batch_size_per_gpu")  # fmt: skip

    @staticmethod
    def check_args(args: argparse.Namespace) -> None:
        if args.care_chunk < 2 or args.batch_size_per_gpu % args.care_chunk:
            raise InputError(f"--care_chunk {args.care_chunk}: must be 2 or greater, and divide --batch_size_per_gpu "
                f"{args.batch_size_per_gpu}")  # fmt: skip

    @staticmethod
    def extra_views(args: argparse.Namespace) -> list[ViewDistribution]:
        scale, size = args.global_crops_scale, args.global_crops_size
        return MultiCropAugmentation(args.aug, scale, local_crops_number=0, global_crops_size=size).distributions

    @staticmethod
    def images_per_draw(args: argparse.Namespace) -> int:
        return args.care_chunk

    def forward(self, z: Tensor, codes: Tensor, extra: Tensor) -> dict[str, Tensor]:
        """Embeddings [2B, E] of both views -> the values of `compare`."""
        with torch.autocast(extra.device.type, enabled=False):
            rows1, rows2 = F.normalize(at_least_float32(extra), dim=1).chunk(2)  # B, E
            return compare(rows1, rows2, len(rows1) // self.chunk)


def compare(rows1: Tensor, rows2: Tensor, chunks: int) -> dict[str, Tensor]:
    """Unit rows a and b [B, E] in chunks of n = B // chunks; the last B % chunks rows do not count -> term, and for the log the
    mean error of the inner products, and their spread in view 1 (0: collapse)."""
    products, products2 = (inner_products(rows, chunks) for rows in (rows1, rows2))  # chunks, n * (n - 1) / 2
    errors = products - products2
    term = 4 / (len(rows1) // chunks) * errors.square().sum(1).mean()  # each pair stands for (i, j) and (j, i)
    spread = products.detach().std(correction=0)
    return {"term": term, "inner_product_error": errors.detach().abs().mean(), "inner_product_spread": spread}


def inner_products(rows: Tensor, chunks: int) -> Tensor:
    """Rows [B, E] -> inner products [chunks, n * (n - 1) / 2] of all pairs i < j of a chunk of n = B // chunks rows."""
    n = len(rows) // chunks
    rows = rows[: chunks * n].unflatten(0, (chunks, n))  # chunks, n, E
    i, j = torch.triu_indices(n, n, offset=1, device=rows.device)
    return (rows @ rows.transpose(1, 2))[:, i, j]
