"""The CUDA scan: its kernels emulated on the CPU, what nvcc makes of them, and a GPU where there is one."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from support import scans
from support.cuda_emulation import build_emulation, configure_emulation, needs_compiler
from support.golden import rel_error
from support.processes import ROOT
from support.scans import (
    EXTREMES,
    IMAGE_INPUTS,
    SEQUENCE_INPUTS,
    assert_as_exact_as_plain_torch,
    cast,
    draw_images,
    draw_sequences,
    exactly,
    extreme_inputs,
    golden_sequences,
    without,
)
from torch import Tensor

from vmamba import extension, scan_cuda
from vmamba.scan_reference import selective_scan_2d_reference, selective_scan_reference

SOURCES = ROOT / "csrc" / "selective_scan"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

run_sequences, run_images = partial(scans.run_sequences, scan_cuda), partial(scans.run_images, scan_cuda)
assert_close = partial(scans.assert_close, y=2e-6, gradients=1e-5)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_emulation(SOURCES / "scan_cuda.cu", tmp_path_factory.mktemp("emulation"))


@pytest.fixture
def configure(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """scan_cuda calls the emulation, on CPU tensors. The function is `configure_emulation`."""
    monkeypatch.setattr(extension, "load", lambda name: library)
    monkeypatch.setattr(scan_cuda, "_current_stream", lambda device: nullcontext())  # stream: null
    configure_emulation(library)
    return partial(configure_emulation, library)


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
THREAD_ORDER_SIZES = [(3, 3, 3, 6, 3, 1), (1, 12, 14, 4, 33, 2), (1, 12, 14, 6, 6, 1)]


# ---- emulated


@needs_compiler
@pytest.mark.parametrize("name", ["scan0", "scan1"])
def test_golden_numbers_of_the_original(configure, name: str) -> None:
    tensors, gy, expected = golden_sequences(name)
    y, saved = scan_cuda.forward(*tensors, True)
    scans.assert_close([y, *scan_cuda.backward(gy, *tensors, saved, True)], expected, y=1e-5, gradients=1e-4)


@needs_compiler
@pytest.mark.parametrize("sizes", SEQUENCE_SIZES, ids=str)
def test_sequences_match_the_reference(configure, sizes: tuple[int, ...]) -> None:
    tensors = draw_sequences(*sizes)
    assert_close(run_sequences(tensors), exactly(selective_scan_reference, tensors))


@needs_compiler
@pytest.mark.parametrize("length", [2, 130])
def test_sequences_without_optional_arguments(configure, length: int) -> None:
    """Without softplus delta may be negative: decays then grow."""
    tensors = without(draw_sequences(2, 2, 5, 2, length), 5, 6)
    assert (tensors[1] < 0).any()
    expected = exactly(lambda *each: selective_scan_reference(*each, delta_softplus=False), tensors)
    assert_close(run_sequences(tensors, delta_softplus=False), expected)


@needs_compiler
@pytest.mark.parametrize("sizes", IMAGE_SIZES, ids=str)
def test_images_match_the_reference(configure, sizes: tuple[int, ...]) -> None:
    tensors = draw_images(*sizes)
    assert_close(run_images(tensors), exactly(selective_scan_2d_reference, tensors))


@needs_compiler
def test_images_without_optional_arguments(configure) -> None:
    for missing in ((4, 5), (4,), (5,)):
        tensors = without(draw_images(2, 4, 5, 9, 2, 1), *missing)
        assert_close(run_images(tensors), exactly(selective_scan_2d_reference, tensors))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_whose_sum_does_not_fit_in_shared_memory(configure, library, dtype: torch.dtype) -> None:
    tensors = cast(draw_images(2, 14, 20, 18, 3, 1), dtype, IMAGE_INPUTS)
    fitting = run_images(tensors)
    configure(shared_memory=16 << 10)
    args = scan_cuda._images(*(tensors[index] for index in (0, 2, 3)))
    assert library.scan_cuda_images_scratch(ctypes.byref(args)) == (0 if dtype == torch.float32 else tensors[0].numel())
    assert all(map(torch.equal, run_images(tensors), fitting))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_order_of_threads(configure, dtype: torch.dtype) -> None:
    """A missing barrier would show: shared memory starts as NaN, and any thread may run ahead of the others."""
    cases = [(run_images, cast(draw_images(*sizes), dtype, IMAGE_INPUTS)) for sizes in THREAD_ORDER_SIZES]
    cases += [(run_sequences, cast(draw_sequences(1, 2, 5, 2, 140), dtype, SEQUENCE_INPUTS))]
    for run, tensors in cases:
        configure()
        ordered = run(tensors)
        for seed in (1, 2, 3):
            configure(seed)
            assert all(map(torch.equal, run(tensors), ordered)), (run, seed)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_as_exact_as_plain_torch(configure, dtype: torch.dtype) -> None:
    for sizes in ((2, 2, 24, 1, 50), (1, 1, 5, 3, 140)):
        tensors = draw_sequences(*sizes)
        assert_as_exact_as_plain_torch(run_sequences, selective_scan_reference, tensors, dtype, SEQUENCE_INPUTS)
    for sizes in ((2, 9, 10, 24, 6, 1), (1, 5, 7, 5, 2, 3)):
        tensors = draw_images(*sizes)
        assert_as_exact_as_plain_torch(run_images, selective_scan_2d_reference, tensors, dtype, IMAGE_INPUTS)


@needs_compiler
@pytest.mark.parametrize(("delta", "A"), EXTREMES)
def test_extreme_values_stay_finite(configure, delta: float, A: float) -> None:
    sequences, images = extreme_inputs(delta, A)
    assert all(each.isfinite().all() for each in [*run_sequences(sequences), *run_images(images)])


@needs_compiler
def test_growing_decays_leave_a_state_of_zero(configure) -> None:
    """The product of a tile's decays overflows long before any state does: u starts at the last position."""
    tensors = without(draw_sequences(1, 1, 2, 1, 200), 5, 6)
    tensors[0][..., :-1] = 0
    tensors[1].fill_(-1.0)
    expected = exactly(lambda *each: selective_scan_reference(*each, delta_softplus=False), tensors)
    assert rel_error(run_sequences(tensors, delta_softplus=False)[0], expected[0]) < 2e-6


@needs_compiler
def test_small_delta_keeps_its_digits(configure) -> None:
    """softplus(-12) is 6e-6, which log2(1 + e^x) in float32 would round to one digit."""
    tensors = draw_sequences(1, 1, 3, 1, 20)
    tensors[6].fill_(-12.0)
    assert_close(run_sequences(tensors), exactly(selective_scan_reference, tensors))


@needs_compiler
def test_all_returned_values_are_defined(configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Including the unused part of the saved states."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # with NaN
    torch.use_deterministic_algorithms(True)
    try:
        results = [scan_cuda.forward(*draw_sequences(2, 2, *sizes), True) for sizes in ((3, 1, 12), (2, 2, 140), (3, 17, 70))]
        results += [scan_cuda.forward_2d(*draw_images(*sizes)) for sizes in IMAGE_SIZES]
    finally:
        torch.use_deterministic_algorithms(False)
    for y, saved in results:
        assert y.isfinite().all() and saved.isfinite().all()
    for sizes in IMAGE_SIZES:
        batch, height, width, channels, _, states = sizes
        shape = scan_cuda.saved_states_shape(batch, 4, channels, height * width, states)
        assert scan_cuda.forward_2d(*draw_images(*sizes))[1].shape == shape


@needs_compiler
def test_empty_batch(configure) -> None:
    assert [each.shape[0] for each in run_sequences(draw_sequences(0, 2, 3, 1, 5))] == [0, 0, 0, 6, 0, 0, 6, 6]
    gradients = run_images(draw_images(0, 2, 3, 5, 2, 1))
    assert gradients[0].shape == (0, 2, 3, 5)
    assert all(not each.any() for each in gradients)


@needs_compiler
def test_tensors_that_are_not_aligned(configure) -> None:
    tensors = cast(draw_images(2, 3, 4, 6, 3, 1), torch.bfloat16, IMAGE_INPUTS)
    shifted = [torch.cat([each.new_zeros(1), each.flatten()])[1:].view(each.shape) for each in tensors]
    assert any(each.data_ptr() % 4 for each in shifted)
    assert all(map(torch.equal, run_images(shifted), run_images(tensors)))


@needs_compiler
def test_errors_of_the_library_have_a_message(configure) -> None:
    configure(shared_memory=1 << 10)
    with pytest.raises(RuntimeError, match="rank of delta or the number of states is too large"):
        scan_cuda.forward_2d(*draw_images(1, 2, 2, 16, 99, 1))


@pytest.mark.parametrize("states", [1, 3, 16, 17, 64, 65, 256])
def test_every_length_is_divided_evenly(states: int) -> None:
    for length in (*range(1, 2000), 3136, 12544):
        warps, lanes = scan_cuda._warps(length, states), scan_cuda._lanes(length)
        assert 1 <= warps <= (16 if states == 1 else 8) and warps * states <= 256
        tiles = -(-length // (16 * warps))
        assert 16 * warps * tiles - length < 16 * (tiles + 1)  # no warp is idle in more than one tile
        assert lanes in (1, 2, 4, 8, 16, 32) and (4 * lanes >= length or lanes == 32) and (lanes == 1 or 2 * lanes < length)
        assert scan_cuda.saved_states_shape(1, 4, 5, length, states)[2] >= max(tiles, -(-length // (4 * lanes)))


# ---- reasons why it cannot run


def test_reasons_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not on cpu" in scan_cuda.unavailable_reason(torch.device("cpu"))
    cuda = torch.device("cuda")
    monkeypatch.setattr(extension, "unavailable_reason", lambda name: f"{name} is not built")
    assert scan_cuda.unavailable_reason(cuda) == scan_cuda.unavailable_reason() == "scan_cuda is not built"
    monkeypatch.setattr(extension, "unavailable_reason", lambda name: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in scan_cuda.unavailable_reason(cuda)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in scan_cuda.unavailable_reason(cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, device))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GTX 1080")
    monkeypatch.setattr(scan_cuda, "_function", lambda name, result: lambda device: b"no kernel image is available")
    assert "(compute capability 6.3)" in scan_cuda.unavailable_reason(cuda)  # of the current device
    reason = scan_cuda.unavailable_reason(torch.device("cuda:1"))
    assert "GTX 1080 (compute capability 6.1): no kernel image is available; build it" in reason and "\n" not in reason
    assert "TORCH_CUDA_ARCH_LIST=6.1" in reason
    monkeypatch.setattr(scan_cuda, "_function", lambda name, result: lambda device: None)
    assert scan_cuda.unavailable_reason(cuda) is None


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
    if not torch.cuda.is_available() or (reason := scan_cuda.unavailable_reason(device)):
        pytest.skip(reason if torch.cuda.is_available() else "no CUDA device")
    return device


def _to(device: torch.device, tensors: list[Tensor]) -> list[Tensor]:
    return [each.to(device) for each in tensors]


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [*IMAGE_SIZES, (2, 56, 56, 96, 6, 1), (4, 7, 7, 768, 48, 1)], ids=str)
def test_images_on_a_gpu(gpu: torch.device, sizes: tuple[int, ...]) -> None:
    tensors = draw_images(*sizes)
    assert_close(run_images(_to(gpu, tensors)), exactly(selective_scan_2d_reference, tensors))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SEQUENCE_SIZES, ids=str)
def test_sequences_on_a_gpu(gpu: torch.device, sizes: tuple[int, ...]) -> None:
    tensors = draw_sequences(*sizes)
    assert_close(run_sequences(_to(gpu, tensors)), exactly(selective_scan_reference, tensors))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_runs_on_a_gpu_give_equal_bits(gpu: torch.device, dtype: torch.dtype) -> None:
    images = [draw_images(*sizes) for sizes in ((8, 28, 28, 192, 12, 1), (64, 3, 3, 96, 6, 1), (2, 20, 20, 48, 4, 16))]
    cases = [(run_images, _to(gpu, cast(tensors, dtype, IMAGE_INPUTS))) for tensors in images]
    cases += [(run_sequences, _to(gpu, cast(draw_sequences(4, 4, 64, 2, 300), dtype, SEQUENCE_INPUTS)))]
    for run, tensors in cases:
        first = run(tensors)
        for _ in range(20):
            assert all(map(torch.equal, run(tensors), first))


@pytest.mark.gpu
def test_the_current_stream_is_used(gpu: torch.device) -> None:
    tensors = _to(gpu, draw_images(2, 14, 14, 64, 4, 1))
    want = scan_cuda.forward_2d(*tensors)[0]
    late = torch.zeros_like(tensors[0])
    torch.cuda.synchronize(gpu)
    with torch.cuda.stream(torch.cuda.Stream(gpu)):
        torch.cuda._sleep(50_000_000)  # the copy comes late: a scan on another stream would read zeros
        late.copy_(tensors[0], non_blocking=True)
        y = scan_cuda.forward_2d(late, *tensors[1:])[0]
    torch.cuda.synchronize(gpu)
    assert torch.equal(y, want)
