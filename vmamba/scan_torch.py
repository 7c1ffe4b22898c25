"""The selective scan in plain PyTorch: a readable reference, and a chunked form with its own backward.

Letters: B batch, K directions, D channels of a direction, L = H*W positions, N states of a channel, R rank of delta.

    delta = softplus(delta + bias)
    h_l = exp(delta_l A) h_{l-1} + delta_l B_l u_l,   h before the first element is 0
    y_l = sum over N of C_l h_l, + D u_l

(Mamba, arXiv 2312.00752, section 3; for images, VMamba, arXiv 2401.10166, section 4.)
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus


def reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """One step of Python per position, differentiable by autograd: what every other form is tested against.

    Args:
        u, delta: [B, K*D, L].
        A: [K*D, N], negative.
        B, C: [B, K, N, L], shared by the D channels of a direction.
        D, delta_bias: [K*D].

    Returns:
        y: [B, K*D, L], float64 for float64 inputs, otherwise float32.
    """
    kind = torch.float64 if u.dtype == torch.float64 else torch.float32
    u, delta, A, B, C = (each.to(kind) for each in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(kind)[:, None]
    if delta_softplus:
        delta = softplus(delta)
    K = B.shape[1]
    decay = torch.exp(delta[..., None] * A[:, None]).unflatten(1, (K, -1))  # [B, K, D, L, N]
    entering = (delta * u).unflatten(1, (K, -1))[..., None] * B.transpose(2, 3)[:, :, None]  # [B, K, D, L, N]

    h = torch.zeros_like(entering[..., 0, :])  # [B, K, D, N]
    ys = []
    for step in range(u.shape[-1]):
        h = decay[..., step, :] * h + entering[..., step, :]
        ys.append((h * C[:, :, None, :, step]).sum(-1))  # [B, K, D]
    y = torch.stack(ys, dim=-1).flatten(1, 2)  # [B, K*D, L]
    return y if D is None else y + D.to(kind)[:, None] * u


def cross_scan(x: Tensor) -> Tensor:
    """The four sequences of an image, [B, 4, D, L]: row by row, column by column, and both reversed. x: [B, H, W, D]."""
    rows = x.flatten(1, 2)  # [B, L, D]
    columns = x.transpose(1, 2).flatten(1, 2)
    forward = torch.stack([rows, columns], dim=1)  # [B, 2, L, D]
    return torch.cat([forward, forward.flip(2)], dim=1).transpose(2, 3)  # [B, 4, D, L]


def cross_merge(y: Tensor, height: int, width: int) -> Tensor:
    """The transpose of `cross_scan`: every direction's y goes back to its positions; their sum, [B, H, W, D]."""
    forward = y[:, :2] + y[:, 2:].flip(-1)  # [B, 2, D, L]
    rows, columns = forward.transpose(2, 3).unbind(1)
    return rows.unflatten(1, (height, width)) + columns.unflatten(1, (width, height)).transpose(1, 2)


def reference_2d(x: Tensor, proj: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor | None, dt_bias: Tensor | None) -> Tensor:
    """The 2D selective scan by materialised copies and `reference`.

    Args:
        x: [B, H, W, D].
        proj: [B, H, W, 4, R + 2N]: for each direction dt, B, C of a position, in this order.
        dt_weight: [4, D, R]: delta of direction k at a position is dt_weight[k] @ dt.
        A: [4*D, N]; D, dt_bias: [4*D].

    Returns:
        y: [B, H, W, D].
    """
    _, height, width, channels = x.shape
    rank, states = dt_weight.shape[-1], A.shape[-1]
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    streams = torch.stack([cross_scan(proj[..., k, :].to(kind))[:, k] for k in range(4)], dim=1)  # [B, 4, R + 2N, L]
    dt, B, C = streams.split([rank, states, states], dim=2)
    delta = torch.einsum("kdr,bkrl->bkdl", dt_weight.to(kind), dt)
    u = cross_scan(x.to(kind))
    y = reference(u.flatten(1, 2), delta.flatten(1, 2), A, B, C, D, dt_bias)
    return cross_merge(y.unflatten(1, (4, channels)), height, width)


# ---------------------------------------------------------------------------------------------------------------------
# The chunked form: the backend `torch`. A direction at a time, so that it works in cache: [B, L, D], states one by one.

CHUNK = 8  # positions that a step of Python passes over side by side; chunk ends are scanned the same way, 8 times fewer


def linear_recurrence_(decay: Tensor, h: Tensor, reverse: bool = False) -> None:
    """h_l = decay_l h_{l-1} + h_l in place, along dimension 1 of [B, L, D]; `reverse`: with l+1 for l-1. Destroys `decay`.

    All chunks of `CHUNK` positions advance together, each from a state of zero, while `decay` turns into the product of the
    decays since the chunk began. The last positions of the chunks are then a recurrence of the same kind (solved by recursion,
    work linear in L), and its result is carried into the positions between.
    """
    length = h.shape[1]
    if length == 1:
        return
    step = min(CHUNK, length)

    def place(tensor: Tensor, index: int) -> Tensor:
        """Position `index` of every chunk that has one; chunks count from the end when time runs backwards."""
        return tensor[:, (length - 1 - index) % step :: step] if reverse else tensor[:, index::step]

    def first(tensor: Tensor, count: int) -> Tensor:
        """The first `count` chunks in the order of time."""
        return tensor[:, tensor.shape[1] - count :] if reverse else tensor[:, :count]

    def later(tensor: Tensor) -> Tensor:
        """All chunks but the first."""
        return tensor[:, :-1] if reverse else tensor[:, 1:]

    for index in range(1, step):
        here, there = place(h, index), place(h, index - 1)
        decay_here, decay_there = place(decay, index), place(decay, index - 1)
        here.addcmul_(decay_here, first(there, here.shape[1]))
        decay_here.mul_(first(decay_there, here.shape[1]))
    ends = place(h, step - 1)
    linear_recurrence_(place(decay, step - 1), ends, reverse)
    for index in range(step - 1):
        inner = later(place(h, index))
        inner.addcmul_(later(place(decay, index)), first(ends, inner.shape[1]))


def _scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool) -> Tensor:
    """One direction without D: u, delta [B, L, D] (after softplus), A [D, N], B and C [B, L, N] -> y [B, L, D]."""
    y = torch.zeros_like(u)
    input = delta * u
    for n in range(A.shape[1]):
        h = input * B[..., n, None]  # [B, L, D]
        linear_recurrence_((delta * A[:, n]).exp_(), h, reverse)
        y.addcmul_(h, C[..., n, None])
    return y


def _scan_backward(
    gy: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `_scan` for u, delta, A, B, C. With g the gradient of h: g_l = C_l gy_l + decay_{l+1} g_{l+1}."""
    now, before = (slice(None, -1), slice(1, None)) if reverse else (slice(1, None), slice(None, -1))
    input = delta * u
    ginput, ddelta = torch.zeros_like(u), torch.zeros_like(u)
    dA, dB, dC = torch.zeros_like(A), torch.empty_like(B), torch.empty_like(C)
    for n in range(A.shape[1]):
        decay = (delta * A[:, n]).exp_()  # [B, L, D]
        h = input * B[..., n, None]
        linear_recurrence_(decay.clone(), h, reverse)
        dC[..., n] = (gy * h).sum(-1)

        g = gy * C[..., n, None]
        decay_next = torch.zeros_like(decay)
        decay_next[:, before] = decay[:, now]
        linear_recurrence_(decay_next, g, not reverse)
        dB[..., n] = (g * input).sum(-1)
        ginput.addcmul_(g, B[..., n, None])

        gpast = g[:, now] * decay[:, now] * h[:, before]  # gradient of log(decay); none at the first position
        ddelta[:, now].addcmul_(gpast, A[:, n])
        dA[:, n] = gpast.mul_(delta[:, now]).sum((0, 1))
    ddelta.addcmul_(ginput, u)
    return ginput.mul_(delta), ddelta, dA, dB, dC


def unavailable(device: torch.device | None = None) -> str | None:
    """This backend runs everywhere."""
    return None


def states_shape(batch: int, directions: int, channels: int, length: int, states: int) -> tuple[int, ...]:
    """Nothing is kept for the backward pass, which scans again."""
    return (0,)


def _kind(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _split_directions(tensor: Tensor, directions: int, kind: torch.dtype) -> list[Tensor]:
    """[B, K*D, L] or [B, K, N, L] -> K contiguous tensors [B, L, D or N]."""
    parts = tensor.to(kind).chunk(directions, dim=1)  # [B, D, L] or [B, 1, N, L]
    return [part.flatten(1, -2).transpose(1, 2).contiguous() for part in parts]


def _join_directions(parts: list[Tensor], like: Tensor) -> Tensor:
    """The inverse of `_split_directions`, in the shape and type of `like`."""
    return torch.stack([part.transpose(1, 2) for part in parts], dim=1).reshape(like.shape).to(like.dtype)


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """y of `reference`, [B, K*D, L], and what backward needs."""
    K, kind = B.shape[1], _kind(u)
    raw = delta.to(kind) if delta_bias is None else delta.to(kind) + delta_bias[:, None]
    steps = _split_directions(softplus(raw) if delta_softplus else raw, K, kind)
    streams = [_split_directions(each, K, kind) for each in (B, C)]
    parts = zip(_split_directions(u, K, kind), steps, A.chunk(K), *streams, strict=True)
    y = _join_directions([_scan(*part, reverse=False) for part in parts], u.to(kind))
    return (y if D is None else y.addcmul_(u.to(kind), D[:, None])), y.new_empty(0)


def backward(
    gy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    saved: Tensor,
    delta_softplus: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients for u, delta, A, B, C, D, delta_bias."""
    K, kind = B.shape[1], _kind(u)
    raw = delta.to(kind) if delta_bias is None else delta.to(kind) + delta_bias[:, None]
    tensors = (gy, u, softplus(raw) if delta_softplus else raw, B, C)
    gys, us, steps, Bs, Cs = (_split_directions(each, K, kind) for each in tensors)
    grads = [_scan_backward(*part, reverse=False) for part in zip(gys, us, steps, A.chunk(K), Bs, Cs, strict=True)]
    du, ddelta, dA, dB, dC = (list(parts) for parts in zip(*grads, strict=True))
    du, ddelta = _join_directions(du, u.to(kind)), _join_directions(ddelta, u.to(kind))
    dD = None if D is None else (gy * u).sum((0, 2))
    if D is not None:
        du.addcmul_(gy, D[:, None])
    if delta_softplus:
        ddelta.mul_(torch.sigmoid(raw))
    dbias = None if delta_bias is None else ddelta.sum((0, 2))
    return (
        du.to(u.dtype),
        ddelta.to(u.dtype),
        torch.cat(dA),
        _join_directions(dB, B),
        _join_directions(dC, C),
        dD,
        dbias,
    )


def _by_columns(tensor: Tensor) -> Tensor:
    """[B, H, W, ...] -> the same with rows and columns exchanged, contiguous: column by column is then row by row."""
    return tensor.transpose(1, 2).contiguous()


def _delta(dt: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What softplus makes delta of: dt [B, L, R], weight [D, R] -> [B, L, D]."""
    return torch.nn.functional.linear(dt, weight, bias)


def forward_2d(
    x: Tensor, proj: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor | None, dt_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y of `reference_2d`, [B, H, W, D], and what backward needs. Directions 2 and 3 scan 0 and 1 backwards, without copies."""
    _, height, width, channels = x.shape
    kind, rank, states = _kind(x), dt_weight.shape[-1], A.shape[-1]
    x, proj = x.to(kind), proj.to(kind)
    As, biases = A.chunk(4), dt_bias.chunk(4) if dt_bias is not None else [None] * 4
    ys = []
    for order in range(2):
        image, streams = (x, proj) if order == 0 else (_by_columns(x), _by_columns(proj))
        u, streams = image.flatten(1, 2), streams.flatten(1, 2)  # [B, L, D], [B, L, 4, R + 2N]
        for k in (order, order + 2):
            dt, B, C = streams[:, :, k].split([rank, states, states], dim=-1)
            y = _scan(u, softplus(_delta(dt, dt_weight[k], biases[k])), As[k], B, C, reverse=k >= 2)
            ys.append(y)
    rows, columns = ys[0].add_(ys[1]), ys[2].add_(ys[3])  # [B, L, D]
    y = rows.unflatten(1, (height, width))
    y += columns.unflatten(1, (width, height)).transpose(1, 2)
    if D is not None:
        y.addcmul_(x, D.view(4, channels).sum(0))
    return y, y.new_empty(0)


def backward_2d(
    gy: Tensor,
    x: Tensor,
    proj: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    saved: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients for x, proj, dt_weight, A, D, dt_bias."""
    _, height, width, channels = x.shape
    kind, rank, states = _kind(x), dt_weight.shape[-1], A.shape[-1]
    image, streams = x.to(kind), proj.to(kind)
    As, biases = A.chunk(4), dt_bias.chunk(4) if dt_bias is not None else [None] * 4
    dproj, ddt_weight, dA = torch.empty_like(streams), torch.empty_like(dt_weight), torch.empty_like(A)
    dbias = torch.empty_like(A[:, 0])

    def two_directions(order: int, gy: Tensor, u: Tensor, streams: Tensor, dstreams: Tensor) -> Tensor:
        """Directions `order` and `order + 2` on [B, L, ...] in their order of positions; returns du, writes the others."""
        total = torch.zeros_like(u)
        for k in (order, order + 2):
            dt, B, C = streams[:, :, k].split([rank, states, states], dim=-1)
            raw = _delta(dt, dt_weight[k], biases[k])
            du, ddelta, dA_k, dB, dC = _scan_backward(gy, u, softplus(raw), As[k], B, C, reverse=k >= 2)
            ddelta.mul_(raw.sigmoid_())
            total += du
            dstreams[:, :, k] = torch.cat([ddelta @ dt_weight[k], dB, dC], dim=-1)
            ddt_weight[k] = ddelta.flatten(0, 1).T @ dt.flatten(0, 1)
            here = slice(k * channels, (k + 1) * channels)
            dA[here], dbias[here] = dA_k, ddelta.sum((0, 1))
        return total  # [B, L, D]

    dx = two_directions(0, gy.flatten(1, 2), image.flatten(1, 2), streams.flatten(1, 2), dproj.flatten(1, 2)).view_as(image)
    turned = [_by_columns(each) for each in (gy, image, streams)]
    dproj_turned = torch.empty_like(turned[2])
    dx_turned = two_directions(1, *(each.flatten(1, 2) for each in turned), dproj_turned.flatten(1, 2))
    dx += dx_turned.view_as(turned[1]).transpose(1, 2)
    dproj[:, :, :, 1::2] = dproj_turned.transpose(1, 2)[:, :, :, 1::2]
    dD = None
    if D is not None:
        dx.addcmul_(gy, D.view(4, channels).sum(0))
        dD = (gy * image).sum((0, 1, 2)).repeat(4)
    return dx.to(x.dtype), dproj.to(proj.dtype), ddt_weight, dA, dD, dbias if dt_bias is not None else None
