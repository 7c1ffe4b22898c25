"""Triton kernels of the 2D selective scan; `vmamba/scan_triton.py` launches them and imports this file only when it runs.

A program handles one sample and one block of channels, in the four directions one after another, so that their sum needs no
atomics. It walks over the image in tiles of S chunks of T positions, as tensors [T, S, R]:
position s*T + t of the tile is element (t, s). A thread holds all T steps of its chunks in registers, so the scan over t is
plain arithmetic; only the S chunks are scanned across threads. A run of positions is an affine map of the state, h -> P h + q;
runs are joined by composing their maps.

Shapes: D channels of a direction, L = H*W positions, N states, T steps of a chunk, S chunks of a tile, R channels of a block
(BC in the code).
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
SIZES = ["batches", "L", "height", "width", "tiles"]  # one compiled kernel serves all image sizes


@triton.jit
def _softplus(x):
    """softplus(x) and its derivative, both with a relative error of float32 precision, also where they are tiny."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    s = e / (2.0 + e)  # log(1 + e) = 2 artanh(s), s in [0, 1/3]: a polynomial fitted to 4e-9
    s2 = s * s
    log1p = 0.1398030222 + s2 * 0.1408916563
    log1p = 2.0 * s * (1.0 + s2 * (0.3333315849 + s2 * (0.2001245469 + s2 * log1p)))
    return tl.maximum(x, 0.0) + log1p, tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def _compose(P1, h1, Q1, q1, P2, h2, Q2, q2):
    """Run 1, then run 2. (P, h) is the map of a run, (Q, q) its map without its last element."""
    return P1 * P2, P2 * h1 + h2, P1 * Q2, Q2 * h1 + q2


@triton.jit
def _associative_scan(P, h, index, LENGTH: tl.constexpr, REVERSE: tl.constexpr):
    """Inclusive (P, h) and exclusive (Q, q) scans of maps over axis 0; `index` is 0..LENGTH-1 along it."""
    return tl.associative_scan((P, h, tl.full(P.shape, 1.0, P.dtype), tl.zeros_like(h)), 0, _compose, reverse=REVERSE)


@triton.jit
def _gather(x, source, exists, otherwise):
    """Elements `source` of axis 0, and `otherwise` where `exists` is false."""
    source = tl.broadcast_to(tl.where(exists, source, 0), x.shape)
    return tl.where(exists, tl.gather(x, source, 0), otherwise)


@triton.jit
def _scan_by_doubling(P, h, index, LENGTH: tl.constexpr, REVERSE: tl.constexpr):
    """`_associative_scan` for the interpreter, whose tl.associative_scan takes minutes: it calls `_compose` per element."""
    stride = 1
    while stride < LENGTH:
        source = index + stride if REVERSE else index - stride
        exists = (source >= 0) & (source < LENGTH)
        P, h = P * _gather(P, source, exists, 1.0), P * _gather(h, source, exists, 0.0) + h
        stride *= 2
    source = index + 1 if REVERSE else index - 1
    exists = (source >= 0) & (source < LENGTH)
    return P, h, _gather(P, source, exists, 1.0), _gather(h, source, exists, 0.0)


INTERPRETED = not isinstance(_compose, triton.JITFunction)  # TRITON_INTERPRET was set at import
_scan = _scan_by_doubling if INTERPRETED else _associative_scan


@triton.jit
def _select(x, where):
    """The one element of axis 0 for which `where` is true."""
    return tl.sum(tl.where(where, x, 0.0), 0)


@triton.jit
def _program(channels, BC: tl.constexpr):
    """Sample and block of channels of this program; its channels [R], and which of them exist."""
    blocks = tl.cdiv(channels, BC)
    block = tl.program_id(0) % blocks
    c = block * BC + tl.arange(0, BC)  # [R]
    return (tl.program_id(0) // blocks).to(tl.int64), block, c, c < channels


@triton.jit
def _positions(order, direction, L, height, width):
    """Position in the image of element `order` of a direction: row by row, column by column, then both reversed."""
    if direction >= 2:
        order = L - 1 - order
    if direction % 2 == 1:
        column = (order.to(tl.uint32) // height.to(tl.uint32)).to(tl.int32)  # unsigned division is cheaper
        order = column + (order - column * height) * width
    return order


@triton.jit
def _tile(tile, direction, c, inside_c, L, height, width, channels, T: tl.constexpr, S: tl.constexpr, BC: tl.constexpr):
    """Positions [T, S] of a tile and offsets of its elements [T, S, R]; which of them exist."""
    order = tile * (T * S) + (tl.arange(0, S)[None, :] * T + tl.arange(0, T)[:, None])
    inside_order = order < L  # [T, S]
    position = _positions(order, direction, L, height, width)
    inside = inside_order[:, :, None] & inside_c[None, None, :]
    # Axis 1 is not contiguous: the 2 makes Triton distribute S over threads rather than T.
    at = tl.max_contiguous(position[:, :, None] * channels + c[None, None, :], [1, 2, BC])
    return position, inside_order, at, inside


@triton.jit
def _channel_parameters(D, bias, first, c, inside_c):
    """D and bias [R], zeros for None; `first` is the number of the direction's first channel."""
    D_c = tl.zeros_like(c).to(tl.float32)
    bias_c = D_c
    if D is not None:
        D_c = tl.load(D + first + c, mask=inside_c, other=0.0)
    if bias is not None:
        bias_c = tl.load(bias + first + c, mask=inside_c, other=0.0)
    return D_c, bias_c


@triton.jit
def _time_steps(delta, bias, inside):
    """Time steps, softplus(delta + bias), and the derivative of softplus. A step outside is 0, so its map is the identity."""
    dt, slope = _softplus(tl.load(delta, mask=inside, other=0.0).to(tl.float32) + bias)
    return tl.where(inside, dt, 0.0), slope


@triton.jit
def _load_bc(values, inside_order):
    """A tile of B or C for one state: [T, S, 1]."""
    return tl.load(values, mask=inside_order, other=0.0).to(tl.float32)[:, :, None]


@triton.jit
def _states(a, b, h_in, t, s, T: tl.constexpr, S: tl.constexpr):
    """States h_l = a_l h_{l-1} + b_l of a tile [T, S, R] that h_in [R] enters, and the state that leaves it."""
    P, h, _, _ = _scan(a, b, t, T, False)
    P_all, h_all, Q, q = _scan(_select(P, t == T - 1), _select(h, t == T - 1), s, S, False)  # [S, R]
    h += P * (Q * h_in + q)[None, :, :]
    return h, _select(P_all * h_in + h_all, s == S - 1)


@triton.jit
def _decayed_states(a, b, h_in, t, s, T: tl.constexpr, S: tl.constexpr):
    """a_l h_{l-1} of a tile [T, S, R] that h_in [R] enters, and the product of decays in each chunk [S, R]."""
    P, h, Q, q = _scan(a, b, t, T, False)
    P_chunk = _select(P, t == T - 1)
    _, _, Q_chunk, q_chunk = _scan(P_chunk, _select(h, t == T - 1), s, S, False)
    return a * (Q * (Q_chunk * h_in + q_chunk)[None, :, :] + q), P_chunk


@triton.jit
def _state_gradients(a, dh, P_chunk, r_in, t, s, T: tl.constexpr, S: tl.constexpr):
    """g_l = dh_l + r_{l+1} of a tile [T, S, R] that r_in [R] enters from the end, and r = a_l g_l of its first position."""
    _, r, Q, q = _scan(a, a * dh, t, T, True)
    P_all, r_all, Q_chunk, q_chunk = _scan(P_chunk, _select(r, t == 0), s, S, True)
    g = dh + Q * (Q_chunk * r_in + q_chunk)[None, :, :] + q
    return g, _select(P_all * r_in + r_all, s == 0)


@triton.jit
def _store_sum(value, total, result, inside, direction):
    """Adds `value` to the sum over directions; the last direction writes it to `result`, the others to `total`."""
    value += tl.load(total, mask=inside & (direction > 0), other=0.0)
    if direction == 3:
        tl.store(result, value, mask=inside)
    else:
        tl.store(total, value, mask=inside)


@triton.jit
def _store_parameter_gradients(channel, inside_c, n_row, dA_c, dD_c, dbias_c, dA, dD, dbias, N: tl.constexpr):
    tl.store(dA + channel * N + n_row, dA_c, mask=inside_c & (n_row < N))
    tl.store(dD + channel, tl.sum(dD_c, 0), mask=inside_c)
    tl.store(dbias + channel, tl.sum(dbias_c, 0), mask=inside_c)


@triton.jit(do_not_specialize=SIZES)
def forward(
    x, delta, A, B, C, D, bias, y, states,
    batches, L, height, width, channels, tiles,
    bc_batch, bc_direction, bc_state, bc_position,
    N: tl.constexpr, N_POWER: tl.constexpr, T: tl.constexpr, S: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y, and the state that enters each tile, [B, 4, tiles, N, D]. Grid: B * channel blocks.

    x, y: [B, L, D]; delta: [4, B, L, D]; B, C: [B, 4, N, L] at the given strides. `batches`: B.
    """
    batch, block, c, inside_c = _program(channels, BC)
    t = tl.arange(0, T)[:, None, None]
    s = tl.arange(0, S)[:, None]
    n_row = tl.arange(0, N_POWER)[:, None]
    x_b = batch * L * channels

    for direction in range(4):
        D_c, bias_c = _channel_parameters(D, bias, direction * channels, c, inside_c)
        carry = tl.zeros([N_POWER, BC], tl.float32)
        delta_k = delta + (direction * batches + batch) * L * channels
        bc_k = batch * bc_batch + direction * bc_direction
        states_k = states + (batch * 4 + direction) * tiles * N * channels
        for tile in range(tiles):
            position, inside_order, at, inside = _tile(tile, direction, c, inside_c, L, height, width, channels, T, S, BC)
            at_bc = position * bc_position  # [T, S]
            x_tile = tl.load(x + x_b + at, mask=inside, other=0.0).to(tl.float32)
            dt, slope = _time_steps(delta_k + at, bias_c, inside)
            dtx = dt * x_tile
            y_tile = D_c * x_tile
            for n in range(N):
                A_n = tl.load(A + (direction * channels + c) * N + n, mask=inside_c, other=0.0) * LOG2E  # [R]
                at_n = bc_k + n * bc_state  # a scalar: offsets of elements stay in 32 bits
                B_n, C_n = _load_bc(B + at_n + at_bc, inside_order), _load_bc(C + at_n + at_bc, inside_order)
                h_in = _select(carry, n_row == n)  # [R]
                tl.store(states_k + (tile * N + n) * channels + c, h_in, mask=inside_c)
                h, h_out = _states(tl.exp2(dt * A_n), B_n * dtx, h_in, t, s, T, S)
                carry = tl.where(n_row == n, h_out, carry)
                y_tile += C_n * h
            y_tile += tl.load(y + x_b + at, mask=inside & (direction > 0), other=0.0)
            tl.store(y + x_b + at, y_tile, mask=inside)
        tl.debug_barrier()  # other threads read this y in the next direction


@triton.jit(do_not_specialize=SIZES)
def backward(
    gy, x, delta, A, B, C, D, bias, states, sum_dx, dx, ddelta, dA, dD, dbias, dB, dC,
    batches, L, height, width, channels, tiles,
    bc_batch, bc_direction, bc_state, bc_position, dbc_block, dbc_batch, dbc_direction,
    N: tl.constexpr, N_POWER: tl.constexpr, T: tl.constexpr, S: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradients. With a_l = exp(delta_l A), the gradient of h_l is g_l = C_l gy_l + r_{l+1}, and r_l = a_l g_l.

    dA [B, 4*D, N], dD and dbias [B, 4*D] are those of one sample; dB and dC [blocks, B, 4, N, L] those of a block of channels.
    dx is written by the last direction; until then sum_dx (float32) holds the sum over directions.
    """
    batch, block, c, inside_c = _program(channels, BC)
    t = tl.arange(0, T)[:, None, None]
    s = tl.arange(0, S)[:, None]
    n_row = tl.arange(0, N_POWER)[:, None]
    x_b = batch * L * channels

    for direction in range(4):
        D_c, bias_c = _channel_parameters(D, bias, direction * channels, c, inside_c)
        carry = tl.zeros([N_POWER, BC], tl.float32)  # r of the tile behind
        dA_c = tl.zeros([N_POWER, BC], tl.float32)
        dD_c, dbias_c = tl.zeros([S, BC], tl.float32), tl.zeros([S, BC], tl.float32)
        delta_k = (direction * batches + batch) * L * channels
        bc_k = batch * bc_batch + direction * bc_direction
        dbc_k = block.to(tl.int64) * dbc_block + batch * dbc_batch + direction * dbc_direction
        row = batch * 4 + direction
        for reversed_tile in range(tiles):
            tile = tiles - 1 - reversed_tile
            position, inside_order, at, inside = _tile(tile, direction, c, inside_c, L, height, width, channels, T, S, BC)
            at_bc = position * bc_position  # [T, S]
            x_tile = tl.load(x + x_b + at, mask=inside, other=0.0).to(tl.float32)
            gy_tile = tl.load(gy + x_b + at, mask=inside, other=0.0)
            dt, slope = _time_steps(delta + delta_k + at, bias_c, inside)
            gBx, g_dt = tl.zeros([T, S, BC], tl.float32), tl.zeros([T, S, BC], tl.float32)  # gBx: sum over n of g B
            for n in range(N):
                A_n = tl.load(A + (direction * channels + c) * N + n, mask=inside_c, other=0.0)  # [R]
                at_n = bc_k + n * bc_state  # a scalar: offsets of elements stay in 32 bits
                B_n, C_n = _load_bc(B + at_n + at_bc, inside_order), _load_bc(C + at_n + at_bc, inside_order)
                h_in = tl.load(states + ((row * tiles + tile) * N + n) * channels + c, mask=inside_c, other=0.0)  # [R]
                a, b = tl.exp2(dt * (A_n * LOG2E)), dt * x_tile * B_n
                ah, P_chunk = _decayed_states(a, b, h_in, t, s, T, S)
                g, r_out = _state_gradients(a, C_n * gy_tile, P_chunk, _select(carry, n_row == n), t, s, T, S)
                carry = tl.where(n_row == n, r_out, carry)
                at_dbc = dbc_k + n * L
                tl.store(dB + at_dbc + position, tl.sum(g * dt * x_tile, 2), mask=inside_order)
                tl.store(dC + at_dbc + position, tl.sum(gy_tile * (ah + b), 2), mask=inside_order)
                gBx += g * B_n
                gah = g * ah
                g_dt += gah * A_n
                dA_c += tl.where(n_row == n, tl.sum(tl.sum(gah * dt, 0), 0), 0.0)
            g_dt = (g_dt + gBx * x_tile) * slope
            tl.store(ddelta + delta_k + at, g_dt, mask=inside)
            _store_sum(gBx * dt + D_c * gy_tile, sum_dx + x_b + at, dx + x_b + at, inside, direction)
            dD_c += tl.sum(gy_tile * x_tile, 0)
            dbias_c += tl.sum(tl.where(inside, g_dt, 0.0), 0)
        _store_parameter_gradients(row * channels + c, inside_c, n_row, dA_c, dD_c, dbias_c, dA, dD, dbias, N)
        tl.debug_barrier()  # other threads read this sum_dx in the next direction
