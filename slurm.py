"""`srun python script.py`: a process group from Slurm's variables, without a launcher."""

import os
import re

from utils import InputError

FIRST_PORT, PORTS = 20000, 10000  # ports that jobs choose from, by their number


def adopt_slurm_variables() -> bool:
    """Set RANK, WORLD_SIZE, ... as torchrun would, if srun has started this process as one of several tasks; True if so.

    A launcher's variables win, and so do MASTER_ADDR and MASTER_PORT. A task of its own, as in the script of sbatch or in
    `srun --pty bash`, runs alone.

    Raises:
        InputError: this is one of several tasks, but srun's variables are missing.
    """
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ:
        return False
    rank = int(os.environ["SLURM_PROCID"])
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if rank >= tasks:
        raise InputError(
            f"SLURM_PROCID={rank}, SLURM_STEP_NUM_TASKS={tasks}: not as srun sets them; start with srun or torchrun, or unset "
            "SLURM_PROCID to run alone"
        )
    if tasks == 1:
        return False
    hosts, per_host = os.environ["SLURM_STEP_NODELIST"], os.environ["SLURM_STEP_TASKS_PER_NODE"]
    port = FIRST_PORT + int(os.environ.get("SLURM_JOB_ID", 0)) % PORTS
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(task_counts(per_host)[int(os.environ["SLURM_NODEID"])]),
    }
    os.environ.setdefault("MASTER_ADDR", first_host(hosts))
    os.environ.setdefault("MASTER_PORT", str(port))
    return True


def first_host(hosts: str) -> str:
    """The first of Slurm's list of hosts: "gpu[07-09,12],login" -> "gpu07"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group()) if first else ""


def task_counts(text: str) -> list[int]:
    """Tasks of every node from Slurm's short form: "4(x2),3" -> [4, 4, 3]."""
    counts = []
    for part in text.split(","):
        count, _, repeats = part.partition("(x")
        counts += [int(count)] * int(repeats.rstrip(")") or 1)
    return counts
