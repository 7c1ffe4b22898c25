"""Is training waiting for its images? The loader alone, the step alone, and both together, in images per second.

    python -m scripts.bench.loader                                        # ViT-tiny, batch 8, this machine
    python -m scripts.bench.loader --arch vit_small --batch_size 64 --amp_dtype bf16 --num_workers 12 --output loader.json

The three are measured in turn, an epoch each, and the table shows medians over the rounds. The loader's workers are processes
of their own; on a CPU they compete with the step for its cores, on a GPU they do not. If "together" is as fast as the slower of
the other two, loading and training overlap completely. "cores needed" is the rate of the step divided by that of the loader per
worker.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

import main_dino
from clever.arguments import ArgumentParser, check_positive
from clever.data.augmentations import RECIPES
from clever.data.datasets import CheckRecord
from clever.entry import run_entry_point
from clever.training.build import build_networks, build_pretraining
from clever.utils import InputError, save_json
from scripts.bench.pretrain import Repeat, train_again
from scripts.bench.products import synchronize
from scripts.bench.views import write_images


def build(options: argparse.Namespace, folder: Path) -> tuple:
    """The run and its loader, as main_dino.py builds them."""
    flags = ["--data_path", folder, "--arch", options.arch, "--aug", options.aug, "--batch_size_per_gpu", options.batch_size]
    flags += ["--amp_dtype", options.amp_dtype, "--out_dim", options.out_dim, "--num_workers", options.num_workers]
    flags += ["--epochs", 1, "--warmup_epochs", 0, "--freeze_last_layer", 0, "--print_freq", 10**6]
    args = main_dino.resolve_args(main_dino.get_args_parser().parse_args(list(map(str, flags))))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = main_dino.build_loader(main_dino.build_dataset(args, CheckRecord(None)), args)
    networks = build_networks(args, device)
    return build_pretraining(args, *networks, device, len(loader)), loader


def seconds(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def exhaust(batches: Iterable) -> None:
    for _ in batches:
        pass


def measure(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Images per second of each of the three, medians over the rounds."""
    run, loader = build(options, folder)
    views, _ = next(iter(loader))  # starts the workers
    kept = Repeat([view.to(run.device) for view in views], len(loader))
    work = {
        "loader": lambda: exhaust(loader),
        "step": lambda: train_again(run, kept),
        "together": lambda: train_again(run, loader),
    }
    images = len(loader) * options.batch_size
    train_again(run, Repeat(kept.views, 1))  # warm up
    rates: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(options.rounds):
        for name, function in work.items():
            rates[name].append(images / seconds(function, run.device))
    found = {name: statistics.median(values) for name, values in rates.items()}
    return found | {"cores_needed": found["step"] * max(options.num_workers, 1) / found["loader"]}


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="vit_tiny")
    parser.add_argument("--aug", default="aug1_2", help="recipe of the views")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--amp_dtype", default="fp32", choices=["auto", "bf16", "fp16", "fp32"])
    parser.add_argument("--out_dim", type=int, default=65536)
    parser.add_argument("--num_workers", type=int, default=1, help="data loading workers; 0: none, the step waits")
    parser.add_argument("--steps", type=int, default=8, help="steps of an epoch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file to save the numbers in")
    options = parser.parse_args()
    check_positive(options, "batch_size", "steps", "rounds")
    if options.aug not in RECIPES:
        raise InputError(f"--aug {options.aug!r}: must be one of {', '.join(RECIPES)}")
    with tempfile.TemporaryDirectory() as scratch:
        write_images("photos", Path(scratch), options.batch_size * options.steps)
        found = measure(options, Path(scratch))
    print("| backbone, recipe | workers | loader, images/s | step, images/s | together, images/s | cores needed |\n"
          "|---|---|---|---|---|---|")  # fmt: skip
    print(f"| {options.arch}, {options.aug} | {options.num_workers} | {found['loader']:.0f} | {found['step']:.1f} "
          f"| {found['together']:.1f} | {found['cores_needed']:.2f} |")  # fmt: skip
    if options.output:
        settings = {name: value for name, value in vars(options).items() if name != "output"}
        save_json({"kind": "bench_loader", "torch": torch.__version__, **settings, **found}, options.output)


if __name__ == "__main__":
    run_entry_point(main)
