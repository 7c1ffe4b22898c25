"""The selective scan of every backend that runs here against the step-by-step reference in float64."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from support.golden import DATA, rel_error, tensor
from torch import Tensor

from utils import InputError
from vmamba import scan_torch
from vmamba import selective_scan as module
from vmamba.selective_scan import BACKENDS, choose_backend, scan_flops, selective_scan, selective_scan_2d

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SEQUENCE_NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")
IMAGE_NAMES = ("x", "proj", "dt_weight", "A", "D", "dt_bias")


def _backend(name: str, quick: bool):
    """A case of a backend; skipped where it cannot run, and slow where Triton is interpreted, unless little is computed."""
    device = "cpu" if name == "cpp" else DEVICE
    reason = BACKENDS[name].unavailable(torch.device(device))
    marks = [pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}")]
    if name == "triton" and not GPU and not quick:
        marks.append(pytest.mark.slow)
    return pytest.param(name, device, marks=marks, id=name)


every_backend = pytest.mark.parametrize(("backend", "device"), [_backend(name, quick=False) for name in BACKENDS])
every_backend_quickly = pytest.mark.parametrize(("backend", "device"), [_backend(name, quick=True) for name in BACKENDS])


def draw(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float() * scale


def sequences(batch: int, directions: int, channels: int, states: int, length: int) -> list[Tensor]:
    rows = directions * channels
    return [
        draw((batch, rows, length), 1),
        draw((batch, rows, length), 2, 0.5),
        -draw((rows, states), 3, 0.5).exp(),
        draw((batch, directions, states, length), 4),
        draw((batch, directions, states, length), 5),
        draw((rows,), 6),
        draw((rows,), 7, 0.5) - 1,
    ]


def image(batch: int, channels: int, height: int, width: int, states: int, rank: int) -> list[Tensor]:
    return [
        draw((batch, channels, height, width), 1),
        draw((batch, height, width, 4, rank + 2 * states), 2),
        draw((4, channels, rank), 3, rank**-0.5),
        -draw((4 * channels, states), 4, 0.5).exp(),
        draw((4 * channels,), 5),
        draw((4 * channels,), 6, 0.5) - 1,
    ]


def with_gradients(
    function, tensors: list[Tensor | None], device: str, dtype: torch.dtype, streams: tuple[int, ...]
) -> list[Tensor]:
    """y and the gradient of every tensor, for a fixed gradient of y; `streams`: the tensors that have the type `dtype`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given = [
        None if each is None else each.to(device, dtype if index in streams else wide).requires_grad_()
        for index, each in enumerate(tensors)
    ]
    y = function(*given)
    gradients = torch.autograd.grad(y, [each for each in given if each is not None], draw(tuple(y.shape), 99).to(y))
    return [y.detach().cpu(), *(gradient.cpu() for gradient in gradients)]


def assert_close(got: Tensor, want: Tensor, bound: float, name: str = "") -> None:
    """Norm of the error at most `bound` times the norm of `want`, which may be zero."""
    assert got.shape == want.shape, name
    assert (got.double() - want.double()).norm() <= bound * want.double().norm(), name


def reference_image(x: Tensor, *rest: Tensor | None) -> Tensor:
    return scan_torch.reference_2d(x.permute(0, 2, 3, 1), *rest).permute(0, 3, 1, 2)


def check_sequences(tensors: list[Tensor | None], backend: str, device: str) -> None:
    expected = with_gradients(scan_torch.reference, tensors, "cpu", torch.float64, (0, 1, 3, 4))
    actual = with_gradients(lambda *each: selective_scan(*each, backend=backend), tensors, device, torch.float32, (0, 1, 3, 4))
    names = ("y", *(name for name, each in zip(SEQUENCE_NAMES, tensors, strict=True) if each is not None))
    for name, got, want in zip(names, actual, expected, strict=True):
        assert_close(got, want, 1e-5 if name == "y" else 1e-4, name)


def check_image(tensors: list[Tensor | None], backend: str, device: str) -> None:
    expected = with_gradients(reference_image, tensors, "cpu", torch.float64, (0, 1))
    actual = with_gradients(lambda *each: selective_scan_2d(*each, backend=backend), tensors, device, torch.float32, (0, 1))
    names = ("y", *(name for name, each in zip(IMAGE_NAMES, tensors, strict=True) if each is not None))
    for name, got, want in zip(names, actual, expected, strict=True):
        assert_close(got, want, 1e-5 if name == "y" else 1e-4, name)


# ---- numbers


@every_backend_quickly
@pytest.mark.parametrize("name", ["scan0", "scan1"])
def test_golden_numbers_of_the_original(backend: str, device: str, name: str) -> None:
    golden = load_file(DATA / "vmamba.safetensors")
    B, K, D, N, L = (json.loads((DATA / "vmamba.json").read_text())[name][letter] for letter in "BKDNL")
    tensors = [
        tensor(f"{name}.u", (B, K * D, L)),
        tensor(f"{name}.delta", (B, K * D, L), 0.5),
        -torch.exp(tensor(f"{name}.A", (K * D, N), 0.5)),
        tensor(f"{name}.B", (B, K, N, L)),
        tensor(f"{name}.C", (B, K, N, L)),
        tensor(f"{name}.D", (K * D,)),
        tensor(f"{name}.bias", (K * D,), 0.5, -1.0),
    ]
    tensors = [each.to(device).requires_grad_() for each in tensors]
    y = selective_scan(*tensors, backend=backend)
    gradients = torch.autograd.grad(y, tensors, tensor(f"{name}.gy", y.shape).to(device))
    assert rel_error(y.cpu(), golden[f"{name}.y"]) < 1e-4
    for letter, gradient in zip(SEQUENCE_NAMES, gradients, strict=True):
        assert rel_error(gradient.cpu(), golden[f"{name}.d{letter}"]) < 1e-3, letter


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
    check_sequences(sequences(*size), backend, device)


@every_backend
@pytest.mark.parametrize("size", [(1, 2, 3, 1, 5000), (1, 1, 2, 2, 1023)], ids=str)
def test_long_sequences(backend: str, device: str, size: tuple[int, ...]) -> None:
    if backend == "triton" and not GPU:
        size = (1, 1, 2, 1, 600)  # the interpreter is slow
    check_sequences(sequences(*size), backend, device)


IMAGES = [  # batch, D, H, W, N, R
    (1, 1, 1, 1, 1, 1),
    (2, 5, 3, 4, 1, 2),
    (1, 24, 7, 9, 2, 3),
    (2, 16, 1, 13, 1, 6),
    (1, 33, 12, 1, 16, 5),
    (2, 96, 6, 5, 1, 6),
    (1, 40, 17, 19, 1, 12),
]


@every_backend
@pytest.mark.parametrize("size", IMAGES, ids=str)
def test_images_of_any_size(backend: str, device: str, size: tuple[int, ...]) -> None:
    check_image(image(*size), backend, device)


@every_backend
def test_random_sizes(backend: str, device: str) -> None:
    """Twelve draws of everything at once; every one is another mixture of remainders of blocks and tiles."""
    generator = torch.Generator().manual_seed(0)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(4 if backend == "triton" and not GPU else 12):
        check_sequences(sequences(pick(1, 3), pick(1, 4), pick(1, 40), pick(1, 16), pick(1, 80)), backend, device)
        check_image(image(pick(1, 3), pick(1, 50), pick(1, 12), pick(1, 12), pick(1, 4), pick(1, 9)), backend, device)


@every_backend_quickly
@pytest.mark.parametrize("missing", [(5,), (6,), (5, 6)], ids=["D", "bias", "both"])
def test_optional_arguments(backend: str, device: str, missing: tuple[int, ...]) -> None:
    tensors = sequences(2, 2, 6, 2, 10)
    check_sequences([None if index in missing else each for index, each in enumerate(tensors)], backend, device)
    tensors = image(2, 6, 3, 5, 1, 2)
    check_image([None if index + 1 in missing else each for index, each in enumerate(tensors)], backend, device)


@every_backend
def test_delta_without_softplus(backend: str, device: str) -> None:
    tensors = sequences(2, 2, 6, 2, 40)  # delta of both signs: decays above 1, too
    tensors[1] *= 0.1
    tensors[6] *= 0.05

    def run(function, **options):
        return lambda *each: function(*each, delta_softplus=False, **options)

    expected = with_gradients(run(scan_torch.reference), tensors, "cpu", torch.float64, (0, 1, 3, 4))
    actual = with_gradients(run(selective_scan, backend=backend), tensors, device, torch.float32, (0, 1, 3, 4))
    for got, want in zip(actual, expected, strict=True):
        assert_close(got, want, 1e-4)


@every_backend_quickly
def test_any_strides(backend: str, device: str) -> None:
    """Transposed, sliced and expanded inputs, and a gradient that is not contiguous."""
    plain = [each.to(device) for each in sequences(2, 2, 6, 2, 10)]
    odd = [each.transpose(0, -1).contiguous().transpose(0, -1) for each in plain]
    odd[0] = torch.stack([plain[0], plain[0]], dim=-1)[..., 0]
    assert torch.equal(selective_scan(*plain, backend=backend), selective_scan(*odd, backend=backend))

    plain = [each.to(device) for each in image(2, 6, 3, 5, 1, 2)]
    channels_last = [plain[0].contiguous(memory_format=torch.channels_last), *plain[1:]]
    y = selective_scan_2d(*channels_last, backend=backend)
    assert torch.equal(selective_scan_2d(*plain, backend=backend), y)
    assert y.is_contiguous(memory_format=torch.channels_last)

    x = plain[0].requires_grad_()
    (dense,) = torch.autograd.grad(selective_scan_2d(*plain, backend=backend), x, torch.ones(x.shape, device=device))
    (expanded,) = torch.autograd.grad(selective_scan_2d(*plain, backend=backend).sum(), x)
    assert torch.equal(dense, expanded)


@every_backend_quickly
def test_empty_batch(backend: str, device: str) -> None:
    tensors = [each.to(device).requires_grad_() for each in sequences(0, 2, 3, 2, 7)]
    y = selective_scan(*tensors, backend=backend)
    y.sum().backward()
    assert y.shape == (0, 6, 7) and all(not each.grad.any() and each.grad.shape == each.shape for each in tensors)
    tensors = [each.to(device).requires_grad_() for each in image(0, 5, 3, 4, 1, 2)]
    y = selective_scan_2d(*tensors, backend=backend)
    y.sum().backward()
    assert y.shape == (0, 5, 3, 4) and all(not each.grad.any() and each.grad.shape == each.shape for each in tensors)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_as_exact_as_plain_torch(backend: str, device: str, dtype: torch.dtype) -> None:
    """Error against float64 on the unrounded input: at most twice that of the plain form on the same rounded input."""
    half = str(dtype)
    for tensors, plain, scan, streams in (
        (sequences(2, 2, 24, 1, 100), scan_torch.reference, selective_scan, (0, 1, 3, 4)),
        (image(2, 24, 9, 10, 1, 6), reference_image, selective_scan_2d, (0, 1)),
    ):
        exact = with_gradients(plain, tensors, "cpu", torch.float64, streams)
        bound = with_gradients(plain, tensors, "cpu", dtype, streams)
        actual = with_gradients(lambda *each, scan=scan: scan(*each, backend=backend), tensors, device, dtype, streams)
        assert actual[0].dtype == torch.float32
        for index, (got, plainly, want) in enumerate(zip(actual, bound, exact, strict=True)):
            assert got.dtype == plainly.dtype, (half, index)
            assert rel_error(got.float(), want) <= 2 * rel_error(plainly.float(), want) + 1e-6, (half, index)


@every_backend
@pytest.mark.parametrize("delta", [-1e4, -100.0, 0.0, 30.0, 1e4])
@pytest.mark.parametrize("A", [-1e4, -1.0, -1e-8])
def test_extreme_values_stay_finite(backend: str, device: str, delta: float, A: float) -> None:
    tensors = sequences(1, 2, 9, 1, 12)
    tensors[1].fill_(delta)
    tensors[2].fill_(A)
    for each in with_gradients(lambda *t: selective_scan(*t, backend=backend), tensors, device, torch.float32, (0, 1, 3, 4)):
        assert torch.isfinite(each).all()
    tensors = image(1, 9, 3, 4, 1, 2)
    tensors[5].fill_(delta)
    tensors[3].fill_(A)
    for each in with_gradients(lambda *t: selective_scan_2d(*t, backend=backend), tensors, device, torch.float32, (0, 1)):
        assert torch.isfinite(each).all()


@every_backend
def test_same_bits_again(backend: str, device: str) -> None:
    """Nothing depends on the order in which threads finish, nor on how many there are."""
    tensors = image(3, 72, 9, 11, 1, 5)

    def run() -> list[Tensor]:
        return with_gradients(lambda *each: selective_scan_2d(*each, backend=backend), tensors, device, torch.float32, (0, 1))

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
    tensors = [each.double().requires_grad_() for each in sequences(1, 2, 2, 2, 10)]
    assert torch.autograd.gradcheck(lambda *each: selective_scan(*each, backend="torch"), tensors)
    tensors = [each.double().requires_grad_() for each in image(1, 2, 3, 4, 1, 1)]
    assert torch.autograd.gradcheck(lambda *each: selective_scan_2d(*each, backend="torch"), tensors)


def test_hand_computed() -> None:
    """delta 1, A = ln(1/2): h halves at every step. u = 1, 2, 3; B = 1, 1, 2; C = 1, 2, 1; D = 10."""
    u, ones = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.ones(1, 1, 3)
    A = torch.full((1, 1), 0.5).log()
    B, C = torch.tensor([[[[1.0, 1.0, 2.0]]]]), torch.tensor([[[[1.0, 2.0, 1.0]]]])
    y = selective_scan(u, ones, A, B, C, D=torch.tensor([10.0]), delta_softplus=False, backend="torch")
    assert torch.allclose(y, torch.tensor([[[1 + 10, 2 * 2.5 + 20, 7.25 + 30]]]))  # h = 1, 2.5, 7.25


def test_cross_scan_and_merge_are_transposes() -> None:
    x = torch.arange(6.0).view(1, 2, 3, 1)
    assert scan_torch.cross_scan(x)[0, :, 0].tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 3, 1, 4, 2, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 2, 4, 1, 3, 0],
    ]
    x, y = draw((2, 3, 5, 4), 0).double(), draw((2, 4, 4, 15), 1).double()
    assert torch.allclose((scan_torch.cross_scan(x) * y).sum(), (x * scan_torch.cross_merge(y, 3, 5)).sum())


# ---- operators


@every_backend
def test_operators_are_registered_completely(backend: str, device: str) -> None:
    """Schema, fake, autograd and their agreement, as torch's own check sees them."""
    if backend == "triton" and not GPU:
        pytest.skip("the interpreter cannot see fake tensors")
    tensors = [each.to(device).requires_grad_() for each in sequences(2, 2, 3, 2, 7)]
    torch.library.opcheck(torch.ops.clever.selective_scan, (*tensors, True, backend))
    tensors = [each.to(device).requires_grad_() for each in image(2, 5, 3, 4, 1, 2)]
    tensors[0] = tensors[0].detach().permute(0, 2, 3, 1).contiguous().requires_grad_()
    torch.library.opcheck(torch.ops.clever.selective_scan_2d, (*tensors, backend))


def test_compiles_without_a_break() -> None:
    tensors = image(2, 5, 3, 4, 1, 2)
    compiled = torch.compile(lambda *each: selective_scan_2d(*each).square(), fullgraph=True, backend="aot_eager")
    plain = with_gradients(lambda *each: selective_scan_2d(*each).square(), tensors, "cpu", torch.float32, (0, 1))
    for got, want in zip(with_gradients(compiled, tensors, "cpu", torch.float32, (0, 1)), plain, strict=True):
        assert torch.equal(got, want)


def test_second_derivative_is_an_error() -> None:
    tensors = [each.requires_grad_() for each in sequences(1, 1, 2, 1, 4)]
    (gradient,) = torch.autograd.grad(selective_scan(*tensors).square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@every_backend_quickly
def test_parameters_stay_in_float32_under_autocast(backend: str, device: str) -> None:
    tensors = [each.to(device).requires_grad_() for each in image(1, 8, 3, 4, 1, 2)]
    halves = [each.to(torch.bfloat16) for each in tensors[:2]]
    with torch.autocast(device, torch.bfloat16):
        y = selective_scan_2d(*halves, *tensors[2:], backend=backend)
        inside = selective_scan_2d(*tensors, backend=backend)
    assert y.dtype == torch.float32
    assert torch.equal(inside, selective_scan_2d(*tensors, backend=backend))  # autocast rounds nothing inside
    y.sum().backward()
    assert all(each.grad.dtype == torch.float32 and each.grad.any() for each in tensors)


def test_mixed_types_are_widened() -> None:
    tensors = image(1, 8, 3, 4, 1, 2)
    halved = [tensors[0], tensors[1].to(torch.bfloat16), *tensors[2:]]
    widened = [tensors[0], tensors[1].to(torch.bfloat16).float(), *tensors[2:]]
    assert torch.equal(selective_scan_2d(*halved), selective_scan_2d(*widened))


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
    tensors = sequences(2, 2, 3, 2, 10)
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
    tensors = image(2, 5, 3, 4, 1, 2)
    tensors[index] = change(tensors[index])
    with pytest.raises(InputError, match=message):
        selective_scan_2d(*tensors)


def test_named_backends_that_cannot_run() -> None:
    tensors = image(1, 3, 2, 2, 1, 1)
    with pytest.raises(InputError, match="backend 'cudnn': choose one of auto, cuda, triton, cpp, torch"):
        selective_scan_2d(*tensors, backend="cudnn")
    with pytest.raises(InputError, match="backend 'cuda' cannot run: "):
        selective_scan_2d(*tensors, backend="cuda")  # on CPU tensors, GPU or not
    with pytest.raises(InputError, match="backend 'cpp' cannot run: float64 is for the torch backend only"):
        selective_scan_2d(*(each.double() for each in tensors), backend="cpp")


def test_the_choice_is_announced_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(BACKENDS["cpp"], "unavailable", lambda device=None: "not built")
    choose_backend.cache_clear()
    try:
        assert [choose_backend("auto", "cpu") for _ in range(3)] == ["torch"] * 3
        assert capsys.readouterr().out == "selective scan on cpu: backend torch; cpp: not built\n"
    finally:
        choose_backend.cache_clear()


def test_a_gpu_without_kernels_is_warned_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "triton"):
        monkeypatch.setattr(BACKENDS[name], "unavailable", lambda device=None: "not built")
    choose_backend.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert [choose_backend("auto", "cuda") for _ in range(3)] == ["torch"] * 3
        assert [str(each.message) for each in caught if "doctor.py" in str(each.message)] != []
        assert len(caught) == 1
    finally:
        choose_backend.cache_clear()


def test_the_better_backend_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BACKENDS:
        monkeypatch.setattr(BACKENDS[name], "unavailable", lambda device=None: None)
    choose_backend.cache_clear()
    try:
        assert choose_backend("auto", "cpu") == "cpp"
        assert choose_backend("auto", "cuda") == "cuda"
        assert choose_backend("auto", "cpu", torch.float64) == "torch"
        assert module.PREFERENCE["cuda"] == ("cuda", "triton", "torch")
    finally:
        choose_backend.cache_clear()
