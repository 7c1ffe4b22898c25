"""Two runs that write the same file: the second is refused while the first lives, and never by a run that is dead."""

import os
import signal
import socket
import time

import pytest
from support.in_process import assert_refused, pretrain, snapshot
from support.processes import end, fork, write_images

from clever import locking
from clever.locking import locked
from clever.utils import InputError


def hold(path, no_locks):
    """A run that does nothing but hold the lock."""
    locking.HEARTBEAT = 0.05
    if no_locks:
        locking.fcntl = None
    with locked(path):
        time.sleep(100)


@pytest.fixture
def holder(tmp_path, request):
    """Path and process of a run that holds the lock; with the parameter True on a file system that has no locks."""
    path = tmp_path / "run" / "checkpoint.pth"
    child = fork(hold, path, getattr(request, "param", False))
    lock = path.with_name("checkpoint.pth.lock")
    deadline = time.monotonic() + 60
    while not lock.exists() or not lock.read_text():
        assert time.monotonic() < deadline and child.is_alive()
        time.sleep(0.01)
    yield path, child
    end([child])


def test_the_second_run_is_refused_and_touches_nothing(holder, tmp_path):
    path, child = holder
    before = snapshot(path.parent)
    outcome = pretrain(write_images(tmp_path / "images", 4), path.parent)
    assert_refused(outcome, str(path), f"process {child.pid} on host {socket.gethostname()}, started 20")
    assert snapshot(path.parent) == before and child.is_alive()


def test_a_killed_run_does_not_block(holder):
    path, child = holder
    end([child])
    start = time.monotonic()
    with locked(path):
        assert str(os.getpid()) in path.with_name("checkpoint.pth.lock").read_text()
    assert time.monotonic() - start < 2
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("holder", [True], indirect=True)
def test_without_locks_the_heart_of_the_first_run_tells(holder, monkeypatch):
    path, child = holder
    monkeypatch.setattr(locking, "fcntl", None)
    monkeypatch.setattr(locking, "HEARTBEAT", 0.2)  # a slower one than the holder's: it is sure to beat while we wait
    with pytest.raises(InputError, match=f"process {child.pid}"), locked(path):
        pass
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    with locked(path):
        assert str(os.getpid()) in path.with_name("checkpoint.pth.lock").read_text()


def test_a_run_of_another_machine_is_watched_although_the_lock_is_free(holder, monkeypatch):
    """As where a mounted network file system has locks for its own machine only."""
    path, child = holder
    lock = path.with_name("checkpoint.pth.lock")
    other = path.with_name("other.pth")
    monkeypatch.setattr(locking, "HEARTBEAT", 0.2)
    other.with_name("other.pth.lock").hardlink_to(lock)  # its heart beats, but who asks for it gets the lock
    monkeypatch.setattr(locking, "_boot", lambda: "another machine")
    monkeypatch.setattr(locking, "_try_lock", lambda *_: True)
    with pytest.raises(InputError, match=f"process {child.pid}"), locked(other):
        pass


def test_a_lock_that_was_removed_while_we_waited_is_not_enough(tmp_path, monkeypatch):
    """The former holder ends, and removes its file, after we have opened it: a third run must not find it missing."""
    path, lock, real, calls = tmp_path / "a", tmp_path / "a.lock", locking._try_lock, []

    def remove_first(*args):
        if not calls:
            lock.unlink()
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(locking, "_try_lock", remove_first)
    with locked(path):
        assert lock.exists() and len(calls) == 2
        assert str(os.getpid()) in lock.read_text()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"pid": {}}'])
def test_a_damaged_lock_does_not_block(tmp_path, text, monkeypatch):
    monkeypatch.setattr(locking, "HEARTBEAT", 0.01)
    (tmp_path / "a.lock").write_text(text)
    with locked(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_folders_that_remain_empty_are_removed(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "x" / "y" / "a", tmp_path / "x" / "b"):
        assert {path.name for path in (tmp_path / "x").iterdir()} == {"y", "b.lock"}
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
