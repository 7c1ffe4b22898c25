"""The selective scan of every backend that can run here against the step-by-step reference in float64."""

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from support import scans
from support.scans import (
    EXTREMES,
    IMAGE_INPUTS,
    SEQUENCE_INPUTS,
    assert_as_exact_as_plain_torch,
    draw,
    draw_images,
    draw_sequences,
    exactly,
    extreme_inputs,
    golden_sequences,
    with_gradients,
    without,
)
from torch import Tensor

from clever.utils import InputError
from vmamba import selective_scan as module
from vmamba.scan_reference import cross_merge, cross_scan, selective_scan_2d_reference, selective_scan_reference
from vmamba.selective_scan import BACKENDS, choose_backend, scan_flops, selective_scan, selective_scan_2d

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def _backend(name: str, quick: bool):
    """Name and device of a backend; skipped where it cannot run, and slow where Triton is interpreted unless `quick`."""
    device = "cpu" if name == "cpp" else DEVICE
    reason = BACKENDS[name].unavailable_reason(torch.device(device))
    marks = [pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}")]
    if name == "triton" and not GPU and not quick:
        marks.append(pytest.mark.slow)
    return pytest.param(name, device, marks=marks, id=name)


every_backend = pytest.mark.parametrize(("backend", "device"), [_backend(name, quick=False) for name in BACKENDS])
every_backend_quickly = pytest.mark.parametrize(("backend", "device"), [_backend(name, quick=True) for name in BACKENDS])


assert_close = partial(scans.assert_close, y=1e-5, gradients=1e-4)


def scan_images(x: Tensor, *rest: Tensor | None, backend: str = "auto") -> Tensor:
    """selective_scan_2d with channels last, [B, H, W, D] -> [B, H, W, D], as `draw_images` and the reference have them."""
    return selective_scan_2d(x.permute(0, 3, 1, 2), *rest, backend=backend).permute(0, 2, 3, 1)


def both_scans(backend: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The scans of sequences and of images by one backend."""
    return partial(selective_scan, backend=backend), partial(scan_images, backend=backend)


def check_sequences(tensors: list[Tensor | None], backend: str, device: str, **options: bool) -> None:
    expected = exactly(partial(selective_scan_reference, **options), tensors)
    assert_close(with_gradients(partial(selective_scan, backend=backend, **options), tensors, device), expected)


def check_images(tensors: list[Tensor | None], backend: str, device: str) -> None:
    expected = exactly(selective_scan_2d_reference, tensors)
    assert_close(with_gradients(partial(scan_images, backend=backend), tensors, device), expected)


# ---- numbers


@every_backend_quickly
@pytest.mark.parametrize("name", ["scan0", "scan1"])
def test_golden_numbers_of_the_original(backend: str, device: str, name: str) -> None:
    tensors, gy, expected = golden_sequences(name)
    tensors = [each.to(device).requires_grad_() for each in tensors]
    y = selective_scan(*tensors, backend=backend)
    scans.assert_close([y, *torch.autograd.grad(y, tensors, gy.to(device))], expected, y=1e-4, gradients=1e-3)


SEQUENCES = [  # batch, K, D, N, L
    (2, 1, 3, 1, 1),
    (1, 4, 5, 1, 2),
    (2, 3, 17, 2, 31),
    (1, 2, 32, 16, 33),
    (3, 4, 8, 4, 64),
    (2, 1, 40, 1, 197),
    (1, 1, 20, 3, 260),
]


@every_backend
@pytest.mark.parametrize("size", SEQUENCES, ids=str)
def test_sequences_of_any_size(backend: str, device: str, size: tuple[int, ...]) -> None:
    check_sequences(draw_sequences(*size), backend, device)


@every_backend
@pytest.mark.parametrize("size", [(1, 2, 3, 1, 5000), (1, 1, 2, 2, 1023)], ids=str)
def test_long_sequences(backend: str, device: str, size: tuple[int, ...]) -> None:
    if backend == "triton" and not GPU:
        size = (1, 1, 2, 1, 600)  # the interpreter is slow
    check_sequences(draw_sequences(*size), backend, device)


IMAGES = [  # batch, H, W, D, R, N
    (1, 1, 1, 1, 1, 1),
    (2, 3, 4, 5, 2, 1),
    (1, 7, 9, 24, 3, 2),
    (2, 1, 13, 16, 6, 1),
    (1, 12, 1, 33, 5, 16),
    (2, 6, 5, 96, 6, 1),
    (1, 17, 19, 40, 12, 1),
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
        check_sequences(draw_sequences(pick(1, 3), pick(1, 4), pick(1, 40), pick(1, 16), pick(1, 80)), backend, device)
        check_images(draw_images(pick(1, 3), pick(1, 12), pick(1, 12), pick(1, 50), pick(1, 9), pick(1, 4)), backend, device)


@every_backend_quickly
@pytest.mark.parametrize("missing", [(5,), (6,), (5, 6)], ids=["D", "bias", "both"])
def test_optional_arguments(backend: str, device: str, missing: tuple[int, ...]) -> None:
    check_sequences(without(draw_sequences(2, 2, 6, 2, 10), *missing), backend, device)
    check_images(without(draw_images(2, 3, 5, 6, 2, 1), *(index - 1 for index in missing)), backend, device)


@every_backend
def test_delta_without_softplus(backend: str, device: str) -> None:
    tensors = draw_sequences(2, 2, 6, 2, 40)  # delta of both signs: decays above 1, too
    tensors[1] *= 0.1
    tensors[6] *= 0.05

    check_sequences(tensors, backend, device, delta_softplus=False)


@every_backend_quickly
def test_any_strides(backend: str, device: str) -> None:
    """Transposed, sliced and expanded inputs, and a gradient that is not contiguous."""
    plain = [each.to(device) for each in draw_sequences(2, 2, 6, 2, 10)]
    odd = [each.transpose(0, -1).contiguous().transpose(0, -1) for each in plain]
    odd[0] = torch.stack([plain[0], plain[0]], dim=-1)[..., 0]
    assert torch.equal(selective_scan(*plain, backend=backend), selective_scan(*odd, backend=backend))

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
    inputs = draw_sequences(0, 2, 3, 2, 7), draw_images(0, 3, 4, 5, 2, 1)
    for scan, tensors, shape in zip(both_scans(backend), inputs, [(0, 6, 7), (0, 3, 4, 5)], strict=True):
        y, *gradients = with_gradients(scan, tensors, device)
        assert y.shape == shape and [each.shape for each in gradients] == [each.shape for each in tensors]
        assert not any(each.any() for each in gradients)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_as_exact_as_plain_torch(backend: str, device: str, dtype: torch.dtype) -> None:
    for scan, plain, tensors, inputs in zip(
        both_scans(backend),
        (selective_scan_reference, selective_scan_2d_reference),
        (draw_sequences(2, 2, 24, 1, 100), draw_images(2, 9, 10, 24, 6, 1)),
        (SEQUENCE_INPUTS, IMAGE_INPUTS),
        strict=True,
    ):
        assert_as_exact_as_plain_torch(partial(with_gradients, scan, device=device), plain, tensors, dtype, inputs)


@every_backend
@pytest.mark.parametrize(("delta", "A"), EXTREMES)
def test_extreme_values_stay_finite(backend: str, device: str, delta: float, A: float) -> None:
    for scan, tensors in zip(both_scans(backend), extreme_inputs(delta, A), strict=True):
        assert all(each.isfinite().all() for each in with_gradients(scan, tensors, device))


@every_backend
def test_same_bits_again(backend: str, device: str) -> None:
    """Results depend neither on the order in which threads finish nor on their number."""
    tensors = draw_images(3, 9, 11, 72, 5, 1)

    def run() -> list[Tensor]:
        return with_gradients(partial(scan_images, backend=backend), tensors, device)

    threads = torch.get_num_threads()
    first = run()
    try:
        torch.set_num_threads(1)
        again = [run(), run()]
    finally:
        torch.set_num_threads(threads)
    # The torch backend's matrix products may sum in another order with other threads.
    assert all(torch.equal(a, b) for a, b in zip(again[0], again[1], strict=True))
    if backend != "torch":
        assert all(torch.equal(a, b) for a, b in zip(first, again[0], strict=True))


def test_gradients_against_finite_differences() -> None:
    tensors = [each.double().requires_grad_() for each in draw_sequences(1, 2, 2, 2, 10)]
    scan, scan_2d = both_scans("torch")
    assert torch.autograd.gradcheck(scan, tensors)
    tensors = [each.double().requires_grad_() for each in draw_images(1, 3, 4, 2, 1, 1)]
    assert torch.autograd.gradcheck(scan_2d, tensors)


def test_hand_computed() -> None:
    """delta 1, A = ln(1/2): h halves at every step. u = 1, 2, 3; B = 1, 1, 2; C = 1, 2, 1; D = 10."""
    u, ones = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.ones(1, 1, 3)
    A = torch.full((1, 1), 0.5).log()
    B, C = torch.tensor([[[[1.0, 1.0, 2.0]]]]), torch.tensor([[[[1.0, 2.0, 1.0]]]])
    y = selective_scan(u, ones, A, B, C, D=torch.tensor([10.0]), delta_softplus=False, backend="torch")
    assert torch.allclose(y, torch.tensor([[[1 + 10, 2 * 2.5 + 20, 7.25 + 30]]]))  # h = 1, 2.5, 7.25


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


# ---- operators


@every_backend
def test_operators_are_registered_completely(backend: str, device: str) -> None:
    """Schema, fake, autograd and their agreement, as torch's own check sees them."""
    if backend == "triton" and not GPU:
        pytest.skip("the interpreter cannot see fake tensors")
    tensors = [each.to(device).requires_grad_() for each in draw_sequences(2, 2, 3, 2, 7)]
    torch.library.opcheck(torch.ops.clever.selective_scan, (*tensors, True, backend))
    tensors = [each.to(device).requires_grad_() for each in draw_images(2, 3, 4, 5, 2, 1)]
    torch.library.opcheck(torch.ops.clever.selective_scan_2d, (*tensors, backend))


def test_compiles_without_a_break() -> None:
    tensors = draw_images(2, 3, 4, 5, 2, 1)

    def scan(*tensors: Tensor) -> Tensor:
        return scan_images(*tensors).square()

    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, with_gradients(compiled, tensors), with_gradients(scan, tensors)))


def test_second_derivative_is_an_error() -> None:
    tensors = [each.requires_grad_() for each in draw_sequences(1, 1, 2, 1, 4)]
    (gradient,) = torch.autograd.grad(selective_scan(*tensors).square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@every_backend_quickly
def test_parameters_stay_in_float32_under_autocast(backend: str, device: str) -> None:
    tensors = [each.to(device).requires_grad_() for each in draw_images(1, 3, 4, 8, 2, 1)]
    halves = [each.to(torch.bfloat16) for each in tensors[:2]]
    with torch.autocast(device, torch.bfloat16):
        y = scan_images(*halves, *tensors[2:], backend=backend)
        inside = scan_images(*tensors, backend=backend)
    assert y.dtype == torch.float32
    assert torch.equal(inside, scan_images(*tensors, backend=backend))  # autocast rounds nothing inside
    y.sum().backward()
    assert all(each.grad.dtype == torch.float32 and each.grad.any() for each in tensors)


def test_mixed_types_are_widened() -> None:
    tensors = draw_images(1, 3, 4, 8, 2, 1)
    halved = [tensors[0], tensors[1].to(torch.bfloat16), *tensors[2:]]
    widened = [tensors[0], tensors[1].to(torch.bfloat16).float(), *tensors[2:]]
    assert torch.equal(scan_images(*halved), scan_images(*widened))


def test_flops_formula() -> None:
    assert scan_flops(batch=2, directions=4, channels=96, length=3136, states=1) == 4 * 2 * 3136 * 96 * 10
    assert scan_flops(batch=1, directions=1, channels=3, length=5, states=16) == 9 * 5 * 3 * 16 + 5 * 3


# ---- bad input


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda t: t[0], r"u has shape \[6, 10\], expected \[B, K\*D, L\]"),
        (0, lambda t: t[..., :0], "u has shape .* with L at least 1"),
        (0, lambda t: t[:, :5], "5 rows .* K = 2 directions"),
        (1, lambda t: t[..., :9], r"delta has shape \[2, 6, 9\], expected \[B, K\*D, L\] = \[2, 6, 10\]"),
        (2, lambda t: t.T, r"A has shape \[2, 6\], expected \[K\*D, N\] = \[6, 2\]"),
        (3, lambda t: t[0], r"B has shape .* expected \[B, K, N, L\]"),
        (4, lambda t: t[:, :, :1], r"C has shape \[2, 2, 1, 10\], expected \[B, K, N, L\] = \[2, 2, 2, 10\]"),
        (5, lambda t: t[:3], r"D has shape \[3\], expected \[K\*D\] = \[6\]"),
        (6, lambda t: t[None], r"delta_bias has shape \[1, 6\]"),
        (0, lambda t: t.long(), None),
        (0, lambda t: t.to(torch.complex64), "of type complex64: choose one of float32, bfloat16, float16, float64"),
        (5, lambda t: t.to("meta"), "on one device, but u on cpu, .*D on meta"),
    ],
)
def test_sequences_that_do_not_fit(index: int, change, message: str | None) -> None:
    tensors = draw_sequences(2, 2, 3, 2, 10)
    tensors[index] = change(tensors[index])
    if message is None:  # integers widen to the others' type
        assert selective_scan(*tensors).dtype == torch.float32
        return
    with pytest.raises(InputError, match=message):
        selective_scan(*tensors)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda t: t[0], r"x has shape .* expected \[B, D, H, W\]"),
        (0, lambda t: t[:, :, :0], "x has shape .* at least 1"),
        (1, lambda t: t.flatten(1, 2), r"proj has shape \[2, 12, 4, 4\], expected \[B, H, W, 4, R \+ 2N\] = \[2, 3, 4, 4, 4\]"),
        (2, lambda t: t[:3], r"dt_weight has shape \[3, 5, 2\], expected \[4, D, R\] = \[4, 5, 2\]"),
        (2, lambda t: t[..., :0], r"dt_weight has shape \[4, 5, 0\]"),
        (3, lambda t: t[:5], r"A has shape \[5, 1\], expected \[4\*D, N\] = \[20, 1\]"),
        (3, lambda t: t[:, 0], r"A has shape \[20\]"),
        (4, lambda t: t[:5], r"D has shape \[5\]"),
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
    with pytest.raises(InputError, match="backend 'cuda' cannot run: "):
        scan_images(*tensors, backend="cuda")  # on CPU tensors, GPU or not
    with pytest.raises(InputError, match="backend 'cpp' cannot run: float64 is supported by the torch backend only"):
        scan_images(*(each.double() for each in tensors), backend="cpp")


@pytest.fixture
def fresh_choice():
    """No choice of a backend is remembered from before, nor kept afterwards."""
    choose_backend.cache_clear()
    yield
    choose_backend.cache_clear()


def test_the_choice_is_announced_once(fresh_choice, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(BACKENDS["cpp"], "unavailable_reason", lambda device=None: "not built")
    assert [choose_backend("auto", "cpu") for _ in range(3)] == ["torch"] * 3
    assert capsys.readouterr().out == "selective scan on cpu: backend torch; cpp: not built\n"


def test_a_gpu_without_kernels_is_warned_about_once(fresh_choice, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "triton"):
        monkeypatch.setattr(BACKENDS[name], "unavailable_reason", lambda device=None: "not built")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [choose_backend("auto", "cuda") for _ in range(3)] == ["torch"] * 3
    (warning,) = caught
    assert "python -m scripts.doctor" in str(warning.message)


def test_the_fastest_backend_is_preferred(fresh_choice, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BACKENDS:
        monkeypatch.setattr(BACKENDS[name], "unavailable_reason", lambda device=None: None)
    assert choose_backend("auto", "cpu") == "cpp"
    assert choose_backend("auto", "cuda") == "cuda"
    assert choose_backend("auto", "cpu", torch.float64) == "torch"
    assert module.PREFERENCE["cuda"] == ("cuda", "triton", "torch")
