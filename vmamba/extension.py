"""Finds and loads the compiled libraries of csrc/selective_scan, or says why they cannot be used.

They are plain shared libraries with a C interface (scan.h), so one build serves every version of Python and torch. A build in
place (`python csrc/selective_scan/setup.py build_ext --inplace`, scripts/setup.sh) is preferred to the installed package
(`pip install ./csrc/selective_scan`), which may come from older sources.
"""

import ctypes
import importlib.util
import json
from functools import cache
from pathlib import Path

import torch

ABI_VERSION = 1  # SCAN_ABI_VERSION of scan.h
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # ScanType of scan.h
PACKAGE = "clever_selective_scan"
IN_PLACE = Path(__file__).resolve().parent.parent / "csrc" / "selective_scan" / PACKAGE
REBUILD_IN_PLACE = "python csrc/selective_scan/setup.py build_ext --inplace"
INSTALL = "pip install ./csrc/selective_scan"
REBUILD = "pip install --force-reinstall ./csrc/selective_scan"


def structure(name: str, sizes: str, pointers: str) -> type[ctypes.Structure]:
    """ctypes form of a struct of scan.h or scan_cuda.h: 64-bit sizes, then pointers, in the order of the header."""
    fields = [(size, ctypes.c_int64) for size in sizes.split()] + [(pointer, ctypes.c_void_p) for pointer in pointers.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


class Unavailable(RuntimeError):
    """A compiled library cannot be used. The message gives the reason and a remedy, in one line."""


def build_folders() -> list[Path]:
    """Folders that hold a build, in order of preference."""
    spec = importlib.util.find_spec(PACKAGE)  # does not import the package
    installed = [Path(location) for location in spec.submodule_search_locations or []] if spec else []
    return [folder for folder in dict.fromkeys([IN_PLACE, *installed]) if (folder / "build.json").is_file()]


def build_info(folder: Path) -> dict:
    """Contents of build.json: compiler, instruction sets, CUDA architectures, and why a library was not built."""
    return json.loads((folder / "build.json").read_text())


def open_library(folder: Path, name: str) -> ctypes.CDLL:
    """Loads lib<name>.so from a folder.

    Raises:
        Unavailable: it was not built, does not load, or has another interface version.
    """
    path = folder / f"lib{name}.so"
    if not path.is_file():
        reason = build_info(folder).get("not_built", {}).get(name, f"{path} is missing")
        raise Unavailable(f"the build in {folder} has no {name} library: {reason}")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"{path} does not load: {' '.join(str(error).split())}") from error
    try:
        version = library.scan_abi_version()
    except AttributeError as error:
        raise Unavailable(f"{path} is not a selective-scan library (it has no scan_abi_version); {REBUILD}") from error
    if version != ABI_VERSION:
        raise Unavailable(f"{path} has interface version {version}, this code needs {ABI_VERSION}; {REBUILD}")
    return library


@cache
def _find(name: str) -> tuple[ctypes.CDLL | None, str | None]:
    """The library and None, or None and the reasons why it cannot be used."""
    reasons = []
    for folder in build_folders():
        try:
            return open_library(folder, name), None
        except Unavailable as error:
            reasons.append(str(error))
    return None, "; ".join(reasons) or f"the compiled selective scan is not installed: {INSTALL}"


def unavailable_reason(name: str) -> str | None:
    """None if the library `scan_cpu` or `scan_cuda` can be used, otherwise the reason in one line."""
    return _find(name)[1]


def load(name: str) -> ctypes.CDLL:
    """The library `scan_cpu` or `scan_cuda`. Loaded once.

    Raises:
        Unavailable: it cannot be used.
    """
    library, reason = _find(name)
    if library is None:
        raise Unavailable(reason)
    return library
