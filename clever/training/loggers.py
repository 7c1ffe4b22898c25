"""--log_to: sends the values of a run to TensorBoard, Weights & Biases and MLflow.

log.txt stays the record that counts. After each epoch, once the checkpoint is written, every service gets that epoch's line; at
the start of a run it gets the lines that it lacks. So a run that was killed and resumed shows every epoch once.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from clever.arguments import check_choices, check_installed
from clever.distributed import is_main_process
from clever.signals import Interrupted
from clever.training.telemetry import read_log
from clever.utils import InputError, describe_error, save_json

RUNS = "loggers.json"  # in the output folder: which run of each service this is
MLFLOW_SETTINGS = {  # unless the user has set them
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # a server that is down must not hold up the training for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ALLOW_FILE_STORE": "true",  # newer versions want a database
    "MLFLOW_DISABLE_TELEMETRY": "true",  # of MLflow's own makers
}

# Each service is made from the output folder, the service's name of the run (None: a new one) and the run's arguments. It has
# `run`, that name; `last`, the last epoch that it has, or -1; `send`, called for the epochs after that one; and `close`, with
# the status "FINISHED", "KILLED" or "FAILED".


class TensorBoard:
    """Event files in <folder>/tensorboard. Each start writes the whole run; readers drop what former files hold of it."""

    run, last = None, -1

    def __init__(self, folder: Path, run: str | None, arguments: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=0)
        self.writer.add_text("arguments", json.dumps(arguments, indent=1))

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

    def __init__(self, folder: Path, run: str | None, arguments: dict[str, Any]) -> None:
        import wandb

        self.session = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "CLeVER"), name=os.environ.get("WANDB_NAME", folder.name), dir=folder,
            id=run, resume="allow" if run else None, settings=wandb.Settings(console="off"),
        )  # fmt: skip
        self.session.config.update(arguments, allow_val_change=True)
        self.run = self.session.id
        self.last = int(self.session.summary.get("epoch", -1))  # on the server; offline there is none

    def send(self, epoch: int, values: dict[str, float]) -> None:
        self.session.log(values | {"epoch": epoch}, step=epoch, commit=True)

    def close(self, status: str) -> None:
        self.session.finish(exit_code=0 if status == "FINISHED" else 1)


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI or in <folder>/mlruns; MLFLOW_EXPERIMENT_NAME is obeyed."""

    def __init__(self, folder: Path, run: str | None, arguments: dict[str, Any]) -> None:
        os.environ.update(MLFLOW_SETTINGS | os.environ)
        import mlflow

        self.mlflow = mlflow
        mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlruns").as_uri())
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "CLeVER"))
        session = mlflow.start_run(run, run_name=None if run else folder.name)
        self.run, self.last = session.info.run_id, int(session.data.metrics.get("epoch", -1))
        if run is None:
            mlflow.log_params({name: str(value)[:500] for name, value in arguments.items()})

    def send(self, epoch: int, values: dict[str, float]) -> None:
        self.mlflow.log_metrics(values | {"epoch": epoch}, step=epoch)

    def close(self, status: str) -> None:
        self.mlflow.end_run(status)


SERVICES = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


class Loggers(AbstractContextManager):
    """The services of --log_to, in the first process; none in the others. Used as a context, at whose end they are closed.

    A service that fails while training is left out from then on, with a warning: training goes on. One that cannot be started
    is an InputError at the beginning of a run, and a warning in one that continues.

    `folder`: of the run. `epoch`: the one that the run starts with; log.txt ends before it.
    """

    def __init__(self, names: Sequence[str], folder: str | Path, arguments: dict[str, Any], epoch: int) -> None:
        self.services: dict[str, TensorBoard | WandB | MLflow] = {}
        if not names or not is_main_process():
            return
        folder = Path(folder).absolute()
        runs = json.loads((folder / RUNS).read_text()) if epoch and (folder / RUNS).exists() else {}
        for name in names:
            try:
                self.services[name] = start(SERVICES[name], folder, runs.get(name), arguments, epoch)
            except Exception as error:  # whatever these packages raise
                if epoch == 0:
                    raise InputError(f"--log_to {name}: cannot be started ({describe_error(error)})") from error
                warn(name, error)
        save_json(runs | {name: service.run for name, service in self.services.items()}, folder / RUNS)

    def send(self, record: dict[str, Any]) -> None:
        """The record of an epoch, to all services."""
        self._call(lambda service: service.send(record["epoch"], tagged(record)))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        status = "FINISHED" if error is None else "KILLED" if isinstance(error, Interrupted) else "FAILED"
        self._call(lambda service: service.close(status))

    def _call(self, function: Callable[[Any], None]) -> None:
        for name, service in list(self.services.items()):
            try:
                function(service)
            except Exception as error:
                del self.services[name]
                warn(name, error)


def start(kind: type, folder: Path, run: str | None, arguments: dict[str, Any], epoch: int) -> TensorBoard | WandB | MLflow:
    """Start a service, or continue its run, and send what it lacks of log.txt."""
    service = kind(folder, run, arguments)
    if service.last >= epoch:  # training begins again at an earlier epoch, and services cannot forget: a new run
        service.close("KILLED")
        service = kind(folder, None, arguments)
    for record in read_log(folder / "log.txt"):
        if record["epoch"] > service.last:
            service.send(record["epoch"], tagged(record))
    return service


def warn(name: str, error: Exception) -> None:
    what = f"--log_to {name} has failed and is left out from now on ({describe_error(error)})"
    print(f"warning: {what}. The same command, started again, sends what is missing", flush=True)


def tagged(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record of log.txt by tag: train/loss, probe/knn_IR, run/seconds, ..."""
    tags = {}
    for name, value in record.items():
        group = "probe" if name.startswith(("knn", "rotation")) else "run"
        tag = name.replace("_", "/", 1) if name.startswith("train_") else f"{group}/{name}"
        if name != "epoch" and isinstance(value, int | float):
            tags[tag] = float(value)
    return tags


def add_logger_argument(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--log_to", nargs="+", default=[], metavar="LOGGER", help=f"also send the values of every epoch to "
        f"these: {', '.join(SERVICES)}. Their files are written below --output_dir; environment variables, such as "
        "MLFLOW_TRACKING_URI or WANDB_MODE, name a server instead (default: none)")  # fmt: skip


def check_log_to(args: argparse.Namespace) -> None:
    """Raise InputError for a logger that is unknown or not installed."""
    check_choices("log_to", args.log_to, SERVICES)
    for name in args.log_to:
        check_installed(f"--log_to {name}", [name])
