"""Activation checkpointing (Chen et al., arXiv 1604.06174) of ResNet stages, ViT blocks and VMamba blocks.

The activations inside a module are not kept for the backward pass but recomputed there: less memory, one more forward pass.
Random numbers are drawn again as they were, and batch norms count a batch once, so the results are the same.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def checkpointed(module: nn.Module, x: Tensor, enabled: bool = True) -> Tensor:
    """module(x), recomputed in the backward pass if `enabled`, in training mode and with gradients; otherwise a plain call."""
    if not (enabled and module.training and torch.is_grad_enabled()):
        return module(x)
    return _checkpoint(module, module, x)


class CheckpointedSequential(nn.Sequential):
    """nn.Sequential that is recomputed in the backward pass, with the same state-dict names."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x)
        return _checkpoint(super().forward, self, x)


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
