"""Stochastic depth (Huang et al., arXiv 1603.09382) of residual branches: a dropped sample costs nothing."""

from collections.abc import Callable

import torch
import torchvision
from torch import Tensor


class StochasticDepth(torchvision.ops.StochasticDepth):
    """x + branch(x), where training drops the branch of each sample independently, with probability p.

    Kept branches are scaled by 1 / (1 - p). The branch runs on the kept samples only, as in DINOv2 (arXiv 2304.07193, section
    5), but their number is not fixed. They are drawn by torch's generator of the CPU, whatever the device: the number of kept
    samples is then known without waiting for a GPU. Where the branch runs on all samples, the device draws them.
    """

    def __init__(self, p: float) -> None:
        super().__init__(p, mode="row")

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor], all_samples: bool = False) -> Tensor:
        """x [B, ...] -> [B, ...].

        Args:
            branch: maps [B', ...] to [B', ...] for any B' of at least 1.
            all_samples: run the branch on all samples, and drop its results. Needed if it mixes samples, as batch norm does.
        """
        if not self.training or self.p == 0:
            return x + branch(x)
        keep_prob = 1 - self.p
        scale = 1 / keep_prob if keep_prob else 0.0
        # A graph has fixed shapes: while a compiler or fvcore records one, the branch runs on all samples.
        if all_samples or torch.compiler.is_compiling() or torch.jit.is_tracing():
            weights = torch.empty(len(x), device=x.device).bernoulli_(keep_prob) * scale  # [B], 0 where the branch is dropped
            return x + branch(x) * weights.view(-1, *[1] * (x.ndim - 1))
        kept = torch.empty(len(x)).bernoulli_(keep_prob)  # [B], 1 where the branch is kept
        indices = kept.nonzero().squeeze(1)  # [B']
        if not len(indices):  # one sample with weight 0: distributed training needs a gradient of every parameter
            indices, scale = torch.zeros(1, dtype=torch.long), 0.0
        indices = indices.to(x.device, non_blocking=True)
        return x.index_add(0, indices, branch(x.index_select(0, indices)).to(x.dtype), alpha=scale)
