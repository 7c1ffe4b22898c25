"""The compiled selective scans, as shared libraries beside this file. vmamba/extension.py loads them."""

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def library(name: str) -> Path:
    """Where `scan_cpu` or `scan_cuda` is, if it was built."""
    return FOLDER / f"lib{name}.so"


def build_facts() -> dict:
    """How the libraries were built: interface version, sha256 of the sources, compilers, CUDA architectures."""
    return json.loads((FOLDER / "build.json").read_text())
