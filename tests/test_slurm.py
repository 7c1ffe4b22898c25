"""`srun python script.py`: process groups from Slurm's variables, and processes that do not find each other."""

import os
import socket
import time

import pytest
from support.processes import TINY_NETWORK, fork, free_port, run, run_script, wait, write_images
from test_resume import assert_same

from clever.checkpoint import load_checkpoint
from clever.distributed import start

FLAGS = (*TINY_NETWORK, "--net", "CLeVER", "--epochs", 1, "--num_workers", 0)
GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "flat", 16)


@pytest.fixture
def task(monkeypatch):
    """Makes this process the task of srun that the variables describe; returns the variables of its process group."""

    def adopt(**variables):
        monkeypatch.setattr(os, "environ", {f"SLURM_{name}": str(value) for name, value in variables.items()})
        start.adopt_slurm_variables()
        return [os.environ.get(name) for name in GROUP]

    return adopt


@pytest.mark.parametrize(
    "hosts, first",
    [("gpu7", "gpu7"), ("gpu[07-09,12],login", "gpu07"), ("a,b", "a"), ("r[1-2]n[03,05]", "r1n03"), ("n[5]x,m", "n5x"),
     ("node-1.site", "node-1.site")],
)  # fmt: skip
def test_first_host(hosts, first):
    assert start.first_host(hosts) == first


def test_variables_of_a_task(task):
    step = {"STEP_NUM_TASKS": 11, "STEP_NODELIST": "gpu[07-09]", "STEP_TASKS_PER_NODE": "4(x2),3", "JOB_ID": 123456}
    assert task(PROCID=9, LOCALID=1, NODEID=2, **step) == ["9", "11", "1", "4", "gpu07", "23456"]


def test_a_task_of_its_own_runs_alone(task):
    assert task(PROCID=0, NTASKS=4) == [None] * 6  # the script of sbatch
    assert task(PROCID=0, STEP_NUM_TASKS=1, STEP_NODELIST="a", STEP_TASKS_PER_NODE="1") == [None] * 6
    assert task() == [None] * 6


def test_two_tasks_are_two_processes_of_torchrun(images, tmp_path):
    words = ["main_dino.py", *map(str, (*FLAGS, "--data_path", images, "--batch_size_per_gpu", 4))]
    step = {"STEP_NUM_TASKS": 2, "STEP_NODELIST": socket.gethostname(), "STEP_TASKS_PER_NODE": 2, "NODEID": 0}
    children = []
    for rank, port in enumerate([str(free_port())] * 2):
        variables = {f"SLURM_{name}": str(value) for name, value in {**step, "PROCID": rank, "LOCALID": rank}.items()}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        children.append(fork(run_script, [*words, "--output_dir", str(tmp_path / "srun")], variables, tmp_path / "out", None))
    assert wait(children) == [0, 0], (tmp_path / "out").read_text()
    assert (tmp_path / "out").read_text().count("processes: 2") == 1
    run(*words, "--output_dir", tmp_path / "run", processes=2, output=tmp_path / "out2")
    states = [load_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("srun", "run")]
    assert_same(states[0]["student"], states[1]["student"])


# --- processes that do not find each other -----------------------------------------------------------------------------


def refused(images, folder, *flags, **variables):
    """What the first of two processes prints, which ends with exit status 2 before anything is written."""
    group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    began = time.monotonic()
    words = ("--data_path", images, "--output_dir", folder / "run", *flags)
    text = run("main_dino.py", *FLAGS, *words, output=folder / "out", expect=2, **(group | variables))
    assert time.monotonic() - began < 60 and not (folder / "run").exists()
    [line] = [line for line in text.splitlines() if line.startswith("error: ")]
    return line


def test_a_port_in_use(images, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        line = refused(images, tmp_path, MASTER_PORT=str(server.getsockname()[1]))
    assert "do not find each other" in line and "PORT_NUM" in line
