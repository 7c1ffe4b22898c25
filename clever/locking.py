"""Locks, so that two runs never write the same file.

While a run writes FILE, FILE.lock says which process of which machine does. A second run is refused. A run that was killed
leaves FILE.lock behind, which must not keep the next one out:
    On one machine, and on network file systems that lock files for all machines, the system frees a lock with its process.
    Elsewhere a run that lives is known by the time of change of FILE.lock, which it renews every HEARTBEAT seconds.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clever.distributed import all_gather_objects, is_main_process
from clever.utils import InputError, beside

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HEARTBEAT = 10.0  # seconds
PATIENCE = 3.5  # heartbeats that a run may miss before it counts as dead


@contextlib.contextmanager
def locked(*paths: str | Path) -> Iterator[None]:
    """Hold the locks of these files within; the first process takes them for its group, whose processes must all call it.

    Missing folders are made, and removed afterwards if they have remained empty. Raises InputError in all processes if another
    run holds one of the locks.
    """
    with contextlib.ExitStack() as stack:
        refusal = None
        if is_main_process():
            try:
                for path in paths:
                    stack.enter_context(_locked(Path(path)))
            except InputError as error:
                refusal = str(error)
        refusal = all_gather_objects(refusal)[0]
        if refusal:
            raise InputError(refusal)
        yield


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = beside(path, ".lock")
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = _take(path, lock)
        stop = threading.Event()
        thread = threading.Thread(target=_beat, args=(file, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            lock.unlink(missing_ok=True)
            os.close(file)
    finally:
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()


def _take(path: Path, lock: Path) -> int:
    """The open lock file, which now names this process. Raises InputError if another run is alive."""
    own = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S"), "boot": _boot()}
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            holder = _read(file)
            works = _try_lock(file, path, holder)
            if holder and not (works and holder.get("boot") == own["boot"]):
                _wait_for_sign_of_life(path, lock, holder)
                works = _try_lock(file, path, holder)  # again: POSIX frees it when a process closes the file, if only once
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(own).encode(), 0)
            if not works:  # two runs may both have come here: the one that wrote last has it
                time.sleep(HEARTBEAT / 10)
            current = _read(file) if _is_same_file(file, lock) else None
            if current == own:
                return file
            if current is not None:
                raise InputError(_refusal(path, current))
        except BaseException as error:
            os.close(file)
            if isinstance(error, OSError):  # the lock was taken, but there is no space to say by whom
                lock.unlink(missing_ok=True)
            raise
        os.close(file)  # its former holder removed it meanwhile: a new one is needed


def _try_lock(file: int, path: Path, holder: dict[str, Any]) -> bool:
    """Lock an open file for this process; False if the file system cannot. Raises InputError if another process has it.

    A lock of POSIX's kind: data loading workers, which may outlive a killed run for seconds, do not inherit it.
    """
    if fcntl is None:
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (BlockingIOError, PermissionError) as error:
        raise InputError(_refusal(path, holder)) from error
    except OSError:
        return False


def _wait_for_sign_of_life(path: Path, lock: Path, holder: dict[str, Any]) -> None:
    """Return if the holder's heart does not beat. Raises InputError as soon as it does."""
    seconds = PATIENCE * HEARTBEAT
    print(f"{lock} names {_name(holder)}: waiting {seconds:.0f} s to see whether it is alive", flush=True)
    first, deadline = _time_of_change(lock), time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(HEARTBEAT / 10)
        if _time_of_change(lock) not in (first, None):
            raise InputError(_refusal(path, holder))


def _time_of_change(lock: Path) -> int | None:
    """Modification time in ns, None if the file is gone. It is opened, so that a network file system asks its server."""
    try:
        with open(lock) as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _beat(file: int, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT):
        with contextlib.suppress(OSError):  # the file server may come back
            os.utime(file)


def _is_same_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        return False


def _read(file: int) -> dict[str, Any]:
    """What an open lock file says about its holder; empty if it is new or damaged."""
    try:
        holder = json.loads(os.pread(file, 10_000, 0))
        return holder if isinstance(holder, dict) else {}
    except (OSError, ValueError):
        return {}


def _boot() -> str:
    """Identifies the running kernel: processes that share it see each other's locks on any file system."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _name(holder: dict[str, Any]) -> str:
    if not holder:
        return "a run that has just started"
    return f"process {holder.get('pid')} on host {holder.get('host')}, started {holder.get('started')}"


def _refusal(path: Path, holder: dict[str, Any]) -> str:
    return f"{path}: another run is writing it, {_name(holder)}; end that one first, or write somewhere else"
