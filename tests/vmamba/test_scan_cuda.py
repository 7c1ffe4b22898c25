"""The CUDA scan: its kernels emulated on the CPU (cuda_emulation.h), what nvcc makes of them, and a GPU where there is one."""

import ctypes
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.golden import DATA, rel_error, tensor
from support.processes import ROOT
from torch import Tensor

from vmamba import extension, scan_cuda, scan_torch

SOURCES = ROOT / "csrc" / "selective_scan"
SHARED = 227 << 10  # bytes of shared memory that a block can have, of an H100
# -O1 keeps the build short. An access that a GPU would find misaligned is an illegal instruction here.
EMULATION_FLAGS = "-std=c++17 -O1 -fPIC -shared -w -x c++ -DSCAN_CUDA_EMULATION -fno-strict-aliasing -U_FORTIFY_SOURCE"
EMULATION_FLAGS += " -fsanitize=alignment,signed-integer-overflow -fsanitize-undefined-trap-on-error"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the emulation with")


def build_emulation(source: Path, folder: Path) -> ctypes.CDLL:
    output = folder / f"{source.stem}.so"
    command = ["g++", *EMULATION_FLAGS.split(), f"-I{ROOT}/tests/support", str(source), "-o", str(output)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(output))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_emulation(SOURCES / "scan_cuda.cu", tmp_path_factory.mktemp("emulation"))


@pytest.fixture
def configure(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """scan_cuda calls the emulation, on CPU tensors. The function sets the order of threads and the size of shared memory."""
    monkeypatch.setattr(extension, "load", lambda name: library)
    monkeypatch.setattr(scan_cuda, "_on", lambda device: nullcontext())  # stream: null

    def set_machine(seed: int = 0, shared: int = SHARED) -> None:
        library.emulation_configure(ctypes.c_uint64(seed), shared)

    set_machine()
    return set_machine


# ---- what is compared


def draw(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sequences(batch: int, directions: int, channels: int, states: int, length: int) -> list[Tensor]:
    rows = directions * channels
    u, delta = draw((batch, rows, length), 1), draw((batch, rows, length), 2, 0.5)
    B, C = draw((batch, directions, states, length), 3), draw((batch, directions, states, length), 4)
    return [u, delta, -draw((rows, states), 5, 0.5).exp(), B, C, draw((rows,), 6), draw((rows,), 7, 0.5) - 1]


def image(batch: int, height: int, width: int, channels: int, rank: int, states: int) -> list[Tensor]:
    x, proj = draw((batch, height, width, channels), 1), draw((batch, height, width, 4, rank + 2 * states), 2)
    dt_weight, A = draw((4, channels, rank), 3, rank**-0.5), -draw((4 * channels, states), 4, 0.5).exp()
    return [x, proj, dt_weight, A, draw((4 * channels,), 5), draw((4 * channels,), 6, 0.5) - 1]


def scan_sequences(tensors: list[Tensor | None], delta_softplus: bool = True) -> list[Tensor]:
    """y and the gradients of the tensors that are not None."""
    y, saved = scan_cuda.forward(*tensors, delta_softplus)
    gradients = scan_cuda.backward(draw(tuple(y.shape), 9).to(y), *tensors, saved, delta_softplus)
    return _typed_like(tensors, y, gradients)


def scan_image(tensors: list[Tensor | None]) -> list[Tensor]:
    y, saved = scan_cuda.forward_2d(*tensors)
    return _typed_like(tensors, y, scan_cuda.backward_2d(draw(tuple(y.shape), 9).to(y), *tensors, saved))


def _typed_like(tensors: list[Tensor | None], y: Tensor, gradients: tuple[Tensor | None, ...]) -> list[Tensor]:
    assert y.dtype == torch.float32 and y.is_contiguous()
    for given, gradient in zip(tensors, gradients, strict=True):
        assert (given is None) == (gradient is None)
        if given is not None:
            assert (gradient.shape, gradient.dtype) == (given.shape, given.dtype)
            assert gradient.is_contiguous()
    return [y, *(gradient for gradient in gradients if gradient is not None)]


def reference(
    function: Callable[..., Tensor], tensors: list[Tensor | None], dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """y and the gradients of the tensors that are not None by autograd; inputs keep their type if it is a half type."""
    given = [None if each is None else each.cpu().to(dtype).requires_grad_() for each in tensors]
    y = function(*given)
    return [y, *torch.autograd.grad(y, [each for each in given if each is not None], draw(tuple(y.shape), 9).to(y))]


def assert_close(got: list[Tensor], want: list[Tensor]) -> None:
    for index, (actual, expected) in enumerate(zip(got, want, strict=True)):
        error = (actual.cpu().double() - expected.double()).norm()
        assert error <= (2e-6 if index == 0 else 1e-5) * expected.double().norm(), (index, error)


SEQUENCE_SIZES = [  # batch, K, D, N, L
    (2, 4, 6, 1, 9),
    (1, 1, 3, 1, 1),
    (1, 2, 70, 2, 4),
    (2, 3, 5, 3, 33),
    (1, 1, 9, 16, 128),
    (1, 2, 3, 1, 129),
    (2, 1, 2, 5, 300),
]
IMAGE_SIZES = [  # batch, H, W, D, R, N
    (3, 3, 3, 16, 3, 1),
    (9, 1, 1, 2, 1, 1),
    (1, 7, 7, 24, 2, 1),
    (2, 5, 9, 17, 40, 3),
    (1, 14, 14, 34, 12, 1),
    (2, 1, 23, 5, 8, 16),
    (1, 23, 1, 6, 33, 2),
    (1, 10, 30, 18, 6, 1),
    (1, 9, 11, 4, 2, 17),
    (1, 3, 11, 2, 2, 65),
    (1, 41, 40, 2, 6, 1),
]


# ---- emulated


@needs_compiler
@pytest.mark.parametrize("name", ["scan0", "scan1"])
def test_golden_numbers_of_the_original(configure, name: str) -> None:
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
    y, saved = scan_cuda.forward(*tensors, True)
    gradients = scan_cuda.backward(tensor(f"{name}.gy", y.shape), *tensors, saved, True)
    assert rel_error(y, golden[f"{name}.y"]) < 1e-5
    for letter, gradient in zip(("u", "delta", "A", "B", "C", "D", "delta_bias"), gradients, strict=True):
        assert rel_error(gradient, golden[f"{name}.d{letter}"]) < 1e-4, letter


@needs_compiler
@pytest.mark.parametrize("sizes", SEQUENCE_SIZES, ids=str)
def test_sequences_match_the_reference(configure, sizes: tuple[int, ...]) -> None:
    tensors = sequences(*sizes)
    assert_close(scan_sequences(tensors), reference(scan_torch.reference, tensors))


@needs_compiler
@pytest.mark.parametrize("length", [2, 130])
def test_sequences_without_optional_arguments(configure, length: int) -> None:
    """Without softplus delta may be negative: decays then grow."""
    tensors = [*sequences(2, 2, 5, 2, length)[:5], None, None]
    assert (tensors[1] < 0).any()
    expected = reference(lambda *each: scan_torch.reference(*each, delta_softplus=False), tensors)
    assert_close(scan_sequences(tensors, delta_softplus=False), expected)


@needs_compiler
@pytest.mark.parametrize("sizes", IMAGE_SIZES, ids=str)
def test_images_match_the_reference(configure, sizes: tuple[int, ...]) -> None:
    tensors = image(*sizes)
    assert_close(scan_image(tensors), reference(scan_torch.reference_2d, tensors))


@needs_compiler
def test_images_without_optional_arguments(configure) -> None:
    for missing in ((4, 5), (4,), (5,)):
        tensors = [None if index in missing else each for index, each in enumerate(image(2, 4, 5, 9, 2, 1))]
        assert_close(scan_image(tensors), reference(scan_torch.reference_2d, tensors))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_whose_sum_does_not_fit_in_shared_memory(configure, library, dtype: torch.dtype) -> None:
    tensors = image(2, 14, 20, 18, 3, 1)
    tensors[:2] = [each.to(dtype) for each in tensors[:2]]
    fitting = scan_image(tensors)
    configure(shared=16 << 10)
    args = scan_cuda._images(*(tensors[index] for index in (0, 2, 3)))
    assert library.scan_cuda_images_scratch(ctypes.byref(args)) == (0 if dtype == torch.float32 else tensors[0].numel())
    assert all(map(torch.equal, scan_image(tensors), fitting))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_order_of_threads(configure, dtype: torch.dtype) -> None:
    """A missing barrier would show: shared memory starts as NaN, and any thread may run ahead of the others."""
    calls = [(scan_image, image(3, 3, 3, 6, 3, 1), 2), (scan_image, image(1, 12, 14, 4, 33, 2), 2)]
    calls += [(scan_image, image(1, 12, 14, 6, 6, 1), 2), (scan_sequences, sequences(1, 2, 5, 2, 140), 5)]
    for scan, tensors, streams in calls:
        halves = (0, 1, 3, 4) if streams == 5 else (0, 1)
        tensors = [each.to(dtype) if index in halves else each for index, each in enumerate(tensors)]
        configure()
        ordered = scan(tensors)
        for seed in (1, 2, 3):
            configure(seed)
            assert all(map(torch.equal, scan(tensors), ordered)), (scan.__name__, seed)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_as_exact_as_plain_torch(configure, dtype: torch.dtype) -> None:
    """Error against float64 on the unrounded input: at most twice that of the reference on the same rounded input."""
    for tensors, scan, plain, halves in (
        (sequences(2, 2, 24, 1, 50), scan_sequences, scan_torch.reference, (0, 1, 3, 4)),
        (sequences(1, 1, 5, 3, 140), scan_sequences, scan_torch.reference, (0, 1, 3, 4)),
        (image(2, 9, 10, 24, 6, 1), scan_image, scan_torch.reference_2d, (0, 1)),
        (image(1, 5, 7, 5, 2, 3), scan_image, scan_torch.reference_2d, (0, 1)),
    ):
        rounded = [each.to(dtype) if index in halves else each for index, each in enumerate(tensors)]
        exact = reference(plain, tensors)
        bounds = reference(plain, [each.float() for each in rounded], torch.float32)
        for index, (got, bound, want) in enumerate(zip(scan(rounded), bounds, exact, strict=True)):
            bound = bound.to(got.dtype)  # the gradient of a half-precision input is rounded
            assert rel_error(got, want) <= 2 * rel_error(bound, want) + 1e-6, (scan.__name__, index)


@needs_compiler
@pytest.mark.parametrize("delta", [-1e4, -100.0, 0.0, 30.0, 1e4])
@pytest.mark.parametrize("A", [-1e4, -1.0, -1e-8])
def test_extreme_values_stay_finite(configure, delta: float, A: float) -> None:
    tensors = sequences(1, 2, 3, 1, 12)
    tensors[1].fill_(delta)
    tensors[2].fill_(A)
    assert all(each.isfinite().all() for each in scan_sequences(tensors))
    tensors = image(1, 3, 4, 4, 2, 1)
    tensors[5].fill_(delta)
    tensors[3].fill_(A)
    assert all(each.isfinite().all() for each in scan_image(tensors))


@needs_compiler
def test_growing_decays_leave_a_state_of_zero(configure) -> None:
    """The product of a tile's decays overflows long before any state does: u starts at the last position."""
    tensors = [*sequences(1, 1, 2, 1, 200)[:5], None, None]
    tensors[0][..., :-1] = 0
    tensors[1].fill_(-1.0)
    expected = reference(lambda *each: scan_torch.reference(*each, delta_softplus=False), tensors)
    assert rel_error(scan_sequences(tensors, delta_softplus=False)[0], expected[0]) < 2e-6


@needs_compiler
def test_small_delta_keeps_its_digits(configure) -> None:
    """softplus(-12) is 6e-6, which log2(1 + e^x) in float32 would round to one digit."""
    tensors = sequences(1, 1, 3, 1, 20)
    tensors[6].fill_(-12.0)
    assert_close(scan_sequences(tensors), reference(scan_torch.reference, tensors))


@needs_compiler
def test_nothing_that_is_returned_is_undefined(configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators are compared as a whole, the room for states included."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # with NaN
    torch.use_deterministic_algorithms(True)
    try:
        results = [scan_cuda.forward(*sequences(2, 2, *sizes), True) for sizes in ((3, 1, 12), (2, 2, 140), (3, 17, 70))]
        results += [scan_cuda.forward_2d(*image(*sizes)) for sizes in IMAGE_SIZES]
    finally:
        torch.use_deterministic_algorithms(False)
    for y, saved in results:
        assert y.isfinite().all() and saved.isfinite().all()
    for sizes in IMAGE_SIZES:
        batch, height, width, channels, _, states = sizes
        shape = scan_cuda.states_shape(batch, 4, channels, height * width, states)
        assert scan_cuda.forward_2d(*image(*sizes))[1].shape == shape


@needs_compiler
def test_empty_batch(configure) -> None:
    assert [each.shape[0] for each in scan_sequences(sequences(0, 2, 3, 1, 5))] == [0, 0, 0, 6, 0, 0, 6, 6]
    gradients = scan_image(image(0, 2, 3, 5, 2, 1))
    assert gradients[0].shape == (0, 2, 3, 5)
    assert all(not each.any() for each in gradients)


@needs_compiler
def test_tensors_that_start_at_an_odd_place(configure) -> None:
    tensors = [each.to(torch.bfloat16) if index < 2 else each for index, each in enumerate(image(2, 3, 4, 6, 3, 1))]
    shifted = [torch.cat([each.new_zeros(1), each.flatten()])[1:].view(each.shape) for each in tensors]
    assert any(each.data_ptr() % 4 for each in shifted)
    assert all(map(torch.equal, scan_image(shifted), scan_image(tensors)))


@needs_compiler
def test_what_the_library_refuses_is_an_error_in_words(configure) -> None:
    configure(shared=1 << 10)
    with pytest.raises(RuntimeError, match="rank of delta or the number of states is too large"):
        scan_cuda.forward_2d(*image(1, 2, 2, 16, 99, 1))


@pytest.mark.parametrize("states", [1, 3, 16, 17, 64, 65, 256])
def test_every_length_is_cut_into_even_pieces(states: int) -> None:
    for length in (*range(1, 2000), 3136, 12544):
        warps, lanes = scan_cuda._warps(length, states), scan_cuda._lanes(length)
        assert 1 <= warps <= (16 if states == 1 else 8) and warps * states <= 256
        tiles = -(-length // (16 * warps))
        assert 16 * warps * tiles - length < 16 * (tiles + 1)  # no warp idles in more than one tile
        assert lanes in (1, 2, 4, 8, 16, 32) and (4 * lanes >= length or lanes == 32) and (lanes == 1 or 2 * lanes < length)
        assert scan_cuda.states_shape(1, 4, 5, length, states)[2] >= max(tiles, -(-length // (4 * lanes)))


# ---- the emulation itself

MISTAKES = r"""
#include "cuda_emulation.h"

void no_barrier(float* out) {
  SHARED_MEMORY(shared);
  shared[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = shared[63 - threadIdx.x];
}
void barrier(float* out) {
  SHARED_MEMORY(shared);
  shared[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = shared[63 - threadIdx.x];
}
void some_miss_the_barrier(float*) {
  if (threadIdx.x < 40) __syncthreads();
}
void barriers_on_two_lines(float*) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}
void some_miss_the_shuffle(float* out) {
  if (threadIdx.x % 32 < 8) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, out[threadIdx.x], 1);
}
void shuffle(float* out) { out[threadIdx.x] = __shfl_up_sync(0xffffffffu, float(threadIdx.x), 2, 8); }

extern "C" const char* run(int number, float* out, int shared) {
  void (*const kernels[])(float*) = {no_barrier, barrier, some_miss_the_barrier, barriers_on_two_lines,
                                     some_miss_the_shuffle, shuffle};
  LAUNCH(kernels[number], 1, 64, shared, nullptr, out);
  const cudaError_t error = cudaGetLastError();
  return error ? cudaGetErrorString(error) : nullptr;
}
"""


@needs_compiler
def test_the_emulation_finds_mistakes(tmp_path: Path) -> None:
    (tmp_path / "mistakes.cpp").write_text(MISTAKES)
    library = build_emulation(tmp_path / "mistakes.cpp", tmp_path)
    library.run.restype = ctypes.c_char_p

    def run(number: int, shared: int = 256) -> tuple[Tensor, str]:
        out = torch.zeros(64)
        return out, (library.run(number, ctypes.c_void_p(out.data_ptr()), shared) or b"").decode()

    assert run(0)[0].isnan().any()
    for seed in (0, 1, 2):
        library.emulation_configure(ctypes.c_uint64(seed), SHARED)
        out, error = run(1)
        assert not error and torch.equal(out, torch.arange(63, -1, -1).float())
        out, error = run(5)
        lanes = torch.arange(64)
        assert not error and torch.equal(out, torch.where(lanes % 8 < 2, lanes, lanes - 2).float())
        assert "wait for others that do not come" in run(2)[1]
        assert re.search(r"threads 0 and 32 meet on lines \d+ and \d+", run(3)[1])
        assert "wait for others that do not come" in run(4)[1]
    assert "more shared memory" in run(1, 64 << 10)[1]


# ---- why it cannot run


def test_unavailable_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not on cpu" in scan_cuda.unavailable(torch.device("cpu"))
    cuda = torch.device("cuda")
    monkeypatch.setattr(extension, "unavailable", lambda name: f"{name} is not built")
    assert scan_cuda.unavailable(cuda) == scan_cuda.unavailable() == "scan_cuda is not built"
    monkeypatch.setattr(extension, "unavailable", lambda name: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in scan_cuda.unavailable(cuda)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in scan_cuda.unavailable(cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, device))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GTX 1080")
    monkeypatch.setattr(scan_cuda, "_function", lambda name, result: lambda device: b"no kernel image is available")
    assert "(compute capability 6.3)" in scan_cuda.unavailable(cuda)  # of the current device
    reason = scan_cuda.unavailable(torch.device("cuda:1"))
    assert "GTX 1080 (compute capability 6.1): no kernel image is available; build it" in reason and "\n" not in reason
    assert "TORCH_CUDA_ARCH_LIST=6.1" in reason
    monkeypatch.setattr(scan_cuda, "_function", lambda name, result: lambda device: None)
    assert scan_cuda.unavailable(cuda) is None


# ---- compiled by nvcc


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_no_kernel_spills_registers(tmp_path: Path) -> None:
    def compile_for(architecture: str) -> str:
        command = [NVCC, "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v", "-Xcompiler", "-fPIC", "-shared"]
        command += [str(SOURCES / "scan_cuda.cu"), "-o", str(tmp_path / f"{architecture}.so")]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr

    architectures = ("sm_80", "sm_90")
    with ThreadPoolExecutor() as pool:
        outputs = list(pool.map(compile_for, architectures))
    for architecture, output in zip(architectures, outputs, strict=True):
        pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
        kernels = re.findall(pattern, output, re.DOTALL)
        assert len(kernels) == 18  # 3 types: images with one state or more, sequences; forward and backward
        for name, stores, loads, registers in kernels:
            print(f"{architecture} {name}: {registers} registers")
            assert (int(stores), int(loads)) == (0, 0), name
            threads = 512 if "images" in name and "Lb1E" in name else 256
            assert int(registers) * threads <= 65536, name
        assert "warning" not in output

    library = ctypes.CDLL(str(tmp_path / "sm_90.so"))
    assert library.scan_abi_version() == extension.ABI_VERSION
    library.scan_cuda_unavailable.restype = ctypes.c_char_p
    if not torch.cuda.is_available():
        assert library.scan_cuda_unavailable(ctypes.c_int64(0))  # a reason in words, and no crash


# ---- on a GPU


@pytest.fixture(params=["cuda:0", "cuda:1"][: max(1, torch.cuda.device_count())])
def gpu(request: pytest.FixtureRequest) -> torch.device:
    device = torch.device(request.param)
    if not torch.cuda.is_available() or (reason := scan_cuda.unavailable(device)):
        pytest.skip(reason if torch.cuda.is_available() else "no CUDA device")
    return device


def _to(tensors: list[Tensor], device: torch.device, dtype: torch.dtype, halves: tuple[int, ...]) -> list[Tensor]:
    return [each.to(device, dtype if index in halves else torch.float32) for index, each in enumerate(tensors)]


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [*IMAGE_SIZES, (2, 56, 56, 96, 6, 1), (4, 7, 7, 768, 48, 1)], ids=str)
def test_images_on_a_gpu(gpu: torch.device, sizes: tuple[int, ...]) -> None:
    tensors = image(*sizes)
    assert_close(scan_image(_to(tensors, gpu, torch.float32, ())), reference(scan_torch.reference_2d, tensors))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SEQUENCE_SIZES, ids=str)
def test_sequences_on_a_gpu(gpu: torch.device, sizes: tuple[int, ...]) -> None:
    tensors = sequences(*sizes)
    assert_close(scan_sequences(_to(tensors, gpu, torch.float32, ())), reference(scan_torch.reference, tensors))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_runs_on_a_gpu_give_equal_bits(gpu: torch.device, dtype: torch.dtype) -> None:
    for scan, tensors in (
        (scan_image, _to(image(8, 28, 28, 192, 12, 1), gpu, dtype, (0, 1))),
        (scan_image, _to(image(64, 3, 3, 96, 6, 1), gpu, dtype, (0, 1))),
        (scan_image, _to(image(2, 20, 20, 48, 4, 16), gpu, dtype, (0, 1))),
        (scan_sequences, _to(sequences(4, 4, 64, 2, 300), gpu, dtype, (0, 1, 3, 4))),
    ):
        first = scan(tensors)
        for _ in range(20):
            assert all(map(torch.equal, scan(tensors), first))


@pytest.mark.gpu
def test_the_current_stream_is_used(gpu: torch.device) -> None:
    tensors = _to(image(2, 14, 14, 64, 4, 1), gpu, torch.float32, ())
    want = scan_cuda.forward_2d(*tensors)[0]
    late = torch.zeros_like(tensors[0])
    torch.cuda.synchronize(gpu)
    with torch.cuda.stream(torch.cuda.Stream(gpu)):
        torch.cuda._sleep(50_000_000)  # the copy comes late: a scan on another stream would read zeros
        late.copy_(tensors[0], non_blocking=True)
        y = scan_cuda.forward_2d(late, *tensors[1:])[0]
    torch.cuda.synchronize(gpu)
    assert torch.equal(y, want)
