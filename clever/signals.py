"""SIGTERM, which Slurm, Kubernetes and launchers send some time before they kill a process, and SIGINT, which Ctrl-C sends.

By default a script ends at once, with a line that says how to go on. Where something is to be finished or saved first, the
signal is only noted: `deferred`; a second Ctrl-C does not wait. In data loading workers both are ignored: the process that
started them decides when they end.
"""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
UNFINISHED = "what has not been written yet is missing; start the same command again"


class Interrupted(BaseException):
    """The script ends because of a signal. Like KeyboardInterrupt it is no Exception, which others might catch.

    Args:
        message: how to go on.
        status: the exit status: 0 if nothing is lost. None: that of a process without a handler, 143 (SIGINT: 130).
    """

    def __init__(self, message: str = UNFINISHED, status: int | None = None) -> None:
        super().__init__(message)
        self.status = 128 + (_received or signal.SIGTERM) if status is None else status
        self.cause = "Ctrl-C" if _received == signal.SIGINT else "SIGTERM"


_received: signal.Signals | None = None
_received_at = 0.0
_response: tuple[str, int | None] | None = None  # the arguments of Interrupted, which a signal raises; None: it is only noted


def is_requested() -> bool:
    """True if this process has received one of the signals."""
    return _received is not None


@contextlib.contextmanager
def handled(handler: Any = None) -> Iterator[None]:
    """Within, both signals have this handler. Only the main thread can set it.

    None: they raise Interrupted, unless `deferred`. signal.SIG_DFL, for calls that wait for long outside of Python: they end
    the process without a line.
    """
    global _received
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if handler is None:
        _received = None
    former = {number: signal.signal(number, _on_signal if handler is None else handler) for number in SIGNALS}
    try:
        with contextlib.nullcontext() if handler is not None else allowed(UNFINISHED, None):
            yield
    finally:
        for number, before in former.items():
            signal.signal(number, before)


def deferred() -> contextlib.AbstractContextManager[None]:
    """A signal is only noted within, and obeyed at the end."""
    return _responding(None)


def allowed(message: str, status: int | None) -> contextlib.AbstractContextManager[None]:
    """A signal raises Interrupted(message, status) within, and at the start if it has come before."""
    return _responding((message, status))


@contextlib.contextmanager
def _responding(response: tuple[str, int | None] | None) -> Iterator[None]:
    global _response
    former, _response = _response, response
    try:
        _obey()
        yield
    finally:
        _response = former
    _obey()


def _obey() -> None:
    if _received is not None and _response is not None:
        raise Interrupted(*_response)


def _on_signal(number: int, _: Any) -> None:
    global _received, _received_at
    # A launcher passes on the Ctrl-C that the terminal has sent to both: a second one within a second means no more.
    if number == _received == signal.SIGINT and time.monotonic() - _received_at > 1:
        sys.exit(128 + number)
    if _received is None:
        _received, _received_at = signal.Signals(number), time.monotonic()
    _obey()


def ignore_signals(*_: Any) -> None:
    """Ignore both signals in this process; as worker_init_fn of a DataLoader, in its workers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
