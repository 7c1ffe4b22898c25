"""How far a loop is, and its memory: tqdm's line, which redraws itself on a terminal and comes every few seconds elsewhere."""

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

import torch
from tqdm import tqdm

from clever.distributed import is_main_process


def redraws() -> bool:
    """Whether the output is a terminal that can redraw a line."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


class _Lines:
    """A stream for tqdm on which each state becomes a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.flush, self.shown = stream, stream.flush, ""

    def write(self, text: str) -> None:
        text = text.strip()
        if text and text.split("  ")[0] != self.shown:  # tqdm shows the end again when it is closed
            self.stream.write(text + "\n")
            self.shown = text.split("  ")[0]


def progress(header: str, total: int, unit: str = "img", seconds: float = 5.0, silent_if_quick: bool = False) -> tqdm:
    """What is done, the rate, and the time left of `total` things to do in this process; the first process shows its own.

    Used as a context, with `.update(count)` inside. `seconds`: least time between two lines that are not redrawn.
    `silent_if_quick`: nothing is shown of what is done within that time.
    """
    file, interval = (sys.stdout, 0.1) if redraws() else (_Lines(sys.stdout), seconds)
    return tqdm(
        desc=header, total=total, unit=f" {unit}", file=file, mininterval=interval, disable=not is_main_process(),
        delay=seconds if silent_if_quick else 1e-9, bar_format="{desc} {n_fmt}/{total_fmt}  {rate_fmt}  left {remaining}",
    )  # fmt: skip


def with_progress(batches: Iterable[tuple], header: str, total: int, seconds: float = 5.0) -> Iterator[tuple[Any, ...]]:
    """Yield the batches and show the progress in images, `total` of them; the first item of a batch holds its images."""
    with progress(header, total, seconds=seconds) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch[0]))


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far of this process: allocated on the GPU, or resident on a CPU. 0 on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":  # has no module resource
        return 0.0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
