"""What all backbones share: normalised pixels, stochastic depth (arXiv 1603.09382), and activation checkpointing.

Activation checkpointing (Chen et al., arXiv 1604.06174): the activations inside a ResNet stage, a ViT block or a VMamba block
are not kept for the backward pass but recomputed there: less memory, one more forward pass. Random numbers are drawn again as
they were, and batch norms count a batch once, so the results are the same.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clever.utils import IMAGENET_MEAN, IMAGENET_STD


def normalize(pixels: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """uint8 [..., 3, H, W] -> float32, normalised with the channels' mean and standard deviation for pixels in 0..1."""
    mean, std = (_per_channel(tuple(values), pixels.device) for values in (mean, std))  # 3, 1, 1
    return pixels.to(torch.float32).sub_(mean).div_(std)


@functools.cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Values for pixels in 0..1 -> [3, 1, 1] for pixels in 0..255. Kept: a copy to a GPU waits for the GPU's earlier work."""
    return 255 * torch.tensor(values, device=device)[:, None, None]


class StochasticDepth(torchvision.ops.StochasticDepth):
    """x + branch(x), where training drops the branch of each sample independently, with probability p.

    Branches run on the kept samples only, as in DINOv2 (arXiv 2304.07193, section 5), and are scaled by 1 / (1 - p). Which are
    kept is drawn by the CPU, as a GPU would have to be waited for; by the device where a branch runs on all samples.
    """

    has_fixed_shapes = False  # whether all instances run their branches on all samples: while CUDA graphs are recorded

    def __init__(self, p: float) -> None:
        super().__init__(p, mode="row")
        # Tensors: compiled blocks that differ in p share their code. On the CPU: kernels take scalars from there, not copied.
        self.is_active, self.keep, self.scale = p > 0, torch.tensor(1 - p), torch.tensor(1 / (1 - p) if p < 1 else 0.0)

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor], all_samples: bool = False) -> Tensor:
        """x [B, ...] -> [B, ...].

        Args:
            branch: maps [B', ...] to [B', ...] for any B' of at least 1.
            all_samples: run the branch on all samples, and drop its results. Needed if it mixes samples, as batch norm does.
        """
        if not (self.training and self.is_active):
            return x + branch(x)
        # A graph has fixed shapes: while a compiler or fvcore records one, the branch runs on all samples.
        if all_samples or self.has_fixed_shapes or torch.compiler.is_compiling() or torch.jit.is_tracing():
            weights = (torch.rand(len(x), device=x.device) < self.keep) * self.scale  # [B], 0 where the branch is dropped
            return x + branch(x) * weights.view(-1, *[1] * (x.ndim - 1))
        indices = torch.empty(len(x)).bernoulli_(1 - self.p).nonzero().squeeze(1)  # [B'], where the branch is kept
        if not len(indices):  # distributed training needs a gradient of every parameter
            return x + 0 * branch(x)
        indices = indices.to(x.device, non_blocking=True)
        return x.index_add(0, indices, branch(x.index_select(0, indices)).to(x.dtype), alpha=float(self.scale))


def checkpointed(module: nn.Module, x: Tensor, enabled: bool = True) -> Tensor:
    """module(x), recomputed in the backward pass if `enabled`, in training mode and with gradients; otherwise a plain call."""
    recomputes = enabled and module.training and torch.is_grad_enabled()
    return _checkpoint(module, module, x) if recomputes else module(x)


class CheckpointedSequential(nn.Sequential):
    """nn.Sequential that is recomputed in the backward pass, with the same state-dict names."""

    def forward(self, x: Tensor) -> Tensor:
        forward, recomputes = super().forward, self.training and torch.is_grad_enabled()
        return _checkpoint(forward, self, x) if recomputes else forward(x)


def _checkpoint(function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> Tensor:
    if not list(module.buffers()):
        return checkpoint(function, x, use_reentrant=False)  # torch.compile does not support contexts of our own
    contexts = nullcontext(), PreservedBuffers(module)  # of the forward pass, of the recomputation
    return checkpoint(function, x, use_reentrant=False, context_fn=lambda: contexts)


class PreservedBuffers(AbstractContextManager):
    """Within this context a module works on copies of its buffers: batch norms do not update their running statistics.

    `track_running_stats = False` would not do: checkpointing requires the recomputation to save as many tensors as the
    forward pass did, and batch norm saves its running statistics.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        owners = list(self.module.modules())
        self.buffers = [(owner, name, buffer) for owner in owners for name, buffer in owner.named_buffers(recurse=False)]
        for owner, name, buffer in self.buffers:
            setattr(owner, name, buffer.clone())

    def __exit__(self, *exception: object) -> None:
        for owner, name, buffer in self.buffers:
            setattr(owner, name, buffer)
