"""scripts/doctor.py: a line per backend, and the command to run next."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import ROOT

from scripts import doctor
from vmamba import extension


def test_it_names_the_backend_that_runs_and_the_next_command():
    result = subprocess.run([sys.executable, "-m", "scripts.doctor"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"^cpu: (cpp|torch) +selected", result.stdout, re.MULTILINE)) == 1
    assert re.search(r"^views +(cpp selected|torchvision and Pillow)", result.stdout, re.MULTILINE)
    assert re.search(r"^next: \S", result.stdout.splitlines()[-1])


OTHER = Path("elsewhere")


@pytest.mark.parametrize(
    "chosen, outdated, tools, words",
    [
        ({"cpu": "cpp"}, [], (True, True), "nothing to install"),
        ({"cpu": "cpp", "cuda": "cuda"}, [], (True, True), "nothing to install"),
        ({"cpu": "cpp"}, [extension.IN_PLACE, OTHER], (True, False), extension.BUILD),
        ({"cpu": "cpp"}, [OTHER], (True, False), extension.REINSTALL),
        ({"cpu": "torch"}, [], (True, False), extension.BUILD),
        ({"cpu": "torch"}, [], (False, False), "install a C++ compiler"),
        ({"cpu": "cpp", "cuda": "triton"}, [], (True, True), "SCAN_CUDA=1"),
        ({"cpu": "cpp", "cuda": "torch"}, [], (True, False), "stay with torch, or install the CUDA toolkit"),
    ],
)
def test_advice(chosen, outdated, tools, words):
    assert doctor.advice(chosen, outdated, *tools, renderer=None).startswith(words)


def test_advice_for_the_renderer_comes_after_that_for_the_scan():
    assert doctor.advice({"cpu": "cpp"}, [], True, True, "build it") == "build it"
    assert doctor.advice({"cpu": "torch"}, [], True, True, "build it") == extension.BUILD
