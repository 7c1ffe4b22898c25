"""Progress lines, averages, log.txt and warnings of collapse."""

import fcntl
import json
import math
import os
import pty
import re
import select
import struct
import termios
import time

import pytest
import torch
from support.processes import fork, wait

from clever.progress import progress as progress_bar
from clever.training.telemetry import (
    CollapseWatch,
    TrainingProgress,
    append_log,
    epoch_line,
    feature_std,
    truncate_log,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # the device only says how late values are read


def scalar(value):
    return torch.tensor(float(value))


# --- progress ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_averages_are_over_all_steps(device):
    progress = TrainingProgress("epoch 0/1", 3, 8, device)
    for loss in (1, 2, 6):
        progress.update(loss=scalar(loss), entropy=scalar(10 * loss))
    assert progress.finish() == {"loss": 3.0, "entropy": 30.0}
    assert progress.done == 3


@pytest.mark.parametrize("device, step_of_the_error", [(CPU, 2), (CUDA, 3)])
def test_a_value_that_is_not_finite_is_named(device, step_of_the_error):
    progress = TrainingProgress("epoch 4/9", 5, 1, device)
    for step in (1, 2, 3):
        loss, loss_dir = (math.nan, -math.inf) if step == 2 else (1, 1)
        losses = {"loss": scalar(loss), "loss_DVR": scalar(1), "loss_DIR": scalar(loss_dir)}
        if step < step_of_the_error:
            progress.update(**losses)
            continue
        with pytest.raises(FloatingPointError, match=r"^epoch 4/9, step 2 of 5: loss is nan, loss_DIR is -inf$"):
            progress.update(**losses)
        break


def test_a_value_of_the_last_step_that_is_not_finite_is_named_at_the_end():
    progress = TrainingProgress("epoch 4/9", 1, 1, CUDA)
    progress.update(loss=scalar(math.nan))
    with pytest.raises(FloatingPointError, match="step 1 of 1: loss is nan"):
        progress.finish()


def test_lines_come_early_then_every_print_freq_steps_and_at_the_end(capsys):
    progress = TrainingProgress("epoch 2/5", 9, 4, CPU, print_freq=4)
    for step in range(9):
        progress.update(loss=scalar(step), normalized_loss=scalar(0.5).bfloat16(), feature_std=scalar(3))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:3] for line in lines] == [
        [f"epoch 2/5 {done}/9", f"loss {done - 1}", "normalized_loss 0.5"] for done in (3, 4, 8, 9)
    ]
    assert all(re.search(r"img/s  \d+\.\d GiB  left", line) and "feature_std" not in line for line in lines)
    assert lines[-1].endswith("left 00:00 epoch, 00:00 run")


def run_on(terminal):
    """Two epochs and a progress bar, in a process whose output goes to this terminal."""
    os.environ["TERM"] = "xterm"  # with that of the tests, perhaps "dumb", nothing would be redrawn
    descriptor = os.open(terminal, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    for epoch in range(2):
        progress = TrainingProgress(f"epoch {epoch}/2", 30, 8, CPU, 10, epochs_after=1)
        for step in range(30):
            time.sleep(0.02)
            progress.update(loss=scalar(step), normalized_loss=scalar(0.5))
        progress.finish()
        print(f"epoch {epoch} done", flush=True)
    with progress_bar("features", 30) as meter:
        for _ in range(30):
            time.sleep(0.02)
            meter.update()


def in_terminal(columns):
    """What is seen on a pseudo-terminal of this width."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = fork(run_on, os.ttyname(child))
    text = b""
    while process.is_alive() or select.select([parent], [], [], 0)[0]:
        if select.select([parent], [], [], 0.1)[0]:
            text += os.read(parent, 65536)
    os.close(child)
    os.close(parent)
    assert wait([process]) == [0], text
    return text.decode()


@pytest.mark.parametrize("columns", [80, 200])
def test_on_a_terminal_one_line_redraws_itself(columns):
    pytest.importorskip("tqdm")
    text = in_terminal(columns)
    drawn = [part for part in re.split(r"[\r\n]", text) if part.strip()]
    bars = [part for part in drawn if " epoch 1/2 " in part]
    assert len(bars) > 2 and all(len(part) <= columns for part in drawn)
    assert all(re.match(r".{10} epoch 1/2 \d+/30  loss \d+  normalized_loss 0.5  ", part) for part in bars)
    if columns == 200:
        assert re.search(r"  \d+\.\d img/s  \d\.\d GiB  left 00:0\d epoch, 00:0\d run *$", bars[-1])
    final = [line.split("\r")[-1] for line in text.split("\r\n")]  # what remains: bars are wiped out
    assert final[:2] == ["epoch 0 done", "epoch 1 done"] and re.match(r"features 30/30 +[\d.]+ img/s  left 00:00", final[2])
    assert len(final) == 4 and final[3] == ""


def test_epoch_line_has_losses_and_the_time_left():
    record = {"train_loss": 1.23456, "train_lr": 1e-4, "epoch": 1, "seconds": 90.0, "memory_gib": 2.5}
    line = epoch_line(1, 4, record)
    assert line == "epoch 1/4 done in 90 s: loss 1.235  lr 0.0001  2.5 GiB  left 03:00"


# --- log.txt -----------------------------------------------------------------------------------------------------------


def test_truncate_log_drops_later_and_half_written_lines(tmp_path):
    path = tmp_path / "log.txt"
    for epoch in range(4):
        append_log(path, {"train_loss": 0.1 + epoch, "epoch": epoch})
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], lines[3][:-5]]))
    truncate_log(path, 3)
    assert path.read_text() == "".join(lines[:3])
    append_log(path, {"train_loss": 7.0, "epoch": 3})
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]
    truncate_log(path, 1)
    assert path.read_text() == lines[0]
    truncate_log(path, 0)
    assert path.read_text() == ""


# --- collapse ----------------------------------------------------------------------------------------------------------


def test_feature_std_tells_constant_from_random_features():
    torch.manual_seed(0)
    assert feature_std(torch.randn(1, 96).expand(64, 96)).item() == pytest.approx(0, abs=1e-6)
    assert feature_std(torch.randn(2048, 96)).item() == pytest.approx(1, abs=0.02)
    z = torch.randn(2048, 96)
    assert feature_std(100 * z).item() == pytest.approx(feature_std(z).item(), rel=1e-5)
    assert 0.2 < feature_std(z + 2).item() < 0.6  # a common part takes its share: 1 / sqrt(1 + 2^2) = 0.45


HEALTHY = {"normalized_loss": 0.8, "feature_std_IR": 0.6, "feature_std_EF": 0.5}


@pytest.mark.parametrize(
    "means, words",
    [
        ({"normalized_loss": 0.9999}, ("the loss stays at ln(out_dim)", "--warmup_epochs")),
        ({"feature_std_EF": 1e-3}, ("feature_std_EF is 1.0e-03", "all images get the same features", "--lr")),
    ],
)
def test_collapse_is_reported_after_2_4_and_8_epochs(means, words):
    watch = CollapseWatch()
    warned = {epoch: found for epoch in range(1, 17) if (found := watch.update(HEALTHY | means))}
    assert list(warned) == [2, 4, 8, 16]
    for warnings in warned.values():
        assert len(warnings) == 1 and all(word in warnings[0] for word in words)


@pytest.mark.parametrize("means", [{}, {"normalized_loss": 0.99}, {"normalized_loss": 1.01}, {"feature_std_IR": 0.02}])
def test_epochs_that_are_no_collapse(means):
    watch = CollapseWatch()
    assert [watch.update(HEALTHY | means) for _ in range(4)] == [[]] * 4
