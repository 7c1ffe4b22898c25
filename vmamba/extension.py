"""The compiled libraries of csrc/selective_scan, `scan_cpu` and `scan_cuda`: what Python needs to know of their interface."""

import ctypes

import torch

from clever.compiled import CompiledPackage, Unavailable, build_info

__all__ = ["Unavailable", "build_info"]

ABI_VERSION = 1  # SCAN_ABI_VERSION of scan.h
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # ScanType of scan.h

SCAN = CompiledPackage("selective scan", "scan", "csrc/selective_scan", "clever_selective_scan", ABI_VERSION)
IN_PLACE, BUILD, REINSTALL = SCAN.in_place, SCAN.build_command, SCAN.reinstall_command
build_folders, unavailable_reason, load = SCAN.build_folders, SCAN.unavailable_reason, SCAN.load


def structure(name: str, sizes: str, pointers: str) -> type[ctypes.Structure]:
    """ctypes form of a struct of scan.h or scan_cuda.h: 64-bit sizes, then pointers, in the order of the header."""
    fields = [(size, ctypes.c_int64) for size in sizes.split()] + [(pointer, ctypes.c_void_p) for pointer in pointers.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})
