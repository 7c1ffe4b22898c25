"""Checkpoint files: safe reading, atomic writing, and loading into networks and optimizers."""

import argparse
import json
import os
import pickle
import re
import struct
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from arguments import plain_args
from utils import InputError, atomic_file, describe_error

_numpy_scalar = np.float64(0).__reduce__()[0]

# Types in the originals' checkpoints besides tensors and plain values; nothing else is ever unpickled.
_SAFE_GLOBALS = [
    argparse.Namespace,
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")},
]

# Under this key of a safetensors file's metadata, export.py writes `args` and `epoch` of the pretraining as JSON.
SAFETENSORS_METADATA = "clever"

# Raised by torch.load for truncated or damaged files, old formats included.
_DAMAGE = (
    RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError, OverflowError, MemoryError,
    OSError, struct.error,
)  # fmt: skip


def load_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint to the CPU without running any code that it may contain.

    Tensors, plain values, argparse.Namespace and numpy scalars are read (the originals' files contain the last two). With
    `mmap`, which needs a zip file, as torch.save writes it today, tensors stay on the disk until they are used.
    A file *.safetensors is read as `{"model": state dict}`. Raises InputError if the file is missing or damaged, contains
    another type, or is not a dict.
    """
    if not Path(path).is_file():
        raise InputError(f"checkpoint {path}: no such file")
    if Path(path).suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about reading without full support; if that fails, the error says so
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
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


def _load_safetensors(path: str | Path) -> dict[str, Any]:
    """`{"model": state dict}` of a safetensors file, with `args` and `epoch` of the pretraining if export.py has written it."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise InputError(f"checkpoint {path}: safetensors is not installed: pip install safetensors") from error
    try:
        with safe_open(path, "pt") as file:
            described = json.loads((file.metadata() or {}).get(SAFETENSORS_METADATA, "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        return {"model": state, "args": dict(described.get("args", {})), "epoch": described.get("epoch")}
    except (SafetensorError, *_DAMAGE) as error:
        raise InputError(f"checkpoint {path}: damaged or incomplete ({describe_error(error)[:100]})") from error


def save_atomically(obj: Any, path: str | Path) -> None:
    """Write atomically with torch.save, flushed to the disk."""
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        torch.save(obj, file)
        file.flush()
        os.fsync(file.fileno())


def load_resumable(path: Path, args: argparse.Namespace, fixed: Iterable[str]) -> dict[str, Any] | None:
    """The checkpoint of a pretraining to resume, or None if there is no such file; prints which arguments have changed.

    Raises InputError if the file is not such a checkpoint, or was made with other values of the arguments `fixed`.
    """
    if not path.exists():
        return None
    state = load_checkpoint(path)
    missing = {"student", "teacher", "optimizer", "epoch", "args", "dino_loss"} - set(state)
    if missing:
        raise InputError(f"checkpoint {path}: not a checkpoint of this script, lacks {', '.join(sorted(missing))}")
    stored = plain_args(state["args"])
    for name in fixed:
        if name in stored and stored[name] != getattr(args, name):
            raise InputError(
                f"--{name} {getattr(args, name)}: the checkpoint in {path.parent} was made with {stored[name]}; "
                "continue it with that, or give another --output_dir"
            )
    changed = [n for n, v in sorted(vars(args).items()) if n in stored and stored[n] != v and n != "local_rank"]
    if changed:
        print("continuing with changed arguments:", ", ".join(f"{n} {stored[n]} -> {getattr(args, n)}" for n in changed))
    return state


def strip_prefix(state: dict[str, torch.Tensor], prefix: str = "module.") -> dict[str, torch.Tensor]:
    """The state dict with `prefix`, which DistributedDataParallel adds, removed from the names that start with it."""
    return {name.removeprefix(prefix): value for name, value in state.items()}


def load_strictly(module: nn.Module, state: dict[str, torch.Tensor], what: str) -> None:
    """Load a state dict, whose names may begin with `module.`. Raises InputError about `what` unless names and shapes match."""
    try:
        module.load_state_dict(strip_prefix(state))
    except RuntimeError as error:
        raise InputError(f"{what}: does not fit the arguments: {' '.join(str(error).split())[:300]}") from error


def load_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state per parameter (momentum, Adam's moments), but not its groups' options, which the script sets.

    Raises InputError unless the groups have the same sizes.
    """
    own = optimizer.state_dict()["param_groups"]
    found, expected = ([len(group["params"]) for group in groups] for groups in (state["param_groups"], own))
    if found != expected:
        raise InputError(f"optimizer of the checkpoint to continue from: groups of {found} parameters, here {expected}")
    optimizer.load_state_dict({"state": state["state"], "param_groups": own})
