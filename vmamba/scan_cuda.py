"""The backend `cuda`: the 2D selective scan compiled for NVIDIA GPUs (csrc/selective_scan/scan_cuda.cu), called through ctypes.

It computes what `scan_reference` defines, in float32 whatever the type of the input. Kernels write partial sums over the batch
or the channels, which are added here rather than atomically: results have the same bits in every run.

Shapes: D channels of a direction, L = H*W positions, N states of a channel, R rank of delta.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from einops import rearrange
from torch import Tensor

from vmamba import extension
from vmamba.scan_reference import ScanInputs

LIBRARY = "scan_cuda"

# Constants of images.cuh.
CHANNELS = 16  # per block of threads
WARP_STEPS = 16  # positions that a warp processes at a time

# Above this number of positions the sum over directions (64 bytes each) leaves shared memory for one block per multiprocessor.
ONE_BLOCK_LENGTH = 1600


class Images(ctypes.Structure):
    """The struct ScanCudaImages of scan_cuda.h."""

    _fields_ = extension.fields(
        sizes="device batch height width channels rank states type warps samples",
        pointers="x proj dt_weight A D dt_bias saved y gy dx scratch ddelta dBC sums stream",
    )


def unavailable_reason(device: torch.device) -> str | None:
    """None if this backend can run on tensors of that device, otherwise the reason in one line."""
    if device.type != "cuda":
        return f"the CUDA scan works on CUDA tensors, not on {device.type}"
    if reason := extension.unavailable_reason(LIBRARY):
        return reason
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch"
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        reason = _function("scan_cuda_unavailable", ctypes.c_char_p)(ctypes.c_int64(index))
    if reason is None:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    remedy = f"with a CUDA toolkit that the driver supports, TORCH_CUDA_ARCH_LIST={major}.{minor} {extension.BUILD}"
    return f"the library does not run on {torch.cuda.get_device_name(index)}: {reason.decode()}; {remedy}"


def saved_states_shape(batch: int, channels: int, length: int, states: int) -> tuple[int, ...]:
    """Shape of the states that forward keeps for backward: the state at the start of each tile of positions."""
    return batch, 4, -(-length // (_warps(length, states) * WARP_STEPS)), states, channels


def _warps(length: int, states: int) -> int:
    """Warps per sample: such that they share its positions evenly, in few tiles and with few idle lanes."""
    max_warps = 16 if length > ONE_BLOCK_LENGTH and states == 1 else 8
    if states > 16:
        max_warps = 4 if states <= 64 else 1
    pieces = -(-length // WARP_STEPS)
    tiles = -(-pieces // max_warps)
    return -(-pieces // tiles)


def _function(name: str, result: type) -> ctypes.CFUNCTYPE:
    """A function of the library that returns the ctypes type `result`."""
    function = getattr(extension.load(LIBRARY), name)
    function.restype = result
    return function


@contextmanager
def _current_stream(device: torch.device) -> Iterator[int]:
    """Makes `device` the current one and yields the handle of its current stream."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def _call(name: str, args: ctypes.Structure, tensors: dict[str, Tensor | None], device: torch.device) -> None:
    """Calls a function of the library on the device's current stream; raises RuntimeError with the reason if it fails."""
    extension.set_pointers(args, tensors)
    with _current_stream(device) as args.stream:
        reason = _function(name, ctypes.c_char_p)(ctypes.byref(args))
    if reason:
        raise RuntimeError(f"{name}: {reason.decode()}")


def _aligned(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The tensors, with copies of those whose address is not a multiple of 8: kernels read 8 bytes at once."""
    return {name: each.clone() if each is not None and each.data_ptr() % 8 else each for name, each in tensors.items()}


def _images(x: Tensor, dt_weight: Tensor, A: Tensor) -> ctypes.Structure:
    batch, height, width, channels = x.shape
    if channels % 2:
        raise RuntimeError(f"the CUDA selective scan reads pairs of channels, and {channels} is odd: use another backend")
    warps = _warps(height * width, A.shape[-1])
    return Images(
        device=x.get_device(),
        batch=batch,
        height=height,
        width=width,
        channels=channels,
        rank=dt_weight.shape[-1],
        states=A.shape[-1],
        type=extension.TYPES[x.dtype],
        warps=warps,
        samples=max(1, 8 // warps) if A.shape[-1] <= 16 else 1,
    )


def forward_2d(
    x: Tensor, proj: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor | None, dt_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [B, H, W, D], and the states that backward needs; both float32. Shapes of the arguments: `ScanInputs`."""
    args = _images(x, dt_weight, A)
    y = A.new_empty(x.shape)
    saved = A.new_empty(saved_states_shape(args.batch, args.channels, args.height * args.width, args.states))
    inputs = _aligned({"x": x, "proj": proj, "dt_weight": dt_weight, "A": A, "D": D, "dt_bias": dt_bias})
    _call("scan_cuda_images_forward", args, {**inputs, "saved": saved, "y": y}, x.device)
    return y, saved


def backward_2d(gy: Tensor, inputs: ScanInputs, saved: Tensor) -> ScanInputs:
    """Gradients of the inputs of `forward_2d` for the gradient gy [B, H, W, D] of y."""
    x, proj, dt_weight, A, D, dt_bias = inputs
    args = _images(x, dt_weight, A)
    batch, channels, states, rank = args.batch, args.channels, args.states, args.rank
    length = args.height * args.width
    ddelta_dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32  # the range of float16 could be too small
    dx = torch.empty_like(x)
    ddelta = torch.empty((4, batch, length, channels), dtype=ddelta_dtype, device=x.device)
    dBC = A.new_empty((-(-channels // CHANNELS), 4, batch, length, 2 * states))
    sums = A.new_empty((-(-batch // args.samples), 4, states + 2, channels))
    scratch = A.new_empty(_function("scan_cuda_images_scratch", ctypes.c_int64)(ctypes.byref(args)))
    tensors = _aligned({"x": x, "proj": proj, "dt_weight": dt_weight, "A": A, "D": D, "dt_bias": dt_bias, "gy": gy})
    outputs = {"dx": dx, "ddelta": ddelta, "dBC": dBC, "sums": sums, "scratch": scratch if scratch.numel() else None}
    _call("scan_cuda_images_backward", args, {**tensors, "saved": saved, **outputs}, x.device)

    dt = rearrange(proj[..., :rank], "b h w k r -> (k b) (h w) r").to(ddelta_dtype)
    ddt = torch.bmm(ddelta.view(4, batch * length, channels), dt_weight.to(ddelta_dtype))  # [4, B*L, R]
    ddt_weight = torch.bmm(ddelta.view(4 * batch, length, channels).mT, dt)  # [4*B, D, R]
    ddt_weight = ddt_weight.view(4, batch, channels, rank).sum(1, dtype=torch.float32)
    dproj = torch.empty_like(proj)
    dproj[..., :rank] = rearrange(ddt, "k (b h w) r -> b h w k r", h=args.height, w=args.width)
    dproj[..., rank:] = rearrange(dBC.sum(0), "k b (h w) n -> b h w k n", h=args.height)
    sums = sums.sum(0)  # [4, N + 2, D]
    dA = sums[:, :states].transpose(1, 2).reshape(4 * channels, states)
    dD = None if D is None else sums[0, states + 1].repeat(4)
    return dx, dproj, ddt_weight, dA, dD, None if dt_bias is None else sums[:, states].flatten()
