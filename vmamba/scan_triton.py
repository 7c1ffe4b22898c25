"""The backend `triton`: the selective scan for GPUs without the compiled extension. TRITON_INTERPRET=1 runs it on a CPU.

It computes what `scan_reference` defines; the kernels are in `triton_kernels.py`. They expect channels last: images already
are, and all four directions read them in place; sequences [D, L] are transposed before and after. Delta of images is one
batched matrix product in float32, computed again in the backward pass instead of kept. Sums over blocks of channels and over
samples are taken by torch.sum rather than atomically, so results do not vary from run to run.

Shapes: K directions, D channels of a direction, L = H*W positions, N states of a channel, R rank of delta.
"""

import functools
import importlib
from types import ModuleType

import torch
from einops import rearrange
from torch import Tensor

MIN_TRITON_VERSION = (3, 2)
STEPS = 4  # consecutive positions that one thread holds
TILE = 2048  # elements of a tile: 16 per thread with 4 warps
ELEMENTS_PER_WARP = 512

Sizes = tuple[int, int, int, int, int, int]  # B, K, D, N, H, W; H = 1 for sequences


@functools.cache
def _kernels() -> ModuleType | str:
    """The module of the kernels, or the reason why it cannot be imported: Triton may be missing."""
    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        return f"Triton cannot be imported ({error}): `pip install triton` (Linux only)"
    if tuple(map(int, version.split(".")[:2])) < MIN_TRITON_VERSION:
        return f"Triton {version} is too old, its compiler crashes: 3.2, which comes with torch 2.6, or newer is needed"
    return importlib.import_module("vmamba.triton_kernels")


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """None if this backend can run (on tensors of that device), otherwise the reason in one line."""
    kernels = _kernels()
    if isinstance(kernels, str):
        return kernels
    if kernels.INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "Triton's kernels need a GPU (TRITON_INTERPRET=1 runs them on a CPU, for tests)"
    if device is not None and device.type != "cuda":
        return f"Triton's kernels work on CUDA tensors, not on {device.type}"
    return None


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def _tile_positions(length: int) -> int:
    """Positions of a tile; more under the interpreter, whose cost is per operation."""
    return min(max(_power_of_two(length), 2 * STEPS), 256 if _kernels().INTERPRETED else 64)


def saved_states_shape(batch: int, directions: int, channels: int, length: int, states: int) -> tuple[int, ...]:
    """Shape of the states that forward keeps for backward: the state at the start of each tile of positions."""
    return batch, directions, -(-length // _tile_positions(length)), states, channels


def _tile_channels(channels: int, length: int) -> int:
    """Channels of a tile; all of them under the interpreter."""
    all_channels = _power_of_two(channels)
    return all_channels if _kernels().INTERPRETED else min(all_channels, TILE // _tile_positions(length))


def _launch(
    kernel: str,
    tensors: tuple[Tensor | None, ...],
    sizes: Sizes,
    strides: tuple[int, ...],
    directions_per_program: int,
    softplus: bool,
) -> None:
    """Launches a kernel; a program handles one direction, or the four of an image one after another."""
    batch, directions, channels, states, height, width = sizes
    length = height * width
    positions, block = _tile_positions(length), _tile_channels(channels, length)
    programs = batch * -(-channels // block)
    if programs == 0:
        return
    with torch.cuda.device_of(tensors[0]):
        getattr(_kernels(), kernel)[programs, directions // directions_per_program](
            *tensors, length, height, width, channels, -(-length // positions), directions, *strides,
            N=states, N_POWER=_power_of_two(states), DIRECTIONS=directions_per_program, SOFTPLUS=softplus,
            T=STEPS, S=positions // STEPS, BC=block,
            num_warps=min(max(positions * block // ELEMENTS_PER_WARP, 1), 8),
        )  # fmt: skip


def _partial_sums(sizes: Sizes, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, tuple[int, int, int]]:
    """Memory for dA, dD and ddelta_bias per sample and for dB and dC per block of channels; strides of dB and dC."""
    batch, directions, channels, states, height, width = sizes
    rows, blocks = directions * channels, -(-channels // _tile_channels(channels, height * width))
    dA = like.new_empty(batch, rows, states, dtype=torch.float32)
    dD, dbias = like.new_empty(2, batch, rows, dtype=torch.float32)
    dB, dC = like.new_empty(2, blocks, batch, directions, states, height * width, dtype=torch.float32)
    return dA, dD, dbias, dB, dC, dB.stride()[:3]


def _channels_last(x: Tensor, directions: int) -> Tensor:
    return rearrange(x, "b (k d) l -> b k l d", k=directions).contiguous()


def _channels_first(x: Tensor) -> Tensor:
    return rearrange(x, "b k l d -> b (k d) l").contiguous()


def _layout(u: Tensor, A: Tensor, B: Tensor) -> tuple[Sizes, tuple[int, ...]]:
    """Sizes and strides of sequences, for `_launch`."""
    batch, directions, states, length = B.shape
    channels = u.shape[1] // directions
    per_sequence = (directions * length * channels, length * channels)
    return (batch, directions, channels, states, 1, length), (*per_sequence, *per_sequence, *B.stride())


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
    """y [B, K*D, L], and the states [B, K, tiles, N, D] that backward needs; both float32.

    u, delta: [B, K*D, L]; A: [K*D, N]; B, C: [B, K, N, L]; D, delta_bias: [K*D].
    """
    sizes, strides = _layout(u, A, B)
    directions = B.shape[1]
    u, delta = _channels_last(u, directions), _channels_last(delta, directions)  # [B, K, L, D]
    y = torch.empty_like(u, dtype=torch.float32)
    saved = A.new_empty(saved_states_shape(*sizes[:3], u.shape[2], A.shape[1]))
    _launch("forward", (u, delta, A, B, C, D, delta_bias, y, saved), sizes, strides, 1, delta_softplus)
    return _channels_first(y), saved


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of u, delta, A, B, C, D, delta_bias for the gradient gy [B, K*D, L] of y."""
    sizes, strides = _layout(u, A, B)
    gy, u, delta = (_channels_last(each, B.shape[1]) for each in (gy, u, delta))  # [B, K, L, D]
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    *sums, dbc_strides = _partial_sums(sizes, u)
    tensors = (gy, u, delta, A, B, C, D, delta_bias, saved, du, du, ddelta, *sums)
    _launch("backward", tensors, sizes, (*strides, *dbc_strides), 1, delta_softplus)
    dA, dD, dbias, dB, dC = (each.sum(0) for each in sums)
    return (
        _channels_first(du),
        _channels_first(ddelta),
        dA,
        dB.to(B.dtype),
        dC.to(C.dtype),
        None if D is None else dD,
        None if delta_bias is None else dbias,
    )


def _layout_2d(x: Tensor, B: Tensor) -> tuple[Sizes, tuple[int, ...]]:
    """Sizes and strides of images, for `_launch`. B: [B, H, W, 4, N], a view of proj."""
    batch, height, width, channels = x.shape
    image = height * width * channels
    sizes = (batch, 4, channels, B.shape[-1], height, width)
    return sizes, (image, 0, image, batch * image, B.stride(0), B.stride(3), B.stride(4), B.stride(2))


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product in float32, under autocast too."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.bmm(a, b)


def forward_2d(
    x: Tensor, proj: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor | None, dt_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [B, H, W, D], and the states [B, 4, tiles, N, D] that backward needs; both float32.

    x: [B, H, W, D]; proj: [B, H, W, 4, R + 2N]; dt_weight: [4, D, R]; A: [4*D, N]; D, dt_bias: [4*D].
    """
    rank, states = dt_weight.shape[2], A.shape[1]
    dt, B, C = proj.split([rank, states, states], dim=-1)  # [B, H, W, 4, R or N]
    sizes, strides = _layout_2d(x, B)
    dt = dt.flatten(0, 2).transpose(0, 1).float()  # [4, B*L, R]
    delta = _float32_product(dt, dt_weight.transpose(1, 2))  # [4, B*L, D]
    y = torch.empty_like(x, dtype=torch.float32)
    saved = A.new_empty(saved_states_shape(*sizes[:3], x.shape[1] * x.shape[2], states))
    _launch("forward", (x, delta, A, B, C, D, dt_bias, y, saved), sizes, strides, 4, True)
    return y, saved


def backward_2d(
    gy: Tensor,
    x: Tensor,
    proj: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, proj, dt_weight, A, D, dt_bias for the gradient gy [B, H, W, D] of y."""
    rank, states = dt_weight.shape[2], A.shape[1]
    dt, B, C = proj.split([rank, states, states], dim=-1)  # [B, H, W, 4, R or N]
    sizes, strides = _layout_2d(x, B)
    dt = dt.flatten(0, 2).transpose(0, 1).float()  # [4, B*L, R]
    delta = _float32_product(dt, dt_weight.transpose(1, 2))  # [4, B*L, D]
    ddelta = torch.empty_like(delta)
    dx = torch.empty_like(x)
    sum_dx = dx if dx.dtype == torch.float32 else torch.empty_like(dx, dtype=torch.float32)
    *sums, dbc_strides = _partial_sums(sizes, x)
    tensors = (gy, x, delta, A, B, C, D, dt_bias, saved, sum_dx, dx, ddelta, *sums)
    _launch("backward", tensors, sizes, (*strides, *dbc_strides), 4, True)
    dA, dD, dbias, dB, dC = (each.sum(0) for each in sums)

    ddt = _float32_product(ddelta, dt_weight)  # [4, B*L, R]
    ddt_weight = _float32_product(ddelta.transpose(1, 2), dt)  # [4, D, R]
    height, width = x.shape[1:3]
    dproj = torch.empty_like(proj)
    dproj[..., :rank] = rearrange(ddt, "k (b h w) r -> b h w k r", h=height, w=width)
    dproj[..., rank : rank + states] = rearrange(dB, "b k n (h w) -> b h w k n", h=height)
    dproj[..., rank + states :] = rearrange(dC, "b k n (h w) -> b h w k n", h=height)
    return dx, dproj, ddt_weight, dA, None if D is None else dD, None if dt_bias is None else dbias
