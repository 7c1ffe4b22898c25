"""Failures of the machine: what is printed, and that everything ends."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.in_process import assert_refused, pretrain
from support.processes import (
    ROOT,
    SETTINGS,
    TINY_NETWORK,
    fork,
    free_port,
    run_script,
    wait,
    write_images,
    write_labelled_images,
)

from clever.entry import describe_failure, run_entry_point
from clever.utils import InputError

FLAGS = (*TINY_NETWORK, "--net", "CLeVER", "--batch_size_per_gpu", 4)
LONG = ("--epochs", 1000)


def start(*words, **options):
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | SETTINGS, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, **options,
    )  # fmt: skip


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    found = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in found if "resource_tracker" not in Path(f"/proc/{child}/cmdline").read_text()]


def read_until(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(process.stderr.read())


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc")
def test_a_data_loading_worker_that_is_killed(tmp_path):
    images = write_images(tmp_path / "images", 16)
    words = ("main_dino.py", *FLAGS, *LONG, "--data_path", images, "--output_dir", tmp_path / "run", "--num_workers", 1)
    with start(*words) as process:
        read_until(process, "epoch 0/1000 done")
        os.kill(children(process.pid)[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    [line] = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "a data loading worker has died" in line and "--num_workers" in line and "Traceback" not in errors


@pytest.mark.slow
def test_a_process_that_is_killed_ends_all_others(tmp_path):
    images = write_images(tmp_path / "images", 16)
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}")
    words = ("main_dino.py", *FLAGS, *LONG, "--data_path", images, "--output_dir", tmp_path / "run", "--num_workers", 0)
    with start(*launcher, *words) as process:
        read_until(process, "epoch 0/1000 done")
        killed = children(process.pid)[1]
        os.kill(killed, signal.SIGKILL)
        began = time.monotonic()
        _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - began < 60
    assert f"(pid: {killed})" in errors and "exitcode  : -9" in errors


def with_few_files(words, output):
    """The script in a process that may open 100 files."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
    run_script(words, {}, output, None)


def test_few_open_files(tmp_path):
    """150 batches from two workers, each of which has tensors in shared memory: once each of them kept a file open."""
    data = write_labelled_images(tmp_path / "data", train=100, val=2)
    network = (*FLAGS, "--data_path", data / "val", "--output_dir", tmp_path, "--epochs", 0, "--num_workers", 0)
    knn = ("--pretrained_weights", tmp_path / "checkpoint.pth", "--data_path", data, "--output_dir", tmp_path, "--nb_knn", 5)
    for words in (("main_dino.py", *network), ("eval_knn.py", *knn, "--batch_size_per_gpu", 2, "--num_workers", 2)):
        child = fork(with_few_files, list(map(str, words)), tmp_path / "out")
        assert wait([child]) == [0], (tmp_path / "out").read_text()
    assert "5-NN classifier result" in (tmp_path / "out").read_text()


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a.pth"), "a.pth: the quota is used up"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"), "a smaller --batch_size_per_gpu"),
        (MemoryError("Unable to allocate 9 TiB"), "out of memory"),
    ],
)
def test_failures_in_one_line(error, words):
    text = describe_failure(error)
    assert words in text and "\n" not in text


def test_a_variable_shows_the_traceback_of_any_error(monkeypatch, capsys):
    def main():
        raise InputError("wrong")

    for value, shown in (("0", False), ("1", True)):
        monkeypatch.setenv("CLEVER_TRACEBACK", value)
        with pytest.raises(SystemExit) as ended:
            run_entry_point(main)
        errors = capsys.readouterr().err
        assert ended.value.code == 2 and ("in main" in errors) == shown and errors.endswith("error: wrong\n")


def test_other_errors_keep_their_traceback():
    assert describe_failure(RuntimeError("shapes differ")) is None
    assert describe_failure(FileNotFoundError(errno.ENOENT, "No such file", "x")) is None


def test_a_reader_that_stops_ends_a_script_in_one_line(tmp_path):
    images = write_images(tmp_path / "images", 8)
    data = ("--data_path", images, "--output_dir", tmp_path / "run", "--num_workers", 0)
    with start("main_dino.py", *FLAGS, *LONG, *data) as process:
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 1
    assert errors.endswith("error: the program that reads the output has ended\n") and "Traceback" not in errors


def test_ctrl_c_saves_in_the_middle_of_an_epoch(tmp_path):
    """The terminal sends SIGINT to all processes, data loading workers included, and a launcher sends it once more."""
    images = write_images(tmp_path / "images", 16)
    words = ("main_dino.py", *FLAGS, *LONG, "--print_freq", 1, "--data_path", images, "--output_dir", tmp_path / "run")
    with start(*words, "--num_workers", 1) as process:
        read_until(process, "epoch 1/1000 1/4")
        os.killpg(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and errors.startswith("stopped by Ctrl-C: after step"), errors
    assert errors.count("\n") == 1 and (tmp_path / "run" / "checkpoint.pth").exists()


def test_a_process_that_waits_for_others_ends_at_once(tmp_path):
    group = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    code = (
        "import argparse; from clever import distributed; print('waiting', flush=True); p = argparse.ArgumentParser(); "
        "distributed.add_distributed_arguments(p); distributed.init_distributed(p.parse_args([]))"
    )
    main = f"from clever.entry import run_entry_point\ndef main():\n    {code}\nrun_entry_point(main)"
    command = [sys.executable, "-c", main]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | SETTINGS | group, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        time.sleep(2)
        process.terminate()
        assert process.wait(timeout=10) != 0


@pytest.mark.parametrize("name, value", [("RANK", "x"), ("RANK", "2")])
def test_variables_of_launchers_are_checked(name, value, tmp_path, monkeypatch):
    for variable, text in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", name: value}.items():
        monkeypatch.setenv(variable, text)
    monkeypatch.setattr("clever.entry.START_SECONDS", 0)
    outcome = pretrain(write_images(tmp_path / "images", 4), tmp_path / "run")
    assert_refused(outcome, f"{name}={value}")
