"""Milliseconds of the 2D selective scan with every backend that runs here, beside a loop over positions and the limits.

    python -m scripts.bench.scan                            # VMamba-Tiny's stages at 224 px (batch 2) and 96 px (batch 8)
    python -m scripts.bench.scan --device cuda --batch 64 64 --dtype bf16 --no-loop
    python -m scripts.bench.scan --no-model --backends cpp torch  # the scans alone

What stands in the tables
- loop: one step of Python per position, indexed `[..., i]`, plain autograd (`vmamba.scan_torch.reference_2d`).
- copies: the best backend's unfused operator between a cross-scan and a cross-merge that build their copies in memory.
- kernel: the best backend's own functions, without what PyTorch does around an operator and its gradient.
- memory: bytes that must be moved (x, dt, B, C and y once each; backward: their gradients too), over the rate of a copy
  measured in the same run. arithmetic: the same sums on data that stays in the first-level cache (`cpp` only).
- limit: the larger of the two over the time of the kernel.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import distributed
import utils
from vmamba import build_vssm, scan_cpp, scan_torch
from vmamba.selective_scan import BACKENDS, choose_backend, selective_scan, selective_scan_2d

STAGES = ((96, 4, 2), (192, 8, 2), (384, 16, 8), (768, 32, 2))  # channels, pixels of a position, blocks of VMamba-Tiny
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODEL = "vssm2-vmambav2_tiny_224"


def get_args() -> argparse.Namespace:
    parser = utils.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 96], help="sides of the images in pixels")
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 8], help="images, for each size")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the scan's input, and of autocast for the model")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, help="default: all that run on the device")
    parser.add_argument("--repeats", type=int, default=10, help="the quickest counts")
    parser.add_argument("--loop", action=argparse.BooleanOptionalAction, default=True, help="time the loop over positions too")
    parser.add_argument("--model", action=argparse.BooleanOptionalAction, default=True, help="time the whole model too")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    args = parser.parse_args()
    if len(args.batch) != len(args.sizes):
        raise utils.InputError(f"--batch {args.batch}: give one number for each of --sizes {args.sizes}")
    utils.check_positive(args, "repeats")
    return args


def quickest(functions: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Seconds of each function; they take turns, so that what else the machine does meets all of them."""

    def seconds(function: Callable[[], object]) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    rounds = []
    for index in range(repeats + 1):  # the first round only warms up
        slow = rounds[0] if rounds else {}
        rounds.append({name: seconds(call) for name, call in functions.items() if index < 2 or slow[name] < 1.0})
    return {name: min(each[name] for each in rounds[1:] if name in each) for name in functions}


def copy_rate(device: str) -> float:
    """Bytes per second that a copy of 256 MiB reads and writes."""
    source = torch.zeros(64 * 2**20, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / quickest({"copy": lambda: target.copy_(source)}, 5, device)["copy"]


def scan_input(size: int, batch: int, stage: tuple[int, int, int], device: str, dtype: torch.dtype) -> list[Tensor]:
    """x, proj, dt_weight, A, D and dt_bias of a stage, as a fresh VMamba has them."""
    channels, pixels, _ = stage
    side, rank = size // pixels, channels // 16
    x = torch.randn(batch, channels, side, side).to(device, dtype, memory_format=torch.channels_last)
    proj = torch.randn(batch, side, side, 4, rank + 2, device=device, dtype=dtype)
    dt_weight = torch.randn(4, channels, rank, device=device) * rank**-0.5
    rows = [torch.full((4 * channels,), value, device=device) for value in (1.0, -4.0)]
    return [each.requires_grad_() for each in (x, proj, dt_weight, -torch.ones(4 * channels, 1, device=device), *rows)]


def loop_2d(x: Tensor, *rest: Tensor, backend: str = "") -> Tensor:
    return scan_torch.reference_2d(x.permute(0, 2, 3, 1), *rest).permute(0, 3, 1, 2)


def copies_2d(
    x: Tensor, proj: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor, backend: str = "auto"
) -> Tensor:
    """The same by four copies of x and of proj, the unfused operator, and a sum of four results."""
    _, channels, height, width = x.shape
    rank = dt_weight.shape[-1]
    streams = torch.stack([scan_torch.cross_scan(proj[..., k, :])[:, k] for k in range(4)], dim=1)  # [B, 4, R + 2N, L]
    dt, B, C = streams.split([rank, A.shape[1], A.shape[1]], dim=2)
    delta = torch.einsum("kdr,bkrl->bkdl", dt_weight.to(dt.dtype), dt).flatten(1, 2)
    u = scan_torch.cross_scan(x.permute(0, 2, 3, 1)).flatten(1, 2)
    y = selective_scan(u, delta, A, B, C, D, dt_bias, backend=backend)
    return scan_torch.cross_merge(y.unflatten(1, (4, channels)), height, width).permute(0, 3, 1, 2)


def time_scan(
    functions: dict[str, Callable[..., Tensor]], inputs: list[Tensor], args: argparse.Namespace
) -> dict[str, list[float]]:
    """[forward, backward] seconds of each way to scan."""
    gy = torch.randn(inputs[0].shape, device=args.device).contiguous(memory_format=torch.channels_last)

    def no_grad(function: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            function(*inputs)

    forward = {name: lambda f=function: no_grad(f) for name, function in functions.items()}
    ys = {name: function(*inputs) for name, function in functions.items()}
    backward = {name: lambda y=y: torch.autograd.grad(y, inputs, gy, retain_graph=True) for name, y in ys.items()}
    forward, backward = quickest(forward, args.repeats, args.device), quickest(backward, args.repeats, args.device)
    return {name: [forward[name], backward[name]] for name in functions}


def time_kernel(backend: str, inputs: list[Tensor], args: argparse.Namespace) -> dict[str, list[float]]:
    """[forward, backward] seconds of the backend's own functions, and of the `arithmetic` of `cpp`, which take turns."""
    module, (x, *rest) = BACKENDS[backend], (each.detach() for each in inputs)
    x = x.permute(0, 2, 3, 1).contiguous()
    gy, saved = module.forward_2d(x, *rest)
    forward = {"kernel": lambda: module.forward_2d(x, *rest)}
    backward = {"kernel": lambda: module.backward_2d(gy, x, *rest, saved)}
    if args.device == "cpu" and scan_cpp.unavailable() is None:
        sizes = (4 * x.numel(), rest[1].shape[-1], 1)
        forward["arithmetic"] = lambda: scan_cpp.arithmetic(*sizes, with_backward=False)
        backward["arithmetic"] = lambda: scan_cpp.arithmetic(*sizes, with_backward=True)
    forward, backward = quickest(forward, args.repeats, args.device), quickest(backward, args.repeats, args.device)
    return {name: [forward[name], backward[name]] for name in forward}


def memory_limit(inputs: list[Tensor], rate: float) -> list[float]:
    """[forward, backward] seconds that moving the bytes takes at best."""
    x, proj = inputs[:2]
    y = x.numel() * 4  # float32
    return [(x.nbytes + proj.nbytes + y) / rate, (2 * x.nbytes + 2 * proj.nbytes + y) / rate]


def ways(args: argparse.Namespace) -> dict[str, Callable[..., Tensor]]:
    """Every way to scan that is to be timed, the best backend first."""
    best = choose_backend("auto", args.device)
    runs = [name for name in BACKENDS if BACKENDS[name].unavailable(torch.device(args.device)) is None]
    names = sorted(args.backends or runs, key=lambda name: name != best)
    functions = {name: lambda *inputs, name=name: selective_scan_2d(*inputs, backend=name) for name in names}
    functions["copies"] = lambda *inputs: copies_2d(*inputs, backend=names[0])
    if args.loop:
        functions["loop"] = loop_2d
    return functions


def bench_scans(args: argparse.Namespace) -> list[dict]:
    """One row for each size and stage."""
    rate, functions = copy_rate(args.device), ways(args)
    print(f"memory: {rate / 1e9:.1f} GB/s (copy); forward + backward in milliseconds, quickest of {args.repeats}\n")
    print(" " * 22 + "".join(f"{name:>19}" for name in [*functions, "kernel", "memory", "arithmetic", "limit"]))
    rows = []
    for size, batch in zip(args.sizes, args.batch, strict=True):
        for stage in STAGES:
            inputs = scan_input(size, batch, stage, args.device, DTYPES[args.dtype])
            times = time_scan(functions, inputs, args)
            kernel = time_kernel(next(iter(times)), inputs, args)
            times["kernel"] = kernel.pop("kernel")
            bounds = {"memory": memory_limit(inputs, rate), **kernel}
            share = [max(bound[i] for bound in bounds.values()) / times["kernel"][i] for i in range(2)]
            numbers = {"seconds": times, "limits": bounds, "share": share}
            rows.append({"size": size, "batch": batch, "channels": stage[0], **numbers})
            cells = [f"{1e3 * f:.2f} + {1e3 * b:.2f}" for f, b in [*times.values(), *bounds.values()]]
            cells += ["-"] * (2 - len(bounds)) + [" + ".join(f"{each:.0%}" for each in share)]
            side = size // stage[1]
            name = f"{size} px {batch} x {side}x{side}x{stage[0]}"
            print(f"{name:>22}" + "".join(f"{cell:>19}" for cell in cells), flush=True)
    return rows


def bench_model(args: argparse.Namespace) -> list[dict]:
    """Seconds of VMamba-Tiny, forward and backward, with each way to scan."""
    functions, rows = ways(args), []
    print(
        f"\n{MODEL}, {args.dtype}: milliseconds of a forward pass without gradients, of forward and backward; images trained on"
    )
    for size, batch in zip(args.sizes, args.batch, strict=True):
        torch.manual_seed(0)
        model = build_vssm(MODEL, drop_path_rate=0.0).to(args.device)
        images = torch.randn(batch, 3, size, size, device=args.device)

        def run(scan: Callable[..., Tensor], backward: bool, model=model, images=images) -> None:
            autocast = torch.autocast(args.device, DTYPES[args.dtype], enabled=args.dtype != "fp32")
            patched = mock.patch("vmamba.ss2d.selective_scan_2d", lambda *inputs, backend: scan(*inputs))
            with patched, autocast, torch.set_grad_enabled(backward):
                features = model(images)
            if backward:
                features.float().square().sum().backward()

        forward = quickest({n: lambda f=f: run(f, False) for n, f in functions.items()}, args.repeats, args.device)
        both = quickest({n: lambda f=f: run(f, True) for n, f in functions.items()}, args.repeats, args.device)
        rows.append({"size": size, "batch": batch, "inference": forward, "training": both})
        base = "loop" if args.loop else "copies"
        for name, seconds in both.items():
            print(
                f"{size} px, batch {batch}: {name:>7} {1e3 * forward[name]:9.0f} {1e3 * seconds:9.0f}"
                f"{batch / seconds:9.1f} images/s, {both[base] / seconds:5.1f} times as fast as {base}",
                flush=True,
            )
    return rows


def main() -> None:
    args = get_args()
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {device}, {args.dtype}")
    results = {"device": device, "torch": torch.__version__, "dtype": args.dtype, "scans": bench_scans(args)}
    if args.model:
        results["model"] = bench_model(args)
    if args.output:
        utils.save_json(results, args.output)


if __name__ == "__main__":
    distributed.run_entry_point(main)
