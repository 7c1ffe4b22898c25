"""A small network with every kind of parameter, and gradients for it."""

import torch
from torch import nn


def small_network() -> nn.Module:
    """With 1-D, 2-D and 4-D parameters, biases and buffers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5))


def with_gradients(network: nn.Module, scale: float = 1.0) -> nn.Module:
    torch.manual_seed(1)
    for p in network.parameters():
        p.grad = scale * torch.randn_like(p)
    return network
