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
    """Contents of build.json: compiler, instruction sets, CUDA architectures, and why a library was not built.

    Empty if the file is damaged.
    """
    try:
        info = json.loads((folder / "build.json").read_text())
    except ValueError:
        return {}
    return info if isinstance(info, dict) else {}


class CompiledPackage:
    """The libraries that are built from one folder of csrc/.

    Args:
        title: what the libraries are, for messages.
        prefix: of the names of libraries and functions; `<prefix>_abi_version()` returns the version of the interface.
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
        self.reinstall_command = f"pip install --force-reinstall ./{sources}"  # for an installed package
        self.found: dict[str, tuple[ctypes.CDLL | None, str | None]] = {}

    def build_folders(self) -> list[Path]:
        """Folders that hold a build, in order of preference."""
        spec = importlib.util.find_spec(self.package)  # does not import the package
        installed = [Path(location) for location in spec.submodule_search_locations or []] if spec else []
        return [folder for folder in dict.fromkeys([self.in_place, *installed]) if (folder / "build.json").is_file()]

    def open_library(self, folder: Path, name: str) -> ctypes.CDLL:
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
        function = f"{self.prefix}_abi_version"
        if not hasattr(library, function):
            kind = self.title.replace(" ", "-")
            raise Unavailable(f"{path} is not a {kind} library (it has no {function}); {self.build_command} --force")
        version = getattr(library, function)()
        if version != self.abi_version:
            versions = f"has interface version {version}, this code needs {self.abi_version}"
            raise Unavailable(f"{path} {versions}; {self.build_command} --force")
        return library

    def find(self, name: str) -> tuple[ctypes.CDLL | None, str | None]:
        """The library and None, or None and the reasons why it cannot be used. Searched once."""
        if name not in self.found:
            self.found[name] = self._search(name)
        return self.found[name]

    def _search(self, name: str) -> tuple[ctypes.CDLL | None, str | None]:
        reasons = []
        for folder in self.build_folders():
            try:
                return self.open_library(folder, name), None
            except Unavailable as error:
                reasons.append(str(error))
        return None, "; ".join(reasons) or f"the compiled {self.title} is not built: {self.build_command}"

    def unavailable_reason(self, name: str) -> str | None:
        """None if the library, such as `scan_cpu`, can be used, otherwise the reason in one line."""
        return self.find(name)[1]

    def load(self, name: str) -> ctypes.CDLL:
        """The library, such as `scan_cpu`. Loaded once.

        Raises:
            Unavailable: it cannot be used.
        """
        library, reason = self.find(name)
        if library is None:
            raise Unavailable(reason)
        return library
