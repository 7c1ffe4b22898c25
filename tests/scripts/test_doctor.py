"""scripts/doctor.py: a line per backend, and the command to run next."""

import re
import subprocess
import sys

from support.processes import ROOT


def test_it_names_the_backend_that_runs_and_the_next_command():
    result = subprocess.run([sys.executable, "-m", "scripts.doctor"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"^cpu: (cpp|torch) +selected", result.stdout, re.MULTILINE)) == 1
    assert re.search(r"^views +(cpp selected|torchvision and Pillow)", result.stdout, re.MULTILINE)
    assert re.search(r"^next: \S", result.stdout.splitlines()[-1])
