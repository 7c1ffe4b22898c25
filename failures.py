"""Failures of the machine, not of the input: what happened and what to do, in one line."""

import errno
import os
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
SHARED_MEMORY = ("shared memory", "</torch_")
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # of gloo
PATH_ERRORS = {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EEXIST}


def describe_failure(error: BaseException) -> str | None:
    """One line about a full disk, a process that has died, or memory that does not suffice; None for any other error.

    The error that a library raises often comes after the one that caused it: all of the chain are looked at.
    """
    for each in chain(error):
        text = str(each)
        if isinstance(each, OSError) and each.errno in ADVICE:
            return f"{each.filename or each.strerror}: {ADVICE[each.errno]}"
        if any(words in text for words in SHARED_MEMORY):
            return ("no space in shared memory, through which data loading workers pass batches: more of it (docker run "
                    f"--shm-size), or fewer --num_workers ({describe_error(each)[-200:]})")  # fmt: skip
        if os.strerror(errno.ENOSPC) in text:  # of a library that is not written in Python
            return f"{ADVICE[errno.ENOSPC].replace(' there', '')} ({describe_error(each)[:200]})"
        if isinstance(each, torch.OutOfMemoryError):
            return (
                "out of GPU memory: try a smaller --batch_size_per_gpu, with --accumulation for the same images per step, or "
                f"--activation_checkpointing true ({describe_error(each)[:200]})"
            )
        if isinstance(each, MemoryError) or (isinstance(each, RuntimeError) and "DefaultCPUAllocator" in text):
            return f"out of memory: choose smaller sizes, or fewer --num_workers ({describe_error(each)[:200]})"
        if isinstance(each, RuntimeError) and any(words in text for words in LOST_PEER):
            return f"another process of the group has ended; its error says why ({text.splitlines()[0][:200]})"
        if isinstance(each, RuntimeError) and "DataLoader worker" in text:
            return f"a data loading worker has died, for lack of memory? Try fewer --num_workers ({text.splitlines()[0]})"
        if isinstance(each, RuntimeError) and "DataLoader timed out" in text:
            return f"no batch came from the data loading workers: do they hang, or does the storage? ({text.splitlines()[0]})"
    return None


def describe_path_error(error: BaseException) -> str | None:
    """One line about a path that cannot be what the user wants it to be, such as a folder to be written; None otherwise."""
    if isinstance(error, OSError) and error.errno in PATH_ERRORS and error.filename:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return None


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
