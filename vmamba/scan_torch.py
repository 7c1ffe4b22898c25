"""The selective scan in plain PyTorch, chunked over positions and with its own backward pass: the backend `torch` of the 2D
scan, and the scan of sequences.

It runs everywhere and computes what `scan_reference` defines. It works on one direction at a time, [B, L, D], and on one state
after the other, so that the tensors stay in cache. Nothing is kept for the backward pass but the inputs: it scans again.

Shapes: K directions, D channels of a direction, L = H*W positions, N states of a channel, R rank of delta.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import linear, softplus

from vmamba.scan_reference import ScanInputs, compute_dtype

CHUNK = 8  # positions of a chunk; one Python step handles one position of every chunk


def linear_recurrence_(decay: Tensor, h: Tensor, reverse: bool = False) -> None:
    """h_l = decay_l h_{l-1} + h_l in place, along dimension 1 of [B, L, D]; `reverse`: with l+1 for l-1. Overwrites `decay`.

    1. All chunks advance together, each from a state of zero, position by position; `decay` becomes the product of the decays
       since the start of the chunk.
    2. The last positions of the chunks form a recurrence of the same kind, `CHUNK` times shorter: solved by recursion.
    3. Its result is carried into the other positions of the next chunk.

    So the work is linear in L, and the number of Python steps logarithmic.
    """
    length = h.shape[1]
    if length == 1:
        return
    step = min(CHUNK, length)

    def position(tensor: Tensor, index: int) -> Tensor:
        """Position `index` of every chunk that has one, in the order of the scan: chunks begin at the end in reverse."""
        return tensor[:, (length - 1 - index) % step :: step] if reverse else tensor[:, index::step]

    def first(tensor: Tensor, count: int) -> Tensor:
        """The `count` chunks that are scanned first."""
        return tensor[:, tensor.shape[1] - count :] if reverse else tensor[:, :count]

    def all_but_first(tensor: Tensor) -> Tensor:
        return tensor[:, :-1] if reverse else tensor[:, 1:]

    for index in range(1, step):
        h_now, h_before = position(h, index), position(h, index - 1)
        decay_now, decay_before = position(decay, index), position(decay, index - 1)
        h_now.addcmul_(decay_now, first(h_before, h_now.shape[1]))
        decay_now.mul_(first(decay_before, h_now.shape[1]))
    ends = position(h, step - 1)
    linear_recurrence_(position(decay, step - 1), ends, reverse)
    for index in range(step - 1):
        h_now = all_but_first(position(h, index))
        h_now.addcmul_(all_but_first(position(decay, index)), first(ends, h_now.shape[1]))


def _scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool) -> Tensor:
    """Scan of one direction, without the term D u.

    u: [B, L, D]; delta: [B, L, D], after softplus; A: [D, N]; B, C: [B, L, N]. Returns y: [B, L, D].
    """
    y = torch.zeros_like(u)
    delta_u = delta * u
    for n in range(A.shape[1]):
        h = delta_u * B[..., n, None]  # [B, L, D]
        linear_recurrence_((delta * A[:, n]).exp_(), h, reverse)
        y.addcmul_(h, C[..., n, None])
    return y


def _scan_backward(
    gy: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `_scan` for u, delta, A, B, C.

    The gradient g of the state is a scan in the opposite direction: g_l = C_l gy_l + decay_{l+1} g_{l+1}.
    """
    now, before = (slice(None, -1), slice(1, None)) if reverse else (slice(1, None), slice(None, -1))
    delta_u = delta * u
    ddelta_u, ddelta = torch.zeros_like(u), torch.zeros_like(u)
    dA, dB, dC = torch.zeros_like(A), torch.empty_like(B), torch.empty_like(C)
    for n in range(A.shape[1]):
        decay = (delta * A[:, n]).exp_()  # [B, L, D]
        h = delta_u * B[..., n, None]
        linear_recurrence_(decay.clone(), h, reverse)
        dC[..., n] = (gy * h).sum(-1)

        g = gy * C[..., n, None]
        decay_next = torch.zeros_like(decay)
        decay_next[:, before] = decay[:, now]
        linear_recurrence_(decay_next, g, not reverse)
        dB[..., n] = (g * delta_u).sum(-1)
        ddelta_u.addcmul_(g, B[..., n, None])

        dlog_decay = g[:, now] * decay[:, now] * h[:, before]  # log(decay) = delta A; zero at the first position
        ddelta[:, now].addcmul_(dlog_decay, A[:, n])
        dA[:, n] = dlog_decay.mul_(delta[:, now]).sum((0, 1))
    ddelta.addcmul_(ddelta_u, u)
    return ddelta_u.mul_(delta), ddelta, dA, dB, dC


def unavailable_reason(device: torch.device) -> str | None:
    """This backend runs everywhere."""
    return None


def saved_states_shape(batch: int, channels: int, length: int, states: int) -> tuple[int, ...]:
    """Shape of the states that forward keeps for backward: none, backward scans again."""
    return (0,)


class DirectionScan(torch.autograd.Function):
    """`_scan` of u, delta, A, B, C, from the first position to the last, with its gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return _scan(*inputs, reverse=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gy: Tensor) -> tuple[Tensor, ...]:
        return _scan_backward(gy.contiguous(), *ctx.saved_tensors, reverse=False)


def scan_sequences(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """y, [B, K*D, L]. Arguments: see `scan_reference.selective_scan_reference`."""
    dtype, K = compute_dtype(u), B.shape[1]
    u, delta, A, B, C = (tensor.to(dtype) for tensor in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = softplus(delta)

    def directions(tensor: Tensor) -> list[Tensor]:
        """[B, K*D, L] or [B, K, N, L] -> K contiguous tensors [B, L, D or N]."""
        parts = tensor.chunk(K, dim=1)  # [B, D, L] or [B, 1, N, L]
        return [part.flatten(1, -2).transpose(1, 2).contiguous() for part in parts]

    inputs = zip(directions(u), directions(delta), A.chunk(K), directions(B), directions(C), strict=True)
    y = torch.cat([DirectionScan.apply(*each).transpose(1, 2) for each in inputs], dim=1)  # [B, K*D, L]
    return y if D is None else y + D.to(dtype)[:, None] * u


def _transpose_image(tensor: Tensor) -> Tensor:
    """[B, H, W, ...] -> [B, W, H, ...], contiguous: columns are then read as rows."""
    return tensor.transpose(1, 2).contiguous()


def forward_2d(
    x: Tensor, proj: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor | None, dt_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y, [B, H, W, D], and the states that backward needs: none. Shapes of the arguments: `ScanInputs`.

    Directions 2 and 3 scan the sequences of 0 and 1 backwards, without a reversed copy.
    """
    _, H, W, channels = x.shape
    dtype, rank, states = compute_dtype(x), dt_weight.shape[-1], A.shape[-1]
    x, proj = x.to(dtype), proj.to(dtype)
    As, biases = A.chunk(4), dt_bias.chunk(4) if dt_bias is not None else [None] * 4
    ys = []
    for order in range(2):  # by rows, by columns
        image, projected = (x, proj) if order == 0 else (_transpose_image(x), _transpose_image(proj))
        u, projected = image.flatten(1, 2), projected.flatten(1, 2)  # [B, L, D], [B, L, 4, R + 2N]
        for k in (order, order + 2):
            dt, B, C = projected[:, :, k].split([rank, states, states], dim=-1)
            delta = softplus(linear(dt, dt_weight[k], biases[k]))  # [B, L, D]
            ys.append(_scan(u, delta, As[k], B, C, reverse=k >= 2))
    by_rows, by_columns = ys[0].add_(ys[1]), ys[2].add_(ys[3])  # [B, L, D]
    y = rearrange(by_rows, "b (h w) d -> b h w d", h=H)
    y += rearrange(by_columns, "b (w h) d -> b h w d", w=W)
    if D is not None:
        y.addcmul_(x, D.view(4, channels).sum(0))
    return y, y.new_empty(0)


def backward_2d(gy: Tensor, inputs: ScanInputs, saved: Tensor) -> ScanInputs:
    """Gradients of the inputs of `forward_2d` for the gradient gy [B, H, W, D] of y."""
    x, proj, dt_weight, A, D, dt_bias = inputs
    channels = x.shape[-1]
    dtype, rank, states = compute_dtype(x), dt_weight.shape[-1], A.shape[-1]
    image, proj_image = x.to(dtype), proj.to(dtype)
    As, biases = A.chunk(4), dt_bias.chunk(4) if dt_bias is not None else [None] * 4
    dproj, ddt_weight, dA = torch.empty_like(proj_image), torch.empty_like(dt_weight), torch.empty_like(A)
    dbias = torch.empty_like(A[:, 0])

    def backward_of_order(order: int, gy: Tensor, x: Tensor, proj: Tensor, dproj: Tensor) -> Tensor:
        """Directions `order` and `order + 2` of images whose rows are their sequence: writes their gradients, returns dx."""
        gy, u, projected, dprojected = (tensor.flatten(1, 2) for tensor in (gy, x, proj, dproj))  # [B, L, ...]
        total = torch.zeros_like(u)
        for k in (order, order + 2):
            dt, B, C = projected[:, :, k].split([rank, states, states], dim=-1)
            raw_delta = linear(dt, dt_weight[k], biases[k])
            du, ddelta, dA_k, dB, dC = _scan_backward(gy, u, softplus(raw_delta), As[k], B, C, reverse=k >= 2)
            ddelta.mul_(raw_delta.sigmoid_())
            total += du
            dprojected[:, :, k] = torch.cat([ddelta @ dt_weight[k], dB, dC], dim=-1)
            ddt_weight[k] = ddelta.flatten(0, 1).T @ dt.flatten(0, 1)
            rows = slice(k * channels, (k + 1) * channels)
            dA[rows], dbias[rows] = dA_k, ddelta.sum((0, 1))
        return total.view_as(x)

    dx = backward_of_order(0, gy, image, proj_image, dproj)
    transposed = [_transpose_image(tensor) for tensor in (gy, image, proj_image)]
    dproj_transposed = torch.empty_like(transposed[-1])
    dx += backward_of_order(1, *transposed, dproj_transposed).transpose(1, 2)
    dproj[:, :, :, 1::2] = dproj_transposed.transpose(1, 2)[:, :, :, 1::2]
    dD = None
    if D is not None:
        dx.addcmul_(gy, D.view(4, channels).sum(0))
        dD = (gy * image).sum((0, 1, 2)).repeat(4)
    return dx.to(x.dtype), dproj.to(proj.dtype), ddt_weight, dA, dD, dbias if dt_bias is not None else None
