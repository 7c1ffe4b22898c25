"""Two runs that write the same file: the second is refused while the first lives, and never by a run that is dead."""

import os
import time

import pytest
from support.in_process import assert_refused, pretrain, snapshot
from support.processes import end, fork, write_images

from clever.locking import locked


def hold(path):
    """A run that holds the lock, with a data loading worker that outlives it for seconds."""
    with locked(path):
        if os.fork():
            path.write_text("begun")
            time.sleep(100)
        time.sleep(5)
        os._exit(0)


@pytest.fixture
def holder(tmp_path):
    """Path and process of a run that holds the lock."""
    path = tmp_path / "run" / "checkpoint.pth"
    child = fork(hold, path)
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline and child.is_alive()
        time.sleep(0.01)
    yield path, child
    end([child])


def test_the_second_run_is_refused_and_touches_nothing(holder, tmp_path):
    path, child = holder
    before = snapshot(path.parent)
    outcome = pretrain(write_images(tmp_path / "images", 4), path.parent)
    assert_refused(outcome, f"{path}: another run is writing it")
    assert snapshot(path.parent) == before and child.is_alive()


def test_a_killed_run_does_not_block(holder):
    path, child = holder
    end([child])
    start = time.monotonic()
    with locked(path):
        assert time.monotonic() - start < 2
    assert [each.name for each in path.parent.iterdir()] == [path.name]
