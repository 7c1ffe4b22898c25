"""The backend `cpp`: the selective scan compiled for CPUs (csrc/selective_scan), called through ctypes.

It computes what `scan_reference` defines, in float32 whatever the type of the input.

Shapes: K directions, D channels of a direction, L = H*W positions, N states of a channel, R rank of delta.
"""

import ctypes

import torch
from torch import Tensor

from . import extension

LIBRARY = "scan_cpu"
TILE = 32  # SCAN_TILE of scan.h


ScanArgs = extension.structure(
    "ScanArgs",
    "batch directions channels length states type softplus threads",
    "u delta A B C D delta_bias y saved gy du ddelta dB dC dA dD ddelta_bias",
)
Scan2dArgs = extension.structure(
    "Scan2dArgs",
    "batch height width channels rank states type threads",
    "x proj dt_weight A D dt_bias y saved gy dx dproj ddt_weight dA dD ddt_bias",
)


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """None if this backend can run (on tensors of that device), otherwise the reason in one line."""
    if device is not None and device.type != "cpu":
        return f"the compiled CPU scan works on CPU tensors, not on {device.type}"
    return extension.unavailable_reason(LIBRARY)


def saved_states_shape(batch: int, directions: int, channels: int, length: int, states: int) -> tuple[int, ...]:
    """Shape of the states that forward keeps for backward: the state at the start of each tile of positions."""
    return batch, directions, -(-length // TILE), states, channels


def _call(function: str, structure: type[ctypes.Structure], sizes: dict[str, int], tensors: dict[str, Tensor | None]) -> None:
    args = structure(**sizes, threads=torch.get_num_threads())
    for name, tensor in tensors.items():
        setattr(args, name, None if tensor is None else tensor.data_ptr())
    if getattr(extension.load(LIBRARY), function)(ctypes.byref(args)):
        raise MemoryError(f"{function}: not enough memory for the working buffers")


def _sizes(u: Tensor, A: Tensor, B: Tensor, delta_softplus: bool) -> dict[str, int]:
    batch, directions, states, length = B.shape
    return {
        "batch": batch,
        "directions": directions,
        "channels": A.shape[0] // directions,
        "length": length,
        "states": states,
        "type": extension.TYPES[u.dtype],
        "softplus": int(delta_softplus),
    }


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
    sizes = _sizes(u, A, B, delta_softplus)
    y = torch.empty(u.shape, dtype=torch.float32)
    saved = torch.empty(saved_states_shape(*(sizes[name] for name in ("batch", "directions", "channels", "length", "states"))))
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "delta_bias": delta_bias, "y": y, "saved": saved}
    _call("scan_forward", ScanArgs, sizes, tensors)
    return y, saved


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
    inputs = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "delta_bias": delta_bias}
    gradients = {f"d{name}": None if tensor is None else torch.empty_like(tensor) for name, tensor in inputs.items()}
    tensors = {**inputs, **gradients, "saved": saved, "gy": gy}
    _call("scan_backward", ScanArgs, _sizes(u, A, B, delta_softplus), tensors)
    return tuple(gradients.values())


def _sizes_2d(x: Tensor, dt_weight: Tensor, A: Tensor) -> dict[str, int]:
    batch, height, width, channels = x.shape
    return {
        "batch": batch,
        "height": height,
        "width": width,
        "channels": channels,
        "rank": dt_weight.shape[-1],
        "states": A.shape[-1],
        "type": extension.TYPES[x.dtype],
    }


def forward_2d(
    x: Tensor, proj: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor | None, dt_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [B, H, W, D], and the states [B, 4, tiles, N, D] that backward needs; both float32.

    x: [B, H, W, D]; proj: [B, H, W, 4, R + 2N]; dt_weight: [4, D, R]; A: [4*D, N]; D, dt_bias: [4*D].
    """
    batch, height, width, channels = x.shape
    y = torch.empty(x.shape, dtype=torch.float32)
    saved = torch.empty(saved_states_shape(batch, 4, channels, height * width, A.shape[-1]))
    tensors = {"x": x, "proj": proj, "dt_weight": dt_weight, "A": A, "D": D, "dt_bias": dt_bias, "y": y, "saved": saved}
    _call("scan_forward_2d", Scan2dArgs, _sizes_2d(x, dt_weight, A), tensors)
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
    inputs = {"x": x, "proj": proj, "dt_weight": dt_weight, "A": A, "D": D, "dt_bias": dt_bias}
    gradients = {f"d{name}": None if tensor is None else torch.empty_like(tensor) for name, tensor in inputs.items()}
    tensors = {**inputs, **gradients, "saved": saved, "gy": gy}
    _call("scan_backward_2d", Scan2dArgs, _sizes_2d(x, dt_weight, A), tensors)
    return tuple(gradients.values())


def instruction_set() -> str:
    """Instruction set that the library uses on this processor: baseline, avx2 or avx512."""
    isa = extension.load(LIBRARY).scan_isa
    isa.restype = ctypes.c_char_p
    return isa().decode()


def arithmetic(elements: int, rank: int, states: int = 1, with_backward: bool = False) -> None:
    """Does the arithmetic of a 2D scan of `elements` = B*4*D*L elements, forward or backward, on data in first-level cache.

    A benchmark compares the time of a scan with the time of this, its compute bound.
    """
    sizes = (rank, states, int(with_backward), elements, torch.get_num_threads())
    extension.load(LIBRARY).scan_arithmetic(*map(ctypes.c_int64, sizes))
