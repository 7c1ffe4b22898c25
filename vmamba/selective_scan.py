"""The selective scan: Mamba's of sequences, in PyTorch, and VMamba's of images, with several backends.

`selective_scan_2d` contains the projection of delta, the four directions and the sum of their results, so that a backend need
not build reordered copies of the image. `scan_reference` defines what both compute, and explains it.

Backends: `cuda` and `cpp` are compiled (csrc/selective_scan), `triton` is compiled at its first use, `torch` runs everywhere.
`auto` selects the fastest that can run on the tensors' device, and prints once which one it is and why faster ones cannot.

Shapes: K directions, D channels of a direction, L = H*W positions, N states of a channel, R rank of delta.
"""

import functools
from types import ModuleType

import torch
from torch import Tensor

from clever.distributed import is_main_process
from clever.utils import InputError
from vmamba import scan_cpp, scan_cuda, scan_torch, scan_triton
from vmamba.scan_reference import compute_dtype

BACKENDS: dict[str, ModuleType] = {"cuda": scan_cuda, "triton": scan_triton, "cpp": scan_cpp, "torch": scan_torch}
PREFERENCE = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpp", "torch")}  # by device type, fastest first; others: torch
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Selective scan of sequences (Mamba, arXiv 2312.00752, section 3.2).

    Args:
        u, delta: [B, K*D, L].
        A: [K*D, N].
        B, C: [B, K, N, L], shared by the D channels of a direction.
        D, delta_bias: [K*D], or None.
        delta_softplus: delta = softplus(delta + delta_bias).
        backend: auto or torch.

    Tensors may have any strides. u, delta, B and C are float32, bfloat16, float16 or float64. Everything is computed in
    float32, or in float64 for float64 input. There is no second derivative.

    Returns:
        y: [B, K*D, L], float32 (float64 for float64 input).

    Raises:
        InputError: shapes, types or devices do not match, or another backend is asked for.
    """
    if backend not in ("auto", "torch"):
        raise InputError(f"selective scan backend {backend!r}: sequences are scanned by torch, other backends scan images (2D)")
    batch, rows, length = _shape("u", u, "B K*D L", (None, None, None), u)
    _, directions, states, _ = _shape("B", B, "B K N L", (batch, None, None, length), u)
    rows = rows // directions * directions
    _shape("delta", delta, "B K*D L", (batch, rows, length), u)
    _shape("A", A, "K*D N", (rows, states), u)
    _shape("C", C, "B K N L", (batch, directions, states, length), u)
    _shape("D", D, "K*D", (rows,), u)
    _shape("delta_bias", delta_bias, "K*D", (rows,), u)
    u, delta, B, C = _promote_types("u, delta, B, C", u, delta, B, C)
    return scan_torch.scan_sequences(u, delta, A, B, C, D, delta_bias, delta_softplus)


def selective_scan_2d(
    x: Tensor,
    proj: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """VMamba's 2D selective scan (arXiv 2401.10166, section 4.2): the sum of scans row by row, column by column, and reversed.

    Args:
        x: [B, D, H, W]; any strides, channels last is fastest.
        proj: [B, H, W, 4, R + 2N]: dt, B and C of each direction at each position.
        dt_weight: [4, D, R]; delta of direction k is softplus(dt_weight[k] @ dt + dt_bias).
        A: [4*D, N].
        D, dt_bias: [4*D], or None.
        backend: auto, cuda, triton, cpp or torch.

    x and proj are float32, bfloat16 or float16 (float64 with the backend `torch` only). The other tensors are cast to float32,
    in which everything is computed.

    Returns:
        y: [B, D, H, W] in channels-last memory format, float32 (float64 for float64 input).

    Raises:
        InputError: shapes, types or devices do not match, or the backend cannot run (the message gives the reason).
    """
    batch, channels, height, width = _shape("x", x, "B D H W", (None, None, None, None), x)
    _, _, rank = _shape("dt_weight", dt_weight, "4 D R", (4, channels, None), x)
    _, states = _shape("A", A, "4*D N", (4 * channels, None), x)
    _shape("proj", proj, "B H W 4 R+2N", (batch, height, width, 4, rank + 2 * states), x)
    _shape("D", D, "4*D", (4 * channels,), x)
    _shape("dt_bias", dt_bias, "4*D", (4 * channels,), x)
    x, proj = _promote_types("x, proj", x, proj)
    dtype = compute_dtype(x)
    dt_weight, A, D, dt_bias = (None if each is None else each.to(dtype) for each in (dt_weight, A, D, dt_bias))
    x = x.permute(0, 2, 3, 1)  # [B, H, W, D]
    y = torch.ops.clever.selective_scan_2d(x, proj, dt_weight, A, D, dt_bias, backend)[0]
    return y.permute(0, 3, 1, 2)  # [B, D, H, W]


def scan_flops(batch: int, directions: int, channels: int, length: int, states: int) -> int:
    """Multiply-adds as VMamba's authors count them: 9 B L D N for the recurrence and B L D for the skip, per direction."""
    return directions * batch * length * channels * (9 * states + 1)


def _shape(name: str, tensor: Tensor | None, symbols: str, expected: tuple[int | None, ...], like: Tensor) -> tuple[int, ...]:
    """Shape of the tensor; raises InputError unless it is the expected one, on the device of `like`. None: any size."""
    if tensor is None:
        return ()
    fits = tensor.ndim == len(expected) and all(want in (None, size) for want, size in zip(expected, tensor.shape, strict=True))
    if not fits or tensor.device != like.device:
        sizes = " ".join("any" if size is None else str(size) for size in expected)
        found = f"{name} has shape {list(tensor.shape)} on {tensor.device}"
        raise InputError(f"selective scan: {found}, expected [{symbols}] = [{sizes}] on {like.device}")
    return tuple(tensor.shape)


def _promote_types(names: str, *tensors: Tensor) -> list[Tensor]:
    """Casts the tensors to the widest of their types."""
    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors})
    if dtype not in DTYPES:
        raise InputError(f"selective scan: {names} are {dtype}; choose float32, bfloat16, float16 or float64")
    return [tensor.to(dtype) for tensor in tensors]


@functools.cache
def choose_backend(backend: str, device: str, dtype: torch.dtype = torch.float32) -> str:
    """Name of the backend that runs: `backend` itself, or the fastest that can run if it is `auto`, printed once.

    Args:
        device: type of the tensors' device, such as `cpu` or `cuda`.

    Raises:
        InputError: the name is unknown, or the backend cannot run here (the message gives the reason).
    """
    if backend != "auto":
        known = f"choose one of auto, {', '.join(BACKENDS)}"
        if reason := _unavailable_reason(backend, device, dtype) if backend in BACKENDS else known:
            raise InputError(f"selective scan backend {backend!r}: {reason}")
        return backend

    slower = ""
    for name in PREFERENCE.get(device, ("torch",)):
        reason = _unavailable_reason(name, device, dtype)
        if reason is None:
            break
        slower += f"; {name}: {reason}"
    if is_main_process() and dtype != torch.float64:
        hint = " (`python -m scripts.doctor` says what makes it faster)" if slower else ""
        print(f"selective scan on {device}: backend {name}{slower}{hint}", flush=True)
    return name


def _unavailable_reason(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """None if the backend can run on tensors of this device and type, otherwise the reason."""
    if dtype == torch.float64 and backend != "torch":
        return "float64 is supported by the torch backend only"
    return BACKENDS[backend].unavailable_reason(torch.device(device))


# ---------------------------------------------------------------------------------------------------------------------
# The operator, as torch.compile, fvcore and autograd see it. Images are channels last here: x and y are [B, H, W, D].

torch.library.define(
    "clever::selective_scan_2d",
    "(Tensor x, Tensor proj, Tensor dt_weight, Tensor A, Tensor? D, Tensor? dt_bias, str backend) -> (Tensor, Tensor)",
)
torch.library.define(
    "clever::selective_scan_2d_backward",
    "(Tensor gy, Tensor x, Tensor proj, Tensor dt_weight, Tensor A, Tensor? D, Tensor? dt_bias, Tensor saved, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _backend(name: str, like: Tensor) -> ModuleType:
    return BACKENDS[choose_backend(name, like.device.type, like.dtype)]


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]


def _none_to_empty(gradients: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """Operators return tensors only: the gradient of an argument that is None is an empty one."""
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


@torch.library.impl("clever::selective_scan_2d", "CompositeExplicitAutograd")
def _scan_2d(x, proj, dt_weight, A, D, dt_bias, backend):
    with torch.autocast(x.device.type, enabled=False):  # it would round what is computed in float32
        return _backend(backend, x).forward_2d(*_contiguous(x, proj, dt_weight, A, D, dt_bias))


@torch.library.impl("clever::selective_scan_2d_backward", "CompositeExplicitAutograd")
def _scan_2d_backward(gy, x, proj, dt_weight, A, D, dt_bias, saved, backend):
    gy, *inputs = _contiguous(gy, x, proj, dt_weight, A, D, dt_bias)
    with torch.autocast(x.device.type, enabled=False):  # it would round what is computed in float32
        return _none_to_empty(_backend(backend, x).backward_2d(gy, tuple(inputs), saved), A)


@torch.library.register_fake("clever::selective_scan_2d")
def _(x, proj, dt_weight, A, D, dt_bias, backend):
    batch, height, width, channels = x.shape
    shape = _backend(backend, x).saved_states_shape(batch, channels, height * width, A.shape[1])
    return A.new_empty(x.shape), A.new_empty(shape)


@torch.library.register_fake("clever::selective_scan_2d_backward")
def _(gy, x, proj, dt_weight, A, D, dt_bias, saved, backend):
    inputs = (x, proj, dt_weight, A, D, dt_bias)
    return _none_to_empty(tuple(None if each is None else each.new_empty(each.shape) for each in inputs), A)


def _save_for_backward(ctx, inputs, output) -> None:
    *tensors, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _scan_autograd(ctx, gy, _):
    if gy is None:
        return (None,) * 7
    *tensors, saved = ctx.saved_tensors
    gradients = torch.ops.clever.selective_scan_2d_backward(gy, *tensors, saved, ctx.backend)
    return (*(None if tensor is None else each for each, tensor in zip(gradients, tensors, strict=True)), None)


def _no_second_derivative(ctx, *gradients):
    raise RuntimeError("the selective scan has no second derivative: use vmamba.scan_reference for it")


torch.library.register_autograd("clever::selective_scan_2d", _scan_autograd, setup_context=_save_for_backward)
torch.library.register_autograd("clever::selective_scan_2d_backward", _no_second_derivative)
