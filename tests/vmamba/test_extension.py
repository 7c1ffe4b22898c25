"""csrc/selective_scan/build_tool.py and setup.py build the compiled scans, compiled.py finds and loads them."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import ROOT

from csrc.selective_scan import build_tool
from csrc.selective_scan.build_tool import SELECTIVE_SCAN, BuildError
from vmamba import extension, scan_cpp

SOURCES = SELECTIVE_SCAN.folder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A build of the CPU library."""
    try:
        build_tool.find_compiler(os.environ)
    except BuildError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("built")
    build_tool.build(SELECTIVE_SCAN, folder, {**os.environ, "SCAN_CUDA": "0"})
    return folder


@pytest.fixture
def use(monkeypatch):
    """use(folder, ...): the loader searches only there."""

    def search(*folders: Path) -> None:
        monkeypatch.setattr(extension.SCAN, "build_folders", lambda: list(folders))
        monkeypatch.setattr(extension.SCAN, "found", {})

    return search


# ---- the interface ----


def header_fields(struct: str) -> list[str]:
    body = re.search(rf"struct {struct} {{(.*?)}};", (SOURCES / "scan.h").read_text(), re.DOTALL)[1]
    declarations = re.sub(r"//.*", "", body).replace("\n", " ").split(";")
    names = [re.sub(r"^\s*(const\s+)?\w+\s+", "", each) if "*" not in each else each for each in declarations if each.strip()]
    return [re.search(r"(\w+)\s*$", name)[1] for each in names for name in each.split(",")]


@pytest.mark.parametrize("structure", [scan_cpp.ScanArgs, scan_cpp.Scan2dArgs])
def test_structures_are_those_of_the_header(structure):
    assert [name for name, _ in structure._fields_] == header_fields(structure.__name__)


def test_constants_are_those_of_the_header():
    header = (SOURCES / "scan.h").read_text()
    types = {name.lower(): int(number) for name, number in re.findall(r"SCAN_(\w+FLOAT16|FLOAT16|FLOAT32) = (\d)", header)}
    assert types == {str(kind).removeprefix("torch."): number for kind, number in extension.TYPES.items()}
    assert int(re.search(r"SCAN_TILE = (\d+)", header)[1]) == scan_cpp.TILE
    assert SELECTIVE_SCAN.abi_version() == extension.ABI_VERSION


# ---- architectures ----


@pytest.mark.parametrize(
    ("toolkit", "expected"),
    [
        ((11, 1), "7.0 7.5 8.0 8.6+PTX"),
        ((11, 8), "7.0 7.5 8.0 8.6 8.9 9.0+PTX"),
        ((12, 6), "7.0 7.5 8.0 8.6 8.9 9.0+PTX"),
        ((12, 8), "7.0 7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX"),
        ((13, 0), "7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX"),
    ],
)
def test_architectures_of_a_toolkit(toolkit, expected):
    assert build_tool.architectures(toolkit) == expected.split()


@pytest.mark.parametrize("wanted", ["8.0;9.0+PTX", "8.0 9.0+PTX", " 8.0, 9.0+PTX;"])
def test_architectures_as_torch_lists_them(wanted):
    assert build_tool.architectures((12, 8), wanted) == ["8.0", "9.0+PTX"]


@pytest.mark.parametrize("wanted", ["", " ", ";"])
def test_an_empty_list_of_architectures_means_the_default(wanted):
    assert build_tool.architectures((12, 8), wanted) == build_tool.architectures((12, 8))


def test_an_invalid_architecture_is_named():
    with pytest.raises(BuildError, match="'sm_80' is not of the form 8.0 or 9.0\\+PTX"):
        build_tool.architectures((12, 8), "8.0;sm_80")


def test_gencode_flags():
    flags = build_tool.gencode_flags(["8.6", "9.0a", "12.0+PTX"])
    assert flags[1::2] == [
        "arch=compute_86,code=sm_86",
        "arch=compute_90a,code=sm_90a",
        "arch=compute_120,code=sm_120",
        "arch=compute_120,code=compute_120",
    ]
    assert set(flags[::2]) == {"-gencode"}


def test_toolkit_version():
    assert build_tool.toolkit_version("Cuda compilation tools, release 12.8, V12.8.93\n") == (12, 8)
    with pytest.raises(BuildError, match="no release"):
        build_tool.toolkit_version("gcc 12.2")


@pytest.mark.parametrize(("machine", "names"), [("x86_64", ["baseline", "avx2", "avx512"]), ("aarch64", ["baseline"])])
def test_instruction_sets(machine, names):
    assert list(build_tool.instruction_sets(machine)) == names


# ---- building ----


def test_without_a_compiler_there_is_one_clear_line(tmp_path):
    environ = {**os.environ, "PATH": str(tmp_path), "CXX": ""}
    command = [sys.executable, str(SOURCES / "setup.py"), "-q", "build_ext", "--build-lib", str(tmp_path / "lib")]
    result = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert "selective scan: no C++ compiler (g++, c++, clang++) on PATH; install g++" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_compiler_that_does_not_exist_is_named():
    with pytest.raises(BuildError, match="CXX=no-such-compiler was not found"):
        build_tool.find_compiler({"CXX": "no-such-compiler", "PATH": os.environ["PATH"]})


def executable(path: Path, script: str) -> Path:
    """A shell script that can be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def fake_nvcc(home: Path, exit_code: int = 0) -> Path:
    """CUDA_HOME with an nvcc of release 13.0 that writes its arguments to the output file, or fails."""
    executable(
        home / "bin" / "nvcc",
        'if [ "$1" = --version ]; then echo "release 13.0, V13.0.88"; exit 0; fi\n'
        f'[ {exit_code} = 0 ] || {{ echo "scan_cuda.cu: catastrophe"; exit {exit_code}; }}\n'
        'for last; do :; done\necho "$@" > "$last"\n',
    )
    return home


@pytest.fixture
def no_cpu(monkeypatch):
    """Only the CUDA library is compiled; that of the CPU is an empty file."""

    def build_cpu(library, output, environ):
        output.touch()
        return {}

    monkeypatch.setattr(build_tool, "build_cpu", build_cpu)


def test_cuda_build(no_cpu, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(build_tool, "torch_cuda", lambda: "12.4")
    environ = {"CUDA_HOME": str(fake_nvcc(tmp_path / "cuda")), "TORCH_CUDA_ARCH_LIST": "9.0+PTX"}
    build_tool.build(SELECTIVE_SCAN, tmp_path / "out", environ)
    assert build_tool.read_build(tmp_path / "out")["cuda"] == {"nvcc": "13.0", "architectures": ["9.0+PTX"]}
    command = (tmp_path / "out" / "libscan_cuda.so").read_text()
    assert "-cudart static" in command
    assert "code=sm_90 -gencode arch=compute_90,code=compute_90 scan_cuda.cu" in command
    messages = capfd.readouterr().err
    assert "CUDA toolkit 13.0" in messages
    assert "warning: the toolkit is newer than torch's CUDA 12.4" in messages


def test_a_failing_nvcc_leaves_the_cpu_library(no_cpu, tmp_path, capfd):
    environ = {"CUDA_HOME": str(fake_nvcc(tmp_path / "cuda", exit_code=2))}
    build_tool.build(SELECTIVE_SCAN, tmp_path / "out", environ)
    messages = capfd.readouterr().err
    assert "catastrophe" in messages and "built libscan_cpu.so in" in messages
    reason = build_tool.read_build(tmp_path / "out")["not_built"]["scan_cuda"]
    assert reason.startswith("this command failed:")
    assert "\n" not in reason


@pytest.mark.parametrize("exit_code", [2, None])
def test_scan_cuda_1_makes_it_an_error(no_cpu, tmp_path, monkeypatch, exit_code):
    if exit_code is None:
        monkeypatch.setattr(build_tool, "find_nvcc", lambda environ: None)
    environ = {"CUDA_HOME": str(fake_nvcc(tmp_path / "cuda", exit_code=2)), "SCAN_CUDA": "1"}
    with pytest.raises(BuildError, match="catastrophe" if exit_code else "no nvcc"):
        build_tool.build(SELECTIVE_SCAN, tmp_path / "out", environ)


def test_a_build_replaces_what_an_older_one_left(no_cpu, tmp_path):
    (tmp_path / "libscan_cuda.so").write_text("old")
    build_tool.build(SELECTIVE_SCAN, tmp_path, {"SCAN_CUDA": "0"})
    assert not (tmp_path / "libscan_cuda.so").exists()


def test_contents_of_build_json(built):
    info = build_tool.read_build(built)
    assert info["abi"] == extension.ABI_VERSION
    assert info["sources_sha256"] == SELECTIVE_SCAN.sources_sha256()
    assert info["not_built"] == {"scan_cuda": "left out (SCAN_CUDA=0)"}
    assert "baseline" in info["cpu"]["instruction_sets"]


@pytest.mark.parametrize(
    ("has_cuda", "has_nvcc", "environ", "expected"),
    [
        (False, False, {}, True),
        (False, True, {}, False),
        (False, True, {"SCAN_CUDA": "0"}, True),
        (False, False, {"SCAN_CUDA": "1"}, False),
        (True, True, {}, True),
        (True, True, {"SCAN_CUDA": "0"}, True),
        (True, False, {"SCAN_CUDA": "1"}, True),
        (True, True, {"TORCH_CUDA_ARCH_LIST": "9.0+PTX"}, True),
        (True, True, {"TORCH_CUDA_ARCH_LIST": "8.0"}, False),
    ],
)
def test_a_build_is_up_to_date_if_it_has_the_wanted_libraries(
    no_cpu, tmp_path, monkeypatch, has_cuda, has_nvcc, environ, expected
):
    home, out = str(fake_nvcc(tmp_path / "cuda")), tmp_path / "out"
    build_tool.build(
        SELECTIVE_SCAN, out, {"CUDA_HOME": home, "TORCH_CUDA_ARCH_LIST": "9.0+PTX", "SCAN_CUDA": "1" if has_cuda else "0"}
    )
    monkeypatch.setattr(build_tool, "find_nvcc", lambda environ: "nvcc" if has_nvcc else None)
    assert build_tool.is_up_to_date(SELECTIVE_SCAN, out, environ) is expected
    (out / "libscan_cpu.so").unlink()
    assert not build_tool.is_up_to_date(SELECTIVE_SCAN, out, environ)


def test_the_command_builds_in_place_when_sources_changed_or_it_is_forced(tmp_path):
    """With a compiler that only writes its arguments."""
    sources = shutil.copytree(SOURCES, tmp_path / "sources", ignore=shutil.ignore_patterns("*.so", "build.json", "build"))
    compiler = executable(tmp_path / "c++", 'for last; do :; done\n[ "$1" = --version ] && echo fake || echo "$@" > "$last"\n')

    def build(*flags: str) -> str:
        command = [sys.executable, str(sources / "setup.py"), "build_ext", "--inplace", *flags]
        environ = {**os.environ, "CXX": str(compiler), "SCAN_CUDA": "0"}
        result = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, check=True)
        (message,) = (result.stdout + result.stderr).splitlines()
        return message

    folder = sources / SELECTIVE_SCAN.package
    built = f"selective scan: built libscan_cpu.so in {folder}; no CUDA library: left out (SCAN_CUDA=0)"
    assert build() == built and (folder / "libscan_cpu.so").is_file()
    assert build() == f"selective scan: the build in {folder} is up to date"
    assert build("--force") == built
    (sources / "scan.h").write_text((sources / "scan.h").read_text() + "// changed\n")
    assert build() == built


# ---- finding and loading ----


def test_no_build_at_all(use):
    use()
    reason = "the compiled selective scan is not built: python csrc/selective_scan/setup.py build_ext --inplace"
    assert extension.unavailable_reason("scan_cpu") == reason
    with pytest.raises(extension.Unavailable, match="not built"):
        extension.load("scan_cpu")


def test_a_build_is_loaded(use, built):
    use(built)
    assert extension.unavailable_reason("scan_cpu") is None
    assert extension.load("scan_cpu").scan_abi_version() == extension.ABI_VERSION


def test_what_was_not_built_says_why(use, built):
    use(built)
    assert extension.unavailable_reason("scan_cuda").endswith("has no scan_cuda library: left out (SCAN_CUDA=0)")


def test_another_interface_is_refused(use, built, monkeypatch):
    use(built)
    monkeypatch.setattr(extension.SCAN, "abi_version", 999)
    reason = extension.unavailable_reason("scan_cpu")
    assert f"has interface version {SELECTIVE_SCAN.abi_version()}, this code needs 999; " in reason
    assert reason.endswith("python csrc/selective_scan/setup.py build_ext --inplace --force")


def copy_with(built: Path, folder: Path, library: bytes) -> Path:
    folder.mkdir()
    shutil.copy(built / "build.json", folder)
    (folder / "libscan_cpu.so").write_bytes(library)
    return folder


def test_a_damaged_library_is_passed_over_for_the_next(use, built, tmp_path):
    damaged = copy_with(built, tmp_path / "damaged", b"not a library")
    use(damaged)
    reason = extension.unavailable_reason("scan_cpu")
    assert "libscan_cpu.so does not load: " in reason
    assert "\n" not in reason
    use(damaged, built)
    assert extension.unavailable_reason("scan_cpu") is None


@pytest.mark.parametrize("content", ["", "{", "5", "null"])
def test_a_damaged_record_of_a_build_is_no_record(use, built, tmp_path, content):
    """The libraries beside it are used, and a new build replaces them."""
    folder = copy_with(built, tmp_path / "folder", (built / "libscan_cpu.so").read_bytes())
    (folder / "build.json").write_text(content)
    use(folder)
    assert extension.unavailable_reason("scan_cpu") is None and extension.build_info(folder) == {}
    assert extension.unavailable_reason("scan_cuda").endswith("libscan_cuda.so is missing")
    assert not build_tool.is_up_to_date(SELECTIVE_SCAN, folder, {"SCAN_CUDA": "0"})


def test_a_library_of_something_else_is_refused(use, built, tmp_path):
    (tmp_path / "other.cpp").write_text("int other;\n")
    compiler = build_tool.find_compiler(os.environ)
    subprocess.run([*compiler, "-shared", "-fPIC", "other.cpp", "-o", "other.so"], cwd=tmp_path, check=True)
    use(copy_with(built, tmp_path / "other", (tmp_path / "other.so").read_bytes()))
    assert "is not a selective-scan library" in extension.unavailable_reason("scan_cpu")


def test_the_build_in_place_comes_before_the_installed_package(monkeypatch, built, tmp_path):
    package = tmp_path / SELECTIVE_SCAN.package
    shutil.copytree(built, package)
    shutil.copy(SOURCES / SELECTIVE_SCAN.package / "__init__.py", package)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(extension.SCAN, "in_place", built)
    assert extension.build_folders() == [built, package]


@pytest.mark.parametrize("wanted", ["baseline", "avx2", "avx512"])
def test_the_environment_chooses_the_instruction_set(built, wanted):
    program = f"import ctypes; scan = ctypes.CDLL({str(built / 'libscan_cpu.so')!r}); scan.scan_isa.restype = ctypes.c_char_p"
    command = [sys.executable, "-c", f"{program}; print(scan.scan_isa().decode())"]
    result = subprocess.run(command, env={**os.environ, "SCAN_ISA": wanted}, capture_output=True, text=True, check=True)
    assert result.stdout.strip() in (wanted, "baseline")  # the latter where the processor does not have the wanted one


PROGRAM = """
import sys
from pathlib import Path
import torch
from vmamba import extension, scan_cpp, scan_reference
extension.SCAN.build_folders = lambda: [Path(sys.argv[1])]
torch.manual_seed(0)
x, proj, weight = torch.randn(2, 5, 7, 19), torch.randn(2, 5, 7, 4, 3 + 2 * 2), torch.randn(4, 19, 3)
A, D, bias = -torch.rand(76, 2), torch.randn(76), torch.randn(76)
leaves = [each.double().requires_grad_() for each in (x, proj, weight, A, D, bias)]
y, saved = scan_cpp.forward_2d(x, proj, weight, A, D, bias)
expected = scan_reference.selective_scan_2d_reference(*leaves)
gradients = scan_cpp.backward_2d(y, x, proj, weight, A, D, bias, saved)
pairs = [(y, expected), *zip(gradients, torch.autograd.grad(expected, leaves, y.double()))]
print(scan_cpp.instruction_set(), max(((a - b).norm() / b.norm()).item() for a, b in pairs))
"""


def test_without_wide_instructions_the_numbers_are_the_same(built):
    """The variant for old processors, which no other test reaches."""
    environ = {**os.environ, "SCAN_ISA": "baseline", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(built)]
    used, error = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout.split()
    assert used == "baseline"
    assert float(error) < 1e-5
