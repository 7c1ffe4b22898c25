"""Checkpoint files: safe reading, atomic writing, and loading into networks and optimizers."""

import argparse
import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clever.arguments import check_installed
from clever.utils import InputError, atomic_file, describe_error

# What is read besides tensors and plain values: the originals' checkpoints hold arguments, and numbers of numpy 1 or 2.
_numpy_scalar = np.float64(0).__reduce__()[0]
_numpy_scalars = [(_numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
_numpy_types = {type(np.dtype(kind)) for kind in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"}
_ALLOWED = [argparse.Namespace, *_numpy_scalars, np.dtype, *_numpy_types]

# Under this key of a safetensors file's metadata, export.py writes `args` and `epoch` of the pretraining as JSON.
SAFETENSORS_METADATA = "clever"


def load_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint to the CPU without running any code that it may contain.

    Tensors, plain values, argparse.Namespace and numpy's numbers are read. A file *.safetensors is read as
    `{"model": state dict}`, with `args` and `epoch` of the pretraining if export.py has written it. With `mmap`, tensors stay
    on the disk until they are used. Raises InputError if the file is missing or damaged, or is not a dict of these types.
    """
    checkpoint = _load_safetensors(path) if Path(path).suffix == ".safetensors" else load_file(path, mmap)
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path}: holds a {type(checkpoint).__name__}, not a dict")
    return checkpoint


def load_file(path: str | Path, mmap: bool = False) -> Any:
    """What a file of torch.save holds; see `load_checkpoint`."""
    with torch.serialization.safe_globals(_ALLOWED), _readable(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about old and unusual files: if they cannot be read, the error says so
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _load_safetensors(path: str | Path) -> dict[str, Any]:
    check_installed(str(path), ["safetensors"])
    from safetensors import safe_open

    with _readable(path), safe_open(path, "pt") as file:
        described = json.loads((file.metadata() or {}).get(SAFETENSORS_METADATA, "{}"))
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        return {"model": state, "args": dict(described.get("args", {})), "epoch": described.get("epoch")}


@contextlib.contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """Any error while the file is read becomes an InputError: torch.load raises a dozen types of them for damaged files."""
    try:
        yield
    except PermissionError:
        raise
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(f"{path}: no such file") from error
    except Exception as error:
        types = ", ".join(_foreign_types(path))[:200]
        damaged = f"damaged, or more than tensors and plain values ({type(error).__name__})"
        raise InputError(f"{path}: {f'holds {types}; save its state dict alone' if types else damaged}") from error


def _foreign_types(path: str | Path) -> list[str]:
    """Types and functions in a file of torch.save that are not read; [] if there are none, or if the file is damaged."""
    with contextlib.suppress(Exception):
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    return []


def save_atomically(obj: Any, path: str | Path, keep_as: str | Path | None = None) -> None:
    """Write atomically with torch.save, flushed to the disk.

    `keep_as` is a second name of the file, which remains when `path` is written anew. It is given first: once `path` exists,
    both do. Where the file system has no hard links, it is a second file.
    """
    with atomic_file(path) as temporary:
        _write_flushed(obj, temporary)
        if keep_as is not None:
            with atomic_file(keep_as) as kept:
                kept.unlink(missing_ok=True)
                try:
                    os.link(temporary, kept)
                except OSError:
                    _write_flushed(obj, kept)


def _write_flushed(obj: Any, path: Path) -> None:
    try:
        with open(path, "wb") as file:
            torch.save(obj, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:  # torch's archive cannot be closed after an OSError
        raise error.__context__ if isinstance(error.__context__, OSError) else error from error


@contextlib.contextmanager
def valid_state(path: str | Path) -> Iterator[None]:
    """Errors while a training's state is taken from the checkpoint `path` become an InputError: it is damaged, or another's."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        reason = describe_error(error)[:300]
        raise InputError(f"checkpoint {path}: damaged, or of another script or network ({reason})") from error


def strip_prefix(state: dict[str, torch.Tensor], prefix: str = "module.") -> dict[str, torch.Tensor]:
    """The state dict with `prefix`, which DistributedDataParallel adds, removed from the names that start with it."""
    return {name.removeprefix(prefix): value for name, value in state.items()}


def load_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state per parameter (momentum, Adam's moments), but not its groups' options, which the script sets.

    Raises ValueError unless the groups have the same sizes.
    """
    groups = zip(optimizer.state_dict()["param_groups"], state["param_groups"], strict=True)
    groups = [own | {"params": stored["params"]} for own, stored in groups]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
