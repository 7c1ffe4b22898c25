"""Times the 2D selective scan with every backend that can run here, and compares with the memory's limit.

    python -m scripts.bench.scan                                  # stages of VMamba-Tiny: batch 2 of 224 px, batch 8 of 96 px
    python -m scripts.bench.scan --device cuda --batch 64 64 --dtype bf16

Columns of the tables, in milliseconds of forward + backward:
- cuda, triton, cpp, torch: backends, called as a network calls them.
- kernel: the fastest backend without PyTorch's work around an operator and its gradient.
- memory: lower bound of the time to move the data (x, dt, B, C and y once each; in the backward pass their gradients too), at
  the rate of a copy measured in the same run.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from clever import arguments, utils
from clever.entry import run_entry_point
from vmamba.selective_scan import BACKENDS, choose_backend, selective_scan_2d

STAGES = ((96, 4, 2), (192, 8, 2), (384, 16, 8), (768, 32, 2))  # channels, pixels per position, blocks of VMamba-Tiny
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def get_args() -> argparse.Namespace:
    parser = arguments.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 96], help="image sizes in pixels")
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 8], help="images per batch, one number for each size")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="type of the scan's input")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, help="backends to time; not given: all that can run here")
    parser.add_argument("--repeats", type=int, default=10, help="repetitions on a CPU; the fastest counts")
    parser.add_argument("--output", type=Path, help="JSON file to save the numbers in")
    args = parser.parse_args()
    if len(args.batch) != len(args.sizes):
        raise utils.InputError(f"--batch {args.batch}: give one number for each of --sizes {args.sizes}")
    arguments.check_positive(args, "repeats")
    return args


def fastest(functions: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Seconds of each function: the fastest of `repeats`, on a GPU the median of many, with an empty cache each time.

    On a CPU they run in turn, so that other load affects all of them.
    """
    if device == "cuda":
        from triton.testing import do_bench

        return {name: do_bench(function, return_mode="median") / 1e3 for name, function in functions.items()}

    def seconds(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    rounds = [{name: seconds(call) for name, call in functions.items()} for _ in range(repeats + 1)]
    return {name: min(each[name] for each in rounds[1:]) for name in functions}  # the first round is a warm-up


def copy_rate(device: str) -> float:
    """Bytes per second read and written by a copy of 256 MiB."""
    source = torch.zeros(64 * 2**20, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest({"copy": lambda: target.copy_(source)}, 5, device)["copy"]


def scan_input(size: int, batch: int, stage: tuple[int, int, int], device: str, dtype: torch.dtype) -> list[Tensor]:
    """x, proj, dt_weight, A, D and dt_bias of a stage, like those of a new VMamba."""
    channels, pixels, _ = stage
    side, rank = size // pixels, channels // 16
    x = torch.randn(batch, channels, side, side).to(device, dtype, memory_format=torch.channels_last)
    proj = torch.randn(batch, side, side, 4, rank + 2, device=device, dtype=dtype)
    dt_weight = torch.randn(4, channels, rank, device=device) * rank**-0.5
    rows = [torch.full((4 * channels,), value, device=device) for value in (1.0, -4.0)]
    return [each.requires_grad_() for each in (x, proj, dt_weight, -torch.ones(4 * channels, 1, device=device), *rows)]


def time_scan(
    functions: dict[str, Callable[..., Tensor]], inputs: list[Tensor], args: argparse.Namespace
) -> dict[str, list[float]]:
    """[forward, backward] seconds of each scan."""
    gy = torch.randn(inputs[0].shape, device=args.device).contiguous(memory_format=torch.channels_last)
    forward = {name: torch.no_grad()(lambda f=function: f(*inputs)) for name, function in functions.items()}
    ys = {name: function(*inputs) for name, function in functions.items()}
    backward = {name: lambda y=y: torch.autograd.grad(y, inputs, gy, retain_graph=True) for name, y in ys.items()}
    forward, backward = (fastest(functions, args.repeats, args.device) for functions in (forward, backward))
    return {name: [forward[name], backward[name]] for name in functions}


def time_kernel(backend: str, inputs: list[Tensor], args: argparse.Namespace) -> list[float]:
    """[forward, backward] seconds of the backend's own functions."""
    module, (x, *rest) = BACKENDS[backend], (each.detach() for each in inputs)
    tensors = (x.permute(0, 2, 3, 1).contiguous(), *rest)
    gy, saved = module.forward_2d(*tensors)
    forward, backward = lambda: module.forward_2d(*tensors), lambda: module.backward_2d(gy, tensors, saved)
    return [fastest({"kernel": call}, args.repeats, args.device)["kernel"] for call in (forward, backward)]


def memory_limit(inputs: list[Tensor], rate: float) -> list[float]:
    """[forward, backward] seconds to move the data once, at `rate` bytes per second."""
    x, proj = inputs[:2]
    y = x.numel() * 4  # float32
    return [(x.nbytes + proj.nbytes + y) / rate, (2 * x.nbytes + 2 * proj.nbytes + y) / rate]


def scan_functions(args: argparse.Namespace) -> dict[str, Callable[..., Tensor]]:
    """The scans to be timed, the fastest backend first."""
    selected = choose_backend("auto", args.device)
    available = [name for name in BACKENDS if BACKENDS[name].unavailable_reason(torch.device(args.device)) is None]
    names = sorted(args.backends or available, key=lambda name: name != selected)
    return {name: lambda *inputs, name=name: selective_scan_2d(*inputs, backend=name) for name in names}


def bench_scans(args: argparse.Namespace) -> list[dict]:
    """One row for each size and stage."""
    rate, functions = copy_rate(args.device), scan_functions(args)
    print(f"memory: {rate / 1e9:.1f} GB/s (copy); forward + backward in milliseconds\n")
    print(" " * 22 + "".join(f"{name:>19}" for name in [*functions, "kernel", "memory"]))
    rows = []
    for size, batch in zip(args.sizes, args.batch, strict=True):
        for stage in STAGES:
            inputs = scan_input(size, batch, stage, args.device, DTYPES[args.dtype])
            times = time_scan(functions, inputs, args)
            times["kernel"] = time_kernel(next(iter(times)), inputs, args)
            times["memory"] = memory_limit(inputs, rate)
            rows.append({"size": size, "batch": batch, "channels": stage[0], "seconds": times})
            cells = [f"{1e3 * f:.2f} + {1e3 * b:.2f}" for f, b in times.values()]
            side = size // stage[1]
            name = f"{size} px {batch} x {side}x{side}x{stage[0]}"
            print(f"{name:>22}" + "".join(f"{cell:>19}" for cell in cells), flush=True)
    return rows


def main() -> None:
    args = get_args()
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {device}, {args.dtype}")
    results = {"device": device, "torch": torch.__version__, "dtype": args.dtype, "scans": bench_scans(args)}
    if args.output:
        utils.save_json(results, args.output)


if __name__ == "__main__":
    run_entry_point(main)
