"""The start of a process group: by torchrun, torch.distributed.launch or srun; plain python runs alone."""

import argparse
import datetime
import os
import re
import signal
import socket
import sys
from urllib.parse import urlparse

import torch
import torch.distributed as dist

from clever import signals
from clever.arguments import check_positive
from clever.distributed.collectives import get_rank, get_world_size, is_main_process
from clever.utils import InputError, describe_error

JOIN_MINUTES = 10.0  # in which all processes of a group must have started
FIRST_PORT, PORTS = 20000, 10000  # ports that jobs choose from, by their number


def add_distributed_arguments(parser: argparse.ArgumentParser) -> None:
    """--dist_url, --local_rank (or --local-rank) and --num_workers, the same in every script."""
    parser.add_argument("--dist_url", default="env://", help="how processes find each other; see torch.distributed")
    parser.add_argument("--dist_timeout", type=float, default=240.0, metavar="MINUTES", help="how long a process waits for the "
        "others, for example while the first one evaluates")  # fmt: skip
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=0, help="set by older launchers; ignored if LOCAL_RANK is set"
    )
    parser.add_argument(
        "--num_workers", type=int, default=10, help="data loading workers per process, at most one per core; 0: none"
    )


def init_distributed(args: argparse.Namespace) -> torch.device:
    """Join the process group, if torchrun or srun has started several processes, and return this process's device.

    nccl on GPUs, gloo on CPUs; plain `python` has no process group.

    Raises:
        InputError: there is not one GPU per process, or the processes do not find each other.
    """
    by_srun = adopt_slurm_variables()
    local_rank = int(os.environ.get("LOCAL_RANK", args.local_rank))
    cuda = torch.cuda.is_available()
    if cuda:
        # Counts the processes of the whole machine: every process raises the error if one of them has no GPU.
        processes = max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        gpus = torch.cuda.device_count()
        if gpus == 1 and by_srun:  # which may show each task only a GPU of its own
            local_rank = 0
        elif processes > gpus:
            raise InputError(f"{processes} processes on this machine, but {gpus} visible GPUs (CUDA_VISIBLE_DEVICES)")
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.benchmark = True  # a few crop sizes, repeated for days
    if os.environ.get("WORLD_SIZE", "1") != "1":
        check_positive(args, "dist_timeout")
        _join_process_group("nccl" if cuda else "gloo", args.dist_url, args.dist_timeout)
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - only the first process prints
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def _join_process_group(backend: str, url: str, timeout: float) -> None:
    """Find the other processes within JOIN_MINUTES; later on, wait for them for `timeout` minutes."""
    who = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    join, wait = (datetime.timedelta(minutes=minutes) for minutes in (JOIN_MINUTES, timeout))
    try:
        rank, world_size = int(who["RANK"]), int(who["WORLD_SIZE"])
        if rank >= world_size:
            raise ValueError("ranks are below WORLD_SIZE")
        host = who["MASTER_ADDR"] if url == "env://" else urlparse(url).hostname
        socket.getaddrinfo(host or "localhost", None)  # torch would wait for a host without an address
        with signals.handled(signal.SIG_DFL):  # torch's waiting does not return to Python
            store, _, _ = next(dist.rendezvous(url, rank, world_size, timeout=join))
            if os.environ.get("LOCAL_WORLD_SIZE") == who["WORLD_SIZE"]:
                # torchrun keeps its store when it starts processes again: addresses of the former attempt must not be read.
                # Only on one machine: on several, each counts the failures of its own processes.
                store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            store.set_timeout(wait)
            _store.append(store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=wait)
    except (OSError, RuntimeError, TypeError, ValueError) as error:  # torch's own errors are RuntimeErrors
        variables = ", ".join(f"{name}={value}" for name, value in who.items())
        raise InputError(
            f"the processes do not find each other ({variables}, --dist_url {url}): do all run, with the same address and a "
            f"free port (PORT_NUM of the launch scripts, --master_port of torchrun)? {describe_error(error)[:200]}"
        ) from error


_store: list[dist.Store] = []  # of the group


def first_says(message: str, seconds: float) -> bool:
    """Whether the first process says the same, for which the others wait; the first one waits a second for them to hear it."""
    if not _store:
        return False
    store, heard = _store[-1], [f"heard_{rank}" for rank in range(1, get_world_size())]
    try:
        if is_main_process():
            store.set("last_words", message)
            store.wait(heard, datetime.timedelta(seconds=1))
            return False
        store.wait(["last_words"], datetime.timedelta(seconds=seconds))
        words = store.get("last_words")
        store.set(heard[get_rank() - 1], "")
        return words == message.encode()
    except (dist.DistStoreError, dist.DistNetworkError):  # the others have nothing to say, or have ended
        return False


def adopt_slurm_variables() -> bool:
    """Set RANK, WORLD_SIZE, ... as torchrun would, if srun has started this process as one of several tasks; True if so.

    A launcher's variables win, and so do MASTER_ADDR and MASTER_PORT. A task of its own, as in the script of sbatch or in
    `srun --pty bash`, runs alone.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ or tasks == 1:
        return False
    hosts, per_host = os.environ["SLURM_STEP_NODELIST"], os.environ["SLURM_STEP_TASKS_PER_NODE"]
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": re.match(r"\d+", per_host).group(),
    }
    os.environ.setdefault("MASTER_ADDR", first_host(hosts))
    os.environ.setdefault("MASTER_PORT", str(FIRST_PORT + int(os.environ.get("SLURM_JOB_ID", 0)) % PORTS))
    return True


def first_host(hosts: str) -> str:
    """The first of Slurm's list of hosts: "gpu[07-09,12],login" -> "gpu07"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group()) if first else ""
