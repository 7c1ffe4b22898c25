"""Locks, so that two runs never write the same file: while a run writes FILE, it has a lock on FILE.lock.

The system frees the lock when the process ends, however it ends. Data loading workers, which may outlive a killed run for
seconds, do not keep it (filelock 3.32 and later): the run can be started again at once. Where the file system has no locks, the
existence of FILE.lock is the lock; filelock warns, and removes that of a process that has ended.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from clever.distributed import all_gather_objects, is_main_process
from clever.utils import InputError


@contextlib.contextmanager
def locked(*paths: str | Path) -> Iterator[None]:
    """Hold the locks of these files within; the first process takes them for its group, whose processes must all call it.

    Missing folders are made, and removed afterwards if they have remained empty. Raises InputError in all processes if another
    run holds one of the locks.
    """
    with contextlib.ExitStack() as stack:
        refusal = None
        if is_main_process():
            for path in map(Path, paths):
                try:
                    stack.enter_context(_locked(path))
                except Timeout:
                    refusal = f"{path}: another run is writing it; end that one first, or write somewhere else"
                    break
        refusal = all_gather_objects(refusal)[0]
        if refusal:
            raise InputError(refusal)
        yield


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = path.with_name(f"{path.name}.lock")
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                with contextlib.suppress(PermissionError):  # Windows
                    lock.unlink(missing_ok=True)
    finally:
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()
