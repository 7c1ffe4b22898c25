"""Inputs of the selective scan, and comparisons with its reference that the tests of every backend share.

Lists of tensors are in the order of the arguments: u, delta, A, B, C, D, delta_bias for sequences, and x [B, H, W, D], proj,
dt_weight, A, D, dt_bias for images. D and the bias may be None.
"""

import json
from collections.abc import Callable
from types import ModuleType

import torch
from safetensors.torch import load_file
from support.golden import DATA, rel_error, tensor
from torch import Tensor

from vmamba.scan_reference import selective_scan_2d_reference

EXTREMES = [(delta, A) for delta in (-1e4, -100.0, 0.0, 30.0, 1e4) for A in (-1e4, -1.0, -1e-8)]


def draw(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_sequences(batch: int, directions: int, channels: int, states: int, length: int) -> list[Tensor]:
    rows = directions * channels
    u, delta = draw((batch, rows, length), 1), draw((batch, rows, length), 2, 0.5)
    B, C = draw((batch, directions, states, length), 3), draw((batch, directions, states, length), 4)
    return [u, delta, -draw((rows, states), 5, 0.5).exp(), B, C, draw((rows,), 6), draw((rows,), 7, 0.5) - 1]


def draw_images(batch: int, height: int, width: int, channels: int, rank: int, states: int) -> list[Tensor]:
    x, proj = draw((batch, height, width, channels), 1), draw((batch, height, width, 4, rank + 2 * states), 2)
    dt_weight, A = draw((4, channels, rank), 3, rank**-0.5), -draw((4 * channels, states), 4, 0.5).exp()
    return [x, proj, dt_weight, A, draw((4 * channels,), 5), draw((4 * channels,), 6, 0.5) - 1]


def extreme_images(delta: float, A: float) -> list[Tensor]:
    """Images with this bias of delta and this A everywhere."""
    x, proj, dt_weight, As, D, bias = draw_images(1, 3, 4, 10, 2, 1)
    return [x, proj, dt_weight, As.fill_(A), D, bias.fill_(delta)]


def without(tensors: list[Tensor], *indices: int) -> list[Tensor | None]:
    """None in place of some tensors."""
    return [None if index in indices else each for index, each in enumerate(tensors)]


def halve(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Images with x and proj in half precision."""
    return [*(each.to(dtype) for each in tensors[:2]), *tensors[2:]]


def with_gradients(function: Callable[..., Tensor], tensors: list[Tensor | None], device: str = "cpu") -> list[Tensor]:
    """y and the gradients of the tensors that are not None by autograd, for a fixed gradient of y; on the CPU."""
    leaves = [None if each is None else each.detach().to(device).requires_grad_() for each in tensors]
    y = function(*leaves)
    gradients = torch.autograd.grad(y, [each for each in leaves if each is not None], draw(tuple(y.shape), 9).to(y))
    return [y.detach().cpu(), *(gradient.cpu() for gradient in gradients)]


def exactly(function: Callable[..., Tensor], tensors: list[Tensor | None]) -> list[Tensor]:
    """`with_gradients` in float64."""
    return with_gradients(function, [None if each is None else each.cpu().double() for each in tensors])


def run_images(backend: ModuleType, tensors: list[Tensor | None]) -> list[Tensor]:
    """y and the gradients of the tensors that are not None, by a backend's own functions; checks shapes, types and layouts."""
    y, saved = backend.forward_2d(*tensors)
    assert y.dtype == torch.float32 and y.is_contiguous()
    gradients = backend.backward_2d(draw(tuple(y.shape), 9).to(y), tuple(tensors), saved)
    for argument, gradient in zip(tensors, gradients, strict=True):
        assert (argument is None) == (gradient is None)
        if argument is not None:
            assert (gradient.shape, gradient.dtype) == (argument.shape, argument.dtype)
            assert gradient.is_contiguous()
    return [y, *(gradient for gradient in gradients if gradient is not None)]


def assert_close(actual: list[Tensor], expected: list[Tensor], y: float, gradients: float) -> None:
    """Norms of the errors at most these fractions of the expected norms, which may be zero."""
    for index, (got, want) in enumerate(zip(actual, expected, strict=True)):
        assert got.shape == want.shape, index
        error, norm = (got.cpu().double() - want.double()).norm(), want.double().norm()
        assert error <= (gradients if index else y) * norm, (index, error / norm)


def assert_as_exact_as_plain_torch(
    scan: Callable[[list[Tensor]], list[Tensor]], tensors: list[Tensor], dtype: torch.dtype
) -> None:
    """Error against float64 on the unrounded images: at most twice that of the reference on the same rounded images."""
    rounded, plain = halve(tensors, dtype), selective_scan_2d_reference
    for index, (got, bound, want) in enumerate(
        zip(scan(rounded), with_gradients(plain, rounded), exactly(plain, tensors), strict=True)
    ):
        assert got.dtype == bound.dtype, index
        assert rel_error(got, want) <= 2 * rel_error(bound, want) + 1e-6, index


def golden_sequences(name: str) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """The original's numbers: arguments, gradient of y, and y with the gradients of the arguments. `name`: scan0, scan1."""
    golden = load_file(DATA / "vmamba.safetensors")
    B, K, D, N, L = (json.loads((DATA / "vmamba.json").read_text())[name][size] for size in "BKDNL")
    tensors = [
        tensor(f"{name}.u", (B, K * D, L)),
        tensor(f"{name}.delta", (B, K * D, L), 0.5),
        -torch.exp(tensor(f"{name}.A", (K * D, N), 0.5)),
        tensor(f"{name}.B", (B, K, N, L)),
        tensor(f"{name}.C", (B, K, N, L)),
        tensor(f"{name}.D", (K * D,)),
        tensor(f"{name}.bias", (K * D,), 0.5, -1.0),
    ]
    gradients = [golden[f"{name}.d{argument}"] for argument in ("u", "delta", "A", "B", "C", "D", "delta_bias")]
    return tensors, tensor(f"{name}.gy", (B, K * D, L)), [golden[f"{name}.y"], *gradients]
