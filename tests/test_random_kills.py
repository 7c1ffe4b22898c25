"""SIGKILL at random moments: every file is whole after each, and the finished run is that of an undisturbed one."""

import os
import random
import shutil
import signal
import time

import pytest
from support.interrupted import KINDS, assert_equal, assert_whole, contents, make_runs, words_of
from support.processes import TIMEOUT, fork, run_script

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return make_runs(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_kills(runs, kind, tmp_path):
    kills = int(os.environ.get("KILLS", 20))
    script, flags = runs[kind]

    folder, printed = tmp_path / "run", tmp_path / "printed.txt"

    def start():
        return fork(run_script, [f"{script}.py", *words_of(flags, folder)], {}, printed, None)

    def finish(process):
        process.join(TIMEOUT)
        assert process.exitcode == 0, printed.read_text()
        found = contents(folder)
        shutil.rmtree(folder)
        return found

    expected = finish(start())
    began = time.monotonic()
    finish(start())  # the first one has imported what its kind needs, which takes longer
    seconds = time.monotonic() - began
    rng, killed, finished = random.Random(kind), 0, 0
    while killed < kills:
        process = start()
        process.join(rng.uniform(0, 1.1) * seconds)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join(TIMEOUT)
            killed += 1
            assert_whole(folder)
        else:
            assert_equal(finish(process), expected)
            finished += 1
    assert_equal(finish(start()), expected)
    print(f"{kind}: {killed} kills, finished {finished + 1} times")
