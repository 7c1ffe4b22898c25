"""Failures of the machine, not of the input: what happened and what to do, in one line."""

import errno
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import torch
import torch.distributed as dist

from clever import signals
from clever.distributed import is_distributed
from clever.utils import InputError, describe_error

GRACE_SECONDS = 10.0  # the time that other processes leave the first one to print an error
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


def run_entry_point(main: Callable[[], None]) -> None:
    """Run a script's main.

    An InputError becomes one line on stderr and exit status 2; a FloatingPointError and a failure of the machine, such as a
    full disk (see ADVICE), one line and exit status 1. SIGTERM and Ctrl-C end the script with one line, see signals.py.
    What the terminal's encoding lacks is printed escaped.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with signals.signals_interrupt():
            main()
    except InputError as error:
        # An error of a data loading worker arrives as a traceback, with the message in its last line.
        _give_up(str(error).strip().splitlines()[-1].removeprefix("clever.utils.InputError: "), 2)
    except FloatingPointError as error:
        _give_up(f"not finite: {error}", 1)
    except signals.Interrupted as stop:
        if _rank_of_launcher() == 0:
            print(f"stopped by {signals.received()}: {stop}", file=sys.stderr, flush=True)
        sys.exit(stop.status)
    except BrokenPipeError as error:
        if error.filename is not None:
            raise
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - Python would flush the closed one at its end
        _give_up("the program that reads the output has ended", 1)
    except Exception as error:
        failure, path = describe_failure(error), describe_path_error(error)
        if failure is None and path is None:
            raise
        _give_up(failure or path, 1 if failure else 2)
    # Not after an error: nccl would wait here for the other processes, which may be waiting in a collective.
    if is_distributed():
        dist.destroy_process_group()


def _give_up(message: str, status: int) -> NoReturn:
    """Print the message and exit: the first process at once, the others after GRACE_SECONDS.

    A launcher ends all processes as soon as one has ended. So an error that occurs in every process is printed once, and an
    error that occurs in only one of them is printed too.
    """
    if _rank_of_launcher() > 0:
        time.sleep(GRACE_SECONDS)
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def _rank_of_launcher() -> int:
    """The number that the launcher has given to this process; 0 without a launcher."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0
