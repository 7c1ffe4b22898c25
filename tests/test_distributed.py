"""Several processes do what one does: losses and weights, probes and their evaluation, and errors."""

import argparse
import contextlib
import json
import math
import os
import re
import time

import pytest
import torch
from support.golden import rel_error
from support.processes import TINY_NETWORK, fork, free_port, launch, run, wait, write_images, write_labelled_images

import main_dino
from clever import distributed, entry
from clever.checkpoint import load_checkpoint, save_atomically
from clever.entry import run_entry_point
from clever.training.build import build_networks
from clever.training.telemetry import TrainingProgress
from clever.utils import InputError


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


# --- pretraining -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "flat", 24)


# No epoch with still last layers, and a quick teacher: everything moves.
FLAGS = (*TINY_NETWORK, "--drop_path_rate", 0, "--lr", 0.032, "--freeze_last_layer", 0, "--momentum_teacher", 0.9)


def test_two_processes_of_half_the_batch_are_one_of_the_whole(images, tmp_path):
    labelled = write_labelled_images(tmp_path / "labelled", train=4, val=4)
    flags = (*FLAGS, "--net", "CLeVER", "--data_path", images, "--epochs", 2, "--knn_data", labelled, "--knn_freq", 1)
    two = launch(
        "torch.distributed.launch", "main_dino.py", *flags, "--output_dir", tmp_path / "2", "--batch_size_per_gpu", 4,
        "--num_workers", 0,
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    assert "3 steps per epoch of 8 images, processes: 2" in two.stdout
    assert len(re.findall(r"^epoch 1/2 3/3 ", two.stdout, re.MULTILINE)) == 1  # one voice
    run("main_dino.py", *flags, "--output_dir", tmp_path / "1", "--batch_size_per_gpu", 8, "--num_workers", 1,
        output=tmp_path / "output")  # fmt: skip

    logs = [read_log(tmp_path / number) for number in "12"]
    assert [[record["epoch"] for record in log] for log in logs] == [[0, 1], [0, 1]]
    own = {"seconds", "memory_gib", "train_images_per_second", "train_feature_std_IR", "train_feature_std_EF"}
    for one, two in zip(*logs, strict=True):
        assert one.keys() == two.keys() >= {"train_loss", "train_loss_DIR", "train_loss_DVR", "knn_top1"}
        for name in one.keys() - own:
            assert two[name] == pytest.approx(one[name], rel=1e-5), name
    states = [load_checkpoint(tmp_path / number / "checkpoint.pth") for number in "12"]
    start = build_networks(parse(*flags), torch.device("cpu"))[0].state_dict()
    moved = rel_error(states[0]["student"]["backbone.blocks.0.mlp.fc1.weight"], start["backbone.blocks.0.mlp.fc1.weight"])
    assert moved > 0.01  # the steps are a thousand times larger than what is allowed between the two
    for part in ("student", "teacher", "dino_loss"):
        assert states[0][part].keys() == states[1][part].keys()
        for name, value in states[0][part].items():
            if not name.endswith("qkv.bias"):  # its key third has a gradient of zero, which Adam turns into noise
                assert rel_error(states[1][part][name], value) < 1e-5, (part, name)


def parse(*flags):
    return main_dino.get_args_parser().parse_args(list(map(str, flags)))


def test_a_non_finite_loss_stops_all_processes_and_leaves_the_last_good_checkpoint(images, tmp_path):
    flags = (*FLAGS, "--net", "CLeVER", "--data_path", images, "--num_workers", 0, "--output_dir", tmp_path)
    run("main_dino.py", *flags, "--epochs", 1, "--batch_size_per_gpu", 8, output=tmp_path / "output")
    path = tmp_path / "checkpoint.pth"
    state = load_checkpoint(path)
    state["student"]["head2.last_layer.weight_v"][3] = math.nan
    save_atomically(state, path)
    before = path.read_bytes(), (tmp_path / "log.txt").read_text()

    more = ("--epochs", 3, "--batch_size_per_gpu", 4)
    text = run("main_dino.py", *flags, *more, processes=2, expect=1, output=tmp_path / "both")
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "epoch 1/3, step 1 of 3" in errors[0] and "loss_DVR is nan" in errors[0], text
    assert "loss_DIR" not in errors[0] and str(path) in errors[0]
    assert (path.read_bytes(), (tmp_path / "log.txt").read_text()) == before
    assert load_checkpoint(tmp_path / "nonfinite.pth")["epoch"] == 1


def one_process_has_nan(rank, port, output):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    progress = TrainingProgress("epoch 7/9", 5, 1, torch.device("cpu"))
    progress.update(loss=torch.tensor(1.0), center_norm=torch.tensor(2.0))
    try:
        progress.update(loss=torch.tensor(math.inf if rank == 1 else 1.0), center_norm=torch.tensor(2.0))
    except FloatingPointError as error:
        output.write_text(str(error))
    torch.distributed.destroy_process_group()


def test_a_value_that_is_not_finite_in_one_process_is_seen_by_all(tmp_path):
    port = free_port()
    outputs = [tmp_path / "0", tmp_path / "1"]
    assert wait([fork(one_process_has_nan, rank, port, output) for rank, output in enumerate(outputs)]) == [0, 0]
    assert [output.read_text() for output in outputs] == ["epoch 7/9, step 2 of 5: loss is inf"] * 2


def processes_are_refused(rank, port, output, messages):
    def main():
        for name, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            os.environ[name] = str(value)
        parser = argparse.ArgumentParser()
        distributed.add_distributed_arguments(parser)
        distributed.init_distributed(parser.parse_args([]))
        raise InputError(messages[rank])

    entry.GRACE_SECONDS = 300.0  # longer than any machine takes
    with open(output, "w") as stream, contextlib.redirect_stderr(stream):
        run_entry_point(main)


@pytest.mark.parametrize("messages, printed", [(["same", "same"], ["error: same\n", ""]),
                                               (["a", "b"], ["error: a\n", "error: b\n"])])  # fmt: skip
def test_an_error_of_all_processes_is_printed_once_without_waiting(messages, printed, tmp_path):
    port, outputs, start = free_port(), [tmp_path / "0", tmp_path / "1"], time.monotonic()
    children = [fork(processes_are_refused, rank, port, output, messages) for rank, output in enumerate(outputs)]
    assert wait(children) == [2, 2] and time.monotonic() - start < 200
    assert [output.read_text() for output in outputs] == printed


def one_process_is_refused(rank, output):
    def main():
        if rank == 1:
            raise InputError("no such thing")

    os.environ["RANK"] = str(rank)
    entry.START_SECONDS = 0.1
    with open(output, "w") as stream, contextlib.redirect_stderr(stream):
        run_entry_point(main)


def test_an_error_of_one_process_only_is_printed(tmp_path):
    outputs = [tmp_path / "0", tmp_path / "1"]
    assert wait([fork(one_process_is_refused, rank, output) for rank, output in enumerate(outputs)]) == [0, 2]
    assert [output.read_text() for output in outputs] == ["", "error: no such thing\n"]


@pytest.mark.parametrize("flag", ["--local_rank", "--local-rank"])
def test_both_spellings_of_the_local_rank(flag):
    assert parse(flag, 3, "--data_path", "x").local_rank == 3


# --- the probe ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """An untrained CLeVER network, labelled images (12 and 13), and what its main_part probe got at the end of training."""
    folder = tmp_path_factory.mktemp("probed")
    data = write_labelled_images(folder / "data", train=4, val=4)
    run("main_dino.py", *TINY_NETWORK, "--net", "CLeVER", "--data_path", data / "train", "--output_dir", folder,
        "--epochs", 0, "--batch_size_per_gpu", 4, "--num_workers", 0, output=folder / "output")  # fmt: skip
    flags = (
        "--pretrained_weights", folder / "checkpoint.pth", "--data_path", data, "--else_part", "main_part",
        "--epochs", 3, "--lr", 0.5, "--trial_name", "t",
    )  # fmt: skip
    run("eval_linear.py", *flags, "--output_dir", folder, "--batch_size_per_gpu", 4, "--num_workers", 1,
        output=folder / "output")  # fmt: skip
    return folder, flags, json.loads((folder / "linear_hp0.8_0.5_3_t.json").read_text())


def test_evaluation_repeats_the_accuracy_of_training_and_counts_every_image_once(probed, tmp_path):
    source, flags, trained = probed
    name = "linear_hp0.8_0.5_3_t"
    text = run("eval_linear.py", *flags, "--output_dir", tmp_path, "--evaluate", "--final_eval_weights",
               source / f"checkpoint_{name}.pth.tar", "--batch_size_per_gpu", 3, "--num_workers", 0,
               processes=2, output=tmp_path / "output")  # fmt: skip
    result = json.loads((tmp_path / f"only_eval_ori_{name}.json").read_text())
    assert result["num_test_images"] == trained["num_test_images"] == 13
    assert result["accuracy"] == trained["accuracy"]
    assert result["test_loss"] == pytest.approx(trained["test_loss"], rel=1e-6)
    assert f"Accuracy of the network on the 13 test images: {trained['accuracy']:.2f}%" in text
    assert any(result["accuracy"] == 100 * hits / 13 for hits in range(14))


def test_probe_trained_by_two_processes_is_that_of_one(probed, tmp_path):
    source, flags, trained = probed
    run("eval_linear.py", *flags, "--output_dir", tmp_path, "--batch_size_per_gpu", 2, "--num_workers", 0, processes=2,
        output=tmp_path / "output")  # fmt: skip
    name = "checkpoint_linear_hp0.8_0.5_3_t.pth.tar"
    two, one = (load_checkpoint(folder / name) for folder in (tmp_path, source))
    assert one["state_dict"]["linear.weight"].norm() > 0.5  # far from its start
    for key, value in one["state_dict"].items():
        assert rel_error(two["state_dict"][key], value) < 1e-5, key
    assert json.loads((tmp_path / "linear_hp0.8_0.5_3_t.json").read_text())["effective_lr"] == trained["effective_lr"]


# --- one process -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_bf16", [True, False])
def test_automatic_precision(monkeypatch, has_bf16):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation)
    assert distributed.resolve_amp_dtype("auto", torch.device("cpu")) is (torch.bfloat16 if has_bf16 else torch.float32)
    assert distributed.resolve_amp_dtype("auto", torch.device("cuda")) is (torch.bfloat16 if has_bf16 else torch.float16)


def test_more_processes_than_gpus_is_an_error_of_all(monkeypatch):
    """The first process has a GPU, but must fail as well: only its message is printed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(InputError, match="4 processes on this machine, but 2 visible GPUs"):
        distributed.init_distributed(argparse.Namespace(local_rank=0, dist_url="env://"))
