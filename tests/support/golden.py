"""Reference numbers of the original implementations, and how to compare with them.

`tensor(name, shape)` draws the input of that name, `fill_(module)` the weights (both from tests/golden/fill.py).
`GOLDEN[name]` is a tensor of core.safetensors, `CORE[name]` an entry of core.json; both are read at their first import.
"""

import importlib.util
import json
from pathlib import Path

import torch

DATA = Path(__file__).parents[1] / "golden"

_spec = importlib.util.spec_from_file_location("golden_fill", DATA / "fill.py")
_fill = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fill)
tensor, fill_ = _fill.tensor, _fill.fill_


def __getattr__(name: str):
    """Reads a data file when its name is first asked for, and keeps it."""
    if name == "GOLDEN":
        from safetensors.torch import load_file

        globals()[name] = load_file(DATA / "core.safetensors")
    elif name == "CORE":
        globals()[name] = json.loads((DATA / "core.json").read_text())
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]


def rel_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of `expected`; shapes must agree."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm()).item()
