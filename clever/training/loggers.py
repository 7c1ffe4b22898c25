"""--log_to: sends the values of a run to TensorBoard, Weights & Biases and MLflow.

log.txt stays the record that counts. After each epoch, once the checkpoint is written, every service gets that epoch's line; at
the start of a run it gets the lines that it lacks. So a run that was killed and resumed shows every epoch once.
"""

import argparse
import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.utils import make_grid

from clever.arguments import check_choices, check_installed, check_writable
from clever.data.datasets import ImageDataset
from clever.distributed import is_main_process
from clever.signals import Interrupted
from clever.training.telemetry import read_log
from clever.utils import InputError, describe_error, save_json

FOLDERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlruns"}  # the services' files, in the output folder
PICTURED = 4  # images whose views are shown
RUNS = "loggers.json"  # in the output folder: which run of each service this is
MLFLOW_SETTINGS = {  # unless the user has set them
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # a server that is down must not hold up the training for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ALLOW_FILE_STORE": "true",  # newer versions want a database
    "MLFLOW_DISABLE_TELEMETRY": "true",  # of MLflow's own makers
}


def add_logger_argument(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--log_to", nargs="+", default=[], metavar="LOGGER", help=f"also send the values of every epoch to "
        f"these: {', '.join(FOLDERS)}. Their files are written below --output_dir; environment variables, such as "
        "MLFLOW_TRACKING_URI or WANDB_MODE, name a server instead (default: none)")  # fmt: skip


def check_log_to(args: argparse.Namespace) -> None:
    """Raise InputError for a logger that is unknown or not installed, or whose folder cannot be written."""
    check_choices("log_to", args.log_to, FOLDERS)
    for name in args.log_to:
        check_installed(f"--log_to {name}", [name])
        if name != "mlflow" or not os.environ.get("MLFLOW_TRACKING_URI"):
            check_writable(Path(args.output_dir) / FOLDERS[name], f"--log_to {name}:")


def tagged(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record of log.txt by tag: train/loss, probe/knn_IR, run/seconds, ..."""
    tags = {}
    for name, value in record.items():
        if name == "epoch" or not isinstance(value, int | float):
            continue
        if name.startswith("train_"):
            group, name = "train", name.removeprefix("train_")
        else:
            group = "probe" if name.startswith(("knn", "rotation")) else "run"
        tags[f"{group}/{name}"] = float(value)
    return tags


def picture_of_views(dataset: ImageDataset) -> np.ndarray:
    """The global views of the first images as one picture uint8 [H, W, 3]: a row per image."""
    (views, *_), _ = dataset.__getitems__(list(range(min(len(dataset), PICTURED))))  # V', B, 3, S, S
    return make_grid(views.transpose(0, 1).flatten(0, 1), nrow=len(views), pad_value=255).permute(1, 2, 0).numpy()


# --- services ------------------------------------------------------------------------------------------------------------
#
# Each is made from the folder of the run and from the service's name of the run (None: a new one), and has
#     run: that name,
#     last: the last epoch that it has; -1: none,
#     begin(arguments, picture): called first, if it has none,
#     send(epoch, values): called for the epochs after `last`, in their order,
#     close(status): "FINISHED", "KILLED" or "FAILED".


class TensorBoard:
    """Event files in <folder>/tensorboard. Each start writes the whole run; readers drop what former files hold of it."""

    run, last = None, -1

    def __init__(self, folder: Path, run: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / FOLDERS["tensorboard"]), purge_step=0)

    def begin(self, arguments: dict[str, Any], picture: np.ndarray) -> None:
        self.writer.add_text("arguments", json.dumps(arguments, indent=1))
        self.writer.add_image("views", picture, 0, dataformats="HWC")

    def send(self, epoch: int, values: dict[str, float]) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, epoch)
        self.writer.flush()

    def close(self, status: str) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases, whose files lie in <folder>/wandb; WANDB_PROJECT, WANDB_MODE etc. are obeyed.

    Offline, every start writes a whole run to files of its own: wandb writes late, and a kill cuts the former ones short.
    """

    def __init__(self, folder: Path, run: str | None) -> None:
        import wandb

        self.wandb = wandb
        self.session = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "CLeVER"), name=os.environ.get("WANDB_NAME", folder.name), dir=folder,
            id=run, resume="allow" if run else None, settings=wandb.Settings(console="off"),
        )  # fmt: skip
        self.run = self.session.id
        self.last = int(self.session.summary.get("epoch", -1))  # on the server; offline there is none

    def begin(self, arguments: dict[str, Any], picture: np.ndarray) -> None:
        self.session.config.update(arguments, allow_val_change=True)
        self.session.log({"views": self.wandb.Image(picture)}, step=0)

    def send(self, epoch: int, values: dict[str, float]) -> None:
        self.session.log(values | {"epoch": epoch}, step=epoch, commit=True)

    def close(self, status: str) -> None:
        self.session.finish(exit_code=0 if status == "FINISHED" else 1)


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI or in <folder>/mlruns; MLFLOW_EXPERIMENT_NAME is obeyed."""

    def __init__(self, folder: Path, run: str | None) -> None:
        for name, value in MLFLOW_SETTINGS.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or (folder / FOLDERS["mlflow"]).as_uri())
        if run:
            self.client.update_run(run, "RUNNING")
        self.run = run or self.client.create_run(self._experiment(), run_name=folder.name).info.run_id
        self.last = int(self.client.get_run(self.run).data.metrics.get("epoch", -1))

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "CLeVER")
        found = self.client.get_experiment_by_name(name)
        return self.client.create_experiment(name) if found is None else found.experiment_id

    def begin(self, arguments: dict[str, Any], picture: np.ndarray) -> None:
        from mlflow.entities import Param

        self.client.log_batch(self.run, params=[Param(name, str(value)[:500]) for name, value in arguments.items()])
        self.client.log_image(self.run, picture, "views.png")

    def send(self, epoch: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(self.run, [Metric(tag, value, now, epoch) for tag, value in (values | {"epoch": epoch}).items()])

    def close(self, status: str) -> None:
        self.client.set_terminated(self.run, status)


SERVICES = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


# --- the run's loggers ---------------------------------------------------------------------------------------------------


class Loggers:
    """The services of --log_to, in the first process; none in the others. Used as a context, at whose end they are closed.

    A service that fails while training is left out from then on, with a warning: training goes on.

    Args:
        names: of --log_to.
        folder: of the run, with log.txt.
        arguments: of the run, sent as its hyperparameters.
        epoch: the epoch that the run starts with; log.txt ends before it.
        dataset: of the training images; the views of the first ones are sent as a picture.

    Raises:
        InputError: a service cannot be started at the beginning of a run. In a run that continues this is a warning.
    """

    def __init__(
        self, names: Sequence[str], folder: str | Path, arguments: dict[str, Any], epoch: int, dataset: ImageDataset
    ) -> None:
        self.folder, self.services = Path(folder).absolute(), {}
        if not names or not is_main_process():
            return
        runs = json.loads((self.folder / RUNS).read_text()) if epoch and (self.folder / RUNS).exists() else {}
        for name in names:
            with self._left_out_if_it_fails(name, at_start=epoch == 0):
                self._start(name, runs.get(name), arguments, epoch, dataset)
        save_json({name: service.run for name, service in self.services.items()}, self.folder / RUNS)

    def send(self, record: dict[str, Any]) -> None:
        """The record of an epoch, to all services."""
        for name, service in list(self.services.items()):
            with self._left_out_if_it_fails(name):
                service.send(record["epoch"], tagged(record))

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        status = "FINISHED" if error is None else "KILLED" if isinstance(error, Interrupted) else "FAILED"
        for name, service in list(self.services.items()):
            with self._left_out_if_it_fails(name):
                service.close(status)

    def _start(self, name: str, run: str | None, arguments: dict[str, Any], epoch: int, dataset: ImageDataset) -> None:
        """Start a service, or continue its run, and send what it lacks of log.txt."""
        service = SERVICES[name](self.folder, run)
        if service.last >= epoch:  # training begins again at an earlier epoch, and services cannot forget: a new run
            service.close("KILLED")
            service = SERVICES[name](self.folder, None)
        if service.last < 0:
            service.begin(arguments, picture_of_views(dataset))
        self.services[name] = service
        for record in read_log(self.folder / "log.txt"):
            if record["epoch"] > service.last:
                service.send(record["epoch"], tagged(record))

    @contextlib.contextmanager
    def _left_out_if_it_fails(self, name: str, at_start: bool = False) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever these packages raise
            if at_start:
                raise InputError(f"--log_to {name}: cannot be started ({describe_error(error)})") from error
            self.services.pop(name, None)
            print(
                f"warning: --log_to {name} has failed and is left out from now on ({describe_error(error)}). The same command, "
                "started again, sends what is missing", flush=True,
            )  # fmt: skip
