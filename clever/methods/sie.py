"""SIE: on the equivariant factor (EF), a linear map made from the transformation takes one view's embedding to the other's.

Shapes: B images, G in all processes; d width of the EF, E of the embeddings; P columns of a relative code.
"""

import argparse
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clever.data.codes import COLUMNS, absolute, relative
from clever.methods.pairs import at_least_float32
from clever.methods.term import Term, gather_with_gradient, mlp
from clever.utils import InputError

EQUI, STD, COV = 4.5, 10.0, 1.0  # the authors' weights


class SIE(Term):
    """A prediction of the EF of one view from that of the other, with VICReg's regularisers against collapse.

    Garrido, Najman and LeCun, Self-Supervised Learning of Split Invariant Equivariant Representations (arXiv 2302.10283),
    section 4, with the weights of the authors' README (their default of the factor of equi, 4.5, would mean 45):

        x, y = projector(z1), projector(z2)                         # B, E; EF of the global views; a call for each
        yhat = predict(d12, x)                                      # W(d12) x, d12: relative code
        equi = mean((yhat - y)^2)
        std, predstd = variance_hinge(x) + variance_hinge(y), variance_hinge(yhat)
        cov = covariance(x) + covariance(y)
        term = equi + 10/4.5 (std + predstd) + 1/4.5 cov

    On DINO: its loss on the IR takes the place of the invariant part's mean square error, and the regularisers see the EF
    alone. equi and predstd are means of both directions, as the views have different distributions (there: one direction).
    A rotation is told as sine and cosine of its angle, of which a map that rotates is linear (there: a quaternion, of one
    in 3-D). A constant 1 is added to the code, without which a code of zeros would predict zeros; a quaternion is never zero. E
    is 256 (there: 1024): the map has P E^2 weights, and covariances of many more columns than images are noise. `hidden`: of
    the projector; default E.
    """

    about: ClassVar[str] = "DINO on the IR; on the EF, a map made from the transformation predicts the other view (SIE)"
    part: ClassVar[str] = "EF"
    parts: ClassVar[tuple[str, ...]] = ("EF",)
    compares: ClassVar[bool] = True

    def __init__(self, dim: int, args: argparse.Namespace, groups: Sequence[str], hidden: int | None = None):
        super().__init__()
        if dim < 2:
            raise InputError(f"--hp1 {args.hp1}: leaves an EF of {dim} column, which has no covariance")
        self.groups, E = list(groups), args.sie_width
        told = absolute(torch.zeros(1, len(COLUMNS)), self.groups).shape[1]
        self.projector = mlp(dim, hidden or E, hidden or E, E, bias=True, last_bias=False)
        self.hypernetwork = nn.Linear(told + 1, E * E, bias=False)

    @staticmethod
    def add_arguments(group: argparse._ArgumentGroup) -> None:
        group.add_argument("--sie_width", type=int, default=256, help="width of the EF's embeddings; at most about four times "
            "the images of a micro-batch, for the sake of their covariance. The authors': 1024")  # fmt: skip

    @staticmethod
    def check_args(args: argparse.Namespace) -> None:
        if args.sie_width < 2:
            raise InputError(f"--sie_width {args.sie_width}: must be 2 or greater")

    def forward(self, z: Tensor, codes: Tensor, extra: None = None) -> dict[str, Tensor]:
        """As `Term.forward` -> the values of `compare`."""
        code1, code2 = codes[:, 0], codes[:, 1]
        return self.compare(z, self.describe(code1, code2), self.describe(code2, code1))

    def describe(self, codes1: Tensor, codes2: Tensor) -> Tensor:
        """Codes of two views -> relative codes [B, P], with a constant 1 as the last column."""
        told = relative(codes1, codes2, self.groups).values()
        return torch.cat([*told, codes1.new_ones(len(codes1), 1)], dim=1)

    def compare(self, z: Tensor, d12: Tensor, d21: Tensor) -> dict[str, Tensor]:
        """Features [2, B, d] and relative codes [B, P] -> term and its parts, over all processes, and the spread.

        spread: standard deviation of the embeddings, mean over columns; 0 after a collapse.
        """
        x, y = (self.projector(features) for features in z)  # B, E
        with torch.autocast(z.device.type, enabled=False):
            x, y, maps = at_least_float32(x), at_least_float32(y), self.hypernetwork.weight
            rows = [x, y, predict(d12, x, maps), predict(d21, y, maps)]
            x, y, yhat, xhat = (gather_with_gradient(part) for part in rows)  # G, E
            equi = (F.mse_loss(yhat, y) + F.mse_loss(xhat, x)) / 2
            std = variance_hinge(x) + variance_hinge(y)
            predstd = (variance_hinge(yhat) + variance_hinge(xhat)) / 2
            cov = covariance(x) + covariance(y)
            term = equi + STD / EQUI * (std + predstd) + COV / EQUI * cov
            spread = torch.cat([x.detach().std(0), y.detach().std(0)]).mean()
        return {"term": term, "equi": equi, "std": std, "predstd": predstd, "cov": cov, "spread": spread}


def predict(codes: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """W(c) x, [B, E], for codes c [B, P], x [B, E] and weight [E*E, P]: W(c) = sum_k c_k W_k, W_k is column k, row-major."""
    maps = weight.unflatten(0, (x.shape[1], x.shape[1]))  # E, E, P
    mapped = torch.einsum("oip,bi->bop", maps, x)  # instead of W(c), which would have B * E * E entries
    return torch.einsum("bop,bp->bo", mapped, codes)


def variance_hinge(x: Tensor) -> Tensor:
    """Rows [G, E] -> half the mean over columns of relu(1 - sqrt(variance + 1e-4))."""
    return F.relu(1 - (x.var(0) + 1e-4).sqrt()).mean() / 2


def covariance(x: Tensor) -> Tensor:
    """Rows [G, E] -> the sum of the squared covariances of different columns, divided by E."""
    x = x - x.mean(0)
    cov = x.T @ x / (len(x) - 1)  # E, E
    return (cov - cov.diagonal().diag()).square().sum() / x.shape[1]
