"""What a run says about itself: progress lines, log.txt, and the watch for collapse.

Letters: B batch, D width of the features, K outputs of a head.
"""

import datetime
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from utils import all_reduce_sum, get_world_size, write_text_atomically


class Progress:
    """Averages of a pass over the data, and now and then a line with values, rate and time left.

    Values are averaged over processes and, on a GPU, read one step late so that the GPU never waits for the log. A value
    that is not finite reaches all processes in the same step: all raise FloatingPointError, naming it.
    """

    def __init__(self, header: str, steps: int, images_per_step: int, device: torch.device, print_freq: int = 20):
        self.header, self.steps, self.images_per_step, self.print_freq = header, steps, images_per_step, print_freq
        self.delay = 1 if device.type == "cuda" else 0
        self.totals: dict[str, float] = {}
        self.done = 0
        self.start = time.perf_counter()
        self._unread: list[tuple[list[str], torch.Tensor, torch.cuda.Event | None]] = []

    def update(self, **values: torch.Tensor) -> None:
        """Take the 0-dim tensors of one step; a line is printed every `print_freq` steps and at the end."""
        stacked = torch.stack([v.detach().float() for v in values.values()])
        mean = all_reduce_sum(stacked) / get_world_size()
        copied = None
        if mean.is_cuda:  # the copy is asked for now and awaited a step later, on its own: the queue behind it runs on
            mean, copied = mean.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        self._unread.append((list(values), mean, copied))
        while len(self._unread) > self.delay:
            self._read()

    def finish(self) -> dict[str, float]:
        """Read what is left; averages over all steps."""
        while self._unread:
            self._read()
        return {name: total / max(self.done, 1) for name, total in self.totals.items()}

    @property
    def rate(self) -> float:
        """Images per second, over all processes."""
        return self.done * self.images_per_step / (time.perf_counter() - self.start)

    def _read(self) -> None:
        names, mean, copied = self._unread.pop(0)
        if copied is not None:
            copied.synchronize()
        values = dict(zip(names, mean.tolist(), strict=True))
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            what = ", ".join(f"{name} is {values[name]}" for name in bad)
            raise FloatingPointError(f"{self.header}, step {self.done + 1} of {self.steps}: {what}")
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0.0) + value
        self.done += 1
        if self.done % self.print_freq == 0 or self.done == self.steps:
            left = (self.steps - self.done) * (time.perf_counter() - self.start) / self.done
            numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            left_text = str(datetime.timedelta(seconds=round(left)))
            print(f"{self.header} {self.done}/{self.steps}  {numbers}  {self.rate:.0f} img/s  left {left_text}", flush=True)


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far of this process: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def epoch_line(epoch: int, epochs: int, record: dict[str, Any]) -> str:
    """One line for people about the log record of an epoch, with the time that the remaining ones will take."""
    left = datetime.timedelta(seconds=round(record["seconds"] * (epochs - epoch - 1)))
    numbers = "  ".join(
        f"{name.removeprefix('train_')} {value:.4g}"
        for name, value in record.items()
        if name.startswith("train_") or name == "memory_gib"
    )
    return f"epoch {epoch}/{epochs} done in {record['seconds']:.0f} s: {numbers}  left {left}"


def append_log(path: str | Path, record: dict[str, Any]) -> None:
    """Add one JSON object as a line."""
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def truncate_log(path: str | Path, epoch: int) -> None:
    """Drop the lines of `epoch` and later, and half-written ones: an interrupted run continues from `epoch`."""
    path = Path(path)
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record.get("epoch", epoch) < epoch:
            kept.append(line)
    write_text_atomically("".join(line + "\n" for line in kept), path)


def feature_std(z: torch.Tensor) -> torch.Tensor:
    """Spread of features z [B, D] on the unit sphere: 0 where all are equal, 1 where they are uncorrelated (SimSiam, 4.1)."""
    return F.normalize(z.float(), dim=-1).std(0).mean() * z.shape[-1] ** 0.5


class CollapseWatch:
    """Says in words that 2, 4, 8, ... epochs in a row have shown one of DINO's two collapses."""

    def __init__(self):
        self.count: dict[str, int] = {}

    def update(self, means: dict[str, float]) -> list[str]:
        """Warnings about the epoch with these means."""
        found = {}
        if abs(means["loss_of_lnK"] - 1) < 0.005:
            found["uniform"] = (
                "the loss sits at ln(out_dim): the outputs are uniform. Try a longer --warmup_epochs, a lower --lr, "
                "a lower --teacher_temp, a smaller --out_dim, or --norm_last_layer true"
            )
        for name, value in means.items():
            if name.startswith("feature_std") and value < 0.01:
                found[name] = (
                    f"{name} is {value:.1e}: all images get the same features. Try a lower --lr, a higher "
                    "--momentum_teacher, or --clip_grad"
                )
        self.count = {kind: self.count.get(kind, 0) + 1 for kind in found}
        return [text for kind, text in found.items() if self.count[kind] > 1 and math.log2(self.count[kind]).is_integer()]
