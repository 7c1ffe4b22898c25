"""Shows what this machine has for the compiled parts, VMamba's selective scan and the renderer of views: what is missing and
why, and which command to run next.

    python -m scripts.doctor

It installs and changes nothing.
"""

import os
import platform
import sys
from pathlib import Path

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


def show_tools() -> tuple[bool, bool]:
    """Returns whether there are a C++ compiler and nvcc."""
    try:
        compiler = build_tool.find_compiler(os.environ)
        row("C++ compiler", " ".join(compiler))
    except build_tool.BuildError as error:
        compiler = None
        row("C++ compiler", str(error))
    nvcc = build_tool.find_nvcc(os.environ)
    row("nvcc", nvcc or "none (looked in CUDA_HOME, on PATH and in /usr/local/cuda): no CUDA library can be built here")
    return compiler is not None, nvcc is not None


def is_outdated(info: dict, library: build_tool.Library) -> bool:
    """Whether the sources have changed since the build that build.json describes."""
    return info.get("sources_sha256") != library.sources_sha256()


def show_builds() -> list[Path]:
    """Returns the folders of builds that are out of date."""
    outdated = []
    for folder in extension.build_folders():
        info = extension.build_info(folder)
        is_old = is_outdated(info, build_tool.SELECTIVE_SCAN)
        outdated += [folder] * is_old
        parts = [name for name in ("cpu", "cuda") if name in info]
        parts += [f"{name}: {reason}" for name, reason in info.get("not_built", {}).items()]
        row("build", f"{folder}{' (OUT OF DATE: the sources have changed since)' if is_old else ''}: {'; '.join(parts)}")
    return outdated


def show_backends() -> dict[str, str]:
    """Shows which backends can run, and why others cannot. Returns the one that `auto` selects, by device type."""
    chosen = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for name in PREFERENCE[device]:
            reason = BACKENDS[name].unavailable_reason(torch.device(device))
            if reason is None and device not in chosen:
                chosen[device] = name
            status = reason or ("selected" if chosen[device] == name else "can run")
            extra = f" ({scan_cpp.instruction_set()} instructions)" if name == "cpp" and reason is None else ""
            row(f"{device}: {name}", status + extra)
    return chosen


def show_renderer() -> str | None:
    """Shows whether views are rendered by compiled code. Returns the command that builds it anew, if that would help."""
    reason = rendering_cpp.unavailable_reason()
    if reason:
        row("views", f"torchvision and Pillow; cpp: {reason}")
        return rendering_cpp.VIEWS.build_command
    folder = rendering_cpp.VIEWS.build_folders()[0]
    is_old = is_outdated(build_info(folder), build_tool.VIEWS)
    note = ", OUT OF DATE: the sources have changed since" if is_old else ""
    row("views", f"cpp selected ({rendering_cpp.instruction_set()} instructions{note})")
    return rendering_cpp.VIEWS.build_command if is_old else None


def advice(chosen: dict[str, str], outdated: list[Path], compiler: bool, nvcc: bool, renderer: str | None) -> str:
    """The command to run next; `renderer` is the one that builds the renderer, or None."""
    if outdated:
        return extension.BUILD if extension.IN_PLACE in outdated else extension.REINSTALL
    if chosen["cpu"] != "cpp":
        hint = "" if compiler else "install a C++ compiler (apt install g++, or conda install gxx), then: "
        return hint + extension.BUILD
    if chosen.get("cuda", "cuda") != "cuda":
        hint = "" if nvcc else f"stay with {chosen['cuda']}, or install the CUDA toolkit (nvcc), then: "
        return hint + f"SCAN_CUDA=1 {extension.BUILD}"
    if renderer:
        return renderer
    return "nothing to install; python -m scripts.bench.scan measures the scan, python -m scripts.bench.views the renderer"


def main() -> None:
    ArgumentParser(description=__doc__).parse_args()
    show_torch()
    compiler, nvcc = show_tools()
    outdated = show_builds()
    print()
    chosen = show_backends()
    renderer = show_renderer()
    print(f"\nnext: {advice(chosen, outdated, compiler, nvcc, renderer)}")


if __name__ == "__main__":
    run_entry_point(main)
