"""Shows what this machine has for VMamba's selective scan and the renderer of views: what runs, and how to build the rest.

    python -m scripts.doctor

It installs and changes nothing.
"""

import os
import platform
import sys

import torch

from clever.arguments import ArgumentParser
from clever.compiled import build_info
from clever.data import rendering_cpp
from clever.entry import run_entry_point
from csrc import build_tool
from vmamba import extension, scan_cpp
from vmamba.selective_scan import BACKENDS, PREFERENCE


def row(name: str, text: str) -> None:
    print(f"{name:<14} {text}")


def show_torch() -> None:
    row("Python", f"{platform.python_version()} ({sys.executable})")
    row("torch", f"{torch.__version__}, built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPUs only'}")
    instructions = torch.backends.cpu.get_cpu_capability()
    row("CPU", f"{platform.machine()}, {torch.get_num_threads()} threads, best instructions {instructions}")
    if not torch.cuda.is_available():
        row("GPU", "none that torch can use")
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        row("GPU", f"cuda:{index} {torch.cuda.get_device_name(index)}, compute capability {major}.{minor}")


def show_tools() -> None:
    try:
        compiler = " ".join(build_tool.find_compiler(os.environ))
    except build_tool.BuildError as error:
        compiler = f"{error}; apt install g++, or conda install gxx"
    row("C++ compiler", compiler)
    nvcc = build_tool.find_nvcc(os.environ)
    row("nvcc", nvcc or "none (looked in CUDA_HOME, on PATH and in /usr/local/cuda): no CUDA library can be built here")


def show_builds() -> None:
    for library, parts in ((extension.SCAN, build_tool.SELECTIVE_SCAN), (rendering_cpp.VIEWS, build_tool.VIEWS)):
        for folder in library.build_folders():
            info = build_info(folder)
            built = [name for name in ("cpu", "cuda") if name in info]
            built += [f"{name}: {reason}" for name, reason in info.get("not_built", {}).items()]
            is_old = info.get("sources_sha256") != parts.sources_sha256()
            note = f" (OUT OF DATE, the sources have changed since: {library.build_command})" if is_old else ""
            row("build", f"{folder}{note}: {'; '.join(built)}")


def show_backends() -> None:
    """Which backends of the scan can run, and why others cannot; the first one that can is selected."""
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        reasons = {name: BACKENDS[name].unavailable_reason(torch.device(device)) for name in PREFERENCE[device]}
        selected = next(name for name, reason in reasons.items() if reason is None)
        for name, reason in reasons.items():
            extra = f" ({scan_cpp.instruction_set()} instructions)" if name == "cpp" and reason is None else ""
            row(f"{device}: {name}", (reason or ("selected" if name == selected else "can run")) + extra)
    reason = rendering_cpp.unavailable_reason()
    found = f"torchvision and Pillow; cpp: {reason}" if reason else f"cpp ({rendering_cpp.instruction_set()} instructions)"
    row("views", found)


def main() -> None:
    ArgumentParser(description=__doc__).parse_args()
    show_torch()
    show_tools()
    show_builds()
    show_backends()


if __name__ == "__main__":
    run_entry_point(main)
