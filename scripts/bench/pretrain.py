"""Seconds and memory of one pretraining step, beside its matrix products alone and the step written the straightforward way.

    python -m scripts.bench.pretrain                       # ViT-tiny, out_dim 65536, batch 8, this machine
    python -m scripts.bench.pretrain --arch vit_tiny resnet18 vssm2-vmambav2_tiny_224 --output step.json
    python -m scripts.bench.pretrain --arch vit_small --batch_size 64 --amp_dtype bf16 --straightforward_dtype fp16   # on a GPU

"straightforward" is the step as the originals write it: a softmax and a log-softmax for each of the 18 pairs of views, the
last layer's normalised weight materialised, attention as two products and a softmax, gradients clipped and the teacher updated
tensor by tensor, losses read at once; with fp16, the originals' type on GPUs, the loss is scaled. Both compute the same. Each
measurement runs in a process of its own, the two in turn; the table shows medians over the rounds.

"matrix products" are those of our step (linear layers, attention, convolutions as products with their unfolded inputs; not
depthwise convolutions), recorded while it runs. Each shape is timed alone after every step, so that both see the same clock
and the same neighbours on the machine: their ratio says how far the step is from the bound that its products set.
"""

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import main_dino
from clever import utils
from clever.arguments import ArgumentParser, check_positive
from clever.entry import run_entry_point
from clever.methods import METHODS
from clever.models import vision_transformer
from clever.training import optim
from clever.training.build import build_networks, build_pretraining
from clever.training.pretraining import Pretraining
from clever.training.telemetry import peak_memory_gib
from scripts.bench.products import ProductRecorder, gigaflops, synchronize, time_products

IMPLEMENTATIONS = ("ours", "straightforward")


class NormalizedWeightLinear(nn.Module):
    """Last layer that builds its normalised weight, as torch's weight norm does."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.weight_g, self.weight_v = layer.weight_g, layer.weight_v

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))


class StraightforwardLoss(nn.Module):
    """Pair by pair; the EF term only where there are two heads."""

    def __init__(self, ncrops: int, sizes: list[int], temp: float):
        super().__init__()
        self.ncrops, self.temp = ncrops, temp
        self.centers = [torch.zeros(1, k) for k in sizes]

    def forward(self, students, teachers):
        total = 0
        for head, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
            center = self.centers[head] = self.centers[head].to(teacher.device)
            s = (student.float() / 0.1).chunk(self.ncrops)
            q = F.softmax((teacher.float() - center) / self.temp, dim=-1).detach().chunk(2)
            terms = [
                torch.sum(-q[i] * F.log_softmax(s[v], dim=-1), dim=-1).mean()
                if head == 0
                else F.l1_loss(c := F.cosine_similarity(q[i], F.softmax(s[v], dim=-1), dim=-1), torch.zeros_like(c))
                for i in range(2)
                for v in range(self.ncrops)
                if v != i
            ]
            total = total + sum(terms) / len(terms)
            self.centers[head] = center * 0.9 + teacher.float().mean(0, keepdim=True) * 0.1
        return total


def straightforward_step(run: Pretraining, criterion: StraightforwardLoss, optimizer, views: list[torch.Tensor]) -> float:
    student, teacher = run.student, run.teacher
    with torch.autocast(run.device.type, run.amp_dtype, enabled=run.amp_dtype != torch.float32):
        with torch.no_grad():
            teachers = teacher(views[0].flatten(0, 1))
        students = student([view.flatten(0, 1) for view in views])
        students, teachers = ((x if isinstance(x, tuple) else (x,)) for x in (students, teachers))
        loss = criterion(students, teachers)
        if len(student.heads) == 2:
            squares = [sum(p.pow(2).sum() for p in head.parameters()) for head in student.heads]
            loss = loss + run.criterion.reg_lambd * (squares[0] - squares[1]).abs()
    value = loss.item()
    optimizer.zero_grad()
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(optimizer)
    for p in student.parameters():
        if p.grad is not None:
            scale = run.clip_grad / (p.grad.norm(2).item() + 1e-6)
            if scale < 1:
                p.grad.mul_(scale)
    run.scaler.step(optimizer)
    run.scaler.update()
    with torch.no_grad():
        for q, p in zip(student.parameters(), teacher.parameters(), strict=True):
            p.data.mul_(0.996).add_(0.004 * q.detach().data)
    return value


class Repeat:
    """The same views `steps` times, in place of a data loader."""

    def __init__(self, views, steps):
        self.views, self.steps = views, steps

    def __len__(self):
        return self.steps

    def __iter__(self):
        return iter([(self.views, None)] * self.steps)


def train_again(run: Pretraining, batches: Iterable) -> None:
    """The first epoch from its beginning, however often, without its progress lines."""
    run.part_of_epoch = {}
    with contextlib.redirect_stdout(io.StringIO()):
        run.train_one_epoch(batches, epoch=0)


def build(options: argparse.Namespace) -> tuple[Pretraining, Callable[[int], None]]:
    """The run, and a function that does a number of steps."""
    flags = ["--data_path", "none", "--net", options.net, "--arch", options.arch[0], "--out_dim", str(options.out_dim)]
    flags += ["--batch_size_per_gpu", str(options.batch_size), "--warmup_epochs", "0", "--epochs", "2"]
    flags += ["--amp_dtype", options.amp_dtype if options.implementation == "ours" else options.straightforward_dtype]
    args = main_dino.get_args_parser().parse_args(flags + ["--freeze_last_layer", "0", "--print_freq", "1000000"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = build_pretraining(args, *build_networks(args, device), device, options.steps)
    sizes = (2, args.global_crops_size), (args.local_crops_number, args.local_crops_size)
    views = [torch.randn(n, options.batch_size, 3, size, size, device=device) for n, size in sizes]  # V', B, 3, S, S
    if options.channels_last and options.implementation == "ours":
        for network in (run.student, run.teacher):
            network.to(memory_format=torch.channels_last)
        views = [torch.stack([each.contiguous(memory_format=torch.channels_last) for each in view]) for view in views]
    if options.implementation == "ours":
        return run, lambda steps: train_again(run, Repeat(views, steps))

    vision_transformer.Attention._prefers_plain = lambda self, q: True
    for head in (*run.student.heads, *run.teacher.heads):
        head.last_layer = NormalizedWeightLinear(head.last_layer)
    heads_out = [getattr(args, flag) for flag in METHODS[args.net].head_flags]
    criterion = StraightforwardLoss(2 + args.local_crops_number, heads_out, args.teacher_temp)
    optimizer = torch.optim.AdamW(optim.param_groups(run.student), lr=1e-5, weight_decay=0.04)

    def train(steps: int) -> None:
        for _ in range(steps):
            straightforward_step(run, criterion, optimizer, views)

    return run, train


def measure(options: argparse.Namespace) -> dict:
    """One process: warm up, record the products, time steps and products in turn, read the peak memory."""
    torch.manual_seed(0)
    run, train = build(options)
    with ProductRecorder() as recorder:
        train(1)
    memory = peak_memory_gib(run.device)
    steps, products = [], []
    for _ in range(options.steps):
        synchronize(run.device)
        start = time.perf_counter()
        train(1)
        synchronize(run.device)
        steps.append(time.perf_counter() - start)
        if options.implementation == "ours":
            products.append(time_products(recorder.counts, run.device))
    result = {"seconds": statistics.median(steps), "memory_gib": memory}
    if products:
        result |= {
            "products_seconds": statistics.median(products),
            "step_to_products": statistics.median(s / p for s, p in zip(steps, products, strict=True)),
            "products_gflop": gigaflops(recorder.counts),
        }
    return result | {"device": str(run.device), "dtype": str(run.amp_dtype).removeprefix("torch.")}


def measure_in_turn(options: argparse.Namespace, arch: str) -> dict[str, dict]:
    """Medians over the rounds of both implementations' numbers, each from processes of its own."""
    found: dict[str, list[dict]] = {name: [] for name in IMPLEMENTATIONS}
    flags = ["--net", options.net, "--arch", arch, "--amp_dtype", options.amp_dtype, "--out_dim", str(options.out_dim)]
    flags += ["--batch_size", str(options.batch_size), "--steps", str(options.steps)]
    flags += ["--straightforward_dtype", options.straightforward_dtype, *(["--channels_last"] if options.channels_last else [])]
    for _ in range(options.rounds):
        for name in IMPLEMENTATIONS:
            command = [sys.executable, "-m", "scripts.bench.pretrain", *flags, "--implementation", name]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[name].append(json.loads(output.splitlines()[-1]))
    return {
        name: {
            key: value if isinstance(value, str) else statistics.median(each[key] for each in runs)
            for key, value in runs[0].items()
        }
        for name, runs in found.items()
    }


def print_table(options: argparse.Namespace, results: dict[str, dict[str, dict]]) -> None:
    first, other = next(iter(results.values())).values()
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"a CPU, {torch.get_num_threads()} threads"
    print(f"{options.net}, out_dim {options.out_dim}, batch {options.batch_size}, 2 + 8 crops, {first['dtype']} "
          f"(straightforward: {other['dtype']}){', channels last' * options.channels_last} on {machine}, "
          f"torch {torch.__version__}\n")  # fmt: skip
    print("| backbone | step, s (images/s) | its matrix products alone, s (GFLOP/s) | step / products "
          "| straightforward step, s | memory, GiB: ours, straightforward |\n|---|---|---|---|---|---|")  # fmt: skip
    for arch, result in results.items():
        ours, other = (result[name] for name in IMPLEMENTATIONS)
        rate = ours["products_gflop"] / ours["products_seconds"]
        print(f"| {arch} | {ours['seconds']:.3f} ({options.batch_size / ours['seconds']:.0f}) "
              f"| {ours['products_seconds']:.3f} ({rate:.0f}) "
              f"| {ours['step_to_products']:.2f} | {other['seconds']:.3f} ({other['seconds'] / ours['seconds']:.2f} x) "
              f"| {ours['memory_gib']:.2f}, {other['memory_gib']:.2f} |")  # fmt: skip


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--net", default="CLeVER", choices=METHODS)
    parser.add_argument("--arch", nargs="+", default=["vit_tiny"], help="one or more backbones; one row of the table each")
    parser.add_argument("--out_dim", type=int, default=65536)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--amp_dtype", default="fp32", choices=["auto", "bf16", "fp16", "fp32"])
    parser.add_argument("--straightforward_dtype", choices=["auto", "bf16", "fp16", "fp32"], help="default: --amp_dtype")
    parser.add_argument("--channels_last", action="store_true", help="our networks and images in this memory format")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each implementation")
    parser.add_argument("--output", type=Path, help="JSON file to save the numbers in")
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, help="measure this one, here, and print JSON")
    options = parser.parse_args()
    check_positive(options, "out_dim", "batch_size", "steps", "rounds")
    options.straightforward_dtype = options.straightforward_dtype or options.amp_dtype
    if options.implementation:
        print(json.dumps(measure(options)))
        return
    results = {arch: measure_in_turn(options, arch) for arch in options.arch}
    print_table(options, results)
    if options.output:
        utils.save_json(results, options.output)


if __name__ == "__main__":
    run_entry_point(main)
