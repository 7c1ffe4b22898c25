"""The backend `cuda`: the selective scan compiled for NVIDIA GPUs (csrc/selective_scan/scan_cuda.cu), called through ctypes.

It computes what `scan_reference` defines, in float32 whatever the type of the input. Kernels write partial sums over the batch
or the channels, which are added here rather than atomically: results have the same bits in every run.

Shapes: K directions, D channels of a direction, L = H*W positions, N states of a channel, R rank of delta.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from . import extension

LIBRARY = "scan_cuda"

# Constants of the .cuh files.
CHANNELS = 16  # of an image, per block of threads
WARP_STEPS = 16  # positions of an image that a warp processes at a time
LANE_STEPS = 4  # positions of a sequence that a lane processes at a time
SEQUENCE_THREADS = 256  # per block of threads

# Above this number of positions the sum over directions (64 bytes each) leaves shared memory for one block per multiprocessor.
ONE_BLOCK_LENGTH = 1600


Images = extension.structure(
    "ScanCudaImages",
    "device batch height width channels rank states type warps samples",
    "x proj dt_weight A D dt_bias saved y gy dx scratch ddelta dBC sums stream",
)
Sequences = extension.structure(
    "ScanCudaSequences",
    "device batch directions channels length states type softplus lanes",
    "u delta A B C D delta_bias saved y gy du ddelta dB dC dA dD dbias carry stream",
)


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """None if this backend can run (on tensors of that device), otherwise the reason in one line."""
    if device is not None and device.type != "cuda":
        return f"the CUDA scan works on CUDA tensors, not on {device.type}"
    if reason := extension.unavailable_reason(LIBRARY):
        return reason
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device: check `nvidia-smi` and CUDA_VISIBLE_DEVICES"
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    with torch.cuda.device(index):
        reason = _function("scan_cuda_unavailable", ctypes.c_char_p)(ctypes.c_int64(index))
    if reason is None:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    name = torch.cuda.get_device_name(index)
    return (
        f"the library does not run on {name} (compute capability {major}.{minor}): {reason.decode()}; "
        f"build it for this GPU, with a CUDA toolkit that the driver supports: "
        f"TORCH_CUDA_ARCH_LIST={major}.{minor} {extension.BUILD}"
    )


def saved_states_shape(batch: int, directions: int, channels: int, length: int, states: int) -> tuple[int, ...]:
    """Shape of the states that forward keeps for backward: the state at the start of each tile, with D rounded up to even.

    Large enough for images and for sequences, whose tiles differ.
    """
    tile = min(_warps(length, states) * WARP_STEPS, _lanes(length) * LANE_STEPS)
    return batch, directions, -(-length // tile), states, channels + channels % 2


def _warps(length: int, states: int) -> int:
    """Warps per sample of an image: such that they share its positions evenly, in few tiles and with few idle lanes."""
    max_warps = 16 if length > ONE_BLOCK_LENGTH and states == 1 else 8
    if states > 16:
        max_warps = 4 if states <= 64 else 1
    pieces = -(-length // WARP_STEPS)
    tiles = -(-pieces // max_warps)
    return -(-pieces // tiles)


def _lanes(length: int) -> int:
    """Lanes of a warp that share a sequence: a power of two, 32 at most."""
    return min(32, 1 << (-(-length // LANE_STEPS) - 1).bit_length())


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


def _set_pointers(args: ctypes.Structure, tensors: dict[str, Tensor | None]) -> ctypes.Structure:
    for name, tensor in tensors.items():
        setattr(args, name, None if tensor is None else tensor.data_ptr())
    return args


def _call(name: str, args: ctypes.Structure, device: torch.device) -> None:
    """Calls a function of the library on the device's current stream; raises RuntimeError with the reason if it fails."""
    with _current_stream(device) as args.stream:
        reason = _function(name, ctypes.c_char_p)(ctypes.byref(args))
    if reason:
        raise RuntimeError(f"{name}: {reason.decode()}")


def _aligned(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The tensors, with copies of those whose address is not a multiple of 8: kernels read 8 bytes at once."""
    return {name: each.clone() if each is not None and each.data_ptr() % 8 else each for name, each in tensors.items()}


def _allocate_states(like: Tensor, batch: int, directions: int, channels: int, length: int, states: int, tile: int) -> Tensor:
    """Memory of `saved_states_shape`. The part that tiles of this length do not use is 0: operators return defined values."""
    saved = like.new_empty(saved_states_shape(batch, directions, channels, length, states))
    saved.view(-1)[batch * directions * channels * states * -(-length // tile) :].zero_()
    return saved


# ---------------------------------------------------------------------------------------------------------------------
# Sequences


def _sequences(u: Tensor, A: Tensor, B: Tensor, delta_softplus: bool) -> ctypes.Structure:
    batch, directions, states, length = B.shape
    return Sequences(
        device=u.get_device(),
        batch=batch,
        directions=directions,
        channels=A.shape[0] // directions,
        length=length,
        states=states,
        type=extension.TYPES[u.dtype],
        softplus=delta_softplus,
        lanes=_lanes(length),
    )


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
    """y [B, K*D, L], and the states that backward needs; both float32.

    u, delta: [B, K*D, L]; A: [K*D, N]; B, C: [B, K, N, L]; D, delta_bias: [K*D].
    """
    args = _sequences(u, A, B, delta_softplus)
    y = A.new_empty(u.shape)
    sizes = args.batch, args.directions, args.channels, args.length, args.states
    saved = _allocate_states(A, *sizes, tile=args.lanes * LANE_STEPS)
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "delta_bias": delta_bias, "saved": saved, "y": y}
    _call("scan_cuda_sequences_forward", _set_pointers(args, tensors), u.device)
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
    args = _sequences(u, A, B, delta_softplus)
    groups = -(-args.channels * args.lanes // SEQUENCE_THREADS)
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dB, dC = A.new_empty((2, groups, *B.shape))
    dA, carry = A.new_empty((2, args.batch, *A.shape))
    dD, dbias = A.new_empty((2, args.batch, A.shape[0]))
    inputs = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "delta_bias": delta_bias, "saved": saved, "gy": gy}
    outputs = {"du": du, "ddelta": ddelta, "dB": dB, "dC": dC, "dA": dA, "dD": dD, "dbias": dbias, "carry": carry}
    _call("scan_cuda_sequences_backward", _set_pointers(args, {**inputs, **outputs}), u.device)
    return (
        du,
        ddelta,
        dA.sum(0),
        dB.sum(0).to(B.dtype),
        dC.sum(0).to(C.dtype),
        None if D is None else dD.sum(0),
        None if delta_bias is None else dbias.sum(0),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Images


def _images(x: Tensor, dt_weight: Tensor, A: Tensor) -> ctypes.Structure:
    batch, height, width, channels = x.shape
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


def _with_even_channels(
    x: Tensor, proj: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor | None, dt_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The arguments with one more channel, of zeros: kernels process pairs of channels. Our models have even widths."""
    vectors = [None if each is None else pad(each.view(4, -1), (0, 1)).flatten() for each in (D, dt_bias)]
    A = pad(A.view(4, -1, A.shape[-1]), (0, 0, 0, 1)).flatten(0, 1)
    return pad(x, (0, 1)), proj, pad(dt_weight, (0, 0, 0, 1)), A, *vectors


def forward_2d(
    x: Tensor, proj: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor | None, dt_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [B, H, W, D], and the states that backward needs; both float32.

    x: [B, H, W, D]; proj: [B, H, W, 4, R + 2N]; dt_weight: [4, D, R]; A: [4*D, N]; D, dt_bias: [4*D].
    """
    if x.shape[-1] % 2:
        y, saved = forward_2d(*_with_even_channels(x, proj, dt_weight, A, D, dt_bias))
        return y[..., :-1].contiguous(), saved
    args = _images(x, dt_weight, A)
    y = A.new_empty(x.shape)
    sizes = args.batch, 4, args.channels, args.height * args.width, args.states
    saved = _allocate_states(A, *sizes, tile=args.warps * WARP_STEPS)
    inputs = _aligned({"x": x, "proj": proj, "dt_weight": dt_weight, "A": A, "D": D, "dt_bias": dt_bias})
    _call("scan_cuda_images_forward", _set_pointers(args, {**inputs, "saved": saved, "y": y}), x.device)
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
    if x.shape[-1] % 2:
        even = _with_even_channels(x, proj, dt_weight, A, D, dt_bias)
        dx, dproj, ddt_weight, dA, *vectors = backward_2d(pad(gy, (0, 1)), *even, saved)
        dA = dA.view(4, -1, A.shape[-1])[:, :-1].reshape(A.shape)
        vectors = [None if each is None else each.view(4, -1)[:, :-1].flatten() for each in vectors]
        return dx[..., :-1].contiguous(), dproj, ddt_weight[:, :-1].contiguous(), dA, *vectors
    args = _images(x, dt_weight, A)
    batch, channels, states, rank = args.batch, args.channels, args.states, args.rank
    length = args.height * args.width
    ddelta_dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32  # the range of float16 could be too small
    dx = torch.empty_like(x)
    ddelta = torch.empty((4, batch, length, channels), dtype=ddelta_dtype, device=x.device)
    dBC = A.new_empty((-(-channels // CHANNELS), 4, batch, length, 2 * states))
    sums = A.new_empty((-(-batch // args.samples), 4, states + 2, channels))
    scratch = A.new_empty(_function("scan_cuda_images_scratch", ctypes.c_int64)(ctypes.byref(args)))
    inputs = _aligned({"x": x, "proj": proj, "dt_weight": dt_weight, "A": A, "D": D, "dt_bias": dt_bias, "gy": gy})
    outputs = {"dx": dx, "ddelta": ddelta, "dBC": dBC, "sums": sums}
    pointers = {**inputs, **outputs, "saved": saved, "scratch": scratch if scratch.numel() else None}
    _call("scan_cuda_images_backward", _set_pointers(args, pointers), x.device)

    with torch.autocast(x.device.type, enabled=False):  # it would round float32 to half precision
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
