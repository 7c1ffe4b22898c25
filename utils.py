"""Shared by all entry points: errors, processes, seeds, schedules, optimizers, checkpoints."""

import argparse
import contextlib
import json
import math
import os
import pickle
import random
import re
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image


class InputError(ValueError):
    """The user asked for something that cannot be; the message is one line naming the value and the valid choices."""


def run_entry_point(main: Callable[[], None]) -> None:
    """Run a script's main; an InputError becomes one line on stderr and exit status 2, a FloatingPointError status 1."""
    try:
        main()
    except InputError as error:
        # What a data loading worker raises ends a traceback.
        _give_up(str(error).strip().splitlines()[-1].removeprefix("utils.InputError: "), 2)
    except FloatingPointError as error:
        _give_up(f"not finite: {error}", 1)
    # Not after an error: the other processes may be waiting in a collective, and nccl would wait for them here.
    if is_distributed():
        dist.destroy_process_group()


GRACE_SECONDS = 10.0


def _give_up(message: str, status: int) -> NoReturn:
    """Print the message and exit: the first process at once, the others after GRACE_SECONDS.

    A launcher ends all processes as soon as one has ended. So an error that all have is told once, whichever meets it
    first, and an error that only one has is told as well.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(GRACE_SECONDS)
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


@contextlib.contextmanager
def error_prefix(prefix: str) -> Iterator[None]:
    """Put "prefix: " before the message of an InputError raised inside, such as the name of the file at fault."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{prefix}: {error}") from error


class ArgumentParser(argparse.ArgumentParser):
    """Raises InputError instead of printing the usage: one line, of one process, as for every other bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists all arguments)")


def bool_flag(text: str) -> bool:
    """Parse true/false/on/off/1/0 for argparse."""
    values = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of true, false, on, off, 1, 0")
    return values[text.lower()]


class TypedFloat(float):
    """A float that prints as it was typed: file names hold lr and hp1 as the launch scripts spell them."""

    def __new__(cls, text: str):
        try:
            number = super().__new__(cls, text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise InputError unless each of these arguments is greater than zero, and finite."""
    for name in names:
        if not 0 < getattr(args, name) < math.inf:
            raise InputError(f"--{name} {getattr(args, name)}: must be greater than 0, and finite")


def check_not_negative(args: argparse.Namespace, *names: str) -> None:
    """Raise InputError unless each of these arguments is zero or greater, and finite."""
    for name in names:
        if not 0 <= getattr(args, name) < math.inf:
            raise InputError(f"--{name} {getattr(args, name)}: must be 0 or greater, and finite")


# --- processes ---------------------------------------------------------------------------------------------------------


def add_distributed_arguments(parser: argparse.ArgumentParser) -> None:
    """--dist_url, --local_rank (or --local-rank) and --num_workers, the same in every script."""
    parser.add_argument("--dist_url", default="env://", help="how processes find each other, see torch.distributed")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help="set by old launchers; LOCAL_RANK wins")
    parser.add_argument("--num_workers", type=int, default=10, help="data loading processes per process")


def init_distributed(args: argparse.Namespace) -> torch.device:
    """Join the launcher's process group, if a launcher set RANK and WORLD_SIZE, and return this process's device.

    nccl on GPUs, gloo on CPUs; plain `python` has no process group.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", args.local_rank))
    cuda = torch.cuda.is_available()
    if cuda:
        processes = max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # all must see that one has no GPU
        if processes > torch.cuda.device_count():
            raise InputError(
                f"{processes} processes on this machine: only {torch.cuda.device_count()} GPUs are visible "
                "(DEVICES of the launch scripts, or CUDA_VISIBLE_DEVICES)"
            )
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.benchmark = True  # a few crop sizes, repeated for days
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group("nccl" if cuda else "gloo", args.dist_url, rank=rank, world_size=world_size)
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - one voice per run, until the process ends
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    return get_rank() == 0


def barrier() -> None:
    if is_distributed():
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over processes, in place; without a process group the tensor itself."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def worker_count(num_workers: int) -> int:
    """Data loading processes of one process, at most its share of the machine's cores: more only wait for each other."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(num_workers, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def resolve_amp_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type that autocast computes in; `auto` is bf16 where the hardware has it, else fp16 on a GPU and fp32 on a CPU."""
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if name != "auto":
        return named[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def all_gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows [m, ...] of all processes one below the other; m may differ between them."""
    if not is_distributed():
        return rows
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    longest = int(max(counts))
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    shares = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(shares, padded)
    return torch.cat([share[: int(count)] for share, count in zip(shares, counts, strict=True)])


def all_gather_objects(item: Any) -> list[Any]:
    """That of every process, in the order of their ranks; pickled, so for little things."""
    if not is_distributed():
        return [item]
    items = [None] * get_world_size()
    dist.all_gather_object(items, item)
    return items


def broadcast_buffers(module: nn.Module) -> None:
    """Give all processes the buffers of the first one, such as running statistics that are each process's own."""
    if is_distributed():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def seed_everything(*key: int) -> None:
    """Seed torch (CPU and GPUs), numpy and random from a tuple such as (seed, epoch, rank).

    Seeding every epoch makes a resumed run draw what an uninterrupted one draws, without any state to save.
    """
    words = np.random.SeedSequence((len(key), *key)).generate_state(2)  # its own zeros at the end would not count
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words[0])
    random.seed(int(words[1]))


# --- schedules and optimizers ------------------------------------------------------------------------------------------


def cosine_scheduler(
    base: float, final: float, epochs: int, niter_per_ep: int, warmup_epochs: int = 0, start_warmup_value: float = 0
) -> np.ndarray:
    """One value per iteration [epochs * niter_per_ep]: a linear warm-up to `base`, then half a cosine down (or up) to `final`.

    Raises InputError if the warm-up is longer than the run.
    """
    if warmup_epochs > epochs:
        raise InputError(f"warm-up of {warmup_epochs} epochs: longer than the run ({epochs} epochs)")
    warmup = np.linspace(start_warmup_value, base, warmup_epochs * niter_per_ep)
    steps = (epochs - warmup_epochs) * niter_per_ep
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * np.arange(steps) / max(steps, 1)))
    return np.concatenate([warmup, cosine])


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two optimizer groups: weight decay by the schedule, and none (1-D parameters and those named `*.bias`)."""
    decayed, plain = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (plain if p.ndim == 1 or name.endswith(".bias") else decayed).append(p)
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0, "fixed_weight_decay": True}]


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled per tensor to trust * |p| / |g + wd p| (You et al., arXiv 1708.03888).

    1-D tensors are neither scaled nor decayed unless `adapt_1d`.
    """

    def __init__(self, params, lr=0.0, weight_decay=0.0, momentum=0.9, trust=0.001, adapt_1d=False):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust, adapt_1d=adapt_1d))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim != 1 or group["adapt_1d"]:
                    update = update.add(p, alpha=group["weight_decay"])
                    p_norm, u_norm = torch.linalg.vector_norm(p), torch.linalg.vector_norm(update)
                    ratio = group["trust"] * p_norm / u_norm
                    update = update * torch.where((p_norm > 0) & (u_norm > 0), ratio, torch.ones_like(ratio))
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                p.add_(buffer, alpha=-group["lr"])


def build_optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """adamw, sgd (momentum 0.9) or lars; rates and weight decay are set every step from the schedules."""
    builders = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.0, fused=True),
        "sgd": lambda: torch.optim.SGD(groups, lr=0.0, momentum=0.9),
        "lars": lambda: LARS(groups),
    }
    if name not in builders:
        raise InputError(f"optimizer {name!r}: must be one of {', '.join(builders)}")
    return builders[name]()


def set_schedules(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Write this step's rate to all groups and its weight decay to those that are decayed."""
    for group in optimizer.param_groups:
        group["lr"] = float(lr)  # schedules hold numpy scalars, checkpoints plain values
        if not group.get("fixed_weight_decay"):
            group["weight_decay"] = float(weight_decay)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale each gradient on its own down to norm `max_norm` (0: no clipping), without waiting for the GPU."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if max_norm > 0 and grads:
        scales = [(max_norm / (norm + 1e-6)).clamp(max=1.0) for norm in torch._foreach_norm(grads)]
        torch._foreach_mul_(grads, scales)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, over parameters only; buffers are each network's own."""
    torch._foreach_lerp_(list(teacher.parameters()), [p.detach() for p in student.parameters()], 1 - momentum)


def check_weights(student: nn.Module, when: str) -> None:
    """FloatingPointError if weights are not finite: a gradient can be so although its loss is, and it must not be saved."""
    norms = torch.stack(torch._foreach_norm([p.detach() for p in student.parameters()]))
    if not norms.isfinite().all():
        bad = [name for (name, _), norm in zip(student.named_parameters(), norms, strict=True) if not norm.isfinite()]
        raise FloatingPointError(f"{when}, after its last step: weights {', '.join(bad[:3])}")


# --- checkpoints -------------------------------------------------------------------------------------------------------

_numpy_scalar = np.float64(0).__reduce__()[0]
# What the originals pickled besides tensors and plain values; nothing else is ever unpickled.
_SAFE_GLOBALS = [
    argparse.Namespace,
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")},
]
# What torch.load raises on files that are cut short or damaged, old formats included.
_DAMAGE = (
    RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError, OverflowError, MemoryError,
    OSError, struct.error,
)  # fmt: skip


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU without running any code it may hold.

    Tensors, plain values, argparse.Namespace and numpy scalars are read (the originals' files hold the last two).
    Raises InputError if the file is missing, damaged, holds anything else, or is no dict.
    """
    if not Path(path).is_file():
        raise InputError(f"checkpoint {path}: no such file")
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that reading may fail; if it does, the error says so
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\w[\w.]*)", str(error))
        if foreign:
            raise InputError(
                f"checkpoint {path}: holds {foreign[1]}; only tensors, plain values, Namespace and numpy scalars are read"
            ) from error
        raise InputError(f"checkpoint {path}: damaged, or not written by torch.save") from error
    except _DAMAGE as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        raise InputError(f"checkpoint {path}: damaged or incomplete ({reason})") from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"checkpoint {path}: holds a {type(checkpoint).__name__}, not a dict")
    return checkpoint


def save_atomically(obj: Any, path: str | Path) -> None:
    """torch.save to a file beside `path`, flush it to the disk, then rename: whatever happens, `path` holds a whole file."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(obj, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text_atomically(text: str, path: str | Path) -> None:
    """The same for a text file."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def save_json(record: Any, path: str | Path) -> None:
    """The same for a record of numbers; makes its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(json.dumps(record, indent=1) + "\n", path)


def save_png(pixels: np.ndarray, path: str | Path) -> None:
    """The same for a picture, [H, W] or [H, W, channels] of bytes; makes its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    Image.fromarray(pixels).save(temporary, format="PNG")
    os.replace(temporary, path)


def check_writable(folder: str | Path) -> None:
    """Raise InputError unless files can be made in `folder` (or in the nearest parent there is); leaves nothing behind."""
    path = Path(folder).absolute()
    try:
        if path.exists() and not path.is_dir():
            raise InputError(f"--output_dir {folder}: is a file, not a folder")
        while not path.exists():
            path = path.parent
        with tempfile.TemporaryFile(dir=path):  # permission bits do not tell of root, or of a read-only file system
            pass
    except OSError as error:
        raise InputError(f"--output_dir {folder}: {path} cannot be written ({error.strerror})") from error


def strip_prefix(state: dict[str, torch.Tensor], prefix: str = "module.") -> dict[str, torch.Tensor]:
    """State dict with `prefix` removed from the front of the names that have it (DistributedDataParallel adds it)."""
    return {name.removeprefix(prefix): value for name, value in state.items()}


def load_strictly(module: nn.Module, state: dict[str, torch.Tensor], what: str) -> None:
    """Load a state dict, whose names may begin with `module.`; InputError about `what` unless names and shapes are the same."""
    try:
        module.load_state_dict(strip_prefix(state))
    except RuntimeError as error:
        raise InputError(f"{what}: does not fit the arguments: {' '.join(str(error).split())[:300]}") from error


def load_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's moments but not the options of its groups: the script sets them, and the originals' lack some.

    Raises InputError unless the groups are of the same sizes.
    """
    own = optimizer.state_dict()["param_groups"]
    found, expected = ([len(group["params"]) for group in groups] for groups in (state["param_groups"], own))
    if found != expected:
        raise InputError(f"optimizer of the checkpoint to continue from: groups of {found} parameters, here {expected}")
    optimizer.load_state_dict({"state": state["state"], "param_groups": own})


def plain_args(args: argparse.Namespace | dict[str, Any]) -> dict[str, Any]:
    """Arguments as a plain dict, as checkpoints and JSON files hold them; those of the originals are Namespaces."""
    values = args if isinstance(args, dict) else vars(args)
    return {name: float(value) if isinstance(value, TypedFloat) else value for name, value in values.items()}
