"""The selective scan of every backend that can run here against the step-by-step reference in float64."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from support import scans
from support.cuda_emulation import emulate_cuda, needs_compiler
from support.scans import (
    EXTREMES,
    assert_as_exact_as_plain_torch,
    draw,
    draw_images,
    draw_sequences,
    exactly,
    extreme_images,
    golden_sequences,
    halve,
    with_gradients,
    without,
)
from torch import Tensor

from clever.utils import InputError
from vmamba.scan_reference import cross_merge, cross_scan, selective_scan_2d_reference, selective_scan_reference
from vmamba.selective_scan import BACKENDS, choose_backend, scan_flops, selective_scan, selective_scan_2d

GPU = torch.cuda.is_available()


def _backend(name: str, quick: bool):
    """A backend; skipped where it cannot run, and slow where Triton is interpreted unless `quick`."""
    reason = BACKENDS[name].unavailable_reason(torch.device("cuda" if GPU and name != "cpp" else "cpu"))
    if name == "cuda" and not GPU:
        return pytest.param(name, marks=needs_compiler, id=name)  # emulated
    marks = [pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}")]
    if name == "triton" and not GPU and not quick:
        marks.append(pytest.mark.slow)
    return pytest.param(name, marks=marks, id=name)


every_backend = pytest.mark.parametrize("backend", [_backend(name, quick=False) for name in BACKENDS])
every_backend_quickly = pytest.mark.parametrize("backend", [_backend(name, quick=True) for name in BACKENDS])


@pytest.fixture
def device(backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the backend runs. Without a GPU `cuda` runs on a CPU, emulated."""
    if backend != "cuda" or GPU:
        yield "cuda" if GPU and backend != "cpp" else "cpu"
        return
    emulate_cuda(monkeypatch)
    yield "cpu"
    choose_backend.cache_clear()


assert_close = partial(scans.assert_close, y=1e-5, gradients=1e-4)


def scan_images(x: Tensor, *rest: Tensor | None, backend: str = "auto") -> Tensor:
    """selective_scan_2d with channels last, [B, H, W, D] -> [B, H, W, D], as `draw_images` and the reference have them."""
    return selective_scan_2d(x.permute(0, 3, 1, 2), *rest, backend=backend).permute(0, 2, 3, 1)


def check_images(tensors: list[Tensor | None], backend: str, device: str) -> None:
    expected = exactly(selective_scan_2d_reference, tensors)
    assert_close(with_gradients(partial(scan_images, backend=backend), tensors, device), expected)


# ---- sequences


@pytest.mark.parametrize("name", ["scan0", "scan1"])
def test_golden_numbers_of_the_original(name: str) -> None:
    tensors, gy, expected = golden_sequences(name)
    tensors = [each.requires_grad_() for each in tensors]
    y = selective_scan(*tensors)
    scans.assert_close([y, *torch.autograd.grad(y, tensors, gy)], expected, y=1e-5, gradients=1e-4)


@pytest.mark.parametrize("size", [(2, 1, 3, 1, 1), (2, 3, 17, 2, 31), (1, 2, 5, 16, 197), (0, 2, 3, 2, 7)], ids=str)
@pytest.mark.parametrize("missing", [(), (5,), (6,)], ids=str)
def test_sequences_match_the_reference(size: tuple[int, ...], missing: tuple[int, ...]) -> None:
    tensors = without(draw_sequences(*size), *missing)  # batch, K, D, N, L
    assert_close(with_gradients(selective_scan, tensors), exactly(selective_scan_reference, tensors))


def test_delta_without_softplus() -> None:
    tensors = draw_sequences(2, 2, 6, 2, 40)  # delta of both signs: decays above 1, too
    tensors[1] *= 0.1
    tensors[6] *= 0.05
    expected = exactly(partial(selective_scan_reference, delta_softplus=False), tensors)
    assert_close(with_gradients(partial(selective_scan, delta_softplus=False), tensors), expected)


def test_hand_computed() -> None:
    """delta 1, A = ln(1/2): h halves at every step. u = 1, 2, 3; B = 1, 1, 2; C = 1, 2, 1; D = 10."""
    u, ones = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.ones(1, 1, 3)
    A = torch.full((1, 1), 0.5).log()
    B, C = torch.tensor([[[[1.0, 1.0, 2.0]]]]), torch.tensor([[[[1.0, 2.0, 1.0]]]])
    y = selective_scan(u, ones, A, B, C, D=torch.tensor([10.0]), delta_softplus=False, backend="torch")
    assert torch.allclose(y, torch.tensor([[[1 + 10, 2 * 2.5 + 20, 7.25 + 30]]]))  # h = 1, 2.5, 7.25


# ---- images


IMAGES = [  # batch, H, W, D, R, N
    (1, 1, 1, 2, 1, 1),
    (2, 3, 4, 6, 2, 1),
    (2, 5, 9, 18, 40, 3),
    (2, 1, 13, 16, 6, 1),
    (1, 23, 1, 34, 5, 16),
    (2, 6, 5, 96, 6, 1),
    (1, 17, 19, 40, 12, 1),
    (1, 9, 11, 4, 2, 17),
    (1, 41, 40, 2, 6, 1),
]


@every_backend
@pytest.mark.parametrize("size", IMAGES, ids=str)
def test_images_of_any_size(backend: str, device: str, size: tuple[int, ...]) -> None:
    check_images(draw_images(*size), backend, device)


@every_backend
def test_random_sizes(backend: str, device: str) -> None:
    """Every size at random, so that the remainders of blocks and tiles occur in many combinations."""
    generator = torch.Generator().manual_seed(0)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(4 if backend == "triton" and not GPU else 12):
        size = pick(1, 3), pick(1, 12), pick(1, 12), 2 * pick(1, 25), pick(1, 9), pick(1, 4)
        check_images(draw_images(*size), backend, device)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_an_odd_number_of_channels(backend: str) -> None:
    if reason := BACKENDS[backend].unavailable_reason(torch.device("cpu")):
        pytest.skip(reason)
    check_images(draw_images(2, 3, 4, 33, 2, 1), backend, "cpu")


@every_backend_quickly
@pytest.mark.parametrize("missing", [(4,), (5,), (4, 5)], ids=["D", "bias", "both"])
def test_optional_arguments(backend: str, device: str, missing: tuple[int, ...]) -> None:
    check_images(without(draw_images(2, 3, 5, 6, 2, 1), *missing), backend, device)


@every_backend_quickly
def test_any_strides(backend: str, device: str) -> None:
    """Images in both memory formats, and a gradient that is not contiguous."""
    x, *rest = (each.to(device) for each in draw_images(2, 3, 5, 6, 2, 1))
    channels_last = x.permute(0, 3, 1, 2)  # [B, D, H, W]
    y = selective_scan_2d(channels_last, *rest, backend=backend)
    assert torch.equal(selective_scan_2d(channels_last.contiguous(), *rest, backend=backend), y)
    assert y.is_contiguous(memory_format=torch.channels_last)

    x = channels_last.contiguous().requires_grad_()
    (dense,) = torch.autograd.grad(selective_scan_2d(x, *rest, backend=backend), x, torch.ones(x.shape, device=device))
    (expanded,) = torch.autograd.grad(selective_scan_2d(x, *rest, backend=backend).sum(), x)
    assert torch.equal(dense, expanded)


@every_backend_quickly
def test_empty_batch(backend: str, device: str) -> None:
    tensors = draw_images(0, 3, 4, 6, 2, 1)
    y, *gradients = with_gradients(partial(scan_images, backend=backend), tensors, device)
    assert y.shape == (0, 3, 4, 6) and [each.shape for each in gradients] == [each.shape for each in tensors]
    assert not any(each.any() for each in gradients)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_as_exact_as_plain_torch(backend: str, device: str, dtype: torch.dtype) -> None:
    scan = partial(with_gradients, partial(scan_images, backend=backend), device=device)
    assert_as_exact_as_plain_torch(scan, draw_images(2, 9, 10, 24, 6, 1), dtype)


@every_backend
@pytest.mark.parametrize(("delta", "A"), EXTREMES)
def test_extreme_values_stay_finite(backend: str, device: str, delta: float, A: float) -> None:
    results = with_gradients(partial(scan_images, backend=backend), extreme_images(delta, A), device)
    assert all(each.isfinite().all() for each in results)


@every_backend
def test_same_bits_again(backend: str, device: str) -> None:
    """Results depend neither on the order in which threads finish nor on their number."""
    tensors = draw_images(3, 9, 11, 72, 5, 1)

    def run() -> list[Tensor]:
        return with_gradients(partial(scan_images, backend=backend), tensors, device)

    threads = torch.get_num_threads()
    first = run()
    try:
        torch.set_num_threads(3 - min(threads, 2))  # another number
        again = [run(), run()]
    finally:
        torch.set_num_threads(threads)
    # The torch backend's matrix products may sum in another order with other threads.
    assert all(torch.equal(a, b) for a, b in zip(again[0], again[1], strict=True))
    if backend != "torch":
        assert all(torch.equal(a, b) for a, b in zip(first, again[0], strict=True))


def test_gradients_against_finite_differences() -> None:
    tensors = [each.double().requires_grad_() for each in draw_sequences(1, 2, 2, 2, 10)]
    assert torch.autograd.gradcheck(selective_scan, tensors)
    tensors = [each.double().requires_grad_() for each in draw_images(1, 3, 4, 2, 1, 1)]
    assert torch.autograd.gradcheck(scan_images, tensors)


def test_cross_scan_and_merge_are_transposes() -> None:
    x = torch.arange(6.0).view(1, 2, 3, 1)
    assert cross_scan(x)[0, :, 0].tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 3, 1, 4, 2, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 2, 4, 1, 3, 0],
    ]
    x, y = draw((2, 3, 5, 4), 0).double(), draw((2, 4, 4, 15), 1).double()
    assert torch.allclose((cross_scan(x) * y).sum(), (x * cross_merge(y, 3, 5)).sum())


# ---- the operator


@every_backend
def test_the_operator_is_registered_completely(backend: str, device: str) -> None:
    """Schema, fake, autograd and their agreement, as torch's own check sees them."""
    if backend == "triton" and not GPU:
        pytest.skip("the interpreter cannot see fake tensors")
    tensors = [each.to(device).requires_grad_() for each in draw_images(2, 3, 4, 6, 2, 1)]
    torch.library.opcheck(torch.ops.clever.selective_scan_2d, (*tensors, backend))


def test_compiles_without_a_break() -> None:
    tensors = draw_images(2, 3, 4, 5, 2, 1)

    def scan(*tensors: Tensor) -> Tensor:
        return scan_images(*tensors).square()

    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, with_gradients(compiled, tensors), with_gradients(scan, tensors)))


def test_second_derivative_is_an_error() -> None:
    for scan, tensors in (selective_scan, draw_sequences(1, 1, 2, 1, 4)), (scan_images, draw_images(1, 2, 2, 2, 1, 1)):
        tensors = [each.requires_grad_() for each in tensors]
        (gradient,) = torch.autograd.grad(scan(*tensors).square().sum(), tensors[:1], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative|once_differentiable"):
            gradient.sum().backward()


@every_backend_quickly
def test_parameters_stay_in_float32_under_autocast(backend: str, device: str) -> None:
    tensors = [each.to(device).requires_grad_() for each in draw_images(1, 3, 4, 8, 2, 1)]
    with torch.autocast(device, torch.bfloat16):
        y = scan_images(*halve(tensors, torch.bfloat16), backend=backend)
        inside = scan_images(*tensors, backend=backend)
    assert y.dtype == torch.float32
    assert torch.equal(inside, scan_images(*tensors, backend=backend))  # autocast rounds nothing inside
    y.sum().backward()
    assert all(each.grad.dtype == torch.float32 and each.grad.any() for each in tensors)


def test_mixed_types_are_widened() -> None:
    x, proj, *rest = draw_images(1, 3, 4, 8, 2, 1)
    half = proj.to(torch.bfloat16)
    assert torch.equal(scan_images(x, half, *rest), scan_images(x, half.float(), *rest))


def test_flops_formula() -> None:
    assert scan_flops(batch=2, directions=4, channels=96, length=3136, states=1) == 4 * 2 * 3136 * 96 * 10


# ---- bad input


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda t: t[0], r"u has shape \[6, 10\] on cpu, expected \[B K\*D L\] = \[any any any\]"),
        (0, lambda t: t.to(torch.complex64), "are torch.complex64; choose float32, bfloat16, float16 or float64"),
        (4, lambda t: t[:, :, :1], r"C has shape \[2, 2, 1, 10\] on cpu, expected \[B K N L\] = \[2 2 2 10\]"),
        (5, lambda t: t.to("meta"), "D has shape .* on meta, expected .* on cpu"),
    ],
)
def test_sequences_that_do_not_fit(index: int, change, message: str) -> None:
    tensors = draw_sequences(2, 2, 3, 2, 10)
    tensors[index] = change(tensors[index])
    with pytest.raises(InputError, match=message):
        selective_scan(*tensors)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda t: t[0], r"x has shape .* expected \[B D H W\]"),
        (1, lambda t: t.flatten(1, 2), r"proj has shape \[2, 12, 4, 4\] .* \[B H W 4 R\+2N\] = \[2 3 4 4 4\]"),
        (2, lambda t: t[:3], r"dt_weight has shape \[3, 5, 2\] .* \[4 D R\] = \[4 5 any\]"),
        (3, lambda t: t[:, 0], r"A has shape \[20\]"),
        (5, lambda t: t.view(4, 5), r"dt_bias has shape \[4, 5\]"),
    ],
)
def test_images_that_do_not_fit(index: int, change, message: str) -> None:
    tensors = draw_images(2, 3, 4, 5, 2, 1)
    tensors[0] = tensors[0].permute(0, 3, 1, 2)
    tensors[index] = change(tensors[index])
    with pytest.raises(InputError, match=message):
        selective_scan_2d(*tensors)


def test_named_backends_that_cannot_run() -> None:
    tensors = draw_images(1, 2, 2, 3, 1, 1)
    with pytest.raises(InputError, match="backend 'cudnn': choose one of auto, cuda, triton, cpp, torch"):
        scan_images(*tensors, backend="cudnn")
    with pytest.raises(InputError, match="backend 'cuda': the CUDA scan works on CUDA tensors, not on cpu"):
        scan_images(*tensors, backend="cuda")
    with pytest.raises(InputError, match="backend 'cpp': float64 is supported by the torch backend only"):
        scan_images(*(each.double() for each in tensors), backend="cpp")
    with pytest.raises(InputError, match="backend 'cpp': sequences are scanned by torch"):
        selective_scan(*draw_sequences(1, 1, 2, 1, 4), backend="cpp")


@pytest.fixture
def fresh_choice():
    """No choice of a backend is remembered from before, nor kept afterwards."""
    choose_backend.cache_clear()
    yield
    choose_backend.cache_clear()


def test_a_fallback_is_announced_once_with_its_reason(fresh_choice, monkeypatch, capsys) -> None:
    for name in ("cuda", "triton", "cpp"):
        monkeypatch.setattr(BACKENDS[name], "unavailable_reason", lambda device: "not built")
    assert [choose_backend("auto", "cpu") for _ in range(3)] == ["torch"] * 3
    assert choose_backend("auto", "cuda") == "torch"
    hint = "(`python -m scripts.doctor` says what makes it faster)"
    assert capsys.readouterr().out.splitlines() == [
        f"selective scan on cpu: backend torch; cpp: not built {hint}",
        f"selective scan on cuda: backend torch; cuda: not built; triton: not built {hint}",
    ]


def test_the_fastest_backend_is_preferred(fresh_choice, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BACKENDS:
        monkeypatch.setattr(BACKENDS[name], "unavailable_reason", lambda device: None)
    assert choose_backend("auto", "cpu") == "cpp"
    assert choose_backend("auto", "cuda") == "cuda"
    assert choose_backend("auto", "cpu", torch.float64) == "torch"
