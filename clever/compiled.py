"""Finds and loads the compiled libraries of csrc/, or says why they cannot be used.

They are plain shared libraries with a C interface, so one build serves every version of Python and torch. A build in place
(`python csrc/<folder>/setup.py build_ext --inplace`, scripts/setup.sh) is preferred to an installed package
(`pip install ./csrc/<folder>`), which may come from older sources.
"""

import ctypes
import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Unavailable(RuntimeError):
    """A compiled library cannot be used. The message gives the reason and a remedy, in one line."""


def build_info(folder: Path) -> dict:
    """Contents of build.json: compiler, instruction sets, CUDA architectures, and why a library was not built."""
    return json.loads((folder / "build.json").read_text())


class CompiledPackage:
    """The libraries that are built from one folder of csrc/.

    Args:
        title: what the libraries are, for messages.
        prefix: of the names of functions; `<prefix>_abi_version()` returns the version of the interface.
        sources: folder of the sources, relative to the root of the repository.
        package: name of the Python package that holds the libraries.
        abi_version: version of the interface that the calling code needs.
    """

    def __init__(self, title: str, prefix: str, sources: str, package: str, abi_version: int) -> None:
        self.title, self.prefix, self.package, self.abi_version = title, prefix, package, abi_version
        self.in_place = ROOT / sources / package
        self.build_command = f"python {sources}/setup.py build_ext --inplace"
        if not (ROOT / sources).is_dir():  # this is the installed package, which has no sources
            self.build_command = f"in a clone of the repository, pip install ./{sources}"
        self.found: dict[str, ctypes.CDLL | str] = {}  # the libraries, or why they cannot be used

    def build_folders(self) -> list[Path]:
        """Folders that hold a build, in order of preference."""
        spec = importlib.util.find_spec(self.package)  # does not import the package
        installed = [Path(location) for location in spec.submodule_search_locations or []] if spec else []
        return [folder for folder in dict.fromkeys([self.in_place, *installed]) if (folder / "build.json").is_file()]

    def _open(self, folder: Path, name: str) -> ctypes.CDLL | str:
        """lib<name>.so of a folder, or the reason why it cannot be used."""
        path = folder / f"lib{name}.so"
        if reason := build_info(folder)["not_built"].get(name):
            return f"the build in {folder} has no {name} library: {reason}"
        try:
            library = ctypes.CDLL(str(path))
            version = getattr(library, f"{self.prefix}_abi_version")()
        except (OSError, AttributeError) as error:  # missing, damaged, for another machine, or another library
            return f"{path} does not load ({' '.join(str(error).split())}); {self.build_command} --force"
        if version != self.abi_version:
            return f"{path} has version {version}, but this code needs {self.abi_version}; {self.build_command} --force"
        return library

    def _find(self, name: str) -> ctypes.CDLL | str:
        """The library of the first folder that has a usable one, or the reasons why none can be used. Searched once."""
        if name not in self.found:
            opened = [self._open(folder, name) for folder in self.build_folders()]
            reasons = "; ".join(found for found in opened if isinstance(found, str))
            missing = reasons or f"the compiled {self.title} is not built: {self.build_command}"
            self.found[name] = next((found for found in opened if not isinstance(found, str)), missing)
        return self.found[name]

    def unavailable_reason(self, name: str) -> str | None:
        """None if the library, such as `scan_cpu`, can be used, otherwise the reason in one line."""
        found = self._find(name)
        return found if isinstance(found, str) else None

    def load(self, name: str) -> ctypes.CDLL:
        """The library, such as `scan_cpu`; raises Unavailable if it cannot be used."""
        if reason := self.unavailable_reason(name):
            raise Unavailable(reason)
        return self._find(name)
