"""Triton's compiler accepts the kernels, for GPUs that this machine does not have. Their numbers: test_selective_scan.py.

This file is also the script that compiles them, in a process of its own: in this one Triton may have been imported as an
interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import SETTINGS

from vmamba import scan_triton

SHARED_MEMORY = 48 * 1024  # bytes that a block may have on every GPU
CAPABILITIES = (80, 90)
CONSTANTS = {"N": 1, "N_POWER": 1, "T": 4, "S": 16, "BC": 32}
HALF = ["x", "B", "C", "dx"]  # bfloat16, as in a network
FLOAT = ["gy", "delta", "A", "D", "bias", "y", "states", "sum_dx", "ddelta", "dA", "dD", "dbias", "dB", "dC"]


def main() -> None:
    """Prints the shared memory of the forward and backward kernel for each compute capability, as JSON."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict.fromkeys(CONSTANTS, "constexpr") | dict.fromkeys(HALF, "*bf16") | dict.fromkeys(FLOAT, "*fp32")
    shared = []
    for kernel in (scan_triton._kernels().forward, scan_triton._kernels().backward):
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        constants = {(kernel.arg_names.index(name),): value for name, value in CONSTANTS.items()}
        for capability in CAPABILITIES:
            target, source = GPUTarget("cuda", capability, 32), ASTSource(kernel, signature, constants)
            shared.append(triton.compile(source, target=target, options={"num_warps": 4}).metadata.shared)
    print(json.dumps(shared))


@pytest.mark.slow  # half a minute
def test_kernels_compile(tmp_path: Path) -> None:
    pytest.importorskip("triton", minversion="3.3", reason="compiling without a GPU needs Triton 3.3")
    environment = os.environ | SETTINGS | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert all(bytes <= SHARED_MEMORY for bytes in json.loads(done.stdout))


if __name__ == "__main__":
    main()
