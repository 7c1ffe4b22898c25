"""What the setup.py of a folder of csrc/ does: setuptools commands that call build_tool.py."""

import os
import sys
from pathlib import Path

from build_tool import BuildError, Library, build, is_up_to_date

try:
    from setuptools import Extension, setup
    from setuptools.command.build_ext import build_ext
except ImportError as error:
    sys.exit(f"{error}: pip install 'setuptools>=70.1'")

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # older than 70.1: enough for a build in place, and pip brings its own
    bdist_wheel = None


def setup_library(library: Library) -> None:
    """Runs the setuptools command on the command line for one library."""

    class BuildLibraries(build_ext):
        """Builds the libraries instead of Python extension modules."""

        def run(self) -> None:
            folder = (library.folder if self.inplace else Path(self.build_lib)) / library.package
            try:
                if self.inplace and not self.force and is_up_to_date(library, folder, os.environ):
                    library.say(f"the build in {folder} is up to date")
                else:
                    build(library, folder, os.environ)
            except BuildError as error:
                sys.exit(f"{library.title}: {error}")

    commands: dict[str, type] = {"build_ext": BuildLibraries}
    if bdist_wheel is not None:

        class AnyPythonWheel(bdist_wheel):
            """A wheel for this platform and every version of Python."""

            def get_tag(self) -> tuple[str, str, str]:
                return "py3", "none", super().get_tag()[2]

        commands["bdist_wheel"] = AnyPythonWheel

    os.chdir(library.folder)  # setuptools reads the pyproject.toml of the working directory
    setup(
        packages=[library.package],
        ext_modules=[Extension(f"{library.package}.libraries", sources=[])],  # makes setuptools run build_ext
        cmdclass=commands,
        verbose=False,  # only our own lines
    )
