"""Real processes for tests, and the small image folders that they read.

`launch` starts a script as a user does, which takes seconds: every process imports torch anew. `run` and `fork` take
milliseconds: they fork a server that has imported everything once and has computed nothing. All run on one CPU thread each,
so that equal work gives equal bits.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
TIMEOUT = 300  # seconds; a process that takes longer hangs
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")])),
}

# A network that trains in milliseconds: vit_micro on 4 x 4 and 2 x 2 patches.
TINY_NETWORK = (
    "--arch", "vit_micro", "--patch_size", 8, "--global_crops_size", 32, "--local_crops_size", 16, "--local_crops_number", 2,
    "--out_dim", 64, "--DVR_out_dim", 32, "--head_hidden_dim", 64, "--head_bottleneck_dim", 32, "--use_fp16", "false",
    "--warmup_epochs", 1, "--print_freq", 1,
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


# --- image folders -----------------------------------------------------------------------------------------------------


def write_images(folder: Path, count: int, seed: int = 0, tint: int = 0) -> Path:
    """`count` random textures of 40 x 32 pixels as PNG files in `folder`; `tint` is added to the red channel."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 190, (8, 10, 3), dtype=np.uint8)).resize((40, 32), Image.Resampling.BICUBIC)
        pixels = np.asarray(coarse).astype(int) + rng.integers(-20, 20, (32, 40, 3)) + [tint, 0, 0]
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:02}.png")
    return folder


def write_labelled_images(folder: Path, train: int, val: int) -> Path:
    """Three classes of that many textures each under train/ and val/, in three shades; one class has one more for val."""
    for label, name in enumerate(("cyan", "grey", "red")):
        write_images(folder / "train" / name, train, seed=label, tint=30 * label)
        write_images(folder / "val" / name, val + (label == 1), seed=10 + label, tint=30 * label)
    return folder


# --- scripts under a launcher ------------------------------------------------------------------------------------------


def launch(launcher: str, script: str, *flags: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Start a script with `python -m <launcher>`, or plainly where `launcher` is empty, and wait for its end.

    Raises subprocess.TimeoutExpired if it hangs; its processes are then killed.
    """
    command = [sys.executable]
    if launcher:
        command += ["-m", launcher, f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    command += [ROOT / script, *flags]
    with subprocess.Popen(
        list(map(str, command)), env=os.environ | SETTINGS, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            stdout, stderr = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


# --- forks -------------------------------------------------------------------------------------------------------------


def run(
    script: str, *flags: object, output: Path, processes: int = 1, kill_at: str | None = None, expect: int = 0, target=None,
    **variables: str,
) -> str:  # fmt: skip
    """Run main() of a script in forks, in a process group if there are several; returns what they wrote to `output` so far.

    `variables` are added to the environment. `target`: called in place of `run_script`.
    With `kill_at` the first process gets SIGKILL as soon as it prints this text, and the others then, as if the machine
    had failed. Otherwise asserts that all end with the exit status `expect`.
    """
    words = [script, *map(str, flags)]
    children = []
    port = str(free_port())
    for rank in range(processes):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        group = {name: str(value) for name, value in group.items()} if processes > 1 else {}
        children.append(fork(target or run_script, words, variables | group, output, kill_at))
    if kill_at:
        children[0].join(TIMEOUT)
        status = children[0].exitcode
        end(children)
        assert status == -signal.SIGKILL, f"not killed at {kill_at!r} but ended with {status}:\n{output.read_text()}"
    else:
        statuses = wait(children)
        assert statuses == [expect] * processes, f"exit status {statuses}:\n{output.read_text()}"
    return output.read_text()


def fork(target, *args: object) -> multiprocessing.Process:
    """A process that runs a module's function `target(*args)`, forked from the server (started at the first call)."""
    context = multiprocessing.get_context("forkserver")
    evaluations = ["linear", "linear_ds", "knn", "saliency", "video_segmentation", "equivariance"]
    scripts = ["main_dino", "embed", *(f"eval_{name}" for name in evaluations)]
    context.set_forkserver_preload(["pytest", "support.processes", *scripts])
    with mock.patch.dict(os.environ, SETTINGS):
        forkserver.ensure_running()
        process = context.Process(target=target, args=args)
        process.start()
    return process


def wait(children: list[multiprocessing.Process]) -> list[int | None]:
    """Exit statuses; None for those that still ran at the end of the time, which are killed."""
    deadline = time.monotonic() + TIMEOUT
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
    statuses = [child.exitcode for child in children]
    end(children)
    return statuses


def end(children: list[multiprocessing.Process]) -> None:
    for child in children:
        child.kill()
        child.join()


class _KillingStream:
    """A text stream that kills its process as soon as `marker` has been written."""

    def __init__(self, stream, marker: str):
        self.stream, self.marker = stream, marker

    def write(self, text: str) -> None:
        self.stream.write(text)
        if self.marker in text:
            self.stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    def isatty(self) -> bool:
        return False

    def flush(self) -> None:
        self.stream.flush()


def run_script(words, variables, output, kill_at):
    import torch

    from clever.entry import run_entry_point

    multiprocessing.set_start_method("fork", force=True)  # data loading processes need not import torch anew either
    os.environ.update(variables)
    sys.argv = words
    torch.set_num_threads(1)
    with open(output, "a", buffering=1) as stream:
        stdout = _KillingStream(stream, kill_at) if kill_at else stream
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stream):
            run_entry_point(importlib.import_module(words[0].removesuffix(".py")).main)
