"""The 2D selective scan as a short graph of plain, functional PyTorch operations, for programs that run without this package.

Exported programs (ONNX, torch.export) contain neither our operators nor Python loops: the scan of `scan_reference` would be
unrolled to a node for each of thousands of positions. Here the recurrence takes log2(L) steps: step s lets every position
take in the result of the position 2^s before it (Hillis and Steele, "Data parallel algorithms", CACM 1986). The work is
L log L instead of L, which is why training uses other backends.

Shapes: D channels of a direction, L = H*W positions, N states of a channel, R rank of delta.
"""

import torch
from einops import einsum
from torch import Tensor
from torch.nn.functional import softplus

import vmamba.selective_scan  # noqa: F401  registers the operator that an export replaces by this graph
from vmamba.scan_reference import compute_dtype, cross_merge, cross_scan


def linear_recurrence(decay: Tensor, h: Tensor) -> Tensor:
    """h_l = decay_l h_{l-1} + h_l along the last dimension, from a state of 0.

    After a step of length d, h_l is the sum over the last 2d positions, and decay_l the product of their decays.
    """
    distance, length = 1, h.shape[-1]
    while distance < length:
        before, now = slice(None, -distance), slice(distance, None)
        h = torch.cat([h[..., :distance], h[..., now] + decay[..., now] * h[..., before]], dim=-1)
        decay = torch.cat([decay[..., :distance], decay[..., now] * decay[..., before]], dim=-1)
        distance *= 2
    return h


def selective_scan_2d_doubling(
    x: Tensor, proj: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor | None, dt_bias: Tensor | None
) -> Tensor:
    """As `scan_reference.selective_scan_2d_reference`: x [B, H, W, D], proj [B, H, W, 4, R + 2N] -> y [B, H, W, D]."""
    _, H, W, _ = x.shape
    rank, states = dt_weight.shape[-1], A.shape[-1]
    dtype = compute_dtype(x)
    proj = torch.stack([cross_scan(proj[..., k, :].to(dtype))[:, k] for k in range(4)], dim=1)  # [B, 4, R + 2N, L]
    dt, B, C = proj.split([rank, states, states], dim=2)
    delta = einsum(dt_weight.to(dtype), dt, "k d r, b k r l -> b k d l")
    delta = softplus(delta if dt_bias is None else delta + dt_bias.view(4, -1, 1))
    u = cross_scan(x.to(dtype))  # [B, 4, D, L]
    decay = torch.exp(delta[:, :, :, None] * A.view(4, -1, states, 1))  # [B, 4, D, N, L]
    h = linear_recurrence(decay, (delta * u)[:, :, :, None] * B[:, :, None])
    y = (h * C[:, :, None]).sum(dim=3)  # [B, 4, D, L]
    y = y if D is None else y + D.view(4, -1, 1) * u
    return cross_merge(y, H, W)
