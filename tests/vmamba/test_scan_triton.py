"""Triton's compiler accepts the kernels, for GPUs that this machine does not have. Their numbers: test_selective_scan.py.

This file is also the script that compiles them, in a process of its own: in this one Triton may have been imported as an
interpreter. Launches are recorded instead of run, and compiled as they would be for the target GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from support.processes import SETTINGS
from torch import Tensor

from vmamba import scan_triton

pytestmark = pytest.mark.slow  # compiling takes about a minute

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
SHARED_MEMORY = 48 * 1024  # bytes that a block may have on every GPU
CAPABILITIES = (80, 90)


def scan_images() -> None:
    """One state and bfloat16, like VMamba."""
    batch, height, width, channels, rank = 2, 14, 14, 48, 6
    x = torch.zeros(batch, height, width, channels, dtype=torch.bfloat16)
    proj = torch.zeros(batch, height, width, 4, rank + 2, dtype=torch.bfloat16)
    parameters = [torch.zeros(4, channels, rank), torch.zeros(4 * channels, 1), *torch.zeros(2, 4 * channels)]
    y, saved = scan_triton.forward_2d(x, proj, *parameters)
    scan_triton.backward_2d(y, (x, proj, *parameters), saved)


class Recorder:
    """Replaces a kernel; appends the arguments of its launches to `launches`."""

    def __init__(self, kernel, launches: list[tuple]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *arguments, **keywords: self.launches.append((self.kernel, arguments, keywords))


def compile_launch(capability: int, kernel, arguments: tuple, keywords: dict):
    """Compiles like a launch: integers that are 1 become constants, multiples of 16 are marked as such."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {"num_warps": keywords.pop("num_warps")}
    unspecialised = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = values[name]
        if value is None or name in keywords or (name not in unspecialised and isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[(index,)] = value
            continue
        signature[name] = TYPES[value.dtype] if isinstance(value, Tensor) else "i32"
        number = value.data_ptr() if isinstance(value, Tensor) else value
        if name not in unspecialised and number % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main() -> None:
    """Prints code size and shared memory of the forward and backward kernel for each capability, as JSON."""
    kernels = scan_triton._kernels()
    outcome = {}
    for capability in CAPABILITIES:
        launches = []
        names = ("forward", "backward")
        stand_in = SimpleNamespace(INTERPRETED=False, **{name: Recorder(getattr(kernels, name), launches) for name in names})
        with mock.patch.object(scan_triton, "_kernels", lambda stand_in=stand_in: stand_in):
            scan_images()
        compiled = [compile_launch(capability, *launch) for launch in launches]
        outcome[capability] = [{"code": len(each.asm["cubin"]), "shared": each.metadata.shared} for each in compiled]
    print(json.dumps(outcome))


def test_kernels_compile(tmp_path: Path) -> None:
    pytest.importorskip("triton", minversion="3.3", reason="compiling without a GPU needs Triton 3.3")
    environment = os.environ | SETTINGS | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for kernels in json.loads(done.stdout).values():
        assert len(kernels) == 2  # forward and backward
        for kernel in kernels:
            assert kernel["code"] > 0
            assert kernel["shared"] <= SHARED_MEMORY


if __name__ == "__main__":
    main()
