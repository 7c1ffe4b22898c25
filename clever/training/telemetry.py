"""Progress and averages of an epoch, log.txt, and warnings of collapse."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from clever.distributed import all_reduce_sum, get_world_size, is_main_process
from clever.progress import peak_memory_gib, redraws
from clever.utils import write_text_atomically

LOSSES = ("loss", "normalized_loss")  # what progress lines show; log.txt has everything
UNIFORM = "Try a longer --warmup_epochs, a lower --lr or --teacher_temp, a smaller --out_dim, or --norm_last_layer true"
COLLAPSED = 0.01  # a smaller feature_std means that all images have the same features
CONSTANT = "Try a lower --lr, a higher --momentum_teacher, or --clip_grad"


class TrainingProgress:
    """Averages over the batches of an epoch, and its progress with the losses of the last batch.

    The progress is a bar on a terminal, elsewhere a line after 3 batches, which says early what a run needs, every `print_freq`
    batches and at the end. Values are averaged over processes. On a GPU they are read one batch late, so that the GPU never
    waits for the log. If a value is not finite, all processes raise FloatingPointError, which names it, at the same batch.

    `total`: batches of the epoch. `images`: of a batch, over all processes. `epochs_after`: epochs after this one, for the time
    left of the run.
    """

    def __init__(
        self, header: str, total: int, images: int, device: torch.device, print_freq: int = 20, epochs_after: int = 0
    ) -> None:
        self.header, self.total, self.images, self.print_freq = header, total, images, print_freq
        self.epochs_after = epochs_after
        has_bar, shape = redraws() and is_main_process(), "{bar:10} {desc}"
        self.bar = tqdm(total=total, file=sys.stdout, dynamic_ncols=True, leave=False, bar_format=shape, disable=not has_bar)
        self.device, self.delay = device, 1 if device.type == "cuda" else 0
        self.totals: dict[str, float] = {}
        self.done = 0
        self.start = time.perf_counter()
        self._unread: list[tuple[list[str], torch.Tensor, torch.cuda.Event | None]] = []

    def state(self) -> dict[str, Any]:
        """What `resume` needs to continue the averages."""
        return {"done": self.done, "totals": dict(self.totals), "seconds": time.perf_counter() - self.start}

    def resume(self, state: dict[str, Any], done: int) -> None:
        """Continue an epoch of which `done` batches are made; their number differs from the state's if the batch size does."""
        self.done = done
        self.totals = {name: total * done / state["done"] for name, total in state["totals"].items()}
        self.start -= state["seconds"]
        self.bar.update(done)

    def update(self, **values: torch.Tensor) -> None:
        """Record the values of one batch, 0-dim tensors."""
        mean = all_reduce_sum(torch.stack([v.detach().float() for v in values.values()])) / get_world_size()
        copied = None
        if mean.is_cuda:  # start the copy now and wait for it one batch later: the kernels queued behind it keep running
            mean, copied = mean.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        self._unread.append((list(values), mean, copied))
        while len(self._unread) > self.delay:
            self._read()

    def finish(self) -> dict[str, float]:
        """The averages over all batches."""
        while self._unread:
            self._read()
        self.bar.close()
        return {name: total / max(self.done, 1) for name, total in self.totals.items()}

    @property
    def rate(self) -> float:
        """Images per second, over all processes."""
        return self.done * self.images / (time.perf_counter() - self.start)

    def _read(self) -> None:
        names, mean, copied = self._unread.pop(0)
        if copied is not None:
            copied.synchronize()
        values = dict(zip(names, mean.tolist(), strict=True))
        bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(f"{self.header}, step {self.done + 1} of {self.total}: {', '.join(bad)}")
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0.0) + value
        self.done += 1
        if not self.bar.disable:
            self.bar.set_description_str(self._line(values), refresh=False)
            self.bar.update()
        elif self.done % self.print_freq == 0 or self.done in (3, self.total):
            print(self._line(values), flush=True)

    def _line(self, values: dict[str, float]) -> str:
        numbers = "  ".join(f"{name} {values[name]:.4g}" for name in LOSSES if name in values)
        todo, seconds = self.total - self.done, self.images / self.rate  # batches left; seconds of one
        epoch, run = (tqdm.format_interval(batches * seconds) for batches in (todo, todo + self.epochs_after * self.total))
        used = f"{self.rate:.1f} img/s  {peak_memory_gib(self.device):.1f} GiB"
        return f"{self.header} {self.done}/{self.total}  {numbers}  {used}  left {epoch} epoch, {run} run"


def epoch_line(epoch: int, epochs: int, record: dict[str, Any]) -> str:
    """The main values in the log record of an epoch as one line, with the time left of the run."""
    left = tqdm.format_interval((epochs - epoch - 1) * record["seconds"])
    shown = {name: record[f"train_{name}"] for name in (*LOSSES, "lr") if f"train_{name}" in record}
    numbers = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
    return f"epoch {epoch}/{epochs} done in {record['seconds']:.0f} s: {numbers}  {record['memory_gib']:.1f} GiB  left {left}"


def append_log(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON object as a line."""
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of log.txt, one per epoch, without lines that a kill has cut short."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("epoch")) is int:
            records.append(record)
    return records


def truncate_log(path: Path, epoch: int) -> None:
    """Keep only the records before `epoch`, from which an interrupted run continues."""
    if path.exists():
        kept = [record for record in read_log(path) if record["epoch"] < epoch]
        write_text_atomically("".join(json.dumps(record) + "\n" for record in kept), path)


def feature_std(z: torch.Tensor) -> torch.Tensor:
    """Standard deviation of L2-normalised features z [B, D] times sqrt(D): 0 if all are equal, 1 if uncorrelated (SimSiam)."""
    return F.normalize(z.float(), dim=-1).std(0).mean() * z.shape[-1] ** 0.5


class CollapseWatch:
    """Warns after 2, 4, 8, ... consecutive epochs of collapse, DINO's two kinds: uniform outputs, constant features."""

    def __init__(self) -> None:
        self.count: dict[str, int] = {}

    def update(self, means: dict[str, float]) -> list[str]:
        """Warnings for an epoch with these means."""
        found = {}
        if abs(means["normalized_loss"] - 1) < 0.005:
            found["uniform"] = f"the loss stays at ln(out_dim): the outputs are uniform. {UNIFORM}"
        for name, value in means.items():
            if name.startswith("feature_std") and value < COLLAPSED:
                found[name] = f"{name} is {value:.1e}: all images get the same features. {CONSTANT}"
        self.count = {kind: self.count.get(kind, 0) + 1 for kind in found}
        return [text for kind, text in found.items() if self.count[kind] > 1 and math.log2(self.count[kind]).is_integer()]
