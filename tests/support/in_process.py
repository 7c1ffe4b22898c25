"""Entry points run inside the test's own process: a new Python takes seconds, this takes milliseconds."""

import contextlib
import io
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from support.processes import TINY_NETWORK

import eval_linear
import main_dino
from clever.entry import run_entry_point


class Outcome(NamedTuple):
    status: int
    stdout: str
    stderr: str


def call(main: Callable[[], None], *flags: object) -> Outcome:
    """Run an entry point's main with these arguments as the command line does."""
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", ["script", *map(str, flags)]))
        stack.enter_context(contextlib.redirect_stdout(stdout))
        stack.enter_context(contextlib.redirect_stderr(stderr))
        shown = stack.enter_context(warnings.catch_warnings(record=True))  # a user would see them on stderr
        warnings.simplefilter("ignore")
        for category in (UserWarning, RuntimeWarning, FutureWarning):
            warnings.simplefilter("default", category)
        try:
            run_entry_point(main)
        except SystemExit as end:
            status = end.code
    return Outcome(status, stdout.getvalue(), stderr.getvalue() + "".join(f"{warning.message}\n" for warning in shown))


def pretrain(data: Path, output: Path, *flags: object) -> Outcome:
    """main_dino.py with a tiny network for one epoch, unless the flags say otherwise."""
    common = ("--data_path", data, "--output_dir", output, "--epochs", 1, "--batch_size_per_gpu", 4, "--num_workers", 0)
    return call(main_dino.main, *TINY_NETWORK, *common, *flags)


def probe(weights: Path, data: Path, output: Path, *flags: object) -> Outcome:
    """eval_linear.py for one epoch, unless the flags say otherwise."""
    common = ("--pretrained_weights", weights, "--data_path", data, "--output_dir", output, "--epochs", 1)
    return call(eval_linear.main, *common, "--num_workers", 0, *flags)


def snapshot(folder: Path) -> dict[str, bytes] | None:
    """All files below a folder with their bytes; None if there is no such folder."""
    if not folder.exists():
        return None
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def times(folder: Path) -> dict[str, int]:
    """When each thing below a folder was last changed: quicker than a snapshot of large files."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def assert_refused(outcome: Outcome, *mentioned: str) -> None:
    """Exit status 2, and exactly one line on stderr, which holds all of `mentioned`."""
    assert outcome.status == 2, outcome
    lines = outcome.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), outcome.stderr
    for text in mentioned:
        assert text in lines[0], (text, lines[0])


def plain(value: object) -> bool:
    """Whether a value holds nothing but tensors and Python's own types, exactly (no subclass such as numpy's float64)."""
    if isinstance(value, dict):
        return all(type(key) in (str, int) and plain(item) for key, item in value.items())
    if type(value) in (list, tuple):
        return all(map(plain, value))
    return type(value) in (torch.Tensor, int, float, bool, str, type(None))
