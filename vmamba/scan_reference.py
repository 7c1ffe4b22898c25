"""The selective scan step by step in plain PyTorch: the definition that every backend is tested against. Slow; start here.

A state-space model turns a sequence u into a sequence y through a hidden state h of N numbers. In continuous time it is
h' = A h + B u, y = C h + D u. With a time step delta it becomes the recurrence of this file, one for each channel:

    h_l = exp(delta_l A) h_{l-1} + delta_l B_l u_l        h before the first position is 0
    y_l = <C_l, h_l> + D u_l                              <.,.> sums over the N states

A is negative, so exp(delta A) lies between 0 and 1: a large delta forgets the past and takes in u_l, a small one keeps the
state and skips u_l. The scan is *selective* because delta, B and C differ from position to position: the network computes
them from its input. A and D are parameters. delta is kept positive by softplus(delta + bias).

(Mamba, arXiv 2312.00752, section 3.) An image has no order, so VMamba (arXiv 2401.10166, section 4) scans it K = 4 times: row
by row, column by column, and both backwards. Each direction has its own A, B, C, D and delta; their results are added.

Shapes: K directions, D channels of a direction, L = H*W positions, N states of a channel, R rank of delta.
"""

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn.functional import softplus

# x [B, H, W, D], proj [B, H, W, 4, R + 2N], dt_weight [4, D, R], A [4*D, N], D and dt_bias [4*D] or None: the inputs of a 2D
# scan as `selective_scan_2d_reference` explains them, or their gradients.
ScanInputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """Selective scan of sequences, one Python step per position; gradients by autograd, of any order.

    Args:
        u, delta: [B, K*D, L].
        A: [K*D, N], negative.
        B, C: [B, K, N, L], shared by the D channels of a direction.
        D, delta_bias: [K*D].

    Returns:
        y: [B, K*D, L], float64 for float64 inputs, otherwise float32.
    """
    dtype = compute_dtype(u)
    u, delta, A, B, C = (tensor.to(dtype) for tensor in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = softplus(delta)
    K, L = B.shape[1], u.shape[-1]
    decay = torch.exp(einsum(delta, A, "b kd l, kd n -> b kd l n"))
    decay = rearrange(decay, "b (k d) l n -> b k d l n", k=K)
    entering = einsum(rearrange(delta * u, "b (k d) l -> b k d l", k=K), B, "b k d l, b k n l -> b k d l n")

    h = torch.zeros_like(entering[..., 0, :])  # [B, K, D, N]
    ys = []
    for step in range(L):
        h = decay[..., step, :] * h + entering[..., step, :]
        ys.append((h * C[:, :, None, :, step]).sum(-1))  # [B, K, D]
    y = rearrange(ys, "l b k d -> b (k d) l")
    return y if D is None else y + D.to(dtype)[:, None] * u


def cross_scan(x: Tensor) -> Tensor:
    """The four sequences of an image: row by row, column by column, and both reversed. [B, H, W, D] -> [B, 4, D, L]."""
    rows = rearrange(x, "b h w d -> b d (h w)")
    columns = rearrange(x, "b h w d -> b d (w h)")
    return torch.stack([rows, columns, rows.flip(-1), columns.flip(-1)], dim=1)


def cross_merge(y: Tensor, height: int, width: int) -> Tensor:
    """Puts the four sequences back in place and adds them: [B, 4, D, L] -> [B, H, W, D]. The transpose of `cross_scan`."""
    rows, columns, rows_reversed, columns_reversed = y.unbind(1)  # [B, D, L] each
    image = rearrange(rows + rows_reversed.flip(-1), "b d (h w) -> b h w d", h=height, w=width)
    return image + rearrange(columns + columns_reversed.flip(-1), "b d (w h) -> b h w d", h=height, w=width)


def selective_scan_2d_reference(
    x: Tensor, proj: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor | None, dt_bias: Tensor | None
) -> Tensor:
    """VMamba's 2D selective scan: four reordered copies of the image, `selective_scan_reference`, and their sum.

    Args:
        x: [B, H, W, D].
        proj: [B, H, W, 4, R + 2N]: dt, B and C of a position for each direction, in this order.
        dt_weight: [4, D, R]: delta of direction k at a position is softplus(dt_weight[k] @ dt + dt_bias).
        A: [4*D, N]; D, dt_bias: [4*D].

    Returns:
        y: [B, H, W, D], float64 for float64 inputs, otherwise float32.
    """
    _, H, W, _ = x.shape
    rank, states = dt_weight.shape[-1], A.shape[-1]
    dtype = compute_dtype(x)
    # Direction k reads its own columns of proj, in its own order.
    proj = torch.stack([cross_scan(proj[..., k, :].to(dtype))[:, k] for k in range(4)], dim=1)  # [B, 4, R + 2N, L]
    dt, B, C = proj.split([rank, states, states], dim=2)
    delta = einsum(dt_weight.to(dtype), dt, "k d r, b k r l -> b k d l")
    u = cross_scan(x.to(dtype))  # [B, 4, D, L]
    y = selective_scan_reference(u.flatten(1, 2), delta.flatten(1, 2), A, B, C, D, dt_bias)  # [B, 4*D, L]
    return cross_merge(rearrange(y, "b (k d) l -> b k d l", k=4), H, W)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Type that scans are computed in: float64 for float64 input, otherwise float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
