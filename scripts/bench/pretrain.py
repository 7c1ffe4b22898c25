"""Images per second of pretraining: the step alone, the loader of the views alone, and both together.

    python -m scripts.bench.pretrain --arch vit_small resnet50 --batch_size 64 --amp_dtype bf16 --num_workers 12
    python -m scripts.bench.pretrain --arch vit_small --launch eager compile graph both               # on a GPU, in turn
    python -m scripts.bench.pretrain --net dino care --arch resnet8 --images small -- --local_crops_number 0

The step gets views that are kept, the loader reads random images. Its workers are processes; on a CPU they compete with the
step for its cores. If "together" is as fast as the slower of the two, they overlap completely. "cores needed" is the rate of
the step divided by that of the loader per worker; "% of products" the step's share of the rate at which its matrix products and
convolutions would run if each were as fast as one large product (a selective scan is not counted); "GiB" the peak of the GPU's
memory. All are measured in turn, an epoch each; the table shows medians over rounds.
"""

import argparse
import contextlib
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import main_dino
from clever.arguments import ArgumentParser, check_positive
from clever.data.datasets import CheckRecord
from clever.entry import run_entry_point
from clever.evaluation.tables import align
from clever.methods import METHODS
from clever.training.build import build_networks, build_pretraining
from clever.training.pretraining import Pretraining
from clever.utils import save_json
from scripts.bench.scan import fastest
from scripts.bench.views import write_images

LAUNCH = {"eager": [], "compile": ["--compile", "true"], "graph": ["--cuda_graph", "true"]}
LAUNCH["both"] = LAUNCH["compile"] + LAUNCH["graph"]


def train_again(run: Pretraining, batches: Iterable) -> None:
    """The first epoch from its beginning, however often, without its progress lines."""
    run.so_far = {}
    with contextlib.redirect_stdout(io.StringIO()):
        run.train_one_epoch(batches, epoch=0)


def build(options: argparse.Namespace, folder: str, net: str, arch: str, launch: str) -> tuple[Pretraining, DataLoader, tuple]:
    """A run, the loader of its views, and a batch of them on the device."""
    flags = ["--data_path", folder, "--net", net, "--arch", arch, "--batch_size_per_gpu", options.batch_size]
    flags += ["--amp_dtype", options.amp_dtype, "--out_dim", options.out_dim, "--num_workers", options.num_workers]
    flags += ["--epochs", 1, "--warmup_epochs", 0, "--freeze_last_layer", 0, *LAUNCH[launch], *options.flags]
    args = main_dino.resolve_args(main_dino.get_args_parser().parse_args(list(map(str, flags))))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset = main_dino.build_dataset(args, CheckRecord(None))
    loader = main_dino.build_loader(dataset, args)
    run = build_pretraining(args, *build_networks(args, device), device, len(loader))
    run.prepare(dataset)
    views, codes = dataset.__getitems__(range(options.batch_size))
    return run, loader, ([run.normalized(view.to(device)) for view in views], codes)  # V', B, 3, S, S


def products_limit(options: argparse.Namespace, folder: str, net: str, arch: str) -> float:
    """Images per second if all matrix products and convolutions of an eager step were as fast as one large product."""
    run, _, batch = build(options, folder, net, arch, "eager")
    with FlopCounterMode(display=False) as counter:
        train_again(run, [batch])
    size = 8192 if run.device.type == "cuda" else 1024
    a = torch.randn(size, size, device=run.device, dtype=run.amp_dtype)
    seconds = fastest({"product": lambda: a @ a}, 10, run.device.type)["product"]
    return options.batch_size * 2 * size**3 / seconds / counter.get_total_flops()


def prepare(options: argparse.Namespace, folder: str, net: str, arch: str, launch: str) -> tuple[dict, float]:
    """After a first step: {column: an epoch of it}; GiB that the first step took of the GPU's memory."""
    before = torch.cuda.memory_allocated()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    run, loader, batch = build(options, folder, net, arch, launch)
    train_again(run, [batch])
    memory = (torch.cuda.max_memory_allocated() - before) / 2**30
    columns = {
        "step": lambda: train_again(run, [batch] * len(loader)),
        "loader": lambda: [None for _ in loader],
        "together": lambda: train_again(run, loader),
    }
    return columns, memory


def measure(networks: list[dict[str, Callable[[], object]]], images: int, rounds: int) -> list[dict[str, float]]:
    """Images per second of each column of each network, medians over the rounds, in which all are measured in turn."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    rates: list[dict[str, list[float]]] = [{name: [] for name in network} for network in networks]
    for network in networks:
        network["loader"]()  # starts the workers
    for _ in range(rounds):
        for network, found in zip(networks, rates, strict=True):
            for name, function in network.items():
                wait()
                start = time.perf_counter()
                function()
                wait()
                found[name].append(images / (time.perf_counter() - start))
    return [{name: statistics.median(values) for name, values in found.items()} for found in rates]


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--net", nargs="+", default=["CLeVER"], choices=METHODS)
    parser.add_argument("--arch", nargs="+", default=["vit_tiny"], help="backbones; every net with each is a row of the table")
    parser.add_argument("--launch", nargs="+", default=["eager"], choices=LAUNCH, help="of kernels: each is a row of its own")
    parser.add_argument("--images", default="photos", choices=("photos", "small"), help="small: PNG files of 28 x 28 pixels")
    parser.add_argument("--out_dim", type=int, default=65536)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--amp_dtype", default="fp32", choices=("auto", "bf16", "fp16", "fp32"))
    parser.add_argument("--num_workers", type=int, default=1, help="data loading workers; 0: none, the step waits")
    parser.add_argument("--steps", type=int, default=4, help="steps of an epoch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file to save the numbers in")
    parser.add_argument("flags", nargs="*", help="after --: further flags of main_dino.py")
    options = parser.parse_args()
    check_positive(options, "out_dim", "batch_size", "steps", "rounds")
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"a CPU, {torch.get_num_threads()} threads"
    about = f"out_dim {options.out_dim}, batch {options.batch_size}, {options.amp_dtype}, {options.num_workers} workers"
    print(f"{about}; images per second on {machine}, torch {torch.__version__}")
    names = list(itertools.product(options.net, options.arch, options.launch))
    with tempfile.TemporaryDirectory() as scratch:
        write_images(options.images, Path(scratch), options.batch_size * options.steps)
        pairs = itertools.product(options.net, options.arch)
        limits = {pair: products_limit(options, scratch, *pair) for pair in pairs}
        networks, memory = zip(*(prepare(options, scratch, *name) for name in names), strict=True)
        rates = measure(networks, options.batch_size * options.steps, options.rounds)
    results = []
    for name, found, gib in zip(names, rates, memory, strict=True):
        cores = found["step"] * max(options.num_workers, 1) / found["loader"]
        more = {"cores needed": cores, "% of products": 100 * found["step"] / limits[name[:2]], "GiB": gib}
        results.append(dict(zip(("net", "arch", "launch"), name, strict=True)) | found | more)
    rows = ([value if isinstance(value, str) else f"{value:.1f}" for value in row.values()] for row in results)
    print("\n" + align([[*results[0]], *rows], 3))
    if options.output:
        about = {"kind": "bench_pretrain", "machine": machine, "torch": torch.__version__, "output": str(options.output)}
        save_json(vars(options) | about | {"results": results}, options.output)


if __name__ == "__main__":
    run_entry_point(main)
