"""Builds the compiled selective scans: libscan_cpu.so and, where nvcc is found, libscan_cuda.so.

pip install ./csrc/selective_scan                          into the active environment
python csrc/selective_scan/setup.py build_ext --inplace    into this folder, for work on the sources

The libraries have a plain C interface (scan.h) and need neither torch nor Python's headers: one build serves every
version of both. A GPU is not needed either. Environment:

CXX                    C++17 compiler; default: the first of g++, c++, clang++ on PATH
SCAN_CUDA              0: leave the CUDA library out; 1: fail when it cannot be built; default: build it if possible
CUDA_HOME              where bin/nvcc is; default: nvcc on PATH, then /usr/local/cuda
TORCH_CUDA_ARCH_LIST   "8.0;9.0+PTX" or "8.0 9.0"; default: all that the toolkit knows, with PTX of the last
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
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # older than 70.1: enough for a build in place, and pip brings its own
    bdist_wheel = None

HERE = Path(__file__).resolve().parent
PACKAGE = "clever_selective_scan"
COMPILERS = ("g++", "c++", "clang++")
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]  # nothing that infinities and NaN would not survive
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
CUDA_FLAGS = ["-std=c++17", "-O3", "-shared", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden"]

# Compute capability: the first toolkit that compiles for it, and the first that no longer does.
ARCHITECTURES = {
    "7.0": ((9, 0), (13, 0)),
    "7.5": ((10, 0), None),
    "8.0": ((11, 0), None),
    "8.6": ((11, 1), None),
    "8.9": ((11, 8), None),
    "9.0": ((11, 8), None),
    "10.0": ((12, 8), None),
    "12.0": ((12, 8), None),
}


class BuildError(Exception):
    """Why a library cannot be built."""


def say(message: str) -> None:
    print(f"selective scan: {message}", file=sys.stderr, flush=True)


def run(command: list[str]) -> str:
    """Its output, errors included.

    Raises:
        BuildError: it failed; the first line says which command, then comes its output.
    """
    try:
        result = subprocess.run(
            command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise BuildError(f"{command[0]}: {error.strerror}") from error
    if result.returncode:
        raise BuildError(f"this command failed: {shlex.join(command)}\n{result.stdout}")
    return result.stdout


def abi_version() -> int:
    return int(re.search(r"SCAN_ABI_VERSION (\d+)", (HERE / "scan.h").read_text())[1])


def sources_sha256() -> str:
    """Of every source's name and content."""
    digest = hashlib.sha256()
    for path in sorted(path for path in HERE.iterdir() if path.suffix in (".h", ".cpp", ".cu", ".cuh")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


# ---- the CPU library ----


def find_compiler(environ: Mapping[str, str]) -> list[str]:
    """The C++ compiler as the start of a command.

    Raises:
        BuildError: there is none.
    """
    if environ.get("CXX"):
        command = shlex.split(environ["CXX"])
        if shutil.which(command[0], path=environ.get("PATH")) is None:
            raise BuildError(f"the compiler CXX={environ['CXX']} was not found; unset CXX or name one that exists")
        return command
    for name in COMPILERS:
        if path := shutil.which(name, path=environ.get("PATH")):
            return [path]
    raise BuildError(f"no C++ compiler ({', '.join(COMPILERS)}) on PATH; install g++ (apt install g++, dnf install gcc-c++)")


def openmp_flags(compiler: list[str]) -> list[str]:
    """What makes the compiler use OpenMP, found by a trial; nothing where it cannot."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "trial.cpp"
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        try:
            run([*compiler, "-fopenmp", str(source), "-o", str(source.with_suffix(""))])
        except BuildError:
            return []
    return ["-fopenmp"]


def instruction_sets(machine: str) -> dict[str, list[str]]:
    """The variants of scan_cpu.cpp and their flags; the library chooses among them when it is loaded."""
    if machine.lower() in ("x86_64", "amd64"):
        return {"baseline": [], "avx2": AVX2, "avx512": AVX512}
    return {"baseline": []}


def build_cpu(library: Path, environ: Mapping[str, str]) -> dict:
    """Compiles the CPU library and tells how.

    Raises:
        BuildError: it cannot be built.
    """
    compiler = find_compiler(environ)
    openmp = openmp_flags(compiler)
    if not openmp:
        say(f"{compiler[0]} has no OpenMP: the CPU scan will use one thread")
    variants = instruction_sets(platform.machine())
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = {f"{folder}/{name}.o": ["scan_cpu.cpp", f"-DSCAN_VARIANT={name}", *flags] for name, flags in variants.items()}
        objects[f"{folder}/dispatch.o"] = ["scan_dispatch.cpp"]
        commands = [[*compiler, *FLAGS, *openmp, "-c", *what, "-o", output] for output, what in objects.items()]
        list(pool.map(run, commands))  # reraises what a thread raised
        only_needed = ["-Wl,--as-needed"] if sys.platform == "linux" else []  # then it does not depend on libstdc++
        run([*compiler, "-shared", *openmp, *only_needed, *objects, "-o", str(library)])
    version = run([*compiler, "--version"]).splitlines()[0]
    return {"compiler": version, "openmp": bool(openmp), "instruction_sets": list(variants)}


# ---- the CUDA library ----


def find_nvcc(environ: Mapping[str, str]) -> str | None:
    homes = [environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    on_path = shutil.which("nvcc", path=environ.get("PATH"))
    candidates = [*(f"{home}/bin/nvcc" for home in homes), *([on_path] if on_path else []), "/usr/local/cuda/bin/nvcc"]
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def toolkit_version(nvcc_output: str) -> tuple[int, int]:
    """(12, 8) from what `nvcc --version` prints.

    Raises:
        BuildError: there is no version in it.
    """
    found = re.search(r"release (\d+)\.(\d+)", nvcc_output)
    if found is None:
        raise BuildError("nvcc --version prints no release")
    return int(found[1]), int(found[2])


def architectures(toolkit: tuple[int, int], wanted: str | None = None) -> list[str]:
    """Compute capabilities to compile for, as TORCH_CUDA_ARCH_LIST writes them; `wanted` is its value.

    Raises:
        BuildError: an entry is not a compute capability.
    """
    listed = re.split(r"[;,\s]+", wanted.strip("; ,")) if wanted and wanted.strip("; ,") else []
    for entry in listed:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", entry):
            raise BuildError(f"TORCH_CUDA_ARCH_LIST={wanted}: '{entry}' is not of the form 8.0 or 9.0+PTX")
    known = [name for name, (first, last) in ARCHITECTURES.items() if first <= toolkit and (last is None or toolkit < last)]
    return listed or [*known[:-1], known[-1] + "+PTX"]


def gencode_flags(listed: list[str]) -> list[str]:
    flags = []
    for entry in listed:
        number = entry.removesuffix("+PTX").replace(".", "")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if entry.endswith("+PTX"):
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def torch_cuda() -> str | None:
    """CUDA version of the torch in reach, without importing it; None where there is none (pip's build isolation hides it)."""
    for folder in sys.path:
        version = Path(folder) / "torch" / "version.py"
        if version.is_file() and (found := re.search(r"^cuda\b.*= *'([\d.]+)'", version.read_text(), re.MULTILINE)):
            return found[1]
    return None


def build_cuda(library: Path, environ: Mapping[str, str]) -> dict:
    """Compiles the CUDA library and tells how.

    Raises:
        BuildError: it cannot be built.
    """
    nvcc = find_nvcc(environ)
    if nvcc is None:
        raise BuildError("no nvcc (looked in CUDA_HOME, on PATH and in /usr/local/cuda)")
    toolkit = toolkit_version(run([nvcc, "--version"]))
    listed = architectures(toolkit, environ.get("TORCH_CUDA_ARCH_LIST"))
    version = ".".join(map(str, toolkit))
    torch = torch_cuda()
    say(f"CUDA toolkit {version} ({nvcc}), torch's CUDA {torch or 'not known'}, compiling for {' '.join(listed)}")
    if torch and toolkit[0] > int(torch.split(".")[0]):
        say(f"warning: the toolkit is newer than torch's CUDA {torch}; the driver may be too old for what it compiles")
    threads = ["--threads", "0"] if toolkit >= (11, 2) else []
    host = ["-ccbin", shlex.split(environ["CXX"])[0]] if environ.get("CXX") else []
    run([nvcc, *host, *CUDA_FLAGS, *threads, *gencode_flags(listed), "scan_cuda.cu", "-o", str(library)])
    return {"nvcc": version, "architectures": listed}


# ---- both ----


def build(folder: Path, environ: Mapping[str, str]) -> None:
    """Builds the libraries into `folder`, and build.json that tells how. An older build stays there if this one fails.

    Raises:
        BuildError: no CPU library, or no CUDA library with SCAN_CUDA=1.
    """
    folder = folder.resolve()  # commands run in the folder of the sources
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        new = Path(name)
        facts = {"abi": abi_version(), "sources_sha256": sources_sha256(), "not_built": {}}
        facts["cpu"] = build_cpu(new / "libscan_cpu.so", environ)
        switch = environ.get("SCAN_CUDA", "")
        try:
            if switch == "0":
                raise BuildError("left out (SCAN_CUDA=0)")
            facts["cuda"] = build_cuda(new / "libscan_cuda.so", environ)
        except BuildError as error:
            if switch == "1":
                raise BuildError(f"SCAN_CUDA=1, but there is no CUDA library: {error}") from error
            say(f"no CUDA library: {error}")
            facts["not_built"]["scan_cuda"] = str(error).splitlines()[0]
        (new / "build.json").write_text(json.dumps(facts, indent=2) + "\n")
        built = sorted(path.name for path in new.glob("lib*.so"))
        for old in folder.glob("lib*.so"):
            old.unlink()
        for path in new.iterdir():
            path.replace(folder / path.name)
    say(f"built {', '.join(built)} in {folder}")


class BuildLibraries(build_ext):
    """The libraries instead of Python extension modules."""

    def run(self) -> None:
        try:
            build(HERE / PACKAGE if self.inplace else Path(self.build_lib) / PACKAGE, os.environ)
        except BuildError as error:
            sys.exit(f"selective scan: {error}")


COMMANDS: dict[str, type] = {"build_ext": BuildLibraries}

if bdist_wheel is not None:

    class AnyPythonWheel(bdist_wheel):
        """A wheel for this platform, but for every version of Python."""

        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    COMMANDS["bdist_wheel"] = AnyPythonWheel


if __name__ == "__main__":
    setup(
        packages=[PACKAGE],
        ext_modules=[Extension(f"{PACKAGE}.libraries", sources=[])],  # makes setuptools run build_ext
        cmdclass=COMMANDS,
    )
