"""The compiled renderer of views (csrc/views), called through ctypes. It computes what rendering.render_view defines.

Agreement with it: at most 1.5 of 255 on average per operation, 2.5 for whole recipes (tests/data/test_rendering_cpp.py); the
sources say where pixels differ and why. Flip, rotation, grey and solarise are exact. Rendering uses one thread and releases
Python's lock.
"""

import ctypes
from functools import cache

import numpy as np

from clever.compiled import CompiledPackage

LIBRARY = "views_cpu"
VIEWS = CompiledPackage("view renderer", "views", "csrc/views", "clever_views", abi_version=1)


def unavailable_reason() -> str | None:
    """None if the compiled renderer can be used, otherwise the reason and the command that builds it, in one line."""
    return VIEWS.unavailable_reason(LIBRARY)


@cache
def _function() -> ctypes._CFuncPtr:
    function = VIEWS.load(LIBRARY).views_render
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, size, size, pointer, size, pointer]
    function.restype = size
    return function


def instruction_set() -> str:
    """The instruction set in use: avx512, avx2 or baseline."""
    isa = VIEWS.load(LIBRARY).views_isa
    isa.restype = ctypes.c_char_p
    return isa().decode()


def render(image: np.ndarray, views: np.ndarray, addresses: np.ndarray) -> None:
    """Views VIEW [V] of an image uint8 [H, W, 3], written to memory for uint8 [3, S, S] each at the `addresses`, uint64 [V].

    Addresses are not checked. Raises ValueError if an array is not contiguous or has another type, or if a view is invalid.
    """
    for array, dtype, shape in ((image, "u1", (*image.shape[:2], 3)), (addresses, "u8", views.shape)):
        if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
            raise ValueError(f"{array.dtype} {array.shape}: must be contiguous, {dtype} {shape}")
    height, width, _ = image.shape
    status = _function()(image.ctypes.data, height, width, views.ctypes.data, len(views), addresses.ctypes.data)
    if status > 0:
        values = dict(zip(views.dtype.names, views[status - 1].tolist(), strict=True))
        raise ValueError(f"view {status - 1} is invalid for an image of {height} x {width} pixels: {values}")
    if status < 0:
        raise MemoryError("views_render: not enough memory for the working buffers")
