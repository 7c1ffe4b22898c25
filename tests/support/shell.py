"""Bash scripts run by tests, in a clean environment and with stub commands."""

import os
import subprocess
from pathlib import Path

from support.processes import ROOT

SCRIPTS = ROOT / "scripts"


def run(script: Path, cwd: Path = ROOT, path: tuple = (), **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script with these environment variables only; the folders `path` come first in PATH."""
    env = {"PATH": os.pathsep.join([*map(str, path), os.environ["PATH"]]), "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        ["bash", str(script)], cwd=cwd, env=env | variables, capture_output=True, text=True, timeout=60, check=False
    )


def stub(folder: Path, name: str, text: str) -> Path:
    """Write an executable bash script."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("#!/usr/bin/env bash\n" + text)
    file.chmod(0o755)
    return file
