"""The selective scan: two functions, one `backend` argument, registered as torch operators.

Letters: B batch, K directions, D channels of a direction, L = H*W positions, N states of a channel, R rank of delta.

`selective_scan` is the operator of Mamba on sequences, `selective_scan_2d` VMamba's on images: its four directions, the
projection of delta and the merging of the four results are one call, so that backends need not build the reordered copies.
What they compute is defined by `scan_torch.reference` and `scan_torch.reference_2d`.

Backends: `cuda` and `cpp` are compiled (csrc/selective_scan), `triton` compiles itself, `torch` runs everywhere. `auto` takes
the first that can run on the tensors' device and says once which one it is and why better ones are not there.
"""

import contextlib
import functools
import warnings
from types import ModuleType

import torch
from torch import Tensor

from distributed import is_main_process
from utils import InputError
from vmamba import scan_cpp, scan_cuda, scan_torch, scan_triton

BACKENDS: dict[str, ModuleType] = {"cuda": scan_cuda, "triton": scan_triton, "cpp": scan_cpp, "torch": scan_torch}
PREFERENCE = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpp", "torch")}  # by type of device; others: torch
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

    Any strides. u, delta, B and C in float32, bfloat16 or float16 (float64: `torch` only); the rest, and all arithmetic,
    in float32.

    Returns:
        y: [B, K*D, L], float32 (float64 for float64 input).

    Raises:
        InputError: shapes, types or devices that do not fit; a backend that cannot run, with the reason.
    """
    directions, states = _check_sequences(u, delta, A, B, C, D, delta_bias)
    u, delta, B, C = _one_type("u, delta, B, C", u, delta, B, C)
    A, D, delta_bias = _parameters(u, A, D, delta_bias)
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
    """VMamba's 2D selective scan (arXiv 2401.10166, section 4.2): row by row, column by column, both reversed; their sum.

    Args:
        x: [B, D, H, W]; any strides, channels last is quickest.
        proj: [B, H, W, 4, R + 2N]: dt, B and C of each direction at a position (x_proj, in the order of positions).
        dt_weight: [4, D, R]; delta of direction k is softplus(dt_weight[k] @ dt + dt_bias).
        A: [4*D, N].
        D, dt_bias: [4*D], or None.
        backend: auto, cuda, triton, cpp or torch.

    x and proj in float32, bfloat16 or float16 (float64: `torch` only); the rest, and all arithmetic, in float32.

    Returns:
        y: [B, D, H, W] with channels last in memory, float32 (float64 for float64 input).

    Raises:
        InputError: shapes, types or devices that do not fit; a backend that cannot run, with the reason.
    """
    _check_image(x, proj, dt_weight, A, D, dt_bias)
    x, proj = _one_type("x, proj", x, proj)
    dt_weight, A, D, dt_bias = _parameters(x, dt_weight, A, D, dt_bias)
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


def _check_shape(name: str, tensor: Tensor | None, expected: tuple[int, ...], letters: str) -> None:
    if tensor is not None and tuple(tensor.shape) != expected:
        raise _shape_error(name, tensor, f"{letters} = {list(expected)}")


def _check_sequences(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None
) -> tuple[int, int]:
    """(K, N); InputError unless all shapes fit."""
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
    return directions, states


def _check_image(x: Tensor, proj: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor | None, dt_bias: Tensor | None) -> None:
    """InputError unless all shapes fit."""
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


def _one_type(names: str, *tensors: Tensor) -> list[Tensor]:
    """The tensors in the widest of their types."""
    kind = functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors})
    if kind not in DTYPES:
        choices = ", ".join(str(each).removeprefix("torch.") for each in DTYPES)
        raise InputError(f"selective scan: {names} of type {str(kind).removeprefix('torch.')}: choose one of {choices}")
    return [tensor if tensor.dtype == kind else tensor.to(kind) for tensor in tensors]


def _parameters(like: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Parameters stay in float32, whatever the type of the input; in float64 with float64 input."""
    kind = torch.float64 if like.dtype == torch.float64 else torch.float32
    return [tensor if tensor is None or tensor.dtype == kind else tensor.to(kind) for tensor in tensors]


# ---------------------------------------------------------------------------------------------------------------------
# The choice of a backend


@functools.cache
def choose_backend(backend: str, device: str, dtype: torch.dtype = torch.float32) -> str:
    """The name of the backend that runs: `backend` itself, or the first that can for `auto`, which is said once.

    Args:
        device: type of the tensors' device, such as `cpu` or `cuda`.

    Raises:
        InputError: unknown name, or a backend that cannot run here, with the reason.
    """
    if backend != "auto":
        if backend not in BACKENDS:
            raise InputError(f"selective scan backend {backend!r}: choose one of auto, {', '.join(BACKENDS)}")
        reason = _why_not(backend, device, dtype)
        if reason:
            raise InputError(f"selective scan backend {backend!r} cannot run: {reason}")
        return backend

    reasons = {}
    for name in PREFERENCE.get(device, ("torch",)):
        reason = _why_not(name, device, dtype)
        if reason is None:
            _announce(name, device, dtype, reasons)
            return name
        reasons[name] = reason
    raise AssertionError("the torch backend runs everywhere")


def _why_not(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """None when the backend can run on tensors of this device and type, otherwise the reason."""
    if dtype == torch.float64 and backend != "torch":
        return "float64 is for the torch backend only"
    return BACKENDS[backend].unavailable(torch.device(device))


def _announce(name: str, device: str, dtype: torch.dtype, reasons: dict[str, str]) -> None:
    """Says which backend runs, and why those that would be faster do not."""
    if not is_main_process() or dtype == torch.float64:
        return
    why = "".join(f"; {better}: {reason}" for better, reason in reasons.items())
    print(f"selective scan on {device}: backend {name}{why}", flush=True)
    if device == "cuda" and name == "torch":
        warnings.warn(
            "the selective scan runs without a kernel for this GPU, several times slower than it could: "
            "run `python -m scripts.doctor` for what to install",
            stacklevel=2,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Operators: what torch.compile, fvcore and autograd see. Images are channels last here, x and y [B, H, W, D].

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


def _exactly(like: Tensor) -> contextlib.AbstractContextManager:
    """Without autocast, which would round what a backend computes in float32."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]


def _present(gradients: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """An operator returns tensors: an empty one stands for the gradient of an argument that was not given."""
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _given(gradients: tuple[Tensor, ...], arguments: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if argument is None else gradient for gradient, argument in zip(gradients, arguments, strict=True))


@torch.library.impl("clever::selective_scan", "CompositeExplicitAutograd")
def _scan(u, delta, A, B, C, D, delta_bias, delta_softplus, backend):
    with _exactly(u):
        return _backend(backend, u).forward(*_contiguous(u, delta, A, B, C, D, delta_bias), delta_softplus)


@torch.library.impl("clever::selective_scan_backward", "CompositeExplicitAutograd")
def _scan_backward(gy, u, delta, A, B, C, D, delta_bias, saved, delta_softplus, backend):
    tensors = _contiguous(gy, u, delta, A, B, C, D, delta_bias)
    with _exactly(u):
        return _present(_backend(backend, u).backward(*tensors, saved, delta_softplus), A)


@torch.library.impl("clever::selective_scan_2d", "CompositeExplicitAutograd")
def _scan_2d(x, proj, dt_weight, A, D, dt_bias, backend):
    with _exactly(x):
        return _backend(backend, x).forward_2d(*_contiguous(x, proj, dt_weight, A, D, dt_bias))


@torch.library.impl("clever::selective_scan_2d_backward", "CompositeExplicitAutograd")
def _scan_2d_backward(gy, x, proj, dt_weight, A, D, dt_bias, saved, backend):
    tensors = _contiguous(gy, x, proj, dt_weight, A, D, dt_bias)
    with _exactly(x):
        return _present(_backend(backend, x).backward_2d(*tensors, saved), A)


def _like(tensors: tuple[Tensor | None, ...], kind: Tensor) -> tuple[Tensor, ...]:
    """Contiguous tensors of the same shapes and types; empty ones for None."""
    return tuple(kind.new_empty(0) if each is None else each.new_empty(each.shape) for each in tensors)


@torch.library.register_fake("clever::selective_scan")
def _(u, delta, A, B, C, D, delta_bias, delta_softplus, backend):
    batch, rows, length = u.shape
    shape = _backend(backend, u).states_shape(batch, B.shape[1], rows // B.shape[1], length, A.shape[1])
    return A.new_empty(u.shape), A.new_empty(shape)


@torch.library.register_fake("clever::selective_scan_backward")
def _(gy, u, delta, A, B, C, D, delta_bias, saved, delta_softplus, backend):
    return _like((u, delta, A, B, C, D, delta_bias), A)


@torch.library.register_fake("clever::selective_scan_2d")
def _(x, proj, dt_weight, A, D, dt_bias, backend):
    batch, height, width, channels = x.shape
    shape = _backend(backend, x).states_shape(batch, 4, channels, height * width, A.shape[1])
    return A.new_empty(x.shape), A.new_empty(shape)


@torch.library.register_fake("clever::selective_scan_2d_backward")
def _(gy, x, proj, dt_weight, A, D, dt_bias, saved, backend):
    return _like((x, proj, dt_weight, A, D, dt_bias), A)


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.delta_softplus, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _scan_autograd(ctx, gy, _):
    if gy is None:  # nothing depends on y
        return (None,) * 9
    *tensors, saved = ctx.saved_tensors
    gradients = torch.ops.clever.selective_scan_backward(gy, *tensors, saved, ctx.delta_softplus, ctx.backend)
    return (*_given(gradients, tuple(tensors)), None, None)


def _keep_2d(ctx, inputs, output) -> None:
    *tensors, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _scan_2d_autograd(ctx, gy, _):
    if gy is None:
        return (None,) * 7
    *tensors, saved = ctx.saved_tensors
    gradients = torch.ops.clever.selective_scan_2d_backward(gy, *tensors, saved, ctx.backend)
    return (*_given(gradients, tuple(tensors)), None)


def _no_second_derivative(ctx, *gradients):
    raise RuntimeError("the selective scan has no second derivative: use vmamba.scan_torch.reference for it")


torch.library.register_autograd("clever::selective_scan", _scan_autograd, setup_context=_keep)
torch.library.register_autograd("clever::selective_scan_2d", _scan_2d_autograd, setup_context=_keep_2d)
torch.library.register_autograd("clever::selective_scan_backward", _no_second_derivative)
torch.library.register_autograd("clever::selective_scan_2d_backward", _no_second_derivative)
