"""Failures of the machine, not of the input: what happened and what to do, in one line."""

import errno
from collections.abc import Iterator

import torch

from utils import describe_error

FULL = "free some space there and start the same command again; files that were complete are unchanged"
ADVICE = {
    errno.ENOSPC: f"the disk is full: {FULL}",
    errno.EDQUOT: f"the quota is used up: {FULL}",
    errno.EROFS: "the file system is read-only",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n), or set fewer --num_workers",
}


def describe_failure(error: BaseException) -> str | None:
    """One line about a full disk, a worker that has died, or memory that does not suffice; None for any other error.

    The error that a library raises often comes after the one that caused it: all of the chain are looked at.
    """
    for each in chain(error):
        if isinstance(each, OSError) and each.errno in ADVICE:
            return f"{each.filename or each.strerror}: {ADVICE[each.errno]}"
        if isinstance(each, torch.OutOfMemoryError):
            return (
                "out of GPU memory: try a smaller --batch_size_per_gpu, with --accumulation for the same images per step, or "
                f"--activation_checkpointing true ({describe_error(each)[:200]})"
            )
        text = str(each)
        if isinstance(each, RuntimeError) and "DataLoader worker" in text:
            return f"a data loading worker has died, for lack of memory? Try fewer --num_workers ({text.splitlines()[0]})"
        if isinstance(each, RuntimeError) and "DataLoader timed out" in text:
            return f"no batch came from the data loading workers: do they hang, or does the storage? ({text.splitlines()[0]})"
    return None


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
