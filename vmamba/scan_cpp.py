"""The backend `cpp`: the 2D selective scan compiled for CPUs (csrc/selective_scan), called through ctypes.

It computes what `scan_reference` defines, in float32 whatever the type of the input.

Shapes: D channels of a direction, L = H*W positions, N states of a channel, R rank of delta.
"""

import ctypes

import torch
from torch import Tensor

from vmamba import extension
from vmamba.scan_reference import ScanInputs

LIBRARY = "scan_cpu"
INPUTS = ("x", "proj", "dt_weight", "A", "D", "dt_bias")
TILE = 32  # SCAN_TILE of scan.h


class Scan2dArgs(ctypes.Structure):
    """The struct of scan.h."""

    _fields_ = extension.fields(
        sizes="batch height width channels rank states type threads",
        pointers="x proj dt_weight A D dt_bias y saved gy dx dproj ddt_weight dA dD ddt_bias",
    )


def unavailable_reason(device: torch.device) -> str | None:
    """None if this backend can run on tensors of that device, otherwise the reason in one line."""
    if device.type != "cpu":
        return f"the compiled CPU scan works on CPU tensors, not on {device.type}"
    return extension.unavailable_reason(LIBRARY)


def saved_states_shape(batch: int, channels: int, length: int, states: int) -> tuple[int, ...]:
    """Shape of the states that forward keeps for backward: the state at the start of each tile of positions."""
    return batch, 4, -(-length // TILE), states, channels


def _call(function: str, tensors: dict[str, Tensor | None]) -> None:
    batch, height, width, channels = tensors["x"].shape
    args = Scan2dArgs(
        batch=batch,
        height=height,
        width=width,
        channels=channels,
        rank=tensors["dt_weight"].shape[-1],
        states=tensors["A"].shape[-1],
        type=extension.TYPES[tensors["x"].dtype],
        threads=torch.get_num_threads(),
    )
    extension.set_pointers(args, tensors)
    if getattr(extension.load(LIBRARY), function)(ctypes.byref(args)):
        raise MemoryError(f"{function}: not enough memory for the working buffers")


def forward_2d(*inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """y [B, H, W, D], and the states [B, 4, tiles, N, D] that backward needs; both float32. inputs: `ScanInputs`."""
    x, _, _, A, _, _ = inputs
    batch, height, width, channels = x.shape
    y = torch.empty(x.shape, dtype=torch.float32)
    saved = torch.empty(saved_states_shape(batch, channels, height * width, A.shape[-1]))
    _call("scan_forward_2d", {**dict(zip(INPUTS, inputs, strict=True)), "y": y, "saved": saved})
    return y, saved


def backward_2d(gy: Tensor, inputs: ScanInputs, saved: Tensor) -> ScanInputs:
    """Gradients of the inputs of `forward_2d` for the gradient gy [B, H, W, D] of y."""
    gradients = tuple(None if tensor is None else torch.empty_like(tensor) for tensor in inputs)
    tensors = {"gy": gy, "saved": saved} | dict(zip(INPUTS, inputs, strict=True))
    _call("scan_backward_2d", tensors | {f"d{name}": each for name, each in zip(INPUTS, gradients, strict=True)})
    return gradients


def instruction_set() -> str:
    """Instruction set that the library uses on this processor: baseline, avx2 or avx512."""
    isa = extension.load(LIBRARY).scan_isa
    isa.restype = ctypes.c_char_p
    return isa().decode()
