"""What this machine has for the selective scan of VMamba, what is missing and why, and the command to run next.

    python -m scripts.doctor

Nothing is installed or changed.
"""

import importlib.util
import os
import platform
import sys
from pathlib import Path
from types import ModuleType

import torch

from vmamba import extension, scan_cpp
from vmamba.selective_scan import BACKENDS, PREFERENCE

BUILD_SCRIPT = Path(__file__).resolve().parents[1] / "csrc" / "selective_scan" / "setup.py"


def row(name: str, text: str) -> None:
    print(f"{name:<14} {text}")


def build_script() -> ModuleType | None:
    """setup.py of the extension, for what it knows about compilers; None without setuptools."""
    spec = importlib.util.spec_from_file_location("scan_setup", BUILD_SCRIPT)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        row("setuptools", f"{error}: pip install 'setuptools>=70.1'")
        return None
    return module


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


def show_tools(script: ModuleType) -> tuple[bool, bool]:
    """Whether there are a C++ compiler and nvcc."""
    try:
        compiler = script.find_compiler(os.environ)
    except script.BuildError as error:
        compiler = None
        row("C++ compiler", str(error))
    else:
        openmp = "with OpenMP" if script.openmp_flags(compiler) else "without OpenMP: the CPU scan will use one thread"
        row("C++ compiler", f"{' '.join(compiler)}, {openmp}")
    nvcc = script.find_nvcc(os.environ)
    if nvcc is None:
        row("nvcc", "none (looked in CUDA_HOME, on PATH and in /usr/local/cuda): no CUDA library can be built here")
    else:
        try:
            version = script.toolkit_version(script.run([nvcc, "--version"]))
            listed = script.architectures(version, os.environ.get("TORCH_CUDA_ARCH_LIST"))
        except script.BuildError as error:
            row("nvcc", f"{nvcc}: {str(error).splitlines()[0]}")
        else:
            row("nvcc", f"{nvcc}, CUDA {version[0]}.{version[1]}, would compile for {' '.join(listed)}")
    return compiler is not None, nvcc is not None


def show_builds(script: ModuleType | None) -> list[Path]:
    """The folders of builds that are out of date."""
    stale = []
    for folder in extension.folders():
        facts = extension.build_facts(folder)
        old = script is not None and facts.get("sources_sha256") != script.sources_sha256()
        stale += [folder] * old
        cuda = facts.get("cuda") or {}
        parts = [f"CPU library by {facts['cpu']['compiler']}"] if "cpu" in facts else []
        parts += [f"CUDA library by nvcc {cuda['nvcc']} for {' '.join(cuda['architectures'])}"] if cuda else []
        parts += [f"{name}: {reason}" for name, reason in facts.get("not_built", {}).items()]
        row("build", f"{folder}{' (OUT OF DATE: the sources have changed since)' if old else ''}: {'; '.join(parts)}")
    if not extension.folders():
        row("build", "none")
    return stale


def show_backends() -> dict[str, str]:
    """The backend that `auto` takes, by type of device; tells why others do not run."""
    chosen = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for name in PREFERENCE[device]:
            reason = BACKENDS[name].unavailable(torch.device(device))
            if reason is None and device not in chosen:
                chosen[device] = name
            state = reason or ("chosen" if chosen[device] == name else "can run")
            extra = f" ({scan_cpp.instruction_set()} instructions)" if name == "cpp" and reason is None else ""
            row(f"{device}: {name}", state + extra)
    return chosen


def advice(chosen: dict[str, str], stale: list[Path], compiler: bool, nvcc: bool) -> str:
    """The next command."""
    if stale:
        return "bash scripts/setup.sh" if extension.IN_PLACE in stale else extension.REBUILD
    if chosen["cpu"] != "cpp":
        hint = "" if compiler else "install a C++ compiler (apt install g++, or conda install gxx), then: "
        return hint + extension.INSTALL
    if chosen.get("cuda", "cuda") != "cuda":
        hint = "" if nvcc else f"stay with {chosen['cuda']}, or install the CUDA toolkit (nvcc), then: "
        return hint + f"SCAN_CUDA=1 {extension.REBUILD}"
    return "nothing to install; python -m scripts.bench.scan measures the scan"


def main() -> None:
    show_torch()
    script = build_script()
    compiler, nvcc = show_tools(script) if script else (True, True)
    stale = show_builds(script)
    print()
    chosen = show_backends()
    print(f"\nnext: {advice(chosen, stale, compiler, nvcc)}")


if __name__ == "__main__":
    main()
