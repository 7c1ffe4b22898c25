"""Checkpoint files: safe reading, atomic writing, strict loading."""

import argparse
import os
import pickle
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from utils import InputError

_numpy_scalar = np.float64(0).__reduce__()[0]

# What the originals pickled besides tensors and plain values; nothing else is ever unpickled.
_SAFE_GLOBALS = [
    argparse.Namespace,
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")},
]

# What torch.load raises on files that are cut short or damaged, old formats included.
_DAMAGE = (
    RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError, OverflowError, MemoryError,
    OSError, struct.error,
)  # fmt: skip


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU without running any code it may hold.

    Tensors, plain values, argparse.Namespace and numpy scalars are read (the originals' files hold the last two).
    Raises InputError if the file is missing, damaged, holds anything else, or is no dict.
    """
    if not Path(path).is_file():
        raise InputError(f"checkpoint {path}: no such file")
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that reading may fail; if it does, the error says so
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\w[\w.]*)", str(error))
        if foreign:
            raise InputError(
                f"checkpoint {path}: holds {foreign[1]}; only tensors, plain values, Namespace and numpy scalars are read"
            ) from error
        raise InputError(f"checkpoint {path}: damaged, or not written by torch.save") from error
    except _DAMAGE as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        raise InputError(f"checkpoint {path}: damaged or incomplete ({reason})") from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"checkpoint {path}: holds a {type(checkpoint).__name__}, not a dict")
    return checkpoint


def save_atomically(obj: Any, path: str | Path) -> None:
    """torch.save to a file beside `path`, flush it to the disk, then rename: whatever happens, `path` holds a whole file."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(obj, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def strip_prefix(state: dict[str, torch.Tensor], prefix: str = "module.") -> dict[str, torch.Tensor]:
    """State dict with `prefix` removed from the front of the names that have it (DistributedDataParallel adds it)."""
    return {name.removeprefix(prefix): value for name, value in state.items()}


def load_strictly(module: nn.Module, state: dict[str, torch.Tensor], what: str) -> None:
    """Load a state dict, whose names may begin with `module.`; InputError about `what` unless names and shapes are the same."""
    try:
        module.load_state_dict(strip_prefix(state))
    except RuntimeError as error:
        raise InputError(f"{what}: does not fit the arguments: {' '.join(str(error).split())[:300]}") from error


def load_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's moments but not the options of its groups: the script sets them, and the originals' lack some.

    Raises InputError unless the groups are of the same sizes.
    """
    own = optimizer.state_dict()["param_groups"]
    found, expected = ([len(group["params"]) for group in groups] for groups in (state["param_groups"], own))
    if found != expected:
        raise InputError(f"optimizer of the checkpoint to continue from: groups of {found} parameters, here {expected}")
    optimizer.load_state_dict({"state": state["state"], "param_groups": own})
