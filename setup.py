"""`pip install .` installs the scripts as the package clever_ssl: see packaging/package.py, and pyproject.toml for the rest."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "packaging"))

from package import PACKAGE, write_package  # noqa: E402


class BuildPackage(build_py):
    def run(self) -> None:
        if self.editable_mode:
            raise SystemExit("pip install -e: run the scripts from this folder instead, they need no installation")
        write_package(ROOT, Path(self.build_lib) / PACKAGE)


setup(cmdclass={"build_py": BuildPackage}, packages=[PACKAGE], package_dir={PACKAGE: "packaging"})
