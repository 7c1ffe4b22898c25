"""SIGTERM, which Slurm, Kubernetes and launchers send some time before they kill a process.

By default a script ends at once, with a line that says how to go on. Where something is to be finished or saved first, SIGTERM
is only noted: `deferred`. In data loading workers it is ignored: the process that started them decides when they end.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

UNFINISHED = "what has not been written yet is missing; start the same command again"


class Interrupted(BaseException):
    """The script ends because of SIGTERM. Like KeyboardInterrupt it is no Exception, which others might catch.

    Args:
        message: how to go on.
        status: the exit status: 0 if nothing is lost, otherwise 143, as if there were no handler.
    """

    def __init__(self, message: str = UNFINISHED, status: int = 128 + signal.SIGTERM) -> None:
        super().__init__(message)
        self.status = status


_received = False
_response: Interrupted | None = None  # raised by SIGTERM; None: it is only noted


def is_requested() -> bool:
    """True if this process has received SIGTERM."""
    return _received


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """In the main thread, SIGTERM raises Interrupted from here on, unless `deferred`."""
    global _received
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _received = False
    former = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        with _responding(Interrupted()):
            yield
    finally:
        signal.signal(signal.SIGTERM, former)


def deferred() -> contextlib.AbstractContextManager[None]:
    """SIGTERM is only noted within, and obeyed at the end."""
    return _responding(None)


def allowed(message: str, status: int) -> contextlib.AbstractContextManager[None]:
    """SIGTERM raises Interrupted(message, status) within, and at the start if it has come before."""
    return _responding(Interrupted(message, status))


@contextlib.contextmanager
def _responding(response: Interrupted | None) -> Iterator[None]:
    global _response
    former, _response = _response, response
    try:
        _obey()
        yield
    finally:
        _response = former
    _obey()


def _obey() -> None:
    if _received and _response is not None:
        raise _response


def _on_sigterm(*_: Any) -> None:
    global _received
    _received = True
    _obey()


def ignore_sigterm(*_: Any) -> None:
    """Ignore SIGTERM in this process; as worker_init_fn of a DataLoader, in its workers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
