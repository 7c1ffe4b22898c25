"""EquiMod: a network that is told what was done to a view predicts its embedding; and the variant of pairs of views.

Shapes: B images; d width of the features, E of the embeddings; p columns of a code that are told.
"""

import argparse
import functools
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clever.data.augmentations import ViewDistribution, eval_transform
from clever.data.codes import COLUMNS, absolute, relative
from clever.methods.pairs import at_least_float32
from clever.methods.term import Term, gather_with_gradient, mlp

norm = functools.partial(nn.BatchNorm1d, affine=False)


class EquiMod(Term):
    """The embedding of a view, predicted from that of the clean image and from what was drawn for the view; contrastive.

    Devillers and Lefort, EquiMod (arXiv 2211.01244), section 3, as in the authors' code:

        y0, y1, y2 = projector(z of the clean view, view 1, view 2)         # B, E each; one call on 3B rows
        yhat_v = predictor([y0, code_projector(code of view v)])            # one call on 2B rows
        term = nt_xent([y1; y2; yhat1; yhat2])                              # temperature 0.2

    The clean view is the resized centre crop. Nothing is detached. All other rows are negatives, even those of the same image
    (the paper's equation 4 leaves these out).
    On DINO: the student sees the clean view after all others (there: in one batch with them), and as in the authors' BYOL no
    teacher takes part. Codes are what --equiv_params names, standardised by a BatchNorm without gain, as their statistics
    depend on the recipe (there: by fixed numbers).
    """

    about: ClassVar[str] = "DINO, and the embedding of a view predicted from that of the clean image (EquiMod)"
    compares: ClassVar[bool] = True
    temperature: ClassVar[float] = 0.2
    hidden: ClassVar[int] = 2048  # width of the projector's hidden layers
    code_gain: ClassVar[bool] = True  # whether the last norm of the code's projector has a gain and a bias

    def __init__(
        self, dim: int, args: argparse.Namespace, groups: Sequence[str], hidden: int | None = None, embedding: int = 128
    ):
        super().__init__()
        self.groups, hidden = list(groups), hidden or self.hidden
        told = absolute(torch.zeros(1, len(COLUMNS)), self.groups).shape[1]
        self.projector = nn.Sequential(*mlp(dim, hidden, hidden, embedding, last_bias=False), norm(embedding))
        self.code_projector = nn.Sequential(
            norm(told), nn.Linear(told, embedding, bias=False), norm(embedding, affine=self.code_gain)
        )
        self.predictor = nn.Sequential(nn.Linear(2 * embedding, embedding, bias=False), norm(embedding))

    @staticmethod
    def extra_views(args: argparse.Namespace) -> list[ViewDistribution]:
        return eval_transform("ori", args.global_crops_size).distributions

    def forward(self, z: Tensor, codes: Tensor, extra: Tensor) -> dict[str, Tensor]:
        """As `Term.forward`, with features [B, d] of the clean view as `extra` -> term and eqgain, see `compare`."""
        told = absolute(codes[:, : len(z)], self.groups).transpose(0, 1).flatten(0, 1)  # 2B, p
        return compare(*self.embed(torch.cat([extra, *z]), told), self.temperature)

    def embed(self, features: Tensor, told: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features [3B, d] of clean view, view 1, view 2, and codes [2B, p] -> y0 twice, y, yhat, [2B, E] each."""
        clean, *views = self.projector(features).chunk(3)  # B, E
        start = torch.cat([clean, clean])
        return start, torch.cat(views), self.predictor(torch.cat([start, self.code_projector(told)], dim=1))


class EquiModPair(EquiMod):
    """The embedding of one global view, predicted from that of the other and from how they differ.

    Most comparisons call this EquiMod (arXiv 2302.10283, 2505.03176). Here as in the latter's code, seq-JEPA:

        y1, y2 = projector(z1), projector(z2)                               # B, E; a call for each view
        yhat2 = predictor([code_projector(d12), y1])                        # d12: relative code
        term = nt_xent([yhat2; y2])                                         # temperature 0.1

    On DINO: the mean of both directions, as the two views have different distributions (there: one direction).
    d12 is standardised as above (there: divided by its norm).
    """

    about: ClassVar[str] = "DINO, and the embedding of a view predicted from that of the other (EquiMod without a clean view)"
    temperature: ClassVar[float] = 0.1
    hidden: ClassVar[int] = 1024
    code_gain: ClassVar[bool] = False

    @staticmethod
    def extra_views(args: argparse.Namespace) -> list[ViewDistribution]:
        return []

    def forward(self, z: Tensor, codes: Tensor, extra: None = None) -> dict[str, Tensor]:
        """As `Term.forward` -> term and eqgain, see `compare`."""
        code1, code2 = codes[:, 0], codes[:, 1]
        y1, y2 = (self.projector(features) for features in z)  # B, E
        there = self.predict(y1, y2, torch.cat([*relative(code1, code2, self.groups).values()], dim=1))
        back = self.predict(y2, y1, torch.cat([*relative(code2, code1, self.groups).values()], dim=1))
        return {name: (there[name] + back[name]) / 2 for name in there}

    def predict(self, y1: Tensor, y2: Tensor, d12: Tensor) -> dict[str, Tensor]:
        """One direction: embeddings [B, E] and relative codes [B, p] -> term and eqgain."""
        return compare(y1, y2, self.predictor(torch.cat([self.code_projector(d12), y1], dim=1)), self.temperature)


def compare(start: Tensor, goal: Tensor, predicted: Tensor, temperature: float) -> dict[str, Tensor]:
    """Embeddings [N, E] -> "term": NT-Xent of goal and predicted, over all processes; "eqgain", which should be above 0.

    eqgain: mean of cos(goal, predicted) - cos(goal, start), the gain over predicting that nothing changes.
    """
    with torch.autocast(goal.device.type, enabled=False):
        start, goal, predicted = (at_least_float32(rows) for rows in (start, goal, predicted))
        term = nt_xent(torch.cat([gather_with_gradient(goal), gather_with_gradient(predicted)]), temperature)
        with torch.no_grad():
            gain = F.cosine_similarity(goal, predicted) - F.cosine_similarity(goal, start)  # N
    return {"term": term, "eqgain": gain.mean()}


def nt_xent(rows: Tensor, temperature: float) -> Tensor:
    """Rows [2N, E] -> mean cross-entropy of naming the partner of row i, row i+N, by its cosine among all other rows."""
    rows = F.normalize(rows, dim=1)
    similarity = rows @ rows.T / temperature  # 2N, 2N
    similarity = similarity.masked_fill(torch.eye(len(rows), dtype=torch.bool, device=rows.device), float("-inf"))
    partners = torch.arange(len(rows), device=rows.device).roll(len(rows) // 2)  # 2N
    return F.cross_entropy(similarity, partners)
