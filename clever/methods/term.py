"""The interface of equivariant terms: what a method adds to the base objective, loss = base + equiv_lambd * term.

A term is on the student's side only. Its networks are trained by the same optimizer and are not in the teacher.

Shapes: B images; d width of the features that the term sees (of the representation, or of its EF); N extra images; P columns of
a code of a view (clever/data/codes.py).
"""

import argparse
from abc import abstractmethod
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from clever.data.augmentations import ViewDistribution
from clever.distributed import all_gather_rows, get_rank, get_world_size


class Term(nn.Module):
    """A term. Subclasses make their networks from (d, args, groups of codes that are told) and define `forward`."""

    about: ClassVar[str]  # one line for --help
    lambd: ClassVar[float] = 1.0  # default of --equiv_lambd
    is_told: ClassVar[bool] = True  # whether it uses the codes of the views
    part: ClassVar[str] = "ALL"  # default of --equiv_part
    parts: ClassVar[tuple[str, ...]] = ("ALL", "EF")  # what may be chosen
    compares: ClassVar[bool] = False  # whether the images of a batch are compared, so that it must have two
    takes_embeddings: ClassVar[bool] = False  # of the extra views, from the bottleneck of DINO's head, instead of features

    @staticmethod
    def add_arguments(group: argparse._ArgumentGroup) -> None:
        """The flags of this term alone."""

    @staticmethod
    def check_args(args: argparse.Namespace) -> None:
        """Raise InputError for invalid values of these flags."""

    @staticmethod
    def extra_views(args: argparse.Namespace) -> list[ViewDistribution]:
        """Distributions of the E views of its own, which are of one size; they never change the base views."""
        return []

    @staticmethod
    def images_per_draw(args: argparse.Namespace) -> int:
        """So many consecutive images of a batch have equal random numbers in the extra views."""
        return 1

    def images(self, extra: Tensor) -> Tensor:
        """Extra views [E, B, 3, S, S] -> the images [N, 3, S, S] whose features the term gets."""
        return extra.flatten(0, 1)

    @abstractmethod
    def forward(self, z: Tensor, codes: Tensor, extra: Tensor | None) -> dict[str, Tensor]:
        """Named values, 0-dim; "term" is what the weight multiplies, the others are logged.

        Args:
            z: the student's features [2, B, d] of the global views.
            codes: [B, 2 + E, P], of the global and the extra views.
            extra: the student's features [N, d] of `images`, or their embeddings if the term takes these.
        """


class WithTerm(nn.Module):
    """The student and a term as one module, which is what distributed training and the optimizer see.

    Without a term, nothing is added to the student's work. `columns`: of the representation that the term sees.
    """

    def __init__(self, student: nn.Module, term: Term | None, columns: slice = slice(None)) -> None:
        super().__init__()
        self.student, self.term, self.columns = student, term, columns

    def forward(self, crops: list[Tensor], codes: Tensor | None = None, extra: Tensor | None = None):
        """Crops [V'*B, 3, S, S], codes [B, 2+E, P], extra views [E, B, 3, S, S] -> output of the heads, values of the term."""
        if self.term is None:
            return self.student(crops), {}
        output, z = self.student(crops, return_features=True)  # V*B, D
        pair = z[: 2 * len(codes), self.columns].unflatten(0, (2, -1))  # 2, B, d
        if extra is not None:  # after the base views, whose batch statistics and random numbers they leave alone
            extra = self.student.backbone(self.term.images(extra))[:, self.columns]  # N, d
            extra = self.student.head.mlp(extra) if self.term.takes_embeddings else extra
        return output, self.term(pair, codes, extra)


def mlp(*widths: int, norm: type[nn.Module] = nn.BatchNorm1d, bias: bool = False, last_bias: bool = True) -> nn.Sequential:
    """Linear layers of these widths; after each but the last a norm and ReLU."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths[:-1]):
        layers += [nn.Linear(n_in, n_out, bias=bias), norm(n_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:], bias=last_bias))


def gather_with_gradient(rows: Tensor) -> Tensor:
    """Rows [m, ...] of all processes, in the order of ranks.

    The gradient is multiplied by the number of processes, by which DistributedDataParallel divides that of a loss of all rows.
    """
    if get_world_size() == 1:
        return rows
    fixed = rows.detach()
    shares = list(all_gather_rows(fixed).chunk(get_world_size()))
    shares[get_rank()] = fixed + get_world_size() * (rows - fixed)
    return torch.cat(shares)
