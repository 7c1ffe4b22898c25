"""How far a loop is: in a bar on a terminal, elsewhere in a line every few seconds."""

import datetime
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from clever.distributed import get_world_size, is_main_process


def open_bar(total: int) -> Any | None:
    """A tqdm bar, which redraws itself and vanishes when it is closed, or None where plain lines are printed instead.

    Plain lines go to files, pipes, terminals that cannot redraw a line, and wherever tqdm is missing.
    """
    if not (sys.stdout.isatty() and is_main_process()) or os.environ.get("TERM") == "dumb":
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, file=sys.stdout, dynamic_ncols=True, leave=False, bar_format="{bar:10} {desc}")


class Progress:
    """Says what is done, the rate, and the time left: in a bar on a terminal, elsewhere in a line every few seconds.

    At the end a line remains. With several processes, each counts its own work without waiting for the others, and the first
    one prints.

    Args:
        header: start of the line; may be changed later.
        total: number of images (or whatever `unit` says) to process in this process.
        unit: what is counted, as printed in the rate.
        seconds: least time between two lines.
        silent_if_quick: print nothing if all is done before the first line is due.
    """

    def __init__(
        self, header: str, total: int, unit: str = "img", seconds: float = 5.0, silent_if_quick: bool = False
    ) -> None:
        self.header, self.total, self.unit, self.seconds = header, total, unit, seconds
        self.silent_if_quick = silent_if_quick
        self.done = self._printed = 0
        self.start = self._last = time.monotonic()
        self.bar = open_bar(total)

    def advance(self, count: int = 1) -> None:
        """Add to the count, and show it if a line is due."""
        self.done += count
        at_end = self.done >= self.total and not (self.silent_if_quick and self._printed == 0)
        if self.bar is not None:
            self.bar.set_description_str(self._line(), refresh=False)
            self.bar.update(count)
            if self.done >= self.total:
                self.bar.close()
        if self.done and (at_end or (self.bar is None and time.monotonic() - self._last >= self.seconds)):
            self.print_line()

    def print_line(self) -> None:
        """Print a line now, unless nothing has been added since the last one."""
        if self.done == self._printed:
            return
        self._printed, self._last = self.done, time.monotonic()
        print(self._line(), flush=True)

    def _line(self) -> str:
        world = get_world_size()
        share = f" of each of {world} processes" if world > 1 else ""
        rate = self.done / max(time.monotonic() - self.start, 1e-9)  # of this process
        digits = 1 if rate < 10 else 0
        left = time_left(self.total - self.done, rate)
        return f"{self.header} {self.done}/{self.total}{share}  {rate * world:.{digits}f} {self.unit}/s  left {left}"


def with_progress(batches: Iterable[tuple], header: str, total: int, seconds: float = 5.0) -> Iterator[tuple]:
    """Yield the batches and print the progress in images, `total` of them; the first item of a batch holds its images."""
    meter = Progress(header, total, seconds=seconds)
    for batch in batches:
        yield batch
        meter.advance(len(batch[0]))


def time_left(todo: float, rate: float) -> datetime.timedelta:
    """Time that `todo` items will take at `rate` items per second, in whole seconds."""
    return datetime.timedelta(seconds=round(todo / max(rate, 1e-9)))
