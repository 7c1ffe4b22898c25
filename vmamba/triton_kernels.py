"""Triton kernels of the selective scan; `vmamba/scan_triton.py` launches them and imports this file only when it runs.

Letters: B batch, K directions, D channels, N states, L = H*W positions, T steps, S chunks, R channels of a block (BC in code).

A program owns one sample, one block of channels, and one direction (or the four directions of an image, one after another, so
that their sum needs no atomics). It goes over the sequence in tiles [T, S, R] of T*S positions: position s*T + t of the tile
is element (t, s). A thread holds all T steps of its chunks in registers, so that the scan over t is plain arithmetic; only the
S totals of the chunks are scanned across threads. A stretch of positions is the affine map h -> P h + h_local of the state.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
SIZES = ["L", "height", "width", "tiles"]  # one compiled kernel serves all image sizes


@triton.jit
def _softplus(x):
    """softplus(x) and its derivative, both to float32's precision relative to their size, however small."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    s = e / (2.0 + e)  # log(1 + e) = 2 artanh(s), s in [0, 1/3]: a polynomial fitted to 4e-9
    s2 = s * s
    log1p = 0.1398030222 + s2 * 0.1408916563
    log1p = 2.0 * s * (1.0 + s2 * (0.3333315849 + s2 * (0.2001245469 + s2 * log1p)))
    return tl.maximum(x, 0.0) + log1p, tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def _then(P1, h1, Q1, q1, P2, h2, Q2, q2):
    """Stretch 1, then stretch 2. (P, h) is a stretch's map, (Q, q) its map without its last element."""
    return P1 * P2, P2 * h1 + h2, P1 * Q2, Q2 * h1 + q2


@triton.jit
def _associative_scan(P, h, index, LENGTH: tl.constexpr, REVERSE: tl.constexpr):
    """Inclusive (P, h) and exclusive (Q, q) scans of maps over axis 0, where `index` counts 0..LENGTH-1."""
    return tl.associative_scan((P, h, tl.full(P.shape, 1.0, P.dtype), tl.zeros_like(h)), 0, _then, reverse=REVERSE)


@triton.jit
def _from(x, source, exists, otherwise):
    """Elements `source` of axis 0, and `otherwise` where there is none."""
    source = tl.broadcast_to(tl.where(exists, source, 0), x.shape)
    return tl.where(exists, tl.gather(x, source, 0), otherwise)


@triton.jit
def _scan_by_doubling(P, h, index, LENGTH: tl.constexpr, REVERSE: tl.constexpr):
    """The same for the interpreter, whose associative_scan calls `_then` for each element: minutes instead of seconds."""
    stride = 1
    while stride < LENGTH:
        source = index + stride if REVERSE else index - stride
        exists = (source >= 0) & (source < LENGTH)
        P, h = P * _from(P, source, exists, 1.0), P * _from(h, source, exists, 0.0) + h
        stride *= 2
    source = index + 1 if REVERSE else index - 1
    exists = (source >= 0) & (source < LENGTH)
    return P, h, _from(P, source, exists, 1.0), _from(h, source, exists, 0.0)


INTERPRETED = not isinstance(_then, triton.JITFunction)  # TRITON_INTERPRET was set when this file was imported
_scan = _scan_by_doubling if INTERPRETED else _associative_scan


@triton.jit
def _pick(x, where):
    """The element of axis 0 at which `where` holds."""
    return tl.sum(tl.where(where, x, 0.0), 0)


@triton.jit
def _positions(order, direction, L, height, width):
    """Where element `order` of a direction's sequence lies: row by row, column by column, then both reversed."""
    if direction >= 2:
        order = L - 1 - order
    if direction % 2 == 1:
        column = (order.to(tl.uint32) // height.to(tl.uint32)).to(tl.int32)  # unsigned division is the cheaper one
        order = column + (order - column * height) * width
    return order


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


@triton.jit(do_not_specialize=SIZES)
def forward(
    x, delta, A, B, C, D, bias, y, states,
    L, height, width, channels, tiles, all_directions,
    x_batch, x_direction, delta_batch, delta_direction,
    bc_batch, bc_direction, bc_state, bc_position,
    N: tl.constexpr, N_POWER: tl.constexpr, DIRECTIONS: tl.constexpr, SOFTPLUS: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y, and the state that enters each tile, [B, K, tiles, N, D]. Grid: (B * channel blocks, K / DIRECTIONS).

    x, delta, y: [L, D] for each sample and direction, at the given strides (y at those of x); B, C likewise [N, L].
    """
    blocks = tl.cdiv(channels, BC)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)  # R
    inside_c = c < channels
    t = tl.arange(0, T)[:, None, None]
    s = tl.arange(0, S)[:, None]
    n_row = tl.arange(0, N_POWER)[:, None]
    order_tile = tl.arange(0, S)[None, :] * T + tl.arange(0, T)[:, None]  # T, S

    for turn in range(DIRECTIONS):
        k = tl.program_id(1).to(tl.int64) * DIRECTIONS + turn
        D_c, bias_c = _channel_parameters(D, bias, k * channels, c, inside_c)
        carry = tl.zeros([N_POWER, BC], tl.float32)
        x_k = batch * x_batch + k * x_direction
        delta_k = delta + batch * delta_batch + k * delta_direction
        bc_k = batch * bc_batch + k * bc_direction
        states_k = states + (batch * all_directions + k) * tiles * N * channels
        for tile in range(tiles):
            order = tile * (T * S) + order_tile
            inside_order = order < L  # T, S
            position = _positions(order, turn, L, height, width)
            inside = inside_order[:, :, None] & inside_c[None, None, :]
            # Axis 1 is not contiguous: the 2 is there to have Triton spread S over threads rather than T.
            at = tl.max_contiguous(position[:, :, None] * channels + c[None, None, :], [1, 2, BC])  # T, S, R
            at_bc = position * bc_position  # T, S

            x_tile = tl.load(x + x_k + at, mask=inside, other=0.0).to(tl.float32)
            dt = tl.load(delta_k + at, mask=inside, other=0.0).to(tl.float32) + bias_c
            if SOFTPLUS:
                dt, _ = _softplus(dt)
            dt = tl.where(inside, dt, 0.0)  # the map of a step outside is the identity
            dtx = dt * x_tile
            y_tile = D_c * x_tile
            for n in range(N):
                A_n = tl.load(A + (k * channels + c) * N + n, mask=inside_c, other=0.0) * LOG2E  # R
                at_n = bc_k + n * bc_state  # a scalar: offsets of elements stay in 32 bits
                B_n = tl.load(B + at_n + at_bc, mask=inside_order, other=0.0).to(tl.float32)[:, :, None]  # T, S, 1
                C_n = tl.load(C + at_n + at_bc, mask=inside_order, other=0.0).to(tl.float32)[:, :, None]
                carry_n = _pick(carry, n_row == n)  # R
                tl.store(states_k + (tile * N + n) * channels + c, carry_n, mask=inside_c)

                P, h, _, _ = _scan(tl.exp2(dt * A_n), B_n * dtx, t, T, False)
                P_all, h_all, Q, q = _scan(_pick(P, t == T - 1), _pick(h, t == T - 1), s, S, False)  # S, R
                h += P * (Q * carry_n + q)[None, :, :]
                carry = tl.where(n_row == n, _pick(P_all * carry_n + h_all, s == S - 1), carry)
                y_tile += C_n * h
            if DIRECTIONS > 1:
                y_tile += tl.load(y + x_k + at, mask=inside & (turn > 0), other=0.0)
            tl.store(y + x_k + at, y_tile, mask=inside)
        if DIRECTIONS > 1:
            tl.debug_barrier()  # the next direction's y belongs to other threads


@triton.jit(do_not_specialize=SIZES)
def backward(
    gy, x, delta, A, B, C, D, bias, states, sum_dx, dx, ddelta, dA, dD, dbias, dB, dC,
    L, height, width, channels, tiles, all_directions,
    x_batch, x_direction, delta_batch, delta_direction,
    bc_batch, bc_direction, bc_state, bc_position, dbc_block, dbc_batch, dbc_direction,
    N: tl.constexpr, N_POWER: tl.constexpr, DIRECTIONS: tl.constexpr, SOFTPLUS: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradients. With a_l = exp(delta_l A), the gradient of h_l is g_l = C_l gy_l + r_{l+1}, and r_l = a_l g_l.

    dA [B, K*D, N], dD and dbias [B, K*D] are those of one sample; dB and dC [blocks, B, K, N, L] those of a block of channels.
    dx is written by the last direction; until then the sum over directions is kept in sum_dx (float32).
    """
    blocks = tl.cdiv(channels, BC)
    block = tl.program_id(0) % blocks
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    c = block * BC + tl.arange(0, BC)  # R
    inside_c = c < channels
    t = tl.arange(0, T)[:, None, None]
    s = tl.arange(0, S)[:, None]
    n_row = tl.arange(0, N_POWER)[:, None]
    order_tile = tl.arange(0, S)[None, :] * T + tl.arange(0, T)[:, None]  # T, S

    for turn in range(DIRECTIONS):
        k = tl.program_id(1).to(tl.int64) * DIRECTIONS + turn
        D_c, bias_c = _channel_parameters(D, bias, k * channels, c, inside_c)
        carry = tl.zeros([N_POWER, BC], tl.float32)  # r of the tile behind
        dA_c = tl.zeros([N_POWER, BC], tl.float32)
        dD_c = tl.zeros([S, BC], tl.float32)
        dbias_c = tl.zeros([S, BC], tl.float32)
        x_k = batch * x_batch + k * x_direction
        delta_k = batch * delta_batch + k * delta_direction
        bc_k = batch * bc_batch + k * bc_direction
        dbc_k = block.to(tl.int64) * dbc_block + batch * dbc_batch + k * dbc_direction
        row = batch * all_directions + k
        for turned_tile in range(tiles):
            tile = tiles - 1 - turned_tile
            order = tile * (T * S) + order_tile
            inside_order = order < L  # T, S
            position = _positions(order, turn, L, height, width)
            inside = inside_order[:, :, None] & inside_c[None, None, :]
            # Axis 1 is not contiguous: the 2 is there to have Triton spread S over threads rather than T.
            at = tl.max_contiguous(position[:, :, None] * channels + c[None, None, :], [1, 2, BC])  # T, S, R
            at_bc = position * bc_position  # T, S

            x_tile = tl.load(x + x_k + at, mask=inside, other=0.0).to(tl.float32)
            gy_tile = tl.load(gy + x_k + at, mask=inside, other=0.0)
            dt = tl.load(delta + delta_k + at, mask=inside, other=0.0).to(tl.float32) + bias_c
            slope = tl.full([T, S, BC], 1.0, tl.float32)
            if SOFTPLUS:
                dt, slope = _softplus(dt)
            dt = tl.where(inside, dt, 0.0)
            gBx = tl.zeros([T, S, BC], tl.float32)  # sum over n of g B, later times x
            g_dt = tl.zeros([T, S, BC], tl.float32)
            for n in range(N):
                A_n = tl.load(A + (k * channels + c) * N + n, mask=inside_c, other=0.0)  # R
                at_n = bc_k + n * bc_state  # a scalar: offsets of elements stay in 32 bits
                B_n = tl.load(B + at_n + at_bc, mask=inside_order, other=0.0).to(tl.float32)[:, :, None]  # T, S, 1
                C_n = tl.load(C + at_n + at_bc, mask=inside_order, other=0.0).to(tl.float32)[:, :, None]
                h_in = tl.load(states + ((row * tiles + tile) * N + n) * channels + c, mask=inside_c, other=0.0)  # R
                r_in = _pick(carry, n_row == n)

                a = tl.exp2(dt * (A_n * LOG2E))
                b = dt * x_tile * B_n
                P, h, Q, q = _scan(a, b, t, T, False)
                P_chunk = _pick(P, t == T - 1)  # S, R
                _, _, Q_chunk, q_chunk = _scan(P_chunk, _pick(h, t == T - 1), s, S, False)
                ah = a * (Q * (Q_chunk * h_in + q_chunk)[None, :, :] + q)  # a_l h_{l-1}

                _, r, Q, q = _scan(a, a * (C_n * gy_tile), t, T, True)
                P_all, r_all, Q_chunk, q_chunk = _scan(P_chunk, _pick(r, t == 0), s, S, True)
                g = C_n * gy_tile + Q * (Q_chunk * r_in + q_chunk)[None, :, :] + q
                carry = tl.where(n_row == n, _pick(P_all * r_in + r_all, s == 0), carry)

                at_n = dbc_k + n * L
                tl.store(dB + at_n + position, tl.sum(g * dt * x_tile, 2), mask=inside_order)
                tl.store(dC + at_n + position, tl.sum(gy_tile * (ah + b), 2), mask=inside_order)
                gBx += g * B_n
                gah = g * ah
                g_dt += gah * A_n
                dA_c += tl.where(n_row == n, tl.sum(tl.sum(gah * dt, 0), 0), 0.0)
            g_dt = (g_dt + gBx * x_tile) * slope
            tl.store(ddelta + delta_k + at, g_dt, mask=inside)
            dx_tile = gBx * dt + D_c * gy_tile
            if DIRECTIONS > 1:
                dx_tile += tl.load(sum_dx + x_k + at, mask=inside & (turn > 0), other=0.0)
            if turn == DIRECTIONS - 1:
                tl.store(dx + x_k + at, dx_tile, mask=inside)
            else:
                tl.store(sum_dx + x_k + at, dx_tile, mask=inside)
            dD_c += tl.sum(gy_tile * x_tile, 0)
            dbias_c += tl.sum(tl.where(inside, g_dt, 0.0), 0)
        channel = row * channels + c
        tl.store(dA + channel * N + n_row, dA_c, mask=inside_c & (n_row < N))
        tl.store(dD + channel, tl.sum(dD_c, 0), mask=inside_c)
        tl.store(dbias + channel, tl.sum(dbias_c, 0), mask=inside_c)
        if DIRECTIONS > 1:
            tl.debug_barrier()  # the next direction's sum_dx belongs to other threads
