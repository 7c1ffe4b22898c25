"""Checkpoint files: safe reading, atomic writing, and loading into networks and optimizers."""

import argparse
import contextlib
import json
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from math import isfinite
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from clever.arguments import plain_args
from clever.entry import describe_failure
from clever.utils import (
    InputError,
    atomic_file,
    describe_error,
    short_repr,
)

_numpy_scalar, _numpy_array = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]


class _UnreadType:
    """Stands for a type that is not read. Its objects become dicts, whose entries are kept if the type was a kind of dict."""

    def __new__(cls, *args: Any) -> OrderedDict[Any, Any]:
        return OrderedDict()


def module_entries(value: Any) -> dict[str, Any]:
    """Parameters, buffers and modules, by name, of a pickled nn.Module that load_checkpoint has read; {} for other values."""
    attributes = vars(value) if isinstance(value, OrderedDict) else {}
    kinds = [attributes.get(kind) for kind in ("_parameters", "_buffers", "_modules")]
    if not all(isinstance(kind, dict) for kind in kinds):
        return {}
    not_saved = attributes.get("_non_persistent_buffers_set") or ()
    return {name: entry for kind in kinds for name, entry in kind.items() if name not in not_saved}


def _path_text(*parts: str) -> str:
    """A pickled pathlib.Path as a string."""
    return str(PurePath(*map(str, parts)))


def _plain_dict(*factory: Any) -> dict[Any, Any]:
    """A pickled defaultdict as a dict."""
    return {}


# What is read besides tensors and plain values. The functions return plain values instead of the pickled types.
_SAFE_GLOBALS = [
    argparse.Namespace,
    *[(_path_text, f"pathlib{module}.{kind}Path") for module in ("", "._local") for kind in ("Posix", "Windows")],
    (_plain_dict, "collections.defaultdict"),
    np.ndarray,
    (_numpy_array, "numpy.core.multiarray._reconstruct"),
    (_numpy_array, "numpy._core.multiarray._reconstruct"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(kind)) for kind in np.typecodes["All"]},
]

# Under this key of a safetensors file's metadata, export.py writes `args` and `epoch` of the pretraining as JSON.
SAFETENSORS_METADATA = "clever"

MAX_UNREAD_TYPES = 100  # in one file
_FOREIGN = re.compile(r"GLOBAL ([\w.]+)")  # in the message of torch.load

# Raised by torch.load for truncated or damaged files, old formats included.
DAMAGE = (
    RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError, OverflowError, MemoryError,
    OSError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


def load_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint to the CPU without running any code that it may contain.

    Tensors, plain values, argparse.Namespace and numpy's arrays and scalars are read; a path becomes a string. Other programs
    store objects of further types beside their weights. They become dicts: empty ones, except for kinds of dict; of a module,
    `module_entries` has the tensors. With `mmap`, which needs a zip file, as torch.save writes it today, tensors stay on the
    disk until they are used. A file *.safetensors is read as `{"model": state dict}`, and a module that was saved as a whole as
    `{"model": module}`. Raises InputError if the file is missing or damaged, or is not a dict.
    """
    if not Path(path).is_file():
        raise InputError(f"checkpoint {path}: no such file")
    if Path(path).suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        _check_archive(path)
        checkpoint = _load_pickled(path, mmap)
    except pickle.UnpicklingError as error:
        foreign = _FOREIGN.search(str(error))
        if foreign:
            raise InputError(f"checkpoint {path}: refused, it would call {foreign[1]}") from error
        raise InputError(f"checkpoint {path}: damaged, or not written by torch.save") from error
    except InputError:
        raise
    except DAMAGE as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        raise InputError(f"checkpoint {path}: damaged or incomplete ({reason})") from error
    if module_entries(checkpoint):
        return {"model": checkpoint}
    if isinstance(checkpoint, OrderedDict) and not checkpoint:
        raise InputError(f"checkpoint {path}: holds an object instead of a dict of tensors; save its state_dict()")
    if not isinstance(checkpoint, dict):
        raise InputError(f"checkpoint {path}: holds a {type(checkpoint).__name__}, not a dict")
    return checkpoint


def _check_archive(path: str | Path) -> None:
    """Raise ValueError for a zip file whose contents are larger than itself, and would need any amount of memory.

    torch.save does not compress. Raises InputError for a TorchScript program.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise InputError(f"checkpoint {path}: a TorchScript program; save its state_dict() with torch.save")
            size = sum(entry.file_size for entry in archive.infolist())
        if size > Path(path).stat().st_size:
            raise ValueError(f"holds {size} bytes in a smaller file; torch.save does not compress")


def _load_pickled(path: str | Path, mmap: bool) -> Any:
    """torch.load with weights_only, which names one type that it does not allow at a time: _UnreadType takes its place."""
    unread: list[str] = []
    while True:
        allowed = [*_SAFE_GLOBALS, *((_UnreadType, name) for name in unread)]
        try:
            with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about reading without full support; if that fails, the error says so
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            foreign = _FOREIGN.search(str(error))
            if not foreign or foreign[1] in unread or len(unread) >= MAX_UNREAD_TYPES:
                raise
            unread.append(foreign[1] if "." in foreign[1] else f"builtins.{foreign[1]}")  # the message omits `builtins.`


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
    except (SafetensorError, *DAMAGE) as error:
        raise InputError(f"checkpoint {path}: damaged or incomplete ({describe_error(error)[:100]})") from error


def stored_arguments(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says about its network and training, by the names of our flags; empty if it says nothing.

    Other programs store arguments that have the names of our flags and other values (`net="resnet18"`, `mean=None`): they are
    left out. An architecture that stands beside the arguments, as PyTorch's examples and timm have it, is taken.
    """
    args = checkpoint.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    args = {"arch": checkpoint.get("arch")} | (plain_args(args) if isinstance(args, dict) else {})
    args = {name: value for name, value in args.items() if isinstance(name, str)}
    if "global_crops_size" not in args:  # not ours
        args |= _in_unit_scale(args)
    return {n: value for n, value in args.items() if value is not None and (n not in _OURS or _OURS[n](value))}


def _in_unit_scale(args: dict[str, Any]) -> dict[str, Any]:
    """Mean and standard deviation of the channels for pixels in 0..1; some programs store them for pixels in 0..255."""
    stats = {name: args.get(name) for name in ("mean", "std")}
    if all(_is_triple(values) for values in stats.values()):
        if all(1 < max(values) <= 255 for values in stats.values()):
            return {name: [value / 255 for value in values] for name, values in stats.items()}
        if all(0 <= value <= 1 for values in stats.values() for value in values):
            return {}
    return {"mean": None, "std": None}  # not known


def _is_triple(value: Any) -> bool:
    """True for three finite numbers."""
    return isinstance(value, (list, tuple)) and len(value) == 3 and all(type(v) in (int, float) and isfinite(v) for v in value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


# What the values of our flags look like, for flags that evaluations take from a checkpoint.
_OURS: dict[str, Callable[[Any], bool]] = {
    "arch": lambda value: isinstance(value, str),
    "net": lambda value: value in ("dino", "CLeVER"),
    "hp1": lambda value: type(value) in (int, float) and 0 <= value <= 1,
    "patch_size": _is_count,
    "global_crops_size": _is_count,
    "mean": _is_triple,
    "std": lambda value: _is_triple(value) and min(value) > 0,
    "aug": lambda value: isinstance(value, str),
    "seed": lambda value: type(value) is int,
}


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
    wrong = [name for name in ("student", "teacher", "optimizer", "dino_loss") if not isinstance(state[name], dict)]
    wrong += [] if isinstance(state["args"], (dict, argparse.Namespace)) else ["args"]
    wrong += [] if type(state["epoch"]) is int and state["epoch"] >= 0 else ["epoch"]
    if wrong:
        raise InputError(f"checkpoint {path}: damaged, or of another script: its {wrong[0]} is {short_repr(state[wrong[0]])}")
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


@contextlib.contextmanager
def valid_state(path: str | Path) -> Iterator[None]:
    """Errors while a training's state is taken from the checkpoint `path` become an InputError: it is damaged, or another's."""
    try:
        yield
    except InputError:
        raise
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        if describe_failure(error):  # such as memory that does not suffice
            raise
        raise InputError(f"checkpoint {path}: damaged, or of another script ({describe_error(error)[:200]})") from error


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
