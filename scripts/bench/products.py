"""The matrix products of a step: their shapes, recorded while it runs, and the time they take alone.

Shapes: a product [N, M, K] x [N, K, P] -> [N, M, P], N of them batched.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Shape = tuple[int, int, int, int]  # N, M, K, P


def _matmul(inputs: list[Any], outputs: Any) -> list[Shape]:
    left, right = [each for each in inputs if isinstance(each, Tensor)][-2:]
    return [(left.shape[0] if left.ndim == 3 else 1, *left.shape[-2:], right.shape[-1])]


def _convolution_as_product(x: Tensor, weight: Tensor, y: Tensor) -> tuple[int, int, int]:
    """M positions, K inputs and P channels of a convolution written as a product with its unfolded input."""
    return y.shape[0] * y.shape[2:].numel(), weight[0].numel(), weight.shape[0]


def _convolution(inputs: list[Any], outputs: Any) -> list[Shape]:
    x, weight, groups = inputs[0], inputs[1], inputs[8]
    return [(1, *_convolution_as_product(x, weight, outputs))] if groups == 1 else []  # depthwise ones are no products


def _convolution_backward(inputs: list[Any], outputs: Any) -> list[Shape]:
    grad, x, weight, groups, (needs_x, needs_weight, _) = *inputs[:3], inputs[9], inputs[10]
    if groups != 1:
        return []
    m, k, p = _convolution_as_product(x, weight, grad)
    return [(1, m, p, k)] * needs_x + [(1, k, m, p)] * needs_weight


def _attention(inputs: list[Any], outputs: Any) -> list[Shape]:
    (batch, heads, length, width) = inputs[0].shape
    return [(batch * heads, length, width, length), (batch * heads, length, length, width)]


def _attention_backward(inputs: list[Any], outputs: Any) -> list[Shape]:
    """Without the recomputation of the weights: gradients of the weights, of q, of k and of v."""
    scores, values = _attention(inputs[1:], outputs)
    return [scores, values, values, values]


def _scan(inputs: list[Any], outputs: Any) -> list[Shape]:
    """The projection of delta, which the scan contains, in four directions."""
    x, dt_weight = inputs[0], inputs[2]
    return [(4, x.shape[:3].numel(), dt_weight.shape[2], dt_weight.shape[1])]


def _scan_backward(inputs: list[Any], outputs: Any) -> list[Shape]:
    ((n, m, k, p),) = _scan(inputs[1:], outputs)
    return [(n, m, p, k), (n, k, m, p)]


PRODUCTS: dict[str, Callable[[list[Any], Any], list[Shape]]] = {
    "aten::mm": _matmul,
    "aten::addmm": _matmul,
    "aten::bmm": _matmul,
    "aten::baddbmm": _matmul,
    "aten::convolution": _convolution,
    "aten::convolution_backward": _convolution_backward,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "aten::_scaled_dot_product_flash_attention": _attention,
    "aten::_scaled_dot_product_flash_attention_backward": _attention_backward,
    "aten::_scaled_dot_product_efficient_attention": _attention,
    "aten::_scaled_dot_product_efficient_attention_backward": _attention_backward,
    "aten::_scaled_dot_product_cudnn_attention": _attention,
    "aten::_scaled_dot_product_cudnn_attention_backward": _attention_backward,
    "clever::selective_scan_2d": _scan,
    "clever::selective_scan_2d_backward": _scan_backward,
}


class ProductRecorder(TorchDispatchMode):
    """Counts the matrix products that run within this context, by shape and type."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[Shape, torch.dtype]] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        shapes = PRODUCTS.get(function._schema.name)
        if shapes is not None:
            dtype = next(each.dtype for each in args if isinstance(each, Tensor))
            self.counts.update((shape, dtype) for shape in shapes(list(args), outputs))
        return outputs


def gigaflops(counts: Counter[tuple[Shape, torch.dtype]]) -> float:
    """10^9 operations of all products; a multiply-add is two."""
    return sum(2 * n * m * k * p * count for ((n, m, k, p), _), count in counts.items()) / 1e9


def time_products(counts: Counter[tuple[Shape, torch.dtype]], device: torch.device) -> float:
    """Seconds that all products take alone: each shape is timed once, on contiguous operands, after one call."""
    return sum(_time_product(shape, dtype, device) * count for (shape, dtype), count in counts.items())


def _time_product(shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    n, m, k, p = shape
    left, right = (torch.rand(n, *size, device=device).to(dtype) for size in ((m, k), (k, p)))
    if n == 1:
        left, right, multiply = left[0], right[0], torch.mm
    else:
        multiply = torch.bmm
    out = multiply(left, right)
    synchronize(device)
    start = time.perf_counter()
    multiply(left, right, out=out)
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, if the device is one."""
    if device.type == "cuda":
        torch.cuda.synchronize()
