"""scripts/doctor.py: a line per backend, and the command that builds what is missing."""

import re
import subprocess
import sys

from support.processes import ROOT


def test_it_names_the_backend_that_runs_or_how_to_build_it():
    result = subprocess.run([sys.executable, "-m", "scripts.doctor"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"^cpu: (cpp|torch) +selected", result.stdout, re.MULTILINE)) == 1
    assert re.search(r"^cpu: cpp +(selected|.*python csrc/selective_scan/setup.py)", result.stdout, re.MULTILINE)
    assert re.search(r"^views +(cpp \(|torchvision and Pillow; cpp: .*python csrc/views/setup.py)", result.stdout, re.MULTILINE)
