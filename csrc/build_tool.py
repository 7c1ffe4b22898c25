"""Compiles the libraries of csrc/ into plain shared libraries, without torch and without Python's headers.

The setup.py of each folder calls `main`, scripts/doctor.py asks which compilers there are. Environment variables:

CXX                    C++17 compiler; default: the first of g++, c++, clang++ on PATH
SCAN_CUDA              0: leave the CUDA library out; 1: fail when it cannot be built; default: build it if there is an nvcc
CUDA_HOME              where bin/nvcc is; default: nvcc on PATH, then /usr/local/cuda
TORCH_CUDA_ARCH_LIST   "8.0;9.0+PTX" or "8.0 9.0"; default: those of ARCHITECTURES that nvcc knows, the last with PTX
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

COMPILERS = ("g++", "c++", "clang++")
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]  # infinities and NaN still behave as they should
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
CUDA_FLAGS = ["-std=c++17", "-O3", "-shared", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
ARCHITECTURES = ("7.0", "7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")  # compute capabilities of GPUs


class BuildError(Exception):
    """A library cannot be built. The first line of the message gives the reason; compiler output may follow."""


@dataclass(frozen=True)
class Library:
    """A folder of sources with a C interface. With the name scan: scan_cpu.cpp, compiled once per instruction set with
    -DSCAN_VARIANT=<instruction set>, and scan_dispatch.cpp, which chooses among them, become libscan_cpu.so; scan_cuda.cu, if
    `cuda`, becomes libscan_cuda.so.
    """

    name: str
    title: str  # messages begin with it
    folder: Path
    package: str  # folder of the Python package that holds the libraries
    cuda: bool  # whether there is a CUDA library

    def say(self, message: str) -> None:
        print(f"{self.title}: {message}", file=sys.stderr, flush=True)

    def sources_sha256(self) -> str:
        """Hash of the names and contents of all sources."""
        digest = hashlib.sha256()
        for path in sorted(path for path in self.folder.iterdir() if path.suffix in (".h", ".cpp", ".cu", ".cuh")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        return digest.hexdigest()


HERE = Path(__file__).resolve().parent
SELECTIVE_SCAN = Library("scan", "selective scan", HERE / "selective_scan", "clever_selective_scan", cuda=True)
VIEWS = Library("views", "view renderer", HERE / "views", "clever_views", cuda=False)


def run(command: list[str], folder: Path | None = None) -> str:
    """Runs a command and returns its output, stderr included; raises BuildError with the output if it fails."""
    result = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if result.returncode:
        raise BuildError(f"this command failed: {shlex.join(command)}\n{result.stdout}")
    return result.stdout


def find_compiler(environ: Mapping[str, str]) -> list[str]:
    """The C++ compiler, as the first words of a command; raises BuildError if there is none."""
    command = shlex.split(environ.get("CXX", ""))
    for name in command[:1] or COMPILERS:
        if path := shutil.which(name, path=environ.get("PATH")):
            return [path, *command[1:]]
    names = command[0] if command else ", ".join(COMPILERS)
    raise BuildError(f"no C++ compiler ({names}) on PATH; install g++ (apt install g++, dnf install gcc-c++), or set CXX")


def build_cpu(library: Library, output: Path, environ: Mapping[str, str]) -> dict:
    """Compiles the CPU library to `output`, or raises BuildError; returns what build.json records about it."""
    compiler = find_compiler(environ)
    trial = [*compiler, "-fopenmp", "-x", "c++", "-include", "omp.h", "-fsyntax-only", os.devnull]
    openmp = ["-fopenmp"] if subprocess.run(trial, capture_output=True).returncode == 0 else []
    if not openmp:
        library.say(f"{compiler[0]} has no OpenMP: the library will use one thread")
    wide = {"avx2": AVX2, "avx512": AVX512} if platform.machine().lower() in ("x86_64", "amd64") else {}
    name, variants = library.name, {"baseline": [], **wide}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = {
            f"{folder}/{variant}.o": [f"{name}_cpu.cpp", f"-D{name.upper()}_VARIANT={variant}", *flags]
            for variant, flags in variants.items()
        }
        objects[f"{folder}/dispatch.o"] = [f"{name}_dispatch.cpp"]
        commands = [[*compiler, *FLAGS, *openmp, "-c", *source, "-o", target] for target, source in objects.items()]
        list(pool.map(lambda command: run(command, library.folder), commands))  # raises the error of a failed command
        only_needed = ["-Wl,--as-needed"] if sys.platform == "linux" else []  # the library then does not need libstdc++
        run([*compiler, "-shared", *openmp, *only_needed, *objects, "-o", str(output)])
    version = run([*compiler, "--version"]).splitlines()[0]
    return {"compiler": version, "openmp": bool(openmp), "instruction_sets": list(variants)}


def find_nvcc(environ: Mapping[str, str]) -> str | None:
    """Path of nvcc: in CUDA_HOME, on PATH, or in /usr/local/cuda; None if there is none."""
    home, on_path = environ.get("CUDA_HOME"), shutil.which("nvcc", path=environ.get("PATH"))
    candidates = [f"{home}/bin/nvcc" if home else "", on_path or "", "/usr/local/cuda/bin/nvcc"]
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def build_cuda(library: Library, output: Path, environ: Mapping[str, str]) -> dict:
    """Compiles the CUDA library to `output`, or raises BuildError; returns what build.json records about it."""
    if environ.get("SCAN_CUDA") == "0":
        raise BuildError("left out (SCAN_CUDA=0)")
    if (nvcc := find_nvcc(environ)) is None:
        raise BuildError("no nvcc (looked in CUDA_HOME, on PATH and in /usr/local/cuda)")
    listed, known = environ.get("TORCH_CUDA_ARCH_LIST", ""), run([nvcc, "--list-gpu-code"]).split()
    supported = [name for name in ARCHITECTURES if f"sm_{name.replace('.', '')}" in known]
    capabilities = re.sub("[;,]", " ", listed).split() or [*supported[:-1], f"{supported[-1]}+PTX"]
    library.say(f"{nvcc} compiles for {' '.join(capabilities)}")
    flags = [*CUDA_FLAGS, "--threads", "0"]
    flags += ["-ccbin", shlex.split(environ["CXX"])[0]] if environ.get("CXX") else []
    for capability in capabilities:
        number = capability.removesuffix("+PTX").replace(".", "")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"] if capability.endswith("+PTX") else []
    run([nvcc, *flags, f"{library.name}_cuda.cu", "-o", str(output)], library.folder)
    version = run([nvcc, "--version"]).partition("release ")[2].partition(",")[0]
    return {"nvcc": version, "architectures": capabilities, "list": listed}


def is_up_to_date(library: Library, folder: Path, environ: Mapping[str, str]) -> bool:
    """Whether `folder` holds what `build` would put there; with SCAN_CUDA=0 a CUDA library may be there too."""
    switch, record = environ.get("SCAN_CUDA", ""), folder / "build.json"
    built = json.loads(record.read_text()) if record.is_file() else {}
    if built.get("sources_sha256") != library.sources_sha256() or not (folder / f"lib{library.name}_cpu.so").is_file():
        return False
    if not library.cuda or switch == "0" or (switch != "1" and find_nvcc(environ) is None):
        return True
    return "cuda" in built and environ.get("TORCH_CUDA_ARCH_LIST", "") in ("", built["cuda"].get("list"))


def build(library: Library, folder: Path, environ: Mapping[str, str]) -> None:
    """Compiles the libraries into `folder`, with build.json beside them. If this fails, an older build stays as it was.

    Raises BuildError if there is no CPU library, or with SCAN_CUDA=1 no CUDA library.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        new, cuda = Path(name), f"{library.name}_cuda"
        info = {"sources_sha256": library.sources_sha256(), "not_built": {}}
        info["cpu"] = build_cpu(library, new / f"lib{library.name}_cpu.so", environ)
        if library.cuda:
            try:
                info["cuda"] = build_cuda(library, new / f"lib{cuda}.so", environ)
            except BuildError as error:
                if environ.get("SCAN_CUDA") == "1":
                    raise
                info["not_built"][cuda] = str(error).splitlines()[0]
                library.say(f"no CUDA library: {error}")
        (new / "build.json").write_text(json.dumps(info, indent=2) + "\n")
        for path in [*new.iterdir()]:
            path.replace(folder / path.name)
        if library.cuda and "cuda" not in info:  # an older one would not match
            (folder / f"lib{cuda}.so").unlink(missing_ok=True)
    library.say(f"built in {folder}")


def main(library: Library) -> None:
    """The command line of a setup.py: builds in place by itself; what pip asks for is done by setuptools."""
    folder = library.folder / library.package
    try:
        if "--inplace" not in sys.argv:
            _install(library)
        elif "--force" not in sys.argv and is_up_to_date(library, folder, os.environ):
            library.say(f"the build in {folder} is up to date")
        else:
            build(library, folder, os.environ)
    except BuildError as error:
        sys.exit(f"{library.title}: {error}")


def _install(library: Library) -> None:
    from setuptools import Extension, setup
    from setuptools.command.build_ext import build_ext

    class BuildLibraries(build_ext):
        def run(self) -> None:
            build(library, Path(self.build_lib) / library.package, os.environ)

    os.chdir(library.folder)  # setuptools reads the pyproject.toml of the working directory
    extension = Extension(f"{library.package}.libraries", sources=[])  # makes setuptools run build_ext
    setup(packages=[library.package], ext_modules=[extension], cmdclass={"build_ext": BuildLibraries})
