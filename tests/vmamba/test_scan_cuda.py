"""The CUDA scan: its kernels emulated on the CPU, what nvcc makes of them, and a GPU where there is one."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from support import scans
from support.cuda_emulation import configure_emulation, emulate_cuda, emulated_scan, needs_compiler
from support.processes import ROOT
from support.scans import draw_images, exactly, halve
from torch import Tensor

from vmamba import extension, scan_cuda
from vmamba.scan_reference import selective_scan_2d_reference

SOURCES = ROOT / "csrc" / "selective_scan"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

run_images = partial(scans.run_images, scan_cuda)
assert_close = partial(scans.assert_close, y=2e-6, gradients=1e-5)


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """scan_cuda calls the emulation, on CPU tensors. The function is `configure_emulation`."""
    return partial(configure_emulation, emulate_cuda(monkeypatch))


SIZES = [  # batch, H, W, D, R, N
    (3, 3, 3, 16, 3, 1),
    (9, 1, 1, 2, 1, 1),
    (2, 5, 9, 18, 40, 3),
    (1, 14, 14, 34, 12, 1),
    (1, 9, 11, 4, 2, 17),
    (1, 3, 11, 2, 2, 65),
    (1, 41, 40, 2, 6, 1),
]
THREAD_ORDER_SIZES = [(3, 3, 3, 6, 3, 1), (1, 12, 14, 4, 33, 2), (1, 12, 14, 6, 6, 1)]


# ---- emulated


# Numbers of sizes, types and optional arguments: test_selective_scan.py, which runs the emulation too.


@needs_compiler
def test_an_odd_number_of_channels_is_refused_in_words(configure) -> None:
    with pytest.raises(RuntimeError, match="9 is odd: use another backend"):
        run_images(draw_images(1, 2, 2, 9, 2, 1))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_whose_sum_does_not_fit_in_shared_memory(configure, dtype: torch.dtype) -> None:
    tensors = halve(draw_images(2, 14, 20, 18, 3, 1), dtype)
    fitting = run_images(tensors)
    configure(shared_memory=16 << 10)
    args = scan_cuda._images(*(tensors[index] for index in (0, 2, 3)))
    assert emulated_scan().scan_cuda_images_scratch(ctypes.byref(args)) == (0 if dtype == torch.float32 else tensors[0].numel())
    assert all(map(torch.equal, run_images(tensors), fitting))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_order_of_threads(configure, dtype: torch.dtype) -> None:
    """A missing barrier would show: shared memory starts as NaN, and any thread may run ahead of the others."""
    for sizes in THREAD_ORDER_SIZES:
        tensors = halve(draw_images(*sizes), dtype)
        configure()
        ordered = run_images(tensors)
        for seed in (1, 2, 3):
            configure(seed)
            assert all(map(torch.equal, run_images(tensors), ordered)), (sizes, seed)


@needs_compiler
def test_small_delta_keeps_its_digits(configure) -> None:
    """softplus(-12) is 6e-6, which log2(1 + e^x) in float32 would round to one digit."""
    tensors = draw_images(1, 4, 5, 4, 2, 1)
    tensors[2].mul_(0.01)
    tensors[5].fill_(-12.0)
    assert_close(run_images(tensors), exactly(selective_scan_2d_reference, tensors))


@needs_compiler
def test_tensors_that_are_not_aligned(configure) -> None:
    tensors = halve(draw_images(2, 3, 4, 6, 3, 1), torch.bfloat16)
    shifted = [torch.cat([each.new_zeros(1), each.flatten()])[1:].view(each.shape) for each in tensors]
    assert any(each.data_ptr() % 4 for each in shifted)
    assert all(map(torch.equal, run_images(shifted), run_images(tensors)))


# ---- compiled by nvcc


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_no_kernel_spills_registers(tmp_path: Path) -> None:
    command = [NVCC, "-std=c++17", "-O3", "-arch=sm_90", "-Xptxas", "-v", "-Xcompiler", "-fPIC", "-shared"]
    command += [str(SOURCES / "scan_cuda.cu"), "-o", str(tmp_path / "sm_90.so")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    kernels = re.findall(pattern, output, re.DOTALL)
    assert len(kernels) == 12 and "warning" not in output  # 3 types, one state or more, forward and backward
    for name, stores, loads, registers in kernels:
        assert (int(stores), int(loads)) == (0, 0), name
        assert int(registers) * (512 if "Lb1E" in name else 256) <= 65536, name

    library = ctypes.CDLL(str(tmp_path / "sm_90.so"))
    assert library.scan_abi_version() == extension.SCAN.abi_version
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
@pytest.mark.parametrize("sizes", [*SIZES, (2, 56, 56, 96, 6, 1), (4, 7, 7, 768, 48, 1)], ids=str)
def test_images_on_a_gpu(gpu: torch.device, sizes: tuple[int, ...]) -> None:
    tensors = draw_images(*sizes)
    assert_close(run_images(_to(gpu, tensors)), exactly(selective_scan_2d_reference, tensors))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_runs_on_a_gpu_give_equal_bits(gpu: torch.device, dtype: torch.dtype) -> None:
    for sizes in ((8, 28, 28, 192, 12, 1), (64, 3, 3, 96, 6, 1), (2, 20, 20, 48, 4, 16)):
        tensors = _to(gpu, halve(draw_images(*sizes), dtype))
        first = run_images(tensors)
        for _ in range(20):
            assert all(map(torch.equal, run_images(tensors), first))


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
