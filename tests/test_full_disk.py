"""A disk that fills up while results are written: one line, whole files, and the same result once there is space."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from support.interrupted import KINDS
from support.processes import ROOT, SETTINGS

from failures import describe_failure
from utils import atomic_file


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


def test_what_a_library_raises_after_a_full_disk_is_described_by_its_cause(tmp_path):
    with pytest.raises(RuntimeError) as caught, atomic_file(tmp_path / "table.csv"):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "table.csv"))
        except OSError as error:
            raise RuntimeError("unexpected pos 5 vs 4") from error
    text = describe_failure(caught.value)
    assert text.startswith(f"{tmp_path / 'table.csv'}: the disk is full: free some space") and "\n" not in text


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a.pth"), "a.pth: the quota is used up"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"), "a smaller --batch_size_per_gpu"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nmore"), "num_workers (DataLoader worker"),
        (RuntimeError("DataLoader timed out after 1800.0 seconds"), "do they hang"),
    ],
)
def test_failures_in_one_line(error, words):
    text = describe_failure(error)
    assert words in text and "\n" not in text


def test_other_errors_keep_their_traceback():
    assert describe_failure(RuntimeError("shapes differ")) is None
    assert describe_failure(FileNotFoundError(errno.ENOENT, "No such file", "x")) is None
