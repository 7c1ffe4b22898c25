"""The selective scan: two functions, one `backend` argument, registered as torch operators.

`selective_scan` is Mamba's operator on sequences, `selective_scan_2d` VMamba's on images. The latter contains the projection
of delta, the four directions and the sum of their results, so that a backend need not build reordered copies of the image.
`scan_reference` defines what both compute, and explains it.

Backends: `cuda` and `cpp` are compiled (csrc/selective_scan), `triton` is compiled at its first use, `torch` runs everywhere.
`auto` selects the fastest that can run on the tensors' device, and prints once which one it is and why faster ones cannot.

Shapes: K directions, D channels of a direction, L = H*W positions, N states of a channel, R rank of delta.
"""

import contextlib
import functools
import warnings
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
        backend: auto, cuda, triton, cpp or torch.

    Tensors may have any strides. u, delta, B and C are float32, bfloat16 or float16 (float64 with the backend `torch` only).
    The other tensors are cast to float32, in which everything is computed.

    Returns:
        y: [B, K*D, L], float32 (float64 for float64 input).

    Raises:
        InputError: shapes, types or devices do not match, or the backend cannot run (the message gives the reason).
    """
    _check_sequences(u, delta, A, B, C, D, delta_bias)
    u, delta, B, C = _promote_types("u, delta, B, C", u, delta, B, C)
    A, D, delta_bias = _cast_parameters(u, A, D, delta_bias)
    return torch.ops.clever.selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, backend)[0]


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
    _check_image(x, proj, dt_weight, A, D, dt_bias)
    x, proj = _promote_types("x, proj", x, proj)
    dt_weight, A, D, dt_bias = _cast_parameters(x, dt_weight, A, D, dt_bias)
    x = x.permute(0, 2, 3, 1)  # [B, H, W, D]
    y = torch.ops.clever.selective_scan_2d(x, proj, dt_weight, A, D, dt_bias, backend)[0]
    return y.permute(0, 3, 1, 2)  # [B, D, H, W]


def scan_flops(batch: int, directions: int, channels: int, length: int, states: int) -> int:
    """Multiply-adds as VMamba's authors count them: 9 B L D N for the recurrence and B L D for the skip, per direction."""
    return directions * batch * length * channels * (9 * states + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _shape_error(name: str, tensor: Tensor, expected: str) -> InputError:
    return InputError(f"selective scan: {name} has shape {list(tensor.shape)}, expected {expected}")


def _check_shape(name: str, tensor: Tensor | None, expected: tuple[int, ...], symbols: str) -> None:
    if tensor is not None and tuple(tensor.shape) != expected:
        raise _shape_error(name, tensor, f"{symbols} = {list(expected)}")


def _check_sequences(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None
) -> None:
    """Raises InputError unless shapes and devices match."""
    if u.ndim != 3 or u.shape[2] < 1:
        raise _shape_error("u", u, "[B, K*D, L] with L at least 1")
    if B.ndim != 4 or B.shape[1] < 1 or B.shape[2] < 1:
        raise _shape_error("B", B, "[B, K, N, L] with K and N at least 1")
    batch, rows, length = u.shape
    directions, states = B.shape[1], B.shape[2]
    if rows % directions or rows == 0:
        raise InputError(f"selective scan: u has {rows} rows (K*D), which the K = {directions} directions of B do not divide")
    _check_shape("delta", delta, (batch, rows, length), "[B, K*D, L]")
    _check_shape("A", A, (rows, states), "[K*D, N]")
    _check_shape("B", B, (batch, directions, states, length), "[B, K, N, L]")
    _check_shape("C", C, (batch, directions, states, length), "[B, K, N, L]")
    _check_shape("D", D, (rows,), "[K*D]")
    _check_shape("delta_bias", delta_bias, (rows,), "[K*D]")
    _check_devices(u=u, delta=delta, A=A, B=B, C=C, D=D, delta_bias=delta_bias)


def _check_image(x: Tensor, proj: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor | None, dt_bias: Tensor | None) -> None:
    """Raises InputError unless shapes and devices match."""
    if x.ndim != 4 or min(x.shape[1:]) < 1:
        raise _shape_error("x", x, "[B, D, H, W] with D, H and W at least 1")
    batch, channels, height, width = x.shape
    if dt_weight.ndim != 3 or dt_weight.shape[2] < 1:
        raise _shape_error("dt_weight", dt_weight, f"[4, D, R] = [4, {channels}, at least 1]")
    if A.ndim != 2 or A.shape[1] < 1:
        raise _shape_error("A", A, f"[4*D, N] = [{4 * channels}, at least 1]")
    rank, states = dt_weight.shape[2], A.shape[1]
    _check_shape("dt_weight", dt_weight, (4, channels, rank), "[4, D, R]")
    _check_shape("A", A, (4 * channels, states), "[4*D, N]")
    _check_shape("proj", proj, (batch, height, width, 4, rank + 2 * states), "[B, H, W, 4, R + 2N]")
    _check_shape("D", D, (4 * channels,), "[4*D]")
    _check_shape("dt_bias", dt_bias, (4 * channels,), "[4*D]")
    _check_devices(x=x, proj=proj, dt_weight=dt_weight, A=A, D=D, dt_bias=dt_bias)


def _check_devices(**tensors: Tensor | None) -> None:
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        given = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise InputError(f"selective scan: all tensors must be on one device, but {given}")


def _promote_types(names: str, *tensors: Tensor) -> list[Tensor]:
    """Casts the tensors to the widest of their types."""
    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors})
    if dtype not in DTYPES:
        choices = ", ".join(str(each).removeprefix("torch.") for each in DTYPES)
        raise InputError(f"selective scan: {names} of type {str(dtype).removeprefix('torch.')}: choose one of {choices}")
    return [tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors]


def _cast_parameters(like: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Casts parameters to float32, whatever the type of the input; to float64 with float64 input."""
    dtype = compute_dtype(like)
    return [tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors]


# ---------------------------------------------------------------------------------------------------------------------
# The choice of a backend


@functools.cache
def choose_backend(backend: str, device: str, dtype: torch.dtype = torch.float32) -> str:
    """Name of the backend that runs: `backend` itself, or the fastest that can run if it is `auto`, printed once.

    Args:
        device: type of the tensors' device, such as `cpu` or `cuda`.

    Raises:
        InputError: the name is unknown, or the backend cannot run here (the message gives the reason).
    """
    if backend != "auto":
        if backend not in BACKENDS:
            raise InputError(f"selective scan backend {backend!r}: choose one of auto, {', '.join(BACKENDS)}")
        reason = _unavailable_reason(backend, device, dtype)
        if reason:
            raise InputError(f"selective scan backend {backend!r} cannot run: {reason}")
        return backend

    reasons = {}
    for name in PREFERENCE.get(device, ("torch",)):
        reason = _unavailable_reason(name, device, dtype)
        if reason is None:
            _announce(name, device, dtype, reasons)
            return name
        reasons[name] = reason
    raise AssertionError("the torch backend runs everywhere")


def _unavailable_reason(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """None if the backend can run on tensors of this device and type, otherwise the reason."""
    if dtype == torch.float64 and backend != "torch":
        return "float64 is supported by the torch backend only"
    return BACKENDS[backend].unavailable_reason(torch.device(device))


def _announce(name: str, device: str, dtype: torch.dtype, reasons: dict[str, str]) -> None:
    """Prints which backend runs, and why faster ones cannot."""
    if not is_main_process() or dtype == torch.float64:
        return
    why = "".join(f"; {faster}: {reason}" for faster, reason in reasons.items())
    print(f"selective scan on {device}: backend {name}{why}", flush=True)
    if device == "cuda" and name == "torch":
        warnings.warn(
            "the selective scan runs without a kernel for this GPU, several times slower than with one: "
            "`python -m scripts.doctor` says what to install",
            stacklevel=2,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Operators, as torch.compile, fvcore and autograd see them. Images are channels last here: x and y are [B, H, W, D].

torch.library.define(
    "clever::selective_scan",
    "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, bool delta_softplus, str backend)"
    " -> (Tensor, Tensor)",
)
torch.library.define(
    "clever::selective_scan_backward",
    "(Tensor gy, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, Tensor saved,"
    " bool delta_softplus, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
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


def _no_autocast(like: Tensor) -> contextlib.AbstractContextManager:
    """Turns autocast off, which would round what a backend computes in float32."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]


def _none_to_empty(gradients: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """Operators return tensors only: the gradient of an argument that is None is an empty one."""
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _empty_to_none(gradients: tuple[Tensor, ...], arguments: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The inverse of `_none_to_empty`."""
    return tuple(None if argument is None else gradient for gradient, argument in zip(gradients, arguments, strict=True))


@torch.library.impl("clever::selective_scan", "CompositeExplicitAutograd")
def _scan(u, delta, A, B, C, D, delta_bias, delta_softplus, backend):
    with _no_autocast(u):
        return _backend(backend, u).forward(*_contiguous(u, delta, A, B, C, D, delta_bias), delta_softplus)


@torch.library.impl("clever::selective_scan_backward", "CompositeExplicitAutograd")
def _scan_backward(gy, u, delta, A, B, C, D, delta_bias, saved, delta_softplus, backend):
    tensors = _contiguous(gy, u, delta, A, B, C, D, delta_bias)
    with _no_autocast(u):
        return _none_to_empty(_backend(backend, u).backward(*tensors, saved, delta_softplus), A)


@torch.library.impl("clever::selective_scan_2d", "CompositeExplicitAutograd")
def _scan_2d(x, proj, dt_weight, A, D, dt_bias, backend):
    with _no_autocast(x):
        return _backend(backend, x).forward_2d(*_contiguous(x, proj, dt_weight, A, D, dt_bias))


@torch.library.impl("clever::selective_scan_2d_backward", "CompositeExplicitAutograd")
def _scan_2d_backward(gy, x, proj, dt_weight, A, D, dt_bias, saved, backend):
    tensors = _contiguous(gy, x, proj, dt_weight, A, D, dt_bias)
    with _no_autocast(x):
        return _none_to_empty(_backend(backend, x).backward_2d(*tensors, saved), A)


def _fake_gradients(tensors: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """Contiguous tensors of the same shapes and types; empty ones for None."""
    return tuple(like.new_empty(0) if each is None else each.new_empty(each.shape) for each in tensors)


@torch.library.register_fake("clever::selective_scan")
def _(u, delta, A, B, C, D, delta_bias, delta_softplus, backend):
    batch, rows, length = u.shape
    shape = _backend(backend, u).saved_states_shape(batch, B.shape[1], rows // B.shape[1], length, A.shape[1])
    return A.new_empty(u.shape), A.new_empty(shape)


@torch.library.register_fake("clever::selective_scan_backward")
def _(gy, u, delta, A, B, C, D, delta_bias, saved, delta_softplus, backend):
    return _fake_gradients((u, delta, A, B, C, D, delta_bias), A)


@torch.library.register_fake("clever::selective_scan_2d")
def _(x, proj, dt_weight, A, D, dt_bias, backend):
    batch, height, width, channels = x.shape
    shape = _backend(backend, x).saved_states_shape(batch, 4, channels, height * width, A.shape[1])
    return A.new_empty(x.shape), A.new_empty(shape)


@torch.library.register_fake("clever::selective_scan_2d_backward")
def _(gy, x, proj, dt_weight, A, D, dt_bias, saved, backend):
    return _fake_gradients((x, proj, dt_weight, A, D, dt_bias), A)


def _save_for_backward(ctx, inputs, output) -> None:
    *tensors, ctx.delta_softplus, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _scan_autograd(ctx, gy, _):
    if gy is None:  # nothing depends on y
        return (None,) * 9
    *tensors, saved = ctx.saved_tensors
    gradients = torch.ops.clever.selective_scan_backward(gy, *tensors, saved, ctx.delta_softplus, ctx.backend)
    return (*_empty_to_none(gradients, tuple(tensors)), None, None)


def _save_for_backward_2d(ctx, inputs, output) -> None:
    *tensors, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _scan_2d_autograd(ctx, gy, _):
    if gy is None:
        return (None,) * 7
    *tensors, saved = ctx.saved_tensors
    gradients = torch.ops.clever.selective_scan_2d_backward(gy, *tensors, saved, ctx.backend)
    return (*_empty_to_none(gradients, tuple(tensors)), None)


def _no_second_derivative(ctx, *gradients):
    raise RuntimeError("the selective scan has no second derivative: use vmamba.scan_reference for it")


torch.library.register_autograd("clever::selective_scan", _scan_autograd, setup_context=_save_for_backward)
torch.library.register_autograd("clever::selective_scan_2d", _scan_2d_autograd, setup_context=_save_for_backward_2d)
torch.library.register_autograd("clever::selective_scan_backward", _no_second_derivative)
torch.library.register_autograd("clever::selective_scan_2d_backward", _no_second_derivative)
