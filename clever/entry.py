"""How a script ends: one line for invalid input, for a failure of the machine and for a signal; a traceback for the rest.

CLEVER_TRACEBACK=1, or --debug, shows the traceback of any error, those of workers and of other processes included.
"""

import errno
import io
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import torch
import torch.distributed as dist

from clever import signals
from clever.distributed import first_says, is_distributed
from clever.utils import InputError, describe_error

GRACE_SECONDS = 10.0  # for which the other processes of a group wait for the first one's error
START_SECONDS = 3.0  # the same before they are a group
FULL = "free some space there and start the same command again; files that were complete are unchanged"
FAILURES = {
    errno.ENOSPC: f"the disk is full: {FULL}",
    errno.EDQUOT: f"the quota is used up: {FULL}",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n), or set fewer --num_workers",
}
BAD_PATHS = {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST}


def run_entry_point(main: Callable[[], None]) -> None:
    """Run a script's main.

    Exit status: 2 for invalid input (InputError, a path that cannot be used), 1 for a value that is not finite
    (FloatingPointError), a failure of the machine, and unexpected errors, which keep their traceback.
    What the terminal's encoding lacks is printed escaped.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with signals.handled():
            main()
    except signals.Interrupted as stop:
        if _rank_of_launcher() == 0:
            print(f"stopped by {stop.cause}: {stop}", file=sys.stderr, flush=True)
        sys.exit(stop.status)
    except Exception as error:
        if os.environ.get("CLEVER_TRACEBACK", "0") not in ("", "0"):
            traceback.print_exc()
        message, status = describe(error)
        if message is None:
            raise
        _give_up(message, status)
    # Not after an error: nccl would wait here for the other processes, which may be waiting in a collective.
    if is_distributed():
        dist.destroy_process_group()


def describe(error: Exception) -> tuple[str | None, int]:
    """An error in one line, and the exit status; None for an unexpected one."""
    if isinstance(error, InputError):
        # One of a data loading worker arrives as a traceback, with the message in its last line.
        return str(error).strip().splitlines()[-1].removeprefix("clever.utils.InputError: "), 2
    if isinstance(error, FloatingPointError):
        return f"not finite: {error}", 1
    if isinstance(error, BrokenPipeError) and error.filename is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - Python would flush the closed one at its end
        return "the program that reads the output has ended", 1
    failure = describe_failure(error)
    if failure is None and isinstance(error, OSError) and error.errno in BAD_PATHS and error.filename:
        return f"{os.fsdecode(error.filename)}: {error.strerror}", 2
    return failure, 1


def describe_failure(error: BaseException) -> str | None:
    """A full disk, lack of memory, or a process that has died, in one line, also as the cause of another error; else None."""
    for each in _chain(error):
        text = describe_error(each)[:200]
        if isinstance(each, OSError) and each.errno in FAILURES:
            return f"{each.filename or each.strerror}: {FAILURES[each.errno]}"
        if isinstance(each, torch.OutOfMemoryError):
            return ("out of GPU memory: try a smaller --batch_size_per_gpu, with --accumulation for the same images per step, "
                    f"or --activation_checkpointing true ({text})")  # fmt: skip
        if isinstance(each, MemoryError):
            return f"out of memory: choose smaller sizes, or fewer --num_workers ({text})"
        if isinstance(each, RuntimeError) and _raised_in(each, "torch/utils/data/dataloader.py"):
            return f"a data loading worker has died or hangs; fewer --num_workers need less memory ({text})"
        if isinstance(each, RuntimeError) and _raised_in(each, "torch/distributed/distributed_c10d.py"):
            return f"the processes have lost each other; if one of them has ended, its error says why ({text})"
    return None


def _raised_in(error: BaseException, file: str) -> bool:
    """Whether a function of this file has raised the error."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.replace(os.sep, "/").endswith(file)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _give_up(message: str, status: int) -> NoReturn:
    """Print the message and exit. Only the first process does so at once: what all have to say is said once."""
    if _rank_of_launcher() > 0 and not is_distributed():
        time.sleep(START_SECONDS)  # a launcher ends all processes as soon as one has ended
    if not first_says(message, GRACE_SECONDS):
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def _rank_of_launcher() -> int:
    """The number that the launcher has given to this process; 0 without a launcher."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0
