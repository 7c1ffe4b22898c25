"""Data loading workers: how many, and their settings."""

import os
from pathlib import Path
from typing import Any

from interruption import ignore_signals

TIMEOUT = 1800.0  # seconds to wait for a batch; a worker that needs longer hangs, or its storage does


def worker_count(num_workers: int) -> int:
    """Number of data loading workers: `num_workers`, but at most this process's share of the machine's cores."""
    return min(num_workers, max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def worker_options(workers: int) -> dict[str, Any]:
    """Arguments of a DataLoader with that many workers, which may be none; they stay alive from epoch to epoch.

    Its iterator raises RuntimeError if no batch comes within TIMEOUT.
    """
    if workers == 0:
        return {}
    return {
        "num_workers": workers, "persistent_workers": True, "worker_init_fn": ignore_signals, "timeout": TIMEOUT,
    }  # fmt: skip


def available_cores(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Cores that this process may use: those of its affinity mask, and no more than the CPU quota of its container.

    The arguments are the folders in which Linux shows control groups, and the file that names this process's own.
    """
    if hasattr(os, "process_cpu_count"):  # from Python 3.13 on; obeys PYTHON_CPU_COUNT
        cores = os.process_cpu_count() or 1
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *map(int, _quotas(cgroups, own))]))


def _quotas(cgroups: Path, own: Path) -> list[float]:
    """CPU quotas, in cores, of this process's control group and of all that it lies in; version 1 or 2."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups / controllers if controllers else cgroups
        folder = Path(path.lstrip("/"))
        for group in {folder, *folder.parents}:  # in a container, the path may be the one outside, of which only "." exists
            found += _quota(root / group)
    return found


def _quota(folder: Path) -> list[float]:
    """The quota of one control group, in cores; none if it has no limit or does not exist."""
    try:
        if (folder / "cpu.max").exists():  # version 2: "max 100000" or "150000 100000"
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return [float(quota) / float(period)] if quota != "max" and float(quota) > 0 else []
    except (OSError, ValueError, ZeroDivisionError):
        return []
