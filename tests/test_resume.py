"""Runs that are killed and started again, and files that are whole at any moment."""

import errno
import json
import os
import random
import shutil
import signal
import time

import pytest
import torch
from support import in_process
from support.in_process import assert_refused, snapshot
from support.processes import TINY_NETWORK, end, fork, launch, run, write_images, write_labelled_images

from clever.checkpoint import load_checkpoint, save_atomically


def assert_same(actual, expected, where="state"):
    """Equal in structure and in every bit."""
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected), where
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for name in expected:
            assert_same(actual[name], expected[name], f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for i, pair in enumerate(zip(actual, expected, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    else:
        assert type(actual) is type(expected) and actual == expected, where


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def names(folder):
    return {path.name for path in folder.iterdir()}


# --- pretraining -------------------------------------------------------------------------------------------------------

EPOCHS = 4
STEPS = 5  # per epoch; the images of the last batch are dropped


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "flat", 22)


def pretrain(images, folder, *flags, output, processes=1, kill_at=None):
    return run(
        "main_dino.py", *TINY_NETWORK, "--net", "CLeVER", "--drop_path_rate", 0.3, "--lr", 0.032, "--data_path", images,
        "--output_dir", folder, "--epochs", EPOCHS, "--batch_size_per_gpu", 4 // processes, "--num_workers", 1,
        "--saveckp_freq", 2, *flags, output=output, processes=processes, kill_at=kill_at,
    )  # fmt: skip


@pytest.fixture(scope="module", params=[1, 2], ids=["1-process", "2-processes"])
def uninterrupted(images, tmp_path_factory, request):
    """A run of all epochs, and the number of its processes."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    pretrain(images, folder / "run", output=folder / "output", processes=request.param)
    return folder / "run", request.param


def test_files_of_a_run(uninterrupted):
    folder, _ = uninterrupted
    checkpoints = {"checkpoint.pth", "checkpoint0000.pth", "checkpoint0002.pth"}
    assert names(folder) == {*checkpoints, "log.txt", "checked_images.npy", "config.yaml"}
    epochs = {name: load_checkpoint(folder / name)["epoch"] for name in names(folder) if name.endswith(".pth")}
    assert epochs == {"checkpoint.pth": 4, "checkpoint0000.pth": 1, "checkpoint0002.pth": 3}  # the next one to run
    log = read_log(folder)
    assert [record["epoch"] for record in log] == [0, 1, 2, 3]
    for record in log:
        parts = record["train_loss_DIR"] + record["train_loss_DVR"] + record["train_loss_student_reg"]
        assert record["train_loss"] == pytest.approx(parts, rel=1e-5)
        assert record["train_loss_student_reg"] > 0


def test_a_killed_run_started_again_ends_in_the_same_bits(images, uninterrupted, tmp_path):
    whole, processes = uninterrupted
    folder, output = tmp_path / "run", tmp_path / "output"
    pretrain(images, folder, output=output, processes=processes, kill_at=f"epoch 2/{EPOCHS} 3/{STEPS} ")
    assert load_checkpoint(folder / "checkpoint.pth")["epoch"] == 2
    assert [record["epoch"] for record in read_log(folder)] == [0, 1]
    # What a kill between log.txt and checkpoint.pth leaves, and one in the middle of a line.
    with open(folder / "log.txt", "a") as log:
        log.write('{"train_loss": 0.5, "epoch": 2}\n{"train_loss": 0.2')

    text = pretrain(images, folder, output=output, processes=processes)
    assert f"continuing {folder} from epoch 2" in text
    assert names(folder) == names(whole)
    for name in ("checkpoint.pth", "checkpoint0002.pth"):
        expected, actual = load_checkpoint(whole / name), load_checkpoint(folder / name)
        assert expected.keys() == actual.keys() >= {"student", "teacher", "optimizer", "dino_loss", "epoch"}
        assert len(expected["optimizer"]["state"]) > 50
        for part in expected.keys() - {"args"}:
            assert_same(actual[part], expected[part], part)
    measured = {"seconds", "memory_gib", "train_images_per_second"}
    logs = [[{k: v for k, v in record.items() if k not in measured} for record in read_log(f)] for f in (folder, whole)]
    assert logs[0] == logs[1] and len(logs[0]) == EPOCHS


def test_a_finished_run_started_again_changes_nothing(images, tmp_path):
    folder, output = tmp_path / "run", tmp_path / "output"
    flags = ("--epochs", 1, "--saveckp_freq", 0)
    pretrain(images, folder, *flags, output=output)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert before.keys() == {"checkpoint.pth", "log.txt", "checked_images.npy", "config.yaml"}
    text = pretrain(images, folder, *flags, output=output)
    assert text.count("epoch 0/1 done") == 1 and text.count(f"done: {folder}") == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_zero_epochs_write_the_network_that_training_starts_from(images, tmp_path):
    folder, output = tmp_path / "run", tmp_path / "output"
    pretrain(images, folder, "--epochs", 0, output=output)
    assert names(folder) == {"checkpoint.pth", "checked_images.npy", "config.yaml"}
    state = load_checkpoint(folder / "checkpoint.pth")
    assert state["epoch"] == 0 and state["optimizer"]["state"] == {}
    assert_same(state["teacher"], state["student"])
    assert state["dino_loss"]["center"].abs().sum() == 0
    # The warm-up starts at 0, so an epoch of a single step leaves the student where it was.
    shutil.rmtree(folder)
    pretrain(images, folder, "--epochs", 1, "--batch_size_per_gpu", 22, output=output)
    trained = load_checkpoint(folder / "checkpoint.pth")
    assert trained["epoch"] == 1
    assert_same(trained["student"], state["student"])


# --- the probe ---------------------------------------------------------------------------------------------------------


def test_a_killed_probe_started_again_ends_in_the_same_bits(tmp_path):
    data, output = write_labelled_images(tmp_path / "data", train=4, val=2), tmp_path / "output"
    run("main_dino.py", *TINY_NETWORK, "--data_path", data / "train", "--output_dir", tmp_path, "--epochs", 0,
        "--batch_size_per_gpu", 4, "--num_workers", 0, output=output)  # fmt: skip

    def probe(folder, kill_at=None):
        return run(
            "eval_linear.py", "--pretrained_weights", tmp_path / "checkpoint.pth", "--data_path", data, "--output_dir", folder,
            "--epochs", 4, "--lr", "0.50", "--else_part", "else_part", "--batch_size_per_gpu", 5, "--val_freq", 3,
            "--num_workers", 1, output=output, kill_at=kill_at,
        )  # fmt: skip

    whole, folder, name = tmp_path / "whole", tmp_path / "killed", "linear_hp0.8_else_0.50_4_"
    probe(whole)
    assert names(whole) == {f"checkpoint_{name}.pth.tar", f"{name}.json"}
    probe(folder, kill_at="epoch 2/4 3/3 ")
    assert names(folder) == {f"checkpoint_{name}.pth.tar", f"checkpoint_{name}.pth.tar.lock"}  # the next run removes it
    assert load_checkpoint(folder / f"checkpoint_{name}.pth.tar")["epoch"] == 2
    assert "from epoch 2" in probe(folder)
    states = [load_checkpoint(f / f"checkpoint_{name}.pth.tar") for f in (folder, whole)]
    results = [json.loads((f / f"{name}.json").read_text()) for f in (folder, whole)]
    for record in (*states, *results):
        del record["args"]  # the output folders differ
    assert states[0]["state_dict"]["linear.weight"].norm() > 0.2  # from 0.01 per entry
    assert_same(states[0], states[1])
    assert results[0] == results[1]

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    probe(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# --- one file ----------------------------------------------------------------------------------------------------------


def save_again_and_again(path):
    """Growing states, each of a single number throughout, from where the file stands."""
    step = load_checkpoint(path)["step"] if path.exists() else 0
    while True:
        step += 1
        save_atomically({"step": step, "tensors": [torch.full((50_000 + 1000 * step,), float(step))] * 2}, path)


def test_a_checkpoint_survives_a_kill_at_any_moment(tmp_path):
    path, temporary = tmp_path / "checkpoint.pth", tmp_path / "checkpoint.pth.tmp"
    rng = random.Random(0)
    last, halves = 0, 0
    for _ in range(10):
        child = fork(save_again_and_again, path)
        deadline = time.monotonic() + 60
        written = path.stat().st_mtime_ns if path.exists() else 0
        while not path.exists() or path.stat().st_mtime_ns == written:
            assert time.monotonic() < deadline and child.is_alive()
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        end([child])
        assert child.exitcode == -signal.SIGKILL
        halves += temporary.exists()
        state = load_checkpoint(path)
        step = state["step"]
        assert step > last
        for tensor in state["tensors"]:
            assert len(tensor) == 50_000 + 1000 * step and bool((tensor == step).all())
        last = step
    assert halves > 1  # kills came while a new file was being written


def fill_the_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_half(obj, file):
    file.write(b"half a checkpoint")
    fill_the_disk()


@pytest.mark.parametrize(
    "module, name, fail", [(os, "fsync", fill_the_disk), (os, "replace", fill_the_disk), (torch, "save", write_half)]
)
def test_a_full_disk_leaves_the_old_checkpoint(monkeypatch, tmp_path, module, name, fail):
    path = tmp_path / "checkpoint.pth"
    save_atomically({"step": 1}, path)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail)
        with pytest.raises(OSError, match="No space left"):
            save_atomically({"step": 2}, path)
    assert path.read_bytes() == before
    save_atomically({"step": 3}, path)
    assert load_checkpoint(path) == {"step": 3} and names(tmp_path) == {"checkpoint.pth"}


def test_plain_python_continues_a_run(images, tmp_path):
    """The one launch without a launcher; all others here run in forks."""
    folder = tmp_path / "run"
    pretrain(images, folder, "--epochs", 1, output=tmp_path / "output")
    process = launch(
        "", "main_dino.py", *TINY_NETWORK, "--net", "CLeVER", "--data_path", images, "--output_dir", folder,
        "--epochs", 2, "--batch_size_per_gpu", 4, "--num_workers", 0,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert f"continuing {folder} from epoch 1" in process.stdout and "processes: 1;" in process.stdout
    assert [record["epoch"] for record in read_log(folder)] == [0, 1]


def test_files_of_others_in_the_output_folder_are_kept(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("# my comments\nnet: dino\n")
    (run / "log.txt").write_text("my notes\n")
    outcome = in_process.pretrain(write_images(tmp_path / "images", 8), run, "--config", run / "config.yaml")
    assert outcome.status == 0 and "config.yaml is kept as config.1.yaml" in outcome.stdout, outcome
    assert (run / "config.1.yaml").read_text().startswith("# my comments") and (run / "log.1.txt").read_text() == "my notes\n"
    assert json.loads((run / "log.txt").read_text())["epoch"] == 0
    # The run's own files are continued.
    outcome = in_process.pretrain(tmp_path / "images", run, "--config", run / "config.yaml", "--epochs", 2)
    assert outcome.status == 0 and "is kept as" not in outcome.stdout and len((run / "log.txt").read_text().splitlines()) == 2


@pytest.mark.parametrize("is_empty", [False, True])
def test_the_log_of_a_run_without_a_checkpoint_is_its_own(tmp_path, is_empty):
    """A full disk may end a run before its first checkpoint: the same command leaves no second log."""
    images, run = write_images(tmp_path / "images", 8), tmp_path / "run"
    in_process.pretrain(images, run)
    files = sorted(run.iterdir())
    (run / "checkpoint.pth").unlink()
    if is_empty:
        (run / "log.txt").write_text("")
    outcome = in_process.pretrain(images, run)
    assert outcome.status == 0 and sorted(run.iterdir()) == files, outcome
    assert [record["epoch"] for record in read_log(run)] == [0]


@pytest.mark.parametrize("name, value", [("args", None), ("epoch", -1), ("optimizer", {}), ("epoch_so_far", {"epoch": 1})])
def test_a_damaged_state_is_refused_in_a_line(tmp_path, name, value):
    images = write_images(tmp_path / "images", 8)
    assert in_process.pretrain(images, tmp_path / "run").status == 0
    path = tmp_path / "run" / "checkpoint.pth"
    torch.save(torch.load(path, weights_only=True) | {name: value}, path)
    before = snapshot(tmp_path / "run")
    outcome = in_process.pretrain(images, tmp_path / "run", "--epochs", 2)
    assert_refused(outcome, "checkpoint.pth: damaged, or of another script")
    assert snapshot(tmp_path / "run") == before
