"""--log_to: what TensorBoard, Weights & Biases and MLflow show of a run, read by their own readers."""

import json
import os
import struct
import sys
from unittest import mock

import pytest
from support.in_process import assert_refused, pretrain
from support.processes import TINY_NETWORK, run, write_images

from clever.training import loggers
from clever.training.loggers import tagged
from clever.training.telemetry import read_log

EPOCHS = 4


@pytest.fixture(autouse=True)
def environment():
    """Nothing of the user's settings, and no network."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "WANDB_"))}
    with mock.patch.dict(os.environ, {**own, "WANDB_MODE": "offline", "MLFLOW_DISABLE_TELEMETRY": "true"}, clear=True):
        yield


# --- readers -------------------------------------------------------------------------------------------------------------


def tensorboard(folder):
    """TensorBoard's own reader of a run."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={accumulator.SCALARS: 0})
    return reader.Reload()


def tensorboard_scalars(folder):
    """{tag: [(epoch, value), ...]}"""
    reader = tensorboard(folder)
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def mlflow_runs(folder):
    """MLflow's own client of the run's file store, and its runs, the newest first."""
    with mock.patch.dict(os.environ, {"MLFLOW_ALLOW_FILE_STORE": "true"}):
        client = pytest.importorskip("mlflow.tracking").MlflowClient((folder / "mlruns").absolute().as_uri())
        return client, client.search_runs([client.get_experiment_by_name("CLeVER").experiment_id])


def mlflow_scalars(folder):
    client, runs = mlflow_runs(folder)
    (run,) = runs
    history = {tag: client.get_metric_history(run.info.run_id, tag) for tag in run.data.metrics}
    return {tag: [(metric.step, metric.value) for metric in metrics] for tag, metrics in history.items()}


def wandb_records(path):
    """The records of a *.wandb file: LevelDB's format of a log, blocks of 32 KiB with pieces of records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, pieces = path.read_bytes(), 7, []
    while position + 7 <= len(data):
        if position % 2**15 > 2**15 - 7:  # a block's end that is too short for another piece
            position += -position % 2**15
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])  # after a checksum
        pieces.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # the whole record, or its last piece
            yield Record.FromString(b"".join(pieces))
            pieces = []


def scalars_of_log(folder):
    """What all of them should show."""
    expected = {}
    for record in read_log(folder / "log.txt"):
        for tag, value in tagged(record).items():
            expected.setdefault(tag, []).append((record["epoch"], pytest.approx(value, rel=1e-6)))
    return expected


# --- a real run ----------------------------------------------------------------------------------------------------------


def flags(images, folder, *more):
    return (
        *TINY_NETWORK, "--data_path", images, "--output_dir", folder, "--epochs", EPOCHS, "--batch_size_per_gpu", 2,
        "--num_workers", 0, "--saveckp_freq", 0, *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "flat", 6)


@pytest.fixture(scope="module")
def killed_and_resumed(images, tmp_path_factory):
    """A run that got SIGKILL in its third epoch and was started again."""
    pytest.importorskip("tensorboard")
    pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("loggers") / "run"
    words = flags(images, folder, "--log_to", "tensorboard", "mlflow")
    output = folder.parent / "output"
    run("main_dino.py", *words, output=output, kill_at=f"epoch 2/{EPOCHS} 2/3 ")
    assert len(read_log(folder / "log.txt")) == 2
    text = run("main_dino.py", *words, output=output)
    assert "from epoch 2" in text and "warning" not in text
    return folder


def test_tensorboard_shows_every_epoch_of_a_killed_run_once(killed_and_resumed):
    found = tensorboard_scalars(killed_and_resumed)
    assert found == scalars_of_log(killed_and_resumed)
    assert [epoch for epoch, _ in found["train/loss"]] == [0, 1, 2, 3]
    assert {"train/lr", "train/normalized_loss", "train/feature_std_EF", "run/seconds", "run/memory_gib"} < found.keys()


def test_mlflow_shows_every_epoch_of_a_killed_run_once(killed_and_resumed):
    found = mlflow_scalars(killed_and_resumed)
    assert found.pop("epoch") == [(epoch, epoch) for epoch in range(EPOCHS)]
    assert found == scalars_of_log(killed_and_resumed)


@pytest.mark.slow
def test_wandb_shows_every_epoch_of_a_killed_run_once(images, tmp_path):
    pytest.importorskip("wandb")
    folder, output = tmp_path / "run", tmp_path / "output"
    words = flags(images, folder, "--log_to", "wandb")
    run("main_dino.py", *words, output=output, kill_at=f"epoch 2/{EPOCHS} 2/3 ", WANDB_MODE="offline")
    text = run("main_dino.py", *words, output=output, WANDB_MODE="offline")
    assert "from epoch 2" in text and "warning" not in text
    killed, resumed = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert killed.name == resumed.name  # `wandb sync` takes both as the same run; the second file has all of it
    records = list(wandb_records(resumed))
    rows = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records if record.HasField("history")
    ]  # fmt: skip
    assert [row["epoch"] for row in rows] == [row["_step"] for row in rows] == [0, 1, 2, 3]
    found = {tag: [(row["epoch"], row[tag]) for row in rows if tag in row] for tag in scalars_of_log(folder)}
    assert found == scalars_of_log(folder)
    config = {item.key: item.value_json for record in records for item in record.config.update}
    assert config["out_dim"] == "64" and config["arch"] == '"vit_micro"'


# --- failures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_service_that_fails_is_warned_of_once_and_gets_the_rest_at_the_next_start(name, images, tmp_path):
    pytest.importorskip(name)
    service, scalars = loggers.SERVICES[name], {"tensorboard": tensorboard_scalars, "mlflow": mlflow_scalars}[name]
    send = service.send

    def fail(self, epoch, values):
        if epoch > 0:
            raise ConnectionError("the server\nis gone")
        send(self, epoch, values)

    words = ("--epochs", 3, "--log_to", name)
    with mock.patch.object(service, "send", fail):
        outcome = pretrain(images, tmp_path / "run", *words)
    assert outcome.status == 0 and len(read_log(tmp_path / "run" / "log.txt")) == 3
    warnings = [line for line in outcome.stdout.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"warning: --log_to {name} has failed")
    assert "(ConnectionError: the server is gone)" in warnings[0]
    assert [step for step, _ in scalars(tmp_path / "run")["train/loss"]] == [0]
    if name == "mlflow":
        sys.modules["mlflow"].end_run()  # as at the end of a process

    outcome = pretrain(images, tmp_path / "run", *words)
    assert outcome.status == 0 and "warning" not in outcome.stdout
    assert [step for step, _ in scalars(tmp_path / "run")["train/loss"]] == [0, 1, 2]


def test_a_server_that_does_not_answer_stops_a_new_run_but_not_one_that_continues(images, tmp_path):
    pytest.importorskip("mlflow")
    assert pretrain(images, tmp_path / "run").status == 0
    nowhere = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    with mock.patch.dict(os.environ, nowhere):
        outcome = pretrain(images, tmp_path / "new", "--log_to", "mlflow")
        assert_refused(outcome, "--log_to mlflow", "cannot be started", "127.0.0.1")
        assert not (tmp_path / "new" / "log.txt").exists()
        outcome = pretrain(images, tmp_path / "run", "--epochs", 2, "--log_to", "mlflow")
    assert outcome.status == 0 and outcome.stdout.count("warning: --log_to mlflow has failed") == 1
    assert len(read_log(tmp_path / "run" / "log.txt")) == 2


# --- bad input -----------------------------------------------------------------------------------------------------------


def test_a_missing_package_is_named_before_anything_is_written(images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert_refused(pretrain(images, tmp_path / "run", "--log_to", "mlflow"), "--log_to mlflow", "pip install mlflow-skinny")
    assert not (tmp_path / "run").exists()


# --- values --------------------------------------------------------------------------------------------------------------


def test_tags_tell_training_probes_and_the_rest():
    values = {"train_loss": 2, "train_lr": 1e-4, "knn_top1": 40.0, "rotation_r2_EF": 0.5, "seconds_probe": 3.0, "note": "text"}
    assert tagged(values | {"epoch": 7}) == {
        "train/loss": 2.0, "train/lr": 1e-4, "probe/knn_top1": 40.0, "probe/rotation_r2_EF": 0.5, "run/seconds_probe": 3.0,
    }  # fmt: skip
