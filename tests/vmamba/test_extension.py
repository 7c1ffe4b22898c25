"""csrc/build_tool.py builds the compiled libraries, clever/compiled.py finds and loads them. Here: those of the scan."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import ROOT

from csrc import build_tool
from csrc.build_tool import SELECTIVE_SCAN, BuildError
from vmamba import extension

SOURCES = SELECTIVE_SCAN.folder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with a build of the present sources."""
    folder, environ = SOURCES / SELECTIVE_SCAN.package, {**os.environ, "SCAN_CUDA": "0"}
    if build_tool.is_up_to_date(SELECTIVE_SCAN, folder, environ):
        return folder
    try:
        build_tool.find_compiler(os.environ)
    except BuildError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("built")
    build_tool.build(SELECTIVE_SCAN, folder, environ)
    return folder


@pytest.fixture
def use(monkeypatch):
    """use(folder, ...): the loader searches only there."""

    def search(*folders: Path) -> None:
        monkeypatch.setattr(extension.SCAN, "build_folders", lambda: list(folders))
        monkeypatch.setattr(extension.SCAN, "found", {})

    return search


# ---- building


def setup(folder: Path, *flags: str, **environ: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(folder / "setup.py"), "build_ext", "--inplace", *flags]
    return subprocess.run(command, env=os.environ | environ, cwd="/", capture_output=True, text=True)


@pytest.fixture
def sources(tmp_path):
    """A copy of the sources."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("*.so", "build.json", "build"))
    return tmp_path / "csrc" / "selective_scan"


@pytest.fixture
def compilers(tmp_path):
    """Environment with compilers that only write their arguments to the output file; nvcc fails if $FAILS is set."""
    (tmp_path / "bin").mkdir()
    compiler, nvcc = tmp_path / "c++", tmp_path / "bin" / "nvcc"
    answers = 'case "$1" in --version) echo release 13.0, V13.0.88; exit;; --list-gpu-code) echo sm_75 sm_87 sm_90; exit;; esac'
    write = 'for last; do :; done\necho "$@" > "$last"\n'
    compiler.write_text(f"#!/bin/sh\n{answers}\n{write}")
    nvcc.write_text(f'#!/bin/sh\n{answers}\n[ -z "$FAILS" ] || {{ echo catastrophe; exit 2; }}\n{write}')
    compiler.chmod(0o755)
    nvcc.chmod(0o755)
    return {"CXX": str(compiler), "CUDA_HOME": str(tmp_path), "SCAN_CUDA": "", "TORCH_CUDA_ARCH_LIST": ""}


def test_without_a_compiler_there_is_one_clear_line(sources, tmp_path):
    result = setup(sources, PATH=str(tmp_path), CXX="")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1
    assert line.startswith("selective scan: no C++ compiler (g++, c++, clang++) on PATH; install g++")


def test_it_builds_in_place_when_sources_changed_or_it_is_forced(sources, compilers):
    environ, folder = compilers | {"SCAN_CUDA": "0"}, sources / SELECTIVE_SCAN.package
    assert f"built in {folder}" in setup(sources, **environ).stderr and (folder / "libscan_cpu.so").is_file()
    assert setup(sources, **environ).stderr == f"selective scan: the build in {folder} is up to date\n"
    assert "built in" in setup(sources, "--force", **environ).stderr
    (sources / "scan.h").write_text((sources / "scan.h").read_text() + "// changed\n")
    assert "built in" in setup(sources, **environ).stderr


@pytest.mark.parametrize(
    "listed, codes",
    [
        ("", ["sm_75", "sm_90", "compute_90"]),
        ("8.0;9.0+PTX", ["sm_80", "sm_90", "compute_90"]),
    ],
)
def test_the_cuda_library_is_compiled_for_the_listed_gpus(sources, compilers, listed, codes):
    compilers["TORCH_CUDA_ARCH_LIST"] = listed
    assert setup(sources, **compilers).returncode == 0
    command = (sources / SELECTIVE_SCAN.package / "libscan_cuda.so").read_text()
    assert re.findall(r"-gencode arch=\w+,code=(\w+)", command) == codes
    assert "is up to date" in setup(sources, **compilers).stderr
    assert "built in" in setup(sources, **compilers | {"TORCH_CUDA_ARCH_LIST": "8.6"}).stderr


def test_a_failing_nvcc_leaves_the_cpu_library_unless_cuda_is_asked_for(sources, compilers):
    compilers["FAILS"] = "1"
    result, folder = setup(sources, **compilers), sources / SELECTIVE_SCAN.package
    assert result.returncode == 0 and "catastrophe" in result.stderr and (folder / "libscan_cpu.so").is_file()
    assert json.loads((folder / "build.json").read_text())["not_built"]["scan_cuda"].startswith("this command failed:")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = setup(sources, **compilers | {"SCAN_CUDA": "1"})
    assert result.returncode == 1 and "catastrophe" in result.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# ---- finding and loading


def test_a_build_is_loaded(use, built):
    use(built)
    assert extension.unavailable_reason("scan_cpu") is None
    assert extension.load("scan_cpu").scan_abi_version() == extension.SCAN.abi_version


def test_a_damaged_library_is_passed_over_for_the_next(use, built, tmp_path):
    shutil.copy(built / "build.json", tmp_path)
    (tmp_path / "libscan_cpu.so").write_text("not a library")
    use(tmp_path)
    reason = extension.unavailable_reason("scan_cpu")
    assert "libscan_cpu.so does not load (" in reason and "\n" not in reason
    use(tmp_path, built)
    assert extension.unavailable_reason("scan_cpu") is None


PROGRAM = """
import sys
from pathlib import Path
import torch
from support.scans import assert_close, draw_images, exactly, run_images
from vmamba import extension, scan_cpp
from vmamba.scan_reference import selective_scan_2d_reference
extension.SCAN.build_folders = lambda: [Path(sys.argv[1])]
tensors = draw_images(2, 5, 7, 19, 3, 2)
assert_close(run_images(scan_cpp, tensors), exactly(selective_scan_2d_reference, tensors), y=1e-5, gradients=1e-5)
print(scan_cpp.instruction_set())
"""


def test_the_numbers_are_the_same_without_wide_instructions(built):
    """The variant for old processors, which no other test reaches."""
    environ = {**os.environ, "SCAN_ISA": "baseline", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", PROGRAM, str(built)]
    used = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout.strip()
    assert used == "baseline"
