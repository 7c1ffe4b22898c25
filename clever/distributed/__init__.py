"""Processes: the start of a group, and its collectives."""

from clever.distributed.collectives import (
    all_gather_objects,
    all_gather_rows,
    all_reduce_sum,
    any_process,
    barrier,
    broadcast_buffers,
    get_rank,
    get_world_size,
    is_distributed,
    is_main_process,
    resolve_amp_dtype,
)
from clever.distributed.start import add_distributed_arguments, first_says, init_distributed

__all__ = [
    "add_distributed_arguments",
    "all_gather_objects",
    "all_gather_rows",
    "all_reduce_sum",
    "any_process",
    "barrier",
    "broadcast_buffers",
    "first_says",
    "get_rank",
    "get_world_size",
    "init_distributed",
    "is_distributed",
    "is_main_process",
    "resolve_amp_dtype",
]
