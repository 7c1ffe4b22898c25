"""A disk that fills up while results are written: one line, whole files, and the same result once there is space."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from support.interrupted import KINDS
from support.processes import ROOT, SETTINGS


def can_mount() -> bool:
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="no mount namespaces here")
@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_is_full_at_twenty_moments(kind, tmp_path):
    command = ["unshare", "-m", sys.executable, "-m", "support.full_disk", str(tmp_path), "20", kind]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | SETTINGS, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    full, problems = json.loads(result.stdout.splitlines()[-1])[kind]
    assert full >= 10 and problems == []
