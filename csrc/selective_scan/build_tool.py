"""Compiles C++ and CUDA sources into plain shared libraries, without torch and without Python's headers.

setup.py calls it, and scripts/doctor.py asks it which compilers there are. Environment variables: see setup.py.
Another library needs only another `Library`: its sources follow the naming convention given there.
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
from typing import Any

COMPILERS = ("g++", "c++", "clang++")
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]  # infinities and NaN still behave as they should
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
CUDA_FLAGS = ["-std=c++17", "-O3", "-shared", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden"]

# Compute capability: the first CUDA toolkit that supports it, and the first that no longer does.
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
    """A library cannot be built. The first line of the message gives the reason; compiler output may follow."""


@dataclass(frozen=True)
class Library:
    """A folder of sources with a C interface. With `name` scan, the folder holds

    - scan.h, which defines SCAN_ABI_VERSION,
    - scan_cpu.cpp, compiled once per instruction set with -DSCAN_VARIANT=<instruction set>, and scan_dispatch.cpp, which
      chooses among them: together libscan_cpu.so,
    - scan_cuda.cu, if `cuda`: libscan_cuda.so. The environment variable SCAN_CUDA switches it.
    """

    name: str
    title: str  # messages begin with it
    folder: Path
    package: str  # folder of the Python package that holds the libraries
    cuda: bool = True  # whether there is a CUDA library
    openmp: bool = True  # whether the CPU library has threads of its own

    def say(self, message: str) -> None:
        print(f"{self.title}: {message}", file=sys.stderr, flush=True)

    def abi_version(self) -> int:
        header = (self.folder / f"{self.name}.h").read_text()
        return int(re.search(rf"{self.name.upper()}_ABI_VERSION (\d+)", header)[1])

    def sources_sha256(self) -> str:
        """Hash of the names and contents of all sources."""
        digest = hashlib.sha256()
        for path in sorted(path for path in self.folder.iterdir() if path.suffix in (".h", ".cpp", ".cu", ".cuh")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        return digest.hexdigest()

    def cuda_switch(self, environ: Mapping[str, str]) -> str:
        """Value of SCAN_CUDA: "0", "1", or empty for the default."""
        return environ.get(f"{self.name.upper()}_CUDA", "")


HERE = Path(__file__).resolve().parent
SELECTIVE_SCAN = Library("scan", "selective scan", HERE, "clever_selective_scan")
VIEWS = Library("views", "view renderer", HERE.parent / "views", "clever_views", cuda=False, openmp=False)


def run(command: list[str], folder: Path | None = None) -> str:
    """Runs a command and returns its output, stderr included.

    Raises:
        BuildError: the command failed; its first line names the command, its output follows.
    """
    try:
        result = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise BuildError(f"{command[0]}: {error.strerror}") from error
    if result.returncode:
        raise BuildError(f"this command failed: {shlex.join(command)}\n{result.stdout}")
    return result.stdout


# ---- the CPU library ----


def find_compiler(environ: Mapping[str, str]) -> list[str]:
    """The C++ compiler, as the first words of a command.

    Raises:
        BuildError: no compiler was found.
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
    """The compiler's flags for OpenMP, found by compiling a small program; empty if it has no OpenMP."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "trial.cpp"
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        try:
            run([*compiler, "-fopenmp", str(source), "-o", str(source.with_suffix(""))])
        except BuildError:
            return []
    return ["-fopenmp"]


def instruction_sets(machine: str) -> dict[str, list[str]]:
    """Instruction sets that the CPU sources are compiled for, with their flags. The library selects one when it is loaded."""
    if machine.lower() in ("x86_64", "amd64"):
        return {"baseline": [], "avx2": AVX2, "avx512": AVX512}
    return {"baseline": []}


def build_cpu(library: Library, output: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    """Compiles the CPU library to `output`; returns what build.json records about it.

    Raises:
        BuildError: it cannot be built.
    """
    compiler = find_compiler(environ)
    openmp = openmp_flags(compiler) if library.openmp else []
    if library.openmp and not openmp:
        library.say(f"{compiler[0]} has no OpenMP: the library will use one thread")
    name, variants = library.name, instruction_sets(platform.machine())
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


# ---- the CUDA library ----


def find_nvcc(environ: Mapping[str, str]) -> str | None:
    """Path of nvcc: in CUDA_HOME or CUDA_PATH, on PATH, or in /usr/local/cuda; None if there is none."""
    homes = [environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    on_path = shutil.which("nvcc", path=environ.get("PATH"))
    candidates = [*(f"{home}/bin/nvcc" for home in homes), *([on_path] if on_path else []), "/usr/local/cuda/bin/nvcc"]
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def toolkit_version(nvcc_output: str) -> tuple[int, int]:
    """CUDA version, such as (12, 8), from the output of `nvcc --version`.

    Raises:
        BuildError: the output contains no version.
    """
    found = re.search(r"release (\d+)\.(\d+)", nvcc_output)
    if found is None:
        raise BuildError("nvcc --version prints no release")
    return int(found[1]), int(found[2])


def listed_architectures(arch_list: str | None) -> list[str]:
    """Compute capabilities in the value of TORCH_CUDA_ARCH_LIST; empty if it is empty or None.

    Raises:
        BuildError: an entry is not a compute capability.
    """
    entries = [entry for entry in re.split(r"[;,\s]+", arch_list or "") if entry]
    for entry in entries:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", entry):
            raise BuildError(f"TORCH_CUDA_ARCH_LIST={arch_list}: '{entry}' is not of the form 8.0 or 9.0+PTX")
    return entries


def architectures(toolkit: tuple[int, int], arch_list: str | None = None) -> list[str]:
    """Compute capabilities to compile for: those of TORCH_CUDA_ARCH_LIST, by default all that the toolkit supports, the
    last one with PTX.

    Raises:
        BuildError: an entry of the list is not a compute capability.
    """
    known = [name for name, (first, last) in ARCHITECTURES.items() if first <= toolkit and (last is None or toolkit < last)]
    return listed_architectures(arch_list) or [*known[:-1], known[-1] + "+PTX"]


def gencode_flags(capabilities: list[str]) -> list[str]:
    """nvcc's flags for compute capabilities such as 8.0 and 9.0+PTX."""
    flags = []
    for entry in capabilities:
        number = entry.removesuffix("+PTX").replace(".", "")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if entry.endswith("+PTX"):
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def torch_cuda() -> str | None:
    """CUDA version of the installed torch, found without importing it; None without torch (pip's build isolation hides it)."""
    for folder in sys.path:
        version = Path(folder) / "torch" / "version.py"
        if version.is_file() and (found := re.search(r"^cuda\b.*= *'([\d.]+)'", version.read_text(), re.MULTILINE)):
            return found[1]
    return None


def build_cuda(library: Library, output: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    """Compiles the CUDA library to `output`; returns what build.json records about it.

    Raises:
        BuildError: it cannot be built.
    """
    nvcc = find_nvcc(environ)
    if nvcc is None:
        raise BuildError("no nvcc (looked in CUDA_HOME, on PATH and in /usr/local/cuda)")
    toolkit = toolkit_version(run([nvcc, "--version"]))
    capabilities = architectures(toolkit, environ.get("TORCH_CUDA_ARCH_LIST"))
    version, torch = ".".join(map(str, toolkit)), torch_cuda()
    library.say(f"CUDA toolkit {version} ({nvcc}), torch's CUDA {torch or 'unknown'}, compiling for {' '.join(capabilities)}")
    if torch and toolkit[0] > int(torch.split(".")[0]):
        library.say(f"warning: the toolkit is newer than torch's CUDA {torch}; the driver may be too old for the library")
    threads = ["--threads", "0"] if toolkit >= (11, 2) else []
    host = ["-ccbin", shlex.split(environ["CXX"])[0]] if environ.get("CXX") else []
    source = f"{library.name}_cuda.cu"
    run([nvcc, *host, *CUDA_FLAGS, *threads, *gencode_flags(capabilities), source, "-o", str(output)], library.folder)
    return {"nvcc": version, "architectures": capabilities}


# ---- both ----


def read_build(folder: Path) -> dict[str, Any]:
    """Contents of build.json in a folder of built libraries; empty if there is none, or if it is damaged."""
    try:
        info = json.loads((folder / "build.json").read_text())
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def is_up_to_date(library: Library, folder: Path, environ: Mapping[str, str]) -> bool:
    """Whether `folder` holds the libraries that `build` would put there.

    They must come from the present sources. The CUDA library must be there if SCAN_CUDA=1, or by default if there is an
    nvcc, for the compute capabilities of TORCH_CUDA_ARCH_LIST if that is set; with SCAN_CUDA=0 it may be there.

    Raises:
        BuildError: TORCH_CUDA_ARCH_LIST contains something that is not a compute capability.
    """
    built, switch = read_build(folder), library.cuda_switch(environ)
    if built.get("sources_sha256") != library.sources_sha256() or not (folder / f"lib{library.name}_cpu.so").is_file():
        return False
    if not library.cuda or switch == "0" or (switch != "1" and find_nvcc(environ) is None):
        return True
    if "cuda" not in built or not (folder / f"lib{library.name}_cuda.so").is_file():
        return False
    return listed_architectures(environ.get("TORCH_CUDA_ARCH_LIST")) in ([], built["cuda"]["architectures"])


def add_cuda(library: Library, folder: Path, environ: Mapping[str, str], info: dict[str, Any]) -> None:
    """Compiles the CUDA library into `folder`, or records in `info` why not.

    Raises:
        BuildError: there is none, with SCAN_CUDA=1.
    """
    cuda, switch = f"{library.name}_cuda", library.cuda_switch(environ)
    try:
        if switch == "0":
            raise BuildError(f"left out ({library.name.upper()}_CUDA=0)")
        info["cuda"] = build_cuda(library, folder / f"lib{cuda}.so", environ)
    except BuildError as error:
        if switch == "1":
            raise BuildError(f"{library.name.upper()}_CUDA=1, but there is no CUDA library: {error}") from error
        info["not_built"][cuda] = str(error).splitlines()[0]
        if "\n" in str(error):  # the compiler's output
            library.say(str(error))


def build(library: Library, folder: Path, environ: Mapping[str, str]) -> None:
    """Compiles the libraries into `folder`, with build.json beside them. If this fails, an older build stays as it was.

    Raises:
        BuildError: there is no CPU library, or with SCAN_CUDA=1 no CUDA library.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        new = Path(name)
        info = {"abi": library.abi_version(), "sources_sha256": library.sources_sha256(), "not_built": {}}
        info["cpu"] = build_cpu(library, new / f"lib{library.name}_cpu.so", environ)
        if library.cuda:
            add_cuda(library, new, environ, info)
        (new / "build.json").write_text(json.dumps(info, indent=2) + "\n")
        built = sorted(path.name for path in new.glob("lib*.so"))
        for path in new.iterdir():
            path.replace(folder / path.name)
        for old in folder.glob("lib*.so"):
            if old.name not in built:
                old.unlink()
    without = "".join(f"; no CUDA library: {reason}" for reason in info["not_built"].values())
    library.say(f"built {' and '.join(built)} in {folder}{without}")
