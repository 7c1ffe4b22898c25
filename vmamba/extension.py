"""The compiled libraries of csrc/selective_scan, `scan_cpu` and `scan_cuda`: what Python needs to know of their interface."""

import ctypes

import torch
from torch import Tensor

from clever.compiled import CompiledPackage, build_info

__all__ = ["build_info"]

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # ScanType of scan.h
SCAN = CompiledPackage("selective scan", "scan", "csrc/selective_scan", "clever_selective_scan", abi_version=1)
BUILD = SCAN.build_command
build_folders, unavailable_reason, load = SCAN.build_folders, SCAN.unavailable_reason, SCAN.load


def fields(sizes: str, pointers: str) -> list[tuple[str, type]]:
    """ctypes form of a struct of scan.h or scan_cuda.h: 64-bit sizes, then pointers, in the order of the header."""
    return [(name, ctypes.c_int64) for name in sizes.split()] + [(name, ctypes.c_void_p) for name in pointers.split()]


def set_pointers(args: ctypes.Structure, tensors: dict[str, Tensor | None]) -> None:
    """Sets the pointers of a struct to the tensors of these names; None becomes null."""
    for name, tensor in tensors.items():
        setattr(args, name, None if tensor is None else tensor.data_ptr())
