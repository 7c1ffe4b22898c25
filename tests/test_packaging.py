"""The installed package: the scripts under one name, which shadows nothing."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support.processes import TINY_NETWORK, write_labelled_images

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "packaging"))
from package import SCRIPTS, own_modules, rewrite_imports, write_package  # noqa: E402


def test_imports_of_own_modules_name_the_package():
    source = '''"""import utils"""
import os
import utils
import datasets as d
from vmamba.config import (
    load_config,
)
from datasets import x  # import utils
def f():
    from utils import y
    return importlib.import_module("vmamba.model"), importlib.import_module("av")
from utilsx import z
from .utils import w
'''
    assert rewrite_imports(source, {"utils", "datasets", "vmamba"}) == '''"""import utils"""
import os
from clever_ssl import utils
from clever_ssl import datasets as d
from clever_ssl.vmamba.config import (
    load_config,
)
from clever_ssl.datasets import x  # import utils
def f():
    from clever_ssl.utils import y
    return importlib.import_module("clever_ssl.vmamba.model"), importlib.import_module("av")
from utilsx import z
from .utils import w
'''
    for source in ("import vmamba.model", "import os, utils"):
        with pytest.raises(ValueError, match="line 1"):
            rewrite_imports(source, {"utils", "vmamba"})


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the package, and one with decoys: files of a user whose names are those of our scripts."""
    root = tmp_path_factory.mktemp("site")
    write_package(ROOT, root / "site" / "clever_ssl")
    (root / "work").mkdir()
    for name in ("utils", "datasets", "losses", "evaluation", "checkpoint"):
        (root / "work" / f"{name}.py").write_text(f"OWNER = 'user of {name}'\n")
    return root


def test_no_import_of_an_own_module_is_left(site):
    own = {name.split("/")[0].removesuffix(".py") for name in own_modules(ROOT)}
    files = list((site / "site" / "clever_ssl").rglob("*.py"))
    assert {"utils", "datasets", "vmamba", "evaluation", "scripts", "embed"} < own and len(files) > 80
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not own & {name.split(".")[0] for name in names}, path


def in_site(site, code, *words):
    """Run code in the folder of decoys, with the package but without the repository on the path."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], cwd=site / "work", env=env | {"PYTHONPATH": str(site / "site")},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_every_module_can_be_imported_beside_files_of_the_same_names(site):
    code = """
import importlib, pkgutil, sys
import clever_ssl, utils, datasets
for module in pkgutil.walk_packages(clever_ssl.__path__, "clever_ssl."):
    importlib.import_module(module.name)
import losses, evaluation
print(utils.OWNER, losses.OWNER, evaluation.OWNER, clever_ssl.load_backbone.__module__, sep="|")
"""
    assert in_site(site, code) == "user of utils|user of losses|user of evaluation|clever_ssl.evaluation.loading\n"


def test_the_package_says_where_the_compiled_libraries_come_from(site):
    code = "from clever_ssl.views_cpp import VIEWS; print(VIEWS.build_command)"
    assert in_site(site, code) == "in a clone of the repository, pip install ./csrc/views\n"


def test_commands_train_and_probe(site, tmp_path):
    data = write_labelled_images(tmp_path / "data", train=4, val=2)
    code = "import sys; from clever_ssl import commands; getattr(commands, sys.argv.pop(1))()"
    common = ("--output_dir", tmp_path / "run", "--num_workers", 0, "--epochs", 1, "--batch_size_per_gpu", 4)
    assert "epoch 0/1 done" in in_site(site, code, "pretrain", *TINY_NETWORK, *common, "--data_path", data / "train")
    weights = ("--pretrained_weights", tmp_path / "run" / "checkpoint.pth")
    assert "Top-1 test accuracy" in in_site(site, code, "probe", *weights, *common, "--data_path", data)
    for name in SCRIPTS:
        assert name in (ROOT / "pyproject.toml").read_text() and (ROOT / f"{SCRIPTS[name].replace('.', '/')}.py").exists()


@pytest.mark.slow
def test_the_wheel_in_a_new_environment(tmp_path):
    """Built and installed without network; torch and the others come from this environment, by a .pth file."""
    source = tmp_path / "source"
    left_out = shutil.ignore_patterns(".*", "results", "data", "build", "csrc", "tests", "docs", "assets")
    shutil.copytree(ROOT, source, ignore=left_out)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("clever_ssl-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    (site / "base.pth").write_text(sysconfig.get_paths()["purelib"])

    def run(*command):
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout

    assert "--hp1" in run(tmp_path / "venv" / "bin" / "clever-pretrain", "--help")
    assert str(site) in run(python, "-c", "import clever_ssl; print(clever_ssl.__file__)")
