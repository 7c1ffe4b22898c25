"""The selective scan of every backend that can run here against the step-by-step reference in float64."""

from collections.abc import Callable, Iterator
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
from vmamba.selective_scan import BACKENDS, choose_backend, selective_scan, selective_scan_2d

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


assert_close = partial(scans.assert_close, y=1e-5, gradients=1e-4)
Run = Callable[[list[Tensor | None]], list[Tensor]]


def scan_images(x: Tensor, *rest: Tensor | None, backend: str = "auto") -> Tensor:
    """selective_scan_2d with channels last, [B, H, W, D] -> [B, H, W, D], as `draw_images` and the reference have them."""
    return selective_scan_2d(x.permute(0, 3, 1, 2), *rest, backend=backend).permute(0, 2, 3, 1)


@pytest.fixture
def device(backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the backend runs. Without a GPU `cuda` runs on a CPU, emulated."""
    if backend != "cuda" or GPU:
        yield "cuda" if GPU and backend != "cpp" else "cpu"
        return
    emulate_cuda(monkeypatch)
    yield "cpu"
    choose_backend.cache_clear()


@pytest.fixture
def run(backend: str, device: str) -> Run:
    """run(tensors): y and the gradients by the backend."""
    return partial(with_gradients, partial(scan_images, backend=backend), device=device)


def expected(tensors: list[Tensor | None]) -> list[Tensor]:
    return exactly(selective_scan_2d_reference, tensors)


# ---- sequences


@pytest.mark.parametrize("name", ["scan0", "scan1"])
def test_golden_numbers_of_the_original(name: str) -> None:
    tensors, gy, expected = golden_sequences(name)
    tensors = [each.requires_grad_() for each in tensors]
    y = selective_scan(*tensors)
    scans.assert_close([y, *torch.autograd.grad(y, tensors, gy)], expected, y=1e-5, gradients=1e-4)


@pytest.mark.parametrize("size", [(2, 1, 3, 1, 1), (2, 3, 17, 2, 31), (1, 2, 5, 16, 197), (0, 2, 3, 2, 7)], ids=str)
@pytest.mark.parametrize("missing, with_softplus", [((), True), ((5,), True), ((6,), False)])
def test_sequences_match_the_reference(size: tuple[int, ...], missing: tuple[int, ...], with_softplus: bool) -> None:
    """Without softplus delta has both signs: decays above 1, too."""
    tensors = without(draw_sequences(*size), *missing)  # batch, K, D, N, L
    tensors[1] *= 0.1
    scan, reference = (partial(each, delta_softplus=with_softplus) for each in (selective_scan, selective_scan_reference))
    assert_close(with_gradients(scan, tensors), exactly(reference, tensors))


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
    (2, 5, 9, 18, 40, 3),
    (1, 23, 1, 34, 5, 16),
    (1, 9, 11, 4, 2, 17),
    (1, 41, 40, 2, 6, 1),
    (0, 3, 4, 6, 2, 1),
]


@every_backend
@pytest.mark.parametrize("size", IMAGES, ids=str)
def test_images_of_any_size(run: Run, size: tuple[int, ...]) -> None:
    tensors = draw_images(*size)
    assert_close(run(tensors), expected(tensors))


@every_backend
def test_random_sizes(backend: str, run: Run) -> None:
    """Every size at random, so that the remainders of blocks and tiles occur in many combinations."""
    generator = torch.Generator().manual_seed(0)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(4 if backend == "triton" and not GPU else 12):
        channels = 2 * pick(1, 25) if backend == "cuda" else pick(1, 50)
        tensors = draw_images(pick(1, 3), pick(1, 12), pick(1, 12), channels, pick(1, 9), pick(1, 4))
        assert_close(run(tensors), expected(tensors))


@every_backend_quickly
@pytest.mark.parametrize("missing", [(4,), (5,), (4, 5)], ids=["D", "bias", "both"])
def test_optional_arguments(run: Run, missing: tuple[int, ...]) -> None:
    tensors = without(draw_images(2, 3, 5, 6, 2, 1), *missing)
    assert_close(run(tensors), expected(tensors))


@every_backend_quickly
def test_any_strides(backend: str, device: str) -> None:
    """Images in both memory formats, and a gradient that is not contiguous."""
    x, *rest = (each.to(device) for each in draw_images(2, 3, 5, 6, 2, 1))
    channels_last = x.permute(0, 3, 1, 2)  # [B, D, H, W]
    y = selective_scan_2d(channels_last, *rest, backend=backend)
    assert torch.equal(selective_scan_2d(channels_last.contiguous(), *rest, backend=backend), y)
    assert y.is_contiguous(memory_format=torch.channels_last)

    x = channels_last.contiguous().requires_grad_()
    y = selective_scan_2d(x, *rest, backend=backend)
    dense, expanded = (torch.autograd.grad(*each, retain_graph=True)[0] for each in ((y, x, torch.ones_like(y)), (y.sum(), x)))
    assert torch.equal(dense, expanded)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_as_exact_as_plain_torch(run: Run, dtype: torch.dtype) -> None:
    for size in ((2, 9, 10, 24, 6, 1), (1, 5, 7, 6, 2, 3)):
        assert_as_exact_as_plain_torch(run, draw_images(*size), dtype)


@every_backend
@pytest.mark.parametrize(("delta", "A"), EXTREMES)
def test_extreme_values_stay_finite(run: Run, delta: float, A: float) -> None:
    assert all(each.isfinite().all() for each in run(extreme_images(delta, A)))


@every_backend
def test_same_bits_again(backend: str, run: Run) -> None:
    """Results depend neither on the order in which threads finish nor on their number."""
    tensors, threads = draw_images(3, 9, 11, 72, 5, 1), torch.get_num_threads()
    first = run(tensors)
    try:
        torch.set_num_threads(3 - min(threads, 2))  # another number
        again = [run(tensors), run(tensors)]
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *again))
    # The torch backend's matrix products may sum in another order with other threads.
    assert backend == "torch" or all(map(torch.equal, first, again[0]))


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


# ---- bad input


@pytest.mark.parametrize(
    ("scan", "index", "change", "message"),
    [
        (selective_scan, 0, lambda t: t[0], r"u has shape \[6, 10\] on cpu, expected \[B K\*D L\] = \[any any any\]"),
        (selective_scan, 4, lambda t: t[:, :, :1], r"C has shape \[2, 2, 1, 10\] on cpu, expected .* = \[2 2 2 10\]"),
        (scan_images, 1, lambda t: t.flatten(1, 2), r"proj has shape \[2, 12, 4, 4\] .* \[B H W 4 R\+2N\] = \[2 3 4 4 4\]"),
    ],
)
def test_tensors_that_do_not_fit(scan, index: int, change, message: str) -> None:
    tensors = draw_images(2, 3, 4, 5, 2, 1) if scan is scan_images else draw_sequences(2, 2, 3, 2, 10)
    tensors[index] = change(tensors[index])
    with pytest.raises(InputError, match=message):
        scan(*tensors)


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
