"""The backend `triton`: the 2D selective scan for GPUs without the compiled library. TRITON_INTERPRET=1 runs it on a CPU.

It computes what `scan_reference` defines; the kernels are in `triton_kernels.py`. All four directions read the image in place.
Delta is one batched matrix product in float32, computed again in the backward pass instead of kept. Sums over blocks of
channels and over samples are taken by torch.sum rather than atomically, so results do not vary from run to run.

Shapes: D channels of a direction, L = H*W positions, N states of a channel, R rank of delta.
"""

import functools
import importlib
from types import ModuleType

import torch
from einops import rearrange
from torch import Tensor

from vmamba.scan_reference import ScanInputs

STEPS = 4  # consecutive positions that one thread holds
TILE = 2048  # elements of a tile: 16 per thread with 4 warps
ELEMENTS_PER_WARP = 512


@functools.cache
def _kernels() -> ModuleType | str:
    """The module of the kernels, or the reason why it cannot be imported: Triton may be missing."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error}): `pip install triton` (Linux only)"
    return importlib.import_module("vmamba.triton_kernels")


def unavailable_reason(device: torch.device) -> str | None:
    """None if this backend can run on tensors of that device, otherwise the reason in one line."""
    kernels = _kernels()
    if isinstance(kernels, str):
        return kernels
    if not kernels.INTERPRETED and device.type != "cuda":
        return f"Triton's kernels work on CUDA tensors, not on {device.type} (TRITON_INTERPRET=1 runs them there, for tests)"
    return None


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def _tile_positions(length: int) -> int:
    """Positions of a tile; more under the interpreter, whose cost is per operation."""
    return min(max(_power_of_two(length), 2 * STEPS), 256 if _kernels().INTERPRETED else 64)


def saved_states_shape(batch: int, channels: int, length: int, states: int) -> tuple[int, ...]:
    """Shape of the states that forward keeps for backward: the state at the start of each tile of positions."""
    return batch, 4, -(-length // _tile_positions(length)), states, channels


def _tile_channels(channels: int, length: int) -> int:
    """Channels of a tile; all of them under the interpreter."""
    all_channels = _power_of_two(channels)
    return all_channels if _kernels().INTERPRETED else min(all_channels, TILE // _tile_positions(length))


def _launch(kernel: str, x: Tensor, B: Tensor, tensors: tuple[Tensor | None, ...], strides: tuple[int, ...] = ()) -> None:
    """Launches a kernel for x [B, H, W, D] and B [B, H, W, 4, N], a view of proj. strides: of dB and dC."""
    batch, height, width, channels = x.shape
    length, states = height * width, B.shape[-1]
    positions, block = _tile_positions(length), _tile_channels(channels, length)
    programs = batch * -(-channels // block)
    if programs == 0:
        return
    with torch.cuda.device_of(x):
        getattr(_kernels(), kernel)[(programs,)](
            *tensors, batch, length, height, width, channels, -(-length // positions),
            B.stride(0), B.stride(3), B.stride(4), B.stride(2), *strides,
            N=states, N_POWER=_power_of_two(states), T=STEPS, S=positions // STEPS, BC=block,
            num_warps=min(max(positions * block // ELEMENTS_PER_WARP, 1), 8),
        )  # fmt: skip


def forward_2d(
    x: Tensor, proj: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor | None, dt_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [B, H, W, D], and the states [B, 4, tiles, N, D] that backward needs; both float32. Arguments: `ScanInputs`."""
    batch, height, width, channels = x.shape
    rank, states = dt_weight.shape[2], A.shape[1]
    dt, B, C = proj.split([rank, states, states], dim=-1)  # [B, H, W, 4, R or N]
    dt = dt.flatten(0, 2).transpose(0, 1).float()  # [4, B*L, R]
    delta = torch.bmm(dt, dt_weight.transpose(1, 2))  # [4, B*L, D]
    y = torch.empty_like(x, dtype=torch.float32)
    saved = A.new_empty(saved_states_shape(batch, channels, height * width, states))
    _launch("forward", x, B, (x, delta, A, B, C, D, dt_bias, y, saved))
    return y, saved


def backward_2d(gy: Tensor, inputs: ScanInputs, saved: Tensor) -> ScanInputs:
    """Gradients of the inputs of `forward_2d` for the gradient gy [B, H, W, D] of y."""
    x, proj, dt_weight, A, D, dt_bias = inputs
    batch, height, width, channels = x.shape
    rank, states = dt_weight.shape[2], A.shape[1]
    dt, B, C = proj.split([rank, states, states], dim=-1)  # [B, H, W, 4, R or N]
    dt = dt.flatten(0, 2).transpose(0, 1).float()  # [4, B*L, R]
    delta = torch.bmm(dt, dt_weight.transpose(1, 2))  # [4, B*L, D]
    dx, ddelta = torch.empty_like(x), torch.empty_like(delta)
    sum_dx = dx if dx.dtype == torch.float32 else torch.empty_like(dx, dtype=torch.float32)
    # dA, dD and ddt_bias of each sample; dB and dC of each block of channels.
    dA, (dD, dbias) = A.new_empty(batch, *A.shape), A.new_empty(2, batch, 4 * channels)
    blocks = -(-channels // _tile_channels(channels, height * width))
    dB, dC = A.new_empty(2, blocks, batch, 4, states, height * width)
    tensors = (gy, x, delta, A, B, C, D, dt_bias, saved, sum_dx, dx, ddelta, dA, dD, dbias, dB, dC)
    _launch("backward", x, B, tensors, dB.stride()[:3])
    dA, dD, dbias, dB, dC = (each.sum(0) for each in (dA, dD, dbias, dB, dC))

    ddt = torch.bmm(ddelta, dt_weight)  # [4, B*L, R]
    ddt_weight = torch.bmm(ddelta.transpose(1, 2), dt)  # [4, D, R]
    dproj = torch.empty_like(proj)
    dproj[..., :rank] = rearrange(ddt, "k (b h w) r -> b h w k r", h=height, w=width)
    dproj[..., rank : rank + states] = rearrange(dB, "b k n (h w) -> b h w k n", h=height)
    dproj[..., rank + states :] = rearrange(dC, "b k n (h w) -> b h w k n", h=height)
    return dx, dproj, ddt_weight, dA, None if D is None else dD, None if dt_bias is None else dbias
