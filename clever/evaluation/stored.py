"""What a checkpoint says about its network and training."""

import argparse
from collections.abc import Callable
from typing import Any

from clever.arguments import plain_args
from clever.methods import METHODS


def stored_arguments(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says about its network and training, by the names of our flags; empty if it says nothing.

    Arguments of other programs that have the names of our flags and other values, such as `net="resnet18"`, are left out. An
    architecture that stands beside the arguments, as PyTorch's examples and timm have it, is taken.
    """
    args = checkpoint.get("args")
    args = {"arch": checkpoint.get("arch")} | (plain_args(args) if isinstance(args, (dict, argparse.Namespace)) else {})
    return {n: value for n, value in args.items() if value is not None and (n not in _OURS or _OURS[n](value))}


def _is_statistic(value: Any) -> bool:
    """True for three numbers that fit pixels in 0..1: some programs store statistics of pixels in 0..255."""
    return isinstance(value, (list, tuple)) and len(value) == 3 and all(type(v) in (int, float) and abs(v) < 10 for v in value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


# What the values of our flags look like, for flags that evaluations take from a checkpoint.
_OURS: dict[str, Callable[[Any], bool]] = {
    "arch": lambda value: isinstance(value, str),
    "net": lambda value: value in METHODS,
    "equiv_part": lambda value: value in ("ALL", "EF"),
    "hp1": lambda value: type(value) in (int, float) and 0 <= value <= 1,
    "patch_size": _is_count,
    "global_crops_size": _is_count,
    "mean": _is_statistic,
    "std": lambda value: _is_statistic(value) and min(value) > 0,
    "aug": lambda value: isinstance(value, str),
    "seed": lambda value: type(value) is int,
}
