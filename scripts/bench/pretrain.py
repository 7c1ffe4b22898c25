"""Images per second of pretraining: the step, beside the step written the straightforward way, and the loader of the views.

    python -m scripts.bench.pretrain                                                  # ViT-tiny, batch 8, this machine
    python -m scripts.bench.pretrain --arch vit_small resnet50 --batch_size 64 --amp_dtype bf16 --num_workers 12

Columns, medians over rounds in which all are measured in turn:
- step: what training does with a batch, on views that are kept.
- straightforward: the same as the originals write it: a softmax and a log-softmax for each of the 18 pairs of views, the last
  layer's normalised weight materialised, attention as two products and a softmax, gradients clipped and the teacher updated
  tensor by tensor, losses read at once; with fp16, the originals' type on GPUs, the loss is scaled.
- loader: views of random images. Its workers are processes; on a CPU they compete with the step for its cores.
- together: an epoch. If it is as fast as the slower of step and loader, the two overlap completely.
- cores needed: the rate of the step divided by that of the loader per worker.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import main_dino
from clever.arguments import ArgumentParser, check_positive
from clever.data.datasets import CheckRecord
from clever.entry import run_entry_point
from clever.methods import METHODS
from clever.models.vision_transformer import Attention
from clever.training import optim
from clever.training.build import build_networks, build_pretraining
from clever.training.pretraining import Pretraining
from clever.utils import save_json
from scripts.bench.views import write_images

TYPES = ("auto", "bf16", "fp16", "fp32")


# --- the straightforward step ----------------------------------------------------------------------------------------


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


def straightforward_step(run: Pretraining, criterion: StraightforwardLoss, views: list[torch.Tensor]) -> None:
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
    loss.item()
    run.optimizer.zero_grad()
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)
    for p in student.parameters():
        if p.grad is not None:
            scale = run.clip_grad / (p.grad.norm(2).item() + 1e-6)
            if scale < 1:
                p.grad.mul_(scale)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    with torch.no_grad():
        for q, p in zip(student.parameters(), teacher.parameters(), strict=True):
            p.data.mul_(0.996).add_(0.004 * q.detach().data)


def build_straightforward(
    args: argparse.Namespace, device: torch.device, steps: int
) -> tuple[Pretraining, StraightforwardLoss]:
    """A run with plain attention, last layers and optimizer, and its loss."""
    run = build_pretraining(args, *build_networks(args, device), device, steps)
    for network in (run.student, run.teacher):
        for module in network.modules():
            if isinstance(module, Attention):
                module._prefers_plain = lambda q: True
        for head in network.heads:
            head.last_layer = NormalizedWeightLinear(head.last_layer)
    run.optimizer = torch.optim.AdamW(optim.param_groups(run.student), lr=1e-5, weight_decay=0.04)
    sizes = [getattr(args, flag) for flag in METHODS[args.net].head_flags]
    return run, StraightforwardLoss(2 + args.local_crops_number, sizes, args.teacher_temp)


# --- measuring -------------------------------------------------------------------------------------------------------


def train_again(run: Pretraining, batches: Iterable) -> None:
    """The first epoch from its beginning, however often, without its progress lines."""
    run.so_far = {}
    with contextlib.redirect_stdout(io.StringIO()):
        run.train_one_epoch(batches, epoch=0)


def measure(options: argparse.Namespace, arch: str, folder: Path) -> dict[str, float]:
    """Images per second of each column, medians over the rounds, and the cores that feed the step."""
    flags = ["--data_path", folder, "--net", options.net, "--arch", arch, "--batch_size_per_gpu", options.batch_size]
    flags += ["--amp_dtype", options.amp_dtype, "--out_dim", options.out_dim, "--num_workers", options.num_workers]
    flags += ["--epochs", 1, "--warmup_epochs", 0, "--freeze_last_layer", 0, "--print_freq", 10**6]
    args = main_dino.resolve_args(main_dino.get_args_parser().parse_args(list(map(str, flags))))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = main_dino.build_loader(main_dino.build_dataset(args, CheckRecord(None)), args)
    run = build_pretraining(args, *build_networks(args, device), device, len(loader))
    views = [run.normalized(view.to(device)) for view in next(iter(loader))[0]]  # V', B, 3, S, S; starts the workers
    args.amp_dtype = options.straightforward_dtype or options.amp_dtype
    plain, criterion = build_straightforward(args, device, len(loader))
    work = {
        "step": lambda: train_again(run, [(views, None)] * len(loader)),
        "straightforward": lambda: [straightforward_step(plain, criterion, views) for _ in range(len(loader))],
        "loader": lambda: [None for _ in loader],
        "together": lambda: train_again(run, loader),
    }
    train_again(run, [(views, None)])  # warm up
    straightforward_step(plain, criterion, views)
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    rates: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(options.rounds):
        for name, function in work.items():
            wait()
            start = time.perf_counter()
            function()
            wait()
            rates[name].append(len(loader) * options.batch_size / (time.perf_counter() - start))
    found = {name: statistics.median(values) for name, values in rates.items()}
    return found | {"cores needed": found["step"] * max(options.num_workers, 1) / found["loader"]}


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--net", default="CLeVER", choices=METHODS)
    parser.add_argument("--arch", nargs="+", default=["vit_tiny"], help="one or more backbones; one row of the table each")
    parser.add_argument("--out_dim", type=int, default=65536)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--amp_dtype", default="fp32", choices=TYPES)
    parser.add_argument("--straightforward_dtype", choices=TYPES, help="default: --amp_dtype")
    parser.add_argument("--num_workers", type=int, default=1, help="data loading workers; 0: none, the step waits")
    parser.add_argument("--steps", type=int, default=4, help="steps of an epoch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file to save the numbers in")
    options = parser.parse_args()
    check_positive(options, "out_dim", "batch_size", "steps", "rounds")
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"a CPU, {torch.get_num_threads()} threads"
    print(f"{options.net}, out_dim {options.out_dim}, batch {options.batch_size}, {options.amp_dtype}, {options.num_workers} "
          f"workers; images per second on {machine}, torch {torch.__version__}\n")  # fmt: skip
    print("| backbone | step | straightforward | loader | together | cores needed |\n|---|--:|--:|--:|--:|--:|")
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        write_images("photos", Path(scratch), options.batch_size * options.steps)
        for arch in options.arch:
            results[arch] = measure(options, arch, Path(scratch))
            print(f"| {arch} | " + " | ".join(f"{value:.1f}" for value in results[arch].values()) + " |", flush=True)
    if options.output:
        settings = {name: value for name, value in vars(options).items() if name != "output"}
        about = {"kind": "bench_pretrain", "machine": machine, "torch": torch.__version__}
        save_json(about | settings | {"results": results}, options.output)


if __name__ == "__main__":
    run_entry_point(main)
