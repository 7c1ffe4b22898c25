"""Who this process is, and what the processes of a group do together; without a group there is one process."""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def is_distributed() -> bool:
    """True if a launcher has started this process in a process group."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Number of this process; 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    """True in the process that prints and writes files: the first one."""
    return get_rank() == 0


def barrier() -> None:
    """Wait until all processes have come here."""
    if is_distributed():
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over processes, in place; without a process group the tensor is returned unchanged."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def any_process(flag: bool) -> bool:
    """Whether the flag is set in one of the processes. On the CPU: a GPU does not wait for it."""
    if not is_distributed():
        return flag
    found = torch.tensor(int(flag))
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_cpu_group())
    return bool(found)


@functools.cache
def _cpu_group() -> dist.ProcessGroup | None:
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def all_gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Concatenate rows [m, ...] of all processes, in the order of ranks; m may differ between processes."""
    if not is_distributed():
        return rows
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    longest = int(max(counts))
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    shares = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(shares, padded)
    return torch.cat([share[: int(count)] for share, count in zip(shares, counts, strict=True)])


def all_gather_objects(item: Any) -> list[Any]:
    """The items of all processes, in the order of ranks. They are pickled: for small objects only."""
    if not is_distributed():
        return [item]
    items = [None] * get_world_size()
    dist.all_gather_object(items, item)
    return items


def broadcast_buffers(module: nn.Module) -> None:
    """Copy the first process's buffers, such as the running statistics of batch norms, to all other processes."""
    if is_distributed():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def resolve_amp_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type that autocast computes in. `auto` is bf16 where the hardware has it, otherwise fp16 on a GPU, fp32 on a CPU."""
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if name != "auto":
        return named[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
