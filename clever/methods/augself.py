"""AugSelf: from the features of two views, predict how their augmentations differ.

Shapes: B images; d width of the features; P columns of a code; n of a group (clever/data/codes.py).
"""

import argparse
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clever.data.codes import COLUMNS, relative
from clever.methods.term import Term, mlp


class AugSelf(Term):
    """The difference of the augmentation parameters of the two global views, predicted from the pair of their features.

    Lee et al., Improving Transferability of Representations via Augmentation-Aware Self-Supervision (arXiv 2111.09613):

        Z = [[z1, z2], [z2, z1]]                                    # 2B, 2d: both orders
        D = relative([c1, c2], [c2, c1])                            # 2B, n of every group
        term = sum over groups of MSE(tanh(head(Z)), D), or of BCE(sigmoid(head(Z)), D) for flips

    As in the authors' code: a head with two hidden layers of 512 for every group; all groups weigh the same. Its linear layers
    are initialised uniformly within +-1/sqrt(inputs), which is torch's default. Weight: 1 as for STL-10; ImageNet-100: 0.5.

    On DINO: both features are the student's, so that gradients reach both views (the authors' MoCo reads one from the momentum
    encoder). DINO's crops are larger than the authors', so that the differences are smaller: a larger weight may be needed.
    Ours: rotation by any angle, as sine and cosine of the difference without tanh, which would never reach 1; and all groups
    but crop, color and flip, which the authors leave off, have the form of crop.
    """

    about: ClassVar[str] = "DINO, and the difference of the augmentations, predicted from a pair of views (AugSelf)"

    def __init__(self, dim: int, args: argparse.Namespace, groups: Sequence[str], hidden: int = 512):
        super().__init__()
        example = relative(*torch.zeros(2, 1, len(COLUMNS)), groups)
        self.heads = nn.ModuleDict({group: mlp(2 * dim, hidden, hidden, example[group].shape[1]) for group in groups})

    def forward(self, z: Tensor, codes: Tensor, extra: Tensor | None = None) -> dict[str, Tensor]:
        """Term, and the loss and the R2 of every group."""
        pairs = torch.cat([torch.cat([z[0], z[1]], dim=1), torch.cat([z[1], z[0]], dim=1)])  # 2B, 2d
        code1, code2 = codes[:, 0], codes[:, 1]  # B, P
        targets = relative(torch.cat([code1, code2]), torch.cat([code2, code1]), list(self.heads))  # 2B, n each
        losses, scores = {}, {}
        for group, head in self.heads.items():
            output = head(pairs).to(codes.dtype)  # 2B, n
            losses[f"loss_{group}"] = group_loss(group, output, targets[group])
            scores[f"r2_{group}"] = r2(prediction(group, output.detach()), targets[group])
        return {"term": sum(losses.values())} | losses | scores


def prediction(group: str, output: Tensor) -> Tensor:
    """What a head's output says of the relative code: rotation itself, flips a probability, others in [-1, 1]."""
    if group == "rotation":
        return output
    return output.sigmoid() if group == "flip" else output.tanh()


def group_loss(group: str, output: Tensor, target: Tensor) -> Tensor:
    """The loss of a head's output [m, n] against the relative code [m, n], mean over all entries."""
    if group == "flip":
        return F.binary_cross_entropy_with_logits(output, target)
    return F.mse_loss(prediction(group, output), target)


def r2(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - squared error / squared deviation of the target [m, n] from its mean over the rows; 0 if all rows are equal."""
    deviation = (target - target.mean(0)).square().sum()
    return torch.where(deviation > 0, 1 - (predicted - target).square().sum() / deviation, 0)
