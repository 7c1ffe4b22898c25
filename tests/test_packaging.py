"""The wheel: built, installed into an empty folder, and used from another one."""

import shutil
import subprocess
import sys

import pytest
from support.in_process import pretrain
from support.processes import ROOT, write_images

import clever

USER = """
import sys
sys.path.insert(0, sys.argv[1])
import clever, vmamba
from clever import load_backbone
from vmamba.config import config_names
network = load_backbone(sys.argv[2]).network
assert all(module.__file__.startswith(sys.argv[1]) for module in (clever, vmamba))
print(clever.__version__, network.embed_dim, "vssm2-vmambav2_micro" in config_names())
"""


@pytest.mark.slow
def test_a_wheel_serves_users_in_any_folder(tmp_path):
    source, target, elsewhere = tmp_path / "source", tmp_path / "installed", tmp_path / "elsewhere"
    source.mkdir()
    elsewhere.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("clever", "vmamba"):
        shutil.copytree(ROOT / name, source / name)
    assert pretrain(write_images(tmp_path / "images", 4), tmp_path / "run", "--net", "CLeVER", "--epochs", 0).status == 0

    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", target, source]
    subprocess.run(pip, check=True)
    user = [sys.executable, "-I", "-c", USER, target, tmp_path / "run" / "checkpoint.pth"]
    process = subprocess.run(user, cwd=elsewhere, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == f"{clever.__version__} 128 True"
